// Attention of one new token per row.
#pragma once

#include "bf16_product.h"

// A task computes at most 8 query heads, all of which use the same key head, for at most CHUNK slots.
const int TILE_HEADS = 8;
const int64_t SLOT_BLOCK_BYTES = 8192;  // values that are multiplied with all heads of a task while they are in the L1 cache

// RoPE: y = x rotated by the angles with these cosines and sines; x[i] and x[i + width / 2] form a pair. The first half
// of `sin` is negated.
static void rotate(const uint16_t* x, const uint16_t* cos, const uint16_t* sin, uint16_t* y, int64_t width) {
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; i += 16) {
        F32 first = read16(x, i, true), second = read16(x, i + half, true);
        store(y + i, to_bf16(first * read16(cos, i, true) + second * read16(sin, i, true)));
        store(y + i + half, to_bf16(second * read16(cos, i + half, true) + first * read16(sin, i + half, true)));
    }
}

// Replaces scores[slots] by e^(score - highest), or 0 where the mask is false. Returns the highest score and the sum of the
// exponentials. `scores` must have room for `slots` rounded up to a multiple of 16.
struct Exponentials {
    float highest, sum;
};
static Exponentials exponentiate(float* scores, int64_t slots, const uint8_t* mask, float scale, float cap) {
    typedef uint8_t U8 __attribute__((vector_size(16)));
    F32 highest = F32{} - INFINITY, total = {};
    for (int64_t s = 0; s < slots; s += 16) {
        F32 v = load<F32>(scores + s) * scale;
        if (cap > 0) v = cap - 2 * cap / (1 + exponential(v * (2 / cap)));  // cap * tanh(v / cap)
        if (mask || s + 16 > slots) {
            U8 allowed = {};
            const int64_t count = std::min<int64_t>(16, slots - s);
            if (mask) memcpy(&allowed, mask + s, count);
            else memset(&allowed, 1, count);
            v = __builtin_convertvector(allowed, I32) != 0 ? v : F32{} - INFINITY;
        }
        highest = highest > v ? highest : v;
        store(scores + s, v);
    }
    const float top = max(highest);
    for (int64_t s = 0; s < slots; s += 16) {
        F32 v = load<F32>(scores + s), weights = exponential(v - top);
        weights = v < -1e38f ? F32{} : weights;
        total += weights;
        store(scores + s, weights);
    }
    return {top, sum(total)};
}

// For q[N][width] of N query heads and `slots` slots of their key head: the sums of the values, each times its exponential, to
// y[N][width], whose dimensions have the order of to_inputs, and the exponentials' highest score and sum.
template <int N>
static void attend(const uint16_t* keys, const uint16_t* values, const Input* q, int64_t slots, int64_t width,
                   const uint8_t* mask, float scale, float cap, float* y, Exponentials* exponentials) {
    float scores[N * CHUNK];
    bf16_rows<N>(keys, q, scores, slots, width);
    for (int r = 0; r < N; r++) exponentials[r] = exponentiate(scores + r * CHUNK, slots, mask, scale, cap);
    memset(y, 0, N * width * sizeof(float));
    const int64_t step = std::max<int64_t>(1, SLOT_BLOCK_BYTES / (2 * width));
    for (int64_t start = 0; start < slots; start += step) {
        const int64_t end = std::min(start + step, slots);
        for (int64_t i = 0; i < width; i += 32) {
            F32 even[N], odd[N];
            UNROLL for (int r = 0; r < N; r++) {
                even[r] = load<F32>(y + r * width + i);
                odd[r] = load<F32>(y + r * width + i + 16);
            }
            for (int64_t s = start; s < end; s++) {
                U32 pair = load<U32>(values + s * width + i);
                UNROLL for (int r = 0; r < N; r++) {
                    even[r] += as_float(pair << 16) * scores[r * CHUNK + s];
                    odd[r] += as_float(pair & 0xffff0000u) * scores[r * CHUNK + s];
                }
            }
            UNROLL for (int r = 0; r < N; r++) {
                store(y + r * width + i, even[r]);
                store(y + r * width + i + 16, odd[r]);
            }
        }
    }
}

// Attention of one new token per row.
struct TokenAttention {  // kernels.CTokenAttention has the same fields
    const uint16_t *cos, *sin;  // [B, width]
    const int64_t* new_slots;   // [B], the slot of the new token
    int64_t row_stride, head_stride, slots;  // of the cache; `slots` are read
    float scale, cap;                        // no cap: 0
    int64_t rows, heads, kv_heads, width;
    int64_t threads;

