"""Trainer's checkpoints after a kill or a full disk: which is complete, and which to go on from.

Trainer writes the files of a checkpoint one after the other in place, ``trainer_state.json`` last.
A process that dies on the way leaves a folder that looks like a checkpoint, and
``resume_from_checkpoint=True`` takes it. :class:`CompleteCheckpoints` makes it take the last
complete one; :func:`last_complete` names it.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorapro.checkpoint_callback import CompleteCheckpoints as CompleteCheckpoints

__all__ = ["CompleteCheckpoints", "is_complete", "last_complete", "set_aside", "steps_of"]

logger = logging.getLogger(__name__)

LAST_WRITTEN = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def steps_of(checkpoint: Path) -> int | None:
    """N of a folder ``checkpoint-N``; ``None`` for any other name."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match.group(1)) if match else None


def last_complete(folder: str | Path, needed: Sequence[str] = ()) -> Path | None:
    """The complete checkpoint with the most steps, to go on from.

    ::

        trainer.train(resume_from_checkpoint=lorapro.checkpoints.last_complete(args.output_dir))

    Args:
        folder: the ``output_dir`` of Trainer.
        needed: files without which a checkpoint is of no use here.

    Returns:
        The folder ``checkpoint-N``; ``None`` if there is no complete one, or no such folder.

    >>> last_complete("nowhere") is None
    True
    """
    found = [(n, path) for path in Path(folder).glob("*") if (n := steps_of(path)) is not None]
    for _, path in sorted(found, reverse=True):
        if is_complete(path) and all((path / name).is_file() for name in needed):
            return path
    return None


def is_complete(checkpoint: Path) -> bool:
    """Whether Trainer came to the end of writing a checkpoint, and every file in it is whole.

    Files are judged by their own ends: a tensor file says how long it is, a file of ``torch.save``
    has its index last, JSON closes its brackets. Nothing is unpickled.
    """
    if not (checkpoint / LAST_WRITTEN).is_file():
        return False
    return all(_is_whole(path) for path in checkpoint.rglob("*") if path.is_file())


def _is_whole(path: Path) -> bool:
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix in (".pt", ".pth", ".bin"):
            return zipfile.is_zipfile(path)
        elif path.suffix == ".safetensors":
            with path.open("rb") as stream:
                head = int.from_bytes(stream.read(8), "little")
                entries = json.loads(stream.read(head))
            ends = [v["data_offsets"][1] for k, v in entries.items() if k != "__metadata__"]
            return path.stat().st_size == 8 + head + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError):
        return False
    return True


def set_aside(folder: Path, after: int | None = None) -> list[Path]:
    """Rename checkpoints so that Trainer does not see them.

    Args:
        folder: the ``output_dir`` of Trainer.
        after: take those with more steps, to ``replaced-checkpoint-N``; ``None`` takes those that
            are not complete, to ``incomplete-checkpoint-N``.

    Returns:
        Where they are now.
    """
    moved = []
    for path in sorted(folder.glob("*")):
        steps = steps_of(path)
        if steps is None or (is_complete(path) if after is None else steps <= after):
            continue
        kind = "incomplete" if after is None else "replaced"
        target = path.with_name(f"{kind}-{path.name}")
        shutil.rmtree(target, ignore_errors=True)
        path.rename(target)
        logger.warning("%s is %s: renamed to %s", path, kind, target.name)
        moved.append(target)
    return moved


def __getattr__(name: str) -> Any:
    if name == "CompleteCheckpoints":  # needs transformers, the others do not
        from lorapro.checkpoint_callback import CompleteCheckpoints

        return CompleteCheckpoints
    raise AttributeError(f"module 'lorapro.checkpoints' has no attribute {name!r}")
