"""What the optimizers on the low-rank tangent space share: momenta, and steps along a direction.

Factored mode and Muon keep an average of each factor's gradient, ``N_A ← β·N_A + (1 − β)·grad_A``;
factored and full mode step along a direction h of W, by ``align(s·Bᵀh, s·h·Aᵀ)``, damped.

Shape letters: rows of A (k, r, n), rows of the transpose of B (k, r, m); k pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lorapro.distributed.sharding import local, zeros_like_columns
from lorapro.functional import align_at
from lorapro.gram import Rows
from lorapro.optim.base import PairOptimizer
from lorapro.optim.batches import OF_A, OF_B, Batches
from lorapro.point import Point

__all__ = ["EXP_AVG", "EXP_AVG_SQ", "MOMENTUM", "STEP", "TangentOptimizer", "shrunk", "store"]

STEP, EXP_AVG, EXP_AVG_SQ, MOMENTUM = "step", "exp_avg", "exp_avg_sq", "momentum"

Both = tuple[Rows | None, Rows | None]
"""Something of A and of B; ``None`` for a factor that stays."""


class TangentOptimizer(PairOptimizer):
    """Base of the optimizers that keep a momentum of each factor's gradient, or AdamW's moments."""

    def held(self, params: Sequence[Tensor], key: str) -> list[Tensor]:
        """One entry of the state of every parameter."""
        try:
            return [self.state[p][key] for p in params]
        except KeyError:
            p = next(p for p in params if key not in self.state[p])
            self.check_state(p, key, p.shape)  # says that it is missing
            raise

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
        dense, m, v = values = [[t.contiguous() for t in old] for old in where]
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

    def new_state(self, A: Tensor, B: Tensor, blocks: int) -> None:
        """Make the state of the pairs in two parameters; subclasses add their rule's."""
        self.state[A][MOMENTUM] = torch.zeros_like(A)
        self.state[B][MOMENTUM] = torch.zeros_like(B)
        self.state[B][STEP] = torch.zeros((), dtype=torch.float32, device=B.device)

    def count_step(self, batches: Batches) -> None:
        """Make the state of pairs that have none, check that of the others, count the step."""
        for part in batches.parts:
            for A, B in zip(*part.params, strict=True):
                if not self.state[A] and not self.state[B]:
                    self.new_state(A, B, part.blocks)
                self.check_state(B, MOMENTUM, B.shape)
                self.check_state(A, MOMENTUM, A.shape)
        torch._foreach_add_(self.held(batches.params(OF_B), STEP), 1)

    def momenta(self, batches: Batches, G: Both, beta: float, nesterov: bool = False) -> Both:
        """Average the gradients into the momenta; these, or what they will be one step ahead."""
        self.count_step(batches)
        averages: list[Rows | None] = [None, None]
        for side in (OF_A, OF_B):
            new = G[side]
            if new is not None:
                M = batches.rows(side, lambda p: self.state[p][MOMENTUM])
                M = torch._foreach_lerp(list(M), list(new), 1 - beta)
                store(self.held(batches.params(side), MOMENTUM), batches.tensors(side, M))
                averages[side] = torch._foreach_lerp(list(new), M, beta) if nesterov else M
        return averages[OF_A], averages[OF_B]

    def step_along(
        self,
        group: dict[str, Any],
        batches: Batches,
        at: Point,
        h: tuple[Rows, Rows],
        x: str,
        entries: Tensor | None = None,
    ) -> None:
        """``s·B·A ← (1 − γλ)·s·B·A − γ·h`` as far as the factors can: align, damped, and write.

        h is given as the rows ``(s·Bᵀh, s·h·Aᵀ)``. With ``entries``, the number of those of W
        (k, 1, 1), what W can follow of h is shortened to a root mean square of 1, as Adafactor
        does: its square is ``⟨s·Bᵀh, d_A⟩ + ⟨s·h·Aᵀ, d_B⟩`` (Eq. 13), damped no more than that.
        """
        lr = group["lr"]
        reach = group["damping"] * lr if group["damping"] else None
        d = align_at(at.along(*h, batches.moves, reach), x=x)
        lrs = [lr] * len(at.A)
        if entries is not None:
            keep = lr * (at.total(dots(h, d)) / entries).clamp_min(1).rsqrt()
            lrs = list(keep.to(at.dtype).split([len(a) for a in at.A]))
        new = [
            None
            if of is None
            else torch._foreach_sub(
                list(shrunk(X, group, batches)), torch._foreach_mul(list(of), lrs)
            )
            for X, of in zip((at.A, at.B), d, strict=True)
        ]
        store(batches.moved, batches.moved_tensors(*new))


def dots(h: tuple[Rows, Rows], d: Both) -> Tensor:
    """``⟨h_A, d_A⟩ + ⟨h_B, d_B⟩`` of every pair, (k, 1, 1) in float64."""
    sides = [(y, of) for y, of in zip(h, d, strict=True) if of is not None]
    sums = [
        torch.cat([(a.double() * b).sum((-2, -1)) for a, b in zip(y, of, strict=True)])
        for y, of in sides
    ]
    return torch.stack(sums).sum(0)[:, None, None]


def shrunk(X: Rows, group: dict[str, Any], batches: Batches) -> Rows:
    """Factors whose product decays by ``1 − γλ``: both by its root, or the one that moves."""
    if not group["weight_decay"]:
        return X
    keep = 1 - group["lr"] * group["weight_decay"]
    keep = keep.clamp_min(0.0) if isinstance(keep, Tensor) else max(keep, 0.0)
    return [keep ** (0.5 if all(batches.moves) else 1.0) * x for x in X]


def store(held: list[Tensor], values: list[Tensor]) -> None:
    """Copy values to the tensors that hold them."""
    if held:
        torch._foreach_copy_(local(held), values)
