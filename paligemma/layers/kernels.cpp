// Decoding on a CPU: matrix products y = x W^T with bfloat16, int8 or int4 weights (in groups of 32), attention of one new token
// per row, RMS norm and gating. kernels.py compiles this file once and calls the functions marked extern "C"; int_formats.py
// documents the layouts of int8 and int4 weights.
//
// Each token needs every weight once, so products with few rows are limited by memory bandwidth: each thread reads several long
// ranges of W at the same time and prefetches ahead, because one range keeps too few cache lines in flight (notes/decoding.md has
// the numbers). Products with many rows are limited by arithmetic: the sums of a tile (outputs x rows) stay in registers while
// the loop runs over the inputs.
//
// At the end of a parallel loop all threads wait for each other. That costs a microsecond on an idle machine and milliseconds on
// a busy one, so loops are merged where possible.
//
// Vectors are the compiler's own vector types (16 lanes on every machine). Only the dot products of bfloat16 and 8-bit
// numbers use intrinsics.
//
// Shapes: B rows of x, O outputs and X inputs of one matrix, N query heads. As template parameters, B, O and N count only what
// one tile computes: rows, outputs (in int_tile: blocks of outputs) and query heads.

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

static inline U16 to_bf16(F32 value) {  // rounds to nearest even; a NaN keeps its top bits and stays a NaN
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

// Memory that is kept until the calling thread ends and only grows, so that a decoding step allocates nothing.
struct Scratch {
    std::unique_ptr<char[]> memory;
    size_t size = 0;
    char* at_least(size_t wanted) {
        if (wanted > size) memory.reset(new char[size = wanted]);
        return memory.get();
    }
};
static thread_local Scratch input_buffer, query_buffer, score_buffer;  // converted x; rotated queries and scores of attention

static inline F32 read16(const void* x, int64_t i, bool is_bf16) {
    if (!is_bf16) return load<F32>((const float*)x + i);
    return as_float(__builtin_convertvector(load<U16>((const uint16_t*)x + i), U32) << 16);
}

// 1.5 x 2^23. Adding this number to a float of magnitude below 2^22 leaves the rounded integer in the lowest bits of the sum;
// subtracting it again gives the rounded float.
const float ROUNDING = 12582912.0f;
const int32_t ROUNDING_BITS = 0x4b400000;

// e^x, with an error of one or two units in the last place: 2^n, made from the bits of the exponent, times a polynomial.
static inline F32 exponential(F32 x) {
    const F32 low = F32{} - 87.0f, high = F32{} + 88.0f;
    x = x < low ? low : x;
    x = x > high ? high : x;
    F32 n = (x * 1.44269504f + ROUNDING) - ROUNDING;
    F32 r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    F32 p = 1 + r * (1 + r * (0.5f + r * (0.166666672f + r * (0.0416657962f + r * (0.00833345205f + r * 0.00139313773f)))));
    return as_float((U32)p + ((U32)__builtin_convertvector(n, I32) << 23));
}
// The tanh approximation of GELU.
static inline F32 gelu(F32 x) { return x / (1 + exponential(x * (-1.59576912f - 0.0713548163f * x * x))); }

// ---------------------------------------------------------------- shared by all products

const int TILE_ROWS = 6;     // maximum number of rows of x in a tile
const int64_t CHUNK = 512;   // maximum number of outputs in a task

struct Matrix {
    const void* w;
    const uint16_t* scales;  // bfloat16: one per output (int8), or per output and group (int4); null for bfloat16 weights
    int64_t outputs;         // O; 0 = no matrix
};

// Multiplies x[B, X] with one to three matrices. y[B, all outputs] has the outputs in the order of the matrices; if is_gated,
// y[B, O] = gelu(x first^T) * (x second^T).
struct Call {
    Matrix matrices[3];
    int is_gated;
    void* y;
    int y_is_bf16;
    int64_t rows, inputs;
    int threads;
};

// Writes y[offset + i] = sums[i], or gelu(sums[i]) * up[i] if `up` is not null.
static void write_outputs(const Call& call, int64_t offset, int64_t count, const float* sums, const float* up) {
    for (int64_t i = 0; i < count; i += 16) {
        F32 out = load<F32>(sums + i);
        if (up) out = gelu(out) * load<F32>(up + i);
        U16 rounded = to_bf16(out);
        int64_t size = std::min<int64_t>(16, count - i);
        if (call.y_is_bf16) memcpy((uint16_t*)call.y + offset + i, &rounded, 2 * size);
        else memcpy((float*)call.y + offset + i, &out, 4 * size);
    }
}

// Product::tile(matrix, first output, outputs, first row, rows, sums[rows][CHUNK]) computes one tile. Tasks are scheduled
// dynamically, so if another program delays one thread, the other threads wait for at most one chunk.
template <class Product> static void multiply(const Product& product, const Call& call) {
    const Matrix* matrices = call.matrices;
    const int parts = call.is_gated ? 1 : 3;
    // Few rows: large chunks, which are long ranges of memory. Many rows: chunks small enough to stay in the L1 cache while they
    // are multiplied with all rows.
    int64_t width = 0, tasks = 0, chunk = call.rows <= 2 ? CHUNK : call.rows <= 32 ? 64 : 32;
    for (int i = 0; i < parts; i++) width += matrices[i].outputs;
    while (chunk > 32 && width < 8 * chunk * call.threads) chunk /= 2;
    for (int i = 0; i < parts; i++) tasks += (matrices[i].outputs + chunk - 1) / chunk;
#pragma omp parallel for num_threads(call.threads) schedule(dynamic)
    for (int64_t task = 0; task < tasks; task++) {
        const Matrix* matrix = matrices;
        int64_t start = task * chunk, before = 0;
        for (; start >= matrix->outputs; matrix++) {
            start -= (matrix->outputs + chunk - 1) / chunk * chunk;
            before += matrix->outputs;
        }
        const int64_t count = std::min(chunk, matrix->outputs - start);
        float sums[TILE_ROWS * CHUNK], ups[TILE_ROWS * CHUNK];
        for (int64_t row = 0; row < call.rows; row += TILE_ROWS) {
            const int height = std::min<int64_t>(TILE_ROWS, call.rows - row);
            product.tile(*matrix, start, count, row, height, sums);
            if (call.is_gated) product.tile(matrices[1], start, count, row, height, ups);
            for (int r = 0; r < height; r++) {
                const float* up = call.is_gated ? ups + r * CHUNK : nullptr;
                write_outputs(call, (row + r) * width + before + start, count, sums + r * CHUNK, up);
            }
        }
    }
}

// The parameters of the three products, besides x.
#define CALL_ARGUMENTS \
    const void *w0, const uint16_t *scales0, int64_t outputs0, const void *w1, const uint16_t *scales1, int64_t outputs1, \
        const void *w2, const uint16_t *scales2, int64_t outputs2, int is_gated, void *y, int y_is_bf16, int64_t rows, \
        int64_t inputs, int threads
#define CALL \
    Call{{{w0, scales0, outputs0}, {w1, scales1, outputs1}, {w2, scales2, outputs2}}, is_gated, y, y_is_bf16, rows, inputs, \
         threads}

// Loads a cache line of weights and prefetches the line 1 KB ahead, which with few rows gives 5 to 10 percent more GB/s.
static inline U32 stream(const void* w, int rows) {
    if (rows <= 2) __builtin_prefetch((const char*)w + 1024, 0, 2);
    return load<U32>(w);
}

// ---------------------------------------------------------------- bfloat16

#if defined(__AVX512BF16__)  // the processor multiplies pairs of bfloat16, so x is used as it is
typedef uint16_t Input;
static inline F32 dot2(F32 acc, U32 w, const Input* x) {
    return (F32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)load<U32>(x));
}
#else  // x is converted to float32 (whose upper 16 bits are the bfloat16); of each 32 inputs, the even ones come first
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
    float* inputs = (float*)input_buffer.at_least(count * sizeof(float));
