"""Pictures and text in, what the model takes out; and token ids back into text.

One row is   <image> x (k pictures x N)  <bos> prompt \\n  | answer <eos>   with token type 0 before the bar and 1 behind it.
The pictures' places come first, whatever the prompt says; the newline is a token of its own; rows are padded on the left.
A user's text never becomes <image>, bos, eos or pad: in a prompt they are tokenised as the letters they are made of. All other
special tokens, also those that a fine-tune added, are tokens, as in transformers. No id stands in this file: all come from the
folder.

Sources: PaliGemma (arXiv:2407.07726, section 3.2), big_vision's configs/proj/paligemma/transfers/common.py (the newline),
transformers' PaliGemmaProcessor (equal pixels and ids). Checked in tests/test_processing_paligemma.py.
Letters: B rows, L tokens of the longest row, I pictures in the whole batch, R pixels of a side, N tokens of a picture.
"""

import codecs
import json
import logging
import math
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tokenizers import AddedToken, Tokenizer

from paligemma import files
from paligemma.errors import CheckpointError, ImageError, OutputError, PromptError, TokenizerError, one_line
from paligemma.pictures.images import load_image, resize_to_square
from paligemma.vocabulary import CODE_TOKENS, IGNORE_INDEX, IMAGE_TOKEN, LOCATION_OR_CODE, LOCATION_TOKENS

if TYPE_CHECKING:
    import torch

    from paligemma.checkpoints.weights import ModelFiles
    from paligemma.configuration import PaliGemmaConfig

log = logging.getLogger(__name__)

BYTE = re.compile("<0x([0-9A-F]{2})>")  # how byte fallback spells the bytes of a letter that has no token
SPACE = "▁"  # how Gemma's vocabulary spells a space
LARGEST_NUMBER, SMALLEST_STD = 1e6, 1e-6  # of what a picture's levels are multiplied by, lessened by and divided by
# Of the types that tokenizer.json may name those that Gemma's tokenizer is made of. Others hold regular expressions of whoever
# wrote the file, on which matching may take for ever, or panic in Rust.
PARTS = {
    "normalizer": {"Replace", "Sequence"},
    "pre_tokenizer": {"Split", "Sequence"},
    "post_processor": {"TemplateProcessing", "Sequence"},
}
ESCAPED = tuple(f"\\u00{digit}".encode() for digit in range(2, 8))  # ASCII, which no program escapes, so that a name is hidden
CONVERT = "Make one with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."


# The folder


def read_settings(folder: Path, name: str, error_class: type[CheckpointError | TokenizerError]) -> dict:
    """The object in a JSON file of the folder; {} where there is no such file. Raises: error_class, AccessError."""
    path = folder / name
    if files.stat_path(path, error_class) is None and not path.is_symlink():
        return {}
    return files.read_json(path, error_class)


NOT_GEMMA = "its BPE has a continuing_subword_prefix, or a part of it is of type Precompiled"


def would_panic(data: bytes, path: Path) -> bool:
    """Whether a tokenizer.json holds what the library answers with a panic, whose text Rust prints on stderr by itself.

    The file is large, and parsing it takes half as long as loading it: so it is parsed only if a search for the two names, or for
    letters that hide a name, finds something.
    """
    is_suspect = any(escape in data for escape in ESCAPED)
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


def types_in(part: object) -> Iterator[dict]:
    """The parts of a normalizer, a pre-tokenizer or a post-processor, by what their own JSON says."""
    if isinstance(part, dict):
        yield part
        for key in ("normalizers", "pretokenizers", "processors"):
            for inner in part.get(key) or ():
                yield from types_in(inner)


