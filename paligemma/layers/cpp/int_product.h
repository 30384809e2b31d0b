// Products with int8 and int4 weights; int_formats.py documents their layouts.
//
// Up to six rows of x are one tile, which reads all inputs. With more rows, the inputs are divided into parts of 256: the weights
// of a part and 64 outputs, 16 KB, stay in the L1 cache while they are multiplied with all tiles.
#pragma once

#include "int_tiles.h"
#include "tiles.h"

namespace ints {

static thread_local Scratch sums_buffer;  // of all rows for 64 outputs

// Unpacks the int4 weights of a part to lines of bytes.
static void unpack(TileWeights& w, int64_t inputs, uint8_t* to) {
    for (int c = 0; c < TILE_BLOCKS; c++) {
        const uint8_t* from = w.lines[c];
        w.lines[c] = to;
        for (int64_t i = 0; i < inputs; i += 8, from += 64, to += 128) {
            const U32 packed = load<U32>(from);
            store(to, packed & 0x0f0f0f0fu);
            store(to + 64, packed >> 4 & 0x0f0f0f0fu);
        }
    }
}

template <int BITS, int GROUP> struct IntProduct {
    PackedRows x;

    static int64_t padded_count(const Call& call) {  // whole tiles
        const int64_t rows = call.rows <= TILE_ROWS ? call.rows : (call.rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
        return rows * call.inputs;
    }

    static int64_t bytes_of_numbers(const Call& call) { return padded_count(call) / 4 * Dots<BITS == 4>::X_BYTES; }

    static int64_t bytes(const Call& call) {
        return bytes_of_numbers(call) + padded_count(call) / GROUP * (sizeof(float) + sizeof(int32_t));
    }

    IntProduct(const Call& call, char* memory) {
        const bool is_one_tile = call.rows <= TILE_ROWS;
        x.q = memory;
        x.scale = (float*)(memory + bytes_of_numbers(call));
        x.start = (int32_t*)(x.scale + padded_count(call) / GROUP);
        x.rows = call.rows, x.inputs = call.inputs;
        x.height = is_one_tile ? call.rows : TILE_ROWS, x.part_size = is_one_tile ? call.inputs : PART;
    }

    // Packs PART inputs of a tile at a time. If a part has more, it consists of several of these pieces.
    void convert_inputs(const Call& call, bool is_alone) const {
        const int64_t pieces = (x.inputs + PART - 1) / PART;
        divide(x.rows ? pieces * x.tiles() : 0, is_alone, [&](int64_t i) {
            pack_tile<GROUP>(call, x, 1 << (BITS - 1), i % pieces * PART, i / pieces);
        });
    }

    // The weights of the blocks first, first + stride, ... from a part of the inputs on. There are none after the block `last`,
    // which is multiplied again instead.
    TileWeights tile_weights(const Matrix& matrix, int64_t first, int64_t stride, int64_t last, int64_t part) const {
        TileWeights w = {};
        for (int c = 0; c < TILE_BLOCKS; c++) {
            const int64_t before = std::min(first + c * stride, last) * 16 * x.inputs + part * x.part_size * 16;
            w.lines[c] = (const uint8_t*)matrix.w + before * BITS / 8;
            w.scales[c] = matrix.scales + (BITS == 4 ? before / GROUP : 0);
        }
        return w;
    }

    static F32 output_scale(const Matrix& matrix, int64_t block) {
        return BITS == 8 ? read16(matrix.scales, block * 16, true) : F32{} + 1;
    }

    // If x is one tile: four ranges of blocks, of which a step takes one each, so that four long ranges of memory are read.
    void tile(const Matrix& matrix, int64_t start, int64_t count, int64_t, int height, float* sums) const {
        const int64_t first = start / 16, blocks = (count + 15) / 16, stride = (blocks + TILE_BLOCKS - 1) / TILE_BLOCKS;
        for (int64_t b = 0; b < stride; b++) {
            alignas(64) float part[TILE_ROWS * TILE_OUTPUTS];
            memset(part, 0, height * TILE_OUTPUTS * sizeof(float));
            TileWeights w = tile_weights(matrix, first + b, stride, first + blocks - 1, 0);
            for (int c = 0; c < TILE_BLOCKS; c++) w.ahead[c] = w.lines[c] + tuning.prefetch;
            w.step = 64;
            multiply_part<BITS, GROUP, false>(w, x, 0, 0, 1, part);
            for (int64_t c = 0, block = b; c < TILE_BLOCKS && block < blocks; c++, block += stride) {
                const F32 scale = output_scale(matrix, first + block);
                for (int r = 0; r < height; r++) {
                    store(sums + r * CHUNK + block * 16, load<F32>(part + r * TILE_OUTPUTS + c * 16) * scale);
                }
            }
        }
    }

    // Computes sums[rows of the tiles][TILE_OUTPUTS] for four blocks, without the scales of int8.
    void sum_blocks(const Matrix& matrix, int64_t first, int64_t tile, int64_t tiles, float* sums) const {
        const int64_t last = (matrix.outputs - 1) / 16;
        alignas(64) uint8_t unpacked[BITS == 4 ? PART * TILE_OUTPUTS : 1];
        memset(sums, 0, tiles * x.height * TILE_OUTPUTS * sizeof(float));
        for (int64_t part = 0; part < x.parts(); part++) {
            TileWeights w = tile_weights(matrix, first, 1, last, part);
            // While a part is multiplied with all tiles, the next part is prefetched.
            const int64_t bytes = x.inputs_of(part) * 2 * BITS;
            for (int c = 0; c < TILE_BLOCKS; c++) w.ahead[c] = w.lines[c] + bytes;
            if (tiles <= COLD_TILES) {
                w.step = 64 / tiles;
                multiply_part<BITS, GROUP, false>(w, x, part, tile, tiles, sums);
            } else {
                if (BITS == 4) unpack(w, x.inputs_of(part), unpacked);
                w.step = (bytes / 64 + tiles - 1) / tiles * 64;
                multiply_part<8, GROUP, true>(w, x, part, tile, tiles, sums);
            }
        }
    }

    // If x has several tiles, computes all outputs and returns true. A task takes 64 outputs and all tiles; if that makes too few
    // tasks for the threads, a part of the tiles.
    bool multiply_tiles(const Call& call) const {
        if (call.rows <= TILE_ROWS) return false;
        int64_t width = 0, chunks = 0;
        for (int i = 0; i < (call.is_gated() ? 1 : 3); i++) {
            width += call.matrices[i].outputs;
            chunks += (call.matrices[i].outputs + TILE_OUTPUTS - 1) / TILE_OUTPUTS;
        }
        const int64_t wanted = std::min(x.tiles(), (TASKS_PER_THREAD * call.threads + chunks - 1) / chunks);
        const int64_t tiles = (x.tiles() + wanted - 1) / wanted, ranges = (x.tiles() + tiles - 1) / tiles;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < chunks * ranges; task++) {
            const Matrix* matrix = call.matrices;
            int64_t start = task / ranges * TILE_OUTPUTS, before = 0;
            for (; start >= matrix->outputs; matrix++) {
                start -= (matrix->outputs + TILE_OUTPUTS - 1) / TILE_OUTPUTS * TILE_OUTPUTS;
                before += matrix->outputs;
            }
            const int64_t tile = task % ranges * tiles, height = std::min(tiles, x.tiles() - tile);
            const int64_t size = tiles * x.height * TILE_OUTPUTS;
            float *sums = (float*)sums_buffer.at_least(2 * size * sizeof(float)), *ups = sums + size;
            sum_blocks(*matrix, start / 16, tile, height, sums);
            if (call.is_gated()) sum_blocks(call.matrices[1], start / 16, tile, height, ups);
            const int64_t row = tile * x.height, rows = std::min(height * x.height, x.rows - row);
            const int64_t count = std::min<int64_t>(TILE_OUTPUTS, matrix->outputs - start);
            for (int64_t r = 0; r < rows; r++, sums += TILE_OUTPUTS, ups += TILE_OUTPUTS) {
                // Rows of y are far apart, so the processor does not know which cache lines will be written next.
                const int64_t later = (row + r + 8) * width + before + start, bytes = call.y_is_bf16 ? 2 : 4;
                for (int64_t i = 0; i < count * bytes; i += 64) __builtin_prefetch((const char*)call.y + later * bytes + i, 1);
                for (int64_t i = 0; BITS == 8 && i < count; i += 16) {
                    store(sums + i, load<F32>(sums + i) * output_scale(*matrix, (start + i) / 16));
                    if (call.is_gated()) store(ups + i, load<F32>(ups + i) * output_scale(call.matrices[1], (start + i) / 16));
                }
                write_outputs(call, *matrix, row + r, width, before, start, count, sums, call.is_gated() ? ups : nullptr);
            }
        }
        return true;
    }
};

}  // namespace ints

typedef ints::IntProduct<8, 64> Int8Product;
typedef ints::IntProduct<4, 32> Int4Product;
extern "C" void int8_product(const Call& call) {
    if (!tiles::product<tiles::IntWeights<8>>(call)) multiply<Int8Product>(call);
}
extern "C" void int4_product(const Call& call) {
    if (!tiles::product<tiles::IntWeights<4>>(call)) multiply<Int4Product>(call);
}
