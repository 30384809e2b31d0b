"""Loads a model from a folder or a hub id, and saves a model.

`ModelFiles` finds the files of a model and reads their settings; its method `load` makes the model. First, the model that
config.json describes is built without memory (on torch's "meta" device), and every name, dtype and shape in the headers of the
files is compared with it. Then tensors are read one at a time: memory-mapped if the file has the wanted dtype, otherwise copied
through a small buffer, and quantised if requested. So there are never two copies of the weights. If the folder holds a LoRA
adapter, its updates (matrix products B A, see layers/lora.py) are added to the matrices of its base model while these are read.
Files spell the names of parameters in four ways, see parameter_names.py.

A mapped file must not change while the model is in use: if another program shortens it, the system ends this program (SIGBUS).
`save_model` never writes into an existing file but replaces it; a loaded model keeps using the old file.

Checked in tests/checkpoints/test_weights.py.
"""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from paligemma.checkpoints.adapters import Adapter, read_adapter
from paligemma.checkpoints.file_names import ADAPTER_CONFIG_NAME, CONFIG_NAME, GENERATION_CONFIG_NAME, has_adapter, has_weights
from paligemma.checkpoints.fitting import choose_dtype, module_bytes, own_tensors, room_to_answer, run_dtype
from paligemma.checkpoints.headers import FLOATS, StoredTensor, find_files, note_ignored, read_header
from paligemma.checkpoints.hub import find_base, resolve
from paligemma.checkpoints.read_ahead import ReadAhead
from paligemma.checkpoints.safetensors_files import (
    DTYPES,
    TensorReader,
    check_equal,
    fingerprint,
    is_equal,
    replace_files,
    write_shards,
)
from paligemma.configuration import PaliGemmaConfig, SiglipVisionConfig
from paligemma.devices import find_devices, graphs_mode, usable_cards
from paligemma.errors import CheckpointError, OutputError, UsageError, counted, listed
from paligemma.files import MAX_JSON_BYTES, names_in, parse_json_file, read_regular, staging_folder, stat_path
from paligemma.gpu import cuda_decoding, mps_workarounds, patch_product, split
from paligemma.gpu.capped_attention import use_capped_attention
from paligemma.gpu.graphs import use_graphs
from paligemma.layers import acceleration, float16, instruction_sets, quantization
from paligemma.machine import memory_errors
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
from paligemma.parameter_names import canonical_name

log = logging.getLogger(__name__)  # notes (info) and warnings; the program decides whether they are shown

MAX_LAYERS = 512  # the deepest real model has 46; a damaged config.json must not make us build a million layers
DTYPE_NAMES = {
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16,
    "fp32": torch.float32, "float32": torch.float32,
}  # fmt: skip

OUTPUT_MATRIX = "lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
POSITIONS = "vision_tower.vision_model.embeddings.position_embedding.weight"
PATCHES = "vision_tower.vision_model.embeddings.patch_embedding.weight"
DECODER_LAYER, TOWER_LAYER = "language_model.model.layers.", "vision_tower.vision_model.encoder.layers."
LAYERS = {  # names of tensors in a layer; group 1 is the number of the layer
    "text_config": re.compile(re.escape(DECODER_LAYER) + "([0-9]{1,4})[.]"),
    "vision_config": re.compile(re.escape(TOWER_LAYER) + "([0-9]{1,4})[.]"),
}
# Fields of config.json that follow from the shape of a tensor: (field, tensor, axis). config_values converts some.
SHAPE_FIELDS = (
    ("text_config.vocab_size", EMBEDDING, 0),
    ("text_config.hidden_size", EMBEDDING, 1),
    ("text_config.intermediate_size", f"{DECODER_LAYER}0.mlp.gate_proj.weight", 0),
    ("text_config.num_attention_heads", f"{DECODER_LAYER}0.self_attn.q_proj.weight", 0),
    ("text_config.num_key_value_heads", f"{DECODER_LAYER}0.self_attn.k_proj.weight", 0),
    ("vision_config.hidden_size", PATCHES, 0),
    ("vision_config.num_channels", PATCHES, 1),
    ("vision_config.patch_size", PATCHES, 2),
    ("vision_config.intermediate_size", f"{TOWER_LAYER}0.mlp.fc1.weight", 0),
    ("vision_config.image_size", POSITIONS, 0),
)
# Tensors that are skipped: the unused pooling head, and buffers that can be computed from config.json. Some programs write them.
HARMLESS = re.compile(
    r"vision_tower\.vision_model\.head\..*"
    r"|.*\.(position_ids|embed_scale|causal_mask|rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached))"
)


