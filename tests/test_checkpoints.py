"""Trainer's checkpoints: killed at any moment, a full disk, another run's; the last whole one."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import lorapro
from lorapro.checkpoints import CompleteCheckpoints, is_complete, last_complete
from test_trainer import arguments, classifier, sequences

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kill_and_resume.py"


def build(folder, **options):
    optimizer = {"mode": "factored", **options.pop("optimizer", {})}
    args = arguments(TrainingArguments, folder, **{"save_steps": 2, **options})
    return Trainer(
        classifier(),
        args=args,
        train_dataset=sequences(),
        optimizer_cls_and_kwargs=lorapro.trainer_optimizer(args, **optimizer),
        callbacks=[CompleteCheckpoints()],
    )


def weights(trainer):
    return {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of a run that nothing disturbed."""
    trainer = build(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return weights(trainer)


def same(trainer, expected):
    found = weights(trainer)
    return all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_qlora_from_lora_ga_with_muon_killed_inside_saving_ends_with_the_same_weights():
    pytest.importorskip("bitsandbytes")
    seen = killed("--kills", "6", "--bits", "4")
    assert seen["killed inside a checkpoint"] >= 1, seen


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_trainer_killed_at_many_moments_loses_nothing():
    seen = killed("--kills", "21")
    assert seen["byte: exit -25"] >= 8, seen
    assert seen["file: exit -9"] >= 5, seen
    assert seen["killed inside a checkpoint"] >= 5, seen


def killed(*flags):
    """What the script saw."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags, "--steps", "6", "--at", "file", "byte"],
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("{")]
    seen = json.loads(line)
    assert seen["kills"] == int(flags[1])
    assert seen["ended with the same weights"] >= 1, seen
    for bad in ("lost a complete checkpoint", "ended with other weights", "failed"):
        assert bad not in seen, seen
    return seen


@pytest.mark.parametrize("writer", ["optimizer.pt", "trainer_state.json"])
def test_a_full_disk_while_saving_is_an_error_and_the_old_checkpoint_goes_on(
    writer, whole, tmp_path, monkeypatch
):
    def half(path):
        Path(path).write_bytes(b"PK\x03\x04 half of it")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    save = torch.save

    def saving(value, path, *rest, **named):
        full = "checkpoint-4" in str(path) and str(path).endswith(writer)
        return half(path) if full else save(value, path, *rest, **named)

    trainer = build(tmp_path, save_total_limit=1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", saving)
        if writer == "trainer_state.json":
            write = type(trainer.state).save_to_json
            patch.setattr(
                type(trainer.state),
                "save_to_json",
                lambda state, path: half(path) if "checkpoint-4" in path else write(state, path),
            )
        with pytest.raises(OSError, match="No space left on device"):
            trainer.train()
    assert get_last_checkpoint(str(tmp_path)).endswith("checkpoint-4")  # what Trainer would take
    assert last_complete(tmp_path) == tmp_path / "checkpoint-2"
    again = build(tmp_path, save_total_limit=1)
    assert (tmp_path / "incomplete-checkpoint-4").is_dir()
    again.train(resume_from_checkpoint=True)
    assert same(again, whole)


def test_a_run_begun_anew_does_not_go_on_from_what_another_left(whole, tmp_path):
    build(tmp_path, optimizer={"mode": "efficient"}).train()
    trainer = build(tmp_path, max_steps=3)
    trainer.train()
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    assert (tmp_path / "replaced-checkpoint-6").is_dir()
    for steps in (2, 3):
        assert is_complete(tmp_path / f"checkpoint-{steps}")


def test_a_checkpoint_is_complete_only_with_every_file_whole(tmp_path):
    build(tmp_path, save_steps=6).train()
    checkpoint = tmp_path / "checkpoint-6"
    assert last_complete(tmp_path) == checkpoint
    for name in (
        "adapter_model.safetensors",
        "adapter_config.json",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
        "trainer_state.json",
    ):
        path = checkpoint / name
        kept = path.read_bytes()
        for part in (kept[:-1], kept[: len(kept) // 2], b""):
            path.write_bytes(part)
            if name.endswith(".json") and part == kept[:-1] and kept.endswith(b"\n"):
                continue  # without its last line break it is as whole as before
            assert not is_complete(checkpoint), (name, len(part))
        path.write_bytes(kept)
    (checkpoint / "trainer_state.json").unlink()
    assert last_complete(tmp_path) is None


class Trap:
    def __reduce__(self):
        return os.mkdir, (str(Trap.folder),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "adapter_model.bin"])
def test_a_pickle_in_a_checkpoint_is_never_run(name, tmp_path):
    build(tmp_path, save_steps=6).train()
    Trap.folder = tmp_path / "sprung"
    checkpoint = tmp_path / "checkpoint-6"
    torch.save({"state": {}, "param_groups": Trap()}, checkpoint / name)
    assert zipfile.is_zipfile(checkpoint / name)
    if name == "adapter_model.bin":
        (checkpoint / "adapter_model.safetensors").unlink()
    assert last_complete(tmp_path) == checkpoint
    with pytest.raises(Exception, match="(?i)weights.only"):
        build(tmp_path).train(resume_from_checkpoint=True)
    assert not Trap.folder.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "full"}, "mode 'factored', this optimizer runs AdamW, mode 'full'"),
        ({"optimizer": "muon"}, "mode 'factored', this optimizer runs Muon"),
    ],
)
def test_a_checkpoint_of_another_mode_is_refused_by_name(options, message, tmp_path):
    build(tmp_path, max_steps=2).train()
    options = dict(options)
    args = arguments(TrainingArguments, tmp_path)
    if "optimizer" in options:
        options.pop("mode", None)
        value = lorapro.trainer_optimizer(args, options.pop("optimizer"))
    else:
        value = lorapro.trainer_optimizer(args, **{"mode": "factored", **options})
    trainer = Trainer(
        classifier(), args=args, train_dataset=sequences(), optimizer_cls_and_kwargs=value
    )
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
