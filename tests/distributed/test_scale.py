"""The formulas of benchmarks/scale.py beside what small cases count."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distributed.curves import KINDS, fsdp2
from distributed.spawned import spawned
from helpers import optimizer_on
from lorapro.factors import LoraPair

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZES = {"rank": 4, "hidden": 16, "wide": 12}
ALL_N = 6 * 16 + 12  # columns of the seven layers of such a model
CLOSE = {"rel": 0.2}  # a formula says how large, not every last term


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scale")


class Products(TorchDispatchMode):
    """Counts the operations of matrix products, two a term."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            left = args[1] if "add" in name else args[0]
            self.operations += 2 * out.numel() * left.shape[-1]
        return out


def counted(kind, m, n, r, pairs=2):
    """Operations and bytes of state of one pair."""
    torch.manual_seed(0)
    held = [
        LoraPair(f"{i}", nn.Parameter(torch.randn(r, n)), nn.Parameter(torch.randn(m, r)), 2.0)
        for i in range(pairs)
    ]
    optimizer = optimizer_on(held, **{**KINDS[kind], "weight_decay": 0.0})
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
    with Products() as products:
        optimizer.step()
    state = [t for entries in optimizer.state.values() for t in entries.values()]
    return products.operations / pairs, sum(t.nbytes for t in state) / pairs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(192, 64, 8), (64, 192, 4), (128, 128, 16)])
def test_operations_and_state_of_one_process(kind, shape, scale):
    operations, state = counted(kind, *shape)
    assert operations == pytest.approx(scale.MODES[kind].operations(*shape), **CLOSE)
    assert state == pytest.approx(scale.MODES[kind].state(*shape), abs=64)


def test_bytes_on_the_wire_of_two_processes(scale, tmp_path):
    for found in spawned(fsdp2, 2, tmp_path, list(KINDS), ["ours"], SIZES, 2):
        for kind, mode in scale.MODES.items():
            _, _, sent = found[kind, "ours"]
            reduced = 7 * mode.reduced_bytes(SIZES["rank"])
            assert sent["allreduce_"] == pytest.approx(reduced, **CLOSE)
            assert sent.get("alltoall_base_", 0) == mode.moved_bytes(ALL_N, SIZES["rank"])


def test_the_table_has_every_model_and_mode(scale, tmp_path, capsys):
    scale.main(["--output", str(tmp_path)])
    text = (tmp_path / "scale.md").read_text(encoding="utf-8")
    assert text == capsys.readouterr().out
    for name, model in scale.MODELS.items():
        assert f"## {name}" in text
        assert model.weights > 6e9
    assert text.count("| efficient, FSDP2 |") == len(scale.MODELS) * len(scale.PROCESSES)
