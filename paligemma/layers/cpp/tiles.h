// Products of many rows of x on processors with Intel's AMX, which multiplies tiles of 16 lines of 64 bytes.
//
// This file has not run on such a processor yet, so it is compiled only if the user asks for it (PALIGEMMA_KERNELS=amx). Its
// results are tested with an emulation of the instructions (EMULATED_TILES); its speed is an estimate.
//
// One instruction, tdpbf16ps, adds A B to C: A has 16 rows and 32 columns, B 32 rows and 16 columns, of bfloat16, C has 16 x 16
// float32. Each word of 32 bits is a pair of neighbours along the inputs:
//     A  line i: row i                          word j: inputs 2 j and 2 j + 1
//     B  line j: inputs 2 j and 2 j + 1         word i: column i
// So A holds rows of a matrix as they are in memory, and B is the same transposed, in words.
//     bfloat16 weights  A = 16 rows of w, copied; B = 16 rows of x, transposed once per call; C[output][row] is transposed at the
//                       end. Transposing the weights instead would take 64 shuffles per tile of weights, four times as many.
//     int8, int4        B = weights, because int_formats.py keeps four neighbouring inputs of 16 outputs in a line; A = x.
//                       Both are unpacked to bfloat16. An int8 weight is exact, and its scale is applied to the sums. An int4
//                       weight is multiplied by the scale of its group and rounded. x is not rounded to 8 bits.
//
// Why not tiles of int8, which take twice as many inputs per instruction? x has one scale per 64 inputs, so each int32 tile has
// to be stored, converted, scaled and added to float32 sums in registers: per tile product two tile loads (16 cycles of the load
// ports), 16 lines of C and 16 scales (16 cycles), 32 vector operations on two ports (16 cycles) and a tile store (16 cycles).
// That makes 32 cycles for 64 inputs, the time of two tile products of bfloat16, which need none of it. int4 has one scale per 32
// inputs, which makes tiles of int8 twice as slow again.
//
// Expected cost, from Intel's optimization manual: a tile product occupies its unit for 16 cycles and has a latency of 52, so
// four sums must be in progress; a tile load occupies the load ports for 8 cycles if the tile is in the L1 cache, and a tile from
// L2 takes about 20. Two tiles of weights times two tiles of x, four tile products (64 cycles), need four loads: two of weights
// from L1 (16 cycles) and two of x from L2 (40 cycles). With DEPTH = 8, the sums are loaded and stored once per 32 tile products
// (512 cycles): 4 loads and 4 stores, 100 cycles of other ports. The tile unit is the limit, at 512 multiply-adds per cycle and
// core. The other work runs beside it, if out-of-order execution reaches it in time. Per 32 inputs x 16 outputs of weights:
//     bfloat16  16 loads and stores             int8  8 loads, 16 stores, about 120 vector operations (60 cycles)
//                                               int4  4 loads, 16 stores, about 180 vector operations (90 cycles)
// With 266 rows, 17 tile products (272 cycles) use each of these tiles. Transposing C takes 64 shuffles per tile, once per
// product: 6 percent of the time with 2048 inputs, 11 percent with 1152. Measured on Zen 4, which splits vectors of 64 bytes,
// with tile instructions that do nothing: 12 to 14 cycles of other work per tile product (266 rows, 2048 inputs, 1024 outputs).
#pragma once

#include "amx.h"
#include "products.h"

