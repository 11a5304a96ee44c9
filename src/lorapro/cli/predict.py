"""``lorapro predict TARGET (--data FILE | --text TEXT)``: new rows, answered by saved weights."""

from __future__ import annotations

from collections.abc import Sequence

from lorapro.cli.answers import at_least, writable, write_rows
from lorapro.cli.common import Parser, quiet_libraries, report_line
from lorapro.experiments.errors import UserError

__all__ = ["run"]

DESCRIPTION = """\
Answer new rows: the label by its name and probability, the target text, the model's answer. TARGET
is a run, what it saved (its 'adapter', say, moved anywhere), a checkpoint of it or an export; the
data it was trained on is not needed.

One JSON object a row, the row's columns and 'prediction'; or a table with --output FILE.csv."""


def run(arguments: Sequence[str]) -> None:
    """Predict and print or write."""
    parser = Parser(
        "predict",
        usage="lorapro predict TARGET (--data FILE | --text TEXT ...) [--output FILE]",
        description=DESCRIPTION,
    )
    parser.add_argument("target", metavar="TARGET", help="run, adapter, model, checkpoint")
    parser.add_argument(
        "--data",
        help="CSV, TSV, JSON, JSONL or Parquet file, or a hub id; or a text file, a line a text",
    )
    parser.add_argument("--text", nargs="+", help="texts (of images: files)")
    parser.add_argument("--output", help="file to write, .jsonl or .csv; default: print JSON lines")
    parser.add_argument("--limit", type=int, default=0, help="rows at most")
    parser.add_argument("--batch_size", type=int, default=16, help="rows at a time [16]")
    parser.add_argument("--model", help="base model, instead of the one that the adapter names")
    known = parser.parse_strictly(arguments)
    at_least(0, limit=known.limit)
    at_least(1, batch_size=known.batch_size)
    writable(known.output)
    if known.data is not None and known.text:
        raise UserError("give --data or --text, not both")
    if known.data is None and not known.text:
        raise UserError("nothing to predict: give --data FILE or --text TEXT")

    quiet_libraries()  # before anything imports them
    from lorapro.experiments.restore import predict_target

    rows = predict_target(
        known.target,
        data=known.data,
        texts=known.text or (),
        batch_size=known.batch_size,
        limit=known.limit,
        model=known.model,
        log=report_line,
    )
    write_rows(rows, known.output)
