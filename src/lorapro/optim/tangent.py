"""Full fine-tuning's rules on the low-rank tangent space, at LoRA's memory.

One step of every optimizer built on this file::

    project    (G_A, G_B) = align(grad_A, grad_B), X = 0: the gradient as a tangent vector
    momentum   M ← β·M + (1 − β)·G, in the coordinates M = s·(B·M_A + M_B·A)
    rule       h = rule(M): what full fine-tuning would do with M (``lorapro.optim.rules``)
    align      (d_A, d_B) = align(s·Bᵀh, s·h·Aᵀ), damped; A ← A − γ·d_A, B ← B − γ·d_B
    transport  M ← projection of M on the tangent space at the new factors

Nothing here depends on how A and B share a product or on α: rules, damping and transport see
``s·B·A`` only, and ``x="sylvester"`` weighs A and B in units in which s is 1 and A's singular
values have the root mean square 1.

Shape letters
    m, n   rows and columns of W;   r  rank;   k  pairs;   s  scaling (k, 1, 1)
    A, M_A, G_A, d_A  rows (k, r, n);   B, M_B, G_B, d_B  rows of the transpose (k, r, m)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, bmm

from lorapro.distributed.sharding import local
from lorapro.functional import Point, align_at, shares, step_length
from lorapro.gram import Rows, combine, inner, inverses, spread, trace
from lorapro.optim.adam_rule import STEP, AdamRule
from lorapro.optim.batches import OF_A, OF_B, Batches, batches_of
from lorapro.optim.rules import Direction, Tangent

__all__ = ["Rule", "TangentOptimizer", "align_direction", "transport"]

MOMENTUM = "momentum"

Rule = Callable[[Point, Tangent, Tangent], Direction]
"""(factors, momentum, gradient) -> direction."""


class TangentOptimizer(AdamRule):
    """Base of the optimizers that run a full fine-tuning rule on the tangent space.

    Subclasses say how fast momentum decays (:meth:`decay`) and give the rule (:meth:`rule`).
    """

    def decay(self, group: dict[str, Any]) -> float:
        """β of the momentum."""
        raise NotImplementedError

    def rule(self, group: dict[str, Any], batches: Batches) -> Rule:
        """The rule with what it keeps of these pairs."""
        raise NotImplementedError

    def new_state(self, A: Tensor, B: Tensor, blocks: int) -> None:
        """Make the state of the pairs in two parameters; subclasses add their rule's."""
        self.state[A][MOMENTUM] = torch.zeros_like(A)
        self.state[B][MOMENTUM] = torch.zeros_like(B)
        self.state[B][STEP] = torch.zeros((), dtype=torch.float32, device=B.device)

    def count_step(self, batches: Batches) -> None:
        """Make the state of pairs that have none, check that of the others, count the step."""
        for part in batches.parts:
            for A, B in zip(*part.params, strict=True):
                if MOMENTUM not in self.state[B]:
                    self.new_state(A, B, part.blocks)
                self.check_state(B, MOMENTUM, B.shape)
                self.check_state(A, MOMENTUM, A.shape)
        torch._foreach_add_(self.held(batches.params(OF_B), STEP), 1)

    def momentum(self, batches: Batches, side: int) -> Rows:
        """The momentum of A or of B as rows."""
        return batches.rows(side, lambda p: self.state[p][MOMENTUM])

    def keep_momentum(self, batches: Batches, side: int, M: Rows) -> None:
        """Store rows as the momentum of A or of B."""
        store(self.held(batches.params(side), MOMENTUM), batches.tensors(side, M))

    @torch.no_grad()
    def tangent_update(self, group: dict[str, Any]) -> None:
        """One step of every pair of a group."""
        for batches in batches_of(group["pairs"], group["params"]):
            self.count_step(batches)
            momentum = (self.momentum(batches, side) for side in (OF_A, OF_B))
            rule = self.rule(group, batches)
            factors, M = tangent_step(
                batches.point(), Tangent(*momentum), rule, self.decay(group), group, batches
            )
            store(batches.moved, batches.moved_tensors(*factors))
            for side, rows in enumerate(M):
                self.keep_momentum(batches, side, rows)


