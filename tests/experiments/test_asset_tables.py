"""Data files are built from small files in the packages' own formats."""

from __future__ import annotations

import base64
import gzip
import io
import json

import numpy as np
import pytest
from PIL import Image

from lorapro.experiments.assets import tables
from lorapro.experiments.data import load_rows
from lorapro.experiments.errors import UserError


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def folders(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    return source, target


def bigbench(source, examples):
    (source / "task.json").write_text(json.dumps({"canary": "c", "examples": examples}))


def test_rotten_tomatoes_are_the_rows_of_that_source(folders):
    source, target = folders
    (source / "all.csv").write_text(
        'text,label,source\n"long, long",0,imdb\n"fine, really ",1,rotten_tomatoes\n'
        "dull,0,rotten_tomatoes\n"
    )
    tables.rotten_tomatoes(source, target)
    assert rows_of(target / "table.jsonl") == [
        {"text": "fine, really", "label": "positive"},
        {"text": "dull", "label": "negative"},
    ]


def test_orange_tables_lose_their_header_and_blank_rows(folders):
    source, target = folders
    header = "Category\tText\nd\tstring\nclass\t\n"
    (source / "news-train.tab").write_text(header + '\t\nsci.space\ta "rocket launch\n\n')
    (source / "news-test.tab").write_text(header + "rec.autos\ta car\n")
    tables.splits_from_orange(source, target)
    assert rows_of(target / "train.jsonl") == [{"text": 'a "rocket launch', "label": "sci.space"}]
    assert rows_of(target / "test.jsonl") == [{"text": "a car", "label": "rec.autos"}]


def test_orange_tables_with_other_columns_are_refused(folders):
    source, target = folders
    (source / "news-train.tab").write_text("Text\tCategory\nstring\td\n\tclass\n")
    with pytest.raises(UserError, match="expected the columns Category, Text"):
        tables.splits_from_orange(source, target)


def test_passages_of_one_page_stay_in_one_split(folders):
    source, target = folders
    scores = [{"True": 1, "False": 0, "Neither": 0}, {"True": 0, "False": 0, "Neither": 1}]
    bigbench(
        source,
        [
            {"input": f"Page {page}: a b .\nClaim: c {i} .", "target_scores": scores[i]}
            for page in range(60)
            for i in (0, 1)
        ],
    )
    tables.vitaminc(source, target)
    pages = {}
    for split in ("train", "validation", "test"):
        rows = rows_of(target / f"{split}.jsonl")
        pages[split] = {row["premise"].partition(":")[0] for row in rows}
        assert {row["label"] for row in rows} == {"true", "neither"}
        assert {row["hypothesis"] for row in rows} == {"c 0 .", "c 1 ."}
    assert sum(map(len, pages.values())) == 60
    assert len(pages["train"]) > 30


def test_text_to_text_rows_keep_their_kind(folders):
    source, target = folders
    bigbench(source, [{"input": "he sings", "target": "does he sing", "comment": "simple"}])
    tables.text_to_text(source, target)
    assert rows_of(target / "train.jsonl") == [
        {"instruction": "he sings", "output": "does he sing", "kind": "simple"}
    ]


def test_images_in_base64_become_the_hubs_schema(folders):
    import datasets

    source, target = folders
    pixels = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), dtype=np.uint8)
    examples = []
    for picture, label in zip(pixels, ("cat", "dog"), strict=True):
        png = io.BytesIO()
        Image.fromarray(picture).save(png, "PNG")
        scores = {name: int(name == label) for name in ("dog", "cat")}
        text = base64.b64encode(png.getvalue()).decode()
        examples.append({"input": text, "target_scores": scores})
    bigbench(source, examples)
    tables.cifar10(source, target)
    read = datasets.Dataset.from_parquet(
        str(target / "train.parquet"), cache_dir=str(target / "cache")
    )
    assert read["label"][:] == ["cat", "dog"]
    assert all(np.array_equal(np.array(i), p) for i, p in zip(read["image"], pixels, strict=True))


def test_packed_problems_are_unpacked(folders):
    source, target = folders
    (source / "p.jsonl.gz").write_bytes(gzip.compress(b'{"task_id": "t/0"}\n'))
    tables.humaneval(source, target)
    assert rows_of(target / "test.jsonl") == [{"task_id": "t/0"}]


def test_a_package_without_the_file_is_one_clear_line(folders):
    with pytest.raises(UserError, match=r"expected one file \*\.json in the package, found 0"):
        tables.text_to_text(*folders)


def test_python_files_become_a_row_a_definition_without_the_tests(folders):
    source, target = folders
    (source / "tests").mkdir()
    (source / "b.py").write_text("import os\n\n\ndef f():\n\n    return 1\n\n\n\nclass C: ...\n")
    (source / "a.py").write_text("x = 1\n")
    (source / "tests" / "test_a.py").write_text("def test(): ...\n")
    tables.table_from_sources(source, target)
    texts = [row["text"] for row in rows_of(target / "table.jsonl")]
    assert texts == ["x = 1", "import os", "def f():\n\n    return 1", "class C: ..."]


def test_texts_with_other_line_ends_inside_are_one_row(tmp_path):
    texts = ["a\u2028b", "c\x85d", "e\x0bf"]
    tables.write_rows(tmp_path / "train.jsonl", [{"text": text} for text in texts])
    assert [row["text"] for row in load_rows(str(tmp_path))["train"]] == texts
