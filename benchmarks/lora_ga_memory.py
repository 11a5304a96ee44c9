"""Time, peak memory and captured energy of LoRA-GA's estimators, beside PEFT's.

    python benchmarks/lora_ga_memory.py --model minilm-l6
    python benchmarks/lora_ga_memory.py --model smollm2-135m-instruct --batches 4 --size 8

Each method runs in a process of its own. Peak memory is what PyTorch's CPU allocator hands out
above what the loaded model holds: every allocation and release the profiler reports, summed in
order of time. Memory of libraries that do not allocate through it (LAPACK workspaces) is not in it;
the process's own peak (ru_maxrss) is printed beside it as a check, with all the libraries in it.
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


def peak_of(action: Callable[[], Any]) -> int:
    """Most bytes that were allocated at once while ``action`` ran, above those before it."""
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        action()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.kineto_results.events()
        if event.name() == "[memory]"
    ]
    level = peak = 0
    for _, change in sorted(changes, key=lambda x: x[0]):
        level += change
        peak = max(peak, level)
    return peak


def prepare(method: str, arguments: argparse.Namespace) -> tuple[Callable[[], Any], list[dict]]:
    """What is measured, returning the model. Loading it and adding plain LoRA are not measured."""
    name, rank = arguments.model, arguments.rank
    model, batches = load(name, arguments.batches, arguments.size, arguments.length)
    if method == "peft":
        return lambda: with_peft_lora_ga(model, name, rank, batches), batches
    model = with_lora(model, name, rank).eval()

    def backward() -> Any:
        for batch in batches:
            model(**batch).loss.backward()
        return model

    def initialize() -> Any:
        print(lora_ga.initialize(model, batches, estimator=method), file=sys.stderr)
        return model

    return (backward if method == "lora" else initialize), batches


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time, then (in the same process, with a fresh model) peak memory and captured energy."""
    action, batches = prepare(arguments.only, arguments)
    began = time.perf_counter()
    model = action()
    found: dict[str, Any] = {"seconds": time.perf_counter() - began}
    if arguments.only != "lora":
        energies = captured_energies(model, batches)
        found["energy"] = energies
    del action, model
    action, _ = prepare(arguments.only, arguments)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--size", type=int, default=16, help="tweets a batch")
    parser.add_argument("--length", type=int, default=64, help="tokens a tweet at most")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments)))
        return
    rows = {}
    for method in arguments.methods:
        command = [sys.executable, *sys.argv, "--only", method]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
        )
        rows[method] = json.loads(done.stdout.splitlines()[-1])
        print(f"{method}: done", file=sys.stderr, flush=True)
    print_table(arguments, rows)


def print_table(arguments: argparse.Namespace, rows: dict[str, dict[str, Any]]) -> None:
    print(
        f"{arguments.model}, {arguments.batches} batches of {arguments.size} tweets, "
        f"r = {arguments.rank}, {torch.get_num_threads()} threads\n"
    )
    print(
        "| method | seconds | peak MiB | over plain LoRA | process MiB | energy, of the most | "
        "worst layer |"
    )
    print("|---|---|---|---|---|---|---|")
    for method, row in rows.items():
        over = row["peak"] / rows["lora"]["peak"] - 1
        energy = least = ""
        if "energy" in row:
            own, best, total = (sum(column) for column in zip(*row["energy"], strict=True))
            energy = f"{own / total:.2%} of {best / total:.2%}"
            least = f"{min(x / y for x, y, _ in row['energy']):.2%}"
        print(
            f"| {method} | {row['seconds']:.1f} | {row['peak'] / 2**20:.1f} | {over:+.1%} | "
            f"{row['rss'] / 2**20:.0f} | {energy} | {least} |"
        )


if __name__ == "__main__":
    main()
