from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from experiments.written_runs import pair_records, write_plan, write_run
from lorapro.cli.main import main
from lorapro.experiments.errors import UserError
from lorapro.experiments.plan import load_comparison
from lorapro.experiments.report import Report, print_tables, report_comparison
from lorapro.experiments.report.comparison import choose_rate, compare, rate_losses
from lorapro.experiments.report.diagnostic_figures import (
    distances_figure,
    ranks_figure,
    shown_pairs,
)
from lorapro.experiments.report.drawing import log_ticks, smooth, spread_labels
from lorapro.experiments.report.problems import problems
from lorapro.experiments.report.rate_tables import (
    rates_table,
    transfer_table,
    transfers_table,
    values_by_rate_table,
)
from lorapro.experiments.report.summary_tables import across_table, paper_table
from lorapro.experiments.report.sweep_figures import sweep_figures
from lorapro.experiments.report.tables import (
    Table,
    cost_table,
    detail_table,
    main_table,
    way_table,
)
from lorapro.experiments.report.verdicts import gap_sentence, lead, verdict
from lorapro.experiments.results import read_results, write_results
from lorapro.experiments.statistics import holm, paired_t, share_closed

LOSSES = {
    "full": (0.60, 0.62, 0.61, 0.61, 0.60),
    "lora": (0.70, 0.72, 0.71, 0.71, 0.70),
    "rslora": (0.71, 0.70, 0.72, 0.70, 0.71),
    "lora-pro": (0.63, 0.64, 0.63, 0.64, 0.63),
    "dora": (0.78, 0.80, 0.79, 0.80, 0.78),
}


def write_losses(root, losses=LOSSES, **more):
    for label, values in losses.items():
        for seed, value in enumerate(values):
            write_run(root, label, 1e-3, seed, test=value, validation=value, **more)
    write_plan(root, list(losses))
    return root


def comparison(root, **options):
    [problem] = problems(read_results(root).runs)
    return compare(problem, **options)


def cells(table):
    return {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}


# Choice of rates


def test_a_rate_is_chosen_on_the_seeds_that_all_rates_have(tmp_path):
    for rate, seed, value in ((1e-4, 0, 0.9), (1e-3, 0, 0.8), (1e-3, 1, 2.0), (1e-2, 0, 0.85)):
        write_run(tmp_path, "lora", rate, seed, validation=value)
    write_run(tmp_path, "lora", 1e-1, 0, status="diverged")
    runs = read_results(tmp_path).runs
    assert rate_losses(runs) == {1e-4: 0.9, 1e-3: 0.8, 1e-2: 0.85, 1e-1: float("inf")}
    assert choose_rate(runs) == 1e-3
    [row] = comparison(tmp_path).rows
    assert row.edge is None
    assert sorted(row.values) == [0, 1]


def test_test_losses_do_not_choose_the_rate(tmp_path):
    write_run(tmp_path, "lora", 1e-4, 0, validation=0.5, test=0.9)
    write_run(tmp_path, "lora", 1e-3, 0, validation=0.6, test=0.1)
    [row] = comparison(tmp_path).rows
    assert (row.rate, row.edge) == (1e-4, "lowest")


def test_a_grid_counts_every_seed(tmp_path):
    for rate, values in ((1e-4, (0.9, 0.5)), (1e-3, (0.8, 0.9))):
        for seed, value in enumerate(values):
            write_run(tmp_path, "lora", rate, seed, validation=value)
    assert choose_rate(read_results(tmp_path).runs) == 1e-4


# Differences and verdicts


def test_differences_are_paired_t_tests_corrected_together(tmp_path):
    found = comparison(write_losses(tmp_path))
    base = np.array(LOSSES["lora"])
    others = [label for label in LOSSES if label != "lora"]
    alone = [paired_t(np.array(LOSSES[label]) - base) for label in others]
    corrected = holm([interval.p for interval in alone])
    for label, interval, p in zip(others, alone, corrected, strict=True):
        versus = found.row(label).versus["lora"]
        assert versus.interval == interval
        assert versus.holm == p
        assert (versus.seeds, versus.family) == (5, 4)
    assert {r.label: r.versus["lora"].verdict for r in found.rows if r.label != "lora"} == {
        "full": "better",
        "rslora": "tie",
        "lora-pro": "better",
        "dora": "worse",
    }
    assert found.row("lora").versus["rslora"].family == 4
    share = share_closed(LOSSES["lora"], LOSSES["lora-pro"], LOSSES["full"])
    assert found.row("lora-pro").share == share


