"""What a recipe asks for: cells, grids, toys, and what the report is told."""

from __future__ import annotations

import json

import pytest
import yaml

from lorapro.cli.main import main
from lorapro.experiments.config import build_config
from lorapro.experiments.keys import our_keys
from lorapro.experiments.options import union
from lorapro.experiments.plan import load_comparison
from lorapro.experiments.sweep import key, pick_rate, wanted
from lorapro.experiments.tasks import TASKS
from lorapro.experiments.toys import cut


def write_yaml(path, values):
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def load(tmp_path, values, *flags):
    return load_comparison(write_yaml(tmp_path / "c.yaml", values), flags, folder=tmp_path / "out")


def places(comparison):
    return [
        cell.folder.relative_to(comparison.folder / "runs").as_posix() for cell in comparison.cells
    ]


def test_a_cell_for_every_point_that_its_method_reads(tmp_path):
    values = {"methods": ["full", "lora"], "grid": {"rank": [4, 8], "alpha": [16, 32]}}
    comparison = load(tmp_path, values)
    ranks = [f"tweets/lora/rank={rank},alpha={alpha}" for rank in (4, 8) for alpha in (16, 32)]
    assert sorted(places(comparison)) == sorted(["tweets/full", *ranks])
    (full,) = (cell for cell in comparison.cells if cell.label == "full")
    assert full.axes == {}
    assert "rank" not in full.values


def test_a_key_that_a_row_fixes_is_no_axis_of_it(tmp_path):
    points = [{"rank": 4, "alpha": 8}, {"rank": 8, "alpha": 16}]
    methods = {"lora": 1e-3, "fixed": {"method": "rslora", "alpha": 32}}
    comparison = load(tmp_path, {"methods": methods, "grid": points})
    fixed = [cell for cell in comparison.cells if cell.label == "fixed"]
    assert [dict(cell.axes) for cell in fixed] == [{"rank": 4}, {"rank": 8}]
    assert {cell.values["alpha"] for cell in fixed} == {32}


def test_keys_that_move_together_and_trainers_keys(tmp_path):
    points = [{"rank": 4, "alpha": 8}, {"rank": 8, "alpha": 16}]
    comparison = load(tmp_path, {"methods": {"lora": 1e-3}, "grid": points})
    assert [dict(cell.axes) for cell in comparison.cells] == points
    values = {"methods": ["full"], "grid": {"per_device_train_batch_size": [4, 16]}}
    batches = load(tmp_path, values)
    sizes = [cell.config(1e-3, 0).training.per_device_train_batch_size for cell in batches.cells]
    assert sizes == [4, 16]


def test_tasks_have_keys_and_rates_of_their_own_and_methods_come_first(tmp_path):
    tasks = {
        "short": {"task": "gsm8k", "max_length": 64, "learning_rate": [1e-4, 1e-3]},
        "tweets": None,
    }
    methods = {"lora": None, "rslora": [2e-3]}
    comparison = load(tmp_path, {"tasks": tasks, "methods": methods, "train_samples": 7})
    found = {(cell.task, cell.label): cell for cell in comparison.cells}
    assert found["short", "lora"].learning_rates == (1e-4, 1e-3)
    assert found["short", "rslora"].learning_rates == (2e-3,)
    assert found["tweets", "lora"].learning_rates == (1e-3,)
    config = found["short", "lora"].config(1e-3, 0)
    assert (config.entry.name, config.task.max_length, config.run.train_samples) == ("gsm8k", 64, 7)


def test_a_budget_of_tokens_sets_the_steps_of_every_batch_size(tmp_path):
    values = {
        "task": "text",
        "data": str(tmp_path),
        "max_length": 64,
        "max_train_tokens": 65536,
        "methods": ["lora"],
        "grid": {"per_device_train_batch_size": [4, 64]},
    }
    steps = [cell.config(1e-3, 0).training.max_steps for cell in load(tmp_path, values).cells]
    assert steps == [256, 16]


def test_what_no_method_reads_is_told_and_is_no_part_of_a_run(tmp_path):
    with_gamma = load(tmp_path, {"methods": ["lora"], "gamma": 64})
    assert with_gamma.unread == ("gamma",)
    (cell,) = with_gamma.cells
    (other,) = load(tmp_path, {"methods": ["lora"]}).cells
    assert cell.config(1e-3, 0).fingerprint() == other.config(1e-3, 0).fingerprint()
    assert build_config({"method": "lora", "gamma": 64}).unread == ("gamma",)


def result(loss):
    return {"status": "finished", "metrics": {"validation": {"loss": loss}, "test": {}}}


