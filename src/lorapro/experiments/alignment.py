"""What a run's ``diagnostics.jsonl`` says, by step and by layer: what ``lorapro inspect`` shows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorapro.diagnostics.following import FILE
from lorapro.diagnostics.records import PairRecord, read_records, summary
from lorapro.experiments import folders
from lorapro.experiments.errors import UserError

__all__ = ["read_alignment", "without_alignment"]


def read_alignment(target: Path) -> dict[str, list[dict[str, Any]]] | None:
    """Summaries of what was measured in a run.

    Args:
        target: the run's folder, or that of an adapter or a checkpoint in it.

    Returns:
        ``steps``: one mapping a measured step, ``step`` and the numbers of
        :func:`lorapro.diagnostics.summary` over all pairs; ``layers``: the same of each layer's
        pairs at the last step, by ``layer``. ``None`` where nothing was measured.

    Raises:
        UserError: a file that cannot be read.
    """
    from lorapro.experiments.report.diagnostic_figures import layer_and_module

    file = _beside(target, FILE)
    if file is None:
        return None
    try:
        records = read_records(file)
    except (OSError, TypeError, ValueError) as error:
        raise UserError(
            f"cannot read {file}: {error}; expected lorapro.diagnostics' lines"
        ) from error
    if not records:
        return None
    steps = dict.fromkeys(r.step for r in records)
    last = [r for r in records if r.step == records[-1].step]
    layers = sorted({layer_and_module(r.name)[0] for r in last})
    return {
        "steps": [{"step": s, **_short(r for r in records if r.step == s)} for s in steps],
        "layers": [
            {
                "layer": None if number < 0 else number,
                **_short(r for r in last if layer_and_module(r.name)[0] == number),
            }
            for number in layers
        ],
    }


def _short(records: Iterable[PairRecord]) -> dict[str, float]:
    return {name.removeprefix("alignment/"): value for name, value in summary(records).items()}


def _beside(target: Path, name: str) -> Path | None:
    """A file of a run, from the folder of the run or of one in it."""
    for folder in (target, target.resolve().parent):
        if (folder / name).is_file():
            return folder / name
    return None


def without_alignment(target: Path) -> bool:
    """Whether this is a run in which nothing was measured."""
    return _beside(target, folders.RUN) is not None and _beside(target, FILE) is None
