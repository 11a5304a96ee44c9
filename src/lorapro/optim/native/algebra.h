/* Dense algebra of low-rank pairs, one thread. Compiled once for REAL = float, once for double.
 *
 * A matrix is "wide": its rows lie along the long side, `ld` numbers apart. Rows of small (r, r)
 * matrices are `pad(r)` apart and zero behind the r-th column: their products have no remainder.
 */
#ifndef LORAPRO_ALGEBRA_H
#define LORAPRO_ALGEBRA_H

#include <float.h>
#include <string.h>
#include <tgmath.h>

#ifndef REAL
#define REAL float
#endif

typedef REAL real;

#define BYTES 64 /* of a vector; the compiler splits it where registers are shorter */
#define WIDTH ((int)(BYTES / sizeof(real)))
#define INLINE static inline __attribute__((always_inline))

typedef long long index_t;
typedef real vector __attribute__((vector_size(BYTES), aligned(4), may_alias));

INLINE index_t pad(index_t length) { return (length + WIDTH - 1) / WIDTH * WIDTH; }

/* The same for rows of the transpose of B. An odd number of vectors spreads rows over the sets of the
 * cache, where a power of two would crowd them into a few. */
INLINE index_t stride(index_t length) { return (pad(length) / WIDTH | 1) * WIDTH; }

INLINE vector load(const real *from) { return *(const vector *)from; }

INLINE void store(real *to, vector v) { *(vector *)to = v; }

INLINE vector load_first(const real *from, index_t count) {
    vector v = {0};
    memcpy(&v, from, sizeof(real) * count);
    return v;
}

typedef real four __attribute__((vector_size(4 * sizeof(real)), aligned(4), may_alias));

/* Four of the eight numbers in a and b. GCC has the first form from version 12 on, clang only that. */
#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef __typeof__(__builtin_choose_expr(sizeof(real) == sizeof(int), 0, 0LL)) lane;
typedef lane four_indices __attribute__((vector_size(4 * sizeof(lane))));
#define PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, (four_indices){i, j, k, l})
#endif

/* Four sums that add up to that of v. */
INLINE four fold(vector v) {
    four *parts = (four *)&v;
    if (WIDTH == 8) return parts[0] + parts[1];
    return (parts[0] + parts[2]) + (parts[1] + parts[3]);
}

/* The sums of four vectors. */
INLINE four sums(vector a, vector b, vector c, vector d) {
    four w = fold(a), x = fold(b), y = fold(c), z = fold(d);
    four wx = PICK(w, x, 0, 4, 2, 6) + PICK(w, x, 1, 5, 3, 7);
    four yz = PICK(y, z, 0, 4, 2, 6) + PICK(y, z, 1, 5, 3, 7);
    return PICK(wx, yz, 0, 1, 4, 5) + PICK(wx, yz, 2, 3, 6, 7);
}

INLINE real sum(vector v) {
    four parts = fold(v);
    return parts[0] + parts[1] + parts[2] + parts[3];
}

/* `rows` by `columns` entries of X·Yᵀ. */
INLINE void gram_block(int rows, int columns, const real *X, index_t ldx, const real *Y,
                       index_t ldy, index_t length, real *G, index_t ldg) {
    vector total[4][4];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) total[i][j] = (vector){0};
    index_t at = 0;
    for (; at + WIDTH <= length; at += WIDTH) {
        vector y[4];
        for (int j = 0; j < columns; j++) y[j] = load(Y + j * ldy + at);
        for (int i = 0; i < rows; i++) {
            vector x = load(X + i * ldx + at);
            for (int j = 0; j < columns; j++) total[i][j] += x * y[j];
        }
    }
    if (at < length)
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < columns; j++)
                total[i][j] += load_first(X + i * ldx + at, length - at) *
                               load_first(Y + j * ldy + at, length - at);
    for (int i = 0; i < rows; i++)
        if (columns == 4)
            *(four *)(G + i * ldg) = sums(total[i][0], total[i][1], total[i][2], total[i][3]);
        else
            for (int j = 0; j < columns; j++) G[i * ldg + j] = sum(total[i][j]);
}

