"""Rows of a data set from a local file or folder, an asset or the Hugging Face hub."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lorapro.experiments.assets import ASSETS, asset_path, is_asset
from lorapro.experiments.errors import UserError
from lorapro.experiments.idx import is_idx_folder, read_idx_folder

__all__ = ["Row", "content_digest", "load_rows", "missing", "require_cells", "require_columns"]

Row = dict[str, Any]
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
SPLIT_NAMES = ("train", "validation", "valid", "dev", "test", "validation_matched")


def _read_file(path: Path, encoding: str) -> list[Row]:
    import pandas

    if path.suffix not in SUFFIXES:
        raise UserError(f"cannot read {path}: expected a file ending in {', '.join(SUFFIXES)}")
    try:
        if path.suffix in (".csv", ".tsv"):
            _check_header(path, encoding)
            # Everything stays text; nothing but an empty field is missing.
            table = pandas.read_csv(
                path,
                sep="\t" if path.suffix == ".tsv" else ",",
                encoding=encoding,
                dtype=str,
                keep_default_na=False,
                na_values=[""],
            )
        elif path.suffix == ".parquet":
            table = pandas.read_parquet(path)
        else:
            return _not_empty(_records(path.read_text(encoding=encoding), path.suffix), path)
    except pandas.errors.EmptyDataError:
        raise UserError(f"{path} holds no rows") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"cannot read {path}: byte {error.object[error.start]:#x} at {error.start} is not "
            "UTF-8; save the file as UTF-8"
        ) from error
    except (ValueError, OSError, pandas.errors.ParserError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot read {path}: {reason}; expected a table, or a list of records with named "
            "columns"
        ) from error
    return _not_empty(table.to_dict("records"), path)


def _records(text: str, suffix: str) -> list[Row]:
    """Rows of a JSON list, or of JSON lines.

    Raises:
        ValueError: no such thing; of lines it names the first.
    """
    import json

    if suffix == ".json":
        try:
            records = json.loads(text) if text.strip() else []
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Extra data"):  # else it is lines under another name
                raise
        else:
            if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
                raise ValueError("found no list of records")
            return records
    rows = []
    # At newlines only: str.splitlines would break strings that hold U+2028 or U+0085.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is of type {type(row).__name__}, not an object")
        rows.append(row)
    return rows


def _check_header(path: Path, encoding: str) -> None:
    """Refuse two columns of one name, of which pandas would rename the second."""
    import csv

    with path.open(encoding=encoding, newline="") as stream:
        names = next(csv.reader(stream, delimiter="\t" if path.suffix == ".tsv" else ","), [])
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{names.count(name)} columns are called {name!r}")


def _not_empty(rows: list[Any], path: Path) -> list[Row]:
    if not rows:
        raise UserError(f"{path} holds no rows")
    return rows


def _read_folder(folder: Path) -> dict[str, list[Row]]:
    files = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix in SUFFIXES}
    found = {name: files[name] for name in SPLIT_NAMES if name in files}
    if "train" not in found:
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"{folder} has no train file ({', '.join(SUFFIXES)}); it holds: {names}")
    splits = {name: _read_file(path, "utf-8") for name, path in found.items()}
    for alias in ("valid", "dev"):
        if alias in splits:
            splits.setdefault("validation", splits.pop(alias))
    return splits


def _read_hub(source: str, config: str | None, names: bool = False) -> dict[str, list[Row]]:
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
        if Path(source).exists():
            raise UserError(f"cannot read the data set in {source}: {reason}") from error
        raise UserError(
            f"no local file or folder {source!r}, and the hub has not given it either ({reason})"
        ) from error
    kept = {name: split for name, split in loaded.items() if not names or name in SPLIT_NAMES}
    rows = {name: [dict(row) for row in _undecoded(split)] for name, split in kept.items()}
    for name, split in kept.items() if names else ():
        for column, feature in (split.features or {}).items():
            if isinstance(feature, datasets.ClassLabel):
                for row in rows[name]:
                    # A label that is missing or kept hidden (-1) has no name.
                    if row[column] is not None and row[column] >= 0:
                        row[column] = feature.int2str(row[column])
    return rows


def _is_hub_folder(path: Path, names: bool) -> bool:
    """Whether a folder is laid out as a hub data set: Parquet files, or images by class."""
    patterns = ("data/*.parquet", "train-*.parquet", *(["*.parquet"] if names else []))
    return (path / "train").is_dir() or any(any(path.glob(pattern)) for pattern in patterns)


def _undecoded(split: Any) -> Any:
    """Leave images as the compressed bytes they came in: most rows are not used."""
    import datasets

    for name, feature in (split.features or {}).items():
        if isinstance(feature, datasets.Image):
            split = split.cast_column(name, datasets.Image(decode=False))
    return split


def _read_any_folder(path: Path, names: bool) -> dict[str, list[Row]]:
    if is_idx_folder(path):
        return read_idx_folder(path)
    if _is_hub_folder(path, names):
        return _read_hub(str(path), None, names)
    return _read_folder(path)


def load_rows(
    source: str, config: str | None = None, *, names: bool = False
) -> dict[str, list[Row]]:
    """Load the splits of a data set as lists of rows.

    Args:
        source: an asset's name; a ``.csv``, ``.tsv``, ``.json``, ``.jsonl`` or ``.parquet`` file
            (it becomes the split ``train``); a folder with ``train.*`` and maybe ``validation.*``
            and ``test.*``; a folder of IDX files (see :mod:`~lorapro.experiments.idx`); a
            folder as the hub's, of Parquet files or of images in ``train/<class>/``; or the id of a
            data set on the hub.
        config: configuration name of a hub data set.
        names: give labels that the hub stores as numbers by their names, and leave out splits other
            than train, validation and test.

    Raises:
        UserError: nothing there, or a file that cannot be read.
    """
    if is_asset(source):
        asset = ASSETS[source]
        if asset.kind != "data":
            raise UserError(f"asset {source!r} is a {asset.kind}, not a data set")
        opened = Path(asset_path(source))
        if opened.is_dir():
            return _read_any_folder(opened, names)
        return {"train": _read_file(opened, asset.encoding)}
    path = Path(source).expanduser()
    if path.is_file():
        return {"train": _read_file(path, "utf-8-sig")}
    if path.is_dir():
        return _read_any_folder(path, names)
    looks_local = path.is_absolute() or source.startswith((".", "~")) or path.suffix in SUFFIXES
    if looks_local or source.count("/") > 1:
        raise UserError(f"no data file or folder {source!r}")
    return _read_hub(source, config, names)


def content_digest(source: str) -> str:
    """Short hash of what a data set holds, so that changed data is a changed run.

    Local files and folders: of their bytes. An asset: its checksum. A hub id: the revision in the
    local hub cache, or ``""`` where nothing of it is there yet.
    """
    if is_asset(source):
        return ASSETS[source].sha256[:16]
    path = Path(source).expanduser()
    if path.is_file():
        return _hash_of((path,))
    if path.is_dir():
        return _hash_of(tuple(sorted(p for p in path.rglob("*") if p.is_file())))
    return _hub_revision(source)


def _hash_of(paths: tuple[Path, ...]) -> str:
    stats = [(p, p.stat()) for p in paths]
    return _hash_files(tuple((str(p), s.st_size, s.st_mtime_ns) for p, s in stats))


@functools.lru_cache(maxsize=256)
def _hash_files(files: tuple[tuple[str, int, int], ...]) -> str:
    total = hashlib.sha256()
    for name, _, _ in files:
        with open(name, "rb") as stream:
            while chunk := stream.read(1 << 20):
                total.update(chunk)
    return total.hexdigest()[:16]


def _hub_revision(source: str) -> str:
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return ""
    head = Path(HF_HUB_CACHE) / f"datasets--{source.replace('/', '--')}" / "refs" / "main"
    return head.read_text(encoding="utf-8").strip()[:16] if head.is_file() else ""


def require_columns(rows: Sequence[Row], columns: Iterable[str], source: str, keys: str) -> None:
    """Check that every row has a value in each of ``columns``.

    Raises:
        UserError: naming the missing column, the columns found, and ``keys`` (what to set instead);
            or the first row with nothing in a column.
    """
    found = list(rows[0])
    for column in columns:
        if column not in found and not any(column in row for row in rows):
            raise UserError(
                f"{source} has no column {column!r}; its columns are: "
                f"{', '.join(map(str, found))}{keys}"
            )
        for number, row in enumerate(rows, 1):
            if missing(row.get(column)):
                raise UserError(
                    f"row {number} of {source} has nothing in column {column!r}; fill it or leave "
                    "the row out"
                )


def require_cells(rows: Sequence[Row], columns: Iterable[str], source: str) -> None:
    """Check that no cell of ``columns`` holds a list or a mapping, which would be read as its
    Python notation.

    Raises:
        UserError: naming the first such row.
    """
    for column in columns:
        for number, row in enumerate(rows, 1):
            value: Any = row[column]
            shape: Any = getattr(value, "shape", None)  # of an array, as Parquet gives it
            if isinstance(value, list | tuple | dict | bytes) or shape:
                kind = type(value).__name__
                raise UserError(
                    f"row {number} of {source} holds a {kind} in column {column!r}, expected a "
                    "text or a number"
                )


def missing(value: Any) -> bool:
    """Whether a cell holds nothing: ``None`` or not a number."""
    return value is None or (isinstance(value, float) and value != value)
