"""Build the source archive and the wheel, install them as users would, and use them.

    python tools/check_release.py                              everything, with this Python
    python tools/check_release.py --python python3.10 --only core
    python tools/check_release.py --only wheel                 no environments: seconds

The wheel is built from the source archive. Each of ``core`` and the extras then gets an environment
of its own in a temporary folder, installed from the wheel with the versions of ``constraints.txt``,
and does in it, offline, what it is for. It needs the package ``build`` and gigabytes of disk; with
``uv`` on the path, environments are made by it, in a fraction of pip's time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"

SOURCES = ("CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "recipes/own_data.yaml")
IN_WHEEL = ("py.typed", "experiments/report/page.html.j2", "cli/main.py")

# Pairs by hand, every optimizer, with torch alone.
CORE = """
import importlib.util, lorapro, torch
from lorapro.factors import LoraPair
for name in ("peft", "transformers", "safetensors", "numpy", "yaml"):
    assert importlib.util.find_spec(name) is None, f"{name} is installed: torch is not alone"
for make in (lorapro.LoraProAdamW, lorapro.LoraProMuon, lorapro.LoraProSGD):
    A, B = torch.nn.Parameter(torch.randn(2, 6)), torch.nn.Parameter(torch.zeros(4, 2))
    optimizer = make(lorapro.lora_param_groups(None, pairs=[LoraPair("w", A, B, 2.0)]))
    ((torch.ones(5, 6) @ A.T @ B.T - 1) ** 2).mean().backward()
    optimizer.step()
    assert B.abs().sum() > 0 and B.isfinite().all(), make
