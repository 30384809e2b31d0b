"""Groups of flags that programs share (model, pictures, answers, sampling, drawings), and functions that use them.

Each group is a dataclass; the flags of a program inherit from it. --help shows the group under the first line of its docstring.
Checking a flag imports nothing slow. Checked in tests/test_inference.py.
"""

import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from paligemma import devices, files, machine
from paligemma.errors import ImageError, UsageError
from paligemma.layers import instruction_sets
from paligemma.pictures.names import is_address
from paligemma.programs.commandline import command, print_notes
from paligemma.tasks import MAX_ANSWER_TOKENS, Annotator, check_language, checkpoint_kind

if TYPE_CHECKING:
    from PIL import Image

    from paligemma.generation import Sampling
    from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
    from paligemma.objects.drawing import Style
    from paligemma.objects.mask_codec import MaskCodec
    from paligemma.opened import Checkpoint

STDIN_BYTES = 64 << 20  # the largest picture that is read from stdin
SMALL_MODEL = 32 << 20  # bytes: smaller models run faster on one thread
MAX_LINE_WIDTH = 100  # pixels


# Flags


def require(flags: object, *rules: tuple[str, object, str]) -> None:
    """Raises: UsageError for the first broken rule. A rule is (name of a flag, whether its value is valid, what is needed)."""
    for name, is_fine, needed in rules:
        if not is_fine:
            raise UsageError(f"--{name} is {getattr(flags, name)!r}, but {needed} is needed.")


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Which model, and where it runs.

    Args:
        model_path: a folder in hub layout, or a hub id such as google/paligemma2-3b-mix-224; by default the bundled model
        base_model: base model of the adapter in --model_path; by default the model that the adapter names
        revision: branch, tag or commit of a hub id
        device: auto, cpu, mps, cuda, cuda:N, or several cards such as cuda:0,cuda:1
        only_cpu: do not use a GPU
        graphs: how a CUDA card runs decoding steps, auto, off, record or compile; the variable PALIGEMMA_GRAPHS sets the default
        dtype: bf16, fp16 or fp32; by default on a CPU as stored, on a GPU one that it computes fast
        quantize: int8 or int4: smaller and faster, but a little less exact
        quantize_vision: quantize the vision tower too
        allow_nonfinite: load weights even if some are not finite (NaN or infinity)
    """

    model_path: str | None = None
    base_model: str | None = None
    revision: str | None = None
    device: str = "auto"
    only_cpu: bool = False
    graphs: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    quantize_vision: bool = False
    allow_nonfinite: bool = False

    def __post_init__(self):
        dtypes = ("bf16", "bfloat16", "fp16", "float16", "fp32", "float32")
        require(
            self,
            ("model_path", self.model_path != "", "a folder or a hub id"),
            ("base_model", self.base_model != "", "a folder or a hub id"),
            ("device", devices.NAMES.fullmatch(self.device), devices.NEEDED),
            ("graphs", self.graphs is None or self.graphs in devices.GRAPHS, "auto, off, record or compile"),
            ("dtype", self.dtype is None or self.dtype in dtypes, "bf16, fp16 or fp32"),
            ("quantize", self.quantize in (None, "int8", "int4"), "int8 or int4"),
        )
        devices.graphs_mode(self.graphs)  # the variables may be wrong
        instruction_sets.allowed()
        if self.only_cpu and self.device not in ("auto", "cpu"):
            raise UsageError(f"--only_cpu and --device {self.device} exclude each other. Drop one.")
        if self.quantize_vision and not self.quantize:
            raise UsageError("--quantize_vision needs --quantize int8 or int4. Add it.")

    def open(self) -> "Checkpoint":
        """The checkpoint that the flags name, without weights. Raises: the errors of opened.open_checkpoint, and DeviceError."""
        from paligemma.checkpoints import read_ahead

        machine.use_cores()
        ahead = read_ahead.begin(self.model_path, self.device_name, self.dtype, self.quantize, revision=self.revision)
        machine.check_torch()
        import torch

        from paligemma.opened import open_checkpoint

        devices.use_exact_float32()
        devices.find_device(self.device_name)  # before anything is downloaded
        checkpoint = open_checkpoint(self.model_path, revision=self.revision, base_model=self.base_model)
        checkpoint.ahead = ahead
        if sum(os.path.getsize(file) for file in checkpoint.base.glob("*.safetensors") if files.is_file(file)) < SMALL_MODEL:
            torch.set_num_threads(1)
        return checkpoint

    def load(self, checkpoint: "Checkpoint") -> "PaliGemmaForConditionalGeneration":
        """The model with its weights. Raises: CheckpointError, DeviceError."""
        return checkpoint.load(
            device=self.device_name,
            dtype=self.dtype,
            quantize=self.quantize,
            quantize_vision=self.quantize_vision,
            graphs=self.graphs,
            allow_nonfinite=self.allow_nonfinite,
        )

    @property
    def device_name(self) -> str:
        return "cpu" if self.only_cpu else self.device

    @property
    def kind(self) -> str:
        """What the checkpoint was trained for, see tasks.checkpoint_kind."""
        return checkpoint_kind(self.model_path or "")


@dataclass(frozen=True, kw_only=True)
class PictureFlags:
    """How pictures are read.

    Args:
        background: colour behind transparent pixels; "drop" ignores transparency
        frame: which frame of an animated picture to use
        ignore_exif: do not turn the picture upright
        max_pixels: refuse pictures with more pixels
        allow_truncated: accept a picture whose file ends early
        stretch: in pictures with more than 8 bits, make the darkest value black and the brightest white
    """

    background: str = "white"
    frame: int = 0
    ignore_exif: bool = False
    max_pixels: int = 50_000_000
    allow_truncated: bool = False
    stretch: bool = False

    def __post_init__(self):
        require(
            self,
            ("frame", self.frame >= 0, "a whole number from 0 up"),
            ("max_pixels", self.max_pixels >= 1, "a whole number from 1 up"),
        )

    @property
    def picture_options(self) -> dict[str, Any]:
        """The flags as arguments of load_image."""
        return {field.name: getattr(self, field.name) for field in fields(PictureFlags)}


@dataclass(frozen=True, kw_only=True)
class AnswerFlags:
    """What is asked, and how answers are read.

    Args:
        language: language of captions and answers: en, fr, zh
        grammar: with detect and segment, generate only valid objects with the given labels
        min_score: leave out objects with a lower score, 0 to 1
        denominator: divide locations by 1023, as the official code does, or by 1024
        mask_codec: vae-oid.npz, which decodes the masks of segment; by default the file in the model's folder
        max_tokens_to_generate: maximum number of tokens of an answer; the default depends on the task
    """

    language: str = "en"
    grammar: bool = False
    min_score: float | None = None
    denominator: int = 1023
    mask_codec: str | None = None
    max_tokens_to_generate: int | None = None

    def __post_init__(self):
        max_tokens, min_score = self.max_tokens_to_generate, self.min_score
        require(
            self,
            ("min_score", min_score is None or (math.isfinite(min_score) and 0 <= min_score <= 1), "a number from 0 to 1"),
            ("denominator", self.denominator in (1023, 1024), "1023 or 1024"),
            ("mask_codec", self.mask_codec != "", "a file"),
            ("max_tokens_to_generate", max_tokens is None or max_tokens >= 1, "a whole number from 1 up"),
        )
        check_language(self.language)

    def max_new_tokens(self, tasks: Iterable[str]) -> int:
        """The maximum number of tokens of an answer to any of these tasks."""
        return self.max_tokens_to_generate or max(MAX_ANSWER_TOKENS[task] for task in tasks)

    def load_codec(self, checkpoint: "Checkpoint") -> "MaskCodec | None":
        """The mask codec; None if neither --mask_codec nor the model's folder has a codec. Raises: CheckpointError."""
        from paligemma.objects.mask_codec import find_codec, load_codec

        file = find_codec(checkpoint.base, self.mask_codec)
        return None if file is None else load_codec(file)

    def annotator(
        self, checkpoint: "Checkpoint", model: "PaliGemmaForConditionalGeneration", codec: "MaskCodec | None", rows: int,
        tasks: Iterable[str], sampling: "Sampling | None" = None,
    ) -> Annotator:  # fmt: skip
        """The Annotator that answers requests for these tasks in batches of `rows`."""
        return Annotator(
            model,
            checkpoint.processor,
            codec=codec,
            rows=rows,
            max_new_tokens=self.max_new_tokens(tasks),
            uses_grammar=self.grammar,
            min_score=self.min_score,
            kind=checkpoint.kind,
            language=self.language,
            denominator=self.denominator,
            sampling=sampling,
        )


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How tokens are chosen.

    Args:
        do_sample: draw each token at random; by default decoding is greedy
        temperature: with --do_sample: lower is more predictable, higher more varied; 0 is greedy
        top_p: with --do_sample: draw from the fewest tokens whose probabilities sum to at least this
        top_k: with --do_sample: draw from this many of the most likely tokens
        seed: seed of the random numbers; the same seed gives the same answer
    """

    do_sample: bool = False
    temperature: float = 0.8
    top_p: float = 0.9
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self):
        require(
            self,
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "a number from 0 (greedy) up"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0 and up to 1"),
            ("top_k", self.top_k is None or self.top_k >= 1, "a whole number from 1 up"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "a whole number from 0 to 2^63 - 1"),
        )

    def sampling(self) -> "Sampling":
        """The flags as a Sampling. Draws a seed if a seed is needed and not given, so that --json can print it."""
        from paligemma.generation import Sampling

        if not self.do_sample:
            return Sampling(seed=self.seed)
        import secrets

        seed = secrets.randbelow(2**31) if self.seed is None else self.seed
        return Sampling(self.temperature, self.top_p, self.top_k, seed)

    def note_unused(self) -> None:
        """Prints a note about flags that have no effect without --do_sample."""
        names = ("temperature", "top_p", "top_k", "seed")
        changed = [f"--{name}" for name in names if getattr(self, name) != getattr(SamplingFlags, name)]
        if changed and not self.do_sample:
            print_notes(f"{', '.join(changed)} without --do_sample changes nothing.")


@dataclass(frozen=True, kw_only=True)
class DrawingFlags:
    """How drawings look.

    Args:
        line_width: width of boxes and outlines in pixels; the default depends on the size of the picture
        no_labels: leave out names and scores
        plain: draw only boxes and outlines; do not fill masks or mark uncertain edges
        font: a font file for labels (.ttf, .otf, .ttc), used before the fonts of the system
    """

    line_width: int | None = None
    no_labels: bool = False
    plain: bool = False
    font: str | None = None

    def __post_init__(self):
        require(
            self,
            ("line_width", self.line_width is None or 1 <= self.line_width <= MAX_LINE_WIDTH, f"1 to {MAX_LINE_WIDTH}"),
            ("font", self.font != "", "a font file"),
        )
        if self.font is not None:
            from paligemma.objects.lettering import lettering

            lettering(self.font)

    def check_drawing(self, flag: str) -> None:
        """Raises: UsageError if one of these flags is given without `flag`, which asks for drawings."""
        if not getattr(self, flag):
            for each in fields(DrawingFlags):
                if getattr(self, each.name) != each.default:
                    raise UsageError(f"--{each.name} changes only drawings, and no drawing is asked for. Add --{flag}.")

    @property
    def style(self) -> "Style":
        from paligemma.objects.drawing import Style

        return Style(self.line_width, not self.no_labels, self.plain, self.font)


# Pictures


def read_stdin() -> bytes:
    """The bytes of the picture on stdin. Raises: UsageError, ImageError."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(f"- means a picture on stdin, but stdin is a terminal or closed. Write: {command()} ... < cat.jpg")
    data = sys.stdin.buffer.read(STDIN_BYTES + 1)
    if len(data) > STDIN_BYTES:
        raise ImageError(f"the picture on stdin is larger than {STDIN_BYTES >> 20} MB. Make it smaller.", path="-")
    return data


def find_picture(name: str) -> str | bytes:
    """The path or address of a picture; for - the bytes from stdin.

    Raises: ImageError for a folder or if stdin is too large; UsageError if stdin is a terminal or closed.
    """
    file = name if is_address(name) else files.expand_text(name)
    if os.path.isdir(file):
        raise ImageError(f"{name} is a folder. Name a picture in it, or give the folder to {command('annotate')}.", path=name)
    return read_stdin() if name == "-" else file


def read_picture(name: str, flags: PictureFlags) -> "Image.Image":
    """The picture, upright and RGB. Prints a note for each conversion. Raises: ImageError, AccessError, UsageError."""
    from paligemma.pictures.folders import picture_errors
    from paligemma.pictures.images import load_image

    notes: list[str] = []
    with picture_errors(name):
        picture = load_image(find_picture(name), notes=notes, **flags.picture_options)
    print_notes(*notes)
    return picture
