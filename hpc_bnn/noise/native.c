/* The noise of hpc_bnn on CPUs: Philox4x32-10 and a Box-Muller of IEEE operations. philox.py defines the numbers; each
 * variant here gives the same bits. That needs -ffp-contract=off: no product may be rounded together with a sum. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sched.h>
#endif
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#endif
#ifndef METH_FASTCALL
#define METH_FASTCALL 0x0080 /* in the stable ABI since 3.10, but not in all of its headers */
#endif

#define INLINE static inline __attribute__((always_inline))
#define GROUP 64                  /* numbers of 16 counters */
#define BLOCK 1024                /* numbers drawn at once */
#define THREAD_NUMBERS (1L << 17) /* fewer are not worth a thread */
#define MAX_THREADS 256
#define MAX_NUMBERS (1LL << 34)

#define PHILOX_A 0xD2511F53u
#define PHILOX_B 0xCD9E8D57u
#define WEYL_0 0x9E3779B9u
#define WEYL_1 0xBB67AE85u
#define LN2 0.6931471824645996f
#define HALF_PI 0x1.921fb6p-30f /* pi/2 per 2^30 */
static const float LOG[] = {-0.49999961256980896f, 0.33336734771728516f, -0.2500632405281067f, 0.19818177819252014f,
                            -0.16440801322460175f, 0.16990506649017334f, -0.1526685357093811f};
static const float SIN[] = {-0.16666655242443085f, 0.008332177996635437f, -0.00019517316832207143f};
static const float COS[] = {-0.49999895691871643f, 0.04165629670023918f, -0.0013597840443253517f};

typedef struct {
    uint32_t k0, k1, sample, step_low, step_high;
    uint32_t flip; /* the sign bit for the second sample of an antithetic pair */
} Key;

typedef struct {
    const char *name;
    int (*runs_here)(void);
    /* Write the numbers of whole groups, from the one of the counter. */
    void (*bits)(uint32_t *out, uint32_t counter, ptrdiff_t groups, const Key *key);
    void (*normals)(uint32_t *out, uint32_t counter, ptrdiff_t groups, const Key *key);
    /* Box-Muller of n pairs of words, n a multiple of 16. */
    void (*pairs)(const uint32_t *x0, const uint32_t *x1, float *z0, float *z1, ptrdiff_t n);
    void (*affine)(float *out, const float *loc, const float *scale, const float *noise, ptrdiff_t n);
    void (*fold)(float *total, float *product, const float *gradient, const float *noise, ptrdiff_t n);
} Variant;

/* The loops that compilers make vectors of. */
#define LOOPS(NAME, TARGET)                                                                                            \
    TARGET static void affine_##NAME(float *restrict out, const float *restrict loc, const float *restrict scale,      \
                                     const float *restrict noise, ptrdiff_t n)                                         \
    {                                                                                                                  \
        for (ptrdiff_t i = 0; i < n; i++)                                                                              \
            out[i] = loc[i] + scale[i] * noise[i];                                                                     \
    }                                                                                                                  \
    TARGET static void fold_##NAME(float *restrict total, float *restrict product, const float *restrict gradient,     \
                                   const float *restrict noise, ptrdiff_t n)                                           \
    {                                                                                                                  \
        if (!total)                                                                                                    \
            for (ptrdiff_t i = 0; i < n; i++)                                                                          \
                product[i] += gradient[i] * noise[i];                                                                  \
        else                                                                                                           \
            for (ptrdiff_t i = 0; i < n; i++) {                                                                        \
                total[i] += gradient[i];                                                                               \
                product[i] += gradient[i] * noise[i];                                                                  \
            }                                                                                                          \
    }                                                                                                                  \
    TARGET static void bits_##NAME(uint32_t *out, uint32_t counter, ptrdiff_t groups, const Key *key)                  \
    {                                                                                                                  \
        fill_##NAME(out, counter, groups, key, 0);                                                                     \
    }                                                                                                                  \
    TARGET static void normals_##NAME(uint32_t *out, uint32_t counter, ptrdiff_t groups, const Key *key)               \
    {                                                                                                                  \
        fill_##NAME(out, counter, groups, key, 1);                                                                     \
    }
#define VARIANT(NAME) {#NAME, runs_##NAME, bits_##NAME, normals_##NAME, pairs_##NAME, affine_##NAME, fold_##NAME}

/* --- plain C ------------------------------------------------------------------------------------------------------ */

INLINE float float_of(uint32_t x)
{
    float f;
    memcpy(&f, &x, 4);
    return f;
}

