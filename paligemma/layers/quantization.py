"""int8 and int4 weights in a model: which modules are quantised, what replaces them, and the entry in config.json.

Decoding reads every weight once per token, so its time is the bytes of the weights divided by the memory bandwidth; int8 halves
the bytes of bfloat16, int4 takes 28 percent of them. Only weights are stored as integers. In addition, cpp/ rounds the
inputs of a product to 8 bits, with one scale per 64 (int8) or 32 (int4) inputs. This allows integer dot products, and changes the
result of a product by about 0.6 percent. Without our kernels, inputs stay floats.

int_formats.py describes the layouts. A module is created and saved in tiles. On a GPU (see packed_products.py), and where there
is no compiler, it changes to another layout: when it is loaded, or at its first call.

Checked in tests/layers/test_quantization.py. Shapes: B rows of x, L tokens, O outputs, X inputs,
G groups of inputs with one scale each.
"""

import threading
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma.devices import Profile, profile
from paligemma.errors import CheckpointError, UsageError
from paligemma.gpu import packed_products
from paligemma.layers import kernels
from paligemma.layers.int_formats import (
    BLOCK,
    CHUNK_WEIGHTS,
    GROUP,
    KERNEL_DTYPES,
    KINDS,
    LAYOUT,
    dequantize,
    from_int4pack,
    from_rows,
    integer_blocks,
    quantize,
    repack,
    scales_from_tiles,
    scales_to_tiles,
    tile_shapes,
    to_cpu_int4pack,
    to_rows,
    to_tiles,
    weight_shape,
    with_zero_points,
)
from paligemma.modeling_gemma import GemmaEmbedding

# The value of "format" in quantization_config of config.json. It is historical: today the weights are stored in tiles, not in
# rows (see int_formats.LAYOUT). We write no "quant_method". Without one, transformers raises an error, as it should. With an
# unknown one, it would load random matrices.
FORMAT = "paligemma_rows"
CONFIG_KEYS = ("quantization_config", "quantization", "compression_config")  # of transformers, MLX, compressed-tensors
# Up to this many rows of x, a product on a CPU is limited by memory bandwidth, so torch's integer products are faster than
# dequantising.
SMALL_BATCH = 16
LAYOUT_LOCK = threading.Lock()  # held while a module changes its layout, which several threads may request at once


# Products without our kernels


