"""From a gradient to two factors: directions, scales and objectives of LoRA-GA.

Shape letters used in this file
    m, n   rows and columns of the adapted weight ``W = W0 + s·B·A`` (``m`` = out, ``n`` = in)
    r      rank;   A: (r, n),   B: (m, r);   s  scaling of the pair
    q      number of singular directions at hand, at most 2r
    G      ``∂L/∂W0`` (m, n), ``G ≈ U Σ Vᵀ`` with U: (m, q), V: (n, q)

Source: LoRA-GA and its derivation. A first step of SGD on the factors moves W by
``−η (B·Bᵀ·G + G·Aᵀ·A)``, so A and B are chosen to make that as close to ``−η·G`` as rank 2r allows,
Eq. (loss-1)::

    min ‖B·Bᵀ·G + G·Aᵀ·A − G‖²

Any r of the leading 2r right singular vectors in A and the other r left ones in B solve it. For
Adam, whose first step is a sign, the post states Eq. (loss-adam)::

    min ‖B·sign(BᵀG) + sign(G·Aᵀ)·A − sign(G)‖²
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorapro.choices import check_choice

__all__ = [
    "DIRECTIONS",
    "OBJECTIVES",
    "SCALES",
    "adam_objective",
    "gradient_objective",
    "leading_singular_values",
    "minimize_adam_objective",
    "scale_factor",
    "split_directions",
]

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "gd", "unit", "weight")
OBJECTIVES = ("gradient", "sign", "adam")

# Fractions of the way to the least-squares solution that the line search tries, largest first.
_STEPS = (1.0, 0.5, 0.25, 0.1, 0.03)


def split_directions(
    direction: str, r: int, q: int, generator: torch.Generator | None = None
) -> tuple[list[int], list[int]]:
    """Share q singular directions (0 is the largest) out between A and B.

    - ``"ArB2r"``: A takes the first r, B the next r (the usual default).
    - ``"A2rBr"``: B takes the first r, A the next r (the post's choice).
    - ``"ArBr"``: alternating, B the even ones, A the odd ones.
    - ``"random"``: disjoint and drawn from ``generator``.

    Args:
        direction: one of :data:`DIRECTIONS`.
        r: rank of the pair.
        q: directions at hand, at most ``2r``; fewer when ``2r > min(m, n)``.
        generator: for ``"random"``.

    Returns:
        Two disjoint lists that together hold every one of the q directions.

    Raises:
        ValueError: an unknown direction.

    >>> split_directions("ArB2r", 2, 4)
    ([0, 1], [2, 3])
    >>> split_directions("ArB2r", 2, 3)                # only three directions exist
    ([0, 1], [2])
    """
    check_choice("direction", direction, DIRECTIONS)
    order = list(range(min(q, 2 * r)))
    first = min(r, len(order))
    if direction == "ArB2r":
        return order[:first], order[first:]
    if direction == "A2rBr":
        return order[first:], order[:first]
    if direction == "ArBr":
        return order[1::2], order[0::2]
    shuffled = torch.randperm(len(order), generator=generator).tolist()
    half = (len(order) + 1) // 2
    return shuffled[:half], shuffled[half:]


def scale_factor(
    scale: str,
    m: int,
    scaling: float,
    gamma: float = 16.0,
    singular_values: Tensor | None = None,
) -> float:
    """The number both factors are multiplied by, their rows and columns being of unit length.

    - ``"stable"``: ``m^¼ / √γ``, so that the size of the output does not grow with m.
    - ``"gd"``: ``1 / s``, so that a step of SGD on the factors is one of full fine-tuning.
    - ``"unit"``: 1.
    - ``"weight"``: mean of ``√(σ_i / s)`` over the r largest singular values of W0, so that
      ``s·B·A`` is as large as the leading part of W0.

    Args:
        scale: one of :data:`SCALES`.
        m: rows of W, the number of output features.
        scaling: s.
        gamma: γ of ``"stable"``.
        singular_values: the r largest of W0, for ``"weight"``.

    Raises:
        ValueError: an unknown scale, or ``"weight"`` without singular values.

    >>> scale_factor("stable", m=256, scaling=2.0), scale_factor("gd", m=256, scaling=2.0)
    (1.0, 0.5)
    """
    check_choice("scale", scale, SCALES)
    if scale == "stable":
        return m**0.25 / gamma**0.5
    if scale == "gd":
        return 1.0 / scaling
    if scale == "unit":
        return 1.0
    if singular_values is None:
        raise ValueError("scale 'weight' needs the singular values of W0; none were given.")
    return float((singular_values.double() / scaling).sqrt().mean())


def gradient_objective(A: Tensor, B: Tensor, G: Tensor) -> Tensor:
    """Eq. (loss-1), ``‖B·Bᵀ·G + G·Aᵀ·A − G‖²``: how far LoRA's first SGD step is from the full one.

    Args:
        A: (r, n).
        B: (m, r).
        G: (m, n).

    Returns:
        A scalar in float64. Its least value over A and B is the sum of the squared singular values
        of G from the (2r+1)-th on.

    >>> G = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> gradient_objective(torch.eye(1, 3), torch.eye(3)[:, 1:2], G)
    tensor(1., dtype=torch.float64)
    """
    A, B, G = A.double(), B.double(), G.double()
    return (B @ (B.mT @ G) + (G @ A.mT) @ A - G).square().sum()


def adam_objective(A: Tensor, B: Tensor, G: Tensor) -> Tensor:
    """Eq. (loss-adam), ``‖B·sign(BᵀG) + sign(G·Aᵀ)·A − sign(G)‖²``.

    How far the first step of Adam on the factors is from the first step of Adam on W.

    Args:
        A: (r, n).
        B: (m, r).
        G: (m, n).

    Returns:
        A scalar in the dtype of G, float32 at least.

    >>> adam_objective(torch.zeros(1, 2), torch.zeros(3, 1), torch.ones(3, 2))
    tensor(6.)
    """
    G = G.to(torch.promote_types(G.dtype, torch.float32))
    A, B = A.to(G.dtype), B.to(G.dtype)
    return (B @ (B.mT @ G).sign() + (G @ A.mT).sign() @ A - G.sign()).square().sum()


def minimize_adam_objective(
    A: Tensor, B: Tensor, G: Tensor, steps: int = 30
) -> tuple[Tensor, Tensor, float, float]:
    """Lower :func:`adam_objective` from a start, never ending above it.

    While the signs stay as they are the objective is a least-squares problem in B, and one in A.
    Each step solves the one, goes as far towards its solution as the true objective falls, then
    does the same with the other; it stops when neither moves.

    Args:
        A: (r, n), the start.
        B: (m, r), the start.
        G: (m, n).
        steps: most rounds.

    Returns:
        ``(A, B, start, end)``: new factors in the dtype of G (float32 at least) and the objective
        before and after, ``end <= start``.

    >>> G = torch.tensor([[2.0, -1.0], [1.0, 3.0], [-1.0, 1.0]])
    >>> _, _, start, end = minimize_adam_objective(torch.eye(1, 2), torch.eye(3, 1), G)
    >>> end < start
    True
    """
    G = G.to(torch.promote_types(G.dtype, torch.float32))
    A, B, S = A.to(G.dtype), B.to(G.dtype), G.sign()
    start = best = float(adam_objective(A, B, G))
    for _ in range(steps):
        before = best
        left = (B.mT @ G).sign()
        goal = _least_squares(left.mT, (S - (G @ A.mT).sign() @ A).mT).mT
        for t in _STEPS:
            value = float(adam_objective(A, trial := torch.lerp(B, goal, t), G))
            if value < best:
                B, best = trial, value
                break
        right = (G @ A.mT).sign()
        goal = _least_squares(right, S - B @ (B.mT @ G).sign())
        for t in _STEPS:
            value = float(adam_objective(trial := torch.lerp(A, goal, t), B, G))
            if value < best:
                A, best = trial, value
                break
        if best > before * (1 - 1e-5):
            break
    return A, B, start, best


def leading_singular_values(W: Tensor, r: int, generator: torch.Generator | None = None) -> Tensor:
    """The r largest singular values of W (m, n), (r,) or as many as there are.

    By a randomized range finder with four power iterations; exact for small matrices.

    >>> leading_singular_values(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2)
    tensor([3., 2.])
    """
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    if min(W.shape) <= max(256, 8 * r):
        return torch.linalg.svdvals(W)[:r]
    start = torch.randn(W.shape[1], 4 * r, generator=generator, dtype=W.dtype).to(W.device)
    Q = torch.linalg.qr(W @ start).Q
    for _ in range(4):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q).Q).Q
    return torch.linalg.svdvals(Q.mT @ W)[:r]


def _least_squares(M: Tensor, Y: Tensor) -> Tensor:
    """Least-norm X that minimises ``‖M X − Y‖``; M: (T, r) of any rank."""
    gram = M.mT.double() @ M.double()
    return (torch.linalg.pinv(gram, hermitian=True) @ (M.mT @ Y).double()).to(Y.dtype)
