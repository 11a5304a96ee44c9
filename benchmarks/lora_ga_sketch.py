"""How much of the best rank-2r energy a sketch finds, by its width and its passes.

    python benchmarks/lora_ga_sketch.py --model minilm-l6 --batches 8 --size 16

For each layer: ``‖UᵀG‖²`` and ``‖G·V‖²`` of the 2r directions found, over the sum of the 2r largest
squared singular values of the true gradient; the worst layer, and all layers pooled.
"""

from __future__ import annotations

import argparse

import torch
from lora_ga_common import MODELS, gradients, load, with_lora

from lorapro.lora_ga.capture import quiet
from lorapro.lora_ga.estimate import Directions, sketch
from lorapro.lora_ga.layers import adapted_layers

SETTINGS = ((24, 0), (48, 0), (24, 1), (32, 1), (48, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--size", type=int, default=16, help="tweets a batch")
    parser.add_argument("--length", type=int, default=64, help="tokens a tweet at most")
    parser.add_argument("--rank", type=int, default=8)
    arguments = parser.parse_args()
    model, batches = load(arguments.model, arguments.batches, arguments.size, arguments.length)
    model = with_lora(model, arguments.model, arguments.rank)
    layers, _ = adapted_layers(model, "default")
    true = gradients(model, batches)
    best = {
        name: float(torch.linalg.svdvals(G)[: 2 * arguments.rank].square().sum())
        for name, G in true.items()
    }
    print("| vectors | passes | U worst | U pooled | V worst | V pooled | energy off by |")
    print("|---|---|---|---|---|---|---|")
    for oversampling, power in SETTINGS:
        found: dict[str, tuple[float, float, float]] = {}

        def consume(d: Directions, found: dict = found) -> None:
            G = true[d.layer.name]
            norm2 = float(G.square().sum())
            left, right = float((d.U.mT @ G).square().sum()), float((G @ d.V).square().sum())
            found[d.layer.name] = (left, right, abs(d.energy / norm2 - 1))

        with quiet(model):
            sketch(
                model, batches, None, layers, consume, oversampling=oversampling, power_passes=power
            )
        total = sum(best.values())
        cells = []
        for side in (0, 1):
            cells.append(f"{min(found[n][side] / best[n] for n in best):.2%}")
            cells.append(f"{sum(found[n][side] for n in best) / total:.2%}")
        off = max(x[2] for x in found.values())
        print(
            f"| 2r + {oversampling} | {2 + 2 * power} | " + " | ".join(cells) + f" | {off:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
