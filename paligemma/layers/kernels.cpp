// What decoding on a CPU does: matrix products y = x W^T with bfloat16 weights as stored, int8, and int4 in groups of 32; attention of
// one new token; the norm and the gate. Compiled once by kernels.py, which calls what is marked extern "C"; quantization.py draws the
// layouts of int8 and int4.
//
// One token reads every weight once, so few rows are bound by memory: each thread walks several long stretches of W side by side and
// asks for what comes a little later, because one stretch keeps too few cache lines in flight (notes/decoding.md has the numbers).
// Many rows are bound by arithmetic: a tile of outputs x rows stays in registers while K passes by.
//
// Every parallel loop ends with threads that wait for each other, which costs a microsecond on a quiet machine and milliseconds on a
// busy one; so what can be one loop is one.
//
// Vectors are the compiler's own (16 lanes, whatever the machine has); only the dot products of short numbers name instructions.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

typedef float F32 __attribute__((vector_size(64)));
typedef int32_t I32 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(32)));
typedef int8_t I8 __attribute__((vector_size(16)));
#define UNROLL _Pragma("GCC unroll 32")

template <class T> static inline T load(const void* from) {
    T value;
    memcpy(&value, from, sizeof value);
    return value;
}
template <class T> static inline void store(void* to, T value) { memcpy(to, &value, sizeof value); }
static inline F32 as_float(U32 bits) { return (F32)bits; }

static inline U16 to_bf16(F32 value) {  // round to nearest even; a NaN keeps its top bits and stays one
    U32 bits = (U32)value, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(value == value ? rounded : (bits >> 16 | 0x40), U16);
}

template <class Half, class Whole> static inline Half fold(Whole v) {
    Half parts[2];
    memcpy(parts, &v, sizeof v);
    return parts[0] + parts[1];
}
static inline float sum(F32 v) {
    typedef float F8 __attribute__((vector_size(32)));
    typedef float F4 __attribute__((vector_size(16)));
    F4 four = fold<F4>(fold<F8>(v));
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// Memory that lives as long as the calling thread and only grows, so that a step allocates nothing.
struct Scratch {
    std::unique_ptr<char[]> memory;
    size_t size = 0;
    char* at_least(size_t wanted) {
        if (wanted > size) memory.reset(new char[size = wanted]);
        return memory.get();
    }
};
static thread_local Scratch scratch, attended, scored;  // inputs as a product needs them; queries and scores of attention

static inline F32 read16(const void* x, int64_t i, bool is_bf16) {
    if (!is_bf16) return load<F32>((const float*)x + i);
    return as_float(__builtin_convertvector(load<U16>((const uint16_t*)x + i), U32) << 16);
}

// e^x to a unit or two in the last place: 2^n from the exponent's bits, times a polynomial for what is left of x.
static inline F32 exponential(F32 x) {
    const F32 least = F32{} - 87.0f, most = F32{} + 88.0f;
    x = x < least ? least : x;
    x = x > most ? most : x;
    F32 n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    F32 r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    F32 p = 1 + r * (1 + r * (0.5f + r * (0.166666672f + r * (0.0416657962f + r * (0.00833345205f + r * 0.00139313773f)))));
    return as_float((U32)p + ((U32)__builtin_convertvector(n, I32) << 23));
}
static inline F32 gelu(F32 x) { return x / (1 + exponential(x * (-1.59576912f - 0.0713548163f * x * x))); }  // its tanh form

// ---------------------------------------------------------------- what all products share

const int TILE_ROWS = 6;     // rows of x that a tile multiplies with at once
const int64_t CHUNK = 512;   // most outputs that a thread takes at a time

struct Matrix {
    const void* w;
    const uint16_t* scales;  // one bfloat16 an output (8 bits) or an output and group (4 bits); none for bfloat16 weights
    int64_t n;               // outputs; 0 = no matrix
};

// One to three matrices meet the same x[rows, k]. Their sums become y[rows, all outputs], one matrix behind the other, or, gated,
// y[rows, n] = gelu(x first^T) * (x second^T).
struct Call {
    Matrix matrices[3];
    int is_gated;
    void* y;
    int y_is_bf16;
    int64_t rows, k;
    int threads;
};

static void write_outputs(const Call& call, int64_t at, int64_t count, const float* sums, const float* more) {
    for (int64_t i = 0; i < count; i += 16) {
        F32 out = load<F32>(sums + i);
        if (more) out = gelu(out) * load<F32>(more + i);
        U16 rounded = to_bf16(out);
        int64_t size = std::min<int64_t>(16, count - i);
        if (call.y_is_bf16) memcpy((uint16_t*)call.y + at + i, &rounded, 2 * size);
        else memcpy((float*)call.y + at + i, &out, 4 * size);
    }
}

// Product::tile(matrix, first output, outputs, first row, rows, sums[rows][CHUNK]) does the work. Threads take chunks as they become
// free, so that one that another program holds up is waited for no longer than a chunk takes.
template <class Product> static void multiply(const Product& product, const Call& call) {
    const Matrix* matrices = call.matrices;
    const int parts = call.is_gated ? 1 : 3;
    // Few rows: long stretches of memory. Many: few enough weights for the nearest cache, which meet all rows before the next come.
    int64_t width = 0, tasks = 0, chunk = call.rows <= 2 ? CHUNK : call.rows <= 32 ? 64 : 32;
    for (int i = 0; i < parts; i++) width += matrices[i].n;
    while (chunk > 32 && width < 8 * chunk * call.threads) chunk /= 2;
    for (int i = 0; i < parts; i++) tasks += (matrices[i].n + chunk - 1) / chunk;
#pragma omp parallel for num_threads(call.threads) schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
        const Matrix* matrix = matrices;
        int64_t start = task * chunk, before = 0;
        for (; start >= matrix->n; matrix++) {
            start -= (matrix->n + chunk - 1) / chunk * chunk;
            before += matrix->n;
        }
        const int64_t count = std::min(chunk, matrix->n - start);
        float sums[TILE_ROWS * CHUNK], gated[TILE_ROWS * CHUNK];
        for (int64_t row = 0; row < call.rows; row += TILE_ROWS) {
            const int height = std::min<int64_t>(TILE_ROWS, call.rows - row);
            product.tile(*matrix, start, count, row, height, sums);
            if (call.is_gated) product.tile(matrices[1], start, count, row, height, gated);
            for (int r = 0; r < height; r++) {
                const float* other = call.is_gated ? gated + r * CHUNK : nullptr;
                write_outputs(call, (row + r) * width + before + start, count, sums + r * CHUNK, other);
            }
        }
    }
}