def tangent_step(
    at: Point, M: Tangent, rule: Rule, beta: float, group: dict[str, Any], batches: Batches
) -> tuple[tuple[Rows, Rows], Tangent]:
    """New factors and new momentum, from the old ones and the gradients."""
    lr, decay = group["lr"], group["weight_decay"]
    G = tangent_of(at, *align_at(at, x="zero"))
    M = M.lerp(G, 1 - beta)
    directions = align_direction(
        at, rule(at, M, G), group["damping"] * lr, group["x"], batches.moves
    )
    A, B = (
        rounded(combine(*((-lr * C, X) for C, X in terms), onto=shrunk(old, lr, decay)), params[0])
        if terms
        else old
        for old, terms, params in zip(
            (at.A, at.B), directions, batches.parts[0].params, strict=True
        )
    )
    return (A, B), transport(at, M, A, B)


def shrunk(X: Rows, lr: float | Tensor, decay: float) -> Rows:
    """``√(1 − γλ)·X``: both factors so, and their product decays by ``1 − γλ``."""
    if not decay:
        return X
    keep = 1 - lr * decay
    keep = keep.clamp_min(0.0) if isinstance(keep, Tensor) else max(keep, 0.0)
    return [keep**0.5 * x for x in X]


def rounded(X: Rows, like: Tensor) -> Rows:
    """Rows rounded to the dtype of the parameters."""
    return [x.to(like.dtype).to(x.dtype) for x in X]


def tangent_of(at: Point, d_A: Rows | None, d_B: Rows | None) -> Tangent:
    """Directions as a tangent vector; a frozen factor's part is zero."""
    return Tangent(
        [torch.zeros_like(a) for a in at.A] if d_A is None else d_A,
        [torch.zeros_like(b) for b in at.B] if d_B is None else d_B,
    )


Combination = list[tuple[Tensor, Rows]]


def align_direction(
    at: Point,
    h: Direction,
    reach: float | Tensor,
    x: str,
    moves: tuple[bool, bool] = (True, True),
) -> tuple[Combination, Combination]:
    """``align(s·Bᵀh, s·h·Aᵀ)``, damped, as combinations of the rows of h and of the factors.

    Args:
        at: the factors.
        h: the direction.
        reach: γ times the number of steps within which a direction of ``s·B·A`` is damped; a step
            is as long as h makes it when B takes it alone.
        x: the choice of X, in units in which A and B weigh the same (``weight_B``).
        moves: which of A and B are trained; the combination of the other is empty.
    """
    square = at.s**-2
    to_A = at.s * bmm(h.left_B, h.core)  # s·Bᵀ·h = to_A·R
    to_B = at.s * bmm(h.core, h.right_A).mT  # s·A·hᵀ = to_B·Lᵀ
    if isinstance(reach, Tensor) or reach:
        at = at.damped(reach * step_length(at, bmm(bmm(to_B, h.left_left), to_B.mT)))
    d_A = [*spread(square * bmm(at.inv_B.full, to_A), h.right)] if moves[0] else []
    d_B = [*spread(square * bmm(at.inv_A.full, to_B), h.left)] if moves[1] else []
    if all(moves):
        mean = (at.s * trace(at.S_A) / at.S_A.shape[-1]).square()
        weight = mean.clamp_min(torch.finfo(mean.dtype).tiny)
        Y, Z = shares(at, bmm(to_A, h.right_A), x, weight)
        d_A += [] if Z is None else [(square * bmm(Z, at.inv_A.full), at.A)]
        d_B += [(-square * bmm(at.inv_A.full, Y.mT), at.B)]
    return d_A, d_B


def transport(at: Point, M: Tangent, A: Rows, B: Rows) -> Tangent:
    """Carry a tangent vector to other factors (A', B'), by orthogonal projection.

    ::

        M_A' = S_B'⁻¹ B'ᵀ M          M_B' = (I − P_B') M A'ᵀ S_A'⁻¹       M = B·M_A + M_B·A
    """
    right, left = M.frame(at)  # M = left·right
    seen = at.total(inner((A, A, M.A, at.A), (B, B, at.B, M.B))).chunk(6)
    inv_A, inv_B = inverses((seen[0], seen[3]), at.dtype)
    to_A = bmm(inv_A.full, torch.cat(seen[1:3], -1))  # S_A'⁻¹·A'·Rᵀ
    to_B = bmm(inv_B.full, torch.cat(seen[4:], -1))  # S_B'⁻¹·B'ᵀ·L
    return Tangent(
        combine(*spread(to_B, right)), combine(*spread(to_A, left), (-bmm(to_A, to_B.mT), B))
    )


def store(held: list[Tensor], values: list[Tensor]) -> None:
    """Copy values to the tensors that hold them."""
    if held:
        torch._foreach_copy_(local(held), values)
