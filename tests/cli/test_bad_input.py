"""Bad input is one line that names what is wrong, exit status 2, and nothing written."""

from __future__ import annotations

import math

import pytest

from experiments.tiny_models import write_yaml
from lorapro.cli.main import main

nan, inf = math.nan, math.inf

RUNS = [
    ({"metod": "lora"}, "unknown config key 'metod' (did you mean 'method'?)"),
    ({"method": "lora-por"}, "unknown method 'lora-por' (did you mean 'lora-pro'?)"),
    ({"method": "dora+lora-prof"}, "unknown method 'dora+lora-prof' (did you mean 'lora-pro'?)"),
    ({"method": "lora+dora"}, "two parts of one kind"),
    ({"task": "clasification"}, "did you mean 'classification'"),
    ({"learning_rate": nan}, "learning_rate must be positive and finite, found nan"),
    ({"learning_rate": 0}, "learning_rate must be positive and finite, found 0"),
    ({"learning_rate": -1}, "learning_rate must be positive and finite, found -1"),
    ({"learning_rate": "fast"}, "'fast'"),
    ({"rank": 0}, "rank must be at least 1, found 0"),
    ({"rank": 1.5}, "rank: invalid int value: '1.5'"),
    ({"rank": [4, 8]}, "rank takes one value, found [4, 8]"),
    ({"rank": 99}, "rank 99 is above min(m, n)"),
    ({"method": "pissa", "rank": 99}, "rank 99 is above min(m, n)"),
    ({"max_steps": -5}, "max_steps must be at least 1"),
    ({"max_steps": 0}, "max_steps must be at least 1"),
    ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs must be positive"),
    ({"max_steps": -1, "num_train_epochs": nan}, "num_train_epochs must be positive"),
    ({"max_length": 1}, "max_length must be at least 2"),
    ({"max_grad_norm": nan}, "max_grad_norm must be finite"),
    ({"alpha": inf}, "alpha must be finite, found inf"),
    ({"alpha": 0}, "alpha must be above 0"),
    ({"lora_dropout": 1}, "lora_dropout must be below 1"),
    ({"weight_decay": -0.1}, "weight_decay must be finite and not negative"),
    ({"adam_beta1": 1.0}, "adam_beta1 must lie in [0, 1)"),
    ({"label_smoothing_factor": 2}, "label_smoothing_factor must lie in [0, 1)"),
    ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
    ({"eval_steps": -1}, "eval_steps must be positive"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
    ({"validation_samples": 5000}, "validation_samples is 5000, but only"),
    ({"data": "distinct.csv"}, "another value in every one of its rows"),
    ({"data": "missing.csv"}, "row 3 of missing.csv has nothing in column 'label'"),
    ({"data": "none.csv"}, "no data file or folder 'none.csv'"),
    ({"label_column": "mood"}, "no column 'mood'; its columns are: text, label"),
    ({"report_to": "wanddb"}, "unknown report_to 'wanddb' (did you mean 'wandb'?)"),
    ({"report_to": "mlflow"}, "report_to 'mlflow' needs a package that is not installed"),
    ({"target_modules": ["qery"]}, "cannot add the adapter"),
    ({"target_modules": []}, "target_modules is an empty list"),
    ({"modules_to_save": ["clasifier"]}, "did you mean 'classifier'"),
    ({"dtype": "float8"}, "float8"),
    ({"method": "lora-ga", "gamma": 0}, "gamma must be above 0"),
    ({"method": "lora-ga", "lora_ga_objective": "sing"}, "did you mean 'sign'"),
    ({"method": "lora+", "loraplus_lr_ratio": -1}, "loraplus_lr_ratio must be above 0"),
    ({"method": "adalora", "adalora_init_rank": 1}, "adalora_init_rank must be at least rank, 2"),
    ({"method": "adalora", "adalora_tinit": 50}, "budgeting phase"),
    ({"method": "lora-pro", "x": "zer"}, "did you mean 'zero'"),
    ({"method": "lora-pro", "damping": -1}, "damping must be at least 0"),
    ({"method": "lora-pro", "optimizer_options": {"betaz": 1}}, "betaz"),
    ({"method": "lora-pro", "optimizer_options": "fast"}, "optimizer_options must be a mapping"),
    ({"prompt": "{x}"}, "'prompt' is not read by this task"),
    ({"methods": {"lora": 1}}, "belongs to 'lorapro compare'"),
    ({"output_dir": "table.csv"}, "output_dir table.csv is a file"),
]

COMPARISONS = [
    ({"methods": {}}, "no 'methods'"),
    ({"methods": ["lora", "lora"]}, "names 'lora' more than once"),
    ({"methods": {"lroa": 1}}, "unknown method 'lroa' (did you mean 'lora'?)"),
    ({"methods": {"lora": [1e-3, nan]}}, "learning_rate must be positive, found nan"),
    ({"methods": {"lora": {"learning_rate": []}}}, "learning_rate is an empty list"),
    ({"methods": {"lora": {"rnk": 2}}}, "did you mean 'rank'"),
    ({"methods": {"a/b": {"method": "lora"}}}, "cannot hold a slash"),
    ({"seeds": []}, "distinct whole numbers"),
    ({"seeds": [0, 0]}, "distinct whole numbers"),
    ({"seeds": ["a"]}, "whole numbers"),
    ({"strategy": "gird"}, "did you mean 'grid'"),
    ({"seed": 3}, "belongs under 'methods' and 'seeds'"),
    ({"grid": {"rnk": [1]}}, "did you mean 'rank'"),
    ({"grid": {"rank": 4}}, "expected a list of values"),
    ({"grid": {"rank": [0, 4]}}, "rank must be at least 1"),
    ({"grid": {"learning_rate": [1]}}, "a place of its own"),
    ({"tasks": ["classification"]}, "'task' or 'tasks', not both"),
    ({"task": None, "tasks": ["classificaton"]}, "did you mean 'classification'"),
    ({"paper": {"lroa": {"x": 1}}}, "did you mean 'lora'"),
    ({"paper": {"lora": {"classificatoin": 1}}}, "did you mean 'classification'"),
    ({"paper": {"lora": {"classification": [1, 2, 3]}}}, "expected a number or [mean, sd]"),
    ({"columns": {"x": 5}}, "columns must be a mapping of mappings"),
    ({"title": ["x"]}, "title must be a line of text"),
]

FLAGS = [
    (["--processes", "0"], "--processes must be a whole number of at least 1"),
    (["--processes", "two"], "--processes must be a whole number"),
    (["--processes"], "--processes needs a value"),
    (["--backend", "rya"], "did you mean 'ray'"),
    (["--toy", "perhaps"], "--toy must be true or false"),
    (["--methods", "lroa"], "did you mean 'lora'"),
    (["--methods"], "--methods needs a value"),
    (["--seeds"], "--seeds needs a value"),
    (["--rnk", "4"], "did you mean 'rank'"),
    (["--learning_rate", "1"], "belongs under 'methods'"),
]


@pytest.fixture
def place(classify, table, tmp_path, monkeypatch):
    """A folder with data that cannot be used, and the values of a run that works."""
    monkeypatch.chdir(tmp_path)
    lines = table.read_text().splitlines()
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "missing.csv").write_text("\n".join([*lines[:3], "nothing,", *lines[3:]]) + "\n")
    rows = [f"{line.rpartition(',')[0]},{n}" for n, line in enumerate(lines[1:])]
    (tmp_path / "distinct.csv").write_text("\n".join([lines[0], *rows]) + "\n")
    return {**classify, "data": "table.csv", "output_dir": "out"}


