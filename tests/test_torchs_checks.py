"""torch's own checks of optimizers hold for ours, where they apply (``torchs_checks.py``)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

CHECKS, CLASSES = 11, 5


def test_torchs_own_checks_pass():
    """In a process of their own: importing them freezes ``torch.backends`` and reads argv."""
    done = subprocess.run(
        [sys.executable, "-m", "unittest", "torchs_checks"],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    (ran,) = re.findall(r"^Ran (\d+) tests", done.stderr, re.MULTILINE)
    assert int(ran) == CHECKS * CLASSES
    assert "skipped" not in done.stderr
