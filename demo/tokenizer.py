"""Makes the demo's tokenizer, small but in the form of PaliGemma's, and the other small files of a checkpoint folder.

BPE over characters, `▁` for a space and none put before the text, the 256 bytes for characters that it has never seen; then, as
added tokens, <loc0000> to <loc1023> for coordinates, <seg000> to <seg127> for the codes of masks, and <image>.
pad 0, eos 1, bos 2, unk 3, mask 4. transformers reads the same files.
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

    What came when the words had their numbers, `segment` and `ocr`, is spelled with pieces that were there; capital letters are.
    """
    kinds = [kind for kind in shapes.QUESTIONS if kind not in ("segment", "absent", "several", "ocr", "letters", "blank")]
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(scenes):
        for prefix, suffix in shapes.ask(shapes.make_scene(rng), rng, kinds):
            texts += [prefix, "" if suffix.startswith("<loc") else suffix]
    return texts


def make_tokenizer() -> Tokenizer:
    """Merges are learned within words, so that every word of the demo becomes one token and no token spans two."""
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
    """All of a checkpoint folder but config.json and the weights."""
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
