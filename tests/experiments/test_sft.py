"""Own data for a language model: formats, labels on answers, packing, a whole run."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pandas
import pytest
import torch

from experiments.tiny_models import byte_tokenizer
from lorapro.cli.main import main
from lorapro.experiments.config import build_config
from lorapro.experiments.errors import UserError
from lorapro.experiments.runner import make_task, run
from lorapro.experiments.saved import open_saved
from lorapro.experiments.tasks.causal import IGNORED
from lorapro.experiments.toys.data import chats, write_jsonl

TURNS = [
    {"role": "user", "content": "One plus two?"},
    {"role": "assistant", "content": "Three."},
    {"role": "user", "content": "And\n\none more?"},
    {"role": "assistant", "content": "\nFour, I think."},
]


@pytest.fixture
def sft(tiny_llama, tmp_path):
    """Values of a config that trains in a second."""
    chats(tmp_path)
    return {
        "task": "sft",
        "model": str(tiny_llama),
        "data": str(tmp_path / "chats.jsonl"),
        "max_length": 160,
        "max_new_tokens": 8,
        "generation_samples": 3,
        "generation_batch_size": 1,
        "rank": 2,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        "output_dir": str(tmp_path / "run"),
    }


def prepared(values, **changes):
    task = make_task(build_config({**values, **changes}))
    task.tokenizer.clean_up_tokenization_spaces = False
    return task


def written(task, rows, path, **changes):
    """(text, what is learned of it) of rows in a file of its own."""
    write_jsonl(path, [*rows, *[rows[-1]] * 12])
    task = prepared(task, data=str(path), **changes)
    (example, *_) = task.encode(rows)
    kept = [t for t in example["labels"] if t != IGNORED]
    decode = task.tokenizer.decode
    return decode(example["input_ids"]), decode(kept)


def test_the_loss_is_on_what_assistants_say(sft, tmp_path):
    whole, learned = written(sft, [{"messages": TURNS}], tmp_path / "a.jsonl")
    assert whole == "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in TURNS)
    assert learned == "Three.<|im_end|>\nFour, I think.<|im_end|>"
    everything = written(sft, [{"messages": TURNS}], tmp_path / "a.jsonl", answers_only=False)
    assert everything == (whole, whole)
    with_system = written(sft, [{"messages": TURNS}], tmp_path / "a.jsonl", system="Be brief.")
    assert with_system == (f"<|im_start|>system\nBe brief.<|im_end|>\n{whole}", learned)


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"conversations": [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B."}]}, {}),
        ({"prompt": "A?", "completion": "B."}, {}),
        (
            {
                "prompt": [{"role": "user", "content": "A?"}],
                "completion": [{"role": "assistant", "content": "B."}],
            },
            {},
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "A"}, {"text": "?"}]},
                    {"role": "assistant", "content": "B."},
                ]
            },
            {},
        ),
        ({"ask": "A?", "say": "B."}, {"prompt_column": "ask", "completion_column": "say"}),
        (
            {"chat": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]},
            {"messages_column": "chat"},
        ),
    ],
)
def test_every_form_of_a_question_and_its_answer_is_one_conversation(row, keys, sft, tmp_path):
    whole, learned = written(sft, [row], tmp_path / "a.jsonl", **keys)
    assert whole == "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\nB.<|im_end|>\n"
    assert learned == "B.<|im_end|>"


def test_numbers_are_texts_too(sft, tmp_path):
    rows = [{"prompt": 3, "completion": 4.5}]
    whole, learned = written(sft, rows, tmp_path / "a.jsonl")
    assert whole == "<|im_start|>user\n3<|im_end|>\n<|im_start|>assistant\n4.5<|im_end|>\n"
    assert learned == "4.5<|im_end|>"


def test_without_template_a_completion_follows_its_prompt(sft, tmp_path):
    row = {"prompt": "A?", "completion": " B."}
    for change in ({"chat": False}, {"model": base_model(tmp_path, sft["model"])}):
        whole, learned = written(sft, [row], tmp_path / "a.jsonl", **change)
        assert (whole, learned) == ("A? B.<|im_end|>", " B.<|im_end|>")


def base_model(tmp_path, source):
    """The tiny Llama with a tokenizer that has no chat template."""
    from transformers import LlamaForCausalLM

    folder = tmp_path / "base"
    LlamaForCausalLM.from_pretrained(source).save_pretrained(folder)
    byte_tokenizer(folder, chat=False)
    return str(folder)


def test_texts_are_cut_into_pieces_and_lose_nothing(sft, tmp_path):
    texts = [f"{i} " + "word " * (4 + 9 * i) for i in range(20)]
    write_jsonl(tmp_path / "t.jsonl", [{"text": t} for t in texts])
    task = prepared(sft, data=str(tmp_path / "t.jsonl"), max_length=40)
    pieces = [task.tokenizer.decode(e["input_ids"]) for e in task.encode([{"text": texts[-1]}])]
    assert "".join(pieces) == f"{texts[-1]}<|im_end|>"
    assert len(pieces) > 3
    assert all(len(e["labels"]) <= 40 and IGNORED not in e["labels"] for e in task.train)


def test_a_prompt_is_continued_whole_and_samples_continue_the_first_half(sft, tmp_path, capsys):
    texts = [f"{i} little boats, and {i + 1} more" for i in range(40)]
    write_jsonl(tmp_path / "t.jsonl", [{"text": t} for t in texts])
    run(build_config({**sft, "data": str(tmp_path / "t.jsonl")}))
    for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        whole = next(t for t in texts if t.startswith(sample["prompt"]))
        assert len(sample["prompt"]) == len(whole) // 2
        assert whole.startswith(sample["prompt"] + sample["reference"])
        assert len(sample["reference"]) == 8

    saved = open_saved(tmp_path / "run")
    ids = torch.tensor([saved.family.tokenizer("7 little bo")["input_ids"]])
    out = saved.load_model().eval().generate(ids, max_new_tokens=8, do_sample=False)
    expected = saved.family.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), "--prompt", "7 little bo"]) == 0
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_the_same_rows_from_every_kind_of_file(kind, sft, tmp_path):
    rows = [{"messages": TURNS[:2]}, {"messages": TURNS}] * 10
    path = tmp_path / f"data.{kind}"
    if kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["messages"])
            writer.writerows([json.dumps(row["messages"])] for row in rows)
    elif kind == "parquet":
        pandas.DataFrame(rows).to_parquet(path)
    else:
        write_jsonl(path, rows)
    task = prepared(sft, data=str(path))
    assert len(task.train) == 16
    assert {len(e["input_ids"]) for e in task.train} == {
        len(e["input_ids"]) for e in task.encode(rows[:2])
    }


@pytest.mark.parametrize(("rows", "parts"), [(40, [32, 4, 4]), (600, [480, 60, 60])])
def test_a_small_file_needs_no_further_keys(rows, parts, sft, tmp_path):
    write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": f"{i}?", "completion": "B."} for i in range(rows)]
    )
    task = prepared(sft, data=str(tmp_path / "a.jsonl"))
    assert [len(p) for p in (task.train, task.validation, task.test)] == parts


def test_what_is_too_long_is_left_out_and_counted(sft):
    said = []
    make_task(build_config({**sft, "max_length": 110}), said.append)
    (line,) = said
    assert "of 120 examples are longer than max_length 110 tokens and left out" in line
    assert 0 < int(line.split()[0]) < 120


def test_examples_packed_into_a_row_do_not_see_each_other(sft):
    packed, apart = prepared(sft, packing=True, max_length=400), prepared(sft)
    assert len(packed.train) < len(apart.train)
    assert max(len(e["seq_lengths"]) for e in packed.train) > 2
    assert sum(len(e["input_ids"]) for e in packed.train) == sum(
        len(e["input_ids"]) for e in apart.train
    )
    model = apart.load_model().double().eval()

    def total(task, examples):
        batch = task.collator()(examples)
        with torch.no_grad():
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        scores = task.item_scores(type("Out", (), {"logits": logits}), batch)
        return float((scores["loss"] * scores["weight"]).sum()), float(scores["weight"].sum())

    found = total(packed, packed.train)
    expected = total(apart, apart.train)
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_packed_run_trains(sft):
    result = run(build_config({**sft, "packing": True, "max_length": 400, "max_steps": 4}))
    assert result["metrics"]["validation"]["loss"] < result["metrics"]["before"]["loss"]


def test_a_run_tells_what_it_learned_and_its_adapter_answers_the_same_elsewhere(sft, tmp_path):
    result = run(build_config({**sft, "max_steps": 30, "learning_rate": 0.02}))
    before, after = (result["metrics"][k] for k in ("before", "validation"))
    assert after["loss"] < 0.9 * before["loss"]
    assert after["perplexity"] == pytest.approx(2.718281828 ** after["loss"], rel=1e-5)
    path = tmp_path / "run" / "samples.jsonl"
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(samples) == 3
    assert set(samples[0]) == {"messages", "reference", "answer"}

    script = """
