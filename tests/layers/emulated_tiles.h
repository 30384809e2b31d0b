// The tile instructions of Intel's AMX in plain C++, for tests on processors that do not have them. Included by tiles.h.
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2 (LDTILECFG, TILELOADD, TDPBF16PS, ...).
//
// An instruction that would fault on a processor, or give results that depend on what it was not given, is noted:
// `emulated_fault` returns the first such message. Loads and stores are plain copies, so AddressSanitizer sees those outside of
// the memory that was given. With the environment variable REFUSE_TILES, permission is refused.
#pragma once

#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

static std::atomic<const char*> first_fault{nullptr};
static std::atomic<int> configured_threads{0};
static std::atomic<int64_t> tile_products{0};
static std::atomic<bool> is_permitted{false};

static void check(bool holds, const char* message) {
    const char* none = nullptr;
    if (!holds) first_fault.compare_exchange_strong(none, message);
}

extern "C" const char* emulated_fault() {
    check(configured_threads == 0, "a thread keeps its tiles after the product");
    return first_fault;
}
extern "C" int64_t emulated_products() { return tile_products; }

static bool request_tiles() { return is_permitted = !getenv("REFUSE_TILES"); }

struct EmulatedTile {
    int rows, line_bytes;
    bool is_written;
    uint8_t lines[16][64];
};
static thread_local EmulatedTile emulated[8];
static thread_local bool is_configured;

static EmulatedTile& tile_of(int number) {
    check(is_configured, "a tile is used by a thread that has not configured its tiles");
    check(emulated[number].rows && emulated[number].line_bytes, "a tile is used that is not configured");
    return emulated[number];
}
static EmulatedTile& written_tile(int number) {
    check(tile_of(number).is_written, "a tile is read before it is written");
    return emulated[number];
}

static void emulated_loadconfig(const void* memory) {
    const uint8_t* bytes = (const uint8_t*)memory;
    uint8_t copy[64];
    memcpy(copy, bytes, 64);
    check(is_permitted, "tiles are configured without permission");
    check(copy[0] == 1, "the palette is not 1");
    for (int i = 1; i < 16; i++) check(copy[i] == 0, "a reserved byte of the configuration is not 0");
    for (int i = 0; i < 16; i++) {
        uint16_t line_bytes;
        memcpy(&line_bytes, copy + 16 + 2 * i, 2);
        const int rows = copy[48 + i];
        check(i < 8 || (line_bytes == 0 && rows == 0), "a tile is configured that does not exist");
        check(line_bytes <= 64 && rows <= 16 && (line_bytes == 0) == (rows == 0), "a tile has an impossible size");
        if (i < 8) emulated[i] = {rows, line_bytes, false, {}};
    }
    configured_threads += !is_configured;
    is_configured = true;
}
static void emulated_release() {
    configured_threads -= is_configured;
    is_configured = false;
}
static void emulated_zero(int to) {
    memset(tile_of(to).lines, 0, 1024);
    emulated[to].is_written = true;
}
static void emulated_loadd(int to, const void* from, int64_t stride) {
    emulated_zero(to);
    EmulatedTile& tile = emulated[to];
    for (int i = 0; i < tile.rows; i++) memcpy(tile.lines[i], (const char*)from + i * stride, tile.line_bytes);
}
static void emulated_stored(int from, void* to, int64_t stride) {
    const EmulatedTile& tile = written_tile(from);
    for (int i = 0; i < tile.rows; i++) memcpy((char*)to + i * stride, tile.lines[i], tile.line_bytes);
}

static float flushed(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }
static float bf16_at(const uint8_t* line, int i) {
    uint16_t half;
    memcpy(&half, line + 2 * i, 2);
    const uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return flushed(x);
}

// The sums of even and of odd inputs are added up apart, with one rounding per multiply-add; numbers below the normal ones are 0.
static void emulated_dpbf16ps(int to, int first, int second) {
    EmulatedTile& c = written_tile(to);
    const EmulatedTile &a = written_tile(first), &b = written_tile(second);
    check(to != first && to != second && first != second, "a product uses a tile twice");
    check(c.rows == a.rows && c.line_bytes == b.line_bytes && a.line_bytes == 4 * b.rows, "the sizes of a product do not match");
    tile_products++;
    for (int m = 0; m < c.rows; m++) {
        for (int n = 0; n < c.line_bytes / 4; n++) {
            float even = 0, odd = 0, sum;
            for (int k = 0; k < a.line_bytes / 4; k++) {
                even = flushed(std::fma(bf16_at(a.lines[m], 2 * k), bf16_at(b.lines[k], 2 * n), even));
                odd = flushed(std::fma(bf16_at(a.lines[m], 2 * k + 1), bf16_at(b.lines[k], 2 * n + 1), odd));
            }
            memcpy(&sum, c.lines[m] + 4 * n, 4);
            sum = flushed(flushed(sum) + flushed(even + odd));
            memcpy(c.lines[m] + 4 * n, &sum, 4);
        }
    }
}

// <immintrin.h> may have defined the real ones.
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_dpbf16ps emulated_dpbf16ps
