// Gating and norms.
#pragma once

#include "vectors.h"

// gate = gelu(gate) * up for `count` numbers, a multiple of 16; used if torch computed the two products.
extern "C" void bf16_gate(uint16_t* gate, const uint16_t* up, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (count > 65536)
    for (int64_t i = 0; i < count; i += 16) store(gate + i, to_bf16(gelu(read16(gate, i, true)) * read16(up, i, true)));
}

// y = x / root mean square * (1 + weight), for one row. x and y are bfloat16 or float32.
static inline void rms_norm(const void* x, bool x_is_bf16, const uint16_t* weight, void* y, bool y_is_bf16, int64_t width,
                            float eps) {
    F32 squares = {};
    for (int64_t i = 0; i < width; i += 16) squares += read16(x, i, x_is_bf16) * read16(x, i, x_is_bf16);
    const float factor = 1 / std::sqrt(sum(squares) / width + eps);
    for (int64_t i = 0; i < width; i += 16) {
        F32 out = read16(x, i, x_is_bf16) * factor * (read16(weight, i, true) + 1);
        if (y_is_bf16) store((uint16_t*)y + i, to_bf16(out));
        else store((float*)y + i, out);
    }
}

// In torch, an RMS norm consists of ten small operations, which for one row are mostly overhead.
extern "C" void bf16_rms_norm(const uint16_t* x, const uint16_t* weight, uint16_t* y, int64_t rows, int64_t width, float eps,
                              int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 8)
    for (int64_t row = 0; row < rows; row++) rms_norm(x + row * width, true, weight, y + row * width, true, width, eps);
}

// y = (x - mean) / standard deviation * weight + bias.
extern "C" void bf16_layer_norm(const uint16_t* x, const uint16_t* weight, const uint16_t* bias, uint16_t* y, int64_t rows, int64_t width,
                                float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 8)
    for (int64_t row = 0; row < rows; row++) {
        const uint16_t* from = x + row * width;
        F32 total = {}, squares = {};
        for (int64_t i = 0; i < width; i += 16) total += read16(from, i, true);
        const float mean = sum(total) / width;
        for (int64_t i = 0; i < width; i += 16) {
            const F32 distance = read16(from, i, true) - mean;
            squares += distance * distance;
        }
        const float factor = 1 / std::sqrt(sum(squares) / width + eps);
        for (int64_t i = 0; i < width; i += 16) {
            const F32 normal = (read16(from, i, true) - mean) * factor;
            store(y + row * width + i, to_bf16(normal * read16(weight, i, true) + read16(bias, i, true)));
        }
    }
}
