"""Muon on each factor, in units that alpha does not change."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainingArguments

from lorapro.experiments.methods import OPTIMIZERS, find_method
from lorapro.factors import find_pairs


def trained(folder, alpha, length=1.0):
    """Changes s·B·A after some steps; A begins ``length`` times as long as usual."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 14), nn.Tanh(), nn.Linear(14, 6))
    x, y = torch.randn(64, 10), torch.randn(64, 6)
    config = LoraConfig(r=3, lora_alpha=alpha, target_modules=["0", "2"])
    model = get_peft_model(net, config)
    pairs = find_pairs(model).pairs
    with torch.no_grad():
        for pair in pairs:
            pair.A.mul_(length)
    args = TrainingArguments(output_dir=str(folder), report_to="none", learning_rate=0.05)
    factory, kwargs = OPTIMIZERS["balanced-muon"].make(args, OPTIMIZERS["balanced-muon"].options())
    optimizer = factory()(model, **kwargs)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.05}
    assert losses[-1] < 0.9 * losses[0]
    return [pair.scaling * (pair.B @ pair.A).detach() for pair in pairs]


@pytest.mark.parametrize(("alpha", "length"), [(128, 1.0), (8, 16.0)])
def test_neither_alpha_nor_the_length_of_A_counts(tmp_path, alpha, length):
    for one, two in zip(trained(tmp_path, 8), trained(tmp_path, alpha, length), strict=True):
        assert (one - two).norm() < 1e-4 * one.norm()


def test_it_is_a_method_and_wants_pairs(tmp_path):
    assert find_method("balanced-muon").adapter.name == "lora"
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    factory, kwargs = OPTIMIZERS["balanced-muon"].make(args, OPTIMIZERS["balanced-muon"].options())
    with pytest.raises(ValueError, match="needs LoRA pairs"):
        factory()(nn.Sequential(nn.Linear(2, 2)), **kwargs)
