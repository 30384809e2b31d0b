"""Makes the demo's tokenizer, a small one in PaliGemma's format, and the other small files of a checkpoint folder.

The tokenizer is a BPE over characters. `▁` represents a space, and no space is added before the text. Characters that are not in
its vocabulary are encoded as bytes (256 tokens). The added tokens are <loc0000> to <loc1023> for coordinates, <seg000> to
<seg127> for mask codes, and <image>. The ids of the special tokens are pad 0, eos 1, bos 2, unk 3 and mask 4. transformers reads
the same files.
"""

import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from demo import shapes
from paligemma.files import MAX_TOKENIZER_BYTES, parse_json
from paligemma.vocabulary import CODE_TOKENS, LOCATION_TOKENS

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]


def corpus(scenes: int = 2000) -> list[str]:
    """Questions and answers about random scenes, without their coordinates.

    `segment` and the kinds of `ocr` questions were added after the vocabulary was fixed, so their prompts and capital letters
    are spelled with the tokens that it already had.
    """
    kinds = [kind for kind in shapes.QUESTIONS if kind not in ("segment", "absent", "several", "ocr", "letters", "blank")]
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(scenes):
        for prefix, suffix in shapes.ask(shapes.make_scene(rng), rng, kinds):
            texts += [prefix, "" if suffix.startswith("<loc") else suffix]
    return texts


def make_tokenizer() -> Tokenizer:
    """The tokenizer. Merges are learned within words: every word of the corpus is one token, and no token spans two words."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁?[a-z]+"), "isolated")
    ascii_letters = [chr(i) for i in range(33, 127)] + ["\n", "▁"]
    trainer = trainers.BpeTrainer(min_frequency=20, initial_alphabet=ascii_letters, show_progress=False)
    trained.train_from_iterator(corpus(), trainer)
    learned = parse_json(trained.to_str(), MAX_TOKENIZER_BYTES)["model"]
    pieces = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *sorted(learned["vocab"], key=learned["vocab"].get)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[tuple(pair) for pair in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in LOCATION_TOKENS + CODE_TOKENS])
    tokenizer.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    return tokenizer


def write_files(folder: Path, tokenizer: Tokenizer, image_size: int, num_image_tokens: int) -> None:
    """Writes all files of a checkpoint folder except config.json and the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>", "mask_token": "<mask>"}
    files = {
        "tokenizer_config.json": names
        | {
            "add_bos_token": False,
            "add_eos_token": False,
            "additional_special_tokens": ["<image>"],
            "extra_special_tokens": {"image_token": "<image>"},
            "clean_up_tokenization_spaces": False,
            "model_max_length": 512,
            "padding_side": "left",
            "processor_class": "PaliGemmaProcessor",
            "tokenizer_class": "GemmaTokenizer",
        },
        "special_tokens_map.json": names | {"additional_special_tokens": ["<image>"]},
        "preprocessor_config.json": {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "SiglipImageProcessor",
            "image_seq_length": num_image_tokens,
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "PaliGemmaProcessor",
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"height": image_size, "width": image_size},
        },
        "generation_config.json": {"_from_model_config": True, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
