"""Tiny seeded models of both families, ours and the transformers reference with the same weights, and batches for them.

The numbers are chosen so that mistakes are visible: the width of the decoder is not the number of heads times the head width, the
query scale of Gemma 2 is not computed from the head width, the soft caps are small enough to change the scores, norm weights and
biases are not zero, and all weights are so large that a missing term changes the logits by far more than rounding does.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from paligemma.configuration import PaliGemmaConfig
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration

FAMILIES = ("gemma", "gemma2")
SIDE, PATCHES = 28, 4  # a picture of 2 x 2 patches
PAD, EOS, BOS, IMAGE, VOCAB = 0, 1, 2, 128, 160  # as on the hub, the embedding has untrained rows after <image>


def raw_config(family: str, **text: object) -> dict:
    """A config.json in the hub's spelling; `text` overrides fields of text_config."""
    decoder = {
        "model_type": family,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": VOCAB,
    }
    if family == "gemma2":
        decoder |= {
            "num_key_value_heads": 2,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 12.0,
            "sliding_window": 4096,
        }
    tower = {
        "model_type": "siglip_vision_model",
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": SIDE,
        "patch_size": 14,
        "projection_dim": 40,
        "vision_use_head": False,
    }
    return {
        "model_type": "paligemma",
        "image_token_index": IMAGE,
        "projection_dim": 40,
        "hidden_size": 2048,  # not the decoder's width, as in the hub's files of PaliGemma 2
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": BOS,
        "text_config": decoder | text,
        "vision_config": tower,
    }


@torch.no_grad()
def fill(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draws every parameter: matrices keep the size of what they multiply, embeddings give logits of several units."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        width = parameter[0].numel() if parameter.dim() > 1 else 8
        scale = 0.5 if "embed" in name and parameter.dim() == 2 else 1.5 * width**-0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


@contextmanager
def in_double() -> Iterator[None]:
    """Inside, what computes in float32 computes in float64, also where code asks for float32 by name.

    So two ways to one result can be compared without the rounding of float32, which differs from processor to processor. Import
    everything before: a module that is loaded inside would keep the wrong name.
    """
    names = {"float32": torch.float64, "float": torch.float64}
    before, plain, default = {name: getattr(torch, name) for name in names}, torch.Tensor.float, torch.get_default_dtype()
    for name, dtype in names.items():
        setattr(torch, name, dtype)
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
        torch.Tensor.float = plain
        for name, dtype in before.items():
            setattr(torch, name, dtype)


def make_model(family: str, *, seed: int = 0, dtype: torch.dtype | None = None, text: dict | None = None, **options: object):
    """Our model, in eval mode, float32 if not told otherwise; `text` overrides fields of text_config, `options` are its own."""
    config = PaliGemmaConfig.from_hf(raw_config(family, **(text or {})))
    return fill(PaliGemmaForConditionalGeneration(config, **options), seed).to(dtype or torch.float32).eval()


def make_reference(model: PaliGemmaForConditionalGeneration, raw: dict | None = None, attention: str = "eager"):
    """transformers' model with the weights of ours.

    Args:
        raw: its config.json, by default the one that to_hf writes.
        attention: "eager" writes it out; "sdpa" calls torch's kernel, as we do where there is no soft cap; "as ours" takes for
            tower and decoder the one that does what we do in the same order.
    """
    from transformers import PaliGemmaConfig as ReferenceConfig
    from transformers import PaliGemmaForConditionalGeneration as Reference

    config = ReferenceConfig.from_dict(raw or model.config.to_hf())
    capped = model.config.text_config.attn_logit_softcapping is not None
    config._attn_implementation = attention if attention != "as ours" else "eager" if capped else "sdpa"
    config.vision_config._attn_implementation = "eager" if attention == "eager" else "sdpa"
    reference = Reference(config).eval()
    for parameter in reference.parameters():  # and not reference.to(dtype), which would round the frequencies of RoPE, too
        parameter.data = parameter.data.to(model.dtype)
    renamed = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("language_model.model.", "language_model.").replace("vision_tower.vision_model.", "vision_tower.")
        renamed["model." + name] = tensor
    renamed["lm_head.weight"] = renamed["model.language_model.embed_tokens.weight"]
    reference.load_state_dict(renamed)
    return reference


def make_pair(
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    text: dict | None = None,
    attention: str = "eager",
    **options: object,
):
    """Ours and the reference with the same weights."""
    model = make_model(family, seed=seed, dtype=dtype, text=text, **options)
    return model, make_reference(model, raw_config(family, **(text or {})), attention)


def widen(reference: torch.nn.Module) -> torch.nn.Module:
    """transformers' model in float64, also the constants that it makes in float32: RoPE's frequencies, the embedding's scale."""
    reference = reference.double()
    for module in reference.modules():
        if hasattr(module, "embed_scale"):
            module.embed_scale = torch.tensor(module.embedding_dim**0.5, dtype=torch.float64)
        if hasattr(module, "inv_freq"):
            module.inv_freq = 10_000.0 ** -(torch.arange(len(module.inv_freq), dtype=torch.float64) / len(module.inv_freq))
    return reference


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normally distributed numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_pixels(count: int, seed: int = 0) -> Tensor:
    """float32[count, 3, 28, 28] in [-1, 1]."""
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def make_batch(rows: list[tuple[int, int, int]], pad: str = "left", seed: int = 0) -> dict:
    """A batch as the processor makes it. Each row is (pictures, tokens of prompt, tokens of answer); `pad` is the side."""
    generator = torch.Generator().manual_seed(1000 + seed)
    longest = max(PATCHES * pictures + prompt + answer for pictures, prompt, answer in rows)
    batch = {key: torch.zeros(len(rows), longest, dtype=torch.int64) for key in ("input_ids", "attention_mask", "token_type_ids")}
    for i, (pictures, prompt, answer) in enumerate(rows):
        words = torch.randint(3, IMAGE, (prompt + answer,), generator=generator)
        ids = torch.cat((torch.full((PATCHES * pictures,), IMAGE), words))
        place = slice(longest - len(ids), longest) if pad == "left" else slice(0, len(ids))
        batch["input_ids"][i, place] = ids
        batch["attention_mask"][i, place] = 1
        batch["token_type_ids"][i, place] = (torch.arange(len(ids)) >= len(ids) - answer).long()
    pictures = sum(pictures for pictures, _, _ in rows)
    if pictures:
        batch["pixel_values"] = make_pixels(pictures, seed)
    return batch


def positions(batch: dict) -> Tensor:
    """Position ids that do not count padding: the reference's forward, called directly, would count it."""
    return batch["attention_mask"].cumsum(-1) * batch["attention_mask"]


def reference_logits(reference: torch.nn.Module, batch: dict) -> Tensor:
    """float32[B, L, V] of transformers for a batch of make_batch."""
    with torch.no_grad():
        return reference(**batch, position_ids=positions(batch), use_cache=False).logits.float()


def gap(ours: Tensor, theirs: Tensor, batch: dict) -> float:
    """The largest difference of two logits at any token; padding does not count."""
    is_token = batch["attention_mask"].bool()
    return (ours - theirs).abs()[is_token].max().item()
