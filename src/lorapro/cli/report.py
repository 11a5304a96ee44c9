"""``lorapro report RUNS ...``: tables, figures and verdicts of finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorapro.cli.common import Parser
from lorapro.experiments.errors import UserError, check_name

__all__ = ["run"]

DESCRIPTION = """\
Compare the runs under one or more folders (of 'lorapro compare', or committed results.json files).
Prints a table of each task and a sentence a method; --output writes everything as one page that
needs no network, or as Markdown."""

ENDINGS = (".html", ".md")
KINDS = ("png", "svg")


def run(arguments: Sequence[str]) -> None:
    """Print and write the report."""
    parser = Parser("report", description=DESCRIPTION)
    parser.add_argument(
        "runs", nargs="+", metavar="RUNS", help="folders of runs or of results.json"
    )
    parser.add_argument("--output", help="page (.html) or Markdown (.md) to write")
    parser.add_argument("--figures", metavar="DIR", help="write every figure into this folder")
    parser.add_argument("--figure_format", default="png", help="png or svg [png]")
    parser.add_argument("--measure", help="what is compared [test_loss where there is one]")
    parser.add_argument(
        "--target", help="row that gaps lead to; 'better': of the rows of full fine-tuning [full]"
    )
    parser.add_argument("--baseline", help="row that the others are compared with [lora]")
    parser.add_argument("--against", metavar="KEY", help="draw the measure against this config key")
    parser.add_argument(
        "--compact",
        metavar="DIR",
        help="write results.json there: all that a report needs, --target included",
    )
    parser.add_argument(
        "--merge", action="store_true", help="all runs as one comparison, of the first's title"
    )
    given = parser.parse_strictly(arguments)
    output = None if given.output is None else Path(given.output)
    if output is not None and output.suffix not in ENDINGS:
        raise UserError(f"--output must end in .html or .md, found {given.output!r}")
    for flag, folder in (("--figures", given.figures), ("--compact", given.compact)):
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            raise UserError(f"{flag} {folder} is a file, expected a folder")
    if given.figure_format not in KINDS:
        raise UserError(f"--figure_format must be png or svg, found {given.figure_format!r}")

    from rich.console import Console

    from lorapro.experiments.report import Report, print_tables
    from lorapro.experiments.results import merged, read_results, write_results

    results = read_results(*given.runs)
    if given.merge:
        results = merged(results)
    if given.measure is not None and given.measure not in results.runs:
        known = [c for c in results.runs if str(c).startswith(("test_", "validation_"))]
        raise UserError(f"no run has the measure {given.measure!r}; known: {', '.join(known)}")
    labels = dict.fromkeys(map(str, results.runs["label"]))
    if given.baseline is not None:
        check_name("row", given.baseline, labels)
    if given.target not in (None, "full", "better"):
        check_name("row", given.target, labels)
    if given.against is not None:
        told = [*results.runs["config"], *results.runs["axes"]]
        keys = sorted({str(key) for run in told if isinstance(run, dict) for key in run})
        check_name("config key in --against:", given.against, keys)
    report = Report(results, given.measure, given.target, given.baseline, given.against)
    console = Console()
    print_tables(report, console)
    written: list[Path] = []
    if output is not None:
        report.save(output)
        written.append(output)
    if given.figures is not None:
        written += report.save_figures(Path(given.figures), given.figure_format)
    if given.compact is not None:
        names = list(dict.fromkeys(results.runs["experiment"]))
        for name in names:
            folder = Path(given.compact) / (name if len(names) > 1 else "")
            folder.mkdir(parents=True, exist_ok=True)
            results.experiments[name].target = given.target or results.experiments[name].target
            write_results(results, name, folder)
            written.append(folder / "results.json")
    for path in written:
        console.print(f"Written: {path}", highlight=False, soft_wrap=True, markup=False)
