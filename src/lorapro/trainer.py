"""Glue for Hugging Face ``Trainer`` and TRL's trainers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorapro.choices import check_choice
from lorapro.optim.create import OPTIMIZERS, create_lorapro_optimizer

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

    from lorapro.optim.base import PairOptimizer

__all__ = ["LoraProFactory", "trainer_optimizer"]


class LoraProFactory:
    """What ``Trainer`` calls as ``factory()(model, **kwargs)`` to get its optimizer."""

    def __call__(self, model: nn.Module, **kwargs: Any) -> PairOptimizer:
        """Build the optimizer for the model that Trainer has prepared."""
        return create_lorapro_optimizer(model, **kwargs)


def trainer_optimizer(
    args: TrainingArguments, optimizer: str = "adamw", **kwargs: Any
) -> tuple[type[LoraProFactory], dict[str, Any]]:
    """The value for ``Trainer(optimizer_cls_and_kwargs=…)``, also in ``SFTTrainer``.

    Learning rate, weight decay and, where AdamW is part of it, betas and epsilon come from
    ``args``; warmup and schedules work as ever.

    Args:
        args: the ``TrainingArguments`` (or ``SFTConfig``) given to the trainer.
        optimizer: ``"adamw"``, ``"sgd"`` or ``"muon"``.
        kwargs: ``mode``, ``x``, ``adapter``, ``on_unaligned``, or anything that the optimizer
            takes and that should not come from ``args``.

    Returns:
        ``(factory, kwargs)``.

    Raises:
        ValueError: a non-positive learning rate or an unknown optimizer.

    >>> from transformers import TrainingArguments
    >>> args = TrainingArguments(output_dir="out", learning_rate=1e-4, report_to=[])
    >>> factory, kwargs = trainer_optimizer(args, mode="full")
    >>> kwargs["lr"], kwargs["mode"]
    (0.0001, 'full')
    """
    check_choice("optimizer", optimizer, OPTIMIZERS)
    if not args.learning_rate > 0:
        raise ValueError(f"learning_rate is {args.learning_rate}, expected a positive number.")
    options: dict[str, Any] = {
        "optimizer": optimizer,
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
    }
    if optimizer != "sgd":
        options |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return LoraProFactory, {**options, **kwargs}
