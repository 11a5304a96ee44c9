"""Stacks of one rank but several shapes, handled as one batch of pairs.

The (r, r) algebra of all pairs is done at once, however many shapes there are; products with the
long sides go shape by shape. :class:`Wide` holds what is shaped like A, :class:`Tall` what is
shaped like B.

Shape letters: m, n long sides; p, q short sides; k matrices, in all shapes together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lorapro.optim.tall import gram, product

__all__ = ["Stack", "Tall", "Wide", "fill_their_memory", "in_one_piece", "split"]

Stack = TypeVar("Stack", "Wide", "Tall")


def split(W: Tensor, like: Stack) -> tuple[Tensor, ...]:
    """(k, …) cut into one tensor a shape.

    >>> stacks = Wide([torch.ones(1, 2, 3), torch.ones(4, 2, 5)])
    >>> [len(part) for part in split(torch.ones(5, 2, 2), stacks)]
    [1, 4]
    """
    return W.split([len(part) for part in like.parts])


@dataclass(frozen=True)
class Wide:
    """Stacks (k_i, q, n_i), like A.

    >>> A = Wide([torch.ones(1, 2, 3), torch.ones(4, 2, 5)])
    >>> A.dot(A).shape, A.dot(A)[:, 0, 0].tolist()
    (torch.Size([5, 2, 2]), [3.0, 5.0, 5.0, 5.0, 5.0])
    """

    parts: list[Tensor]

    def map(self, function: Callable[..., Tensor], *others: Wide) -> Wide:
        """``function`` of the stacks of each shape."""
        stacks = zip(self.parts, *(other.parts for other in others), strict=True)
        return Wide([function(*each) for each in stacks])

    def dot(self, other: Wide) -> Tensor:
        """``self·otherᵀ``: (k, q, p)."""
        return torch.cat([a @ b.mT for a, b in zip(self.parts, other.parts, strict=True)])

    @staticmethod
    def combine(terms: Sequence[tuple[Tensor, Wide]]) -> Wide:
        """``Σ W·stack``, each W (k, p, q)."""
        cut = [(split(W, stack), stack.parts) for W, stack in terms]
        out = [W @ part for W, part in zip(*cut[0], strict=True)]
        for weights, parts in cut[1:]:
            for total, W, part in zip(out, weights, parts, strict=True):
                total.baddbmm_(W, part)
        return Wide(out)


@dataclass(frozen=True)
class Tall:
    """Stacks (k_i, m_i, q), like B.

    >>> B = Tall([torch.ones(1, 3, 2), torch.ones(4, 5, 2)])
    >>> B.dot(B)[:, 0, 0].tolist()
    [3.0, 5.0, 5.0, 5.0, 5.0]
    """

    parts: list[Tensor]

    def map(self, function: Callable[..., Tensor], *others: Tall) -> Tall:
        """``function`` of the stacks of each shape."""
        stacks = zip(self.parts, *(other.parts for other in others), strict=True)
        return Tall([function(*each) for each in stacks])

    def dot(self, other: Tall) -> Tensor:
        """``selfᵀ·other``: (k, q, p)."""
        return torch.cat([gram(a, b) for a, b in zip(self.parts, other.parts, strict=True)])

    @staticmethod
    def combine(terms: Sequence[tuple[Tall, Tensor]]) -> Tall:
        """``Σ stack·W``, each W (k, q, p)."""
        out: list[Tensor | None] = [None] * len(terms[0][0].parts)
        for stack, W in terms:
            for i, (part, w) in enumerate(zip(stack.parts, split(W, stack), strict=True)):
                out[i] = product(part, w, out[i])
        return Tall([total for total in out if total is not None])


def in_one_piece(tensors: list[Tensor]) -> Tensor | None:
    """The stack (k, …) that matrices are consecutive views of, ``None`` if they are not.

    >>> stack = torch.zeros(3, 2, 5)
    >>> in_one_piece(list(stack.unbind())).data_ptr() == stack.data_ptr()
    True
    >>> in_one_piece([torch.zeros(2, 5), torch.zeros(2, 5)])
    """
    first, last = tensors[0], tensors[-1]
    size = first.numel() * first.element_size()
    if (
        first.dim() != 2
        or not first.is_contiguous()
        or first.untyped_storage().data_ptr() != last.untyped_storage().data_ptr()
        or any(t.data_ptr() != first.data_ptr() + i * size for i, t in enumerate(tensors))
        or any(t.stride() != first.stride() for t in tensors)
    ):
        return None
    return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))


def fill_their_memory(tensors: list[Tensor]) -> bool:
    """Whether nothing but these tensors is in the memory they are views of.

    >>> stack = torch.zeros(3, 2, 5)
    >>> fill_their_memory(list(stack)), fill_their_memory(list(stack[:2]))
    (True, False)
    """
    memory = {(s := t.untyped_storage()).data_ptr(): s.nbytes() for t in tensors}
    return sum(memory.values()) == sum(t.nbytes for t in tensors)
