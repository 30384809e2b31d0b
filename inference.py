"""Ask a PaliGemma about a picture: `python inference.py --image_file_path cat.jpg --prompt "caption en"`.

Without flags it answers the bundled question about the bundled picture with the bundled checkpoint. The answer goes to
stdout, everything else to stderr; exit codes are in errors.py. Reading order: Flags (what can be asked for), Session (a model
and its pictures), program (what happens, in order). torch is imported only after flags and pictures turned out to be fine.
Checked in tests/test_inference.py.
"""

import sys

if sys.version_info < (3, 10):
    sys.exit("error: Python %d.%d is too old. This program needs 3.10 or newer." % sys.version_info[:2])

import json
import math
import os
import re
import secrets
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import commandline
import machine
from commandline import note, write
from errors import CheckpointError, ImageError, PaliGemmaError, PromptError, UsageError

if TYPE_CHECKING:
    from PIL import Image

    from modeling_paligemma import PaliGemmaForConditionalGeneration

BUNDLED_MODEL, BUNDLED_PICTURE, BUNDLED_QUESTION = "demo/checkpoint", "examples/shapes.png", "caption en"
STDIN_BYTES = 64 << 20  # a picture piped in is read up to here
SMALL_MODEL = 32 << 20  # bytes that a core's cache nearly holds: handing parts to other cores takes longer than doing them
ANSWER_ROOM = 64  # tokens that a prompt cut by --truncate_prompt leaves for the answer
REPEATS = 3  # an object said that many times in a row is not an answer any more


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Asks a PaliGemma model about a picture and prints its answer.

    Without --prompt it captions, or asks you again and again if this is a terminal. Without --image_file_path it looks at
    the bundled picture, without --model_path it takes the bundled model, which knows coloured shapes and nothing else.

    Args:
        model_path: a folder in hub layout, or a hub id such as google/paligemma2-3b-mix-224
        prompt: what to ask: "caption en", "answer en what is this?", "detect cat", "segment cat", "ocr"
        image_file_path: a file, an http(s) address, or - for stdin; several with commas between them
        max_tokens_to_generate: the longest answer
        temperature: with --do_sample: below 1 careful, above 1 daring, 0 none
        top_p: with --do_sample: only the likeliest tokens that together reach this probability
        do_sample: draw each token at random instead of taking the likeliest
        only_cpu: do not use a GPU
        device: auto, cpu, cuda, cuda:N or mps
        top_k: with --do_sample: only that many of the likeliest tokens
        seed: of the random draws; the same seed gives the same answer
        dtype: bf16, fp16 or fp32; as stored if not given
        json: print one JSON object instead of the text
        stream: print words as they come; on a terminal that is so anyway, unless --stream=false
        quantize: int8 or int4: smaller and faster, a little less exact
        quantize_vision: quantize the vision tower too
        revision: branch, tag or commit of a hub id
        background: colour behind transparent pixels; drop ignores transparency
        frame: which frame of an animated picture
        ignore_exif: do not turn the picture upright
        max_pixels: refuse larger pictures
        allow_truncated: accept a picture whose file ends early
        truncate_prompt: cut a prompt that is too long instead of refusing it
        allow_nonfinite: load weights even if some are not numbers
        verbose: say how long everything took, and how fast this machine could be at best
        debug: print the traceback of an error
    """

    model_path: str | None = None
    prompt: str | None = None
    image_file_path: str | None = None
    max_tokens_to_generate: int = 100
    temperature: float = 0.8
    top_p: float = 0.9
    do_sample: bool = False
    only_cpu: bool = False
    device: str = "auto"
    top_k: int | None = None
    seed: int | None = None
    dtype: str | None = None
    json: bool = False
    stream: bool | None = None
    quantize: str | None = None
    quantize_vision: bool = False
    revision: str | None = None
    background: str = "white"
    frame: int = 0
    ignore_exif: bool = False
    max_pixels: int = 50_000_000
    allow_truncated: bool = False
    truncate_prompt: bool = False
    allow_nonfinite: bool = False
    verbose: bool = False
    debug: bool = False

    def __post_init__(self):
        dtypes = ("bf16", "bfloat16", "fp16", "float16", "fp32", "float32")
        for name, is_fine, needed in (
            ("max_tokens_to_generate", self.max_tokens_to_generate >= 1, "a whole number from 1 up"),
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "a number from 0 (greedy) up"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0 and up to 1"),
            ("top_k", self.top_k is None or self.top_k >= 1, "a whole number from 1 up"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "a whole number from 0 to 2^63 - 1"),
            ("device", re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?|mps", self.device), "auto, cpu, cuda, cuda:N or mps"),
            ("dtype", self.dtype is None or self.dtype in dtypes, "bf16, fp16 or fp32"),
            ("quantize", self.quantize in (None, "int8", "int4"), "int8 or int4"),
            ("frame", self.frame >= 0, "a whole number from 0 up"),
            ("max_pixels", self.max_pixels >= 1, "a whole number from 1 up"),
            ("image_file_path", self.image_file_path != "", "a file, an address or -"),
            ("model_path", self.model_path != "", "a folder or a hub id"),
        ):
            if not is_fine:
                raise UsageError(f"--{name} is {getattr(self, name)!r}, but {needed} is needed.")
        for name, is_clash, advice in (
            ("--only_cpu", self.only_cpu and self.device not in ("auto", "cpu"), f"forbids --device {self.device}. Drop one."),
            ("--quantize_vision", self.quantize_vision and not self.quantize, "needs --quantize int8 or int4. Add it."),
            ("--json", self.json and self.stream, "prints one object at the end. Drop --stream."),
        ):
            if is_clash:
                raise UsageError(f"{name} {advice}")


# What was asked for


def bundled(name: str) -> str:
    """A file that comes with this program: beside it in a clone; after `pip install` under the share/ next to lib/."""
    here = Path(__file__).resolve().parent
    for folder in (here, *(above / "share" / "paligemma" for above in here.parents[:3])):
        if (folder / name).exists():
            return str(folder / name)
    raise CheckpointError(f"{name} did not come with this installation. Give --model_path, --image_file_path and --prompt.")


def as_utf8(prompt: str) -> str:
    """The prompt as the bytes that were typed, whatever the locale took them for. Raises: PromptError if not UTF-8."""
    try:
        return os.fsencode(prompt).decode()
    except UnicodeError as error:
        raise PromptError("the prompt is not valid UTF-8. Type it in a terminal that uses UTF-8.") from error


def split_pictures(text: str) -> list[str]:
    """The names between the commas; commas of a file that exists, of an address or of a data: URI stay in their name."""
    parts, names = text.split(","), []
    while parts:
        longest = range(len(parts), 0, -1)
        if parts[0].startswith("data:"):
            taken = min(2, len(parts))
        elif parts[0].startswith(("http://", "https://")):
            following = (i for i in range(1, len(parts)) if ":" in parts[i] or parts[i] == "-" or os.path.exists(parts[i]))
            taken = next(following, len(parts))
        else:
            taken = next((i for i in longest if os.path.exists(os.path.expanduser(",".join(parts[:i])))), 1)
        names.append(",".join(parts[:taken]))
        parts = parts[taken:]
    if "" in names:
        raise UsageError(f"--image_file_path is {text!r}, with no name beside a comma. Take the comma out.")
    if names.count("-") > 1:
        raise UsageError(f"--image_file_path is {text!r}, but stdin can be read only once. Give - once.")
    return names


def read_stdin() -> bytes:
    """The picture that is piped in."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("--image_file_path - reads a picture from stdin, which is not piped. Write: inference.py ... < cat.jpg")
    data = sys.stdin.buffer.read(STDIN_BYTES + 1)
    if len(data) > STDIN_BYTES:
        raise ImageError(f"the picture on stdin is larger than {STDIN_BYTES >> 20} MB. Make it smaller.", path="-")
    return data


