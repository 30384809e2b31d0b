"""quantization.py, kernels.py and kernels.cpp: rounding, layouts, products, fallbacks, and what is saved."""

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import kernels
import quantization
from modeling_gemma import GemmaEmbedding, GemmaRMSNorm
from quantization import KINDS, QuantizedLinear

ROOT = Path(__file__).resolve().parents[1]
SIZES = [(48, 64), (37, 100), (300, 256), (64, 4304)]  # whole blocks; neither side whole; blocks by 8, 4 and 1; the tower's fc2
# Error of the products against exact inputs, relative in norm. The kernels round inputs to 8 bits: 0.0092 is the largest of 200
# seeds at K = 64. Without them only float32 sums are reordered (2e-7), and bfloat16 rounds the result (2.6e-3).
TOLERANCE = {"kernel": 1.5e-2, torch.float32: 2e-6, torch.bfloat16: 5e-3}

needs_kernels = pytest.mark.parametrize("has_kernels", [True, False])


@pytest.fixture(autouse=True, scope="module")
def compiled():
    """The kernels as they are on this machine; a test that needs them absent takes them away itself."""
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


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


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
    packed, scales = quantization.quantize(weight, kind)
    monkeypatch.setattr(kernels, "library", lambda: None)
    same_packed, same_scales = quantization.quantize(weight, kind)
    # Exact but for ties that fall the other way because sums are reordered or x * (1 / s) is fused: 1 in a million seen.
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


# ---------------------------------------------------------------- layouts


def test_tiles_hold_what_the_header_draws():
    q = (torch.arange(16 * 64, dtype=torch.int32).view(16, 64) % 251 - 125).to(torch.int8)
    tiles = quantization.to_tiles(q, "int8")
    assert tiles.shape == (1, 16, 64)
    assert tiles[0, 3, 4 * 5 + 2] == q[5, 4 * 3 + 2].item() + 128
    q = (torch.arange(16 * 32, dtype=torch.int32).view(16, 32) % 16 - 8).to(torch.int8)
    tiles = quantization.to_tiles(q, "int4")
    assert tiles.shape == (1, 4, 64)
    assert tiles[0, 1, 4 * 7 + 3] == (q[7, 8 + 3].item() + 8) | (q[7, 8 + 4 + 3].item() + 8) << 4


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_turn_back(kind):
    low, high = (-127, 128) if kind == "int8" else (-8, 8)
    q = torch.randint(low, high, (48, 128), dtype=torch.int8)
    assert torch.equal(quantization.from_tiles(quantization.to_tiles(q, kind), kind), q)
    assert torch.equal(quantization.from_rows(quantization.to_rows(q, kind), kind), q)


# ---------------------------------------------------------------- products


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 13, 64])
@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_module_multiplies_with_its_weights(kind, n, k, rows, dtype, has_kernels, monkeypatch):
    if not has_kernels:
        monkeypatch.setattr(kernels, "library", lambda: None)
    module = quantized(random_linear(n, k, bias=True, dtype=dtype), kind)
    weight = module.weight_as_floats()
    x = torch.randn(rows, k).to(dtype)
    y = module(x)
    assert y.dtype == dtype
    tolerance = TOLERANCE["kernel"] if has_kernels and kernels.library() else TOLERANCE[dtype]
    if not has_kernels and kind == "int4" and rows <= quantization.FEW_ROWS:
        tolerance = TOLERANCE[torch.bfloat16]  # torch's int4 product takes bfloat16 only
    assert gap(y, F.linear(x.float(), weight, module.bias.float())) < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_the_same_alone_and_among_others(kind):
    module, x = quantized(random_linear(70, 128), kind), torch.randn(9, 128)
    # Integer sums, then the same float operations for each row: exact.
    torch.testing.assert_close(torch.cat([module(row[None]) for row in x]), module(x), rtol=0, atol=0)


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
    assert gap(module(x), x.float() @ module.weight_as_floats().T) < TOLERANCE["kernel"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gpu_product_is_the_same_sum(kind, without_kernels):  # noqa: ARG001  (a fixture is used by being named)
    module, x = quantized(random_linear(48, 128), kind), torch.randn(3, 128)
    y = module(x)  # puts the weights into rows
    fused = quantization.few_rows_product(x, module.packed, module.scales, kind)
    assert gap(fused, x @ module.weight_as_floats().T) < TOLERANCE[torch.float32]
    assert gap(fused, y) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7, 40])
