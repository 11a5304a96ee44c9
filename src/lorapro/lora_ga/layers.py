"""The adapted weights LoRA-GA can initialise: what they are, and how their weight is a matrix.

========== ============================================= ========================================
kind       base layer                                    W as (k, m, n)
========== ============================================= ========================================
linear     Linear, Conv1D, quantized linear layers       k = 1
conv       Conv1d, Conv2d, Conv3d                        k = groups, n = input channels · kernel
embedding  Embedding                                     k = 1, m = dimension, n = vocabulary
parameter  a parameter of ``target_parameters``          k = experts
========== ============================================= ========================================
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorapro.choices import first_few
from lorapro.factors import LoraPair, adapter_parameters, adapters_of, find_pairs, is_tuner_layer

__all__ = [
    "AdaptedLayer",
    "adapted_kind",
    "adapted_layers",
    "all_pairs",
    "as_if_trained",
    "resolve_adapter",
]

# Set by bitsandbytes on the state of a 4-bit weight repacked for inference on a CPU.
REPACKED = "packing_format_for_cpu"


@dataclass(frozen=True)
class AdaptedLayer:
    """One adapted weight of one adapter.

    Attributes:
        name: path of the adapter layer in the model.
        kind: see the table of this module.
        module: the adapter layer.
        base: the layer that holds W0.
        pair: A, B, scaling and layout.
        adapter: name of the adapter.
    """

    name: str
    kind: str
    module: Any
    base: Any
    pair: LoraPair
    adapter: str

    @property
    def weight_name(self) -> str:
        """Name of W0 in ``base``."""
        return self.module.parameter_name if self.kind == "parameter" else "weight"

    @property
    def weight(self) -> Any:
        """W0 as stored, or ``None``."""
        return getattr(self.base, self.weight_name, None)

    @property
    def blocks(self) -> int:
        """Number k of matrices."""
        return self.pair.blocks if self.pair.layout != "matrix" else 1

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of each matrix."""
        return self.pair.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype sketches and gradients are kept in: float32, or float64 for a float64 factor."""
        return torch.promote_types(self.pair.A.dtype, torch.float32)

    def factors(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A-like and B-like stored tensors as (k, r, n) and (k, m, r)."""
        return self.pair.matrices(A, B)

    def is_quantized(self) -> bool:
        """Whether W0 is anything but an ordinary floating-point parameter."""
        weight = self.weight
        if not isinstance(weight, nn.Parameter):
            return True
        return type(weight) is not nn.Parameter or not weight.dtype.is_floating_point

    def weight_matrices(self) -> Tensor | None:
        """W0 as (k, m, n), dequantized if need be; ``None`` if it cannot be had."""
        weight = _dequantized(self.base) if self.is_quantized() else self.weight
        if weight is None or weight.numel() == 0:
            return None
        return self.as_matrices(weight.detach())

    def as_matrices(self, weight: Tensor) -> Tensor:
        """A tensor shaped as W0 is stored, seen as (k, m, n).

        For a grouped convolution n counts the channels of one group only.
        """
        if self.kind == "embedding" or self._stored_transposed():
            return weight.mT.reshape(-1, weight.shape[-1], weight.shape[-2])
        if self.kind == "conv":
            return weight.reshape(self.base.groups, -1, weight[0].numel())
        return weight.reshape(-1, *weight.shape[-2:])

    def from_matrices(self, M: Tensor) -> Tensor:
        """(k, m, n) back to how W0 is stored."""
        if self.kind == "embedding" or self._stored_transposed():
            M = M.mT
        return M.reshape(self.weight.shape)

    def _stored_transposed(self) -> bool:
        if self.kind == "parameter":
            return self.weight.dim() == 3 and not self.module._did_swap_in_out_features
        return bool(getattr(self.module, "fan_in_fan_out", False))


def resolve_adapter(model: nn.Module, adapter: str | None) -> str:
    """The adapter meant: the one named, else the only active one.

    Raises:
        ValueError: no adapter, no such adapter, or several active ones to choose from.
    """
    known: dict[str, None] = {}
    active: dict[str, None] = {}
    for module in model.modules():
        if is_tuner_layer(module):
            known.update(dict.fromkeys(adapters_of(module)))
            active.update(dict.fromkeys(getattr(module, "active_adapters", ())))
    if not known:
        raise ValueError(
            "the model has no adapter layers; expected a PEFT model (peft.get_peft_model)."
        )
    if adapter is not None:
        if adapter not in known:
            raise ValueError(f"the model has no adapter {adapter!r}; found {sorted(known)}.")
        return adapter
    candidates = [name for name in active if name in known] or list(known)
    if len(candidates) != 1:
        raise ValueError(
            f"the model has the adapters {candidates}; say which with adapter=..., one at a time."
        )
    return candidates[0]


