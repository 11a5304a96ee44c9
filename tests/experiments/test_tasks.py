from __future__ import annotations

import csv
import json
import re
from collections import Counter

import pytest

from experiments.tiny_models import sentences
from lorapro.experiments.config import build_config
from lorapro.experiments.data import load_rows
from lorapro.experiments.errors import UserError
from lorapro.experiments.runner import make_task
from lorapro.experiments.tasks.causal import IGNORED
from lorapro.experiments.tasks.gsm8k import strip_annotations
from lorapro.experiments.tasks.labelled import stratified_split
from lorapro.experiments.tasks.text_classification import deduplicate


def test_one_row_a_text_and_none_with_two_labels():
    rows = [
        {"text": "Nice day  http://t.co/abc", "label": "good"},
        {"text": "nice day http://t.co/xyz", "label": "good"},
        {"text": "hm", "label": "good"},
        {"text": "HM ", "label": "bad"},
        {"text": "other", "label": "bad"},
    ]
    assert [r["text"] for r in deduplicate(rows, "text", "label")] == [rows[0]["text"], "other"]


def test_splits_are_stratified_and_disjoint():
    rows = [{"text": str(i), "label": "rare" if i % 10 == 0 else "common"} for i in range(200)]
    rest, cut = stratified_split(rows, "label", 50)
    assert Counter(r["label"] for r in cut) == {"rare": 5, "common": 45}
    assert len(rest) + len(cut) == 200
    assert not {r["text"] for r in rest} & {r["text"] for r in cut}


def texts(task, examples):
    decode = task.tokenizer.decode
    return {decode(e["input_ids"], skip_special_tokens=True) for e in examples}


def test_classification_splits_share_nothing_and_do_not_move_with_the_seed(classify):
    first = make_task(build_config(classify))
    again = make_task(build_config({**classify, "seed": 5, "method": "full"}))
    other = make_task(build_config({**classify, "split_seed": 1}))
    parts = [texts(first, part) for part in (first.train, first.validation, first.test)]
    assert [len(p) for p in parts] == [90, 15, 15]
    assert len(set.union(*parts)) == 120
    assert texts(again, again.test) == parts[2]
    assert texts(other, other.test) != parts[2]
    assert first.labels == ["bad", "good", "so"]


