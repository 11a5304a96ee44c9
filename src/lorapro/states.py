"""Saving and loading the state of optimizers on pairs.

What a state is a state of is described when it is saved, and compared when it is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lorapro.bases import BASE, WEIGHT, drop_weights
from lorapro.factors import LoraPair

__all__ = ["Resumable", "check_held", "check_same", "describe"]

SAME = "build the same optimizer to go on from it"
DESCRIBED = ("names", "scalings", "layouts", "blocks", "shapes", "momenta")
# What describes the model rather than the run: kept from the live optimizer when a state is loaded.
STRUCTURE = ("role", "pairs", "names", "places", "unaligned")


class Resumable(Optimizer):
    """An optimizer whose state dict says which pairs it belongs to."""

    def state_dict(self) -> dict[str, Any]:
        """As torch's; decayed base weights ride along, since no adapter file carries them."""
        for group in self.param_groups:
            if group["role"] == BASE:
                for p in group["params"]:
                    self.state[p][WEIGHT] = p.detach()
        packed = super().state_dict()
        drop_weights(self)
        for group in packed["param_groups"]:
            group.pop("places", None)
            if "pairs" in group:
                group |= describe(group.pop("pairs"))
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's. Pairs keep the scalings of the live model.

        Raises:
            ValueError: the state was saved for other pairs, ranks, shapes, or another mode or x.
        """
        live = [{k: g[k] for k in STRUCTURE if k in g} for g in self.param_groups]
        check_same(state_dict, self.param_groups)
        super().load_state_dict(state_dict)
        keep_float32(self, state_dict)
        for group, own in zip(self.param_groups, live, strict=True):
            for key in DESCRIBED:
                group.pop(key, None)
            group.update(own)
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            if group["role"] == BASE:
                for p in group["params"]:
                    if WEIGHT in self.state.get(p, {}):
                        p.copy_(self.state[p][WEIGHT])
        drop_weights(self)


def describe(pairs: Sequence[LoraPair]) -> dict[str, list[Any]]:
    """What stands for the pairs of a group in a state dict.

    ``shapes`` are (r, m, n): rank, and rows and columns of the weight; ``momenta`` tells states
    of the rules of today from older ones.
    """
    return {
        "names": [p.name for p in pairs],
        "scalings": [p.scaling for p in pairs],
        "layouts": [p.layout for p in pairs],
        "blocks": [p.blocks for p in pairs],
        "shapes": [[p.rank, *p.shape] for p in pairs],
        "momenta": ["of gradients"],
    }


def check_same(state: dict[str, Any], groups: Sequence[dict[str, Any]]) -> None:
    """Refuse a state dict that was saved of something else.

    Args:
        state: the state dict.
        groups: the groups of the optimizer that is to take it.

    Raises:
        ValueError: names the first parameter, shape, mode or x that differs.
    """
    for saved, group in zip(state["param_groups"], groups, strict=False):
        _check_names(saved, group)
        if state["state"] and "pairs" in group:
            if _rule(saved) != _rule(group):
                then = "begin a new one from the saved adapter" if "gone" in _rule(saved) else SAME
                raise ValueError(
                    f"the saved state is that of {_rule(saved)}, this optimizer runs "
                    f"{_rule(group)}; {then}."
                )
            if saved.get("x", group["x"]) != group["x"] and _sees_x(group):
                raise ValueError(
                    f"the saved state is that of x={saved['x']!r}, this optimizer has "
                    f"x={group['x']!r}; {SAME}."
                )
            _check_shapes(saved, group["pairs"])


def check_held(held: Tensor | None, p: Tensor, shape: Sequence[int], called: str) -> None:
    """Refuse a state that is not there or does not go with its parameter.

    Args:
        held: an entry of the state; ``None`` if there is none.
        p: the parameter.
        shape: what the entry's shape must be.
        called: what entry of what parameter it is, for the message.

    Raises:
        ValueError: says what was found and expected.
    """
    if held is None:
        raise ValueError(f"the state loaded has no {called}: it is another optimizer's, or a part.")
    whole = hasattr(p, "placements") and not hasattr(held, "placements")
    if held.shape != torch.Size(shape) or whole:
        kind = " of a DTensor" if whole else ""
        raise ValueError(
            f"{called} is {tuple(held.shape)}, expected {tuple(shape)}{kind}: the state loaded was "
            "saved for another model, rank or sharding."
        )
    exact = p.dtype == torch.float16 and held.dtype == torch.float32
    if held.device != p.device or not (held.dtype == p.dtype or exact):
        raise ValueError(
            f"{called} is {held.dtype} on {held.device}, the parameter {p.dtype} on {p.device}: it "
            "was moved by model.to(…) after a step. Build a new optimizer and load this one's "
            "state_dict."
        )


def keep_float32(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Undo torch's cast of float32 state to the dtype of a parameter that does not hold it.

    float16 does not hold second moments, bfloat16 no average of row or column means.
    """
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        for key, p in zip(saved["params"], group["params"], strict=True):
            for name, value in state["state"].get(key, {}).items():
                small = p.dtype == torch.float16
                small |= p.dtype == torch.bfloat16 and name.endswith("_means")
                if small and isinstance(value, Tensor) and value.dtype == torch.float32:
                    where = optimizer.state[p][name].device
                    optimizer.state[p][name] = value.detach().to(where, copy=True)


def _check_names(saved: dict[str, Any], group: dict[str, Any]) -> None:
    here = [p.name for p in group["pairs"]] if "pairs" in group else group.get("names")
    if "names" in saved and saved["names"] != here:
        differ = [
            f"{a!r} (saved) and {b!r} (here)"
            for a, b in zip(saved["names"], here or [], strict=False)
            if a != b
        ]
        raise ValueError(
            "the saved state belongs to other parameters: "
            + (differ[0] if differ else "their numbers differ")
            + ". Load it into an optimizer built for the same model and adapter."
        )


def _check_shapes(saved: dict[str, Any], pairs: Sequence[LoraPair]) -> None:
    for pair, shape in zip(pairs, saved.get("shapes", ()), strict=False):
        here = [pair.rank, *pair.shape]
        if list(shape) != here:
            (r, m, n), (rank, rows, columns) = shape, here
            raise ValueError(
                f"the saved state of pair {pair.name!r} is that of rank {r} on a weight of {m} × "
                f"{n}, here it has rank {rank} on {rows} × {columns}: it was saved for another "
                "model or rank."
            )


def _sees_x(group: dict[str, Any]) -> bool:
    """Whether the choice of X changes what a group does: not so in factored mode and Muon."""
    return group.get("mode") != "factored" and not {"momentum", "betas"} <= set(group)


def _rule(group: dict[str, Any]) -> str:
    """Which rule keeps the state of a group of pairs; torch's own AdamW and SGD are known too."""
    is_new = {"pairs", "momenta"} & set(group)
    old = "" if is_new else ", of a rule that is gone (its momentum or the length of its steps)"
    if "mode" in group:
        if group.get("steady"):
            old = ", steady (moments in units that are gone, see damping)"
        elif group["mode"] != "factored":
            old = ""
        return f"AdamW, mode {group['mode']!r}{old}"
    if "betas" in group:
        return f"Muon{old}" if "momentum" in group else "AdamW, mode 'efficient'"
    return "SGD"
