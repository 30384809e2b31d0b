"""How far a result may be from the exact one by its arithmetic alone (float64 of the same numbers counts as exact).

Nothing here was measured: a bound that one processor's results have suggested fails on the next, which sums in another order.
The bound of a matrix product is the one that the kernels have to keep before they are used, kernel_check.product_bound.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from paligemma.layers.kernel_check import UNIT, product_bound  # noqa: F401  (tests import both from here)


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


class Float16Roundings(TorchFunctionMode):
    """Inside, a model in float64 marks every number that float16.py rounds to float16: `error_bound` says what that may change.

    These are the inputs and outputs of all matrix products and convolutions, queries, keys, values and weights of attention, and
    what attention returns. Everything else is float32 there, whose rounding is 2^13 times smaller. A number x is rounded by at
    most 2^-11 |x|. If it is tiny, float16 has fewer bits: its steps are 2^-24 then, times the power of two by which the row was
    divided.

    Args:
        with_weights: whether the matrices are rounded, too, as those that are dequantised are.
    """

    def __init__(self, with_weights: bool = False):
        super().__init__()
        self.with_weights = with_weights
        self.rounded: list[tuple[Tensor, Tensor]] = []  # the number, and how far it may be off

    def mark(self, x: Tensor, size: Tensor | float = 1.0) -> Tensor:
        """x, noted as rounded; `size` is the largest magnitude of its row, if the row is scaled."""
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        self.rounded.append((x, UNIT[torch.float16] * x.detach().abs() + 2.0**-25 * size))
        return x

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias = (*args, None, None)[:3]
            size = x.detach().abs().amax(-1, keepdim=True).clamp(min=1)
            y = self.mark(F.linear(self.mark(x, size), self.mark(weight) if self.with_weights else weight), size)
            return y if bias is None else y + bias
        if func is F.conv2d:
            return self.mark(func(self.mark(args[0]), *args[1:], **kwargs))
        if func is F.scaled_dot_product_attention:
            (q, k, v), mask, scale = args, kwargs.get("attn_mask"), kwargs.get("scale") or args[0].shape[-1] ** -0.5
            scores = self.mark(q * scale) @ self.mark(k).transpose(-1, -2)
            scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
            return self.mark(self.mark(scores.softmax(-1)) @ self.mark(v))
        if func in (Tensor.__matmul__, Tensor.matmul):
            return self.mark(func(self.mark(args[0]), self.mark(args[1])))
        return func(*args, **kwargs)

    def error_bound(self, number: Tensor) -> float:
        """How far rounding to float16 may move a number that was computed inside.

        Each rounding counts with its largest size and in its worst direction: the sum of |derivative| * error. A tenth is added
        for the terms of second order and for float32.
        """
        numbers, errors = zip(*self.rounded, strict=True)
        gradients = torch.autograd.grad(number, numbers, retain_graph=True, allow_unused=True)
        pairs = ((g, e) for g, e in zip(gradients, errors, strict=True) if g is not None)
        return 1.1 * sum((g.abs() * e).sum().item() for g, e in pairs) + UNIT[torch.float32] * abs(number.item())


def gap(a: Tensor, b: Tensor) -> float:
    """The norm of a - b as a share of the norm of b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
