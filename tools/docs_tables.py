"""The tables of README and docs, each made from results and code."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from markdown_tables import ROOT, read

from lorapro.rates import DAMPING, RATES

__all__ = ["TABLES", "rate"]

METHODS = (
    "full",
    "full-muon",
    "lora",
    "lora-pro",
    "lora-pro-damped",
    "lora-pro-full",
    "lora-pro-factored",
    "lora-pro-muon",
    "lora-muon",
)
CALLS = {
    "efficient": "create_lorapro_optimizer(model)",
    "full": 'create_lorapro_optimizer(model, mode="full")',
    "factored": 'create_lorapro_optimizer(model, mode="factored")',
    "muon": 'create_lorapro_optimizer(model, "muon")',
    "sgd": 'create_lorapro_optimizer(model, "sgd")',
}
APART = ("alpha", "batches")  # at a rate tuned for another alpha; the demo's runs once more
STEPS, TRAINING, MEMORY = (
    f"benchmarks/results/{name}.md" for name in ("step_time", "training_step", "memory")
)
OURS = {
    "peft-riemannian": "PEFT's Riemannian",
    "efficient": "efficient",
    "damped": "efficient, damped",
    "sgd": "SGD",
    "muon": "Muon",
    "factored": "factored",
    "full": "full",
}


def markdown(header: list[str], rows: list[list[str]], *, words: tuple[int, ...] = (0,)) -> str:
    """A table: columns of ``words`` to the left, those of numbers to the right."""
    sides = ["---" if i in words else "---:" for i in range(len(header))]
    line = "| " + " | ".join(sides) + " |"
    shown = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([shown[0], line, *shown[1:]])


def problems() -> Iterator[tuple[str, dict[str, dict[str, str]]]]:
    """Every comparison in ``results/`` as (name with a link, rows)."""
    for path in sorted((ROOT / "results").rglob("table.md")):
        if path.parent.name in APART:
            continue
        file = path.relative_to(ROOT).as_posix()
        title = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        found = {
            section: rows
            for section, rows in read(file).items()
            if all("against lora" in row for row in rows.values())
        }
        for section, rows in found.items():
            name = f"{title}: {section}" if len(found) > 1 else title
            yield f"[{name}](../{file})", rows


def of_methods(column: str, shown: Callable[[str], str], without: tuple[str, ...] = ()) -> str:
    """A row a problem, a column a method."""
    methods = [m for m in METHODS if m not in without]
    rows = []
    for name, found in problems():
        cells = [shown(found[m][column]) if m in found else "" for m in methods]
        rows.append([name, *cells])
    return markdown(["", *(f"`{m}`" for m in methods)], rows)


def rate(text: str) -> str:
    """A learning rate in powers of ten."""
    if not text:
        return ""
    number, power = f"{float(text):.3g}", f"{float(text):e}".split("e")
    digits = f"{float(power[0]):.3g}"
    return f"{digits}e{int(power[1])}" if float(number) < 1 else number


def verdicts() -> str:
    """Better, worse or a tie with tuned LoRA."""
    emphasis = {"better": "**better**", "worse": "*worse*"}
    return of_methods("against lora", lambda text: emphasis.get(text, text), without=("lora",))


def best_rates() -> str:
    """The rate that was best on validation data."""
    return of_methods("lr", rate)


def first_rates() -> str:
    """Where to begin, from ``lorapro.rates``."""
    rows = [
        [name, rate(str(lr)), f"{DAMPING[name]:g}", f"`{CALLS[name]}`"]
        for name, lr in RATES.items()
    ]
    return markdown(["", "`lr`", "`damping`", "built by"], rows, words=(0, 3))


def step_times() -> str:
    """One optimizer step over fused AdamW's."""
    ranks = (8, 32, 128)
    tables = [read(STEPS)[f"SmolLM2-135M, 210 pairs, r = {r}"] for r in ranks]
    rows = [
        [label, *(_first(table[row]["× adamw-fused"]) for table in tables)]
        for row, label in OURS.items()
    ]
    return markdown(["times fused AdamW's", *(f"r = {r}" for r in ranks)], rows)


def costs() -> str:
    """State, and the share of a training step, of each optimizer."""
    ranks = (8, 32)
    memory = [read(MEMORY)[f"SmolLM2-135M, 210 pairs, r = {r}"] for r in ranks]
    steps = [read(TRAINING)[f"r = {r}, one pass a round for all"] for r in ranks]
    rows = []
    names = {"adamw-fused": "LoRA, `torch.optim.AdamW`", **OURS}
    for row in ("adamw-fused", "efficient", "factored", "muon", "full"):
        state = [table[row]["× adamw-fused"] for table in memory]
        share = [table[row]["share"] if row in table else "not measured" for table in steps]
        rows.append([names[row], *state, *share])
    header = [f"state, of LoRA's AdamW, r = {r}" for r in ranks]
    return markdown(["", *header, *(f"share of a step, r = {r}" for r in ranks)], rows)


def small_batches() -> str:
    """Test loss minus LoRA's in the four tasks of small batches."""
    tasks = {
        "tweets": "tweets",
        "Fashion-MNIST": "fashion_mnist",
        "BBC news": "bbc_news",
        "GSM8K": "gsm8k_smollm2",
    }
    found = {
        name: rows
        for name, folder in tasks.items()
        for rows in read(f"results/{folder}/table.md").values()
        if "minus lora" in next(iter(rows.values())) and "lr" in next(iter(rows.values()))
    }
    labels = list(dict.fromkeys(label for rows in found.values() for label in rows))
    rows = [
        [f"`{label}`", *(t[label]["minus lora"] if label in t else "" for t in found.values())]
        for label in labels
        if label not in ("lora", "lora-pro-steady")
    ]
    return markdown(["", *found], rows)


