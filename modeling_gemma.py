"""Gemma decoder, versions 1 and 2: token vectors in, one hidden vector per token out. Imports nothing from this project.

One implementation serves both: what Gemma 2 adds (two more norms a layer, soft caps, another query scale) are fields of the
config. Who may look at whom is decided by the caller's mask; this file knows nothing of pictures.

Sources: Gemma (arXiv:2403.08295), Gemma 2 (arXiv:2408.00118), RoPE (arXiv:2104.09864), grouped-query attention
(arXiv:2305.13245). Checked in tests/test_modeling_gemma.py.
Shapes: B batch, L tokens fed in this call, S slots of the KV cache that are read, D model width, F MLP width,
N query heads, K key/value heads, G query heads that share a key/value head (N = K G), E width of one head, V vocabulary.
"""

from copy import copy
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST_SIZE = 2**20  # no width, depth or vocabulary of a real model comes near; a damaged config.json does
LARGEST_NUMBER = 1e12  # of rope_theta, eps, caps and scales; they and their inverses stay finite in float32
QUERY_BLOCK = 256  # queries that the written-out attention takes at a time: bounds its [block, S] scores at 4096 picture tokens
# transformers leaves out of a file what equals the default of the class that wrote it, which `model_type` names.
DEFAULTS: dict[str, dict] = {
    "gemma": {
        "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 16,
    },
    "gemma2": {
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "sliding_window": 4096,
    },
}  # fmt: skip
OFF_BY_NULL = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "sliding_window")  # unlike absent


