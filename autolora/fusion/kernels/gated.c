/* Fusion of one layer on a CPU, forward, from the layer's input to the fused output: gated, or the
   plain sum.

   The arithmetic of the gate is that of plain.py: T tokens, N adapters, C channels, I inputs, R
   packed ranks, each adapter's rounded up to a multiple of PAD. Adapters are read where they are,
   in the type they are kept in, and brought into the order of the products while the layer is
   computed. Tiles of TOKENS x 2 vectors stay in registers and the first-level cache; the adapters'
   outputs never reach memory. Layers in bfloat16 multiply pairs of bfloat16 numbers where the processor
   does. Compiled on the machine it runs on by c_library.py. */

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include <math.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define WIDE 1
#pragma GCC optimize("no-schedule-insns") /* which helps where registers are few */
#define LANES 16
#define TOKENS 8      /* of a tile */
#define DOWN_TOKENS 8 /* of a tile of the down-projection */
#define DOWN_VECS 3
#else
#define WIDE 0
#define TOKENS 4
#define DOWN_TOKENS 4
#define DOWN_VECS 2
#if defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#endif
#if WIDE && defined(__AVX512BF16__)
#define PAIRS 1 /* products of pairs of bfloat16 numbers */
#else
#define PAIRS 0
#endif
#define WIDTH (2 * LANES)
#define PAD 16          /* a multiple of every LANES */
#define SIDE 4          /* vectors whose gates are computed side by side */
#define CHUNK 128       /* channels of one work item, a multiple of WIDTH */
#define GROUP 256       /* tokens of one work item, a multiple of TOKENS */
#define DOWN_GROUP 64   /* tokens of one work item of the down-projection */
#define INPUTS 512      /* inputs of one pass of the down-projection, a multiple of 32 */
#define LEAST_WORK 200000 /* below it threads cost more than they bring */

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t int_vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t bits_vec __attribute__((vector_size(LANES * 4)));
typedef uint16_t half_vec __attribute__((vector_size(LANES * 2)));
typedef float unaligned_vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t unaligned_half __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32, BFLOAT16, FLOAT16 };

/* What stays from call to call; native.py has the same fields in the same order. */
typedef struct {
    const void *down; /* rank x I; null where a call brings h instead of x */
    const void *up;   /* C x rank; or rank x C, float32, without its means, where `centred` */
    const float *mean, *covariance; /* null for the plain sum */
    int64_t rank, covariance_width;
    int32_t down_type, up_type, centred;
    float strength;
} adapter;

typedef struct {
    const adapter *adapters;
    const float *base_weight, *base_bias, *coef_weight, *coef_bias, *out_weight; /* or null */
    float *room;    /* for packed factors that stay from call to call, or null */
    int64_t *state; /* of the room: 0 before, 1 floats, 2 pairs */
    int64_t inputs, channels, count;
    float eps_base, eps_lora;
} layer;

typedef struct {
    const layer *of;
    const void *y, *x; /* T x C and T x I, or T x all ranks as floats */
    void *fused;       /* T x C, may be y */
    int64_t tokens, ranks;
    int half;   /* y, x and fused are bfloat16 */
    int paired; /* products are of pairs of bfloat16 numbers */
    int64_t *starts;  /* of each adapter's packed ranks, N + 1 */
    int64_t *squares; /* of each adapter's covariance in `covariance` */
    float *down;      /* I x R, or I/2 x R pairs */
    float *mean, *covariance; /* R, and rank x rank of each adapter, padded */
    /* Of every token: mean and reciprocal deviation of y; h, later brought to unit variance of the
       output. Of every adapter of every token: what B h must lose to be the normalised output n;
       n deviations + means is the output. */
    float *centres, *scales, *hidden, *shifts, *deviations, *means;
    float *all_ups; /* of all channels, WIDTH at a time, where the layer has room; or null */
    float *partial, *ups; /* room for one work item's up-projections per thread */
} call;

INLINE float read_one(const void *rows, int half, int64_t at) {
    if (!half) return ((const float *)rows)[at];
    uint32_t bits = (uint32_t)((const uint16_t *)rows)[at] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE vec load_vec(const void *rows, int half, int64_t at) {
    if (!half) return *(const unaligned_vec *)((const float *)rows + at);
    const half_vec stored = *(const unaligned_half *)((const uint16_t *)rows + at);
    return (vec)(__builtin_convertvector(stored, bits_vec) << 16);
}

/* To bfloat16: to nearest, ties to even; NaN stays NaN. */
INLINE void store_one(void *rows, int half, int64_t at, float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (!half)
        ((float *)rows)[at] = value;
    else if (value != value)
        ((uint16_t *)rows)[at] = (uint16_t)((bits >> 16) | 0x40);
    else
        ((uint16_t *)rows)[at] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE void store_vec(void *rows, int half, int64_t at, vec value) {
    if (!half) {
        *(unaligned_vec *)((float *)rows + at) = value;
        return;
    }
#if PAIRS
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)value);
    _mm256_storeu_si256((__m256i *)((uint16_t *)rows + at), rounded);
#else
    const bits_vec bits = (bits_vec)value, nan = (bits_vec)(value != value);
    const bits_vec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bits_vec chosen = (nan & ((bits >> 16) | 0x40)) | (~nan & rounded);
    *(unaligned_half *)((uint16_t *)rows + at) = __builtin_convertvector(chosen, half_vec);
#endif
}

