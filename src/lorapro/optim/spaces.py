"""The tangent space at ``B·A``: aligning gradients in it, carrying momentum to it.

Two ways of computing the same: :class:`ExactSpace`, in float64 with pseudo-inverses, for factors of
any rank and condition; :class:`FastSpace`, in float32 with Gram matrices, for well-conditioned
factors of several shapes at once.

Shape letters
    m, n  rows and columns of W;  r  rank;  k  pairs;  s  scaling (k, 1, 1);  p  columns of L
    A, M_A, d_A  (k, r, n);  B, M_B, d_B  (k, m, r)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lorapro.functional import Spectrum, align_in, spectrum
from lorapro.optim.batched import Grams, coefficients, invert
from lorapro.optim.stacks import Tall, Wide

__all__ = ["Direction", "ExactSpace", "FastSpace", "Space", "Tangent"]


@dataclass(frozen=True)
class Tangent:
    """A tangent vector ``s·(B·A_part + B_part·A)`` at some (A, B)."""

    A: Wide
    B: Tall

    def lerp(self, end: Tangent, weight: float) -> Tangent:
        """``(1 − weight)·self + weight·end``."""
        return Tangent(
            self.A.map(lambda a, b: a.lerp(b, weight), end.A),
            self.B.map(lambda a, b: a.lerp(b, weight), end.B),
        )


@dataclass(frozen=True)
class Direction:
    """``h = L·core·R``: what a rule would do with W, never multiplied out.

    Attributes:
        L: left sides, each (k, m, r) or wider, read as one (k, m, p).
        R: right sides, read as one (k, p, n).
        core: (k, p, p); ``None`` is the identity.
    """

    L: tuple[Tall, ...]
    R: tuple[Wide, ...]
    core: Tensor | None = None


class Space(ABC):
    """The tangent space of the rank-r matrices at ``B·A``.

    Attributes:
        A: factors of all pairs.
        B: likewise.
        s: scalings (k, 1, 1).
        x: the choice of X.
    """

    def __init__(self, A: Wide, B: Tall, s: Tensor, x: str) -> None:
        self.A, self.B, self.s, self.x = A, B, s, x

    @property
    def S_A(self) -> Tensor:
        """``A·Aᵀ``, (k, r, r)."""
        return self.A.dot(self.A)

    @property
    def S_B(self) -> Tensor:
        """``Bᵀ·B``, (k, r, r)."""
        return self.B.dot(self.B)

    @abstractmethod
    def project(self, grad_A: Wide | None, grad_B: Tall | None) -> Tangent:
        """The gradient as a tangent vector, X = 0; a frozen factor's part is zero."""

    @abstractmethod
    def align(self, h_A: Wide, h_B: Tall) -> tuple[Wide, Tall]:
        """:func:`lorapro.functional.align` with this space's X; a frozen factor's is zero."""

    @abstractmethod
    def steps(self, h: Direction) -> tuple[Wide, Tall]:
        """``(d_A, d_B) = align(s·Bᵀh, s·h·Aᵀ)``."""

    @abstractmethod
    def receive(self, old: Space, M: Tangent) -> Tangent:
        """Carry a tangent vector at ``old`` here, by orthogonal projection::

        M_A' = S_B'⁺ B'ᵀ M          M_B' = (I − P_B') M A'ᵀ S_A'⁺
        """