def check_parts(tokenizer: Tokenizer, path: Path) -> None:
    """Raises: TokenizerError unless the tokenizer is made of what Gemma's is made of."""
    model, wrong = tokenizer.model, []
    kind = type(model).__name__
    if kind != "BPE":
        wrong.append(kind)
    else:
        wrong += [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if getattr(model, name)]
        wrong += [] if model.byte_fallback else ["no byte_fallback"]
        wrong += ["a byte without a token"] if any(model.token_to_id(f"<0x{byte:02X}>") is None for byte in range(256)) else []
    for name, allowed in PARTS.items():
        part = getattr(tokenizer, name)
        for inner in types_in(None if part is None else files.parse_json(part.__getstate__())):
            if inner["type"] not in allowed:
                wrong.append(inner["type"])
            elif inner["type"] == "Replace" and (inner["pattern"], inner["content"]) != ({"String": " "}, SPACE):
                wrong.append("Replace of other text than spaces")
            elif inner["type"] == "Split" and "String" not in inner["pattern"]:
                wrong.append("Split by a regular expression")
    if wrong:
        raise TokenizerError(f"{path} has {', '.join(wrong)}, which Gemma's has not. Is this Gemma's tokenizer?", path=path)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer.json of a folder, so that it neither cuts nor pads. Raises: TokenizerError."""
    path = folder / "tokenizer.json"
    if files.stat_path(path, TokenizerError) is None and not path.is_symlink():
        if files.is_file(folder / "tokenizer.model", TokenizerError):
            raise TokenizerError(
                f"{folder} has a tokenizer.model but no tokenizer.json, which is what is read. {CONVERT}", path=path
            )
        raise TokenizerError(f"{folder} has neither tokenizer.json nor tokenizer.model. Download them again.", path=path)
    content = files.read_regular(path, files.MAX_TOKENIZER_BYTES, TokenizerError)
    if would_panic(content, path):
        raise TokenizerError(f"{path} is no tokenizer of Gemma's form: {NOT_GEMMA}. Download it again.", path=path)
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises nothing more precise
        if len(content) <= files.MAX_JSON_BYTES:  # parsing more takes gigabytes; the library's own words have to do then
            files.read_json(path, TokenizerError)  # says line and column if it is not even JSON
        raise TokenizerError(f"{path} is no tokenizer: {one_line(error)}. Download it again.", path=path) from error
    except BaseException as error:  # a panic in Rust, which is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{path} is no tokenizer: {one_line(error)}. Download it again.", path=path) from error
    check_parts(tokenizer, path)
    tokenizer.no_truncation()  # settings that a trainer left in the file
    tokenizer.no_padding()
    return tokenizer


def read_pixel_settings(folder: Path) -> tuple[dict, Path]:
    """What processor_config.json (of transformers 5) says or, without one, preprocessor_config.json; and which one it was.

    Raises: CheckpointError. Anything but "resize to a square with bicubic, rescale, normalise" is refused.
    """
    name = "processor_config.json"
    settings = read_settings(folder, name, CheckpointError).get("image_processor")
    if settings is None:
        name = "preprocessor_config.json"
        settings = read_settings(folder, name, CheckpointError)
    if not isinstance(settings, dict):
        raise CheckpointError(f"{folder / name}: image_processor is no object. Download it again.", path=folder / name)
    done = ("do_resize", "do_rescale", "do_normalize")
    unsupported = {key: settings[key] for key in done if not (settings.get(key) is None or settings[key] is True)}
    unsupported |= {
        key: value for key, value in settings.items() if key.startswith("do_") and key not in (*done, "do_convert_rgb") and value
    }
    resample = settings.get("resample")
    if resample is not None and not (type(resample) is int and resample == Image.Resampling.BICUBIC):
        unsupported["resample"] = settings["resample"]
    if unsupported:
        text = f"{folder / name} asks for {reprlib.repr(unsupported)}. Only a bicubic resize is implemented."
        raise CheckpointError(text, path=folder / name)
    return settings, folder / name


def check_pixel_settings(settings: dict, config: "PaliGemmaConfig", path: Path) -> None:
    """Raises CheckpointError where the picture's settings contradict the model's. What is not said contradicts nothing."""
    image_size, num_tokens = config.vision_config.image_size, config.num_image_tokens
    size, length = settings.get("size", image_size), settings.get("image_seq_length")
    sides = [size.get("height"), size.get("width")] if isinstance(size, dict) else [size, size]
    said = None
    if sides != [image_size, image_size]:
        said = f"asks for pictures of {reprlib.repr(size)} and the model for {image_size} pixels a side"
    elif length not in (None, num_tokens):
        said = f"counts {reprlib.repr(length)} tokens per picture and the model {num_tokens}"
    if said is not None:
        text = f"{path} {said}. The files belong to different checkpoints: download them again."
        raise CheckpointError(text, path=path)


def pixel_numbers(settings: dict, name: str, default: float, path: Path) -> np.ndarray:
    """float64[3] for red, green and blue from one number or (but for rescale_factor) three. Raises: CheckpointError."""
    value = settings.get(name, default)
    numbers = value if isinstance(value, list) and len(value) == 3 and name != "rescale_factor" else [value]
    if not all(type(number) in (int, float) and abs(number) <= LARGEST_NUMBER for number in numbers):
        raise CheckpointError(f"{path}: {name} is {reprlib.repr(value)}. A number is needed.", path=path)
    return np.broadcast_to(np.array(numbers, dtype=np.float64), 3)


def pixel_table(settings: dict, path: Path) -> np.ndarray:
    """float32[3, 256]: what each of the 256 levels of red, green and blue becomes.

    The operations and their order are those of transformers, so that the bits are; a table, so that they run 768 times.
    Raises: CheckpointError for anything but numbers, and for a division by nothing.
    """
    scale = pixel_numbers(settings, "rescale_factor", 1 / 255, path)
    mean, std = (pixel_numbers(settings, name, 0.5, path).astype(np.float32) for name in ("image_mean", "image_std"))
    if (std < SMALLEST_STD).any():
        raise CheckpointError(f"{path}: image_std is {std.tolist()}. Numbers above 0 are needed.", path=path)
    levels = (np.arange(256, dtype=np.float64) * scale[:, None]).astype(np.float32)  # [3, 256]
    return (levels - mean[:, None]) / std[:, None]


# The tokenizer


def add_missing_tokens(tokenizer: Tokenizer) -> None:
    """Adds what Gemma's own tokenizer lacks, in the order of big_vision: <loc>, <seg>, <image>. The ids are checked later."""
    missing = [token for token in LOCATION_TOKENS + CODE_TOKENS if tokenizer.token_to_id(token) is None]
    if missing:
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in missing])
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])  # marks it, if it exists