@dataclass(frozen=True)
class GemmaConfig:
    """The numbers that define a decoder, under the names of `text_config` in config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 256
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    model_type: str = "gemma"
    query_pre_attn_scalar: float | None = None  # Gemma 2: scores are divided by its root; Gemma 1: by that of head_dim
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None  # the number in the file; whether it is used is the model's argument

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and not (type(value) is int and 0 < value <= LARGEST_SIZE):
                raise ValueError(f"text_config.{field.name} is {value!r}; a whole number from 1 to {LARGEST_SIZE} is needed.")
            is_optional = field.type == float | None and value is None
            is_in_range = type(value) in (int, float) and 1 / LARGEST_NUMBER <= value <= LARGEST_NUMBER
            if field.type in (float, float | None) and not (is_optional or is_in_range):
                raise ValueError(
                    f"text_config.{field.name} is {value!r}; a positive number is needed, at most {LARGEST_NUMBER:g}."
                )
        if self.model_type not in ("gemma", "gemma2"):
            raise ValueError(f"text_config.model_type is {self.model_type!r}; 'gemma' or 'gemma2' is needed.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"text_config.num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"text_config.head_dim is {self.head_dim}; RoPE turns pairs, so an even number is needed.")
        if self.sliding_window is not None and not (type(self.sliding_window) is int and 0 < self.sliding_window < 2**31):
            raise ValueError(f"text_config.sliding_window is {self.sliding_window!r}; a whole number above 0 is needed.")

    @property
    def is_gemma2(self) -> bool:
        return self.model_type == "gemma2"

    @property
    def query_scale(self) -> float:
        return (self.query_pre_attn_scalar or self.head_dim) ** -0.5

    @classmethod
    def from_hf(cls, raw: dict) -> "GemmaConfig":
        """Reads `text_config` of config.json; what it leaves out is the default of the class that wrote it.

        Raises: ValueError for anything that this file does not implement.
        """
        given = {key: value for key, value in raw.items() if value is not None}
        rope_key = "rope_scaling" if given.get("rope_scaling") else "rope_parameters"  # that of transformers 4 is believed first
        rope = given.get(rope_key, {})  # transformers 5 writes rope_theta in here
        if not isinstance(rope, dict):
            raise ValueError(f"text_config.{rope_key} is {rope!r}; an object is needed.")
        is_gemma2 = given.get("model_type") == "gemma2"
        supported = {
            "hidden_act": ("gelu", "gelu_pytorch_tanh"),  # Gemma's first files say "gelu", but the tanh form is what was trained
            "hidden_activation": ("gelu_pytorch_tanh",) if is_gemma2 else ("gelu", "gelu_pytorch_tanh"),
            "attention_bias": (False,),
            "use_bidirectional_attention": (True, False),
        }
        unsupported = {key: given[key] for key, values in supported.items() if key in given and given[key] not in values}
        is_nested = any(isinstance(value, dict) for value in rope.values())  # another one for each kind of layer
        if rope.get("rope_type", rope.get("type", "default")) != "default" or is_nested:
            unsupported[rope_key] = rope
        layers, alternating = given.get("layer_types", []), ("sliding_attention", "full_attention")
        if not isinstance(layers, list) or any(kind != alternating[i % 2] for i, kind in enumerate(layers)):
            unsupported["layer_types"] = layers
        if unsupported:
            raise ValueError(f"text_config asks for {unsupported}, which modeling_gemma.py does not implement.")
        defaults = DEFAULTS["gemma2" if is_gemma2 else "gemma"]
        given = {key: value for key, value in defaults.items() if not (key in raw and key in OFF_BY_NULL)} | given
        if "rope_theta" in rope:
            given["rope_theta"] = rope["rope_theta"]
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})


class KVCache:
    """Keys and values of every layer, allocated once and filled as tokens come.

    A row holds its tokens without gaps from slot 0 on. So a token's slot is its position minus 1, rows may differ in length,
    and a row that has ended can be refilled while the others go on.

    Args:
        config: of the decoder.
        batch: B, rows.
        slots: the most tokens (picture, prompt and answer together) that one row can hold.
    Attributes:
        lengths: int64[B] on the device, tokens in each row; `host_lengths` holds the same numbers in main memory, so that
            nobody has to wait for the device to know them.
        reach: S, how many slots attention reads: those of the longest row.
        is_even: whether every row is known to fill all of them.
    """

    def __init__(self, config: GemmaConfig, batch: int, slots: int, *, device: torch.device, dtype: torch.dtype):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, slots, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, device=device, dtype=torch.int64)
        self.host_lengths = torch.zeros(batch, dtype=torch.int64)
        self.reach = 0
        self.is_even = False

    @property
    def slots(self) -> int:
        return self.keys.shape[3]

    def __getitem__(self, rows: slice) -> "KVCache":
        """Some rows, as a cache of their own that shares this one's memory."""
        view = copy(self)
        view.keys, view.values = self.keys[:, rows], self.values[:, rows]
        view.lengths, view.host_lengths = self.lengths[rows], self.host_lengths[rows]
        return view

    def fixed(self, reach: int) -> "KVCache":
        """The same memory, but `reach` slots are read, and a mask is made, whatever the rows hold.

        A step over it has the same shapes each time and asks nothing of main memory, so that it can be recorded (graphs.py).
        Each layer is a tensor of its own here: a compiler that saw one tensor would copy all layers to write into one.
        """
        view = copy(self)
        view.keys, view.values = self.keys.unbind(), self.values.unbind()
        view.reach, view.is_even = reach, False
        return view

    def move(self, source: int, target: int) -> None:
        """Copies one row over another, so that the rows in use stay side by side when one in the middle ends."""
        used = int(self.host_lengths[source])
        self.keys[:, target, :, :used] = self.keys[:, source, :, :used]
        self.values[:, target, :, :used] = self.values[:, source, :, :used]
        self.lengths[target] = self.lengths[source]
        self.host_lengths[target] = self.host_lengths[source]

    def take(self, smaller: "KVCache") -> None:
        """Starts with what another cache of as many rows holds, to go on where it has become too small."""
        self.keys[:, :, :, : smaller.slots] = smaller.keys
        self.values[:, :, :, : smaller.slots] = smaller.values
        self.lengths.copy_(smaller.lengths)
        self.host_lengths.copy_(smaller.host_lengths)

    def fill(self, lengths: Tensor) -> None:
        """Declares the rows to hold `lengths` int64[B] tokens; called before the pass that writes them."""
        self.host_lengths.copy_(lengths)
        self.lengths.copy_(self.host_lengths, non_blocking=True)
        self.measure()

    def measure(self) -> None:
        """Finds `reach` and `is_even` from the rows' lengths."""
        shortest, longest = self.host_lengths.aminmax()
        self.reach, self.is_even = int(longest), bool(shortest == longest)

    def count(self) -> None:
        """The half of `grow` that happens in main memory. Raises ValueError when a row is full."""
        longest = int(self.host_lengths.max()) + 1
        if longest > self.slots:
            raise ValueError(f"a row would hold {longest} tokens, but the cache has {self.slots} slots a row.")
        self.host_lengths += 1
        self.measure()

    def grow(self) -> None:
        """Makes each row one token longer; called before the pass that writes it. Raises ValueError when a row is full."""
        self.count()
        self.lengths.add_(1)

    def mask(self, window: int | None = None) -> Tensor | None:
        """What the newest token of each row may look at: every token of its row, or the newest `window` of them.

        Returns: bool[B, 1, 1, S]; None when that is every slot that is read, so that attention need not look it up.
        """
        if self.is_even and (window is None or self.reach <= window):
            return None
        slot = torch.arange(self.reach, device=self.lengths.device)  # [S]
        end = self.lengths[:, None]  # [B, 1]
        mask = slot < end  # [B, S]
        if window is not None:
            mask = mask & (slot >= end - window)
        return mask[:, None, None]  # [B, 1, 1, S]

    def write(self, layer: int, position_ids: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the keys and values of new tokens, [B, K, L, E] at int64[B, L], into their slots; returns all up to `reach`.

        Under autocast they come in its dtype, and are kept in the cache's.
        """
        row = torch.arange(k.shape[0], device=k.device)[:, None]  # [B, 1]
        self.keys[layer][row, :, position_ids - 1] = k.transpose(1, 2).to(self.keys[layer].dtype)
        self.values[layer][row, :, position_ids - 1] = v.transpose(1, 2).to(self.values[layer].dtype)
        return self.keys[layer][:, :, : self.reach], self.values[layer][:, :, : self.reach]


def rotary_embedding(position_ids: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines by which RoPE turns queries and keys; a score then depends on the distance of two tokens alone.

    Args:
        position_ids: int64[B, L].
        width: E. Dimension i and i + E/2 form a pair that turns by position * theta^(-2i/E).
    Returns: cos and sin, [B, 1, L, E] in `dtype`, computed in float32; the 1 broadcasts over heads.
    Source: RoPE (arXiv:2104.09864), section 3.4.2; the halves layout is that of the published weights.
    """
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=position_ids.device) / width  # [E/2]
    angle = position_ids[..., None].float() * (1.0 / theta**exponent)  # [B, L, E/2]
    angle = torch.cat((angle, angle), dim=-1)[:, None]  # [B, 1, L, E]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of x by its angle: queries [B, N, L, E] or keys [B, K, L, E], by what rotary_embedding returned."""
    first, second = x.chunk(2, dim=-1)  # [..., E/2], [..., E/2]
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float | None) -> Tensor:
    """Each query's mean of the values, weighted by softmax of its scores; key head i serves query heads i G to i G + G - 1.

    Args:
        q: [B, N, L, E].
        k, v: [B, K, S, E].
        mask: bool[B, 1, L, S], True = may look; None = at everything.
        scale: factor on the scores.
        cap: Gemma 2's soft cap, scores become cap * tanh(scores / cap); None = none (Gemma 1).
    Returns: [B, N, L, E].
    Source: grouped-query attention (arXiv:2305.13245), soft cap (arXiv:2408.00118, section 2).
    """
    b, n, length, e = q.shape
    groups = n // k.shape[1]
    if cap is None and length == 1:  # the G queries of a key head stand in for L, so that keys are read once and not G times
        x = F.scaled_dot_product_attention(q.view(b, -1, groups, e), k, v, attn_mask=mask, scale=scale)  # [B, K, G, E]
        return x.view(b, n, 1, e)  # [B, N, L, E]
    if cap is None:
        # On CUDA the kernels for a mask or for float32 want as many key heads as query heads; else scores would be written out.
        # One head is spread over all without a copy, and each kernel takes that, too.
        k, v = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (k, v))  # [B, N, S, E], [B, N, S, E]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        block = q[:, :, start : start + QUERY_BLOCK].reshape(b, k.shape[1], -1, e)  # [B, K, G*L, E]
        scores = (block @ k.transpose(2, 3)).float() * scale  # [B, K, G*L, S]
        scores = torch.tanh(scores / cap) * cap
        scores = scores.view(b, n, -1, k.shape[2])  # [B, N, L, S]
        if mask is not None:
            scores = scores.masked_fill(~mask[:, :, start : start + QUERY_BLOCK], torch.finfo(torch.float32).min)
        weights = scores.softmax(dim=-1).to(v.dtype)
        x = weights.view(b, k.shape[1], -1, k.shape[2]) @ v  # [B, K, G*L, E]
        blocks.append(x.view(b, n, -1, e))
    return torch.cat(blocks, dim=2) if len(blocks) > 1 else blocks[0]  # [B, N, L, E]