def test_more_is_better_of_a_metric(tmp_path):
    accuracies = {"lora": (0.70, 0.71, 0.72, 0.71), "dora": (0.80, 0.82, 0.81, 0.82)}
    for label, values in accuracies.items():
        for seed, value in enumerate(values):
            write_run(tmp_path, label, 1e-3, seed, test=None, accuracy=value)
    found = comparison(tmp_path)
    assert found.measure == "test_accuracy"
    assert found.row("dora").versus["lora"].verdict == "better"
    swapped = comparison(tmp_path, baseline="dora")
    assert swapped.row("lora").versus["dora"].verdict == "worse"


def test_many_comparisons_make_a_tie_of_what_alone_is_none(tmp_path):
    rng = np.random.default_rng(0)
    losses = {"lora": [0.70, 0.71, 0.69], "good": [0.688, 0.696, 0.679]}
    losses |= {f"m{k}": list(0.7 + rng.normal(0, 0.01, 3)) for k in range(10)}
    found = comparison(write_losses(tmp_path, losses))
    row = found.row("good")
    assert row.versus["lora"].interval.excludes_zero
    assert (row.versus["lora"].verdict, row.versus["lora"].alone) == ("tie", True)
    said = verdict(found, row)
    assert "A tie with lora once 11 comparisons are allowed for" in said
    assert "alone it would be better" in said


def test_a_small_test_set_makes_a_tie(tmp_path):
    def items(seed, shift):
        noise = np.random.default_rng(5).exponential(1.0, 12)  # few items, the same for all
        other = np.random.default_rng(9).normal(0, 0.5, 12)  # what the methods differ in
        return noise + shift * (0.05 + other - other.mean()) + 0.001 * seed

    for label, shift in (("lora", 0.0), ("dora", 1.0)):
        for seed in range(5):
            loss = items(seed, shift)
            write_run(tmp_path, label, 1e-3, seed, test=loss.mean(), items={"loss": loss})
    found = comparison(tmp_path)
    versus = found.row("dora").versus["lora"]
    assert versus.holm < 0.001  # the same over all seeds
    assert not versus.boot.excludes_zero  # but not over other items
    assert versus.verdict == "tie"


def test_items_that_do_not_make_up_the_measure_are_left_alone(tmp_path):
    for label in ("lora", "dora"):
        for seed in range(2):
            write_run(tmp_path, label, 1e-3, seed, test=0.5, items={"loss": np.full(9, 7.0)})
    assert comparison(tmp_path).row("dora").versus["lora"].boot is None


def test_weights_of_items_are_used(tmp_path):
    loss, weight = np.array([1.0, 4.0, 2.0]), np.array([2.0, 1.0, 3.0])
    for label, more in (("lora", 0.0), ("dora", 1.0)):
        for seed in range(2):
            mean = ((loss + more) * weight).sum() / weight.sum()
            items = {"loss": loss + more, "weight": weight}
            write_run(tmp_path, label, 1e-3, seed, test=mean, items=items)
    assert comparison(tmp_path).row("dora").versus["lora"].boot.size == pytest.approx(1.0)


def test_one_seed_is_called_one_seed(tmp_path):
    write_losses(tmp_path, {"lora": [0.7], "dora": [0.6], "full": [0.5]})
    report = Report(read_results(tmp_path))
    [found] = report.comparisons
    assert found.row("dora").versus["lora"].verdict == "one seed"
    said = verdict(found, found.row("dora"))
    assert said == "One seed, so no verdict: test loss -0.1000 against lora."
    assert "One seed gives no estimate" in gap_sentence(found)
    text = report.markdown()
    assert "One seed" in text
    assert "tie" not in text
    assert "±" not in cells(main_table(found))["dora"]["test loss"]