#if !WIDE
/* x within [low, high]; NaN stays NaN. */
INLINE vec clamp_vec(vec x, float low, float high) {
#if defined(__AVX2__)
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
#endif

INLINE float sum_vec(vec x) {
#if WIDE
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

/* 1 / (1 + 2^x) in place, to a few units in the last place, or to a few of bfloat16 where `half`:
   2^x = 2^n 2^f with n whole. SIDE vectors go side by side, since each waits long for its own
   results. The polynomials are those of the smallest relative error. */
INLINE void gate_vecs(vec x[SIDE], int half) {
    vec p[SIDE];
#if WIDE
    vec f[SIDE]; /* in [0, 1) */
    if (!half) /* Newton's step must not meet infinity; NaN stays NaN */
        EACH x[j] = (vec)_mm512_min_ps(_mm512_set1_ps(126.0f), (__m512)x[j]);
    EACH f[j] = x[j] - (vec)_mm512_roundscale_ps((__m512)x[j], _MM_FROUND_TO_NEG_INF);
    if (half) { /* 7.5e-5 */
        EACH p[j] = f[j] * 7.802452307e-2f + 2.260671678e-1f;
        EACH p[j] = p[j] * f[j] + 6.958335289e-1f;
        EACH p[j] = p[j] * f[j] + 9.999252205e-1f;
    } else { /* 7.5e-8 */
        EACH p[j] = f[j] * 1.877576680e-3f + 8.989340283e-3f;
        EACH p[j] = p[j] * f[j] + 5.582631767e-2f;
        EACH p[j] = p[j] * f[j] + 2.401536173e-1f;
        EACH p[j] = p[j] * f[j] + 6.931530731e-1f;
        EACH p[j] = p[j] * f[j] + 9.999999251e-1f;
    }
    EACH p[j] = 1.0f + (vec)_mm512_scalef_ps((__m512)p[j], (__m512)x[j]);
    EACH x[j] = (vec)_mm512_rcp14_ps((__m512)p[j]);
    if (!half) EACH x[j] = x[j] + x[j] * (1.0f - p[j] * x[j]); /* Newton's step */
#else
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    vec whole[SIDE];
    (void)half;
    EACH x[j] = clamp_vec(x[j], -126.0f, 126.0f);
    EACH whole[j] = x[j] + magic;
    EACH x[j] = x[j] - (whole[j] - magic);
    EACH p[j] = x[j] * 1.326472755e-3f + 9.671512641e-3f; /* 9.2e-8, with 1 as its constant */
    EACH p[j] = p[j] * x[j] + 5.550733742e-2f;
    EACH p[j] = p[j] * x[j] + 2.402224209e-1f;
    EACH p[j] = p[j] * x[j] + 6.931469776e-1f;
    EACH p[j] = p[j] * x[j] + 1.0f;
    EACH p[j] = 1.0f + (vec)((bits_vec)p[j] + ((bits_vec)whole[j] << 23));
    EACH x[j] = 1.0f / p[j];
#endif
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

/* Numbers of any type as floats. */
INLINE vec widen_halves(bits_vec bits) { /* float16 */
    const bits_vec magnitude = bits & 0x7fff;
    const bits_vec normal = (magnitude << 13) + (112u << 23);
    const vec tiny = __builtin_convertvector((int_vec)magnitude, vec) * 0x1p-24f;
    const bits_vec small = (bits_vec)(magnitude < 0x400), large = (bits_vec)(magnitude >= 0x7c00);
    const bits_vec number = (small & (bits_vec)tiny) | (~small & normal);
    return (vec)(number | (large & 0x7f800000) | ((bits & 0x8000) << 16));
}

INLINE float read_number(const void *numbers, int type, int64_t at) {
    if (type == FLOAT16) return widen_halves((bits_vec){((const uint16_t *)numbers)[at]})[0];
    return read_one(numbers, type == BFLOAT16, at);
}

/* Columns `at` to `at + count` of a row: `count` floats, or count/2 pairs, PAD of them at most and
   zero beyond. The row has as many numbers as are `there`. */
INLINE void load_row(const void *row, int type, int64_t at, int64_t there, int paired,
                     uint32_t out[PAD]) {
    const int64_t left = there - at, most = paired ? 2 * PAD : PAD;
    const int64_t count = left < 0 ? 0 : left < most ? left : most;
#if WIDE
    const uint32_t mask = count ? 0xffffffffu >> (32 - count) : 0;
    if (paired && type == BFLOAT16) {
        _mm512_storeu_si512(out, _mm512_maskz_loadu_epi16(mask, (const uint16_t *)row + at));
        return;
    }
    __m512 part[2];
    for (int v = 0; v <= paired; v++) {
        const __mmask16 some = (__mmask16)(mask >> 16 * v);
        const int64_t from = at + 16 * v;
        if (type == FLOAT32)
            part[v] = _mm512_maskz_loadu_ps(some, (const float *)row + from);
        else {
            const __m256i halves = _mm256_maskz_loadu_epi16(some, (const uint16_t *)row + from);
            const __m512i shifted = _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
            part[v] = type == FLOAT16 ? _mm512_cvtph_ps(halves) : (__m512)shifted;
        }
    }
#if PAIRS
    if (paired) part[0] = (__m512)_mm512_cvtne2ps_pbh(part[1], part[0]);
#endif
    _mm512_storeu_ps(out, part[0]);
#else
    float numbers[PAD] = {0};
    for (int64_t j = 0; j < count; j++) numbers[j] = read_number(row, type, at + j);
    memcpy(out, numbers, sizeof numbers);
#endif
}

/* A block of PAD rows, PAD floats or pairs each, turned: out[j * stride + i] = row i, column j. */
INLINE void turn(uint32_t rows[PAD][PAD], uint32_t *out, int64_t stride, int64_t columns) {
#if WIDE
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(rows[i]);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + 2 + j]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) { /* a[4 g + i]: columns i, i + 4, ... of rows 4 g to 4 g + 3 */
        b[i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88);
        b[4 + i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
        b[8 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
        b[12 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88);
        a[8 + i] = _mm512_shuffle_i32x4(b[i], b[8 + i], 0xdd);
        a[4 + i] = _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0x88);
        a[12 + i] = _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0xdd);
    }
    for (int j = 0; j < 16; j++)
        if (j < columns) _mm512_storeu_si512(out + j * stride, a[j]);
#else
    for (int64_t j = 0; j < columns; j++)
        for (int i = 0; i < PAD; i++) out[j * stride + i] = rows[i][j];
#endif
}

/* The down-projections of PAD inputs, or of PAD pairs of inputs, ranks side by side. */
static void pack_down(const call *k, int64_t block) {
    const layer *l = k->of;
    const int64_t unit = k->paired ? 2 : 1, all = (l->inputs + unit - 1) / unit;
    const int64_t first = block * PAD, columns = all - first < PAD ? all - first : PAD;
    uint32_t rows[PAD][PAD];
    for (int64_t i = 0; i < l->count; i++) {
        const adapter *a = l->adapters + i;
        const int64_t size = a->down_type == FLOAT32 ? 4 : 2;
        for (int64_t r = 0; r < k->starts[i + 1] - k->starts[i]; r += PAD) {
            for (int64_t j = 0; j < PAD; j++)
                if (r + j < a->rank)
                    load_row((const char *)a->down + (r + j) * l->inputs * size, a->down_type,
                             first * unit, l->inputs, k->paired, rows[j]);
                else
                    memset(rows[j], 0, sizeof rows[j]);
            uint32_t *out = (uint32_t *)k->down + first * k->ranks + k->starts[i] + r;
            turn(rows, out, k->ranks, columns);
        }
    }
}

/* The up-projections of `width` channels from c, channels side by side. */
static void pack_up(const call *k, int64_t c, int64_t width, float *up) {
    const layer *l = k->of;
    const int64_t unit = k->paired ? 2 : 1;
    uint32_t rows[PAD][PAD];
    for (int64_t i = 0; i < l->count; i++) {
        const adapter *a = l->adapters + i;
        uint32_t *target = (uint32_t *)up + k->starts[i] / unit * WIDTH;
        if (a->centred) {
            for (int64_t r = 0; r < a->rank; r++) {
                const float *source = (const float *)a->up + r * l->channels + c;
                float *row = (float *)target + r * WIDTH;
                if (width == WIDTH)
                    memcpy(row, source, sizeof(float) * WIDTH); /* of known size: two moves */
                else
                    for (int j = 0; j < WIDTH; j++) row[j] = j < width ? source[j] : 0;
            }
            continue;
        }
        const int64_t size = a->up_type == FLOAT32 ? 4 : 2;
        for (int64_t r = 0; r < a->rank; r += PAD * unit)
            for (int64_t side = 0; side < WIDTH; side += PAD) {
                for (int64_t j = 0; j < PAD; j++)
                    if (side + j < width)
                        load_row((const char *)a->up + (c + side + j) * a->rank * size, a->up_type,
                                 r, a->rank, k->paired, rows[j]);
                    else
                        memset(rows[j], 0, sizeof rows[j]);
                const int64_t left = (a->rank - r + unit - 1) / unit;
                turn(rows, target + r / unit * WIDTH + side, WIDTH, left < PAD ? left : PAD);
            }
    }
}

/* Means and covariances with zeros up to whole vectors. */
static void pack_statistics(const call *k, int64_t i) {
    const adapter *a = k->of->adapters + i;
    const int64_t padded = k->starts[i + 1] - k->starts[i];
    float *mean = k->mean + k->starts[i], *square = k->covariance + k->squares[i];
    memset(mean, 0, sizeof(float) * (size_t)padded);
    memset(square, 0, sizeof(float) * (size_t)(padded * padded));
    memcpy(mean, a->mean, sizeof(float) * (size_t)a->rank);
    for (int64_t r = 0; r < a->rank; r++)
        memcpy(square + r * padded, a->covariance + r * a->covariance_width,
               sizeof(float) * (size_t)a->rank);
}

#define AT(array, v) (*(const unaligned_vec *)((array) + (v) * LANES))

/* h += x downT of DOWN_TOKENS tokens, `size` inputs (or pairs of inputs) and `vecs` vectors of
   ranks; of the tokens, `valid` exist. */
INLINE void project_tile(const void *const rows[DOWN_TOKENS], const float *down, int64_t stride,
                         int64_t size, float *h, int64_t valid, int vecs, int paired) {
    vec sums[DOWN_TOKENS][DOWN_VECS];
#pragma GCC unroll 8
    for (int t = 0; t < DOWN_TOKENS; t++)
#pragma GCC unroll 3
        for (int v = 0; v < vecs; v++) sums[t][v] = AT(h + (t < valid ? t : 0) * stride, v);
    for (int64_t j = 0; j < size; j++, down += stride) {
        vec a[DOWN_VECS];
#pragma GCC unroll 3
        for (int v = 0; v < vecs; v++) a[v] = AT(down, v);
#pragma GCC unroll 8
        for (int t = 0; t < DOWN_TOKENS; t++) {
#if PAIRS
            if (paired) {
                int32_t pair;
                memcpy(&pair, (const char *)rows[t] + 4 * j, 4);
#pragma GCC unroll 3
                for (int v = 0; v < vecs; v++)
                    sums[t][v] = (vec)_mm512_dpbf16_ps(
                        (__m512)sums[t][v], (__m512bh)_mm512_set1_epi32(pair), (__m512bh)a[v]);
                continue;
            }
#endif
            const float input = ((const float *)rows[t])[j];
#pragma GCC unroll 3
            for (int v = 0; v < vecs; v++) sums[t][v] += input * a[v];
        }
    }
    (void)paired;
#pragma GCC unroll 8
    for (int t = 0; t < DOWN_TOKENS; t++)
        if (t < valid)
#pragma GCC unroll 3
            for (int v = 0; v < vecs; v++)
                *(unaligned_vec *)(h + t * stride + v * LANES) = sums[t][v];
}

INLINE void project_vecs(const void *const rows[DOWN_TOKENS], const float *down, int64_t stride,
                         int64_t size, float *h, int64_t valid, int64_t vecs, int paired) {
    if (DOWN_VECS >= 3 && vecs >= 3)
        project_tile(rows, down, stride, size, h, valid, 3 < DOWN_VECS ? 3 : DOWN_VECS, paired);
    else if (vecs >= 2)
        project_tile(rows, down, stride, size, h, valid, 2, paired);
    else
        project_tile(rows, down, stride, size, h, valid, 1, paired);
}

/* h = x downT of the tokens from `first` to `end`. INPUTS inputs at a time, so that their part of
   the down-projections stays in the cache while the tokens pass. */
static void project(const call *k, int64_t first, int64_t end) {
    const int64_t I = k->of->inputs, R = k->ranks;
    const int unit = k->paired ? 2 : 1, narrow = k->half && !k->paired;
    float widened[DOWN_TOKENS][INPUTS];
    uint32_t odd[DOWN_TOKENS]; /* the last input, where it has no other beside it */
    memset(k->hidden + first * R, 0, sizeof(float) * (size_t)((end - first) * R));
    for (int64_t start = 0; start < I; start += INPUTS) {
        const int64_t size = I - start < INPUTS ? I - start : INPUTS;
        for (int64_t t = first; t < end; t += DOWN_TOKENS) {
            const int64_t valid = end - t < DOWN_TOKENS ? end - t : DOWN_TOKENS;
            const void *rows[DOWN_TOKENS], *odds[DOWN_TOKENS];
            for (int i = 0; i < DOWN_TOKENS; i++) {
                const int64_t at = (t + (i < valid ? i : 0)) * I + start; /* repeats go unused */
                rows[i] = k->half ? (const void *)((const uint16_t *)k->x + at)
                                  : (const void *)((const float *)k->x + at);
                odds[i] = odd + i;
                if (k->paired) odd[i] = ((const uint16_t *)k->x)[at + size - 1];
                if (!narrow) continue;
                for (int64_t j = 0; j < size; j++) widened[i][j] = read_one(k->x, 1, at + j);
                rows[i] = widened[i];
            }
            for (int64_t v = 0; v < R / LANES; v += DOWN_VECS) {
                const float *down = k->down + start / unit * R + v * LANES;
                float *h = k->hidden + t * R + v * LANES;
                const int64_t vecs = R / LANES - v;
                if (!k->paired) {
                    project_vecs(rows, down, R, size, h, valid, vecs, 0);
                    continue;
                }
                project_vecs(rows, down, R, size / 2, h, valid, vecs, 1);
                if (size % 2) project_vecs(odds, down + size / 2 * R, R, 1, h, valid, vecs, 1);
            }
        }
    }
}

/* h of TOKENS tokens where a call brings it, with zeros between the adapters. */
static void take_hidden(const call *k, int64_t first, int64_t end) {
    const layer *l = k->of;
    memset(k->hidden + first * k->ranks, 0, sizeof(float) * (size_t)((end - first) * k->ranks));
    for (int64_t t = first; t < end; t++) {
        const float *source = (const float *)k->x + t * l->inputs;
        for (int64_t i = 0; i < l->count; source += l->adapters[i++].rank)
            memcpy(k->hidden + t * k->ranks + k->starts[i], source,
                   sizeof(float) * (size_t)l->adapters[i].rank);
    }
}

#define FEW 4 /* tokens whose statistics are computed side by side */

/* What the gate needs of one adapter's h, of FEW tokens of which `valid` exist. */
static void adapter_statistics(const call *k, int64_t i, int64_t first, int64_t valid) {
    const layer *l = k->of;
    const adapter *a = l->adapters + i;
    const int64_t start = k->starts[i], padded = k->starts[i + 1] - start;
    const float *square = k->covariance + k->squares[i], *h[FEW];
    vec variance[FEW], mean[FEW];
    for (int t = 0; t < FEW; t++) {
        h[t] = k->hidden + (first + (t < valid ? t : 0)) * k->ranks + start;
        variance[t] = mean[t] = (vec){0};
    }
    for (int64_t c = 0; c < padded; c += LANES) {
        vec turned[FEW];
        for (int t = 0; t < FEW; t++) turned[t] = (vec){0};
        for (int64_t r = 0; r < a->rank; r++) { /* symmetric: rows are columns */
            const vec line = *(const unaligned_vec *)(square + r * padded + c);
#pragma GCC unroll 4
            for (int t = 0; t < FEW; t++) turned[t] += h[t][r] * line;
        }
        for (int t = 0; t < FEW; t++) {
            variance[t] += turned[t] * AT(h[t] + c, 0);
            mean[t] += *(const unaligned_vec *)(k->mean + start + c) * AT(h[t] + c, 0);
        }
    }
    for (int t = 0; t < valid; t++) {
        const float square_sum = sum_vec(variance[t]) * a->strength * a->strength;
        const float output_mean = sum_vec(mean[t]) * a->strength;
        /* Rounding can leave a variance of about zero below it; NaN stays. */
        const float deviation = sqrtf((square_sum < 0 ? 0 : square_sum) + l->eps_lora);
        const int64_t at = (first + t) * l->count + i;
        k->deviations[at] = deviation;
        k->shifts[at] = a->centred ? 0 : output_mean / deviation;
        k->means[at] = output_mean;
    }
}

/* h times the strengths, over the deviations where there is a gate, as the products with the
   up-projections take it. */
static void scale_hidden(const call *k, int64_t t) {
    const layer *l = k->of;
    float *h = k->hidden + t * k->ranks;
    for (int64_t i = 0; i < l->count; i++) {
        const float strength = l->adapters[i].strength;
        const float factor = l->base_weight ? strength / k->deviations[t * l->count + i] : strength;
        for (int64_t r = k->starts[i]; r < k->starts[i + 1]; r++) h[r] *= factor;
    }
#if PAIRS
    if (k->paired) /* over what has been read already */
        for (int64_t r = 0; r < k->ranks; r += 16)
            _mm256_storeu_si256((__m256i *)(h + r / 2),
                                (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(h + r)));
#endif
}

/* What the tiles need of the tokens of one work item. */
static void prepare(const call *k, int64_t group) {
    const layer *l = k->of;
    const int64_t first = group * DOWN_GROUP, left = k->tokens - first;
    const int64_t end = first + (left < DOWN_GROUP ? left : DOWN_GROUP);
    if (k->down)
        project(k, first, end);
    else
        take_hidden(k, first, end);
    if (l->base_weight) {
        for (int64_t t = first; t < end; t++) row_statistics(k, t);
        for (int64_t i = 0; i < l->count; i++)
            for (int64_t t = first; t < end; t += FEW)
                adapter_statistics(k, i, t, end - t < FEW ? end - t : FEW);
    }
    for (int64_t t = first; t < end; t++) scale_hidden(k, t);
}

/* The constants of WIDTH channels. */
typedef struct {
    const float *up; /* R x WIDTH, or R/2 x WIDTH pairs */
    float base_weight[WIDTH], base_bias[WIDTH], coef_weight[WIDTH], coef_bias[WIDTH];
    float out_weight[WIDTH];
} columns;

/* sum += h up of one adapter and TOKENS tokens. */
INLINE void multiply(const call *k, const columns *cols, const int64_t row[TOKENS], int64_t i,
                     vec sum[TOKENS][2], int paired) {
    const int64_t start = k->starts[i], rank = k->of->adapters[i].rank;
#if PAIRS
    if (paired) {
        const float *up = cols->up + start / 2 * WIDTH, *h[TOKENS];
        for (int t = 0; t < TOKENS; t++) h[t] = k->hidden + row[t] * k->ranks + start / 2;
        for (int64_t r = 0; 2 * r < rank; r++, up += WIDTH) {
            const __m512bh u0 = (__m512bh)AT(up, 0), u1 = (__m512bh)AT(up, 1);
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; t++) {
                const __m512bh pair = (__m512bh)_mm512_set1_ps(h[t][r]);
                sum[t][0] = (vec)_mm512_dpbf16_ps((__m512)sum[t][0], pair, u0);
                sum[t][1] = (vec)_mm512_dpbf16_ps((__m512)sum[t][1], pair, u1);
            }
        }
        return;
    }
#endif
    (void)paired;
    const float *up = cols->up + start * WIDTH, *h[TOKENS];
    for (int t = 0; t < TOKENS; t++) h[t] = k->hidden + row[t] * k->ranks + start;
    for (int64_t r = 0; r < rank; r++, up += WIDTH) {
        const vec u0 = AT(up, 0), u1 = AT(up, 1);
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++) {
            sum[t][0] += h[t][r] * u0;
            sum[t][1] += h[t][r] * u1;
        }
    }
}

