"""Condition of the factors in training, beside those that the speed benchmarks are run on.

    python benchmarks/trained_factors.py --ranks 8 32 128

SmolLM2-135M on tweets, efficient mode, rank-stabilised scaling, 4 x 128 tokens a step. The table
has quantiles of cond(B) over the 210 pairs, and how many pairs are beyond the limit up to which
efficient mode works in float32. The last row is what ``contestants.make_factors`` makes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import contestants
import torch
from common import Report, add_output, check, table
from torch import Tensor

import lorapro
from lorapro.experiments.assets import asset_path
from lorapro.experiments.data import load_rows
from lorapro.factors import find_pairs
from lorapro.optim.batched import MOST_CONDITION

MOST = MOST_CONDITION[torch.float32]

QUANTILES = (0.1, 0.5, 0.9, 1.0)
BATCH, LENGTH = 4, 128


def tokens(path: str, steps: int) -> Tensor:
    """(steps, 4, 128) tokens of tweets, one after the other."""
    from transformers import AutoTokenizer

    text = "\n".join(row["text"] for row in load_rows("tweets")["train"][: 100 * steps])
    ids = AutoTokenizer.from_pretrained(path)(text)["input_ids"][: steps * BATCH * LENGTH]
    return torch.tensor(ids).view(steps, BATCH, LENGTH)


def row(label: str, all_B: Iterable[Tensor]) -> dict[str, Any]:
    """Quantiles of the condition, and the number of pairs that take the exact path for it."""
    sigma = [torch.linalg.svdvals(B.detach().double()) for B in all_B]
    condition = torch.stack([s[0] / s[-1] for s in sigma])
    beyond = sum(bool((s**2).norm() * (s**-2).norm() > MOST) for s in sigma)
    found = torch.quantile(condition, torch.tensor(QUANTILES).double()).tolist()
    return {"name": label, "quantiles": found, "beyond": beyond, "pairs": len(sigma)}


def measure(rank: int, steps: int) -> list[dict[str, Any]]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = asset_path("smollm2-135m-instruct")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=16, use_rslora=True, target_modules="all-linear")
    model = get_peft_model(base, config)
    optimizer = lorapro.create_lorapro_optimizer(model, lr=1e-3)
    rows = []
    for step, batch in enumerate(tokens(path, steps), 1):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, 2, 4, 8, steps):
            rows.append(row(f"after step {step}", (p.B for p in find_pairs(model).pairs)))
    made = contestants.make_factors(contestants.MODELS["smollm2"].shapes(), rank)
    return [*rows, row("made", (f.B for f in made))]


def main(argv: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    made.add_argument("--ranks", nargs="+", type=int, default=[8, 32, 128])
    made.add_argument("--steps", type=int, default=12)
    add_output(made)
    arguments = made.parse_args(argv)
    check(made, arguments)
    report = Report("trained_factors", "cond(B) of SmolLM2-135M's pairs in training.", arguments)
    for rank in arguments.ranks:
        rows = measure(rank, arguments.steps)
        header = ["", *[f"{q:.0%}" for q in QUANTILES[:-1]], "most", "exact path"]
        cells = [
            [r["name"], *[f"{x:.1f}" for x in r["quantiles"]], f"{r['beyond']} of {r['pairs']}"]
            for r in rows
        ]
        report.add(f"r = {rank}", table(header, cells), rows, rank=rank)


if __name__ == "__main__":
    main()
