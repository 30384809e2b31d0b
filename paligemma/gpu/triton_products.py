"""Products of a few rows with int8 or int4 weights on an NVIDIA GPU: kernels in Triton, as operators of torch.

Decoding takes as long as reading the weights, so each kernel reads every packed weight once and turns it into a float in a
register. Triton compiles a kernel at its first use with each number of rows (see row_count), which takes about a second. The
wheels of torch for Linux with CUDA include Triton; it also needs a C compiler. This module imports Triton, so packed_products.py
imports this module only where it has chosen these kernels.

`int8_kernel` and `int4_kernel` multiply and add on CUDA cores, with one sum per row of x. A block of THREADS threads computes
BLOCK_O outputs. Each thread reads VECTOR inputs at a time, which it uses for all its outputs, and the weights of these inputs.
From MIN_ROWS_FOR_DOT rows of bfloat16 on, `int8_dot_kernel` uses the tensor cores, which take the same time for 16 rows as for
one.
Sums and scales are float32. The scale is applied once per output (int8), or once per VECTOR inputs of one group (int4).

Checked in tests/gpu/test_triton_products.py by Triton's interpreter, and in tests/gpu/test_cross_compile.py, which compiles the
kernels for several GPUs without having one. No kernel has run on a GPU.
Shapes: B rows of x, O outputs, X inputs, G groups of 32 inputs.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 16
MIN_ROWS_FOR_DOT = 5  # with 5 rows, CUDA cores need 11 instructions per weight, the tensor cores 4
BLOCK_O, THREADS, NUM_WARPS = 4, 128, 4
DOT_BLOCK_O, DOT_BLOCK_X = 16, 256  # 16 outputs are the fewest that a tensor core computes; one warp per block
BYTES_PER_LOAD = 16  # of x, by one thread


@triton.jit(do_not_specialize=["rows"])
def int8_kernel(
    x, packed, scales, y, rows, outputs, inputs,
    ROWS: tl.constexpr, BLOCK_O: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """y[B, O] = x[B, X] @ (packed * scales).T for packed int8[O, X] and scales float32[O]; B = rows <= ROWS."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)[:, None, None]
    i = tl.arange(0, THREADS)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    packed += o.to(tl.int64) * inputs
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((BLOCK_O, THREADS), tl.float32),)
    for start in range(0, inputs, THREADS * VECTOR):
        column = start + i
        w = tl.load(packed + column, mask=(o < outputs) & (column < inputs), other=0).to(tl.float32)
        new = ()
        for row in tl.static_range(ROWS):
            part = tl.load(x + row * inputs + column, mask=(row < rows) & (column < inputs), other=0).to(tl.float32)
            new = new + (sums[row] + tl.sum(w * part, 2),)
        sums = new
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    scale = tl.load(scales + o, mask=o < outputs, other=0)
    for row in tl.static_range(ROWS):
        total = tl.sum(sums[row], 1) * scale
        tl.store(y + row * outputs + o, total.to(y.dtype.element_ty), mask=(row < rows) & (o < outputs))


