"""The family clip: named labels from Parquet and class folders, prompts, pixels, zero-shot."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from lorapro.experiments.config import build_config
from lorapro.experiments.data import load_rows
from lorapro.experiments.errors import UserError
from lorapro.experiments.restore import evaluate_target
from lorapro.experiments.runner import make_task, run
from lorapro.experiments.tasks.clip_prompts import class_names
from lorapro.experiments.tasks.images import open_image
from lorapro.experiments.toys.clip import CLASSES, PUBLISHED, clip, named_images

SMALL = {
    "task": "clip",
    "validation_samples": 8,
    "test_samples": 0,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "eval_steps": 3,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 0,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    (folder / "model").mkdir()
    (folder / "data").mkdir()
    clip(folder / "model", [])
    named_images(folder / "data")
    return folder


@pytest.fixture
def see(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    folders = {"model": str(tiny / "model"), "data": str(tiny / "data")}
    return {**SMALL, **folders, "output_dir": str(tmp_path / "run")}


def reference(task, tiny, pixels, prompts):
    """Logits of transformers' own CLIP for the task's test images."""
    model = CLIPModel.from_pretrained(tiny / "model").eval()
    tokens = AutoTokenizer.from_pretrained(tiny / "model")(
        prompts, padding=True, return_tensors="pt"
    )
    images = [open_image(e["pixel_values"], "test").convert("RGB") for e in task.test]
    with torch.no_grad():
        return model(**tokens, pixel_values=pixels(images)).logits_per_image


def plain_pixels(images):
    small = [np.array(i.resize((32, 32), Image.Resampling.BILINEAR)) for i in images]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 255.0


@pytest.mark.parametrize("pixels", ["normalized", "plain"])
def test_the_zero_shot_row_is_transformers_own_clip(see, tiny, pixels):
    values = {**see, "method": "zero-shot", "pixels": pixels}
    config = build_config(values)
    task = make_task(config)
    assert task.names == ["ice field", "paved road", "red brick wall"]
    own = CLIPImageProcessorPil.from_pretrained(tiny / "model")
    make = {
        "plain": plain_pixels,
        "normalized": lambda images: own(images=images, return_tensors="pt")["pixel_values"],
    }[pixels]
    expected = reference(task, tiny, make, [f"a photo of a {name}" for name in task.names])
    labels = torch.tensor([e["labels"] for e in task.test])
    model = task.load_model().eval()
    with torch.no_grad():
        found = model(**task.collator()(task.test))
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
    result = run(config, task)
    assert result["steps"] == 0
    assert result["cost"]["trainable_parameters"] == 0
    test = result["metrics"]["test"]
    assert test["accuracy"] == pytest.approx((expected.argmax(-1) == labels).float().mean().item())
    loss = torch.nn.functional.cross_entropy(expected, labels).item()
    assert test["loss"] == pytest.approx(loss, rel=1e-4)


def test_pixels_and_prompts_change_what_is_seen(see, tiny):
    def loss(**values):
        out = f"{see['output_dir']}-{len(values)}-{values.get('ensemble')}"
        config = build_config({**see, "method": "zero-shot", "output_dir": out, **values})
        return run(config)["metrics"]["test"]["loss"]

    losses = [
        loss(),
        loss(pixels="plain"),
        loss(published="svhn", published_names=True),
        loss(published="svhn", ensemble=True),
    ]
    assert len({round(value, 4) for value in losses}) == 4


def test_published_prompts_are_averaged(see, tiny):
    values = {**see, "published": "dtd", "ensemble": True, "published_names": True}
    task = make_task(build_config(values))
    assert task.names == list(PUBLISHED)
    found = task.load_model().text_embeddings
    one = [
        make_task(build_config({**values, "ensemble": False, "template": template})).load_model()
        for template in ("a view of {c}.", "a small picture of {c}.")
    ]
    mean = sum(model.text_embeddings for model in one)
    torch.testing.assert_close(found, torch.nn.functional.normalize(mean, dim=-1))


def test_class_folders_are_read_like_parquet_files(see, tiny, tmp_path):
    task = make_task(build_config(see))
    for split, examples in (
        ("train", (*task.train, *task.validation)),
        ("test", task.test),
    ):
        for i, example in enumerate(examples):
            folder = tmp_path / "images" / split / task.labels[example["labels"]]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:03d}.png").write_bytes(example["pixel_values"]["bytes"])
    again = make_task(build_config({**see, "data": str(tmp_path / "images")}))
    assert again.labels == list(CLASSES)
    assert [len(again.train), len(again.validation)] == [88, 8]
    models = [t.load_model().eval() for t in (task, again)]
    losses = []
    for one, model in zip((task, again), models, strict=True):
        with torch.no_grad():
            losses.append(float(model(**one.collator()(one.test)).loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_broken_folder_is_one_clear_line(see, tmp_path):
    (tmp_path / "broken" / "data").mkdir(parents=True)
    (tmp_path / "broken" / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(UserError, match="cannot read the data set in .*broken") as caught:
        make_task(build_config({**see, "data": str(tmp_path / "broken")}))
    assert "\n" not in str(caught.value)


def test_labels_kept_hidden_have_no_name(tmp_path):
    import datasets

    features = datasets.Features({"label": datasets.ClassLabel(names=["cat", "dog"])})
    (tmp_path / "data").mkdir()
    for split, labels in (("train", [0, 1]), ("test", [-1, -1])):
        table = datasets.Dataset.from_dict({"label": labels}, features)
        table.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    splits = load_rows(str(tmp_path), names=True)
    assert [row["label"] for row in splits["train"]] == ["cat", "dog"]
    assert [row["label"] for row in splits["test"]] == [-1, -1]
    assert [row["label"] for row in load_rows(str(tmp_path))["train"]] == [0, 1]


@pytest.mark.parametrize("method", ["full", "lora", "lora-ga+lora-pro"])
def test_methods_train_the_image_tower_and_are_evaluated_alike_later(see, method):
    config = build_config({**see, "method": method, "learning_rate": 1e-3})
    task = make_task(config)
    result = run(config, task)
    assert result["steps"] == 3
    again = evaluate_target(str(config.folder))
    assert again["loss"] == pytest.approx(result["metrics"]["test"]["loss"], rel=1e-4)


def test_patterns_are_told_apart_by_what_the_prompts_say(see):
    values = {
        **see,
        "method": "lora-pro",
        "learning_rate": 5e-3,
        "max_steps": 40,
        "rank": 4,
    }
    assert run(build_config(values))["metrics"]["test"]["accuracy"] > 0.9


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"template": "a photo"}, r"template 'a photo' has no \{c\}"),
        ({"ensemble": True}, "need 'published'"),
        ({"published": "cers", "ensemble": True}, "did you mean 'cars'"),
        ({"pixels": "raw"}, "unknown pixels 'raw'"),
    ],
)
def test_bad_prompts_are_one_clear_line(see, values, message):
    with pytest.raises(UserError, match=message) as caught:
        make_task(build_config({**see, **values})).load_model()
    assert "\n" not in str(caught.value)


def test_another_model_is_refused(see, tiny, tmp_path):
    other = shutil.copytree(tiny / "model", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())["vision_config"]
    (other / "config.json").write_text(json.dumps({**config, "model_type": "clip_vision_model"}))
    task = make_task(build_config({**see, "model": str(other)}))
    with pytest.raises(UserError, match="not a CLIP with its text side"):
        task.load_model()


def test_names_follow_the_order_of_the_labels():
    assert class_names(["SeaLake", "River"], ["river", "lake"]) == ["lake", "river"]
    assert class_names(["10", "9"], ["nine", "ten"]) == ["ten", "nine"]
    assert class_names(["lake", "river"], ["river", "lake"]) == ["lake", "river"]
    with pytest.raises(UserError, match="names are 1, but the data has 2"):
        class_names(["a", "b"], ["a"])
