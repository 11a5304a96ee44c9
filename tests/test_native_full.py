"""The compiled step of full mode against a dense float64 twin, and when it is not taken."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lorapro
import lorapro.functional as F
from helpers import feed_dense_gradient, through_a_file
from lorapro.factors import LoraPair
from lorapro.optim.native.build import library
from reference.tangent import project
from test_batched import a_pair, many_pairs

XS = ("zero", "sylvester", "symmetric")
BETAS, EPS = (0.8, 0.95), 1e-2  # an epsilon that counts
# Neither multiples of a vector nor of a tile; the last two are several tiles wide in float32.
SHAPES = [(48, 64), (37, 53), (70, 41), (35, 1030), (40, 2200)]
needs_library = pytest.mark.skipif(library() is None, reason="there is no C compiler here")


@pytest.fixture
def elsewhere(monkeypatch):
    """The names of pairs that PyTorch stepped, one entry a step."""
    seen = []
    way = lorapro.LoraProAdamW._full_update

    def watched(self, part, space, group):
        known = dict(zip(map(id, group["params"][::2]), group["names"], strict=True))
        seen.extend(known[id(A)] for b in part for A in b.params_A)
        way(self, part, space, group)

    monkeypatch.setattr(lorapro.LoraProAdamW, "_full_update", watched)
    return seen


def optimizer_of(pairs, lr=1e-3, **options):
    groups = lorapro.lora_param_groups(None, pairs=pairs)
    return lorapro.LoraProAdamW(groups, lr, BETAS, EPS, mode="full", **options)


def pairs_of(r, cond=3.0, shapes=SHAPES, size=0.5):
    generator = torch.Generator().manual_seed(r)
    pairs = [
        a_pair(f"{m}/{n}", m, n, r, cond, size, generator, scaling=0.5 + i)
        for i, (m, n) in enumerate(shapes)
    ]
    for pair in pairs:
        object.__setattr__(pair, "base", nn.Parameter(torch.zeros(pair.shape)))
    return pairs


class Twin:
    """Algorithm 3 on dense matrices, in float64; the gradient's projection is that on B·A."""

    def __init__(self, pair, lr=1e-3, x="sylvester", decay=0.0):
        self.A, self.B = (p.detach().double().clone() for p in (pair.A, pair.B))
        self.s, self.lr, self.x, self.decay, self.t = pair.scaling, lr, x, decay, 0
        self.m = self.v = torch.zeros(pair.shape, dtype=torch.float64)

    def step(self, G):
        self.t += 1
        g = torch.from_numpy(project(self.A.numpy(), self.B.numpy(), G.double().numpy()))
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * g**2
        m, v = self.m / (1 - BETAS[0] ** self.t), self.v / (1 - BETAS[1] ** self.t)
        h = self.s * m / (v.sqrt() + EPS)
        d_A, d_B = F.align(self.A, self.B, self.B.T @ h, h @ self.A.T, self.s, x=self.x)
        keep = (1 - self.lr * self.decay) ** 0.5
        self.A, self.B = keep * self.A - self.lr * d_A, keep * self.B - self.lr * d_B


def apart(have, want, start):
    """Distance in units of the way travelled."""
    have, want, start = (t.detach().double() for t in (have, want, start))
    return float((have - want).norm() / (want - start).norm())


def follow(pairs, most, lr=1e-3, x="sylvester", weight_decay=0.0):
    """Six steps of pairs and twins with the same gradients; none may be ``most`` off its way.

    Conjugate gradients choose X to a hundredth. W does not depend on it to first order.
    """
    generator = torch.Generator().manual_seed(1)
    twins = [Twin(p, lr, x, weight_decay) for p in pairs]
    starts = copy.deepcopy(pairs)
    optimizer = optimizer_of(pairs, lr, x=x, weight_decay=weight_decay)
    for _ in range(6):
        step_all(optimizer, pairs, twins, generator)
    of_factors = 3e-2 if x == "sylvester" else most
    for pair, twin, start in zip(pairs, twins, starts, strict=True):
        state = optimizer.state[pair.B]
        assert int(state["step"]) == 6
        for have, want in ((state["exp_avg"], twin.m), (state["exp_avg_sq"], twin.v)):
            assert have.shape == (1, *pair.shape)
            assert float((have[0] - want).norm()) <= most * float(want.norm()), pair.name
        assert apart(pair.A, twin.A, start.A) <= of_factors, pair.name
        assert apart(pair.B, twin.B, start.B) <= of_factors, pair.name
        W, first = (p.B.detach().double() @ p.A.detach().double() for p in (pair, start))
        assert apart(W, twin.B @ twin.A, first) <= most, pair.name


def step_all(optimizer, pairs, twins, generator):
    """One step of the optimizer and of its twins along the same dense gradients."""
    for pair, twin in zip(pairs, twins, strict=True):
        G = torch.randn(pair.shape, generator=generator)
        feed_dense_gradient(pair, G)
        twin.step(G)
    optimizer.step()


