"""Polar factor of a product of thin matrices.

Shape letters: m, n long sides; p short side; k matrices in a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["polar_core", "polar_factor"]

# Singular values of the momentum below this part of the largest are taken for zero.
POLAR_TOLERANCE = 1e-6

# Odd polynomials a·x + b·x³ + c·x⁵ applied to the singular values, from [0, 1] to 1. The first has
# the steepest start that stays bounded (Jordan et al., 2024); the second is Newton-Schulz of fifth
# order, which converges to 1 from wherever the first leaves them.
STEEP, SETTLE = (3.4445, -4.7750, 2.0315), (1.875, -1.25, 0.375)
SCHEDULE = (STEEP,) * 5 + (SETTLE,) * 3


def polar_factor(L: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """Polar factor ``U·Vᵀ`` of ``L·R = U Σ Vᵀ`` as a product of two thin matrices.

    QR of L and Rᵀ and an SVD of the (p, p) core; directions without singular value are left out.

    Args:
        L: (..., m, p).
        R: (..., p, n).

    Returns:
        ``(U, Vᵀ)``: (..., m, q) and (..., q, n) with q ≤ p.

    >>> U, Vt = polar_factor(torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, -2.0]]))
    >>> (U @ Vt).abs()
    tensor([[0.0000, 0.6000],
            [0.0000, 0.8000]])
    """
    Q_L, T_L = torch.linalg.qr(L)
    Q_R, T_R = torch.linalg.qr(R.mT)
    core = T_L @ T_R.mT
    finite = torch.isfinite(core).all(-1).all(-1)[..., None, None]
    U, sigma, Vt = torch.linalg.svd(torch.where(finite, core, 0.0), full_matrices=False)
    kept = sigma > POLAR_TOLERANCE * sigma.amax(-1, keepdim=True)
    U = torch.where(finite, U * kept.unsqueeze(-2), torch.nan)
    return Q_L @ U, Vt @ Q_R.mT


def polar_core(LL: Tensor, RR: Tensor) -> Tensor:
    """Y with ``L·Y·R`` the polar factor of ``L·R``, from ``LᵀL`` and ``R·Rᵀ`` alone.

    Newton-Schulz steps for ``N = L·Y·R`` act on Y: ``N·Nᵀ·N = L·(Y·RRᵀ·Yᵀ·LᵀL)·Y·R``. Nothing is
    inverted, so deficient ranks need no care, but an eigenvalue of LL·RR that rounding made
    negative grows without bound: the steps are taken in float64, and what enters has to be lifted
    above its own rounding. Singular values down to about 1e-3 of ``‖L·R‖_F`` are brought to 1;
    smaller ones come out smaller than 1.

    Args:
        LL: (k, p, p).
        RR: (k, p, p).

    Returns:
        (k, p, p), in the dtype of LL.

    >>> Y = polar_core(torch.tensor([[[25.0]]]), torch.tensor([[[4.0]]]))
    >>> round(float(Y), 4)                                  # 1 / (5·2)
    0.1
    """
    dtype, LL, RR = LL.dtype, LL.double(), RR.double()
    size = (LL * RR.mT).sum((-2, -1), keepdim=True).clamp_min(0.0).sqrt()  # ‖L·R‖_F
    size = torch.where(size > 0, size, 1.0)
    LL, RR = LL / size, RR / size  # with Y = I, L·Y·R now has norm 1
    Y = torch.eye(LL.shape[-1], dtype=LL.dtype, device=LL.device).expand_as(LL)
    for a, b, c in SCHEDULE:
        T = (Y @ RR @ Y.mT) @ LL
        TY = T @ Y
        Y = torch.add(a * Y, torch.baddbmm(TY, T, TY, beta=b, alpha=c))
    return (Y / size).to(dtype)