def read_pictures(flags: Flags) -> list["Image.Image"]:
    """The pictures of --image_file_path, or the bundled one, upright and RGB."""
    from images import load_image

    pictures = []
    for name in split_pictures(flags.image_file_path or bundled(BUNDLED_PICTURE)):
        notes: list[str] = []
        is_file = not name.startswith(("data:", "http://", "https://"))
        source = read_stdin() if name == "-" else os.path.expanduser(name) if is_file else name
        pictures.append(
            load_image(
                source,
                background=flags.background,
                ignore_exif=flags.ignore_exif,
                max_pixels=flags.max_pixels,
                frame=flags.frame,
                allow_truncated=flags.allow_truncated,
                notes=notes,
            )
        )
        for text in notes:
            note(f"note: {text}")
    return pictures


def is_terminal(stream: object) -> bool:
    return stream is not None and stream.isatty()


def choose_prompt(flags: Flags) -> str | None:
    """What to ask; None = whatever somebody types."""
    if flags.prompt is not None:
        return as_utf8(flags.prompt)
    if flags.image_file_path is None:
        return BUNDLED_QUESTION
    if is_terminal(sys.stdin) and "-" not in split_pictures(flags.image_file_path):
        return None
    note('note: no --prompt, so this asks for "caption en".')
    return "caption en"


