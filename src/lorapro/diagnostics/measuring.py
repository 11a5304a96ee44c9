"""Every number of :class:`PairRecord` but ``‖g‖``, from the factors and their gradients.

For any directions (d_A, d_B) with equivalent gradient ``g̃ = s·B·d_A + s·d_B·A``::

    ‖g̃‖²   = s² [⟨S_B, d_A d_Aᵀ⟩ + ⟨S_A, d_Bᵀ d_B⟩ + 2⟨Bᵀd_B, d_A Aᵀ⟩]
    ⟨g̃, g⟩ = ⟨grad_A, d_A⟩ + ⟨grad_B, d_B⟩
    ‖g̃ − g‖² = ‖g̃‖² − 2⟨g̃, g⟩ + ‖g‖²

LoRA's own are (grad_A, grad_B), where ``⟨g̃, g⟩ = ‖grad_A‖² + ‖grad_B‖²``; the aligned ones come
from ``lorapro.functional.align``, where ``⟨g̃, g⟩ = ‖g̃‖²``. Pairs of one shape are one batch, in
float64.

Shapes: A (p, k, r, n), B (p, k, m, r) for p pairs of k blocks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lorapro.choices import check_choice
from lorapro.diagnostics.records import PairRecord
from lorapro.diagnostics.watching import Watch, chosen_pairs, unwrapped, watch_of
from lorapro.factors import LoraPair
from lorapro.functional import X_CHOICES, align

__all__ = ["Snapshot", "measure"]

logger = logging.getLogger(__name__)


def measure(
    model: nn.Module,
    *,
    step: int | None = None,
    x: str = "sylvester",
    adapter: str | None = None,
    layers: str | None = None,
) -> list[PairRecord]:
    """Measure the alignment after ``backward()`` and before ``optimizer.step()``.

    Ranks, conditions, both ``‖g̃‖`` and the predicted decrease come from the factors and their
    gradients. ``‖g‖`` and with it both distances need to have been listened for: call it inside
    :func:`lorapro.diagnostics.watch`. Without that they are NaN, except where the base weight
    itself has a gradient, whose norm is then taken.

    Args:
        model: a PEFT model whose pairs have gradients.
        step: number of the step, for the records.
        x: how the aligned step is shared between A and B; no measured number depends on it but for
            rounding.
        adapter: pairs of this adapter only; ``None``: what is watched, or all.
        layers: regular expression for names of pairs; ``None``: what is watched, or all.

    Returns:
        One record a pair, in the order of the model.

    Raises:
        ValueError: no pair, no gradient at all, sharded factors, or more backward passes than the
            watch was told of.
    """
    return _measured(model, step, x, adapter, layers)[1]


class Snapshot:
    """What was measured before a step, and the factors to see by what the step decreased."""

    def __init__(self, pairs: Sequence[LoraPair], records: list[PairRecord]) -> None:
        self.pairs, self.records = pairs, records
        self._before = [[_copy(t) for t in (p.A, p.B, p.A.grad, p.B.grad)] for p in pairs]

    @classmethod
    def take(cls, model: nn.Module, step: int | None, x: str = "sylvester") -> Snapshot:
        """See :func:`measure`."""
        return cls(*_measured(model, step, x, None, None))

    @torch.no_grad()
    def after_step(self) -> list[PairRecord]:
        """The records with ``realised_decrease``, once the optimizer has stepped."""
        decreases = []
        for pair, (A, B, grad_A, grad_B) in zip(self.pairs, self._before, strict=True):
            total = torch.zeros((), dtype=torch.float64, device=pair.A.device)
            for now, before, grad in ((pair.A, A, grad_A), (pair.B, B, grad_B)):
                if grad is not None and before is not None:
                    total -= ((now.detach().double() - before.double()) * grad.double()).sum()
            decreases.append(total)
        return [
            replace(record, realised_decrease=value)
            for record, value in zip(self.records, torch.stack(decreases).tolist(), strict=True)
        ]


def _measured(
    model: nn.Module, step: int | None, x: str, adapter: str | None, layers: str | None
) -> tuple[Sequence[LoraPair], list[PairRecord]]:
    check_choice("x", x, X_CHOICES)
    watching = watch_of(model)
    if watching is not None and adapter is None and layers is None:
        pairs = watching.pairs
    else:
        pairs = chosen_pairs(unwrapped(model), adapter, layers)
    _check(pairs)
    values = _values(pairs, watching, x)
    records = [_record(p, step, v) for p, v in zip(pairs, values, strict=True)]
    unknown = [r.name for r in records if math.isnan(r.gradient_norm)]
    if watching is not None and unknown:
        _say_unknown(unknown, len(records))
    return pairs, records


def _copy(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().clone()


def _check(pairs: Sequence[LoraPair]) -> None:
    for p in pairs:
        if hasattr(p.A, "device_mesh") or p.A.numel() == 0:
            raise ValueError(f"{p.name}: sharded factors cannot be measured.")
    if all(p.A.grad is None and p.B.grad is None for p in pairs):
        raise ValueError(
            "no pair has a gradient; call measure after loss.backward() and before "
            "optimizer.step() and zero_grad()."
        )


_told: set[int] = set()


def _say_unknown(names: Sequence[str], of: int) -> None:
    """Once for each kind of gap: why a norm is missing."""
    if len(names) in _told:
        return
    _told.add(len(names))
    logger.warning(
        "the norm of g is not known for %d of %d pairs (%s, ...): their distances are NaN. It is "
        "taken in one process, of layers that were called, uncompiled, while they were watched.",
        len(names),
        of,
        names[0],
    )


@torch.no_grad()
def _values(pairs: Sequence[LoraPair], watching: Watch | None, x: str) -> list[list[float]]:
    """The numbers of every pair, one list a pair, read from the device once."""
    batches: dict[Any, list[int]] = {}
    for i, p in enumerate(pairs):
        given = (p.A.grad is not None, p.B.grad is not None)
        key = (p.layout, p.blocks, p.A.shape, p.B.shape, p.A.dtype, p.B.dtype, p.A.device, given)
        batches.setdefault(key, []).append(i)
    rows: list[list[float]] = [[] for _ in pairs]
    for members in batches.values():
        chosen = [pairs[i] for i in members]
        norms = [_gradient_norm(p, watching) for p in chosen]
        numbers = _batch(chosen, torch.stack(norms), x)
        for i, row in zip(members, numbers.tolist(), strict=True):
            rows[i] = row
    return rows


def _gradient_norm(pair: LoraPair, watching: Watch | None) -> Tensor:
    norm = None if watching is None else watching.gradient_norm(pair)
    if norm is None and pair.base is not None and pair.base.grad is not None:
        norm = pair.base.grad.detach().norm(dtype=torch.float64)
    if norm is None:
        return torch.full((), torch.nan, dtype=torch.float64, device=pair.A.device)
    return norm.to(pair.A.device)


def _batch(pairs: Sequence[LoraPair], g: Tensor, x: str) -> Tensor:
    """(p, 9) numbers of pairs of one shape, in the order of :func:`_record`."""
    stacked = [[p.matrices(*_with(p, t)) for p in pairs] for t in ("factors", "gradients")]
    (A, B), (grad_A, grad_B) = (
        (torch.stack([a for a, _ in s]).double(), torch.stack([b for _, b in s]).double())
        for s in stacked
    )
    s = torch.tensor([p.scaling for p in pairs], dtype=torch.float64, device=A.device)[:, None]
    has_A, has_B = pairs[0].A.grad is not None, pairs[0].B.grad is not None
    d_A, d_B = align(A, B, grad_A if has_A else None, grad_B if has_B else None, s, x=x)
    d_A = torch.zeros_like(A) if d_A is None else d_A
    d_B = torch.zeros_like(B) if d_B is None else d_B
    rank_A, condition_A = _spectrum(A, pairs[0].A.dtype)
    rank_B, condition_B = _spectrum(B.mT, pairs[0].B.dtype)
    columns = [rank_A, rank_B, condition_A, condition_B, g]
    for e_A, e_B in ((grad_A, grad_B), (d_A, d_B)):
        square = (s.square() * _equivalent_square(A, B, e_A, e_B)).sum(-1)
        inner = ((grad_A * e_A).sum((-3, -2, -1))) + ((grad_B * e_B).sum((-3, -2, -1)))
        distance = (square - 2 * inner + g.square()).clamp_min(0.0).sqrt()
        columns += [square.clamp_min(0.0).sqrt(), distance]
    return torch.stack([*columns, inner], dim=-1)


def _with(pair: LoraPair, what: str) -> tuple[Tensor, Tensor]:
    A, B = pair.A.detach(), pair.B.detach()
    if what == "factors":
        return A, B
    return (
        torch.zeros_like(A) if pair.A.grad is None else pair.A.grad,
        torch.zeros_like(B) if pair.B.grad is None else pair.B.grad,
    )


def _equivalent_square(A: Tensor, B: Tensor, d_A: Tensor, d_B: Tensor) -> Tensor:
    """``‖B·d_A + d_B·A‖²``, (...)."""
    left = ((B.mT @ B) * (d_A @ d_A.mT)).sum((-2, -1))
    right = ((A @ A.mT) * (d_B.mT @ d_B)).sum((-2, -1))
    return left + right + 2 * ((B.mT @ d_B) * (d_A @ A.mT)).sum((-2, -1))


def _spectrum(M: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numerical rank and condition of (p, k, r, n); of several blocks the worst."""
    work = torch.promote_types(dtype, torch.float32)
    if work == torch.float64 or M.shape[-2] > M.shape[-1]:
        sigma = torch.linalg.svdvals(M)
    else:  # the squares of a float32 factor fit into float64
        sigma = torch.linalg.eigvalsh(M @ M.mT).flip(-1).clamp_min(0.0).sqrt()
    largest = sigma[..., :1]
    floor = largest * max(M.shape[-2:]) * torch.finfo(work).eps
    kept = sigma > floor
    full = kept.all(-1)
    condition = torch.where(full, largest[..., 0] / sigma[..., -1], torch.inf)
    return kept.sum(-1).amin(-1).double(), condition.amax(-1)


def _record(pair: LoraPair, step: int | None, v: Sequence[float]) -> PairRecord:
    return PairRecord(pair.name, step, int(v[0]), int(v[1]), *v[2:])
