"""``save_pretrained`` and ``load_adapter`` of a model whose adapter alone is not what was trained.

PEFT saves A and B. On the original base they give the trained model only if the adapter started at
``B·A = 0`` and the base did not change. Where it did not, or has, a model is *guarded*:

- An adapter with initial factors (LoRA-GA, or remembered ones of PiSSA and its like) is saved as
  :func:`lorapro.save_portable` does, a plain LoRA for the original base that any loader reads. What
  a resumed training needs beside it, A and B as they are and the initial factors, goes into
  ``lora_ga_initial.safetensors`` in the same folder; the guarded model's ``load_adapter``, which is
  what ``Trainer`` resumes with, reads both.
- A base decayed by LoRA-Pro's full mode cannot be saved in any adapter: saving warns and names
  :func:`lorapro.save_merged`.

Both are attributes of the one model, so they reach ``Trainer``, ``push_to_hub`` and every other
caller of ``save_pretrained``, and no other model.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorapro.lora_ga.initial import initial_layers
from lorapro.lora_ga.saved import INITIAL_FILE, replace_initial, save_initial

__all__ = ["guard_saving"]

TRAINED = "trained/"  # prefix of A, B and what else the portable adapter holds in another form


def guard_saving(model: Any) -> None:
    """Guard a model that has ``save_pretrained``; see this module. Twice is once.

    Args:
        model: a ``PeftModel``. A transformers model with adapters of its own (``add_adapter``) is
            made to warn, any other module is left alone.
    """
    model = getattr(model, "_orig_mod", model)
    inner = getattr(model, "module", None)
    if not hasattr(model, "save_pretrained") and isinstance(inner, nn.Module):  # DDP
        model = inner
    if not hasattr(model, "save_pretrained") or "save_pretrained" in vars(model):
        return
    model.save_pretrained = SavePretrained(model)
    if hasattr(model, "load_adapter"):
        model.load_adapter = LoadAdapter(model)


class _Method:
    """A method of one model: found in its ``__dict__``, copied and pickled with it."""

    name = ""

    def __init__(self, model: Any) -> None:
        self.model = model

    def original(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self.model), self.name)(self.model, *args, **kwargs)


class SavePretrained(_Method):
    """``model.save_pretrained``."""

    name = "save_pretrained"

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """As PEFT's, with adapters that have initial factors written for the original base."""
        model = self.model
        from peft import PeftModel

        if not isinstance(model, PeftModel):
            _warn_of_parts(model)
            self.original(save_directory, **kwargs)
            return
        chosen = list(model.peft_config) if selected_adapters is None else list(selected_adapters)
        started = [a for a in chosen if next(initial_layers(model, a), None) is not None]
        decayed = _decayed_base(model)
        if decayed is not None:
            warnings.warn(
                f"the base weights were decayed during training ({decayed} among them: LoRA-Pro "
                "full mode with weight decay), which no adapter holds: what is saved here gives "
                "other outputs on the original base. For a model to use, "
                "lorapro.save_merged(model, path).",
                stacklevel=2,
            )
        self.original(save_directory, safe_serialization, [], **kwargs)  # the model card
        for adapter in chosen:
            folder = Path(save_directory)
            folder = folder if adapter == "default" else folder / adapter
            main = kwargs.get("is_main_process", True)
            wanted = adapter in started and decayed is None and main
            if wanted and _save_portable(model, adapter, folder, kwargs.get("state_dict")):
                continue
            self.original(save_directory, safe_serialization, [adapter], **kwargs)
            if adapter in started and main:
                save_initial(model, folder, adapter)


def _save_portable(
    model: Any, adapter: str, folder: Path, state: Mapping[str, Tensor] | None
) -> bool:
    """Save an adapter for the original base, and what resuming needs; false if it cannot be."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    from lorapro.export import save_portable

    try:
        save_portable(model, folder, adapter=adapter, state_dict=state)
    except ValueError as error:
        warnings.warn(
            f"adapter {adapter!r} did not start at B·A = 0 and cannot be saved for the original "
            f"base, on which it gives other outputs: {error}",
            stacklevel=3,
        )
        return False
    written = load_file(folder / "adapter_model.safetensors")
    raw = get_peft_model_state_dict(model, state_dict=state, adapter_name=adapter)
    trained = {
        TRAINED + key: value
        for key, value in raw.items()
        if key not in written or not _same(written[key], value)
    }
    save_initial(model, folder, adapter, beside=trained)
    return True


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.detach().cpu())


class LoadAdapter(_Method):
    """``model.load_adapter``."""

    name = "load_adapter"

    def __call__(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's; into an adapter with initial factors, what a resumed training needs."""
        model, file = self.model, Path(model_id) / INITIAL_FILE
        started = adapter_name in model.peft_config and next(
            initial_layers(model, adapter_name), None
        )
        if not started or not file.is_file():
            return self.original(model_id, adapter_name, *args, **kwargs)
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        tensors = load_file(file)
        trained = {k.removeprefix(TRAINED): v for k, v in tensors.items() if k.startswith(TRAINED)}
        state = load_file(Path(model_id) / "adapter_model.safetensors")
        replace_initial(model, adapter_name, file)
        return set_peft_model_state_dict(model, {**state, **trained}, adapter_name=adapter_name)


def _warn_of_parts(model: Any) -> None:
    """A transformers model that holds adapters itself: say what its own saving leaves out."""
    adapters = list(getattr(model, "peft_config", ()))
    started = [a for a in adapters if next(initial_layers(model, a), None) is not None]
    if started:
        warnings.warn(
            f"adapter {started[0]!r} did not start at B·A = 0 (LoRA-GA): on the original base what "
            "is saved here gives other outputs. For an adapter to use, "
            "lorapro.save_portable(model, path).",
            stacklevel=3,
        )


def _decayed_base(model: nn.Module) -> str | None:
    """Name of a base weight that an optimizer has decayed, if any."""
    for name, p in model.named_parameters():
        if getattr(p, "lorapro_decayed", False):
            return name
    return None
