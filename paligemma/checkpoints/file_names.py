"""The names of the files in a model's folder, and error messages for folders and files that are not a model.

Weights are not read here. Checked in tests/checkpoints/test_hub.py.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

from paligemma.errors import CheckpointError, PaliGemmaError, listed
from paligemma.files import CODEC_NAME, is_file, names_in, stat_path

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
# The files of a model that are read besides config.json and the weights. Downloading and copying use this list, too.
SIDE_FILES = (
    GENERATION_CONFIG_NAME, "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", CODEC_NAME,
)  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NO_PICKLE = "Unpickling runs any code that the file contains, so pickles are never read."
CONVERT_PICKLE = "Save the weights as safetensors, with transformers: from_pretrained(folder).save_pretrained(new_folder)."
CONVERT_ADAPTER = (
    "Save the adapter as safetensors, with PEFT: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)."
)
CONVERT_ARRAYS = (
    "If it is a big_vision checkpoint, convert it with transformers' convert_paligemma_weights_to_hf.py or take the same model "
    "from the hub."
)
# Files that transformers' Trainer saves next to the weights.
TRAINER_FILES = re.compile(r"training_args\.bin|(optimizer|scheduler|scaler|rng_state.*)\.(bin|pth?)")
# Files of checkpoints that DeepSpeed and FSDP save, with the weights divided among the processes.
DISTRIBUTED_FILES = re.compile(r"zero_to_fp32\.py|global_step\d+|pytorch_model_fsdp_\d+|\.metadata")
JOIN_SHARDS = "Join the parts, with zero_to_fp32.py --safe_serialization (DeepSpeed) or `accelerate merge-weights` (FSDP)."
FOREIGN = (".gguf", ".onnx", ".h5", ".msgpack", ".tflite", ".ot")  # llama.cpp, ONNX, TensorFlow, JAX, Rust
ONLY_SAFETENSORS = "Only safetensors files are read: use the checkpoint from which this one was converted."
MAX_FOLDERS = 1000  # subfolders that are searched for a model


def has_weights(folder: Path, error_class: type[PaliGemmaError] = CheckpointError) -> bool:
    """Whether a folder holds weights, even if they are damaged or a broken link. Raises: as files.stat_path."""
    paths = (folder / SINGLE_NAME, folder / INDEX_NAME)
    return any(stat_path(path, error_class) is not None or path.is_symlink() for path in paths)


def has_adapter(folder: Path, error_class: type[PaliGemmaError] = CheckpointError) -> bool:
    """Whether a folder holds a LoRA adapter, alone or next to the weights of its base model. Raises: as files.stat_path."""
    return stat_path(folder / ADAPTER_CONFIG_NAME, error_class) is not None


def models_in(folder: Path) -> list[str]:
    """The subfolders that hold models or adapters, such as checkpoint-500 (Trainer), model/ (fine-tuning), snapshots/... (cache).

    They are sorted by the numbers in their names, so the newest comes last.
    """
    names = [*names_in(folder), *(f"snapshots/{name}" for name in names_in(folder / "snapshots"))][:MAX_FOLDERS]
    settings = (CONFIG_NAME, ADAPTER_CONFIG_NAME)
    found = [name for name in names if any(os.path.isfile(folder / name / file) for file in settings)]
    return sorted(found, key=lambda name: [(int(number or -1), word) for word, number in re.findall(r"(\D+)(\d{0,18})", name)])


def cached_id(name: str) -> str:
    """The hub id that a folder of the hub's cache belongs to: models--google--gemma -> google/gemma."""
    return name.removeprefix("models--").replace("--", "/")


def explain_no_weights(folder: Path) -> str:
    """Says why a folder without weights cannot be loaded, judging by the files in it."""
    cached = next((path.name for path in (folder, *folder.parents) if path.name.startswith("models--")), None)
    inner = models_in(folder)
    if cached is not None:
        or_folder = f", or its folder {folder / inner[-1]}," if inner else ""
        name = cached_id(cached)
        return f"{folder} belongs to the hub's cache of {name} and is not the model itself. Give {name}{or_folder} as the model."
    if inner:
        return f"{folder} is not a model, but holds {listed(inner)}. Give one of them, such as {folder / inner[-1]}."
    return f"{folder} {explain_names(names_in(folder))}"


