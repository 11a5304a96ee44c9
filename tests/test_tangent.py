"""Factored AdamW and Muon against dense twins, and their limit cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lorapro
from helpers import feed_dense_gradient, mlp, pairs_of, patterned, randomise_B, through_a_file
from lorapro.factors import LoraPair
from reference import tangent

TWINS = {"factored": tangent.Factored, "muon": tangent.Muon}
every_rule = pytest.mark.parametrize("rule", TWINS)


def build(rule, groups, lr=0.01, **options):
    if rule == "muon":
        return lorapro.LoraProMuon(groups, lr=lr, **options)
    return lorapro.LoraProAdamW(groups, lr=lr, mode="factored", **options)


def by_hand(A, B, s=1.5):
    A, B = (nn.Parameter(torch.tensor(t, dtype=torch.float64)) for t in (A, B))
    return LoraPair("w", A, B, scaling=s)


def twin_of(rule, pair, **options):
    A, B = pair.A.detach().numpy(), pair.B.detach().numpy()
    return TWINS[rule](A, B, pair.scaling, **options)


def agree(pair, reference, tolerance=1e-9):
    for have, want in ((pair.A, reference.A), (pair.B, reference.B)):
        np.testing.assert_allclose(have.detach(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("x", ["sylvester", "zero", "symmetric"])
@every_rule
@pytest.mark.parametrize("model", [mlp, patterned])
@pytest.mark.parametrize("start", ["B=0", "B random"])
def test_fifty_steps_equal_the_dense_twin(rule, x, model, start):
    model = model() if start == "B=0" else randomise_B(model())
    pairs = pairs_of(model)
    options = {"weight_decay": 0.1, "x": x}
    optimizer = build(rule, lorapro.lora_param_groups(model), **options)
    twins = [twin_of(rule, pair, **options) for pair in pairs]
    generator = torch.Generator().manual_seed(0)
    for t in range(50):
        if t == 25:
            state = through_a_file(optimizer.state_dict())
            optimizer = build(rule, lorapro.lora_param_groups(model), **options)
            optimizer.load_state_dict(state)
        lr = 0.01 * 0.98**t
        for group in optimizer.param_groups:
            group["lr"] = lr
        for pair, reference in zip(pairs, twins, strict=True):
            G = torch.randn(pair.shape, generator=generator, dtype=torch.float64)
            feed_dense_gradient(pair, G)
            reference.step(G.numpy(), lr)
        optimizer.step()
        for pair, reference in zip(pairs, twins, strict=True):
            # Muon divides by the roots of Gram matrices, whose small eigenvalues are a filter's.
            agree(pair, reference, 1e-7 if rule == "muon" else 1e-8)


@pytest.mark.parametrize("x", ["sylvester", "zero", "symmetric"])
@every_rule
def test_no_step_outruns_a_small_B(rule, x):
    model = randomise_B(patterned(), scale=1e-4)
    pairs = pairs_of(model)
    options = {"weight_decay": 0.1, "x": x}
    optimizer = build(rule, lorapro.lora_param_groups(model), **options)
    twins = [twin_of(rule, pair, **options) for pair in pairs]
    starts = [(pair.B @ pair.A).detach() for pair in pairs]
    generator = torch.Generator().manual_seed(0)
    for t in range(6):
        for pair, reference in zip(pairs, twins, strict=True):
            G = torch.randn(pair.shape, generator=generator, dtype=torch.float64)
            feed_dense_gradient(pair, G)
            reference.step(G.numpy(), 0.01)
        optimizer.step()
        for pair, reference, start in zip(pairs, twins, starts, strict=True):
            agree(pair, reference, 1e-8)
            if t == 0:
                moved = pair.scaling * (pair.B @ pair.A - start).norm()
                assert moved < 1.2 * 0.01 * np.linalg.norm(reference.h)


@every_rule
@pytest.mark.parametrize("case", ["dead row", "rank of both", "both=0", "A=0"])
def test_factors_of_deficient_rank(rule, case):
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((3, 8)), rng.standard_normal((6, 3))
    if case == "dead row":
        A[1] = 0
    if case == "rank of both":
        A[2], B[:, 0] = A[0] - A[1], 2 * B[:, 1]
    if case in ("both=0", "A=0"):
        A[:] = 0
    if case == "both=0":
        B[:] = 0
    pair = by_hand(A, B)
    # Of Muon's momentum, directions without rank are known to the root of a ridge of 1e-13.
    damping, tolerance = (1.0, 1e-4) if rule == "muon" else (0.0, 1e-8)
    optimizer = build(rule, lorapro.lora_param_groups(None, pairs=[pair]), damping=damping)
    reference = twin_of(rule, pair, damping=damping)
    for t in range(3):
        G = torch.tensor(rng.standard_normal((6, 8)))
        feed_dense_gradient(pair, G)
        reference.step(G.numpy(), 0.01)
        optimizer.step()
        if t == 0:
            agree(pair, reference, tolerance)
        # The first step leaves conditions of several thousands, which Gram matrices square.
        W = reference.B @ reference.A
        np.testing.assert_allclose((pair.B @ pair.A).detach(), W, atol=1e-3 * np.abs(W).max())


def dense_factored_steps(W, gradients, lr):
    """Factored mode's rule for an unconstrained matrix W, no projection anywhere."""
    M, rows, columns = np.zeros_like(W), np.zeros(len(W)), np.zeros(W.shape[1])
    for t, G in enumerate(gradients, start=1):
        M = 0.9 * M + 0.1 * G
        rows = 0.999 * rows + 0.001 * (G**2).mean(1)
        columns = 0.999 * columns + 0.001 * (G**2).mean(0)
        r, c = rows / (1 - 0.999**t), columns / (1 - 0.999**t)
        h = M / (1 - 0.9**t) / (np.sqrt(np.outer(r, c) / r.mean()) + 1e-8)
        W = W - lr * h / max(1.0, np.sqrt((h**2).mean()))
    return W


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_at_full_rank_the_weight_takes_the_dense_rules_steps(shape):
    m, n = shape
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((4, n)), rng.standard_normal((m, 4))
    gradients = [rng.standard_normal(shape) for _ in range(4)]
    errors = []
    for lr in (1e-4, 1e-5):
        pair = by_hand(A, B)
        optimizer = build("factored", lorapro.lora_param_groups(None, pairs=[pair]), lr=lr)
        for G in gradients:
            feed_dense_gradient(pair, torch.tensor(G))
            optimizer.step()
        start = 1.5 * B @ A
        want = dense_factored_steps(start, gradients, lr)
        have = 1.5 * (pair.B @ pair.A).detach().numpy()
        errors.append(np.linalg.norm(have - want) / np.linalg.norm(want - start))
    assert errors[0] < 0.05
    assert errors[1] < max(0.2 * errors[0], 1e-7)  # what is left is second order in lr


