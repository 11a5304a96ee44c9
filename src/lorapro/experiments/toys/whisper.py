"""A tiny random Whisper and tones that stand for words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["tones", "whisper"]

SPECIAL = ("<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>")
WORDS = ("low", "middle", "high")
RATE = 16_000


def whisper(folder: Path, texts: list[str]) -> None:
    """Save a Whisper of two layers a side with a tokenizer of ``texts``."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    file = folder / "tokenizer.json"
    inner.save(str(file))
    maker = transformers.WhisperTokenizerFast  # type: ignore[attr-defined]
    maker(tokenizer_file=str(file)).save_pretrained(folder)
    layers: dict[str, Any] = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
    layers |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    layers |= {f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.WhisperConfig(
            vocab_size=inner.get_vocab_size(),
            num_mel_bins=20,
            max_source_positions=250,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            decoder_start_token_id=1,
            **layers,
        )
        model = transformers.WhisperForConditionalGeneration(config)
    model.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=20).save_pretrained(folder)


def tones(folder: Path) -> tuple[Path, list[str]]:
    """Write ``train.jsonl`` and one tone a row in ``audio/``: its pitch is the word."""
    import numpy as np
    from scipy.io import wavfile

    from lorapro.experiments.toys.data import write_jsonl

    (folder / "audio").mkdir()
    rng, rows = np.random.default_rng(0), []
    for number in range(120):
        word = number % len(WORDS)
        pitch = 300 * 2.5**word * rng.uniform(0.9, 1.1)
        time = np.arange(int(RATE * rng.uniform(0.3, 0.6))) / RATE
        sound = 9000 * np.sin(2 * np.pi * pitch * time) + rng.normal(0, 300, time.shape)
        file = f"audio/{number:03d}.wav"
        wavfile.write(folder / file, RATE, sound.astype(np.int16))
        rows.append({"audio": file, "text": WORDS[word], "output": f"is it {WORDS[word]}"})
    write_jsonl(folder / "train.jsonl", rows)
    return folder, [f" {row['output']} {row['text']}" for row in rows]
