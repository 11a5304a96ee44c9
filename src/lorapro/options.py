"""Options of an optimizer that are refused, before there is a model."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorapro.choices import check_choice, nearest_hint
from lorapro.factors import LoraPair
from lorapro.param_groups import lora_param_groups

__all__ = ["check_numbers", "check_options"]


def check_numbers(options: Mapping[str, Any]) -> None:
    """Refuse numbers out of range.

    Raises:
        ValueError: says what was found and expected.
    """
    lr = options["lr"]
    if isinstance(lr, Tensor) and lr.dim():
        raise ValueError(f"lr is a tensor of shape {tuple(lr.shape)}, expected one without any.")
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr is {lr}, expected a positive finite learning rate.")
    for name in ("weight_decay", "eps"):
        if not options.get(name, 0) >= 0:
            raise ValueError(f"{name} is {options[name]}, expected 0 or more.")
    if not 0 <= options.get("momentum", 0) < 1:
        found = options["momentum"]
        raise ValueError(f"momentum is {found}, expected 0 or more and below 1.")
    found = options.get("betas", (0.0, 0.0))
    if len(found) != 2 or not all(0 <= beta < 1 for beta in found):
        raise ValueError(f"betas are {found}, expected two numbers of 0 or more and below 1.")
    if not 0 <= options["damping"] < float("inf"):
        raise ValueError(f"damping is {options['damping']}, expected 0 or more steps.")


def check_options(cls: type[Optimizer], options: Mapping[str, Any]) -> None:
    """Refuse names and values that building an optimizer would refuse, without a model.

    Args:
        cls: an optimizer of this package.
        options: keyword arguments of ``lorapro.create_lorapro_optimizer``.

    Raises:
        ValueError: a name it does not take, with the nearest one that it does, or a value out of
            range.

    >>> from lorapro import LoraProAdamW
    >>> check_options(LoraProAdamW, {"wieght_decay": 0.1})
    Traceback (most recent call last):
        ...
    ValueError: unknown option 'wieght_decay' of LoraProAdamW (did you mean 'weight_decay'?); \
expected one of: adapter, on_unaligned, lr, betas, eps, weight_decay, mode, x, damping
    """
    own = list(inspect.signature(cls).parameters)[1:]  # all but params
    known = ["adapter", "on_unaligned", *own]
    for name in options:
        if name not in known:
            raise ValueError(
                f"unknown option {name!r} of {cls.__name__}{nearest_hint(name, known)}; expected "
                f"one of: {', '.join(known)}"
            )
    check_choice("on_unaligned", options.get("on_unaligned", "error"), ("error", "plain"))
    A, B, W = (nn.Parameter(torch.zeros(1, 1)) for _ in range(3))
    groups = lora_param_groups(None, pairs=[LoraPair("options", A, B, 1.0, base=W)])
    logger = logging.getLogger("lorapro")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what it logs of the options, the real one will
    try:
        cls(groups, **{"lr": 1.0, **{k: v for k, v in options.items() if k in own}})
    except TypeError as error:  # a string where a number belongs
        raise ValueError(f"{cls.__name__}: {error} ({dict(options)}).") from error
    finally:
        logger.setLevel(level)
