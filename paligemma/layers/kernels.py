"""Products, norm, gate and attention of kernels.cpp: compiled once for this machine, kept, called with tensors. CPU only.

The first use compiles (a few seconds) into $XDG_CACHE_HOME/paligemma, ~/.cache/paligemma or, where these cannot be used, a folder
of this user in the system's temporary folder. The file's name is made of the source, the compiler and the processor, so a home
that several machines share never gives one of them the code of another. A compiled file is code that runs without a question, so
a folder or file that another user could have written is not used, nor one that is damaged (`is_private`, `is_whole`).
Without a compiler, or where compiling fails, `library()` is None and the callers use torch's own operators.
PALIGEMMA_KERNELS=off asks for that; $CXX names the compiler.

The threads are those of torch: the kernels are linked against the OpenMP library that torch has loaded before them, so both
share one pool. Checked in tests/layers: test_kernels.py (compiling, loading), test_quantization.py (what they compute).
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
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from paligemma.files import move_into_place

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-std=c++17", "-Wno-psabi")
COMPILE_TIMEOUT_S = 120
RETRY_AFTER_S = 3600  # a source that does not compile, or a compiler that hangs, costs a start its time once an hour at most
ROOM = 2**23  # bytes that compiling needs on the disk, several times over
MOST = 2**26  # bytes of a file that a compiler may write: its messages without end would fill the disk
DIGEST = hashlib.sha256
OPEN: list[Iterator[Path]] = []  # not to be closed before the end: a folder for this process alone goes with its iterator


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What the processor can do, as Linux names it ("avx512_vnni", "amx_bf16", ...); empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1] for line in lines if line.startswith(("flags", "Features"))), "").split())


def is_private(path: Path, is_folder: bool) -> bool:
    """Whether a folder or file is there, is no link, belongs to this user, and can be written by no other."""
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
    """Whether another user may rename a folder above this one and put one of their own in its place."""
    if not hasattr(os, "geteuid"):
        return False
    for above in (above.stat() for above in folder.parents[:-1]):
        by_others = above.st_mode & 0o002 or (above.st_mode & 0o020 and above.st_gid != os.getegid())
        if above.st_uid not in (0, os.geteuid()) or (by_others and not above.st_mode & stat.S_ISVTX):
            return True
    return False


def cache_folders() -> Iterator[Path]:
    """Private folders that can be written, the best first; made if they are not there."""
    with suppress(RuntimeError):  # no home folder
        named = Path(os.environ.get("XDG_CACHE_HOME", ""))  # a relative one is to be ignored, as its specification says
        yield from private_folder((named if named.is_absolute() else Path.home() / ".cache") / "paligemma")
    with suppress(OSError):  # no folder for temporary files
        user = f"-{os.geteuid()}" if hasattr(os, "geteuid") else ""
        yield from private_folder(Path(tempfile.gettempdir()) / f"paligemma{user}")
        with tempfile.TemporaryDirectory(prefix="paligemma-", ignore_cleanup_errors=True) as folder:  # for this process alone
            yield Path(folder)


def private_folder(folder: Path) -> Iterator[Path]:
    """The folder, made if it is not there; nothing if it cannot be, or if another user could put a file into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if is_private(folder, is_folder=True) and not could_be_exchanged(folder.resolve()):
            yield folder
        else:
            log.info("%s is not used: another user could write there.", folder)
    except OSError as error:
        log.info("%s is not used: %s.", folder, error.strerror or error)


def keep_torch_private() -> None:
    """For torch.compile, which else runs what it finds in a folder for temporary files whose name anyone can take first."""
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        OPEN.append(folders := cache_folders())
        with suppress(StopIteration):  # no folder can be written, and torch will say so
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(next(folders) / "inductor")


def is_whole(file: Path) -> bool:
    """Whether a file is ours, and ends with the digest of all that is before it: one cut short would end the process."""
    if not is_private(file, is_folder=False):
        return False
    try:
        content = file.read_bytes()
    except OSError:
        return False
    size = DIGEST().digest_size
    return content[-size:] == DIGEST(content[:-size]).digest()