@triton.jit(do_not_specialize=["rows"])
def int4_kernel(
    x, packed, scales, y, rows, outputs, inputs,
    ROWS: tl.constexpr, BLOCK_O: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The same for int4 in the layout "rows": packed uint8[O, X / 2], scales float32[O, G]."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)[:, None, None]
    threads, i, byte = tl.arange(0, THREADS)[None, :, None], tl.arange(0, VECTOR), tl.arange(0, VECTOR // 2)
    packed += o.to(tl.int64) * (inputs // 2)
    scales += o.to(tl.int64) * (inputs // 32)
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((BLOCK_O, THREADS), tl.float32),)
    for start in range(0, inputs // VECTOR, THREADS):
        vector = start + threads
        is_inside = vector < inputs // VECTOR
        is_weight = (o < outputs) & is_inside
        both = tl.load(packed + vector * (VECTOR // 2) + byte[None, None, :], mask=is_weight, other=0)
        low, high = (both & 15).to(tl.float32) - 8, (both >> 4).to(tl.float32) - 8
        scale = tl.reshape(tl.load(scales + vector // (32 // VECTOR), mask=is_weight, other=0), (BLOCK_O, THREADS))
        new = ()
        for row in tl.static_range(ROWS):
            part = tl.load(x + row * inputs + vector * VECTOR + i[None, None, :], mask=(row < rows) & is_inside, other=0)
            even, odd = tl.split(tl.reshape(part.to(tl.float32), (1, THREADS, VECTOR // 2, 2)))
            new = new + (sums[row] + (tl.sum(low * even, 2) + tl.sum(high * odd, 2)) * scale,)
        sums = new
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    for row in tl.static_range(ROWS):
        tl.store(y + row * outputs + o, tl.sum(sums[row], 1).to(y.dtype.element_ty), mask=(row < rows) & (o < outputs))


@triton.jit(do_not_specialize=["rows"])
def int8_dot_kernel(
    x, packed, scales, y, rows, outputs, inputs, ROWS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_X: tl.constexpr
):  # fmt: skip
    """The same as int8_kernel. Every int8 is exact in bfloat16, so the products are, too."""
    o, row = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O), tl.arange(0, ROWS)
    packed += o[:, None].to(tl.int64) * inputs
    x += row[None] * inputs
    sums = tl.zeros((BLOCK_O, ROWS), tl.float32)
    for start in range(0, inputs, BLOCK_X):
        column = start + tl.arange(0, BLOCK_X)
        w = tl.load(packed + column[None], mask=(o < outputs)[:, None] & (column < inputs)[None], other=0)
        part = tl.load(x + column[:, None], mask=(row < rows)[None] & (column < inputs)[:, None], other=0)
        sums = tl.dot(w.to(part.dtype), part, sums)
    total = sums * tl.load(scales + o, mask=o < outputs, other=0)[:, None]
    is_output = (row < rows)[None] & (o < outputs)[:, None]
    tl.store(y + row[None] * outputs + o[:, None], total.to(y.dtype.element_ty), mask=is_output)


def row_count(rows: int) -> int:
    """The smallest power of two that is at least `rows`: a kernel is compiled for at most five numbers of rows."""
    return 1 << (rows - 1).bit_length()


def constants(x: Tensor) -> dict[str, int]:
    """The constants of int8_kernel or int4_kernel for these inputs."""
    return {
        "ROWS": row_count(len(x)),
        "BLOCK_O": BLOCK_O,
        "THREADS": THREADS,
        "VECTOR": BYTES_PER_LOAD // x.element_size(),
        "num_warps": NUM_WARPS,
    }


def launch(kernel: triton.JITFunction, x: Tensor, packed: Tensor, scales: Tensor, sizes: dict[str, int]) -> Tensor:
    x, y, outputs = x.contiguous(), x.new_empty(len(x), len(packed)), len(packed)
    # Triton starts a kernel on the current device, which may be another card than that of the tensors.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        kernel[triton.cdiv(outputs, sizes["BLOCK_O"]),](x, packed, scales, y, len(x), outputs, x.shape[1], **sizes)
    return y


# The functions below are operators of torch: torch.compile does not look inside them, and a CUDA graph can record them after
# their first use, in which Triton compiles the kernel.
torch.library.define("paligemma::int8_product", "(Tensor x, Tensor packed, Tensor scales) -> Tensor")
torch.library.define("paligemma::int4_product", "(Tensor x, Tensor packed, Tensor scales) -> Tensor")


@torch.library.impl("paligemma::int8_product", "default")
def int8_product(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """x[B, X] @ (packed * scales).T in the dtype of x; packed int8[O, X], scales float32[O, 1], 1 <= B <= MAX_ROWS."""
    if x.dtype is torch.bfloat16 and len(x) >= MIN_ROWS_FOR_DOT:
        sizes = {"ROWS": MAX_ROWS, "BLOCK_O": DOT_BLOCK_O, "BLOCK_X": DOT_BLOCK_X, "num_warps": 1}
        return launch(int8_dot_kernel, x, packed, scales, sizes)
    return launch(int8_kernel, x, packed, scales, constants(x))


@torch.library.impl("paligemma::int4_product", "default")
def int4_product(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """The same for int4 in the layout "rows": packed uint8[O, X / 2], scales float32[O, G]."""
    return launch(int4_kernel, x, packed, scales, constants(x))


@torch.library.register_fake("paligemma::int8_product")
@torch.library.register_fake("paligemma::int4_product")
def empty_product(x: Tensor, packed: Tensor, _scales: Tensor) -> Tensor:
    """A tensor with the shape and dtype of the result, for torch.compile."""
    return x.new_empty(len(x), len(packed))
