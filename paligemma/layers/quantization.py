"""Fewer bytes a weight, and the fastest product for each number of rows. nn.Linear in, nn.Module out.

Decoding reads every weight once a token, so its time is the bytes divided by what memory delivers. Stored per weight:
    bfloat16  2 bytes
    int8      1 byte: w ~ scale * q, q in -127..127, one scale an output
    int4      0.5625 bytes: q in -8..7, one bfloat16 scale for each 32 inputs of an output, chosen by trying (see `quantize`)
Only weights are stored so. kernels.cpp also rounds the inputs of a product to 8 bits, with a scale for each 64 (int8) or 32
(int4) of them, which adds 0.6 percent of error and buys integer dot products; elsewhere inputs stay as they are.

Layout on disk and on a CPU (LAYOUT 1, "tiles"): unsigned q + 128 or q + 8, in blocks of 16 outputs, so that 16 running sums
fill a vector and no sum across lanes is ever needed. One line of 64 bytes holds, of a block's 16 outputs,
    int8  4 inputs:  byte 4 o + j = output o, input 4 line + j
    int4  8 inputs:  byte 4 o + j = output o, input 8 line + j (low half) and 8 line + 4 + j (high half)
N is padded to 16, K to 64 or 32, with zeros. On CUDA, and where there is no compiler, a module puts its bytes into plain rows at
its first call: [N, K] int8, or [N, K / 2] with the inputs i and i + 16 of each 32 in one byte; saving restores the tiles.
The CUDA side is written on torch's operators and torch.compile and has not been run on a GPU.

Which product (`product`, the one place that decides), measured with benchmarks/products.py.
Checked in tests/layers/test_quantization.py. Shapes: N outputs, K inputs, R rows of x, G groups of a row.
"""

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma.errors import CheckpointError, UsageError
from paligemma.layers import kernels
from paligemma.modeling_gemma import GemmaAttention, GemmaEmbedding, GemmaMLP, GemmaRMSNorm, KVCache

KINDS = ("int8", "int4")
# The "format" in config.json's quantization_config. It stands in place of a "quant_method": transformers skips a method that it
# does not know, with random matrices in its place, but refuses an entry without one.
FORMAT = "paligemma_rows"
LAYOUT = 1
CONFIG_KEYS = ("quantization_config", "quantization", "compression_config")  # of transformers, MLX, compressed-tensors
BLOCK = 16  # outputs that lie together
GROUP = {"int8": 64, "int4": 32}  # inputs: K is padded to a multiple; int4 has a scale for each
SCALE_FRACTIONS = (1.05, 0.95, 0.9, 0.85, 0.8)  # of the scale that just reaches the largest weight, which is tried first
WORK = 2**22  # weights that are in float32 at a time while quantising or falling back
FEW_ROWS = 16  # up to here a product is bound by memory, and torch's integer products beat turning the weights into floats
# Rows up to which our bfloat16 product beats torch's, by what of bfloat16 the processor multiplies itself.
BF16_ROWS = {"matrices": 4, "pairs": 32, "nothing": 64}
LAYOUT_LOCK = threading.Lock()  # held while a module changes the order of its weights, which several threads may ask for at once
KERNEL_DTYPES = (torch.bfloat16, torch.float32)
WORTHWHILE = 2**24  # parameters: below, a model lives in the cache and compiling a kernel for it would only delay its start


