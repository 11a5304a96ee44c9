from __future__ import annotations

import pytest

from experiments.tiny_models import write_yaml
from lorapro.experiments.config import build_config, load_config
from lorapro.experiments.errors import UserError
from lorapro.experiments.plan import load_comparison


def test_yaml_and_flags_are_typed_and_flags_win(tmp_path):
    path = tmp_path / "c.yaml"
    # YAML 1.1 reads 6e-4 as a string: it has to arrive as a number all the same.
    path.write_text(
        "method: lora\nlearning_rate: 6e-4\nmax_steps: 7\ntarget_modules: [query, value]\n"
    )
    config = load_config(path, ["--max-steps", "9", "--weight_decay=0.1", "--bf16", "false"])
    assert config.training.learning_rate == 6e-4
    assert config.training.max_steps == 9
    assert config.training.weight_decay == 0.1
    assert config.training.bf16 is False
    assert config.adapter.target_modules == ["query", "value"]


def test_each_method_has_its_own_default_learning_rate():
    rates = {m: build_config({"method": m}).training.learning_rate for m in ("full", "lora-pro")}
    assert rates["full"] < rates["lora-pro"]
    assert build_config({"method": "full", "learning_rate": 3e-5}).training.learning_rate == 3e-5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methd": "lora"}, "'methd' .*did you mean 'method'"),
        ({"learning_rte": 1}, "did you mean 'learning_rate'"),
        ({"method": "lora-por"}, "unknown method 'lora-por' .*'lora-pro'"),
        ({"x": "sylvestre"}, "unknown x 'sylvestre' .*'sylvester'"),
        ({"task": "tweet"}, "did you mean 'tweets'"),
        ({"learning_rate": 0}, "learning_rate must be positive and finite, found 0"),
        ({"learning_rate": -1e-4}, "learning_rate must be positive and finite, found -0.0001"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": "eight"}, "rank.*eight"),
        ({"alpha": 0}, "alpha must be above 0, found 0"),
        ({"lora_dropout": 1.0}, "lora_dropout must be below 1"),
        ({"train_samples": -1}, "train_samples must be at least 0, found -1"),
        ({"validation_samples": 0}, "validation_samples must be at least 1"),
        ({"dtype": "float8"}, "dtype"),
        ({"lr_scheduler_type": "linaer"}, "linaer"),
        ({"methods": {"lora": None}}, "'lorapro compare'"),
        ({"seed": -1}, "seed must be at least 0, found -1"),
    ],
)
def test_values_that_cannot_be_meant(values, message):
    with pytest.raises(UserError, match=message) as caught:
        build_config(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learnin_rate", "1e-3"], "unknown flag --learnin_rate .*'learning_rate'"),
        (["stray"], "unexpected argument 'stray'"),
        (["--max_steps", "many"], "max_steps.*many"),
    ],
)
def test_flags_that_cannot_be_meant(flags, message):
    with pytest.raises(UserError, match=message):
        build_config({}, flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "found a list"),
        ("a: [1\n", "not a YAML file"),
        ("", "found nothing"),
        ("rank: 8\nrank: 4\n", "gives 'rank' more than once"),
        ("methods:\n  lora: 1\n  lora: 2\n", "gives 'lora' more than once"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(path)
    with pytest.raises(UserError, match="no config file"):
        load_config(tmp_path / "missing.yaml")


def test_the_fingerprint_is_of_what_is_learned():
    base = build_config({"method": "lora"})
    same = [
        {"method": "lora", "output_dir": "elsewhere"},
        {"method": "lora", "logging_steps": 3},
        {"method": "lora", "max_grad_norm": 1.0},  # the default, written out
        {"method": "lora", "learning_rate": base.training.learning_rate},
    ]
    assert {build_config(v).fingerprint() for v in same} == {base.fingerprint()}
    for change in ({"seed": 1}, {"rank": 4}, {"learning_rate": 5e-4}, {"weight_decay": 0.1}):
        assert build_config({"method": "lora", **change}).fingerprint() != base.fingerprint()


COMPARISON = {"methods": {"full": 1e-4, "lora": [1e-3, 3e-4], "lora-pro": None}, "seeds": [0, 1]}


def test_a_comparison_lists_rates_seeds_and_folders(tmp_path):
    path = write_yaml(tmp_path / "c.yaml", COMPARISON)
    comparison = load_comparison(path, ["--output_dir", "out"])
    rates = {cell.label: cell.learning_rates for cell in comparison.cells}
    assert rates["lora"] == (3e-4, 1e-3)
    assert len(rates["lora-pro"]) == 1
    assert comparison.most_runs() == 4 + 3
    config = comparison.cells[1].config(1e-3, 1)
    assert config.folder.as_posix() == "out/runs/tweets/lora/lr-0.001/seed-1"
    assert (config.training.seed, config.training.learning_rate) == (1, 1e-3)


def test_flags_choose_methods_seeds_and_strategy(tmp_path):
    path = write_yaml(tmp_path / "c.yaml", COMPARISON)
    flags = [
        "--methods",
        "lora",
        "rslora",
        "--seeds",
        "3",
        "4",
        "5",
        "--strategy=grid",
        "--rank",
        "4",
    ]
    comparison = load_comparison(path, flags)
    assert [cell.label for cell in comparison.cells] == ["lora", "rslora"]
    assert comparison.seeds == (3, 4, 5)
    assert comparison.most_runs() == (2 + 1) * 3
    assert comparison.cells[0].config(1e-3, 0).adapter.rank == 4


def test_an_entry_may_name_its_method_and_change_other_keys(tmp_path):
    methods = {"zero": {"method": "lora-pro", "x": "zero", "learning_rate": [1e-3]}}
    path = write_yaml(tmp_path / "c.yaml", {"methods": methods})
    comparison = load_comparison(path)
    config = comparison.cells[0].config(1e-3, 0)
    assert (config.method.name, config.optimizer.x) == ("lora-pro", "zero")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": {}}, "no 'methods'"),
        ({"methods": {"lroa": None}}, "unknown method 'lroa' .*'lora'"),
        ({"methods": {"lora": ["fast"]}}, "lora: learning rates must be numbers"),
        ({"methods": {"lora": [1e-3, 0]}}, "lora: learning_rate must be positive"),
        ({"methods": {"lora": {"rnk": 4}}}, "did you mean 'rank'"),
        ({"seeds": [0, 0]}, "distinct"),
        ({"seeds": ["a"]}, "whole numbers"),
        ({"strategy": "gird"}, "did you mean 'grid'"),
        ({"seed": 3}, "belongs under 'methods' and 'seeds'"),
    ],
)
def test_comparisons_that_cannot_be_meant(tmp_path, change, message):
    path = write_yaml(tmp_path / "c.yaml", {**COMPARISON, **change})
    with pytest.raises(UserError, match=message):
        load_comparison(path)
