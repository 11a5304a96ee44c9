"""Time, peak memory and captured energy of LoRA-GA's estimators, beside PEFT's.

    python benchmarks/lora_ga_memory.py --model minilm-l6
    python benchmarks/lora_ga_memory.py --model smollm2-135m-instruct --batches 4 --size 8

Each method runs in a process of its own, once; times to compare are those of ``lora_ga_time.py``.
Peak memory is what PyTorch's CPU allocator hands out above what the loaded model holds: every
allocation and release the profiler reports, summed in order of time. Memory of libraries that do
not allocate through it (LAPACK workspaces) is not in it; the process's own peak (ru_maxrss) stands
beside it as a check, with all the libraries in it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Report, add_output, check, peak_of, table
from lora_ga_common import (
    MODELS,
    captured,
    factors,
    gradients,
    load,
    with_lora,
    with_peft_lora_ga,
)

from lorapro import lora_ga

METHODS = ("lora", "exact", "sketch", "peft")


def prepare(
    method: str, arguments: argparse.Namespace, model: Any, batches: list[dict]
) -> Callable[[], Any]:
    """What is measured, returning the model. Adding plain LoRA is not measured."""
    name, rank = arguments.model, arguments.rank
    if method == "peft":
        return lambda: with_peft_lora_ga(model, name, rank, batches)
    adapted = with_lora(model, name, rank).eval()

    def backward() -> Any:
        for batch in batches:
            adapted(**batch).loss.backward()
        return adapted

    def initialize() -> Any:
        lora_ga.initialize(adapted, batches, estimator=method, progress=False)
        return adapted

    return backward if method == "lora" else initialize


def loaded(arguments: argparse.Namespace) -> tuple[Any, list[dict]]:
    return load(arguments.model, arguments.batches, arguments.size, arguments.length)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time, then (in the same process, with a fresh model) peak memory and captured energy."""
    model, batches = loaded(arguments)
    action = prepare(arguments.only, arguments, model, batches)
    began = time.perf_counter()
    model = action()
    found: dict[str, Any] = {"seconds": time.perf_counter() - began}
    if arguments.only != "lora":
        energies = captured_energies(model, batches)
        found["energy"] = energies
    del action, model
    action = prepare(arguments.only, arguments, *loaded(arguments))
    found["peak"] = peak_of(action)
    found["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def captured_energies(model: Any, batches: list[dict]) -> list[tuple[float, float, float]]:
    """For each layer: energy of its gradient that the factors give back, the most that rank 2r
    can, and ``‖G‖²``.
    """
    held, found = factors(model), []
    for name, G in gradients(model.eval(), batches).items():
        A, B = held[name]
        sigma2 = torch.linalg.svdvals(G.double()).square()
        total = float(sigma2.sum())
        found.append((total * captured(A, B, G), float(sigma2[: 2 * len(A)].sum()), total))
    return found


def options(made: argparse.ArgumentParser) -> None:
    """Options of this script and of the one that times the same."""
    made.add_argument("--model", choices=MODELS, default=MODELS[0])
    made.add_argument("--batches", type=int, default=4)
    made.add_argument("--size", type=int, default=16, help="tweets a batch")
    made.add_argument("--length", type=int, default=64, help="tokens a tweet at most")
    made.add_argument("--rank", type=int, default=8)
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))


def setting(arguments: argparse.Namespace) -> str:
    return f"{arguments.model}, {arguments.batches} × {arguments.size} tweets, r = {arguments.rank}"


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options(made)
    add_output(made)
    made.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)
    arguments = made.parse_args()
    check(made, arguments)
    if arguments.only:
        print(json.dumps(measure(arguments)))
        return
    about = "Time of one run, peak memory above the loaded model, captured energy."
    report = Report(f"lora_ga_memory-{arguments.model}", about, arguments)
    rows = {}
    for method in arguments.methods:
        command = [sys.executable, *sys.argv, "--only", method]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
        )
        rows[method] = json.loads(done.stdout.splitlines()[-1])
        print(f"{method}: done", file=sys.stderr, flush=True)
    named = [{"name": method, **row} for method, row in rows.items()]
    report.add(setting(arguments), as_table(rows), named)


def as_table(rows: dict[str, dict[str, Any]]) -> str:
    cells = []
    for method, row in rows.items():
        over = f"{row['peak'] / rows['lora']['peak'] - 1:+.1%}" if "lora" in rows else ""
        energy = least = ""
        if "energy" in row:
            own, best, total = (sum(column) for column in zip(*row["energy"], strict=True))
            energy = f"{own / total:.2%} of {best / total:.2%}"
            least = f"{min(x / y for x, y, _ in row['energy']):.2%}"
        peak, process = f"{row['peak'] / 2**20:.1f}", f"{row['rss'] / 2**20:.0f}"
        cells.append([method, f"{row['seconds']:.1f}", peak, over, process, energy, least])
    header = ["method", "seconds, one run", "peak MiB", "over plain LoRA", "process MiB"]
    return table([*header, "energy, of the most", "worst layer"], cells)


if __name__ == "__main__":
    main()
