"""What lies in a checkpoint folder: settings, index, tensors; read and written. Nothing here knows what a model is.

A safetensors file is 8 bytes (length of the header), the header (JSON: name, dtype, shape and place of each tensor) and the
tensors, one behind the other. Headers are read here, and every claim in them is compared with the size of the file before
anything is allocated: a file may be cut off, damaged or hostile. Python's `pickle` is never used.

Format: https://github.com/huggingface/safetensors#format. Checked in tests/checkpoints/test_safetensors_files.py.
"""

import json
import logging
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor

from paligemma.errors import MAX_LISTED_NAME, AccessError, CheckpointError, PaliGemmaError, listed
from paligemma.files import (
    MAX_TOKENIZER_BYTES,
    describe_placeholder,
    is_file,
    move_into_place,
    names_in,
    parse_json,
    read_json,
    read_regular,
    stat_path,
    sync_folder,
)

log = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
CODEC_NAME = "vae-oid.npz"
# What is read of a folder beside its settings and weights. Downloading and copying take the same names.
SIDE_FILES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", CODEC_NAME,
)  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NO_PICKLE = "Unpickling runs whatever the file says, so this is never done here."
CONVERT_PICKLE = "Save it as safetensors, with transformers: from_pretrained(folder).save_pretrained(new_folder)."
CONVERT_ADAPTER = "Save it as safetensors, with PEFT: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)."
CONVERT_ARRAYS = (
    "If it is a big_vision checkpoint, convert it with transformers' convert_paligemma_weights_to_hf.py or take the same model "
    "from the hub."
)
NOT_WEIGHTS = re.compile(r"training_args\.bin|(optimizer|scheduler|scaler|rng_state.*)\.(bin|pth?)")  # of a Trainer
PIECES = re.compile(r"zero_to_fp32\.py|global_step\d+|pytorch_model_fsdp_\d+|\.metadata")  # of DeepSpeed and FSDP
JOIN_PIECES = "Join them: zero_to_fp32.py of DeepSpeed with --safe_serialization, or `accelerate merge-weights` for FSDP."
FOREIGN = (".gguf", ".onnx", ".h5", ".msgpack", ".tflite", ".ot")  # of llama.cpp, ONNX, TensorFlow, JAX, Rust
ONLY_SAFETENSORS = "Only safetensors are read here: take the checkpoint that it was made from."
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")  # the names that this file writes
ALIGNMENT = 64  # bytes: where the first tensor of a file begins, so that vector units read whole lines of the cache
MAX_HEADER_BYTES = 5_000_000  # the largest real one has 0.2 MB; what others write is read in seconds, whatever it is
MAX_NAME = 500  # letters of a tensor's name
MAX_DIMENSIONS = 8
RENAMED = {
    b"PK": "an archive or a pickle of PyTorch that was renamed. " + CONVERT_PICKLE.removesuffix("."),
    b"GGUF": "a file of llama.cpp that was renamed. " + ONLY_SAFETENSORS.removesuffix("."),
    b"\x1f\x8b": "packed by gzip. Unpack it",
}
HEAD_BYTES = 64  # of a damaged file: enough to recognise what it is instead
PART_ELEMENTS = 2**22  # read, or written, at a time: fewer keep threads waiting for each other, more take memory
MOST_FOLDERS = 1000  # in which a model is looked for
SAMPLE_BYTES = 4096  # of the beginning of each tensor, for telling one model from another
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
BITS = {name: dtype.itemsize * 8 for name, dtype in DTYPES.items()} | {  # of every dtype that a header may name
    "U64": 64, "U32": 32, "U16": 16, "C64": 64, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6,
    "F4": 4,
}  # fmt: skip

