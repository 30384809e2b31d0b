// Matrix products y = x W^T for decoding on a CPU: bfloat16 weights as stored, int8, and int4 in groups of 32.
// Compiled once by kernels.py, which calls the three functions at the ends of the two parts; quantization.py draws the layouts.
//
// One token reads every weight once, so few rows are bound by memory: each thread walks several stretches of W side by side,
// because one stretch keeps too few cache lines in flight (measured: 1 stretch 22 GB/s, 8 stretches 29 GB/s, two cores).
// Many rows are bound by arithmetic: a tile of outputs x rows stays in registers while K passes by.
//
// Vectors are the compiler's own (16 lanes, whatever the machine has); only the 4-byte integer dot product names instructions.

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
static thread_local Scratch scratch;

// ---------------------------------------------------------------- bfloat16

// 32 bfloat16 -> the even ones and the odd ones as float32: a bfloat16 is the upper half of a float32.
static inline void split(const uint16_t* from, F32& even, F32& odd) {
    U32 pair = load<U32>(from);
    even = as_float(pair << 16);
    odd = as_float(pair & 0xffff0000u);
}

// y[R rows, C outputs]; x holds 32 inputs of each of the R rows in turn, as float32, evens before odds.
template <int R, int C>
static void bf16_tile(const uint16_t* w, const float* x, uint16_t* y, int64_t n, int64_t k) {
    F32 acc[R][C] = {};
    for (int64_t i = 0; i < k; i += 32, x += 32 * R) {
        F32 even[C], odd[C];
        UNROLL for (int c = 0; c < C; c++) split(w + c * k + i, even[c], odd[c]);
        UNROLL for (int r = 0; r < R; r++) {
            F32 input = load<F32>(x + r * 32);
            UNROLL for (int c = 0; c < C; c++) acc[r][c] += even[c] * input;
        }
        UNROLL for (int r = 0; r < R; r++) {
            F32 input = load<F32>(x + r * 32 + 16);
            UNROLL for (int c = 0; c < C; c++) acc[r][c] += odd[c] * input;
        }
    }
    for (int r = 0; r < R; r++) {
        F32 sums = {};
        for (int c = 0; c < C; c++) sums[c] = sum(acc[r][c]);
        U16 rounded = to_bf16(sums);
        for (int c = 0; c < C; c++) y[r * n + c] = rounded[c];
    }
}

template <int R>
static void bf16_rows(const uint16_t* w, const float* x, uint16_t* y, int64_t outputs, int64_t n, int64_t k) {
    const int C = R <= 2 ? 8 : 4;
    int64_t o = 0;
    for (; o + C <= outputs; o += C) bf16_tile<R, C>(w + o * k, x, y + o, n, k);
    for (; o < outputs; o++) bf16_tile<R, 1>(w + o * k, x, y + o, n, k);
}

extern "C" void bf16_product(const uint16_t* w, const uint16_t* x, uint16_t* y, int64_t rows, int64_t n, int64_t k, int threads) {
    decltype(&bf16_rows<1>) tiles[] = {bf16_rows<1>, bf16_rows<2>, bf16_rows<3>, bf16_rows<4>, bf16_rows<5>, bf16_rows<6>};
    float* inputs = (float*)scratch.at_least(rows * k * sizeof(float));
    const int64_t chunk = rows > 2 ? 128 : 32;  // outputs that a thread takes at a time: small enough for its cache
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            int64_t first = row / 6 * 6, height = std::min<int64_t>(6, rows - first);
            for (int64_t i = 0; i < k; i += 32) {
                F32 even, odd;
                split(x + row * k + i, even, odd);
                float* to = inputs + first * k + i * height + (row - first) * 32;
                store(to, even);
                store(to + 16, odd);
            }
        }
#pragma omp for schedule(dynamic)
        for (int64_t start = 0; start < n; start += chunk) {
            for (int64_t row = 0; row < rows; row += 6) {
                auto tile = tiles[std::min<int64_t>(6, rows - row) - 1];
                tile(w + start * k, inputs + row * k, y + row * n + start, std::min(chunk, n - start), n, k);
            }
        }
    }
}