INLINE uint32_t bits_of(float f)
{
    uint32_t x;
    memcpy(&x, &f, 4);
    return x;
}

/* Radius: u = x0 / 2^32 = m 2^k with m in [2/3, 4/3), log u by a polynomial in m - 1. Angle: x1 / 2^32 of a turn, as a
 * quarter turn (the upper two bits of y) and a signed rest. */
INLINE void pair_plain(uint32_t x0, uint32_t x1, uint32_t flip, float *z0, float *z1)
{
    const float u = (float)x0 * 0x1p-32f + 0x1p-33f;
    const uint32_t i = bits_of(u), e = (i - 0x3F2AAAABu) & 0xFF800000u;
    const float t = float_of(i - e) - 1.0f, k = (float)(int32_t)e * 0x1p-23f;
    float p = LOG[6];
    for (int c = 5; c >= 0; c--)
        p = p * t + LOG[c];
    const float log = (p * (t * t) + t) + k * LN2;
    const float r = float_of(bits_of(sqrtf(log * -2.0f)) ^ flip);
    const uint32_t y = x1 + 0x20000000u;
    const float a = (float)(int32_t)(x1 - (y & 0xC0000000u)) * HALF_PI, s = a * a;
    const float sine = ((s * SIN[2] + SIN[1]) * s + SIN[0]) * (s * a) + a;
    const float cosine = ((s * COS[2] + COS[1]) * s + COS[0]) * s + 1.0f;
    const uint32_t odd = -((y >> 30) & 1u), both = (bits_of(sine) ^ bits_of(cosine)) & odd;
    *z0 = float_of(bits_of(r * float_of(bits_of(cosine) ^ both)) ^ ((y + 0x40000000u) & 0x80000000u));
    *z1 = float_of(bits_of(r * float_of(bits_of(sine) ^ both)) ^ (y & 0x80000000u));
}

static void pairs_plain(const uint32_t *restrict x0, const uint32_t *restrict x1, float *restrict z0,
                        float *restrict z1, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i++)
        pair_plain(x0[i], x1[i], 0, z0 + i, z1 + i);
}

INLINE void fill_plain(uint32_t *restrict out, uint32_t counter, ptrdiff_t groups, const Key *key, int normal)
{
    const Key k = *key;
    for (ptrdiff_t g = 0; g < groups; g++, out += GROUP, counter += 16) {
        uint32_t x[4][16];
        float z[4][16];
        for (uint32_t j = 0; j < 16; j++) {
            uint32_t c0 = counter + j, c1 = k.sample, c2 = k.step_low, c3 = k.step_high, k0 = k.k0, k1 = k.k1;
            for (int round = 0; round < 10; round++, k0 += WEYL_0, k1 += WEYL_1) {
                const uint64_t p0 = (uint64_t)PHILOX_A * c0, p1 = (uint64_t)PHILOX_B * c2;
                c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, c1 = (uint32_t)p1;
                c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1, c3 = (uint32_t)p0;
            }
            x[0][j] = c0, x[1][j] = c1, x[2][j] = c2, x[3][j] = c3;
        }
        if (normal) {
            for (int l = 0; l < 4; l += 2)
                for (int j = 0; j < 16; j++)
                    pair_plain(x[l][j], x[l + 1][j], k.flip, &z[l][j], &z[l + 1][j]);
            memcpy(out, z, sizeof z);
        } else
            memcpy(out, x, sizeof x);
    }
}

static int runs_plain(void)
{
    return 1;
}

LOOPS(plain, )

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

/* Words of Philox lie in 64-bit lanes, and what is above them does not matter: mul_epu32 reads the lower halves. */

/* --- AVX2 --------------------------------------------------------------------------------------------------------- */

#define AVX2 __attribute__((target("avx2")))
#define F8(x) _mm256_set1_ps(x)
#define I8(x) _mm256_set1_epi32((int)(x))

AVX2 INLINE __m256 multiply_add8(__m256 a, __m256 b, __m256 c)
{
    return _mm256_add_ps(_mm256_mul_ps(a, b), c);
}

/* The nearest float of an unsigned integer: both halves are exact, their sum is rounded once. */
AVX2 INLINE __m256 float8_of(__m256i x)
{
    const __m256i low = _mm256_blend_epi16(x, I8(0x4B000000), 0xAA);                         /* 2^23 + low */
    const __m256i high = _mm256_blend_epi16(_mm256_srli_epi32(x, 16), I8(0x53000000), 0xAA); /* 2^39 + 2^16 high */
    return _mm256_add_ps(_mm256_sub_ps(_mm256_castsi256_ps(high), F8(0x1.0001p39f)), _mm256_castsi256_ps(low));
}

