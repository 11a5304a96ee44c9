"""Image classification: IDX files as MNIST's, or images of a hub data set."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lorapro.experiments.data import Row
from lorapro.experiments.errors import UserError
from lorapro.experiments.options import option
from lorapro.experiments.tasks.base import Examples, Family, load_pretrained
from lorapro.experiments.tasks.labelled import Labelled, NewHeadOptions, split_labelled

if TYPE_CHECKING:
    import PIL.Image
    from numpy import ndarray
    from transformers import PreTrainedModel

__all__ = [
    "Images",
    "ImagesOptions",
    "PixelCollator",
    "image_digest",
    "open_image",
    "to_pixels",
]


@dataclass
class ImagesOptions(NewHeadOptions):
    """Keys of image classification."""

    image_column: str = option("image", "column of the image")
    label_column: str = option("label", "column of the label")
    image_size: int = option(
        28, "height and width in pixels, a multiple of the model's patch", least=1
    )


class Images(Labelled, Family):
    """Classify an image; loss is cross-entropy, metric is accuracy.

    Data: a folder of IDX files (MNIST, Fashion-MNIST, KMNIST), or a hub data set with a column of
    images and one of labels. Images are kept as bytes at ``image_size`` x ``image_size`` pixels;
    the collator makes the normalised floats that the model reads.
    """

    options: ClassVar[type] = ImagesOptions
    head: ClassVar[str | None] = "classifier"

    def columns_used(self) -> tuple[str, ...]:
        """Image and label."""
        return self.args.image_column, self.args.label_column

    def reads_names(self) -> bool:
        """Those of own data."""
        return self.run.data is not None

    def input_columns(self) -> tuple[str, ...]:
        """Image."""
        return (self.args.image_column,)

    def input_row(self, text: str) -> Row:
        """An image file's path."""
        return {self.args.image_column: {"path": text, "bytes": None}}

    def split_rows(self) -> tuple[list[Row], list[Row], list[Row]]:
        """Read, check, drop repeated images, split."""
        column = self.args.image_column
        hint = " (set image_column and label_column)"
        splits, self.labels = split_labelled(
            self,
            hint,
            lambda row: image_digest(row[column], self.data_name),
        )
        return splits

    def load_processor(self) -> Any:
        """Load the image processor, and check ``image_size`` against the model's patches."""
        from transformers import AutoConfig, AutoImageProcessor

        patch = getattr(load_pretrained(AutoConfig, *self._model), "patch_size", None)
        size = self.args.image_size
        if isinstance(patch, int) and size % patch:
            near = max(patch, round(size / patch) * patch)
            raise UserError(
                f"image_size is {size}, but model {self.model_name!r} reads patches of {patch} x "
                f"{patch} pixels: set image_size to a multiple of {patch}, such as {near}"
            )
        try:
            return AutoImageProcessor.from_pretrained(self.model_path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"model {self.model_name!r} has no preprocessor_config.json, which says how its "
                "pixels are normalised; take a model that comes with one"
            ) from error

    @property
    def _model(self) -> tuple[str, str]:
        return self.model_path, self.model_name

    def encode(self, rows: list[Row]) -> Examples:
        """Decode and resize the images, number the labels."""
        column, label = self.columns_used()
        numbers = {name: number for number, name in enumerate(self.labels)}
        size = self.args.image_size
        return [
            {
                "pixel_values": to_pixels(row[column], size, self.data_name),
                "labels": numbers[str(row[label])],
            }
            for row in rows
        ]

    def load_model(self) -> PreTrainedModel:
        """Load the backbone with a fresh head for these labels."""
        import torch
        from transformers import AutoModelForImageClassification

        model = self.load_with_head(
            AutoModelForImageClassification,
            *self._model,
            ignore_mismatched_sizes=True,  # a head for other labels gives way to a fresh one
        )
        if not hasattr(model, str(self.head)):
            raise UserError(
                f"model {self.model_name!r} ({type(model).__name__}) has no module {self.head!r} "
                "to train in full; take one whose head has that name, such as a ViT or a DINOv2"
            )
        if self.train:
            with torch.no_grad():
                try:
                    model(**self.collator()(self.train[:1]))
                except ValueError as error:
                    reason = " ".join(str(error).split())
                    raise UserError(
                        f"model {self.model_name!r} takes no images of image_size "
                        f"{self.args.image_size}: {reason}"
                    ) from error
        return model

    def collator(self) -> Callable[[Examples], dict[str, Any]]:
        """Stack the images, grey ones as three equal channels, normalised for the model."""
        processor = self.processor
        normalise = getattr(processor, "do_normalize", True)
        return PixelCollator(
            scale=processor.rescale_factor if getattr(processor, "do_rescale", True) else 1.0,
            mean=tuple(processor.image_mean) if normalise else (0.0, 0.0, 0.0),
            std=tuple(processor.image_std) if normalise else (1.0, 1.0, 1.0),
            dtype=self.run.dtype,
        )


