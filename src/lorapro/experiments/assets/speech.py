"""Builder of spoken sentences: espeak-ng reads a text-to-text task aloud."""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
from pathlib import Path

from lorapro.experiments.assets.tables import examples_of, write_rows
from lorapro.experiments.errors import UserError

__all__ = ["spoken"]

RATE = 16_000
COUNT = 1_200


def spoken(source: Path, target: Path) -> None:
    """Write ``train.jsonl`` (``audio``, ``text``, ``output``, ``kind``) and 16 kHz recordings.

    Raises:
        UserError: espeak-ng is not installed.
    """
    if shutil.which("espeak-ng") is None:
        raise UserError("speech is made by espeak-ng, which is not installed: install that package")
    examples = list(examples_of(source))
    random.Random(0).shuffle(examples)
    (target / "audio").mkdir()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, example in enumerate(examples[:COUNT]):
            file = f"audio/{number:04d}.wav"
            _say(example["input"], Path(scratch) / "said.wav", target / file)
            rows.append(
                {
                    "audio": file,
                    "text": example["input"],
                    "output": example["target"],
                    "kind": example["comment"],
                }
            )
    write_rows(target / "train.jsonl", rows)


def _say(text: str, scratch: Path, path: Path) -> None:
    """Speak a text, resample it, save it."""
    import numpy as np
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    command = ["espeak-ng", "-v", "en-us", "-w", str(scratch), "--stdin"]
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    if done.returncode != 0 or not scratch.is_file():
        raise UserError(f"espeak-ng failed: {done.stderr.decode(errors='replace').strip()[:120]}")
    rate, samples = wavfile.read(scratch)
    common = np.gcd(rate, RATE)
    at_rate = resample_poly(samples.astype(np.float64), RATE // common, rate // common)
    wavfile.write(path, RATE, np.clip(at_rate, -32768, 32767).astype(np.int16))
