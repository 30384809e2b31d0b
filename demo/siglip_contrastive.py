"""Where the vision tower comes from: all of SigLIP, a tower for pictures and one for texts. Imports modeling_siglip only.

    picture -> vision tower -> attention pooling -> image_embeds ─┐ cosine * exp(logit_scale) + logit_bias -> logits
    text    -> text tower   -> last token, linear -> text_embeds ─┘ does this text belong to this picture?

PaliGemma takes the vision tower out of this, without the pooling, and trains it on; so the texts do not fit PaliGemma's own
tower any more. Two losses are here. CLIP's asks of each picture which of the batch's texts is its own, a softmax over all.
SigLIP's asks of each pair on its own whether it belongs together; so a batch can be cut into blocks, process by process.

Sources: SigLIP (arXiv:2303.15343; equation 1 and algorithm 1), CLIP (arXiv:2103.00020, figure 3). Checked in
tests/demo/test_siglip_contrastive.py against transformers.
Shapes: I pictures, T texts, L tokens of a text, C channels, H W pixels, P patches per picture, D model width, F MLP width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from paligemma.configuration import SiglipVisionConfig
from paligemma.modeling_siglip import SiglipEncoder, SiglipMLP, SiglipVisionTransformer


@dataclass(frozen=True)
class SiglipTextConfig:
    """The numbers that define a text tower, under the names of `text_config` in config.json; defaults are So400m's."""

    vocab_size: int = 32000
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    max_position_embeddings: int = 64  # texts are padded to that length, and padding is looked at like any token
    layer_norm_eps: float = 1e-6
    projection_size: int = 1152


class SiglipTextEmbeddings(nn.Module):
    """A vector for each token and one for its place."""

    def __init__(self, config: SiglipTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


class SiglipTextTransformer(nn.Module):
    """The same layers as for pictures, over tokens; a text is what its last token, usually padding, has gathered.

    Args of forward:
        input_ids: int64[T, L], padded to the length of training.
    Returns: [T, D], not normalised.
    Raises: ValueError for texts that are longer than the tower has places.
    """

    def __init__(self, config: SiglipTextConfig):
        super().__init__()
        self.config = config
        self.embeddings = SiglipTextEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.projection_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        most = self.config.max_position_embeddings
        if input_ids.shape[1] > most:
            raise ValueError(f"texts of {input_ids.shape[1]} tokens came; the tower has places for {most}.")
        x = self.final_layer_norm(self.encoder(self.embeddings(input_ids)))  # [T, L, D]
        return self.head(x[:, -1])  # [T, D]


class SiglipMultiheadAttentionPoolingHead(nn.Module):
    """One learned query looks at all patches and brings back one vector (SigLIP's tower; PaliGemma leaves it out)."""

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
    """PaliGemma's tower with the pooling on top: pixels [I, C, H, W] to one vector a picture, [I, D]."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        self.head = SiglipMultiheadAttentionPoolingHead(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(super().forward(pixel_values))


def softmax_loss(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss: each picture must find its text among all of the batch, each text its picture.

    Args:
        image_embeds, text_embeds: [I, D], normalised; row i of both belongs together.
        scale: factor on the cosines.
    Returns: scalar.
    """
    logits = text_embeds @ image_embeds.T * scale  # [T, I]
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sigmoid_loss(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor, bias: Tensor, offset: int = 0) -> Tensor:
    """SigLIP's loss (equation 1): for each pair, whether it belongs together, summed, for each text.

    Args:
        image_embeds: [I, D], text_embeds: [T, D], normalised; they may be a block of a larger batch.
        scale, bias: of the logits.
        offset: text i belongs to picture i + offset; where there is no such picture, all pairs of the text are wrong ones.
    Returns: [T].
    """
    logits = text_embeds @ image_embeds.T * scale + bias  # [T, I]
    place = torch.arange(logits.shape[0], device=logits.device)[:, None] + offset
    is_pair = place == torch.arange(logits.shape[1], device=logits.device)  # [T, I]
    return -F.logsigmoid(torch.where(is_pair, logits, -logits)).sum(1)  # [T]


def distributed_sigmoid_loss(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The same over the batch of all processes, never more than one process's pictures against another's texts at a time.

    Args: as sigmoid_loss, the share of this process; as many in each.
    Returns: scalar, the mean over this process's texts; the mean of that over all processes is the loss of the whole batch.
        Gradients, averaged as data parallel training does, are those of the whole batch.
    Source: SigLIP, section 3.3 and figure 1. Pictures' vectors are gathered, a few MB; logits, which grow with the square, not.
    """
    from torch.distributed._functional_collectives import all_gather_tensor_autograd
    from torch.utils.checkpoint import checkpoint

    rank = distributed.get_rank()
    blocks = all_gather_tensor_autograd(image_embeds, 0, distributed.group.WORLD).split(len(image_embeds))
    losses = (  # a block's logits are forgotten and made again for the gradient
        checkpoint(sigmoid_loss, block, text_embeds, scale, bias, 0 if i == rank else len(block), use_reentrant=False)
        for i, block in enumerate(blocks)
    )
    return sum(losses).mean()


class SiglipModel(nn.Module):
    """Both towers, and how sure a cosine makes the model.

    Args of forward:
        pixel_values: float[I, 3, R, R] in [-1, 1].
        input_ids: int64[T, L].
    Returns: logits [I, T]; their sigmoids are the probabilities that a text describes a picture.
    """

    def __init__(self, vision_config: SiglipVisionConfig, text_config: SiglipTextConfig):
        super().__init__()
        self.vision_model = SiglipPooledVisionTransformer(vision_config)
        self.text_model = SiglipTextTransformer(text_config)
        self.logit_scale = nn.Parameter(torch.tensor([2.3026]))  # log 10, and below -10: where SigLIP's training starts
        self.logit_bias = nn.Parameter(torch.tensor([-10.0]))

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """[I, D], each of length 1."""
        return F.normalize(self.vision_model(pixel_values), dim=-1)

    def encode_texts(self, input_ids: Tensor) -> Tensor:
        """[T, D], each of length 1."""
        return F.normalize(self.text_model(input_ids), dim=-1)

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        image_embeds, text_embeds = self.encode_images(pixel_values), self.encode_texts(input_ids)  # [I, D], [T, D]
        return image_embeds @ text_embeds.T * self.logit_scale.exp() + self.logit_bias  # [I, T]

    def loss(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        """SigLIP's loss of a batch in which text i belongs to picture i: scalar."""
        image_embeds, text_embeds = self.encode_images(pixel_values), self.encode_texts(input_ids)  # [I, D], [T, D]
        return sigmoid_loss(image_embeds, text_embeds, self.logit_scale.exp(), self.logit_bias).mean()

    @torch.no_grad()
    def zero_shot(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        """How likely each text describes each picture: float[I, T] from 0 to 1, each pair on its own."""
        return self(pixel_values, input_ids).sigmoid()