class GemmaRMSNorm(nn.Module):
    """Divides by the root mean square and scales by 1 + weight, all in float32 (arXiv:1910.07467, equation 4).

    The product with 1 + weight comes before the cast back, and the 1 is added here: the files hold the difference from 1.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).to(x.dtype)


class GemmaEmbedding(nn.Embedding):
    """Ids to vectors and, with the same matrix, vectors to logits.

    Vectors are multiplied by sqrt(D), here and nowhere else: picture vectors enter the decoder as the projector made them.
    The root is rounded to the dtype of the weights first, as transformers does (45.25 for 45.2548... in bfloat16).
    """

    def forward(self, input_ids: Tensor) -> Tensor:
        scale = torch.tensor(self.embedding_dim**0.5, dtype=self.weight.dtype).item()
        return super().forward(input_ids) * scale

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class GemmaAttention(nn.Module):
    """Queries, keys and values by matrix product, RoPE on the first two, attention, one matrix product back to D."""

    def __init__(self, config: GemmaConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.scale = config.query_scale
        self.cap = config.attn_logit_softcapping
        self.width = config.head_dim  # N E need not be D
        query_width, key_width = config.num_attention_heads * self.width, config.num_key_value_heads * self.width
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return attention(q, k, v, mask, self.scale, self.cap)  # [B, N, L, E]

    def forward(
        self, x: Tensor, position_ids: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        b, length, _ = x.shape
        q = self.q_proj(x).view(b, length, -1, self.width).transpose(1, 2)  # [B, N, L, E]
        k = self.k_proj(x).view(b, length, -1, self.width).transpose(1, 2)  # [B, K, L, E]
        v = self.v_proj(x).view(b, length, -1, self.width).transpose(1, 2)  # [B, K, L, E]
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = cache.write(self.layer, position_ids, k, v)  # [B, K, S, E], [B, K, S, E]
        x = self.attend(q, k, v, mask)  # [B, N, L, E]
        x = x.transpose(1, 2).reshape(b, length, -1)  # [B, L, N*E]
        return self.o_proj(x)


class GemmaMLP(nn.Module):
    """GeGLU: one widened copy, bent by GELU, gates the other (arXiv:2002.05202, equation 6)."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x)  # [B, L, F]
        return self.down_proj(x)


