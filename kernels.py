"""Products, norm, gate and attention of kernels.cpp: compiled once for this machine, kept, called with tensors. CPU only.

The first use compiles (a few seconds) into ~/.cache/paligemma (or $XDG_CACHE_HOME/paligemma), under a name made of the source,
the compiler's command and the processor, so that another version or another machine never meets a foreign file. Where there is
no compiler or no place to keep the result, `library()` is None and the callers use torch's own operators.
PALIGEMMA_KERNELS=off asks for that; $CXX names the compiler.

The threads are those of torch: the kernels are linked against the OpenMP library that torch has loaded before them, so both
share one pool. Checked in tests/test_quantization.py.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# A checkout has the source beside this file; an installed package has it among its data: <prefix>/lib/python3.x/site-packages.
HERE = Path(__file__).resolve()
SOURCES = (HERE.with_name("kernels.cpp"), *(prefix / "share/paligemma/kernels.cpp" for prefix in HERE.parents[3:4]))
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-std=c++17", "-Wno-psabi")
COMPILE_TIMEOUT_S = 300


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What the processor can do, as Linux names it ("avx512_vnni", "amx_bf16", ...); empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1] for line in lines if line.startswith(("flags", "Features"))), "").split())


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paligemma"


def compile_once(source: Path, folder: Path) -> Path | None:
    """The compiled source in `folder`, made if it is not there yet; None where it cannot be made.

    The file appears under its name only when it is whole: it is written beside and renamed, so that programs that start
    together, or are interrupted, leave nothing half. A source that does not compile is not tried again at every start.
    """
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")
    if compiler is None or not source.exists():
        return None
    machine = (platform.machine(), *sorted(cpu_flags()))
    key = hashlib.sha256(repr((source.read_bytes(), compiler, FLAGS, machine)).encode()).hexdigest()[:20]
    target, failed = folder / f"kernels-{key}.so", folder / f"kernels-{key}.failed"
    if target.exists() or failed.exists():
        return target if target.exists() else None
    log.info("compiling %s into %s, once", source.name, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            made = Path(beside) / "kernels.so"
            command = [compiler, *FLAGS, str(source), "-o", str(made)]
            answer = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
            if answer.returncode == 0:
                os.replace(made, target)
            else:
                failed.write_text(answer.stderr)
                log.info("%s does not compile (%s); torch's own products are used.", source.name, failed)
    except (OSError, subprocess.SubprocessError) as error:
        log.info("%s was not compiled (%s); torch's own products are used.", source.name, error)
    return target if target.exists() else None


def open_library(file: Path) -> ctypes.CDLL:
    """The functions of a compiled file, told what they take, so that ctypes passes whole pointers; none returns anything."""
    loaded = ctypes.CDLL(str(file))
    pointer, size, flag, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    call = (*(pointer, pointer, size) * 3, flag, pointer, flag, size, size, flag)
    for function, arguments in (
        (loaded.bf16_product, (pointer, *call)),
        (loaded.int8_product, (pointer, flag, *call)),
        (loaded.int4_product, (pointer, flag, *call)),
        (loaded.bf16_gate, (pointer, pointer, size, flag)),
        (loaded.bf16_rms_norm, (pointer, pointer, pointer, size, size, real, flag)),
        (loaded.bf16_attend, (*(pointer,) * 6, size, size, size, pointer, real, real, pointer, size, size, size, size, flag)),
        (loaded.int_quantize, (flag, pointer, flag, size, size, size, pointer, pointer, flag)),
    ):
        function.argtypes, function.restype = arguments, None
    return loaded


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, ready to call, or None where torch's own operators must do."""
    if os.environ.get("PALIGEMMA_KERNELS") == "off" or sys.byteorder != "little":
        return None
    source = next((source for source in SOURCES if source.exists()), SOURCES[0])
    try:
        file = compile_once(source, cache_folder())
        return None if file is None else open_library(file)
    except (OSError, RuntimeError) as error:  # a cache that cannot be executed from; no home folder
        log.info("the kernels cannot be loaded (%s); torch's own products are used.", error)
        return None


NO_MATRIX = (0, 0, 0)


