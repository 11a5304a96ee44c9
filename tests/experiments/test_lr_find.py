"""lr-find: short runs at several rates, what diverges is stopped, the best is suggested."""

from __future__ import annotations

import json

import pytest

from experiments.tiny_models import write_yaml
from lorapro.cli.main import main
from lorapro.experiments.config import build_config
from lorapro.experiments.lr_find import _beyond
from lorapro.experiments.runner import run


@pytest.fixture
def quick(classify, tmp_path):
    keys = ("validation_samples", "learning_rate", "max_steps", "eval_steps")
    values = {k: v for k, v in classify.items() if k not in keys}
    return {**values, "method": "lora", "output_dir": str(tmp_path / "found")}


def test_the_suggested_rate_is_the_best_of_runs_like_it(quick, tmp_path, capsys):
    path = str(write_yaml(tmp_path / "c.yaml", quick))
    command = ["lr-find", path, "--steps", "12", "--rates", "1e-4", "1e-2", "1e6"]
    assert main(command) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "found" / "lr_find.json").read_text())
    assert found["rate"] == 0.01
    assert "take: --learning_rate 0.01" in out
    assert found["losses"]["1e+06"] is None or found["losses"]["1e+06"] > found["losses"]["0.01"]
    assert (tmp_path / "found" / "lr_find.png").stat().st_size > 5000
    alone = run(
        build_config(
            {
                **quick,
                "learning_rate": 0.01,
                "max_steps": 12,
                "eval_strategy": "no",  # evaluating draws from the state that dropout uses
                "output_dir": str(tmp_path / "alone"),
            }
        )
    )
    assert found["losses"]["0.01"] == pytest.approx(alone["metrics"]["validation"]["loss"])
    # Nothing is trained a second time.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "found").rglob("result.json")}
    assert len(before) == 3
    assert main(command) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_rates_beyond_the_last_are_tried_while_they_are_better(quick, tmp_path, capsys):
    path = str(write_yaml(tmp_path / "c.yaml", quick))
    assert main(["lr-find", path, "--steps", "4"]) == 0
    found = json.loads((tmp_path / "found" / "lr_find.json").read_text())
    losses = {float(k): v if v is not None else float("inf") for k, v in found["losses"].items()}
    assert len(losses) >= 7
    assert found["edge"] == (_beyond(losses) is not None)
    assert min(losses, key=losses.get) == found["rate"]


def test_bad_input(quick, tmp_path, capsys):
    path = str(write_yaml(tmp_path / "c.yaml", quick))
    for match, arguments in (
        ("--rates must be positive and finite, found -1", [path, "--rates", "-1"]),
        ("invalid float value: 'x'", [path, "--rates", "x"]),
        ("steps must be at least 2", [path, "--steps", "1"]),
        ("unknown flag --lerning_rate", [path, "--lerning_rate", "1"]),
        ("method 'zero-shot' trains nothing", [path, "--method", "zero-shot"]),
        ("did you mean 'lora-pro'", [path, "--method", "lora-por"]),
    ):
        assert main(["lr-find", *arguments]) == 2
        assert match in capsys.readouterr().err
    assert not (tmp_path / "found").exists()
