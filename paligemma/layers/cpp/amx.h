// Intel's AMX: eight registers, "tiles", of 16 lines of 64 bytes. Linux lets a process use them on request.
#pragma once

#include <cstdint>

#if defined(EMULATED_TILES)  // a header of the tests, which defines the instructions and `request_tiles` in plain C++
#include EMULATED_TILES
#define HAS_TILES
#define WITH_TILES
#elif defined(__x86_64__) && defined(__linux__) && (__has_include(<amxtileintrin.h>) || __has_include(<amxintrin.h>))
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_TILES
#define WITH_TILES __attribute__((target("amx-tile,amx-bf16,amx-int8")))  // whatever the compiler's flags are
// Whether the processor has tiles for bfloat16 and int8, and the system lets this process use them.
static bool request_tiles() {
    const int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;  // the system's names
    unsigned a, b, c, d = 0;
    const unsigned all = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & all) != all) return false;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

#if defined(HAS_TILES)
// While it exists, the calling thread can use all lines of all tiles. A thread with tiles takes longer to switch.
struct TileConfiguration {
    WITH_TILES TileConfiguration() {
        alignas(64) uint8_t memory[64] = {1};  // the number of the only layout that there is; sizes of lines; numbers of lines
        for (int i = 0; i < 8; i++) memory[16 + 2 * i] = 64, memory[48 + i] = 16;
        asm volatile("" : : "r"(memory) : "memory");  // GCC 12 does not know that all 64 bytes are read
        _tile_loadconfig(memory);
    }
    WITH_TILES ~TileConfiguration() { _tile_release(); }
    TileConfiguration(const TileConfiguration&) = delete;
};
#endif
