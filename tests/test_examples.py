"""Every example runs, at tiny size, and leaves what it promises."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from experiments.tiny_models import tiny_bert, tiny_llama

__all__ = ["tiny_bert", "tiny_llama"]

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(p.name for p in EXAMPLES.glob("*.py"))


def run(name, model, folder, steps=2):
    spec = importlib.util.spec_from_file_location(Path(name).stem + "_example", EXAMPLES / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--model", str(model), "--steps", str(steps), "--output", str(folder)])


@pytest.fixture(autouse=True)
def one_small_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def test_the_examples_are_the_ones_listed():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")]:
        assert f"`{path.name}`" in text, path.name
    for script in SCRIPTS:
        usage = (EXAMPLES / script).read_text(encoding="utf-8").split('"""')[1]
        assert f"examples/{script}" in usage


@pytest.mark.parametrize("name", [s for s in SCRIPTS if s != "trainer.py"])
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_example(name, tiny_llama, tmp_path, capsys):
    run(name, tiny_llama, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        model = PeftModel.from_pretrained(base, tmp_path / "out").eval()
        after = model(input_ids=ids).logits
    assert not torch.equal(before, after)
    if name == "own_loop.py":
        assert "distance to the full gradient" in capsys.readouterr().out
        assert (tmp_path / "out" / "diagnostics.jsonl").is_file()
    if name == "qlora_lora_ga.py":
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["r"] == 16  # 2r: for the original base


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_trainer_example(tiny_bert, tmp_path, capsys):
    run("trainer.py", tiny_bert, tmp_path / "out", steps=10)
    assert "of 32 new sentences" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / "diagnostics.jsonl").is_file()


def test_the_notebook_runs(tiny_llama, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    monkeypatch.setenv("STORY_MODEL", str(tiny_llama))
    monkeypatch.setenv("STORY_STEPS", "3")
    notebook = nbformat.read(EXAMPLES / "story.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", ())]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 3
    assert "the same as in this process: True" in str(outputs)
    assert (EXAMPLES / "story.ipynb").stat().st_size < 400_000
