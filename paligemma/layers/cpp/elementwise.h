// Gating and norms, and their derivatives.
#pragma once

#include "vectors.h"

// y = gelu(gate) * up for `count` numbers, a multiple of 16; y may be gate. Used if torch computed the two products.
extern "C" void bf16_gate(const uint16_t* gate, const uint16_t* up, uint16_t* y, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (count > 65536)
    for (int64_t i = 0; i < count; i += 16) store(y + i, to_bf16(gelu(read16(gate, i, true)) * read16(up, i, true)));
}

// The gradients of gate and up, from dy, the gradient of y.
extern "C" void bf16_gate_backward(const uint16_t* dy, const uint16_t* gate, const uint16_t* up, uint16_t* d_gate, uint16_t* d_up,
                                   int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (count > 65536)
    for (int64_t i = 0; i < count; i += 16) {
        const F32 x = read16(gate, i, true), d = read16(dy, i, true);
        // gelu(x) = x s, where s is the logistic function of x (a + b x^2).
        const F32 s = 1 / (1 + exponential(x * (-1.59576912f - 0.0713548163f * x * x)));
        const F32 slope = s + x * s * (1 - s) * (1.59576912f + 3 * 0.0713548163f * x * x);
        store(d_gate + i, to_bf16(d * read16(up, i, true) * slope));
        store(d_up + i, to_bf16(d * x * s));
    }
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

// dx, the gradient of x, from dy, the gradient of y. With g = dy * (1 + weight) and r = 1 / root mean square of x, it is
// dx = r * (g - x * r^2 * mean(g * x)).
extern "C" void bf16_rms_norm_backward(const uint16_t* dy, const uint16_t* x, const uint16_t* weight, uint16_t* dx, int64_t rows,
                                       int64_t width, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 8)
    for (int64_t row = 0; row < rows; row++) {
        const uint16_t *dy_row = dy + row * width, *x_row = x + row * width;
        const auto g = [&](int64_t i) { return read16(dy_row, i, true) * (read16(weight, i, true) + 1); };
        F32 squares = {}, products = {};
        for (int64_t i = 0; i < width; i += 16) {
            const F32 numbers = read16(x_row, i, true);
            squares += numbers * numbers;
            products += g(i) * numbers;
        }
        const float square = 1 / (sum(squares) / width + eps), factor = std::sqrt(square), mean = sum(products) / width * square;
        for (int64_t i = 0; i < width; i += 16) {
            store(dx + row * width + i, to_bf16(factor * (g(i) - read16(x_row, i, true) * mean)));
        }
    }
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
