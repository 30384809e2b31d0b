"""Tasks in plain words and typed results: what to ask a checkpoint so that it detects, counts or reads, and what it answered.

`prompt` writes a task the way the checkpoint was taught it. `Annotator.run` takes any number of requests, a picture and a task
each, keeps `rows` of them in flight (generation.generate_many) and hands out results as they end; what is wrong with one request
becomes its result and ends nothing. The model and the processor are arguments; torch is imported only when something runs.

Sources of the prompts: Google's guide (ai.google.dev/gemma/docs/paligemma/prompt-system-instructions) and big_vision's
configs/proj/paligemma/transfers. Checked in tests/test_tasks.py.
"""

import logging
import math
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING, Any

from paligemma import machine
from paligemma.errors import DeviceError, PaliGemmaError, UsageError
from paligemma.objects.outputs import Reading, as_json, read_ids

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from paligemma.generation import Answer
    from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
    from paligemma.objects.grammar import Grammar
    from paligemma.objects.mask_codec import MaskCodec
    from paligemma.processing_paligemma import PaliGemmaProcessor

log = logging.getLogger(__name__)

# The longest answer of each task, in tokens: an object takes five or six, with a mask sixteen more.
ANSWER_TOKENS = {"caption": 128, "ask": 64, "detect": 256, "segment": 512, "ocr": 512, "count": 16}
TASKS = tuple(ANSWER_TOKENS)
OBJECT_TASKS = ("detect", "segment")
REQUIRED_TEXT = {"ask": "a question", "detect": "what to look for", "segment": "what to look for", "count": "what to count"}
PROMPTS = {
    "caption": "caption {language}",
    "ask": "answer {language} {text}",
    "detect": "detect {text}",
    "segment": "segment {text}",
    "ocr": "ocr",
    "count": "answer en how many {text} are there?",
}
HUB_NAME = re.compile(r"paligemma2?[-_]\d+b[-_](pt|mix|ft[-_]([a-z0-9_-]+?))[-_](?:224|448|896)", re.IGNORECASE)
# Checkpoints that were fine-tuned on other prompts than those above. The double space of ai2d is how it was trained.
OWN_PROMPTS = {
    "ai2d": {"ask": "answer {language}  {text}"},
    "chartqa": {"ask": "{text}", "count": "how many {text} are there?"},
    "docvqa": {"ask": "{text}", "count": "how many {text} are there?"},
    "pope": {"ask": "{text}"},
    "refcoco-seg": {"segment": "{text}"},
}
CAPTIONERS = ("cococap", "coco35l", "docci", "scicap", "screen2words", "textcaps", "widgetcap", "xm3600")
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen \
eighteen nineteen twenty".split()


# Prompts


def checkpoint_kind(name: str) -> str:
    """What a checkpoint was trained for, by its public name, which may stand anywhere in a path.

    Returns: "pretrained"; "mix" (many tasks); what it was fine-tuned on, such as "docvqa"; "other" if the name does not say.
    """
    found = HUB_NAME.findall(name)
    if not found:
        return "other"
    kind, transfer = found[-1]
    return {"pt": "pretrained", "mix": "mix"}.get(kind.lower()) or transfer.lower().replace("_", "-")


def split_objects(text: str) -> list[str]:
    """The names between the semicolons, each once: "cat ; dog" -> ["cat", "dog"]."""
    return list(dict.fromkeys(name for part in text.split(";") if (name := " ".join(part.split()))))


def check_task(task: str, text: str) -> None:
    """Raises: UsageError for a task that is not one of TASKS, or with a text where none is needed, or without one."""
    if task not in TASKS:
        raise UsageError(f"task is {task!r}. One of {', '.join(TASKS)} is needed.")
    if task in REQUIRED_TEXT and not text.replace(";", "").strip():
        raise UsageError(f"{task} needs {REQUIRED_TEXT[task]}. Put it after the picture.")
    if task not in REQUIRED_TEXT and text.strip():
        raise UsageError(f"{task} takes no text, but {text!r} came. Drop it, or use ask.")


def check_language(language: str) -> None:
    """Raises: UsageError unless it looks like a language code; whether a checkpoint knows it nobody can say."""
    if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]{2,4})?", language):
        raise UsageError(f"language is {language!r}. A code such as en, fr or zh is needed.")


def prompt(task: str, text: str = "", kind: str = "other", language: str = "en") -> str:
    """What to say to the model.

    Args:
        task: one of TASKS.
        text: the question, or what to look for or to count; several objects with " ; " between them.
        kind: of the checkpoint, see checkpoint_kind.
        language: of a caption or an answer; the other tasks have none.
    Raises: UsageError.
    """
    check_task(task, text)
    check_language(language)
    words = " ; ".join(split_objects(text)) if task in OBJECT_TASKS else text.strip()
    template = OWN_PROMPTS.get(kind, {}).get(task, PROMPTS[task])
    return template.replace("{language}", language).replace("{text}", words)


