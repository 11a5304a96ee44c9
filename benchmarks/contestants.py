"""The optimizers that the benchmarks compare, and the factors that they step.

Factors are made as training leaves them. A is PEFT's start (Kaiming uniform), which training hardly
moves. The singular values of B fall as ``i^-p`` from the first to the r-th, with p log-normal over
the pairs, median 0.67. That is what efficient mode's first steps leave on SmolLM2-135M and tweets
(``trained_factors.py``).

Gradients belong together: ``grad_A = s·Bᵀg`` and ``grad_B = s·g·Aᵀ`` for one ``g = U·V``, never
formed. No layer has a base weight, nothing of size m×n exists unless an optimizer makes it.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from common import device, wait
from torch import Tensor, nn

import lorapro
from lorapro.factors import LoraPair
from lorapro.functional import X_CHOICES

LEARNING_RATE = 1e-6
SCALING = 2.0
GRADIENT_RANK = 64
STARTS = ("trained", "zero")


class Model(NamedTuple):
    """Widths of a Llama."""

    hidden: int
    key_value: int
    intermediate: int
    layers: int

    def shapes(self) -> list[tuple[int, int]]:
        """(m, n) of every linear layer: q, k, v, o, gate, up, down of each block."""
        h, kv, i, layers = self
        return [(h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i)] * layers


MODELS = {
    "smollm2": Model(576, 192, 1536, 30),
    "llama": Model(4096, 4096, 11008, 2),
    "tiny": Model(16, 8, 24, 2),
}
TITLES = {
    "smollm2": "SmolLM2-135M, 210 pairs",
    "llama": "two layers of Llama-2-7B, 14 pairs",
    "tiny": "tiny, 14 pairs",
}


@dataclass
class Factors:
    """Values of one pair and its gradients, which every contestant copies."""

    A: Tensor
    B: Tensor
    grad_A: Tensor
    grad_B: Tensor


def decays(count: int) -> list[float]:
    """The exponent p of every pair: quantiles of its distribution in a fixed random order."""
    normal = statistics.NormalDist(math.log(0.67), 0.32)
    found = [math.exp(normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return [found[i] for i in order]


def make_factors(
    shapes: Sequence[tuple[int, int]], rank: int, start: str = "trained"
) -> list[Factors]:
    """Factors and gradients for the shapes given; ``start="zero"`` is LoRA's own, B = 0."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for (m, n), p in zip(shapes, decays(len(shapes)), strict=True):
        A = (2 * torch.rand(rank, n, generator=generator) - 1) / n**0.5
        B = torch.zeros(m, rank)
        if start == "trained":
            Q = torch.linalg.qr(torch.randn(m, rank, generator=generator)).Q
            turn = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
            B = 0.3 * (Q * torch.arange(1.0, rank + 1) ** -p) @ turn
        U = torch.randn(m, GRADIENT_RANK, generator=generator) / m**0.5
        V = torch.randn(GRADIENT_RANK, n, generator=generator) / n**0.5
        values = A, B, SCALING * (B.T @ U) @ V, SCALING * U @ (V @ A.T)
        made.append(Factors(*(t.to(device()) for t in values)))
    return made


class Layer(nn.Module):
    """A LoRA layer with the attributes that PEFT gives it, without a base layer."""

    def __init__(self, factors: Factors) -> None:
        super().__init__()
        (rank, n), m = factors.A.shape, len(factors.B)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(n, rank, bias=False, device="meta")})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, m, bias=False, device="meta")})
        self.lora_A["default"].weight = nn.Parameter(factors.A.clone())
        self.lora_B["default"].weight = nn.Parameter(factors.B.clone())
        self.r, self.lora_alpha = {"default": rank}, {"default": SCALING * rank}


class Adapters(nn.Module):
    """One contestant's own copy of all factors."""

    def __init__(self, factors: Sequence[Factors]) -> None:
        super().__init__()
        self.factors = factors
        self.layers = nn.ModuleList(Layer(f) for f in factors)
        self.restore()

    def pairs(self) -> list[LoraPair]:
        """A and B of every layer, for this package's optimizers."""
        found = []
        for i, layer in enumerate(self.layers):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            found.append(LoraPair(f"layers.{i}", A, B, SCALING))
        return found

    @torch.no_grad()
    def restore(self) -> None:
        """Put factors and gradients back: some optimizers change the gradients in place, and
        factors that stay where they are take the same path in every round.
        """
        parameters = list(self.parameters())
        for p in parameters:
            if p.grad is None:
                p.grad = torch.empty_like(p)
        torch._foreach_copy_(parameters, [t for f in self.factors for t in (f.A, f.B)])
        gradients = [t for f in self.factors for t in (f.grad_A, f.grad_B)]
        torch._foreach_copy_([p.grad for p in parameters], gradients)


@dataclass(frozen=True)
class Contestant:
    """How to build one optimizer. ``package`` is a module that it needs and ``make bench`` gets."""

    make: Callable[[Adapters, str], Any]
    about: str
    start: str = "trained"
    package: tuple[str, str] | None = None

    @property
    def missing(self) -> str | None:
        """What to install for it, if it is not."""
        if self.package is None or importlib.util.find_spec(self.package[0]) is not None:
            return None
        return f"pip install {self.package[1]}"


def _adamw(**options: Any) -> Callable[[Adapters, str], Any]:
    return lambda adapters, x: torch.optim.AdamW(
        adapters.parameters(), lr=LEARNING_RATE, weight_decay=0.0, **options
    )


