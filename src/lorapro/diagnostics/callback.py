"""Alignment under Hugging Face ``Trainer``: measured, logged through ``report_to``, written."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from lorapro.diagnostics.following import FILE, Follower, check_every
from lorapro.diagnostics.records import summary

__all__ = ["AlignmentCallback"]


class AlignmentCallback(TrainerCallback):
    """Measure the alignment of a ``Trainer`` run (TRL's trainers too) every few steps.

    Each measured step adds one line a pair to ``diagnostics.jsonl`` in the output folder, and its
    :func:`lorapro.diagnostics.summary` to the next line that Trainer logs, under ``alignment/…``,
    for every tracker of ``report_to``. ``.grad`` is measured as the optimizer gets it, behind
    ``max_grad_norm``. On several processes ranks, conditions and ``‖g̃‖`` are measured, the
    distances are NaN.

    Args:
        every: measure step 1 and every ``every``-th.
        path: another file to write; default ``diagnostics.jsonl`` in ``args.output_dir``.
        adapter: pairs of this adapter only.
        layers: regular expression; only pairs whose name it finds something in.

    Raises:
        ValueError: a value out of its range; a model without such pairs, when training begins.

    >>> AlignmentCallback(every=0)
    Traceback (most recent call last):
        ...
    ValueError: every is 0, expected a number of steps from 1 up.
    """

    def __init__(
        self,
        every: int = 10,
        path: str | os.PathLike[str] | None = None,
        *,
        adapter: str | None = None,
        layers: str | None = None,
    ) -> None:
        check_every(every)
        self.every, self.path = every, path
        self._options = {"adapter": adapter, "layers": layers}
        self._follower: Follower | None = None
        self._pending: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to follow the model."""
        self.on_train_end(args, state, control)  # of a training that an error ended
        path = None
        if state.is_world_process_zero:
            path = Path(args.output_dir) / FILE if self.path is None else Path(self.path)
        self._follower = Follower(
            kwargs["model"],
            self.every,
            path,
            micro_batches=args.gradient_accumulation_steps,
            steps=state.global_step,
            listen=args.n_gpu <= 1,  # DataParallel's replicas run at the same time
            **self._options,
        )
        _come_first(self, sys._getframe(1).f_locals.get("self"))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen, if this step is to be measured."""
        if self._follower is not None:
            self._follower.steps = state.global_step
            self._follower.before_forward()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure."""
        if self._follower is not None:
            self._follower.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the step that was taken."""
        records = None if self._follower is None else self._follower.after_step()
        if records is not None:
            self._pending = summary(records)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the summary to what Trainer logs of training."""
        logs = kwargs.get("logs")
        if logs is not None and self._pending and "loss" in logs:
            logs.update(self._pending)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(self._pending)
            self._pending = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was."""
        if self._follower is not None:
            self._follower.stop()
            self._follower = None


def _come_first(callback: TrainerCallback, handler: Any) -> None:
    """Move a callback ahead of the trackers, which see the log's numbers in the list's order.

    Trainer puts those of ``report_to`` before the user's and hands no callback its handler.
    """
    if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
        # While the handler goes through the list: a new list, not a moved element.
        others = [c for c in handler.callbacks if c is not callback]
        handler.callbacks = [callback, *others]
