"""Ideas for rules on the tangent space, tried through `lorapro compare` before they are made fast.

    python benchmarks/ideas.py results/ideas/compare.yaml --output_dir runs/ideas

A method is `idea-<rule>` or `idea-<rule>+<change>+…`. Every pair is stepped alone, in float64 and
with (m, n) matrices: for finding out, not for use.

rules
    factored  AdamW with row and column means of squares, as LoraProAdamW(mode="factored")
    squares   AdamW with every square of g̃, the momentum transported as in factored mode
    muon      the polar factor of the momentum, as LoraProMuon
changes
    rows      muon's h divided by the root mean square of each of its rows over time
    norm      the step lengthened to the norm that h had before it was projected
    retract   every step goes along the tangent and back to rank r; without it no step does, not
              even those that outrun B
    trace     print medians over the pairs, step by step: ‖P h‖/‖h‖ for P the projection on the
              tangent space, and γ‖d_B·d_A‖/‖B·d_A + d_B·A‖, both before any lengthening
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from torch import Tensor

import lorapro
from lorapro.cli.main import main as run
from lorapro.experiments.methods import ADAPTERS, METHODS, STARTS, Method
from lorapro.experiments.methods.optimizers import LoraProOptions, OptimizerPart
from lorapro.optim.adam_rule import AdamRule
from lorapro.optim.base import PAIRS, PairOptimizer
from lorapro.optim.polar import polar_factor
from lorapro.optim.retraction import retract
from lorapro.optim.spaces import ExactSpace, Tangent
from lorapro.optim.stacking import plain_gradients
from lorapro.optim.stacks import Tall, Wide

RULES = ("factored", "squares", "muon")
CHANGES = ("rows", "norm", "retract", "trace")
MOMENTUM, ROW_MEMORY = 0.95, 0.95


def tangent(A: Tensor, B: Tensor) -> Tangent:
    """A tangent vector of one pair."""
    return Tangent(Wide([A.double()[None]]), Tall([B.double()[None]]))


class Idea(AdamRule, PairOptimizer):
    """A rule with changes, dense."""

    def __init__(self, params: Any, idea: str, lr: float, x: str, weight_decay: float) -> None:
        rule, *changes = idea.split("+")
        options = {"lr": lr, "x": x, "weight_decay": weight_decay, "betas": (0.9, 0.999)}
        super().__init__(params, {**options, "eps": 1e-8, "rule": rule, "changes": changes})

    def update(self, group: dict[str, Any]) -> None:
        """Step one group."""
        if group["role"] != PAIRS:
            self.adamw_update(*plain_gradients(group), group)
            return
        A, B = group["params"][::2], group["params"][1::2]
        seen = [self.step_pair(group, *pair) for pair in zip(A, B, group["scalings"], strict=True)]
        if "trace" in group["changes"]:
            kept, curve = torch.tensor(seen).median(0).values.tolist()
            print(f"kept {kept:.3f}  curve {curve:.3f}", file=sys.stderr)

    def step_pair(
        self, group: dict[str, Any], A: Tensor, B: Tensor, s: float
    ) -> tuple[float, float]:
        """Step one pair; return what `trace` prints."""
        assert A.grad is not None
        assert B.grad is not None
        state, changes, lr = self.state[B], group["changes"], group["lr"]
        if not state:
            state.update(step=0, M=tangent(torch.zeros_like(A), torch.zeros_like(B)))
        state["step"] += 1
        scaling, one = (torch.full((1, 1, 1), v, dtype=torch.float64) for v in (float(s), 1.0))
        space = ExactSpace(A[None], B[None], scaling, group["x"])
        gradient = tangent(A.grad, B.grad)
        G = space.project(gradient.A, gradient.B)
        M = state["M"].lerp(G, 1 - (MOMENTUM if group["rule"] == "muon" else group["betas"][0]))
        h = getattr(self, group["rule"])(group, state, space, M, G)
        a, b = space.A.parts[0][0], space.B.parts[0][0]
        aligned = space.align(Wide([s * (b.T @ h)[None]]), Tall([s * (h @ a.T)[None]]))
        d_A, d_B = (d.parts[0][0] for d in aligned)
        first, second = s * (b @ d_A + d_B @ a).norm(), lr * s * (d_B @ d_A).norm()
        if "norm" in changes and first:
            d_A, d_B = (d * h.norm() / first for d in (d_A, d_B))
        old = ExactSpace(A[None].clone(), B[None].clone(), one, "zero")
        if "retract" in changes and second > 0:
            new = retract(a[None], b[None], d_A[None], d_B[None], lr)
            A.copy_(new[0][0])
            B.copy_(new[1][0])
        else:
            A.copy_(a - lr * d_A)
            B.copy_(b - lr * d_B)
        state["M"] = ExactSpace(A[None], B[None], one, "zero").receive(old, M)
        return float(first / h.norm()), float(second / first)

    def muon(self, group: Any, state: Any, space: ExactSpace, M: Tangent, G: Tangent) -> Tensor:
        """The polar factor of the momentum, one gradient ahead."""
        U, Vt = polar_factor(*sides(space, G.lerp(M, MOMENTUM)))
        h = 0.2 * max(len(U), Vt.shape[1]) ** 0.5 * (U @ Vt)
        if "rows" not in group["changes"]:
            return h
        held = state.setdefault("rows", torch.zeros_like(h[:, :1]))
        held.lerp_(h.square().mean(1, keepdim=True), 1 - ROW_MEMORY)
        even = h / ((held / (1 - ROW_MEMORY ** state["step"])).sqrt() + 1e-8)
        return even * (h.norm() / even.norm())

    def squares(self, group: Any, state: Any, space: ExactSpace, M: Tangent, G: Tangent) -> Tensor:
        """AdamW's direction."""
        (beta1, beta2), t = group["betas"], state["step"]
        square, mean = dense(space, G).square(), dense(space, M) / (1 - beta1**t)
        held = state.setdefault("squares", torch.zeros_like(square)).lerp_(square, 1 - beta2)
        return mean / ((held / (1 - beta2**t)).sqrt() + group["eps"])

    def factored(self, group: Any, state: Any, space: ExactSpace, M: Tangent, G: Tangent) -> Tensor:
        """The same with squares of rank one."""
        (beta1, beta2), t = group["betas"], state["step"]
        square, mean = dense(space, G).square(), dense(space, M) / (1 - beta1**t)
        means = [square.mean(d, keepdim=True) for d in (1, 0)]
        held = state.setdefault("means", [torch.zeros_like(v) for v in means])
        rows, columns = (
            h.lerp_(v, 1 - beta2) / (1 - beta2**t) for h, v in zip(held, means, strict=True)
        )
        even = torch.where(rows > 0, rows / rows.mean(), 1.0)
        return mean / even.sqrt() / (columns.sqrt() + group["eps"])


