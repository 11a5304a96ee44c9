"""Several processes give the single process's losses, and exchange what they should."""

from __future__ import annotations

import pytest
import torch

from distributed.curves import KINDS, ddp, fsdp2, of_one_process
from distributed.spawned import spawned

PAIRS = 7
SIZES = {"rank": 3, "hidden": 16, "wide": 10}


def assert_same(losses, expected):
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


def test_ddp_is_exact_in_every_mode(tmp_path):
    for found in spawned(ddp, 2, tmp_path, list(KINDS), SIZES):
        for kind, expected in of_one_process(KINDS, **SIZES).items():
            assert_same(found[kind], expected)


@pytest.mark.parametrize(
    ("world", "layouts"), [(2, ["ours", "default"]), (4, ["ours", "default", "hybrid"])]
)
def test_fsdp2_gives_the_single_curve_in_every_mode(world, layouts, tmp_path):
    expected = of_one_process(KINDS, **SIZES)
    for found in spawned(fsdp2, world, tmp_path, list(KINDS), layouts, SIZES):
        for (kind, layout), (losses, calls, _) in found.items():
            assert_same(losses, expected[kind])
            assert sum(calls.values()) <= 24, (kind, layout, calls)


@pytest.mark.parametrize("world", [2, 4])
def test_efficient_mode_exchanges_gram_matrices_only(world, tmp_path):
    """At most 8·r²·pairs floats in at most four collectives, for layers that divide evenly."""
    sizes = {"rank": 3, "hidden": 16, "wide": 12}
    for found in spawned(fsdp2, world, tmp_path, ["efficient"], ["ours"], sizes, 2):
        _, calls, sent = found["efficient", "ours"]
        assert set(calls) == {"allreduce_"}
        assert calls["allreduce_"] <= 4
        assert 0 < sent["allreduce_"] <= 8 * 3**2 * PAIRS * 4
