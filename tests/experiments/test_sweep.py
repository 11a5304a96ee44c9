"""Comparisons where things go wrong: kills, failures, divergence, several processes at a time."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from experiments.tiny_models import write_yaml
from lorapro.cli.main import main
from lorapro.experiments import folders, runner, sweep
from lorapro.experiments.plan import load_comparison
from lorapro.experiments.sweep import compare
from lorapro.experiments.workers import LOST, Processes


@pytest.fixture
def recipe(classify, tmp_path):
    """A comparison of four or more short runs: two rates, then a second seed."""
    values = {k: v for k, v in classify.items() if k not in ("seed", "output_dir")}
    values |= {"methods": {"lora": [1e-3, 3e-3], "lora-ga": [3e-3]}, "seeds": [0, 1]}
    return write_yaml(tmp_path / "c.yaml", values)


def load(recipe, folder, *flags):
    return load_comparison(recipe, ["--output_dir", str(folder), *flags])


def quietly(comparison, **options):
    out = io.StringIO()
    results = compare(comparison, Console(file=out, width=200), **options)
    return results, out.getvalue()


def metrics_of(folder):
    return {
        path.parent.relative_to(folder).as_posix(): json.loads(path.read_text())["metrics"]
        for path in Path(folder).rglob("result.json")
    }


@pytest.fixture
def undisturbed(recipe, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of several processes has it: sums are ordered by threads
    quietly(load(recipe, tmp_path / "undisturbed"))
    found = metrics_of(tmp_path / "undisturbed")
    assert len(found) == 3 + 2
    yield found
    torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["local", "ray"])
def test_several_at_a_time_do_what_one_does(recipe, undisturbed, tmp_path, backend, monkeypatch):
    if backend == "ray":
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        pytest.importorskip("ray")
    comparison = load(recipe, tmp_path / "out")
    results, said = quietly(comparison, processes=2, backend=backend)
    assert metrics_of(tmp_path / "out") == undisturbed
    assert {result["status"] for result in results.values()} == {"finished"}
    assert "[5/5]" in said


def test_a_killed_worker_is_replaced_and_its_run_goes_on(recipe, undisturbed, tmp_path):
    comparison = load(recipe, tmp_path / "out")
    job = sweep.wanted(comparison, {})[0]
    values = job[0].config(*job[1:]).given
    workers = Processes(1)
    try:
        workers.submit("job", values)
        os.kill(workers._workers[0].process.pid, signal.SIGKILL)
        key, result = workers.wait()
        assert (key, result["status"]) == ("job", LOST)
        assert "-9" in result["error"]
        workers.submit("job", values)
        assert workers.wait()[1]["status"] == "finished"
    finally:
        workers.close()
    (name, found), *_ = metrics_of(tmp_path / "out").items()
    assert found == undisturbed[name]


# Fork a comparison that gets SIGKILL as it is about to open, make, rename or remove what a moment
# names; fork it again for the next moment; last of all let it finish.
KILLER = """
import os, re, signal, sys
from lorapro.cli.common import quiet_libraries
quiet_libraries()
import peft, transformers.trainer
from lorapro.experiments import runner
from lorapro.experiments.plan import load_comparison
from lorapro.experiments.sweep import compare

EVENTS = {"open", "os.mkdir", "os.rename", "shutil.rmtree"}
recipe, out, *moments = sys.argv[1:]
for moment in [*moments, None]:
    child = os.fork()
    if child == 0:
        def watch(event, args):
            if event in EVENTS and any(re.search(moment, str(a)) for a in args):
                os.kill(os.getpid(), signal.SIGKILL)
        if moment:
            sys.addaudithook(watch)
        compare(load_comparison(recipe, ["--output_dir", out]))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print("moment", moment, os.waitstatus_to_exitcode(status), flush=True)
