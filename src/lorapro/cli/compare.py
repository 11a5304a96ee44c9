"""``lorapro compare CONFIG.yaml [--flag value]``: methods x learning rates x seeds."""

from __future__ import annotations

from collections.abc import Sequence

from lorapro.cli.common import Parser, config_help, quiet_libraries
from lorapro.experiments.errors import UserError

__all__ = ["run"]

DESCRIPTION = """\
Train every method of a YAML and compare them. Under 'methods' the YAML maps each method to the
learning rates to try; the best one on validation data is taken. What is finished is not repeated,
so the same command goes on after an interruption."""

OWN_FLAGS = """\
flags of the comparison:
  --methods lora lora-pro    only these
  --seeds 0 1 2              one run a seed
  --strategy tune            tune: pick the learning rate with the first seed; grid: run everything
"""


def run(arguments: Sequence[str]) -> None:
    """Run a comparison and print its table."""
    parser = Parser(
        "compare",
        usage="lorapro compare CONFIG.yaml [--flag value ...]",
        description=DESCRIPTION,
    )
    if any(flag in ("-h", "--help") for flag in arguments):
        parser.epilog = f"{OWN_FLAGS}\n{config_help()}"
        parser.print_help()
        return
    flags = list(arguments)
    if not flags or flags[0].startswith("-"):
        raise UserError("lorapro compare needs a config file: lorapro compare CONFIG.yaml")

    from rich.console import Console

    quiet_libraries()  # before anything imports them
    from lorapro.experiments.compare import compare
    from lorapro.experiments.compare_config import load_comparison
    from lorapro.experiments.report import print_report

    console = Console()
    comparison = load_comparison(flags[0], flags[1:])
    summary = compare(comparison, console)
    print_report(comparison.folder, summary, console)
