// Tiles of products with int8 and int4 weights: x in 8 bits, and the products of up to six of its rows with 64 outputs.
// int_formats.py documents the layouts of the weights.
#pragma once

#include "products.h"

const int TILE_BLOCKS = 4;  // blocks of 16 outputs in a tile
const int TILE_OUTPUTS = TILE_BLOCKS * 16;
const int64_t PART_INPUTS = 256;   // inputs of a part, if there are several tiles
const int64_t COLD_TILES = 4;  // with so many tiles or fewer, products are limited by reading weights, so the next are prefetched
const int64_t TASKS_PER_THREAD = 4;  // at least, if possible

// acc[o] += sum over j < 4 of w[4 o + j] * x[j], for the unsigned weights of 16 outputs and four signed inputs in one word.
static inline void dot4(I32& acc, U32 w, int32_t x) {
#if defined(__AVX512VNNI__)
    // Not _mm512_dpbusd_epi32: with 24 sums, GCC 12 copies them between registers and memory after each step.
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(U32{} + (uint32_t)x));
#elif defined(__AVX2__)
    typedef __m256i Halves __attribute__((may_alias));
    __m256i xs = _mm256_set1_epi32(x), low = _mm256_set1_epi16(255);
    __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(xs, 8), 8), x_odd = _mm256_srai_epi16(xs, 8);
    __m256i part[2];
    for (int h = 0; h < 2; h++) {
        __m256i ws = ((Halves*)&w)[h];
        part[h] = _mm256_add_epi32(_mm256_madd_epi16(_mm256_and_si256(ws, low), x_even),
                                   _mm256_madd_epi16(_mm256_srli_epi16(ws, 8), x_odd));
    }
    acc += load<I32>(part);
#else
    for (int j = 0; j < 4; j++) acc += (I32)(w >> (8 * j) & 255) * (int32_t)(int8_t)((uint32_t)x >> (8 * j));
#endif
}

// x in 8 bits, in the order in which tiles read it. The inputs are divided into parts; in a part, tiles of up to six rows come one
// after another; in a tile, groups of inputs. Each four inputs of a group have 4 n bytes for the n rows of the tile: those of the
// first row, of the second row, and so on.
struct PackedRows {
    int8_t* q;
    float* scale;    // for each part, tile and group, one per row
    int32_t* start;  // in the same order: what sums begin at, -offset * sum of q, because weights are stored as number + offset
    int64_t rows, inputs;
    int64_t height;     // rows of a tile, except the last
    int64_t part_size;  // inputs of a part, except the last

    int64_t parts() const { return (inputs + part_size - 1) / part_size; }
    int64_t tiles() const { return (rows + height - 1) / height; }
    int64_t rows_of(int64_t tile) const { return std::min(height, rows - tile * height); }
    int64_t inputs_of(int64_t part) const { return std::min(part_size, inputs - part * part_size); }
    // How many numbers q has before a tile of a part.
    int64_t before(int64_t part, int64_t tile) const {
        return (part * part_size * tiles() + tile * inputs_of(part)) * height;
    }
};

// Rounds the numbers i to i + 16 N - 1 of x to 8 bits. Returns the step between these, which is NaN if a number is not finite;
// `total` becomes their sum.
template <int N> static inline float round_group(const void* x, bool is_bf16, int64_t i, char* to, int32_t* total) {
    F32 largest = {}, sums = {}, v[N];
    UNROLL for (int j = 0; j < N; j++) {
        v[j] = read16(x, i + 16 * j, is_bf16);
        F32 size = as_float((U32)v[j] & 0x7fffffffu);
        largest = largest > size ? largest : size;
    }
    const float top = max(largest), inverse = top > 0 ? 127 / top : 0;
    UNROLL for (int j = 0; j < N; j++) {
        F32 shifted = v[j] * inverse + ROUNDING;
        sums += shifted - ROUNDING;
        store(to + 16 * j, __builtin_convertvector((I32)shifted - ROUNDING_BITS, I8));
    }
    const float q_sum = sum(sums);  // exact; NaN if an input is NaN or infinite, because infinity * (127 / infinity) is NaN
    *total = q_sum == q_sum ? (int32_t)q_sum : 0;
    return top / 127 + (q_sum - q_sum);
}

// Packs the inputs first to first + PART_INPUTS - 1 of a tile; a part begins at a multiple of PART_INPUTS.
template <int GROUP> static void pack_tile(const Call& call, const PackedRows& x, int offset, int64_t first, int64_t tile) {
    const int64_t height = x.rows_of(tile), part = first / x.part_size;
    const int64_t before = x.before(part, tile) + (first - part * x.part_size) * height;
    for (int64_t r = 0; r < height; r++) {
        for (int64_t i = 0; i < std::min(PART_INPUTS, x.inputs - first); i += GROUP) {
            char q[GROUP];
            int32_t total;
            const int64_t at = (before + i * height) / GROUP + r;
            x.scale[at] = round_group<GROUP / 16>(call.x, call.x_is_bf16, (tile * x.height + r) * x.inputs + first + i, q, &total);
            x.start[at] = -offset * total;
            int8_t* to = x.q + before + i * height + 4 * r;
            for (int j = 0; j < GROUP / 4; j++) memcpy(to + 4 * height * j, q + 4 * j, 4);
        }
    }
}