# Headers and config.json


def find_tensors(folder: Path, is_tied: bool = True) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by our parameter name, without those that match HARMLESS.

    Only headers are read, except if a tensor is stored twice: then the values of both copies are compared.

    Args:
        is_tied: tie_word_embeddings of config.json. If false, the files must hold both the embedding and the output matrix.
    Raises: CheckpointError for damaged files, for a tensor that is stored twice with different values, and for an output matrix
        that is not the embedding.
    """
    found: dict[str, StoredTensor] = {}
    files = find_files(folder)
    note_ignored(folder, files)
    for file in files:
        for tensor in read_header(file).values():
            name = canonical_name(tensor.name)
            if HARMLESS.fullmatch(name):
                continue
            if name in found:
                check_equal(found[name], tensor)
            found[name] = tensor
    if not is_tied and not found.keys() >= {OUTPUT_MATRIX, EMBEDDING}:
        text = f"{folder / CONFIG_NAME}: tie_word_embeddings is false, but the weights do not hold both {OUTPUT_MATRIX} and the"
        advice = "embedding. If both are the same matrix, delete tie_word_embeddings from config.json."
        raise CheckpointError(f"{text} {advice}", path=folder / CONFIG_NAME)
    if OUTPUT_MATRIX in found:
        output = found.pop(OUTPUT_MATRIX)
        if EMBEDDING in found and not is_equal(found[EMBEDDING], output):
            raise CheckpointError(
                f"{output.name} in {output.file} is not the embedding: this output matrix was trained on its own (untied), but "
                "PaliGemma uses one matrix for both. Train again without lm_head among the trained modules, or use transformers.",
                path=output.file,
            )
        found.setdefault(EMBEDDING, output)
    return found


def build_config(raw: dict, generation: dict, folder: Path, tensors: Callable[[], dict[str, StoredTensor]]) -> PaliGemmaConfig:
    """The configuration of a model.

    Missing fields get the defaults of transformers (see from_hf), with two exceptions: image_size is computed from the weights,
    and the tokens that end an answer are taken from generation_config.json if it names them (as in transformers), else from
    config.json.

    Args:
        raw, generation: content of config.json and of generation_config.json in `folder`.
        tensors: reads the headers of the weights; called only if image_size is missing.
    Raises: CheckpointError, with the file and the field.
    """
    file = folder / CONFIG_NAME
    try:
        tower = raw.get("vision_config")
        if isinstance(tower, dict) and tower.get("image_size") is None and has_weights(folder) and POSITIONS in tensors():
            raw = raw | {"vision_config": tower | {"image_size": image_size(tensors()[POSITIONS].shape[0], tower)}}
        config = PaliGemmaConfig.from_hf(raw)
        for part in ("vision_config", "text_config"):
            layers = getattr(config, part).num_hidden_layers
            if layers > MAX_LAYERS:
                raise ValueError(f"{part}.num_hidden_layers is {layers}; {MAX_LAYERS} is the limit.")
        # From here on, errors are about generation_config.json. `ends`: the tokens that end an answer.
        file, ends = folder / GENERATION_CONFIG_NAME, generation.get("eos_token_id")
        if ends in (None, []):
            return config
        return replace(config, eos_token_id=tuple(ends) if isinstance(ends, list) else ends)
    except ValueError as error:
        is_other = file.name == CONFIG_NAME and raw.get("model_type") != "paligemma"
        advice = "Give a PaliGemma model." if is_other else "Correct this file, or give another model."
        raise CheckpointError(f"{file}: {error} {advice}", path=file) from error


def image_size(num_positions: int, tower: dict) -> int:
    """The image size in pixels of a vision tower with this number of position embeddings. Raises: ValueError."""
    if math.isqrt(num_positions) ** 2 != num_positions:
        raise ValueError(f"the weights have {num_positions} position embeddings, which is not a square number of patches.")
    patch = tower.get("patch_size")
    return math.isqrt(num_positions) * (patch if type(patch) is int else SiglipVisionConfig.patch_size)


def check_names(model: nn.Module, raw: dict, stored: dict[str, StoredTensor], folder: Path) -> None:
    """Raises one CheckpointError that names missing and unexpected tensors and wrong shapes, with a hint at the usual cause.

    Args:
        raw: content of config.json; the hint says which fields are set in it.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected]
    wrong_dtype = [
        f"{tensor.name} has dtype {tensor.dtype}"
        for name, tensor in stored.items()
        if (tensor.dtype not in FLOATS if needs_floats(expected.get(name)) else DTYPES.get(tensor.dtype) != expected[name].dtype)
    ]
    if wrong_dtype:
        raise CheckpointError(
            f"{folder}: {counted(len(wrong_dtype), 'tensor')} of a wrong dtype: {listed(wrong_dtype)}. Is it a quantised "
            "checkpoint of another program? Use the unquantised checkpoint with --quantize int8.",
            path=folder,
        )
    shapes = [
        f"{name} has shape {list(stored[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    parts = [
        f"{len(names)} {what}: {listed(names)}."
        for what, names in (
            ("missing", missing), ("unexpected", [stored[name].name for name in unexpected]), ("with another shape", shapes),
        )
        if names
    ]  # fmt: skip
    if parts:
        hint = explain_misfit(model.config, raw, stored, unexpected)
        raise CheckpointError(f"{folder}: the weights do not fit config.json. {' '.join(parts)} {hint}", path=folder)


