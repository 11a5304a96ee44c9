"""``lorapro compare RECIPE.yaml ... [--flag value]``: tasks x methods x learning rates x seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorapro.cli.common import Parser, config_help, quiet_libraries
from lorapro.experiments.errors import UserError, check_name

__all__ = ["run"]

DESCRIPTION = """\
Train every method of a recipe and compare them. Under 'methods' the YAML maps each method to the
learning rates to try; the best one on validation data is taken. What is finished is not repeated,
so the same command goes on after an interruption. Several recipes are run one after the other."""

OWN_FLAGS = """\
flags of the comparison:
  --methods lora lora-pro    only these
  --tasks sst2 cola          only these
  --seeds 0 1 2              one run a seed
  --strategy tune            tune: pick the learning rate with the first seed; grid: run everything
  --toy true                 the same recipe on tiny random models and written data, offline
  --processes 4              so many runs at a time
  --backend ray              on a Ray cluster, a local one if there is none (pip install ray)
"""


def run(arguments: Sequence[str]) -> int:
    """Run comparisons, print their tables, write their reports; return 1 if a run failed."""
    parser = Parser(
        "compare",
        usage="lorapro compare RECIPE.yaml [RECIPE.yaml ...] [--flag value ...]",
        description=DESCRIPTION,
    )
    if any(flag in ("-h", "--help") for flag in arguments):
        parser.epilog = f"{OWN_FLAGS}\n{config_help()}"
        parser.print_help()
        return 0
    flags = list(arguments)
    recipes = []
    while flags and not flags[0].startswith("-"):
        recipes.append(flags.pop(0))
    if not recipes:
        raise UserError("lorapro compare needs a config file: lorapro compare CONFIG.yaml")

    from rich.console import Console

    quiet_libraries()  # before anything imports them
    from lorapro.experiments.plan import load_comparison
    from lorapro.experiments.report import report_comparison
    from lorapro.experiments.sweep import compare
    from lorapro.experiments.workers import BACKENDS

    console = Console()
    parent, flags = _take("output_dir", flags) if len(recipes) > 1 else (None, flags)
    processes, flags = _take("processes", flags)
    backend, flags = _take("backend", flags)
    count = _count(processes)
    check_name("backend", backend or "local", BACKENDS)
    names = [Path(recipe).stem for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two recipes are called {name!r}; run them one at a time")
    folders = [None if parent is None else Path(parent) / name for name in names]
    comparisons = [
        load_comparison(recipe, flags, folder=folder)
        for recipe, folder in zip(recipes, folders, strict=True)
    ]
    failed: list[object] = []
    for comparison in comparisons:
        if len(comparisons) > 1:
            console.print(f"\n{comparison.recipe}", highlight=False)
        results = compare(comparison, console, processes=count, backend=backend or "local")
        failed += [r for r in results.values() if r["status"] == "failed"]
        report_comparison(comparison.folder, console)
    if failed:
        console.print(
            f"{len(failed)} runs failed; error.txt in a run's folder says how, and the same "
            "command tries them again",
            highlight=False,
        )
    return 1 if failed else 0


def _count(text: str | None) -> int:
    try:
        count = int(text or 1)
    except ValueError:
        count = 0
    if count < 1:
        raise UserError(f"--processes must be a whole number of at least 1, found {text!r}")
    return count


def _take(name: str, flags: list[str]) -> tuple[str | None, list[str]]:
    """Split off one flag with one value; return (value or None, the other flags)."""
    rest, value = [], None
    waiting = iter(flags)
    for flag in waiting:
        if flag == f"--{name}":
            value = next(waiting, None)
            if value is None:
                raise UserError(f"--{name} needs a value")
        elif flag.startswith(f"--{name}="):
            value = flag.partition("=")[2]
        else:
            rest.append(flag)
    return value, rest
