"""Modules that compute a decoding step with fewer kernels on CUDA: `use_cuda_modules` puts them into a model.

In a decoding step each row has one new token, so almost every kernel is tiny, and the time to start a kernel counts more than
what it computes. Each class replaces a module of modeling_gemma.py and keeps its parameters under the same names. The attention
of one token to thousands of slots is two batched products instead of torch's fused kernel. The fused kernel uses a single block
of threads per row and key head; the two products are spread over the whole GPU, and every card can compute them.

`use_cuda_modules` compares the modules with the plain ones once per card, and leaves the model as it is if they differ. Prompts
use the new norms only. Training uses none of this. When a step is compiled, its norms are the plain ones.

Checked in tests/gpu/test_cuda_decoding.py, which also counts the kernels, on a simulated GPU. No card has run it.
Shapes: as in modeling_gemma.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from paligemma.gpu.self_check import FastWay, rounding_bound
from paligemma.layers.float16 import Float16RMSNorm
from paligemma.layers.replacing import extended
from paligemma.modeling_gemma import GemmaAttention, GemmaModel, GemmaRMSNorm, KVCache, attention, rotate
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration

ONE_TOKEN = FastWay("kernels for one token", rounding_bound(torch.bfloat16), "decoding with the plain modules")


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """The batched product of two tensors of one dtype, in float32.

    GPUs add up such products in float32 internally. If the sums are not rounded to 16 bits, large scores stay exact, and float16
    cannot overflow. torch's bmm has the argument out_dtype on CUDA only. Because a model may be moved to the CPU later, the
    product is also computed without it.
    """
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def one_token_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float | None) -> Tensor:
    """modeling_gemma.attention for one token per row, as two batched products and a softmax in float32.

    Args:
        q: [B, N, 1, E].
        k, v: [B, K, S, E].
        mask: [B, 1, 1, S], 0 = the token attends to the slot, -inf = it does not; None = it attends to all S slots.
        scale, cap: as in modeling_gemma.attention.
    Returns: [B, N, 1, E].
    """
    b, n, _, e = q.shape
    keys, values = k.flatten(0, 1), v.flatten(0, 1)  # [B*K, S, E], [B*K, S, E]
    queries = q.reshape(len(keys), -1, e).to(k.dtype)  # [B*K, N/K, E]
    scores = float32_product(queries, keys.transpose(1, 2)).view(b, n, 1, -1)  # [B, N, 1, S]
    if cap is not None:
        scores, scale = torch.tanh(scores * (scale / cap)), cap
    scores = scores * scale if mask is None else torch.add(mask, scores, alpha=scale)
    weights = scores.softmax(-1).to(v.dtype).view(len(keys), -1, k.shape[2])  # [B*K, N/K, S]
    return (weights @ values).view(b, n, 1, e)  # [B, N, 1, E]


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask that is added to the scores, 0 or -inf, from a mask that is True where a token attends."""
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)


class CudaRMSNorm(GemmaRMSNorm):
    """GemmaRMSNorm in three kernels instead of ten: the cast to float32, torch's norm, and the scale with the cast back."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler fuses the plain form into one kernel
            return super().forward(x)
        y = F.rms_norm(x.float(), self.weight.shape, None, self.eps)
        dtype = self.weight.dtype if isinstance(self, Float16RMSNorm) else x.dtype
        return torch.addcmul(y, y, self.weight, out=torch.empty_like(x, dtype=dtype))  # y * (1 + weight)


class CudaAttention(GemmaAttention):
    """GemmaAttention that computes one token per row by one_token_attention, and rotates its queries and keys together."""

    def project(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        if x.shape[1] > 1:
            return super().project(x, rotation)
        q, k, v = (linear(x).unflatten(-1, (-1, self.width)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        rotated = rotate(torch.cat((q, k), 2).transpose(1, 2), *rotation)
        return *rotated.split((q.shape[2], k.shape[2]), 1), v.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if q.shape[2] > 1:
            return super().attend(q, k, v, mask)
        return one_token_attention(q, k, v, mask, self.scale, self.cap)


class CudaModel(GemmaModel):
    """GemmaModel that makes the masks of a step with one token additive, once per step instead of in every layer."""

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        window_mask: Tensor | None = None,
    ) -> Tensor:
        if inputs_embeds.shape[1] == 1:
            mask, window_mask = additive(mask, inputs_embeds.dtype), additive(window_mask, inputs_embeds.dtype)
        return super().forward(inputs_embeds, position_ids, mask, cache, window_mask)


@torch.no_grad()
def works(attention_module: GemmaAttention, norm: GemmaRMSNorm) -> bool:
    """Whether the kernels for one token give what the plain modules give, on this device and for random vectors."""
    width, device, dtype = attention_module.width, norm.weight.device, norm.weight.dtype
    n, k = (module.out_features // width for module in (attention_module.q_proj, attention_module.k_proj))
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    q, keys, values = draw(2, n, 1, width), draw(2, k, 256, width), draw(2, k, 256, width)
    mask = torch.arange(256, device=device).expand(2, 1, 1, 256) < torch.tensor([256, 199], device=device).view(2, 1, 1, 1)
    scale, cap = attention_module.scale, attention_module.cap
    ONE_TOKEN.run(
        lambda: one_token_attention(q, keys, values, additive(mask, dtype), scale, cap),
        lambda: attention(q, keys, values, mask, scale, cap),
        key=("attention", device, dtype, n, k, width),
        bound=rounding_bound(dtype),
    )
    x = draw(2, 1, norm.weight.numel())
    fast = extended(norm, CudaRMSNorm)
    ONE_TOKEN.run(lambda: fast(x), lambda: norm(x), key=("norm", device, dtype), bound=rounding_bound(dtype))
    return ONE_TOKEN.is_on


def use_cuda_modules(model: PaliGemmaForConditionalGeneration) -> None:
    """Replaces the modules of a model on CUDA, unless they differ from the plain ones on its card, or on one of its cards."""
    decoder = model.language_model.model
    a_layer_of_each_card = {layer.input_layernorm.weight.device: layer for layer in decoder.layers}
    if not all(works(layer.self_attn, layer.input_layernorm) for layer in a_layer_of_each_card.values()):
        return
    for name, module in list(decoder.named_modules()):
        if isinstance(module, GemmaRMSNorm):
            decoder.set_submodule(name, extended(module, CudaRMSNorm))
        if isinstance(module, GemmaAttention):
            decoder.set_submodule(name, extended(module, CudaAttention))
    model.language_model.model = extended(decoder, CudaModel)
