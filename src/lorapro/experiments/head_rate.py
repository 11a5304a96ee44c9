"""A learning rate of its own for weights that start afresh, such as a new head's.

A method's rate is tuned for how it moves pretrained weights. A new head beside them takes the same
rate, and a comparison of methods at their own rates then compares the rates of heads too.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from lorapro.experiments.errors import UserError
from lorapro.live import Places

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["new_among", "set_rate_of"]

# Entries of groups, torch's, PEFT's and ours, that go with "params" one by one.
ONE_EACH = ("params", "param_names", "names", "scaling_factors")


def new_among(model: nn.Module, new: Collection[str]) -> list[Any]:
    """Trainable parameters of ``model`` that no checkpoint has set.

    Args:
        model: with or without PEFT's wrappers, which keep a copy of a module to train in full.
        new: names of the parameters, in the model before it was wrapped.

    Raises:
        UserError: there is none.

    >>> from torch import nn
    >>> net = nn.ModuleDict({"body": nn.Linear(3, 2), "classifier": nn.Linear(2, 2)})
    >>> [tuple(p.shape) for p in new_among(net, ["classifier.weight", "classifier.bias"])]
    [(2, 2), (2,)]
    """
    found = [p for name, p in model.named_parameters() if p.requires_grad and _plain(name) in new]
    if not found:
        raise UserError(
            "head_learning_rate: nothing that trains starts afresh, the model has a head for these "
            "labels; leave it out"
        )
    return found


def _plain(name: str) -> str:
    """Name of a parameter before PEFT wrapped its model."""
    parts = name.removeprefix("base_model.model.").split(".")
    if "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        del parts[at : at + 2]  # and the adapter's name
    return ".".join(parts)


def set_rate_of(optimizer: Optimizer, model: nn.Module, new: Collection[str], rate: float) -> None:
    """Give what starts afresh (see :func:`new_among`) the rate ``rate``, in groups of its own.

    Call it before a scheduler is made, which takes each group's rate as that group's peak.

    Raises:
        UserError: nothing starts afresh, or the optimizer does not train all of it.

    >>> import torch
    >>> net = torch.nn.ModuleDict({"body": torch.nn.Linear(3, 2), "score": torch.nn.Linear(2, 2)})
    >>> optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    >>> set_rate_of(optimizer, net, ["score.weight", "score.bias"], 1e-2)
    >>> [(group["lr"], len(group["params"])) for group in optimizer.param_groups]
    [(0.001, 2), (0.01, 2)]
    """
    wanted = {id(p) for p in new_among(model, new)}
    found = 0
    for group in list(optimizer.param_groups):
        inside = [id(p) in wanted for p in group["params"]]
        found += sum(inside)
        if not any(inside):
            continue
        if all(inside):
            group["lr"] = rate
            continue
        part = _part(group, model, inside)
        group.update(_part(group, model, [not is_new for is_new in inside]))
        optimizer.param_groups.append({**part, "lr": rate})
    if found < len(wanted):
        raise UserError(
            f"head_learning_rate: {type(optimizer).__name__} trains {found} of the {len(wanted)} "
            "parameters that start afresh; leave it out"
        )


def _part(group: dict[str, Any], model: nn.Module, chosen: list[bool]) -> dict[str, Any]:
    """The group with the chosen parameters alone, and what it holds of each of them."""
    part = dict(group)
    for key in ONE_EACH:
        if key in group:
            part[key] = [each for each, is_in in zip(group[key], chosen, strict=True) if is_in]
    if "places" in group:
        part["places"] = Places(model, part["params"])
    return part
