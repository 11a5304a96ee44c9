"""The factors an adapter started from: where they live, and what they do in the forward pass.

An initialisation that starts at ``s0·B0·A0 ≠ 0`` needs ``−s0·B0·A0`` somewhere. Either it has been
subtracted from the base weights, or a frozen copy of the initial factors does the same in the
forward pass, and the base stays as it was. In both cases the initial factors are kept on the
adapter layer, in buffers that no checkpoint contains, because an adapter for the original base is
``s·B·A − s0·B0·A0``.

Checkpoints hold A and B only. To resume one, write the initial factors beside it once
(:func:`save_initial`) and read them back on the fresh model (:func:`load_initial`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
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
    "INITIAL_FILE",
    "InitialFactors",
    "attach",
    "check_can_attach",
    "initial_of",
    "load_initial",
    "remember_initial",
    "save_initial",
    "share_initial",
]

BASES = ("subtract", "frozen")
INITIAL_FILE = "lora_ga_initial.safetensors"
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
        work = torch.promote_types(layer.dtype, layer.weight.dtype)
        A_k, B_k = layer.factors(A.to(work), B.to(work))
        delta = layer.from_matrices(pair.scaling * (B_k @ A_k))
        layer.weight.data.copy_(layer.weight.data.to(work) - delta.to(layer.weight.device))
    if set_factors:
        pair.A.data.copy_(A)
        pair.B.data.copy_(B)
    keep(layer.module, layer.adapter, InitialFactors(A, B, pair.scaling, base))
    if base == "frozen":
        from lorapro.lora_ga.frozen import freeze

        freeze(layer)


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
    return count


def initial_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, InitialFactors]]:
    """(name, initial factors) of every layer of an adapter that has some."""
    for name, module in model.named_modules():
        found = initial_of(module, adapter) if hasattr(module, HOLDER) else None
        if found is not None:
            yield name, found


def save_initial(model: nn.Module, folder: str | Path, adapter: str | None = None) -> Path:
    """Write the initial factors as ``lora_ga_initial.safetensors`` in ``folder``.

    Write it once, into the output folder, right after initialising: checkpoints hold the trained
    factors only, and a model to resume them on needs these.

    Args:
        model: a model with initial factors.
        folder: made if it is not there.
        adapter: name of the adapter; ``None`` if there is one.

    Returns:
        Path of the file.

    Raises:
        ValueError: the adapter has no initial factors.
    """
    from safetensors.torch import save_file

    adapter = resolve_adapter(model, adapter)
    tensors: dict[str, Tensor] = {}
    bases = set()
    for name, initial in initial_layers(model, adapter):
        tensors[f"{name}.A"] = initial.A.detach().cpu().contiguous()
        tensors[f"{name}.B"] = initial.B.detach().cpu().contiguous()
        tensors[f"{name}.scaling"] = torch.tensor(initial.scaling, dtype=torch.float64)
        bases.add(initial.base)
    if not tensors:
        raise ValueError(
            f"adapter {adapter!r} has no initial factors; initialise it first "
            "(lorapro.lora_ga.initialize), or remember_initial for PiSSA and its like."
        )
    path = Path(folder) / INITIAL_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt", "base": ",".join(sorted(bases))})
    return path


def load_initial(model: nn.Module, folder: str | Path, adapter: str | None = None) -> int:
    """Do again what an earlier initialisation did, from the file of :func:`save_initial`.

    On a fresh adapter (``B·A = 0``) the factors become the initial ones; on a trained adapter that
    was loaded from a checkpoint they stay, and only ``−s0·B0·A0`` is put in place.

    Args:
        model: the same base and adapter configuration as before, not initialised.
        folder: the folder (or the file itself).
        adapter: name of the adapter; ``None`` if there is one.

    Returns:
        Number of layers restored.

    Raises:
        ValueError: another model, other shapes or scalings, or initial factors already in place.
        FileNotFoundError: no such file.
    """
    from safetensors import safe_open

    adapter = resolve_adapter(model, adapter)
    path = Path(folder)
    path = path / INITIAL_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no initial factors at {path}; expected {INITIAL_FILE} there.")
    with safe_open(path, framework="pt") as stream:
        tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
        base = (stream.metadata() or {}).get("base", "subtract")
    for name, _ in initial_layers(model, adapter):
        raise ValueError(f"{name} is initialised already; load into a fresh model.")
    names = list(dict.fromkeys(key.rpartition(".")[0] for key in tensors))
    with as_if_trained(model, adapter):
        layers = {x.name: x for x in adapted_layers(model, adapter)[0]}
    missing = [name for name in names if name not in layers]
    if missing:
        raise ValueError(f"{path} is of another model: it has {missing[0]}, this model has not.")
    chosen = [layers[name] for name in names]
    for x in chosen:
        A, B = tensors[f"{x.name}.A"], tensors[f"{x.name}.B"]
        if A.shape != x.pair.A.shape or B.shape != x.pair.B.shape:
            raise ValueError(
                f"{x.name}: saved A {tuple(A.shape)} and B {tuple(B.shape)}, expected "
                f"{tuple(x.pair.A.shape)} and {tuple(x.pair.B.shape)} (another rank?)."
            )
        if abs(float(tensors[f"{x.name}.scaling"]) - x.pair.scaling) > 1e-9 * x.pair.scaling:
            raise ValueError(
                f"{x.name}: saved with scaling {float(tensors[f'{x.name}.scaling'])}, this adapter "
                f"has {x.pair.scaling}; use the same lora_alpha, r and use_rslora."
            )
    reasons = check_can_attach(chosen, model, base)
    if reasons:
        raise ValueError(reasons[0])
    for x in chosen:
        fresh = not (x.pair.A.any() and x.pair.B.any())
        attach(x, tensors[f"{x.name}.A"], tensors[f"{x.name}.B"], base, set_factors=fresh)
    return len(chosen)


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
