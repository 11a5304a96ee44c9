"""The benchmarks run and write what they promise. No time is looked at."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TRIAL = ["--rounds", "2", "--few-rounds"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def tables(folder, name):
    assert (folder / f"{name}.md").read_text().startswith(f"# {name}")
    data = json.loads((folder / f"{name}.json").read_text())
    assert data["machine"]["threads"] == torch.get_num_threads()
    return data["tables"]


def names(rows):
    return [row["name"] for row in rows]


def test_step_time_has_a_row_for_every_contestant(script, tmp_path, capsys):
    contestants = script("contestants")
    options = ["--shapes", "tiny", "--ranks", "2", "4", *TRIAL, "--output", str(tmp_path)]
    script("step_time").main(options)
    found = tables(tmp_path, "step_time")
    assert [(t["shapes"], t["rank"]) for t in found] == [("tiny", 2), ("tiny", 4)]
    for rows in (t["rows"] for t in found):
        assert names(rows) == list(contestants.CONTESTANTS)
        for row in rows:
            assert "refused" in row or (len(row["seconds"]) == 2 and "over adamw-fused" in row)
    assert "| efficient |" in capsys.readouterr().out


def test_what_is_not_installed_or_too_slow_is_named_with_the_reason(script, tmp_path, monkeypatch):
    there = importlib.util.find_spec
    absent = lambda name, *a: None if name == "lora_pro" else there(name, *a)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    options = ["--only", "lora-pro-adamw-full", "muon", "--skip-slower-than", "0"]
    options += ["--shapes", "tiny", "--ranks", "2", *TRIAL, "--output", str(tmp_path)]
    script("step_time").main(options)
    missing, slow = tables(tmp_path, "step_time")[0]["rows"]
    assert "pip install lora-pro-adamw==0.2.1" in missing["refused"]
    assert "over 0 s a step" in slow["refused"]


def test_growth_has_an_exponent_for_every_mode(script, tmp_path):
    growth = script("growth")
    growth.main(["--tiny", *TRIAL, "--output", str(tmp_path)])
    found = tables(tmp_path, "growth")
    assert [t["series"] for t in found] == ["rank", "size", "pairs"]
    for rows in (t["rows"] for t in found):
        assert names(rows) == list(growth.OPTIMIZERS)
        assert all(isinstance(row["exponent"], float) for row in rows)


def test_growth_finds_the_exponent_of_a_power_law(script):
    slope, error = script("growth").exponent([1, 2, 4, 8], [3.0 * x**1.5 for x in (1, 2, 4, 8)])
    assert slope == pytest.approx(1.5)
    assert error == pytest.approx(0, abs=1e-9)


def test_memory_writes_what_a_process_of_its_own_found(script, tmp_path, monkeypatch):
    options = ["--shapes", "tiny", "--ranks", "2", "--only", "factored"]
    script("memory").main([*options, "--output", str(tmp_path)])
    (row,) = tables(tmp_path, "memory")[0]["rows"]
    shapes = script("contestants").MODELS["tiny"].shapes()
    # One momentum of each factor, means of rows and columns, a step counter.
    assert row["state"] == sum(4 * 2 * (m + n) + 4 * (m + n) + 4 for m, n in shapes)
    assert row["peak"] > 0


def test_memory_counts_the_state_exactly(script):
    measure = script("memory").measure
    shapes = script("contestants").MODELS["tiny"].shapes()
    adamw, full = (measure(k, "tiny", 2, "sylvester") for k in ("adamw-fused", "full"))
    counters = 4 * len(shapes)
    assert adamw["state"] == sum(8 * 2 * (m + n) for m, n in shapes) + 2 * counters
    assert full["state"] == sum(8 * m * n for m, n in shapes) + 2 * counters


def test_peak_memory_is_what_was_allocated_at_once(script):
    def action():
        for _ in range(3):
            a = torch.empty(1000)
            b = torch.empty(500)
            del a, b

    assert script("common").peak_of(action) == 4 * 1500


def test_training_step_reports_both_ways(script, tmp_path):
    training_step = script("training_step")
    options = ["--model", "tiny", "--ranks", "2", "--batch", "1", "--length", "4", "--direct"]
    training_step.main([*options, *TRIAL, "--output", str(tmp_path)])
    composed, direct = tables(tmp_path, "training_step")
    assert names(composed["rows"]) == names(direct["rows"]) == list(training_step.OPTIMIZERS)
    assert composed["rows"][0]["ratio"]["median"] == 1
    assert all(row["step"]["median"] < row["median"] for row in composed["rows"])


def test_the_gradients_belong_to_one_weight(script):
    for f in script("contestants").make_factors([(12, 20), (20, 12)], 3):
        torch.testing.assert_close(f.grad_A @ f.A.T, f.B.T @ f.grad_B)


def test_too_few_rounds_and_impossible_ranks_are_refused(script, capsys):
    for options, reason in (
        (["--rounds", "3"], "add --few-rounds"),
        (["--shapes", "tiny", "--ranks", "9"], "expected 1 to 8 for --shapes tiny"),
    ):
        with pytest.raises(SystemExit):
            script("step_time").main(options)
        assert reason in capsys.readouterr().err


def test_far_steps_shows_which_optimizers_bound_their_steps(script):
    moves = script("far_steps").moves
    assert max(moves("factored", 32, 8)) < 2 < max(moves("sgd", 32, 8))


def test_diagnostics_are_timed(script, tmp_path, capsys):
    module = script("diagnostics")
    module.main(["--model", "tiny", "--ranks", "2", *TRIAL, "--output", str(tmp_path)])
    (found,) = tables(tmp_path, "diagnostics")
    assert set(found["rows"][0]["seconds"]) == {"plain", "measured"}
    assert "added at every 10 steps" in capsys.readouterr().out