#if defined(EMULATED_TILES) || (defined(HAS_TILES) && defined(__AMX_TILE__) && defined(__AMX_BF16__))
namespace tiles {

const int64_t INPUTS = 32, OUTPUTS = 16;   // of one tile of weights
const int64_t DEPTH = 8;                   // tiles along the inputs in a step: 16 KB of weights and 16 KB of x in the L1 cache
const int64_t BLOCK_ROWS = 512;            // rows of x in a task: 256 KB of x per step, in the L2 cache
const int64_t SUMS_BYTES = 512 * 1024;     // sums of a task, in the L2 cache
const int64_t TASKS_PER_THREAD = 4;        // at least, if there are enough outputs

struct Tile {
    U32 lines[16];
};

static thread_local Scratch step_buffer;  // weights of two steps; sums of a task

static Tile* aligned(char* memory) { return (Tile*)(((uintptr_t)memory + 63) / 64 * 64); }

// The words 0, 16, 1, 17, ... of a and b, numbered together; or with HIGH the words 8, 24, 9, 25, ...
template <bool HIGH> static inline U32 interleaved(U32 a, U32 b) {
#if defined(__clang__) || __GNUC__ >= 12
    if (HIGH) return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#else
    const U32 low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    return __builtin_shuffle(a, b, HIGH ? low + 8 : low);
#endif
}

// Each of the four rounds rotates the 8 bits of (line, word) by one.
static inline void transpose(Tile& tile) {
    UNROLL for (int round = 0; round < 4; round++) {
        Tile next;
        UNROLL for (int i = 0; i < 8; i++) {
            next.lines[2 * i] = interleaved<false>(tile.lines[i], tile.lines[i + 8]);
            next.lines[2 * i + 1] = interleaved<true>(tile.lines[i], tile.lines[i + 8]);
        }
        tile = next;
    }
}

// 32 numbers of a row of bfloat16, from number i on; zeros after the end of the row.
static inline U32 read_pairs(const uint16_t* row, int64_t i, int64_t count) {
    if (i + INPUTS <= count) return load<U32>(row + i);
    U32 rest = {};
    if (i < count) memcpy(&rest, row + i, 2 * (count - i));
    return rest;
}

// The 16 outputs from `start` on, of a matrix with `inputs` inputs. A format of weights below has
//     WEIGHTS_ARE_A  whether its tiles are A, else B
//     LINES          cache lines of weights in a tile
//     line           the address of one of them. Outputs after the end of the matrix are never written, so any line will do.
//     unpack         makes the tile with the inputs 32 k to 32 k + 31
//     scale          the scale of the sums
struct Outputs {
    const Matrix* matrix;
    int64_t start, inputs;
};

struct Bf16Weights {
    static const bool WEIGHTS_ARE_A = true;
    static const int LINES = 16;

    static const uint16_t* row(const Outputs& of, int i) {
        return (const uint16_t*)of.matrix->w + std::min(of.start + i, of.matrix->outputs - 1) * of.inputs;
    }
    static const void* line(const Outputs& of, int64_t k, int i) { return row(of, i) + k * INPUTS; }
    static void unpack(const Outputs& of, int64_t k, Tile& tile) {
        for (int i = 0; i < LINES; i++) tile.lines[i] = read_pairs(row(of, i), k * INPUTS, of.inputs);
    }
    static F32 scale(const Outputs&) { return F32{} + 1; }
};

template <int BITS> struct IntWeights {
    static const bool WEIGHTS_ARE_A = false;
    static const int LINES = BITS;

    static int64_t block(const Outputs& of) { return std::min(of.start, (of.matrix->outputs - 1) / 16 * 16) / 16; }
    static const void* line(const Outputs& of, int64_t k, int i) {
        return (const char*)of.matrix->w + (block(of) * of.inputs / 32 + k) * BITS * 64 + i * 64;
    }
    // The weight in the bits from `shift` on of each word. With the bits of 2^23 they are a float; their offset is subtracted.
    static F32 number(U32 words, int shift) {
        const uint32_t mask = (1 << BITS) - 1;
        return as_float((words >> shift & mask) | 0x4b000000u) - (8388608.0f + (1 << (BITS - 1)));
    }
    static void unpack(const Outputs& of, int64_t k, Tile& tile) {
        F32 scale = {};
        if (BITS == 4) scale = read16(of.matrix->scales, (block(of) * of.inputs / 32 + k) * 16, true);
        U32* to = tile.lines;
        for (int i = 0; i < LINES; i++) {
            const U32 words = load<U32>(line(of, k, i));
            UNROLL for (int half = 0; half < 8; half += BITS) {  // of int4, the low halves of the bytes are the first four inputs
                UNROLL for (int pair = half; pair < 32; pair += 16) {
                    F32 even = number(words, pair), odd = number(words, pair + 8);
                    if (BITS == 8) *to++ = (U32)even >> 16 | (U32)odd;  // 8 bits are exact in bfloat16: the other half is 0
                    else *to++ = ((U32)(even * scale) + 0x8000) >> 16 | (((U32)(odd * scale) + 0x8000) & 0xffff0000u);
                }
            }
        }
    }
    static F32 scale(const Outputs& of) { return BITS == 8 ? read16(of.matrix->scales, block(of) * 16, true) : F32{} + 1; }
};

// Adds to sums[t][h], tiles, the products of two halves of outputs, w[h][DEPTH], with T tiles of rows, x[t][DEPTH].
template <bool WEIGHTS_ARE_A, int T>
static void multiply(const Tile* w, const Tile* x, Tile* sums, int64_t depth, bool is_first) {
    asm volatile("" : : : "memory");  // in GCC 12, tile loads do not tell the compiler that they read memory
    if (is_first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 1, 64);
        if (T == 2) {
            _tile_loadd(2, sums + 2, 64);
            _tile_loadd(3, sums + 3, 64);
        }
    }
    for (int64_t k = 0; k < depth; k++) {
        _tile_loadd(4, w + k, 64);
        _tile_loadd(6, x + k, 64);
        if (WEIGHTS_ARE_A) _tile_dpbf16ps(0, 4, 6);
        else _tile_dpbf16ps(0, 6, 4);
        _tile_loadd(5, w + DEPTH + k, 64);
        if (WEIGHTS_ARE_A) _tile_dpbf16ps(1, 5, 6);
        else _tile_dpbf16ps(1, 6, 5);
        if (T == 1) continue;
        _tile_loadd(7, x + DEPTH + k, 64);
        if (WEIGHTS_ARE_A) {
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        } else {
            _tile_dpbf16ps(2, 7, 4);
            _tile_dpbf16ps(3, 7, 5);
        }
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 1, 64);
    if (T == 1) return;
    _tile_stored(2, sums + 2, 64);
    _tile_stored(3, sums + 3, 64);
}

