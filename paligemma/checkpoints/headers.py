"""Reads the headers of safetensors files, and finds the files of a checkpoint. Imports no torch, which takes a second.

A safetensors file consists of 8 bytes (the length of the header), the header (JSON: name, dtype, shape and position of each
tensor) and the tensors, one after the other. All that a header claims is compared with the size of the file before
memory is allocated, because a file may be truncated, damaged or hostile. Python's `pickle` is never used.

Format: https://github.com/huggingface/safetensors#format. Checked in tests/checkpoints/test_safetensors_files.py.
"""

import logging
import math
import os
import re
import reprlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from paligemma.checkpoints.file_names import (
    ADAPTER_NAME,
    CONVERT_PICKLE,
    INDEX_NAME,
    ONLY_SAFETENSORS,
    SINGLE_NAME,
    explain_no_weights,
    has_adapter,
    has_weights,
)
from paligemma.errors import AccessError, CheckpointError, listed
from paligemma.files import (
    describe_wrong_download,
    is_file,
    parse_json,
    read_json,
    refuse_nan_and_infinity,
    stat_path,
)

log = logging.getLogger(__name__)

MAX_HEADER_BYTES = 5_000_000  # the largest real header has 0.2 MB; at this limit even a hostile header is parsed within seconds
MAX_NAME = 500  # characters of a tensor's name
MAX_DIMENSIONS = 8
RENAMED = {  # the first bytes of a file in another format: what the file is
    b"PK": "an archive or a pickle of PyTorch that was renamed. " + CONVERT_PICKLE.removesuffix("."),
    b"GGUF": "a file of llama.cpp that was renamed. " + ONLY_SAFETENSORS.removesuffix("."),
    b"\x1f\x8b": "packed by gzip. Unpack it",
}
HEAD_BYTES = 64  # bytes at the beginning of a file, enough to recognise other formats
FLOATS = ("F64", "F32", "F16", "BF16")
BITS = {  # the width of every dtype that a header may name
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16,
    "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6,
    "F6_E3M2": 6, "F4": 4,
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
    if stat_path(single) is not None or not (stat_path(index) is not None or index.is_symlink()):
        return [single]
    names = read_index(index)
    missing = [name for name in names if stat_path(folder / name) is None]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(names)} files that {INDEX_NAME} names: {listed(missing)}. "
            "The download is incomplete: run it again.",
            path=folder,
        )
    return [folder / name for name in names]


def note_ignored(folder: Path, files: list[Path]) -> None:
    """Logs which files with weights are left over in a folder. Args: files: from find_files."""
    if files == [folder / SINGLE_NAME]:
        if stat_path(folder / INDEX_NAME) is not None:
            log.info("%s: %s is read, and %s next to it is ignored.", folder, SINGLE_NAME, INDEX_NAME)
        return
    used = {file.name for file in files} | ({ADAPTER_NAME} if has_adapter(folder) else set())
    stale = sorted({path.name for path in folder.glob("*.safetensors")} - used)
    if stale:
        log.info("%s: ignored, because the index does not name them: %s", folder, listed(stale))


def read_index(index: Path) -> list[str]:
    """The file names in an index, each once. Raises CheckpointError if one of them leads out of the folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map. Download it again.", path=index)
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.\-]{1,200}\.safetensors", name, re.ASCII) or name.startswith("."):
            raise CheckpointError(f"{index} names {name!r}. A bare file name that ends with .safetensors is needed.", path=index)
    return sorted(set(weight_map.values()))
