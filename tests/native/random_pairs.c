/* Steps pairs of random sizes; built with sanitizers by test_native_memory.py, which gives RULE and
 * REAL and includes the rule's file. */
#include <stdio.h>

static float *numbers(index_t count, float size) {
    float *made = malloc(sizeof(float) * count);
    for (index_t i = 0; i < count; i++) made[i] = size * ((float)rand() / RAND_MAX - 0.5f);
    return made;
}

/* The gradients that one dense gradient on W gives. */
static void set_gradients(pair_t *pair, index_t r) {
    index_t m = pair->m, n = pair->n;
    float *G = numbers(m * n, 1);
    for (index_t p = 0; p < r; p++) {
        for (index_t j = 0; j < n; j++) {
            pair->grad_A[p * n + j] = 0;
            for (index_t i = 0; i < m; i++)
                pair->grad_A[p * n + j] += pair->scaling * pair->B[i * r + p] * G[i * n + j];
        }
        for (index_t i = 0; i < m; i++) {
            pair->grad_B[i * r + p] = 0;
            for (index_t j = 0; j < n; j++)
                pair->grad_B[i * r + p] += pair->scaling * G[i * n + j] * pair->A[p * n + j];
        }
    }
    free(G);
}

int main(void) {
    enum { MOST_PAIRS = 3, FIELDS = 10 };
    index_t stepped = 0;
    for (int trial = 0; trial < 150; trial++) {
        index_t r = 1 + rand() % 40, pairs = 1 + rand() % MOST_PAIRS;
        pair_t made[MOST_PAIRS];
        unsigned char done[MOST_PAIRS] = {0};
        for (index_t i = 0; i < pairs; i++) {
            index_t m = r + rand() % 70, n = r + rand() % 70;
            if (trial % 7 == 0) m = 1 + rand() % r; /* B has no full rank: nothing is done */
            index_t whole = WHOLE ? m * n : 0; /* full mode's moments are (m, n) */
            made[i] = (pair_t){
                numbers(r * n, 1), numbers(m * r, 1), numbers(r * n, 1), numbers(m * r, 1),
                numbers(whole ? whole : r * n, 0), numbers(whole ? whole : m * r, 0),
                numbers(whole ? whole : r * n, 0), numbers(whole ? whole : m * r, 0),
                numbers(1, 0), numbers(1, 0), m, n, 2.0,
            };
            if (trial % 5) set_gradients(&made[i], r);
        }
        double limit = sizeof(REAL) == sizeof(float) ? 3e4 : 1e10;
        options_t options = {1e-3, 0.9, 0.999, 1e-8, 0.1, limit, 8, trial % 3, trial % 2};
        NAME(RULE, REAL)(pairs, r, made, &options, done);
        for (index_t i = 0; i < pairs; i++) {
            stepped += done[i];
            float **field = (float **)&made[i];
            for (int k = 0; k < FIELDS; k++) free(field[k]);
        }
    }
    printf("%lld\n", stepped);
    return 0;
}