AVX2 INLINE void pair_avx2(__m256i x0, __m256i x1, __m256i flip, __m256 *z0, __m256 *z1)
{
    const __m256 u = multiply_add8(float8_of(x0), F8(0x1p-32f), F8(0x1p-33f));
    const __m256i i = _mm256_castps_si256(u);
    const __m256i e = _mm256_and_si256(_mm256_sub_epi32(i, I8(0x3F2AAAAB)), I8(0xFF800000));
    const __m256 t = _mm256_sub_ps(_mm256_castsi256_ps(_mm256_sub_epi32(i, e)), F8(1.0f));
    const __m256 k = _mm256_mul_ps(_mm256_cvtepi32_ps(e), F8(0x1p-23f));
    __m256 p = F8(LOG[6]);
    for (int c = 5; c >= 0; c--)
        p = multiply_add8(p, t, F8(LOG[c]));
    const __m256 log = _mm256_add_ps(multiply_add8(p, _mm256_mul_ps(t, t), t), _mm256_mul_ps(k, F8(LN2)));
    const __m256 r = _mm256_xor_ps(_mm256_sqrt_ps(_mm256_mul_ps(log, F8(-2.0f))), _mm256_castsi256_ps(flip));
    const __m256i y = _mm256_add_epi32(x1, I8(0x20000000)), sign = I8(0x80000000);
    const __m256i rest = _mm256_sub_epi32(x1, _mm256_and_si256(y, I8(0xC0000000)));
    const __m256 a = _mm256_mul_ps(_mm256_cvtepi32_ps(rest), F8(HALF_PI)), s = _mm256_mul_ps(a, a);
    __m256 sine = multiply_add8(multiply_add8(s, F8(SIN[2]), F8(SIN[1])), s, F8(SIN[0]));
    sine = multiply_add8(sine, _mm256_mul_ps(s, a), a);
    __m256 cosine = multiply_add8(multiply_add8(s, F8(COS[2]), F8(COS[1])), s, F8(COS[0]));
    cosine = multiply_add8(cosine, s, F8(1.0f));
    const __m256 odd = _mm256_castsi256_ps(_mm256_slli_epi32(y, 1)); /* blendv reads the sign bits */
    const __m256i n0 = _mm256_and_si256(_mm256_add_epi32(y, I8(0x40000000)), sign), n1 = _mm256_and_si256(y, sign);
    *z0 = _mm256_xor_ps(_mm256_mul_ps(r, _mm256_blendv_ps(cosine, sine, odd)), _mm256_castsi256_ps(n0));
    *z1 = _mm256_xor_ps(_mm256_mul_ps(r, _mm256_blendv_ps(sine, cosine, odd)), _mm256_castsi256_ps(n1));
}

AVX2 static void pairs_avx2(const uint32_t *x0, const uint32_t *x1, float *z0, float *z1, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i += 8) {
        __m256 a, b;
        pair_avx2(_mm256_loadu_si256((const void *)(x0 + i)), _mm256_loadu_si256((const void *)(x1 + i)), I8(0), &a, &b);
        _mm256_storeu_ps(z0 + i, a), _mm256_storeu_ps(z1 + i, b);
    }
}

AVX2 INLINE void fill_avx2(uint32_t *out, uint32_t counter, ptrdiff_t groups, const Key *key, int normal)
{
    const __m256i A = _mm256_set1_epi64x(PHILOX_A), B = _mm256_set1_epi64x(PHILOX_B), flip = I8(key->flip);
    __m256i k0[10], k1[10];
    for (uint32_t r = 0; r < 10; r++)
        k0[r] = I8(key->k0 + r * WEYL_0), k1[r] = I8(key->k1 + r * WEYL_1);
    for (ptrdiff_t g = 0; g < 2 * groups; g++, counter += 8) {
        __m256i c[2][4], x[4]; /* the even and the odd of 8 counters */
        for (int h = 0; h < 2; h++) {
            c[h][0] = _mm256_add_epi32(I8(counter + (uint32_t)h), _mm256_set_epi32(0, 6, 0, 4, 0, 2, 0, 0));
            c[h][1] = I8(key->sample), c[h][2] = I8(key->step_low), c[h][3] = I8(key->step_high);
        }
#pragma GCC unroll 10
        for (int r = 0; r < 10; r++)
            for (int h = 0; h < 2; h++) {
                const __m256i p0 = _mm256_mul_epu32(A, c[h][0]), p1 = _mm256_mul_epu32(B, c[h][2]);
                c[h][0] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c[h][1]), k0[r]);
                c[h][2] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c[h][3]), k1[r]);
                c[h][1] = p1, c[h][3] = p0;
            }
        for (int l = 0; l < 4; l++)
            x[l] = _mm256_blend_epi32(c[0][l], _mm256_slli_epi64(c[1][l], 32), 0xAA);
        uint32_t *to = out + GROUP * (g / 2) + 8 * (g % 2);
        if (normal) {
            __m256 z[4];
            pair_avx2(x[0], x[1], flip, z, z + 1);
            pair_avx2(x[2], x[3], flip, z + 2, z + 3);
            for (int l = 0; l < 4; l++)
                x[l] = _mm256_castps_si256(z[l]);
        }
        for (int l = 0; l < 4; l++)
            _mm256_storeu_si256((void *)(to + 16 * l), x[l]);
    }
}

