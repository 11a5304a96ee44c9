"""save_portable and save_merged: what is written is the trained model on the original base."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorapro import lora_ga
from lorapro.export import low_rank, save_merged, save_portable

# PEFT cannot convert these back itself, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern")

PATTERNS = {
    "use_rslora": True,
    "rank_pattern": {"q_proj": 2, "down_proj": 6},
    "alpha_pattern": {"v_proj": 3, "up_proj": 20},
}
STARTS = {
    "plain": None,
    "subtract": {"base": "subtract"},
    "frozen": {"base": "frozen"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


def llama(**changes):
    torch.manual_seed(0)
    options = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**options)).eval()


def batches():
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 97, (3, 15), generator=generator) for _ in range(2)]
    return [{"input_ids": x, "labels": x} for x in ids]


def started(start, base=None, remember=True, **config):
    torch.manual_seed(2)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **config}
    chosen = STARTS[start] or {}
    if "init_lora_weights" in chosen:
        options.update(chosen)
    model = get_peft_model(base or llama(), LoraConfig(**options))
    if "init_lora_weights" in chosen and remember:
        assert lora_ga.remember_initial(model) == 14
    elif "base" in chosen:
        lora_ga.initialize(model, batches(), **chosen)
    return model


def train(model, steps=6, lr=0.3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        model(**batches()[step % 2]).loss.backward()
        optimizer.step()
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(**batches()[0]).logits


def close(a, b, tolerance=1e-4):
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("config", [{}, PATTERNS], ids=["uniform", "rslora-patterns"])
@pytest.mark.parametrize("start", STARTS)
def test_reloaded_on_the_original_base_it_is_the_trained_model(start, config, tmp_path):
    model = train(started(start, **config))
    trained, state = logits(model), copy.deepcopy(model.state_dict())
    written_config = copy.deepcopy(model.peft_config["default"].to_dict())
    assert not close(trained, logits(llama()), 0.01)
    report = save_portable(model, tmp_path)

    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert close(logits(loaded), trained)
    highest = 6 if config else 4
    assert report.rank == (highest if start == "plain" else 2 * highest)
    assert report.error == 0
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (found["r"], found["lora_alpha"]) == (report.rank, report.rank)
    assert [found[k] for k in ("use_rslora", "rank_pattern", "alpha_pattern")] == [False, {}, {}]
    assert found["init_lora_weights"] is True
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 28
    for name, tensor in tensors.items():
        assert tensor.shape[0 if "lora_A" in name else 1] == report.rank, name

    # The model itself is as it was.
    assert model.peft_config["default"].to_dict() == written_config
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("start", ["subtract", "frozen", "pissa"])
def test_truncation_is_the_best_of_its_rank_and_reports_its_error(start, tmp_path):
    model = train(started(start, use_rslora=True))
    base = llama()
    report = save_portable(model, tmp_path, rank=3)
    assert report.rank == 3
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    merged = copy.deepcopy(model).merge_and_unload()
    for row in report.layers:
        name = row.name.removeprefix("base_model.model.")
        delta = merged.get_parameter(f"{name}.weight") - base.get_parameter(f"{name}.weight")
        A, B = (tensors[f"{row.name}.lora_{x}.weight"] for x in "AB")
        sigma = torch.linalg.svdvals(delta.detach().double())
        best = sigma[3:].norm() / sigma.norm()
        error = (delta - B @ A).detach().norm() / delta.detach().norm()
        assert float(error) == pytest.approx(float(best), abs=1e-3)
        assert row.error == pytest.approx(float(best), abs=1e-3)
    assert f"{report.error:.2%} at most" in str(report)
    assert save_portable(model, tmp_path, rank=50).rank == 8


def test_low_rank_of_an_exact_product():
    torch.manual_seed(0)
    left, right = torch.randn(3, 12, 4), torch.randn(3, 4, 9)
    B, A, error = low_rank(left, right, 4)
    torch.testing.assert_close(B @ A, (left @ right).double(), rtol=1e-5, atol=1e-5)
    assert (error < 1e-9).all()


def test_pissa_without_its_start(tmp_path):
    model = train(started("pissa", remember=False))
    trained = logits(model)
    target = tmp_path / "out"
    with pytest.raises(ValueError, match=r"remember_initial.*original="):
        save_portable(model, target)
    assert not target.exists()
    save_portable(model, target, original=llama())
    assert close(logits(PeftModel.from_pretrained(llama(), target).eval()), trained)

    # From where the base came from, if the config knows.
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = train(started("pissa", base=base, remember=False))
    save_portable(model, tmp_path / "again")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "again").eval()
    assert close(logits(loaded), logits(model))
    with pytest.raises(ValueError, match="no weight at"):
        save_portable(model, target, original=llama(hidden_size=32))


def test_a_base_changed_in_another_way_is_noticed(tmp_path):
    model = train(started("subtract"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "base_layer" in name:
                p.mul_(0.9)  # weight decay of full mode
    with pytest.raises(ValueError, match="save_merged"):
        save_portable(model, tmp_path / "adapter", original=llama())
    save_merged(model, tmp_path / "merged")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert close(logits(loaded), logits(model))


@pytest.mark.parametrize("start", STARTS)
def test_merged_model_is_the_trained_model(start, tmp_path):
    model = train(started(start, **PATTERNS))
    trained = logits(model)
    save_merged(model, tmp_path)
    assert close(logits(LlamaForCausalLM.from_pretrained(tmp_path).eval()), trained)
    assert torch.equal(logits(model), trained)  # merged in a copy
    assert not (tmp_path / "adapter_config.json").exists()


def test_full_mode_with_weight_decay_is_merged_as_it_is(tmp_path):
    import lorapro

    model = started("subtract", use_rslora=True)
    optimizer = lorapro.create_lorapro_optimizer(model, mode="full", lr=1e-2, weight_decay=0.5)
    for step in range(4):
        optimizer.zero_grad()
        model(**batches()[step % 2]).loss.backward()
        optimizer.step()
    trained = logits(model.eval())
    with pytest.raises(ValueError, match="decayed during training .* save_merged"):
        save_portable(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    save_merged(model, tmp_path)
    assert close(logits(LlamaForCausalLM.from_pretrained(tmp_path).eval()), trained)


def test_modules_to_save_bias_and_a_named_adapter_travel_along(tmp_path):
    torch.manual_seed(2)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], lora_dropout=0.1
    )
    model = get_peft_model(llama(), config, adapter_name="mine")
    lora_ga.initialize(model, batches(), adapter="mine")
    train(model)
    save_portable(model, tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    assert close(logits(loaded), logits(model))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.lm_head.weight" in tensors

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    model = get_peft_model(
        copy.deepcopy(net), LoraConfig(r=2, lora_alpha=7, lora_bias=True, target_modules=["0"])
    )
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight.normal_()
        model.base_model.model[0].lora_B["default"].bias.normal_()
    save_portable(model, tmp_path / "bias")
    x = torch.randn(3, 6)
    loaded = PeftModel.from_pretrained(net, tmp_path / "bias")
    torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
@pytest.mark.parametrize("base", ["subtract", "frozen"])
def test_convolutions_embeddings_and_experts(base, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(30, 8)
            self.conv = nn.Conv1d(8, 12, 3, padding=1)
            self.grouped = nn.Conv1d(12, 8, 3, groups=2)

        def forward(self, x):
            return self.grouped(self.conv(self.table(x).mT).tanh())

    torch.manual_seed(0)
    net = Net()
    targets = ["table", "conv"] + (["grouped"] if base == "frozen" else [])
    data = [torch.randint(0, 30, (4, 9))]
    model = get_peft_model(copy.deepcopy(net), LoraConfig(r=2, target_modules=targets))
    lora_ga.initialize(model, data, lambda m, x: m(x).square().mean(), base=base)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    save_portable(model, tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)
    torch.testing.assert_close(loaded(data[0]), model(data[0]), rtol=1e-4, atol=1e-4)
    assert not any("base_layer" in n for n in load_file(tmp_path / "adapter_model.safetensors"))


@pytest.mark.parametrize("base", ["subtract", "frozen"])
def test_fused_experts(base, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    def mixtral():
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
        )
        return MixtralForCausalLM(config).eval()

    config = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        rank_pattern={"q_proj": 3},
    )
    model = get_peft_model(mixtral(), config)
    lora_ga.initialize(model, batches(), base=base)
    train(model)
    assert save_portable(model, tmp_path).rank == 6
    loaded = PeftModel.from_pretrained(mixtral(), tmp_path).eval()
    assert close(logits(loaded), logits(model))
    assert not close(logits(model), logits(mixtral()), 0.01)


def test_half_precision_factors_lose_nothing_to_the_scaling(tmp_path):
    torch.manual_seed(2)
    config = LoraConfig(r=3, lora_alpha=8, use_rslora=True, target_modules=["q_proj"])
    model = get_peft_model(llama().to(torch.bfloat16), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    save_portable(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    B = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    expected = layer.scaling["default"] * layer.lora_B["default"].weight.float()
    torch.testing.assert_close(B, expected.detach())


def test_bad_input(tmp_path):
    model = started("plain")
    for match, arguments, options in (
        ("rank is 0", (model, tmp_path / "x"), {"rank": 0}),
        ("expected a PEFT model, found LlamaForCausalLM", (llama(), tmp_path / "x"), {}),
        ("no adapter 'other'", (model, tmp_path / "x"), {"adapter": "other"}),
        ("DoraLinearVariant", (started("plain", use_dora=True), tmp_path / "x"), {}),
    ):
        with pytest.raises(ValueError, match=match):
            save_portable(*arguments, **options)
        assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save_portable(model, tmp_path / "file")
    with pytest.raises(ValueError, match="expected a PEFT model"):
        save_merged(llama(), tmp_path / "x")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_merging_into_a_tied_weight_is_refused(tmp_path):
    model = started("plain", llama(tie_word_embeddings=True), target_modules=["lm_head"])
    with pytest.raises(ValueError, match="tied to .*embed_tokens"):
        save_merged(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.fixture
def run_folder(tmp_path):
    """An adapter from LoRA-GA's start as it lies on disk beside its base; and what it computes."""
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = started("subtract", base, task_type="CAUSAL_LM", use_rslora=True)
    train(model)
    model.save_pretrained(tmp_path / "run" / "adapter")
    return tmp_path, logits(model)


