"""Ask a PaliGemma about a picture: `python inference.py detect street.jpg car person --save out.png`.

There are two ways to ask. A verb (caption, ask, detect, segment, ocr, count) in front of the picture writes the prompt that the
checkpoint was taught and gives typed results: tables, JSON, drawings, annotation files. The classic flags, `--image_file_path
cat.jpg --prompt "caption en"`, hand any prompt through as it is. Without anything it answers the bundled question about the
bundled picture with the bundled checkpoint.

The answer goes to stdout, everything else to stderr; exit codes are in errors.py. Reading order: Flags (what can be asked for),
Session (a model and its pictures), answer_prompt and answer_verb (the two ways, in order). torch is imported only after flags
and pictures turned out to be fine. Checked in tests/test_inference.py.
"""

import sys

if sys.version_info < (3, 10):
    sys.exit("error: Python %d.%d is too old. This program needs 3.10 or newer." % sys.version_info[:2])
if __name__ == "__main__":
    from paligemma.programs import commandline

    commandline.leave_on_signals()  # before the rest is imported, which takes a while

import json
import math
import os
import secrets
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from paligemma import files, machine
from paligemma.errors import ImageError, PaliGemmaError, PromptError, UsageError, counted
from paligemma.pictures import folders
from paligemma.pictures.folders import Loaded, one_picture
from paligemma.pictures.names import split_pictures
from paligemma.programs import commandline, verbs
from paligemma.programs.commandline import note, write
from paligemma.programs.options import (
    DrawingFlags,
    ModelFlags,
    PictureFlags,
    ResultFlags,
    find_picture,
    picture_options,
    read_picture,
    require,
)
from paligemma.tasks import ANSWER_TOKENS, Annotator, Request, checkpoint_kind, in_order, prompt, task_warning

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from paligemma.generation import Sampling
    from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
    from paligemma.objects.mask_codec import MaskCodec
    from paligemma.opened import Checkpoint
    from paligemma.processing_paligemma import PaliGemmaProcessor

BUNDLED_PICTURE, BUNDLED_QUESTION = str(files.BUNDLED / "shapes.png"), "caption en"
LONGEST_ANSWER = 100  # tokens, if neither --max_tokens_to_generate nor a verb says more
MOST_TOGETHER = 64  # pictures in one prompt, all read before it is known how many fit; 31 do at 224 pixels
ROWS = 4  # answers in flight, of a verb
ANSWER_ROOM = 64  # tokens that a prompt cut by --truncate_prompt leaves for the answer
REPEATS = 3  # an object said that many times in a row is not an answer any more


