"""AdamW on pairs: the paper's Algorithms 2 (efficient) and 3 (full), and ours, factored mode.

Shape letters: m, n rows and columns of W; r rank; k pairs stacked by shape.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lorapro.choices import check_choice
from lorapro.optim.adam_rule import (
    EXP_AVG,
    EXP_AVG_SQ,
    STEP,
    AdamRule,
    check_state,
    new_adam_state,
)
from lorapro.optim.aligned import aligned_gradients
from lorapro.optim.base import BASE, PAIRS
from lorapro.optim.factored import scales, squared_means
from lorapro.optim.native.steps import step_pairs
from lorapro.optim.spaces import Direction, Space, Tangent
from lorapro.optim.stacking import Bucket, plain_gradients
from lorapro.optim.stacks import Tall, Wide, split
from lorapro.optim.tangent import TangentOptimizer, gradients, spaces, take_steps

__all__ = ["MODES", "LoraProAdamW"]

logger = logging.getLogger(__name__)

MODES = ("efficient", "full", "factored")
ROWS, COLUMNS = "row_means", "column_means"


class LoraProAdamW(AdamRule, TangentOptimizer):
    """AdamW that follows full fine-tuning's AdamW through low-rank adapters.

    ``mode="efficient"`` (Algorithm 2) runs AdamW on the aligned gradients (d_A, d_B); its state is
    that of LoRA's AdamW. ``mode="full"`` (Algorithm 3) keeps both moments of the equivalent
    gradient g̃, two (m, n) tensors a pair, takes ``h = m̂ / (√v̂ + ε)`` and steps along
    ``align(s·Bᵀh, s·h·Aᵀ)``. ``mode="factored"`` (ours) does the same at LoRA's memory: the first
    moment is a tangent vector that moves with the factors, the second is kept as row and column
    means of g̃∘g̃ (``lorapro.optim.tangent``); no (m, n) tensor is ever formed. The paper prints
    ``v̂ = v/(1 − β1ᵗ)`` in Algorithm 2; it is β2.

    ``steady=True`` mends how efficient mode starts (ours). From ``B = 0``, d_A is first of the size
    of 1/‖B‖, and Adam's second moment remembers that for about 1/(1 − β2) steps, in which A hardly
    moves. The moments of A then see ``(s·‖B‖_F/√r)·d_A``, whose size does not depend on B's. The
    equivalent gradient is the same; only Adam's memory of its sizes differs.

    Weight decay λ in efficient mode acts on A and B, in factored mode on their product,
    ``s·B·A ← (1 − γλ)·s·B·A``. In full mode it acts on W, Eq. (58):
    ``W0 ← (1 − γλ)W0``, ``A ← √(1 − γλ)·A``, ``B ← √(1 − γλ)·B``, with γ the current learning
    rate. The base weights then change during training, which an adapter saved alone does not
    carry: save the merged model. ``state_dict`` does carry them, so that a run can be resumed.

    Parameters that are no pair get ``torch.optim.AdamW``'s rule.

    Args:
        params: groups from ``lorapro.lora_param_groups``.
        lr: learning rate γ. Full and factored mode want full fine-tuning's, efficient
            mode LoRA's or more.
        betas: decay rates of the first and second moment.
        eps: added to √v̂, as ``torch.optim.AdamW`` has it.
        weight_decay: λ.
        mode: ``"efficient"``, ``"full"`` or ``"factored"``.
        x: ``"sylvester"``, ``"zero"`` or ``"symmetric"``, see :func:`lorapro.functional.align`.
        steady: moments of A in units of its partner; efficient mode only.

    Raises:
        ValueError: an argument out of range, an unknown mode or x, groups without pairs, or weight
            decay in full mode on a base that cannot be scaled (a quantized one).

    >>> import torch, lorapro
    >>> from lorapro.factors import LoraPair
    >>> A, B = torch.nn.Parameter(torch.randn(2, 6)), torch.nn.Parameter(torch.zeros(4, 2))
    >>> groups = lorapro.lora_param_groups(None, pairs=[LoraPair("w", A, B, scaling=4.0)])
    >>> optimizer = LoraProAdamW(groups, lr=1e-3)
    >>> (4.0 * B @ A).square().sub(1).square().mean().backward()
    >>> _ = optimizer.step()
    >>> sorted(optimizer.state[B])
    ['exp_avg', 'exp_avg_sq', 'step']
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        mode: str = "efficient",
        x: str = "sylvester",
        steady: bool = False,
    ) -> None:
        self.check_adam(betas, eps)
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "mode": mode,
            "x": x,
            "steady": steady,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, see :class:`PairOptimizer`; an unknown mode is a ``ValueError``."""
        mode, steady = (param_group.get(k, self.defaults[k]) for k in ("mode", "steady"))
        check_choice("mode", mode, MODES)
        if steady and mode != "efficient":
            raise ValueError(f"steady=True is for mode='efficient', found mode={mode!r}.")
        super().add_param_group(param_group)

    def bases_to_move(self, group: dict[str, Any], bases: list[Any]) -> list[Any]:
        """In full mode with weight decay: the base weight of every pair (Eq. 58)."""
        mode, decay = (group.get(k, self.defaults[k]) for k in ("mode", "weight_decay"))
        if group["role"] != PAIRS or mode != "full" or not decay:
            return []
        for name, base in zip(group["names"], bases, strict=True):
            if base is None:
                raise ValueError(
                    f"weight decay in full mode scales the base weight (Eq. 58), but that of "
                    f"{name!r} cannot be scaled (none was given, or it is quantized or made anew "
                    "in every forward pass); use weight_decay=0 or mode='efficient'."
                )
        logger.warning(
            "full mode with weight decay changes the base weights, which an adapter saved alone "
            "does not carry: save the merged model (lorapro.save_merged)."
        )
        known = {id(p) for g in self.param_groups if g["role"] == BASE for p in g["params"]}
        return list({id(base): base for base in bases if id(base) not in known}.values())

    def update(self, group: dict[str, Any]) -> None:
        """Step one group."""
        if group["role"] != PAIRS:
            self.adamw_update(*plain_gradients(group), group)
        elif group["mode"] == "efficient":
            rest = step_pairs(
                group,
                "efficient",
                self.adam_states,
                betas=group["betas"],
                eps=group["eps"],
                flag=group["steady"],
            )
            for params, directions in aligned_gradients(
                rest, group["x"], steady=group["steady"], native=False
            ):
                self.adamw_update(params, directions, group)
        elif group["mode"] == "factored":
            self.tangent_update(
                step_pairs(
                    group,
                    "factored",
                    self.factored_states,
                    betas=group["betas"],
                    eps=group["eps"],
                )
            )
        else:
            rest = step_pairs(
                group, "full", self.full_states, betas=group["betas"], eps=group["eps"]
            )
            for part, space in spaces(rest):
                self._full_update(part, space, group)

    def decay(self, group: dict[str, Any]) -> float:
        """β1 of factored mode."""
        return group["betas"][0]

    def new_state(self, A: Tensor, B: Tensor, blocks: int, m: int, n: int) -> None:
        """Momentum and the two means of factored mode."""
        super().new_state(A, B, blocks, m, n)
        self.state[B][ROWS] = torch.zeros(blocks, m, dtype=B.dtype, device=B.device)
        self.state[A][COLUMNS] = torch.zeros(blocks, n, dtype=A.dtype, device=A.device)

    def factored_states(self, A: Tensor, B: Tensor) -> list[Tensor]:
        """What factored mode keeps of one pair of matrices, made if need be."""
        momentum_A, momentum_B, step = self.tangent_states(A, B)
        columns = check_state(self.state[A], COLUMNS, A[0].numel())
        return [momentum_A, momentum_B, columns, check_state(self.state[B], ROWS, len(B)), step]

    def direction(
        self, group: dict[str, Any], part: list[Bucket], space: Space, M: Tangent, G: Tangent
    ) -> Direction:
        """Factored mode: ``h = D_row·M̂·D_col`` with ``M = s·[B, M_B]·[M_A; A]``."""
        beta1, beta2 = group["betas"]
        left: list[list[Tensor]] = [[], []]
        right: list[list[Tensor]] = [[], []]
        sizes = split(space.s, space.A)
        for i, (b, row, column) in enumerate(zip(part, *squared_means(space, G), strict=True)):
            held = [self.state[B][ROWS] for B in b.params_B]
            held_columns = [self.state[A][COLUMNS] for A in b.params_A]
            t = torch.tensor([float(self.state[B][STEP]) for B in b.params_B], dtype=row.dtype)
            t = t.repeat_interleave(b.blocks)[:, None].to(row.device)
            rows = _average(held, row, beta2) / (1 - beta2**t)
            columns = _average(held_columns, column, beta2) / (1 - beta2**t)
            D_row, D_col = scales(rows, columns, group["eps"])
            D_row = (D_row * (sizes[i][:, 0] / (1 - beta1**t))).unsqueeze(-1)
            for out, side in zip(left, (space.B, M.B), strict=True):
                out.append(D_row * side.parts[i])
            for out, wide in zip(right, (M.A, space.A), strict=True):
                out.append(wide.parts[i] * D_col.unsqueeze(-2))
        return Direction((Tall(left[0]), Tall(left[1])), (Wide(right[0]), Wide(right[1])))

    def full_states(self, A: Tensor, B: Tensor) -> list[Tensor]:
        """Full mode's moments (1, m, n) and step counter of a pair of matrices."""
        state, m, n = self.state[B], len(B), A[0].numel()
        if not state:
            state.update(new_adam_state(B, shape=torch.Size((1, m, n))))
        moments = [check_state(state, key, m * n) for key in (EXP_AVG, EXP_AVG_SQ)]
        return [*moments, state[STEP]]

    def _full_update(self, part: list[Bucket], space: Space, group: dict[str, Any]) -> None:
        """Algorithm 3. The (m, n) part goes pair by pair."""
        G = space.project(*gradients(part, space))
        h_A, h_B = [], []
        for b, s, G_A, G_B in zip(part, split(space.s, space.A), G.A.parts, G.B.parts, strict=True):
            sides = self._full_directions(b, s, G_A, G_B, group)
            h_A.append(sides[0].to(G_A.dtype))
            h_B.append(sides[1].to(G_B.dtype))
        take_steps(part, space, *space.align(Wide(h_A), Tall(h_B)), group)

    def _full_directions(
        self, b: Bucket, s: Tensor, G_A: Tensor, G_B: Tensor, group: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """``(s·Bᵀh, s·h·Aᵀ)`` of pairs of one shape, ``h = m̂/(√v̂ + ε)`` from moments of g̃."""
        beta1, beta2 = group["betas"]
        work = torch.promote_types(b.A.dtype, torch.float32)
        A, B, s, G_A, G_B = (t.to(work) for t in (b.A, b.B, s, G_A, G_B))
        L, R = s * torch.cat([B, G_B], -1), torch.cat([G_A, A], -2)
        h_A, h_B = [], []
        for i, key in enumerate(b.params_B):
            rows = slice(i * b.blocks, (i + 1) * b.blocks)
            g = L[rows] @ R[rows]
            state = self.state[key]
            if not state:
                state.update(new_adam_state(key, shape=g.shape))
            h = _adam_direction(state, g, beta1, beta2, group["eps"])
            h_A.append(s[rows] * (B[rows].mT @ h))
            h_B.append(s[rows] * (h @ A[rows].mT))
        return torch.cat(h_A), torch.cat(h_B)


def _adam_direction(
    state: dict[str, Tensor], g: Tensor, beta1: float, beta2: float, eps: float
) -> Tensor:
    """Update the moments by g and return ``h = m̂ / (√v̂ + ε)``."""
    step, m, v = state[STEP], state[EXP_AVG], state[EXP_AVG_SQ]
    step += 1
    t = int(step)  # the counter lives on the host
    m.lerp_(g.to(m.dtype), 1 - beta1)
    v.mul_(beta2).addcmul_(g.to(v.dtype), g.to(v.dtype), value=1 - beta2)
    # m̂/(√v̂ + ε) with the bias corrections taken out of the passes over (m, n).
    root = (1 - beta2**t) ** 0.5
    h = v.to(g.dtype).sqrt().add_(eps * root)
    return torch.div(m.to(g.dtype), h, out=h).mul_(root / (1 - beta1**t))


def _average(held: list[Tensor], new: Tensor, beta: float) -> Tensor:
    """Moving average of stacked values, written back to the tensors that hold it."""
    moment = torch.cat(held).to(new.dtype).lerp(new, 1 - beta)
    for kept, part in zip(held, moment.split(held[0].shape[0]), strict=True):
        kept.copy_(part)
    return moment