#pragma omp parallel for num_threads(threads) schedule(static) if (count > 65536)
    for (int64_t i = 0; i < count; i += 32) {
        U32 pair = load<U32>(x + i);
        store(inputs + i, pair << 16);
        store(inputs + i + 16, pair & 0xffff0000u);
    }
    return inputs;
#endif
}

// Computes sums for B rows and O outputs. The outputs are split into O ranges of `stride` rows of w; the tile computes one row of
// each range.
template <int B, int O> static void bf16_tile(const uint16_t* w, const Input* x, float* sums, int64_t stride, int64_t inputs) {
    F32 acc[B][O] = {};
    for (int64_t i = 0; i < inputs; i += 32) {
        U32 pairs[O];
        UNROLL for (int c = 0; c < O; c++) pairs[c] = stream(w + c * stride * inputs + i, B);
        UNROLL for (int r = 0; r < B; r++) {
            UNROLL for (int c = 0; c < O; c++) acc[r][c] = dot2(acc[r][c], pairs[c], x + r * inputs + i);
        }
    }
    for (int r = 0; r < B; r++) {
        for (int c = 0; c < O; c++) sums[r * CHUNK + c * stride] = sum(acc[r][c]);
    }
}

template <int B> static void bf16_rows(const uint16_t* w, const Input* x, float* sums, int64_t outputs, int64_t inputs) {
    const int O = B <= 2 ? 8 : 4;
    const int64_t stride = outputs / O;  // each of the O ranges consists of `stride` consecutive rows of w
    for (int64_t o = 0; o < stride; o++) bf16_tile<B, O>(w + o * inputs, x, sums + o, stride, inputs);
    for (int64_t o = O * stride; o < outputs; o++) bf16_tile<B, 1>(w + o * inputs, x, sums + o, 1, inputs);
}

