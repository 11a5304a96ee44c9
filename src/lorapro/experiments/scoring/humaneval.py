"""HumanEval: from what a model says to programs, and pass@1 of those that run.

The prompt and the cleaning of answers are those of LoRA-GA's evaluation, which LoRA-Pro shares;
the program is openai/human-eval's: prompt, completion, test.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lorapro.experiments.errors import UserError

__all__ = ["clean_completion", "complete_program", "paper_prompt", "pass_at_1", "until_stop"]

COLUMNS = ("task_id", "prompt", "entry_point", "test")

# A space begins the second line, one ends "code: ", as in the papers' evaluation.
_PROMPT = """\
Below is an instruction that describes a task.
 Write a response that appropriately completes the request.

### Instruction:
Complete the following Python code:\x20
Notes: respond with the entire complete function definition
do not add any comments, be as concise in your code as possible
use only built-in libraries, assume no additional imports other than those provided (if any)
use `    ` (4 spaces) for each level of indentation

code:
```python
{PROMPT}
```

### Response:
```python
"""

_DOCSTRING = re.compile(r'""".*?"""|\'\'\'.*?\'\'\'', re.DOTALL)
_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


def paper_prompt(problem: dict[str, Any]) -> str:
    """Return the papers' instruction for one problem.

    >>> paper_prompt({"prompt": "def one():"}).splitlines()[-4:]
    ['```', '', '### Response:', '```python']
    """
    return _PROMPT.replace("{PROMPT}", str(problem["prompt"]))


def clean_completion(text: str) -> str:
    """Return an answer as the papers make a completion of it.

    Fences, docstrings and blank lines go, tabs become four spaces, and lines are indented anew: the
    distinct indentations above that of the first line with ``def`` (of column 0 if there is none)
    become levels of four spaces each, all others level 0.

    >>> print(clean_completion("def f(x):\\n  if x:\\n      return 1\\n```"))
    def f(x):
        if x:
            return 1
    """
    text = _DOCSTRING.sub("", text.replace("```", "").replace("\t", "    "))
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    widths = [len(line) - len(line.lstrip(" ")) for line in lines]
    base = next((w for line, w in zip(lines, widths, strict=True) if "def" in line), 0)
    deeper = sorted({width for width in widths if width > base})
    level = {width: number for number, width in enumerate(deeper, start=1)}
    return "\n".join(
        "    " * level.get(width, 0) + line.lstrip()
        for line, width in zip(lines, widths, strict=True)
    )


def until_stop(text: str) -> str:
    """Return ``text`` up to the first of the words at which lm-eval's task stops generating.

    >>> until_stop("    return 1\\n\\ndef other():")
    '    return 1\\n'
    """
    ends = [at for stop in _STOPS if (at := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def complete_program(problem: dict[str, Any], completion: str) -> str:
    """Return the program that passes if ``completion`` is right."""
    check = f"check({problem['entry_point']})"
    return f"{problem['prompt']}{completion}\n{problem['test']}\n{check}"


def pass_at_1(passed: Sequence[Sequence[bool]]) -> float:
    """Return the mean over problems of the share of samples that passed.

    Raises:
        UserError: no problem, or one without a sample.

    >>> pass_at_1([[True, False], [True, True]])
    0.75
    """
    if not passed or not all(passed):
        raise UserError("HumanEval needs at least one problem and one sample for each")
    return sum(sum(samples) / len(samples) for samples in passed) / len(passed)
