"""fast_logits.py: argmax and logsumexp by our kernels are those of torch."""

import pytest
import torch

from paligemma.layers import fast_logits, kernels
from tests.bounds import UNIT

INF, NAN = torch.inf, torch.nan


@pytest.fixture(autouse=True)
def logits_of_any_number(monkeypatch):
    monkeypatch.setattr(fast_logits, "MIN_LOGITS", 0)


@pytest.mark.parametrize("size", [1, 7, 16, 4096, 4100, 30011])  # less than a vector; whole and broken parts of 4096
@pytest.mark.parametrize("scale", [0.01, 5.0, 300.0])
@pytest.mark.usefixtures("variant")
def test_they_are_argmax_and_logsumexp(size, scale):
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(size)) * scale
    assert torch.equal(fast_logits.argmax(logits), logits.argmax(-1))
    exact = logits.double().logsumexp(-1)
    # Sums of at most 256 numbers per lane in float32, whose terms are e^(x - highest) of a rounded difference; then the result
    # is rounded.
    widest = (logits.amax(-1) - logits.amin(-1)).clamp(max=90)
    bound = (300 + 2 * widest + 2 * exact.abs()) * UNIT[torch.float32]
    assert ((fast_logits.logsumexp(logits) - exact).abs() <= bound).all()


@pytest.mark.usefixtures("variant")
def test_of_equal_logits_the_first_is_taken_and_suppressed_ones_add_nothing():
    logits = torch.full((2, 10000), -INF)
    logits[0, [9999, 5000, 5001]] = 2.0
    logits[1, 4096:] = 0.0
    assert fast_logits.argmax(logits).tolist() == [5000, 4096]
    exact = logits.double().logsumexp(-1)
    torch.testing.assert_close(fast_logits.logsumexp(logits).double(), exact, rtol=4 * UNIT[torch.float32], atol=0)


@pytest.mark.parametrize("place", [0, 4095, 9000])
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.usefixtures("variant")
def test_logits_that_are_not_finite_are_seen(bad, place):
    logits = torch.zeros(2, 9001)
    logits[1, place] = bad
    assert fast_logits.logsumexp(logits).isfinite().tolist() == [True, False]
    assert 0 <= fast_logits.argmax(logits)[1] < 9001
    logits[1] = NAN if bad != bad else -INF
    assert fast_logits.logsumexp(logits).isfinite().tolist() == [True, False]
    assert 0 <= fast_logits.argmax(logits)[1] < 9001


def test_small_models_and_gradients_use_torch(monkeypatch):
    monkeypatch.setattr(kernels, "reduce_logits", lambda *_: 1 / 0)
    logits = torch.randn(2, 10)
    assert torch.equal(fast_logits.logsumexp(logits.double()), logits.double().logsumexp(-1))
    assert fast_logits.logsumexp(logits.requires_grad_()).requires_grad
    monkeypatch.setattr(fast_logits, "MIN_LOGITS", 2**16)
    assert torch.equal(fast_logits.argmax(logits.detach()), logits.argmax(-1))
