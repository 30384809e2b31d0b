"""Reads, checks and writes the files of a processor (tokenizer.json and the image settings).

The author of the files may be unknown, so each file is checked before it is used. A file is refused, with an error that names it,
if it would make a library panic, contains a regular expression (matching may never end), or contradicts the model.
Checked in tests/test_processing_paligemma.py.
"""

import json
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer

from paligemma import files
from paligemma.errors import CheckpointError, TokenizerError, one_line
from paligemma.tokenization import SPACE, PromptTokenizer
from paligemma.vocabulary import CODE_TOKENS, IMAGE_TOKEN, LOCATION_TOKENS

if TYPE_CHECKING:
    from paligemma.checkpoints.weights import ModelFiles
    from paligemma.configuration import PaliGemmaConfig

# transformers 5 writes the image settings into the first file, earlier versions into the second.
IMAGE_FILES = ("processor_config.json", "preprocessor_config.json")
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")
STEPS = ("do_resize", "do_rescale", "do_normalize")  # settings for the three steps, which are always done
MAX_NUMBER, MIN_STD = 1e6, 1e-6  # limits for rescale_factor, image_mean and image_std
# The types of components in Gemma's tokenizer. Other types are refused, because they can contain regular expressions, and
# matching an expression of an unknown author can take forever or panic in Rust.
ALLOWED_TYPES = {
    "normalizer": {"Replace", "Sequence"},
    "pre_tokenizer": {"Split", "Sequence"},
    "post_processor": {"TemplateProcessing", "Sequence"},
}
# In JSON, ASCII characters can be written as escapes. Usual programs do not do this. An escape may hide a name such as
# "Precompiled" from the search in would_panic.
ASCII_ESCAPES = re.compile(rb"\\u00[2-7]")
CONVERT = "Create tokenizer.json with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
USE_PALIGEMMA = "Use the tokenizer.json of a PaliGemma checkpoint."
DIFFERENT_MODELS = "The tokenizer and the weights belong to different models: download both again."


def read_processor_files(model: "ModelFiles") -> dict[str, Any]:
    """The arguments of PaliGemmaProcessor for a model. An adapter's files replace those of its base model.

    Raises: TokenizerError or CheckpointError if a file is missing or broken, or if files contradict each other; AccessError.
    """
    image_folder = model.folder if any(files.is_file(model.folder / name) for name in IMAGE_FILES) else model.base
    tokenizer_folder = find_tokenizer_folder(model)
    settings = {name: read_settings(image_folder / name, CheckpointError) for name in IMAGE_FILES}
    settings |= {name: read_settings(tokenizer_folder / name, TokenizerError) for name in TOKENIZER_FILES}
    image_settings, path = choose_image_settings(settings, image_folder)
    check_image_settings(image_settings, model.config, path)
    tokenizer = read_tokenizer(tokenizer_folder)
    add_missing_tokens(tokenizer)
    ids = find_ids(tokenizer, settings["tokenizer_config.json"], model, tokenizer_folder)
    return {
        "tokenizer": tokenizer,
        "ids": ids,
        "context": model.config.text_config.max_position_embeddings,
        "image_size": model.config.vision_config.image_size,
        "num_image_tokens": model.config.num_image_tokens,
        "normalization": read_normalization(image_settings, path),
        "settings": settings,
    }


def find_tokenizer_folder(model: "ModelFiles") -> Path:
    """The folder of the adapter if it contains a tokenizer.json, otherwise the folder of the base model."""
    return model.folder if files.is_file(model.folder / "tokenizer.json") else model.base


def read_settings(path: Path, error_class: type[CheckpointError | TokenizerError]) -> dict:
    """The object in a JSON file, or {} if there is no such file. Raises: error_class, AccessError."""
    is_missing = files.stat_path(path, error_class) is None and not path.is_symlink()
    return {} if is_missing else files.read_json(path, error_class)


# Image settings


