"""Writers of tiny random models, saved as real ones are, with a tokenizer of the written rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorapro.experiments.toys.clip import clip
from lorapro.experiments.toys.whisper import whisper

__all__ = ["MODELS", "save_tokenizer"]

Writer = Callable[[Path, list[str]], None]
"""(an empty folder, texts of the data) -> a saved model with its tokenizer or processor."""

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def save_tokenizer(
    folder: Path, texts: list[str], *, begin: str = "", end: str = "", chat: bool = False
) -> Any:
    """Train a byte-level BPE on ``texts`` and save it.

    Args:
        folder: where to.
        texts: what to train on.
        begin: special token put before every text, or ``""``.
        end: likewise after it.
        chat: give it a chat template.

    Returns:
        The tokenizer; ``<pad>`` is 0, ``</s>`` 1, ``<s>`` 2.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "</s>", "<s>", "<unk>"]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    if begin or end:
        first, second = f"{begin} $A {end}".strip(), f"{begin} $A {end} $B {end}".strip()
        used = [(token, specials.index(token)) for token in dict.fromkeys((begin, end)) if token]
        inner.post_processor = processors.TemplateProcessing(
            single=first, pair=" ".join(second.split()), special_tokens=used
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def _seed() -> None:
    import torch

    torch.manual_seed(0)


def bert(folder: Path, texts: list[str]) -> None:
    """Save a BERT encoder of two layers."""
    from transformers import BertConfig, BertModel

    tokenizer = save_tokenizer(folder, texts, begin="<s>", end="</s>")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        pad_token_id=0,
        initializer_range=0.2,
    )
    _seed()
    BertModel(config).save_pretrained(folder)


def llama(folder: Path, texts: list[str]) -> None:
    """Save a Llama of two layers with a chat template."""
    _llama(folder, texts, chat=True)


def llama_base(folder: Path, texts: list[str]) -> None:
    """Save a Llama of two layers without a chat template, as base models are."""
    _llama(folder, texts, chat=False)


def _llama(folder: Path, texts: list[str], *, chat: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = save_tokenizer(folder, texts, begin="<s>", chat=chat)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.2,
    )
    _seed()
    LlamaForCausalLM(config).save_pretrained(folder)


def t5(folder: Path, texts: list[str]) -> None:
    """Save a T5 of two layers a side."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = save_tokenizer(folder, texts, end="</s>")
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
    )
    config.decoder_start_token_id = 0
    _seed()
    T5ForConditionalGeneration(config).save_pretrained(folder)


def dinov2(folder: Path, texts: list[str]) -> None:
    """Save a DINOv2 of two layers that reads patches of 14 x 14 pixels."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=56,
        patch_size=14,
        initializer_range=0.2,
        use_mask_token=False,
    )
    _seed()
    Dinov2Model(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")


MODELS: dict[str, Writer] = {
    "bert": bert,
    "llama": llama,
    "llama_base": llama_base,
    "t5": t5,
    "dinov2": dinov2,
    "clip": clip,
    "whisper": whisper,
}