def explain_names(names: list[str]) -> str:
    """Says why files with these names cannot be loaded. The text continues a sentence that begins with a folder or hub id."""
    pickles = [name for name in names if name.endswith(PICKLES) and not TRAINER_FILES.fullmatch(name)]
    arrays = [name for name in names if name.endswith(".npz") and name != CODEC_NAME]
    shards = [name for name in names if name.endswith(".safetensors")]
    foreign = [name for name in names if name.endswith(FOREIGN) or name == "onnx"]
    distributed = [name for name in names if DISTRIBUTED_FILES.fullmatch(name)]
    cached = [cached_id(name) for name in names if name.startswith("models--")]
    inner = sorted({name.rpartition("/")[0] for name in shards})
    if inner and "" not in inner:  # only a hub model's files have names such as sub/model.safetensors
        return f"is not a model, but its folders {listed(inner)} are. Download one of them and give its folder."
    if ADAPTER_NAME in shards:
        return f"holds an adapter, {ADAPTER_NAME}, without its {ADAPTER_CONFIG_NAME}. Copy {ADAPTER_CONFIG_NAME} into the folder."
    if shards:
        return f"holds {listed(shards)}, but neither {SINGLE_NAME} nor {INDEX_NAME}. Download the index as well."
    if distributed:
        return f"holds weights that several processes saved in parts, {listed(distributed)}. {JOIN_SHARDS}"
    if ADAPTER_PICKLE in pickles:
        return f"holds an adapter only as {ADAPTER_PICKLE}. {NO_PICKLE} {CONVERT_ADAPTER}"
    if pickles:
        return f"holds only {listed(pickles)}. {NO_PICKLE} {CONVERT_PICKLE}"
    if arrays:
        return f"holds {listed(arrays)}. {CONVERT_ARRAYS}"
    if foreign:
        return f"holds {listed(foreign)}. {ONLY_SAFETENSORS}"
    if cached:
        return f"is the hub's cache. Give the id of a model in it: {listed(cached)}."
    weights = f"neither {SINGLE_NAME} nor {INDEX_NAME}"
    if CONFIG_NAME in names:
        return f"holds no weights: {weights}. Download the checkpoint again."
    return f"is not a model: {CONFIG_NAME} is missing, and there are no weights, {weights}. Give another folder."


def explain_no_adapter(folder: Path) -> str:
    """Says what is missing in a folder with adapter_config.json and without adapter_model.safetensors."""
    if has_weights(folder):
        return (
            f"{folder} holds a whole model and an {ADAPTER_CONFIG_NAME}, but no {ADAPTER_NAME}. Delete {ADAPTER_CONFIG_NAME} if "
            "the adapter is already merged; otherwise copy the adapter into the folder."
        )
    if stat_path(folder / ADAPTER_PICKLE) is not None:
        return f"{folder} holds an adapter only as {ADAPTER_PICKLE}. {NO_PICKLE} {CONVERT_ADAPTER}"
    return f"{folder / ADAPTER_NAME} is missing. Download the adapter again, or give another folder."


def explain_file(file: Path) -> str:
    """Says what kind of file was given in place of a model's folder, and what to do."""
    suffix = file.suffix.lower()
    if is_file(file):  # opening a pipe would wait for another program to write to it
        with suppress(OSError), open(file, "rb") as stream:
            suffix = ".gguf" if stream.read(4) == b"GGUF" else suffix
    if file.name == CODEC_NAME:
        return f"{file} is a mask codec. Give it as --mask_codec, and a model's folder as the model."
    if any(os.path.isfile(file.parent / name) for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME)):
        return f"{file} is a file of a model. Give its folder, {file.parent}."
    if suffix in FOREIGN:
        return f"{file} is {'a file of llama.cpp' if suffix == '.gguf' else 'a model of another program'}. {ONLY_SAFETENSORS}"
    if suffix == ".npz":
        return f"{file} is an archive of arrays. {CONVERT_ARRAYS}"
    if suffix in PICKLES:
        return f"{file} is a pickle. {NO_PICKLE} {CONVERT_PICKLE}"
    if suffix in (".zip", ".tar", ".gz", ".tgz", ".xz", ".zst", ".7z"):
        return f"{file} is an archive. Unpack it and give the folder with config.json and the weights."
    return f"{file} is a file. Give the folder with config.json and the weights."
