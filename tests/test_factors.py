"""Pairs of real PEFT layers against the dense gradient of the weight they adapt."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig

import lorapro
from layer_cases import (
    CASES,
    PREFIX,
    Attention,
    Case,
    R,
    S,
    adapted,
    causal_lm,
    delta,
    dense_gradients,
    factors,
    token_loss,
)
from lorapro.factors import LoraPair, as_A, as_B, find_pairs, from_A, from_B
from reference import dense


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(sum(map(ord, request.param)))
    return CASES[request.param]()


def test_pairs_carry_the_gradient_of_the_effective_weight(case):
    model = adapted(case)
    pairing = find_pairs(model)
    pairs = {pair.name.removeprefix(PREFIX): pair for pair in pairing.pairs}
    assert not pairing.unaligned
    assert set(pairs) == set(case.weights)

    want_loss, want = dense_gradients(case, model)
    loss = case.loss(model(*case.inputs))
    torch.testing.assert_close(loss, want_loss, rtol=1e-10, atol=1e-12)
    loss.backward()
    for path, weight in case.weights.items():
        pair, s = pairs[path], weight.scaling
        assert (pair.layout, pair.blocks, pair.rank) == (weight.layout, weight.blocks, weight.rank)
        assert pair.scaling == pytest.approx(s, rel=1e-12)
        assert pair.shape == tuple(want[path].shape[1:])
        assert float(want[path].norm()) > 1e-3  # there is something to compare
        A, B = pair.matrices(pair.A.detach(), pair.B.detach())
        grad_A, grad_B = pair.matrices(pair.A.grad, pair.B.grad)
        for k, (A_k, B_k) in enumerate(factors(model, path, weight)):
            torch.testing.assert_close((A[k], B[k]), (A_k, B_k), rtol=0, atol=0)
            g = want[path][k]
            close = {"rtol": 0, "atol": 1e-9 * float(want[path].norm())}
            torch.testing.assert_close(grad_A[k], s * B_k.T @ g, **close)
            torch.testing.assert_close(grad_B[k], s * g @ A_k.T, **close)


def test_one_step_moves_the_effective_weight_along_the_projection(case):
    model = adapted(case)
    lr = 1e-7
    _, g = dense_gradients(case, model)
    before = {path: delta(model, path, w) for path, w in case.weights.items()}
    at = {path: factors(model, path, w) for path, w in case.weights.items()}
    optimizer = lorapro.create_lorapro_optimizer(model, optimizer="sgd", lr=lr)
    case.loss(model(*case.inputs)).backward()
    optimizer.step()
    for path, weight in case.weights.items():
        moved = (delta(model, path, weight) - before[path]) / -lr
        for k, (A, B) in enumerate(at[path]):
            want = dense.projection(A.numpy(), B.numpy(), g[path][k].numpy())
            tolerance = 1e-4 * float(g[path].abs().max())
            np.testing.assert_allclose(moved[k].numpy(), want, rtol=0, atol=tolerance)


def test_views_are_undone_exactly(case):
    for pair in find_pairs(adapted(case)).pairs:
        A, B = pair.matrices(pair.A.detach(), pair.B.detach())
        assert A.shape == (pair.blocks, pair.rank, pair.shape[1])
        assert B.shape == (pair.blocks, pair.shape[0], pair.rank)
        assert torch.equal(as_A(pair.A, pair.layout, pair.blocks), A)
        assert torch.equal(as_B(pair.B, pair.layout, pair.blocks), B)
        assert torch.equal(from_A(A, pair.A), pair.A)
        assert torch.equal(from_B(B, pair.B, pair.layout), pair.B)


def test_the_base_is_the_weight_that_forward_uses(case):
    """Scaling ``base`` in place, as weight decay in full mode does, must change the output."""
    model = adapted(case)
    case.loss(model(*case.inputs))  # PEFT may replace parameters in a forward pass
    for pair in find_pairs(model).pairs:
        path = pair.name.removeprefix(PREFIX)
        if isinstance(case.net, Attention):
            assert pair.base is None  # PEFT makes these anew in every forward pass
            continue
        want = case.net.get_parameter(case.weights[path].parameter).double()
        torch.testing.assert_close(pair.base, want)
        with torch.no_grad():
            loss = case.loss(model(*case.inputs))
            pair.base.mul_(0.5)
            assert float((case.loss(model(*case.inputs)) - loss).abs()) > 1e-6
            pair.base.mul_(2.0)


def test_activated_lora_sees_the_tokens_after_its_invocation():
    """aLoRA masks tokens: g is the gradient of a weight that the other tokens do not use."""
    torch.manual_seed(0)
    net = causal_lm(LlamaConfig)
    config = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    case = Case(net, {**config, "alora_invocation_tokens": [5, 6]}, {}, ())
    model = adapted(case)
    ids = torch.tensor([[3, 5, 6, 4, 7], [1, 2, 3, 4, 7]])  # invoked from position 1 on, and never
    (pair,) = find_pairs(model).pairs
    token_loss(model(input_ids=ids)).backward()

    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.float64)
    leaf = (S * pair.B @ pair.A).detach().requires_grad_()
    base = copy.deepcopy(net).double()
    base.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda module, args, out: out + mask[..., None] * (args[0] @ leaf.T)
    )
    loss = token_loss(base(input_ids=ids))
    (g,) = torch.autograd.grad(loss, leaf)
    assert float(g.norm()) > 1e-3
    torch.testing.assert_close(pair.A.grad, S * pair.B.detach().T @ g, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(pair.B.grad, S * g @ pair.A.detach().T, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_frozen_factor_leaves_the_other_its_least_squares(kind):
    """MiCA freezes B. The step of A is the best that A alone can do: P_B g."""
    torch.manual_seed(0)
    case = CASES[kind]()
    case.net.float()
    case.config["init_lora_weights"] = "mica"
    case.weights = {"0": case.weights["0"]}
    case.config["target_modules"] = ["0"]
    config = LoraConfig(r=R, lora_alpha=S * R, **case.config)
    model = get_peft_model(copy.deepcopy(case.net), config).double()
    (pair,) = find_pairs(model).pairs
    assert pair.A.requires_grad
    assert not pair.B.requires_grad
    B = pair.B.detach().clone()
    _, g = dense_gradients(case, model)
    optimizer = lorapro.create_lorapro_optimizer(model, optimizer="sgd", lr=0.1)
    case.loss(model(*case.inputs)).backward()
    before = delta(model, "0", case.weights["0"])
    optimizer.step()
    assert torch.equal(pair.B, B)
    want = B @ torch.linalg.pinv(B) @ g["0"][0]
    moved = (delta(model, "0", case.weights["0"]) - before)[0] / -0.1
    torch.testing.assert_close(moved, want, rtol=1e-8, atol=1e-10)


def test_by_hand():
    A, B = nn.Parameter(torch.zeros(2, 5)), nn.Parameter(torch.zeros(3, 2))
    pair = LoraPair("w", A, B, scaling=2.0)
    assert (pair.rank, pair.shape, pair.blocks, pair.base) == (2, (3, 5), 1, None)
    two = LoraPair("w", nn.Parameter(torch.zeros(4, 5)), nn.Parameter(torch.zeros(3, 4)), 1.0)
    two = LoraPair("w", two.A, two.B, 1.0, "experts", 2)
    assert (two.rank, two.shape) == (2, (3, 5))


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 5), (3, 4)), {}, r"'w': A \(2, 5\) and B \(3, 4\) differ in rank.*B \(m, r\)"),
        (((2, 5), (3, 2)), {"scaling": 0.0}, r"scaling 0.0, expected a positive number"),
        (((2, 5), (3, 2)), {"scaling": float("nan")}, r"scaling nan"),
        (((2, 5), (3, 2)), {"scaling": float("inf")}, r"scaling inf"),
        (((2, 5), (3, 2)), {"layout": "rows"}, r"'rows' is not one of.*'experts'"),
        (((5, 5), (3, 5)), {"layout": "experts", "blocks": 2}, r"do not fit .* 2 block"),
        (((4, 5), (3, 2)), {"layout": "groups", "blocks": 2}, r"do not fit .* 2 block"),
        (((0,), (0,)), {}, r"A \(0,\) and B \(0,\), expected matrices.*ZeRO-3"),
    ],
)
def test_what_is_no_pair_says_so(shapes, options, message):
    A, B = (nn.Parameter(torch.zeros(shape)) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        LoraPair("w", A, B, **{"scaling": 1.0, **options})
