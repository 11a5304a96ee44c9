"""Full fine-tuning's rules on the low-rank tangent space, at LoRA's memory.

One step of every optimizer built on this file::

    project    (G_A, G_B) = align(grad_A, grad_B), X = 0: the gradient as a tangent vector
    momentum   M ← β·M + (1 − β)·G, in the coordinates M = s·(B·M_A + M_B·A)
    rule       h = rule(M): what full fine-tuning would do with M, kept as a product L'·R'
    align      (d_A, d_B) = align(s·Bᵀh, s·h·Aᵀ), then A ← A − γ·d_A, B ← B − γ·d_B; where that is
               no small step, W moves along the tangent and back to rank r (``retraction``)
    transport  M ← projection of M on the tangent space at the new factors

A tangent vector has rank 2r, so no step forms an (m, n) tensor. A new rule is a subclass of
:class:`TangentOptimizer` with one method.

Pairs whose factors are well conditioned go through :class:`lorapro.optim.spaces.FastSpace`, all
shapes of one rank together; the others, float64 factors and other devices through
:class:`lorapro.optim.spaces.ExactSpace`.

Shape letters
    m, n   rows and columns of W;   r  rank;   k  pairs;   s  scaling (k, 1, 1)
    A, M_A, G_A, d_A  (k, r, n);   B, M_B, G_B, d_B  (k, m, r)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lorapro.optim.adam_rule import check_state
from lorapro.optim.base import PairOptimizer
from lorapro.optim.retraction import outruns, retract
from lorapro.optim.spaces import Direction, ExactSpace, FastSpace, Space, Tangent
from lorapro.optim.stacking import Bucket, in_parts
from lorapro.optim.stacks import Tall, Wide, fill_their_memory, in_one_piece, split

__all__ = ["TangentOptimizer", "gradients", "spaces", "take_steps"]

STEP, MOMENTUM = "step", "momentum"


class TangentOptimizer(PairOptimizer):
    """Base of the optimizers that run a full fine-tuning rule on the tangent space.

    Subclasses say how fast momentum decays (:meth:`decay`) and give the rule (:meth:`direction`).
    """

    def decay(self, group: dict[str, Any]) -> float:
        """β of the momentum."""
        raise NotImplementedError

    def direction(
        self, group: dict[str, Any], part: list[Bucket], space: Space, M: Tangent, G: Tangent
    ) -> Direction:
        """The rule: from momentum M and gradient G, tangent vectors at ``space``, to h."""
        raise NotImplementedError

    def new_state(self, A: Tensor, B: Tensor, blocks: int, m: int, n: int) -> None:
        """Make the state of ``blocks`` pairs in two parameters; subclasses add their rule's."""
        self.state[A][MOMENTUM] = torch.zeros_like(A)
        self.state[B][MOMENTUM] = torch.zeros_like(B)
        self.state[B][STEP] = torch.zeros((), dtype=torch.float32)

    def tangent_states(self, A: Tensor, B: Tensor) -> list[Tensor]:
        """The state of one pair of matrices, made if need be: momentum of A, of B, counter."""
        if MOMENTUM not in self.state[B]:
            rank = A.shape[0]
            self.new_state(A, B, 1, B.numel() // rank, A.numel() // rank)
        momentum = [check_state(self.state[p], MOMENTUM, p.numel()) for p in (A, B)]
        return [*momentum, self.state[B][STEP]]

    @torch.no_grad()
    def tangent_update(self, group: dict[str, Any]) -> None:
        """One step of every pair of a group."""
        for part, space in spaces(group):
            counters = []
            for b in part:
                for A, B in zip(b.params_A, b.params_B, strict=True):
                    if MOMENTUM not in self.state[B]:
                        self.new_state(A, B, b.blocks, b.B.shape[-2], b.A.shape[-1])
                    counters.append(self.state[B][STEP])
            torch._foreach_add_(counters, 1)
            self._step(group, part, space)

    def _step(self, group: dict[str, Any], part: list[Bucket], space: Space) -> None:
        beta = self.decay(group)
        G = space.project(*gradients(part, space))
        M = self._momentum(part, space.s.dtype).lerp(G, 1 - beta)
        d_A, d_B = space.steps(self.direction(group, part, space, M, G))
        too_far = outruns(space, d_A, d_B, group["lr"])
        self._transport(part, space, take_steps(part, space, d_A, d_B, group, too_far), M)

    def _transport(
        self, part: list[Bucket], space: Space, factors: tuple[Wide, Tall], M: Tangent
    ) -> None:
        """Carry the momentum to the new factors, exactly where float32 is not up to it."""
        A, B = factors
        if isinstance(space, FastSpace):
            new = FastSpace(A, B, space.s, "zero")
            if new.grams.sure.all():
                self._keep_momentum(part, new.receive(space, M))
                return
        for i, b in enumerate(part):
            s = torch.ones(len(b.A), 1, 1, device=space.s.device)
            old, to = (  # in the dtype of the parameters, whose rounding says what rank they have
                ExactSpace(
                    at_A.parts[i].to(b.A.dtype), at_B.parts[i].to(b.B.dtype), s, "zero", b.moves
                )
                for at_A, at_B in ((space.A, space.B), (A, B))
            )
            carried = to.receive(old, Tangent(Wide([M.A.parts[i]]), Tall([M.B.parts[i]])))
            self._keep_momentum([b], carried)

    def _momentum(self, part: list[Bucket], dtype: torch.dtype) -> Tangent:
        A, B = [], []
        for b in part:
            held_A = [self.state[p][MOMENTUM] for p in b.params_A]
            held_B = [self.state[p][MOMENTUM] for p in b.params_B]
            stack_A = stack_B = None
            if b.layout == "matrix":  # elsewhere a parameter holds several matrices
                stack_A, stack_B = in_one_piece(held_A), in_one_piece(held_B)
            A.append((b.stack_A(held_A) if stack_A is None else stack_A).to(dtype))
            B.append((b.stack_B(held_B) if stack_B is None else stack_B).to(dtype))
        return Tangent(Wide(A), Tall(B))

    def _keep_momentum(self, part: list[Bucket], M: Tangent) -> None:
        """Keep the stacks themselves, each parameter's state a view: the next step reads them.

        Where others still hold a view of the memory of these states, which would be kept alive
        beside the new one, they are written in place.
        """
        for b, M_A, M_B in zip(part, M.A.parts, M.B.parts, strict=True):
            for params, new in ((b.params_A, b.unstack_A(M_A)), (b.params_B, b.unstack_B(M_B))):
                held = [self.state[p][MOMENTUM] for p in params]
                if fill_their_memory(held):
                    for p, kept in zip(params, new, strict=True):
                        self.state[p][MOMENTUM] = kept
                else:
                    torch._foreach_copy_(held, new)


def gradients(part: list[Bucket], space: Space) -> tuple[Wide | None, Tall | None]:
    """Gradients of A and of B in the precision of the space; ``None`` for a frozen factor."""
    dtype = space.s.dtype
    return (
        None if part[0].grad_A is None else Wide([b.grad_A.to(dtype) for b in part]),  # type: ignore[union-attr]
        None if part[0].grad_B is None else Tall([b.grad_B.to(dtype) for b in part]),  # type: ignore[union-attr]
    )


def take_steps(
    part: list[Bucket],
    space: Space,
    d_A: Wide,
    d_B: Tall,
    group: dict[str, Any],
    too_far: Tensor | None = None,
) -> tuple[Wide, Tall]:
    """``A ← √(1 − γλ)·A − γ·d_A``, likewise B, where there is a gradient; return the factors.

    The pairs marked in ``too_far`` are retracted.
    """
    lr, keep = group["lr"], max(0.0, 1 - group["lr"] * group["weight_decay"]) ** 0.5
    marks = [None] * len(part) if too_far is None else split(too_far, space.A)
    new_A, new_B = [], []
    for i, (b, mark) in enumerate(zip(part, marks, strict=True)):
        A, B = space.A.parts[i], space.B.parts[i]
        dtypes = b.params_A[0].dtype, b.params_B[0].dtype
        if b.grad_A is not None:
            A = _stepped(A, d_A.parts[i], keep, lr, dtypes[0])
        if b.grad_B is not None:
            B = _stepped(B, d_B.parts[i], keep, lr, dtypes[1])
        if keep and mark is not None and mark.any():
            ends = (space.A.parts[i], space.B.parts[i], d_A.parts[i], d_B.parts[i])
            at_A, at_B, to_A, to_B = (t[mark].double() for t in ends)
            back = retract(keep * at_A, keep * at_B, to_A, to_B, lr)
            A, B = A.clone(), B.clone()
            A[mark], B[mark] = (t.to(d).to(A.dtype) for t, d in zip(back, dtypes, strict=True))
        if b.grad_A is not None:
            torch._foreach_copy_(b.params_A, b.unstack_A(A))
        if b.grad_B is not None:
            torch._foreach_copy_(b.params_B, b.unstack_B(B))
        new_A.append(A)
        new_B.append(B)
    return Wide(new_A), Tall(new_B)


def _stepped(P: Tensor, d: Tensor, keep: float, lr: float, dtype: torch.dtype) -> Tensor:
    """``keep·P − lr·d``, rounded to the dtype of the parameters."""
    P = P if keep == 1 else keep * P
    new = torch.add(P, d, alpha=-lr)
    return new if new.dtype == dtype else new.to(dtype).to(new.dtype)


def spaces(group: dict[str, Any]) -> Iterator[tuple[list[Bucket], Space]]:
    """Yield buckets that can be stepped together, and the space they are stepped in."""
    x = group["x"]
    for part in in_parts(group):
        if not part[0].fits_batched:
            yield [part[0]], _exact(part[0], x)
            continue
        space = _fast(part, x)
        if not space.grams.sure.all():
            sure = space.grams.sure.split([len(b.A) for b in part])
            chosen = [b.split(which) for b, which in zip(part, sure, strict=True)]
            for _, other in chosen:
                if other is not None:
                    yield [other], _exact(other, x)
            part = [b for b, _ in chosen if b is not None]
            if not part:
                continue
            space = _fast(part, x)
        yield part, space


def _fast(part: list[Bucket], x: str) -> FastSpace:
    A, B = Wide([b.A.float() for b in part]), Tall([b.B.float() for b in part])
    return FastSpace(A, B, torch.cat([b.s for b in part]).float(), x)


def _exact(b: Bucket, x: str) -> ExactSpace:
    return ExactSpace(b.A, b.B, b.s, x, b.moves)
