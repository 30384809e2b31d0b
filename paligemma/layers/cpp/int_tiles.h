// Tiles of products with int8 and int4 weights: x in 8 bits, and the products of up to six of its rows with 64 outputs.
// int_formats.py documents the layouts of the weights.
#pragma once

#include "int_dots.h"
#include "products.h"

namespace ints {

const int TILE_BLOCKS = 4;  // blocks of 16 outputs in a tile
const int TILE_OUTPUTS = TILE_BLOCKS * 16;
const int64_t PART = 256;   // inputs of a part, if there are several tiles
const int64_t COLD_TILES = 4;  // with so many tiles or fewer, products are limited by reading weights, so the next are prefetched
const int64_t TASKS_PER_THREAD = 4;  // at least, if possible

// The bfloat16 numbers of one vector.
static inline Floats read_lanes(const uint16_t* x) {
    typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
    return (Floats)(__builtin_convertvector(load<Halves>(x), Words) << 16);
}

// x in 8 bits, in the order in which tiles read it. The inputs are divided into parts; in a part, tiles of up to six rows come one
// after another; in a tile, groups of inputs. Each four inputs of a group are packed (see Dots) for all rows of the tile, one
// row after another.
struct PackedRows {
    char* q;
    float* scale;    // for each part, tile and group, one per row
    int32_t* start;  // in the same order: what sums begin at, -offset * sum of q, because weights are stored as number + offset
    int64_t rows, inputs;
    int64_t height;     // rows of a tile, except the last
    int64_t part_size;  // inputs of a part, except the last