// What the three products take: the call, piece by piece, and x.
#define CALL_ARGUMENTS \
    const void *w0, const uint16_t *scales0, int64_t n0, const void *w1, const uint16_t *scales1, int64_t n1, const void *w2, \
        const uint16_t *scales2, int64_t n2, int is_gated, void *y, int y_is_bf16, int64_t rows, int64_t k, int threads
#define CALL \
    Call{{{w0, scales0, n0}, {w1, scales1, n1}, {w2, scales2, n2}}, is_gated, y, y_is_bf16, rows, k, threads}

// A line of weights, while the one that comes 1 KB later begins its way from memory: with few rows 5 to 10 percent more GB/s.
static inline U32 stream(const void* w, int rows) {
    if (rows <= 2) __builtin_prefetch((const char*)w + 1024, 0, 2);
    return load<U32>(w);
}

// ---------------------------------------------------------------- bfloat16

#if defined(__AVX512BF16__)  // the processor multiplies pairs of bfloat16 itself: x stays as it is
typedef uint16_t Input;
static inline F32 dot2(F32 acc, U32 w, const Input* x) {
    return (F32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)load<U32>(x));
}
#else  // a bfloat16 is the upper half of a float32; x comes as float32, of each 32 inputs the even ones before the odd ones
typedef float Input;
static inline F32 dot2(F32 acc, U32 w, const Input* x) {
    acc += as_float(w << 16) * load<F32>(x);
    return acc + as_float(w & 0xffff0000u) * load<F32>(x + 16);
}
#endif

static const Input* as_inputs(const uint16_t* x, int64_t count, int threads) {
#if defined(__AVX512BF16__)
    (void)count, (void)threads;
    return x;
#else
    float* inputs = (float*)scratch.at_least(count * sizeof(float));
#pragma omp parallel for num_threads(threads) schedule(static) if (count > 65536)
    for (int64_t i = 0; i < count; i += 32) {
        U32 pair = load<U32>(x + i);
        store(inputs + i, pair << 16);
        store(inputs + i + 16, pair & 0xffff0000u);
    }
    return inputs;
#endif
}