// Weights of the four blocks of a tile, from the first group of a part on; and where to prefetch from.
struct TileWeights {
    const uint8_t* lines[TILE_BLOCKS];
    const uint16_t* scales[TILE_BLOCKS];  // int4: 16 per group
    const uint8_t* ahead[TILE_BLOCKS];
    int64_t step;  // how far `ahead` moves for each line
};

// Adds the products of a part of the inputs to sums[tiles][B][TILE_OUTPUTS], for consecutive tiles of B rows. BITS: of a stored
// weight; int4 weights that have been unpacked to bytes count as 8. HOT: the weights are in the L1 cache, so nothing is prefetched.
template <int BITS, int GROUP, bool HOT, int B>
__attribute__((noinline)) static void int_tiles(const TileWeights& weights, const PackedRows& x, int64_t part, int64_t tile, int64_t tiles, float* sums) {
    const int LINES = GROUP * BITS / 32, N = TILE_BLOCKS;
    const int64_t before = x.before(part, tile), groups = x.inputs_of(part) / GROUP;
    const int8_t* q = x.q + before;
    const float* scale = x.scale + before / GROUP;
    const int32_t* start = x.start + before / GROUP;
    const uint8_t* ahead[N];
    UNROLL for (int c = 0; c < N; c++) ahead[c] = weights.ahead[c];
    const int64_t step = weights.step;
    for (; tiles > 0; tiles--, sums += B * N * 16) {
        const uint8_t* lines[N];
        const uint16_t* scales[N];
        UNROLL for (int c = 0; c < N; c++) {
            lines[c] = weights.lines[c];
            scales[c] = weights.scales[c];
        }
        if (HOT) {
            UNROLL for (int c = 0; c < N; c++) {
                for (int64_t i = 0; i < step; i += 64) __builtin_prefetch(ahead[c] + i, 0, 2);
                ahead[c] += step;
            }
        }
        for (int64_t g = 0; g < groups; g++, scale += B, start += B) {
            I32 acc[B][N];
            UNROLL for (int r = 0; r < B; r++) {
                UNROLL for (int c = 0; c < N; c++) acc[r][c] = I32{} + start[r];
            }
            F32 factors[N];
            UNROLL for (int c = 0; c < N; c++) {
                if (GROUP == 32) factors[c] = read16(scales[c] + g * 16, 0, true);
            }
            U32 low[N], high[N];
            auto read_line = [&]() __attribute__((always_inline)) {
                UNROLL for (int c = 0; c < N; c++) {
                    U32 packed = load<U32>(lines[c]);
                    lines[c] += 64;
                    if (!HOT) {
                        __builtin_prefetch(ahead[c], 0, 2);
                        ahead[c] += step;
                    }
                    low[c] = BITS == 8 ? packed : packed & 0x0f0f0f0fu;
                    if (BITS == 4) high[c] = packed >> 4 & 0x0f0f0f0fu;
                }
            };
            auto multiply_row = [&](int r, const U32* line) __attribute__((always_inline)) {
                UNROLL for (int c = 0; c < N; c++) dot4(acc[r][c], line[c], load<int32_t>(q + 4 * r));
            };
            for (int line = 0; line < LINES - 1; line++) {
                read_line();
                UNROLL for (int r = 0; r < B; r++) multiply_row(r, low);
                q += 4 * B;
                if (BITS == 8) continue;
                UNROLL for (int r = 0; r < B; r++) multiply_row(r, high);
                q += 4 * B;
            }
            read_line();
            if (BITS == 4) {
                UNROLL for (int r = 0; r < B; r++) multiply_row(r, low);
                q += 4 * B;
            }
            // The sums of a row are finished while the processor multiplies the next row.
            UNROLL for (int r = 0; r <= B; r++) {
                if (r < B) multiply_row(r, BITS == 4 ? high : low);
                if (r == 0) continue;
                UNROLL for (int c = 0; c < N; c++) {
                    F32 floats = __builtin_convertvector(acc[r - 1][c], F32);
                    if (GROUP == 32) floats *= factors[c];
                    float* to = sums + ((r - 1) * N + c) * 16;
                    store(to, load<F32>(to) + floats * scale[r - 1]);
                    // Keeps the sums in memory. GCC would move them to registers, and the integer sums out of the registers.
                    asm volatile("" ::: "memory");
                }
            }
            q += 4 * B;
        }
    }
}

// Calls int_tiles for tiles of a part; the last one may have fewer rows.
template <int BITS, int GROUP, bool HOT>
static void multiply_part(const TileWeights& w, const PackedRows& x, int64_t part, int64_t tile, int64_t tiles, float* sums) {
    decltype(&int_tiles<BITS, GROUP, HOT, 1>) functions[] = {
        int_tiles<BITS, GROUP, HOT, 1>, int_tiles<BITS, GROUP, HOT, 2>, int_tiles<BITS, GROUP, HOT, 3>,
        int_tiles<BITS, GROUP, HOT, 4>, int_tiles<BITS, GROUP, HOT, 5>, int_tiles<BITS, GROUP, HOT, 6>,
    };
    const int64_t last = x.rows_of(tile + tiles - 1), whole = tiles - (last < x.height);
    functions[x.height - 1](w, x, part, tile, whole, sums);
    if (whole < tiles) functions[last - 1](w, x, part, tile + whole, 1, sums + whole * x.height * TILE_OUTPUTS);
}
