"""``lorapro inspect TARGET``: the pairs of a model, their shapes, ranks and scalings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lorapro.cli.common import Parser, quiet_libraries, report_line

__all__ = ["run"]

DESCRIPTION = """\
Show what would be trained. TARGET is a config YAML, a run's folder, one of its checkpoints, or the
folder of a PEFT adapter (its base model is the one it names, or --model)."""


def run(arguments: Sequence[str]) -> None:
    """Print the pairs of a model as a table or JSON."""
    parser = Parser(
        "inspect",
        usage="lorapro inspect TARGET [--model NAME] [--json] [--flag value ...]",
        description=DESCRIPTION,
    )
    parser.add_argument("target", metavar="TARGET", help="config, run, checkpoint or adapter")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    known, flags = parser.parse_known_args(arguments)

    quiet_libraries()  # before anything imports them
    from lorapro.experiments.restore import describe_target

    description = describe_target(known.target, flags, log=report_line)
    if known.json:
        print(json.dumps(description, indent=2))
    else:
        _print_table(description)


def _print_table(description: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console = console if console.is_terminal else Console(width=160)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("pair", "m", "n", "rank", "scaling", "|A|", "|B|"):
        table.add_column(name, justify="left" if name == "pair" else "right", overflow="fold")
    for pair in description["pairs"]:
        table.add_row(
            pair["name"],
            str(pair["m"]),
            str(pair["n"]),
            str(pair["rank"]),
            f"{pair['scaling']:.4g}",
            f"{pair['norm_A']:.3g}",
            f"{pair['norm_B']:.3g}",
        )
    console.print(table)
    for name, reason in description["unaligned"]:
        print(f"cannot be aligned: {name}: {reason}")
    plain = description["plain"]
    if plain:
        total = sum(item["size"] for item in plain)
        print(f"\ntrained beside the pairs ({total:,} parameters):")
        for item in plain:
            print(f"  {item['name']} {'x'.join(map(str, item['shape']))}")
    print(
        f"\n{len(description['pairs'])} pairs; {description['trainable_parameters']:,} of "
        f"{description['parameters']:,} parameters trainable"
    )
