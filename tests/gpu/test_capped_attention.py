"""Attention with a soft cap by flex_attention: the same numbers as plain attention, and a fallback for everything that may fail.

torch can run flex_attention on a CPU, but only without compiling it (slowly), or by another kernel than on CUDA. So the tests run
what is compiled on CUDA as it is.
"""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters

from paligemma import devices
from paligemma.gpu import capped_attention as module
from paligemma.gpu import self_check
from paligemma.gpu.capped_attention import (
    CappedAttention,
    capped_attention,
    kernel_options,
    shared_bytes,
    use_capped_attention,
)  # fmt: skip
from paligemma.modeling_gemma import GemmaAttention, attention
from tests.tiny import draw, make_batch, make_model

ROWS = [(1, 5, 0), (2, 3, 0), (0, 4, 0)]

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def unchecked():
    self_check.reset_all()
    kernel_options.cache_clear()
    yield
    self_check.reset_all()
    kernel_options.cache_clear()


# The same numbers


@pytest.mark.parametrize("heads, key_heads, mask", [(4, 2, None), (4, 2, "ragged"), (4, 1, "ragged"), (3, 3, "per row")])
def test_capped_attention_equals_plain_attention(heads, key_heads, mask):
    # Sums in another order: 4.8e-7 is the largest gap over 20 seeds, of values of size 1; 3e-6 leaves a factor of 6.
    q, k, v = draw(2, heads, 13, 16), draw(2, key_heads, 13, 16, seed=1), draw(2, key_heads, 13, 16, seed=2)
    if mask:
        looks = draw(2 if mask == "ragged" else 1, 1, 13, 13, seed=3) > 0
        mask = (looks | torch.eye(13, dtype=torch.bool)).expand(2, -1, -1, -1)
    written_out = attention(q, k, v, mask, 0.3, 2.0)
    assert (capped_attention(q, k, v, mask, 0.3, 2.0) - written_out).abs().max() <= 3e-6
    assert (attention(q, k, v, mask, 0.3, 1e6) - written_out).abs().max() > 0.05  # the cap changes the result


@pytest.fixture
def traced(monkeypatch):
    """Compiled as on CUDA, fullgraph, but what was traced runs as it is."""
    compiled = torch.compile(capped_attention, fullgraph=True, backend="eager")
    monkeypatch.setattr(module, "compiled_capped_attention", lambda: compiled)
    torch._dynamo.reset()
    yield compiled
    torch._dynamo.reset()


@pytest.mark.usefixtures("traced")
def test_ordinary_mixtures_of_prompts_compile_few_kernels(use):
    """Batches of one and of several rows, with and without a mask, of any length: four kernels, and none for a new length."""
    layer = use(make_model("gemma2")).language_model.model.layers[0].self_attn
    counters.clear()
    found = []
    for rows, length, is_masked in (
        (1, 34, False), (1, 35, False), (1, 40, False), (2, 34, False), (2, 40, True), (3, 37, True), (1, 36, True),
        (4, 30, False), (1, 50, True), (2, 29, False), (3, 33, False), (5, 128, True), (1, 256, False),
    ):  # fmt: skip
        q, k, v = draw(rows, 4, length, 16), draw(rows, 2, length, 16, seed=1), draw(rows, 2, length, 16, seed=2)
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool).tril() if is_masked else None
        with torch.no_grad():
            ours, plain = layer.attend(q, k, v, mask), GemmaAttention.attend(layer, q, k, v, mask)
        assert (ours - plain).abs().max() <= 3e-6
        found.append(counters["stats"]["unique_graphs"])
    assert found[-1] == len(set(found)) == 4
    assert module.CAPPED.is_on


# When it is used


@pytest.fixture
def use(monkeypatch):
    """A function that puts capped attention into a model on the CPU, for prompts of every length."""
    monkeypatch.setattr(module, "MIN_TOKENS", 2)
    monkeypatch.setattr(devices, "profile", lambda _device: devices.Profile("test", ("float32",), flex_options={}))
    monkeypatch.setattr(self_check, "device_name", lambda _device: "test card")

    def use(model):
        use_capped_attention(model)
        return model

    return use


@pytest.fixture
def calls(monkeypatch):
    """Capped attention as it is when not compiled; the arguments of its calls."""
    calls = []

    def run(*arguments):
        calls.append(arguments)
        return capped_attention(*arguments)

    monkeypatch.setattr(module, "compiled_capped_attention", lambda: run)
    return calls


