"""The kernels of triton_products.py compute the product, for every number of rows, odd sizes and each dtype (interpreted)."""

import itertools

import pytest

from paligemma.gpu.packed_products import MAX_ROWS
from tests.gpu.apart import run_apart

KINDS = {"int8": 64, "int4": 32}  # and the number of which their inputs are a multiple
DTYPES = ["float32", "float16", "bfloat16"]


def compute(arguments):
    return zip(arguments, run_apart("tests.gpu.interpreted", "cases", arguments, TRITON_INTERPRET="1"), strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_rows_is_multiplied_within_rounding(kind):
    arguments = [(kind, rows, 6, 5 * KINDS[kind], dtype) for rows, dtype in itertools.product(range(1, MAX_ROWS + 1), DTYPES)]
    kernels = set()
    for (_, rows, outputs, _, dtype), found in compute(arguments):
        assert found["shape"] == [rows, outputs] and found["dtype"] == f"torch.{dtype}"
        assert found["share"] <= 1, (rows, dtype)
        kernels.add((found["kernel"], dtype == "bfloat16" and rows >= 5))
    # The tensor cores multiply many rows of bfloat16 with int8.
    assert kernels == {(f"{kind}_kernel", False), ("int8_dot_kernel" if kind == "int8" else "int4_kernel", True)}


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_that_fill_blocks_exactly_partly_or_several_times(kind):
    """A block takes up to 1024 inputs; 4320 is the padded width of the vision tower's MLP."""
    sizes = [(1, KINDS[kind]), (4, 512), (5, 1024), (21, 1024 + KINDS[kind]), (3, 4320 // 64 * 64 + KINDS[kind])]
    arguments = [
        (kind, rows, *size, dtype) for rows, dtype in ((1, "float32"), (2, "float16"), (6, "bfloat16")) for size in sizes
    ]
    for argument, found in compute(arguments):
        assert found["share"] <= 1, argument


def test_nothing_outside_is_written():
    assert run_apart("tests.gpu.interpreted", "nothing_outside_is_written", TRITON_INTERPRET="1")
