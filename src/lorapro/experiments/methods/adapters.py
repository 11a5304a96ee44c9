"""Adapters: what is trained. Each is PEFT's, or none at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorapro.experiments.errors import UserError
from lorapro.experiments.options import NoOptions, option

if TYPE_CHECKING:
    from peft import PeftConfig

__all__ = ["ADAPTERS", "AdaLoraOptions", "Adapter", "LoraOptions"]


@dataclass
class LoraOptions:
    """Keys of every LoRA adapter."""

    rank: int = option(8, "rank of the adapters", least=1)
    alpha: float = option(16.0, "LoRA's alpha", above=0)
    lora_dropout: float = option(0.0, "dropout before the adapters", least=0, below=1)
    target_modules: list[str] = option(["all-linear"], "module names, or all-linear")
    exclude_modules: list[str] | None = option(None, "module names that get no adapter")
    modules_to_save: list[str] | None = option(None, "modules trained in full beside the adapters")

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``peft.LoraConfig``."""
        targets: Any = self.target_modules
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": targets[0] if targets == ["all-linear"] else targets,
            "exclude_modules": self.exclude_modules,
        }


@dataclass
class AdaLoraOptions(LoraOptions):
    """Keys of AdaLoRA; ``rank`` is the rank it ends with, in the mean."""

    adalora_init_rank: int = option(12, "AdaLoRA: rank of each layer at the start", least=1)
    adalora_tinit: int = option(0, "AdaLoRA: steps before ranks are cut", least=0)
    adalora_tfinal: int = option(0, "AdaLoRA: steps at the end with ranks fixed", least=0)
    adalora_interval: int = option(1, "AdaLoRA: steps between two cuts", least=1)
    adalora_beta: float = option(0.85, "AdaLoRA: both averages of importance", above=0, below=1)
    adalora_orthogonality: float = option(0.5, "AdaLoRA: weight of its penalty", least=0)
    adalora_allocate: bool = option(
        True,
        "AdaLoRA: allocate ranks; false leaves every rank at adalora_init_rank, as in the code "
        "behind LoRA-GA's tables",
    )

    def check(self) -> None:
        """Ranks are cut, never raised."""
        if self.adalora_init_rank < self.rank:
            raise UserError(
                f"adalora_init_rank must be at least rank, {self.rank}, found "
                f"{self.adalora_init_rank}: AdaLoRA cuts ranks down to it"
            )


Maker = Callable[[Any, Mapping[str, Any], int], "PeftConfig"]
"""(options, further ``LoraConfig`` arguments, steps of the run) -> ``PeftConfig``."""


@dataclass(frozen=True)
class Adapter:
    """What is trained.

    Attributes:
        name: as written in names of methods.
        about: a few words.
        options: dataclass of its keys.
        config: makes the ``PeftConfig``; ``None`` trains every weight.
        callbacks: makes Trainer's callbacks from the options.
        trains: whether anything is.
        checkpoint_files: what those callbacks write into every checkpoint.
    """

    name: str
    about: str
    options: type = LoraOptions
    config: Maker | None = None
    callbacks: Callable[[Any], list[Any]] = lambda options: []
    trains: bool = True
    checkpoint_files: Callable[[Any], tuple[str, ...]] = lambda options: ()


def _lora(**fixed: Any) -> Maker:
    def config(options: LoraOptions, more: Mapping[str, Any], steps: int) -> PeftConfig:
        from peft import LoraConfig

        return LoraConfig(**{**options.arguments(), **fixed, **more})

    return config


def _adalora(options: AdaLoraOptions, more: Mapping[str, Any], steps: int) -> PeftConfig:
    from peft import AdaLoraConfig

    arguments = options.arguments()
    rank = arguments.pop("r")
    return AdaLoraConfig(
        **arguments,
        target_r=rank,
        init_r=options.adalora_init_rank,
        tinit=options.adalora_tinit,
        tfinal=options.adalora_tfinal,
        deltaT=options.adalora_interval,
        beta1=options.adalora_beta,
        beta2=options.adalora_beta,
        orth_reg_weight=options.adalora_orthogonality,
        total_step=max(steps, 1),
        **more,
    )


def _allocation(options: AdaLoraOptions) -> list[Any]:
    if not options.adalora_allocate:
        return []
    from lorapro.experiments.methods.adalora import AllocateRanks

    return [AllocateRanks()]


ADAPTERS: dict[str, Adapter] = {
    adapter.name: adapter
    for adapter in (
        Adapter("full", "every weight", NoOptions),
        Adapter("untrained", "the model as it is, untrained", NoOptions, trains=False),
        Adapter("lora", "LoRA, scaling alpha/r", config=_lora()),
        Adapter("rslora", "LoRA, scaling alpha/sqrt(r)", config=_lora(use_rslora=True)),
        Adapter("dora", "DoRA, scaling alpha/r", config=_lora(use_dora=True)),
        Adapter(
            "rsdora",
            "DoRA, scaling alpha/sqrt(r)",
            config=_lora(use_dora=True, use_rslora=True),
        ),
        Adapter(
            "adalora",
            "AdaLoRA",
            AdaLoraOptions,
            _adalora,
            _allocation,
            checkpoint_files=lambda options: ("adalora.pt",) * options.adalora_allocate,
        ),
    )
}
