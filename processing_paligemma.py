"""The processor: turns pictures and text into the tensors that the model takes, and token ids into text.

One row of a batch, and its token_type_ids:

    <image> ... <image>   <bos>   prompt    \\n    answer    <eos>
    0       ...       0   0       0 ... 0   0     1 ... 1   1

The P image tokens of each picture always come first, even if <image> is written elsewhere in the prompt. The newline is a
separate token. The answer is given only for training. Rows are padded on the left to the length of the longest row. The ids of
special tokens are not constants: checkpoints/processor_files.py reads them from the checkpoint. tokenization.py turns text into
ids and back. In names, a picture is called "image" and an answer "suffix", as in transformers.

Sources: PaliGemma (arXiv:2407.07726, section 3.2), big_vision's configs/proj/paligemma/transfers/common.py (the newline),
transformers' PaliGemmaProcessor (which gives the same pixels and ids). Checked in tests/test_processing_paligemma.py.
Shapes: B batch rows, I images in the batch, C channels, H W pixels, P patches (= image tokens) per image, L tokens of the
longest row.
"""

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from paligemma import files
from paligemma.checkpoints.processor_files import check_tokenizer, read_processor_files, write_processor_files
from paligemma.errors import ImageError, PromptError
from paligemma.pictures.images import is_loaded_picture, load_image, resize_to_square
from paligemma.tokenization import PromptTokenizer
from paligemma.vocabulary import IGNORE_INDEX, IMAGE_TOKEN

if TYPE_CHECKING:
    import torch

    from paligemma.checkpoints.weights import ModelFiles

log = logging.getLogger(__name__)

USAGE = "Write processor(pictures, prompts, suffixes), or processor(images=..., text=..., suffix=...)."
# Options of transformers' processor that may be passed, with their only allowed values. They describe what this processor always
# does, so they change nothing.
ACCEPTED_OPTIONS = {"return_tensors": ("pt",), "padding": (True, "longest")}


# A row


def build_row(
    ids: dict[str, int], num_image_tokens: int, prompt: list[int], answer: list[int] | None
) -> tuple[list[int], list[int]]:
    """The token ids of one row in two parts: images and prompt (token type 0), and the answer (token type 1)."""
    prefix = [ids["image_token_id"]] * num_image_tokens + [ids["bos_token_id"]] + prompt + [ids["newline_token_id"]]
    return prefix, [] if answer is None else answer + [ids["eos_token_id"]]


def pad_rows(rows: list[tuple[list[int], list[int]]], pad_token_id: int) -> dict[str, np.ndarray]:
    """A batch of rows from build_row: input_ids, attention_mask and token_type_ids, int64[B, L], padded on the left."""
    longest = max(len(prefix) + len(answer) for prefix, answer in rows)
    batch = {
        "input_ids": np.full((len(rows), longest), pad_token_id, dtype=np.int64),  # [B, L]
        "attention_mask": np.zeros((len(rows), longest), dtype=np.int64),  # [B, L]
        "token_type_ids": np.zeros((len(rows), longest), dtype=np.int64),  # [B, L]
    }
    for i, (prefix, answer) in enumerate(rows):
        start = longest - len(prefix) - len(answer)
        batch["input_ids"][i, start:] = prefix + answer
        batch["attention_mask"][i, start:] = 1
        batch["token_type_ids"][i, longest - len(answer) :] = 1
    return batch


# Pixels


