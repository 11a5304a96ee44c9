"""How FSDP2 should split factors."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

__all__ = ["shard_placement"]


def shard_placement(parameter: nn.Parameter) -> Any:
    """Where FSDP2 splits a parameter: A over n, B over m, all else over its first dimension.

    For ``fully_shard(module, shard_placement_fn=lorapro.distributed.shard_placement)``. A step then
    exchanges (r, r) Gram matrices only. With FSDP2's default, A is split over its rank and changes
    hands in every step, which gives the same result.

    A is what is trained, has two or more dimensions, and more columns than rows. FSDP2 splits
    columns evenly or not at all: where the number of processes does not divide n, the default is
    taken.

    Args:
        parameter: any parameter.

    Returns:
        ``Shard(1)``, or ``None`` for FSDP2's default.

    >>> import torch
    >>> shard_placement(nn.Parameter(torch.zeros(2, 8)))
    Shard(dim=1)
    >>> shard_placement(nn.Parameter(torch.zeros(8, 2)))
    """
    from torch.distributed.tensor import Shard

    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    wide = parameter.dim() >= 2 and parameter[0].numel() > parameter.shape[0]
    if parameter.requires_grad and wide and parameter.shape[1] % world == 0:
        return Shard(1)
    return None