# The spellings of the same parameter: left as files have it, right as we have it, which is the hub's. The first prefix that
# fits is taken, so the longer ones stand first.
SPELLINGS = (
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),  # files of transformers 4.52 and later 4.x
    ("model.vision_tower.", "vision_tower.vision_model."),  # state dicts of transformers 5
    ("model.language_model.", "language_model.model."),  # both
    ("model.multi_modal_projector.", "multi_modal_projector."),  # both
    ("vision_tower.vision_model.", "vision_tower.vision_model."),  # the hub
    ("vision_tower.", "vision_tower.vision_model."),  # files of transformers 5
    ("language_model.lm_head.", "lm_head."),  # the output matrix is the embedding: some files hold it twice, some only here
)
WRAPPERS = re.compile(r"^(?:base_model\.model\.|module\.)+")  # what PEFT and DistributedDataParallel put in front


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: read from a header, nothing of the tensor itself."""

    name: str  # as the file spells it
    file: Path
    dtype: str  # as the file spells it, a key of BITS
    shape: tuple[int, ...]
    start: int  # byte in the file
    num_bytes: int


def canonical_name(name: str) -> str:
    """Our name of a parameter, whatever program wrote the file."""
    name = name.replace("_orig_mod.", "")  # torch.compile puts it in front of whatever part was compiled
    name = WRAPPERS.sub("", name, count=1)
    for theirs, ours in SPELLINGS:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def check_regular(path: Path) -> None:
    """Raises CheckpointError unless there is a file, or a link to one (the hub's cache is made of links)."""
    if stat_path(path) is None and os.path.islink(path):
        raise CheckpointError(f"{path} is a link to nothing. The cache is incomplete: download the checkpoint again.", path=path)
    if stat_path(path) is None:
        raise CheckpointError(f"{path} is missing. Download the checkpoint again, or name another folder.", path=path)
    if not is_file(path):
        raise CheckpointError(f"{path} is not a file.", path=path)


def no_duplicates(pairs: list[tuple[str, object]]) -> dict:
    """For json: an object as a dict. Raises ValueError for a name that occurs twice (json itself takes the last)."""
    found = dict(pairs)
    "".join(found).encode()  # raises ValueError for half a surrogate pair, which the library refuses, too
    if len(found) < len(pairs):
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise ValueError(f"{listed(twice)} occurs twice in the header")
    return found


def from_0_up(digits: str) -> int:
    """For json: the number. Raises ValueError for one with a sign: -0 is none of safetensors' whole numbers."""
    if digits.startswith("-"):
        raise ValueError(f"it holds {digits[:20]}; whole numbers from 0 are needed")
    return int(digits)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds, by name, after every claim of its header was checked against the file's size.

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
            header = parse_json(stream.read(length), MAX_HEADER_BYTES, object_pairs_hook=no_duplicates, parse_int=from_0_up)
        about = header.pop("__metadata__", None)
        if about is not None and not (isinstance(about, dict) and all(isinstance(text, str) for text in about.values())):
            raise ValueError("its __metadata__ is no object of texts")
        "".join((about or {}).values()).encode()
        tensors = {name: read_entry(name, entry, file, 8 + length) for name, entry in header.items()}
        end = 8 + length
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.num_bytes)):
            if tensor.start != end:
                raise ValueError(f"{tensor.name} begins at byte {tensor.start}, not at {end} where the one before it ends")
            end += tensor.num_bytes
        if end != size:
            what = "it is cut off" if end > size else "there is something after its tensors"
            raise ValueError(f"its header describes {end} bytes and the file has {size}: {what}")
    except PermissionError as error:
        raise AccessError(f"{file} may not be read by this user. Change its permissions.", path=file) from error
    except ValueError as error:
        other = next((what for start, what in RENAMED.items() if head.startswith(start)), None)
        reason = describe_placeholder(head) or (f"is {other}" if other else f"is damaged: {error}. Download it again")
        raise CheckpointError(f"{file} {reason}.", path=file) from error
    return tensors


