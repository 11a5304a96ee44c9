/* Tangent vectors s·(B·T_A + T_B·A) of a pair: projection, steps and transport, as lorapro.optim.spaces
 * has them. B and what is shaped like it are transposed: (r, ld) with ld = stride(m); what is shaped
 * like A is (r, n). */
#ifndef LORAPRO_TANGENT_H
#define LORAPRO_TANGENT_H

#include "pairs.h"

/* A pair in the precision of the work, with its Gram matrices and their inverses. */
typedef struct {
    index_t m, n, r, ld;
    real s;
    int swap;
    const real *A, *B;
    real *S_A, *S_B, *inv_A, *inv_B; /* each (r, r) */
} space_t;

INLINE space_t space_of(const pair_t *pair, index_t r, const real *A, const real *B, real *grams) {
    index_t size = r * pad(r);
    space_t made = {pair->m, pair->n, r, stride(pair->m), pair->scaling, 0, A, B,
                    grams, grams + size, grams + 2 * size, grams + 3 * size};
    return made;
}

/* Fill in Gram matrices and inverses; 0 if this precision is not up to the factors, or conjugate
 * gradients to X. `work` holds two (r, r). */
static inline int measure(space_t *at, const options_t *o, index_t x, real *work) {
    dot(at->A, at->A, at->r, at->n, at->S_A);
    dot(at->B, at->B, at->r, at->ld, at->S_B);
    return inverses(at->S_A, at->S_B, at->r, o, x, at->inv_A, at->inv_B, &at->swap, work);
}

/* out (r, length) = W·X (+ out) for an (r, r) matrix W. */
INLINE void weigh(const real *W, const real *X, index_t r, index_t length, real *out, int add) {
    combine(W, pad(r), r, r, X, length, length, out, length, add);
}

/* out[j] += unit·Σ_p (X∘Y)_pj. */
INLINE void add_products(const real *X, const real *Y, index_t r, index_t length, real unit,
                         real *out) {
    for (index_t p = 0; p < r; p++)
        for (index_t j = 0; j < length; j++) out[j] += unit * X[p * length + j] * Y[p * length + j];
}

/* The gradient as a tangent vector, X = 0: T_A = S_B⁻¹·grad_A/s² and T_B = (grad_B − B·S_B⁻¹·K)·
 * S_A⁻¹/s² with K = grad_A·Aᵀ. If asked for, squares of g·P_A are summed along rows and those of
 * P_B·g along columns, which costs no product: (g·P_A)∘(g·P_A) sums to grad_B·S_A⁻¹∘grad_B/s².
 * `work` holds two (r, r). */
static inline void project(const space_t *at, const real *grad_A, const real *grad_B, const real *K,
                           real *T_A, real *T_B, real *rows, real *columns, real *work) {
    index_t r = at->r, size = r * pad(r);
    real c = 1 / (at->s * at->s), *C = work, *W = C + size;
    memcpy(W, at->inv_B, sizeof(real) * size);
    scale(W, r, c);
    weigh(W, grad_A, r, at->n, T_A, 0);
    if (columns) add_products(grad_A, T_A, r, at->n, 1, columns);
    multiply(W, K, r, C, 0);
    multiply(C, at->inv_A, r, W, 0);
    memcpy(C, W, sizeof(real) * size);
    scale(C, r, -1);
    flip(C, r);
    memcpy(W, at->inv_A, sizeof(real) * size);
    scale(W, r, c);
    weigh(W, grad_B, r, at->ld, T_B, 0);
    if (rows) add_products(grad_B, T_B, r, at->ld, 1, rows);
    weigh(C, at->B, r, at->ld, T_B, 1);
}

/* Read a pair: its space, K and the gradient (G_A, G_B) as a tangent vector; 0 if this precision is not
 * up to it. `copies` is room for A and grad_A where they have to be widened, `rest` two (r, r). */
static inline int enter(const pair_t *pair, const options_t *o, space_t *at, real *B, real *grad_B,
                        real *copies, index_t side, real *K, real *G_A, real *G_B, real *rows,
                        real *columns, real *rest) {
    index_t r = at->r, n = at->n;
    at->A = widen(pair->A, r * n, copies);
    const real *grad_A = widen(pair->grad_A, r * n, copies + side);
    transpose(pair->B, at->m, r, B, at->ld);
    if (!measure(at, o, o->x, rest)) return 0;
    transpose(pair->grad_B, at->m, r, grad_B, at->ld);
    dot(grad_A, at->A, r, n, K);
    project(at, grad_A, grad_B, K, G_A, G_B, rows, columns, rest);
    return 1;
}

/* The step that a rule's h makes, (d_A, d_B) = align(s·Bᵀh, s·h·Aᵀ). h comes as two sums of products
 * with a long side, Bᵀh = T₁·R₁ + T₂·R₂ and h·Aᵀ = L₁·U₁ + L₂·U₂, and as K = s·Bᵀh·Aᵀ, which is
 * changed. What the long sides are to be multiplied by comes out: d_A = T₁·R₁ + T₂·R₂ + X·A, and
 * d_Bᵀ = U₁·L₁ᵀ + U₂·L₂ᵀ + C·Bᵀ, each in its place. `work` holds eight (r, r). */
