"""Tables of one problem: quality, differences in full, losses on the way, cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lorapro.experiments.report.comparison import Comparison, Row, Versus
from lorapro.experiments.report.problems import headline
from lorapro.experiments.report.text import (
    bytes_text,
    measure_name,
    number,
    p_text,
    signed,
    with_interval,
)
from lorapro.experiments.report.verdicts import gap_sentence, how_to_read, warnings
from lorapro.experiments.results import Numbers
from lorapro.experiments.statistics import Interval, paired_t, summarize

__all__ = ["Table", "cost_table", "detail_table", "main_table", "median", "way_table"]

MOST_COLUMNS = 4


@dataclass
class Table:
    """A table; ``marks`` hold a word for each row that a page may colour it by.

    ``text``: its cells are words rather than numbers.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)
    text: bool = False

    def markdown(self) -> str:
        """The table as Markdown, its notes below."""
        rows = [[" ".join(c.split()).replace("|", "\\|") for c in cells] for cells in self.rows]
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *rows]
        text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
        return text + ("\n" + "\n".join(self.notes) + "\n" if self.notes else "")

    def without_empty_columns(self) -> Table:
        """The table without columns in which no row has anything."""
        kept = [
            i
            for i in range(len(self.header))
            if i == 0 or any(r[i] not in ("", "-") for r in self.rows)
        ]
        self.header = [self.header[i] for i in kept]
        self.rows = [[row[i] for i in kept] for row in self.rows]
        return self


# One problem


def main_table(found: Comparison, reported: Numbers | None = None) -> Table:
    """Quality at the chosen rates: the measure, differences, share of the gap, the metric."""
    metric = headline(found.problem.runs)
    names = dict.fromkeys(n for row in (reported or {}).values() for n in row)
    if metric is None:
        metric = next(iter(names), None)
    compared = any(found.baseline in row.versus for row in found.rows)
    header = ["method", "lr", measure_name(found.measure)]
    header += (
        [f"minus {found.baseline}", "p (Holm)", f"against {found.baseline}"] if compared else []
    )
    header += [measure_name(metric)] if metric and metric != found.measure else []
    header += ["gap closed"] if found.gap else []
    rows, marks = [], []
    for row in found.rows:
        summary = row.summary
        value = "-" if summary is None else number(found.measure, summary.mean, summary.sd)
        cells = [row.label, f"{row.rate:g}", value]
        versus = row.versus.get(found.baseline)
        if compared:
            cells += [_difference(found.measure, versus), *_said(versus)]
        if metric and metric != found.measure:
            cells.append(_metric(row, metric, reported))
        if found.gap:
            cells.append(_share(found, row))
        rows.append(cells)
        marks.append("" if versus is None else versus.verdict)
    notes = how_to_read(found)
    if sentence := gap_sentence(found):
        notes.append(sentence)
    notes += [f"Warning: {line}." for line in warnings(found)]
    return Table(found.problem.name, header, rows, notes, marks).without_empty_columns()


def _difference(measure: str, versus: Versus | None) -> str:
    if versus is None:
        return ""
    if versus.interval is None:
        return signed(measure, versus.size)
    return with_interval(measure, versus.interval)


def _said(versus: Versus | None) -> list[str]:
    return ["", ""] if versus is None else [p_text(versus.holm), versus.verdict]


def _metric(row: Row, metric: str, reported: Numbers | None) -> str:
    if metric in row.runs and row.runs[metric].notna().any():
        summary = summarize(row.runs[metric].dropna().to_numpy(dtype=float))
        return number(metric, summary.mean, summary.sd)
    return number(metric, *(reported or {}).get(row.label, {}).get(metric, (None, None)))


def _share(found: Comparison, row: Row) -> str:
    if row.label in (found.baseline, found.goal):
        return ""
    if row.share is None:
        return "no gap" if found.gap and found.gap.interval else "-"
    return f"{100 * row.share.size:.0f} % ({100 * row.share.low:.0f} to {100 * row.share.high:.0f})"


