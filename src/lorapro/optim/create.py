"""One call from a PEFT model to an optimizer."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lorapro.choices import check_choice, nearest_hint
from lorapro.factors import LoraPair
from lorapro.optim.adamw import LoraProAdamW
from lorapro.optim.base import PairOptimizer
from lorapro.optim.muon import LoraProMuon
from lorapro.optim.sgd import LoraProSGD
from lorapro.param_groups import lora_param_groups

__all__ = ["OPTIMIZERS", "check_options", "create_lorapro_optimizer"]

OPTIMIZERS: dict[str, type[PairOptimizer]] = {
    "adamw": LoraProAdamW,
    "sgd": LoraProSGD,
    "muon": LoraProMuon,
}


def create_lorapro_optimizer(
    model: nn.Module,
    optimizer: str = "adamw",
    *,
    lr: float | torch.Tensor | None = None,
    adapter: str | None = None,
    on_unaligned: str = "error",
    **kwargs: Any,
) -> PairOptimizer:
    """Build the optimizer for a PEFT model: its pairs aligned, all else trainable plainly.

    By default this is AdamW in efficient mode, the paper's Algorithm 2.

    Args:
        model: a PEFT model with trainable LoRA layers.
        optimizer: ``"adamw"``, ``"sgd"`` or ``"muon"``.
        lr: learning rate; ``None`` takes that of ``lorapro.rates`` for the optimizer and mode, and
            logs it.
        adapter: train this adapter only.
        on_unaligned: ``"error"`` or ``"plain"``, see ``lorapro.lora_param_groups``.
        kwargs: arguments of the optimizer: ``mode``, ``x``, ``weight_decay``, ``damping``, …

    Returns:
        A :class:`LoraProAdamW`, :class:`LoraProSGD` or :class:`LoraProMuon`.

    Raises:
        ValueError: an unknown optimizer, argument or value, or a model without trainable pairs.

    >>> from peft import LoraConfig, get_peft_model
    >>> net = nn.Sequential(nn.Linear(6, 4))
    >>> model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
    >>> create_lorapro_optimizer(model, mode="full", lr=1e-4).param_groups[0]["mode"]
    'full'
    >>> create_lorapro_optimizer(model, lr=5e-4)
    LoraProAdamW(
        pairs (1 of rank 2): lr=0.0005, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, \
mode='efficient', x='sylvester', damping=0.0
    )
    """
    options = dict(kwargs) if lr is None else {"lr": lr, **kwargs}
    check_options(optimizer, {**options, "on_unaligned": on_unaligned})
    groups = lora_param_groups(model, adapter=adapter, on_unaligned=on_unaligned)
    return OPTIMIZERS[optimizer](groups, **options)


def check_options(optimizer: str, options: Mapping[str, Any]) -> None:
    """Refuse names and values that building the optimizer would refuse, without a model.

    Args:
        optimizer: ``"adamw"``, ``"sgd"`` or ``"muon"``.
        options: keyword arguments of :func:`create_lorapro_optimizer`.

    Raises:
        ValueError: an unknown optimizer, a name it does not take, with the nearest one that it
            does, or a value out of range.

    >>> check_options("adamw", {"wieght_decay": 0.1})
    Traceback (most recent call last):
        ...
    ValueError: unknown option 'wieght_decay' of LoraProAdamW (did you mean 'weight_decay'?); \
expected one of: adapter, on_unaligned, lr, betas, eps, weight_decay, mode, x, damping
    """
    check_choice("optimizer", optimizer, OPTIMIZERS)
    cls = OPTIMIZERS[optimizer]
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