def test_one_seed_leaves_open_what_its_test_items_do(tmp_path):
    random = np.random.default_rng(1)
    for label, mean in (("lora", 0.7), ("full", 0.6)):
        loss = random.exponential(mean, 400)
        write_run(tmp_path, label, 1e-3, 0, test=loss.mean(), items={"loss": loss})
    found = comparison(tmp_path)
    low, high = sorted((-found.gap.boot.low, -found.gap.boot.high))
    assert f"the test items alone leave {low:+.4f} to {high:+.4f} open" in gap_sentence(found)


def test_right_answers_of_two_single_runs_are_compared_by_mcnemars_test(tmp_path):
    right = {"lora": [1] * 20 + [0] * 10, "dora": [1] * 20 + [1] * 8 + [0] * 2}
    for label, correct in right.items():
        items = {"loss": np.full(30, 0.5), "correct": np.array(correct, dtype=float)}
        write_run(tmp_path, label, 1e-3, 0, accuracy=float(np.mean(correct)), items=items)
    found = comparison(tmp_path)
    assert found.row("dora").versus["lora"].mcnemar == pytest.approx(2 * 0.5**8)
    assert cells(detail_table(found, "lora"))["dora"]["p McNemar"] == "0.008"


def test_seeds_of_only_one_side_are_not_paired(tmp_path):
    write_losses(tmp_path, {"lora": [0.7, 0.71, 0.72], "dora": [0.6, 0.63]})
    versus = comparison(tmp_path).row("dora").versus["lora"]
    assert versus.seeds == 2
    assert versus.size == pytest.approx(-0.09)


def test_no_gap_is_said_where_noise_is_larger(tmp_path):
    losses = {"full": [0.69, 0.72, 0.68, 0.73], "lora": [0.71, 0.70, 0.71, 0.71]}
    found = comparison(write_losses(tmp_path, {**losses, "dora": [0.63] * 4}))
    assert "no gap beyond noise" in gap_sentence(found)
    assert cells(main_table(found))["dora"]["gap closed"] == "no gap"


def test_it_is_said_where_full_fine_tuning_is_behind(tmp_path):
    losses = {"full": [0.81, 0.80, 0.81, 0.81], "lora": [0.71, 0.70, 0.71, 0.72]}
    found = comparison(write_losses(tmp_path, {**losses, "dora": [0.63] * 4}))
    assert "full fine-tuning is behind lora beyond noise" in gap_sentence(found)
    assert found.row("dora").share is None


def test_the_gap_may_lead_to_the_better_rule_of_full_fine_tuning(tmp_path):
    write_losses(tmp_path, {**LOSSES, "full-muon": (0.5, 0.51, 0.50, 0.49, 0.5)})
    assert comparison(tmp_path).gap.size == pytest.approx(-0.1)
    assert comparison(tmp_path, target="better").gap.size == pytest.approx(-0.208)


def test_the_compact_form_remembers_where_gaps_lead(tmp_path, capsys):
    losses = {**LOSSES, "full-muon": (0.5, 0.51, 0.50, 0.49, 0.5)}
    root, out = str(write_losses(tmp_path / "x", losses)), str(tmp_path / "c")
    assert main(["report", root, "--target", "better", "--compact", out]) == 0
    assert main(["report", out]) == 0
    assert capsys.readouterr().out.count("Gap from lora to full-muon") == 4


def test_diverged_seeds_are_counted_and_shown(tmp_path):
    write_losses(tmp_path)
    write_run(tmp_path, "dora", 1e-3, 5, status="diverged")
    write_run(tmp_path, "lora", 3e-3, 0, status="failed")
    report = Report(read_results(tmp_path))
    [found] = report.comparisons
    assert found.row("dora").lost == 1
    assert "1 of 6 runs at this rate diverged" in verdict(found, found.row("dora"))
    text = report.markdown()
    assert "| dora | " in text
    assert re.search(r"\| lora \| .* \| tweets \| 0.003 \| 0 \| failed \|", text)


def test_nothing_but_diverged_runs_is_a_report_too(tmp_path):
    for label in ("lora", "dora"):
        write_run(tmp_path, label, 1e-3, 0, status="diverged")
    write_run(tmp_path, "pissa", 1e-3, 0, status="unfinished")
    report = Report(read_results(tmp_path))
    assert "No run with a finite test loss" in report.markdown()
    assert "<h1>" in report.html()


# Tables


