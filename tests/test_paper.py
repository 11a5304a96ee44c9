"""Every optimizer against its paper-literal float64 twin, fed the same dense gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lorapro
from helpers import feed_dense_gradient, mlp, pairs_of, patterned, randomise_B, through_a_file
from reference import paper

STEPS = 50
MODELS = {"lora": mlp, "rslora+patterns": patterned}


def build(kind, model, x, **options):
    groups = lorapro.lora_param_groups(model)
    if kind == "sgd":
        return lorapro.LoraProSGD(groups, lr=0.02, x=x, **options)
    if kind == "damped":
        return lorapro.LoraProAdamW(groups, lr=0.01, x=x, damping=3.0, **options)
    return lorapro.LoraProAdamW(groups, lr=0.01, mode=kind, x=x, **options)


def schedule(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (t + 1) / 5 if t < 5 else 0.98**t)


def twin(kind, pair, x, **options):
    A, B = pair.A.detach().numpy().copy(), pair.B.detach().numpy().copy()
    if kind == "sgd":
        return paper.Sgd(A, B, pair.scaling, x=x, **options)
    if kind in ("efficient", "damped"):
        options["damping"] = 3.0 if kind == "damped" else 0.0
        return paper.Efficient(A, B, pair.scaling, x=x, **options)
    return paper.Full(A, B, pair.scaling, x=x, W0=pair.base.detach().numpy(), **options)


@pytest.mark.parametrize("x", ["sylvester", "zero", "symmetric"])
@pytest.mark.parametrize("kind", ["sgd", "efficient", "damped", "full"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("start", ["B=0", "B random"])
def test_fifty_steps_equal_the_paper(kind, x, model, start):
    model = MODELS[model]()
    if start == "B random":
        randomise_B(model)
    pairs = pairs_of(model)
    options = {"weight_decay": 0.1}
    optimizer = build(kind, model, x, **options)
    scheduler = schedule(optimizer)
    twins = [twin(kind, pair, x, **options) for pair in pairs]
    generator = torch.Generator().manual_seed(0)
    for t in range(STEPS):
        if t == STEPS // 2:  # go on in a fresh optimizer, from what a file holds
            states = through_a_file(optimizer.state_dict()), scheduler.state_dict()
            optimizer = build(kind, model, x, **options)
            scheduler = schedule(optimizer)
            optimizer.load_state_dict(states[0])
            scheduler.load_state_dict(states[1])
        lr = optimizer.param_groups[0]["lr"]
        for pair, reference in zip(pairs, twins, strict=True):
            G = torch.randn(pair.shape, generator=generator, dtype=torch.float64)
            feed_dense_gradient(pair, G)
            reference.step(pair.A.grad.numpy(), pair.B.grad.numpy(), lr)
        optimizer.step()
        scheduler.step()
        for pair, reference in zip(pairs, twins, strict=True):
            np.testing.assert_allclose(pair.A.detach(), reference.A, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(pair.B.detach(), reference.B, rtol=1e-9, atol=1e-9)
            if kind == "full":
                np.testing.assert_allclose(pair.base.detach(), reference.W0, rtol=1e-12)


def test_sgd_momentum_is_torchs_on_aligned_gradients():
    model = randomise_B(mlp())
    pairs = pairs_of(model)
    optimizer = build("sgd", model, "sylvester", momentum=0.9, weight_decay=0.05)
    twins = [twin("sgd", p, "sylvester", momentum=0.9, weight_decay=0.05) for p in pairs]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for pair, reference in zip(pairs, twins, strict=True):
            G = torch.randn(pair.shape, generator=generator, dtype=torch.float64)
            feed_dense_gradient(pair, G)
            reference.step(pair.A.grad.numpy(), pair.B.grad.numpy(), 0.02)
        optimizer.step()
    for pair, reference in zip(pairs, twins, strict=True):
        np.testing.assert_allclose(pair.A.detach(), reference.A, atol=1e-9)


@pytest.mark.parametrize("x", ["sylvester", "zero", "symmetric"])
@pytest.mark.parametrize("r", [6, 7])
def test_full_mode_at_full_rank_is_adamw_on_the_weight(x, r):
    """With r = min(m, n) the tangent space is everything: the step of W is AdamW's, to O(lr²)."""
    torch.manual_seed(0)
    m, n = (6, 9) if r == 6 else (9, 7)
    A = torch.nn.Parameter(torch.randn(r, n, dtype=torch.float64))
    B = torch.nn.Parameter(torch.randn(m, r, dtype=torch.float64))
    pair = lorapro.factors.LoraPair("w", A, B, scaling=1.5)
    steps = 4
    errors = []
    for lr in (1e-4, 1e-5):
        with torch.no_grad():
            A.copy_(torch.randn(r, n, generator=torch.Generator().manual_seed(1)))
            B.copy_(torch.randn(m, r, generator=torch.Generator().manual_seed(2)))
        W = torch.nn.Parameter((1.5 * B @ A).detach().clone())
        optimizer = lorapro.LoraProAdamW(
            lorapro.lora_param_groups(None, pairs=[pair]), lr=lr, mode="full", x=x
        )
        adamw = torch.optim.AdamW([W], lr=lr, weight_decay=0.0)
        generator = torch.Generator().manual_seed(3)
        start = W.detach().clone()
        for _ in range(steps):
            W.grad = torch.randn(m, n, generator=generator, dtype=torch.float64)
            feed_dense_gradient(pair, W.grad)
            optimizer.step()
            adamw.step()
        end = W.detach()
        errors.append(float((1.5 * (B @ A).detach() - end).norm() / (end - start).norm()))
    assert errors[0] < 0.05
    assert errors[1] < max(0.2 * errors[0], 1e-9)  # the rest is second order in lr
