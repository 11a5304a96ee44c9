"""AdamW on pairs: the paper's Algorithms 2 (efficient) and 3 (full), and ours, factored mode.

Shape letters: m, n rows and columns of W; r rank; k pairs stacked by shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lorapro.choices import check_choice
from lorapro.distributed.sharding import local, zeros_like_columns
from lorapro.functional import align_at
from lorapro.gram import Rows, trace
from lorapro.optim.base import PAIRS, plain_gradients
from lorapro.optim.batches import OF_A, OF_B, Batches, Part, batches_of
from lorapro.optim.rules import Tangent, factored_adam, squared_means
from lorapro.optim.tangent import EXP_AVG, EXP_AVG_SQ, STEP, TangentOptimizer
from lorapro.point import Point
from lorapro.rates import DAMPING, chosen_rate

__all__ = ["MODES", "LoraProAdamW"]

MODES = ("efficient", "full", "factored")
ROWS, COLUMNS = "row_means", "column_means"


class LoraProAdamW(TangentOptimizer):
    """AdamW that follows full fine-tuning's AdamW through low-rank adapters.

    ``mode="efficient"`` (Algorithm 2) runs AdamW on the aligned gradients (d_A, d_B); its state is
    that of LoRA's AdamW. ``mode="full"`` (Algorithm 3) keeps both moments of the equivalent
    gradient g̃, two (m, n) tensors a pair, takes ``h = m̂ / (√v̂ + ε)`` and steps along
    ``align(s·Bᵀh, s·h·Aᵀ)``. ``mode="factored"`` (ours) does the same at LoRA's memory, and forms
    no (m, n) tensor: the first moment is that of the two gradients, projected at every step, the
    second the row and column means of g̃∘g̃. (Algorithm 2 prints β1 in v̂; it is β2.)

    ``damping = c > 0`` (ours) bounds d_A where B is small or of deficient rank: directions of
    ``s·B·A`` shorter than c steps are not divided by (:func:`lorapro.functional.align`). Undamped,
    from ``B = 0``, Adam's second moment remembers a d_A of the size of 1/‖B‖ for 1/(1 − β2) steps.

    Weight decay λ in efficient mode acts on A and B, in factored mode on their product,
    ``s·B·A ← (1 − γλ)·s·B·A``. In full mode it acts on W, Eq. (58):
    ``W0 ← (1 − γλ)W0``, ``A ← √(1 − γλ)·A``, ``B ← √(1 − γλ)·B``, with γ the current learning
    rate. The base weights then change, which ``state_dict`` carries and an adapter saved alone does
    not: save the merged model. Parameters that are no pair get ``torch.optim.AdamW``'s rule.

    Args:
        params: groups from ``lorapro.lora_param_groups``.
        lr: learning rate γ; ``None`` takes the mode's of ``lorapro.rates``, and logs it. Full and
            factored mode want full fine-tuning's, efficient mode LoRA's or more.
        betas: decay rates of the first and second moment.
        eps: added to √v̂, as ``torch.optim.AdamW`` has it.
        weight_decay: λ.
        mode: ``"efficient"``, ``"full"`` or ``"factored"``.
        x: ``"sylvester"``, ``"zero"`` or ``"symmetric"``, see :func:`lorapro.functional.align`;
            without effect in factored mode, which takes ``"zero"`` (``docs/decisions.md``).
        damping: c, in steps; ``None`` takes the mode's of ``lorapro.rates``; 0 is the paper's.

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
        lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        mode: str = "efficient",
        x: str = "sylvester",
        damping: float | None = None,
    ) -> None:
        check_choice("mode", mode, MODES)
        defaults = {
            "lr": chosen_rate(mode) if lr is None else lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "mode": mode,
            "x": x,
            "damping": DAMPING[mode] if damping is None else damping,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, see :class:`PairOptimizer`; an unknown mode is a ``ValueError``."""
        check_choice("mode", param_group.get("mode", self.defaults["mode"]), MODES)
        super().add_param_group(param_group)

    def decays_bases(self, group: dict[str, Any]) -> bool:
        """In full mode with weight decay, Eq. (58)."""
        return group["mode"] == "full" and bool(group["weight_decay"])

    def update(self, group: dict[str, Any]) -> None:
        """Step one group."""
        if group["role"] != PAIRS:
            self.adamw_update(*plain_gradients(group), group)
            return
        steps = {"efficient": self._efficient, "full": self._full, "factored": self._factored}
        for batches in batches_of(group["pairs"], group["params"]):
            steps[group["mode"]](group, batches)

    def _efficient(self, group: dict[str, Any], batches: Batches) -> None:
        """Algorithm 2: AdamW on the aligned gradients."""
        directions = efficient_directions(batches, group["x"], group["damping"] * group["lr"])
        self.adamw_update(batches.moved, batches.moved_tensors(*directions), group)

    def _full(self, group: dict[str, Any], batches: Batches) -> None:
        """Algorithm 3: AdamW's moments of g̃, aligned again."""
        at = batches.point()
        G = projected(at)
        self._make_full_state(batches)
        of_B = batches.params(OF_B)
        steps = self.held(of_B, STEP)
        m, v = (local(self.held(of_B, key)) for key in (EXP_AVG, EXP_AVG_SQ))
        torch._foreach_add_(steps + self.held(batches.params(OF_A), STEP), 1)
        t, s = batches.per_matrix(steps), at.s.to(at.dtype)
        beta1, beta2 = group["betas"]
        root = (1 - beta2**t).sqrt()
        sizes = [part.count for part in batches.parts]
        eps, scale = (
            x.to(at.dtype).split(sizes) for x in (group["eps"] * root, at.s * root / (1 - beta1**t))
        )
        A, G_A = (
            batches.sharding.whole(X, [p.shape[1] for p in batches.parts]) for X in (at.A, G[OF_A])
        )
        h_A: list[Tensor] = []
        h_B: list[Tensor] = []
        first = 0
        for i, (part, s_i) in enumerate(zip(batches.parts, s.split(sizes), strict=True)):
            here = slice(first, first + len(part.scalings))
            first = here.stop
            g = torch.baddbmm(G[OF_B][i].mT @ A[i], at.B[i].mT, G_A[i]).mul_(s_i)
            h = _adam_direction(part, g, m[here], v[here], group["betas"], eps[i]).mul_(scale[i])
            h_A.append(at.B[i] @ h)
            h_B.append(A[i] @ h.mT)
        along = batches.sharding.sum_to_columns(h_A), h_B
        self.step_along(group, batches, at, along, group["x"])

    def _make_full_state(self, batches: Batches) -> None:
        for part in batches.parts:
            m, n = part.shape
            for A, B in zip(*part.params, strict=True):
                if not self.state[B]:
                    self.new_adam_state(B, shape=torch.Size((part.blocks, m, n)))
                if not self.state[A]:  # torch.distributed.checkpoint wants a state of everything
                    self.state[A][STEP] = torch.zeros((), dtype=torch.float32, device=A.device)
                for key in (EXP_AVG, EXP_AVG_SQ):
                    self.check_state(B, key, (part.blocks, m, n))

    def new_state(self, A: Tensor, B: Tensor, blocks: int) -> None:
        """Momentum and the two means of factored mode."""
        super().new_state(A, B, blocks)
        m, n = (p.numel() // A.shape[0] for p in (B, A))
        # float16 does not hold squares, bfloat16 no average that moves by a thousandth.
        dtype = torch.promote_types(B.dtype, torch.float32)
        self.state[B][ROWS] = zeros_like_columns(B, (blocks, m), 1, dtype)
        self.state[A][COLUMNS] = zeros_like_columns(A, (blocks, n), 1, dtype)

    def _factored(self, group: dict[str, Any], batches: Batches) -> None:
        """AdamW with row and column means for a second moment."""
        beta1, beta2 = group["betas"]
        at = batches.point()
        N = self.momenta(batches, (at.grad_A, at.grad_B), beta1)
        m, n = batches.per_part(lambda shape: shape[0]), batches.per_part(lambda shape: shape[1])
        rows, columns = squared_means(at, m, n)
        rows = self._average(batches, OF_B, ROWS, rows, beta2)
        columns = self._average(batches, OF_A, COLUMNS, columns, beta2)
        t = batches.per_matrix(self.held(batches.params(OF_B), STEP))
        root = (1 - beta2**t).sqrt()
        scale, eps = root / (1 - beta1**t), group["eps"] * root
        M, means = projected(at.along(*N)), batches.means_of_B(rows)
        h = factored_adam(at, M, rows, columns, means, scale, eps)
        self.step_along(group, batches, at, h, "zero", entries=m * n)

    def _average(self, batches: Batches, side: int, key: str, new: Rows, beta: float) -> Rows:
        """Moving averages of what is kept of the parameters of every part."""
        held = [local(self.held(part.params[side], key)) for part in batches.parts]
        dtype = held[0][0].dtype
        values = [
            v
            for part, x in zip(batches.parts, new, strict=True)
            for v in x.to(dtype).split(part.blocks)
        ]
        torch._foreach_lerp_([h for of_part in held for h in of_part], values, 1 - beta)
        return [torch.cat(of_part).to(new[0].dtype) for of_part in held]


def projected(at: Point) -> Tangent:
    """The gradients as a tangent vector; the part of a frozen factor is zero."""
    d_A, d_B = align_at(at, x="zero")
    return (
        [torch.zeros_like(a) for a in at.A] if d_A is None else d_A,
        [torch.zeros_like(b) for b in at.B] if d_B is None else d_B,
    )


def efficient_directions(
    batches: Batches, x: str, reach: float | Tensor
) -> tuple[Rows | None, Rows | None]:
    """Aligned gradients for a rule that divides them by their own size, as Adam does.

    Such a step moves every entry of B by about γ, that is W by ``s·γ·√m·σ(A)`` at most:
    ``reach = γ·damping`` counts in those.
    """
    at = batches.point()
    if isinstance(reach, Tensor) or reach:
        columns = batches.per_part(lambda shape: shape[0] ** 0.5)
        at = at.damped(reach * columns * at.s * (trace(at.S_A) / at.S_A.shape[-1]).sqrt())
    return align_at(at, x=x)


def _adam_direction(
    part: Part,
    g: Tensor,
    m: list[Tensor],
    v: list[Tensor],
    betas: tuple[float, float],
    eps: Tensor,
) -> Tensor:
    """Update the moments by g (k, m, n) and return ``m/(√v + ε)`` in the memory of g."""
    gs = list(g.split(part.blocks))
    same = [x.to(m[0].dtype) for x in gs] if m[0].dtype != g.dtype else gs
    shaped = [x.view(part.blocks, *g.shape[1:]) for x in m]
    squares = [x.view(part.blocks, *g.shape[1:]) for x in v]
    torch._foreach_lerp_(shaped, same, 1 - betas[0])
    torch._foreach_mul_(squares, betas[1])
    torch._foreach_addcmul_(squares, same, same, 1 - betas[1])
    torch._foreach_copy_(gs, squares)
    g.sqrt_().add_(eps).reciprocal_()
    torch._foreach_mul_(gs, shaped)
    return g