struct Bf16Product {
    int64_t inputs;
    const Input* x;

    void tile(const Matrix& matrix, int64_t start, int64_t count, int64_t row, int height, float* sums) const {
        decltype(&bf16_rows<1>) tiles[] = {bf16_rows<1>, bf16_rows<2>, bf16_rows<3>, bf16_rows<4>, bf16_rows<5>, bf16_rows<6>};
        tiles[height - 1]((const uint16_t*)matrix.w + start * inputs, x + row * inputs, sums, count, inputs);
    }
};

extern "C" void bf16_product(const uint16_t* x, CALL_ARGUMENTS) {
    multiply(Bf16Product{inputs, as_inputs(x, rows * inputs, threads)}, CALL);
}

// gate = gelu(gate) * up for `count` numbers, a multiple of 16; used if torch computed the two products.
extern "C" void bf16_gate(uint16_t* gate, const uint16_t* up, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (count > 65536)
    for (int64_t i = 0; i < count; i += 16) store(gate + i, to_bf16(gelu(read16(gate, i, true)) * read16(up, i, true)));
}

// y = x / root mean square * (1 + weight). In torch these are ten small operations, which for one row are mostly overhead.
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

// ---------------------------------------------------------------- attention of one new token per row

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

// ---------------------------------------------------------------- int8 and int4

// acc[o] += sum over j < 4 of w[4 o + j] * x[j], for the unsigned weights of 16 outputs and four signed inputs in one word.
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

// Rows of x in 8 bits, with one scale per group of inputs. Weights are stored with an offset, as q + 128 (int8) or q + 8 (int4),
// which adds offset * sum(x) to each sum, so sums begin at `start` = -offset * sum(x).
struct Rows {
    int8_t* q;
    float* scale;
    int32_t* start;
    int64_t inputs, groups;
};

template <int GROUP>
static void quantize_group(const void* x, bool is_bf16, int64_t i, int weight_offset, Rows rows) {
    F32 largest = {}, nan = {}, v[GROUP / 16];
    for (int j = 0; j < GROUP / 16; j++) {
        v[j] = read16(x, i + 16 * j, is_bf16);
        F32 size = as_float((U32)v[j] & 0x7fffffffu);
        largest = largest > size ? largest : size;
        nan += v[j] * 0;  // becomes NaN if an input is NaN or infinite; added to the scale, it makes the output NaN
    }
    float top = 0;
    for (int j = 0; j < 16; j++) top = std::max(top, largest[j]);
    float inverse = top > 0 ? 127 / top : 0;
    I32 total = {};
    for (int j = 0; j < GROUP / 16; j++) {
        I32 q = (I32)(v[j] * inverse + ROUNDING) - ROUNDING_BITS;
        total += q;
        store(rows.q + i + 16 * j, __builtin_convertvector(q, I8));
    }
    int32_t input_sum = 0;
    for (int j = 0; j < 16; j++) input_sum += total[j];
    rows.scale[i / GROUP] = top / 127 + sum(nan);
    rows.start[i / GROUP] = -weight_offset * input_sum;
}

