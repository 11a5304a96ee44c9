"""``lorapro export TARGET OUT``: a portable adapter for the original base, or a merged model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorapro.cli.common import Parser, report_line
from lorapro.experiments.errors import UserError

__all__ = ["run"]

DESCRIPTION = """\
Write what a run has learnt in a form that others can load. TARGET is a run's folder, one of its
checkpoints, or the folder of a PEFT adapter (its base model is the one it names, or --model).

Without --merged OUT gets a plain LoRA adapter for the original base model: rank 2r for adapters
that did not start at zero (LoRA-GA, PiSSA), r for the others; --rank N cuts it down and says what
is lost. With --merged OUT gets the whole model. Tokenizer, names of the labels and a model card go
with it."""


def run(arguments: Sequence[str]) -> None:
    """Export and print what was written."""
    parser = Parser(
        "export",
        usage="lorapro export TARGET OUT [--merged] [--rank N] [--model NAME]",
        description=DESCRIPTION,
    )
    parser.add_argument("target", metavar="TARGET", help="run, checkpoint or adapter")
    parser.add_argument("out", metavar="OUT", help="folder to write; must not hold anything yet")
    parser.add_argument("--merged", action="store_true", help="write the whole model")
    parser.add_argument("--rank", type=int, help="cut the adapter down to this rank")
    parser.add_argument("--model", help="base model, for an adapter that does not name it")
    known = parser.parse_strictly(arguments)
    target, out = Path(known.target), Path(known.out)
    if not target.exists():
        raise UserError(f"no file or folder {str(target)!r}")
    if not target.is_dir():
        raise UserError(f"{target} is a file; expected a run, a checkpoint or an adapter's folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; give a new one")
    if known.rank is not None and known.rank < 1:
        raise UserError(f"--rank must be at least 1, found {known.rank}")
    if known.merged and known.rank is not None:
        raise UserError("--rank is for an adapter; a merged model (--merged) has no rank")

    from lorapro.cli.common import quiet_libraries
    from lorapro.experiments import folders
    from lorapro.experiments.restore import load_any
    from lorapro.experiments.saved import copy_beside, find_about
    from lorapro.export import save_merged, save_portable

    quiet_libraries()
    flags = [] if known.model is None else ["--model", known.model]
    model = load_any(target, flags, report_line)
    adapter = target / folders.ADAPTER if (target / folders.ADAPTER).is_dir() else target
    try:
        if known.merged:
            save_merged(model, out, in_place=True)
            print(f"{out}: merged model")
        else:
            print(save_portable(model, out, rank=known.rank))
    except (ValueError, FileNotFoundError) as error:
        raise UserError(" ".join(str(error).split())) from error
    copy_beside(adapter, out, find_about(target))
