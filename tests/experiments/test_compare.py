from __future__ import annotations

import io
import itertools
import json

import pytest
from rich.console import Console

from experiments.tiny_models import write_yaml
from lorapro.experiments.errors import UserError
from lorapro.experiments.figure import read_curve, smooth, spread_labels
from lorapro.experiments.on_the_way import way_cells
from lorapro.experiments.plan import load_comparison
from lorapro.experiments.report import notes, table_cells, write
from lorapro.experiments.summary import groups, summarize_runs
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
    results = compare(comparison, Console(file=out, width=200))
    ((task, point, cells),) = groups(comparison)
    summary = summarize_runs(comparison, results, task, point, cells)
    write(comparison.folder, summary, comparison.folder)
    return summary, out.getvalue()


def runs(folder):
    return {
        p.parent.relative_to(folder / "runs" / "classification").as_posix(): p.stat().st_mtime_ns
        for p in folder.rglob("result.json")
    }


def test_rates_are_tuned_on_the_first_seed_and_nothing_is_done_twice(values, tmp_path):
    folder = tmp_path / "out"
    summary, said = run_comparison(tmp_path, values)
    first = runs(folder)
    assert len(first) == (2 + 1 + 3) + 3
    assert "[9/9]" in said
    assert "left" in said
    chosen = {row["label"]: row for row in summary["methods"]}
    for row in chosen.values():
        tried = [t for t in row["tried"] if t["seed"] == 0]
        best = min(tried, key=lambda t: t["validation_loss"])
        assert row["learning_rate"] == best["learning_rate"]
        assert row["test_loss"]["count"] == 2
        assert len(row["folders"]) == 2
        assert all((folder / f / "result.json").is_file() for f in row["folders"])

    again, said = run_comparison(tmp_path, values)
    assert runs(folder) == first
    assert said.count("finished earlier") == 9
    assert again["methods"] == summary["methods"]

    interrupted = folder / "runs/classification/lora/lr-0.003/seed-1"
    (interrupted / "result.json").unlink()
    repaired, said = run_comparison(tmp_path, values)
    assert said.count("finished earlier") == 8
    assert {k for k, v in runs(folder).items() if first[k] != v} == {"lora/lr-0.003/seed-1"}

    losses = [[row["test_losses"] for row in s["methods"]] for s in (summary, repaired)]
    assert losses[0] == losses[1]
    saved = json.loads((folder / "results.json").read_text())
    assert saved["methods"] == repaired["methods"]
    for figure in ("curves.png", "learning_rates.png"):
        assert (folder / figure).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    table = (folder / "table.md").read_text()
    assert all(f"| {label} |" in table for label in chosen)
    assert "over 2 seeds" in table
    for row in summary["methods"]:
        if row["label"] != "lora":
            lora = next(r for r in summary["methods"] if r["label"] == "lora")["test_losses"]
            pairs = zip(row["test_losses"], lora, strict=True)
            differences = [a - b for a, b in pairs]
            assert row["over_baseline"]["size"] == pytest.approx(sum(differences) / 2)
            half = abs(differences[0] - differences[1]) / 2  # t-interval of two: 12.7 of these
            assert row["over_baseline"]["noise"] == pytest.approx(12.706 * half, rel=1e-3)
            assert f"{row['over_baseline']['size']:+.4f} ±" in table
    assert "| method | step 1 | step 2 |" in table
    for row in summary["methods"]:
        first, last = row["on_the_way"]
        assert (first["step"], last["step"]) == (1, 2)
        final = [
            json.loads((folder / f / "result.json").read_text())["metrics"]["validation"]["loss"]
            for f in row["folders"]
        ]
        assert last["losses"] == pytest.approx(final, abs=1e-4)
        assert ("over_baseline" in first) == (row["label"] != "lora")
        assert f"| {row['label']} | {sum(first['losses']) / 2:.4f}" in table


def test_the_grid_runs_every_rate_with_every_seed(values, tmp_path):
    methods = {"lora": [1e-3, 3e-3], "rslora": [3e-3]}
    summary, _ = run_comparison(tmp_path, {**values, "methods": methods}, "--strategy", "grid")
    assert len(runs(tmp_path / "out")) == 3 * 2
    assert summary["gap"] is None  # without full fine-tuning there is no gap to speak of
    assert "gap closed" not in table_cells(summary)[0]


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


def summarize(tmp_path, methods, numbers, seeds=(0, 1, 2, 3)):
    path = write_yaml(tmp_path / "c.yaml", {"methods": methods, "seeds": list(seeds)})
    comparison = load_comparison(path)
    results = {
        (f"runs/c/runs/tweets/{label}", rate, seed): result(*pair, seed)
        for (label, rate), pairs in numbers.items()
        for seed, pair in zip(seeds, pairs, strict=False)
    }
    ((task, point, cells),) = groups(comparison)
    return summarize_runs(comparison, results, task, point, cells)


METHODS = {"full": 1e-4, "lora": 1e-3, "lora-pro": 1e-3}