@every_rule
def test_without_momentum_the_past_is_forgotten(rule):
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((3, 8)), rng.standard_normal((6, 3))
    G = torch.tensor(rng.standard_normal((6, 8)))
    ends = []
    for history in (0, 3):
        pair = by_hand(A, B)
        options = {"betas": (0.0, 0.0)} if rule == "factored" else {"momentum": 0.0}
        optimizer = build(rule, lorapro.lora_param_groups(None, pairs=[pair]), **options)
        for _ in range(history):
            feed_dense_gradient(pair, torch.tensor(rng.standard_normal((6, 8))))
            optimizer.step()
        with torch.no_grad():
            pair.A.copy_(torch.tensor(A))
            pair.B.copy_(torch.tensor(B))
        feed_dense_gradient(pair, G)
        optimizer.step()
        ends.append((pair.A.detach(), pair.B.detach()))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("damping", [0.0, 10.0])
def test_each_part_of_a_step_moves_W_by_one_length_in_every_direction(damping):
    rng = np.random.default_rng(0)
    pair = by_hand(rng.standard_normal((3, 8)), rng.standard_normal((6, 3)))
    A, B = pair.A.detach().clone(), pair.B.detach().clone()
    groups = lorapro.lora_param_groups(None, pairs=[pair])
    optimizer = build("muon", groups, lr=0.01, damping=damping)
    feed_dense_gradient(pair, torch.tensor(rng.standard_normal((6, 8))))
    optimizer.step()
    length = 0.01 * 0.2 * (8 * 32 / 3) ** 0.5
    of_B = torch.linalg.svdvals(1.5 * (pair.B.detach() - B) @ A)[:3] / length
    of_A = torch.linalg.svdvals(1.5 * B @ (pair.A.detach() - A))[:3] / length
    torch.testing.assert_close(of_B, torch.ones_like(of_B), rtol=1e-6, atol=0)
    if damping:
        assert (of_A > 0.5).all()
        assert (of_A < 1).all()
    else:
        torch.testing.assert_close(of_A, torch.ones_like(of_A), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e-24, 1e25])