/* G = X·Yᵀ for X (p, length) and Y (q, length); only half is worked out if it is symmetric. */
static void gram(const real *X, index_t ldx, index_t p, const real *Y, index_t ldy, index_t q,
                 index_t length, real *G, index_t ldg, int same) {
    for (index_t i = 0; i < p; i += 4)
        for (index_t j = same ? i : 0; j < q; j += 4) {
            const real *x = X + i * ldx, *y = Y + j * ldy;
            real *g = G + i * ldg + j;
            if (i + 4 <= p && j + 4 <= q) {
                gram_block(4, 4, x, ldx, y, ldy, length, g, ldg);
                continue;
            }
            index_t rows = p - i < 4 ? p - i : 4, columns = q - j < 4 ? q - j : 4;
            for (index_t a = 0; a < rows; a++)
                for (index_t b = 0; b < columns; b++)
                    gram_block(1, 1, x + a * ldx, ldx, y + b * ldy, ldy, length, g + a * ldg + b, ldg);
        }
    if (same)
        for (index_t i = 0; i < p; i++)
            for (index_t j = 0; j < i; j++) G[i * ldg + j] = G[j * ldg + i];
}

/* X·Yᵀ as an (r, r) matrix with zeros behind the r-th column. */
INLINE void dot(const real *X, const real *Y, index_t r, index_t length, real *out) {
    memset(out, 0, sizeof(real) * r * pad(r));
    gram(X, length, r, Y, length, r, length, out, pad(r), X == Y);
}

/* The same where it is known to be symmetric. */
INLINE void dot_same(const real *X, const real *Y, index_t r, index_t length, real *out) {
    memset(out, 0, sizeof(real) * r * pad(r));
    gram(X, length, r, Y, length, r, length, out, pad(r), 1);
}

/* `rows` rows of C·X (+ out), `vectors` vectors wide. */
INLINE void combine_block(int rows, int vectors, const real *C, index_t ldc, index_t p,
                          const real *X, index_t ldx, real *out, index_t ldo, int add) {
    vector total[4][4];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++)
            total[i][j] = add ? load(out + i * ldo + j * WIDTH) : (vector){0};
    for (index_t k = 0; k < p; k++) {
        vector x[4];
        for (int j = 0; j < vectors; j++) x[j] = load(X + k * ldx + j * WIDTH);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < vectors; j++) total[i][j] += C[i * ldc + k] * x[j];
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) store(out + i * ldo + j * WIDTH, total[i][j]);
}

/* out (q, length) = C·X (+ out) for C (q, p) and X (p, length). */
static void combine(const real *C, index_t ldc, index_t q, index_t p, const real *X, index_t ldx,
                    index_t length, real *out, index_t ldo, int add) {
    index_t at = 0, wide = length / (4 * WIDTH) * (4 * WIDTH), whole = length / WIDTH * WIDTH;
    while (at < whole) {
        int vectors = at < wide ? 4 : 1;
        index_t i = 0;
        for (; i + 4 <= q; i += 4) {
            const real *c = C + i * ldc, *x = X + at;
            real *o = out + i * ldo + at;
            if (vectors == 4) combine_block(4, 4, c, ldc, p, x, ldx, o, ldo, add);
            else combine_block(4, 1, c, ldc, p, x, ldx, o, ldo, add);
        }
        for (; i < q; i++) {
            const real *c = C + i * ldc, *x = X + at;
            real *o = out + i * ldo + at;
            if (vectors == 4) combine_block(1, 4, c, ldc, p, x, ldx, o, ldo, add);
            else combine_block(1, 1, c, ldc, p, x, ldx, o, ldo, add);
        }
        at += vectors * WIDTH;
    }
    if (at < length)
        for (index_t i = 0; i < q; i++) {
            vector total = add ? load_first(out + i * ldo + at, length - at) : (vector){0};
            for (index_t k = 0; k < p; k++)
                total += C[i * ldc + k] * load_first(X + k * ldx + at, length - at);
            memcpy(out + i * ldo + at, &total, sizeof(real) * (length - at));
        }
}

typedef float four_floats __attribute__((vector_size(16), aligned(4), may_alias));

