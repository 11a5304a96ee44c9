"""The factors an adapter started from: where they live, and what they do in the forward pass.

An initialisation that starts at ``s0·B0·A0 ≠ 0`` needs ``−s0·B0·A0`` somewhere. Either it has been
subtracted from the base weights, or a frozen copy of the initial factors does the same in the
forward pass, and the base stays as it was. In both cases the initial factors are kept on the
adapter layer, in buffers that no checkpoint contains, because an adapter for the original base is
``s·B·A − s0·B0·A0``.

``save_pretrained`` of such a model, and so every checkpoint of ``Trainer``, writes a plain LoRA for
the original base and the initial factors beside it (``lorapro.export_guard``). To resume without
initialising again, read them back on the fresh model (``lorapro.lora_ga.load_initial``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorapro.lora_ga.layers import (
    AdaptedLayer,
    adapted_layers,
    all_pairs,
    as_if_trained,
    resolve_adapter,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "BASES",
    "InitialFactors",
    "attach",
    "check_can_attach",
    "guard",
    "initial_layers",
    "initial_of",
    "keep",
    "remember_initial",
    "share_initial",
    "subtract",
]

BASES = ("subtract", "frozen")
# Attribute of an adapter layer that maps adapter names to their InitialFactors.
HOLDER = "initial_factors"


class InitialFactors(nn.Module):
    """A0, B0 and s0 of one adapter of one layer, as frozen buffers.

    Attributes:
        A: A0, shaped as the adapter stores A.
        B: B0, shaped as the adapter stores B.
        scaling: s0.
        base: ``"subtract"`` if ``s0·B0·A0`` is gone from W0, ``"frozen"`` if the forward pass
            subtracts it.
    """

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor, scaling: float, base: str) -> None:
        super().__init__()
        self.register_buffer("A", A.detach().clone(), persistent=False)
        self.register_buffer("B", B.detach().clone(), persistent=False)
        self.scaling = float(scaling)
        self.base = base


def initial_of(module: nn.Module, adapter: str) -> InitialFactors | None:
    """The initial factors kept on an adapter layer, if any."""
    holder = getattr(module, HOLDER, None)
    return holder[adapter] if holder is not None and adapter in holder else None


def check_can_attach(layers: Sequence[AdaptedLayer], model: nn.Module, base: str) -> list[str]:
    """Why ``base`` is impossible on these layers, one reason a layer; empty if it is possible."""
    if base == "frozen":
        from lorapro.lora_ga.frozen import can_freeze

        return [
            f"{x.name}: {type(x.module).__module__}.{type(x.module).__name__} has no place for a "
            "frozen copy; use base='subtract'"
            for x in layers
            if not can_freeze(x)
        ]
    reasons = []
    users = _users_of_weights(model)
    for layer in layers:
        weight = layer.weight
        paths = users.get(_identity(weight), ())
        others = [path for path in paths if not _passes_through(model, path, layer.module)]
        if layer.is_quantized():
            kind = type(weight).__name__ if weight is not None else "no weight"
            why = f"its base weight is quantized ({kind}) and cannot be changed exactly"
        elif getattr(weight, "ds_id", None) is not None or hasattr(weight, "device_mesh"):
            why = "its base weight is sharded"
        elif layer.pair.layout == "groups":
            why = "the update of a grouped convolution reaches across groups, its base cannot"
        elif others:
            why = f"its base weight is tied to {others[0]}, which would change too"
        else:
            continue
        reasons.append(f"{layer.name}: {why}; use base='frozen'")
    return reasons


def _identity(weight: Any) -> int:
    return (weight.data_ptr() or id(weight)) if isinstance(weight, Tensor) else 0


def _passes_through(model: nn.Module, path: str, module: nn.Module) -> bool:
    """Whether a path from the model down to a weight leads through ``module``."""
    current: Any = model
    for part in path.split("."):
        if current is module:
            return True
        current = getattr(current, part)
    return current is module


def _users_of_weights(model: nn.Module) -> dict[int, list[str]]:
    """Every path by which a module that holds a weight can be called."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(_identity(parameter), []).append(name)
    return users


