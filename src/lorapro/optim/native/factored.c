/* AdamW on the tangent space with a factored second moment (mode "factored"), pair by pair; the
 * formulas are those of lorapro.optim.factored. first_A, first_B: the momentum; second_A (n),
 * second_B (m): column and row means; step_A: the one counter. */
#include "tangent.h"

#define SMALL 24
#define ROWS (sizeof(real) == sizeof(float) ? 13 : 15)

/* Means of the squared equivalent gradient g̃ = g·P_A + P_B·g·(I − P_A) along rows and columns, from
 * the squares of g·P_A and P_B·g that `project` sums. The other part has the squares of
 * B·(G_A·(I − P_A)) along rows and of G_B·A along columns.
 * `scratch` holds r numbers for each of the longer side, `work` four (r, r). */
static void squared_means(const space_t *at, const real *K, const real *G_A, const real *G_B,
                          real *rows, real *columns, real *scratch, real *work) {
    index_t r = at->r, n = at->n, ld = at->ld, size = r * pad(r);
    real *GG = work, *GA = GG + size, *W = GA + size, *AG = W + size, square = at->s * at->s;
    multiply(at->inv_B, K, r, GA, 0); /* s²·G_A·Aᵀ */
    multiply(GA, at->inv_A, r, W, 0);
    scale(W, r, -1 / (square * square));
    memcpy(AG, GA, sizeof(real) * size);
    flip(AG, r);
    dot(G_A, G_A, r, n, GG);
    multiply(W, AG, r, GG, 1); /* G_A·(I − P_A)·G_Aᵀ */
    weigh(GG, at->B, r, ld, scratch, 0);
    add_products(at->B, scratch, r, ld, square, rows);
    dot(G_B, G_B, r, ld, GG);
    weigh(GG, at->A, r, n, scratch, 0);
    add_products(at->A, scratch, r, n, square, columns);
    for (index_t i = 0; i < ld; i++) rows[i] = rows[i] > 0 ? rows[i] / n : 0;
    for (index_t j = 0; j < n; j++) columns[j] = columns[j] > 0 ? columns[j] / at->m : 0;
}

/* Average the new means into the ones held, and D_row and D_col of h = D_row·M·D_col. */
static void scales(real *rows, real *columns, const float *held_rows, const float *held_columns,
                   index_t m, index_t n, double t, real unit, const options_t *o, real *D_row,
                   real *D_col) {
    real b2 = o->beta2, c2 = 1 - o->beta2, root = 1 / (1 - pow(o->beta2, t)), eps = o->eps;
    double total = 0;
    for (index_t i = 0; i < m; i++) total += rows[i] = b2 * held_rows[i] + c2 * rows[i];
    real mean = fmax((real)(total / m) * root, SMALLEST);
    for (index_t i = 0; i < m; i++) {
        real relative = rows[i] * root / mean;
        D_row[i] = unit / sqrt(relative > 0 ? relative : 1);
    }
    for (index_t j = 0; j < n; j++) {
        columns[j] = b2 * held_columns[j] + c2 * columns[j];
        D_col[j] = 1 / (sqrt(columns[j] * root) + eps);
    }
}

INLINE void times_diagonal(const real *X, const real *D, index_t r, index_t length, real *out) {
    for (index_t p = 0; p < r; p++)
        for (index_t j = 0; j < length; j++) out[p * length + j] = X[p * length + j] * D[j];
}

/* Whether Bᵀ·grad_B is grad_A·Aᵀ, which `squared_means` builds on: then BᵀG_B = 0. Clipping by value or
 * penalties on A and B make it untrue. `work` holds two (r, r). */
static int consistent(const space_t *at, const real *K, const real *G_B, real *work) {
    index_t r = at->r;
    real *across = work, *taken = across + r * pad(r), c = 1 / (at->s * at->s);
    dot(at->B, G_B, r, at->ld, across);
    multiply(K, at->inv_A, r, taken, 0); /* s²·BᵀP_B·G: what projection took away */
    real most = 1e-2 * c * sqrt(inner(taken, taken, r));
    most += 1e-5 * sqrt(trace(at->S_B, r) * squares(G_B, r * at->ld)); /* rounding */
    return !(inner(across, across, r) > most * most);
}

