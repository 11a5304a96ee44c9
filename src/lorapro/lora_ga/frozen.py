"""A frozen copy of the initial factors in the forward pass, through PEFT's own extension points.

``y = W0·x + s·B·A·dropout(x) − s0·B0·A0·x``: to the model it is as if ``s0·B0·A0`` had been
subtracted from W0. PEFT asks a layer's ``LoraVariant`` in the forward pass, when merging, when
unmerging, and not at all when the adapter is off; so ``merge_and_unload``, ``disable_adapter`` and
switching adapters all do the right thing. A wrapped parameter (``target_parameters``) has no
variants; its class is replaced by one whose factors are ``[B, −B0]`` and ``[A; A0]``.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import (
    Conv1d,
    Conv2d,
    Conv3d,
    Embedding,
    Linear,
    LoraVariant,
    ParamWrapper,
)
from torch import Tensor, nn

from lorapro.lora_ga.layers import AdaptedLayer

__all__ = ["FrozenInitialParamWrapper", "FrozenInitialVariant", "can_freeze", "freeze"]

# Quantized linear layers of PEFT that ask for a variant in forward and merge.
_QUANTIZED = ("Linear4bit", "Linear8bitLt", "HqqLoraLinear", "GPTQLoraLinear")


def can_freeze(layer: AdaptedLayer) -> bool:
    """Whether the adapter layer is of a class that consults its variant."""
    module = layer.module
    if layer.kind == "parameter":
        return type(module) is ParamWrapper
    plain = (Linear, Embedding, Conv1d, Conv2d, Conv3d)
    return isinstance(module, plain) or type(module).__name__ in _QUANTIZED


def freeze(layer: AdaptedLayer) -> None:
    """Make the layer subtract the initial factors that it keeps."""
    if layer.kind == "parameter":
        layer.module.__class__ = FrozenInitialParamWrapper
    else:
        layer.module.lora_variant[layer.adapter] = FrozenInitialVariant()


def _initial(module: Any, adapter: str) -> Any:
    return module.initial_factors[adapter]


class FrozenInitialVariant(LoraVariant):
    """LoRA with a frozen copy of its initial factors subtracted."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to prepare: the factors are on the layer."""

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """``result + s·B·A·dropout(x) − s0·B0·A0·x``."""
        scaling, initial = module.scaling[active_adapter], _initial(module, active_adapter)
        if active_adapter in module.lora_embedding_A:
            return result + _embedding_output(module, active_adapter, x, scaling, initial)
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        trained = lora_B(lora_A(module.lora_dropout[active_adapter](x))) * scaling
        A0, B0 = initial.A.to(x.dtype), initial.B.to(x.dtype)
        if isinstance(lora_A, nn.Linear):
            start = nn.functional.linear(nn.functional.linear(x, A0), B0)
        else:
            start = lora_B._conv_forward(lora_A._conv_forward(x, A0, None), B0, None)
        return result + (trained - start * initial.scaling)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight plus ``s·B·A − s0·B0·A0``, a new tensor."""
        delta = _delta(module, active_adapter)
        return orig_weight + delta.to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """The same in place."""
        orig_weight.data += _delta(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight minus ``s·B·A − s0·B0·A0``."""
        return orig_weight.data - _delta(module, active_adapter).to(orig_weight.dtype)


def _embedding_output(module: Any, adapter: str, x: Tensor, scaling: float, initial: Any) -> Tensor:
    hooks = {
        "input_fn": getattr(module, "input_fns", {}).get(adapter),
        "output_fn": getattr(module, "output_fns", {}).get(adapter),
    }
    hooks = {name: hook for name, hook in hooks.items() if hook is not None}
    A, B = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    out = (module._embed(x, A.T, **hooks) @ B.T) * scaling
    A0, B0 = initial.A.to(A.dtype), initial.B.to(B.dtype)
    out = out - (module._embed(x, A0.T, **hooks) @ B0.T) * initial.scaling
    get_scale = getattr(module, "_get_embed_scale", None)
    scale = get_scale() if get_scale is not None else None
    return out if scale is None else out * scale.to(out.dtype)


@torch.no_grad()
def _delta(module: Any, adapter: str) -> Tensor:
    """``s·B·A − s0·B0·A0`` as PEFT shapes it, by PEFT's own formula for both terms."""
    initial = _initial(module, adapter)
    trained = module.get_delta_weight(adapter)
    if adapter in module.lora_embedding_A:
        A, B = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    else:
        A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    kept, scaling = (A.data, B.data), module.scaling[adapter]
    try:
        A.data, B.data = initial.A.to(A), initial.B.to(B)
        module.scaling[adapter] = initial.scaling
        start = module.get_delta_weight(adapter)
    finally:
        A.data, B.data = kept
        module.scaling[adapter] = scaling
    return trained - start


class FrozenInitialParamWrapper(ParamWrapper):
    """``lora.ParamWrapper`` whose delta is ``s·B·A − s0·B0·A0``."""

    def _has_initial(self, adapter: str) -> bool:
        return adapter in getattr(self, "initial_factors", {})

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Tensor:
        """Delta of one adapter."""
        delta = super().get_delta_weight(adapter_name, *args, **kwargs)
        if not self._has_initial(adapter_name):
            return delta
        lhs, rhs, scaling = self._initial_factors(adapter_name)
        start = scaling * (lhs @ rhs)
        return delta - start.reshape(delta.shape).to(delta)

    def get_delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        """``(lhs, rhs, scaling)`` of rank 2r."""
        lhs, rhs, scaling = super().get_delta_factors(adapter_name)
        if not self._has_initial(adapter_name):
            return lhs, rhs, scaling
        lhs0, rhs0, scaling0 = self._initial_factors(adapter_name)
        lhs0 = lhs0.to(lhs) * (-scaling0 / scaling)
        return torch.cat([lhs, lhs0], dim=-1), torch.cat([rhs, rhs0.to(rhs)], dim=-2), scaling

    def _initial_factors(self, adapter: str) -> tuple[Tensor, Tensor, float]:
        initial = _initial(self, adapter)
        A = initial.A.reshape(self.num_experts, -1, initial.A.shape[-1])
        B = initial.B.reshape(initial.B.shape[0], -1, self.num_experts).permute(2, 0, 1)
        if self.num_experts > 1 and not self._did_swap_in_out_features:
            return A.mT, B.mT, initial.scaling
        return B, A, initial.scaling
