"""Options of an optimizer, refused before there is a model."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lorapro.choices import check_choice, nearest_hint
from lorapro.factors import LoraPair
from lorapro.param_groups import lora_param_groups

__all__ = ["check_options"]


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
    logger = logging.getLogger("lorapro.optim")
    level = logger.level
    logger.setLevel(logging.ERROR)  # what it logs of the options, the real one will
    try:
        cls(groups, **{"lr": 1.0, **{k: v for k, v in options.items() if k in own}})
    except TypeError as error:  # a string where a number belongs
        raise ValueError(f"{cls.__name__}: {error} ({dict(options)}).") from error
    finally:
        logger.setLevel(level)