def product_on_cpu(x: Tensor, packed: Tensor, scales: Tensor, kind: str, int4pack: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """x[B, X] @ w.T in the dtype of x, for weights in rows; used where our kernels are not available.

    Args:
        int4pack: the same weights in the layout of to_cpu_int4pack, and their scales, for torch's int4 product, which is used if
            x has few rows. It computes in bfloat16.
    """
    if kind == "int8" and len(x) <= SMALL_BATCH:
        return torch._weight_int8pack_mm(x, packed, scales[:, 0].to(x.dtype))
    if int4pack is not None and len(x) <= SMALL_BATCH:
        return torch._weight_int4pack_mm_for_cpu(x.bfloat16(), int4pack[0], GROUP["int4"], int4pack[1]).to(x.dtype)
    return packed_products.product_in_blocks(x, packed, scales, kind, CHUNK_WEIGHTS)


# Modules


class QuantizedLinear(nn.Module):
    """nn.Linear with its weight in 8 or 4 bits.

    Args:
        kind: "int8" or "int4".
        outputs, inputs: as in nn.Linear, without padding.
        packed, scales: from `quantize`, or empty tensors on the meta device.
        bias: the bias of the nn.Linear; it is not quantised.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, kind: str, outputs: int, inputs: int, packed: Tensor, scales: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.kind, self.out_features, self.in_features = kind, outputs, inputs
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.int4pack: tuple[Tensor, Tensor] | None = None
        self.profile: Profile | None = None  # of the GPU whose layout the weights have

    def extra_repr(self) -> str:
        return f"{self.kind}, in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    @property
    def is_tiled(self) -> bool:
        return self.packed.ndim == 3

    @property
    def more_bytes_on_gpu(self) -> int:
        """How much more a GPU's layout takes than tiles: a scale is float32 there, or bfloat16 with a zero point."""
        return 2 * self.scales.numel()

    def _apply(self, fn, recurse: bool = True):
        scales, device = self.scales, self.packed.device
        super()._apply(fn, recurse)
        self.scales = scales.to(self.packed.device)  # scales keep their dtype: model.to(dtype) must not convert them
        if self.packed.device != device and not self.is_tiled:  # the other device may need another layout
            self.packed, self.scales = self.tiles()
            self.int4pack = self.profile = None
        return self

    def tiles(self) -> tuple[Tensor, Tensor]:
        """The weights and their scales in tiles."""
        if self.is_tiled:
            return self.packed, self.scales
        scales = packed_products.plain_scales(self.scales).bfloat16()
        return repack(self.packed, self.kind, lambda q: to_tiles(q, self.kind)), scales_to_tiles(scales)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.is_tiled:
            destination[prefix + "packed"], destination[prefix + "scales"] = self.tiles()

    def integers(self) -> Tensor:
        """The weights without their scales, int8[O, X], padding included."""
        ((_, q),) = integer_blocks(self.packed, self.kind, weight_shape(self.packed, self.kind)[0])
        return q

    def weight_as_floats(self) -> Tensor:
        """The weights that `forward` multiplies with, float32[O, X]."""
        scales = scales_from_tiles(self.scales) if self.is_tiled else packed_products.plain_scales(self.scales)
        return dequantize(self.integers(), scales, torch.float32)[: self.out_features, : self.in_features]

    def change_layout(self) -> None:
        """Changes the layout from tiles to the one of the device, for torch's operators or for kernels of a GPU.

        For int4 on a CPU, the weights are also kept in the layout of torch's int4 product for CPUs.

        Other threads may compute at the same time: `packed`, whose shape shows the layout, is set last.
        """
        with LAYOUT_LOCK:
            if not self.is_tiled:  # another thread was first
                return
            if not self.packed.is_cpu:
                self.profile = profile(self.packed.device)
                packed, self.scales = packed_products.lay_out(self.packed, self.scales, self.kind)
            else:
                scales = scales_from_tiles(self.scales)
                if self.kind == "int4":
                    self.int4pack = to_cpu_int4pack(self.integers()), with_zero_points(scales)
                self.scales = scales.float().contiguous()
                packed = repack(self.packed, self.kind, lambda q: to_rows(q, self.kind))
            self.packed = packed

    def product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x @ weight.T in `dtype`; x has any float dtype and the shape [..., X]."""
        missing, packed, shape = -self.in_features % GROUP[self.kind], self.packed, x.shape[:-1]
        x = F.pad(x, (0, missing)) if missing else x
        if packed.is_cpu and packed.ndim == 3 and kernels.library() is not None:
            x = x if x.dtype in KERNEL_DTYPES else x.float()
            matrices = [(packed, self.scales, self.out_features)]
            return kernels.product(self.kind, x, matrices, dtype if dtype in KERNEL_DTYPES else torch.float32).to(dtype)
        if self.is_tiled:
            self.change_layout()
        x = x.flatten(0, -2)
        # torch's products need stride 1, but an empty tensor reports is_contiguous() with any stride.
        if not x.is_contiguous() or x.stride(1) != 1:
            x = x.clone(memory_format=torch.contiguous_format)
        if self.profile is not None:
            y = packed_products.product(x, self.packed, self.scales, self.kind, self.profile)
        else:
            y = product_on_cpu(x, self.packed, self.scales, self.kind, self.int4pack)
        return y[:, : self.out_features].reshape(*shape, self.out_features).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x, x.dtype)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(QuantizedLinear):
    """GemmaEmbedding with its matrix in 8 or 4 bits. It maps ids to scaled vectors, and vectors to logits.

    Args:
        dtype: the dtype of the vectors that `forward` returns.
    """

    def __init__(self, kind: str, outputs: int, inputs: int, packed: Tensor, scales: Tensor, *, dtype: torch.dtype):
        super().__init__(kind, outputs, inputs, packed, scales)
        self.dtype = dtype

    def _apply(self, fn, recurse: bool = True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype
        return super()._apply(fn, recurse)

    def lookup(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The integers, int8[L, X], and scales, [L, G], of the matrix rows with these ids, int64[L]."""
        packed, scales = self.packed, self.scales
        if packed.ndim == 3:
            with LAYOUT_LOCK:  # another thread may be in change_layout
                packed, scales = self.packed, self.scales
        if packed.ndim != 3:
            scales = packed_products.plain_scales(scales)[ids]
        if packed.ndim == 2:
            return from_rows(packed[ids], self.kind), scales
        if packed.ndim == 4:
            return from_int4pack(packed, ids), scales
        block, output = ids // BLOCK, ids % BLOCK
        lines = packed.unflatten(2, (BLOCK, 4))[block, :, output]  # [L, lines, 4]
        if self.kind == "int8":
            return (lines.flatten(1) + 128).view(torch.int8), scales[block, :, output]
        both = torch.stack((lines & 15, lines >> 4), 2)
        return both.flatten(1).view(torch.int8) - 8, scales[block, :, output]

    def forward(self, input_ids: Tensor) -> Tensor:
        ids = input_ids.flatten()
        is_checked = ids.device.type == "cpu" and not torch.compiler.is_compiling()  # CUDA and compiled code check the ids
        if is_checked and ((ids < 0) | (ids >= self.out_features)).any():
            raise IndexError(f"token ids must lie in 0..{self.out_features - 1}.")
        q, scales = self.lookup(ids)
        scale = torch.tensor(self.in_features**0.5, dtype=self.dtype).item()  # rounded as in GemmaEmbedding
        vectors = dequantize(q, scales, torch.float32)[:, : self.in_features].to(self.dtype) * scale
        return vectors.view(*input_ids.shape, -1)

    def logits(self, x: Tensor) -> Tensor:
        return self.product(x, torch.float32)


# Whole models


def targets(model: nn.Module, vision: bool = False) -> list[str]:
    """Names of the modules that are quantised: those of the decoder, the tied embedding and, on request, the vision tower."""
    parts = ("language_model.", "vision_tower.") if vision else ("language_model.",)
    matrices = (name for name, module in model.named_modules() if isinstance(module, (nn.Linear, GemmaEmbedding)))
    return [name for name in matrices if name.startswith(parts)]


def build(
    module: nn.Module, kind: str, packed: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> QuantizedLinear:
    outputs, inputs = module.weight.shape
    if isinstance(module, GemmaEmbedding):
        return QuantizedEmbedding(kind, outputs, inputs, packed, scales, dtype=dtype)
    return QuantizedLinear(kind, outputs, inputs, packed, scales, bias)


def quantize_module(module: nn.Linear | GemmaEmbedding, kind: str, tensors: dict[str, Tensor]) -> QuantizedLinear:
    """The quantised module that replaces `module`.

    Args:
        module: may be on the meta device; only its class and shapes are used.
        tensors: its "weight" and, if it has one, its "bias", in the dtype that the model computes in.
    """
    weight = tensors["weight"]
    return build(module, kind, *quantize(weight, kind), tensors.get("bias"), weight.dtype)


def empty_module(module: nn.Linear | GemmaEmbedding, kind: str, dtype: torch.dtype | None = None) -> QuantizedLinear:
    """An empty quantised module on the meta device, to be filled with stored tensors; it replaces `module`.

    Args:
        dtype: the dtype that the model computes in; None = that of `module`.
    """
    packed_shape, scales_shape = tile_shapes(len(module.weight), module.weight.shape[1], kind)
    packed = torch.empty(packed_shape, dtype=torch.uint8, device="meta")
    scales = torch.empty(scales_shape, dtype=torch.bfloat16, device="meta")
    dtype, bias = dtype or module.weight.dtype, getattr(module, "bias", None)
    bias = None if bias is None else torch.empty_like(bias, dtype=dtype, device="meta")
    return build(module, kind, packed, scales, bias, dtype)


class Quantization(NamedTuple):
    """How a model is quantised."""

    kind: str | None  # "int8", "int4", or None if it is not quantised
    with_vision: bool  # whether the vision tower is quantised, too
    is_stored: bool  # whether the files hold quantised weights


def choose(raw: dict, folder: Path, quantize: str | None, with_vision: bool) -> Quantization:
    """How a model will be quantised.

    Args:
        raw: content of config.json in `folder`.
        quantize, with_vision: the caller's request, see load_model.
    Raises: CheckpointError for the formats of other programs, UsageError for an unknown kind, or for a kind that contradicts the
        files.
    """
    if quantize is not None and quantize not in KINDS:
        raise UsageError(f"quantize is {quantize!r}. {' or '.join(KINDS)} is needed.")
    parts = [part for part in (raw, raw.get("text_config"), raw.get("vision_config")) if isinstance(part, dict)]
    entries = {key: part[key] for part in parts for key in CONFIG_KEYS if part.get(key)}
    if not entries:
        return Quantization(quantize, with_vision, False)
    entry = raw.get("quantization_config")
    # Older versions saved FORMAT under the key quant_method.
    names = (entry.get("format"), entry.get("quant_method")) if isinstance(entry, dict) else ()
    if len(entries) > 1 or FORMAT not in names:
        key, entry = next(iter(entries.items()))
        method = entry.get("quant_method", entry.get("format")) if isinstance(entry, dict) else entry
        text = f"{folder} is quantised by another program ({key} in config.json{f': {method!r:.60}' if method else ''})."
        raise CheckpointError(f"{text} Use the unquantised checkpoint with --quantize int8.", path=folder)
    kind = entry.get("kind")
    if kind not in KINDS or entry.get("layout") != LAYOUT:
        known = f"{', '.join(KINDS)} in layout {LAYOUT}"
        raise CheckpointError(
            f"{folder} is quantised as {entry}, and this version reads {known}. Quantise the original again.", path=folder
        )
    if quantize not in (None, kind):
        raise UsageError(f"{folder} is stored as {kind} and cannot become {quantize}. Use the unquantised checkpoint.")
    return Quantization(kind, entry.get("vision") is True, True)


def config_entry(model: nn.Module) -> dict | None:
    """The value of "quantization_config" in config.json, which `choose` reads; None for a model that is not quantised."""
    kinds = {name: module.kind for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    if not kinds:
        return None
    (kind,) = set(kinds.values())
    has_vision = any(name.startswith("vision_tower.") for name in kinds)
    return {"format": FORMAT, "kind": kind, "layout": LAYOUT, "vision": has_vision}
