"""lm-eval's own tasks on a model at hand, beside the papers' way of asking."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorapro.experiments.errors import UserError, nearest_hint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["check_tasks", "evaluate"]


def check_tasks(tasks: Sequence[str], folder: str | None = None) -> None:
    """Find out whether lm-eval has these tasks.

    Raises:
        UserError: lm-eval is not installed, an unknown task, or HumanEval, whose programs lm-eval
            would run without a sandbox.
    """
    for name in tasks:
        if name.startswith(("humaneval", "mbpp")):
            raise UserError(
                f"lm-eval's {name} would run model-written code without a sandbox; for HumanEval "
                "as lm-eval asks it, give --humaneval_continued true"
            )
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "harness_tasks need the package lm-eval, which is not installed; run: pip install "
            "'lorapro[eval]'"
        )
    known = _manager(tuple(tasks), folder).all_tasks
    for name in tasks:
        if name not in known:
            hint = nearest_hint(name, known)
            raise UserError(f"lm-eval has no task {name!r}{hint}; see: lm-eval ls tasks")


@functools.lru_cache
def _manager(tasks: tuple[str, ...], folder: str | None) -> Any:
    """Return a manager that knows these tasks if lm-eval does.

    Its index of every task takes long: folders of the tasks' own names are tried first.
    """
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = [str(root / name) for name in tasks if (root / name).is_dir()]
    folders += [folder] if folder else []
    few = lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
    if set(tasks) <= set(few.all_tasks):
        return few
    return lm_eval.tasks.TaskManager(include_path=folder)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    folder: str | None = None,
) -> dict[str, float]:
    """Return ``{"<task>.<metric>.<filter>": value}`` as lm-eval's ``simple_evaluate`` reports it.

    Args:
        model: a causal language model, with or without adapters.
        tokenizer: its tokenizer.
        tasks: names of lm-eval's tasks.
        limit: items of each task.
        batch_size: items at a time.
        folder: further tasks, one YAML each.

    Raises:
        UserError: lm-eval refuses, as it does for tasks that run model-written code.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = lm_eval.simple_evaluate(
            wrapped,
            tasks=list(tasks),
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            task_manager=_manager(tuple(tasks), folder),
        )
    except ValueError as error:
        raise UserError(f"lm-eval: {' '.join(str(error).split())[:300]}") from error
    assert found is not None  # it is None on processes other than the first
    return {
        f"{task}.{name.replace(',', '.')}": float(value)
        for task, values in found["results"].items()
        for name, value in values.items()
        if isinstance(value, int | float) and "stderr" not in name and name != "alias"
    }