def read_entry(name: str, entry: object, file: Path, offset: int) -> StoredTensor:
    """One line of a header. Raises ValueError when it contradicts itself."""
    if len(name) > MAX_NAME:
        raise ValueError(f"the name {name[:MAX_LISTED_NAME]}... has {len(name)} letters, and {MAX_NAME} is the limit")
    if not name.isprintable():
        raise ValueError(f"the name {name!r} has characters that cannot be shown")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{name} is not described by dtype, shape and data_offsets")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    for key, numbers, most in (("shape", shape, MAX_DIMENSIONS), ("data_offsets", place, 2)):
        is_list = isinstance(numbers, list) and len(numbers) <= most
        if not is_list or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise ValueError(f"{name} has {key} {reprlib.repr(numbers)}; at most {most} whole numbers from 0 are needed")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name} has dtype {reprlib.repr(dtype)}, which is none of {', '.join(BITS)}")
    num_bytes, rest = divmod(math.prod(shape) * BITS[dtype], 8)
    if len(place) != 2 or rest or place[1] - place[0] != num_bytes:
        raise ValueError(f"{name} is {dtype} {shape}, {num_bytes} bytes, but lies at {place}")
    return StoredTensor(name, file, dtype, tuple(shape), offset + place[0], num_bytes)


def has_weights(folder: Path, error_class: type[PaliGemmaError] = CheckpointError) -> bool:
    """Whether a folder holds weights, be they damaged or a link to nothing. Raises: as files.stat_path."""
    places = (folder / SINGLE_NAME, folder / INDEX_NAME)
    return any(stat_path(place, error_class) is not None or place.is_symlink() for place in places)


def has_adapter(folder: Path, error_class: type[PaliGemmaError] = CheckpointError) -> bool:
    """Whether a folder holds a LoRA adapter, by itself or beside the weights of its base. Raises: as files.stat_path."""
    return stat_path(folder / ADAPTER_CONFIG_NAME, error_class) is not None


def find_files(folder: Path) -> list[Path]:
    """The safetensors files that belong to the checkpoint: the single one, else those of the index, as in transformers.

    An index beside a single file is left from an older save, whose shards transformers removes.

    Raises: CheckpointError when there are none, when the index is wrong or files that it names are missing.
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
        log.info("%s: %s not in the index, ignored.", folder, listed(stale))
    return [folder / name for name in names]


def read_index(index: Path) -> list[str]:
    """The file names of an index, each once. Raises CheckpointError when one of them leads out of the folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map. Download it again.", path=index)
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.\-]{1,200}\.safetensors", name, re.ASCII) or name.startswith("."):
            raise CheckpointError(f"{index} names {name!r}. A bare file name with .safetensors is needed.", path=index)
    return sorted(set(weight_map.values()))


def models_in(folder: Path) -> list[str]:
    """The folders in a folder that are models or adapters: a Trainer's checkpoint-500, model/ of finetune.py, snapshots/...

    In the order of the numbers in their names, so that the last is the newest.
    """
    places = [*names_in(folder), *(f"snapshots/{name}" for name in names_in(folder / "snapshots"))][:MOST_FOLDERS]
    settings = (CONFIG_NAME, ADAPTER_CONFIG_NAME)
    found = [place for place in places if any(os.path.isfile(folder / place / name) for name in settings)]
    return sorted(found, key=lambda place: [(int(n or -1), word) for word, n in re.findall(r"(\D+)(\d{0,18})", place)])


def explain_no_weights(folder: Path) -> str:
    """Why there is nothing to load, by what lies in the folder instead."""
    cached = next((place.name for place in (folder, *folder.parents) if place.name.startswith("models--")), None)
    inner = models_in(folder)
    if cached is not None:
        name = cached.removeprefix("models--").replace("--", "/")
        own = f", or its folder {folder / inner[-1]}" if inner else ""
        return f"{folder} belongs to the hub's cache of {name} and is not the model itself. Name {name}{own}."
    if inner:
        return f"{folder} is not a model, but holds {listed(inner)}. Name one of them, such as {folder / inner[-1]}."
    return f"{folder} {explain_names(names_in(folder))}"


