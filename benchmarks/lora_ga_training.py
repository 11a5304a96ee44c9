"""What the start is worth: LoRA, LoRA-GA with its three objectives, PEFT's lora_ga, on tweets.

    python benchmarks/lora_ga_training.py --lr 1e-4 3e-4 1e-3 --seeds 0

MiniLM-L6 on three-class tweets: the same model, batches for the gradient (8 of 16 tweets), training
batches, rank, scaling and AdamW for all; only the start differs. Loss on 1,024 tweets never trained
on, after --steps steps. First the starts themselves are compared: norms of the factors and of
``s·B·A`` against W0, and the share of the gradient's energy they give back.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from lora_ga_common import captured, factors, gradients, load, with_lora, with_peft_lora_ga

from lorapro import lora_ga

NAME = "minilm-l6"
EVAL_BATCHES, GRADIENT_BATCHES, SIZE, LENGTH = 32, 8, 32, 64


def plain(model: Any, rank: int, batches: list[dict]) -> Any:
    return with_lora(model, NAME, rank)


def ours(**options: Any) -> Callable[..., Any]:
    def start(model: Any, rank: int, batches: list[dict]) -> Any:
        model = with_lora(model, NAME, rank)
        # All gradients at once: they are small here, and the factors are the same.
        passes = {} if options.get("estimator") == "sketch" else {"layers_per_pass": 1000}
        lora_ga.initialize(model, batches, **passes, **options)
        return model

    return start


def peft(model: Any, rank: int, batches: list[dict]) -> Any:
    return with_peft_lora_ga(model, NAME, rank, batches)


STARTS: dict[str, Callable[..., Any]] = {
    "lora": plain,
    "lora-ga, gradient": ours(),
    "lora-ga, gradient, sketch": ours(estimator="sketch"),
    "lora-ga, gradient, gamma 256": ours(gamma=256.0),
    "lora-ga, sign": ours(objective="sign"),
    "lora-ga, adam": ours(objective="adam"),
    "peft lora_ga": peft,
}


TRAINED = [name for name in STARTS if "sketch" not in name]


@torch.no_grad()
def loss_on(model: Any, batches: list[dict]) -> float:
    model.eval()
    losses = [float(model(**b).loss) * len(b["labels"]) for b in batches]
    return sum(losses) / sum(len(b["labels"]) for b in batches)


def train(model: Any, batches: list[dict], lr: float, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (t + 1) / 10) * (1 - t / steps)
    )
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        model(**batches[order[step % len(order)]]).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()


def compare_starts(rank: int) -> None:
    print("| start | ‖A‖ | ‖B‖ | ‖sBA‖/‖W0‖ | energy | max change of logits |")
    print("|---|---|---|---|---|---|")
    for name, start in STARTS.items():
        model, batches = load(NAME, GRADIENT_BATCHES, 16, LENGTH)
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        with torch.no_grad():
            before = model.eval()(**batches[0]).logits
        model = start(model, rank, batches).eval()
        with torch.no_grad():
            after = model(**batches[0]).logits
        held, found = factors(model), gradients(model, batches)
        norms = {"A": 0.0, "B": 0.0, "ratio": 0.0}
        inside = whole = 0.0
        for layer, (A, B) in held.items():
            W = weights[f"{layer.removeprefix('base_model.model.')}.weight"]
            norms["A"] += float(A.norm()) / len(held)
            norms["B"] += float(B.norm()) / len(held)
            s = 16 / rank**0.5
            norms["ratio"] += float(s * (B @ A).norm() / W.norm()) / len(held)
            G = found[layer]
            energy = float(G.double().square().sum())
            inside, whole = inside + energy * (captured(A, B, G) if B.any() else 0), whole + energy
        print(
            f"| {name} | {norms['A']:.3g} | {norms['B']:.3g} | {norms['ratio']:.3g} | "
            f"{inside / whole:.1%} | {float((after - before).abs().max()):.1e} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=TRAINED)
    arguments = parser.parse_args()
    compare_starts(arguments.rank)
    print()
    print("| start | " + " | ".join(f"lr {lr:g}" for lr in arguments.lr) + " |")
    print("|---" * (len(arguments.lr) + 1) + "|")
    # Tweets 0 to 1,599 are trained on (the first 128 give the gradient); from 6,400 on held out.
    _, evaluation = load(NAME, EVAL_BATCHES, SIZE, LENGTH, start=200)
    for name in arguments.starts:
        cells = []
        for lr in arguments.lr:
            losses = []
            for seed in arguments.seeds:
                model, gradient_batches = load(NAME, GRADIENT_BATCHES, 16, LENGTH)
                _, training = load(NAME, arguments.steps, 16, LENGTH)
                model = STARTS[name](model, arguments.rank, gradient_batches)
                train(model, training, lr, arguments.steps, seed)
                losses.append(loss_on(model, evaluation))
            cells.append(f"{sum(losses) / len(losses):.4f}")
            print(f"{name}, lr {lr:g}: {losses}", file=sys.stderr, flush=True)
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
