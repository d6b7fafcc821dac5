// Sixteen numbers at a time, whatever the machine's registers: one AVX-512 register, two of AVX2, four of NEON.
// Everything above this file is written in terms of V16 and I16, and computes the same sums in the same order everywhere.
// This file is compiled once per instruction set (see build.py), each time in a namespace of its own.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
// Copies in registers what is indexed by constants only: loops over parts must vanish before that.
#define UNROLL _Pragma("GCC unroll 16")

namespace TGI_ISA {

using bf16 = uint16_t;  // the upper half of a float32
using f16 = uint16_t;   // IEEE half

#if defined(__AVX512F__)

constexpr int PARTS = 1;
using Part = __m512;
using IPart = __m512i;
INLINE Part p_set1(float x) { return _mm512_set1_ps(x); }
INLINE Part p_load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void p_store(float* p, Part a) { _mm512_storeu_ps(p, a); }
INLINE Part p_fma(Part a, Part b, Part c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Part p_add(Part a, Part b) { return _mm512_add_ps(a, b); }
INLINE Part p_sub(Part a, Part b) { return _mm512_sub_ps(a, b); }
INLINE Part p_mul(Part a, Part b) { return _mm512_mul_ps(a, b); }
INLINE Part p_div(Part a, Part b) { return _mm512_div_ps(a, b); }
INLINE Part p_max(Part a, Part b) { return _mm512_max_ps(a, b); }
INLINE Part p_min(Part a, Part b) { return _mm512_min_ps(a, b); }
INLINE Part p_round(Part a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Part p_less(Part a, Part b, Part yes, Part no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
INLINE unsigned p_at_most(Part a, Part b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
INLINE Part p_where(unsigned bits, Part yes, Part no) { return _mm512_mask_blend_ps((__mmask16)bits, no, yes); }
INLINE IPart p_int(Part a) { return _mm512_cvtps_epi32(a); }
INLINE Part p_float(IPart a) { return _mm512_cvtepi32_ps(a); }
INLINE Part p_bits(IPart a) { return _mm512_castsi512_ps(a); }
INLINE IPart p_bits(Part a) { return _mm512_castps_si512(a); }
INLINE IPart i_set1(int32_t x) { return _mm512_set1_epi32(x); }
INLINE IPart i_load(const void* p) { return _mm512_loadu_si512(p); }
INLINE void i_store(void* p, IPart a) { _mm512_storeu_si512(p, a); }
INLINE IPart i_add(IPart a, IPart b) { return _mm512_add_epi32(a, b); }
INLINE IPart i_and(IPart a, IPart b) { return _mm512_and_si512(a, b); }
template <int N> INLINE IPart i_shl(IPart a) { return _mm512_slli_epi32(a, N); }
template <int N> INLINE IPart i_shr(IPart a) { return _mm512_srli_epi32(a, N); }
template <int N> INLINE IPart i_sar(IPart a) { return _mm512_srai_epi32(a, N); }
template <int N> INLINE IPart i_shl16(IPart a) { return _mm512_slli_epi16(a, N); }
template <int N> INLINE IPart i_sar16(IPart a) { return _mm512_srai_epi16(a, N); }
INLINE Part p_half(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE Part p_bf16(const bf16* p) { return p_bits(i_shl<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)))); }
INLINE void p_store_low(uint16_t* p, IPart a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(a)); }
INLINE void p_store_bytes(int8_t* p, IPart a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a)); }

#elif defined(__AVX2__)

