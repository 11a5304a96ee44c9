"""Factors of many pairs with their gradients, and what every formula needs of them.

Shape letters: k pairs; m, n rows and columns of W; r rank; kᵢ pairs of one shape (mᵢ, nᵢ).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, bmm

from lorapro.gram import Inverse, Rows, inner, inverse, inverses, trace

__all__ = ["Point", "point_at", "step_length"]

Total = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Point:
    """Factors of many pairs with their gradients, and what every formula needs of them.

    Attributes:
        A: rows (kᵢ, r, nᵢ), in float32 or float64.
        B: rows of ``Bᵀ``, (kᵢ, r, mᵢ).
        s: scalings (k, 1, 1) in float64.
        grad_A: as A; ``None`` where A is frozen.
        grad_B: as B; likewise.
        S_A: ``A·Aᵀ``, (k, r, r).
        S_B: ``Bᵀ·B``.
        K: ``grad_A·Aᵀ``; ``None`` where a factor is frozen.
        inv_A: inverse of ``S_A``.
        inv_B: inverse of ``S_B``.
        total: adds up Gram matrices over processes that hold parts of the rows.
    """

    A: Rows
    B: Rows
    s: Tensor
    grad_A: Rows | None
    grad_B: Rows | None
    S_A: Tensor
    S_B: Tensor
    K: Tensor | None
    inv_A: Inverse
    inv_B: Inverse
    total: Total

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the rows."""
        return self.A[0].dtype

    def damped(self, length: Tensor) -> Point:
        """The same with the inverse of ``S_B + (ℓ/s)² S_A⁻¹``, for lengths ℓ (k, 1, 1) in W."""
        return replace(self, inv_B=_damped(self.S_B, length / self.s, self.inv_A, self.dtype))

    def damped_within(self, reach: float | Tensor, grad_B: Rows) -> Point:
        """:meth:`damped` by ``reach`` times the length of a step of B alone along ``grad_B``."""
        return self.damped(reach * step_length(self, self.total(inner((grad_B, grad_B)))))

    def along(
        self,
        grad_A: Rows | None,
        grad_B: Rows | None,
        moves: tuple[bool, bool] = (True, True),
        reach: float | Tensor | None = None,
    ) -> Point:
        """The same with other gradients, and damped within a reach if there is one.

        Of a factor that does not move, the gradient is dropped, but that of B still says how long
        a step is. One call of ``total``.
        """
        grad_A, along_B = (grad_A if moves[0] else None), (grad_B if moves[1] else None)
        sets = [] if grad_A is None or along_B is None else [(grad_A, self.A)]
        if reach is not None and grad_B is not None:
            sets.append((grad_B, grad_B))
        grams = list(self.total(inner(*sets)).chunk(len(sets))) if sets else []
        at = self
        if reach is not None and grad_B is not None:
            at = self.damped(reach * step_length(self, grams.pop()))
        return replace(at, grad_A=grad_A, grad_B=along_B, K=grams[0] if grams else None)


def point_at(
    A: Rows,
    B: Rows,
    s: Tensor,
    grad_A: Rows | None = None,
    grad_B: Rows | None = None,
    total: Total = lambda gram: gram,
    length: Tensor | None = None,
) -> Point:
    """Gram matrices of factors and gradients, in one call of ``total``, and their inverses.

    With a length, that of S_B is damped, as by :meth:`Point.damped`.
    """
    if grad_A is None or grad_B is None:
        (S_A, S_B), K = total(inner((A, A), (B, B))).chunk(2), None
    else:
        S_A, K, S_B = total(inner((A, A, grad_A), (B, B))).chunk(3)
        K = K.mT
    dtype = A[0].dtype
    if length is None:
        inv_A, inv_B = inverses((S_A, S_B), dtype)
    else:
        inv_A = inverse(S_A, dtype)
        inv_B = _damped(S_B, length / s, inv_A, dtype)
    return Point(A, B, s, grad_A, grad_B, S_A, S_B, K, inv_A, inv_B, total)


def _damped(S_B: Tensor, length: Tensor, inv_A: Inverse, dtype: torch.dtype) -> Inverse:
    root = length * inv_A.E  # EᵀE has no negative eigenvalue; inv_A.full may have one by rounding
    return inverse(torch.baddbmm(S_B, root.mT, root), dtype)


def step_length(at: Point, gram_B: Tensor) -> Tensor:
    """How far a step of B alone moves W: a singular value of ``g·P_A``, (k, 1, 1).

    ``√(tr T²/tr T)`` with T the Gram matrix of ``g·P_A``: the singular values' mean, each weighed
    by its square; exact where all are equal and where there is one.

    Args:
        at: the factors.
        gram_B: ``grad_Bᵀ·grad_B``, (k, r, r).
    """
    T = bmm(gram_B, at.inv_A.full)
    size = trace(T).clamp_min(torch.finfo(T.dtype).tiny)
    return ((T * T.mT).sum((-2, -1), keepdim=True) / size).sqrt() / at.s