static int factored(const pair_t *pair, index_t r, const options_t *o, real *work) {
    index_t m = pair->m, n = pair->n, ld = stride(m), size = r * pad(r);
    index_t side = r * stride(m > n ? m : n);
    real *K = work, *T1 = K + size, *T2 = T1 + size, *U1 = T2 + size, *U2 = U1 + size,
         *X = U2 + size, *C = X + size, *held = C + size, *rest = held + 8 * size;
    real *B = work + SMALL * size, *grad_B = B + side, *G_A = grad_B + side, *G_B = G_A + side,
         *M_A = G_B + side, *M_B = M_A + side, *scratch = M_B + side, *new_A = scratch + side,
         *new_B = new_A + side, *rows = new_B + side, *columns = rows + side,
         *D_row = columns + side, *D_col = D_row + side;
    space_t at = space_of(pair, r, NULL, B, held), to = space_of(pair, r, new_A, new_B, held + 4 * size);
    memset(rows, 0, sizeof(real) * ld);
    memset(columns, 0, sizeof(real) * n);
    if (!enter(pair, o, &at, B, grad_B, D_col + side, side, K, G_A, G_B, rows, columns, rest))
        return 0;
    if (!consistent(&at, K, G_B, rest)) return 0;
    average(pair, r, o->beta1, G_A, G_B, M_A, M_B);

    double t = *pair->step_A + 1;
    squared_means(&at, K, G_A, G_B, rows, columns, scratch, rest);
    real unit = at.s / (1 - pow(o->beta1, t));
    memset(D_row, 0, sizeof(real) * ld);
    scales(rows, columns, pair->second_B, pair->second_A, m, n, t, unit, o, D_row, D_col);
    real *L1 = grad_B, *L2 = G_B, *R1 = G_A, *R2 = scratch; /* h = L1ᵀ·R1 + L2ᵀ·R2 */
    times_diagonal(B, D_row, r, ld, L1);
    times_diagonal(M_B, D_row, r, ld, L2);
    times_diagonal(M_A, D_col, r, n, R1);
    times_diagonal(at.A, D_col, r, n, R2);
    dot_same(B, L1, r, ld, T1);
    dot(B, L2, r, ld, T2);
    dot(R1, at.A, r, n, U1);
    dot_same(R2, at.A, r, n, U2);
    multiply(T1, U1, r, K, 0);
    multiply(T2, U2, r, K, 1);
    scale(K, r, at.s);
    weights(&at, o->x, K, T1, T2, U1, U2, X, C, rest);
    weigh(T1, R1, r, n, new_A, 0);
    weigh(T2, R2, r, n, new_A, 1);
    if (o->x != ZERO) weigh(X, at.A, r, n, new_A, 1);
    weigh(U1, L1, r, ld, new_B, 0);
    weigh(U2, L2, r, ld, new_B, 1);
    weigh(C, B, r, ld, new_B, 1);
    if (outruns(&at, new_A, new_B, o->lr, rest)) return 0;
    take_step(at.A, new_A, r * n, o);
    take_step(B, new_B, r * ld, o);

    if (!measure(&to, o, ZERO, rest)) return 0;
    transport(&at, &to, M_A, M_B, R1, L2, rest);
    *pair->step_A = t;
    narrow(rows, m, pair->second_B);
    narrow(columns, n, pair->second_A);
    keep(pair, r, new_A, new_B, R1, L2);
    return 1;
}

void NAME(lorapro_factored, REAL)(index_t pairs, index_t r, const pair_t *pair,
                                  const options_t *options, unsigned char *done) {
    for_each_pair(pairs, r, pair, options, done, SMALL, ROWS, factored);
}
