"""Builder of a Whisper model folder from CTranslate2's binary format.

The format (version 6), little-endian: version (u32); name of the specification (string) and its
revision (u32); count of variables (u32); per variable its name (string), rank (u8), sizes (u32
each), type (u8), bytes (u32) and content; then aliases. A string is its length (u16) and its bytes,
the last of them zero. Projections of attention are stacked: query, key, value in
``self_attention/linear_0``, key and value in ``attention/linear_1``. Whisper's keys have no bias:
the stack holds zeros there.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lorapro.experiments.assets.models import require_modules
from lorapro.experiments.errors import UserError

if TYPE_CHECKING:
    from numpy import ndarray

__all__ = ["read_ctranslate2", "whisper_from_ctranslate2"]

VERSION = 6
# CTranslate2's type numbers: float32, int8, int16, int32, float16.
TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}

NORMS = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}
PARTS = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_2": "encoder_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "layer_norm": "layer_norm",
    "conv1": "conv1",
    "conv2": "conv2",
}
STACKED = {
    "self_attention/linear_0": ("self_attn", "qkv"),
    "attention/linear_1": ("encoder_attn", "kv"),
}
WHOLE = {
    "embeddings/weight": "embed_tokens.weight",
    "position_encodings/encodings": "embed_positions.weight",
}


def read_ctranslate2(path: Path) -> dict[str, ndarray]:
    """Return the variables of a CTranslate2 model file by name.

    Raises:
        UserError: another version, an unknown type, or a file that is cut short.
    """
    import numpy as np

    variables = {}
    with path.open("rb") as stream:
        try:
            (version,) = _numbers(stream, "I")
            if version != VERSION:
                raise UserError(
                    f"cannot read {path.name}: CTranslate2 format {version}, not {VERSION}"
                )
            _string(stream)
            _, count = _numbers(stream, "II")
            for _ in range(count):
                name = _string(stream)
                (rank,) = _numbers(stream, "B")
                shape = _numbers(stream, f"{rank}I")
                kind, size = _numbers(stream, "BI")
                content = _read(stream, size)
                if kind not in TYPES:
                    raise UserError(f"cannot read {path.name}: {name} is of unknown type {kind}")
                variables[name] = np.frombuffer(content, TYPES[kind]).reshape(shape)
        except (EOFError, ValueError) as error:
            raise UserError(f"cannot read {path.name}: it is cut short or broken") from error
    return variables


def whisper_from_ctranslate2(source: Path, target: Path) -> None:
    """Turn ``model.bin``, ``config.json`` and ``tokenizer.json`` into a float32 model folder.

    Raises:
        UserError: transformers is not installed, or the file is not a Whisper of this format.
    """
    require_modules(("transformers",), "a CTranslate2 model")
    import numpy as np
    import torch
    from transformers import (  # type: ignore[attr-defined]
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizerFast,
    )
    from transformers.utils import logging

    variables = read_ctranslate2(source / "model.bin")
    tensors = _parameters(variables)
    vocabulary, width = tensors["model.decoder.embed_tokens.weight"].shape
    tokenizer = WhisperTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))
    end, start, plain = (
        int(tokenizer.convert_tokens_to_ids(token))
        for token in ("<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>")
    )
    layers = {
        side: len({n.split(".")[3] for n in tensors if f"{side}.layers" in n}) for side in SIDES
    }
    heads = {side: int(variables[f"{side}/num_heads"]) for side in SIDES}
    config = WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=tensors["model.encoder.conv1.weight"].shape[1],
        d_model=width,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=heads["encoder"],
        decoder_attention_heads=heads["decoder"],
        encoder_ffn_dim=tensors["model.encoder.layers.0.fc1.weight"].shape[0],
        decoder_ffn_dim=tensors["model.decoder.layers.0.fc1.weight"].shape[0],
        max_source_positions=tensors["model.encoder.embed_positions.weight"].shape[0],
        max_target_positions=tensors["model.decoder.embed_positions.weight"].shape[0],
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
    )
    model = WhisperForConditionalGeneration(config)
    state = {n: torch.from_numpy(a.astype(np.float32)) for n, a in tensors.items()}
    missing, extra = model.load_state_dict(state, strict=False)
    if extra or set(missing) - {"proj_out.weight"}:  # the output layer is the embedding
        raise UserError(f"the package's model is no Whisper: {', '.join([*extra, *missing][:3])}")
    model.tie_weights()
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    generation: Any = model.generation_config
    generation.decoder_start_token_id, generation.eos_token_id = start, end
    generation.pad_token_id, generation.is_multilingual = end, False
    generation.no_timestamps_token_id = plain
    generation.suppress_tokens = settings.get("suppress_ids")
    generation.begin_suppress_tokens = settings.get("suppress_ids_begin")
    logging.disable_progress_bar()
    try:
        model.save_pretrained(target)
    finally:
        logging.enable_progress_bar()
    tokenizer.save_pretrained(target)
    bins = config.num_mel_bins
    WhisperFeatureExtractor(feature_size=bins).save_pretrained(target)


SIDES = ("encoder", "decoder")


def _parameters(variables: dict[str, ndarray]) -> dict[str, ndarray]:
    """Rename the variables to transformers' parameters, stacked projections taken apart."""
    import numpy as np

    found: dict[str, ndarray] = {}
    for name, array in variables.items():
        side, _, rest = name.partition("/")
        prefix = f"model.{side}."
        if rest in WHOLE:
            found[prefix + WHOLE[rest]] = array
            continue
        if rest.startswith("layer_") and rest[6].isdigit():
            layer, _, rest = rest.partition("/")
            prefix += f"layers.{layer.removeprefix('layer_')}."
        part, _, kind = rest.rpartition("/")
        if part in PARTS and kind in NORMS:
            found[f"{prefix}{PARTS[part]}.{NORMS[kind]}"] = array
        elif part in STACKED:
            block, letters = STACKED[part]
            for letter, piece in zip(letters, np.split(array, len(letters)), strict=True):
                if (letter, kind) != ("k", "bias"):
                    found[f"{prefix}{block}.{letter}_proj.{kind}"] = piece
    return found


def _read(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content


def _numbers(stream: BinaryIO, kinds: str) -> tuple[int, ...]:
    return struct.unpack(f"<{kinds}", _read(stream, struct.calcsize(f"<{kinds}")))


def _string(stream: BinaryIO) -> str:
    (length,) = _numbers(stream, "H")
    return _read(stream, length).rstrip(b"\0").decode()
