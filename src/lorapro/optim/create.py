"""One call from a PEFT model to an optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from lorapro.choices import check_choice
from lorapro.optim.adamw import LoraProAdamW
from lorapro.optim.base import PairOptimizer
from lorapro.optim.muon import LoraProMuon
from lorapro.optim.sgd import LoraProSGD
from lorapro.param_groups import lora_param_groups

__all__ = ["OPTIMIZERS", "create_lorapro_optimizer"]

OPTIMIZERS: dict[str, type[PairOptimizer]] = {
    "adamw": LoraProAdamW,
    "sgd": LoraProSGD,
    "muon": LoraProMuon,
}


def create_lorapro_optimizer(
    model: nn.Module,
    optimizer: str = "adamw",
    *,
    adapter: str | None = None,
    on_unaligned: str = "error",
    **kwargs: Any,
) -> PairOptimizer:
    """Build the optimizer for a PEFT model: its pairs aligned, all else trainable plainly.

    By default this is AdamW in efficient mode with ``steady=True``, which did best in the
    comparisons of ``results/``; :class:`LoraProAdamW` itself defaults to the paper's Algorithm 2,
    ``steady=False``.

    Args:
        model: a PEFT model with trainable LoRA layers.
        optimizer: ``"adamw"``, ``"sgd"`` or ``"muon"``.
        adapter: train this adapter only.
        on_unaligned: ``"error"`` or ``"plain"``, see ``lorapro.lora_param_groups``.
        kwargs: arguments of the optimizer: ``lr``, ``mode``, ``x``, ``weight_decay``, ``steady``, …

    Returns:
        A :class:`LoraProAdamW`, :class:`LoraProSGD` or :class:`LoraProMuon`.

    Raises:
        ValueError: an unknown optimizer, argument or value, or a model without trainable pairs.

    >>> from peft import LoraConfig, get_peft_model
    >>> net = nn.Sequential(nn.Linear(6, 4))
    >>> model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
    >>> create_lorapro_optimizer(model, mode="full", lr=1e-4).param_groups[0]["mode"]
    'full'
    >>> create_lorapro_optimizer(model, lr=5e-4).param_groups[0]["steady"]
    True
    """
    check_choice("optimizer", optimizer, OPTIMIZERS)
    if optimizer == "adamw" and kwargs.get("mode", "efficient") == "efficient":
        kwargs.setdefault("steady", True)
    groups = lora_param_groups(model, adapter=adapter, on_unaligned=on_unaligned)
    return OPTIMIZERS[optimizer](groups, **kwargs)
