/* Gated fusion of one layer on a CPU, forward, in one pass over the base output.

   The arithmetic is that of plain.py: T tokens, N adapters, R packed ranks, C channels. Tiles of
   TOKENS x 2 vectors stay in registers and the first-level cache; the adapters' outputs never
   reach memory. Compiled on the machine it runs on by native.py. */

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include <math.h>
#include <stddef.h>
#include <stdint.h>
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
#define MAX_ROWS 256 /* most packed ranks; native.py checks */
#define LEAST_WORK 200000 /* below it threads cost more than they bring */

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef float unaligned_vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

typedef struct {
    const void *y;
    const float *h, *centred, *mean, *covariance, *strengths;
    const int32_t *offsets;
    const float *base_weight, *base_bias, *coef_weight, *coef_bias, *out_weight;
    void *fused;
    float *scratch;    /* T * (2 + R + 2 N), then items * N when recording */
    double *gate_sums; /* N, or null */
    int64_t tokens, channels, adapters, ranks, covariance_width;
    int64_t y_stride, fused_stride, h_stride;
    int64_t half; /* y and fused are bfloat16 */
    int64_t threads;
    float eps_base, eps_lora;
} arguments;

static inline float read_one(const void *rows, int half, int64_t at) {
    if (!half) return ((const float *)rows)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)rows)[at] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)((bits >> 16) | 0x40); /* NaN */
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16); /* to nearest, ties to even */
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
    ivec mask = (ivec)(x < lower);
    x = (vec)((mask & (ivec)lower) | (~mask & (ivec)x));
    mask = (ivec)(x > upper);
    return (vec)((mask & (ivec)upper) | (~mask & (ivec)x));
#endif
}

#define EACH _Pragma("GCC unroll 4") for (int j = 0; j < SIDE; j++)

/* 1 / (1 + e^-x) in place, to a few units in the last place: e^-x = 2^n 2^f with n whole and
   |f| <= 1/2. SIDE vectors go side by side, since each waits long for its own results. */
static inline void sigmoid_vecs(vec x[SIDE]) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    vec power[SIDE], p[SIDE];
    EACH power[j] = clamp_vec(x[j] * -1.44269504f, -126.0f, 126.0f);
    EACH x[j] = power[j] + magic;
    EACH power[j] = power[j] - (x[j] - magic);
    /* Taylor's series of 2^f, coefficients ln(2)^k / k!; the next term is below 1.2e-7. */
    EACH p[j] = power[j] * 1.54035304e-4f + 1.33335581e-3f;
    EACH p[j] = p[j] * power[j] + 9.61812911e-3f;
    EACH p[j] = p[j] * power[j] + 5.55041087e-2f;
    EACH p[j] = p[j] * power[j] + 2.40226507e-1f;
    EACH p[j] = p[j] * power[j] + 6.93147181e-1f;
    EACH p[j] = p[j] * power[j] + 1.0f;
    EACH p[j] = 1.0f + (vec)((ivec)p[j] + ((ivec)x[j] << 23));
    EACH x[j] = 1.0f / p[j];
}

static inline float sum_vec(vec x) {
    float sum = 0;
    for (int j = 0; j < LANES; j++) sum += x[j];
    return sum;
}

static inline vec load_vec(const void *rows, int half, int64_t at) {
    if (!half) return *(const unaligned_vec *)((const float *)rows + at);
    vec value;
    for (int j = 0; j < LANES; j++) value[j] = read_one(rows, 1, at + j);
    return value;
}

