"""``lorapro train CONFIG.yaml [--flag value]``: one run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lorapro.cli.common import Parser, check_task, config_help, quiet_libraries, report_line

__all__ = ["run"]


def run(arguments: Sequence[str]) -> None:
    """Train one configuration and print its result."""
    parser = Parser(
        "train",
        usage="lorapro train [CONFIG.yaml] [--flag value ...]",
        description="Train one model. A finished run is not repeated, an interrupted one goes on.",
    )
    if any(flag in ("-h", "--help") for flag in arguments):
        parser.epilog = config_help()
        parser.print_help()
        return
    flags = list(arguments)
    path = flags.pop(0) if flags and not flags[0].startswith("-") else None

    quiet_libraries()  # before anything imports them
    from lorapro.experiments.config import load_config
    from lorapro.experiments.folders import SAMPLES
    from lorapro.experiments.runner import run as run_config

    config = load_config(path, flags)
    check_task(config.given, "train")
    result = run_config(config, log=report_line)
    if result["status"] != "finished":
        print(f"{result['status']} after {result['steps']} steps")
    for split, values in result["metrics"].items():
        shown = ", ".join(f"{k} {v:.4g}" for k, v in values.items() if v is not None)
        if shown:
            print(f"{split}: {shown}")
    _print_sample(config.folder / SAMPLES)
    for kind, name in result["saved"].items():
        print(f"{kind}: {config.folder / name}")
    if "merged" in result["saved"]:
        print("the base weights changed too: the merged model is the trained one")
    print(f"result: {config.folder / 'result.json'}")


def _print_sample(path: Path, width: int = 200) -> None:
    """The first of the answers that a language model gave to test prompts."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    first = json.loads(lines[0])
    asked = first["messages"][-1]["content"] if "messages" in first else first["prompt"]
    for name, text in (("prompt", asked), ("answer", first["answer"])):
        line = " ".join(str(text).split())
        print(f"{name}: {line if len(line) <= width else line[:width] + '...'}")
    print(f"samples ({len(lines)}): {path}")