def test_other_seeds_wait_for_the_rate_to_be_picked(tmp_path):
    values = {"methods": {"lora": [1e-3, 3e-3], "full": [1e-4]}, "seeds": [0, 1, 2]}
    comparison = load(tmp_path, values)
    first = wanted(comparison, {})
    assert [(cell.label, rate, seed) for cell, rate, seed in first] == [
        ("lora", 1e-3, 0),
        ("lora", 3e-3, 0),
        ("full", 1e-4, 0),
    ]
    results = {key(first[0]): result(0.9), key(first[1]): result(0.8)}
    then = wanted(comparison, results)
    assert [(cell.label, rate, seed) for cell, rate, seed in then] == [
        ("lora", 3e-3, 1),
        ("lora", 3e-3, 2),
        ("full", 1e-4, 0),
    ]
    assert pick_rate(comparison.cells[0], results, (0,)) == 3e-3
    grid = load(tmp_path, values, "--strategy", "grid")
    assert len(wanted(grid, {})) == grid.most_runs() == 9
    lost = {"status": "diverged", "metrics": {"validation": {"loss": None}, "test": {}}}
    results = dict.fromkeys(map(key, first[:2]), lost)
    assert {job[0].label for job in wanted(comparison, results)} == {"full"}  # nothing to seed


def test_a_toy_is_the_same_recipe_cut_down(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAPRO_CACHE", str(tmp_path / "cache"))
    values = {
        "tasks": ["tweets", "gsm8k"],
        "methods": {"full": 1e-5, "lora r=128": {"method": "lora", "rank": 128}},
        "grid": {"weight_decay": [0.0, 0.1]},
        "num_train_epochs": 3,
        "gradient_accumulation_steps": 32,
        "seeds": [0, 1, 2],
    }
    real, toy = load(tmp_path, values), load(tmp_path, {**values, "bf16": True}, "--toy", "true")
    assert places(real) == places(toy)
    assert toy.seeds == (0, 1)
    for cell in toy.cells:
        config = cell.config(1e-3, 0)
        assert config.training.max_steps <= 4
        assert config.training.gradient_accumulation_steps == 1
        assert not config.training.bf16
        assert str(tmp_path / "cache") in str(config.run.model)
        assert getattr(config.adapter, "rank", 1) <= 4
    assert cut({"max_train_tokens": 10**6, "max_steps": -1})["max_train_tokens"] == 1024


def test_every_task_has_a_toy_that_exists():
    from lorapro.experiments.toys.data import DATA
    from lorapro.experiments.toys.models import MODELS
    from lorapro.experiments.toys.papers import PAPER_DATA

    for entry in TASKS.values():
        assert entry.toy is not None, entry.name
        model, data = entry.toy
        assert model in MODELS, entry.name
        assert data in {**DATA, **PAPER_DATA}, entry.name


def test_a_key_has_one_type_whoever_reads_it():
    # ``union`` refuses anything else; the parser of every command is made of it.
    from lorapro.experiments.keys import _option_classes

    names = set(union(_option_classes()).__dataclass_fields__)
    assert names == our_keys()
    assert {"rank", "gamma", "x", "max_length"} <= names


def test_several_recipes_run_whole_at_toy_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LORAPRO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_yaml(
        tmp_path / "one.yaml",
        {
            "title": "Two tasks",
            "target": "full",
            "tasks": {"Sentiment": {"task": "tweets"}, "Sums": {"task": "gsm8k"}},
            "methods": {"full": 1e-4, "LoRA": {"method": "lora", "learning_rate": 1e-3}},
            "paper": {"LoRA": {"Sentiment": [80.5, 0.2], "Sums": None}},
            "columns": {"Sentiment": {"task": "Sentiment", "value": "accuracy"}},
            "seeds": [0, 1, 2],
        },
    )
    write_yaml(tmp_path / "two.yaml", {"task": "text", "methods": {"lora-pro-muon": 1e-3}})
    assert main(["compare", "one.yaml", "two.yaml", "--toy", "true", "--output_dir", "out"]) == 0
    capsys.readouterr()
    described = json.loads((tmp_path / "out/one/comparison.json").read_text())
    assert described["title"] == "Two tasks"
    assert described["target"] == "full"
    assert described["toy"] is True
    assert described["paper"] == {"LoRA": {"Sentiment": [80.5, 0.2]}}  # null: it has none
    assert described["columns"]["Sentiment"]["value"] == "accuracy"
    assert [(cell["task"], cell["label"], cell["method"]) for cell in described["cells"]] == [
        ("Sentiment", "full", "full"),
        ("Sentiment", "LoRA", "lora"),
        ("Sums", "full", "full"),
        ("Sums", "LoRA", "lora"),
    ]
    for cell in described["cells"]:
        assert len(list((tmp_path / "out/one" / cell["folder"]).rglob("result.json"))) == 2
    (result,) = (tmp_path / "out/two").rglob("result.json")
    about = json.loads(result.read_text())
    assert about["status"] == "finished"
    assert (about["task"], about["method"], about["rank"]) == ("text", "lora-pro-muon", 4)


@pytest.mark.parametrize("name", ["out", "runs/c"])
def test_each_recipe_has_a_folder(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_yaml(tmp_path / "c.yaml", {"methods": ["lora"]})
    flags = ["--output_dir", "out"] if name == "out" else []
    assert load_comparison(path, flags).folder.as_posix() == name
