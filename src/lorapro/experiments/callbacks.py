"""What watches a run: the clock, the log of metrics, the look-out for divergence."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lorapro.experiments.folders import METRICS, finite, write_text

__all__ = ["DivergenceWatch", "MetricsLog", "NothingLeft", "StepClock", "metric_rows"]


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


class NothingLeft(Exception):
    """The checkpoint that training was to go on from is that of the last step.

    Trainer would take one step more. It has loaded weights, optimizer and state when this is raised
    and has nothing else to do.
    """


class DivergenceWatch(TrainerCallback):
    """Stop a run whose loss is not finite, or far above where it started.

    "Far above" is ``factor`` times the first logged training loss plus one, in the mean of the
    last three logged losses; a factor of 0 leaves such a run alone.
    """

    def __init__(self, factor: float) -> None:
        self.diverged = False
        self._factor = factor

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at a checkpoint's past: it may have ended, well or not.

        Raises:
            NothingLeft: it has.
        """
        self._look(state.log_history)
        if state.global_step and (self.diverged or state.global_step >= state.max_steps):
            raise NothingLeft

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the losses logged so far."""
        self._look(state.log_history)
        if self.diverged:
            control.should_training_stop = True

    def _look(self, history: list[dict[str, Any]]) -> None:
        seen = [float(e[name]) for e in history for name in ("loss", "eval_loss") if name in e]
        self.diverged |= not all(map(math.isfinite, seen))
        losses = [float(entry["loss"]) for entry in history if "loss" in entry]
        if self._factor and len(losses) > 3:
            recent = sum(losses[-3:]) / 3
            self.diverged |= not recent <= self._factor * losses[0] + 1


class MetricsLog(TrainerCallback):
    """Keep ``metrics.jsonl`` up to date: one line a step that something was logged at."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / METRICS

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the whole history: it is short, and a resumed run has forgotten nothing of it."""
        if not state.is_world_process_zero:
            return
        rows = metric_rows(state.log_history)
        write_text(self._file, "".join(json.dumps(finite(row)) + "\n" for row in rows))


def metric_rows(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turn Trainer's log into one row a step.

    >>> metric_rows([{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 3.0, "epoch": 0.5}])
    [{'step': 1, 'train_loss': 2.0, 'validation_loss': 3.0}]
    """
    rows: dict[int, dict[str, Any]] = {}
    for entry in history:
        step = int(entry["step"])
        for key, value in entry.items():
            if key in ("step", "epoch", "total_flos") or key.startswith("train_"):
                continue
            name = "train_loss" if key == "loss" else key.replace("eval_", "validation_", 1)
            rows.setdefault(step, {"step": step})[name] = value
    return [rows[step] for step in sorted(rows)]
