"""quantization.py, int_formats.py, fast_cpu.py and cpp/: rounding, layouts, products, fallbacks, saving."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from paligemma.layers import acceleration, fast_cpu, fast_decoder, int_formats, kernels, quantization
from paligemma.layers.fast_cpu import BF16_ROWS
from paligemma.layers.fast_tower import FastLayerNorm
from paligemma.layers.int_formats import GROUP, KINDS
from paligemma.layers.quantization import QuantizedLinear
from paligemma.layers.replacing import extended
from paligemma.modeling_gemma import (
    GemmaConfig,
    GemmaEmbedding,
    GemmaForCausalLM,
    GemmaMLP,
    GemmaRMSNorm,
    KVCache,
    attention,
    rotary_embedding,
    rotate,
)  # fmt: skip
from tests.bounds import UNIT, assert_within, gap, product_bound
from tests.tiny import FAMILIES, fill

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(48, 64), (37, 100), (300, 256), (64, 4304)]  # whole blocks; neither side whole; blocks by 8, 4 and 1; the tower's fc2
needs_kernels = pytest.mark.parametrize("has_kernels", [True, False])


@pytest.fixture(autouse=True, scope="module")
def compiled():
    """The kernels of this machine; a test that needs them absent removes them itself."""
    return kernels.library()


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: None)


def random_linear(n: int, k: int, seed: int = 0, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(seed)
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    nn.init.normal_(linear.weight, std=0.02)
    return linear.requires_grad_(False)


def quantized(linear: nn.Module, kind: str) -> QuantizedLinear:
    return quantization.quantize_module(linear, kind, dict(linear.named_parameters()))


def assert_product(y: torch.Tensor, x: torch.Tensor, module: QuantizedLinear) -> None:
    """Checks that y is x @ weight.T + bias of a quantised module, within the rounding of its arithmetic."""
    weight = module.weight_as_floats()
    bound = product_bound(x, weight, y.dtype, group=GROUP[module.kind]) if kernels.library() else None
    if bound is None:  # torch's own products: of bfloat16 weights, if the inputs are few or bfloat16 (int4: always where few)
        is_short = x.dtype is not torch.float32 or (module.kind == "int4" and x[..., 0].numel() <= quantization.SMALL_BATCH)
        bound = product_bound(x, weight, torch.bfloat16 if is_short else y.dtype, factors=torch.bfloat16 if is_short else None)
    exact = x.double() @ weight.double().T
    if module.bias is not None:
        exact = exact + module.bias.double()
        bound = bound + 2 * UNIT[y.dtype] * (exact.abs() + bound)
    assert_within(y, exact, bound)


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_int8_is_within_half_a_step_of_each_weight(n, k):
    linear = random_linear(n, k)
    scale = linear.weight.abs().amax(1, keepdim=True) / 127
    # The stored scale is bfloat16, up to 2^-8 smaller, so that the largest weight is cut by up to half a step.
    assert ((quantized(linear, "int8").weight_as_floats() - linear.weight).abs() <= 0.51 * scale).all()


def test_int4_of_normal_weights_is_better_than_scale_by_the_largest():
    weight = random_linear(256, 1024).weight
    groups = weight.unflatten(1, (-1, 32))
    scale = groups.abs().amax(2, keepdim=True) / 7
    plain = ((groups / scale).round().clamp(-8, 7) * scale).flatten(1)
    ours = quantized(random_linear(256, 1024), "int4").weight_as_floats()
    assert gap(plain, weight) > 0.096
    assert gap(ours, weight) < 0.083  # 0.0819 measured


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_the_kernel_rounds_as_torch_does(kind, n, k, monkeypatch):
    weight = random_linear(n, k).weight
    packed, scales = int_formats.quantize(weight, kind)
    monkeypatch.setattr(kernels, "library", lambda: None)
    same_packed, same_scales = int_formats.quantize(weight, kind)
    # Equal except for ties, which round differently if sums are reordered or x * (1 / s) is fused: 1 in a million measured.
    assert (packed != same_packed).float().mean() < 1e-4
    assert (scales != same_scales).float().mean() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_a_lone_weight_keeps_its_value(kind):
    linear = nn.Linear(64, 16, bias=False).requires_grad_(False)
    linear.weight.zero_()
    linear.weight[3, 40] = -0.5
    back = quantized(linear, kind).weight_as_floats()
    assert back.count_nonzero() == 1
    assert back[3, 40].item() == pytest.approx(-0.5, rel=2**-8)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_no_number_makes_its_output_none(kind, has_kernels, monkeypatch):
    if not has_kernels:
        monkeypatch.setattr(kernels, "library", lambda: None)
    linear = random_linear(32, 64)
    linear.weight[5, 7] = float("nan")
    y = quantized(linear, kind)(torch.randn(2, 64))
    assert y[:, 5].isnan().all()
    assert y[:, :5].isfinite().all() and y[:, 6:].isfinite().all()


@needs_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_an_input_that_is_no_number_reaches_every_output(kind, value, has_kernels, monkeypatch):
    if not has_kernels:
        monkeypatch.setattr(kernels, "library", lambda: None)
    x = torch.randn(2, 64)
    x[1, 50] = value
    y = quantized(random_linear(32, 64), kind)(x)
    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


@pytest.mark.parametrize("size", [1e-36, 3.7e-37, 2e-38, 1e-40])  # 127 / size is infinite for all but the first
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_nearly_zero_give_outputs_that_are_nearly_zero(kind, dtype, size, variant):
    if variant is None:
        return
    for rows in (1, 7, 40):
        x = torch.randn(rows, 128).to(dtype)
        x[:, :64] = size  # whole groups, such as hidden vectors after GELU of very negative numbers
        x[0] = size
        module = quantized(random_linear(40, 128), kind)
        y = module(x)
        assert_within(y[:1], 0 * y[:1].double(), torch.full_like(y[:1], 1e-34).double())
        assert_product(y[1:], x[1:], module)


# ---------------------------------------------------------------- layouts


def test_tiles_hold_what_the_header_draws():
    q = (torch.arange(16 * 64, dtype=torch.int32).view(16, 64) % 251 - 125).to(torch.int8)
    tiles = int_formats.to_tiles(q, "int8")
    assert tiles.shape == (1, 16, 64)
    assert tiles[0, 3, 4 * 5 + 2] == q[5, 4 * 3 + 2].item() + 128
    q = (torch.arange(16 * 32, dtype=torch.int32).view(16, 32) % 16 - 8).to(torch.int8)
    tiles = int_formats.to_tiles(q, "int4")
    assert tiles.shape == (1, 4, 64)
    assert tiles[0, 1, 4 * 7 + 3] == (q[7, 8 + 3].item() + 8) | (q[7, 8 + 4 + 3].item() + 8) << 4


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_turn_back(kind):
    low, high = (-127, 128) if kind == "int8" else (-8, 8)
    q = torch.randint(low, high, (48, 128), dtype=torch.int8)
    assert torch.equal(int_formats.from_tiles(int_formats.to_tiles(q, kind), kind), q)
    assert torch.equal(int_formats.from_rows(int_formats.to_rows(q, kind), kind), q)
    back = int_formats.repack(int_formats.to_rows(q, kind), kind, lambda part: int_formats.to_tiles(part, kind))
    assert torch.equal(back, int_formats.to_tiles(q, kind))


# ---------------------------------------------------------------- products


@pytest.mark.processor
@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 13, 64])
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_module_multiplies_with_its_weights(kind, n, k, rows, dtype, has_kernels, monkeypatch):
    if not has_kernels:
        monkeypatch.setattr(kernels, "library", lambda: None)
    module = quantized(random_linear(n, k, bias=True, dtype=dtype), kind)
    x = torch.randn(rows, k).to(dtype)
    y = module(x)
    assert y.dtype == dtype
    assert_product(y, x, module)


ROW_COUNTS = range(67)
PLACES = {  # memory layouts of x: functions that make random float[B, X]
    "in order": lambda rows, k: torch.randn(rows, k),
    "transposed": lambda rows, k: torch.randn(k, rows).T,
    "every other": lambda rows, k: torch.randn(2 * rows, 3 * k)[::2, 1::3],
    "one row often": lambda rows, k: torch.randn(1, k).expand(rows, k),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bf16", *KINDS])
def test_every_number_of_rows_is_multiplied(kind, dtype, place, variant):
    if variant is None:
        return
    linear = random_linear(37, 96, dtype=torch.bfloat16)
    module = None if kind == "bf16" else quantized(linear, kind)
    for rows in ROW_COUNTS:
        x = PLACES[place](rows, 96).to(torch.bfloat16 if kind == "bf16" else dtype)
        if module is not None:
            assert_product(module(x), x, module)
            continue
        y = kernels.product("bf16", x, [(linear.weight, None, 37)], dtype)
        assert_within(y, x.double() @ linear.weight.double().T, product_bound(x, linear.weight, dtype))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_torchs_products_take_rows_wherever_they_lie(kind, place, monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: None)
    module = quantized(random_linear(64, 64), kind)
    for rows, dtype in itertools.product((0, 1, 2, 5, 70), (torch.float32, torch.bfloat16)):
        x = PLACES[place](rows, 2 * 64).to(dtype)[:, :64]
        y, expected = module(x), module(x.clone(memory_format=torch.contiguous_format))
        torch.testing.assert_close(y, expected, rtol=0, atol=0)  # the same operations on the same numbers


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_alone_and_among_others(kind, variant):
    if variant is None:  # torch's products of one row and of several sum in another order
        return
    module, x = quantized(random_linear(70, 128), kind), torch.randn(9, 128)
    # Integer sums, then the same float operations for each row: exact.
    torch.testing.assert_close(torch.cat([module(row[None]) for row in x]), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("rows", [2, 7, 30, 61])  # one tile of rows; few tiles; many, the last one whole, or not
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_multiplied_with_inputs_in_several_parts(kind, rows, variant):
    if variant is None:
        return
    module, x = quantized(random_linear(200, 2 * 256 + 192), kind), torch.randn(rows, 2 * 256 + 192)
    assert_product(module(x), x, module)


@pytest.mark.parametrize("stored", [0, 255])
@pytest.mark.parametrize("x", [-3.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_sums_of_integers_do_not_overflow(kind, x, stored, variant):
    if variant is None:
        return
    module = quantized(random_linear(40, 320), kind)
    module.packed.fill_(stored)  # each weight is the smallest or the largest that can be stored, each input -127 or 127
    for rows in (1, 40):
        assert_product(module(torch.full((rows, 320), x)), torch.full((rows, 320), x), module)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_in_front_stay_and_no_rows_are_fine(kind):
    module = quantized(random_linear(32, 64), kind)
    assert module(torch.randn(2, 3, 64)).shape == (2, 3, 32)
    assert module(torch.randn(2, 3, 64)[:, -1]).shape == (2, 32)
    assert module(torch.randn(0, 64)).shape == (0, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_float16_goes_through(kind):
    module, x = quantized(random_linear(32, 64, dtype=torch.float16), kind), torch.randn(3, 64).half()
    assert module(x).dtype == torch.float16
    assert_product(module(x), x, module)


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7, 40])
@pytest.mark.parametrize("result", [torch.float32, torch.bfloat16])
def test_bfloat16_kernel_multiplies_many_inputs(rows, result, variant):
    if variant is None:
        return
    linear, x = random_linear(300, 2048, dtype=torch.bfloat16), torch.randn(rows, 2048).bfloat16()
    y = kernels.product("bf16", x, [(linear.weight, None, 300)], result)
    assert_within(y, x.double() @ linear.weight.double().T, product_bound(x, linear.weight, result))


@pytest.mark.parametrize("rows", [1, 9])
def test_biases_and_norms_may_have_any_strides(rows):
    strided = [torch.randn(128).bfloat16()[::2], torch.randn(1).bfloat16().expand(64)]
    x, w = torch.randn(rows, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    rms_norm, layer_norm = fast_cpu.FastRMSNorm(64, 1e-6), FastLayerNorm(64)
    for vector in strided:
        for module in (rms_norm, layer_norm):
            module.weight = nn.Parameter(vector, requires_grad=False)
        layer_norm.bias = nn.Parameter(vector, requires_grad=False)
        found = [fast_cpu.product(x, w, vector), rms_norm(x), layer_norm(x)]
        for module in (rms_norm, layer_norm):
            module.weight = nn.Parameter(vector.clone(memory_format=torch.contiguous_format), requires_grad=False)
        layer_norm.bias = rms_norm.weight
        assert all(map(torch.equal, found, [fast_cpu.product(x, w, rms_norm.weight), rms_norm(x), layer_norm(x)]))


@needs_kernels
@pytest.mark.parametrize("rows", [0, 1, 3, 9, 40])
def test_fast_norm_is_the_norm(rows, has_kernels, monkeypatch):
    if not has_kernels:
        monkeypatch.setattr(kernels, "library", lambda: None)
    torch.manual_seed(0)
    norm = GemmaRMSNorm(192, 1e-6).requires_grad_(False)
    norm.weight.normal_(std=0.1)
    norm, x = norm.bfloat16(), (torch.randn(192, rows) * 30).bfloat16().T  # not contiguous
    norm = extended(norm, fast_cpu.FastRMSNorm)
    exact = F.rms_norm(x.double(), (192,), eps=1e-6) * (1 + norm.weight.double())
    # A sum of 192 squares, its root, and a few products; then the result is rounded.
    assert_within(norm(x), exact, (UNIT[torch.bfloat16] + 110 * UNIT[torch.float32]) * exact.abs() + 1e-30)


def test_upcast_product_is_the_product():
    linear, x = random_linear(37, 100, dtype=torch.bfloat16), torch.randn(2, 9, 100).bfloat16()
    exact = x.double() @ linear.weight.double().T
    assert_within(fast_cpu.upcast_product(x, linear.weight), exact, product_bound(x, linear.weight, torch.bfloat16))


def attend_with_kernel(rows: int, kv_heads: int, heads: int, slots_read: int, mask: torch.Tensor | None, cap: float | None):
    """kernels.bf16_attend on random numbers, E = 32: y, its inputs (qkv, position_ids, rotation, cache), the cache afterwards."""
    torch.manual_seed(0)
    position_ids = torch.randint(1, slots_read + 1, (rows, 1))
    qkv = (torch.randn(rows, 1, (heads + 2 * kv_heads) * 32) * 2).bfloat16()
    keys, values = torch.randn(2, rows, kv_heads, slots_read + 3, 32).bfloat16()
    rotation = rotary_embedding(position_ids, 32, 10000.0, torch.bfloat16)
    before = keys.clone(), values.clone()
    y = kernels.bf16_attend(qkv, position_ids - 1, rotation, mask, keys, values, slots_read, 0.2, cap)
    return y, qkv, position_ids, rotation, before, (keys, values)


@pytest.mark.parametrize("slots_read", [1, 17, 300, 1300])  # less than a vector; more than one; two pieces; more pieces
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize(("rows", "kv_heads", "heads"), [(1, 1, 8), (3, 2, 6), (2, 1, 5)])
def test_attention_kernel_is_rotate_write_and_attention(rows, kv_heads, heads, is_masked, cap, slots_read, variant):
    if variant is None:
        return
    mask = None
    if is_masked:
        mask = torch.rand(rows, 1, 1, slots_read, generator=torch.Generator().manual_seed(1)) < 0.5
        mask[..., -1] = True
    y, qkv, position_ids, rotation, (keys, values), written = attend_with_kernel(rows, kv_heads, heads, slots_read, mask, cap)
    q, k, v = qkv.double().view(rows, 1, -1, 32).transpose(1, 2).split((heads, kv_heads, kv_heads), dim=1)
    row, slot, half, more = torch.arange(rows), position_ids[:, 0] - 1, UNIT[torch.bfloat16], 1e-5
    exact_keys, values[row, :, slot] = keys.double(), v[:, :, 0].bfloat16()
    exact_keys[row, :, slot] = rotate(k, *rotation)[:, :, 0]
    # The sum of two products is rounded; `more` allows for the rounding of the products, which matters if they cancel.
    assert_within(written[0], exact_keys, half * exact_keys.abs() + more)
    assert torch.equal(written[1], values)
    q, k, v = rotate(q, *rotation), written[0][:, :, :slots_read].double(), values[:, :, :slots_read].double()
    expected = attention(q, k, v, mask, 0.2, cap)
    # Queries are rounded to bfloat16, which moves a score by `moved` at most (a cap does not move it further), and a share
    # by e^(2 moved); the result is rounded, too. 1e-4 is for float32 sums and for the kernel's own exponential.
    moved = half * 0.2 * (q.abs() @ k.abs().repeat_interleave(heads // kv_heads, 1).transpose(2, 3)).amax(-1, keepdim=True)
    bound = (torch.expm1(2 * moved) + 1e-4) * attention(q, k, v.abs(), mask, 0.2, cap) + half * expected.abs() + 1e-30
    assert_within(y, *(part.transpose(1, 2).reshape(rows, 1, -1) for part in (expected, bound)))


def test_attention_and_all_layers_repeat_what_is_the_same_for_all_rows(compiled):
    if compiled is None:
        return
    rows, slots_read = 3, 20
    qkv, (keys, values) = torch.randn(rows, 1, (4 + 2) * 32).bfloat16(), torch.randn(2, rows, 1, slots_read, 32).bfloat16()
    slots = torch.tensor([[slots_read - 1]])  # [1, 1], and the mask is bool[1, 1, 1, S]: one row, as torch's operators take it
    rotation = rotary_embedding(slots + 1, 32, 10000.0, torch.bfloat16)
    mask = torch.arange(slots_read)[None, None, None] % 2 == 1
    one = (slots, rotation, mask)
    each = (slots.expand(rows, 1), tuple(part.expand(rows, 1, 1, 32) for part in rotation), mask.expand(rows, 1, 1, -1))
    once, expected = (kernels.bf16_attend(qkv, *same, keys, values, slots_read, 0.2, None) for same in (one, each))
    assert torch.equal(once, expected)
    with pytest.raises(RuntimeError):  # a mask of too few slots
        kernels.bf16_attend(qkv, slots, rotation, mask[..., 1:], keys, values, slots_read, 0.2, None)
    decoder = make_decoder("gemma")
    acceleration.accelerate(decoder, min_parameters=0)
    model = decoder.language_model.model
    weights = fast_decoder.KernelLayers(model).layers
    cache = torch.randn(2, 3, rows, 2, slots_read, 32).bfloat16()
    ask = lambda slots, rotation, mask: kernels.decode(  # noqa: E731  (asked twice)
        "bf16", weights, model.norm.weight, 1e-6, torch.ones(rows, 1, 96).bfloat16(), slots, rotation, mask, mask, *cache.clone(),
        slots_read, 0.2, None,
    )  # fmt: skip
    assert torch.equal(ask(*one), ask(*each))
    with pytest.raises(RuntimeError):
        ask(slots, rotation, mask[..., 1:])


def test_a_masked_slot_is_not_looked_at_and_a_bad_one_is_seen(variant):
    if variant is None:
        return
    keys, values = torch.randn(2, 1, 1, 20, 32).bfloat16()
    rotation = rotary_embedding(torch.tensor([[20]]), 32, 10000.0, torch.bfloat16)
    ask = [torch.randn(1, 1, 4 * 32).bfloat16(), torch.tensor([[19]]), rotation]
    mask = torch.ones(1, 1, 1, 20, dtype=torch.bool)
    mask[..., 5] = False
    kernels_say = lambda: kernels.bf16_attend(*ask, mask, keys, values, 20, 0.2, None)  # noqa: E731  (asked three times)
    before = kernels_say()
    keys[0, 0, 5] = 100
    values[0, 0, 5] = 3e38  # so large that even e^-87 of it would show
    assert torch.equal(kernels_say(), before)
    keys[0, 0, 6, 0] = float("nan")
    assert kernels_say().isnan().all()


INSTRUCTIONS = pytest.mark.parametrize("instructions", BF16_ROWS)  # bfloat16 instructions of the processor


@INSTRUCTIONS
@pytest.mark.parametrize("kind", ["bf16", *KINDS])
def test_products_of_one_input_are_the_products_one_by_one(kind, instructions, variant, monkeypatch):
    if variant is None:
        return
    monkeypatch.setattr(fast_cpu, "bf16_instructions", lambda: instructions)
    linears = [random_linear(n, 128, seed, dtype=torch.bfloat16) for seed, n in enumerate((300, 37, 64))]
    if kind == "bf16":
        modules = tuple(extended(linear, fast_cpu.FastLinear) for linear in linears)
    else:
        modules = tuple(quantized(linear, kind) for linear in linears)
    most = BF16_ROWS[instructions]
    for rows in (0, 1, 3, 4, 5, 8, 90):
        x = torch.randn(rows, 1, 128).bfloat16()
        y = fast_cpu.joint_product(x, modules)
        if kind == "bf16" and not 0 < rows <= most:
            assert y is None  # torch is faster
            continue
        # The same sums in the same order: exact.
        torch.testing.assert_close(y, torch.cat([module(x) for module in modules], dim=-1), rtol=0, atol=0)


@pytest.mark.processor
@INSTRUCTIONS
@pytest.mark.parametrize("kind", ["bf16", *KINDS])
@needs_kernels
def test_fast_mlp_is_as_exact_as_the_mlp(kind, instructions, has_kernels, monkeypatch):
    monkeypatch.setattr(fast_cpu, "bf16_instructions", lambda: instructions)
    if not has_kernels:
        monkeypatch.setattr(kernels, "library", lambda: None)
    torch.manual_seed(0)
    mlp = GemmaMLP(GemmaConfig(32, 96, 160, 1, 2, 1)).bfloat16().requires_grad_(False)
    exact_mlp = copy.deepcopy(mlp).double()
    if kind != "bf16":
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(mlp, name, quantized(getattr(mlp, name), kind))
            getattr(exact_mlp, name).weight.copy_(getattr(mlp, name).weight_as_floats())
    plain_mlp, whole = copy.deepcopy(mlp), nn.ModuleDict({"mlp": mlp})
    acceleration.accelerate(whole, min_parameters=0)
    mlp = whole["mlp"]
    assert type(mlp) is fast_cpu.FastMLP
    for rows in (0, 1, 3, 4, 5, 8, 90):
        x = (torch.randn(rows, 1, 96) * 3).bfloat16()
        plain, exact = plain_mlp(x), exact_mlp(x.double())
        assert mlp(x).shape == exact.shape
        # The plain MLP rounds gate, its GELU and up to bfloat16 first; the fast MLP rounds no more than that. Both errors have
        # the same distribution, so the mean of the fast MLP's error over thousands of numbers is larger only by chance.
        if rows > 1:
            assert gap(mlp(x), exact) <= 1.5 * gap(plain, exact)
    assert mlp.double()(x.double()).dtype == torch.float64  # dtypes that the kernels do not support are computed by torch


def test_gelu_of_every_size_is_torchs(variant):
    if variant is None:
        return
    x = torch.cat((torch.linspace(-30, 30, 4801), torch.tensor([1e30, 1e-30, 0.0]))).bfloat16()
    one = torch.zeros(len(x), 32, dtype=torch.bfloat16)
    one[:, 0], up = 1, torch.zeros(len(x), 32, dtype=torch.bfloat16)
    up[:, 0] = x  # outputs x times an input of 1, gated by themselves: gelu(x) * x
    y = kernels.product("bf16", one[:1], [(up, None, len(x)), (up, None, len(x))], torch.float32, "gated")[0]
    exact = F.gelu(x.double(), approximate="tanh") * x.double()
    finite = exact.abs() < 1e38
    # torch's own GELU in float32 has the same error where its tanh is near -1; all values there are below 1e-5.
    torch.testing.assert_close(y.double()[finite], exact[finite], rtol=2e-6, atol=1e-5)


def make_decoder(family: str, **widths: int) -> nn.ModuleDict:
    """A bfloat16 decoder with widths that the kernels support, none a power of two; three query heads share a key head."""
    more = {"num_key_value_heads": 2, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 24} if family == "gemma2" else {}
    numbers = {"vocab_size": 160, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6}
    config = GemmaConfig(**({"num_key_value_heads": 2, "head_dim": 32, "model_type": family} | numbers | more | widths))
    return nn.ModuleDict({"language_model": fill(GemmaForCausalLM(config), seed=0)}).bfloat16().requires_grad_(False)


def decode(model: nn.ModuleDict, window: int | None = None, rows: int = 3) -> torch.Tensor:
    """Logits of three tokens that are decoded after rows of unequal length, [3, B, V]."""
    decoder, ids = model.language_model, torch.randint(0, 160, (3, 9), generator=torch.Generator().manual_seed(1))[:rows]
    embed = decoder.model.embed_tokens
    cache = KVCache(decoder.model.config, rows, 12, device=torch.device("cpu"), dtype=embed(ids).dtype)
    cache.set_lengths(torch.tensor([9, 6, 4])[:rows])
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    decoder.model(embed(ids), torch.arange(1, 10).expand(rows, 9), causal, cache)
    logits = []
    for token in (5, 6, 7):
        cache.reserve()
        cache.lengths.add_(1)
        windowed = None if window is None else cache.mask(window)
        x = decoder.model(embed(torch.full((rows, 1), token)), cache.lengths[:, None], cache.mask(), cache, windowed)
        logits.append(decoder.logits(x[:, 0]))
    return torch.stack(logits)


@pytest.mark.processor
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
@needs_kernels
def test_a_fast_step_is_as_exact_as_torchs(family, window, has_kernels, monkeypatch):
    if not has_kernels:
        monkeypatch.setattr(kernels, "library", lambda: None)
    plain = make_decoder(family)
    exact, fast = decode(copy.deepcopy(plain).double(), window), copy.deepcopy(plain)
    acceleration.accelerate(fast, min_parameters=0)
    layers = fast.language_model.model.layers
    assert {type(layer.self_attn) for layer in layers} == {fast_cpu.FastAttention}
    ours, torchs = gap(decode(fast, window), exact), gap(decode(plain, window), exact)
    # Both round to bfloat16, ours less often, so the errors are of the same size. Without kernels the operations are the same.
    assert ours <= 1.5 * torchs if kernels.library() else ours == torchs
    assert list(fast.state_dict()) == list(plain.state_dict())


def quantised_decoder(kind: str, family: str, **widths: int) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """An accelerated decoder with quantised weights, and a float32 decoder with the weights that these represent."""
    model = make_decoder(family, **widths)
    floats = copy.deepcopy(model).float()
    for name in quantization.targets(model):
        module = quantized(model.get_submodule(name), kind)
        model.set_submodule(name, module)
        floats.get_submodule(name).weight.data = module.weight_as_floats()[:, : module.in_features]
    acceleration.accelerate(model, min_parameters=0)
    return model, floats


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fast_step_of_a_quantised_decoder_is_that_of_its_weights(kind, family):
    model, floats = quantised_decoder(kind, family)
    # bfloat16 alone gives an error of 1e-2, inputs rounded to 8 bits as much again.
    assert gap(decode(model), decode(floats)) < 5e-2


@pytest.fixture
def kernel_steps(monkeypatch) -> list[str]:
    """The kinds of the decoding steps that kernels.decode has computed."""
    kinds, original = [], kernels.decode
    monkeypatch.setattr(kernels, "decode", lambda kind, *arguments: kinds.append(kind) or original(kind, *arguments))
    return kinds


def step_by_modules(model: nn.ModuleDict, window: int | None = None, rows: int = 3) -> torch.Tensor:
    """`decode` with one call per product instead of one call for all layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_decoder.FastDecoder, "suits_kernel", lambda *_: False)
        return decode(model, window, rows)


