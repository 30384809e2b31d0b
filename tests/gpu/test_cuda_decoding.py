"""Decoding on CUDA: the modules for one token compute what the plain ones compute, with fewer kernels."""

import copy
import io
import logging
import re
from pathlib import Path

import pytest
import torch

from paligemma.checkpoints.weights import load_model
from paligemma.files import BUNDLED
from paligemma.gpu import cuda_decoding, self_check
from paligemma.gpu.cuda_decoding import CudaAttention, CudaModel, additive, one_token_attention, use_cuda_modules
from paligemma.layers import float16
from paligemma.layers.batch_cache import BatchCache
from paligemma.layers.replacing import extended
from paligemma.modeling_gemma import GemmaAttention, GemmaRMSNorm, KVCache, attention
from tests.bounds import UNIT, assert_within
from tests.checkpoints.test_weights import write_checkpoint
from tests.gpu.pretend import kernels, pretend, waits
from tests.tiny import FAMILIES, draw, make_batch, make_model

LENGTHS = [(256,), (199, 256), (512, 1, 300, 17, 256)]  # of the rows
KERNELS = {"gemma": 29, "gemma2": 37}  # per layer and step
PLAIN_KERNELS = 72  # of Gemma 2. Those of Gemma 1 depend on what torch chooses for attention: 45, if it is one kernel.
KERNELS_IN_FLOAT16 = {"gemma": 42, "gemma2": 48}


@pytest.fixture(autouse=True)
def nothing_is_known():
    self_check.reset_all()


def mask_of(lengths: tuple[int, ...], window: int | None) -> torch.Tensor:
    """bool[B, 1, 1, S], as KVCache makes it: S is 256 or 512."""
    slot, end = torch.arange(256 if max(lengths) <= 256 else 512), torch.tensor(lengths)[:, None]
    mask = slot < end
    return (mask if window is None else mask & (slot >= end - window))[:, None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("heads", "key_heads"), [(8, 1), (8, 4)])
