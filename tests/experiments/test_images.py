"""The task images: IDX files and hub rows, a model without a tokenizer, every method."""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.image_files import (
    drawings,
    idx_folder,
    see,
    tiny_dinov2,
    write_drawings,
    write_idx,
)
from experiments.tiny_models import run_until, write_yaml
from lorapro.cli.main import main
from lorapro.experiments.config import build_config
from lorapro.experiments.data import load_rows
from lorapro.experiments.errors import UserError
from lorapro.experiments.idx import read_idx
from lorapro.experiments.model_building import build_model
from lorapro.experiments.restore import evaluate_target
from lorapro.experiments.runner import make_task, run

__all__ = ["idx_folder", "see", "tiny_dinov2"]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folders_become_rows(tmp_path, suffix):
    rows = load_rows(str(write_drawings(tmp_path / "idx", 9, 6, suffix)))
    assert {name: len(split) for name, split in rows.items()} == {"train": 9, "test": 6}
    images, labels = drawings(6, seed=1)
    assert [row["label"] for row in rows["test"]] == labels.tolist()
    assert all(np.array_equal(r["image"], i) for r, i in zip(rows["test"], images, strict=True))


def test_a_folder_without_test_files_has_training_rows_only(tmp_path, see):
    folder = write_drawings(tmp_path / "idx", 60, 0)
    assert list(load_rows(str(folder))) == ["train"]
    task = make_task(build_config({**see, "data": str(folder)}))
    assert [len(task.train), len(task.validation), len(task.test)] == [27, 15, 18]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"PNG and so on", "does not start as an IDX file"),
        ("train-images-idx3-ubyte", b"", "does not start as an IDX file"),
        ("train-images-idx3-ubyte", b"\0\0\x0d\x01\0\0\0\x01abcd", "IDX type 0x0d, expected 0x08"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03\0\0\0\x05\0\0", "10 bytes, but its header"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x01\0\0\0\x02ab", "1 dimensions, expected 3"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x00", "shape missing"),
        ("train-labels-idx1-ubyte", b"\0\0\x08\x01\0\0\0\x02ab", "90 images, but .* 2 labels"),
        ("train-labels-idx1-ubyte", b"\0\0\x08\x01\0\0\0\x09ab", "header tells of 17"),
        ("train-labels-idx1-ubyte", None, "has no train-labels-idx1-ubyte"),
        ("t10k-images-idx3-ubyte", None, "has no t10k-images-idx3-ubyte"),
        ("train-images-idx3-ubyte.gz", b"\x1f\x8b\x08 cut", "cannot read"),
    ],
)
def test_broken_idx_files_are_one_clear_line(tmp_path, name, content, message):
    folder = write_drawings(tmp_path / "idx", 90, 6)
    (folder / name.removesuffix(".gz")).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_rows(str(folder))
    assert "\n" not in str(caught.value)
    assert "idx" in str(caught.value)


def test_an_idx_array_of_any_shape_is_read_as_it_was_written(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    assert np.array_equal(read_idx(write_idx(tmp_path / "a.gz", array)), array)


def test_splits_share_no_image_and_do_not_move_with_the_seed(see, idx_folder):
    first = make_task(build_config(see))
    again = make_task(build_config({**see, "seed": 5, "method": "full"}))
    assert first.labels == ["0", "1", "2"]
    assert [len(first.train), len(first.validation), len(first.test)] == [75, 15, 18]
    assert Counter(e["labels"] for e in first.validation) == {0: 5, 1: 5, 2: 5}
    parts = [{e["pixel_values"].tobytes() for e in p} for p in (first.train, first.validation)]
    assert len(parts[0] | parts[1]) == 90
    for one, other in zip(first.train, again.train, strict=True):
        assert np.array_equal(one["pixel_values"], other["pixel_values"])


def test_repeated_images_count_once_and_with_two_labels_not_at_all(see, tmp_path):
    folder = write_drawings(tmp_path / "idx", 60, 12)
    images, labels = drawings(60)
    images[57], images[58] = images[0], images[1]  # labels 0, 0 and 1, 1
    labels[58] = 2
    write_idx(folder / "train-images-idx3-ubyte", images)
    write_idx(folder / "train-labels-idx1-ubyte", labels)
    task = make_task(build_config({**see, "data": str(folder)}))
    assert len(task.train) + len(task.validation) == 57


def test_a_batch_is_what_the_models_own_processor_makes(see):
    task = make_task(build_config({**see, "image_size": 42}))
    rows = task.split_rows()[0][:5]
    assert task.train[0]["pixel_values"].dtype == np.uint8
    batch = task.collator()(task.train[:5])
    size = {"height": 42, "width": 42}
    images = [Image.fromarray(row["image"]).convert("RGB") for row in rows]
    expected = task.processor(
        images,
        size=size,
        resample=3,
        do_resize=True,
        do_center_crop=False,
        do_normalize=True,
        do_rescale=True,
        return_tensors="pt",
    )["pixel_values"]
    assert batch["pixel_values"].shape == (5, 3, 42, 42)
    torch.testing.assert_close(batch["pixel_values"], expected, rtol=0, atol=1e-6)
    assert batch["labels"].tolist() == [row["label"] for row in rows]


def test_images_of_a_hub_data_set_stay_compressed_until_used(see, monkeypatch):
    import datasets

    def split(count, seed):
        rng = np.random.default_rng(seed)
        pictures = [rng.integers(0, 255, (20, 30, 3), dtype=np.uint8) for _ in range(count)]
        columns = {
            "img": [Image.fromarray(p) for p in pictures],
            "label": [i % 2 for i in range(count)],
        }
        features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
        return datasets.Dataset.from_dict(columns, features=features)

    loaded = datasets.DatasetDict(train=split(40, 0), test=split(10, 1))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: loaded)
    assert isinstance(load_rows("someone/pictures")["train"][0]["img"]["bytes"], bytes)
    values = {**see, "data": "someone/pictures", "image_column": "img", "test_samples": 10}
    task = make_task(build_config(values))
    assert [len(task.train), len(task.validation), len(task.test)] == [25, 15, 10]
    assert task.train[0]["pixel_values"].shape == (28, 28, 3)
    expected = loaded["test"][0]["img"].resize((28, 28), Image.Resampling.BICUBIC)
    assert any(np.array_equal(e["pixel_values"], np.array(expected)) for e in task.test)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 30}, "image_size is 30, but .* patches of 14 x 14 .* such as 28"),
        ({"image_size": 5}, "such as 14"),
        ({"image_column": "img"}, "no column 'img'; its columns are: image, label"),
        ({"image_column": "label"}, "holds int, expected images"),
        ({"validation_samples": 90}, "validation_samples is 90, but only 90"),
        ({"model": "no/such-model"}, "no model 'no/such-model'"),
    ],
)
def test_bad_configs_are_one_clear_line(see, change, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message) as caught:
        make_task(build_config({**see, **change}))
    assert "\n" not in str(caught.value)


