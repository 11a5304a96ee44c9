"""What an adapter has changed in a weight, as factors, and factors as an adapter stores them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorapro.factors import LoraPair, from_A, from_B
from lorapro.lora_ga.initial import initial_of
from lorapro.lora_ga.layers import AdaptedLayer, adapted_kind

__all__ = ["change_from_base", "change_of", "low_rank", "stored_factors", "stored_rank"]

# Share of the change that may lie outside rank 2r before it is no rounding any more.
_ROUNDING = 1e-2


def low_rank(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best factors of a given rank of a product, without forming it.

    Args:
        left: (..., m, p).
        right: (..., p, n).
        rank: r.

    Returns:
        ``(B, A, error)``: (..., m, r), (..., r, n) with ``B·A ≈ left·right``, the square root of
        the singular values in each; and (...,) the relative error in the Frobenius norm.

    >>> B, A, error = low_rank(torch.eye(3), torch.diag(torch.tensor([4.0, 3.0, 0.0])), 1)
    >>> (B @ A).round(decimals=3)[0], error
    (tensor([4., 0., 0.], dtype=torch.float64), tensor(0.6000, dtype=torch.float64))
    """
    Q_left, R_left = torch.linalg.qr(left.double())
    Q_right, R_right = torch.linalg.qr(right.double().mT)
    U, sigma, Vh = torch.linalg.svd(R_left @ R_right.mT, full_matrices=False)
    rank = min(rank, sigma.shape[-1])
    root = sigma[..., :rank].sqrt()
    B = (Q_left @ U[..., :rank]) * root.unsqueeze(-2)
    A = root.unsqueeze(-1) * (Vh[..., :rank, :] @ Q_right.mT)
    whole = sigma.square().sum(-1)
    rest = sigma[..., rank:].square().sum(-1)
    return B, A, (rest / whole.clamp_min(torch.finfo(whole.dtype).tiny)).sqrt()


@torch.no_grad()
def change_of(model: Any, pair: LoraPair, adapter: str) -> tuple[Tensor, Tensor]:
    """``s·B·A − s0·B0·A0`` as (k, m, p)·(k, p, n), float64."""
    A, B = pair.matrices(pair.A.detach().double(), pair.B.detach().double())
    left, right = pair.scaling * B, A
    initial = initial_of(model.get_submodule(pair.name), adapter)
    if initial is not None:
        A0, B0 = pair.matrices(initial.A.double(), initial.B.double())
        left = torch.cat([left, -initial.scaling * B0], dim=-1)
        right = torch.cat([right, A0], dim=-2)
    return left, right


@torch.no_grad()
def change_from_base(
    model: Any, original: nn.Module, pair: LoraPair, adapter: str, *, strict: bool
) -> tuple[Tensor, Tensor]:
    """The change of one weight against the original base, cut to rank 2r."""
    module: Any = model.get_submodule(pair.name)
    if getattr(module, "merged", False):
        raise ValueError(f"{pair.name} is merged; call unmerge_adapter() first.")
    base = module.get_base_layer()
    layer = AdaptedLayer(pair.name, adapted_kind(module, base), module, base, pair, adapter)
    path = pair.name.removeprefix("base_model.model.").replace(".base_layer", "")
    before: Any = original
    for part in path.split("."):
        before = getattr(before, part, None)
    before = before.get_base_layer() if hasattr(before, "get_base_layer") else before
    W0 = getattr(before, layer.weight_name, None)
    W = layer.weight_matrices()
    if W is None or not isinstance(W0, Tensor) or W0.shape != layer.weight.shape:
        raise ValueError(
            f"original has no weight at {path!r} of shape {tuple(layer.weight.shape)}; expected "
            "the base model that the adapter was added to."
        )
    left, right = change_of(model, pair, adapter)
    delta = W.double() + left @ right - layer.as_matrices(W0.detach()).to(W.device).double()
    U, sigma, Vh = torch.linalg.svd(delta, full_matrices=False)
    r = min(2 * pair.rank, sigma.shape[-1])
    rest = sigma[..., r:].norm() / sigma.norm().clamp_min(torch.finfo(torch.float64).tiny)
    if strict and rest > _ROUNDING:
        raise ValueError(
            f"{float(rest):.1%} of the change of {pair.name} is of higher rank than 2r: its base "
            "weight changed in another way (weight decay in full mode, another original, a "
            "quantized base). Use save_merged, or pass rank= to accept the loss."
        )
    return U[..., :r] * sigma[..., None, :r], Vh[..., :r, :]


def stored_rank(pair: LoraPair, left: Tensor) -> int:
    """Rank as a config counts it: over all groups of a convolution together."""
    return left.shape[-1] * (pair.blocks if pair.layout == "groups" else 1)


def stored_factors(pair: LoraPair, left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (k, m, p) and (k, p, n), padded to ``rank``, as the adapter stores A and B."""
    per_block = rank // pair.blocks if pair.layout == "groups" else rank
    k, m, p = left.shape
    B = left.new_zeros(k, m, per_block)
    A = right.new_zeros(k, per_block, right.shape[-1])
    B[..., :p], A[:, :p] = left, right
    rows = k * per_block if pair.layout != "matrix" else per_block
    columns = per_block * k if pair.layout == "experts" else per_block
    dtype = pair.A.dtype
    if not _exact_in(pair.scaling, dtype):
        dtype = torch.promote_types(dtype, torch.float32)
    like_A = A.new_empty(rows, *pair.A.shape[1:], dtype=dtype)
    like_B = B.new_empty(pair.B.shape[0], columns, *pair.B.shape[2:], dtype=dtype)
    return from_A(A.to(dtype), like_A), from_B(B.to(dtype), like_B, pair.layout)


def _exact_in(scaling: float, dtype: torch.dtype) -> bool:
    """Whether folding the scaling in rounds nothing: float32 and up, or a power of two."""
    return dtype.itemsize >= 4 or scaling.hex().partition("p")[0].rstrip("0") == "0x1."
