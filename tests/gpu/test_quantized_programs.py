"""The bundled checkpoint in int8 and int4 on simulated GPUs: the answers of the CPU, whatever multiplies the weights there."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import paligemma
from paligemma.gpu import packed_products
from tests.gpu.pretend import count, kernels
from tests.gpu.test_packed_products import AMPERE, TURING, fresh, int4_product_of_cuda, on_gpu
from tests.gpu.test_programs import VERBS, assert_same_answer

__all__ = ["fresh", "on_gpu"]  # fixtures; `fresh` is used by every test

WAYS = {  # the operator that multiplies few rows
    ("cuda:0", TURING, "int8"): "paligemma::int8_product",
    ("cuda:0", TURING, "int4"): "paligemma::int4_product",
    ("cuda:0", AMPERE, "int8"): "paligemma::int8_product",
    ("cuda:0", AMPERE, "int4"): "_weight_int4pack_mm",
    ("mps", None, "int8"): "_weight_int8pack_mm",
    ("mps", None, "int4"): "_weight_int4pack_mm",
}
ASKED = ("caption", "detect", "look")


def remembered(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same product, which unpacks each matrix only once: as the product with the unit matrix."""
    matrices: dict[tuple[int, int], Tensor] = {}

    def multiply(x: Tensor, packed: Tensor, group: int, scales: Tensor) -> Tensor:
        key = packed.data_ptr(), scales.data_ptr()
        if key not in matrices:
            matrices[key] = product(torch.eye(x.shape[1], dtype=x.dtype), packed, group, scales).double()
        return (x.double() @ matrices[key]).to(x.dtype)

    return multiply


@pytest.fixture(scope="module")
def on_cpu():
    """The answers by kind and verb."""
    models = {kind: paligemma.load(device="cpu", dtype="fp32", quantize=kind) for kind in ("int8", "int4")}
    return {kind: {verb: VERBS[verb](model) for verb in ASKED} for kind, model in models.items()}


@pytest.mark.parametrize(("device", "capability", "kind"), WAYS)
def test_answers_of_quantised_models(device, capability, kind, on_cpu, on_gpu):
    gpu = on_gpu(device, late_copies=True, **({} if capability is None else {"capability": capability}))
    if device == "cuda:0":
        gpu.stand_ins["_weight_int4pack_mm"] = remembered(int4_product_of_cuda)
    model = paligemma.load(device=device, dtype="fp32" if capability == TURING else None, quantize=kind)
    for verb in ASKED:
        assert_same_answer(VERBS[verb](model), on_cpu[kind][verb])
    assert gpu.mismatches == [] and packed_products.TRITON.is_on and packed_products.TORCH.is_on
    assert kernels(gpu.events)[WAYS[device, capability, kind]] > 100
    assert (count(gpu.events, "replay") > 5) == (device == "cuda:0")
