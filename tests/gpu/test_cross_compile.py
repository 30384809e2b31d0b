"""Kernels become machine code for cards that are not here, read each weight once, and fit into the shared memory of a card."""

import pytest

from tests.gpu.apart import run_apart

KB = 1024
SHARED = {75: 64 * KB, 80: 163 * KB, 89: 99 * KB, 90: 227 * KB}  # that one block of threads may have
LEAST = 99 * KB  # of the cards that have our kernels, except Turing's 64 KB, which is tested separately
CALLED = [  # kernel, rows, dtype, capability: what devices.PROFILES and packed_products.py lead to
    *(("int8_kernel", rows, dtype, 75) for rows in (1, 2, 4, 8, 16) for dtype in ("float16", "float32")),
    *(("int4_kernel", rows, dtype, 75) for rows in (1, 2, 4, 8, 16) for dtype in ("float16", "float32")),
    *(("int8_kernel", rows, "bfloat16", capability) for rows in (1, 4) for capability in (80, 89, 90)),
    *(("int8_kernel", 16, "float16", capability) for capability in (80, 89, 90)),
    *(("int8_dot_kernel", 16, "bfloat16", capability) for capability in (80, 89, 90)),
]


def test_our_kernels_compile_and_read_every_weight_once():
    found = run_apart("tests.gpu.cross_compile", "product_kernels", CALLED)
    for (kernel, rows, dtype, capability), made in zip(CALLED, found, strict=True):
        name = f"{kernel} for {rows} rows of {dtype} on sm_{capability}"
        assert made["cubin"] > 0, name
        assert made["shared"] <= min(SHARED[capability], LEAST), name
        # One loop over the inputs with one load, which takes exactly the weights of the step: all are read, and none twice.
        block_o, block_x = made["block"]
        per_byte = 2 if kernel == "int4_kernel" else 1
        (shape,) = made["loads of weights in the loops"]
        assert made["loops"] == 1 and made["loads of weights outside"] == 0, name
        num_weights = per_byte
        for size in shape:
            num_weights *= size
        assert num_weights == block_o * block_x, name


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_the_compiled_step_has_ten_kernels_per_layer_which_compile_for_every_card(family):
    """Full width, two layers. Besides, there are the embedding with the first norm, the last norm, and the logits."""
    found = run_apart("tests.gpu.cross_compile", "step_kernels", family, 2, list(SHARED))
    assert found["by inductor"] <= 2 * 10 + 5
    assert found["by libraries"] == 2 * 2  # queries times keys, weights times values
    for capability, shared in found["shared"].items():
        assert len(shared) >= 15
        assert max(shared.values()) <= min(SHARED[int(capability)], LEAST)


def test_capped_attention_fits_into_99_kb_with_the_block_sizes_of_the_profile():
    small = run_apart("tests.gpu.cross_compile", "capped_attention_kernel", 89)
    assert small["shared"] <= SHARED[89] and small["options"]
    torchs = run_apart("tests.gpu.cross_compile", "capped_attention_kernel", 89, 1024, {})
    assert torchs["shared"] > SHARED[89]  # with torch's own block sizes the kernel could not start
