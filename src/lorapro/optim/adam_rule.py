"""AdamW as torch has it, for whatever gradients an optimizer of this package has at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

__all__ = ["EXP_AVG", "EXP_AVG_SQ", "STEP", "AdamRule", "check_state", "new_adam_state"]

STEP, EXP_AVG, EXP_AVG_SQ = "step", "exp_avg", "exp_avg_sq"


def new_adam_state(p: Tensor, shape: torch.Size | None = None) -> dict[str, Tensor]:
    """Step counter on the host and two moments in the dtype of the parameter.

    Moments of a shape of their own are float32 where the parameter is float16, whose range does
    not hold squares of gradients.
    """
    dtype = torch.float32 if shape is not None and p.dtype == torch.float16 else p.dtype
    shape = p.shape if shape is None else shape
    return {
        STEP: torch.zeros((), dtype=torch.float32),
        EXP_AVG: torch.zeros(shape, dtype=dtype, device=p.device),
        EXP_AVG_SQ: torch.zeros(shape, dtype=dtype, device=p.device),
    }


def check_state(held: dict[str, Tensor], key: str, count: int) -> Tensor:
    """The tensor of a state, which may have been loaded.

    Raises:
        ValueError: it has not as many numbers as it should.

    >>> check_state({"exp_avg": torch.zeros(2, 3)}, "exp_avg", 6).shape
    torch.Size([2, 3])
    """
    if held[key].numel() != count:
        raise ValueError(
            f"{key} of a pair is {tuple(held[key].shape)}, expected {count} numbers: the state "
            "loaded was saved for another model or rank."
        )
    return held[key]


class AdamRule:
    """Mix-in for optimizers whose groups carry ``betas``, ``eps``, ``lr`` and ``weight_decay``."""

    state: Any

    @staticmethod
    def check_adam(betas: tuple[float, float], eps: float) -> None:
        """Raise ``ValueError`` for decay rates or an epsilon out of range."""
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}, expected two numbers of 0 or more and below 1.")
        if not eps >= 0:
            raise ValueError(f"eps is {eps}, expected 0 or more.")

    def adam_states(self, *params: Tensor) -> list[Tensor]:
        """First moments, second moments and step counters, made where there are none yet."""
        states = [self.state[p] for p in params]
        for p, held in zip(params, states, strict=True):
            if not held:
                held.update(new_adam_state(p))
        sized = [
            check_state(held, key, p.numel())
            for key in (EXP_AVG, EXP_AVG_SQ)
            for p, held in zip(params, states, strict=True)
        ]
        return sized + [held[STEP] for held in states]

    def adamw_update(
        self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]
    ) -> None:
        """One step of AdamW on parameters with the gradients given."""
        states = [self.state[p] for p in params]
        for p, s in zip(params, states, strict=True):
            if not s:
                s.update(new_adam_state(p))
        # The fused kernel goes through memory in order, whatever the strides.
        fits_fused = all(
            p.device.type == "cpu" and p.is_contiguous() and g.is_contiguous()
            for p, g in zip(params, grads, strict=True)
        )
        adamw(
            params,
            grads,
            [s[EXP_AVG] for s in states],
            [s[EXP_AVG_SQ] for s in states],
            [],
            [s[STEP] for s in states],
            fused=fits_fused or None,  # elsewhere torch picks, with the step counters on the host
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
