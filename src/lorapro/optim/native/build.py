"""Compile and load the C files of this folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lorapro.cache import cache_folder

__all__ = ["library"]

logger = logging.getLogger(__name__)

SWITCH = "LORAPRO_NATIVE"
SOURCES = Path(__file__).parent
PRECISIONS = ("float", "double")
FLAGS = (
    "-O3",
    "-march=native",
    "-std=gnu11",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fno-strict-aliasing",
)
LONGEST_BUILD = 300  # seconds


def library() -> ctypes.CDLL | None:
    """The compiled steps; ``None`` where there is no compiler or ``LORAPRO_NATIVE=0``.

    OpenMP's functions are those that PyTorch has loaded, so that both share their threads and
    ``torch.set_num_threads`` holds for both.
    """
    return None if os.environ.get(SWITCH) == "0" else _library()


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or shutil.which(compiler[0]) is None or platform.system() != "Linux":
        logger.info("no C compiler: optimizer steps run in PyTorch.")
        return None
    try:
        path = _built(compiler)
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # a damaged file: once more
            path.unlink()
            return ctypes.CDLL(str(_built(compiler)))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        reason = next((line for line in lines if "error" in line), "no reason given")
        logger.warning(
            f"{shlex.join(compiler)} cannot compile lorapro's steps ({reason}): they run in "
            f"PyTorch, which is slower; {SWITCH}=0 silences this."
        )
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        logger.warning(f"lorapro's compiled steps cannot be used ({error}): they run in PyTorch.")
    return None


def _built(compiler: list[str]) -> Path:
    """The shared library, from the cache folder or made now.

    Its size is in its name: a file cut short (a full disk) would not fail to load, but kill the
    process when it is used.
    """
    sources = sorted(SOURCES.glob("*.[ch]"))
    known = hashlib.sha256()
    for part in (*(p.read_bytes() for p in sources), repr(FLAGS).encode(), _machine(compiler)):
        known.update(part)
    folder = cache_folder() / "native"
    name = f"steps-{known.hexdigest()[:16]}"
    for found in folder.glob(f"{name}-*.so"):
        if found.name == f"{name}-{found.stat().st_size}.so":
            return found
        found.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    logger.info(f"compiling {folder / name}, once.")
    with tempfile.TemporaryDirectory(dir=folder) as work:
        objects, commands = [], []
        for source in (p for p in sources if p.suffix == ".c"):
            for real in PRECISIONS:
                objects.append(str(Path(work) / f"{source.stem}-{real}.o"))
                files = ["-c", str(source), "-o", objects[-1]]
                commands.append([*compiler, *FLAGS, f"-DREAL={real}", *files])
        with ThreadPoolExecutor(os.cpu_count()) as workers:
            list(workers.map(_run, commands))
        made = Path(work) / f"{name}.so"
        # Not linked to a library of OpenMP: one is there, PyTorch's.
        _run([*compiler, "-shared", *objects, "-o", str(made), "-lm"])
        target = folder / f"{name}-{made.stat().st_size}.so"
        os.replace(made, target)  # at once: other processes may be doing the same
    return target


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=LONGEST_BUILD)


def _machine(compiler: list[str]) -> bytes:
    """What a library built with ``-march=native`` depends on, beside its source."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    kept = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    changed = os.stat(shutil.which(compiler[0]) or compiler[0])
    return repr((sorted(kept), platform.machine(), compiler, changed.st_mtime_ns)).encode()
