"""cpp/many_rows.h: products of many rows with bfloat16 weights. The variants are libraries for other processors."""

import pytest
import torch

from paligemma.layers import kernels
from paligemma.layers.kernel_check import activated
from tests.bounds import UNIT, assert_within, product_bound


def random_matrix(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    return (torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=[1, 3])
def threads(request):
    """With three threads, the rows of small matrices are divided among them."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"),
    [
        (10, 1, 2),  # the smallest matrix
        (12, 64, 32),  # one panel
        (13, 79, 34),  # the second panel has one whole vector of outputs; one pair of inputs is left
        (41, 200, 270),  # part of a vector of outputs
        (23, 33, 4304),  # several blocks of inputs
        (131, 17, 46),  # parts of rows, if there are several threads
        (1031, 17, 46),  # several blocks of rows
    ],
)
def test_many_rows_are_multiplied(rows, outputs, inputs, dtype, variant):
    if variant is None:
        return
    weight, bias, x = random_matrix(outputs, inputs), random_matrix(1, outputs, seed=1)[0], torch.randn(rows, inputs).bfloat16()
    exact, bound = x.double() @ weight.double().T, product_bound(x, weight, dtype)
    assert_within(kernels.product("bf16", x, [(weight, None, outputs)], dtype), exact, bound)
    exact = exact + bias.double()
    bound = bound + 2 * UNIT[torch.float32] * (exact.abs() + bound) + UNIT[dtype] * exact.abs()
    assert_within(kernels.product("bf16", x, [(weight, None, outputs, bias)], dtype), exact, bound)


@pytest.mark.parametrize("inputs", [96, 38])
@pytest.mark.parametrize("activation", ["gelu", "gated"])
def test_activations_are_those_of_the_sums(activation, inputs, variant):
    if variant is None:
        return
    x, matrices, sums = torch.randn(20, inputs).bfloat16(), [], []
    for seed in range(2 if activation == "gated" else 1):
        weight, bias = random_matrix(75, inputs, seed), random_matrix(1, 75, seed + 2)[0]
        exact = x.double() @ weight.double().T + bias.double()
        matrices.append((weight, None, 75, bias))
        sums.append((exact, product_bound(x, weight, torch.float32) + 2 * UNIT[torch.float32] * exact.abs()))
    exact, bound = activated(sums, activation)
    bound = bound + UNIT[torch.float32] * (exact.abs() + bound)
    assert_within(kernels.product("bf16", x, matrices, torch.float32, activation), exact, bound)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"),
    [
        (1, 1, 2),  # the smallest matrix
        (12, 64, 32),  # one panel
        (13, 79, 34),  # part of a panel
        (23, 33, 4304),  # several blocks of inputs
        (131, 17, 46),  # parts of rows, if there are several threads
        (1031, 80, 46),  # several blocks of rows
    ],
)
def test_a_transposed_matrix_is_multiplied(rows, outputs, inputs, dtype, variant):
    if variant is None:
        return
    weight, x = random_matrix(inputs, outputs), torch.randn(rows, inputs).bfloat16()
    y = kernels.product("bf16", x, [(weight, None, outputs)], dtype, is_transposed=True)
    assert_within(y, x.double() @ weight.double(), product_bound(x, weight.T, dtype))


def test_several_matrices_give_the_same_as_one_by_one(variant):
    if variant is None:
        return
    x = torch.randn(21, 96).bfloat16()
    matrices = [(random_matrix(n, 96, n), None, n, random_matrix(1, n)[0]) for n in (130, 7, 64)]
    together = kernels.product("bf16", x, matrices, torch.bfloat16)
    alone = [kernels.product("bf16", x, [matrix], torch.bfloat16) for matrix in matrices]
    assert torch.equal(together, torch.cat(alone, dim=-1))  # the same sums in the same order


@pytest.mark.parametrize("inputs", [64, 70])
def test_a_number_that_is_not_finite_stays_in_its_row_and_its_output(inputs, variant):
    if variant is None:
        return
    x, weight = torch.randn(50, inputs).bfloat16(), random_matrix(70, inputs)
    x[17, -1], x[30, 0], weight[66, -1] = float("nan"), float("inf"), float("nan")
    y = kernels.product("bf16", x, [(weight, None, 70)], torch.bfloat16)
    is_bad = torch.zeros(50, 70, dtype=torch.bool)
    is_bad[17], is_bad[30], is_bad[:, 66] = True, True, True
    assert torch.equal(~y.isfinite(), is_bad)


def test_a_row_is_the_same_among_few_and_among_many(variant):
    """The last rows of a block are in a smaller tile, which sums in the same order."""
    if variant is None:
        return
    x, weight = torch.randn(35, 64).bfloat16(), random_matrix(70, 64)
    whole = kernels.product("bf16", x, [(weight, None, 70)], torch.float32)
    for start in (1, 5, 17):
        assert torch.equal(kernels.product("bf16", x[start:], [(weight, None, 70)], torch.float32), whole[start:])
