"""Muon in the geometry of W.

Shape letters: m, n rows and columns of W; r rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lorapro.gram import combine
from lorapro.optim.base import PAIRS, plain_gradients
from lorapro.optim.batches import OF_A, OF_B, batches_of
from lorapro.optim.rules import muon
from lorapro.optim.tangent import TangentOptimizer, shrunk, store
from lorapro.rates import DAMPING, chosen_rate

__all__ = ["LoraProMuon"]

RANK = 32  # at which a direction is as long as full fine-tuning's Muon has it


class LoraProMuon(TangentOptimizer):
    """Muon's rule in the geometry of W, on the two parts of its step, ``s·B·d_A + s·d_B·A``.

    Muon (Keller Jordan, 2024) gives every direction of a step the same length. Each part of the
    step of W gets it by itself, ``ρ = 0.2·√max(m, n)·√(32/r)``::

        N_A ← momentum of grad_A,  N_B of grad_B   (Nesterov's, as Muon has it)
        d_A = ρ/s · R_Bᵀ·polar(R_B·N_A)      R_Bᵀ·R_B = (S_B + (ℓ/s)²·S_A⁻¹)⁻¹
        d_B = ρ/s · polar(N_B·R_Aᵀ)·R_A      R_Aᵀ·R_A = S_A⁻¹
        A ← √(1 − γλ)·A − γ·d_A,  B ← √(1 − γλ)·B − γ·d_B

    ``0.2·√max(m, n)`` gives a full-rank step the root mean square of an AdamW step; ``√(32/r)``
    makes one learning rate serve all ranks (``docs/findings.md``).

    It is the rule of LoRA-Muon (arXiv 2606.12921) with two things of ours: that length, and the
    damping, by which directions of ``s·B·A`` shorter than ℓ, ``damping`` steps, are not divided by:
    from ``B = 0`` W would move hundreds of steps at once. The run is the same for any α and for
    ``(c·A, B/c)``. State: one momentum for each factor, half of AdamW's. Weight decay λ shrinks the
    adapter. Parameters that are no pair get AdamW with ``betas`` and ``eps``.

    Args:
        params: groups from ``lorapro.lora_param_groups``.
        lr: learning rate γ; ``None`` takes that of ``lorapro.rates``, and logs it.
        momentum: β; in runs of a hundred steps less was better (``docs/findings.md``).
        nesterov: look one step ahead, as Muon does by default.
        weight_decay: λ.
        x: accepted as by the other optimizers, and without effect: each part has one solution.
        damping: directions of ``s·B·A`` shorter than this many steps are damped
            (``docs/mathematics.md``); ``None`` takes that of ``lorapro.rates``.
        betas: AdamW's, for parameters that are no pair.
        eps: AdamW's, likewise.

    Raises:
        ValueError: an argument out of range, an unknown x, or groups without pairs.

    >>> import lorapro, torch
    >>> from lorapro.factors import LoraPair
    >>> A, B = torch.nn.Parameter(torch.eye(2)), torch.nn.Parameter(torch.zeros(2, 2))
    >>> groups = lorapro.lora_param_groups(None, pairs=[LoraPair("w", A, B, scaling=1.0)])
    >>> optimizer = LoraProMuon(groups, lr=1.0)
    >>> (B @ A * torch.tensor([[5.0, 0.0], [0.0, 0.1]])).sum().backward()
    >>> _ = optimizer.step()
    >>> (B @ A).detach().round(decimals=2)                # −0.2·√2·√(32/2) along both of g
    tensor([[-1.1300,  0.0000],
            [ 0.0000, -1.1300]])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        x: str = "sylvester",
        damping: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": chosen_rate("muon") if lr is None else lr,
                "momentum": momentum,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "x": x,
                "damping": DAMPING["muon"] if damping is None else damping,
                "betas": tuple(betas),
                "eps": eps,
            },
        )

    def update(self, group: dict[str, Any]) -> None:
        """Step one group."""
        if group["role"] != PAIRS:
            self.adamw_update(*plain_gradients(group), group)
            return
        lr = group["lr"]
        for batches in batches_of(group["pairs"], group["params"]):
            G = batches.gradients(OF_A), batches.gradients(OF_B)
            N = self.momenta(batches, G, group["momentum"], group["nesterov"])
            speed = batches.per_part(lambda shape: 0.2 * max(shape) ** 0.5)
            speed = (RANK / batches.rank) ** 0.5 * speed
            length = group["damping"] * lr * speed if group["damping"] else None
            at = batches.point(gradients=False, length=length)
            new = [
                None if d is None else combine((-lr * d[0], d[1]), onto=shrunk(X, group, batches))
                for X, d in zip((at.A, at.B), muon(at, N, speed), strict=True)
            ]
            store(batches.moved, batches.moved_tensors(*new))
