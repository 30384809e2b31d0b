"""Calls the functions of cpp/ (products, norm, gate, attention) with tensors, after compiling them once. CPU only.

The first use compiles cpp/kernels.cpp, in a few seconds, into $XDG_CACHE_HOME/paligemma, ~/.cache/paligemma or, if these cannot
be used, into a folder of this user inside the system's temporary folder. The name of the compiled file depends on the source, the
compiler and the processor, so machines that share a home folder never load code that was compiled for another one. Loading a
compiled file runs its code, so a file or folder that another user could have written, or a damaged file, is not used
(`is_private`, `is_whole`). Without a compiler, or if compiling fails, `library()` is None and the callers use torch's own
operators. PALIGEMMA_KERNELS=off has the same effect; $CXX names the compiler.

The threads are those of torch: the kernels are linked against the OpenMP library that torch has loaded before, so both share one
pool. Checked in tests/layers: test_kernels.py (compiling, loading), test_quantization.py (what the functions compute).
Shapes: as in modeling_gemma.py, and O outputs, X inputs of one matrix.
"""

import ctypes
import errno
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from paligemma.files import move_into_place

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "cpp" / "kernels.cpp"
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-std=c++17", "-Wno-psabi")
COMPILE_TIMEOUT_S = 120
RETRY_AFTER_S = 3600  # compiling is retried at most once per hour if the source does not compile or the compiler hangs
MIN_FREE_BYTES = 2**23  # must be free on the disk before compiling; several times what compiling needs
MAX_COMPILER_FILE_BYTES = 2**26  # limit for each file that a compiler writes: endless messages would fill the disk
DIGEST = hashlib.sha256
SLOWER = "decoding will be slower, with torch's own matrix products"  # the first words of messages about missing kernels
OPEN: list[Iterator[Path]] = []  # generators of cache_folders: one that is freed would delete the temporary folder it made


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instruction sets of the processor, under Linux's names ("avx512_vnni", "amx_bf16", ...); empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1] for line in lines if line.startswith(("flags", "Features"))), "").split())


def is_private(path: Path, is_folder: bool) -> bool:
    """Whether a folder or file exists, is not a link, belongs to this user, and cannot be written by other users."""
    try:
        found = path.lstat()
    except OSError:
        return False
    if not (stat.S_ISDIR if is_folder else stat.S_ISREG)(found.st_mode):
        return False
    if not hasattr(os, "geteuid"):  # Windows: the home folder is protected by other means
        return True
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


def could_be_exchanged(folder: Path) -> bool:
    """Whether another user may rename a folder above this one and replace it by their own."""
    if not hasattr(os, "geteuid"):
        return False
    for above in (above.stat() for above in folder.parents[:-1]):
        by_others = above.st_mode & 0o002 or (above.st_mode & 0o020 and above.st_gid != os.getegid())
        if above.st_uid not in (0, os.geteuid()) or (by_others and not above.st_mode & stat.S_ISVTX):
            return True
    return False


def cache_folders() -> Iterator[Path]:
    """Writable private folders, the best first. Missing folders are made."""
    with suppress(RuntimeError):  # no home folder
        named = Path(os.environ.get("XDG_CACHE_HOME", ""))  # its specification says that relative paths must be ignored
        yield from private_folder((named if named.is_absolute() else Path.home() / ".cache") / "paligemma")
    with suppress(OSError):  # no folder for temporary files
        user = f"-{os.geteuid()}" if hasattr(os, "geteuid") else ""
        yield from private_folder(Path(tempfile.gettempdir()) / f"paligemma{user}")
        with tempfile.TemporaryDirectory(prefix="paligemma-", ignore_cleanup_errors=True) as folder:  # used by this process only
            yield Path(folder)


def private_folder(folder: Path) -> Iterator[Path]:
    """Yields the folder, which is made if missing; nothing if it cannot be made, or if another user could put a file into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if is_private(folder, is_folder=True) and not could_be_exchanged(folder.resolve()):
            yield folder
        else:
            log.info("%s is not used: another user could write there.", folder)
    except OSError as error:
        log.info("%s is not used: %s.", folder, error.strerror or error)


def set_private_compile_cache() -> None:
    """Sets a private cache folder for torch.compile. Another user could have created its default folder and put code into it."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        OPEN.append(folders := cache_folders())
        with suppress(StopIteration):  # if no folder can be written, the variable stays unset
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(next(folders) / "inductor")


