"""Measures once per machine what no rule can know for sure: how far ahead to prefetch, and what torch computes faster.

kernel_check.py calls `choices` when a compiled library has passed, and keeps them beside the library. The rule stays unless
another way is clearly faster, so that other programs, which disturb the measurement, do not change what is used.
PALIGEMMA_TUNING=off takes the rules only. Checked in tests/layers/test_kernel_tuning.py.
"""

import itertools
import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from paligemma.layers import kernels
from paligemma.layers.fast_cpu import BF16_ROWS
from paligemma.layers.instruction_sets import bf16_instructions

CLEARLY = 1.05  # so many times as fast as the rule
ROUNDS = 7  # in each half of a measurement
BYTES = 2**27  # of weights: more than the last-level cache of most processors
DISTANCES = (0, 512, 2048, 4096)  # bytes, see Tuning.prefetch in cpp/products.h
WIDTH = 2048  # inputs, and outputs of a product with many rows
ROWS = (16, 266)  # a batch of short steps, and a picture of 224 pixels with its prompt
NO_LIMIT = 2**62

Key = TypeVar("Key", bound=Hashable)


def clearly_fastest(ways: dict[Key, Callable[[], object]], clock: Callable[[], float] = time.perf_counter) -> Key:
    """The key of the fastest way if it is clearly faster than the first, else the first, which is the rule.

    The ways run in turn. Another way wins only if it is CLEARLY faster in all rounds but one of the first half, and again in all
    rounds but one of the second half.
    """
    rule, gains = next(iter(ways)), {}
    for way in ways.values():
        way()  # a first call also allocates memory
    for _ in range(2):
        times = {key: [] for key in ways}
        for _ in range(ROUNDS):
            for key, way in ways.items():
                start = clock()
                way()
                times[key].append(clock() - start)
        ratios = {key: sorted(before / after for before, after in zip(times[rule], times[key], strict=True)) for key in ways}
        gains = {key: ratios[key][1] for key in ways if ratios[key][1] > CLEARLY}
        if not gains:
            return rule
        ways = {key: way for key, way in ways.items() if key == rule or key in gains}
    return max(gains, key=gains.__getitem__)


def prefetch_distance(weights: Tensor) -> int:
    """Tuning.prefetch for products of one row with weights of every kind."""
    tuning, x = kernels.tuning(kernels.library()), torch.ones(1, WIDTH, dtype=torch.bfloat16)
    rule, scales = tuning.prefetch, torch.ones(BYTES // 16, dtype=torch.bfloat16)  # int4 has one scale for 16 bytes
    matrices = {kind: (weights, scales, BYTES * 8 // bits // WIDTH) for kind, bits in (("bf16", 16), ("int8", 8), ("int4", 4))}

    def read(distance: int) -> None:
        tuning.prefetch = distance
        for kind, matrix in matrices.items():
            kernels.product(kind, x, [matrix], torch.float32)

    try:
        return clearly_fastest({distance: partial(read, distance) for distance in (rule, *DISTANCES)})
    finally:
        tuning.prefetch = rule


def rows_of_ours(weights: Tensor, rule: int) -> int:
    """The largest number of rows for which our product of bfloat16 weights is to be used. Args: rule: the same by rule."""
    matrices = itertools.cycle(weights.view(torch.bfloat16).view(-1, WIDTH, WIDTH))  # in turn, so that they come from memory

    def is_ours(rows: int) -> bool:
        x = torch.ones(rows, WIDTH, dtype=torch.bfloat16)
        ways = {
            True: lambda: kernels.product("bf16", x, [(next(matrices), None, WIDTH)], torch.bfloat16),
            False: lambda: F.linear(x, next(matrices)),
        }
        return clearly_fastest({is_ours: ways[is_ours] for is_ours in (rows <= rule, rows > rule)})

    few, many = ROWS
    if rule < few:
        return rule if not is_ours(few) else NO_LIMIT if is_ours(many) else few
    # One limit cannot say that torch is faster for few rows only. Then prompts, which take longer, decide.
    return rule if is_ours(many) else many - 1 if is_ours(few) else few - 1


def is_attention_ours(rule: bool) -> bool:
    """Whether our attention of many tokens is to be used. Args: rule: the same by rule."""
    q = torch.ones(1, 16, 256, 72, dtype=torch.bfloat16)  # of the tower
    ways = {
        True: lambda: kernels.bf16_attend_many(q, q, q, None, 72**-0.5, None),
        False: lambda: F.scaled_dot_product_attention(q, q, q),
    }
    return clearly_fastest({is_ours: ways[is_ours] for is_ours in (rule, not rule)})


@torch.no_grad()
def choices() -> dict[str, int]:
    """What is faster on this machine than the rules, which hold for all that is missing here; see kernels.Loaded."""
    weights = torch.full((BYTES // 2,), 0x3C00, dtype=torch.int16)  # bfloat16 numbers that are neither 0 nor large
    instructions = bf16_instructions()
    rules = {
        "prefetch": kernels.tuning(kernels.library()).prefetch,
        "bf16_rows": int(min(BF16_ROWS[instructions], NO_LIMIT)),
        "attention": int(instructions != "matrices"),
    }
    found = {
        "prefetch": prefetch_distance(weights),
        "bf16_rows": rows_of_ours(weights, rules["bf16_rows"]),
        "attention": int(is_attention_ours(bool(rules["attention"]))),
    }
    return {name: value for name, value in found.items() if value != rules[name]}
