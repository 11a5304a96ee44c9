"""Results that travel: what lies beside saved weights, and models opened from it alone.

A run's ``adapter`` (``model``, ``merged``) holds, beside the weights, the tokenizer or image
processor, a model card (``README.md``) and ``lorapro.json``: task, prompt format, names of the
labels, method, metrics, and the base model as a hub id, an asset's name or an absolute path. With
these it works in any folder, without the run's config and without its data.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorapro.experiments import folders
from lorapro.experiments.assets import asset_path, is_asset
from lorapro.experiments.errors import UserError
from lorapro.experiments.options import RunOptions
from lorapro.experiments.tasks import FAMILIES, Family, find_task, make_family

if TYPE_CHECKING:
    from lorapro.experiments.config import RunConfig

__all__ = ["ABOUT", "Saved", "about_run", "base_name", "copy_beside", "open_saved", "write_beside"]

ABOUT = "lorapro.json"
ADAPTER_CONFIG = "adapter_config.json"

Log = Callable[[str], None]


def base_name(family: Family) -> str:
    """The base model by a name that holds elsewhere: asset, hub id, or absolute path."""
    path = Path(family.model_name).expanduser()
    return str(path.resolve()) if path.is_dir() else family.model_name


def about_run(config: RunConfig, family: Family, base_changed: bool) -> dict[str, Any]:
    """What somebody who gets the weights needs to use them.

    ``base_changed`` says that an adapter of the run is not all that was trained.
    """
    options = {
        item.name: getattr(family.args, item.name) for item in dataclasses.fields(family.args)
    }
    return {
        "task": config.entry.name,
        "model": base_name(family),
        "dtype": config.run.dtype,
        "options": {name: value for name, value in options.items() if value is not None},
        "carried": {name: getattr(family, name) for name in family.carried},
        "method": config.method.name,
        "rank": getattr(config.adapter, "rank", None),
        "alpha": getattr(config.adapter, "alpha", None),
        "learning_rate": config.training.learning_rate,
        "seed": config.training.seed,
        "data": Path(family.data_name).name if _is_local(family) else family.data_name,
        "base_changed": base_changed,
    }


def _is_local(family: Family) -> bool:
    return not is_asset(family.data_name) and Path(family.data_name).expanduser().exists()


def _name_base(folder: Path, name: str) -> None:
    """Let a saved adapter name its base as it is found elsewhere, and not in this cache."""
    path = folder / ADAPTER_CONFIG
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        folders.write_json(path, {**config, "base_model_name_or_path": name})


def write_beside(folder: Path, about: Mapping[str, Any], family: Family) -> None:
    """Put tokenizer or processor, ``lorapro.json`` and the model card beside saved weights."""
    from lorapro.experiments.card import model_card

    if family.processor is not None:
        family.processor.save_pretrained(folder)
    _name_base(folder, about["model"])
    folders.write_json(folder / ABOUT, about)
    folders.write_text(folder / "README.md", model_card(about, folder.name))


def copy_beside(source: Path, target: Path, about: Mapping[str, Any] | None) -> None:
    """Give an export what lies beside the weights it was made of."""
    from lorapro.experiments.card import model_card

    weights = ("adapter_", "model", "optimizer", "scheduler", "rng_", "train", "lora_ga_", "README")
    for path in sorted(source.iterdir()):
        known = (target / path.name).exists() or path.name == "config.json"
        if path.is_file() and not known and not path.name.startswith(weights):
            shutil.copyfile(path, target / path.name)
    if about is not None:
        _name_base(target, about["model"])
        folders.write_json(target / ABOUT, about)
        kind = "adapter" if (target / ADAPTER_CONFIG).is_file() else "merged"
        folders.write_text(target / "README.md", model_card(about, kind))


@dataclass(frozen=True)
class Saved:
    """Saved weights, opened: the task's family without its data, and where the weights lie.

    Attributes:
        family: with processor and labels at hand, nothing of the data read.
        weights: folder of an adapter or of a whole model.
        about: contents of ``lorapro.json``.
    """

    family: Family
    weights: Path
    about: dict[str, Any]

    @property
    def is_adapter(self) -> bool:
        """Whether the weights are an adapter's."""
        return (self.weights / ADAPTER_CONFIG).is_file()

    def load_model(self, trainable: bool = False) -> Any:
        """Return the model: base and adapter, or the whole one."""
        if not self.is_adapter:
            self.family.model_path = str(self.weights)
            return self.family.load_model()
        return with_adapter(self.family.load_model(), self.weights, trainable)


