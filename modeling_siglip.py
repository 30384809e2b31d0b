"""SigLIP vision tower: pixels in, one vector per patch of 14x14 pixels out.

The tower is a plain vision transformer without a class token and without pooling, because PaliGemma's decoder attends to every
patch. It runs once per picture, no matter how many tokens are generated.

Sources: ViT (arXiv:2010.11929 section 3.1), SigLIP (arXiv:2303.15343). Checked in tests/test_modeling_siglip.py.
Shapes: I images in the batch, C channels, H W pixels, P patches per image, D model width, F MLP width, N query heads,
E width of one head. In PaliGemma's tower (So400m/14) at 224 pixels these are P 256, D 1152, F 4304, N 16, E 72, in 27 layers.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from paligemma.configuration import SiglipVisionConfig


class SiglipVisionEmbeddings(nn.Module):
    """Cuts the picture into patches, projects each to a vector, and adds a learned position embedding (ViT, equation 1)."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        width, side = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=side, stride=side)
        self.position_embedding = nn.Embedding(config.num_patches, width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embedding(pixel_values)  # [I, D, H/14, W/14]
        x = x.flatten(2).transpose(1, 2)  # [I, P, D]
        return x + self.position_embedding.weight  # patch i is in row i // (W/14), column i % (W/14)


class SiglipAttention(nn.Module):
    """Attention of every patch to every patch, without a mask; only the position embedding tells where a patch is."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [I, N, P, E]
        k = self.k_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [I, N, P, E]
        v = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [I, N, P, E]
        x = F.scaled_dot_product_attention(q, k, v)  # [I, N, P, E]
        x = x.transpose(1, 2).flatten(2)  # [I, P, D]
        return self.out_proj(x)


class SiglipMLP(nn.Module):
    """Projects each patch vector to width F, applies GELU, and projects back to width D."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x), approximate="tanh")  # [I, P, F]
        return self.fc2(x)


class SiglipEncoderLayer(nn.Module):
    """Attention and MLP: y = x + attention(norm(x)), then y + mlp(norm(y)) (ViT, equations 2 and 3)."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SiglipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipEncoder(nn.Module):
    """The stack of layers. It is a separate module because the parameter names of published checkpoints contain `encoder`."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class SiglipVisionTransformer(nn.Module):
    """Embeddings, layers and a final norm (ViT, equation 4, applied to every patch instead of a class token)."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.embeddings = SiglipVisionEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.post_layernorm(self.encoder(self.embeddings(pixel_values)))


class SiglipVisionModel(nn.Module):
    """The whole tower.

    Args of forward:
        pixel_values: float[I, C, H, W] in [-1, 1] with H = W = config.image_size. They are cast to the dtype of the weights.
    Returns: [I, P, D] in the dtype of the weights; patches are in reading order (row by row, left to right).
    Raises: ValueError if pixel_values has another shape.
    """

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.vision_model = SiglipVisionTransformer(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        side = self.config.image_size
        if pixel_values.dim() != 4 or pixel_values.shape[1:] != (self.config.num_channels, side, side):
            raise ValueError(
                f"pixel_values has the shape {list(pixel_values.shape)}, "
                f"but [pictures, {self.config.num_channels}, {side}, {side}] is needed."
            )
        dtype = self.vision_model.embeddings.patch_embedding.weight.dtype
        return self.vision_model(pixel_values.to(dtype))