def test_a_cell_with_a_line_break_or_a_bar_stays_one_cell():
    table = Table("", ["key", "value"], [["text", "{question}\n{answer}"], ["a|b", "c"]])
    assert table.markdown().splitlines()[2:] == ["| text | {question} {answer} |", "| a\\|b | c |"]


def test_the_main_table_holds_the_numbers(tmp_path):
    found = comparison(write_losses(tmp_path, accuracy=0.75))
    by_label = cells(main_table(found))
    assert by_label["full"]["test loss"] == "0.6080 ± 0.0084"
    assert by_label["lora-pro"]["against lora"] == "better"
    assert by_label["lora-pro"]["test accuracy"] == "0.750 ± 0.000"
    assert by_label["lora-pro"]["gap closed"].startswith("74 % (")
    assert by_label["full"]["gap closed"] == by_label["lora"]["minus lora"] == ""
    assert list(by_label) == list(LOSSES)


def test_a_best_rate_at_the_edge_is_warned_of(tmp_path):
    for rate, value in ((1e-4, 0.7), (1e-3, 0.6)):
        write_run(tmp_path, "full", rate, 0, validation=value)
    notes = main_table(comparison(tmp_path)).notes
    assert any("full: the best learning rate, 0.001, is the highest" in note for note in notes)


def test_losses_on_the_way_are_compared_step_by_step(tmp_path):
    for label, more in (("lora", 0.0), ("dora", 0.1)):
        for seed in (0, 1):
            curve = {s: 1.0 / s + more + 0.01 * seed * (label == "dora") for s in (10, 20, 30)}
            write_run(tmp_path, label, 1e-3, seed, curve=curve)
    write_run(tmp_path, "pissa", 1e-3, 0, status="diverged")
    by_label = cells(way_table(comparison(tmp_path)))
    assert by_label["lora"]["step 20"] == "0.0500"
    half = 12.7062 * 0.005
    assert by_label["dora"]["step 20"] == f"0.1550 (+0.1050 ± {half:.4f})"


def test_costs_stand_beside_the_baselines(tmp_path):
    write_run(tmp_path, "lora", 1e-3, 0)
    write_run(tmp_path, "dora", 1e-3, 0, seconds_per_step=1.25, optimizer_state_bytes=3 * 2**30)
    row = cells(cost_table(comparison(tmp_path)))["dora"]
    assert (row["over lora"], row["optimizer state"]) == ("2.50", "3.00 GB")
    assert row["trainable"] == "0.30 M"


def test_rates_say_what_half_and_twice_cost_and_how_wide_the_good_ones_are(tmp_path):
    for rate, value in ((1e-3, 0.55), (2e-3, 0.50), (4e-3, 0.505), (8e-3, 0.9)):
        write_run(tmp_path, "lora", rate, 0, validation=value)
    write_run(tmp_path, "lora", 2e-3, 1, validation=0.51)
    write_run(tmp_path, "dora", 1e-3, 0, validation=0.5)
    write_run(tmp_path, "dora", 1e-3, 1, validation=0.51)
    found = comparison(tmp_path)
    row = cells(rates_table(found))["lora"]
    assert (row["half of it"], row["twice it"]) == ("+0.0500", "+0.0050")
    assert row["within noise of the best"] == "0.002 to 0.004"
    by_rate = cells(values_by_rate_table(found.problem, "validation_loss"))
    assert by_rate["lora"]["0.002"] == "0.5050 ± 0.0071"


def test_transfer_between_points_of_the_grid(tmp_path):
    for rank, losses in ((4, (0.5, 0.6, 0.9)), (64, (0.9, 0.6, 0.4))):
        for rate, value in zip((1e-3, 2e-3, 4e-3), losses, strict=True):
            write_run(tmp_path, "lora", rate, 0, axes={"rank": rank}, validation=value)
    settings = {p.name: p for p in problems(read_results(tmp_path).runs)}
    table = transfer_table(settings, "lora")
    assert table.header == ["tuned on", "rank 4", "rank 64"]
    assert table.rows == [
        ["rank 4 (lr 0.001)", "0.0000", "0.5000"],
        ["rank 64 (lr 0.004)", "0.4000", "0.0000"],
    ]
    [row] = transfers_table(settings, ["lora"]).rows
    assert row == ["lora", "2 of 2", "0.4500", "0.5000", "rank 4 to rank 64"]


