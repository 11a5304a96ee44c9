/* What every rule does with a pair: its values, X and the coefficients of its alignment, AdamW.
 * Shapes: A (r, n), B (m, r), both contiguous and float32, like gradients and moments. */
#ifndef LORAPRO_PAIRS_H
#define LORAPRO_PAIRS_H

#include <stdlib.h>

#include "algebra.h"

#define JOIN(a, b) a##_##b
#define NAME(a, b) JOIN(a, b)

enum x_choice { ZERO, SYLVESTER, SYMMETRIC };

/* One pair as Python fills it in. What the moments are depends on the rule. */
typedef struct {
    float *A, *B, *grad_A, *grad_B, *first_A, *first_B, *second_A, *second_B, *step_A, *step_B;
    index_t m, n;
    double scaling;
} pair_t;

typedef struct {
    double lr, beta1, beta2, eps, weight_decay;
    double most_condition, most_smaller_condition;
    index_t x, flag;
} options_t;

typedef int rule_t(const pair_t *, index_t, const options_t *, real *);

/* Apply a rule to every pair that is not done yet. done[i] stays 0 for pairs that the rule refused
 * or for which there was no memory: those were not touched. `small` and `rows`: how many (r, r)
 * matrices and how many rows of the longer side, r at a time, the rule works with. */
static void for_each_pair(index_t pairs, index_t r, const pair_t *pair, const options_t *options,
                          unsigned char *done, index_t small, index_t rows, rule_t *rule) {
    index_t longest = 0;
    for (index_t i = 0; i < pairs; i++) {
        longest = pair[i].m > longest ? pair[i].m : longest;
        longest = pair[i].n > longest ? pair[i].n : longest;
    }
    size_t bytes = sizeof(real) * r * (small * pad(r) + rows * stride(longest));
#pragma omp parallel if (pairs > 1)
    {
        real *work = aligned_alloc(BYTES, (bytes + BYTES - 1) / BYTES * BYTES);
#pragma omp for schedule(dynamic, 1)
        for (index_t i = 0; i < pairs; i++)
            if (!done[i]) done[i] = work && rule(pair + i, r, options, work);
        free(work);
    }
}

/* Numbers of a pair in the precision of the work: themselves, or a copy. */
INLINE const real *widen(const float *values, index_t count, real *copy) {
    if (sizeof(real) == sizeof(float)) return (const real *)values;
    for (index_t i = 0; i < count; i++) copy[i] = values[i];
    return copy;
}

/* Numbers in single precision, in the same place. */
INLINE const float *narrowed(real *values, index_t count) {
    float *out = (float *)values;
    if (sizeof(real) != sizeof(float))
        for (index_t i = 0; i < count; i++) out[i] = values[i];
    return out;
}

/* torch.optim.AdamW's rule for one tensor, d in place of its gradient. */
static inline void adamw(float *restrict p, const float *restrict d, float *restrict mean,
                         float *restrict square, float *step, index_t count, const options_t *o) {
    *step += 1;
    double t = *step;
    float keep = 1 - o->lr * o->weight_decay, rate = o->lr / (1 - pow(o->beta1, t));
    float root = 1 / sqrt(1 - pow(o->beta2, t)), eps = o->eps;
    float b1 = o->beta1, b2 = o->beta2, c1 = 1 - o->beta1, c2 = 1 - o->beta2;
    for (index_t i = 0; i < count; i++) {
        float g = d[i], m = b1 * mean[i] + c1 * g, v = b2 * square[i] + c2 * g * g;
        mean[i] = m;
        square[i] = v;
        p[i] = keep * p[i] - rate * m / (sqrt(v) * root + eps);
    }
}

/* S_A⁻¹ and S_B⁻¹; returns whether this precision and, for X, conjugate gradients are up to the
 * condition of the factors. `work` holds two (r, r) matrices. */
static inline int inverses(const real *S_A, const real *S_B, index_t r, const options_t *o,
                           index_t x, real *inv_A, real *inv_B, int *swap, real *work) {
    memcpy(inv_A, S_A, sizeof(real) * r * pad(r));
    memcpy(inv_B, S_B, sizeof(real) * r * pad(r));
    real of_A = invert(inv_A, r, work), of_B = invert(inv_B, r, work);
    *swap = of_B < of_A; /* the side nearer to the identity preconditions X */
    if (!(fmax(of_A, of_B) < o->most_condition)) return 0;
    return x != SYLVESTER || fmin(of_A, of_B) <= o->most_smaller_condition * r;
}

/* X and C of d_A = S_B⁻¹·grad_A + X·A and d_B = grad_B·S_A⁻¹ − B·C, times s²: always
 * C − X = S_B⁻¹·K·S_A⁻¹. K is changed. X is left alone for ZERO. `work` holds seven (r, r). */
static inline void choose_x(const real *S_A, const real *S_B, const real *inv_A, const real *inv_B,
                            real *K, index_t r, index_t x, int swap, real *X, real *C, real *work) {
    index_t size = r * pad(r);
    real *Y = work, *rest = Y + size, *more = rest + size;
    if (x != SYLVESTER) {
        multiply(inv_B, K, r, Y, 0);
        multiply(Y, inv_A, r, C, 0);
        if (x == ZERO) return;
        scale(C, r, 0.5);
        memcpy(X, C, sizeof(real) * size);
        scale(X, r, -1);
        return;
    }
    real largest = 0;
    for (index_t i = 0; i < size; i++) largest = fabs(K[i]) > largest ? fabs(K[i]) : largest;
    if (!(largest > 0)) largest = 1;
    scale(K, r, 1 / largest);
    if (swap) {
        flip(K, r);
        solve_sylvester(S_A, S_B, K, r, Y, rest, more);
        flip(Y, r);
        flip(rest, r);
    } else {
        solve_sylvester(S_B, S_A, K, r, Y, rest, more);
    }
    scale(Y, r, largest);
    multiply(Y, inv_A, r, C, 0);
    scale(rest, r, largest);
    multiply(rest, inv_A, r, Y, 1); /* with the residual C − X is exact for an inexact Y */
    multiply(inv_B, Y, r, X, 0);
    scale(X, r, -1);
}

#endif