def configured_ids(config: dict, generation: dict) -> dict[str, set[int]]:
    """The bos and eos ids that config.json or generation_config.json name; none where no file does.

    transformers 4 writes them at the top of config.json, transformers 5 into text_config; the hub's files have them in
    generation_config.json as well. Several ids may end an answer.
    """
    ids = {}
    for name in ("bos_token_id", "eos_token_id"):
        values = [source.get(name) for source in (config, config["text_config"], generation)]
        flat = [number for value in values for number in (value if isinstance(value, list) else [value])]
        ids[name] = {number for number in flat if type(number) is int}
    return ids


def token_ids(tokenizer: Tokenizer, model: "ModelFiles", words: Path) -> dict[str, int]:
    """The ids of <image>, bos, eos and pad, and of the newline.

    Args:
        words: the folder of the tokenizer; that of the model, unless an adapter has its own.
    Raises: TokenizerError where the files name others. Padding is never looked at, so that any token may serve for it.
    """
    settings = read_settings(words, "tokenizer_config.json", TokenizerError)
    tokens = {"image_token_id": IMAGE_TOKEN}
    for kind in ("bos", "eos", "pad"):
        token = settings.get(f"{kind}_token") or f"<{kind}>"
        token = token.get("content") if isinstance(token, dict) else token
        if not (isinstance(token, str) and token.isprintable()):  # nor half a character, which cannot be looked up
            raise TokenizerError(f"{words / 'tokenizer_config.json'}: {kind}_token is no text. Download it again.", path=words)
        tokens[f"{kind}_token_id"] = token
    ids = {name: tokenizer.token_to_id(token) for name, token in tokens.items()}
    if ids["pad_token_id"] in (None, ids["image_token_id"]):  # padding that is an <image> would count as one
        ids["pad_token_id"] = ids["eos_token_id"]
    configured = configured_ids(model.raw, model.generation)
    configured["image_token_id"] = {model.config.image_token_index}
    for name, needed in configured.items():
        if ids[name] is None or needed and ids[name] not in needed:
            raise TokenizerError(
                f"{words}: the tokenizer gives {tokens[name]} the id {ids[name]}, and {name} is "
                f"{' or '.join(map(str, sorted(needed))) or 'needed'} in config.json or generation_config.json. "
                "They belong to different models: download them again.",
                path=words / "tokenizer.json",
            )
    newline = tokenizer.encode("\n", add_special_tokens=False).ids
    if len(newline) != 1:
        raise TokenizerError(f"{words}: the newline has {len(newline)} tokens, not one. Is this Gemma's tokenizer?", path=words)
    return ids | {"newline_token_id": newline[0]}


