"""The float32 paths, in PyTorch and compiled, of factored AdamW, Muon and full mode."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lorapro
from helpers import feed_dense_gradient
from lorapro.factors import LoraPair
from lorapro.optim.stacking import Bucket
from test_batched import a_pair

RULES = {
    "factored": lambda groups, **o: lorapro.LoraProAdamW(groups, lr=1e-3, mode="factored", **o),
    # With ε near zero the first step is the sign of g̃: an entry that rounding puts on the other
    # side of zero changes h by 2, on any path.
    "full": lambda groups, **o: lorapro.LoraProAdamW(groups, 1e-3, eps=1e-3, mode="full", **o),
    "muon": lambda groups, **o: lorapro.LoraProMuon(groups, lr=1e-3, **o),
}
every_rule = pytest.mark.parametrize("rule", RULES)


@pytest.fixture(autouse=True, params=["0", "1"], ids=["pytorch", "compiled"])
def both_ways(request, monkeypatch):
    monkeypatch.setenv("LORAPRO_NATIVE", request.param)


def copies(pairs):
    return [
        LoraPair(
            pair.name, *(nn.Parameter(p.detach().clone()) for p in (pair.A, pair.B)), pair.scaling
        )
        for pair in pairs
    ]


def travelled(pair, start):
    """Change of W and of both factors."""
    A, B = pair.A.detach().double(), pair.B.detach().double()
    return pair.scaling * (B @ A - start[1] @ start[0]), A - start[0], B - start[1]


@every_rule
@pytest.mark.parametrize("x", ["zero", "sylvester", "symmetric"])
@pytest.mark.parametrize("r", [4, 20, 33])
def test_steps_are_those_of_the_exact_path(rule, x, r, monkeypatch):
    generator = torch.Generator().manual_seed(r)
    shapes = [(48, 64), (64, 48), (48, 64), (40, 128)]
    pairs = [
        a_pair(f"{m}/{n}/{cond}", m, n, r, cond, size, generator, scaling=1.0 + i)
        for i, (m, n) in enumerate(shapes)
        for cond, size in [(1.5, 0.05), (30.0, 0.3), (1e5, 0.5)]
    ]
    with torch.no_grad():
        pairs[2].B.zero_()
        pairs[5].A[0] = 0
    twins = copies(pairs)
    starts = [(p.A.detach().double(), p.B.detach().double()) for p in copies(pairs)]
    fast, exact = (
        RULES[rule](lorapro.lora_param_groups(None, pairs=p), x=x) for p in (pairs, twins)
    )
    goals = [torch.randn(p.shape, generator=generator) for p in pairs]
    for _ in range(6):
        for pair, twin, goal in zip(pairs, twins, goals, strict=True):
            G = goal + 0.5 * torch.randn(goal.shape, generator=generator)
            feed_dense_gradient(pair, G)
            feed_dense_gradient(twin, G)
        fast.step()
        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "fits_batched", False)
            patch.setenv("LORAPRO_NATIVE", "0")
            exact.step()
    # Muon at 2r of 40 and more: momentum of full rank, whose least singular values float32 does not
    # resolve.
    most = {4: 1e-2, 20: 2e-2, 33: 6e-2}[r] if rule == "muon" else 5e-3
    for pair, twin, start in zip(pairs, twins, starts, strict=True):
        # PyTorch's path of full mode rounds G_A, of the size of 1/σ_min(B), to float32; C does not.
        rounded = rule == "full" and pair.name.endswith("/100000.0")
        for have, want in zip(travelled(pair, start), travelled(twin, start), strict=True):
            off = float((have - want).norm())
            assert off <= (2e-2 if rounded else most) * float(want.norm()), pair.name


@every_rule
def test_pairs_do_not_depend_on_their_neighbours(rule):
    def run(spoil):
        generator = torch.Generator().manual_seed(0)
        pairs = [a_pair(str(i), 12, 10, 4, (2.0, 150.0, 3.0)[i], 0.5, generator) for i in range(3)]
        optimizer = RULES[rule](lorapro.lora_param_groups(None, pairs=pairs))
        for step in range(4):
            for i, pair in enumerate(pairs):
                feed_dense_gradient(pair, torch.randn(pair.shape, generator=generator))
                if spoil and i == 1 and step == 1:
                    pair.A.grad = pair.A.grad * float("nan")
            optimizer.step()
        return [p.detach() for i in (0, 2) for p in (pairs[i].A, pairs[i].B)]

    for a, b in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_polar_factor_without_its_sides():
    from lorapro.optim.polar import polar_core, polar_factor

    generator = torch.Generator().manual_seed(0)
    L = torch.randn(5, 60, 12, generator=generator)
    R = torch.randn(5, 12, 50, generator=generator) * torch.logspace(0, -1.5, 12)[:, None]
    L[1, :, 3] = 0  # of deficient rank
    L[2], R[2] = 1e-4 * L[2], 1e-6 * R[2]
    L[3] = 0
    U, Vt = polar_factor(L.double(), R.double())
    core = polar_core(L.mT @ L, R @ R.mT)
    torch.testing.assert_close((L @ core @ R).double(), U @ Vt, rtol=0, atol=1e-3)


@every_rule
def test_a_run_goes_on_from_its_state(rule):
    generator = torch.Generator().manual_seed(0)
    pairs = [a_pair(str(i), 12, 16, 4, 3.0, 0.5, generator) for i in range(3)]
    optimizer = RULES[rule](lorapro.lora_param_groups(None, pairs=pairs))
    gradients = [[torch.randn(12, 16, generator=generator) for _ in pairs] for _ in range(6)]
    for step, each in enumerate(gradients):
        if step == 3:
            kept = [copy.deepcopy(p.detach()) for pair in pairs for p in (pair.A, pair.B)]
            state = copy.deepcopy(optimizer.state_dict())
        for pair, G in zip(pairs, each, strict=True):
            feed_dense_gradient(pair, G)
        optimizer.step()
    ends = [p.detach().clone() for pair in pairs for p in (pair.A, pair.B)]
    with torch.no_grad():
        for p, value in zip((q for pair in pairs for q in (pair.A, pair.B)), kept, strict=True):
            p.copy_(value)
    again = RULES[rule](lorapro.lora_param_groups(None, pairs=pairs))
    again.load_state_dict(state)
    for each in gradients[3:]:
        for pair, G in zip(pairs, each, strict=True):
            feed_dense_gradient(pair, G)
        again.step()
    for end, p in zip(ends, (q for pair in pairs for q in (pair.A, pair.B)), strict=True):
        assert torch.equal(end, p.detach())


@every_rule
@pytest.mark.parametrize("layout", ["experts", "groups"])
@pytest.mark.parametrize("r", [1, 3])
def test_blocks_of_one_parameter_step_as_pairs_of_their_own(rule, layout, r):
    generator = torch.Generator().manual_seed(0)
    k, m, n = 3, 12, 10
    blocks = [a_pair(str(i), m, n, r, 3.0, 0.5, generator) for i in range(2 * k)]
    held = []
    for each in (blocks[:k], blocks[k:]):
        A = torch.cat([pair.A.detach() for pair in each])
        B = torch.stack([pair.B.detach() for pair in each])
        B = B.permute(1, 2, 0).reshape(m, r * k) if layout == "experts" else B.flatten(0, 1)
        name, scaling = each[0].name, each[0].scaling
        held.append(LoraPair(name, nn.Parameter(A), nn.Parameter(B), scaling, layout, k))
    single, several = (
        RULES[rule](lorapro.lora_param_groups(None, pairs=p)) for p in (blocks, held)
    )
    for _ in range(4):
        for pair in blocks:
            feed_dense_gradient(pair, torch.randn(m, n, generator=generator))
        for i, pair in enumerate(held):
            each = blocks[k * i : k * (i + 1)]
            pair.A.grad = torch.cat([one.A.grad for one in each])
            B = torch.stack([one.B.grad for one in each])
            B = B.permute(1, 2, 0) if layout == "experts" else B
            pair.B.grad = B.reshape(pair.B.shape)
        single.step()
        several.step()
    for i, pair in enumerate(held):
        for block, A, B in zip(blocks[k * i :], *pair.matrices(pair.A, pair.B), strict=False):
            torch.testing.assert_close(A, block.A, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(B, block.B, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["factored", "muon"])
@pytest.mark.parametrize("rank", [1, 2])
def test_momentum_is_carried_where_a_factor_has_no_full_rank(rule, rank):
    """The first step from B = 0 along a gradient of low rank; a projection lengthens nothing."""
    generator = torch.Generator().manual_seed(0)
    pairs = [a_pair(str(i), 24, 20, 4, 1.0, 0.0, generator) for i in range(3)]
    optimizer = RULES[rule](lorapro.lora_param_groups(None, pairs=pairs))
    goals = []
    for pair in pairs:
        left, right = (torch.randn(size, rank, generator=generator) for size in pair.shape)
        goals.append(left @ right.T)
        feed_dense_gradient(pair, goals[-1])
    optimizer.step()
    for pair, G in zip(pairs, goals, strict=True):
        A, B = pair.A.detach(), pair.B.detach()
        M_A, M_B = (optimizer.state[p]["momentum"] for p in (pair.A, pair.B))
        weight = {"factored": 0.1, "muon": 0.05}[rule]
        carried = pair.scaling * (B @ M_A + M_B @ A)
        assert float(carried.norm()) <= 1.001 * weight * float(G.norm())


@pytest.mark.parametrize("cond", [2.0, 10.0])
@pytest.mark.parametrize("rank", [1, 2, 8])
@pytest.mark.parametrize("r", [4, 16, 33])
def test_muon_follows_gradients_of_low_rank(r, rank, cond, monkeypatch):
    """Most singular values of the momentum are zero; rounding may not make directions of them."""
    generator = torch.Generator().manual_seed(r)
    pairs = [a_pair(str(i), 64, 48, r, cond, 1.0, generator) for i in range(3)]
    twins = copies(pairs)
    starts = [(p.A.detach().double(), p.B.detach().double()) for p in copies(pairs)]
    fast, exact = (RULES["muon"](lorapro.lora_param_groups(None, pairs=p)) for p in (pairs, twins))
    goals = [
        torch.randn(64, rank, generator=generator) @ torch.randn(rank, 48, generator=generator)
        for _ in pairs
    ]
    most = 1.1 * 1e-3 * 0.2 * 64**0.5 * (2 * r) ** 0.5  # lr·‖h‖ if every singular value were 1
    for step in range(5):
        before = [(p.A.detach().double(), p.B.detach().double()) for p in copies(pairs)]
        for pair, twin, G in zip(pairs, twins, goals, strict=True):
            feed_dense_gradient(pair, G)
            feed_dense_gradient(twin, G)
        fast.step()
        for pair, last in zip(pairs, before, strict=True):
            assert float(travelled(pair, last)[0].norm()) <= most
        if step == 0:  # later, what rounding leaves of the small singular values decides
            with monkeypatch.context() as patch:
                patch.setattr(Bucket, "fits_batched", False)
                patch.setenv("LORAPRO_NATIVE", "0")
                exact.step()
            for pair, twin, start in zip(pairs, twins, starts, strict=True):
                have, want = travelled(pair, start)[0], travelled(twin, start)[0]
                assert float((have - want).norm()) <= 1e-2 * float(want.norm())


@pytest.mark.parametrize("rule", ["factored", "muon"])
def test_momentum_of_pairs_left_out_keeps_no_old_stack(rule):
    generator = torch.Generator().manual_seed(0)
    pairs = [a_pair(str(i), 12, 16, 4, 3.0, 0.5, generator) for i in range(6)]
    optimizer = RULES[rule](lorapro.lora_param_groups(None, pairs=pairs))
    for step in range(len(pairs)):
        for i, pair in enumerate(pairs):
            feed_dense_gradient(pair, torch.randn(pair.shape, generator=generator))
            if i < step:
                pair.A.grad = pair.B.grad = None
        optimizer.step()
    held = [optimizer.state[p]["momentum"] for pair in pairs for p in (pair.A, pair.B)]
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    assert sum(memory.values()) == sum(t.nbytes for t in held)


def test_full_mode_in_float16_follows_float32():
    ends = []
    for dtype in (torch.float32, torch.float16):
        generator = torch.Generator().manual_seed(0)
        pair = a_pair("w", 24, 20, 4, 2.0, 0.5, generator)
        pair = LoraPair("w", *(nn.Parameter(p.detach().to(dtype)) for p in (pair.A, pair.B)), 2.0)
        start = (2.0 * pair.B.double() @ pair.A.double()).detach()
        groups = lorapro.lora_param_groups(None, pairs=[pair])
        optimizer = lorapro.LoraProAdamW(groups, lr=1e-2, mode="full")
        for step in range(6):
            if step == 3:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = lorapro.LoraProAdamW(groups, lr=1e-2, mode="full")
                optimizer.load_state_dict(state)
            G = 1e-3 * torch.randn(pair.shape, generator=generator)
            feed_dense_gradient(pair, G.to(dtype))
            optimizer.step()
        ends.append((2.0 * pair.B.double() @ pair.A.double()).detach() - start)
    assert float((ends[0] - ends[1]).norm()) < 0.1 * float(ends[0].norm())


@pytest.mark.parametrize("rule", ["factored", "muon"])
@pytest.mark.parametrize(("r", "rank"), [(8, 2), (8, 4), (32, 8), (32, 1)])
def test_gradients_of_low_rank_do_not_throw_W_far_away(rule, r, rank):
    """From B = 0, say a classifier that reads one token of each of a few examples."""
    m, n, lr = 96, 160, 1e-3
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(20, r, n, generator=generator) / n**0.5
    pairs = [
        LoraPair(str(i), nn.Parameter(A), nn.Parameter(torch.zeros(m, r)), scaling=2.0)
        for i, A in enumerate(a)
    ]
    optimizer = RULES[rule](lorapro.lora_param_groups(None, pairs=pairs))
    # The norm of Muon's h, and of one with entries of one; plain steps go up to a thousand times
    # as far.
    longest = 0.2 * (max(m, n) * 2 * r) ** 0.5 if rule == "muon" else (m * n) ** 0.5
    for _ in range(6):
        before = [(p.B @ p.A).detach() for p in pairs]
        for pair in pairs:
            left, right = (torch.randn(k, rank, generator=generator) for k in (m, n))
            feed_dense_gradient(pair, left @ right.T)
        optimizer.step()
        for pair, W in zip(pairs, before, strict=True):
            assert 2.0 * (pair.B @ pair.A - W).norm() < 5 * lr * longest


@pytest.mark.parametrize("rule", ["factored", "muon"])
@pytest.mark.parametrize("shape", [(2, 20), (20, 2), (3, 3)])
def test_steps_that_outrun_B_at_a_rank_above_both_sides(rule, shape):
    m, n = shape
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(*s, generator=generator) for s in ((4, n), (m, 4)))
    pair = LoraPair("w", nn.Parameter(A), nn.Parameter(1e-4 * B), scaling=1.0)
    optimizer = RULES[rule](lorapro.lora_param_groups(None, pairs=[pair]))
    for _ in range(3):
        W = (pair.B @ pair.A).detach()
        feed_dense_gradient(pair, torch.randn(m, n, generator=generator))
        optimizer.step()
        assert 0 < (pair.B @ pair.A - W).norm() < 5e-3 * max(m, n)


@pytest.mark.parametrize("rule", ["factored", "muon"])
def test_a_rate_that_decays_the_adapter_away_leaves_finite_factors(rule):
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 20, generator=generator), torch.randn(12, 4, generator=generator)
    pair = LoraPair("w", nn.Parameter(A), nn.Parameter(1e-4 * B), scaling=1.0)
    optimizer = RULES[rule](lorapro.lora_param_groups(None, pairs=[pair]), weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = 10.0
    feed_dense_gradient(pair, torch.randn(12, 20, generator=generator))
    optimizer.step()
    assert torch.isfinite(pair.A).all()
    assert torch.isfinite(pair.B).all()
