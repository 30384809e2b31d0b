"""Modules of the vision tower that compute faster on a CPU in bfloat16. `acceleration.accelerate` puts them into a model.

Each class replaces a module of modeling_siglip.py or nn.LayerNorm and keeps the parameters under the same names. If gradients are
needed, and wherever our kernels cannot be used, it computes what the plain module computes.

Checked in tests/layers/test_fast_tower.py. Shapes: as in modeling_siglip.py.
"""

from torch import Tensor, nn

from paligemma.layers import kernels
from paligemma.layers.fast_cpu import is_bf16_without_gradient, joint_product, project_heads, suits_kernel_attention
from paligemma.modeling_siglip import SiglipAttention, SiglipMLP, SiglipVisionEmbeddings


class FastSiglipEmbeddings(SiglipVisionEmbeddings):
    """SiglipVisionEmbeddings whose result is contiguous.

    The vectors of the plain module are transposed in memory, and so is every sum with them: each norm would make a copy.
    """

    def forward(self, pixel_values: Tensor) -> Tensor:
        return super().forward(pixel_values).contiguous()


class FastLayerNorm(nn.LayerNorm):
    """nn.LayerNorm in one kernel call."""

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight, self.bias
        if len(self.normalized_shape) > 1 or w.numel() % 16 or kernels.library() is None:
            return super().forward(x)
        if b is None or not is_bf16_without_gradient(x, w) or not is_bf16_without_gradient(x, b):
            return super().forward(x)
        return kernels.bf16_layer_norm(x, w, b, self.eps)


class FastSiglipAttention(SiglipAttention):
    """SiglipAttention in three kernel calls: for q, k and v, for attention, and for the output."""

    def forward(self, x: Tensor) -> Tensor:
        matrices, width = (self.q_proj, self.k_proj, self.v_proj), self.q_proj.out_features // self.heads  # E
        if width % 2 or not suits_kernel_attention(x, matrices):
            return super().forward(x)
        q, k, v = project_heads(x, matrices, width)  # [I, N, P, E], [I, N, P, E], [I, N, P, E]
        return self.out_proj(kernels.bf16_attend_many(q, k, v, None, width**-0.5, None))


class FastSiglipMLP(SiglipMLP):
    """SiglipMLP with its first product and GELU in one kernel call."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = joint_product(x, (self.fc1,), activation="gelu")  # [I, P, F]
        return super().forward(x) if hidden is None else self.fc2(hidden)
