"""Steps whose curvature outruns them, taken along the tangent and brought back to rank r.

``(B − γ·d_B)(A − γ·d_A) = B·A − γ·(B·d_A + d_B·A) + γ²·d_B·d_A``. While B is of the size of one
step, d_A is of the size of 1/γ, and the last term no smaller than the one before. Where gradients
have had a rank below r, B also has directions that are hardly there: the last term has no bound.

Shape letters: m, n rows and columns of W; r rank; k pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorapro.optim.spaces import Space
from lorapro.optim.stacks import Tall, Wide

__all__ = ["MOST_CURVE", "outruns", "retract"]

# How many times as long as the first-order part of a step the second may be. From B = 0, at a rate
# that is constant or rises step by step, training stays below 1.5; above are rates that jump and
# directions of B that are hardly there.
MOST_CURVE = 4.0


def outruns(space: Space, d_A: Wide, d_B: Tall, lr: float) -> Tensor:
    """Which steps have ``γ·‖d_B·d_A‖_F > 4·‖B·d_A + d_B·A‖_F``, (k,), through r×r products.

    All others move the product by at most ``5γ·‖B·d_A + d_B·A‖_F`` (without weight decay).

    >>> from lorapro.optim.spaces import ExactSpace
    >>> A, B = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.1], [0.0]]])
    >>> space = ExactSpace(A, B, torch.ones(1, 1, 1), "zero")
    >>> d_A, d_B = space.A.map(lambda a: 9 * a.flip(-1)), space.B.map(lambda b: 10 * b.flip(-2))
    >>> [bool(outruns(space, d_A, d_B, lr)) for lr in (0.1, 1.0)]   # 9·lr against 4·√(0.9² + 1)
    [False, True]
    """
    A, B = space.A, space.B
    AA, BB = d_A.dot(d_A), d_B.dot(d_B)
    across = B.dot(d_B) * d_A.dot(A)
    first = (space.S_B * AA + BB * space.S_A + 2 * across).sum((-2, -1))
    second = lr**2 * (AA * BB).sum((-2, -1))
    return (second > MOST_CURVE**2 * first) & torch.isfinite(first)


def retract(A: Tensor, B: Tensor, d_A: Tensor, d_B: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """Factors of the matrix of rank r nearest to ``B·A − γ·(B·d_A + d_B·A)``.

    ``B·A`` has rank r itself, so the nearest is no farther from the target than ``B·A`` is:
    the product moves by at most ``2γ·‖B·d_A + d_B·A‖_F``. Of the factors with orthogonal rows of
    one length in A', ``‖A'‖_F = ‖A‖_F``, those with A' nearest to A are returned.

    Args:
        A: (k, r, n) in float64.
        B: (k, m, r).
        d_A: (k, r, n).
        d_B: (k, m, r).
        lr: γ.

    >>> A, B = torch.eye(2)[None, :1], torch.zeros(1, 2, 1)
    >>> d_A, d_B = torch.tensor([[[0.0, 7.0]]]), torch.tensor([[[1.0], [0.0]]])
    >>> A, B = retract(A.double(), B.double(), d_A.double(), d_B.double(), 0.5)
    >>> (B @ A).round(decimals=4) + 0.0
    tensor([[[-0.5000,  0.0000],
             [ 0.0000,  0.0000]]], dtype=torch.float64)
    """
    r = A.shape[-2]
    Q, left = torch.linalg.qr(torch.cat([B, d_B], -1))
    P, right = torch.linalg.qr(torch.cat([A - lr * d_A, -lr * A], -2).mT)
    U, sigma, Vt = torch.linalg.svd(left @ right.mT, full_matrices=False)
    rows = Vt[..., :r, :] @ P.mT
    Y, _, Zt = torch.linalg.svd(A @ rows.mT, full_matrices=False)
    turn, length = Y @ Zt, torch.linalg.matrix_norm(A)[:, None, None] / r**0.5
    new_B = (Q @ (U[..., :r] * sigma[..., None, :r])) @ turn.mT
    return length * (turn @ rows), new_B / length
