/* The noise on a CPU: the bits of eager.py, at the speed of memory.
 *
 *   write[i] = round(keep * read[i] + sum_j factor[j] * n_j(start + i))   where |read[i]| <= limit, else read[i]
 *
 * Integer arithmetic makes n; each product is exact in float, so only the additions and the last step round. Compile
 * without -ffast-math and with -ffp-contract=off. `read` and `write` are the same memory or do not overlap.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512VNNI__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline)) /* so that constant arguments are known inside */

enum { FLOAT32, BFLOAT16, FLOAT16 };
enum { NORMAL, RADEMACHER }; /* distributions, as eager.py numbers them */
/* Elements. A thread takes blocks; of a block, one part after the other is read, summed and written: parts so small
 * that reading and writing memory go on while the next ones are computed. */
enum { BLOCK = 2048, PART = 128, PARALLEL_FROM = 1 << 15 };
enum { LINE = 64, AHEAD = 4096 }; /* bytes: of a line of the cache, and from a part to what it asks memory for */

static inline int64_t bytes(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

typedef struct {
    uint32_t k0, k1;
    float factor;
} term;

#define DEFINE_HASH(type, mix, hash)                                                                                   \
    INLINE type mix(type x) {                                                                                          \
        x ^= x >> 16;                                                                                                  \
        x *= 0x7FEB352Du;                                                                                              \
        x ^= x >> 15;                                                                                                  \
        x *= 0x846CA68Bu;                                                                                              \
        return x ^ x >> 16;                                                                                            \
    }                                                                                                                  \
    INLINE type hash(type index, uint32_t k0, uint32_t k1) { return mix(mix(index ^ k0) + k1); }

DEFINE_HASH(uint32_t, mix, hash)

static inline float normal(uint32_t h) {
    uint32_t pairs = (h & 0x00FF00FFu) + ((h >> 8) & 0x00FF00FFu);
    return (float)((int32_t)((pairs + (pairs >> 16)) & 0x7FFu) - 510);
}

/* The same for WIDTH elements at once: the sum of four bytes in fewer instructions than compilers find. */
#if defined(__AVX512VNNI__)
#define WIDTH 16
#elif defined(__AVX2__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
typedef uint32_t lanes __attribute__((vector_size(4 * WIDTH)));
typedef int32_t integers __attribute__((vector_size(4 * WIDTH)));
typedef float floats __attribute__((vector_size(4 * WIDTH)));

DEFINE_HASH(lanes, mix_lanes, hash_lanes)

INLINE integers normal_integers(lanes h) {
#if defined(__AVX512VNNI__)
    return (integers)_mm512_dpbusd_epi32(_mm512_set1_epi32(-510), (__m512i)h, _mm512_set1_epi8(1));
#elif defined(__AVX2__)
    __m256i pairs = _mm256_maddubs_epi16((__m256i)h, _mm256_set1_epi8(1));
    return (integers)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)) - 510;
#else
    lanes pairs = (h & 0x00FF00FFu) + ((h >> 8) & 0x00FF00FFu);
    return (integers)((pairs + (pairs >> 16)) & 0x7FFu) - 510;
#endif
}

INLINE floats normal_lanes(uint32_t index, term t) { /* times the factor */
    lanes offsets;
    for (uint32_t i = 0; i < WIDTH; i++) offsets[i] = i;
    return __builtin_convertvector(normal_integers(hash_lanes(offsets + index, t.k0, t.k1)), floats) * t.factor;
}

INLINE floats load_lanes(const float *from) {
    floats values;
    memcpy(&values, from, sizeof values);
    return values;
}

INLINE void store_lanes(float *to, floats values) { memcpy(to, &values, sizeof values); }