// sums[R rows][C outputs, `apart` from each other].
template <int R, int C> static void bf16_tile(const uint16_t* w, const Input* x, float* sums, int64_t apart, int64_t k) {
    F32 acc[R][C] = {};
    for (int64_t i = 0; i < k; i += 32) {
        U32 pairs[C];
        UNROLL for (int c = 0; c < C; c++) pairs[c] = stream(w + c * apart * k + i, R);
        UNROLL for (int r = 0; r < R; r++) {
            UNROLL for (int c = 0; c < C; c++) acc[r][c] = dot2(acc[r][c], pairs[c], x + r * k + i);
        }
    }
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < C; c++) sums[r * CHUNK + c * apart] = sum(acc[r][c]);
    }
}

template <int R> static void bf16_rows(const uint16_t* w, const Input* x, float* sums, int64_t outputs, int64_t k) {
    const int C = R <= 2 ? 8 : 4;
    const int64_t apart = outputs / C;  // each stretch is `apart` whole rows of w, one behind the other in memory
    for (int64_t o = 0; o < apart; o++) bf16_tile<R, C>(w + o * k, x, sums + o, apart, k);
    for (int64_t o = C * apart; o < outputs; o++) bf16_tile<R, 1>(w + o * k, x, sums + o, 1, k);
}

struct Bf16Product {
    int64_t k;
    const Input* x;

    void tile(const Matrix& matrix, int64_t start, int64_t count, int64_t row, int height, float* sums) const {
        decltype(&bf16_rows<1>) tiles[] = {bf16_rows<1>, bf16_rows<2>, bf16_rows<3>, bf16_rows<4>, bf16_rows<5>, bf16_rows<6>};
        tiles[height - 1]((const uint16_t*)matrix.w + start * k, x + row * k, sums, count, k);
    }
};

extern "C" void bf16_product(const uint16_t* x, CALL_ARGUMENTS) {
    multiply(Bf16Product{k, as_inputs(x, rows * k, threads)}, CALL);
}

// gate = gelu(gate) * up, of `count` numbers, a multiple of 16: for products that torch made.
extern "C" void bf16_gate(uint16_t* gate, const uint16_t* up, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (count > 65536)
    for (int64_t i = 0; i < count; i += 16) store(gate + i, to_bf16(gelu(read16(gate, i, true)) * read16(up, i, true)));
}

// y = x / root of its mean square, times 1 + weight: in torch ten small operations, which at one row are mostly overhead.
extern "C" void bf16_rms_norm(const uint16_t* x, const uint16_t* weight, uint16_t* y, int64_t rows, int64_t width, float eps,
                              int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 8)
    for (int64_t row = 0; row < rows; row++) {
        const uint16_t* from = x + row * width;
        F32 squares = {};
        for (int64_t i = 0; i < width; i += 16) squares += read16(from, i, true) * read16(from, i, true);
        float factor = 1 / std::sqrt(sum(squares) / width + eps);
        for (int64_t i = 0; i < width; i += 16) {
            store(y + row * width + i, to_bf16(read16(from, i, true) * factor * (read16(weight, i, true) + 1)));
        }
    }
}

// ---------------------------------------------------------------- attention of one new token a row

const int TILE_HEADS = 4;  // query heads of a key head that a thread takes at a time

// What `bf16_attend` is about. Keys and values of a row and head lie slot behind slot, `width` numbers each.
struct Cache {
    uint16_t *keys, *values;
    int64_t row_stride, head_stride, slots, width;
};

// RoPE: y = x turned by the angles whose cosines and sines come; x[i] and x[i + width / 2] are a pair.
static void turn(const uint16_t* x, const uint16_t* cos, const uint16_t* sin, uint16_t* y, int64_t width) {
    const int64_t half = width / 2;
    for (int64_t i = 0; i < half; i += 16) {
        F32 first = read16(x, i, true), second = read16(x, i + half, true);
        store(y + i, to_bf16(first * read16(cos, i, true) - second * read16(sin, i, true)));
        store(y + i + half, to_bf16(second * read16(cos, i + half, true) + first * read16(sin, i + half, true)));
    }
}