@dataclass(frozen=True, kw_only=True)
class Flags(ModelFlags, PictureFlags, ResultFlags, DrawingFlags):
    """Asks a PaliGemma model about a picture and prints its answer.

      python inference.py detect street.jpg car person --save out.png     a verb: caption, ask, detect, segment, ocr or count;
      python inference.py ask cat.jpg "what is on the table?" --json      `python inference.py detect --help` shows more of each
      python inference.py --image_file_path cat.jpg --prompt "caption en" any prompt, word for word

    Pictures are files, http(s) addresses, or - for stdin; several with commas between them, after a verb with spaces, too.
    After a verb each is asked about on its own; with --prompt they are asked about together. Without a verb and --prompt it
    captions, or asks you again and again if this is a terminal. Without a picture it looks at the bundled one, without
    --model_path it takes the bundled model, which knows coloured shapes and nothing else.

    Args:
        prompt: what to ask: "caption en", "answer en what is this?", "detect cat", "segment cat", "ocr"
        image_file_path: a file, an http(s) address, or - for stdin; several with commas between them
        temperature: with --do_sample: lower is more predictable, higher more varied; 0 is greedy
        top_p: with --do_sample: only the likeliest tokens that together reach this probability
        do_sample: draw each token at random instead of taking the likeliest
        top_k: with --do_sample: only that many of the likeliest tokens
        seed: of the random draws; the same seed gives the same answer
        json: print one JSON object per answer instead of text
        stream: print words as they come; on a terminal that is so anyway, unless --stream=false
        truncate_prompt: cut a prompt that is too long instead of refusing it
        save: the picture with what was found drawn into it: out.png; of several pictures out-1.png, out-2.png
        explain: where each word of the answer comes from, as a drawing: out.png; of several answers out-1.png, out-2.png
        export: what was found as COCO (.json), Pascal VOC (.xml), YOLO (.txt) or a table (.csv)
        verbose: say how long everything took, and how fast this machine could be at best
        debug: print the traceback of an error
    """

    words: commandline.Words = ()
    prompt: str | None = None
    image_file_path: str | None = None
    temperature: float = 0.8
    top_p: float = 0.9
    do_sample: bool = False
    top_k: int | None = None
    seed: int | None = None
    json: bool = False
    stream: bool | None = None
    truncate_prompt: bool = False
    save: str | None = None
    explain: str | None = None
    export: str | None = None
    verbose: bool = False
    debug: bool = False

    check_words = staticmethod(verbs.read_words)

    def __post_init__(self):
        for group in (ModelFlags, PictureFlags, ResultFlags, DrawingFlags):
            group.__post_init__(self)
        require(
            self,
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "a number from 0 (greedy) up"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0 and up to 1"),
            ("top_k", self.top_k is None or self.top_k >= 1, "a whole number from 1 up"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "a whole number from 0 to 2^63 - 1"),
            ("image_file_path", self.image_file_path != "", "a file, an address or -"),
        )
        given = {each.name for each in fields(self) if getattr(self, each.name) != each.default}
        if self.words:
            verbs.check_flags(verbs.read_words(self.words), given)
            self.check_drawing("save")
        elif early := [name for name in verbs.FITS if name in given]:
            name, verb = early[0], verbs.FITS[early[0]][0]
            raise UsageError(f"--{name} goes with a verb. Write {commandline.command()} {verb} PICTURE ... --{name} ...")
        elif self.explain is not None and len(self.job.pictures) > 1:
            raise UsageError("--explain looks at one picture, but several came. Give one, or use a verb.")
        elif len(self.job.pictures) > MOST_TOGETHER:
            came = f"--prompt asks about all pictures together, and {len(self.job.pictures)} came"
            raise UsageError(f"{came}; at most {MOST_TOGETHER} can fit. Use a verb to ask about each on its own.")
        if self.json and self.stream:
            raise UsageError("--json prints one object at the end. Drop --stream.")
        self.check_outputs([] if self.mask_codec is None else [("the mask codec", self.mask_codec)])

    @property
    def job(self) -> verbs.Job:
        """What the words ask for; without a verb, the pictures of the prompt."""
        if self.words:
            return verbs.read_words(self.words)
        return verbs.Job("ask", tuple(split_pictures(self.image_file_path or BUNDLED_PICTURE)), ("",))

    def check_outputs(self, read: list[tuple[str, str | Path]]) -> None:
        """Raises: UsageError, OutputError as verbs.check_outputs; `read` is what is read besides the pictures."""
        if self.save is None and self.export is None and self.explain is None:
            return
        verbs.check_outputs(self.job, verbs.outputs(self.job, self.save, self.export, self.explain), read)


# What was asked for


def as_utf8(prompt: str) -> str:
    """The prompt as the bytes that were typed, whatever the locale took them for. Raises: PromptError if not UTF-8."""
    try:
        return os.fsencode(prompt).decode()
    except UnicodeError as error:
        raise PromptError("the prompt is not valid UTF-8. Type it in a terminal that uses UTF-8.") from error


def is_terminal(stream: TextIO | None) -> bool:
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
    objects = [part.strip() for part in text.rsplit(";", REPEATS + 1)[-REPEATS - 1 : -1]]  # not the whole text for each token
    return len(objects) == REPEATS and len(set(objects)) == 1 and "<loc" in objects[0]


