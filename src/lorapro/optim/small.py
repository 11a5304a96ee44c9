"""Algebra of many small symmetric matrices at once, in a few batched products.

Shape letters: r rank; k matrices in a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inverse", "solve_sylvester"]

# Above this size an inverse is put together from those of its halves: LAPACK goes matrix by matrix.
LARGEST_AT_ONCE = 32
# Residual at which Y is good enough, relative to K, and the most steps spent on it.
TOLERANCE, MOST_STEPS = 5e-3, 16


def inverse(S: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of symmetric positive matrices, and ``‖S‖·‖S⁻¹‖`` in Frobenius norms.

    Args:
        S: (k, r, r).

    Returns:
        (k, r, r) and (k,); the identity and Inf for a matrix that has no inverse.

    >>> inverse(torch.tensor([[[4.0]], [[0.0]]]))
    (tensor([[[0.2500]],
    <BLANKLINE>
            [[1.0000]]]), tensor([1., inf]))
    """
    inv = _inverse(S)
    condition = S.norm(dim=(-2, -1)) * inv.norm(dim=(-2, -1))
    # Of a positive matrix: every entry of the diagonal is positive, in S and in its inverse.
    diagonals = torch.minimum(S.diagonal(dim1=-2, dim2=-1), inv.diagonal(dim1=-2, dim2=-1))
    good = torch.isfinite(condition) & (diagonals.amin(-1) > 0)
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    return torch.where(good[:, None, None], inv, eye), torch.where(good, condition, torch.inf)


def _inverse(S: Tensor) -> Tensor:
    """Inverse where there is one, NaN somewhere in it (or a wrong sign) elsewhere."""
    r = S.shape[-1]
    if r <= LARGEST_AT_ONCE:
        L, failed = torch.linalg.cholesky_ex(S)
        L.diagonal(dim1=-2, dim2=-1).masked_fill_((failed != 0)[:, None], torch.nan)
        return torch.cholesky_inverse(L)
    half = r // 2
    P, Q, R = S[:, :half, :half], S[:, :half, half:], S[:, half:, half:]
    inv_P = _inverse(P.contiguous())
    T = inv_P @ Q
    out = torch.empty_like(S)
    inv_R = _inverse(torch.baddbmm(R, Q.mT, T, alpha=-1))  # of the Schur complement
    U = T @ inv_R
    out[:, half:, half:] = inv_R
    out[:, :half, half:] = -U
    out[:, half:, :half] = -U.mT
    out[:, :half, :half] = torch.baddbmm(inv_P, U, T.mT)
    return out


def solve_sylvester(P: Tensor, Q: Tensor, K: Tensor, wanted: Tensor | None = None) -> Tensor:
    """Y with ``P·Y + Y·Q ≈ K`` for symmetric positive P and Q, by conjugate gradients.

    The operator is symmetric and positive. ``(P + q·I)⁻¹``, q the mean eigenvalue of Q, is its
    inverse where Q is a multiple of the identity, as ``A·Aᵀ`` nearly is for LoRA's usual start;
    the number of steps grows with the condition of Q only. Each system stops by itself, so that
    none depends on its neighbours.

    Args:
        P: (k, r, r).
        Q: (k, r, r).
        K: (k, r, r).
        wanted: (k,) systems to solve; the others are left at zero.

    Returns:
        (k, r, r), residual about 5e-3 of K (in the norm of ``(P + q·I)⁻¹``) or what 16 steps give.

    >>> two, one = 2 * torch.eye(2)[None], torch.eye(2)[None]
    >>> solve_sylvester(two, one, 6 * one)[0]
    tensor([[2., 0.],
            [0., 2.]])
    """
    q = Q.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    eye = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
    M, _ = inverse(P + q * eye)
    size = K.abs().amax((-2, -1), keepdim=True)
    R = K / torch.where(size > 0, size, 1.0)
    D = M @ R
    rz = _inner(R, D)
    target = TOLERANCE**2 * rz
    active = rz > target
    if wanted is not None:
        active &= wanted[:, None, None]
    Y = torch.zeros_like(R)
    tiny = torch.finfo(R.dtype).tiny
    for _ in range(MOST_STEPS):
        if not active.any():
            break
        AD = torch.baddbmm(D @ Q, P, D)
        step = torch.where(active, rz / _inner(D, AD).clamp_min(tiny), 0.0)
        Y.addcmul_(step, D)
        R.addcmul_(step, AD, value=-1)
        Z = M @ R
        rz, before = _inner(R, Z), rz
        active &= rz > target
        D = torch.addcmul(Z, rz / before.clamp_min(tiny), D)
    return size * Y


def _inner(a: Tensor, b: Tensor) -> Tensor:
    if a.shape[-1] > LARGEST_AT_ONCE:
        return (a * b).sum((-2, -1), keepdim=True)
    return torch.bmm(a.flatten(1).unsqueeze(1), b.flatten(1).unsqueeze(2))
