"""The projection of patches (SigLIP's first layer) as one matrix product, so that a GPU does not round float32 to TF32.

nn.Conv2d in float32 uses cuDNN. On cards from sm_80 on, cuDNN by default rounds the inputs to TF32, whose fraction has 10
bits: this changes the vectors by 2e-4. The setting that prevents it, torch.backends.cudnn.allow_tf32, applies to the whole
process and would slow down other models. Matrix products do not use TF32 unless the user allows it
(torch.set_float32_matmul_precision).

Checked in tests/gpu/test_patch_product.py. Shapes: I images, C channels, H W pixels, D model width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from paligemma.layers.replacing import extended
from paligemma.modeling_siglip import SiglipVisionEmbeddings


class PatchProduct(nn.Conv2d):
    """nn.Conv2d as a matrix product, for patches that do not overlap."""

    def forward(self, pixels: Tensor) -> Tensor:
        height, width = self.kernel_size
        patches = pixels.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # [I, C, H/14, 14, W/14, 14]
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [I, H/14, W/14, C*14*14]
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)  # [I, D, H/14, W/14]


def use_product(model: nn.Module) -> None:
    """Puts a PatchProduct into the vision tower of a model."""
    for module in model.modules():
        if isinstance(module, SiglipVisionEmbeddings):
            module.patch_embedding = extended(module.patch_embedding, PatchProduct)
