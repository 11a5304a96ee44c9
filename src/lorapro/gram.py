"""Gram matrices of long factors, and the (r, r) algebra on them, for every pair at once.

Long sides are lists of rows, one tensor a shape: ``[(k₁, r, n₁), (k₂, r, n₂), …]``. Small matrices
are one tensor for all ``k = k₁ + k₂ + …`` pairs, (k, r, r) in float64, so that the number of
operations grows with the number of shapes, never with the number of pairs. Products with long sides
run in the precision of the rows.

No function here reads a value: a pair of zeros, of deficient rank or with NaN changes numbers of
its own, never what runs nor its neighbours.

Shape letters: k pairs; r rank; p, q rows of a long side; n its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, baddbmm, bmm

__all__ = [
    "Inverse",
    "Rows",
    "combine",
    "inner",
    "inverse",
    "inverses",
    "orthonormal",
    "polar",
    "solve_sylvester",
    "trace",
    "unit",
]

Rows = Sequence[Tensor]

# Squared singular values below FLOOR times their mean count as zero, for factors in float64 and in
# float32 or less. Rounding leaves a missing direction of the factors at 1e-14 (1e-30) of the
# largest, and of their Gram matrices in float64 at 1e-16, which the inverse must not bring back.
FLOOR = {torch.float64: 1e-9, torch.float32: 1e-8}
# The least that keeps the Cholesky factor of such a Gram matrix finite.
RIDGE = {torch.float64: 1e-13, torch.float32: 1e-9}
# Rows shorter than 1e-25, such as momentum after a thousand zero gradients, count as missing:
# what divides by them leaves float32.
NOTHING = 1e-50
# Doublings of Smith's series: the error is that of 2^DOUBLINGS of its terms.
DOUBLINGS = {torch.float64: 18, torch.float32: 7}
# Matrices above this size are inverted by halves: LAPACK goes through a batch one by one.
LARGEST_AT_ONCE = 32


def inner(*sets: Sequence[Rows]) -> Tensor:
    """``X·Yᵀ`` of every pair in float64: (k, p, q) from rows (kᵢ, p, nᵢ) and (kᵢ, q, nᵢ).

    Args:
        sets: ``(X, Y, Y', …)`` asks for ``X·Yᵀ``, ``X·Y'ᵀ``, …. All products lie one after the
            other in the first dimension, to be taken apart by ``chunk`` and summed over processes
            at once.

    >>> inner(([torch.ones(1, 1, 2)], [torch.full((1, 1, 2), 3.0)]))
    tensor([[[6.]]], dtype=torch.float64)
    """
    products: list[list[Tensor]] = []
    for X, *Ys in sets:
        own: list[list[Tensor]] = [[] for _ in Ys]
        for x, *ys in zip(X, *Ys, strict=True):
            exact = x.double()  # one part at a time: copies stay in the cache
            for y, of_Y in zip(ys, own, strict=True):
                of_Y.append(bmm(exact, (exact if y is x else y.double()).mT))
        products += own
    return torch.cat([product for of_Y in products for product in of_Y])


def combine(*terms: tuple[Tensor, Rows], onto: Rows | None = None) -> Rows:
    """``onto + Σ C·X`` for small matrices C (k, p, q) and rows X (kᵢ, q, nᵢ), as precise as rows.

    >>> combine((torch.full((1, 1, 1), 2.0), [torch.ones(1, 1, 2)]))[0]
    tensor([[[2., 2.]]])
    """
    total: list[Tensor | None] = [None] * len(terms[0][1]) if onto is None else list(onto)
    for i, (C, X) in enumerate(terms):
        parts = C.to(X[0].dtype).split([len(x) for x in X])
        total = [_product(c, x, t, own=i > 0) for c, x, t in zip(parts, X, total, strict=True)]
    return total  # type: ignore[return-value]


def _product(C: Tensor, X: Tensor, onto: Tensor | None, own: bool) -> Tensor:
    """``onto + C·X``. Rows of a transpose stay one, so that directions of B lie as B does."""
    if X.stride(-2) == 1:
        X, C = X.mT, C.mT
        return _sum(X, C, None if onto is None else onto.mT, own).mT
    return _sum(C, X, onto, own)


def _sum(X: Tensor, Y: Tensor, onto: Tensor | None, own: bool) -> Tensor:
    """``onto + X·Y``, in the memory of ``onto`` if that is our own."""
    if onto is None:
        return bmm(X, Y)
    return onto.baddbmm_(X, Y) if own else baddbmm(onto, X, Y)


def trace(S: Tensor) -> Tensor:
    """Trace of every matrix, (k, 1, 1).

    >>> trace(torch.eye(2)[None]).item()
    2.0
    """
    return S.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]


class Inverse(NamedTuple):
    """``S⁻¹ = Vᵀ·E`` in two factors of the size of ``S^(−1/2)`` each, and ``full``, their product.

    Applied one after the other, float32 products lose cond(S)^(1/2) of their precision; the inverse
    itself would lose cond(S).
    """

    V: Tensor
    E: Tensor
    full: Tensor

    def __call__(self, X: Rows, scale: Tensor, *more: tuple[Tensor, Rows]) -> Rows:
        """``scale·S⁻¹·X`` for rows X, and ``more`` terms; ``scale`` is (k, 1, 1)."""
        return combine(*more, (scale * self.V.mT, combine((self.E, X))))


def inverse(S: Tensor, dtype: torch.dtype) -> Inverse:
    """Inverse of symmetric matrices without negative eigenvalues, zero where they have no rank.

    With ``u = c/(λ + c)`` for an eigenvalue λ of ``S/mean(λ)`` and ``c = FLOOR``, λ becomes
    ``(1 − u)³(1 + 3u + 6u²)/λ``: 1/λ to within 10·(c/λ)³ above c, 10·λ²/c³ below, 0 at 0.
    ``S·S⁻¹`` has eigenvalues between 0 and 1: projectors made of it never lengthen anything.

    Args:
        S: (k, r, r) in float64.
        dtype: that of the factors S was made of, whose rounding says what counts as zero.

    Returns:
        :class:`Inverse` in float64.

    >>> S = torch.tensor([[[4.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    >>> inverse(S, torch.float64).full.diagonal(dim1=-2, dim2=-1).float()
    tensor([[0.2500, 1.0000],
            [0.5000, 0.0000]])
    """
    floor, mean = FLOOR[dtype], trace(S) / S.shape[-1]
    size = unit(mean)
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    V = _inverse_of_cholesky(torch.add(S / size, eye, alpha=floor), eye)
    U = floor * bmm(V, V.mT)
    square = bmm(U, U)
    E = bmm(baddbmm(eye + U, square, torch.add(eye, U, alpha=-9).add_(square, alpha=6)), V)
    root = size.rsqrt()
    V, E = root * V, (mean.sign() * root) * E
    return Inverse(V, E, bmm(V.mT, E))


def inverses(S: Sequence[Tensor], dtype: torch.dtype) -> list[Inverse]:
    """:func:`inverse` of several stacks, taken at once."""
    together = inverse(torch.cat(list(S)), dtype)
    return [Inverse(*of) for of in zip(*(T.chunk(len(S)) for T in together), strict=True)]


def orthonormal(S: Tensor, traces: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Coordinates in which rows X with ``X·Xᵀ = S`` are orthonormal.

    Args:
        S: (k, r, r) in float64.
        traces: what counts as nothing is judged against, (k, 1, 1): the trace of S, or of the
            matrix that S is left of.
        dtype: that of the rows.

    Returns:
        ``(V, L)``: ``V·X`` is orthonormal where S has rank and short where it has none, and
        ``X = L·(V·X)``.
    """
    size = unit(traces / S.shape[-1]).clamp_min(NOTHING)
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    S = torch.add(S / size, eye, alpha=RIDGE[dtype])
    V, root = _inverse_of_cholesky(S, eye), size.sqrt()
    return V / root, root * bmm(S, V.mT)


def unit(size: Tensor) -> Tensor:
    """A size to divide by: 1 where it is zero.

    >>> unit(torch.tensor([2.0, 0.0]))
    tensor([2., 1.])
    """
    return size + (size == 0)


def _inverse_of_cholesky(S: Tensor, eye: Tensor) -> Tensor:
    """``L⁻¹`` of ``S = L·Lᵀ``; NaN where there is none."""
    r = S.shape[-1]
    if r <= LARGEST_AT_ONCE:
        L, _ = torch.linalg.cholesky_ex(S)
        return torch.linalg.solve_triangular(L, eye[:r, :r].expand_as(S), upper=False)
    half = r // 2
    V_1 = _inverse_of_cholesky(S[:, :half, :half], eye)
    L_21 = bmm(S[:, half:, :half], V_1.mT)
    V_2 = _inverse_of_cholesky(baddbmm(S[:, half:, half:], L_21, L_21.mT, alpha=-1), eye)
    V = torch.zeros_like(S)
    V[:, :half, :half], V[:, half:, half:] = V_1, V_2
    V[:, half:, :half] = bmm(V_2, bmm(L_21, V_1)).neg_()
    return V


def solve_sylvester(P: Tensor, Q: Tensor, K: Tensor, inv_Q: Tensor, dtype: torch.dtype) -> Tensor:
    """Y with ``P·Y + Y·Q = K`` for symmetric P and Q without negative eigenvalues.

    With the Cayley transforms ``U = (P − q)(P + q)⁻¹``, ``V = (Q − q)(Q + q)⁻¹`` the equation is
    ``Y = U·Y·V + 2q(P + q)⁻¹K(Q + q)⁻¹``, whose series is summed by squaring (Smith, 1968): fixed
    steps, products only. Each step squares the contraction ``‖U‖·‖V‖ < 1``; with q the geometric
    middle of Q's eigenvalues (of their arithmetic and harmonic means), seven steps reach 1 % where
    Q's condition is below 2,000 and P's anything.

    Args:
        P: (k, r, r) in float64.
        Q: (k, r, r).
        K: (k, r, r).
        inv_Q: inverse of Q.
        dtype: that of the factors; the series is summed in it.

    Returns:
        (k, r, r) in float64.

    >>> one = torch.eye(2, dtype=torch.float64)[None]
    >>> solve_sylvester(2 * one, one, 6 * one, one, torch.float64)[0].float()
    tensor([[2., 0.],
            [0., 2.]])
    """
    k = len(P)
    q = unit((trace(Q) / trace(inv_Q)).nan_to_num(0.0).sqrt())
    eye = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
    both = torch.cat([P / q, Q / q])
    # Rounding may have left them eigenvalues of −1e-16 of their traces.
    half = _inverse_of_cholesky(both + (1 + 1e-15 * trace(both)) * eye, eye)
    middle = bmm(half.mT, half)  # (P/q + 1)⁻¹ and (Q/q + 1)⁻¹
    size = K.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(K.dtype).tiny)
    Y = bmm(bmm(middle[:k], K / size), middle[k:]).to(dtype)
    UV = torch.add(eye, middle, alpha=-2).to(dtype)
    for i in range(DOUBLINGS[dtype]):
        UV = bmm(UV, UV) if i else UV
        Y = baddbmm(Y, bmm(UV[:k], Y), UV[k:])
    return Y * (2 * size / q)


# Odd polynomials a·x + b·x³ + c·x⁵ applied to the singular values, from [0, 1] to 1. The first has
# the steepest start that stays bounded (Jordan et al., 2024); the second is Newton-Schulz of fifth
# order, which converges to 1 from wherever the first leaves them.
STEEP, SETTLE = (3.4445, -4.7750, 2.0315), (1.875, -1.25, 0.375)
SCHEDULE = {
    torch.float32: (STEEP,) * 5 + (SETTLE,) * 2,
    torch.float64: (STEEP,) * 10 + (SETTLE,) * 5,
}


def polar(X: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Polar factor ``U·Vᵀ`` of square matrices ``U Σ Vᵀ``, by Newton–Schulz steps.

    Singular values down to about 1e-3 (float32) or 1e-5 (float64) of ``‖X‖_F`` come to 1; smaller
    ones come out smaller than 1, and 0 stays 0.

    Args:
        X: (k, p, p), in float64 where its squares are no float32.
        dtype: that of the steps and of what is returned, float32 or float64.

    >>> polar(torch.tensor([[[3.0, 0.0], [0.0, -0.5]]])).round(decimals=2)
    tensor([[[ 1.,  0.],
             [ 0., -1.]]])
    """
    size = torch.linalg.matrix_norm(X, keepdim=True)
    X = (X / size.clamp_min(torch.finfo(X.dtype).tiny)).to(dtype)
    for a, b, c in SCHEDULE[dtype]:
        S = bmm(X, X.mT)
        X = baddbmm(X, baddbmm(S, S, S, beta=b, alpha=c), X, beta=a)
    return X
