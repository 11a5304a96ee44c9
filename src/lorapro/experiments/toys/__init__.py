"""Toy size: the very same recipe on tiny random models and written files, offline, in a minute.

A task names a toy model and a toy data writer (``TaskEntry.toy``):

* a *data writer* in :data:`~.data.DATA` gets an empty folder, writes files there in the schema of
  the real data set, and returns (what the config's ``data`` is then set to, texts for the
  tokenizer);
* a *model writer* in :data:`~.models.MODELS` gets an empty folder and those texts, and saves a tiny
  random model with its tokenizer or processor there.

:func:`toy_values` makes both, once, in the cache folder, and gives the keys that they replace;
:data:`CUTS` are the keys that every toy run is cut down to.
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorapro.cache import cache_folder
from lorapro.experiments.errors import UserError
from lorapro.experiments.tasks import TASKS

__all__ = ["CUTS", "cut", "toy_values"]

# Every toy run: at most so much. Keys that a recipe does not give are set as well.
CUTS: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "train_samples": 64,
    "validation_samples": 8,
    "test_samples": 16,
}
# Only where the recipe gives them, or the task does.
_AT_MOST = {
    "max_length": 64,
    "max_source_length": 48,
    "max_target_length": 16,
    "max_new_tokens": 8,
    "diagnostics_every": 1,
    "generation_samples": 4,
    "generation_batch_size": 4,
    "max_train_tokens": 1024,
    "batch_tokens": 256,
    "rank": 4,
    "adalora_init_rank": 6,
    "lora_ga_batches": 2,
    "warmup_steps": 1,
    "save_steps": 2,
}
_SET = {
    "eval_steps": 2,
    "logging_steps": 1,
    "dtype": "float32",
    "bf16": False,
    "fp16": False,
    "tf32": None,
    "gradient_checkpointing": False,
    "torch_compile": False,
    "dataloader_num_workers": 0,
    "report_to": "none",
    "deepspeed": None,
    "fsdp": None,
    "fsdp_config": None,
    "diagnostics_layers": None,
    "use_cpu": True,
}


def cut(values: Mapping[str, Any]) -> dict[str, Any]:
    """Cut the values of a run down to toy size.

    >>> cut({"rank": 128, "max_steps": 3125, "alpha": 16})["rank"]
    4
    """
    small = dict(values)
    small.pop("num_train_epochs", None)
    for key, most in _AT_MOST.items():
        if isinstance(small.get(key), int | float):
            small[key] = min(small[key], most)
    for key, most in CUTS.items():
        if key == "max_steps" and small.get("max_train_tokens"):
            continue
        given = small.get(key)
        small[key] = min(given, most) if isinstance(given, int) and given > 0 else most
    if small.get("max_train_tokens"):
        small.pop("max_steps", None)
    if small.get("batch_tokens"):
        small.pop("gradient_accumulation_steps", None)
    for key, value in _SET.items():
        if value is None:
            small.pop(key, None)
        else:
            small[key] = value
    return small


def toy_values(task: str) -> dict[str, Any]:
    """Return ``model`` and ``data`` of a task at toy size, made if they are not there yet.

    Raises:
        UserError: the task has no toy.
    """
    entry = TASKS[task]
    if entry.toy is None:
        raise UserError(f"task {task!r} has no toy size (TaskEntry.toy)")
    model, data = entry.toy
    made = json.loads(_make(model, data).read_text(encoding="utf-8"))
    return {"model": made["model"], "data": made["data"]}


def _make(model: str, data: str) -> Path:
    from lorapro.experiments.toys.data import DATA
    from lorapro.experiments.toys.models import MODELS
    from lorapro.experiments.toys.papers import PAPER_DATA

    final = cache_folder() / "toys" / f"{model}-{data}-{_version()}"
    listing = final / "toy.json"
    if not listing.is_file():
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{model}-{data}-") as scratch:
            work = Path(scratch) / "toy"
            for part in ("model", "data"):
                (work / part).mkdir(parents=True)
            opened, texts = {**DATA, **PAPER_DATA}[data](work / "data")
            MODELS[model](work / "model", texts)
            paths = {"model": final / "model", "data": final / opened.relative_to(work)}
            text = json.dumps({name: str(path) for name, path in paths.items()})
            (work / "toy.json").write_text(text, encoding="utf-8")
            try:
                work.rename(final)
            except OSError:
                if not listing.is_file():  # else: another process has just made the same
                    raise
    return listing


@functools.cache
def _version() -> str:
    """Hash of the code that makes toys: changed code makes them anew."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]