def typed_prompts() -> Iterator[str]:
    """What somebody types, line by line, until Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401  (importing it gives input() its line editing and history)
    note("Ask about the picture; Ctrl-D ends.")
    while True:
        is_echoed = is_terminal(sys.stdout)  # else the question mark would land among the answers
        if not is_echoed:
            sys.stderr.write("> ")
            sys.stderr.flush()
        try:
            with commandline.interruptible(), commandline.repeated_signals():
                text = input("> " if is_echoed else "")
        except EOFError:
            sys.stderr.write("\n")
            return
        except commandline.Interrupted:
            sys.stderr.write("\n")
            raise
        if text.strip():
            yield text


# Answering


@dataclass
class Answer:
    """What --json prints.

    The eos counts as a token; logprobs are the model's own, before temperature; seconds are those of answering, not of loading.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"  # stop, length, repetition (we cut a loop of equal objects), interrupted
    prompt_tokens: int = 0
    seconds: float = 0.0


def is_looping(text: str) -> bool:
    """Whether the last objects of a listing, "<loc..>x4 label ; ...", are all the same."""
    objects = [part.strip() for part in text.split(";")[:-1]][-REPEATS:]
    return len(objects) == REPEATS and len(set(objects)) == 1 and "<loc" in objects[0]


class Session:
    """A model, and pictures to ask it about.

    Args:
        flags: which model, where and how.
        pictures: what every question is about.
    """

    def __init__(self, flags: Flags, pictures: list["Image.Image"]):
        machine.use_cores()
        machine.check_torch()
        import torch

        import weights
        from processing_paligemma import PaliGemmaProcessor

        self.flags = flags
        self.pictures = pictures
        self.name = flags.model_path or bundled(BUNDLED_MODEL)
        self.device = weights.find_device("cpu" if flags.only_cpu else flags.device)
        self.folder = weights.resolve(os.path.expanduser(self.name), flags.revision)
        self.config = weights.read_config(self.folder)
        self.processor = PaliGemmaProcessor.from_pretrained(self.folder)
        self.pixels = self.processor.pixels(pictures)
        self.model: PaliGemmaForConditionalGeneration | None = None
        self.image_features: torch.Tensor | None = None
        if sum(file.stat().st_size for file in self.folder.glob("*.safetensors") if file.is_file()) < SMALL_MODEL:
            torch.set_num_threads(1)
        self.threads = torch.get_num_threads()
        self.seed = secrets.randbelow(2**31) if flags.do_sample and flags.seed is None else flags.seed

    def load(self) -> None:
        """Brings the weights in. Apart from __init__ so that a prompt can be checked before."""
        import weights

        flags, start = self.flags, time.perf_counter()
        with machine.memory_errors("loading the weights"):
            self.model = weights.load_model(
                self.folder,
                device=self.device,
                dtype=flags.dtype,
                quantize=flags.quantize,
                quantize_vision=flags.quantize_vision,
                allow_nonfinite=flags.allow_nonfinite,
            )
        if flags.verbose:
            spent = time.perf_counter() - start
            note(f"loaded {self.name} in {spent:.2f} s: {self.model.dtype}, {self.device}, threads: {self.threads}")

    def inputs(self, prompt: str) -> dict:
        """The processor's dict for one question, without pixels. Raises: PromptError if it leaves no room for an answer."""
        context = self.config.text_config.max_position_embeddings
        taken = len(self.pictures) * self.config.num_image_tokens
        room = context - taken - 1
        notes: list[str] = []
        inputs = self.processor.tokens([len(self.pictures)], prompt, notes=notes)
        count = inputs["input_ids"].shape[1] - taken
        if count > room and self.flags.truncate_prompt and room > ANSWER_ROOM:
            fits = room - ANSWER_ROOM - (count - len(self.processor.encode(prompt)))
            length = bisect_right(range(len(prompt)), fits, key=lambda n: len(self.processor.encode(prompt[:n]))) - 1
            notes.append(f"the prompt takes {count} tokens and {room - ANSWER_ROOM} fit; it is cut after {length} characters.")
            inputs = self.processor.tokens([len(self.pictures)], prompt[:length], notes=[])
        elif count > room:
            raise PromptError(
                f"the prompt takes {count} tokens, but {room} fit. The context is {context}, of which pictures take {taken}. "
                "Shorten it, or add --truncate_prompt."
            )
        for text in notes:
            note(f"note: {text}")
        return inputs

    def encode_pictures(self) -> None:
        """Runs the vision tower now, so that no question needs to."""
        with machine.memory_errors("looking at the picture"):
            self.image_features = self.model.encode_images(self.pixels.to(self.device))

    def steps(self, inputs: dict) -> Iterator[tuple[int, float]]:
        """The answer's tokens and their logprobs, one by one."""
        from generation import generate_steps

        flags = self.flags
        if self.image_features is None:
            inputs = inputs | {"pixel_values": self.pixels}
        else:
            inputs = inputs | {"image_features": self.image_features}
        room = self.config.text_config.max_position_embeddings - inputs["input_ids"].shape[1]
        if flags.max_tokens_to_generate > room:
            note(f"note: --max_tokens_to_generate {flags.max_tokens_to_generate} is cut to {room}, where the context ends.")
        for step in generate_steps(
            self.model,
            inputs,
            max_new_tokens=min(flags.max_tokens_to_generate, room),
            do_sample=flags.do_sample,
            temperature=flags.temperature,
            top_p=flags.top_p,
            top_k=flags.top_k,
            seed=self.seed,
            eos_token_id=self.config.eos_token_id,
        ):
            yield step.tokens.item(), step.logprobs.item()

    def answer(self, inputs: dict, is_streaming: bool) -> Answer:
        """Answers on stdout. After a signal too, as far as it got; then the signal goes on as Interrupted."""
        eos = self.config.eos_token_id
        answer = Answer(prompt_tokens=inputs["input_ids"].shape[1])
        stream, interrupted, seconds = self.processor.stream(), None, []
        start = time.perf_counter()
        try:
            with commandline.interruptible(), machine.memory_errors("answering"):
                for token, logprob in self.steps(inputs):
                    seconds.append(time.perf_counter() - start)
                    answer.token_ids.append(token)
                    answer.logprobs.append(logprob)
                    piece = stream.put(token)
                    answer.text += piece
                    if is_streaming:
                        write(piece)
                    if token in (eos if isinstance(eos, tuple) else (eos,)):
                        answer.finish_reason = "stop"
                    if ";" in piece and is_looping(answer.text):
                        answer.finish_reason = "repetition"
                        note("note: stopped, because the model repeats itself.")
                        break
        except commandline.Interrupted as signal:
            answer.finish_reason, interrupted = "interrupted", signal
        except PaliGemmaError:
            if is_streaming and answer.token_ids:
                write("\n")
            raise
        piece = stream.end()
        answer.text += piece
        answer.seconds = round(time.perf_counter() - start, 4)
        self.print(answer, piece if is_streaming else answer.text)
        if interrupted:
            raise interrupted
        if self.flags.verbose:
            self.print_speed(answer, seconds)
        return answer

    def print(self, answer: Answer, rest: str) -> None:
        """Writes the answer, or what is left of it after streaming."""
        if self.flags.json:
            write(json.dumps(asdict(answer) | {"model": self.name, "seed": self.seed}) + "\n")
        else:
            write(rest + "\n")

    def print_speed(self, answer: Answer, seconds: list[float]) -> None:
        """How long reading and writing took, beside the least time that this machine could take (see machine.py)."""
        products = machine.prefill_products(self.config, len(self.pictures), answer.prompt_tokens)
        rate = machine.matrix_rate(self.device, self.model.dtype)
        weights = sum(tensor.nbytes for tensor in self.model.language_model.state_dict().values())
        bandwidth = machine.read_bandwidth(self.device)
        note(
            f"prefill: {seconds[0] * 1e3:.1f} ms for {answer.prompt_tokens} tokens; floor {products / rate * 1e3:.1f} ms "
            f"({products / 1e9:.3g} G multiply-adds at the measured {rate / 1e9:.3g} G/s)"
        )
        if len(seconds) > 1:
            decode = (seconds[-1] - seconds[0]) / (len(seconds) - 1)
            note(
                f"decode: {decode * 1e3:.2f} ms a token, {1 / decode:.1f} tokens/s; floor {weights / bandwidth * 1e3:.2f} ms "
                f"({machine.size(weights)} of weights at the measured {machine.size(bandwidth)}/s)"
            )
        note(f"peak memory: {machine.size(machine.peak_memory(self.device))}")