def test_a_step_of_muon_is_as_long_for_gradients_whose_squares_are_no_float32(size):
    torch.manual_seed(0)
    A, B, G = torch.randn(3, 8), torch.randn(6, 3), torch.randn(6, 8)
    ends = []
    for scale in (1.0, size):
        pair = LoraPair("w", nn.Parameter(A.clone()), nn.Parameter(B.clone()), scaling=1.5)
        optimizer = build("muon", lorapro.lora_param_groups(None, pairs=[pair]))
        feed_dense_gradient(pair, scale * G)
        optimizer.step()
        ends.append((pair.B @ pair.A).detach())
    assert (ends[0] - B @ A).norm() > 0.005
    torch.testing.assert_close(ends[1] - B @ A, ends[0] - B @ A, rtol=1e-2, atol=1e-4)


def test_momentum_that_zero_gradients_let_fade_moves_nothing_in_the_end():
    torch.manual_seed(0)
    pair = LoraPair("w", *map(nn.Parameter, (torch.randn(3, 8), torch.randn(6, 3))), scaling=1.5)
    groups = lorapro.lora_param_groups(None, pairs=[pair])
    optimizer = build("muon", groups, lr=1e-3, momentum=0.5)
    feed_dense_gradient(pair, torch.randn(6, 8))
    optimizer.step()
    for _ in range(130):
        pair.A.grad, pair.B.grad = torch.zeros_like(pair.A), torch.zeros_like(pair.B)
        before = (pair.B @ pair.A).detach()
        optimizer.step()
    torch.testing.assert_close((pair.B @ pair.A).detach(), before, rtol=1e-5, atol=1e-6)


