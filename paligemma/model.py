"""The Python interface: `paligemma.load()` returns a model with one method per task, for one picture or for a list of pictures.

Each method writes the prompt that the checkpoint was trained on, runs the model, and returns text, a number or objects. The
methods raise the first error. (tasks.Annotator, which the methods use, returns errors as results, so that a long run continues.)

Threads: several threads may use one Model at the same time and get the same answers as a single thread. This need not be
faster, because torch's operators already use several cores.

Checked in tests/test_model.py, which also runs the examples below.
Shapes: C channels, H W pixels, P patches per image, D model width.
"""

import functools
import inspect
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Protocol, TypeAlias, TypeVar, cast, overload

import torch
from PIL import Image
from torch import Tensor

from paligemma import files, machine
from paligemma.checkpoints import read_ahead
from paligemma.devices import find_devices, graphs_mode
from paligemma.errors import UsageError, counted
from paligemma.generation import Sampling, Step, generate_steps
from paligemma.objects import drawing, exports
from paligemma.objects.mask_codec import MaskCodec, find_codec, load_codec
from paligemma.objects.outputs import ParsedObject
from paligemma.opened import open_checkpoint
from paligemma.pictures.images import load_image
from paligemma.pictures.names import DRAWABLE
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tasks import MAX_ANSWER_TOKENS, OBJECT_TASKS, Annotator, Request, Result, in_order, task_warning

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import supervision

    from paligemma.explanation import Explanation
    from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration

EXAMPLE_PICTURE = str(files.BUNDLED / "shapes.png")  # a cross, a circle and a heart, which the bundled model knows
STREAM_TOKENS = 256  # default of max_new_tokens in `stream`

# A path, an address (http, https, file, data), the bytes of a file, an open file, a PIL image, an array or tensor, or the dict
# {"bytes": ..., "path": ...} of Hugging Face data sets.
Picture: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | IO[bytes] | Image.Image | npt.NDArray[Any] | Tensor | dict[str, Any] "
    "| EncodedPicture"
)
AnyPicture = TypeVar("AnyPicture", bound=Picture)
Options = ParamSpec("Options")
T = TypeVar("T")


class DetectedObject:
    """One object that the model found.

    Attributes:
        label: the label that the model generated; "" if the checkpoint generates no labels.
        score: confidence of the model, 0 to 1.
        xyxy: x_min, y_min, x_max, y_max in pixels of the original picture.
        mask: bool[H, W], the pixels of the original picture that belong to the object; None if there is no mask.
    """

    def __init__(self, found: ParsedObject, width: int, height: int):
        assert found.box is not None
        self.label = found.label
        self.score = 0.0 if found.score is None else found.score
        self.xyxy = found.box.xyxy(width, height)
        self.mask: "npt.NDArray[np.bool_] | None" = found.mask

    def __repr__(self) -> str:
        corners = ", ".join(f"{value:.1f}" for value in self.xyxy)
        mask = "" if self.mask is None else f", mask of {int(self.mask.sum())} pixels"
        return f"{self.label or 'object'} {self.score:.2f} at ({corners}){mask}"


