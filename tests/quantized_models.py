"""Models stored in 4 and 8 bits of bitsandbytes, and the weights that they compute with."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn


def in_bits(model, bits):
    """A copy with every linear layer but the head stored so, as transformers does."""
    bnb = pytest.importorskip("bitsandbytes")
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or name == "lm_head":
            continue
        shape = (layer.in_features, layer.out_features)
        if bits == 4:
            twin = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=torch.float32)
            twin.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, module=twin)
        else:
            twin = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=0.0)
            twin.weight = bnb.nn.Int8Params(
                layer.weight.data, requires_grad=False, has_fp16_weights=False
            )
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, twin.to("cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


def written_out(model, small):
    """A copy of the model with the weights of the quantized one, in float32."""
    plain = copy.deepcopy(model)
    for name, layer in small.named_modules():
        weight = getattr(layer, "weight", None)
        if type(layer).__name__ in ("Linear4bit", "Linear8bitLt"):
            # A copy: on a CPU PEFT's function changes an 8-bit layer.
            W = dequantize_module_weight(copy.deepcopy(layer))
        elif hasattr(weight, "dequantize") and type(weight) is not nn.Parameter:
            W = weight.dequantize()
        else:
            continue
        plain.get_submodule(name).weight.data.copy_(W.detach().float())
    return plain
