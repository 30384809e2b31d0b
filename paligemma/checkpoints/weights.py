"""Folder or hub id in, model out; and back. The only file that knows how files become models.

Nothing is loaded before all of it is known to fit: the headers of the files (names, dtypes, shapes) are compared with the
model that config.json describes, which is built without memory (torch's "meta" device). Then the tensors come in, one at a
time: mapped, where a file holds them in the wanted dtype; through a small buffer, where it does not or where the model lives
on another device; quantised, where that is asked for. So there are never two copies of the weights. A folder that holds a LoRA
adapter names its base model; its products are added to the base's matrices on the same way.

A mapped file must not change while the model lives: if another program shortens it, the system ends this one (SIGBUS).
`save_model` never writes into a file that exists, it replaces it; a model keeps the one that it was loaded from.

Checked in tests/checkpoints/test_weights.py.
"""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from paligemma.checkpoints.hub import find_base, resolve
from paligemma.checkpoints.safetensors_files import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    CONFIG_NAME,
    DTYPES,
    FLOATS,
    GENERATION_CONFIG_NAME,
    StoredTensor,
    canonical_name,
    check_equal,
    explain_no_adapter,
    find_files,
    fingerprint,
    has_adapter,
    has_weights,
    is_equal,
    read_header,
    read_parts,
    replace_files,
    write_shards,
    write_tensors,
)
from paligemma.configuration import PaliGemmaConfig, SiglipVisionConfig
from paligemma.errors import CheckpointError, OutputError, UsageError, listed
from paligemma.files import (
    MAX_JSON_BYTES,
    move_into_place,
    names_in,
    parse_json_file,
    read_regular,
    staging_folder,
    stat_path,
    sync_folder,
)
from paligemma.layers import graphs, lora, quantization
from paligemma.machine import find_device, memory_errors, require_memory
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration

log = logging.getLogger(__name__)  # notes (info) and warnings: a program decides whether they are seen

MOST_LAYERS = 512  # the deepest real model has 46; a damaged config.json must not make us build a million
DTYPE_NAMES = {
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16,
    "fp32": torch.float32, "float32": torch.float32,
}  # fmt: skip

