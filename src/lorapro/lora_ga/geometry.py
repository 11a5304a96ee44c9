"""How a layer's input and output gradient make the gradient of its weight.

For every layer the gradient is a sum of outer products over rows t (a token, a position)::

    G = Σ_t δ_t x_tᵀ            δ: (T, m) output gradients,  x: (T, n) inputs

so ``G·Ω = δᵀ(x·Ω)`` and ``Gᵀ·Q = xᵀ(δ·Q)`` need x and δ only. A convolution's rows are the patches
it looks at; an embedding's are one-hot, kept as indices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Rows", "rows_of"]

# Rows handled at once: bounds the float32 copies made of half-precision inputs, and the patches.
ROWS = 4096


class Rows(Protocol):
    """T rows of inputs x."""

    def project(self, basis: Tensor) -> Tensor:
        """``x·Ω``: (T, q) for Ω (n, q)."""
        ...

    def scatter(self, into: Tensor, y: Tensor) -> None:
        """``into += xᵀ·y``: (n, q) for y (T, q)."""
        ...


class DenseRows:
    """Rows held as a matrix."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def project(self, basis: Tensor) -> Tensor:
        """``x·Ω``."""
        return self.x @ basis

    def scatter(self, into: Tensor, y: Tensor) -> None:
        """``into += xᵀ·y``."""
        into.addmm_(self.x.mT, y)


class IndexRows:
    """One-hot rows held as indices."""

    def __init__(self, index: Tensor) -> None:
        self.index = index

    def project(self, basis: Tensor) -> Tensor:
        """``x·Ω``: rows of Ω."""
        return basis[self.index]

    def scatter(self, into: Tensor, y: Tensor) -> None:
        """``into += xᵀ·y``: add up rows that share an index."""
        into.index_add_(0, self.index, y)


def rows_of(
    kind: str, base: Any, x: Tensor, delta: Tensor, dtype: torch.dtype
) -> Iterator[tuple[Rows, Tensor]]:
    """Yield ``(rows, δ)`` with δ (T, m), a bounded number of rows at a time.

    Args:
        kind: ``"linear"``, ``"conv"`` or ``"embedding"``.
        base: the layer (convolutions and embeddings: their options matter).
        x: the layer's input.
        delta: gradient of the loss with respect to its output.
        dtype: to compute in.
    """
    if kind == "embedding":
        yield from _embedding_rows(base, x, delta, dtype)
    elif kind == "conv":
        yield from _conv_rows(base, x, delta, dtype)
    else:
        x, delta = x.reshape(-1, x.shape[-1]), delta.reshape(-1, delta.shape[-1])
        for i in range(0, len(x), ROWS):
            yield DenseRows(x[i : i + ROWS].to(dtype)), delta[i : i + ROWS].to(dtype)


def _embedding_rows(
    base: nn.Embedding, index: Tensor, delta: Tensor, dtype: torch.dtype
) -> Iterator[tuple[Rows, Tensor]]:
    index, delta = index.reshape(-1), delta.reshape(-1, delta.shape[-1])
    if base.padding_idx is not None:  # that row of the table has no gradient
        kept = index != base.padding_idx
        index, delta = index[kept], delta[kept]
    for i in range(0, len(index), ROWS):
        yield IndexRows(index[i : i + ROWS]), delta[i : i + ROWS].to(dtype)


def _conv_rows(
    base: Any, x: Tensor, delta: Tensor, dtype: torch.dtype
) -> Iterator[tuple[Rows, Tensor]]:
    dims = len(base.kernel_size)
    if x.dim() == dims + 1:  # no batch dimension
        x, delta = x.unsqueeze(0), delta.unsqueeze(0)
    x = nn.functional.pad(x, _padding(base))
    positions = delta.shape[2:].numel()
    per_step = max(1, ROWS // positions)
    for i in range(0, len(x), per_step):
        patches = _patches(x[i : i + per_step], base, tuple(delta.shape[2:]))
        rows = delta[i : i + per_step].flatten(2).transpose(1, 2).reshape(-1, delta.shape[1])
        yield DenseRows(patches.to(dtype)), rows.to(dtype)


def _patches(x: Tensor, base: Any, out: tuple[int, ...]) -> Tensor:
    """Patches of a padded x (N, C, …) as rows (N·positions, C·kernel), a view until the reshape."""
    strides = x.stride()
    steps = [s * step for s, step in zip(strides[2:], base.stride, strict=True)]
    taps = [s * gap for s, gap in zip(strides[2:], base.dilation, strict=True)]
    view = x.as_strided(
        (x.shape[0], *out, x.shape[1], *base.kernel_size),
        (strides[0], *steps, strides[1], *taps),
        x.storage_offset(),
    )
    return view.reshape(x.shape[0] * torch.Size(out).numel(), -1)


def _padding(base: Any) -> list[int]:
    """Padding of each spatial dimension, last first, as ``nn.functional.pad`` wants it."""
    if base.padding == "valid":
        return [0] * (2 * len(base.kernel_size))
    if base.padding == "same":
        pads: list[int] = []
        for size, gap in zip(reversed(base.kernel_size), reversed(base.dilation), strict=True):
            total = gap * (size - 1)
            pads += [total // 2, total - total // 2]
        return pads
    return [p for p in reversed(base.padding) for _ in range(2)]
