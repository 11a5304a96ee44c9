"""Rules of full fine-tuning on the low-rank tangent space: from momentum to direction.

A rule is a function of the factors and of what stands for the gradients. It returns what full
fine-tuning would do, in terms of long rows that are there, and never forms an (m, n) matrix.

Shape letters: m, n rows and columns of W; r rank; k pairs; A, M_A rows (k, r, n); B, M_B rows of
the transpose (k, r, m).
"""

from __future__ import annotations

import torch
from torch import Tensor, bmm

from lorapro.gram import Rows, combine, inner, orthonormal, polar, trace, unit
from lorapro.point import Point

__all__ = ["factored_adam", "muon", "squared_means"]

Tangent = tuple[Rows, Rows]
"""The vector ``M = s·(B·M_A + M_B·A)``."""


def muon(
    at: Point, N: tuple[Rows | None, Rows | None], speed: Tensor
) -> tuple[tuple[Tensor, Rows] | None, tuple[Tensor, Rows] | None]:
    """Muon on each part of the step of W: steepest descent of spectral length ``speed`` along N.

    See ``LoraProMuon``. ``s·d_B·A`` moves W by ``speed`` in each of its r directions, ``s·B·d_A``
    by as much, or less where ``S_B`` is damped.

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


def squared_means(at: Point, m: Tensor, n: Tensor) -> tuple[Rows, Rows]:
    """Means of g̃∘g̃ over columns (k, m) and over rows (k, n), of the projection g̃ of g.

    ``g̃ = g·P_A + P_B·g·(I − P_A)``, of which every row of the one part is orthogonal to the other;
    with ``Q = grad_A·grad_Aᵀ − K·S_A⁻¹·Kᵀ`` and a row b of B with the row c of grad_B ::

        s²·(squares of that row of g̃) = c·S_A⁻¹·cᵀ + b·S_B⁻¹·Q·S_B⁻¹·bᵀ

    Likewise columns, with A for B. g̃ is not formed. m and n are those of the whole weight,
    (k, 1, 1).
    """
    entries = m, n
    sides = ((at.A, at.grad_A, at.inv_A), (at.B, at.grad_B, at.inv_B))
    moving = [i for i in range(2) if sides[i][1] is not None]
    grams = at.total(inner(*((G, G, X) for X, G, _ in sides if G is not None))).split(len(at.s))
    Q: list[Tensor | None] = [None, None]
    total = torch.zeros_like(at.s)
    # K by either's own gradient: rounded as in bfloat16, the other's would take Q below zero.
    for i, of, K in zip(moving, grams[::2], grams[1::2], strict=True):
        total = torch.maximum(total, trace(bmm(sides[1 - i][2].full, of)))
        Q[i] = of if at.K is None else of - bmm(bmm(K, sides[i][2].full), K.mT)
    root = _root_by_two(total)  # squares in units of their sum: of large ones float32 has none
    means: list[Tensor] = []
    for i, (X, G, inv) in enumerate(sides):
        seen, other, of = [], sides[1 - i][2], Q[1 - i]
        if G is not None:
            Y = combine((other.E / (root * entries[i].sqrt()), G))
            seen.append(torch._foreach_mul(list(Y), list(Y)))
        if of is not None:
            E, Y = inv.E / root, combine((inv.V, X))
            C = bmm(bmm(E, of), E.mT) / entries[i]
            seen.append(torch._foreach_mul(list(combine((C, Y))), list(Y)))
        means += [torch.stack(x).sum((0, -2)) for x in zip(*seen, strict=True)]
    roots = list((root / at.s)[..., 0].to(at.dtype).split([len(x) for x in at.A]))
    for _ in range(2):
        torch._foreach_mul_(means, roots + roots)
    torch._foreach_clamp_min_(means, 0.0)
    torch._foreach_clamp_max_(means, 0.99 * torch.finfo(at.dtype).max)  # bfloat16 holds it too
    return means[len(at.A) :], means[: len(at.A)]


def _root_by_two(x: Tensor) -> Tensor:
    """A power of two within a factor of two of √x; 1 where x is 0."""
    return (torch.frexp(x).exponent // 2).to(x.dtype).exp2()


def factored_adam(
    at: Point, M: Tangent, rows: Rows, columns: Rows, means: Tensor, scale: Tensor, eps: Tensor
) -> Tangent:
    """AdamW with a second moment of row and column means: ``h = D_row·M̂·D_col``.

    ``v̂ ≈ rows·columns/means``, so ``D_row = 1/√(rows/means)`` and
    ``D_col = 1/(√(columns/means) + ε/√means)``, with ``1/√means`` left to ``scale``.

    Args:
        at: the factors.
        M: the first moment.
        rows: second moments of the rows of W (k, m).
        columns: of its columns (k, n).
        means: of all rows, wherever they are held, (k, 1, 1).
        scale: (k, 1, 1), both bias corrections: ``√(1 − β2ᵗ)/(1 − β1ᵗ)``.
        eps: ``ε·√(1 − β2ᵗ)``, (k, 1, 1).

    Returns:
        ``(s·Bᵀh, s·h·Aᵀ)`` as rows.
    """
    means = unit(means)
    root_mean, sizes = means.rsqrt(), [len(x) for x in at.A]
    units, floors = (x[..., 0].to(at.dtype).split(sizes) for x in (means, eps * root_mean))
    shares = torch._foreach_div([*rows, *columns], [*units, *units])
    # Where no more than rounding was seen, M holds no more either.
    roots = torch._foreach_sqrt(torch._foreach_clamp_min(shares, 16 * torch.finfo(at.dtype).eps))
    torch._foreach_add_(roots[len(sizes) :], floors)
    D = [root[:, None] for root in roots]
    factors, moments = (torch._foreach_div([*X[0], *X[1]], D) for X in ((at.B, at.A), (M[1], M[0])))
    B, A, M_B, M_A = (X[i : i + len(sizes)] for X in (factors, moments) for i in (0, len(sizes)))
    C = at.total(inner((at.B, B, M_B), (at.A, A, M_A))).unflatten(0, (2, 2, -1))
    C = C * (at.s.square() * scale * root_mean)
    # Where B is huge, its square is no float32, and M_A is tiny; likewise A.
    root = _root_by_two(torch.linalg.vector_norm(C, float("inf"), (-2, -1), keepdim=True).amax(1))
    C, back = C / root[:, None], [x for of in root.to(at.dtype) for x in of.split(sizes)]
    h_A = combine((C[0, 0], M_A), (C[0, 1], A))
    h_B = combine((C[1, 0], M_B), (C[1, 1], B))
    h = torch._foreach_mul([*h_A, *h_B], back)
    return h[: len(sizes)], h[len(sizes) :]