/* Transpose a matrix of four rows. */
INLINE void turn(four *rows) {
    four a = PICK(rows[0], rows[1], 0, 4, 1, 5);
    four b = PICK(rows[0], rows[1], 2, 6, 3, 7);
    four c = PICK(rows[2], rows[3], 0, 4, 1, 5);
    four d = PICK(rows[2], rows[3], 2, 6, 3, 7);
    rows[0] = PICK(a, c, 0, 1, 4, 5);
    rows[1] = PICK(a, c, 2, 3, 6, 7);
    rows[2] = PICK(b, d, 0, 1, 4, 5);
    rows[3] = PICK(b, d, 2, 3, 6, 7);
}

/* T (r, ld) = Bᵀ for B (m, r), zero behind the m-th column. */
static void transpose(const float *B, index_t m, index_t r, real *T, index_t ld) {
    index_t whole = m / 4 * 4, across = r / 4 * 4;
    for (index_t i = 0; i < whole; i += 4) {
        for (index_t j = 0; j < across; j += 4) {
            four rows[4];
            for (int k = 0; k < 4; k++)
                rows[k] = __builtin_convertvector(*(const four_floats *)(B + (i + k) * r + j), four);
            turn(rows);
            for (int k = 0; k < 4; k++) *(four *)(T + (j + k) * ld + i) = rows[k];
        }
        for (index_t j = across; j < r; j++)
            for (int k = 0; k < 4; k++) T[j * ld + i + k] = B[(i + k) * r + j];
    }
    for (index_t j = 0; j < r; j++) {
        for (index_t i = whole; i < m; i++) T[j * ld + i] = B[i * r + j];
        for (index_t i = m; i < ld; i++) T[j * ld + i] = 0;
    }
}

/* B (m, r) = Tᵀ, rounded to single precision. */
static void transpose_back(const real *T, index_t ld, index_t m, index_t r, float *B) {
    index_t whole = m / 4 * 4, across = r / 4 * 4;
    for (index_t i = 0; i < whole; i += 4) {
        for (index_t j = 0; j < across; j += 4) {
            four rows[4];
            for (int k = 0; k < 4; k++) rows[k] = *(const four *)(T + (j + k) * ld + i);
            turn(rows);
            for (int k = 0; k < 4; k++)
                *(four_floats *)(B + (i + k) * r + j) = __builtin_convertvector(rows[k], four_floats);
        }
        for (index_t j = across; j < r; j++)
            for (int k = 0; k < 4; k++) B[(i + k) * r + j] = T[j * ld + i + k];
    }
    for (index_t j = 0; j < r; j++)
        for (index_t i = whole; i < m; i++) B[i * r + j] = T[j * ld + i];
}

/* S ← Sᵀ. */
INLINE void flip(real *S, index_t r) {
    index_t ld = pad(r);
    for (index_t i = 0; i < r; i++)
        for (index_t j = 0; j < i; j++) {
            real kept = S[i * ld + j];
            S[i * ld + j] = S[j * ld + i];
            S[j * ld + i] = kept;
        }
}

/* S ← factor·S. */
INLINE void scale(real *S, index_t r, real factor) {
    for (index_t i = 0; i < r * pad(r); i += WIDTH) store(S + i, load(S + i) * factor);
}

/* out = P·Q (+ out), all (r, r). */
INLINE void multiply(const real *P, const real *Q, index_t r, real *out, int add) {
    combine(P, pad(r), r, r, Q, pad(r), pad(r), out, pad(r), add);
}

/* Sum of the products of all entries. */
static real inner(const real *P, const real *Q, index_t r) {
    vector total = {0};
    for (index_t i = 0; i < r * pad(r); i += WIDTH) total += load(P + i) * load(Q + i);
    return sum(total);
}

/* Sum of squares of a long vector. */
static real squares(const real *x, index_t count) {
    vector total = {0};
    index_t at = 0;
    for (; at + WIDTH <= count; at += WIDTH) total += load(x + at) * load(x + at);
    vector rest = load_first(x + at, count - at);
    return sum(total + rest * rest);
}

INLINE real trace(const real *S, index_t r) {
    real total = 0;
    for (index_t i = 0; i < r; i++) total += S[i * pad(r) + i];
    return total;
}

