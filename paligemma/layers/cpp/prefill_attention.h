// Attention of many queries: the tokens of a prompt, or the patches of a picture. The scores of a block of queries with a block of
// slots stay in the cache: FlashAttention (arXiv:2205.14135), algorithm 1.
#pragma once

#include "attention.h"
#include "many_rows.h"

const int64_t QUERY_BLOCK = 48;  // queries of a task
const int64_t SLOT_BLOCK = 384;  // slots whose scores are computed before they are used
const int COLUMNS = 16;          // of a panel; see Panels
const int COLUMN_VECTORS = COLUMNS / LANES;
const int TILE_PANELS = VECTORS / COLUMN_VECTORS;  // a tile has HEIGHT x COLUMNS TILE_PANELS sums, which fit into the registers
typedef int32_t Ints __attribute__((vector_size(sizeof(Lanes))));
typedef uint32_t Words __attribute__((vector_size(sizeof(Lanes))));
typedef uint8_t Flags __attribute__((vector_size(LANES)));

// A tensor [B, heads, tokens, E] whose last dimension is contiguous. The strides count numbers.
struct Heads {  // kernels.CHeads has the same fields
    uint16_t* data;
    int64_t row, head, token;

    uint16_t* at(int64_t b, int64_t h, int64_t t) const { return data + b * row + h * head + t * token; }
};

// If there is a cache (new_slots), k and v are written to these slots of it, and q attends to the first S slots of the cache.
struct Attention {  // kernels.CAttention has the same fields
    Heads q, k, v;             // of the new tokens: [B, N, L, E], [B, K, L, E], [B, K, L, E]
    Heads keys, values;        // of all slots: [B, K, S, E]; without a cache these are k and v
    const uint16_t *cos, *sin; // [B, L, E], for RoPE of q and k; null: no RoPE
    const int64_t* new_slots;  // [B, L], or null
    const uint8_t* mask;       // [B, L, S], true = the query attends to the slot; null = every query attends to all slots
    uint32_t* packed;          // room for B K pairs of Panels
    uint16_t* y;               // [B, L, N E]
    int64_t rows, heads, kv_heads, length, slots, width;
    float scale, cap;          // cap 0 = no soft cap
    int threads;
};

// The keys and the values of one head as the right-hand sides of two products: q k^T, whose columns are slots, and weights x v,
// whose columns are the dimensions of the head. A panel has 16 columns, and its vector i holds the numbers 2 i and 2 i + 1 of each
// of them. Where there are fewer slots or dimensions, the rest of the panel is 0.
struct Panels {
    uint32_t *keys, *values;
    int64_t key_panels, value_panels, key_size, value_size;  // `size`: of a panel, in pairs

    Panels(const Attention& call, int64_t b, int64_t h) {
        key_panels = (call.slots + COLUMNS - 1) / COLUMNS, value_panels = (call.width + COLUMNS - 1) / COLUMNS;
        key_size = call.width / 2 * 16, value_size = key_panels * 8 * 16;
        keys = call.packed + (b * call.kv_heads + h) * (key_panels * key_size + value_panels * value_size);
        values = keys + key_panels * key_size;
    }
};

static inline U32 read_part(const uint16_t* from, int64_t count) {
    U16 v = {};
    if (count >= 16) v = load<U16>(from);
    else memcpy(&v, from, 2 * count);
    return __builtin_convertvector(v, U32);
}

