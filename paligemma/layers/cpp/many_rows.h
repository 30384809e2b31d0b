// Products with bfloat16 weights and many rows of x, which are limited by arithmetic.
//
// A task multiplies all rows with 64 outputs. A block of the inputs of their weights is packed into a panel in the L2 cache: the
// first word of all outputs, then the second word of all outputs, and so on. So the lanes of a vector are outputs, no sum across
// lanes is needed, and the sums of a tile (6 rows x 64 outputs) stay in registers while the loop runs over the words.
//
// A word has 32 bits: two bfloat16 inputs if the processor multiplies pairs of them, else one float32.
#pragma once

#include "products.h"

const int PANEL = 64;           // outputs in a panel
const int64_t STEPS = 1024;     // maximum number of words of each output in a panel, which then has 256 KB
const int64_t ROW_BLOCK = 1024;  // maximum number of rows of a task; limits the memory for sums and for converted x
const int64_t FEW_ROWS = 64;    // tasks are not divided further: packing the weights would take a tenth of the time

#if defined(__AVX512F__)
typedef F32 Lanes;
const int VECTORS = 4, HEIGHT = 6;  // a tile has VECTORS vectors of outputs and HEIGHT rows: 24 of 32 registers
#elif defined(__AVX2__)
typedef float Lanes __attribute__((vector_size(32)));
const int VECTORS = 2, HEIGHT = 6;  // 12 of 16 registers
#else
typedef float Lanes __attribute__((vector_size(16)));
#if defined(__aarch64__)
const int VECTORS = 4, HEIGHT = 6;  // 24 of 32 registers
#else
const int VECTORS = 4, HEIGHT = 3;  // 12 of 16 registers
#endif
#endif
const int LANES = sizeof(Lanes) / sizeof(float);
const int STRIP = VECTORS * LANES;  // outputs of a tile; a panel consists of strips: [PANEL / STRIP][words][STRIP]

#if defined(__AVX512BF16__)
const int WORD_INPUTS = 2;
static inline Lanes multiply_add(Lanes acc, Lanes w, uint32_t x) {
    return (Lanes)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(x));
}
#else
const int WORD_INPUTS = 1;
static inline Lanes multiply_add(Lanes acc, Lanes w, uint32_t x) { return acc + w * load<float>(&x); }
#endif

// The rows of w that are packed into a panel, without those after the end of the matrix, in whose place the last row is repeated.
// If the matrix is transposed, w[0] is where the first row starts; each of its rows has an input of all outputs.
struct PanelRows {
    const uint16_t* w[PANEL];
};

// Weights that the thread will pack next. Tiles prefetch them into the L2 cache, a few cache lines at a time.
struct Ahead {
    PanelRows rows;
    int64_t lines, next, end;  // cache lines of each row; the next line, and the number of all lines
    int64_t stride;            // bytes from a row to the next one if the matrix is transposed, else 0

    void prefetch(int64_t count) {
        for (const int64_t stop = std::min(end, next + count); next < stop; next++) {
            const char* row = stride ? (const char*)rows.w[0] + next / lines * stride : (const char*)rows.w[next / lines];
            __builtin_prefetch(row + next % lines * 64, 0, 2);
        }
    }
};

// Adds the products of R rows of x and a strip of a panel to sums[R][PANEL]. The rows of x are `stride` words apart. In each 16
// steps, `lines` cache lines of weights are prefetched, and one of each row of x.
template <int R>
static void strip_tile(const uint32_t* strip, const uint32_t* x, int64_t stride, int64_t steps, float* sums, bool is_first,
                       Ahead& ahead, int64_t lines) {
    Lanes acc[R][VECTORS];
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < VECTORS; v++) acc[r][v] = is_first ? Lanes{} : load<Lanes>(sums + r * PANEL + v * LANES);
    }
    for (int64_t s = 0; s < steps;) {
        ahead.prefetch(lines);
        UNROLL for (int r = 0; r < R; r++) __builtin_prefetch(x + (r + R) * stride + s, 0, 2);  // of the next tile
        for (const int64_t stop = std::min(steps, s + 16); s < stop; s++, strip += STRIP) {
            Lanes w[VECTORS];
            UNROLL for (int v = 0; v < VECTORS; v++) w[v] = load<Lanes>(strip + v * LANES);
            UNROLL for (int r = 0; r < R; r++) {
                UNROLL for (int v = 0; v < VECTORS; v++) acc[r][v] = multiply_add(acc[r][v], w[v], x[r * stride + s]);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < VECTORS; v++) store(sums + r * PANEL + v * LANES, acc[r][v]);
    }
}

