"""Measure every few steps of a training run: an ordinary loop's, or ``Trainer``'s."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lorapro.diagnostics.measuring import Snapshot
from lorapro.diagnostics.records import PairRecord, to_line
from lorapro.diagnostics.watching import Plan, Watch, unwrapped

__all__ = ["FILE", "Follower", "follow"]

FILE = "diagnostics.jsonl"


class Follower:
    """Three calls a step: before the forward pass, before ``optimizer.step()``, after it.

    Args:
        model: a PEFT model.
        every: measure step 1 and every ``every``-th.
        path: JSONL file that gets one line a pair; appended to.
        micro_batches: see :func:`lorapro.diagnostics.watch`.
        adapter: see :func:`lorapro.diagnostics.watch`.
        layers: see :func:`lorapro.diagnostics.watch`.
        steps: number of steps done already.
        listen: whether ``‖g‖`` is wanted; without it the distances are NaN.

    Attributes:
        records: of the step measured last.
        steps: number of steps done.

    Raises:
        ValueError: a value out of its range, or no such pair.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 10,
        path: str | os.PathLike[str] | None = None,
        *,
        micro_batches: int = 1,
        adapter: str | None = None,
        layers: str | None = None,
        steps: int = 0,
        listen: bool = True,
    ) -> None:
        check_every(every)
        self.model, self.every, self.steps = unwrapped(model), every, steps
        self.path = None if path is None else Path(path)
        self.records: list[PairRecord] = []
        self._plan = Plan(self.model, adapter, layers)
        self._chosen = (adapter, layers)
        self._options: dict[str, Any] = {"micro_batches": micro_batches, "listen": listen}
        self._watch: Watch | None = None
        self._snapshot: Snapshot | None = None

    def before_forward(self) -> None:
        """Listen, if the coming step is to be measured."""
        coming = self.steps + 1
        if self._watch is None and (coming == 1 or coming % self.every == 0):
            if not self._plan.holds():
                self._plan = Plan(self.model, *self._chosen)
            self._watch = Watch(self.model, self._plan, **self._options)

    def before_step(self) -> None:
        """Measure, if this step is to be."""
        if self._watch is not None:
            try:
                self._snapshot = Snapshot.take(self.model, self.steps + 1)
            finally:
                self.stop()

    def after_step(self) -> list[PairRecord] | None:
        """Count the step; the records if it was measured."""
        self.steps += 1
        snapshot, self._snapshot = self._snapshot, None
        if snapshot is None:
            return None
        self.records = snapshot.after_step()
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(to_line(r) + "\n" for r in self.records)
        return self.records

    def stop(self) -> None:
        """Stop listening."""
        if self._watch is not None:
            self._watch.remove()
            self._watch = None


def check_every(every: int) -> None:
    """Refuse what is no number of steps."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every is {every!r}, expected a number of steps from 1 up.")


@contextmanager
def follow(
    model: nn.Module,
    optimizer: Optimizer,
    every: int = 10,
    path: str | os.PathLike[str] | None = None,
    *,
    on_records: Callable[[list[PairRecord]], None] | None = None,
    **options: Any,
) -> Iterator[Follower]:
    """Measure the alignment every few steps of a loop; the loop itself stays as it is.

    Args:
        model: a PEFT model.
        optimizer: what steps it, any torch optimizer (accelerate's wrapper too).
        every: measure step 1 and every ``every``-th.
        path: JSONL file that gets one line a pair, ``diagnostics.jsonl`` for ``lorapro report``.
        on_records: called with the records of each measured step, after the step.
        options: ``micro_batches``, ``adapter``, ``layers``, ``steps`` (done already), see
            :class:`Follower`.

    Raises:
        ValueError: a value out of its range; in the loop, more backward passes a step than
            ``micro_batches``.

    >>> import torch
    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), LoraConfig(target_modules=["0"]))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    >>> with follow(model, optimizer, every=2) as following:
    ...     for _ in range(5):
    ...         optimizer.zero_grad()
    ...         model(torch.randn(8, 6)).square().mean().backward()
    ...         optimizer.step()
    >>> following.steps, following.records[0].step, following.records[0].rank_B
    (5, 4, 4)
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    follower = Follower(model, every, path, **options)

    def before(*_: Any) -> None:
        follower.before_step()

    def after(*_: Any) -> None:
        records = follower.after_step()
        if records is not None and on_records is not None:
            on_records(records)
        follower.before_forward()

    hooks = [inner.register_step_pre_hook(before), inner.register_step_post_hook(after)]
    # Ahead of hooks that change gradients, such as lorapro.align_gradients.
    inner._optimizer_step_pre_hooks.move_to_end(hooks[0].id, last=False)
    follower.before_forward()
    try:
        yield follower
    finally:
        follower.stop()
        for hook in hooks:
            hook.remove()