static int runs_avx2(void)
{
    return __builtin_cpu_supports("avx2") != 0;
}

LOOPS(avx2, AVX2)

/* --- AVX-512 ------------------------------------------------------------------------------------------------------ */

#define AVX512 __attribute__((target("avx512f")))
#define F16(x) _mm512_set1_ps(x)
#define I16(x) _mm512_set1_epi32((int)(x))
#define XOR3 0x96         /* of ternarylogic: a ^ b ^ c */
#define XOR_OF_AND 0x78   /* a ^ (b & c) */

AVX512 INLINE __m512 multiply_add16(__m512 a, __m512 b, __m512 c)
{
    return _mm512_add_ps(_mm512_mul_ps(a, b), c);
}

AVX512 INLINE __m512 flip16(__m512 z, __m512i mask, __m512i of)
{
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(z), mask, of, XOR_OF_AND));
}

AVX512 INLINE void pair_avx512(__m512i x0, __m512i x1, __m512i flip, __m512 *z0, __m512 *z1)
{
    const __m512 u = multiply_add16(_mm512_cvtepu32_ps(x0), F16(0x1p-32f), F16(0x1p-33f));
    const __m512i i = _mm512_castps_si512(u), sign = I16(0x80000000);
    const __m512i e = _mm512_and_si512(_mm512_sub_epi32(i, I16(0x3F2AAAAB)), I16(0xFF800000));
    const __m512 t = _mm512_sub_ps(_mm512_castsi512_ps(_mm512_sub_epi32(i, e)), F16(1.0f));
    const __m512 k = _mm512_mul_ps(_mm512_cvtepi32_ps(e), F16(0x1p-23f));
    __m512 p = F16(LOG[6]);
    for (int c = 5; c >= 0; c--)
        p = multiply_add16(p, t, F16(LOG[c]));
    const __m512 log = _mm512_add_ps(multiply_add16(p, _mm512_mul_ps(t, t), t), _mm512_mul_ps(k, F16(LN2)));
    const __m512 r = flip16(_mm512_sqrt_ps(_mm512_mul_ps(log, F16(-2.0f))), flip, sign);
    const __m512i y = _mm512_add_epi32(x1, I16(0x20000000));
    const __m512i rest = _mm512_sub_epi32(x1, _mm512_and_si512(y, I16(0xC0000000)));
    const __m512 a = _mm512_mul_ps(_mm512_cvtepi32_ps(rest), F16(HALF_PI)), s = _mm512_mul_ps(a, a);
    __m512 sine = multiply_add16(multiply_add16(s, F16(SIN[2]), F16(SIN[1])), s, F16(SIN[0]));
    sine = multiply_add16(sine, _mm512_mul_ps(s, a), a);
    __m512 cosine = multiply_add16(multiply_add16(s, F16(COS[2]), F16(COS[1])), s, F16(COS[0]));
    cosine = multiply_add16(cosine, s, F16(1.0f));
    const __mmask16 odd = _mm512_test_epi32_mask(y, I16(0x40000000));
    *z0 = flip16(_mm512_mul_ps(r, _mm512_mask_blend_ps(odd, cosine, sine)), _mm512_add_epi32(y, I16(0x40000000)), sign);
    *z1 = flip16(_mm512_mul_ps(r, _mm512_mask_blend_ps(odd, sine, cosine)), y, sign);
}

