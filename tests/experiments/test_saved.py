"""Results that travel: saved weights used in another folder, without config and without data."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from experiments.tiny_models import sentences, write_yaml
from lorapro.cli.main import main
from lorapro.experiments.card import model_card
from lorapro.experiments.config import build_config
from lorapro.experiments.runner import run
from lorapro.experiments.saved import base_name, open_saved
from lorapro.experiments.toys.data import chats


@pytest.fixture
def away(tmp_path, monkeypatch):
    """Another folder to stand in."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def new_rows(path, count=9):
    rows = sentences(count, seed=7)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["number", "text"])
        writer.writerows((i, text) for i, (text, _) in enumerate(rows))
    return rows


def trained(values, **changes):
    """A run whose training data are gone when it is used."""
    config = build_config({**values, "max_steps": 150, "learning_rate": 0.01, **changes})
    result = run(config)
    return config.folder, result


def logits_by_hand(folder, base, texts):
    labels = json.loads((folder / "lorapro.json").read_text())["carried"]["labels"]
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels))
    model = PeftModel.from_pretrained(model, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        out = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    return labels, out.softmax(-1)


def test_a_classifier_predicts_new_lines_in_another_folder(classify, away, tmp_path, capsys):
    shutil.copy(classify["data"], tmp_path / "mine.csv")
    folder, _ = trained({**classify, "data": str(tmp_path / "mine.csv")})
    (tmp_path / "mine.csv").unlink()
    shutil.move(folder / "adapter", away / "moved")
    shutil.rmtree(folder)
    rows = new_rows(away / "new.csv")
    capsys.readouterr()

    assert main(["predict", "moved", "--data", "new.csv", "--output", "out.csv"]) == 0
    assert capsys.readouterr().out == ""
    with open("out.csv", encoding="utf-8", newline="") as stream:
        answers = list(csv.DictReader(stream))
    assert [a["text"] for a in answers] == [text for text, _ in rows]
    assert [a["number"] for a in answers] == [str(i) for i in range(9)]
    labels, expected = logits_by_hand(away / "moved", classify["model"], [t for t, _ in rows])
    assert labels == ["bad", "good", "so"]
    for answer, share in zip(answers, expected, strict=True):
        assert answer["prediction"] == labels[int(share.argmax())]
        assert float(answer["probability"]) == pytest.approx(float(share.max()), rel=1e-4)
        for name, p in zip(labels, share.tolist(), strict=True):
            assert float(answer[f"probability of {name}"]) == pytest.approx(p, rel=1e-3)
    right = sum(a["prediction"] == label for a, (_, label) in zip(answers, rows, strict=True))
    assert right >= 7

    assert main(["predict", "moved", "--text", rows[0][0], "mud sad"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed[0]["prediction"] == answers[0]["prediction"]
    assert set(printed[1]) == {"text", "prediction", "probability", "probabilities"}

    (away / "lines.txt").write_text(f"{rows[1][0]}\n\n{rows[2][0]}\n")
    assert main(["predict", "moved", "--data", "lines.txt"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [p["prediction"] for p in printed] == [a["prediction"] for a in answers[1:3]]


def test_a_run_is_evaluated_inspected_and_exported_from_anywhere(
    classify, away, tmp_path, monkeypatch, capsys
):
    shutil.copy(classify["data"], tmp_path / "mine.csv")
    monkeypatch.chdir(tmp_path)  # relative paths, as people give them
    folder, result = trained({**classify, "data": "mine.csv", "output_dir": "run"})
    monkeypatch.chdir(away)
    capsys.readouterr()
    folder = tmp_path / folder

    def said(*arguments):
        assert main([str(a) for a in arguments]) == 0
        return capsys.readouterr().out

    # The run's own test set, found where the run was started.
    again = json.loads(said("evaluate", folder, "--use_cpu", "true"))
    assert again["loss"] == pytest.approx(result["metrics"]["test"]["loss"], rel=1e-5)
    (tmp_path / "mine.csv").unlink()

    with open("labelled.csv", "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("text", "label"), *sentences(12, seed=7)])
    for target in (folder, folder / "adapter"):
        found = json.loads(said("evaluate", target, "--data", "labelled.csv", "--use_cpu", "true"))
        assert found["accuracy"] >= 0.7
    assert "13 pairs" in said("inspect", folder)
    assert "13 pairs" in said("inspect", folder / "adapter", "--model", classify["model"])

    assert "plain LoRA of rank 2" in said("export", folder, "portable")
    assert "merged model" in said("export", folder / "adapter", "whole", "--merged")
    expected = said("predict", folder, "--text", "fine sun", "mud sad")
    for target in ("portable", "whole"):
        found = said("predict", target, "--text", "fine sun", "mud sad")
        for a, b in zip(found.splitlines(), expected.splitlines(), strict=True):
            a, b = json.loads(a), json.loads(b)
            assert a["prediction"] == b["prediction"]
            assert a["probability"] == pytest.approx(b["probability"], rel=1e-3)
    config = json.loads((away / "whole" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good", "2": "so"}


def test_what_lies_beside_the_weights(classify, tmp_path):
    folder, result = trained(classify)
    saved = folder / "adapter"
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == classify["model"]
    assert (saved / "tokenizer.json").is_file()
    about = json.loads((saved / "lorapro.json").read_text())
    assert about["metrics"]["test"]["accuracy"] == result["metrics"]["test"]["accuracy"]
    card = (saved / "README.md").read_text(encoding="utf-8")
    for part in (
        f"base_model: {classify['model']}",
        "| method | lora-pro-muon |",
        "| rank | 2 |",
        "| learning rate | 0.01 |",
        "0: bad, 1: good, 2: so",
        "| test | accuracy |",
        "peft ",
        "num_labels=3",
    ):
        assert part in card, part


def test_the_card_of_an_adapter_says_where_its_base_comes_from():
    about = {"task": "sft", "method": "lora", "model": "smollm2-135m-instruct"}
    card = model_card(about, "adapter")
    assert 'from_pretrained("BASE")  # the folder that \'lorapro fetch smollm2-135m-ins' in card
    card = model_card({**about, "model": "HuggingFaceTB/SmolLM2-135M"}, "adapter")
    assert 'from_pretrained("HuggingFaceTB/SmolLM2-135M")\n' in card


def test_the_base_is_named_so_that_others_find_it(classify, tiny_bert, monkeypatch):
    def named(name):
        return base_name(build_config({**classify, "model": name}).family())

    assert named("minilm-l6") == "minilm-l6"
    assert named("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
    monkeypatch.chdir(tiny_bert.parent)
    assert named(tiny_bert.name) == str(tiny_bert)


def test_a_language_model_answers_prompts_and_conversations(tiny_llama, away, tmp_path, capsys):
    data, _ = chats(tmp_path)
    values = {
        "task": "sft",
        "model": str(tiny_llama),
        "data": str(data),
        "max_length": 160,
        "max_new_tokens": 6,
        "generation_samples": 2,
        "generation_batch_size": 1,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": str(tmp_path / "run"),
    }
    folder = build_config(values).folder
    assert main(["train", str(write_yaml(tmp_path / "c.yaml", values))]) == 0
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    samples = [json.loads(x) for x in (folder / "samples.jsonl").read_text().splitlines()]
    assert set(said) >= {"before", "validation", "prompt", "samples (2)"}
    assert said["answer"] == " ".join(samples[0]["answer"].split())
    shutil.move(folder / "adapter", away / "chat")
    data.unlink()
    capsys.readouterr()
    with open("ask.jsonl", "w", encoding="utf-8") as stream:
        for sample in samples:
            stream.write(json.dumps({"messages": sample["messages"]}) + "\n")
    command = ["generate", "chat", "--data", "ask.jsonl", "--batch_size", "1"]
    assert main(command) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [p["prediction"] for p in printed] == [s["answer"] for s in samples]

    first = next(s for s in samples if len(s["messages"]) == 1)
    assert main(["generate", "chat", "--prompt", first["messages"][0]["content"]]) == 0
    assert capsys.readouterr().out == first["answer"] + "\n"
    assert main(["generate", "chat", "--prompt", "Hm?", "--max_new_tokens", "2"]) == 0
    short = capsys.readouterr().out
    hot = ["--temperature", "3", "--system", "Be odd.", "--max_new_tokens", "12"]
    assert main(["generate", "chat", "--prompt", "Hm?", *hot]) == 0
    assert capsys.readouterr().out != short


def test_an_adapter_whose_base_changed_is_not_used_alone(classify, tmp_path, capsys):
    folder, result = trained(classify, method="lora-pro-full", weight_decay=0.1, max_steps=4)
    assert set(result["saved"]) == {"adapter", "merged"}
    for arguments in (
        ["predict", str(folder / "adapter"), "--text", "a"],
        ["export", str(folder / "adapter"), str(tmp_path / "out")],
        ["export", str(folder), str(tmp_path / "out"), "--merged"],
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "is not the trained model: its base weights changed in training too" in error
    assert not (tmp_path / "out").exists()
    assert main(["inspect", str(folder)]) == 0
    assert main(["predict", str(folder), "--text", "fine sun"]) == 0
    assert open_saved(folder).weights == folder / "merged"


def test_bad_input_is_one_line(classify, away, capsys):
    folder, _ = trained(classify, max_steps=2)
    adapter = str(folder / "adapter")
    (away / "wrong.csv").write_text("a,b\n1,2\n")
    (away / "empty.txt").write_text("\n")
    (away / "unseen.csv").write_text("text,label\nfine sun,bright\n")
    (away / "there.csv").write_text("")
    (away / "bare").mkdir()
    kept = sorted(away.rglob("*"))
    capsys.readouterr()
    for match, arguments in (
        ("no column 'text'; its columns are: a, b", ["predict", adapter, "--data", "wrong.csv"]),
        ("give --data FILE or --text TEXT", ["predict", adapter]),
        ("give --data or --text", ["predict", adapter, "--data", "wrong.csv", "--text", "a"]),
        ("a text is empty", ["predict", adapter, "--text", "fine", " "]),
        (
            "row 1 of unseen.csv has the label 'bright'",
            ["evaluate", adapter, "--data", "unseen.csv"],
        ),
        ("unknown config key in --against: 'rnk'", ["report", str(folder), "--against", "rnk"]),
        ("there.csv is a file", ["report", str(folder), "--figures", "there.csv"]),
        ("no data file or folder 'no.csv'", ["predict", adapter, "--data", "no.csv"]),
        ("empty.txt holds no text", ["predict", adapter, "--data", "empty.txt"]),
        ("no file or folder 'nothing'", ["predict", "nothing", "--text", "a"]),
        ("it has no lorapro.json", ["predict", "bare", "--text", "a"]),
        ("wrong.csv is a file; expected a run", ["predict", "wrong.csv", "--text", "a"]),
        ("exists already", ["predict", adapter, "--text", "a", "--output", "there.csv"]),
        ("ending in .jsonl or .csv", ["predict", adapter, "--text", "a", "--output", "x.xls"]),
        ("--batch_size must be at least 1", ["predict", adapter, "--text", "a", "--batch_size=0"]),
        ("did you mean '--text'", ["predict", adapter, "--texts", "a"]),
        ("does not fit this model", ["predict", adapter, "--text", "a", "--model", "WRONG"]),
        ("is no language model", ["generate", adapter, "--prompt", "a"]),
        ("give --prompt TEXT or --data FILE", ["generate", adapter]),
        ("--temperature must be", ["generate", adapter, "--prompt", "a", "--temperature", "-1"]),
        ("has no max_new_tokens", ["generate", adapter, "--prompt", "a", "--max_new_tokens", "3"]),
        ("no test set of its own", ["evaluate", adapter]),
        ("no column 'text'", ["evaluate", adapter, "--data", "wrong.csv"]),
        ("no lorapro.json and no adapter_config", ["inspect", "bare"]),
    ):
        given = [a.replace("WRONG", str(other_model(away.parent))) for a in arguments]
        assert main(given) == 2, arguments
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("lorapro: error: "), error
        assert match in error, (match, error)
        assert sorted(away.rglob("*")) == kept


def other_model(folder):
    from transformers import BertConfig, BertModel

    if not (folder / "other").is_dir():
        config = BertConfig(vocab_size=300, hidden_size=8, num_hidden_layers=1)
        config.num_attention_heads, config.intermediate_size = 2, 8
        BertModel(config).save_pretrained(folder / "other")
    return folder / "other"
