"""LoRA-Pro's Algorithms 1 to 3 line by line in float64 NumPy, one pair at a time.

Misprints mended: v̂ divides by 1 − β2ᵗ; the epsilon stands outside the root, as AdamW has it.
Inverses are pseudo-inverses, because B starts at zero.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import solve_sylvester


def pinv(S):
    return np.linalg.pinv(S, rcond=1e-13, hermitian=True)


def theorem_2_1(A, B, g_A, g_B, s, x):
    inv_B, inv_A = pinv(B.T @ B), pinv(A @ A.T)
    if x == "sylvester":
        if not B.any():
            X = np.zeros((len(A), len(A)))
        else:
            X = solve_sylvester(B.T @ B, A @ A.T, -(inv_B @ g_A @ A.T) / s**2)
    elif x == "symmetric":
        X = -(inv_B @ g_A @ A.T @ inv_A) / (2 * s**2)
    else:
        X = np.zeros((len(A), len(A)))
    P_B = B @ inv_B @ B.T
    d_A = inv_B @ g_A / s**2 + X @ A
    d_B = (np.eye(len(B)) - P_B) @ g_B @ inv_A / s**2 - B @ X
    return d_A, d_B


def damped(A, B, g_A, g_B, s, x, steps):
    """Theorem 2.1 with directions of B shorter than ``steps·√m`` damped; X solves the least squares
    problem of Theorem 2.3 with these.
    """
    S_A, S_B, K = A @ A.T, B.T @ B, g_A @ A.T
    inv_A = pinv(S_A)
    inv_B = pinv(S_B + steps**2 * len(B) * np.trace(S_A) / len(A) * inv_A)
    rest = inv_B @ (g_A - K @ inv_A @ A)
    C = {
        "zero": lambda: inv_B @ K @ inv_A,
        "symmetric": lambda: inv_B @ K @ inv_A / 2,
        "sylvester": lambda: solve_sylvester(S_B, S_A, K) @ inv_A,
    }[x]()
    return (rest + C @ A) / s**2, (g_B @ inv_A - B @ C) / s**2


class Sgd:
    """Algorithm 1, with torch's momentum."""

    def __init__(self, A, B, s, x="sylvester", weight_decay=0.0, momentum=0.0):
        self.A, self.B, self.s, self.x = A.copy(), B.copy(), s, x
        self.weight_decay, self.momentum = weight_decay, momentum
        self.buffers = None

    def step(self, g_A, g_B, lr):
        d = theorem_2_1(self.A, self.B, g_A, g_B, self.s, self.x)
        d = [d[0] + self.weight_decay * self.A, d[1] + self.weight_decay * self.B]
        if self.momentum:
            if self.buffers is None:
                self.buffers = d
            else:
                self.buffers = [self.momentum * b + v for b, v in zip(self.buffers, d, strict=True)]
            d = self.buffers
        self.A, self.B = self.A - lr * d[0], self.B - lr * d[1]


class Efficient:
    """Algorithm 2."""

    def __init__(
        self,
        A,
        B,
        s,
        x="sylvester",
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        damping=0.0,
    ):
        self.A, self.B, self.s, self.x, self.damping = A.copy(), B.copy(), s, x, damping
        self.betas, self.eps, self.weight_decay, self.t = betas, eps, weight_decay, 0
        self.m = [np.zeros_like(A), np.zeros_like(B)]
        self.v = [np.zeros_like(A), np.zeros_like(B)]

    def step(self, g_A, g_B, lr):
        self.t += 1
        b1, b2 = self.betas
        new = []
        if self.damping:  # not in the paper
            d = damped(self.A, self.B, g_A, g_B, self.s, self.x, self.damping * lr)
        else:
            d = theorem_2_1(self.A, self.B, g_A, g_B, self.s, self.x)
        for i, (p, g) in enumerate(zip((self.A, self.B), d, strict=True)):
            self.m[i] = b1 * self.m[i] + (1 - b1) * g
            self.v[i] = b2 * self.v[i] + (1 - b2) * g * g
            m_hat = self.m[i] / (1 - b1**self.t)
            v_hat = self.v[i] / (1 - b2**self.t)
            p = (1 - self.weight_decay * lr) * p
            new.append(p - lr * m_hat / (np.sqrt(v_hat) + self.eps))
        self.A, self.B = new


class Full:
    """Algorithm 3 with the weight decay of Eq. (58)."""

    def __init__(
        self, A, B, s, x="sylvester", betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, W0=None
    ):
        self.A, self.B, self.s, self.x = A.copy(), B.copy(), s, x
        self.betas, self.eps, self.weight_decay, self.t = betas, eps, weight_decay, 0
        self.W0 = np.zeros((len(B), A.shape[1])) if W0 is None else W0.copy()
        self.m, self.v = np.zeros_like(self.W0), np.zeros_like(self.W0)

    def step(self, g_A, g_B, lr):
        self.t += 1
        (b1, b2), s = self.betas, self.s
        d_A, d_B = theorem_2_1(self.A, self.B, g_A, g_B, s, "zero")
        g = s * d_B @ self.A + s * self.B @ d_A
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        h = (self.m / (1 - b1**self.t)) / (np.sqrt(self.v / (1 - b2**self.t)) + self.eps)
        d_A, d_B = theorem_2_1(self.A, self.B, s * self.B.T @ h, s * h @ self.A.T, s, self.x)
        keep = 1 - lr * self.weight_decay
        self.A, self.B = np.sqrt(keep) * self.A, np.sqrt(keep) * self.B
        self.W0 = keep * self.W0
        self.A, self.B = self.A - lr * d_A, self.B - lr * d_B
