"""rates.h: the functions with which roofline.py measures the machine do as much as they say. No time is measured here."""

import itertools

import pytest
import torch

from paligemma import roofline
from paligemma.layers import instruction_sets, kernels

OWN = {torch.float32: None, torch.bfloat16: "avx512_bf16", torch.int8: "avx2"}  # the flag of a processor's own instruction


def ways(rates) -> list[int]:
    """The numbers of the instructions; none without a compiler."""
    return list(itertools.takewhile(lambda way: rates.rate_numbers(way) >= 0, itertools.count() if rates else ()))


def test_products_in_registers_are_all_computed(variant):
    """Every factor is 1, so the sum of the products is their number, and the sums of the most steps are still exact."""
    for way in ways(variant):
        once = variant.rate_multiply(way, 1, 1)
        assert variant.rate_multiply(way, roofline.STEPS, 1) == roofline.STEPS * once
        assert variant.rate_multiply(way, 5, 3) == 3 * 5 * once


@pytest.mark.parametrize("dtype", [dtype for dtype, flag in OWN.items() if not flag or flag in instruction_sets.cpu_flags()])
def test_the_processor_has_an_instruction_of_its_own_for_each_dtype(dtype):
    rates = kernels.library()
    found = [way for way in ways(rates) if roofline.NUMBERS[rates.rate_numbers(way)] is dtype]
    assert rates is None or any(rates.rate_multiply(way, 1, 1) > 0 for way in found)


def test_every_word_is_read_once(variant):
    threads = 3
    words = torch.randint(0, 2**20, (threads * 512,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    if variant is not None:
        sums = [variant.rate_read(way, words.data_ptr(), words.nbytes, threads) for way in range(7)]
        assert sums == [int(words.sum())] * 6 + [-1]
