"""Every number of :class:`PairRecord` but ``‖g‖``, from Gram matrices of factors and gradients.

For any directions (d_A, d_B) with equivalent gradient ``g̃ = s·B·d_A + s·d_B·A``::

    ‖g̃‖²   = s² [⟨S_B, d_A d_Aᵀ⟩ + ⟨S_A, d_Bᵀ d_B⟩ + 2⟨Bᵀd_B, d_A Aᵀ⟩]
    ⟨g̃, g⟩ = ⟨grad_A, d_A⟩ + ⟨grad_B, d_B⟩
    ‖g̃ − g‖² = ‖g̃‖² − 2⟨g̃, g⟩ + ‖g‖²

LoRA's own are (grad_A, grad_B). The aligned ones are those of ``lorapro.functional.align`` with
``X = 0``, since no X changes g̃: ``d_A = s⁻² S_B⁻¹ grad_A``, ``d_B = s⁻² (grad_B − B·Y)·S_A⁻¹``
with ``Y = S_B⁻¹·grad_A·Aᵀ``. They are never formed: their Gram matrices follow from those of the
factors and their gradients. Pairs of one shape are one batch.

Shapes: p pairs of k blocks; A (p, k, r, n), B (p, k, m, r), Gram matrices (p·k, r, r) in float64.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, bmm, nn

from lorapro.diagnostics.records import PairRecord
from lorapro.diagnostics.watching import Watch, chosen_pairs, unwrapped, watch_of
from lorapro.factors import LoraPair
from lorapro.gram import inner, inverses

__all__ = ["Snapshot", "measure"]

logger = logging.getLogger(__name__)


def measure(
    model: nn.Module,
    *,
    step: int | None = None,
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
        adapter: pairs of this adapter only; ``None``: what is watched, or all.
        layers: regular expression for names of pairs; ``None``: what is watched, or all.

    Returns:
        One record a pair, in the order of the model.

    Raises:
        ValueError: no pair, no gradient at all, sharded factors, or more backward passes than the
            watch was told of.
    """
    return _measured(model, step, adapter, layers)[1]


@dataclass(frozen=True)
class Batch:
    """Pairs of one shape at one moment: copies, in float32 at least; ``None`` without gradient."""

    members: list[int]
    pairs: list[LoraPair]
    A: Tensor
    B: Tensor
    grad_A: Tensor | None
    grad_B: Tensor | None

    @classmethod
    def of(cls, members: list[int], pairs: list[LoraPair]) -> Batch:
        """Read the pairs."""
        A, B = _stacked(pairs)
        has_A, has_B = (t.grad is not None for t in (pairs[0].A, pairs[0].B))
        grad_A, grad_B = _stacked(pairs, gradients=True)
        return cls(members, pairs, A, B, grad_A if has_A else None, grad_B if has_B else None)

    def decrease(self) -> Tensor:
        """``−⟨grad_A, ΔA⟩ − ⟨grad_B, ΔB⟩`` since then, (p,)."""
        A, B = _stacked(self.pairs)
        total = torch.zeros(len(self.pairs), dtype=torch.float64, device=A.device)
        for now, before, grad in ((A, self.A, self.grad_A), (B, self.B, self.grad_B)):
            if grad is not None:
                total -= now.sub_(before).mul_(grad).sum((-3, -2, -1), dtype=torch.float64)
        return total


def _stacked(pairs: Sequence[LoraPair], gradients: bool = False) -> tuple[Tensor, Tensor]:
    seen = []
    for p in pairs:
        A, B = p.A.detach(), p.B.detach()
        if gradients:
            A, B = (t if g is None else g for t, g in ((A, p.A.grad), (B, p.B.grad)))
        seen.append(p.matrices(A, B))
    A, B = (torch.stack(of) for of in zip(*seen, strict=True))
    return _at_least_float32(A), _at_least_float32(B)


def _at_least_float32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


class Snapshot:
    """What was measured before a step, and the factors to see by what the step decreased."""

    def __init__(self, batches: Sequence[Batch], records: list[PairRecord]) -> None:
        self.records = records
        self._batches = batches

    @classmethod
    def take(cls, model: nn.Module, step: int | None) -> Snapshot:
        """See :func:`measure`."""
        return cls(*_measured(model, step, None, None))

    @torch.no_grad()
    def after_step(self) -> list[PairRecord]:
        """The records with ``realised_decrease``, once the optimizer has stepped."""
        records = list(self.records)
        for batch in self._batches:
            for i, value in zip(batch.members, batch.decrease().tolist(), strict=True):
                records[i] = replace(records[i], realised_decrease=value)
        return records


def _measured(
    model: nn.Module, step: int | None, adapter: str | None, layers: str | None
) -> tuple[list[Batch], list[PairRecord]]:
    watching = watch_of(model)
    if watching is not None and adapter is None and layers is None:
        pairs = watching.pairs
    else:
        pairs = chosen_pairs(unwrapped(model), adapter, layers)
    _check(pairs)
    batches, values = _values(pairs, watching)
    records = [_record(p, step, v) for p, v in zip(pairs, values, strict=True)]
    unknown = [r.name for r in records if math.isnan(r.gradient_norm)]
    if watching is not None and unknown:
        _say_unknown(unknown, len(records))
    return batches, records


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
def _values(
    pairs: Sequence[LoraPair], watching: Watch | None
) -> tuple[list[Batch], list[list[float]]]:
    """The numbers of every pair, one list a pair, read from the device once a shape."""
    alike: dict[Any, list[int]] = {}
    for i, p in enumerate(pairs):
        given = (p.A.grad is not None, p.B.grad is not None)
        key = (p.layout, p.blocks, p.A.shape, p.B.shape, p.A.dtype, p.B.dtype, p.A.device, given)
        alike.setdefault(key, []).append(i)
    rows: list[list[float]] = [[] for _ in pairs]
    batches = [Batch.of(members, [pairs[i] for i in members]) for members in alike.values()]
    for batch in batches:
        g = torch.stack([_gradient_norm(p, watching) for p in batch.pairs]).double()
        for i, row in zip(batch.members, _numbers(batch, g).tolist(), strict=True):
            rows[i] = row
    return batches, rows


