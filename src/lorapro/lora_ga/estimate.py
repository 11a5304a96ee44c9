"""Leading singular directions of each layer's gradient, from whole gradients or from sketches.

Shape letters used in this file
    k      matrices of a layer (experts, groups; 1 for most)
    m, n   rows and columns of each;   G: (m, n) gradient, mean over the batches
    q      directions wanted, ``min(2r, m, n)``;   p: vectors of a sketch, q and some more

``exact`` holds the gradients of a few layers at a time, no more than the largest single one takes
(or as many layers as asked for), and passes over the batches once for each such group.

``sketch`` never forms a gradient. It is the randomized range finder of Halko, Martinsson and Tropp
spread over batches: ``Y = G·Ω`` in one pass, ``Q = orth(Y)``, ``Z = Gᵀ·Q`` in a second one; then
``G ≈ Q·Zᵀ`` and an SVD of Z gives the directions. A power pass replaces Ω by orth(Z) and starts
again. Sums of sketches over batches and over ranks are sketches of the sums.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorapro.lora_ga.capture import Accumulator, Loss, capture
from lorapro.lora_ga.layers import AdaptedLayer

__all__ = ["ESTIMATORS", "Directions", "exact", "passes_needed", "sketch"]

ESTIMATORS = ("exact", "sketch")

# Extra random vectors that measure the energy outside the sketch's range (not used to find it).
PROBES = 8


@dataclass
class Directions:
    """What is known of one matrix of one layer.

    Attributes:
        layer: the layer.
        block: which of its k matrices.
        U: (m, q) leading left singular vectors.
        sigma: (q,) singular values.
        V: (n, q) leading right singular vectors.
        energy: ``‖G‖²``; an estimate if sketched.
        gradient: G itself (m, n), where the objective needs it.
        seconds: time spent on it.
        bytes: memory the estimate of the whole layer took at its highest.
    """

    layer: AdaptedLayer
    block: int
    U: Tensor
    sigma: Tensor
    V: Tensor
    energy: float
    gradient: Tensor | None
    seconds: float
    bytes: int


Consumer = Callable[[Directions], None]


def directions_wanted(layer: AdaptedLayer) -> int:
    """``min(2r, m, n)``."""
    return min(2 * layer.pair.rank, *layer.shape)


def groups_of(layers: Sequence[AdaptedLayer], per_pass: int | None) -> Iterator[list[AdaptedLayer]]:
    """Cut the layers into groups for one pass each.

    With ``per_pass=None`` a group's gradients take no more memory than the largest one alone.
    """
    if per_pass is not None:
        for i in range(0, len(layers), per_pass):
            yield list(layers[i : i + per_pass])
        return

    def size(layer: AdaptedLayer) -> int:
        m, n = layer.shape
        return layer.blocks * m * n

    budget = max(map(size, layers))
    open_groups: list[tuple[int, list[AdaptedLayer]]] = []
    for layer in sorted(layers, key=size, reverse=True):  # first fit, largest first
        for i, (used, group) in enumerate(open_groups):
            if used + size(layer) <= budget:
                group.append(layer)
                open_groups[i] = (used + size(layer), group)
                break
        else:
            open_groups.append((size(layer), [layer]))
    for _, group in open_groups:
        yield group


def passes_needed(
    layers: Sequence[AdaptedLayer], estimator: str, per_pass: int | None, power_passes: int
) -> int:
    """Passes over the batches that an estimate takes."""
    if estimator == "exact":
        return sum(1 for _ in groups_of(layers, per_pass))
    groups = 1 if per_pass is None else sum(1 for _ in groups_of(layers, per_pass))
    return groups * (2 + 2 * power_passes)


@torch.no_grad()
def exact(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss | None,
    layers: Sequence[AdaptedLayer],
    consume: Consumer,
    *,
    layers_per_pass: int | None = None,
    of_sign: bool = False,
    keep_gradient: bool = False,
    advance: Callable[[], None] | None = None,
) -> None:
    """Full gradients, a group of layers at a time; SVD of each.

    Args:
        model: the PEFT model, inside :func:`lorapro.lora_ga.capture.quiet`.
        batches: the batches.
        loss: see :func:`lorapro.lora_ga.capture.capture`.
        layers: layers to do.
        consume: called with each result; the gradient is freed when it returns.
        layers_per_pass: layers whose gradients are held at once; ``None`` keeps to the memory of
            the largest one.
        of_sign: decompose ``sign(G)`` instead of G.
        keep_gradient: hand G itself to ``consume``.
        advance: called after each batch of each pass.
    """
    for group in groups_of(layers, layers_per_pass):
        sinks = [Accumulator(layer) for layer in group]
        capture(model, batches, loss, sinks, advance)
        while sinks:
            sink = sinks.pop()
            _check_finite(sink)
            held = sink.value.nbytes
            for block in range(sink.layer.blocks):
                began = time.perf_counter()
                G = sink.value[block].mT
                target = G.sign() if of_sign else G
                U, sigma, Vh = torch.linalg.svd(target, full_matrices=False)
                q = directions_wanted(sink.layer)
                consume(
                    Directions(
                        sink.layer,
                        block,
                        U[:, :q],
                        sigma[:q],
                        Vh[:q].mT,
                        float(sigma.double().square().sum()) if sink.contributions else 0.0,
                        G if keep_gradient else None,
                        sink.seconds / sink.layer.blocks + time.perf_counter() - began,
                        held + U.nbytes + Vh.nbytes,
                    )
                )
            del sink, G, target, U, Vh


@torch.no_grad()
def sketch(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss | None,
    layers: Sequence[AdaptedLayer],
    consume: Consumer,
    *,
    seed: int = 0,
    oversampling: int | None = None,
    power_passes: int = 1,
    layers_per_pass: int | None = None,
    advance: Callable[[], None] | None = None,
) -> None:
    """Randomized range finder over the batches; no gradient of a weight is ever formed.

    Args:
        model: the PEFT model, inside :func:`lorapro.lora_ga.capture.quiet`.
        batches: the batches.
        loss: see :func:`lorapro.lora_ga.capture.capture`.
        layers: layers to do.
        consume: called with each result.
        seed: of the random test vectors, the same on every rank.
        oversampling: vectors beyond 2r; ``None`` for 4r, and 16 at least.
        power_passes: power iterations, two more passes over the batches each.
        layers_per_pass: layers sketched at once; ``None`` for all.
        advance: called after each batch of each pass.
    """
    groups = [list(layers)] if layers_per_pass is None else groups_of(layers, layers_per_pass)
    for group in groups:
        tests = _TestVectors(seed)
        width = {id(x): _sketch_width(x, oversampling) for x in group}
        state = {id(x): _Sketched() for x in group}

        def run(sinks: list[Accumulator], state: dict[int, _Sketched] = state) -> list[Accumulator]:
            capture(model, batches, loss, sinks, advance)
            for sink in sinks:
                _check_finite(sink)
                held = state[id(sink.layer)]
                held.seconds += sink.seconds
                held.bytes = max(held.bytes, sink.value.nbytes + sink.test_bytes)
            return sinks

        sinks = run([Accumulator(x, right=tests.get(x, width[id(x)])) for x in group])
        tests.made.clear()
        for sink in sinks:
            Y, probes = sink.value.split([width[id(sink.layer)], PROBES], dim=-1)
            state[id(sink.layer)].probes = probes.clone()
            sink.value = Y
        for power in range(power_passes + 1):
            if power:
                sinks = run([Accumulator(x, right=P) for x, P in _next_tests(sinks)])
            sinks = run([Accumulator(x, left=Q) for x, Q in _next_tests(sinks)])
        while sinks:
            sink = sinks.pop()
            for block in range(sink.layer.blocks):
                consume(_decomposed(sink, block, state[id(sink.layer)]))


@dataclass
class _Sketched:
    """What is kept of one layer beside its sketch."""

    probes: Tensor | None = None
    seconds: float = 0.0
    bytes: int = 0


def _next_tests(sinks: list[Accumulator]) -> list[tuple[AdaptedLayer, Tensor]]:
    """Orthonormal bases of the sketches, which are given up on the way.

    They are kept in bfloat16: a range finder may test with any vectors, and the last ones are made
    orthonormal again as they are (:func:`_decomposed`).
    """
    tests = []
    while sinks:
        sink = sinks.pop(0)
        tests.append((sink.layer, torch.linalg.qr(sink.value).Q.to(torch.bfloat16)))
    return tests


def _decomposed(sink: Accumulator, block: int, held: _Sketched) -> Directions:
    """From ``Z = Gᵀ·T`` to singular directions: with ``T = Q·R``, ``Gᵀ·Q = Z·R⁻¹``."""
    began = time.perf_counter()
    layer = sink.layer
    assert sink.left is not None
    assert held.probes is not None
    Q, R = torch.linalg.qr(sink.left[block].to(sink.value.dtype))
    Z = torch.linalg.solve_triangular(R, sink.value[block], upper=True, left=False)
    V, sigma, Wh = torch.linalg.svd(Z, full_matrices=False)
    q = directions_wanted(layer)
    missed = held.probes[block] - Q @ (Q.mT @ held.probes[block])
    energy = sigma.double().square().sum() + missed.double().square().sum() / PROBES
    return Directions(
        layer,
        block,
        Q @ Wh[:q].mT,
        sigma[:q],
        V[:, :q],
        float(energy) if sink.contributions else 0.0,
        None,
        held.seconds / layer.blocks + time.perf_counter() - began,
        max(held.bytes, sink.value.nbytes + sink.test_bytes + Q.nbytes + Z.nbytes + V.nbytes),
    )


def _sketch_width(layer: AdaptedLayer, oversampling: int | None) -> int:
    rank = layer.pair.rank
    extra = max(4 * rank, 16) if oversampling is None else oversampling
    return min(2 * rank + extra, *layer.shape)


class _TestVectors:
    """Gaussian (n, width + probes) matrices, shared by the layers with the same n and width."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.made: dict[tuple[Any, ...], Tensor] = {}

    def get(self, layer: AdaptedLayer, width: int) -> Tensor:
        n, device = layer.shape[1], layer.pair.A.device
        key = (n, width, layer.dtype, device)
        if key not in self.made:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + n)
            made = torch.randn(n, width + PROBES, generator=generator, dtype=torch.float32)
            self.made[key] = made.to(device=device, dtype=layer.dtype)
        return self.made[key]


def _check_finite(sink: Accumulator) -> None:
    if not torch.isfinite(sink.value).all():
        raise ValueError(
            f"the gradient of {sink.layer.name} is not finite (NaN or Inf); with float16 use "
            "bfloat16 or float32, or scale the loss down."
        )
