"""Pairs of one shape as one batch, and back.

The optimizers see a group of pairs as a few :class:`Batches`: all pairs of one rank, precision,
device and of the same trained factors, in one part for every shape. A step computes rows
(``lorapro.gram``), one tensor a part. Of sharded factors, rows are what this process holds of them,
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
from lorapro.gram import Rows
from lorapro.point import Point, point_at

__all__ = ["OF_A", "OF_B", "Batches", "Part", "batches_of"]

OF_A, OF_B = 0, 1  # which of the two factors
# Numbers in the larger factor above which pairs of one shape are two parts on a CPU: the float64
# copies for Gram matrices then stay in the cache.
MOST_IN_A_PART = 1 << 18


@dataclass
class Part:
    """Pairs of one shape and layout.

    Attributes:
        params: the parameters of A and those of B.
        scalings: one for each pair of parameters.
    """

    layout: str
    blocks: int
    params: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))
    scalings: list[float] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of pairs of matrices."""
        return len(self.scalings) * self.blocks

    @property
    def is_full(self) -> bool:
        """Whether another pair of this shape begins a part of its own."""
        A, B = (held[0] for held in self.params)
        largest = max(A.numel(), B.numel()) * (len(self.scalings) + 1)
        return A.device.type == "cpu" and largest > MOST_IN_A_PART

    @property
    def rank(self) -> int:
        """Rank r."""
        return self.params[OF_A][0].shape[0] // (1 if self.layout == "matrix" else self.blocks)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the adapted weights."""
        n, m = (held[0].numel() // (self.rank * self.blocks) for held in self.params)
        return m, n

    def rows(self, side: int, held: Sequence[Tensor]) -> Tensor:
        """Tensors like A as (k, r, n), like B as rows of their transpose, (k, r, m)."""
        if self.layout == "matrix" and held[0].dim() == 2:
            X = torch.stack(list(held))
        else:
            view = as_B if side else as_A
            X = torch.cat([view(t, self.layout, self.blocks) for t in held])
        return X.mT if side else X

    def tensors(self, side: int, X: Tensor) -> Sequence[Tensor]:
        """Rows as tensors like what is held of the parameters."""
        X = (X.mT if side else X).to(self.params[side][0].dtype)
        if self.layout == "matrix" and self.params[side][0].dim() == 2:
            return X.unbind()
        return [
            from_B(x, like, self.layout) if side else from_A(x, like)
            for x, like in zip(X.split(self.blocks), local(self.params[side]), strict=True)
        ]

    def stored_rows(self, side: int) -> int:
        """Rows of a stored A, columns of a stored B."""
        return self.rank if side else self.params[OF_A][0].shape[0]


@dataclass
class Batches:
    """Pairs that are stepped together.

    Attributes:
        parts: one for each shape.
        moves: whether A and whether B has a gradient; one that has none stays, and the other
            solves the problem alone.
        sharding: how processes share the factors.
    """

    parts: list[Part]
    moves: tuple[bool, bool]
    sharding: Sharding

    @property
    def rank(self) -> int:
        """Rank r of all pairs."""
        return self.parts[0].rank

    def params(self, side: int) -> list[Tensor]:
        """The parameters of A or of B, part by part."""
        return [p for part in self.parts for p in part.params[side]]

    @property
    def moved(self) -> list[Tensor]:
        """The parameters that have a gradient."""
        return [p for side in (OF_A, OF_B) if self.moves[side] for p in self.params(side)]

    def rows(self, side: int, read: Callable[[Tensor], Tensor] = lambda p: p) -> Rows:
        """``read(p)`` of every pair as rows, in float32 at least."""
        held = [local([read(p) for p in part.params[side]]) for part in self.parts]
        if self.sharding.by_rows[side]:
            X = self.sharding.columns(held, side, [part.stored_rows(side) for part in self.parts])
            X = [x.reshape(p.count, p.rank, -1) for p, x in zip(self.parts, X, strict=True)]
        else:
            X = [part.rows(side, of_part) for part, of_part in zip(self.parts, held, strict=True)]
        exact = any(of[0].dtype == torch.float64 for of in self.parts[0].params)
        dtype = torch.float64 if exact else torch.float32
        return [x.to(dtype) for x in X]

    def tensors(self, side: int, X: Rows) -> list[Tensor]:
        """Rows as tensors like what is held of :meth:`params`."""
        if not self.sharding.by_rows[side]:
            return [t for p, x in zip(self.parts, X, strict=True) for t in p.tensors(side, x)]
        stacked = [
            x.to(p.params[side][0].dtype).reshape(-1, p.stored_rows(side), x.shape[-1])
            for p, x in zip(self.parts, X, strict=True)
        ]
        lengths = [part.shape[1 - side] for part in self.parts]
        return self.sharding.stored(stacked, side, lengths, local(self.params(side)))

    def moved_tensors(self, *X: Rows | None) -> list[Tensor]:
        """Rows of A and of B as tensors like :attr:`moved`."""
        return [
            t
            for side, x in enumerate(X)
            if x is not None and self.moves[side]
            for t in self.tensors(side, x)
        ]

    def gradients(self, side: int) -> Rows | None:
        """The gradients of A or of B; ``None`` if it has none."""
        return self.rows(side, _gradient) if self.moves[side] else None

    def point(self, gradients: bool = True, length: Tensor | None = None) -> Point:
        """The factors, and their gradients if they are asked for; see ``point_at``."""
        s = self.per_pair([s for p in self.parts for s in p.scalings for _ in range(p.blocks)])
        of_A, of_B = (self.gradients(side) if gradients else None for side in (OF_A, OF_B))
        return point_at(
            self.rows(OF_A), self.rows(OF_B), s, of_A, of_B, self.sharding.total, length
        )

    def means_of_B(self, rows: Rows) -> Tensor:
        """Means of numbers (k, m), one for each row of B: (k, 1, 1) in float64."""
        sums = self.sharding.total(torch.cat([row.sum(-1, dtype=torch.float64) for row in rows]))
        return sums[:, None, None] / self.per_part(lambda shape: shape[0])

    def per_pair(self, values: Sequence[float]) -> Tensor:
        """A number for every pair of matrices, (k, 1, 1) in float64."""
        where = self.parts[0].params[OF_A][0].device
        return torch.tensor(values, dtype=torch.float64, device=where)[:, None, None]

    def per_part(self, value: Callable[[tuple[int, int]], float]) -> Tensor:
        """A number that depends on the shape (m, n), for every pair of matrices, (k, 1, 1)."""
        return self.per_pair([v for p in self.parts for v in [value(p.shape)] * p.count])

    def per_matrix(self, per_parameter: Sequence[Tensor]) -> Tensor:
        """Scalars of the parameters B as one for every pair of matrices, (k, 1, 1) in float64."""
        values = torch.stack(list(per_parameter)).double()
        blocks = [part.blocks for part in self.parts for _ in part.scalings]
        if max(blocks) > 1:
            values = torch.cat([v.expand(b) for v, b in zip(values.split(1), blocks, strict=True)])
        return values[:, None, None]


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
            "something put others in their place; build the optimizer or hook after that."
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
        batches, open_parts = found.setdefault(together, (Batches([], moves, sharding), {}))
        alike = pair.layout, pair.blocks, A.shape, B.shape
        part = open_parts.get(alike)
        if part is None or part.is_full:
            part = open_parts[alike] = Part(pair.layout, pair.blocks)
            batches.parts.append(part)
        for held, p in zip(part.params, (A, B), strict=True):
            held.append(p)
        part.scalings.append(scaling)
    return [batches for batches, _ in found.values()]


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    if p.grad.is_sparse:
        raise ValueError("a low-rank factor has a sparse gradient; use sparse=False.")
    return p.grad