def note_unused(flags: Flags) -> None:
    """Greedy decoding heeds none of the sampling flags: better said than silently so."""
    names = ("temperature", "top_p", "top_k", "seed")
    changed = [f"--{name}" for name in names if getattr(flags, name) != getattr(Flags, name)]
    if changed and not flags.do_sample:
        note(f"note: {', '.join(changed)} without --do_sample changes nothing.")


def program(flags: Flags) -> None:
    """Pictures, prompt, model, answer: in this order, so that what is wrong is said before the slow part."""
    commandline.relay_logs(flags.verbose)
    note_unused(flags)
    prompt = choose_prompt(flags)
    if flags.image_file_path is None:
        note(f'note: this asks "{prompt}" about the bundled picture, {bundled(BUNDLED_PICTURE)}; --help lists the flags.')
    session = Session(flags, read_pictures(flags))
    is_streaming = not flags.json and (is_terminal(sys.stdout) if flags.stream is None else flags.stream)
    if prompt is not None:
        inputs = session.inputs(prompt)
        session.load()
        session.answer(inputs, is_streaming)
        return
    session.load()
    session.encode_pictures()
    for prompt in typed_prompts():
        try:
            session.answer(session.inputs(as_utf8(prompt)), is_streaming)
        except PaliGemmaError as error:
            commandline.report(error, flags.json, flags.debug)


def main() -> int:
    sys.excepthook = commandline.report_bug
    return commandline.run(Flags, program)


if __name__ == "__main__":
    sys.exit(main())
