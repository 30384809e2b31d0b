// Runs products with emulated tiles on memory of exactly the size that they need. Compiled with AddressSanitizer, the program
// ends with an error at the first access outside of it. Prints the number of tile products.
#include <cstdio>
#include <vector>

#include "../../paligemma/layers/cpp/bf16_product.h"
#include "../../paligemma/layers/cpp/int_product.h"

template <class T> static std::vector<T> filled(int64_t count, T value) { return std::vector<T>(count, value); }

// bits: 16 (bfloat16), 8 or 4.
static void run(int bits, int64_t rows, int64_t outputs, int64_t inputs, int activation) {
    const int64_t padded = bits == 16 ? outputs : (outputs + 15) / 16 * 16, groups = bits == 8 ? 1 : inputs / 32;
    auto x = filled<uint16_t>(rows * inputs, 0x3f80), bias = filled<uint16_t>(outputs, 0x3f80);
    auto w = filled<uint8_t>(padded * inputs * bits / 8, 0x3f);
    auto scales = filled<uint16_t>(bits == 16 ? 0 : padded * groups, 0x3f80);
    auto y = filled<uint16_t>(rows * outputs * (activation == GATED ? 1 : 2), 0);
    const Matrix matrix = {w.data(), scales.data(), bias.data(), outputs};
    Call call = {};
    call.x = x.data(), call.x_is_bf16 = true, call.rows = rows, call.inputs = inputs;
    call.matrices[0] = call.matrices[1] = matrix, call.activation = activation;
    call.y = y.data(), call.y_is_bf16 = true, call.threads = 2;
    if (bits == 16) bf16_product(call);
    if (bits == 8) int8_product(call);
    if (bits == 4) int4_product(call);
}

int main() {
    for (int activation : {NONE, GELU, GATED}) {
        for (int64_t rows : {16, 33}) {
            for (int64_t outputs : {1, 16, 37}) {
                for (int64_t inputs : {32, 288, 18}) run(16, rows, outputs, inputs, activation);
                for (int64_t inputs : {64, 320}) run(8, rows, outputs, inputs, activation);
                for (int64_t inputs : {32, 288}) run(4, rows, outputs, inputs, activation);
            }
        }
        for (int bits : {16, 8, 4}) run(bits, 530, 70, 64, activation);  // more than one block of rows
    }
    if (emulated_fault()) fprintf(stderr, "%s\n", emulated_fault());
    printf("%lld\n", (long long)emulated_products());
    return emulated_fault() != nullptr;
}
