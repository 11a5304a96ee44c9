"""A run's folder: what lies in it, whether it is this run, and atomic writes."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from lorapro.experiments.config import Config, build_config, read_yaml
from lorapro.experiments.errors import UserError

__all__ = [
    "ADAPTER",
    "CONFIG",
    "INITIAL",
    "MERGED",
    "MODEL",
    "PREDICTIONS",
    "RESULT",
    "claim",
    "clear",
    "last_checkpoint",
    "read_result",
    "run_state",
    "write_json",
    "write_text",
]

CONFIG, RESULT, CURVE, PREDICTIONS = "config.yaml", "result.json", "curve.csv", "predictions.jsonl"
ADAPTER, MODEL, MERGED = "adapter", "model", "merged"
INITIAL = "initial"  # LoRA-GA's first factors, which the checkpoints need beside them
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON completely or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def run_state(config: Config) -> str:
    """Return what the output folder holds: ``"new"``, ``"started"`` or ``"finished"``.

    Raises:
        UserError: the folder holds another run (and ``overwrite`` is not set), or files of others.
    """
    folder = config.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file, expected a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return "new"
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"output_dir {folder} holds files that are not a run's; choose an empty or new folder"
        )
    other = build_config(read_yaml(folder / CONFIG))
    if other.fingerprint() == config.fingerprint():
        return "finished" if (folder / RESULT).is_file() else "started"
    if config.experiment.overwrite:
        return "new"
    ours, theirs = config.identity(), other.identity()
    changed = sorted(k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k))
    listed = ", ".join(f"{k} {theirs.get(k, 'default')!s}" for k in changed[:4])
    raise UserError(
        f"output_dir {folder} holds another run ({listed}); choose another folder, or replace that "
        "run with --overwrite"
    )


def clear(folder: Path) -> None:
    """Remove what a run writes, and nothing else."""
    for name in (RESULT, CONFIG, CURVE, PREDICTIONS):
        (folder / name).unlink(missing_ok=True)
    clear_checkpoints(folder)
    for name in (ADAPTER, MODEL, MERGED):
        shutil.rmtree(folder / name, ignore_errors=True)


def clear_checkpoints(folder: Path) -> None:
    """Remove Trainer's checkpoints."""
    for path in folder.glob("checkpoint-*"):
        if _CHECKPOINT.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def claim(config: Config) -> Path:
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
    values = {k: v for k, v in config.given.items() if k != "overwrite"}
    text = yaml.safe_dump(values, sort_keys=True, allow_unicode=True)
    write_text(folder / CONFIG, f"# lorapro train {CONFIG}\n{text}")
    return folder


def last_checkpoint(folder: Path) -> Path | None:
    """Return the complete checkpoint with the most steps, if any."""
    steps = {
        int(match.group(1)): path
        for path in folder.glob("checkpoint-*")
        if (match := _CHECKPOINT.fullmatch(path.name))
        and (path / "trainer_state.json").is_file()
        and (path / "optimizer.pt").is_file()
    }
    return steps[max(steps)] if steps else None


def read_result(folder: Path) -> dict[str, Any]:
    """Read a finished run's result."""
    result: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return result
