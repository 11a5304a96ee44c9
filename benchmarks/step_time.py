"""Time of one optimizer step, beside torch's AdamW, PEFT's and PyPI's.

    python benchmarks/step_time.py                                    # all shapes, ranks and modes
    python benchmarks/step_time.py --shapes smollm2 --ranks 8 --only adamw-fused efficient
    python benchmarks/step_time.py --x zero                           # another X

One table for each model and rank. Every optimizer has its own copy of the factors, on which it
takes one step in each round; factors and gradients are put back before it, outside the timing.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import contestants
from common import Entry, Report, check, interleave, milliseconds, parser, ratio, summary, table
from common import times as as_ratio
from contestants import CONTESTANTS, LEGEND, MODELS, TITLES

REFERENCES = ("adamw-foreach", "adamw-fused")


def measure(arguments: argparse.Namespace, shapes: list, rank: int) -> list[dict[str, Any]]:
    """Rows of one table. What is too slow or not installed has a reason instead of a time."""
    gc.collect()  # the factors and states of the table before
    refused, entries, factors = {}, [], {}
    for name in arguments.only:
        why = contestants.refusal(name, shapes, rank, arguments.x, arguments.skip_slower_than)
        if why:
            refused[name] = why
    for name in arguments.only:
        if name in refused:
            continue
        contestant = CONTESTANTS[name]
        if contestant.start not in factors:
            factors[contestant.start] = contestants.make_factors(shapes, rank, contestant.start)
        adapters = contestants.Adapters(factors[contestant.start])
        optimizer = contestant.make(adapters, arguments.x)
        entries.append(Entry(name, optimizer.step, adapters.restore))
    seconds = interleave(entries, arguments.rounds)
    rows = []
    for name in arguments.only:
        row: dict[str, Any] = {"name": name}
        if name in refused:
            row["refused"] = refused[name]
        else:
            row |= {"seconds": seconds[name], **summary(seconds[name])}
            for reference in REFERENCES:
                if reference in seconds:
                    row[f"over {reference}"] = ratio(seconds[name], seconds[reference])
        rows.append(row)
    return rows


def as_table(rows: list[dict[str, Any]]) -> str:
    references = [r for r in REFERENCES if any(f"over {r}" in row for row in rows)]
    cells = []
    for row in rows:
        if "refused" in row:
            cells.append([row["name"], row["refused"], *[""] * len(references)])
        else:
            ratios = [as_ratio(row[f"over {r}"]) for r in references]
            cells.append([row["name"], milliseconds(row), *ratios])
    return table(["optimizer", "ms a step", *[f"× {r}" for r in references]], cells)


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--shapes", nargs="+", choices=MODELS, default=["smollm2", "llama"])
    made.add_argument("--ranks", nargs="+", type=int, default=[8, 32, 128])
    contestants.add_choice(made)
    contestants.add_limit(made)
    arguments = made.parse_args(argv)
    check(made, arguments)
    contestants.check_ranks(made, arguments)
    name = "step_time" if arguments.x == "sylvester" else f"step_time-{arguments.x}"
    about = (
        f"Medians of {arguments.rounds} interleaved rounds, quartiles in parentheses; "
        f"X: {arguments.x}.\n\n{LEGEND}"
    )
    report = Report(name, about, arguments)
    for model in arguments.shapes:
        for rank in arguments.ranks:
            rows = measure(arguments, MODELS[model].shapes(), rank)
            title = f"{TITLES[model]}, r = {rank}"
            report.add(title, as_table(rows), rows, shapes=model, rank=rank)


if __name__ == "__main__":
    main()