def test_rows_from_json_lines_and_a_folder_with_its_own_splits(classify, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, count, seed in (("train", 60, 0), ("dev", 9, 1), ("test", 12, 2)):
        rows = [{"body": t, "mood": m} for t, m in sentences(count, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {**classify, "data": str(folder), "text_column": "body", "label_column": "mood"}
    task = make_task(build_config(values))
    assert [len(task.train), len(task.validation), len(task.test)] == [60, 9, 12]


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"review": "text", "Sentiment": "label"}, ("review", "Sentiment")),
        ({"Class": "label", "body": "text"}, ("body", "Class")),
        ({"id": "number", "said": "text", "kind": "label"}, ("said", "kind")),  # by their values
        ({"text": "text", "title": "text", "mood": "label"}, ("text", "mood")),
        ({"text": "text", "category": "label", "label": "label"}, ("text", "label")),
        ({"headline": "text", "mood": "label", "language": "constant"}, ("headline", "mood")),
    ],
)
def test_columns_that_are_clear_are_found(columns, found, classify, tmp_path):
    said = []
    task = make_task(build_config({**classify, "data": one_table(tmp_path, columns)}), said.append)
    assert (task.args.text_column, task.args.label_column) == found
    assert task.labels == ["bad", "good", "so"]
    assert len(said) == sum(a != b for a, b in zip(found, ("text", "label"), strict=True))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": "text", "a": "label", "b": "label"}, "no column 'label'; its columns are: text"),
        ({"text": "text", "Class": "label", "topic": "label"}, "text, Class, topic (set text_col"),
        ({"title": "text", "body": "text", "label": "label"}, "no column 'text'; its columns are"),
        ({"text": "text", "id": "number"}, "no column 'label'; its columns are: text, id"),
    ],
)
def test_columns_that_are_not_clear_are_asked_for(columns, message, classify, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        make_task(build_config({**classify, "data": one_table(tmp_path, columns)}))


def one_table(folder, columns):
    """A CSV with columns of these kinds."""
    rows = [
        {"text": text, "label": label, "number": i, "constant": "en"}
        for i, (text, label) in enumerate(sentences(120))
    ]
    with (folder / "mine.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows([row[kind] for kind in columns.values()] for row in rows)
    return str(folder / "mine.csv")


def test_a_hub_data_set_of_ones_own_keeps_the_names_of_its_labels(classify, tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    names = ["so", "bad", "good"]
    rows = [{"text": text, "label": names.index(label)} for text, label in sentences(120)]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    (tmp_path / "hub" / "data").mkdir(parents=True)
    Dataset.from_list(rows, features).to_parquet(tmp_path / "hub/data/train-00000.parquet")
    task = make_task(build_config({**classify, "data": str(tmp_path / "hub")}))
    assert task.labels == ["bad", "good", "so"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "/no/such/file.csv"}, "no data file or folder '/no/such/file.csv'"),
        ({"label_column": "mood"}, "no column 'mood'; its columns are: text, label"),
        ({"text_column": "body"}, "no column 'body'; its columns are: text, label"),
        ({"test_samples": 500}, "test_samples is 500, but only 120"),
        ({"data": "minilm-l6"}, "is a model, not a data set"),
        ({"data": None}, "needs 'data'"),
        ({"model": "minilm-l7/x"}, "no model"),
    ],
)
def test_bad_data_is_one_clear_line(classify, change, message, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("LORAPRO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    if change.get("data") == "minilm-l6":
        (tmp_path / "cache" / "minilm-l6-0.1.0-b9a0018d").mkdir(parents=True)
    with pytest.raises(UserError, match=message) as caught:
        make_task(build_config({**classify, **change}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a", "label": 1}\n{broken\n', "cannot read"),
        ("a.csv", "", "holds no rows"),
        ("a.json", '{"text": "a"}', "list of records"),
        ("a.xlsx", "x", "expected a file ending in"),
        ("a.csv", "text,label\na,b\nc,b\nd,b\ne,b\n", "one label only"),
    ],
)
def test_broken_files(classify, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    values = {**classify, "data": str(path), "validation_samples": 1, "test_samples": 1}
    with pytest.raises(UserError, match=message):
        make_task(build_config(values))


def test_gsm8k_loss_is_on_the_answer_and_its_end(solve):
    task = make_task(build_config(solve))
    rows = task.split_rows()[0]
    assert len(task.train) == 34
    for row, example in zip(rows, task.train, strict=True):
        learned = [t for t in example["labels"] if t != IGNORED]
        answer = task.tokenizer.decode(learned)
        assert answer == strip_annotations(row["answer"]) + task.tokenizer.eos_token
        assert "<<" not in answer
        # What is trained is what the chat template makes of the same conversation.
        chat = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": strip_annotations(row["answer"])},
        ]
        whole = task.tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        assert whole[: len(example["input_ids"])] == example["input_ids"]


def test_gsm8k_keeps_annotations_on_request_and_leaves_long_pairs_out(solve):
    solve = {**solve, "calculator_annotations": True}
    kept = make_task(build_config(solve))
    learned = [t for t in kept.train[0]["labels"] if t != IGNORED]
    assert "<<" in kept.tokenizer.decode(learned)
    longest = max(len(e["input_ids"]) for e in kept.train)
    fewer = make_task(build_config({**solve, "max_length": longest - 10}))
    assert 0 < len(fewer.train) < len(kept.train)
    assert max(len(e["input_ids"]) for e in fewer.train) <= longest - 10
    with pytest.raises(UserError, match="fits into max_length"):
        make_task(build_config({**solve, "max_length": 5}))


def test_gsm8k_batches_are_padded_with_ignored_labels(solve):
    task = make_task(build_config(solve))
    short, long = sorted(task.train, key=lambda e: len(e["input_ids"]))[:: len(task.train) - 1]
    batch = task.collator()([short, long])
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["labels"][padding] == IGNORED).all()


def test_gsm8k_wrong_columns(solve, tmp_path):
    path = tmp_path / "qa.jsonl"
    path.write_text('{"q": "1+1", "a": "2"}\n')
    with pytest.raises(UserError, match="no column 'question'; its columns are: q, a"):
        make_task(build_config({**solve, "data": str(path)}))


def test_a_line_of_json_may_hold_other_line_separators(tmp_path):
    rows = [{"text": f"a{mark}b", "label": i} for i, mark in enumerate("\u2028\u2029\x85\x0c")]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert load_rows(str(tmp_path / "train.jsonl"))["train"] == rows
