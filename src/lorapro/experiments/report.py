"""A comparison's report: table (terminal and Markdown), figures, JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lorapro.experiments.figure import draw_curves, draw_rates
from lorapro.experiments.folders import write_json, write_text
from lorapro.experiments.on_the_way import add_losses_on_the_way, way_cells

__all__ = ["FIGURE", "notes", "print_report", "table_cells", "write"]

FIGURE, RATES, TABLE, RESULTS = "curves.png", "learning_rates.png", "table.md", "results.json"


def _number(summary: dict[str, Any] | None, digits: int) -> str:
    if summary is None:
        return "-"
    mean = f"{summary['mean']:.{digits}f}"
    return mean if summary["sd"] is None else f"{mean} ± {summary['sd']:.{digits}f}"


def _bytes(count: float) -> str:
    return f"{count / 2**20:.1f} MB" if count < 2**30 else f"{count / 2**30:.2f} GB"


def table_cells(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows) of the table as text."""
    metric = summary["metric"]
    has_metric = any(row["metric"] for row in summary["methods"])
    gap = summary["gap"]
    header = ["method", "lr", "test loss"]
    compared = any("over_baseline" in row for row in summary["methods"])
    header += ["minus lora"] if compared else []
    header += [f"test {metric.replace('_', ' ')}"] if has_metric else []
    header += ["gap closed"] if gap else []
    header += ["trainable", "optimizer state", "s/step"]
    rows = []
    for row in summary["methods"]:
        cells = [row["label"], f"{row['learning_rate']:g}", _number(row["test_loss"], 4)]
        if compared:
            over = row.get("over_baseline")
            cells.append("" if over is None else f"{over['size']:+.4f} ± {over['noise']:.4f}")
        cells += [_number(row["metric"], 3)] if has_metric else []
        if gap:
            closed = row.get("gap_closed")
            cells.append("" if closed is None else f"{100 * closed:.0f} %")
            if not gap["exists"] and row["label"] not in ("lora", "full"):
                cells[-1] = "no gap"
        cells += [
            f"{row['trainable_parameters'] / 1e6:.2f} M",
            _bytes(row["optimizer_state_bytes"]),
            f"{row['seconds_per_step']:.2f}",
        ]
        rows.append(cells)
    return header, rows


def notes(summary: dict[str, Any]) -> list[str]:
    """Return the sentences under the table."""
    lines = []
    seeds = len(summary["seeds"])
    lines.append(
        f"Task {summary['task']}, rank {summary['rank']}; "
        + (f"mean ± standard deviation over {seeds} seeds." if seeds > 1 else "one seed.")
    )
    if any("over_baseline" in row for row in summary["methods"]):
        lines.append(
            "minus lora: difference of test losses seed by seed, with its 95 % t-interval; a "
            "method is better or worse than LoRA beyond noise where it does not hold zero."
        )
    if gap := summary["gap"]:
        size = f"Gap from LoRA to full fine-tuning: {gap['size']:.4f} of test loss"
        if gap["noise"] is None:
            lines.append(
                f"{size}. One seed gives no estimate of its noise: run more (--seeds 0 1 2) before "
                "believing a share."
            )
        else:
            verdict = "" if gap["exists"] else ": no gap beyond noise"
            if gap["size"] < -gap["noise"]:
                verdict = ": full fine-tuning is behind LoRA beyond noise"
            of = "over seeds" if seeds > 1 else "from the size of the test set; seeds add to it"
            lines.append(f"{size}, 95 % interval ± {gap['noise']:.4f} ({of}){verdict}.")
    lines += [f"Warning: {line}." for line in summary["warnings"]]
    return lines


def _markdown(summary: dict[str, Any]) -> str:
    text = _markdown_table(*table_cells(summary)) + "\n\n" + "\n".join(notes(summary)) + "\n"
    header, rows = way_cells(summary)
    if rows:
        compared = any("±" in cell for cells in rows for cell in cells)
        what = " (minus LoRA's, 95 % interval)" if compared else ""
        text += f"\nValidation loss on the way, at these rates{what}:\n\n"
        text += _markdown_table(header, rows) + "\n"
    return text


def _markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * 1 + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write(folder: Path, summary: dict[str, Any], where: Path) -> None:
    """Write figures, table and JSON of the comparison in ``folder`` into the folder ``where``."""
    where.mkdir(parents=True, exist_ok=True)
    add_losses_on_the_way(folder, summary["methods"], "lora")
    draw_curves(folder, summary, where / FIGURE)
    if not draw_rates(summary, where / RATES):
        (where / RATES).unlink(missing_ok=True)
    write_text(where / TABLE, _markdown(summary))
    write_json(where / RESULTS, summary)


def print_report(where: Path, folder: Path, summary: dict[str, Any], console: Console) -> None:
    """Print the table, its notes and where everything lies."""
    header, rows = table_cells(summary)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for cells in rows:
        table.add_row(*cells)
    wide = console if console.is_terminal else Console(width=140, file=console.file)
    console.print()
    wide.print(table)
    console.print()
    for line in notes(summary):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    console.print()
    console.print(f"Loss curves: {where / FIGURE}", highlight=False, soft_wrap=True)
    if (where / RATES).is_file():
        console.print(f"Rates tried: {where / RATES}", highlight=False, soft_wrap=True)
    console.print(f"Table:       {where / TABLE}", highlight=False, soft_wrap=True)
    for row in summary["methods"]:
        for kind, name in row["saved"].items():
            path = folder / row["folders"][0] / name
            title = f"{kind.capitalize()} of {row['label']}:"
            console.print(f"{title} {path}", highlight=False, soft_wrap=True, markup=False)