static inline void weights(const space_t *at, index_t x, real *K, real *T1, real *T2, real *U1,
                           real *U2, real *X, real *C, real *work) {
    index_t r = at->r, size = r * pad(r);
    real c = 1 / (at->s * at->s), *W = work;
    choose_x(at->S_A, at->S_B, at->inv_A, at->inv_B, K, r, x, at->swap, X, C, W);
    real *T[] = {T1, T2}, *U[] = {U1, U2};
    for (int i = 0; i < 2; i++) {
        multiply(at->inv_B, T[i], r, W, 0);
        memcpy(T[i], W, sizeof(real) * size);
        scale(T[i], r, 1 / at->s);
        multiply(U[i], at->inv_A, r, W, 0);
        memcpy(U[i], W, sizeof(real) * size);
        scale(U[i], r, 1 / at->s);
        flip(U[i], r);
    }
    if (x != ZERO) scale(X, r, c);
    scale(C, r, -c);
    flip(C, r);
}

/* Momentum M ← β·M + (1 − β)·G, read from the pair and left there as it is. */
static inline void average(const pair_t *pair, index_t r, real beta, const real *G_A,
                           const real *G_B, real *M_A, real *M_B) {
    index_t ld = stride(pair->m);
    transpose(pair->first_B, pair->m, r, M_B, ld);
    for (index_t i = 0; i < r * ld; i++) M_B[i] = beta * M_B[i] + (1 - beta) * G_B[i];
    for (index_t i = 0; i < r * pair->n; i++)
        M_A[i] = beta * pair->first_A[i] + (1 - beta) * G_A[i];
}

/* P ← keep·P − lr·d, written to d and rounded as the parameter is. */
INLINE void take_step(const real *P, real *d, index_t count, const options_t *o) {
    real keep = sqrt(fmax(0.0, 1 - o->lr * o->weight_decay)), lr = o->lr;
    for (index_t i = 0; i < count; i++) d[i] = (float)(keep * P[i] - lr * d[i]);
}

#define MOST_CURVE 4 /* as in lorapro.optim.retraction */

/* Whether the second-order part γ²·d_B·d_A of a step is so much longer than the first that it is not to
 * be taken as it is (lorapro.optim.retraction). The ratio is at most γ·‖d_A‖·‖A⁺‖, and γ·‖d_B‖·‖B⁺‖:
 * products are needed only where neither is small. `work` holds four (r, r). */
static inline int outruns(const space_t *at, const real *d_A, const real *d_B, real lr, real *work) {
    index_t r = at->r, size = r * pad(r), n = at->n, ld = at->ld;
    real *AA = work, *BB = AA + size, *DA = BB + size, *BD = DA + size;
    real of_A = squares(d_A, r * n) * trace(at->inv_A, r), of_B = squares(d_B, r * ld) * trace(at->inv_B, r);
    if (lr * lr * fmin(of_A, of_B) <= MOST_CURVE * MOST_CURVE) return 0;
    dot(d_A, d_A, r, n, AA);
    dot(d_B, d_B, r, ld, BB);
    dot(d_A, at->A, r, n, DA);
    dot(at->B, d_B, r, ld, BD);
    real first = inner(at->S_B, AA, r) + inner(BB, at->S_A, r) + 2 * inner(BD, DA, r);
    return lr * lr * inner(AA, BB, r) > MOST_CURVE * MOST_CURVE * first && isfinite(first);
}

/* Carry the tangent vector (M_A, M_B) from one pair of factors to another by orthogonal projection:
 * M_A' = S_B'⁻¹·B'ᵀ·M, M_B' = (I − P_B')·M·A'ᵀ·S_A'⁻¹. `work` holds six (r, r). */
static inline void transport(const space_t *from, const space_t *to, const real *M_A,
                             const real *M_B, real *out_A, real *out_B, real *work) {
    index_t r = to->r, size = r * pad(r), n = to->n, ld = to->ld;
    real *BB = work, *BM = BB + size, *MA = BM + size, *AA = MA + size, *C = AA + size, *W = C + size;
    dot(to->B, from->B, r, ld, BB);
    dot(to->B, M_B, r, ld, BM);
    dot(M_A, to->A, r, n, MA);
    dot(from->A, to->A, r, n, AA);
    multiply(BB, MA, r, W, 0);
    multiply(BM, AA, r, W, 1);
    multiply(to->inv_B, W, r, C, 0);
    multiply(C, to->inv_A, r, W, 0);
    flip(W, r);
    scale(W, r, -1);
    weigh(W, to->B, r, ld, out_B, 0);
    multiply(MA, to->inv_A, r, W, 0);
    flip(W, r);
    weigh(W, from->B, r, ld, out_B, 1);
    multiply(AA, to->inv_A, r, W, 0);
    flip(W, r);
    weigh(W, M_B, r, ld, out_B, 1);
    multiply(to->inv_B, BB, r, W, 0);
    weigh(W, M_A, r, n, out_A, 0);
    multiply(to->inv_B, BM, r, W, 0);
    weigh(W, from->A, r, n, out_A, 1);
}

/* Write numbers in the precision of the parameters. */
INLINE void narrow(const real *values, index_t count, float *to) {
    for (index_t i = 0; i < count; i++) to[i] = values[i];
}

/* Write new factors and momentum. */
static inline void keep(const pair_t *pair, index_t r, const real *A, const real *B,
                        const real *M_A, const real *M_B) {
    index_t m = pair->m, n = pair->n, ld = stride(m);
    narrow(A, r * n, pair->A);
    narrow(M_A, r * n, pair->first_A);
    transpose_back(B, ld, m, r, pair->B);
    transpose_back(M_B, ld, m, r, pair->first_B);
}

#endif