@pytest.mark.parametrize(("window", "rows"), [(None, 1), (None, 3), (4, 2), (4, 3)])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["bf16", *KINDS])
def test_all_layers_in_one_call_are_as_exact_as_one_call_per_product(kind, family, window, rows, variant, kernel_steps):
    if variant is None:
        return
    widths = {"hidden_size": 192, "intermediate_size": 320}  # whole groups of int8, too
    if kind == "bf16":
        model = make_decoder(family, **widths)
        floats = copy.deepcopy(model).float()
        acceleration.accelerate(model, min_parameters=0)
    else:
        model, floats = quantised_decoder(kind, family, **widths)
    exact = decode(floats.double(), window, rows)
    ours = decode(model, window, rows)
    assert kernel_steps == [kind] * 3
    # One call rounds less often, because the residual stream is float32; of many small errors, the sum differs by chance.
    assert gap(ours, exact) <= 1.5 * gap(step_by_modules(model, window, rows), exact)
    assert kernel_steps == [kind] * 3


def decoding_steps(model: nn.ModuleDict, kernel_steps: list[str]) -> int:
    """How many of the three steps of `decode` one kernel call computed, after checking that the result is as exact as without."""
    kernel_steps.clear()
    exact = decode(copy.deepcopy(model).double())
    assert gap(decode(model), exact) <= 1.5 * gap(step_by_modules(model), exact)
    return len(kernel_steps)


