"""Base weights split by tensor parallelism decay as whole ones; split factors are refused."""

from __future__ import annotations

import torch

from distributed.spawned import spawned
from distributed.tensor_parallel_runs import decayed, everything
from small_models import llama

SIZES = {"rank": 3, "hidden": 16, "wide": 12}


def test_split_bases_train_and_decay_as_whole_ones(tmp_path):
    torch.set_num_threads(1)
    expected = decayed(0, 1, ["full", "efficient"], SIZES)
    first = decayed(0, 1, ["full"], SIZES, steps=0)["full"][1]
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    llama(hidden_size=16, vocab_size=12, **heads).save_pretrained(tmp_path / "model")
    for found, heard in spawned(everything, 2, tmp_path, SIZES, str(tmp_path / "model")):
        for kind, (losses, bases, split) in found.items():
            assert split
            torch.testing.assert_close(losses, expected[kind][0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(bases, expected[kind][1], rtol=1e-5, atol=1e-6)
        name, weight = next(iter(found["full"][1].items()))
        torch.testing.assert_close(weight, first[name] * (1 - 1e-2 * 0.1) ** 20)
        for said in heard.values():
            assert "q_proj': B is sharded and A is not" in said
            assert "tp_plan" in said
            assert "shard_placement" in said
