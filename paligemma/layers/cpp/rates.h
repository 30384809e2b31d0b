// What the processor can do at most: multiply-adds per second in registers, and reading memory. roofline.py measures the times.
#pragma once

#include "amx.h"
#include "vectors.h"

#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

enum Numbers { FLOAT32, BF16, INT8 };

// Hides a value from the compiler, in its register. Otherwise the compiler would compute equal sums only once.
template <class V> static inline void hide(V& value) {
#if defined(__x86_64__)
    asm volatile("" : "+v"(value));
#elif defined(__aarch64__)
    asm volatile("" : "+w"(value));
#else
    asm volatile("" : "+m"(value));
#endif
}

// An instruction is a struct with: Sum, Factor: vector types; numbers: what it multiplies; sums: how many sums are computed at the
// same time, so many that no instruction waits for an earlier one, and so few that all stay in registers; add: the instruction;
// total: the sum of all numbers in a Sum.
template <class Sum, class Element> static double total_of(Sum sum) {
    double total = 0;
    Element parts[sizeof sum / sizeof(Element)];
    memcpy(parts, &sum, sizeof sum);
    for (Element part : parts) total += part;
    return total;
}

struct Portable {
    typedef float Sum __attribute__((vector_size(16)));
    typedef Sum Factor;
    static const int numbers = FLOAT32, sums = 12;
    static Factor ones() { return Sum{} + 1; }
    static Sum add(Sum sum, Factor x, Factor w) { return sum + x * w; }
    static double total(Sum sum) { return total_of<Sum, float>(sum); }
};

#if defined(__AVX2__) && defined(__FMA__)
struct Fma256 {
    typedef __m256 Sum;
    typedef __m256 Factor;
    static const int numbers = FLOAT32, sums = 12;
    static Factor ones() { return _mm256_set1_ps(1); }
    static Sum add(Sum sum, Factor x, Factor w) { return _mm256_fmadd_ps(x, w, sum); }
    static double total(Sum sum) { return total_of<Sum, float>(sum); }
};
struct Bytes256 {  // without VNNI: pairs of products in 16 bits, of which eight can be added when the weights have 4 bits
    typedef __m256i Sum;
    typedef __m256i Factor;
    static const int numbers = INT8, sums = 6;
    static Factor ones() { return _mm256_set1_epi8(1); }
    static Sum add(Sum sum, Factor x, Factor w) {
        __m256i pairs = _mm256_maddubs_epi16(x, w);
        UNROLL for (int i = 1; i < 8; i++) {
            hide(x);
            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(x, w));
        }
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    static double total(Sum sum) { return total_of<Sum, int32_t>(sum); }
};
#endif
#if defined(__AVX512F__)
struct Fma512 {
    typedef __m512 Sum;
    typedef __m512 Factor;
    static const int numbers = FLOAT32, sums = 24;
    static Factor ones() { return _mm512_set1_ps(1); }
    static Sum add(Sum sum, Factor x, Factor w) { return _mm512_fmadd_ps(x, w, sum); }
    static double total(Sum sum) { return total_of<Sum, float>(sum); }
};
#endif
#if defined(__AVX512BF16__)
struct Bf16Pairs {
    typedef __m512 Sum;
    typedef __m512i Factor;
    static const int numbers = BF16, sums = 24;
    static Factor ones() { return _mm512_set1_epi16(0x3f80); }
    static Sum add(Sum sum, Factor x, Factor w) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w); }
    static double total(Sum sum) { return total_of<Sum, float>(sum); }
};
#endif
#if defined(__AVX512VNNI__)
struct Bytes512 {
    typedef __m512i Sum;
    typedef __m512i Factor;
    static const int numbers = INT8, sums = 24;
    static Factor ones() { return _mm512_set1_epi8(1); }
    static Sum add(Sum sum, Factor x, Factor w) { return _mm512_dpbusd_epi32(sum, x, w); }
    static double total(Sum sum) { return total_of<Sum, int32_t>(sum); }
};
#endif
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
struct Bytes256Vnni {
    typedef __m256i Sum;
    typedef __m256i Factor;
    static const int numbers = INT8, sums = 12;
    static Factor ones() { return _mm256_set1_epi8(1); }
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    static Sum add(Sum sum, Factor x, Factor w) { return _mm256_dpbusd_epi32(sum, x, w); }
#else
    static Sum add(Sum sum, Factor x, Factor w) { return _mm256_dpbusd_avx_epi32(sum, x, w); }
#endif
    static double total(Sum sum) { return total_of<Sum, int32_t>(sum); }
};
#endif
#if defined(__ARM_NEON) && defined(__aarch64__)
struct FmaNeon {
    typedef float32x4_t Sum;
    typedef float32x4_t Factor;
    static const int numbers = FLOAT32, sums = 24;
    static Factor ones() { return vdupq_n_f32(1); }
    static Sum add(Sum sum, Factor x, Factor w) { return vfmaq_f32(sum, x, w); }
    static double total(Sum sum) { return total_of<Sum, float>(sum); }
};
#endif
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
struct Bf16Neon {  // bfmmla multiplies matrices of 2 x 4 and 4 x 2 numbers
    typedef float32x4_t Sum;
    typedef uint16x8_t Factor;
    static const int numbers = BF16, sums = 24;
    static Factor ones() {
        uint16_t one = 0x3f80;
        asm("" : "+r"(one));  // GCC 12 would make an instruction of the constant that the processor does not have
        return vdupq_n_u16(one);
    }
    static Sum add(Sum sum, Factor x, Factor w) {
        return vbfmmlaq_f32(sum, vreinterpretq_bf16_u16(x), vreinterpretq_bf16_u16(w));
    }
    static double total(Sum sum) { return total_of<Sum, float>(sum); }
};
struct Bf16PairsNeon : Bf16Neon {
    static Sum add(Sum sum, Factor x, Factor w) {
        return vbfdotq_f32(sum, vreinterpretq_bf16_u16(x), vreinterpretq_bf16_u16(w));
    }
};
#endif
#if defined(__ARM_FEATURE_DOTPROD)
struct BytesNeon {
    typedef int32x4_t Sum;
    typedef int8x16_t Factor;
    static const int numbers = INT8, sums = 24;
    static Factor ones() { return vdupq_n_s8(1); }
    static Sum add(Sum sum, Factor x, Factor w) { return vdotq_s32(sum, x, w); }
    static double total(Sum sum) { return total_of<Sum, int32_t>(sum); }
};
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
struct BytesMatrixNeon : BytesNeon {
    static Sum add(Sum sum, Factor x, Factor w) { return vmmlaq_s32(sum, x, w); }
};
#endif