def test_export_command(run_folder, capsys):
    from lorapro.cli.export import run

    folder, trained = run_folder
    adapter, out = str(folder / "run" / "adapter"), folder / "out"
    run([adapter, str(out)])
    assert "plain LoRA of rank 8" in capsys.readouterr().out
    loaded = PeftModel.from_pretrained(llama(), out).eval()
    assert close(logits(loaded), trained)

    run([adapter, str(folder / "small"), "--rank", "2"])
    assert "at most" in capsys.readouterr().out
    assert json.loads((folder / "small" / "adapter_config.json").read_text())["r"] == 2

    run([adapter, str(folder / "merged"), "--merged"])
    loaded = LlamaForCausalLM.from_pretrained(folder / "merged").eval()
    assert close(logits(loaded), trained)


def test_export_command_refuses_bad_input(run_folder):
    from lorapro.cli.export import run
    from lorapro.experiments.errors import UserError

    folder, _ = run_folder
    adapter, out = str(folder / "run" / "adapter"), str(folder / "out")
    kept = sorted(folder.rglob("*"))
    for match, arguments in (
        ("no file or folder", [str(folder / "nothing"), out]),
        ("not an empty folder", [adapter, str(folder / "base")]),
        ("--rank must be at least 1", [adapter, out, "--rank", "0"]),
        ("has no rank", [adapter, out, "--merged", "--rank", "2"]),
        ("unknown flag '--initial'", [adapter, out, "--initial", str(folder)]),
        ("did you mean '--merged'", [adapter, out, "--merge"]),
        ("is a file", [str(folder / "run" / "adapter" / "lora_ga_initial.safetensors"), out]),
    ):
        with pytest.raises(UserError, match=match):
            run(arguments)
        assert sorted(folder.rglob("*")) == kept
