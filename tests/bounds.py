"""How far a result may be from the exact one by its arithmetic alone (float64 of the same numbers counts as exact).

Nothing here was measured: a bound that one processor's results have suggested fails on the next, which sums in another order.
Source: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1: a sum of n products in any order is off by at most
n u / (1 - n u) times the sum of their sizes, u being half the distance from 1 to the next larger number.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def product_bound(
    x: Tensor, weight: Tensor, result: torch.dtype, *, factors: torch.dtype | None = None, group: int = 0
) -> Tensor:
    """The largest error of x @ weight.T, float64[..., N], with sums in float32.

    Args:
        x, weight: as they are before the product: [..., K], [N, K].
        result: what the sums are rounded to.
        factors: what each factor, and what is made of them on the way, may be rounded to before it is multiplied.
        group: inputs that are rounded to 127 steps of the largest of them, as the kernels for int8 and int4 do.
    """
    x, weight = x.double(), weight.double()
    sizes, k = x.abs() @ weight.abs().T, x.shape[-1]
    bound = 1.01 * (k + 8) * UNIT[torch.float32] * sizes
    if factors is not None:
        bound = bound + 3 * UNIT[factors] * sizes
    if group:
        missing = -k % group
        groups = torch.nn.functional.pad(x, (0, missing)).unflatten(-1, (-1, group)).abs().amax(-1)  # [..., G]
        steps = 0.51 * groups / 127
        bound = bound + steps @ torch.nn.functional.pad(weight, (0, missing)).unflatten(-1, (-1, group)).abs().sum(-1).T
    return bound + UNIT[result] * ((x @ weight.T).abs() + bound) + 1e-30


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Inside, a model in float64 computes in float64 throughout: what models raise to float32 is raised to float64."""
    with patch.object(Tensor, "float", Tensor.double), torch.no_grad():
        yield


def float32_bound(model: nn.Module, batch: dict) -> float:
    """How far apart the logits of two float32 computations of a model may be that sum in different orders.

    The error of ours, at any token that is no padding, is one draw of what rounding does to this model; a computation in another
    order draws another one of the same size, so the two are no further apart than twice that but for chance: a factor of six.
    """
    with torch.no_grad():
        ours = model(**batch)
    with exact_arithmetic():
        exact = copy.deepcopy(model).double()(**batch)
    is_token = batch["attention_mask"].bool()
    error = (ours - exact)[is_token].abs().max().item()
    assert error < 2**10 * UNIT[torch.float32] * exact[is_token].abs().max().item(), "this is more than rounding."
    return 6 * error


def assert_within(result: Tensor, exact: Tensor, bound: Tensor) -> None:
    """Every number of `result` is as near to `exact` as `bound` says."""
    assert result.shape == exact.shape
    gap = (result.double() - exact).abs()
    worst = (gap / bound).max().item() if gap.numel() else 0.0
    assert worst <= 1, f"the largest error is {worst:.3g} times the one that arithmetic allows."
