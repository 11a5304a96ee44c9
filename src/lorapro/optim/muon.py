"""Muon on the low-rank tangent space.

Shape letters: m, n rows and columns of W; r rank; k pairs stacked by shape;
L (k, m, 2r) and R (k, 2r, n) the two sides of a tangent vector ``L·R``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lorapro.optim.adam_rule import AdamRule
from lorapro.optim.base import PAIRS
from lorapro.optim.stacking import Bucket, plain_gradients
from lorapro.optim.tangent import TangentOptimizer, left_right

__all__ = ["LoraProMuon", "polar_factor"]

# Singular values of the momentum below this part of the largest are taken for zero.
POLAR_TOLERANCE = 1e-6


def polar_factor(L: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """Polar factor ``U·Vᵀ`` of ``L·R = U Σ Vᵀ`` as a product of two thin matrices.

    QR of L and Rᵀ and an SVD of the (2r, 2r) core; directions without singular value are left out.

    Args:
        L: (..., m, q).
        R: (..., q, n).

    Returns:
        ``(U, Vᵀ)``: (..., m, p) and (..., p, n) with p ≤ q.

    >>> U, Vt = polar_factor(torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, -2.0]]))
    >>> (U @ Vt).abs()
    tensor([[0.0000, 0.6000],
            [0.0000, 0.8000]])
    """
    Q_L, T_L = torch.linalg.qr(L)
    Q_R, T_R = torch.linalg.qr(R.mT)
    core = T_L @ T_R.mT
    finite = torch.isfinite(core).all(-1).all(-1)[..., None, None]
    U, sigma, Vt = torch.linalg.svd(torch.where(finite, core, 0.0), full_matrices=False)
    kept = sigma > POLAR_TOLERANCE * sigma.amax(-1, keepdim=True)
    U = torch.where(finite, U * kept.unsqueeze(-2), torch.nan)
    return Q_L @ U, Vt @ Q_R.mT


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
            self.tangent_update(group)
        else:
            self.adamw_update(*plain_gradients(group), group)

    def decay(self, group: dict[str, Any]) -> float:
        """μ."""
        return group["momentum"]

    def direction(
        self,
        b: Bucket,
        group: dict[str, Any],
        M: tuple[Tensor, Tensor],
        G: tuple[Tensor, Tensor],
        s: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The scaled polar factor of the momentum."""
        N_A, N_B = M
        if group["nesterov"]:
            mu = group["momentum"]
            N_A, N_B = G[0].lerp(N_A, mu), G[1].lerp(N_B, mu)
        L, R = left_right(b.A.double(), b.B.double(), N_A, N_B, s)
        U, Vt = polar_factor(L, R)
        return 0.2 * max(L.shape[-2], R.shape[-1]) ** 0.5 * U, Vt
