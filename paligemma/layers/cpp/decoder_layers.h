// All layers of the decoder for one new token per row, in one parallel region.
//
// If every product is called from Python, the threads wait between two products for Python and for small operators of torch. That
// takes a tenth of the time of a step, because the weights, which pass through the processor's cache, displace Python's own data.
#pragma once

#include "attention.h"
#include "elementwise.h"
#include "int_product.h"

struct DecoderLayer {  // kernels.CDecoderLayer has the same fields
    Matrix qkv[3], output[3], gate_up[3], down[3];
    // Norms of the inputs and outputs of attention and MLP, bfloat16[D]; null = no norm.
    const uint16_t *attention_input, *attention_output, *mlp_input, *mlp_output;
    int is_windowed;  // whether attention uses window_mask
};

struct Decoder {  // kernels.CDecoder has the same fields
    const DecoderLayer* layers;
    int64_t num_layers, width, mlp_width;
    const uint16_t* norm;  // after the last layer
    float eps;
    TokenAttention attention;
    uint16_t *keys, *values;  // the cache of the first layer; that of the next layer is `layer_stride` numbers further on
    int64_t layer_stride;
    const uint8_t *mask, *window_mask;  // bool[B, slots], or null
};

// x += output, after its norm, if it has one; y = norm of x.
static void add_and_normalise(const Decoder& decoder, float* x, const float* output, const uint16_t* output_norm,
                              const uint16_t* norm, uint16_t* y, bool is_alone) {
    const int64_t width = decoder.width;
    divide(decoder.attention.rows, is_alone, [&](int64_t row) {
        float *to = x + row * width, *normed = (float*)score_buffer.at_least(width * sizeof(float));
        const float* from = output + row * width;
        if (output_norm) rms_norm(from, false, output_norm, normed, false, width, decoder.eps), from = normed;
        for (int64_t i = 0; i < width; i += 16) store(to + i, load<F32>(to + i) + load<F32>(from + i));
        rms_norm(to, false, norm, y + row * width, true, width, decoder.eps);
    });
}

// y[B, D] = norm of the output of the last layer for the inputs embeds[B, D]. The sums of the residual stream stay in float32;
// what torch would round to bfloat16 before a product or before attention is rounded here, too.
//
// The threads share what products and attention compute. With few rows, each thread has its own x (residual stream), normed
// (inputs of products) and attended (output of attention), so the threads wait for each other only after products and attention.
template <class Product> static void decode(const Decoder& decoder, const uint16_t* embeds, uint16_t* y) {
    const TokenAttention& attention = decoder.attention;
    const int64_t rows = attention.rows, width = decoder.width, mlp_width = decoder.mlp_width;
    const int64_t attended_width = attention.heads * attention.width;
    const int64_t qkv_width = attended_width + 2 * attention.kv_heads * attention.width;
    const bool is_alone = rows <= ALONE_ROWS;
    Call call = {};
    call.x_is_bf16 = 1, call.threads = attention.threads, call.rows = rows;
    call.inputs = std::max(std::max(width, mlp_width), attended_width);
    char* memory = input_buffer.at_least(Product::bytes(call));
    float* sums = (float*)shared_buffer.at_least(rows * (4 * width + 2 * (qkv_width + mlp_width)) + attention.bytes());
    float* output = sums + attention.bytes() / sizeof(float);
    uint16_t *qkv = (uint16_t*)(output + rows * width), *hidden = qkv + rows * qkv_width;
    const int64_t bytes = rows * (4 * width + 2 * (width + attended_width));
    char* shared = layer_buffer.at_least(bytes);
    for (int64_t i = 0; i < rows * width; i += 16) store(output + i, read16(embeds, i, true));
    memset(shared, 0, bytes);
#pragma omp parallel num_threads(attention.threads) firstprivate(call)
    {
        float* x = (float*)(is_alone ? layer_buffer.at_least(bytes) : shared);
        uint16_t *normed = (uint16_t*)(x + rows * width), *attended = normed + rows * width;
        if (is_alone) memset(x, 0, bytes);
        auto multiply = [&](const uint16_t* from, int64_t inputs, const Matrix* matrices, void* to, int to_bf16, int activation) {
            call.x = from, call.inputs = inputs, call.y = to, call.y_is_bf16 = to_bf16, call.activation = activation;
            std::copy(matrices, matrices + 3, call.matrices);
            multiply_in_region<Product>(call, memory);
        };
        const uint16_t* output_norm = nullptr;
        for (int64_t i = 0; i < decoder.num_layers; i++) {
            const DecoderLayer* layer = decoder.layers + i;
            const int64_t offset = i * decoder.layer_stride;
            const uint8_t* mask = layer->is_windowed ? decoder.window_mask : decoder.mask;
            add_and_normalise(decoder, x, output, output_norm, layer->attention_input, normed, is_alone);
            multiply(normed, width, layer->qkv, qkv, true, NONE);
            uint16_t *keys = decoder.keys + offset, *values = decoder.values + offset;
            attend_in_region(attention, qkv, keys, values, mask, attended, (char*)sums, is_alone);
            multiply(attended, attended_width, layer->output, output, false, NONE);
            add_and_normalise(decoder, x, output, layer->attention_output, layer->mlp_input, normed, is_alone);
            multiply(normed, width, layer->gate_up, hidden, true, GATED);
            multiply(hidden, mlp_width, layer->down, output, false, NONE);
            output_norm = layer->mlp_output;
        }
        add_and_normalise(decoder, x, output, output_norm, decoder.norm, y, false);
    }
}

extern "C" void bf16_decode(const Decoder& decoder, const uint16_t* embeds, uint16_t* y) {
    decode<Bf16Product>(decoder, embeds, y);
}
extern "C" void int8_decode(const Decoder& decoder, const uint16_t* embeds, uint16_t* y) {
    decode<Int8Product>(decoder, embeds, y);
}
extern "C" void int4_decode(const Decoder& decoder, const uint16_t* embeds, uint16_t* y) {
    decode<Int4Product>(decoder, embeds, y);
}