def choose_image_settings(settings: dict[str, dict], folder: Path) -> tuple[dict, Path]:
    """(image settings, path of their file): from processor_config.json or, if they are not in it, from preprocessor_config.json.

    Raises: CheckpointError if the settings ask for anything but "resize to a square with the bicubic filter, rescale, normalise".
    """
    name, image_settings = IMAGE_FILES[0], settings[IMAGE_FILES[0]].get("image_processor")
    if image_settings is None:
        name, image_settings = IMAGE_FILES[1], settings[IMAGE_FILES[1]]
    path = folder / name
    if not isinstance(image_settings, dict):
        raise CheckpointError(f"{path}: image_processor is not a JSON object. Download it again.", path=path)
    unsupported = {}
    for key, value in image_settings.items():
        if key in STEPS and not (value is None or value is True):
            unsupported[key] = value
        elif key.startswith("do_") and key not in (*STEPS, "do_convert_rgb") and value:
            unsupported[key] = value
    resample = image_settings.get("resample")
    if resample is not None and not (type(resample) is int and resample == Image.Resampling.BICUBIC):
        unsupported["resample"] = resample
    if unsupported:
        needed = "Only a bicubic resize, rescaling and normalisation, all three turned on, are implemented."
        raise CheckpointError(f"{path} asks for {reprlib.repr(unsupported)}. {needed}", path=path)
    return image_settings, path


def check_image_settings(settings: dict, config: "PaliGemmaConfig", path: Path) -> None:
    """Raises: CheckpointError if the image settings contradict config.json. Missing settings are accepted."""
    image_size, num_tokens = config.vision_config.image_size, config.num_image_tokens
    size, length = settings.get("size", image_size), settings.get("image_seq_length")
    sides = [size.get("height"), size.get("width")] if isinstance(size, dict) else [size, size]
    mismatch = None
    if sides != [image_size, image_size]:
        mismatch = f"asks for pictures of {reprlib.repr(size)}, but the model needs {image_size} x {image_size} pixels"
    elif length not in (None, num_tokens):
        mismatch = f"has {reprlib.repr(length)} tokens per picture, but the model has {num_tokens}"
    if mismatch is not None:
        raise CheckpointError(f"{path} {mismatch}. The files belong to different checkpoints: download them again.", path=path)