// `steps` times one instruction for each sum; the sum of all sums, which is the number of multiply-adds. Every loop over `sum`
// must be unrolled completely: an array that is indexed by a variable stays in memory, and the loop runs at half the speed.
template <class I> static double multiply_in_registers(int64_t steps) {
    typename I::Factor x = I::ones(), w = I::ones();
    typename I::Sum sum[I::sums];
    UNROLL for (int i = 0; i < I::sums; i++) {
        sum[i] = typename I::Sum{};
        hide(sum[i]);
    }
    for (int64_t step = 0; step < steps; step++) {
        hide(x);
        UNROLL for (int i = 0; i < I::sums; i++) sum[i] = I::add(sum[i], x, w);
    }
    double total = 0;
    UNROLL for (int i = 0; i < I::sums; i++) total += I::total(sum[i]);
    return total;
}

#if defined(HAS_TILES) && !defined(EMULATED_TILES)
// Tiles 0 to 3 are sums of 16 x 16 numbers, tiles 4 to 7 factors of 16 rows of 64 bytes.
template <int NUMBERS> WITH_TILES static double multiply_tiles(int64_t steps) {
    if (!request_tiles()) return 0;
    TileConfiguration configuration;
    alignas(64) char ones[1024], sums[1024];
    const uint32_t word = NUMBERS == BF16 ? 0x3f803f80 : 0x01010101;
    for (int i = 0; i < 1024; i += 4) memcpy(ones + i, &word, 4);
    asm volatile("" ::"r"(ones) : "memory");
    _tile_loadd(4, ones, 64);
    _tile_loadd(5, ones, 64);
    _tile_loadd(6, ones, 64);
    _tile_loadd(7, ones, 64);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; step++) {
        if (NUMBERS == BF16) {
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        } else {
            _tile_dpbusd(0, 4, 6);
            _tile_dpbusd(1, 4, 7);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
        }
    }
    double total = 0;
    auto add = [&] {
        asm volatile("" ::"r"(sums) : "memory");
        for (int i = 0; i < 1024; i += 4) total += NUMBERS == BF16 ? load<float>(sums + i) : load<int32_t>(sums + i);
    };
    _tile_stored(0, sums, 64);
    add();
    _tile_stored(1, sums, 64);
    add();
    _tile_stored(2, sums, 64);
    add();
    _tile_stored(3, sums, 64);
    add();
    return total;
}
#endif