def test_transfer_from_full_fine_tuning_by_the_same_rule(tmp_path):
    for rank in (4, 64):
        for rate, value in ((1e-3, 0.5), (2e-3, 0.6 - 0.001 * rank)):
            for label in ("lora", "lora-pro-muon", "lora+"):
                axes = {"rank": rank}
                write_run(
                    tmp_path,
                    label,
                    rate * (4 if label == "lora+" else 1),
                    0,
                    axes=axes,
                    validation=value,
                )
    for label, best in (("full", 1e-3), ("full-muon", 2e-3)):
        for rate in (1e-3, 2e-3):
            write_run(tmp_path, label, rate, 0, axes={}, validation=0.3 + (rate != best))
    settings = {p.name: p for p in problems(read_results(tmp_path).runs)}
    labels = ["full", "full-muon", "lora", "lora-pro-muon", "lora+"]
    by_label = cells(transfers_table(settings, labels))
    assert set(by_label) == {"lora", "lora-pro-muon", "lora+"}  # one run is no transfer
    column = "with full fine-tuning's: mean, worst"
    assert by_label["lora"][column] == "0.0000, 0.0000"
    assert by_label["lora-pro-muon"][column] == "0.0660, 0.0960"
    assert by_label["lora+"][column] == "not tried"


def test_transfer_without_a_finished_run_of_full_fine_tuning(tmp_path):
    for rank in (4, 64):
        for rate, value in ((1e-3, 0.5), (2e-3, 0.6 - 0.003 * rank)):
            write_run(tmp_path, "lora", rate, 0, axes={"rank": rank}, validation=value)
            write_run(tmp_path, "old", rate, 0, axes={"rank": rank}, validation=value)
    write_run(tmp_path, "full", 1e-3, 0, axes={}, status="unfinished")
    write_run(tmp_path, "zero-shot", 1e-3, 0, axes={}, validation=0.9)
    write_run(tmp_path, "dora", 1e-3, 0, axes={"rank": 4}, validation=0.9)
    write_run(tmp_path, "dora", 2e-3, 0, axes={"rank": 64}, status="unfinished")
    settings = {p.name: p for p in problems(read_results(tmp_path).runs)}
    table = transfers_table(settings, ["lora", "old", "full", "zero-shot", "dora"])
    assert [row[0] for row in table.rows] == ["lora", "old"]
    assert len(table.header) == 5
    assert transfer_table(settings, "dora") is None


def test_ours_stand_beside_the_papers(tmp_path):
    for task, value in (("MNLI", 0.80), ("CoLA", 0.70)):
        for seed in (0, 1):
            accuracy = value + 0.01 * seed
            write_run(tmp_path, "lora", 1e-3, seed, task=task, accuracy=accuracy, seconds=7200)
    paper = {
        "lora": {"MNLI": [85.3, 0.04], "CoLA": 69.35, "avg": 82.08, "hours": 1.5, "SST2": 94},
        "lora-pro": {"MNLI": [86.03, 0.19]},
    }
    columns = {"hours": {"task": "MNLI", "value": "cost.seconds", "scale": 1 / 3600}}
    write_plan(tmp_path, [], paper=paper, columns=columns)
    report = Report(read_results(tmp_path))
    table = paper_table(report.comparisons, report.results.experiments[tmp_path.name])
    row = cells(table)["lora"]
    assert (row["MNLI"], row["MNLI, paper"]) == ("80.50 ± 0.71", "85.30 ± 0.04")
    assert (row["CoLA"], row["CoLA, paper"]) == ("70.50 ± 0.71", "69.35")
    assert (row["avg"], row["avg, paper"]) == ("75.50", "82.08")
    assert (row["hours"], row["hours, paper"]) == ("2.00 ± 0.00", "1.50")
    assert (row["SST2"], row["SST2, paper"]) == ("-", "94.00")
    assert cells(table)["lora-pro"]["MNLI"] == "-"
    assert "Not run here: SST2." in table.notes
    assert "<h2>Beside the paper" in report.html()


