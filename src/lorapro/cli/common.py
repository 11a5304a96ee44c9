"""Shared by the commands: argument parsers that raise, quiet libraries, help on config keys."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from lorapro.experiments.errors import UserError, nearest_hint

__all__ = ["Parser", "check_task", "config_help", "quiet_libraries", "report_line"]


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are :class:`UserError`; an unknown flag gets a hint."""

    def __init__(self, command: str, **kwargs: object) -> None:
        super().__init__(
            prog=f"lorapro {command}",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,  # type: ignore[arg-type]
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise UserError(message)

    def parse_strictly(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse; name the nearest flag for an unknown one."""
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            what = "flag" if unknown[0].startswith("-") else "argument"
            hint = nearest_hint(unknown[0].partition("=")[0], flags)
            raise UserError(f"{self.prog}: unknown {what} {unknown[0]!r}{hint}")
        return known


def check_task(given: Mapping[str, Any], command: str) -> None:
    """Refuse to train on what nobody asked for.

    Raises:
        UserError: what to type.
    """
    if "task" not in given:
        raise UserError(
            f"no task is given; for conversations: lorapro {command} --task sft --data chat.jsonl, "
            "for labels: --task classification --data rows.csv; 'lorapro train --help' lists all"
        )


def config_help() -> str:
    """Return one line for each of our config keys, by who reads it."""
    import dataclasses

    from lorapro.experiments import methods, tasks
    from lorapro.experiments.options import RunOptions

    sections: dict[str, list[type]] = {"of every run": [RunOptions]}
    for name, family in tasks.FAMILIES.items():
        names = [entry.name for entry in tasks.TASKS.values() if entry.family == name]
        if not names:
            continue  # only the base of others
        sections[f"of tasks {', '.join(names)}"] = [family.options]
    sections["of methods"] = methods.option_classes()
    lines, seen = ["config keys, in YAML or as flags:"], set()
    for title, classes in sections.items():
        lines += ["", f"{title}:"]
        for item in (item for cls in classes for item in dataclasses.fields(cls)):
            if title == "of methods" and item.name in seen:
                continue
            seen.add(item.name)
            default: Any = item.default
            if item.default_factory is not dataclasses.MISSING:
                default = " ".join(item.default_factory())
            shown = "" if default is None else f" [{default}]"
            lines.append(f"  --{item.name:<24} {item.metadata['help']}{shown}")
    lines += ["", "methods (parts of several are joined with '+', such as dora+lora-pro):"]
    lines += [f"  {method.name:<26} {method.about}" for method in methods.METHODS.values()]
    lines += ["", "tasks:"]
    lines += [f"  {task.name:<26} {task.about}" for task in tasks.TASKS.values()]
    lines += ["", "and every field of transformers.TrainingArguments (learning_rate, max_steps,"]
    lines += ["num_train_epochs, per_device_train_batch_size, seed, output_dir, ...)"]
    return "\n".join(lines)


def quiet_libraries() -> None:
    """Silence what libraries say about their own insides; our own output stays readable."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns while being imported
    # It says on standard output, amid results, which device it found.
    logging.getLogger("DeepSpeed").addFilter(_is_error)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=transformers.__name__)
    warnings.filterwarnings("ignore", category=FutureWarning, module="peft")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def report_line(text: str) -> None:
    """Print one line of progress to standard error."""
    print(text, file=sys.stderr, flush=True)
