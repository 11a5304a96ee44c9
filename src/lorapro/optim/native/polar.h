/* Cholesky factors and the polar factor of a small matrix. */
#ifndef LORAPRO_POLAR_H
#define LORAPRO_POLAR_H

#include "algebra.h"

/* U, upper triangular, with S = Uᵀ·U, in place. Where rounding left nothing of a pivot, the row is
 * zero. */
static inline void cholesky(real *S, index_t r) {
    index_t ld = pad(r);
    for (index_t k = 0; k < r; k++) {
        real *row = S + k * ld, pivot = row[k];
        for (index_t j = 0; j < k; j++) row[j] = 0;
        real by = pivot <= 0 ? 0 : 1 / sqrt(pivot);
        for (index_t j = k / WIDTH * WIDTH; j < ld; j += WIDTH) store(row + j, load(row + j) * by);
        for (index_t i = k + 1; i < r; i++) {
            real factor = row[i];
            for (index_t j = i / WIDTH * WIDTH; j < ld; j += WIDTH)
                store(S + i * ld + j, load(S + i * ld + j) - factor * load(row + j));
        }
    }
}

/* U⁻¹ of what `cholesky` gives; zero rows where U has them. */
static inline void invert_upper(const real *U, index_t r, real *out) {
    index_t ld = pad(r);
    memset(out, 0, sizeof(real) * r * ld);
    for (index_t i = r - 1; i >= 0; i--) {
        const real *row = U + i * ld;
        real *to = out + i * ld, by = row[i] == 0 ? 0 : 1 / row[i];
        to[i] = 1;
        for (index_t j = i + 1; j < r; j++)
            for (index_t k = j / WIDTH * WIDTH; k < ld; k += WIDTH)
                store(to + k, load(to + k) - row[j] * load(out + j * ld + k));
        for (index_t k = i / WIDTH * WIDTH; k < ld; k += WIDTH) store(to + k, load(to + k) * by);
    }
}

/* out = Sᵀ for small matrices. */
static void turned(const real *S, index_t r, real *out) {
    index_t ld = pad(r);
    for (index_t i = 0; i < r; i += 4)
        for (index_t j = 0; j < r; j += 4) {
            index_t rows = r - i < 4 ? r - i : 4, columns = r - j < 4 ? r - j : 4;
            four block[4] = {{0}};
            for (index_t k = 0; k < rows; k++) block[k] = *(const four *)(S + (i + k) * ld + j);
            turn(block);
            for (index_t k = 0; k < columns; k++) *(four *)(out + (j + k) * ld + i) = block[k];
        }
    for (index_t i = 0; i < r; i++)
        for (index_t j = (r + 3) / 4 * 4; j < ld; j++) out[i * ld + j] = 0;
}

#define STEEP_STEPS 5
#define SETTLING_STEPS 3

/* Polar factor of C (p, p) in place, by the odd polynomials of lorapro.optim.polar. `work` holds two
 * (p, p). */
static inline void polar(real *C, index_t p, real *work) {
    static const real steep[] = {3.4445, -4.7750, 2.0315}, settle[] = {1.875, -1.25, 0.375};
    index_t ld = pad(p), size = p * ld;
    real *S = work, *W = S + size;
    real norm = sqrt(inner(C, C, p));
    if (norm > 0) scale(C, p, 1 / norm);
    memset(S, 0, sizeof(real) * 2 * size);
    for (int step = 0; step < STEEP_STEPS + SETTLING_STEPS; step++) {
        const real *by = step < STEEP_STEPS ? steep : settle;
        turned(C, p, W);
        multiply(C, W, p, S, 0);
        multiply(S, S, p, W, 0);
        for (index_t i = 0; i < size; i += WIDTH)
            store(W + i, by[1] * load(S + i) + by[2] * load(W + i));
        for (index_t i = 0; i < p; i++) W[i * ld + i] += by[0];
        multiply(W, C, p, S, 0);
        memcpy(C, S, sizeof(real) * size);
    }
}

#endif
