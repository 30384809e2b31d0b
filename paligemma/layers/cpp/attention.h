// Attention of one new token per row.
#pragma once

#include "bf16_product.h"

const int TILE_HEADS = 4;  // a task computes at most this many query heads, all of which use the same key head

// The KV cache: the slots of one row and head are contiguous and have `width` numbers each.
struct Cache {
    uint16_t *keys, *values;
    int64_t row_stride, head_stride, slots, width;
};

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

// Replaces scores[slots] by e^(score - highest), or 0 where the mask is false, and returns their sum. `scores` must have room for
// `slots` rounded up to a multiple of 16.
static float exponentiate(float* scores, int64_t slots, const uint8_t* mask, float scale, float cap) {
    F32 highest = F32{} - INFINITY, total = {};
    for (int64_t s = 0; s < slots; s += 16) {
        F32 v = load<F32>(scores + s) * scale;
        if (cap > 0) v = cap - 2 * cap / (1 + exponential(v * (2 / cap)));  // cap * tanh(v / cap)
        for (int64_t j = 0; j < 16; j++) {
            if (s + j >= slots || (mask && !mask[s + j])) v[j] = -INFINITY;
        }
        highest = highest > v ? highest : v;
        store(scores + s, v);
    }
    float top = highest[0];
    for (int j = 1; j < 16; j++) top = std::max(top, highest[j]);
    for (int64_t s = 0; s < slots; s += 16) {
        F32 v = load<F32>(scores + s), weights = exponential(v - top);
        weights = v < -1e38f ? F32{} : weights;
        total += weights;
        store(scores + s, weights);
    }
    return sum(total);
}

// Computes y[N][width] from q[N][width] for N query heads. `scores` has room for N rows; the length of a row is `slots` rounded
// up to a multiple of CHUNK.
template <int N>
static void attend(const Cache& cache, const uint16_t* keys, const uint16_t* values, const Input* q, const uint8_t* mask,
                   float scale, float cap, float* scores, uint16_t* y) {
    const int64_t width = cache.width, room = (cache.slots + CHUNK - 1) / CHUNK * CHUNK;
    for (int64_t s = 0; s < cache.slots; s += CHUNK) {
        float sums[N * CHUNK];
        bf16_rows<N>(keys + s * width, q, sums, std::min(CHUNK, cache.slots - s), width);
        for (int r = 0; r < N; r++) memcpy(scores + r * room + s, sums + r * CHUNK, CHUNK * sizeof(float));
    }
    float share[N];  // 1 / sum of the exponentials
    for (int r = 0; r < N; r++) share[r] = 1 / exponentiate(scores + r * room, cache.slots, mask, scale, cap);
    for (int64_t i = 0; i < width; i += 32) {
        F32 even[N] = {}, odd[N] = {};
        for (int64_t s = 0; s < cache.slots; s++) {
            U32 pair = load<U32>(values + s * width + i);
            UNROLL for (int r = 0; r < N; r++) {
                even[r] += as_float(pair << 16) * scores[r * room + s];
                odd[r] += as_float(pair & 0xffff0000u) * scores[r * room + s];
            }
        }
        for (int r = 0; r < N; r++) {
            U32 low = __builtin_convertvector(to_bf16(even[r] * share[r]), U32);
            U32 high = __builtin_convertvector(to_bf16(odd[r] * share[r]), U32);
            store(y + r * width + i, low | high << 16);
        }
    }
}

// For one new token per row, qkv[B, (heads + 2 kv_heads) width]: rotates q and k, stores k and v in the slot new_slots[row], and
// lets q attend to the first `slots` slots that mask[B, slots] allows, or to all of them if mask is null.
// Result: y[B, heads width].
extern "C" void bf16_attend(const uint16_t* qkv, const uint16_t* cos, const uint16_t* sin, const int64_t* new_slots,
                            uint16_t* keys, uint16_t* values, int64_t row_stride, int64_t head_stride, int64_t slots, const uint8_t* mask,
                            float scale, float cap, uint16_t* y, int64_t rows, int64_t heads, int64_t kv_heads, int64_t width,
                            int threads) {
    const Cache cache = {keys, values, row_stride, head_stride, slots, width};
    uint16_t* rotated = (uint16_t*)query_buffer.at_least(rows * heads * width * sizeof(uint16_t));
    for (int64_t row = 0; row < rows; row++, cos += width, sin += width) {
        const uint16_t* x = qkv + row * (heads + 2 * kv_heads) * width;
        for (int64_t h = 0; h < heads; h++) rotate(x + h * width, cos, sin, rotated + (row * heads + h) * width, width);
        for (int64_t h = 0; h < kv_heads; h++) {
            const int64_t slot = row * row_stride + h * head_stride + new_slots[row] * width;
            rotate(x + (heads + h) * width, cos, sin, keys + slot, width);
            memcpy(values + slot, x + (heads + kv_heads + h) * width, width * sizeof(uint16_t));
        }
    }
    const Input* q = as_inputs(rotated, rows * heads * width, 1);
    const int64_t group = heads / kv_heads, parts = (group + TILE_HEADS - 1) / TILE_HEADS;
    const int64_t room = (slots + CHUNK - 1) / CHUNK * CHUNK;
#pragma omp parallel for num_threads(std::min<int64_t>(threads, rows * kv_heads * parts)) schedule(dynamic)
    for (int64_t task = 0; task < rows * kv_heads * parts; task++) {
        const int64_t row = task / (kv_heads * parts), head = task / parts % kv_heads, part = task % parts;
        const int64_t first = head * group + part * TILE_HEADS, count = std::min<int64_t>(TILE_HEADS, group - part * TILE_HEADS);
        const int64_t offset = row * row_stride + head * head_stride, query = (row * heads + first) * width;
        decltype(&attend<1>) tiles[] = {attend<1>, attend<2>, attend<3>, attend<4>};
        tiles[count - 1](cache, keys + offset, values + offset, q + query, mask ? mask + row * slots : nullptr, scale, cap,
                         (float*)score_buffer.at_least(TILE_HEADS * room * sizeof(float)), y + query);
    }
}
