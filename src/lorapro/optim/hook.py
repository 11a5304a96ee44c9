"""Alignment for any torch optimizer: a hook that runs before its step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lorapro.choices import check_choice
from lorapro.factors import LoraPair
from lorapro.functional import X_CHOICES
from lorapro.optim.aligned import aligned_gradients
from lorapro.param_groups import lora_param_groups

__all__ = ["align_gradients"]


def align_gradients(
    optimizer: Optimizer,
    model: nn.Module | None,
    x: str = "sylvester",
    *,
    steady: bool = False,
    adapter: str | None = None,
    pairs: Iterable[LoraPair] | None = None,
    on_unaligned: str = "error",
) -> RemovableHandle:
    """Align the gradients of a model's pairs before every step of any torch optimizer.

    Efficient mode is "align, then AdamW" (Algorithm 2); this is the alignment alone, for every
    other optimizer. ``p.grad`` of the pairs is replaced in place when ``optimizer.step()`` is
    called: after unscaling and clipping, before moments. Around a closure, gradients are aligned
    each time the closure has computed them.

    Args:
        optimizer: an optimizer that holds the model's factors (also one wrapped by accelerate).
        model: the PEFT model; ``None`` if ``pairs`` are given.
        x: the choice of X, see :func:`lorapro.functional.align`.
        steady: give d_A in units of its partner, as :class:`LoraProAdamW` does: for optimizers that
            divide by the size of past gradients, as Adam does, not for plain descent.
        adapter: align the pairs of this adapter only.
        pairs: pairs by hand, beside those of the model.
        on_unaligned: ``"error"`` or ``"plain"``, see ``lorapro.lora_param_groups``.

    Returns:
        A handle; ``handle.remove()`` ends the alignment.

    Raises:
        ValueError: unknown x, no pairs, or a trainable factor that the optimizer does not hold.

    >>> import torch, lorapro
    >>> A, B = nn.Parameter(torch.eye(2)), nn.Parameter(torch.zeros(2, 2))
    >>> sgd = torch.optim.SGD([A, B], lr=0.5)
    >>> handle = align_gradients(sgd, None, pairs=[LoraPair("w", A, B, scaling=4.0)])
    >>> (4.0 * B @ A).sum().backward()
    >>> _ = sgd.step()
    >>> (4.0 * B @ A).detach()
    tensor([[-0.5000, -0.5000],
            [-0.5000, -0.5000]])
    >>> handle.remove()
    """
    check_choice("x", x, X_CHOICES)
    group = lora_param_groups(model, adapter=adapter, pairs=pairs, on_unaligned=on_unaligned)[0]
    inner: Any = optimizer
    while isinstance(getattr(inner, "optimizer", None), Optimizer):
        inner = inner.optimizer  # accelerate's wrapper
    held = {id(p) for g in inner.param_groups for p in g["params"]}
    for i, p in enumerate(group["params"]):
        if p.requires_grad and id(p) not in held:
            raise ValueError(
                f"the optimizer does not hold factor {'AB'[i % 2]} of {group['names'][i // 2]!r}; "
                "build it from the parameters of this model."
            )

    @torch.compiler.disable
    @torch.no_grad()
    def align_now() -> None:
        for params, directions in aligned_gradients(group, x, steady=steady):
            held: list[Any] = [p.grad for p in params]
            torch._foreach_copy_(held, directions)

    def before_step(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            align_now()
            return None

        def aligned_closure() -> Any:
            loss = closure()
            align_now()
            return loss

        if len(args) > 1:
            return (args[0], aligned_closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": aligned_closure}

    return inner.register_step_pre_hook(before_step)
