"""The whole SigLIP model, from which PaliGemma takes its vision tower: one tower for pictures and one for texts.

Of the files of PaliGemma's model, only modeling_siglip.py is needed.

    picture -> vision tower -> attention pooling -> image_embeds ─┐ cosine * exp(logit_scale) + logit_bias -> logits
    text    -> text tower   -> last token, linear -> text_embeds ─┘ does this text belong to this picture?

PaliGemma takes the vision tower without the pooling and trains it further, so its vision tower no longer fits the text tower.

This file has two losses. CLIP's loss is a softmax: which of all texts of the batch belongs to this picture? SigLIP's loss is a
sigmoid per pair: do this picture and this text belong together? In SigLIP's loss the pairs are independent, so a batch can be
split into blocks over several processes.

Sources: SigLIP (arXiv:2303.15343; equation 1 and algorithm 1), CLIP (arXiv:2103.00020, figure 3). Checked in
tests/demo/test_siglip_contrastive.py against transformers.
Shapes: I images, B texts, L tokens of a text, C channels, H W pixels, P patches per image, D model width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from paligemma.configuration import SiglipVisionConfig
from paligemma.modeling_siglip import SiglipEncoder, SiglipMLP, SiglipVisionTransformer


@dataclass(frozen=True)
class SiglipTextConfig:
    """The numbers that define a text tower, under the names of `text_config` in config.json; the defaults are those of So400m."""

    vocab_size: int = 32000
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    max_position_embeddings: int = 64  # texts are padded to this length; padding is attended to like any token
    layer_norm_eps: float = 1e-6
    projection_size: int = 1152


class SiglipTextEmbeddings(nn.Module):
    """The sum of a vector per token and a vector per position."""

    def __init__(self, config: SiglipTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


class SiglipTextTransformer(nn.Module):
    """Layers like those of the vision tower, with their own weights, applied to tokens.

    The vector of the last token, usually padding, represents the text.

    Args of forward:
        input_ids: int64[B, L], padded to the length used in training.
    Returns: [B, D], not normalised.
    Raises: ValueError for texts with more tokens than the tower has positions.
    """

    def __init__(self, config: SiglipTextConfig):
        super().__init__()
        self.config = config
        self.embeddings = SiglipTextEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.projection_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        longest = self.config.max_position_embeddings
        if input_ids.shape[1] > longest:
            raise ValueError(f"the texts have {input_ids.shape[1]} tokens, but the tower has {longest} positions. Shorten them.")
        x = self.final_layer_norm(self.encoder(self.embeddings(input_ids)))  # [B, L, D]
        return self.head(x[:, -1])  # [B, D]


class SiglipMultiheadAttentionPoolingHead(nn.Module):
    """Attention pooling: one learned query attends to all patches and returns one vector. PaliGemma does not use it."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, config.hidden_size))
        self.attention = nn.MultiheadAttention(config.hidden_size, config.num_attention_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        probe = self.probe.expand(len(x), -1, -1)  # [I, 1, D]
        x = self.attention(probe, x, x, need_weights=False)[0]  # [I, 1, D]
        x = x + self.mlp(self.layernorm(x))
        return x[:, 0]  # [I, D]


class SiglipPooledVisionTransformer(SiglipVisionTransformer):
    """PaliGemma's tower with pooling: pixels [I, C, H, W] to one vector per picture, [I, D]."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        self.head = SiglipMultiheadAttentionPoolingHead(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(super().forward(pixel_values))


def softmax_loss(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss: cross entropy of finding, among the whole batch, the text of each picture and the picture of each text.

    Args:
        image_embeds, text_embeds: [I, D], normalised; text i belongs to picture i.
        scale: factor on the cosines.
    Returns: scalar.
    """
    logits = text_embeds @ image_embeds.T * scale  # [B, I]
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid_loss(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor, bias: Tensor, offset: int = 0) -> Tensor:
    """SigLIP's loss (equation 1) for each text: the sum over pictures of the binary cross entropy of each pair.

    Args:
        image_embeds: [I, D], text_embeds: [B, D], normalised; they may be a block of a larger batch.
        scale, bias: scale and bias of the logits.
        offset: text i belongs to picture i + offset; if there is no such picture, the text belongs to none of these pictures.
    Returns: [B].
    """
    logits = text_embeds @ image_embeds.T * scale + bias  # [B, I]
    partner = torch.arange(logits.shape[0], device=logits.device)[:, None] + offset
    is_pair = partner == torch.arange(logits.shape[1], device=logits.device)  # [B, I]
    return -F.logsigmoid(torch.where(is_pair, logits, -logits)).sum(1)  # [B]


def distributed_sigmoid_loss(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss over the batch of all processes. A block is the texts of this process and the pictures of one process.

    Args: as sigmoid_loss, for the part of the batch in this process; all parts have the same size.
    Returns: scalar, the mean over the texts of this process. Its mean over all processes is the loss of the whole batch, and
        gradients that are averaged over processes, as in data-parallel training, are those of the whole batch.
    Source: SigLIP, section 3.3 and figure 1. Only the vectors of pictures are gathered, a few MB, not the logits, whose size
        grows with the square of the batch.
    """
    from torch.distributed._functional_collectives import all_gather_tensor_autograd
    from torch.utils.checkpoint import checkpoint

    rank = distributed.get_rank()
    blocks = all_gather_tensor_autograd(image_embeds, 0, distributed.group.WORLD).split(len(image_embeds))
    losses = (  # checkpoint: recomputes a block's logits in the backward pass instead of keeping them
        # The offset len(block) means that no text of this process belongs to a picture of the block.
        checkpoint(sigmoid_loss, block, text_embeds, scale, bias, 0 if i == rank else len(block), use_reentrant=False)
        for i, block in enumerate(blocks)
    )
    return sum(losses).mean()


class SiglipModel(nn.Module):
    """Both towers, and the scale and bias of the logits.

    Args of forward:
        pixel_values: float[I, 3, H, W] in [-1, 1].
        input_ids: int64[B, L].
    Returns: logits [I, B]; their sigmoids are the probabilities that a text describes a picture.
    """

    def __init__(self, vision_config: SiglipVisionConfig, text_config: SiglipTextConfig):
        super().__init__()
        self.vision_model = SiglipPooledVisionTransformer(vision_config)
        self.text_model = SiglipTextTransformer(text_config)
        self.logit_scale = nn.Parameter(torch.tensor([2.3026]))  # log 10; SigLIP's training starts with this and the bias -10
        self.logit_bias = nn.Parameter(torch.tensor([-10.0]))

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Vectors of length 1 of the pictures, [I, D]."""
        return F.normalize(self.vision_model(pixel_values), dim=-1)

    def encode_texts(self, input_ids: Tensor) -> Tensor:
        """Vectors of length 1 of the texts, [B, D]."""
        return F.normalize(self.text_model(input_ids), dim=-1)

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        image_embeds, text_embeds = self.encode_images(pixel_values), self.encode_texts(input_ids)  # [I, D], [B, D]
        return image_embeds @ text_embeds.T * self.logit_scale.exp() + self.logit_bias  # [I, B]

    def loss(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        """SigLIP's loss of a batch in which text i belongs to picture i: scalar."""
        image_embeds, text_embeds = self.encode_images(pixel_values), self.encode_texts(input_ids)  # [I, D], [B, D]
        return sigmoid_loss(image_embeds, text_embeds, self.logit_scale.exp(), self.logit_bias).mean()

    @torch.no_grad()
    def zero_shot(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        """The probability that a text describes a picture, float[I, B], independently for each pair."""
        return self(pixel_values, input_ids).sigmoid()