// Writes pair j of the inputs of some outputs to a strip: as one word for each output, or as two floats.
template <class Pairs> static inline void store_pairs(uint32_t* strip, int64_t j, Pairs pairs) {
    if (WORD_INPUTS == 2) return store(strip + j * STRIP, pairs);
    store(strip + 2 * j * STRIP, pairs << 16);
    store(strip + (2 * j + 1) * STRIP, pairs & 0xffff0000u);
}

// pack_square transposes `pairs` pairs of inputs, at most SIDE, of SIDE rows of w, and writes them to a strip.
#if defined(__AVX512F__)
const int SIDE = 16;

static inline void pack_square(const uint16_t* const* w, int64_t i, uint32_t* strip, int64_t pairs) {
    const __mmask16 mask = 0xffff >> (16 - pairs);
    __m512i a[16], b[16];
    UNROLL for (int r = 0; r < 16; r++) a[r] = _mm512_maskz_loadu_epi32(mask, w[r] + i);
    UNROLL for (int r = 0; r < 16; r += 4) {  // squares of 4 x 4 within lanes of 128 bits
        __m512i low = _mm512_unpacklo_epi32(a[r], a[r + 1]), high = _mm512_unpackhi_epi32(a[r], a[r + 1]);
        __m512i low2 = _mm512_unpacklo_epi32(a[r + 2], a[r + 3]), high2 = _mm512_unpackhi_epi32(a[r + 2], a[r + 3]);
        b[r] = _mm512_unpacklo_epi64(low, low2), b[r + 1] = _mm512_unpackhi_epi64(low, low2);
        b[r + 2] = _mm512_unpacklo_epi64(high, high2), b[r + 3] = _mm512_unpackhi_epi64(high, high2);
    }
    UNROLL for (int j = 0; j < 4; j++) {  // then whole lanes
        __m512i even = _mm512_shuffle_i32x4(b[j], b[j + 4], 0x88), odd = _mm512_shuffle_i32x4(b[j], b[j + 4], 0xdd);
        __m512i even2 = _mm512_shuffle_i32x4(b[j + 8], b[j + 12], 0x88), odd2 = _mm512_shuffle_i32x4(b[j + 8], b[j + 12], 0xdd);
        a[j] = _mm512_shuffle_i32x4(even, even2, 0x88), a[j + 4] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        a[j + 8] = _mm512_shuffle_i32x4(even, even2, 0xdd), a[j + 12] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
    UNROLL for (int j = 0; j < 16; j++) {
        if (j < pairs) store_pairs(strip, j, (U32)a[j]);
    }
}
#else
const int SIDE = 4;

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (Four){i, j, k, l})
#endif

static inline void pack_square(const uint16_t* const* w, int64_t i, uint32_t* strip, int64_t pairs) {
    typedef uint32_t Four __attribute__((vector_size(16)));
    Four rows[4] = {};
    for (int r = 0; r < 4; r++) memcpy(&rows[r], w[r] + i, pairs == 4 ? 16 : 4 * pairs);
    Four a = SHUFFLE(rows[0], rows[2], 0, 4, 1, 5), b = SHUFFLE(rows[1], rows[3], 0, 4, 1, 5);
    Four c = SHUFFLE(rows[0], rows[2], 2, 6, 3, 7), d = SHUFFLE(rows[1], rows[3], 2, 6, 3, 7);
    Four columns[4] = {SHUFFLE(a, b, 0, 4, 1, 5), SHUFFLE(a, b, 2, 6, 3, 7), SHUFFLE(c, d, 0, 4, 1, 5), SHUFFLE(c, d, 2, 6, 3, 7)};
    for (int j = 0; j < pairs; j++) store_pairs(strip, j, columns[j]);
}
#endif