def unused_ids(tokenizer: Tokenizer, num_rows: int) -> list[int]:
    """The ids below `num_rows` that no token has."""
    size = tokenizer.get_vocab_size()
    behind = [number for number in range(size, num_rows) if tokenizer.id_to_token(number) is None]
    if len(behind) == num_rows - size:  # so the tokens have the ids before, all of them
        return behind
    return [number for number in range(num_rows) if tokenizer.id_to_token(number) is None]


def check_tokenizer(tokenizer: Tokenizer, num_rows: int, folder: Path) -> None:
    """Raises: TokenizerError unless it has the structure of PaliGemma's and fits the embedding of `num_rows`."""
    path = folder / "tokenizer.json"
    for kind, tokens in (("<loc>", LOCATION_TOKENS), ("<seg>", CODE_TOKENS)):
        ids = [tokenizer.token_to_id(token) for token in tokens]
        if ids != list(range(ids[0], ids[0] + len(ids))):
            raise TokenizerError(f"{path}: the {kind} tokens do not lie one after the other. Is it PaliGemma's?", path=path)
    if tokenizer.get_vocab_size() > num_rows:
        raise TokenizerError(
            f"{path} has {tokenizer.get_vocab_size()} tokens, but the model's embedding only {num_rows} rows. "
            "They belong to different models: download them again.",
            path=path,
        )
    if num_rows - len(unused_ids(tokenizer, num_rows)) < tokenizer.get_vocab_size():
        raise TokenizerError(
            f"{path} gives one id to two tokens, or an id above the {num_rows} rows of the model's embedding. "
            "They belong to different models: download them again.",
            path=path,
        )
    probe = " two  spaces \u00e9\U0001f600"
    stream = TextStream(tokenizer)
    text = "".join(stream.put(token) for token in tokenizer.encode(probe, add_special_tokens=False).ids) + stream.end()
    if text != probe:
        raise TokenizerError(f"{path} makes {text!r} of {probe!r}. Is this Gemma's tokenizer?", path=path)


class TextStream:
    """Text from token ids as they come, in whole characters: the pieces joined are the text of all ids.

    A letter without a token is spelled as the bytes of its UTF-8, a token each; they are held back until they make a letter.

    Args:
        tokenizer: of Gemma's form.
        silent: ids that leave no text.
    """

    def __init__(self, tokenizer: Tokenizer, silent: frozenset[int] = frozenset()):
        self.tokenizer = tokenizer
        self.silent = silent
        self.letters = codecs.getincrementaldecoder("utf-8")("replace")

    def put(self, token_id: int) -> str:
        """The text that became certain with this token. Ids that the tokenizer does not know leave none."""
        is_known = 0 <= token_id < 2**32 and token_id not in self.silent  # as far as the tokenizer counts
        token = self.tokenizer.id_to_token(token_id) if is_known else None
        if token is None:
            return ""
        byte = BYTE.fullmatch(token)
        if byte:
            return self.letters.decode(bytes.fromhex(byte[1]))
        return self.end() + token.replace(SPACE, " ")

    def end(self) -> str:
        """What was held back: U+FFFD if the answer broke off in the middle of a letter, else nothing."""
        return self.letters.decode(b"", final=True)