OUTPUT_MATRIX = "lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
POSITIONS = "vision_tower.vision_model.embeddings.position_embedding.weight"
PATCHES = "vision_tower.vision_model.embeddings.patch_embedding.weight"
DECODER_LAYER, TOWER_LAYER = "language_model.model.layers.", "vision_tower.vision_model.encoder.layers."
LAYERS = {  # how many there are shows in the names
    "text_config": re.compile(re.escape(DECODER_LAYER) + "([0-9]{1,4})[.]"),
    "vision_config": re.compile(re.escape(TOWER_LAYER) + "([0-9]{1,4})[.]"),
}
SHAPE_FIELDS = (  # the fields of config.json that shapes prove: which axis of which tensor
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
# The unused pooling head, and buffers that follow from config.json, which some programs and older versions write.
HARMLESS = re.compile(
    r"vision_tower\.vision_model\.head\..*"
    r"|.*\.(position_ids|embed_scale|causal_mask|rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached))"
)
QUANTIZATION_KEYS = ("quantization_config", "quantization", "compression_config")  # of transformers, MLX, compressed-tensors


def find_tensors(folder: Path, is_tied: bool = True) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint under our name, harmless extras dropped. Reads headers only, but for what is there twice.

    Args:
        is_tied: what config.json says; where it says no, the files must hold the embedding and the output matrix, too.
    Raises: CheckpointError for damaged files, for a tensor that is there twice with different values, and for an output matrix
        that is not the embedding.
    """
    found: dict[str, StoredTensor] = {}
    for file in find_files(folder):
        for tensor in read_header(file).values():
            name = canonical_name(tensor.name)
            if HARMLESS.fullmatch(name):
                continue
            if name in found:
                check_equal(found[name], tensor)
            found[name] = tensor
    if not is_tied and not found.keys() >= {OUTPUT_MATRIX, EMBEDDING}:
        text = f"{folder / CONFIG_NAME}: tie_word_embeddings is false, and the weights do not hold {OUTPUT_MATRIX} beside the"
        raise CheckpointError(f"{text} embedding. If both are one matrix, delete the entry.", path=folder / CONFIG_NAME)
    if OUTPUT_MATRIX in found:
        output = found.pop(OUTPUT_MATRIX)
        if EMBEDDING in found and not is_equal(found[EMBEDDING], output):
            raise CheckpointError(
                f"{output.name} in {output.file} is not the embedding: this output matrix was trained on its own (untied), and a "
                "PaliGemma has one matrix for both. Train again without lm_head among the trained modules, or use transformers.",
                path=output.file,
            )
        found.setdefault(EMBEDDING, output)
    return found


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter in a folder: what it asks for, and where each A and B lies, under our names. Nothing is loaded yet."""

    folder: Path
    config: lora.LoraConfig
    stored: dict[str, StoredTensor]

    def check(self, model: nn.Module) -> dict[str, float]:
        """The modules that it changes, each with the factor on its product.

        Raises: CheckpointError unless every tensor belongs to a matrix of this model.
        """
        try:
            shapes = {name: tensor.shape for name, tensor in self.stored.items()}
            bases = {f"{name}.weight": tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
            scalings = {name: self.config.scaling(name) for name in lora.modules_of(shapes, self.config, bases)}
            unused = self.config.unused_keys(scalings)
        except ValueError as error:
            text = f"{self.folder} does not fit its base model: {error} Name the right base."
            raise CheckpointError(text, path=self.folder) from error
        if unused:
            log.warning("%s: its patterns %s match no module that it changes.", self.folder / ADAPTER_CONFIG_NAME, listed(unused))
        return scalings

    def merged(self, name: str, weight: Tensor, scaling: float, reader: "TensorReader") -> Tensor:
        """The matrix of that module with its product added."""
        a, b = (reader.read(self.stored[f"{name}.{matrix}.weight"], torch.float32) for matrix in ("lora_A", "lora_B"))
        merged = lora.merged_weight(weight, a, b, scaling)
        if not reader.allow_nonfinite:
            check_values(merged, replace(self.stored[f"{name}.lora_B.weight"], name=f"the sum of the base's {name} and B A"))
        return merged


def read_adapter(folder: Path, raw: dict) -> Adapter:
    """The adapter in a folder. Raises: CheckpointError for one that cannot be used.

    Args:
        raw: content of adapter_config.json.
    """
    file = folder / ADAPTER_CONFIG_NAME
    try:
        config = lora.LoraConfig.from_peft(raw)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error} Or merge the adapter with the program that made it.", path=file) from error
    if stat_path(folder / ADAPTER_NAME) is None and not (folder / ADAPTER_NAME).is_symlink():
        raise CheckpointError(explain_no_adapter(folder), path=folder / ADAPTER_NAME)
    stored: dict[str, StoredTensor] = {}
    for tensor in read_header(folder / ADAPTER_NAME).values():
        name = canonical_name(tensor.name)
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"{tensor.file}: {tensor.name} is {tensor.dtype}; floats are needed.", path=tensor.file)
        if name in stored:
            check_equal(stored[name], tensor)
        stored[name] = tensor
    if others := [tensor.name for name, tensor in stored.items() if lora.OTHER_MODULES & {*name.split(".")}]:
        text = f"{folder / ADAPTER_NAME} holds {listed(others)}, and here an adapter changes matrices of layers only."
        text += " Train it without them, or merge it with the program that made it."
        raise CheckpointError(text, path=folder / ADAPTER_NAME)
    return Adapter(folder, config, stored)


