"""What measuring the alignment adds to a training step of SmolLM2-135M.

    python benchmarks/diagnostics.py                    # r = 8, batch 4 x 128 tokens
    python benchmarks/diagnostics.py --cpu-time --threads 1      # on a machine that does other work

Whole steps, with and without :class:`lorapro.diagnostics.Follower` listening and measuring all
pairs, interleaved. What a run pays that measures every k-th step is the difference over k.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from common import Entry, Report, check, interleave, milliseconds, parser, ratio, summary, table
from training_step import MODEL, load, with_lora

import lorapro
from lorapro.diagnostics import Follower

EVERY = 10


def steps(arguments: Any, rank: int) -> dict[str, list[float]]:
    model = with_lora(load(arguments.model), rank, ["default"])
    model.set_adapter("default")
    model.train()
    optimizer = lorapro.create_lorapro_optimizer(model, lr=1e-4)
    follower = Follower(model, every=1)
    generator = torch.Generator().manual_seed(0)
    size = (arguments.batch, arguments.length)
    ids = torch.randint(0, model.config.vocab_size, size, generator=generator)

    def step(measured: bool) -> None:
        if measured:
            follower.before_forward()
        model(input_ids=ids, labels=ids).loss.backward()
        if measured:
            follower.before_step()
        optimizer.step()
        if measured:
            follower.after_step()
        optimizer.zero_grad()

    entries = [
        Entry("plain", lambda: step(False)),
        Entry("measured", lambda: step(True)),
    ]
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    return interleave(entries, arguments.rounds, warmup=1, clock=clock)


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--model", default=MODEL, help="an asset, a local path, or tiny")
    made.add_argument("--ranks", nargs="+", type=int, default=[8])
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    made.add_argument("--cpu-time", action="store_true", help="seconds of the processor")
    arguments = made.parse_args(argv)
    check(made, arguments)
    about = (
        f"{arguments.model}, batch {arguments.batch} × {arguments.length} tokens, LoRA on all "
        f"linear layers, efficient mode; medians of {arguments.rounds} interleaved rounds, "
        "quartiles in parentheses"
        + ("; seconds of the processor, others used it too." if arguments.cpu_time else ".")
    )
    report = Report("diagnostics", about, arguments)
    rows, cells = [], []
    for rank in arguments.ranks:
        seconds = steps(arguments, rank)
        more = ratio(seconds["measured"], seconds["plain"])
        added = (more["median"] - 1) / EVERY
        rows.append({"rank": rank, "seconds": seconds, "ratio": more, "added": added})
        cells.append(
            [
                rank,
                milliseconds(summary(seconds["plain"])),
                milliseconds(summary(seconds["measured"])),
                f"{added:.1%}",
            ]
        )
    header = ["r", "ms a step", "ms a measured step", f"added at every {EVERY} steps"]
    report.add("A step, and one that is measured", table(header, cells), rows)


if __name__ == "__main__":
    main()
