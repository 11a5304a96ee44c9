"""Every Python block of the pages runs, and every command of theirs is one.

Blocks of a page run in order, in one namespace, as a reader would paste them, on tiny models. Names
that a page uses and never sets (``model``, ``batches``, …: :data:`GIVEN`) are made here, and any
name of a model or data set on the hub gives a tiny one. In the page, right above a block:

    <!-- not run: it needs two GPUs -->      the block does not run
    <!-- fresh -->                           the block begins a new namespace
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import json
import re
from pathlib import Path

import pytest
import torch

from experiments.tiny_models import tiny_llama
from lorapro.cli.main import COMMANDS, main
from pages import PAGES, ROOT, SHELLS, blocks, commands

__all__ = ["tiny_llama"]

PYTHON = [p for p in PAGES if any(b.runs for b in blocks(p, "python", "py", "pycon"))]
SHELL = [p for p in PAGES if any(b.runs for b in blocks(p, *SHELLS))]


def name(path):
    return path.relative_to(ROOT).as_posix()


def imported(module, attribute=None):
    def make(_):
        found = __import__(module, fromlist=["x"])
        return found if attribute is None else getattr(found, attribute)

    return make


def base(_):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained("a model on the hub")


def config(_):
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_rslora=True)


def peft_model(_):
    from peft import get_peft_model

    return get_peft_model(base(_), config(_))


def batches(_):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (2, 2, 16), generator=generator)
    return [{"input_ids": x, "labels": x} for x in ids]


def arguments(_):
    from transformers import TrainingArguments

    return TrainingArguments("out", report_to=[])


def dataset(_):
    from datasets import Dataset

    rows = [{"input_ids": [65 + i, 66, 67, 68], "labels": [65 + i, 66, 67, 68]} for i in range(8)]
    return Dataset.from_list(rows)


def chats():
    ask = {"role": "user", "content": "one and one?"}
    return [{"messages": [ask, {"role": "assistant", "content": f"two, {i}"}]} for i in range(8)]


def conversations(*_, **__):
    from datasets import Dataset

    return Dataset.from_list(chats())


def trainer(space):
    from transformers import Trainer

    model = space.get("model") or space.get("peft_model") or peft_model(space)
    return Trainer(model, args=arguments(space), train_dataset=dataset(space))


def checkpoint(space):
    """Of a run of ``Trainer`` from LoRA-GA's start."""
    from transformers import Trainer

    import lorapro

    model = peft_model(space)
    lorapro.lora_ga.initialize(model, batches(space))
    Trainer(model, args=arguments(space), train_dataset=dataset(space)).train()
    return "out/checkpoint-2"


# What prose may speak of and a block may use without having made it.
GIVEN = {
    "lorapro": imported("lorapro"),
    "torch": imported("torch"),
    "Trainer": imported("transformers", "Trainer"),
    "TrainingArguments": imported("transformers", "TrainingArguments"),
    "LoraConfig": imported("peft", "LoraConfig"),
    "PeftModel": imported("peft", "PeftModel"),
    "get_peft_model": imported("peft", "get_peft_model"),
    "base": base,
    "config": config,
    "model": peft_model,
    "peft_model": peft_model,
    "batches": batches,
    "batch": lambda _: batches(_)[0],
    "args": arguments,
    "data": dataset,
    "dataset": dataset,
    "train_dataset": dataset,
    "conversations": conversations,
    "trainer": trainer,
    "checkpoint": checkpoint,
    "optimizer": lambda space: torch.optim.AdamW(
        [p for p in space["model"].parameters() if p.requires_grad], lr=1e-3
    ),
    "lr": lambda _: 1e-3,
}


def missing(code, space):
    """Names that code reads and neither it nor the namespace has."""
    nodes = list(ast.walk(ast.parse(code)))
    read = {n.id for n in nodes if isinstance(n, ast.Name)}
    own = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            own |= {a.arg for a in [*node.args.args, *node.args.kwonlyargs]}
        if isinstance(node, ast.Import | ast.ImportFrom):
            own |= {(a.asname or a.name).partition(".")[0] for a in node.names}
    return read - own - set(space) - set(dir(builtins))


def run(block, space):
    """Run a block; an error names the page and line."""
    code = block.code
    if block.language == "pycon":
        code = "\n".join(x[4:] for x in code.splitlines() if x[:3] in (">>>", "..."))
    needed = missing(code, space)
    unknown = needed - set(GIVEN)
    assert not unknown, f"{block}: neither the page nor GIVEN makes {sorted(unknown)}"
    for wanted in GIVEN:  # in this order: an optimizer is of the model
        if wanted in needed or (wanted == "model" and "optimizer" in needed - set(space)):
            space.setdefault(wanted, GIVEN[wanted](space))
    exec(compile("\n" * (block.line - 1) + code, block.page, "exec"), space)


