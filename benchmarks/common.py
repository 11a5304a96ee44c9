"""What the speed benchmarks share: interleaved timing, options, and tables that are kept.

Every time is the median of rounds. In one round each entry runs once, in an order drawn anew, so
that a machine which slows down for a while slows all of them. A ratio is a quotient of two medians
of the same rounds; beside it stand the quartiles of the quotients round by round.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FEWEST_ROUNDS = 7
WARMUP = 3
RESULTS = Path(__file__).parent / "results"


@dataclass
class Entry:
    """One thing to time. ``before`` runs ahead of every repetition and is not timed."""

    name: Any
    run: Callable[[], Any]
    before: Callable[[], Any] | None = None


def interleave(
    entries: Sequence[Entry],
    rounds: int,
    warmup: int = WARMUP,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, list]:
    """Seconds of every entry in every round, by name, after ``warmup`` rounds that do not count."""
    seconds: dict[Any, list[float]] = {entry.name: [] for entry in entries}
    order = random.Random(0)
    gc.collect()
    gc.freeze()  # what is there by now stays: collecting between rounds need not look through it
    try:
        for number in range(warmup + rounds):
            gc.collect()
            gc.disable()  # no entry pays for another's garbage
            for entry in order.sample(entries, len(entries)):
                took = seconds_of(entry, clock)
                if number >= warmup:
                    seconds[entry.name].append(took)
            gc.enable()
            progress(f"round {number - warmup + 1} of {rounds}" if number >= warmup else "warm-up")
    finally:
        gc.enable()
        gc.unfreeze()
    return seconds


_device = torch.device("cpu")


def set_device(name: str) -> None:
    """Choose where everything that is timed lies."""
    global _device
    _device = torch.device(name)


def device() -> torch.device:
    """Where everything that is timed lies."""
    return _device


def wait() -> None:
    """Wait for the device to finish what it was given."""
    if _device.type == "cuda":
        torch.cuda.synchronize(_device)


def seconds_of(entry: Entry, clock: Callable[[], float] = time.perf_counter) -> float:
    """Run one entry once."""
    if entry.before is not None:
        entry.before()
    wait()
    began = clock()
    entry.run()
    wait()
    return clock() - began


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(seconds) == 1:
        return dict.fromkeys(("median", "lower", "upper"), seconds[0])
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median": median, "lower": lower, "upper": upper}


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Quotient of the medians, with the quartiles of the quotients of each round."""
    each = summary([a / b for a, b in zip(seconds, reference, strict=True)])
    return {**each, "median": statistics.median(seconds) / statistics.median(reference)}


def milliseconds(found: dict[str, float]) -> str:
    return f"{1e3 * found['median']:.2f} ({1e3 * found['lower']:.2f} – {1e3 * found['upper']:.2f})"


def times(found: dict[str, float], digits: int | None = None) -> str:
    if found["lower"] == found["upper"] == 1:
        return "1"  # the reference itself
    digits = digits or (3 if found["median"] < 2 else 2)
    middle, lower, upper = (f"{found[k]:.{digits}f}" for k in ("median", "lower", "upper"))
    return f"{middle} ({lower} – {upper})"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every timing script has."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0])
    made.add_argument("--rounds", type=int, default=9, help=f"{FEWEST_ROUNDS} or more")
    made.add_argument(
        "--few-rounds", action="store_true", help="allow fewer rounds, to try a script out"
    )
    add_output(made)
    return made


def add_output(made: argparse.ArgumentParser) -> None:
    made.add_argument("--device", default="cpu", help="where factors and models are: cpu, cuda, …")
    made.add_argument("--threads", type=int, help="threads of PyTorch; its own choice if not given")
    made.add_argument("--output", type=Path, default=RESULTS, help="folder of the tables")


def check(made: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse a median of too few rounds, and set the number of threads."""
    rounds = getattr(arguments, "rounds", FEWEST_ROUNDS)
    least = 1 if getattr(arguments, "few_rounds", False) else FEWEST_ROUNDS
    if rounds < least:
        made.error(
            f"--rounds is {rounds}, a median here takes {least} or more; add --few-rounds to try "
            "the script out."
        )
    try:
        torch.empty(1, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        made.error(f"--device {arguments.device}: {str(error).splitlines()[0]}")
    set_device(arguments.device)
    if arguments.threads is not None:
        if arguments.threads < 1:
            made.error(f"--threads is {arguments.threads}, expected 1 or more.")
        torch.set_num_threads(arguments.threads)


def machine() -> dict[str, Any]:
    """What a time depends on besides the program."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return {
        "device": torch.cuda.get_device_name(_device) if _device.type == "cuda" else str(_device),
        "cpu": found.group(1) if found else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.system(),
    }


def machine_line(found: dict[str, Any]) -> str:
    return (
        f"{found['cpu']}, {found['threads']} of {found['cores']} threads, "
        f"PyTorch {found['torch']}, Python {found['python']}, {found['platform']}"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table; numbers stand right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


@dataclass
class Report:
    """The tables of one script, printed as they come, with the numbers beside them in JSON.

    Files are written after every table, so that a long run that is stopped keeps what it has.
    """

    name: str
    about: str
    arguments: argparse.Namespace

    def __post_init__(self) -> None:
        options = {k: v for k, v in vars(self.arguments).items() if k != "output"}
        self.data: dict[str, Any] = {
            "benchmark": self.name,
            "machine": machine(),
            "options": options,
            "tables": [],
        }
        trial = getattr(self.arguments, "few_rounds", False)
        notice = "\n\nA trial run: its times mean nothing." if trial else ""
        self.parts = [f"# {self.name}\n\n{self.about}\n\n{machine_line(machine())}{notice}"]
        print(self.parts[0], flush=True)

    def add(self, title: str, text: str, rows: list[dict[str, Any]], **more: Any) -> None:
        """Print and save one table with its rows as data."""
        self.parts.append(f"## {title}\n\n{text}")
        print(f"\n{self.parts[-1]}", flush=True)
        self.data["tables"].append({"title": title, "rows": rows, **more})
        folder: Path = self.arguments.output
        folder.mkdir(parents=True, exist_ok=True)
        written = json.dumps(self.data, indent=1, default=str)
        (folder / f"{self.name}.json").write_text(written + "\n")
        (folder / f"{self.name}.md").write_text("\n\n".join(self.parts) + "\n")


def progress(text: str) -> None:
    """One line on a terminal's standard error, overwritten by the next."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def peak_of(action: Callable[[], Any]) -> int:
    """Most bytes that were allocated at once while ``action`` ran, above those before it.

    Every allocation and release that PyTorch's CPU allocator reports, summed in order of time.
    Memory that libraries take for themselves (LAPACK's workspaces) is not in it.
    """
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
