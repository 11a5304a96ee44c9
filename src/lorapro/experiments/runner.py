"""One run: build, train with ``transformers.Trainer``, evaluate, save."""

from __future__ import annotations

import functools
import math
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PrinterCallback, ProgressCallback, set_seed

from lorapro.experiments import folders
from lorapro.experiments.callbacks import DivergenceWatch, MetricsLog, NothingLeft, StepClock
from lorapro.experiments.config import RunConfig
from lorapro.experiments.errors import UserError
from lorapro.experiments.evaluation import ItemTrainer, make_trainer
from lorapro.experiments.keys import owners
from lorapro.experiments.memory import peak_memory, reset_peak_memory, tensor_bytes
from lorapro.experiments.model_building import (
    build_model,
    check_run,
    count_parameters,
    is_measured,
    total_steps,
)
from lorapro.experiments.saved import ABOUT, about_run, write_beside
from lorapro.experiments.tasks import Family

__all__ = ["make_task", "run"]

Log = Callable[[str], None]


def make_task(config: RunConfig, log: Log | None = None, test_limit: int | None = None) -> Family:
    """Return the config's task with its data read and encoded (see ``Family.prepare``)."""
    family = config.family()
    family.prepare(log, test_limit)
    return family


def run(
    config: RunConfig,
    family: Family | None = None,
    *,
    log: Log | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train and evaluate one configuration; return (and save) its result.

    What the folder then holds is described in :mod:`lorapro.experiments.folders`. An adapter that
    did not start at ``B·A = 0`` is saved for the original base. A finished run is not repeated; an
    interrupted one goes on from its last checkpoint. One that diverges is stopped, and its result
    says so.

    Args:
        config: what to run.
        family: the config's task, if it is at hand already (see :func:`make_task`).
        log: called with one line of text now and then.
        on_step: called with (steps done, steps in all); Trainer's own progress bar is then off.

    Raises:
        UserError: bad input, before anything is written; another process has this run.
    """
    say = log or (lambda _: None)
    folder = config.folder
    if folders.run_state(config) == "finished":
        say(f"{folder} holds this run already, finished; nothing to do")
        return folders.read_result(folder)
    for key in config.unread:
        say(f"note: method {config.method.name!r} does not read {key!r} ({owners(key)} do)")
    started = time.perf_counter()
    family = family or make_task(config, log)
    model = build_model(config, family)
    optimizer = check_run(config, model, family)
    steps = total_steps(config, family)
    if config.training.get_warmup_steps(steps) > steps:
        say(f"note: the warm-up is longer than the run, {steps} steps: its rate is never reached")
    with folders.unmade_by_bad_input(folder), folders.locked(folder):
        state = folders.run_state(config)  # again: another process may have had it meanwhile
        if state == "finished":
            return folders.read_result(folder)
        files = config.method.adapter.checkpoint_files(config.adapter)
        checkpoint = folders.last_checkpoint(folder, files) if state == "started" else None
        if state == "started":
            say(f"going on from {checkpoint.name}" if checkpoint else "starting the run anew")
        if checkpoint is None:
            folders.clear(folder)
        folders.claim(config)
        return _train(config, family, model, optimizer, checkpoint, started, on_step)


def _train(
    config: RunConfig,
    family: Family,
    model: Any,
    optimizer: Any,
    checkpoint: Path | None,
    started: float,
    on_step: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    folder, method = config.folder, config.method
    about = about_run(config, family, base_moves(config))
    folders.write_json(folder / ABOUT, about)
    clock, watch = StepClock(on_step), DivergenceWatch(config.run.divergence)
    callbacks = [clock, watch, MetricsLog(folder), *method.adapter.callbacks(config.adapter)]
    if is_measured(config):
        from lorapro.diagnostics import AlignmentCallback

        every, layers = config.run.diagnostics_every, config.run.diagnostics_layers
        callbacks.append(AlignmentCallback(every=every, layers=layers))
    try:
        trainer = make_trainer(config, family, model, optimizer, callbacks)
    except (ValueError, TypeError, ImportError) as error:  # what Trainer has against its keys
        raise UserError(" ".join(str(error).split())) from error
    if on_step is not None:
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
    reset_peak_memory()
    set_seed(config.training.seed)  # dropout, from here on alike for all methods
    if method.adapter.trains:
        with _merged_is_saved_too(), suppress(NothingLeft):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    else:
        model.requires_grad_(False)
    trainable, parameters = count_parameters(model)
    result: dict[str, Any] = {
        **_about(config, family, trainer),
        "cost": {
            "seconds_per_step": statistics.median(clock.seconds) if clock.seconds else None,
            "peak_memory_bytes": peak_memory(),
            "optimizer_state_bytes": tensor_bytes(getattr(trainer.optimizer, "state", {})),
            "trainable_parameters": trainable,
            "parameters": parameters,
            "device": str(trainer.args.device),
        },
    }
    validation = {"loss": math.nan}
    if not watch.diverged:
        validation = _last_validation(trainer)
    diverged = watch.diverged or not math.isfinite(validation["loss"])
    test: dict[str, float] = {}
    if not diverged and family.test and config.run.score_test:
        items = trainer.score(family.test)
        test = trainer.summarize(items)
        if config.run.save_items:
            _write_items(folder / folders.ITEMS, items)
    if not diverged and family.final_samples:
        where = folder / folders.PREDICTIONS
        test |= family.final_metrics(model, where, family.final_samples)
    result |= {
        "status": "diverged" if diverged else "finished",
        "metrics": {**_before(trainer), "validation": validation, "test": test},
        "saved": {} if diverged else _save(config, model, family, folder),
    }
    about |= {name: result[name] for name in ("steps", "metrics", "versions")}
    folders.write_json(folder / ABOUT, about)
    for name in result["saved"].values():
        changed = name == folders.ADAPTER and folders.MERGED in result["saved"]
        write_beside(folder / name, {**about, "base_changed": changed}, family)
    result["cost"]["seconds"] = time.perf_counter() - started
    folders.write_json(folder / folders.RESULT, result)
    return folders.read_result(folder)


def _about(config: RunConfig, family: Family, trainer: ItemTrainer) -> dict[str, Any]:
    """What the run is, as every result says it."""
    return {
        "status": "finished",
        "task": config.entry.name,
        "method": config.method.name,
        "model": family.model_name,
        "data": family.data_name,
        "rank": getattr(config.adapter, "rank", None),
        "alpha": getattr(config.adapter, "alpha", None),
        "learning_rate": config.training.learning_rate,
        "seed": config.training.seed,
        "batch_size": config.training.train_batch_size
        * config.training.gradient_accumulation_steps
        * config.training.world_size,
        "steps": trainer.state.global_step,
        "metric": config.entry.metric,
        "versions": versions(),
        "git_revision": git_revision(),
        "fingerprint": config.fingerprint(),
        "identity": config.identity(),
    }


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions a run depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "lorapro"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@functools.cache
def git_revision() -> str | None:
    """Return the revision of the working copy this file lies in, with ``+`` for local changes."""
    here = Path(__file__).parent
    try:
        head, changes, _ = (
            subprocess.run(
                ["git", "-C", str(here), *command],
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            ).stdout.strip()
            for command in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "."],
                ["ls-files", "--error-unmatch", Path(__file__).name],  # else: someone else's
            )
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changes else "")


def _before(trainer: ItemTrainer) -> dict[str, dict[str, float]]:
    """Validation metrics before the first step, if they were taken (``eval_on_start``)."""
    entries = (e for e in trainer.state.log_history if "eval_loss" in e and e.get("step") == 0)
    first = next(entries, None)
    return {} if first is None else {"before": _validation_of(first)}


def _last_validation(trainer: ItemTrainer) -> dict[str, float]:
    """Validation metrics after the last step, taken from the log if they are there already."""
    history, step = trainer.state.log_history, trainer.state.global_step
    logged = (e for e in reversed(history) if "eval_loss" in e and e.get("step") == step)
    last: Mapping[str, Any] | None = next(logged, None)
    return _validation_of(last or trainer.evaluate())


def _validation_of(entry: Mapping[str, Any]) -> dict[str, float]:
    return {
        key.removeprefix("eval_"): float(value)
        for key, value in entry.items()
        if key.startswith("eval_")
    }


def _write_items(path: Path, items: Any) -> None:
    scratch = path.with_name(path.name + ".part")
    with scratch.open("wb") as stream:
        np.savez_compressed(stream, **items)
    scratch.replace(path)


@contextmanager
def _merged_is_saved_too() -> Iterator[None]:
    """Saving an adapter that is none of the original base's, without its warning."""
    with warnings.catch_warnings():
        for message in ("the base weights were decayed", "adapter .* did not start at"):
            warnings.filterwarnings("ignore", message, UserWarning)
        yield


def base_moves(config: RunConfig) -> bool:
    """Whether training changes base weights, which an adapter alone does not hold."""
    when = config.method.optimizer.changes_base
    return when == "always" or (when == "decay" and config.training.weight_decay > 0)


def _save(config: RunConfig, model: Any, family: Family, folder: Path) -> dict[str, str]:
    """Save what was trained; return names and paths relative to the folder."""
    from lorapro.export import save_portable

    if not config.method.adapter.trains:
        return {}
    if config.method.trains_all:
        if not config.run.save_full_model:
            return {}
        model.save_pretrained(folder / folders.MODEL)
        return {"model": folders.MODEL}
    moved = base_moves(config)
    if config.method.start.at_zero or moved:
        with _merged_is_saved_too():
            model.save_pretrained(folder / folders.ADAPTER)
    else:  # what it learnt, for the original base
        try:
            save_portable(model, folder / folders.ADAPTER)
        except ValueError:  # no plain LoRA, such as DoRA from PiSSA's start
            moved = True
            with _merged_is_saved_too():
                model.save_pretrained(folder / folders.ADAPTER)
    if not moved:
        return {"adapter": folders.ADAPTER}
    merged = model.merge_and_unload()
    merged.save_pretrained(folder / folders.MERGED)
    return {"adapter": folders.ADAPTER, "merged": folders.MERGED}