@contextmanager
def as_if_trained(model: nn.Module, adapter: str) -> Iterator[None]:
    """Let an adapter's parameters require gradients: pairs are found among trained ones."""
    frozen = [
        p
        for module in model.modules()
        if is_tuner_layer(module) and adapter in adapters_of(module)
        for p in adapter_parameters(module, adapter)
        if not p.requires_grad and p.is_floating_point()
    ]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def all_pairs(model: nn.Module, adapter: str) -> tuple[LoraPair, ...]:
    """The pairs of an adapter, whether they are trained or not (a loaded adapter is not).

    Raises:
        ValueError: an adapter layer that no pair describes.
    """
    with as_if_trained(model, adapter):
        pairing = find_pairs(model, adapter)
    if pairing.unaligned:
        raise ValueError(
            "not a plain LoRA: " + first_few([f"{n}: {w}" for n, w in pairing.unaligned])
        )
    return pairing.pairs


def adapted_layers(
    model: nn.Module, adapter: str
) -> tuple[list[AdaptedLayer], list[tuple[str, str]]]:
    """The layers LoRA-GA can initialise, and (name, reason) of those it cannot."""
    pairing = find_pairs(model, adapter)
    layers: list[AdaptedLayer] = []
    unsupported = list(pairing.unaligned)
    for pair in pairing.pairs:
        module: Any = model.get_submodule(pair.name)
        base = module.get_base_layer()
        kind, reason = _classify(module, base, pair, adapter)
        if reason:
            unsupported.append((pair.name, reason))
        else:
            layers.append(AdaptedLayer(pair.name, kind, module, base, pair, adapter))
    return layers, unsupported


@torch.no_grad()
def _dequantized(base: Any) -> Tensor | None:
    """The weight of a quantized linear layer in floating point; the layer is left as it is.

    (PEFT's ``dequantize_module_weight`` puts a new 8-bit weight without its scales in place on a
    CPU.)
    """
    weight: Any = getattr(base, "weight", None)
    kind = type(weight).__name__
    if kind == "Int8Params":
        scales = base.state.SCB if base.state.SCB is not None else weight.SCB
        return weight.data.float() * (scales.float() / 127).unsqueeze(1)
    if kind == "Params4bit" and not getattr(weight.quant_state, REPACKED, False):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if not hasattr(base, "in_features"):
        return None
    like = weight if isinstance(weight, Tensor) else next(base.buffers(), None)
    if like is None:
        return None
    # Any other kind: its rows are what it makes of unit vectors.
    dtype = like.dtype if like.dtype.is_floating_point else torch.float32
    columns = type(base).forward(base, torch.eye(base.in_features, dtype=dtype, device=like.device))
    bias = getattr(base, "bias", None)
    return (columns if bias is None else columns - bias).mT


def adapted_kind(module: Any, base: Any) -> str:
    """Which row of this module's table an adapter layer belongs to."""
    if hasattr(module, "parameter_name"):
        return "parameter"
    if isinstance(base, nn.Embedding):
        return "embedding"
    return "conv" if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else "linear"


def _classify(module: Any, base: Any, pair: LoraPair, adapter: str) -> tuple[str, str]:
    """(kind, "") or ("", reason)."""
    variant = getattr(module, "lora_variant", {}).get(adapter)
    if variant is not None:
        return "", f"LoRA-GA is not defined for the LoRA variant {type(variant).__name__}"
    if not (pair.A.requires_grad and pair.B.requires_grad):
        return "", "one of its factors is frozen"
    kind = adapted_kind(module, base)
    if kind == "parameter":
        weight = getattr(base, module.parameter_name)
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            return "", f"the parameter {module.parameter_name} is quantized"
    elif kind == "embedding":
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(base, option):
                return "", f"Embedding with {option}={getattr(base, option)!r}"
    elif kind == "conv":
        if base.padding_mode != "zeros":
            return "", f"{type(base).__name__} with padding_mode={base.padding_mode!r}"
        if any(gap != 1 for gap in base.dilation):
            # PEFT's factor A is a convolution without dilation: it sees other patches than W0.
            return "", f"{type(base).__name__} with dilation={base.dilation}"
    else:
        known = isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D"
        quantized = not isinstance(getattr(base, "weight", None), nn.Parameter)
        if pair.A.dim() != 2 or not (known or quantized) or hasattr(base, "in_proj_weight"):
            return "", f"{type(base).__name__} is a layer type LoRA-GA has no formula for"
    return kind, ""