def build_config(raw: dict, generation: dict, folder: Path, tensors: Callable[[], dict[str, StoredTensor]]) -> PaliGemmaConfig:
    """The configuration of a model.

    Missing fields get the defaults of transformers (see from_hf), with two exceptions: image_size comes from the weights, and
    generation_config.json is asked first for the tokens that end an answer (as in transformers).

    Args:
        raw, generation: content of config.json and of generation_config.json in `folder`.
        tensors: reads the headers of the weights; called only if image_size is missing.
    Raises: CheckpointError, with the file and the field.
    """
    file = folder / CONFIG_NAME
    try:
        tower = raw.get("vision_config")
        if isinstance(tower, dict) and tower.get("image_size") is None and has_weights(folder) and POSITIONS in tensors():
            raw = raw | {"vision_config": tower | {"image_size": picture_side(tensors()[POSITIONS].shape[0], tower)}}
        config = PaliGemmaConfig.from_hf(raw)
        for part in ("vision_config", "text_config"):
            layers = getattr(config, part).num_hidden_layers
            if layers > MOST_LAYERS:
                raise ValueError(f"{part}.num_hidden_layers is {layers}; at most {MOST_LAYERS} make sense.")
        file, ends = folder / GENERATION_CONFIG_NAME, generation.get("eos_token_id")
        if ends in (None, []):
            return config
        return replace(config, eos_token_id=tuple(ends) if isinstance(ends, list) else ends)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}", path=file) from error


def picture_side(rows: int, tower: dict) -> int:
    """Pixels of a side of the pictures that a tower with so many position embeddings takes."""
    if math.isqrt(rows) ** 2 != rows:
        raise ValueError(f"the weights have {rows} position embeddings, which is not a square number of patches.")
    patch = tower.get("patch_size")
    return math.isqrt(rows) * (patch if type(patch) is int else SiglipVisionConfig.patch_size)


def check_names(model: nn.Module, raw: dict, stored: dict[str, StoredTensor], folder: Path) -> None:
    """Raises one CheckpointError that names what is missing, unexpected or misshapen, with a hint at the usual cause.

    Args:
        raw: config.json, to tell what it says from what it leaves out.
    """
    expected = model.state_dict()
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected]
    of_another_kind = [
        f"{tensor.name} is {tensor.dtype}"
        for name, tensor in stored.items()
        if (tensor.dtype not in FLOATS if is_float(expected.get(name)) else DTYPES.get(tensor.dtype) != expected[name].dtype)
    ]
    if of_another_kind:
        raise CheckpointError(
            f"{folder}: {len(of_another_kind)} tensors are no float numbers: {listed(of_another_kind)}. Is it a quantised "
            "checkpoint of another program? Take the plain one and --quantize int8.",
            path=folder,
        )
    shapes = [
        f"{name} is {list(stored[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    parts = [
        f"{len(names)} {what}: {listed(names)}."
        for what, names in (
            ("missing", missing), ("unexpected", [stored[name].name for name in unexpected]), ("of another shape", shapes),
        )
        if names
    ]  # fmt: skip
    if parts:
        hint = explain_misfit(model.config, raw, stored, unexpected)
        raise CheckpointError(f"{folder}: the weights do not fit config.json. {' '.join(parts)} {hint}", path=folder)


def is_float(expected: Tensor | None) -> bool:
    """Whether floats are expected: of the model's own tensor, or of one that only the file has (None)."""
    return expected is None or expected.is_floating_point()


def numbers_of_weights(stored: dict[str, StoredTensor], config: PaliGemmaConfig) -> dict[str, int]:
    """What the names and shapes of the weights say of the fields of config.json, by field."""
    found = {
        field: stored[name].shape[axis]
        for field, name, axis in SHAPE_FIELDS
        if name in stored and axis < len(stored[name].shape)
    }
    for part, layer in LAYERS.items():
        layers = {int(match[1]) for name in stored if (match := layer.match(name))}
        found |= {f"{part}.num_hidden_layers": max(layers) + 1} if layers else {}
    for field in ("num_attention_heads", "num_key_value_heads"):  # here still heads times the width of one
        heads, rest = divmod(found.pop(f"text_config.{field}", 0), config.text_config.head_dim)
        found |= {f"text_config.{field}": heads} if heads and not rest else {}
    rows = found.pop("vision_config.image_size", 0)  # here still patches
    side = math.isqrt(rows) * config.vision_config.patch_size
    return found | ({"vision_config.image_size": side} if side and math.isqrt(rows) ** 2 == rows else {})