// y = x / root of its mean square, times 1 + weight: in torch ten small operations, which at one row are mostly overhead.
extern "C" void bf16_rms_norm(const uint16_t* x, const uint16_t* weight, uint16_t* y, int64_t rows, int64_t width, float eps) {
    for (int64_t row = 0; row < rows; row++, x += width, y += width) {
        F32 squares = {};
        for (int64_t i = 0; i < width; i += 16) {
            F32 v = as_float(__builtin_convertvector(load<U16>(x + i), U32) << 16);
            squares += v * v;
        }
        float factor = 1 / std::sqrt(sum(squares) / width + eps);
        for (int64_t i = 0; i < width; i += 16) {
            F32 v = as_float(__builtin_convertvector(load<U16>(x + i), U32) << 16);
            F32 w = as_float(__builtin_convertvector(load<U16>(weight + i), U32) << 16);
            store(y + i, to_bf16(v * factor * (w + 1)));
        }
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

static inline F32 read16(const void* x, int64_t i, bool is_bf16) {
    if (!is_bf16) return load<F32>((const float*)x + i);
    return as_float(__builtin_convertvector(load<U16>((const uint16_t*)x + i), U32) << 16);
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

// What a call is about, beside the rows of x: the weights in blocks of 16 outputs, one bfloat16 scale an output (8 bits) or an
// output and group (4 bits), and y[rows, n].
struct Call {
    const uint8_t* w;
    const uint16_t* scales;
    void* y;
    bool y_is_bf16;
    int64_t n;
};

// y[R rows, 16 C outputs], from `row` and `block` on.
template <int BITS, int G, int R, int C>
static void int_tile(const Call& call, Rows x, int64_t row, int64_t block) {
    const int64_t k = x.k, bytes = 16 * k * BITS / 8;  // of one block
    const uint8_t* w = call.w + block * bytes;
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
                U32 packed = load<U32>(w + c * bytes);
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
            F32 scale = BITS == 8 ? F32{} + 1 : read16(call.scales, ((block + c) * x.groups + g) * 16, true);
            UNROLL for (int r = 0; r < R; r++) {
                F32 sums = __builtin_convertvector(acc[c][r], F32);
                total[c][r] += sums * (BITS == 8 ? F32{} + x_scale[r * x.groups + g] : scale * x_scale[r * x.groups + g]);
            }
        }
    }
    for (int c = 0; c < C; c++) {
        int64_t first = (block + c) * 16, count = std::min<int64_t>(16, call.n - first);
        for (int r = 0; r < R; r++) {
            F32 out = BITS == 8 ? total[c][r] * read16(call.scales, first, true) : total[c][r];
            U16 rounded = to_bf16(out);
            int64_t at = (row + r) * call.n + first;
            if (call.y_is_bf16) memcpy((uint16_t*)call.y + at, &rounded, 2 * count);
            else memcpy((float*)call.y + at, &out, 4 * count);
        }
    }
}

template <int BITS, int G, int R> static void int_rows(const Call& call, Rows x, int64_t row, int64_t block, int64_t end) {
    if (R == 1) {  // more stretches side by side: 6 percent more GB/s
        for (; block + 8 <= end; block += 8) int_tile<BITS, G, R, R == 1 ? 8 : 1>(call, x, row, block);
    }
    for (; block + 4 <= end; block += 4) int_tile<BITS, G, R, 4>(call, x, row, block);
    for (; block < end; block++) int_tile<BITS, G, R, 1>(call, x, row, block);
}

template <int BITS, int G> static void int_product(Call call, const void* x, bool x_is_bf16, int64_t rows, int64_t k, int threads) {
    decltype(&int_rows<BITS, G, 1>) tiles[] = {int_rows<BITS, G, 1>, int_rows<BITS, G, 2>, int_rows<BITS, G, 3>,
                                               int_rows<BITS, G, 4>, int_rows<BITS, G, 5>, int_rows<BITS, G, 6>};
    const int64_t groups = k / G, blocks = (call.n + 15) / 16;
    const int64_t chunk = rows == 1 && blocks >= 16 * threads ? 8 : 4;  // blocks that a thread takes at a time
    char* memory = scratch.at_least(rows * (k + groups * 8));
    Rows inputs = {(int8_t*)memory, (float*)(memory + rows * k), (int32_t*)(memory + rows * (k + groups * 4)), k, groups};
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * k; i += G) quantize_group<G>(x, x_is_bf16, i, 1 << (BITS - 1), inputs);
#pragma omp for schedule(dynamic)
        for (int64_t block = 0; block < blocks; block += chunk) {
            for (int64_t row = 0; row < rows; row += 6) {
                auto tile = tiles[std::min<int64_t>(6, rows - row) - 1];
                tile(call, inputs, row, block, std::min(block + chunk, blocks));
            }
        }
    }
}

extern "C" void int8_product(const uint8_t* w, const uint16_t* scales, const void* x, int x_is_bf16, void* y, int y_is_bf16,
                             int64_t rows, int64_t n, int64_t k, int threads) {
    int_product<8, 64>({w, scales, y, y_is_bf16 != 0, n}, x, x_is_bf16, rows, k, threads);
}

extern "C" void int4_product(const uint8_t* w, const uint16_t* scales, const void* x, int x_is_bf16, void* y, int y_is_bf16,
                             int64_t rows, int64_t n, int64_t k, int threads) {
    int_product<4, 32>({w, scales, y, y_is_bf16 != 0, n}, x, x_is_bf16, rows, k, threads);
}

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
