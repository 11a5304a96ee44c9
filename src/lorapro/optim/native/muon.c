/* Muon on the tangent space, pair by pair; the rule is that of lorapro.optim.muon. first_A, first_B:
 * the momentum; step_A: the counter. beta1 is μ, the flag says nesterov.
 *
 * N = B·N_A + N_B·A is written in orthonormal bases. With S_A = U_AᵀU_A and S_B = U_BᵀU_B, Q_A =
 * U_A⁻ᵀ·A and Q_B = B·U_B⁻¹ are two; with N_BᵀB = 0, N_B·U_Aᵀ = Q_D·U_D and U_B·N_A − F·Q_A = U_Eᵀ·Q_E
 * with F = U_B·N_A·Aᵀ·U_A⁻¹ give the others:
 *
 *     N = [Q_B, Q_D]·[F, U_Eᵀ; U_D, 0]·[Q_A; Q_E]
 *
 * whose polar factor is that of the (2r, 2r) matrix in the middle. */
#include "polar.h"
#include "tangent.h"

#define SMALL 41
#define ROWS (sizeof(real) == sizeof(float) ? 8 : 10)
#define RIDGE 3e-7 /* as in lorapro.optim.muon */

/* One of the four (r, r) blocks of a (2r, 2r) matrix. */
static void block(const real *from, index_t r, int row, int column, real *to) {
    memset(to, 0, sizeof(real) * r * pad(r));
    for (index_t i = 0; i < r; i++)
        memcpy(to + i * pad(r), from + (row * r + i) * pad(2 * r) + column * r, sizeof(real) * r);
}

static void set_block(const real *from, index_t r, int row, int column, real *to) {
    for (index_t i = 0; i < r; i++)
        memcpy(to + (row * r + i) * pad(2 * r) + column * r, from + i * pad(r), sizeof(real) * r);
}

static void add_to_diagonal(real *S, index_t r, real value) {
    for (index_t i = 0; i < r; i++) S[i * pad(r) + i] += value;
}

/* out = Pᵀ·Q; P is turned over and back. */
static void multiply_flipped(real *P, const real *Q, index_t r, real *out) {
    flip(P, r);
    multiply(P, Q, r, out, 0);
    flip(P, r);
}

/* The same tangent vector with BᵀN_B = 0. It is so already unless gradients do not belong together, or
 * something else moved B. `work` holds two (r, r). */
static void straighten(const space_t *at, real *N_A, real *N_B, real *work) {
    index_t r = at->r;
    real *across = work, *Z = across + r * pad(r);
    dot(at->B, N_B, r, at->ld, across);
    real small = 1e-4 * sqrt(trace(at->S_B, r)), total = squares(N_B, r * at->ld);
    if (inner(across, across, r) <= small * small * total) return;
    multiply(at->inv_B, across, r, Z, 0);
    weigh(Z, at->A, r, at->n, N_A, 1);
    flip(Z, r);
    scale(Z, r, -1);
    weigh(Z, at->B, r, at->ld, N_B, 1);
}

/* h = [B, N_B]·H·[N_A; A], the polar factor of N times `length`: the four blocks of H, from
 * NA = N_A·Aᵀ and the Gram matrices NN = N_A·N_Aᵀ and MM = N_Bᵀ·N_B, which are used up. `work` holds
 * eight (r, r) and three (2r, 2r). */
static void polar_weights(const space_t *at, const real *NA, real *NN, real *MM, real length,
                          real *H11, real *H12, real *H21, real *H22, real *work) {
    index_t r = at->r, size = r * pad(r), large = 2 * r * pad(2 * r);
    real *U_A = work, *U_B = U_A + size, *F = U_B + size, *by_A = F + size, *by_B = by_A + size,
         *by_D = by_B + size, *by_E = by_D + size, *W = by_E + size, *core = W + size,
         *more = core + large;
    memcpy(U_A, at->S_A, sizeof(real) * size);
    memcpy(U_B, at->S_B, sizeof(real) * size);
    cholesky(U_A, r);
    cholesky(U_B, r);
    invert_upper(U_A, r, by_A);
    invert_upper(U_B, r, by_B);
    multiply(U_B, NA, r, W, 0);
    multiply(W, by_A, r, F, 0);
    /* U_DᵀU_D = U_A·MM·U_Aᵀ and U_EᵀU_E = U_B·NN·U_Bᵀ − F·Fᵀ */
    multiply(U_A, MM, r, W, 0);
    gram(W, pad(r), r, U_A, pad(r), r, pad(r), MM, pad(r), 1);
    multiply(U_B, NN, r, W, 0);
    gram(W, pad(r), r, U_B, pad(r), r, pad(r), NN, pad(r), 1);
    real lift = RIDGE * (trace(MM, r) + trace(NN, r)); /* of ‖N‖² */
    gram(F, pad(r), r, F, pad(r), r, pad(r), W, pad(r), 1);
    for (index_t i = 0; i < size; i++) NN[i] -= W[i];
    add_to_diagonal(MM, r, lift);
    add_to_diagonal(NN, r, lift);
    cholesky(MM, r);
    cholesky(NN, r);
    invert_upper(MM, r, by_D);
    invert_upper(NN, r, by_E);
    memset(core, 0, sizeof(real) * large);
    set_block(F, r, 0, 0, core);
    set_block(MM, r, 1, 0, core);
    flip(NN, r);
    set_block(NN, r, 0, 1, core);
    polar(core, 2 * r, more);

    /* [Q_B, Q_D] = [B·U_B⁻¹, N_B·U_Aᵀ·U_D⁻¹], Q_A = U_A⁻ᵀ·A, Q_E = U_E⁻ᵀ·(U_B·N_A − F·U_A⁻ᵀ·A) */
    real *left[] = {by_B, more}, *of_N = more + size, *of_A = of_N + size, *both = of_A + size;
    multiply_flipped(U_A, by_D, r, left[1]);
    multiply_flipped(by_E, U_B, r, of_N);
    multiply_flipped(by_E, F, r, W);
    flip(by_A, r);
    multiply(W, by_A, r, of_A, 0);
    real *H[2][2] = {{H11, H12}, {H21, H22}};
    for (int i = 0; i < 2; i++) {
        block(core, r, i, 1, W);
        scale(W, r, length);
        multiply(left[i], W, r, both, 0);
        multiply(both, of_N, r, H[i][0], 0);
        block(core, r, i, 0, W);
        scale(W, r, length);
        multiply(left[i], W, r, U_A, 0);
        multiply(both, of_A, r, W, 0);
        multiply(U_A, by_A, r, H[i][1], 0);
        for (index_t j = 0; j < size; j++) H[i][1][j] -= W[j];
    }
}