import json, sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, samples = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
for line in open(samples):
    row = json.loads(line)
    ids = tokenizer.apply_chat_template(
        row["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=257)
    new = out[0, ids["input_ids"].shape[1]:]
    assert tokenizer.decode(new, skip_special_tokens=True) == row["answer"], row
print("the same")
"""
    adapter = str(tmp_path / "run" / "adapter")
    done = subprocess.run(
        [sys.executable, "-c", script, sft["model"], adapter, str(path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.stdout.strip().endswith("the same"), done.stderr[-2000:]


def test_tasks_of_lm_eval_run_after_training(sft, tmp_path):
    pytest.importorskip("lm_eval")
    write_jsonl(tmp_path / "items.jsonl", [{"q": f"{i} is", "a": " it"} for i in range(4)])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\noutput_type: loglikelihood\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'items.jsonl'}\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    keys = {
        "harness_tasks": ["mine"],
        "harness_folder": str(tmp_path / "tasks"),
        "generation_samples": 0,
    }
    result = run(build_config({**sft, **keys}))
    assert 0 <= result["metrics"]["test"]["mine.acc.none"] <= 1
    with pytest.raises(UserError, match=r"no task 'hellaswagg'.*did you mean 'hellaswag'"):
        run(
            build_config(
                {**sft, "harness_tasks": ["hellaswagg"], "output_dir": str(tmp_path / "x")}
            )
        )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("rows", "keys", "match"),
    [
        ([{"question": "A?", "reply": "B."}], {}, "its columns are: question, reply"),
        ([{"messages": "hello"}], {}, "holds a text, expected a list of messages"),
        ([{"messages": [{"role": "user", "content": "A?"}]}], {}, "the last message is 'user'"),
        ([{"messages": [{"role": "boss", "content": "A"}]}], {}, "unknown role 'boss'"),
        ([{"messages": [{"role": "assistant"}]}], {}, "'assistant' has no content"),
        ([{"messages": [["user", "A?"]]}], {}, "expected messages with role and content"),
        ([{"messages": TURNS}], {"format": "text"}, "no column 'text'"),
        ([{"messages": TURNS}], {"format": "chat"}, "unknown format 'chat'"),
        ([{"messages": TURNS}], {"max_length": 1}, "max_length must be at least 2"),
        ([{"messages": TURNS}], {"max_length": 20}, "no .* example of .* fits into max_length"),
        ([{"prompt": "A?", "completion": None}], {}, "nothing in column 'completion'"),
    ],
)
def test_bad_data_is_one_clear_line_and_nothing_is_written(rows, keys, match, sft, tmp_path):
    write_jsonl(tmp_path / "bad.jsonl", rows * 20)
    with pytest.raises(UserError, match=match) as caught:
        run(build_config({**sft, "data": str(tmp_path / "bad.jsonl"), **keys}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_conversations_need_a_template_that_keeps_earlier_turns(sft, tmp_path):
    model = base_model(tmp_path, sft["model"])
    with pytest.raises(UserError, match="has no chat template for conversations"):
        prepared(sft, model=model)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}{{ messages | length }}"
    tokenizer.save_pretrained(model)
    with pytest.raises(UserError, match="rewrites earlier turns"):
        prepared(sft, model=model)
