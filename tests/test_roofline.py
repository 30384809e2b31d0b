"""The counts of multiply-adds are those of torch; the measured rates are plausible."""

from types import SimpleNamespace

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


@pytest.mark.parametrize("has_kernels", [True, False])
def test_the_measured_rates_are_plausible_numbers(has_kernels, monkeypatch):
    if not has_kernels:
        monkeypatch.setattr(roofline.kernels, "library", lambda: None)
    assert 1e8 < roofline.read_bandwidth(CPU) < 1e13
    for dtype in (*roofline.NUMBERS, torch.float16):
        assert 1e8 < roofline.matrix_rate(CPU, dtype) < 1e15


def test_a_rate_is_that_of_the_fastest_instruction_for_the_dtype_or_a_larger_one(monkeypatch):
    """With a clock that advances by one second per call of an instruction, the rate is what the instruction returns."""
    seconds = iter(range(10**6))
    monkeypatch.setattr(roofline, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    numbers, counts = [0, 1, 2, 0, 2, -1], [4e9, 3e9, 0, 5e9, 7e9]  # bfloat16 is slower than float32; one is not allowed
    made = SimpleNamespace(rate_numbers=numbers.__getitem__, rate_multiply=lambda way, *_: counts[way])
    monkeypatch.setattr(roofline.kernels, "library", lambda: made)
    assert [roofline.matrix_rate(CPU, dtype) for dtype in roofline.NUMBERS] == [5e9, 5e9, 7e9]


def test_the_bandwidth_is_that_of_the_best_reader(monkeypatch):
    seconds = iter(range(10**6))
    monkeypatch.setattr(roofline, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    words = [0, 10, 30, 20, -1]
    made = SimpleNamespace(rate_read=lambda way, *_: words[way])
    monkeypatch.setattr(roofline.kernels, "library", lambda: made)
    monkeypatch.setattr(roofline, "large_buffer", lambda: torch.ones(2**16, dtype=torch.int32))
    assert roofline.read_bandwidth(CPU) == 4 * 30


@pytest.mark.parametrize(("caches", "size"), [({}, 2**28), ({"index3": "98304K"}, 2**25 * 12), ({"index3": "2000000K"}, 2**29)])
def test_the_buffer_is_larger_than_the_caches_but_not_too_large(caches, size, tmp_path, monkeypatch):
    for name, text in caches.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "size").write_text(text + "\n")
    monkeypatch.setattr(roofline, "CACHES", tmp_path)
    buffer = roofline.large_buffer()
    assert buffer.nbytes == size and int(buffer[-1]) == 1


def test_prefill_takes_least_at_the_rates_of_its_parts():
    config = make_model("gemma").config
    whole, tower = roofline.prefill_multiply_adds(config, 1, 9), roofline.prefill_multiply_adds(config, 1, 0)
    tower -= roofline.prefill_multiply_adds(config, 0, 0)
    assert roofline.prefill_seconds(config, 1, 9, 2.0, 4.0) == pytest.approx(tower / 2 + (whole - tower) / 4)


def test_decoding_reads_every_weight_of_the_decoder_once():
    decoder = torch.nn.Linear(3, 5, bias=False, dtype=torch.bfloat16)
    assert roofline.decode_bytes(decoder) == 30
