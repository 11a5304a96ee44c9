"""Alignment of many pairs for the price of a few batched products.

:func:`lorapro.functional.align` is exact for factors of any condition, and pays for it with
float64 and eigenvectors. Factors in training are well conditioned, so here the Gram matrices are
float32, the inverses come from Cholesky, and X from a few conjugate-gradient steps. g̃ does not
depend on X, so an inexact X costs no accuracy of the equivalent gradient. Pairs whose condition is
too high for that, or whose factors have no full rank (``B = 0`` at the start), take the exact path.

Shape letters: m, n rows and columns of W; r rank; k pairs stacked by shape; s scaling.
``S_A = A·Aᵀ``, ``S_B = Bᵀ·B``, ``K = grad_A·Aᵀ``; Y solves ``S_B·Y + Y·S_A = K``, ``X = −S_B⁻¹·Y``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorapro.functional import align

__all__ = ["align_batched", "solve_sylvester"]

# cond(S) up to which float32 keeps g̃ within 1e-3 of the exact one: cond(B) up to 170.
MOST_CONDITION = 3e4
# X is −S_B⁻¹·residual·S_A⁻¹ off: one of the two must be close to a multiple of the identity, as
# LoRA's A·Aᵀ is. Bound on the smaller ‖S‖·‖S⁻¹‖/r (1 for the identity).
MOST_SMALLER_CONDITION = 8.0
# Residual at which X is good enough, relative to K, and the most steps spent on it.
X_TOLERANCE, X_STEPS = 1e-3, 16


def align_batched(
    stacks: list[tuple[Tensor, Tensor, Tensor]],
    scalings: list[float | Tensor],
    x: str,
) -> list[tuple[Tensor, Tensor]]:
    """Align stacks of one rank, on the CPU, in float32.

    Args:
        stacks: (both_A, B, grad_B) with both_A (k, 2r, n) holding grad_A over A, B and grad_B
            (k, m, r); k, m and n may differ from stack to stack.
        scalings: ``s`` of each stack, a float or (k,).
        x: the choice of X.

    Returns:
        (d_A, d_B) of each stack. g̃ is that of :func:`lorapro.functional.align` to 1e-3; with
        ``x="sylvester"`` (d_A, d_B) themselves to 1e-2.

    >>> A, B = torch.eye(2, 3)[None], torch.eye(4, 2)[None]
    >>> [(d_A, d_B)] = align_batched([(torch.cat([A, A], 1), B, B)], [1.0], "zero")
    >>> torch.allclose(d_A, align(A, B, A, B, 1.0, x="zero")[0])
    True
    """
    r = stacks[0][1].shape[-1]
    stacks = [(Z.float(), B.float(), g_B.float()) for Z, B, g_B in stacks]
    grams = [Z[:, r:] @ Z.mT for Z, _, _ in stacks]  # (k, r, 2r): Kᵀ beside S_A
    KS = torch.cat(grams)
    S_B = torch.cat([B.mT @ B for _, B, _ in stacks])
    PX, R, C, exact = _solve(KS[..., r:], S_B, KS[..., :r].mT, x)
    out = []
    first = 0
    for (Z, B, g_B), s in zip(stacks, scalings, strict=True):
        part = slice(first, first + len(Z))
        first += len(Z)
        c = s**-2 if isinstance(s, float) else s.to(Z.dtype)[:, None, None] ** -2
        d_A = (c * PX[part]) @ (Z if PX.shape[-1] == 2 * r else Z[:, :r])
        # Short and wide products are much faster than tall and narrow ones.
        across = (c * R[part]) @ g_B.mT
        d_B = across.baddbmm_((c * C[part]).mT, B.mT, alpha=-1).mT.contiguous()
        if exact[part].any():
            rows = exact[part].nonzero().flatten()
            s_rows = s if isinstance(s, float) else s[rows]
            right = align(Z[rows, r:], B[rows], Z[rows, :r], g_B[rows], s_rows, x=x)
            d_A[rows], d_B[rows] = right  # type: ignore[assignment]
        out.append((d_A, d_B))
    return out


def _solve(S_A: Tensor, S_B: Tensor, K: Tensor, x: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coefficients of ``d_A = [P X]·[grad_A; A]`` and ``d_B = grad_B·R − B·C``, times s².

    Returns ``[P X]`` (k, r, 2r) or P alone, R, C, and (k,) which pairs need the exact path.
    """
    inverse, condition = _inverse(torch.cat([S_A, S_B]))
    inv_A, inv_B = inverse.chunk(2)
    exact = ~(condition < MOST_CONDITION).view(2, -1).all(0)
    if x == "zero":
        return inv_B, inv_A, inv_B @ K @ inv_A, exact
    if x == "symmetric":
        half = 0.5 * (inv_B @ K @ inv_A)
        return torch.cat([inv_B, -half], -1), inv_A, half, exact
    exact |= condition.view(2, -1).amin(0) > MOST_SMALLER_CONDITION * K.shape[-1]
    swap = (condition.view(2, -1)[1] < condition.view(2, -1)[0])[:, None, None]
    # The side nearer to a multiple of the identity is the one to precondition with.
    first, second = torch.where(swap, S_A, S_B), torch.where(swap, S_B, S_A)
    Y = solve_sylvester(first, second, torch.where(swap, K.mT, K), wanted=~exact)
    Y = torch.where(swap, Y.mT, Y)
    # Not X = −S_B⁻¹Y: only with the residual in it is C − X = S_B⁻¹·K·S_A⁻¹ for an inexact Y.
    minus_X = inv_B @ torch.baddbmm(K, S_B, Y, alpha=-1) @ inv_A
    return torch.cat([inv_B, -minus_X], -1), inv_A, Y @ inv_A, exact


