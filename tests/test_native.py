"""The compiled steps against exact alignment and torch's AdamW, and when they are not used."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import lorapro
import lorapro.functional as F
from helpers import feed_dense_gradient
from lorapro.factors import LoraPair
from lorapro.optim.native.build import library
from test_batched import a_pair, many_pairs

XS = ("zero", "sylvester", "symmetric")
needs_library = pytest.mark.skipif(library() is None, reason="there is no C compiler here")


def optimizer_of(pairs, **options):
    return lorapro.LoraProAdamW(lorapro.lora_param_groups(None, pairs=pairs), **options)


def step_by_hand(pairs, moments, t, lr, x, steady, decay, betas=(0.9, 0.999), eps=1e-8):
    """AdamW on exactly aligned gradients, in float64."""
    for pair, held in zip(pairs, moments, strict=True):
        A, B = pair.A.detach().double(), pair.B.detach().double()
        d_A, d_B = F.align(A, B, pair.A.grad.double(), pair.B.grad.double(), pair.scaling, x=x)
        if steady:
            d_A = d_A * pair.scaling * B.norm() / B.shape[1] ** 0.5
        for p, d, (m, v) in ((pair.A, d_A, held[0]), (pair.B, d_B, held[1])):
            m.lerp_(d, 1 - betas[0])
            v.lerp_(d * d, 1 - betas[1])
            step = m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
            p.data.copy_((1 - lr * decay) * p.double() - lr * step)


@needs_library
@pytest.mark.parametrize("steady", [False, True])
@pytest.mark.parametrize("x", XS)
@pytest.mark.parametrize(
    ("r", "shapes"),
    [(1, [(5, 3)]), (3, [(17, 40), (40, 17)]), (8, [(64, 48), (31, 100)]), (24, [(48, 70)])],
)
def test_steps_are_adamw_on_exactly_aligned_gradients(r, shapes, x, steady):
    generator = torch.Generator().manual_seed(r)
    pairs = [
        a_pair(str(i), m, n, r, cond, 0.3, generator, scaling=0.5 + i)
        for i, (m, n) in enumerate(shapes)
        for cond in (2.0, 40.0)
    ]
    twins = copy.deepcopy(pairs)
    moments = [
        [[torch.zeros(p.shape, dtype=torch.float64) for _ in range(2)] for p in (q.A, q.B)]
        for q in twins
    ]
    optimizer = optimizer_of(pairs, lr=1e-3, x=x, steady=steady, weight_decay=0.1)
    start = [(p.A.detach().clone(), p.B.detach().clone()) for p in pairs]
    for t in range(1, 6):
        for pair, twin in zip(pairs, twins, strict=True):
            G = torch.randn(pair.shape, generator=generator)
            feed_dense_gradient(pair, G)
            feed_dense_gradient(twin, G)
        optimizer.step()
        step_by_hand(twins, moments, t, 1e-3, x, steady, 0.1)
    assert all(int(optimizer.state[p.B]["step"]) == 5 for p in pairs)
    for pair, twin, before in zip(pairs, twins, start, strict=True):
        for have, want, first in zip((pair.A, pair.B), (twin.A, twin.B), before, strict=True):
            have, want = have.detach(), want.detach()
            moved = (want - first).norm()
            assert float((have - want).norm()) <= 5e-3 * float(moved), pair.name


@needs_library
@pytest.mark.parametrize("x", XS)
@pytest.mark.parametrize("r", [4, 16, 33])
def test_equivalent_gradients_are_exact_to_a_thousandth(r, x):
    """Moments after a single step with β1 = 0 are the aligned gradients themselves."""
    generator = torch.Generator().manual_seed(r)
    pairs = many_pairs(r, generator)  # ill-conditioned ones, dead rows and B = 0 among them
    optimizer = optimizer_of(pairs, lr=1e-3, x=x, betas=(0.0, 0.9))
    expected = []
    for pair in pairs:
        feed_dense_gradient(pair, torch.randn(pair.shape, generator=generator))
        A, B, g_A, g_B = (t.detach().double() for t in (pair.A, pair.B, pair.A.grad, pair.B.grad))
        # Rank is judged by the rounding of float32, in which the factors are.
        d_A, d_B = F.align(
            pair.A.detach(), pair.B.detach(), g_A.float(), g_B.float(), pair.scaling, x=x
        )
        expected.append((A.clone(), B.clone(), d_A.double(), d_B.double()))
    optimizer.step()
    for pair, (A, B, d_A, d_B) in zip(pairs, expected, strict=True):
        have_A, have_B = (optimizer.state[p]["exp_avg"].double() for p in (pair.A, pair.B))
        got = F.equivalent_gradient(A, B, have_A, have_B, pair.scaling)
        want = F.equivalent_gradient(A, B, d_A, d_B, pair.scaling)
        assert float((got - want).norm()) <= 1e-3 * float(want.norm()), pair.name
        for have, exact in ((have_A, d_A), (have_B, d_B)):
            assert float((have - exact).norm()) <= 1e-2 * float(exact.norm()), pair.name


def stepped(pairs, generator, steps=3, **options):
    pairs = copy.deepcopy(pairs)
    optimizer = optimizer_of(pairs, lr=1e-3, **options)
    for _ in range(steps):
        for pair in pairs:
            feed_dense_gradient(pair, torch.randn(pair.shape, generator=generator))
        optimizer.step()
    return pairs, optimizer


def test_switched_off_the_steps_are_the_same_to_rounding(monkeypatch):
    pairs = many_pairs(8, torch.Generator().manual_seed(0))
    one, _ = stepped(pairs, torch.Generator().manual_seed(1))
    monkeypatch.setenv("LORAPRO_NATIVE", "0")
    assert library() is None
    two, _ = stepped(pairs, torch.Generator().manual_seed(1))
    for a, b, start in zip(one, two, pairs, strict=True):
        moved = (b.B - start.B).detach().norm()
        assert float((a.B - b.B).detach().norm()) <= 2e-2 * float(moved), start.name


@needs_library
def test_pairs_do_not_depend_on_their_neighbours_or_on_threads():
    pairs = many_pairs(8, torch.Generator().manual_seed(0))
    for pair in pairs:
        feed_dense_gradient(pair, torch.randn(pair.shape))
    together, alone = copy.deepcopy(pairs), copy.deepcopy(pairs)
    for held, given in zip((*together, *alone), (*pairs, *pairs), strict=True):
        held.A.grad, held.B.grad = given.A.grad.clone(), given.B.grad.clone()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        optimizer_of(together, lr=1e-3).step()
    finally:
        torch.set_num_threads(before)
    for pair, other in zip(alone, together, strict=True):
        optimizer_of([pair], lr=1e-3).step()
        if pair.name in ("0/160.0", "1/30.0", "0/250.0") or "e" in pair.name:
            continue  # the exact path stacks what shares a shape
        assert torch.equal(pair.A, other.A), pair.name
        assert torch.equal(pair.B, other.B), pair.name


@needs_library
def test_what_the_library_cannot_take_is_stepped_all_the_same():
    generator = torch.Generator().manual_seed(0)
    plain = [a_pair(str(i), 12, 20, 4, 3.0, 0.3, generator) for i in range(6)]
    one, two = copy.deepcopy(plain), copy.deepcopy(plain)
    two[0].A.data = two[0].A.data.T.contiguous().T  # another order in memory
    two[1] = LoraPair("1", *(nn.Parameter(p.detach().double()) for p in (two[1].A, two[1].B)), 2.0)
    for a, b in zip(one, two, strict=True):
        G = torch.randn(a.shape, generator=generator)
        feed_dense_gradient(a, G)
        feed_dense_gradient(b, G.to(b.A.dtype))
    two[2].B.grad = two[2].B.grad.T.contiguous().T
    one[3].A.grad = two[3].A.grad = None
    one[4].A.grad = one[4].B.grad = two[4].A.grad = two[4].B.grad = None
    for pairs in (one, two):
        optimizer_of(pairs, lr=1e-3).step()
    for a, b, start in zip(one, two, plain, strict=True):
        assert torch.allclose(a.B.double(), b.B.double(), atol=1e-5), a.name
        assert torch.allclose(a.A.double(), b.A.double(), atol=1e-5), a.name
        assert torch.equal(b.B.float(), start.B) == (a.name == "4")


@needs_library
def test_not_a_number_stays_with_its_pair():
    generator = torch.Generator().manual_seed(0)
    pairs = [a_pair(str(i), 12, 20, 4, 3.0, 0.3, generator) for i in range(3)]
    for pair in pairs:
        feed_dense_gradient(pair, torch.randn(pair.shape, generator=generator))
    pairs[1].A.grad[0, 0] = torch.nan
    optimizer_of(pairs, lr=1e-3).step()
    assert not torch.isfinite(pairs[1].A).all()
    for pair in (pairs[0], pairs[2]):
        assert torch.isfinite(pair.A).all()
        assert torch.isfinite(pair.B).all()


@needs_library
def test_a_gradient_of_zero_leaves_the_factors():
    generator = torch.Generator().manual_seed(0)
    [pair] = [a_pair("0", 12, 20, 4, 3.0, 0.3, generator)]
    start = pair.A.detach().clone(), pair.B.detach().clone()
    feed_dense_gradient(pair, torch.zeros(pair.shape))
    optimizer_of([pair], lr=1e-3).step()
    assert torch.equal(pair.A, start[0])
    assert torch.equal(pair.B, start[1])


@needs_library
def test_autograd_notices_the_step():
    generator = torch.Generator().manual_seed(0)
    pair = a_pair("0", 12, 20, 4, 3.0, 0.3, generator)
    loss = (pair.B @ pair.A).square().sum()
    loss.backward(retain_graph=True)
    optimizer_of([pair], lr=1e-3).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_library
@pytest.mark.parametrize("mode", ["efficient", "factored", "full", "muon"])
def test_a_state_of_another_rank_is_refused(mode):
    generator = torch.Generator().manual_seed(0)

    def made(r):
        pair = a_pair("0", 24, 24, r, 3.0, 0.3, generator)
        feed_dense_gradient(pair, torch.randn(pair.shape, generator=generator))
        return of_mode(mode, [pair])

    saved, other = made(4), made(8)
    saved.step()
    state = saved.state_dict()
    if mode == "full":  # the same at every rank: cut it
        for held in state["state"].values():
            held |= {k: v[:, :20] for k, v in held.items() if v.dim() == 3}
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="saved for another model or rank"):
        other.step()


def of_mode(mode, pairs, **options):
    groups = lorapro.lora_param_groups(None, pairs=pairs)
    if mode == "muon":
        return lorapro.LoraProMuon(groups, **options)
    return lorapro.LoraProAdamW(groups, mode=mode, **options)


def clipped(pair):
    for p in (pair.A, pair.B):
        p.grad.clamp_(-0.5 * p.grad.std(), 0.5 * p.grad.std())


def penalised(pair):
    pair.A.grad += 0.3 * pair.A.detach()
    pair.B.grad += 0.3 * pair.B.detach()


def without_A(pair):
    pair.A.grad = None


def without_B(pair):
    pair.B.grad = None


def disturbed(pair):
    with torch.no_grad():
        pair.B.add_(0.05 * torch.randn(pair.B.shape, generator=torch.Generator().manual_seed(7)))


def left_alone(pair):
    pass


@needs_library
@pytest.mark.parametrize(
    "happenings",
    [
        [clipped] * 3,
        [penalised] * 3,
        [without_A, without_A, left_alone],
        [left_alone, without_A, without_B, left_alone, left_alone],
        [left_alone, left_alone, disturbed, left_alone],
    ],
    ids=["clipped", "penalised", "A later", "alternating", "disturbed"],
)
@pytest.mark.parametrize("mode", ["factored", "muon"])
def test_gradients_that_do_not_belong_together(mode, happenings, monkeypatch):
    def run():
        generator = torch.Generator().manual_seed(0)
        pair = a_pair("0", 40, 60, 4, 3.0, 0.5, generator)
        goal = torch.randn(pair.shape, generator=generator)
        optimizer = of_mode(mode, [pair], lr=1e-2)
        for happening in happenings:
            if happening is disturbed:
                disturbed(pair)
            feed_dense_gradient(pair, goal + 0.3 * torch.randn(goal.shape, generator=generator))
            if happening is not disturbed:
                happening(pair)
            before = pair.B.detach() @ pair.A.detach()
            optimizer.step()
        return pair.B.detach() @ pair.A.detach(), before

    (native, before), _ = run(), monkeypatch.setenv("LORAPRO_NATIVE", "0")
    pytorch, _ = run()
    assert float((native - pytorch).norm()) <= 1e-2 * float((pytorch - before).norm())


@pytest.mark.parametrize("mode", ["efficient", "factored", "full", "muon"])
def test_a_compiled_caller_takes_the_same_steps(mode):
    def run(compiled):
        generator = torch.Generator().manual_seed(0)
        pairs = [a_pair(str(i), 24, 20, 4, 3.0, 0.3, generator) for i in range(2)]
        optimizer = of_mode(mode, pairs)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(2):
            for pair in pairs:
                feed_dense_gradient(pair, torch.randn(pair.shape, generator=generator))
            step()
        return [p.detach() for pair in pairs for p in (pair.A, pair.B)]

    for one, two in zip(run(False), run(True), strict=True):
        assert torch.equal(one, two)


WITHOUT_A_COMPILER = """
import logging, os, torch, lorapro
from lorapro.factors import LoraPair
logging.basicConfig()
A, B = torch.nn.Parameter(torch.eye(2, 6)), torch.nn.Parameter(torch.ones(4, 2).tril())
A.grad, B.grad = torch.ones(2, 6), torch.ones(4, 2)
groups = lorapro.lora_param_groups(None, pairs=[LoraPair("w", A, B, 4.0)])
lorapro.LoraProAdamW(groups, lr=0.1).step()
print(float(B.detach().sum()))
"""


def run_alone(cache, **environment):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_A_COMPILER],
        env={**os.environ, "LORAPRO_CACHE": str(cache), **environment},
        capture_output=True,
        text=True,
        check=True,
    )


@needs_library
@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_working_compiler_steps_run_in_pytorch(compiler, tmp_path):
    without, compiled = run_alone(tmp_path, CC=compiler), run_alone(tmp_path, CC="cc -O2")
    assert float(without.stdout) == pytest.approx(float(compiled.stdout), abs=1e-5)
    assert ("they run in PyTorch" in without.stderr) == (compiler == "false")
    assert len(list((tmp_path / "native").glob("*.so"))) == 1


@needs_library
@pytest.mark.parametrize("left", [0, 4096])
def test_a_damaged_library_is_made_again(left, tmp_path):
    first = run_alone(tmp_path)
    [made] = (tmp_path / "native").glob("*.so")
    whole = made.stat().st_size
    os.truncate(made, left)
    again = run_alone(tmp_path)
    assert again.stdout == first.stdout
    assert "PyTorch" not in again.stderr
    assert [p.stat().st_size for p in (tmp_path / "native").glob("*.so")] == [whole]


@needs_library
def test_a_cache_folder_that_cannot_be_is_no_error():
    run = run_alone("~no-such-user/cache")
    assert "they run in PyTorch" in run.stderr
