// argmax and logsumexp of rows of logits. For one row, torch computes them on one thread, and logsumexp in several passes.
#pragma once

#include "vectors.h"

const int64_t PART = 4096;  // logits in a task; they fit into the L1 cache, so a second pass over them costs little

// Logits i to i + 15 of a row that ends at `count`; -inf after its end.
static inline F32 load_logits(const float* x, int64_t i, int64_t count) {
    if (i + 16 <= count) return load<F32>(x + i);
    F32 v = F32{} - INFINITY;
    memcpy(&v, x + i, (count - i) * sizeof(float));
    return v;
}

static inline float highest_logit(const float* x, int64_t count) {  // -inf if all are -inf or NaN
    F32 highest = F32{} - INFINITY;
    for (int64_t i = 0; i < count; i += 16) {
        F32 v = load_logits(x, i, count);
        highest = v > highest ? v : highest;
    }
    return max(highest);
}

// y[B] = the index of the largest number of each row of x[B, V]; of several, the first. NaN is not counted as the largest.
extern "C" void logits_argmax(const float* x, int64_t rows, int64_t vocabulary, int64_t* y, int threads) {
    const int64_t parts = (vocabulary + PART - 1) / PART;
    float* tops = (float*)logits_buffer.at_least(rows * parts * sizeof(float));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < rows * parts; task++) {
        const int64_t start = task % parts * PART;
        tops[task] = highest_logit(x + task / parts * vocabulary + start, std::min(PART, vocabulary - start));
    }
    for (int64_t row = 0; row < rows; row++) {
        const float *first = tops + row * parts, *best = std::max_element(first, first + parts);
        const float *logits = x + row * vocabulary, *end = logits + vocabulary;
        const float* found = std::find(logits + (best - first) * PART, end, *best);
        y[row] = found == end ? 0 : found - logits;  // all are NaN
    }
}

// y[B] = log of the sum of e^x over each row of x[B, V]; NaN if a number of the row is NaN or +inf, -inf if all are -inf.
extern "C" void logits_logsumexp(const float* x, int64_t rows, int64_t vocabulary, float* y, int threads) {
    const int64_t parts = (vocabulary + PART - 1) / PART;
    const float lowest = -3e38f;  // a part of which all logits are -inf adds nothing: inf - inf would be NaN
    float *tops = (float*)logits_buffer.at_least(2 * rows * parts * sizeof(float)), *sums = tops + rows * parts;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < rows * parts; task++) {
        const int64_t start = task % parts * PART, count = std::min(PART, vocabulary - start);
        const float* logits = x + task / parts * vocabulary + start;
        F32 total = {};
        tops[task] = std::max(lowest, highest_logit(logits, count));
        for (int64_t i = 0; i < count; i += 16) total += exponential(load_logits(logits, i, count) - tops[task]);
        sums[task] = sum(total);
    }
    for (int64_t row = 0; row < rows; row++) {
        const float *top = tops + row * parts, highest = *std::max_element(top, top + parts);
        double total = 0;
        for (int64_t part = 0; part < parts; part++) total += sums[row * parts + part] * std::exp((double)top[part] - highest);
        y[row] = highest == lowest && total == total ? -INFINITY : highest + std::log(total);
    }
}
