"""Bad input is one line that names what is wrong, exit status 2, and nothing written."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from experiments.tiny_models import byte_tokenizer, write_yaml
from lorapro.cli.main import main

nan, inf = math.nan, math.inf

RUNS = [
    ({"metod": "lora"}, "unknown config key 'metod' (did you mean 'method'?)"),
    ({"method": "lora-por"}, "unknown method 'lora-por' (did you mean 'lora-pro'?)"),
    ({"method": "dora+lora-prof"}, "unknown method 'dora+lora-prof' (did you mean 'lora-pro'?)"),
    ({"method": "lora+dora"}, "two parts of one kind"),
    ({"task": "clasification"}, "did you mean 'classification'"),
    ({"learning_rate": nan}, "learning_rate must be positive and finite, found nan"),
    ({"learning_rate": 0}, "learning_rate must be positive and finite, found 0"),
    ({"learning_rate": -1}, "learning_rate must be positive and finite, found -1"),
    ({"learning_rate": "fast"}, "'fast'"),
    ({"rank": 0}, "rank must be at least 1, found 0"),
    ({"rank": 1.5}, "rank: invalid int value: '1.5'"),
    ({"rank": [4, 8]}, "rank takes one value, found [4, 8]"),
    ({"rank": 99}, "rank 99 is above min(m, n)"),
    ({"method": "pissa", "rank": 99}, "rank 99 is above min(m, n)"),
    ({"max_steps": -5}, "max_steps must be at least 1"),
    ({"max_steps": 0}, "max_steps must be at least 1"),
    ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs must be positive"),
    ({"max_steps": -1, "num_train_epochs": nan}, "num_train_epochs must be positive"),
    ({"max_length": 1}, "max_length must be at least 2"),
    ({"max_grad_norm": nan}, "max_grad_norm must be finite"),
    ({"alpha": inf}, "alpha must be finite, found inf"),
    ({"alpha": 0}, "alpha must be above 0"),
    ({"lora_dropout": 1}, "lora_dropout must be below 1"),
    ({"weight_decay": -0.1}, "weight_decay must be finite and not negative"),
    ({"adam_beta1": 1.0}, "adam_beta1 must lie in [0, 1)"),
    ({"label_smoothing_factor": 2}, "label_smoothing_factor must lie in [0, 1)"),
    ({"warmup_steps": -1}, "warmup_steps must be finite and not negative"),
    ({"eval_steps": -1}, "eval_steps must be positive"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
    ({"validation_samples": 5000}, "validation_samples is 5000, but only"),
    ({"data": "distinct.csv"}, "another value in every one of its rows"),
    ({"data": "missing.csv"}, "row 3 of missing.csv has nothing in column 'label'"),
    ({"data": "none.csv"}, "no data file or folder 'none.csv'"),
    ({"label_column": "mood"}, "no column 'mood'; its columns are: text, label"),
    ({"report_to": "wanddb"}, "unknown report_to 'wanddb' (did you mean 'wandb'?)"),
    ({"report_to": "mlflow"}, "report_to 'mlflow' needs a package that is not installed"),
    ({"target_modules": ["qery"]}, "cannot add the adapter"),
    ({"target_modules": []}, "target_modules is an empty list"),
    ({"modules_to_save": ["clasifier"]}, "did you mean 'classifier'"),
    ({"dtype": "float8"}, "float8"),
    ({"method": "lora-ga", "gamma": 0}, "gamma must be above 0"),
    ({"method": "lora-ga", "lora_ga_objective": "sing"}, "did you mean 'sign'"),
    ({"method": "lora+", "loraplus_lr_ratio": -1}, "loraplus_lr_ratio must be above 0"),
    ({"method": "adalora", "adalora_init_rank": 1}, "adalora_init_rank must be at least rank, 2"),
    ({"method": "adalora", "adalora_tinit": 50}, "budgeting phase"),
    ({"method": "lora-pro", "x": "zer"}, "did you mean 'zero'"),
    ({"method": "lora-pro", "damping": -1}, "damping must be at least 0"),
    ({"method": "lora-pro", "optimizer_options": {"betaz": 1}}, "betaz"),
    ({"method": "lora-pro", "optimizer_options": "fast"}, "optimizer_options must be a mapping"),
    ({"prompt": "{x}"}, "'prompt' is not read by this task"),
    ({"methods": {"lora": 1}}, "belongs to 'lorapro compare'"),
    ({"output_dir": "table.csv"}, "output_dir table.csv is a file"),
    ({"output_dir": "x" * 300}, "File name too long"),
    ({"lr": 1e-3}, "unknown config key 'lr' (did you mean 'learning_rate'?)"),
    ({"lora_alpha": 8}, "did you mean 'alpha'"),
    ({"label_column": "text"}, "column 'text' is named twice"),
    ({"label_column": True}, "label_column must be a text, found true"),
    ({"model": {"name": "x"}}, "model must be a text, found a mapping"),
    ({"text_column": ""}, "text_column is empty"),
    ({"rank": None}, "'rank' has no value"),
    ({"seed": 10**20}, "seed must be below 2**32"),
    ({"warmup_steps": inf}, "warmup_steps must be finite"),
    ({"eval_delay": nan}, "eval_delay must be finite"),
    ({"neftune_noise_alpha": nan}, "neftune_noise_alpha must be finite"),
    ({"dataloader_num_workers": -1}, "dataloader_num_workers must be at least 0"),
    ({"lr_scheduler_kwargs": "much"}, "lr_scheduler_kwargs must be a mapping, found 'much'"),
    ({"lr_scheduler_kwargs": {"powr": 1}}, "unexpected keyword argument 'powr'"),
    ({"accelerator_config": "none.json"}, "accelerator_config must be a mapping"),
    ({"fsdp": "full_shard"}, "fsdp is for several processes"),
    ({"torch_compile": True, "torch_compile_backend": "x"}, "not a valid DynamoBackend"),
    ({"save_strategy": "best"}, "metric_for_best_model"),
    ({"optim": "adafactor"}, "optim is not read: the method brings its optimizer"),
    ({"resume_from_checkpoint": "x"}, "a run goes on from its own folder"),
    ({"push_to_hub": True}, "push_to_hub is not read"),
    ({"target_modules": ["query", "vlaue"]}, "did you mean 'value'"),
    ({"exclude_modules": ["qury"]}, "did you mean 'query'"),
    ({"model": "table.csv"}, "cannot load the model in table.csv"),
    ({"model": "cut"}, "cannot load the model in cut"),
    ({"max_length": 500, "data": "long.csv"}, "has 96 positions; set max_length to 96 or less"),
    ({"data": "one.csv"}, "holds one label only (good)"),
    ({"data": "same.csv"}, "each of its texts has more than one label"),
    (
        {"data": "three.csv", "test_samples": 2},
        "only 2 rows of three.csv have a label that another row has too",
    ),
    ({"data": "lists.jsonl"}, "row 1 of lists.jsonl (train) holds a list in column 'label'"),
    ({"data": "texts.jsonl"}, "row 2 of texts.jsonl (train) holds a dict in column 'text'"),
    ({"data": "twice.csv"}, "2 columns are called 'text'"),
    ({"data": "unseen"}, "label 'new' of unseen occurs outside the training rows only"),
    ({"data": "unlabelled"}, "unlabelled (test) has no column 'label'"),
    ({"data": "latin.csv"}, "is not UTF-8"),
    ({"data": "empty.jsonl"}, "empty.jsonl holds no rows"),
    ({"data": "header.csv"}, "header.csv holds no rows"),
    ({"data": "broken.jsonl"}, "line 3 is not JSON"),
    ({"data": "numbers.jsonl"}, "line 2 is of type int, not an object"),
    ({"data": "one.json"}, "found no list of records"),
    ({"data": "cut.parquet"}, "cannot read cut.parquet"),
    ({"data": "table.xlsx"}, "expected a file ending in"),
    ({"data": "folder"}, "folder has no train file"),
]

ASKED = [{"role": "user", "content": "A?"}]
SAID = [*ASKED, {"role": "assistant", "content": "B."}]

# Rows of a file beside twenty good ones; what is wrong.
CHATS = [
    ([{"messages": []}], "row 21 of chat.jsonl holds [], expected a list of messages"),
    ([{"messages": None}], "row 21 of chat.jsonl has nothing in column 'messages'"),
    ([{"messages": {"role": "user"}}], "expected a list of messages"),
    ([{"messages": "[{role: user}]"}], "row 21 of chat.jsonl holds a text"),
    ([{"messages": SAID[1:]}], "row 21 of chat.jsonl holds an answer only"),
    ([{"messages": ASKED}], "the last message is 'user'"),
    ([{"messages": [{"content": "A?"}]}], "unknown role None"),
    ([{"messages": [{"role": "boss", "content": "A?"}]}], "unknown role 'boss'"),
    ([{"messages": [{"role": "user", "content": 3}]}], "the content of a message is 3"),
    (
        [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}],
        "a message holds a part of type 'image'",
    ),
    ([{"messages": [*ASKED, {"role": "assistant", "content": " "}]}], "the last answer is empty"),
    ([{"prompt": "A?", "completion": "B."}], "row 21 of chat.jsonl has nothing in column"),
]
LANGUAGE = [
    ({"data": "prompts.jsonl"}, "row 21 of prompts.jsonl has nothing in column 'completion'"),
    ({"data": "texts.jsonl"}, "row 2 of texts.jsonl holds {'a': 1} in column 'text'"),
    ({"data": "spaces.jsonl"}, "row 1 of spaces.jsonl has nothing in column 'text'"),
    ({"data": "lists.jsonl"}, "row 1 of lists.jsonl holds [] in column 'prompt'"),
    ({"data": "other.jsonl"}, "its columns are: ask, say (set messages_column"),
    ({"task": "gsm8k", "data": "problems.jsonl"}, "row 3 of problems.jsonl has nothing in column"),
    ({"task": "gsm8k"}, "no column 'question'; its columns are: messages"),
    ({"data": "two.jsonl"}, "has 2 training rows: too few"),
    ({"max_length": 9}, "no training example of chat.jsonl fits into max_length 9: 20 of 20"),
    ({"format": "text"}, "no column 'text'; its columns are: messages"),
    ({"format": "chat"}, "unknown format 'chat'"),
    ({"diagnostics_every": 1, "diagnostics_layers": "("}, "'(' is no regular expression"),
    (
        {"diagnostics_every": 1, "diagnostics_layers": "z"},
        "matches diagnostics_layers 'z'; its pairs",
    ),
    ({"messages_column": "chats"}, "no column 'chats'"),
    ({"system": " "}, "system is empty"),
    ({"system": True}, "system must be a text, found true"),
    ({"harness_tasks": ["x"], "harness_folder": "."}, "no task 'x'"),
    ({"generation_samples": -1}, "generation_samples must be at least 0"),
    ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ({"model": "BERT"}, "is an encoder (bert)"),
    ({"model": "PLAIN"}, "has no chat template for conversations"),
]

COMPARISONS = [
    ({"methods": {}}, "no 'methods'"),
    ({"methods": ["lora", "lora"]}, "names 'lora' more than once"),
    ({"methods": {"lroa": 1}}, "unknown method 'lroa' (did you mean 'lora'?)"),
    ({"methods": {"lora": [1e-3, nan]}}, "learning_rate must be positive, found nan"),
    ({"methods": {"lora": {"learning_rate": []}}}, "learning_rate is an empty list"),
    ({"methods": {"lora": {"rnk": 2}}}, "did you mean 'rank'"),
    (
        {"diagnostics_every": 1, "diagnostics_layers": "z"},
        "matches diagnostics_layers 'z'; its pairs",
    ),
    ({"methods": {"a/b": {"method": "lora"}}}, "cannot hold a slash"),
    ({"seeds": []}, "distinct whole numbers"),
    ({"seeds": [0, 0]}, "distinct whole numbers"),
    ({"seeds": ["a"]}, "whole numbers"),
    ({"strategy": "gird"}, "did you mean 'grid'"),
    ({"seed": 3}, "belongs under 'methods' and 'seeds'"),
    ({"grid": {"rnk": [1]}}, "did you mean 'rank'"),
    ({"grid": {"rank": 4}}, "expected a list of values"),
    ({"grid": {"rank": [0, 4]}}, "rank must be at least 1"),
    ({"grid": {"learning_rate": [1]}}, "a place of its own"),
    ({"tasks": ["classification"]}, "'task' or 'tasks', not both"),
    ({"task": None, "tasks": ["classificaton"]}, "did you mean 'classification'"),
    ({"paper": {"lroa": {"x": 1}}}, "did you mean 'lora'"),
    ({"paper": {"lora": {"classificatoin": 1}}}, "did you mean 'classification'"),
    ({"paper": {"lora": {"classification": [1, 2, 3]}}}, "expected a number or [mean, sd]"),
    ({"columns": {"x": 5}}, "columns must be a mapping of mappings"),
    ({"lr_scheduler_kwargs": {"powr": 1}}, "unexpected keyword argument 'powr'"),
    ({"fsdp": "full_shard"}, "fsdp is for several processes"),
    ({"data": "one.csv"}, "holds one label only"),
    ({"data": "none.csv"}, "no data file or folder 'none.csv'"),
    ({"rank": 400}, "rank 400 is above min(m, n)"),
    ({"title": ["x"]}, "title must be a line of text"),
]

FLAGS = [
    (["--processes", "0"], "--processes must be a whole number of at least 1"),
    (["--processes", "two"], "--processes must be a whole number"),
    (["--processes"], "--processes needs a value"),
    (["--backend", "rya"], "did you mean 'ray'"),
    (["--toy", "perhaps"], "--toy must be true or false"),
    (["--methods", "lroa"], "did you mean 'lora'"),
    (["--methods"], "--methods needs a value"),
    (["--seeds"], "--seeds needs a value"),
    (["--rnk", "4"], "did you mean 'rank'"),
    (["--learning_rate", "1"], "belongs under 'methods'"),
]


@pytest.fixture
def place(classify, table, tmp_path, monkeypatch):
    """A folder with data that cannot be used, and the values of a run that works."""
    monkeypatch.chdir(tmp_path)
    lines = table.read_text().splitlines()
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "missing.csv").write_text("\n".join([*lines[:3], "nothing,", *lines[3:]]) + "\n")
    rows = [f"{line.rpartition(',')[0]},{n}" for n, line in enumerate(lines[1:])]
    (tmp_path / "distinct.csv").write_text("\n".join([lines[0], *rows]) + "\n")
    unreadable(tmp_path, lines)
    shutil.copytree(classify["model"], tmp_path / "cut")
    weights = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(weights[:500])
    return {**classify, "data": "table.csv", "output_dir": "out"}


def unreadable(folder, lines):
    """Files of texts and labels that no run can use."""
    head, good = lines[0], [line for line in lines if line.endswith("good")]
    some = [{"text": f"{i} is a text", "label": "ab"[i % 2]} for i in range(30)]
    for name, text in {
        "long.csv": "\n".join([*lines, f"{'long ' * 40},good"]),
        "one.csv": "\n".join([head, *good]),
        "same.csv": "\n".join([head, *(f"the same,{'ab'[i % 2]}" for i in range(30))]),
        "three.csv": f"{head}\na b,x\nc d,x\ne f,z\n",
        "lists.jsonl": as_lines({**row, "label": [row["label"]]} for row in some),
        "texts.jsonl": as_lines([some[0], {**some[1], "text": {"a": 1}}, *some[2:]]),
        "twice.csv": "text,text,label\n" + "a b,c d,x\n" * 9,
        "empty.jsonl": "",
        "header.csv": f"{head}\n",
        "broken.jsonl": as_lines(some[:2]) + '{"text": "a\n',
        "numbers.jsonl": as_lines(some[:1]) + "3\n",
        "one.json": '{"text": "a", "label": "b"}',
        "table.xlsx": "PK",
        "folder/notes.csv": head,
        "unseen/train.csv": "\n".join(lines),
        "unseen/test.csv": f"{head}\nnothing seen,new\n",
        "unlabelled/train.csv": "\n".join(lines),
        "unlabelled/test.csv": "text\nnothing said\n",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "latin.csv").write_bytes(f"{head}\ncafé,good\n".encode("latin-1"))
    (folder / "cut.parquet").write_bytes(b"PAR1 and no more")


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def check(capsys, tmp_path, arguments, message):
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("lorapro: error: ")
    assert message in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("change", "message"), RUNS)
def test_a_run(place, tmp_path, capsys, change, message):
    write_yaml(tmp_path / "c.yaml", {**place, **change})
    check(capsys, tmp_path, ["train", "c.yaml"], message)


@pytest.fixture
def chats(tiny_llama, tiny_bert, tmp_path, monkeypatch):
    """A folder with conversations and what cannot be used, and the values of a run that works."""
    monkeypatch.chdir(tmp_path)
    for name, rows in {
        "chat": [{"messages": SAID}] * 20,
        "prompts": [{"prompt": "A?", "completion": "B."}] * 20
        + [{"prompt": "A?", "completion": ""}],
        "texts": [{"text": "a b"}, {"text": {"a": 1}}],
        "spaces": [{"text": " "}] * 20,
        "lists": [{"prompt": [], "completion": []}] * 20,
        "other": [{"ask": "A?", "say": "B."}] * 20,
        "two": [{"messages": SAID}] * 2,
        "problems": [{"question": "1+1?", "answer": "#### 2"}] * 2 + [{"question": "1+2?"}],
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(as_lines(rows))
    names = {"BERT": str(tiny_bert), "PLAIN": str(tmp_path / "plain")}
    shutil.copytree(tiny_llama, tmp_path / "plain")
    byte_tokenizer(tmp_path / "plain", chat=False)
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    values = {"task": "sft", "model": str(tiny_llama), "data": "chat.jsonl", "max_steps": 1}
    return names, {**values, "use_cpu": True, "output_dir": "out"}


@pytest.mark.parametrize(("rows", "message"), CHATS)
def test_rows_of_a_chat(chats, tmp_path, capsys, rows, message):
    _, values = chats
    (tmp_path / "chat.jsonl").write_text(as_lines([{"messages": SAID}] * 20 + rows))
    write_yaml(tmp_path / "c.yaml", values)
    check(capsys, tmp_path, ["train", "c.yaml"], message)


@pytest.mark.parametrize(("change", "message"), LANGUAGE)
def test_a_run_on_own_chats(chats, tmp_path, capsys, change, message):
    names, values = chats
    model = {"model": names[change["model"]]} if "model" in change else {}
    # Prompts without a template are no conversation: the encoder gets to its own error.
    data = {"data": "prompts-good.jsonl"} if change.get("model") == "BERT" else {}
    (tmp_path / "prompts-good.jsonl").write_text(
        as_lines([{"prompt": "A?", "completion": "B."}] * 20)
    )
    write_yaml(tmp_path / "c.yaml", {**values, **change, **model, **data})
    check(capsys, tmp_path, ["train", "c.yaml"], message)


@pytest.mark.parametrize(("change", "message"), COMPARISONS)
def test_a_comparison(place, tmp_path, capsys, change, message):
    values = {k: v for k, v in place.items() if k != "seed"}
    values |= {"methods": {"lora": 1e-3}, **change}
    write_yaml(tmp_path / "c.yaml", {k: v for k, v in values.items() if v is not None})
    check(capsys, tmp_path, ["compare", "c.yaml"], message)


@pytest.mark.parametrize(("flags", "message"), FLAGS)
def test_flags_of_a_comparison(place, tmp_path, capsys, flags, message):
    values = {k: v for k, v in place.items() if k != "seed"} | {"methods": {"lora": 1e-3}}
    write_yaml(tmp_path / "c.yaml", values)
    check(capsys, tmp_path, ["compare", "c.yaml", *flags], message)


def test_files_that_are_no_configs(place, tmp_path, capsys):
    (tmp_path / "twice.yaml").write_text("rank: 4\nrank: 8\n")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "open.yaml").write_text("rank: [4\n")
    (tmp_path / "list.yaml").write_text("- rank\n")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    (tmp_path / "number.yaml").write_text("1: 2\n")
    (tmp_path / "object.yaml").write_text("task: !!python/object/apply:os.mkdir [sprung]\n")
    laughs = [f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    (tmp_path / "laughs.yaml").write_text(f"rank: [&a0 [ha], {', '.join(laughs)}]\n")
    (tmp_path / "itself.yaml").write_text("target_modules: &a [*a]\n")
    (tmp_path / "deep.yaml").write_text(f"rank: {'[' * 3000}{']' * 3000}\n")
    (tmp_path / "digits.yaml").write_text(f"seed: {'9' * 5000}\n")
    (tmp_path / "date.yaml").write_text("task: 2001-99-99\n")
    (tmp_path / "key.yaml").write_text("? [a, b]\n: 1\n")
    (tmp_path / "c.yaml").write_text("methods: {lora: 1.0e-3}\n")
    (tmp_path / "methods.yaml").write_text("method: lora\nmax_steps: 1\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.yaml").write_text("methods: {lora: 1.0e-3}\n")
    for arguments, message in (
        (["train", "nowhere.yaml"], "no config file 'nowhere.yaml'"),
        (["train", "."], "is a folder, expected a config YAML"),
        (["train", "twice.yaml"], "gives 'rank' more than once"),
        (["train", "bytes.yaml"], "is not a YAML file"),
        (["train", "open.yaml"], "is not a YAML file"),
        (["train", "list.yaml"], "must hold 'key: value' lines, found a list"),
        (["train", "empty.yaml"], "must hold 'key: value' lines, found nothing"),
        (["train", "number.yaml"], "the key 1 is not a word"),
        (["train", "object.yaml"], "could not determine a constructor"),
        (["train", "laughs.yaml"], "more than 10,000 values once its aliases are written out"),
        (["train", "itself.yaml"], "an alias in the config file holds itself"),
        (["train", "deep.yaml"], "nested too deeply"),
        (["train", "digits.yaml"], "digits.yaml is not a YAML file: Exceeds the limit"),
        (["train", "date.yaml"], "date.yaml is not a YAML file: month must be"),
        (["train", "key.yaml"], "found unhashable key"),
        (["train", "task=sft"], "no config file 'task=sft'"),
        (["train", "--lr", "1"], "unknown flag --lr (did you mean 'learning_rate'?)"),
        (["train", "--task"], "expected one argument"),
        (["compare", "c.yaml", "sub/c.yaml"], "two recipes are called 'c'"),
        (["compare"], "needs a config file"),
        (["train"], "lorapro train --task sft --data chat.jsonl"),
        (["train", "--method", "lora"], "no task is given"),
        (["train", "methods.yaml"], "no task is given"),
        (["lr-find"], "lorapro lr-find --task sft --data chat.jsonl"),
    ):
        check(capsys, tmp_path, arguments, message)
