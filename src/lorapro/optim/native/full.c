/* LoRA-Pro's full AdamW step (Algorithm 3), pair by pair. W is gone through in tiles that stay in
 * the core's cache: the equivalent gradient is formed, turned into h = m̂/(√v̂ + ε) and multiplied
 * by both factors there, so that the (m, n) moments are read and written once and nothing else of
 * that size exists. The formulas are those of lorapro.optim.adamw. first_A, first_B: the moments;
 * second_A: the counter. */
#include "pairs.h"

#define TILE_ROWS 16
#define TILE_COLUMNS (4096 / (int)sizeof(real))
#define TILE_LD (TILE_COLUMNS + WIDTH)
/* Seven matrices, seven for choose_x to work with, `coefficients`, `part`, the room behind rows. */
#define SMALL (7 + 7 + (3 * TILE_ROWS + WIDTH - 1) / WIDTH + 3)
#define SIDES 6

/* What is shaped like B is transposed, (r, ld) with ld = stride(m); what is shaped like A has rows
 * `ldn` apart and zeros behind the n-th column. */
typedef struct {
    index_t m, n, r, ld, ldn;
    real *S_A, *S_B, *inv_A, *inv_B, *K, *X, *C, *work;
    int swap;
    real *B, *G_B, *h_B, *G_A, *A, *h_A; /* G_A and A are one matrix R of 2r rows */
    real *coefficients, *part;
} full_t;

static full_t laid_out(const pair_t *pair, index_t r, real *work) {
    index_t size = r * pad(r), tall = r * stride(pair->m), wide = r * stride(pair->n);
    full_t f = {.m = pair->m, .n = pair->n, .r = r, .ld = stride(pair->m), .ldn = stride(pair->n)};
    real **small[] = {&f.S_A, &f.S_B, &f.inv_A, &f.inv_B, &f.K, &f.X, &f.C, &f.work};
    real **sides[] = {&f.B, &f.G_B, &f.h_B, &f.G_A, &f.A, &f.h_A};
    for (int i = 0; i < 8; i++) *small[i] = work + i * size;
    work += 14 * size;
    for (int i = 0; i < 6; i++) {
        *sides[i] = work;
        work += i < 3 ? tall : wide;
    }
    f.coefficients = work;
    f.part = work + 2 * r * TILE_ROWS;
    return f;
}

/* out = c·W·X (+ out) for an (r, r) matrix W, which is left multiplied. */
INLINE void weigh(real *W, real c, const real *X, index_t ldx, index_t length, index_t r, real *out,
                  index_t ldo, int add) {
    scale(W, r, c);
    combine(W, pad(r), r, r, X, ldx, length, out, ldo, add);
}

/* (G_A, G_B) = align(grad_A, grad_B) with X = 0. */
static void project(const full_t *f, const pair_t *pair, real c) {
    index_t r = f->r, n = f->n, size = r * pad(r);
    const real *grad_A = widen(pair->grad_A, r * n, f->h_A);
    gram(grad_A, n, r, f->A, f->ldn, r, n, f->K, pad(r), 0);
    choose_x(f->S_A, f->S_B, f->inv_A, f->inv_B, f->K, r, ZERO, f->swap, NULL, f->C, f->work);
    real *W = f->K;
    memcpy(W, f->inv_B, sizeof(real) * size);
    memset(f->G_A, 0, sizeof(real) * r * f->ldn);
    weigh(W, c, grad_A, n, n, r, f->G_A, f->ldn, 0);
    transpose(pair->grad_B, f->m, r, f->h_B, f->ld);
    memcpy(W, f->inv_A, sizeof(real) * size);
    weigh(W, c, f->h_B, f->ld, f->ld, r, f->G_B, f->ld, 0);
    flip(f->C, r);
    weigh(f->C, -c, f->B, f->ld, f->ld, r, f->G_B, f->ld, 1);
}

/* Average a row of g into the moments and put m/(√v + ε) in its place. */
INLINE void direction(real *restrict g, float *restrict mean, float *restrict square, index_t count,
                      const options_t *o, real eps) {
    real b1 = o->beta1, b2 = o->beta2, c1 = 1 - o->beta1, c2 = 1 - o->beta2;
    for (index_t j = 0; j < count; j++) {
        real m = b1 * mean[j] + c1 * g[j], v = b2 * square[j] + c2 * g[j] * g[j];
        mean[j] = m;
        square[j] = v;
        g[j] = m / (sqrt(v) + eps);
    }
}

