from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainingArguments

from lorapro.experiments.methods import OPTIMIZERS
from lorapro.experiments.methods.muon import MuonAndAdamW, hidden_matrices


def build(model, folder, **options):
    args = TrainingArguments(output_dir=str(folder), report_to="none", **options)
    factory, kwargs = OPTIMIZERS["muon"].make(args, OPTIMIZERS["muon"].options())
    return factory()(model, **kwargs)


def test_every_parameter_is_trained_once_and_only_hidden_matrices_by_muon(tiny_bert, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    muon, adam = build(model, tmp_path, learning_rate=1e-3).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    held = [names[id(p)] for group in (muon, adam) for p in group["params"]]
    assert sorted(held) == sorted(names.values())
    muon_names = [names[id(p)] for p in muon["params"]]
    assert all(p.dim() == 2 for p in muon["params"])
    assert not any("embedding" in name or "classifier" in name for name in muon_names)
    assert any("attention" in name for name in muon_names)


@pytest.mark.parametrize("name", ["muon", "balanced-muon", "lora-pro-muon"])
@pytest.mark.parametrize("momentum", [None, 0.8])
def test_every_muon_takes_a_momentum(name, momentum, tmp_path):
    part = OPTIMIZERS[name]
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    factory, kwargs = part.make(args, part.options(muon_momentum=momentum))
    optimizer = factory()(model, **kwargs)
    held = {group["momentum"] for group in optimizer.param_groups if "momentum" in group}
    own = 0.9 if name == "lora-pro-muon" else 0.95
    assert held == {own if momentum is None else momentum}


def test_a_tied_head_is_not_muons(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    head = model.get_output_embeddings().weight
    assert all(p is not head for p in hidden_matrices(model))


def test_both_rules_are_torchs():
    torch.manual_seed(0)
    net = nn.ModuleDict({"body": nn.Linear(6, 4), "score": nn.Linear(4, 2)})
    other = nn.ModuleDict({"body": nn.Linear(6, 4), "score": nn.Linear(4, 2)})
    other.load_state_dict(net.state_dict())
    (matrix,) = hidden_matrices(net)
    rest = [p for p in net.parameters() if p is not matrix]
    optimizer = MuonAndAdamW([matrix], rest, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9))
    twin = [p for p in other.parameters() if p is not other["body"].weight]
    twins = (
        torch.optim.Muon(
            [other["body"].weight], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(twin, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9)),
    )
    for step in range(5):
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(step))
        for model in (net, other):
            model.zero_grad()
            model["score"](model["body"](x).relu()).square().sum().backward()
        optimizer.step()
        for each in twins:
            each.step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_a_change_is_cut_to_its_rank_after_each_step(tmp_path):
    torch.manual_seed(0)
    net, free = (nn.ModuleDict({"body": nn.Linear(6, 5, bias=False)}) for _ in range(2))
    free.load_state_dict(net.state_dict())
    start = net["body"].weight.detach().clone()
    part = OPTIMIZERS["muon"]
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", learning_rate=0.1)
    optimizers = []
    for model, rank in ((net, 2), (free, 0)):
        factory, kwargs = part.make(args, part.options(muon_rank=rank))
        optimizers.append(factory()(model, **kwargs))
    for step in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((net, free), optimizers, strict=True):
            model.zero_grad()
            model["body"](x).square().sum().backward()
            optimizer.step()
        if step == 0:  # from one point, the nearest change of rank two to the free one
            values = torch.linalg.svdvals(free["body"].weight - start)
            left = (net["body"].weight - free["body"].weight).norm()
            torch.testing.assert_close(left, values[2:].norm(), rtol=1e-4, atol=1e-6)
        change = torch.linalg.svdvals(net["body"].weight - start)
        assert change[1] > 1e-3
        assert change[2] < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cut_step_of_a_run_that_diverged_does_not_fail(dtype):
    weight = nn.Parameter(torch.eye(4, dtype=dtype))
    optimizer = MuonAndAdamW([weight], [], lr=0.1, rank=2)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.linalg.matrix_norm((weight - torch.eye(4)).float()) > 0.01
    weight.grad = torch.full_like(weight, torch.nan)
    optimizer.step()
    assert weight.isnan().all()


def test_a_rank_for_an_adapter_is_refused(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    part = OPTIMIZERS["muon"]
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    factory, kwargs = part.make(args, part.options(muon_rank=2))
    with pytest.raises(ValueError, match="an adapter has a rank"):
        factory()(model, **kwargs)


def test_a_model_without_hidden_matrices_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no hidden linear layer"):
        build(nn.ModuleDict({"score": nn.Linear(2, 2)}), tmp_path)
