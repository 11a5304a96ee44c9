"""Aligned gradients of a group of pairs, by the fastest way each pair can take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lorapro.functional import align
from lorapro.optim.batched import align_batched
from lorapro.optim.native.steps import PER_PAIR, step_pairs
from lorapro.optim.stacking import Bucket, in_parts

__all__ = ["aligned_gradients"]


@torch.no_grad()
def aligned_gradients(
    group: dict[str, Any], x: str, *, steady: bool = False, native: bool = True
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield (parameters, aligned gradients) of a pairs group, part by part.

    With ``steady`` d_A comes in units of its partner, ``(s·‖B‖/√r)·d_A``. ``native=False`` leaves
    the compiled library out, for pairs that it has refused already.
    """
    if native:
        group, params, directions = _natively_aligned(group, x, steady)
        if params:
            yield params, directions
    for part in in_parts(group):
        params, directions = [], []
        for b, (d_A, d_B) in zip(part, _aligned(part, x), strict=True):
            if steady and d_A is not None:
                d_A = d_A * _partner_size(b).to(d_A.dtype)
            p, d = b.by_parameter(d_A, d_B)
            params += p
            directions += d
        yield params, directions


def _natively_aligned(
    group: dict[str, Any], x: str, steady: bool
) -> tuple[dict[str, Any], list[Tensor], list[Tensor]]:
    """What the compiled library leaves of a group, and the pairs that it aligned."""
    made: dict[Tensor, Tensor] = {}

    def room(A: Tensor, B: Tensor) -> list[Tensor]:
        made[A], made[B] = torch.empty_like(A), torch.empty_like(B)
        return [made[A], made[B]]

    still = {**group, "x": x, "lr": 0.0, "weight_decay": 0.0}
    rest = step_pairs(still, "aligned", room, betas=(0.0, 0.0), flag=steady)
    for p in rest["params"]:
        made.pop(p, None)
    return {**group, **{k: rest[k] for k in PER_PAIR if k in rest}}, list(made), list(made.values())


def _aligned(part: list[Bucket], x: str) -> list[Any]:
    """Align buckets of one rank with their r×r algebra in common, or a single one exactly."""
    if part[0].fits_batched:
        stacks: list[Any] = [(b.both_A, b.B, b.grad_B) for b in part]
        return align_batched(stacks, [b.scaling for b in part], x)
    return [align(b.A, b.B, b.grad_A, b.grad_B, b.scaling, x=x) for b in part]


def _partner_size(b: Bucket) -> Tensor:
    """``s·‖B‖_F/√r``, (k, 1, 1) in float64."""
    B = b.B.to(torch.promote_types(b.B.dtype, torch.float32))
    return b.s * B.norm(dim=(-2, -1), keepdim=True) / B.shape[-1] ** 0.5
