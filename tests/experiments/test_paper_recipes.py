"""Every recipe of the papers at toy size, whole; and the papers' numbers in them."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import pytest

from lorapro.cli.main import main
from lorapro.diagnostics import read_records
from lorapro.experiments.errors import UserError
from lorapro.experiments.plan import load_comparison
from lorapro.experiments.yaml_file import read_yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "paper"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
JUDGED = "table_7"  # the others' answers are kept, unrated


def flags_of(name):
    """Flags of the line that a recipe starts with."""
    first = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    marker, program, command, path, *flags = shlex.split(first)
    assert (marker, program, command, path) == (
        "#",
        "lorapro",
        "compare",
        f"recipes/paper/{name}.yaml",
    )
    return flags


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def paper(name):
    return read_yaml(FOLDER / f"{name}.yaml")["paper"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_whole_at_toy_size(name, tmp_path, monkeypatch, judge_server):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    folder = tmp_path / "out"
    flags = [*flags_of(name), "--toy", "true", "--seeds", "0", "--output_dir", str(folder)]
    if name == JUDGED:
        flags += ["--judge_url", judge_server.url]
    assert main(["compare", f"recipes/paper/{name}.yaml", *flags]) == 0

    recipe = read_yaml(FOLDER / f"{name}.yaml")
    cells = read(folder / "comparison.json")["cells"]
    assert {c["label"] for c in cells} == set(recipe["methods"])
    assert {c["task"] for c in cells} == set(recipe["tasks"])
    for cell in cells:
        (run, *_) = sorted((folder / cell["folder"]).glob("lr-*/seed-0"))
        result = read(run / "result.json")
        assert result["status"] == "finished", (cell, result.get("error"))
        test = result["metrics"]["test"]
        assert math.isfinite(test["loss"])
        if "generation_samples" in recipe["tasks"][cell["task"]]:
            assert (run / "predictions.jsonl").is_file()
        if cell["metric"] == "mt_bench" and name != JUDGED:
            assert "mt_bench" not in test
        elif not name.startswith("figure"):
            assert math.isfinite(test[cell["metric"]])
        if recipe.get("diagnostics_every"):
            records = read_records(run)
            assert {r.step for r in records} == set(range(1, result["steps"] + 1))
            assert all(r.aligned_distance <= r.gradient_norm * 1.001 for r in records)
            assert [r.rank_B for r in records if r.step == 1] == [0] * len(
                {r.name for r in records}
            )
            assert all(r.rank_B == result["rank"] for r in records if r.step == result["steps"])


def test_without_permission_humaneval_refuses_and_the_toy_leaves_it_out(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    for name in (r for r in RECIPES if "--allow-code-execution" in flags_of(r)):
        with pytest.raises(UserError, match="--allow-code-execution true"):
            load_comparison(f"recipes/paper/{name}.yaml", ["--use_cpu", "true"])
    toy = load_comparison("recipes/paper/table_7.yaml", ["--toy", "true"], folder=tmp_path)
    assert {c.task: c.values["generation_samples"] for c in toy.cells}["HumanEval"] == 0


# Averages that are not the mean of their own row, as printed: 82.01 and 83.60 would be.
MISPRINTED = {("lora", 82.08), ("dora", 83.48)}


def test_the_papers_averages_are_those_of_its_rows():
    seen = set()
    for name in RECIPES:
        for label, row in read_yaml(FOLDER / f"{name}.yaml").get("paper", {}).items():
            if "avg" not in row:
                continue
            means = [v[0] if isinstance(v, list) else v for k, v in row.items() if k != "avg"]
            right = sum(means) / len(means) == pytest.approx(row["avg"], abs=0.011)
            assert right is ((label, row["avg"]) not in MISPRINTED), (name, label)
            seen.add(name)
    assert {"table_1", "table_3", "lora_ga_table_1"} <= seen


def test_the_papers_tables_agree_where_they_repeat_each_other():
    second = paper("table_2")
    math_of = {label: row["GSM8K"] for label, row in second.items()}
    for name, labels in (("table_5", None), ("table_4", {"sylvester": "lora-pro"})):
        for label, row in paper(name).items():
            source = label if labels is None else labels.get(label)
            if source is not None:
                shown = {k: v for k, v in row.items() if k not in ("GB", "hours")}
                assert shown == second[source], (name, label)
    assert paper("table_7")["lora-pro"] == {"GB": 23.05, **second["lora-pro"]}
    for label, row in paper("table_8").items():
        assert row["lr 2e-5"] == math_of[label]
    for label, row in paper("table_9").items():
        assert row["Llama-2-7B"] == math_of[label]
    for label, row in paper("lora_ga_table_2").items():
        assert row == second[label]
    first = paper("table_1")
    assert paper("lora_ga_table_1") == {k: v for k, v in first.items() if k != "lora-pro"}
