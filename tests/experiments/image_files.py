"""Small IDX files and a tiny vision model with random weights, saved as real ones are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def write_idx(path: Path, array: np.ndarray, kind: int = 8) -> Path:
    """Write an IDX file; gzipped if the name ends in ``.gz``."""
    header = bytes([0, 0, kind, array.ndim])
    sizes = b"".join(int(size).to_bytes(4, "big") for size in array.shape)
    content = header + sizes + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def drawings(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Grey 28 x 28 images of three kinds (bright rows, columns or corners), and their labels."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % 3).astype(np.uint8)
    images = rng.integers(0, 100, (count, 28, 28), dtype=np.uint8)
    bright = (np.s_[::4, :], np.s_[:, ::4], np.s_[::2, ::2])
    for image, label in zip(images, labels, strict=True):
        image[bright[label]] += 150
    return images, labels


def write_drawings(folder: Path, train: int, test: int, suffix: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    for name, count, seed in (("train", train, 0), ("t10k", test, 1)):
        if count:
            images, labels = drawings(count, seed)
            write_idx(folder / f"{name}-images-idx3-ubyte{suffix}", images)
            write_idx(folder / f"{name}-labels-idx1-ubyte{suffix}", labels)
    return folder


@pytest.fixture(scope="session")
def idx_folder(tmp_path_factory) -> Path:
    return write_drawings(tmp_path_factory.mktemp("idx"), 90, 24, ".gz")


@pytest.fixture(scope="session")
def tiny_dinov2(tmp_path_factory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("tiny-dinov2")
    torch.manual_seed(2)
    config = Dinov2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        mlp_ratio=2,
        image_size=56,
        patch_size=14,
        initializer_range=0.2,
        use_mask_token=False,
    )
    Dinov2Model(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.fixture
def see(tiny_dinov2, idx_folder, tmp_path) -> dict:
    """Values of a config that trains on images in about a second."""
    return {
        "task": "images",
        "model": str(tiny_dinov2),
        "data": str(idx_folder),
        "validation_samples": 15,
        "test_samples": 18,
        "rank": 2,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "eval_steps": 3,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        "output_dir": str(tmp_path / "run"),
    }