def detail_table(found: Comparison, other: str) -> Table | None:
    """Differences from another row in full: both intervals and every p."""
    rows, marks = [], []
    for row in found.rows:
        versus = row.versus.get(other)
        if versus is None:
            continue
        alone = None if versus.interval is None else versus.interval.p
        p_values = (alone, versus.holm, versus.flip, versus.mcnemar)
        cells = [row.label, str(versus.seeds), signed(found.measure, versus.size)]
        cells += [_ends(found.measure, i) for i in (versus.interval, versus.boot)]
        rows.append([*cells, *map(p_text, p_values), versus.verdict])
        marks.append(versus.verdict)
    if not rows:
        return None
    header = ["method", "seeds", f"minus {other}", "95 % over seeds (t)"]
    header += ["95 % over seeds and items", "p alone", "p Holm", "p sign flips", "p McNemar"]
    title = f"{measure_name(found.measure)} minus {other}'s, in full".capitalize()
    return Table(title, [*header, "verdict"], rows, [], marks).without_empty_columns()


def _ends(measure: str, interval: Interval | None) -> str:
    if interval is None:
        return "-"
    return f"{signed(measure, interval.low)} to {signed(measure, interval.high)}"


def way_table(found: Comparison) -> Table | None:
    """Validation losses on the way, at the chosen rates: mean, and difference from the baseline."""
    ways = {row.label: losses_on_the_way(row) for row in found.rows}
    known = sorted(set().union(*ways.values())) if ways else []
    if len(known) < 2:
        return None
    steps = shown_steps([int(step) for step in known])
    rows = []
    for label, way in ways.items():
        cells = [label]
        for step in steps:
            by_seed = way.get(step, {})
            if not by_seed:
                cells.append("-")
                continue
            text = f"{sum(by_seed.values()) / len(by_seed):.4f}"
            base = ways.get(found.baseline, {}).get(step, {})
            shared = sorted(set(base) & set(by_seed))
            if label != found.baseline and len(shared) > 1:
                over = paired_t([by_seed[s] - base[s] for s in shared])
                text += "" if over is None else f" ({with_interval('loss', over)})"
            cells.append(text)
        rows.append(cells)
    compared = any("±" in cell for cells in rows for cell in cells)
    what = f" (minus {found.baseline}'s, 95 % interval)" if compared else ""
    return Table(
        f"Validation loss on the way, at these rates{what}",
        ["method", *(f"step {s}" for s in steps)],
        rows,
    )


def losses_on_the_way(row: Row) -> dict[float, dict[int, float]]:
    """Validation loss by step and seed, at the steps that all of the row's runs have."""
    curves = {
        int(seed): dict(zip(*curves["validation_loss"], strict=True))
        for seed, curves in zip(row.runs["seed"], row.runs["curves"], strict=True)
        if "validation_loss" in curves
    }
    if not curves or len(curves) < len(row.runs):
        return {}
    steps = set.intersection(*(set(curve) for curve in curves.values()))
    return {step: {seed: curve[step] for seed, curve in curves.items()} for step in sorted(steps)}


def shown_steps(steps: Sequence[int], most: int = MOST_COLUMNS) -> list[int]:
    """At most ``most`` steps, evenly spread, the last one always.

    >>> shown_steps([10, 20, 30, 40, 50, 60, 70, 80])
    [20, 40, 60, 80]
    >>> shown_steps([30, 60])
    [30, 60]
    """
    number_of = min(most, len(steps))
    return [steps[round((k + 1) * len(steps) / number_of) - 1] for k in range(number_of)]


def cost_table(found: Comparison) -> Table:
    """Trainable parameters, optimizer state, peak memory and time of the chosen runs."""
    base = found.row(found.baseline)
    header = [
        "method",
        "trainable",
        "optimizer state",
        "peak memory",
        "s/step",
        f"over {found.baseline}",
    ]
    rows = []
    for row in found.rows:
        step, total = median(row, "seconds_per_step"), median(row, "seconds")
        base_step = None if base is None else median(base, "seconds_per_step")
        trainable = median(row, "trainable_parameters")
        rows.append(
            [
                row.label,
                "-" if trainable is None else f"{trainable / 1e6:.2f} M",
                bytes_text(median(row, "optimizer_state_bytes")),
                bytes_text(median(row, "peak_memory_bytes")),
                "-" if step is None else f"{step:.3g}",
                "-" if step is None or not base_step else f"{step / base_step:.2f}",
                "-" if total is None else f"{total / 3600:.2f}",
            ]
        )
    notes = ["Medians over seeds; s/step is without evaluation and saving."]
    return Table("Cost", [*header, "hours in all"], rows, notes).without_empty_columns()


def median(row: Row, column: str) -> float | None:
    """Median of a column over a row's runs; ``None`` where nothing is known."""
    if column not in row.runs or not row.runs[column].notna().any():
        return None
    return float(row.runs[column].median())
