"""Summaries of a comparison, one for each task and point of the grid, for tables and figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorapro.experiments.plan import Cell, Comparison
from lorapro.experiments.statistics import difference, gap_between, share_closed, summarize
from lorapro.experiments.sweep import Results, pick_rate, validation_loss
from lorapro.experiments.tasks import TASKS

__all__ = ["BASELINE", "TARGET", "groups", "summarize_runs", "summary_folder"]

BASELINE, TARGET = "lora", "full"  # the ends of the gap


def groups(comparison: Comparison) -> Iterator[tuple[str, Mapping[str, Any], list[Cell]]]:
    """Yield (task, point of the grid, cells); a cell that reads less of the grid is in several."""
    for task in dict.fromkeys(cell.task for cell in comparison.cells):
        cells = [cell for cell in comparison.cells if cell.task == task]
        points = [dict(cell.axes) for cell in cells]
        whole = [p for p in points if not any(p.items() < q.items() for q in points)]
        for point in [p for i, p in enumerate(whole) if p not in whole[:i]]:
            yield task, point, [c for c in cells if c.axes.items() <= point.items()]


def summary_folder(comparison: Comparison, task: str, point: Mapping[str, Any]) -> Path:
    """Where the tables and figures of a summary lie: the comparison's folder if there is one."""
    if len(list(groups(comparison))) == 1:
        return comparison.folder
    axes = ",".join(f"{key}={value}" for key, value in point.items())
    return comparison.folder / "tables" / ("-".join(filter(None, (task, axes))))


def summarize_runs(
    comparison: Comparison, results: Results, task: str, point: Mapping[str, Any], cells: list[Cell]
) -> dict[str, Any]:
    """Summarize the cells of one task and point of the grid.

    Returns:
        ``{"methods": [...], "gap": {...} or None, "warnings": [...], "metric": name, ...}``; each
        method with its chosen learning rate, mean and deviation of test loss and metric over seeds,
        the share of the gap closed, and every run's numbers and folder.
    """
    rows: list[dict[str, Any]] = []
    warnings: list[str] = []
    metric = TASKS[cells[0].values["task"]].metric
    tuned_on = comparison.seeds if comparison.strategy == "grid" else comparison.seeds[:1]
    for cell in cells:
        rate = pick_rate(cell, results, tuned_on)
        name = str(cell.folder)
        tried = {(lr, seed): r for (folder, lr, seed), r in results.items() if folder == name}
        lost = [lr for (lr, _), r in tried.items() if r["status"] != "finished"]
        if lost:
            rates = ", ".join(f"{lr:g}" for lr in sorted(set(lost)))
            warnings.append(f"{cell.label}: {len(lost)} runs diverged or failed (rates {rates})")
        runs = [
            r
            for seed in comparison.seeds
            if (r := tried.get((rate, seed))) is not None and r["status"] == "finished"
        ]
        if not runs:
            continue
        if side := _at_edge(cell, rate):
            warnings.append(
                f"{cell.label}: the best learning rate, {rate:g}, is the {side} of its grid; "
                "a better one may lie beyond"
            )
        tests = [r["metrics"]["test"] for r in runs]
        metrics = [t[metric] for t in tests if metric in t]
        rows.append(
            {
                "label": cell.label,
                "method": cell.values["method"],
                "learning_rate": rate,
                "learning_rates": list(cell.learning_rates),
                "test_losses": [t["loss"] for t in tests],
                "test_loss": asdict(summarize([t["loss"] for t in tests])),
                "test_loss_error": tests[0].get("loss_standard_error"),
                "validation_loss": asdict(summarize([validation_loss(r) for r in runs])),
                "metric": asdict(summarize(metrics)) if metrics else None,
                "trainable_parameters": runs[0]["cost"]["trainable_parameters"],
                "optimizer_state_bytes": runs[0]["cost"]["optimizer_state_bytes"],
                "seconds_per_step": statistics.median(
                    r["cost"]["seconds_per_step"] or 0.0 for r in runs
                ),
                "peak_memory_bytes": runs[0]["cost"]["peak_memory_bytes"],
                "folders": [
                    str(
                        (cell.folder / f"lr-{rate:g}" / f"seed-{r['seed']}").relative_to(
                            comparison.folder
                        )
                    )
                    for r in runs
                ],
                "saved": runs[0]["saved"],
                "tried": [
                    {"learning_rate": lr, "seed": seed, "validation_loss": validation_loss(r)}
                    for (lr, seed), r in sorted(tried.items(), key=lambda item: item[0])
                ],
            }
        )
    _add_differences(rows)
    return {
        "task": task,
        "rank": point.get("rank", cells[-1].values.get("rank", 8)),
        "axes": dict(point),
        "seeds": list(comparison.seeds),
        "metric": metric,
        "gap": _close_gap(rows),
        "methods": rows,
        "warnings": warnings,
    }


def _at_edge(cell: Cell, rate: float) -> str | None:
    rates = cell.learning_rates
    if len(rates) > 1 and rate in (rates[0], rates[-1]):
        return "lowest" if rate == rates[0] else "highest"
    return None


def _add_differences(rows: list[dict[str, Any]]) -> None:
    """Add ``over_baseline``: test loss minus LoRA's, seed by seed, with its 95 % interval."""
    found = [row["test_losses"] for row in rows if row["label"] == BASELINE]
    baseline: list[float] = found[0] if found else []
    for row in rows:
        if len(baseline) > 1 and row["label"] != BASELINE and len(row["test_losses"]) > 1:
            row["over_baseline"] = difference(row["test_losses"], baseline)


def _close_gap(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Add ``gap_closed`` to the rows, where there is a gap between LoRA and full fine-tuning."""
    by_label = {row["label"]: row for row in rows}
    if BASELINE not in by_label or TARGET not in by_label:
        return None
    low, high = by_label[BASELINE]["test_losses"], by_label[TARGET]["test_losses"]
    errors = (by_label[BASELINE]["test_loss_error"], by_label[TARGET]["test_loss_error"])
    gap = gap_between(low, high, None if None in errors else errors)
    start, end = statistics.fmean(low), statistics.fmean(high)
    for row in rows:
        inner = row["label"] not in (BASELINE, TARGET)
        if gap.exists and inner:
            row["gap_closed"] = share_closed(start, row["test_loss"]["mean"], end)
    return {"size": gap.size, "noise": gap.noise, "exists": gap.exists}
