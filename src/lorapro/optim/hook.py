"""Alignment for any torch optimizer: a hook that runs before its step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lorapro.choices import check_choice
from lorapro.distributed.sharding import local
from lorapro.distributed.zero import in_pieces, optimizers_of, refuse_pieces, whole_factors
from lorapro.factors import LoraPair
from lorapro.functional import X_CHOICES
from lorapro.live import in_parameters
from lorapro.optim.adamw import efficient_directions
from lorapro.optim.batches import batches_of
from lorapro.param_groups import lora_param_groups

__all__ = ["align_gradients"]

NOT_THE_ENGINE = (
    "align after deepspeed.initialize or accelerator.prepare, with the engine: "
    "lorapro.align_gradients(engine, model)."
)


def align_gradients(
    optimizer: Any,
    model: nn.Module | None,
    x: str = "sylvester",
    *,
    damping: float = 0.0,
    adapter: str | None = None,
    pairs: Iterable[LoraPair] | None = None,
    on_unaligned: str = "error",
) -> RemovableHandle:
    """Align the gradients of a model's pairs before every step of any torch optimizer.

    Efficient mode is "align, then AdamW" (Algorithm 2); this is the alignment alone, for every
    other optimizer. ``p.grad`` of the pairs is replaced in place in ``optimizer.step()``: after
    unscaling and clipping, before moments; with a closure, whenever that has computed them. Under
    DeepSpeed ZeRO the first argument is the engine, once there is one (``lorapro.distributed``)::

        engine, *_ = deepspeed.initialize(model=model, model_parameters=…, config=config)
        lorapro.align_gradients(engine, model)

    Args:
        optimizer: an optimizer that holds the model's factors, a DeepSpeed engine, or accelerate's
            wrapper of either's optimizer.
        model: the PEFT model; ``None`` if ``pairs`` are given.
        x: the choice of X, see :func:`lorapro.functional.align`.
        damping: directions of B shorter than this many steps are damped, as
            :class:`LoraProAdamW` does in efficient mode; steps are taken for those of Adam.
        adapter: align the pairs of this adapter only.
        pairs: pairs by hand, beside those of the model.
        on_unaligned: ``"error"`` or ``"plain"``, see ``lorapro.lora_param_groups``.

    Returns:
        A handle; ``handle.remove()`` ends the alignment.

    Raises:
        ValueError: unknown x, no pairs, a trainable factor that the optimizer does not hold, or a
            pair whose factors DeepSpeed steps apart.

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
    inner, around = optimizers_of(optimizer)
    with whole_factors(model):
        group = lora_param_groups(model, adapter=adapter, pairs=pairs, on_unaligned=on_unaligned)[0]

    def align(pairs: Sequence[LoraPair], params: Sequence[Tensor], lr_of: Any) -> None:
        for batches in batches_of(pairs, params):
            reach = damping * lr_of(batches.moved[0]) if damping else 0.0
            directions = efficient_directions(batches, x, reach)
            held: list[Any] = [p.grad for p in batches.moved]
            torch._foreach_copy_(local(held), batches.moved_tensors(*directions))

    if around is None:
        refuse_pieces(group["pairs"], NOT_THE_ENGINE)
        align_now = in_parameters(inner, group, align)
    else:
        align_now = in_pieces(inner, around, group, align)

    def before_step(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if around is None:
            refuse_pieces(group["pairs"], NOT_THE_ENGINE)
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
