"""Pairs of one shape as one batch, and back.

The optimizers see a group of pairs as a few :class:`Batches`: all pairs of one rank, precision,
device and of the same trained factors, in one part for every shape. What a step computes is rows
(``lorapro.gram``), one tensor a part, so that the number of operations depends on how many shapes
there are, not on how many pairs. Of sharded factors, rows are what this process holds of them,
shapes those of the whole; ``lorapro.distributed.sharding`` says what is summed.

Shape letters: k pairs of a part; m, n rows and columns of W; r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorapro.distributed.sharding import Sharding, local, sharding_of
from lorapro.factors import LoraPair, as_A, as_B, from_A, from_B
from lorapro.functional import Point, point_at
from lorapro.gram import Rows

__all__ = ["Batches", "batches_of"]

# On a CPU, numbers in the larger factor above which pairs of one shape are two parts: their copies
# then stay below the 32 MiB up to which the C library keeps freed memory instead of faulting it in.
MOST_IN_A_PART = 1 << 21


@dataclass
class Part:
    """Pairs of one shape and layout."""

    layout: str
    blocks: int
    A: list[Tensor] = field(default_factory=list)
    B: list[Tensor] = field(default_factory=list)
    scalings: list[float] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of pairs of matrices."""
        return len(self.A) * self.blocks

    @property
    def is_full(self) -> bool:
        """Whether another pair of this shape begins a part of its own."""
        largest = max(self.A[0].numel(), self.B[0].numel())
        return self.A[0].device.type == "cpu" and largest * (len(self.A) + 1) > MOST_IN_A_PART

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the adapted weights."""
        m, n = self.B[0].numel(), self.A[0].numel()
        return m // (self.rank * self.blocks), n // (self.rank * self.blocks)

    @property
    def rank(self) -> int:
        """Rank r."""
        return self.A[0].shape[0] // (1 if self.layout == "matrix" else self.blocks)

    def stack_A(self, like_A: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """A-like tensors as (k, r, n)."""
        if self.layout == "matrix" and like_A[0].dim() == 2:
            return torch.stack(list(like_A)).to(dtype)
        return torch.cat([as_A(t, self.layout, self.blocks) for t in like_A]).to(dtype)

    def stack_B(self, like_B: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """B-like tensors as rows of their transpose, (k, r, m)."""
        if self.layout == "matrix" and like_B[0].dim() == 2:
            return torch.stack(list(like_B)).to(dtype).mT
        return torch.cat([as_B(t, self.layout, self.blocks) for t in like_B]).to(dtype).mT

    def unstack_A(self, X: Tensor) -> Sequence[Tensor]:
        """(k, r, n) as tensors like the stored A."""
        X = X.to(self.A[0].dtype)
        if self.layout == "matrix" and self.A[0].dim() == 2:
            return X.unbind()
        parts = X.split(self.blocks)
        return [from_A(x, like) for x, like in zip(parts, local(self.A), strict=True)]

    def unstack_B(self, X: Tensor) -> Sequence[Tensor]:
        """(k, r, m) as tensors like the stored B."""
        X = X.mT.to(self.B[0].dtype)
        if self.layout == "matrix" and self.B[0].dim() == 2:
            return X.unbind()
        parts = X.split(self.blocks)
        return [from_B(x, like, self.layout) for x, like in zip(parts, local(self.B), strict=True)]


@dataclass
class Batches:
    """Pairs that are stepped together.

    Attributes:
        parts: one for each shape.
        moves_A: whether A has a gradient; else it stays and B solves the problem alone.
        moves_B: likewise.
        sharding: how processes share the factors; ``None`` where each has its own.
    """

    parts: list[Part]
    moves_A: bool
    moves_B: bool
    sharding: Sharding | None = None

    @property
    def A(self) -> list[Tensor]:
        """The parameters of A, part by part."""
        return [p for part in self.parts for p in part.A]

    @property
    def B(self) -> list[Tensor]:
        """The parameters of B, part by part."""
        return [p for part in self.parts for p in part.B]

    @property
    def moved(self) -> list[Tensor]:
        """The parameters that have a gradient."""
        return (self.A if self.moves_A else []) + (self.B if self.moves_B else [])

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the long products: that of the factors, float32 at least."""
        dtype = self.A[0].dtype
        return dtype if dtype == torch.float64 else torch.float32

    def rows_A(self, read: Callable[[Tensor], Tensor]) -> Rows:
        """``read(A)`` of every pair as rows (k, r, n)."""
        held = [[read(p) for p in part.A] for part in self.parts]
        if self.sharding is not None:
            held = [local(of_part) for of_part in held]
            if self.sharding.A_by_rows:
                stacked = [torch.stack([t.flatten(1) for t in of_part]) for of_part in held]
                X = self.sharding.to_columns(stacked, [part.A[0].shape[0] for part in self.parts])
                return [
                    x.reshape(part.count, part.rank, x.shape[-1]).to(self.dtype)
                    for part, x in zip(self.parts, X, strict=True)
                ]
        return [part.stack_A(t, self.dtype) for part, t in zip(self.parts, held, strict=True)]

    def rows_B(self, read: Callable[[Tensor], Tensor]) -> Rows:
        """``read(B)`` of every pair as rows (k, r, m)."""
        held = [[read(p) for p in part.B] for part in self.parts]
        if self.sharding is not None:
            held = [local(of_part) for of_part in held]
            if self.sharding.B_by_rows:
                stacked = [torch.stack([t.flatten(1) for t in of_part]).mT for of_part in held]
                X = self.sharding.to_columns(stacked, [part.rank for part in self.parts])
                return [x.to(self.dtype) for x in X]
        return [part.stack_B(t, self.dtype) for part, t in zip(self.parts, held, strict=True)]

    def gradients(self) -> tuple[Rows | None, Rows | None]:
        """Gradients of A and of B as rows, ``None`` where there is none."""
        return (
            self.rows_A(_gradient) if self.moves_A else None,
            self.rows_B(_gradient) if self.moves_B else None,
        )

    def point(self) -> Point:
        """The factors."""
        s = self.per_pair([s for part in self.parts for s in part.scalings for _ in _of(part)])
        A, B = self.rows_A(lambda p: p), self.rows_B(lambda p: p)
        return (
            point_at(A, B, s) if self.sharding is None else point_at(A, B, s, self.sharding.total)
        )

    def whole_A(self, X: Rows) -> Rows:
        """Rows (k, r, n) with all columns, of which this process may have a part."""
        if self.sharding is None:
            return X
        return self.sharding.whole(X, [part.shape[1] for part in self.parts])

    def sum_to_A(self, X: Rows) -> Rows:
        """Rows (k, r, n) summed over processes that hold parts of B, as A is split."""
        return X if self.sharding is None else self.sharding.sum_to_columns(X)

    def means_of_B(self, rows: Rows) -> Rows:
        """Means (k, 1) of numbers (k, m), one for each row of B."""
        if self.sharding is None:
            return [row.mean(-1, keepdim=True) for row in rows]
        m = [part.shape[0] for part in self.parts for _ in range(part.count)]
        sums = self.sharding.total(torch.cat([row.sum(-1).double() for row in rows]))
        means = sums[:, None] / self.per_pair(m)[:, 0]
        return means.to(rows[0].dtype).split([len(row) for row in rows])

    def per_pair(self, values: Sequence[float]) -> Tensor:
        """A number for every pair of matrices, (k, 1, 1) in float64."""
        where = self.A[0].device
        return torch.tensor(values, dtype=torch.float64, device=where)[:, None, None]

    def per_part(self, value: Callable[[tuple[int, int]], float]) -> Tensor:
        """A number that depends on the shape (m, n), for every pair of matrices, (k, 1, 1)."""
        return self.per_pair([v for p in self.parts for v in [value(p.shape)] * p.count])

    def per_matrix(self, per_parameter: Sequence[Tensor]) -> Tensor:
        """Scalars of the parameters B as one for every pair of matrices, (k, 1, 1) in float64."""
        values = torch.stack(list(per_parameter)).double()
        blocks = [part.blocks for part in self.parts for _ in part.B]
        if max(blocks) > 1:
            values = torch.cat([v.expand(b) for v, b in zip(values.split(1), blocks, strict=True)])
        return values[:, None, None]

    def unstack_A(self, X: Rows) -> list[Tensor]:
        """Rows as tensors like what is held of the parameters of A, in the order of :attr:`A`."""
        if self.sharding is not None and self.sharding.A_by_rows:
            stacked = [
                x.to(part.A[0].dtype).reshape(len(part.A), part.A[0].shape[0], x.shape[-1])
                for part, x in zip(self.parts, X, strict=True)
            ]
            rows = self.sharding.to_rows(stacked, [part.shape[1] for part in self.parts])
            held = local(self.A)
            return [t.view_as(p) for t, p in zip((t for x in rows for t in x), held, strict=True)]
        return [t for part, x in zip(self.parts, X, strict=True) for t in part.unstack_A(x)]

    def unstack_B(self, X: Rows) -> list[Tensor]:
        """Rows as tensors like what is held of the parameters of B, in the order of :attr:`B`."""
        if self.sharding is not None and self.sharding.B_by_rows:
            stacked = [x.to(p.B[0].dtype) for p, x in zip(self.parts, X, strict=True)]
            rows = self.sharding.to_rows(stacked, [part.shape[0] for part in self.parts])
            held = local(self.B)
            return [
                t.mT.reshape(p.shape)
                for t, p in zip((t for x in rows for t in x), held, strict=True)
            ]
        return [t for part, x in zip(self.parts, X, strict=True) for t in part.unstack_B(x)]

    def unstack_moved(self, X_A: Rows | None, X_B: Rows | None) -> list[Tensor]:
        """Rows as tensors like :attr:`moved`."""
        left = self.unstack_A(X_A) if self.moves_A and X_A is not None else []
        return left + (self.unstack_B(X_B) if self.moves_B and X_B is not None else [])


