"""Gradients of frozen weights, and products with them, from hooks on the layers.

Every call of an adapted layer gets a node in the autograd graph that keeps the input x and, in the
backward pass, meets the output gradient δ. What is done with the two is an :class:`Accumulator`:
the whole gradient, or its product with a few vectors. Weights need no gradient, so the base may be
quantized, and no ``.grad`` is ever written.

Because x is an ordinary saved tensor of that node, gradient checkpointing drops and recomputes it,
and because only backward passes count, a forward pass run twice is not counted twice. A layer
called several times in one forward pass adds up all its calls.

The experts of a mixture have no layer of their own to listen to (``target_parameters``); their
gradient is taken from autograd when it is complete, used and dropped, one parameter at a time.
PEFT's own forward pass builds the same gradient in plain LoRA training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorapro.lora_ga.geometry import rows_of
from lorapro.lora_ga.layers import REPACKED, AdaptedLayer

__all__ = ["Accumulator", "Loss", "Tap", "capture", "quiet"]

Loss = Callable[[nn.Module, Any], Tensor]


class Accumulator:
    """Sum over batches of ``Gᵀ``, of ``Gᵀ·Q`` or of ``G·Ω`` for one layer.

    Shapes: G (k, m, n); Q (k, m, q); Ω (k, n, q) or (n, q). ``value`` is (k, n, m), (k, n, q) or
    (k, m, q) in float32 (float64 for float64 factors); Q and Ω may be of
    lower precision.
    """

    def __init__(
        self, layer: AdaptedLayer, *, left: Tensor | None = None, right: Tensor | None = None
    ) -> None:
        self.layer = layer
        self.left, self.right = left, right
        m, n = layer.shape
        if left is not None:
            size = (layer.blocks, n, left.shape[-1])
        elif right is not None:
            size = (layer.blocks, m, right.shape[-1])
        else:
            size = (layer.blocks, n, m)
        self.value = torch.zeros(size, dtype=layer.dtype, device=layer.pair.A.device)
        self.seconds = 0.0
        self.contributions = 0

    @property
    def test_bytes(self) -> int:
        """Memory of Q or Ω."""
        return sum(t.nbytes for t in (self.left, self.right) if t is not None)

    @torch.no_grad()
    def add_call(self, x: Tensor, delta: Tensor) -> None:
        """Add one call of the layer: input x, output gradient δ."""
        began = time.perf_counter()
        layer, k = self.layer, self.layer.blocks
        device_type = self.value.device.type
        with torch.autocast(device_type, enabled=False):
            for rows, d in rows_of(layer.kind, layer.base, x, delta, self.value.dtype):
                for block, part in enumerate(d.chunk(k, dim=1) if k > 1 else (d,)):
                    into = self.value[block]
                    if self.left is not None:
                        rows.scatter(into, part @ self.left[block].to(into.dtype))
                    elif self.right is not None:
                        right = self.right if self.right.dim() == 2 else self.right[block]
                        into.addmm_(part.mT, rows.project(right.to(into.dtype)))
                    else:
                        rows.scatter(into, part)
        self._count(began)

    @torch.no_grad()
    def add_gradient(self, gradient: Tensor) -> None:
        """Add a gradient that autograd has formed, shaped as the weight is stored."""
        began = time.perf_counter()
        G = self.layer.as_matrices(gradient).to(self.value.dtype)
        if self.left is not None:
            self.value += G.mT @ self.left.to(G.dtype)
        elif self.right is not None:
            self.value += G @ self.right.to(G.dtype)
        else:
            self.value += G.mT
        self._count(began)

    def _count(self, began: float) -> None:
        self.contributions += 1
        self.seconds += time.perf_counter() - began


class Tap(torch.autograd.Function):
    """Identity on a layer's output that hands (x, δ) to ``sink.add_call`` in the backward pass."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, sink: Any) -> Tensor:
        """``output`` as it is."""
        # The anchor requires a gradient, so that the node exists even before any trained layer.
        ctx.save_for_backward(x)
        ctx.sink = sink
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """δ as it is."""
        (delta,) = grads
        (x,) = ctx.saved_tensors
        ctx.sink.add_call(x, delta)
        return delta, None, None, None


