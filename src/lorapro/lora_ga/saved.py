"""Initial factors on disk: written beside a checkpoint, read back to train on from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorapro.lora_ga.initial import (
    InitialFactors,
    attach,
    check_can_attach,
    guard,
    initial_layers,
    initial_of,
    keep,
    subtract,
)
from lorapro.lora_ga.layers import (
    AdaptedLayer,
    adapted_kind,
    adapted_layers,
    all_pairs,
    as_if_trained,
    resolve_adapter,
)

__all__ = ["INITIAL_FILE", "load_initial", "replace_initial", "save_initial"]

INITIAL_FILE = "lora_ga_initial.safetensors"


def save_initial(
    model: nn.Module,
    folder: str | Path,
    adapter: str | None = None,
    *,
    beside: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the initial factors as ``lora_ga_initial.safetensors`` in ``folder``.

    ``save_pretrained`` does so for every checkpoint.

    Args:
        model: a model with initial factors.
        folder: made if it is not there.
        adapter: name of the adapter; ``None`` if there is one.
        beside: further tensors to put into the file.

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
    tensors |= {k: v.detach().cpu().contiguous().clone() for k, v in (beside or {}).items()}
    path = Path(folder) / INITIAL_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{INITIAL_FILE}.part")
    save_file(tensors, scratch, metadata={"format": "pt", "base": ",".join(sorted(bases))})
    scratch.replace(path)
    return path


def load_initial(model: nn.Module, folder: str | Path, adapter: str | None = None) -> int:
    """Do again what an earlier initialisation did, from the file of :func:`save_initial`.

    For a fresh model that is to be trained on from a checkpoint, without gradients being taken once
    more: afterwards ``trainer.train(resume_from_checkpoint=…)``, or
    ``model.load_adapter(checkpoint, "default", is_trainable=True)``. To *use* a checkpoint none of
    this is needed, it is a plain LoRA for the original base.

    Args:
        model: the same base and adapter configuration as before, not initialised, not trained.
        folder: a checkpoint, or where the initial factors were saved (or the file itself).
        adapter: name of the adapter; ``None`` if there is one.

    Returns:
        Number of layers restored.

    Raises:
        ValueError: another model, other shapes or scalings, initial factors already in place, or a
            trained adapter.
        FileNotFoundError: no such file.
    """
    adapter = resolve_adapter(model, adapter)
    path = _initial_file(folder)
    for name, _ in initial_layers(model, adapter):
        raise ValueError(f"{name} is initialised already; load into a fresh model.")
    with as_if_trained(model, adapter):
        layers = {x.name: x for x in adapted_layers(model, adapter)[0]}
    saved, base = _read_initial(path)
    chosen = _matching(layers, saved, path)
    for x in chosen:
        if x.pair.A.any() and x.pair.B.any():
            raise ValueError(
                f"{x.name}: the adapter is trained; expected a fresh one (peft.get_peft_model with "
                "the training's LoraConfig). A saved adapter is a plain LoRA for the original base "
                "and needs no initial factors."
            )
    reasons = check_can_attach(chosen, model, base)
    if reasons:
        raise ValueError(reasons[0])
    for x in chosen:
        attach(x, *saved[x.name][:2], base, set_factors=True)
    guard(model)
    return len(chosen)


def replace_initial(model: nn.Module, adapter: str, folder: str | Path) -> int:
    """Let a model that is initialised already have started from saved factors instead.

    Nothing changes where they are the same. Where they are not (gradients taken again on another
    machine, say), a frozen copy is exchanged; a base that was subtracted from gets its own factors
    back and the saved ones subtracted, which rounds.

    Returns:
        Number of layers whose initial factors were others.

    Raises:
        ValueError: another model, other shapes or scalings.
    """
    path = _initial_file(folder)
    saved, _ = _read_initial(path)
    pairs = {p.name: p for p in all_pairs(model, adapter)}
    layers: dict[str, AdaptedLayer] = {}
    for name, _ in initial_layers(model, adapter):
        module: Any = model.get_submodule(name)
        base = module.get_base_layer()
        kind = adapted_kind(module, base)
        layers[name] = AdaptedLayer(name, kind, module, base, pairs[name], adapter)
    changed = 0
    for x in _matching(layers, saved, path):
        A, B, _ = saved[x.name]
        old = initial_of(x.module, adapter)
        assert old is not None
        A, B = A.to(old.A), B.to(old.B)
        if torch.equal(A, old.A) and torch.equal(B, old.B):
            continue
        changed += 1
        if old.base == "subtract":
            subtract(x, old.A, old.B, -old.scaling)
            subtract(x, A, B, old.scaling)
        keep(x.module, adapter, InitialFactors(A, B, old.scaling, old.base))
    return changed


def _initial_file(folder: str | Path) -> Path:
    path = Path(folder)
    path = path / INITIAL_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no initial factors at {path}; expected {INITIAL_FILE} there.")
    return path


def _read_initial(path: Path) -> tuple[dict[str, tuple[Tensor, Tensor, float]], str]:
    """(A0, B0, s0) by name of the layer, and the kind of base."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stream:
        keys = list(stream.keys())
        names = [k.removesuffix(".scaling") for k in keys if k.endswith(".scaling")]
        found = {
            name: (
                stream.get_tensor(f"{name}.A"),
                stream.get_tensor(f"{name}.B"),
                float(stream.get_tensor(f"{name}.scaling")),
            )
            for name in names
        }
        return found, (stream.metadata() or {}).get("base", "subtract")


def _matching(
    layers: Mapping[str, AdaptedLayer],
    saved: Mapping[str, tuple[Tensor, Tensor, float]],
    path: Path,
) -> list[AdaptedLayer]:
    """The layers that saved factors belong to, if all of them fit."""
    missing = [name for name in saved if name not in layers]
    if missing:
        raise ValueError(f"{path} is of another model: it has {missing[0]}, this model has not.")
    for name, (A, B, scaling) in saved.items():
        pair = layers[name].pair
        if A.shape != pair.A.shape or B.shape != pair.B.shape:
            raise ValueError(
                f"{name}: saved A {tuple(A.shape)} and B {tuple(B.shape)}, expected "
                f"{tuple(pair.A.shape)} and {tuple(pair.B.shape)} (another rank?)."
            )
        if abs(scaling - pair.scaling) > 1e-9 * pair.scaling:
            raise ValueError(
                f"{name}: saved with scaling {scaling}, this adapter has {pair.scaling}; use the "
                "same lora_alpha, r and use_rslora."
            )
    return [layers[name] for name in saved]