def logits(model, rows=ROWS):
    """The logits after the prompt, and after one more token."""
    with torch.no_grad():
        cache = model.new_cache(len(rows), 40)
        first = model.prefill(cache, **make_batch(rows, "right"))
        return torch.stack((first, model.decode(cache, torch.arange(5, 5 + len(rows)))))


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def tiny(window=None, family="gemma2"):
    return make_model(family, text={"sliding_window": window or 4096}, sliding_window="config" if window else None)


@pytest.mark.parametrize("window", [None, 8])
def test_a_long_prompt_goes_through_capped_attention_only_in_gemma_2(window, calls, use):
    expected = logits(tiny(window))
    assert (logits(use(tiny(window))) - expected).abs().max() <= 4e-5
    assert len(calls) == 3  # a layer each, and none in decoding
    logits(use(tiny(family="gemma")))
    use(tiny())(**make_batch(ROWS, "right"))  # with gradients
    assert len(calls) == 3


def test_a_short_prompt_is_computed_plainly(calls, use, monkeypatch):
    model = use(tiny())
    longest = 11
    monkeypatch.setattr(module, "MIN_TOKENS", longest + 1)
    logits(model)
    assert not calls
    monkeypatch.setattr(module, "MIN_TOKENS", longest)
    logits(model)
    assert len(calls) == 3


def test_queries_of_another_dtype_than_the_keys_are_left_to_the_layer(calls, use, monkeypatch):
    """float16.py keeps queries in float32."""
    layer = use(tiny()).language_model.model.layers[0].self_attn
    monkeypatch.setattr(GemmaAttention, "attend", lambda *_arguments: "plain")
    with torch.no_grad():
        assert layer.attend(draw(1, 4, 13, 16), draw(1, 2, 13, 16).half(), draw(1, 2, 13, 16).half(), None) == "plain"
    assert not calls


def test_parameters_keep_their_names_and_a_device_without_options_changes_nothing(use, monkeypatch):
    model, names = tiny(), list(tiny().state_dict())
    assert list(use(model).state_dict()) == names
    assert all(isinstance(layer.self_attn, CappedAttention) for layer in model.language_model.model.layers)
    monkeypatch.setattr(devices, "profile", lambda _device: devices.Profile("test", ("float32",), flex_options=None))
    assert not any(isinstance(layer.self_attn, CappedAttention) for layer in use(tiny()).language_model.model.layers)


# The fallback


@pytest.mark.parametrize("error", [
    RuntimeError("out of shared memory\nReduce block sizes"), FailOnRecompileLimitHit("recompile_limit"), AssertionError(),
])  # fmt: skip
def test_a_kernel_that_fails_leads_back_to_plain_attention(error, monkeypatch, use, caplog):
    attempts = []

    def fail(*_arguments):
        attempts.append(error)
        raise error

    monkeypatch.setattr(module, "compiled_capped_attention", lambda: fail)
    for _ in range(2):
        assert torch.equal(logits(use(tiny())), logits(tiny()))
    assert len(attempts) == 1
    (line,) = warnings(caplog)
    what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    assert line.startswith(f"attention kernels with a soft cap fail ({what})")
    assert line.endswith(": computing the scores without them. Please report the output of `paligemma doctor`.")


@pytest.mark.parametrize("where", ["all", "last block", "no cap"])
def test_a_kernel_that_is_wrong_is_found_at_its_first_call(where, monkeypatch, use, caplog):
    attempts = []

    def wrong(q, k, v, mask, scale, cap, options):
        attempts.append(q)
        result = capped_attention(q, k, v, mask, scale, 1e6 if where == "no cap" else cap, options)
        if where != "no cap":
            result[:, :, -3 if where == "last block" else 0 :] *= -1
        return result

    monkeypatch.setattr(module, "compiled_capped_attention", lambda: wrong)
    for _ in range(2):
        assert torch.equal(logits(use(tiny())), logits(tiny()))
    assert len(attempts) == 1
    (line,) = warnings(caplog)
    assert line.startswith("attention kernels with a soft cap differ on test card (relative difference")


def test_a_kernel_that_is_more_exact_than_the_plain_way_passes(monkeypatch, use):
    """Scores around 30 are rounded to bfloat16 by the plain way, but not by the kernel: their results differ by 4 percent."""

    def exact(q, k, v, mask, scale, cap, _options):
        return attention(q.float(), k.float(), v.float(), mask, scale, cap).to(q.dtype)

    monkeypatch.setattr(module, "compiled_capped_attention", lambda: exact)
    layer = use(make_model("gemma2")).language_model.model.layers[0].self_attn
    layer.cap, layer.scale, common = 50.0, 1.0, 5.7 * torch.nn.functional.normalize(draw(64, seed=5), dim=0)
    q, k = ((common + 0.1 * draw(1, heads, 256, 64, seed=heads)).bfloat16() for heads in (4, 2))
    v = draw(1, 2, 256, 64, seed=7).bfloat16()
    with torch.no_grad():
        found = layer.attend(q, k, v, None)
    plain = attention(q, k, v, None, layer.scale, layer.cap)
    assert self_check.relative_difference(found, plain) > self_check.rounding_bound(torch.bfloat16)
    assert module.CAPPED.is_on and module.CAPPED.checked