// scores[slots] -> e^(score - highest), 0 where the mask forbids; returns their sum. Room for whole vectors is needed.
static float weigh(float* scores, int64_t slots, const uint8_t* mask, float scale, float cap) {
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
    float most = highest[0];
    for (int j = 1; j < 16; j++) most = std::max(most, highest[j]);
    for (int64_t s = 0; s < slots; s += 16) {
        F32 v = load<F32>(scores + s), weights = exponential(v - most);
        weights = v < -1e38f ? F32{} : weights;
        total += weights;
        store(scores + s, weights);
    }
    return sum(total);
}

// y[R heads][width] of q[R heads][width]; `scores` has room for R times `slots`, rounded up to whole chunks.
template <int R>
static void attend(const Cache& cache, const uint16_t* keys, const uint16_t* values, const Input* q, const uint8_t* mask,
                   float scale, float cap, float* scores, uint16_t* y) {
    const int64_t width = cache.width, room = (cache.slots + CHUNK - 1) / CHUNK * CHUNK;
    for (int64_t s = 0; s < cache.slots; s += CHUNK) {
        float sums[R * CHUNK];
        bf16_rows<R>(keys + s * width, q, sums, std::min(CHUNK, cache.slots - s), width);
        for (int r = 0; r < R; r++) memcpy(scores + r * room + s, sums + r * CHUNK, CHUNK * sizeof(float));
    }
    float share[R];
    for (int r = 0; r < R; r++) share[r] = 1 / weigh(scores + r * room, cache.slots, mask, scale, cap);
    for (int64_t i = 0; i < width; i += 32) {
        F32 even[R] = {}, odd[R] = {};
        for (int64_t s = 0; s < cache.slots; s++) {
            U32 pair = load<U32>(values + s * width + i);
            UNROLL for (int r = 0; r < R; r++) {
                even[r] += as_float(pair << 16) * scores[r * room + s];
                odd[r] += as_float(pair & 0xffff0000u) * scores[r * room + s];
            }
        }
        for (int r = 0; r < R; r++) {
            U32 low = __builtin_convertvector(to_bf16(even[r] * share[r]), U32);
            U32 high = __builtin_convertvector(to_bf16(odd[r] * share[r]), U32);
            store(y + r * width + i, low | high << 16);
        }
    }
}

// One new token in each row, qkv[rows, (heads + 2 kv_heads) width]: turns q and k, puts k and v into the slot of the row's position
// (which counts from 1), lets q look at the first `slots` slots, or those of them that mask[rows, slots] allows. y[rows, heads width].
extern "C" void bf16_attend(const uint16_t* qkv, const uint16_t* cos, const uint16_t* sin, const int64_t* positions, uint16_t* keys,
                            uint16_t* values, int64_t row_stride, int64_t head_stride, int64_t slots, const uint8_t* mask,
                            float scale, float cap, uint16_t* y, int64_t rows, int64_t heads, int64_t kv_heads, int64_t width,
                            int threads) {
    const Cache cache = {keys, values, row_stride, head_stride, slots, width};
    uint16_t* turned = (uint16_t*)attended.at_least(rows * heads * width * sizeof(uint16_t));
    for (int64_t row = 0; row < rows; row++, cos += width, sin += width) {
        const uint16_t* x = qkv + row * (heads + 2 * kv_heads) * width;
        for (int64_t h = 0; h < heads; h++) turn(x + h * width, cos, sin, turned + (row * heads + h) * width, width);
        for (int64_t h = 0; h < kv_heads; h++) {
            const int64_t slot = row * row_stride + h * head_stride + (positions[row] - 1) * width;
            turn(x + (heads + h) * width, cos, sin, keys + slot, width);
            memcpy(values + slot, x + (heads + kv_heads + h) * width, width * sizeof(uint16_t));
        }
    }
    const Input* q = as_inputs(turned, rows * heads * width, 1);
    const int64_t group = heads / kv_heads, parts = (group + TILE_HEADS - 1) / TILE_HEADS;
    const int64_t room = (slots + CHUNK - 1) / CHUNK * CHUNK;
#pragma omp parallel for num_threads(std::min<int64_t>(threads, rows * kv_heads * parts)) schedule(dynamic)
    for (int64_t task = 0; task < rows * kv_heads * parts; task++) {
        const int64_t row = task / (kv_heads * parts), head = task / parts % kv_heads, part = task % parts;
        const int64_t first = head * group + part * TILE_HEADS, count = std::min<int64_t>(TILE_HEADS, group - part * TILE_HEADS);
        const int64_t place = row * row_stride + head * head_stride, at = (row * heads + first) * width;
        decltype(&attend<1>) tiles[] = {attend<1>, attend<2>, attend<3>, attend<4>};
        tiles[count - 1](cache, keys + place, values + place, q + at, mask ? mask + row * slots : nullptr, scale, cap,
                         (float*)scored.at_least(TILE_HEADS * room * sizeof(float)), y + at);
    }
}

