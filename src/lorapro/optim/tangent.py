"""Full fine-tuning's rules on the low-rank tangent space, at LoRA's memory.

One step of every optimizer built on this file::

    project    (G_A, G_B) = align(grad_A, grad_B), X = 0: the gradient as a tangent vector
    momentum   M ← β·M + (1 − β)·G, in the coordinates M = s·(B·M_A + M_B·A)
    rule       h = rule(M): what full fine-tuning would do with M, kept as a product L'·R'
    align      (d_A, d_B) = align(s·Bᵀh, s·h·Aᵀ), then A ← A − γ·d_A, B ← B − γ·d_B
    transport  M ← projection of M on the tangent space at the new factors

A tangent vector has rank 2r, so no step forms an (m, n) tensor. A new rule is a subclass of
:class:`TangentOptimizer` with one method.

Shape letters
    m, n   rows and columns of W;   r  rank;   k  pairs stacked by shape;   s  scaling (k, 1, 1)
    A, M_A, G_A, d_A  (k, r, n);   B, M_B, G_B, d_B  (k, m, r)
    L      left factor (k, m, 2r) and R right factor (k, 2r, n) of a tangent vector ``L·R``
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorapro.functional import Spectrum, align_in, spectrum
from lorapro.optim.base import PairOptimizer
from lorapro.optim.stacking import Bucket, buckets

__all__ = ["TangentOptimizer", "left_right", "pull_back", "transport"]

STEP, MOMENTUM = "step", "momentum"


def left_right(
    A: Tensor, B: Tensor, M_A: Tensor, M_B: Tensor, s: float | Tensor
) -> tuple[Tensor, Tensor]:
    """A tangent vector as a product: ``s(B·M_A + M_B·A) = L·R``, L = s[B, M_B], R = [M_A; A].

    >>> A, B = torch.ones(1, 1, 2), torch.ones(1, 3, 1)
    >>> L, R = left_right(A, B, 2 * A, 3 * B, 0.5)
    >>> (L @ R)[0]
    tensor([[2.5000, 2.5000],
            [2.5000, 2.5000],
            [2.5000, 2.5000]])
    """
    return s * torch.cat([B, M_B], -1), torch.cat([M_A, A], -2)


def pull_back(
    A: Tensor, B: Tensor, L: Tensor, R: Tensor, s: float | Tensor
) -> tuple[Tensor, Tensor]:
    """What autograd would give for a gradient ``h = L·R`` on W: ``(s·Bᵀh, s·h·Aᵀ)``, Eq. (5)."""
    return s * ((B.mT @ L) @ R), s * (L @ (R @ A.mT))


def transport(
    old: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    M_A: Tensor,
    M_B: Tensor,
    *,
    moves_A: bool = True,
    moves_B: bool = True,
) -> tuple[Tensor, Tensor]:
    """Carry a tangent vector at ``old = (A, B)`` to the tangent space at ``new = (A', B')``.

    The orthogonal projection of ``M = B·M_A + M_B·A``::

        M_A' = S_B'⁺ B'ᵀ M          M_B' = (I − P_B') M A'ᵀ S_A'⁺

    all through (r, r) products of old and new factors. A frozen factor narrows the tangent space
    to its partner's half.

    >>> A, B = torch.randn(1, 2, 5), torch.randn(1, 4, 2)
    >>> M_A, M_B = torch.randn(1, 2, 5), torch.zeros(1, 4, 2)
    >>> same = transport((A, B), (A, B), M_A, M_B)     # the identity where nothing has moved
    >>> torch.allclose(same[0], M_A.double(), atol=1e-4), bool(same[1].abs().max() < 1e-4)
    (True, True)
    """
    A, B, A_new, B_new = (t.double() for t in (*old, *new))
    M_A, M_B = M_A.double(), M_B.double()
    grad_A = (B_new.mT @ B) @ M_A + (B_new.mT @ M_B) @ A if moves_A else None
    grad_B = B @ (M_A @ A_new.mT) + M_B @ (A @ A_new.mT) if moves_B else None
    spec = spectrum(*new)
    out_A, out_B = align_in(spec, A_new, B_new, grad_A, grad_B, 1.0, x="zero")
    return (
        torch.zeros_like(M_A) if out_A is None else out_A,
        torch.zeros_like(M_B) if out_B is None else out_B,
    )


class TangentOptimizer(PairOptimizer):
    """Base of the optimizers that run a full fine-tuning rule on the tangent space.

    Subclasses say how fast momentum decays (:meth:`decay`) and give the rule (:meth:`direction`).
    """

    def decay(self, group: dict[str, Any]) -> float:
        """β of the momentum."""
        raise NotImplementedError

    def direction(
        self,
        b: Bucket,
        group: dict[str, Any],
        M: tuple[Tensor, Tensor],
        G: tuple[Tensor, Tensor],
        s: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The rule: from momentum M and gradient G (tangent coordinates) to h, as (L', R')."""
        raise NotImplementedError

    def new_state(self, A: Tensor, B: Tensor, b: Bucket) -> None:
        """Make the state of one pair; subclasses add what their rule keeps."""
        self.state[A][MOMENTUM] = torch.zeros_like(A)
        self.state[B][MOMENTUM] = torch.zeros_like(B)
        self.state[B][STEP] = torch.zeros((), dtype=torch.float32)

    @torch.no_grad()
    def tangent_update(self, group: dict[str, Any]) -> None:
        """One step of every pair of a group."""
        beta, lr = self.decay(group), group["lr"]
        for b in buckets(group):
            for A, B in zip(b.params_A, b.params_B, strict=True):
                if MOMENTUM not in self.state[B]:
                    self.new_state(A, B, b)
                self.state[B][STEP] += 1
            spec: Spectrum = spectrum(b.A, b.B)
            s = torch.as_tensor(b.scaling, dtype=torch.float64, device=b.A.device)
            s = s.expand(b.A.shape[0])[:, None, None]
            G_A, G_B = align_in(spec, b.A, b.B, b.grad_A, b.grad_B, b.scaling, x="zero")
            M_A, M_B = self._momentum(b)
            G_A = torch.zeros_like(M_A) if G_A is None else G_A
            G_B = torch.zeros_like(M_B) if G_B is None else G_B
            M_A, M_B = M_A.lerp(G_A, 1 - beta), M_B.lerp(G_B, 1 - beta)

            L, R = self.direction(b, group, (M_A, M_B), (G_A, G_B), s)
            h_A, h_B = pull_back(b.A.double(), b.B.double(), L, R, s)
            d_A, d_B = align_in(
                spec,
                b.A,
                b.B,
                None if b.grad_A is None else h_A,
                None if b.grad_B is None else h_B,
                b.scaling,
                x=group["x"],
            )
            params, directions = b.by_parameter(d_A, d_B)
            if group["weight_decay"]:
                keep = max(0.0, 1 - lr * group["weight_decay"]) ** 0.5
                torch._foreach_mul_(params, keep)
            torch._foreach_sub_(params, torch._foreach_mul(directions, lr))
            new = b.stack_A(b.params_A), b.stack_B(b.params_B)
            M_A, M_B = transport(
                (b.A, b.B),
                new,
                M_A,
                M_B,
                moves_A=b.grad_A is not None,
                moves_B=b.grad_B is not None,
            )
            self._keep_momentum(b, M_A, M_B)

    def _momentum(self, b: Bucket) -> tuple[Tensor, Tensor]:
        M_A = b.stack_A([self.state[A][MOMENTUM] for A in b.params_A])
        M_B = b.stack_B([self.state[B][MOMENTUM] for B in b.params_B])
        return M_A.double(), M_B.double()

    def _keep_momentum(self, b: Bucket, M_A: Tensor, M_B: Tensor) -> None:
        held = [self.state[p][MOMENTUM] for p in (*b.params_A, *b.params_B)]
        torch._foreach_copy_(held, [*b.unstack_A(M_A), *b.unstack_B(M_B)])