def _listen(stack: ExitStack, sink: Accumulator) -> None:
    """Route the layer's calls (or its parameter's gradient) to ``sink`` until the stack closes."""
    layer = sink.layer
    if layer.kind == "parameter":
        weight = layer.weight

        def take(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                sink.add_gradient(gradient)

        kept, weight.grad = weight.grad, None
        weight.requires_grad_(True)
        handle = weight.register_post_accumulate_grad_hook(take)
        stack.callback(setattr, weight, "grad", kept)
        stack.callback(handle.remove)
        return

    def tap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        if x.is_floating_point() and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # what the layer itself sees
        anchor = torch.zeros((), device=out.device, requires_grad=True)
        return Tap.apply(out, x.detach(), anchor, sink)

    # On the adapter layer, not its base: a base that is also called from elsewhere, without the
    # adapter, has gradients the adapter cannot act on. The output gradient is the same.
    handle = layer.module.register_forward_hook(tap, with_kwargs=True)
    stack.callback(handle.remove)


class _WithoutDropout(TorchFunctionMode):
    """Functional dropout does nothing."""

    _DROPOUTS = (
        nn.functional.dropout,
        nn.functional.dropout1d,
        nn.functional.dropout2d,
        nn.functional.dropout3d,
        nn.functional.alpha_dropout,
        nn.functional.feature_alpha_dropout,
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self._DROPOUTS:
            return args[0]
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """Gives a linear layer's output the gradient with respect to its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer, ctx.like = layer, (x.shape[-1], x.dtype, x.device)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (delta,) = grads
        n, dtype, device = ctx.like
        with torch.no_grad():
            forward = type(ctx.layer).forward  # the layer itself, without hooks
            transposed = forward(ctx.layer, torch.eye(n, dtype=dtype, device=device))
            if getattr(ctx.layer, "bias", None) is not None:
                transposed = transposed - ctx.layer.bias
            return (delta.to(dtype) @ transposed.mT), None, None


def _pass_gradients(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """Forward hook: bitsandbytes' kernel for repacked weights has no backward pass."""
    x = args[0]
    if not (torch.is_grad_enabled() and x.requires_grad):
        return None
    return _Linear.apply(x, output.detach(), module)


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """The model as gradients at initialisation are taken: no dropout, no parameter gradients.

    Modules are in evaluation mode, except that those with gradient checkpointing have their own
    flag of training mode set, without which it would be off. On leaving, by an error too, training
    flags, ``requires_grad`` flags and the random state are what they were.
    """
    training = [(module, module.training) for module in model.modules()]
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    checkpointed = [m for m, _ in training if getattr(m, "gradient_checkpointing", False)]
    # In evaluation mode bitsandbytes repacks 4-bit weights for inference on a CPU, for good.
    quantized = [m for m, _ in training if type(m).__name__ in ("Linear4bit", "Linear8bitLt")]
    quantized = [m for m in quantized if not hasattr(m, "base_layer")]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.inference_mode(False))
        try:
            for module, _ in training:
                module.training = False
            for module in (*checkpointed, *quantized):
                module.training = True
            for module in quantized:
                if getattr(getattr(module.weight, "quant_state", None), REPACKED, False):
                    handle = module.register_forward_hook(_pass_gradients)
                    stack.callback(handle.remove)
            for p, _ in trainable:
                p.requires_grad_(False)
            if checkpointed:
                stack.enter_context(_WithoutDropout())
            yield
        finally:
            for p, flag in trainable:
                p.requires_grad_(flag)
            for module, flag in training:
                module.training = flag


def capture(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss | None,
    sinks: Sequence[Accumulator],
    advance: Callable[[], None] | None = None,
) -> None:
    """Run every batch forward and backward once, and turn the sums into means over batches.

    Call inside :func:`quiet`.

    Args:
        model: the PEFT model.
        batches: the batches.
        loss: ``loss(model, batch)``, or ``None`` for ``model(**batch).loss``.
        sinks: what to accumulate, one for each layer of interest.
        advance: called after each batch.

    Raises:
        ValueError: a loss that is missing, not a scalar or not finite.
    """
    with ExitStack() as stack:
        for sink in sinks:
            _listen(stack, sink)
        for number, batch in enumerate(batches):
            with torch.enable_grad():
                value = _loss_of(model, batch, loss, number)
                if value.requires_grad:  # else none of the layers of this pass takes part
                    value.backward()
            if advance is not None:
                advance()
    _to_mean(sinks, len(batches))


def _loss_of(model: nn.Module, batch: Any, loss: Loss | None, number: int) -> Tensor:
    where = f"batch {number}"
    value: Any
    if loss is not None:
        value = loss(model, batch)
    else:
        if not isinstance(batch, Mapping):
            raise ValueError(
                f"{where} is a {type(batch).__name__}, expected a dict for model(**batch); for "
                "anything else pass loss=callable(model, batch) -> scalar."
            )
        device = next(model.parameters()).device
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        output = model(**moved)
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if value is None:
            raise ValueError(
                f"{where} gave no loss; its keys are {sorted(map(str, batch))}. Add labels, or "
                "pass loss=callable(model, batch) -> scalar."
            )
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the loss of {where} is no scalar tensor: found {found}.")
    if not torch.isfinite(value.detach()).all():
        raise ValueError(
            f"the loss of {where} is {float(value.detach())}: expected a finite number (is every "
            "label ignored, or the learning task broken?)."
        )
    return value.reshape(())


def _to_mean(sinks: Sequence[Accumulator], count: int) -> None:
    """Divide by the number of batches, those of the other ranks included."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    total = torch.tensor(float(count))
    if distributed:
        with suppress(StopIteration):
            total = total.to(next(iter(sinks)).value.device)
        torch.distributed.all_reduce(total)
        for sink in sinks:
            torch.distributed.all_reduce(sink.value)
            seen = torch.tensor(float(sink.contributions), device=sink.value.device)
            torch.distributed.all_reduce(seen)
            sink.contributions = int(seen)
    for sink in sinks:
        sink.value /= float(total)
