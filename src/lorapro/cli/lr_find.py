"""``lorapro lr-find [CONFIG.yaml] [--flag value]``: a learning rate for own data."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorapro.cli.common import Parser, check_task, config_help, quiet_libraries
from lorapro.experiments.errors import UserError

__all__ = ["run"]

DESCRIPTION = """\
Train a few steps at several learning rates, on the data and with the method of a config, and say
which gives the smallest validation loss. What diverges is stopped; where the best rate is the last
of a side, the next one beyond is tried too. Finished runs are not repeated.

  --rates 1e-4 1e-3 1e-2     try these; default: around the method's own, a factor of 2 apart
  --steps 30                 steps of each run

The best rate of a short run is often above that of a long one: where they are to be many times
longer, begin a factor of two below."""


def run(arguments: Sequence[str]) -> None:
    """Find a rate and print it."""
    parser = Parser(
        "lr-find",
        usage="lorapro lr-find [CONFIG.yaml] [--rates R ...] [--steps N] [--flag value ...]",
        description=DESCRIPTION,
    )
    parser.add_argument("--rates", nargs="+", type=float)
    parser.add_argument("--steps", type=int, default=30)
    if any(flag in ("-h", "--help") for flag in arguments):
        parser.epilog = config_help()
        parser.print_help()
        return
    given = list(arguments)
    path = given.pop(0) if given and not given[0].startswith("-") else None
    known, flags = parser.parse_known_args(given)
    for rate in known.rates or ():
        if not 0 < rate < math.inf:
            raise UserError(f"--rates must be positive and finite, found {rate:g}")

    from rich.console import Console

    quiet_libraries()  # before anything imports them
    from lorapro.experiments.keys import parse_values
    from lorapro.experiments.lr_find import find_rate
    from lorapro.experiments.yaml_file import read_yaml

    values = parse_values({} if path is None else read_yaml(path), flags)
    check_task(values, "lr-find")
    console = Console(stderr=True)
    found = find_rate(values, steps=known.steps, rates=known.rates, console=console)
    for rate, loss in found["losses"].items():
        mark = "  <- best" if rate == found["rate"] else ""
        print(f"{rate:<10g} {'diverged' if not math.isfinite(loss) else f'{loss:.4f}'}{mark}")
    print(f"figure: {found['folder'] / 'lr_find.png'}")
    if found["rate"] is None:
        raise UserError("every rate diverged; try smaller ones with --rates")
    if found["edge"]:
        print("the best rate is the last one tried: a better one may lie beyond")
    print(f"take: --learning_rate {found['rate']:g}")
