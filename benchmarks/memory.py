"""Bytes of optimizer state, and peak memory of a step above what lies there before it.

    python benchmarks/memory.py                                       # all shapes, r = 8 and 128
    python benchmarks/memory.py --shapes llama --ranks 8 --only adamw-fused full

Each figure comes from a process of its own, from the third step: state exists by then. The peak is
exact for what PyTorch's CPU allocator hands out: every allocation and release that its profiler
reports, summed in order of time; nothing is sampled. LAPACK's own workspaces are not in it. As a
check that has everything in it, the last column is how far the process's resident memory rose
during another step, VmHWM over VmRSS (Linux alone); freed memory that is used again does not raise
it, so it may be the smaller one.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import contestants
import torch
from common import Report, add_output, check, device, peak_of, table
from contestants import LEGEND, MODELS, TITLES

from lorapro.experiments.memory import peak_memory, reset_peak_memory, tensor_bytes

REFERENCE = "adamw-fused"
STATUS = Path("/proc/self/status")


def state_bytes(optimizer: Any) -> int:
    """All tensors of a torch optimizer's state; lora-pro-adamw keeps its own in attributes."""
    held = [v for k, v in vars(optimizer).items() if k.startswith("_state_")]
    return tensor_bytes([*getattr(optimizer, "state", {}).values(), *held])


def resident() -> int:
    return int(re.search(r"VmRSS:\s*(\d+) kB", STATUS.read_text()).group(1)) * 1024


def measure(name: str, model: str, rank: int, x: str) -> dict[str, Any]:
    """What one optimizer holds and takes; run in a fresh process."""
    adapters, optimizer = contestants.build(name, MODELS[model].shapes(), rank, x)
    optimizer.step()
    adapters.restore()
    rise = None
    if device().type == "cuda":
        before = torch.cuda.memory_allocated(device())
        torch.cuda.reset_peak_memory_stats(device())
        optimizer.step()
        rise = torch.cuda.max_memory_allocated(device()) - before
        adapters.restore()
    elif STATUS.exists():
        before = resident()
        reset_peak_memory()
        optimizer.step()
        rise = max(0, (peak_memory() or before) - before)
        adapters.restore()
    return {
        "name": name,
        "state": state_bytes(optimizer),
        "factors": tensor_bytes(list(adapters.parameters())),
        "peak": peak_of(optimizer.step),
        "resident": rise,
    }


def as_table(rows: list[dict[str, Any]]) -> str:
    reference = next((r for r in rows if r["name"] == REFERENCE and "state" in r), None)
    cells = []
    for row in rows:
        if "refused" in row:
            cells.append([row["name"], row["refused"], "", "", "", ""])
            continue
        over = f"{row['state'] / reference['state']:.2f}" if reference else ""
        rise = "" if row["resident"] is None else f"{row['resident'] / 2**20:.1f}"
        cells.append(
            [
                row["name"],
                f"{row['state'] / 2**20:.2f}",
                over,
                f"{row['peak'] / 2**20:.2f}",
                f"{row['peak'] / row['factors']:.2f}",
                rise,
            ]
        )
    header = ["optimizer", "state MiB", f"× {REFERENCE}", "peak MiB", "peak, × factors", "rise MiB"]
    return table(header, cells)


def main(argv: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    made.add_argument("--shapes", nargs="+", choices=MODELS, default=["smollm2", "llama"])
    made.add_argument("--ranks", nargs="+", type=int, default=[8, 128])
    contestants.add_choice(made)
    contestants.add_limit(made)
    add_output(made)
    made.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = made.parse_args(argv)
    check(made, arguments)
    contestants.check_ranks(made, arguments)
    if arguments.alone:
        (name,), (model,), (rank,) = arguments.only, arguments.shapes, arguments.ranks
        print(json.dumps(measure(name, model, rank, arguments.x)))
        return
    about = f"State and peak temporary memory of a step. X: {arguments.x}.\n\n{LEGEND}"
    report = Report("memory", about, arguments)
    for model in arguments.shapes:
        for rank in arguments.ranks:
            rows = [row(name, model, rank, arguments) for name in arguments.only]
            title = f"{TITLES[model]}, r = {rank}"
            report.add(title, as_table(rows), rows, shapes=model, rank=rank)


def row(name: str, model: str, rank: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own finds for one optimizer."""
    shapes, limit = MODELS[model].shapes(), arguments.skip_slower_than
    why = contestants.refusal(name, shapes, rank, arguments.x, limit)
    if why:
        return {"name": name, "refused": why}
    command = [sys.executable, __file__, "--alone", "--only", name, "--shapes", model]
    command += ["--ranks", str(rank), "--x", arguments.x]
    command += ["--device", arguments.device, "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"memory of {name}, {model}, r = {rank}, failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
