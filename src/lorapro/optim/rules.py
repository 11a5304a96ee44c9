"""Rules of full fine-tuning on the low-rank tangent space: from momentum to direction.

A rule is a function of the factors and of what stands for the gradients. It returns what full
fine-tuning would do, in terms of long rows that are there, and never forms an (m, n) matrix. A
third rule is one more function of this kind and the class that calls it.

Shape letters
    m, n  rows and columns of W;  r  rank;  k  pairs
    A, M_A  rows (k, r, n);  B, M_B  rows of the transpose (k, r, m)
"""

from __future__ import annotations

import torch
from torch import Tensor, baddbmm, bmm

from lorapro.functional import Point
from lorapro.gram import Rows, combine, inner, orthonormal, trace, unit

__all__ = ["factored_adam", "muon", "polar", "squared_means"]

Tangent = tuple[Rows, Rows]
"""The vector ``M = s·(B·M_A + M_B·A)``."""


def muon(
    at: Point, N: tuple[Rows | None, Rows | None], speed: Tensor
) -> tuple[tuple[Tensor, Rows] | None, tuple[Tensor, Rows] | None]:
    """Muon on each part of the step of W, ``s·B·d_A`` and ``s·d_B·A``, in the geometry of W.

    The steepest descent of spectral length ``speed`` along N for either part::

        d_A = speed/s·R_Bᵀ·polar(R_B·N_A)      R_Bᵀ·R_B = S_B⁻¹, damped
        d_B = speed/s·polar(N_B·R_Aᵀ)·R_A      R_Aᵀ·R_A = S_A⁻¹

    so that ``s·d_B·A`` moves W by ``speed`` in each of its r directions, and ``s·B·d_A`` by as
    much at most. It is the rule of LoRA-Muon (arXiv 2606.12921), with ``S_B`` damped.

    Args:
        at: the factors.
        N: what stands for grad_A and grad_B, rows; ``None`` where a factor is frozen.
        speed: the length of every direction, (k, 1, 1).

    Returns:
        d_A, and d_B as rows of its transpose, each as (k, r, r) matrices C and orthonormal rows X
        of which it is ``C·X``: as one matrix times N, float32 would lose both their conditions.
    """
    moved = [(X, inv) for X, inv in zip(N, (at.inv_B, at.inv_A), strict=True) if X is not None]
    S = at.total(inner(*((X, X) for X, _ in moved)))
    root = torch.cat([inv.E for _, inv in moved])
    V, L = orthonormal(S, trace(S), at.dtype)
    cores = bmm(root.mT, polar(bmm(root, L), at.dtype).to(S.dtype)).chunk(len(moved))
    terms = iter(
        (speed / at.s * core, combine((v, X)))
        for core, v, (X, _) in zip(cores, V.chunk(len(moved)), moved, strict=True)
    )
    return tuple(None if X is None else next(terms) for X in N)  # type: ignore[return-value]


def squared_means(at: Point, G: Tangent, m: Tensor, n: Tensor) -> tuple[Rows, Rows]:
    """Means of g̃∘g̃ over columns (k, m) and over rows (k, n) of ``g̃ = s·(B·G_A + G_B·A)``.

    ``g̃ = s·L·R``, so the squares of row i sum to ``s²·l·(R·Rᵀ)·lᵀ`` with l row i of L; likewise for
    columns. g̃ is not formed. m and n are those of the whole weight, (k, 1, 1).
    """
    right, left = _frame(at, G)
    rows, sizes = [*left, *right], [len(x) for x in (*left, *right)]
    grams = at.total(inner((left, left), (right, right)))
    # Rows in units of their lengths, squares in units of their sum: where B is tiny, G_A is huge,
    # and the squares of either are no float32. Powers of two, so that nothing is rounded by it.
    size = _root_by_two(grams.diagonal(dim1=-2, dim2=-1))[..., None]
    rows = list(torch._foreach_div(rows, list(size.to(at.dtype).split(sizes))))
    others = (at.s.square() / torch.stack([n, m])).flatten(0, 1) * grams.roll(len(at.s), 0)
    others = size * others * size.mT
    root = _root_by_two(trace(others))
    seen = torch._foreach_mul(list(combine((others / root.square(), rows))), rows)
    sums, roots = [x.sum(-2) for x in seen], list(root[..., 0].to(at.dtype).split(sizes))
    for _ in range(2):
        torch._foreach_mul_(sums, roots)
    torch._foreach_clamp_max_(sums, 0.99 * torch.finfo(at.dtype).max)  # bfloat16 holds it too
    return sums[: len(left)], sums[len(left) :]


