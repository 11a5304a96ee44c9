"""The float32 paths, in PyTorch and compiled, against the exact one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorapro
import lorapro.functional as F
from helpers import feed_dense_gradient
from lorapro.factors import LoraPair
from lorapro.optim.aligned import aligned_gradients

XS = ("zero", "sylvester", "symmetric")


@pytest.fixture(autouse=True, params=["0", "1"], ids=["pytorch", "compiled"])
def both_ways(request, monkeypatch):
    monkeypatch.setenv("LORAPRO_NATIVE", request.param)


def a_pair(name, m, n, r, cond, size, generator, scaling=2.0):
    def orthonormal(rows):
        return torch.linalg.qr(torch.randn(rows, r, generator=generator, dtype=torch.float64))[0]

    spread = torch.logspace(0, -float(torch.log10(torch.tensor(cond))), r, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64))[0]
    B = size * (orthonormal(m) * spread) @ turn.T
    A = torch.randn(r, n, generator=generator) / n**0.5
    return LoraPair(name, nn.Parameter(A), nn.Parameter(B.float()), scaling)


def many_pairs(r, generator):
    """Shapes, conditions and sizes as in training and beyond; B = 0 and A dead rows among them."""
    pairs = []
    for i, (m, n) in enumerate([(48, 64), (64, 48), (48, 64), (40, 128)]):
        for cond, size in [(1.5, 1e-3), (30.0, 0.1), (160.0, 2.0), (250.0, 2.0), (1e5, 0.5)]:
            name = f"{i}/{cond}"
            pairs.append(a_pair(name, m, n, r, cond, size, generator, scaling=1.0 + i))
    with torch.no_grad():
        pairs[3].B.zero_()
        pairs[6].A[0] = 0
    return pairs


@pytest.mark.parametrize("x", XS)
@pytest.mark.parametrize("r", [1, 4, 16, 32])
def test_aligned_steps_are_those_of_the_exact_path(r, x):
    generator = torch.Generator().manual_seed(r)
    pairs = many_pairs(r, generator)
    optimizer = lorapro.LoraProSGD(lorapro.lora_param_groups(None, pairs=pairs), lr=1.0, x=x)
    expected = []
    for pair in pairs:
        feed_dense_gradient(pair, torch.randn(pair.shape, generator=generator))
        parts = (pair.A.detach(), pair.B.detach(), pair.A.grad, pair.B.grad)
        expected.append((*F.align(*parts, pair.scaling, x=x), *(t.clone() for t in parts[:2])))
    with torch.no_grad():  # the step itself, without rounding against the size of the factors
        handles = [torch.zeros_like(p) for pair in pairs for p in (pair.A, pair.B)]
        taken = {}
        for params, directions in aligned_gradients(optimizer.param_groups[0], x):
            for p, d in zip(params, directions, strict=True):
                taken[id(p)] = d
    assert len(taken) == len(handles)
    for pair, (d_A, d_B, A, B) in zip(pairs, expected, strict=True):
        have_A, have_B = taken[id(pair.A)].double(), taken[id(pair.B)].double()
        d_A, d_B, A, B = (t.double() for t in (d_A, d_B, A, B))
        got = F.equivalent_gradient(A, B, have_A, have_B, pair.scaling)
        want = F.equivalent_gradient(A, B, d_A, d_B, pair.scaling)
        assert float((got - want).norm()) <= 1e-3 * float(want.norm()), pair.name
        for have, exact in ((have_A, d_A), (have_B, d_B)):
            assert float((have - exact).norm()) <= 1e-2 * float(exact.norm()), pair.name


@pytest.mark.parametrize("cond", [3.0, 10.0, 30.0, 150.0])
@pytest.mark.parametrize("r", [4, 16, 32])
def test_both_factors_of_high_condition(r, cond):
    generator = torch.Generator().manual_seed(r)
    pairs = [a_pair(str(i), 48, 40, r, cond, 10.0 ** (i - 2), generator) for i in range(4)]
    for pair in pairs:
        like = a_pair("", 40, 48, r, cond, 1.0, generator)
        with torch.no_grad():
            pair.A.copy_(like.B.T)
        feed_dense_gradient(pair, torch.randn(pair.shape, generator=generator))
    group = lorapro.lora_param_groups(None, pairs=pairs)[0]
    taken = {
        id(p): d.double()
        for part in aligned_gradients(group, "sylvester")
        for p, d in zip(*part, strict=True)
    }
    for pair in pairs:
        parts = (t.detach().double() for t in (pair.A, pair.B, pair.A.grad, pair.B.grad))
        for p, exact in zip((pair.A, pair.B), F.align(*parts, pair.scaling), strict=True):
            assert float((taken[id(p)] - exact).norm()) <= 1e-2 * float(exact.norm())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_a_pair_steps_the_same_whatever_its_neighbours(bad):
    def run(spoil):
        generator = torch.Generator().manual_seed(0)
        pairs = [a_pair(str(i), 12, 10, 4, (2.0, 150.0, 3.0)[i], 0.5, generator) for i in range(3)]
        optimizer = lorapro.LoraProAdamW(lorapro.lora_param_groups(None, pairs=pairs), lr=1e-2)
        for step in range(4):
            for i, pair in enumerate(pairs):
                feed_dense_gradient(pair, torch.randn(pair.shape, generator=generator))
                if spoil and i == 1 and step == 1:
                    pair.A.grad = pair.A.grad * (10.0 if bad is None else bad)
            optimizer.step()
        return [p.detach() for i in (0, 2) for p in (pairs[i].A, pairs[i].B)]

    for a, b in zip(run(False), run(True), strict=True):
        assert torch.equal(a, b)


def test_large_stacks_are_stepped_in_parts(monkeypatch):
    from lorapro.optim import stacking

    def run():
        generator = torch.Generator().manual_seed(0)
        pairs = [a_pair(str(i), 12, 16, 2, 3.0, 0.5, generator) for i in range(7)]
        optimizer = lorapro.LoraProAdamW(lorapro.lora_param_groups(None, pairs=pairs), lr=1e-2)
        for _ in range(3):
            for pair in pairs:
                feed_dense_gradient(pair, torch.randn(pair.shape, generator=generator))
            optimizer.step()
        return [p.detach() for pair in pairs for p in (pair.A, pair.B)]

    whole = run()
    monkeypatch.setattr(stacking, "MOST_ELEMENTS", 3 * 2 * 32)
    for a, b in zip(whole, run(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cond_Q", [1.0, 4.0, 30.0])
def test_conjugate_gradients_solve_the_sylvester_equation(cond_Q):
    from lorapro.optim.small import solve_sylvester

    generator = torch.Generator().manual_seed(0)
    k, r = 5, 24
    turn = torch.linalg.qr(torch.randn(2 * k, r, r, generator=generator))[0]
    P = (turn[:k] * torch.logspace(0, -5, r)) @ turn[:k].mT
    Q = (turn[k:] * torch.logspace(0, -float(torch.tensor(cond_Q).log10()), r)) @ turn[k:].mT
    K = torch.randn(k, r, r, generator=generator) * torch.logspace(-20, 3, k)[:, None, None]
    Y = solve_sylvester(P, Q, K)
    residual = (P @ Y + Y @ Q - K).norm(dim=(-2, -1)) / K.norm(dim=(-2, -1))
    assert float(residual.max()) < 0.02


@pytest.mark.parametrize("optimizer", ["LoraProSGD", "LoraProAdamW", "LoraProMuon"])
def test_channels_last_factors_of_a_convolution(optimizer):
    """``model.to(memory_format=torch.channels_last)`` reorders the memory of 4-d factors."""

    def run(memory_format):
        generator = torch.Generator().manual_seed(0)
        pairs = []
        for i in range(2):
            A = 0.2 * torch.randn(4, 3, 3, 3, generator=generator)
            B = 0.3 * torch.randn(8, 4, 1, 1, generator=generator)
            A, B = (nn.Parameter(t.to(memory_format=memory_format)) for t in (A, B))
            pairs.append(LoraPair(str(i), A, B, 2.0))
        made = getattr(lorapro, optimizer)(lorapro.lora_param_groups(None, pairs=pairs), lr=1e-2)
        for _ in range(3):
            for pair in pairs:
                G = torch.randn(8, 27, generator=generator)
                A, B = pair.A.detach().reshape(4, 27), pair.B.detach().reshape(8, 4)
                for p, g in ((pair.A, 2 * B.T @ G), (pair.B, 2 * G @ A.T)):
                    p.grad = g.view(p.shape).to(memory_format=memory_format)
            made.step()
        return [p.detach() for pair in pairs for p in (pair.A, pair.B)]

    ends = (run(f) for f in (torch.contiguous_format, torch.channels_last))
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b)


def test_steady_moments_do_not_remember_how_small_B_was():
    # From B = 0, the same gradient at every step: what Adam holds of A against what it is given.
    def held_over_given(steady):
        generator = torch.Generator().manual_seed(0)
        pair = a_pair("w", 40, 32, 4, 2.0, 1.0, generator)
        with torch.no_grad():
            pair.B.zero_()
        groups = lorapro.lora_param_groups(None, pairs=[pair])
        optimizer = lorapro.LoraProAdamW(groups, lr=1e-3, steady=steady)
        goal = torch.randn(pair.shape, generator=generator)
        for _ in range(100):
            feed_dense_gradient(pair, goal + 0.5 * torch.randn(pair.shape, generator=generator))
            optimizer.step()
        state = optimizer.state[pair.A]
        root = (state["exp_avg_sq"].mean() / (1 - 0.999**100)) ** 0.5
        for part in aligned_gradients(optimizer.param_groups[0], "sylvester", steady=steady):
            given = next(d for p, d in zip(*part, strict=True) if p is pair.A)
        return float(root / given.square().mean() ** 0.5)

    assert held_over_given(steady=True) < 2
    assert held_over_given(steady=False) > 5


def test_steady_is_for_efficient_mode_and_its_state_is_its_own():
    generator = torch.Generator().manual_seed(0)
    groups = [
        lorapro.lora_param_groups(None, pairs=[a_pair("w", 8, 6, 2, 2.0, 1.0, generator)])
        for _ in range(3)
    ]
    with pytest.raises(ValueError, match="steady=True is for mode='efficient', found mode='full'"):
        lorapro.LoraProAdamW(groups[0], steady=True, mode="full")
    optimizers = [
        lorapro.LoraProAdamW(g, steady=s) for g, s in zip(groups[1:], (False, True), strict=True)
    ]
    for optimizer in optimizers:
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    with pytest.raises(ValueError, match="'efficient', steady, this optimizer runs"):
        optimizers[0].load_state_dict(optimizers[1].state_dict())
