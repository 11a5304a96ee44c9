"""Kill a Trainer run again and again, at moments of all kinds; nothing may be lost.

    python benchmarks/kill_and_resume.py --kills 200
    python benchmarks/kill_and_resume.py --kills 20 --bits 4  # QLoRA, Muon on the tangent space

A run of a tiny Llama (LoRA-GA on a frozen base, factored mode, a checkpoint every second step, only
the newest kept) is started in one folder, killed, started again with what lies there, and so on.
Kills come ``at`` a random time, as the run is about to open, make, rename or remove its n-th file,
or by the kernel in the middle of writing: the file grows past a limit. After each, the last
checkpoint that was complete has to be there; each run that reaches its end has to have the weights
of an undisturbed one, bit for bit. Prints one line of JSON. Needs fork, so no Windows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import lorapro

KINDS = ("time", "file", "byte")
EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


class Progress(TrainerCallback):
    """Writes the steps of each checkpoint that Trainer has come to the end of."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.file.write_text(str(state.global_step))


def in_4_bits(model: torch.nn.Module) -> None:
    """Store every linear layer but the head in 4 bits of bitsandbytes."""
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            twin = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False)
            twin.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, twin.to("cpu"))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


def train(folder: Path, steps: int, bits: int) -> None:
    """One run, or the rest of it; the trained weights go beside the checkpoints."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    if bits == 4:
        in_4_bits(model)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1))
    ids = torch.randint(1, 16, (16, 6), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": ids, "labels": ids}]
    lorapro.lora_ga.initialize(model, batches, base="frozen", estimator="sketch")
    args = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=steps,
        save_steps=2,
        save_total_limit=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    rule: dict[str, str] = {"optimizer": "muon"} if bits == 4 else {"mode": "factored"}
    trainer = Trainer(
        model,
        args=args,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        optimizer_cls_and_kwargs=lorapro.trainer_optimizer(args, lr=1e-2, **rule),
        callbacks=[lorapro.checkpoints.CompleteCheckpoints(), Progress(folder / "progress")],
    )
    found = lorapro.checkpoints.last_complete(args.output_dir)
    trainer.train(resume_from_checkpoint=found and True)  # Trainer finds it by itself
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    torch.save(weights, folder / "trained.part")
    (folder / "trained.part").rename(folder / "trained.pt")


def child(work: Callable[[], object], before: Callable[[], object] = lambda: None) -> int:
    """Do something in a process of its own; its pid."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            before()
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def on_event(folder: Path, act: Callable[[int], object]) -> None:
    """Call ``act(n)`` as this process is about to touch its n-th file under a folder."""
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event == "open" and "r" not in str(args[1] or "r")
        if (writes or event in EVENTS) and str(folder) in str(args[0]):
            count += 1
            act(count)

    sys.addaudithook(hook)


def limit_files(size: int) -> None:
    """Let the kernel kill this process when it writes a file longer than so many bytes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def disturb(
    kind: str, at: float, folder: Path, options: argparse.Namespace, count: Path | None = None
) -> int:
    """A run that is killed; its exit code."""

    def before() -> None:
        if kind == "byte":
            limit_files(int(at))
        elif kind == "file":
            on_event(folder, lambda n: n == int(at) and os.kill(os.getpid(), signal.SIGKILL))
        elif count is not None:
            on_event(folder, lambda n: os.environ.update(EVENTS=str(n)))

    def work() -> None:
        train(folder, options.steps, options.bits)
        if count is not None:
            count.write_text(os.environ["EVENTS"])

    pid = child(work, before)
    if kind == "time":
        time.sleep(at)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run; return and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--at", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--bits", type=int, choices=(4, 32), default=32, help="of the base")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    draw = random.Random(options.seed)
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        whole, folder = Path(scratch, "whole"), Path(scratch, "killed")
        whole.mkdir()
        began = time.perf_counter()
        if disturb("none", 0, whole, options, count := Path(scratch, "count")) != 0:
            raise RuntimeError("the undisturbed run failed")
        duration, events = time.perf_counter() - began, int(count.read_text())
        largest = max(p.stat().st_size for p in whole.rglob("*") if p.is_file())
        expected = torch.load(whole / "trained.pt", weights_only=True)
        kills = 0
        while kills < options.kills:
            folder.mkdir(exist_ok=True)
            kind = options.at[kills % len(options.at)]
            ends = {"time": duration, "file": events, "byte": largest}
            at = draw.uniform(0.0 if kind == "time" else 1.0, ends[kind])
            code = disturb(kind, at, folder, options)
            kills += 1
            seen[f"{kind}: exit {code}"] += 1
            promised = folder / "progress"
            found = lorapro.checkpoints.last_complete(folder / "out")
            steps = -1 if found is None else int(found.name.split("-")[1])
            if promised.is_file() and steps < int(promised.read_text() or 0):
                seen["lost a complete checkpoint"] += 1
            if kind != "time" and code not in (0, -signal.SIGKILL, -signal.SIGXFSZ):
                seen["failed"] += 1
            seen["killed inside a checkpoint"] += any(
                not lorapro.checkpoints.is_complete(p)
                for p in (folder / "out").glob("checkpoint-*")
            )
            if (folder / "trained.pt").is_file() or kills == options.kills:
                if not (folder / "trained.pt").is_file():
                    disturb("none", 0, folder, options)
                found_weights = torch.load(folder / "trained.pt", weights_only=True)
                same = all(torch.equal(found_weights[k], v) for k, v in expected.items())
                seen["ended with the same weights" if same else "ended with other weights"] += 1
                shutil.rmtree(folder)
    result = {"kills": kills, "files_a_run": events, **dict(sorted(seen.items()))}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
