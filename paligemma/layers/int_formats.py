"""int8 and int4 weights: how floats are rounded, and in which order the integers are stored. Functions on tensors only.

Stored per weight:
    int8  1 byte: w ~ scale * q, q in -127..127, one bfloat16 scale per output
    int4  0.5625 bytes: q in -8..7, one bfloat16 scale per 32 inputs of an output, chosen among candidates (see `round_groups`)

Layout "tiles", on disk and on a CPU (LAYOUT 1): integers are stored unsigned, as q + 128 or q + 8, in blocks of 16 outputs.
Each lane of a 16-lane vector sums one output of the block, so the lanes never need to be added up. A block consists of lines of
64 bytes. In the line with the number l, byte 4 o + j belongs to output o of the block and holds
    int8  input 4 l + j
    int4  input 8 l + j (low half of the byte) and input 8 l + 4 + j (high half)
Outputs are padded with zeros to a multiple of 16, inputs to a multiple of 64 (int8) or 32 (int4).

Layout "rows", on GPUs and where there is no compiler: int8[O, X]; or, for int4, uint8[O, X / 2] with the inputs 2 i (low half)
and 2 i + 1 (high half) in one byte. Scales are float32[O, G]: Triton cannot compile bfloat16 for GPUs that emulate it.

Layout "int4pack", of torch's int4 product for CUDA: int32[O / 8, steps, 32, words], in the order in which the 32 threads of a
warp pass weights to a tensor core. Thread 4 o + c holds weights of output o of 8, and each of its words has 8 of 32 neighbouring
inputs:
    byte 2 e + t, low half   input 16 t + 2 c + e
    byte 2 e + t, high half  input 16 t + 2 c + e + 8
Scales are bfloat16[G, O, 2], each followed by a zero point, which is 0 here. torch's int4 product for MPS has such scales, too,
but its weights are those of "rows".

Checked in tests/layers/test_quantization.py. Shapes: O outputs, X inputs, G groups of inputs with one scale each (1 for int8).
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from paligemma.layers import kernels

KINDS = ("int8", "int4")
LAYOUT = 1  # written into config.json
BLOCK = 16  # outputs of a block
OUTPUTS = {2: 1, 3: BLOCK, 4: 8}  # outputs per index of the first dimension, in the layouts with 2, 3 and 4 dimensions
GROUP = {"int8": 64, "int4": 32}  # inputs are padded to a multiple of this; int4 has one scale per group of inputs
# Candidates for the scale of a group, as fractions of the scale that represents the largest weight exactly. That scale is tried
# first.
SCALE_FRACTIONS = (1.05, 0.95, 0.9, 0.85, 0.8)
CHUNK_WEIGHTS = 2**22  # number of weights that are in float32 at a time while a matrix is quantised or dequantised
KERNEL_DTYPES = (torch.bfloat16, torch.float32)


# Rounding


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def rounded(w: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of 32 weights as int4: the integers, the wanted scales rounded to bfloat16, and the squared error per group."""
    scale = wanted.bfloat16()
    q = (w * torch.where(scale != 0, 1 / scale.float(), 0)).round().clamp(-8, 7)
    return q, scale, (q * scale - w).square().sum(-1, keepdim=True)


def round_groups(w: Tensor) -> tuple[Tensor, Tensor]:
    """int4 integers and scale of each group of 32 weights, with the smallest squared error among a few candidate scales.

    The first candidate maps the weight of largest magnitude exactly to -8 (so a scale may be negative). Smaller scales clip that
    weight and round the others more finely. The best candidate's scale is then fitted to its integers, and the fitted scale is
    used if its error is smaller still. Compared with scale = max / 7, the relative RMS error of Gaussian weights falls from
    9.7 to 8.2 percent.

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
    """float32[O, X], X already padded -> integers int8[O, X] and bfloat16 scales [O, G]."""
    if kind == "int8":
        scales = (w.abs().amax(1, keepdim=True) / 127).bfloat16()
        inverse = torch.where(scales != 0, 1 / scales.float(), 0)
        return (w * inverse).round().clamp(-127, 127).nan_to_num().to(torch.int8), scales
    q, scales = round_groups(w.unflatten(1, (-1, GROUP[kind])))
    return q.flatten(1).nan_to_num().to(torch.int8), scales[..., 0]


def dequantize(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers int8[O, X] and scales [O, G] -> the weights that they represent, [O, X]."""
    # The product converts the integers while it reads them, so on a GPU no float copy of them is written.
    return (q.unflatten(1, (scales.shape[1], -1)) * scales[..., None].to(dtype)).flatten(1)