def build_pixel_table(scale: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """float32[C, 256]: the model's input for each of the 256 levels of a channel, (level * scale - mean) / std.

    The operations and their order are the same as in transformers, so the results are bit-equal. The table saves time: the
    formula is computed for 3 * 256 levels instead of for every pixel.
    """
    levels = (np.arange(256, dtype=np.float64) * scale[:, None]).astype(np.float32)  # [C, 256]
    table: np.ndarray = (levels - mean[:, None]) / std[:, None]
    return table


def to_square(picture: object, side: int, notes: list[str] | None) -> Image.Image:
    """Converts any picture to 8-bit RGB and to side * side pixels (Pillow's bicubic filter). The aspect ratio is not kept.

    A picture that load_image has already returned is only resized, so that its EXIF orientation is not applied twice.
    """
    if is_loaded_picture(picture):
        return resize_to_square(picture, side)
    return load_image(picture, notes=notes, then=lambda loaded: resize_to_square(loaded, side))


# Text


def to_text(value: object) -> object:
    """Converts a number to text, because labels of a dataset can be numbers. Returns any other value unchanged."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return value
    try:
        return str(value) if math.isfinite(value) else value
    except OverflowError:  # an integer above 10^308, which cannot be a label
        return value


def as_texts(values: Any, what: str) -> list[str]:
    """A list of texts from one text, or from a list, array or generator of texts. Raises: PromptError for anything else."""
    if hasattr(values, "tolist"):  # an array or a tensor
        values = values.tolist()
    is_one = isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable)
    texts = [values] if is_one else list(values)
    texts = [to_text(text) for text in texts] if what == "suffix" else texts
    wrong = [type(text).__name__ for text in texts if not isinstance(text, str)]
    if wrong:
        raise PromptError(f"a {what} has the type {wrong[0]}. Text, or a list of texts, is needed.")
    return [str(text) for text in texts]  # numpy's strings become str


def strip_prompt(prompt: str, num_images: int, notes: list[str]) -> str:
    """The prompt without white space at its ends, because the model was trained on such prompts.

    transformers requires that the text begins with one <image> per picture. If the text begins with exactly this number,
    these <image> are removed here, because build_row adds the image tokens. Otherwise every <image> is ordinary text.
    """
    placeholders = IMAGE_TOKEN * num_images
    if prompt.startswith(placeholders) and not prompt.startswith(placeholders + IMAGE_TOKEN):
        prompt = prompt.removeprefix(placeholders)
    text = prompt.strip()
    if text != prompt:
        notes.append("white space at the ends of the prompt was removed.")
    return text


# Which picture belongs to which row


def as_list(images: Any) -> list[Any] | None:
    """Converts a list, tuple, generator, 4-dimensional array or array of objects to a list. Returns None for a single picture."""
    if isinstance(images, str | bytes | bytearray | memoryview) or hasattr(images, "read"):  # an open file is an iterator, too
        return None
    is_array = getattr(images, "ndim", 0) == 4 or getattr(getattr(images, "dtype", None), "kind", "") == "O"
    if isinstance(images, Sequence | Iterator) or is_array:
        return list(images)
    return None


def images_of_rows(images: object, num_rows: int, is_one_row: bool) -> list[list[Any]]:
    """The pictures of each row. Raises: ImageError if the number of pictures does not match the number of rows."""
    entries = as_list(images)  # None for a single picture; each entry is a picture, a list of pictures or None
    if images is None or entries == []:
        return [[] for _ in range(num_rows)]
    if entries is None:
        return [[images] for _ in range(num_rows)]
    lists = [as_list(entry) for entry in entries]
    if is_one_row and lists == [None] * len(lists):  # one prompt and a flat list: all pictures belong to this prompt
        return [entries]
    if len(entries) != num_rows:
        raise ImageError(
            f"{len(entries)} pictures were given for {num_rows} prompts. Give one picture for all prompts, a list with one "
            "picture per prompt, or a list with one list of pictures per prompt."
        )
    return [
        [] if entry is None else [entry] if pictures is None else pictures
        for entry, pictures in zip(entries, lists, strict=True)
    ]


def check_arguments(images: Any, text: Any, options: dict[str, object]) -> None:
    """Raises: TypeError for unknown options, and if text comes before pictures, as in early versions of transformers."""
    first, second = (value[0] if isinstance(value, list | tuple) and value else value for value in (images, text))
    pictures = (Image.Image, os.PathLike, bytes)
    if isinstance(first, str) and (isinstance(second, pictures) or hasattr(second, "read") or getattr(second, "ndim", 0) > 1):
        raise TypeError(f"the arguments are in the wrong order: the pictures come first, then the text. {USAGE}")
    unknown = [
        f"{name}={value!r:.40}"
        for name, value in options.items()
        if not (isinstance(value, bool | str) and value in ACCEPTED_OPTIONS.get(name, ()))
    ]
    if unknown:
        raise TypeError(f"the processor does not take {', '.join(unknown)}. {USAGE}")


class PaliGemmaProcessor(PromptTokenizer):
    """Makes the model's inputs from pictures and prompts: processor(picture, "caption en"). `from_pretrained` loads a processor.

    encode, decode, stream and the ids of special tokens are inherited from PromptTokenizer.

    Args:
        tokenizer, ids, context: see PromptTokenizer.
        image_size: H and W of the model's input.
        num_image_tokens: P, the number of image tokens per picture.
        normalization: rescale_factor float64[C], image_mean float32[C], image_std float32[C].
        settings: the JSON files of the checkpoint's processor, {file name: content}; save_pretrained writes them again.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        ids: dict[str, int],
        image_size: int,
        num_image_tokens: int,
        normalization: tuple[np.ndarray, np.ndarray, np.ndarray],
        *,
        context: int = 8192,
        settings: dict[str, dict[str, Any]] | None = None,
    ):
        super().__init__(tokenizer, ids, context)
        self.image_size = image_size
        self.num_image_tokens = num_image_tokens
        self.pixel_table = build_pixel_table(*normalization)
        self.settings = settings or {}

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | Path, *, revision: str | None = None, base_model: str | Path | None = None
    ) -> "PaliGemmaProcessor":
        """The processor of a model. For an adapter, processor files in the adapter's folder replace those of the base model.

        Args: as in weights.load_model.
        Raises: TokenizerError or CheckpointError if files are missing, broken, or contradict each other; AccessError.
        """
        from paligemma.checkpoints.weights import ModelFiles  # imported here, because it imports torch, which takes long

        return cls.from_files(ModelFiles(path_or_hub_id, revision, base_model))

    @classmethod
    def from_files(cls, model: "ModelFiles") -> "PaliGemmaProcessor":
        """Like from_pretrained, for a model whose files have already been found."""
        processor = cls(**read_processor_files(model))
        check_tokenizer(processor, model)
        return processor

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes every file of the processor that from_pretrained and transformers read; weights.save_model writes the model.

        Raises: OutputError.
        """
        kinds = ("pad", "bos", "eos")
        names: dict[str, Any] = {f"{kind}_token": self.tokenizer.id_to_token(self.ids[f"{kind}_token_id"]) for kind in kinds}
        folder = files.expand(folder)
        write_processor_files(folder, self.tokenizer, names, self.image_size, self.num_image_tokens, self.settings)

    def __call__(
        self,
        images: object = None,
        text: str | Sequence[str] | None = None,
        suffix: str | Sequence[str] | None = None,
        *,
        notes: list[str] | None = None,
        **options: object,
    ) -> dict[str, "torch.Tensor"]:
        """The model's inputs for a batch: processor(picture, "caption en").

        Args:
            images: the pictures. A picture is anything that load_image reads: a path, an address, bytes, an open file, a PIL
                image, an array or a tensor.
                - one picture: it is used for every prompt.
                - a list of pictures, and `text` is a str: all pictures belong to this prompt.
                - a list of pictures, and `text` is a list: picture i belongs to prompt i.
                - a list of lists: the pictures in list i belong to prompt i.
                - None: no pictures.
            text: a prompt or a list of prompts. White space at both ends is removed, and the newline is added. A prompt may
                begin with one <image> per picture, as transformers requires.
            suffix: the answers for training, one per prompt. They are not changed.
            notes: a list, to which a sentence is appended for each change to the input. None = these sentences are logged as
                warnings.
            options: return_tensors="pt", padding=True and padding="longest" are accepted and change nothing, because the
                processor always returns torch tensors and pads to the longest row.
        Returns: a dict of input_ids, attention_mask and token_type_ids, int64[B, L], padded on the left. With pictures, the
            dict also has pixel_values, float32[I, C, H, W], in the order of the rows. With answers, it also has labels,
            int64[B, L], which are IGNORE_INDEX outside of answers.
        Raises: PromptError, ImageError, AccessError; TypeError for other options, and if text is passed before pictures.
        """
        check_arguments(images, text, options)
        messages = [] if notes is None else notes
        prompts = as_texts(text, "prompt")
        rows = images_of_rows(images, len(prompts), is_one_row=isinstance(text, str))
        batch = self.tokens([len(row) for row in rows], prompts, suffix, notes=messages)
        pictures = [picture for row in rows for picture in row]
        if pictures:
            batch["pixel_values"] = self.pixels(pictures, notes=messages)
        if notes is None:
            for message in messages:
                log.warning("%s", message)
        return batch

    def pixels(self, images: Sequence[object], *, notes: list[str] | None = None) -> "torch.Tensor":
        """pixel_values, float32[I, C, H, W], of a list of pictures."""
        import torch

        side = self.image_size
        out = np.empty((len(images), 3, side, side), dtype=np.float32)  # [I, C, H, W]
        for i, image in enumerate(images):
            if i and image is images[i - 1]:  # one picture for many prompts
                out[i] = out[i - 1]
                continue
            levels = np.asarray(to_square(image, side, notes)).transpose(2, 0, 1)  # [C, H, W]
            for channel in range(3):
                self.pixel_table[channel].take(levels[channel], out=out[i, channel], mode="clip")
        return torch.from_numpy(out)

    def tokens(
        self,
        num_images: Sequence[int],
        text: str | Sequence[str],
        suffix: str | Sequence[str] | None = None,
        *,
        notes: list[str] | None = None,
    ) -> dict[str, "torch.Tensor"]:
        """The batch without pixel_values, for callers that have the image_features already.

        Args: num_images: the number of pictures of each row. The other arguments are as in __call__.
        """
        import torch

        notes = [] if notes is None else notes
        prompts = as_texts(text, "prompt")
        answers = [None] * len(prompts) if suffix is None else as_texts(suffix, "suffix")
        if not prompts or len(answers) != len(prompts):
            given = f"{len(answers)} suffixes were given for {len(prompts)} prompts"
            raise PromptError(f"{given}. Give at least one prompt, and one suffix for each prompt.")
        rows = []
        for num, prompt, answer in zip(num_images, prompts, answers, strict=True):
            prompt_ids = self.encode(strip_prompt(prompt, num, notes), notes)
            answer_ids = None if answer is None else self.encode(answer, notes)
            rows.append(build_row(self.ids, num * self.num_image_tokens, prompt_ids, answer_ids))
        batch = pad_rows(rows, self.pad_token_id)
        if suffix is not None:
            batch["labels"] = np.where(batch["token_type_ids"] == 1, batch["input_ids"], IGNORE_INDEX)  # [B, L]
        return {name: torch.from_numpy(array) for name, array in batch.items()}