// ---------------------------------------------------------------- int8 and int4

// acc[o] += sum of w[4 o + j] * x[j], j < 4: unsigned weights of 16 outputs, four signed inputs in one word.
static inline I32 dot4(I32 acc, U32 w, int32_t x) {
#if defined(__AVX512VNNI__)
    return (I32)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
    typedef __m256i Halves __attribute__((may_alias));
    __m256i xs = _mm256_set1_epi32(x), low = _mm256_set1_epi16(255);
    __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(xs, 8), 8), x_odd = _mm256_srai_epi16(xs, 8);
    __m256i part[2];
    for (int h = 0; h < 2; h++) {
        __m256i ws = ((Halves*)&w)[h];
        part[h] = _mm256_add_epi32(_mm256_madd_epi16(_mm256_and_si256(ws, low), x_even),
                                   _mm256_madd_epi16(_mm256_srli_epi16(ws, 8), x_odd));
    }
    return acc + load<I32>(part);
#else
    for (int j = 0; j < 4; j++) acc += (I32)(w >> (8 * j) & 255) * (int32_t)(int8_t)((uint32_t)x >> (8 * j));
    return acc;
#endif
}

// Rows of x in 8 bits: each group of G inputs has its own scale; `start` is what the unsigned weights add too much.
struct Rows {
    int8_t* q;
    float* scale;
    int32_t* start;
    int64_t k, groups;
};

template <int G>
static void quantize_group(const void* x, bool is_bf16, int64_t i, int zero, Rows rows) {
    F32 largest = {}, poison = {}, v[G / 16];
    for (int j = 0; j < G / 16; j++) {
        v[j] = read16(x, i + 16 * j, is_bf16);
        F32 size = as_float((U32)v[j] & 0x7fffffffu);
        largest = largest > size ? largest : size;
        poison += v[j] * 0;  // not a number, where an input is none: the scale carries it on
    }
    float top = 0;
    for (int j = 0; j < 16; j++) top = std::max(top, largest[j]);
    float inverse = top > 0 ? 127 / top : 0;
    I32 total = {};
    for (int j = 0; j < G / 16; j++) {
        // Adding 1.5 x 2^23 leaves the rounded integer in the lowest bits of the float.
        I32 q = (I32)(v[j] * inverse + 12582912.0f) - 0x4b400000;
        total += q;
        store(rows.q + i + 16 * j, __builtin_convertvector(q, I8));
    }
    int32_t whole = 0;
    for (int j = 0; j < 16; j++) whole += total[j];
    rows.scale[i / G] = top / 127 + sum(poison);
    rows.start[i / G] = -zero * whole;
}

