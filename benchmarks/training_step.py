"""A whole training step of SmolLM2-135M beside plain LoRA with AdamW.

    python benchmarks/training_step.py                  # r = 8 and 32, batch 4 x 128 tokens
    python benchmarks/training_step.py --direct         # the second table of each rank too

The optimizers differ in ``step`` alone: forward and backward are the same program on the same
tensors. On a CPU they take seconds and vary by more than the milliseconds of an optimizer, so
whole steps timed one after the other compare two samples of one forward pass above all. The first
table therefore times forward, backward and zero_grad once in every round, and in the same round
the step of each optimizer on its own copy of the factors and of that pass's gradients. The ratio
is (forward + backward + step) over the same with LoRA's AdamW. What this leaves out: how a step
finds caches and allocator after a backward pass. Each finds gradients just copied, as all others.

``--direct`` is the check on that: each optimizer has an adapter of its own on one base model, and
whole steps are timed as they are, interleaved. Its quartiles say what this can tell apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import contestants
import torch
from common import (
    Entry,
    Report,
    check,
    device,
    interleave,
    milliseconds,
    parser,
    ratio,
    summary,
    table,
)
from common import times as as_ratio
from contestants import CONTESTANTS, SCALING, Factors

from lorapro.experiments.assets import asset_path
from lorapro.factors import LoraPair, find_pairs

MODEL = "smollm2-135m-instruct"
CHOICES = ("adamw-foreach", "adamw-fused", "efficient", "factored", "full", "muon", "sgd")
OPTIMIZERS = ("adamw-fused", "efficient", "factored", "full", "muon")
REFERENCE = "adamw-fused"
PASS = "forward and backward"


def load(name: str) -> Any:
    """The base model in float32, or a tiny random Llama."""
    from transformers import AutoModelForCausalLM, LlamaConfig, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    if name != "tiny":
        return AutoModelForCausalLM.from_pretrained(asset_path(name), dtype=torch.float32).to(
            device()
        )
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads)).to(device())


def with_lora(base: Any, rank: int, names: list[str]) -> Any:
    """Adapters of the names given on all linear layers, with the benchmarks' factors."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules="all-linear")
    model = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for name in names:
        model.set_adapter(name)
        pairs = find_pairs(model, name).pairs
        made = contestants.make_factors([p.shape for p in pairs], rank)
        for pair, factors in zip(pairs, made, strict=True):
            pair.A.data.copy_(factors.A)
            pair.B.data.copy_(factors.B)
    return model.train()


def forward_backward(model: Any, arguments: argparse.Namespace) -> Callable[[], Any]:
    """One pass over a batch of random tokens."""
    generator = torch.Generator().manual_seed(0)
    size = (arguments.batch, arguments.length)
    ids = torch.randint(0, model.config.vocab_size, size, generator=generator).to(device())
    return lambda: model(input_ids=ids, labels=ids).loss.backward()


def composed(arguments: argparse.Namespace, rank: int) -> list[dict[str, Any]]:
    """One pass of the model and the step of each optimizer on copies, in every round."""
    model = with_lora(load(arguments.model), rank, ["default"])
    trained = [p for p in model.parameters() if p.requires_grad]
    one_pass = forward_backward(model, arguments)
    one_pass()
    factors = [
        Factors(p.A.detach(), p.B.detach(), p.A.grad.clone(), p.B.grad.clone())
        for p in find_pairs(model).pairs
    ]

    def whole_pass() -> None:
        one_pass()
        for p in trained:
            p.grad = None

    entries = [Entry(PASS, whole_pass)]
    for name in arguments.only:
        adapters = contestants.Adapters(factors)
        step = CONTESTANTS[name].make(adapters, arguments.x).step
        entries.append(Entry(name, step, adapters.restore))
    seconds = interleave(entries, arguments.rounds)
    passes = seconds.pop(PASS)
    totals = {k: [a + b for a, b in zip(passes, v, strict=True)] for k, v in seconds.items()}
    rows = rows_of(totals)
    for row in rows:
        row["step"] = {"seconds": seconds[row["name"]], **summary(seconds[row["name"]])}
        row["share"] = row["step"]["median"] / row["median"]
    return rows


@dataclass
class OwnAdapter:
    """One adapter of a model, seen as the contestants see their copies."""

    own: list[LoraPair]

    def pairs(self) -> list[LoraPair]:
        return self.own

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        return (p for pair in self.own for p in (pair.A, pair.B))


def direct(arguments: argparse.Namespace, rank: int) -> list[dict[str, Any]]:
    """Whole steps as they are, each optimizer with an adapter of its own on one base."""
    model = with_lora(load(arguments.model), rank, arguments.only)
    one_pass = forward_backward(model, arguments)

    def entry(name: str) -> Entry:
        model.set_adapter(name)
        own: Any = OwnAdapter(list(find_pairs(model, name).pairs))
        optimizer = CONTESTANTS[name].make(own, arguments.x)

        def step() -> None:
            one_pass()
            optimizer.step()
            optimizer.zero_grad()

        return Entry(name, step, lambda: model.set_adapter(name))

    return rows_of(interleave([entry(name) for name in arguments.only], arguments.rounds))


def rows_of(seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    rows = []
    for name, found in seconds.items():
        row: dict[str, Any] = {"name": name, "seconds": found, **summary(found)}
        if REFERENCE in seconds:
            row["ratio"] = ratio(found, seconds[REFERENCE])
        rows.append(row)
    return rows


def as_table(rows: list[dict[str, Any]]) -> str:
    header, cells = ["optimizer", "ms a whole step"], []
    parts = "step" in rows[0]
    header += ["its optimizer, ms", "share"] if parts else []
    header += [f"× {REFERENCE}"] if "ratio" in rows[0] else []
    for row in rows:
        line = [row["name"], milliseconds(row)]
        line += [milliseconds(row["step"]), f"{row['share']:.1%}"] if parts else []
        line += [as_ratio(row["ratio"], digits=4)] if "ratio" in row else []
        cells.append(line)
    return table(header, cells)


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--model", default=MODEL, help="an asset, a local path, or tiny")
    made.add_argument("--ranks", nargs="+", type=int, default=[8, 32])
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    made.add_argument("--direct", action="store_true", help="time whole steps as they are too")
    contestants.add_choice(made, OPTIMIZERS, CHOICES)
    arguments = made.parse_args(argv)
    check(made, arguments)
    about = (
        f"{arguments.model}, batch {arguments.batch} × {arguments.length} tokens, LoRA on all "
        f"linear layers; medians of {arguments.rounds} interleaved rounds, quartiles in "
        f"parentheses; X: {arguments.x}."
    )
    report = Report("training_step", about, arguments)
    for rank in arguments.ranks:
        rows = composed(arguments, rank)
        report.add(f"r = {rank}, one pass a round for all", as_table(rows), rows, rank=rank)
        if arguments.direct:
            rows = direct(arguments, rank)
            report.add(f"r = {rank}, whole steps as they are", as_table(rows), rows, rank=rank)


if __name__ == "__main__":
    main()
