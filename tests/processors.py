"""How this machine stands in for processors with fewer instructions.

A processor can be told to leave instructions unused, never to have more; which instruction sets that leaves is `here()`, and
conftest.py prints at the end of a run which were tested and which this machine lacks.
"""

import os
from pathlib import Path

from paligemma.layers import compiling, instruction_sets
from paligemma.layers.instruction_sets import SETS, InstructionSet

# Values of the variables in `environment`, which torch's libraries read. "off": without our kernels, too.
TORCH = {
    "off": ("default", "SSE41", "SSE4_2"),
    "avx2": ("avx2", "AVX2", "AVX2"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512"),
    "avx512_bf16": ("avx512", "AVX512_CORE_BF16", "AVX512"),
    "amx": ("avx512", "AVX512_CORE_AMX", "AVX512"),
}

# Numbers that torch's libraries compute otherwise on another processor: the files whose tests are run once for each set.
WHOLE_FILES = ("test_modeling_gemma", "test_modeling_paligemma", "test_modeling_siglip", "test_oracle", "objects/test_mask_codec")
MARKED = ("test_quantization", "test_prefill_attention", "test_fast_tower")  # of these, the tests that are marked
FILES = (*WHOLE_FILES, *(f"layers/{name}" for name in MARKED))

EMULATED_TILES = Path(__file__).parent / "layers" / "emulated_tiles.h"  # stands in for AMX in tiles.h, on any processor
TILES = InstructionSet("emulated tiles", frozenset(), (f'-DEMULATED_TILES="{EMULATED_TILES}"',), "nothing")
ON_X86 = [each for each in SETS if each.flags[:1] == ("-mtune=native",)]
# What the libraries of `variants` are compiled with; -O2 takes twice as long.
QUICK_FLAGS = tuple("-O1" if flag == "-O2" else flag for flag in compiling.FLAGS)
# Libraries that are compared with torch in tests: the one that a user gets, and one for each set that this processor has.
VARIANTS = {"native": None} | {each.name: each for each in (*instruction_sets.available(), TILES)}


def environment(name: str) -> dict[str, str]:
    """The variables that make our kernels and torch's libraries use no more than an instruction set."""
    names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
    return {instruction_sets.VARIABLE: name} | dict(zip(names, TORCH[name], strict=True))


def here() -> list[str]:
    """The names in TORCH that this machine can stand in for."""
    return [name for name in TORCH if name in ("off", *(each.name for each in instruction_sets.available()))]


def compiled(instructions: InstructionSet, folder: Path) -> Path:
    """The kernels, compiled quickly for an instruction set."""
    before, compiling.FLAGS = compiling.FLAGS, QUICK_FLAGS
    try:
        return compiling.compile_once(compiling.SOURCE, folder, instructions.flags)
    finally:
        compiling.FLAGS = before


def force(name: str) -> None:
    """Makes this process, in which torch has done nothing yet, and its children use no more than an instruction set."""
    from paligemma.layers import fast_cpu

    os.environ.update(environment(name))
    bf16 = {each.name: each.bf16 for each in SETS}.get(name, "nothing")
    fast_cpu.bf16_instructions = lambda: bf16