class DetectionResult(Sequence[DetectedObject]):
    """The objects that `detect` or `segment` found in one picture: a sequence of DetectedObject. A notebook shows the drawing.

    Attributes:
        objects: list of DetectedObject in the order of the answer; empty if the model found nothing.
        width, height: size of the original picture in pixels.
        text: the answer as the model generated it, with its <loc> and <seg> tokens.
        result: the tasks.Result with tokens, log-probabilities and problems.
    """

    def __init__(self, result: Result, picture: object):
        self.result = result
        self.width, self.height, self.text = result.width, result.height, result.text
        self._parsed = [found for found in (result.parsed.objects if result.parsed else []) if found.box is not None]
        self.objects = [DetectedObject(found, result.width, result.height) for found in self._parsed]
        self._picture = picture.picture if isinstance(picture, EncodedPicture) else picture

    @overload
    def __getitem__(self, index: int) -> DetectedObject: ...
    @overload
    def __getitem__(self, index: slice) -> list[DetectedObject]: ...
    def __getitem__(self, index: int | slice) -> DetectedObject | list[DetectedObject]:
        return self.objects[index]

    def __len__(self) -> int:
        return len(self.objects)

    def __repr__(self) -> str:
        things = "".join(f"\n  {thing}" for thing in self.objects)
        return f"<DetectionResult: {counted(len(self), 'object')} in {self.width} x {self.height} pixels{things}>"

    def draw(self, style: drawing.Style | None = None) -> Image.Image:
        """A copy of the picture with boxes, masks, labels and scores. A picture that was given as a path is read again.

        Raises: ImageError if the file no longer exists; UsageError for a font that cannot be read.
        """
        return drawing.draw(load_image(self._picture), self._parsed, style or drawing.Style())

    def save(self, path: str | os.PathLike[str], style: drawing.Style | None = None) -> None:
        """Writes the drawing into a file. The ending of its name, one of names.DRAWABLE, sets the format.

        Raises: UsageError for an unknown ending, OutputError if the file cannot be written, and the errors of `draw`.
        """
        file = files.expand(path)
        if file.suffix.lower() not in DRAWABLE:
            raise UsageError(f"{file} cannot be written as a picture. Give a name that ends in {', '.join(DRAWABLE)}.")
        drawing.save(self.draw(style), file)

    def _repr_png_(self) -> bytes:
        """The drawing for a notebook."""
        content = io.BytesIO()
        self.draw().save(content, "PNG")
        return content.getvalue()

    def to_json(self) -> dict[str, Any]:
        """The result as a dict for json.dumps, with the keys that the programs print with --json."""
        return self.result.to_json()

    def to_coco(self) -> dict[str, Any]:
        """A COCO annotation file as a dict: images, annotations, categories."""
        return exports.coco(exports.collect([self.to_json()]))

    def to_supervision(self) -> "supervision.Detections":
        """The objects as supervision.Detections. Raises: DeviceError if the package supervision is not installed."""
        return exports.to_supervision(self._parsed, self.width, self.height)


class TaskMethod(Protocol[Options, T]):
    """The type of a method that returns one answer for one picture, and a list of answers for a list or tuple of pictures."""

    @overload
    def __call__(self, picture: Picture, /, *args: Options.args, **options: Options.kwargs) -> T: ...
    @overload
    def __call__(
        self, picture: "list[AnyPicture] | tuple[AnyPicture, ...]", /, *args: Options.args, **options: Options.kwargs
    ) -> list[T]: ...


def one_or_many(method: "Callable[Concatenate[Model, list[Any], Options], list[T]]") -> TaskMethod[Options, T]:
    """Decorator of a method that takes a list of pictures: the new method also takes a single picture."""

    @functools.wraps(method)
    def task_method(self: "Model", picture: Any, /, *args: Options.args, **options: Options.kwargs) -> T | list[T]:
        if isinstance(picture, list | tuple):
            return method(self, [*picture], *args, **options)
        return method(self, [picture], *args, **options)[0]

    owner, pictures, *options = inspect.signature(method).parameters.values()
    picture = pictures.replace(name="picture", annotation="Picture | list[Picture]")
    task_method.__dict__["__signature__"] = inspect.Signature([owner, picture, *options])  # what help() shows
    return cast("TaskMethod[Options, T]", task_method)


def can_be_reloaded(picture: object) -> bool:
    """True if the picture can be read again later. False for an address, an array or an open file, because they may change."""
    is_file = isinstance(picture, str | os.PathLike) and not str(picture)[:8].lower().startswith(("http:", "https:", "data:"))
    return is_file or isinstance(picture, bytes | EncodedPicture)


