"""Builders of model folders from files of other formats.

A builder gets the unpacked folder and an empty target folder. It may leave the target half done
when it raises: ``fetch`` then keeps nothing.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path

from lorapro.experiments.errors import UserError

__all__ = ["dequantize_gguf", "dinov2_from_onnx", "require_modules"]

# DINOv2 reads pixels in [0, 1], normalised by ImageNet's mean and deviation.
_DINOV2_PIXELS = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def dequantize_gguf(source: Path, target: Path) -> None:
    """Turn the one GGUF file in ``source`` into float32 safetensors and tokenizer in ``target``.

    Raises:
        UserError: transformers or gguf is not installed.
    """
    require_modules(("transformers", "gguf"), "a GGUF model")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        (gguf,) = source.glob("*.gguf")
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=gguf.name, dtype=torch.float32
        )
        config = loaded.config
        # The tensors are ordinary float32 by now; the entry would make every later load treat the
        # folder as a quantized model, and refuses to be saved.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    finally:
        logging.enable_progress_bar()


def dinov2_from_onnx(source: Path, target: Path) -> None:
    """Turn the DINOv2 backbone in the one ONNX file in ``source`` into a model folder.

    The exporter keeps names of parameters, except where it folds: a linear layer's transposed
    weight and the position embeddings become initializers without a name of their own. The former
    are found by the layer that multiplies with them, the latter by their shape.

    Raises:
        UserError: transformers or onnx is not installed.
    """
    require_modules(("transformers", "onnx"), "an ONNX model")
    import numpy as np
    import onnx
    from safetensors.numpy import save_file
    from transformers import Dinov2Config

    (file,) = source.glob("*.onnx")
    graph = onnx.load(file).graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    prefix = "backbone."
    tensors = {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}
    for node in graph.node:
        layer = node.name.strip("/").replace("/", ".").removesuffix(".MatMul")
        if node.op_type == "MatMul" and layer.startswith(prefix) and node.input[1] in arrays:
            tensors[layer.removeprefix(prefix) + ".weight"] = arrays[node.input[1]].T
    # Shapes (1, 1, hidden) and (1, patches, hidden): the class token's position and the patches'.
    positions = [a for n, a in arrays.items() if a.ndim == 3 and not n.startswith(prefix)]
    positions.sort(key=lambda array: array.shape[1])
    tensors["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)

    hidden = tensors["embeddings.cls_token"].shape[-1]
    patch = tensors["embeddings.patch_embeddings.projection.weight"].shape[-1]
    config = Dinov2Config(
        hidden_size=hidden,
        num_hidden_layers=len({n.split(".")[2] for n in tensors if n.startswith("encoder.layer.")}),
        num_attention_heads=hidden // 64,  # in every size of DINOv2
        mlp_ratio=len(tensors["encoder.layer.0.mlp.fc1.bias"]) // hidden,
        patch_size=patch,
        image_size=patch * math.isqrt(tensors["embeddings.position_embeddings"].shape[1] - 1),
        use_mask_token=False,
        architectures=["Dinov2Model"],
    )
    config.save_pretrained(target)
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "preprocessor_config.json").write_text(json.dumps(_DINOV2_PIXELS), encoding="utf-8")


def require_modules(modules: Sequence[str], what: str) -> None:
    """Raise a one-line error for the first of ``modules`` that is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"converting {what} needs the package {module!r}, which is not installed; "
                "run: pip install 'lorapro[experiments]'"
            )