@needs_library
@pytest.mark.parametrize("x", XS)
@pytest.mark.parametrize("r", [1, 3, 8, 33])
def test_steps_are_those_of_dense_adam(r, x, elsewhere):
    follow(pairs_of(r), 5e-4 if x == "sylvester" else 1e-4, x=x, weight_decay=0.1)
    assert not elsewhere


@needs_library
@pytest.mark.parametrize("x", XS)
@pytest.mark.parametrize("r", [3, 16])
def test_pairs_that_only_double_precision_can_do(r, x, elsewhere):
    follow(pairs_of(r, cond=400.0, size=2.0), 5e-3, lr=1e-4, x=x)
    assert not elsewhere


@needs_library
@pytest.mark.parametrize("x", XS)
@pytest.mark.parametrize("r", [1, 8, 33])
def test_switched_off_the_steps_are_the_same_to_rounding(r, x, elsewhere, monkeypatch):
    start = [*many_pairs(r, torch.Generator().manual_seed(0)), *pairs_of(r)]
    ends, counts = [], []
    for native in ("1", "0"):
        monkeypatch.setenv("LORAPRO_NATIVE", native)
        pairs = copy.deepcopy(start)
        optimizer = optimizer_of(pairs, x=x)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            for pair in pairs:
                feed_dense_gradient(pair, torch.randn(pair.shape, generator=generator))
            optimizer.step()
        ends.append(pairs)
        counts.append([elsewhere.count(pair.name) for pair in start])
        elsewhere.clear()
    assert counts[0][-len(SHAPES) :] == [0] * len(SHAPES)
    assert counts[1] == [5] * len(start)
    for one, two, before in zip(*ends, start, strict=True):
        assert apart(one.A, two.A, before.A) <= 2e-2, before.name
        assert apart(one.B, two.B, before.B) <= 2e-2, before.name


@needs_library
def test_after_a_start_from_zero_the_library_takes_over(elsewhere):
    generator = torch.Generator().manual_seed(0)
    pairs = [a_pair(str(i), 40, 24 + i, 4, 1.0, 0.0, generator) for i in range(3)]
    twins = [Twin(pair) for pair in pairs]
    starts = copy.deepcopy(pairs)
    optimizer = optimizer_of(pairs)
    for step in range(5):
        step_all(optimizer, pairs, twins, generator)
        assert sorted(elsewhere) == (["0", "1", "2"] if step == 0 else [])
        elsewhere.clear()
    for pair, twin, start in zip(pairs, twins, starts, strict=True):
        assert apart(pair.A, twin.A, start.A) <= 5e-3
        assert apart(pair.B, twin.B, start.B) <= 5e-3


@needs_library
@pytest.mark.parametrize("saved_by", ["0", "1"])
def test_a_run_goes_on_from_a_file_whoever_wrote_it(saved_by, monkeypatch):
    start = pairs_of(8)
    generator = torch.Generator().manual_seed(1)
    gradients = [[torch.randn(p.shape, generator=generator) for p in start] for _ in range(6)]

    def run(pairs, optimizer, steps):
        for each in steps:
            for pair, G in zip(pairs, each, strict=True):
                feed_dense_gradient(pair, G)
            optimizer.step()

    whole = copy.deepcopy(start)
    run(whole, optimizer_of(whole), gradients)
    halves = copy.deepcopy(start)
    monkeypatch.setenv("LORAPRO_NATIVE", saved_by)
    first = optimizer_of(halves)
    run(halves, first, gradients[:3])
    monkeypatch.setenv("LORAPRO_NATIVE", "1")
    second = optimizer_of(halves)
    second.load_state_dict(through_a_file(first.state_dict()))
    run(halves, second, gradients[3:])
    for one, two, before in zip(whole, halves, start, strict=True):
        if saved_by == "1":
            assert torch.equal(one.A, two.A)
            assert torch.equal(one.B, two.B)
        assert apart(two.A, one.A, before.A) <= 1e-3
        assert apart(two.B, one.B, before.B) <= 1e-3


@needs_library
def test_pairs_do_not_depend_on_their_neighbours_or_on_threads():
    pairs = pairs_of(8)
    for pair in pairs:
        feed_dense_gradient(pair, torch.randn(pair.shape))
    together = copy.deepcopy(pairs)
    for held, given in zip(together, pairs, strict=True):
        held.A.grad, held.B.grad = given.A.grad.clone(), given.B.grad.clone()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        optimizer_of(together).step()
    finally:
        torch.set_num_threads(before)
    for pair, other in zip(pairs, together, strict=True):
        optimizer_of([pair]).step()
        assert torch.equal(pair.A, other.A)
        assert torch.equal(pair.B, other.B)


