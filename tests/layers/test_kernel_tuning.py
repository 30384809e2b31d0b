"""kernel_tuning.py: a rule gives way only to what is clearly faster, and noise does not decide."""

import itertools
import random

import pytest
import torch

from paligemma.layers import fast_cpu, kernel_tuning, kernels
from paligemma.layers.kernel_tuning import NO_LIMIT, ROUNDS, clearly_fastest

CALLS = 1 + 2 * ROUNDS  # of each way: one that is not measured, and the rounds


class Clock:
    """Time that passes only within the ways, each of whose calls takes the next of its times."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def way(self, times):
        times = iter(times)

        def run():
            self.now += next(times)

        return run


def fastest(**times):
    clock = Clock()
    return clearly_fastest({name: clock.way(each) for name, each in times.items()}, clock)


def test_what_is_clearly_faster_in_both_halves_is_chosen():
    steady = [1.0] * CALLS
    assert fastest(rule=steady, slower=[1.3] * CALLS, faster=[0.9] * CALLS, fastest=[0.8] * CALLS) == "fastest"
    assert fastest(rule=steady, little=[0.96] * CALLS) == "rule"


@pytest.mark.parametrize("disturbed", range(1, CALLS))
def test_one_round_changes_nothing(disturbed):
    steady = [1.0] * CALLS
    once = [100.0 if call == disturbed else 1.0 for call in range(CALLS)]
    assert fastest(rule=once, same=steady) == "rule"
    assert fastest(rule=steady, faster=[0.9 * time for time in once]) == "faster"


def test_another_program_that_disturbs_the_rule_in_one_half_changes_nothing():
    for half in (range(1, ROUNDS + 1), range(ROUNDS + 1, CALLS)):
        assert fastest(rule=[2.0 if call in half else 1.0 for call in range(CALLS)], same=[1.0] * CALLS) == "rule"


def test_a_machine_that_becomes_faster_or_slower_meanwhile_changes_nothing():
    for drift in (0.9, 1.1):
        calls = [drift**call for call in range(CALLS)]
        assert fastest(rule=calls, same=[time * drift**0.25 for time in calls]) == "rule"


def test_noise_changes_nothing():
    draw = random.Random(0)
    choices = [fastest(**{name: (draw.uniform(1, 2) for _ in range(CALLS)) for name in ("rule", *"abcd")}) for _ in range(1000)]
    assert choices.count("rule") > 990


@pytest.mark.parametrize(
    ("rule", "winners", "limit"),
    [
        (NO_LIMIT, {16: True, 266: True}, NO_LIMIT),
        (NO_LIMIT, {16: True, 266: False}, 265),
        (NO_LIMIT, {16: False, 266: False}, 15),
        (NO_LIMIT, {16: False, 266: True}, NO_LIMIT),
        (4, {16: False, 266: False}, 4),
        (4, {16: True, 266: False}, 16),
        (4, {16: True, 266: True}, NO_LIMIT),
    ],
)
def test_the_number_of_rows_follows_the_winners(monkeypatch, rule, winners, limit):
    asked = iter(sorted(winners.items(), reverse=rule > 16))

    def choose(ways):
        rows, winner = next(asked)
        assert next(iter(ways)) is (rows <= rule)
        return winner

    monkeypatch.setattr(kernel_tuning, "clearly_fastest", choose)
    monkeypatch.setattr(kernel_tuning, "WIDTH", 64)
    assert kernel_tuning.rows_of_ours(torch.zeros(64 * 64, dtype=torch.int16), rule) == limit


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(kernel_tuning, "WIDTH", 128)
    monkeypatch.setattr(kernel_tuning, "BYTES", 2**16)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("takes_rule", [True, False])
def test_only_what_differs_from_the_rules_is_kept(monkeypatch, takes_rule):
    """Each way is also called for real: a call with wrong arguments would fail here."""
    if kernels.library() is None:
        return
    before = kernels.tuning(kernels.library()).prefetch

    def choose(ways):
        for way in ways.values():
            way()
        return next(itertools.islice(ways, 0 if takes_rule else 1, None))

    monkeypatch.setattr(kernel_tuning, "clearly_fastest", choose)
    assert set(kernel_tuning.choices()) == (set() if takes_rule else {"prefetch", "bf16_rows", "attention"})
    assert kernels.tuning(kernels.library()).prefetch == before


def test_choices_decide_which_operator_computes(monkeypatch):
    if kernels.library() is None:
        return
    x, w = torch.ones(20, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16)
    for rows, attention in ((19, 0), (20, 1)):
        choices = {"bf16_rows": rows, "attention": attention}
        monkeypatch.setattr(kernels, "LOADED", [kernels.Loaded(kernels.library(), "avx2", {}, choices)])
        assert fast_cpu.suits_kernel(x, w) is (rows == 20)
        assert fast_cpu.suits_kernel_attention(x, ()) is bool(attention)