def _inverse(S: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of positive matrices by Cholesky, and ``‖S‖·‖S⁻¹‖``, Inf where there is none."""
    L, failed = torch.linalg.cholesky_ex(S)
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    beyond = ((failed != 0) | ~torch.isfinite(L).all(-1).all(-1))[:, None, None]
    inverse = torch.cholesky_inverse(torch.where(beyond, eye, L))
    condition = S.norm(dim=(-2, -1)) * inverse.norm(dim=(-2, -1))
    beyond = beyond | ~torch.isfinite(condition)[:, None, None]
    return torch.where(beyond, eye, inverse), torch.where(beyond[:, 0, 0], torch.inf, condition)


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
        (k, r, r), residual at most 1e-3 of ‖K‖ or what 16 steps give.

    >>> two, one = 2 * torch.eye(2)[None], torch.eye(2)[None]
    >>> solve_sylvester(two, one, 6 * one)[0]
    tensor([[2., 0.],
            [0., 2.]])
    """
    eye = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
    q = Q.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    M, _ = _inverse(P + q * eye)
    size = K.abs().amax((-2, -1), keepdim=True)
    R = K / torch.where(size > 0, size, 1.0)
    target = X_TOLERANCE * _length(R)
    active = _length(R) > target
    if wanted is not None:
        active &= wanted[:, None, None]
    Z = M @ R
    Y, D, rz = torch.zeros_like(R), Z, _inner(R, Z)
    tiny = torch.finfo(R.dtype).tiny
    for _ in range(X_STEPS):
        if not active.any():
            break
        AD = torch.baddbmm(D @ Q, P, D)
        step = torch.where(active, rz / _inner(D, AD).clamp_min(tiny), 0.0)
        Y = Y + step * D
        R = R - step * AD
        active &= _length(R) > target
        Z = M @ R
        rz, before = _inner(R, Z), rz
        D = Z + rz / before.clamp_min(tiny) * D
    return size * Y


def _length(a: Tensor) -> Tensor:
    return a.norm(dim=(-2, -1), keepdim=True)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1), keepdim=True)
