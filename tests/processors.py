"""The classes of processors that torch and the kernels tell apart, and how this machine stands in for those below its own.

A processor can be told to leave instructions unused, never to have more; which classes that leaves is `here()`, and conftest.py
prints at the end of a run which were tested and which this machine lacks.
"""

import os
import platform
from pathlib import Path
from typing import NamedTuple

from paligemma.layers import compiling


class Processor(NamedTuple):
    """`needs`: flags, as Linux names them; `says`: bf16_instructions; `environment` makes torch's libraries use no more."""

    needs: frozenset[str]
    says: str
    environment: dict[str, str]


def torch_uses(aten: str, onednn: str, mkl: str) -> dict[str, str]:
    return {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}


AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
CLASSES = {
    "no kernels": Processor(frozenset(), "nothing", {"PALIGEMMA_KERNELS": "off"} | torch_uses("default", "SSE41", "SSE4_2")),
    "AVX2": Processor(frozenset({"avx2", "fma"}), "nothing", torch_uses("avx2", "AVX2", "AVX2")),
    "AVX512": Processor(AVX512, "nothing", torch_uses("avx512", "AVX512_CORE", "AVX512")),
    "AVX512_BF16": Processor(AVX512 | {"avx512_bf16"}, "pairs", torch_uses("avx512", "AVX512_CORE_BF16", "AVX512")),
    "AMX": Processor(AVX512 | {"amx_bf16", "amx_tile"}, "matrices", torch_uses("avx512", "AVX512_CORE_AMX", "AVX512")),
}

# Numbers that torch's libraries compute otherwise on another processor: the files whose tests are run once for each class.
WHOLE_FILES = ("test_modeling_gemma", "test_modeling_paligemma", "test_modeling_siglip", "test_oracle", "objects/test_mask_codec")
MARKED = ("test_quantization", "test_prefill_attention", "test_fast_tower")  # of these, the tests that are marked
FILES = (*WHOLE_FILES, *(f"layers/{name}" for name in MARKED))

EMULATED_TILES = Path(__file__).parent / "layers" / "emulated_tiles.h"  # stands in for AMX in tiles.h, on any processor
# What kernels.cpp is compiled with to take the way of other processors; -O3 takes twice as long.
SHARED = (*(flag for flag in compiling.FLAGS if flag not in ("-march=native", "-O3")), "-O1")
INSTRUCTIONS = {
    "generic": (frozenset(), ()),
    "AVX2": (frozenset({"avx2", "fma"}), ("-mavx2", "-mfma")),
    "AVX512": (AVX512, ("-march=skylake-avx512",)),
    "AVX512_BF16": (AVX512 | {"avx512_bf16", "avx512_vnni"}, ("-march=cooperlake",)),
    "emulated tiles": (frozenset(), (f'-DEMULATED_TILES="{EMULATED_TILES}"',)),
}


def has(needs: frozenset[str]) -> bool:
    return not needs or (platform.machine() in ("x86_64", "AMD64") and needs <= compiling.cpu_flags())


def here() -> list[str]:
    """The classes that this machine can stand in for."""
    return [name for name, processor in CLASSES.items() if has(processor.needs)]


VARIANTS = {"native": compiling.FLAGS} | {name: (*SHARED, *more) for name, (needs, more) in INSTRUCTIONS.items() if has(needs)}


def force(name: str) -> None:
    """Makes this process, in which torch has done nothing yet, and its children one of that class."""
    from paligemma.layers import fast_cpu

    os.environ.update(CLASSES[name].environment)
    fast_cpu.bf16_instructions = lambda: CLASSES[name].says