def explain_names(names: list[str]) -> str:
    """The same by the names of files alone, to be put after the name of a folder or of a hub model."""
    pickles = [name for name in names if name.endswith(PICKLES) and not NOT_WEIGHTS.fullmatch(name)]
    arrays = [name for name in names if name.endswith(".npz") and name != CODEC_NAME]
    shards = [name for name in names if name.endswith(".safetensors")]
    foreign = [name for name in names if name.endswith(FOREIGN) or name == "onnx"]
    pieces = [name for name in names if PIECES.fullmatch(name)]
    cached = [name.removeprefix("models--").replace("--", "/") for name in names if name.startswith("models--")]
    inner = sorted({name.rpartition("/")[0] for name in shards})
    if inner and "" not in inner:  # only of a hub model are the names in its folders known
        return f"is not a model itself, but has some in its folders: {listed(inner)}. Download one of them and name it there."
    if ADAPTER_NAME in shards:
        return f"holds an adapter, {ADAPTER_NAME}, without its {ADAPTER_CONFIG_NAME}. Copy that into it."
    if shards:
        return f"holds {listed(shards)}, but neither {SINGLE_NAME} nor {INDEX_NAME}. Download the index as well."
    if pieces:
        return f"holds weights in pieces of several processes, {listed(pieces)}. {JOIN_PIECES}"
    if ADAPTER_PICKLE in pickles:
        return f"holds an adapter only as {ADAPTER_PICKLE}. {NO_PICKLE} {CONVERT_ADAPTER}"
    if pickles:
        return f"holds only {listed(pickles)}. {NO_PICKLE} {CONVERT_PICKLE}"
    if arrays:
        return f"holds {listed(arrays)}. {CONVERT_ARRAYS}"
    if foreign:
        return f"holds {listed(foreign)}. {ONLY_SAFETENSORS}"
    if cached:
        return f"is the hub's cache. Name a model in it by its id: {listed(cached)}."
    weights = f"neither {SINGLE_NAME} nor {INDEX_NAME}"
    if CONFIG_NAME in names:
        return f"holds no weights: {weights}. Download the checkpoint again."
    return f"is not a model: {CONFIG_NAME} is missing, and there are no weights, {weights}. Name another folder."


def explain_no_adapter(folder: Path) -> str:
    """What a folder with adapter_config.json lacks."""
    if has_weights(folder):
        return (
            f"{folder} holds a whole model and an {ADAPTER_CONFIG_NAME}, but no {ADAPTER_NAME}. Delete {ADAPTER_CONFIG_NAME} if "
            "the adapter is merged already, else copy the adapter into the folder."
        )
    if stat_path(folder / ADAPTER_PICKLE) is not None:
        return f"{folder} holds an adapter only as {ADAPTER_PICKLE}. {NO_PICKLE} {CONVERT_ADAPTER}"
    return f"{folder / ADAPTER_NAME} is missing. Download the adapter again, or name another folder."


def explain_file(file: Path) -> str:
    """What a file is that was given in place of a model's folder, and what to do."""
    suffix = file.suffix.lower()
    if is_file(file):  # opening a pipe would wait for its writer
        with suppress(OSError), open(file, "rb") as stream:
            suffix = ".gguf" if stream.read(4) == b"GGUF" else suffix
    if file.name == CODEC_NAME:
        return f"{file} is a mask codec. Give it as --mask_codec, and a model's folder as the model."
    if any(os.path.isfile(file.parent / name) for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME)):
        return f"{file} is a file of a model. Name its folder, {file.parent}."
    if suffix in FOREIGN:
        return f"{file} is {'a file of llama.cpp' if suffix == '.gguf' else 'a model of another program'}. {ONLY_SAFETENSORS}"
    if suffix == ".npz":
        return f"{file} is an archive of arrays. {CONVERT_ARRAYS}"
    if suffix in PICKLES:
        return f"{file} is a pickle. {NO_PICKLE} {CONVERT_PICKLE}"
    if suffix in (".zip", ".tar", ".gz", ".tgz", ".xz", ".zst", ".7z"):
        return f"{file} is an archive. Unpack it and name the folder with config.json and the weights."
    return f"{file} is a file. Name the folder with config.json and the weights."