def sides(space: ExactSpace, T: Tangent) -> tuple[Tensor, Tensor]:
    """L and R with ``L·R`` the tangent vector."""
    L = torch.cat([space.B.parts[0][0], T.B.parts[0][0]], -1)
    return space.s[0] * L, torch.cat([T.A.parts[0][0], space.A.parts[0][0]], -2)


def dense(space: ExactSpace, T: Tangent) -> Tensor:
    """The tangent vector as an (m, n) matrix."""
    L, R = sides(space, T)
    return L @ R


class Factory:
    """What Trainer calls to get the optimizer."""

    def __call__(self, model: Any, **options: Any) -> Idea:
        """Build it."""
        return Idea(lorapro.lora_param_groups(model), **options)


def method(idea: str) -> Method:
    """A method of `lorapro compare`."""

    def optimizer(training: Any, options: LoraProOptions) -> Any:
        return Factory, {
            "idea": idea,
            "lr": training.learning_rate,
            "x": options.x or "sylvester",
            "weight_decay": 0.0,
        }

    part = OptimizerPart(f"idea-{idea}", idea, 1e-3, optimizer, LoraProOptions)
    return Method(part.name, ADAPTERS["rslora"], STARTS["zero"], part, part.learning_rate)


def main() -> None:
    """Register the ideas and hand over to `lorapro compare`."""
    for rule, number in itertools.product(RULES, range(3)):
        for changes in itertools.combinations(CHANGES, number):
            made = method("+".join((rule, *changes)))
            METHODS[made.name] = made
    sys.exit(run(["compare", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
