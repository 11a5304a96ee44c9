"""LoRA-GA on an existing PEFT model: gradients in, initial factors out, output unchanged.

The factors are computed for every layer first and put in place at the end, so that an error on the
way leaves the model as it was.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorapro.choices import check_choice, first_few
from lorapro.factors import adapters_of, from_A, from_B
from lorapro.lora_ga import decompose
from lorapro.lora_ga.capture import Loss, quiet
from lorapro.lora_ga.estimate import ESTIMATORS, Directions, exact, passes_needed, sketch
from lorapro.lora_ga.initial import BASES, attach, check_can_attach, guard, initial_of
from lorapro.lora_ga.layers import AdaptedLayer, adapted_layers, resolve_adapter
from lorapro.lora_ga.recipe import Recipe, Result
from lorapro.lora_ga.report import LayerReport, LoraGaReport

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

__all__ = ["get_lora_ga_model", "initialize"]

UNSUPPORTED = ("error", "default")


def initialize(
    peft_model: nn.Module,
    batches: Iterable[Any],
    loss: Loss | None = None,
    direction: str = "ArB2r",
    scale: str = "stable",
    gamma: float = 16.0,
    objective: str = "gradient",
    estimator: str = "exact",
    base: str = "subtract",
    *,
    adapter: str | None = None,
    unsupported: str = "error",
    seed: int = 0,
    layers_per_pass: int | None = None,
    oversampling: int | None = None,
    power_passes: int = 1,
    progress: bool | None = None,
) -> LoraGaReport:
    """Start a fresh LoRA adapter where its first step is closest to that of full fine-tuning.

    ``G = ∂L/∂W0`` is the mean over the batches of the gradient of each batch's loss, taken without
    dropout, the loss masking padding and ignored labels as it always does. From its singular
    vectors ``G ≈ U Σ Vᵀ`` A gets r rows of Vᵀ and B r columns of U, both times a scale; Σ does not
    enter. Then ``−s·B·A`` is added to the base, so that the model's output is what it was.

    Args:
        peft_model: a PEFT model with an untrained LoRA adapter (``B·A = 0``).
        batches: dicts for ``peft_model(**batch).loss``, or whatever ``loss`` takes. They are read
            once into a list, because several passes are made over them: give a few batches, not a
            training set. A few tens of sequences are enough for stable directions.
        loss: ``loss(model, batch) -> scalar``.
        direction: ``"ArB2r"``, ``"A2rBr"``, ``"ArBr"`` or ``"random"``, see
            :func:`lorapro.lora_ga.decompose.split_directions`.
        scale: ``"stable"``, ``"gd"``, ``"unit"`` or ``"weight"``, see
            :func:`lorapro.lora_ga.decompose.scale_factor`.
        gamma: γ of ``"stable"``; larger is smaller factors.
        objective: ``"gradient"`` (SVD of G), ``"sign"`` (SVD of sign G) or ``"adam"``
            (Eq. loss-adam minimised numerically from the SVD of G; with scale ``"unit"`` its
            factors are taken as they come, otherwise rows and columns are first brought to unit
            length in the mean).
        estimator: ``"exact"``: gradients of a few layers at a time, several passes over the
            batches; ``"sketch"``: no gradient is formed, four passes, objective
            ``"gradient"`` only.
        base: ``"subtract"``: W0 becomes ``W0 − s·B·A``; ``"frozen"``: W0 stays and a frozen copy of
            the initial factors does it in the forward pass (the choice for quantized or bfloat16
            bases, and to keep checkpoints usable beside the original base).
        adapter: name of the adapter; ``None`` if there is one.
        unsupported: ``"error"``, or ``"default"`` to leave layers that have no LoRA-GA at their
            default start and list them in the report.
        seed: of the random test vectors and of direction ``"random"``; the global random state is
            neither used nor changed.
        layers_per_pass: layers whose gradients (sketches) are held at once. ``None``: for
            ``"exact"`` as many as take no more memory than the largest one, for ``"sketch"`` all.
        oversampling: vectors of a sketch beyond 2r; ``None`` for 4r, and 16 at least.
        power_passes: power iterations of a sketch, two passes each after the first two; 0 is
            enough where the spectrum falls fast.
        progress: show a progress bar; ``None`` for one on a terminal, if tqdm is there.

    Returns:
        A report; ``print`` it.

    Raises:
        ValueError: an unknown option; no batches; a loss without gradient; an adapter that is
            merged, trained or initialised already; a layer that has no LoRA-GA; a base that cannot
            be changed (quantized, tied, sharded); a gradient that is not finite. The model is then
            left as it was.

    >>> from peft import LoraConfig, get_peft_model
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    >>> model = get_peft_model(net, LoraConfig(r=1, target_modules=["0", "2"]))
    >>> x, y = torch.randn(8, 6), torch.randn(8, 4)
    >>> before = model(x)
    >>> report = initialize(model, [(x, y)], loss=lambda m, b: (m(b[0]) - b[1]).square().mean())
    >>> len(report.layers), torch.allclose(model(x), before, atol=1e-6)
    (2, True)
    """
    began = time.perf_counter()
    model: Any = getattr(
        peft_model, "_orig_mod", peft_model
    )  # a compiled model would not see hooks
    check_choice("direction", direction, decompose.DIRECTIONS)
    check_choice("scale", scale, decompose.SCALES)
    check_choice("objective", objective, decompose.OBJECTIVES)
    check_choice("estimator", estimator, ESTIMATORS)
    check_choice("base", base, BASES)
    check_choice("unsupported", unsupported, UNSUPPORTED)
    if not gamma > 0:
        raise ValueError(f"gamma is {gamma!r}, expected a positive number.")
    for name, count, least in (
        ("layers_per_pass", layers_per_pass, 1),
        ("oversampling", oversampling, 0),
        ("power_passes", power_passes, 0),
    ):
        if count is not None and (not isinstance(count, int) or count < least):
            raise ValueError(f"{name} is {count!r}, expected an integer of at least {least}.")
    if estimator == "sketch" and objective != "gradient":
        raise ValueError(
            f"objective {objective!r} needs every element of the gradient, which a sketch does not "
            "have; use estimator='exact' or objective='gradient'."
        )
    adapter = resolve_adapter(model, adapter)
    layers, untouched = _usable_layers(model, adapter, unsupported)
    _check_fresh(layers)
    obstacles = check_can_attach(layers, model, base)
    if obstacles:
        raise ValueError(first_few(obstacles))
    if not isinstance(batches, Iterable):
        raise ValueError(f"batches is a {type(batches).__name__}, expected an iterable of batches.")
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty; expected at least one batch to take a gradient of.")

    recipe = Recipe(direction, scale, gamma, objective, seed)
    results: list[Result] = []

    def consume(found: Directions) -> None:
        results.append(recipe.factors(found))

    passes = passes_needed(layers, estimator, layers_per_pass, power_passes)
    with _progress(passes * len(batches), progress) as advance, quiet(model):
        if estimator == "exact":
            exact(
                model,
                batches,
                loss,
                layers,
                consume,
                layers_per_pass=layers_per_pass,
                of_sign=objective == "sign",
                keep_gradient=objective == "adam",
                advance=advance,
            )
        else:
            sketch(
                model,
                batches,
                loss,
                layers,
                consume,
                seed=seed,
                oversampling=oversampling,
                power_passes=power_passes,
                layers_per_pass=layers_per_pass,
                advance=advance,
            )
    if not any(result.row.directions for result in results):
        raise ValueError(
            "no gradient reached any adapted layer; does the loss depend on them, and do they run "
            "with gradients enabled?"
        )
    rows = _put_in_place(layers, results, base)
    guard(model)
    return LoraGaReport(
        layers=rows,
        untouched=tuple(untouched),
        settings={
            "direction": direction,
            "scale": scale,
            "objective": objective,
            "estimator": estimator,
            "base": base,
            "batches": len(batches),
        },
        passes=passes,
        seconds=time.perf_counter() - began,
        notes=tuple(_notes(layers, base)),
    )


def get_lora_ga_model(
    model: nn.Module,
    config: LoraConfig,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    adapter_name: str = "default",
    **options: Any,
) -> PeftModel:
    """``peft.get_peft_model`` and :func:`initialize` in one call.

    Args:
        model: the base model; changed in place as ``get_peft_model`` does.
        config: a ``peft.LoraConfig`` with its default ``init_lora_weights``.
        batches: see :func:`initialize`.
        loss: see :func:`initialize`.
        adapter_name: name of the adapter.
        options: further options of :func:`initialize`.

    Returns:
        The PEFT model, its :class:`LoraGaReport` in the attribute ``lora_ga_report``.

    Raises:
        ValueError: as :func:`initialize`, the base model left without adapter; or a config with an
            initialisation of its own.

    >>> from peft import LoraConfig
    >>> net = nn.Sequential(nn.Linear(6, 4))
    >>> batch = torch.randn(8, 6)
    >>> config = LoraConfig(r=1, target_modules=["0"])
    >>> model = get_lora_ga_model(net, config, [batch], loss=lambda m, x: m(x).square().mean())
    >>> len(model.lora_ga_report.layers)
    1
    """
    from peft import get_peft_model

    if config.init_lora_weights not in (True, "gaussian"):
        raise ValueError(
            f"init_lora_weights is {config.init_lora_weights!r}, an initialisation of its own; "
            "expected True (the default), which LoRA-GA then replaces."
        )
    peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    try:
        report = initialize(peft_model, batches, loss, adapter=adapter_name, **options)
    except BaseException:
        peft_model.unload()
        raise
    peft_model.lora_ga_report = report  # type: ignore[assignment]
    return peft_model


def _usable_layers(
    model: nn.Module, adapter: str, unsupported: str
) -> tuple[list[AdaptedLayer], list[tuple[str, str]]]:
    # Before layers are looked at: a frozen copy or a merge would show up as something else.
    for name, module in model.named_modules():
        if getattr(module, "merged", False) is True and hasattr(module, "merged_adapters"):
            raise ValueError(
                f"{name} has {', '.join(map(repr, module.merged_adapters))} merged into its base; "
                "call unmerge_adapter() first."
            )
        if initial_of(module, adapter) is not None:
            raise ValueError(
                f"adapter {adapter!r} is initialised already ({name}); LoRA-GA is run once, on a "
                "fresh adapter."
            )
        if adapter in adapters_of(module) and (
            adapter not in getattr(module, "active_adapters", (adapter,))
            or getattr(module, "disable_adapters", False)
        ):
            raise ValueError(
                f"adapter {adapter!r} is not active; call set_adapter({adapter!r}) first."
            )
    layers, refused = adapted_layers(model, adapter)
    if refused and unsupported == "error":
        listed = first_few([f"{name}: {why}" for name, why in refused])
        raise ValueError(
            f"LoRA-GA cannot initialise {listed}. Leave them out of target_modules, or pass "
            "unsupported='default' to leave them at their default start."
        )
    if not layers:
        raise ValueError(
            f"adapter {adapter!r} has no trainable layer that LoRA-GA can initialise"
            + (f" ({refused[0][0]}: {refused[0][1]})." if refused else ".")
        )
    return layers, refused


def _check_fresh(layers: list[AdaptedLayer]) -> None:
    for layer in layers:
        if layer.pair.A.detach().any() and layer.pair.B.detach().any():
            raise ValueError(
                f"{layer.name}: B·A is not zero: the adapter is trained, or has an initialisation "
                "of its own (PiSSA, OLoRA, init_lora_weights=False, ...); LoRA-GA starts from a "
                "fresh adapter with init_lora_weights=True."
            )


def _put_in_place(
    layers: list[AdaptedLayer], results: list[Result], base: str
) -> tuple[LayerReport, ...]:
    by_layer: dict[int, list[Result]] = {}
    for result in results:
        by_layer.setdefault(id(result.layer), []).append(result)
    rows: list[LayerReport] = []
    for layer in layers:
        blocks = sorted(by_layer[id(layer)], key=lambda x: x.block)
        rows += [x.row for x in blocks]
        if not any(x.row.directions for x in blocks):
            continue
        A = from_A(torch.stack([x.A for x in blocks]), layer.pair.A)
        B = from_B(torch.stack([x.B for x in blocks]), layer.pair.B, layer.pair.layout)
        attach(layer, A, B, base, set_factors=True)
    return tuple(rows)


def _notes(layers: list[AdaptedLayer], base: str) -> Iterator[str]:
    low = {x.weight.dtype for x in layers if not x.is_quantized() and x.weight.dtype.itemsize < 4}
    if base == "subtract" and low:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in low))
        yield f"subtracting rounds the {names} base weights; base='frozen' leaves them as they are"


@contextmanager
def _progress(total: int, wanted: bool | None) -> Iterator[Callable[[], None] | None]:
    """A function that advances a progress bar, or ``None``."""
    bar = None
    if wanted or (wanted is None and sys.stderr is not None and sys.stderr.isatty()):
        try:
            from tqdm.auto import tqdm

            bar = tqdm(total=total, desc="LoRA-GA", unit="batch")
        except ImportError:
            if wanted:
                raise ValueError("progress=True needs the package tqdm: pip install tqdm") from None
    try:
        yield None if bar is None else lambda: bar.update()
    finally:
        if bar is not None:
            bar.close()
