"""Models from what was saved: evaluate and describe a run, a checkpoint, an adapter, a config."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorapro.experiments import folders
from lorapro.experiments.assets import asset_path
from lorapro.experiments.config import RunConfig, build_config, load_config, read_yaml
from lorapro.experiments.errors import UserError
from lorapro.experiments.model_building import build_model, count_parameters
from lorapro.experiments.tasks import Family

__all__ = ["describe_target", "evaluate_target", "load_any", "load_trained"]

Log = Callable[[str], None]
ADAPTER_CONFIG = "adapter_config.json"


def _run_config(folder: Path, flags: Sequence[str]) -> RunConfig:
    if not (folder / folders.CONFIG).is_file():
        raise UserError(
            f"{folder} is not the folder of a run: it has no {folders.CONFIG}; "
            "for a model or an adapter elsewhere give a config YAML (and --adapter FOLDER)"
        )
    return build_config(read_yaml(folder / folders.CONFIG), flags)


def load_trained(folder: Path, task: Family) -> Any:
    """Return the model a finished run saved: merged or full weights, else base and adapter."""
    for name in (folders.MERGED, folders.MODEL):
        if (folder / name).is_dir():
            task.model_path = str(folder / name)
            return task.load_model()
    if (folder / folders.ADAPTER).is_dir():
        # PEFT's AdaLoRA computes a loss only with an adapter that could be trained.
        return _with_adapter(task.load_model(), folder / folders.ADAPTER, trainable=True)
    raise UserError(f"{folder} holds no trained model yet (no adapter, model or merged folder)")


def _with_adapter(model: Any, folder: Path, trainable: bool = False) -> Any:
    from peft import PeftModel

    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{folder} is not the folder of an adapter: it has no {ADAPTER_CONFIG}")
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"adapter {folder} does not fit this model: {reason}") from error


def evaluate_target(
    target: str,
    flags: Sequence[str] = (),
    *,
    adapter: str | None = None,
    limit: int | None = None,
    predictions: str | None = None,
    log: Log | None = None,
) -> dict[str, float]:
    """Return loss and metrics on the test set.

    Args:
        target: the folder of a run, or a config YAML (the model as it is, or with ``adapter``).
        flags: overrides of config keys.
        adapter: folder of an adapter, for a config YAML.
        limit: test examples at most.
        predictions: file for generated answers.
        log: called with a line of text now and then.

    Raises:
        UserError: nothing there, or an adapter that does not fit.
    """
    from transformers import PrinterCallback

    from lorapro.experiments.evaluation import make_trainer
    from lorapro.experiments.runner import make_task

    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, found {limit}")
    folder = Path(target)
    is_run = folder.is_dir()
    config = _run_config(folder, flags) if is_run else load_config(target, flags)
    config = config.with_values(disable_tqdm=True)
    if is_run and adapter is not None:
        raise UserError("--adapter goes with a config YAML; a run's folder has its own adapter")
    task = make_task(config, log, limit or 0)
    if is_run:
        model = load_trained(folder, task)
    else:
        model = task.load_model()
        model = model if adapter is None else _with_adapter(model, Path(adapter))
    model.eval()
    trainer = make_trainer(config, task, model, create_folder=False)
    trainer.remove_callback(PrinterCallback)
    metrics = trainer.summarize(trainer.score(task.test))
    save_to = Path(predictions) if predictions else folder / "predictions-test.jsonl"
    if predictions is None and not is_run:
        save_to = None  # type: ignore[assignment]
    metrics.update(task.final_metrics(model, save_to, task.evaluation_samples(limit)))
    return metrics


def describe_target(
    target: str, flags: Sequence[str] = (), log: Log | None = None
) -> dict[str, Any]:
    """Return the pairs and the other trainable parameters of a config, run, checkpoint or adapter.

    Raises:
        UserError: nothing there, or no adapter.
    """
    from lorapro.factors import find_pairs

    model = load_any(Path(target), flags, log)
    found = find_pairs(model)
    if not found.pairs and not found.unaligned:
        raise UserError(f"{target}: the model has no trainable LoRA pair to show")
    of_pairs = {id(p) for pair in found.pairs for p in (pair.A, pair.B)}
    plain = [
        {"name": name, "shape": list(p.shape), "size": p.numel()}
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in of_pairs
    ]
    trainable, total = count_parameters(model)
    return {
        "pairs": [
            {
                "name": pair.name,
                "m": pair.shape[0],
                "n": pair.shape[1],
                "rank": pair.rank,
                "scaling": pair.scaling,
                "norm_A": float(pair.A.detach().norm()),
                "norm_B": float(pair.B.detach().norm()),
            }
            for pair in found.pairs
        ],
        "unaligned": [list(item) for item in found.unaligned],
        "plain": plain,
        "trainable_parameters": trainable,
        "parameters": total,
    }


def load_any(target: Path, flags: Sequence[str], log: Log | None) -> Any:
    """Model of a run, a checkpoint, an adapter or a config, its adapter trainable.

    Raises:
        UserError: nothing there, or no adapter.
    """
    from lorapro.experiments.runner import make_task

    if not target.exists():
        raise UserError(f"no file or folder {str(target)!r}")
    if target.is_file():
        config = load_config(target, flags)
        return build_model(config, make_task(config, log))
    if (target / ADAPTER_CONFIG).is_file():
        return _adapter_alone(target, flags, log)
    config = _run_config(target, flags)
    task = make_task(config, log)
    adapter = target / folders.ADAPTER
    if not adapter.is_dir():
        checkpoint = folders.last_checkpoint(target)
        if checkpoint is None or not (checkpoint / ADAPTER_CONFIG).is_file():
            raise UserError(f"{target} holds no adapter (method {config.method.name!r})")
        adapter = checkpoint
    return _with_adapter(task.load_model(), adapter, trainable=True)


def _adapter_alone(folder: Path, flags: Sequence[str], log: Log | None) -> Any:
    """Load an adapter on the base model it names (or ``--model``), by its task type."""
    import transformers

    for parent in (folder.parent, folder.parent.parent):
        if (parent / folders.CONFIG).is_file() and not flags:
            from lorapro.experiments.runner import make_task

            task = make_task(_run_config(parent, ()), log)
            return _with_adapter(task.load_model(), folder, trainable=True)
    saved = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    name = saved.get("base_model_name_or_path")
    for flag, value in zip(flags[::2], flags[1::2], strict=False):
        if flag != "--model":
            raise UserError(f"unknown flag {flag} for an adapter; known: --model, --json")
        name = value
    if not name:
        raise UserError(f"{folder} does not name its base model; give it with --model")
    auto = {
        "CAUSAL_LM": transformers.AutoModelForCausalLM,
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    }.get(saved.get("task_type"), transformers.AutoModel)
    try:
        model = auto.from_pretrained(asset_path(name, log))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"cannot load the base model {name!r}; give --model ({reason})") from error
    return _with_adapter(model, folder, trainable=True)