def test_the_share_of_the_gap_is_from_mean_test_losses(tmp_path):
    numbers = {
        ("full", 1e-4): [(0.6, 0.60), (0.6, 0.62), (0.6, 0.61), (0.6, 0.61)],
        ("lora", 1e-3): [(0.7, 0.70), (0.7, 0.72), (0.7, 0.71), (0.7, 0.71)],
        ("lora-pro", 1e-3): [(0.6, 0.63), (0.6, 0.64), (0.6, 0.63), (0.6, 0.64)],
    }
    summary = summarize(tmp_path, METHODS, numbers)
    shares = {row["label"]: row.get("gap_closed") for row in summary["methods"]}
    assert shares["lora-pro"] == pytest.approx((0.71 - 0.635) / 0.1)
    assert shares["lora"] is None
    header, rows = table_cells(summary)
    cells = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert cells["lora-pro"]["gap closed"] == "75 %"
    assert cells["full"]["test loss"] == "0.6100 ± 0.0082"


def test_no_gap_is_said_where_noise_is_larger(tmp_path):
    numbers = {
        ("full", 1e-4): [(0.6, 0.69), (0.6, 0.72), (0.6, 0.68), (0.6, 0.73)],
        ("lora", 1e-3): [(0.7, 0.71), (0.7, 0.70), (0.7, 0.71), (0.7, 0.71)],
        ("lora-pro", 1e-3): [(0.6, 0.63)] * 4,
    }
    summary = summarize(tmp_path, METHODS, numbers)
    assert summary["gap"]["exists"] is False
    header, rows = table_cells(summary)
    cells = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert cells["lora-pro"]["gap closed"] == "no gap"


def test_it_is_said_where_full_fine_tuning_is_behind(tmp_path):
    numbers = {
        ("full", 1e-4): [(0.7, 0.81), (0.7, 0.80), (0.7, 0.81), (0.7, 0.81)],
        ("lora", 1e-3): [(0.7, 0.71), (0.7, 0.70), (0.7, 0.71), (0.7, 0.72)],
        ("lora-pro", 1e-3): [(0.6, 0.63)] * 4,
    }
    said = "\n".join(notes(summarize(tmp_path, METHODS, numbers)))
    assert "full fine-tuning is behind LoRA beyond noise" in said
    assert "no gap beyond noise" not in said


def test_a_best_rate_at_the_edge_and_divergence_are_warned_of(tmp_path):
    methods = {"lora": [1e-4, 1e-3, 1e-2], "full": [1e-4, 1e-3]}
    nan = float("nan")
    numbers = {
        ("lora", 1e-4): [(0.9, 0.9)],
        ("lora", 1e-3): [(0.8, 0.8)],
        ("lora", 1e-2): [(nan, nan)],
        ("full", 1e-4): [(0.7, 0.7)],
        ("full", 1e-3): [(0.6, 0.6)],
    }
    summary = summarize(tmp_path, methods, numbers, seeds=(0,))
    rates = {row["label"]: row["learning_rate"] for row in summary["methods"]}
    assert rates == {"lora": 1e-3, "full": 1e-3}  # a diverged run is never the best
    edge, lost = sorted(summary["warnings"])
    assert "full" in edge
    assert "highest" in edge
    assert lost == "lora: 1 runs diverged or failed (rates 0.01)"


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


def test_labels_keep_their_order_and_distance():
    placed = spread_labels([0.30, 0.31, 0.305, 0.9], 0.1)
    order = sorted(range(4), key=lambda i: placed[i])
    assert order == [0, 2, 1, 3]
    gaps = [placed[b] - placed[a] for a, b in itertools.pairwise(order)]
    assert min(gaps) > 0.1 - 1e-9
    assert placed[3] == 0.9


def test_smoothing_keeps_lines_and_tames_noise():
    ramp = [float(i) for i in range(100)]
    assert smooth(ramp)[30:70] == pytest.approx(ramp[30:70])
    noise = [(-1.0) ** i for i in range(100)]
    assert max(map(abs, smooth(noise)[10:90])) < 0.05


def test_a_curve_is_read_without_gaps_and_infinities(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "train_loss": 2.0}\n'
        '{"step": 2, "train_loss": null, "validation_loss": 1.5}\n'
        '{"step": 3, "train_loss": 1.0, "validation_loss": null}\n'
    )
    assert read_curve(path, "train_loss") == ([1.0, 3.0], [2.0, 1.0])
    assert read_curve(path, "validation_loss") == ([2.0], [1.5])


def test_a_diverged_method_leaves_the_others_their_losses_on_the_way():
    ways = {"lora": [10, 20, 30, 40], "full": [10, 20], "lora-pro": []}
    rows = [
        {"label": label, "on_the_way": [{"step": s, "losses": [1.0 / s]} for s in steps]}
        for label, steps in ways.items()
    ]
    header, cells = way_cells({"methods": rows})
    assert header == ["method", "step 10", "step 20", "step 30", "step 40"]
    assert cells[0] == ["lora", "0.1000", "0.0500", "0.0333", "0.0250"]
    assert cells[1][3:] == cells[2][3:] == ["-", "-"]
    assert way_cells({"methods": rows[2:]}) == ([], [])
