"""Factored AdamW and Muon with dense matrices: everything but the momenta is an (m, n) matrix."""

from __future__ import annotations

import numpy as np

from reference.paper import pinv, theorem_2_1


def projector(columns):
    """Orthogonal projector on the span of the columns."""
    U, sigma, _ = np.linalg.svd(columns, full_matrices=False)
    U = U[:, sigma > 1e-13 * max(sigma.max(initial=0), 1e-300)]
    return U @ U.T


def project(A, B, G):
    P_A, P_B = projector(A.T), projector(B)
    return P_B @ G + G @ P_A - P_B @ G @ P_A


def polar(M, tolerance=1e-6):
    U, sigma, Vt = np.linalg.svd(M, full_matrices=False)
    kept = sigma > tolerance * sigma.max(initial=0)
    return U[:, kept] @ Vt[kept]


def damped(A, B, g, length):
    """Theorem 2.1 with s = 1, X = 0 and (S_B + ℓ²·S_A⁻¹)⁻¹ for S_B⁻¹."""
    if not length:
        return theorem_2_1(A, B, B.T @ g, g @ A.T, 1.0, "zero")
    inv_A = pinv(A @ A.T)
    d_A = pinv(B.T @ B + length**2 * inv_A) @ B.T @ g
    return d_A, (g - B @ d_A) @ A.T @ inv_A


def length_of(A, g):
    """The singular values of g·P_A, their mean with their squares for weights."""
    sigma = np.linalg.svd(g @ projector(A.T), compute_uv=False)
    return np.sqrt((sigma**4).sum() / (sigma**2).sum()) if sigma.any() else 0.0


def root(S):
    """S^(−1/2), zero where S has no rank."""
    values, Q = np.linalg.eigh(S)
    kept = values > 1e-13 * max(values.max(initial=0), 1e-300)
    return (Q[:, kept] / np.sqrt(values[kept])) @ Q[:, kept].T


class Twin:
    """Factors, and the momenta of their two gradients (in units in which s is 1)."""

    def __init__(self, A, B, s, x="", weight_decay=0.0, damping=0.0, momentum=0.9):
        self.A, self.B, self.s, self.beta = A.copy(), B.copy(), s, momentum  # x changes nothing
        self.weight_decay, self.damping, self.t = weight_decay, damping, 0
        self.M_A, self.M_B = np.zeros_like(A), np.zeros_like(B)

    def step(self, g, lr):
        """g: the dense gradient on W."""
        self.t += 1
        G = self.B.T @ g, g @ self.A.T
        for M, of_factor in zip((self.M_A, self.M_B), G, strict=True):
            M += (1 - self.beta) * (of_factor - M)
        d_A, d_B = self.rule(g, G, lr)
        keep = np.sqrt(1 - lr * self.weight_decay)
        self.h = self.s * (self.B @ d_A + d_B @ self.A)
        self.A, self.B = keep * self.A - lr * d_A, keep * self.B - lr * d_B


class Factored(Twin):
    def __init__(self, A, B, s, betas=(0.9, 0.999), eps=1e-8, damping=3.0, **kwargs):
        super().__init__(A, B, s, momentum=betas[0], damping=damping, **kwargs)
        self.beta2, self.eps = betas[1], eps
        self.rows, self.columns = np.zeros(len(B)), np.zeros(A.shape[1])

    def rule(self, g, _, lr):
        A, B = self.A, self.B
        G = project(A, B, g)
        to_A = pinv(B.T @ B) @ self.M_A
        M = B @ to_A + (self.M_B - B @ to_A @ A.T) @ pinv(A @ A.T) @ A
        self.rows = self.beta2 * self.rows + (1 - self.beta2) * (G**2).mean(1)
        self.columns = self.beta2 * self.columns + (1 - self.beta2) * (G**2).mean(0)
        rows, columns = (v / (1 - self.beta2**self.t) for v in (self.rows, self.columns))
        h = M / (1 - self.beta**self.t)
        if rows.any():
            h = h / np.sqrt(rows / rows.mean())[:, None] / (np.sqrt(columns) + self.eps)
        d_A, d_B = damped(A, self.s * B, h, self.damping * lr * length_of(A, h))
        square = (self.s * B.T @ h * d_A).sum() + (h @ A.T * d_B).sum()
        shorten = max(1.0, np.sqrt(square / h.size))
        return d_A / shorten, d_B / self.s / shorten


class Muon(Twin):
    def __init__(self, A, B, s, momentum=0.9, nesterov=True, damping=3.0, **kwargs):
        super().__init__(A, B, s, momentum=momentum, damping=damping, **kwargs)
        self.nesterov = nesterov

    def rule(self, g, G, lr):
        A, B, s = self.A, self.B, self.s
        N_A, N_B = (
            self.beta * M + (1 - self.beta) * of_factor if self.nesterov else M
            for M, of_factor in zip((self.M_A, self.M_B), G, strict=True)
        )
        speed = 0.2 * np.sqrt(max(g.shape)) * np.sqrt(32 / len(A))
        S_A, length = A @ A.T, self.damping * lr * speed
        R_A, R_B = root(S_A), root(B.T @ B + (length / s) ** 2 * pinv(S_A))
        return speed / s * R_B @ polar(R_B @ N_A), speed / s * polar(N_B @ R_A) @ R_A
