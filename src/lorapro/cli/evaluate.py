"""``lorapro evaluate RUN``: loss and metric of a trained run, or of a model as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lorapro.cli.common import Parser, config_help, quiet_libraries, report_line

__all__ = ["run"]

DESCRIPTION = """\
Evaluate on the test set. TARGET is the folder of a run ('lorapro train'), or a config YAML: then
the model is evaluated as it is, with --adapter FOLDER if given. With --data FILE a run, or what it
saved, is evaluated on the rows of that file, wherever the training data may be. GSM8K is scored by
exact match of greedily generated answers, saved one JSON object a line."""


def run(arguments: Sequence[str]) -> None:
    """Evaluate and print JSON."""
    parser = Parser(
        "evaluate",
        usage="lorapro evaluate TARGET [--data FILE] [--limit N] [--adapter FOLDER] "
        "[--predictions FILE] "
        "[--flag value ...]",
        description=DESCRIPTION,
    )
    parser.add_argument("target", metavar="TARGET", help="a run's folder or a config YAML")
    parser.add_argument("--limit", type=int, help="test examples at most; default: all")
    parser.add_argument("--data", help="evaluate on the rows of this file, all of them")
    parser.add_argument("--adapter", help="folder of a PEFT adapter, for a config YAML")
    parser.add_argument(
        "--predictions", help="JSONL file for generated answers [RUN/predictions-test.jsonl]"
    )
    if any(flag in ("-h", "--help") for flag in arguments):
        parser.epilog = config_help()
        parser.print_help()
        return
    known, flags = parser.parse_known_args(arguments)

    quiet_libraries()  # before anything imports them
    from lorapro.experiments.restore import evaluate_target

    metrics = evaluate_target(
        known.target,
        flags,
        adapter=known.adapter,
        data=known.data,
        limit=known.limit,
        predictions=known.predictions,
        log=report_line,
    )
    print(json.dumps(metrics, indent=2))
