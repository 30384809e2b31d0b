"""A small tokenizer like Gemma's, and the other files that a processor reads. For all tests.

The form: BPE with byte fallback over text in which spaces were replaced by `▁`, no pre-tokenizer that matters, runs of
newlines and of spaces as tokens of their own, and <loc0000> to <loc1023>, <seg000> to <seg127>, <image> at the end.
"""

import json
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from paligemma.vocabulary import CODE_TOKENS, LOCATION_TOKENS

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
RUNS = ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PLACES = LOCATION_TOKENS + CODE_TOKENS
TEXT = """
caption en  caption de  describe en  ocr  answer en what is this?  answer en how many cats are there?  question en two
detect cat  detect red car ; dog  segment the blue square  where is the cup of coffee? on the table, in the kitchen.
a cat sits on a red carpet and looks at the camera.  a cup of coffee stands beside a spoon.  two dogs run in the snow.
image location segment  yes  no  one  two  three  four  left  right  top  bottom  red  green  blue  yellow  circle
square  triangle  star
wer reitet so spät durch Nacht und Wind? où est le café?  <b>bold</b> "quoted" (1, 2, 3) 45% #7 [a] {b} x=y+z;
"""


@cache
def trained(num_words: int) -> tuple[dict, list]:
    """The vocabulary and the merges of a BPE with about `num_words` tokens in addition to characters and bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no token crosses a space
    first = SPECIAL + RUNS + BYTES
    trainer = trainers.BpeTrainer(vocab_size=len(first) + 80 + num_words, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator(TEXT.split("\n"), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], model["merges"]


def tokenizer_json(num_words: int = 200) -> dict:
    """The content of tokenizer.json. A test can damage it before writing it."""
    vocab, merges = trained(num_words)
    vocab = dict(vocab)
    for token in PLACES:
        vocab[token] = len(vocab)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": vocab[token], "content": token, "special": token in SPECIAL} | flags for token in SPECIAL + RUNS + PLACES]
    added.append({"id": len(vocab), "content": "<image>", "special": True} | flags)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": "<bos>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<bos>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [vocab["<bos>"]], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(merge) for merge in merges],
        },
    }


def write_json(folder: Path, name: str, value: object) -> None:
    (Path(folder) / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_tokenizer(folder: Path, num_words: int = 200) -> dict:
    """Writes the tokenizer's files. Returns the entries that config.json needs: vocab_size and the ids."""
    tokenizer = tokenizer_json(num_words)
    write_json(folder, "tokenizer.json", tokenizer)
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>", "mask_token": "<mask>"}
    extra = {"add_bos_token": True, "add_eos_token": False, "additional_special_tokens": ["<image>"]}
    classes = {"tokenizer_class": "GemmaTokenizer", "processor_class": "PaliGemmaProcessor", "model_max_length": 10**30}
    write_json(folder, "tokenizer_config.json", names | extra | classes)
    write_json(folder, "special_tokens_map.json", names | {"additional_special_tokens": ["<image>"]})
    image = tokenizer["added_tokens"][-1]["id"]
    write_json(folder, "added_tokens.json", {"<image>": image})
    return {"vocab_size": image + 1, "image_token_index": image, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def write_preprocessor(folder: Path, image_size: int, patch_size: int = 14) -> None:
    """Writes preprocessor_config.json as on the hub."""
    settings = {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": (image_size // patch_size) ** 2,
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "PaliGemmaProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": image_size, "width": image_size},
    }
    write_json(folder, "preprocessor_config.json", settings)


def write_processor(folder: Path, *, image_size: int = 28, num_words: int = 200) -> dict:
    """Writes all files that PaliGemmaProcessor.from_pretrained reads. Returns config.json, without the sizes of a model."""
    ids = write_tokenizer(folder, num_words)
    write_preprocessor(folder, image_size)
    config = {
        "model_type": "paligemma",
        "vision_config": {"model_type": "siglip_vision_model", "image_size": image_size, "patch_size": 14},
        "text_config": {"model_type": "gemma", "vocab_size": ids.pop("vocab_size")},
    } | ids
    write_json(folder, "config.json", config)
    return config
