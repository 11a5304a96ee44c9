from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from experiments.tiny_models import write_yaml
from lorapro.experiments.errors import UserError
from lorapro.experiments.plan import load_comparison
from lorapro.experiments.report import Report, report_comparison
from lorapro.experiments.results import read_results
from lorapro.experiments.sweep import compare, pick_rate


@pytest.fixture
def values(classify, tmp_path):
    methods = {"full": [1e-3, 3e-3], "lora": [3e-3], "lora-pro": [1e-3, 3e-3, 1e-2]}
    return {
        **{k: v for k, v in classify.items() if k not in ("seed", "output_dir")},
        "max_steps": 2,
        "eval_steps": 1,
        "methods": methods,
        "seeds": [0, 1],
    }


def run_comparison(tmp_path, values, *flags):
    path = write_yaml(tmp_path / "c.yaml", values)
    comparison = load_comparison(path, ["--output_dir", str(tmp_path / "out"), *flags])
    out = io.StringIO()
    console = Console(file=out, width=200)
    compare(comparison, console)
    report_comparison(comparison.folder, console)
    (found,) = Report(read_results(comparison.folder)).comparisons
    return found, out.getvalue()


def runs(folder):
    return {
        p.parent.relative_to(folder / "runs" / "classification").as_posix(): p.stat().st_mtime_ns
        for p in folder.rglob("result.json")
    }


def test_rates_are_tuned_on_the_first_seed_and_nothing_is_done_twice(values, tmp_path):
    folder = tmp_path / "out"
    found, said = run_comparison(tmp_path, values)
    first = runs(folder)
    assert len(first) == (2 + 1 + 3) + 3
    assert "[9/9]" in said
    assert "left" in said
    assert [row.label for row in found.rows] == ["full", "lora", "lora-pro"]
    for row in found.rows:
        tried = found.problem.runs[found.problem.runs["label"] == row.label]
        tried = tried[tried["seed"] == 0]
        assert row.rate == tried.loc[tried["validation_loss"].idxmin(), "learning_rate"]
        assert sorted(row.values) == [0, 1]
        for seed, place in zip(row.runs["seed"], row.runs["folder"], strict=True):
            result = json.loads((folder / place / "result.json").read_text())
            assert result["metrics"]["test"]["loss"] == row.values[seed]

    again, said = run_comparison(tmp_path, values)
    assert runs(folder) == first
    assert said.count("9 of at most 9 runs were finished earlier") == 1
    assert [row.values for row in again.rows] == [row.values for row in found.rows]

    interrupted = folder / "runs/classification/lora/lr-0.003/seed-1"
    (interrupted / "result.json").unlink()
    repaired, said = run_comparison(tmp_path, values)
    assert said.count("8 of at most 9 runs were finished earlier") == 1
    assert {k for k, v in runs(folder).items() if first[k] != v} == {"lora/lr-0.003/seed-1"}
    assert [row.values for row in repaired.rows] == [row.values for row in found.rows]

    table = (folder / "table.md").read_text()
    assert all(f"| {row.label} |" in table for row in found.rows)
    assert "over two seeds" in table
    assert "| method | step 1 | step 2 |" in table
    assert (folder / "report.html").is_file()
    # every test item was kept, and makes up the loss
    versus = found.row("lora-pro").versus["lora"]
    assert versus.boot.size == pytest.approx(versus.size, abs=1e-6)


def test_the_grid_runs_every_rate_with_every_seed(values, tmp_path):
    methods = {"lora": [1e-3, 3e-3], "rslora": [3e-3]}
    found, _ = run_comparison(tmp_path, {**values, "methods": methods}, "--strategy", "grid")
    assert len(runs(tmp_path / "out")) == 3 * 2
    assert found.gap is None  # without full fine-tuning there is no gap to speak of


def test_what_is_wrong_is_found_before_the_first_run(values, tmp_path):
    methods = {"lora": [1e-3], "big": {"method": "lora", "rank": 99}}
    with pytest.raises(UserError, match="rank 99 is above"):
        run_comparison(tmp_path, {**values, "methods": methods})
    assert not (tmp_path / "out").exists()


def test_folders_of_others_are_left_alone(values, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a comparison's"):
        run_comparison(tmp_path, values)
    assert [p.name for p in folder.iterdir()] == ["thesis.txt"]


def test_runs_with_other_keys_are_not_mixed_in(values, tmp_path):
    values["methods"] = {"lora": [1e-3]}
    run_comparison(tmp_path, values, "--seeds", "0")
    before = runs(tmp_path / "out")
    with pytest.raises(UserError, match="holds another run"):
        run_comparison(tmp_path, values, "--seeds", "0", "--rank", "3")
    assert runs(tmp_path / "out") == before


def result(validation, test, seed=0, accuracy=0.5):
    return {
        "status": "diverged" if validation != validation else "finished",
        "metrics": {
            "validation": {"loss": validation},
            "test": {"loss": test, "accuracy": accuracy},
        },
        "cost": {
            "trainable_parameters": 10,
            "optimizer_state_bytes": 80,
            "seconds_per_step": 0.1,
            "peak_memory_bytes": 1,
        },
        "saved": {},
        "seed": seed,
        "steps": 1,
    }


def test_tuning_looks_at_the_first_seed_and_a_grid_at_all(tmp_path):
    path = write_yaml(tmp_path / "c.yaml", {"methods": {"lora": [1e-4, 1e-2]}})
    (cell,) = load_comparison(path).cells
    name = str(cell.folder)
    losses = {(1e-4, 0): 0.9, (1e-4, 1): 0.5, (1e-2, 0): 0.8, (1e-2, 1): 0.9}
    results = {(name, rate, seed): result(v, 1) for (rate, seed), v in losses.items()}
    assert pick_rate(cell, results, (0,)) == 1e-2
    assert pick_rate(cell, results, (0, 1)) == 1e-4
    results[name, 1e-2, 0] = result(float("nan"), 1)
    assert pick_rate(cell, results, (0,)) == 1e-4
