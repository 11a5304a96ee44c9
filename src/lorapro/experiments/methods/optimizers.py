"""Optimizers: how the weights move. Each makes the value of Trainer's ``optimizer_cls_and_kwargs``.

Trainer calls a factory as ``factory()(model, **kwargs)``, so the optimizers of PEFT, which want the
model, come in as small factories too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lorapro.experiments.errors import UserError
from lorapro.experiments.options import NoOptions, option
from lorapro.rates import default_rate

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["OPTIMIZERS", "LoraPlusOptions", "LoraProOptions", "OptimizerPart", "PassedOptions"]


@dataclass
class PassedOptions:
    """Keys of optimizers that take options of their own."""

    optimizer_options: dict[str, Any] | str | None = option(
        None, "further arguments of the optimizer, a mapping; see its documentation"
    )


@dataclass
class LoraProOptions(PassedOptions):
    """Keys of this package's optimizers."""

    x: str | None = option(
        None,
        "LoRA-Pro: the X of Theorem 2.3; default: the optimizer's own",
        choices=("zero", "sylvester", "symmetric"),
    )
    damping: float | None = option(
        None,
        "LoRA-Pro: length in steps below which directions are damped; 0: the paper's; default: "
        "the optimizer's own",
        least=0,
    )

    def arguments(self) -> dict[str, Any]:
        """Of the optimizer; ``None`` is its own default."""
        return {"x": self.x, "damping": self.damping}


@dataclass
class MuonOptions:
    """Keys of every Muon."""

    muon_momentum: float | None = option(
        None, "Muon: momentum; default: the optimizer's own", least=0, below=1
    )


@dataclass
class TorchMuonOptions(MuonOptions):
    """Keys of Muon on matrices."""

    muon_rank: int = option(
        0,
        "full-muon: after each step the change of a matrix is cut to this rank; 0: it is not",
        least=0,
    )


@dataclass
class LoraProMuonOptions(LoraProOptions, MuonOptions):
    """Keys of Muon on the tangent space."""

    def arguments(self) -> dict[str, Any]:
        """Of the optimizer; ``None`` is its own default."""
        return {**super().arguments(), "momentum": self.muon_momentum}


@dataclass
class LoraPlusOptions:
    """Keys of LoRA+."""

    loraplus_lr_ratio: float = option(16.0, "LoRA+: learning rate of B over that of A", above=0)
    loraplus_lr_embedding: float = option(
        1e-6, "LoRA+: learning rate of adapters on embeddings", above=0
    )


@dataclass
class RiemannianOptions:
    """Keys of the Riemannian preconditioner."""

    riemannian_damping: float = option(
        1e-2, "Riemannian: added to the diagonal of A·Aᵀ and Bᵀ·B", least=0
    )


Maker = Callable[["TrainingArguments", Any], Any]
"""(training arguments, options) -> Trainer's ``optimizer_cls_and_kwargs``, or ``None``."""


@dataclass(frozen=True)
class OptimizerPart:
    """How the weights move.

    Attributes:
        name: as written in names of methods.
        about: a few words.
        learning_rate: where to begin, when the config gives none.
        make: gives Trainer's ``optimizer_cls_and_kwargs``; ``None`` is Trainer's own AdamW.
        options: dataclass of its keys.
        changes_base: when the base weights change too, so that the adapter alone does not hold the
            result and a merged model is saved beside it: ``"never"``, with weight ``"decay"``, or
            ``"always"``.
        adapter: the adapter it has if a method's name gives none.
    """

    name: str
    about: str
    learning_rate: float
    make: Maker | None = None
    options: type = NoOptions
    changes_base: Literal["never", "decay", "always"] = "never"
    adapter: str = "lora"


