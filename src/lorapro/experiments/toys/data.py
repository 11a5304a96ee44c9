"""Writers of small files in the schema of real data sets; all text is made up here, seeded."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lorapro.experiments.toys.clip import named_images
from lorapro.experiments.toys.whisper import tones

__all__ = ["DATA", "write_jsonl"]

Writer = Callable[[Path], tuple[Path, list[str]]]
"""An empty folder -> (what ``data`` is set to: a file or the folder, texts for the tokenizer)."""

WORDS = {
    "negative": "bad poor sad dull broken late grey lost",
    "neutral": "street table water number window paper stone road",
    "positive": "good fine glad bright kind early green found",
}


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def sentences(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Distinct sentences whose label can be learned from their words."""
    rng = random.Random(seed)
    labels = sorted(WORDS)
    made = []
    for number in range(count):
        label = labels[number % len(labels)]
        words = rng.choices(WORDS[label].split(), k=4) + rng.choices(WORDS["neutral"].split(), k=2)
        made.append((f"the {' '.join(words)} {number}", label))
    return made


def _csv(path: Path, header: list[str], rows: Iterable[Iterable[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)


def tweets(folder: Path) -> tuple[Path, list[str]]:
    """One CSV with the columns of the asset ``tweets``."""
    rows = sentences(160)
    _csv(folder / "tweets.csv", ["sentiment", "text"], ((label, text) for text, label in rows))
    return folder / "tweets.csv", [text for text, _ in rows]


def labelled_texts(folder: Path) -> tuple[Path, list[str]]:
    """One CSV of ``text`` and ``label``."""
    rows = sentences(160)
    _csv(folder / "table.csv", ["text", "label"], rows)
    return folder / "table.csv", [text for text, _ in rows]


def labelled_pairs(folder: Path) -> tuple[Path, list[str]]:
    """JSON lines of ``premise``, ``hypothesis`` and ``label``: does the second say the same?"""
    rows, rng = [], random.Random(0)
    for number in range(160):
        thing, other = rng.sample(WORDS["neutral"].split(), 2)
        same = number % 2 == 0
        rows.append(
            {
                "premise": f"Page {number}: the {thing} stands here .",
                "hypothesis": f"the {thing if same else other} stands here .",
                "label": "true" if same else "false",
            }
        )
    write_jsonl(folder / "train.jsonl", rows)
    return folder, [f"{row['premise']} {row['hypothesis']}" for row in rows]


def rewritten_sentences(folder: Path) -> tuple[Path, list[str]]:
    """JSON lines of ``instruction`` and ``output``: a sentence and its question."""
    from lorapro.experiments.tasks.instruct import ALPACA

    words = WORDS["neutral"].split()
    pairs = [(a, b, c) for a in words for b in words for c in ("small", "red", "old")]
    rows = [
        {"instruction": f"the {c} {a} is a {b}", "output": f"is the {c} {a} a {b}"}
        for a, b, c in pairs
    ]
    write_jsonl(folder / "train.jsonl", rows)
    return folder, [f"{ALPACA.format(**row)} {row['output']}" for row in rows]


def texts(folder: Path) -> tuple[Path, list[str]]:
    """JSON lines of ``text``, several sentences each."""
    rows = [text for text, _ in sentences(960)]
    documents = [". ".join(rows[i : i + 8]) for i in range(0, len(rows), 8)]
    write_jsonl(folder / "train.jsonl", ({"text": text} for text in documents))
    return folder, documents


def chats(folder: Path) -> tuple[Path, list[str]]:
    """One JSONL of conversations of one or two turns."""
    rows, texts = [], []
    for number, (text, label) in enumerate(sentences(120)):
        turns = [("user", f"How is {text}?"), ("assistant", f"It is {label}.")]
        if number % 3 == 0:
            turns += [("user", "Sure?"), ("assistant", f"Yes, {label}.")]
        rows.append({"messages": [{"role": r, "content": c} for r, c in turns]})
        texts += [content for _, content in turns]
    write_jsonl(folder / "chats.jsonl", rows)
    return folder / "chats.jsonl", texts


def gsm8k(folder: Path) -> tuple[Path, list[str]]:
    """``train.jsonl`` and ``test.jsonl`` with question, and answer ending in ``#### number``."""
    rng = random.Random(0)
    seen = []
    for name, count in (("train", 96), ("test", 24)):
        rows = []
        for _ in range(count):
            a, b = rng.randint(2, 20), rng.randint(2, 20)
            rows.append(
                {
                    "question": f"Ann has {a} cups and finds {b}. How many cups?",
                    "answer": f"{a}+{b}=<<{a}+{b}={a + b}>>{a + b} cups.\n#### {a + b}",
                }
            )
        write_jsonl(folder / f"{name}.jsonl", rows)
        seen += [row["question"] + row["answer"] for row in rows]
    return folder, seen


def idx_images(folder: Path) -> tuple[Path, list[str]]:
    """Grey 28 x 28 images of three kinds in IDX files, as MNIST's."""
    import numpy as np

    rng = np.random.default_rng(0)
    bright = (np.s_[::4, :], np.s_[:, ::4], np.s_[::2, ::2])
    for name, count in (("train", 120), ("t10k", 30)):
        labels = (np.arange(count) % 3).astype(np.uint8)
        images = rng.integers(0, 100, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[bright[label]] += 150
        for array, kind in ((images, "images-idx3-ubyte"), (labels, "labels-idx1-ubyte")):
            sizes = b"".join(int(size).to_bytes(4, "big") for size in array.shape)
            header = bytes([0, 0, 8, array.ndim]) + sizes
            (folder / f"{name}-{kind}").write_bytes(header + array.tobytes())
    return folder, []


DATA: dict[str, Writer] = {
    "tweets": tweets,
    "labelled_texts": labelled_texts,
    "labelled_pairs": labelled_pairs,
    "rewritten_sentences": rewritten_sentences,
    "texts": texts,
    "chats": chats,
    "gsm8k": gsm8k,
    "idx_images": idx_images,
    "named_images": named_images,
    "tones": tones,
}
