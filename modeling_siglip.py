"""SigLIP vision tower: pixels in, one vector per 14x14 patch out. Imports nothing from this project.

A plain vision transformer. There is no class token and no pooling: PaliGemma's decoder reads every patch. It runs once
per picture, however many words are generated.

Sources: ViT (arXiv:2010.11929 section 3.1), SigLIP (arXiv:2303.15343). Checked in tests/test_modeling_siglip.py.
Shapes (the same letters in the whole project): B batch, I pictures in the whole batch, C channels, H W pixels,
P patches per picture, L tokens fed in this call, S slots of the KV cache, D model width, F MLP width, N query heads,
K key/value heads, E width of one head, V vocabulary.
"""

from dataclasses import dataclass, fields

import torch.nn.functional as F
from torch import Tensor, nn

LARGEST_SIZE = 2**20  # no width or depth of a real model comes near; a damaged config.json does
LARGEST_SIDE = 2**12  # pixels; published models have at most 896
MOST_PATCHES = 2**16  # published models have at most 4096


@dataclass(frozen=True)
class SiglipVisionConfig:
    """The numbers that define a tower, under the names of `vision_config` in config.json.

    The defaults are those of transformers' class, which leaves out of a file what equals them.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        for field in fields(self):
            value, largest = getattr(self, field.name), LARGEST_SIDE if field.name == "image_size" else LARGEST_SIZE
            if field.type is int and not (type(value) is int and 0 < value <= largest):
                raise ValueError(f"vision_config.{field.name} is {value!r}; a whole number from 1 to {largest} is needed.")
        if not (type(self.layer_norm_eps) is float and 1e-20 <= self.layer_norm_eps < 1):
            raise ValueError(f"vision_config.layer_norm_eps is {self.layer_norm_eps!r}; a small positive number is needed.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"vision_config.num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}."
            )
        if self.image_size % self.patch_size:
            raise ValueError(f"vision_config.patch_size {self.patch_size} does not divide image_size {self.image_size}.")
        if self.num_patches > MOST_PATCHES:
            raise ValueError(f"vision_config asks for {self.num_patches} patches per picture; at most {MOST_PATCHES} make sense.")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_hf(cls, raw: dict) -> "SiglipVisionConfig":
        """Reads `vision_config` of config.json. Raises ValueError for anything that this file does not implement.

        What PaliGemma does not use is not looked at: `vision_use_head` is written as true where it was never set, and
        `num_positions` and `num_image_tokens` are not always those of the weights.
        """
        if raw.get("model_type") not in (None, "siglip_vision_model"):
            raise ValueError(f"vision_config.model_type is {raw['model_type']!r}; 'siglip_vision_model' is needed.")
        if raw.get("hidden_act") not in (None, "gelu_pytorch_tanh"):
            raise ValueError(f"vision_config.hidden_act is {raw['hidden_act']!r}; 'gelu_pytorch_tanh' is needed.")
        return cls(**{field.name: raw[field.name] for field in fields(cls) if raw.get(field.name) is not None})


class SiglipVisionEmbeddings(nn.Module):
    """Cuts the picture into patches, one vector each, and adds a learned vector for the place (ViT, equation 1)."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        width, side = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=side, stride=side)
        self.position_embedding = nn.Embedding(config.num_patches, width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embedding(pixel_values)  # [I, D, H/14, W/14]
        x = x.flatten(2).transpose(1, 2)  # [I, P, D]
        return x + self.position_embedding.weight  # patch i lies in row i // (W/14), column i % (W/14)


class SiglipAttention(nn.Module):
    """Every patch looks at every patch: no mask, no order but the position embedding."""

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
    """Widens each patch vector to F, bends it, narrows it again."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x), approximate="tanh")  # [I, P, F]
        return self.fc2(x)


class SiglipEncoderLayer(nn.Module):
    """Attention, then MLP, each on a normalised copy and added back (ViT, equations 2 and 3)."""

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
    """The stack of layers, under the name that published checkpoints give it."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class SiglipVisionTransformer(nn.Module):
    """Embeddings, layers, one last norm (ViT, equation 4, for every patch instead of a class token)."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.embeddings = SiglipVisionEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.post_layernorm(self.encoder(self.embeddings(pixel_values)))


class SiglipVisionModel(nn.Module):
    """The tower as PaliGemma uses it.

    Args of forward:
        pixel_values: float[I, 3, R, R] in [-1, 1], R = config.image_size; any float dtype, cast to that of the weights.
    Returns: [I, P, D] in the dtype of the weights, patches in reading order.
    Raises: ValueError for pixels of another shape.
    """

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.vision_model = SiglipVisionTransformer(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        side = self.config.image_size
        if pixel_values.dim() != 4 or pixel_values.shape[1:] != (self.config.num_channels, side, side):
            raise ValueError(
                f"pixel_values is {list(pixel_values.shape)}; [pictures, {self.config.num_channels}, {side}, {side}] is needed."
            )
        dtype = self.vision_model.embeddings.patch_embedding.weight.dtype
        return self.vision_model(pixel_values.to(dtype))