/* Mean and reciprocal deviation of one row of y, in two passes over what the cache holds. */
static void row_statistics(const arguments *a, int64_t t, float *centre, float *scale) {
    const int64_t C = a->channels, row = t * a->y_stride, whole = C - C % (4 * LANES);
    vec sums[4] = {{0}, {0}, {0}, {0}};
    float total, square;
    for (int64_t c = 0; c < whole; c += 4 * LANES)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) sums[v] += load_vec(a->y, a->half, row + c + v * LANES);
    total = sum_vec((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (int64_t c = whole; c < C; c++) total += read_one(a->y, a->half, row + c);
    const float mean = total / (float)C;
    for (int v = 0; v < 4; v++) sums[v] = (vec){0};
    for (int64_t c = 0; c < whole; c += 4 * LANES)
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            const vec d = load_vec(a->y, a->half, row + c + v * LANES) - mean;
            sums[v] += d * d;
        }
    square = sum_vec((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (int64_t c = whole; c < C; c++) {
        const float d = read_one(a->y, a->half, row + c) - mean;
        square += d * d;
    }
    *centre = mean;
    *scale = 1.0f / sqrtf(square / (float)C + a->eps_base);
}

/* Statistics of one token: those of y, and each adapter's h brought to unit variance. */
static void token_statistics(const arguments *a, int64_t t, float *scaled, float *deviations,
                             float *means, float *centre, float *scale) {
    row_statistics(a, t, centre, scale);
    const float *h = a->h + t * a->h_stride;
    for (int64_t i = 0; i < a->adapters; i++) {
        const int64_t start = a->offsets[i], rank = a->offsets[i + 1] - start;
        const float strength = a->strengths[i];
        float variance = 0, output_mean = 0, turned[MAX_ROWS] = {0};
        for (int64_t j = 0; j < rank; j++) { /* the covariance is symmetric: rows are columns */
            const float *line = a->covariance + (start + j) * a->covariance_width;
            const float hidden = h[start + j];
            for (int64_t k = 0; k < rank; k++) turned[k] += line[k] * hidden;
            output_mean += a->mean[start + j] * hidden;
        }
        for (int64_t j = 0; j < rank; j++) variance += turned[j] * h[start + j];
        variance *= strength * strength;
        const float deviation = sqrtf((variance > 0 ? variance : 0) + a->eps_lora);
        deviations[i] = variance == variance ? deviation : variance; /* NaN stays */
        means[i] = output_mean * strength;
        const float factor = strength / deviations[i];
        for (int64_t j = 0; j < rank; j++) scaled[start + j] = h[start + j] * factor;
    }
}

/* One tile of TOKENS x WIDTH; `up` is [ranks, WIDTH], `vectors` [5, WIDTH]. */
static inline void tile(const arguments *a, const float *y, const float *up, const float *vectors,
                        const float *const scaled[], const float *const deviations[],
                        const float *const means[], const float centre[], const float scale[],
                        float *out, int64_t valid, float *gate_sums) {
    vec z[TOKENS][2], total[TOKENS][2];
#define VECTOR(which, v) (*(const unaligned_vec *)(vectors + (which) * WIDTH + (v) * LANES))
    for (int t = 0; t < TOKENS; t++)
        for (int v = 0; v < 2; v++) {
            z[t][v] = (*(const unaligned_vec *)(y + t * WIDTH + v * LANES) - centre[t]) * scale[t];
            total[t][v] = (vec){0};
        }
    for (int64_t i = 0; i < a->adapters; i++) {
        const int64_t start = a->offsets[i], end = a->offsets[i + 1];
        if (end == start) continue;
        vec n[TOKENS][2];
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t++) n[t][0] = n[t][1] = (vec){0};
        const float *s0 = scaled[0], *s1 = scaled[1], *s2 = scaled[2], *s3 = scaled[3];
        for (int64_t k = start; k < end; k++) {
            const vec u0 = *(const unaligned_vec *)(up + k * WIDTH);
            const vec u1 = *(const unaligned_vec *)(up + k * WIDTH + LANES);
            n[0][0] += s0[k] * u0, n[0][1] += s0[k] * u1;
            n[1][0] += s1[k] * u0, n[1][1] += s1[k] * u1;
            n[2][0] += s2[k] * u0, n[2][1] += s2[k] * u1;
            n[3][0] += s3[k] * u0, n[3][1] += s3[k] * u1;
        }
        vec said = (vec){0};
#pragma GCC unroll 2
        for (int t = 0; t < TOKENS; t += SIDE / 2) {
            vec gate[SIDE];
            EACH gate[j] = z[t + j / 2][j % 2] * VECTOR(2, j % 2) + VECTOR(3, j % 2);
            EACH gate[j] = gate[j] * n[t + j / 2][j % 2] + VECTOR(1, j % 2);
            EACH gate[j] += z[t + j / 2][j % 2] * VECTOR(0, j % 2);
            sigmoid_vecs(gate);
            EACH {
                const int k = t + j / 2, v = j % 2;
                total[k][v] += gate[j] * (n[k][v] * deviations[k][i] + means[k][i]);
                if (gate_sums && k < valid) said += gate[j] * VECTOR(4, v);
            }
        }
        if (gate_sums) gate_sums[i] += sum_vec(said);
    }
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
            const vec before = *(const unaligned_vec *)(y + t * WIDTH + v * LANES);
            *(unaligned_vec *)(out + t * WIDTH + v * LANES) = before + total[t][v] * VECTOR(4, v);
        }
}

/* WIDTH numbers, of which the source has `width`; zeros for the rest. */
static inline void copy(float *target, const float *source, int64_t width) {
    if (width == WIDTH)
        memcpy(target, source, sizeof(float) * WIDTH); /* of known size: two moves */
    else
        for (int j = 0; j < WIDTH; j++) target[j] = j < width ? source[j] : 0;
}

/* The constants of WIDTH channels, side by side. */
static void pack(const arguments *a, int64_t c, int64_t width, float *up, float *vectors) {
    const float *all[5] = {a->base_weight, a->base_bias, a->coef_weight, a->coef_bias,
                           a->out_weight};
    for (int v = 0; v < 5; v++) copy(vectors + v * WIDTH, all[v] + c, width);
    for (int64_t k = 0; k < a->ranks; k++)
        copy(up + k * WIDTH, a->centred + k * a->channels + c, width);
}

