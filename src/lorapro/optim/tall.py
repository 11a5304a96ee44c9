"""Products of tall stacks (k, m, r), as B is, at the speed of wide ones.

Matrix kernels are slow on matrices of fewer than sixteen columns. Where the rank is smaller, rows
are taken together: (m, r) is read as (m/f, f·r), and an (r, r) coefficient stands f times on the
diagonal of an (f·r, f·r) one. Measured at r = 8, k = 60, m = 576: half the time (decisions.md).

Shape letters: m rows; r rank; k matrices in a stack; f rows taken together.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["gram", "product"]

WIDTH = 16


def _together(*stacks: Tensor) -> int:
    """How many rows to take together: f with f·r at most 16, dividing m, and no copy needed."""
    _, m, r = stacks[0].shape
    f = 1
    if all(T.shape == stacks[0].shape and T.is_contiguous() for T in stacks):
        while 2 * f * r <= WIDTH and m % (2 * f) == 0:
            f *= 2
    return f


def gram(B: Tensor, C: Tensor) -> Tensor:
    """``Bᵀ·C`` for stacks (k, m, r).

    >>> import torch
    >>> B = torch.arange(8.0).view(1, 4, 2)
    >>> torch.equal(gram(B, B), B.mT @ B)
    True
    """
    f = _together(B, C)
    if f == 1:
        return B.mT @ C
    k, m, r = B.shape
    wide = B.view(k, m // f, f * r).mT @ C.view(k, m // f, f * r)
    return wide.view(k, f, r, f, r).diagonal(dim1=1, dim2=3).sum(-1)


def product(B: Tensor, W: Tensor, add_to: Tensor | None = None) -> Tensor:
    """``B·W`` for a stack (k, m, r) and coefficients (k, r, r), added to ``add_to`` in place.

    >>> import torch
    >>> B = torch.arange(8.0).view(1, 4, 2)
    >>> total = product(B, 2 * torch.eye(2)[None])
    >>> torch.equal(product(B, -torch.eye(2)[None], total), B)
    True
    """
    f = _together(B) if W.shape[-1] == W.shape[-2] else 1
    if f == 1:
        return B @ W if add_to is None else add_to.baddbmm_(B, W)
    k, m, r = B.shape
    B, W = B.view(k, m // f, f * r), _repeated(W, f)
    if add_to is None:
        return (B @ W).view(k, m, r)
    add_to.view(k, m // f, f * r).baddbmm_(B, W)
    return add_to


def _repeated(W: Tensor, f: int) -> Tensor:
    """(k, r, r) f times on the diagonal of (k, f·r, f·r)."""
    k, r, _ = W.shape
    out = W.new_zeros(k, f, r, f, r)
    out.diagonal(dim1=1, dim2=3).copy_(W.unsqueeze(-1))
    return out.view(k, f * r, f * r)
