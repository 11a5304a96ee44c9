"""Alignment of many pairs for the price of a few batched products.

:func:`lorapro.functional.align` is exact for factors of any condition, and pays for it with
float64 and eigenvectors. Factors in training are well conditioned, so here the Gram matrices are
float32, the inverses come from Cholesky, and X from a few conjugate-gradient steps. g̃ does not
depend on X, so an inexact X costs no accuracy of the equivalent gradient. Pairs whose condition is
too high for that, or whose factors have no full rank (``B = 0`` at the start), take the exact path.

Shape letters: m, n rows and columns of W; r rank; k pairs stacked by shape; s scaling.
``S_A = A·Aᵀ``, ``S_B = Bᵀ·B``, ``K = grad_A·Aᵀ``; Y solves ``S_B·Y + Y·S_A = K``, ``X = −S_B⁻¹·Y``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorapro.functional import align
from lorapro.optim.small import inverse, solve_sylvester
from lorapro.optim.tall import gram, product

__all__ = ["Grams", "align_batched", "coefficients", "invert"]

# cond(S) up to which g̃ is within 1e-3 of the exact one: cond(B) up to 170 in float32. In float64,
# cond(B) up to 1e5, beyond which factors in float32 are hardly of full rank.
MOST_CONDITION = {torch.float32: 3e4, torch.float64: 1e10}
# X is −S_B⁻¹·residual·S_A⁻¹ off: one of the two must be close to a multiple of the identity, as
# LoRA's A·Aᵀ is. Bound on the smaller ‖S‖·‖S⁻¹‖/r (1 for the identity).
MOST_SMALLER_CONDITION = 8.0


def align_batched(
    stacks: list[tuple[Tensor, Tensor, Tensor]],
    scalings: list[float | Tensor],
    x: str,
) -> list[tuple[Tensor, Tensor]]:
    """Align stacks of one rank, on the CPU, in float32.

    Args:
        stacks: (both_A, B, grad_B) with both_A (k, 2r, n) holding grad_A over A, B and grad_B
            (k, m, r); k, m and n may differ from stack to stack.
        scalings: ``s`` of each stack, a float or (k,).
        x: the choice of X.

    Returns:
        (d_A, d_B) of each stack. g̃ is that of :func:`lorapro.functional.align` to 1e-3; with
        ``x="sylvester"`` (d_A, d_B) themselves to 1e-2.

    >>> A, B = torch.eye(2, 3)[None], torch.eye(4, 2)[None]
    >>> [(d_A, d_B)] = align_batched([(torch.cat([A, A], 1), B, B)], [1.0], "zero")
    >>> torch.allclose(d_A, align(A, B, A, B, 1.0, x="zero")[0])
    True
    """
    out, sure = _align([tuple(t.float() for t in stack) for stack in stacks], scalings, x)
    if not sure.all():
        _mend(out, stacks, scalings, x, sure)
    return out


def _align(
    stacks: list[Any], scalings: list[float | Tensor], x: str
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """(d_A, d_B) of each stack in the dtype of the stacks, and which of all pairs are sure."""
    r = stacks[0][1].shape[-1]
    KS = torch.cat([Z[:, r:] @ Z.mT for Z, _, _ in stacks])  # (k, r, 2r): Kᵀ beside S_A
    S_B = torch.cat([gram(B, B) for _, B, _ in stacks])
    grams = invert(KS[..., r:].contiguous(), S_B, x)
    P, X, R, C = coefficients(grams, KS[..., :r].mT, x)
    PX = P if X is None else torch.cat([P, X], -1)
    out = []
    first = 0
    for (Z, B, g_B), s in zip(stacks, scalings, strict=True):
        part = slice(first, first + len(Z))
        first += len(Z)
        c = s**-2 if isinstance(s, float) else s.to(Z.dtype)[:, None, None] ** -2
        d_A = (c * PX[part]) @ (Z[:, :r] if X is None else Z)
        d_B = product(B, -c * C[part], product(g_B, c * R[part]))
        out.append((d_A, d_B))
    return out, grams.sure


def _mend(
    out: list[tuple[Tensor, Tensor]],
    stacks: list[tuple[Tensor, Tensor, Tensor]],
    scalings: list[float | Tensor],
    x: str,
    sure: Tensor,
) -> None:
    """Put the pairs that are not sure right in ``out``: in float64, and exactly where need be."""
    parts = sure.split([len(B) for _, B, _ in stacks])
    for (d_A, d_B), stack, s, good in zip(out, stacks, scalings, parts, strict=True):
        rows = (~good).nonzero().flatten()
        if not len(rows):
            continue
        Z, B, g_B = (t[rows].double() for t in stack)
        s_rows = s if isinstance(s, float) else s[rows]
        [(right_A, right_B)], fine = _align([(Z, B, g_B)], [s_rows], x)
        if not fine.all():
            r = B.shape[-1]
            bad = ~fine
            given = stack[0][rows[bad]], stack[1][rows[bad]], stack[2][rows[bad]]
            s_bad = s if isinstance(s, float) else s[rows[bad]]
            exact = align(given[0][:, r:], given[1], given[0][:, :r], given[2], s_bad, x=x)
            right_A[bad], right_B[bad] = (t.double() for t in exact)  # type: ignore[union-attr]
        d_A[rows], d_B[rows] = right_A.to(d_A.dtype), right_B.to(d_B.dtype)


class Grams(NamedTuple):
    """Gram matrices (k, r, r), their inverses, and which pairs can do with float32 (k,)."""

    S_A: Tensor
    S_B: Tensor
    inv_A: Tensor
    inv_B: Tensor
    sure: Tensor
    swap: Tensor  # (k,) B is nearer to an orthonormal matrix than A


def invert(S_A: Tensor, S_B: Tensor, x: str) -> Grams:
    """Invert both Gram matrices; ``sure`` where that, and X as asked for, is accurate enough."""
    both, condition = inverse(torch.cat([S_A, S_B]))
    cond_A, cond_B = condition.chunk(2)
    sure = torch.maximum(cond_A, cond_B) < MOST_CONDITION[S_A.dtype]
    if x == "sylvester":
        sure &= torch.minimum(cond_A, cond_B) <= MOST_SMALLER_CONDITION * S_A.shape[-1]
    inv_A, inv_B = both.chunk(2)
    return Grams(S_A, S_B, inv_A, inv_B, sure, cond_B < cond_A)


def coefficients(grams: Grams, K: Tensor, x: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(P, X, R, C) of ``d_A = P·grad_A + X·A`` and ``d_B = grad_B·R − B·C``, times s².

    X is ``None`` for ``"zero"``. All are (k, r, r); what is not ``sure`` is not meaningful.
    """
    S_A, S_B, inv_A, inv_B, sure, swap = grams
    if x == "zero":
        return inv_B, None, inv_A, inv_B @ K @ inv_A
    if x == "symmetric":
        half = 0.5 * (inv_B @ K @ inv_A)
        return inv_B, -half, inv_A, half
    # The side nearer to a multiple of the identity is the one to precondition with.
    if swap.any():
        turn = swap[:, None, None]
        first, second = torch.where(turn, S_A, S_B), torch.where(turn, S_B, S_A)
        Y = solve_sylvester(first, second, torch.where(turn, K.mT, K), wanted=sure)
        Y = torch.where(turn, Y.mT, Y)
    else:
        Y = solve_sylvester(S_B, S_A, K, wanted=sure)
    # Not X = −S_B⁻¹Y: only with the residual in it is C − X = S_B⁻¹·K·S_A⁻¹ for an inexact Y.
    minus_X = inv_B @ torch.baddbmm(K, S_B, Y, alpha=-1) @ inv_A
    return inv_B, -minus_X, inv_A, Y @ inv_A