def test_attention_of_one_token_is_the_formula(lengths, window, cap, dtype, heads, key_heads):
    mask, scale, u32, u = mask_of(lengths, window), 1 / 16, UNIT[torch.float32], UNIT[dtype]
    rows, slots = len(lengths), mask.shape[-1]
    q = (4 * draw(rows, heads, 1, 256)).to(dtype)  # scores up to 15, so that a weight is far from the others
    k, v = draw(rows, key_heads, slots, 256, seed=1).to(dtype), draw(rows, key_heads, slots, 256, seed=2).to(dtype)
    with pretend("cuda:0") as gpu:
        on_gpu = [x.to("cuda:0") for x in (q, k, v, additive(mask, dtype))]
        found = one_token_attention(*on_gpu, scale, cap).cpu()
        assert gpu.mismatches == []
    q, k, v = q.double(), k.double(), v.double()
    expected = attention(q, k, v, mask, scale, cap)
    # A score is a sum of 256 products in float32, then scaled and capped by functions whose error is a few roundings. tanh does
    # not increase the error. So each weight is wrong by a factor of e^(2 moved), and is rounded to the dtype, like the
    # result.
    sizes = scale * (q.abs() @ k.abs().repeat_interleave(heads // key_heads, 1).transpose(2, 3)).amax(-1, keepdim=True)
    moved = (256 + 16) * u32 * (sizes + (cap or 0))
    relative = torch.expm1(2 * moved) + (slots + 16) * u32 + 2 * u
    bound = relative * attention(q, k, v.abs(), mask, scale, cap) + u * expected.abs() + 1e-7 * (dtype == torch.float16)
    assert_within(found, expected, bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_the_plain_norm(dtype):
    norm, x = GemmaRMSNorm(192, 1e-6).to(dtype), draw(3, 1, 192, dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    fast = extended(norm, cuda_decoding.CudaRMSNorm)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight.double())
    with torch.no_grad():
        assert_within(fast(x), exact, (UNIT[dtype] + (192 + 16) * UNIT[torch.float32]) * exact.abs() + 1e-30)
    assert torch.equal(fast(x), norm(x)) and fast(x).requires_grad  # with gradients, the plain form


def decode_steps(model, rows: list[tuple[int, int, int]], steps: int) -> torch.Tensor:
    """The logits float32[steps + 1, B, V] of a prefill and a few decoding steps of rows of unequal length."""
    with torch.no_grad():
        batch = make_batch(rows, pad="right")
        cache = model.new_cache(len(rows), batch["input_ids"].shape[1] + steps, BatchCache)
        logits = [model.prefill(cache, **batch)]
        for i in range(steps):
            logits.append(model.decode(cache, torch.arange(len(rows)) + 20 + i))
        return torch.stack([each.cpu() for each in logits])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [None, "config"])
@pytest.mark.parametrize("rows", [[(1, 5, 0)], [(1, 5, 0), (1, 9, 0)], [(1, n, 0) for n in (3, 8, 2, 5, 1)]])
def test_a_model_decodes_as_with_plain_modules(family, window, rows):
    text = {"sliding_window": 6} if family == "gemma2" else {}
    model = make_model(family, text=text, sliding_window=window)
    expected = decode_steps(model, rows, 4)
    with pretend("cuda:0") as gpu:
        model.to("cuda:0")
        use_cuda_modules(model)
        assert all(isinstance(layer.self_attn, CudaAttention) for layer in model.language_model.model.layers)
        found = decode_steps(model, rows, 4)
        assert gpu.mismatches == []
    # Both compute in float32, in another order; a wrong mask or slot changes logits of 10 by more than 0.1.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_compile_takes_the_whole_step(family):
    model, batch, tokens = make_model(family), make_batch([(1, 5, 0), (1, 3, 0)], pad="right"), torch.tensor([5, 6])
    use_cuda_modules(model)  # in float32, where no operator is missing on the CPU
    cache = model.new_cache(2, 24, BatchCache)
    step = torch.compile(type(model).step, fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad():
        model.prefill(cache, **batch)
        lengths, view = cache.lengths.clone(), cache.fixed(16)
        expected = model.step(view, tokens)
        cache.lengths.copy_(lengths)
        torch.testing.assert_close(step(model, view, tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_protected_float16_model_decodes_as_with_plain_modules(family):
    rows = [(1, 5, 0), (1, 9, 0)]
    model = make_model(family, dtype=torch.float16)
    float16.protect(model)
    expected = decode_steps(model, rows, 4)
    with pretend("cuda:0"):
        model.to("cuda:0")
        use_cuda_modules(model)
        found = decode_steps(model, rows, 4)
    assert cuda_decoding.ONE_TOKEN.is_on
    # Rounding to 11 bits in three layers moves logits of 10 by about 0.01.
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.1)


def count_kernels(family: str, layers: int, dtype: torch.dtype = torch.bfloat16, is_fast: bool = True) -> int:
    """Kernels of one decoding step, with a mask, as in a recorded step."""
    model = make_model(family, text={"num_hidden_layers": layers}, dtype=dtype)
    if dtype == torch.float16:
        float16.protect(model)
    with pretend("cuda:0") as gpu, torch.no_grad():
        model.to("cuda:0")
        if is_fast:
            use_cuda_modules(model)
        cache = model.new_cache(1, 24, BatchCache)
        model.prefill(cache, **make_batch([(1, 5, 0)]))
        view, token = cache.fixed(16), torch.tensor([5]).to("cuda:0")
        with gpu.part() as events:
            model.step(view, token)
    return sum(kernels(events).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_per_layer(family):
    assert count_kernels(family, 2) - count_kernels(family, 1) == KERNELS[family]
    in_float16 = count_kernels(family, 2, torch.float16) - count_kernels(family, 1, torch.float16)
    assert in_float16 == KERNELS_IN_FLOAT16[family]


def test_the_page_about_gpus_has_these_numbers():
    page = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
    for family, name, layers in (("gemma", "Gemma 1", 18), ("gemma2", "Gemma 2", 26)):
        layer = KERNELS[family]
        outside = count_kernels(family, 1) - layer
        assert re.search(rf"\| {name} \| \d+ \| {layer} \| {outside} \| {layers * layer + outside} \|", page)
    plain = [count_kernels("gemma2", layers, is_fast=False) for layers in (1, 2)]
    assert plain[1] - plain[0] == PLAIN_KERNELS and f"| Gemma 2 | {PLAIN_KERNELS} |" in page
    for family, name in (("gemma", "Gemma 1"), ("gemma2", "Gemma 2")):
        assert f"{KERNELS_IN_FLOAT16[family]} ({name})" in page


def test_masks_and_indices_are_made_once_per_step():
    """Nothing in a layer makes an index or converts a mask."""
    model = make_model("gemma2")
    with pretend("cuda:0") as gpu, torch.no_grad():
        model.to("cuda:0")
        use_cuda_modules(model)
        cache = model.new_cache(2, 24, BatchCache)
        model.prefill(cache, **make_batch([(1, 5, 0), (1, 3, 0)], pad="right"))
        with gpu.part() as events:
            model.decode(cache, torch.tensor([5, 6]))
    found = kernels(events)
    assert found["bitwise_not"] == found["masked_fill"] == 1 and found["where"] == found["scalar_tensor"] == 0
    assert found["index_put_"] == 2 * len(model.language_model.model.layers)
    assert found["arange"] == 2 and found["sub"] == 1  # the mask's slots, RoPE's frequencies; the slot of the token


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_that_differ_on_a_card_are_not_used(family, monkeypatch, caplog):
    wrong = lambda q, k, v, mask, scale, cap: one_token_attention(q, k, v, mask, 2 * scale, cap)  # noqa: E731
    monkeypatch.setattr(cuda_decoding, "one_token_attention", wrong)
    model = make_model(family)
    with pretend("cuda:0"), caplog.at_level(logging.WARNING):
        model.to("cuda:0")
        use_cuda_modules(model)
        use_cuda_modules(model)
    assert {type(layer.self_attn) for layer in model.language_model.model.layers} == {GemmaAttention}
    assert len(caplog.messages) == 1 and "kernels for one token differ on Pretended GPU" in caplog.text


@pytest.mark.parametrize("graphs", ["off", "record"])
def test_every_model_that_is_loaded_on_cuda_has_them(graphs):
    with pretend("cuda:0"):
        model = load_model(BUNDLED, device="cuda:0", graphs=graphs)
    decoder = model.language_model.model
    assert isinstance(decoder, CudaModel) and all(isinstance(layer.self_attn, CudaAttention) for layer in decoder.layers)
    assert not isinstance(load_model(BUNDLED).language_model.model, CudaModel)


def test_modules_that_a_card_cannot_run_are_not_used(monkeypatch, caplog):
    def fails(*_arguments):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(cuda_decoding, "one_token_attention", fails)
    model = make_model("gemma")
    expected = decode_steps(model, [(1, 5, 0)], 2)
    with pretend("cuda:0"), caplog.at_level(logging.WARNING):
        model.to("cuda:0")
        use_cuda_modules(model)
        torch.testing.assert_close(decode_steps(model, [(1, 5, 0)], 2), expected, rtol=1e-4, atol=1e-4)
    assert "CUBLAS_STATUS_NOT_SUPPORTED" in caplog.text


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_model_that_is_moved_to_the_cpu_afterwards_decodes_there(dtype, tmp_path):
    """torch.bmm has its out_dtype on CUDA only. The model may also be copied and pickled."""
    folder = write_checkpoint(tmp_path / "tiny", family="gemma2")
    with pretend("cuda:0"):
        model = load_model(folder, device="cuda:0", dtype=dtype).to("cpu")
    expected = decode_steps(load_model(folder, dtype=dtype), [(1, 5, 0)], 2)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for moved in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        difference = self_check.relative_difference(decode_steps(moved, [(1, 5, 0)], 2), expected)
        assert difference <= self_check.rounding_bound(model.dtype, layers=4)


def test_several_replacements_of_a_module_are_combined():
    class Loud(GemmaAttention):
        def attend(self, q, k, v, mask):
            calls.append(q.shape[2])
            return super().attend(q, k, v, mask)

    calls = []
    layer = make_model("gemma2").language_model.model.layers[0]
    for order in ((Loud, CudaAttention), (CudaAttention, Loud)):
        both = layer.self_attn
        for kind in order:
            both = extended(both, kind)
        assert isinstance(both, Loud) and isinstance(both, CudaAttention) and extended(both, CudaAttention) is both
        assert dict(both.named_parameters()).keys() == dict(layer.self_attn.named_parameters()).keys()
        assert both.q_proj is layer.self_attn.q_proj
        q, kv = draw(1, 4, 1, 16), draw(1, 2, 5, 16)
        expected = attention(q, kv, kv, None, both.scale, both.cap)
        torch.testing.assert_close(both.attend(q, kv, kv, None), expected, rtol=0, atol=1e-5)
    assert calls == [1]  # the newest comes first: CudaAttention, which computes one token without the other


@pytest.mark.parametrize("kind", [KVCache, BatchCache])
@pytest.mark.parametrize("device", ["cuda:0", "mps"])
def test_lengths_reach_the_device_before_their_source_changes(device, kind):
    with pretend(device, late_copies=True) as gpu:
        cache = kind(make_model("gemma").config.text_config, 2, 8, device=torch.device(device), dtype=torch.float32)
        lengths = torch.tensor([3, 5]).pin_memory()
        cache.set_lengths(lengths)
        lengths += 1
        if isinstance(cache, BatchCache):
            assert cache.host_lengths.tolist() == [3, 5]
        cache.reserve()
        cache.lengths.add_(1)
        assert cache.lengths.tolist() == [4, 6] and gpu.mismatches == []


def test_lengths_of_a_running_batch_are_copied_without_waiting():
    with pretend("cuda:0") as gpu:
        cache = BatchCache(make_model("gemma").config.text_config, 2, 8, device=torch.device("cuda:0"), dtype=torch.float32)
        with gpu.part() as events:
            cache.set_lengths(torch.tensor([3, 5]))
        assert waits(events) == []