/* Invert `count` rows and columns of S from k on, by Gauss and Jordan; returns 0 if it cannot. */
INLINE int invert_small(real *S, index_t ld, index_t count) {
    for (index_t k = 0; k < count; k++) {
        real pivot = S[k * ld + k];
        if (!(pivot > 0)) return 0;
        S[k * ld + k] = 1;
        for (index_t j = 0; j < count; j++) S[k * ld + j] /= pivot;
        for (index_t i = 0; i < count; i++) {
            if (i == k) continue;
            real factor = S[i * ld + k];
            S[i * ld + k] = 0;
            for (index_t j = 0; j < count; j++) S[i * ld + j] -= factor * S[k * ld + j];
        }
    }
    return 1;
}

#define PIVOTS 8

/* Inverse of a symmetric positive matrix in place, by Gauss and Jordan with a few pivots at a time.
 * Returns ‖S‖·‖S⁻¹‖ in Frobenius norms, Inf where there is no inverse. `work` holds two (r, r). */
static real invert(real *S, index_t r, real *work) {
    index_t ld = pad(r);
    real before = inner(S, S, r);
    for (index_t k = 0; k < r; k += PIVOTS) {
        index_t count = r - k < PIVOTS ? r - k : PIVOTS, after = k + count;
        real *rows = S + k * ld, corner[PIVOTS * PIVOTS], *factors = work + count * ld;
        for (index_t i = 0; i < count; i++)
            for (index_t j = 0; j < count; j++) corner[i * PIVOTS + j] = rows[i * ld + k + j];
        if (!invert_small(corner, PIVOTS, count)) return INFINITY;
        for (index_t i = 0; i < r; i++)
            for (index_t j = 0; j < count; j++) {
                factors[i * PIVOTS + j] = -S[i * ld + k + j];
                S[i * ld + k + j] = i == k + j;
            }
        combine(corner, PIVOTS, count, count, rows, ld, ld, work, ld, 0);
        memcpy(rows, work, sizeof(real) * count * ld);
        combine(factors, PIVOTS, k, count, rows, ld, ld, S, ld, 1);
        combine(factors + after * PIVOTS, PIVOTS, r - after, count, rows, ld, ld, S + after * ld, ld, 1);
    }
    real condition = sqrt(before) * sqrt(inner(S, S, r));
    return isfinite(condition) ? condition : INFINITY;
}

#define SMALLEST ((real)FLT_MIN)
#define TOLERANCE 5e-3 /* residual of Y, relative to K */
#define MOST_STEPS 16

/* Y with P·Y + Y·Q + rest = K by conjugate gradients, preconditioned by (P + q·I)⁻¹, q the mean
 * eigenvalue of Q. `rest`, the residual, is small. Same method and limits as lorapro.optim.small,
 * arranged so that a step takes two products: E = (P + q·I)·D is carried along with D.
 * `work` holds five (r, r) matrices. */
static void solve_sylvester(const real *P, const real *Q, const real *K, index_t r, real *Y,
                            real *rest, real *work) {
    index_t size = r * pad(r);
    real *M = work, *D = M + size, *E = D + size, *AD = E + size, *Z = AD + size;
    real mean = trace(Q, r) / r;
    memset(Y, 0, sizeof(real) * size);
    memcpy(M, P, sizeof(real) * size);
    for (index_t i = 0; i < r; i++) M[i * pad(r) + i] += mean;
    invert(M, r, D);
    memcpy(rest, K, sizeof(real) * size);
    memcpy(E, K, sizeof(real) * size);
    multiply(M, rest, r, D, 0);
    real rz = inner(rest, D, r), target = TOLERANCE * TOLERANCE * rz;
    for (int step = 0; step < MOST_STEPS && rz > target; step++) {
        multiply(D, Q, r, AD, 0);
        for (index_t i = 0; i < size; i += WIDTH)
            store(AD + i, load(AD + i) + load(E + i) - mean * load(D + i));
        real far = rz / fmax(inner(D, AD, r), SMALLEST);
        for (index_t i = 0; i < size; i += WIDTH) {
            store(Y + i, load(Y + i) + far * load(D + i));
            store(rest + i, load(rest + i) - far * load(AD + i));
        }
        multiply(M, rest, r, Z, 0);
        real before = rz;
        rz = inner(rest, Z, r);
        real turn = rz / fmax(before, SMALLEST);
        for (index_t i = 0; i < size; i += WIDTH) {
            store(D + i, load(Z + i) + turn * load(D + i));
            store(E + i, load(rest + i) + turn * load(E + i));
        }
    }
}

#endif