def test_a_papers_column_may_be_a_rate(tmp_path):
    for rate in (1e-5, 2e-5):
        write_run(tmp_path, "lora", rate, 0, task="gsm8k", accuracy=1e4 * rate)
    columns = {
        f"{rate:g}": {"task": "gsm8k", "value": "accuracy", "scale": 100, "learning_rate": rate}
        for rate in (1e-5, 2e-5)
    }
    paper = {"lora": {"1e-05": [36.65, 0.82], "2e-05": [42.08, 0.04]}}
    write_plan(tmp_path, [], paper=paper, columns=columns)
    report = Report(read_results(tmp_path))
    row = cells(report.overview()[0])["lora"]
    assert (row["1e-05"], row["2e-05"]) == ("10.00", "20.00")


def test_over_all_problems_verdicts_are_counted(tmp_path):
    for task, gain in (("a", 0.1), ("b", 0.0)):
        for seed in range(4):
            noise = 0.01 * ((seed * 7) % 4)
            write_run(tmp_path, "lora", 1e-3, seed, task=task, test=0.7 + noise)
            other = 0.7 + noise - gain + 0.002 * ((seed * 3) % 4 - 1.5)
            write_run(tmp_path, "dora", 1e-3, seed, task=task, test=other)
    report = Report(read_results(tmp_path))
    row = cells(across_table(report.comparisons))["dora"]
    assert (row["problems"], row["better"], row["ties"]) == ("2", "1", "1")
    assert row["P(better than lora)"].startswith("0.7")
    said = lead(report.comparisons)
    assert said[0] == "Better than lora on a: dora."
    assert said[1] == "Everything else (one comparison) is a tie."


def test_scaled_scores_go_from_the_untrained_row_to_full_fine_tuning(tmp_path):
    accuracies = {
        "a": {"zero-shot": 0.2, "full": 0.8, "lora": 0.5, "dora": 0.8},
        "b": {"zero-shot": 0.4, "full": 0.6, "lora": 0.44, "dora": 0.6},
        "c": {"full": 0.6, "lora": 0.45, "dora": 0.1},  # without an untrained row: not in it
    }
    for task, values in accuracies.items():
        for label, value in values.items():
            for seed in range(4):
                write_run(tmp_path, label, 1e-3, seed, task=task, test=None, accuracy=value)
    by_label = cells(across_table(Report(read_results(tmp_path)).comparisons))
    assert by_label["lora"]["IQM"].startswith("0.35 (")  # the middle half of 4 x 0.5, 4 x 0.2
    assert by_label["dora"]["IQM"] == "1.00 (1.00 to 1.00)"
    assert by_label["zero-shot"]["IQM"] == "0.00 (0.00 to 0.00)"


def test_without_lora_the_first_adapter_is_what_others_are_compared_with(tmp_path):
    for label in ("full", "zero", "sylvester"):
        for seed in (0, 1):
            write_run(tmp_path, label, 1e-3, seed, test=0.5 + 0.1 * seed)
    write_plan(tmp_path, ["full", "zero", "sylvester"])
    assert comparison(tmp_path).baseline == "zero"


def test_tuned_is_said_of_what_was_tuned(tmp_path):
    for rate in (1e-3, 2e-3):
        write_run(tmp_path, "lora", rate, 0)
    write_run(tmp_path, "dora", 1e-3, 0)
    found = comparison(tmp_path)
    assert found.baseline_name == "tuned lora"
    assert comparison(tmp_path, baseline="dora").baseline_name == "dora"


# Figures and files


def test_the_figures_of_sweeps_need_several_values(tmp_path):
    for batch in (32, 256):
        for label in ("lora", "dora"):
            for seed in (0, 1):
                write_run(tmp_path, label, 1e-3, seed, axes={"batch_size": batch}, test=0.1 * seed)
    report = Report(read_results(tmp_path))
    [figure] = report.swept()
    assert [panel.title for panel in figure.panels] == ["dora"]
    assert sweep_figures(report.comparisons[:1], "batch_size") == []
    assert sweep_figures(report.comparisons, "no_such_key") == []


