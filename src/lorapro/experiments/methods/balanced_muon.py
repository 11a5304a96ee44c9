"""Muon on A and on B of every pair, in units that neither alpha nor the length of A changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lorapro.experiments.methods.muon import MuonAndAdamW
from lorapro.factors import LoraPair, find_pairs

__all__ = ["BalancedMuon", "balanced_muon_factory"]


class BalancedMuon(MuonAndAdamW):
    """Muon on each factor, in units of ``a``, the root mean square of A's singular values.

    A takes steps of ``2·γ·a``, B of ``γ/(s·a)``, each times Muon's polar factor: a direction of B
    moves ``s·B·A`` as fast whatever s and a are, and A turns by the same angle. So runs with
    different alpha are one run, and so are runs with ``(c·A, B/c)``.

    Args:
        pairs: whose A and B are matrices.
        others: parameters for AdamW.
        lr: learning rate γ.
        kwargs: of :class:`~lorapro.experiments.methods.muon.MuonAndAdamW`.

    >>> A, B = nn.Parameter(torch.eye(2)), nn.Parameter(torch.zeros(2, 2))
    >>> optimizer = BalancedMuon([LoraPair("w", A, B, scaling=4.0)], [], lr=1.0)
    >>> (B @ A).trace().backward()
    >>> _ = optimizer.step()
    >>> bool((B.diagonal() < -0.03).all())          # about −0.2·√2/4 in both directions
    True
    """

    def __init__(
        self, pairs: Iterable[LoraPair], others: Iterable[Tensor], lr: float, **kwargs: Any
    ) -> None:
        self.pairs = list(pairs)
        groups = [{"params": [p]} for pair in self.pairs for p in (pair.A, pair.B)]
        super().__init__(groups, others, lr, **kwargs)  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step."""
        rates = [group["lr"] for group in self.param_groups]
        for i, pair in enumerate(self.pairs):
            length = float(pair.A.norm()) / pair.rank**0.5
            self.param_groups[2 * i]["lr"] *= 2 * length
            self.param_groups[2 * i + 1]["lr"] /= max(float(pair.scaling) * length, 1e-30)
        try:
            return super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate


def balanced_muon_factory() -> Callable[..., BalancedMuon]:
    """What Trainer calls to get a function from model and arguments to the optimizer."""

    def build(model: nn.Module, **kwargs: Any) -> BalancedMuon:
        pairs = find_pairs(model).pairs
        if not pairs or any(pair.layout != "matrix" for pair in pairs):
            raise ValueError("balanced-muon needs LoRA pairs, A and B of each a matrix.")
        known = {id(p) for pair in pairs for p in (pair.A, pair.B)}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        return BalancedMuon(pairs, others, **kwargs)

    return build
