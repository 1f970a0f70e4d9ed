/* Fusion of one layer on a CPU, forward, from the layer's input to the fused output: gated, or the
   plain sum.

   The arithmetic of the gate is that of plain.py: T tokens, N adapters, R packed ranks, C channels.
   Tiles of TOKENS x 2 vectors stay in registers and the first-level cache; the adapters' outputs
   never reach memory. Compiled on the machine it runs on by native.py. */

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define TOKENS 4
#define WIDTH (2 * LANES)
#define SIDE 4 /* vectors whose gates are computed side by side: two tokens */
#define CHUNK 128 /* channels of one work item, a multiple of WIDTH */
#define GROUP 64  /* tokens of one work item, a multiple of TOKENS */
#define INPUTS 512 /* inputs of one pass of the down-projection, a multiple of LANES */
#define MAX_ROWS 256 /* most packed ranks; native.py checks */
#define LEAST_WORK 200000 /* below it threads cost more than they bring */

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t bits_vec __attribute__((vector_size(LANES * 4)));
typedef uint16_t half_vec __attribute__((vector_size(LANES * 2)));
typedef float unaligned_vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t unaligned_half __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

/* What stays from call to call; native.py has the same fields in the same order. */
typedef struct {
    const float *down; /* R x inputs; null where a call brings h instead of x */
    const float *up;   /* R x C, centred where there is a gate */
    const float *mean, *covariance, *strengths; /* from here on null for the plain sum */
    const int32_t *offsets;
    const float *base_weight, *base_bias, *coef_weight, *coef_bias, *out_weight;
    int64_t inputs, channels, adapters, ranks, covariance_width;
    float eps_base, eps_lora;
} layer;

typedef struct {
    const layer *of;
    const void *y, *x; /* T x C and T x inputs, or T x R floats */
    void *fused;       /* T x C, may be y */
    int64_t tokens;
    int half; /* y, x and fused are bfloat16 */
    /* Of every token: mean and reciprocal deviation of y; of every adapter of every token: h
       brought to unit variance, the deviation, the mean of the output. */
    float *centres, *scales, *scaled, *deviations, *means;
} call;

static inline float read_one(const void *rows, int half, int64_t at) {
    if (!half) return ((const float *)rows)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)rows)[at] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline vec load_vec(const void *rows, int half, int64_t at) {
    if (!half) return *(const unaligned_vec *)((const float *)rows + at);
    const half_vec stored = *(const unaligned_half *)((const uint16_t *)rows + at);
    return (vec)(__builtin_convertvector(stored, bits_vec) << 16);
}

/* To bfloat16: to nearest, ties to even; NaN stays NaN. */
static inline void store_one(void *rows, int half, int64_t at, float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (!half)
        ((float *)rows)[at] = value;
    else if (value != value)
        ((uint16_t *)rows)[at] = (uint16_t)((bits >> 16) | 0x40);
    else
        ((uint16_t *)rows)[at] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline void store_vec(void *rows, int half, int64_t at, vec value) {
    if (!half) {
        *(unaligned_vec *)((float *)rows + at) = value;
        return;
    }
    const bits_vec bits = (bits_vec)value, nan = (bits_vec)(value != value);
    const bits_vec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bits_vec chosen = (nan & ((bits >> 16) | 0x40)) | (~nan & rounded);
    *(unaligned_half *)((uint16_t *)rows + at) = __builtin_convertvector(chosen, half_vec);
}

/* x within [low, high]; NaN stays NaN. */
static inline vec clamp_vec(vec x, float low, float high) {
#if defined(__AVX512F__)
    return (vec)_mm512_min_ps(_mm512_set1_ps(high),
                              _mm512_max_ps(_mm512_set1_ps(low), (__m512)x));
#elif defined(__AVX2__)
    return (vec)_mm256_min_ps(_mm256_set1_ps(high),
                              _mm256_max_ps(_mm256_set1_ps(low), (__m256)x));
#else
    const vec lower = (vec){0} + low, upper = (vec){0} + high;
    bits_vec mask = (bits_vec)(x < lower);
    x = (vec)((mask & (bits_vec)lower) | (~mask & (bits_vec)x));
    mask = (bits_vec)(x > upper);
    return (vec)((mask & (bits_vec)upper) | (~mask & (bits_vec)x));
#endif
}

static inline float sum_vec(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#elif defined(__AVX2__)
    __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
    return (x[0] + x[1]) + (x[2] + x[3]);
#endif
}

#define EACH _Pragma("GCC unroll 4") for (int j = 0; j < SIDE; j++)
#define MINUS_LOG2_E -1.44269504f

/* 1 / (1 + 2^x) in place, to a few units in the last place: 2^x = 2^n 2^f with n whole and
   |f| <= 1/2. SIDE vectors go side by side, since each waits long for its own results. */
static inline void gate_vecs(vec x[SIDE]) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    vec whole[SIDE], p[SIDE];
    EACH x[j] = clamp_vec(x[j], -126.0f, 126.0f);
    EACH whole[j] = x[j] + magic;
    EACH x[j] = x[j] - (whole[j] - magic);
    /* The polynomial of the smallest relative error, 9.2e-8, with 1 as its constant. */
    EACH p[j] = x[j] * 1.326472755e-3f + 9.671512641e-3f;
    EACH p[j] = p[j] * x[j] + 5.550733742e-2f;
    EACH p[j] = p[j] * x[j] + 2.402224209e-1f;
    EACH p[j] = p[j] * x[j] + 6.931469776e-1f;
    EACH p[j] = p[j] * x[j] + 1.0f;
    EACH p[j] = 1.0f + (vec)((bits_vec)p[j] + ((bits_vec)whole[j] << 23));
    EACH x[j] = 1.0f / p[j];
}

