"""Products with int8 and int4 weights on a GPU: the layout of the weights, and the kernel that multiplies with them.

A few rows (decoding) are multiplied by a kernel that reads the packed weights once. devices.Profile says which of these kernels a
device has; `kernel_for` takes the first that fits:
    int4pack   torch's int4 product: NVIDIA from sm_80 on, and MPS
    triton     our own kernels, triton_products.py: NVIDIA from Turing on, on Linux
    int8pack   torch's int8 product: MPS

With more rows (prompts), the speed is limited by arithmetic, not by memory. So blocks of weights are turned into floats and
multiplied by torch's product of floats. This is also the fallback: self_check.FastWay compares each kernel with the product of
floats once for each size of matrix. If a kernel differs or fails, for example because there is no C compiler, the product of
floats is used.

Each weight is stored once: both ways read the same layout ("int4pack" for torch's int4 product on CUDA, else "rows", see
int_formats.py). Int8 takes 1 byte per weight, int4 0.625, of which the scales are 0.125.

Checked in tests/gpu/test_packed_products.py on simulated devices. No kernel has run on a GPU.
Shapes: B rows of x, O outputs, X inputs, G groups of inputs with one scale each.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from paligemma.devices import Profile, profile
from paligemma.gpu.mps_workarounds import linear
from paligemma.gpu.self_check import FastWay, rounding_bound
from paligemma.layers.int_formats import (
    GROUP,
    dequantize,
    integer_blocks,
    repack,
    scales_from_tiles,
    to_int4pack,
    to_rows,
    with_zero_points,
)

MAX_ROWS = 16  # a kernel for few rows is used up to this number; a guess, because it has not been measured
BLOCK_WEIGHTS = 2**24  # number of weights that are turned into floats at one time
BLOCK_BYTES = 6 * BLOCK_WEIGHTS  # memory for these floats and for the integers that they are made from
INSTEAD = "weights are turned into floats in blocks instead, which is slower"
TRITON = FastWay("products of packed weights by Triton", rounding_bound(torch.bfloat16), INSTEAD)
TORCH = FastWay("torch's products of packed weights", rounding_bound(torch.bfloat16), INSTEAD)


def lay_out(tiles: Tensor, scales: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Tiles and their scales in the layout for the GPU that they are on."""
    scales, used = scales_from_tiles(scales), profile(tiles.device)
    if kind == "int4" and used.int4pack:
        packed = repack(tiles, kind, to_int4pack if tiles.is_cuda else lambda q: to_rows(q, kind))
        return packed, with_zero_points(scales)
    return repack(tiles, kind, lambda q: to_rows(q, kind)), scales.float().contiguous()


def plain_scales(scales: Tensor) -> Tensor:
    """[O, G] from the scales of any layout but tiles."""
    return scales[..., 0].T if scales.ndim == 3 else scales


def product_in_blocks(x: Tensor, packed: Tensor, scales: Tensor, kind: str, block_weights: int = BLOCK_WEIGHTS) -> Tensor:
    """x[B, X] @ w.T in the dtype of x, for any layout but tiles; about `block_weights` weights become floats at a time."""
    scales = plain_scales(scales)
    y = x.new_empty(len(x), len(scales))
    for part, q in integer_blocks(packed, kind, max(1, block_weights // x.shape[1])):
        y[:, part] = linear(x, dequantize(q, scales[part], x.dtype))
    return y


def torch_int4(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    outputs, inputs = scales.shape[1], x.shape[1]
    if packed.ndim == 2:  # on MPS: the layout "rows", viewed with the four dimensions that torch's operator checks for
        packed = packed.view(torch.int32).view(outputs // 8, inputs // 32, 32, 1)
    return torch._weight_int4pack_mm(x.bfloat16().contiguous(), packed, GROUP["int4"], scales).to(x.dtype)


def torch_int8(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return torch._weight_int8pack_mm(x.contiguous(), packed, scales[:, 0].to(x.dtype))


def by_triton(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        from paligemma.gpu import triton_products  # noqa: F401  (defines the operators; Triton is imported only where used)

    operators = torch.ops.paligemma
    return (operators.int8_product if packed.dtype is torch.int8 else operators.int4_product)(x, packed, scales)


def kernel_for(used: Profile, packed: Tensor, scales: Tensor) -> tuple[FastWay, Callable[..., Tensor]] | None:
    """The kernel for a few rows with weights in this layout; None if there is none."""
    if scales.ndim == 3:
        return TORCH, torch_int4
    if used.triton:
        return TRITON, by_triton
    if used.int8pack and packed.dtype is torch.int8 and len(packed) % 32 == 0:  # MPS needs a multiple of 32
        return TORCH, torch_int8
    return None


def product(x: Tensor, packed: Tensor, scales: Tensor, kind: str, used: Profile) -> Tensor:
    """x[B, X] @ w.T in the dtype of x.

    Args:
        packed, scales: as returned by `lay_out`.
        used: profile(x.device).
    """
    found = kernel_for(used, packed, scales) if 0 < len(x) <= MAX_ROWS else None
    if found is None:
        return product_in_blocks(x, packed, scales, kind)
    way, kernel = found
    if torch.compiler.is_compiling():  # the same step has run before without being compiled, so the kernel has been checked
        return kernel(x, packed, scales) if way.is_on else product_in_blocks(x, packed, scales, kind)
    # There is a separate kernel for each dtype and for each number of rows, rounded up to a power of two (MPS has another one
    # from 12 rows on), and a kernel may be wrong for some sizes of matrices only. So every combination is checked.
    key = kind, x.dtype, x.device, packed.shape, (len(x) - 1).bit_length(), len(x) >= 12
    bound = rounding_bound(torch.bfloat16 if scales.ndim == 3 else x.dtype)
    return way.run(lambda: kernel(x, packed, scales), lambda: product_in_blocks(x, packed, scales, kind), key=key, bound=bound)
