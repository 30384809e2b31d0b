"""The instruction sets that the C++ kernels are compiled for: which of them this processor has, and which are allowed.

The best one whose library passes its check on this machine is used (kernels.py). PALIGEMMA_KERNELS=avx2 (or another name) allows
that set and those after it in the list; PALIGEMMA_KERNELS=off allows none.

Checked in tests/layers/test_instruction_sets.py.
"""

import functools
import os
from pathlib import Path
from typing import NamedTuple

from paligemma.errors import UsageError

VARIABLE = "PALIGEMMA_KERNELS"


class InstructionSet(NamedTuple):
    """A name, what a processor needs for it, and how the kernels are compiled for it.

    needs: names of features, as Linux lists them in /proc/cpuinfo.
    flags: the compiler's flags. Only what is needed is allowed, so the kernels of a set can also run on a better processor.
    bf16: the bfloat16 products that torch's libraries compute with it: "matrices" (AMX and Arm's), "pairs" (AVX-512's dot
        products of pairs), or "nothing" (they convert to float32).
    """

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]
    bf16: str


# Without AVX512, a vector of the source is several registers. With -O2, GCC 12 then needs twice as long to compile, and products
# with integer weights become half as fast. With AVX512, the code of -O2 is faster.
FIRST_LEVEL = "-O1"


def x86(name: str, needs: str, bf16: str = "nothing") -> InstructionSet:
    """A set of x86. The compiler's flags have the names of the features: avx512_bf16 is -mavx512bf16, amx_tile is -mamx-tile."""
    words = needs.split()
    flags = (f"-m{word.replace('amx_', 'amx-').replace('_', '')}" for word in words)
    level = () if "avx512f" in words else (FIRST_LEVEL,)
    return InstructionSet(name, frozenset(words), ("-mtune=native", *flags, *level), bf16)


NATIVE = ("-march=native",)
AVX2 = "avx2 fma"
AVX512 = f"{AVX2} avx512f avx512bw avx512cd avx512dq avx512vl"
AVX512_BF16 = f"{AVX512} avx512_vnni avx512_bf16"
UNKNOWN = InstructionSet("native", frozenset(), NATIVE, "matrices")  # the system does not list the features: macOS, Windows
GENERIC = InstructionSet("generic", frozenset(), (FIRST_LEVEL,), "nothing")
SETS = (  # the best first
    x86("amx", f"{AVX512_BF16} amx_tile amx_bf16", "matrices"),
    x86("avx512_bf16", AVX512_BF16, "pairs"),
    x86("avx512_vnni", f"{AVX512} avx512_vnni"),
    x86("avx512", AVX512),
    x86("avx_vnni", f"{AVX2} avx_vnni"),
    x86("avx2", AVX2),
    InstructionSet("arm_bf16", frozenset({"asimd", "bf16"}), NATIVE, "matrices"),
    InstructionSet("arm", frozenset({"asimd"}), NATIVE, "nothing"),
    UNKNOWN,
    GENERIC,
)
NAMES = tuple(each.name for each in SETS)
UNPROVEN = 1  # the first sets, which have not run on a real processor yet: they are used only if the variable names them


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The features of the processor, under Linux's names ("avx512_vnni", "amx_bf16", ...); empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1] for line in lines if line.startswith(("flags", "Features"))), "").split())


def available() -> list[InstructionSet]:
    """The sets that the processor has, the best first."""
    known = cpu_flags()
    return [each for each in SETS if each.needs <= known and not (known and each is UNKNOWN)]


def allowed() -> list[InstructionSet]:
    """The sets that the processor has and PALIGEMMA_KERNELS allows, the best first.

    Raises: UsageError if the variable has another value than "off", the name of a set, or nothing.
    """
    value = os.environ.get(VARIABLE) or NAMES[UNPROVEN]
    if value == "off":
        return []
    if value not in NAMES:
        raise UsageError(f"{VARIABLE} is {value!r}. Take off, {', '.join(NAMES[:-1])} or {NAMES[-1]}.")
    return [each for each in available() if each in SETS[NAMES.index(value) :]]


@functools.cache
def bf16_instructions() -> str:
    """The bfloat16 products that torch's libraries compute on this processor: "matrices", "pairs" or "nothing"."""
    return available()[0].bf16
