"""Frozen parts of a model in training: gradients of our kernels against float64, and no gradient that is not needed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from paligemma.configuration import GemmaConfig
from paligemma.layers import acceleration, fast_cpu, kernels, lora
from paligemma.layers.replacing import extended
from paligemma.learning import training
from paligemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from tests.bounds import UNIT, assert_within, product_bound
from tests.tiny import make_batch, make_model

HALF = UNIT[torch.bfloat16]
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Products(TorchDispatchMode):
    """Inside, the shapes of the results of torch's matrix products are collected."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        if function.overloadpacket in PRODUCTS:
            self.shapes.append(tuple(y.shape))
        return y


def adapted_model(is_fast):
    model = make_model("gemma", dtype=torch.bfloat16)
    if is_fast:
        acceleration.accelerate(model, min_parameters=0)
    training.add_adapter(model, lora.LoraConfig(r=3), ["language_model"])
    return model


def labelled_batch():
    batch = make_batch([(1, 5, 3), (1, 2, 6)])
    return batch | {"labels": batch["input_ids"].masked_fill(batch["token_type_ids"] * batch["attention_mask"] == 0, -100)}


@pytest.mark.parametrize(("is_fast", "instructions"), [(False, "nothing"), (True, "pairs"), (True, "nothing")])
def test_the_backward_pass_has_one_product_per_frozen_matrix(is_fast, instructions, monkeypatch):
    """And four for each pair A, B. The tower gets none, and the first layer no gradient of its input, which nothing needs."""
    model, ours, original = adapted_model(is_fast), [], kernels.product
    monkeypatch.setattr(fast_cpu, "bf16_instructions", lambda: instructions)
    monkeypatch.setattr(kernels, "product", lambda *args, **more: ours.append(more) or original(*args, **more))
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = training.answer_losses(model, labelled_batch())
    ours.clear()
    with Products() as torchs:
        losses.sum().backward()
    names = [name for name, _ in lora.adapted(model)]
    inputs_only = 3  # q, k and v of the first layer: their input needs no gradient, neither by W nor by A
    assert len(ours) + len(torchs.shapes) == 5 * len(names) - 2 * inputs_only + 1  # 1: the logits
    is_ours = is_fast and instructions == "nothing" and kernels.library() is not None
    assert len(ours) == (len(names) - inputs_only + 1 if is_ours else 0)
    assert all(more == {"is_transposed": True} for more in ours)
    frozen = {tuple(parameter.shape) for parameter in model.parameters() if not parameter.requires_grad}
    assert not frozen & set(torchs.shapes)
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("instructions", ["nothing", "pairs"])
@pytest.mark.parametrize("outputs", [40, 37])
def test_a_frozen_product_has_the_gradient_of_its_input(outputs, instructions, monkeypatch):
    monkeypatch.setattr(fast_cpu, "bf16_instructions", lambda: instructions)
    linear = nn.Linear(96, outputs).bfloat16().requires_grad_(False)
    x, dy = torch.randn(2, 11, 96).bfloat16().requires_grad_(), torch.randn(2, 11, outputs).bfloat16()
    for given in (dy, dy[:1].expand(2, -1, -1), dy.transpose(0, 1).contiguous().transpose(0, 1)):
        (dx,) = torch.autograd.grad(fast_cpu.product(x, linear.weight, linear.bias), x, given)
        exact = given.double() @ linear.weight.double()
        assert_within(dx, exact, product_bound(given, linear.weight.T, torch.bfloat16))


def test_a_trained_weight_or_bias_has_its_gradient():
    x = torch.randn(12, 96).bfloat16()
    for trained in ("weight", "bias"):
        linear = nn.Linear(96, 40).bfloat16().requires_grad_(False)
        getattr(linear, trained).requires_grad_(True)
        fast_cpu.product(x, linear.weight, linear.bias).sum().backward()
        assert getattr(linear, trained).grad is not None


def test_the_norm_has_its_gradient():
    """Found with torch's autograd in float64."""
    norm = GemmaRMSNorm(192, 1e-6).bfloat16().requires_grad_(False)
    norm.weight.normal_(std=0.1)
    x, dy = (torch.randn(3, 7, 192) * 30).bfloat16().requires_grad_(), torch.randn(3, 7, 192).bfloat16()
    (dx,) = torch.autograd.grad(extended(norm, fast_cpu.FastRMSNorm)(x), x, dy)
    exact_x = x.detach().double().requires_grad_()
    normal = F.rms_norm(exact_x, (192,), eps=1e-6) * (1 + norm.weight.double())
    (exact,) = torch.autograd.grad(normal, exact_x, dy.double())
    # dx = r (g - x r^2 mean(g x)): the errors of its two sums of 192 products, and the rounding of the result.
    numbers, g = x.detach().double(), dy.double() * (1 + norm.weight.double())
    square = 1 / (numbers.square().mean(-1, keepdim=True) + 1e-6)
    sizes = square.sqrt() * (g.abs() + numbers.abs() * square * (g * numbers).abs().mean(-1, keepdim=True))
    error = 3 * 200 * UNIT[torch.float32] * sizes
    assert_within(dx, exact, error + HALF * (exact.abs() + error))


def test_the_gate_has_the_gradients_of_torch():
    """The plain MLP rounds GELU and its products to bfloat16 one by one; ours rounds each gradient once."""
    plain = GemmaMLP(GemmaConfig(32, 96, 160, 1, 2, 1)).bfloat16().requires_grad_(False)
    fast, exact_mlp = extended(copy.deepcopy(plain), fast_cpu.FastMLP), copy.deepcopy(plain).double()
    x, dy = (torch.randn(50, 96) * 3).bfloat16(), torch.randn(50, 96).bfloat16()
    gradients = []
    for mlp in (plain, fast, exact_mlp):
        leaf = x.to(mlp.down_proj.weight.dtype).requires_grad_()
        gradients.append(torch.autograd.grad(mlp(leaf), leaf, dy.to(leaf.dtype))[0].double())
    theirs, ours, exact = gradients
    # Both errors have the same distribution, so over thousands of numbers ours is larger only by chance.
    assert (ours - exact).square().mean() <= 1.5 * (theirs - exact).square().mean()


def test_gradients_of_an_adapter_are_those_of_float64():
    """With bfloat16 weights under autocast: as near to float64 as torch's own products, norms and gates are."""
    plain, fast = adapted_model(False), adapted_model(True)
    for _, layer in lora.adapted(plain):
        nn.init.normal_(layer.lora_B.weight, std=0.1)
    fast.load_state_dict(plain.state_dict())
    exact_model = copy.deepcopy(plain).double()
    found = []
    for model in (plain, fast, exact_model):
        with torch.autocast("cpu", torch.bfloat16, enabled=model is not exact_model):
            training.answer_losses(model, labelled_batch())[0].sum().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        found.append(torch.cat([gradient.double().flatten() for gradient in gradients]))
    theirs, ours, exact = found
    # Both round the same numbers to bfloat16, or ours fewer; over thousands of gradients ours is farther only by chance.
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()