constexpr int PARTS = 2;
using Part = __m256;
using IPart = __m256i;
INLINE Part p_set1(float x) { return _mm256_set1_ps(x); }
INLINE Part p_load(const float* p) { return _mm256_loadu_ps(p); }
INLINE void p_store(float* p, Part a) { _mm256_storeu_ps(p, a); }
INLINE Part p_fma(Part a, Part b, Part c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Part p_add(Part a, Part b) { return _mm256_add_ps(a, b); }
INLINE Part p_sub(Part a, Part b) { return _mm256_sub_ps(a, b); }
INLINE Part p_mul(Part a, Part b) { return _mm256_mul_ps(a, b); }
INLINE Part p_div(Part a, Part b) { return _mm256_div_ps(a, b); }
INLINE Part p_max(Part a, Part b) { return _mm256_max_ps(a, b); }
INLINE Part p_min(Part a, Part b) { return _mm256_min_ps(a, b); }
INLINE Part p_round(Part a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Part p_less(Part a, Part b, Part yes, Part no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
INLINE unsigned p_at_most(Part a, Part b) { return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ)); }
INLINE Part p_where(unsigned bits, Part yes, Part no) {
    __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i is = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), each), each);
    return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(is));
}
INLINE IPart p_int(Part a) { return _mm256_cvtps_epi32(a); }
INLINE Part p_float(IPart a) { return _mm256_cvtepi32_ps(a); }
INLINE Part p_bits(IPart a) { return _mm256_castsi256_ps(a); }
INLINE IPart p_bits(Part a) { return _mm256_castps_si256(a); }
INLINE IPart i_set1(int32_t x) { return _mm256_set1_epi32(x); }
INLINE IPart i_load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE void i_store(void* p, IPart a) { _mm256_storeu_si256((__m256i*)p, a); }
INLINE IPart i_add(IPart a, IPart b) { return _mm256_add_epi32(a, b); }
INLINE IPart i_and(IPart a, IPart b) { return _mm256_and_si256(a, b); }
template <int N> INLINE IPart i_shl(IPart a) { return _mm256_slli_epi32(a, N); }
template <int N> INLINE IPart i_shr(IPart a) { return _mm256_srli_epi32(a, N); }
template <int N> INLINE IPart i_sar(IPart a) { return _mm256_srai_epi32(a, N); }
template <int N> INLINE IPart i_shl16(IPart a) { return _mm256_slli_epi16(a, N); }
template <int N> INLINE IPart i_sar16(IPart a) { return _mm256_srai_epi16(a, N); }
INLINE Part p_half(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE Part p_bf16(const bf16* p) { return p_bits(i_shl<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)))); }
INLINE void p_store_low(uint16_t* p, IPart a) {
    a = _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_and_si256(a, _mm256_set1_epi32(0xffff)), _mm256_setzero_si256()), 0x08);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(a));
}
INLINE void p_store_bytes(int8_t* p, IPart a) {
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}

#elif defined(__aarch64__)

