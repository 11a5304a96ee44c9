"""AdamW as torch has it, for whatever gradients an optimizer of this package has at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lorapro.distributed.sharding import local, zeros_like_columns
from lorapro.optim.base import PairOptimizer

__all__ = ["EXP_AVG", "EXP_AVG_SQ", "STEP", "AdamRule", "plain_gradients"]

STEP, EXP_AVG, EXP_AVG_SQ = "step", "exp_avg", "exp_avg_sq"


def plain_gradients(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of a group that have gradients, and those.

    Raises:
        ValueError: a sparse gradient.
    """
    params = [p for p in group["params"] if p.grad is not None]
    grads = [p.grad for p in params]
    if any(g.is_sparse for g in grads):
        raise ValueError("a parameter has a sparse gradient, which AdamW and SGD here do not take.")
    return params, grads


class AdamRule(PairOptimizer):
    """Base of optimizers whose groups carry ``betas``, ``eps``, ``lr`` and ``weight_decay``."""

    @staticmethod
    def check_adam(betas: tuple[float, float], eps: float) -> None:
        """Raise ``ValueError`` for decay rates or an epsilon out of range."""
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}, expected two numbers of 0 or more and below 1.")
        if not eps >= 0:
            raise ValueError(f"eps is {eps}, expected 0 or more.")

    def held(self, params: Sequence[Tensor], key: str) -> list[Tensor]:
        """One entry of the state of every parameter."""
        return [self.state[p][key] for p in params]

    def new_adam_state(self, p: Tensor, shape: torch.Size | None = None) -> None:
        """Make the step counter and two moments of a parameter, in its dtype.

        Moments of a shape of their own are float32 where the parameter is float16, whose range
        does not hold squares of gradients.
        """
        dtype = torch.float32 if shape is not None and p.dtype == torch.float16 else p.dtype
        moments = [
            torch.zeros_like(p) if shape is None else zeros_like_columns(p, shape, 1, dtype)
            for _ in range(2)
        ]
        self.state[p][STEP] = torch.zeros((), dtype=torch.float32, device=p.device)
        self.state[p][EXP_AVG], self.state[p][EXP_AVG_SQ] = moments

    def adamw_update(
        self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]
    ) -> None:
        """One step of AdamW on parameters with the gradients given."""
        for p in params:
            if not self.state[p]:
                self.new_adam_state(p)
            for key in (EXP_AVG, EXP_AVG_SQ):
                self.check_state(p, key, p.shape)
        # The fused kernel goes through memory in order, whatever the strides; it does not compile.
        compiling = torch.compiler.is_compiling()
        steps = self.held(params, STEP)
        held = (params, self.held(params, EXP_AVG), self.held(params, EXP_AVG_SQ))
        where, grads = [local(tensors) for tensors in held], local(grads)
        values = [[t.contiguous() for t in old] for old in where]
        dense, m, v = values
        adamw(
            dense,
            [g.contiguous() for g in grads],
            m,
            v,
            [],
            steps,
            fused=not compiling,
            foreach=compiling,
            capturable=compiling,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for old, new in zip(where, values, strict=True):
            for t, value in zip(old, new, strict=True):
                if value is not t:  # contiguous() gave a copy
                    t.copy_(value)
