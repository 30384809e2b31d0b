// Products with bfloat16 weights. Those with few rows are computed here, those with many rows in many_rows.h.
#pragma once

#include "many_rows.h"
#include "tiles.h"

#if defined(__AVX512BF16__)  // the processor multiplies pairs of bfloat16, so x is used as it is
typedef uint16_t Input;
static inline F32 dot2(F32 acc, U32 w, const Input* x) {
    return (F32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)load<U32>(x));
}
#else  // x is converted to float32 (whose upper 16 bits are the bfloat16); of each 32 inputs, the even ones come first
typedef float Input;
static inline F32 dot2(F32 acc, U32 w, const Input* x) {
    acc += as_float(w << 16) * load<F32>(x);
    return acc + as_float(w & 0xffff0000u) * load<F32>(x + 16);
}
#endif

// Converts `count` numbers, a multiple of 32, for dot2.
static inline void to_inputs(const uint16_t* x, int64_t count, Input* y) {
#if defined(__AVX512BF16__)
    memcpy(y, x, count * sizeof(uint16_t));
#else
    for (int64_t i = 0; i < count; i += 32) {
        U32 pair = load<U32>(x + i);
        store(y + i, pair << 16);
        store(y + i + 16, pair & 0xffff0000u);
    }
#endif
}

// Computes sums for B rows and O outputs. The outputs are split into O ranges of `stride` rows of w; the tile computes one row of
// each range.
template <int B, int O> static void bf16_tile(const uint16_t* w, const Input* x, float* sums, int64_t stride, int64_t inputs) {
    F32 acc[B][O] = {};
    for (int64_t i = 0; i < inputs; i += 32) {
        U32 pairs[O];
        UNROLL for (int c = 0; c < O; c++) pairs[c] = stream(w + c * stride * inputs + i, B);
        UNROLL for (int r = 0; r < B; r++) {
            UNROLL for (int c = 0; c < O; c++) acc[r][c] = dot2(acc[r][c], pairs[c], x + r * inputs + i);
        }
    }
    for (int r = 0; r < B; r++) {
        for (int c = 0; c < O; c++) sums[r * CHUNK + c * stride] = sum(acc[r][c]);
    }
}

template <int B> static void bf16_rows(const uint16_t* w, const Input* x, float* sums, int64_t outputs, int64_t inputs) {
    const int O = B <= 2 ? 8 : B <= 6 ? 4 : 2;
    const int64_t stride = outputs / O;  // each of the O ranges consists of `stride` consecutive rows of w
    for (int64_t o = 0; o < stride; o++) bf16_tile<B, O>(w + o * inputs, x, sums + o, stride, inputs);
    for (int64_t o = O * stride; o < outputs; o++) bf16_tile<B, 1>(w + o * inputs, x, sums + o, 1, inputs);
}

struct Bf16Product {
    int64_t inputs;
    const Input* x;

#if defined(__AVX512BF16__)
    static int64_t bytes(const Call&) { return 0; }
    Bf16Product(const Call& call, char*) : inputs(call.inputs), x((const Input*)call.x) {}
    void convert_inputs(const Call&, bool) const {}
#else
    static int64_t bytes(const Call& call) { return call.rows * call.inputs * sizeof(Input); }
    Bf16Product(const Call& call, char* memory) : inputs(call.inputs), x((const Input*)memory) {}
    void convert_inputs(const Call& call, bool is_alone) const {
        divide(call.rows * inputs / 32, is_alone, [&](int64_t i) {
            to_inputs((const uint16_t*)call.x + 32 * i, 32, (Input*)x + 32 * i);
        });
    }
#endif

    bool multiply_tiles(const Call&) const { return false; }

    void tile(const Matrix& matrix, int64_t start, int64_t count, int64_t row, int height, float* sums) const {
        decltype(&bf16_rows<1>) tiles[] = {bf16_rows<1>, bf16_rows<2>, bf16_rows<3>, bf16_rows<4>, bf16_rows<5>, bf16_rows<6>};
        tiles[height - 1]((const uint16_t*)matrix.w + start * inputs, x + row * inputs, sums, count, inputs);
    }
};

extern "C" void bf16_product(const Call& call) {
    if (call.is_transposed) return many_rows(call);
    if (tiles::product<tiles::Bf16Weights>(call)) return;
    if (call.rows >= tuning.many_rows || call.inputs % 32) return many_rows(call);
    multiply<Bf16Product>(call);
}
