/* Aligned gradients (Theorem 2.1), and efficient mode's AdamW step on them (Algorithm 2), pair by
 * pair: one pair fits the cache of a core, so that everything is read from memory once. The formulas
 * are those of lorapro.optim.batched. With the flag d_A comes in units of its partner, (s·‖B‖/√r)·d_A
 * ("steady"). */
#include "pairs.h"

#define SMALL 14
#define ROWS (sizeof(real) == sizeof(float) ? 3 : 5)

/* What to do with d_A and d_B: AdamW, or write them to first_A and first_B. */
enum use { STEP, STORE };

INLINE int align(const pair_t *pair, index_t r, const options_t *o, real *work, enum use use) {
    index_t m = pair->m, n = pair->n, ld = stride(m), size = r * pad(r), side = r * stride(m > n ? m : n);
    real *S_A = work, *S_B = S_A + size, *K = S_B + size, *P = K + size, *R = P + size,
         *X = R + size, *C = X + size, *more = C + size;
    real *B = work + SMALL * size, *G = B + side, *D = G + side;
    const real *A = widen(pair->A, r * n, D + side);
    const real *grad_A = widen(pair->grad_A, r * n, D + 2 * side);
    dot(A, A, r, n, S_A);
    dot(grad_A, A, r, n, K);
    transpose(pair->B, m, r, B, ld);
    dot(B, B, r, ld, S_B);
    int swap;
    if (!inverses(S_A, S_B, r, o, o->x, R, P, &swap, more)) return 0;
    choose_x(S_A, S_B, R, P, K, r, o->x, swap, X, C, more);

    real c = 1 / (pair->scaling * pair->scaling), s = pair->scaling;
    real unit = o->flag ? c * s * sqrt(trace(S_B, r) / r) : c;
    scale(P, r, unit);
    combine(P, pad(r), r, r, grad_A, n, n, D, n, 0);
    if (o->x != ZERO) {
        scale(X, r, unit);
        combine(X, pad(r), r, r, A, n, n, D, n, 1);
    }
    const float *d = narrowed(D, r * n);
    if (use == STEP) adamw(pair->A, d, pair->first_A, pair->second_A, pair->step_A, r * n, o);
    else memcpy(pair->first_A, d, sizeof(float) * r * n);

    transpose(pair->grad_B, m, r, G, ld);
    scale(R, r, c);
    scale(C, r, -c);
    flip(C, r); /* d_Bᵀ = S_A⁻¹·grad_Bᵀ − Cᵀ·Bᵀ */
    combine(R, pad(r), r, r, G, ld, ld, D, ld, 0);
    combine(C, pad(r), r, r, B, ld, ld, D, ld, 1);
    if (use == STEP) {
        transpose_back(D, ld, m, r, (float *)G);
        adamw(pair->B, (float *)G, pair->first_B, pair->second_B, pair->step_B, m * r, o);
    } else {
        transpose_back(D, ld, m, r, pair->first_B);
    }
    return 1;
}

static int efficient(const pair_t *pair, index_t r, const options_t *o, real *work) {
    return align(pair, r, o, work, STEP);
}

static int aligned(const pair_t *pair, index_t r, const options_t *o, real *work) {
    return align(pair, r, o, work, STORE);
}

void NAME(lorapro_aligned, REAL)(index_t pairs, index_t r, const pair_t *pair,
                                 const options_t *options, unsigned char *done) {
    for_each_pair(pairs, r, pair, options, done, SMALL, ROWS, aligned);
}

void NAME(lorapro_efficient, REAL)(index_t pairs, index_t r, const pair_t *pair,
                                   const options_t *options, unsigned char *done) {
    for_each_pair(pairs, r, pair, options, done, SMALL, ROWS, efficient);
}
