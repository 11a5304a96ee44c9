"""Factors that several processes hold parts of: what is summed, what changes hands, what is local.

With A split over n and B over m (``lorapro.distributed.shard_placement``) every process holds
columns of A and of ``Bᵀ``: Gram matrices are summed, all else is local. A factor that is split over
its rank, as FSDP2 does by default with A, changes hands: one exchange for all pairs gives every
process its columns, one takes results back.

Shape letters: p parameters of one shape; R rows of a stored factor; N its columns; r rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorapro.factors import LoraPair

__all__ = ["Sharding", "local", "sharding_of", "zeros_like_columns"]

if dist.is_available():
    from torch.distributed.tensor import DTensor, Replicate, Shard

OURS = "fully_shard(…, shard_placement_fn=lorapro.distributed.shard_placement)"


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this process holds of each tensor: the tensor itself unless it is a DTensor."""
    if not dist.is_available():
        return list(tensors)
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def chunk(length: int, parts: int, i: int) -> slice:
    """Part i of a length, cut as ``torch.chunk`` and DTensor cut it; late parts may be empty.

    >>> [chunk(5, 4, i) for i in range(4)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None), slice(5, 5, None)]
    """
    size = -(-length // parts)
    return slice(min(i * size, length), min((i + 1) * size, length))


def _size(length: int, parts: int, i: int) -> int:
    here = chunk(length, parts, i)
    return here.stop - here.start


@dataclass(frozen=True)
class Sharding:
    """How the two factors of a pair are split.

    Attributes:
        mesh: the DeviceMesh; ``None`` for ordinary tensors.
        dim: the dimension of the mesh that factors are split over; ``None`` if every process holds
            them whole.
        A_by_rows: whether A is split over its rows, the rank, and has to change hands.
        B_by_rows: whether ``Bᵀ`` is.
    """

    mesh: Any
    dim: int | None
    A_by_rows: bool
    B_by_rows: bool

    @property
    def by_rows(self) -> tuple[bool, bool]:
        """``(A_by_rows, B_by_rows)``."""
        return self.A_by_rows, self.B_by_rows

    @property
    def group(self) -> Any:
        """The processes that hold parts of one factor."""
        return self.mesh.get_group(self.dim)

    @property
    def parts(self) -> int:
        """How many they are."""
        return 1 if self.dim is None else self.mesh.size(self.dim)

    @property
    def rank(self) -> int:
        """Which one this process is."""
        return 0 if self.dim is None else self.mesh.get_local_rank(self.dim)

    def total(self, gram: Tensor) -> Tensor:
        """Sum over processes: one all-reduce."""
        if self.dim is not None:
            dist.all_reduce(gram, group=self.group)
        return gram

    def to_columns(self, X: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
        """Own rows (p, R/parts, N) of stacked factors to own columns (p, R, N/parts)."""
        w, me = self.parts, self.rank
        send = [[x[..., chunk(x.shape[-1], w, j)] for x in X] for j in range(w)]
        shapes = [
            [(len(x), _size(R, w, i), _size(x.shape[-1], w, me)) for x, R in zip(X, rows)]  # noqa: B905
            for i in range(w)
        ]
        return [torch.cat(parts, 1) for parts in zip(*self._exchange(send, shapes), strict=True)]

    def to_rows(self, X: Sequence[Tensor], columns: Sequence[int]) -> list[Tensor]:
        """Own columns (p, R, N/parts) to own rows (p, R/parts, N)."""
        w, me = self.parts, self.rank
        send = [[x[:, chunk(x.shape[1], w, i)] for x in X] for i in range(w)]
        shapes = [
            [(len(x), _size(x.shape[1], w, me), _size(N, w, j)) for x, N in zip(X, columns)]  # noqa: B905
            for j in range(w)
        ]
        return [torch.cat(parts, 2) for parts in zip(*self._exchange(send, shapes), strict=True)]

    def columns(
        self, held: Sequence[Sequence[Tensor]], side: int, rows: Sequence[int]
    ) -> list[Tensor]:
        """Own rows of factors, as they are stored and part by part, as own columns."""
        stacked = [torch.stack([t.flatten(1) for t in of_part]) for of_part in held]
        return self.to_columns([x.mT for x in stacked] if side else stacked, rows)

    def stored(
        self, X: Sequence[Tensor], side: int, columns: Sequence[int], like: Sequence[Tensor]
    ) -> list[Tensor]:
        """Own columns of every part as own rows, as they are stored."""
        rows = [t for x in self.to_rows(X, columns) for t in x]
        return [(t.mT if side else t).reshape(p.shape) for t, p in zip(rows, like, strict=True)]

    def whole(self, X: Sequence[Tensor], columns: Sequence[int]) -> list[Tensor]:
        """Own columns (k, r, N/parts) to all columns (k, r, N)."""
        if self.dim is None:
            return list(X)
        w = self.parts
        shapes = [
            [(*x.shape[:2], _size(N, w, j)) for x, N in zip(X, columns, strict=True)]
            for j in range(w)
        ]
        received = self._exchange([list(X)] * w, shapes)
        return [torch.cat(parts, 2) for parts in zip(*received, strict=True)]

    def sum_to_columns(self, X: Sequence[Tensor]) -> list[Tensor]:
        """A sum over processes of (k, r, N), of which each keeps its own columns."""
        if self.dim is None:
            return list(X)
        w, me = self.parts, self.rank
        send = [[x[..., chunk(x.shape[-1], w, j)] for x in X] for j in range(w)]
        shapes = [[(*x.shape[:2], _size(x.shape[-1], w, me)) for x in X]] * w
        received = self._exchange(send, shapes)
        return [torch.stack(parts).sum(0) for parts in zip(*received, strict=True)]

    def _exchange(
        self, send: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]]
    ) -> list[list[Tensor]]:
        """Tensors for each process to tensors from each process: one all-to-all."""
        packed = [torch.cat([x.reshape(-1) for x in to]) for to in send]
        counts = [[math.prod(shape) for shape in of] for of in shapes]
        sizes = [sum(of) for of in counts]
        out = torch.cat(packed)
        received = out.new_empty(sum(sizes))
        dist.all_to_all_single(received, out, sizes, [len(x) for x in packed], group=self.group)
        return [
            [x.view(shape) for x, shape in zip(part.split(count), of, strict=True)]
            for part, count, of in zip(received.split(sizes), counts, shapes, strict=True)
        ]


