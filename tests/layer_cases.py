"""Layers that PEFT adapts, each with an independent dense gradient of the weight it adapts.

A case names the adapted weights of a base model. The reference shares nothing with the package:
the base model runs with ``W0 + Δ`` as a leaf, Δ multiplied out from PEFT's own parameters, and
autograd gives the true gradient g of the effective weight. Equal losses pin Δ to PEFT's forward.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

PREFIX = "base_model.model."
S, R = 1.5, 2  # scaling and rank of every pair, unless a pattern says otherwise


@dataclass
class Weight:
    """An adapted weight: its parameter, and how it is stored against the (k, m, n) of its pair."""

    parameter: str
    view: Callable[[Tensor], Tensor] = lambda W: W[None]
    store: Callable[[Tensor], Tensor] = lambda M: M[0]
    layout: str = "matrix"
    blocks: int = 1
    rank: int = R
    scaling: float = S
    in_forward: float = 1.0  # how often PEFT's forward adds Δ


@dataclass
class Case:
    net: nn.Module
    config: dict[str, Any]
    weights: dict[str, Weight]  # by the path of the adapted layer
    inputs: tuple[Tensor, ...]
    reference: nn.Module | None = None  # the dense model, if it is not the net itself
    dora: bool = False
    loss: Callable[..., Tensor] = field(default=lambda out: (out.square() * 0.5).sum())


transposed = {"view": lambda W: W.mT[None], "store": lambda M: M[0].mT}


def conv_weight(net, path):
    shape = net.get_submodule(path).weight.shape
    return Weight(f"{path}.weight", lambda W: W.flatten(1)[None], lambda M: M[0].reshape(shape))


def numbers(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def tokens(*shape):
    """Token ids; 0 pads, and PEFT lets a padding token reach B but not A."""
    return torch.randint(1, 11, shape)


def causal_lm(config_class, **options):
    """A tiny language model with random weights, and its loss."""
    sizes = {
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.4,
    }
    config = config_class(**{**sizes, **options})
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager")


def token_loss(out):
    return out.logits.double().square().mean() + out.logits.double().logsumexp(-1).mean()


def linear():
    net = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 4))
    weights = {"0": Weight("0.weight"), "2": Weight("2.weight")}
    return Case(net, {"target_modules": ["0", "2"]}, weights, (numbers(5, 7),))


def linear_with_patterns():
    net = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 5))
    weights = {
        "0": Weight("0.weight", scaling=3 / 2**0.5),
        "2": Weight("2.weight", rank=3, scaling=3 / 3**0.5),
        "4": Weight("4.weight", rank=1, scaling=8.0),
    }
    config = {
        "target_modules": ["0", "2", "4"],
        "rank_pattern": {"2": 3, "4": 1},
        "alpha_pattern": {"4": 8},
        "use_rslora": True,
    }
    return Case(net, config, weights, (numbers(5, 7),))


def linear_with_bias():
    case = linear()
    case.config["lora_bias"] = True  # starts at zero; trained plainly
    return case


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x):
        return self.lin(torch.tanh(self.lin(x)))


def used_twice():
    return Case(
        Twice(), {"target_modules": ["lin"]}, {"lin": Weight("lin.weight")}, (numbers(5, 6),)
    )


def gpt2():
    config = GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=6, n_inner=12)
    config.initializer_range = 0.4
    net = AutoModelForCausalLM.from_config(config)
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc")
    paths = {f"transformer.h.0.{name}" for name in names}
    weights = {path: Weight(f"{path}.weight", **transposed) for path in paths}
    modules = {"target_modules": list(names), "fan_in_fan_out": True}
    return Case(net.eval(), modules, weights, (tokens(2, 5),), loss=token_loss)


def embedding():
    net = nn.Sequential(nn.Embedding(11, 6), nn.Tanh(), nn.Linear(6, 3))
    weights = {"0": Weight("0.weight", **transposed)}
    return Case(net, {"target_modules": ["0"]}, weights, (tokens(4, 5),))


def conv(kind, **options):
    options = {"kernel_size": 3, "stride": 2, "padding": 1, **options}
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]

    def build():
        net = nn.Sequential(kind(3, 6, **options), nn.Tanh(), kind(6, 4, 1))
        weights = {path: conv_weight(net, path) for path in ("0", "2")}
        return Case(net, {"target_modules": ["0", "2"]}, weights, (numbers(2, 3, *[5] * dims),))

    return build


def grouped_conv():
    """PEFT's A sees all input channels, so the effective kernel is that of an ungrouped layer."""
    groups, out, inside = 2, 6, 4
    net = nn.Sequential(nn.Conv2d(inside, out, 3, padding=1, groups=groups))
    full = nn.Sequential(nn.Conv2d(inside, out, 3, padding=1))
    full[0].bias = net[0].bias
    with torch.no_grad():
        full[0].weight.zero_()
        for o, i in ((slice(0, 3), slice(0, 2)), (slice(3, 6), slice(2, 4))):
            full[0].weight[o, i] = net[0].weight[o]
    weight = Weight(
        "0.weight",
        view=lambda W: W.reshape(groups, out // groups, -1),
        store=lambda M: M.reshape(out, inside, 3, 3),
        layout="groups",
        blocks=groups,
    )
    config = {"target_modules": ["0"], "r": 4, "lora_alpha": 6}  # rank 2 in each group
    return Case(net, config, {"0": weight}, (numbers(2, inside, 5, 5),), reference=full)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


def multihead_attention():
    weights = {
        "attn": Weight("attn.in_proj_weight"),
        # PEFT adds the delta of out_proj twice on the forward pass, and once on the backward pass
        "attn.base_layer.out_proj": Weight("attn.out_proj.weight", in_forward=2.0),
    }
    return Case(Attention(), {"target_modules": ["attn"]}, weights, (numbers(2, 5, 8),))


def experts(config_class, path, flipped=False, **options):
    """Fused experts: (E, out, in) as stored, or (E, in, out) where the module says so."""

    def build():
        net = causal_lm(config_class, **options).eval()
        way = {"view": lambda W: W.mT, "store": lambda M: M.mT} if flipped else {}
        way = way or {"view": lambda W: W, "store": lambda M: M}
        fused = {"layout": "experts", "blocks": 3, **way}
        names = (f"{path}.gate_up_proj", f"{path}.down_proj")
        weights = {  # PEFT nests one wrapper a parameter, in the order of the model
            f"{path}.base_layer": Weight(names[0], **fused),
            path: Weight(names[1], **fused),
        }
        config = {"target_modules": [], "target_parameters": list(names)}
        return Case(net, config, weights, (tokens(2, 6),), loss=token_loss)

    return build


def plain_parameter():
    net = nn.Sequential(nn.Linear(7, 5))
    config = {"target_modules": [], "target_parameters": ["0.weight"]}
    return Case(net, config, {"0": Weight("0.weight")}, (numbers(4, 7),))


def tied_base():
    """A tied base weight under two adapters of their own: two effective weights, two pairs."""
    net = causal_lm(LlamaConfig, tie_word_embeddings=True)
    weights = {
        "model.embed_tokens": Weight("model.embed_tokens.weight", **transposed),
        "lm_head": Weight("lm_head.weight"),
    }
    modules = {"target_modules": ["embed_tokens", "lm_head"]}
    return Case(net, modules, weights, (tokens(2, 5),), loss=token_loss)


def dora(build):
    def build_dora():
        case = build()
        case.config["use_dora"] = case.dora = True
        return case

    return build_dora


CASES = {
    "linear": linear,
    "linear-patterns-rslora": linear_with_patterns,
    "linear-lora-bias": linear_with_bias,
    "used-twice": used_twice,
    "gpt2-conv1d": gpt2,
    "embedding": embedding,
    "conv1d": conv(nn.Conv1d),
    "conv2d": conv(nn.Conv2d, kernel_size=(3, 2), stride=(1, 2), padding=(2, 1)),
    "conv3d": conv(nn.Conv3d),
    "conv2d-grouped": grouped_conv,
    "multihead-attention": multihead_attention,
    "mixtral": experts(MixtralConfig, "model.layers.0.mlp.experts", num_local_experts=3),
    "qwen3-moe": experts(
        Qwen3MoeConfig,
        "model.layers.0.mlp.experts",
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=6,
    ),
    "llama4": experts(
        Llama4TextConfig,
        "model.layers.0.feed_forward.experts",
        num_local_experts=3,
        intermediate_size_mlp=6,
    ),
    "gpt-oss": experts(
        GptOssConfig,
        "model.layers.0.mlp.experts",
        flipped=True,
        num_local_experts=3,
        num_experts_per_tok=2,
    ),
    "parameter-2d": plain_parameter,
    "tied-base-weight": tied_base,
    "dora-linear": dora(linear),
    "dora-gpt2-conv1d": dora(gpt2),
    "dora-embedding": dora(embedding),
    "dora-conv1d": dora(conv(nn.Conv1d)),
    "dora-conv2d": dora(conv(nn.Conv2d)),
    "dora-conv3d": dora(conv(nn.Conv3d)),
}


def adapted(case):
    """The PEFT model in float64, every factor and magnitude away from its initial value."""
    config = LoraConfig(**{"r": R, "lora_alpha": S * R, **case.config})
    if case.config.get("use_rslora"):
        config.lora_alpha = 3
    with warnings.catch_warnings():
        # PEFT warns that tied weights and grouped convolutions cannot be merged
        warnings.simplefilter("ignore", UserWarning)
        model = get_peft_model(copy.deepcopy(case.net), config).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_magnitude" in name:
                p.mul_(1 + 0.2 * torch.rand_like(p))
            elif "lora_" in name and "bias" not in name:
                p.copy_(0.4 * torch.randn_like(p))
    return model


def factors(model, path, weight):
    """(A, B) of every block as PEFT's own forward takes them apart, float64 copies."""
    layer = model.get_submodule(PREFIX + path)
    if "default" in layer.lora_embedding_A:
        A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    A, B, k, r = A.detach().clone(), B.detach().clone(), weight.blocks, weight.rank
    if weight.layout == "experts":
        return [(A[e * r : (e + 1) * r], B[:, e::k]) for e in range(k)]
    A, B = A.flatten(1), B.flatten(1)
    m = len(B) // k
    return [(A[j * r : (j + 1) * r], B[j * m : (j + 1) * m]) for j in range(k)]


def delta(model, path, weight):
    return torch.stack([weight.scaling * B @ A for A, B in factors(model, path, weight)])


def dense_gradients(case, model):
    """Loss and gradient of every effective weight (k, m, n), by autograd on the dense model."""
    net = copy.deepcopy(case.reference or case.net).double()
    leaves, replaced = {}, {}
    for path, weight in case.weights.items():
        W0 = net.get_parameter(weight.parameter).detach()
        change = weight.in_forward * delta(model, path, weight)
        leaf = leaves[path] = (weight.view(W0) + change).requires_grad_()
        W = leaf
        if case.dora:  # the direction matrix, its norm a constant (DoRA, section 4.3)
            magnitude = model.get_submodule(PREFIX + path).lora_magnitude_vector["default"].weight
            norm = leaf.detach().norm(dim=-1)
            W = (magnitude.detach().flatten() / norm)[..., None] * leaf
        replaced[weight.parameter] = weight.store(W)
    loss = case.loss(functional_call(net, replaced, case.inputs, tie_weights=False))
    return loss, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
