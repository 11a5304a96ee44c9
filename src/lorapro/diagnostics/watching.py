"""``‖g‖`` of every adapted weight, from the layers' inputs and output gradients.

Shape letters: T tokens (rows), x: (T, n) what enters A, δ: (T, m) the gradient of the loss with
respect to what leaves B. The adapter's own path is listened to, behind its dropout and before its
scaling, so ``g = δᵀx/s`` is the very g of ``grad_A = s·Bᵀg`` and ``grad_B = s·g·Aᵀ``.

One backward pass with one call of a layer needs no g (:mod:`lorapro.diagnostics.norms`). Several
calls, or several micro-batches, add up to one g, whose norm is not to be had from their norms. Then
x and δ are kept, or g itself where that takes less memory, until it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lorapro.diagnostics.norms import SquaredNorms
from lorapro.factors import LoraPair, adapters_of, find_pairs, is_tuner_layer
from lorapro.live import Places
from lorapro.lora_ga.capture import Tap
from lorapro.lora_ga.geometry import rows_of

__all__ = ["Watch", "watch", "watch_of"]

_WATCHES: WeakKeyDictionary[nn.Module, Watch] = WeakKeyDictionary()


class WeightGradient:
    """``‖g‖²`` of one weight, from any number of (x, δ)."""

    def __init__(
        self, kind: str, layer: Any, shape: tuple[int, int], once: bool, norms: SquaredNorms
    ) -> None:
        self.kind, self.layer, self.shape, self.norms = kind, layer, shape, norms
        self.once = once  # one micro-batch: a layer called once needs nothing kept
        self.calls = 0  # forward calls that the next backward pass comes back from
        self.passes = 0  # calls that it has come back from
        self.tokens = 0
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.dense: Tensor | None = None
        self.square: Tensor | None = None

    @torch.no_grad()
    def add_call(self, x: Tensor, delta: Tensor) -> None:
        """Add one call: input x, output gradient δ."""
        self.passes += 1
        m, n = self.shape
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(delta.dtype, torch.float32)
            if self.kind == "embedding":
                self.kept = [_columns(self.layer, x, delta.to(dtype), self.kept)]
                return
            found: Any = rows_of(self.kind, self.layer, x, delta, dtype)
            parts = [(rows.x, d) for rows, d in found]
            if self.once and self.calls == 1:
                self.square = self.norms(*_joined(parts))
                return
            self.kept += parts
            self.tokens += sum(len(d) for _, d in parts)
            if self.dense is not None or self.tokens * (m + n) > m * n:
                self._fold()

    def _fold(self) -> None:
        if self.dense is None:
            self.dense = self.kept[0][1].new_zeros(self.shape)
        for x, delta in self.kept:
            self.dense.addmm_(delta.mT, x)
        self.kept.clear()

    def norm_square(self) -> Tensor | None:
        """``‖δᵀx‖²`` of all calls, or ``None`` if there was none."""
        if self.square is not None:
            return self.square
        if self.dense is None and not self.kept:
            return None
        if self.dense is not None:
            return self.dense.square().sum(dtype=torch.float64)
        if self.kind == "embedding":
            return self.kept[0][1].square().sum(dtype=torch.float64)
        return self.norms(*_joined(self.kept))


def _columns(
    layer: Any, index: Tensor, delta: Tensor, before: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """An embedding's g by its columns that are not zero: (tokens, (tokens, m)), each token once."""
    index, delta = index.reshape(-1), delta.reshape(-1, delta.shape[-1])
    if layer.padding_idx is not None:  # that row of the table has no gradient
        used = index != layer.padding_idx
        index, delta = index[used], delta[used]
    index = torch.cat([i for i, _ in before] + [index])
    delta = torch.cat([d for _, d in before] + [delta])
    unique, where = index.unique(return_inverse=True)
    return unique, delta.new_zeros(len(unique), delta.shape[-1]).index_add_(0, where, delta)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x, delta = (torch.cat(t) if len(t) > 1 else t[0] for t in zip(*parts, strict=True))
    return x, delta


