"""What a comparison shows while it runs: one line a finished run, and a bar with the time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

__all__ = ["RunsProgress", "duration"]


def duration(seconds: float) -> str:
    """Write a duration for people.

    >>> duration(42), duration(200), duration(7260)
    ('42 s', '3 min 20 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class RunsProgress:
    """Progress over ``total`` runs of about equal length.

    On a terminal a live bar moves with every step; elsewhere (a log file, CI) only the lines are
    printed, each with the time left.
    """

    def __init__(self, total: int, console: Console) -> None:
        self._total, self._console = total, console
        self._done, self._part = 0, 0.0
        self._skipped = 0
        self._started = time.monotonic()
        self._bar: Progress | None = None
        self._task: Any = None

    @contextmanager
    def shown(self) -> Iterator[RunsProgress]:
        """Show the bar (if this is a terminal) during the block."""
        if not self._console.is_terminal:
            yield self
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        with Progress(
            *columns, TextColumn("{task.fields[left]}"), console=self._console, transient=True
        ) as self._bar:
            self._task = self._bar.add_task("", total=self._total, left="")
            yield self

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)
        self._console.file.flush()  # a redirected log shows the line now, not at the end

    def begin(self, name: str) -> None:
        """A run has begun."""
        self._part = 0.0
        if self._bar is not None:
            self._bar.update(self._task, description=f"[{self._done + 1}/{self._total}] {name}")

    def step(self, done: int, total: int) -> None:
        """A step of the present run is done."""
        self._part = done / max(total, 1)
        if self._bar is not None:
            self._bar.update(
                self._task, completed=self._done + self._part, left=self._left() or "estimating"
            )

    def skip(self, count: int) -> None:
        """So many runs were found finished."""
        self._skipped = count
        self._done += count
        if count:
            self.say(f"{count} of at most {self._total} runs were finished earlier")

    def finish(self, name: str, what: str) -> None:
        """The present run is done."""
        self._finish(f"{name}: {what}")

    def _finish(self, line: str) -> None:
        self._done, self._part = self._done + 1, 0.0
        left = self._left()
        tail = f"; {left}" if left and self._done < self._total else ""
        self.say(f"[{self._done}/{self._total}] {line}{tail}")
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, left=left)

    def _left(self) -> str:
        run = self._done - self._skipped + self._part
        if run < 0.05:
            return ""
        pace = (time.monotonic() - self._started) / run
        return f"about {duration(pace * (self._total - self._done - self._part))} left"
