"""The code blocks of the Markdown pages, for tests that run them."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
        *(ROOT / "results").rglob("README.md"),
    ]
)

# ```lang … ``` at any indentation, with an HTML comment of ours right above.
_BLOCK = re.compile(
    r"(?:^[ \t]*<!--[ \t]*(?P<mark>(?:not run|fresh)\b[^>]*?)[ \t]*-->[ \t]*\n)?"
    r"^(?P<indent>[ \t]*)(?P<fence>`{3,})(?P<language>\w*)[^\n]*\n"
    r"(?P<code>.*?)^(?P=indent)(?P=fence)[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
SHELLS = ("sh", "bash", "shell", "console")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: relative to the repository.
        line: of its first line of code.
        language: as behind the fence.
        code: without the page's indentation.
        mark: ``"not run: why"``, ``"fresh"`` (it does not go on where the block before ended), or
            ``""``.
    """

    page: str
    line: int
    language: str
    code: str
    mark: str

    @property
    def runs(self) -> bool:
        return not self.mark.startswith("not run")

    @property
    def reason(self) -> str:
        return self.mark.removeprefix("not run").lstrip(": ,")

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(path: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages, in order."""
    text = path.read_text(encoding="utf-8")
    return [
        Block(
            path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name,
            text.count("\n", 0, found.start("code")) + 1,
            found["language"],
            textwrap.dedent(found["code"]),
            found["mark"] or "",
        )
        for found in _BLOCK.finditer(text)
        if found["language"] in languages
    ]


def commands(block: Block) -> list[list[str]]:
    """The command lines of a shell block as lists of arguments, comments and outputs left out."""
    lines = block.code.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in split if words]
