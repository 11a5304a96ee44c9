"""Alignment before DeepSpeed's own AdamW gives the single process's losses; all else says why not.

DeepSpeed is no requirement of this package: without it these tests are skipped.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

import lorapro
from distributed.curves import assert_same, batch, model_of
from distributed.spawned import spawned
from distributed.trainer_runs import adapters_only

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

SIZES = {"rank": 3, "hidden": 16, "wide": 10}
OPTIONS = {"lr": 3e-3, "weight_decay": 0.01}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    # By name: this process does not import DeepSpeed, which changes what other tests see.
    return spawned(
        "distributed.zero_runs:everything",
        2,
        tmp_path_factory.mktemp("processes"),
        str(tmp_path_factory.mktemp("run")),
        SIZES,
    )[0]


def single(steps=20, frozen=(), optimizer_of=None, data=batch, prepare=lambda model: model):
    """LoraProAdamW in efficient mode, one process, gradients clipped."""
    torch.set_num_threads(1)
    model, losses = prepare(model_of(**SIZES)), []
    for name, p in model.named_parameters():
        if any(part in name for part in frozen):
            p.requires_grad_(False)
    if optimizer_of:
        optimizer = optimizer_of(model)
    else:
        optimizer = lorapro.create_lorapro_optimizer(model, damping=3.0, **OPTIONS)
    for step in range(steps):
        ids = data(step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("how", ["hand", "trainer"])
def test_every_stage_gives_the_single_curve(found, how):
    expected = single()
    for losses in found[how].values():
        assert_same(losses, expected)


def test_every_stage_gives_the_single_curve_on_four_processes(tmp_path):
    expected = single()
    for losses in spawned("distributed.zero_runs:every_stage", 4, tmp_path, SIZES)[0].values():
        assert_same(losses, expected)


def test_trl_gives_the_single_curve(found):
    expected = single(prepare=adapters_only)
    for losses in found["trl"].values():
        assert_same(losses, expected)


def test_a_frozen_factor_stays(found):
    expected = single(5, frozen=["lora_A"])
    for losses in found["frozen A"].values():
        assert_same(losses, expected)


def test_the_optimizer_may_be_offloaded(found):
    expected = single(5)
    for losses in found["offloaded"].values():
        assert_same(losses, expected)


def test_gradients_are_accumulated_before_they_are_aligned(found):
    expected = single(5)
    for losses in found["accumulated"].values():
        assert_same(losses, expected)


def test_the_factors_gradients_are_summed_once(found):
    factors = [p for n, p in model_of(**SIZES).named_parameters() if "lora_" in n]
    assert found["sent"] == 4 * sum(p.numel() for p in factors)


def test_half_precision_follows_float32(found):
    """ZeRO-1 in bfloat16 with float32 gradients is another class of DeepSpeed's."""

    def descent(model, aligned):
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(params, lr=3.0)
        if aligned:
            lorapro.align_gradients(optimizer, model, damping=3e-3)
        return optimizer

    def losses_of(aligned):
        return single(3, (), lambda model: descent(model, aligned), lambda step: batch(0))

    expected, plain = losses_of(True), losses_of(False)
    assert abs(plain[1] - expected[1]) > 0.1
    for losses in found["bf16"].values():
        assert_same(losses, expected, 2e-2)


@pytest.mark.parametrize(
    ("use", "words"),
    [
        ("client efficient", ["q_proj'", "DeepSpeed ZeRO", "align_gradients(engine, model)"]),
        ("client factored", ["q_proj'", "DeepSpeed ZeRO", "DDP or FSDP2"]),
        ("aligned before", ["q_proj'", "after deepspeed.initialize"]),
        ("apart", ["q_proj'", "A in its group 0, B in 1", "one parameter group"]),
        ("trainer_optimizer", ["lorapro.use_lorapro(trainer)"]),
        ("muon", ["optimizer='muon' needs whole factors", "DDP or FSDP2"]),
        ("full", ["mode='full' needs whole factors", "DDP or FSDP2"]),
    ],
)
def test_what_cannot_work_says_what_does(found, use, words):
    for word in words:
        assert word in str(found["refused"][use])
