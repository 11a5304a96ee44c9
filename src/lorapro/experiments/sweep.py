"""Execution of a comparison: what is missing is run, learning rates are picked on validation data.

:func:`wanted` is the whole plan, a pure function from the results there are to the runs that are
needed now; where they run (here, in other processes, on a cluster) is a :class:`Workers`.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from lorapro.experiments import folders
from lorapro.experiments.config import owners
from lorapro.experiments.errors import UserError
from lorapro.experiments.plan import Cell, Comparison
from lorapro.experiments.progress import RunsProgress

__all__ = ["Job", "check", "compare", "pick_rate", "wanted"]

Job = tuple[Cell, float, int]
"""(cell, learning rate, seed)."""

Results = dict[tuple[str, float, int], dict[str, Any]]
"""(folder of the cell, learning rate, seed) -> result."""


def key(job: Job) -> tuple[str, float, int]:
    """Return what results are found by."""
    cell, rate, seed = job
    return str(cell.folder), rate, seed


def validation_loss(result: dict[str, Any]) -> float:
    """Validation loss for picking a rate: infinite for a run that diverged or failed."""
    loss = result.get("metrics", {}).get("validation", {}).get("loss")
    return math.inf if result["status"] != "finished" or loss is None else float(loss)


def pick_rate(cell: Cell, results: Results, seeds: Sequence[int]) -> float:
    """Return the learning rate of a cell with the least validation loss, mean over ``seeds``."""

    def score(rate: float) -> float:
        return statistics.fmean(
            validation_loss(results[str(cell.folder), rate, seed]) for seed in seeds
        )

    return min(cell.learning_rates, key=score)


def wanted(comparison: Comparison, results: Results) -> list[Job]:
    """Return the runs that can be run now: those of a rate that is still to be picked come later.

    A cell whose every rate diverged or failed with the first seed gets no further seeds.
    """
    first, others = comparison.seeds[0], comparison.seeds[1:]
    jobs: list[Job] = []
    for cell in comparison.cells:
        grid = comparison.strategy == "grid"
        tries = [
            (cell, rate, seed)
            for rate in cell.learning_rates
            for seed in (comparison.seeds if grid else (first,))
        ]
        missing = [job for job in tries if key(job) not in results]
        jobs += missing
        if grid or missing:
            continue
        rate = pick_rate(cell, results, (first,))
        if math.isfinite(validation_loss(results[str(cell.folder), rate, first])):
            jobs += [
                (cell, rate, seed) for seed in others if key((cell, rate, seed)) not in results
            ]
    return jobs


class Tasks:
    """Tasks by what they depend on: most comparisons need few."""

    def __init__(self, log: Any = None) -> None:
        self._known: dict[str, Any] = {}
        self._log = log

    def of(self, config: Any) -> Any:
        """Return the prepared task of a configuration."""
        from lorapro.experiments.runner import make_task

        name = repr((config.run.model, config.run.data, config.entry.name, config.task))
        run = config.run
        name += repr((run.data_config, run.dtype, run.train_samples, run.validation_samples))
        name += repr((run.test_samples, run.split_seed))
        if name not in self._known:
            self._known[name] = make_task(config, self._log)
        return self._known[name]


def check(comparison: Comparison, tasks: Tasks) -> Results:
    """Find what is finished, and what is wrong with any run before the first one starts.

    Raises:
        UserError: a folder of others, or a run that cannot work.
    """
    folder = comparison.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file, expected a folder")
    if folder.is_dir() and (folder / folders.CONFIG).is_file():
        raise UserError(f"output_dir {folder} holds a single run; choose another folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "runs").is_dir():
        raise UserError(
            f"output_dir {folder} holds files that are not a comparison's; choose a new folder"
        )
    results: Results = {}
    unfinished: dict[str, Any] = {}
    for cell in comparison.cells:
        for rate in cell.learning_rates:
            for seed in comparison.seeds:
                config = cell.config(rate, seed)
                if folders.run_state(config) == "finished":
                    results[key((cell, rate, seed))] = folders.read_result(config.folder)
                else:
                    unfinished.setdefault(str(cell.folder), config)
    todo = {str(cell.folder) for cell, _, _ in wanted(comparison, results)}
    for name, config in unfinished.items():
        if name in todo:
            _try(config, tasks)
    return results


def _try(config: Any, tasks: Tasks) -> None:
    from lorapro.experiments.model_building import build_model, check_optimizer

    model = build_model(config, tasks.of(config))
    check_optimizer(config, model)


def compare(comparison: Comparison, console: Console | None = None) -> Results:
    """Run the comparison; what is finished already is not repeated.

    Everything is checked before the first run starts: names, folders, data, ranks.

    Returns:
        The result of every run.

    Raises:
        UserError: bad input, before anything is written.
    """
    console = console or Console()
    progress = RunsProgress(comparison.most_runs(), console)
    for name in comparison.unread:
        progress.say(f"note: no method here reads {name!r}; it belongs to {owners(name)}")
    tasks = Tasks(progress.say)
    results = check(comparison, tasks)
    comparison.folder.mkdir(parents=True, exist_ok=True)
    (comparison.folder / "runs").mkdir(exist_ok=True)
    folders.write_json(comparison.folder / "comparison.json", comparison.describe())
    with progress.shown():
        for name, rate, seed in results:
            progress.skip(_name(comparison, name, rate, seed), _said(results[name, rate, seed]))
        while jobs := wanted(comparison, results):
            for job in jobs[:1]:
                results[key(job)] = _run(job, tasks, progress)
    return results


def _name(comparison: Comparison, folder: str, rate: float, seed: int) -> str:
    cell = next(cell for cell in comparison.cells if str(cell.folder) == folder)
    return f"{cell.name}, lr {rate:g}, seed {seed}"


def _said(result: dict[str, Any]) -> str:
    if result["status"] == "failed":
        return f"failed: {result['error']}"
    loss = result["metrics"]["validation"]["loss"]
    if result["status"] == "diverged" or loss is None:
        return f"diverged after {result['steps']} steps"
    return f"validation loss {loss:.4f}"


def _run(job: Job, tasks: Tasks, progress: RunsProgress) -> dict[str, Any]:
    from lorapro.experiments.runner import run

    cell, rate, seed = job
    config = cell.config(rate, seed)
    name = f"{cell.name}, lr {rate:g}, seed {seed}"
    progress.begin(name)
    result = run(config, tasks.of(config), on_step=progress.step)
    gc.collect()  # the last model's reference cycles, before the next model is built
    folders.clear_checkpoints(config.folder)
    progress.finish(name, _said(result))
    return result
