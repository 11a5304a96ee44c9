"""The tasks: each one entry. Families of tasks are classes in modules of their own."""

from __future__ import annotations

from lorapro.experiments.errors import check_name
from lorapro.experiments.options import RunOptions
from lorapro.experiments.tasks.base import Family, TaskEntry
from lorapro.experiments.tasks.causal import Causal
from lorapro.experiments.tasks.clip import Clip
from lorapro.experiments.tasks.clip_tasks import CLIP_TASKS
from lorapro.experiments.tasks.glue import GLUE_TASKS, Glue
from lorapro.experiments.tasks.glue_encoder import GLUE_ENCODER_TASKS
from lorapro.experiments.tasks.gsm8k import gsm8k_row
from lorapro.experiments.tasks.images import Images
from lorapro.experiments.tasks.instruct import INSTRUCT_TASKS, Instruct
from lorapro.experiments.tasks.lab import LAB_TASKS, HiddenText, Planted
from lorapro.experiments.tasks.local_tasks import LOCAL_TASKS
from lorapro.experiments.tasks.seq2seq import Seq2Seq
from lorapro.experiments.tasks.sft import Sft
from lorapro.experiments.tasks.speech import Speech
from lorapro.experiments.tasks.text_classification import TextClassification

__all__ = ["FAMILIES", "TASKS", "find_task", "make_family", "option_classes"]

FAMILIES: dict[str, type[Family]] = {
    "text_classification": TextClassification,
    "seq2seq": Seq2Seq,
    "glue": Glue,
    "causal": Causal,
    "instruct": Instruct,
    "hidden_text": HiddenText,
    "planted": Planted,
    "sft": Sft,
    "images": Images,
    "clip": Clip,
    "speech": Speech,
}

_ENTRIES = (
    # Encoders and a label.
    TaskEntry(
        "tweets",
        "text_classification",
        "sentiment of tweets: negative, neutral, positive",
        model="minilm-l6",
        data="tweets",
        values={"label_column": "sentiment"},
        metric="accuracy",
        toy=("bert", "tweets"),
    ),
    TaskEntry(
        "classification",
        "text_classification",
        "any table with a column of texts and one of labels",
        model="minilm-l6",
        metric="accuracy",
        toy=("bert", "labelled_texts"),
    ),
    # Causal language models.
    TaskEntry(
        "gsm8k",
        "causal",
        "grade-school word problems, answered step by step",
        model="smollm2-135m-instruct",
        data="openai/gsm8k",
        data_config="main",
        values={"prompt": "{question}", "answer": "{answer}"},
        metric="exact_match",
        row=gsm8k_row,
        toy=("llama", "gsm8k"),
    ),
    TaskEntry(
        "text",
        "causal",
        "plain text in rows of max_length tokens",
        model="smollm2-135m-instruct",
        values={"format": "text"},
        toy=("llama", "texts"),
    ),
    # The papers' tasks in words: GLUE on T5; chat, mathematics and code on Llama.
    *GLUE_TASKS,
    *INSTRUCT_TASKS,
    # The laboratory: a small model made here, hidden layers alone.
    *LAB_TASKS,
    # Own data.
    TaskEntry(
        "sft",
        "sft",
        "own conversations, prompts and completions, or texts",
        model="smollm2-135m-instruct",
        toy=("llama", "chats"),
    ),
    # Images and a label.
    TaskEntry(
        "images",
        "images",
        "images and labels: IDX files as MNIST's, or a hub data set",
        model="vit-s14-focus",
        data="zalando-datasets/fashion_mnist",
        metric="accuracy",
        toy=("dinov2", "idx_images"),
    ),
    *CLIP_TASKS,
    *GLUE_ENCODER_TASKS,
    *LOCAL_TASKS,
)

TASKS: dict[str, TaskEntry] = {entry.name: entry for entry in _ENTRIES}


def find_task(name: str) -> TaskEntry:
    """Return the entry of that name.

    Raises:
        UserError: no such task, with the nearest.
    """
    return TASKS[check_name("task", name, TASKS)]


def make_family(entry: TaskEntry, run: RunOptions, options: object) -> Family:
    """Return the family's instance for a configuration, nothing read yet."""
    return FAMILIES[entry.family](entry, run, options)


def option_classes() -> list[type]:
    """Options dataclasses of all families."""
    return [family.options for family in FAMILIES.values()]
