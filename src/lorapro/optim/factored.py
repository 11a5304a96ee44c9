"""AdamW's rule with a factored second moment: what mode ``"factored"`` does with a tangent vector.

Shape letters: m, n rows and columns of W; r rank; k pairs; tangent vectors ``s·(B·G_A + G_B·A)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorapro.optim.spaces import Space, Tangent
from lorapro.optim.stacks import Tall, Wide, split

__all__ = ["scales", "squared_means"]


def squared_means(space: Space, G: Tangent) -> tuple[list[Tensor], list[Tensor]]:
    """Means of g̃∘g̃ over columns (k, m) and over rows (k, n), one tensor a shape.

    With ``L = [B, G_B]`` and ``R = [G_A; A]``, ``Σ_j (L·R)²_ij = Σ_p ((L·(R·Rᵀ)) ∘ L)_ip``;
    likewise for columns. g̃ is not formed.

    >>> from lorapro.optim.spaces import ExactSpace
    >>> A, B = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[2.0], [0.0]]])
    >>> space = ExactSpace(A, B, torch.full((1, 1, 1), 3.0), "zero")
    >>> G = Tangent(Wide([A.double()]), Tall([torch.zeros_like(B).double()]))
    >>> [row], [column] = squared_means(space, G)              # g̃ = 3·[[2, 0], [0, 0]]
    >>> row.tolist(), column.tolist()
    ([[18.0, 0.0]], [[18.0, 0.0]])
    """
    A, B = space.A, space.B
    GG, GA, AA = G.A.dot(G.A), G.A.dot(A), space.S_A
    to_B = Tall.combine([(B, GG), (G.B, GA.mT)])
    to_G = Tall.combine([(B, GA), (G.B, AA)])
    HH, HB, BB = G.B.dot(G.B), G.B.dot(B), space.S_B
    to_A = Wide.combine([(HH, A), (HB, G.A)])
    to_H = Wide.combine([(HB.mT, A), (BB, G.A)])
    sizes = split((space.s**2)[:, 0, 0], A)
    rows, columns = [], []
    for i, square in enumerate(sizes):
        rest = square[:, None]
        row = (to_B.parts[i] * B.parts[i]).add_(to_G.parts[i] * G.B.parts[i]).sum(-1)
        column = (to_A.parts[i] * A.parts[i]).add_(to_H.parts[i] * G.A.parts[i]).sum(-2)
        rows.append((rest * row / A.parts[i].shape[-1]).clamp_min_(0.0))
        columns.append((rest * column / B.parts[i].shape[-2]).clamp_min_(0.0))
    return rows, columns


def scales(rows: Tensor, columns: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Diagonals of D_row and D_col: ``h = D_row·M·D_col`` where ``v̂ ≈ rows·columns/mean(rows)``.

    ``D_row = 1/√(rows/mean(rows))`` and ``D_col = 1/(√columns + ε)``; a row that never saw a
    gradient has no direction either.

    >>> scales(torch.tensor([[1.0, 1.0, 4.0]]), torch.tensor([[4.0]]), 0.0)
    (tensor([[1.4142, 1.4142, 0.7071]]), tensor([[0.5000]]))
    """
    relative = rows / rows.mean(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return torch.where(relative > 0, relative, 1.0).rsqrt(), 1.0 / (columns.sqrt() + eps)
