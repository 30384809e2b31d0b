"""PaliGemma: a SigLIP tower, one linear layer, a Gemma decoder. Pictures and token ids in, logits out.

    pixel_values -> tower -> projector -> image_features ─┐ replace the vectors of the <image> tokens
    input_ids -> embedding * sqrt(D) ────────────────────┴-> inputs_embeds -> decoder -> logits

A row is `<image> * P <bos> prompt \n | answer <eos>`. The tokens before the bar attend to each other in both directions; a token
of the answer attends to itself and all earlier tokens (a prefix LM). token_type_ids are 0 before the bar and 1 after it.

Sources: PaliGemma (arXiv:2407.07726), PaliGemma 2 (arXiv:2412.03555). Checked in tests/test_modeling_paligemma.py against
transformers, and in tests/test_oracle.py against the official JAX code.
Shapes: B batch rows, I images in the batch, C channels, H W pixels, P patches per image (and <image> tokens per image),
L tokens fed in this call, S slots of the KV cache that are read, D model width (of the decoder), V vocabulary size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma.configuration import PaliGemmaConfig
from paligemma.modeling_gemma import GemmaForCausalLM, KVCache
from paligemma.modeling_siglip import SiglipVisionModel
from paligemma.vocabulary import IGNORE_INDEX


def prefix_lm_mask(attention_mask: Tensor, token_type_ids: Tensor, window: int | None = None) -> Tensor:
    """The attention mask of a prefix LM: full attention within picture and prompt, causal attention for the answer.

    For three tokens of picture and prompt, and two tokens of the answer (rows are queries, columns are keys, 1 = attends):

        1 1 1 . .
        1 1 1 . .
        1 1 1 . .
        1 1 1 1 .
        1 1 1 1 1

    Args:
        attention_mask: [B, L], 1 = token, 0 = padding.
        token_type_ids: [B, L], 0 = picture and prompt, 1 = answer; the value for padding does not matter.
        window: if given, a token attends only to the newest `window` tokens up to and including itself, but the tokens of
            picture and prompt still all attend to each other.
    Returns: bool[B, 1, L, L], True = the query attends to the key; the 1 broadcasts over heads. A padding token attends to
        itself, because the softmax of a row without any key is NaN.
    Source: PaliGemma (arXiv:2407.07726), figure 2. Window and prefix are combined as in transformers.
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
    """Cross entropy of the answer (the "suffix", as transformers calls it), in nats per token.

    Args:
        logits: [B, L, V]; the logits at position i predict token i + 1.
        labels: int64[B, L], the tokens of the answer, and -100 for every other token.
        reduction: "example" = mean over the tokens of each answer, then mean over answers, so that a short answer counts as much
            as a long answer (as in Google's trainer); "token" = mean over the tokens of all answers (as in transformers).
    Returns: float32 scalar. Rows without an answer are ignored; the loss is 0 if no row has an answer.
    Source: PaliGemma (arXiv:2407.07726), section 3.2.4; for "example", Google's trainer.
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
    """A linear layer that projects the tower's vectors to the width of the decoder."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class PaliGemmaForConditionalGeneration(nn.Module):
    """The whole model. `forward` gives logits at every position; `prefill` and `decode` generate token by token with a KV cache.

    Args:
        config: the contents of config.json.
        final_softcap: "config" = the soft cap in config.json is applied to the logits, as in transformers; None = no cap.
        sliding_window: None = every layer attends to all tokens, as in the official JAX code that trained the checkpoints;
            "config" = the even layers of PaliGemma 2 have the sliding window of config.json, as in transformers.
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

    def to_device(self, x: Tensor) -> Tensor:
        """The tensor on the device of the model. The CPU does not wait for a copy to CUDA, which is made from pinned memory."""
        is_async = self.device.type == "cuda" and x.device.type == "cpu"
        return x.contiguous().pin_memory().to(self.device, non_blocking=True) if is_async else x.to(self.device)

    def new_cache(self, batch: int, slots: int, kind: type[KVCache] = KVCache) -> KVCache:
        """An empty cache for `batch` rows of at most `slots` tokens each (picture, prompt and answer together).

        `kind` may be a subclass of KVCache, such as layers.batch_cache.BatchCache, which can be sliced.
        """
        return kind(self.config.text_config, batch, slots, device=self.device, dtype=self.dtype)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """The vectors that the decoder reads for each picture. Compute them once to ask many questions about the same picture.

        Args:
            pixel_values: float32[I, C, H, W].
        Returns: [I, P, D]; pass them as `image_features` instead of `pixel_values`.
        """
        return self.multi_modal_projector(self.vision_tower(self.to_device(pixel_values)))

    def embed(self, input_ids: Tensor, image_features: Tensor | None) -> Tensor:
        """[B, L, D]: the token vectors. The vectors of <image> tokens are replaced by image_features, in the order of the rows.

        Raises: ValueError if there are more or fewer <image> tokens than vectors in image_features.
        """
        # The processor returns input_ids on the CPU. The <image> tokens are counted on the CPU, so that nothing waits for a GPU.
        self.check_image_tokens(int((input_ids == self.config.image_token_index).sum()), image_features)
        input_ids = self.to_device(input_ids)
        is_image = input_ids == self.config.image_token_index  # [B, L]
        # The id of <image> may be outside the vocabulary, so id 0 is looked up instead; its vector is overwritten below.
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
        """Runs the tower and the decoder on complete rows, not on a single new token. Returns the hidden vectors, [B, L, D].

        Args: as in `forward` and `prefill`, which call this method.
        """
        self.check_pictures(pixel_values, image_features, token_type_ids)
        if pixel_values is not None:
            image_features = self.encode_images(pixel_values)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask  # [B, L]
        token_type_ids = torch.ones_like(input_ids) if token_type_ids is None else token_type_ids  # [B, L]
        # Without padding and without an answer, every token attends to every token. Therefore no mask is needed; without a mask,
        # torch has faster kernels. This is checked before the tensors move to the device, because reading the result back from
        # a GPU would make the CPU wait.
        needs_mask = bool(token_type_ids.any()) or not bool(attention_mask.all())
        has_window = self.window is not None and input_ids.shape[1] > self.window
        embeds = self.embed(input_ids, image_features)  # [B, L, D]
        if needs_mask or has_window or cache is None:
            attention_mask, token_type_ids = self.to_device(attention_mask), self.to_device(token_type_ids)
        if cache is None:
            # Positions start at 1, as in transformers; padding has position 0. RoPE depends only on differences of positions, so
            # starting at 0 would change only the rounding.
            position_ids = attention_mask.long().cumsum(-1) * attention_mask.long()  # [B, L]
        else:
            # With a cache, rows are padded on the right. The keys and values of the padding are written to the slots after the
            # last token of the row. The tokens of the answer overwrite them later.
            position_ids = torch.arange(1, input_ids.shape[1] + 1, device=self.device).expand_as(input_ids)  # [B, L]
        mask = window_mask = None
        if needs_mask:
            mask = prefix_lm_mask(attention_mask, token_type_ids)  # [B, 1, L, L]
        if has_window:
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
        """The logits at every position; with labels, also the loss.

        Args:
            input_ids: int64[B, L], padded on the left or on the right.
            pixel_values: float32[I, C, H, W], the pictures of all rows in row order; None = text only.
            attention_mask: [B, L], 1 = token, 0 = padding; None = no padding.
            token_type_ids: [B, L], 0 = picture and prompt, 1 = answer. They are required with pictures; without pictures, None
                means causal attention for all tokens.
            image_features: the result of encode_images; pass it instead of pixel_values.
            labels: int64[B, L], the tokens of the answer, and -100 elsewhere. The processor returns labels if
                answers are passed as its argument `suffix`.
        Returns: logits, float32[B, L, V]; the logits of padding have no meaning. With labels: (loss, logits), where loss is
            suffix_loss(logits, labels, "token"), as in transformers.
        Raises: ValueError for missing token_type_ids, and if <image> tokens and pictures do not match.
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
        """Runs pictures and prompts through the model and overwrites the cache with their keys and values.

        Args: as in forward, but rows are padded on the right or not at all.
        Returns: float32[B, V], the logits of the first answer token of each row.
        Raises: ValueError as in forward, and if the rows do not fit the cache, are padded on the left, or have no token.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        lengths = attention_mask.sum(1).cpu()  # [B]
        self.check_rows(cache, attention_mask, lengths)
        longest = int(lengths.max())
        cache.set_lengths(lengths)
        ids, is_token = input_ids[:, :longest], attention_mask[:, :longest]  # [B, L], [B, L]
        types = None if token_type_ids is None else token_type_ids[:, :longest]
        x = self.hidden(ids, pixel_values, is_token, types, image_features, cache)  # [B, L, D]
        last = x[torch.arange(len(x), device=self.device), cache.lengths - 1]  # [B, D]
        return self.language_model.logits(last)

    def decode(self, cache: KVCache, tokens: Tensor) -> Tensor:
        """Appends one token to each row and returns the logits of the next token.

        Args:
            tokens: int64[B], the token that was just generated in each row of the cache.
        Returns: float32[B, V].
        Raises: ValueError if a row is full, and if there are more or fewer tokens than rows.
        """
        if tokens.shape != cache.lengths.shape:
            shape, needed = list(tokens.shape), list(cache.lengths.shape)
            raise ValueError(f"tokens has the shape {shape}, but {needed} is needed: one token per row of the cache.")
        cache.reserve()
        return self.step(cache, self.to_device(tokens))

    def step(self, cache: KVCache, tokens: Tensor) -> Tensor:
        """The part of `decode` that runs on the device, without synchronisation, so that it can be captured as a CUDA graph."""
        cache.lengths.add_(1)
        x = self.language_model.model.embed_tokens(tokens[:, None])  # [B, 1, D]
        window_mask = None if self.window is None else cache.mask(self.window)
        x = self.language_model.model(x, cache.lengths[:, None], cache.mask(), cache, window_mask)  # [B, 1, D]
        return self.language_model.logits(x[:, 0])

    # Checks of the arguments

    def check_pictures(self, pixel_values: Tensor | None, image_features: Tensor | None, token_type_ids: Tensor | None) -> None:
        if pixel_values is not None and image_features is not None:
            raise ValueError("pixel_values and image_features are two forms of the same pictures. Pass only one of them.")
        if token_type_ids is None and not (pixel_values is None and image_features is None):
            raise ValueError("token_type_ids are missing. They are needed to tell where the prompt ends and the answer begins.")

    def check_image_tokens(self, num_image_tokens: int, image_features: Tensor | None) -> None:
        num_features = 0 if image_features is None else image_features.shape[0] * image_features.shape[1]
        if num_image_tokens != num_features:
            raise ValueError(
                f"input_ids hold {num_image_tokens} <image> tokens, but the pictures give {num_features} vectors; "
                f"one picture needs {self.config.num_image_tokens} tokens."
            )

    def check_rows(self, cache: KVCache, attention_mask: Tensor, lengths: Tensor) -> None:
        if bool((attention_mask.long().diff(dim=1) > 0).any()):
            raise ValueError("prefill needs rows that are padded on the right, but a row begins with padding.")
        if not lengths.all():
            raise ValueError(f"the rows have {lengths.tolist()} tokens, but every row needs at least one.")
        num_rows = len(cache.lengths)
        if len(lengths) != num_rows:
            raise ValueError(f"{len(lengths)} rows were given, but the cache has {num_rows} rows. Pass {num_rows} rows.")
        if int(lengths.max()) > cache.slots:
            raise ValueError(f"a row has {int(lengths.max())} tokens, but the cache has only {cache.slots} slots per row.")