def needs_floats(expected: Tensor | None) -> bool:
    """Whether the file must hold floats for this tensor of the model; None = the model has no such tensor."""
    return expected is None or expected.is_floating_point()


def config_values(stored: dict[str, StoredTensor], config: PaliGemmaConfig) -> dict[str, int]:
    """Values of config.json's fields that follow from the names and shapes of the weights, by field."""
    found = {
        field: stored[name].shape[axis]
        for field, name, axis in SHAPE_FIELDS
        if name in stored and axis < len(stored[name].shape)
    }
    for part, layer in LAYERS.items():
        layers = {int(match[1]) for name in stored if (match := layer.match(name))}
        found |= {f"{part}.num_hidden_layers": max(layers) + 1} if layers else {}
    for field in ("num_attention_heads", "num_key_value_heads"):  # at this point the value is num_heads * head_dim
        heads, rest = divmod(found.pop(f"text_config.{field}", 0), config.text_config.head_dim)
        found |= {f"text_config.{field}": heads} if heads and not rest else {}
    patches = found.pop("vision_config.image_size", 0)  # at this point the value is the number of patches, not of pixels
    side = math.isqrt(patches) * config.vision_config.patch_size
    return found | ({"vision_config.image_size": side} if side and math.isqrt(patches) ** 2 == patches else {})


def explain_misfit(config: PaliGemmaConfig, raw: dict, stored: dict[str, StoredTensor], unexpected: list[str]) -> str:
    """The usual cause of weights that do not fit config.json, and what to do."""
    if any("lora_" in name or "base_layer" in name for name in unexpected):
        return "The weights contain an adapter that was not merged: merge it with PEFT (merge_and_unload) and save again."
    differences = []
    for field, found in config_values(stored, config).items():
        part, name = field.split(".")
        ours = getattr(getattr(config, part), name)
        if found != ours:
            is_absent = raw[part].get(name) is None
            origin = f"absent from config.json, so the default {ours} is used" if is_absent else f"{ours} in config.json"
            differences.append(f"{field} is {origin}, and the weights have {found}")
    what = f"{'; '.join(differences)}. " if differences else ""
    return f"{what}Take config.json and weights from the same model."


# The empty model, and filling it