def open_checkpoint(flags: Flags) -> "Checkpoint":
    """The model that the flags name, without its weights."""
    checkpoint = flags.open()
    flags.check_outputs(checkpoint.files)
    return checkpoint


def load(flags: Flags, checkpoint: "Checkpoint") -> "PaliGemmaForConditionalGeneration":
    """The model with its weights."""
    import torch

    start = time.perf_counter()
    model = flags.load(checkpoint)
    if flags.verbose:
        spent = time.perf_counter() - start
        note(f"loaded {checkpoint.name} in {spent:.2f} s: {model.dtype}, {model.device}, threads: {torch.get_num_threads()}")
    return model


def longest_answer(flags: Flags) -> int:
    """In tokens."""
    return flags.max_tokens_to_generate or ANSWER_TOKENS.get(flags.words[0] if flags.words else "", LONGEST_ANSWER)


def choose_seed(flags: Flags) -> int | None:
    """The seed asked for; where draws are random and none was, one that can be asked for again."""
    return secrets.randbelow(2**31) if flags.do_sample and flags.seed is None else flags.seed


def choose_sampling(flags: Flags, seed: int | None) -> "Sampling":
    from paligemma.generation import Sampling

    return Sampling(flags.temperature, flags.top_p, flags.top_k, seed) if flags.do_sample else Sampling()


def explain_answer(
    model: "PaliGemmaForConditionalGeneration", processor: "PaliGemmaProcessor", asked: dict, picture: "Image.Image",
    token_ids: list[int], file: str,
) -> dict:  # fmt: skip
    """Draws where an answer comes from into a file, and returns the same for its JSON; `asked` is the processor's dict."""
    from paligemma.explanation import explain
    from paligemma.explanation_sheet import draw_explanation
    from paligemma.objects.drawing import save

    with machine.memory_errors("explaining the answer"):
        explanation = explain(model, processor, asked, token_ids)
    save(draw_explanation(picture, explanation), file)
    for text in (*explanation.notes, *filter(None, [explanation.warning]), f"the explanation is in {file}."):
        note(f"note: {text}")
    return {"explanation": explanation.to_json()}