def _first(text: str) -> str:
    number = float(text.split(" ")[0])
    return f"{number:.0f}" if number >= 20 else f"{number:.1f}"


def lab_cells(result: str) -> dict[str, dict[str, dict[str, str]]]:
    """The main tables of a result of the laboratory, by what the cell is called."""
    found = read(f"results/lab/{result}/table.md")
    return {name: rows for name, rows in found.items() if "minus lora" in rows.get("lora", {})}


def _tokens_and_rank(cell: str) -> str:
    found = [int(number) for number in re.findall(r"\d+", cell)]
    tokens, rank = [*(65536, 32)[: 2 - len(found)], *found]  # what all cells of a result share
    return f"{tokens:,}, r = {rank}"


def _of_each(cell: dict[str, dict[str, str]], labels: tuple[str, ...], column: str) -> list[str]:
    return [cell[label][column] if label in cell else "not run" for label in labels]


def lab_shares() -> str:
    """Share of the distance from LoRA to full fine-tuning with Muon, a row a cell."""
    labels = ("lora-pro-muon", "lora-muon", "full")
    rows = []
    for result in ("batches", "large"):
        for name, cell in lab_cells(result).items():
            gap = cell["full-muon"]["minus lora"].split(" ")[0]
            shares = _of_each(cell, labels, "gap closed")
            rows.append([_tokens_and_rank(name), *_minus(gap, *shares)])
    return markdown(["tokens a step, rank", "gap", *(f"`{m}`" for m in labels)], rows)


def lab_baselines() -> str:
    """Test loss minus LoRA's of other adapters, a row a cell."""
    labels = ("rslora", "lora+", "riemannian", "lora-muon", "lora-pro-muon")
    rows = []
    for name, cell in lab_cells("batches").items():
        if "rslora" in cell:
            rows.append([_tokens_and_rank(name), *_minus(*_of_each(cell, labels, "minus lora"))])
    return markdown(["tokens a step, rank", *(f"`{m}`" for m in labels)], rows)


def lab_cut() -> str:
    """Full fine-tuning with Muon, its change cut to a rank, beside an adapter of that rank."""
    found = read("results/lab/cut/table.md").values()
    cut = next(rows for rows in found if "test loss" in rows.get("cut-to-8", {}))
    ours = lab_cells("batches")
    rows = []
    for rank in (8, 32, 64):
        cell = ours[f"batch tokens 4096, rank {rank}"]
        losses = [row["test loss"] for row in (cut[f"cut-to-{rank}"], cell["lora-pro-muon"])]
        rows.append([str(rank), *losses, cell["full-muon"]["test loss"]])
    return markdown(["rank", "`cut-to-r`", "`lora-pro-muon`", "`full-muon`"], rows)


def planted() -> str:
    """Divergence from a planted teacher, and the share of the gap, a row a teacher and rank."""
    labels = ("lora", "lora-muon", "lora-pro-muon", "full", "full-muon")
    rows = []
    for name, cell in lab_cells("planted").items():
        condition, rank = re.findall(r"\d+", name)
        losses = [_loss(cell[m]) if m in cell else "not run" for m in labels]
        ours = cell["lora-pro-muon"]
        difference, share = ours["minus lora"], ours.get("gap closed", "no gap")
        rows.append([f"{int(condition):,}, r = {rank}", *losses, *_minus(difference, share)])
    header = [*(f"`{m}`" for m in labels), "`lora-pro-muon` minus `lora`", "share of the gap"]
    return markdown(["condition, rank", *header], rows)


def _real_model(result: str, *more: str) -> str:
    (cell,) = lab_cells(result).values()
    columns = ("lr", "test loss", "minus lora", "gap closed", *more)
    rows = [[f"`{label}`", *_minus(*(row[c] for c in columns))] for label, row in cell.items()]
    return markdown(["", "best rate", *columns[1:]], rows)


def encoder() -> str:
    """MiniLM in large batches."""
    return _real_model("encoder", "test accuracy")


def smollm2() -> str:
    """SmolLM2 in large batches."""
    return _real_model("smollm2")


def rates_elsewhere() -> str:
    """What a rate tuned at another rank, or by full fine-tuning, costs."""
    costs = read("results/lab/ranks/table.md")["Rates tuned elsewhere"]
    columns = ("mean cost", "worst", "with full fine-tuning's: mean, worst")
    rows = [[f"`{label}`", *(cells[c] for c in columns)] for label, cells in costs.items()]
    return markdown(["", "mean", "worst", "full fine-tuning's rate: mean, worst"], rows)


def _loss(row: dict[str, str]) -> str:
    return f"{float(row['test loss'].split(' ')[0]):.3f}"


def _minus(*cells: str) -> list[str]:
    return [cell.replace("-", "−") for cell in cells]


TABLES: dict[str, Callable[[], str]] = {
    "verdicts": verdicts,
    "best-rates": best_rates,
    "first-rates": first_rates,
    "step-times": step_times,
    "costs": costs,
    "small-batches": small_batches,
    "lab-shares": lab_shares,
    "lab-baselines": lab_baselines,
    "lab-cut": lab_cut,
    "planted": planted,
    "encoder": encoder,
    "smollm2": smollm2,
    "rates-elsewhere": rates_elsewhere,
}