def explain_misfit(config: PaliGemmaConfig, raw: dict, stored: dict[str, StoredTensor], unexpected: list[str]) -> str:
    """The usual cause of weights that do not fit, and what to do."""
    if any("lora_" in name or "base_layer" in name for name in unexpected):
        return "There is an adapter in them that was not merged: merge it with PEFT (merge_and_unload) and save again."
    differences = []
    for field, found in numbers_of_weights(stored, config).items():
        part, name = field.split(".")
        ours = getattr(getattr(config, part), name)
        if found != ours:
            is_absent = raw[part].get(name) is None
            origin = f"absent, so its class's default {ours} was taken" if is_absent else f"{ours} in config.json"
            differences.append(f"{field} is {origin}, and the weights have {found}")
    what = "; ".join(differences)
    return f"{what}{': t' if what else 'T'}ake config.json and weights from the same model."


def stored_dtype(stored: dict[str, StoredTensor]) -> torch.dtype:
    """The float dtype that most bytes of the files have."""
    count = Counter()
    for tensor in stored.values():
        if tensor.dtype in FLOATS:
            count[tensor.dtype] += tensor.num_bytes
    if len(count) > 1:
        log.info("the files mix %s.", ", ".join(sorted(count)))
    return DTYPES[max(count, key=count.get)] if count else torch.float32


class NoInit(TorchFunctionMode):
    """Inside, torch.nn.init does nothing.

    On the meta device it has nothing to fill, yet its first call imports 800 modules (sympy among them), 1.8 s on two cores.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class TensorReader:
    """Brings stored tensors into memory, one at a time, and looks at every value.

    Args:
        device: where they go.
        allow_nonfinite: take NaN and infinity for values like any other.
    """

    def __init__(self, device: torch.device, allow_nonfinite: bool):
        self.device = device
        self.allow_nonfinite = allow_nonfinite
        self.mapped: dict[Path, safe_open] = {}

    def read(self, tensor: StoredTensor, dtype: torch.dtype, is_kept: bool = True) -> Tensor:
        """The tensor in `dtype` on the device.

        In main memory and in the file's own dtype it is a view of the mapped file, unless it is not kept: what is mapped counts
        as this process's memory until the whole file is let go. All else goes through a small buffer.
        """
        if dtype.is_floating_point and tensor.dtype not in FLOATS:
            text = f"{tensor.file}: {tensor.name} is {tensor.dtype}, and floats are needed. Take the plain one, not quantised."
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
        for part in read_parts(tensor, pin=self.device.type == "cuda"):
            flat[start : start + len(part)].copy_(part)
            start += len(part)
        return target


def check_values(x: Tensor, tensor: StoredTensor) -> None:
    """Raises CheckpointError for NaN and infinity, and warns of a matrix that holds one number only; at the speed of memory.

    A product with a vector of ones reads a matrix once, with every vector unit that the machine has, and each NaN and infinity
    shows in its row's sum: in bfloat16 twice as fast as min and max. Only where the sums are suspicious, min and max decide.
    """
    if x.numel() == 0:
        return
    if x.dim() == 2:
        sums = torch.mv(x, torch.ones(x.shape[1], dtype=x.dtype, device=x.device))  # [rows]
        low, high = torch.stack(torch.aminmax(sums)).tolist()
        if math.isfinite(low) and math.isfinite(high) and low != high:
            return
    low, high = torch.stack(torch.aminmax(x)).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CheckpointError(
            f"{tensor.file}: {tensor.name} holds NaN or infinity as {str(x.dtype).removeprefix('torch.')}. Download it again; "
            "fp16 cannot hold numbers above 65504, bf16 can; --allow_nonfinite loads it all the same.",
            path=tensor.file,
        )
    if low == high and x.dim() == 2 and x.numel() > 1:
        log.warning("%s: every value of %s is %g.", tensor.file, tensor.name, low)


def empty_model(
    config: PaliGemmaConfig, final_softcap: str | None = "config", sliding_window: str | None = None
) -> PaliGemmaForConditionalGeneration:
    """The model on the meta device: every name and shape, no memory."""
    with torch.device("meta"), NoInit():
        return PaliGemmaForConditionalGeneration(config, final_softcap=final_softcap, sliding_window=sliding_window)


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The torch dtype of a name. Raises UsageError for one that the model cannot compute in."""
    if dtype is None or dtype in DTYPE_NAMES.values():
        return dtype
    if isinstance(dtype, str) and dtype in DTYPE_NAMES:
        return DTYPE_NAMES[dtype]
    raise UsageError(f"dtype is {dtype!r}. bf16, fp16 or fp32 is needed; leave it out for that of the file.")