@dataclass(frozen=True)
class PixelCollator:
    """Turn examples of bytes into a batch: ``(scale · pixels - mean) / std``, channels first."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str = "float32"

    def __call__(self, examples: Examples) -> dict[str, Any]:
        """Return ``pixel_values`` (batch, 3, height, width) and ``labels`` (batch)."""
        import numpy as np
        import torch

        images = [example["pixel_values"] for example in examples]
        shape = (*images[0].shape[:2], 3)
        coloured = [
            np.broadcast_to(image if image.ndim == 3 else image[..., None], shape)
            for image in images
        ]
        pixels = torch.from_numpy(np.stack(coloured)).permute(0, 3, 1, 2).float()
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        normalised = (pixels * self.scale - mean) / std
        return {
            "pixel_values": normalised.to(getattr(torch, self.dtype)).contiguous(),
            "labels": torch.tensor([example["labels"] for example in examples]),
        }


def to_pixels(image: Any, size: int, source: str) -> ndarray:
    """Return an image as ``size`` x ``size`` bytes, grey (2 dimensions) or RGB (3).

    Another size is resampled (bicubic); an image that is not square is stretched.

    Args:
        image: an array of bytes, a PIL image, or a row of ``datasets.Image(decode=False)``.
        size: height and width to return.
        source: name of the data set, for error messages.

    Raises:
        UserError: not an image.
    """
    import numpy as np
    from PIL import Image

    pixels = open_image(image, source)
    if pixels.size != (size, size):
        pixels = pixels.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(pixels)


def open_image(image: Any, source: str) -> PIL.Image.Image:
    """Return an image decoded, grey (mode ``L``) or RGB; arguments as of :func:`to_pixels`."""
    import numpy as np
    from PIL import Image

    try:
        if isinstance(image, np.ndarray):
            opened = Image.fromarray(image)
        elif isinstance(image, dict):
            stored = image["bytes"]
            opened = Image.open(image["path"] if stored is None else io.BytesIO(stored))
        elif isinstance(image, Image.Image):
            opened = image
        else:
            raise _not_an_image(image, source)
        grey = opened.mode in ("1", "L")
        return opened.convert("L" if grey else "RGB")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"an image of {source} cannot be decoded: {error}") from error


def image_digest(image: Any, source: str) -> bytes:
    """Hash what an image is stored as: exact copies agree."""
    if isinstance(image, dict):
        content = image.get("bytes") or Path(str(image.get("path"))).read_bytes()
    elif hasattr(image, "tobytes"):
        content = image.tobytes()
    else:
        raise _not_an_image(image, source)
    return hashlib.blake2b(content, digest_size=16).digest()


def _not_an_image(found: Any, source: str) -> UserError:
    return UserError(
        f"the image column of {source} holds {type(found).__name__}, expected images "
        "(set image_column)"
    )
