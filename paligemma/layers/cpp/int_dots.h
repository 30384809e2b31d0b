// Products of unsigned weights of 8 or 4 bits with numbers of 8 bits, in the way that is fastest for the processor.
//
// Dots<IS_INT4> adds up the products of a group of inputs (64 inputs of int8, 32 of int4) for LANES outputs:
//     pack    converts four inputs of x to X_BYTES bytes, the form that `add` needs
//     begin   the sums before the first input; `start` is what they begin at
//     line    prepares the weights of four inputs, one word of four bytes per output, for all rows of x
//     add     adds their products with four inputs of a row of x
//     finish  the sums after the last input
// VECTORS of sums, for each of six rows of x, fill the registers: there are 32, or 16 with AVX2 and older.
#pragma once

#include "vectors.h"
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace ints {

#if defined(__AVX512BW__)
const int LANES = 16;
#elif defined(__AVX2__)
const int LANES = 8;
#else
const int LANES = 4;
#endif
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));
typedef float Floats __attribute__((vector_size(4 * LANES)));

static inline Words four_inputs(const char* x) { return Words{} + load<uint32_t>(x); }

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_MATMUL_INT8) || defined(__ARM_FEATURE_DOTPROD)

// Arm's older dot product is one of signed numbers. Weights of 4 bits are positive as signed numbers, too.
#if defined(__ARM_FEATURE_DOTPROD) && !defined(__ARM_FEATURE_MATMUL_INT8)
const bool HAS_SIGNED_WEIGHTS = true;
#else
const bool HAS_SIGNED_WEIGHTS = false;
#endif

template <bool IS_INT4> struct Dots {
    typedef Ints Sums;
    typedef Words Line;
    static const int X_BYTES = 4;
    static const bool IS_SIGNED = HAS_SIGNED_WEIGHTS && !IS_INT4;
#if defined(__AVXVNNI__) && !defined(__AVX512VNNI__)
    static const int VECTORS = 2;
#else
    static const int VECTORS = 4;
#endif

    static void pack(const char* x, char* to) { memcpy(to, x, 4); }
    static Sums begin(int32_t start) { return Ints{} + (IS_SIGNED ? 0 : start); }
    static Line line(Words w) { return IS_SIGNED ? w ^ 0x80808080u : w; }  // w - 128
    static void add(Sums& sums, Line w, const char* x) {
        // The instructions of x86 are not called by intrinsics, because GCC 12 then copies the sums between registers and memory.
#if defined(__AVX512VNNI__)
        asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(w), "v"(four_inputs(x)));
#elif defined(__AVXVNNI__)
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(w), "x"(four_inputs(x)));
#elif defined(__ARM_FEATURE_MATMUL_INT8)
        sums = (Ints)vusdotq_s32((int32x4_t)sums, (uint8x16_t)w, (int8x16_t)four_inputs(x));
#else
        sums = (Ints)vdotq_s32((int32x4_t)sums, (int8x16_t)w, (int8x16_t)four_inputs(x));
#endif
    }
    static Ints finish(Sums sums, int32_t) { return sums; }
};

#elif defined(__SSE2__)

#if defined(__AVX512BW__)
static inline Ints add_pairs(Shorts a, Shorts b) { return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
static inline Shorts add_pairs(Words w, Words x) { return (Shorts)_mm512_maddubs_epi16((__m512i)w, (__m512i)x); }
#elif defined(__AVX2__)
static inline Ints add_pairs(Shorts a, Shorts b) { return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
static inline Shorts add_pairs(Words w, Words x) { return (Shorts)_mm256_maddubs_epi16((__m256i)w, (__m256i)x); }
#else
static inline Ints add_pairs(Shorts a, Shorts b) { return (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b); }
#if defined(__SSSE3__)
static inline Shorts add_pairs(Words w, Words x) { return (Shorts)_mm_maddubs_epi16((__m128i)w, (__m128i)x); }
#endif
#endif

// Bytes are multiplied as numbers of 16 bits: the bytes 0 and 2 of each word, then 1 and 3.
template <bool IS_INT4> struct Dots {
    typedef Ints Sums;
    struct Line {
        Shorts even, odd;
    };
    static const int X_BYTES = 8, VECTORS = 2;  // a line of weights takes two registers for each vector

    static void pack(const char* x, char* to) {
        for (int j = 0; j < 4; j++) store<int16_t>(to + (j % 2 * 2 + j / 2) * 2, (int8_t)x[j]);
    }
    static Sums begin(int32_t start) { return Ints{} + start; }
    static Line line(Words w) { return {(Shorts)(w & 0x00ff00ffu), (Shorts)(w >> 8 & 0x00ff00ffu)}; }
    static void add(Sums& sums, Line w, const char* x) {
        sums += add_pairs(w.even, (Shorts)four_inputs(x)) + add_pairs(w.odd, (Shorts)four_inputs(x + 4));
    }
    static Ints finish(Sums sums, int32_t) { return sums; }
};

#if defined(__SSSE3__)
// Sums of 16 bits: a group of int4 has 16 products per lane, each of at most 15 * 127, together 30480.
template <> struct Dots<true> {
    typedef Shorts Sums;
    typedef Words Line;
    static const int X_BYTES = 4, VECTORS = LANES == 16 ? 4 : 2;

    static void pack(const char* x, char* to) { memcpy(to, x, 4); }
    static Sums begin(int32_t) { return Shorts{}; }
    static Line line(Words w) { return w; }
    static void add(Sums& sums, Line w, const char* x) { sums += add_pairs(w, four_inputs(x)); }
    static Ints finish(Sums sums, int32_t start) { return add_pairs(sums, Shorts{} + 1) + start; }
};
#endif

#else

template <bool IS_INT4> struct Dots {
    typedef Ints Sums;
    typedef Words Line;
    static const int X_BYTES = 4, VECTORS = 2;

    static void pack(const char* x, char* to) { memcpy(to, x, 4); }
    static Sums begin(int32_t start) { return Ints{} + start; }
    static Line line(Words w) { return w; }
    static void add(Sums& sums, Line w, const char* x) {
        for (int j = 0; j < 4; j++) sums += (Ints)(w >> (8 * j) & 255) * (int32_t)(int8_t)x[j];
    }
    static Ints finish(Sums sums, int32_t) { return sums; }
};

#endif

}  // namespace ints
