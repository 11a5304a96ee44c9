"""``‖δᵀx‖²`` of one batch of rows, by whichever way takes fewer products.

Shape letters: T rows, x: (T, n), δ: (T, m).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["SquaredNorms"]

BLOCK = 1 << 22  # elements of δᵀx held at once
PARTS = 4  # strips of a symmetric matrix, of which the part on and below the diagonal is formed


class SquaredNorms:
    """``‖δᵀx‖² = ⟨δδᵀ, xxᵀ⟩``, from Gram matrices (T, T) or from rows of ``δᵀx``.

    Layers that read one input (q, k and v; gate and up) come one after the other in a backward
    pass; the Gram matrix of that input is kept until another comes. Products go to one piece of
    memory: new memory for each would cost a fifth of the time.
    """

    def __init__(self) -> None:
        self._x: Tensor | None = None  # held, so that no other tensor can take its address
        self._strips: list[Tensor] = []
        self._memory: Tensor | None = None

    def __call__(self, x: Tensor, delta: Tensor) -> Tensor:
        """The squared norm, float64."""
        (T, n), m = x.shape, delta.shape[-1]
        known = self._is_kept(x)
        share = (1 + 1 / PARTS) / 2  # of a symmetric matrix
        if share * T * (m + (0 if known else n)) < m * n:
            if not known:
                self._x, self._strips = x, _halved(strip.clone() for strip in self._gram(x))
            others = self._strips
            parts = [_dot(a, b) for a, b in zip(self._gram(delta), others, strict=True)]
            # What lies left of the diagonal blocks counts twice.
            return 2 * torch.stack(parts).sum(dtype=torch.float64).clamp_min(0.0)
        rows = max(1, BLOCK // n)
        blocks = (self._product(delta[:, i : i + rows].mT, x) for i in range(0, m, rows))
        return torch.stack([_dot(block, block) for block in blocks]).sum(dtype=torch.float64)

    def _is_kept(self, x: Tensor) -> bool:
        kept = self._x
        return (
            kept is not None
            and kept.data_ptr() == x.data_ptr()
            and kept.shape == x.shape
            and kept.stride() == x.stride()
            and kept.dtype == x.dtype
        )

    def _gram(self, rows: Tensor) -> Iterator[Tensor]:
        """Rows of ``M·Mᵀ`` up to the diagonal, a strip at a time."""
        T = len(rows)
        size = max(1, -(-T // PARTS))
        for i in range(0, T, size):
            yield self._product(rows[i : i + size], rows[: i + size].mT)

    def _product(self, X: Tensor, Y: Tensor) -> Tensor:
        """``X·Y``, until the next one."""
        shape, memory = (len(X), Y.shape[-1]), self._memory
        size = shape[0] * shape[1]
        alike = memory is not None and (memory.dtype, memory.device) == (X.dtype, X.device)
        if memory is None or not alike or len(memory) < size:
            memory = self._memory = X.new_empty(size)
        return torch.mm(X, Y, out=memory[:size].view(shape))


def _dot(X: Tensor, Y: Tensor) -> Tensor:
    return torch.dot(X.view(-1), Y.view(-1))


def _halved(strips: Iterable[Tensor]) -> list[Tensor]:
    """The same with the diagonal blocks halved: twice their product with others is the whole."""
    kept = list(strips)
    for strip in kept:
        strip[:, -len(strip) :] *= 0.5
    return kept
