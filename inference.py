"""Ask a PaliGemma about a picture: `python inference.py detect street.jpg car person --save out.png`.

There are two ways to ask. Give a verb (caption, ask, detect, segment, ocr, count), then pictures and a text: the program writes
the prompt that the checkpoint was trained on, and prints tables or JSON, or writes drawings and annotation files
(programs/verbs.py). Or give a prompt of your own with the flags `--image_file_path cat.jpg --prompt "caption en"`: the
model gets this prompt unchanged. With neither a verb nor these flags, the program answers the bundled question about the
bundled picture with the bundled checkpoint.

The answer goes to stdout, everything else to stderr; errors.py lists the exit codes. Reading order: Flags (the command line),
Session (a model and its pictures), answer_prompt, program. torch is imported only after the flags and the pictures have been
checked. Checked in tests/test_inference.py.
"""

import sys

if sys.version_info < (3, 10):
    sys.exit("error: Python %d.%d is too old. This program needs 3.10 or newer." % sys.version_info[:2])
if __name__ == "__main__":
    from paligemma.programs import commandline

    commandline.leave_on_signals()  # first, because the other imports are slow

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TextIO

from paligemma import files, machine
from paligemma.errors import PaliGemmaError, PromptError, UsageError
from paligemma.pictures.names import split_pictures
from paligemma.programs import commandline, verbs
from paligemma.programs.commandline import as_utf8, note, print_notes, write
from paligemma.programs.options import read_picture, require
from paligemma.programs.results import Query, save_explanation
from paligemma.programs.verbs import VerbFlags

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration

BUNDLED_PICTURE, BUNDLED_QUESTION = str(files.BUNDLED / "shapes.png"), "caption en"
MAX_NEW_TOKENS = 100  # the default of --max_tokens_to_generate without a verb
# A cheap first check of the number of pictures, before they are read. The exact maximum depends on the context length: 31 for a
# model with pictures of 224 pixels.
MAX_PICTURES = 64
ANSWER_ROOM = 64  # --truncate_prompt leaves room for this many tokens of the answer
REPEATS = 3  # generation stops when the answer holds the same object this many times in a row


@dataclass(frozen=True, kw_only=True)
class Flags(VerbFlags):
    """Asks a PaliGemma model about a picture and prints its answer.

      python inference.py detect street.jpg car person --save out.png     verbs: caption, ask, detect, segment, ocr, count
      python inference.py detect --help                                   explains a verb
      python inference.py ask cat.jpg "what is on the table?" --json
      python inference.py --image_file_path cat.jpg --prompt "caption en" any prompt, used unchanged

    Pictures are files, http(s) addresses, or - for stdin. Several pictures are separated by commas; after a verb also by spaces.
    With a verb the model is asked about each picture separately, with --prompt about all pictures together. With neither a verb
    nor --prompt, you type questions about the picture if stdin is a terminal; otherwise the model is asked for a caption. Without
    a picture the bundled picture is used. Without --model_path the bundled model is used, which knows only coloured shapes.

    Other programs, each with its own --help: python -m paligemma finetune, annotate, cluster, doctor (checks the
    installation and a model). --version prints the version.

    Args:
        prompt: what to ask: "caption en", "answer en what is this?", "detect cat", "segment cat", "ocr"
        image_file_path: a file, an http(s) address, or - for stdin; separate several pictures by commas
        stream: print words as they are generated; this is the default on a terminal, where --stream=false turns it off
        truncate_prompt: shorten a prompt that is too long, instead of refusing it
    """

    prompt: str | None = None
    image_file_path: str | None = None
    stream: bool | None = None
    truncate_prompt: bool = False

    def __post_init__(self):
        super().__post_init__()
        require(self, ("image_file_path", self.image_file_path != "", "a file, an address or -"))
        if not self.positional and self.explain is not None and len(self.query.pictures) > 1:
            raise UsageError("--explain takes one picture, but several were given. Give one, or use a verb.")
        if not self.positional and len(self.query.pictures) > MAX_PICTURES:
            given = f"--prompt asks about all pictures together, and {len(self.query.pictures)} were given"
            raise UsageError(f"{given}; at most {MAX_PICTURES} can fit. Use a verb to ask about each picture separately.")
        if self.json and self.stream:
            raise UsageError("--json prints one object at the end. Drop --stream.")
        self.check_files(self.query, [] if self.mask_codec is None else [("the mask codec", self.mask_codec)])

    @cached_property
    def query(self) -> Query:
        """The Query from the positional arguments; without them, a Query that holds only the pictures for --prompt."""
        if self.positional:
            return super().query
        return Query("prompt", tuple(split_pictures(self.image_file_path or BUNDLED_PICTURE)))


# Prompts


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def choose_prompt(flags: Flags) -> str | None:
    """The prompt to answer; None if the user types the questions."""
    if flags.prompt is not None:
        return as_utf8(flags.prompt)
    if flags.image_file_path is None:
        return BUNDLED_QUESTION
    if is_terminal(sys.stdin) and "-" not in flags.query.pictures:
        return None
    print_notes('no --prompt, so this asks for "caption en".')
    return "caption en"