// Two halves of 16 outputs, neighbours in one matrix or, if the call is gated, the same outputs of both matrices.
struct Strip {
    const Matrix* matrix;
    int64_t before, start, count;  // outputs of the matrices before this one; first output; outputs to write
    Outputs halves[2];
};

struct Step {
    Strip strip;
    int64_t k, depth;  // first tile and number of tiles along the inputs
};

// A task multiplies a block of rows with a few strips. A step of it takes DEPTH tiles along the inputs, so that x and sums stay
// in the L2 cache, however many inputs there are, and the weights of a step in L1. While a step is multiplied, the weights of the
// next step are unpacked, and those of the step after it are prefetched.
template <class Weights> struct Product {
    const Call& call;
    int64_t row_tiles, depth_tiles, width;  // tiles of x along rows and inputs; outputs in a row of y
    Tile* x;                                // [steps along the inputs][row_tiles][DEPTH]

    int64_t strip_outputs() const { return call.is_gated() ? OUTPUTS : 2 * OUTPUTS; }
    int64_t strips_of(const Matrix& matrix) const { return (matrix.outputs + strip_outputs() - 1) / strip_outputs(); }
    int64_t num_matrices() const { return call.is_gated() ? 1 : 3; }

    Strip strip(int64_t number) const {
        const Matrix* matrix = call.matrices;
        int64_t before = 0;
        for (; number >= strips_of(*matrix); matrix++) {
            number -= strips_of(*matrix);
            before += matrix->outputs;
        }
        const int64_t start = number * strip_outputs();
        const Outputs first = {matrix, start, call.inputs};
        const Outputs second = call.is_gated() ? Outputs{matrix + 1, start, call.inputs}
                                               : Outputs{matrix, start + OUTPUTS, call.inputs};
        return {matrix, before, start, std::min(strip_outputs(), matrix->outputs - start), {first, second}};
    }

    void pack_x(int64_t row_tile, int64_t k) const {
        Tile& tile = x[(k / DEPTH * row_tiles + row_tile) * DEPTH + k % DEPTH];
        for (int64_t r = 0; r < 16; r++) {
            const int64_t row = row_tile * 16 + r;
            const uint16_t* from = (const uint16_t*)call.x + row * call.inputs;
            tile.lines[r] = row < call.rows ? read_pairs(from, k * INPUTS, call.inputs) : U32{};
        }
        if (Weights::WEIGHTS_ARE_A) transpose(tile);
    }

    void write(const Strip& strip, int64_t row_tile, const Tile* sums) const {
        float out[16][2 * OUTPUTS];
        for (int h = 0; h < 2; h++) {
            Tile tile = sums[h];
            if (Weights::WEIGHTS_ARE_A) transpose(tile);
            const F32 scale = Weights::scale(strip.halves[h]);
            UNROLL for (int r = 0; r < 16; r++) store(out[r] + h * OUTPUTS, (F32)tile.lines[r] * scale);
        }
        for (int64_t r = 0; r < std::min<int64_t>(16, call.rows - row_tile * 16); r++) {
            const float* up = call.is_gated() ? out[r] + OUTPUTS : nullptr;
            write_outputs(call, *strip.matrix, row_tile * 16 + r, width, strip.before, strip.start, strip.count, out[r], up);
        }
    }

    // Step `number` of a task that has `count` strips, the first of which is `first`. After the last step, steps are empty.
    Step step(int64_t number, int64_t first, int64_t count) const {
        const int64_t k = number / count * DEPTH, depth = std::max<int64_t>(0, std::min(DEPTH, depth_tiles - k));
        return {strip(first + number % count), k, depth};
    }

    // Tile i of the 2 DEPTH tiles of a step.
    static void unpack(const Step& step, int64_t i, Tile* weights) {
        if (i % DEPTH < step.depth) Weights::unpack(step.strip.halves[i / DEPTH], step.k + i % DEPTH, weights[i]);
    }
    static void prefetch(const Step& step, int64_t i) {
        if (i % DEPTH >= step.depth) return;
        for (int l = 0; l < Weights::LINES; l++) {
            __builtin_prefetch(Weights::line(step.strip.halves[i / DEPTH], step.k + i % DEPTH, l), 0, 2);
        }
    }

    // Multiplies the rows of `row_count` tiles, from the tile `first_row` on, with the strips `first` to `first + count - 1`.
    void run(int64_t first_row, int64_t row_count, int64_t first, int64_t count, Tile* weights, Tile* sums) const {
        Step now = step(0, first, count), next = step(1, first, count);
        for (int64_t i = 0; i < 2 * DEPTH; i++) unpack(now, i, weights), prefetch(next, i);
        for (int64_t number = 0; now.depth; number++) {
            const Step after_next = step(number + 2, first, count);
            Tile *w = weights + number % 2 * 2 * DEPTH, *next_w = weights + (number + 1) % 2 * 2 * DEPTH;
            int64_t unpacked = 0;
            for (int64_t t = 0; t < row_count; t += 2) {
                const Tile* rows = x + (now.k / DEPTH * row_tiles + first_row + t) * DEPTH;
                Tile* c = sums + (number % count * row_count + t) * 2;
                const int64_t height = std::min<int64_t>(2, row_count - t);
                if (height == 2) multiply<Weights::WEIGHTS_ARE_A, 2>(w, rows, c, now.depth, now.k == 0);
                else multiply<Weights::WEIGHTS_ARE_A, 1>(w, rows, c, now.depth, now.k == 0);
                for (; unpacked < 2 * DEPTH * (t + height) / row_count; unpacked++) {
                    unpack(next, unpacked, next_w);
                    prefetch(after_next, unpacked);
                }
                if (now.k + now.depth < depth_tiles) continue;
                for (int64_t r = 0; r < height; r++) write(now.strip, first_row + t + r, c + 2 * r);
            }
            now = next, next = after_next;
        }
    }

    void run() {
        int64_t strips = 0;
        for (int i = 0; i < num_matrices(); i++) strips += strips_of(call.matrices[i]), width += call.matrices[i].outputs;
        row_tiles = (call.rows + 15) / 16, depth_tiles = (call.inputs + INPUTS - 1) / INPUTS;
        const int64_t block = std::min(row_tiles, BLOCK_ROWS / 16), blocks = (row_tiles + block - 1) / block;
        const int64_t sums_of_strip = block * 2 * sizeof(Tile);
        const int64_t fair = strips * blocks / (TASKS_PER_THREAD * call.threads);
        const int64_t group = std::max<int64_t>(1, std::min<int64_t>(SUMS_BYTES / sums_of_strip, fair));
        const int64_t tasks = (strips + group - 1) / group * blocks;
        x = aligned(input_buffer.at_least(((depth_tiles + DEPTH - 1) / DEPTH * row_tiles * DEPTH + 1) * sizeof(Tile)));
#pragma omp parallel num_threads(call.threads)
        {
            Tile* weights = aligned(step_buffer.at_least((4 * DEPTH + 1) * sizeof(Tile) + group * sums_of_strip));
            TileConfiguration configuration;
#pragma omp for schedule(static)
            for (int64_t tile = 0; tile < row_tiles * depth_tiles; tile++) pack_x(tile / depth_tiles, tile % depth_tiles);
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < tasks; task++) {  // the blocks of rows with the same weights come one after another
                const int64_t row = task % blocks * block, strip = task / blocks * group;
                run(row, std::min(block, row_tiles - row), strip, std::min(group, strips - strip), weights, weights + 4 * DEPTH);
            }
        }
    }
};

// Computes the product and returns true, or returns false if tiles must not or should not be used.
template <class Weights> static bool product(const Call& call) {
    static const bool allowed = request_tiles();
    if (!allowed || call.rows < tuning.tile_rows || !call.x_is_bf16) return false;
    Product<Weights>{call, 0, 0, 0, nullptr}.run();
    return true;
}

}  // namespace tiles

#else
namespace tiles {
struct Bf16Weights;
template <int BITS> struct IntWeights;
template <class Weights> static bool product(const Call&) { return false; }
}  // namespace tiles
#endif