static inline float sign(uint32_t h) { return (float)((int32_t)(h >> 31) * 2 - 1); }

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint16_t to_bfloat16(float x) { /* to the nearest, ties to even */
    uint32_t bits = bits_of(x);
    return x != x ? 0x7FC0 : (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

/* Random bits below the last kept one, then cut: up or down with the right probability. */
static inline uint16_t to_bfloat16_stochastically(float x, uint32_t random) {
    return (uint16_t)((bits_of(x) + (random & 0xFFFFu)) >> 16);
}

/* float16 by its bits, since compilers do not vectorise their own half type. It has 5 bits of exponent where float has
 * 8: times 2**-112, a float has float16's exponent, and float's subnormal numbers are float16's. */
static inline uint16_t with_sign_and_limit(uint32_t bits, float x) {
    uint32_t magnitude = bits > 0x7C00u ? 0x7C00u : bits;
    return (uint16_t)((x != x ? 0x7E00u : magnitude) | (bits_of(x) >> 16 & 0x8000u));
}

static inline uint16_t to_float16(float x) { /* to the nearest, ties to even */
    uint32_t size = bits_of(x) & 0x7FFFFFFFu;
    /* below 2**-14 the distance of two neighbours is 2**-24, which is that of floats in [0.5, 1) */
    uint32_t small = bits_of(float_of(size) + 0.5f) - bits_of(0.5f);
    uint32_t normal = (size - (112u << 23) + 0xFFFu + (size >> 13 & 1)) >> 13;
    return with_sign_and_limit(size < (113u << 23) ? small : normal, x);
}

static inline uint16_t to_float16_stochastically(float x, uint32_t random) {
    uint32_t size = bits_of(x * 0x1p-112f) & 0x7FFFFFFFu;
    return with_sign_and_limit((size + (random & 0x1FFFu)) >> 13, x);
}

static inline float of_float16(uint16_t half) {
    uint32_t bits = (half & 0x7FFFu) << 13, special = (half & 0x7C00u) == 0x7C00u ? 0x7F800000u : 0;
    return float_of(bits_of(float_of(bits) * 0x1p112f) | special | (half & 0x8000u) << 16);
}

INLINE void load(float *sum, const void *from, int dtype, int64_t low, int64_t count, float keep) {
    const float *whole = (const float *)from + low;
    const uint16_t *half = (const uint16_t *)from + low;
    if (dtype == FLOAT32)
        for (int64_t i = 0; i < count; i++) sum[i] = whole[i] * keep;
    else if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++) sum[i] = float_of((uint32_t)half[i] << 16) * keep;
    else
        for (int64_t i = 0; i < count; i++) sum[i] = of_float16(half[i]) * keep;
}

INLINE void store(const float *sum, void *to, int dtype, int64_t low, int64_t count) {
    uint16_t *half = (uint16_t *)to + low;
    if (dtype == FLOAT32)
        memcpy((float *)to + low, sum, count * sizeof(float));
    else if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++) half[i] = to_bfloat16(sum[i]);
    else
        for (int64_t i = 0; i < count; i++) half[i] = to_float16(sum[i]);
}

INLINE void store_stochastically(const float *sum, void *to, int dtype, int64_t low, int64_t count, uint32_t index,
                                 const term *rounding) {
    uint16_t *half = (uint16_t *)to + low;
    uint32_t k0 = rounding->k0, k1 = rounding->k1;
    if (dtype == BFLOAT16)
        for (uint32_t i = 0; i < count; i++) half[i] = to_bfloat16_stochastically(sum[i], hash(index + i, k0, k1));
    else
        for (uint32_t i = 0; i < count; i++) half[i] = to_float16_stochastically(sum[i], hash(index + i, k0, k1));
}

/* What is larger in magnitude than the limit keeps its value, and so its bits: rounding changes no 16-bit number. */
INLINE void keep_large(float *sum, const float *was, int64_t count, float limit) {
    for (int64_t i = 0; i < count; i++) sum[i] = fabsf(was[i]) <= limit ? sum[i] : was[i];
}

INLINE void add(float *sum, int64_t count, uint32_t index, term t, int distribution) {
    uint32_t i = 0;
    if (distribution == RADEMACHER) {
        for (; i < count; i++) sum[i] += sign(hash(index + i, t.k0, t.k1)) * t.factor;
        return;
    }
    for (; i + WIDTH <= count; i += WIDTH) store_lanes(sum + i, load_lanes(sum + i) + normal_lanes(index + i, t));
    for (; i < count; i++) sum[i] += normal(hash(index + i, t.k0, t.k1)) * t.factor;
}