    // The slots of a row are divided into pieces, so that there are tasks for all threads.
    int64_t group() const { return heads / kv_heads; }
    int64_t parts() const { return (group() + TILE_HEADS - 1) / TILE_HEADS; }
    int64_t piece() const {  // slots in a piece
        const int64_t wanted = (threads + rows * kv_heads * parts() - 1) / (rows * kv_heads * parts());
        const int64_t size = (slots + wanted - 1) / wanted;
        return std::min(CHUNK, std::max<int64_t>(64, (size + 15) / 16 * 16));
    }
    int64_t pieces() const { return (slots + piece() - 1) / piece(); }
    int64_t bytes() const { return rows * heads * pieces() * (width * sizeof(float) + sizeof(Exponentials)); }
};

// Rotates q and k in qkv[B, (heads + 2 kv_heads) width], stores k and v in the cache, and lets q attend to the slots that
// mask[B, slots] allows, or to all of them if mask is null. Result: y[B, heads width]. All threads of a parallel region call
// this function and share `memory`; if `is_alone`, each of them computes all of y in its own memory from the pieces' results.
static void attend_in_region(const TokenAttention& a, const uint16_t* qkv, uint16_t* keys, uint16_t* values, const uint8_t* mask,
                             uint16_t* y, char* memory, bool is_alone) {
    const int64_t width = a.width, qkv_width = (a.heads + 2 * a.kv_heads) * width, all_heads = a.rows * a.heads;
    const int64_t group = a.group(), parts = a.parts(), piece = a.piece(), pieces = a.pieces();
    float* sums = (float*)memory;                                                     // [pieces, B, heads, width]
    Exponentials* exponentials = (Exponentials*)(sums + pieces * all_heads * width);  // [pieces, B, heads]
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < a.rows * a.kv_heads * parts * pieces; task++) {
        const int64_t start = task % pieces * piece, part = task / pieces % parts, head = task / (pieces * parts) % a.kv_heads;
        const int64_t row = task / (pieces * parts * a.kv_heads), slots = std::min(piece, a.slots - start);
        const int64_t first = head * group + part * TILE_HEADS, count = std::min<int64_t>(TILE_HEADS, group - part * TILE_HEADS);
        const uint16_t *from = qkv + row * qkv_width, *cos = a.cos + row * width, *sin = a.sin + row * width;
        uint16_t* k = keys + row * a.row_stride + head * a.head_stride + start * width;
        uint16_t* v = values + row * a.row_stride + head * a.head_stride + start * width;
        const int64_t new_slot = a.new_slots[row] - start;
        if (new_slot >= 0 && new_slot < slots) {
            rotate(from + (a.heads + head) * width, cos, sin, k + new_slot * width, width);
            memcpy(v + new_slot * width, from + (a.heads + a.kv_heads + head) * width, width * sizeof(uint16_t));
        }
        uint16_t* rotated = (uint16_t*)query_buffer.at_least(width * (sizeof(uint16_t) + TILE_HEADS * sizeof(Input)));
        Input* q = (Input*)(rotated + width);
        for (int64_t h = 0; h < count; h++) {
            rotate(from + (first + h) * width, cos, sin, rotated, width);
            to_inputs(rotated, width, q + h * width);
        }
        const int64_t result = task % pieces * all_heads + row * a.heads + first;
        decltype(&attend<1>) tiles[] = {attend<1>, attend<2>, attend<3>, attend<4>, attend<5>, attend<6>, attend<7>, attend<8>};
        tiles[count - 1](k, v, q, slots, width, mask ? mask + row * a.slots + start : nullptr, a.scale, a.cap,
                         sums + result * width, exponentials + result);
    }
    divide(all_heads, is_alone, [&](int64_t h) {
        float highest = -INFINITY, total = 0, *factors = (float*)score_buffer.at_least(pieces * sizeof(float));
        for (int64_t p = 0; p < pieces; p++) highest = std::max(highest, exponentials[p * all_heads + h].highest);
        for (int64_t p = 0; p < pieces; p++) {
            factors[p] = std::exp(exponentials[p * all_heads + h].highest - highest);
            total += factors[p] * exponentials[p * all_heads + h].sum;
        }
        for (int64_t i = 0; i < width; i += 32) {
            F32 even = {}, odd = {};
            for (int64_t p = 0; p < pieces; p++) {
                const float *from = sums + (p * all_heads + h) * width + i, share = factors[p] / total;
                even += load<F32>(from) * share;
                odd += load<F32>(from + 16) * share;
            }
            U32 low = __builtin_convertvector(to_bf16(even), U32), high = __builtin_convertvector(to_bf16(odd), U32);
            store(y + h * width + i, low | high << 16);
        }
    });
}

extern "C" void bf16_attend(const TokenAttention& attention, const uint16_t* qkv, uint16_t* keys, uint16_t* values,
                            const uint8_t* mask, uint16_t* y) {
    char* memory = input_buffer.at_least(attention.bytes());
#pragma omp parallel num_threads(attention.threads)
    attend_in_region(attention, qkv, keys, values, mask, y, memory, false);
}
