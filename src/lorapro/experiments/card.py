"""The model card beside saved weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorapro.experiments.assets import is_asset

__all__ = ["model_card"]

_LOADERS = {
    "text_classification": "AutoModelForSequenceClassification",
    "images": "AutoModelForImageClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "glue": "AutoModelForSeq2SeqLM",
}


def model_card(about: Mapping[str, Any], kind: str) -> str:
    """Return a card: what it is, how it was trained, how good it is, how to load it.

    Args:
        about: see :func:`~lorapro.experiments.saved.about_run`, with ``metrics`` and ``versions``
            where they are known.
        kind: ``"adapter"``, or what is a whole model (``"merged"``, ``"model"``).
    """
    import yaml

    is_adapter = kind == "adapter"
    head = {
        "base_model": about["model"],
        "library_name": "peft" if is_adapter else "transformers",
        "tags": ["lorapro", *(["lora"] if is_adapter else []), about["method"]],
    }
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {about['task']}: {about['method']} on {about['model']}",
        "",
        f"{'An adapter' if is_adapter else 'A model'} trained with lorapro.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in _facts(about)),
    ]
    if about.get("metrics"):
        lines += ["", "## Metrics", "", "| set | metric | value |", "| --- | --- | ---: |"]
        lines += [
            f"| {split} | {name} | {value:.4g} |"
            for split, values in about["metrics"].items()
            for name, value in values.items()
            if value is not None and name != "loss_standard_error"
        ]
    labels = about.get("carried", {}).get("labels")
    if labels:
        lines += ["", "## Labels", "", ", ".join(f"{i}: {name}" for i, name in enumerate(labels))]
    lines += ["", "## Use", "", *_use(about, is_adapter, labels), ""]
    return "\n".join(lines)


def _facts(about: Mapping[str, Any]) -> list[tuple[str, Any]]:
    names = ("model", "method", "rank", "alpha", "learning_rate", "head_learning_rate")
    known = {**about.get("options", {}), **about}
    shown = [(n.replace("_", " "), known.get(n)) for n in (*names, "steps", "seed", "data")]
    facts = [("base model" if n == "model" else n, v) for n, v in shown if v is not None]
    if about.get("versions"):
        facts.append(("versions", ", ".join(f"{k} {v}" for k, v in about["versions"].items())))
    return facts


def _use(about: Mapping[str, Any], is_adapter: bool, labels: Any) -> list[str]:
    from lorapro.experiments.tasks import TASKS

    entry = TASKS.get(about["task"])
    loader = _LOADERS.get(entry.family if entry else "", "AutoModelForCausalLM")
    more = f", num_labels={len(labels)}" if labels and is_adapter else ""
    ask = "predict FOLDER --text" if labels else "generate FOLDER --prompt"
    lines = ["```", f"lorapro {ask} '...'", "```", "", "or", "", "```python"]
    if is_adapter:
        base, note = f'"{about["model"]}"', ""
        if is_asset(about["model"]):  # no id of the hub, and no path that holds elsewhere
            base, note = '"BASE"', f"  # the folder that 'lorapro fetch {about['model']}' prints"
        lines += [
            "from peft import PeftModel",
            f"from transformers import {loader}",
            "",
            f"base = {loader}.from_pretrained({base}{more}){note}",
            'model = PeftModel.from_pretrained(base, "FOLDER")',
        ]
    else:
        lines += [
            f"from transformers import {loader}",
            "",
            f'model = {loader}.from_pretrained("FOLDER")',
        ]
    return [*lines, "```"]
