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

// Attention of one new token per row.
struct TokenAttention {  // kernels.CTokenAttention has the same fields
    const uint16_t *cos, *sin;  // [B, width]
    const int64_t* new_slots;   // [B], the slot of the new token
    int64_t row_stride, head_stride, slots;  // of the cache; `slots` are read
    float scale, cap;                        // no cap: 0
    int64_t rows, heads, kv_heads, width;

    int64_t bytes() const { return rows * heads * width * sizeof(Input); }
};

// Rotates q and k in qkv[B, (heads + 2 kv_heads) width], stores k and v in the cache, and lets q attend to the slots that
// mask[B, slots] allows, or to all of them if mask is null. Result: y[B, heads width]. All threads of a parallel region call
// this function and share `memory`.
static void attend_in_region(const TokenAttention& a, const uint16_t* qkv, uint16_t* keys, uint16_t* values, const uint8_t* mask,
                             uint16_t* y, char* memory) {
    const int64_t width = a.width, group = a.heads / a.kv_heads, parts = (group + TILE_HEADS - 1) / TILE_HEADS;
    const int64_t each = a.heads + 2 * a.kv_heads, room = (a.slots + CHUNK - 1) / CHUNK * CHUNK;
    const Cache cache = {keys, values, a.row_stride, a.head_stride, a.slots, width};
    Input* q = (Input*)memory;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < a.rows * each; task++) {
        const int64_t row = task / each, h = task % each, kv_head = (h - a.heads) % a.kv_heads;
        const uint16_t *x = qkv + task * width, *cos = a.cos + row * width, *sin = a.sin + row * width;
        const int64_t slot = row * a.row_stride + kv_head * a.head_stride + a.new_slots[row] * width;
        if (h >= a.heads + a.kv_heads) memcpy(values + slot, x, width * sizeof(uint16_t));
        else if (h >= a.heads) rotate(x, cos, sin, keys + slot, width);
        else {
            uint16_t* rotated = (uint16_t*)query_buffer.at_least(width * sizeof(uint16_t));
            rotate(x, cos, sin, rotated, width);
            to_inputs(rotated, width, q + (row * a.heads + h) * width);
        }
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < a.rows * a.kv_heads * parts; task++) {
        const int64_t row = task / (a.kv_heads * parts), head = task / parts % a.kv_heads, part = task % parts;
        const int64_t first = head * group + part * TILE_HEADS, count = std::min<int64_t>(TILE_HEADS, group - part * TILE_HEADS);
        const int64_t offset = row * a.row_stride + head * a.head_stride, query = (row * a.heads + first) * width;
        decltype(&attend<1>) tiles[] = {attend<1>, attend<2>, attend<3>, attend<4>};
        tiles[count - 1](cache, keys + offset, values + offset, q + query, mask ? mask + row * a.slots : nullptr, a.scale, a.cap,
                         (float*)score_buffer.at_least(TILE_HEADS * room * sizeof(float)), y + query);
    }
}

extern "C" void bf16_attend(const TokenAttention& attention, const uint16_t* qkv, uint16_t* keys, uint16_t* values,
                            const uint8_t* mask, uint16_t* y, int threads) {
    char* memory = input_buffer.at_least(attention.bytes());
#pragma omp parallel num_threads(threads)
    attend_in_region(attention, qkv, keys, values, mask, y, memory);
}
