"""Maps the weight files of a model, and reads them once in a thread while the program imports torch and reads the tokenizer.

A mapped file takes no time to open, but the first access to each of its pages is a page fault (1.4 million pages for a model of
3B parameters), and every value has to be checked for NaN and infinity. The thread does both. It makes a few long calls of numpy,
because numpy computes without Python's global lock (GIL), but each call has to wait for the lock before it returns.

Errors are not reported here: what the thread does not find out is checked, and reported, when the model is loaded.
Imports no torch. Checked in tests/checkpoints/test_read_ahead.py.
"""

import mmap
import os
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import numpy as np

from paligemma.checkpoints.headers import StoredTensor, find_files, read_header
from paligemma.checkpoints.hub import find_cached, is_id
from paligemma.errors import PaliGemmaError
from paligemma.files import BUNDLED, expand, is_folder
from paligemma.machine import GIB, free_cpu_memory

MIN_BYTES = 2**24  # smaller parts of a file are checked when they are loaded
ROOM = 2 * GIB  # what torch and the tokenizer need: the weights are read ahead only if this much memory stays free
# For each float dtype: the signed integer of the same size, and the bits of infinity. The bits of every NaN are larger.
INFINITY = {"BF16": (np.int16, 0x7F80), "F16": (np.int16, 0x7C00), "F32": (np.int32, 0x7F800000), "F64": (np.int64, 0x7FF << 52)}


class Part(NamedTuple):
    """The bytes from start to end of a file. dtype is that of all tensors in it; None if they are mixed, small or not floats."""

    dtype: str | None
    start: int
    end: int


def map_file(file: Path) -> mmap.mmap:
    """The whole file, mapped copy-on-write: a program that changes a tensor does not change the file. Raises: OSError."""
    # safetensors' safe_open would map the file, too, but for torch only after torch is imported. A page that is read through one
    # mapping still causes a page fault in another one, so the thread and the model have to share the mapping.
    with open(file, "rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)


def version(file: Path) -> tuple[int, ...] | None:
    """What changes if a file is replaced or written to; None if it cannot be found."""
    with suppress(OSError):
        found = os.stat(file)
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    return None


def merged(parts: list[Part]) -> list[Part]:
    """The parts of a file, with neighbours of the same dtype as one part."""
    result: list[Part] = []
    for dtype, start, end in parts:
        if result and result[-1].dtype == dtype:
            start = result.pop().start
        result.append(Part(dtype, start, end))
    return result


def parts_of(file: Path) -> list[Part]:
    """The tensors of a file as few large parts. Raises: CheckpointError, AccessError."""
    tensors = sorted(read_header(file).values(), key=lambda tensor: (tensor.start, tensor.num_bytes))
    parts = merged([Part(tensor.dtype, tensor.start, tensor.start + tensor.num_bytes) for tensor in tensors])

    def is_checked(part: Part) -> bool:
        is_aligned = part.dtype in INFINITY and part.start % np.dtype(INFINITY[part.dtype][0]).itemsize == 0
        return is_aligned and part.end - part.start >= MIN_BYTES

    return merged([part if is_checked(part) else part._replace(dtype=None) for part in parts])


def is_finite(content: np.ndarray, dtype: str) -> bool:
    """Whether no value is NaN or infinite. Args: content: the bytes, uint8; dtype: a key of INFINITY."""
    signed, infinity = INFINITY[dtype]
    bits = content.view(signed)
    unsigned = np.dtype(signed.__name__.replace("int", "uint"))
    # Among signed integers, the bits of positive numbers are the largest; among unsigned integers, those of negative numbers.
    return bits.max() < infinity and bits.view(unsigned).max() < infinity + (1 << 8 * unsigned.itemsize - 1)


class ReadAhead:
    """The mapped files of a model, and the thread that reads them.

    Args:
        parts: the files, and for each file the parts that `start` reads.
    """

    def __init__(self, parts: dict[Path, list[Part]]):
        self.versions = {file: version(file) for file in parts}
        self.maps = {file: map_file(file) for file in parts}
        self.finite: list[tuple[Path, Part]] = []  # parts without NaN and infinity
        self.parts = parts
        self.thread: Thread | None = None

    def start(self) -> None:
        """Starts the thread. If no more threads are allowed, the files are only mapped."""
        thread = Thread(target=self.read, daemon=True)  # a daemon does not delay the exit after an error
        with suppress(RuntimeError):
            thread.start()
            self.thread = thread

    def read(self) -> None:
        with suppress(MemoryError):
            for file, parts in self.parts.items():
                content = np.frombuffer(self.maps[file], np.uint8)
                for part in parts:
                    values = content[part.start : part.end]
                    if part.dtype is None:
                        values[:: mmap.PAGESIZE].max(initial=0)  # reads one byte of each page
                    elif is_finite(values, part.dtype):
                        self.finite.append((file, part))

    def wait(self) -> None:
        """Waits until the thread has read everything."""
        if self.thread is not None:
            self.thread.join()

    def is_current(self) -> bool:
        """Whether no file was replaced or written to since it was mapped. A header that is read now describes the same file."""
        return all(version(file) == before for file, before in self.versions.items())

    def map(self, file: Path) -> mmap.mmap:
        """The mapped file. Raises: OSError."""
        if file not in self.maps:
            self.maps[file] = map_file(file)
        return self.maps[file]

    def is_finite(self, tensor: StoredTensor) -> bool:
        """Whether the thread has read this tensor and found neither NaN nor infinity. Waits for the thread."""
        self.wait()
        end = tensor.start + tensor.num_bytes
        return any(file == tensor.file and part.start <= tensor.start and end <= part.end for file, part in self.finite)


def begin(name: str | None, device: object, *changes: object, revision: str | None = None) -> ReadAhead | None:
    """Starts to read the weights of a model, unless they will be copied instead of mapped, are few, or memory is short.

    Args:
        name: the folder, or a hub id whose files are in the cache; None = the bundled model. Nothing is read for other names:
            loading downloads the files, or says what is wrong with the name. Nothing is read for the base model of an adapter.
        device: where the model will run. "auto" is taken for the CPU; on a GPU, reading ahead saves only the check of values.
        changes: options that change the weights while they are loaded (dtype, quantize); None = unchanged.
        revision: branch, tag or commit of the hub id.
    """
    if str(device) not in ("auto", "cpu") or any(change is not None for change in changes):
        return None
    with suppress(PaliGemmaError, OSError):
        folder: Path | None = expand(name or BUNDLED)
        if name is not None and is_id(name) and not is_folder(expand(name)):
            folder = find_cached(name, revision)
        parts = {file: parts_of(file) for file in find_files(folder)} if folder else {}
        size = sum(os.path.getsize(file) for file in parts)
        if size < MIN_BYTES:
            return None
        ahead = ReadAhead(parts)
        # A mapped file counts for ulimit -v, which is therefore looked at afterwards: loading asks for room for all weights.
        if size <= (free_cpu_memory() or 0) - ROOM:
            ahead.start()
            return ahead
    return None
