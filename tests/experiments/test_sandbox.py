"""Model-written programs: what they must be able to do, and what they must not."""

from __future__ import annotations

import http.server
import os
import threading
import time

import pytest

from lorapro.experiments.errors import UserError
from lorapro.experiments.scoring.sandbox import Limits, run_program, run_programs

SHORT = Limits(seconds=1.0)


def run(program, **options):
    return run_program(program, allowed=True, **options)


@pytest.mark.parametrize(
    "program",
    [
        "x = 1",
        "import re, math, hashlib, collections\nassert re.sub('a', 'b', 'aa') == 'bb'",
        "with open('own.txt', 'w') as f: f.write('x')\nassert open('own.txt').read() == 'x'",
        "import os\nos.mkdir('d')\nos.rmdir('d')\nassert os.listdir() == []",
        "import asyncio\nasync def f(): return 1\nassert asyncio.run(f()) == 1",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "import numpy\nassert numpy.ones(3).sum() == 3",
        "import sys\nsys.stdout.write('x' * 1000)\nassert sys.stdin.read() == ''",
    ],
)
def test_ordinary_programs_pass(program):
    assert run(program) == run("pass")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'no'", "failed: AssertionError: no"),
        ("def f(:", "failed: SyntaxError"),
        ("raise SystemExit(0)", "failed: SystemExit"),
        ("import os\nos._exit(0)", "ended without a result"),
        ("import os\nos.abort()", "ended without a result"),
        ("x = bytearray(10 << 30)", "failed: MemoryError"),
        ("with open('big', 'wb') as f:\n while True: f.write(bytes(1 << 20))", "failed: OSError"),
        ("input()", "failed: EOFError"),
        ("while True: pass", "stopped after 1 s"),
        ("while True: print('x' * 1000)", "stopped after 1 s"),
        ("import os\nwhile True: os.fork()", "refused: another process"),
        ("import subprocess\nsubprocess.Popen(['true'])", "refused: another process"),
        ("import os\nos.kill(os.getppid(), 9)", "refused: another process"),
        ("import socket\nsocket.socket()", "refused: a socket"),
        ("import socket\nsocket.getaddrinfo('localhost', 80)", "refused: a socket"),
        ("import ctypes\nctypes.CDLL(None)", "refused: native code"),
    ],
)
def test_what_is_stopped_is_a_failure(program, reason):
    outcome = run(program, limits=SHORT)
    assert not outcome.passed
    assert outcome.reason.startswith(reason)


def test_a_caught_refusal_is_still_a_failure():
    program = "import socket\ntry:\n socket.socket()\nexcept BaseException: pass"
    assert run(program).reason.startswith("refused")


def test_a_forged_verdict_is_no_verdict():
    forger = "import os\nfor fd in range(3, 64):\n try: os.write(fd, b'{\"passed\": true}\\n')\n"
    outcome = run(forger + " except OSError: pass\nassert False")
    assert not outcome.passed


@pytest.mark.parametrize("layers", [("kernel", "python"), ("kernel",), ("python",)])
def test_writes_and_deletes_elsewhere(layers, tmp_path):
    kept = tmp_path / "kept.txt"
    kept.write_text("mine")
    os.chmod(tmp_path, 0o777)
    os.chmod(kept, 0o666)
    for program in (
        f"open({str(kept)!r}, 'w').write('yours')",
        f"import os\nos.remove({str(kept)!r})",
        f"import os\nos.open({str(tmp_path / 'new')!r}, os.O_CREAT | os.O_WRONLY)",
        f"import os\nos.symlink({str(tmp_path)!r}, 'link')\nopen('link/new', 'w')",
    ):
        outcome = run(program, layers=layers)
        if layers == ("kernel",) and outcome.isolation["files"] != "kernel":
            pytest.skip("this machine gives a process no mounts of its own")
        assert not outcome.passed, program
    assert kept.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [kept]


def test_the_kernel_alone_keeps_a_program_from_the_network():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"
        outcome = run(program, layers=("kernel",))
        open_door = run(program, layers=())
        server.shutdown()
    assert open_door.passed  # the program is right: what stops it is the sandbox
    if outcome.isolation["network"] != "kernel":
        pytest.skip("this machine gives a process no network of its own")
    assert "OSError" in outcome.reason or "unreachable" in outcome.reason


def test_the_kernel_alone_stops_a_fork_bomb_and_whatever_it_left_behind():
    marker = f"lorapro-left-behind-{os.getpid()}"
    bomb = (
        "import os, sys, time\n"
        "for _ in range(40):\n"
        "    if os.fork() == 0:\n"
        f"        open('{marker}', 'w')\n"
        "        os.setsid()\n"
        "        time.sleep(60)\n"
    )
    outcome = run(bomb, layers=("kernel",), limits=SHORT)
    if outcome.isolation["processes"] != "kernel" or outcome.isolation["network"] != "kernel":
        pytest.skip("this machine does not limit the processes of one program")
    assert not outcome.passed
    time.sleep(0.1)
    assert not [p for p in processes() if marker in p]


def processes():
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                yield " ".join(os.listdir(f"/proc/{entry}/cwd"))
            except OSError:
                continue


def test_nothing_of_the_user_s_environment_is_seen(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert run("import os\nassert 'OPENAI_API_KEY' not in os.environ").passed


def test_many_at_once_come_back_in_order():
    programs = [f"assert {i} % 3" for i in range(9)]
    done = []
    outcomes = run_programs(programs, allowed=True, on_done=lambda: done.append(1))
    assert [o.passed for o in outcomes] == [bool(i % 3) for i in range(9)]
    assert len(done) == 9


def test_without_permission_nothing_runs(tmp_path):
    for call in (lambda: run_program("", allowed=False), lambda: run_programs([], allowed=False)):
        with pytest.raises(UserError, match="--allow-code-execution true") as caught:
            call()
        assert "\n" not in str(caught.value)
