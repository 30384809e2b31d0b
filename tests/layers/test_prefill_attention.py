"""cpp/prefill_attention.h and FastAttention with many tokens: attention of a prompt, with RoPE and cache, and of patches."""

import copy

import pytest
import torch
from torch import nn

from paligemma.layers import acceleration, kernels
from paligemma.layers.kernel_check import attention_bound
from paligemma.layers.lora import LoRALinear
from paligemma.modeling_gemma import GemmaConfig, GemmaForCausalLM, KVCache, rotary_embedding, rotate
from tests.bounds import UNIT, assert_within, exact_arithmetic, gap
from tests.tiny import FAMILIES, fill

HALF, SINGLE = UNIT[torch.bfloat16], UNIT[torch.float32]
SHAPES = [  # B, K, N, L, E
    (1, 3, 3, 20, 72),  # the tower's width: five panels, the last of which is half full
    (2, 2, 6, 49, 32),  # two blocks of queries, of unequal size
    (1, 1, 5, 400, 64),  # two blocks of slots; the last panel is full
    (1, 1, 2, 901, 8),  # three blocks of slots; less than a panel of dimensions
    (3, 1, 1, 1, 2),
    (1, 1, 8, 17, 256),
]


def random_heads(rows: int, kv_heads: int, heads: int, length: int, width: int) -> list[torch.Tensor]:
    """q, k and v as views of one joint product, bfloat16[B, N or K, L, E]."""
    torch.manual_seed(0)
    joint = (torch.randn(rows, length, (heads + 2 * kv_heads) * width) * 2).bfloat16()
    parts = joint.split([count * width for count in (heads, kv_heads, kv_heads)], dim=-1)
    return [part.unflatten(-1, (-1, width)).transpose(1, 2) for part in parts]


