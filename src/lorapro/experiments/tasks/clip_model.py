"""CLIP's image side with a frozen classifier made of prompts.

Shapes: N images, C classes, d width of the joint space, h width of the image tower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPPreTrainedModel, CLIPVisionConfig
from transformers.modeling_outputs import ImageClassifierOutput

__all__ = ["PromptClassifier", "text_classifier"]


class PromptClassifier(CLIPPreTrainedModel):
    r"""Logits :math:`e^t \cos(P\, v(\text{image}), u_c)`; only the image tower ``v`` is trained.

    The projection ``P`` (d, h), the classes' normalised text embeddings ``u`` (C, d) and the
    temperature ``t`` are CLIP's own, kept as buffers: no optimizer and no adapter meets them.
    """

    config_class = CLIPVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    projection: Tensor
    text_embeddings: Tensor
    logit_scale: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        from transformers import CLIPVisionModel

        tower = CLIPVisionModel(config)
        # Older versions of transformers wrap the tower once more.
        self.vision_model: nn.Module = getattr(tower, "vision_model", tower)
        width, joint = config.hidden_size, config.projection_dim
        self.register_buffer("projection", torch.zeros(joint, width))
        self.register_buffer("text_embeddings", torch.zeros(config.num_labels, joint))
        self.register_buffer("logit_scale", torch.zeros(()))
        self.post_init()

    @classmethod
    def from_clip(cls, clip: Any, text_embeddings: Tensor, labels: Sequence[str]) -> Any:
        """Take the image side of a ``CLIPModel`` and a classifier (C, d) for these labels."""
        config = clip.config.vision_config
        config.projection_dim = clip.config.projection_dim
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: number for number, name in enumerate(labels)}
        model = cls(config).to(clip.dtype)
        model.vision_model.load_state_dict(clip.vision_model.state_dict())
        with torch.no_grad():
            model.projection.copy_(clip.visual_projection.weight)
            model.text_embeddings.copy_(text_embeddings)
            model.logit_scale.copy_(clip.logit_scale)
        return model

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Return logits (N, C) and, given labels (N,), their cross-entropy.

        Args:
            pixel_values: (N, 3, height, width).
            labels: class numbers.
            kwargs: go to the image tower.
        """
        pooled = self.vision_model(pixel_values=pixel_values, **kwargs).pooler_output
        images = nn.functional.normalize(pooled @ self.projection.T, dim=-1)
        logits = self.logit_scale.exp() * images @ self.text_embeddings.T
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


@torch.no_grad()
def text_classifier(
    clip: Any,
    tokenizer: Callable[..., Any],
    names: Sequence[str],
    templates: Sequence[str],
) -> Tensor:
    """Return one normalised text embedding a class (C, d).

    Of several templates each embedding is normalised, then their mean: CLIP's ensemble of prompts.

    Args:
        clip: a ``CLIPModel``.
        tokenizer: the model's.
        names: of the classes.
        templates: with ``{c}`` where the name goes.
    """
    longest = clip.config.text_config.max_position_embeddings
    rows = []
    for name in names:
        prompts = [template.replace("{c}", name) for template in templates]
        tokens = tokenizer(
            prompts,
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        pooled = clip.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        each = nn.functional.normalize(clip.text_projection(pooled), dim=-1)
        rows.append(nn.functional.normalize(each.mean(0), dim=-1))
    return torch.stack(rows)