def all_parts(raw: dict) -> list[dict]:
    """config.json and the sub-configs in it."""
    return [part for part in (raw, raw.get("text_config"), raw.get("vision_config")) if isinstance(part, dict)]


def choose_quantization(raw: dict, folder: Path, quantize: str | None, with_vision: bool) -> tuple[str | None, bool, bool]:
    """What of the model is quantised: (kind or None, the tower too?, is it stored so?).

    Raises: CheckpointError for the formats of other programs, UsageError for a kind that there is not or that contradicts the
    file.
    """
    if quantize is not None and quantize not in quantization.KINDS:
        raise UsageError(f"quantize is {quantize!r}. {' or '.join(quantization.KINDS)} is needed.")
    entries = {key: part[key] for part in all_parts(raw) for key in QUANTIZATION_KEYS if part.get(key)}
    if not entries:
        return quantize, with_vision, False
    entry = raw.get("quantization_config")
    names = (entry.get("format"), entry.get("quant_method")) if isinstance(entry, dict) else ()  # older folders have the second
    if len(entries) > 1 or quantization.FORMAT not in names:
        key, entry = next(iter(entries.items()))
        method = entry.get("quant_method", entry.get("format")) if isinstance(entry, dict) else entry
        text = f"{folder} is quantised by another program ({key} in config.json{f': {method!r:.60}' if method else ''})."
        raise CheckpointError(f"{text} Take the plain checkpoint and --quantize int8.", path=folder)
    kind = entry.get("kind")
    if kind not in quantization.KINDS or entry.get("layout") != quantization.LAYOUT:
        known = f"{', '.join(quantization.KINDS)} in layout {quantization.LAYOUT}"
        raise CheckpointError(
            f"{folder} is quantised as {entry}, and this version reads {known}. Quantise it again.", path=folder
        )
    if quantize not in (None, kind):
        raise UsageError(f"{folder} is stored as {kind} and cannot become {quantize}. Take the plain checkpoint.")
    return kind, entry.get("vision") is True, True


def describe_quantization(model: nn.Module) -> dict | None:
    """The entry of config.json from which choose_quantization knows how this model is stored; None for a plain one."""
    kinds = {name: module.kind for name, module in model.named_modules() if isinstance(module, quantization.QuantizedLinear)}
    if not kinds:
        return None
    (kind,) = set(kinds.values())
    has_vision = any(name.startswith("vision_tower.") for name in kinds)
    return {"format": quantization.FORMAT, "kind": kind, "layout": quantization.LAYOUT, "vision": has_vision}


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module itself, not of those in it."""
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))


def run_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Parameters take the model's dtype; a quantised module's numbers (buffers) keep theirs."""
    return dtype if isinstance(tensor, nn.Parameter) else tensor.dtype


def num_bytes(model: nn.Module, quantised: dict[str, nn.Module], dtype: torch.dtype) -> int:
    """Bytes of the model when it is filled, with some modules replaced."""
    modules = [quantised.get(name, module) for name, module in model.named_modules()]
    tensors = [tensor for module in modules for tensor in own_tensors(module).values()]
    return sum(tensor.numel() * run_dtype(tensor, dtype).itemsize for tensor in tensors)


def fill(
    model: nn.Module,
    stored: dict[str, StoredTensor],
    reader: TensorReader,
    dtype: torch.dtype,
    quantised: Collection[str],
    kind: str | None,
    adapter: Adapter | None = None,
) -> None:
    """Gives every module its tensors, an adapter's products added; those to be quantised are replaced one by one.

    The largest come first, so that their full-precision copy is made while there is little else in memory.
    """
    scalings = {} if adapter is None else adapter.check(model)
    sizes = {name: sum(tensor.numel() for tensor in own_tensors(module).values()) for name, module in model.named_modules()}
    for name in sorted((name for name in sizes if sizes[name]), key=lambda name: -sizes[name]):
        module, is_replaced = model.get_submodule(name), name in quantised
        tensors = {
            key: reader.read(stored[f"{name}.{key}"], run_dtype(tensor, dtype), is_kept=not is_replaced)
            for key, tensor in own_tensors(module).items()
        }
        if name in scalings:
            tensors["weight"] = adapter.merged(name, tensors["weight"], scalings[name], reader)
        if is_replaced:
            model.set_submodule(name, quantization.quantize_module(module, kind, tensors))
            continue
        for key, tensor in tensors.items():
            own = getattr(module, key)
            setattr(module, key, nn.Parameter(tensor, own.requires_grad) if isinstance(own, nn.Parameter) else tensor)