def test_a_changed_weight_or_module_is_noticed_at_the_next_step(compiled, kernel_steps):
    if compiled is None:
        return
    model = make_decoder("gemma")
    acceleration.accelerate(model, min_parameters=0)
    layer = model.language_model.model.layers[1]
    assert decoding_steps(model, kernel_steps) == 3
    before = decode(model)
    layer.mlp.down_proj.weight = nn.Parameter(-layer.mlp.down_proj.weight, requires_grad=False)
    assert decoding_steps(model, kernel_steps) == 3 and not torch.equal(decode(model), before)
    layer.mlp.down_proj.weight.data = -layer.mlp.down_proj.weight.data  # another address in the same parameter
    assert decoding_steps(model, kernel_steps) == 3 and torch.equal(decode(model), before)
    layer.input_layernorm = copy.deepcopy(layer.input_layernorm)
    layer.input_layernorm.weight.add_(1)
    assert decoding_steps(model, kernel_steps) == 3 and not torch.equal(decode(model), before)
    copied = copy.deepcopy(model)
    assert torch.equal(decode(copied), decode(model)) and decoding_steps(copied, kernel_steps) == 3
    del model.language_model.model.layers[0]  # the others keep their places in the cache, which the kernel does not know
    assert decoding_steps(model, kernel_steps) == 0
    layers = copied.language_model.model.layers
    layers.append(layers.pop(1))
    assert decoding_steps(copied, kernel_steps) == 0
    fourth = copy.deepcopy(layers[0])
    fourth.self_attn.layer = 1
    layers.append(fourth)  # all others stay as they are
    assert decoding_steps(copied, kernel_steps) == 0


