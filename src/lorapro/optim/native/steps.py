"""Optimizer steps of the compiled library, for parameter groups of pairs."""

from __future__ import annotations

import array
import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from lorapro.functional import X_CHOICES
from lorapro.optim.batched import MOST_CONDITION, MOST_SMALLER_CONDITION
from lorapro.optim.native.build import PRECISIONS, library

__all__ = ["PER_PAIR", "STATE_SLOTS", "step_pairs"]

# Entries of a group with something for each pair.
PER_PAIR = ("params", "names", "scalings", "layouts", "blocks")

# How many tensors of state pair_t of pairs.h has room for.
STATE_SLOTS = 6
# The bits of one read as the other.
BITS, DOUBLE = struct.Struct("q"), struct.Struct("d")
# x_choice of pairs.h
CODES = {"zero": 0, "sylvester": 1, "symmetric": 2}
assert set(CODES) == set(X_CHOICES)


class _Options(ctypes.Structure):
    """options_t of pairs.h."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")),
        *((name, ctypes.c_double) for name in ("most_condition", "most_smaller_condition")),
        *((name, ctypes.c_longlong) for name in ("x", "flag")),
    )


@torch.no_grad()
def step_pairs(
    group: dict[str, Any],
    rule: str,
    state: Callable[[Tensor, Tensor], Sequence[Tensor]],
    *,
    betas: tuple[float, float],
    eps: float = 0.0,
    flag: bool = False,
) -> dict[str, Any]:
    """Step the pairs of a group that the compiled library can take.

    Those are pairs of plain contiguous float32 matrices in main memory, both of whose factors have
    a gradient and full rank (condition up to 1e5): the aligned gradients are those of
    :func:`lorapro.functional.align`, g̃ to 1e-3 and (d_A, d_B) to 1e-2, as on PyTorch's fast path.

    Args:
        group: a group of pairs.
        rule: the C function, without ``lorapro_`` and the precision.
        state: gives the state of (A, B), made if need be, in the order of pair_t: at most
            :data:`STATE_SLOTS` contiguous float32 tensors.
        betas: the rule's decay rates.
        eps: the rule's epsilon.
        flag: what the rule makes of it.

    Returns:
        A group of the pairs that are left, the one given if nothing could be done.
    """
    built = library()
    if built is None:
        return group
    left: list[int] = []
    members: dict[int, list[int]] = {}
    tables: dict[int, list[int]] = {}
    params = group["params"]
    for i, (A, B, s, layout, blocks) in enumerate(
        zip(
            params[::2],
            params[1::2],
            group["scalings"],
            group["layouts"],
            group["blocks"],
            strict=True,
        )
    ):
        addresses = _addresses(A, B, state) if layout == "matrix" and blocks == 1 else None
        if addresses is None:
            left.append(i)
            continue
        rank = A.size(0)
        members.setdefault(rank, []).append(i)
        (scaling,) = BITS.unpack(DOUBLE.pack(s))
        row = (*addresses, B.numel() // rank, A.numel() // rank, scaling)
        tables.setdefault(rank, []).extend(row)
    numbers = (float(group["lr"]), *betas, eps, group["weight_decay"])
    for rank, chosen in members.items():
        options = (CODES[group["x"]], bool(flag))
        done = _call(built, rule, rank, tables[rank], len(chosen), numbers, options)
        left += [i for i, stepped in zip(chosen, done, strict=True) if not stepped]
        changed = [i for i, stepped in zip(chosen, done, strict=True) if stepped]
        if group["lr"]:
            # Autograd would not notice by itself that graphs hold outdated values.
            for i in changed:
                increment_version(params[2 * i])
                increment_version(params[2 * i + 1])
    return group if len(left) == len(params) // 2 else _only(group, left)


def _addresses(
    A: Tensor, B: Tensor, state: Callable[[Tensor, Tensor], Sequence[Tensor]]
) -> list[int] | None:
    """The addresses in pair_t of pairs.h; ``None`` if the library cannot take the pair."""
    grad_A, grad_B = A.grad, B.grad
    if grad_A is None or grad_B is None or grad_A.is_sparse or grad_B.is_sparse:
        return None
    if B.numel() != len(B) * len(A):
        return None  # shapes that do not belong together: PyTorch's path says so
    used = [A, B, grad_A, grad_B]
    for t in used:  # a subclass may keep its numbers elsewhere
        kind = type(t)
        if (kind is not Tensor and kind is not Parameter) or not (
            t.dtype is torch.float32 and t.is_cpu and t.is_contiguous()
        ):
            return None
    held = state(A, B)
    for t in held:
        if not (t.dtype is torch.float32 and t.is_cpu and t.is_contiguous()):
            return None
    addresses = [t.data_ptr() for t in (*used, *held)]
    if not all(addresses):
        return None  # no memory behind it
    return addresses + [0] * (STATE_SLOTS - len(held))


def _call(
    built: ctypes.CDLL,
    rule: str,
    rank: int,
    rows: list[int],
    pairs: int,
    numbers: Sequence[float],
    options: Sequence[int],
) -> Any:
    """Step pairs of one rank, in float64 those that float32 is not up to; flags of the stepped."""
    table = array.array("q", rows)
    address, _ = table.buffer_info()
    done = (ctypes.c_ubyte * pairs)()
    for precision, dtype in zip(PRECISIONS, (torch.float32, torch.float64), strict=True):
        given = _Options(*numbers, MOST_CONDITION[dtype], MOST_SMALLER_CONDITION, *options)
        getattr(built, f"lorapro_{rule}_{precision}")(
            ctypes.c_longlong(pairs),
            ctypes.c_longlong(rank),
            ctypes.c_void_p(address),
            ctypes.byref(given),
            done,
        )
        if all(done):
            break
    return done


def _only(group: dict[str, Any], members: list[int]) -> dict[str, Any]:
    """The group with some of its pairs."""
    kept = {k: [group[k][i] for i in members] for k in PER_PAIR[1:] if k in group}
    params = [p for i in members for p in group["params"][2 * i : 2 * i + 2]]
    return {**group, **kept, "params": params}
