"""The projection of patches as a matrix product: the same numbers as the convolution, the same parameters, no convolution."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from paligemma.gpu import patch_product
from paligemma.gpu.patch_product import PatchProduct
from paligemma.layers.replacing import extended
from tests.tiny import FAMILIES, make_model


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("height,width", [(28, 28), (14, 42)])
def test_the_product_is_the_convolution(height, width):
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(3, 24, kernel_size=14, stride=14)
    pixels = torch.randn(2, 3, height, width)
    # Sums of 588 products in another order: 1e-6 is the largest gap over 20 seeds, so 5e-6 leaves a factor of 5.
    torch.testing.assert_close(extended(plain, PatchProduct)(pixels), plain(pixels), rtol=0, atol=5e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_has_no_convolution_left_and_the_same_parameters(family):
    model = make_model(family)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    side = model.config.vision_config.image_size
    pixels = torch.rand(2, 3, side, side)
    with torch.no_grad(), Operators() as plain:
        expected = model.encode_images(pixels)
    patch_product.use_product(model)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    with torch.no_grad(), Operators() as ours:
        found = model.encode_images(pixels)
    # The test is of another order of sums, through all layers: 3e-6 was seen.
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert any("convolution" in name for name in plain.names) and not any("convolution" in name for name in ours.names)


def test_gradients_reach_the_parameters():
    plain = torch.nn.Conv2d(3, 4, kernel_size=14, stride=14)
    extended(plain, PatchProduct)(torch.randn(1, 3, 28, 28)).sum().backward()
    assert plain.weight.grad is not None and plain.bias.grad is not None
