"""Images and labels in the IDX files that MNIST, Fashion-MNIST and KMNIST are distributed in.

An IDX file is: two zero bytes, one byte for the element type, one for the number of dimensions,
each dimension as a big-endian 32-bit integer, then the elements in row-major order.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorapro.experiments.errors import UserError

if TYPE_CHECKING:
    from numpy import ndarray

__all__ = ["is_idx_folder", "read_idx", "read_idx_folder"]

UNSIGNED_BYTE = 0x08
IMAGES, LABELS = "{}-images-idx3-ubyte", "{}-labels-idx1-ubyte"
PREFIXES = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> ndarray:
    """Return the array of unsigned bytes in an IDX file, gzipped if its name ends in ``.gz``.

    Raises:
        UserError: not an IDX file of unsigned bytes, or one that is cut short or too long.
    """
    import numpy as np

    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0":
        raise UserError(f"cannot read {path}: it does not start as an IDX file (two zero bytes)")
    kind, dimensions = content[2], content[3]
    if kind != UNSIGNED_BYTE:
        raise UserError(
            f"cannot read {path}: its elements are of IDX type 0x{kind:02x}, expected 0x08 "
            "(unsigned bytes)"
        )
    start = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4))
    expected = start
    if dimensions and len(content) >= start:
        expected += int(np.prod(shape, dtype=np.int64))
    if not dimensions or len(content) != expected:
        raise UserError(
            f"cannot read {path}: it has {len(content)} bytes, but its header tells of "
            f"{expected} (shape {' x '.join(map(str, shape)) or 'missing'}); fetch it again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _find(folder: Path, name: str) -> Path | None:
    # Some copies write a dot before idx3, as the files inside the archives do.
    for written in (name, name.replace("-idx", ".idx")):
        for suffix in ("", ".gz"):
            if (path := folder / f"{written}{suffix}").is_file():
                return path
    return None


def is_idx_folder(folder: Path) -> bool:
    """Whether the folder holds training images or labels in an IDX file."""
    return any(_find(folder, name.format("train")) is not None for name in (IMAGES, LABELS))


def read_idx_folder(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the splits of a folder of IDX files as rows.

    A row has the columns ``image`` (height × width, unsigned bytes, a view of the whole file) and
    ``label`` (an integer). The files are ``train-images-idx3-ubyte`` and
    ``train-labels-idx1-ubyte``, and maybe ``t10k-...`` for the split ``test``; each may be gzipped.

    Raises:
        UserError: a file that is missing, broken, or does not fit its partner.
    """
    splits = {}
    for split, prefix in PREFIXES.items():
        wanted = [name.format(prefix) for name in (IMAGES, LABELS)]
        found = [_find(folder, name) for name in wanted]
        if split == "test" and found == [None, None]:
            continue
        for name, path in zip(wanted, found, strict=True):
            if path is None:
                raise UserError(f"{folder} has no {name} (or {name}.gz) beside its other IDX files")
        image_path, label_path = (path for path in found if path is not None)
        images, labels = read_idx(image_path), read_idx(label_path)
        for path, array, dimensions in ((image_path, images, 3), (label_path, labels, 1)):
            if array.ndim != dimensions:
                raise UserError(
                    f"cannot read {path}: it has {array.ndim} dimensions, expected {dimensions}"
                )
        if len(images) != len(labels):
            raise UserError(
                f"{image_path.name} of {folder} holds {len(images)} images, but "
                f"{label_path.name} holds {len(labels)} labels"
            )
        if not len(images):
            raise UserError(f"{image_path} holds no images")
        pairs = zip(images, labels.tolist(), strict=True)
        splits[split] = [{"image": image, "label": label} for image, label in pairs]
    return splits
