"""Tiny models, tokenizers and data files made on the spot, shaped as real ones are."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
import torch
import yaml

from lorapro.experiments.runner import run

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(folder: Path, *, chat: bool) -> None:
    """Save a tokenizer of bytes: one token a byte, three special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>" if chat else "<pad>",
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_dropout_prob=0.1,
        initializer_range=0.3,
        max_position_embeddings=96,
    )
    BertModel(config).save_pretrained(folder)
    byte_tokenizer(folder, chat=False)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(folder, chat=True)
    return folder


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Distinct texts with a label that can be learned from them."""
    rng = random.Random(seed)
    words = {
        "good": ["fine", "glad", "sun"],
        "bad": ["poor", "sad", "mud"],
        "so": ["it", "is", "here"],
    }
    rows = []
    for number in range(count):
        label = sorted(words)[number % 3]
        rows.append((" ".join(rng.choices(words[label], k=3)) + f" {number}", label))
    return rows


@pytest.fixture(scope="session")
def table(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "table.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        writer.writerows(sentences(120))
    return path


@pytest.fixture(scope="session")
def problems(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("problems")
    for name, count in (("train", 40), ("test", 12)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            for i in range(count):
                total = 2 * i + 1
                row = {
                    "question": f"{i} and {i + 1} make {'what' * (i % 3 + 1)}?",
                    "answer": f"{i}+{i + 1} = <<{i}+{i + 1}={total}>>{total}\n#### {total}",
                }
                stream.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def classify(tiny_bert, table, tmp_path) -> dict:
    """Values of a config that trains in about a second."""
    return {
        "task": "classification",
        "model": str(tiny_bert),
        "data": str(table),
        "validation_samples": 15,
        "test_samples": 15,
        "max_length": 32,
        "rank": 2,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "eval_steps": 3,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        "output_dir": str(tmp_path / "run"),
    }


@pytest.fixture
def solve(tiny_llama, problems, tmp_path) -> dict:
    """Values of a config of GSM8K's kind on a tiny Llama."""
    return {
        "task": "gsm8k",
        "model": str(tiny_llama),
        "data": str(problems),
        "validation_samples": 6,
        "test_samples": 8,
        "max_length": 160,
        "max_new_tokens": 12,
        "generation_batch_size": 4,
        "rank": 2,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "eval_steps": 3,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        "output_dir": str(tmp_path / "run"),
    }


def write_yaml(path: Path, values: dict) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


class StopError(Exception):
    """What ends a run in the middle."""


def run_until(config, step):
    """Run a configuration and break it off after so many steps."""

    def stop(done, total):
        if done == step:
            raise StopError

    with pytest.raises(StopError):
        run(config, on_step=stop)
