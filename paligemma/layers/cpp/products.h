// What all matrix products share: the description of a call, its division into tasks, and writing the outputs.
#pragma once

#include "vectors.h"

const int TILE_ROWS = 6;     // maximum number of rows of x in a tile
const int64_t CHUNK = 512;   // maximum number of outputs in a task

// Values that depend on the machine. These defaults are replaced by those that a measurement found to be faster.
struct Tuning {              // kernels.CTuning has the same fields
    int64_t prefetch = 1024;  // with one or two rows, weights are fetched into the cache this many bytes before they are needed
    int64_t tile_rows = 16;   // the smallest number of rows that are multiplied with AMX
    int64_t many_rows = 10;   // with so many rows or more, bfloat16 weights are multiplied by many_rows.h
};
__attribute__((visibility("hidden"))) inline Tuning tuning;  // hidden: libraries for different processors do not share it
extern "C" inline __attribute__((used)) Tuning* tuning_values() { return &tuning; }

struct Matrix {  // kernels.CMatrix has the same fields
    const void* w;
    const uint16_t* scales;  // bfloat16: one per output (int8), or per output and group (int4); null for bfloat16 weights
    const uint16_t* bias;    // bfloat16[O], or null
    int64_t outputs;         // O; 0 = no matrix
};

enum Activation { NONE, GELU, GATED };

// Multiplies x[B, X] with one to three matrices and adds their biases. y[B, all outputs] has the outputs in the order of the
// matrices, after GELU if the activation is GELU. If it is GATED, there are two matrices, and y[B, O] = gelu(first) * second.
// If is_transposed, the only matrix is stored as w[X, O], as in the product that computes the gradient of x from that of y. Only
// bf16_product can do that, with X even.
struct Call {  // kernels.CCall has the same fields
    const void* x;
    int x_is_bf16;  // else float32
    int activation;
    Matrix matrices[3];
    void* y;
    int y_is_bf16;  // else float32
    int threads;
    int is_transposed;
    int64_t rows, inputs;

    bool is_gated() const { return activation == GATED; }
};

// The numbers i to i + 15 of `bias`, which has `count` numbers; 0 after its end, and 0 without a bias.
static inline F32 read_bias(const uint16_t* bias, int64_t i, int64_t count) {
    if (!bias) return F32{};
    if (i + 16 <= count) return read16(bias, i, true);
    U16 rest = {};
    memcpy(&rest, bias + i, 2 * (count - i));
    return read16(&rest, 0, true);
}

// Writes y[row, before + start + i] for the outputs start + i of a matrix, i < count, from their sums, adding the bias and
// applying the activation. `up`: the sums of the second matrix if the call is gated, else null. `width`: outputs in a row of y.
static void write_outputs(const Call& call, const Matrix& matrix, int64_t row, int64_t width, int64_t before, int64_t start,
                          int64_t count, const float* sums, const float* up) {
    const int64_t offset = row * width + before + start;
    for (int64_t i = 0; i < count; i += 16) {
        F32 out = load<F32>(sums + i) + read_bias(matrix.bias, start + i, matrix.outputs);
        if (call.activation != NONE) out = gelu(out);
        if (up) out *= load<F32>(up + i) + read_bias(call.matrices[1].bias, start + i, matrix.outputs);
        const U16 rounded = to_bf16(out);
        void* to = call.y_is_bf16 ? (char*)((uint16_t*)call.y + offset + i) : (char*)((float*)call.y + offset + i);
        if (count - i < 16) memcpy(to, call.y_is_bf16 ? (const void*)&rounded : &out, (count - i) * (call.y_is_bf16 ? 2 : 4));
        else if (call.y_is_bf16) store(to, rounded);
        else store(to, out);
    }
}

// With up to this many rows, each thread makes the small preparations between two products itself, for all rows and in memory of
// its own: that takes less time than waiting for the other threads, above all if other programs use the processor, too.
const int64_t ALONE_ROWS = 2;

// Calls work(i) for all i < count. All threads of a parallel region call this function: if `is_alone`, each thread does all the
// work for itself, else the work is divided among the threads, which then wait for each other.
template <class Work> static void divide(int64_t count, bool is_alone, const Work& work) {
    if (is_alone) {
        for (int64_t i = 0; i < count; i++) work(i);
        return;
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i++) work(i);
}

// Computes the outputs of a call. All threads of a parallel region call this function. It divides the tasks among them and waits
// until all are done. Tasks are scheduled dynamically, so if another program delays one thread, the other threads wait for at
// most one chunk.
//
// Product(call, memory): `memory` has at least Product::bytes(call). It is shared by all threads, unless there are few rows.
// Product::convert_inputs(call, is_alone) converts call.x into the form that Product::tile(matrix, first output, outputs, first
// row, rows, sums[rows][CHUNK]) needs, which computes one tile. Product::multiply_tiles(call) may compute all tiles in an order
// of its own and return true.
template <class Product> static void multiply_in_region(const Call& call, char* shared_memory) {
    const bool is_alone = call.rows <= ALONE_ROWS;
    const Product product(call, is_alone ? input_buffer.at_least(Product::bytes(call)) : shared_memory);
    product.convert_inputs(call, is_alone);
    if (product.multiply_tiles(call)) return;
    const Matrix* matrices = call.matrices;
    const int parts = call.is_gated() ? 1 : 3;
    // Few rows: large chunks, which are long ranges of memory. Many rows: chunks small enough to stay in the L1 cache while they
    // are multiplied with all rows.
    int64_t width = 0, tasks = 0, chunk = call.rows <= 2 ? CHUNK : call.rows <= 32 ? 64 : 32;
    for (int i = 0; i < parts; i++) width += matrices[i].outputs;
    while (chunk > 32 && width < 8 * chunk * call.threads) chunk /= 2;
    for (int i = 0; i < parts; i++) tasks += (matrices[i].outputs + chunk - 1) / chunk;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
        const Matrix* matrix = matrices;
        int64_t start = task * chunk, before = 0;
        for (; start >= matrix->outputs; matrix++) {
            start -= (matrix->outputs + chunk - 1) / chunk * chunk;
            before += matrix->outputs;
        }
        const int64_t count = std::min(chunk, matrix->outputs - start);
        float sums[TILE_ROWS * CHUNK], ups[TILE_ROWS * CHUNK];
        for (int64_t row = 0; row < call.rows; row += TILE_ROWS) {
            const int height = std::min<int64_t>(TILE_ROWS, call.rows - row);
            product.tile(*matrix, start, count, row, height, sums);
            if (call.is_gated()) product.tile(matrices[1], start, count, row, height, ups);
            for (int r = 0; r < height; r++) {
                const float* up = call.is_gated() ? ups + r * CHUNK : nullptr;
                write_outputs(call, *matrix, row + r, width, before, start, count, sums + r * CHUNK, up);
            }
        }
    }
}

template <class Product> static void multiply(const Call& call) {
    char* memory = input_buffer.at_least(Product::bytes(call));
#pragma omp parallel num_threads(call.threads)
    multiply_in_region<Product>(call, memory);
}

// Loads a cache line of weights and, with few rows, prefetches a later one, which gives 5 to 10 percent more GB/s.
static inline U32 stream(const void* w, int rows) {
    if (rows <= 2) __builtin_prefetch((const char*)w + tuning.prefetch, 0, 2);
    return load<U32>(w);
}