// Computes sums for B rows, starting at `row`, and 16 outputs in each of O blocks. The blocks of w are split into O ranges of
// `stride` blocks; the tile takes one block of each range.
template <int BITS, int GROUP, int B, int O>
static void int_tile(const uint8_t* w, const uint16_t* scales, int64_t stride, Rows x, int64_t row, float* sums) {
    const int64_t inputs = x.inputs, bytes = 16 * inputs * BITS / 8;  // bytes of one block
    const int8_t* q = x.q + row * inputs;
    const float* x_scale = x.scale + row * x.groups;
    const int32_t* x_start = x.start + row * x.groups;
    F32 total[O][B] = {};
    for (int64_t g = 0; g < x.groups; g++) {
        I32 acc[O][B];
        UNROLL for (int r = 0; r < B; r++) {
            UNROLL for (int c = 0; c < O; c++) acc[c][r] = I32{} + x_start[r * x.groups + g];
        }
        for (int line = 0; line < GROUP * BITS / 32; line++, w += 64, q += 32 / BITS) {
            U32 low[O], high[O];
            UNROLL for (int c = 0; c < O; c++) {
                U32 packed = stream(w + c * stride * bytes, B);
                low[c] = BITS == 8 ? packed : packed & 0x0f0f0f0fu;
                high[c] = packed >> 4 & 0x0f0f0f0fu;
            }
            UNROLL for (int r = 0; r < B; r++) {
                UNROLL for (int c = 0; c < O; c++) acc[c][r] = dot4(acc[c][r], low[c], load<int32_t>(q + r * inputs));
            }
            if (BITS == 8) continue;
            UNROLL for (int r = 0; r < B; r++) {
                UNROLL for (int c = 0; c < O; c++) acc[c][r] = dot4(acc[c][r], high[c], load<int32_t>(q + r * inputs + 4));
            }
        }
        UNROLL for (int c = 0; c < O; c++) {
            F32 scale = BITS == 8 ? F32{} + 1 : read16(scales, (c * stride * x.groups + g) * 16, true);
            UNROLL for (int r = 0; r < B; r++) {
                F32 floats = __builtin_convertvector(acc[c][r], F32);
                total[c][r] += floats * (BITS == 8 ? F32{} + x_scale[r * x.groups + g] : scale * x_scale[r * x.groups + g]);
            }
        }
    }
    for (int c = 0; c < O; c++) {
        for (int r = 0; r < B; r++) {
            F32 out = BITS == 8 ? total[c][r] * read16(scales, c * stride * 16, true) : total[c][r];
            store(sums + r * CHUNK + c * stride * 16, out);
        }
    }
}

template <int BITS, int GROUP> struct IntProduct {
    Rows x;

    template <int B>
    static void blocks(const uint8_t* w, const uint16_t* scales, int64_t count, Rows x, int64_t row, float* sums) {
        const int64_t bytes = 2 * x.inputs * BITS, step = 16 * (BITS == 8 ? 1 : x.groups);
        const int64_t stride = count / 4;  // four ranges of whole blocks
        for (int64_t b = 0; b < stride; b++) {
            int_tile<BITS, GROUP, B, 4>(w + b * bytes, scales + b * step, stride, x, row, sums + b * 16);
        }
        for (int64_t b = 4 * stride; b < count; b++) {
            int_tile<BITS, GROUP, B, 1>(w + b * bytes, scales + b * step, 1, x, row, sums + b * 16);
        }
    }

    void tile(const Matrix& matrix, int64_t start, int64_t count, int64_t row, int height, float* sums) const {
        decltype(&blocks<1>) tiles[] = {blocks<1>, blocks<2>, blocks<3>, blocks<4>, blocks<5>, blocks<6>};
        const uint8_t* w = (const uint8_t*)matrix.w + start * x.inputs * BITS / 8;
        tiles[height - 1](w, matrix.scales + start * (BITS == 8 ? 1 : x.groups), (count + 15) / 16, x, row, sums);
    }
};

template <int BITS, int GROUP> static void int_product(const Call& call, const void* x, bool x_is_bf16) {
    const int64_t groups = call.inputs / GROUP, count = call.rows * call.inputs;
    char* memory = input_buffer.at_least(call.rows * (call.inputs + groups * 8));
    Rows inputs = {(int8_t*)memory, (float*)(memory + count), (int32_t*)(memory + count + call.rows * groups * 4), call.inputs,
                   groups};
#pragma omp parallel for num_threads(call.threads) schedule(static) if (count > 65536)
    for (int64_t i = 0; i < count; i += GROUP) quantize_group<GROUP>(x, x_is_bf16, i, 1 << (BITS - 1), inputs);
    multiply(IntProduct<BITS, GROUP>{inputs}, call);
}

extern "C" void int8_product(const void* x, int x_is_bf16, CALL_ARGUMENTS) { int_product<8, 64>(CALL, x, x_is_bf16); }
extern "C" void int4_product(const void* x, int x_is_bf16, CALL_ARGUMENTS) { int_product<4, 32>(CALL, x, x_is_bf16); }

// ---------------------------------------------------------------- rounding weights (int_formats.py does the same with torch)

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