def test_a_grid_of_two_axes_is_a_figure_for_each_value_of_the_other(tmp_path):
    for batch in (32, 256):
        for rank in (4, 64):
            axes = {"batch_size": batch, "rank": rank, "alpha": 2 * rank}
            write_run(tmp_path, "lora", 1e-3, 0, axes=axes)
        write_run(tmp_path, "full", 1e-3, 0, axes={"batch_size": batch})
    report = Report(read_results(tmp_path))
    names = [found.problem.name for found in report.comparisons]
    assert names[:2] == ["batch size 32, rank 4", "batch size 32, rank 64"]  # alpha says no more
    assert [figure.title for figure in report.swept()] == [
        "Test loss against batch size (tweets, rank 4)",
        "Test loss against batch size (tweets, rank 64)",
        "Test loss against rank (tweets, batch size 32)",
        "Test loss against rank (tweets, batch size 256)",
    ]


def test_gaps_of_several_problems_stand_in_one_table(tmp_path):
    for batch, gap in ((32, 0.0), (256, 0.2)):
        for seed in range(4):
            noise = 0.01 * ((seed * 7) % 4)
            for label, share in (("lora", 0.0), ("dora", 0.5), ("full", 1.0)):
                other = 0.003 * ((seed * 3 + len(label)) % 4)
                loss = 0.7 + noise + other - share * gap
                write_run(tmp_path, label, 1e-3, seed, axes={"batch_size": batch}, test=loss)
    report = Report(read_results(tmp_path))
    table = next(t for t in report.overview() if t.title == "Shares of the gap")
    by_label = cells(table)
    assert by_label["gap"]["batch size 256"].startswith("+0.2")
    assert by_label["dora"]["batch size 32"] == "-"
    assert by_label["dora"]["batch size 256"].startswith("5")
    share = report.comparisons[1].row("dora").share
    assert (
        f"({100 * share.low:.0f} to {100 * share.high:.0f})" in by_label["dora"]["batch size 256"]
    )


def test_diagnostics_are_drawn_for_first_middle_and_last_layer(tmp_path):
    names = [f"m.layers.{i}.attn.{n}" for i in range(12) for n in ("q", "v", "o")]
    assert [n.split(".")[2] for n in shown_pairs(names)] == ["0"] * 3 + ["6"] * 3 + ["11"] * 3
    write_run(tmp_path, "lora-pro", 1e-3, 0, records=pair_records(names[:6], range(1, 9)))
    report = Report(read_results(tmp_path))
    [found] = report.comparisons
    figures = {f.name: f for f in report.figures(found)}
    assert len(figures["ranks_lora-pro"].panels) == 6
    records = found.rows[0].runs["diagnostics"].iloc[0]
    for figure in (ranks_figure(records, "x"), distances_figure(records, "x")):
        assert [p.title for p in figure.panels][:2] == ["layer 0, q", "layer 0, v"]
        assert len(figure.inline()) == 6


def test_everything_comes_from_the_compact_form_alone(tmp_path):
    root = write_losses(tmp_path / "out" / "x", accuracy=0.7)
    write_run(root, "lora-pro", 2e-3, 0, records=pair_records(["a.0.q"], range(1, 4)))
    full = read_results(root)
    compact = tmp_path / "compact" / "x"
    compact.mkdir(parents=True)
    write_results(full, "x", compact)
    again = read_results(compact)
    assert Report(again).markdown() == Report(full).markdown()
    # the same figures to the last digit but one: the compact form rounds curves
    pages = [
        re.sub(r"[0-9.]+|-[mp][0-9a-f]{10}", "", Report(read).html()) for read in (again, full)
    ]
    assert pages[0] == pages[1]


def test_a_titled_experiment_reads_the_same_in_a_folder_of_another_name(tmp_path):
    root = write_losses(tmp_path / "one")
    write_run(root, "lora", 1e-1, 0, status="diverged")
    write_plan(root, list(LOSSES), title="A title")
    read = read_results(root)
    (tmp_path / "two").mkdir()
    write_results(read, "one", tmp_path / "two")
    assert Report(read_results(tmp_path / "two")).markdown() == Report(read).markdown()


COMMITTED = Path(__file__).parents[2] / "results"


@pytest.mark.parametrize(
    "folder", sorted(str(p.parent.relative_to(COMMITTED)) for p in COMMITTED.rglob("table.md"))
)
def test_committed_tables_are_what_their_results_give(folder):
    text = Report(read_results(COMMITTED / folder)).markdown()
    assert text == (COMMITTED / folder / "table.md").read_text(), "run: make results"


