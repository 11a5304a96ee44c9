"""The laboratory: hidden layers alone are trained; a planted change can be recovered."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorapro.experiments.config import build_config
from lorapro.experiments.errors import UserError
from lorapro.experiments.methods.muon import hidden_matrices
from lorapro.experiments.model_building import build_model
from lorapro.experiments.runner import make_task, run
from lorapro.experiments.toys import toy_values

SMALL = {
    "validation_samples": 8,
    "test_samples": 16,
    "max_length": 16,
    "rank": 2,
    "max_steps": 3,
    "per_device_train_batch_size": 8,
    "eval_strategy": "no",
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_grad_norm": 0,
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LORAPRO_CACHE", str(tmp_path_factory.getbasetemp() / "lab-cache"))


@pytest.fixture
def config(tmp_path, cache):
    def make(task, **change):
        values = {**SMALL, **toy_values(task), "task": task, "output_dir": str(tmp_path / "run")}
        return build_config({"method": "full", **values, **change})

    return make


@pytest.mark.parametrize("task", ["lab", "lab-planted"])
def test_full_fine_tuning_moves_hidden_layers_and_nothing_else(config, task):
    made = config(task, learning_rate=1e-2)
    before = make_task(made).load_model()
    result = run(made)
    after = AutoModelForCausalLM.from_pretrained(made.folder / "model")
    hidden = {id(p) for p in hidden_matrices(after)}
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(old, new) == (id(new) not in hidden), name
    assert result["metrics"]["test"]["loss"] > 0


def test_rows_have_one_length_and_every_token_counts(config):
    task = make_task(config("lab"))
    batch = task.collator()(task.train[:5])
    assert batch["input_ids"].shape == (5, 16)
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert len(task.test) == 16
    assert len(task.validation) == 8


def test_a_text_may_be_made_of_several_columns(config, tmp_path):
    rows = [{"question": f"what is {i}", "answer": f"it is {i}"} for i in range(80)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    change = {"data": str(tmp_path / "pairs.jsonl"), "text": "{question}? {answer}"}
    task = make_task(config("lab", **change))
    shown = task.tokenizer.decode([t for row in task.train for t in row["input_ids"]])
    assert "it is" in shown
    assert "? " in shown or " ?" in shown


@pytest.mark.parametrize(("tokens", "rows", "times"), [(32, 2, 1), (128, 8, 1), (512, 8, 4)])
def test_a_batch_in_tokens_is_made_of_rows_that_fit_at_once(config, tokens, rows, times):
    made = config("lab", batch_tokens=tokens, max_train_tokens=1024, max_steps=-1)
    training = made.training
    assert training.per_device_train_batch_size == rows
    assert training.gradient_accumulation_steps == times
    assert training.max_steps == 1024 // tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_tokens": 40}, "expected a multiple of max_length 16"),
        ({"batch_tokens": 8}, "expected a multiple of max_length 16"),
        ({"batch_tokens": 192}, "beyond 8 rows a multiple of those"),
        ({"batch_tokens": 128, "gradient_accumulation_steps": 2}, "not both"),
        ({"max_train_tokens": 512}, "give max_train_tokens or max_steps, not both"),
    ],
)
def test_batches_that_cannot_be_made_are_refused(config, change, message):
    with pytest.raises(UserError, match=message):
        config("lab", **change)


@pytest.fixture
def planted(config):
    made = config("lab-planted", teacher_rank=2, teacher_condition=10.0)
    task = make_task(made)
    return task, task.load_model()


def loss_of(task, model):
    batch = task.collator()(task.test)
    with torch.no_grad():
        return float(model(**batch).loss)


def test_the_planted_change_has_the_rank_and_condition_asked_for(planted):
    task, base = planted
    changed = [
        (old.detach(), new)
        for (name, old), (_, new) in zip(
            base.named_parameters(), task.teacher.named_parameters(), strict=True
        )
        if not torch.equal(old, new)
    ]
    assert len(changed) == len(hidden_matrices(base))
    for old, new in changed:
        values = torch.linalg.svdvals((new - old).double())
        assert values[0] / values[1] == pytest.approx(10, rel=1e-3)
        assert values[2] < 1e-4 * values[0]
        assert (new - old).norm() / old.norm() == pytest.approx(0.5, rel=1e-3)


def test_the_loss_is_zero_at_the_teacher_only(planted):
    task, student = planted
    assert loss_of(task, student) > 1e-4
    with torch.no_grad():
        for own, goal in zip(student.parameters(), task.teacher.parameters(), strict=True):
            own.copy_(goal)
    assert loss_of(task, student) == pytest.approx(0, abs=1e-6)


def test_the_planted_loss_is_the_divergence_from_the_teacher(planted):
    task, student = planted
    batch = task.collator()(task.test)
    with torch.no_grad():
        outputs = student(**batch)
        goal = task.teacher(input_ids=batch["input_ids"]).logits[:, :-1].double().softmax(-1)
        own = outputs.logits[:, :-1].double().softmax(-1)
    expected = (goal * (goal / own).log()).sum(-1)
    assert float(outputs.loss) == pytest.approx(float(expected.mean()), rel=1e-4)
    scores = task.item_scores(outputs, batch)
    torch.testing.assert_close(scores["loss"].double(), expected.mean(-1), rtol=1e-3, atol=1e-7)
    assert scores["weight"].tolist() == [15.0] * 16


def test_a_student_of_the_teachers_rank_comes_closer(config):
    made = config("lab-planted", method="lora", learning_rate=2e-2, max_steps=40)
    task = make_task(made)
    start = loss_of(task, build_model(made, task))
    result = run(made, task)
    assert result["metrics"]["test"]["loss"] < 0.7 * start