class Plan:
    """The pairs of a model and where each is listened to; made again only once the model changed.

    Args:
        model: a PEFT model.
        adapter: see :func:`watch`.
        layers: see :func:`watch`.

    Raises:
        ValueError: no such pair.
    """

    def __init__(self, model: nn.Module, adapter: str | None, layers: str | None) -> None:
        self.pairs = chosen_pairs(model, adapter, layers)
        self.places = _places(model)
        self._factors = [t for p in self.pairs for t in (p.A, p.B)]
        self._trained = [t.requires_grad for t in self._factors]
        self._now = Places(model, self._factors)

    def holds(self) -> bool:
        """Whether the model trains the same factors at the same scalings."""
        now = self._now
        if set(getattr(now.model, "peft_config", ())) != now.adapters:
            return False
        for i, (factor, trained) in enumerate(zip(self._factors, self._trained, strict=True)):
            if now.now(i) is not factor or factor.requires_grad != trained:
                return False
        live = [(p.live, p.scaling) for p in self.pairs if p.live is not None]
        return all(x.scalings.get(x.key) == s and x.key not in x.merged for x, s in live)


class Watch:
    """Listens to the adapters of a model until :meth:`remove`; see :func:`watch`."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        *,
        micro_batches: int = 1,
        listen: bool = True,
    ) -> None:
        if not isinstance(micro_batches, int) or micro_batches < 1:
            raise ValueError(f"micro_batches is {micro_batches!r}, expected an integer from 1 up.")
        self.model = unwrapped(model)
        if self.model in _WATCHES:
            raise ValueError("the model is watched already; leave the other watch first.")
        self.pairs, self._places = plan.pairs, plan.places
        self._anchors: dict[torch.device, Tensor] = {}
        self._gradients: dict[int, WeightGradient] = {}
        self._last: dict[int, Tensor] = {}  # norm of a factor's .grad when it was complete
        self._handles: list[Any] = []
        if listen and not _several_processes():
            self._install(micro_batches == 1)
        _WATCHES[self.model] = self

    def _install(self, once: bool) -> None:
        norms = SquaredNorms()
        for pair in self.pairs:
            found = self._places.get(id(pair.A), [])
            if not found or pair.layout != "matrix":
                continue  # experts and grouped convolutions have no call of their own
            alone = once and len(found) == 1
            sink = WeightGradient(found[0][0], found[0][2], pair.shape, alone, norms)
            self._gradients[id(pair.A)] = sink
            for kind, module, first, last in found:
                self._listen(kind, module, first, last, sink)
            factor = pair.B if pair.B.requires_grad else pair.A
            self._handles.append(factor.register_post_accumulate_grad_hook(self._note))

    def _note(self, factor: Tensor) -> None:
        if factor.grad is not None:
            self._last[id(factor)] = _norm(factor.grad)

    def _listen(self, kind: str, module: Any, first: Any, last: Any, sink: WeightGradient) -> None:
        seen: list[Tensor] = []

        def enter(_: nn.Module, args: tuple[Any, ...]) -> None:
            if torch.is_grad_enabled():
                seen.append(args[0])

        def leave(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            x = args[0] if kind == "embedding" else seen.pop()
            if torch._C._current_graph_task_id() == -1:  # not a recomputation of a checkpoint
                sink.calls += 1
            return Tap.apply(out, x.detach(), self._anchor(out.device), sink)

        if kind == "embedding":
            self._handles.append(module.register_forward_hook(leave))
        else:
            self._handles.append(first.register_forward_pre_hook(enter))
            self._handles.append(last.register_forward_hook(leave))

    def _anchor(self, device: torch.device) -> Tensor:
        if device not in self._anchors:
            self._anchors[device] = torch.zeros((), device=device, requires_grad=True)
        return self._anchors[device]

    def gradient_norm(self, pair: LoraPair) -> Tensor | None:
        """``‖g‖`` of a pair in units of its ``.grad`` as it stands now; ``None`` if not known.

        Raises:
            ValueError: more backward passes than were announced.
        """
        sink = self._gradients.get(id(pair.A))
        if sink is None:
            return None
        if sink.square is not None and sink.passes > 1:
            raise ValueError(
                f"{pair.name} took part in {sink.passes} backward passes and one was announced: "
                "the norm of a sum is not in the norms of its parts. Pass micro_batches= to "
                "watch() or follow() (2 or more keeps what is needed)."
            )
        square = sink.norm_square()
        if square is None:
            return None
        factor = pair.B if pair.B.requires_grad else pair.A
        before, now = self._last.get(id(factor)), factor.grad
        if before is None or now is None:
            return None
        # A Linear's δ is behind B: s·δ. An embedding's is that of the layer's output.
        scale = 1.0 if sink.kind == "embedding" else 1.0 / pair.scaling
        # Clipping and unscaling multiply every .grad after the backward pass.
        ratio = _norm(now) / before
        return square.sqrt() * scale * torch.where(before > 0, ratio, 1.0)

    def remove(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._gradients.clear()
        _WATCHES.pop(self.model, None)


def _norm(grad: Tensor) -> Tensor:
    work = torch.promote_types(grad.dtype, torch.float32)
    return torch.linalg.vector_norm(grad.detach(), dtype=work)


def _several_processes() -> bool:
    """Whether each process sees a part of the batch only, and g is a mean over processes."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1