# ---------------------------------------------------------------- weights to integers and back


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def rounded(w: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of 32 weights as int4 with about the wanted scales: integers, scales, and the squared error of each group."""
    scale = wanted.bfloat16()
    q = (w * torch.where(scale != 0, 1 / scale.float(), 0)).round().clamp(-8, 7)
    return q, scale, (q * scale - w).square().sum(-1, keepdim=True)


def round_groups(w: Tensor) -> tuple[Tensor, Tensor]:
    """int4 of each group of 32 and its scale, by least squares over a few candidates.

    The first candidate puts the weight of largest size exactly on -8 (so a scale may be negative); smaller ones clip it and are
    finer for the rest. The winner's scale is then fitted to its integers, and kept if rounding with it is better still.
    Against scale = max / 7 this takes the error of normal weights from 9.7 to 8.2 percent.
    Args:
        w: float32[..., 32].
    Returns: float32[..., 32] integers, bfloat16[..., 1] scales.
    """
    high, low = w.amax(-1, keepdim=True), w.amin(-1, keepdim=True)
    extreme = torch.where(low.abs() > high, low, high)
    best_q, best_scale, best_error = rounded(w, extreme / -8)
    for fraction in (*SCALE_FRACTIONS, None):
        if fraction is None:
            norm = best_q.square().sum(-1, keepdim=True)
            wanted = (best_q * w).sum(-1, keepdim=True) * torch.where(norm > 0, 1 / norm, 0)
        else:
            wanted = extreme * fraction / -8
        q, scale, error = rounded(w, wanted)
        is_better = error < best_error
        best_q, best_scale = torch.where(is_better, q, best_q), torch.where(is_better, scale, best_scale)
        best_error = torch.where(is_better, error, best_error)
    return best_q, best_scale


def round_rows(w: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """float32[N, K], K padded already -> int8[N, K] and bfloat16 scales [N, G]; int8 has one group, the whole row."""
    if kind == "int8":
        scales = (w.abs().amax(1, keepdim=True) / 127).bfloat16()
        inverse = torch.where(scales != 0, 1 / scales.float(), 0)
        return (w * inverse).round().clamp(-127, 127).nan_to_num().to(torch.int8), scales
    q, scales = round_groups(w.unflatten(1, (-1, GROUP[kind])))
    return q.flatten(1).nan_to_num().to(torch.int8), scales[..., 0]


def to_tiles(q: Tensor, kind: str) -> Tensor:
    """int8[N, K] -> the tiles of the header, uint8[N / 16, lines, 64]."""
    n, k = q.shape
    if kind == "int8":
        unsigned = (q.view(torch.uint8) + 128).view(n // BLOCK, BLOCK, k // 4, 4)
        return unsigned.transpose(1, 2).reshape(n // BLOCK, k // 4, 64)
    low, high = (q + 8).view(torch.uint8).view(n // BLOCK, BLOCK, k // 8, 2, 4).unbind(3)
    return (low | high << 4).transpose(1, 2).reshape(n // BLOCK, k // 8, 64)


def from_tiles(tiles: Tensor, kind: str) -> Tensor:
    """The inverse of to_tiles: int8[N, K]."""
    blocks, lines, _ = tiles.shape
    outputs_first = tiles.view(blocks, lines, BLOCK, 4).transpose(1, 2)
    if kind == "int8":
        return (outputs_first.reshape(blocks * BLOCK, lines * 4) + 128).view(torch.int8)
    both = torch.stack((outputs_first & 15, outputs_first >> 4), 3)
    return both.reshape(blocks * BLOCK, lines * 8).view(torch.int8) - 8


def to_rows(q: Tensor, kind: str) -> Tensor:
    """int8[N, K] -> plain rows: itself (int8), or uint8[N, K / 2] (int4)."""
    if kind == "int8":
        return q
    low, high = (q + 8).view(torch.uint8).unflatten(1, (-1, 2, 16)).unbind(2)
    return (low | high << 4).flatten(1)


def from_rows(rows: Tensor, kind: str) -> Tensor:
    """The inverse of to_rows."""
    if kind == "int8":
        return rows
    groups = rows.unflatten(1, (-1, 16))
    return torch.cat((groups & 15, groups >> 4), 2).flatten(1).view(torch.int8) - 8


def scales_to_tiles(scales: Tensor) -> Tensor:
    """[N, G] -> [N / 16, G, 16], the order in which the kernel meets them."""
    return scales.unflatten(0, (-1, BLOCK)).transpose(1, 2).contiguous()


def scales_from_tiles(scales: Tensor) -> Tensor:
    return scales.transpose(1, 2).flatten(0, 1)


def tile_shapes(outputs: int, inputs: int, kind: str) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes of `packed` and `scales` for nn.Linear(inputs, outputs)."""
    blocks, k = padded(outputs, BLOCK) // BLOCK, padded(inputs, GROUP[kind])
    inputs_per_line, groups = (4, 1) if kind == "int8" else (8, k // GROUP[kind])
    return (blocks, k // inputs_per_line, 64), (blocks, groups, BLOCK)


def quantize(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Floats [N, K] -> tiles uint8[N / 16, lines, 64] and bfloat16 scales [N / 16, G, 16], on the same device.

    Works in blocks of rows, so that beside source and result only a few dozen MB are needed.
    """
    packed_shape, scales_shape = tile_shapes(len(weight), weight.shape[1], kind)
    zero = 128 if kind == "int8" else 0x88
    packed = torch.full(packed_shape, zero, dtype=torch.uint8, device=weight.device)
    scales = torch.zeros(scales_shape, dtype=torch.bfloat16, device=weight.device)
    if weight.device.type == "cpu" and kernels.library() is not None:
        floats = weight if weight.dtype in KERNEL_DTYPES else weight.float()
        kernels.int_quantize(kind, floats.contiguous(), packed, scales)
        return packed, scales
    step = max(1, WORK // weight.shape[1] // BLOCK) * BLOCK
    for start in range(0, len(weight), step):
        rows = weight[start : start + step].float()
        rows = F.pad(rows, (0, -rows.shape[1] % GROUP[kind], 0, -len(rows) % BLOCK))
        q, s = round_rows(rows, kind)
        blocks = slice(start // BLOCK, (start + len(rows)) // BLOCK)
        packed[blocks] = to_tiles(q, kind)
        scales[blocks] = scales_to_tiles(s)
    return packed, scales


def dequantize(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """int8[N, K] and scales [N, G] -> the weights they stand for, [N, K]."""
    groups = q.unflatten(1, (scales.shape[1], -1)).to(dtype)
    return (groups * scales[..., None].to(dtype)).flatten(1)


# ---------------------------------------------------------------- products


@functools.cache
def bf16_instructions() -> str:
    """What this processor multiplies, a key of BF16_ROWS; where the system does not say, torch is trusted to know best."""
    flags = kernels.cpu_flags()
    if not flags or not flags.isdisjoint({"amx_bf16", "bf16", "svebf16"}):
        return "matrices"
    return "pairs" if "avx512_bf16" in flags else "nothing"


def upcast_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T through float32, a few MB of the weight at a time."""
    rows = x.flatten(0, -2).float()
    y = x.new_empty(len(rows), len(weight))
    step = max(1, WORK // weight.shape[1])
    for start in range(0, len(weight), step):
        y[:, start : start + step] = rows @ weight[start : start + step].float().T
    return y.view(*x.shape[:-1], -1)


def is_untrained_bf16(x: Tensor, weight: Tensor) -> bool:
    """Whether both are bfloat16 on the CPU and nobody asks for gradients: where there is something to choose."""
    is_trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return (
        x.dtype is weight.dtype is torch.bfloat16 and x.is_cpu and weight.is_cpu and not is_trained
        and not torch.compiler.is_compiling()
    )  # fmt: skip


def suits_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether our bfloat16 product can do x @ weight.T and is the fastest; both as is_untrained_bf16 wants them."""
    inputs = weight.shape[1]
    if inputs % 32 or not weight.is_contiguous() or kernels.library() is None:
        return False
    return 0 < x.numel() <= BF16_ROWS[bf16_instructions()] * inputs


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, by the operator that is fastest for this processor, dtype and number of rows.

    16384 x 2048, ms for 1 / 4 / 16 / 64 / 266 rows. Two Ice Lake cores, which have no bfloat16 instructions: F.linear
    4.0 / 11 / 24 / 76 / 288; ours 2.5 / 3.5 / 8.2 / 25 / 95; through float32 - / 12 / 16 / 27 / 80. Two EPYC cores, which
    multiply pairs: F.linear 3.9 / 5.1 / 5.2 / 13 / 44; ours 1.6 / 3.6 / 4.6 / 13 / 58.
    """
    if is_untrained_bf16(x, weight):
        y = None
        if suits_kernel(x, weight):
            y = kernels.product("bf16", x, [(weight, None, len(weight))], torch.bfloat16)
        elif bf16_instructions() == "nothing" and x.numel() >= 8 * weight.shape[1] and weight.is_contiguous():
            y = upcast_product(x, weight)
        if y is not None:
            return y if bias is None else y + bias
    return F.linear(x, weight, bias)


def few_rows_product(x: Tensor, packed: Tensor, scales: Tensor, kind: str) -> Tensor:
    """float32[R, N] from float32[R, K] and plain rows, written so that torch.compile makes one pass over `packed` of it."""
    n, groups = scales.shape
    if kind == "int8":
        parts = [packed.view(n, groups, -1).float()]
        inputs = [x.view(len(x), groups, -1)]
    else:
        both = packed.view(n, groups, -1)
        parts = [(both & 15).float() - 8, (both >> 4).float() - 8]
        inputs = x.view(len(x), groups, 2, -1).unbind(2)
    scale = scales[..., None].float()
    weighted = (sum(w * i[row] for w, i in zip(parts, inputs, strict=True)) for row in range(len(x)))
    return torch.stack([(products * scale).sum((1, 2)) for products in weighted])


@functools.cache
def compiled_few_rows_product() -> Callable[..., Tensor]:
    import torch._dynamo  # not before it is needed: it takes a second

    kernels.keep_torch_private()
    # Each size of matrix is compiled for itself, and a decoder has more of them than the eight that torch allows.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(few_rows_product, dynamic=False)


def few_rows(x: Tensor, packed: Tensor, scales: Tensor, kind: str) -> Tensor:
    """The same in the dtype of x, compiled: by itself, or with whatever is being compiled around it (graphs.py)."""
    make = few_rows_product if torch.compiler.is_compiling() else compiled_few_rows_product()
    return make(x.float(), packed, scales, kind).to(x.dtype)


def to_int4pack(q: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """int8[N, K] and scales [N, G] -> what torch's int4 product for a CPU reads: its own order, scales with zeros beside them."""
    step = 64 * max(1, WORK // q.shape[1] // 64)  # whole blocks of that order
    parts = [torch._convert_weight_to_int4pack_for_cpu((q[i : i + step] + 8).int(), 1) for i in range(0, len(q), step)]
    return torch.cat(parts), torch.stack((scales, torch.zeros_like(scales)), 2).transpose(0, 1).contiguous()


def rows_product(x: Tensor, packed: Tensor, scales: Tensor, kind: str, int4pack: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """x[R, K] @ w.T for a w in plain rows, in the dtype of x: what there is without our kernels.

    Args:
        int4pack: the same weights from to_int4pack, to be used for few rows; bfloat16 inside.
    """
    if x.is_cuda and len(x) <= 4:
        return few_rows(x, packed, scales, kind)
    if kind == "int8" and x.device.type == "cpu" and len(x) <= FEW_ROWS:
        return torch._weight_int8pack_mm(x, packed, scales[:, 0].to(x.dtype))
    if int4pack is not None and x.device.type == "cpu" and len(x) <= FEW_ROWS:
        return torch._weight_int4pack_mm_for_cpu(x.bfloat16(), int4pack[0], GROUP["int4"], int4pack[1]).to(x.dtype)
    y = x.new_empty(len(x), len(packed))
    step = len(packed) if x.is_cuda else max(1, WORK // x.shape[1])
    for start in range(0, len(packed), step):
        w = dequantize(from_rows(packed[start : start + step], kind), scales[start : start + step], x.dtype)
        y[:, start : start + step] = F.linear(x, w)
    return y


# ---------------------------------------------------------------- modules


class QuantizedLinear(nn.Module):
    """nn.Linear with its weight in 8 or 4 bits.

    Args:
        kind: "int8" or "int4".
        outputs, inputs: of the nn.Linear, not padded.
        packed, scales: from `quantize`, or empty ones on the meta device.
        bias: as it was.
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

    def extra_repr(self) -> str:
        return f"{self.kind}, in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    @property
    def is_tiled(self) -> bool:
        return self.packed.ndim == 3

    def _apply(self, fn, recurse: bool = True):
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.packed.device)  # model.to(dtype) is for numbers that are computed with
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.is_tiled:
            destination[prefix + "packed"] = to_tiles(from_rows(self.packed, self.kind), self.kind)
            destination[prefix + "scales"] = scales_to_tiles(self.scales)

    def integers(self) -> Tensor:
        """The weights without their scales, int8[N, K], padding included."""
        return (from_tiles if self.is_tiled else from_rows)(self.packed, self.kind)

    def weight_as_floats(self) -> Tensor:
        """float32[N, K]: what `forward` multiplies with."""
        scales = scales_from_tiles(self.scales) if self.is_tiled else self.scales
        return dequantize(self.integers(), scales, torch.float32)[: self.out_features, : self.in_features]

    def leave_tiles(self) -> None:
        """Puts the weights into the order that torch's operators can use; for int4 on a CPU that is a second copy.

        Other threads may compute meanwhile: `packed`, which shows the order, is set last.
        """
        with LAYOUT_LOCK:
            if not self.is_tiled:  # another thread was first
                return
            q, scales = self.integers(), scales_from_tiles(self.scales).contiguous()
            if self.kind == "int4" and q.device.type == "cpu":
                self.int4pack = to_int4pack(q, scales)
            self.scales = scales
            self.packed = to_rows(q, self.kind)

    def product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x @ weight.T in dtype; x is any float [..., K]."""
        missing, packed, shape = -self.in_features % GROUP[self.kind], self.packed, x.shape[:-1]
        x = F.pad(x, (0, missing)) if missing else x
        if packed.is_cpu and packed.ndim == 3 and kernels.library() is not None:
            x = x if x.dtype in KERNEL_DTYPES else x.float()
            matrices = [(packed, self.scales, self.out_features)]
            return kernels.product(self.kind, x, matrices, dtype if dtype in KERNEL_DTYPES else torch.float32).to(dtype)
        if self.is_tiled:
            self.leave_tiles()
        x = x.flatten(0, -2)
        if not x.is_contiguous() or x.stride(1) != 1:  # torch's products refuse it; one of no rows counts as contiguous
            x = x.clone(memory_format=torch.contiguous_format)
        y = rows_product(x, self.packed, self.scales, self.kind, self.int4pack)
        return y[:, : self.out_features].reshape(*shape, self.out_features).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x, x.dtype)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(QuantizedLinear):
    """GemmaEmbedding with its matrix in 8 or 4 bits: ids to scaled vectors, vectors to logits.

    Args:
        dtype: of the vectors that come out.
    """

    def __init__(self, kind: str, outputs: int, inputs: int, packed: Tensor, scales: Tensor, *, dtype: torch.dtype):
        super().__init__(kind, outputs, inputs, packed, scales)
        self.dtype = dtype

    def _apply(self, fn, recurse: bool = True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype
        return super()._apply(fn, recurse)

    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The integers int8[n, K] and scales [n, G] of some rows."""
        packed, scales = self.packed, self.scales
        if packed.ndim == 3:
            with LAYOUT_LOCK:  # another thread may be in leave_tiles
                packed, scales = self.packed, self.scales
        if packed.ndim == 2:
            return from_rows(packed[ids], self.kind), scales[ids]
        block, place = ids // BLOCK, ids % BLOCK
        lines = packed.unflatten(2, (BLOCK, 4))[block, :, place]  # [n, lines, 4]
        if self.kind == "int8":
            return (lines.flatten(1) + 128).view(torch.int8), scales[block, :, place]
        both = torch.stack((lines & 15, lines >> 4), 2)
        return both.flatten(1).view(torch.int8) - 8, scales[block, :, place]

    def forward(self, input_ids: Tensor) -> Tensor:
        ids = input_ids.flatten()
        is_checked = ids.device.type == "cpu" and not torch.compiler.is_compiling()  # CUDA and compiled code do it
        if is_checked and ((ids < 0) | (ids >= self.out_features)).any():
            raise IndexError(f"token ids must lie in 0..{self.out_features - 1}.")
        q, scales = self.rows(ids)
        scale = torch.tensor(self.in_features**0.5, dtype=self.dtype).item()  # rounded as in GemmaEmbedding
        vectors = dequantize(q, scales, torch.float32)[:, : self.in_features].to(self.dtype) * scale
        return vectors.view(*input_ids.shape, -1)

    def logits(self, x: Tensor) -> Tensor:
        return self.product(x, torch.float32)


class FastLinear(nn.Linear):
    """nn.Linear whose product is chosen by `product`."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


class FastEmbedding(GemmaEmbedding):
    """GemmaEmbedding whose logits are made by `product`, without rounding the sums of few rows."""

    def logits(self, x: Tensor) -> Tensor:
        w = self.weight
        if is_untrained_bf16(x, w) and suits_kernel(x, w):
            return kernels.product("bf16", x, [(w, None, len(w))], torch.float32)
        return product(x, w)


class FastRMSNorm(GemmaRMSNorm):
    """GemmaRMSNorm whose ten small operations are one."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if w.numel() % 16 == 0 and is_untrained_bf16(x, w) and kernels.library() is not None:
            return kernels.bf16_rms_norm(x, w, self.eps)
        return super().forward(x)


def joint_product(x: Tensor, modules: tuple[nn.Module, ...], is_gated: bool = False) -> Tensor | None:
    """What modules that share an input make of it, in one call, as kernels.product says; None where each has to do it itself."""
    first = modules[0]
    if any(type(module) is not type(first) or module.bias is not None for module in modules):
        return None
    if type(first) is FastLinear:
        weights = [module.weight for module in modules]
        if all(is_untrained_bf16(x, w) and suits_kernel(x, w) for w in weights):
            return kernels.product("bf16", x, [(w, None, len(w)) for w in weights], torch.bfloat16, is_gated)
    if type(first) is QuantizedLinear and x.is_cpu and x.dtype in KERNEL_DTYPES and x.shape[-1] % GROUP[first.kind] == 0:
        if all(module.is_tiled and module.kind == first.kind for module in modules) and kernels.library() is not None:
            matrices = [(module.packed, module.scales, module.out_features) for module in modules]
            return kernels.product(first.kind, x, matrices, x.dtype, is_gated)
    return None


class FastGemmaMLP(GemmaMLP):
    """GemmaMLP whose widened copies are made, bent and multiplied in one call; or, behind torch's products, the latter."""

    def forward(self, x: Tensor) -> Tensor:
        gated = joint_product(x, (self.gate_proj, self.up_proj), is_gated=True)  # [B, L, F]
        if gated is None:
            gate, up = self.gate_proj(x), self.up_proj(x)  # [B, L, F], [B, L, F]
            if gate.numel() % 16 or kernels.library() is None or not is_untrained_bf16(gate, up):
                return self.down_proj(F.gelu(gate, approximate="tanh") * up)
            gated = kernels.bf16_gate(gate, up)
        return self.down_proj(gated)


class FastGemmaAttention(GemmaAttention):
    """GemmaAttention in three calls where each row has one new token: to q, k and v; from them to the values; back to D."""

    def forward(
        self, x: Tensor, position_ids: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        qkv = None
        if cache is not None and x.shape[1] == 1 and x.dtype is cache.keys.dtype is torch.bfloat16 and self.width % 32 == 0:
            qkv = joint_product(x, (self.q_proj, self.k_proj, self.v_proj))  # [B, 1, (N + 2 K) E]
        if qkv is None:
            return super().forward(x, position_ids, rotation, mask, cache)
        keys, values = cache.keys[self.layer], cache.values[self.layer]
        slots = cache.slots_read
        x = kernels.bf16_attend(qkv, position_ids, rotation, mask, keys, values, slots, self.scale, self.cap)  # [B, 1, N*E]
        return self.o_proj(x)


# ---------------------------------------------------------------- whole models


def targets(model: nn.Module, vision: bool = False) -> list[str]:
    """Names of the modules that quantising replaces: the decoder's matrices, the tied embedding and, if asked, the tower's."""
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
    """The quantised stand-in of one module.

    Args:
        module: may be on the meta device; only its class and shapes count.
        tensors: its "weight" and, where it has one, "bias", in the dtype that the model computes in.
    """
    weight = tensors["weight"]
    return build(module, kind, *quantize(weight, kind), tensors.get("bias"), weight.dtype)


def empty_module(module: nn.Linear | GemmaEmbedding, kind: str, dtype: torch.dtype | None = None) -> QuantizedLinear:
    """The same without numbers, on the meta device: what a saved model's tensors are put into.

    Args:
        dtype: that the model computes in; that of `module` if None.
    """
    packed_shape, scales_shape = tile_shapes(len(module.weight), module.weight.shape[1], kind)
    packed = torch.empty(packed_shape, dtype=torch.uint8, device="meta")
    scales = torch.empty(scales_shape, dtype=torch.bfloat16, device="meta")
    dtype, bias = dtype or module.weight.dtype, getattr(module, "bias", None)
    bias = None if bias is None else torch.empty_like(bias, dtype=dtype, device="meta")
    return build(module, kind, packed, scales, bias, dtype)


FAST = {nn.Linear: FastLinear, GemmaEmbedding: FastEmbedding, GemmaRMSNorm: FastRMSNorm}
FUSED = {GemmaAttention: FastGemmaAttention, GemmaMLP: FastGemmaMLP}  # of what FAST or quantising put into them


def use_fast_products(model: nn.Module, least_parameters: int = WORTHWHILE) -> None:
    """Gives a model on the CPU what this machine is fast at, where its weights are bfloat16 or quantised; names stay.

    Small models are left alone: they live in the cache, and would only wait for the compiler at the first start.
    """
    if sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())) < least_parameters:
        return
    for module in model.modules():
        if type(module) in FAST and module.weight.dtype == torch.bfloat16:
            module.__class__ = FAST[type(module)]
        elif type(module) in FUSED:
            module.__class__ = FUSED[type(module)]


# ---------------------------------------------------------------- config.json


class Quantization(NamedTuple):
    """What is quantised in a model: kind ("int8", "int4" or None), the vision tower too?, and whether the files hold it so."""

    kind: str | None
    with_vision: bool
    is_stored: bool


def choose(raw: dict, folder: Path, quantize: str | None, with_vision: bool) -> Quantization:
    """How a model will be quantised.

    Args:
        raw: content of config.json in `folder`.
        quantize, with_vision: what the caller asks for.
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
    names = (entry.get("format"), entry.get("quant_method")) if isinstance(entry, dict) else ()  # older folders have the second
    if len(entries) > 1 or FORMAT not in names:
        key, entry = next(iter(entries.items()))
        method = entry.get("quant_method", entry.get("format")) if isinstance(entry, dict) else entry
        text = f"{folder} is quantised by another program ({key} in config.json{f': {method!r:.60}' if method else ''})."
        raise CheckpointError(f"{text} Take the plain checkpoint and --quantize int8.", path=folder)
    kind = entry.get("kind")
    if kind not in KINDS or entry.get("layout") != LAYOUT:
        known = f"{', '.join(KINDS)} in layout {LAYOUT}"
        raise CheckpointError(
            f"{folder} is quantised as {entry}, and this version reads {known}. Quantise it again.", path=folder
        )
    if quantize not in (None, kind):
        raise UsageError(f"{folder} is stored as {kind} and cannot become {quantize}. Take the plain checkpoint.")
    return Quantization(kind, entry.get("vision") is True, True)


def config_entry(model: nn.Module) -> dict | None:
    """The "quantization_config" for config.json, which `choose` reads; None for a model that is not quantised."""
    kinds = {name: module.kind for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    if not kinds:
        return None
    (kind,) = set(kinds.values())
    has_vision = any(name.startswith("vision_tower.") for name in kinds)
    return {"format": FORMAT, "kind": kind, "layout": LAYOUT, "vision": has_vision}
