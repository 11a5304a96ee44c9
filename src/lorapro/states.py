"""What a saved state is a state of: described when it is saved, compared when it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorapro.factors import LoraPair

__all__ = ["DESCRIBED", "check_same", "describe"]

DESCRIBED = ("names", "scalings", "layouts", "blocks", "shapes")


def describe(pairs: Sequence[LoraPair]) -> dict[str, list[Any]]:
    """What stands for the pairs of a group in a state dict.

    ``shapes`` are (r, m, n): rank, and rows and columns of the weight.
    """
    return {
        "names": [p.name for p in pairs],
        "scalings": [p.scaling for p in pairs],
        "layouts": [p.layout for p in pairs],
        "blocks": [p.blocks for p in pairs],
        "shapes": [[p.rank, *p.shape] for p in pairs],
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
                raise ValueError(
                    f"the saved state is that of {_rule(saved)}, this optimizer runs "
                    f"{_rule(group)}; build the same optimizer to go on from it."
                )
            if saved.get("x", group["x"]) != group["x"]:
                raise ValueError(
                    f"the saved state is that of x={saved['x']!r}, this optimizer has "
                    f"x={group['x']!r}; build the same optimizer to go on from it."
                )
            _check_shapes(saved, group["pairs"])


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


def _rule(group: dict[str, Any]) -> str:
    """Which rule keeps the state of a group of pairs; torch's own AdamW and SGD are known too."""
    if "mode" in group:
        old = ", steady (moments in units that are gone, see damping)"
        return f"AdamW, mode {group['mode']!r}" + (old if group.get("steady") else "")
    if "betas" in group:
        if "momentum" in group:
            return f"Muon, polar={group.get('polar', 'whole')!r}"  # older states have no polar
        return "AdamW, mode 'efficient'"
    return "SGD"