def test_muon_with_repeated_singular_values_and_a_diagonal_gradient():
    pair = by_hand(np.eye(3), np.zeros((3, 3)), s=1.0)
    optimizer = build("muon", lorapro.lora_param_groups(None, pairs=[pair]), lr=1.0)
    feed_dense_gradient(pair, torch.diag(torch.tensor([4.0, 4.0, -1e-3], dtype=torch.float64)))
    optimizer.step()
    want = -0.2 * 32**0.5 * torch.diag(torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64))
    torch.testing.assert_close((pair.B @ pair.A).detach(), want, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("case", [("factored", 1.1), ("muon", 0.55)])
def test_state_is_no_larger_than_promised(case):
    rule, most = case
    torch.manual_seed(0)
    pairs = [
        LoraPair(str(i), nn.Parameter(torch.randn(8, 576)), nn.Parameter(torch.randn(m, 8)), 2.0)
        for i, m in enumerate((576, 192, 1536))
    ]
    optimizer = build(rule, lorapro.lora_param_groups(None, pairs=pairs))
    for pair in pairs:
        feed_dense_gradient(pair, torch.randn(pair.shape))
    optimizer.step()
    kept = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    adamw = sum(2 * 4 * (pair.A.numel() + pair.B.numel()) for pair in pairs)
    assert kept <= most * adamw
    assert max(t.numel() for s in optimizer.state.values() for t in s.values()) <= 8 * 1536


@every_rule
def test_a_frozen_factor_stays_and_momentum_with_it(rule):
    rng = np.random.default_rng(0)
    A = nn.Parameter(torch.tensor(rng.standard_normal((3, 8))), requires_grad=False)
    B = nn.Parameter(torch.zeros(6, 3, dtype=torch.float64))
    pair = LoraPair("w", A, B, scaling=2.0)
    optimizer = build(rule, lorapro.lora_param_groups(None, pairs=[pair]), x="zero")
    kept = A.detach().clone()
    G = torch.tensor(rng.standard_normal((6, 8)))
    for _ in range(5):
        B.grad = 2.0 * G @ A.T
        optimizer.step()
    assert torch.equal(A, kept)
    assert float((2.0 * (B @ A).detach() * G).sum()) < 0


@every_rule
@pytest.mark.parametrize("samples", [1, 2])
def test_least_squares_from_few_samples_a_step_neither_jumps_nor_diverges(rule, samples):
    """Gradients of rank 1 and 2 under rank 16, where A could lose its condition."""
    m, n, lr = 32, 24, 1e-2
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    teacher = normal(m, 4) @ normal(4, n) / 8
    A, B = nn.Parameter(normal(16, n) / n**0.5), nn.Parameter(torch.zeros(m, 16))
    pair = LoraPair("w", A, B, scaling=2.0)
    optimizer = build(rule, lorapro.lora_param_groups(None, pairs=[pair]), lr=lr)

    def weight():
        return 2.0 * (pair.B @ pair.A).detach()

    longest = 0.0
    for _ in range(250):
        inputs, before = normal(n, samples), weight()
        feed_dense_gradient(pair, (before - teacher) @ inputs @ inputs.T / samples)
        optimizer.step()
        longest = max(longest, float((weight() - before).norm()))
    assert longest <= 1.2 * lr * (m * n) ** 0.5
    assert (weight() - teacher).norm() < 0.5 * teacher.norm()


@every_rule
@pytest.mark.parametrize("frozen", ["A", "B"])
def test_weight_decay_shrinks_the_product_when_one_factor_is_frozen_too(rule, frozen):
    rng = np.random.default_rng(0)
    pair = by_hand(rng.standard_normal((3, 8)), rng.standard_normal((6, 3)))
    getattr(pair, frozen).requires_grad_(False)
    start = (pair.B @ pair.A).detach()
    groups = lorapro.lora_param_groups(None, pairs=[pair])
    optimizer = build(rule, groups, lr=0.1, weight_decay=1.0)
    for p in (pair.A, pair.B):
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    torch.testing.assert_close((pair.B @ pair.A).detach(), 0.9 * start)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-4, 1.0])
def test_factored_steps_of_half_precision_factors_are_as_long_as_those_of_float32(dtype, size):
    moved = []
    for kind in (torch.float32, dtype):
        generator = torch.Generator().manual_seed(0)
        A, B = (torch.randn(s, generator=generator).to(dtype).to(kind) for s in ((4, 24), (16, 4)))
        pair = LoraPair("w", nn.Parameter(A.clone()), nn.Parameter(B.clone()), scaling=1.0)
        optimizer = build("factored", lorapro.lora_param_groups(None, pairs=[pair]), lr=0.05)
        for _ in range(3):
            g = size * torch.randn(16, 24, generator=generator)
            pair.A.grad, pair.B.grad = (B.float().T @ g).to(kind), (g @ A.float().T).to(kind)
            optimizer.step()
        assert optimizer.state[pair.B]["row_means"].dtype == torch.float32
        moved.append((pair.B.float() @ pair.A.float() - B.float() @ A.float()).detach())
    assert (moved[1] - moved[0]).norm() < 0.15 * moved[0].norm()


def test_gradients_rounded_as_under_autocast_leave_no_column_without_a_mean():
    torch.manual_seed(1)
    m, r, s = 96, 16, 2.0

    def rounded(x):
        return x.bfloat16().float()

    A, mix = torch.randn(r, m) / m**0.5, torch.linalg.qr(torch.randn(r, r))[0]
    U = torch.linalg.qr(torch.randn(m, r))[0]
    B = 1e-2 * (U * torch.logspace(0, -4, r)) @ mix.T
    g = torch.randn(m, 8) @ torch.randn(8, m) * torch.logspace(0, -2, m)
    pair = LoraPair("w", nn.Parameter(A.clone()), nn.Parameter(B.clone()), scaling=s)
    optimizer = build("factored", lorapro.lora_param_groups(None, pairs=[pair]), lr=1e-3)
    pair.A.grad, pair.B.grad = rounded(s * rounded(B).T @ g), rounded(s * g @ rounded(A).T)
    optimizer.step()
    means = optimizer.state[pair.A]["column_means"]
    assert bool((means > 1e-6 * means.mean()).all())
