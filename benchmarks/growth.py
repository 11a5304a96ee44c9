"""How the time of a step grows with the rank, with m + n, and with the number of pairs.

    python benchmarks/growth.py
    python benchmarks/growth.py --series rank --only efficient full

Square layers. Every size of a series and every optimizer takes one step in each round, so that the
exponents compare times of the same minutes. The exponent is the slope of a straight line through
(log size, log time) by least squares, with its standard error; small sizes are bound by the cost
of calls, so the slope between the two largest sizes stands beside it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import contestants
from common import Entry, Report, check, interleave, parser, summary, table

OPTIMIZERS = ("adamw-fused", "efficient", "factored", "full", "muon", "sgd")
RANK = 8
SERIES = {"rank": "r", "size": "m + n", "pairs": "pairs"}
SIZES = {
    "rank": [8, 16, 32, 64, 128],
    "size": [256, 512, 1024, 2048, 4096],
    "pairs": [15, 30, 60, 120, 240],
}
TINY = {"rank": [1, 2, 4], "size": [8, 16, 32], "pairs": [1, 2, 4]}
# Wide layers are few, for full mode's two m×n moments.
FIXED = {"rank": "32 pairs of 512×512", "size": "8 pairs, r = 8", "pairs": "576×576, r = 8"}
TINY_FIXED = {"rank": "2 pairs of 16×16", "size": "8 pairs, r = 8", "pairs": "16×16, r = 8"}


def setting(series: str, value: int, tiny: bool) -> tuple[list[tuple[int, int]], int]:
    """Shapes and rank of one point of a series."""
    match series:
        case "rank":
            return ([(16, 16)] * 2 if tiny else [(512, 512)] * 32), value
        case "size":
            return [(value, value)] * 8, RANK
        case _:
            return [(16, 16) if tiny else (576, 576)] * value, RANK


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Slope of log time over log size, and its standard error."""
    x, y = [math.log(v) for v in sizes], [math.log(v) for v in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    left = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    return slope, math.sqrt(left / max(1, len(x) - 2) / spread)


def measure(arguments: argparse.Namespace, series: str, values: list[int]) -> list[dict[str, Any]]:
    """One row an optimizer: its times at every size, and the exponents."""
    entries = []
    for name in arguments.only:
        for value in values:
            shapes, rank = setting(series, value, arguments.tiny)
            adapters, optimizer = contestants.build(name, shapes, rank, arguments.x)
            entries.append(Entry((name, value), optimizer.step, adapters.restore))
    seconds = interleave(entries, arguments.rounds)
    rows = []
    for name in arguments.only:
        found = [summary(seconds[name, value]) for value in values]
        medians = [f["median"] for f in found]
        slope, error = exponent(values, medians)
        last, _ = exponent(values[-2:], medians[-2:])
        row = {"name": name, "sizes": values, "times": found, "seconds": medians}
        rows.append({**row, "exponent": slope, "error": error, "last exponent": last})
    return rows


def as_table(series: str, rows: list[dict[str, Any]]) -> str:
    values = rows[0]["sizes"]
    shown = [2 * v for v in values] if series == "size" else values
    header = ["optimizer", *[f"{SERIES[series]} = {v}" for v in shown], "exponent", "at the end"]
    cells = [
        [
            row["name"],
            *[f"{1e3 * t:.2f}" for t in row["seconds"]],
            f"{row['exponent']:.2f} ± {row['error']:.2f}",
            f"{row['last exponent']:.2f}",
        ]
        for row in rows
    ]
    return table(header, cells)


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--series", nargs="+", choices=SERIES, default=list(SERIES))
    made.add_argument("--tiny", action="store_true", help="a few small sizes, to try it out")
    contestants.add_choice(made, OPTIMIZERS)
    arguments = made.parse_args(argv)
    check(made, arguments)
    about = (
        f"Milliseconds of a step, medians of {arguments.rounds} interleaved rounds; exponents are "
        f"slopes in logarithms, over all sizes and between the last two.\n\n{contestants.LEGEND}"
    )
    report = Report("growth", about, arguments)
    for series in arguments.series:
        values = (TINY if arguments.tiny else SIZES)[series]
        rows = measure(arguments, series, values)
        fixed = (TINY_FIXED if arguments.tiny else FIXED)[series]
        title = f"Growth in {SERIES[series]} ({fixed})"
        report.add(title, as_table(series, rows), rows, series=series)


if __name__ == "__main__":
    main()
