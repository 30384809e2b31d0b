"""A fast way that differs from the plain way, or that fails, is not used again; the log has one line about it."""

import math
import threading

import pytest
import torch

from paligemma.checkpoints.weights import load_model
from paligemma.files import BUNDLED
from paligemma.gpu import self_check
from paligemma.gpu.self_check import FastWay, relative_difference, rounding_bound
from tests.tiny import draw

X = draw(3, 40)


@pytest.fixture
def way():
    way = FastWay("test kernels", 1e-2, "computing without them")
    yield way
    del self_check.WAYS["test kernels"]


class Calls:
    """A function that returns the same tensor each time and counts its calls."""

    def __init__(self, result):
        self.result, self.count = result, 0

    def __call__(self):
        self.count += 1
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result.clone()


def test_a_way_that_is_right_is_compared_once(way, caplog):
    fast, plain = Calls(X * 1.001), Calls(X)
    assert way.state == "unchecked"
    for _ in range(3):
        assert torch.equal(way.run(fast, plain), fast.result)
    assert (fast.count, plain.count, way.state, caplog.messages) == (3, 1, "on", [])


def test_a_way_that_differs_is_not_used_again_and_is_reported_once(way, caplog):
    fast, plain = Calls(X * 1.1), Calls(X)
    for _ in range(3):
        assert torch.equal(way.run(fast, plain), X)
    assert (fast.count, plain.count, way.state) == (1, 3, "off")
    assert caplog.messages == [
        "test kernels differ on cpu (relative difference 0.1, at most 0.01 was expected): computing without them. "
        "Please report the output of `paligemma doctor`."
    ]
    assert {"name": "test kernels", "state": "off", "reason": way.reason} in self_check.all_ways()


@pytest.mark.parametrize("error", [RuntimeError("no\nkernel"), AssertionError("no"), ImportError("no"), ValueError("no")])
def test_a_way_that_raises_anything_is_not_used_again(way, error, caplog):
    fast, plain = Calls(error), Calls(X)
    for _ in range(2):
        assert torch.equal(way.run(fast, plain), X)
    assert fast.count == 1 and way.state == "off"
    (line,) = caplog.messages
    assert line.startswith(f"test kernels fail ({type(error).__name__}: no): computing without them. Please")


def test_a_way_that_fails_later_is_not_used_again(way):
    assert torch.equal(way.run(Calls(X), Calls(X)), X) and way.state == "on"
    assert torch.equal(way.run(Calls(RuntimeError("no")), Calls(X)), X) and way.state == "off"


def test_memory_that_ran_out_is_no_fault_of_the_way(way):
    with pytest.raises(torch.OutOfMemoryError):
        way.run(Calls(torch.OutOfMemoryError("no")), Calls(X))
    assert way.state == "unchecked"


def test_an_error_of_the_plain_way_is_raised(way):
    with pytest.raises(ValueError, match="plain"):
        way.run(Calls(X), Calls(ValueError("plain")))


def test_turning_off_a_way_is_logged_once_and_asks_for_no_report_where_nothing_is_wrong(way, caplog):
    for reason in ("need a compiler", "need another compiler"):
        way.turn_off(reason)
    assert caplog.messages == ["test kernels need a compiler: computing without them."]
    assert way.reason == "need a compiler"


def test_each_key_is_checked_once(way):
    plain = Calls(X)
    for key in ("few rows", "many rows", "few rows"):
        way.run(Calls(X), plain, key=key)
    assert plain.count == 2
    assert torch.equal(way.run(Calls(-X), plain, key="other"), X)
    assert torch.equal(way.run(Calls(-X), plain, key="few rows"), X)  # off for all keys


def test_a_call_may_have_another_bound(way):
    way.run(Calls(X * 1.1), Calls(X), bound=0.2)
    assert way.state == "on"
    way.reset()
    way.run(Calls(X * 1.001), Calls(X), bound=1e-4)
    assert way.state == "off"


def test_relative_difference():
    nan, inf = math.nan, math.inf
    pairs = [
        ([3.0, 4], [3, 4], 0),
        ([3.0, 5], [3, 4], 0.2),
        ([0.0, 0], [3, 4], 1),
        ([1.0, 0], [0, 0], inf),
        ([3.0, nan], [3, 4], inf),
        ([3.0, 4], [3, inf], inf),
        ([inf, 4], [-inf, 4], inf),
        ([nan, 4], [inf, 4], inf),
        ([3.0, 4, 5], [3, 4], inf),
        ([nan, inf, -inf, 5], [nan, inf, -inf, 4], 0.25),  # both ways overflow
        ([0.0, nan], [0, nan], None),  # nothing can be compared
    ]
    for found, expected, difference in pairs:
        result = relative_difference(torch.tensor(found), torch.tensor(expected))
        assert result == (None if difference is None else pytest.approx(difference)), (found, expected)


def test_a_result_without_a_number_leaves_the_way_unchecked(way):
    nothing, fast = torch.full((2,), torch.nan), Calls(X * 1.1)
    assert way.run(Calls(nothing), Calls(nothing)).isnan().all() and way.state == "unchecked"
    assert torch.equal(way.run(fast, Calls(X)), X) and way.state == "off"


def test_threads_report_a_difference_once(way, caplog):
    together = threading.Barrier(4)

    def fast():
        together.wait(timeout=30)  # all threads are inside the first check
        return -X

    results = []
    threads = [threading.Thread(target=lambda: results.append(way.run(fast, Calls(X)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(result, X) for result in results) and len(caplog.messages) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_rounding_stays_far_below_the_bound_and_a_wrong_token_exceeds_it(dtype):
    model = load_model(BUNDLED, dtype=dtype)
    layers = model.config.text_config.num_hidden_layers
    ids = torch.arange(3, 40)[None]
    rounded, wrong = model(ids)[:, -1], model(ids.clone().index_fill_(1, torch.tensor([36]), 99))[:, -1]
    exact = model.float()(ids)[:, -1]
    assert relative_difference(rounded, exact) < rounding_bound(dtype, layers) / 2
    assert relative_difference(wrong, exact) > 2 * rounding_bound(dtype, layers)
