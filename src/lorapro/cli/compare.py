"""``lorapro compare RECIPE.yaml ... [--flag value]``: tasks x methods x learning rates x seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorapro.cli.common import Parser, config_help, quiet_libraries
from lorapro.experiments.errors import UserError

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
"""


def run(arguments: Sequence[str]) -> None:
    """Run comparisons and print their tables."""
    parser = Parser(
        "compare",
        usage="lorapro compare RECIPE.yaml [RECIPE.yaml ...] [--flag value ...]",
        description=DESCRIPTION,
    )
    if any(flag in ("-h", "--help") for flag in arguments):
        parser.epilog = f"{OWN_FLAGS}\n{config_help()}"
        parser.print_help()
        return
    flags = list(arguments)
    recipes = []
    while flags and not flags[0].startswith("-"):
        recipes.append(flags.pop(0))
    if not recipes:
        raise UserError("lorapro compare needs a config file: lorapro compare CONFIG.yaml")

    from rich.console import Console

    quiet_libraries()  # before anything imports them
    from lorapro.experiments.plan import load_comparison
    from lorapro.experiments.report import print_report, write
    from lorapro.experiments.summary import groups, summarize_runs, summary_folder
    from lorapro.experiments.sweep import compare

    console = Console()
    parent, flags = _take_folder(flags) if len(recipes) > 1 else (None, flags)
    names = [Path(recipe).stem for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two recipes are called {name!r}; run them one at a time")
    folders = [None if parent is None else Path(parent) / name for name in names]
    comparisons = [
        load_comparison(recipe, flags, folder=folder)
        for recipe, folder in zip(recipes, folders, strict=True)
    ]
    for comparison in comparisons:
        if len(comparisons) > 1:
            console.print(f"\n{comparison.recipe}", highlight=False)
        results = compare(comparison, console)
        for task, point, cells in groups(comparison):
            summary = summarize_runs(comparison, results, task, point, cells)
            where = summary_folder(comparison, task, point)
            write(comparison.folder, summary, where)
            print_report(where, comparison.folder, summary, console)


def _take_folder(flags: list[str]) -> tuple[str | None, list[str]]:
    """Split off ``--output_dir``: with several recipes each gets a folder of its name in it."""
    rest, folder = [], None
    wanted = False
    for flag in flags:
        if wanted:
            folder, wanted = flag, False
        elif flag == "--output_dir":
            wanted = True
        elif flag.startswith("--output_dir="):
            folder = flag.partition("=")[2]
        else:
            rest.append(flag)
    return folder, rest
