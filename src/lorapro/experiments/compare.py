"""Methods x learning rates x seeds: plan, run what is missing, pick learning rates, summarize."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from rich.console import Console

from lorapro.experiments import folders, report
from lorapro.experiments.compare_config import Comparison, Entry
from lorapro.experiments.config import Config
from lorapro.experiments.errors import UserError
from lorapro.experiments.model_building import build_model, check_optimizer
from lorapro.experiments.on_the_way import add_losses_on_the_way
from lorapro.experiments.progress import RunsProgress
from lorapro.experiments.runner import make_task, run
from lorapro.experiments.statistics import difference, gap_between, share_closed, summarize
from lorapro.experiments.tasks import TASKS, Task

__all__ = ["BASELINE", "TARGET", "compare", "pick_rate", "summarize_runs"]

BASELINE, TARGET = "lora", "full"  # the ends of the gap

# Keys of a run that its task does not depend on.
NOT_OF_THE_TASK = {
    "method",
    "x",
    "rank",
    "alpha",
    "gamma",
    "lora_dropout",
    "target_modules",
    "overwrite",
} | {
    "exclude_modules",
    "modules_to_save",
    "save_full_model",
    "generation_samples",
}

Results = dict[tuple[str, float, int], dict[str, Any]]


class _Tasks:
    """Tasks by the keys they depend on: most comparisons need one only."""

    def __init__(self, log: Any) -> None:
        self._known: dict[str, Task] = {}
        self._log = log

    def of(self, config: Config) -> Task:
        keys = {f.name: getattr(config.experiment, f.name) for f in fields(config.experiment)}
        key = repr({name: value for name, value in keys.items() if name not in NOT_OF_THE_TASK})
        if key not in self._known:
            self._known[key] = make_task(config, self._log)
        return self._known[key]


def compare(comparison: Comparison, console: Console | None = None) -> dict[str, Any]:
    """Run the comparison (what is finished already is not repeated) and write its report.

    Everything is checked before the first run starts: names, folders, data, ranks.

    Returns:
        The summary that is also written to ``results.json`` (see :func:`summarize_runs`).

    Raises:
        UserError: bad input, before anything is written.
    """
    console = console or Console()
    progress = RunsProgress(comparison.most_runs(), console)
    tasks = _Tasks(progress.say)
    _check(comparison, tasks)
    results: Results = {}
    with progress.shown():
        first, others = comparison.seeds[0], comparison.seeds[1:]
        for entry in comparison.entries:
            grid = comparison.strategy == "grid"
            for rate in entry.learning_rates:
                for seed in comparison.seeds if grid else (first,):
                    _one(comparison, entry, rate, seed, tasks, progress, results)
            if not grid:
                rate = pick_rate(entry, results, (first,))
                for seed in others:
                    _one(comparison, entry, rate, seed, tasks, progress, results)
    metric = TASKS[comparison.base.experiment.task].metric
    summary = summarize_runs(comparison, results, metric)
    add_losses_on_the_way(comparison.folder, summary["methods"], BASELINE)
    report.write(comparison.folder, summary)
    return summary


def _check(comparison: Comparison, tasks: _Tasks) -> None:
    """Find out what is wrong with any run before the first one starts."""
    folder = comparison.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file, expected a folder")
    if folder.is_dir() and (folder / folders.CONFIG).is_file():
        raise UserError(f"output_dir {folder} holds a single run; choose another folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "runs").is_dir():
        raise UserError(
            f"output_dir {folder} holds files that are not a comparison's; choose a new folder"
        )
    for entry in comparison.entries:
        configs = [
            comparison.config(entry, rate, seed)
            for rate in entry.learning_rates
            for seed in comparison.seeds
        ]
        states = {folders.run_state(config) for config in configs}
        if states != {"finished"}:
            model = build_model(configs[0], tasks.of(configs[0]))
            check_optimizer(configs[0], model)


def _one(
    comparison: Comparison,
    entry: Entry,
    rate: float,
    seed: int,
    tasks: _Tasks,
    progress: RunsProgress,
    results: Results,
) -> None:
    config = comparison.config(entry, rate, seed)
    name = f"{entry.label}, lr {rate:g}, seed {seed}"
    finished = folders.run_state(config) == "finished"
    progress.begin(name)
    if finished:
        result = folders.read_result(config.folder)
    else:
        result = run(config, tasks.of(config), on_step=progress.step)
        gc.collect()  # the last model's reference cycles, before the next model is built
    folders.clear_checkpoints(config.folder)
    results[entry.label, rate, seed] = result
    loss = result["validation"]["loss"]
    what = f"validation loss {loss:.4f}" + (" (diverged)" if result["diverged"] else "")
    (progress.skip if finished else progress.finish)(name, what)


def _validation(result: dict[str, Any]) -> float:
    loss = float(result["validation"]["loss"])
    return loss if math.isfinite(loss) else math.inf


def pick_rate(entry: Entry, results: Results, seeds: Sequence[int]) -> float:
    """Return the learning rate of ``entry`` with the least validation loss, mean over ``seeds``."""

    def score(rate: float) -> float:
        return statistics.fmean(_validation(results[entry.label, rate, seed]) for seed in seeds)

    return min(entry.learning_rates, key=score)


def _at_edge(entry: Entry, rate: float) -> str | None:
    rates = entry.learning_rates
    if len(rates) > 1 and rate in (rates[0], rates[-1]):
        return "lowest" if rate == rates[0] else "highest"
    return None


def summarize_runs(comparison: Comparison, results: Results, metric: str | None) -> dict[str, Any]:
    """Summarize a comparison for the table, the figure and ``results.json``.

    Returns:
        ``{"methods": [...], "gap": {...} or None, "warnings": [...], "metric": name}``; each method
        with its chosen learning rate, mean and deviation of test loss and metric over seeds, the
        share of the gap closed, and every run's numbers and folder.
    """
    rows: list[dict[str, Any]] = []
    warnings: list[str] = []
    tuned_on = comparison.seeds if comparison.strategy == "grid" else comparison.seeds[:1]
    for entry in comparison.entries:
        rate = pick_rate(entry, results, tuned_on)
        runs = [results[entry.label, rate, seed] for seed in comparison.seeds]
        if side := _at_edge(entry, rate):
            warnings.append(
                f"{entry.label}: the best learning rate, {rate:g}, is the {side} of its grid; "
                "a better one may lie beyond"
            )
        if any(r["diverged"] for r in runs):
            warnings.append(f"{entry.label}: diverged at learning rate {rate:g}")
        metrics = [r["test"][metric] for r in runs if metric in r["test"]] if metric else []
        rows.append(
            {
                "label": entry.label,
                "method": entry.overrides["method"],
                "learning_rate": rate,
                "learning_rates": list(entry.learning_rates),
                "test_losses": [r["test"]["loss"] for r in runs],
                "test_loss": asdict(summarize([r["test"]["loss"] for r in runs])),
                "test_loss_error": runs[0]["test"].get("loss_standard_error"),
                "validation_loss": asdict(summarize([_validation(r) for r in runs])),
                "metric": asdict(summarize(metrics)) if metrics else None,
                "trainable_parameters": runs[0]["trainable_parameters"],
                "optimizer_state_bytes": runs[0]["optimizer_state_bytes"],
                "seconds_per_step": statistics.median(r["seconds_per_step"] for r in runs),
                "peak_memory_bytes": runs[0]["peak_memory_bytes"],
                "folders": [
                    str(comparison.config(entry, rate, seed).folder.relative_to(comparison.folder))
                    for seed in comparison.seeds
                ],
                "saved": runs[0]["saved"],
                "tried": [
                    {"learning_rate": lr, "seed": seed, "validation_loss": r["validation"]["loss"]}
                    for (label, lr, seed), r in results.items()
                    if label == entry.label
                ],
            }
        )
    _add_differences(rows)
    gap = _close_gap(rows)
    return {
        "task": comparison.base.experiment.task,
        "rank": comparison.base.experiment.rank,
        "seeds": list(comparison.seeds),
        "metric": metric,
        "gap": gap,
        "methods": rows,
        "warnings": warnings,
    }


def _add_differences(rows: list[dict[str, Any]]) -> None:
    """Add ``over_baseline``: test loss minus LoRA's, seed by seed, with its 95 % interval."""
    found = [row["test_losses"] for row in rows if row["label"] == BASELINE]
    baseline: list[float] = found[0] if found else []
    for row in rows:
        if len(baseline) > 1 and row["label"] != BASELINE:
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
