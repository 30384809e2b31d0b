"""The counts of multiply-adds are those of torch; the measured rates are plausible."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from paligemma import roofline
from tests.tiny import FAMILIES, IMAGE, PATCHES, make_model, make_pixels

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_multiply_adds_are_those_that_torch_counts(family):
    model = make_model(family)
    ids = torch.cat((torch.full((1, 2 * PATCHES), IMAGE), torch.full((1, 5), 3)), 1)
    # FlopCounterMode counts the plain attention, but not the fused one of CPUs.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        cache = model.new_cache(1, ids.shape[1])
        model.prefill(cache, ids, make_pixels(2), torch.ones_like(ids), torch.zeros_like(ids))
    assert roofline.prefill_multiply_adds(model.config, 2, ids.shape[1]) == counter.get_total_flops() / 2


def test_the_measured_rates_are_plausible_numbers():
    assert 1e8 < roofline.read_bandwidth(CPU) < 1e13
    assert 1e8 < roofline.matrix_rate(CPU, torch.bfloat16) < 1e15


def test_decoding_reads_every_weight_of_the_decoder_once():
    decoder = torch.nn.Linear(3, 5, bias=False, dtype=torch.bfloat16)
    assert roofline.decode_bytes(decoder) == 30
