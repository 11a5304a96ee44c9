"""The mathematics of LoRA-Pro as pure, batched tensor functions.

Shape letters used in this file
    m, n   rows and columns of the adapted weight ``W = W0 + s·B·A``  (``m`` = out, ``n`` = in)
    r      rank;   A: (..., r, n),   B: (..., m, r)
    s      scaling of the pair, a float or a tensor that broadcasts over the leading dimensions
    g      ``∂L/∂W`` (m, n), never formed here;  ``grad_A = s·Bᵀg`` and ``grad_B = s·g·Aᵀ``
    S_A    ``A·Aᵀ`` (r, r);   S_B  ``Bᵀ·B`` (r, r);   K  ``grad_A·Aᵀ = Bᵀ·grad_B`` (r, r)
    P_A    projector on the row space of A;   P_B  projector on the column space of B

There is one path on every device: no value is read to decide what runs. Products over m and n are
float32 for float32 factors, (r, r) algebra float64 (``lorapro.gram``). Factors may have any rank:
LoRA starts at ``B = 0``. Source: LoRA-Pro, "Are Low-Rank Adapters Properly Optimized?", Theorems
2.1 to 2.3; its Eq. (16) is misprinted, ``docs/mathematics.md`` derives the form used here.
"""

from __future__ import annotations

import torch
from torch import Tensor, bmm

from lorapro.choices import check_choice
from lorapro.gram import Rows, combine, solve_sylvester
from lorapro.point import Point, point_at

__all__ = [
    "X_CHOICES",
    "align",
    "align_at",
    "equivalent_gradient",
    "predicted_decrease",
    "tangent_projection",
]

X_CHOICES = ("zero", "sylvester", "symmetric")


