"""Muon on the low-rank tangent space.

Shape letters: m, n rows and columns of W; r rank; k pairs stacked by shape;
L (k, m, 2r) and R (k, 2r, n) the two sides of a tangent vector ``L·R``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lorapro.optim.adam_rule import AdamRule
from lorapro.optim.base import PAIRS
from lorapro.optim.native.steps import step_pairs
from lorapro.optim.polar import polar_core, polar_factor
from lorapro.optim.spaces import Direction, ExactSpace, FastSpace, Space, Tangent
from lorapro.optim.stacking import Bucket, plain_gradients
from lorapro.optim.stacks import Stack, Tall, Wide
from lorapro.optim.tangent import TangentOptimizer

__all__ = ["LoraProMuon"]

# Added to the squared singular values of the momentum, relative to their sum: more than what
# rounding takes away from those that are zero (gradients of low rank: few tokens, padding).
RIDGE = 3e-7


class LoraProMuon(AdamRule, TangentOptimizer):
    """Muon's rule on the tangent space of the low-rank matrices.

    With M the momentum of the equivalent gradient g̃, kept as a tangent vector of rank 2r::

        M ← μ·M + (1 − μ)·g̃                      N = (1 − μ)·g̃ + μ·M if nesterov, else M
        h = 0.2·√max(m, n)·U·Vᵀ,  N = U Σ Vᵀ       the polar factor: all directions at one speed
        (d_A, d_B) = align(s·Bᵀh, s·h·Aᵀ)          A ← A − γ·d_A,  B ← B − γ·d_B
        M ← projection of M on the tangent space at the new factors

    It is Muon for W, not Muon for A and for B. The factor ``0.2·√max(m, n)`` gives a full-rank
    h the root mean square of an AdamW step. State: one momentum for each factor, half of what
    AdamW keeps. Weight decay λ shrinks the adapter, ``s·B·A ← (1 − γλ)·s·B·A``; the base weight
    stays. Parameters that are no pair get AdamW with ``betas`` and ``eps``.

    Args:
        params: groups from ``lorapro.lora_param_groups``.
        lr: learning rate γ.
        momentum: μ.
        nesterov: look one step ahead, as Muon does by default.
        weight_decay: λ.
        x: ``"sylvester"``, ``"zero"`` or ``"symmetric"``, see :func:`lorapro.functional.align`.
        betas: AdamW's, for parameters that are no pair.
        eps: AdamW's, for parameters that are no pair.

    Raises:
        ValueError: an argument out of range, an unknown x, or groups without pairs.

    Muon is Keller Jordan's (2024); a relative on the same manifold is Riemannion
    (arXiv 2507.12142).

    >>> import lorapro
    >>> from lorapro.factors import LoraPair
    >>> A, B = torch.nn.Parameter(torch.eye(2)), torch.nn.Parameter(torch.zeros(2, 2))
    >>> groups = lorapro.lora_param_groups(None, pairs=[LoraPair("w", A, B, scaling=1.0)])
    >>> optimizer = LoraProMuon(groups, lr=1.0)
    >>> (B @ A * torch.tensor([[5.0, 0.0], [0.0, 0.1]])).sum().backward()
    >>> _ = optimizer.step()
    >>> (B @ A).detach()                                  # −0.2·√2 in both directions of g
    tensor([[-0.2828,  0.0000],
            [ 0.0000, -0.2828]])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        x: str = "sylvester",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}, expected 0 or more and below 1.")
        self.check_adam(betas, eps)
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "x": x,
                "betas": tuple(betas),
                "eps": eps,
            },
        )

    def update(self, group: dict[str, Any]) -> None:
        """Step one group."""
        if group["role"] == PAIRS:
            betas = group["momentum"], 0.0
            flag = bool(group["nesterov"])
            self.tangent_update(step_pairs(group, "muon", self.muon_states, betas=betas, flag=flag))
        else:
            self.adamw_update(*plain_gradients(group), group)

    def muon_states(self, A: Tensor, B: Tensor) -> list[Tensor]:
        """Momentum and counter of one pair of matrices, made if need be."""
        momentum_A, momentum_B, step = self.tangent_states(A, B)
        return [momentum_A, momentum_B, step, step, step]  # no second moments

    def decay(self, group: dict[str, Any]) -> float:
        """μ."""
        return group["momentum"]

    def direction(
        self, group: dict[str, Any], part: list[Bucket], space: Space, M: Tangent, G: Tangent
    ) -> Direction:
        """The scaled polar factor of the momentum ``N = s·[B, N_B]·[N_A; A]``."""
        N = G.lerp(M, group["momentum"]) if group["nesterov"] else M
        A, B, s = space.A, space.B, space.s
        sizes = [0.2 * max(b.B.shape[-2], b.A.shape[-1]) ** 0.5 for b in part for _ in b.A]
        size = torch.tensor(sizes, dtype=s.dtype, device=s.device)[:, None, None]
        if isinstance(space, ExactSpace):
            L = torch.cat([B.parts[0], N.B.parts[0]], -1)
            U, Vt = polar_factor(s * L, torch.cat([N.A.parts[0], A.parts[0]], -2))
            return Direction((Tall([size * U]),), (Wide([Vt]),))
        assert isinstance(space, FastSpace)
        # In these coordinates no side is longer than N, however ill-conditioned A and B are.
        to_A, to_B = (torch.linalg.cholesky_ex(S)[0] for S in (space.S_A, space.S_B))
        eye = torch.eye(to_A.shape[-1], dtype=s.dtype, device=s.device).expand_as(to_A)
        from_A, from_B = (torch.linalg.solve_triangular(C, eye, upper=False) for C in (to_A, to_B))
        left = Tall.combine([(B, from_B.mT)]), Tall.combine([(N.B, to_A)])
        right = Wide.combine([(to_B.mT, N.A)]), Wide.combine([(from_A, A)])
        LL, RR = _gram(left, Tall.dot), _gram(right, Wide.dot)  # the scaling s drops out
        r = eye.shape[-1]
        squares = [T.diagonal(dim1=-2, dim2=-1) for T in (LL[:, r:, r:], RR[:, :r, :r])]
        lift = RIDGE * torch.cat(squares, -1).sum(-1, keepdim=True)  # of ‖N‖²
        for diagonal in squares:
            diagonal.add_(lift)
        return Direction(left, right, size * polar_core(LL, RR))


def _gram(sides: tuple[Stack, Stack], dot: Callable[[Stack, Stack], Tensor]) -> Tensor:
    """Products of two sides with one another, (k, 2r, 2r)."""
    one, two = sides
    across = dot(one, two)
    rows = torch.cat([dot(one, one), across], -1), torch.cat([across.mT, dot(two, two)], -1)
    return torch.cat(rows, -2)
