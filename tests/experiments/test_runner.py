from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from experiments.tiny_models import run_until
from lorapro.cli.main import main
from lorapro.experiments.config import build_config
from lorapro.experiments.errors import UserError
from lorapro.experiments.methods import METHODS
from lorapro.experiments.restore import describe_target, evaluate_target
from lorapro.experiments.runner import make_task, run

TRAINED = [method for method in METHODS if method != "zero-shot"]


def curve(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def first_loss(values, method, folder, **change):
    run(build_config({**values, **change, "method": method, "output_dir": str(folder)}))
    return float(curve(folder)[0]["train_loss"])


def test_methods_meet_the_same_head_and_the_same_batches(classify, tmp_path):
    # Before the first update every method is the pretrained model with its fresh head. (The loss
    # of AdaLoRA holds its penalty, too.)
    values = {**classify, "max_steps": 1, "eval_steps": 1}
    losses = [
        first_loss(values, method, tmp_path / method) for method in TRAINED if method != "adalora"
    ]
    assert max(losses) - min(losses) < 1e-5
    assert abs(first_loss(values, "lora", tmp_path / "other", seed=1) - losses[0]) > 1e-4


@pytest.mark.parametrize("method", TRAINED)
def test_what_is_saved_gives_the_loss_that_was_reported(classify, method):
    # One rate for all: what it does to the loss is not asked here.
    config = build_config({**classify, "method": method, "learning_rate": 1e-2, "divergence": 0})
    result = run(config)
    assert result["steps"] == 6
    assert result["status"] == "finished"
    whole = METHODS[method].trains_all
    assert result["saved"] == ({"model": "model"} if whole else {"adapter": "adapter"})
    again = evaluate_target(str(config.folder))
    assert again["loss"] == pytest.approx(result["metrics"]["test"]["loss"], abs=1e-6)
    assert again["accuracy"] == result["metrics"]["test"]["accuracy"]
    assert json.loads((config.folder / "result.json").read_text()) == result


@pytest.mark.parametrize("method", ["full", "adalora", "lora-ga+lora-pro-muon"])
def test_a_run_cut_off_after_its_last_step_takes_no_other(classify, method):
    values = {**classify, "method": method, "save_strategy": "steps", "save_steps": 3}
    config = build_config(values)
    whole = run(config)
    (config.folder / "result.json").unlink()
    steps = []
    again = run(config, on_step=lambda done, total: steps.append(done))
    assert steps == []
    assert again["steps"] == whole["steps"] == 6
    assert again["metrics"] == whole["metrics"]
    state = "optimizer_state_bytes"
    assert again["cost"][state] == whole["cost"][state] > 0


COMBINATIONS = [
    ("dora+lora-pro", {}),
    ("dora+muon", {}),
    ("lora+lora-pro-sgd", {"x": "symmetric"}),
    ("pissa+lora-pro-factored", {"x": "zero"}),
    ("lora-ga+lora-pro-full", {"lora_ga_objective": "sign"}),
    ("lora-ga+lora-pro-muon", {"lora_ga_objective": "adam", "damping": 3.0}),
    ("lora-ga+lora+", {"lora_ga_batch_size": 2, "loraplus_lr_ratio": 4.0}),
]


@pytest.mark.parametrize(("method", "more"), COMBINATIONS)
def test_combinations_train_and_are_saved_as_they_were_reported(classify, method, more):
    config = build_config({**classify, "method": method, "learning_rate": 3e-3, **more})
    result = run(config)
    assert result["status"] == "finished"
    assert result["method"] == method
    again = evaluate_target(str(config.folder))
    assert again["loss"] == pytest.approx(result["metrics"]["test"]["loss"], abs=1e-5)


def test_every_item_is_kept_in_the_order_of_the_test_rows(classify, tmp_path):
    results = {}
    for name, batch in (("a", 4), ("b", 7)):
        values = {**classify, "method": "lora", "output_dir": str(tmp_path / name)}
        results[name] = run(build_config({**values, "per_device_eval_batch_size": batch}))
    items = [dict(np.load(tmp_path / name / "items.npz")) for name in ("a", "b")]
    for key in ("loss", "correct", "label", "prediction", "weight"):
        np.testing.assert_allclose(items[0][key], items[1][key], atol=1e-5)
    task = make_task(build_config({**classify, "method": "lora"}))
    assert items[0]["label"].tolist() == [example["labels"] for example in task.test]
    test = results["a"]["metrics"]["test"]
    assert items[0]["loss"].mean() == pytest.approx(test["loss"], abs=1e-6)
    assert items[0]["correct"].mean() == pytest.approx(test["accuracy"])


def test_the_adapter_is_an_ordinary_peft_adapter(classify, tiny_bert):
    config = build_config({**classify, "method": "lora-pro"})
    run(config)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    model = PeftModel.from_pretrained(base, config.folder / "adapter").eval()
    task = make_task(config)
    batch = task.collator()(task.test)
    with torch.no_grad():
        loss = model(**batch).loss
    result = json.loads((config.folder / "result.json").read_text())
    assert float(loss) == pytest.approx(result["metrics"]["test"]["loss"], abs=1e-5)


def test_decayed_base_weights_are_saved_in_a_merged_model(classify):
    values = {**classify, "method": "lora-pro-full", "weight_decay": 0.3, "learning_rate": 3e-2}
    config = build_config(values)
    result = run(config)
    assert result["saved"] == {"adapter": "adapter", "merged": "merged"}
    again = evaluate_target(str(config.folder))
    assert again["loss"] == pytest.approx(result["metrics"]["test"]["loss"], abs=1e-5)


@pytest.mark.parametrize("method", TRAINED)
def test_an_interrupted_run_goes_on_to_the_same_end(classify, tmp_path, method):
    values = {
        **classify,
        "method": method,
        "weight_decay": 0.1,
        "save_strategy": "steps",
        "save_steps": 2,
        "lora_dropout": 0.1,
    }
    whole = run(build_config({**values, "output_dir": str(tmp_path / "whole")}))
    config = build_config({**values, "output_dir": str(tmp_path / "parts")})
    run_until(config, 5)
    assert not (config.folder / "result.json").exists()
    said, steps = [], []
    parts = run(config, log=said.append, on_step=lambda done, total: steps.append(done))
    assert [line for line in said if "note:" not in line] == ["going on from checkpoint-4"]
    assert steps == [5, 6]
    for split in ("validation", "test"):
        assert parts["metrics"][split] == whole["metrics"][split]
    losses = [[row["train_loss"] for row in curve(tmp_path / n)] for n in ("whole", "parts")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("method", ["lora-ga", "lora-ga+lora-pro-muon"])
def test_a_lora_ga_run_and_its_checkpoint_are_exported_for_the_original_base(
    classify, tiny_bert, tmp_path, method
):
    values = {**classify, "method": method, "save_strategy": "steps", "save_steps": 3}
    config = build_config({**values, "learning_rate": 1e-2})
    result = run(config)
    task = make_task(config)
    for source in ("", "checkpoint-6", "adapter"):
        out = tmp_path / f"out-{source}"
        assert main(["export", str(config.folder / source), str(out)]) == 0
        base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
        model = PeftModel.from_pretrained(base, out).eval()
        with torch.no_grad():
            loss = model(**task.collator()(task.test)).loss
        assert float(loss) == pytest.approx(result["metrics"]["test"]["loss"], abs=1e-5), source


def test_the_standard_error_is_that_of_the_mean_cross_entropy(classify):
    config = build_config({**classify, "method": "lora"})
    result = run(config)
    task = make_task(config)
    base = AutoModelForSequenceClassification.from_pretrained(config.run.model, num_labels=3)
    model = PeftModel.from_pretrained(base, config.folder / "adapter").eval()
    batch = task.collator()(task.test)
    with torch.no_grad():
        logits = model(**batch).logits
    losses = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    want = float(losses.std(correction=0)) / len(losses) ** 0.5
    assert result["metrics"]["test"]["loss_standard_error"] == pytest.approx(want, rel=1e-4)


def snapshot(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_a_finished_run_is_not_repeated(classify):
    config = build_config({**classify, "method": "lora"})
    first = run(config)
    before = snapshot(config.folder)
    said = []
    assert run(config, log=said.append) == json.loads(json.dumps(first))
    assert "finished" in said[0]
    assert snapshot(config.folder) == before


def test_a_folder_with_another_run_is_left_alone(classify):
    config = build_config({**classify, "method": "lora"})
    run(config)
    before = snapshot(config.folder)
    other = {**classify, "method": "lora", "rank": 3}
    with pytest.raises(UserError, match=r"holds another run \(rank 2\).*--overwrite"):
        run(build_config(other))
    assert snapshot(config.folder) == before
    note = config.folder / "note.txt"
    note.write_text("mine")
    replaced = run(build_config({**other, "overwrite": True}))
    assert replaced["rank"] == 3
    assert note.read_text() == "mine"


def test_a_folder_with_other_files_is_left_alone(classify, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    for extra in ({}, {"overwrite": True}):
        with pytest.raises(UserError, match="files that are not a run's"):
            run(build_config({**classify, **extra}))
    assert [p.name for p in folder.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 17}, r"rank 17 is above min\(m, n\) = 16 of .*query \(16 x 16\)"),
        ({"target_modules": ["queri"]}, "cannot add the adapter: No modules were targeted"),
        ({"optimizer_options": {"betaz": 1}}, "betaz"),
        ({"data": "missing.csv"}, "missing.csv"),
    ],
)
def test_bad_input_writes_nothing(classify, change, message, tmp_path):
    config = build_config({**classify, **change})
    with pytest.raises(UserError, match=message) as caught:
        run(config)
    assert "\n" not in str(caught.value)
    assert not config.folder.exists()


def test_gsm8k_runs_answers_and_is_evaluated(solve, tmp_path):
    config = build_config({**solve, "method": "lora-pro", "generation_samples": 5})
    result = run(config)
    assert result["metrics"]["test"]["exact_match_total"] == 5
    lines = (config.folder / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 5
    again = evaluate_target(str(config.folder), limit=7)
    assert again["exact_match_total"] == 7
    saved = (config.folder / "predictions-test.jsonl").read_text().splitlines()
    # The same model gives the same answers to the same questions.
    assert [json.loads(a)["generated"] for a in saved[:5]] == [
        json.loads(a)["generated"] for a in lines
    ]


def test_a_model_is_evaluated_before_training(solve, tmp_path, monkeypatch):
    from experiments.tiny_models import write_yaml

    monkeypatch.chdir(tmp_path)
    values = {k: v for k, v in solve.items() if k != "output_dir"}
    path = write_yaml(tmp_path / "c.yaml", values)
    answers = tmp_path / "answers.jsonl"
    metrics = evaluate_target(str(path), limit=4, predictions=str(answers))
    assert metrics["exact_match_total"] == 4
    assert len(answers.read_text().splitlines()) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers.jsonl", "c.yaml"]
    with pytest.raises(UserError, match="not the folder of a run"):
        evaluate_target(str(tmp_path))
    with pytest.raises(UserError, match="not the folder of an adapter"):
        evaluate_target(str(path), adapter=str(tmp_path))


def test_describe_shows_pairs_of_config_run_checkpoint_and_adapter(classify, tmp_path):
    from experiments.tiny_models import write_yaml

    values = {**classify, "method": "rslora", "alpha": 8, "rank": 4, "save_strategy": "steps"}
    config = build_config(values)
    path = write_yaml(tmp_path / "c.yaml", values)
    before = describe_target(str(path))
    assert {p["scaling"] for p in before["pairs"]} == {4.0}  # 8 / sqrt(4)
    assert {p["rank"] for p in before["pairs"]} == {4}
    assert {p["norm_B"] for p in before["pairs"]} == {0.0}
    assert any("classifier" in p["name"] for p in before["plain"])
    assert not config.folder.exists()
    run(config)
    (checkpoint,) = config.folder.glob("checkpoint-*")
    for target in (config.folder, checkpoint, config.folder / "adapter"):
        after = describe_target(str(target))
        assert [p["name"] for p in after["pairs"]] == [p["name"] for p in before["pairs"]]
        assert min(p["norm_B"] for p in after["pairs"]) > 0
        assert after["trainable_parameters"] == before["trainable_parameters"]