@contextmanager
def watch(
    model: nn.Module,
    *,
    micro_batches: int = 1,
    adapter: str | None = None,
    layers: str | None = None,
) -> Iterator[Watch]:
    """Listen to what ``‖g‖`` needs, from the forward pass on; :func:`measure` then knows it.

    A measured pass costs about as many products as a gradient of the adapted weights; passes
    outside cost nothing.

    Args:
        model: a PEFT model, before the forward pass.
        micro_batches: backward passes whose gradients are added up. With 1, the norm of each weight
            is taken during the pass and nothing is kept; with more, inputs and output gradients (or
            g, where that is smaller) are kept until :func:`measure`.
        adapter: pairs of this adapter only.
        layers: regular expression; only pairs whose name it finds something in.

    Raises:
        ValueError: no such pair; a second watch of the same model.

    >>> from peft import LoraConfig, get_peft_model
    >>> from lorapro.diagnostics import measure
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    >>> model = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "2"]))
    >>> with watch(model):
    ...     model(torch.randn(8, 6)).square().sum().backward()
    ...     records = measure(model, step=1)
    >>> [(r.name, r.rank_A, r.rank_B) for r in records]
    [('base_model.model.0', 2, 0), ('base_model.model.2', 2, 0)]
    >>> all(r.aligned_distance < r.gradient_norm for r in records)
    True
    """
    plan = Plan(unwrapped(model), adapter, layers)
    for pair in plan.pairs:
        if any(p.grad is not None and p.grad.any() for p in (pair.A, pair.B)):
            raise ValueError(
                f"{pair.name} holds gradients already, whose inputs were not seen; call "
                "optimizer.zero_grad() before, and watch from the first micro-batch on."
            )
    watching = Watch(model, plan, micro_batches=micro_batches)
    try:
        yield watching
    finally:
        watching.remove()


def watch_of(model: nn.Module) -> Watch | None:
    """The watch a model is under, if any."""
    return _WATCHES.get(unwrapped(model))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``'s wrapper and data parallel ones."""
    model = getattr(model, "_orig_mod", model)
    wraps = type(model).__name__ in ("DistributedDataParallel", "DataParallel")
    return model.module if wraps else model  # type: ignore[return-value]


def chosen_pairs(
    model: nn.Module, adapter: str | None = None, layers: str | None = None
) -> tuple[LoraPair, ...]:
    """The trainable pairs of an adapter whose names a regular expression finds.

    Raises:
        ValueError: there is none.
    """
    import re

    try:
        pattern = re.compile(layers or "")
    except re.error as error:
        raise ValueError(f"layers={layers!r} is no regular expression: {error}.") from error
    pairs = find_pairs(model, adapter).pairs
    chosen = tuple(p for p in pairs if pattern.search(p.name))
    if not chosen:
        of = f"; its pairs are named like {pairs[0].name!r}" if pairs else ""
        raise ValueError(
            "the model has no trainable LoRA pair"
            + (f" whose name matches layers={layers!r}{of}." if pairs else " to measure.")
        )
    return chosen


def _places(model: nn.Module) -> dict[int, list[tuple[str, Any, Any, Any]]]:
    """By the ``id`` of A: (kind, adapter layer, what x enters, what δ leaves)."""
    places: dict[int, list[tuple[str, Any, Any, Any]]] = {}
    for _, module in model.named_modules():
        if not is_tuner_layer(module) or hasattr(module, "parameter_name"):
            continue
        layer: Any = module
        for key in adapters_of(module):
            if key in getattr(layer, "lora_embedding_A", {}):
                if getattr(layer, "_get_embed_scale", lambda: None)() is not None:
                    continue  # the output is scaled once more, behind the adapter
                base = layer.get_base_layer()
                A, place = layer.lora_embedding_A[key], ("embedding", layer, base, base)
            elif key in getattr(layer, "lora_A", {}):
                first, last = layer.lora_A[key], layer.lora_B[key]
                A = first.weight
                kind = "linear" if isinstance(first, nn.Linear) else "conv"
                place = (kind, layer, first, last)
            else:
                continue
            places.setdefault(id(A), []).append(place)
    return places
