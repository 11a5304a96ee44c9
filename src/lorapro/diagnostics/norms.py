"""``‖δᵀx‖²`` of one batch of rows, by whichever way takes fewer products.

Shape letters: T rows, x: (T, n), δ: (T, m).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SquaredNorms"]

BLOCK = 1 << 22  # elements of δᵀx held at once
PARTS = 4  # strips of a symmetric matrix, of which the part on and below the diagonal is formed


class SquaredNorms:
    """``‖δᵀx‖² = ⟨δδᵀ, xxᵀ⟩``, from Gram matrices (T, T) or from rows of ``δᵀx``.

    Layers that read one input (q, k and v; gate and up) come one after the other in a backward
    pass; the Gram matrix of that input is kept until another comes.
    """

    def __init__(self) -> None:
        self._x: Tensor | None = None  # held, so that no other tensor can take its address
        self._strips: list[Tensor] = []

    def __call__(self, x: Tensor, delta: Tensor) -> Tensor:
        """The squared norm, float64."""
        (T, n), m = x.shape, delta.shape[-1]
        known = self._is_kept(x)
        share = (1 + 1 / PARTS) / 2  # of a symmetric matrix
        if share * T * (m + (0 if known else n)) < m * n:
            if not known:
                self._x, self._strips = x, list(_strips(x))
            return self._inner(delta)
        rows = max(1, BLOCK // n)
        blocks = (delta[:, i : i + rows].mT @ x for i in range(0, m, rows))
        return torch.stack([b.square().sum(dtype=torch.float64) for b in blocks]).sum()

    def _is_kept(self, x: Tensor) -> bool:
        kept = self._x
        return (
            kept is not None
            and kept.data_ptr() == x.data_ptr()
            and kept.shape == x.shape
            and kept.stride() == x.stride()
            and kept.dtype == x.dtype
        )

    def _inner(self, delta: Tensor) -> Tensor:
        """``⟨δδᵀ, xxᵀ⟩``: what lies left of the diagonal blocks counts twice."""
        total = torch.zeros((), dtype=torch.float64, device=delta.device)
        for strip, other in zip(_strips(delta), self._strips, strict=True):
            product = strip * other
            own = product.shape[0]
            total += 2 * product[:, :-own].sum(dtype=torch.float64)
            total += product[:, -own:].sum(dtype=torch.float64)
        return total.clamp_min(0.0)


def _strips(rows: Tensor) -> list[Tensor]:
    """Rows of ``M·Mᵀ`` up to the diagonal, a strip at a time."""
    T = len(rows)
    size = max(1, -(-T // PARTS))
    return [rows[i : i + size] @ rows[: i + size].mT for i in range(0, T, size)]