def batches_of(pairs: Sequence[LoraPair], params: Sequence[Tensor]) -> list[Batches]:
    """Pairs that have gradients, batched.

    Args:
        pairs: how the pairs are laid out.
        params: their parameters ``[A0, B0, A1, B1, …]``; a group's own list, since frameworks
            exchange the parameters of a group for others.
    """
    if len(params) != 2 * len(pairs):
        raise ValueError(
            f"{len(params)} parameters stand where {len(pairs)} pairs have {2 * len(pairs)}: "
            "something put others in their place, as DeepSpeed ZeRO does, which is not supported: "
            "use DDP or FSDP2 (torch.distributed.fsdp.fully_shard)."
        )
    found: dict[tuple[object, ...], tuple[Batches, dict[object, Part]]] = {}
    for pair, A, B in zip(pairs, params[::2], params[1::2], strict=True):
        scaling = pair.current_scaling()
        moves = A.grad is not None, B.grad is not None
        if not any(moves):
            continue
        sharding = sharding_of(pair, A, B)
        rank = A.shape[0] // (1 if pair.layout == "matrix" else pair.blocks)
        together = rank, A.dtype, B.dtype, A.device, moves, sharding
        batches, open_parts = found.setdefault(together, (Batches([], *moves, sharding), {}))
        alike = pair.layout, pair.blocks, A.shape, B.shape
        part = open_parts.get(alike)
        if part is None or part.is_full:
            part = open_parts[alike] = Part(pair.layout, pair.blocks)
            batches.parts.append(part)
        part.A.append(A)
        part.B.append(B)
        part.scalings.append(scaling)
    return [batches for batches, _ in found.values()]


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    if p.grad.is_sparse:
        raise ValueError("a low-rank factor has a sparse gradient; use sparse=False.")
    return p.grad


def _of(part: Part) -> range:
    return range(part.blocks)
