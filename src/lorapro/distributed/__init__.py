"""Training with many processes: placements for FSDP2, sharded factors, DeepSpeed."""

from __future__ import annotations

from lorapro.distributed.placement import shard_placement

__all__ = ["shard_placement"]
