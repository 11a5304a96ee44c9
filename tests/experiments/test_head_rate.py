from __future__ import annotations

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, DistilBertConfig, DistilBertModel

from experiments.tiny_models import run_until
from lorapro.experiments.config import build_config
from lorapro.experiments.errors import UserError
from lorapro.experiments.evaluation import make_trainer
from lorapro.experiments.head_rate import set_rate_of
from lorapro.experiments.methods import METHODS
from lorapro.experiments.model_building import build_model, check_run
from lorapro.experiments.plan import load_comparison
from lorapro.experiments.runner import make_task, run

TRAINED = [*(method for method in METHODS if method != "zero-shot"), "lora+balanced-muon"]


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


def test_a_task_without_a_head_does_not_take_it(solve):
    with pytest.raises(UserError, match="'head_learning_rate' is not read by this task"):
        build_config({**solve, "head_learning_rate": 1e-2})


def test_a_model_with_a_head_for_these_labels_has_nothing_new(classify, tmp_path):
    whole = build_config({**classify, "method": "full", "output_dir": str(tmp_path / "first")})
    run(whole)
    values = {**classify, "model": str(whole.folder / "model"), "head_learning_rate": 1e-2}
    with pytest.raises(UserError, match="nothing that trains starts afresh"):
        run(build_config({**values, "method": "lora"}))


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_head_of_two_layers_takes_it_whole(method, classify, tiny_bert, tmp_path):
    torch.manual_seed(0)
    sizes = {"dim": 16, "hidden_dim": 32, "n_heads": 2, "n_layers": 1}
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    shape = DistilBertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    DistilBertModel(shape).save_pretrained(tmp_path / "distilbert")
    tokenizer.save_pretrained(tmp_path / "distilbert")
    found = rates(
        {
            **classify,
            "method": method,
            "model": str(tmp_path / "distilbert"),
            "learning_rate": 1e-3,
            "head_learning_rate": 7e-2,
        }
    )
    in_head = {name: lr for name, lr in found.items() if "classifier" in name}
    assert len(in_head) == 4
    assert set(in_head.values()) == {7e-2}
    assert {lr for name, lr in found.items() if name not in in_head} == {1e-3}


def test_a_row_of_a_comparison_can_take_it_away(classify, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    values = {key: value for key, value in classify.items() if key not in ("output_dir", "seed")}
    rows = {"lora": {}, "as-the-rest": {"method": "lora", "head_learning_rate": None}}
    values |= {"head_learning_rate": 1e-2, "methods": rows}
    recipe.write_text(yaml.safe_dump(values))
    comparison = load_comparison(recipe, folder=tmp_path / "out")
    given = {cell.label: cell.config(1e-3, 0).task.head_learning_rate for cell in comparison.cells}
    assert given == {"lora": 1e-2, "as-the-rest": None}


def test_null_is_no_point_of_a_grid(classify, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    values = {key: value for key, value in classify.items() if key not in ("output_dir", "seed")}
    values |= {"grid": {"head_learning_rate": [None, 1e-2]}, "methods": ["lora"]}
    recipe.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="grid: head_learning_rate: null is no value to compare"):
        load_comparison(recipe, folder=tmp_path / "out")


def test_the_card_names_it(classify):
    config = build_config({**classify, "method": "lora", "head_learning_rate": 3e-2})
    run(config)
    assert "| head learning rate | 0.03 |" in (config.folder / "adapter" / "README.md").read_text()


def test_a_head_within_a_group_of_ours_leaves_it_with_its_names():
    from peft import LoraConfig, get_peft_model

    import lorapro

    net = nn.ModuleDict({"body": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)})
    config = LoraConfig(
        r=2, target_modules=["body"], modules_to_save=["classifier"], bias="lora_only"
    )
    model = get_peft_model(net, config)
    optimizer = lorapro.LoraProAdamW(lorapro.lora_param_groups(model), lr=1e-3)
    set_rate_of(optimizer, model, ["classifier.weight", "classifier.bias"], 1e-1)
    _, rest, head = optimizer.param_groups
    assert (rest["lr"], len(rest["names"]), head["lr"], len(head["names"])) == (1e-3, 1, 1e-1, 2)
    net["classifier"](net["body"](torch.ones(1, 4))).sum().backward()
    before = [p.detach().clone() for p in head["params"]]
    optimizer.step()
    for p, q in zip(head["params"], before, strict=True):
        torch.testing.assert_close((p - q).abs(), torch.full_like(q, 1e-1))
