"""FSDP2 through accelerate, Trainer and TRL gives the single process's losses."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

import lorapro
from distributed.curves import KINDS, assert_same, batch, model_of
from distributed.fsdp2_runs import descent, losses_of, on_four_bits
from distributed.spawned import spawned
from distributed.trainer_runs import adapters_only

SIZES = {"rank": 3, "hidden": 16, "wide": 10}
PAIR = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return spawned(
        "distributed.fsdp2_runs:everything",
        2,
        tmp_path_factory.mktemp("processes"),
        str(tmp_path_factory.mktemp("run")),
        SIZES,
    )[0]


def single(kind, prepare=lambda model: model):
    torch.set_num_threads(1)
    model = prepare(model_of(**SIZES))
    optimizer = lorapro.create_lorapro_optimizer(model, **KINDS[kind])
    return losses_of(model, optimizer, 0, 1, 20)


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_and_clipping_by_hand_give_the_single_curve(found, kind):
    expected = single(kind)
    assert_same(found["accelerate"][kind], expected)
    assert_same(found["clipped"][kind], expected)


def test_alignment_under_accelerate_before_and_after_prepare(found):
    expected = single("efficient")
    for losses in found["aligned"].values():
        assert_same(losses, expected)


def test_trainer_gives_the_single_curve(found):
    losses, kinds = found["trainer"]
    assert kinds == {"DTensor"}
    assert_same(losses, single("efficient"))


def test_trl_gives_the_single_curve(found):
    losses, kinds = found["trl"]
    assert kinds == {"DTensor"}
    assert_same(losses, single("efficient", adapters_only))


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("kind", ["efficient", "muon"])
def test_a_base_in_4_bits_gives_the_single_curve(found, kind):
    torch.set_num_threads(1)
    assert_same(found["4 bits"][kind], on_four_bits(0, 1, kind))


def test_half_precision_follows_float32(found):
    def losses_single(aligned):
        model = model_of(**SIZES)
        return losses_of(model, descent(model, aligned), 0, 1, 3, lambda step: batch(0))

    expected, plain = losses_single(True), losses_single(False)
    assert abs(plain[1] - expected[1]) > 0.1
    assert_same(found["half"], expected, 3e-2)


@pytest.mark.parametrize("use", ["optimizer before", "hook before"])
def test_what_was_built_before_sharding_is_refused(found, use):
    words = found["refused"][use]
    assert f"'{PAIR}' is no longer what the model trains" in words
    assert "fully_shard" in words


def test_fsdp1_is_refused_in_one_sentence(found):
    words = found["refused"]["fsdp1"]
    assert PAIR in words
    assert words.endswith("FSDP1 is deprecated and not supported: shard with FSDP2 (fully_shard).")
    assert ". " not in words
