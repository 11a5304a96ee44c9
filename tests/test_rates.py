"""One table of defaults: the library, ``Trainer``, the command line and the docs agree on it."""

from __future__ import annotations

import re

import pytest
from transformers import TrainingArguments

import lorapro
from lorapro.experiments.config import from_values, load_config
from lorapro.experiments.folders import claim
from lorapro.rates import DAMPING, RATES
from pages import PAGES, ROOT
from small_models import lora

CALLS = {
    "efficient": ("adamw", {}, "lora-pro"),
    "full": ("adamw", {"mode": "full"}, "lora-pro-full"),
    "factored": ("adamw", {"mode": "factored"}, "lora-pro-factored"),
    "muon": ("muon", {}, "lora-pro-muon"),
    "sgd": ("sgd", {}, "lora-pro-sgd"),
}


def test_every_row_has_a_call():
    assert list(CALLS) == list(RATES)
    assert set(DAMPING) == set(RATES)


def built(value, model):
    factory, kwargs = value
    return factory()(model, **kwargs)


@pytest.mark.parametrize("row", CALLS)
def test_every_way_in_begins_alike(row, caplog):
    name, options, method = CALLS[row]
    cls = type(lorapro.create_lorapro_optimizer(lora(), name, lr=1.0))
    args = TrainingArguments("out", report_to=[])
    config = from_values({"method": method, "output_dir": "out"})
    ways = {
        "class": cls(lorapro.lora_param_groups(lora()), **options),
        "create": lorapro.create_lorapro_optimizer(lora(), name, **options),
        "Trainer": built(lorapro.trainer_optimizer(args, name, **options), lora()),
        "train": built(config.method.optimizer.make(config.training, config.optimizer), lora()),
    }
    for way, optimizer in ways.items():
        group = optimizer.param_groups[0]
        assert type(optimizer) is cls
        assert (group["lr"], group["damping"]) == (RATES[row], DAMPING[row]), way
        assert group.get("mode", "efficient") == options.get("mode", "efficient"), way
    # Where it was not in a config, it is said.
    assert caplog.text.count(f"lr = {RATES[row]:g}, where {row} begins") == 3


def test_lora_pro_is_the_papers():
    config = from_values({"method": "lora-pro", "output_dir": "out"})
    assert config.training.learning_rate == RATES["efficient"]
    assert DAMPING["efficient"] == DAMPING["full"] == DAMPING["sgd"] == 0
    assert type(lorapro.create_lorapro_optimizer(lora())) is lorapro.LoraProAdamW


def test_a_run_that_names_no_method_is_muons_and_its_config_says_so(tmp_path):
    config = from_values({"output_dir": str(tmp_path)})
    assert config.method.name == "lora-pro-muon"
    assert config.training.learning_rate == RATES["muon"]
    claim(config)
    again = load_config(tmp_path / "config.yaml")
    assert again.given["method"] == "lora-pro-muon"
    assert again.identity() == config.identity()


def number(cell):
    return float(re.search(r"[\d.]+(?:e-?\d+)?", cell)[0])


def tables(text):
    """Tables of Markdown as lists of rows of cells."""
    for found in re.finditer(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [
            [cell.strip(" `") for cell in line.strip().strip("|").split("|")]
            for line in found[0].splitlines()
        ]
        yield [row for row in rows if not set("".join(row)) <= set("-: ")]


def test_the_docs_print_the_table():
    seen = set()
    for page in PAGES:
        if page.is_relative_to(ROOT / "results"):
            continue
        for header, *rows in tables(page.read_text(encoding="utf-8")):
            for column, known in (("lr", RATES), ("damping", DAMPING)):
                for row in rows if column in header else ():
                    if row[0] in known:
                        assert number(row[header.index(column)]) == known[row[0]], (page, row)
                        seen.add((column, row[0]))
    assert seen == {(c, row) for c in ("lr", "damping") for row in CALLS}
