"""The Trainer callback that aligns gradients before the optimizer that Trainer made itself."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from lorapro.optim.hook import align_gradients

__all__ = ["AlignBeforeSteps"]


class AlignBeforeSteps(TrainerCallback):
    """Call :func:`lorapro.align_gradients` when training begins.

    ``lorapro.use_lorapro`` adds it to a trainer under DeepSpeed.

    Args:
        options: arguments of ``align_gradients``.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self._handle: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Register on the optimizer as Trainer prepared it."""
        self._handle = align_gradients(kwargs["optimizer"], kwargs["model"], **self.options)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the optimizer as it was."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