def is_whole(file: Path) -> bool:
    """Whether a file is private and ends with the digest of its content. Loading a truncated library would crash the process."""
    if not is_private(file, is_folder=False):
        return False
    try:
        content = file.read_bytes()
    except OSError:
        return False
    size = DIGEST().digest_size
    return content[-size:] == DIGEST(content[:-size]).digest()


def run_compiler(command: list[str], messages: Path) -> int:
    """Runs a compiler and returns its exit status. Its messages, in English, are written to the file `messages`.

    The compiler's temporary files are written to the folder of `messages`.

    Raises: subprocess.TimeoutExpired, after ending the compiler and all processes that it started; OSError.
    """
    is_group, environment = os.name == "posix", os.environ | {"LC_ALL": "C", "TMPDIR": str(messages.parent)}
    with messages.open("wb") as to:
        running = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=to, stderr=to, env=environment, start_new_session=is_group
        )  # fmt: skip
        # prlimit exists only on Linux. It raises ValueError if the compiler's limit is already lower, which is fine.
        with suppress(ImportError, AttributeError, OSError, ValueError):
            import resource

            resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (MAX_COMPILER_FILE_BYTES,) * 2)
        try:
            return running.wait(COMPILE_TIMEOUT_S)
        finally:
            if running.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(running.pid, signal.SIGKILL) if is_group else running.kill()
                running.wait()


def find_compiler() -> list[str]:
    """The command that starts the compiler: $CXX (such as "ccache g++") if it is set, else g++ or clang++; [] if not found."""
    text = os.environ.get("CXX", "")
    named = [text] if shutil.which(text) else text.split()
    for words in [named] if named else [["g++"], ["clang++"]]:
        if program := shutil.which(words[0]):
            return [program, *words[1:]]
    if named:
        log.warning("%s: $CXX names the compiler %s, which does not exist.", SLOWER, named[0])
    return []


def compiled_name(source: Path, compiler: list[str]) -> str:
    """The name, without suffix, of the file that this compiler makes from this source for this processor."""
    found = os.stat(compiler[0])
    machine = (platform.machine(), *sorted(cpu_flags()))
    sources = [file.read_bytes() for file in sorted(source.parent.glob("*.h")) + [source]]
    made_of = (sources, compiler, found.st_size, found.st_mtime_ns, FLAGS, machine)
    return f"kernels-{DIGEST(repr(made_of).encode()).hexdigest()[:20]}"


def compile_once(source: Path, folder: Path) -> Path | None:
    """The compiled library in `folder`, made if it is missing or damaged; None if it cannot be made.

    The file is written under another name and renamed when it is complete, so programs that start at the same time, or are
    interrupted, never leave a partial file. After a compile error or a timeout, compiling is not retried for RETRY_AFTER_S. After
    other failures, such as a full disk or too little memory, it is retried at the next start.

    Raises: OSError if the folder cannot be written.
    """
    compiler = find_compiler()
    if not compiler or not source.exists():
        log.info("%s: there is no %s.", SLOWER, source.name if compiler else "C++ compiler")
        return None
    name = compiled_name(source, compiler)
    target, failed = folder / f"{name}.so", folder / f"{name}.failed"
    if is_whole(target):
        return target
    if is_private(failed, is_folder=False) and abs(time.time() - failed.stat().st_mtime) < RETRY_AFTER_S:
        log.warning("%s: compiling %s failed within the last hour, see %s.", SLOWER, source.name, failed)
        return None
    if shutil.disk_usage(folder).free < MIN_FREE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    log.info("compiling %s into %s, once", source.name, folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".compiling-", ignore_cleanup_errors=True) as temporary:
        made, messages = Path(temporary) / "kernels.so", Path(temporary) / "messages"
        try:
            status, reason = run_compiler([*compiler, *FLAGS, str(source), "-o", str(made)], messages), ""
        except subprocess.TimeoutExpired:
            status, reason = -1, f"{compiler[0]} took longer than {COMPILE_TIMEOUT_S} s."
        if status == 0:
            content = made.read_bytes()
            made.write_bytes(content + DIGEST(content).digest())
            made.chmod(0o700)
            move_into_place(made, target)
            failed.unlink(missing_ok=True)
            return target
        with messages.open(errors="replace") as stream:
            output = stream.read(2**20)
        if reason or re.search(rf"^.*{re.escape(source.name)}:\d+:\d+: error: ", output, re.MULTILINE):
            messages.write_text(reason or output)
            move_into_place(messages, failed)
        ended = f"{compiler[0]} ended with status {status}"
        last = reason or next((line for line in output.splitlines() if "error" in line), ended)
        log.warning("%s: %s does not compile: %s", SLOWER, source.name, last)
        return None


