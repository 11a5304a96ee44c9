"""What is printed stays short however many layers a model has."""

from __future__ import annotations

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model

import lorapro
from small_models import llama, lora

LAYERS = 12


def wide(config=None):
    return get_peft_model(
        llama(num_hidden_layers=LAYERS),
        config or LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"]),
    )


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_an_optimizer_is_a_few_lines(name):
    optimizer = lorapro.create_lorapro_optimizer(wide(), name, lr=1e-3, weight_decay=0.1)
    text = repr(optimizer)
    assert text.startswith(type(optimizer).__name__)
    assert len(text.splitlines()) <= 5
    assert max(map(len, text.splitlines())) <= 160
    assert f"pairs ({7 * LAYERS} of rank 2)" in text
    assert "plain (1)" in text
    assert "lr=0.001" in text
    assert "weight_decay=0.1" in text
    assert ("mode='efficient'" in text) == (name == "adamw")


def test_groups_that_differ_are_lines_of_their_own():
    A, B, C = (torch.nn.Parameter(torch.ones(3, 3)) for _ in range(3))
    groups = lorapro.lora_param_groups(None, pairs=[lorapro.factors.LoraPair("p", A, B, 1.0)])
    optimizer = lorapro.LoraProSGD([*groups, {"params": [C], "lr": 0.5}], lr=0.1)
    lines = repr(optimizer).splitlines()
    assert "pairs (1 of rank 3)" in lines[1]
    assert "lr=0.1" in lines[1]
    assert "lr=0.5" in lines[2]


def test_a_pair_is_a_line():
    assert len(repr(lorapro.factors.find_pairs(wide()).pairs[0])) < 160


def test_an_error_names_three_layers():
    model = wide(LoHaConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=rf"and {LAYERS - 3} more") as caught:
        lorapro.create_lorapro_optimizer(model, lr=1e-3)
    assert str(caught.value).count("q_proj") == 3


@pytest.mark.parametrize(
    "use",
    [
        lambda model: lorapro.create_lorapro_optimizer(model, lr=1e-3, adapter="b"),
        lambda model: lorapro.align_gradients(
            torch.optim.SGD(model.parameters(), 0.1), model, adapter="b"
        ),
        lambda model: lorapro.diagnostics.measure(model, adapter="b"),
    ],
)
def test_an_adapter_that_is_not_active_says_so(use):
    model = lora()
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"adapter 'b' is not trained.*model\.set_adapter\('b'\)"):
        use(model)
    model.set_adapter("b")
    assert lorapro.create_lorapro_optimizer(model, lr=1e-3, adapter="b").param_groups