/* One tile of TOKENS x WIDTH through the gate, or of the plain sum. `row` has each token's place in
   the statistics; only the first `valid` tokens count for the sums of the gates, which are left out
   where null. */
INLINE void fuse_tile(const call *k, const columns *cols, const int64_t row[TOKENS], int64_t valid,
                      vec y[TOKENS][2], float *gate_sums, int gated, int paired) {
    const layer *l = k->of;
    const int64_t N = l->count;
    vec base[TOKENS][2], coef[TOKENS][2], total[TOKENS][2];
    for (int t = 0; gated && t < TOKENS; t++)
        for (int v = 0; v < 2; v++) {
            const vec z = (y[t][v] - k->centres[row[t]]) * k->scales[row[t]];
            base[t][v] = z * AT(cols->base_weight, v) + AT(cols->base_bias, v);
            coef[t][v] = z * AT(cols->coef_weight, v) + AT(cols->coef_bias, v);
            total[t][v] = (vec){0};
        }
    for (int64_t i = 0; i < N; i++) {
        if (!l->adapters[i].rank) continue;
        if (!gated) {
            multiply(k, cols, row, i, y, paired);
            continue;
        }
        vec n[TOKENS][2], said = (vec){0};
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; t++) n[t][0] = n[t][1] = (vec){0};
        multiply(k, cols, row, i, n, paired);
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t += SIDE / 2) {
            vec gate[SIDE];
            EACH n[t + j / 2][j % 2] -= k->shifts[row[t + j / 2] * N + i];
            EACH gate[j] = n[t + j / 2][j % 2] * coef[t + j / 2][j % 2] + base[t + j / 2][j % 2];
            gate_vecs(gate, paired);
            EACH {
                const int u = t + j / 2, v = j % 2;
                const int64_t at = row[u] * N + i;
                total[u][v] += gate[j] * (n[u][v] * k->deviations[at] + k->means[at]);
                if (gate_sums && u < valid) said += gate[j] * AT(cols->out_weight, v);
            }
        }
        if (gate_sums) gate_sums[i] += sum_vec(said);
    }