@pytest.fixture
def small_world(tiny_llama, tmp_path, monkeypatch):
    """A folder with data files, where every model and data set of the hub is tiny."""
    import datasets
    import transformers

    from lorapro.experiments import assets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(r) + "\n" for r in chats()))
    for cls in vars(transformers).get("__all__", dir(transformers)):
        if cls in ("AutoModel", "AutoTokenizer", "AutoConfig") or cls.startswith("AutoModelFor"):
            auto = getattr(transformers, cls)

            def tiny(path, *more, load=auto.from_pretrained, **options):
                if not Path(path).exists():
                    path = tiny_llama
                return load(path, *more, **options)

            monkeypatch.setattr(auto, "from_pretrained", tiny)
    load = datasets.load_dataset

    def rows(path, *more, **options):
        there = path in ("json", "csv", "parquet", "text") or Path(path).exists()
        return load(path, *more, **options) if there else conversations()

    monkeypatch.setattr(datasets, "load_dataset", rows)
    monkeypatch.setattr(assets, "asset_path", lambda *_: str(tiny_llama))
    after = transformers.TrainingArguments.__post_init__

    def short(self):
        self.max_steps, self.disable_tqdm, self.use_cpu = 2, True, True
        after(self)

    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", short)
    return tmp_path


@pytest.mark.parametrize("page", PYTHON, ids=name)
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_python_of_a_page_runs(page, small_world):
    space = {"__name__": "__main__"}
    for block in blocks(page, "python", "py", "pycon"):
        if block.mark == "fresh":
            space = {"__name__": "__main__"}
        if block.runs:
            run(block, space)


def test_every_block_that_does_not_run_says_why():
    found = [b for p in PAGES for b in blocks(p, "python", "py", "pycon", *SHELLS)]
    left_out = [b for b in found if not b.runs]
    assert found
    for block in left_out:
        assert len(block.reason) > 10, f"{block}: {block.mark!r} gives no reason"
    print(f"{len(left_out)} of {len(found)} blocks do not run")
    assert len(left_out) <= len(found) / 5
    marks = re.compile(r"^[ \t]*<!--[ \t]*(?:not run|fresh)\b", re.MULTILINE)
    for page in PAGES:  # a mark that no block follows is a mistake
        marked = [b for b in blocks(page, *LANGUAGES) if b.mark]
        assert len(marks.findall(page.read_text(encoding="utf-8"))) == len(marked), name(page)


LANGUAGES = ("python", "py", "pycon", "yaml", "toml", "text", "json", "", *SHELLS)


class ParsedError(Exception):
    """A command came as far as its work: its arguments are good."""


WORK = (
    "lorapro.experiments.runner.run",
    "lorapro.experiments.sweep.compare",
    "lorapro.experiments.lr_find.find_rate",
    "lorapro.experiments.results.read_results",
    "lorapro.experiments.restore.predict_target",
    "lorapro.experiments.restore.evaluate_target",
    "lorapro.experiments.restore.describe_target",
    "lorapro.experiments.restore.load_any",
    "lorapro.cli.fetch.fetch",
)


@pytest.fixture
def idle(monkeypatch, tmp_path):
    """The command line, with work that is not done, beside links to the repository's folders."""
    import importlib

    from lorapro.experiments.keys import parse_values

    def parsed(*given, **_):
        for flags in given[1:2]:  # those that belong to the config
            parse_values({}, flags if isinstance(flags, list) else [])
        raise ParsedError

    for place in WORK:
        module, _, attribute = place.rpartition(".")
        monkeypatch.setattr(importlib.import_module(module), attribute, parsed)
    for folder in ("recipes", "results", "benchmarks", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_lorapro(block, arguments, configs, capsys):
    """Parse a ``lorapro`` command; a config that is not there is the YAML block before it."""
    for given in arguments[1:]:
        path = Path(given)
        if path.suffix in (".yaml", ".yml") and not path.exists() and configs:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(configs[-1].code, encoding="utf-8")
    if arguments[0] == "export":  # looks at its target first
        Path(arguments[1]).mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(ParsedError):
        status = main(arguments)
        assert status == 0, f"{block}: lorapro {' '.join(arguments)}: {capsys.readouterr().err}"


def check_script(block, words):
    scripts = [w for w in words if w.endswith(".py")]
    for script in scripts[:1]:
        assert (ROOT / script).is_file(), f"{block}: no {script}"
        folder = (ROOT / script).parent
        source = "".join(f.read_text(encoding="utf-8") for f in folder.glob("*.py"))
        for flag in (w.partition("=")[0] for w in words[words.index(script) :] if w[:2] == "--"):
            assert flag in source, f"{block}: {script} has no {flag}"


@pytest.mark.parametrize("page", SHELL, ids=name)
def test_the_commands_of_a_page_are_commands(page, idle, capsys):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = blocks(page, "yaml", *SHELLS)
    for i, block in enumerate(found):
        if block.language == "yaml" or not block.runs:
            continue
        configs = [b for b in found[:i] if b.language == "yaml"]
        for words in commands(block):
            while "=" in words[0]:  # VARIABLE=value command
                words.pop(0)
            if words[0] == "lorapro":
                check_lorapro(block, words[1:], configs, capsys)
            elif words[0] == "make":
                for target in words[1:]:
                    there = "=" in target or re.search(rf"^{target}:", makefile, re.MULTILINE)
                    assert there, f"{block}: no make target {target}"
            elif words[0] in ("python", "accelerate", "torchrun"):
                check_script(block, words)
            extras = re.findall(r"(?:lorapro|\.)\[([\w,]+)\]", " ".join(words))
            for extra in ",".join(extras).split(",") if extras else ():
                assert f"\n{extra} = [" in project, f"{block}: no extra {extra}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_commands_in_the_prose_exist(page):
    text = page.read_text(encoding="utf-8")
    for command in re.findall(r"`lorapro ([a-z-]+)", text):
        assert command in COMMANDS, f"{name(page)}: lorapro {command}"
