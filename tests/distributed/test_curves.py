"""Several processes give the single process's losses, and exchange what they should."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distributed.curves import KINDS, assert_same, ddp_and_fsdp2, fsdp2, of_one_process
from distributed.spawned import spawned

PAIRS = 7
SIZES = {"rank": 3, "hidden": 16, "wide": 10}


PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
ROW = re.compile(r"\| ([\w-]+)[^|]*\| (\d+) \| (\d+) \((\d+)\) \| ([\d,]+) \|")


def documented():
    """{kind: (all-reduces, {layout: all-to-alls}, bytes all-reduced)}, from the page."""
    found = {}
    for kind, reduces, ours, default, size in ROW.findall(PAGE.read_text(encoding="utf-8")):
        moves = {"ours": int(ours), "default": int(default)}
        found[kind.lower()] = int(reduces), moves, int(size.replace(",", ""))
    return found


@pytest.mark.parametrize(
    ("world", "layouts"), [(2, ["ours", "default"]), (4, ["ours", "default", "hybrid"])]
)
def test_ddp_and_fsdp2_give_the_single_curve_in_every_mode(world, layouts, tmp_path):
    expected = of_one_process(KINDS, **SIZES)
    for by_ddp, by_fsdp2 in spawned(ddp_and_fsdp2, world, tmp_path, list(KINDS), layouts, SIZES):
        for kind in KINDS:
            assert_same(by_ddp[kind], expected[kind])
        for (kind, layout), (losses, calls, sent) in by_fsdp2.items():
            assert_same(losses, expected[kind])
            assert sum(calls.values()) <= 24, (kind, layout, calls)
            if world == 2:
                reduces, moves, size = documented()[kind]
                assert calls["allreduce_"] == reduces
                assert calls.get("alltoall_base_", 0) == moves[layout]
                assert sent["allreduce_"] == size


@pytest.mark.parametrize("world", [2, 4])
def test_efficient_mode_exchanges_gram_matrices_only(world, tmp_path):
    """At most 8·r²·pairs floats in at most four collectives, for layers that divide evenly."""
    sizes = {"rank": 3, "hidden": 16, "wide": 12}
    for found in spawned(fsdp2, world, tmp_path, ["efficient"], ["ours"], sizes, 2):
        _, calls, sent = found["efficient", "ours"]
        assert set(calls) == {"allreduce_"}
        assert calls["allreduce_"] <= 4
        assert 0 < sent["allreduce_"] <= 8 * 3**2 * PAIRS * 4
