"""PaliGemma: a SigLIP tower, one linear layer, a Gemma decoder. Pictures and token ids in, logits out.

    pixel_values -> tower -> projector -> image_features ─┐ overwrite the <image> tokens
    input_ids -> embedding * sqrt(D) ────────────────────┴-> inputs_embeds -> decoder -> logits

A row is `<image> * P <bos> prompt \n | answer <eos>`: all before the bar look at each other in both directions, the answer looks
back only (prefix-LM). token_type_ids say where the bar is: 0 before it, 1 behind.

Sources: PaliGemma (arXiv:2407.07726), PaliGemma 2 (arXiv:2412.03555). Checked in tests/test_modeling_paligemma.py against
transformers, and against the official JAX code in tests/test_oracle.py.
Shapes: B batch, I pictures in the whole batch, P patches (= <image> tokens) per picture, R picture side in pixels, L tokens
fed in this call, S slots of the KV cache that are read, D width of the decoder, V vocabulary.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma.modeling_gemma import GemmaConfig, GemmaForCausalLM, KVCache
from paligemma.modeling_siglip import SiglipVisionConfig, SiglipVisionModel
from paligemma.vocabulary import IGNORE_INDEX


@dataclass(frozen=True)
class PaliGemmaConfig:
    """config.json, read once: the two sub-configs and the ids that the model itself needs."""

    vision_config: SiglipVisionConfig
    text_config: GemmaConfig
    image_token_index: int
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int | tuple[int, ...] = 1

    def __post_init__(self):
        for name in ("image_token_index", "pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            ids = value if name == "eos_token_id" and isinstance(value, tuple) else (value,)
            if not (ids and all(type(token) is int and 0 <= token < 2**31 for token in ids)):
                raise ValueError(f"{name} is {value!r}; a token id is needed.")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def num_image_tokens(self) -> int:
        """P, the <image> tokens that one picture takes."""
        return self.vision_config.num_patches

    @classmethod
    def from_hf(cls, raw: dict) -> "PaliGemmaConfig":
        """Reads a whole config.json, as the hub's files and transformers 4 and 5 spell it.

        The top-level `hidden_size` is not read: files of PaliGemma 2 carry a 2048 there that is not the decoder's width. Nor is
        vision_config's `projection_dim`, which transformers overwrites by the one at the top.
        Raises: ValueError, one sentence, for another model, a missing or absurd number, or something not implemented.
        """
        if raw.get("model_type") != "paligemma":
            raise ValueError(f"this is a {raw.get('model_type')!r} model; model_type 'paligemma' is needed.")
        parts = {}
        for key in ("vision_config", "text_config"):
            if not isinstance(raw.get(key), dict):
                raise ValueError(f"{key} is {raw.get(key)!r}; an object is needed.")
            parts[key] = raw[key]
        text = parts["text_config"]
        ids = {}
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):  # transformers 5 writes them into text_config only
            value = raw.get(key) if raw.get(key) not in (None, []) else text.get(key)
            is_absent = value in (None, []) or key == "pad_token_id" and value == -1  # how some programs write that none pads
            if not is_absent:
                ids[key] = tuple(value) if isinstance(value, list) else value
        image_token = raw.get("image_token_index") if raw.get("image_token_index") is not None else raw.get("image_token_id")
        if image_token is None:
            raise ValueError("image_token_index is missing.")
        config = cls(SiglipVisionConfig.from_hf(parts["vision_config"]), GemmaConfig.from_hf(text), image_token, **ids)
        if raw.get("projection_dim") not in (None, config.text_config.hidden_size):
            found, needed = raw["projection_dim"], config.text_config.hidden_size
            raise ValueError(f"projection_dim is {found!r}, but the decoder is {needed} wide.")
        return config

    def to_hf(self) -> dict:
        """The config.json that describes this model, as transformers and from_hf read it."""
        # A null says that Gemma 2 does without; a key left out would come back as its default.
        is_gemma2 = self.text_config.is_gemma2
        text = {key: value for key, value in asdict(self.text_config).items() if value is not None or is_gemma2}
        text |= {"hidden_activation": "gelu_pytorch_tanh", "num_image_tokens": self.num_image_tokens}
        vision = asdict(self.vision_config) | {
            "model_type": "siglip_vision_model",
            "hidden_act": "gelu_pytorch_tanh",
            "num_image_tokens": self.num_image_tokens,
            "projection_dim": self.text_config.hidden_size,
            "vision_use_head": False,
        }
        eos = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        return {
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "model_type": "paligemma",
            "image_token_index": self.image_token_index,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "hidden_size": self.text_config.hidden_size,
            "projection_dim": self.text_config.hidden_size,
            "vocab_size": self.text_config.vocab_size,
            "ignore_index": IGNORE_INDEX,
            "text_config": text,
            "vision_config": vision,
        }


def prefix_lm_mask(attention_mask: Tensor, token_type_ids: Tensor, window: int | None = None) -> Tensor:
    """Who may look at whom: picture and prompt at each other, the answer only at what came before it.

    One row of three picture or prompt tokens and two of the answer;      1 1 1 . .
    a line is who looks, a column at whom:                                1 1 1 . .
                                                                          1 1 1 . .
    Args:                                                                 1 1 1 1 .
        attention_mask: [B, L], 1 = token, 0 = padding.                   1 1 1 1 1
        token_type_ids: [B, L], 0 = picture and prompt, 1 = answer; of padding, either.
        window: if given, nobody looks back further than that many tokens, but within picture and prompt.
    Returns: bool[B, 1, L, L], True = may look; the 1 broadcasts over heads. Padding sees itself, so that no line is empty.
    Source: PaliGemma (arXiv:2407.07726), figure 2; the window as transformers combines it.
    """
    length = attention_mask.shape[1]
    index = torch.arange(length, device=attention_mask.device)  # [L]
    is_token = attention_mask.bool()  # [B, L]
    in_prefix = is_token & (token_type_ids == 0)  # [B, L]
    past = index <= index[:, None]  # [L, L]
    if window is not None:
        past = past & (index > index[:, None] - window)
    mask = past | (in_prefix[:, None] & in_prefix[:, :, None])  # [B, L, L]
    mask = (mask & is_token[:, None]) | (index == index[:, None])
    return mask[:, None]  # [B, 1, L, L]


def suffix_loss(logits: Tensor, labels: Tensor, reduction: str = "example") -> Tensor:
    """Cross entropy of the answer, in nats: how surprised the model is by each next token.

    Args:
        logits: [B, L, V]; those at a position foretell the token after it.
        labels: int64[B, L], -100 for every token that is not of the answer.
        reduction: "example" = mean over the tokens of each answer, then over answers, so that a word weighs as much as a
            paragraph (the official trainer); "token" = mean over all tokens (transformers).
    Returns: float32 scalar. Rows without an answer do not count; if no row has one it is 0.
    Source: PaliGemma (arXiv:2407.07726), section 3.2.4; Google's trainer for "example".
    """
    if reduction not in ("example", "token"):
        raise ValueError(f"reduction is {reduction!r}; 'example' or 'token' is needed.")
    targets = labels[:, 1:]  # [B, L-1]
    flat = logits[:, :-1].flatten(0, 1).float()
    loss = F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none").view(targets.shape)  # [B, L-1]
    is_answer = targets != IGNORE_INDEX
    if reduction == "token":
        return loss.sum() / is_answer.sum().clamp(min=1)
    per_example = loss.sum(1) / is_answer.sum(1).clamp(min=1)  # [B]
    return per_example.sum() / is_answer.any(1).sum().clamp(min=1)


class PaliGemmaMultiModalProjector(nn.Module):
    """One linear layer from the tower's width to the decoder's."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class PaliGemmaForConditionalGeneration(nn.Module):
    """The whole model. Call it for logits at every position; `prefill` and `decode` are the same pass with a cache.

    Args:
        config: read from config.json.
        final_softcap: "config" caps the logits as config.json says, in every forward (as transformers); None never does.
        sliding_window: None lets every layer see all tokens, as in the official JAX code that trained the checkpoints;
            "config" gives the even layers of PaliGemma 2 the window of config.json (as transformers).
    """

    def __init__(self, config: PaliGemmaConfig, *, final_softcap: str | None = "config", sliding_window: str | None = None):
        super().__init__()
        for name, value in (("final_softcap", final_softcap), ("sliding_window", sliding_window)):
            if value not in (None, "config"):
                raise ValueError(f"{name} is {value!r}; 'config' or None is needed.")
        self.config = config
        self.window = config.text_config.sliding_window if sliding_window == "config" else None
        cap = config.text_config.final_logit_softcapping if final_softcap == "config" else None
        self.vision_tower = SiglipVisionModel(config.vision_config)
        self.multi_modal_projector = PaliGemmaMultiModalProjector(config)
        self.language_model = GemmaForCausalLM(config.text_config, cap)

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.language_model.model.norm.weight.device

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache for `batch` rows of at most `slots` tokens each (picture, prompt and answer together)."""
        return KVCache(self.config.text_config, batch, slots, device=self.device, dtype=self.dtype)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """What the decoder sees of each picture; compute it once and ask as often as you like.

        Args:
            pixel_values: float32[I, 3, R, R].
        Returns: [I, P, D]; pass it as `image_features` in place of `pixel_values`.
        """
        return self.multi_modal_projector(self.vision_tower(pixel_values.to(self.device)))

    def embed(self, input_ids: Tensor, image_features: Tensor | None) -> Tensor:
        """Token vectors [B, L, D], those of <image> tokens replaced, in row order, by the picture's, unscaled.

        Raises: ValueError when there are more or fewer <image> tokens than patches.
        """
        is_image = input_ids == self.config.image_token_index  # [B, L]
        num_features = 0 if image_features is None else image_features.shape[0] * image_features.shape[1]
        if int(is_image.sum()) != num_features:
            raise ValueError(
                f"input_ids hold {int(is_image.sum())} <image> tokens, but the pictures give {num_features} vectors; "
                f"each picture needs {self.config.num_image_tokens}."
            )
        # <image> may lie outside the vocabulary; its own vector is never used. What is counted here came from main memory.
        input_ids, is_image = input_ids.to(self.device), is_image.to(self.device)
        inputs_embeds = self.language_model.model.embed_tokens(input_ids.masked_fill(is_image, 0))  # [B, L, D]
        if image_features is None:
            return inputs_embeds
        return inputs_embeds.masked_scatter(is_image[..., None], image_features.to(inputs_embeds.dtype))

    def hidden(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        image_features: Tensor | None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The pass that `forward` and `prefill` share: hidden vectors [B, L, D] of a whole row."""
        if pixel_values is not None:
            if image_features is not None:
                raise ValueError("pixel_values and image_features are two forms of the same pictures; one of them is needed.")
            image_features = self.encode_images(pixel_values)
        if token_type_ids is None and image_features is not None:
            raise ValueError("token_type_ids are missing: they say where the prompt ends and the answer begins.")
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask  # [B, L]
        token_type_ids = torch.ones_like(input_ids) if token_type_ids is None else token_type_ids  # [B, L]
        # Picture and prompt alone look at everything, and the fastest kernels take no mask. Asked before anything goes to the
        # device, where the answer would have to be waited for.
        is_open = bool(attention_mask.all()) and not bool(token_type_ids.any())
        embeds = self.embed(input_ids, image_features)  # [B, L, D]
        attention_mask, token_type_ids = attention_mask.to(self.device), token_type_ids.to(self.device)
        # Padding has no position. The first token's is 1, as in transformers; RoPE sees differences only, so that 0 would change
        # nothing but the rounding. In a cache, where padding is on the right, it gets the slots that the answer will overwrite.
        position_ids = attention_mask.long().cumsum(-1) * attention_mask.long()  # [B, L]
        if cache is not None:
            position_ids = torch.arange(1, input_ids.shape[1] + 1, device=self.device).expand_as(input_ids)  # [B, L]
        mask = window_mask = None
        if not is_open:
            mask = prefix_lm_mask(attention_mask, token_type_ids)  # [B, 1, L, L]
        if self.window is not None and input_ids.shape[1] > self.window:
            window_mask = prefix_lm_mask(attention_mask, token_type_ids, self.window)  # [B, 1, L, L]
        return self.language_model.model(embeds, position_ids, mask, cache, window_mask)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        image_features: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits at every position; with labels, the loss as well.

        Args:
            input_ids: int64[B, L], padded on either side.
            pixel_values: float32[I, 3, R, R], the pictures of all rows in row order. Without them it is a text model.
            attention_mask: [B, L], 1 = token, 0 = padding; None = no padding.
            token_type_ids: [B, L], 0 = picture and prompt, 1 = answer; needed with pictures, else every token looks back only.
            image_features: from encode_images, in place of pixel_values.
            labels: int64[B, L], the answer's tokens, -100 elsewhere, as the processor makes them of suffixes.
        Returns: float32[B, L, V]; at padding they mean nothing. With labels (loss, logits), where the loss is that of
            transformers: suffix_loss(logits, labels, "token").
        Raises: ValueError for missing token_type_ids, and for <image> tokens and pictures that do not match.
        """
        x = self.hidden(input_ids, pixel_values, attention_mask, token_type_ids, image_features)  # [B, L, D]
        logits = self.language_model.logits(x)  # [B, L, V]
        return logits if labels is None else (suffix_loss(logits, labels.to(logits.device), "token"), logits)

    def prefill(
        self,
        cache: KVCache,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        image_features: Tensor | None = None,
    ) -> Tensor:
        """Reads pictures and prompts into the cache, whatever it held before. Rows are padded on the right, or not at all.

        Returns: float32[B, V], logits of the first answer token of each row.
        Raises: ValueError as forward, and when the rows do not fit the cache, are padded on the left, or have no token.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if bool((attention_mask.long().diff(dim=1) > 0).any()):
            raise ValueError("prefill takes rows that are padded on the right; these begin with padding.")
        lengths = attention_mask.sum(1).cpu()  # [B]
        if not lengths.all():
            raise ValueError(f"rows of {lengths.tolist()} tokens came; a row needs at least one.")
        if len(lengths) != len(cache.lengths):
            raise ValueError(f"{len(lengths)} rows came, but the cache has {len(cache.lengths)}; cache[:n] is a part of it.")
        longest = int(lengths.max())
        if longest > cache.slots:
            raise ValueError(f"{longest} tokens do not fit the {cache.slots} slots of the cache.")
        cache.fill(lengths)
        ids, is_token = input_ids[:, :longest], attention_mask[:, :longest]  # [B, L], [B, L]
        types = None if token_type_ids is None else token_type_ids[:, :longest]
        x = self.hidden(ids, pixel_values, is_token, types, image_features, cache)  # [B, L, D]
        last = x[torch.arange(len(x), device=self.device), cache.lengths - 1]  # [B, D]
        return self.language_model.logits(last)

    def decode(self, cache: KVCache, tokens: Tensor) -> Tensor:
        """Appends one token to each row and returns the logits of the next.

        Args:
            tokens: int64[B], what each row of the cache has just said.
        Returns: float32[B, V].
        Raises: ValueError when a row is full, and for more or fewer tokens than rows.
        """
        if tokens.shape != cache.lengths.shape:
            raise ValueError(f"tokens is {list(tokens.shape)}; one for each of the {len(cache.lengths)} rows is needed.")
        cache.count()
        return self.step(cache, tokens.to(self.device))

    def step(self, cache: KVCache, tokens: Tensor) -> Tensor:
        """The part of `decode` that happens on the device; nothing in it waits for it."""
        cache.lengths.add_(1)
        x = self.language_model.model.embed_tokens(tokens[:, None])  # [B, 1, D]
        window_mask = None if self.window is None else cache.mask(self.window)
        x = self.language_model.model(x, cache.lengths[:, None], cache.mask(), cache, window_mask)  # [B, 1, D]
        return self.language_model.logits(x[:, 0])
