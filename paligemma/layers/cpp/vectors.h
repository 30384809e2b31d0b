// Vectors of 16 lanes, as the compiler's own vector types, and functions of them. Only the dot products of bfloat16 and 8-bit
// numbers, in the other files, use intrinsics.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

typedef float F32 __attribute__((vector_size(64)));
typedef int32_t I32 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(32)));
typedef int8_t I8 __attribute__((vector_size(16)));
#define UNROLL _Pragma("GCC unroll 32")

template <class T> static inline T load(const void* from) {
    T value;
    memcpy(&value, from, sizeof value);
    return value;
}
template <class T> static inline void store(void* to, T value) { memcpy(to, &value, sizeof value); }
static inline F32 as_float(U32 bits) { return (F32)bits; }

static inline U16 to_bf16(F32 value) {  // rounds to nearest even; a NaN keeps its top bits and stays a NaN
#if defined(__AVX512BF16__)
    return (U16)_mm512_cvtneps_pbh((__m512)value);  // numbers below 1.2e-38 become 0
#else
    U32 bits = (U32)value, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(value == value ? rounded : (bits >> 16 | 0x40), U16);
#endif
}

typedef float F8 __attribute__((vector_size(32)));
typedef float F4 __attribute__((vector_size(16)));
template <class Half, class Whole> static inline void halve(Whole v, Half parts[2]) { memcpy(parts, &v, sizeof v); }

static inline float sum(F32 v) {
    F8 eights[2];
    F4 fours[2];
    halve(v, eights);
    halve(eights[0] + eights[1], fours);
    const F4 four = fours[0] + fours[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

static inline float max(F32 v) {
    F8 eights[2];
    F4 fours[2];
    halve(v, eights);
    halve(eights[0] > eights[1] ? eights[0] : eights[1], fours);
    const F4 four = fours[0] > fours[1] ? fours[0] : fours[1];
    return std::max(std::max(four[0], four[2]), std::max(four[1], four[3]));
}

struct alignas(64) CacheLine {  // vectors that lie in two cache lines are read and written at half the speed
    char bytes[64];
};

// Memory that is kept until the calling thread ends and only grows, so that a decoding step allocates nothing.
struct Scratch {
    std::unique_ptr<CacheLine[]> memory;
    size_t size = 0;
    char* at_least(size_t wanted) {
        if (wanted > size || !memory) memory.reset(new CacheLine[wanted / sizeof(CacheLine) + 1]), size = wanted;
        return memory[0].bytes;
    }
};
static thread_local Scratch input_buffer, query_buffer, score_buffer, layer_buffer, shared_buffer, logits_buffer;

static inline F32 read16(const void* x, int64_t i, bool is_bf16) {
    if (!is_bf16) return load<F32>((const float*)x + i);
    return as_float(__builtin_convertvector(load<U16>((const uint16_t*)x + i), U32) << 16);
}

// 1.5 x 2^23. Adding this number to a float of magnitude below 2^22 leaves the rounded integer in the lowest bits of the sum;
// subtracting it again gives the rounded float.
const float ROUNDING = 12582912.0f;
const int32_t ROUNDING_BITS = 0x4b400000;

// e^x, with an error of one or two units in the last place: 2^n, made from the bits of the exponent, times a polynomial.
static inline F32 exponential(F32 x) {
    const F32 low = F32{} - 87.0f, high = F32{} + 88.0f;
#if defined(__AVX512F__)
    x = (F32)_mm512_min_ps((__m512)high, _mm512_max_ps((__m512)low, (__m512)x));  // a NaN stays
#else
    x = x < low ? low : x;
    x = x > high ? high : x;
#endif
    F32 n = (x * 1.44269504f + ROUNDING) - ROUNDING;
    F32 r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    F32 p = 1 + r * (1 + r * (0.5f + r * (0.166666672f + r * (0.0416657962f + r * (0.00833345205f + r * 0.00139313773f)))));
#if defined(__AVX512F__)
    return (F32)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return as_float((U32)p + ((U32)__builtin_convertvector(n, I32) << 23));
#endif
}
// The tanh approximation of GELU.
static inline F32 gelu(F32 x) { return x / (1 + exponential(x * (-1.59576912f - 0.0713548163f * x * x))); }
