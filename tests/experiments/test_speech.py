"""Speech to text: recordings in the shape Whisper reads, a shorter encoder, words from tones."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from lorapro.experiments.assets import speech
from lorapro.experiments.config import build_config
from lorapro.experiments.errors import UserError
from lorapro.experiments.runner import make_task, run
from lorapro.experiments.toys.whisper import tones, whisper


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    (folder / "model").mkdir()
    (folder / "data").mkdir()
    _, texts = tones(folder / "data")
    whisper(folder / "model", texts)
    return folder


@pytest.fixture
def hear(tiny, tmp_path):
    return {
        "task": "spoken-questions",
        "model": str(tiny / "model"),
        "data": str(tiny / "data"),
        "seconds": 1,
        "validation_samples": 12,
        "test_samples": 24,
        "method": "lora-pro",
        "rank": 4,
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": str(tmp_path / "run"),
    }


def test_a_shorter_encoder_hears_what_the_whole_one_would(hear, tiny):
    """Where silence does not matter: the first positions and the first frames are the same."""
    from transformers import WhisperForConditionalGeneration

    task = make_task(build_config(hear))
    model = task.load_model().eval()
    assert model.model.encoder.embed_positions.weight.shape[0] == 50
    batch = task.collator()(task.test[:3])
    assert batch["input_features"].shape == (3, 20, 100)
    whole = WhisperForConditionalGeneration.from_pretrained(tiny / "model").eval()
    short, long = model.model.encoder, whole.model.encoder
    with torch.no_grad():
        expected = long.conv1(batch["input_features"])
        expected = long.conv2(torch.nn.functional.gelu(expected))
        expected = torch.nn.functional.gelu(expected).permute(0, 2, 1)
        expected = expected + long.embed_positions.weight[:50]
        for layer in long.layers:
            out = layer(expected, None)
            expected = out[0] if isinstance(out, tuple) else out
        expected = long.layer_norm(expected)
        found = short(batch["input_features"]).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_labels_run_from_no_time_stamps_to_the_end(hear):
    task = make_task(build_config(hear))
    labels = task.test[0]["labels"]
    words = task.tokenizer.convert_ids_to_tokens([labels[0], labels[-1]])
    assert words == ["<|notimestamps|>", "<|endoftext|>"]
    assert task.tokenizer.decode(labels[1:-1]) == f" {task.test_rows[0]['output']}"


def test_words_are_learned_from_tones(hear):
    values = {**hear, "method": "full", "learning_rate": 3e-3, "max_steps": 150}
    values |= {"lr_scheduler_type": "cosine", "warmup_steps": 5, "per_device_train_batch_size": 16}
    del values["rank"]
    assert run(build_config(values))["metrics"]["test"]["accuracy"] > 0.8


def test_recordings_that_are_too_long_are_left_out(hear, tiny, tmp_path):
    rows = [json.loads(line) for line in (tiny / "data" / "train.jsonl").read_text().splitlines()]
    folder = tmp_path / "long"
    (folder / "audio").mkdir(parents=True)
    for i, row in enumerate(rows):
        _, samples = wavfile.read(tiny / "data" / row["audio"])
        wavfile.write(folder / row["audio"], 16_000, np.tile(samples, 4 if i % 4 == 0 else 1))
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = make_task(build_config({**hear, "data": str(folder)}))
    assert len(task.train) + len(task.validation) + len(task.test) == 90


def test_bad_recordings_are_one_clear_line(hear, tiny, tmp_path):
    folder = tmp_path / "other"
    (folder / "audio").mkdir(parents=True)
    rows = (tiny / "data" / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(rows)
    with pytest.raises(UserError, match=r"cannot read .*\.wav"):
        make_task(build_config({**hear, "data": str(folder)}))
    for line in rows.splitlines():
        wavfile.write(folder / json.loads(line)["audio"], 8_000, np.zeros(800, np.int16))
    with pytest.raises(UserError, match="expected one channel of 16-bit samples, 16000 a second"):
        make_task(build_config({**hear, "data": str(folder)}))


def test_more_than_the_model_hears_is_refused(hear):
    with pytest.raises(UserError, match="more than model .* hears"):
        make_task(build_config({**hear, "seconds": 6})).load_model()


def test_speech_without_a_synthesizer_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="espeak-ng, which is not installed"):
        speech.spoken(tmp_path, tmp_path)
