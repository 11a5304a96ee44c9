"""Every YAML under recipes/ and results/ is valid and starts with the command that runs it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from lorapro.experiments.config import load_config
from lorapro.experiments.plan import load_comparison

ROOT = Path(__file__).parents[2]
FOLDERS = ROOT / "recipes", ROOT / "results"
RECIPES = sorted(p.relative_to(ROOT).as_posix() for f in FOLDERS for p in f.rglob("*.y*ml"))


def test_there_are_recipes():
    assert "recipes/lab/demo.yaml" in RECIPES
    assert "recipes/local/gsm8k_smollm2.yaml" in RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    first = Path(name).read_text(encoding="utf-8").splitlines()[0]
    marker, program, command, path, *flags = shlex.split(first, comments=False)
    assert (marker, program, path) == ("#", "lorapro", name)
    load = {"train": load_config, "compare": load_comparison}[command]
    load(path, [*flags, "--use_cpu", "true"])  # bf16 is refused where there is no GPU
