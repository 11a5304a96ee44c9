"""CLIP's frozen prompt classifier against transformers' own CLIP on the same images."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel

from lorapro.experiments.tasks.clip_model import PromptClassifier, text_classifier
from lorapro.experiments.toys.clip import clip as write_clip

NAMES = ["sea ice", "stop sign 7", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("clip")
    write_clip(made, [])
    return made


@pytest.fixture(scope="module")
def clip(folder):
    model = CLIPModel.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def pixels():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def classifier_of(clip, templates=("a photo of a {c}",)):
    model, tokenizer = clip
    embeddings = text_classifier(model, tokenizer, NAMES, templates)
    copied = copy.deepcopy(model)
    return PromptClassifier.from_clip(copied, embeddings, NAMES).eval()


def test_zero_shot_logits_are_transformers_own(clip, pixels):
    model, tokenizer = clip
    prompts = [f"a photo of a {name}" for name in NAMES]
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens, pixel_values=pixels).logits_per_image
        found = classifier_of(clip)(pixels, labels=torch.tensor([0, 1, 2, 0, 1]))
    assert expected.std(dim=1).min() > 1e-3  # the prompts do not look alike
    torch.testing.assert_close(found.logits, expected, rtol=1e-5, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(expected, torch.tensor([0, 1, 2, 0, 1]))
    torch.testing.assert_close(found.loss, loss)


def test_several_templates_are_averaged_after_normalising(clip):
    model, tokenizer = clip
    templates = ["{c}", "a drawing of {c}!"]
    found = text_classifier(model, tokenizer, NAMES, templates)
    for row, name in zip(found, NAMES, strict=True):
        each = [text_classifier(model, tokenizer, [name], [t])[0] for t in templates]
        mean = (each[0] + each[1]) / 2
        torch.testing.assert_close(row, mean / mean.norm())
        assert row.norm() == pytest.approx(1, abs=1e-6)


def test_only_the_image_tower_is_trained(clip, pixels):
    model = classifier_of(clip)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all(name.startswith("vision_model.") for name in names)
    before = {n: b.clone() for n, b in model.named_buffers()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(pixels, labels=torch.tensor([0, 1, 2, 0, 1])).loss.backward()
    optimizer.step()
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert {"projection", "text_embeddings", "logit_scale"} <= set(before)


def test_adapters_reach_six_maps_a_layer_and_nothing_else(clip):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(classifier_of(clip), LoraConfig(r=2, target_modules="all-linear"))
    found = {
        n.split(".lora_A")[0].split("vision_model.")[1]
        for n, _ in adapted.named_parameters()
        if "lora_A" in n
    }
    maps = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "mlp.fc1",
        "mlp.fc2",
    )
    assert found == {f"encoder.layers.{i}.{name}" for i in (0, 1) for name in maps}


def test_a_saved_classifier_comes_back_without_the_text_side(clip, pixels, tmp_path):
    model = classifier_of(clip)
    model.save_pretrained(tmp_path)
    again = PromptClassifier.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(pixels).logits, model(pixels).logits)
    assert again.config.id2label == dict(enumerate(NAMES))


def test_pixels_as_clip_was_trained_are_the_processors(folder):
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(folder)
    image = Image.fromarray(np.arange(48 * 40 * 3, dtype=np.uint8).reshape(48, 40, 3))
    assert processor(images=[image], return_tensors="pt")["pixel_values"].shape == (
        1,
        3,
        32,
        32,
    )
