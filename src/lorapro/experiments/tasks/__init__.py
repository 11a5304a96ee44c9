"""Tasks: data, model class, collator and metric. Adding one is a class in :data:`TASKS`."""

from __future__ import annotations

from lorapro.experiments.tasks.base import Task, load_tokenizer
from lorapro.experiments.tasks.classification import Classification, Tweets
from lorapro.experiments.tasks.gsm8k import GSM8K
from lorapro.experiments.tasks.images import Images

__all__ = ["GSM8K", "TASKS", "Classification", "Images", "Task", "Tweets", "load_tokenizer"]

TASKS: dict[str, type[Task]] = {
    "tweets": Tweets,
    "classification": Classification,
    "gsm8k": GSM8K,
    "images": Images,
}
