"""AdamW's rule with a factored second moment: what mode ``"factored"`` does with a tangent vector.

Shape letters: m, n rows and columns of W; r rank; k pairs stacked by shape;
L (k, m, 2r) and R (k, 2r, n) the two sides of a tangent vector ``L·R``.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["precondition", "squared_means"]


def squared_means(L: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """Means over columns and over rows of ``(L·R)∘(L·R)``, without forming it.

    ``Σ_j (L·R)²_ij = Σ_p ((L·(R Rᵀ)) ∘ L)_ip``, likewise for columns.

    Args:
        L: (..., m, q).
        R: (..., q, n).

    Returns:
        row means (..., m) and column means (..., n).

    >>> L, R = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 1.0]])
    >>> squared_means(L, R)
    (tensor([ 5., 20.]), tensor([22.5000,  2.5000]))
    """
    rows = ((L @ (R @ R.mT)) * L).sum(-1) / R.shape[-1]
    columns = (((L.mT @ L) @ R) * R).sum(-2) / L.shape[-2]
    return rows.clamp_min(0.0), columns.clamp_min(0.0)


def precondition(
    L: Tensor, R: Tensor, rows: Tensor, columns: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``h = D_row·(L·R)·D_col`` with ``v̂_ij ≈ rows_i·columns_j / mean(rows)``.

    ``D_row = 1/√(rows/mean(rows))`` and ``D_col = 1/(√columns + ε)``; a row that never saw a
    gradient has no direction either.
    """
    relative = rows / rows.mean(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    D_row = torch.where(relative > 0, relative, 1.0).rsqrt()
    return D_row.unsqueeze(-1) * L, R / (columns.sqrt() + eps).unsqueeze(-2)
