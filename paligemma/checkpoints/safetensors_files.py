"""Reads tensors from safetensors files, and writes such files and their index, for any model. headers.py describes the format.

Checked in tests/checkpoints/test_safetensors_files.py.
Shapes: O outputs of a weight matrix.
"""

import errno
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from paligemma.checkpoints.file_names import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    SIDE_FILES,
    SINGLE_NAME,
    has_weights,
)
from paligemma.checkpoints.headers import FLOATS, StoredTensor, find_files, read_header
from paligemma.checkpoints.read_ahead import ReadAhead
from paligemma.errors import CheckpointError
from paligemma.files import (
    MAX_TOKENIZER_BYTES,
    move_into_place,
    read_regular,
    stat_path,
    sync_folder,
)

log = logging.getLogger(__name__)

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")  # the names of the files that are written here
ALIGNMENT = 64  # the first tensor starts at a multiple of 64 bytes, so that vector instructions read whole cache lines
# Elements that are read or written at a time. With smaller chunks, threads wait for each other more often; larger chunks need
# more memory.
CHUNK_ELEMENTS = 2**22
SAMPLE_BYTES = 4096  # bytes at the beginning of each tensor that are hashed for the fingerprint
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def fingerprint(folders: Iterable[Path], contents: Mapping[Path, bytes]) -> str:
    """A hash that changes when the files of a model change, for example by training.

    Only the first bytes of each tensor are hashed, because training changes all values of a tensor.

    Args:
        folders: the folder of the model; for an adapter, that of its base model and that of the adapter.
        contents: the bytes of files that were read before; these files are not read again.
    Raises: CheckpointError, AccessError.
    """
    digest = blake2b(digest_size=6)
    for folder in dict.fromkeys(folders):
        for file in (folder / name for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME, *SIDE_FILES)):
            if file in contents:
                digest.update(contents[file])
            elif stat_path(file) is not None:
                digest.update(read_regular(file, MAX_TOKENIZER_BYTES))
        adapter = folder / ADAPTER_NAME
        adapters = (adapter,) if stat_path(adapter) is not None else ()
        for file in (*(find_files(folder) if has_weights(folder) else ()), *adapters):
            tensors = read_header(file).values()
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            with open(file, "rb") as stream:
                for tensor in tensors:
                    digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}".encode())
                    stream.seek(tensor.start)
                    digest.update(stream.read(min(tensor.num_bytes, SAMPLE_BYTES)))
    return digest.hexdigest()


# Tensors


def became_shorter(tensor: StoredTensor) -> CheckpointError:
    return CheckpointError(f"{tensor.file} became shorter while it was read. Load it again.", path=tensor.file)


def read_chunks(tensor: StoredTensor, pin: bool = False) -> Iterator[Tensor]:
    """The values of a stored tensor in order, CHUNK_ELEMENTS at a time (the last chunk may be shorter).

    All chunks share one small buffer, so a chunk is valid only until the next one is requested.
    """
    dtype = DTYPES[tensor.dtype]
    size = CHUNK_ELEMENTS * dtype.itemsize
    buffer = torch.empty(min(size, tensor.num_bytes), dtype=torch.uint8, pin_memory=pin)
    with open(tensor.file, "rb") as stream:
        stream.seek(tensor.start)
        for start in range(0, tensor.num_bytes, size):
            chunk = buffer[: tensor.num_bytes - start]
            if stream.readinto(memoryview(chunk.numpy())) != len(chunk):
                raise became_shorter(tensor)
            yield chunk.view(dtype)