def sharding_of(pair: LoraPair, A: Tensor, B: Tensor) -> Sharding:
    """How two parameters are split; ordinary tensors are not.

    Raises:
        ValueError: a split that no step can work with, named with what to use instead.
    """
    if A.dim() < 2 or B.dim() < 2 or getattr(A, "_fsdp_flattened", False):
        raise ValueError(
            f"the factors of pair {pair.name!r} are flattened, as FSDP1 does, which is deprecated "
            f"and not supported here: shard with FSDP2, {OURS}."
        )
    if not (dist.is_available() and (isinstance(A, DTensor) or isinstance(B, DTensor))):
        return Sharding(None, None, False, False)
    if not (isinstance(A, DTensor) and isinstance(B, DTensor)):
        whole, split = "AB" if isinstance(B, DTensor) else "BA"
        raise ValueError(
            f"pair {pair.name!r}: {split} is sharded and {whole} is not, as PEFT has it under "
            f"transformers' tp_plan; shard both, {OURS}, or split base weights alone "
            "(parallelize_module)."
        )
    found = f"pair {pair.name!r}: A has placements {A.placements}, B {B.placements}"
    dims = [
        {i for i, at in enumerate(p.placements) if not isinstance(at, Replicate)} for p in (A, B)
    ]
    if A.device_mesh != B.device_mesh or dims[0] != dims[1] or len(dims[0]) > 1:
        raise ValueError(
            f"{found}; expected both split over the same one dimension of one mesh: {OURS}."
        )
    if not dims[0]:
        return Sharding(A.device_mesh, None, False, False)
    (dim,) = dims[0]
    a, b = A.placements[dim], B.placements[dim]
    if type(a) is not Shard or type(b) is not Shard or max(a.dim, b.dim) > 1:
        raise ValueError(f"{found}; expected Shard(0) or Shard(1) of each: {OURS}.")
    if pair.layout == "groups" or (pair.layout != "matrix" and b.dim == 1):
        raise ValueError(f"{found}; a pair of layout {pair.layout!r} cannot be split so.")
    return Sharding(A.device_mesh, dim, a.dim == 0, b.dim == 1)


def zeros_like_columns(
    p: Tensor, shape: Sequence[int], split: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Zeros of a shape of which one dimension is the long side of a factor, split as that is."""
    dtype = dtype or p.dtype
    if not (dist.is_available() and isinstance(p, DTensor)):
        return p.new_zeros(torch.Size(shape), dtype=dtype)
    mesh, here = p.device_mesh, list(shape)
    placements = []
    for dim, at in enumerate(p.placements):
        placements.append(Replicate() if isinstance(at, Replicate) else Shard(split))
        if not isinstance(at, Replicate):
            here[split] = _size(shape[split], mesh.size(dim), mesh.get_local_rank(dim))
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    zeros = p.to_local().new_zeros(here, dtype=dtype)
    return DTensor.from_local(
        zeros, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