#pragma GCC unroll 8
    for (int t = 0; gated && t < TOKENS; t++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) y[t][v] += total[t][v] * AT(cols->out_weight, v);
}

/* TOKENS tokens of which `valid` exist, and `width` channels from c. */
INLINE void token_block(const call *k, const columns *cols, int64_t first, int64_t valid, int64_t c,
                        int64_t width, float *gate_sums, int half, int paired) {
    const int64_t C = k->of->channels;
    vec y[TOKENS][2];
    int64_t row[TOKENS];
    float part[WIDTH];
    for (int t = 0; t < TOKENS; t++) {
        row[t] = t < valid ? first + t : first; /* repeats are not written */
        const int64_t at = row[t] * C + c;
        if (width == WIDTH) {
            for (int v = 0; v < 2; v++) y[t][v] = load_vec(k->y, half, at + v * LANES);
            continue;
        }
        for (int j = 0; j < WIDTH; j++) part[j] = j < width ? read_one(k->y, half, at + j) : 0;
        for (int v = 0; v < 2; v++) y[t][v] = AT(part, v);
    }
    if (!k->of->base_weight)
        fuse_tile(k, cols, row, valid, y, 0, 0, paired);
    else if (gate_sums)
        fuse_tile(k, cols, row, valid, y, gate_sums, 1, paired);
    else
        fuse_tile(k, cols, row, valid, y, 0, 1, paired);
    for (int64_t t = 0; t < valid; t++) {
        const int64_t at = (first + t) * C + c;
        if (width == WIDTH) {
            for (int v = 0; v < 2; v++) store_vec(k->fused, half, at + v * LANES, y[t][v]);
            continue;
        }
        for (int v = 0; v < 2; v++) *(unaligned_vec *)(part + v * LANES) = y[t][v];
        for (int j = 0; j < width; j++) store_one(k->fused, half, at + j, part[j]);
    }
}