def test_each_form_of_the_kernel_is_checked_once(calls, use, monkeypatch):
    checks = []
    monkeypatch.setattr(module, "attention", lambda q, *rest: checks.append(q.shape[2]) or attention(q, *rest))
    model = use(tiny())
    for _ in range(2):
        logits(model)  # three rows, with a mask
        logits(model, ROWS[:1])  # one row, without
    assert checks == [64, 64] and len(calls) == 12


# Block sizes


@pytest.mark.parametrize("options, limit, dtype, expected", [
    (None, 99, torch.bfloat16, None),  # off: sm_75, MPS, ROCm, CPU
    ({}, 99, torch.bfloat16, {}),  # those of torch
    ({"BLOCK_M": 32, "BLOCK_N": 32, "num_stages": 2}, 99, torch.bfloat16, {"BLOCK_M": 32, "BLOCK_N": 32, "num_stages": 2}),
    ({"BLOCK_M": 32, "BLOCK_N": 32, "num_stages": 2}, 48, torch.bfloat16, {"BLOCK_M": 32, "BLOCK_N": 32, "num_stages": 1}),
    ({"BLOCK_M": 32, "BLOCK_N": 32, "num_stages": 1}, 99, torch.float32, {"BLOCK_M": 32, "BLOCK_N": 32, "num_stages": 1}),
    ({"BLOCK_M": 32, "BLOCK_N": 32, "num_stages": 2}, 64, torch.float32, {"BLOCK_M": 32, "BLOCK_N": 16, "num_stages": 1}),
    ({"BLOCK_M": 32, "BLOCK_N": 32, "num_stages": 1}, 48, torch.float32, None),
])  # fmt: skip
def test_blocks_fit_into_the_shared_memory_of_the_card(options, limit, dtype, expected, monkeypatch):
    given = None if options is None else dict(options)
    monkeypatch.setattr(devices, "profile", lambda _device: devices.Profile("test", ("float32",), flex_options=options))
    properties = SimpleNamespace(shared_memory_per_block_optin=limit * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    assert kernel_options(torch.device("cuda"), dtype, 256) == expected
    assert options == given  # the table of profiles is not changed
    assert not expected or shared_bytes(expected, 256, dtype.itemsize) <= limit * 1024


@pytest.mark.parametrize("itemsize, blocks, reported", [
    (2, (32, 64, 3), 155648), (2, (32, 32, 3), 86016), (2, (32, 32, 2), 52224), (2, (32, 32, 1), 34816), (2, (32, 16, 2), 34304),
    (2, (32, 16, 1), 25600), (2, (16, 16, 1), 16896), (2, (64, 32, 2), 71680), (4, (32, 32, 1), 69632), (4, (32, 16, 2), 68224),
    (4, (32, 16, 1), 51200), (4, (16, 16, 1), 33792), (4, (32, 32, 2), 103552),
])  # fmt: skip
def test_shared_memory_is_what_triton_reports_or_a_little_more(itemsize, blocks, reported):
    """Reported by Triton 3.7.1 for inductor's kernel of capped_attention with a mask, width 256, built for sm_80 and sm_89."""
    options = dict(zip(("BLOCK_M", "BLOCK_N", "num_stages"), blocks, strict=True))
    assert reported <= shared_bytes(options, 256, itemsize) <= 1.1 * reported


def test_a_card_whose_shared_memory_is_too_small_compiles_nothing(calls, use, monkeypatch):
    model = use(tiny())
    monkeypatch.setattr(module, "kernel_options", lambda *_arguments: None)
    assert torch.equal(logits(model), logits(tiny()))
    assert not calls and module.CAPPED.state == "unchecked"


@pytest.mark.parametrize("capability, shared", [((8, 6), 99), ((8, 9), 99), ((12, 0), 99)])
def test_the_profiles_of_consumer_cards_have_blocks_that_fit(capability, shared):
    options = devices.PROFILES[devices.kind_of_card(capability)].flex_options
    assert shared_bytes(options, 256, 2) <= shared * 1024