# Layouts


def to_tiles(q: Tensor, kind: str) -> Tensor:
    """int8[O, X] -> tiles uint8[O / 16, lines, 64], see the header of this file."""
    outputs, inputs = q.shape
    if kind == "int8":
        unsigned = (q.view(torch.uint8) + 128).view(outputs // BLOCK, BLOCK, inputs // 4, 4)
        return unsigned.transpose(1, 2).reshape(outputs // BLOCK, inputs // 4, 64)
    low, high = (q + 8).view(torch.uint8).view(outputs // BLOCK, BLOCK, inputs // 8, 2, 4).unbind(3)
    return (low | high << 4).transpose(1, 2).reshape(outputs // BLOCK, inputs // 8, 64)


def from_tiles(tiles: Tensor, kind: str) -> Tensor:
    """The inverse of to_tiles: int8[O, X]."""
    blocks, lines, _ = tiles.shape
    outputs_first = tiles.view(blocks, lines, BLOCK, 4).transpose(1, 2)
    if kind == "int8":
        return (outputs_first.reshape(blocks * BLOCK, lines * 4) + 128).view(torch.int8)
    both = torch.stack((outputs_first & 15, outputs_first >> 4), 3)
    return both.reshape(blocks * BLOCK, lines * 8).view(torch.int8) - 8


def to_rows(q: Tensor, kind: str) -> Tensor:
    """int8[O, X] -> plain rows: q itself (int8) or uint8[O, X / 2] (int4)."""
    if kind == "int8":
        return q
    low, high = (q + 8).view(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
    return low | high << 4


def from_rows(rows: Tensor, kind: str) -> Tensor:
    """The inverse of to_rows: int8[O, X]."""
    if kind == "int8":
        return rows
    return torch.stack((rows & 15, rows >> 4), 2).flatten(1).view(torch.int8) - 8


def to_int4pack(q: Tensor) -> Tensor:
    """int8[O, X] -> int32[O / 8, steps, 32, words], see the header of this file."""
    outputs, inputs = q.shape
    words = next(words for words in (4, 2, 1) if inputs % (32 * words) == 0)  # a thread reads up to 16 bytes at once
    unsigned = (q + 8).view(torch.uint8).view(outputs // 8, 8, -1, words, 2, 2, 4, 2)  # O / 8, o, steps, words, t, half, c, e
    low, high = unsigned.unbind(5)
    in_order = (low | high << 4).permute(0, 2, 1, 5, 3, 6, 4)  # O / 8, steps, o, c, words, e, t
    return in_order.contiguous().flatten(5).view(torch.int32).view(outputs // 8, -1, 32, words)


def from_int4pack(packed: Tensor, ids: Tensor | None = None) -> Tensor:
    """The inverse of to_int4pack: int8[O, X]; or only the outputs `ids`, int64[L]: int8[L, X]."""
    words = packed.unflatten(2, (8, 4))  # O / 8, steps, o, c, words
    if ids is not None:
        words = words[ids // 8, :, ids % 8][:, :, None]  # L, steps, 1, c, words
    both = words.contiguous().view(torch.uint8).unflatten(4, (-1, 2, 2))  # O / 8, steps, o, c, words, e, t
    halves = torch.stack((both & 15, both >> 4), 7).permute(0, 2, 1, 4, 6, 7, 3, 5)  # O / 8, o, steps, words, t, half, c, e
    return halves.flatten(2).flatten(0, 1).view(torch.int8) - 8


def weight_shape(packed: Tensor, kind: str) -> tuple[int, int]:
    """(O, X) of weights in any layout; the number of dimensions tells which layout it is."""
    outputs = len(packed) * OUTPUTS[packed.ndim]
    return outputs, packed.numel() * packed.element_size() * (2 if kind == "int4" else 1) // outputs


def integer_blocks(packed: Tensor, kind: str, num_outputs: int) -> Iterator[tuple[slice, Tensor]]:
    """Weights in any layout as int8[o, X], in blocks of about `num_outputs` outputs: (which outputs, their weights)."""
    per_entry = OUTPUTS[packed.ndim]
    step = max(1, num_outputs // per_entry)
    for start in range(0, len(packed), step):
        entries = packed[start : start + step]
        if packed.ndim == 4:
            q = from_int4pack(entries)
        else:
            q = (from_tiles if packed.ndim == 3 else from_rows)(entries, kind)
        yield slice(start * per_entry, start * per_entry + len(q)), q


def repack(packed: Tensor, kind: str, convert: Callable[[Tensor], Tensor]) -> Tensor:
    """Weights in another layout: `convert` of int8[O, X]. It is called with blocks, so that little more memory is needed."""
    (outputs, inputs), result = weight_shape(packed, kind), None
    for part, q in integer_blocks(packed, kind, max(BLOCK, CHUNK_WEIGHTS // inputs // BLOCK * BLOCK)):
        block = convert(q)
        per_entry = len(q) // len(block)
        if result is None:
            result = block.new_empty(outputs // per_entry, *block.shape[1:])
        result[part.start // per_entry : part.stop // per_entry] = block
    return result


def scales_to_tiles(scales: Tensor) -> Tensor:
    """[O, G] -> [O / 16, G, 16], the order in which the kernel reads them."""
    return scales.unflatten(0, (-1, BLOCK)).transpose(1, 2).contiguous()


def scales_from_tiles(scales: Tensor) -> Tensor:
    """The inverse of scales_to_tiles: [O, G]."""
    return scales.transpose(1, 2).flatten(0, 1)


def with_zero_points(scales: Tensor) -> Tensor:
    """[O, G] -> bfloat16[G, O, 2]: the scales for torch's int4 products, each with a zero point, which is 0."""
    return torch.stack((scales, torch.zeros_like(scales)), 2).transpose(0, 1).bfloat16().contiguous()


def to_cpu_int4pack(q: Tensor) -> Tensor:
    """int8[O, X] in the layout of torch's int4 product for CPUs."""
    step = 64 * max(1, CHUNK_WEIGHTS // q.shape[1] // 64)  # whole blocks of that layout
    parts = [torch._convert_weight_to_int4pack_for_cpu((q[i : i + step] + 8).int(), 1) for i in range(0, len(q), step)]
    return torch.cat(parts)


def tile_shapes(outputs: int, inputs: int, kind: str) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes of the tiles and of their scales for nn.Linear(inputs, outputs)."""
    blocks, inputs = padded(outputs, BLOCK) // BLOCK, padded(inputs, GROUP[kind])
    inputs_per_line, groups = (4, 1) if kind == "int8" else (8, inputs // GROUP[kind])
    return (blocks, inputs // inputs_per_line, 64), (blocks, groups, BLOCK)


def quantize(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Floats [O, X] -> tiles uint8[O / 16, lines, 64] and bfloat16 scales [O / 16, G, 16], on the same device.

    It works on blocks of rows, so that only a few dozen MB are needed besides the weight and the result.
    """
    packed_shape, scales_shape = tile_shapes(len(weight), weight.shape[1], kind)
    zero = 128 if kind == "int8" else 0x88
    packed = torch.full(packed_shape, zero, dtype=torch.uint8, device=weight.device)
    scales = torch.zeros(scales_shape, dtype=torch.bfloat16, device=weight.device)
    if weight.device.type == "cpu" and kernels.library() is not None:
        floats = weight if weight.dtype in KERNEL_DTYPES else weight.float()
        kernels.int_quantize(kind, floats.contiguous(), packed, scales)
        return packed, scales
    step = max(1, CHUNK_WEIGHTS // weight.shape[1] // BLOCK) * BLOCK
    for start in range(0, len(weight), step):
        rows = weight[start : start + step].float()
        rows = F.pad(rows, (0, -rows.shape[1] % GROUP[kind], 0, -len(rows) % BLOCK))
        q, s = round_rows(rows, kind)
        blocks = slice(start // BLOCK, (start + len(rows)) // BLOCK)
        packed[blocks] = to_tiles(q, kind)
        scales[blocks] = scales_to_tiles(s)
    return packed, scales