def test_a_bias_that_a_quantised_matrix_gets_later_is_added(compiled, kernel_steps):
    if compiled is None:
        return
    model, _ = quantised_decoder("int4", "gemma", hidden_size=192, intermediate_size=320)
    decode(model)
    assert kernel_steps == ["int4"] * 3
    model.language_model.model.layers[1].mlp.down_proj.bias = nn.Parameter(torch.ones(192).bfloat16(), requires_grad=False)
    kernel_steps.clear()
    decode(model)
    assert not kernel_steps  # the modules have added it


def test_hooks_are_called_at_every_step(compiled, kernel_steps):
    if compiled is None:
        return
    model, seen = make_decoder("gemma"), []
    acceleration.accelerate(model, min_parameters=0)
    before = decode(model)
    layer = model.language_model.model.layers[1]
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook):
        kernel_steps.clear()
        seen.clear()
        handle = register(lambda *_: seen.append(1))
        decode(model)
        assert len(seen) == 4 and not kernel_steps  # the prompt and three steps
        handle.remove()
        assert torch.equal(decode(model), before) and kernel_steps == ["bf16"] * 3


class Negative(nn.Linear):
    """Another product in the place of one, as an adapter is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -super().forward(x)


@pytest.mark.parametrize("change", ["module", "bias", "gradient", "layout", "float32 norm", "width", "rows"])
def test_what_the_kernel_does_not_compute_is_computed_by_the_modules(change, compiled, kernel_steps, monkeypatch):
    if compiled is None:
        return
    model = make_decoder("gemma", **({"head_dim": 24} if change == "width" else {}))
    acceleration.accelerate(model, min_parameters=0)
    layer = model.language_model.model.layers[1]
    if change != "width":
        assert decoding_steps(model, kernel_steps) == 3
    if change == "module":
        layer.self_attn.v_proj = extended(layer.self_attn.v_proj, type("Fast", (Negative, fast_cpu.FastLinear), {}))
    elif change == "bias":
        layer.self_attn.o_proj.bias = nn.Parameter(torch.ones(96).bfloat16(), requires_grad=False)
    elif change == "rows":
        monkeypatch.setattr(fast_decoder, "MAX_ROWS", 2)
    elif change == "gradient":
        layer.mlp.up_proj.weight.requires_grad_()
    elif change == "layout":
        layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.t().contiguous().t()
    elif change == "float32 norm":
        layer.post_attention_layernorm.float()
    assert decoding_steps(model, kernel_steps) == 0
    if change == "gradient":
        with torch.no_grad():
            assert decoding_steps(model, kernel_steps) == 3


# ---------------------------------------------------------------- the embedding


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_gives_scaled_rows_and_logits(kind, dtype, has_kernels, monkeypatch):
    if not has_kernels:
        monkeypatch.setattr(kernels, "library", lambda: None)
    torch.manual_seed(0)
    embedding = GemmaEmbedding(37, 96, dtype=dtype).requires_grad_(False)
    module = quantized(embedding, kind)
    plain = GemmaEmbedding(37, 96, dtype=dtype).requires_grad_(False)
    plain.weight.copy_(module.weight_as_floats())
    ids = torch.tensor([[0, 36, 5], [16, 5, 31]])
    for _ in range(2):  # tiles; then, without kernels, rows
        assert module(ids).dtype == dtype
        torch.testing.assert_close(module(ids), plain(ids), rtol=0, atol=0)
        x = torch.randn(2, 96).to(dtype)
        assert_product(module.logits(x), x, module)


@pytest.mark.parametrize("token", [-1, 37, 40])
def test_an_id_outside_the_vocabulary_is_an_error(token):
    module = quantized(GemmaEmbedding(37, 64).requires_grad_(False), "int8")
    with pytest.raises(IndexError, match="0..36"):
        module(torch.tensor([token]))


# ---------------------------------------------------------------- saving and moving


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_mapped_back_is_bit_equal(kind, has_kernels, tmp_path, monkeypatch):
    if not has_kernels:
        monkeypatch.setattr(kernels, "library", lambda: None)
    linear, x = random_linear(40, 96, bias=True), torch.randn(3, 96)
    module = quantized(linear, kind)
    before, y = {key: value.clone() for key, value in module.state_dict().items()}, module(x)
    save_file(module.state_dict(), tmp_path / "part.safetensors")  # after a product; without kernels the layout is rows by now
    with torch.device("meta"):
        empty = quantization.empty_module(nn.Linear(96, 40), kind)
    stored = load_file(tmp_path / "part.safetensors")
    assert {key: (value.shape, value.dtype) for key, value in empty.state_dict().items()} == {
        key: (value.shape, value.dtype) for key, value in stored.items()
    }
    empty.load_state_dict(stored, assign=True)
    assert all(torch.equal(before[key], value) for key, value in stored.items())
    assert torch.equal(empty(x), y)


@pytest.mark.parametrize("kind", KINDS)
def test_another_dtype_changes_the_vectors_and_not_the_weights(kind):
    embedding = quantized(GemmaEmbedding(32, 64).requires_grad_(False), kind)
    before = copy.deepcopy(embedding)
    embedding.to(torch.bfloat16)
    assert embedding(torch.tensor([3])).dtype == torch.bfloat16
    assert torch.equal(embedding.scales, before.scales) and embedding.scales.dtype == torch.bfloat16
    assert torch.equal(embedding.weight_as_floats(), before.weight_as_floats())


# ---------------------------------------------------------------- whole models


class TinyModel(nn.Module):
    """The names that `targets` looks for."""

    def __init__(self):
        super().__init__()
        self.vision_tower = nn.ModuleDict({"fc1": nn.Linear(64, 64), "position_embedding": nn.Embedding(4, 64)})
        self.language_model = nn.ModuleDict({"embed_tokens": GemmaEmbedding(32, 64), "q_proj": nn.Linear(64, 64, bias=False)})


def test_targets_are_the_decoder_and_on_request_the_tower():
    decoder = ["language_model.embed_tokens", "language_model.q_proj"]
    assert quantization.targets(TinyModel()) == decoder
    assert quantization.targets(TinyModel(), vision=True) == ["vision_tower.fc1", *decoder]


def test_fast_products_keep_names_weights_and_gradients(compiled):
    model = TinyModel().bfloat16()
    names, x = list(model.state_dict()), torch.randn(3, 64).bfloat16()
    q_proj, embed = model.language_model.q_proj, model.language_model.embed_tokens
    expected = q_proj(x), embed.logits(x)
    acceleration.accelerate(model)
    assert type(q_proj) is nn.Linear  # a small model is not changed
    acceleration.accelerate(model, min_parameters=0)
    assert list(model.state_dict()) == names
    assert model.language_model.q_proj.weight is q_proj.weight
    q_proj, embed = model.language_model.q_proj, model.language_model.embed_tokens
    with torch.no_grad():
        torch.testing.assert_close(q_proj(x), expected[0], rtol=2**-7, atol=1e-3)  # one unit of bfloat16 for each rounding
        torch.testing.assert_close(embed.logits(x), expected[1].float(), rtol=2**-7, atol=1e-3, check_dtype=compiled is not None)
        calls = []
        if compiled is not None:
            original = kernels.product
            kernels.product = lambda *args: calls.append(args) or original(*args)
            try:
                q_proj(x)
            finally:
                kernels.product = original
            assert calls
    q_proj(x).sum().backward()
    assert q_proj.weight.grad is not None


@pytest.mark.processor
@pytest.mark.parametrize("rows", [0, 1, 4, 5, 20, 33, 65, 200])
@INSTRUCTIONS
@needs_kernels
@pytest.mark.parametrize("place", PLACES)
def test_every_choice_of_product_gives_the_product(place, rows, instructions, has_kernels, monkeypatch):
    monkeypatch.setattr(fast_cpu, "bf16_instructions", lambda: instructions)
    if not has_kernels:
        monkeypatch.setattr(kernels, "library", lambda: None)
    linear, x = random_linear(37, 96, dtype=torch.bfloat16), PLACES[place](rows, 96).bfloat16()
    exact, bias = x.double() @ linear.weight.double().T, torch.ones(37).bfloat16()
    bound = product_bound(x, linear.weight, torch.bfloat16)
    assert_within(fast_cpu.product(x, linear.weight), exact, bound)
    with_bias = exact + bias.double()
    # The sum is rounded with the bias, or before and after it is added.
    bound = bound + UNIT[torch.bfloat16] * (with_bias.abs() + bound)
    assert_within(fast_cpu.product(x, linear.weight, bias), with_bias, bound)
