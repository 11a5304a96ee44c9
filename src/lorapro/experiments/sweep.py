"""Execution of a comparison: what is missing is run, learning rates are picked on validation data.

:func:`wanted` is the whole plan, a pure function from the results there are to the runs that are
needed now; where they run (here, in other processes, on a cluster) is a kind of
:class:`~lorapro.experiments.workers.Workers`.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from lorapro.experiments import folders
from lorapro.experiments.config import RunConfig
from lorapro.experiments.errors import UserError
from lorapro.experiments.keys import owners
from lorapro.experiments.plan import Cell, Comparison
from lorapro.experiments.progress import RunsProgress
from lorapro.experiments.workers import (
    BUSY,
    LOST,
    Here,
    Processes,
    RayWorkers,
    Tasks,
    Workers,
)

__all__ = ["Job", "check", "compare", "execute", "pick_rate", "validation_loss", "wanted"]

Job = tuple[Cell, float, int]
"""(cell, learning rate, seed)."""

Results = dict[tuple[str, float, int], dict[str, Any]]
"""(folder of the cell, learning rate, seed) -> result."""


def key(job: Job) -> tuple[str, float, int]:
    """Return what results are found by."""
    cell, rate, seed = job
    return cell.folder.as_posix(), rate, seed


def validation_loss(result: dict[str, Any]) -> float:
    """Validation loss for picking a rate: infinite for a run that diverged or failed."""
    loss = result.get("metrics", {}).get("validation", {}).get("loss")
    return math.inf if result["status"] != "finished" or loss is None else float(loss)


def pick_rate(cell: Cell, results: Results, seeds: Sequence[int]) -> float:
    """Return the learning rate of a cell with the least validation loss, mean over ``seeds``."""

    def score(rate: float) -> float:
        return statistics.fmean(
            validation_loss(results[cell.folder.as_posix(), rate, seed]) for seed in seeds
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
        if math.isfinite(validation_loss(results[cell.folder.as_posix(), rate, first])):
            jobs += [
                (cell, rate, seed) for seed in others if key((cell, rate, seed)) not in results
            ]
    return jobs


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
    unfinished: dict[str, RunConfig] = {}
    for cell in comparison.cells:
        for rate in cell.learning_rates:
            for seed in comparison.seeds:
                config = cell.config(rate, seed)
                if folders.run_state(config) == "finished":
                    results[key((cell, rate, seed))] = folders.read_result(config.folder)
                    folders.clear_checkpoints(config.folder)  # killed before it could do so
                else:
                    unfinished.setdefault(cell.folder.as_posix(), config)
    todo = {key(job)[0] for job in wanted(comparison, results)}
    tried = set()
    for name, config in unfinished.items():
        parts = (config.run, config.task, config.adapter, config.start, config.optimizer)
        kind = repr((config.method.name, *parts))
        if name in todo and kind not in tried:
            tried.add(kind)
            _try(config, tasks)
    return results


def _try(config: RunConfig, tasks: Tasks) -> None:
    """Build a run's model, without the start's own computation, its optimizer and schedule."""
    from lorapro.experiments.model_building import build_model, check_run

    family = tasks.of(config)
    check_run(config, build_model(config, family, initialize=False), family)
    gc.collect()


def compare(
    comparison: Comparison,
    console: Console | None = None,
    *,
    processes: int = 1,
    backend: str = "local",
) -> Results:
    """Run the comparison; what is finished already is not repeated.

    Everything is checked before the first run starts: names, folders, data, ranks. Several of these
    may work on one folder at a time; each run is trained once.

    Args:
        comparison: what to run.
        console: where to say what happens.
        processes: runs at a time; for ``"ray"`` 1 is as many as the cluster holds.
        backend: ``"local"`` or ``"ray"``.

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
    progress.skip(len(results))
    if not wanted(comparison, results):
        return results
    with progress.shown():
        if backend == "ray":
            workers: Workers = RayWorkers(processes if processes > 1 else None)
        elif processes > 1:
            workers = Processes(processes)
        else:
            workers = Here(tasks, progress.step)
        try:
            execute(comparison, results, workers, progress)
        finally:
            workers.close()
    return results


PATIENCE = 5.0  # seconds until a run that another process has is looked at again
ATTEMPTS = 3  # how often a run is tried whose worker is killed


def execute(
    comparison: Comparison, results: Results, workers: Workers, progress: RunsProgress
) -> None:
    """Run what :func:`wanted` says until it says nothing more; fill ``results``."""
    running: dict[Any, Job] = {}
    elsewhere: dict[Any, float] = {}
    attempts: Counter[Any] = Counter()
    while True:
        jobs = {key(j): j for j in wanted(comparison, results) if key(j) not in running}
        if not jobs and not running:
            return
        now = time.monotonic()
        free = [name for name in jobs if now - elsewhere.get(name, -PATIENCE) >= PATIENCE]
        for name in free[: workers.size - len(running)]:
            cell, rate, seed = running[name] = jobs[name]
            attempts[name] += 1
            progress.begin(_name(jobs[name]))
            workers.submit(name, cell.config(rate, seed).given)
        if not running:
            time.sleep(PATIENCE / 5)
            continue
        done, result = workers.wait()
        job = running.pop(done)
        name = key(job)
        if result["status"] == BUSY:
            if name not in elsewhere:
                progress.say(f"{_name(job)}: another process is training it")
            elsewhere[name] = time.monotonic()
            continue
        if result["status"] == LOST:
            if attempts[name] < ATTEMPTS:
                progress.say(f"{_name(job)}: {result['error']}; trying again")
                continue
            result = {**result, "status": "failed", "steps": None, "metrics": {}}
        results[key(job)] = result
        progress.finish(_name(job), _said(result))


def _name(job: Job) -> str:
    cell, rate, seed = job
    return f"{cell.name}, lr {rate:g}, seed {seed}"


def _said(result: dict[str, Any]) -> str:
    if result["status"] == "failed":
        return f"failed: {result['error']}"
    loss = result["metrics"]["validation"]["loss"]
    if result["status"] == "diverged" or loss is None:
        return f"diverged after {result['steps']} steps"
    return f"validation loss {loss:.4f}"