def test_what_a_comparison_leaves_in_its_folder(tmp_path):
    root = write_losses(tmp_path)
    (root / "runs/tweets/lora/lr-0.001/seed-0/adapter").mkdir()
    out = io.StringIO()
    report_comparison(root, Console(file=out, width=80))
    said = out.getvalue()
    assert "lora-pro: Better than lora" in said
    assert f"Adapter of lora: {root}/runs/tweets/lora/lr-0.001/seed-0/adapter" in said
    assert json.loads((root / "results.json").read_text())["runs"]
    assert "| lora-pro | 0.001 |" in (root / "table.md").read_text()
    assert (root / "report.html").read_text().startswith("<!doctype html>")
    assert f"Picture: {root}/differences.png" in said
    assert (root / "differences.png").read_bytes().startswith(b"\x89PNG")


def test_the_gap_leads_to_the_row_that_a_recipe_names(tmp_path):
    root = write_losses(tmp_path)
    plan = root / "comparison.json"
    held = json.loads(plan.read_text()) if plan.is_file() else {}
    plan.write_text(json.dumps({**held, "target": "lora-pro"}))
    (found,) = Report(read_results(root)).comparisons
    assert found.goal == "lora-pro"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: tweets\nmethods: {lora: 1e-3, full: 1e-4}\ntarget: fulll\n")
    with pytest.raises(UserError, match="unknown target 'fulll'"):
        load_comparison(recipe)


def test_the_command(tmp_path, capsys):
    root = write_losses(tmp_path / "x")
    page, text, folder = tmp_path / "r.html", tmp_path / "r.md", tmp_path / "figures"
    assert main(["report", str(root), "--output", str(page), "--figures", str(folder)]) == 0
    assert main(["report", str(root), "--output", str(text), "--compact", str(tmp_path / "c")]) == 0
    assert "lora-pro: Better than lora" in capsys.readouterr().out
    assert "## Verdicts" in text.read_text()
    assert len(read_results(tmp_path / "c").runs) == 25
    drawn = {p.name: p.read_bytes()[:8] for p in folder.iterdir()}
    assert set(drawn) >= {
        "differences.png",
        "validation_curves.png",
        "train_curves.png",
        "cost.png",
    }
    assert set(drawn.values()) == {b"\x89PNG\r\n\x1a\n"}
    html = page.read_text()
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)  # nothing to fetch


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x", "--output", "r.pdf"], "must end in .html or .md"),
        (["x", "--measure", "test_bleu"], "no run has the measure 'test_bleu'"),
        (["y"], "y is not a folder"),
        (["x", "--figure_format", "gif"], "png or svg"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, arguments, said
):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "x", "lora", 1e-3, 0)
    before = sorted(tmp_path.iterdir())
    assert main(["report", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_print_tables_to_a_file(tmp_path):
    out = io.StringIO()
    print_tables(Report(read_results(write_losses(tmp_path))), Console(file=out))
    assert "0.6340 ± 0.0055" in out.getvalue()


def test_labels_keep_their_order_and_distance():
    placed = spread_labels([0.30, 0.31, 0.305, 0.9], 0.1)
    order = sorted(range(4), key=lambda i: placed[i])
    assert order == [0, 2, 1, 3]
    assert min(np.diff([placed[i] for i in order])) > 0.1 - 1e-9
    assert placed[3] == 0.9


def test_smoothing_keeps_lines_and_tames_noise():
    ramp = [float(i) for i in range(100)]
    assert smooth(ramp)[30:70] == pytest.approx(ramp[30:70])
    noise = [(-1.0) ** i for i in range(100)]
    assert max(map(abs, smooth(noise)[10:90])) < 0.05


@pytest.mark.parametrize(("low", "high"), [(1e-5, 3e-5), (1e-6, 1.0), (3.0, 5.0), (0.9, 1e9)])
def test_logarithmic_axes_have_a_few_round_ticks(low, high):
    ticks = log_ticks(low, high)
    assert 1 <= len(ticks) <= 5
    assert all(low * 0.99 <= t <= high * 1.01 for t in ticks)