def read_normalization(settings: dict, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """rescale_factor float64[C], image_mean float32[C] and image_std float32[C], one value for each of red, green and blue.

    Raises: CheckpointError for anything but numbers, and for an image_std that would divide by zero.
    """
    scale = three_numbers(settings, "rescale_factor", 1 / 255, path)
    mean, std = (three_numbers(settings, name, 0.5, path).astype(np.float32) for name in ("image_mean", "image_std"))
    if (std < MIN_STD).any():
        raise CheckpointError(f"{path}: image_std is {std.tolist()}. Numbers above 0 are needed.", path=path)
    return scale, mean, std


def three_numbers(settings: dict, name: str, default: float, path: Path) -> np.ndarray:
    """float64[C] from one number or from three; rescale_factor must be one number. Raises: CheckpointError."""
    value = settings.get(name, default)
    numbers = value if isinstance(value, list) and len(value) == 3 and name != "rescale_factor" else [value]
    if not all(type(number) in (int, float) and abs(number) <= MAX_NUMBER for number in numbers):
        raise CheckpointError(f"{path}: {name} is {reprlib.repr(value)}. A number is needed.", path=path)
    return np.broadcast_to(np.array(numbers, dtype=np.float64), 3)


# The tokenizer


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in tokenizer.json, with truncation and padding turned off. Raises: TokenizerError."""
    path = folder / "tokenizer.json"
    if files.stat_path(path, TokenizerError) is None and not path.is_symlink():
        if files.is_file(folder / "tokenizer.model", TokenizerError):
            text = f"{folder} has a tokenizer.model, but a tokenizer.json is needed. {CONVERT}"
        else:
            text = f"{folder} has neither tokenizer.json nor tokenizer.model. Download them again."
        raise TokenizerError(text, path=path)
    content = files.read_regular(path, files.MAX_TOKENIZER_BYTES, TokenizerError)
    if would_panic(content, path):
        reason = "its BPE model has a continuing_subword_prefix, or one of its components is of type Precompiled"
        raise TokenizerError(f"{path} is not a tokenizer like Gemma's: {reason}. Download it again.", path=path)
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except BaseException as error:  # tokenizers raises a plain Exception, or PanicException, which is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if len(content) <= files.MAX_JSON_BYTES:  # parsing a larger file in Python takes gigabytes of memory
            files.read_json(path, TokenizerError)  # raises an error with line and column if this is not JSON
        raise TokenizerError(f"{path} is not a tokenizer: {one_line(error)}. Download it again.", path=path) from error
    check_components(tokenizer, path)
    tokenizer.no_truncation()  # a training script can leave these settings in the file
    tokenizer.no_padding()
    return tokenizer


def would_panic(data: bytes, path: Path) -> bool:
    """Whether the tokenizers library would panic on this tokenizer.json.

    This is checked before loading, because a panic is printed to stderr even if Python catches it.

    Parsing the file in Python would make loading 50 % slower. Therefore the file is parsed only if a search in its bytes finds
    one of two suspicious names, or an escape that could hide such a name. "continuing_subword_prefix" is harmless if its value is
    null or empty, and "Precompiled" is harmless as a key, because it is then a token of the vocabulary.
    """
    is_suspect = ASCII_ESCAPES.search(data) is not None
    for name, harmless in ((b'"continuing_subword_prefix"', rb'\s*:\s*(null|"")'), (b'"Precompiled"', rb"\s*:")):
        start = data.find(name)
        while start >= 0 and not is_suspect:
            is_suspect = not re.compile(harmless).match(data, start + len(name))
            start = data.find(name, start + 1)
    if not is_suspect:
        return False
    content = files.read_json(path, TokenizerError, files.MAX_TOKENIZER_BYTES)
    model = content.pop("model", None)
    has_prefix = isinstance(model, dict) and model.get("continuing_subword_prefix") not in (None, "")
    content.pop("added_tokens", None)
    return has_prefix or '"Precompiled"' in json.dumps(content)


def nested_components(component: object) -> Iterator[dict]:
    """The JSON of a normalizer, pre-tokenizer or post-processor, and then of each component inside it."""
    if isinstance(component, dict):
        yield component
        for key in ("normalizers", "pretokenizers", "processors"):
            for inner in component.get(key) or ():
                yield from nested_components(inner)


def check_components(tokenizer: Tokenizer, path: Path) -> None:
    """Raises: TokenizerError unless the tokenizer consists of the same components as Gemma's."""
    model, wrong = tokenizer.model, []
    kind = type(model).__name__
    if kind != "BPE":
        wrong.append(kind)
    else:
        wrong += [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if getattr(model, name)]
        wrong += [] if model.byte_fallback else ["no byte_fallback"]
        wrong += ["a byte without a token"] if any(model.token_to_id(f"<0x{byte:02X}>") is None for byte in range(256)) else []
    for name, allowed in ALLOWED_TYPES.items():
        component = getattr(tokenizer, name)
        for inner in nested_components(None if component is None else files.parse_json(component.__getstate__())):
            if inner["type"] not in allowed:
                wrong.append(inner["type"])
            elif inner["type"] == "Replace" and (inner["pattern"], inner["content"]) != ({"String": " "}, SPACE):
                wrong.append("Replace for other text than spaces")
            elif inner["type"] == "Split" and "String" not in inner["pattern"]:
                wrong.append("Split by a regular expression")
    if wrong:
        raise TokenizerError(f"{path} differs from Gemma's tokenizer: {', '.join(wrong)}. {USE_PALIGEMMA}", path=path)


def add_missing_tokens(tokenizer: Tokenizer) -> None:
    """Adds the tokens that Gemma's own tokenizer lacks, in big_vision's order: <loc>, <seg>, <image>."""
    missing = [token for token in LOCATION_TOKENS + CODE_TOKENS if tokenizer.token_to_id(token) is None]
    if missing:
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in missing])
    # If the tokenizer already has <image>, the next line marks <image> as a special token.
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])


def configured_ids(config: dict, generation_config: dict) -> dict[str, set[int]]:
    """The ids of bos and eos in config.json and generation_config.json; an empty set if neither file has such an id.

    transformers 4 writes these ids at the top level of config.json, transformers 5 into text_config. The models on the hub also
    have them in generation_config.json. There can be several eos ids.
    """
    ids = {}
    for name in ("bos_token_id", "eos_token_id"):
        values = [source.get(name) for source in (config, config["text_config"], generation_config)]
        flat = [number for value in values for number in (value if isinstance(value, list) else [value])]
        ids[name] = {number for number in flat if type(number) is int}
    return ids