// Packs `inputs` inputs of each row, an even number.
static void pack(const PanelRows& rows, int64_t inputs, uint32_t* panel) {
    for (int o = 0; o < PANEL; o += 16) {
        uint32_t* strip = panel + o / STRIP * STRIP * (inputs / WORD_INPUTS) + o % STRIP;
        for (int64_t i = 0; i < inputs; i += 2 * SIDE) {
            for (int r = 0; r < 16; r += SIDE) {
                const int64_t pairs = std::min<int64_t>(SIDE, (inputs - i) / 2);
                pack_square(rows.w + o + r, i, strip + i / WORD_INPUTS * STRIP + r, pairs);
            }
        }
    }
}

// Packs `inputs` rows, an even number, of `count` outputs of a transposed matrix, at most PANEL; the rows are `stride` apart.
static void pack_transposed(const uint16_t* w, int64_t stride, int64_t inputs, int64_t count, uint32_t* panel) {
    for (int64_t i = 0; i < inputs; i += 2) {
        U16 rows[2][PANEL / 16] = {};
        const bool is_whole = count == PANEL;
        for (int r = 0; r < 2; r++) memcpy(rows[r], w + (i + r) * stride, is_whole ? sizeof rows[r] : count * sizeof(uint16_t));
        for (int o = 0; o < PANEL; o += 16) {
            uint32_t* strip = panel + o / STRIP * STRIP * (inputs / WORD_INPUTS) + o % STRIP;
            const U32 first = __builtin_convertvector(rows[0][o / 16], U32), second = __builtin_convertvector(rows[1][o / 16], U32);
            store_pairs(strip, i / 2, first | second << 16);
        }
    }
}

// `count` numbers of x as words: pairs as they are, or each number as float32.
static const uint32_t* as_words(const uint16_t* x, int64_t count, int threads) {
    if (WORD_INPUTS == 2) return (const uint32_t*)x;
    uint32_t* words = (uint32_t*)input_buffer.at_least(count * sizeof(uint32_t));
#pragma omp parallel for num_threads(threads) schedule(static) if (count > 65536)
    for (int64_t i = 0; i < count; i++) words[i] = (uint32_t)x[i] << 16;
    return words;
}

// The product of a block of rows, which may be divided into parts if there are more threads than panels. If the product is gated,
// the first half of a panel has outputs of the first matrix, and the second half has the same outputs of the second matrix.
struct ManyRows {
    const Call& call;
    int64_t first_row, rows;
    const uint32_t* x;
    int64_t width;             // outputs in a row of y
    int64_t outputs, panels;   // maximum number of outputs of a task; number of panels
    int64_t part_rows, parts;  // rows of a task; number of parts of the block

    struct Task {
        const Matrix* matrix;
        int64_t before, start;    // outputs of the matrices before this one; first output in the matrix
        int64_t first_row, rows;  // in the block
    };

    Task find(int64_t number) const {
        const int64_t row = number % parts * part_rows;
        Task task = {call.matrices, 0, number / parts * outputs, row, std::min(part_rows, rows - row)};
        for (; task.start >= task.matrix->outputs; task.matrix++) {
            task.start -= (task.matrix->outputs + outputs - 1) / outputs * outputs;
            task.before += task.matrix->outputs;
        }
        return task;
    }

    PanelRows panel_rows(const Task& task, int64_t first_input) const {
        PanelRows rows;
        if (call.is_transposed) {
            rows.w[0] = (const uint16_t*)task.matrix->w + first_input * task.matrix->outputs + task.start;
            return rows;
        }
        for (int64_t o = 0; o < PANEL; o++) {
            const Matrix& matrix = o < outputs ? *task.matrix : call.matrices[1];
            const int64_t row = std::min(task.start + o % outputs, matrix.outputs - 1);
            rows.w[o] = (const uint16_t*)matrix.w + row * call.inputs + first_input;
        }
        return rows;
    }

