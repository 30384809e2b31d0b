"""Tasks and typed results: the prompt of a task (detect, count, ocr, ...) and the answer as an object.

`prompt` writes the prompt of a task in the form that the checkpoint was trained on. `Annotator.run` takes any number of requests
(a picture and a task each), keeps `rows` of them running at once (generation.generate_many) and yields each result when it is
ready. If a request fails, its result holds the error and the run continues. torch is imported only when a request runs.

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
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import chain, islice, pairwise
from numbers import Real
from typing import TYPE_CHECKING, Any

from paligemma import machine
from paligemma.errors import DeviceError, PaliGemmaError, UsageError
from paligemma.objects.outputs import ParsedAnswer, as_json, parse_ids

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from paligemma.generation import Answer, Sampling
    from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
    from paligemma.objects.grammar import Grammar
    from paligemma.objects.mask_codec import MaskCodec
    from paligemma.processing_paligemma import PaliGemmaProcessor

log = logging.getLogger(__name__)

# Limit on the tokens of an answer, by task. An object takes five or six tokens; its mask takes sixteen more.
MAX_ANSWER_TOKENS = {"caption": 128, "ask": 64, "detect": 256, "segment": 512, "ocr": 512, "count": 16}
TASKS = tuple(MAX_ANSWER_TOKENS)
OBJECT_TASKS = ("detect", "segment")
REQUIRED_TEXT = {  # the tasks that need a text, and what this text is
    "ask": "a question",
    "detect": "something to look for",
    "segment": "something to look for",
    "count": "something to count",
}
PROMPTS = {
    "caption": "caption {language}",
    "ask": "answer {language} {text}",
    "detect": "detect {text}",
    "segment": "segment {text}",
    "ocr": "ocr",
    "count": "answer en how many {text} are there?",
}
HUB_NAME = re.compile(r"paligemma2?[-_]\d+b[-_](pt|mix|ft[-_]([a-z0-9_-]+?))[-_](?:224|448|896)", re.IGNORECASE)
# Prompts of fine-tuned checkpoints whose training prompts differ from PROMPTS. ai2d has two spaces after the language.
FINE_TUNED_PROMPTS = {
    "ai2d": {"ask": "answer {language}  {text}"},
    "chartqa": {"ask": "{text}", "count": "how many {text} are there?"},
    "docvqa": {"ask": "{text}", "count": "how many {text} are there?"},
    "pope": {"ask": "{text}"},
    "refcoco-seg": {"segment": "{text}"},
}
CAPTION_DATASETS = ("cococap", "coco35l", "docci", "scicap", "screen2words", "textcaps", "widgetcap", "xm3600")
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen \
eighteen nineteen twenty".split()


# Prompts


def checkpoint_kind(name: str) -> str:
    """What a checkpoint was trained for, inferred from its public name, which may appear anywhere in the path `name`.

    Returns: "pretrained"; "mix" (many tasks); the data set of a fine-tuned checkpoint, such as "docvqa"; else "other".
    """
    found = HUB_NAME.findall(name)
    if not found:
        return "other"
    kind, dataset = found[-1]
    return {"pt": "pretrained", "mix": "mix"}.get(kind.lower()) or dataset.lower().replace("_", "-")


def split_objects(text: str) -> list[str]:
    """The names between the semicolons, without duplicates: "cat ; dog ; cat" -> ["cat", "dog"]."""
    return list(dict.fromkeys(name for part in text.split(";") if (name := " ".join(part.split()))))


def check_task(task: str, text: str) -> None:
    """Raises: UsageError if the task is unknown, lacks a text that it needs, or has a text that it does not take."""
    if task not in TASKS:
        raise UsageError(f"task is {task!r}. It must be one of {', '.join(TASKS)}.")
    if not isinstance(text, str):
        raise UsageError(f"the text for {task} is {text!r:.40}. A text (str) is needed.")
    if task in REQUIRED_TEXT and not text.replace(";", "").strip():
        raise UsageError(f"{task} needs {REQUIRED_TEXT[task]}. Put it after the picture.")
    if task not in REQUIRED_TEXT and text.strip():
        raise UsageError(f"{task} takes no text, but {text!r} was given. Remove it, or use ask.")


def check_language(language: str) -> None:
    """Raises: UsageError unless this looks like a language code. Nothing checks that the checkpoint knows the language."""
    if not isinstance(language, str) or not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]{2,4})?", language):
        raise UsageError(f"language is {language!r}, but a code such as en, fr or zh is needed.")


def prompt(task: str, text: str = "", kind: str = "other", language: str = "en") -> str:
    """The prompt of a task in the form that a checkpoint of this kind was trained on.

    Args:
        task: one of TASKS.
        text: the question, or the object to look for or to count; several objects are separated by " ; ".
        kind: what the checkpoint was trained for, as checkpoint_kind returns it.
        language: language code of the caption or answer; the prompts of the other tasks have no language.
    Raises: the UsageError of check_task or check_language.
    """
    check_task(task, text)
    check_language(language)
    text = " ; ".join(split_objects(text)) if task in OBJECT_TASKS else text.strip()
    template = FINE_TUNED_PROMPTS.get(kind, {}).get(task, PROMPTS[task])
    return template.replace("{language}", language).replace("{text}", text)


def task_warning(task: str, kind: str) -> str | None:
    """A warning if the checkpoint was fine-tuned for another task than this one; None if it may know the task."""
    if kind in ("pretrained", "mix", "other"):
        return None
    known = ("caption",) if kind in CAPTION_DATASETS else ("segment",) if kind == "refcoco-seg" else ("ask", "count")
    if task in known:
        return None
    return f"this checkpoint was fine-tuned on {kind}, so it may not know {task}; a mix checkpoint knows every task."


def read_count(text: str) -> int | None:
    """The number in an answer, in digits or as a word. None if the answer does not hold exactly one number."""
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
        picture: anything that load_image takes; or a PaliGemmaError, which becomes the error of the result.
        task: one of TASKS.
        text: the question, or the objects to look for or to count.
        prompt: a prompt that is used unchanged, instead of the prompt of the task.
        image: the name of the picture in the result; if it is empty, a path or address in `picture` is used.
        size: width and height of the original picture in pixels, if `picture` is a smaller copy.
        image_features: float[1, P, D] from model.encode_images. If given, `picture` is not read, and `size` is required.
    """

    picture: Any
    task: str
    text: str = ""
    prompt: str | None = None
    image: str = ""
    size: tuple[int, int] | None = None
    image_features: "torch.Tensor | None" = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a request: the answer, or an `error`.

    `parsed`: the objects of detect and segment, and of any other answer that contains boxes.
    `count`: the number in the answer to a count task; None if the answer does not hold exactly one number.
    """

    image: str
    task: str
    asked: str  # the text of the request
    prompt: str
    width: int = 0
    height: int = 0
    text: str = ""  # the answer as the model generated it
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""  # "stop" or "length", see generation.Answer
    parsed: ParsedAnswer | None = None
    count: int | None = None
    error: PaliGemmaError | None = None

    @property
    def score(self) -> float:
        """The probability of the whole answer, 0 to 1."""
        return math.exp(sum(self.logprobs))

    def to_json(self) -> dict[str, Any]:
        """The result as a dict for json.dumps: one object of --json, one row of annotate."""
        row: dict[str, Any] = {"image": self.image, "task": self.task, "asked": self.asked, "prompt": self.prompt}
        if self.error is not None:
            return row | {"error": self.error.to_json()}
        row |= {"width": self.width, "height": self.height, "text": self.text}
        row["finish_reason"] = self.finish_reason
        if self.task == "count":
            row["count"] = self.count
        if self.parsed is None:
            return row | {"score": round(self.score, 6)}
        objects = [as_json(found, self.width, self.height) for found in self.parsed.objects]
        return row | {"status": self.parsed.status, "objects": objects, "problems": list(self.parsed.problems)}


# Running requests


Numbered = tuple[int, Request]  # the index of a request in the sequence, and the request
Entry = tuple[Numbered, Numbered | None]  # a request and the next request


class RequestQueue:
    """An iterator over Entry: a request and the next request, both with their indices.

    Requests are read with a look-ahead of one. Requests that were put back are returned first.
    """

    def __init__(self, requests: Iterable[Request]):
        self.source = pairwise(chain[Numbered | None](enumerate(requests), [None]))
        self.waiting: deque[Entry] = deque()  # requests that were put back
        self.is_broken = False  # True if the iterator `requests` raised an error; it then yields no more

    def __iter__(self) -> "RequestQueue":
        return self

    def __next__(self) -> Entry:
        if self.waiting:
            return self.waiting.popleft()
        try:
            entry, following = next(self.source)
        except StopIteration:
            raise
        except BaseException:
            self.is_broken = True
            raise
        assert entry is not None  # None comes last
        return entry, following

    def is_empty(self) -> bool:
        """Whether no request is left. Reads one request ahead to find out. Raises: any error of `requests`."""
        if not self.waiting:
            self.put_back(islice(self, 1))
        return not self.waiting

    def put_back(self, entries: Iterable[Entry]) -> None:
        """Puts these entries in front of the queue, in the same order."""
        self.waiting.extendleft(reversed(list(entries)))


def in_order(results: Iterable[tuple[int, Result]], count: int) -> Iterator[Result]:
    """The results of `count` requests in the order of the requests. Each is yielded as soon as no earlier result is missing.

    Raises: RuntimeError if a result is missing at the end, which would be a bug of this file.
    """
    waiting: dict[int, Result] = {}
    following = 0
    for index, result in results:
        waiting[index] = result
        while following in waiting:
            yield waiting.pop(following)
            following += 1
    if following != count or waiting:
        raise RuntimeError(f"request {following} of {count} has no result")


@dataclass(eq=False)
class Annotator:
    """Answers requests with one model, several at a time.

    An Annotator belongs to one thread; several annotators may share one model and processor.

    Args:
        model: PaliGemmaForConditionalGeneration.
        processor: the processor of the same checkpoint.
        codec: decodes the masks of `segment`; without a codec, objects have mask codes but no mask.
        rows: the number of requests in one batch; it is halved when memory runs out.
        max_new_tokens: limit on the tokens of an answer; MAX_ANSWER_TOKENS holds the limits of the tasks.
        uses_grammar: constrain the answers of detect and segment to whole objects with the labels asked for.
        min_score: objects with a lower score are left out.
        kind: what the checkpoint was trained for, as checkpoint_kind returns it.
        language: language code of captions and answers.
        denominator: locations are divided by this: 1023 as in the official code, or 1024 as in some other code.
        sampling: how tokens are chosen; None = greedy.
    Raises: UsageError for a min_score that is not a number from 0 to 1.
    """

    model: "PaliGemmaForConditionalGeneration"
    processor: "PaliGemmaProcessor"
    _: KW_ONLY
    codec: "MaskCodec | None" = None
    rows: int = 4
    max_new_tokens: int = 256
    uses_grammar: bool = False
    min_score: float | None = None
    kind: str = "other"
    language: str = "en"
    denominator: int = 1023
    sampling: "Sampling | None" = None
    # Caches of one entry: the grammar of the latest labels, and the image features of the last picture that was used by two
    # successive requests.
    grammars: "dict[tuple[str, str], Grammar]" = field(default_factory=dict, init=False)
    encoded: "tuple[Image.Image | None, torch.Tensor | None]" = field(default=(None, None), init=False)

    def __post_init__(self) -> None:
        if self.min_score is not None and not (isinstance(self.min_score, Real) and 0 <= self.min_score <= 1):
            raise UsageError(f"min_score is {self.min_score!r}. A number from 0 to 1 is needed.")

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Result]]:
        """Answers requests. Each request gets one result, which is an answer or an error.

        If memory runs out while a request runs alone, its result is a DeviceError. If this happens to two requests in a row,
        the DeviceError is raised, because the machine has too little memory.

        Args:
            requests: read one at a time, with a look-ahead of one. Two requests in a row about the same picture object share
                the output of the vision tower.
        Returns: an iterator of (index of the request, result), in the order in which the answers end.
        Raises: DeviceError as above, GenerationError for logits that are not finite, and any error that `requests` raises.
            Before the error is raised, the results of requests that could not be started are yielded. Requests that are
            running at that time get no result.
        """
        queue = RequestQueue(self.load_pictures(requests))
        failed: deque[tuple[int, Result]] = deque()  # results of requests that could not be started
        num_alone = 0  # requests in a row that ran out of memory although they ran alone
        while not queue.is_empty():
            running: dict[int, Entry] = {}
            shortage = None
            try:
                with machine.memory_errors("answering"):
                    for index, result in self.generate(queue, running, failed):
                        num_alone = 0
                        while failed:
                            yield failed.popleft()
                        yield index, result
            except DeviceError as error:
                shortage = DeviceError(error.message)  # a copy, because the traceback of `error` keeps the KV cache
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
            if queue.is_broken or num_alone > 1:
                raise shortage
            if self.rows == 1:
                for (index, request), _ in running.values():
                    yield index, self.error_result(request, shortage)
                continue
            self.rows //= 2
            log.warning("memory ran out; continuing with %d at a time.", self.rows)
            queue.put_back(running.values())

    def load_pictures(self, requests: Iterable[Request]) -> Iterator[Request]:
        """The requests with loaded pictures, each resized when it is loaded, so that waiting requests need little memory."""
        from paligemma.pictures.images import load_image, resize_to_square

        def resized(original: "Image.Image") -> "tuple[Image.Image, tuple[int, int]]":
            return resize_to_square(original, self.processor.image_size), original.size

        latest: object = object()  # the picture of the latest request that had to be loaded
        loaded: tuple[Image.Image | PaliGemmaError | None, tuple[int, int] | None] = (None, None)
        for request in requests:
            picture = request.picture
            if request.image_features is not None or isinstance(picture, PaliGemmaError):
                yield request
                continue
            is_name = isinstance(picture, str | os.PathLike)
            # Arrays are compared by identity only: == would compare all pixels.
            is_same = picture is latest or (is_name and isinstance(latest, str | os.PathLike) and picture == latest)
            if not is_same:
                try:
                    loaded = load_image(picture, then=resized)
                except PaliGemmaError as error:
                    loaded = error, None
            latest = picture
            name = request.image or (os.fspath(picture) if is_name else "")
            yield replace(request, picture=loaded[0], size=request.size or loaded[1], image=name)

    def generate(
        self, queue: RequestQueue, running: dict[int, Entry], failed: deque[tuple[int, Result]]
    ) -> Iterator[tuple[int, Result]]:
        """The results of one call of generate_many. `running` holds the started requests that have no result yet."""
        from paligemma.generation import Sampling, generate_many

        sampling = Sampling() if self.sampling is None else self.sampling
        # generate_many draws random numbers from the seed plus its own count of requests, which starts at 0 in every call.
        # Adding the index of the first request here keeps two requests from drawing the same numbers.
        if isinstance(sampling, Sampling) and sampling.seed is not None:
            (first_index, _), _ = queue.waiting[0]
            sampling = replace(sampling, seed=sampling.seed + first_index)
        for answer in generate_many(
            self.model,
            self.model_inputs(queue, running, failed),
            rows=self.rows,
            max_new_tokens=self.max_new_tokens,
            sampling=sampling,
            suppress_tokens=self.processor.unused_ids(self.model.config.text_config.vocab_size),
            locations=self.processor.location_ids,
        ):
            (index, request), _ = running[answer.index]
            result = self.to_result(request, answer)
            del running[answer.index]
            yield index, result

    def grammar(self, request: Request) -> "Grammar | None":
        """The grammar that constrains the answer; None for no constraint. Successive requests with the same labels share it."""
        if not (self.uses_grammar and request.task in OBJECT_TASKS):
            return None
        from paligemma.objects.grammar import Grammar

        key = request.task, request.text
        if key not in self.grammars:
            labels = [""] if self.kind == "refcoco-seg" else split_objects(request.text)  # refcoco answers have no labels
            with_masks = request.task == "segment"
            self.grammars = {key: Grammar.for_objects(self.processor, labels, with_masks=with_masks)}
        return self.grammars[key]

    def model_inputs(
        self, queue: RequestQueue, running: dict[int, Entry], failed: deque[tuple[int, Result]]
    ) -> Iterator[dict[str, Any]]:
        """The model's inputs for each request, made when a row is free. Requests that cannot be started go to `failed`.

        Ends after `rows` failures. generate_many then finishes the rows that are running and returns, and `run` yields the
        results of the failed requests and continues with the next ones.
        """
        num_started = 0
        for entry in queue:
            (index, request), following = entry
            running[num_started] = entry
            try:
                inputs = self.model_input(request, following)
            except DeviceError:
                raise
            except PaliGemmaError as error:
                del running[num_started]
                failed.append((index, self.error_result(request, error)))
                if len(failed) >= self.rows:
                    return
                continue
            num_started += 1
            yield inputs

    def model_input(self, request: Request, following: Numbered | None) -> dict[str, Any]:
        """The model's inputs for a request. Raises: PaliGemmaError.

        If the picture could not be loaded, `request.picture` holds the error, which is raised.
        """
        from paligemma.generation import only_row

        if isinstance(request.picture, PaliGemmaError):
            raise request.picture
        inputs: dict[str, Any] = self.processor.tokens([1], self.prompt_of(request))
        inputs |= self.picture_input(request, following)
        inputs["grammar"] = self.grammar(request)
        only_row(inputs, self.model.config)  # checks the inputs here, so that only this request fails, not all of them
        return inputs

    def picture_input(self, request: Request, following: Numbered | None) -> "dict[str, torch.Tensor | None]":
        """The pixels of the picture; or its image features, if they exist or the next request needs them too."""
        import torch

        if request.image_features is not None:
            return {"image_features": request.image_features}
        picture, (last, features) = request.picture, self.encoded
        if picture is last:
            return {"image_features": features}
        pixels = self.processor.pixels([picture])
        if following is None or following[1].picture is not picture:
            return {"pixel_values": pixels}
        with torch.no_grad():
            features = self.model.encode_images(pixels)
        self.encoded = picture, features
        return {"image_features": features}

    def prompt_of(self, request: Request) -> str:
        """The prompt of a request. Raises: UsageError."""
        if request.prompt is not None:
            return request.prompt
        return prompt(request.task, request.text, self.kind, self.language)

    def error_result(self, request: Request, error: PaliGemmaError) -> Result:
        """The result of a request that failed."""
        prompt_text = request.prompt or ""
        with suppress(UsageError):
            prompt_text = self.prompt_of(request)
        return Result(image=request.image, task=request.task, asked=request.text, prompt=prompt_text, error=error)

    def to_result(self, request: Request, answer: "Answer") -> Result:
        """The result of an answer; an error result if the masks of a large picture need too much memory."""
        try:
            with machine.memory_errors("reading the answer"):
                return self.parse(request, answer)
        except DeviceError as error:
            return self.error_result(request, error)

    def parse(self, request: Request, answer: "Answer") -> Result:
        """The result of an answer: the text, and its objects or number. Raises: DeviceError."""
        width, height = request.size or request.picture.size
        text = self.processor.decode(answer.token_ids).strip()
        parsed = None
        if request.task in OBJECT_TASKS or "<loc" in text:
            parsed = parse_ids(answer.token_ids, self.processor, answer.logprobs, answer.moments, self.denominator)
            parsed = self.filter_and_decode(parsed, width, height)
        return Result(
            image=request.image,
            task=request.task,
            asked=request.text,
            prompt=self.prompt_of(request),
            width=width,
            height=height,
            text=text,
            token_ids=answer.token_ids,
            logprobs=answer.logprobs,
            finish_reason=answer.finish_reason,
            parsed=parsed,
            count=read_count(text) if request.task == "count" else None,
        )

    def filter_and_decode(self, parsed: ParsedAnswer, width: int, height: int) -> ParsedAnswer:
        """The parsed answer with decoded masks if there is a codec, without objects whose score is below min_score."""
        objects = parsed.objects
        if self.min_score is not None:
            objects = [found for found in objects if found.score is None or found.score >= self.min_score]
        status = "nothing" if parsed.objects and not objects else parsed.status
        if self.codec is not None and any(found.codes for found in objects):
            from paligemma.objects.mask_codec import with_masks

            objects = with_masks(objects, self.codec, width, height)
        return replace(parsed, objects=objects, status=status)
