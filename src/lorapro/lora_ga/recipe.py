"""From what is known of one gradient to the factors of one matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorapro.lora_ga import decompose
from lorapro.lora_ga.estimate import Directions
from lorapro.lora_ga.layers import AdaptedLayer
from lorapro.lora_ga.report import LayerReport

__all__ = ["Recipe", "Result"]


@dataclass
class Result:
    """Factors of one matrix, (r, n) and (m, r), and its row of the report."""

    layer: AdaptedLayer
    block: int
    A: Tensor
    B: Tensor
    row: LayerReport


class Recipe:
    """The options that turn singular directions into factors."""

    def __init__(self, direction: str, scale: str, gamma: float, objective: str, seed: int) -> None:
        self.direction, self.scale, self.gamma, self.objective = direction, scale, gamma, objective
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def factors(self, found: Directions) -> Result:
        """Factors and report row from what is known of one gradient."""
        layer, block = found.layer, found.block
        r, (m, _) = layer.pair.rank, layer.shape
        s = layer.pair.scaling
        A_k, B_k = layer.factors(layer.pair.A.detach(), layer.pair.B.detach())
        A_now, B_now = A_k[block].to(found.U.dtype), B_k[block].to(found.U.dtype)
        name = layer.name if layer.blocks == 1 else f"{layer.name}[{block}]"
        W = layer.weight_matrices()
        W = None if W is None else W[block]
        if not found.energy > 0:
            row = LayerReport(
                name, layer.shape, r, 0, 0.0, 0.0, 1.0, 0.0, found.seconds, found.bytes,
                note="no gradient reached it; left at its default start",
            )  # fmt: skip
            return Result(layer, block, A_now.clone(), B_now.clone(), row)

        U, V, q = found.U, found.V, found.U.shape[-1]
        for_A, for_B = decompose.split_directions(self.direction, r, q, self.generator)
        A = V.new_zeros(r, V.shape[0])
        B = U.new_zeros(U.shape[0], r)
        A[: len(for_A)] = V[:, for_A].mT
        B[:, : len(for_B)] = U[:, for_B]
        values = None
        if self.objective == "adam" and found.gradient is not None:
            A, B, start, end = decompose.minimize_adam_objective(A, B, found.gradient)
            values = (start, end)
            if self.scale != "unit":
                A, B = A * _to_unit(A, len(for_A)), B * _to_unit(B, len(for_B))
        sigma_W = None
        if self.scale == "weight":
            if W is None:
                raise ValueError(
                    f"scale 'weight' needs the base weight of {layer.name}, which cannot be read; "
                    "use another scale."
                )
            sigma_W = decompose.leading_singular_values(W, r, self.generator)
        c = decompose.scale_factor(self.scale, m, s, self.gamma, sigma_W)
        A, B = c * A, c * B
        used = max(len(for_A), len(for_B))
        note = ""
        if q < 2 * r:
            note = f"2r = {2 * r} directions wanted, min(m, n) = {q} exist"
        if used < r:
            A[used:], B[:, used:] = _outside(A_now[used:], V), _outside(B_now.mT[used:], U).mT
        size = s * float((B.mT @ B @ A @ A.mT).trace().clamp_min(0).sqrt())
        row = LayerReport(
            name=name,
            shape=layer.shape,
            rank=r,
            directions=q,
            energy=min(1.0, float(found.sigma.double().square().sum()) / found.energy),
            gradient_norm=found.energy**0.5,
            scale=c,
            relative_size=size / float(W.float().norm()) if W is not None else float("nan"),
            seconds=found.seconds,
            peak_bytes=found.bytes,
            objective=values,
            note=note,
        )
        return Result(layer, block, A, B, row)


def _to_unit(factor: Tensor, count: int) -> Tensor:
    """What brings ``count`` rows or columns to unit length in the mean square."""
    norm = factor.norm()
    return count**0.5 / norm if norm > 0 else norm.new_ones(())


def _outside(rows: Tensor, basis: Tensor) -> Tensor:
    """Rows without their part in the span of ``basis`` (n, q); as they are if nothing is left.

    Components of the adapter beyond the directions that exist start as in plain LoRA, one factor
    at zero, where they do not disturb the others.
    """
    left = rows - (rows @ basis) @ basis.mT
    return left if left.norm() > 1e-3 * rows.norm() else rows