def task_warning(task: str, kind: str) -> str | None:
    """A sentence where the checkpoint was fine-tuned for something else than this task; None where it may well know it."""
    if kind in ("pretrained", "mix", "other"):
        return None
    known = ("caption",) if kind in CAPTIONERS else ("segment",) if kind == "refcoco-seg" else ("ask", "count")
    if task in known:
        return None
    return f"this checkpoint was fine-tuned on {kind}, so {task} may mean nothing to it; a mix checkpoint knows every task."


def read_count(text: str) -> int | None:
    """The number in an answer, in digits or in words; None unless there is just one."""
    words = re.findall(r"\d+|[a-z]+", text.lower())
    numbers = [int(word) if word.isdecimal() else NUMBERS.index(word) for word in words if word.isdecimal() or word in NUMBERS]
    if not numbers and words[:1] in (["no"], ["none"]):
        return 0
    return numbers[0] if len(numbers) == 1 else None


# Requests and results


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question about one picture.

    Args:
        picture: whatever load_image takes; or an error, which becomes the result.
        task: one of TASKS.
        text: the question, or the objects.
        prompt: what to say instead of the prompt of the task, word for word.
        image: the picture's name for people; a path or an address that is the picture, if not given.
        size: width and height of the original, where `picture` is a smaller copy.
    """

    picture: Any
    task: str
    text: str = ""
    prompt: str | None = None
    image: str = ""
    size: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a request: of `detect` and `segment` a `reading`, of `count` a number, if one was said; or an `error`.

    Where an answer holds boxes it has a reading whatever was asked.
    """

    image: str
    task: str
    asked: str  # the request's text
    prompt: str
    width: int = 0
    height: int = 0
    text: str = ""  # the answer as the model wrote it
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""  # stop or length, as generation.Answer
    reading: Reading | None = None
    count: int | None = None
    error: PaliGemmaError | None = None

    @property
    def score(self) -> float:
        """The probability of the whole answer, 0 to 1."""
        return math.exp(sum(self.logprobs))

    def to_json(self) -> dict:
        """What --json prints and annotate.py writes as a row."""
        row = {"image": self.image, "task": self.task, "asked": self.asked, "prompt": self.prompt}
        if self.error is not None:
            return row | {"error": self.error.to_json()}
        row |= {"width": self.width, "height": self.height, "text": self.text}
        row["finish_reason"] = self.finish_reason
        if self.task == "count":
            row["count"] = self.count
        if self.reading is None:
            return row | {"score": round(self.score, 6)}
        objects = [as_json(found, self.width, self.height) for found in self.reading.objects]
        return row | {"status": self.reading.status, "objects": objects, "problems": list(self.reading.problems)}


# The run


class Arrivals:
    """Requests as they are read, each with the one that follows it: ((index, request), (index, request) | None).

    Args:
        requests: read one ahead.
    """

    def __init__(self, requests: Iterable[Request]):
        self.source = pairwise(chain(enumerate(requests), [None]))
        self.waiting: deque[tuple] = deque()  # read before, and to come first
        self.is_broken = False  # whether `requests` raised: it has no more then, and what follows would be lost unseen

    def __iter__(self) -> "Arrivals":
        return self

    def __next__(self) -> tuple:
        if self.waiting:
            return self.waiting.popleft()
        try:
            return next(self.source)
        except StopIteration:
            raise
        except BaseException:
            self.is_broken = True
            raise

    def is_empty(self) -> bool:
        self.put_back(islice(self, not self.waiting))
        return not self.waiting

    def put_back(self, arrivals: Iterable[tuple]) -> None:
        """These come next, in their order."""
        self.waiting.extendleft(reversed(list(arrivals)))


def in_order(results: Iterable[tuple[int, Result]], count: int) -> Iterator[Result]:
    """The results of `count` requests in the order of the requests, each as soon as those before it have come.

    Raises: RuntimeError if one is missing at the end, which would be a bug here: no program may go silent about it.
    """
    waiting, following = {}, 0
    for index, result in results:
        waiting[index] = result
        while following in waiting:
            yield waiting.pop(following)
            following += 1
    if following != count or waiting:
        raise RuntimeError(f"request {following} of {count} has no result")


