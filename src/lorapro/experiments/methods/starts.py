"""Starts: where an adapter begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorapro.experiments.options import NoOptions, option

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["STARTS", "LoraGaOptions", "PissaOptions", "Start"]


@dataclass
class LoraGaOptions:
    """Keys of LoRA-GA's start."""

    gamma: float = option(16.0, "LoRA-GA: larger is a smaller start", above=0)
    lora_ga_objective: str = option(
        "gradient",
        "LoRA-GA: what is decomposed",
        choices=("gradient", "sign", "adam"),
    )
    lora_ga_direction: str = option(
        "ArB2r",
        "LoRA-GA: singular vectors of A and B",
        choices=("ArB2r", "A2rBr", "ArBr", "random"),
    )
    lora_ga_scale: str = option(
        "stable", "LoRA-GA: lengths of the factors", choices=("stable", "gd", "unit", "weight")
    )
    lora_ga_batches: int = option(8, "LoRA-GA: training batches for its gradient", least=1)
    lora_ga_batch_size: int = option(
        0, "LoRA-GA: examples of such a batch; 0 is the training batch size", least=0
    )
    lora_ga_first_rows: bool = option(
        False, "LoRA-GA: of the first training rows, as in its own code, and not of drawn ones"
    )
    lora_ga_estimator: str | None = option(
        None,
        "LoRA-GA: default sketch, exact for objectives sign and adam",
        choices=("exact", "sketch"),
    )


@dataclass
class PissaOptions:
    """Keys of PiSSA's start."""

    pissa_iterations: int = option(
        4, "PiSSA: subspace iterations of its fast SVD; 0 is the exact SVD", least=0
    )


Initializer = Callable[["PeftModel", Iterable[Mapping[str, Any]], Any], Any]
"""Changes the fresh adapter of a PEFT model in place, given batches of training data."""


@dataclass(frozen=True)
class Start:
    """Where an adapter begins.

    Attributes:
        name: as written in names of methods.
        about: a few words.
        options: dataclass of its keys.
        peft: further ``LoraConfig`` arguments, from the options.
        initialize: called once on the fresh model, seeded, before the optimizer is built.
        at_zero: whether ``B·A = 0``; otherwise a finished run saves what was learnt for the
            original base, and keeps the first factors beside its checkpoints.
    """

    name: str
    about: str
    options: type = NoOptions
    peft: Callable[[Any], dict[str, Any]] = field(default=lambda options: {})
    initialize: Initializer | None = None
    at_zero: bool = True


def _lora_ga(model: PeftModel, batches: Iterable[Any], options: LoraGaOptions) -> None:
    """LoRA-GA's start with a frozen base, so that runs save adapters for the original model."""
    import lorapro

    by_objective = "sketch" if options.lora_ga_objective == "gradient" else "exact"
    lorapro.lora_ga.initialize(
        model,
        batches,
        direction=options.lora_ga_direction,
        scale=options.lora_ga_scale,
        objective=options.lora_ga_objective,
        gamma=options.gamma,
        estimator=options.lora_ga_estimator or by_objective,
        base="frozen",
        progress=False,
    )


def _remember(model: PeftModel, batches: Iterable[Any], options: Any) -> None:
    """Keep PiSSA's first factors, without which what it learnt is not known at the end."""
    import lorapro.lora_ga

    lorapro.lora_ga.remember_initial(model)


def _pissa(options: PissaOptions) -> dict[str, Any]:
    count = options.pissa_iterations
    return {"init_lora_weights": f"pissa_niter_{count}" if count else "pissa"}


STARTS: dict[str, Start] = {
    start.name: start
    for start in (
        Start("zero", "B = 0"),
        Start(
            "lora-ga",
            "LoRA-GA's start",
            LoraGaOptions,
            initialize=_lora_ga,
            at_zero=False,
        ),
        Start(
            "pissa",
            "PiSSA's start",
            PissaOptions,
            peft=_pissa,
            initialize=_remember,
            at_zero=False,
        ),
    )
}
