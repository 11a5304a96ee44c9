"""Alignment against dense least squares, limit cases, precision, isolation of broken pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lorapro.functional as F
from reference import dense, paper

XS = ("zero", "sylvester", "symmetric")


def random_pair(case, m=7, n=9, r=3, seed=0):
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal((r, n)), rng.standard_normal((m, r))
    if case in ("B=0", "both=0"):
        B[:] = 0
    if case in ("A=0", "both=0"):
        A[:] = 0
    if case == "dead row":
        A[1] = 0
    if case == "rank of B":
        B[:, 2] = 2 * B[:, 0] - B[:, 1]
    if case == "rank of both":
        B[:, 2], A[0] = 3 * B[:, 1], A[1] + A[2]
    if case == "uneven":
        B *= 1e-3
    return A, B, rng.standard_normal((m, n))


CASES = (
    "full rank",
    "B=0",
    "A=0",
    "both=0",
    "dead row",
    "rank of B",
    "rank of both",
    "uneven",
)


def tensors(*arrays, dtype=torch.float64):
    return [torch.tensor(a, dtype=dtype) for a in arrays]


@pytest.mark.parametrize("x", XS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", [(7, 9, 3), (3, 9, 3), (8, 4, 4), (2, 3, 4), (5, 5, 1)])
def test_align_is_the_dense_least_squares_solution(x, case, shape):
    m, n, r = shape
    if r < 3 and case not in ("full rank", "B=0", "A=0", "both=0", "uneven"):
        pytest.skip("the case needs rank 3")
    A, B, g = random_pair(case, m, n, r)
    s = 1.7
    want = dense.least_squares(A, B, g, s, x)
    tA, tB, tg = tensors(A, B, g)
    got = F.align(tA, tB, s * tB.T @ tg, s * tg @ tA.T, s, x=x)
    for have, expected in zip(got, want, strict=True):
        scale = max(1.0, np.abs(expected).max(initial=0))
        np.testing.assert_allclose(have.numpy(), expected, rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("x", XS)
def test_batches_give_what_single_pairs_give(x):
    rows = [random_pair(c, seed=i) for i, c in enumerate(CASES)]
    s = torch.linspace(0.5, 3.0, len(rows), dtype=torch.float64)
    A, B, g = (torch.stack(tensors(*[row[i] for row in rows])) for i in range(3))
    g_A, g_B = s[:, None, None] * B.mT @ g, s[:, None, None] * g @ A.mT
    d_A, d_B = F.align(A, B, g_A, g_B, s, x=x)
    for i in range(len(rows)):
        one = F.align(A[i], B[i], g_A[i], g_B[i], float(s[i]), x=x)
        torch.testing.assert_close((d_A[i], d_B[i]), one, rtol=1e-11, atol=1e-11)
    shaped = [t.reshape(2, 4, *t.shape[1:]) for t in (A, B, g_A, g_B)]
    two = F.align(*shaped, s.reshape(2, 4), x=x)
    torch.testing.assert_close(two[0].reshape(d_A.shape), d_A)


@pytest.mark.parametrize("case", CASES)
def test_equivalent_gradient_is_the_projection_for_every_x(case):
    A, B, g = random_pair(case)
    want = dense.projection(A, B, g)
    tA, tB, tg = tensors(A, B, g)
    np.testing.assert_allclose(F.tangent_projection(tA, tB, tg).numpy(), want, atol=1e-10)
    for x in XS:
        d_A, d_B = F.align(tA, tB, 2 * tB.T @ tg, 2 * tg @ tA.T, 2.0, x=x)
        have = F.equivalent_gradient(tA, tB, d_A, d_B, 2.0)
        np.testing.assert_allclose(have.numpy(), want, atol=1e-10)
    # Pythagoras, Theorem 2.2
    decrease = F.predicted_decrease(tA, tB, 2 * tB.T @ tg, 2 * tg @ tA.T, 2.0)
    assert float(decrease) == pytest.approx((want**2).sum(), rel=1e-10, abs=1e-12)
    residual = ((want - g) ** 2).sum()
    assert residual == pytest.approx((g**2).sum() - (want**2).sum(), rel=1e-10)


@pytest.mark.parametrize("shape", [(4, 9, 4), (9, 4, 4), (5, 5, 5)])
def test_full_rank_recovers_the_gradient(shape):
    A, B, g = tensors(*random_pair("full rank", *shape))
    d_A, d_B = F.align(A, B, 3 * B.T @ g, 3 * g @ A.T, 3.0)
    torch.testing.assert_close(F.equivalent_gradient(A, B, d_A, d_B, 3.0), g)


def test_a_frozen_factor_leaves_the_other_its_own_least_squares():
    A, B, g = random_pair("full rank")
    tA, tB, tg = tensors(A, B, g)
    none, d_B = F.align(tA, tB, None, 2 * tg @ tA.T, 2.0)
    assert none is None
    want = np.linalg.lstsq(2 * A.T, g.T, rcond=None)[0].T
    np.testing.assert_allclose(d_B.numpy(), want, atol=1e-10)
    d_A, none = F.align(tA, tB, 2 * tB.T @ tg, None, 2.0)
    assert none is None
    np.testing.assert_allclose(d_A.numpy(), np.linalg.lstsq(2 * B, g, rcond=None)[0], atol=1e-10)


def with_condition(rows, columns, cond, rng):
    U = np.linalg.qr(rng.standard_normal((rows, columns)))[0]
    V = np.linalg.qr(rng.standard_normal((columns, columns)))[0]
    return U @ np.diag(np.geomspace(1, 1 / cond, columns)) @ V.T


@pytest.mark.parametrize("x", XS)
@pytest.mark.parametrize(("cond", "most"), [(10, 1e-6), (160, 1e-5), (1e3, 1e-4), (1e5, 0.3)])
@pytest.mark.parametrize("r", [8, 64])
def test_float32_projects_to_its_precision_and_never_lengthens(x, r, cond, most):
    rng = np.random.default_rng(0)
    m, n = 384, 256
    B = torch.tensor(with_condition(m, r, cond, rng), dtype=torch.float32)
    A = torch.tensor(rng.standard_normal((r, n)), dtype=torch.float32)
    g = torch.tensor(rng.standard_normal((m, n)), dtype=torch.float32)
    d_A, d_B = F.align(A, B, 2 * B.T @ g, 2 * g @ A.T, 2.0, x=x)
    assert d_A.dtype == torch.float32
    have = F.equivalent_gradient(*(t.double() for t in (A, B, d_A, d_B)), 2.0)
    want = torch.tensor(dense.fast_projection(A.numpy(), B.numpy(), g.numpy()))
    assert float((have - want).norm() / want.norm()) < most
    assert float(have.norm()) <= float(g.double().norm())


@pytest.mark.parametrize("x", XS)
@pytest.mark.parametrize("cond", [1e8, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_of_a_million_times_each_others_size_lengthen_little(x, cond, dtype):
    rng = np.random.default_rng(0)
    B = torch.tensor(1e6 * with_condition(40, 8, cond, rng)).to(dtype)
    A = torch.tensor(with_condition(30, 8, 1e3, rng).T).to(dtype)
    g = torch.tensor(rng.standard_normal((40, 30)))
    gradients = (2 * B.double().T @ g).to(dtype), (2 * g @ A.double().T).to(dtype)
    directions = F.align(A, B, *gradients, 2.0, x=x)
    have = F.equivalent_gradient(*(t.double() for t in (A, B, *directions)), 2.0)
    # d_A is rounded to its dtype and multiplied by B.
    rounding = torch.finfo(dtype).eps * 2 * B.double().norm() * directions[0].double().norm()
    assert float(have.norm()) <= 1.01 * float(g.norm()) + float(rounding)


@pytest.mark.parametrize("cond", [1, 10, 100])
@pytest.mark.parametrize("r", [8, 32])
def test_float32_shares_the_step_as_sylvester_does_to_a_percent(r, cond):
    rng = np.random.default_rng(0)
    A, B = with_condition(96, r, cond, rng).T, 0.1 * with_condition(64, r, 30, rng)
    g = rng.standard_normal((64, 96))
    want = paper.theorem_2_1(A, B, B.T @ g, g @ A.T, 1.0, "sylvester")
    tA, tB, tg = tensors(A, B, g)
    got = F.align(tA.float(), tB.float(), (tB.T @ tg).float(), (tg @ tA.T).float(), 1.0)
    for have, expected in zip(got, want, strict=True):
        error = np.linalg.norm(have.double().numpy() - expected)
        assert error < 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_starts_at_zero_moves_the_other_factor_alone(dtype):
    A, B, g = tensors(*random_pair("full rank"), dtype=dtype)
    for a, b, still in ((A, 0 * B, 0), (0 * A, B, 1)):
        directions = F.align(a, b, b.T @ g, g @ a.T, 1.0)
        assert not directions[still].any()
        assert directions[1 - still].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("x", XS)
def test_damping_is_the_dense_ridge_regression_and_forgets_how_a_product_is_shared(x, dtype):
    A, B, g = tensors(*random_pair("uneven"), dtype=dtype)
    s, length = 2.0, 0.03
    d_A, d_B = F.align(A, B, s * B.T @ g, s * g @ A.T, s, x=x, damping=length)
    # In orthonormal coordinates of A, directions of s·B·A have the singular values of L.
    Q = torch.linalg.qr(A.T)[0].T
    U, sigma, _ = torch.linalg.svd(s * B @ A @ Q.T, full_matrices=False)
    P = U * (sigma**2 / (sigma**2 + length**2)) @ U.T
    have = F.equivalent_gradient(A, B, d_A, d_B, s)
    want = P @ g + (g - P @ g) @ Q.T @ Q
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    assert (have * g).sum() > 0
    T = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.5, 0.0], [1.0, 0.0, 3.0]], dtype=dtype)
    A, B = torch.linalg.solve(T, A), B @ T
    d_A, d_B = F.align(A, B, s * B.T @ g, s * g @ A.T, s, x=x, damping=length)
    torch.testing.assert_close(F.equivalent_gradient(A, B, d_A, d_B, s), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_computed_in_more_of_it(dtype):
    A, B, g = tensors(*random_pair("full rank", 40, 30, 4), dtype=dtype)
    g_A, g_B = (B.T.double() @ g.double()).to(dtype), (g.double() @ A.T.double()).to(dtype)
    d_A, d_B = F.align(A, B, g_A, g_B, 1.0)
    assert d_A.dtype == d_B.dtype == dtype
    exact = F.align(*(t.double() for t in (A, B, g_A, g_B)), 1.0)
    for have, want in zip((d_A, d_B), exact, strict=True):
        torch.testing.assert_close(have.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("x", XS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["A", "B", "grad_A", "grad_B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_broken_pair_spoils_no_other(x, bad, where, dtype):
    rows = [random_pair("full rank", seed=i) for i in range(3)]
    A, B, g = (torch.stack(tensors(*[r[i] for r in rows], dtype=dtype)) for i in range(3))
    parts = {"A": A, "B": B, "grad_A": B.mT @ g, "grad_B": g @ A.mT}
    clean = F.align(*parts.values(), 1.0, x=x)
    parts[where] = parts[where].clone()
    parts[where][1, 0, 1] = bad
    broken = F.align(*parts.values(), 1.0, x=x)
    for have, want in zip(broken, clean, strict=True):
        torch.testing.assert_close(have[[0, 2]], want[[0, 2]], rtol=1e-6, atol=1e-7)
        assert torch.isfinite(have[[0, 2]]).all()
    assert not torch.isfinite(torch.cat([t[1].flatten() for t in broken])).all()


def test_bad_arguments_say_what_was_expected():
    A, B = torch.ones(2, 5), torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"'sylvestre'.*did you mean 'sylvester'"):
        F.align(A, B, A, B, 1.0, x="sylvestre")
    with pytest.raises(ValueError, match=r"\(2, 5\) and B \(2, 4\)"):
        F.align(A, B.T, A, B.T, 1.0)
    with pytest.raises(ValueError, match=r"gradient or direction of B.*\(5, 2\).*\(4, 2\)"):
        F.align(A, B, A, torch.ones(5, 2), 1.0)
    with pytest.raises(ValueError, match=r"G has shape \(3, 5\), expected \(\.\.\., 4, 5\)"):
        F.tangent_projection(A, B, torch.ones(3, 5))
