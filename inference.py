"""Ask a PaliGemma about a picture: `python inference.py detect street.jpg car person --save out.png`.

There are two ways to ask. After a verb (caption, ask, detect, segment, ocr, count) come pictures and a text: the verb writes the
prompt that the checkpoint was trained on and gives typed results: tables, JSON, drawings, annotation files (programs/verbs.py).
With the classic flags, `--image_file_path cat.jpg --prompt "caption en"`, the model gets any prompt as it is typed. Without both,
the program answers the bundled question about the bundled picture with the bundled checkpoint.

The answer goes to stdout, everything else to stderr; exit codes are in errors.py. Reading order: Flags (what can be asked for),
Session (a model and its pictures), answer_prompt, program. torch is imported only after the flags and the pictures have been
checked. Checked in tests/test_inference.py.
"""

import sys

if sys.version_info < (3, 10):
    sys.exit("error: Python %d.%d is too old. This program needs 3.10 or newer." % sys.version_info[:2])
if __name__ == "__main__":
    from paligemma.programs import commandline

    commandline.leave_on_signals()  # before the rest is imported, which takes a while

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
MAX_NEW_TOKENS = 100  # unless --max_tokens_to_generate or a verb sets another number
MAX_PICTURES = 64  # of one prompt; they are read before it is known how many fit: 31 at 224 pixels
ANSWER_ROOM = 64  # tokens that a prompt cut by --truncate_prompt leaves for the answer
REPEATS = 3  # an answer that repeats an object this many times in a row is stopped


@dataclass(frozen=True, kw_only=True)
class Flags(VerbFlags):
    """Asks a PaliGemma model about a picture and prints its answer.

      python inference.py detect street.jpg car person --save out.png     a verb: caption, ask, detect, segment, ocr or count;
      python inference.py ask cat.jpg "what is on the table?" --json      `python inference.py detect --help` explains one
      python inference.py --image_file_path cat.jpg --prompt "caption en" any prompt, word for word

    Pictures are files, http(s) addresses, or - for stdin. Several pictures are separated by commas; after a verb also by spaces.
    With a verb the model is asked about each picture separately, with --prompt about all of them together. Without a verb and
    without --prompt it is asked for a caption; on a terminal you can ask any number of questions. Without a picture it is asked
    about the bundled one. Without --model_path the bundled model answers, which knows only coloured shapes.

    Other programs, each with a --help of its own: python -m paligemma finetune, annotate, cluster. --version prints the version.

    Args:
        prompt: what to ask: "caption en", "answer en what is this?", "detect cat", "segment cat", "ocr"
        image_file_path: a file, an http(s) address, or - for stdin; several are separated by commas
        stream: print words as they are generated; this is the default on a terminal, where --stream=false turns it off
        truncate_prompt: cut a prompt that is too long instead of refusing it
    """

    prompt: str | None = None
    image_file_path: str | None = None
    stream: bool | None = None
    truncate_prompt: bool = False

    def __post_init__(self):
        super().__post_init__()
        require(self, ("image_file_path", self.image_file_path != "", "a file, an address or -"))
        if not self.words and self.explain is not None and len(self.query.pictures) > 1:
            raise UsageError("--explain takes one picture, but several were given. Give one, or use a verb.")
        if not self.words and len(self.query.pictures) > MAX_PICTURES:
            given = f"--prompt asks about all pictures together, and {len(self.query.pictures)} were given"
            raise UsageError(f"{given}; at most {MAX_PICTURES} can fit. Use a verb to ask about each one separately.")
        if self.json and self.stream:
            raise UsageError("--json prints one object at the end. Drop --stream.")
        self.check_files(self.query, [] if self.mask_codec is None else [("the mask codec", self.mask_codec)])

    @cached_property
    def query(self) -> Query:
        """What the words ask; without words, the pictures of the prompt."""
        if self.words:
            return super().query
        return Query("prompt", tuple(split_pictures(self.image_file_path or BUNDLED_PICTURE)))