class NoInit(TorchFunctionMode):
    """A context in which torch.nn.init does nothing.

    On the meta device torch.nn.init has nothing to fill, but its first call imports 800 modules (sympy among them), which takes
    1.8 s on two cores.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def empty_model(
    config: PaliGemmaConfig, final_softcap: str | None = "config", sliding_window: str | None = None
) -> PaliGemmaForConditionalGeneration:
    """The model on the meta device: it has every name and shape, and takes no memory."""
    with torch.device("meta"), NoInit():
        return PaliGemmaForConditionalGeneration(config, final_softcap=final_softcap, sliding_window=sliding_window)


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The torch dtype of a name. Raises UsageError for a dtype that the model cannot compute in."""
    if dtype is None or dtype in DTYPE_NAMES.values():
        return dtype
    if isinstance(dtype, str) and dtype in DTYPE_NAMES:
        return DTYPE_NAMES[dtype]
    raise UsageError(f"dtype is {dtype!r}. bf16, fp16 or fp32 is needed; without dtype, that of the file is used.")


def stored_dtype(stored: dict[str, StoredTensor]) -> torch.dtype:
    """The float dtype that most bytes of the files have."""
    count = Counter()
    for tensor in stored.values():
        if tensor.dtype in FLOATS:
            count[tensor.dtype] += tensor.num_bytes
    if len(count) > 1:
        log.info("the files mix %s.", ", ".join(sorted(count)))
    return DTYPES[max(count, key=count.get)] if count else torch.float32


def fill(
    model: nn.Module,
    stored: dict[str, StoredTensor],
    reader_of: Callable[[str], TensorReader],
    dtype: torch.dtype,
    quantised: Collection[str],
    kind: str | None,
    adapter: Adapter | None = None,
) -> None:
    """Loads the tensors of each module, merges the adapter, and replaces the modules that are to be quantised.

    The largest modules come first, because their full-precision copy should be made while little else is in memory.

    Args:
        reader_of: gives the reader for the name of a module; it reads onto the device of that module.
        quantised: names of the modules that are to be quantised.
        kind: "int8" or "int4"; None if no module is to be quantised.
    """
    scalings = {} if adapter is None else adapter.checked_scalings(model)
    sizes = {name: sum(tensor.numel() for tensor in own_tensors(module).values()) for name, module in model.named_modules()}
    for name in sorted((name for name in sizes if sizes[name]), key=lambda name: -sizes[name]):
        module, is_replaced, reader = model.get_submodule(name), name in quantised, reader_of(name)
        tensors = {
            key: reader.read(stored[f"{name}.{key}"], run_dtype(tensor, dtype), is_kept=not is_replaced)
            for key, tensor in own_tensors(module).items()
        }
        if name in scalings:
            tensors["weight"] = adapter.merged(name, tensors["weight"], scalings[name], reader)
        if is_replaced:
            module = quantization.quantize_module(module, kind, tensors)
            model.set_submodule(name, module)
            tensors.clear()  # frees the full-precision weight before the layout changes
        for key, tensor in tensors.items():
            own = getattr(module, key)
            setattr(module, key, nn.Parameter(tensor, own.requires_grad) if isinstance(own, nn.Parameter) else tensor)
        if isinstance(module, quantization.QuantizedLinear) and not module.packed.is_cpu:
            module.change_layout()  # now, while little is in memory, and not during the first prompt


# Saving and loading


