"""Base weights that decay with their adapters: in full mode weight decay acts on W, Eq. (58).

They lie in a parameter group of their own, of the role ``"base"``. No adapter file carries them:
the optimizer's state dict does, and ``lorapro.export_guard`` warns who saves an adapter alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lorapro.distributed.sharding import local
from lorapro.live import Places

__all__ = ["BASE", "WEIGHT", "base_group", "bases_to_move", "decay_bases", "drop_weights"]

logger = logging.getLogger(__name__)

BASE = "base"
WEIGHT = "weight"  # of the state: the weight itself, while a state dict is written or read


def bases_to_move(group: dict[str, Any], groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    """The base weights of a group's pairs that lie in none of the groups yet.

    Raises:
        ValueError: one that cannot be scaled.
    """
    for pair in group["pairs"]:
        if pair.base is None:
            raise ValueError(
                f"weight decay in full mode scales the base weight (Eq. 58), but that of "
                f"{pair.name!r} cannot be scaled (none was given, or it is quantized or made "
                "anew in every forward pass); use weight_decay=0 or mode='efficient'."
            )
    logger.warning(
        "full mode with weight decay changes the base weights, which an adapter saved alone "
        "does not carry: save the merged model (lorapro.save_merged)."
    )
    known = {id(p) for g in groups if g["role"] == BASE for p in g["params"]}
    bases = [pair.base for pair in group["pairs"] if id(pair.base) not in known]
    return list({id(base): base for base in bases}.values())


def base_group(
    bases: list[Tensor], group: dict[str, Any], options: Sequence[str]
) -> dict[str, Any]:
    """A group of base weights with the options of the group of their pairs."""
    made: dict[str, Any] = {"params": bases, "role": BASE, **{k: group[k] for k in options}}
    if group.get("places"):
        from lorapro.export_guard import guard_saving

        made["places"] = Places(group["places"].model, bases)
        guard_saving(group["places"].model)
    return made


def decay_bases(group: dict[str, Any]) -> None:
    """``W0 ← (1 − γλ)·W0``."""
    if group["weight_decay"]:
        torch._foreach_mul_(local(group["params"]), 1 - group["lr"] * group["weight_decay"])
        for p in group["params"]:
            p.lorapro_decayed = True  # read when an adapter is exported without its base


def drop_weights(optimizer: Optimizer) -> None:
    """Take the base weights out of the state again."""
    for group in optimizer.param_groups:
        if group["role"] == BASE:
            for p in group["params"]:
                optimizer.state.pop(p, None)