/* Mean and reciprocal deviation of one row of y, in two passes over what the cache holds. */
static void row_statistics(const call *k, int64_t t) {
    const int64_t C = k->of->channels, row = t * C, whole = C - C % (4 * LANES);
    vec sums[4] = {{0}, {0}, {0}, {0}};
    for (int64_t c = 0; c < whole; c += 4 * LANES)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) sums[v] += load_vec(k->y, k->half, row + c + v * LANES);
    float total = sum_vec((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (int64_t c = whole; c < C; c++) total += read_one(k->y, k->half, row + c);
    const float mean = total / (float)C;
    for (int v = 0; v < 4; v++) sums[v] = (vec){0};
    for (int64_t c = 0; c < whole; c += 4 * LANES)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            const vec d = load_vec(k->y, k->half, row + c + v * LANES) - mean;
            sums[v] += d * d;
        }
    float square = sum_vec((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (int64_t c = whole; c < C; c++) {
        const float d = read_one(k->y, k->half, row + c) - mean;
        square += d * d;
    }
    k->centres[t] = mean;
    k->scales[t] = 1.0f / sqrtf(square / (float)C + k->of->eps_base);
}

/* h = x downT of TOKENS tokens, of which `valid` exist. INPUTS inputs at a time, so that the
   tokens' own stay in the first-level cache while the rows of `down` pass. */
static void project(const call *k, int64_t first, int64_t valid, float h[TOKENS][MAX_ROWS]) {
    const int64_t I = k->of->inputs, R = k->of->ranks;
    float widened[TOKENS][INPUTS];
    const float *rows[TOKENS];
    for (int t = 0; t < TOKENS; t++) memset(h[t], 0, sizeof(float) * (size_t)R);
    for (int64_t start = 0; start < I; start += INPUTS) {
        const int64_t size = I - start < INPUTS ? I - start : INPUTS, whole = size - size % LANES;
        for (int t = 0; t < TOKENS; t++) {
            const int64_t at = (first + (t < valid ? t : 0)) * I + start; /* repeats go unused */
            rows[t] = k->half ? widened[t] : (const float *)k->x + at;
            if (k->half)
                for (int64_t j = 0; j < size; j++) widened[t][j] = read_one(k->x, 1, at + j);
        }
        for (int64_t r = 0; r < R; r += 2) {
            const float *d0 = k->of->down + r * I + start, *d1 = r + 1 < R ? d0 + I : d0;
            vec sums[TOKENS][2] = {{{0}}};
            for (int64_t j = 0; j < whole; j += LANES) {
                const vec v0 = *(const unaligned_vec *)(d0 + j), v1 = *(const unaligned_vec *)(d1 + j);
#pragma GCC unroll 4
                for (int t = 0; t < TOKENS; t++) {
                    const vec input = *(const unaligned_vec *)(rows[t] + j);
                    sums[t][0] += input * v0, sums[t][1] += input * v1;
                }
            }
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; t++) {
                float s0 = sum_vec(sums[t][0]), s1 = sum_vec(sums[t][1]);
                for (int64_t j = whole; j < size; j++)
                    s0 += rows[t][j] * d0[j], s1 += rows[t][j] * d1[j];
                h[t][r] += s0;
                h[t][r + 1] += s1; /* of no row where R is odd */
            }
        }
    }
}

/* Brings each adapter's h of one token to unit variance of its output. */
static void adapter_statistics(const call *k, int64_t t, const float *h) {
    const layer *l = k->of;
    float *scaled = k->scaled + t * l->ranks;
    for (int64_t i = 0; i < l->adapters; i++) {
        const int64_t start = l->offsets[i], rank = l->offsets[i + 1] - start;
        const float strength = l->strengths[i];
        float variance = 0, output_mean = 0, turned[MAX_ROWS];
        memset(turned, 0, sizeof(float) * (size_t)rank);
        for (int64_t j = 0; j < rank; j++) { /* the covariance is symmetric: rows are columns */
            const float *line = l->covariance + (start + j) * l->covariance_width;
            const float hidden = h[start + j];
            for (int64_t r = 0; r < rank; r++) turned[r] += line[r] * hidden;
            output_mean += l->mean[start + j] * hidden;
        }
        for (int64_t j = 0; j < rank; j++) variance += turned[j] * h[start + j];
        variance *= strength * strength;
        /* Rounding can leave a variance of about zero below it; NaN stays. */
        const float deviation = sqrtf((variance < 0 ? 0 : variance) + l->eps_lora);
        const float factor = strength / deviation;
        k->deviations[t * l->adapters + i] = deviation;
        k->means[t * l->adapters + i] = output_mean * strength;
        for (int64_t j = 0; j < rank; j++) scaled[start + j] = h[start + j] * factor;
    }
}

/* What the tiles need of TOKENS tokens. */
static void prepare(const call *k, int64_t first) {
    const layer *l = k->of;
    const int64_t R = l->ranks, left = k->tokens - first, valid = left < TOKENS ? left : TOKENS;
    float h[TOKENS][MAX_ROWS];
    if (l->down) project(k, first, valid, h);
    for (int64_t t = 0; t < valid; t++) {
        const float *hidden = l->down ? h[t] : (const float *)k->x + (first + t) * R;
        if (l->base_weight) {
            row_statistics(k, first + t);
            adapter_statistics(k, first + t, hidden);
        } else {
            memcpy(k->scaled + (first + t) * R, hidden, sizeof(float) * (size_t)R);
        }
    }
}

/* The constants of WIDTH channels. */
typedef struct {
    const float *up; /* ranks x WIDTH */
    int64_t stride;  /* from one rank to the next */
    float base_weight[WIDTH], base_bias[WIDTH], coef_weight[WIDTH], coef_bias[WIDTH];
    float out_weight[WIDTH];
} columns;

#define AT(array, v) (*(const unaligned_vec *)((array) + (v) * LANES))

/* sum += scaled[start:end] up[start:end] of TOKENS tokens. */
static inline __attribute__((always_inline)) void multiply(
    const call *k, const columns *cols, const int64_t row[TOKENS], int64_t start, int64_t end,
    vec sum[TOKENS][2]) {
    const int64_t R = k->of->ranks, stride = cols->stride;
    const float *s0 = k->scaled + row[0] * R, *s1 = k->scaled + row[1] * R;
    const float *s2 = k->scaled + row[2] * R, *s3 = k->scaled + row[3] * R;
    const float *up = cols->up + start * stride;
    for (int64_t r = start; r < end; r++, up += stride) {
        const vec u0 = AT(up, 0), u1 = AT(up, 1);
        sum[0][0] += s0[r] * u0, sum[0][1] += s0[r] * u1;
        sum[1][0] += s1[r] * u0, sum[1][1] += s1[r] * u1;
        sum[2][0] += s2[r] * u0, sum[2][1] += s2[r] * u1;
        sum[3][0] += s3[r] * u0, sum[3][1] += s3[r] * u1;
    }
}

/* One tile of TOKENS x WIDTH of the plain sum. */
static void sum_tile(const call *k, const columns *cols, const int64_t row[TOKENS],
                     const float y[TOKENS][WIDTH], float out[TOKENS][WIDTH]) {
    vec sum[TOKENS][2];
    for (int t = 0; t < TOKENS; t++)
        for (int v = 0; v < 2; v++) sum[t][v] = AT(y[t], v);
    multiply(k, cols, row, 0, k->of->ranks, sum);
    for (int t = 0; t < TOKENS; t++)
        for (int v = 0; v < 2; v++) *(unaligned_vec *)(out[t] + v * LANES) = sum[t][v];
}

/* One tile of TOKENS x WIDTH through the gate. `row` has each token's place in the statistics;
   only the first `valid` tokens count for the sums of the gates, which are left out where null. */
static inline __attribute__((always_inline)) void gated_tile(
    const call *k, const columns *cols, const int64_t row[TOKENS], int64_t valid,
    const float y[TOKENS][WIDTH], float out[TOKENS][WIDTH], float *gate_sums) {
    const layer *l = k->of;
    const int64_t N = l->adapters;
    vec base[TOKENS][2], coef[TOKENS][2], total[TOKENS][2];
    for (int t = 0; t < TOKENS; t++)
        for (int v = 0; v < 2; v++) {
            const vec z = (AT(y[t], v) - k->centres[row[t]]) * k->scales[row[t]];
            base[t][v] = z * AT(cols->base_weight, v) + AT(cols->base_bias, v);
            coef[t][v] = z * AT(cols->coef_weight, v) + AT(cols->coef_bias, v);
            total[t][v] = (vec){0};
        }
    for (int64_t i = 0; i < N; i++) {
        const int64_t start = l->offsets[i], end = l->offsets[i + 1];
        if (end == start) continue;
        vec n[TOKENS][2], said = (vec){0};
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t++) n[t][0] = n[t][1] = (vec){0};
        multiply(k, cols, row, start, end, n);
#pragma GCC unroll 2
        for (int t = 0; t < TOKENS; t += SIDE / 2) {
            vec gate[SIDE];
            EACH gate[j] = n[t + j / 2][j % 2] * coef[t + j / 2][j % 2] + base[t + j / 2][j % 2];
            gate_vecs(gate);
            EACH {
                const int u = t + j / 2, v = j % 2;
                const float deviation = k->deviations[row[u] * N + i];
                total[u][v] += gate[j] * (n[u][v] * deviation + k->means[row[u] * N + i]);
                if (gate_sums && u < valid) said += gate[j] * AT(cols->out_weight, v);
            }
        }
        if (gate_sums) gate_sums[i] += sum_vec(said);
    }
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++)
            *(unaligned_vec *)(out[t] + v * LANES) =
                AT(y[t], v) + total[t][v] * AT(cols->out_weight, v);
}