static int muon(const pair_t *pair, index_t r, const options_t *o, real *work) {
    index_t m = pair->m, n = pair->n, ld = stride(m), size = r * pad(r);
    index_t side = r * stride(m > n ? m : n);
    real *K = work, *T1 = K + size, *T2 = T1 + size, *U1 = T2 + size, *U2 = U1 + size,
         *X = U2 + size, *C = X + size, *NA = C + size, *H11 = NA + size, *H12 = H11 + size,
         *H21 = H12 + size, *H22 = H21 + size, *held = H22 + size, *rest = held + 8 * size;
    real *B = work + SMALL * size, *grad_B = B + side, *G_A = grad_B + side, *G_B = G_A + side,
         *M_A = G_B + side, *M_B = M_A + side, *new_A = M_B + side, *new_B = new_A + side;
    space_t at = space_of(pair, r, NULL, B, held), to = space_of(pair, r, new_A, new_B, held + 4 * size);
    if (!enter(pair, o, &at, B, grad_B, new_B + side, side, K, G_A, G_B, NULL, NULL, rest))
        return 0;
    average(pair, r, o->beta1, G_A, G_B, M_A, M_B);
    real *N_A = M_A, *N_B = M_B;
    if (o->flag) { /* look one step ahead */
        real mu = o->beta1;
        for (index_t i = 0; i < r * n; i++) G_A[i] += mu * (M_A[i] - G_A[i]);
        for (index_t i = 0; i < r * ld; i++) G_B[i] += mu * (M_B[i] - G_B[i]);
        N_A = G_A;
        N_B = G_B;
    }

    straighten(&at, N_A, N_B, rest);
    dot(N_A, at.A, r, n, NA);
    dot(N_A, N_A, r, n, T1);
    dot(N_B, N_B, r, ld, T2);
    real length = 0.2 * sqrt((double)(m > n ? m : n));
    polar_weights(&at, NA, T1, T2, length, H11, H12, H21, H22, rest);
    /* Bᵀh = S_B·H₁₁·N_A + S_B·H₁₂·A (BᵀN_B = 0), h·Aᵀ = B·(H₁₁·NA + H₁₂·S_A) + N_B·(…) */
    multiply(at.S_B, H11, r, T1, 0);
    multiply(at.S_B, H12, r, T2, 0);
    multiply(H11, NA, r, U1, 0);
    multiply(H12, at.S_A, r, U1, 1);
    multiply(H21, NA, r, U2, 0);
    multiply(H22, at.S_A, r, U2, 1);
    multiply(at.S_B, U1, r, K, 0);
    scale(K, r, at.s);
    weights(&at, o->x, K, T1, T2, U1, U2, X, C, rest);
    if (o->x != ZERO)
        for (index_t i = 0; i < size; i++) T2[i] += X[i];
    for (index_t i = 0; i < size; i++) U1[i] += C[i];
    weigh(T1, N_A, r, n, new_A, 0);
    weigh(T2, at.A, r, n, new_A, 1);
    weigh(U1, B, r, ld, new_B, 0);
    weigh(U2, N_B, r, ld, new_B, 1);
    if (outruns(&at, new_A, new_B, o->lr, rest)) return 0;
    take_step(at.A, new_A, r * n, o);
    take_step(B, new_B, r * ld, o);

    if (!measure(&to, o, ZERO, rest)) return 0;
    transport(&at, &to, M_A, M_B, G_A, G_B, rest);
    *pair->step_A += 1;
    keep(pair, r, new_A, new_B, G_A, G_B);
    return 1;
}

void NAME(lorapro_muon, REAL)(index_t pairs, index_t r, const pair_t *pair, const options_t *options,
                              unsigned char *done) {
    for_each_pair(pairs, r, pair, options, done, SMALL, ROWS, muon);
}
