"""A DINOv2 backbone taken out of an ONNX export computes what the export computes."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest
import torch

from experiments.image_files import tiny_dinov2
from lorapro.experiments import assets
from lorapro.experiments.assets.models import dinov2_from_onnx
from lorapro.experiments.errors import UserError

__all__ = ["tiny_dinov2"]

FEATURES = "/backbone/layernorm/Add_1_output_0"
EXPORTED = (  # today's names of Dinov2's attention, and those in the export
    ("attention.q_proj", "attention.attention.query"),
    ("attention.k_proj", "attention.attention.key"),
    ("attention.v_proj", "attention.attention.value"),
    ("attention.o_proj", "attention.output.dense"),
)


def load(folder, auto="AutoModel", **options):
    import transformers

    found = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True, **options)
    model, info = found
    missing = {name.rpartition(".")[0] for name in info["missing_keys"]}
    assert not info["unexpected_keys"]
    return model.eval(), missing


def test_folded_weights_find_their_places(tiny_dinov2, tmp_path):
    onnx = pytest.importorskip("onnx", reason="the converter reads ONNX files")
    model, _ = load(tiny_dinov2)
    with torch.no_grad():
        for parameter in model.parameters():  # no tensor may pass for another
            parameter.add_(0.1 * torch.randn_like(parameter))
    initializers, nodes = [], []
    for name, tensor in model.state_dict().items():
        for new, old in EXPORTED:
            name = name.replace(new, old)
        array = tensor.numpy()
        if name == "embeddings.position_embeddings":
            parts = {"onnx::Reshape_2": array[:, 1:], "onnx::Concat_1": array[:, :1]}
        elif name.startswith("encoder") and array.ndim == 2:
            layer = "/backbone/" + name.removesuffix(".weight").replace(".", "/")
            layer = layer.replace("/layer/", "/layer.")
            folded = f"onnx::MatMul_{len(nodes)}"
            node = onnx.helper.make_node("MatMul", ["x", folded], ["y"], name=f"{layer}/MatMul")
            nodes.append(node)
            parts = {folded: array.T}
        else:
            parts = {f"backbone.{name}": array}
        for key, part in parts.items():
            initializers.append(onnx.numpy_helper.from_array(np.ascontiguousarray(part), key))
    other = onnx.numpy_helper.from_array(np.ones((64, 8), np.float32), "onnx::MatMul_999")
    nodes.append(onnx.helper.make_node("MatMul", ["y", other.name], ["z"], name="/decoder/MatMul"))
    graph = onnx.helper.make_graph(nodes, "main", [], [], [*initializers, other])
    (tmp_path / "source").mkdir()
    (tmp_path / "target").mkdir()
    onnx.save(onnx.helper.make_model(graph), tmp_path / "source" / "any.onnx")

    dinov2_from_onnx(tmp_path / "source", tmp_path / "target")

    converted, missing = load(tmp_path / "target")
    assert not missing
    pixels = torch.randn(2, 3, 42, 42)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        torch.testing.assert_close(converted(pixels).last_hidden_state, expected)
    _, missing = load(tmp_path / "target", "AutoModelForImageClassification", num_labels=7)
    assert missing == {"classifier"}


def test_without_onnx_it_says_what_to_install(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n == "onnx" else find(n))
    with pytest.raises(UserError, match=r"'onnx', which is not installed; run: pip install"):
        dinov2_from_onnx(tmp_path, tmp_path)


def test_the_real_backbone_computes_what_its_onnx_file_computes(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx", reason="reads the asset's ONNX file")
    runtime = pytest.importorskip("onnxruntime", reason="runs the asset's ONNX file")
    asset = assets.ASSETS["vit-s14-focus"]
    raw = dataclasses.replace(asset, name="raw", build=None, entry="vit_s_focus.onnx")
    monkeypatch.setitem(assets.ASSETS, "raw", raw)
    try:
        folder = assets.fetch("vit-s14-focus")
        monkeypatch.setenv("LORAPRO_CACHE", str(tmp_path))
        exported = onnx.load(assets.fetch("raw"))
    except UserError as error:
        pytest.skip(f"vit-s14-focus cannot be fetched here: {error}")
    exported.graph.output.append(onnx.helper.make_tensor_value_info(FEATURES, 1, None))
    session = runtime.InferenceSession(
        exported.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    model, missing = load(folder)
    assert not missing
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, 3, 224, 224))
    ramp = np.broadcast_to(np.linspace(-2, 2, 224), (1, 3, 224, 224))
    for pixels in (noise.astype(np.float32), ramp.astype(np.float32)):
        (expected,) = session.run([FEATURES], {"input_image": pixels})
        with torch.no_grad():
            found = model(torch.from_numpy(np.array(pixels))).last_hidden_state
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=2e-4)