def run_compiler(command: list[str], messages: Path) -> int:
    """The exit status of a compiler. Its messages, in English, go to a file, and its temporary files beside that.

    Raises: subprocess.TimeoutExpired, after ending the compiler and all that it has started; OSError.
    """
    is_group, environment = os.name == "posix", os.environ | {"LC_ALL": "C", "TMPDIR": str(messages.parent)}
    with messages.open("wb") as to:
        running = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=to, stderr=to, env=environment, start_new_session=is_group
        )  # fmt: skip
        with suppress(ImportError, AttributeError, OSError, ValueError):  # Linux has it; a limit of this process may be lower
            import resource

            resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (MOST, MOST))
        try:
            return running.wait(COMPILE_TIMEOUT_S)
        finally:
            if running.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(running.pid, signal.SIGKILL) if is_group else running.kill()
                running.wait()


def find_compiler() -> list[str]:
    """The words that start the compiler: those of $CXX ("ccache g++"), else g++ or clang++; none if there is no compiler."""
    text = os.environ.get("CXX", "")
    named = [text] if shutil.which(text) else text.split()
    for words in [named] if named else [["g++"], ["clang++"]]:
        if program := shutil.which(words[0]):
            return [program, *words[1:]]
    if named:
        log.warning("slower products are used: there is no compiler %s, which $CXX names.", named[0])
    return []


def compiled_name(source: Path, compiler: list[str]) -> str:
    """The name, without ending, of what this compiler makes of this source for this processor."""
    found = os.stat(compiler[0])
    machine = (platform.machine(), *sorted(cpu_flags()))
    made_of = (source.read_bytes(), compiler, found.st_size, found.st_mtime_ns, FLAGS, machine)
    return f"kernels-{DIGEST(repr(made_of).encode()).hexdigest()[:20]}"


def compile_once(source: Path, folder: Path) -> Path | None:
    """The compiled source in `folder`, made if it is not there yet or not whole; None where it cannot be made.

    The file appears under its name only when it is whole: it is written beside and renamed, so that programs that start
    together, or are interrupted, leave nothing half. What says that the source itself does not compile, or that the compiler
    hangs, is not tried again for RETRY_AFTER_S. What may be over at the next start (a full disk, no memory) is tried again.
    Raises: OSError where the folder cannot be written.
    """
    compiler = find_compiler()
    if not compiler or not source.exists():
        log.info("there is no C++ compiler; torch's own products are used.")
        return None
    name = compiled_name(source, compiler)
    target, failed = folder / f"{name}.so", folder / f"{name}.failed"
    if is_whole(target):
        return target
    if is_private(failed, is_folder=False) and abs(time.time() - failed.stat().st_mtime) < RETRY_AFTER_S:
        log.warning("slower products are used: %s did not compile lately (%s says why).", source.name, failed)
        return None
    if shutil.disk_usage(folder).free < ROOM:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    log.info("compiling %s into %s, once", source.name, folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".compiling-", ignore_cleanup_errors=True) as beside:
        made, messages = Path(beside) / "kernels.so", Path(beside) / "messages"
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
            said = stream.read(2**20)
        if reason or re.search(rf"^.*{re.escape(source.name)}:\d+:\d+: error: ", said, re.MULTILINE):
            messages.write_text(reason or said)
            move_into_place(messages, failed)
        ended = f"{compiler[0]} ended with status {status}"
        last = reason or next((line for line in said.splitlines() if "error" in line), ended)
        log.warning("slower products are used: %s does not compile: %s", source.name, last)
        return None


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
    reason: Exception | None = None
    for folder in cache_folders():
        try:
            file = compile_once(SOURCE, folder)
            return None if file is None else open_library(file)
        except (OSError, AttributeError) as error:  # a full disk; a folder from which nothing may be executed; no such function
            reason = error
    log.warning("slower products are used: the kernels cannot be kept or loaded (%s).", reason)
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
