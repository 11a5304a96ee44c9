"""SGD on aligned gradients: Algorithm 1 of the LoRA-Pro paper."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lorapro.distributed.sharding import local
from lorapro.functional import align_at
from lorapro.optim.base import PAIRS, PairOptimizer, plain_gradients
from lorapro.optim.batches import batches_of
from lorapro.rates import DAMPING, chosen_rate

__all__ = ["LoraProSGD"]

MOMENTUM = "momentum_buffer"


class LoraProSGD(PairOptimizer):
    """Stochastic gradient descent along the aligned gradients (LoRA-Pro, Algorithm 1).

    ``A ← A − γ·d_A``, ``B ← B − γ·d_B`` with (d_A, d_B) of :func:`lorapro.functional.align`, so
    that ``W`` moves along the projection of its full gradient, to first order in γ. Momentum and
    weight decay, and parameters that are no pair, are ``torch.optim.SGD``'s.

    Args:
        params: groups from ``lorapro.lora_param_groups``.
        lr: learning rate γ, full fine-tuning's: the step of W is γ·g̃ whatever the scaling.
            ``None`` takes that of ``lorapro.rates``, and logs it.
        momentum: momentum factor, 0 for Algorithm 1 as printed.
        weight_decay: ``A ← (1 − γλ)A − γ·d_A``, likewise B.
        x: ``"sylvester"``, ``"zero"`` or ``"symmetric"``.
        damping: directions of ``s·B·A`` shorter than this many steps are damped, see
            :func:`lorapro.functional.align`; 0 is the paper's.

    Raises:
        ValueError: an argument out of range, an unknown x, or groups without pairs.

    >>> import torch, lorapro
    >>> from lorapro.factors import LoraPair
    >>> A, B = torch.nn.Parameter(torch.eye(2)), torch.nn.Parameter(torch.zeros(2, 2))
    >>> groups = lorapro.lora_param_groups(None, pairs=[LoraPair("w", A, B, scaling=4.0)])
    >>> optimizer = LoraProSGD(groups, lr=0.5)
    >>> (4.0 * B @ A).sum().backward()                      # g is a matrix of ones
    >>> _ = optimizer.step()
    >>> (4.0 * B @ A).detach()                              # −0.5·g, as full fine-tuning's step
    tensor([[-0.5000, -0.5000],
            [-0.5000, -0.5000]])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        x: str = "sylvester",
        damping: float = DAMPING["sgd"],
    ) -> None:
        super().__init__(
            params,
            {
                "lr": chosen_rate("sgd") if lr is None else lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "x": x,
                "damping": damping,
            },
        )

    def update(self, group: dict[str, Any]) -> None:
        """Step one group."""
        if group["role"] != PAIRS:
            self._descend(*plain_gradients(group), group)
            return
        for batches in batches_of(group["pairs"], group["params"]):
            at = batches.point()
            if group["damping"] and at.grad_B is not None:
                at = at.damped_within(group["damping"] * group["lr"], at.grad_B)
            directions = batches.moved_tensors(*align_at(at, x=group["x"]))
            self._descend(batches.moved, directions, group)

    def _descend(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        if not params:
            return
        held, params, grads = params, local(params), local(grads)
        if group["weight_decay"]:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
        if group["momentum"]:
            for p in held:
                if MOMENTUM not in self.state[p]:
                    self.state[p][MOMENTUM] = torch.zeros_like(p)
                self.check_state(p, MOMENTUM, p.shape)
            buffers = local([self.state[p][MOMENTUM] for p in held])
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads)
            grads = buffers
        torch._foreach_add_(params, torch._foreach_mul(grads, -group["lr"]))