class Model:
    """A PaliGemma model with one method per task. Made by `load`. Several threads may use one Model at the same time.

    A method that gets one picture returns one answer. A method that gets a list or tuple of pictures returns a list of answers,
    which it computes in batches of `batch_size`. A picture is a path, an address, the bytes of a file, an open file, a PIL image,
    or a numpy array or torch tensor of shape [H, W], [H, W, C] or [C, H, W] (uint8, or floats from 0 to 1). Several methods have
    these keyword arguments:
        language: language code of the answer: "en", "fr", "zh", ... Nothing checks that the checkpoint knows this language.
        sampling: how tokens are chosen, see Sampling; if not given, greedy decoding. Picture i of a list uses seed + i.
        max_new_tokens: limit on the tokens of an answer; if not given, the limit of the task (tasks.MAX_ANSWER_TOKENS).
    Every method raises ImageError or AccessError for a picture that cannot be read, PromptError for a text that does not fit into
    the context, UsageError or GenerationError for invalid arguments, and DeviceError if memory runs out. They warn
    (UserWarning) if the checkpoint was fine-tuned for another task.

    Args:
        network: PaliGemmaForConditionalGeneration, on its device.
        processor: the processor of the same checkpoint.
        name: the name of the checkpoint, shown by repr().
        kind: what the checkpoint was trained for, as tasks.checkpoint_kind returns it.
        codec: decodes the masks of `segment`; without a codec, objects have no mask.
        batch_size: the number of pictures in one batch.
    """

    def __init__(
        self,
        network: "PaliGemmaForConditionalGeneration",
        processor: PaliGemmaProcessor,
        *,
        name: str = "",
        kind: str = "other",
        codec: MaskCodec | None = None,
        batch_size: int = 4,
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UsageError(f"batch_size is {batch_size!r}. A whole number from 1 up is needed.")
        self.network, self.processor = network, processor
        self.name, self.kind, self.codec, self.batch_size = name, kind, codec, batch_size

    def __repr__(self) -> str:
        weights = machine.format_bytes(sum(tensor.nbytes for tensor in (*self.network.parameters(), *self.network.buffers())))
        return f"<paligemma.Model {self.name}: {weights} of weights, {self.network.dtype}, {self.network.device}>"

    @one_or_many
    def caption(
        self, pictures: list[Any], *, language: str = "en", sampling: Sampling | None = None, max_new_tokens: int | None = None
    ) -> list[str]:
        """A sentence about what the picture shows.

        >>> model.caption(paligemma.EXAMPLE_PICTURE)
        'an orange cross, a yellow circle and a purple heart'
        """
        return [result.text for result in self._run("caption", pictures, "", sampling, max_new_tokens, language=language)]

    @one_or_many
    def ask(
        self, pictures: list[Any], question: str, *, language: str = "en", sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
    ) -> list[str]:  # fmt: skip
        """The answer to a question about the picture.

        >>> model.ask(paligemma.EXAMPLE_PICTURE, "what color is the heart?")
        'purple'
        """
        return [result.text for result in self._run("ask", pictures, question, sampling, max_new_tokens, language=language)]

    @one_or_many
    def detect(
        self, pictures: list[Any], *labels: str, grammar: bool = False, min_score: float | None = None,
        sampling: Sampling | None = None, max_new_tokens: int | None = None,
    ) -> list[DetectionResult]:  # fmt: skip
        """The objects with one of these labels, each with its box and score.

        Args:
            labels: what to look for, such as "car", "person".
            grammar: constrain the answer to whole objects with one of these labels.
            min_score: leave out objects with a lower score.

        >>> found = model.detect(paligemma.EXAMPLE_PICTURE, "heart")
        >>> [(thing.label, [round(value, -1) for value in thing.xyxy]) for thing in found.objects]
        [('heart', [270.0, 280.0, 380.0, 390.0])]
        """
        return self._find("detect", pictures, labels, sampling, max_new_tokens, uses_grammar=grammar, min_score=min_score)

    @one_or_many
    def segment(
        self, pictures: list[Any], *labels: str, grammar: bool = False, min_score: float | None = None,
        sampling: Sampling | None = None, max_new_tokens: int | None = None,
    ) -> list[DetectionResult]:  # fmt: skip
        """The objects with one of these labels, each with its box, score and mask. The arguments are those of `detect`.

        Warns (UserWarning) if there are no masks because `load` found no mask codec.

        >>> found = model.segment(paligemma.EXAMPLE_PICTURE, "circle")
        >>> found.objects[0].mask.shape == (found.height, found.width)
        True
        """
        if self.codec is None:
            text = "objects get boxes but no masks, because no mask codec is loaded. Use load(..., mask_codec='vae-oid.npz')."
            warnings.warn(text, stacklevel=3)
        return self._find("segment", pictures, labels, sampling, max_new_tokens, uses_grammar=grammar, min_score=min_score)

    @one_or_many
    def ocr(
        self, pictures: list[Any], *, sampling: Sampling | None = None, max_new_tokens: int | None = None
    ) -> list[str]:
        """The text in the picture.

        >>> from PIL import Image, ImageDraw
        >>> sign = Image.new("RGB", (448, 448), "white")
        >>> ImageDraw.Draw(sign).text((224, 224), "EXIT", "black", font_size=60, anchor="mm")
        >>> model.ocr(sign)
        'EXIT'
        """
        return [result.text for result in self._run("ocr", pictures, "", sampling, max_new_tokens)]

    @one_or_many
    def count(
        self, pictures: list[Any], what: str, *, sampling: Sampling | None = None, max_new_tokens: int | None = None
    ) -> list[int | None]:
        """How many of these things the picture shows; None if the answer is not one number.

        >>> model.count(paligemma.EXAMPLE_PICTURE, "circles")
        1
        """
        return [result.count for result in self._run("count", pictures, what, sampling, max_new_tokens)]

    @one_or_many
    def embed(self, pictures: list[Any]) -> list[Tensor]:
        """The image features, float32[P, D] on the CPU: one vector per patch, row by row from the top left.

        The decoder reads these vectors: they are the output of the vision tower after the projector, not normalised. The mean
        over the patches, `.mean(0)`, gives one vector per picture.

        >>> model.embed(paligemma.EXAMPLE_PICTURE).shape
        torch.Size([64, 192])
        """
        return [self.look(picture).features[0].float().cpu() for picture in pictures]

    def stream(
        self, picture: Picture, prompt: str, *, sampling: Sampling | None = None, max_new_tokens: int = STREAM_TOKENS
    ) -> Iterator[str]:
        """The answer to a prompt about one picture, in pieces of text, each as soon as it is generated.

        Args:
            prompt: used word for word, such as "caption en" or "answer en what is this?".

        >>> "".join(model.stream(paligemma.EXAMPLE_PICTURE, "answer en what color is the cross?"))
        'orange'
        """
        steps = self._steps(self.look(picture), prompt, sampling, max_new_tokens)

        def pieces() -> Iterator[str]:
            stream = self.processor.stream()
            with machine.memory_errors("answering"):
                yield from filter(None, (stream.put(int(step.tokens)) for step in steps))
            yield from filter(None, [stream.end()])

        return pieces()

    def look(self, picture: Picture) -> "EncodedPicture":
        """Encodes the picture once. Each question about the returned EncodedPicture then runs only the decoder.

        >>> with model.look(paligemma.EXAMPLE_PICTURE) as picture:
        ...     picture.count("hearts"), picture.ask("what color is the heart?")
        (1, 'purple')
        """
        return picture if isinstance(picture, EncodedPicture) else EncodedPicture(self, picture)

    def explain(self, picture: Picture, prompt: str, answer: str | None = None) -> "Explanation":
        """Shows what an answer depends on: for each word a map over the patches, the alternatives, and the effect of the picture.

        Args:
            prompt: used word for word, such as "caption en".
            answer: the answer to explain; if not given, the most likely answer of the model.
        Returns: an Explanation; explanation_sheet.draw_explanation(picture, explanation) draws it.
        """
        from paligemma.explanation import explain

        encoded = self.look(picture)
        if answer is None:
            ids = [int(step.tokens) for step in self._steps(encoded, prompt, None, STREAM_TOKENS)]
        else:
            ids = [*self.processor.encode(answer), self.processor.eos_token_id]
        return explain(self.network, self.processor, self.processor(encoded.picture, prompt, notes=[]), ids)

    def _steps(
        self, picture: "EncodedPicture", prompt: str, sampling: Sampling | None, max_new_tokens: int
    ) -> Iterator[Step]:
        """The tokens of one answer. Raises: PromptError or GenerationError before the first token."""
        inputs = self.processor.tokens([1], prompt) | {"image_features": picture.features}
        unused = self.processor.unused_ids(self.network.config.text_config.vocab_size)
        return generate_steps(self.network, inputs, max_new_tokens, sampling or Sampling(), suppress_tokens=unused)

    def _run(
        self, task: str, pictures: list[Any], text: str, sampling: Sampling | None, max_new_tokens: int | None, **options: Any
    ) -> list[Result]:
        """The result of each picture. Raises: the first error among the results."""
        if warning := task_warning(task, self.kind):
            warnings.warn(warning, stacklevel=5 if task in OBJECT_TASKS else 4)
        annotator = Annotator(
            self.network,
            self.processor,
            codec=self.codec,
            rows=max(1, min(self.batch_size, len(pictures))),
            max_new_tokens=MAX_ANSWER_TOKENS[task] if max_new_tokens is None else max_new_tokens,
            kind=self.kind,
            sampling=sampling,
            **options,
        )
        requests = (
            Request(picture=each.picture, task=task, text=text, size=each.picture.size, image_features=each.features)
            if isinstance(each, EncodedPicture)
            else Request(picture=each, task=task, text=text)
            for each in pictures
        )
        results = []
        for result in in_order(annotator.run(requests), len(pictures)):
            if result.error is not None:
                raise result.error
            results.append(result)
        return results

    def _find(
        self, task: str, pictures: list[Any], labels: tuple[object, ...], sampling: Sampling | None, max_new_tokens: int | None,
        **options: Any,
    ) -> list[DetectionResult]:  # fmt: skip
        """The objects in each picture. Loads a picture here if DetectionResult.draw will not be able to read it a second time."""
        if wrong := [label for label in labels if not isinstance(label, str)]:
            raise UsageError(f"a label is {wrong[0]!r}, which is not a str. Pass each label as a separate str: 'car', 'person'.")
        pictures = [each if can_be_reloaded(each) else load_image(each) for each in pictures]
        results = self._run(task, pictures, " ; ".join(map(str, labels)), sampling, max_new_tokens, **options)
        return [DetectionResult(*pair) for pair in zip(results, pictures, strict=True)]


def for_encoded(method: TaskMethod[Options, T]) -> "Callable[Concatenate[EncodedPicture, Options], T]":
    """A method of EncodedPicture that calls `method` of Model with the encoded picture as its first argument."""
    name = cast(Any, method).__name__

    @functools.wraps(cast(Any, method))
    def for_this_picture(self: "EncodedPicture", *args: Options.args, **options: Options.kwargs) -> Any:
        return getattr(self._model, name)(self, *args, **options)

    owner, _, *options = inspect.signature(cast(Any, method)).parameters.values()
    for_this_picture.__dict__["__signature__"] = inspect.Signature([owner, *options])
    return cast("Callable[Concatenate[EncodedPicture, Options], T]", for_this_picture)


class EncodedPicture:
    """A picture with its image features, made by Model.look. It has the methods of Model, without their first argument.

    Leaving the `with` block, or `close`, frees the features.

    Attributes:
        picture: the original picture, RGB and upright.
        features: float[1, P, D] from encode_images, in the dtype and on the device of the model.
    """

    def __init__(self, model: Model, picture: Any):
        self.picture = load_image(picture)
        self._model = model
        with torch.no_grad(), machine.memory_errors("encoding the picture"):
            self._features: Tensor | None = model.network.encode_images(model.processor.pixels([self.picture]))

    @property
    def features(self) -> Tensor:
        if self._features is None:
            raise UsageError("this picture is closed. Ask inside the `with` block, or call model.look(...) again.")
        return self._features

    def close(self) -> None:
        self._features = None

    def __enter__(self) -> "EncodedPicture":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    caption = for_encoded(Model.caption)
    ask = for_encoded(Model.ask)
    detect = for_encoded(Model.detect)
    segment = for_encoded(Model.segment)
    ocr = for_encoded(Model.ocr)
    count = for_encoded(Model.count)
    embed = for_encoded(Model.embed)

    def stream(
        self, prompt: str, *, sampling: Sampling | None = None, max_new_tokens: int = STREAM_TOKENS
    ) -> Iterator[str]:
        """See Model.stream."""
        return self._model.stream(self, prompt, sampling=sampling, max_new_tokens=max_new_tokens)

    def explain(self, prompt: str, answer: str | None = None) -> "Explanation":
        """See Model.explain."""
        return self._model.explain(self, prompt, answer)


def load(
    name: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    quantize: Literal["int8", "int4"] | None = None,
    quantize_vision: bool = False,
    graphs: Literal["auto", "off", "record", "compile"] | None = None,
    revision: str | None = None,
    base_model: str | os.PathLike[str] | None = None,
    mask_codec: str | os.PathLike[str] | None = None,
    batch_size: int = 4,
    allow_nonfinite: bool = False,
) -> Model:
    """Loads a checkpoint and returns it as a Model.

    Args:
        name: a hub id such as "google/paligemma2-3b-mix-224", which is downloaded; or the folder of a checkpoint or of a LoRA
            adapter, whose base model is also loaded. None = the bundled demo model, which knows only coloured shapes.
        device: "auto" (a GPU if there is one; several if the model is too large for one), "cpu", "cuda", "cuda:1", "mps", several
            cards such as "cuda:0,cuda:1", or a torch.device.
        dtype: "bf16", "fp16", "fp32", or a torch.dtype; None = the dtype of the checkpoint on a CPU, and on a GPU a dtype that it
            computes fast. model.network.dtype is what was chosen.
        quantize: store the decoder's weights in 8 or 4 bits: smaller and faster, but a little less exact.
        quantize_vision: also quantize the vision tower.
        graphs: how a CUDA card runs decoding steps; None = the value of the variable PALIGEMMA_GRAPHS, else "auto".
        revision: branch, tag or commit of a hub id.
        base_model: the base model of an adapter, if it is not in the place that the adapter's config names.
        mask_codec: vae-oid.npz, which decodes the masks of `segment`; None = the file of that name in the model's folder.
        batch_size: if a method gets a list of pictures, the number of pictures in one batch.
        allow_nonfinite: load even if weights are NaN or infinite.
    Raises: CheckpointError, TokenizerError, AccessError, DeviceError, UsageError.

    >>> import paligemma
    >>> model = paligemma.load()
    >>> model
    <paligemma.Model bundled: 7.0 MB of weights, torch.bfloat16, cpu>
    """
    find_devices(device)
    graphs_mode(graphs)
    if quantize_vision and quantize is None:
        raise UsageError("quantize_vision needs quantize, which is None. Add quantize='int8' or 'int4'.")
    model_path, base, codec_file = (None if path is None else files.as_text(path) for path in (name, base_model, mask_codec))
    ahead = read_ahead.begin(model_path, device, dtype, quantize, revision=revision)
    checkpoint = open_checkpoint(model_path, revision=revision, base_model=base)
    checkpoint.ahead = ahead
    codec = find_codec(checkpoint.base, codec_file)
    network = checkpoint.load(
        device=device,
        dtype=dtype,
        quantize=quantize,
        quantize_vision=quantize_vision,
        graphs=graphs,
        allow_nonfinite=allow_nonfinite,
    )
    return Model(
        network,
        checkpoint.processor,
        name="bundled" if model_path is None else Path(model_path).name if os.path.isdir(model_path) else model_path,
        kind=checkpoint.kind,
        codec=None if codec is None else load_codec(codec),
        batch_size=batch_size,
    )
