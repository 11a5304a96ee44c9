"""Files out of a wheel (zip) or a source archive (tar.gz). Nothing in it is run."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast

from lorapro.experiments.errors import UserError

__all__ = ["extract"]


def extract(archive: Path, members: Sequence[str], target: Path) -> None:
    """Write the files of ``archive`` that ``members`` names into ``target``.

    A member that ends in ``/`` is a folder: what lies under it keeps its place relative to it. A
    file goes to ``target`` itself. Links and devices of a tar archive are left alone.

    Raises:
        UserError: a member that is not there, or a name that leads out of ``target``.
    """
    found = set()
    for name, stream in _files(archive):
        member = next(
            (m for m in members if m == name or (m[-1] == "/" and name.startswith(m))), ""
        )
        if not member:
            continue
        found.add(member)
        root = member if member.endswith("/") else member.rpartition("/")[0] + "/"
        destination = (target / name.removeprefix(root)).resolve()
        if not destination.is_relative_to(target.resolve()):
            raise UserError(f"{archive.name} holds a file that leads outside: {name!r}")
        destination.parent.mkdir(parents=True, exist_ok=True)
        with destination.open("wb") as sink:
            shutil.copyfileobj(stream, sink)
    missing = [m for m in members if m not in found]
    if missing:
        raise UserError(f"{archive.name} holds no {', '.join(missing)}")


def _files(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield name and content of every regular file."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                if not info.is_dir():
                    with zipped.open(info) as stream:
                        yield info.filename, stream
        return
    with tarfile.open(archive, "r|*") as tarred:  # one pass: a gzipped archive has no index
        for entry in tarred:
            if entry.isfile():
                yield entry.name, cast(IO[bytes], tarred.extractfile(entry))