// sums[R rows][16 outputs of C blocks that are `apart` from each other], from `row` on.
template <int BITS, int G, int R, int C>
static void int_tile(const uint8_t* w, const uint16_t* scales, int64_t apart, Rows x, int64_t row, float* sums) {
    const int64_t k = x.k, bytes = 16 * k * BITS / 8;  // of one block
    const int8_t* q = x.q + row * k;
    const float* x_scale = x.scale + row * x.groups;
    const int32_t* x_start = x.start + row * x.groups;
    F32 total[C][R] = {};
    for (int64_t g = 0; g < x.groups; g++) {
        I32 acc[C][R];
        UNROLL for (int r = 0; r < R; r++) {
            UNROLL for (int c = 0; c < C; c++) acc[c][r] = I32{} + x_start[r * x.groups + g];
        }
        for (int line = 0; line < G * BITS / 32; line++, w += 64, q += 32 / BITS) {
            U32 low[C], high[C];
            UNROLL for (int c = 0; c < C; c++) {
                U32 packed = stream(w + c * apart * bytes, R);
                low[c] = BITS == 8 ? packed : packed & 0x0f0f0f0fu;
                high[c] = packed >> 4 & 0x0f0f0f0fu;
            }
            UNROLL for (int r = 0; r < R; r++) {
                UNROLL for (int c = 0; c < C; c++) acc[c][r] = dot4(acc[c][r], low[c], load<int32_t>(q + r * k));
            }
            if (BITS == 8) continue;
            UNROLL for (int r = 0; r < R; r++) {
                UNROLL for (int c = 0; c < C; c++) acc[c][r] = dot4(acc[c][r], high[c], load<int32_t>(q + r * k + 4));
            }
        }
        UNROLL for (int c = 0; c < C; c++) {
            F32 scale = BITS == 8 ? F32{} + 1 : read16(scales, (c * apart * x.groups + g) * 16, true);
            UNROLL for (int r = 0; r < R; r++) {
                F32 floats = __builtin_convertvector(acc[c][r], F32);
                total[c][r] += floats * (BITS == 8 ? F32{} + x_scale[r * x.groups + g] : scale * x_scale[r * x.groups + g]);
            }
        }
    }
    for (int c = 0; c < C; c++) {
        for (int r = 0; r < R; r++) {
            F32 out = BITS == 8 ? total[c][r] * read16(scales, c * apart * 16, true) : total[c][r];
            store(sums + r * CHUNK + c * apart * 16, out);
        }
    }
}

template <int BITS, int G> struct IntProduct {
    Rows x;

    template <int R> static void blocks(const uint8_t* w, const uint16_t* scales, int64_t count, Rows x, int64_t row, float* sums) {
        const int64_t bytes = 2 * x.k * BITS, step = 16 * (BITS == 8 ? 1 : x.groups);
        const int64_t apart = count / 4;  // four stretches of whole blocks
        for (int64_t b = 0; b < apart; b++) int_tile<BITS, G, R, 4>(w + b * bytes, scales + b * step, apart, x, row, sums + b * 16);
        for (int64_t b = 4 * apart; b < count; b++) int_tile<BITS, G, R, 1>(w + b * bytes, scales + b * step, 1, x, row, sums + b * 16);
    }

    void tile(const Matrix& matrix, int64_t start, int64_t count, int64_t row, int height, float* sums) const {
        decltype(&blocks<1>) tiles[] = {blocks<1>, blocks<2>, blocks<3>, blocks<4>, blocks<5>, blocks<6>};
        const uint8_t* w = (const uint8_t*)matrix.w + start * x.k * BITS / 8;
        tiles[height - 1](w, matrix.scales + start * (BITS == 8 ? 1 : x.groups), (count + 15) / 16, x, row, sums);
    }
};

template <int BITS, int G> static void int_product(const Call& call, const void* x, bool x_is_bf16) {
    const int64_t groups = call.k / G, count = call.rows * call.k;
    char* memory = scratch.at_least(call.rows * (call.k + groups * 8));
    Rows inputs = {(int8_t*)memory, (float*)(memory + count), (int32_t*)(memory + count + call.rows * groups * 4), call.k, groups};
#pragma omp parallel for num_threads(call.threads) schedule(static) if (count > 65536)
    for (int64_t i = 0; i < count; i += G) quantize_group<G>(x, x_is_bf16, i, 1 << (BITS - 1), inputs);
    multiply(IntProduct<BITS, G>{inputs}, call);
}

extern "C" void int8_product(const void* x, int x_is_bf16, CALL_ARGUMENTS) { int_product<8, 64>(CALL, x, x_is_bf16); }
extern "C" void int4_product(const void* x, int x_is_bf16, CALL_ARGUMENTS) { int_product<4, 32>(CALL, x, x_is_bf16); }

// ---------------------------------------------------------------- rounding weights (quantization.py has the same in torch)

