from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest

from experiments.written_runs import pair_records, write_plan, write_run
from lorapro.cli.main import main
from lorapro.experiments.errors import UserError
from lorapro.experiments.report.problems import problems
from lorapro.experiments.results import read_results, write_results


def test_a_row_a_run_in_the_recipes_order(tmp_path):
    write_plan(tmp_path / "a", ["rslora", "lora"], title="Two rows")
    for label in ("lora", "rslora"):
        for seed in (0, 1):
            write_run(tmp_path / "a", label, 1e-3, seed, test=0.4 + seed, accuracy=0.75)
    read = read_results(tmp_path / "a")
    assert list(read.runs["label"]) == ["rslora"] * 2 + ["lora"] * 2
    assert list(read.runs["seed"]) == [0, 1, 0, 1]
    assert list(read.runs["test_loss"]) == [0.4, 1.4] * 2
    first = read.runs.iloc[0]
    assert (first["experiment"], first["task"], first["status"]) == ("a", "tweets", "finished")
    assert (first["test_accuracy"], first["metric"]) == (0.75, "accuracy")
    assert (first["seconds_per_step"], first["optimizer_state_bytes"]) == (0.5, 2**20)
    assert first["config"]["max_steps"] == 20
    assert first["versions"] == {"torch": "2.13.0"}
    assert first["curves"]["train_loss"][0] == [5, 10, 15, 20]
    assert read.experiments["a"].title == "Two rows"


def test_runs_without_an_end_are_rows_too(tmp_path):
    for seed, status in enumerate(("finished", "diverged", "failed", "unfinished")):
        write_run(tmp_path, "lora", 1e-3, seed, status=status)
    runs = read_results(tmp_path).runs
    assert list(runs["status"]) == ["finished", "diverged", "failed", "unfinished"]
    assert [math.isnan(v) for v in runs["test_loss"]] == [False, True, True, True]
    assert set(runs["label"]) == {"lora"}
    assert set(runs["learning_rate"]) == {1e-3}


def test_the_last_half_line_of_a_killed_run_is_no_record(tmp_path):
    folder = write_run(tmp_path, "lora", 1e-3, 0, records=pair_records(["q"], range(1, 4)))
    with (folder / "diagnostics.jsonl").open("a") as stream:
        stream.write('{"name": "q", "st')
    assert len(read_results(tmp_path).runs["diagnostics"].iloc[0]) == 3


def test_several_experiments_below_one_folder(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, "lora", 1e-3, 0)
    assert list(read_results(tmp_path).runs["experiment"]) == ["a", "b"]
    assert len(read_results(tmp_path / "b", tmp_path / "a").experiments) == 2