/* The constants of `width` channels from c. The gate's argument is turned so that it goes into
   1 / (1 + 2^x). */
static void gather(const call *k, int64_t c, int64_t width, float *up, columns *cols) {
    const layer *l = k->of;
    for (int64_t j = 0; l->base_weight && j < WIDTH; j++) {
        const int there = j < width;
        cols->base_weight[j] = there ? MINUS_LOG2_E * l->base_weight[c + j] : 0;
        cols->base_bias[j] = there ? MINUS_LOG2_E * l->base_bias[c + j] : 0;
        cols->coef_weight[j] = there ? MINUS_LOG2_E * l->coef_weight[c + j] : 0;
        cols->coef_bias[j] = there ? MINUS_LOG2_E * l->coef_bias[c + j] : 0;
        cols->out_weight[j] = there ? l->out_weight[c + j] : 0;
    }
    cols->up = k->all_ups ? k->all_ups + c * k->ranks : up;
    if (!k->all_ups) pack_up(k, c, width, up);
}

/* One work item: GROUP tokens and CHUNK channels. The constants of a few channels stay in the
   first-level cache while the tokens pass. */
static void item(const call *k, int64_t group, int64_t chunk, float *up, float *gate_sums) {
    const int64_t T = k->tokens, C = k->of->channels, start = group * GROUP;
    const int64_t end = start + GROUP < T ? start + GROUP : T;
    const int64_t last = (chunk + 1) * CHUNK < C ? (chunk + 1) * CHUNK : C;
    columns cols;
    for (int64_t c = chunk * CHUNK; c < last; c += WIDTH) {
        const int64_t width = last - c < WIDTH ? last - c : WIDTH;
        gather(k, c, width, up, &cols);
        for (int64_t first = start; first < end; first += TOKENS) {
            const int64_t valid = end - first < TOKENS ? end - first : TOKENS;
            if (k->paired)
                token_block(k, &cols, first, valid, c, width, gate_sums, 1, PAIRS);
            else if (k->half)
                token_block(k, &cols, first, valid, c, width, gate_sums, 1, 0);
            else
                token_block(k, &cols, first, valid, c, width, gate_sums, 0, 0);
        }
    }
}