    int64_t parts() const { return (inputs + part_size - 1) / part_size; }
    int64_t tiles() const { return (rows + height - 1) / height; }
    int64_t rows_of(int64_t tile) const { return std::min(height, rows - tile * height); }
    int64_t inputs_of(int64_t part) const { return std::min(part_size, inputs - part * part_size); }
    // How many numbers were packed before a tile of a part.
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
    const float top = max(largest);
    const float inverse = top > 4e-37f ? 127 / top : 0;  // numbers for which 127 / top would be infinite become 0
    UNROLL for (int j = 0; j < N; j++) {
        F32 shifted = v[j] * inverse + ROUNDING;
        sums += shifted - ROUNDING;
        store(to + 16 * j, __builtin_convertvector((I32)shifted - ROUNDING_BITS, I8));
    }
    const float q_sum = sum(sums);  // exact; NaN if an input is NaN or infinite, because infinity * (127 / infinity) is NaN
    *total = q_sum == q_sum ? (int32_t)q_sum : 0;
    return top / 127 + (q_sum - q_sum);
}

// Packs the inputs first to first + PART - 1 of a tile; a part begins at a multiple of PART.
template <int GROUP> static void pack_tile(const Call& call, const PackedRows& x, int offset, int64_t first, int64_t tile) {
    typedef Dots<GROUP == 32> Dot;
    const int64_t height = x.rows_of(tile), part = first / x.part_size;
    const int64_t before = x.before(part, tile) + (first - part * x.part_size) * height;
    for (int64_t r = 0; r < height; r++) {
        for (int64_t i = 0; i < std::min(PART, x.inputs - first); i += GROUP) {
            char q[GROUP];
            int32_t total;
            const int64_t at = (before + i * height) / GROUP + r;
            const int64_t from = (tile * x.height + r) * x.inputs + first + i;
            x.scale[at] = round_group<GROUP / 16>(call.x, call.x_is_bf16, from, q, &total);
            x.start[at] = -offset * total;
            char* to = x.q + ((before + i * height) / 4 + r) * Dot::X_BYTES;
            for (int j = 0; j < GROUP / 4; j++) Dot::pack(q + 4 * j, to + j * height * Dot::X_BYTES);
        }
    }
}

// Weights of the four blocks of a tile, from the first group of a part on; and where to prefetch from.
struct TileWeights {
    const uint8_t* lines[TILE_BLOCKS];
    const uint16_t* scales[TILE_BLOCKS];  // int4: 16 per group
    const uint8_t* ahead[TILE_BLOCKS];
    int64_t step;  // how far `ahead` moves for each line or tile, see int_tiles
};

// Adds the products of a part of the inputs to sums[tiles][B][TILE_OUTPUTS], for consecutive tiles of B rows.
// BITS: of a stored weight; int4 weights that have been unpacked to bytes count as 8. HOT: the weights are in the L1 cache, and a
// tile prefetches `step` bytes of the next ones; else each line prefetches them.
template <int BITS, int GROUP, bool HOT, int B>
__attribute__((noinline)) static void int_tiles(const TileWeights& weights, const PackedRows& x, int64_t part, int64_t tile,
                                                int64_t tiles, float* sums) {
    typedef Dots<GROUP == 32> Dot;
    const int LINES = GROUP * BITS / 32, FOUR = Dot::X_BYTES * B;  // bytes of four inputs of all rows
    const int N = B == 1 ? TILE_OUTPUTS / LANES : Dot::VECTORS;    // vectors of sums of a row that are computed at the same time
    const int64_t before = x.before(part, tile), groups = x.inputs_of(part) / GROUP;
    for (int64_t t = 0; t < tiles; t++, sums += B * TILE_OUTPUTS) {
        if (HOT) {
            for (int c = 0; c < TILE_BLOCKS; c++) {
                for (int64_t i = 0; i < weights.step; i += 64) __builtin_prefetch(weights.ahead[c] + t * weights.step + i, 0, 2);
            }
        }
        for (int first = 0; first < TILE_OUTPUTS; first += N * LANES) {
            const int64_t at = before + t * groups * GROUP * B;
            const char* q = x.q + at / 4 * Dot::X_BYTES;
            const float* scale = x.scale + at / GROUP;
            const int32_t* start = x.start + at / GROUP;
            const uint8_t *lines[N], *ahead[N];
            const uint16_t* scales[N];
            UNROLL for (int c = 0; c < N; c++) {
                const int output = first + c * LANES, block = output / 16;
                lines[c] = weights.lines[block] + output % 16 * 4;
                scales[c] = weights.scales[block] + output % 16;
                ahead[c] = weights.ahead[block] + t * (groups * LINES * weights.step);
            }
            for (int64_t g = 0; g < groups; g++, scale += B, start += B) {
                typename Dot::Sums acc[B][N];
                UNROLL for (int r = 0; r < B; r++) {
                    UNROLL for (int c = 0; c < N; c++) acc[r][c] = Dot::begin(start[r]);
                }
                Floats factors[N];
                UNROLL for (int c = 0; c < N; c++) {
                    if (GROUP == 32) factors[c] = read_lanes(scales[c] + g * 16);
                }
                typename Dot::Line low[N], high[N];
                auto read_line = [&]() __attribute__((always_inline)) {
                    UNROLL for (int c = 0; c < N; c++) {
                        const Words packed = load<Words>(lines[c]);
                        lines[c] += 64;
                        if (!HOT && (first + c * LANES) % 16 == 0) {
                            __builtin_prefetch(ahead[c], 0, 2);
                            ahead[c] += weights.step;
                        }
                        low[c] = Dot::line(BITS == 8 ? packed : packed & 0x0f0f0f0fu);
                        if (BITS == 4) high[c] = Dot::line(packed >> 4 & 0x0f0f0f0fu);
                    }
                };
                auto multiply_row = [&](int r, const typename Dot::Line* line) __attribute__((always_inline)) {
                    UNROLL for (int c = 0; c < N; c++) Dot::add(acc[r][c], line[c], q + Dot::X_BYTES * r);
                };
                _Pragma("GCC unroll 1") for (int line = 0; line < LINES - 1; line++) {  // GCC would reorder the additions
                    read_line();
                    UNROLL for (int r = 0; r < B; r++) multiply_row(r, low);
                    q += FOUR;
                    if (BITS == 8) continue;
                    UNROLL for (int r = 0; r < B; r++) multiply_row(r, high);
                    q += FOUR;
                }
                read_line();
                if (BITS == 4) {
                    UNROLL for (int r = 0; r < B; r++) multiply_row(r, low);
                    q += FOUR;
                }
                // The sums of a row are finished while the processor multiplies the next row.
                UNROLL for (int r = 0; r <= B; r++) {
                    if (r < B) multiply_row(r, BITS == 4 ? high : low);
                    if (r == 0) continue;
                    UNROLL for (int c = 0; c < N; c++) {
                        Floats floats = __builtin_convertvector(Dot::finish(acc[r - 1][c], start[r - 1]), Floats);
                        if (GROUP == 32) floats *= factors[c];
                        float* to = sums + (r - 1) * TILE_OUTPUTS + first + c * LANES;
                        store(to, load<Floats>(to) + floats * scale[r - 1]);
                        // Keeps these sums in memory. GCC would move them to registers, and the integers out of the registers.
                        asm volatile("" ::: "memory");
                    }
                }
                q += FOUR;
            }
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

}  // namespace ints
