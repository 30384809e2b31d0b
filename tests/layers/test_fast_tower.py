"""fast_tower.py: the tower's modules in our kernels compute what the plain modules compute, and give way where they must."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paligemma.configuration import SiglipVisionConfig
from paligemma.layers import acceleration, fast_cpu, fast_tower, kernels, quantization
from paligemma.layers.kernel_check import layer_norm_bound
from paligemma.layers.lora import LoRALinear
from paligemma.layers.replacing import extended
from paligemma.modeling_siglip import SiglipVisionModel
from tests.bounds import UNIT, assert_within, exact_arithmetic, gap
from tests.tiny import fill

HALF, SINGLE = UNIT[torch.bfloat16], UNIT[torch.float32]


def make_tower(dtype: torch.dtype = torch.bfloat16) -> nn.ModuleDict:
    """A tower with So400m's width of a head, 72, and like it an MLP width that is not a multiple of 32."""
    config = SiglipVisionConfig(
        hidden_size=288, intermediate_size=336, num_hidden_layers=3, num_attention_heads=4, image_size=84, patch_size=14
    )
    return nn.ModuleDict({"vision_tower": fill(SiglipVisionModel(config), seed=0)}).to(dtype).requires_grad_(False)


def pixels(pictures: int) -> torch.Tensor:
    return torch.rand(pictures, 3, 84, 84, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (9, 48), (40, 1152)])
def test_the_norm_kernel_is_layer_norm(rows, width, variant):
    if variant is None:
        return
    torch.manual_seed(0)
    x = (torch.randn(rows, width) * torch.logspace(-2, 2, rows)[:, None] + 3).bfloat16()
    weight, bias = torch.randn(2, width).bfloat16()
    eps = 1e-6
    exact = F.layer_norm(x.double(), (width,), weight.double(), bias.double(), eps)
    assert_within(kernels.bf16_layer_norm(x, weight, bias, eps), exact, layer_norm_bound(x, weight, bias, exact, eps))


def test_the_norm_copies_rows_that_are_transposed_in_memory():
    norm = fill(nn.LayerNorm(48), seed=0).bfloat16().requires_grad_(False)
    x = torch.randn(48, 5).bfloat16().T
    fast = extended(norm, fast_tower.FastLayerNorm)
    assert torch.equal(fast(x), fast(x.contiguous()))


@pytest.mark.processor
@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("pictures", [1, 2])
def test_a_fast_tower_is_as_exact_as_torchs(pictures, has_kernels, monkeypatch):
    if not has_kernels:
        monkeypatch.setattr(kernels, "library", lambda: None)
    plain, x = make_tower(), pixels(pictures)
    fast = copy.deepcopy(plain)
    acceleration.accelerate(fast, min_parameters=0)
    assert type(fast.vision_tower.vision_model.encoder.layers[0].self_attn) is fast_tower.FastSiglipAttention
    with exact_arithmetic():
        exact = copy.deepcopy(plain).double().vision_tower(x.double())
    # Both round to bfloat16, ours less often, so the errors are of the same size.
    assert gap(fast.vision_tower(x), exact) <= 1.5 * gap(plain.vision_tower(x), exact)
    assert list(fast.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_computed_by_the_plain_modules(dtype):
    plain, x = make_tower(dtype), pixels(1)
    fast = copy.deepcopy(plain)
    acceleration.accelerate(fast, min_parameters=0)
    assert torch.equal(fast.vision_tower(x), plain.vision_tower(x))


def test_gradients_are_those_of_the_plain_tower():
    plain = make_tower()
    plain.vision_tower.vision_model.encoder.layers[1].requires_grad_(True)
    fast = copy.deepcopy(plain)
    acceleration.accelerate(fast, min_parameters=0)
    gradients = []
    for model in (plain, fast):
        hidden = model.vision_tower.vision_model.encoder.layers[1](torch.ones(1, 36, 288, dtype=torch.bfloat16))
        hidden.float().square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) == 16
    # The same operations: exact.
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


@pytest.mark.parametrize("place", ["bias", "adapter", "autocast", "tracing"])
def test_kernels_give_way(place, monkeypatch):
    """Where a bias is trained, an adapter is trained, autocast chooses another dtype, or torch.compile traces."""
    model = make_tower()
    acceleration.accelerate(model, min_parameters=0)
    layer, x = model.vision_tower.vision_model.encoder.layers[0], torch.randn(1, 3, 288, dtype=torch.bfloat16)

    def refuse(*_, **__):
        raise AssertionError("a kernel was called.")

    for name in ("product", "bf16_attend_many", "bf16_layer_norm"):
        monkeypatch.setattr(kernels, name, refuse)
    if place == "bias":
        for module in (layer.layer_norm1, layer.layer_norm2, layer.self_attn.v_proj, layer.mlp.fc1):
            module.bias.requires_grad_(True)
        assert layer.layer_norm1(x).requires_grad and layer.self_attn(x[:, :0]).requires_grad
        assert fast_cpu.joint_product(x, (layer.mlp.fc1,), "gelu") is None
    elif place == "adapter":
        layer.self_attn.q_proj = LoRALinear(layer.self_attn.q_proj, rank=2, scaling=1.0)
        assert not fast_cpu.suits_kernel_attention(x, (layer.self_attn.q_proj, layer.self_attn.k_proj))
        assert fast_cpu.joint_product(x, (layer.self_attn.q_proj, layer.self_attn.k_proj)) is None
    elif place == "autocast":
        with torch.autocast("cpu", torch.float16):
            assert layer.self_attn(x).dtype is layer.mlp(x).dtype is torch.float16
            assert layer.layer_norm1(x).dtype is nn.LayerNorm.forward(layer.layer_norm1, x).dtype
    else:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert layer(x).isfinite().all()


def test_a_frozen_tower_is_as_fast_under_autocast():
    """In the training of an adapter, autocast computes in bfloat16: then the same kernels give the same numbers."""
    model, x = make_tower(), pixels(2)
    acceleration.accelerate(model, min_parameters=0)
    expected = model.vision_tower(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.vision_tower(x)
    assert found.dtype is torch.bfloat16 and torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_tower_is_that_of_its_weights(kind):
    model, x = make_tower(), pixels(2)
    floats = copy.deepcopy(model).double()
    for name in quantization.targets(model, vision=True):
        linear = model.get_submodule(name)
        module = quantization.quantize_module(linear, kind, dict(linear.named_parameters()))
        model.set_submodule(name, module)
        floats.get_submodule(name).weight.data = module.weight_as_floats()[:, : module.in_features].double()
    plain = copy.deepcopy(model)
    acceleration.accelerate(model, min_parameters=0)
    with exact_arithmetic():
        exact = floats.vision_tower(x.double())
    # Both round to bfloat16, and inputs to 8 bits; ours round to bfloat16 less often.
    assert gap(model.vision_tower(x), exact) <= 1.5 * gap(plain.vision_tower(x), exact)