"""

# PEFT's adapter under Trainer, saved and loaded.
HF = """
import lorapro, torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
base = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes))
base.save_pretrained("base")
model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
rows = [{"input_ids": [i, 2, 3, 4], "labels": [i, 2, 3, 4]} for i in range(8)]
args = TrainingArguments("out", max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
lorapro.use_lorapro(Trainer(model, args=args, train_dataset=rows), "muon").train()
lorapro.save_portable(model, "adapter")
loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "adapter")
ids = torch.tensor([[1, 2, 3]])
torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
"""

NUMPY = "ignore:Failed to initialize NumPy:UserWarning"  # torch's own, when it is alone
RECIPES = ROOT / "recipes"
COMPARE = ["lorapro", "compare", str(RECIPES / "own_data.yaml"), "--toy", "true"]
ONE = ["--methods", "lora", "lora-pro", "--seeds", "0", "--output_dir", "out"]
TASK = {
    "task": "sums",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "tasks/rows.jsonl"}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match"}],
}
EVAL = ["lorapro", "compare", str(RECIPES / "paper/table_2.yaml"), "--toy", "true", *ONE]
EVAL += ["--tasks", "GSM8K", "--harness_tasks", "sums", "--harness_folder", "tasks"]
DEMO = ["lorapro", "compare", str(RECIPES / "lab/demo.yaml"), "--toy", "true", *ONE]

ABOUT = """
import importlib.metadata as m, platform
torch, count = m.version("torch"), len(list(m.distributions()))
print(f"Python {platform.python_version()}, torch {torch}, {count} packages")
"""

# What each environment does: commands, each a list of words; "python" is the environment's, WORK
# a folder of its own.
CHECKS: dict[str, list[list[str]]] = {
    "core": [["python", "-W", "error", "-W", NUMPY, "-c", CORE], ["lorapro", "--version"]],
    "hf": [["python", "-c", HF], ["lorapro", "--help"]],
    "experiments": [[*COMPARE, *ONE], ["lorapro", "report", "out", "--output", "page.html"]],
    "eval": [EVAL],
    "ray": [[*COMPARE, *ONE, "--backend", "ray", "--processes", "1"]],
    "demo": [DEMO],
    "docs": [["python", "-m", "mkdocs", "build", "-qs", "-d", "WORK"]],
}


def run(command: list[str], **options: object) -> str:
    """Run a command; its output is shown when it fails.

    Raises:
        SystemExit: it failed.
    """
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\nfailed ({done.returncode}): {' '.join(command)[:300]}")
    return done.stdout


def build() -> Path:
    """Build both artefacts into ``dist/``, the wheel from the source archive, and look inside.

    Returns:
        The wheel.

    Raises:
        SystemExit: one lacks a file, or versions differ.
    """
    for old in DIST.glob("lorapro-*"):
        old.unlink()
    run([sys.executable, "-m", "build", "--outdir", str(DIST), str(ROOT)])
    (wheel,) = DIST.glob("*.whl")
    (archive,) = DIST.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        sources = {name.partition("/")[2] for name in tar.getnames()}
    names = set(zipfile.ZipFile(wheel).namelist())
    missing = [name for name in SOURCES if name not in sources]
    missing += [name for name in IN_WHEEL if f"lorapro/{name}" not in names]
    packages = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src/lorapro").rglob("*.py")}
    if missing := [*missing, *sorted(packages - names)]:
        raise SystemExit(f"missing in {wheel.name} or {archive.name}: {', '.join(missing)}")
    strangers = {name.partition("/")[0] for name in names} - {"lorapro"}
    if any(not name.endswith(".dist-info") for name in strangers):
        raise SystemExit(f"{wheel.name} installs more than lorapro: {sorted(strangers)}")
    found = versions() | {wheel.name: wheel.name.split("-")[1]}
    if len(set(found.values())) > 1:
        raise SystemExit(f"versions differ: {found}")
    return wheel


def versions() -> dict[str, str]:
    """The version as each file has it that states one."""
    patterns = {
        "pyproject.toml": r'^version = "(.+)"',
        "src/lorapro/__init__.py": r'^__version__ = "(.+)"',
        "CITATION.cff": r"^version: (.+)",
        "CHANGELOG.md": r"^## (\S+)",  # the newest
    }
    found = {}
    for name, pattern in patterns.items():
        match = re.search(pattern, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        found[name] = match[1] if match else "none"
    return found


def environment(folder: Path, python: str, wanted: str) -> Path:
    """Make an environment with one requirement in it; return the folder of its commands."""
    bin = folder / ("Scripts" if os.name == "nt" else "bin")
    install = ["install", "-q", "-c", str(ROOT / "constraints.txt"), wanted]
    if uv := shutil.which("uv"):
        run([uv, "venv", "-q", "--python", python, str(folder)])
        run([uv, "pip", *install, "--python", str(bin / "python")])
    else:
        run([python, "-m", "venv", str(folder)])
        run([str(bin / "python"), "-m", "pip", *install])
    return bin


def check(name: str, wheel: Path, python: str) -> str:
    """Install the wheel, with one extra, in an environment of its own and use it.

    Args:
        name: ``"core"`` or an extra.
        wheel: what is installed.
        python: the interpreter of the environment.

    Returns:
        What was installed, in a line.

    Raises:
        SystemExit: it does not install or does not work.
    """
    wanted = str(wheel) if name == "core" else f"{wheel}[{name}]"
    with tempfile.TemporaryDirectory(prefix="lorapro-release-") as there:
        folder = Path(there)
        bin = environment(folder / "env", python, wanted)
        work = folder / "work"
        (work / "tasks").mkdir(parents=True)
        rows = ({"question": f"{n} and 1?", "answer": f"{n + 1}"} for n in range(4))
        (work / "tasks/rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (work / "tasks/sums.yaml").write_text(json.dumps(TASK))  # YAML too
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        env |= {"NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
        env |= {"RAY_raylet_start_wait_time_s": "300"}  # of a busy machine
        if name == "docs":  # its pages are the repository's, and so are the sources they show
            env["PYTHONDONTWRITEBYTECODE"] = "1"
        for command in CHECKS[name]:
            words = [str(work) if word == "WORK" else word for word in command[1:]]
            run([str(bin / command[0]), *words], cwd=ROOT if name == "docs" else work, env=env)
        about = run([str(bin / "python"), "-c", ABOUT])
    return f"{name}: {about.strip()}"


def main() -> None:
    """Build, then check what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments")
    parser.add_argument("--only", nargs="+", choices=("wheel", *CHECKS), default=list(CHECKS))
    asked = parser.parse_args()
    wheel = build()
    print(f"wheel and source archive: {wheel.name}", flush=True)
    for name in asked.only:
        if name != "wheel":
            print(check(name, wheel, asked.python), flush=True)


if __name__ == "__main__":
    main()
