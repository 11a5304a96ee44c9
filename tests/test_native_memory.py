"""The C files under the compiler's sanitizers: no access outside what they were given."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import lorapro.optim.native

SOURCES = Path(lorapro.optim.native.__file__).parent
DRIVER = Path(__file__).parent / "native" / "random_pairs.c"
RULES = sorted(path.stem for path in SOURCES.glob("*.c"))
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=alignment", "-fno-sanitize-recover"]


def built(rule: str, real: str, folder: Path) -> Path:
    program = folder / "program"
    source = folder / "program.c"
    source.write_text(f'#include "{SOURCES / rule}.c"\n#include "{DRIVER}"\n')
    command = [
        *("cc", "-O1", "-march=native", "-std=gnu11", "-fno-strict-aliasing", *SANITIZE),
        *(f"-DREAL={real}", f"-DRULE=lorapro_{rule}", f"-DWHOLE={int(rule == 'full')}"),
        *(f"-I{SOURCES}", str(source), "-o", str(program), "-lm"),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return program


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "empty.c").write_text("int main(void) { return 0; }")
    command = ["cc", *SANITIZE, str(folder / "empty.c"), "-o", str(folder / "empty")]
    try:
        subprocess.run(command, check=True, capture_output=True)
        subprocess.run([str(folder / "empty")], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no compiler with sanitizers: {error}")


@pytest.mark.parametrize("real", ["float", "double"])
@pytest.mark.parametrize("rule", RULES)
def test_nothing_is_touched_outside(rule, real, tmp_path, sanitizers):
    run = subprocess.run([str(built(rule, real, tmp_path))], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[:2000]
    assert int(run.stdout) > 100  # most pairs were stepped