def with_adapter(model: Any, folder: Path, trainable: bool = False) -> Any:
    """Put a saved adapter on a model.

    Raises:
        UserError: no adapter there, or one of another model.
    """
    from peft import PeftModel

    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{folder} is not the folder of an adapter: it has no {ADAPTER_CONFIG}")
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"adapter {folder} does not fit this model: {reason}") from error


def find_about(target: Path) -> dict[str, Any] | None:
    """``lorapro.json`` of a run, of what it saved, or of a checkpoint in it."""
    for folder in (target, target.resolve().parent):
        if (folder / ABOUT).is_file():
            try:
                found: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            except json.JSONDecodeError as error:
                raise UserError(f"cannot read {folder / ABOUT}: {error}") from error
            return found
    return None


def weights_of(target: Path) -> Path:
    """The folder of weights that is meant: itself, what a run saved, its last checkpoint.

    Raises:
        UserError: there is none (yet).
    """
    names = (ADAPTER_CONFIG, "config.json")
    if any((target / name).is_file() for name in names):
        return target
    for name in (folders.MERGED, folders.MODEL, folders.ADAPTER):
        if any((target / name / file).is_file() for file in names):
            return target / name
    checkpoint = folders.last_checkpoint(target)
    if checkpoint is not None and any((checkpoint / file).is_file() for file in names):
        return checkpoint
    raise UserError(f"{target} holds no trained model yet (no adapter, model or merged folder)")


def open_saved(
    target: str | Path,
    *,
    model: str | None = None,
    log: Log | None = None,
    incomplete: bool = False,
) -> Saved | None:
    """Open a run, what it saved, a checkpoint of it or an export of it.

    Args:
        target: the folder.
        model: base model to use instead of the one that is named.
        log: called with a line of text now and then.
        incomplete: open an adapter too whose base changed in training, so that both together are
            not the trained model.

    Returns:
        ``None`` for weights that no run of this package has described.

    Raises:
        UserError: no such folder, no weights in it, a base model that is not to be had.
    """
    folder = Path(target)
    if not folder.exists():
        raise UserError(f"no file or folder {str(target)!r}")
    if not folder.is_dir():
        raise UserError(f"{target} is a file; expected a run, a checkpoint or an adapter's folder")
    about = find_about(folder)
    if about is None:
        return None
    weights = weights_of(folder)
    is_adapter = (weights / ADAPTER_CONFIG).is_file()
    if is_adapter and about.get("base_changed") and not incomplete:
        raise UserError(
            f"{weights} is not the trained model: its base weights changed in training too "
            f"({about['method']}); use the run's folder {folders.MERGED!r}"
        )
    entry = find_task(about["task"])
    kind = FAMILIES[entry.family].options
    known = {item.name for item in dataclasses.fields(kind)}
    options = kind(**{k: v for k, v in about["options"].items() if k in known})
    run = RunOptions(
        task=entry.name, model=model or about["model"], dtype=about["dtype"], data=about["data"]
    )
    family = make_family(entry, run, options)
    for name, value in about["carried"].items():
        setattr(family, name, value)
    family.say = log or (lambda _: None)
    family.train, family.validation, family.test, family.test_rows = [], [], [], []
    family.model_path = _base_path(family.model_name, weights, log)
    base = family.model_path
    if (weights / "tokenizer_config.json").is_file():
        family.model_path = str(weights)
    family.processor = family.load_processor()
    family.model_path = base
    return Saved(family, weights, about)


def _base_path(name: str, weights: Path, log: Log | None) -> str:
    if not (weights / ADAPTER_CONFIG).is_file():
        return str(weights)
    if Path(name).is_absolute() and not Path(name).is_dir() and not is_asset(name):
        raise UserError(f"the base model {name} is no longer there; give it with --model")
    return asset_path(name, log)