class ExactSpace(Space):
    """Stacks of one shape, in float64, any rank and condition; a factor may be frozen."""

    def __init__(
        self, A: Tensor, B: Tensor, s: Tensor, x: str, moves: tuple[bool, bool] = (True, True)
    ) -> None:
        super().__init__(Wide([A.double()]), Tall([B.double()]), s.double(), x)
        self.moves = moves
        self._given = A, B

    @cached_property
    def spectrum(self) -> Spectrum:
        """Of the factors in the dtype they came in: their rank is judged by its rounding."""
        return spectrum(*self._given)

    def _align(self, g_A: Tensor, g_B: Tensor, s: Tensor, x: str) -> tuple[Wide, Tall]:
        (A,), (B,) = self.A.parts, self.B.parts
        moves_A, moves_B = self.moves
        d_A, d_B = align_in(
            self.spectrum,
            A,
            B,
            g_A if moves_A else None,
            g_B if moves_B else None,
            s[:, 0, 0],
            x=x,
        )
        return (
            Wide([torch.zeros_like(A) if d_A is None else d_A]),
            Tall([torch.zeros_like(B) if d_B is None else d_B]),
        )

    def project(self, grad_A: Wide | None, grad_B: Tall | None) -> Tangent:
        """See :meth:`Space.project`."""
        g_A = self.A.parts[0] if grad_A is None else grad_A.parts[0]
        g_B = self.B.parts[0] if grad_B is None else grad_B.parts[0]
        return Tangent(*self._align(g_A, g_B, self.s, "zero"))

    def align(self, h_A: Wide, h_B: Tall) -> tuple[Wide, Tall]:
        """See :meth:`Space.align`."""
        return self._align(h_A.parts[0], h_B.parts[0], self.s, self.x)

    def steps(self, h: Direction) -> tuple[Wide, Tall]:
        """See :meth:`Space.steps`."""
        (A,), (B,) = self.A.parts, self.B.parts
        L = torch.cat([part.parts[0] for part in h.L], -1)
        R = torch.cat([part.parts[0] for part in h.R], -2)
        L = L if h.core is None else L @ h.core
        return self._align(self.s * ((B.mT @ L) @ R), self.s * (L @ (R @ A.mT)), self.s, self.x)

    def receive(self, old: Space, M: Tangent) -> Tangent:
        """See :meth:`Space.receive`."""
        A, B, A_new, B_new = (v.parts[0] for v in (old.A, old.B, self.A, self.B))
        M_A, M_B = M.A.parts[0].double(), M.B.parts[0].double()
        g_A = (B_new.mT @ B) @ M_A + (B_new.mT @ M_B) @ A
        g_B = B @ (M_A @ A_new.mT) + M_B @ (A @ A_new.mT)
        return Tangent(*self._align(g_A, g_B, torch.ones_like(self.s), "zero"))


class FastSpace(Space):
    """Stacks of several shapes and one rank, in float32, for pairs that are ``sure``."""

    grams: Grams

    def __init__(self, A: Wide, B: Tall, s: Tensor, x: str) -> None:
        super().__init__(A, B, s, x)
        self.grams = invert(A.dot(A), B.dot(B), x)

    @property
    def S_A(self) -> Tensor:
        """See :attr:`Space.S_A`; at hand already."""
        return self.grams.S_A

    @property
    def S_B(self) -> Tensor:
        """See :attr:`Space.S_B`; at hand already."""
        return self.grams.S_B

    def project(self, grad_A: Wide | None, grad_B: Tall | None) -> Tangent:
        """See :meth:`Space.project`."""
        if grad_A is None or grad_B is None:
            raise ValueError("a frozen factor needs ExactSpace")
        return Tangent(*self._align(grad_A, grad_B, "zero"))

    def align(self, h_A: Wide, h_B: Tall) -> tuple[Wide, Tall]:
        """See :meth:`Space.align`."""
        return self._align(h_A, h_B, self.x)

    def _align(self, h_A: Wide, h_B: Tall, x: str) -> tuple[Wide, Tall]:
        P, X, R, C = coefficients(self.grams, h_A.dot(self.A), x)
        c = self.s**-2
        wide = [(c * P, h_A)]
        return (
            Wide.combine(wide if X is None else [*wide, (c * X, self.A)]),
            Tall.combine([(h_B, c * R), (self.B, -c * C)]),
        )

    def steps(self, h: Direction) -> tuple[Wide, Tall]:
        """See :meth:`Space.steps`. Only d_A and d_B are formed, no sum of sides of h."""
        left = torch.cat([self.B.dot(part) for part in h.L], -1)  # Bᵀ·L
        right = torch.cat([part.dot(self.A) for part in h.R], -2)  # R·Aᵀ
        to_R = left if h.core is None else left @ h.core
        from_L = right if h.core is None else h.core @ right
        P, X, R, C = coefficients(self.grams, self.s * (to_R @ right), self.x)
        c = self.s**-2
        weights_R = (P @ to_R / self.s).split([part.parts[0].shape[-2] for part in h.R], -1)
        weights_L = (from_L @ R / self.s).split([part.parts[0].shape[-1] for part in h.L], -2)
        wide = list(zip(weights_R, h.R, strict=True))
        tall = [*zip(h.L, weights_L, strict=True), (self.B, -c * C)]
        return Wide.combine(wide if X is None else [*wide, (c * X, self.A)]), Tall.combine(tall)

    def receive(self, old: Space, M: Tangent) -> Tangent:
        """See :meth:`Space.receive`."""
        BB, BM = self.B.dot(old.B), self.B.dot(M.B)
        MA, AA = M.A.dot(self.A), old.A.dot(self.A)
        inv_A, inv_B = self.grams.inv_A, self.grams.inv_B
        C = inv_B @ (BB @ MA + BM @ AA) @ inv_A
        return Tangent(
            Wide.combine([(inv_B @ BB, M.A), (inv_B @ BM, old.A)]),
            Tall.combine([(old.B, MA @ inv_A), (M.B, AA @ inv_A), (self.B, -C)]),
        )
