"""Every layer type: the captured gradient is autograd's, the output stays, both bases."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lorapro import lora_ga
from lorapro.factors import find_pairs
from lorapro.lora_ga.decompose import gradient_objective

PREFIX = "base_model.model."


def image_loss(model, batch):
    out = model(batch)
    return (out.tanh().flatten(1) @ torch.arange(out[0].numel()).float().cos()).square().mean()


class Conv(nn.Module):
    """A two-dimensional and a one-dimensional convolution with unequal strides and paddings."""

    def __init__(self):
        super().__init__()
        self.two = nn.Conv2d(3, 12, (3, 2), stride=(2, 1), padding=(1, 0))
        self.one = nn.Conv1d(12, 10, 4, stride=3, padding=2)
        self.same = nn.Conv1d(10, 7, 4, padding="same")

    def forward(self, x):
        return self.same(self.one(self.two(x).tanh().flatten(2)))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.groups = nn.Conv2d(8, 12, 3, padding=1, groups=2)

    def forward(self, x):
        return self.groups(self.first(x).tanh())


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, 16, padding_idx=3)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.table(x).tanh().mean(1))


def conv_batches():
    torch.manual_seed(1)
    return [torch.randn(4, 3, 9, 8), torch.randn(2, 3, 9, 8)]


def word_batches():
    torch.manual_seed(1)
    return [torch.randint(0, 40, (6, 11)), torch.randint(0, 40, (3, 5))]


def weight_matrix(G, module):
    if isinstance(module, nn.Embedding):
        return G.mT
    return G.reshape(len(G), -1)


CASES = {
    "conv": (Conv, conv_batches, ["two", "one", "same"]),
    "embedding": (Words, word_batches, ["table"]),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("estimator", ["exact", "sketch"])
@pytest.mark.parametrize("base", ["subtract", "frozen"])
@pytest.mark.parametrize("case", CASES)
def test_convolutions_and_embeddings(tiny, case, base, estimator):
    build, make, targets = CASES[case]
    torch.manual_seed(0)
    net, batches = build(), make()
    model = get_peft_model(copy.deepcopy(net), LoraConfig(r=2, target_modules=targets))
    before = model(batches[0])
    lora_ga.initialize(
        model,
        batches,
        image_loss,
        scale="unit",
        base=base,
        estimator=estimator,
        oversampling=64,
    )
    after = model(batches[0])
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    for pair in find_pairs(model).pairs:
        name = pair.name.removeprefix(PREFIX)
        G = tiny.gradient(net, f"{name}.weight", batches, image_loss)
        G = weight_matrix(G, net.get_submodule(name)).double()
        A, B = (x[0] for x in pair.matrices(pair.A.detach(), pair.B.detach()))
        best = torch.linalg.svdvals(G)[4:].square().sum()
        assert gradient_objective(A, B, G) - best <= 1e-4 * G.square().sum(), name
    if base == "frozen":
        for name, p in net.named_parameters():
            kept = dict(model.named_parameters())
            path = PREFIX + name
            path = path if path in kept else path.replace(".weight", ".base_layer.weight")
            path = path if path in kept else path.replace(".bias", ".base_layer.bias")
            assert torch.equal(kept[path], p)
        merged = copy.deepcopy(model).merge_and_unload()
        assert (merged(batches[0]) - before).abs().max() <= 1e-4 * before.abs().max()


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
def test_grouped_convolution_needs_a_frozen_base():
    torch.manual_seed(0)
    net = Grouped()
    batches = [torch.randn(3, 4, 6, 6)]
    model = get_peft_model(copy.deepcopy(net), LoraConfig(r=4, target_modules=["groups"]))
    with pytest.raises(ValueError, match="grouped convolution"):
        lora_ga.initialize(model, batches, image_loss)
    before = model(batches[0])
    lora_ga.initialize(model, batches, image_loss, scale="unit", base="frozen")
    torch.testing.assert_close(model(batches[0]), before)
    (pair,) = find_pairs(model).pairs

    # The gradient of group g with respect to a convolution that sees all input channels.
    wide = nn.Conv2d(8, 12, 3, padding=1)
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:6, :4], wide.weight[6:, 4:] = net.groups.weight[:6], net.groups.weight[6:]
        wide.bias.copy_(net.groups.bias)
    image_loss(nn.Sequential(net.first, nn.Tanh(), wide), batches[0]).backward()
    A, B = pair.matrices(pair.A.detach(), pair.B.detach())
    for group, G in enumerate(wide.weight.grad.reshape(2, 6, -1).double()):
        best = torch.linalg.svdvals(G)[4:].square().sum()
        assert gradient_objective(A[group], B[group], G) - best <= 1e-4 * G.square().sum()


def test_conv1d_of_gpt2(tiny):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=48, n_layer=2, n_head=4)
    net, batches = GPT2LMHeadModel(config).eval(), tiny.batches()
    for base in ("subtract", "frozen"):
        model = tiny.adapted(
            copy.deepcopy(net), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
        )
        before = model(**batches[0]).logits
        lora_ga.initialize(model, batches, scale="unit", base=base)
        assert (model(**batches[0]).logits - before).abs().max() <= 1e-4 * before.abs().max()
        for pair in find_pairs(model).pairs:
            name = pair.name.removeprefix(PREFIX)
            G = tiny.gradient(net, f"{name}.weight", batches).mT.double()
            best = torch.linalg.svdvals(G)[8:].square().sum()
            reached = gradient_objective(pair.A.detach(), pair.B.detach(), G)
            assert reached - best <= 1e-4 * G.square().sum(), name


def experts_model():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = MixtralForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)
    return model


@pytest.mark.parametrize("estimator", ["exact", "sketch"])
@pytest.mark.parametrize("base", ["subtract", "frozen"])
def test_fused_experts(tiny, base, estimator):
    net, batches = experts_model(), tiny.batches()
    model = tiny.adapted(
        copy.deepcopy(net),
        r=2,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    before = model(**batches[0]).logits.detach()
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    report = lora_ga.initialize(
        model, batches, scale="unit", base=base, estimator=estimator, oversampling=40
    )
    after = model(**batches[0]).logits.detach()
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()
    experts = [row for row in report.layers if row.name.endswith("]")]
    assert len(experts) == 8
    checked = 0
    for pair in find_pairs(model).pairs:
        if pair.layout != "experts":
            continue
        m, _ = pair.shape
        name = "gate_up_proj" if m == 80 else "down_proj"
        G_all = tiny.gradient(net, f"model.layers.0.mlp.experts.{name}", batches)
        A, B = pair.matrices(pair.A.detach(), pair.B.detach())
        for a, b, G in zip(A, B, G_all.double(), strict=True):
            best = torch.linalg.svdvals(G)[4:].square().sum()
            assert gradient_objective(a, b, G) - best <= 1e-4 * G.square().sum()
            checked += 1
    assert checked == 8
    if base == "frozen":
        for name, p in model.named_parameters():
            assert "lora_" in name or torch.equal(p, weights[name])
    merged = copy.deepcopy(model).merge_and_unload()
    out = merged(**batches[0]).logits
    assert (out - before).abs().max() <= 1e-4 * before.abs().max()


def test_an_expert_without_tokens_keeps_its_default_start(tiny):
    net = experts_model()
    batch = {k: v[:1, :4] for k, v in tiny.batches()[1].items()}
    model = tiny.adapted(
        net, r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]
    )
    used = set()
    experts = next(m for m in model.modules() if type(m).__name__ == "MixtralExperts")
    handle = experts.register_forward_pre_hook(
        lambda module, args: used.update(args[1].flatten().tolist())
    )
    report = lora_ga.initialize(model, [batch], one_token_loss)
    handle.remove()
    rows = {int(r.name[-2]): r for r in report.layers if r.name.endswith("]")}
    assert 0 < len(used) < 4
    for i, row in rows.items():
        assert (row.directions == 0) == (i not in used)
        assert ("no gradient" in row.note) == (i not in used)


def one_token_loss(model, batch):
    return model(input_ids=batch["input_ids"][:, :1]).logits[0, 0].log_softmax(-1)[5]


def test_unsupported_layers_are_named_or_left(tiny):
    batches = tiny.batches()
    model = tiny.adapted(tiny.llama(), use_dora=True, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="q_proj.*DoraLinearVariant"):
        lora_ga.initialize(model, batches)
    with pytest.raises(ValueError, match="no trainable layer"):
        lora_ga.initialize(model, batches, unsupported="default")

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(3, 6, 3, padding=1, padding_mode="circular"), nn.Conv1d(6, 4, 3, padding=1)
    )
    data = [torch.randn(5, 3, 8)]
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "1"]))
    with pytest.raises(ValueError, match="padding_mode='circular'"):
        lora_ga.initialize(model, data, image_loss)
    report = lora_ga.initialize(model, data, image_loss, unsupported="default")
    assert [name for name, _ in report.untouched] == ["base_model.model.0"]
    assert "left at its default: base_model.model.0" in str(report)
    assert not model.base_model.model[0].lora_B["default"].weight.any()
    assert model.base_model.model[1].lora_B["default"].weight.any()


def test_attention_in_one_module_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["attention"]))
    with pytest.raises(ValueError, match="MultiheadAttention"):
        lora_ga.initialize(model, [torch.randn(2, 5, 16)], lambda m, x: m(x).square().mean())