// Packs the keys and values of the slots 16 panel to 16 panel + 15.
static void pack(const Attention& call, int64_t b, int64_t h, int64_t panel) {
    const Panels to(call, b, h);
    const int64_t first = panel * 16, count = std::min<int64_t>(16, call.slots - first);
    uint32_t* key_panel = to.keys + panel * to.key_size;
    for (int64_t j = 0; j < 16; j++) {
        const uint16_t* key = call.keys.at(b, h, first + j);
        for (int64_t i = 0; i < call.width / 2; i++) key_panel[i * 16 + j] = j < count ? load<uint32_t>(key + 2 * i) : 0;
    }
    for (int64_t i = 0; i < 8; i++) {
        const uint16_t* value = call.values.at(b, h, first + 2 * i);
        for (int64_t p = 0; p < to.value_panels; p++) {
            const int64_t size = std::min<int64_t>(16, call.width - p * 16);
            U32 even = 2 * i < count ? read_part(value + p * 16, size) : U32{};
            U32 odd = 2 * i + 1 < count ? read_part(value + call.values.token + p * 16, size) : U32{};
            store(to.values + p * to.value_size + (panel * 8 + i) * 16, even | odd << 16);
        }
    }
}

// acc + a[0] * (first numbers of the pairs) + a[1] * (second numbers).
static inline Lanes dot_pair(Lanes acc, Words pairs, const Input* a) {
#if defined(__AVX512BF16__)
    return (Lanes)_mm512_dpbf16_ps((__m512)acc, (__m512bh)pairs, (__m512bh)_mm512_set1_epi32(load<int32_t>(a)));
#else
    acc += (Lanes)(pairs << 16) * a[0];
    return acc + (Lanes)(pairs & 0xffff0000u) * a[1];
#endif
}

static inline void store_inputs(Input* to, Lanes v) {
#if defined(__AVX512BF16__)
    store(to, (U16)_mm512_cvtneps_pbh((__m512)v));
#else
    store(to, v);
#endif
}

// c[R][16 P] = a[R][2 pairs] x P panels, added to c if `adds`.
template <int R, int P>
static void panel_tile(const Input* a, int64_t a_stride, const uint32_t* b, int64_t size, int64_t pairs, float* c, int64_t c_stride,
                       bool adds) {
    const int C = P * COLUMN_VECTORS;
    Lanes acc[R][C];
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < C; v++) acc[r][v] = adds ? load<Lanes>(c + r * c_stride + v * LANES) : Lanes{};
    }
    for (int64_t i = 0; i < pairs; i++) {
        Words w[C];
        UNROLL for (int v = 0; v < C; v++) {
            w[v] = load<Words>(b + v / COLUMN_VECTORS * size + i * COLUMNS + v % COLUMN_VECTORS * LANES);
        }
        UNROLL for (int r = 0; r < R; r++) {
            UNROLL for (int v = 0; v < C; v++) acc[r][v] = dot_pair(acc[r][v], w[v], a + r * a_stride + 2 * i);
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int v = 0; v < C; v++) store(c + r * c_stride + v * LANES, acc[r][v]);
    }
}

template <int P>
static void panel_rows(const Input* a, int64_t a_stride, int64_t rows, const uint32_t* b, int64_t size, int64_t pairs, float* c,
                       int64_t c_stride, bool adds) {
    decltype(&panel_tile<1, P>) tiles[] = {panel_tile<1, P>, panel_tile<2, P>, panel_tile<3, P>,
                                           panel_tile<4, P>, panel_tile<5, P>, panel_tile<6, P>};
    const int64_t parts = (rows + HEIGHT - 1) / HEIGHT;  // of equal heights, as far as possible
    for (int64_t part = 0; part < parts; part++) {
        const int64_t r = rows * part / parts, height = rows * (part + 1) / parts - r;
        tiles[height - 1](a + r * a_stride, a_stride, b, size, pairs, c + r * c_stride, c_stride, adds);
    }
}

// c[rows][16 panels] = a[rows][2 pairs] x panels, added to c if `adds`.
static void panel_product(const Input* a, int64_t a_stride, int64_t rows, const uint32_t* b, int64_t size, int64_t panels,
                          int64_t pairs, float* c, int64_t c_stride, bool adds) {
    decltype(&panel_rows<1>) widths[] = {panel_rows<1>, panel_rows<2>, panel_rows<3>, panel_rows<4>};
    const int64_t parts = (panels + TILE_PANELS - 1) / TILE_PANELS;
    for (int64_t part = 0; part < parts; part++) {
        const int64_t p = panels * part / parts, count = panels * (part + 1) / parts - p;
        widths[count - 1](a, a_stride, rows, b + p * size, size, pairs, c + p * COLUMNS, c_stride, adds);
    }
}

