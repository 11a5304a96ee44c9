"""Pairs of one shape stacked into batches.

Shape letters: m, n rows and columns of W; r rank; k matrices in a stack.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorapro.factors import as_A, as_B, from_A, from_B

__all__ = [
    "Bucket",
    "buckets",
    "in_parts",
    "keep_freed_memory",
    "plain_gradients",
]

# Elements of factors and gradients that are stepped at a time. Larger parts need more temporary
# memory; smaller ones repeat the r×r algebra more often.
MOST_ELEMENTS = 1 << 23


def keep_freed_memory() -> None:
    """Let the C library keep what a step frees for the next step.

    glibc returns large blocks to the system when they are freed, and each step would then pay a
    page fault for every 4 KiB it gets anew. Its limits follow the largest block freed so far, up
    to 32 MiB (mallopt(3), M_MMAP_THRESHOLD), so freeing one of 31 MiB, never written to, is enough.
    Training itself usually frees larger ones. Elsewhere it does nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


class Bucket(NamedTuple):
    """Pairs of one shape: their parameters, and the stacks (k, r, n) and (k, m, r)."""

    params_A: list[Tensor]
    params_B: list[Tensor]
    layout: str
    blocks: int
    A: Tensor
    B: Tensor
    grad_A: Tensor | None
    grad_B: Tensor | None
    scaling: float | Tensor
    both_A: Tensor | None  # (k, 2r, n): grad_A over A, of which the two are views

    @property
    def elements(self) -> int:
        """Numbers in factors and gradients."""
        return 2 * (self.A.numel() + self.B.numel())

    @property
    def s(self) -> Tensor:
        """The scaling of every matrix, (k, 1, 1) in float64."""
        s = torch.as_tensor(self.scaling, dtype=torch.float64, device=self.A.device)
        return s.expand(len(self.A))[:, None, None]

    @property
    def moves(self) -> tuple[bool, bool]:
        """Which of A and B have a gradient."""
        return self.grad_A is not None, self.grad_B is not None

    def split(self, which: Tensor) -> tuple[Bucket | None, Bucket | None]:
        """The pairs all of whose matrices are in ``which`` (k,), and the others."""
        whole = which.view(-1, self.blocks).all(1)
        return self._part(whole), self._part(~whole)

    def _part(self, pairs: Tensor) -> Bucket | None:
        if not pairs.any():
            return None
        if pairs.all():
            return self
        rows = pairs.repeat_interleave(self.blocks).nonzero().flatten()
        both = None if self.both_A is None else self.both_A[rows]
        r = self.A.shape[-2]
        return self._replace(
            params_A=[p for p, here in zip(self.params_A, pairs.tolist(), strict=True) if here],
            params_B=[p for p, here in zip(self.params_B, pairs.tolist(), strict=True) if here],
            A=self.A[rows] if both is None else both[:, r:],
            B=self.B[rows],
            grad_A=both[:, :r] if both is not None else self.grad_A,
            grad_B=None if self.grad_B is None else self.grad_B[rows],
            scaling=self.scaling[rows] if isinstance(self.scaling, Tensor) else self.scaling,
            both_A=both,
        )

    @property
    def fits_batched(self) -> bool:
        """Whether ``align_batched`` takes it: single precision, both gradients, on the CPU.

        Elsewhere its look at the condition of the factors would wait for the device.
        """
        narrow = self.A.dtype != torch.float64 and self.B.dtype != torch.float64
        return self.both_A is not None and narrow and self.A.device.type == "cpu"

    def stack_A(self, tensors: list[Tensor]) -> Tensor:
        """A-shaped tensors, one a pair, as (k, r, n)."""
        return _stack(tensors, self.layout, self.blocks, as_A)

    def stack_B(self, tensors: list[Tensor]) -> Tensor:
        """B-shaped tensors, one a pair, as (k, m, r)."""
        return _stack(tensors, self.layout, self.blocks, as_B)

    def unstack_A(self, d: Tensor) -> list[Tensor]:
        """(k, r, n) back to tensors like each A, in its dtype."""
        return self._unstack(d, self.params_A, from_A)

    def unstack_B(self, d: Tensor) -> list[Tensor]:
        """(k, m, r) back to tensors like each B, in its dtype."""
        return self._unstack(d, self.params_B, lambda part, B: from_B(part, B, self.layout))

    def _unstack(self, d: Tensor, like: list[Tensor], back: Any) -> list[Tensor]:
        d = d.to(like[0].dtype)
        if self.layout == "matrix" and like[0].dim() == 2:
            return list(d.unbind())  # stored as they are, without a view for each
        return [back(part, p) for part, p in zip(d.split(self.blocks), like, strict=True)]

    def by_parameter(
        self, d_A: Tensor | None, d_B: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(parameters, directions) with the directions unstacked; ``None`` is left out."""
        params: list[Tensor] = []
        directions: list[Tensor] = []
        if d_A is not None:
            params += self.params_A
            directions += self.unstack_A(d_A)
        if d_B is not None:
            params += self.params_B
            directions += self.unstack_B(d_B)
        return params, directions


def buckets(group: dict[str, Any]) -> Iterator[Bucket]:
    """Stack the pairs of a group by shape, dtype, device, layout and which gradients exist.

    Pairs without any gradient are left out.

    Raises:
        RuntimeError: a sparse gradient.
    """
    rows: dict[tuple[Any, ...], list[int]] = {}
    params = group["params"]
    grads = [p.grad for p in params]
    for i, (A, B, g_A, g_B, layout, blocks) in enumerate(
        zip(
            params[::2],
            params[1::2],
            grads[::2],
            grads[1::2],
            group["layouts"],
            group["blocks"],
            strict=True,
        )
    ):
        if g_A is None and g_B is None:
            continue
        if (g_A is not None and g_A.is_sparse) or (g_B is not None and g_B.is_sparse):
            raise RuntimeError(
                f"pair {group['names'][i]!r} has a sparse gradient; build the embedding with "
                "sparse=False."
            )
        key = (A.shape, B.shape, A.dtype, B.dtype, A.device, layout, blocks)
        rows.setdefault((*key, g_A is None, g_B is None), []).append(i)
    for key, members in rows.items():
        size = params[2 * members[0]].numel() + params[2 * members[0] + 1].numel()
        at_once = max(1, MOST_ELEMENTS // (2 * size))
        for first in range(0, len(members), at_once):
            yield _bucket(group, grads, key, members[first : first + at_once])


def _bucket(
    group: dict[str, Any],
    grads: list[Tensor | None],
    key: tuple[Any, ...],
    members: list[int],
) -> Bucket:
    *_, layout, blocks, no_A, no_B = key
    params = group["params"]
    params_A, params_B = [params[2 * i] for i in members], [params[2 * i + 1] for i in members]
    values = [group["scalings"][i] for i in members]
    scaling: float | Tensor = values[0]
    if any(v != values[0] for v in values):
        repeated = [v for v in values for _ in range(blocks)]
        scaling = torch.tensor(repeated, dtype=torch.float64, device=params_A[0].device)
    both = grad_A = grad_B = None
    if no_A or no_B:
        A = _stack(params_A, layout, blocks, as_A)
    else:
        mixed: list[Any] = [t for i in members for t in (grads[2 * i], params[2 * i])]
        if layout == "matrix":
            r = params_A[0].shape[0]
            both = torch.cat(mixed).reshape(len(members), 2 * r, -1)  # channels_last: a copy
        else:
            pairs = zip(mixed[::2], mixed[1::2], strict=True)
            both = torch.cat(
                [torch.cat([as_A(t, layout, blocks) for t in pair], 1) for pair in pairs]
            )
            r = both.shape[1] // 2
        grad_A, A = both[:, :r], both[:, r:]
    if no_B:
        grad_A = _stack([grads[2 * i] for i in members], layout, blocks, as_A)
    else:
        grad_B = _stack([grads[2 * i + 1] for i in members], layout, blocks, as_B)
    B = _stack(params_B, layout, blocks, as_B)
    return Bucket(params_A, params_B, layout, blocks, A, B, grad_A, grad_B, scaling, both)


def _stack(tensors: list[Any], layout: str, blocks: int, view: Any) -> Tensor:
    if layout == "matrix":
        first = tensors[0]
        stacked = torch.cat(tensors)
        return stacked.reshape(len(tensors), first.shape[0], -1).detach()
    return torch.cat([view(t.detach(), layout, blocks) for t in tensors])


def in_parts(group: dict[str, Any]) -> Iterator[list[Bucket]]:
    """Yield the buckets of a group in lists of bounded size.

    A list holds buckets of one rank that all fit ``align_batched``, or a single one that does not.
    Every pair with a gradient is in one of them. What is yielded may be used up before the next
    list is made: in memory there is one unfinished list a rank, beside the one being used.
    """
    together: dict[int, list[Bucket]] = {}
    for b in buckets(group):
        if not b.fits_batched:
            yield [b]
            continue
        rank = b.A.shape[-2]
        part = together.setdefault(rank, [])
        if part and sum(b.elements for b in part) + b.elements > MOST_ELEMENTS:
            yield together.pop(rank)
            part = together.setdefault(rank, [])
        part.append(b)
    yield from together.values()


def plain_gradients(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """(parameters, gradients) of a plain group, for every parameter with a gradient."""
    params = [p for p in group["params"] if p.grad is not None]
    return params, [p.grad for p in params]