def typed_prompts() -> Iterator[str]:
    """The lines that the user types until Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401  (importing it gives input() its line editing and history)
    note("Ask about the picture; Ctrl-D ends.")
    while True:
        is_echoed = is_terminal(sys.stdout)  # if not, "> " goes to stderr: stdout holds only answers
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

    token_ids includes eos. logprobs are taken before temperature. seconds does not include loading the model.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"  # stop, length, repetition (an object was repeated), interrupted
    prompt_tokens: int = 0
    seconds: float = 0.0


def is_looping(text: str) -> bool:
    """Whether the last REPEATS objects of an answer such as "<loc..>x4 label ; ..." are equal."""
    # Splits only the end, because splitting the whole text after each object would be slow.
    objects = [part.strip() for part in text.rsplit(";", REPEATS + 1)[-REPEATS - 1 : -1]]
    return len(objects) == REPEATS and len(set(objects)) == 1 and "<loc" in objects[0]


class Session:
    """A model, and the pictures that all questions are about. `model` (the weights) may be set after `inputs` was called."""

    def __init__(self, flags: Flags, pictures: list["Image.Image"]):
        self.flags = flags
        self.pictures = pictures
        self.checkpoint = flags.open()
        self.config, self.processor = self.checkpoint.config, self.checkpoint.processor
        self.pixels = self.processor.pixels(pictures)
        self.model: PaliGemmaForConditionalGeneration | None = None
        self.image_features: torch.Tensor | None = None
        self.sampling = flags.sampling()
        self.is_streaming = not flags.json and (is_terminal(sys.stdout) if flags.stream is None else flags.stream)

    def inputs(self, prompt: str) -> dict:
        """The model's inputs for one question, without the pixels. Raises: PromptError if no room is left for an answer."""
        context = self.config.text_config.max_position_embeddings
        taken = len(self.pictures) * self.config.num_image_tokens
        limit = context - taken - 1  # for the tokens of the prompt; the answer needs at least one token
        notes: list[str] = []
        text_limit = limit - 2  # without bos and the newline
        if self.flags.truncate_prompt and text_limit > ANSWER_ROOM and self.processor.shorten(prompt, text_limit) != prompt:
            given = "too many" if self.processor.is_too_long(prompt) else str(len(self.processor.encode(prompt)) + 2)
            prompt = self.processor.shorten(prompt, text_limit - ANSWER_ROOM)
            allowed = limit - ANSWER_ROOM
            notes.append(f"the prompt takes {given} tokens and {allowed} fit; it is shortened to {len(prompt)} characters.")
        inputs = self.processor.tokens([len(self.pictures)], prompt, notes=notes)
        count = inputs["input_ids"].shape[1] - taken
        if count > limit:
            raise PromptError(
                f"the prompt takes {count} tokens, but {limit} fit. The context is {context}, of which pictures take {taken}. "
                "Shorten the prompt, or add --truncate_prompt."
            )
        print_notes(*notes)
        return inputs

    def steps(self, inputs: dict) -> Iterator[tuple[int, float]]:
        """Each token of the answer with its log-probability."""
        from paligemma.generation import generate_steps

        flags = self.flags
        features = self.image_features
        inputs = inputs | ({"pixel_values": self.pixels} if features is None else {"image_features": features})
        num_left = self.config.text_config.max_position_embeddings - inputs["input_ids"].shape[1]
        if flags.max_tokens_to_generate is not None and flags.max_tokens_to_generate > num_left:
            print_notes(f"--max_tokens_to_generate {flags.max_tokens_to_generate} is cut to {num_left}, the rest of the context.")
        if flags.positional:
            limit = flags.max_new_tokens([flags.positional[0]])
        else:
            limit = flags.max_tokens_to_generate or MAX_NEW_TOKENS
        for step in generate_steps(
            self.model,
            inputs,
            max_new_tokens=min(limit, num_left),
            sampling=self.sampling,
            suppress_tokens=self.processor.unused_ids(self.config.text_config.vocab_size),
        ):
            yield step.tokens.item(), step.logprobs.item()

    def answer(self, inputs: dict) -> None:
        """Generates and prints the answer. After a signal, prints the text generated so far and raises Interrupted."""
        eos = self.config.eos_token_id
        answer = Answer(prompt_tokens=inputs["input_ids"].shape[1])
        stream, interrupted, times = self.processor.stream(), None, []
        start = time.perf_counter()
        try:
            with commandline.interruptible(), machine.memory_errors("answering"):
                for token, logprob in self.steps(inputs):
                    times.append(time.perf_counter() - start)
                    answer.token_ids.append(token)
                    answer.logprobs.append(logprob)
                    piece = stream.put(token)
                    answer.text += piece
                    if self.is_streaming:
                        write(piece)
                    if token in (eos if isinstance(eos, tuple) else (eos,)):
                        answer.finish_reason = "stop"
                    if ";" in piece and is_looping(answer.text):
                        answer.finish_reason = "repetition"
                        print_notes("stopped, because the model repeats itself.")
                        break
        except commandline.Interrupted as signal:
            answer.finish_reason, interrupted = "interrupted", signal
        except PaliGemmaError:
            if self.is_streaming and answer.token_ids:
                write("\n")
            raise
        piece = stream.end()
        answer.text += piece
        answer.seconds = round(time.perf_counter() - start, 4)
        self.print_answer(answer, piece if self.is_streaming else answer.text, inputs)
        if interrupted:
            raise interrupted
        if self.flags.verbose:
            self.print_speed(answer, times)

    def print_answer(self, answer: Answer, rest: str, inputs: dict) -> None:
        """Prints the answer, or its `rest` that was not streamed yet. With --explain, draws its explanation."""
        if not self.flags.json:
            write(rest + "\n")
        extra = {"model": self.checkpoint.name, "seed": self.sampling.seed}
        if self.flags.explain and answer.finish_reason != "interrupted":
            inputs, (file,) = inputs | {"pixel_values": self.pixels}, self.flags.explanations(self.flags.query)
            extra |= save_explanation(self.model, self.processor, inputs, self.pictures[0], answer.token_ids, file)
        if self.flags.json:
            write(json.dumps(asdict(answer) | extra) + "\n")

    def print_speed(self, answer: Answer, times: list[float]) -> None:
        """Prints the times of prefill and decoding, each with the shortest time that this machine could need (see roofline.py).

        `times` holds the seconds from the start to each token.
        """
        import torch

        from paligemma import roofline
        from paligemma.layers.quantization import QuantizedLinear

        memory = machine.peak_memory(self.model.device)  # before the measurements, which need memory of their own
        parts, rates = (self.model.vision_tower, self.model.language_model), []
        for part in parts:
            is_quantized = any(isinstance(module, QuantizedLinear) for module in part.modules())
            rates.append(roofline.matrix_rate(self.model.device, torch.int8 if is_quantized else self.model.dtype))
        work = self.config, len(self.pictures), answer.prompt_tokens
        weights = roofline.decode_bytes(self.model.language_model)
        bandwidth = roofline.read_bandwidth(self.model.device)
        note(
            f"prefill: {times[0] * 1e3:.1f} ms for {answer.prompt_tokens} tokens; "
            f"lower bound {roofline.prefill_seconds(*work, *rates) * 1e3:.1f} ms "
            f"({roofline.prefill_multiply_adds(*work) / 1e9:.3g} G multiply-adds at the measured "
            f"{rates[0] / 1e9:.3g} G/s in the vision tower and {rates[1] / 1e9:.3g} G/s in the decoder)"
        )
        if len(times) > 1:
            decode = (times[-1] - times[0]) / (len(times) - 1)
            note(
                f"decode: {decode * 1e3:.2f} ms per token, {1 / decode:.1f} tokens/s; "
                f"lower bound {weights / bandwidth * 1e3:.2f} ms "
                f"({machine.format_bytes(weights)} of weights at the measured {machine.format_bytes(bandwidth)}/s)"
            )
        note(f"peak memory: {machine.format_bytes(memory)}")