// 2^x, and 0 for x below -126; the error is at most 3e-6 of it, which is little for a weight that is rounded to bfloat16.
static inline Lanes power_of_2(Lanes x) {
    const Lanes n = x + ROUNDING, r = x - (n - ROUNDING);  // the lowest bits of n are the rounded x
    const Lanes p = 1 + r * (0.693147181f + r * (0.240226507f + r * (0.0555041087f + r * (0.00961812911f + r * 0.00133335581f))));
    return x < -126 ? Lanes{} : (Lanes)((Words)p + ((Words)n << 23));
}

// The softmax of one query, which receives its scores in blocks.
struct Softmax {
    float highest = -INFINITY, total = 0;  // the highest score so far, and the sum of e^(score - highest)

    // Replaces the first of the `slots` products q k by the weights e^(score - highest), which are 0 where the mask is false and
    // where the slots end within a panel. Returns the factor for sums with earlier weights, whose `highest` was lower.
    float weigh(float* scores, int64_t slots, const uint8_t* mask, float scale, float cap) {
        const int64_t whole = slots / LANES * LANES, padded = (slots + COLUMNS - 1) / COLUMNS * COLUMNS;
        if (cap > 0) {  // cap * tanh(score / cap)
            for (int64_t s = 0; s < padded; s += 16) {
                store(scores + s, cap - 2 * cap / (1 + exponential(load<F32>(scores + s) * (2 * scale / cap))));
            }
            scale = 1;
        }
        const Lanes lowest = Lanes{} - INFINITY;
        for (int64_t s = 0; mask && s < whole; s += LANES) {
            store(scores + s, __builtin_convertvector(load<Flags>(mask + s), Ints) != 0 ? load<Lanes>(scores + s) : lowest);
        }
        for (int64_t s = whole; s < padded; s++) scores[s] = s < slots && (!mask || mask[s]) ? scores[s] : -INFINITY;
        Lanes largest = lowest, sums = {};
        for (int64_t s = 0; s < padded; s += LANES) {
            Lanes v = load<Lanes>(scores + s);
            largest = largest > v ? largest : v;
        }
        float top = largest[0];
        UNROLL for (int i = 1; i < LANES; i++) top = std::max(top, largest[i]);
        const float before = highest, to_exponent = 1.44269504f;  // log2(e)
        highest = std::max(highest, scale * top);
        const float shift = highest < -1e38f ? 0 : highest;  // 0: all slots so far are masked
        for (int64_t s = 0; s < padded; s += LANES) {  // weights, at most as long as scores, are written after the scores are read
            Lanes weights = power_of_2(load<Lanes>(scores + s) * (scale * to_exponent) - shift * to_exponent);
            sums += weights;
            store_inputs((Input*)scores + s, weights);
        }
        const float factor = before == highest ? 1 : before < -1e38f ? 0 : std::exp(before - shift);
        total *= factor;
        for (int i = 0; i < LANES; i++) total += sums[i];
        return factor;
    }
};

// The queries t to t + count - 1 of one head, after RoPE.
static void read_queries(const Attention& call, int64_t b, int64_t head, int64_t t, int64_t count, Input* to) {
    for (int64_t i = 0; i < count; i++, t++, to += call.width) {
        const uint16_t* q = call.q.at(b, head, t);
        uint16_t* rotated = (uint16_t*)to;
        const int64_t angles = (b * call.length + t) * call.width;
        if (call.cos) rotate(q, call.cos + angles, call.sin + angles, rotated, call.width);
        else memcpy(rotated, q, 2 * call.width);
#if !defined(__AVX512BF16__)
        for (int64_t j = call.width; j--;) {  // from the end, because the floats are longer
            const uint32_t bits = (uint32_t)load<uint16_t>(rotated + j) << 16;
            memcpy(to + j, &bits, 4);
        }
#endif
    }
}

