"""Condition of the factors in training, beside those that the speed benchmarks are run on.

    python benchmarks/trained_factors.py --ranks 8 32 128

SmolLM2-135M on tweets, efficient mode, rank-stabilised scaling, 4 x 128 tokens a step. The table
has quantiles of cond(B) and of cond(A) over the 210 pairs. The last row is what
``contestants.make_factors`` makes.
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

QUANTILES = (0.1, 0.5, 0.9, 1.0)
BATCH, LENGTH = 4, 128


def tokens(path: str, steps: int) -> Tensor:
    """(steps, 4, 128) tokens of tweets, one after the other."""
    from transformers import AutoTokenizer

    text = "\n".join(row["text"] for row in load_rows("tweets")["train"][: 100 * steps])
    ids = AutoTokenizer.from_pretrained(path)(text)["input_ids"][: steps * BATCH * LENGTH]
    return torch.tensor(ids).view(steps, BATCH, LENGTH)


def row(label: str, all_B: Iterable[Tensor], all_A: Iterable[Tensor]) -> dict[str, Any]:
    """Quantiles of the conditions."""
    found: dict[str, Any] = {"name": label}
    for name, factors in (("B", all_B), ("A", all_A)):
        sigma = [torch.linalg.svdvals(factor.detach().double()) for factor in factors]
        condition = torch.stack([s[0] / s[-1] for s in sigma])
        found[name] = torch.quantile(condition, torch.tensor(QUANTILES).double()).tolist()
    return found


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
            pairs = find_pairs(model).pairs
            rows.append(row(f"after step {step}", (p.B for p in pairs), (p.A for p in pairs)))
    made = contestants.make_factors(contestants.MODELS["smollm2"].shapes(), rank)
    return [*rows, row("made", (f.B for f in made), (f.A for f in made))]


def main(argv: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    made.add_argument("--ranks", nargs="+", type=int, default=[8, 32, 128])
    made.add_argument("--steps", type=int, default=12)
    add_output(made)
    arguments = made.parse_args(argv)
    check(made, arguments)
    report = Report("trained_factors", "Condition of SmolLM2-135M's pairs in training.", arguments)
    for rank in arguments.ranks:
        rows = measure(rank, arguments.steps)
        names = [f"{q:.0%}" for q in QUANTILES[:-1]] + ["most"]
        header = ["", *[f"cond({x}), {name}" for x in "BA" for name in names]]
        cells = [[r["name"], *[f"{x:.1f}" for k in "BA" for x in r[k]]] for r in rows]
        report.add(f"r = {rank}", table(header, cells), rows, rank=rank)


if __name__ == "__main__":
    main()
