"""Image classification with CLIP: a frozen classifier of prompts, a trained image tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lorapro.experiments.data import Row
from lorapro.experiments.errors import UserError
from lorapro.experiments.options import option
from lorapro.experiments.tasks.base import (
    Examples,
    Family,
    load_pretrained,
    load_tokenizer,
)
from lorapro.experiments.tasks.clip_prompts import (
    class_names,
    published_names,
    published_templates,
)
from lorapro.experiments.tasks.images import image_digest, open_image
from lorapro.experiments.tasks.labelled import Labelled, split_labelled

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel

__all__ = ["Clip", "ClipCollator", "ClipOptions"]


@dataclass
class ClipOptions:
    """Keys of CLIP's image classification."""

    image_column: str = option("image", "column of the image")
    label_column: str = option("label", "column of the label")
    template: str = option("a photo of a {c}", "prompt, with {c} where the name of a class goes")
    published: str | None = option(
        None,
        "what CLIP's published names and templates call this data set (asset clip-prompts)",
    )
    published_names: bool = option(False, "call the classes by CLIP's published names")
    ensemble: bool = option(False, "mean over CLIP's published templates, instead of template")
    pixels: str = option(
        "normalized",
        "normalized: as CLIP was trained (resize, crop, mean and deviation); plain: stretched to "
        "a square, values in [0, 1], as the code behind LoRA-Pro's table",
        choices=("normalized", "plain"),
    )


class Clip(Labelled, Family):
    """Classify an image by the prompt that CLIP finds nearest; loss is cross-entropy.

    The text side is used once, to embed a prompt a class, and stays as it is; only the image tower
    is trained. Data: a hub data set, or the same schema in a local folder: Parquet files, or images
    in ``train/<class>/`` and ``test/<class>/``. Labels go by their names. Images stay as compressed
    as they came; the collator decodes them.
    """

    options: ClassVar[type] = ClipOptions
    named_labels: ClassVar[bool] = True
    carried: ClassVar[tuple[str, ...]] = ("labels", "names")

    def columns_used(self) -> tuple[str, ...]:
        """Image and label."""
        return self.args.image_column, self.args.label_column

    def input_columns(self) -> tuple[str, ...]:
        """Image."""
        return (self.args.image_column,)

    def input_row(self, text: str) -> Row:
        """An image file's path."""
        return {self.args.image_column: {"path": text, "bytes": None}}

    def split_rows(self) -> tuple[list[Row], list[Row], list[Row]]:
        """Read, check, drop repeated images, split."""
        column = self.args.image_column
        splits, self.labels = split_labelled(
            self,
            " (set image_column and label_column)",
            lambda row: image_digest(row[column], self.data_name),
        )
        known = (
            published_names(self._published, self.data_name) if self.args.published_names else None
        )
        self.names = class_names(self.labels, known)
        return splits

    @property
    def _published(self) -> str:
        if self.args.published is None:
            raise UserError(
                "published_names and ensemble need 'published', the name of a data set there"
            )
        return str(self.args.published)

    def _templates(self) -> list[str]:
        if self.args.ensemble:
            return published_templates(self._published, self.data_name)
        if "{c}" not in self.args.template:
            raise UserError(
                f"template {self.args.template!r} has no {{c}}, where the name of a class goes"
            )
        return [self.args.template]

    def load_processor(self) -> Any:
        """Load image processor (PIL's, which needs no torchvision) and tokenizer."""
        import transformers

        maker: Any = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
        try:
            images = maker.from_pretrained(self.model_path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"model {self.model_name!r} has no preprocessor_config.json, or is not there: take "
                "a CLIP, such as openai/clip-vit-base-patch16, or a folder of its files"
            ) from error
        tokenizer = load_tokenizer(self.model_path, self.model_name)
        return transformers.CLIPProcessor(image_processor=images, tokenizer=tokenizer)

    def encode(self, rows: list[Row]) -> Examples:
        """Number the labels; the images wait for the collator."""
        column, label = self.columns_used()
        numbers = {name: number for number, name in enumerate(self.labels)}
        return [{"pixel_values": r[column], "labels": numbers[str(r[label])]} for r in rows]

    def load_model(self) -> PreTrainedModel:
        """Load CLIP, embed the prompts, keep the image side.

        A folder that a run has saved holds that already.
        """
        import torch
        from transformers import AutoConfig, CLIPModel

        from lorapro.experiments.tasks.clip_model import (
            PromptClassifier,
            text_classifier,
        )

        where = self.model_path, self.model_name
        config = load_pretrained(AutoConfig, *where)
        if PromptClassifier.__name__ in (getattr(config, "architectures", None) or ()):
            return load_pretrained(PromptClassifier, *where, dtype=self.run.dtype)
        if getattr(config, "model_type", None) != "clip":
            raise UserError(
                f"model {self.model_name!r} is a {getattr(config, 'model_type', 'model')}, not a "
                "CLIP with its text side: take one such as openai/clip-vit-base-patch16"
            )
        clip: Any = load_pretrained(CLIPModel, *where, dtype="float32").eval()
        classifier = text_classifier(clip, self.processor.tokenizer, self.names, self._templates())
        model = PromptClassifier.from_clip(clip, classifier, self.labels)
        return model.to(getattr(torch, self.run.dtype))

    def collator(self) -> Callable[[Examples], dict[str, Any]]:
        """Decode the images and make the tensors that the image tower reads."""
        image_processor = self.processor.image_processor
        size = getattr(image_processor, "crop_size", None) or {
            "height": 224,
            "width": 224,
        }
        plain = (size["height"], size["width"]) if self.args.pixels == "plain" else None
        return ClipCollator(image_processor, plain, self.data_name, self.run.dtype)


@dataclass(frozen=True)
class ClipCollator:
    """Turn examples of encoded images into a batch.

    Attributes:
        processor: CLIP's image processor.
        plain: (height, width) to stretch to, values in [0, 1]; ``None`` for the processor's way.
        source: name of the data set, for error messages.
        dtype: of the pixels.
    """

    processor: Any
    plain: tuple[int, int] | None
    source: str
    dtype: str = "float32"

    def __call__(self, examples: Examples) -> dict[str, Any]:
        """Return ``pixel_values`` (batch, 3, height, width) and ``labels`` (batch)."""
        import numpy as np
        import torch

        images = [open_image(example["pixel_values"], self.source) for example in examples]
        coloured = [image.convert("RGB") for image in images]
        if self.plain is None:
            pixels = self.processor(images=coloured, return_tensors="pt")["pixel_values"]
        else:
            stack = np.stack([_stretched(image, self.plain) for image in coloured])
            pixels = torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 255
        return {
            "pixel_values": pixels.to(getattr(torch, self.dtype)).contiguous(),
            "labels": torch.tensor([example["labels"] for example in examples]),
        }


def _stretched(image: Image.Image, size: tuple[int, int]) -> Any:
    import numpy as np
    from PIL import Image

    height, width = size
    return np.array(image.resize((width, height), Image.Resampling.BILINEAR))