// Computes y for the queries t to t + count - 1 of one head.
static void attend_queries(const Attention& call, int64_t b, int64_t head, int64_t t, int64_t count) {
    const Panels panels(call, b, head / (call.heads / call.kv_heads));
    const int64_t y_width = panels.value_panels * 16;
    float* scores = (float*)score_buffer.at_least(QUERY_BLOCK * (SLOT_BLOCK + y_width + call.width) * sizeof(float));
    float* sums = scores + QUERY_BLOCK * SLOT_BLOCK;
    Input* q = (Input*)(sums + QUERY_BLOCK * y_width);
    read_queries(call, b, head, t, count, q);
    Softmax softmax[QUERY_BLOCK];
    const int64_t blocks = (panels.key_panels * 16 + SLOT_BLOCK - 1) / SLOT_BLOCK;
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t p = panels.key_panels * block / blocks, width = panels.key_panels * (block + 1) / blocks - p;
        const int64_t start = p * 16, slots = std::min(width * 16, call.slots - start);
        panel_product(q, call.width, count, panels.keys + p * panels.key_size, panels.key_size, width, call.width / 2, scores,
                      SLOT_BLOCK, false);
        for (int64_t i = 0; i < count; i++) {
            const uint8_t* mask = call.mask ? call.mask + (b * call.length + t + i) * call.slots + start : nullptr;
            const float factor = softmax[i].weigh(scores + i * SLOT_BLOCK, slots, mask, call.scale, call.cap);
            if (block == 0 || factor == 1) continue;
            float* row = sums + i * y_width;
            for (int64_t j = 0; j < y_width; j += 16) store(row + j, load<F32>(row + j) * factor);
        }
        panel_product((const Input*)scores, SLOT_BLOCK * (sizeof(float) / sizeof(Input)), count, panels.values + start / 2 * 16,
                      panels.value_size, panels.value_panels, width * 8, sums, y_width, block > 0);
    }
    for (int64_t i = 0; i < count; i++) {
        const float share = softmax[i].total == 0 ? 0 : 1 / softmax[i].total;
        uint16_t* y = call.y + ((b * call.length + t + i) * call.heads + head) * call.width;
        for (int64_t j = 0; j < call.width; j += 16) {
            const U16 rounded = to_bf16(load<F32>(sums + i * y_width + j) * share);
            memcpy(y + j, &rounded, 2 * std::min<int64_t>(16, call.width - j));
        }
    }
}

extern "C" void bf16_attend_many(const Attention& call) {
    const int64_t pairs = call.rows * call.kv_heads, panels = (call.slots + 15) / 16;
    const int64_t blocks = (call.length + QUERY_BLOCK - 1) / QUERY_BLOCK;
#pragma omp parallel num_threads(call.threads)
    {
        if (call.new_slots) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < call.rows * call.length; i++) {
                const int64_t b = i / call.length, t = i % call.length, angles = i * call.width;
                for (int64_t h = 0; h < call.kv_heads; h++) {
                    uint16_t* key = call.keys.at(b, h, call.new_slots[i]);
                    rotate(call.k.at(b, h, t), call.cos + angles, call.sin + angles, key, call.width);
                    memcpy(call.values.at(b, h, call.new_slots[i]), call.v.at(b, h, t), 2 * call.width);
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < pairs * panels; i++) pack(call, i / panels / call.kv_heads, i / panels % call.kv_heads, i % panels);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < call.rows * call.heads * blocks; i++) {
            const int64_t block = i % blocks, t = call.length * block / blocks;
            attend_queries(call, i / blocks / call.heads, i / blocks % call.heads, t, call.length * (block + 1) / blocks - t);
        }
    }
}