def _mapping(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """Return optimizer_options as a mapping.

    Raises:
        UserError: it is none.
    """
    if value is None or isinstance(value, dict):
        return value or {}
    raise UserError(f"optimizer_options must be a mapping from name to value, found {value!r}")


def _adamw(training: TrainingArguments) -> dict[str, Any]:
    """Arguments of ``torch.optim.AdamW``, as Trainer takes them from its own."""
    return {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
    }


def _aligned(optimizer: str = "adamw", **fixed: Any) -> Maker:
    """One of this package's optimizers."""

    def make(training: TrainingArguments, options: LoraProOptions) -> Any:
        import lorapro

        given = {**fixed, **_mapping(options.optimizer_options)}
        given |= {name: value for name, value in options.arguments().items() if value is not None}
        # lr= because a rate that happens to be Trainer's default is a rate of the config here.
        given.setdefault("lr", training.learning_rate)
        return lorapro.trainer_optimizer(training, optimizer, **given)

    return make


class Factory:
    """What Trainer calls as ``factory()(model, **kwargs)``: a function of the model."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self._build = build

    def __call__(self) -> Callable[..., Any]:
        """Return the function."""
        return self._build


def _lora_plus(training: TrainingArguments, options: LoraPlusOptions) -> Any:
    def build(model: Any, **kwargs: Any) -> Any:
        from peft.optimizers import create_loraplus_optimizer
        from torch.optim import AdamW

        return create_loraplus_optimizer(model, AdamW, **kwargs)

    return Factory(build), {
        **_adamw(training),
        "loraplus_lr_ratio": options.loraplus_lr_ratio,
        "loraplus_lr_embedding": options.loraplus_lr_embedding,
        "loraplus_weight_decay": training.weight_decay,
    }


def _lora_fa(training: TrainingArguments, options: Any) -> Any:
    def build(model: Any, **kwargs: Any) -> Any:
        from peft.optimizers import create_lorafa_optimizer

        (config,) = model.peft_config.values()
        return create_lorafa_optimizer(model, r=config.r, lora_alpha=config.lora_alpha, **kwargs)

    return Factory(build), {
        "lr": training.learning_rate,
        "weight_decay": training.weight_decay,
    }


def _riemannian(training: TrainingArguments, options: RiemannianOptions) -> Any:
    def build(model: Any, **kwargs: Any) -> Any:
        from peft.optimizers import create_riemannian_optimizer
        from torch.optim import AdamW

        return create_riemannian_optimizer(model, AdamW, **kwargs)

    return Factory(build), {
        **_adamw(training),
        "weight_decay": training.weight_decay,
        "reg": options.riemannian_damping,
    }


def _torchs_muon(training: TrainingArguments, options: MuonOptions) -> dict[str, Any]:
    """Arguments of both of torch's Muons; without a momentum they have torch's."""
    momentum = options.muon_momentum
    given = {} if momentum is None else {"momentum": momentum}
    return {**_adamw(training), "weight_decay": training.weight_decay, **given}


def _muon(training: TrainingArguments, options: TorchMuonOptions) -> Any:
    """Muon on hidden matrices (all weights) or on A and B apart (an adapter), AdamW on the rest."""
    from lorapro.experiments.methods.muon import muon_factory

    return muon_factory, {**_torchs_muon(training, options), "rank": options.muon_rank}


def _balanced_muon(training: TrainingArguments, options: MuonOptions) -> Any:
    from lorapro.experiments.methods.balanced_muon import balanced_muon_factory

    return balanced_muon_factory, _torchs_muon(training, options)


def _ours(name: str, about: str, optimizer: str = "adamw", **fixed: Any) -> OptimizerPart:
    return OptimizerPart(
        name,
        about,
        default_rate(optimizer, fixed.get("mode", "efficient")),
        _aligned(optimizer, **fixed),
        LoraProMuonOptions if optimizer == "muon" else LoraProOptions,
        "decay" if fixed.get("mode") == "full" else "never",
        adapter="rslora",
    )


OPTIMIZERS: dict[str, OptimizerPart] = {
    part.name: part
    for part in (
        OptimizerPart("adamw", "AdamW", 1e-3),
        OptimizerPart("muon", "Muon on matrices, AdamW on the rest", 2e-3, _muon, TorchMuonOptions),
        OptimizerPart(
            "balanced-muon",
            "Muon on A and on B in balanced units",
            2e-3,
            _balanced_muon,
            MuonOptions,
        ),
        OptimizerPart("lora+", "LoRA+", 2e-4, _lora_plus, LoraPlusOptions),
        OptimizerPart("lora-fa", "LoRA-FA", 1e-3, _lora_fa),
        OptimizerPart(
            "riemannian",
            "AdamW on Riemannian-preconditioned gradients",
            2e-3,
            _riemannian,
            RiemannianOptions,
        ),
        _ours("lora-pro", "LoRA-Pro, efficient mode"),
        _ours("lora-pro-damped", "LoRA-Pro, efficient mode, damped", damping=3.0),
        _ours("lora-pro-full", "LoRA-Pro, full mode", mode="full"),
        _ours("lora-pro-factored", "AdamW on the tangent space", mode="factored"),
        _ours("lora-pro-muon", "Muon on each part of the step of W", "muon"),
        _ours("lora-pro-sgd", "LoRA-Pro, SGD (Algorithm 1)", "sgd"),
    )
}