AVX512 static void pairs_avx512(const uint32_t *x0, const uint32_t *x1, float *z0, float *z1, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i += 16) {
        __m512 a, b;
        pair_avx512(_mm512_loadu_si512(x0 + i), _mm512_loadu_si512(x1 + i), I16(0), &a, &b);
        _mm512_storeu_ps(z0 + i, a), _mm512_storeu_ps(z1 + i, b);
    }
}

AVX512 INLINE void fill_avx512(uint32_t *out, uint32_t counter, ptrdiff_t groups, const Key *key, int normal)
{
    const __m512i A = _mm512_set1_epi64(PHILOX_A), B = _mm512_set1_epi64(PHILOX_B), flip = I16(key->flip);
    const __m512i lower = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    __m512i k0[10], k1[10];
    for (uint32_t r = 0; r < 10; r++)
        k0[r] = I16(key->k0 + r * WEYL_0), k1[r] = I16(key->k1 + r * WEYL_1);
    for (ptrdiff_t g = 0; g < groups; g++, out += GROUP, counter += 16) {
        __m512i c[2][4], x[4]; /* 8 counters each */
        for (int h = 0; h < 2; h++) {
            c[h][0] = _mm512_add_epi32(I16(counter + 8 * (uint32_t)h), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
            c[h][1] = I16(key->sample), c[h][2] = I16(key->step_low), c[h][3] = I16(key->step_high);
        }
#pragma GCC unroll 10
        for (int r = 0; r < 10; r++)
            for (int h = 0; h < 2; h++) {
                const __m512i p0 = _mm512_mul_epu32(A, c[h][0]), p1 = _mm512_mul_epu32(B, c[h][2]);
                c[h][0] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c[h][1], k0[r], XOR3);
                c[h][2] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c[h][3], k1[r], XOR3);
                c[h][1] = p1, c[h][3] = p0;
            }
        for (int l = 0; l < 4; l++)
            x[l] = _mm512_permutex2var_epi32(c[0][l], lower, c[1][l]);
        if (normal) {
            __m512 z[4];
            pair_avx512(x[0], x[1], flip, z, z + 1);
            pair_avx512(x[2], x[3], flip, z + 2, z + 3);
            for (int l = 0; l < 4; l++)
                x[l] = _mm512_castps_si512(z[l]);
        }
        for (int l = 0; l < 4; l++)
            _mm512_storeu_si512(out + 16 * l, x[l]);
    }
}

static int runs_avx512(void)
{
    return __builtin_cpu_supports("avx512f") != 0;
}

LOOPS(avx512, AVX512)

static const Variant VARIANTS[] = {VARIANT(avx512), VARIANT(avx2), VARIANT(plain)}; /* the fastest first */
#else
static const Variant VARIANTS[] = {VARIANT(plain)};
#endif
#define NUM_VARIANTS ((int)(sizeof VARIANTS / sizeof *VARIANTS))
static const Variant *selected = &VARIANTS[NUM_VARIANTS - 1];

/* --- segments, samples and threads -------------------------------------------------------------------------------- */

typedef struct {
    const int64_t *word, *first, *start, *length;
    int64_t num_segments;
    uint64_t prefix, step;
    int64_t first_sample, count;
    int antithetic, normal;
    uint32_t *out; /* [count, stride]: numbers, or what affine makes of them */
    float *noise;  /* affine: [count, stride], may be null; fold: what was drawn, may be null */
    int64_t stride;
    const float *loc, *scale;       /* of affine */
    const int64_t *gradients;       /* of fold: addresses */
    float *total, *product;         /* of fold */
    const Variant *variant;
} Job;

typedef struct {
    const Job *job;
    int64_t from, to;
} Share;