    // Computes a task, and meanwhile prefetches weights of task number `next`.
    void compute(const Task& task, int64_t next, uint32_t* panel, float* sums) const {
        decltype(&strip_tile<1>) tiles[] = {strip_tile<1>, strip_tile<2>, strip_tile<3>,
                                            strip_tile<4>, strip_tile<5>, strip_tile<6>};
        const int64_t block = STEPS * WORD_INPUTS, stride = call.inputs / WORD_INPUTS;
        for (int64_t i = 0; i < call.inputs; i += block) {
            const int64_t inputs = std::min(block, call.inputs - i), steps = inputs / WORD_INPUTS;
            const bool is_last = i + inputs == call.inputs;
            const PanelRows rows = panel_rows(task, i);
            if (call.is_transposed) pack_transposed(rows.w[0], task.matrix->outputs, inputs, size(task), panel);
            else pack(rows, inputs, panel);
            Ahead ahead = {};
            if (!is_last || next < panels * parts) {
                const int64_t next_inputs = std::min(block, is_last ? call.inputs : call.inputs - i - inputs);
                ahead.rows = is_last ? panel_rows(find(next), 0) : panel_rows(task, i + inputs);
                ahead.stride = call.is_transposed ? task.matrix->outputs * 2 : 0;
                ahead.lines = call.is_transposed ? PANEL * 2 / 64 : next_inputs * 2 / 64;
                ahead.end = (call.is_transposed ? next_inputs : PANEL) * ahead.lines;
            }
            const int64_t count = (task.rows + HEIGHT - 1) / HEIGHT * (PANEL / STRIP);  // of tiles
            const int64_t lines = ahead.end / (count * ((steps + 15) / 16)) + 1;
            for (int64_t row = 0; row < task.rows; row += HEIGHT) {
                const int height = std::min<int64_t>(HEIGHT, task.rows - row);
                const int64_t y_row = first_row + task.first_row + row;
                float* tile_sums = sums + row * PANEL;
                const uint32_t* tile_x = x + (task.first_row + row) * stride + i / WORD_INPUTS;
                if (is_last) prefetch_outputs(task, y_row, height);
                for (int o = 0; o < PANEL; o += STRIP) {
                    tiles[height - 1](panel + o * steps, tile_x, stride, steps, tile_sums + o, i == 0, ahead, lines);
                }
                for (int r = 0; is_last && r < height; r++, tile_sums += PANEL) {
                    write_outputs(call, *task.matrix, y_row + r, width, task.before, task.start, size(task), tile_sums,
                                  call.is_gated() ? tile_sums + outputs : nullptr);
                }
            }
        }
    }

    int64_t size(const Task& task) const { return std::min<int64_t>(outputs, task.matrix->outputs - task.start); }

    // Fetches the lines of y that a tile will write. Without always_inline, GCC removes the calls, because they have no result.
    __attribute__((always_inline)) void prefetch_outputs(const Task& task, int64_t row, int height) const {
        const int64_t bytes = call.y_is_bf16 ? 2 : 4;
        for (int r = 0; r < height; r++) {
            const char* y = (const char*)call.y + ((row + r) * width + task.before + task.start) * bytes;
            for (int64_t i = 0; i < size(task) * bytes; i += 64) __builtin_prefetch(y + i, 1);
        }
    }
};

static thread_local Scratch panel_buffer;

static void many_rows(const Call& call) {
    const int64_t outputs = call.is_gated() ? PANEL / 2 : PANEL;
    int64_t width = 0, panels = 0;
    for (int i = 0; i < (call.is_gated() ? 1 : 3); i++) {
        width += call.matrices[i].outputs;
        panels += (call.matrices[i].outputs + outputs - 1) / outputs;
    }
    for (int64_t row = 0; row < call.rows; row += ROW_BLOCK) {
        const int64_t rows = std::min(ROW_BLOCK, call.rows - row);
        int64_t parts = 1;
        while (panels * parts < 4 * call.threads && rows > FEW_ROWS * parts) parts++;
        const int64_t part_rows = (rows + parts - 1) / parts + HEIGHT - 1, whole = part_rows - part_rows % HEIGHT;
        const uint32_t* x = as_words((const uint16_t*)call.x + row * call.inputs, rows * call.inputs, call.threads);
        const ManyRows product = {call, row, rows, x, width, outputs, panels, whole, (rows + whole - 1) / whole};
        std::atomic<int64_t> counter{0};
#pragma omp parallel num_threads(call.threads)
        {
            char* memory = panel_buffer.at_least(PANEL * sizeof(float) * (STEPS + ROW_BLOCK) + 64);
            memory += 64 - (uintptr_t)memory % 64;  // whole cache lines
            uint32_t* panel = (uint32_t*)memory;
            for (int64_t task = counter++; task < panels * product.parts;) {
                const int64_t next = counter++;  // taken before it is computed, so that its weights can be prefetched
                product.compute(product.find(task), next, panel, (float*)(panel + PANEL * STEPS));
                task = next;
            }
        }
    }
}
