"""The tangent-space optimizers with dense matrices: project, average, rule, project, step, project.

Everything is an (m, n) matrix in float64 NumPy; nothing is kept in factored form.
"""

from __future__ import annotations

import numpy as np

from reference.paper import theorem_2_1


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


def nearest(A, W):
    """Factors of the best rank-r approximation of W, rows of A' orthogonal and nearest to A."""
    r = len(A)
    U, sigma, Vt = np.linalg.svd(W)
    U, sigma, Vt = U[:, :r], sigma[:r], Vt[:r]
    length = np.linalg.norm(A) / np.sqrt(r)
    new_A = length * polar(A @ Vt.T @ Vt, tolerance=0.0)
    return new_A, (U * sigma) @ Vt @ new_A.T / length**2


class Tangent:
    def __init__(self, A, B, s, x="sylvester", weight_decay=0.0):
        self.A, self.B, self.s, self.x = A.copy(), B.copy(), s, x
        self.weight_decay, self.t, self.retracted = weight_decay, 0, 0
        self.M = np.zeros((len(B), A.shape[1]))

    def step(self, g, lr):
        """g: the dense gradient on W."""
        self.t += 1
        G = project(self.A, self.B, g)
        self.M = self.beta * self.M + (1 - self.beta) * G
        h = self.h = self.rule(G)
        d_A, d_B = theorem_2_1(
            self.A, self.B, self.s * self.B.T @ h, self.s * h @ self.A.T, self.s, self.x
        )
        keep = np.sqrt(1 - lr * self.weight_decay)
        first = lr * (self.B @ d_A + d_B @ self.A)
        outrun = np.linalg.norm(lr**2 * d_B @ d_A) > 4 * np.linalg.norm(first)
        self.A, self.B = keep * self.A, keep * self.B
        if outrun:
            self.A, self.B = nearest(self.A, self.B @ self.A - keep * first)
        else:
            self.A, self.B = self.A - lr * d_A, self.B - lr * d_B
        self.retracted += outrun
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
    def __init__(self, *args, momentum=0.95, nesterov=True, **kwargs):
        super().__init__(*args, **kwargs)
        self.beta, self.nesterov = momentum, nesterov

    def rule(self, G):
        N = (1 - self.beta) * G + self.beta * self.M if self.nesterov else self.M
        return 0.2 * np.sqrt(max(N.shape)) * polar(N)