def find_ids(tokenizer: Tokenizer, tokenizer_config: dict, model: "ModelFiles", folder: Path) -> dict[str, int]:
    """The ids of <image>, bos, eos, pad and the newline, as a dict from names such as "image_token_id" to ids.

    The pad token can be any token, because padding is never attended to. `folder` is the folder of the tokenizer's files.
    Raises: TokenizerError if config.json or generation_config.json contains other ids.
    """
    tokens = {"image_token_id": IMAGE_TOKEN}
    for kind in ("bos", "eos", "pad"):
        token = tokenizer_config.get(f"{kind}_token") or f"<{kind}>"
        token = token.get("content") if isinstance(token, dict) else token
        if not (isinstance(token, str) and token.isprintable()):  # a lone surrogate, which cannot be looked up, is not printable
            raise TokenizerError(f"{folder / 'tokenizer_config.json'}: {kind}_token is not text. Download it again.", path=folder)
        tokens[f"{kind}_token_id"] = token
    ids = {name: tokenizer.token_to_id(token) for name, token in tokens.items()}
    if ids["pad_token_id"] in (None, ids["image_token_id"]):  # padding with <image> would be counted as image tokens
        ids["pad_token_id"] = ids["eos_token_id"]
    configured = configured_ids(model.raw, model.generation) | {"image_token_id": {model.config.image_token_index}}
    for name, needed in configured.items():
        if ids[name] is None or needed and ids[name] not in needed:
            problem = f"the tokenizer has no token {tokens[name]}"
            if ids[name] is not None:
                allowed = " or ".join(map(str, sorted(needed)))
                problem = f"the tokenizer gives {tokens[name]} the id {ids[name]}, but {name} is {allowed} in "
                problem += "config.json or generation_config.json"
            raise TokenizerError(f"{folder}: {problem}. {DIFFERENT_MODELS}", path=folder / "tokenizer.json")
    newline = tokenizer.encode("\n", add_special_tokens=False).ids
    if len(newline) != 1:
        raise TokenizerError(f"{folder}: the newline has {len(newline)} tokens, not one. {USE_PALIGEMMA}", path=folder)
    return ids | {"newline_token_id": newline[0]}


def check_tokenizer(tokenizer: PromptTokenizer, model: "ModelFiles") -> None:
    """Checks that <loc> and <seg> have consecutive ids, that all ids fit into the embedding, and that encoding and decoding keep
    a text with two spaces and with characters of several bytes. Raises: TokenizerError if a check fails."""
    path, num_rows = find_tokenizer_folder(model) / "tokenizer.json", model.config.text_config.vocab_size
    for kind, tokens in (("<loc>", LOCATION_TOKENS), ("<seg>", CODE_TOKENS)):
        ids = [tokenizer.loc_seg_ids[token] for token in tokens]
        if ids != list(range(ids[0], ids[0] + len(ids))):
            raise TokenizerError(f"{path}: the ids of the {kind} tokens are not consecutive. {USE_PALIGEMMA}", path=path)
    problem = None
    if tokenizer.vocab_size > num_rows:
        problem = f"has {tokenizer.vocab_size} tokens, but the model's embedding has only {num_rows} rows"
    elif num_rows - len(tokenizer.unused_ids(num_rows)) < tokenizer.vocab_size:  # fewer ids in use below num_rows than tokens
        problem = f"gives two tokens the same id, or has an id that is not below {num_rows}, the number of rows of the embedding"
    if problem is not None:
        raise TokenizerError(f"{path} {problem}. {DIFFERENT_MODELS}", path=path)
    text = " two  spaces \u00e9\U0001f600"
    decoded = tokenizer.decode(tokenizer.encode(text))
    if decoded != text:
        raise TokenizerError(f"{path} decodes {text!r} as {decoded!r}. {USE_PALIGEMMA}", path=path)


# Writing


def write_processor_files(
    folder: Path, tokenizer: Tokenizer, tokens: dict[str, str], image_size: int, num_image_tokens: int, settings: dict[str, dict]
) -> None:
    """Writes every processor file that PaliGemmaProcessor.from_pretrained and transformers read.

    Args:
        tokens: pad_token, bos_token and eos_token.
        settings: the JSON files of the checkpoint's processor, {file name: content}. Missing settings are added.
    Raises: OutputError.
    """
    defaults = dict.fromkeys(STEPS, True) | {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "PaliGemmaProcessor",
        "size": {"height": image_size, "width": image_size},
        "image_seq_length": num_image_tokens,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "rescale_factor": 1 / 255,
        "resample": int(Image.Resampling.BICUBIC),
    }
    processor_config, preprocessor_config = (settings.get(name, {}) for name in IMAGE_FILES)
    contents = {name: content for name, content in settings.items() if content}
    contents["preprocessor_config.json"] = defaults | (processor_config.get("image_processor") or preprocessor_config)
    names = tokens | {"tokenizer_class": "GemmaTokenizer", "processor_class": "PaliGemmaProcessor"}
    contents["tokenizer_config.json"] = names | settings.get("tokenizer_config.json", {})
    files.make_folder(folder)
    for name, content in contents.items():
        files.write_atomic(folder / name, json.dumps(content, indent=2) + "\n")
    files.write_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
