"""What a step costs at sizes that nobody tried here: memory, operations, bytes sent, by formula.

    python benchmarks/scale.py
    python benchmarks/scale.py --rank 64

Nothing is run. tests/distributed/test_scale.py compares the formulas with what is counted on small
cases: bytes of state, operations of all matrix products, bytes that go into collectives.

Shape letters: m, n rows and columns of W; r rank; w processes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import table

PROCESSES = (8, 64, 1024)
FLOAT32, FLOAT64 = 4, 8


@dataclass(frozen=True)
class Mode:
    """What one pair costs in a step; products of matrices count two operations a term.

    Attributes:
        factors: copies of the factors in its state, in float32.
        sides: copies of one number a row and a column.
        moments: copies of W.
        m, n: operations a row of B and a column of A, in r².
        mn: operations an entry of W, in r.
        cube: operations that every process does, in r³.
        reduced: (r, r) matrices in float64 that are summed over processes.
        moved: rows of A that change hands, in r.
    """

    factors: int
    m: int
    n: int
    cube: int
    reduced: int
    sides: int = 0
    moments: int = 0
    mn: int = 0
    moved: int = 0

    def state(self, m: int, n: int, r: int) -> float:
        """Bytes of optimizer state."""
        copies = self.factors * r * (m + n) + self.sides * (m + n) + self.moments * m * n
        return FLOAT32 * copies

    def operations(self, m: int, n: int, r: int, w: int = 1) -> float:
        """Operations of one process."""
        long = self.mn * m * n * r + r**2 * (self.m * m + self.n * n)
        return long / w + self.cube * r**3

    def reduced_bytes(self, r: int) -> float:
        """Bytes that a process puts into all-reduces."""
        return FLOAT64 * self.reduced * r**2

    def moved_bytes(self, n: int, r: int) -> float:
        """Bytes that a process puts into all-to-alls."""
        return FLOAT32 * self.moved * r * n

    def sent(self, n: int, r: int, w: int) -> float:
        """Bytes that leave a process, as rings send them."""
        return (w - 1) / w * (2 * self.reduced_bytes(r) + self.moved_bytes(n, r))


# With damping, for which SGD and full mode sum one matrix more over processes.
MODES = {
    "efficient": Mode(factors=2, m=8, n=10, cube=94, reduced=3),
    "factored": Mode(factors=1, sides=1, m=32, n=32, cube=58, reduced=14),
    "muon": Mode(factors=1, m=8, n=8, cube=118, reduced=4),
    "sgd": Mode(factors=1, m=8, n=10, cube=94, reduced=4),
    "full": Mode(factors=0, moments=2, mn=8, m=14, n=16, cube=96, reduced=4, moved=3),
}


def zero_bytes(m: int, n: int, r: int) -> float:
    """Bytes that a process puts into the all-reduce of efficient mode under ZeRO 1 and 2."""
    return FLOAT32 * r * (m + n)


@dataclass(frozen=True)
class Model:
    """Linear layers as (rows, columns, how many), and how many weights there are beside them."""

    layers: tuple[tuple[int, int, int], ...]
    others: int

    @property
    def weights(self) -> int:
        """All of them."""
        return self.others + sum(m * n * k for m, n, k in self.layers)


def llama(hidden: int, wide: int, keys: int, depth: int, vocabulary: int = 32000) -> Model:
    """Attention and gated feed-forward layers of a Llama."""
    attention = ((hidden, hidden, 2 * depth), (keys, hidden, 2 * depth))
    feed_forward = ((wide, hidden, 2 * depth), (hidden, wide, depth))
    return Model(attention + feed_forward, 2 * vocabulary * hidden)


def mixture(hidden: int, wide: int, keys: int, depth: int, experts: int, expert: int) -> Model:
    """Every other layer is a mixture: experts, and one that all tokens share."""
    half = depth // 2
    attention = ((hidden, hidden, 2 * depth), (keys, hidden, 2 * depth))
    dense = ((wide, hidden, 2 * half), (hidden, wide, half))
    sparse = half * (experts + 1)
    return Model(
        (*attention, *dense, (expert, hidden, 2 * sparse), (hidden, expert, sparse)),
        2 * 202048 * hidden,
    )


MODELS = {
    "Llama-2-7B": llama(4096, 11008, 4096, 32),
    "Llama-2-70B": llama(8192, 28672, 1024, 80),
    "a mixture of 400B": mixture(5120, 16384, 1024, 48, experts=128, expert=8192),
}


def size(number: float, units: Sequence[str] = ("B", "kB", "MB", "GB", "TB")) -> str:
    """A number of bytes, or of operations, in three figures."""
    for unit in units[:-1]:
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} {units[-1]}"


def rows(model: Model, rank: int, w: int) -> list[list[str]]:
    """One row a mode: what each of w processes holds, computes and sends in a step."""
    found = []
    layers = model.layers
    for name, mode in MODES.items():
        state = sum(k * mode.state(m, n, rank) for m, n, k in layers) / w
        work = sum(k * mode.operations(m, n, rank, w) for m, n, k in layers)
        sent = sum(k * mode.sent(n, rank, w) for _, n, k in layers)
        cells = [size(state), size(work, ("", "k", "M", "G", "T")), size(sent)]
        found.append([f"{name}, FSDP2", str(w), *cells])
    mode = MODES["efficient"]
    state = sum(k * mode.state(m, n, rank) for m, n, k in layers) / w
    work = sum(k * mode.operations(m, n, rank) for m, n, k in layers)
    sent = sum(k * 2 * (w - 1) / w * zero_bytes(m, n, rank) for m, n, k in layers)
    cells = [size(state), size(work, ("", "k", "M", "G", "T")), size(sent)]
    found.append(["efficient, ZeRO 1 and 2", str(w), *cells])
    gradients = sum(k * (w - 1) / w * FLOAT32 * rank * (m + n) for m, n, k in layers)
    found.append(["LoRA's gradients, for comparison", str(w), "", "", size(gradients)])
    return found


def main(argv: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = made.parse_args(argv)
    parts = [
        "# scale",
        f"Nothing here was run: formulas, at r = {arguments.rank}, of one step of the optimizer on "
        "adapters of all linear layers, for each process. Operations are those of matrix products; "
        "bytes are those that leave a process in rings, beside what FSDP2 or ZeRO send anyway; "
        "state is float32. FSDP2 is that of `lorapro.distributed.shard_placement`, with dimensions "
        "that the processes divide; where they do not, A changes hands as well. The formulas are "
        "checked against counts of small cases in `tests/distributed/test_scale.py`.",
    ]
    header = ["optimizer", "processes", "state", "operations", "sent"]
    for name, model in MODELS.items():
        pairs = sum(k for _, _, k in model.layers)
        parts.append(f"## {name}: {model.weights / 1e9:.3g}·10⁹ weights, {pairs} pairs")
        parts.append(table(header, [r for w in PROCESSES for r in rows(model, arguments.rank, w)]))
    text = "\n\n".join(parts) + "\n"
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "scale.md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