constexpr int PARTS = 4;
using Part = float32x4_t;
using IPart = int32x4_t;
INLINE Part p_set1(float x) { return vdupq_n_f32(x); }
INLINE Part p_load(const float* p) { return vld1q_f32(p); }
INLINE void p_store(float* p, Part a) { vst1q_f32(p, a); }
INLINE Part p_fma(Part a, Part b, Part c) { return vfmaq_f32(c, a, b); }
INLINE Part p_add(Part a, Part b) { return vaddq_f32(a, b); }
INLINE Part p_sub(Part a, Part b) { return vsubq_f32(a, b); }
INLINE Part p_mul(Part a, Part b) { return vmulq_f32(a, b); }
INLINE Part p_div(Part a, Part b) { return vdivq_f32(a, b); }
INLINE Part p_max(Part a, Part b) { return vmaxq_f32(a, b); }
INLINE Part p_min(Part a, Part b) { return vminq_f32(a, b); }
INLINE Part p_round(Part a) { return vrndnq_f32(a); }
INLINE Part p_less(Part a, Part b, Part yes, Part no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }
INLINE uint32x4_t p_each() {
    const uint32_t each[4] = {1, 2, 4, 8};
    return vld1q_u32(each);
}
INLINE unsigned p_at_most(Part a, Part b) { return vaddvq_u32(vandq_u32(vcleq_f32(a, b), p_each())); }
INLINE Part p_where(unsigned bits, Part yes, Part no) { return vbslq_f32(vtstq_u32(vdupq_n_u32(bits), p_each()), yes, no); }
INLINE IPart p_int(Part a) { return vcvtnq_s32_f32(a); }
INLINE Part p_float(IPart a) { return vcvtq_f32_s32(a); }
INLINE Part p_bits(IPart a) { return vreinterpretq_f32_s32(a); }
INLINE IPart p_bits(Part a) { return vreinterpretq_s32_f32(a); }
INLINE IPart i_set1(int32_t x) { return vdupq_n_s32(x); }
INLINE IPart i_load(const void* p) { return vreinterpretq_s32_u8(vld1q_u8((const uint8_t*)p)); }
INLINE void i_store(void* p, IPart a) { vst1q_u8((uint8_t*)p, vreinterpretq_u8_s32(a)); }
INLINE IPart i_add(IPart a, IPart b) { return vaddq_s32(a, b); }
INLINE IPart i_and(IPart a, IPart b) { return vandq_s32(a, b); }
template <int N> INLINE IPart i_shl(IPart a) { return vshlq_n_s32(a, N); }
template <int N> INLINE IPart i_shr(IPart a) { return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), N)); }
template <int N> INLINE IPart i_sar(IPart a) { return vshrq_n_s32(a, N); }
template <int N> INLINE IPart i_shl16(IPart a) { return vreinterpretq_s32_s16(vshlq_n_s16(vreinterpretq_s16_s32(a), N)); }
template <int N> INLINE IPart i_sar16(IPart a) { return vreinterpretq_s32_s16(vshrq_n_s16(vreinterpretq_s16_s32(a), N)); }
INLINE Part p_half(const f16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
INLINE Part p_bf16(const bf16* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
INLINE void p_store_low(uint16_t* p, IPart a) { vst1_u16(p, vmovn_u32(vreinterpretq_u32_s32(a))); }
INLINE void p_store_bytes(int8_t* p, IPart a) {
    int8x8_t bytes = vqmovn_s16(vcombine_s16(vqmovn_s32(a), vdup_n_s16(0)));
    vst1_lane_s32((int32_t*)p, vreinterpret_s32_s8(bytes), 0);
}

#endif

constexpr int WIDTH = 16 / PARTS;

struct V16 { Part part[PARTS]; };   // float32
struct I16 { IPart part[PARTS]; };  // 16 × int32, or 64 bytes
#define EACH UNROLL for (int i = 0; i < PARTS; i++)

INLINE V16 set1(float x) { V16 r; EACH r.part[i] = p_set1(x); return r; }
INLINE V16 zero() { return set1(0.f); }
INLINE V16 load(const float* p) { V16 r; EACH r.part[i] = p_load(p + i * WIDTH); return r; }
INLINE void store(float* p, V16 a) { EACH p_store(p + i * WIDTH, a.part[i]); }
INLINE V16 fma(V16 a, V16 b, V16 c) { EACH c.part[i] = p_fma(a.part[i], b.part[i], c.part[i]); return c; }
INLINE V16 operator+(V16 a, V16 b) { EACH a.part[i] = p_add(a.part[i], b.part[i]); return a; }
INLINE V16 operator-(V16 a, V16 b) { EACH a.part[i] = p_sub(a.part[i], b.part[i]); return a; }
INLINE V16 operator*(V16 a, V16 b) { EACH a.part[i] = p_mul(a.part[i], b.part[i]); return a; }
INLINE V16 operator/(V16 a, V16 b) { EACH a.part[i] = p_div(a.part[i], b.part[i]); return a; }
INLINE V16 vmax(V16 a, V16 b) { EACH a.part[i] = p_max(a.part[i], b.part[i]); return a; }
INLINE V16 vmin(V16 a, V16 b) { EACH a.part[i] = p_min(a.part[i], b.part[i]); return a; }
INLINE V16 vround(V16 a) { EACH a.part[i] = p_round(a.part[i]); return a; }
INLINE V16 where_less(V16 a, V16 b, V16 yes, V16 no) { EACH no.part[i] = p_less(a.part[i], b.part[i], yes.part[i], no.part[i]); return no; }
// Bit i of what follows is number i of the sixteen.
INLINE unsigned at_most(V16 a, V16 b) { unsigned r = 0; EACH r |= p_at_most(a.part[i], b.part[i]) << (i * WIDTH); return r; }
INLINE V16 where(unsigned bits, V16 yes, V16 no) { EACH no.part[i] = p_where(bits >> (i * WIDTH), yes.part[i], no.part[i]); return no; }
INLINE I16 to_int(V16 a) { I16 r; EACH r.part[i] = p_int(a.part[i]); return r; }
INLINE V16 to_float(I16 a) { V16 r; EACH r.part[i] = p_float(a.part[i]); return r; }
INLINE V16 as_float(I16 a) { V16 r; EACH r.part[i] = p_bits(a.part[i]); return r; }
INLINE I16 as_int(V16 a) { I16 r; EACH r.part[i] = p_bits(a.part[i]); return r; }
INLINE I16 iset1(int32_t x) { I16 r; EACH r.part[i] = i_set1(x); return r; }
INLINE I16 iload(const void* p) { I16 r; EACH r.part[i] = i_load((const char*)p + i * WIDTH * 4); return r; }
INLINE void istore(void* p, I16 a) { EACH i_store((char*)p + i * WIDTH * 4, a.part[i]); }
INLINE I16 operator+(I16 a, I16 b) { EACH a.part[i] = i_add(a.part[i], b.part[i]); return a; }
INLINE I16 operator&(I16 a, I16 b) { EACH a.part[i] = i_and(a.part[i], b.part[i]); return a; }
template <int N> INLINE I16 shl(I16 a) { EACH a.part[i] = i_shl<N>(a.part[i]); return a; }
template <int N> INLINE I16 shr(I16 a) { EACH a.part[i] = i_shr<N>(a.part[i]); return a; }
template <int N> INLINE I16 sar(I16 a) { EACH a.part[i] = i_sar<N>(a.part[i]); return a; }
template <int N> INLINE I16 shl16(I16 a) { EACH a.part[i] = i_shl16<N>(a.part[i]); return a; }  // of 32 × int16
template <int N> INLINE I16 sar16(I16 a) { EACH a.part[i] = i_sar16<N>(a.part[i]); return a; }
INLINE V16 load_half(const f16* p) { V16 r; EACH r.part[i] = p_half(p + i * WIDTH); return r; }
INLINE V16 load_bf16(const bf16* p) { V16 r; EACH r.part[i] = p_bf16(p + i * WIDTH); return r; }
INLINE void store_bytes(int8_t* p, I16 a) { EACH p_store_bytes(p + i * WIDTH, a.part[i]); }  // values within a byte

INLINE V16 load_some(const float* p, int n, float rest = 0.f) {  // the first n of 16
    if (n >= 16) return load(p);
    float buffer[16];
    for (int i = 0; i < 16; i++) buffer[i] = i < n ? p[i] : rest;
    return load(buffer);
}
INLINE void store_some(float* p, V16 a, int n) {
    if (n >= 16) return store(p, a);
    float buffer[16];
    store(buffer, a);
    memcpy(p, buffer, n * sizeof(float));
}
// Those of `bits` side by side; what lies behind them, up to p + 16, is lost. Returns how many they are.
INLINE int pack(float* p, V16 a, unsigned bits) {
#if defined(__AVX512F__)
    store(p, V16{{_mm512_maskz_compress_ps((__mmask16)bits, a.part[0])}});
    return __builtin_popcount(bits);
#else
    if (bits == 0xffff) return store(p, a), 16;
    float buffer[16];
    store(buffer, a);
    int n = 0;
    for (int i = 0; i < 16; i++) {
        p[n] = buffer[i];
        n += bits >> i & 1;
    }
    return n;
#endif
}

// The 32 bfloat16 of a panel's 16 outputs at two neighbours along k: even k in the lower halves, odd in the upper.
INLINE V16 low_bf16(I16 pair) { return as_float(shl<16>(pair)); }
INLINE V16 high_bf16(I16 pair) { return as_float(pair & iset1((int32_t)0xffff0000)); }

// The first or the last 16 of 32 IEEE halves.
template <bool LAST> INLINE V16 from_halves(I16 a) {
#if defined(__AVX512F__)
    return {{_mm512_cvtph_ps(LAST ? _mm512_extracti64x4_epi64(a.part[0], 1) : _mm512_castsi512_si256(a.part[0]))}};
#elif defined(__AVX2__)
    return {{_mm256_cvtph_ps(_mm256_castsi256_si128(a.part[LAST])), _mm256_cvtph_ps(_mm256_extracti128_si256(a.part[LAST], 1))}};
#elif defined(__aarch64__)
    float16x8_t low = vreinterpretq_f16_s32(a.part[2 * LAST]), high = vreinterpretq_f16_s32(a.part[2 * LAST + 1]);
    return {{vcvt_f32_f16(vget_low_f16(low)), vcvt_high_f32_f16(low), vcvt_f32_f16(vget_low_f16(high)), vcvt_high_f32_f16(high)}};
#endif
}

// Numbers of 8 bits (Micikevicius et al., arXiv 2209.05433), 16 outputs at four neighbours along k, j of them: [2][16][2], those
// of k + 2 and k + 3 in the upper bytes of the pairs. E5M2 is the upper half of an IEEE half. E4M3 has one bit less of
// exponent: its halves are 2^-8 of what it means, denormal or not; its NaN becomes a number.
template <bool E4M3> INLINE V16 from_fp8(I16 four, int j) {
    I16 upper = j < 2 ? shl16<8>(four) : four;
    I16 halves = E4M3 ? sar16<1>(upper) & iset1((int32_t)0xbf80bf80) : upper & iset1((int32_t)0xff00ff00);
    return j % 2 ? from_halves<true>(halves) : from_halves<false>(halves);
}

// The nearest of these, half to even, in bytes as store_bytes takes them; x is at most the largest.
template <bool E4M3> INLINE I16 to_fp8(V16 x) {
    constexpr int mantissa = E4M3 ? 3 : 2, bias = E4M3 ? 7 : 15, drop = 23 - mantissa;
    const V16 size = vmax(x, zero() - x);
    const I16 bits = as_int(size), odd = shr<drop>(bits) & iset1(1);
    I16 normal = shr<drop>(bits + odd + iset1((1 << (drop - 1)) - 1)) + iset1(-((127 - bias) << mantissa));
    // Below the least normal number, 2^(1 - bias), codes count its last places: added to what has the same last place.
    I16 small = as_int(size + set1((float)(1 << (24 - bias - mantissa)))) & iset1(15);
    I16 code = as_int(where_less(size, set1(1.f / (1 << (bias - 1))), as_float(small), as_float(normal)));
    return code + (sar<31>(as_int(x)) & iset1(-128));
}

// Sixteen numbers to choose from.
struct Sixteen {
#if defined(__AVX512F__)
    Part numbers;
#elif defined(__AVX2__)
    Part first, last;
#elif defined(__aarch64__)
    uint8x16x4_t bytes;
#endif
};
INLINE Sixteen load_sixteen(const float* p) {
#if defined(__AVX512F__)
    return {p_load(p)};
#elif defined(__AVX2__)
    return {p_load(p), p_load(p + 8)};
#elif defined(__aarch64__)
    return {vld1q_u8_x4((const uint8_t*)p)};
#endif
}
// Those at the places that the lowest four bits of `at` say.
INLINE V16 look_up(const Sixteen& table, I16 at) {
    V16 r;
#if defined(__AVX512F__)
    r.part[0] = _mm512_permutexvar_ps(at.part[0], table.numbers);
#elif defined(__AVX2__)
    EACH {
        __m256 first = _mm256_permutevar8x32_ps(table.first, at.part[i]), last = _mm256_permutevar8x32_ps(table.last, at.part[i]);
        r.part[i] = _mm256_blendv_ps(first, last, p_bits(i_shl<28>(at.part[i])));
    }
#elif defined(__aarch64__)
    EACH {
        uint32x4_t place = vandq_u32(vreinterpretq_u32_s32(at.part[i]), vdupq_n_u32(15));
        uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100), place, 0x04040404);
        r.part[i] = vreinterpretq_f32_u8(vqtbl4q_u8(table.bytes, vreinterpretq_u8_u32(bytes)));
    }
#endif
    return r;
}

