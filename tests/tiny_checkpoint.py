"""A whole checkpoint folder of a tiny random model, with a tokenizer of single characters, for tests of programs."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from paligemma.checkpoints import weights
from paligemma.configuration import PaliGemmaConfig
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
from paligemma.vocabulary import CODE_TOKENS, LOCATION_TOKENS
from tests.tiny import fill, raw_config

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
CHARACTERS = ["\n", "▁", *(chr(i) for i in range(33, 127))]
CONTEXT = 256


def make_tokenizer() -> Tokenizer:
    pieces = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *CHARACTERS]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in LOCATION_TOKENS + CODE_TOKENS])
    tokenizer.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    return tokenizer


def make_checkpoint(folder: Path, *, context: int = CONTEXT, seed: int = 0) -> Path:
    """Writes the folder. The answers are random characters without an end."""
    tokenizer = make_tokenizer()
    image = tokenizer.token_to_id("<image>")
    raw = raw_config("gemma", vocab_size=image + 64, max_position_embeddings=context) | {"image_token_index": image}
    model = fill(PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_hf(raw)), seed)
    with torch.no_grad():  # the model is to speak in characters, mostly
        model.language_model.model.embed_tokens.weight[len(SPECIAL) + 256 + len(CHARACTERS) :] *= 0.1
        model.language_model.model.embed_tokens.weight[: len(SPECIAL)] *= 0.1
    weights.save_model(model, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    side = raw["vision_config"]["image_size"]
    sizes = {"size": {"height": side, "width": side}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GemmaTokenizer"}))
    return folder