@torch.no_grad()
def attach(layer: AdaptedLayer, A: Tensor, B: Tensor, base: str, *, set_factors: bool) -> None:
    """Put ``−s·B·A`` in place and keep A and B as the initial factors.

    Args:
        layer: the layer.
        A: initial factor as the adapter stores it.
        B: initial factor as the adapter stores it.
        base: ``"subtract"`` or ``"frozen"``.
        set_factors: also make A and B the adapter's current factors.
    """
    pair = layer.pair
    # Rounded as the adapter will hold them, so that what is subtracted is what is added.
    A, B = A.to(pair.A), B.to(pair.B)
    if base == "subtract":
        subtract(layer, A, B, pair.scaling)
    if set_factors:
        pair.A.data.copy_(A)
        pair.B.data.copy_(B)
    keep(layer.module, layer.adapter, InitialFactors(A, B, pair.scaling, base))
    if base == "frozen":
        from lorapro.lora_ga.frozen import freeze

        freeze(layer)


def subtract(layer: AdaptedLayer, A: Tensor, B: Tensor, scaling: float) -> None:
    """``W0 ← W0 − scaling·B·A``."""
    work = torch.promote_types(layer.dtype, layer.weight.dtype)
    A_k, B_k = layer.factors(A.to(work), B.to(work))
    delta = layer.from_matrices(scaling * (B_k @ A_k))
    layer.weight.data.copy_(layer.weight.data.to(work) - delta.to(layer.weight.device))


def keep(module: nn.Module, adapter: str, initial: InitialFactors) -> None:
    """Store initial factors on an adapter layer."""
    if not hasattr(module, HOLDER):
        setattr(module, HOLDER, nn.ModuleDict())
    getattr(module, HOLDER)[adapter] = initial


def remember_initial(model: nn.Module, adapter: str | None = None) -> int:
    """Keep the current factors as the initial ones, for an initialisation that changed the base.

    Call it right after ``get_peft_model`` and before training, for PiSSA, OLoRA, CorDA or PEFT's
    own ``lora_ga``: they subtract their start from the base weights and keep no record of it, and
    :func:`lorapro.export.save_portable` needs one. (:func:`lorapro.lora_ga.initialize` keeps its
    own.)

    Args:
        model: the PEFT model.
        adapter: name of the adapter; ``None`` if there is one.

    Returns:
        The number of layers remembered; layers that start at ``B·A = 0`` need none.

    Raises:
        ValueError: initial factors are there already.

    >>> from peft import LoraConfig, get_peft_model
    >>> net = nn.Sequential(nn.Linear(6, 4))
    >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
    >>> remember_initial(get_peft_model(net, config))
    1
    """
    adapter = resolve_adapter(model, adapter)
    count = 0
    modules = [(model.get_submodule(p.name), p) for p in all_pairs(model, adapter)]
    for module, pair in modules:
        if initial_of(module, adapter) is not None:
            raise ValueError(f"{pair.name}: the initial factors of {adapter!r} are kept already.")
    for module, pair in modules:
        if pair.A.any() and pair.B.any():
            keep(module, adapter, InitialFactors(pair.A, pair.B, pair.scaling, "subtract"))
            count += 1
    guard(model)
    return count


def initial_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, InitialFactors]]:
    """(name, initial factors) of every layer of an adapter that has some."""
    for name, module in model.named_modules():
        found = initial_of(module, adapter) if hasattr(module, HOLDER) else None
        if found is not None:
            yield name, found


def guard(model: nn.Module) -> None:
    """Let the model save what works on the original base (``lorapro.export_guard``)."""
    from lorapro.export_guard import guard_saving

    guard_saving(model)


def share_initial(model: nn.Module, source: str, target: str) -> int:
    """Give a copy of an adapter the frozen initial factors of the one it is a copy of.

    Args:
        model: a model with both adapters.
        source: adapter that was initialised.
        target: a copy of it, made with ``add_adapter`` and by copying A and B.

    Returns:
        Number of layers whose copy subtracts the frozen start from now on.
    """
    from lorapro.lora_ga.frozen import freeze

    with as_if_trained(model, target):
        layers = adapted_layers(model, target)[0]
    shared = 0
    for layer in layers:
        initial = initial_of(layer.module, source)
        if initial is None or initial_of(layer.module, target) is not None:
            continue
        keep(
            layer.module,
            target,
            InitialFactors(initial.A, initial.B, initial.scaling, initial.base),
        )
        if initial.base == "frozen":
            freeze(layer)
            shared += 1
    return shared
