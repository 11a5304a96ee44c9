"""GLUE as classification with an encoder, the usual way: two segments, a fresh head."""

from __future__ import annotations

from lorapro.experiments.tasks.base import TaskEntry

__all__ = ["GLUE_ENCODER_TASKS"]


def _entry(
    name: str, texts: tuple[str, ...], metric: str = "accuracy", test: str = "validation"
) -> TaskEntry:
    columns = dict(zip(("text_column", "second_text_column"), texts, strict=False))
    return TaskEntry(
        f"glue-{name}-encoder",
        "text_classification",
        f"GLUE's {name} with an encoder and a head",
        model="FacebookAI/roberta-base",
        data="nyu-mll/glue",
        data_config=name,
        values={**columns, "max_length": 128, "test_split": test, "test_samples": 0},
        metric=metric,
        toy=("bert", f"glue_{name}"),
    )


GLUE_ENCODER_TASKS = (
    _entry("mnli", ("premise", "hypothesis"), test="validation_matched"),
    _entry("sst2", ("sentence",)),
    _entry("cola", ("sentence",), metric="matthews_correlation"),
    _entry("qnli", ("question", "sentence")),
    _entry("mrpc", ("sentence1", "sentence2")),
)
"""The metrics are GLUE's own; accuracy and F1 stand beside them in every result."""
