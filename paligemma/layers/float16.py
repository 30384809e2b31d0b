"""float16 without overflow: matrix products in float16, and everything between them in float32. `protect` changes a model.

GPUs such as NVIDIA's T4 multiply float16 matrices fast, but not bfloat16 ones. float16 has three more significant bits than
bfloat16, but its largest number is 65504, and Gemma was trained in bfloat16, which reaches 3e38. In float16, these tensors of
Gemma and of the tower can overflow; the model then returns NaN, or answers that look plausible but are wrong:

    token vectors * sqrt(D)       the factor is 45 to 68
    residual stream               the sum of the outputs of all layers; no norm limits it, and a few dimensions grow very large
    gelu(gate) * up               the product of two numbers of a few hundred is enough
    down_proj, o_proj, fc2, ...   the products that write to the residual stream
    q k^T                         a sum of E products, which is multiplied by the scale (1/16 if E = 256) only afterwards
    logits, image features        matrix products without a norm after them

Therefore:
- The residual stream, the image features and the logits are float32, and so are norms, GELU, gelu(gate) * up, RoPE and softmax.
- A matrix product whose input or output may be large (`scaled_product`) divides each row of its input by a power of two, so that
  the largest number is from 1 to 2, computes the product in float16, and multiplies the result by that power in float32. A power
  of two changes only the exponent, so nothing is rounded. Such a product overflows only if the absolute values of the weights of
  one output add up to 32752 or more.
- The queries are multiplied by the scale before q k^T.

The products for queries, keys, values, gate and up stay as they are: a norm limits their input, so that the weights alone
determine how large their outputs can become. `largest_outputs` computes that.

Products of float16 matrices are summed in float32 by all GPUs. But cuBLAS may split a sum into parts and add these in float16;
`protect` turns this off.

Checked in tests/layers/test_float16.py. Shapes: as in modeling_gemma.py, O outputs, X inputs of one matrix.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma.gpu.mps_workarounds import linear
from paligemma.layers.quantization import QuantizedEmbedding, QuantizedLinear
from paligemma.layers.replacing import extended
from paligemma.modeling_gemma import GemmaAttention, GemmaEmbedding, GemmaMLP, GemmaModel, GemmaRMSNorm, attention
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration

EXPONENT = 0x7F800000  # the bits of a float32 that hold its exponent


# Products


def powers_of_two(x: Tensor) -> Tensor:
    """For each row of x[..., X], the largest power of two that is not above its largest magnitude, float32[..., 1].

    The bits of the mantissa are set to 0. (torch.frexp and ldexp would need more kernels.) For a row of zeros the result is a
    tiny power of two; for a row with an infinity or NaN it is infinite, so that the row becomes NaN and the error is noticed.
    """
    largest = torch.linalg.vector_norm(x.detach(), torch.inf, -1, keepdim=True, dtype=torch.float32)
    return (largest.clamp(min=2.0**-100).view(torch.int32) & EXPONENT).view(torch.float32)


def scaled_product(x: Tensor, product: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float16) -> Tensor:
    """The result of `product` for x[..., X] of any magnitude, float32[..., O].

    Args:
        product: multiplies [..., X] by a matrix, without a bias.
        dtype: the dtype of the argument of `product`.
    """
    powers = powers_of_two(x)
    return product((x / powers).to(dtype)) * powers  # the quotient and the result are float32, because the powers are


class ScaledProduct(torch.autograd.Function):
    """x @ weight.T as a scaled product whose gradient is a scaled product, too: explanation.py needs the gradient of x.

    float16 weights are not trained, so they get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return scaled_product(x, lambda half: linear(half, weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return scaled_product(gradients[0], lambda half: linear(half, weight.T)), None


def scaled_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T as a scaled product, float32[..., O]."""
    if torch.is_grad_enabled() and x.requires_grad and weight.dtype == torch.float16:
        return ScaledProduct.apply(x.float(), weight)
    return scaled_product(x, lambda half: linear(half, weight), weight.dtype)


class ScaledLinear(nn.Linear):
    """nn.Linear with a scaled product. The result is float32."""

    def forward(self, x: Tensor) -> Tensor:
        y = scaled_linear(x, self.weight)
        return y if self.bias is None else y + self.bias


class ScaledQuantizedLinear(QuantizedLinear):
    """QuantizedLinear with a scaled product. The result is float32."""

    def forward(self, x: Tensor) -> Tensor:
        y = scaled_product(x, lambda half: self.product(half, torch.float32))
        return y if self.bias is None else y + self.bias


# Modules of the decoder


class Float16RMSNorm(GemmaRMSNorm):
    """GemmaRMSNorm before a product: its input is float32, its result float16."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(self.weight.dtype)


class Float16Attention(GemmaAttention):
    """GemmaAttention that scales the queries before q k^T. Keys and values are float16, as in the cache."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q = (q * self.scale).to(v.dtype)
        return attention(q, k.to(v.dtype), v, mask, 1.0, self.cap)  # [B, N, L, E]


class Float16MLP(GemmaMLP):
    """GemmaMLP with gelu(gate) * up in float32."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.gate_proj(x).float(), approximate="tanh") * self.up_proj(x)  # [B, L, F]
        return self.down_proj(x)


class Float16Embedding(GemmaEmbedding):
    """GemmaEmbedding with token vectors and logits in float32."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids, self.weight).float() * self.embedding_dim**0.5

    def logits(self, x: Tensor) -> Tensor:
        return scaled_linear(x, self.weight)


class Float16QuantizedEmbedding(QuantizedEmbedding):
    """QuantizedEmbedding with float32 logits. Its token vectors are float32, too, if its attribute `dtype` is."""

    def logits(self, x: Tensor) -> Tensor:
        return scaled_product(x, lambda half: self.product(half, torch.float32))


# Modules of the tower


class Float16Conv2d(nn.Conv2d):
    """The patch embedding with a float32 result, the start of the tower's residual stream.

    The product is not scaled, because pixels are at most 1.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class Float16LayerNorm(nn.LayerNorm):
    """nn.LayerNorm whose input is float32 and whose result is float16."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return y.to(self.weight.dtype)


# Whole models


def with_scaled_product(module: nn.Linear | QuantizedLinear) -> nn.Linear | QuantizedLinear:
    return extended(module, ScaledQuantizedLinear if isinstance(module, QuantizedLinear) else ScaledLinear)


def protect_decoder(decoder: GemmaModel) -> None:
    if isinstance(decoder.embed_tokens, QuantizedEmbedding):
        decoder.embed_tokens = extended(decoder.embed_tokens, Float16QuantizedEmbedding)
        decoder.embed_tokens.dtype = torch.float32
    else:
        decoder.embed_tokens = extended(decoder.embed_tokens, Float16Embedding)
    for layer in decoder.layers:
        before_mlp = "pre_feedforward_layernorm" if layer.is_gemma2 else "post_attention_layernorm"
        for name in ("input_layernorm", before_mlp):
            setattr(layer, name, extended(getattr(layer, name), Float16RMSNorm))
        layer.self_attn = extended(layer.self_attn, Float16Attention)
        layer.self_attn.o_proj = with_scaled_product(layer.self_attn.o_proj)
        layer.mlp = extended(layer.mlp, Float16MLP)
        layer.mlp.down_proj = with_scaled_product(layer.mlp.down_proj)
    decoder.norm = extended(decoder.norm, Float16RMSNorm)


def protect(model: PaliGemmaForConditionalGeneration) -> None:
    """Replaces the modules of a float16 model in which float16 could overflow. Parameters are shared, and keep their names.

    Call it before acceleration.accelerate and graphs.use_graphs. A second call changes nothing.
    """
    if model.device.type == "cuda":
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # for the whole process
    protect_decoder(model.language_model.model)
    tower = model.vision_tower.vision_model
    tower.embeddings.patch_embedding = extended(tower.embeddings.patch_embedding, Float16Conv2d)
    for layer in tower.encoder.layers:
        layer.layer_norm1 = extended(layer.layer_norm1, Float16LayerNorm)
        layer.self_attn.out_proj = with_scaled_product(layer.self_attn.out_proj)
        layer.layer_norm2 = extended(layer.layer_norm2, Float16LayerNorm)
        layer.mlp.fc2 = with_scaled_product(layer.mlp.fc2)
    tower.post_layernorm = extended(tower.post_layernorm, Float16LayerNorm)
    model.multi_modal_projector.linear = with_scaled_product(model.multi_modal_projector.linear)


# Bounds of outputs, from the weights


def largest_output(norm: GemmaRMSNorm, matrix: nn.Linear | QuantizedLinear) -> float:
    """The largest magnitude of an output of `matrix` if it multiplies an output of `norm`, whatever the input of `norm` is.

    A norm divides by the root mean square, so the vector before the factors 1 + weight has at most the length sqrt(D). By the
    inequality of Cauchy and Schwarz, output o is therefore at most sqrt(D) * |(1 + weight) * W_o|.
    """
    weight = matrix.weight_as_floats() if isinstance(matrix, QuantizedLinear) else matrix.weight.float()
    lengths = (weight * (1.0 + norm.weight.float())).norm(dim=1)  # [O]
    return norm.weight.numel() ** 0.5 * lengths.max().item()


@torch.no_grad()
def largest_outputs(model: PaliGemmaForConditionalGeneration) -> dict[str, float]:
    """For each matrix of the decoder that `protect` leaves alone, the largest magnitude that one of its outputs can have.

    If a number is below 65504, no input whatsoever makes that product overflow in float16.
    Returns: the numbers by the names of the modules.
    """
    found = {}
    for i, layer in enumerate(model.language_model.model.layers):
        before_mlp = layer.pre_feedforward_layernorm if layer.is_gemma2 else layer.post_attention_layernorm
        for norm, part, names in (
            (layer.input_layernorm, "self_attn", ("q_proj", "k_proj", "v_proj")), (before_mlp, "mlp", ("gate_proj", "up_proj")),
        ):  # fmt: skip
            for name in names:
                full_name = f"language_model.model.layers.{i}.{part}.{name}"
                found[full_name] = largest_output(norm, model.get_submodule(full_name))
    return found