def test_an_image_size_below_one_is_refused_with_the_config(see):
    with pytest.raises(UserError, match="image_size must be at least 1"):
        build_config({**see, "image_size": 0})


def test_a_model_without_pixel_statistics_is_refused(see, tiny_dinov2, tmp_path):
    bare = shutil.copytree(tiny_dinov2, tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="has no preprocessor_config.json"):
        make_task(build_config({**see, "model": str(bare)}))


def test_a_model_that_cannot_change_its_size_is_refused(see, tiny_dinov2, tmp_path):
    from transformers import ViTConfig, ViTModel

    options = {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = ViTConfig(hidden_size=16, image_size=56, patch_size=14, **options)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    shutil.copy(tiny_dinov2 / "preprocessor_config.json", tmp_path / "vit")
    values = {**see, "model": str(tmp_path / "vit")}
    with pytest.raises(UserError, match="takes no images of image_size 28"):
        make_task(build_config(values)).load_model()
    assert make_task(build_config({**values, "image_size": 56})).load_model().num_labels == 3


def test_the_head_is_trained_in_full_and_gets_no_adapter(see):
    config = build_config({**see, "method": "lora"})
    model = build_model(config, make_task(config))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    heads = {n for n in trained if "classifier" in n}
    assert {n.rsplit(".", 1)[1] for n in heads} == {"weight", "bias"}
    assert not any("lora" in n for n in heads)
    assert all("lora_" in n for n in trained - heads)
    assert len(trained - heads) == 2 * 6 * 2  # A and B of six linear maps in two layers


@pytest.mark.parametrize("method", ["full", "lora", "adalora", "lora-ga", "lora-pro-full"])
def test_each_method_trains_and_is_evaluated_alike_later(see, method):
    config = build_config({**see, "method": method})
    result = run(config)
    assert result["steps"] == 6
    again = evaluate_target(str(config.folder), limit=18)
    assert again["loss"] == pytest.approx(result["metrics"]["test"]["loss"], rel=1e-4)
    assert again["accuracy"] == result["metrics"]["test"]["accuracy"]
    for name in result["saved"].values():
        assert (config.folder / name / "preprocessor_config.json").is_file()


def test_patterns_are_told_apart(see):
    values = {**see, "method": "lora-pro", "learning_rate": 1e-2, "max_steps": 40}
    assert run(build_config(values))["metrics"]["test"]["accuracy"] > 0.9


def test_an_interrupted_run_goes_on_to_the_same_end(see, tmp_path):
    values = {**see, "save_strategy": "steps", "save_steps": 2}
    whole = run(build_config({**values, "output_dir": str(tmp_path / "whole")}))
    config = build_config({**values, "output_dir": str(tmp_path / "parts")})
    run_until(config, 5)
    said = []
    parts = run(config, log=said.append)
    assert said == ["going on from checkpoint-4"]
    assert parts["metrics"]["test"] == whole["metrics"]["test"]


def test_compare_through_the_command_line(see, tmp_path, capsys):
    values = {k: v for k, v in see.items() if k not in ("seed", "output_dir")}
    methods = {"full": 1e-3, "lora": 3e-3, "lora-pro": 3e-3}
    path = str(write_yaml(tmp_path / "c.yaml", {**values, "max_steps": 2, "methods": methods}))
    assert main(["compare", path, "--output_dir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "test accuracy" in out
    assert "\nimages\n" in out
    assert "against lora" in out
