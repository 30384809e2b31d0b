"""kernel_check.py: a right library passes on every instruction set, and an error in any function is found."""

import re
from pathlib import Path

import pytest
import torch

from paligemma.layers import compiling, kernel_check, kernels


def test_every_function_of_a_right_library_passes(variant):
    if variant is None:
        return
    sources = "".join(file.read_text() for file in compiling.SOURCE.parent.glob("*.h"))
    functions = set(re.findall(r'extern "C" .*?(\w+)\((?!\()', sources))
    errors = kernel_check.errors()
    assert set(errors) == functions - NOT_COMPARED and max(errors.values()) <= 1, errors


NOT_COMPARED = {
    *("tuning_values", "rate_numbers", "rate_multiply", "rate_read"),  # they compute nothing for a model
    *("bf16_decode", "int8_decode", "int4_decode", "logits_argmax", "logits_logsumexp"),
}


CHANGED = ["product", "bf16_rms_norm", "bf16_layer_norm", "bf16_gate", "bf16_attend", "bf16_attend_many", "int_quantize"]


@pytest.mark.parametrize("error", ["one number", "NaN", "a transposed shape"])
@pytest.mark.parametrize("name", CHANGED)
def test_an_error_in_one_number_of_one_function_is_found(monkeypatch, name, error):
    if kernels.library() is None:
        return
    right = getattr(kernels, name)

    def wrong(*args, **more):
        y = right(*args, **more)
        changed = args[3] if name == "int_quantize" else y  # the scales
        if error == "a transposed shape":
            return y.mT if y is not None else changed.zero_()
        with torch.no_grad():
            last = changed.flatten()[-30]
            changed.view(-1)[-30] = float("nan") if error == "NaN" else last + 0.1 * last.abs().clamp(min=3)
        return y

    monkeypatch.setattr(kernels, name, wrong)
    assert max(kernel_check.errors().values()) > 1


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
    for changed, expected in (({}, "null"), ({"bf16_gate": 7.0}, '"wrong results: bf16_gate (7 times the largest error)"')):
        monkeypatch.setattr(kernel_check, "errors", lambda changed=changed: {"bf16_gate": 0.5, "int8_product": 1.0} | changed)
        kernel_check.main(str(Path("any.so")), "1")
        assert capsys.readouterr().out == f'{{"reason": {expected}}}\n'