struct Way {
    int numbers;
    double (*run)(int64_t steps);
};
template <class I> constexpr Way way() { return {I::numbers, multiply_in_registers<I>}; }
static const Way WAYS[] = {
    way<Portable>(),
#if defined(__AVX2__) && defined(__FMA__)
    way<Fma256>(), way<Bytes256>(),
#endif
#if defined(__AVX512F__)
    way<Fma512>(),
#endif
#if defined(__AVX512BF16__)
    way<Bf16Pairs>(),
#endif
#if defined(__AVX512VNNI__)
    way<Bytes512>(),
#endif
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
    way<Bytes256Vnni>(),
#endif
#if defined(HAS_TILES) && !defined(EMULATED_TILES)
    {BF16, multiply_tiles<BF16>}, {INT8, multiply_tiles<INT8>},
#endif
#if defined(__ARM_NEON) && defined(__aarch64__)
    way<FmaNeon>(),
#endif
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    way<Bf16Neon>(), way<Bf16PairsNeon>(),
#endif
#if defined(__ARM_FEATURE_DOTPROD)
    way<BytesNeon>(),
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
    way<BytesMatrixNeon>(),
#endif
};

// What the instruction number `index` multiplies, a member of Numbers; -1 after the last one.
extern "C" int rate_numbers(int64_t index) { return index < (int64_t)(sizeof WAYS / sizeof *WAYS) ? WAYS[index].numbers : -1; }

// Multiplies ones in registers on all threads. Returns the sum of all products, so the number of multiply-adds that were computed;
// 0 if the system does not allow the instruction. Float32 sums are exact for up to 2^18 steps.
extern "C" double rate_multiply(int64_t index, int64_t steps, int threads) {
    double total = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : total)
    for (int thread = 0; thread < threads; thread++) total += WAYS[index].run(steps);
    return total;
}

// The sum of the 32-bit words of S ranges of `lines` cache lines, one after another in memory, read at the same time.
template <int S, bool PREFETCHES> static int64_t read_ranges(const char* from, int64_t lines) {
    U32 sum[S];
    UNROLL for (int s = 0; s < S; s++) sum[s] = U32{};
    for (int64_t i = 0; i < lines; i++) {
        UNROLL for (int s = 0; s < S; s++) {
            const char* line = from + 64 * (s * lines + i);
            if (PREFETCHES) __builtin_prefetch(line + 1024, 0, 2);
            sum[s] += load<U32>(line);
        }
    }
    U32 all = {};
    UNROLL for (int s = 0; s < S; s++) all += sum[s];
    return (int64_t)total_of<U32, uint32_t>(all);
}

// Reads memory on all threads in the way number `index`. Returns the sum of its 32-bit words, exact while 16 of them in one place
// of a cache line stay below 2^32; -1 after the last way. `bytes` is a multiple of 512 x threads.
extern "C" int64_t rate_read(int64_t index, const char* from, int64_t bytes, int threads) {
    decltype(&read_ranges<1, true>) ways[] = {
        read_ranges<1, false>, read_ranges<4, false>, read_ranges<8, false>,
        read_ranges<1, true>,  read_ranges<4, true>,  read_ranges<8, true>,
    };
    const int streams[] = {1, 4, 8, 1, 4, 8};
    if (index >= (int64_t)(sizeof streams / sizeof *streams)) return -1;
    const int64_t part = bytes / threads;
    int64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : total)
    for (int thread = 0; thread < threads; thread++) total += ways[index](from + thread * part, part / 64 / streams[index]);
    return total;
}
