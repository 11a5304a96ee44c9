"""Dense least-squares answers to the alignment problem, sharing no formula with the package.

``T`` is the matrix of the linear map (d_A, d_B) -> s·(B·d_A + d_B·A), written out column by column.
"""

from __future__ import annotations

import numpy as np

RCOND = 1e-11


def flat(d_A, d_B):
    return np.concatenate([d_A.ravel(), d_B.ravel()])


def unflat(z, A, B):
    return z[: A.size].reshape(A.shape), z[A.size :].reshape(B.shape)


def operator(A, B, s, sign=1.0):
    """Matrix of (d_A, d_B) -> s·(sign·B·d_A + d_B·A)."""
    columns = []
    for k in range(A.size + B.size):
        e = np.zeros(A.size + B.size)
        e[k] = 1.0
        d_A, d_B = unflat(e, A, B)
        columns.append((s * (sign * B @ d_A + d_B @ A)).ravel())
    return np.stack(columns, axis=1)


def least_squares(A, B, g, s, x):
    """(d_A, d_B) that minimise ‖s(B·d_A + d_B·A) − g‖, with the choice of X as a second aim."""
    T = operator(A, B, s)
    if x == "sylvester":  # the minimiser closest to (g_A, g_B)
        z0 = flat(s * B.T @ g, s * g @ A.T)
        z = z0 + np.linalg.lstsq(T, g.ravel() - T @ z0, rcond=RCOND)[0]
        return unflat(z, A, B)
    if x == "zero":  # all that d_A can do alone, then d_B the rest; least norm each
        d_A = np.linalg.lstsq(s * B, g, rcond=RCOND)[0]
        rest = g - s * B @ d_A
        return d_A, np.linalg.lstsq(s * A.T, rest.T, rcond=RCOND)[0].T
    # symmetric: among the minimisers the one with the smallest ‖d_B·A − B·d_A‖, least norm
    z = np.linalg.lstsq(T, g.ravel(), rcond=RCOND)[0]
    _, sigma, Vt = np.linalg.svd(T)
    N = Vt[int((sigma > RCOND * sigma[:1].max(initial=0)).sum()) :].T
    D = operator(A, B, s, sign=-1.0)
    D_free = D @ N
    D_free[np.abs(D_free) < RCOND * np.abs(D).max(initial=1e-300)] = 0.0  # rounding, not freedom
    z = z + N @ np.linalg.lstsq(D_free, -(D @ z), rcond=RCOND)[0]
    # least norm with both B·d_A and d_B·A kept
    both = np.concatenate([T, D])
    return unflat(np.linalg.lstsq(both, both @ z, rcond=RCOND)[0], A, B)


def projection(A, B, g):
    """Orthogonal projection of g on the range of T."""
    T = operator(A, B, 1.0)
    return (T @ np.linalg.lstsq(T, g.ravel(), rcond=RCOND)[0]).reshape(g.shape)


def fast_projection(A, B, g):
    """The same for factors of full rank, by orthonormal bases in float64."""
    Q_A, Q_B = (np.linalg.qr(M.astype(np.float64))[0] for M in (A.T, B))
    left = Q_B @ (Q_B.T @ g)
    return left + ((g - left) @ Q_A) @ Q_A.T
