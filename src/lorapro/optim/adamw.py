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
from lorapro.functional import align_in, spectrum
from lorapro.optim.adam_rule import EXP_AVG, EXP_AVG_SQ, STEP, AdamRule, new_adam_state
from lorapro.optim.base import BASE, PAIRS
from lorapro.optim.factored import precondition, squared_means
from lorapro.optim.stacking import Bucket, aligned_gradients, buckets, plain_gradients
from lorapro.optim.tangent import TangentOptimizer, left_right

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
    ) -> None:
        self.check_adam(betas, eps)
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "mode": mode,
            "x": x,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, see :class:`PairOptimizer`; an unknown mode is a ``ValueError``."""
        check_choice("mode", param_group.get("mode", self.defaults["mode"]), MODES)
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
            self.adamw_update(*aligned_gradients(group, group["x"]), group)
        elif group["mode"] == "factored":
            self.tangent_update(group)
        else:
            for bucket in buckets(group):
                self._full_update(bucket, group)

    def decay(self, group: dict[str, Any]) -> float:
        """β1 of factored mode."""
        return group["betas"][0]

    def new_state(self, A: Tensor, B: Tensor, b: Bucket) -> None:
        """Momentum and the two means of factored mode."""
        super().new_state(A, B, b)
        self.state[B][ROWS] = torch.zeros(b.blocks, b.B.shape[-2], dtype=B.dtype, device=B.device)
        self.state[A][COLUMNS] = torch.zeros(
            b.blocks, b.A.shape[-1], dtype=A.dtype, device=A.device
        )

    def direction(
        self,
        b: Bucket,
        group: dict[str, Any],
        M: tuple[Tensor, Tensor],
        G: tuple[Tensor, Tensor],
        s: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Factored mode: ``h = D_row·M̂·D_col``."""
        beta1, beta2 = group["betas"]
        A, B = b.A.double(), b.B.double()
        means = squared_means(*left_right(A, B, *G, s))
        held = (
            [self.state[B][ROWS] for B in b.params_B],
            [self.state[A][COLUMNS] for A in b.params_A],
        )
        steps = torch.stack([self.state[B][STEP] for B in b.params_B]).double().to(A.device)
        steps = steps.repeat_interleave(b.blocks)[:, None]
        rows, columns = (
            _average(kept, mean, beta2) / (1 - beta2**steps)
            for kept, mean in zip(held, means, strict=True)
        )
        L, R = left_right(A, B, *M, s)
        L = L / (1 - beta1**steps)[..., None]
        return precondition(L, R, rows, columns, group["eps"])

    def _full_update(self, b: Bucket, group: dict[str, Any]) -> None:
        """Algorithm 3 for pairs of one shape. The (m, n) part goes pair by pair."""
        (beta1, beta2), lr = group["betas"], group["lr"]
        spec = spectrum(b.A, b.B)
        d_A, d_B = align_in(spec, b.A, b.B, b.grad_A, b.grad_B, b.scaling, x="zero")
        s = torch.as_tensor(b.scaling, dtype=torch.float64, device=b.A.device)
        s = s.expand(b.A.shape[0])[:, None, None]
        h_A, h_B = [], []
        for i, B in enumerate(b.params_B):
            part = slice(i * b.blocks, (i + 1) * b.blocks)
            A_i, B_i = b.A[part].to(torch.promote_types(b.A.dtype, torch.float32)), b.B[part]
            B_i = B_i.to(A_i.dtype)
            g = torch.zeros((), dtype=A_i.dtype, device=A_i.device)
            if d_A is not None:
                g = g + B_i @ (s[part] * d_A[part]).to(A_i.dtype)
            if d_B is not None:
                g = g + (s[part] * d_B[part]).to(A_i.dtype) @ A_i
            state = self.state[B]
            if not state:
                state.update(new_adam_state(B, shape=g.shape))
            h = _adam_direction(state, g, beta1, beta2, group["eps"])
            h_A.append(s[part] * (B_i.mT @ h))
            h_B.append(s[part] * (h @ A_i.mT))
        d_A, d_B = align_in(
            spec,
            b.A,
            b.B,
            None if b.grad_A is None else torch.cat(h_A),
            None if b.grad_B is None else torch.cat(h_B),
            b.scaling,
            x=group["x"],
        )
        if group["weight_decay"]:
            keep = max(0.0, 1 - lr * group["weight_decay"]) ** 0.5
            torch._foreach_mul_([*b.params_A, *b.params_B], keep)
        params, directions = b.by_parameter(d_A, d_B)
        torch._foreach_sub_(params, torch._foreach_mul(directions, lr))


def _adam_direction(
    state: dict[str, Tensor], g: Tensor, beta1: float, beta2: float, eps: float
) -> Tensor:
    """Update the moments by g and return ``h = m̂ / (√v̂ + ε)``."""
    step, m, v = state[STEP], state[EXP_AVG], state[EXP_AVG_SQ]
    step += 1
    t = int(step)  # the counter lives on the host
    m.lerp_(g.to(m.dtype), 1 - beta1)
    v.mul_(beta2).addcmul_(g.to(v.dtype), g.to(v.dtype), value=1 - beta2)
    denominator = (v.to(g.dtype) / (1 - beta2**t)).sqrt_().add_(eps)
    return (m.to(g.dtype) / (1 - beta1**t)).div_(denominator)


def _average(held: list[Tensor], new: Tensor, beta: float) -> Tensor:
    """Moving average of stacked values, written back to the tensors that hold it."""
    moment = torch.cat(held).to(new.dtype).lerp(new, 1 - beta)
    for kept, part in zip(held, moment.split(held[0].shape[0]), strict=True):
        kept.copy_(part)
    return moment
