"""Gemma decoder, versions 1 and 2: token vectors in, one hidden vector per token out.

One implementation serves both versions: fields of the config turn on what Gemma 2 adds (two more norms per layer, soft caps,
another query scale). The caller passes a mask that decides which tokens attend to which; nothing here depends on pictures.

Sources: Gemma (arXiv:2403.08295), Gemma 2 (arXiv:2408.00118), RoPE (arXiv:2104.09864), grouped-query attention
(arXiv:2305.13245). Checked in tests/test_modeling_gemma.py.
Shapes: B batch rows, L tokens fed in this call, S slots of the KV cache that are read (S = L without a cache), D model width,
F MLP width, N query heads, K key/value heads, E width of one head, V vocabulary size. In Gemma 2B, the decoder of PaliGemma 1,
these are D 2048, F 16384, N 8, K 1, E 256, V 257216, in 18 layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma.configuration import GemmaConfig

QUERY_BLOCK = 256  # attention with a soft cap computes this many queries at a time, to limit the memory for their scores


class GemmaRMSNorm(nn.Module):
    """Divides by the root mean square and scales by 1 + weight, all in float32 (arXiv:1910.07467, equation 4).

    Checkpoints store the scale minus 1, so the 1 is added here. The cast to the dtype of x comes last, because only this order is
    bit-equal to transformers.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).to(x.dtype)


def rotary_embedding(position_ids: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The cosines and sines by which RoPE rotates queries and keys.

    After the rotation, scores depend only on the distance between tokens.

    Args:
        position_ids: int64[B, L].
        width: E. Dimensions i and i + E/2 form a pair, which is rotated by the angle position * theta^(-2i/E).
    Returns: cos and sin, [B, 1, L, E], computed in float32 and cast to `dtype`; the 1 broadcasts over heads. The first half of
        sin is negated, as `rotate` needs it.
    Source: RoPE (arXiv:2104.09864), section 3.4.2. The paper pairs neighbouring dimensions; the published weights
        pair dimensions i and i + E/2.
    """
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=position_ids.device) / width  # [E/2]
    angle = position_ids[..., None].float() * (1.0 / theta**exponent)  # [B, L, E/2]
    angle = torch.cat((-angle, angle), dim=-1)[:, None]  # [B, 1, L, E]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair of dimensions of queries [B, N, L, E] or keys [B, K, L, E]; cos and sin are from rotary_embedding."""
    partner = x.roll(x.shape[-1] // 2, dims=-1)  # at each index, the other dimension of the pair
    return x * cos + partner * sin


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float | None) -> Tensor:
    """Grouped-query attention, softmax(scale * q k^T) v: each key/value head serves N/K neighbouring query heads.

    Args:
        q: [B, N, L, E].
        k, v: [B, K, S, E].
        mask: bool[B, 1, L, S], True = the query attends to this slot; None = every query attends to all slots.
        scale: q k^T is multiplied by this number.
        cap: Gemma 2's soft cap: scores become cap * tanh(scores / cap). None = no cap (Gemma 1).
    Returns: [B, N, L, E].
    Source: grouped-query attention (arXiv:2305.13245), soft cap (arXiv:2408.00118, section 2).
    """
    b, n, length, e = q.shape
    heads_per_group = n // k.shape[1]  # N/K
    if cap is None and length == 1:
        # With one query per head, the N/K query heads that share a key head are passed as N/K queries of a single head. Each key
        # is then read once instead of N/K times.
        q = q.view(b, -1, heads_per_group, e)  # [B, K, N/K, E]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)  # [B, K, N/K, E]
        return x.view(b, n, 1, e)  # [B, N, L, E]
    if cap is None:
        # The key heads are repeated, because CUDA's fast kernels for masks or float32 need as many key heads as query heads; with
        # fewer, torch falls back to a kernel that stores all scores. With K = 1, the repetition makes no copy, and all kernels
        # accept the expanded tensor (stride 0).
        k, v = (x[:, :, None].expand(-1, -1, heads_per_group, -1, -1).flatten(1, 2) for x in (k, v))  # [B, N, S, E], [B, N, S, E]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    # torch's fused kernel has no soft cap, so the scores are computed here, for one block of queries at a time. In the shapes
    # of the loop, L is the number of queries in the block.
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        block = q[:, :, start : start + QUERY_BLOCK].reshape(b, k.shape[1], -1, e)  # [B, K, N/K*L, E]
        scores = (block @ k.transpose(2, 3)).float() * scale  # [B, K, N/K*L, S]
        scores = torch.tanh(scores / cap) * cap
        scores = scores.view(b, n, -1, k.shape[2])  # [B, N, L, S]
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, start : start + QUERY_BLOCK], torch.finfo(torch.float32).min)
        weights = scores.softmax(dim=-1).to(v.dtype)
        x = weights.view(b, k.shape[1], -1, k.shape[2]) @ v  # [B, K, N/K*L, E]
        blocks.append(x.view(b, n, -1, e))
    return torch.cat(blocks, dim=2) if len(blocks) > 1 else blocks[0]  # [B, N, L, E]