# Rows


def strip(prompt: str, notes: list[str]) -> str:
    """The prompt without white space at its ends: the model was trained without, and "\\n" is added behind it."""
    text = prompt.strip()
    if text != prompt:
        notes.append("white space at the ends of the prompt was dropped.")
    return text


def number_as_text(value: object) -> object:
    """A number as its digits, as a label in a data set may be one; anything else as it came."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return value
    try:
        return str(value) if math.isfinite(value) else value
    except OverflowError:  # a whole number above 10^308, which is no label
        return value


def as_texts(values: Any, what: str) -> list[str]:
    """One text or several (a list, an array, a generator) as a list. Raises: PromptError for anything else."""
    if hasattr(values, "tolist"):  # an array or a tensor
        values = values.tolist()
    is_one = isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable)
    texts = [values] if is_one else list(values)
    texts = [number_as_text(text) for text in texts] if what == "suffix" else texts
    wrong = [type(text).__name__ for text in texts if not isinstance(text, str)]
    if wrong:
        raise PromptError(f"a {what} is {wrong[0]}. Text, or a list of texts, is needed.")
    return [str(text) for text in texts]  # those of numpy too


def several(images: Any) -> list | None:
    """The pictures of a list, a tuple, a generator, an array of shape [I, ...] or of objects; None for one picture."""
    if isinstance(images, str | bytes | bytearray | memoryview) or hasattr(images, "read"):  # an open file is an iterator, too
        return None
    is_array = getattr(images, "ndim", 0) == 4 or getattr(getattr(images, "dtype", None), "kind", "") == "O"
    if isinstance(images, Sequence | Iterator) or is_array:
        return list(images)
    return None


def arrange(images: object, num_rows: int, is_one_row: bool) -> list[list]:
    """The pictures of each row. Raises: ImageError when there are not as many as rows."""
    listed = several(images)
    if images is None or listed == []:
        return [[] for _ in range(num_rows)]
    if listed is None:
        return [[images] for _ in range(num_rows)]
    rows = [several(row) for row in listed]
    if is_one_row and rows == [None] * len(rows):
        return [listed]
    if len(listed) != num_rows:
        raise ImageError(
            f"{len(listed)} pictures came for {num_rows} prompts. Give one picture for all, a list with one for each, or a "
            "list of lists."
        )
    return [[] if image is None else [image] if row is None else row for image, row in zip(listed, rows, strict=True)]


class PaliGemmaProcessor:
    """Makes the model's input from pictures and prompts, and text from its answer. Made by `from_pretrained`.

    Args:
        tokenizer: of Gemma's form, with <loc>, <seg> and <image>.
        ids: image_token_id, pad_token_id, bos_token_id, eos_token_id, newline_token_id.
        image_size: R, pixels of a side.
        num_image_tokens: N, tokens of a picture.
        pixel_table: float32[3, 256], the value of each level of red, green, blue.
        context: the most tokens that the model reads, which bounds the text that is tokenised at all.
        settings: by name the JSON files that came with the tokenizer, for save_pretrained.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        ids: dict[str, int],
        image_size: int,
        num_image_tokens: int,
        pixel_table: np.ndarray,
        *,
        context: int = 8192,
        settings: dict[str, dict] | None = None,
    ):
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.num_image_tokens = num_image_tokens
        self.image_token_id = ids["image_token_id"]
        self.pad_token_id = ids["pad_token_id"]
        self.bos_token_id = ids["bos_token_id"]
        self.eos_token_id = ids["eos_token_id"]
        self.newline_token_id = ids["newline_token_id"]
        self.vocab_size = tokenizer.get_vocab_size()  # the model may have more rows; nobody trained those
        self.pixel_table = pixel_table
        self.context = context
        self.settings = settings or {}
        frame = [tokenizer.id_to_token(ids[f"{kind}_token_id"]) for kind in ("pad", "bos", "eos")]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in frame])
        self.place_ids = {token: tokenizer.token_to_id(token) for token in LOCATION_TOKENS + CODE_TOKENS}
        # Ids, bin by bin; check_tokenizer saw to it that they follow one another.
        spans = ([self.place_ids[tokens[0]], self.place_ids[tokens[-1]] + 1] for tokens in (LOCATION_TOKENS, CODE_TOKENS))
        self.locations, self.segments = (range(*span) for span in spans)
        added = {number: token for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        special = {number: token for number, token in added.items() if token.content not in self.place_ids}
        self.control_ids = frozenset(special)  # they leave no text
        reserved = {self.image_token_id, self.pad_token_id, self.bos_token_id, self.eos_token_id}
        self.control_tokens = {number: token.content for number, token in special.items() if number in reserved}
        # Between the first letter of a control token and the rest.
        cuts = (f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in self.control_tokens.values() if len(t) > 1)
        self.cut = re.compile("|".join(cuts))

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | Path, *, revision: str | None = None, base_model: str | Path | None = None
    ) -> "PaliGemmaProcessor":
        """The processor of a model; of an adapter, that of its base model, but for the files that were saved with the adapter.

        Args: as of weights.load_model.
        Raises: TokenizerError or CheckpointError when files are missing, broken, or contradict each other; AccessError.
        """
        from paligemma.checkpoints.weights import ModelFiles  # imports torch, which importing this file does not

        return cls.from_files(ModelFiles(path_or_hub_id, revision, base_model))

    @classmethod
    def from_files(cls, model: "ModelFiles") -> "PaliGemmaProcessor":
        """The processor of a model whose files were found; see from_pretrained."""
        own, folder, config = model.folder, model.base, model.config
        of_pictures = ("processor_config.json", "preprocessor_config.json")
        of_words = ("tokenizer_config.json", "special_tokens_map.json")
        pictures = own if any(files.is_file(own / name) for name in of_pictures) else folder
        words = own if files.is_file(own / "tokenizer.json") else folder
        settings, path = read_pixel_settings(pictures)
        check_pixel_settings(settings, config, path)
        table = pixel_table(settings, path)
        kept = {name: read_settings(pictures, name, CheckpointError) for name in of_pictures}
        kept |= {name: read_settings(words, name, CheckpointError) for name in of_words}
        tokenizer = read_tokenizer(words)
        add_missing_tokens(tokenizer)
        ids = token_ids(tokenizer, model, words)
        check_tokenizer(tokenizer, config.text_config.vocab_size, words)
        size, context = config.vision_config.image_size, config.text_config.max_position_embeddings
        return cls(tokenizer, ids, size, config.num_image_tokens, table, context=context, settings=kept)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes all that from_pretrained and transformers read of a processor; weights.save_model adds the model.

        Raises: OutputError.
        """
        folder, done = files.expand(folder), dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
        classes = {"image_processor_type": "SiglipImageProcessor", "processor_class": "PaliGemmaProcessor"}
        size = {"size": {"height": self.image_size, "width": self.image_size}, "image_seq_length": self.num_image_tokens}
        numbers = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255, "resample": 3}  # if none is named
        both = self.settings.get("processor_config.json", {}).get("image_processor")  # as transformers 5 saves it
        given = both or self.settings.get("preprocessor_config.json")
        kinds = ("pad", "bos", "eos")
        names = {f"{kind}_token": self.tokenizer.id_to_token(getattr(self, f"{kind}_token_id")) for kind in kinds}
        names |= {"tokenizer_class": "GemmaTokenizer", "processor_class": "PaliGemmaProcessor"}
        contents = {name: content for name, content in self.settings.items() if content}
        contents["preprocessor_config.json"] = done | classes | size | numbers | (given or {})
        contents["tokenizer_config.json"] = names | self.settings.get("tokenizer_config.json", {})
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # a ValueError: a NUL in the name
            reason = getattr(error, "strerror", None) or error
            raise OutputError(f"{folder} cannot be made: {reason}. Name another folder.", path=folder) from error
        texts = {name: json.dumps(content, indent=2) + "\n" for name, content in contents.items()}
        for name, text in (texts | {"tokenizer.json": self.tokenizer.to_str(pretty=True)}).items():
            files.write_atomic(folder / name, text)

    def __call__(
        self,
        images: object,
        prompts: str | Sequence[str],
        suffixes: str | Sequence[str] | None = None,
        *,
        notes: list[str] | None = None,
    ) -> dict[str, "torch.Tensor"]:
        """The model's input for a batch.

        Args:
            images: a picture (for every prompt the same), a list (with one prompt: all for it; with a list of prompts: one
                for each), a list of lists (several for each), or None. A picture is whatever load_image reads.
            prompts: a text or a list, without <image>, without newline. White space at both ends is stripped.
            suffixes: the answers, for training; as many as prompts, taken as they are.
            notes: gets a sentence for everything that was changed; without it they are logged as warnings.
        Returns: input_ids, attention_mask, token_type_ids int64[B, L], padded on the left; pixel_values float32[I, 3, R, R]
            in the order of the rows, if there are pictures; labels int64[B, L] with suffixes, -100 outside of them.
        Raises: PromptError, ImageError, AccessError.
        """
        said = [] if notes is None else notes
        is_one_row, prompts = isinstance(prompts, str), as_texts(prompts, "prompt")
        rows = arrange(images, len(prompts), is_one_row)
        batch = self.tokens([len(row) for row in rows], prompts, suffixes, notes=said)
        pictures = [picture for row in rows for picture in row]
        if pictures:
            batch["pixel_values"] = self.pixels(pictures, notes=said)
        if notes is None:
            for note in said:
                log.warning("%s", note)
        return batch

    def pixels(self, images: Sequence[object], *, notes: list[str] | None = None) -> "torch.Tensor":
        """float32[I, 3, R, R] for a list of pictures, squeezed to squares with Pillow's bicubic filter."""
        import torch

        side = self.image_size
        out = np.empty((len(images), 3, side, side), dtype=np.float32)  # [I, 3, R, R]
        for i, image in enumerate(images):
            if i and image is images[i - 1]:  # one picture for many prompts
                out[i] = out[i - 1]
                continue
            small = load_image(image, notes=notes, then=lambda picture: resize_to_square(picture, side))
            levels = np.asarray(small).transpose(2, 0, 1)  # [3, R, R]
            for colour in range(3):
                self.pixel_table[colour].take(levels[colour], out=out[i, colour], mode="clip")
        return torch.from_numpy(out)

    def tokens(
        self,
        num_images: Sequence[int],
        prompts: str | Sequence[str],
        suffixes: str | Sequence[str] | None = None,
        *,
        notes: list[str] | None = None,
    ) -> dict[str, "torch.Tensor"]:
        """The batch without its pixels, as for pictures whose features are there already; `num_images` are those of each row."""
        import torch

        notes = [] if notes is None else notes
        prompts = as_texts(prompts, "prompt")
        answers = [None] * len(prompts) if suffixes is None else as_texts(suffixes, "suffix")
        if not prompts or len(answers) != len(prompts) or len(num_images) != len(prompts):
            raise PromptError(f"{len(prompts)} prompts came with {len(answers)} suffixes. As many are needed, and at least one.")
        rows = []
        for num, prompt, answer in zip(num_images, prompts, answers, strict=True):
            prefix = [self.image_token_id] * (num * self.num_image_tokens) + [self.bos_token_id]
            prefix += self.encode(strip(prompt, notes), notes) + [self.newline_token_id]
            rows.append((prefix, [] if answer is None else self.encode(answer, notes) + [self.eos_token_id]))
        longest = max(len(prefix) + len(answer) for prefix, answer in rows)
        batch = {
            "input_ids": np.full((len(rows), longest), self.pad_token_id, dtype=np.int64),  # [B, L]
            "attention_mask": np.zeros((len(rows), longest), dtype=np.int64),  # [B, L]
            "token_type_ids": np.zeros((len(rows), longest), dtype=np.int64),  # [B, L]
        }
        for i, (prefix, answer) in enumerate(rows):
            start = longest - len(prefix) - len(answer)
            batch["input_ids"][i, start:] = prefix + answer
            batch["attention_mask"][i, start:] = 1
            batch["token_type_ids"][i, longest - len(answer) :] = 1
        if suffixes is not None:
            batch["labels"] = np.where(batch["token_type_ids"] == 1, batch["input_ids"], IGNORE_INDEX)  # [B, L]
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    @cached_property
    def longest_token(self) -> int:
        """In characters."""
        return max(map(len, self.tokenizer.get_vocab()))

    def is_too_long(self, text: str) -> bool:
        """Whether the model could not read the text even if every token were the longest one."""
        return len(text) > self.context and len(text) > self.context * self.longest_token

    def encode(self, text: str, notes: list[str] | None = None) -> list[int]:
        """The ids of a text as it stands; <image>, bos, eos and pad in it as the letters they are.

        Raises: PromptError if the text is not valid UTF-8, or longer than any that the model can read.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError("the prompt is not valid UTF-8. Type it in a terminal that uses UTF-8.") from error
        if self.is_too_long(text):
            most = self.context * self.longest_token
            raise PromptError(f"the text has {len(text)} characters, but {most} are the most that can fit. Shorten it.")
        typed = [token for token in self.control_tokens.values() if token in text]
        if typed and notes is not None:
            notes.append(f"{', '.join(typed)} in the text is taken as letters, not as a token of the model.")
        return [number for number, _ in self.ids_and_ends(text)]

    def ids_and_ends(self, text: str) -> Iterator[tuple[int, int]]:
        """The ids of a text, and how many of its characters are behind each."""
        start = 0
        for token in LOCATION_OR_CODE.finditer(text):
            yield from self.encode_letters(text[start : token.start()], start)
            yield self.place_ids[token[0]], token.end()
            start = token.end()
        yield from self.encode_letters(text[start:], start)

    def encode_letters(self, text: str, start: int) -> list[tuple[int, int]]:
        """The ids of a text without <loc> and <seg>, and where each ends; never the id of a control token."""
        parts = self.cut.split(text) if any(token in text for token in self.control_tokens.values()) else [text]
        ids = []
        for part in parts:
            whole = self.tokenizer.encode(part, add_special_tokens=False)
            if self.control_tokens.keys().isdisjoint(whole.ids):
                ids += [(number, start + end) for number, (_, end) in zip(whole.ids, whole.offsets, strict=True)]
            else:  # the merges themselves can put a control token together; bytes are never merged
                spelled = (self.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in part.encode())
                ids += [(number, start + len(part)) for number in spelled]
            start += len(part)
        return ids

    def shorten(self, text: str, count: int) -> str:
        """The text, or as much of its beginning as has at most `count` tokens."""
        beginning = text[: count * self.longest_token] if len(text) > count else text  # more cannot fit
        ends = [end for _, end in self.ids_and_ends(beginning)]
        if len(ends) <= count and beginning == text:
            return text
        kept = min(count, len(ends))
        while kept > 0 and len(self.encode(text[: ends[kept - 1]])) > count:
            kept -= 1 + kept // 16  # what is before a cut may be spelled in more tokens than it was
        return text[: ends[kept - 1]] if kept > 0 else ""

    def unused_ids(self, num_rows: int) -> list[int]:
        """The ids below `num_rows` (vocab_size of text_config) that no token has, and that a model must not generate."""
        return unused_ids(self.tokenizer, num_rows)

    def decode(self, ids: "Iterable[int] | torch.Tensor | np.ndarray") -> str:
        """The text of token ids, <loc> and <seg> kept, control tokens dropped, nothing added."""
        stream = self.stream()
        numbers = ids.tolist() if hasattr(ids, "tolist") else ids  # of a tensor or an array, far quicker at once
        return "".join(stream.put(token) for token in numbers) + stream.end()

    def stream(self) -> TextStream:
        """For text that is shown while it is generated: put(id) returns what became certain, end() the rest."""
        return TextStream(self.tokenizer, self.control_ids)
