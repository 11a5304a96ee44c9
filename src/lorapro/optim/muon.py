"""Muon in the geometry of W.

Shape letters: m, n rows and columns of W; r rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lorapro.choices import check_choice
from lorapro.gram import Rows, combine
from lorapro.optim.adam_rule import plain_gradients
from lorapro.optim.base import PAIRS
from lorapro.optim.batches import OF_A, OF_B, Batches, batches_of
from lorapro.optim.rules import muon, muon_of_parts
from lorapro.optim.tangent import Rule, TangentOptimizer, shrunk, store
from lorapro.rates import DAMPING, chosen_rate

__all__ = ["LoraProMuon"]

POLAR = {"parts": "muon", "whole": "muon-whole"}
"""What gets one length, and the row of ``lorapro.rates.DAMPING`` that goes with it."""


class LoraProMuon(TangentOptimizer):
    """Muon's rule in the geometry of W, on the two parts of its step, ``s·B·d_A + s·d_B·A``.

    Muon (Keller Jordan, 2024) gives every direction of a step the same length. With
    ``polar="parts"`` each part of the step of W gets that length, 0.2·√max(m, n), by itself::

        N_A ← momentum of grad_A,  N_B of grad_B   (Nesterov's, as Muon has it)
        d_A = 0.2·√max(m, n)/s · R_Bᵀ·polar(R_B·N_A)      R_Bᵀ·R_B = (S_B + (ℓ/s)²·S_A⁻¹)⁻¹
        d_B = 0.2·√max(m, n)/s · polar(N_B·R_Aᵀ)·R_A      R_Aᵀ·R_A = S_A⁻¹
        A ← A − γ·d_A,  B ← B − γ·d_B

    That is the rule of LoRA-Muon (arXiv 2606.12921), and ours is the damping: directions of
    ``s·B·A`` shorter than ℓ, a length of ``damping`` steps, are not divided by. Without it a start
    from ``B = 0`` turns A at once as far as it can go. With ``polar="whole"`` (ours) the length is
    given to the step of W as a whole, of rank 2r, with momentum kept as a tangent vector
    (``lorapro.optim.tangent``)::

        M ← β·M + (1 − β)·g̃,  N Nesterov's      h = 0.2·√max(m, n)·polar(N)
        (d_A, d_B) = align(s·Bᵀh, s·h·Aᵀ)         then M is projected on the new tangent space

    Which is better where: ``docs/findings.md``. Either is the same run for any α and for
    ``(c·A, B/c)``; ``0.2·√max(m, n)`` gives a full-rank step the root mean square of an AdamW
    step. State: one momentum for each factor, half of what AdamW keeps. Weight decay λ shrinks the
    adapter, ``s·B·A ← (1 − γλ)·s·B·A``; the base weight stays. Parameters that are no pair get
    AdamW with ``betas`` and ``eps``.

    Args:
        params: groups from ``lorapro.lora_param_groups``.
        lr: learning rate γ; ``None`` takes that of ``lorapro.rates``, and logs it.
        momentum: β.
        nesterov: look one step ahead, as Muon does by default.
        weight_decay: λ.
        polar: ``"parts"`` or ``"whole"``.
        x: ``"sylvester"``, ``"zero"`` or ``"symmetric"``, see :func:`lorapro.functional.align`;
            the parts have no such choice.
        damping: directions of ``s·B·A`` shorter than this many steps are damped
            (``docs/mathematics.md``); ``None`` takes that of ``lorapro.rates`` for ``polar``.
        betas: AdamW's, for parameters that are no pair.
        eps: AdamW's, for parameters that are no pair.

    Raises:
        ValueError: an argument out of range, an unknown polar or x, or groups without pairs.

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
        damping: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        polar: str = "parts",
    ) -> None:
        check_choice("polar", polar, POLAR)
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
                "damping": DAMPING[POLAR[polar]] if damping is None else damping,
                "betas": tuple(betas),
                "eps": eps,
                "polar": polar,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, see :class:`PairOptimizer`; an unknown ``polar`` is a ``ValueError``."""
        check_choice("polar", param_group.get("polar", self.defaults["polar"]), POLAR)
        super().add_param_group(param_group)

    def update(self, group: dict[str, Any]) -> None:
        """Step one group."""
        if group["role"] != PAIRS:
            self.adamw_update(*plain_gradients(group), group)
        elif group["polar"] == "whole":
            self.tangent_update(group)
        else:
            for batches in batches_of(group["pairs"], group["params"]):
                self._parts(group, batches)

    def _parts(self, group: dict[str, Any], batches: Batches) -> None:
        """Momentum of the gradients, then Muon on each part."""
        lr, keep = group["lr"], group["momentum"]
        self.count_step(batches)
        at, speed = batches.point(gradients=False), _speed(batches)
        if group["damping"]:
            at = at.damped(group["damping"] * lr * speed)
        N: list[Rows | None] = []
        for side in (OF_A, OF_B):
            G = batches.gradients(side)
            if G is not None:
                M = torch._foreach_lerp(list(self.momentum(batches, side)), list(G), 1 - keep)
                self.keep_momentum(batches, side, M)
                G = torch._foreach_lerp(list(G), M, keep) if group["nesterov"] else M
            N.append(G)
        C = muon_of_parts(at, (N[OF_A], N[OF_B]), speed)
        new = [
            None if x is None else combine((-lr * c, x), onto=shrunk(X, lr, group["weight_decay"]))
            for X, c, x in zip((at.A, at.B), C, N, strict=True)
        ]
        store(batches.moved, batches.moved_tensors(*new))

    def decay(self, group: dict[str, Any]) -> float:
        """β."""
        return group["momentum"]

    def rule(self, group: dict[str, Any], batches: Batches) -> Rule:
        """The polar factor of the momentum as a whole, or of the momentum one step ahead."""
        ahead = group["momentum"] if group["nesterov"] else 1.0
        return lambda at, M, G: muon(at, G.lerp(M, ahead), _speed(batches))


def _speed(batches: Batches) -> Tensor:
    """How far a step of rate 1 moves W in each direction: that of a full-rank AdamW step."""
    return batches.per_part(lambda shape: 0.2 * max(shape) ** 0.5)