def _gradient_norm(pair: LoraPair, watching: Watch | None) -> Tensor:
    norm = None if watching is None else watching.gradient_norm(pair)
    if norm is None and pair.base is not None and pair.base.grad is not None:
        norm = pair.base.grad.detach().norm(dtype=torch.float64)
    if norm is None:
        return torch.full((), torch.nan, dtype=torch.float64, device=pair.A.device)
    return norm.to(pair.A.device)


def _numbers(of: Batch, g: Tensor) -> Tensor:
    """(p, 10) numbers of pairs of one shape, in the order of :func:`_record`."""
    A, B = [of.A.flatten(0, 1)], [of.B.mT.flatten(0, 1)]
    S_A, S_B = inner((A, A), (B, B)).chunk(2)
    nothing = torch.zeros_like(S_A)
    G_A = K_A = G_B = K_B = nothing
    if of.grad_A is not None:
        grad_A = [of.grad_A.flatten(0, 1)]
        G_A, K_A = inner((grad_A, grad_A, A)).chunk(2)
    if of.grad_B is not None:
        grad_B = [of.grad_B.mT.flatten(0, 1)]
        G_B, K_B = inner((grad_B, grad_B, B)).chunk(2)
        K_B = K_B.mT
    p, k = of.A.shape[:2]
    s = torch.tensor([q.scaling for q in of.pairs], dtype=torch.float64, device=g.device)
    squares = s.square().repeat_interleave(k)[:, None, None]

    def norm_and_inner(*grams: Tensor) -> tuple[Tensor, Tensor]:
        """``‖g̃‖²`` and ``⟨g̃, g⟩`` from d_A·d_Aᵀ, d_Bᵀ·d_B, Bᵀ·d_B, d_A·Aᵀ and the last two."""
        of_A, of_B, across_B, across_A, along_A, along_B = grams
        square = squares * (S_B * of_A + S_A * of_B + 2 * across_B * across_A)
        total = torch.stack([square, along_A + along_B]).sum((-2, -1))
        square, along = total.reshape(2, p, k).sum(-1)
        return square, along

    eye = torch.eye(S_A.shape[-1], dtype=S_A.dtype, device=S_A.device)
    lora = norm_and_inner(G_A, G_B, K_B, K_A, eye * G_A, eye * G_B)

    inv_A, inv_B = (i.full / squares for i in inverses((S_A, S_B), of.A.dtype))
    # Without one of the gradients the other direction alone solves the problem: Y = 0.
    both = of.grad_A is not None and of.grad_B is not None
    Y = squares * bmm(inv_B, K_A) if both else nothing
    YK = bmm(Y.mT, K_B)
    left = G_B - YK - YK.mT + bmm(Y.mT, bmm(S_B, Y))  # of grad_B − B·Y
    aligned = norm_and_inner(
        bmm(inv_B, bmm(G_A, inv_B)),
        bmm(inv_A, bmm(left, inv_A)),
        bmm(K_B - bmm(S_B, Y), inv_A),
        bmm(inv_B, K_A),
        inv_B * G_A,
        inv_A * (G_B - YK),
    )
    (rank_A, condition_A), (rank_B, condition_B) = (
        _spectrum(X, S, t.dtype, k)
        for X, S, t in ((A[0], S_A, of.pairs[0].A), (B[0], S_B, of.pairs[0].B))
    )
    columns = [rank_A, rank_B, condition_A, condition_B, g]
    for square, along in (lora, aligned):
        distance = (square - 2 * along + g.square()).clamp_min(0.0).sqrt()
        columns += [square.clamp_min(0.0).sqrt(), distance]
    return torch.stack([*columns, aligned[1]], dim=-1)


def _spectrum(X: Tensor, S: Tensor, dtype: torch.dtype, k: int) -> tuple[Tensor, Tensor]:
    """Numerical rank and condition of rows (p·k, r, n) with Gram matrix S; the worst of k."""
    work = torch.promote_types(dtype, torch.float32)
    if work == torch.float64 or X.shape[-2] > X.shape[-1]:
        sigma = torch.linalg.svdvals(X)
    else:  # the squares of a float32 factor fit into float64
        sigma = torch.linalg.eigvalsh(S).flip(-1).clamp_min(0.0).sqrt()
    largest = sigma[..., :1]
    floor = largest * max(X.shape[-2:]) * torch.finfo(work).eps
    kept = sigma > floor
    condition = torch.where(kept.all(-1), largest[..., 0] / sigma[..., -1], torch.inf)
    return kept.sum(-1).reshape(-1, k).amin(-1).double(), condition.reshape(-1, k).amax(-1)


def _record(pair: LoraPair, step: int | None, v: Sequence[float]) -> PairRecord:
    return PairRecord(pair.name, step, int(v[0]), int(v[1]), *v[2:])
