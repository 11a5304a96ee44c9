"""A report of results as page, Markdown, figures, or text on a terminal."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from lorapro.experiments.folders import ADAPTER, MERGED, MODEL, write_text
from lorapro.experiments.report.comparison import TARGET, Comparison, compare
from lorapro.experiments.report.diagnostic_figures import diagnostic_figures
from lorapro.experiments.report.drawing import FigurePanels
from lorapro.experiments.report.figures import difference_figure, figures_of
from lorapro.experiments.report.html import Section, page, verdict_cards
from lorapro.experiments.report.problems import Problem, headline, problems
from lorapro.experiments.report.rate_tables import (
    rates_table,
    transfer_table,
    transfers_table,
    values_by_rate_table,
)
from lorapro.experiments.report.summary_tables import (
    across_table,
    conditions_table,
    gaps_table,
    paper_table,
    unfinished_table,
)
from lorapro.experiments.report.sweep_figures import sweep_figures
from lorapro.experiments.report.tables import (
    Table,
    cost_table,
    detail_table,
    main_table,
    way_table,
)
from lorapro.experiments.report.verdicts import lead
from lorapro.experiments.results import Results, read_results, write_results

__all__ = ["Report", "print_tables", "report_comparison"]

TABLE, PAGE = "table.md", "report.html"
SAVED = (ADAPTER, MODEL, MERGED)


@dataclass
class Report:
    """Results compared; everything that is printed or drawn hangs on ``comparisons``."""

    results: Results
    measure: str | None = None
    target: str | None = None  # default: what the experiment says, else full fine-tuning
    baseline: str | None = None
    against: str | None = None  # a swept variable to draw

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """One a problem."""
        found = problems(self.results.runs, self.titles)
        return [self._compare(problem) for problem in found]

    def _compare(self, problem: Problem) -> Comparison:
        target = self.target or self.results.experiments[problem.experiment].target or TARGET
        return compare(problem, self.measure, baseline=self.baseline, target=target)

    @property
    def titles(self) -> dict[str, str]:
        """The recipes' titles, by experiment."""
        return {name: about.title for name, about in self.results.experiments.items()}

    @property
    def toy(self) -> bool:
        """Whether any of it is of toy size."""
        return any(about.toy for about in self.results.experiments.values())

    @property
    def title(self) -> str:
        """The recipe's title, or the names of the experiments."""
        names = list(dict.fromkeys(found.problem.experiment for found in self.comparisons))
        return ", ".join(self.results.experiments[name].title or name for name in names)

    def overview(self) -> list[Table]:
        """Tables over all problems: summary, and beside each paper's numbers."""
        across = across_table(self.comparisons)
        gaps = gaps_table(self.comparisons)
        tables = [table for table in (across, gaps) if table is not None]
        for name, about in self.results.experiments.items():
            if about.paper:
                inside = [f for f in self.comparisons if f.problem.experiment == name]
                tables.append(paper_table(inside, about))
        return tables

    def tables(self, found: Comparison) -> list[Table]:
        """The tables of one problem, the main one first."""
        reported = self.results.experiments[found.problem.experiment].reported
        measures = dict.fromkeys(["validation_loss", found.measure, headline(found.problem.runs)])
        tables = [main_table(found, reported), way_table(found), cost_table(found)]
        tables.append(rates_table(found))
        tables += [values_by_rate_table(found.problem, m) for m in measures if m is not None]
        tables += [detail_table(found, other.label) for other in found.rows]
        return [table for table in tables if table is not None]

    def transfers(self) -> list[Table]:
        """What rates tuned in one problem cost in another: in short, and a table a method."""
        settings = {found.problem.name: found.problem for found in self.comparisons}
        labels = list(dict.fromkeys(r.label for found in self.comparisons for r in found.rows))
        tables = [transfers_table(settings, labels)]
        tables += [transfer_table(settings, label) for label in labels]
        return [table for table in tables if table is not None]

    def figures(self, found: Comparison) -> list[FigurePanels]:
        """The figures of one problem."""
        return [*figures_of(found), *diagnostic_figures(found)]

    def swept(self) -> list[FigurePanels]:
        """The measure against each swept variable."""
        variables = dict.fromkeys(k for f in self.comparisons for k in f.problem.setting)
        wanted = [self.against] if self.against else list(variables)
        return [f for variable in wanted for f in sweep_figures(self.comparisons, variable)]

    def closing(self) -> list[Table]:
        """What went wrong, and under which conditions all was run."""
        bad = unfinished_table(self.results.runs, self.titles)
        conditions = conditions_table(self.results.runs, self.titles)
        return [conditions] if bad is None else [bad, conditions]

    def html(self) -> str:
        """The whole as one page."""
        sections = []
        if swept := self.swept():
            sections.append(Section("What was swept", figures=swept))
        for found in self.comparisons:
            first, *others = self.tables(found)
            figures = self.figures(found)
            # of several problems the many panels are folded away: the page stays a page
            single = len(self.comparisons) == 1
            shown = [f for f in figures if single or f.name in ("differences", "cost")]
            folded = [f for f in figures if f not in shown]
            sections.append(Section(first.title, [first], shown, folded, others))
        if transfers := self.transfers():
            first, *others = transfers
            sections.append(Section(first.title, [first], folded=others))
        return page(
            self.title, self.comparisons, self.overview(), sections, self.closing(), toy=self.toy
        )

    def markdown(self) -> str:
        """The whole as Markdown, without figures."""
        parts = [f"# {self.title}\n", "## Verdicts\n", *lead(self.comparisons), ""]
        parts += [
            f"- **{card.label}**: {card.sentence}" for card in verdict_cards(self.comparisons)
        ]
        parts += [f"\n## {table.title}\n\n{table.markdown()}" for table in self.overview()]
        for found in self.comparisons:
            first, *others = self.tables(found)
            parts.append(f"\n## {first.title}\n\n{first.markdown()}")
            parts += [f"\n### {table.title}\n\n{table.markdown()}" for table in others]
        last = [*self.transfers(), *self.closing()]
        parts += [f"\n## {table.title}\n\n{table.markdown()}" for table in last]
        return "\n".join(parts)

    def save_figures(self, folder: Path, kind: str = "png") -> list[Path]:
        """Write every figure as a file; of several problems each into a folder of its own."""
        written = []
        several = len(self.comparisons) > 1
        for found in self.comparisons:
            name = re.sub(r"[^\w.+=-]+", "_", found.problem.name)
            into = folder / name if several else folder
            into.mkdir(parents=True, exist_ok=True)
            written += [_save(figure, into, kind) for figure in self.figures(found)]
        return written + [_save(figure, folder, kind) for figure in self.swept()]

    def save(self, output: Path) -> None:
        """Write the page or the Markdown, by the file's ending."""
        text = self.markdown() if output.suffix == ".md" else self.html()
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, text)