def save_model(model: PaliGemmaForConditionalGeneration, folder: str | Path, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Writes config.json and safetensors in the layout of the hub. transformers reads it, too, unless the model is quantised.

    All files are written to a temporary folder, flushed to the disk and then renamed, so other programs see either the old or the
    new model. Tensors are written one by one, without a second copy in memory.

    Raises: OutputError if the folder cannot be written; the old files are then unchanged.
    """
    folder = Path(folder)
    if has_adapter(folder, OutputError):
        text = f"{folder} holds an adapter, which would be added to the weights again. Choose another folder."
        raise OutputError(text, path=folder)
    config = model.config.to_hf() | {"torch_dtype": str(model.dtype).removeprefix("torch.")}
    entry = quantization.config_entry(model)
    if entry is not None:
        config["quantization_config"] = entry
    with staging_folder(folder, "Free disk space, or choose another folder.") as temporary:
        write_shards(model.state_dict(), temporary, max_shard_bytes)
        (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        replace_files(temporary, folder)


def suit_device(model: PaliGemmaForConditionalGeneration, device: torch.device) -> None:
    """Replaces modules by those that compute faster, or without errors, on this kind of device. The order matters."""
    if device.type == "cuda":
        patch_product.use_product(model)
        # cuDNN would build a plan, which takes up to half a second, for each new shape of a batch. This setting applies to the
        # whole process, because torch has none for a single model.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if model.dtype == torch.float16:
        float16.protect(model)
    if device.type == "mps":
        mps_workarounds.work_around(model)
    if device.type == "cpu":
        acceleration.accelerate(model)
    if device.type == "cuda":
        cuda_decoding.use_cuda_modules(model)


class ModelFiles:
    """Finds the files of a model and reads their settings. Headers of weights are read on first use, tensors by `load`.

    Args:
        name: a folder or a hub id, of a model or of a LoRA adapter. Hub ids are downloaded; the base of an adapter is found, too.
        revision: branch, tag or commit of a hub id, such as "bfloat16".
        base_model: folder or hub id of an adapter's base model, in place of the one that the adapter names.
    Attributes:
        folder: the folder of the model or adapter that is called `name`.
        base: the folder with config.json, tokenizer and weights. It differs from `folder` only for an adapter.
        raw, generation, adapter_config: content of config.json, of generation_config.json ({} if there is none) and of
            adapter_config.json (None if there is none).
        ahead: whoever has begun to read the weights ahead may set this, see read_ahead.py; the first `load` uses it.
    Raises: CheckpointError, AccessError or UsageError.
    """

    def __init__(self, name: str | Path, revision: str | None = None, base_model: str | Path | None = None):
        self.ahead: ReadAhead | None = None
        self.contents: dict[Path, bytes] = {}
        self.folder = resolve(name, revision)
        self.adapter_config = self.read(self.folder / ADAPTER_CONFIG_NAME) if has_adapter(self.folder) else None
        self.base = find_base(self.folder, self.adapter_config, base_model)
        self.raw = self.read(self.base / CONFIG_NAME)
        generation = self.base / GENERATION_CONFIG_NAME
        is_there = stat_path(generation) is not None or generation.is_symlink()
        self.generation = self.read(generation) if is_there else {}

    def read(self, file: Path) -> dict:
        """The object in a JSON file, whose content is kept for the fingerprint."""
        self.contents[file] = read_regular(file, MAX_JSON_BYTES)
        return parse_json_file(self.contents[file], file)

    @cached_property
    def config(self) -> PaliGemmaConfig:
        """The configuration of the model, see build_config."""
        return build_config(self.raw, self.generation, self.base, lambda: self.tensors)

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """The positions of the weights in the files, see find_tensors."""
        return find_tensors(self.base, is_tied=self.raw.get("tie_word_embeddings") is not False)

    @cached_property
    def fingerprint(self) -> str:
        """A hash that changes when the files change, see safetensors_files.fingerprint."""
        return fingerprint((self.base, self.folder), self.contents)

    @property
    def files(self) -> list[tuple[str, Path]]:
        """Pairs of a description and a path, for files.check_outputs: the files of the model, which no output may overwrite."""
        folders = dict.fromkeys((self.folder, self.base))
        # An error message then reads: --output FILE would overwrite a file of the model, FILE.
        return [("a file of the model,", folder / name) for folder in folders for name in names_in(folder)]

    @property
    def stored_kind(self) -> str | None:
        """"int8" or "int4" if the files hold quantised weights. Raises: CheckpointError for formats of other programs."""
        return quantization.choose(self.raw, self.base, None, False).kind

    def load(
        self,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        quantize: str | None = None,
        quantize_vision: bool = False,
        graphs: str | None = None,
        final_softcap: str | None = "config",
        sliding_window: str | None = None,
        allow_nonfinite: bool = False,
    ) -> PaliGemmaForConditionalGeneration:
        """The model in eval mode, with the adapter merged into it if there is one. Arguments and errors: see load_model."""
        named, dtype, mode, folder = find_devices(device), parse_dtype(dtype), graphs_mode(graphs), self.base
        instruction_sets.allowed()
        with memory_errors(f"loading {folder}"):
            adapter = None if self.adapter_config is None else read_adapter(self.folder, self.adapter_config)
            kind, with_vision, is_stored = quantization.choose(self.raw, folder, quantize, quantize_vision)
            stored = self.tensors  # read before config: if both are faulty, the error about the weights is the more helpful one
            if adapter is not None and is_stored:
                text = f"{folder} is stored as {kind}, and an adapter can only be merged into unquantised weights."
                raise CheckpointError(f"{text} Give the unquantised checkpoint as --base_model.", path=adapter.folder)
            # stored_dtype() would be wrong for a quantised checkpoint, which has few float tensors.
            as_stored = DTYPE_NAMES.get(str(self.raw.get("torch_dtype"))) if is_stored else None
            model = empty_model(self.config, final_softcap, sliding_window)
            names = quantization.targets(model, vision=with_vision) if kind else ()

            def sizes_in(dtype: torch.dtype) -> tuple[dict[str, nn.Module], dict[str, int], int]:
                """The quantised modules by name, the bytes of all modules by name, and the bytes that an answer needs."""
                modules = {name: quantization.empty_module(model.get_submodule(name), kind, dtype) for name in names}
                room = 0 if named[0].type == "cpu" else room_to_answer(self.config, modules.values(), dtype)
                return modules, module_bytes(model, modules, dtype, named[0].type != "cpu"), room

            def need(dtype: torch.dtype) -> int:
                _, sizes, room = sizes_in(dtype)
                return sum(sizes.values()) + room * len(named)

            dtype = choose_dtype(dtype, as_stored or stored_dtype(stored), named, need)
            quantised, sizes, room = sizes_in(dtype)
            if is_stored:
                for name in list(quantised):
                    model.set_submodule(name, quantised.pop(name))
            check_names(model, self.raw, stored, folder)
            spare = [torch.device("cuda", card) for card in usable_cards()] if device == "auto" else []
            placement = split.place(sizes, named, spare, room)
            ahead, self.ahead = self.ahead, None
            if ahead is None or not ahead.is_current():
                ahead = ReadAhead({})
            readers = {own: TensorReader(own, allow_nonfinite, ahead) for own in placement.devices}
            fill(model, stored, lambda name: readers[placement.device(name)], dtype, quantised, kind, adapter)
            ahead.wait()
            suit_device(model, named[0])
            if len(placement.devices) > 1:  # a graph records the kernels of one card only
                model = split.use_cards(model, placement)
                if mode != "off":
                    use_capped_attention(model)
            else:
                model = use_graphs(model, mode)
        return model.eval()


def load_model(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    base_model: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    quantize_vision: bool = False,
    graphs: str | None = None,
    final_softcap: str | None = "config",
    sliding_window: str | None = None,
    allow_nonfinite: bool = False,
) -> PaliGemmaForConditionalGeneration:
    """The model of a checkpoint, in eval mode. It needs config.json and the weights, but no tokenizer.

    Args:
        path_or_hub_id: a folder, or a hub id, which is downloaded. It may hold a model or a LoRA adapter. For an adapter its base
            model is loaded and the adapter is merged into it. If a folder holds both, both are used, as in transformers.
        revision: branch, tag or commit of a hub id, such as "bfloat16".
        base_model: folder or hub id of an adapter's base, in place of the one that the adapter names.
        device: see devices.find_devices. A model that is too large for the card that "auto" takes is divided among several.
        dtype: "bf16", "fp16", "fp32" or the torch dtype; None = as stored on a CPU, see devices.dtypes_to_try for other devices.
        quantize: "int8" or "int4" quantises the decoder while it is loaded; not needed for a checkpoint that was saved quantised.
        quantize_vision: quantise the vision tower, too.
        graphs: how decoding steps run on CUDA, see devices.graphs_mode.
        final_softcap, sliding_window: see PaliGemmaForConditionalGeneration.
        allow_nonfinite: load even if weights are NaN or infinite.
    Raises: CheckpointError, AccessError, DeviceError or UsageError. Where possible, checks run before memory is allocated.
    """
    for check, value in ((find_devices, device), (parse_dtype, dtype), (graphs_mode, graphs)):
        check(value)  # before anything is downloaded
    return ModelFiles(path_or_hub_id, revision, base_model).load(
        device=device,
        dtype=dtype,
        quantize=quantize,
        quantize_vision=quantize_vision,
        graphs=graphs,
        final_softcap=final_softcap,
        sliding_window=sliding_window,
        allow_nonfinite=allow_nonfinite,
    )
