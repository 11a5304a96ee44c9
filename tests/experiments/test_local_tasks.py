"""Tasks on models and data out of packages: whole at toy size, answers counted word for word."""

from __future__ import annotations

import pytest
import torch

from lorapro.experiments.assets import ASSETS
from lorapro.experiments.config import build_config
from lorapro.experiments.generation import generate
from lorapro.experiments.runner import make_task, run
from lorapro.experiments.tasks.local_tasks import LOCAL_TASKS
from lorapro.experiments.toys import toy_values

NAMES = [entry.name for entry in LOCAL_TASKS]
SMALL = {
    "method": "full",
    "learning_rate": 1e-3,
    "validation_samples": 8,
    "test_samples": 12,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "save_full_model": False,
    "use_cpu": True,
    "disable_tqdm": True,
}


def test_models_and_data_are_assets_or_debians():
    for entry in LOCAL_TASKS:
        assert entry.model in ASSETS
        assert entry.data in ASSETS or entry.data.startswith("/usr/share/")


@pytest.mark.parametrize("name", NAMES)
def test_each_task_runs_at_toy_size(name, tmp_path):
    values = {**SMALL, **toy_values(name), "task": name, "output_dir": str(tmp_path / "run")}
    entry = next(e for e in LOCAL_TASKS if e.name == name)
    test = run(build_config(values))["metrics"]["test"]
    assert 0 <= test[entry.metric] <= 1


def test_an_answer_counts_where_greedy_decoding_gives_it(tmp_path):
    values = {**SMALL, **toy_values("question-formation"), "task": "question-formation"}
    values |= {"learning_rate": 3e-3, "max_steps": 60, "per_device_train_batch_size": 16}
    config = build_config({**values, "save_full_model": True, "output_dir": str(tmp_path / "run")})
    task = make_task(config)
    result = run(config, task)["metrics"]["test"]
    task.model_path = str(tmp_path / "run" / "model")
    model = task.load_model().eval()
    prompts = [task.prompt_ids(row) for row in task.test_rows]
    with torch.no_grad():
        said = generate(model, task.tokenizer, prompts, max_new_tokens=24)
    right = [text == f" {row['output']}" for text, row in zip(said, task.test_rows, strict=True)]
    assert sum(right) > 0
    assert result["answer_accuracy"] == pytest.approx(sum(right) / len(right))