def align(
    A: Tensor,
    B: Tensor,
    grad_A: Tensor | None,
    grad_B: Tensor | None,
    scaling: float | Tensor,
    *,
    x: str = "sylvester",
    damping: float | Tensor = 0.0,
) -> tuple[Tensor | None, Tensor | None]:
    """Replace LoRA's two gradients by those whose equivalent gradient is closest to ``g``.

    Theorem 2.1, Eqs. (8) and (10)::

        d_A = (1/s²) S_B⁻¹ grad_A + X A
        d_B = (1/s²) (I − P_B) grad_B S_A⁻¹ − B X

    ``s·B·d_A + s·d_B·A`` is the same for every X: the orthogonal projection of ``g`` on the tangent
    space at ``B·A``. What X changes is how that step is shared between A and B:

    - ``"zero"``: ``X = 0``.
    - ``"sylvester"``: (d_A, d_B) as close as can be to (grad_A, grad_B), Theorem 2.3:
      ``S_B X + X S_A = −(1/s²) S_B⁻¹ K``.
    - ``"symmetric"``: ``‖d_B A − B d_A‖`` as small as can be: ``X = −(1/2s²) S_B⁻¹ K S_A⁻¹``
      (what Eq. 16 of the paper means).

    With factors of deficient rank the solution of least norm is taken; at ``B = 0`` that is
    ``d_A = 0``, ``d_B = (1/s²) grad_B S_A⁻¹``. ``damping = ℓ > 0`` (ours) puts
    ``(S_B + (ℓ/s)² S_A⁻¹)⁻¹`` for ``S_B⁻¹``: directions of ``s·B·A`` whose singular value σ is
    below ℓ are not divided by. ``P_B`` then has the eigenvalues ``σ²/(σ² + ℓ²)``; the equivalent
    gradient ``P_B g + (I − P_B) g P_A`` is still no longer than g and a direction of descent, and
    ``‖d_A‖`` bounded: ``‖s·B·d_A + s·d_B·A − g‖² + ℓ²·tr(d_Aᵀ S_A⁻¹ d_A)`` is least.

    Args:
        A: (..., r, n) factor, float64 to bfloat16.
        B: (..., m, r) factor.
        grad_A: (..., r, n), ``∂L/∂A``; ``None`` if A is frozen: ``d_B = (1/s²) grad_B S_A⁻¹``.
        grad_B: (..., m, r), ``∂L/∂B``; ``None`` if B is frozen: ``d_A = (1/s²) S_B⁻¹ grad_A``.
        scaling: ``s``, a float or a tensor with the leading dimensions.
        x: the choice of X.
        damping: ``ℓ``, a length in W, as ``scaling``; 0 is the paper's.

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
    of_A = None if grad_A is None else _rows(grad_A)
    of_B = None if grad_B is None else _rows(grad_B.mT)
    at = point_at(_rows(A), _rows(B.mT), _per_pair(scaling, A), of_A, of_B)
    if isinstance(damping, Tensor) or damping:
        at = at.damped(_per_pair(damping, A))
    d_A, d_B = align_at(at, x=x)
    return (
        None if d_A is None else d_A[0].to(A.dtype).reshape(A.shape),
        None if d_B is None else d_B[0].mT.to(B.dtype).reshape(B.shape),
    )


def align_at(at: Point, *, x: str) -> tuple[Rows | None, Rows | None]:
    """:func:`align` on rows of many shapes; ``None`` where a factor is frozen.

    ``d_A = s⁻²(S_B⁻¹·grad_A + Z·S_A⁻¹·A)``, ``d_B = s⁻²(grad_B − B·Y)·S_A⁻¹``, and this is the one
    place where ``X = s⁻²·Z·S_A⁻¹`` is chosen: ``Z = Y − S_B⁻¹·K`` with ``Y = S_B⁻¹·K`` (zero), half
    of it (symmetric), or the solution of ``S_B·Y + Y·S_A = K`` (sylvester), whether ``S_B⁻¹`` is
    damped or not. What Y lacks in precision goes to X, where the equivalent gradient does not see
    it. Rows are multiplied by roots of an inverse, never by an inverse: in float32 they lose the
    condition of a factor, not its square.
    """
    square, to_A, of_B = at.s**-2, [], at.grad_B
    if at.K is not None:
        Y = all_A = bmm(at.inv_B.full, at.K)
        if x != "zero":
            Y = (
                0.5 * all_A
                if x == "symmetric"
                else solve_sylvester(at.S_B, at.S_A, at.K, at.inv_A.full, at.dtype)
            )
            Z = square * bmm(Y - all_A, at.inv_A.V.mT)
            to_A = [(Z, combine((at.inv_A.E, at.A)))]
        of_B = combine((-Y.mT, at.B), onto=at.grad_B)
    return (
        None if at.grad_A is None else at.inv_B(at.grad_A, square, *to_A),
        None if of_B is None else at.inv_A(of_B, square),
    )


def equivalent_gradient(
    A: Tensor, B: Tensor, d_A: Tensor, d_B: Tensor, scaling: float | Tensor
) -> Tensor:
    """The gradient on W that a step along (d_A, d_B) amounts to, Eq. (1): ``s·B·d_A + s·d_B·A``.

    Args:
        A: (..., r, n); d_A: the same.
        B: (..., m, r); d_B: the same.
        d_A: a direction, or a gradient.
        d_B: likewise.
        scaling: ``s``, as for :func:`align`.

    Returns:
        (..., m, n), computed in float32 at least, in the dtype of A. Its rank is at most 2r.

    Raises:
        ValueError: shapes that do not belong together.

    >>> one = torch.ones(1, 1)
    >>> equivalent_gradient(2 * one, 3 * one, one, one, 0.5)
    tensor([[2.5000]])
    """
    _check_shapes(A, B, d_A, d_B)
    dtype, work = A.dtype, torch.promote_types(A.dtype, torch.float32)
    A, B, d_A, d_B = (t.to(work) for t in (A, B, d_A, d_B))
    s = scaling.to(A)[..., None, None] if isinstance(scaling, Tensor) else scaling
    return (s * (B @ d_A + d_B @ A)).to(dtype)


def tangent_projection(A: Tensor, B: Tensor, G: Tensor) -> Tensor:
    """Project G on the tangent space of the rank-r matrices at ``B·A`` (Theorem 2.1).

    ``P_B G + G P_A − P_B G P_A`` is the equivalent gradient of LoRA-Pro for every X, and of all
    that any (d_A, d_B) can reach the nearest to G.

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
    A, B, full = A.double(), B.double(), G.double()
    d_A, d_B = align(A, B, B.mT @ full, full @ A.mT, 1.0, x="zero")
    return equivalent_gradient(A, B, d_A, d_B, 1.0).to(G.dtype)  # type: ignore[arg-type]


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
    d_A, d_B = align(A, B, grad_A, grad_B, scaling, x="zero")
    assert d_A is not None
    assert d_B is not None
    along_A = (grad_A.double() * d_A.double()).sum((-2, -1))
    return (along_A + (grad_B.double() * d_B.double()).sum((-2, -1))).to(A.dtype)


def _rows(X: Tensor) -> Rows:
    """A batch of matrices as the rows of one shape, in float32 at least."""
    return [X.reshape(-1, *X.shape[-2:]).to(torch.promote_types(X.dtype, torch.float32))]


def _per_pair(value: float | Tensor, like: Tensor) -> Tensor:
    """A value a pair as (k, 1, 1) in float64."""
    lead = like.shape[:-2]
    if isinstance(value, Tensor):
        value = value.to(device=like.device, dtype=torch.float64).expand(lead)
    else:
        value = torch.full(lead, value, dtype=torch.float64, device=like.device)
    return value.reshape(-1, 1, 1)


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
