"""The seven data sets of LoRA-Pro's Table 3.

The hub copies are those of the author of the code base that LoRA-Pro's grew from; their class names
and splits, the prompt and ``pixels: plain`` are that code's. The paper names none of them.
"""

from __future__ import annotations

from typing import Any

from lorapro.experiments.tasks.base import TaskEntry

__all__ = ["CLIP_TASKS"]


def _entry(name: str, about: str, data: str, config: str | None = None, **values: Any) -> TaskEntry:
    return TaskEntry(
        f"clip-{name}",
        "clip",
        about,
        model="openai/clip-vit-base-patch16",
        data=data,
        data_config=config,
        values={"published": name, "test_samples": 0, **values},
        metric="accuracy",
        toy=("clip", "named_images"),
    )


CLIP_TASKS = (
    TaskEntry(
        "clip",
        "clip",
        "images with named labels, classified by CLIP's prompts",
        model="openai/clip-vit-base-patch16",
        metric="accuracy",
        toy=("clip", "named_images"),
    ),
    _entry("cars", "196 makes of cars", "tanganke/stanford_cars"),
    _entry("dtd", "47 textures", "tanganke/dtd"),
    _entry(
        "eurosat",
        "satellite, 10 uses of land",
        "tanganke/eurosat",
        published_names=True,
    ),
    _entry("gtsrb", "43 German traffic signs", "tanganke/gtsrb", published_names=True),
    _entry("resisc45", "aerial, 45 kinds of scene", "tanganke/resisc45"),
    _entry("sun397", "397 scenes", "tanganke/sun397"),
    _entry("svhn", "digits of house numbers", "ufldl-stanford/svhn", "cropped_digits"),
)