def is_equal(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two stored tensors hold the same values, even if they are stored in two different float dtypes."""
    if first.shape != second.shape:
        return False
    if first.dtype == second.dtype:  # then the bytes can be compared
        first, second = (replace(x, dtype="U8", shape=(x.num_bytes,)) for x in (first, second))
    elif not {first.dtype, second.dtype} <= set(FLOATS):
        return False
    return all(bool((a == b).all()) for a, b in zip(read_chunks(first), read_chunks(second), strict=True))


def check_equal(first: StoredTensor, second: StoredTensor) -> None:
    """Raises CheckpointError unless two stored copies of the same parameter hold the same values."""
    if not is_equal(first, second):
        raise CheckpointError(
            f"{first.name} in {first.file.name} and {second.name} in {second.file.name} are the same parameter with "
            "different values. Delete the one that is wrong.",
            path=second.file,
        )


class TensorReader:
    """Reads stored tensors onto a device. A file is mapped once.

    Args:
        ahead: files that are already mapped, and what is known about their values.
    """

    def __init__(self, device: torch.device, allow_nonfinite: bool, ahead: ReadAhead | None = None):
        self.device = device
        self.allow_nonfinite = allow_nonfinite
        self.ahead = ahead or ReadAhead({})

    def read(self, tensor: StoredTensor, dtype: torch.dtype, is_kept: bool = True) -> Tensor:
        """The tensor in `dtype`.

        On the CPU it is a view of the mapped file if the file has this dtype and `is_kept` is true. Otherwise it is copied
        through a small buffer.

        Args:
            is_kept: whether the model keeps this tensor; false if it is only read in order to be quantised. Then it must not be
                mapped, because mapped pages count as memory of this process until the whole file is unmapped.
        """
        if dtype.is_floating_point and tensor.dtype not in FLOATS:
            text = f"{tensor.file}: {tensor.name} has dtype {tensor.dtype}; floats are needed. Use an unquantised checkpoint."
            raise CheckpointError(text, path=tensor.file)
        stored = DTYPES[tensor.dtype]
        is_mappable = self.device.type == "cpu" and stored == dtype and tensor.start % stored.itemsize == 0
        try:
            x = self.map(tensor) if is_kept and is_mappable else self.copy(tensor, dtype)
        except OSError as error:
            if error.errno == errno.ENOMEM:  # the address space is limited
                raise MemoryError(f"{tensor.file}: {error.strerror}.") from error
            raise CheckpointError(f"{tensor.file} cannot be read: {error}. Download it again.", path=tensor.file) from error
        if dtype.is_floating_point and not self.allow_nonfinite:
            check_values(x, tensor, is_finite=stored == dtype and self.ahead.is_finite(tensor))
        return x

    def map(self, tensor: StoredTensor) -> Tensor:
        content, dtype = self.ahead.map(tensor.file), DTYPES[tensor.dtype]
        if len(content) < tensor.start + tensor.num_bytes:
            raise became_shorter(tensor)
        if tensor.num_bytes == 0:
            return torch.empty(tensor.shape, dtype=dtype)
        count = tensor.num_bytes // dtype.itemsize
        return torch.frombuffer(content, dtype=dtype, count=count, offset=tensor.start).view(tensor.shape)

    def copy(self, tensor: StoredTensor, dtype: torch.dtype) -> Tensor:
        target = torch.empty(tensor.shape, dtype=dtype, device=self.device)
        flat, start = target.view(-1), 0
        for chunk in read_chunks(tensor, pin=self.device.type == "cuda"):
            flat[start : start + len(chunk)].copy_(chunk)
            start += len(chunk)
        return target


def check_values(x: Tensor, tensor: StoredTensor, is_finite: bool = False) -> None:
    """Raises CheckpointError for NaN and infinity, and warns of a matrix whose values are all equal.

    First the sums of the rows are computed, as the product of the matrix and a vector of ones. The product reads the matrix once,
    at the speed of the memory, and a NaN or infinity makes the sum of its row NaN or infinite. In bfloat16 this is twice as fast
    as min and max, which are computed only if a sum is not finite or all sums are equal.

    Args:
        tensor: the stored tensor that x was read from, for the message.
        is_finite: whether it is already known that no value is NaN or infinite.
    """
    if x.numel() == 0 or (is_finite and (x.dim() != 2 or bool((x[0] != x[0, 0]).any()))):
        return
    if x.dim() == 2:
        sums = torch.mv(x, torch.ones(x.shape[1], dtype=x.dtype, device=x.device))  # [O]
        low, high = torch.stack(torch.aminmax(sums)).tolist()
        if math.isfinite(low) and math.isfinite(high) and low != high:
            return
    low, high = torch.stack(torch.aminmax(x)).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CheckpointError(
            f"{tensor.file}: {tensor.name} holds NaN or infinity as {str(x.dtype).removeprefix('torch.')}. Download it again. "
            "With fp16, try bf16: fp16 cannot hold numbers above 65504. Or load it as it is, with --allow_nonfinite.",
            path=tensor.file,
        )
    if low == high and x.dim() == 2 and x.numel() > 1:
        log.warning("%s: every value of %s is %g.", tensor.file, tensor.name, low)


# Writing


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Writes one safetensors file, tensor by tensor."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        offsets = [end, end + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for chunk in tensor.detach().reshape(-1).split(CHUNK_ELEMENTS):
                stream.write(memoryview(chunk.cpu().view(torch.uint8).numpy()))


def write_shards(state: dict[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    """Writes model.safetensors or, if it would be larger than max_shard_bytes, several files and their index."""
    shards, size = [{}], 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        write_tensors(folder / SINGLE_NAME, state)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_tensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def replace_files(source: Path, folder: Path) -> None:
    """Moves a newly written checkpoint over the old one. An interruption never leaves a mixture that could be loaded.

    Weights are moved first and config.json last. If new shards have the names of old ones, the old index is deleted before
    anything is moved, so that nothing can be loaded until the new index is in place. Old weight files that remain after the move
    are deleted: first the old index, then its shards.
    """
    sync_folder(source)  # a full disk must be noticed before the first old file is replaced
    names = sorted(path.name for path in source.iterdir() if path.name != CONFIG_NAME)  # shards sort before their index
    if any(stat_path(folder / name) is not None for name in names if name not in (SINGLE_NAME, INDEX_NAME)):
        (folder / INDEX_NAME).unlink(missing_ok=True)
    for name in names:
        move_into_place(source / name, folder / name)
    stale = [path for path in folder.iterdir() if WEIGHTS.fullmatch(path.name) and path.name not in names]
    for path in sorted(stale, key=lambda path: path.name != INDEX_NAME):
        path.unlink()
    move_into_place(source / CONFIG_NAME, folder / CONFIG_NAME)