/* Rows i to i + rows and columns j to j + columns of W: h_A += Bᵀ·h and h_B += (h·Aᵀ)ᵀ. */
static void tile(const full_t *f, const pair_t *pair, index_t i, index_t rows, index_t j,
                 index_t columns, const options_t *o, real eps) {
    real h[TILE_ROWS * TILE_LD] __attribute__((aligned(BYTES)));
    index_t r = f->r, wide = pad(columns);
    combine(f->coefficients, 2 * r, rows, 2 * r, f->G_A + j, f->ldn, wide, h, TILE_LD, 0);
    for (index_t k = 0; k < rows; k++) {
        index_t at = (i + k) * f->n + j;
        direction(h + k * TILE_LD, pair->first_A + at, pair->first_B + at, columns, o, eps);
    }
    combine(f->B + i, f->ld, r, rows, h, TILE_LD, wide, f->h_A + j, f->ldn, i > 0);
    if (!j) {
        gram(f->A, f->ldn, r, h, TILE_LD, rows, wide, f->h_B + i, f->ld, 0);
        return;
    }
    gram(f->A + j, f->ldn, r, h, TILE_LD, rows, wide, f->part, TILE_ROWS, 0);
    for (index_t k = 0; k < r; k++)
        for (index_t l = 0; l < rows; l++) f->h_B[k * f->ld + i + l] += f->part[k * TILE_ROWS + l];
}

/* All of W, tile by tile; the equivalent gradient is s·[B, G_B]·[G_A; A]. */
static void sweep(const full_t *f, const pair_t *pair, const options_t *o, real eps) {
    index_t r = f->r, pieces = (f->n + TILE_COLUMNS - 1) / TILE_COLUMNS;
    index_t each = (f->n + pieces - 1) / pieces;
    each += -each & (4 * WIDTH - 1); /* what combine takes at a time */
    real s = pair->scaling;
    for (index_t i = 0; i < f->m; i += TILE_ROWS) {
        index_t rows = f->m - i < TILE_ROWS ? f->m - i : TILE_ROWS;
        for (index_t j = 0; j < r; j++)
            for (index_t k = 0; k < rows; k++) {
                f->coefficients[k * 2 * r + j] = s * f->B[j * f->ld + i + k];
                f->coefficients[k * 2 * r + r + j] = s * f->G_B[j * f->ld + i + k];
            }
        for (index_t j = 0; j < f->n; j += each)
            tile(f, pair, i, rows, j, f->n - j < each ? f->n - j : each, o, eps);
    }
}

/* Step the factors along align(unit·h_A, unit·h_B). */
static void step(const full_t *f, const pair_t *pair, const options_t *o, real unit, real c) {
    index_t r = f->r, n = f->n, ld = f->ld, ldn = f->ldn;
    real *d_A = f->G_A, *d_B = f->G_B;
    gram(f->h_A, ldn, r, f->A, ldn, r, n, f->K, pad(r), 0);
    scale(f->K, r, unit);
    choose_x(f->S_A, f->S_B, f->inv_A, f->inv_B, f->K, r, o->x, f->swap, f->X, f->C, f->work);
    weigh(f->inv_B, c * unit, f->h_A, ldn, pad(n), r, d_A, ldn, 0);
    if (o->x != ZERO) weigh(f->X, c, f->A, ldn, pad(n), r, d_A, ldn, 1);
    weigh(f->inv_A, c * unit, f->h_B, ld, ld, r, d_B, ld, 0);
    flip(f->C, r);
    weigh(f->C, -c, f->B, ld, ld, r, d_B, ld, 1);
    real keep = sqrt(fmax(0.0, 1 - o->lr * o->weight_decay)), lr = o->lr;
    for (index_t i = 0; i < r; i++)
        for (index_t j = 0; j < n; j++)
            pair->A[i * n + j] = keep * f->A[i * ldn + j] - lr * d_A[i * ldn + j];
    for (index_t i = 0; i < r * ld; i++) d_B[i] = keep * f->B[i] - lr * d_B[i];
    transpose_back(d_B, ld, f->m, r, pair->B);
}

static int full(const pair_t *pair, index_t r, const options_t *o, real *work) {
    full_t f = laid_out(pair, r, work);
    index_t n = f.n, size = r * pad(r);
    memset(f.S_A, 0, sizeof(real) * 7 * size);
    memset(f.A, 0, sizeof(real) * r * f.ldn);
    for (index_t i = 0; i < r; i++)
        for (index_t j = 0; j < n; j++) f.A[i * f.ldn + j] = pair->A[i * n + j];
    transpose(pair->B, f.m, r, f.B, f.ld);
    gram(f.A, f.ldn, r, f.A, f.ldn, r, n, f.S_A, pad(r), 1);
    gram(f.B, f.ld, r, f.B, f.ld, r, f.ld, f.S_B, pad(r), 1);
    if (!inverses(f.S_A, f.S_B, r, o, o->x, f.inv_A, f.inv_B, &f.swap, f.work)) return 0;

    real c = 1 / (pair->scaling * pair->scaling);
    project(&f, pair, c);
    double t = *pair->second_A += 1, root = sqrt(1 - pow(o->beta2, t));
    sweep(&f, pair, o, o->eps * root);
    step(&f, pair, o, pair->scaling * root / (1 - pow(o->beta1, t)), c);
    return 1;
}

void NAME(lorapro_full, REAL)(index_t pairs, index_t r, const pair_t *pair, const options_t *options,
                              unsigned char *done) {
    for_each_pair(pairs, r, pair, options, done, SMALL, SIDES, full);
}
