"""Reads and writes safetensors files and their index, for any model.

A safetensors file consists of 8 bytes (the length of the header), the header (JSON: name, dtype, shape and position of each
tensor) and the tensors, one after the other. All that a header claims is compared with the size of the file before
memory is allocated, because a file may be truncated, damaged or hostile. Python's `pickle` is never used.

Format: https://github.com/huggingface/safetensors#format. Checked in tests/checkpoints/test_safetensors_files.py.
Shapes: O outputs of a weight matrix.
"""

import json
import logging
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paligemma.checkpoints.file_names import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    CONFIG_NAME,
    CONVERT_PICKLE,
    INDEX_NAME,
    ONLY_SAFETENSORS,
    SIDE_FILES,
    SINGLE_NAME,
    explain_no_weights,
    has_weights,
)
from paligemma.errors import AccessError, CheckpointError, listed
from paligemma.files import (
    MAX_TOKENIZER_BYTES,
    describe_wrong_download,
    is_file,
    move_into_place,
    parse_json,
    read_json,
    read_regular,
    refuse_nan_and_infinity,
    stat_path,
    sync_folder,
)

log = logging.getLogger(__name__)

WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")  # the names of the files that are written here
ALIGNMENT = 64  # the first tensor starts at a multiple of 64 bytes, so that vector instructions read whole cache lines
MAX_HEADER_BYTES = 5_000_000  # the largest real header has 0.2 MB; at this limit even a hostile header is parsed within seconds
MAX_NAME = 500  # characters of a tensor's name
MAX_DIMENSIONS = 8
RENAMED = {  # the first bytes of a file in another format: what the file is
    b"PK": "an archive or a pickle of PyTorch that was renamed. " + CONVERT_PICKLE.removesuffix("."),
    b"GGUF": "a file of llama.cpp that was renamed. " + ONLY_SAFETENSORS.removesuffix("."),
    b"\x1f\x8b": "packed by gzip. Unpack it",
}
HEAD_BYTES = 64  # bytes at the beginning of a file, enough to recognise other formats
# Elements that are read or written at a time. With smaller chunks, threads wait for each other more often; larger chunks need
# more memory.
CHUNK_ELEMENTS = 2**22
SAMPLE_BYTES = 4096  # bytes at the beginning of each tensor that are hashed for the fingerprint
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
BITS = {name: dtype.itemsize * 8 for name, dtype in DTYPES.items()} | {  # the width of every dtype that a header may name
    "U64": 64, "U32": 32, "U16": 16, "C64": 64, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6,
    "F4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """The position of one tensor in a file, as the header gives it. The tensor itself is not loaded."""

    name: str  # as in the file
    file: Path
    dtype: str  # as in the file, a key of BITS
    shape: tuple[int, ...]
    start: int  # byte in the file
    num_bytes: int


# Headers and index


def check_regular(path: Path) -> None:
    """Raises CheckpointError unless the path is a file, or a link to a file (the hub's cache consists of links)."""
    if stat_path(path) is None and os.path.islink(path):
        raise CheckpointError(f"{path} is a broken link. The cache is incomplete: download the checkpoint again.", path=path)
    if stat_path(path) is None:
        raise CheckpointError(f"{path} is missing. Download the checkpoint again, or give another folder.", path=path)
    if not is_file(path):
        raise CheckpointError(f"{path} is not a file.", path=path)


def no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    """A hook for json: the object as a dict. Raises ValueError if a name occurs twice (json itself takes the last value)."""
    found = dict(pairs)
    "".join(found).encode()  # raises ValueError for a lone surrogate, which the safetensors library also rejects
    if len(found) < len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"{listed(twice)} occurs twice in the header")
    return found


def parse_unsigned(digits: str) -> int:
    """A hook for json: the number. Raises ValueError for a minus sign, because the safetensors library rejects even -0."""
    if digits.startswith("-"):
        raise ValueError(f"it holds {digits[:20]}; whole numbers from 0 are needed")
    return int(digits)


HEADER_HOOKS = {"object_pairs_hook": no_duplicates, "parse_int": parse_unsigned, "parse_constant": refuse_nan_and_infinity}


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, after everything in the header was checked against the size of the file.

    Raises: CheckpointError, with the file and what is wrong in it.
    """
    check_regular(file)
    size, head = file.stat().st_size, b""
    try:
        with open(file, "rb") as stream:
            head = stream.read(HEAD_BYTES)
            stream.seek(0)
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"it has {size} bytes, and its header claims {length}")
            header = parse_json(stream.read(length), MAX_HEADER_BYTES, **HEADER_HOOKS)
        about = header.pop("__metadata__", None)
        if about is not None and not (isinstance(about, dict) and all(isinstance(text, str) for text in about.values())):
            raise ValueError("its __metadata__ is not an object with texts as values")
        "".join((about or {}).values()).encode()  # raises ValueError for a lone surrogate
        tensors = {name: read_entry(name, entry, file, 8 + length) for name, entry in header.items()}
        end = 8 + length
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.num_bytes)):
            if tensor.start != end:
                raise ValueError(f"{tensor.name} begins at byte {tensor.start}, but the tensor before it ends at {end}")
            end += tensor.num_bytes
        if end != size:
            what = "it is cut off" if end > size else "there is something after its tensors"
            raise ValueError(f"its header describes {end} bytes and the file has {size}: {what}")
    except PermissionError as error:
        raise AccessError(f"{file} may not be read by this user. Change its permissions.", path=file) from error
    except ValueError as error:
        other = next((what for start, what in RENAMED.items() if head.startswith(start)), None)
        reason = describe_wrong_download(head) or (f"is {other}" if other else f"is damaged: {error}. Download it again")
        raise CheckpointError(f"{file} {reason}.", path=file) from error
    return tensors


def read_entry(name: str, entry: object, file: Path, offset: int) -> StoredTensor:
    """One tensor of a header. Raises ValueError if the entry contradicts itself."""
    if len(name) > MAX_NAME:
        raise ValueError(f"the name {listed([name])} has {len(name)} letters, and {MAX_NAME} is the limit")
    if not name.isprintable():
        raise ValueError(f"the name {name!r} has characters that cannot be shown")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    for key, numbers, limit in (("shape", shape, MAX_DIMENSIONS), ("data_offsets", offsets, 2)):
        is_list = isinstance(numbers, list) and len(numbers) <= limit
        if not is_list or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise ValueError(f"{name} has {key} {reprlib.repr(numbers)}; at most {limit} whole numbers from 0 are needed")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name} has dtype {reprlib.repr(dtype)}, which is none of {', '.join(BITS)}")
    num_bytes, rest = divmod(math.prod(shape) * BITS[dtype], 8)
    if len(offsets) != 2 or rest or offsets[1] - offsets[0] != num_bytes:
        raise ValueError(f"{name} has dtype {dtype} and shape {shape}, {num_bytes} bytes, but data_offsets {offsets}")
    return StoredTensor(name, file, dtype, tuple(shape), offset + offsets[0], num_bytes)


def find_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: the single file if there is one, else the files that the index names.

    If both exist, the index is left over from an older save and is ignored, as in transformers.

    Raises: CheckpointError if there are no weights, the index is wrong, or files that it names are missing.
    """
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if not has_weights(folder):
        raise CheckpointError(explain_no_weights(folder), path=folder)
    has_index = stat_path(index) is not None
    if stat_path(single) is not None or not (has_index or index.is_symlink()):
        if has_index:
            log.info("%s: %s is read, and %s next to it is ignored.", folder, SINGLE_NAME, INDEX_NAME)
        return [single]
    names = read_index(index)
    missing = [name for name in names if stat_path(folder / name) is None]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(names)} files that {INDEX_NAME} names: {listed(missing)}. "
            "The download is incomplete: run it again.",
            path=folder,
        )
    stale = sorted({path.name for path in folder.glob("*.safetensors")} - set(names))
    if stale:
        log.info("%s: ignored, because the index does not name them: %s", folder, listed(stale))
    return [folder / name for name in names]


