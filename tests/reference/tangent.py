"""The tangent-space optimizers with dense matrices: project, average, rule, project, step, project.

Everything is an (m, n) matrix in float64 NumPy; nothing is kept in factored form.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import solve_sylvester

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


def share(A, B, g, s, x, length):
    """(d_A, d_B) of a dense direction g, in units in which s is 1 and A has the mean square 1."""
    size = np.sqrt(np.trace(A @ A.T) / len(A)) if A.any() else 1.0
    A, B = A / size, s * size * B
    d_A, d_B = damped(A, B, g, x, length)
    return size * d_A, d_B / (s * size)


def damped(A, B, g, x, length):
    """Theorem 2.1 with s = 1 and (S_B + ℓ²·S_A⁻¹)⁻¹ for S_B⁻¹."""
    if not length:
        return theorem_2_1(A, B, B.T @ g, g @ A.T, 1.0, x)
    inv_A, K = pinv(A @ A.T), B.T @ g @ A.T
    inv_B = pinv(B.T @ B + length**2 * inv_A)
    Z = inv_B @ K @ inv_A
    if x == "zero":
        C = Z
    elif x == "symmetric":
        C = Z / 2
    else:
        C = solve_sylvester(B.T @ B, A @ A.T, K) @ inv_A
    return inv_B @ B.T @ g + (C - Z) @ A, g @ A.T @ inv_A - B @ C


def length_of(A, g):
    """The singular values of g·P_A, their mean with their squares for weights."""
    sigma = np.linalg.svd(g @ projector(A.T), compute_uv=False)
    return np.sqrt((sigma**4).sum() / (sigma**2).sum()) if sigma.any() else 0.0


class Tangent:
    def __init__(self, A, B, s, x="sylvester", weight_decay=0.0, damping=3.0):
        self.A, self.B, self.s, self.x = A.copy(), B.copy(), s, x
        self.weight_decay, self.t, self.damping = weight_decay, 0, damping
        self.M = np.zeros((len(B), A.shape[1]))

    def step(self, g, lr):
        """g: the dense gradient on W."""
        self.t += 1
        G = project(self.A, self.B, g)
        self.M = self.beta * self.M + (1 - self.beta) * G
        h = self.h = self.rule(G)
        length = self.damping * lr * length_of(self.A, h)
        d_A, d_B = share(self.A, self.B, h, self.s, self.x, length)
        keep = np.sqrt(1 - lr * self.weight_decay)
        self.A, self.B = keep * self.A - lr * d_A, keep * self.B - lr * d_B
        self.M = project(self.A, self.B, self.M)


class Factored(Tangent):
    def __init__(self, *args, betas=(0.9, 0.999), eps=1e-8, **kwargs):
        super().__init__(*args, **kwargs)
        self.beta, self.beta2, self.eps = *betas, eps
        self.rows, self.columns = np.zeros(len(self.B)), np.zeros(self.A.shape[1])

    def rule(self, G):
        self.rows = self.beta2 * self.rows + (1 - self.beta2) * (G**2).mean(1)
        self.columns = self.beta2 * self.columns + (1 - self.beta2) * (G**2).mean(0)
        rows, columns = (v / (1 - self.beta2**self.t) for v in (self.rows, self.columns))
        if not rows.any():
            return np.zeros_like(self.M)
        m_hat = self.M / (1 - self.beta**self.t)
        return m_hat / np.sqrt(rows / rows.mean())[:, None] / (np.sqrt(columns) + self.eps)


class Muon(Tangent):
    def __init__(self, *args, momentum=0.95, nesterov=True, damping=0.3, **kwargs):
        super().__init__(*args, damping=damping, **kwargs)
        self.beta, self.nesterov = momentum, nesterov

    def rule(self, G):
        N = (1 - self.beta) * G + self.beta * self.M if self.nesterov else self.M
        return 0.2 * np.sqrt(max(N.shape)) * polar(N)


def root(S):
    """S^(−1/2), zero where S has no rank."""
    values, Q = np.linalg.eigh(S)
    kept = values > 1e-13 * max(values.max(initial=0), 1e-300)
    return (Q[:, kept] / np.sqrt(values[kept])) @ Q[:, kept].T


class MuonOfParts:
    """Muon on s·B·d_A and on s·d_B·A, momentum of the two gradients."""

    def __init__(self, A, B, s, weight_decay=0.0, damping=10.0, momentum=0.95, nesterov=True, x=""):
        self.A, self.B, self.s, self.beta, self.nesterov = A.copy(), B.copy(), s, momentum, nesterov
        self.weight_decay, self.damping = weight_decay, damping
        self.M_A, self.M_B = np.zeros_like(A), np.zeros_like(B)

    def step(self, g, lr):
        """g: the dense gradient on W."""
        A, B, s = self.A, self.B, self.s
        of = []
        for M, G in ((self.M_A, B.T @ g), (self.M_B, g @ A.T)):
            M += (1 - self.beta) * (G - M)
            of.append(self.beta * M + (1 - self.beta) * G if self.nesterov else M)
        speed = 0.2 * np.sqrt(max(g.shape))
        S_A, length = A @ A.T, self.damping * lr * speed
        R_A, R_B = root(S_A), root(B.T @ B + (length / s) ** 2 * pinv(S_A))
        d_A, d_B = R_B @ polar(R_B @ of[0]) / s, polar(of[1] @ R_A) @ R_A / s
        self.h = speed * s * (B @ d_A + d_B @ A)
        keep = np.sqrt(1 - lr * self.weight_decay)
        self.A, self.B = keep * A - lr * speed * d_A, keep * B - lr * speed * d_B