# What is asked


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def choose_prompt(flags: Flags) -> str | None:
    """What to ask; None = the questions that the user types."""
    if flags.prompt is not None:
        return as_utf8(flags.prompt)
    if flags.image_file_path is None:
        return BUNDLED_QUESTION
    if is_terminal(sys.stdin) and "-" not in flags.query.pictures:
        return None
    print_notes('no --prompt, so this asks for "caption en".')
    return "caption en"


def typed_prompts() -> Iterator[str]:
    """The lines that the user types, until Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401  (importing it gives input() its line editing and history)
    note("Ask about the picture; Ctrl-D ends.")
    while True:
        is_echoed = is_terminal(sys.stdout)  # otherwise the "> " would be written among the answers
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

    token_ids includes eos. logprobs are those of the model, before temperature. seconds do not include loading the model.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"  # stop, length, repetition (stopped because it repeated an object), interrupted
    prompt_tokens: int = 0
    seconds: float = 0.0


def is_looping(text: str) -> bool:
    """Whether the last objects of a listing, "<loc..>x4 label ; ...", are all the same."""
    objects = [part.strip() for part in text.rsplit(";", REPEATS + 1)[-REPEATS - 1 : -1]]  # not the whole text for each token
    return len(objects) == REPEATS and len(set(objects)) == 1 and "<loc" in objects[0]


class Session:
    """A model, and the pictures that every question is about."""

    def __init__(self, flags: Flags, pictures: list["Image.Image"]):
        self.flags = flags
        self.pictures = pictures
        self.checkpoint = flags.open()
        self.config, self.processor = self.checkpoint.config, self.checkpoint.processor
        self.pixels = self.processor.pixels(pictures)
        self.model: PaliGemmaForConditionalGeneration | None = None
        self.image_features: torch.Tensor | None = None
        self.sampling = flags.sampling()

    def load(self) -> None:
        """Loads the weights. Not a part of __init__, so that a prompt can be checked before this slow step."""
        self.model = self.flags.load(self.checkpoint)

    def inputs(self, prompt: str) -> dict:
        """The processor's dict for one question, without pixels. Raises: PromptError if no room is left for an answer."""
        context = self.config.text_config.max_position_embeddings
        taken = len(self.pictures) * self.config.num_image_tokens
        room = context - taken - 1
        notes: list[str] = []
        max_words = room - 2  # tokens for the prompt itself: bos and the newline take two more
        if self.flags.truncate_prompt and max_words > ANSWER_ROOM and self.processor.shorten(prompt, max_words) != prompt:
            count = "too many" if self.processor.is_too_long(prompt) else len(self.processor.encode(prompt)) + 2
            prompt = self.processor.shorten(prompt, max_words - ANSWER_ROOM)
            fits = room - ANSWER_ROOM
            notes.append(f"the prompt takes {count} tokens and {fits} fit; it is cut after {len(prompt)} characters.")
        inputs = self.processor.tokens([len(self.pictures)], prompt, notes=notes)
        count = inputs["input_ids"].shape[1] - taken
        if count > room:
            raise PromptError(
                f"the prompt takes {count} tokens, but {room} fit. The context is {context}, of which pictures take {taken}. "
                "Shorten it, or add --truncate_prompt."
            )
        print_notes(*notes)
        return inputs

    def encode_pictures(self) -> None:
        """Runs the vision tower once for all questions."""
        with machine.memory_errors("encoding the picture"):
            self.image_features = self.model.encode_images(self.pixels)

    def steps(self, inputs: dict) -> Iterator[tuple[int, float]]:
        """The tokens of the answer and their log-probabilities, one by one."""
        from paligemma.generation import generate_steps

        flags = self.flags
        if self.image_features is None:
            inputs = inputs | {"pixel_values": self.pixels}
        else:
            inputs = inputs | {"image_features": self.image_features}
        room = self.config.text_config.max_position_embeddings - inputs["input_ids"].shape[1]
        if flags.max_tokens_to_generate is not None and flags.max_tokens_to_generate > room:
            print_notes(f"--max_tokens_to_generate {flags.max_tokens_to_generate} is cut to {room}, where the context ends.")
        longest = flags.max_new_tokens([flags.words[0]]) if flags.words else flags.max_tokens_to_generate or MAX_NEW_TOKENS
        for step in generate_steps(
            self.model,
            inputs,
            max_new_tokens=min(longest, room),
            sampling=self.sampling,
            suppress_tokens=self.processor.unused_ids(self.config.text_config.vocab_size),
        ):
            yield step.tokens.item(), step.logprobs.item()

    def answer(self, inputs: dict, is_streaming: bool) -> Answer:
        """Prints the answer. After a signal it prints what was generated so far and raises Interrupted."""
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
                        print_notes("stopped, because the model repeats itself.")
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
        self.print(answer, piece if is_streaming else answer.text, inputs)
        if interrupted:
            raise interrupted
        if self.flags.verbose:
            self.print_speed(answer, seconds)
        return answer

    def print(self, answer: Answer, rest: str, inputs: dict) -> None:
        """Prints the answer, or the `rest` of it that was not streamed, and explains it if --explain is given."""
        if not self.flags.json:
            write(rest + "\n")
        more = {"model": self.checkpoint.name, "seed": self.sampling.seed}
        if self.flags.explain and answer.finish_reason != "interrupted":
            inputs, (file,) = inputs | {"pixel_values": self.pixels}, self.flags.explanations(self.flags.query)
            more |= save_explanation(self.model, self.processor, inputs, self.pictures[0], answer.token_ids, file)
        if self.flags.json:
            write(json.dumps(asdict(answer) | more) + "\n")

    def print_speed(self, answer: Answer, seconds: list[float]) -> None:
        """Reports how long prefill and decoding took, and the least time that this machine could need (see roofline.py)."""
        from paligemma import roofline

        products = roofline.prefill_products(self.config, len(self.pictures), answer.prompt_tokens)
        rate = roofline.matrix_rate(self.model.device, self.model.dtype)
        weights = roofline.decode_bytes(self.model.language_model)
        bandwidth = roofline.read_bandwidth(self.model.device)
        note(
            f"prefill: {seconds[0] * 1e3:.1f} ms for {answer.prompt_tokens} tokens; floor {products / rate * 1e3:.1f} ms "
            f"({products / 1e9:.3g} G multiply-adds at the measured {rate / 1e9:.3g} G/s)"
        )
        if len(seconds) > 1:
            decode = (seconds[-1] - seconds[0]) / (len(seconds) - 1)
            note(
                f"decode: {decode * 1e3:.2f} ms per token, {1 / decode:.1f} tokens/s; floor {weights / bandwidth * 1e3:.2f} ms "
                f"({machine.format_bytes(weights)} of weights at the measured {machine.format_bytes(bandwidth)}/s)"
            )
        note(f"peak memory: {machine.format_bytes(machine.peak_memory(self.model.device))}")


