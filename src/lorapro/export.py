"""Adapters that leave the house: plain LoRA for the original base, and merged models.

An adapter that did not start at ``B·A = 0`` is trained on a base that is no longer the original one
(LoRA-GA, PiSSA and their like). What it has learnt is still a plain LoRA of the original base::

    ΔW = s·B·A − s0·B0·A0 = [s·B, −s0·B0]·[A; A0]          rank 2r

Here it is written so that any loader reads it: one rank for all layers, ``lora_alpha = r`` (scaling
1, every layer's own scaling folded into B), no rsLoRA, no rank or alpha patterns. Layers of smaller
rank are padded with zeros, because servers such as vLLM read one ``r`` from the config and know
nothing of patterns.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorapro.export_change import change_from_base, change_of, low_rank, stored_factors, stored_rank
from lorapro.export_merged import names_of_parameters
from lorapro.export_merged import save_merged as save_merged
from lorapro.factors import LoraPair
from lorapro.lora_ga.initial import initial_of
from lorapro.lora_ga.initial import remember_initial as remember_initial
from lorapro.lora_ga.layers import all_pairs, resolve_adapter

__all__ = [
    "PortableLayer",
    "PortableReport",
    "low_rank",
    "remember_initial",
    "save_merged",
    "save_portable",
]

# Values of init_lora_weights that subtract the start from the base and keep no record of it.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# A base weight with this attribute has been decayed by an optimizer (AdamW in full mode).
DECAYED = "lorapro_decayed"


@dataclass(frozen=True)
class PortableLayer:
    """One exported weight: its name, its true rank, and ``‖ΔW − exported‖ / ‖ΔW‖``."""

    name: str
    rank: int
    error: float


@dataclass(frozen=True)
class PortableReport:
    """What :func:`save_portable` wrote.

    Attributes:
        path: the folder.
        rank: ``r`` of the written config.
        layers: one row an adapted weight.
    """

    path: str
    rank: int
    layers: tuple[PortableLayer, ...]

    @property
    def error(self) -> float:
        """Largest relative error of a layer; 0 if nothing was cut off."""
        return max((x.error for x in self.layers), default=0.0)

    def __str__(self) -> str:
        text = f"{self.path}: plain LoRA of rank {self.rank}, {len(self.layers)} weights"
        if self.error:
            worst = max(self.layers, key=lambda x: x.error)
            mean = sum(x.error for x in self.layers) / len(self.layers)
            text += f"; cut off: {mean:.2%} of the change on average, {worst.error:.2%} at most"
            text += f" ({worst.name})"
        return text


def save_portable(
    peft_model: Any,
    path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    rank: int | None = None,
    original: nn.Module | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> PortableReport:
    """Write an adapter as plain LoRA for the original, untouched base model.

    ``PeftModel.from_pretrained(original_base, path)`` then gives the trained model. The rank is 2r
    if the adapter started at ``B·A ≠ 0``, r if it did not. Modules saved in full
    (``modules_to_save``) are written too. The model is left as it is.

    Args:
        peft_model: a PEFT model; its base may be changed (LoRA-GA ``"subtract"``, PiSSA), frozen,
            or quantized.
        path: folder to write ``adapter_config.json`` and ``adapter_model.safetensors`` to.
        adapter: name of the adapter; ``None`` if there is one.
        rank: cut every layer down to this rank by SVD; the error is in the report.
        original: the base model before the adapter was added. Needed for PiSSA and its like when
            the initial factors were not remembered (``lorapro.lora_ga.remember_initial``); without
            it the base is loaded again from where the config says it came from.
        state_dict: of the model, where its own parameters are not whole (gathered shards).

    Returns:
        A report; ``print`` it.

    Raises:
        ValueError: no plain LoRA (DoRA, say), initial factors unknown, or a base that has changed
            in another way (weight decay in full mode): then :func:`save_merged`.

    >>> import tempfile
    >>> from peft import LoraConfig, get_peft_model
    >>> net = nn.Sequential(nn.Linear(6, 4))
    >>> model = get_peft_model(net, LoraConfig(r=2, use_rslora=True, target_modules=["0"]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_portable(model, folder).rank
    2
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    peft_model = getattr(peft_model, "_orig_mod", peft_model)
    if not hasattr(peft_model, "peft_config"):
        raise ValueError(f"expected a PEFT model, found {type(peft_model).__name__}.")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank is {rank!r}, expected a positive integer.")
    target = Path(path)
    if target.is_file():
        raise ValueError(f"{target} is a file; expected a folder to write to.")
    adapter = resolve_adapter(peft_model, adapter)
    config = peft_model.peft_config[adapter]
    pairs = all_pairs(peft_model, adapter)
    if not pairs:
        raise ValueError(f"adapter {adapter!r} has no LoRA layers.")
    _check_plain(peft_model, pairs, adapter)

    names = names_of_parameters(peft_model)
    state = dict(peft_model.state_dict() if state_dict is None else state_dict)
    held = pairs if state_dict is None else [_as_in(p, names, state) for p in pairs]
    if _start_unknown(config, peft_model, pairs, adapter):
        original = original if original is not None else _load_original(peft_model, config)
    if original is None:
        changes = [change_of(peft_model, pair, adapter) for pair in held]
    else:
        changes = [
            change_from_base(peft_model, original, pair, adapter, strict=rank is None)
            for pair in held
        ]
    done, rows = _cut(pairs, changes, rank)
    common = _common_rank(pairs, done)
    for pair, (left, right) in zip(pairs, done, strict=True):
        A, B = stored_factors(pair, left, right, common)
        state.update(dict.fromkeys(names[id(pair.A)], A))
        state.update(dict.fromkeys(names[id(pair.B)], B))
        bias = _bias_of(peft_model.get_submodule(pair.name), adapter)
        if bias is not None:
            value = state[names[id(bias)][0]].detach()
            state.update(dict.fromkeys(names[id(bias)], value * pair.scaling))
    embeds = any(hasattr(peft_model.get_submodule(p.name), "_embed") for p in pairs)
    tensors = get_peft_model_state_dict(
        peft_model,
        state_dict=state,
        adapter_name=adapter,
        save_embedding_layers=False if embeds else "auto",
    )
    written = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    portable = _portable_config(config, peft_model, common)

    target.mkdir(parents=True, exist_ok=True)
    scratch = target / ".adapter_model.safetensors.part"
    save_file(written, scratch, metadata={"format": "pt"})
    scratch.replace(target / "adapter_model.safetensors")
    portable.save_pretrained(str(target))
    return PortableReport(str(target), common, tuple(rows))


def _as_in(pair: LoraPair, names: Mapping[int, list[str]], state: Mapping[str, Tensor]) -> LoraPair:
    """The pair with the factors of a state dict."""
    A, B = (state[names[id(p)][0]].detach() for p in (pair.A, pair.B))
    return replace(pair, A=nn.Parameter(A, False), B=nn.Parameter(B, False))


def _cut(
    pairs: Sequence[LoraPair], changes: Sequence[tuple[Tensor, Tensor]], rank: int | None
) -> tuple[list[tuple[Tensor, Tensor]], list[PortableLayer]]:
    """Factors of every change, of at most that rank, and what was lost."""
    rows: list[PortableLayer] = []
    done: list[tuple[Tensor, Tensor]] = []
    for pair, (left, right) in zip(pairs, changes, strict=True):
        per_block = rank
        if rank is not None and pair.layout == "groups":
            per_block = rank // pair.blocks
        error = 0.0
        if per_block is not None and left.shape[-1] > per_block:
            left, right, errors = low_rank(left, right, per_block)
            error = float(errors.max())
        done.append((left, right))
        rows.append(PortableLayer(pair.name, left.shape[-1], error))
    return done, rows


def _common_rank(pairs: Sequence[LoraPair], done: Sequence[tuple[Tensor, Tensor]]) -> int:
    """The one rank that all layers are stored with."""
    common = max(stored_rank(pair, left) for pair, (left, _) in zip(pairs, done, strict=True))
    for pair in pairs:
        if pair.layout == "groups" and common % pair.blocks:
            raise ValueError(
                f"{pair.name} is a convolution of {pair.blocks} groups: rank {common} cannot be "
                f"shared out among them; pass a rank that is a multiple of {pair.blocks}."
            )
    return common


def _check_plain(model: Any, pairs: tuple[LoraPair, ...], adapter: str) -> None:
    for pair in pairs:
        module: Any = model.get_submodule(pair.name)
        variant = type(getattr(module, "lora_variant", {}).get(adapter)).__name__
        if variant not in ("NoneType", "FrozenInitialVariant"):
            raise ValueError(
                f"{pair.name} is no plain LoRA ({variant}), so its change of W is not s·B·A; use "
                "PEFT's save_pretrained for the adapter as it is, or save_merged."
            )
        if getattr(pair.base, DECAYED, False):
            raise ValueError(
                f"the base weight of {pair.name} was decayed during training (LoRA-Pro full mode "
                "with weight decay), which no adapter can carry; use save_merged."
            )


def _start_unknown(config: Any, model: Any, pairs: tuple[LoraPair, ...], adapter: str) -> bool:
    init = str(getattr(config, "init_lora_weights", True)).lower()
    if not init.startswith(_CHANGES_BASE):
        return False
    return all(initial_of(model.get_submodule(p.name), adapter) is None for p in pairs)


def _load_original(model: Any, config: Any) -> nn.Module:
    """The base model as it was, from where it came from."""
    source = getattr(config, "base_model_name_or_path", None)
    base = model.get_base_model()
    advice = (
        f"the adapter was initialised with {config.init_lora_weights!r}, which changed the base, "
        "and its initial factors are not known. Call lorapro.lora_ga.remember_initial(model) right "
        "after get_peft_model next time; now pass original=<the base model as it was>"
    )
    if not source or not hasattr(type(base), "from_pretrained"):
        raise ValueError(advice + ".")
    try:
        return type(base).from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{advice}; loading it from {source!r} failed ({reason}).") from error


def _bias_of(module: Any, adapter: str) -> Tensor | None:
    if adapter not in getattr(module, "lora_B", {}):
        return None
    return getattr(module.lora_B[adapter], "bias", None)


def _portable_config(config: Any, model: Any, rank: int) -> Any:
    portable = copy.deepcopy(config)
    changes: Mapping[str, Any] = {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "loftq_config": {},
        "lora_ga_config": None,
        "corda_config": None,
        "eva_config": None,
        "inference_mode": True,
    }
    for name, value in changes.items():
        if hasattr(portable, name):
            setattr(portable, name, value)
    if portable.base_model_name_or_path is None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else None
        portable.base_model_name_or_path = getattr(base, "name_or_path", None)
    return portable