def read_index(index: Path) -> list[str]:
    """The file names in an index, each once. Raises CheckpointError if one of them leads out of the folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map. Download it again.", path=index)
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.\-]{1,200}\.safetensors", name, re.ASCII) or name.startswith("."):
            raise CheckpointError(f"{index} names {name!r}. A bare file name that ends with .safetensors is needed.", path=index)
    return sorted(set(weight_map.values()))


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
                raise CheckpointError(f"{tensor.file} became shorter while it was read. Load it again.", path=tensor.file)
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
    """Reads stored tensors onto a device. A file is mapped once, when its first mappable tensor is read."""

    def __init__(self, device: torch.device, allow_nonfinite: bool):
        self.device = device
        self.allow_nonfinite = allow_nonfinite
        self.mapped: dict[Path, safe_open] = {}

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
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{tensor.file} cannot be read: {error}. Download it again.", path=tensor.file) from error
        if dtype.is_floating_point and not self.allow_nonfinite:
            check_values(x, tensor)
        return x

    def map(self, tensor: StoredTensor) -> Tensor:
        if tensor.file not in self.mapped:
            self.mapped[tensor.file] = safe_open(tensor.file, framework="pt", device="cpu")
        return self.mapped[tensor.file].get_tensor(tensor.name)

    def copy(self, tensor: StoredTensor, dtype: torch.dtype) -> Tensor:
        target = torch.empty(tensor.shape, dtype=dtype, device=self.device)
        flat, start = target.view(-1), 0
        for chunk in read_chunks(tensor, pin=self.device.type == "cuda"):
            flat[start : start + len(chunk)].copy_(chunk)
            start += len(chunk)
        return target


def check_values(x: Tensor, tensor: StoredTensor) -> None:
    """Raises CheckpointError for NaN and infinity, and warns of a matrix whose values are all equal.

    First the sums of the rows are computed, as the product of the matrix and a vector of ones. The product reads the matrix once,
    at the speed of the memory, and a NaN or infinity makes the sum of its row NaN or infinite. In bfloat16 this is twice as fast
    as min and max, which are computed only if a sum is not finite or all sums are equal.

    Args:
        tensor: the stored tensor that x was read from, for the message.
    """
    if x.numel() == 0:
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
