"""Muon on the low-rank tangent space.

Shape letters: m, n rows and columns of W; r rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lorapro.optim.adam_rule import plain_gradients
from lorapro.optim.base import PAIRS
from lorapro.optim.batches import Batches
from lorapro.optim.rules import muon
from lorapro.optim.tangent import Rule, TangentOptimizer
from lorapro.rates import DAMPING, chosen_rate

__all__ = ["LoraProMuon"]


class LoraProMuon(TangentOptimizer):
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
        lr: learning rate γ; ``None`` takes that of ``lorapro.rates``, and logs it.
        momentum: μ.
        nesterov: look one step ahead, as Muon does by default.
        weight_decay: λ.
        x: ``"sylvester"``, ``"zero"`` or ``"symmetric"``, see :func:`lorapro.functional.align`.
        damping: directions of ``s·B·A`` shorter than this many steps are damped
            (``docs/mathematics.md``); 0 divides by whatever B holds.
        betas: AdamW's, for parameters that are no pair.
        eps: AdamW's, for parameters that are no pair.

    Raises:
        ValueError: an argument out of range, an unknown x, or groups without pairs.

    Muon is Keller Jordan's (2024); a relative on the same manifold is Riemannion
    (arXiv 2507.12142).

    >>> import lorapro, torch
    >>> from lorapro.factors import LoraPair
    >>> A, B = torch.nn.Parameter(torch.eye(2)), torch.nn.Parameter(torch.zeros(2, 2))
    >>> groups = lorapro.lora_param_groups(None, pairs=[LoraPair("w", A, B, scaling=1.0)])
    >>> optimizer = LoraProMuon(groups, lr=1.0)
    >>> (B @ A * torch.tensor([[5.0, 0.0], [0.0, 0.1]])).sum().backward()
    >>> _ = optimizer.step()
    >>> (B @ A).detach()                                  # −0.2·√2 or so along both of g
    tensor([[-0.2827,  0.0000],
            [ 0.0000, -0.2827]])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        x: str = "sylvester",
        damping: float = DAMPING["muon"],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}, expected 0 or more and below 1.")
        self.check_adam(betas, eps)
        super().__init__(
            params,
            {
                "lr": chosen_rate("muon") if lr is None else lr,
                "momentum": momentum,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "x": x,
                "damping": damping,
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

    def rule(self, group: dict[str, Any], batches: Batches) -> Rule:
        """The polar factor of the momentum, or of the momentum one step ahead."""
        speed = batches.per_part(lambda shape: 0.2 * max(shape) ** 0.5)
        ahead = group["momentum"] if group["nesterov"] else 1.0
        return lambda at, M, G: muon(at, G.lerp(M, ahead), speed)