/* Sizes, and one piece of memory for everything; null without memory. */
static void *lay_out(call *k, int64_t partials, int64_t threads) {
    const layer *l = k->of;
    const int64_t T = k->tokens, N = l->count;
    int64_t squares = 0, centred = 0;
    for (int64_t i = 0; i < N; i++) {
        const int64_t padded = (l->adapters[i].rank + PAD - 1) / PAD * PAD;
        k->ranks += padded, squares += padded * padded, centred |= l->adapters[i].centred;
    }
    const int64_t R = k->ranks, has_down = N && l->adapters[0].down;
    k->paired = PAIRS && k->half && has_down && !centred;
    const int stays = l->room && (*l->state == 0 || *l->state == 1 + k->paired);
    const int64_t inputs = has_down && !stays ? l->inputs + 1 : 0;
    const int64_t floats = inputs * R + R + squares + T * (2 + R + 3 * N) +
                           threads * R * WIDTH + partials;
    char *memory = malloc(64 + 8 * (size_t)(2 * N + 1) + 4 * (size_t)floats);
    if (!memory) return 0;
    k->starts = (int64_t *)memory, k->squares = k->starts + N + 1;
    k->starts[0] = 0;
    for (int64_t i = 0, at = 0; i < N; i++) {
        const int64_t padded = (l->adapters[i].rank + PAD - 1) / PAD * PAD;
        k->starts[i + 1] = k->starts[i] + padded;
        k->squares[i] = at, at += padded * padded;
    }
    float *rest = (float *)(((uintptr_t)(k->squares + N) + 63) & ~(uintptr_t)63);
    k->down = has_down ? rest : 0, rest += inputs * R;
    if (stays) {
        k->down = (float *)(((uintptr_t)l->room + 63) & ~(uintptr_t)63);
        k->all_ups = k->down + (l->inputs + 1) * R;
    }
        k->mean = rest, rest += R, k->covariance = rest, rest += squares;
    k->hidden = rest, rest += T * R, k->ups = rest, rest += threads * R * WIDTH;
    k->centres = rest, rest += T, k->scales = rest, rest += T, k->shifts = rest, rest += T * N;
    k->deviations = rest, rest += T * N, k->means = rest, rest += T * N;
    k->partial = rest;
    return memory;
}

