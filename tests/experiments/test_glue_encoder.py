"""GLUE with an encoder: two segments, the validation split as test set, GLUE's own metrics."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sklearn import metrics

from lorapro.experiments.config import build_config
from lorapro.experiments.errors import UserError
from lorapro.experiments.runner import make_task, run
from lorapro.experiments.toys.data import write_jsonl
from lorapro.experiments.toys.models import bert

WORDS = ["stone", "water", "paper", "road", "window", "table"]


@pytest.fixture
def pairs(tmp_path):
    """MRPC's schema, the hub's hidden test labels included."""
    rng = random.Random(0)
    folder = tmp_path / "mrpc"
    folder.mkdir()
    for split, count in (("train", 60), ("validation", 20), ("test", 6)):
        rows = []
        for number in range(count):
            one, other = rng.sample(WORDS, 2)
            label = number % 2
            second = one if label else other
            rows.append(
                {
                    "sentence1": f"the {one} of house {number}",
                    "sentence2": f"a {second} it is",
                    "label": -1 if split == "test" else label,
                    "idx": number,
                }
            )
        write_jsonl(folder / f"{split}.jsonl", rows)
    (tmp_path / "bert").mkdir()
    bert(tmp_path / "bert", [f"the {word} of house a it is 0123456789" for word in WORDS])
    return {
        "task": "glue-mrpc-encoder",
        "model": str(tmp_path / "bert"),
        "data": str(folder),
        "validation_samples": 10,
        "method": "lora",
        "rank": 2,
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": str(tmp_path / "run"),
    }


def test_the_validation_split_is_the_test_set(pairs):
    task = make_task(build_config(pairs))
    assert [len(task.train), len(task.validation), len(task.test)] == [50, 10, 20]
    assert task.labels == ["0", "1"]


def test_both_sentences_are_read(pairs):
    task = make_task(build_config(pairs))
    row = task.test_rows[0]
    assert (
        task.test[0]["input_ids"] == task.tokenizer(row["sentence1"], row["sentence2"])["input_ids"]
    )
    assert task.test[0]["input_ids"] != task.tokenizer(row["sentence1"])["input_ids"]


def test_scores_are_scikit_learns(pairs):
    config = build_config(pairs)
    result = run(config)["metrics"]["test"]
    with np.load(config.folder / "items.npz") as items:
        label, prediction = items["label"], items["prediction"]
    assert len(label) == 20
    assert result["accuracy"] == metrics.accuracy_score(label, prediction)
    assert result["f1"] == metrics.f1_score(label, prediction, zero_division=0)
    assert result["matthews_correlation"] == pytest.approx(
        metrics.matthews_corrcoef(label, prediction)
    )


def test_data_without_that_split_is_one_clear_line(pairs, tmp_path):
    (tmp_path / "mrpc" / "validation.jsonl").unlink()
    with pytest.raises(UserError, match="has no split 'validation'; it has: train, test"):
        make_task(build_config(pairs))
