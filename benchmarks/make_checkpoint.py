"""Writes a random PaliGemma of full size in hub layout, for benchmarks: speed and memory do not depend on the values of weights.

    python -m benchmarks.make_checkpoint --out /tmp/paligemma-3b

The files, names, shapes, dtype and sharding are those of the published checkpoints, so that every loader does its usual work. The
tokenizer is random, too, but has the format and size of the real one, because parsing it is a large part of a start.

Every matrix is drawn from N(0, 0.02^2). The output matrix is the embedding, and the residual stream carries the vector of the
last token to the end, so the most likely next token is the last token again. The model therefore repeats the newline of the
prompt, with a margin that survives bfloat16 and int4, and two programs can be compared on the same tokens. The script takes a
minute and 6 GB of disk space; with --device cuda, which draws other numbers, it takes seconds.
"""

import argparse
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

from paligemma.vocabulary import CODE_TOKENS, IGNORE_INDEX, LOCATION_TOKENS, NUM_CODES, NUM_LOCATIONS

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
SHARD_BYTES = 4_950_000_000  # size of the first of the hub's two files
UNTRAINED = 64  # number of ids from <image> to the end of the vocabulary
VISION = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27}
TEXT = {
    ("paligemma", "3b"): {
        "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8,
        "num_hidden_layers": 18, "num_key_value_heads": 1,
    },
    ("paligemma2", "3b"): {
        "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "head_dim": 256,
        "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "sliding_window": 4096, "hidden_activation": "gelu_pytorch_tanh",
    },
    ("paligemma", "tiny"): {
        "model_type": "gemma", "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64,
        "num_hidden_layers": 2, "num_key_value_heads": 1,
    },
    ("paligemma2", "tiny"): {
        "model_type": "gemma2", "hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "query_pre_attn_scalar": 48, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "sliding_window": 4096, "hidden_activation": "gelu_pytorch_tanh",
    },
}  # fmt: skip
TINY_VISION = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}
PIECES = {"3b": 256_000, "tiny": 2_000}  # number of ordinary tokens of the tokenizer


def make_config(family: str, size: str, resolution: int, layers: int | None) -> dict:
    """config.json as on the hub. Args: layers: the largest number of layers of the decoder and of the tower; None = all."""
    text = TEXT[family, size] | {"num_image_tokens": (resolution // 14) ** 2, "torch_dtype": "bfloat16"}
    vision = (TINY_VISION if size == "tiny" else VISION) | {
        "model_type": "siglip_vision_model",
        "image_size": resolution,
        "patch_size": 14,
        "num_image_tokens": text["num_image_tokens"],
        "projection_dim": text["hidden_size"],
        "vision_use_head": False,
    }
    for part in (text, vision):
        part["num_hidden_layers"] = min(part["num_hidden_layers"], layers or part["num_hidden_layers"])
    image = PIECES[size] + NUM_LOCATIONS + NUM_CODES
    text["vocab_size"] = image + UNTRAINED
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "ignore_index": IGNORE_INDEX, "image_token_index": image,
        "hidden_size": 2048, "projection_dim": text["hidden_size"], "vocab_size": text["vocab_size"],
        "torch_dtype": "bfloat16",
        "text_config": text,
        "vision_config": vision,
    }  # fmt: skip


def make_pieces(count: int, seed: int) -> tuple[dict[str, int], list[list[str]]]:
    """A vocabulary of `count` tokens, and its merges. The order is Gemma's: control tokens, newlines, bytes, characters, words.

    As in the real files, a word has a merge for every pair of known tokens that forms it.
    """
    draw = random.Random(seed)
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]", *(f"<unused{i}>" for i in range(99))]
    pieces += ["<start_of_turn>", "<end_of_turn>", "\n"]  # the newline is 108
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    letters = "etaoinshrdlcumwfgypbvkjxqz"
    pieces += ["▁", *letters, *letters.upper(), *"0123456789.,:;!?-'\"()/&%+=*#@_<>[]{}|~^$\\`"]
    words = ["▁", *letters]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    while len(vocabulary) < count:
        # The cube favours small indices: earlier words are merged more often, as in a real vocabulary.
        left, right = words[int(len(words) * draw.random() ** 3)], words[int(len(words) * draw.random() ** 3)]
        word = left + right
        if word in vocabulary or "▁" in right or len(word) > 14:
            continue
        vocabulary[word] = len(vocabulary)
        words.append(word)
        splits = ((word[:i], word[i:]) for i in range(1, len(word)))
        merges += [[a, b] for a, b in splits if a in vocabulary and b in vocabulary]
    return vocabulary, merges