def save_model(model: PaliGemmaForConditionalGeneration, folder: str | Path, *, max_shard_bytes: int = 5 * 10**9) -> None:
    """Writes config.json and safetensors in the hub's layout, which transformers reads, too (a quantised model only this code).

    Everything is written beside what is there, reaches the disk, and is then renamed into place: whoever reads the folder
    meanwhile sees the old model or the new one. Tensors go out one by one, without a second copy.

    Raises: OutputError when the folder cannot be written; it is then as it was.
    """
    folder = Path(folder)
    if has_adapter(folder, OutputError):
        text = f"{folder} holds an adapter, which would be added to the weights again. Choose another folder."
        raise OutputError(text, path=folder)
    config = model.config.to_hf() | {"torch_dtype": str(model.dtype).removeprefix("torch.")}
    entry = describe_quantization(model)
    if entry is not None:
        config["quantization_config"] = entry
    with staging_folder(folder, "Make room, or choose another.") as temporary:
        write_shards(model.state_dict(), temporary, max_shard_bytes)
        (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        replace_files(temporary, folder)


def save_adapter(
    state: dict[str, Tensor], config: lora.LoraConfig, folder: str | Path, base: str | None, revision: str | None = None
) -> None:
    """Writes an adapter as PEFT does: a few MB. load_model reads it, PEFT too.

    Args:
        state: from lora.adapter_state.
        base: folder or hub id of the model that was adapted.
        revision: branch, tag or commit of the hub id.
    Raises: OutputError when the folder cannot be written; it is then as it was.
    """
    folder = Path(folder)
    if has_weights(folder, OutputError):
        raise OutputError(f"{folder} holds a whole model, to which the adapter would belong. Choose another.", path=folder)
    names = dict.fromkeys(name.rsplit(".", 2)[0] for name in state)
    tensors = {f"base_model.model.{lora.their_name(name)}": tensor for name, tensor in state.items()}
    settings = json.dumps(config.to_peft(base, names, revision), indent=2) + "\n"
    with staging_folder(folder, "Make room, or choose another.") as temporary:
        write_tensors(temporary / ADAPTER_NAME, tensors)
        (temporary / ADAPTER_CONFIG_NAME).write_text(settings, encoding="utf-8")
        sync_folder(temporary)
        for name in (ADAPTER_NAME, ADAPTER_CONFIG_NAME):
            move_into_place(temporary / name, folder / name)


class ModelFiles:
    """The files of a model, found, and their settings. Headers of weights are read on first use, tensors by `load`.

    Args:
        name: a folder or a hub id, which is downloaded; of a model or of a LoRA adapter, whose base model is found as well.
        revision: branch, tag or commit of a hub id, such as "bfloat16".
        base_model: folder or hub id of an adapter's base, in place of the one that the adapter names.
    Attributes:
        folder: what the name means.
        base: the folder with config.json, tokenizer and weights. It differs from `folder` only for an adapter.
        raw, generation, adapter_config: content of config.json, of generation_config.json ({} if there is none) and of
            adapter_config.json (None if there is none).
    Raises: CheckpointError, AccessError, UsageError, each with one sentence.
    """

    def __init__(self, name: str | Path, revision: str | None = None, base_model: str | Path | None = None):
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
        """The headers of the weights, see find_tensors."""
        return find_tensors(self.base, is_tied=self.raw.get("tie_word_embeddings") is not False)

    @cached_property
    def fingerprint(self) -> str:
        """A hash that changes when the files change, see safetensors_files.fingerprint."""
        return fingerprint((self.base, self.folder), self.contents)

    @property
    def files(self) -> list[tuple[str, Path]]:
        """The model's files, which no output may overwrite, as files.check_outputs takes them."""
        folders = dict.fromkeys((self.folder, self.base))
        return [("a file of the model,", folder / name) for folder in folders for name in names_in(folder)]

    @property
    def stored_kind(self) -> str | None:
        """"int8" or "int4" if the files hold quantised weights. Raises: CheckpointError for formats of other programs."""
        return choose_quantization(self.raw, self.base, None, False)[0]

    def load(
        self,
        *,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        quantize: str | None = None,
        quantize_vision: bool = False,
        final_softcap: str | None = "config",
        sliding_window: str | None = None,
        allow_nonfinite: bool = False,
    ) -> PaliGemmaForConditionalGeneration:
        """The model in eval mode, an adapter merged into it. Arguments and errors: see load_model."""
        device, dtype, folder = find_device(device), parse_dtype(dtype), self.base
        adapter = None if self.adapter_config is None else read_adapter(self.folder, self.adapter_config)
        kind, with_vision, is_stored = choose_quantization(self.raw, folder, quantize, quantize_vision)
        stored = self.tensors  # before config: what a folder without weights is, is worth more than a fault in its config.json
        if adapter is not None and is_stored:
            text = f"{folder} is stored as {kind}, and an adapter is merged into unquantised weights only."
            raise CheckpointError(f"{text} Name the plain checkpoint as --base_model.", path=adapter.folder)
        # stored_dtype() would be wrong for a quantised checkpoint, which has few float tensors.
        as_stored = DTYPE_NAMES.get(str(self.raw.get("torch_dtype"))) if is_stored else None
        dtype = dtype or as_stored or stored_dtype(stored)
        model = empty_model(self.config, final_softcap, sliding_window)
        quantised = {
            name: quantization.empty_module(model.get_submodule(name), kind, dtype)
            for name in (quantization.targets(model, vision=with_vision) if kind else ())
        }
        if is_stored:
            for name in list(quantised):
                model.set_submodule(name, quantised.pop(name))
        check_names(model, self.raw, stored, folder)
        require_memory(num_bytes(model, quantised, dtype), device)
        with memory_errors(f"loading {folder}"):
            fill(model, stored, TensorReader(device, allow_nonfinite), dtype, quantised, kind, adapter)
        if device.type == "cpu":
            quantization.use_fast_products(model)
        if device.type == "cuda":
            model = graphs.use_graphs(model)
        return model.eval()


def load_model(
    name: str | Path,
    *,
    revision: str | None = None,
    base_model: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    quantize_vision: bool = False,
    final_softcap: str | None = "config",
    sliding_window: str | None = None,
    allow_nonfinite: bool = False,
) -> PaliGemmaForConditionalGeneration:
    """The model of a checkpoint, in eval mode. Needs config.json and the weights; no tokenizer.

    Args:
        name: a folder, or a hub id, which is downloaded. It may hold a model or a LoRA adapter; for an adapter its base model is
            loaded and the adapter is merged into it. If a folder holds both, both are used, as in transformers.
        revision: branch, tag or commit of a hub id, such as "bfloat16".
        base_model: folder or hub id of an adapter's base, in place of the one that the adapter names.
        device: see machine.find_device.
        dtype: "bf16", "fp16", "fp32" or the torch dtype; None = as stored.
        quantize: "int8" or "int4" quantises the decoder while it is loaded; not needed for a checkpoint that was saved quantised.
        quantize_vision: quantise the vision tower, too.
        final_softcap, sliding_window: see PaliGemmaForConditionalGeneration.
        allow_nonfinite: load even if weights are NaN or infinite.
    Raises: CheckpointError, AccessError, DeviceError, UsageError, each with one sentence. Where possible, checks run before
        memory is allocated.
    """
    device, dtype = find_device(device), parse_dtype(dtype)  # before anything is downloaded
    return ModelFiles(name, revision, base_model).load(
        device=device,
        dtype=dtype,
        quantize=quantize,
        quantize_vision=quantize_vision,
        final_softcap=final_softcap,
        sliding_window=sliding_window,
        allow_nonfinite=allow_nonfinite,
    )
