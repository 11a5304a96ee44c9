"""A learning rate of its own for a head that starts afresh, whatever trains the rest.

A method's rate is tuned for how it moves pretrained weights. A new head beside them takes the same
rate, and a comparison of methods at their own rates then compares heads too.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from lorapro.experiments.errors import UserError
from lorapro.live import Places

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["head_parameters", "set_head_rate"]

# Entries of groups, torch's, PEFT's and ours, that go with "params" one by one.
ONE_EACH = ("params", "param_names", "names", "scaling_factors")


def head_parameters(model: nn.Module, heads: Collection[str]) -> list[Any]:
    """Trainable parameters of the modules with one of these names, wherever a wrapper has put them.

    Raises:
        UserError: the task gives its model no new head, or that head does not train.

    >>> from torch import nn
    >>> net = nn.ModuleDict({"body": nn.Linear(3, 2), "classifier": nn.Linear(2, 2)})
    >>> [tuple(p.shape) for p in head_parameters(net, ["classifier"])]
    [(2, 2), (2,)]
    """
    found = [
        p
        for name, p in model.named_parameters()
        if p.requires_grad and not set(heads).isdisjoint(name.split("."))
    ]
    if not found:
        what = (
            f"no {' or '.join(heads)} trains" if heads else "the task gives its model no new head"
        )
        raise UserError(f"head_learning_rate: {what}; leave it out")
    return found


def set_head_rate(
    optimizer: Optimizer, model: nn.Module, heads: Collection[str], rate: float
) -> None:
    """Give the heads' parameters the learning rate ``rate``, in groups of their own.

    Call it before a scheduler is made, which takes each group's rate as that group's peak.

    >>> import torch
    >>> net = torch.nn.ModuleDict({"body": torch.nn.Linear(3, 2), "score": torch.nn.Linear(2, 2)})
    >>> optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    >>> set_head_rate(optimizer, net, ["score"], 1e-2)
    >>> [(group["lr"], len(group["params"])) for group in optimizer.param_groups]
    [(0.001, 2), (0.01, 2)]
    """
    wanted = {id(p) for p in head_parameters(model, heads)}
    for group in list(optimizer.param_groups):
        inside = [id(p) in wanted for p in group["params"]]
        if all(inside):
            group["lr"] = rate
        elif any(inside):
            part = _part(group, model, inside)
            group.update(_part(group, model, [not is_head for is_head in inside]))
            optimizer.param_groups.append({**part, "lr": rate})


def _part(group: dict[str, Any], model: nn.Module, chosen: list[bool]) -> dict[str, Any]:
    """The group with the chosen parameters alone, and what it holds of each of them."""
    part = dict(group)
    for key in ONE_EACH:
        if key in group:
            part[key] = [each for each, is_in in zip(group[key], chosen, strict=True) if is_in]
    if "places" in group:
        part["places"] = Places(model, part["params"])
    return part