/* TOKENS tokens of which `valid` exist, and `width` channels from c. */
static void token_block(const arguments *a, int64_t first, int64_t valid, int64_t c, int64_t width,
                        const float *up, const float *vectors, float *gate_sums) {
    const int64_t T = a->tokens, N = a->adapters, R = a->ranks;
    const float *centres = a->scratch, *scales = centres + T, *scaled_rows = scales + T;
    const float *deviation_rows = scaled_rows + T * R, *mean_rows = deviation_rows + T * N;
    const float *scaled[TOKENS], *deviations[TOKENS], *means[TOKENS];
    float centre[TOKENS], scale[TOKENS];
    float y[TOKENS * WIDTH] __attribute__((aligned(64)));
    float out[TOKENS * WIDTH] __attribute__((aligned(64)));
    for (int t = 0; t < TOKENS; t++) {
        const int64_t row = t < valid ? first + t : first; /* repeats are not written */
        const int64_t at = row * a->y_stride + c;
        scaled[t] = scaled_rows + row * R;
        deviations[t] = deviation_rows + row * N;
        means[t] = mean_rows + row * N;
        centre[t] = centres[row];
        scale[t] = scales[row];
        if (width == WIDTH)
            for (int v = 0; v < 2; v++)
                *(unaligned_vec *)(y + t * WIDTH + v * LANES) = load_vec(a->y, a->half, at + v * LANES);
        else
            for (int j = 0; j < WIDTH; j++)
                y[t * WIDTH + j] = j < width ? read_one(a->y, a->half, at + j) : 0;
    }
    tile(a, y, up, vectors, scaled, deviations, means, centre, scale, out, valid, gate_sums);
    for (int64_t t = 0; t < valid; t++) {
        const int64_t at = (first + t) * a->fused_stride + c;
        if (a->half)
            for (int64_t j = 0; j < width; j++)
                ((uint16_t *)a->fused)[at + j] = to_bfloat16(out[t * WIDTH + j]);
        else if (width == WIDTH)
            memcpy((float *)a->fused + at, out + t * WIDTH, sizeof(float) * WIDTH);
        else
            for (int64_t j = 0; j < width; j++) ((float *)a->fused)[at + j] = out[t * WIDTH + j];
    }
}

/* One work item: GROUP tokens and CHUNK channels. The constants of a few channels stay in the
   first-level cache while the tokens pass. */
static void item(const arguments *a, int64_t group, int64_t chunk, float *gate_sums) {
    const int64_t T = a->tokens, C = a->channels;
    const int64_t last_token = (group + 1) * GROUP < T ? (group + 1) * GROUP : T;
    const int64_t last = (chunk + 1) * CHUNK < C ? (chunk + 1) * CHUNK : C;
    float up[MAX_ROWS * WIDTH] __attribute__((aligned(64)));
    float vectors[5 * WIDTH] __attribute__((aligned(64)));
    for (int64_t c = chunk * CHUNK; c < last; c += WIDTH) {
        const int64_t width = last - c < WIDTH ? last - c : WIDTH;
        pack(a, c, width, up, vectors);
        for (int64_t first = group * GROUP; first < last_token; first += TOKENS) {
            const int64_t valid = last_token - first < TOKENS ? last_token - first : TOKENS;
            token_block(a, first, valid, c, width, up, vectors, gate_sums);
        }
    }
}

/* The only entry. */
void autolora_fuse_gated(const arguments *a) {
    const int64_t T = a->tokens, N = a->adapters, R = a->ranks;
    float *centres = a->scratch, *scales = centres + T, *scaled = scales + T;
    float *deviations = scaled + T * R, *means = deviations + T * N, *partial = means + T * N;
    const int64_t groups = (T + GROUP - 1) / GROUP;
    const int64_t chunks = (a->channels + CHUNK - 1) / CHUNK, items = groups * chunks;
    const int64_t work = T * a->channels * (N * 8 + R);
    const int threads = work < LEAST_WORK ? 1 : (int)a->threads;
    if (a->gate_sums) memset(partial, 0, sizeof(float) * (size_t)(items * N));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < T; t++)
            token_statistics(a, t, scaled + t * R, deviations + t * N, means + t * N, centres + t,
                             scales + t);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < items; i++)
            item(a, i / chunks, i % chunks, a->gate_sums ? partial + i * N : 0);
    }
    if (a->gate_sums)
        for (int64_t n = 0; n < N; n++) {
            a->gate_sums[n] = 0;
            for (int64_t i = 0; i < items; i++) a->gate_sums[n] += partial[i * N + n];
        }
}