def answer_once(flags: Flags, pictures: list["Image.Image"], prompt: str) -> None:
    """Answers one prompt. Checks the prompt before it loads the weights, because loading is slow."""
    session = Session(flags, pictures)
    inputs = session.inputs(prompt)
    session.model = flags.load(session.checkpoint)
    session.answer(inputs)


def answer_typed(flags: Flags, pictures: list["Image.Image"]) -> None:
    """Answers the questions that the user types."""
    session = Session(flags, pictures)
    session.model = flags.load(session.checkpoint)
    with machine.memory_errors("encoding the picture"):
        session.image_features = session.model.encode_images(session.pixels)  # once for all questions
    for typed in typed_prompts():
        try:
            session.answer(session.inputs(as_utf8(typed)))
        except PaliGemmaError as error:
            commandline.report(error, flags.json, flags.debug)


def answer_prompt(flags: Flags) -> None:
    """Without a verb: answers one prompt about all pictures together, or the questions that the user types."""
    prompt = choose_prompt(flags)
    if flags.image_file_path is None:
        print_notes(f'this asks "{prompt}" about the bundled picture, {BUNDLED_PICTURE}; --help lists the flags.')
    pictures = [read_picture(name, flags) for name in flags.query.pictures]
    if prompt is None:
        answer_typed(flags, pictures)
    else:
        answer_once(flags, pictures, prompt)


def program(flags: Flags) -> None:
    commandline.relay_logs(flags.verbose)
    flags.note_unused()
    if not flags.positional:
        return answer_prompt(flags)
    verbs.print_query(flags, flags.query)
    prompt = verbs.plain_prompt(flags, flags.query)
    if prompt is None:
        return verbs.run(flags, flags.query)
    answer_once(flags, [read_picture(flags.query.pictures[0], flags)], prompt)


def main() -> int:
    return commandline.run(Flags, program, topics=verbs.HELP)


if __name__ == "__main__":
    sys.exit(main())
