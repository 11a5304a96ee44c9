"""Tasks of lm-evaluation-harness on a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorapro.experiments.errors import UserError, nearest_hint

__all__ = ["check_tasks", "harness_metrics"]


def _manager(names: Sequence[str]) -> tuple[Any, list[str]]:
    """lm-eval's task manager and the names to ask it for; a name may be a task's YAML file."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            "lm_eval needs the package 'lm-eval', which is not installed; "
            "run: pip install 'lorapro[eval]'"
        ) from error
    files = [Path(name) for name in names if name.endswith((".yaml", ".yml"))]
    for path in files:
        if not path.is_file():
            raise UserError(f"lm_eval: no file {str(path)!r}")
    folders = [str(path.resolve().parent) for path in files]
    manager = TaskManager(include_path=folders or None)
    return manager, [Path(n).stem if n.endswith((".yaml", ".yml")) else n for n in names]


def check_tasks(names: Sequence[str]) -> None:
    """Refuse names that lm-eval does not know.

    Raises:
        UserError: the package is missing; an unknown name, with the nearest.
    """
    manager, wanted = _manager(names)
    known = list(manager.all_tasks)
    for name in wanted:
        if name not in known:
            raise UserError(f"lm_eval has no task {name!r}{nearest_hint(name, known)}")


def harness_metrics(
    model: Any, tokenizer: Any, names: Sequence[str], limit: int = 0, batch_size: int = 8
) -> dict[str, float]:
    """Run tasks on a model at hand.

    Args:
        model: a causal language model, with or without adapter.
        tokenizer: its tokenizer.
        names: tasks or groups by name, or YAML files of tasks.
        limit: items of each task; 0: all.
        batch_size: items at a time.

    Returns:
        ``lm_eval/TASK/METRIC`` -> value.

    Raises:
        UserError: a task that cannot be run (its data not to be had, say).
    """
    manager, wanted = _manager(names)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    was_training = model.training
    model.eval()
    try:
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=wanted,
            limit=limit or None,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"lm_eval could not run {', '.join(names)}: {reason}") from error
    finally:
        model.train(was_training)
    return {
        f"lm_eval/{task}/{metric.partition(',')[0]}": float(value)
        for task, values in (found or {"results": {}})["results"].items()
        for metric, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
