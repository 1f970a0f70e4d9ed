/* Float8 numbers, e4m3fn or e5m2, widened to float32 or bfloat16; exact, NaN stays NaN.

   Both formats are the upper byte of a wider one but for the exponent's bias, so that a shift and
   an addition do for normal numbers. Compiled on the machine it runs on by c_library.py. */

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define HALVES 32  /* numbers of one pass of AVX-512 to bfloat16 */
#define PART 16384 /* numbers of one work item */

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t int_vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t bits_vec __attribute__((vector_size(LANES * 4)));
typedef uint16_t half_vec __attribute__((vector_size(LANES * 2)));
typedef float unaligned_vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t unaligned_half __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint8_t unaligned_bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint16_t halves __attribute__((vector_size(HALVES * 2)));
typedef uint16_t unaligned_halves __attribute__((vector_size(HALVES * 2), aligned(2), may_alias));
typedef uint8_t half_bytes __attribute__((vector_size(HALVES), aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    int mantissa;      /* bits */
    uint32_t bias;     /* what the exponent's bias lacks of float32's */
    uint32_t normal;   /* the least normal number */
    uint32_t infinite; /* from here on infinity or NaN */
    float step;        /* between numbers that are not normal */
} format;
static const format E4M3 = {3, 120, 8, 0x7f, 0x1p-9f};
static const format E5M2 = {2, 112, 4, 0x7c, 0x1p-16f};

/* The bits of float32. Numbers that are not normal here are normal there: nothing depends on
   whether the processor flushes such numbers to zero. */
INLINE bits_vec widen(bits_vec stored, format f) {
    const bits_vec magnitude = stored & 0x7f;
    const bits_vec normal = (magnitude << (23 - f.mantissa)) + (f.bias << 23);
    const bits_vec small = (bits_vec)(__builtin_convertvector((int_vec)magnitude, vec) * f.step);
    const bits_vec is_small = (bits_vec)(magnitude < f.normal);
    const bits_vec is_infinite = (bits_vec)(magnitude >= f.infinite);
    const bits_vec widened = (is_small & small) | (~is_small & normal);
    return widened | (is_infinite & 0x7f800000) | ((stored & 0x80) << 24);
}

INLINE uint32_t widen_one(uint8_t stored, format f) { return widen((bits_vec){stored}, f)[0]; }

INLINE bits_vec load(const uint8_t *source) {
    return __builtin_convertvector(*(const unaligned_bytes *)source, bits_vec);
}

INLINE void to_float(const uint8_t *source, float *target, int64_t count, format f) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        *(unaligned_vec *)(target + i) = (vec)widen(load(source + i), f);
    for (; i < count; i++) {
        const uint32_t bits = widen_one(source[i], f);
        memcpy(target + i, &bits, 4);
    }
}

INLINE void to_bfloat16(const uint8_t *source, uint16_t *target, int64_t count, format f) {
    int64_t i = 0;
#if defined(__AVX512BW__)
    /* The same in 16 bits, twice as many at a time; numbers that are not normal from a table. */
    halves table = {0};
    for (uint32_t m = 0; m < f.normal; m++) table[m] = (uint16_t)(widen_one((uint8_t)m, f) >> 16);
    for (; i + HALVES <= count; i += HALVES) {
        const halves stored = __builtin_convertvector(*(const half_bytes *)(source + i), halves);
        const halves magnitude = stored & 0x7f;
        const halves normal = (magnitude << (7 - f.mantissa)) + (uint16_t)(f.bias << 7);
        const halves is_small = (halves)(magnitude < (uint16_t)f.normal);
        const halves is_infinite = (halves)(magnitude >= (uint16_t)f.infinite);
        const halves small = is_small & __builtin_shuffle(table, magnitude);
        *(unaligned_halves *)(target + i) =
            small | (~is_small & normal) | (is_infinite & 0x7f80) | ((stored & 0x80) << 8);
    }
#endif
    for (; i + LANES <= count; i += LANES)
        *(unaligned_half *)(target + i) =
            __builtin_convertvector(widen(load(source + i), f) >> 16, half_vec);
    for (; i < count; i++) target[i] = (uint16_t)(widen_one(source[i], f) >> 16);
}

/* The only entry: `count` numbers to float32, or to bfloat16 where `half`. */
void autolora_widen(const uint8_t *source, void *target, int64_t count, int e5m2, int half,
                    int threads) {
    const int64_t parts = (count + PART - 1) / PART;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && parts > 1)
    for (int64_t p = 0; p < parts; p++) {
        const int64_t at = p * PART, size = count - at < PART ? count - at : PART;
        float *floats = (float *)target + at;
        uint16_t *shorts = (uint16_t *)target + at;
        if (half && e5m2)
            to_bfloat16(source + at, shorts, size, E5M2);
        else if (half)
            to_bfloat16(source + at, shorts, size, E4M3);
        else if (e5m2)
            to_float(source + at, floats, size, E5M2);
        else
            to_float(source + at, floats, size, E4M3);
    }
}