// 16 numbers of a row of `k`, from i on; zeros behind its end.
static inline F32 read_padded(const void* w, int64_t row, int64_t i, int64_t k, bool is_bf16) {
    if (i + 16 <= k) return read16(w, row * k + i, is_bf16);
    F32 out = {};
    for (int64_t j = i; j < k; j++) {
        uint32_t bits = is_bf16 ? (uint32_t)((const uint16_t*)w)[row * k + j] << 16 : ((const uint32_t*)w)[row * k + j];
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
    F32 q = (v + 12582912.0f) - 12582912.0f, least = F32{} + low, most = F32{} + high;
    q = q < least ? least : q;
    return q > most ? most : q;
}

static void int8_quantize_row(const void* w, bool is_bf16, int64_t row, int64_t k, int64_t padded, uint8_t* to, uint16_t* scale) {
    F32 top = {}, poison = {};
    for (int64_t i = 0; i < k; i += 16) {
        F32 v = read_padded(w, row, i, k, is_bf16), size = as_float((U32)v & 0x7fffffffu);
        top = top > size ? top : size;
        poison += v * 0;
    }
    float largest = 0;
    for (int j = 0; j < 16; j++) largest = std::max(largest, top[j]);
    U16 stored = to_bf16(F32{} + (largest / 127 + sum(poison)));
    *scale = stored[0];
    float inverse = inverse_of(as_float(__builtin_convertvector(stored, U32) << 16)[0]);
    for (int64_t i = 0; i < padded; i += 16) {
        F32 q = rounded(read_padded(w, row, i, k, is_bf16) * inverse, -127, 127) + 128;
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
        F32 most = v[0] > v[1] ? v[0] : v[1], least = v[0] < v[1] ? v[0] : v[1];
        float high = most[0], low = least[0];
        for (int j = 1; j < 16; j++) high = std::max(high, most[j]), low = std::min(low, least[j]);
        return high >= -low ? high : low;
    }
};

static void int4_quantize_row(const void* w, bool is_bf16, int64_t row, int64_t k, int64_t padded, uint8_t* to, uint16_t* scales) {
    for (int64_t i = 0; i < padded; i += 32) {
        Group group = {{read_padded(w, row, i, k, is_bf16), read_padded(w, row, i + 16, k, is_bf16)}};
        float extreme = group.extreme() + sum(group.v[0] * 0 + group.v[1] * 0);
        float scale = rounded_to_bf16(extreme / -8), least = group.error(scale);
        for (float fraction : {1.05f, 0.95f, 0.9f, 0.85f, 0.8f}) {
            float other = rounded_to_bf16(extreme * fraction / -8), error = group.error(other);
            scale = error < least ? other : scale;
            least = error < least ? error : least;
        }
        F32 q[2];
        group.round(scale, q);
        float dot = sum(q[0] * group.v[0] + q[1] * group.v[1]), norm = sum(q[0] * q[0] + q[1] * q[1]);
        float fitted = rounded_to_bf16(dot * inverse_of(norm));
        if (group.error(fitted) < least) group.round(scale = fitted, q);
        scales[i / 32 * 16] = to_bf16(F32{} + scale)[0];
        I8 bytes[2];
        for (int h = 0; h < 2; h++) bytes[h] = __builtin_convertvector(__builtin_convertvector(q[h] + 8, I32), I8);
        const uint8_t* values = (const uint8_t*)bytes;
        for (int line = 0; line < 4; line++) {
            uint32_t low = load<uint32_t>(values + 8 * line), high = load<uint32_t>(values + 8 * line + 4);
            store(to + (i / 8 + line) * 64, low | high << 4);  // each byte is below 16: nothing runs over
        }
    }
}

// w[n, k] -> the layout that the products read: whole blocks of 16 outputs, `padded` inputs.
extern "C" void int_quantize(int bits, const void* w, int is_bf16, int64_t n, int64_t k, int64_t padded, uint8_t* packed,
                             uint16_t* scales, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t block = 0; block < (n + 15) / 16; block++) {
        for (int64_t o = 0; o < std::min<int64_t>(16, n - block * 16); o++) {
            int64_t row = block * 16 + o;
            uint8_t* to = packed + block * 2 * padded * bits + o * 4;
            if (bits == 8) int8_quantize_row(w, is_bf16, row, k, padded, to, scales + row);
            else int4_quantize_row(w, is_bf16, row, k, padded, to, scales + block * padded / 2 + o);
        }
    }
}
