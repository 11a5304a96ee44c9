"""What a method is: adapter, initialisation, optimizer and the learning rate to start from.

Adding one is one :class:`Method` in :data:`METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import TrainingArguments

    from lorapro.experiments.config import ExperimentArguments

__all__ = ["METHODS", "Method", "OptimizerFactory"]

OptimizerFactory = Callable[["TrainingArguments", "ExperimentArguments"], Any]
"""(training arguments, experiment arguments) -> value of Trainer's ``optimizer_cls_and_kwargs``."""

Initializer = Callable[["PeftModel", Iterable[Mapping[str, Any]], "ExperimentArguments"], Any]
"""Changes the adapter of a PEFT model in place, given batches of training data."""


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: as written in configs.
        about: one line for the help.
        learning_rate: used when the config gives none.
        adapter: extra ``peft.LoraConfig`` arguments, or ``None`` to train every weight.
        init: called once on the fresh PEFT model with training batches, before the optimizer.
        init_batches: how many training batches ``init`` is given.
        optimizer: gives Trainer's ``optimizer_cls_and_kwargs``; ``None`` is Trainer's own AdamW.
        changes_base: when the base weights change too, so that the adapter alone does not hold the
            result and a merged model is saved beside it: ``"never"``, with weight ``"decay"``, or
            ``"always"``.
    """

    name: str
    about: str
    learning_rate: float
    adapter: Mapping[str, Any] | None = field(default_factory=dict)
    init: Initializer | None = None
    init_batches: int = 8
    optimizer: OptimizerFactory | None = None
    changes_base: Literal["never", "decay", "always"] = "never"


def aligned(optimizer: str = "adamw", **options: Any) -> OptimizerFactory:
    """Optimizer factory for one of this package's optimizers."""

    def factory(training: TrainingArguments, experiment: ExperimentArguments) -> Any:
        import lorapro

        # lr= because a rate that happens to be Trainer's default is a rate of the config here.
        rate = training.learning_rate
        return lorapro.trainer_optimizer(training, optimizer, lr=rate, x=experiment.x, **options)

    return factory


def full_muon(training: TrainingArguments, experiment: ExperimentArguments) -> Any:
    """Optimizer factory of full fine-tuning with Muon."""
    from lorapro.experiments.full_muon import full_muon_optimizer

    return full_muon_optimizer(training)


def lora_ga(model: PeftModel, batches: Iterable[Any], experiment: ExperimentArguments) -> None:
    """LoRA-GA's start with a frozen base, so that runs save adapters for the original model."""
    import lorapro

    lorapro.lora_ga.initialize(
        model,
        batches,
        estimator="sketch",
        base="frozen",
        gamma=experiment.gamma,
        progress=False,
    )


RANK_STABILIZED = {"use_rslora": True}


def lora_pro(
    name: str, about: str, learning_rate: float, optimizer: str = "adamw", **options: Any
) -> Method:
    """One of this package's optimizers on a rank-stabilized adapter."""
    return Method(
        name,
        f"{about}, scaling alpha/sqrt(r)",
        learning_rate,
        adapter=RANK_STABILIZED,
        optimizer=aligned(optimizer, **options),
        changes_base="decay" if options.get("mode") == "full" else "never",
    )


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("full", "full fine-tuning, AdamW on every weight", 1e-4, adapter=None),
        Method(
            "full-muon",
            "full fine-tuning, Muon on hidden matrices, AdamW on the rest",
            2e-4,
            adapter=None,
            optimizer=full_muon,
        ),
        Method("lora", "LoRA, scaling alpha/r, AdamW", 1e-3),
        Method("rslora", "LoRA, scaling alpha/sqrt(r), AdamW", 6e-4, adapter=RANK_STABILIZED),
        lora_pro("lora-pro", "LoRA-Pro, efficient mode", 1e-3, steady=False),
        lora_pro(
            "lora-pro-steady", "LoRA-Pro, efficient mode with steady moments", 5e-4, steady=True
        ),
        lora_pro("lora-pro-full", "LoRA-Pro, full mode", 3e-4, mode="full"),
        lora_pro(
            "lora-pro-factored",
            "AdamW on the tangent space at LoRA's memory",
            3e-4,
            mode="factored",
        ),
        lora_pro("lora-pro-muon", "Muon on the tangent space", 2e-3, "muon"),
        Method(
            "lora-ga",
            "LoRA from LoRA-GA's start, scaling alpha/sqrt(r), AdamW",
            1e-4,
            adapter=RANK_STABILIZED,
            init=lora_ga,
        ),
    )
}

# Every optimizer of ours also from LoRA-GA's start; efficient mode wants a smaller rate there.
_FROM_LORA_GA = {
    "lora-pro": 1e-4,
    "lora-pro-full": 3e-4,
    "lora-pro-factored": 3e-4,
    "lora-pro-muon": 2e-3,
}
METHODS |= {
    f"lora-ga+{name}": replace(
        METHODS[name],
        name=f"lora-ga+{name}",
        about=f"LoRA-GA's start, then {METHODS[name].about}",
        learning_rate=rate,
        init=lora_ga,
    )
    for name, rate in _FROM_LORA_GA.items()
}