/* Finaliser of SplitMix64. */
static uint64_t mix64(uint64_t x)
{
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

/* Draw n <= BLOCK - number % GROUP numbers of a tensor to a place, if there is one, and return where they are. */
static const float *draw_block(const Job *job, const Key *key, int64_t number, int64_t n, uint32_t *place,
                               uint32_t *buffer)
{
    const ptrdiff_t skipped = number % GROUP, groups = (skipped + n + GROUP - 1) / GROUP;
    const int whole = place && !skipped && n % GROUP == 0;
    uint32_t *to = whole ? place : buffer;
    (job->normal ? job->variant->normals : job->variant->bits)(to, (uint32_t)(number / GROUP * 16), groups, key);
    if (place && !whole)
        memcpy(place, buffer + skipped, 4 * (size_t)n);
    return (const float *)(whole ? place : buffer + skipped);
}

static void run_block(const Job *job, const Key *key, int64_t t, int64_t i, int64_t n, int64_t row)
{
    uint32_t buffer[BLOCK];
    const int64_t number = job->first[t] + i, p = job->start[t] + i, q = row * job->stride + p;
    uint32_t *noise = job->noise ? (uint32_t *)(job->noise + q) : NULL;
    if (job->gradients) {
        const float *drawn = noise ? job->noise + q : draw_block(job, key, number, n, NULL, buffer);
        const float *gradient = (const float *)(intptr_t)job->gradients[t] + i;
        job->variant->fold(job->total ? job->total + p : NULL, job->product + p, gradient, drawn, n);
    } else if (job->loc) {
        const float *drawn = draw_block(job, key, number, n, noise, buffer);
        job->variant->affine((float *)job->out + q, job->loc + p, job->scale + p, drawn, n);
    } else
        draw_block(job, key, number, n, job->out + q, buffer);
}

static int64_t length_of(const Job *job, int64_t t)
{
    return job->gradients && !job->gradients[t] ? 0 : job->length[t];
}

/* Do the numbers from..to - 1 of all segments, for each sample. */
static void *run_share(void *argument)
{
    const Share *share = argument;
    const Job *job = share->job;
    int64_t begin = 0;
    for (int64_t t = 0; t < job->num_segments && begin < share->to; t++) {
        const int64_t length = length_of(job, t);
        const int64_t end = share->to - begin < length ? share->to - begin : length;
        int64_t i = share->from > begin ? share->from - begin : 0;
        const uint64_t k = mix64(job->prefix ^ (uint64_t)job->word[t]);
        Key key = {(uint32_t)k, (uint32_t)(k >> 32), 0, (uint32_t)job->step, (uint32_t)(job->step >> 32), 0};
        for (int64_t n; i < end; i += n) {
            n = BLOCK - (job->first[t] + i) % GROUP;
            n = n < end - i ? n : end - i;
            for (int64_t row = 0; row < job->count; row++) {
                key.sample = (uint32_t)(job->first_sample + row);
                if (job->antithetic)
                    key.flip = key.sample << 31, key.sample &= ~1u;
                run_block(job, &key, t, i, n, row);
            }
        }
        begin += length;
    }
    return NULL;
}

static int64_t available_cpus(void)
{
#ifdef __linux__
    cpu_set_t set;
    if (!sched_getaffinity(0, sizeof set, &set))
        return CPU_COUNT(&set); /* one where the caller is bound to a core: its threads would share it */
#endif
    return MAX_THREADS;
}

static void run_job(const Job *job, int64_t threads)
{
    Share shares[MAX_THREADS];
    pthread_t started[MAX_THREADS];
    int runs[MAX_THREADS];
    int64_t numbers = 0;
    for (int64_t t = 0; t < job->num_segments; t++)
        numbers += length_of(job, t);
    const int64_t enough = numbers * job->count / THREAD_NUMBERS;
    threads = threads < enough ? threads : enough;
    threads = threads < MAX_THREADS ? threads : MAX_THREADS;
    if (threads > 1) {
        const int64_t cpus = available_cpus();
        threads = threads < cpus ? threads : cpus;
    }
    threads = threads < 1 ? 1 : threads;
    for (int64_t j = 0; j < threads; j++) {
        const int64_t from = numbers / threads * j / BLOCK * BLOCK;
        shares[j] = (Share){job, from, numbers};
        if (j)
            shares[j - 1].to = from;
    }
    for (int64_t j = 1; j < threads; j++)
        runs[j] = !pthread_create(&started[j], NULL, run_share, &shares[j]);
    run_share(&shares[0]);
    for (int64_t j = 1; j < threads; j++)
        if (runs[j])
            pthread_join(started[j], NULL);
        else
            run_share(&shares[j]);
}

/* --- Python ------------------------------------------------------------------------------------------------------- */

#define FLOATS(x) ((float *)(intptr_t)(x))

/* Read integers, which may be addresses. */
static int read_integers(PyObject *const *args, Py_ssize_t given, Py_ssize_t expected, int64_t *to)
{
    if (given != expected) {
        PyErr_Format(PyExc_TypeError, "%zd arguments instead of %zd", given, expected);
        return 0;
    }
    for (Py_ssize_t i = 0; i < given; i++) {
        to[i] = PyLong_AsLongLong(args[i]);
        if (to[i] == -1 && PyErr_Occurred())
            return 0;
    }
    return 1;
}

/* Start a job from table, T, words, first_sample, count and antithetic. */
static int read_job(Job *job, const int64_t *a)
{
    const int64_t *table = (const int64_t *)(intptr_t)a[0], *words = (const int64_t *)(intptr_t)a[2], T = a[1];
    *job = (Job){.word = table, .first = table + T, .start = table + 2 * T, .length = table + 3 * T, .num_segments = T,
                 .prefix = (uint64_t)words[0], .step = (uint64_t)words[1], .first_sample = a[3], .count = a[4],
                 .antithetic = a[5] != 0, .normal = 1, .variant = selected};
    if (a[3] < 0 || a[4] < 0 || a[3] + a[4] > 1LL << 32) {
        PyErr_SetString(PyExc_ValueError, "samples must be below 2^32");
        return 0;
    }
    return 1;
}

static int run_checked(const Job *job, int64_t threads)
{
    for (int64_t t = 0; t < job->num_segments; t++) {
        const int64_t first = job->first[t], length = job->length[t], start = job->start[t];
        if (length < 0 || first < 0 || start < 0 || length > MAX_NUMBERS || first > MAX_NUMBERS - length) {
            PyErr_Format(PyExc_ValueError, "segment %lld is not within the 2^34 numbers of a tensor", (long long)t);
            return 0;
        }
        if ((job->out || job->product) && (start > job->stride || length > job->stride - start)) {
            PyErr_Format(PyExc_ValueError, "segment %lld is not within the tensor that it is for", (long long)t);
            return 0;
        }
    }
    Py_BEGIN_ALLOW_THREADS
    run_job(job, threads);
    Py_END_ALLOW_THREADS
    return 1;
}

static PyObject *draw_as(PyObject *const *args, Py_ssize_t given, int normal)
{
    int64_t a[9];
    Job job;
    if (!read_integers(args, given, 9, a) || !read_job(&job, a))
        return NULL;
    job.normal = normal, job.out = (uint32_t *)(intptr_t)a[6], job.stride = a[7];
    if (!run_checked(&job, a[8]))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *py_bits(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    (void)self;
    return draw_as(args, given, 0);
}

static PyObject *py_draw(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    (void)self;
    return draw_as(args, given, 1);
}

static PyObject *py_affine(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    (void)self;
    int64_t a[12];
    Job job;
    if (!read_integers(args, given, 12, a) || !read_job(&job, a))
        return NULL;
    job.loc = FLOATS(a[6]), job.scale = FLOATS(a[7]), job.out = (uint32_t *)FLOATS(a[8]), job.noise = FLOATS(a[9]);
    job.stride = a[10];
    if (!run_checked(&job, a[11]))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *py_fold(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    (void)self;
    int64_t a[10], pair[2], *gradients = NULL;
    Job job;
    int done = 0;
    if (given != 11) {
        PyErr_Format(PyExc_TypeError, "%zd arguments instead of 11", given);
        return NULL;
    }
    if (!read_integers(args + 1, 10, 10, a))
        return NULL;
    const int64_t ordered[] = {a[0], a[1], a[2], a[3], 1, a[4]};
    const Py_ssize_t T = PySequence_Size(args[0]) / 2;
    if (PyErr_Occurred() || !read_job(&job, ordered))
        return NULL;
    if (T != job.num_segments) {
        PyErr_SetString(PyExc_ValueError, "one gradient is needed for each segment");
        return NULL;
    }
    gradients = malloc(sizeof *gradients * (size_t)(T + 1));
    if (!gradients)
        return PyErr_NoMemory();
    for (Py_ssize_t t = 0; t < T; t++) {
        for (int i = 0; i < 2; i++) {
            PyObject *item = PySequence_GetItem(args[0], 2 * t + i);
            const int read = item && read_integers(&item, 1, 1, pair + i);
            Py_XDECREF(item);
            if (!read)
                goto end;
        }
        gradients[t] = pair[0];
        if (pair[0] && pair[1] != job.length[t]) {
            PyErr_Format(PyExc_ValueError, "gradient %zd has %lld numbers instead of %lld", t, (long long)pair[1],
                         (long long)job.length[t]);
            goto end;
        }
    }
    job.gradients = gradients, job.total = FLOATS(a[5]), job.product = FLOATS(a[6]), job.noise = FLOATS(a[7]);
    job.stride = a[8];
    done = run_checked(&job, a[9]);
end:
    free(gradients);
    if (!done)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *py_pairs(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    (void)self;
    int64_t a[5];
    if (!read_integers(args, given, 5, a))
        return NULL;
    const uint32_t *x0 = (const uint32_t *)(intptr_t)a[0], *x1 = (const uint32_t *)(intptr_t)a[1];
    float *z0 = FLOATS(a[2]), *z1 = FLOATS(a[3]);
    const int64_t n = a[4], whole = n / 16 * 16, rest = n - whole;
    selected->pairs(x0, x1, z0, z1, whole);
    if (rest) {
        uint32_t x[2][16] = {{0}};
        float z[2][16];
        memcpy(x[0], x0 + whole, 4 * (size_t)rest), memcpy(x[1], x1 + whole, 4 * (size_t)rest);
        selected->pairs(x[0], x[1], z[0], z[1], 16);
        memcpy(z0 + whole, z[0], 4 * (size_t)rest), memcpy(z1 + whole, z[1], 4 * (size_t)rest);
    }
    Py_RETURN_NONE;
}

static PyObject *py_hash(PyObject *self, PyObject *const *args, Py_ssize_t given)
{
    (void)self;
    int64_t a[4];
    if (!read_integers(args, given, 4, a))
        return NULL;
    const Variant *variant = selected;
    uint64_t sum = 0;
    Py_BEGIN_ALLOW_THREADS
    uint32_t x[2][BLOCK];
    float z[2][BLOCK];
    const int varied = a[0] != 0;
    for (int i = 0; i < BLOCK; i++)
        x[0][i] = x[1][i] = (uint32_t)a[1];
    for (int64_t from = a[2], to = a[2] + a[3]; from < to; from += BLOCK) {
        for (int i = 0; i < BLOCK; i++)
            x[varied][i] = (uint32_t)(from + i);
        variant->pairs(x[0], x[1], z[0], z[1], BLOCK);
        for (int i = 0; i < BLOCK && from + i < to; i++) {
            const uint64_t w = (uint64_t)(from + i) * 0x9E3779B97F4A7C15u;
            sum += (w ^ bits_of(z[0][i])) * 0xBF58476D1CE4E5B9u ^ (w + bits_of(z[1][i])) * 0x94D049BB133111EBu;
        }
    }
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLongLong(sum);
}

static PyObject *py_variants(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    PyObject *names = PyList_New(0);
    for (int v = 0; names && v < NUM_VARIANTS; v++) {
        if (!VARIANTS[v].runs_here())
            continue;
        PyObject *name = PyUnicode_FromString(VARIANTS[v].name);
        if (!name || PyList_Append(names, name))
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *py_set_variant(PyObject *self, PyObject *name)
{
    (void)self;
    for (int v = 0; v < NUM_VARIANTS; v++)
        if (PyUnicode_Check(name) && !PyUnicode_CompareWithASCIIString(name, VARIANTS[v].name) && VARIANTS[v].runs_here()) {
            selected = &VARIANTS[v];
            Py_RETURN_NONE;
        }
    return PyErr_Format(PyExc_ValueError, "no variant %R on this CPU", name);
}

#define FAST(NAME) (PyCFunction)(void (*)(void))py_##NAME, METH_FASTCALL
static PyMethodDef METHODS[] = {
    {"bits", FAST(bits), "bits(table, T, words, first_sample, count, antithetic, out, stride, threads)"},
    {"draw", FAST(draw), "draw(table, T, words, first_sample, count, antithetic, out, stride, threads)"},
    {"affine", FAST(affine),
     "affine(table, T, words, first_sample, count, antithetic, loc, scale, out, noise_or_0, stride, threads)"},
    {"fold", FAST(fold),
     "fold([address_or_0, size, ...], table, T, words, sample, antithetic, total_or_0, product, noise_or_0, size, threads)"},
    {"pairs", FAST(pairs), "pairs(x0, x1, z0, z1, n): Box-Muller of n pairs of words"},
    {"hash_words", FAST(hash),
     "hash_words(varied, other, first, count): hash of the Box-Muller of words first to first + count - 1, as radius "
     "(varied = 0) or as angle (1), beside the word other; hashes of ranges add modulo 2^64"},
    {"variants", py_variants, METH_NOARGS, "Names of the variants that this CPU can run, the fastest first."},
    {"set_variant", py_set_variant, METH_O, "Use a variant from now on."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_native", "Keyed noise on CPUs.", -1, METHODS, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void)
{
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    for (int v = NUM_VARIANTS - 1; v >= 0; v--)
        if (VARIANTS[v].runs_here())
            selected = &VARIANTS[v];
#endif
    return PyModule_Create(&MODULE);
}
