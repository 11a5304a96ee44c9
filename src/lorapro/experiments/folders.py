"""A run's folder: what lies in it, whether it is this run, and atomic writes.

======================= ==========================================================================
file                    what it holds
======================= ==========================================================================
``config.yaml``         the keys that were given; ``lorapro train config.yaml`` runs it again
``run.json``            ``fingerprint``, ``identity`` (every key that makes the run this run),
                        ``started_in`` (the folder that relative paths of the config begin in)
``metrics.jsonl``       one object a logged step: ``step`` and some of ``train_loss``,
                        ``learning_rate``, ``grad_norm``, ``validation_loss``, further
                        ``validation_*`` metrics, whatever callbacks log
``items.npz``           one array a score, one element a test example, in the order of the test
                        set, the same for all methods and seeds: ``loss``, ``weight`` (labels in
                        it), and where they mean something ``correct``, ``prediction``, ``label``
``predictions.jsonl``   what was generated, one object a test row, with ``correct``
``samples.jsonl``       answers to a few test prompts, beside what the data says
``adapter``, ``model``, what was trained; ``merged`` where the base weights changed too
``merged``
``lorapro.json``        what the weights need to be used without config and data, see
                        :mod:`~lorapro.experiments.saved`; each folder of weights has one too
``checkpoint-N``        Trainer's checkpoints
``result.json``         written last, see below; a run without it is not finished
``error.txt``           traceback of a run that failed
======================= ==========================================================================

``result.json``::

    status                "finished", "diverged" or "failed"
    task, method          names in the catalogues
    model, data           asset, hub id or path
    rank, alpha           null where the method has none
    learning_rate, seed, batch_size (examples a step), steps, tokens or null
    metrics               {"validation": {"loss": ..., "accuracy": ...}, "test": {...}}, with
                          eval_on_start also "before", of the validation set before the first
                          step; null for a loss that is not finite
    metric                name of the task's main metric, higher is better; null if there is none
    cost                  seconds, seconds_per_step (median), peak_memory_bytes,
                          optimizer_state_bytes, trainable_parameters, parameters, device
    versions              python, torch, transformers, peft, lorapro
    git_revision          of the working copy that lorapro runs from; null elsewhere
    fingerprint, identity as in run.json: every key of the run that is no default
    saved                 {"adapter": "adapter", ...}
    error                 one line, of a failed run

A comparison's folder holds ``comparison.json`` (see :mod:`~lorapro.experiments.plan`) and its runs
under ``runs/``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorapro.checkpoints import last_complete, steps_of
from lorapro.experiments.config import RunConfig
from lorapro.experiments.errors import UserError

__all__ = [
    "ADAPTER",
    "CONFIG",
    "ERROR",
    "ITEMS",
    "MERGED",
    "METRICS",
    "MODEL",
    "PREDICTIONS",
    "RESULT",
    "RUN",
    "SAMPLES",
    "BusyError",
    "claim",
    "clear",
    "last_checkpoint",
    "locked",
    "read_result",
    "run_state",
    "unmade_by_bad_input",
    "write_json",
    "write_text",
]

CONFIG, RUN, RESULT, ERROR = "config.yaml", "run.json", "result.json", "error.txt"
METRICS, ITEMS, PREDICTIONS = "metrics.jsonl", "items.npz", "predictions.jsonl"
SAMPLES = "samples.jsonl"
ADAPTER, MODEL, MERGED = "adapter", "model", "merged"
LOCK = ".lock"


class BusyError(UserError):
    """Another process trains this run."""


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON completely or not at all; numbers that are not finite become ``null``."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, default=str)
    write_text(path, text + "\n")


def finite(value: Any) -> Any:
    """Replace what JSON cannot hold.

    >>> finite({"loss": float("nan"), "steps": [1, float("inf")]})
    {'loss': None, 'steps': [1, None]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def run_state(config: RunConfig) -> str:
    """Return what the output folder holds: ``"new"``, ``"started"`` or ``"finished"``.

    A failed run counts as started: it is tried again.

    Raises:
        UserError: the folder holds another run (and ``overwrite`` is not set), or files of others.
    """
    folder = config.folder
    try:
        exists = folder.exists()
    except OSError as error:  # a name that is too long
        raise UserError(f"output_dir {str(folder)[:80]}...: {error.strerror}") from error
    if exists and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file, expected a folder")
    if not folder.is_dir() or not any(p.name != LOCK for p in folder.iterdir()):
        return "new"
    held = _read(folder / RUN)
    if held is None:
        if all(p.name.startswith((CONFIG, RUN, LOCK)) for p in folder.iterdir()):
            return "new"  # killed while it was being claimed
        raise UserError(
            f"output_dir {folder} holds files that are not a run's; choose an empty or new folder"
        )
    if held["fingerprint"] == config.fingerprint():
        result = _read(folder / RESULT)
        return "started" if result is None or result.get("status") == "failed" else "finished"
    if config.run.overwrite:
        return "new"
    ours, theirs = finite(config.identity()), held["identity"]
    changed = sorted(k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k))
    listed = ", ".join(f"{k} {theirs.get(k, 'default')!s}" for k in changed[:4])
    raise UserError(
        f"output_dir {folder} holds another run ({listed}); choose another folder, or replace that "
        "run with --overwrite"
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return found


def clear(folder: Path) -> None:
    """Remove what a run writes, and nothing else."""
    (folder / RESULT).unlink(missing_ok=True)
    clear_checkpoints(folder)
    for name in (ADAPTER, MODEL, MERGED):
        shutil.rmtree(folder / name, ignore_errors=True)
    # The folder's name tag goes last: killed on the way, it is still this run's.
    made = (METRICS, ITEMS, PREDICTIONS, SAMPLES, "diagnostics.jsonl", "lorapro.json", ERROR)
    for name in (*made, CONFIG, RUN):
        (folder / name).unlink(missing_ok=True)


def clear_checkpoints(folder: Path) -> None:
    """Remove Trainer's checkpoints."""
    for path in folder.glob("checkpoint-*"):
        if steps_of(path) is not None:
            shutil.rmtree(path, ignore_errors=True)


def claim(config: RunConfig) -> Path:
    """Make the output folder this run's: write its config there. Returns the folder.

    Raises:
        UserError: the folder cannot be made.
    """
    import yaml

    folder = config.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
    named = {"task": config.entry.name, "method": config.method.name}
    given = {k: v for k, v in config.given.items() if k != "overwrite" and v is not None}
    text = yaml.safe_dump({**named, **given}, sort_keys=True, allow_unicode=True)
    write_text(folder / CONFIG, f"# lorapro train {CONFIG}\n{text}")
    identity = {"fingerprint": config.fingerprint(), "identity": config.identity()}
    # Relative paths of the config are meant from here.
    write_json(folder / RUN, {**identity, "started_in": str(Path.cwd())})
    return folder


@contextlib.contextmanager
def unmade_by_bad_input(folder: Path) -> Iterator[None]:
    """Leave no trace of a run that bad input ends, if there was none before."""
    there = {path for path in (folder, *folder.parents) if path.exists()}
    try:
        yield
    except BusyError:  # somebody else's
        raise
    except UserError:
        if folder not in there and folder.is_dir():
            clear(folder)
            (folder / LOCK).unlink(missing_ok=True)
            for path in (folder, *folder.parents):
                if path in there or any(path.iterdir()):
                    break
                path.rmdir()
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder against other processes; a killed process holds nothing.

    Raises:
        BusyError: another process trains this run now.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / LOCK).open("w")
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BusyError(f"another process is training the run in {folder}") from None
        yield


def last_checkpoint(folder: Path, more: Sequence[str] = ()) -> Path | None:
    """Return the complete checkpoint with the most steps, if any; ``more`` files belong to it."""
    return last_complete(folder, ("optimizer.pt", *more))


def read_result(folder: Path) -> dict[str, Any]:
    """Read a finished run's result."""
    result: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return result