class KVCache:
    """The keys and values of all tokens so far, in every layer.

    A decoding step computes the keys and values of its new token only, and reads all others from the cache. The memory is
    allocated once. Rows may differ in length. A row has no gaps: the token at position p is in slot p - 1, and positions start
    at 1.

    Args:
        config: the config of the decoder.
        batch: B, the number of rows.
        slots: the maximum number of tokens in a row (picture, prompt and answer together).
    Attributes:
        lengths: int64[B] on the device, the number of tokens in each row.
        slots_read: S, the number of slots that attention reads, which is the length of the longest row. It is a Python int,
            so that the CPU can use it without waiting for a GPU.
        same_length: whether all rows have the same length. If so, no mask is needed.
    """

    def __init__(self, config: GemmaConfig, batch: int, slots: int, *, device: torch.device, dtype: torch.dtype):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, slots, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, device=device, dtype=torch.int64)
        self.rows = torch.arange(batch, device=device)[:, None]  # [B, 1]
        self.slots_read = 0
        self.same_length = True

    @property
    def slots(self) -> int:
        return self.keys.shape[3]

    def set_lengths(self, lengths: Tensor) -> None:
        """Sets the lengths of the rows, int64[B] on the CPU, before the forward pass that writes their keys and values."""
        self.lengths.copy_(lengths)
        self.set_slots_read(lengths)

    def set_slots_read(self, lengths: Tensor) -> None:
        """Sets `slots_read` and `same_length` for rows of these lengths, int64[B] on the CPU."""
        shortest, longest = lengths.aminmax()
        self.slots_read, self.same_length = int(longest), bool(shortest == longest)

    def reserve(self) -> None:
        """Makes attention read one more slot, the slot of the next token. Raises ValueError if a row is full.

        `lengths` is not changed here, but by the decoding step, which adds 1 on the device: replaying a CUDA graph repeats only
        the operations on the device, so the addition must be one of them.
        """
        if self.slots_read == self.slots:
            raise ValueError(f"a row would hold {self.slots + 1} tokens, but the cache has {self.slots} slots per row.")
        self.slots_read += 1

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the keys and values of new tokens. Returns the keys and the values of all tokens, [B, K, S, E] each.

        Args:
            layer: index of the layer, from 0.
            slots: int64[B, L], the slots of the new tokens.
            k, v: [B, K, L, E]. They are cast to the dtype of the cache, because autocast can give k and v another dtype.
        """
        rows = self.rows[: k.shape[0]]  # [B, 1]
        self.keys[layer][rows, :, slots] = k.transpose(1, 2).to(self.keys[layer].dtype)
        self.values[layer][rows, :, slots] = v.transpose(1, 2).to(self.values[layer].dtype)
        return self.keys[layer][:, :, : self.slots_read], self.values[layer][:, :, : self.slots_read]

    def mask(self, window: int | None = None) -> Tensor | None:
        """The slots that the newest token of each row attends to: all tokens of its row, or only the newest `window` tokens.

        Returns: bool[B, 1, 1, S], or None if the token attends to all S slots.
        """
        if self.same_length and (window is None or self.slots_read <= window):
            return None
        slot = torch.arange(self.slots_read, device=self.lengths.device)  # [S]
        end = self.lengths[:, None]  # [B, 1]
        mask = slot < end  # [B, S]
        if window is not None:
            mask = mask & (slot >= end - window)
        return mask[:, None, None]  # [B, 1, 1, S]


class GemmaAttention(nn.Module):
    """Projections to queries, keys and values, RoPE on queries and keys, attention, and a projection back to width D."""

    def __init__(self, config: GemmaConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.scale = config.query_scale
        self.cap = config.attn_logit_softcapping
        self.width = config.head_dim  # E; N * E may differ from D
        query_width, key_width = config.num_attention_heads * self.width, config.num_key_value_heads * self.width
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def project(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The queries and the keys, rotated by RoPE, and the values."""
        b, length, _ = x.shape
        q = self.q_proj(x).view(b, length, -1, self.width).transpose(1, 2)  # [B, N, L, E]
        k = self.k_proj(x).view(b, length, -1, self.width).transpose(1, 2)  # [B, K, L, E]
        v = self.v_proj(x).view(b, length, -1, self.width).transpose(1, 2)  # [B, K, L, E]
        return rotate(q, *rotation), rotate(k, *rotation), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attention(q, k, v, mask, self.scale, self.cap)  # [B, N, L, E]

    def forward(
        self, x: Tensor, slots: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        q, k, v = self.project(x, rotation)  # [B, N, L, E], [B, K, L, E], [B, K, L, E]
        if cache is not None:
            k, v = cache.write(self.layer, slots, k, v)  # [B, K, S, E], [B, K, S, E]
        x = self.attend(q, k, v, mask)  # [B, N, L, E]
        x = x.transpose(1, 2).flatten(2)  # [B, L, N*E]
        return self.o_proj(x)


class GemmaMLP(nn.Module):
    """GeGLU (arXiv:2002.05202, equation 6): down(gelu(gate(x)) * up(x)); gate and up map D to F, and down maps F to D."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x)  # [B, L, F]
        return self.down_proj(x)


class GemmaDecoderLayer(nn.Module):
    """Attention and MLP: y = x + attention(norm(x)), then y + mlp(norm(y)). Gemma 2 also normalises both outputs.

    The name `post_attention_layernorm` has two meanings: in Gemma 1 this norm is applied to the input of the MLP, in Gemma 2 to
    the output of attention.
    """

    def __init__(self, config: GemmaConfig, layer: int):
        super().__init__()
        self.is_gemma2 = config.is_gemma2
        self.input_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GemmaAttention(config, layer)
        self.post_attention_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.is_gemma2:
            self.pre_feedforward_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
            self.post_feedforward_layernorm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GemmaMLP(config)

    def forward(
        self, x: Tensor, slots: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), slots, rotation, mask, cache)
        if not self.is_gemma2:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class GemmaEmbedding(nn.Embedding):
    """Converts token ids to vectors and, with the same matrix, vectors to logits.

    Token vectors are multiplied by sqrt(D). As in transformers, sqrt(D) is first rounded to the dtype of the weights (45.2548...
    becomes 45.25 in bfloat16). Picture vectors are not multiplied, because they do not pass through this
    class.
    """

    def forward(self, input_ids: Tensor) -> Tensor:
        scale = torch.tensor(self.embedding_dim**0.5, dtype=self.weight.dtype, device="cpu").item()
        return super().forward(input_ids) * scale

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class GemmaModel(nn.Module):
    """The decoder up to the last norm, without the output matrix.

    Args of forward:
        inputs_embeds: [B, L, D], the token vectors from embed_tokens and the picture vectors from the projector.
        position_ids: int64[B, L], 1 for the first token of a row.
        mask: bool[B, 1, L, S], True = the token attends to this slot; None = every token attends to all S slots.
        cache: the keys and values of the L tokens are written to the cache, and attention reads all tokens in it. None =
            attention reads only the L tokens.
        window_mask: if given, it replaces `mask` in layers 0, 2, 4, ..., which have a sliding window in Gemma 2.
    Returns: [B, L, D], the output of the last norm.
    """

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = GemmaEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GemmaDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        window_mask: Tensor | None = None,
    ) -> Tensor:
        x = inputs_embeds  # [B, L, D]
        rotation = rotary_embedding(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
        slots = position_ids - 1  # [B, L]
        for layer in self.layers:
            is_windowed = window_mask is not None and layer.self_attn.layer % 2 == 0
            x = layer(x, slots, rotation, window_mask if is_windowed else mask, cache)
        return self.norm(x)


class GemmaForCausalLM(nn.Module):
    """The decoder with its output matrix, which is the same matrix as the embedding.

    Args:
        config: the config of the decoder.
        final_softcap: logits become cap * tanh(logits / cap); None = no cap.
    """

    def __init__(self, config: GemmaConfig, final_softcap: float | None = None):
        super().__init__()
        self.final_softcap = final_softcap
        self.model = GemmaModel(config)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the next token, float32[..., V], for hidden vectors [..., D].

        The cap is computed in float32, because in bfloat16 the largest logits would be rounded to the same number.
        """
        logits = self.model.embed_tokens.logits(hidden).float()
        return logits if self.final_softcap is None else torch.tanh(logits / self.final_softcap) * self.final_softcap