def random_mask(rows: int, length: int, slots: int) -> torch.Tensor:
    """bool[B, 1, L, S], in which every query attends to at least one slot, and one query to the last slot only."""
    mask = torch.rand(rows, 1, length, slots, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[:, :, length // 2] = False
    mask[..., -1] = True
    return mask


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_of_many_queries_is_attention(shape, is_masked, cap, variant):
    if variant is None:
        return
    q, k, v = random_heads(*shape)
    rows, _, _, length, width = shape
    mask = random_mask(rows, length, length) if is_masked else None
    scale = 0.5 * width**-0.5
    assert_within(kernels.bf16_attend_many(q, k, v, mask, scale, cap), *attention_bound(q, k, v, mask, scale, cap))


@pytest.mark.parametrize("before", [0, 5, 390])  # tokens in the cache, so that the new ones begin in the middle of a panel
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize(("rows", "kv_heads", "heads"), [(1, 1, 8), (3, 2, 6)])
def test_new_tokens_are_rotated_and_written_and_attend_to_the_cache(rows, kv_heads, heads, is_masked, before, variant):
    if variant is None:
        return
    length, width, slots_read, scale = 21, 64, before + 21, 0.1
    q, k, v = random_heads(rows, kv_heads, heads, length, width)
    keys, values = torch.randn(2, rows, kv_heads, slots_read + 3, width).bfloat16()
    positions = torch.arange(before + 1, slots_read + 1).expand(rows, -1)
    rotation = rotary_embedding(positions, width, 10000.0, torch.bfloat16)
    mask = random_mask(rows, length, slots_read) if is_masked else None
    exact_keys, exact_values = keys.double(), values.clone()
    exact_keys[:, :, before:slots_read] = rotate(k.double(), *rotation)
    exact_values[:, :, before:slots_read] = v
    y = kernels.bf16_attend_many(q, k, v, mask, scale, None, rotation, (positions - 1, keys, values, slots_read))
    # The sum of two products is rounded; 1e-5 allows for the rounding of the products, which matters if they cancel.
    assert_within(keys, exact_keys, HALF * exact_keys.abs() + 1e-5)
    assert torch.equal(values, exact_values)
    q = rotate(q.double(), *rotation)
    read = keys[:, :, :slots_read], values[:, :, :slots_read]
    assert_within(y, *attention_bound(q, *read, mask, scale, None, q_error=1.01 * HALF))


@pytest.mark.parametrize("slot", [3, 398])
def test_a_masked_slot_has_no_influence_and_nan_spreads(slot, variant):
    if variant is None:
        return
    q, k, v = random_heads(1, 1, 4, 400, 32)
    mask = torch.ones(1, 1, 400, 400, dtype=torch.bool)
    mask[..., slot] = False
    attend = lambda mask: kernels.bf16_attend_many(q, k, v, mask, 0.2, None)  # noqa: E731  (called four times)
    before = attend(mask)
    k[0, 0, slot] = 100
    v[0, 0, slot] = 3e38  # so large that even e^-87 of it would change the result
    assert torch.equal(attend(mask), before)
    k[0, 0, slot - 1, 0] = float("nan")
    assert attend(mask).isnan().all()
    assert attend(None).isnan().all()


def test_a_query_that_attends_to_no_slot_gives_zeros(variant):
    if variant is None:
        return
    q, k, v = random_heads(1, 1, 2, 20, 32)
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    mask[:, :, 7] = False
    y = kernels.bf16_attend_many(q, k, v, mask, 0.2, None)
    assert not y[:, 7].any() and y.isfinite().all()


# ---------------------------------------------------------------- the decoder


def make_decoder(family: str) -> nn.ModuleDict:
    """A bfloat16 decoder with widths that the kernels support, none a power of two; three query heads share a key head."""
    more = {"attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 24} if family == "gemma2" else {}
    numbers = {"vocab_size": 160, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6}
    config = GemmaConfig(**({"num_key_value_heads": 2, "head_dim": 32, "model_type": family} | numbers | more))
    return nn.ModuleDict({"language_model": fill(GemmaForCausalLM(config), seed=0)}).bfloat16().requires_grad_(False)


def prefill(model: nn.ModuleDict, is_masked: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [B, L, V] of a prompt and of its continuation, and the keys and values in the cache, of rows of unequal length."""
    decoder, ids = model.language_model, torch.randint(0, 160, (3, 60), generator=torch.Generator().manual_seed(1))
    x = decoder.model.embed_tokens(ids)
    cache = KVCache(decoder.model.config, 3, 64, device=torch.device("cpu"), dtype=x.dtype)
    logits = []
    for start, end in ((0, 50), (50, 60)):
        cache.set_lengths(torch.tensor([end, end, end]))
        mask = torch.ones(60, 60, dtype=torch.bool).tril(10)[None, None, start:end, :end] if is_masked else None
        logits.append(decoder.logits(decoder.model(x[:, start:end], torch.arange(start + 1, end + 1).expand(3, -1), mask, cache)))
    return torch.cat(logits, dim=1), torch.stack((cache.keys, cache.values))


@pytest.mark.processor
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("has_kernels", [True, False])
def test_a_fast_prefill_is_as_exact_as_torchs(family, is_masked, has_kernels, monkeypatch):
    if not has_kernels:
        monkeypatch.setattr(kernels, "library", lambda: None)
    plain = make_decoder(family)
    fast = copy.deepcopy(plain)
    acceleration.accelerate(fast, min_parameters=0)
    with exact_arithmetic():
        exact = prefill(copy.deepcopy(plain).double(), is_masked)
    for ours, torchs, expected in zip(prefill(fast, is_masked), prefill(plain, is_masked), exact, strict=True):
        # Both round to bfloat16, ours less often, so the errors are of the same size.
        assert gap(ours, expected) <= 1.5 * gap(torchs, expected)


def test_the_kernel_is_used_only_where_it_is_faster_and_no_gradient_is_needed(instructions, monkeypatch):
    if kernels.library() is None:
        return
    plain, calls = make_decoder("gemma"), []
    original = kernels.bf16_attend_many
    monkeypatch.setattr(kernels, "bf16_attend_many", lambda *args: calls.append(1) or original(*args))
    model = copy.deepcopy(plain)
    acceleration.accelerate(model, min_parameters=0)
    prefill(model, False)
    assert len(calls) == (0 if instructions == "matrices" else 6)  # of three layers, prompt and continuation
    calls.clear()
    model.language_model.model.layers[1].self_attn.v_proj.weight.requires_grad_(True)
    with torch.no_grad():
        prefill(model, False)
    assert len(calls) == (0 if instructions == "matrices" else 6)
    calls.clear()
    x = torch.randn(3, 5, 96, dtype=torch.bfloat16)
    rotation = rotary_embedding(torch.arange(1, 6).expand(3, -1), 32, 10000.0, torch.bfloat16)
    cache = KVCache(plain.language_model.model.config, 3, 8, device=torch.device("cpu"), dtype=torch.bfloat16)
    cache.set_lengths(torch.tensor([5, 5, 5]))
    attend = lambda layer: layer.self_attn(x, torch.arange(5).expand(3, -1), rotation, None, cache)  # noqa: E731  (called twice)
    assert attend(model.language_model.model.layers[1]).requires_grad and not calls
    adapted = model.language_model.model.layers[2]
    adapted.self_attn.q_proj = LoRALinear(adapted.self_attn.q_proj, rank=2, scaling=2.0)
    assert attend(adapted).requires_grad and not calls