/* The most frequent case, a part of floats that all move, without leaving the registers. */
INLINE void write_floats(const float *read, float *write, uint32_t index, const term *terms, int n_terms) {
    const term first = terms[0];
    for (uint32_t i = 0; i < PART; i += WIDTH) {
        floats sum = load_lanes(read + i) + normal_lanes(index + i, first);
        for (int j = 1; j < n_terms; j++) sum += normal_lanes(index + i, terms[j]);
        store_lanes(write + i, sum);
    }
}

/* `size` elements from `low` on, of which the first has the stream's index `index`. */
INLINE void write_part(const void *read, void *write, int from, int to, int64_t low, int64_t size, uint32_t index,
                       const term *terms, int n_terms, int distribution, float keep, float limit,
                       const term *rounding) {
    float sum[PART], was[PART];
    const char *source = (const char *)read + low * bytes(from), *target = (const char *)write + low * bytes(to);
    for (int64_t i = 0; i < size * bytes(from); i += LINE) __builtin_prefetch(source + AHEAD + i);
    for (int64_t i = 0; i < size * bytes(to); i += LINE) __builtin_prefetch(target + AHEAD + i, 1);
    if (from == FLOAT32 && to == FLOAT32 && distribution == NORMAL && size == PART && n_terms && keep == 1 &&
        limit == INFINITY) {
        write_floats((const float *)read + low, (float *)write + low, index, terms, n_terms);
        return;
    }
    load(sum, read, from, low, size, keep);
    for (int j = 0; j < n_terms; j++) add(sum, size, index, terms[j], distribution);
    if (limit < INFINITY) {
        load(was, read, from, low, size, 1);
        keep_large(sum, was, size, limit);
    }
    if (rounding && to != FLOAT32)
        store_stochastically(sum, write, to, low, size, index, rounding);
    else
        store(sum, write, to, low, size);
}

/* One part after the other; `start` is the index of the first element, modulo 2**32. */
static void write_serially(const void *read, void *write, int from, int to, int64_t count, uint32_t start,
                           const term *terms, int n_terms, int distribution, float keep, float limit,
                           const term *rounding) {
    int64_t low = 0;
    for (; low + PART <= count; low += PART) /* a known size, for which compilers write better loops */
        write_part(read, write, from, to, low, PART, start + (uint32_t)low, terms, n_terms, distribution, keep, limit,
                   rounding);
    if (low < count)
        write_part(read, write, from, to, low, count - low, start + (uint32_t)low, terms, n_terms, distribution, keep,
                   limit, rounding);
}

/* `rounding`: null rounds to the nearest. */
void write_sum(const void *read, void *write, int from, int to, int64_t count, uint32_t start, const term *terms,
               int n_terms, int distribution, float keep, float limit, const term *rounding, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count >= PARALLEL_FROM)
    for (int64_t low = 0; low < count; low += BLOCK)
        write_serially((const char *)read + low * bytes(from), (char *)write + low * bytes(to), from, to,
                       count - low < BLOCK ? count - low : BLOCK, start + (uint32_t)low, terms, n_terms, distribution,
                       keep, limit, rounding);
}

/* Row i of `write` is row rows[i] of the matrix `read`, with its noise: what an embedding looks up. */
void write_rows(const void *read, void *write, int dtype, int64_t width, const int64_t *rows, int64_t count,
                const term *terms, int n_terms, int distribution, float limit, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count * width >= PARALLEL_FROM)
    for (int64_t i = 0; i < count; i++)
        write_serially((const char *)read + rows[i] * width * bytes(dtype), (char *)write + i * width * bytes(dtype),
                       dtype, dtype, width, (uint32_t)(rows[i] * width), terms, n_terms, distribution, 1, limit, 0);
}