@pytest.mark.parametrize(("n", "k"), [(37, 96), (300, 2048)])
def test_bfloat16_kernel_equals_float32_rounded(n, k, rows, compiled):
    if compiled is None:
        return
    linear = random_linear(n, k, dtype=torch.bfloat16)
    x = torch.randn(rows, k).bfloat16()
    exact = x.double() @ linear.weight.double().T
    # Half a unit in the last place of bfloat16 (2^-9) and a little for the float32 sums, where terms cancel.
    torch.testing.assert_close(kernels.bf16_product(x, linear.weight).double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_fast_norm_equals_the_norm(rows):
    torch.manual_seed(0)
    norm = GemmaRMSNorm(192, 1e-6).requires_grad_(False)
    norm.weight.normal_(std=0.1)
    norm, x = norm.bfloat16(), (torch.randn(rows, 192) * 30).bfloat16()
    expected = norm(x)
    norm.__class__ = quantization.FastRMSNorm
    # Sums are reordered, so that a result may round to the neighbouring bfloat16.
    torch.testing.assert_close(norm(x), expected, rtol=2**-7, atol=0)
    assert (norm(x) == expected).float().mean() > 0.97


def test_upcast_product_equals_float32_rounded():
    linear, x = random_linear(37, 100, dtype=torch.bfloat16), torch.randn(2, 9, 100).bfloat16()
    exact = x.double() @ linear.weight.double().T
    torch.testing.assert_close(quantization.upcast_product(x, linear.weight).double(), exact, rtol=2**-8, atol=1e-5)


def test_generic_and_avx2_kernels_give_the_same_bytes(tmp_path, monkeypatch, compiled):
    """The code for other processors, run on this one: integer sums are exact, so that even floats must agree."""
    if compiled is None:
        return
    for flags in (("-mavx2", "-mfma"), ()) if os.uname().machine == "x86_64" else ((),):
        shared = tuple(flag for flag in kernels.FLAGS if flag not in ("-march=native", "-O3"))
        monkeypatch.setattr(kernels, "FLAGS", (*shared, "-O1", *flags))  # -O3 takes twice as long
        file = kernels.compile_once(ROOT / "kernels.cpp", tmp_path)
        other = kernels.open_library(file)
        for kind in KINDS:
            module, x = quantized(random_linear(48, 128), kind), torch.randn(7, 128)
            monkeypatch.setattr(kernels, "library", lambda: compiled)
            expected = module(x)
            monkeypatch.setattr(kernels, "library", lambda other=other: other)
            # One fused multiply-add more or less in the scales: a few units in the last place.
            torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-6)


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
        assert gap(module.logits(x), x.float() @ module.weight_as_floats().T) < TOLERANCE["kernel"]


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
    save_file(module.state_dict(), tmp_path / "part.safetensors")  # after a product: without kernels from rows
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
    quantization.use_fast_products(model)
    assert type(q_proj) is nn.Linear  # a small model is left alone
    quantization.use_fast_products(model, least_parameters=0)
    assert list(model.state_dict()) == names
    with torch.no_grad():
        torch.testing.assert_close(q_proj(x), expected[0], rtol=2**-7, atol=1e-3)  # a unit of bfloat16, on either side
        torch.testing.assert_close(embed.logits(x), expected[1], rtol=2**-7, atol=1e-3)
        calls = []
        if compiled is not None:
            original = kernels.bf16_product
            kernels.bf16_product = lambda *args: calls.append(args) or original(*args)
            try:
                q_proj(x)
            finally:
                kernels.bf16_product = original
            assert calls
    q_proj(x).sum().backward()
    assert q_proj.weight.grad is not None


@pytest.mark.parametrize("rows", [1, 4, 5, 20, 200])
@pytest.mark.parametrize("has_instructions", [True, False])
@needs_kernels
def test_every_choice_of_product_gives_the_product(rows, has_instructions, has_kernels, monkeypatch):
    monkeypatch.setattr(quantization, "has_bf16_instructions", lambda: has_instructions)
    if not has_kernels:
        monkeypatch.setattr(kernels, "library", lambda: None)
    linear, x = random_linear(37, 96, dtype=torch.bfloat16), torch.randn(rows, 96).bfloat16()
    exact = x.double() @ linear.weight.double().T
    torch.testing.assert_close(quantization.product(x, linear.weight).double(), exact, rtol=2**-7, atol=1e-5)


# ---------------------------------------------------------------- compiling


def test_no_compiler_means_no_library(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert kernels.compile_once(ROOT / "kernels.cpp", tmp_path / "cache") is None


def test_a_source_that_does_not_compile_is_tried_once(tmp_path, monkeypatch, compiled):
    if compiled is None:
        return
    source = tmp_path / "broken.cpp"
    source.write_text("this is no C++")
    assert kernels.compile_once(source, tmp_path / "cache") is None
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".failed"]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert kernels.compile_once(source, tmp_path / "cache") is None


def test_a_folder_that_cannot_be_written_means_no_library(tmp_path):
    (tmp_path / "file").write_text("")
    assert kernels.compile_once(ROOT / "kernels.cpp", tmp_path / "file" / "cache") is None


def test_programs_that_start_together_all_get_the_whole_file(tmp_path, compiled):
    if compiled is None:
        return
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    with ThreadPoolExecutor(4) as pool:
        files = set(pool.map(lambda _: kernels.compile_once(source, tmp_path / "cache"), range(4)))
    assert [file.name for file in files] == [file.name for file in (tmp_path / "cache").iterdir()]  # and nothing half is left


def test_a_program_told_to_do_without_kernels_does():
    code = "import kernels; print(kernels.library())"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PALIGEMMA_KERNELS": "off"}, capture_output=True, text=True
    )
    assert answer.stdout.strip() == "None"