def _root_by_two(x: Tensor) -> Tensor:
    """A power of two within a factor of two of √x; 1 where x is 0."""
    return (torch.frexp(x).exponent // 2).to(x.dtype).exp2()


def factored_adam(
    at: Point,
    M: Tangent,
    rows: Rows,
    columns: Rows,
    means: Tensor,
    scale: Tensor,
    eps: Tensor,
    entries: Tensor,
) -> tuple[Rows, Rows]:
    """AdamW with a second moment of row and column means: ``h = D_row·M̂·D_col``.

    ``v̂ ≈ rows·columns/means``, so ``D_row = 1/√(rows/means)`` and
    ``D_col = 1/(√(columns/means) + ε/√means)``, with ``1/√means`` left to ``scale``. An h of root
    mean square above 1 is shortened to that, as Adafactor does: where B has turned since, what the
    momentum of A says of W may be far too long.

    Args:
        at: the factors.
        M: the first moment.
        rows: second moments of the rows of W (k, m).
        columns: of its columns (k, n).
        means: of all rows, wherever they are held, (k, 1, 1).
        scale: (k, 1, 1), both bias corrections: ``√(1 − β2ᵗ)/(1 − β1ᵗ)``.
        eps: ``ε·√(1 − β2ᵗ)``, (k, 1, 1).
        entries: ``m·n`` of the whole weight, (k, 1, 1).

    Returns:
        ``(s·Bᵀh, s·h·Aᵀ)`` as rows.
    """
    right, left = _frame(at, M)
    sizes, means = [len(x) for x in right], unit(means)
    root_mean = means.rsqrt()
    units, floors = (x[..., 0].to(at.dtype).split(sizes) for x in (means, eps * root_mean))
    shares = torch._foreach_div([*rows, *columns], [*units, *units])
    # Where no more than rounding was seen, M holds no more either.
    roots = torch._foreach_sqrt(torch._foreach_clamp_min(shares, 16 * torch.finfo(at.dtype).eps))
    torch._foreach_add_(roots[len(left) :], floors)
    scaled = torch._foreach_div([*left, *right], [root[:, None] for root in roots])
    left, right = list(scaled[: len(left)]), list(scaled[len(left) :])
    size = at.s * scale * root_mean  # h = size·leftᵀ·right
    r = at.S_A.shape[-1]
    grams = [inner((left, left), (right, right)), inner((at.B, left), (at.A, right))]
    seen = at.total(torch.cat(grams, -2)).unflatten(0, (2, -1))
    square = size.square() * seen[:, :, : 2 * r].prod(0).sum((-2, -1), keepdim=True)
    size = at.s * size / (square / entries).clamp_min(1).sqrt()
    C = (seen[:, :, 2 * r :] * size).flatten(0, 1)
    # Where B is huge, its square is no float32, and M_A is tiny; likewise A.
    root = _root_by_two(torch.linalg.vector_norm(C, float("inf"), (-2, -1), keepdim=True))
    h = torch._foreach_mul(
        list(combine((C / root, [*right, *left]))), list(root.to(at.dtype).split([*sizes, *sizes]))
    )
    return h[: len(left)], h[len(left) :]


def _frame(at: Point, M: Tangent) -> tuple[list[Tensor], list[Tensor]]:
    """``R = [M_A; A]`` and ``Lᵀ``, ``L = [B, M_B]``: the vector is ``s·L·R``."""
    return _under(M[0], at.A), _under(at.B, M[1])


def _under(X: Rows, Y: Rows) -> list[Tensor]:
    """``[X; Y]``, stored as X is."""
    return [
        torch.cat([x.mT, y.mT], -1).mT if x.stride(-2) == 1 else torch.cat([x, y], -2)
        for x, y in zip(X, Y, strict=True)
    ]


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
