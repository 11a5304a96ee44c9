"""A tiny Whisper, written in CTranslate2's format as its converter writes it, comes back."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from lorapro.experiments.assets.whisper import read_ctranslate2, whisper_from_ctranslate2
from lorapro.experiments.errors import UserError

TOKENS = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>", "a", "b", "ab"]


def string(text):
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def write_variables(path, variables, version=6):
    kinds = {"float16": 4, "int16": 2, "int8": 1}
    content = struct.pack("<I", version) + string("WhisperSpec")
    content += struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        content += string(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        content += struct.pack("<BI", kinds[str(array.dtype)], array.nbytes) + array.tobytes()
    path.write_bytes(content + struct.pack("<I", 0))


def as_ctranslate2(model):
    """The variables of a model, named and stacked as CTranslate2 does it."""
    state = {n: p.detach().half().numpy() for n, p in model.model.state_dict().items()}

    def linear(prefix):
        weight = state[f"{prefix}.weight"]
        return weight, state.get(f"{prefix}.bias", np.zeros(len(weight), np.float16))

    found = {}
    for side, layers in (("encoder", 2), ("decoder", 1)):
        found[f"{side}/num_heads"] = np.array(2, np.int16)
        found[f"{side}/pre_norm"] = np.array(1, np.int8)
        found[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        norms = {f"{side}/layer_norm": f"{side}.layer_norm"}
        plain, stacked = {}, {}
        for i in range(layers):
            ours, theirs = f"{side}/layer_{i}", f"{side}.layers.{i}"
            norms[f"{ours}/self_attention/layer_norm"] = f"{theirs}.self_attn_layer_norm"
            norms[f"{ours}/ffn/layer_norm"] = f"{theirs}.final_layer_norm"
            plain[f"{ours}/ffn/linear_0"] = f"{theirs}.fc1"
            plain[f"{ours}/ffn/linear_1"] = f"{theirs}.fc2"
            plain[f"{ours}/self_attention/linear_1"] = f"{theirs}.self_attn.out_proj"
            stacked[f"{ours}/self_attention/linear_0"] = f"{theirs}.self_attn", "qkv"
            if side == "decoder":
                norms[f"{ours}/attention/layer_norm"] = f"{theirs}.encoder_attn_layer_norm"
                plain[f"{ours}/attention/linear_0"] = f"{theirs}.encoder_attn.q_proj"
                plain[f"{ours}/attention/linear_2"] = f"{theirs}.encoder_attn.out_proj"
                stacked[f"{ours}/attention/linear_1"] = f"{theirs}.encoder_attn", "kv"
        for name, theirs in norms.items():
            found[f"{name}/gamma"] = state[f"{theirs}.weight"]
            found[f"{name}/beta"] = state[f"{theirs}.bias"]
        for name, theirs in plain.items():
            found[f"{name}/weight"], found[f"{name}/bias"] = linear(theirs)
        for name, (theirs, letters) in stacked.items():
            parts = [linear(f"{theirs}.{letter}_proj") for letter in letters]
            found[f"{name}/weight"] = np.concatenate([weight for weight, _ in parts])
            found[f"{name}/bias"] = np.concatenate([bias for _, bias in parts])
    for i in (1, 2):
        found[f"encoder/conv{i}/weight"] = state[f"encoder.conv{i}.weight"]
        found[f"encoder/conv{i}/bias"] = state[f"encoder.conv{i}.bias"]
    found["decoder/embeddings/weight"] = state["decoder.embed_tokens.weight"]
    return found


@pytest.fixture
def tiny(tmp_path):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(TOKENS),
        num_mel_bins=4,
        d_model=8,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        max_source_positions=6,
        max_target_positions=5,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
    )
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    source = tmp_path / "source"
    source.mkdir()
    write_variables(source / "model.bin", as_ctranslate2(model))
    (source / "config.json").write_text(json.dumps({"suppress_ids": [2], "suppress_ids_begin": []}))
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(TOKENS)}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(TOKENS[:3])
    tokenizer.save(str(source / "tokenizer.json"))
    return model, source


def test_the_model_comes_back_with_its_processor(tiny, tmp_path):
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    model, source = tiny
    target = tmp_path / "target"
    target.mkdir()
    whisper_from_ctranslate2(source, target)
    again = WhisperForConditionalGeneration.from_pretrained(target).eval()
    sound = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([[1, 2, 3], [1, 5, 4]])
    with torch.no_grad():
        expected = model.half().float()(input_features=sound, decoder_input_ids=tokens).logits
        found = again(input_features=sound, decoder_input_ids=tokens).logits
    assert again.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert again.generation_config.suppress_tokens == [2]
    assert again.generation_config.decoder_start_token_id == 1
    processor = WhisperProcessor.from_pretrained(target)
    assert processor.tokenizer("ab", add_special_tokens=False)["input_ids"] == [5]
    assert processor.feature_extractor.feature_size == 4


def test_other_versions_and_files_cut_short_are_one_clear_line(tiny, tmp_path):
    _, source = tiny
    content = (source / "model.bin").read_bytes()
    cut = tmp_path / "cut.bin"
    for size in (2, 30, len(content) // 2):
        cut.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"cut\.bin: it is cut short or broken"):
            read_ctranslate2(cut)
    write_variables(cut, {}, version=5)
    with pytest.raises(UserError, match="CTranslate2 format 5, not 6"):
        read_ctranslate2(cut)


def test_a_model_with_parts_missing_is_refused(tiny, tmp_path):
    model, source = tiny
    variables = as_ctranslate2(model)
    del variables["encoder/layer_0/ffn/linear_1/bias"]
    write_variables(source / "model.bin", variables)
    with pytest.raises(UserError, match=r"no Whisper: model\.encoder\.layers\.0\.fc2\.bias"):
        whisper_from_ctranslate2(source, tmp_path)
