"""``lorapro inspect TARGET``: the pairs of a model, their shapes, ranks and scalings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorapro.cli.common import Parser, quiet_libraries, report_line

__all__ = ["run"]

DESCRIPTION = """\
Show what would be trained. TARGET is a config YAML, a run's folder, one of its checkpoints, or the
folder of a PEFT adapter (its base model is the one it names, or --model).

Of a run trained with --diagnostics_every N also the alignment, of every measured step and of every
layer at the last one: the smallest rank and the largest condition of B; the norm of W's gradient;
how far from it LoRA's own step and the aligned one are, as shares of that norm; the decrease of the
loss for a unit of learning rate that is predicted, and that of the step that was taken. Pictures of
it: lorapro report RUN --figures DIR."""

MOST_STEPS = 12
COLUMNS = {
    "rank_B": "rank B",
    "condition_B": "cond. B",
    "gradient_norm": "|g|",
    "lora_distance": "LoRA: |g~-g|/|g|",
    "aligned_distance": "aligned",
    "predicted_decrease": "predicted",
    "realised_decrease": "realised",
}


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
    from lorapro.experiments.alignment import read_alignment, without_alignment
    from lorapro.experiments.restore import describe_target

    description = describe_target(known.target, flags, log=report_line)
    alignment = read_alignment(Path(known.target))
    if known.json:
        print(json.dumps({**description, "alignment": alignment}, indent=2))
        return
    _print_table(description)
    if alignment is not None:
        _print_alignment(alignment)
    elif without_alignment(Path(known.target)):
        print("no alignment was measured; train with --diagnostics_every 10 to see it here")


def _table(*columns: str) -> tuple[Any, Any]:
    """A console and an empty table, names on the left and numbers on the right."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console = console if console.is_terminal else Console(width=160)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name == "pair" else "right", overflow="fold")
    return console, table


def _print_alignment(alignment: dict[str, list[dict[str, Any]]]) -> None:
    steps = alignment["steps"]
    every = -(-len(steps) // MOST_STEPS)
    shown = [row for i, row in enumerate(steps) if i % every == 0 or i == len(steps) - 1]
    for key, title, rows in (
        ("step", "alignment, all pairs", shown),
        ("layer", f"alignment by layer, step {steps[-1]['step']}", alignment["layers"]),
    ):
        console, table = _table(key, *COLUMNS.values())
        for row in rows:
            numbers = (f"{row[name]:.3g}" if name in row else "-" for name in COLUMNS)
            table.add_row("-" if row[key] is None else str(row[key]), *numbers)
        print(f"\n{title}")
        console.print(table)


def _print_table(description: dict[str, Any]) -> None:
    console, table = _table("pair", "m", "n", "rank", "scaling", "|A|", "|B|")
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