"""


def test_kill_9_at_any_moment_loses_nothing(recipe, undisturbed, tmp_path):
    out = tmp_path / "out"
    run, other = "/lora/lr-0.001/seed-0", "/lora-ga/lr-0.003/seed-0"
    moments = [
        f"{run}/config.yaml",
        f"{run}/run.json",
        f"{run}/checkpoint-2$",
        f"{run}/checkpoint-4/trainer_state.json",  # a checkpoint of which only that is missing
        f"{run}/items.npz",
        f"{run}/result.json.part",
        f"{run}/result.json$",
        f"{run}/checkpoint-6$",  # while the checkpoints are cleared away
        f"{other}/metrics.jsonl",
        f"{other}/checkpoint-4/trainer_state.json",
        f"{other}/adapter",
    ]
    code = tmp_path / "killer.py"
    code.write_text(KILLER)
    flagged = recipe.read_text().replace("save_strategy: 'no'", "save_strategy: steps")
    recipe.write_text(flagged + "save_steps: 2\n")
    done = subprocess.run(
        [sys.executable, str(code), str(recipe), str(out), *moments],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("moment ")]
    killed = [f"moment {moment} -9" for moment in moments]
    assert lines == [*killed, "moment None 0"]
    assert metrics_of(out) == undisturbed
    assert not list(out.rglob("checkpoint-*"))


def test_a_run_that_fails_is_recorded_and_tried_again(recipe, tmp_path, monkeypatch, capsys):
    train = runner._train

    def fail(config, *rest):
        if config.method.name == "lora-ga":
            raise RuntimeError("out of\nmemory")
        return train(config, *rest)

    monkeypatch.setattr(runner, "_train", fail)
    out = tmp_path / "out"
    command = ["compare", str(recipe), "--output_dir", str(out)]
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "failed: RuntimeError: out of memory" in said
    assert "runs failed; error.txt" in said
    (failed,) = out.glob("runs/*/lora-ga/*/seed-*")  # no second seed where every rate failed
    result = json.loads((failed / "result.json").read_text())
    assert (result["status"], result["method"], result["seed"]) == ("failed", "lora-ga", 0)
    assert "Traceback" in (failed / "error.txt").read_text()
    assert len(list(out.glob("runs/*/lora/*/seed-*/result.json"))) == 3

    monkeypatch.setattr(runner, "_train", train)
    assert main(command) == 0
    assert len(list(out.glob("runs/*/lora-ga/*/seed-*"))) == 2
    assert json.loads((failed / "result.json").read_text())["status"] == "finished"
    assert not (failed / "error.txt").exists()


def test_a_diverged_run_is_stopped_and_never_picked(recipe, tmp_path):
    text = recipe.read_text().replace("max_steps: 6", "max_steps: 40")
    recipe.write_text(text.replace("- 0.003", "- 1.0e+6"))
    results, said = quietly(load(recipe, tmp_path / "out", "--methods", "lora"))
    lost = next(r for (_, rate, _), r in results.items() if rate == 1e6)
    assert lost["status"] == "diverged"
    assert 3 < lost["steps"] < 40
    assert lost["metrics"] == {"validation": {"loss": None}, "test": {}}
    assert f"diverged after {lost['steps']} steps" in said
    assert {(rate, seed) for _, rate, seed in results} == {(1e-3, 0), (1e-3, 1), (1e6, 0)}


def test_a_loss_that_is_not_finite_ends_a_run_at_once(classify, monkeypatch):
    from lorapro.experiments.config import build_config

    values = {**classify, "method": "full", "learning_rate": 1e30, "max_steps": 50}
    result = runner.run(build_config(values))
    assert result["status"] == "diverged"
    assert result["steps"] < 10
    assert result["saved"] == {}


def test_two_comparisons_share_a_folder(recipe, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "PATIENCE", 0.05)
    comparison = load(recipe, tmp_path / "out")
    first = comparison.cells[0].config(1e-3, 0)
    began, release = threading.Event(), threading.Event()

    def other():
        with folders.locked(first.folder):
            began.set()
            release.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    began.wait(60)
    done = []
    monkeypatch.setattr(time, "sleep", lambda _: release.set() if done else done.append(1))
    results, said = quietly(comparison)
    thread.join()
    assert "lora, lr 0.001, seed 0: another process is training it" in said
    assert len(results) == 5
    assert metrics_of(tmp_path / "out") == undisturbed


def test_a_restart_over_finished_runs_reads_no_data_and_builds_no_model(
    recipe, tmp_path, monkeypatch
):
    first, _ = quietly(load(recipe, tmp_path / "out"))

    def never(*_, **__):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr("lorapro.experiments.model_building.build_model", never)
    monkeypatch.setattr(runner, "make_task", never)
    again, said = quietly(load(recipe, tmp_path / "out"))
    assert again == first
    assert said.strip() == "5 of at most 5 runs were finished earlier"


def test_changed_data_is_a_changed_run(recipe, classify, tmp_path, capsys):
    data = tmp_path / "own.csv"
    data.write_text(Path(classify["data"]).read_text())
    recipe.write_text(recipe.read_text().replace(classify["data"], str(data)))
    command = ["compare", str(recipe), "--output_dir", str(tmp_path / "out"), "--methods", "lora"]
    assert main(command) == 0
    data.write_text(data.read_text() + "one more sunny day,good\n")
    capsys.readouterr()
    assert main(command) == 2
    assert "holds another run (data_content" in capsys.readouterr().err