def _save(figure: FigurePanels, folder: Path, kind: str) -> Path:
    path = folder / (re.sub(r"[^\w.+=-]+", "_", figure.name) + f".{kind}")
    figure.save(path)
    return path


def report_comparison(folder: Path, console: Console) -> None:
    """Print a comparison's tables and write what is to be kept of it into its folder.

    ``results.json`` (with per-item values beside it), ``table.md``, ``report.html`` and, of one
    problem, ``differences.png``. The verdicts and where these lie are printed last.
    """
    results = read_results(folder)
    report = Report(results)
    for name in results.experiments:
        write_results(results, name, folder)
    report.save(folder / TABLE)
    report.save(folder / PAGE)
    lines = []
    for found in report.comparisons:
        for row in found.rows:
            places = [folder / row.runs["folder"].iloc[0] / kind for kind in SAVED if len(row.runs)]
            lines += [f"{p.name.capitalize()} of {row.label}: {p}" for p in places if p.is_dir()]
    for line in dict.fromkeys(lines):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    print_tables(report, console)
    lines = ["", f"Table:   {folder / TABLE}"]
    if len(report.comparisons) == 1 and (drawn := difference_figure(report.comparisons[0])):
        lines.append(f"Picture: {_save(drawn, folder, 'png')}")
    for line in [*lines, f"Report:  {folder / PAGE}"]:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def print_tables(report: Report, console: Console) -> None:
    """Print tables over all problems, each one's of quality and cost, and the verdicts."""
    wide = console if console.is_terminal else Console(width=160, file=console.file)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    tables = report.overview()
    for found in report.comparisons:
        reported = report.results.experiments[found.problem.experiment].reported
        main = main_table(found, reported)
        tables += [main, replace(cost_table(found), title=f"{main.title}: cost")]
    for table in tables:
        say(f"\n{table.title}\n")
        shown = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for number, name in enumerate(table.header):
            shown.add_column(name, justify="right" if number else "left", no_wrap=True)
        for cells in table.rows:
            shown.add_row(*cells)
        wide.print(shown)
        for line in ["", *table.notes]:
            say(line)
    say("")
    for line in lead(report.comparisons):
        say(line)
    for card in verdict_cards(report.comparisons):
        say(f"{card.label}: {card.sentence}")