def test_a_single_run_is_an_experiment(tmp_path):
    folder = write_run(tmp_path, "dora", 1e-3, 4)
    [row] = read_results(folder).runs.to_dict("records")
    assert (row["label"], row["seed"], row["task"]) == ("dora", 4, "tweets")


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_no_runs_is_an_error(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(UserError, match=r"x (is not a folder|holds no runs)"):
        read_results(tmp_path / "x")


def test_broken_files_are_named(tmp_path):
    folder = write_run(tmp_path, "lora", 1e-3, 0)
    (folder / "result.json").write_text('{"status": "fini')
    with pytest.raises(UserError, match=r"result\.json is not valid JSON"):
        read_results(tmp_path)


def rich(root):
    """Runs with everything that the compact form keeps."""
    write_plan(root, ["full", "lora"], title="T", paper={"lora": {"MNLI": [85.3, 0.04], "avg": 82}})
    random = np.random.default_rng(0)
    for label in ("full", "lora"):
        for seed in (0, 1):
            loss = random.exponential(0.5, 7).astype(np.float32)
            write_run(
                root,
                label,
                3e-4,
                seed,
                test=float(loss.mean()),
                accuracy=0.5,
                items={"loss": loss, "correct": (loss < 0.5).astype(np.float32)},
                records=pair_records(["layers.0.q", "layers.1.q"], range(1, 4)),
            )
    write_run(root, "lora", 1e-2, 0, status="diverged")


def test_the_compact_form_holds_all(tmp_path):
    rich(tmp_path / "runs-of" / "x")
    read = read_results(tmp_path / "runs-of")
    out = tmp_path / "compact" / "x"
    out.mkdir(parents=True)
    write_results(read, "x", out)
    again = read_results(tmp_path / "compact")
    assert again.experiments == read.experiments
    assert again.experiments["x"].paper["lora"] == {"MNLI": (85.3, 0.04), "avg": (82, None)}
    assert set(again.runs) == set(read.runs)
    for before, after in zip(
        read.runs.to_dict("records"), again.runs.to_dict("records"), strict=True
    ):
        for key, value in before.items():
            if key == "items":
                assert set(value) == set(after[key])
                assert all((value[k] == after[key][k]).all() for k in value)
            elif key == "diagnostics" and value is not None:
                pd.testing.assert_frame_equal(
                    value,
                    after[key][list(value)].reset_index(drop=True),
                    check_dtype=False,
                    check_index_type=False,
                )
            elif isinstance(value, float) and math.isnan(value):
                assert pd.isna(after[key])
            elif key != "curves":
                assert after[key] == value, key
        for name, (steps, values) in before["curves"].items():
            assert after["curves"][name][0] == steps
            assert after["curves"][name][1] == pytest.approx(values)


def test_the_compact_form_is_the_same_bytes_again(tmp_path):
    rich(tmp_path / "x")
    files = []
    for name in ("one", "two"):
        out = tmp_path / name / "x"
        out.mkdir(parents=True)
        write_results(read_results(tmp_path / ("x" if name == "one" else "one")), "x", out)
        files.append({p.name: p.read_bytes() for p in out.iterdir() if p.suffix != ".npz"})
    assert files[0] == files[1]
    assert set(files[0]) == {"results.json", "diagnostics.csv.gz"}


def test_long_curves_are_thinned(tmp_path):
    curve = {step: float(step % 2) for step in range(1, 2001)}
    write_run(tmp_path / "x", "lora", 1e-3, 0, curve=curve)
    out = tmp_path / "out"
    out.mkdir()
    write_results(read_results(tmp_path / "x"), "x", out)
    steps, values = read_results(out).runs["curves"].iloc[0]["train_loss"]
    assert (len(steps), steps[-1]) == (200, 2000)
    assert values == pytest.approx([0.6] * 200)  # 0.5 and the 0.1 that training losses have more
    assert len((out / "results.json").read_text().splitlines()) < 60


def test_grid_points_are_problems_and_full_fine_tuning_is_in_all(tmp_path):
    write_run(tmp_path, "full", 1e-4, 0)
    for rank in (4, 32):
        write_run(tmp_path, "lora", 1e-3, 0, axes={"rank": rank})
    found = problems(read_results(tmp_path).runs)
    assert [p.name for p in found] == ["rank 4", "rank 32"]
    assert [p.setting for p in found] == [{"rank": 4}, {"rank": 32}]
    assert [list(p.runs["label"]) for p in found] == [["full", "lora"]] * 2
    assert [p.runs["axes"].iloc[1] for p in found] == [{"rank": 4}, {"rank": 32}]


def test_tasks_are_problems(tmp_path):
    for task in ("sst2", "cola"):
        write_run(tmp_path, "lora", 1e-3, 0, task=task)
    assert [p.name for p in problems(read_results(tmp_path).runs)] == ["cola", "sst2"]


def test_results_json_without_runs_is_an_error(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"methods": []}))
    with pytest.raises(UserError, match="no list of 'runs'"):
        read_results(tmp_path)


def test_merged_runs_are_one_comparison_and_the_last_of_a_run_is_kept(tmp_path, capsys):
    for name, test in (("old", 0.5), ("new", 0.4)):
        root = tmp_path / name
        write_run(root, "lora", 1e-3, 0, test=test)
        write_run(root, f"only-{name}", 1e-3, 0, axes={"rank": 8})
    out = tmp_path / "both"
    runs = [str(tmp_path / name) for name in ("old", "new")]
    assert main(["report", *runs, "--merge", "--compact", str(out)]) == 0
    read = read_results(out).runs
    assert list(read["label"]) == ["lora", "only-old", "only-new"]
    assert read["test_loss"][0] == 0.4
    folder = write_run(tmp_path / "longer", "lora", 1e-2, 0)
    for file in ("run.json", "result.json"):
        held = json.loads((folder / file).read_text())
        held["identity"] = {**held["identity"], "max_steps": 30}
        (folder / file).write_text(json.dumps(held))
    capsys.readouterr()
    assert main(["report", *runs, str(tmp_path / "longer"), "--merge"]) == 2
    assert "max_steps is 20 in one and 30 in another" in capsys.readouterr().err
