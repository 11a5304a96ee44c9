"""The three objectives for Adam: gradient, sign, adam."""

from __future__ import annotations

import copy

import pytest
import torch

from lorapro import lora_ga
from lorapro.factors import find_pairs
from lorapro.lora_ga.decompose import (
    adam_objective,
    gradient_objective,
    leading_singular_values,
    minimize_adam_objective,
    split_directions,
)

PREFIX = "base_model.model."


def test_adam_objective_is_the_posts_formula_elementwise():
    torch.manual_seed(0)
    A, B, G = torch.randn(2, 5), torch.randn(4, 2), torch.randn(4, 5)
    total = 0.0
    for i in range(4):
        for j in range(5):
            from_B = sum(B[i, k] * torch.sign((B[:, k] * G[:, j]).sum()) for k in range(2))
            from_A = sum(torch.sign((G[i] * A[k]).sum()) * A[k, j] for k in range(2))
            total += (from_B + from_A - torch.sign(G[i, j])) ** 2
    assert float(adam_objective(A, B, G)) == pytest.approx(float(total), rel=1e-5)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_minimisation_never_ends_above_its_start(seed, size):
    torch.manual_seed(seed)
    m, n, r = ((20, 30, 3), (7, 50, 2), (16, 16, 8))[seed % 3]
    G = torch.randn(m, 4) @ torch.randn(4, n) + 0.3 * torch.randn(m, n)
    U, _, Vh = torch.linalg.svd(G)
    A0, B0 = size * Vh[:r], size * U[:, min(r, m - r) : min(r, m - r) + r]
    A, B, start, end = minimize_adam_objective(A0, B0, G)
    assert start == pytest.approx(float(adam_objective(A0, B0, G)), rel=1e-5)
    assert end == pytest.approx(float(adam_objective(A, B, G)), rel=1e-5)
    assert end <= start
    if size == 100.0:
        assert end < 0.1 * start


def test_minimisation_stays_at_a_minimum():
    G = torch.ones(6, 4)  # B = e/2, A = e/2 solve it: each gives half of the sign
    A0, B0 = torch.full((1, 4), 0.5), torch.full((6, 1), 0.5)
    _, _, start, end = minimize_adam_objective(A0, B0, G)
    assert start == pytest.approx(0, abs=1e-6)
    assert end <= start


def test_objective_adam_starts_from_the_gradient_and_ends_no_higher(tiny):
    base, batches = tiny.llama(), tiny.batches()
    found = {}
    for objective in ("gradient", "adam"):
        model = tiny.adapted(copy.deepcopy(base))
        report = lora_ga.initialize(model, batches, objective=objective, scale="unit")
        found[objective] = (find_pairs(model).pairs, report)
    start, end = found["gradient"][0], found["adam"][0]
    for a, b, row in zip(start, end, found["adam"][1].layers, strict=True):
        G = tiny.gradient(base, f"{a.name.removeprefix(PREFIX)}.weight", batches)
        before = float(adam_objective(a.A.detach(), a.B.detach(), G))
        after = float(adam_objective(b.A.detach(), b.B.detach(), G))
        assert after <= before
        assert row.objective[1] <= row.objective[0]
        # Elements of G near zero change sign with the order of summation.
        assert after == pytest.approx(row.objective[1], rel=0.05)
    assert sum(r.objective[1] for r in found["adam"][1].layers) < 0.9 * sum(
        r.objective[0] for r in found["adam"][1].layers
    )


def test_objective_sign_decomposes_the_sign(tiny):
    base, batches = tiny.llama(), tiny.batches()
    model = tiny.adapted(copy.deepcopy(base))
    lora_ga.initialize(model, batches, objective="sign", scale="unit")
    for pair in find_pairs(model).pairs:
        name = pair.name.removeprefix(PREFIX)
        S = tiny.gradient(base, f"{name}.weight", batches).sign().double()
        best = torch.linalg.svdvals(S)[8:].square().sum()
        reached = gradient_objective(pair.A.detach(), pair.B.detach(), S)
        # A few elements of G are so near zero that their sign depends on the order of summation.
        assert reached - best <= 0.02 * S.square().sum(), name


@pytest.mark.parametrize("objective", ["sign", "adam"])
@pytest.mark.parametrize("scale", ["stable", "unit"])
def test_outputs_stay_for_every_objective(tiny, objective, scale):
    batches = tiny.batches()
    model = tiny.adapted(tiny.llama())
    before = model(**batches[0]).logits.detach()
    report = lora_ga.initialize(model, batches, objective=objective, scale=scale)
    assert (model(**batches[0]).logits - before).abs().max() <= 1e-4 * before.abs().max()
    if scale == "stable":
        for pair, row in zip(find_pairs(model).pairs, report.layers, strict=True):
            assert float(pair.A.detach().norm()) == pytest.approx(2 * row.scale, rel=1e-4)
            assert float(pair.B.detach().norm()) == pytest.approx(2 * row.scale, rel=1e-4)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
@pytest.mark.parametrize(("r", "q"), [(4, 8), (4, 7), (4, 4), (4, 3), (4, 1), (1, 2)])
def test_directions_are_shared_out_without_overlap(direction, r, q):
    generator = torch.Generator().manual_seed(0)
    for_A, for_B = split_directions(direction, r, q, generator)
    assert sorted(for_A + for_B) == list(range(q))
    assert len(for_A) <= r
    assert len(for_B) <= r


def test_leading_singular_values_of_a_large_matrix():
    torch.manual_seed(0)
    W = torch.randn(600, 500) * torch.linspace(3, 0.1, 500)
    found = leading_singular_values(W, 8, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, torch.linalg.svdvals(W)[:8], rtol=0.01, atol=0)
