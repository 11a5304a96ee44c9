"""One run: build, train with ``transformers.Trainer``, evaluate, save."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, set_seed

from lorapro.experiments import folders
from lorapro.experiments.config import Config
from lorapro.experiments.memory import peak_memory, reset_peak_memory, tensor_bytes
from lorapro.experiments.methods import METHODS
from lorapro.experiments.model_building import build_model, check_optimizer, count_parameters
from lorapro.experiments.tasks import TASKS, Task
from lorapro.export import save_portable
from lorapro.lora_ga import save_initial

__all__ = ["make_task", "make_trainer", "run"]

Log = Callable[[str], None]


class StepClock(TrainerCallback):
    """Time of each step without evaluation and saving, and a call for each step done."""

    def __init__(self, on_step: Callable[[int, int], None] | None = None) -> None:
        self.seconds: list[float] = []
        self._started: float | None = None
        self._on_step = on_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it; report progress."""
        if self._started is not None:
            self.seconds.append(time.perf_counter() - self._started)
        if self._on_step is not None:
            self._on_step(state.global_step, state.max_steps)


def make_task(config: Config, log: Log | None = None, test_limit: int | None = None) -> Task:
    """Return the config's task with its data read and encoded (see ``Task.prepare``)."""
    task = TASKS[config.experiment.task](config.experiment)
    task.prepare(log, test_limit)
    return task


class _ReadOnlyTrainer(Trainer):
    """A Trainer that only evaluates, and makes no folder for it."""

    def __init__(self, **kwargs: Any) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            args = dataclasses.replace(kwargs.pop("args"), output_dir=scratch)
            super().__init__(args=args, **kwargs)


def make_trainer(
    config: Config,
    task: Task,
    model: Any,
    optimizer: Any = None,
    callbacks: Any = None,
    *,
    create_folder: bool = True,
) -> Trainer:
    """Return the Trainer of a run; without ``create_folder`` it can evaluate only."""
    return (Trainer if create_folder else _ReadOnlyTrainer)(
        model=model,
        args=config.training,
        train_dataset=task.train,
        eval_dataset=task.validation,
        data_collator=task.collator(),
        processing_class=task.processor,
        compute_metrics=task.compute_metrics(),
        optimizer_cls_and_kwargs=optimizer,
        callbacks=callbacks,
    )