def fingerprint(folders: Iterable[Path], contents: Mapping[Path, bytes]) -> str:
    """A hash that changes when the files of a model change, for example by training.

    Only the first bytes of each tensor are hashed, because training changes all of a tensor's values.

    Args:
        folders: of the model or, for an adapter, of its base model and of the adapter.
        contents: files that were read before; they are not read again.
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


def read_parts(tensor: StoredTensor, pin: bool = False) -> Iterator[Tensor]:
    """The values of a stored tensor in order, PART_ELEMENTS at a time (the last may be fewer), each time in the same buffer.

    So a part is valid until the next one is asked for, and a tensor of any size passes through little memory.
    """
    dtype = DTYPES[tensor.dtype]
    size = PART_ELEMENTS * dtype.itemsize
    buffer = torch.empty(min(size, tensor.num_bytes), dtype=torch.uint8, pin_memory=pin)
    with open(tensor.file, "rb") as stream:
        stream.seek(tensor.start)
        for start in range(0, tensor.num_bytes, size):
            part = buffer[: tensor.num_bytes - start]
            if stream.readinto(memoryview(part.numpy())) != len(part):
                raise CheckpointError(f"{tensor.file} became shorter while it was read. Load it again.", path=tensor.file)
            yield part.view(dtype)


def is_equal(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two stored tensors hold the same values, be it as floats of two dtypes."""
    if first.shape != second.shape:
        return False
    if first.dtype == second.dtype:  # bytes can be compared, whatever they stand for
        first, second = (replace(x, dtype="U8", shape=(x.num_bytes,)) for x in (first, second))
    elif not {first.dtype, second.dtype} <= set(FLOATS):
        return False
    return all(bool((a == b).all()) for a, b in zip(read_parts(first), read_parts(second), strict=True))


def check_equal(first: StoredTensor, second: StoredTensor) -> None:
    """Raises CheckpointError unless two stored tensors are one and the same."""
    if not is_equal(first, second):
        raise CheckpointError(
            f"{first.name} in {first.file.name} and {second.name} in {second.file.name} are the same parameter with "
            "different values. Delete the one that is wrong.",
            path=second.file,
        )


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file, written tensor by tensor and brought to the disk."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        place = [end, end + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        end = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for part in tensor.detach().reshape(-1).split(PART_ELEMENTS):
                stream.write(memoryview(part.cpu().view(torch.uint8).numpy()))


def write_shards(state: dict[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    """The weights as model.safetensors or, where that would be too large, as several files and their index."""
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
    """Moves a written checkpoint over the one that is there, so that an interruption never leaves a mixture that loads.

    Weights first; an index that is no longer true goes before the shards it needs; config.json comes last. Shards that are
    replaced under their old names lose their index before, so that until the new one is there nothing loads.
    """
    sync_folder(source)  # a disk that turns out to be full must be noticed before the first old file is replaced
    names = sorted(path.name for path in source.iterdir() if path.name != CONFIG_NAME)  # shards sort before their index
    if any(stat_path(folder / name) is not None for name in names if name not in (SINGLE_NAME, INDEX_NAME)):
        (folder / INDEX_NAME).unlink(missing_ok=True)
    for name in names:
        move_into_place(source / name, folder / name)
    stale = [path for path in folder.iterdir() if WEIGHTS.fullmatch(path.name) and path.name not in names]
    for path in sorted(stale, key=lambda path: path.name != INDEX_NAME):
        path.unlink()
    move_into_place(source / CONFIG_NAME, folder / CONFIG_NAME)