def _riemannian(adapters: Adapters, x: str) -> Any:
    from peft.optimizers import create_riemannian_optimizer

    options = {"lr": LEARNING_RATE, "weight_decay": 0.0, "fused": True}
    return create_riemannian_optimizer(adapters, torch.optim.AdamW, **options)


def _lora_pro_adamw(mode: str, solver: str = "vec") -> Callable[[Adapters, str], Any]:
    def make(adapters: Adapters, x: str) -> Any:
        from lora_pro import LoRAProAdamW

        return LoRAProAdamW(
            adapters,
            lr=LEARNING_RATE,
            weight_decay=0.0,
            lorapro_mode=mode,
            efficient_solver=solver,
        )

    return make


def _ours(kind: str, **options: Any) -> Callable[[Adapters, str], Any]:
    def make(adapters: Adapters, x: str) -> Any:
        groups = lorapro.lora_param_groups(None, pairs=adapters.pairs())
        return getattr(lorapro, kind)(groups, lr=LEARNING_RATE, x=x, **options)

    return make


_PYPI = ("lora_pro", "lora-pro-adamw==0.2.1")
CONTESTANTS = {
    "adamw-foreach": Contestant(_adamw(foreach=True), "torch.optim.AdamW(foreach=True)"),
    "adamw-fused": Contestant(_adamw(fused=True), "torch.optim.AdamW(fused=True)"),
    "peft-riemannian": Contestant(
        _riemannian, "PEFT's create_riemannian_optimizer on fused AdamW", package=("peft", "peft")
    ),
    "lora-pro-adamw-efficient": Contestant(
        _lora_pro_adamw("efficient"), "lora-pro-adamw 0.2.1, efficient mode", package=_PYPI
    ),
    "lora-pro-adamw-eig": Contestant(
        _lora_pro_adamw("efficient", "eig"), 'the same, efficient_solver="eig"', package=_PYPI
    ),
    "lora-pro-adamw-full": Contestant(
        _lora_pro_adamw("full"), "lora-pro-adamw 0.2.1, full mode", package=_PYPI
    ),
    "efficient": Contestant(
        _ours("LoraProAdamW", mode="efficient"), 'LoraProAdamW(mode="efficient")'
    ),
    "damped": Contestant(_ours("LoraProAdamW", damping=3.0), "the same with damping=3"),
    "factored": Contestant(_ours("LoraProAdamW", mode="factored"), 'LoraProAdamW(mode="factored")'),
    "full": Contestant(_ours("LoraProAdamW", mode="full"), 'LoraProAdamW(mode="full")'),
    "muon": Contestant(_ours("LoraProMuon"), "LoraProMuon"),
    "sgd": Contestant(_ours("LoraProSGD"), "LoraProSGD, no momentum"),
}
LEGEND = "\n".join(f"- `{name}`: {c.about}" for name, c in CONTESTANTS.items())


def add_choice(
    made: argparse.ArgumentParser,
    names: Iterable[str] = CONTESTANTS,
    choices: Iterable[str] = CONTESTANTS,
) -> None:
    """Options that choose what takes part, by default ``names`` of ``choices``."""
    made.add_argument("--only", nargs="+", choices=list(choices), default=list(names))
    made.add_argument("--x", choices=X_CHOICES, default="sylvester", help="X of our optimizers")


def add_limit(made: argparse.ArgumentParser) -> None:
    """Option that leaves out what is too slow."""
    made.add_argument(
        "--skip-slower-than",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="leave out an optimizer whose step takes longer, by a trial on one pair of each shape",
    )


def check_ranks(made: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse ranks that a layer of the chosen models cannot have."""
    for model in arguments.shapes:
        most = min(min(shape) for shape in MODELS[model].shapes())
        for rank in arguments.ranks:
            if not 1 <= rank <= most:
                made.error(f"--ranks holds {rank}, expected 1 to {most} for --shapes {model}.")


def build(name: str, shapes: Sequence[tuple[int, int]], rank: int, x: str) -> tuple[Adapters, Any]:
    """Adapters of the shapes given with their optimizer."""
    contestant = CONTESTANTS[name]
    adapters = Adapters(make_factors(shapes, rank, contestant.start))
    return adapters, contestant.make(adapters, x)


def estimated_seconds(
    name: str, shapes: Sequence[tuple[int, int]], rank: int, x: str, limit: float
) -> float:
    """Time of a step if every pair were stepped by itself, from one pair of each shape.

    Ends with the first shape that brings it above ``limit``: some optimizers take minutes for a
    single pair at high rank. The second of two steps counts, unless the first is too slow.
    """
    total = 0.0
    for shape, count in sorted(Counter(shapes).items()):
        adapters, optimizer = build(name, [shape], rank, x)
        for _ in range(2):
            began = time.perf_counter()
            optimizer.step()
            wait()
            took = count * (time.perf_counter() - began)
            adapters.restore()
            if took > limit:
                break
        total += took
        if total > limit:
            break
    return total


def refusal(
    name: str, shapes: Sequence[tuple[int, int]], rank: int, x: str, limit: float
) -> str | None:
    """Why an optimizer does not take part in a table, if so."""
    if CONTESTANTS[name].missing:
        return f"not installed: {CONTESTANTS[name].missing}"
    estimate = estimated_seconds(name, shapes, rank, x, limit)
    if estimate > limit:
        return f"left out: over {limit:g} s a step ({estimate:.0f} s or more, from single pairs)"
    return None