def run(
    config: Config,
    task: Task | None = None,
    *,
    log: Log | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Train and evaluate one configuration; return (and save) its result.

    The output folder gets ``config.yaml``, Trainer's checkpoints, ``curve.csv``, the ``adapter``
    (or ``model``; both the adapter and a ``merged`` model where the base weights changed too) and,
    written last, ``result.json``. An adapter that did not start at ``B·A = 0`` is saved for the
    original base. A finished run is not repeated; an interrupted one goes on from its last
    checkpoint.

    Args:
        config: what to run.
        task: the config's task, if it is at hand already (see :func:`make_task`).
        log: called with one line of text now and then.
        on_step: called with (steps done, steps in all); Trainer's own progress bar is then off.

    Raises:
        UserError: bad input, before anything is written.
    """
    say = log or (lambda _: None)
    folder = config.folder
    if (state := folders.run_state(config)) == "finished":
        say(f"{folder} holds this run already, finished; nothing to do")
        return folders.read_result(folder)
    started = time.perf_counter()
    task = task or make_task(config, log)
    model = build_model(config, task)
    optimizer = check_optimizer(config, model)
    checkpoint = None
    if state == "started":
        checkpoint = folders.last_checkpoint(folder)
        say(f"going on from {checkpoint.name}" if checkpoint else "starting the run anew")
    if checkpoint is None and folder.is_dir():
        folders.clear(folder)
    folders.claim(config)
    if METHODS[config.experiment.method].init is not None:
        save_initial(model, folder / folders.INITIAL)

    clock = StepClock(on_step)
    trainer = make_trainer(config, task, model, optimizer, [clock])
    if on_step is not None:
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
    reset_peak_memory()
    set_seed(config.training.seed)  # dropout, from here on alike for all methods
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    result: dict[str, Any] = {
        "fingerprint": config.fingerprint(),
        "config": config.identity(),
        "method": config.experiment.method,
        "learning_rate": config.training.learning_rate,
        "seed": config.training.seed,
        "steps": trainer.state.global_step,
        "trainable_parameters": count_parameters(model)[0],
        "parameters": count_parameters(model)[1],
        "optimizer_state_bytes": tensor_bytes(trainer.optimizer.state),  # type: ignore[union-attr]
        "peak_memory_bytes": peak_memory(),
        "seconds_per_step": statistics.median(clock.seconds) if clock.seconds else None,
        "validation": _evaluate(trainer, task.validation, "eval"),
        "test": _evaluate(trainer, task.test, "test") if task.test else {},
    }
    samples = config.experiment.generation_samples
    result["test"].update(task.final_metrics(model, folder / folders.PREDICTIONS, samples))
    result["diverged"] = not math.isfinite(result["validation"]["loss"])
    folders.write_text(folder / folders.CURVE, _curve(trainer.state.log_history))
    result["saved"] = _save(config, model, task, folder)
    result["seconds"] = time.perf_counter() - started
    folders.write_json(folder / folders.RESULT, result)
    return result


def _base_moves(config: Config) -> bool:
    """Whether training changes base weights, which an adapter alone does not hold."""
    when = METHODS[config.experiment.method].changes_base
    return when == "always" or (when == "decay" and config.training.weight_decay > 0)


def _evaluate(trainer: Trainer, examples: Any, prefix: str) -> dict[str, float]:
    """Loss and metrics after the last step, taken from the log if they are there already."""
    history, step = trainer.state.log_history, trainer.state.global_step
    logged = (e for e in reversed(history) if f"{prefix}_loss" in e and e.get("step") == step)
    last = next(logged, None) or trainer.evaluate(examples, metric_key_prefix=prefix)
    dropped = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    names = {key: key.removeprefix(f"{prefix}_") for key in last if key.startswith(f"{prefix}_")}
    return {name: float(last[key]) for key, name in names.items() if name not in dropped}


def _curve(history: list[dict[str, Any]]) -> str:
    """Write Trainer's log as CSV, one line a step."""
    rows: dict[int, dict[str, Any]] = {}
    for entry in history:
        row = rows.setdefault(int(entry["step"]), {"step": int(entry["step"])})
        for key in ("loss", "learning_rate", "grad_norm", "eval_loss", "eval_accuracy"):
            if key in entry:
                row["train_loss" if key == "loss" else key] = entry[key]
    columns = ["step", "train_loss", "learning_rate", "grad_norm", "eval_loss", "eval_accuracy"]
    columns = [c for c in columns if any(c in row for row in rows.values())]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows[step] for step in sorted(rows))
    return text.getvalue()


def _save(config: Config, model: Any, task: Task, folder: Path) -> dict[str, str]:
    """Save what was trained; return names and paths relative to the folder."""
    if METHODS[config.experiment.method].adapter is None:
        if not config.experiment.save_full_model:
            return {}
        model.save_pretrained(folder / folders.MODEL)
        task.processor.save_pretrained(folder / folders.MODEL)
        return {"model": folders.MODEL}
    if METHODS[config.experiment.method].init is None or _base_moves(config):
        model.save_pretrained(folder / folders.ADAPTER)
    else:  # it did not start at B·A = 0: what it learnt, for the original base
        save_portable(model, folder / folders.ADAPTER)
    if not _base_moves(config):
        return {"adapter": folders.ADAPTER}
    merged = model.merge_and_unload()
    merged.save_pretrained(folder / folders.MERGED)
    task.processor.save_pretrained(folder / folders.MERGED)
    return {"adapter": folders.ADAPTER, "merged": folders.MERGED}
