"""Chat, mathematics and code as the papers train and ask them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from lorapro.cli.main import main
from lorapro.experiments.config import build_config
from lorapro.experiments.errors import UserError
from lorapro.experiments.generation import generate, left_pad
from lorapro.experiments.runner import make_task, run
from lorapro.experiments.toys import toy_values

BEFORE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n"
)
AFTER = "\n\n### Response:\n"


def values(name, tmp_path, **more):
    return {
        "task": name,
        **toy_values(name),
        "train_samples": 40,
        "validation_samples": 6,
        "test_samples": 8,
        "max_new_tokens": 6,
        "generation_batch_size": 4,
        "rank": 2,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "eval_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        "output_dir": str(tmp_path / "run"),
        **more,
    }


def rows_of(task):
    text = Path(task.data_name, "train.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def kept(name, rows):
    if name.startswith("metamath"):
        return [r for r in rows if "GSM" in r["type"]]
    if name == "codefeedback":
        return [r for r in rows if "```" in r["answer"]]
    return [r for r in rows if "sorry" not in r["output"].lower()]


def expected(name, row):
    """x and y of a row."""
    if name == "metamath":
        return f"{BEFORE}{row['query']}{AFTER}", row["response"]
    if name == "metamath-qa":
        return f"Q: {row['query']}\nA: ", row["response"].split("\nThe answer is:")[0]
    if name == "codefeedback":
        block = re.match(r".*?```.*?```", row["answer"], re.DOTALL).group()
        return f"{BEFORE}{row['query']}{AFTER}", block
    return f"{BEFORE}{row['instruction']}{AFTER}", row["output"]


@pytest.mark.parametrize("name", ["metamath", "metamath-qa", "codefeedback", "wizardlm"])
def test_the_first_rows_that_pass_become_the_papers_text(name, tmp_path):
    task = make_task(build_config(values(name, tmp_path)))
    rows = kept(name, rows_of(task))
    assert len(rows) < len(rows_of(task))
    examples = [*task.train, *task.validation, *task.test]
    assert [len(p) for p in (task.train, task.validation, task.test)] == [40, 6, 8]
    tokenizer = task.tokenizer
    for row, example in zip(rows, examples, strict=False):
        x, y = expected(name, row)
        assert tokenizer.decode(example["input_ids"]) == f"<s>{x} {y}</s>"
        hidden = len(tokenizer(x)["input_ids"])
        assert example["labels"] == [-100] * hidden + example["input_ids"][hidden:]
        assert example["labels"][-1] == tokenizer.eos_token_id


def test_long_rows_are_left_out_by_the_papers_count(tmp_path):
    whole = make_task(build_config(values("metamath", tmp_path)))
    lengths = [len(e["input_ids"]) - 1 for e in whole.train]  # without the end token
    longest = max(lengths)
    assert min(lengths) < longest
    filtered = values("metamath", tmp_path, filter_length=longest, train_samples=20)
    fewer = make_task(build_config(filtered))
    shorter = [n for n in lengths if n < longest][:20]
    assert [len(e["input_ids"]) - 1 for e in fewer.train] == shorter
    cut = make_task(build_config(values("metamath", tmp_path, max_length=longest - 8)))
    assert max(len(e["input_ids"]) for e in cut.train) == longest - 8
    everything = make_task(build_config(values("metamath", tmp_path, train_samples=0)))
    assert len(everything.train) == len(kept("metamath", rows_of(whole))) - 14
    with pytest.raises(UserError, match="rows that fit: too few"):
        make_task(build_config(values("metamath", tmp_path, train_samples=400)))


class Speaker:
    """Continues a prompt with what it is told to; keeps the prompts."""

    training, device = False, torch.device("cpu")

    def __init__(self, tokenizer, says):
        self.tokenizer, self.says, self.heard = tokenizer, says, []

    def eval(self):
        return self

    def train(self, mode):
        return self

    def generate(self, input_ids, attention_mask, **options):
        said = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            assert mask.tolist() == sorted(mask.tolist())  # padding is on the left
            text = self.tokenizer.decode(ids[mask.bool()])
            self.heard.append((text, options))
            said.append(self.tokenizer(self.says(text), add_special_tokens=False)["input_ids"])
        longest = max(map(len, said))
        tail = torch.tensor([s + [options["pad_token_id"]] * (longest - len(s)) for s in said])
        return torch.cat([input_ids, tail], dim=1)


def answered(name, tmp_path, says, **more):
    """What a model that says this scores, what it heard, what was saved."""
    task = make_task(build_config(values(name, tmp_path, generation_samples=6, **more)))
    speaker = Speaker(task.tokenizer, says)
    path = tmp_path / "predictions.jsonl"
    metrics = task.final_metrics(speaker, path, 6)
    return metrics, speaker.heard, [json.loads(line) for line in path.read_text().splitlines()]


def test_gsm8k_is_asked_as_trained_and_read_in_four_ways(tmp_path):
    def says(text):
        pens = int(re.search(r"has (\d+) pens", text).group(1))
        return [f"#### {pens + 3}", f"It is {pens + 3}.", "#### 99", f"The answer is: {pens + 3}"][
            pens % 4
        ]

    metrics, heard, records = answered("metamath", tmp_path, says)
    asked = [text for text, _ in heard]
    assert f"<s>{BEFORE}Bob has 0 pens and buys 3. How many?{AFTER} " in asked
    assert all(options["do_sample"] is False for _, options in heard)
    assert metrics == {
        "gsm8k_strict": pytest.approx(2 / 6),  # 0 and 4 pens
        "gsm8k_flexible": pytest.approx(5 / 6),
        "gsm8k_marked": pytest.approx(3 / 6),
        "gsm8k_paper": pytest.approx(2 / 6),
    }
    assert [r["correct"] for r in records] == [True, False, False, False, True, False]
    assert [r["question"][:9] for r in records] == [f"Bob has {n}" for n in range(6)]
    _, heard, _ = answered("metamath-qa", tmp_path, says)
    assert "<s>Q: Bob has 0 pens and buys 3. How many?\nA:  " in [text for text, _ in heard]


def test_humaneval_runs_what_was_said_if_that_is_allowed(tmp_path):
    def says(text):
        number = int(re.search(r"def add_(\d+)", text).group(1))
        right = f"def add_{number}(x):\n    return x + {number}\n```"
        return right if number % 2 else "def add(x):\n    return 0"

    metrics, heard, records = answered(
        "codefeedback", tmp_path, says, allow_code_execution=True, code_seconds=20
    )
    assert metrics == {"humaneval": 0.5}
    assert heard[0][0].endswith("### Response:\n```python\n ")
    assert [r["correct"] for r in records] == [False, True] * 3
    assert {"network", "files", "processes"} <= set(records[0]["isolation"])
    with pytest.raises(UserError, match="--allow-code-execution true"):
        answered("codefeedback", tmp_path, says)
    sampled = {"allow_code_execution": True, "answers_per_item": 2}
    with pytest.raises(UserError, match="at temperature 0 all answers are the same"):
        answered("codefeedback", tmp_path, says, **sampled)
    metrics, heard, records = answered(
        "codefeedback", tmp_path, says, temperature=0.8, code_seconds=20, **sampled
    )
    assert metrics == {"humaneval": 0.5}
    assert len(records) == 12
    assert heard[0][1]["temperature"] == 0.8
    assert heard[0][1]["top_p"] == 0.95


def test_mt_bench_asks_at_its_temperatures_and_the_judge_rates(tmp_path, judge_server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judge_server.says = lambda prompt: "[[9]]" if "Reference: Twice." in prompt else "[[6]]"
    judged = {"judge_model": "judge", "judge_url": judge_server.url}
    metrics, heard, records = answered("wizardlm", tmp_path, lambda text: "Hm.", **judged)
    assert metrics == {"mt_bench": 7, "mt_bench_unrated": 0}
    heats = {re.search(r"What is (\d)", t).group(1): o.get("temperature") for t, o in heard}
    assert heats == {"0": 0.7, "1": None, "2": 0.1, "3": 0.7, "4": None, "5": 0.1}
    assert f"<s>{BEFORE}What is 1 and 1?{AFTER} " in [text for text, _ in heard]
    assert [r["rating"] for r in records] == [6, 9, 6] * 2
    assert {r["model"] for r in records} == {"judge-2024-05-13"}
    assert {r["judge"] for r in records} == {"judge"}


def test_answers_outlive_a_judge_that_fails(tmp_path, judge_server):
    judge_server.failures = [400] * 10
    judged = {"judge_model": "judge", "judge_url": judge_server.url}
    with pytest.raises(UserError, match="gave no answer"):
        answered("wizardlm", tmp_path, lambda text: "Hm.", **judged)
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["generated"] for line in lines] == ["Hm."] * 6


def test_without_a_key_the_judge_is_missed_before_training(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    config = build_config(values("wizardlm", tmp_path, generation_samples=2, judge_model="gpt-4"))
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        run(config)
    assert not (tmp_path / "run").exists()


def test_batches_do_not_change_what_a_trained_model_says(tmp_path):
    """The official evaluation lost the attention mask, and with it most answers."""
    config = build_config(values("metamath", tmp_path, learning_rate=1e-2, max_steps=4))
    task = make_task(config)
    model = task.load_model()
    prompts = [task.tokenizer(f"{task.ask('word ' * n)} ")["input_ids"] for n in (1, 9, 3, 6)]
    alone = [generate(model, task.tokenizer, [p], max_new_tokens=12)[0] for p in prompts]
    assert len(set(alone)) > 1
    together = generate(model, task.tokenizer, prompts, batch_size=4, max_new_tokens=12)
    assert together == alone
    ids, mask = left_pad(prompts, task.tokenizer.pad_token_id)
    with torch.no_grad():
        blind = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(mask),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=task.tokenizer.pad_token_id,
        )
    said = task.tokenizer.batch_decode(blind[:, ids.shape[1] :], skip_special_tokens=True)
    assert said != alone


def test_drawn_answers_are_the_same_each_time_and_leave_the_random_state(tmp_path):
    task = make_task(build_config(values("metamath", tmp_path)))
    model = task.load_model()
    prompts = [task.tokenizer("Ann has")["input_ids"]] * 4
    torch.manual_seed(5)
    before = torch.get_rng_state()
    options = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.95}
    first = generate(model, task.tokenizer, prompts, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(first)) > 1
    assert generate(model, task.tokenizer, prompts, **options) == first


def test_humaneval_continued_is_lm_evals_way_of_asking(tmp_path):
    def says(text):
        number = int(re.search(r"def add_(\d+)", text).group(1))
        if "### Response" in text:
            return "nothing"
        assert text == f'<s>def add_{number}(x):\n    """Add {number} to x."""\n'
        return f"    return x + {number}\n\ndef rest(:"

    options = {"allow_code_execution": True, "code_seconds": 20, "humaneval_continued": True}
    metrics, _, records = answered("codefeedback", tmp_path, says, **options)
    assert metrics == {"humaneval": 0, "humaneval_continued": 1}
    assert records[0]["continued"]["completion"] == "    return x + 0\n"


def test_lm_evals_own_tasks_run_beside_the_benchmark(tmp_path):
    pytest.importorskip("lm_eval")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": f"{n} and 1?", "answer": f"#### {n + 1}"} for n in range(6)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "toy_sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    }
    (folder / "toy_sums.yaml").write_text(yaml.safe_dump(task))
    asked = {"harness_tasks": ["toy_sums"], "harness_folder": str(folder)}
    config = build_config(values("metamath", tmp_path, generation_samples=3, **asked))
    test = run(config)["metrics"]["test"]
    assert test["toy_sums.exact_match.none"] == 0
    assert {"gsm8k_paper", "gsm8k_strict"} <= set(test)
    make_task(config.with_values(harness_tasks=["gsm8k"]))  # lm-eval's own; its data is the hub's
    with pytest.raises(UserError, match="without a sandbox"):
        make_task(config.with_values(harness_tasks=["humaneval"]))


def test_a_trained_run_is_evaluated_again(tmp_path, capsys):
    config = build_config(values("metamath", tmp_path, generation_samples=4))
    first = run(config)["metrics"]["test"]
    capsys.readouterr()
    assert main(["evaluate", str(config.folder)]) == 0
    again = json.loads(capsys.readouterr().out)
    assert {k: again[k] for k in again if k.startswith("gsm8k")} == {
        k: first[k] for k in first if k.startswith("gsm8k")
    }
    assert main(["evaluate", str(config.folder), "--limit", "2"]) == 0
    lines = (config.folder / "predictions-test.jsonl").read_text().splitlines()
    assert len(lines) == 2