/* The only entry. `gate_sums` is [N] or null. Returns 0, or 1 without memory for the statistics. */
int autolora_fuse(const layer *l, const void *y, const void *x, void *fused, double *gate_sums,
                  int64_t tokens, int half, int threads) {
    const int64_t N = l->count, T = tokens;
    const int64_t groups = (T + GROUP - 1) / GROUP, chunks = (l->channels + CHUNK - 1) / CHUNK;
    const int64_t items = groups * chunks, partials = gate_sums ? items * N : 0;
    call k = {.of = l, .y = y, .x = x, .fused = fused, .tokens = T, .half = half};
    void *memory = lay_out(&k, partials, threads);
    if (!memory) return 1;
    float *partial = k.partial;
    memset(partial, 0, sizeof(float) * (size_t)partials);
    const int64_t work = T * (l->channels * (N * 8 + k.ranks) + (k.down ? l->inputs * k.ranks : 0));
    const int packed = k.all_ups && *l->state;
    /* With pairs, half of them. */
    const int64_t blocks = k.down && !packed ? (l->inputs + PAD - 1) / PAD : 0;
    const int64_t columns = k.all_ups && !packed ? (l->channels + WIDTH - 1) / WIDTH : 0;
    if (work < LEAST_WORK) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < N; i++)
            if (l->base_weight) pack_statistics(&k, i);
#pragma omp for schedule(static) nowait
        for (int64_t j = 0; j < columns; j++) {
            const int64_t c = j * WIDTH, left = l->channels - c;
            pack_up(&k, c, left < WIDTH ? left : WIDTH, k.all_ups + c * k.ranks);
        }
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++)
            if (!k.paired || 2 * b < blocks) pack_down(&k, b);
#pragma omp for schedule(static)
        for (int64_t g = 0; g < (T + DOWN_GROUP - 1) / DOWN_GROUP; g++) prepare(&k, g);
#ifdef _OPENMP
        float *up = k.ups + omp_get_thread_num() * k.ranks * WIDTH;
#else
        float *up = k.ups;
#endif
#pragma omp for schedule(static)
        for (int64_t i = 0; i < items; i++)
            item(&k, i / chunks, i % chunks, up, gate_sums ? partial + i * N : 0);
    }
    if (k.all_ups) *l->state = 1 + k.paired;
    for (int64_t n = 0; gate_sums && n < N; n++) {
        gate_sums[n] = 0;
        for (int64_t i = 0; i < items; i++) gate_sums[n] += partial[i * N + n];
    }
    free(memory);
    return 0;
}