class CMatrix(ctypes.Structure):
    """The struct Matrix of cpp/products.h."""

    _fields_ = (("w", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("outputs", ctypes.c_int64))


class CCall(ctypes.Structure):
    """The struct Call of cpp/products.h."""

    _fields_ = (
        ("x", ctypes.c_void_p), ("x_is_bf16", ctypes.c_int), ("activation", ctypes.c_int), ("matrices", CMatrix * 3),
        ("y", ctypes.c_void_p), ("y_is_bf16", ctypes.c_int), ("threads", ctypes.c_int),
        ("rows", ctypes.c_int64), ("inputs", ctypes.c_int64),
    )  # fmt: skip


ACTIVATIONS = ("none", "gelu", "gated")  # the enum Activation of cpp/products.h


def open_library(file: Path) -> ctypes.CDLL:
    """The functions of a compiled file, with their argument types declared, so that ctypes passes 64-bit pointers."""
    loaded = ctypes.CDLL(str(file))
    pointer, size, flag, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    for function, arguments in (
        *((getattr(loaded, f"{kind}_product"), (ctypes.POINTER(CCall),)) for kind in ("bf16", "int8", "int4")),
        (loaded.bf16_gate, (pointer, pointer, size, flag)),
        (loaded.bf16_rms_norm, (pointer, pointer, pointer, size, size, real, flag)),
        (loaded.bf16_attend, (*(pointer,) * 6, size, size, size, pointer, real, real, pointer, size, size, size, size, flag)),
        (loaded.int_quantize, (flag, pointer, flag, size, size, size, pointer, pointer, flag)),
    ):
        function.argtypes, function.restype = arguments, None
    return loaded


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, ready to call, or None if torch's own operators have to be used."""
    if os.environ.get("PALIGEMMA_KERNELS") == "off" or sys.byteorder != "little":
        return None
    reason: Exception | None = None
    for folder in cache_folders():
        try:
            file = compile_once(SOURCE, folder)
            return None if file is None else open_library(file)
        except (OSError, AttributeError) as error:  # a full disk, a folder without execution permission, a missing function
            reason = error
    log.warning("%s: the compiled kernels cannot be saved or loaded (%s).", SLOWER, reason)
    return None


class Matrix(NamedTuple):
    """A matrix for `product`: w, its scales (None for bfloat16), its number of outputs, and its bias, bfloat16[O]."""

    weight: Tensor
    scales: Tensor | None
    outputs: int
    bias: Tensor | None = None


def product(kind: str, x: Tensor, matrices: Sequence[tuple], dtype: torch.dtype, activation: str = "none") -> Tensor:
    """x @ w.T + bias for one to three matrices with the same input x, in one call.

    Args:
        kind: "bf16": w is bfloat16[O, X], contiguous, X a multiple of 32, and x is bfloat16; sums are float32. "int8", "int4": w
            is in tiles (see int_formats.py), x is bfloat16 or float32, and each group of its numbers is rounded to 8 bits.
        x: [..., X].
        matrices: each a Matrix, or a tuple with its first fields.
        dtype: the dtype of the result, bfloat16 or float32.
        activation: "none"; "gelu" of all outputs; or "gated", which combines two matrices of the same size:
            gelu(x @ first.T) * (x @ second.T).
    Returns: [..., sum of all O], with the outputs in the order of the matrices; or [..., O] if gated.
    """
    x = x.contiguous()
    given = [Matrix(*matrix) for matrix in matrices]
    outputs = given[0].outputs if activation == "gated" else sum(matrix.outputs for matrix in given)
    y = x.new_empty(*x.shape[:-1], outputs, dtype=dtype)
    inputs = x.shape[-1]
    call = CCall(
        x=x.data_ptr(), x_is_bf16=x.dtype is torch.bfloat16, activation=ACTIVATIONS.index(activation), y=y.data_ptr(),
        y_is_bf16=dtype is torch.bfloat16, threads=torch.get_num_threads(), rows=x.numel() // inputs, inputs=inputs,
    )  # fmt: skip
    for field, (weight, scales, size, bias) in zip(call.matrices, given, strict=False):
        field.w, field.outputs = weight.data_ptr(), size
        field.scales, field.bias = (None if tensor is None else tensor.data_ptr() for tensor in (scales, bias))
    getattr(library(), f"{kind}_product")(ctypes.byref(call))
    return y


def bf16_gate(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, written over `gate`. Both are bfloat16, contiguous, and of the same size, a multiple of 16."""
    library().bf16_gate(gate.data_ptr(), up.data_ptr(), gate.numel(), torch.get_num_threads())
    return gate


def bf16_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """GemmaRMSNorm of x, bfloat16[..., D], with a contiguous weight, bfloat16[D]. D is a multiple of 16."""
    x = x.contiguous()
    y = torch.empty_like(x)
    width = weight.numel()
    rows = x.numel() // width
    library().bf16_rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, width, eps, torch.get_num_threads())
    return y


def bf16_attend(
    qkv: Tensor, slots: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, keys: Tensor, values: Tensor,
    slots_read: int, scale: float, cap: float | None,
) -> Tensor:  # fmt: skip
    """Attention of one new token per row: applies RoPE to q and k, writes k and v to the cache, and attends to the cache.

    Args:
        qkv: bfloat16[B, 1, (N + 2 K) E], queries, keys and values before RoPE; E a multiple of 32.
        slots: int64[B, 1], the slot in which the key and the value of the new token are stored.
        rotation: cosines and sines of modeling_gemma.rotary_embedding, bfloat16[B, 1, 1, E].
        mask: bool[B, 1, 1, S], True = the token attends to the slot; None = to all S slots.
        keys, values: bfloat16[B, K, slots, E], the cache of one layer, which is written to.
        slots_read: S, number of slots that are read.
        scale, cap: as in modeling_gemma.attention.
    Returns: bfloat16[B, 1, N E].
    """
    rows, kv_heads, _, width = keys.shape
    heads = qkv.shape[-1] // width - 2 * kv_heads
    cos, sin = (part.contiguous() for part in rotation)
    slots, mask = slots.contiguous(), None if mask is None else mask.contiguous()
    y = qkv.new_empty(rows, 1, heads * width)
    library().bf16_attend(
        qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), slots.data_ptr(), keys.data_ptr(), values.data_ptr(),
        keys.stride(0), keys.stride(1), slots_read, 0 if mask is None else mask.data_ptr(), scale, cap or 0, y.data_ptr(),
        rows, heads, kv_heads, width, torch.get_num_threads(),
    )  # fmt: skip
    return y


def int_quantize(kind: str, weight: Tensor, packed: Tensor, scales: Tensor) -> None:
    """Rounds weight (bfloat16 or float32 [O, X], contiguous) into `packed` and `scales`, in tiles (see int_formats.py)."""
    outputs, inputs = weight.shape
    bits = int(kind.removeprefix("int"))
    padded = packed.shape[1] * 32 // bits
    library().int_quantize(
        bits, weight.data_ptr(), weight.dtype == torch.bfloat16, outputs, inputs, padded, packed.data_ptr(), scales.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
