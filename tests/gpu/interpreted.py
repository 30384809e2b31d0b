"""Runs the kernels of triton_products.py on the CPU, by Triton's interpreter, which computes with numpy. For run_apart only.

TRITON_INTERPRET must be set before Triton is imported.
"""

import os

import torch

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from paligemma.gpu import triton_products
from paligemma.layers import int_formats
from tests.bounds import product_bound

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
plain_dot, plain_cast = interpreter.InterpreterBuilder.create_dot, interpreter.InterpreterBuilder.cast_impl


def floats(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
    """bfloat16 as float32. The interpreter holds it as 16-bit integers."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def cast(builder: interpreter.InterpreterBuilder, handle: interpreter.TensorHandle, to: tl.dtype) -> interpreter.TensorHandle:
    """A cast that rounds to bfloat16 as a GPU does. The interpreter truncates floats, and treats integers as bit patterns."""
    handle = floats(handle)
    if to.scalar != tl.bfloat16:
        return plain_cast(builder, handle, to)
    rounded = torch.from_numpy(np.ascontiguousarray(handle.data.astype(np.float32))).bfloat16()
    return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)


interpreter.InterpreterBuilder.create_dot = lambda builder, a, b, *rest: plain_dot(builder, floats(a), floats(b), *rest)
interpreter.InterpreterBuilder.cast_impl = cast


def case(kind: str, rows: int, outputs: int, inputs: int, dtype: str) -> dict:
    """One product: the largest error as a share of product_bound, the kernel that ran, and the dtype and shape of the result."""
    torch.manual_seed(rows + outputs)
    q, scales = int_formats.round_rows(torch.randn(outputs, inputs) * 0.02, kind)
    scales, x = scales.float(), torch.randn(rows, inputs).to(DTYPES[dtype])
    used = []
    launch = triton_products.launch
    triton_products.launch = lambda kernel, *arguments: used.append(kernel.__name__) or launch(kernel, *arguments)
    y = getattr(torch.ops.paligemma, f"{kind}_product")(x, int_formats.to_rows(q, kind), scales)
    triton_products.launch = launch
    weight = int_formats.dequantize(q, scales.double(), torch.float64)
    excess = (y.double() - x.double() @ weight.T).abs() / product_bound(x, weight, DTYPES[dtype])
    return {"share": excess.max().item(), "kernel": used[0], "dtype": str(y.dtype), "shape": list(y.shape)}


def cases(arguments: list) -> list[dict]:
    return [case(*each) for each in arguments]


def nothing_outside_is_written() -> bool:
    """The kernels write the rows and outputs that exist, and nothing after them."""
    for kind in int_formats.KINDS:
        q, scales = int_formats.round_rows(torch.randn(21, 64), kind)
        packed, x = int_formats.to_rows(q, kind), torch.randn(3, 64)
        for kernel, sizes in (
            (getattr(triton_products, f"{kind}_kernel"), triton_products.constants(x)),
            (triton_products.int8_dot_kernel, {"ROWS": 16, "BLOCK_O": 16, "BLOCK_X": 256}),
        ):
            if kernel is triton_products.int8_dot_kernel and kind == "int4":
                continue
            y = torch.full((5, 21), 7.0)
            grid = (-(-21 // sizes["BLOCK_O"]),)
            kernel[grid](x, packed, scales.float(), y, 3, 21, 64, **sizes)
            expected = x.double() @ int_formats.dequantize(q, scales.double(), torch.float64).T
            if not ((y[3:] == 7).all() and torch.allclose(y[:3].double(), expected, rtol=1e-3, atol=1e-4)):
                return False
    return True
