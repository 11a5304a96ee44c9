"""``lorapro generate TARGET --prompt TEXT``: answers of a trained language model."""

from __future__ import annotations

from collections.abc import Sequence

from lorapro.cli.answers import at_least, writable, write_rows
from lorapro.cli.common import Parser, quiet_libraries, report_line
from lorapro.experiments.errors import UserError

__all__ = ["run"]

DESCRIPTION = """\
Let a trained language model answer. TARGET is a run, what it saved (its 'adapter', say, moved
anywhere), a checkpoint of it or an export. A prompt is put as the training put it: through the chat
template, into the prompt's words. Without --temperature the answer is the most probable one, token
by token."""


def run(arguments: Sequence[str]) -> None:
    """Generate and print or write."""
    parser = Parser(
        "generate",
        usage="lorapro generate TARGET (--prompt TEXT ... | --data FILE) [--temperature T]",
        description=DESCRIPTION,
    )
    parser.add_argument("target", metavar="TARGET", help="run, adapter, model, checkpoint")
    parser.add_argument("--prompt", nargs="+", help="prompts, each answered for itself")
    parser.add_argument("--data", help="or a file of rows, as the training data had them")
    parser.add_argument("--system", help="system message, of conversations")
    parser.add_argument("--max_new_tokens", type=int, help="longest answer [the training's]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy [0]")
    parser.add_argument("--output", help="file to write, .jsonl or .csv")
    parser.add_argument("--limit", type=int, default=0, help="rows of --data at most")
    parser.add_argument("--batch_size", type=int, default=8, help="answers at a time [8]")
    parser.add_argument("--model", help="base model, instead of the one that the adapter names")
    known = parser.parse_strictly(arguments)
    at_least(0, limit=known.limit)
    at_least(1, batch_size=known.batch_size)
    if known.max_new_tokens is not None:
        at_least(1, max_new_tokens=known.max_new_tokens)
    if not 0 <= known.temperature < float("inf"):
        raise UserError(f"--temperature must be 0 or more, found {known.temperature:g}")
    writable(known.output)
    if (known.data is None) == (not known.prompt):
        raise UserError("give --prompt TEXT or --data FILE (one of them)")

    quiet_libraries()  # before anything imports them
    from lorapro.experiments.restore import predict_target

    rows = predict_target(
        known.target,
        data=known.data,
        texts=known.prompt or (),
        batch_size=known.batch_size,
        limit=known.limit,
        model=known.model,
        settings={
            "max_new_tokens": known.max_new_tokens,
            "temperature": known.temperature or None,
            "system": known.system,
        },
        log=report_line,
    )
    if "probability" in rows[0]:
        raise UserError(f"{known.target} is no language model; use: lorapro predict")
    if known.prompt and known.output is None:
        print("\n\n".join(str(row["prediction"]) for row in rows))
    else:
        write_rows(rows, known.output)