/* TOKENS tokens of which `valid` exist, and `width` channels from c. */
static void token_block(const call *k, const columns *cols, int64_t first, int64_t valid,
                        int64_t c, int64_t width, float *gate_sums) {
    const int64_t C = k->of->channels;
    float y[TOKENS][WIDTH] __attribute__((aligned(64)));
    float out[TOKENS][WIDTH] __attribute__((aligned(64)));
    int64_t row[TOKENS];
    for (int t = 0; t < TOKENS; t++) {
        row[t] = t < valid ? first + t : first; /* repeats are not written */
        const int64_t at = row[t] * C + c;
        if (width == WIDTH)
            for (int v = 0; v < 2; v++)
                *(unaligned_vec *)(y[t] + v * LANES) = load_vec(k->y, k->half, at + v * LANES);
        else
            for (int j = 0; j < WIDTH; j++) y[t][j] = j < width ? read_one(k->y, k->half, at + j) : 0;
    }
    if (!k->of->base_weight)
        sum_tile(k, cols, row, y, out);
    else if (gate_sums)
        gated_tile(k, cols, row, valid, y, out, gate_sums);
    else
        gated_tile(k, cols, row, valid, y, out, 0);
    for (int64_t t = 0; t < valid; t++) {
        const int64_t at = (first + t) * C + c;
        if (width == WIDTH)
            for (int v = 0; v < 2; v++) store_vec(k->fused, k->half, at + v * LANES, AT(out[t], v));
        else
            for (int j = 0; j < width; j++) store_one(k->fused, k->half, at + j, out[t][j]);
    }
}

