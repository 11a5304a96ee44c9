"""Rows that are PEFT's: a run equals a plain loop with PEFT's own functions, to rounding."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)
from safetensors.torch import load_file
from torch.optim import AdamW, Muon
from transformers import AutoModelForSequenceClassification, get_scheduler, set_seed

from lorapro.experiments.config import build_config
from lorapro.experiments.methods import ADAPTERS, OPTIMIZERS, STARTS, find_method
from lorapro.experiments.model_building import build_model
from lorapro.experiments.runner import make_task, run

STEPS, LR = 5, 2e-3
COMMON = {"lora_alpha": 8, "target_modules": "all-linear", "task_type": "SEQ_CLS"}


@pytest.fixture
def still_bert(tiny_bert, tmp_path):
    """The tiny BERT without dropout, so that a loop need not draw as Trainer does."""
    folder = shutil.copytree(tiny_bert, tmp_path / "still-bert")
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def trained(classify, still_bert, monkeypatch):
    """Run a method; return its trained parameters and the batches it was trained on."""

    def train(method, **more):
        values = {**classify, "model": str(still_bert), "method": method, "alpha": 8, **more}
        values |= {"max_steps": STEPS, "eval_steps": STEPS, "learning_rate": LR}
        config = build_config(values)
        task = make_task(config)
        collate, batches, kept = task.collator(), [], {}

        def recording(examples):
            batches.append(collate(examples))
            return {name: tensor.clone() for name, tensor in batches[-1].items()}

        monkeypatch.setattr(task, "collator", lambda: recording)

        def keep(built, family):
            kept["model"] = build_model(built, family)
            batches.clear()  # what the start has seen
            return kept["model"]

        monkeypatch.setattr("lorapro.experiments.runner.build_model", keep)
        result = run(config, task)
        assert result["status"] == "finished"
        return state_of(kept["model"]), batches[:STEPS], config

    return train


def state_of(model):
    return {
        name.replace("_lorapro_", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad or "lora_A" in name
    }


def by_hand(folder, config, make_optimizer, batches, after_step=None):
    """Train with PEFT alone."""
    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    set_seed(0)
    model = get_peft_model(model, config)
    optimizer = make_optimizer(model)
    schedule = get_scheduler("linear", optimizer, 0, STEPS)
    model.train()
    for number, batch in enumerate(batches):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        if after_step is not None:
            after_step(model, number)
        schedule.step()
        optimizer.zero_grad()
    return state_of(model)


def adamw(model):
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    moved = 0.0
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=name)
        moved += float(value.norm())
    assert moved > 0


CASES = {
    "lora": (LoraConfig(r=2, **COMMON), adamw),
    "rslora": (LoraConfig(r=2, use_rslora=True, **COMMON), adamw),
    "dora": (LoraConfig(r=2, use_dora=True, **COMMON), adamw),
    "pissa": (LoraConfig(r=2, init_lora_weights="pissa_niter_4", **COMMON), adamw),
    "lora+": (
        LoraConfig(r=2, **COMMON),
        lambda model: create_loraplus_optimizer(model, AdamW, lr=LR, loraplus_lr_ratio=16.0),
    ),
    "lora-fa": (
        LoraConfig(r=2, **COMMON),
        lambda model: create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=LR),
    ),
    "riemannian": (
        LoraConfig(r=2, **COMMON),
        lambda model: create_riemannian_optimizer(model, AdamW, lr=LR, reg=1e-2, weight_decay=0.0),
    ),
}


@pytest.mark.parametrize("method", CASES)
def test_a_row_is_peft_itself(trained, still_bert, method):
    ours, batches, _ = trained(method)
    config, optimizer = CASES[method]
    assert_same(ours, by_hand(still_bert, config, optimizer, batches))


@pytest.mark.parametrize("allocate", [True, False])
def test_adalora_with_ranks_allocated_and_as_the_papers_code_ran_it(trained, still_bert, allocate):
    more = {"adalora_init_rank": 4, "adalora_allocate": allocate}
    ours, batches, _ = trained("adalora", **more)
    config = AdaLoraConfig(
        target_r=2,
        init_r=4,
        tinit=0,
        tfinal=0,
        deltaT=1,
        beta1=0.85,
        beta2=0.85,
        orth_reg_weight=0.5,
        total_step=STEPS,
        **COMMON,
    )

    def step(model, number):
        if allocate:
            model.base_model.update_and_allocate(number)

    theirs = by_hand(still_bert, config, adamw, batches, step)
    assert_same(ours, theirs)
    values = torch.cat([v.flatten() for name, v in ours.items() if "lora_E" in name])
    assert bool((values == 0).any()) == allocate  # masked, or rank 4 throughout


def test_lora_muon_is_muon_on_a_and_on_b(trained, still_bert):
    ours, batches, _ = trained("lora-muon")

    class Both:
        def __init__(self, model):
            named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
            options = {"lr": LR, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
            self.each = (
                Muon([p for n, p in named if "lora_" in n], **options),
                AdamW([p for n, p in named if "lora_" not in n], lr=LR, weight_decay=0.0),
            )

    set_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(still_bert, num_labels=3)
    set_seed(0)
    model = get_peft_model(model, LoraConfig(r=2, **COMMON))
    each = Both(model).each
    schedules = [get_scheduler("linear", optimizer, 0, STEPS) for optimizer in each]
    for batch in batches:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for optimizer, schedule in zip(each, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert_same(ours, state_of(model))


def test_a_pissa_adapter_is_saved_for_the_original_base(trained, still_bert):
    _, _, config = trained("pissa")
    saved = load_file(config.folder / "adapter" / "adapter_model.safetensors")
    ranks = {tensor.shape[0] for name, tensor in saved.items() if "lora_A" in name}
    assert ranks == {4}  # twice the rank: what was learnt minus what it began with


def test_names_of_combinations_are_read_from_the_catalogues():
    method = find_method("lora-ga+dora+lora+")
    assert method.adapter is ADAPTERS["dora"]
    assert method.start is STARTS["lora-ga"]
    assert method.optimizer is OPTIMIZERS["lora+"]
    assert find_method("lora+lora-pro").adapter is ADAPTERS["lora"]
    assert find_method("dora+lora-pro").optimizer is OPTIMIZERS["lora-pro"]
