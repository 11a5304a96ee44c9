"""Runs, checkpoints, adapters and configs as models again: evaluate, describe, predict."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorapro.experiments import folders
from lorapro.experiments.assets import asset_path, is_asset
from lorapro.experiments.config import RunConfig, build_config, load_config
from lorapro.experiments.data import Row, load_rows, require_columns
from lorapro.experiments.errors import UserError
from lorapro.experiments.model_building import build_model, count_parameters
from lorapro.experiments.saved import ADAPTER_CONFIG, Saved, open_saved, with_adapter
from lorapro.experiments.tasks import Family
from lorapro.experiments.tasks.base import take
from lorapro.experiments.yaml_file import read_yaml

__all__ = ["describe_target", "evaluate_target", "load_any", "predict_target", "rows_to_answer"]

Log = Callable[[str], None]


def _run_config(folder: Path, flags: Sequence[str]) -> RunConfig:
    """The config of a run; a relative path in it is where the run was started."""
    values = read_yaml(folder / folders.CONFIG)
    try:
        run = json.loads((folder / folders.RUN).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        run = {}
    for key in ("data", "model"):
        path = Path(str(values.get(key) or ""))
        there = Path(run.get("started_in", ".")) / path
        if key in values and not is_asset(str(path)) and not path.exists() and there.exists():
            values[key] = str(there)
    return build_config(values, flags)


def evaluate_target(
    target: str,
    flags: Sequence[str] = (),
    *,
    adapter: str | None = None,
    data: str | None = None,
    limit: int | None = None,
    predictions: str | None = None,
    log: Log | None = None,
) -> dict[str, float]:
    """Return loss and metrics on the test set, or on rows of another file.

    Args:
        target: a run or what it saved; or a config YAML (the model as it is, or with ``adapter``).
        flags: overrides of config keys.
        adapter: folder of an adapter, for a config YAML.
        data: evaluate on these rows, all of them, with the saved labels; for saved weights.
        limit: test examples at most.
        predictions: file for generated answers.
        log: called with a line of text now and then.

    Raises:
        UserError: nothing there, an adapter that does not fit, rows without a column.
    """
    from transformers import PrinterCallback

    from lorapro.experiments.evaluation import make_trainer
    from lorapro.experiments.runner import make_task

    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, found {limit}")
    folder = Path(target)
    save_to: Path | None = Path(predictions) if predictions else None
    if folder.is_dir():
        if adapter is not None:
            raise UserError("--adapter goes with a config YAML; a run's folder has its own adapter")
        saved = _opened(folder, log)
        if data is None and (folder / folders.CONFIG).is_file():
            config = _run_config(folder, flags).with_values(disable_tqdm=True)
            task = make_task(config, log, limit or 0)
        elif data is None:
            raise UserError(f"{folder} has no test set of its own; give rows with --data")
        else:
            config = _config_of(saved, data, flags)
            task = _on_rows(saved, config, data, limit)
        # PEFT's AdaLoRA computes a loss only with an adapter that could be trained.
        saved = Saved(task, saved.weights, saved.about)
        model = saved.load_model(trainable=True)
        save_to = save_to or folder / "predictions-test.jsonl"
    else:
        if data is not None:
            flags = [*flags, f"--data={data}"]
        config = load_config(target, flags).with_values(disable_tqdm=True)
        task = make_task(config, log, limit or 0)
        model = task.load_model()
        model = model if adapter is None else with_adapter(model, Path(adapter))
    model.eval()
    trainer = make_trainer(config, task, model, create_folder=False)
    trainer.remove_callback(PrinterCallback)
    metrics = trainer.summarize(trainer.score(task.test))
    metrics.update(task.final_metrics(model, save_to, task.evaluation_samples(limit)))
    return metrics


def _opened(folder: Path, log: Log | None, model: str | None = None) -> Saved:
    saved = open_saved(folder, model=model, log=log)
    if saved is None:
        raise UserError(
            f"{folder} is not the folder of a run or of what it saved: it has no lorapro.json; for "
            "a model or an adapter of another origin give a config YAML (and --adapter FOLDER)"
        )
    return saved


def _config_of(saved: Saved, data: str, flags: Sequence[str]) -> RunConfig:
    """A config made of what lies beside the weights."""
    about = saved.about
    names = ("task", "model", "dtype", "method")
    values = {name: about[name] for name in names} | about["options"]
    return build_config({**values, "data": data, "disable_tqdm": True}, flags)


def _on_rows(saved: Saved, config: RunConfig, data: str, limit: int | None) -> Family:
    """The family with the rows of a file as its test set, and nothing to train on."""
    family: Any = saved.family
    family.args, family.run, family.data_name = config.task, config.run, data
    rows = rows_to_answer(family, data, family.columns_used(), limit or 0)
    for number, row in enumerate(rows, 1):
        label = getattr(family.args, "label_column", "label")
        if "labels" in family.carried and str(row[label]) not in family.labels:
            raise UserError(
                f"row {number} of {data} has the label {str(row[label])!r}; the model knows: "
                f"{', '.join(family.labels[:12])}"
            )
    family.test_rows = rows
    family.test = family.encode(rows)
    if not family.test:
        raise UserError(f"no row of {data} can be evaluated (too long for max_length?)")
    return family


def rows_to_answer(family: Family, data: str, columns: tuple[str, ...], limit: int) -> list[Row]:
    """Read the test split of a data set, or its only one; check the columns.

    Raises:
        UserError: nothing there; no such column, with those that there are.
    """
    splits = load_rows(data)
    rows = splits.get("test") or (next(iter(splits.values())) if len(splits) == 1 else None)
    if rows is None:
        raise UserError(f"{data} has no split 'test'; it has: {', '.join(splits)}")
    if family.entry.row is not None and set(columns) == set(family.columns_used()):
        rows = [new for row in rows if (new := family.entry.row(row, family.args)) is not None]
    require_columns(rows, columns, data, "")
    return take(rows, limit)


def predict_target(
    target: str,
    *,
    data: str | None = None,
    texts: Sequence[str] = (),
    batch_size: int = 16,
    limit: int = 0,
    model: str | None = None,
    settings: dict[str, Any] | None = None,
    log: Log | None = None,
) -> list[Row]:
    """Return what saved weights say of new rows: each row with the prediction added.

    Args:
        target: a run, what it saved, a checkpoint of it or an export.
        data: file, folder or hub id of the rows.
        texts: or texts, for tasks that read one column.
        batch_size: rows at a time.
        limit: rows at most; 0: all.
        model: base model to use instead of the one that the weights name.
        settings: options of the task to set, such as ``max_new_tokens``.
        log: called with a line of text now and then.

    Raises:
        UserError: nothing there, no such column, a task that predicts nothing.
    """
    if (data is None) == (not texts):
        raise UserError("give rows: either a file with --data, or texts")
    if not all(text.strip() for text in texts):
        raise UserError("a text is empty; give one with something in it")
    saved = _opened(Path(target), log, model)
    family = saved.family
    for name, value in (settings or {}).items():
        if value is not None:
            if not hasattr(family.args, name) and name != "temperature":
                raise UserError(f"task {family.entry.name!r} has no {name}")
            setattr(family.args, name, value)
    if data is not None and data.endswith(".txt"):
        texts, data = _lines(data), None
    if data is not None:
        family.data_name = data
        rows = rows_to_answer(family, data, family.input_columns(), limit)
    else:
        rows = [family.input_row(text) for text in texts]
    answers = family.predict(saved.load_model(), rows, batch_size)
    return [{**row, **answer} for row, answer in zip(rows, answers, strict=True)]


def _lines(name: str) -> list[str]:
    """The lines of a text file that hold something."""
    try:
        lines = Path(name).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {name}: {error}") from error
    if not any(line.strip() for line in lines):
        raise UserError(f"{name} holds no text")
    return [line for line in lines if line.strip()]


def describe_target(
    target: str, flags: Sequence[str] = (), log: Log | None = None
) -> dict[str, Any]:
    """Return the pairs and the other trainable parameters of a config, run, checkpoint or adapter.

    Raises:
        UserError: nothing there, or no adapter.
    """
    from lorapro.factors import find_pairs

    model = load_any(Path(target), flags, log, incomplete=True)
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


def load_any(
    target: Path, flags: Sequence[str], log: Log | None, *, incomplete: bool = False
) -> Any:
    """Model of a run, a checkpoint, an adapter or a config, its adapter trainable.

    ``--model`` among the flags is the base model of an adapter. With ``incomplete`` an adapter is
    taken whose base changed in training too.

    Raises:
        UserError: nothing there, or no adapter.
    """
    from lorapro.experiments.runner import make_task

    if not target.exists():
        raise UserError(f"no file or folder {str(target)!r}")
    if target.is_file():
        config = load_config(target, flags)
        return build_model(config, make_task(config, log))
    base = _base_flag(flags)
    chosen = target / folders.ADAPTER
    chosen = chosen if (chosen / ADAPTER_CONFIG).is_file() else target
    saved = open_saved(chosen, model=base, log=log, incomplete=incomplete)
    if saved is not None:
        if not saved.is_adapter:
            raise UserError(f"{target} holds no adapter (method {saved.about['method']!r})")
        return saved.load_model(trainable=True)
    if (target / ADAPTER_CONFIG).is_file():
        return _foreign_adapter(target, base, log)
    raise UserError(
        f"{target} is not the folder of a run, a checkpoint or an adapter: it has no lorapro.json "
        f"and no {ADAPTER_CONFIG}"
    )


def _base_flag(flags: Sequence[str]) -> str | None:
    """Value of ``--model``, the one flag that goes with saved weights."""
    from lorapro.cli.common import Parser

    parser = Parser("inspect")
    parser.add_argument("--model")
    value: str | None = parser.parse_strictly(list(flags)).model
    return value


def _foreign_adapter(folder: Path, name: str | None, log: Log | None) -> Any:
    """Load an adapter of PEFT on the base model it names (or another), by its task type."""
    import transformers

    saved = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    name = name or saved.get("base_model_name_or_path")
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
    return with_adapter(model, folder, trainable=True)
