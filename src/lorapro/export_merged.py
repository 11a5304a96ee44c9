"""The whole model with its adapter merged in."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from torch import nn

from lorapro.lora_ga.layers import resolve_adapter

__all__ = ["names_of_parameters", "save_merged"]


def save_merged(
    peft_model: Any,
    path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    in_place: bool = False,
) -> None:
    """Write the whole model with the adapter merged into the base weights as they are now.

    This is the form that carries everything: a base decayed by LoRA-Pro's full mode, one changed by
    LoRA-GA or PiSSA, modules trained in full. The model is copied first, which takes its memory
    once more.

    Args:
        peft_model: a PEFT model whose base is not quantized.
        path: folder, written by ``save_pretrained`` (``model.safetensors`` for a plain module).
        adapter: name of the adapter; ``None`` if there is one.
        in_place: merge the model itself instead of a copy; it is then no PEFT model any more.

    Raises:
        ValueError: a quantized base (merging would quantize the result again), or an adapted weight
            that is tied to another layer's.

    >>> import tempfile
    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(6, 4)), LoraConfig(target_modules=["0"]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_merged(model, folder)
    ...     os.listdir(folder)
    ['model.safetensors']
    """
    peft_model = getattr(peft_model, "_orig_mod", peft_model)
    if not hasattr(peft_model, "merge_and_unload"):
        raise ValueError(f"expected a PEFT model, found {type(peft_model).__name__}.")
    target = Path(path)
    if target.is_file():
        raise ValueError(f"{target} is a file; expected a folder to write to.")
    adapter = resolve_adapter(peft_model, adapter)
    names = names_of_parameters(peft_model)
    for name, module in peft_model.named_modules():
        if not hasattr(module, "get_base_layer") or not hasattr(module, "lora_A"):
            continue
        base: Any = module.get_base_layer()
        weight = getattr(base, getattr(module, "parameter_name", "weight"), None)
        if not (isinstance(weight, nn.Parameter) and type(weight) is nn.Parameter):
            raise ValueError(
                f"the base weight of {name} is quantized; merging would quantize the result again. "
                "Use save_portable and merge it into the unquantized base."
            )
        if len(names[id(weight)]) > 1:
            other = [n for n in names[id(weight)] if not n.startswith(name)]
            raise ValueError(
                f"the base weight of {name} is tied to {(other or ['another layer'])[0]}; merging "
                "would change both. Use save_portable."
            )
    model = peft_model if in_place else copy.deepcopy(peft_model)
    merged = model.merge_and_unload(safe_merge=True, adapter_names=[adapter])
    target.mkdir(parents=True, exist_ok=True)
    if hasattr(merged, "save_pretrained"):
        merged.save_pretrained(str(target))
        return
    from safetensors.torch import save_model

    save_model(merged, str(target / "model.safetensors"))


def names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Every name of every parameter, by the parameter's ``id``."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names
