"""A tiny random CLIP and drawn images in the schema of CLIP's data sets on the hub."""

from __future__ import annotations

import json
import string
from pathlib import Path

__all__ = ["clip", "named_images"]

SPECIAL = ("<|startoftext|>", "<|endoftext|>")
CLASSES = ("ice_field", "paved_road", "red_brick_wall")
PUBLISHED = ("a field of ice", "a paved road", "a wall of red bricks")
KEYS = ("cars", "dtd", "eurosat", "gtsrb", "resisc45", "sun397", "svhn")


def clip(folder: Path, texts: list[str]) -> None:
    """Save a CLIP of two layers a side, a tokenizer of single characters, an image processor."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    letters = string.ascii_lowercase + string.digits + string.punctuation
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), *SPECIAL]
    numbers = {token: number for number, token in enumerate(vocabulary)}
    start, end = (numbers[token] for token in SPECIAL)
    layers = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = {
        **layers,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 77,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    side, patch = 32, 8
    vision = {**layers, "image_size": side, "patch_size": patch}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        model = CLIPModel(config)
    with torch.no_grad():  # as they are, all prompts look alike to it
        for parameter in model.text_model.parameters():
            parameter.mul_(3)
    model.save_pretrained(folder)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    pixels = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    for name, content in (
        ("vocab.json", numbers),
        ("tokenizer_config.json", settings),
        ("preprocessor_config.json", pixels),
    ):
        (folder / name).write_text(json.dumps(content), "utf-8")


def named_images(folder: Path) -> tuple[Path, list[str]]:
    """Parquet files of ``image`` and a named ``label``; names and templates of CLIP beside them."""
    import io

    import datasets
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    (folder / "data").mkdir()
    datasets.disable_progress_bars()
    for split, count in (("train", 96), ("test", 24)):
        labels = [number % len(CLASSES) for number in range(count)]
        images = []
        for label in labels:
            pixels = rng.integers(0, 90, (24, 32, 3), dtype=np.uint8)
            pixels[:: 2 + label, :, label] += 150
            stored = io.BytesIO()
            Image.fromarray(pixels).save(stored, "PNG")
            images.append({"bytes": stored.getvalue(), "path": None})
        table = datasets.Dataset.from_dict({"image": images, "label": labels}, features)
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    datasets.enable_progress_bars()
    names = {key: list(PUBLISHED) for key in KEYS}
    prompts = {key: ["a view of {c}.", "a small picture of {c}."] for key in KEYS}
    (folder / "en_classnames.json").write_text(json.dumps(names), "utf-8")
    (folder / "en_zeroshot_classification_templates.json").write_text(json.dumps(prompts), "utf-8")
    return folder, []
