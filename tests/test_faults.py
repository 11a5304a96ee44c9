"""What goes wrong while a model trains: followed, kept to the pair it happens in, or named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorapro
import lorapro.functional as F
from fault_cases import create, every_kind, trained
from helpers import loss_of, mlp, pairs_of, randomise_B


@every_kind
def test_a_step_without_any_gradient_names_a_pair(kind):
    model = mlp()
    with pytest.raises(ValueError, match=r"none of 2 pairs has a gradient .*base_model\.model\.0"):
        create(model, kind).step()
    for p in model.parameters():
        p.grad = None
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    lorapro.align_gradients(optimizer, model)
    with pytest.raises(ValueError, match="none of 2 pairs has a gradient"):
        optimizer.step()


@every_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_one_pair_stays_in_it(kind, value):
    model, twin = trained(), trained()
    pairs_of(model)[0].A.grad[0, 0] = value
    create(model, kind).step()
    create(twin, kind).step()
    one, other = pairs_of(model)[1], pairs_of(twin)[1]
    torch.testing.assert_close((one.A, one.B), (other.A, other.B), rtol=1e-12, atol=0)


@every_kind
def test_zero_and_missing_gradients_move_nothing(kind):
    model = trained()
    first, second = pairs_of(model)
    before = [p.detach().clone() for p in (first.A, first.B, second.A, second.B)]
    first.A.grad = first.B.grad = None
    for p in (second.A, second.B):
        p.grad.zero_()
    create(model, kind).step()
    after = [p.detach() for p in (first.A, first.B, second.A, second.B)]
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-14)


@every_kind
@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_steps_are_finite_at_any_magnitude_of_gradients(kind, size):
    model = randomise_B(mlp())
    optimizer = create(model, kind)
    for seed in range(2):
        optimizer.zero_grad()
        (size * loss_of(model, seed=seed)).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    r=st.integers(1, 6),
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    x=st.sampled_from(F.X_CHOICES),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_alignment_descends_and_never_lengthens_g(r, m, n, x, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    A, B, g = (torch.randn(s, generator=generator).to(dtype) for s in ((r, n), (m, r), (m, n)))
    s = 2.0
    wide = (A.double(), B.double(), g.double())
    d_A, d_B = F.align(A, B, (s * B.T @ g), (s * g @ A.T), s, x=x)
    assert (d_A.dtype, d_A.shape, d_B.shape) == (dtype, A.shape, B.shape)
    if dtype != torch.float64:
        assert d_A.isfinite().all()
        assert d_B.isfinite().all()
        return
    moved = F.equivalent_gradient(A, B, d_A, d_B, s)
    assert (moved * wide[2]).sum() >= -1e-6 * wide[2].square().sum()
    assert moved.norm() <= wide[2].norm() * (1 + 1e-6)