class GemmaDecoderLayer(nn.Module):
    """Attention, then MLP, each on a normalised copy and added back; Gemma 2 normalises what is added back, too.

    One name, two places: `post_attention_layernorm` normalises the MLP's input in Gemma 1, attention's output in Gemma 2.
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
        self, x: Tensor, position_ids: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), position_ids, rotation, mask, cache)
        if not self.is_gemma2:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class GemmaModel(nn.Module):
    """The decoder without its output matrix.

    Args of forward:
        inputs_embeds: [B, L, D], from embed_tokens and, for pictures, the projector.
        position_ids: int64[B, L], 1 for the first token of a row.
        mask: bool[B, 1, L, S], True = may look; None = every token looks at all that is there.
        cache: written at `position_ids` and read up to `cache.reach`; None = the L tokens are all there is.
        window_mask: used instead of `mask` in layers 0, 2, 4, ..., where Gemma 2 as first published has a sliding window.
    Returns: [B, L, D] after the last norm.
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
        for layer in self.layers:
            is_windowed = window_mask is not None and layer.self_attn.layer % 2 == 0
            x = layer(x, position_ids, rotation, window_mask if is_windowed else mask, cache)
        return self.norm(x)


class GemmaForCausalLM(nn.Module):
    """The decoder with its output matrix, which is the embedding's.

    Args:
        config: of the decoder.
        final_softcap: logits become cap * tanh(logits / cap); None = they stay as they are.
    """

    def __init__(self, config: GemmaConfig, final_softcap: float | None = None):
        super().__init__()
        self.final_softcap = final_softcap
        self.model = GemmaModel(config)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, float32[..., V], for hidden vectors [..., D].

        The cap is computed in float32: in bfloat16 it would tie the best few of a vocabulary.
        """
        logits = self.model.embed_tokens.logits(hidden).float()
        return logits if self.final_softcap is None else torch.tanh(logits / self.final_softcap) * self.final_softcap