def check(capsys, tmp_path, arguments, message):
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("lorapro: error: ")
    assert message in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("change", "message"), RUNS)
def test_a_run(place, tmp_path, capsys, change, message):
    write_yaml(tmp_path / "c.yaml", {**place, **change})
    check(capsys, tmp_path, ["train", "c.yaml"], message)


@pytest.mark.parametrize(("change", "message"), COMPARISONS)
def test_a_comparison(place, tmp_path, capsys, change, message):
    values = {k: v for k, v in place.items() if k != "seed"}
    values |= {"methods": {"lora": 1e-3}, **change}
    write_yaml(tmp_path / "c.yaml", {k: v for k, v in values.items() if v is not None})
    check(capsys, tmp_path, ["compare", "c.yaml"], message)


@pytest.mark.parametrize(("flags", "message"), FLAGS)
def test_flags_of_a_comparison(place, tmp_path, capsys, flags, message):
    values = {k: v for k, v in place.items() if k != "seed"} | {"methods": {"lora": 1e-3}}
    write_yaml(tmp_path / "c.yaml", values)
    check(capsys, tmp_path, ["compare", "c.yaml", *flags], message)


def test_files_that_are_no_configs(place, tmp_path, capsys):
    (tmp_path / "twice.yaml").write_text("rank: 4\nrank: 8\n")
    (tmp_path / "c.yaml").write_text("methods: {lora: 1.0e-3}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.yaml").write_text("methods: {lora: 1.0e-3}\n")
    for arguments, message in (
        (["train", "nowhere.yaml"], "no config file 'nowhere.yaml'"),
        (["train", "."], "is a folder, expected a config YAML"),
        (["train", "twice.yaml"], "gives 'rank' more than once"),
        (["compare", "c.yaml", "sub/c.yaml"], "two recipes are called 'c'"),
        (["compare"], "needs a config file"),
    ):
        check(capsys, tmp_path, arguments, message)
