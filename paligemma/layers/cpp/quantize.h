// Rounding weights to int8 and int4; int_formats.py does the same with torch.
#pragma once

#include "vectors.h"

// The numbers i to i + 15 of a row with `inputs` numbers; zeros after the end of the row.
static inline F32 read_padded(const void* w, int64_t row, int64_t i, int64_t inputs, bool is_bf16) {
    if (i + 16 <= inputs) return read16(w, row * inputs + i, is_bf16);
    F32 out = {};
    for (int64_t j = i; j < inputs; j++) {
        uint32_t bits = is_bf16 ? (uint32_t)((const uint16_t*)w)[row * inputs + j] << 16 : ((const uint32_t*)w)[row * inputs + j];
        memcpy((float*)&out + (j - i), &bits, 4);
    }
    return out;
}

static inline float rounded_to_bf16(float x) {
    U16 half = to_bf16(F32{} + x);
    return as_float(__builtin_convertvector(half, U32) << 16)[0];
}

static inline float inverse_of(float x) { return x != 0 ? 1 / x : 0; }

static inline F32 rounded(F32 v, float low, float high) {
    F32 q = (v + ROUNDING) - ROUNDING, min = F32{} + low, max = F32{} + high;
    q = q < min ? min : q;
    return q > max ? max : q;
}

static void int8_quantize_row(const void* w, bool is_bf16, int64_t row, int64_t inputs, int64_t padded, uint8_t* to,
                              uint16_t* scale) {
    F32 top = {}, nan = {};
    for (int64_t i = 0; i < inputs; i += 16) {
        F32 v = read_padded(w, row, i, inputs, is_bf16), size = as_float((U32)v & 0x7fffffffu);
        top = top > size ? top : size;
        nan += v * 0;
    }
    float largest = 0;
    for (int j = 0; j < 16; j++) largest = std::max(largest, top[j]);
    U16 stored = to_bf16(F32{} + (largest / 127 + sum(nan)));
    *scale = stored[0];
    float inverse = inverse_of(as_float(__builtin_convertvector(stored, U32) << 16)[0]);
    for (int64_t i = 0; i < padded; i += 16) {
        F32 q = rounded(read_padded(w, row, i, inputs, is_bf16) * inverse, -127, 127) + 128;
        I8 bytes = __builtin_convertvector(__builtin_convertvector(q, I32), I8);
        for (int j = 0; j < 4; j++) memcpy(to + (i / 4 + j) * 64, (const char*)&bytes + 4 * j, 4);
    }
}

struct Group {  // 32 weights
    F32 v[2];

    void round(float scale, F32 q[2]) const {
        for (int h = 0; h < 2; h++) q[h] = rounded(v[h] * inverse_of(scale), -8, 7);
    }
    float error(float scale) const {
        F32 q[2], gaps[2];
        round(scale, q);
        for (int h = 0; h < 2; h++) gaps[h] = q[h] * scale - v[h];
        return sum(gaps[0] * gaps[0] + gaps[1] * gaps[1]);
    }
    float extreme() const {
        F32 max = v[0] > v[1] ? v[0] : v[1], min = v[0] < v[1] ? v[0] : v[1];
        float high = max[0], low = min[0];
        for (int j = 1; j < 16; j++) high = std::max(high, max[j]), low = std::min(low, min[j]);
        return high >= -low ? high : low;
    }
};

static void int4_quantize_row(const void* w, bool is_bf16, int64_t row, int64_t inputs, int64_t padded, uint8_t* to,
                              uint16_t* scales) {
    for (int64_t i = 0; i < padded; i += 32) {
        Group group = {{read_padded(w, row, i, inputs, is_bf16), read_padded(w, row, i + 16, inputs, is_bf16)}};
        float extreme = group.extreme() + sum(group.v[0] * 0 + group.v[1] * 0);
        float scale = rounded_to_bf16(extreme / -8), smallest_error = group.error(scale);
        for (float fraction : {1.05f, 0.95f, 0.9f, 0.85f, 0.8f}) {
            float other = rounded_to_bf16(extreme * fraction / -8), error = group.error(other);
            scale = error < smallest_error ? other : scale;
            smallest_error = error < smallest_error ? error : smallest_error;
        }
        F32 q[2];
        group.round(scale, q);
        float dot = sum(q[0] * group.v[0] + q[1] * group.v[1]), norm = sum(q[0] * q[0] + q[1] * q[1]);
        float fitted = rounded_to_bf16(dot * inverse_of(norm));
        if (group.error(fitted) < smallest_error) group.round(scale = fitted, q);
        scales[i / 32 * 16] = to_bf16(F32{} + scale)[0];
        I8 bytes[2];
        for (int h = 0; h < 2; h++) bytes[h] = __builtin_convertvector(__builtin_convertvector(q[h] + 8, I32), I8);
        const uint8_t* values = (const uint8_t*)bytes;
        for (int line = 0; line < 4; line++) {
            uint32_t low = load<uint32_t>(values + 8 * line), high = load<uint32_t>(values + 8 * line + 4);
            store(to + (i / 8 + line) * 64, low | high << 4);  // each byte is below 16, so no bit is lost
        }
    }
}

// Rounds w[O, X] to tiles, the layout that the products read: whole blocks of 16 outputs, `padded` inputs.
extern "C" void int_quantize(int bits, const void* w, int is_bf16, int64_t outputs, int64_t inputs, int64_t padded, uint8_t* packed,
                             uint16_t* scales, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t block = 0; block < (outputs + 15) / 16; block++) {
        for (int64_t o = 0; o < std::min<int64_t>(16, outputs - block * 16); o++) {
            int64_t row = block * 16 + o;
            uint8_t* to = packed + block * 2 * padded * bits + o * 4;
            if (bits == 8) int8_quantize_row(w, is_bf16, row, inputs, padded, to, scales + row);
            else int4_quantize_row(w, is_bf16, row, inputs, padded, to, scales + block * padded / 2 + o);
        }
    }
}
