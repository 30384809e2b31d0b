"""kernel_check.py: a right library passes on every instruction set, and an error in any function is found."""

import math
import re
from pathlib import Path

import pytest
import torch

from paligemma.layers import compiling, kernel_check, kernel_tuning, kernels
from paligemma.layers.kernel_check import Comparison


def test_every_function_of_a_right_library_passes(variant):
    if variant is None:
        return
    sources = "".join(file.read_text() for file in compiling.SOURCE.parent.glob("*.h"))
    functions = set(re.findall(r'extern "C" .*?(\w+)\((?!\()', sources))
    errors = kernel_check.errors()
    assert set(errors) == functions - NOT_COMPARED and max(errors.values()) <= 1, errors


NOT_COMPARED = {"tuning_values", "rate_numbers", "rate_multiply", "rate_read"}  # they compute nothing for a model


CHANGED = [
    *("product", "int_quantize", "bf16_rms_norm", "bf16_layer_norm", "bf16_gate", "bf16_attend", "bf16_attend_many", "decode"),
    *("reduce_logits", "bf16_rms_norm_backward", "bf16_gate_backward"),
]


@pytest.mark.parametrize("error", ["one number", "NaN"])
@pytest.mark.parametrize("name", CHANGED)
def test_an_error_in_one_number_of_one_function_is_found(monkeypatch, name, error):
    if kernels.library() is None:
        return
    right = getattr(kernels, name)

    def wrong(*args, **more):
        y = right(*args, **more)
        changed = args[3] if name == "int_quantize" else y[0] if isinstance(y, tuple) else y  # args[3]: the scales
        numbers = changed.view(-1)[-min(30, changed.numel()) :]
        if error == "NaN" and numbers.is_floating_point():
            numbers[0] = float("nan")
        else:
            numbers[0] += (0.1 * numbers[0].abs().clamp(min=30 if len(numbers) < 30 else 3)).to(numbers.dtype)
        return y

    monkeypatch.setattr(kernels, name, wrong)
    assert max(kernel_check.errors().values()) > 1


def test_the_error_is_a_multiple_of_the_bound():
    exact, bound = torch.zeros(2, 3), torch.full((2, 3), 0.5)
    for found, error in (
        (torch.tensor([[0, 0, 0.25], [0, -0.5, 0]]), 1.0),
        (torch.zeros(3, 2), math.inf),
        (torch.full((2, 3), math.nan), math.inf),
    ):
        assert Comparison("f", found, exact, bound).error() == error


def test_random_numbers_of_the_program_are_not_disturbed():
    if kernels.library() is None:
        return
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    kernel_check.errors()
    assert torch.randn(3).equal(expected)


def test_the_program_prints_the_result(capsys, monkeypatch):
    if kernels.library() is None:
        return
    monkeypatch.setattr(kernels, "use", lambda _: None)
    monkeypatch.setattr(kernel_tuning, "choices", lambda: {"prefetch": 0})
    wrong = '"wrong results: bf16_gate (7 times the largest error)"'
    for changed, expected in (({}, 'null, "choices": {"prefetch": 0}'), ({"bf16_gate": 7.0}, wrong + ', "choices": {}')):
        monkeypatch.setattr(kernel_check, "errors", lambda changed=changed: {"bf16_gate": 0.5, "int8_product": 1.0} | changed)
        kernel_check.main(str(Path("any.so")), "1")
        assert capsys.readouterr().out == f'{{"reason": {expected}}}\n'
