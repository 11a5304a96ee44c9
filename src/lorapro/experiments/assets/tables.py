"""Builders of data files from text and image files of other formats.

A builder gets the unpacked folder and an empty target folder, as in
:mod:`~lorapro.experiments.assets.models`. Rows go to JSONL, images to Parquet in the hub's schema.
"""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorapro.experiments.assets.models import require_modules
from lorapro.experiments.errors import UserError

__all__ = [
    "cifar10",
    "examples_of",
    "humaneval",
    "rotten_tomatoes",
    "splits_from_orange",
    "table_from_folders",
    "table_from_sources",
    "text_to_text",
    "vitaminc",
    "write_rows",
]

Row = dict[str, Any]


def table_from_folders(source: Path, target: Path) -> None:
    """Write ``table.jsonl`` from text files that lie in one folder per label.

    Each file ``<label>/<name>.txt`` becomes a row with the columns ``text`` (the whole file, title
    line included) and ``label``, in the order of their paths. Files are UTF-8; one that is not is
    read as Windows-1252, in which every byte that occurs in English prose has a meaning.

    Raises:
        UserError: no such file.
    """
    files = sorted(source.glob("*/*.txt"))
    if not files:
        raise UserError("the package holds no text files in folders named after their labels")
    rows = ({"text": _decode(f.read_bytes()).strip(), "label": f.parent.name} for f in files)
    write_rows(target / "table.jsonl", rows)


def table_from_sources(source: Path, target: Path) -> None:
    """Write ``table.jsonl`` from Python files: each top-level definition is a row.

    The only column is ``text``. Two blank lines end a definition, as PEP 8 wants it. Tests are left
    out: they are mostly tables of expected values.
    """
    files = sorted(f for f in source.rglob("*.py") if "tests" not in f.relative_to(source).parts)
    blocks = (b for f in files for b in f.read_text(encoding="utf-8").split("\n\n\n"))
    write_rows(target / "table.jsonl", ({"text": b.strip()} for b in blocks if b.strip()))


def rotten_tomatoes(source: Path, target: Path) -> None:
    """Write ``table.jsonl`` (``text``, ``label``) from a CSV that marks each row's ``source``."""
    names = {"0": "negative", "1": "positive"}
    with _only(source, "*.csv").open(encoding="utf-8", newline="") as stream:
        rows = [
            {"text": row["text"].strip(), "label": names[row["label"]]}
            for row in csv.DictReader(stream)
            if row["source"] == "rotten_tomatoes"
        ]
    write_rows(target / "table.jsonl", rows)


def splits_from_orange(source: Path, target: Path) -> None:
    """Write ``train.jsonl`` and ``test.jsonl`` (``text``, ``label``) from Orange's tables.

    Such a table has three header rows (names, types, roles) before its rows of label and text.
    """
    for split in ("train", "test"):
        with _only(source, f"*-{split}.tab").open(encoding="utf-8", newline="") as stream:
            lines = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
            header = [next(lines) for _ in range(3)]
            if header[0] != ["Category", "Text"]:
                raise UserError(f"expected the columns Category, Text, found {header[0]}")
            filled = (line for line in lines if any(line))
            write_rows(target / f"{split}.jsonl", ({"text": t, "label": c} for c, t in filled))


def vitaminc(source: Path, target: Path) -> None:
    """Write ``train``, ``validation`` and ``test.jsonl`` (``premise``, ``hypothesis``, ``label``).

    Neighbouring rows are edits of one passage, so the splits (80, 10 and 10 %) go by the page a
    passage is from: no page is on both sides.
    """
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for example in examples_of(source):
        premise, _, hypothesis = example["input"].rpartition("\nClaim: ")
        label = max(example["target_scores"], key=example["target_scores"].get)
        page = premise.partition(":")[0]
        tenth = int(hashlib.sha256(page.encode()).hexdigest(), 16) % 10
        split = {0: "test", 1: "validation"}.get(tenth, "train")
        row = {"premise": premise, "hypothesis": hypothesis, "label": label.lower()}
        splits[split].append(row)
    for split, rows in splits.items():
        write_rows(target / f"{split}.jsonl", rows)


def text_to_text(source: Path, target: Path) -> None:
    """Write ``train.jsonl`` (``instruction``, ``output``, ``kind``) from inputs and targets."""
    names = {"input": "instruction", "target": "output", "comment": "kind"}
    rows = ({name: e[key] for key, name in names.items()} for e in examples_of(source))
    write_rows(target / "train.jsonl", rows)


def cifar10(source: Path, target: Path) -> None:
    """Write ``train.parquet`` (``image``, ``label``) from PNG files in base64.

    Raises:
        UserError: datasets is not installed.
    """
    require_modules(("datasets",), "a table of images")
    import datasets

    columns: dict[str, list[Any]] = {"image": [], "label": []}
    for example in examples_of(source):
        columns["image"].append({"bytes": base64.b64decode(example["input"]), "path": None})
        columns["label"].append(max(example["target_scores"], key=example["target_scores"].get))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.disable_progress_bars()
    try:
        datasets.Dataset.from_dict(columns, features).to_parquet(target / "train.parquet")
    finally:
        datasets.enable_progress_bars()


def humaneval(source: Path, target: Path) -> None:
    """Write ``test.jsonl``: the problems as they are, unpacked."""
    packed = _only(source, "*.jsonl.gz").read_bytes()
    (target / "test.jsonl").write_bytes(gzip.decompress(packed))


def examples_of(source: Path) -> Iterable[Row]:
    """Return the examples of a BIG-bench task."""
    examples = json.loads(_only(source, "*.json").read_text(encoding="utf-8")).get("examples")
    if not examples:
        raise UserError("the package's task.json holds no examples")
    return examples


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise UserError(f"expected one file {pattern} in the package, found {len(found)}")
    return found[0]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines."""
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")