class Annotator:
    """A model that takes requests.

    Args:
        model: PaliGemmaForConditionalGeneration.
        processor: of the same checkpoint.
        codec: decodes the masks of `segment`; without it objects keep their codes and have no mask.
        rows: how many requests are in flight; halved when memory runs out.
        max_new_tokens: the longest answer; ANSWER_TOKENS has what a task may need.
        uses_grammar: hold `detect` and `segment` to valid objects with the labels asked for.
        min_score: drop objects with a lower score.
        kind: of the checkpoint, see checkpoint_kind.
        language: of captions and answers.
        denominator: what a location is divided by; 1023 as in the official code, 1024 in some other code.
        sampling: do_sample, temperature, top_p, top_k, seed of generate_many; greedy without.
    """

    def __init__(
        self,
        model: "PaliGemmaForConditionalGeneration",
        processor: "PaliGemmaProcessor",
        *,
        codec: "MaskCodec | None" = None,
        rows: int = 4,
        max_new_tokens: int = 256,
        uses_grammar: bool = False,
        min_score: float | None = None,
        kind: str = "other",
        language: str = "en",
        denominator: int = 1023,
        sampling: dict | None = None,
    ):
        self.model = model
        self.processor = processor
        self.codec = codec
        self.rows = rows
        self.max_new_tokens = max_new_tokens
        self.uses_grammar = uses_grammar
        self.min_score = min_score
        self.kind = kind
        self.language = language
        self.denominator = denominator
        self.sampling = sampling or {}
        self.grammars: dict[tuple[str, str], Grammar] = {}  # of the last labels asked for
        self.encoded: tuple[Image.Image | None, torch.Tensor | None] = (None, None)  # the last picture asked about twice

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Result]]:
        """Answers requests, in the order in which they end. Each request that is read has one result, an answer or an error.

        A request that runs out of memory with no other in flight has that error; two such in a row raise it, for then it is
        the machine that has too little.

        Args:
            requests: read one by one, one ahead of the row that is free; two in a row about the same picture object share
                what the vision tower made of it.
        Returns: an iterator of the request's place in the sequence and its result.
        Raises: DeviceError when memory runs out with a single row, GenerationError for logits that are not numbers, and what
            `requests` raises. Errors of requests known by then come out first; what is in flight then has no result.
        """
        arrivals = Arrivals(self.opened(requests))
        failed: deque[tuple[int, Result]] = deque()  # results of requests that could not be asked
        num_alone = 0  # requests in a row that ran out of memory alone
        while not arrivals.is_empty():
            in_flight: dict[int, tuple] = {}
            shortage = None
            try:
                with machine.memory_errors("answering"):
                    for index, result in self.answers(arrivals, in_flight, failed):
                        num_alone = 0
                        while failed:
                            yield failed.popleft()
                        yield index, result
            except DeviceError as error:
                shortage = DeviceError(error.message)  # without its traceback, which holds the cache
            except GeneratorExit:
                raise
            except BaseException:
                while failed:
                    yield failed.popleft()
                raise
            while failed:
                yield failed.popleft()
            if shortage is None:
                continue
            num_alone += self.rows == 1
            if arrivals.is_broken or num_alone > 1:
                raise shortage
            if self.rows == 1:
                for (index, request), _ in in_flight.values():
                    yield index, self.failure(request, shortage)
                continue
            self.rows //= 2
            log.warning("memory ran out; continuing with %d at a time.", self.rows)
            arrivals.put_back(in_flight.values())

    def opened(self, requests: Iterable[Request]) -> Iterator[Request]:
        """The requests with their pictures read. What is read here is squeezed, so that what waits takes little memory."""
        from paligemma.pictures.images import is_finished, load_image, squeeze

        def square(whole: "Image.Image") -> "tuple[Image.Image, tuple[int, int]]":
            return squeeze(whole, self.processor.image_size), whole.size

        source, found = object(), (None, None)  # of the last request whose picture had to be read
        for request in requests:
            picture = request.picture
            if isinstance(picture, PaliGemmaError) or is_finished(picture):
                yield request
                continue
            is_name = isinstance(picture, str | os.PathLike)
            is_same = picture is source or (is_name and isinstance(source, str | os.PathLike) and picture == source)
            if not is_same:  # arrays are never compared: that would be pixel by pixel
                try:
                    found = load_image(picture, then=square)
                except PaliGemmaError as error:
                    found = error, None
            source = picture
            name = request.image or (os.fspath(picture) if is_name else "")
            yield replace(request, picture=found[0], size=request.size or found[1], image=name)

    def answers(
        self, arrivals: "Arrivals", in_flight: dict[int, tuple], failed: deque[tuple[int, Result]]
    ) -> Iterator[tuple[int, Result]]:
        """One pass of generate_many; `in_flight` holds what has been read and not yet answered."""
        from paligemma.generation import generate_many

        sampling = dict(self.sampling)
        if sampling.get("seed") is not None:  # so that no two requests draw the same numbers
            sampling["seed"] += arrivals.waiting[0][0][0]
        for answer in generate_many(
            self.model,
            self.inputs(arrivals, in_flight, failed),
            rows=self.rows,
            max_new_tokens=self.max_new_tokens,
            suppress_tokens=self.processor.unused_ids(self.model.config.text_config.vocab_size),
            locations=self.processor.locations,
            **sampling,
        ):
            (index, request), _ = in_flight[answer.index]
            result = self.read(request, answer)
            del in_flight[answer.index]
            yield index, result

    def grammar(self, request: Request) -> "Grammar | None":
        """What holds the answer to valid output, if that is wanted; requests with the same labels share it."""
        if not (self.uses_grammar and request.task in OBJECT_TASKS):
            return None
        from paligemma.objects.grammar import Grammar

        key = request.task, request.text
        if key not in self.grammars:
            labels = [""] if self.kind == "refcoco-seg" else split_objects(request.text)  # its answers have no labels
            with_masks = request.task == "segment"
            self.grammars = {key: Grammar.for_objects(self.processor, labels, with_masks=with_masks)}
        return self.grammars[key]

    def inputs(
        self, arrivals: "Arrivals", in_flight: dict[int, tuple], failed: deque[tuple[int, Result]]
    ) -> Iterator[dict]:
        """The model's input for each request, made when a row is free; what is wrong with a request goes to `failed`.

        It ends early when as many have failed as there are rows, so that their results need not wait for the next answer.
        """
        started = 0
        for arrival in arrivals:
            (index, request), following = arrival
            in_flight[started] = arrival
            try:
                inputs = self.input(request, following)
            except DeviceError:
                raise
            except PaliGemmaError as error:
                inputs = error
            if isinstance(inputs, dict):
                started += 1
                yield inputs
                continue
            del in_flight[started]
            failed.append((index, self.failure(request, inputs)))
            if len(failed) >= self.rows:
                return

    def input(self, request: Request, following: tuple[int, Request] | None) -> "dict | PaliGemmaError":
        """What the model gets for a request, or the error that its picture is. Raises: PaliGemmaError."""
        from paligemma.generation import only_row

        if isinstance(request.picture, PaliGemmaError):
            return request.picture
        inputs = self.processor.tokens([1], self.wording(request))
        is_shared = following is not None and following[1].picture is request.picture
        inputs |= self.look(request.picture, is_shared)
        inputs["grammar"] = self.grammar(request)
        only_row(inputs, self.model.config)  # refuses what generate_many would, while it is one request's fault
        return inputs

    def look(self, picture: "Image.Image", is_shared: bool) -> dict:
        """The picture as pixels, or, if it is asked about several times, as what the vision tower makes of it."""
        import torch

        last, features = self.encoded
        if picture is last:
            return {"image_features": features}
        pixels = self.processor.pixels([picture])
        if not is_shared:
            return {"pixel_values": pixels}
        with torch.no_grad():
            features = self.model.encode_images(pixels)
        self.encoded = picture, features
        return {"image_features": features}

    def wording(self, request: Request) -> str:
        """What to say to the model. Raises: UsageError."""
        if request.prompt is not None:
            return request.prompt
        return prompt(request.task, request.text, self.kind, self.language)

    def failure(self, request: Request, error: PaliGemmaError) -> Result:
        """The result of a request that could not be asked."""
        said = request.prompt or ""
        with suppress(UsageError):
            said = self.wording(request)
        return Result(image=request.image, task=request.task, asked=request.text, prompt=said, error=error)

    def read(self, request: Request, answer: "Answer") -> Result:
        """The answer, read; or the error of it, as memory may run out over the masks of one large picture."""
        try:
            with machine.memory_errors("reading the answer"):
                return self.result(request, answer)
        except DeviceError as error:
            return self.failure(request, error)

    def result(self, request: Request, answer: "Answer") -> Result:
        """The answer, read."""
        width, height = request.size or request.picture.size
        text = self.processor.decode(answer.token_ids).strip()
        reading = None
        if request.task in OBJECT_TASKS or "<loc" in text:
            reading = read_ids(answer.token_ids, self.processor, answer.logprobs, answer.places, self.denominator)
            reading = self.refine(reading, width, height)
        return Result(
            image=request.image,
            task=request.task,
            asked=request.text,
            prompt=self.wording(request),
            width=width,
            height=height,
            text=text,
            token_ids=answer.token_ids,
            logprobs=answer.logprobs,
            finish_reason=answer.finish_reason,
            reading=reading,
            count=read_count(text) if request.task == "count" else None,
        )

    def refine(self, reading: Reading, width: int, height: int) -> Reading:
        """Without the objects of too low a score, and with masks where there is a codec."""
        objects = reading.objects
        if self.min_score is not None:
            objects = [found for found in objects if found.score is None or found.score >= self.min_score]
        status = "nothing" if reading.objects and not objects else reading.status
        if self.codec is not None and any(found.codes for found in objects):
            from paligemma.objects.mask_codec import with_masks

            objects = with_masks(objects, self.codec, width, height)
        return replace(reading, objects=objects, status=status)
