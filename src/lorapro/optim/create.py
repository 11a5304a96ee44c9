"""One call from a PEFT model to an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorapro.choices import check_choice
from lorapro.optim.adamw import LoraProAdamW
from lorapro.optim.base import PairOptimizer
from lorapro.optim.muon import LoraProMuon
from lorapro.optim.sgd import LoraProSGD
from lorapro.options import check_options
from lorapro.param_groups import lora_param_groups

__all__ = ["OPTIMIZERS", "create_lorapro_optimizer", "optimizer_class"]

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
    cls = optimizer_class(optimizer)
    check_options(cls, {**options, "on_unaligned": on_unaligned})
    return cls(lora_param_groups(model, adapter=adapter, on_unaligned=on_unaligned), **options)


def optimizer_class(name: str) -> type[PairOptimizer]:
    """The optimizer of a name; an unknown one is a ``ValueError``."""
    return OPTIMIZERS[check_choice("optimizer", name, OPTIMIZERS)]
