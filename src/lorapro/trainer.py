"""Glue for Hugging Face ``Trainer`` and its subclasses, TRL's trainers among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from lorapro.choices import check_choice
from lorapro.distributed.zero import refuse_modes
from lorapro.optim.create import OPTIMIZERS, create_lorapro_optimizer, optimizer_class
from lorapro.options import check_options
from lorapro.param_groups import lora_param_groups
from lorapro.rates import chosen_rate

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer, TrainingArguments

    from lorapro.optim.base import PairOptimizer

    AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)

__all__ = ["LoraProFactory", "trainer_optimizer", "use_lorapro"]

# TRL's default for supervised fine-tuning of all weights. A trainer whose own default is lower
# (1e-6 for DPO, GRPO and the like) takes as much smaller steps, and so do we: not measured.
SUPERVISED_RATE = 2e-5
# What may be chosen where the optimizer is DeepSpeed's own.
ALIGNMENT = ("mode", "x", "damping", "adapter", "on_unaligned")
# On arguments whose learning rate is our default, so that another mode may still take its own.
CHOSEN = "_lorapro_chosen_rate"


class LoraProFactory:
    """What ``Trainer`` calls as ``factory()(model, **kwargs)`` to get its optimizer."""

    def __call__(self, model: nn.Module, args: Any = None, **kwargs: Any) -> PairOptimizer:
        """Build the optimizer for the model that Trainer has prepared.

        axolotl hands its training arguments on too; they are not read again.
        """
        return create_lorapro_optimizer(model, **kwargs)


def trainer_optimizer(
    args: TrainingArguments, optimizer: str = "adamw", **kwargs: Any
) -> tuple[type[LoraProFactory], dict[str, Any]]:
    """The value for ``Trainer(optimizer_cls_and_kwargs=…)``, also in ``SFTTrainer``.

    For trainers that do not take this argument (TRL's DPO, GRPO and others) there is
    :func:`use_lorapro`.

    Weight decay and, where AdamW is part of it, betas and epsilon come from ``args``; warmup and
    schedules work as ever. So does the learning rate, if ``args`` has one of its own. Where it is
    only the default of its class, which is meant for full fine-tuning, the rate of
    ``lorapro.rates`` for the mode is taken instead, put into ``args``, and logged; ``lr=`` is taken
    as it is.

    Args:
        args: the ``TrainingArguments`` (or ``SFTConfig``, …) given to the trainer.
        optimizer: ``"adamw"``, ``"sgd"`` or ``"muon"``.
        kwargs: ``mode``, ``lr``, ``x``, ``adapter``, ``on_unaligned``, or anything that the
            optimizer takes and that should not come from ``args``.

    Returns:
        ``(factory, kwargs)``.

    Raises:
        ValueError: an unknown optimizer or option, or a value out of range, as the optimizer itself
            would refuse it later; ``args`` ask for DeepSpeed.

    >>> from transformers import TrainingArguments
    >>> args = TrainingArguments(output_dir="out", learning_rate=1e-4, report_to=[])
    >>> factory, kwargs = trainer_optimizer(args, mode="full")
    >>> kwargs["lr"], kwargs["mode"]
    (0.0001, 'full')
    """
    check_choice("optimizer", optimizer, OPTIMIZERS)
    if getattr(args, "deepspeed_plugin", None) is not None:
        _check_zero(optimizer, kwargs)
        raise ValueError(
            "under DeepSpeed the optimizer is Trainer's or DeepSpeed's own: call "
            "lorapro.use_lorapro(trainer) instead, which aligns gradients before its steps."
        )
    options: dict[str, Any] = {"weight_decay": args.weight_decay}
    if optimizer != "sgd":
        options |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    options |= kwargs
    if kwargs.get("lr") is None:
        if not args.learning_rate > 0:
            raise ValueError(f"learning_rate is {args.learning_rate}, expected a positive number.")
        options["lr"] = args.learning_rate
    check_options(optimizer_class(optimizer), options)
    if kwargs.get("lr") is None:
        options["lr"] = _rate(args, optimizer, kwargs.get("mode", "efficient"))
    return LoraProFactory, {"optimizer": optimizer, **options}


def _rate(args: TrainingArguments, optimizer: str, mode: str) -> float:
    """The learning rate of ``args``, or the mode's own where it is no more than a default."""
    fields = {f.name: f.default for f in dataclasses.fields(args)}
    default: Any = fields["learning_rate"]
    if args.learning_rate not in (default, getattr(args, CHOSEN, None)):
        return args.learning_rate
    name = mode if optimizer == "adamw" else optimizer
    only = f"learning_rate {float(default):g} is only the default of {type(args).__name__}"
    rate = chosen_rate(name, min(1.0, float(default) / SUPERVISED_RATE), only)
    args.learning_rate = rate  # what trackers and model cards will say
    setattr(args, CHOSEN, rate)
    return rate


def use_lorapro(trainer: AnyTrainer, optimizer: str = "adamw", **kwargs: Any) -> AnyTrainer:
    """Let a ``Trainer``, or any subclass, train with one of the optimizers of this package.

    The same as ``optimizer_cls_and_kwargs=trainer_optimizer(args, …)`` in the constructor, for
    trainers that do not hand that argument on: TRL's DPO, GRPO, KTO, RLOO and others::

        trainer = lorapro.use_lorapro(DPOTrainer(model, args=args, …), mode="factored")
        trainer.train()

    Under DeepSpeed the optimizer stays the one that Trainer makes or that the configuration names;
    gradients are aligned before its steps, which with AdamW is efficient mode. Learning rate,
    weight decay, betas and epsilon are then those of the arguments and the configuration.

    Args:
        trainer: after construction, before ``train()``.
        optimizer: see :func:`trainer_optimizer`.
        kwargs: see :func:`trainer_optimizer`.

    Returns:
        The trainer.

    Raises:
        ValueError: the trainer has made an optimizer already; its model has no pair that could be
            aligned; an unknown option or a value out of range; a mode that cannot work under
            DeepSpeed.

    >>> from peft import LoraConfig, get_peft_model
    >>> from torch import nn
    >>> from transformers import Trainer, TrainingArguments
    >>> model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), LoraConfig(target_modules=["0"]))
    >>> args = TrainingArguments(output_dir="out", report_to=[], use_cpu=True, learning_rate=1e-3)
    >>> trainer = use_lorapro(Trainer(model, args), "muon")
    >>> type(trainer.create_optimizer()).__name__
    'LoraProMuon'
    """
    if not hasattr(trainer, "optimizer_cls_and_kwargs"):
        raise ValueError(
            f"expected a transformers.Trainer, found a {type(trainer).__name__}; in a loop of your "
            "own: lorapro.create_lorapro_optimizer(model)."
        )
    if trainer.optimizer is not None:
        raise ValueError(
            f"the trainer has a {type(trainer.optimizer).__name__} already; call use_lorapro "
            "before train() or create_optimizer(), and without optimizers=."
        )
    _follow_reference(trainer.model)
    if kwargs.get("adapter") is None and len(getattr(trainer.model, "peft_config", ())) > 1:
        # TRL keeps a frozen copy of the adapter beside it, as the reference.
        kwargs["adapter"] = _active(trainer.model)
    if getattr(trainer, "is_deepspeed_enabled", False):
        _check_zero(optimizer, kwargs)
        from lorapro.distributed.callback import AlignBeforeSteps

        trainer.add_callback(AlignBeforeSteps(**{k: kwargs[k] for k in kwargs if k != "mode"}))
        return trainer
    value = trainer_optimizer(trainer.args, optimizer, **kwargs)
    chosen = {k: v for k, v in kwargs.items() if k in ("adapter", "on_unaligned")}
    lora_param_groups(trainer.model, **chosen)
    trainer.optimizer_cls_and_kwargs = value  # type: ignore[assignment]
    return trainer


def _check_zero(optimizer: str, options: Mapping[str, Any]) -> None:
    """Refuse what DeepSpeed's own optimizer with aligned gradients cannot do."""
    check_options(optimizer_class(optimizer), options)
    refuse_modes(optimizer, options.get("mode", "efficient"))
    for name in options:
        if name not in ALIGNMENT:
            raise ValueError(
                f"under DeepSpeed {name!r} is set in the TrainingArguments or in the optimizer of "
                f"the DeepSpeed configuration; expected of {', '.join(ALIGNMENT)} only."
            )


def _active(model: Any) -> str | None:
    active = getattr(model, "active_adapters", None) or [None]
    return active[0] if len(active) == 1 else None


def _follow_reference(model: Any) -> None:
    """Give TRL's copy ``"ref"`` of an adapter the frozen start that the adapter has."""
    if "ref" not in getattr(model, "peft_config", ()):
        return
    from lorapro.lora_ga.initial import share_initial

    share_initial(model, _active(model) or "default", "ref")
