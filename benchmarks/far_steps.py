"""How far one step moves W when gradients have a rank below r, from B = 0.

    python benchmarks/far_steps.py

Gradients of W are products of random (m, k) and (k, n) matrices with k below r, as a classifier has
them that reads one token of each of k examples. B then gets directions that are hardly there, and
d_A, which is divided by them, no bound. For every optimizer: ‖ΔW‖ over γ·√(m·n), the norm of a step
whose entries are all γ, largest of 20 pairs, step by step.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import lorapro
from lorapro.factors import LoraPair

M, N, STEPS, PAIRS = 96, 160, 6, 20
OPTIMIZERS = {
    "factored": lambda groups, lr: lorapro.LoraProAdamW(groups, lr=lr, mode="factored"),
    "muon": lambda groups, lr: lorapro.LoraProMuon(groups, lr=lr),
    "efficient, damped": lambda groups, lr: lorapro.LoraProAdamW(groups, lr=lr, damping=3.0),
    "full": lambda groups, lr: lorapro.LoraProAdamW(groups, lr=lr, mode="full"),
    "full, damped": lambda groups, lr: lorapro.LoraProAdamW(
        groups, lr=lr, mode="full", damping=3.0
    ),
    "sgd": lambda groups, lr: lorapro.LoraProSGD(groups, lr=lr),
    "sgd, damped": lambda groups, lr: lorapro.LoraProSGD(groups, lr=lr, damping=3.0),
}


def moves(name: str, r: int, rank: int, lr: float = 1e-2) -> list[float]:
    """The largest move of W in each step."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    pairs = [
        LoraPair(str(i), nn.Parameter(normal(r, N) / N**0.5), nn.Parameter(torch.zeros(M, r)), 2.0)
        for i in range(PAIRS)
    ]
    optimizer = OPTIMIZERS[name](lorapro.lora_param_groups(None, pairs=pairs), lr)
    largest = []
    for _ in range(STEPS):
        before = [(pair.B @ pair.A).detach() for pair in pairs]
        for pair in pairs:
            A, B, L, R = pair.A.detach(), pair.B.detach(), normal(M, rank), normal(rank, N)
            pair.A.grad, pair.B.grad = 2.0 * (B.T @ L) @ R, 2.0 * L @ (R @ A.T)
        optimizer.step()
        after = [(pair.B @ pair.A).detach() for pair in pairs]
        distances = [2.0 * float((b - a).norm()) for a, b in zip(before, after, strict=True)]
        largest.append(max(distances) / (lr * (M * N) ** 0.5))
    return largest


def main() -> None:
    """Print a row for every optimizer, rank and rank of the gradient."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    chosen = parser.parse_args().only
    print("| optimizer | r | rank of g |" + "".join(f" step {t + 1} |" for t in range(STEPS)))
    print("|---" * (3 + STEPS) + "|")
    for name in chosen:
        for r, rank in ((8, 1), (8, 4), (32, 1), (32, 8)):
            values = "".join(f" {value:,.2f} |" for value in moves(name, r, rank))
            print(f"| {name} | {r} | {rank} |{values}", flush=True)


if __name__ == "__main__":
    main()
