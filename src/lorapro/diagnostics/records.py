"""What is measured of one pair at one step, as a record, a line of JSON, and a summary."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

__all__ = ["PairRecord", "read_records", "summary", "to_line"]

NAN = float("nan")


@dataclass(frozen=True)
class PairRecord:
    """One pair ``W = W0 + s·B·A`` before one optimizer step; g is ``∂L/∂W``, norms are Frobenius.

    Everything is in units of the ``.grad`` that the optimizer sees: where gradients were clipped,
    so is g here. What could not be measured is NaN.

    Attributes:
        name: the pair's name, the path of its layer.
        step: number of the step that follows, counted from 1; ``None`` if it was not given.
        rank_A: numerical rank of A, as ``torch.linalg.matrix_rank`` counts it.
        rank_B: numerical rank of B; 0 at LoRA's start.
        condition_A: largest over smallest singular value of A; infinite at a deficient rank.
        condition_B: the same of B.
        gradient_norm: ``‖g‖``.
        lora_norm: ``‖g̃‖`` of LoRA's own gradients, ``g̃ = s·B·grad_A + s·grad_B·A``.
        lora_distance: ``‖g̃ − g‖`` of LoRA's own gradients, "before" in the paper's Figure 4.
        aligned_norm: ``‖g̃‖`` of the aligned gradients (Theorem 2.1).
        aligned_distance: ``‖g̃ − g‖`` of the aligned gradients, "after" in Figure 4.
        predicted_decrease: ``⟨grad_A, d_A⟩ + ⟨grad_B, d_B⟩``, Theorem 2.2: the decrease of the loss
            to first order for each unit of learning rate along (d_A, d_B).
        realised_decrease: ``−⟨grad_A, ΔA⟩ − ⟨grad_B, ΔB⟩`` of the step that was then taken: its
            decrease of the loss to first order. Under plain aligned SGD it is the learning rate
            times the predicted one. NaN until the step has been taken.
    """

    name: str
    step: int | None
    rank_A: int
    rank_B: int
    condition_A: float
    condition_B: float
    gradient_norm: float
    lora_norm: float
    lora_distance: float
    aligned_norm: float
    aligned_distance: float
    predicted_decrease: float
    realised_decrease: float = NAN


def to_line(record: PairRecord) -> str:
    """One line of JSON; what is not finite becomes null."""
    values = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(record).items()
    }
    return json.dumps(values)


def read_records(path: str | os.PathLike[str]) -> list[PairRecord]:
    """Read ``diagnostics.jsonl``, or the one in a folder.

    A step that stands there twice, because a run was interrupted and went on from a checkpoint
    before it, counts as it was measured last. A last line that was cut off is left out.

    Args:
        path: the file, or the folder of a run.

    Returns:
        Records in the order of their steps; null comes back as NaN.

    Raises:
        FileNotFoundError: no such file.
    """
    file = Path(path)
    file = file / "diagnostics.jsonl" if file.is_dir() else file
    known = {f.name for f in fields(PairRecord)}
    found: dict[tuple[int | None, str], PairRecord] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        values = {k: NAN if v is None and k != "step" else v for k, v in values.items()}
        record = PairRecord(**{k: v for k, v in values.items() if k in known})
        found[record.step, record.name] = record
    return sorted(found.values(), key=lambda r: -1 if r.step is None else r.step)


def summary(records: Iterable[PairRecord]) -> dict[str, float]:
    """The few numbers of a step that a dashboard shows.

    Over all pairs: smallest rank and largest finite condition of B; ``‖g‖`` of all pairs together;
    LoRA's and the aligned gradient's norm and distance as shares of it; sums of the decreases.

    >>> one = PairRecord("q", 1, 2, 2, 1.0, 3.0, 5.0, 8.0, 6.0, 4.0, 3.0, 16.0)
    >>> summary([one])["alignment/aligned_distance"]
    0.6
    """
    rows = list(records)
    total = _root([r.gradient_norm for r in rows])
    shares = {
        name: _root([getattr(r, name) for r in rows]) / total if total else NAN
        for name in ("lora_norm", "lora_distance", "aligned_norm", "aligned_distance")
    }
    conditions = [r.condition_B for r in rows if math.isfinite(r.condition_B)]
    values = {
        "rank_B": float(min((r.rank_B for r in rows), default=0)),
        "condition_B": max(conditions, default=NAN),
        "gradient_norm": total,
        **shares,
        "predicted_decrease": math.fsum(r.predicted_decrease for r in rows),
        "realised_decrease": math.fsum(r.realised_decrease for r in rows),
    }
    return {f"alignment/{k}": v for k, v in values.items() if math.isfinite(v)}


def _root(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(v * v for v in values))