def product(
    kind: str, x: Tensor, matrices: list[tuple[Tensor, Tensor | None, int]], dtype: torch.dtype, is_gated: bool = False
) -> Tensor:
    """x @ w.T for one to three matrices that meet the same x, as one call.

    Args:
        kind: "bf16": w is bfloat16[N, K], contiguous, K a multiple of 32, and x bfloat16; sums are in float32. "int8", "int4":
            w is as quantization.py draws it, x is bfloat16 or float32, and each group of it is rounded to 8 bits on the way.
        x: [..., K].
        matrices: w, its scales or None, and its number of outputs N.
        dtype: of the result, bfloat16 or float32.
        is_gated: of two matrices of as many outputs.
    Returns: [..., N of all], one matrix behind the other; or, gated, gelu(x @ first.T) * (x @ second.T), [..., N].
    """
    x = x.contiguous()
    outputs = matrices[0][2] if is_gated else sum(matrix[2] for matrix in matrices)
    y = x.new_empty(*x.shape[:-1], outputs, dtype=dtype)
    pieces = []
    for w, scales, n in matrices:
        pieces += (w.data_ptr(), 0 if scales is None else scales.data_ptr(), n)
    pieces += NO_MATRIX * (3 - len(matrices))
    given = (x.data_ptr(),) if kind == "bf16" else (x.data_ptr(), x.dtype is torch.bfloat16)
    k = x.shape[-1]
    getattr(library(), f"{kind}_product")(
        *given, *pieces, is_gated, y.data_ptr(), dtype is torch.bfloat16, x.numel() // k, k, torch.get_num_threads()
    )
    return y


def bf16_gate(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, written over `gate`. Both bfloat16, contiguous, of as many numbers, a multiple of 16."""
    library().bf16_gate(gate.data_ptr(), up.data_ptr(), gate.numel(), torch.get_num_threads())
    return gate


def bf16_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """GemmaRMSNorm. x: bfloat16[..., D], weight: bfloat16[D], contiguous, D a multiple of 16."""
    x = x.contiguous()
    y = torch.empty_like(x)
    width = weight.numel()
    rows = x.numel() // width
    library().bf16_rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, width, eps, torch.get_num_threads())
    return y


def bf16_attend(
    qkv: Tensor, position_ids: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, keys: Tensor, values: Tensor,
    reach: int, scale: float, cap: float | None,
) -> Tensor:  # fmt: skip
    """Attention of one new token a row: turns queries and keys, writes keys and values, looks at what the cache then holds.

    Args:
        qkv: bfloat16[B, 1, (N + 2 K) E], queries, keys and values as the products made them; E a multiple of 32.
        position_ids: int64[B, 1]; a token's slot is its position minus 1.
        rotation: cosines and sines, bfloat16[B, 1, 1, E].
        mask: bool[B, 1, 1, S], True = may look; None = at all S slots.
        keys, values: bfloat16[B, K, slots, E], of one layer; written to.
        reach: S, how many of the slots are read.
        scale, cap: as in modeling_gemma.attention.
    Returns: bfloat16[B, 1, N E].
    """
    rows, kv_heads, _, width = keys.shape
    heads = qkv.shape[-1] // width - 2 * kv_heads
    cos, sin = (part.contiguous() for part in rotation)
    positions, mask = position_ids.contiguous(), None if mask is None else mask.contiguous()
    y = qkv.new_empty(rows, 1, heads * width)
    library().bf16_attend(
        qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), positions.data_ptr(), keys.data_ptr(), values.data_ptr(),
        keys.stride(0), keys.stride(1), reach, 0 if mask is None else mask.data_ptr(), scale, cap or 0, y.data_ptr(),
        rows, heads, kv_heads, width, torch.get_num_threads(),
    )  # fmt: skip
    return y


def int_quantize(kind: str, weight: Tensor, packed: Tensor, scales: Tensor) -> None:
    """Rounds weight (bfloat16 or float32 [N, K], contiguous) into `packed` and `scales`, shaped as quantization.py draws them."""
    outputs, k = weight.shape
    bits = int(kind.removeprefix("int"))
    padded = packed.shape[1] * 32 // bits
    library().int_quantize(
        bits, weight.data_ptr(), weight.dtype == torch.bfloat16, outputs, k, padded, packed.data_ptr(), scales.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
