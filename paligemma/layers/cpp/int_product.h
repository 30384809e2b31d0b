// Products with int8 and int4 weights; int_formats.py documents their layouts.
#pragma once

#include "products.h"
#include "tiles.h"

// acc[o] += sum over j < 4 of w[4 o + j] * x[j], for the unsigned weights of 16 outputs and four signed inputs in one word.
static inline I32 dot4(I32 acc, U32 w, int32_t x) {
#if defined(__AVX512VNNI__)
    return (I32)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
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
    return acc + load<I32>(part);
#else
    for (int j = 0; j < 4; j++) acc += (I32)(w >> (8 * j) & 255) * (int32_t)(int8_t)((uint32_t)x >> (8 * j));
    return acc;
#endif
}

// Rows of x in 8 bits, with one scale per group of inputs. Weights are stored with an offset, as q + 128 (int8) or q + 8 (int4),
// which adds offset * sum(x) to each sum, so sums begin at `start` = -offset * sum(x).
struct Rows {
    int8_t* q;
    float* scale;
    int32_t* start;
    int64_t inputs, groups;
};

template <int GROUP>
static void quantize_group(const void* x, bool is_bf16, int64_t i, int weight_offset, Rows rows) {
    F32 largest = {}, nan = {}, v[GROUP / 16];
    for (int j = 0; j < GROUP / 16; j++) {
        v[j] = read16(x, i + 16 * j, is_bf16);
        F32 size = as_float((U32)v[j] & 0x7fffffffu);
        largest = largest > size ? largest : size;
        nan += v[j] * 0;  // becomes NaN if an input is NaN or infinite; added to the scale, it makes the output NaN
    }
    float top = 0;
    for (int j = 0; j < 16; j++) top = std::max(top, largest[j]);
    float inverse = top > 0 ? 127 / top : 0;
    I32 total = {};
    for (int j = 0; j < GROUP / 16; j++) {
        I32 q = (I32)(v[j] * inverse + ROUNDING) - ROUNDING_BITS;
        total += q;
        store(rows.q + i + 16 * j, __builtin_convertvector(q, I8));
    }
    int32_t input_sum = 0;
    for (int j = 0; j < 16; j++) input_sum += total[j];
    rows.scale[i / GROUP] = top / 127 + sum(nan);
    rows.start[i / GROUP] = -weight_offset * input_sum;
}

// Computes sums for B rows, starting at `row`, and 16 outputs in each of O blocks. The blocks of w are split into O ranges of
// `stride` blocks; the tile takes one block of each range.
template <int BITS, int GROUP, int B, int O>
static void int_tile(const uint8_t* w, const uint16_t* scales, int64_t stride, Rows x, int64_t row, float* sums) {
    const int64_t inputs = x.inputs, bytes = 16 * inputs * BITS / 8;  // bytes of one block
    const int8_t* q = x.q + row * inputs;
    const float* x_scale = x.scale + row * x.groups;
    const int32_t* x_start = x.start + row * x.groups;
    F32 total[O][B] = {};
    for (int64_t g = 0; g < x.groups; g++) {
        I32 acc[O][B];
        UNROLL for (int r = 0; r < B; r++) {
            UNROLL for (int c = 0; c < O; c++) acc[c][r] = I32{} + x_start[r * x.groups + g];
        }
        for (int line = 0; line < GROUP * BITS / 32; line++, w += 64, q += 32 / BITS) {
            U32 low[O], high[O];
            UNROLL for (int c = 0; c < O; c++) {
                U32 packed = stream(w + c * stride * bytes, B);
                low[c] = BITS == 8 ? packed : packed & 0x0f0f0f0fu;
                high[c] = packed >> 4 & 0x0f0f0f0fu;
            }
            UNROLL for (int r = 0; r < B; r++) {
                UNROLL for (int c = 0; c < O; c++) acc[c][r] = dot4(acc[c][r], low[c], load<int32_t>(q + r * inputs));
            }
            if (BITS == 8) continue;
            UNROLL for (int r = 0; r < B; r++) {
                UNROLL for (int c = 0; c < O; c++) acc[c][r] = dot4(acc[c][r], high[c], load<int32_t>(q + r * inputs + 4));
            }
        }
        UNROLL for (int c = 0; c < O; c++) {
            F32 scale = BITS == 8 ? F32{} + 1 : read16(scales, (c * stride * x.groups + g) * 16, true);
            UNROLL for (int r = 0; r < B; r++) {
                F32 floats = __builtin_convertvector(acc[c][r], F32);
                total[c][r] += floats * (BITS == 8 ? F32{} + x_scale[r * x.groups + g] : scale * x_scale[r * x.groups + g]);
            }
        }
    }
    for (int c = 0; c < O; c++) {
        for (int r = 0; r < B; r++) {
            F32 out = BITS == 8 ? total[c][r] * read16(scales, c * stride * 16, true) : total[c][r];
            store(sums + r * CHUNK + c * stride * 16, out);
        }
    }
}

template <int BITS, int GROUP> struct IntProduct {
    Rows x;

    static int64_t bytes(const Call& call) { return call.rows * (call.inputs + call.inputs / GROUP * 8); }

    IntProduct(const Call& call, char* memory) {
        const int64_t groups = call.inputs / GROUP, count = call.rows * call.inputs;
        x = {(int8_t*)memory, (float*)(memory + count), (int32_t*)(memory + count + call.rows * groups * 4), call.inputs, groups};
    }

    void convert_inputs(const Call& call) const {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < call.rows * call.inputs; i += GROUP) {
            quantize_group<GROUP>(call.x, call.x_is_bf16, i, 1 << (BITS - 1), x);
        }
    }

    template <int B>
    static void blocks(const uint8_t* w, const uint16_t* scales, int64_t count, Rows x, int64_t row, float* sums) {
        const int64_t bytes = 2 * x.inputs * BITS, step = 16 * (BITS == 8 ? 1 : x.groups);
        const int64_t stride = count / 4;  // four ranges of whole blocks
        for (int64_t b = 0; b < stride; b++) {
            int_tile<BITS, GROUP, B, 4>(w + b * bytes, scales + b * step, stride, x, row, sums + b * 16);
        }
        for (int64_t b = 4 * stride; b < count; b++) {
            int_tile<BITS, GROUP, B, 1>(w + b * bytes, scales + b * step, 1, x, row, sums + b * 16);
        }
    }

    void tile(const Matrix& matrix, int64_t start, int64_t count, int64_t row, int height, float* sums) const {
        decltype(&blocks<1>) tiles[] = {blocks<1>, blocks<2>, blocks<3>, blocks<4>, blocks<5>, blocks<6>};
        const uint8_t* w = (const uint8_t*)matrix.w + start * x.inputs * BITS / 8;
        tiles[height - 1](w, matrix.scales + start * (BITS == 8 ? 1 : x.groups), (count + 15) / 16, x, row, sums);
    }
};

typedef IntProduct<8, 64> Int8Product;
typedef IntProduct<4, 32> Int4Product;
extern "C" void int8_product(const Call& call) {
    if (!tiles::product<tiles::IntWeights<8>>(call)) multiply<Int8Product>(call);
}
extern "C" void int4_product(const Call& call) {
    if (!tiles::product<tiles::IntWeights<4>>(call)) multiply<Int4Product>(call);
}