/* The constants of `width` channels from c. The up-projections are read where they are unless
   they are used more than once (a stride as long as a page spoils the cache) or ragged. The gate's
   argument is turned so that it goes into 1 / (1 + 2^x). */
static void gather(const layer *l, int64_t c, int64_t width, int again, float *up, columns *cols) {
    for (int64_t j = 0; l->base_weight && j < WIDTH; j++) {
        const int there = j < width;
        cols->base_weight[j] = there ? MINUS_LOG2_E * l->base_weight[c + j] : 0;
        cols->base_bias[j] = there ? MINUS_LOG2_E * l->base_bias[c + j] : 0;
        cols->coef_weight[j] = there ? MINUS_LOG2_E * l->coef_weight[c + j] : 0;
        cols->coef_bias[j] = there ? MINUS_LOG2_E * l->coef_bias[c + j] : 0;
        cols->out_weight[j] = there ? l->out_weight[c + j] : 0;
    }
    cols->up = l->up + c, cols->stride = l->channels;
    if (!again && width == WIDTH) return;
    cols->up = up, cols->stride = WIDTH;
    for (int64_t r = 0; r < l->ranks; r++) {
        const float *source = l->up + r * l->channels + c;
        if (width == WIDTH)
            memcpy(up + r * WIDTH, source, sizeof(float) * WIDTH); /* of known size: two moves */
        else
            for (int j = 0; j < WIDTH; j++) up[r * WIDTH + j] = j < width ? source[j] : 0;
    }
}

