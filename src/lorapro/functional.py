"""The mathematics of LoRA-Pro as pure, batched tensor functions.

Shape letters used in this file
    m, n   rows and columns of the adapted weight ``W = W0 + s·B·A``  (``m`` = out, ``n`` = in)
    r      rank;   A: (..., r, n),   B: (..., m, r)
    s      scaling of the pair, a float or a tensor that broadcasts over the leading dimensions
    g      ``∂L/∂W`` (m, n), never formed here;  ``grad_A = s·Bᵀg`` and ``grad_B = s·g·Aᵀ``
    S_A    ``A·Aᵀ`` (r, r);   S_B  ``Bᵀ·B`` (r, r);   K  ``grad_A·Aᵀ = Bᵀ·grad_B`` (r, r)
    P_A    projector on the row space of A;   P_B  projector on the column space of B
    …⁺     pseudo-inverse, decided from the factor's own spectrum

Everything holds for factors of any rank, zero included: LoRA starts at ``B = 0``. Small (r, r)
algebra runs in float64 and results come back in the dtype of the input.

Source: LoRA-Pro, "Are Low-Rank Adapters Properly Optimized?", Theorems 2.1 to 2.3. Eq. (16) of the
paper is misprinted; ``docs/mathematics.md`` derives the form used here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lorapro.choices import check_choice

__all__ = [
    "X_CHOICES",
    "Spectrum",
    "align",
    "align_in",
    "equivalent_gradient",
    "predicted_decrease",
    "spectrum",
    "tangent_projection",
]

X_CHOICES = ("zero", "sylvester", "symmetric")

# Singular values below RANK_TOLERANCE · eps · (the largest) are rounding noise of the factor.
RANK_TOLERANCE = 32


class Spectrum(NamedTuple):
    """Eigenvectors and eigenvalues of both Gram matrices, in float64, with pseudo-inverses.

    ``S_A = U_A diag(eig_A) U_Aᵀ`` and ``S_B = U_B diag(eig_B) U_Bᵀ``; ``inv_A`` and ``inv_B`` hold
    the reciprocal eigenvalues, zero where the factor has no rank. A pair whose factors hold NaN or
    Inf has NaN throughout, and no other pair of the batch is touched by it.
    """

    U_A: Tensor
    eig_A: Tensor
    inv_A: Tensor
    U_B: Tensor
    eig_B: Tensor
    inv_B: Tensor


def spectrum(A: Tensor, B: Tensor) -> Spectrum:
    """Decompose ``S_A = A·Aᵀ`` and ``S_B = Bᵀ·B`` of every pair of the batch.

    Args:
        A: (..., r, n), any floating dtype.
        B: (..., m, r).

    Returns:
        A :class:`Spectrum` in float64 with leading dimensions as given.

    >>> A, B = torch.eye(2, 3), torch.zeros(4, 2)
    >>> s = spectrum(A, B)
    >>> s.inv_A.tolist(), s.inv_B.tolist()
    ([1.0, 1.0], [0.0, 0.0])
    """
    return Spectrum(*_gram_eigen(A), *_gram_eigen(B.mT))


def align(
    A: Tensor,
    B: Tensor,
    grad_A: Tensor | None,
    grad_B: Tensor | None,
    scaling: float | Tensor,
    *,
    x: str = "sylvester",
) -> tuple[Tensor | None, Tensor | None]:
    """Replace LoRA's two gradients by those whose equivalent gradient is closest to ``g``.

    Theorem 2.1, Eqs. (8) and (10)::

        d_A = (1/s²) S_B⁺ grad_A + X A
        d_B = (1/s²) (I − P_B) grad_B S_A⁺ − B X

    ``s·B·d_A + s·d_B·A`` is the same for every X: the orthogonal projection of ``g`` on the tangent
    space at ``B·A``. What X changes is how that step is shared between A and B:

    - ``"zero"``: ``X = 0``.
    - ``"sylvester"``: (d_A, d_B) as close as can be to (grad_A, grad_B), Theorem 2.3:
      ``S_B X + X S_A = −(1/s²) S_B⁺ K``.
    - ``"symmetric"``: ``‖d_B A − B d_A‖`` as small as can be: ``X = −(1/2s²) S_B⁺ K S_A⁺``
      (what Eq. 16 of the paper means).

    With factors of deficient rank the solution of least norm is taken; at ``B = 0`` that is
    ``d_A = 0``, ``d_B = (1/s²) grad_B S_A⁺``.

    Args:
        A: (..., r, n) factor, float64 to bfloat16.
        B: (..., m, r) factor.
        grad_A: (..., r, n), ``∂L/∂A``; ``None`` if A is frozen, then d_B alone solves the problem:
            ``d_B = (1/s²) grad_B S_A⁺``.
        grad_B: (..., m, r), ``∂L/∂B``; ``None`` if B is frozen, then ``d_A = (1/s²) S_B⁺ grad_A``.
        scaling: ``s``, a float or a tensor with the leading dimensions.
        x: the choice of X.

    Returns:
        ``(d_A, d_B)`` with the shapes and dtypes of A and B; ``None`` where the gradient was.

    Raises:
        ValueError: shapes that do not belong together, or an unknown ``x``.

    >>> A, B = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0], [0.0]])   # LoRA's start: B = 0
    >>> g = torch.tensor([[3.0, 5.0], [7.0, 11.0]])
    >>> d_A, d_B = align(A, B, B.T @ g, g @ A.T, 1.0)
    >>> equivalent_gradient(A, B, d_A, d_B, 1.0)         # g·P_A: the first column of g
    tensor([[3., 0.],
            [7., 0.]])
    """
    check_choice("x", x, X_CHOICES)
    _check_shapes(A, B, grad_A, grad_B)
    d_A, d_B = align_in(spectrum(A, B), A, B, grad_A, grad_B, scaling, x=x)
    return (
        None if d_A is None else d_A.to(A.dtype),
        None if d_B is None else d_B.to(B.dtype),
    )


def align_in(
    spec: Spectrum,
    A: Tensor,
    B: Tensor,
    grad_A: Tensor | None,
    grad_B: Tensor | None,
    scaling: float | Tensor,
    *,
    x: str = "sylvester",
) -> tuple[Tensor | None, Tensor | None]:
    """:func:`align` where ``spectrum(A, B)`` is already at hand; results stay in float64.

    >>> A, B = torch.ones(1, 2), torch.ones(2, 1)
    >>> d_A, _ = align_in(spectrum(A, B), A, B, A, B, 1.0, x="zero")
    >>> d_A
    tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """
    U_A, eig_A, inv_A, U_B, eig_B, inv_B = spec
    c = _per_pair(scaling, A) ** -2
    d_A = d_B = None
    if grad_A is not None:
        grad_A = grad_A.double()
        pinv_B = (U_B * inv_B.unsqueeze(-2)) @ U_B.mT
        d_A = pinv_B @ grad_A
    if grad_B is not None:
        pinv_A = (U_A * inv_A.unsqueeze(-2)) @ U_A.mT
        d_B = grad_B.double() @ pinv_A
    if grad_A is not None and d_A is not None and d_B is not None:
        A, B = A.double(), B.double()
        kept = (inv_B != 0).unsqueeze(-1) & (inv_A != 0).unsqueeze(-2)
        K = torch.where(kept, U_B.mT @ (grad_A @ A.mT) @ U_A, 0.0)
        X, C = _choose_x(K, eig_A, inv_A, eig_B, inv_B, x)
        if X is not None:
            d_A = d_A + (U_B @ X @ U_A.mT) @ A
        d_B = d_B - B @ (U_B @ C @ U_A.mT)
    return (None if d_A is None else c * d_A), (None if d_B is None else c * d_B)


def equivalent_gradient(
    A: Tensor, B: Tensor, d_A: Tensor, d_B: Tensor, scaling: float | Tensor
) -> Tensor:
    """The gradient on W that a step along (d_A, d_B) amounts to, Eq. (1): ``s·B·d_A + s·d_B·A``.

    Args:
        A: (..., r, n); B: (..., m, r); d_A and d_B: directions of their shapes.
        B: see A.
        d_A: see A.
        d_B: see A.
        scaling: ``s``, a float or a tensor with the leading dimensions.

    Returns:
        (..., m, n), computed in float32 at least, in the dtype of A. Its rank is at most 2r.

    Raises:
        ValueError: shapes that do not belong together.

    >>> one = torch.ones(1, 1)
    >>> equivalent_gradient(2 * one, 3 * one, one, one, 0.5)
    tensor([[2.5000]])
    """
    _check_shapes(A, B, d_A, d_B)
    dtype, work = A.dtype, _at_least_float32(A.dtype)
    A, B, d_A, d_B = (t.to(work) for t in (A, B, d_A, d_B))
    return (_per_pair(scaling, A).to(work) * (B @ d_A + d_B @ A)).to(dtype)


def tangent_projection(A: Tensor, B: Tensor, G: Tensor) -> Tensor:
    """Project G on the tangent space of the rank-r matrices at ``B·A``.

    ``P_B G + G P_A − P_B G P_A``, the equivalent gradient of LoRA-Pro for every X; its distance to
    G is the smallest that any (d_A, d_B) can reach (Theorem 2.1).

    Args:
        A: (..., r, n).
        B: (..., m, r).
        G: (..., m, n).

    Returns:
        (..., m, n) in the dtype of G.

    Raises:
        ValueError: shapes that do not belong together.

    >>> A, B = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [1.0]])
    >>> tangent_projection(A, B, torch.ones(2, 2))
    tensor([[1., 0.],
            [1., 1.]])
    """
    _check_shapes(A, B, None, None)
    if G.shape[-2:] != (B.shape[-2], A.shape[-1]):
        raise ValueError(
            f"G has shape {tuple(G.shape)}, expected (..., {B.shape[-2]}, {A.shape[-1]}) "
            f"for A {tuple(A.shape)} and B {tuple(B.shape)}."
        )
    spec = spectrum(A, B)
    Q_A = (spec.U_A * spec.inv_A.sqrt().unsqueeze(-2)).mT @ A.double()  # orthonormal rows
    Q_B = B.double() @ (spec.U_B * spec.inv_B.sqrt().unsqueeze(-2))  # orthonormal columns
    full = G.double()
    left = Q_B @ (Q_B.mT @ full)
    return (left + ((full - left) @ Q_A.mT) @ Q_A).to(G.dtype)


def predicted_decrease(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scaling: float | Tensor
) -> Tensor:
    """First-order decrease of the loss per unit of learning rate, Theorem 2.2, Eq. (13).

    ``−dL/γ = ⟨grad_A, d_A⟩ + ⟨grad_B, d_B⟩ = ‖g̃‖² ≥ 0``, the same for every X.

    Args:
        A: (..., r, n).
        B: (..., m, r).
        grad_A: (..., r, n).
        grad_B: (..., m, r).
        scaling: ``s``, a float or a tensor with the leading dimensions.

    Returns:
        (...,) one number a pair, in the dtype of A.

    Raises:
        ValueError: shapes that do not belong together.

    >>> A, B = torch.tensor([[2.0, 0.0]]), torch.zeros(2, 1)
    >>> g = torch.tensor([[3.0, 5.0], [4.0, 11.0]])
    >>> predicted_decrease(A, B, B.T @ g, g @ A.T, 1.0)              # ‖first column of g‖²
    tensor(25.)
    """
    _check_shapes(A, B, grad_A, grad_B)
    spec = spectrum(A, B)
    half_A = spec.U_A * spec.inv_A.sqrt().unsqueeze(-2)
    half_B = spec.U_B * spec.inv_B.sqrt().unsqueeze(-2)
    along_B = half_B.mT @ grad_A.double()
    across = grad_B.double() @ half_A
    basis_B = B.double() @ half_B
    across = across - basis_B @ (basis_B.mT @ across)
    total = along_B.square().sum((-2, -1)) + across.square().sum((-2, -1))
    return (total * (_per_pair(scaling, A) ** -2)[..., 0, 0]).to(A.dtype)


def _choose_x(
    K: Tensor, eig_A: Tensor, inv_A: Tensor, eig_B: Tensor, inv_B: Tensor, x: str
) -> tuple[Tensor | None, Tensor]:
    """X and ``C = S_B⁺ K S_A⁺ + X``, both times s², in the eigenbases.

    C is formed directly: for Sylvester the sum would cancel.
    """
    a, b = inv_A.unsqueeze(-2), inv_B.unsqueeze(-1)
    if x == "zero":
        return None, b * K * a
    if x == "symmetric":
        half = 0.5 * (b * K * a)
        return -half, half
    both = eig_B.unsqueeze(-1) + eig_A.unsqueeze(-2)
    share = torch.where(both > 0, K / torch.where(both > 0, both, 1.0), both * K)
    return -b * share, share * a


def _gram_eigen(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U, eig, inv) of ``M·Mᵀ``, M: (..., r, k), in float64."""
    finite = torch.isfinite(M).all(-1).all(-1)[..., None, None]
    M64 = torch.where(finite, M, 0.0).double()
    if M.dtype == torch.float64:
        # The Gram matrix would square the condition number beyond float64.
        U, sigma, _ = torch.linalg.svd(M64, full_matrices=M.shape[-2] > M.shape[-1])
        sigma = torch.nn.functional.pad(sigma, (0, M.shape[-2] - sigma.shape[-1]))
        eig = sigma.square()
    else:
        eig, U = torch.linalg.eigh(M64 @ M64.mT)
        eig = eig.clamp_min(0.0)
    eps = torch.finfo(_at_least_float32(M.dtype)).eps
    floor = eig.amax(-1, keepdim=True) * (RANK_TOLERANCE * eps) ** 2
    inv = torch.where(eig > floor, 1.0 / torch.where(eig > floor, eig, 1.0), 0.0)
    broken = torch.where(finite, 0.0, torch.nan)
    return U + broken, eig + broken[..., 0], inv + broken[..., 0]


def _per_pair(scaling: float | Tensor, like: Tensor) -> Tensor:
    """Scaling as float64 with two trailing ones, so that it broadcasts over matrices."""
    if not isinstance(scaling, Tensor):
        return torch.full((1, 1), scaling, dtype=torch.float64, device=like.device)
    return scaling.to(device=like.device, dtype=torch.float64)[..., None, None]


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check_shapes(A: Tensor, B: Tensor, like_A: Tensor | None, like_B: Tensor | None) -> None:
    if A.dim() < 2 or B.dim() < 2 or A.shape[-2] != B.shape[-1] or A.shape[:-2] != B.shape[:-2]:
        raise ValueError(
            f"A has shape {tuple(A.shape)} and B {tuple(B.shape)}; expected A (..., r, n) and "
            "B (..., m, r) with one rank r and the same leading dimensions."
        )
    for name, t, ref in (("A", like_A, A), ("B", like_B, B)):
        if t is not None and t.shape != ref.shape:
            raise ValueError(
                f"the gradient or direction of {name} has shape {tuple(t.shape)}, "
                f"expected that of {name}, {tuple(ref.shape)}."
            )