def spoiled(pairs, kind, optimizer):
    """Make the first pair one that the library does not take."""
    pair = pairs[0]
    if kind == "order of A":
        pair.A.data = pair.A.data.T.contiguous().T
    elif kind == "order of a gradient":
        pair.B.grad = pair.B.grad.T.contiguous().T
    elif kind == "order of a moment":
        state = optimizer.state[pair.B]
        state["exp_avg"] = state["exp_avg"].mT.contiguous().mT
    else:
        state = optimizer.state[pair.B]
        state["exp_avg_sq"] = state["exp_avg_sq"].double()


@needs_library
@pytest.mark.parametrize(
    "kind", ["order of A", "order of a gradient", "order of a moment", "moment in float64"]
)
def test_what_the_library_cannot_take_is_stepped_all_the_same(kind, elsewhere):
    ends = []
    start = pairs_of(4)
    for broken in (False, True):
        generator = torch.Generator().manual_seed(1)
        pairs = copy.deepcopy(start)
        optimizer = optimizer_of(pairs)
        for step in range(3):
            for pair in pairs:
                feed_dense_gradient(pair, torch.randn(pair.shape, generator=generator))
            if broken and step:
                spoiled(pairs, kind, optimizer)
            optimizer.step()
        ends.append(pairs)
        assert elsewhere == [start[0].name] * (2 if broken else 0)
    for one, two, before in zip(*ends, start, strict=True):
        assert apart(one.A, two.A, before.A) <= 1e-3
        assert apart(one.B, two.B, before.B) <= 1e-3


@needs_library
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_go_the_other_way(dtype, elsewhere):
    [start] = pairs_of(4, shapes=[(24, 20)])
    pair = LoraPair(
        start.name, *(nn.Parameter(p.detach().to(dtype)) for p in (start.A, start.B)), 2.0
    )
    twin = Twin(pair, lr=1e-2)
    optimizer = optimizer_of([pair], lr=1e-2)
    for step in range(3):
        G = torch.randn(pair.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
        feed_dense_gradient(pair, G)
        optimizer.step()
        twin.step(G)
    assert elsewhere == [pair.name] * 3
    most = 1e-9 if dtype == torch.float64 else 0.2
    assert apart(pair.B, twin.B, start.B) <= most
    assert apart(pair.A, twin.A, start.A) <= most


@needs_library
def test_a_frozen_factor_stays(elsewhere):
    pairs = pairs_of(4)
    before = copy.deepcopy(pairs)
    for pair in pairs:
        feed_dense_gradient(pair, torch.randn(pair.shape))
    pairs[0].A.grad = pairs[1].B.grad = pairs[2].A.grad = pairs[2].B.grad = None
    optimizer_of(pairs).step()
    assert sorted(elsewhere) == sorted(p.name for p in pairs[:2])
    still = [torch.equal(p.A, q.A) for p, q in zip(pairs, before, strict=True)]
    assert still == [True, False, True, False, False]
    still = [torch.equal(p.B, q.B) for p, q in zip(pairs, before, strict=True)]
    assert still == [False, True, True, False, False]


@needs_library
def test_moments_of_another_shape_are_refused():
    wide, narrow = (pairs_of(4, shapes=[shape]) for shape in ((24, 40), (24, 20)))
    optimizers = [optimizer_of(pairs) for pairs in (wide, narrow)]
    for pairs, optimizer in zip((wide, narrow), optimizers, strict=True):
        feed_dense_gradient(pairs[0], torch.ones(pairs[0].shape))
        optimizer.step()
    saved = optimizers[1].state_dict()
    saved["param_groups"][0]["names"] = optimizers[0].param_groups[0]["names"]
    optimizers[0].load_state_dict(saved)
    with pytest.raises(ValueError, match=r"exp_avg .* is \(1, 24, 20\), expected 960 numbers"):
        optimizers[0].step()


@needs_library
def test_not_a_number_stays_with_its_pair():
    pairs = pairs_of(4)
    for pair in pairs:
        feed_dense_gradient(pair, torch.randn(pair.shape))
    pairs[1].A.grad[0, 0] = torch.nan
    optimizer_of(pairs).step()
    finite = [bool(torch.isfinite(p.A).all() and torch.isfinite(p.B).all()) for p in pairs]
    assert finite == [True, False, True, True, True]


@needs_library
def test_a_gradient_of_zero_leaves_the_factors():
    pairs = pairs_of(4)
    before = copy.deepcopy(pairs)
    for pair in pairs:
        feed_dense_gradient(pair, torch.zeros(pair.shape))
    optimizer_of(pairs).step()
    for pair, start in zip(pairs, before, strict=True):
        assert torch.equal(pair.A, start.A)
        assert torch.equal(pair.B, start.B)


@needs_library
def test_autograd_notices_the_step():
    [pair] = pairs_of(4, shapes=[(24, 20)])
    loss = (pair.B @ pair.A).square().sum()
    loss.backward(retain_graph=True)
    optimizer_of([pair]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