def is_streamed(flags: Flags) -> bool:
    """Whether words are printed as they are generated."""
    return not flags.json and (is_terminal(sys.stdout) if flags.stream is None else flags.stream)


def answer_once(flags: Flags, pictures: list["Image.Image"], prompt: str) -> None:
    """Answers one prompt. The prompt is checked before the weights are loaded, which is slow."""
    session = Session(flags, pictures)
    inputs = session.inputs(prompt)
    session.load()
    session.answer(inputs, is_streamed(flags))


def answer_typed(flags: Flags, pictures: list["Image.Image"]) -> None:
    """Answers the questions that the user types."""
    session = Session(flags, pictures)
    session.load()
    session.encode_pictures()
    for typed in typed_prompts():
        try:
            session.answer(session.inputs(as_utf8(typed)), is_streamed(flags))
        except PaliGemmaError as error:
            commandline.report(error, flags.json, flags.debug)


def answer_prompt(flags: Flags) -> None:
    """The classic way: one prompt about all pictures together."""
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
    if not flags.words:
        return answer_prompt(flags)
    verbs.print_query(flags, flags.query)
    prompt = verbs.plain_prompt(flags, flags.query)
    if prompt is None:
        return verbs.run(flags, flags.query)
    answer_once(flags, [read_picture(flags.query.pictures[0], flags)], prompt)


def main() -> int:
    sys.excepthook = commandline.report_bug
    return commandline.run(Flags, program, topics=verbs.HELP)


if __name__ == "__main__":
    sys.exit(main())
