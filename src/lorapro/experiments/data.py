"""Rows of a data set from a local file or folder, an asset or the Hugging Face hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lorapro.experiments.assets import ASSETS, asset_path, is_asset
from lorapro.experiments.errors import UserError
from lorapro.experiments.idx import is_idx_folder, read_idx_folder

__all__ = ["Row", "load_rows", "require_columns"]

Row = dict[str, Any]
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
SPLIT_NAMES = ("train", "validation", "valid", "dev", "test")


def _read_file(path: Path, encoding: str) -> list[Row]:
    if path.suffix not in SUFFIXES:
        raise UserError(f"cannot read {path}: expected a file ending in {', '.join(SUFFIXES)}")
    try:
        with path.open(encoding=encoding, newline="") as stream:
            if path.suffix in (".csv", ".tsv"):
                delimiter = "\t" if path.suffix == ".tsv" else ","
                rows: list[Any] = list(csv.DictReader(stream, delimiter=delimiter))
            elif path.suffix == ".jsonl":
                rows = [json.loads(line) for line in stream if line.strip()]
            else:
                rows = json.load(stream)
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"cannot read {path}: expected a list of records with named columns")
    if not rows:
        raise UserError(f"{path} holds no rows")
    return rows


def _read_folder(folder: Path) -> dict[str, list[Row]]:
    files = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix in SUFFIXES}
    found = {name: files[name] for name in SPLIT_NAMES if name in files}
    if "train" not in found:
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"{folder} has no train.jsonl, train.json or train.csv; it holds: {names}")
    splits = {name: _read_file(path, "utf-8") for name, path in found.items()}
    for alias in ("valid", "dev"):
        if alias in splits:
            splits.setdefault("validation", splits.pop(alias))
    return splits


def _read_hub(source: str, config: str | None) -> dict[str, list[Row]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"reading {source!r} from the hub needs the package 'datasets'; "
            "run: pip install 'lorapro[experiments]'"
        ) from error
    try:
        loaded = datasets.load_dataset(source, config)
    except Exception as error:  # datasets raises many kinds: not found, offline, no network
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"no local file or folder {source!r}, and the hub has not given it either ({reason})"
        ) from error
    return {name: [dict(row) for row in _undecoded(split)] for name, split in loaded.items()}


def _undecoded(split: Any) -> Any:
    """Leave images as the compressed bytes they came in: most rows are not used."""
    import datasets

    for name, feature in (split.features or {}).items():
        if isinstance(feature, datasets.Image):
            split = split.cast_column(name, datasets.Image(decode=False))
    return split


def load_rows(source: str, config: str | None = None) -> dict[str, list[Row]]:
    """Load the splits of a data set as lists of rows.

    Args:
        source: an asset's name; a ``.csv``, ``.tsv``, ``.json`` or ``.jsonl`` file (it becomes
            the split ``train``); a folder with ``train.*`` and maybe ``validation.*`` and
            ``test.*``; a folder of IDX files (see :mod:`~lorapro.experiments.idx`); or the id of
            a data set on the hub.
        config: configuration name of a hub data set.

    Raises:
        UserError: nothing there, or a file that cannot be read.
    """
    if is_asset(source):
        asset = ASSETS[source]
        if asset.kind != "data":
            raise UserError(f"asset {source!r} is a {asset.kind}, not a data set")
        opened = Path(asset_path(source))
        if opened.is_dir():
            return _read_folder(opened)
        return {"train": _read_file(opened, asset.encoding)}
    path = Path(source).expanduser()
    if path.is_file():
        return {"train": _read_file(path, "utf-8-sig")}
    if path.is_dir():
        return read_idx_folder(path) if is_idx_folder(path) else _read_folder(path)
    looks_local = path.is_absolute() or source.startswith((".", "~")) or path.suffix in SUFFIXES
    if looks_local or source.count("/") > 1:
        raise UserError(f"no data file or folder {source!r}")
    return _read_hub(source, config)


def require_columns(rows: Sequence[Row], columns: Iterable[str], source: str, keys: str) -> None:
    """Check that the rows have ``columns``.

    Raises:
        UserError: naming the missing column, the columns found, and ``keys`` (what to set instead).
    """
    found = list(rows[0])
    for column in columns:
        if column not in found:
            raise UserError(
                f"{source} has no column {column!r}; its columns are: "
                f"{', '.join(map(str, found))}{keys}"
            )