class Session:
    """A model, and pictures to ask it about.

    Args:
        flags: which model, where and how.
        pictures: what every question is about.
    """

    def __init__(self, flags: Flags, pictures: list["Image.Image"]):
        self.flags = flags
        self.pictures = pictures
        self.checkpoint = open_checkpoint(flags)
        self.config, self.processor = self.checkpoint.config, self.checkpoint.processor
        self.pixels = self.processor.pixels(pictures)
        self.model: PaliGemmaForConditionalGeneration | None = None
        self.image_features: torch.Tensor | None = None
        self.seed = choose_seed(flags)

    def load(self) -> None:
        """Brings the weights in. Apart from __init__ so that a prompt can be checked before."""
        self.model = load(self.flags, self.checkpoint)

    def inputs(self, prompt: str) -> dict:
        """The processor's dict for one question, without pixels. Raises: PromptError if it leaves no room for an answer."""
        context = self.config.text_config.max_position_embeddings
        taken = len(self.pictures) * self.config.num_image_tokens
        room = context - taken - 1
        notes: list[str] = []
        most = room - 2  # of the prompt's own tokens: bos and the newline are not among them
        if self.flags.truncate_prompt and most > ANSWER_ROOM and self.processor.shorten(prompt, most) != prompt:
            taken_by_all = "too many" if self.processor.is_too_long(prompt) else len(self.processor.encode(prompt)) + 2
            prompt = self.processor.shorten(prompt, most - ANSWER_ROOM)
            fits = room - ANSWER_ROOM
            notes.append(f"the prompt takes {taken_by_all} tokens and {fits} fit; it is cut after {len(prompt)} characters.")
        inputs = self.processor.tokens([len(self.pictures)], prompt, notes=notes)
        count = inputs["input_ids"].shape[1] - taken
        if count > room:
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
            self.image_features = self.model.encode_images(self.pixels)

    def steps(self, inputs: dict) -> Iterator[tuple[int, float]]:
        """The answer's tokens and their logprobs, one by one."""
        from paligemma.generation import generate_steps

        flags = self.flags
        if self.image_features is None:
            inputs = inputs | {"pixel_values": self.pixels}
        else:
            inputs = inputs | {"image_features": self.image_features}
        room = self.config.text_config.max_position_embeddings - inputs["input_ids"].shape[1]
        if flags.max_tokens_to_generate is not None and flags.max_tokens_to_generate > room:
            note(f"note: --max_tokens_to_generate {flags.max_tokens_to_generate} is cut to {room}, where the context ends.")
        for step in generate_steps(
            self.model,
            inputs,
            max_new_tokens=min(longest_answer(flags), room),
            sampling=choose_sampling(flags, self.seed),
            suppress_tokens=self.processor.unused_ids(self.config.text_config.vocab_size),
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
        self.print(answer, piece if is_streaming else answer.text, inputs)
        if interrupted:
            raise interrupted
        if self.flags.verbose:
            self.print_speed(answer, seconds)
        return answer

    def print(self, answer: Answer, rest: str, inputs: dict) -> None:
        """Writes the answer, or what is left of it after streaming, and explains it if that is wanted."""
        if not self.flags.json:
            write(rest + "\n")
        more = {"model": self.checkpoint.name, "seed": self.seed}
        if self.flags.explain and answer.finish_reason != "interrupted":
            asked, file = inputs | {"pixel_values": self.pixels}, str(files.expand(self.flags.explain))
            more |= explain_answer(self.model, self.processor, asked, self.pictures[0], answer.token_ids, file)
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


def note_unused(flags: Flags) -> None:
    """Greedy decoding heeds none of the sampling flags: better said than silently so."""
    names = ("temperature", "top_p", "top_k", "seed")
    changed = [f"--{name}" for name in names if getattr(flags, name) != getattr(Flags, name)]
    if changed and not flags.do_sample:
        note(f"note: {', '.join(changed)} without --do_sample changes nothing.")


def is_streamed(flags: Flags) -> bool:
    """Whether words are printed as they come."""
    return not flags.json and (is_terminal(sys.stdout) if flags.stream is None else flags.stream)


def answer_once(flags: Flags, pictures: list["Image.Image"], prompt: str) -> None:
    """Prompt, model, answer: in this order, so that what is wrong is said before the slow part."""
    session = Session(flags, pictures)
    inputs = session.inputs(prompt)
    session.load()
    session.answer(inputs, is_streamed(flags))


def answer_typed(flags: Flags, pictures: list["Image.Image"]) -> None:
    """Answers whatever somebody types."""
    session = Session(flags, pictures)
    session.load()
    session.encode_pictures()
    for typed in typed_prompts():
        try:
            session.answer(session.inputs(as_utf8(typed)), is_streamed(flags))
        except PaliGemmaError as error:
            commandline.report(error, flags.json, flags.debug)


def answer_prompt(flags: Flags) -> None:
    """The classic way: one prompt about all pictures at once."""
    prompt = choose_prompt(flags)
    if flags.image_file_path is None:
        note(f'note: this asks "{prompt}" about the bundled picture, {BUNDLED_PICTURE}; --help lists the flags.')
    names = split_pictures(flags.image_file_path or BUNDLED_PICTURE)
    pictures = [read_picture(name, flags) for name in names]
    if prompt is None:
        answer_typed(flags, pictures)
    else:
        answer_once(flags, pictures, prompt)


# A verb


def try_picture(name: str, flags: Flags) -> "Image.Image | PaliGemmaError":
    """The picture, or the reason why there is none."""
    try:
        with one_picture(name):
            return read_picture(name, flags)
    except UsageError:
        raise
    except PaliGemmaError as error:
        return error


def load_picture(name: str, flags: Flags, side: int) -> Loaded:
    """The picture squeezed to the model's square, as a short answer may wait for long ones before it; or the error."""
    try:
        source = find_picture(name)
    except ImageError as error:
        return Loaded(error)
    loaded = folders.load(source, side, keeps_original=bool(flags.save or flags.explain), **picture_options(flags))
    for text in loaded.notes:
        note(f"note: {text}")
    return loaded


def find_masks(flags: Flags, checkpoint: "Checkpoint") -> "MaskCodec | None":
    """What decodes the masks of `segment`, if it is there; else a note says how to get it."""
    from paligemma.objects.mask_codec import find_codec, load_codec

    file = find_codec(checkpoint.base, flags.mask_codec)
    if file is None:
        note("note: boxes only, because vae-oid.npz, which decodes masks, is not in the model's folder; see --mask_codec.")
    return None if file is None else load_codec(file)


def open_annotator(flags: Flags, job: verbs.Job, extra: dict) -> Annotator:
    """What answers the job; `extra` gets what its JSON shall say of it."""
    checkpoint = open_checkpoint(flags)
    codec = find_masks(flags, checkpoint) if job.task == "segment" else None
    extra |= {"model": checkpoint.name, "seed": choose_seed(flags)}
    return Annotator(
        load(flags, checkpoint),
        checkpoint.processor,
        codec=codec,
        rows=min(ROWS, len(job.pictures) * len(job.texts)),
        max_new_tokens=longest_answer(flags),
        uses_grammar=flags.grammar,
        min_score=flags.min_score,
        kind=checkpoint.kind,
        language=flags.language,
        denominator=flags.denominator,
        sampling=choose_sampling(flags, extra["seed"]),
    )


def answer_verb(flags: Flags) -> None:
    """Typed results for each picture; those after the first are read when their turn comes, and a bad one ends nothing."""
    job = verbs.read_words(tuple(map(as_utf8, flags.words)))
    for text in job.notes:
        note(f"note: {text}")
    if flags.verbose:
        note(f"note: {job.task} {' ; '.join(job.texts)} in the {counted(len(job.pictures), 'picture')} {', '.join(job.pictures)}")
    kind = checkpoint_kind(flags.model_path or "")
    if warning := task_warning(job.task, kind):
        note(f"note: {warning}")
    first = try_picture(job.pictures[0], flags)
    if job.is_single and isinstance(first, PaliGemmaError):
        raise first
    if job.is_single and job.task in ("caption", "ask", "ocr") and not flags.json:  # nothing but text, so it can be streamed
        answer_once(flags, [first], prompt(job.task, job.texts[0], kind, flags.language))
        return
    extra: dict = {}
    annotator = open_annotator(flags, job, extra)
    desk = verbs.Desk(job, flags, extra)
    waiting: deque[Loaded] = deque()  # of requests whose results have not come yet

    def requests() -> Iterator[Request]:
        for i, name in enumerate(job.pictures):
            loaded = load_picture(name, flags, annotator.processor.image_size) if i else Loaded(first, original=lambda: first)
            for text in job.texts:
                waiting.append(loaded)
                yield Request(picture=loaded.picture, task=job.task, text=text, image=name, size=loaded.size)

    count = len(job.pictures) * len(job.texts)
    names = verbs.save_names(flags.explain, count) if flags.explain else []
    for number, result in enumerate(in_order(annotator.run(requests()), count)):
        loaded, more, picture = waiting.popleft(), {}, None
        if result.error is None and (flags.save or flags.explain):
            try:
                picture = loaded.original()
            except PaliGemmaError as error:
                result = replace(result, error=error)
        if names and result.error is None:
            asked = annotator.processor(picture, result.prompt, notes=[])
            more = explain_answer(annotator.model, annotator.processor, asked, picture, result.token_ids, names[number])
        desk.take(result, picture, more)
    desk.close()


def program(flags: Flags) -> None:
    commandline.relay_logs(flags.verbose)
    note_unused(flags)
    if flags.words:
        answer_verb(flags)
    else:
        answer_prompt(flags)


def main() -> int:
    sys.excepthook = commandline.report_bug
    return commandline.run(Flags, program, topics=verbs.HELP)


if __name__ == "__main__":
    sys.exit(main())