def write_tokenizer(folder: Path, count: int, seed: int) -> None:
    """Writes the tokenizer's files: BPE with byte fallback and ▁ for a space; <loc>, <seg> and <image> are added tokens."""
    vocabulary, merges = make_pieces(count, seed)
    control = [(i, token, True) for token, i in vocabulary.items() if i < 4]
    tail = LOCATION_TOKENS + CODE_TOKENS
    added = control + [(count + i, token, False) for i, token in enumerate(tail)] + [(count + len(tail), "<image>", True)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    unspace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, "special": special} | flags for i, token, special in added],
        "normalizer": space,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [unspace, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": True, "byte_fallback": True, "vocab": vocabulary, "merges": merges,
        },
    }  # fmt: skip
    write_json(folder / "tokenizer.json", tokenizer, indent=None)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    classes = {"tokenizer_class": "GemmaTokenizer", "processor_class": "PaliGemmaProcessor"}
    more = {"additional_special_tokens": ["<image>"], "clean_up_tokenization_spaces": False, "model_max_length": 10**30}
    write_json(folder / "tokenizer_config.json", names | classes | more)
    write_json(folder / "special_tokens_map.json", names | {"additional_special_tokens": ["<image>"]})


def write_json(path: Path, value: dict, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def draw(name: str, shape: "torch.Size", generator: "torch.Generator") -> "torch.Tensor":
    """One parameter in bfloat16: matrices from N(0, 0.02^2), norms as the identity (Gemma's norms store weight - 1)."""
    import torch

    if len(shape) == 1:
        is_scale = name.endswith(".weight") and "vision_tower" in name
        return torch.full(shape, float(is_scale), dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16, device=generator.device).normal_(0, 0.02, generator=generator).cpu()


def write_weights(folder: Path, config: dict, seed: int, device: str) -> int:
    """Writes the weights shard by shard, so that at most one shard is in memory. Returns the number of parameters.

    Args:
        device: where the random numbers are drawn.
    """
    import torch
    from safetensors.torch import save_file

    from paligemma.configuration import PaliGemmaConfig
    from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration

    with torch.device("meta"):
        model = PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_hf(config))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    shards, room = [], 0
    for name, shape in shapes.items():
        if 2 * shape.numel() > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= 2 * shape.numel()
    generator = torch.Generator(device).manual_seed(seed)
    files = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file({name: draw(name, shapes[name], generator) for name in names}, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    count = sum(shape.numel() for shape in shapes.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 2 * count}, "weight_map": files})
    return count


def write_checkpoint(folder: Path, *, family: str = "paligemma", size: str = "3b", resolution: int = 224,
                     layers: int | None = None, seed: int = 0, device: str = "cpu") -> int:  # fmt: skip
    """Writes the whole folder. Returns the number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(family, size, resolution, layers)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0})
    preprocessor = {
        "image_processor_type": "SiglipImageProcessor", "processor_class": "PaliGemmaProcessor", "do_convert_rgb": None,
        "do_resize": True, "resample": 3, "size": {"height": resolution, "width": resolution}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "image_seq_length": (resolution // 14) ** 2,
    }  # fmt: skip
    write_json(folder / "preprocessor_config.json", preprocessor)
    write_tokenizer(folder, PIECES[size], seed)
    return write_weights(folder, config, seed, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--family", choices=("paligemma", "paligemma2"), default="paligemma")
    parser.add_argument("--size", choices=("3b", "tiny"), default="3b")
    parser.add_argument("--resolution", type=int, choices=(28, 224, 448, 896), default=224)
    parser.add_argument("--layers", type=int, help="number of layers of decoder and tower, for a smaller model of the same width")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where the random numbers are drawn: cpu or cuda")
    options = vars(parser.parse_args())
    out = options.pop("out")
    print(f"{out}: {write_checkpoint(out, **options):,} parameters")


if __name__ == "__main__":
    main()
