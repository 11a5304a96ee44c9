from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from experiments.tiny_models import run_until
from lorapro.experiments.config import build_config
from lorapro.experiments.errors import UserError
from lorapro.experiments.evaluation import make_trainer
from lorapro.experiments.head_rate import set_head_rate
from lorapro.experiments.methods import METHODS
from lorapro.experiments.model_building import build_model, check_run
from lorapro.experiments.runner import make_task, run

TRAINED = [method for method in METHODS if method not in ("zero-shot", "adalora")]


def rates(values):
    """The rate of every trained parameter by its name."""
    config = build_config(values)
    task = make_task(config)
    model = build_model(config, task)
    trainer = make_trainer(config, task, model, check_run(config, model, task))
    groups = trainer.create_optimizer().param_groups
    held = [(id(p), group["lr"]) for group in groups for p in group["params"]]
    assert len(held) == len(dict(held))
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    return {names[key]: lr for key, lr in held if key in names}


@pytest.mark.parametrize("method", TRAINED)
def test_the_head_has_its_rate_and_nothing_else_changes(method, classify):
    values = {**classify, "method": method, "learning_rate": 1e-3, "weight_decay": 0.1}
    before, after = rates(values), rates({**values, "head_learning_rate": 7e-2})
    assert before.keys() == after.keys()
    heads = {name for name in before if "classifier" in name}
    assert heads
    assert {after[name] for name in heads} == {7e-2}
    assert all(after[name] == before[name] for name in before.keys() - heads)


@pytest.mark.parametrize("method", ["lora", "lora-fa", "lora-pro-muon"])
def test_the_rate_reaches_the_head(method, classify):
    # A warm-up or decay scales both rates alike; the first step's size is AdamW's rate.
    values = {**classify, "method": method, "learning_rate": 1e-12, "head_learning_rate": 1e-2}
    config = build_config({**values, "max_steps": 1, "lr_scheduler_type": "constant"})
    model = build_model(config, make_task(config))
    start = next(p for name, p in model.named_parameters() if "modules_to_save" in name).clone()
    run(config)
    saved = load_file(config.folder / "adapter" / "adapter_model.safetensors")
    (head,) = (p for name, p in saved.items() if "classifier" in name and p.dim() == 2)
    assert float((head - start).abs().max().detach()) == pytest.approx(1e-2, rel=1e-3)
    assert max(float(p.abs().max()) for name, p in saved.items() if "lora_B" in name) < 1e-9


def test_an_interrupted_run_keeps_the_rate(classify, tmp_path):
    values = {**classify, "method": "lora-pro-muon", "head_learning_rate": 3e-2}
    whole = build_config({**values, "output_dir": str(tmp_path / "whole")})
    cut = {**values, "save_strategy": "steps", "save_steps": 3}
    cut = build_config({**cut, "output_dir": str(tmp_path / "cut")})
    run_until(cut, 3)
    for config in (whole, cut):
        run(config)
    first, second = (
        load_file(config.folder / "adapter" / "adapter_model.safetensors")
        for config in (whole, cut)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_where_no_head_starts_afresh_it_is_refused(solve):
    config = build_config({**solve, "head_learning_rate": 1e-2})
    with pytest.raises(UserError, match="head_learning_rate: the task gives its model no new head"):
        run(config)


def test_a_head_within_a_group_of_ours_leaves_it_with_its_names():
    from peft import LoraConfig, get_peft_model

    import lorapro

    net = nn.ModuleDict({"body": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)})
    config = LoraConfig(
        r=2, target_modules=["body"], modules_to_save=["classifier"], bias="lora_only"
    )
    model = get_peft_model(net, config)
    optimizer = lorapro.LoraProAdamW(lorapro.lora_param_groups(model), lr=1e-3)
    set_head_rate(optimizer, model, ["classifier"], 1e-1)
    _, rest, head = optimizer.param_groups
    assert (rest["lr"], len(rest["names"]), head["lr"], len(head["names"])) == (1e-3, 1, 1e-1, 2)
    net["classifier"](net["body"](torch.ones(1, 4))).sum().backward()
    before = [p.detach().clone() for p in head["params"]]
    optimizer.step()
    for p, q in zip(head["params"], before, strict=True):
        torch.testing.assert_close((p - q).abs(), torch.full_like(q, 1e-1))
