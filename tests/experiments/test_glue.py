"""GLUE in words on T5: the papers' sentences, both readings of the logits, both paddings."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from lorapro.experiments.config import build_config
from lorapro.experiments.errors import UserError
from lorapro.experiments.evaluation import make_trainer
from lorapro.experiments.model_building import start_batches
from lorapro.experiments.runner import make_task, run
from lorapro.experiments.toys import toy_values

TASKS = ("mnli", "sst2", "cola", "qnli", "mrpc")

ROWS = {
    "mnli": {"premise": "P.", "hypothesis": "H.", "label": 2},
    "sst2": {"sentence": "S.", "label": 1},
    "cola": {"sentence": "S.", "label": 0},
    "qnli": {"question": "Q?", "sentence": "S.", "label": 1},
    "mrpc": {"sentence1": "A.", "sentence2": "B.", "label": 0},
}

SIMILARITY = "classify the semantic similarity of the text: "
SAID = {
    "mnli": (f"{SIMILARITY}P.\nH.\nresult: ", "contradiction"),
    "sst2": ("classify the sentiment of the text: S.\nresult: ", "positive"),
    "cola": ("classify the grammaticality of the text: S.\nresult: ", "unacceptable"),
    "qnli": (
        "classify the semantic similarity of the question and the sentence: Q?\nS.\nresult: ",
        "not_entailment",
    ),
    "mrpc": (f"{SIMILARITY}A.\nB.\nresult: ", "different"),
    "mnli-t5": ("mnli hypothesis: H. premise: P.", "contradiction"),
    "sst2-t5": ("sst2 sentence: S.", "positive"),
    "cola-t5": ("cola sentence: S.", "unacceptable"),
    "qnli-t5": ("qnli question: Q? sentence: S.", "not_entailment"),
    "mrpc-t5": ("mrpc sentence1: A. sentence2: B.", "not_equivalent"),
}


def values(name, tmp_path, **more):
    return {
        "task": f"glue-{name}",
        **toy_values(f"glue-{name}"),
        "validation_samples": 10,
        "rank": 2,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "eval_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        "output_dir": str(tmp_path / "run"),
        **more,
    }


@pytest.mark.parametrize("name", [*TASKS, *(f"{task}-t5" for task in TASKS)])
def test_rows_become_the_papers_words(name, tmp_path):
    task = make_task(build_config(values(name, tmp_path)))
    (example,) = task.encode([ROWS[name.removesuffix("-t5")]])
    decode = task.tokenizer.decode
    said = (decode(example["input_ids"]), decode(example["labels"]))
    assert said == tuple(f"{text}</s>" for text in SAID[name])


@pytest.mark.parametrize("name", ["mnli", "sst2-t5"])
def test_the_test_set_is_the_labelled_validation_split(name, tmp_path):
    task = make_task(build_config(values(name, tmp_path)))
    assert [len(part) for part in (task.train, task.validation, task.test)] == [140, 10, 12]
    whole = make_task(build_config(values(name, tmp_path, whole_train=True)))
    assert [len(part) for part in (whole.train, whole.validation, whole.test)] == [150, 10, 12]
    assert whole.validation == whole.test[:10]
    few = make_task(build_config(values(name, tmp_path, test_samples=5, train_samples=7)))
    assert [len(part) for part in (few.train, few.validation, few.test)] == [7, 10, 5]


def test_lora_ga_takes_the_first_rows_where_the_recipe_says_so(tmp_path):
    start = {"method": "lora-ga", "lora_ga_batches": 3, "lora_ga_batch_size": 1}
    found = []
    for first in (True, False):
        config = build_config(values("sst2", tmp_path, lora_ga_first_rows=first, **start))
        task = make_task(config)
        batches = [batch["input_ids"][0].tolist() for batch in start_batches(config, task)]
        found.append(batches == [example["input_ids"] for example in task.train[:3]])
    assert found == [True, False]


def test_a_folder_of_several_tasks_holds_one_each(tmp_path):
    given = values("mrpc-t5", tmp_path)
    (tmp_path / "glue").mkdir()
    (tmp_path / "glue" / "mrpc").symlink_to(given["data"])
    task = make_task(build_config({**given, "data": str(tmp_path / "glue")}))
    assert task.data_name == str(tmp_path / "glue" / "mrpc")
    assert len(task.test) == 12


@pytest.mark.parametrize("counted", [True, False])
def test_the_loss_counts_padding_of_labels_on_request(counted, tmp_path):
    words = ["unacceptable as it is", "acceptable"]
    more = {"count_label_padding": counted, "label_words": words}
    config = build_config(values("cola", tmp_path, **more))
    task = make_task(config)
    model = task.load_model().eval()
    short, *_, long = sorted(task.train, key=lambda e: len(e["labels"]))
    batch = task.collator()([short, long])
    padding = torch.tensor(
        [[i >= len(e["labels"]) for i in range(batch["labels"].shape[1])] for e in (short, long)]
    )
    assert padding.any()
    assert (batch["labels"][padding] == (0 if counted else -100)).all()
    with torch.no_grad():
        outputs = model(**batch)
    losses = cross_entropy(
        outputs.logits.flatten(0, 1),
        torch.where(padding, 0, batch["labels"]).flatten(),
        reduction="none",
    ).view(padding.shape)
    expected = losses.mean() if counted else losses[~padding].mean()
    torch.testing.assert_close(outputs.loss, expected)
    scores = task.item_scores(outputs, batch)
    weighted = (scores["loss"] * scores["weight"]).sum() / scores["weight"].sum()
    torch.testing.assert_close(weighted, expected)


@pytest.mark.parametrize("name", ["mnli", "mrpc", "qnli-t5"])
def test_both_readings_are_those_of_one_example_at_a_time(name, tmp_path):
    config = build_config(values(name, tmp_path))
    task = make_task(config)
    torch.manual_seed(3)
    model = task.load_model().eval()
    with torch.no_grad():  # a head that says the words, some of them rightly
        model.lm_head.weight.mul_(0.1)
        for word in task.args.label_words:
            for token in task.tokenizer(text_target=word)["input_ids"]:
                model.lm_head.weight[token] += 3 * torch.randn(model.config.d_model)
    trainer = make_trainer(config, task, model, create_folder=False)
    items = trainer.score(task.test)
    hard, soft = [], []
    firsts = [task.tokenizer(text_target=w)["input_ids"][0] for w in task.args.label_words]
    for row, example in zip(task.test_rows, task.test, strict=True):
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([example["input_ids"]]),
                labels=torch.tensor([example["labels"]]),
            ).logits[0]
        hard.append(logits.argmax(-1).tolist() == example["labels"])
        beaten = [logits[0, firsts[row["label"]]] >= logits[0, first] for first in firsts]
        soft.append(all(beaten))
    assert items["hard"].tolist() == [float(x) for x in hard]
    assert items["soft"].tolist() == [float(x) for x in soft]
    assert items["label"].tolist() == [row["label"] for row in task.test_rows]
    metrics = task.metrics(items)
    assert metrics["accuracy_hard"] == pytest.approx(np.mean(hard))
    assert metrics["accuracy_soft"] == pytest.approx(np.mean(soft))
    assert metrics["accuracy"] == metrics["accuracy_soft" if name == "mrpc" else "accuracy_hard"]


def test_t5_learns_the_words(tmp_path):
    for name, count in (("train", 40), ("validation", 10)):
        rows = [{"sentence": ["bad", "good"][i % 2], "label": i % 2} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    full = {"method": "full", "learning_rate": 3e-3, "max_steps": 40, "eval_steps": 40}
    given = values("sst2", tmp_path, data=str(tmp_path), whole_train=True, **full)
    del given["rank"]
    result = run(build_config(given))
    assert result["metrics"]["test"]["accuracy_hard"] == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_words": ["not bad", "not good"]}, "do not differ in their first token"),
        ({"label_words": ["bad"]}, "label 1 in split 'train' .* has no word; there are: bad"),
        ({"test_split": "test"}, "label -1 in split 'test' .* has no word"),
        ({"validation_samples": 150}, "too few to cut 150 validation_samples"),
        ({"reading": "both"}, "unknown reading 'both'"),
    ],
)
def test_what_cannot_be_is_one_clear_line(change, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        make_task(build_config(values("sst2", tmp_path, **change)))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_labelled_split_is_refused(tmp_path):
    rows = [{"sentence": f"s {i}", "label": i % 2} for i in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="has no split 'validation'; it has: train"):
        make_task(build_config(values("sst2", tmp_path, data=str(tmp_path))))