/* One work item: GROUP tokens and CHUNK channels. The constants of a few channels stay in the
   first-level cache while the tokens pass. */
static void item(const call *k, int64_t group, int64_t chunk, float *gate_sums) {
    const int64_t T = k->tokens, C = k->of->channels, start = group * GROUP;
    const int64_t end = start + GROUP < T ? start + GROUP : T;
    const int64_t last = (chunk + 1) * CHUNK < C ? (chunk + 1) * CHUNK : C;
    float up[MAX_ROWS * WIDTH] __attribute__((aligned(64)));
    columns cols;
    for (int64_t c = chunk * CHUNK; c < last; c += WIDTH) {
        const int64_t width = last - c < WIDTH ? last - c : WIDTH;
        gather(k->of, c, width, end - start > TOKENS, up, &cols);
        for (int64_t first = start; first < end; first += TOKENS) {
            const int64_t valid = end - first < TOKENS ? end - first : TOKENS;
            token_block(k, &cols, first, valid, c, width, gate_sums);
        }
    }
}

/* The only entry. `gate_sums` is [N] or null. Returns 0, or 1 without memory for the statistics. */
int autolora_fuse(const layer *l, const void *y, const void *x, void *fused,
                        double *gate_sums, int64_t tokens, int half, int threads) {
    const int64_t T = tokens, N = l->adapters, R = l->ranks;
    const int64_t groups = (T + GROUP - 1) / GROUP;
    const int64_t chunks = (l->channels + CHUNK - 1) / CHUNK, items = groups * chunks;
    const int64_t partials = gate_sums ? items * N : 0;
    float *memory = malloc(sizeof(float) * (size_t)(T * (2 + R + 2 * N) + partials));
    if (!memory) return 1;
    call k = {.of = l, .y = y, .x = x, .fused = fused, .tokens = T, .half = half, .centres = memory};
    k.scales = k.centres + T, k.scaled = k.scales + T;
    k.deviations = k.scaled + T * R, k.means = k.deviations + T * N;
    float *partial = k.means + T * N;
    memset(partial, 0, sizeof(float) * (size_t)partials);
    const int64_t work = T * (l->channels * (N * 8 + R) + (l->down ? l->inputs * R : 0));
    if (work < LEAST_WORK) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < T; t += TOKENS) prepare(&k, t);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < items; i++)
            item(&k, i / chunks, i % chunks, gate_sums ? partial + i * N : 0);
    }
    for (int64_t n = 0; gate_sums && n < N; n++) {
        gate_sums[n] = 0;
        for (int64_t i = 0; i < items; i++) gate_sums[n] += partial[i * N + n];
    }
    free(memory);
    return 0;
}
