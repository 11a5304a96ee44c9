"""Time of LoRA-GA's initialisation, exact and sketch, beside PEFT's and a plain LoRA backward.

    python benchmarks/lora_ga_time.py --model minilm-l6
    python benchmarks/lora_ga_time.py --model smollm2-135m-instruct --batches 1 --size 8 \\
        --methods lora sketch peft

Every run of every method starts from a fresh copy of the loaded model; copying it and adding plain
LoRA is not timed. ``lora`` is forward and backward over the same batches. Peak memory and how good
the start is: ``lora_ga_memory.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from common import Entry, Report, check, interleave, parser, ratio, summary, table
from common import times as as_ratio
from lora_ga_memory import loaded, options, prepare, setting

REFERENCE = "lora"


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.set_defaults(rounds=7)
    made.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    options(made)
    arguments = made.parse_args(argv)
    check(made, arguments)
    model, batches = loaded(arguments)

    def entry(method: str) -> Entry:
        ready: list[Callable[[], Any]] = []

        def before() -> None:
            ready[:] = [prepare(method, arguments, copy.deepcopy(model), batches)]

        return Entry(method, lambda: ready.pop()(), before)

    about = f"Medians of {arguments.rounds} interleaved rounds, quartiles in parentheses."
    report = Report(f"lora_ga_time-{arguments.model}", about, arguments)
    entries = [entry(method) for method in arguments.methods]
    seconds = interleave(entries, arguments.rounds, arguments.warmup)
    rows, cells = [], []
    for method, found in seconds.items():
        row: dict[str, Any] = {"name": method, "seconds": found, **summary(found)}
        cells.append([method, *[f"{row[k]:.2f}" for k in ("median", "lower", "upper")]])
        if REFERENCE in seconds:
            row["ratio"] = ratio(found, seconds[REFERENCE])
            cells[-1].append(as_ratio(row["ratio"]))
        rows.append(row)
    header = ["method", "seconds", "lower quartile", "upper quartile"]
    header += ["× plain LoRA backward"] if REFERENCE in seconds else []
    report.add(setting(arguments), table(header, cells), rows)


if __name__ == "__main__":
    main()
