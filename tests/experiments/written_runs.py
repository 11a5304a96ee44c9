"""Folders of runs as the runner leaves them, with numbers of the test's choice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_run(
    root: Path,
    label: str,
    rate: float,
    seed: int,
    *,
    task: str = "tweets",
    method: str | None = None,
    axes: Mapping[str, Any] | None = None,
    validation: float | None = 0.5,
    test: float | None = 0.5,
    accuracy: float | None = None,
    status: str = "finished",
    curve: Mapping[int, float] | None = None,
    items: Mapping[str, Any] | None = None,
    records: list[dict[str, Any]] | None = None,
    **cost: float,
) -> Path:
    """Write one run below ``root/runs``; return its folder."""
    folder = root / "runs" / task / label
    if axes:
        folder /= ",".join(f"{key}={value}" for key, value in axes.items())
    folder = folder / f"lr-{rate:g}" / f"seed-{seed}"
    folder.mkdir(parents=True)
    identity = {
        "task": task,
        "method": method or label,
        "learning_rate": rate,
        "seed": seed,
        "max_steps": 20,
        **(axes or {}),
    }
    (folder / "run.json").write_text(json.dumps({"fingerprint": "f", "identity": identity}))
    if status == "unfinished":
        return folder
    good = status == "finished"
    tested = {"loss": test} if test is not None else {}
    if accuracy is not None:
        tested["accuracy"] = accuracy
    result = {
        "status": status,
        "task": task,
        "method": method or label,
        "model": "minilm-l6",
        "data": "tweets",
        "rank": None if label == "full" else 8,
        "learning_rate": rate,
        "seed": seed,
        "steps": 20,
        "metric": None if accuracy is None else "accuracy",
        "metrics": {
            "validation": {"loss": validation if good else None},
            "test": tested if good else {},
        },
        "cost": {
            "seconds": 40.0,
            "seconds_per_step": 0.5,
            "peak_memory_bytes": 2**30,
            "optimizer_state_bytes": 2**20,
            "trainable_parameters": 300_000,
            **cost,
        },
        "versions": {"torch": "2.13.0"},
        "git_revision": "0123456789abcdef",
        "fingerprint": "f",
        "identity": identity,
        "saved": {},
    }
    (folder / "result.json").write_text(json.dumps(result))
    curve = curve or {step: 2.0 / (1 + step) + (test or 0.5) for step in (5, 10, 15, 20)}
    lines = [{"step": s, "train_loss": v + 0.1, "validation_loss": v} for s, v in curve.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if items is not None:
        np.savez(folder / "items.npz", **items)
    if records is not None:
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "diagnostics.jsonl").write_text(text)
    return folder


def write_plan(root: Path, labels: list[str], **about: Any) -> None:
    """Write ``comparison.json`` with one cell a label, in that order."""
    cells = [
        {
            "task": "tweets",
            "label": label,
            "method": label,
            "metric": None,
            "axes": {},
            "learning_rates": [],
            "folder": f"runs/tweets/{label}",
        }
        for label in labels
    ]
    root.mkdir(parents=True, exist_ok=True)
    (root / "comparison.json").write_text(json.dumps({"cells": cells, **about}))


def pair_records(names: list[str], steps: range) -> list[dict[str, Any]]:
    """Records of diagnostics whose distances and ranks follow simple rules."""
    return [
        {
            "name": name,
            "step": step,
            "rank_A": 8,
            "rank_B": min(step, 8),
            "condition_A": 2.0,
            "condition_B": None,
            "gradient_norm": 3.0,
            "lora_norm": 1.0,
            "lora_distance": 2.0 + 1.0 / step,
            "aligned_norm": 2.0,
            "aligned_distance": 1.0 + 1.0 / step,
            "predicted_decrease": 1.0,
            "realised_decrease": None,
        }
        for step in steps
        for name in names
    ]