// Round to nearest even, as torch does; NaN stays NaN.
INLINE bf16 to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (bf16)((bits >> 16) | 64);
    return (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
INLINE void store_bf16(bf16* p, V16 a) {
    if (at_most(a, a) == 0xffff) {
        I16 bits = as_int(a), odd = shr<16>(bits) & iset1(1), up = shr<16>(bits + iset1(0x7fff) + odd);
        EACH p_store_low(p + i * WIDTH, up.part[i]);
    } else {
        float each[16];
        bf16 rounded[16];
        store(each, a);
        for (int i = 0; i < 16; i++) rounded[i] = to_bf16(each[i]);
        memcpy(p, rounded, sizeof rounded);
    }
}
INLINE float from_bf16(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float r;
    memcpy(&r, &bits, 4);
    return r;
}

// Sums and maxima of the sixteen, always in the same tree: the upper half joins the lower, four times.
#if defined(__x86_64__)
template <bool SUM> INLINE __m256 join(__m256 a, __m256 b) { return SUM ? _mm256_add_ps(a, b) : _mm256_max_ps(a, b); }
template <bool SUM> INLINE __m128 join(__m128 a, __m128 b) { return SUM ? _mm_add_ps(a, b) : _mm_max_ps(a, b); }
template <bool SUM> INLINE float fold(V16 a) {
#if defined(__AVX512F__)
    __m256 eight = join<SUM>(_mm512_castps512_ps256(a.part[0]), _mm512_extractf32x8_ps(a.part[0], 1));
#else
    __m256 eight = join<SUM>(a.part[0], a.part[1]);
#endif
    __m128 four = join<SUM>(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = join<SUM>(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(join<SUM>(two, _mm_movehdup_ps(two)));
}
#elif defined(__aarch64__)
template <bool SUM> INLINE float fold(V16 a) {
    auto join = [](Part a, Part b) { return SUM ? p_add(a, b) : p_max(a, b); };
    Part four = join(join(a.part[0], a.part[2]), join(a.part[1], a.part[3]));
    Part two = join(four, vextq_f32(four, four, 2));
    return vgetq_lane_f32(join(two, vextq_f32(two, two, 1)), 0);
}
#endif
INLINE float sum(V16 a) { return fold<true>(a); }
INLINE float largest(V16 a) { return fold<false>(a); }

// e^x within 2 units in the last place: x = n ln 2 + r, a polynomial in r of degree 6 (Taylor's would need one more; these
// coefficients are minimax on |r| <= ln 2 / 2), and n goes into the exponent. Below -87.3 it is 0; above 88.7 infinity.
INLINE V16 vexp(V16 x) {
    V16 n = vround(x * set1(1.44269504088896341f));
    V16 r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    V16 p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, r * r, r + set1(1.f));
    V16 bounded = vmin(vmax(n, set1(-126.f)), set1(127.f));
    V16 scaled = p * as_float(shl<23>(to_int(bounded) + iset1(127)));
    scaled = where_less(x, set1(-87.3365f), zero(), scaled);
    return where_less(set1(88.72f), x, set1(__builtin_inff()), scaled);
}
INLINE V16 silu(V16 x) { return x / (set1(1.f) + vexp(zero() - x)); }
// x / 2 (1 + tanh(u)), which is x / (1 + e^-2u) (Hendrycks & Gimpel, arXiv 1606.08415).
INLINE V16 gelu_tanh(V16 x) {
    V16 u = x * fma(x * x, set1(0.044715f * 0.7978845608f), set1(0.7978845608f));
    return x / (set1(1.f) + vexp(u * set1(-2.f)));
}
// x / 2 (1 + erf(x / √2)), erf by Abramowitz & Stegun 7.1.26, within 1.5e-7.
INLINE V16 gelu(V16 x) {
    V16 z = vmax(x, zero() - x) * set1(0.70710678f), t = set1(1.f) / fma(z, set1(0.3275911f), set1(1.f));
    V16 p = fma(set1(1.061405429f), t, set1(-1.453152027f));
    p = fma(p, t, set1(1.421413741f));
    p = fma(p, t, set1(-0.284496736f));
    p = fma(p, t, set1(0.254829592f));
    V16 tail = p * t * vexp(zero() - z * z);  // 1 - erf(z)
    V16 half = x * set1(0.5f);
    return where_less(x, zero(), half * tail, half * (set1(2.f) - tail));
}
// cap · tanh(x / cap), as exact as x itself is where it is of cap's size.
INLINE V16 softcap(V16 x, float cap) {
    V16 one = set1(1.f), e = vexp(x * set1(-2.f / cap));
    e = vmin(e, set1(1e30f));  // where it is infinite
    return set1(cap) * (one - e) / (one + e);
}

// acc += the four products of each of 16 quadruples: unsigned bytes of weights, signed bytes of activations (one
// quadruple for all). LOW says that the weights are below 16.
template <bool LOW> INLINE I16 dot4(I16 acc, I16 w, I16 x) {
#if defined(__AVX512VNNI__)
    acc.part[0] = _mm512_dpbusd_epi32(acc.part[0], w.part[0], x.part[0]);
#elif defined(__AVX512BW__)
    if (LOW) {
        acc.part[0] = _mm512_add_epi32(acc.part[0], _mm512_madd_epi16(_mm512_maddubs_epi16(w.part[0], x.part[0]), _mm512_set1_epi16(1)));
    } else {  // two products of 255 · 127 don't fit into 16 bits: even and odd bytes apart
        __m512i low = _mm512_set1_epi16(0xff);
        __m512i even = _mm512_madd_epi16(_mm512_and_si512(w.part[0], low), _mm512_srai_epi16(_mm512_slli_epi16(x.part[0], 8), 8));
        __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(w.part[0], 8), _mm512_srai_epi16(x.part[0], 8));
        acc.part[0] = _mm512_add_epi32(acc.part[0], _mm512_add_epi32(even, odd));
    }
#elif defined(__AVXVNNI__)
    EACH acc.part[i] = _mm256_dpbusd_avx_epi32(acc.part[i], w.part[i], x.part[i]);
#elif defined(__AVX2__)
    EACH {
        if (LOW) {
            acc.part[i] = _mm256_add_epi32(acc.part[i], _mm256_madd_epi16(_mm256_maddubs_epi16(w.part[i], x.part[i]), _mm256_set1_epi16(1)));
        } else {
            __m256i low = _mm256_set1_epi16(0xff);
            __m256i even = _mm256_madd_epi16(_mm256_and_si256(w.part[i], low), _mm256_srai_epi16(_mm256_slli_epi16(x.part[i], 8), 8));
            __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(w.part[i], 8), _mm256_srai_epi16(x.part[i], 8));
            acc.part[i] = _mm256_add_epi32(acc.part[i], _mm256_add_epi32(even, odd));
        }
    }
#elif defined(__aarch64__)
    // Without a mixed-sign product (i8mm) the weights' offset of 128 is taken off, and put back by its own product.
    EACH {
        int8x16_t s = vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_s32(w.part[i]), vdupq_n_u8(128)));
        int8x16_t b = vreinterpretq_s8_s32(x.part[i]);
        int16x8_t lo = vmull_s8(vget_low_s8(s), vget_low_s8(b)), hi = vmull_s8(vget_high_s8(s), vget_high_s8(b));
        int32x4_t four = vpaddq_s32(vpaddlq_s16(lo), vpaddlq_s16(hi));
        int16x8_t bl = vmovl_s8(vget_low_s8(b)), bh = vmovl_s8(vget_high_s8(b));
        int32x4_t total = vpaddq_s32(vpaddlq_s16(bl), vpaddlq_s16(bh));
        acc.part[i] = vaddq_s32(acc.part[i], vaddq_s32(four, vshlq_n_s32(total, 7)));
    }
#endif
    return acc;
}

}  // namespace TGI_ISA
