"""What is in the files of a model, and whether it fits together: settings, names, numbers, tokenizer, what enters the decoder.

Every check reads what it needs by itself, so that a folder with several faults gets several failed rows. For large files,
only the headers and a sample of each tensor are read; `is_full` reads everything. Therefore a tensor that is wrong in only a few
places is found only with `is_full`; loading the model always finds it (safetensors_files.check_values).

Checked in tests/checkup/test_model_files.py, with a folder for each fault.
Shapes: P patches per image, L tokens fed in this call, D model width (of the tower or of the decoder).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from paligemma.checkpoints import processor_files
from paligemma.checkpoints.adapters import read_adapter
from paligemma.checkpoints.file_names import has_adapter, has_weights
from paligemma.checkpoints.headers import FLOATS, StoredTensor
from paligemma.checkpoints.hub import resolve
from paligemma.checkpoints.safetensors_files import CHUNK_ELEMENTS, DTYPES, TensorReader
from paligemma.checkpoints.weights import (
    POSITIONS,
    ModelFiles,
    check_names,
    empty_model,
    find_tensors,
    own_tensors,
    run_dtype,
    stored_dtype,
)
from paligemma.checkup.rows import FAILED, Row, failed, failed_by, note
from paligemma.errors import CheckpointError, PaliGemmaError
from paligemma.files import BUNDLED, CODEC_NAME, is_file
from paligemma.layers import acceleration, quantization
from paligemma.layers.int_formats import dequantize
from paligemma.machine import format_bytes
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
from paligemma.pictures.images import load_image
from paligemma.processing_paligemma import PaliGemmaProcessor, build_pixel_table
from paligemma.tokenization import PromptTokenizer
from paligemma.vocabulary import CODE_TOKENS, LOCATION_TOKENS

SAMPLE_BYTES = 2**16  # read at the beginning, in the middle and at the end of each tensor
SMALL_BYTES = 2**26  # files that are smaller are read completely
MAX_PATCHES = 64  # the tower encodes at most this many patches of the bundled picture
FIRST_WORD, WORDS = 4, 512  # the first token after <pad>, <eos>, <bos> and <unk>; how many tokens are compared
ROUNDING = 0.01  # allowed relative error of a factor, because sqrt(D) is rounded to bfloat16
MAX_NAMED = 3  # a message names at most this many faulty tensors
DOWNLOAD = "Download the model again, or convert it again from the original."
# A position table counts as enlarged if its relative distance from an interpolated table is smaller than this.
INTERPOLATED = 1e-3
# The modules that make the vectors that enter the decoder; and the norm, from which model.device and model.dtype are read.
FRONT = ("vision_tower.", "multi_modal_projector.", "language_model.model.embed_tokens", "language_model.model.norm")


class Opened(ModelFiles):
    """ModelFiles, and what several checks need. Each property raises an error of its own, so that other checks still run."""

    @cached_property
    def quantization(self) -> quantization.Quantization:
        return quantization.choose(self.raw, self.base, None, False)

    def empty_model(self) -> PaliGemmaForConditionalGeneration:
        """The model without weights, with the modules that the files hold (quantised or not)."""
        model = empty_model(self.config)
        kind, with_vision, is_stored = self.quantization
        for name in quantization.targets(model, vision=with_vision) if is_stored else ():
            model.set_submodule(name, quantization.empty_module(model.get_submodule(name), kind, torch.bfloat16))
        return model


# Settings and names


def model_rows(opened: Opened) -> list[Row]:
    """Family, size and resolution, from config.json."""
    config = opened.config
    text, vision = config.text_config, config.vision_config
    family = "PaliGemma 2" if text.is_gemma2 else "PaliGemma 1"
    count = sum(parameter.numel() for parameter in empty_model(config).parameters())
    layers = f"{vision.num_hidden_layers} + {text.num_hidden_layers} layers"
    value = f"{family}, {count / 1e6:,.1f} million parameters, {layers}, width {text.hidden_size}, {vision.image_size} px"
    return [Row("model", value)]


def weights_rows(opened: Opened) -> list[Row]:
    """How many tensors of which dtype the files hold. Failed if a file is missing, truncated or damaged."""
    bytes_of = Counter()
    for tensor in opened.tensors.values():
        bytes_of[tensor.dtype] += tensor.num_bytes
    dtypes = ", ".join(f"{format_bytes(size)} in {dtype}" for dtype, size in bytes_of.most_common())
    return [Row("weights", f"{len(opened.tensors)} tensors: {dtypes}")]


def names_and_shapes_rows(opened: Opened) -> list[Row]:
    """Missing and unknown names, wrong dtypes and shapes."""
    quantised = opened.quantization
    check_names(opened.empty_model(), opened.raw, opened.tensors, opened.base)
    kind = f", stored as {quantised.kind}{', vision too' if quantised.with_vision else ''}" if quantised.is_stored else ""
    return [Row("names and shapes", f"all as config.json says{kind}")]


def adapter_rows(opened: Opened) -> list[Row]:
    """The adapter in the folder, if there is one: whether it fits its base model, and whether its numbers are finite."""
    if opened.adapter_config is None:
        return []
    adapter = read_adapter(opened.folder, opened.adapter_config)
    scalings = adapter.checked_scalings(empty_model(opened.config))
    base = "its own folder" if opened.base == opened.folder else opened.base
    rows = [Row("adapter", f"changes {len(scalings)} matrices of the base model in {base}")]
    ends = {name: lowest_and_highest(tensor, is_full=True) for name, tensor in adapter.stored.items()}
    if faulty := [name for name, (low, high) in ends.items() if not (math.isfinite(low) and math.isfinite(high))]:
        rows.append(faulty_row("NaN or infinity in the adapter", "NaN or infinity", faulty))
    return rows


def position_table_rows(opened: Opened) -> list[Row]:
    """Whether the table of position vectors has one row per patch, and whether it was enlarged from a smaller resolution.

    Returns: nothing if there is no table, because names_and_shapes_rows reports a missing tensor.
    """
    vision = opened.config.vision_config
    if POSITIONS not in opened.tensors:
        return []
    stored = opened.tensors[POSITIONS]
    table = TensorReader(torch.device("cpu"), allow_nonfinite=True).read(stored, torch.float32)  # [P, D]
    side = vision.image_size // vision.patch_size
    value = f"{len(table)} rows for {side} x {side} patches"
    if len(table) != side**2:
        fitting = math.isqrt(len(table)) * vision.patch_size
        advice = f"Take config.json and weights from the same model, or set image_size to {fitting}."
        return [failed("position table", value, advice, CheckpointError.code)]
    if (smaller := enlarged_from(table, DTYPES[stored.dtype])) is not None:
        text = f"{value}, but it was enlarged from {smaller} x {smaller} and not trained since"
        return [note("position table", text, "Take a checkpoint that was trained at this resolution; small text is read badly.")]
    return [Row("position table", value)]


def enlarged_from(table: Tensor, stored_dtype: torch.dtype = torch.float32) -> int | None:
    """The side of the smaller grid that a position table was interpolated from, bilinearly; None if it was not.

    Args:
        table: float32[P, D], where P is the square of the grid's side.
        stored_dtype: the dtype that the table was rounded to after it was interpolated.
    """
    side = math.isqrt(len(table))
    grid = table.view(side, side, -1)
    rounding = torch.finfo(stored_dtype).eps / 2 * grid.norm()  # rounding changes each number by at most eps / 2 of it
    largest_distance = INTERPOLATED * (grid - grid.mean((0, 1))).norm() + rounding
    for smaller in (side // 2, side // 4):
        if smaller < 2:
            continue
        for aligned in (True, False):  # whether the corners of both grids coincide, as in scipy's zoom, which big_vision uses
            units = torch.eye(smaller)[None]
            matrix = nn.functional.interpolate(units, size=side, mode="linear", align_corners=aligned)[0].T
            onto = matrix @ torch.linalg.pinv(matrix)  # the projection onto interpolated columns
            nearest = torch.einsum("ij,jkd,lk->ild", onto, grid, onto)
            if (grid - nearest).norm() < largest_distance:
                return smaller
    return None


# Numbers


def samples(tensor: StoredTensor, is_full: bool) -> Iterator[Tensor]:
    """The values of a stored tensor, or a sample of them, as parts in order."""
    dtype = DTYPES[tensor.dtype]
    size = SAMPLE_BYTES // dtype.itemsize * dtype.itemsize
    starts = [0, (tensor.num_bytes - size) // 2 // dtype.itemsize * dtype.itemsize, tensor.num_bytes - size]
    if is_full or tensor.num_bytes <= 3 * size:
        size = CHUNK_ELEMENTS * dtype.itemsize
        starts = list(range(0, tensor.num_bytes, size))
    with open(tensor.file, "rb") as stream:
        for start in starts:
            stream.seek(tensor.start + start)
            content = bytearray(stream.read(min(size, tensor.num_bytes - start)))
            yield torch.frombuffer(content, dtype=dtype)


def lowest_and_highest(tensor: StoredTensor, is_full: bool) -> tuple[float, float]:
    """The extreme values of a stored tensor, or of a sample of it. NaN if a value is NaN; 0 if the tensor is empty."""
    ends = [torch.stack(torch.aminmax(part)) for part in samples(tensor, is_full) if len(part)]
    if not ends:
        return 0.0, 0.0
    low, high = torch.stack(ends).aminmax(dim=0)
    return float(low[0]), float(high[1])


def faulty_row(name: str, what: str, tensors: list[str]) -> Row:
    """The failed row for tensors that hold NaN or infinity, only zeros, or only one value."""
    holds = "tensor holds" if len(tensors) == 1 else "tensors hold"
    more = f" and {len(tensors) - MAX_NAMED} more" if len(tensors) > MAX_NAMED else ""
    advice = DOWNLOAD + (" --allow_nonfinite loads it as it is." if what == "NaN or infinity" else "")
    value = f"{len(tensors)} {holds} {what}: {', '.join(tensors[:MAX_NAMED])}{more}"
    return failed(name, value, advice, CheckpointError.code)


def numbers_rows(opened: Opened, is_full: bool) -> list[Row]:
    """NaN and infinity, matrices of zeros, and matrices whose numbers are all equal."""
    total = sum(tensor.num_bytes for tensor in opened.tensors.values())
    is_full = is_full or total <= SMALL_BYTES
    faulty: dict[str, list[str]] = {"NaN or infinity": [], "only zeros": [], "only one value": []}
    for name, tensor in opened.tensors.items():
        if tensor.dtype not in FLOATS:
            continue
        low, high = lowest_and_highest(tensor, is_full)
        if not (math.isfinite(low) and math.isfinite(high)):
            faulty["NaN or infinity"].append(name)
        elif low == high and len(tensor.shape) > 1 and math.prod(tensor.shape) > 1:
            faulty["only zeros" if low == 0 else "only one value"].append(name)
    read = "all numbers" if is_full else f"{SAMPLE_BYTES >> 10} KB at the beginning, middle and end of each tensor"
    rows = [faulty_row(what, what, names) for what, names in faulty.items() if names]
    return rows or [Row("numbers", f"finite, and no matrix is constant (read: {read})")]


# Tokenizer and pictures


def tokenizer_rows(opened: Opened) -> list[Row]:
    """The ids of <loc>, <seg> and <image>, which must be consecutive and agree with config.json."""
    image_token = opened.config.image_token_index
    folder = processor_files.find_tokenizer_folder(opened)
    settings = processor_files.read_settings(folder / "tokenizer_config.json", processor_files.TokenizerError)
    tokenizer = processor_files.read_tokenizer(folder)
    processor_files.add_missing_tokens(tokenizer)
    ids = processor_files.find_ids(tokenizer, settings, opened, folder)
    processor_files.check_tokenizer(PromptTokenizer(tokenizer, ids, 512), opened)
    loc, seg = ([tokenizer.token_to_id(tokens[i]) for i in (0, -1)] for tokens in (LOCATION_TOKENS, CODE_TOKENS))
    value = f"<loc> {loc[0]} to {loc[1]}, <seg> {seg[0]} to {seg[1]}, <image> {image_token} as in config.json"
    return [Row("tokenizer", value)]


def pictures_rows(opened: Opened) -> list[Row]:
    """The settings for pictures, which must agree with config.json; and whether there is a mask codec."""
    folder = opened.folder if any(is_file(opened.folder / name) for name in processor_files.IMAGE_FILES) else opened.base
    settings = {name: processor_files.read_settings(folder / name, CheckpointError) for name in processor_files.IMAGE_FILES}
    image_settings, path = processor_files.choose_image_settings(settings, folder)
    processor_files.check_image_settings(image_settings, opened.config, path)
    ends = build_pixel_table(*processor_files.read_normalization(image_settings, path))[:, [0, -1]]  # black and white, [C, 2]
    size, tokens = opened.config.vision_config.image_size, opened.config.num_image_tokens
    codec = "a mask codec" if is_file(opened.base / CODEC_NAME) else f"no {CODEC_NAME}, so segment gives boxes without masks"
    rows = [Row("pictures", f"{size} x {size} px, {tokens} tokens; {codec}")]
    if abs(ends - (-1, 1)).max() > 1 / 255:
        value = f"black is {ends[:, 0].min():.2g} and white is {ends[:, 1].max():.2g}; published models take -1 and 1"
        advice = f"Copy {path.name} from the original model, unless this model was trained with these settings."
        rows.append(note("numbers for pixels", value, advice))
    return rows


# Vectors that enter the decoder


def load_front(opened: Opened) -> PaliGemmaForConditionalGeneration:
    """The model on the CPU with the weights of tower, projector and embedding only, which are mapped from the files."""
    model = opened.empty_model()
    check_names(model, opened.raw, opened.tensors, opened.base)
    dtype = torch.bfloat16 if opened.quantization.is_stored else stored_dtype(opened.tensors)
    reader = TensorReader(torch.device("cpu"), allow_nonfinite=True)
    for name, module in model.named_modules():
        for key, own in own_tensors(module).items() if name.startswith(FRONT) else ():
            tensor = reader.read(opened.tensors[f"{name}.{key}"], run_dtype(own, dtype))
            setattr(module, key, nn.Parameter(tensor, requires_grad=False) if isinstance(own, nn.Parameter) else tensor)
    acceleration.accelerate(model.vision_tower)
    return model.eval()


@torch.no_grad()
def encode_sample(opened: Opened, model: PaliGemmaForConditionalGeneration) -> Tensor:
    """[1, P, D]: the vectors of at most MAX_PATCHES patches of the bundled picture, which attend to each other only."""
    pixels = PaliGemmaProcessor.from_files(opened)(load_image(BUNDLED / "shapes.png"), "")["pixel_values"]
    tower = model.vision_tower.vision_model
    x = tower.embeddings(pixels.to(model.dtype))  # [1, P, D]
    x = x[:, :: max(1, x.shape[1] // MAX_PATCHES)]
    return model.multi_modal_projector(tower.post_layernorm(tower.encoder(x)))


def stored_vectors(model: PaliGemmaForConditionalGeneration, ids: Tensor) -> Tensor:
    """The rows of the embedding matrix for these tokens, float32[L, D], without any factor."""
    embedding = model.language_model.model.embed_tokens
    if isinstance(embedding, quantization.QuantizedEmbedding):
        return dequantize(*embedding.lookup(ids), torch.float32)[:, : embedding.in_features]
    return embedding.weight[ids].float()


def factor(found: Tensor, original: Tensor) -> float:
    """The number c that makes c * original nearest to `found`; NaN if these are not proportional."""
    original = original.float()
    number = float((found * original).sum() / original.square().sum())
    is_multiple = float((found - number * original).norm()) <= ROUNDING * float(found.norm())
    return number if is_multiple else math.nan


@torch.no_grad()
def vectors_rows(opened: Opened) -> list[Row]:
    """The factors with which vectors of a picture and of words enter the decoder, and the norms of these vectors.

    Gemma multiplies the vectors of words by sqrt(D). Those of a picture come from the projector and are not multiplied. A program
    that confuses this, or a checkpoint that was converted for such a program, changes the ratio of the norms by sqrt(D). So a
    ratio from D^(-1/4) to D^(1/4) is expected: if a ratio in this range is multiplied or divided by sqrt(D), the result lies
    outside the range.
    """
    model, text = load_front(opened), opened.config.text_config
    features = encode_sample(opened, model)  # [1, P, D]
    if not bool(features.isfinite().all()):
        return [failed("norms of vectors", "the vectors of a picture are not finite", DOWNLOAD, CheckpointError.code)]
    words = torch.arange(FIRST_WORD, text.vocab_size, max(1, text.vocab_size // WORDS))
    words = words[words != opened.config.image_token_index]  # [L]
    patches = torch.full((features.shape[1],), opened.config.image_token_index)
    entering = model.embed(torch.cat((patches, words))[None], features)[0].float()  # [P + L, D]
    picture_vectors, word_vectors = entering.split([len(patches), len(words)])  # [P, D], [L, D]
    row = factor_row(model, features[0], picture_vectors, words, word_vectors)
    return [row, norm_row(model, picture_vectors.norm(dim=-1), word_vectors.norm(dim=-1))]


def factor_row(
    model: PaliGemmaForConditionalGeneration, features: Tensor, picture_vectors: Tensor, words: Tensor, word_vectors: Tensor
) -> Row:
    """Whether the decoder gets picture vectors as they are, and word vectors times sqrt(D).

    Args:
        features: [P, D], what the projector made.
        picture_vectors, word_vectors: float32[P, D] and float32[L, D], what enters the decoder.
        words: int64[L], the tokens.
    """
    width = features.shape[-1]
    on_picture, on_words = factor(picture_vectors, features), factor(word_vectors, stored_vectors(model, words))
    value = f"picture {on_picture:.4g}, words {on_words:.4g}; 1 and sqrt({width}) = {width**0.5:.4g} are right"
    if abs(on_picture - 1) <= ROUNDING and abs(on_words / width**0.5 - 1) <= ROUNDING:
        return Row("factors on vectors", value)
    return failed("factors on vectors", value, "This is a fault of the program, not of the model: please report it.", 1)


def norm_row(model: PaliGemmaForConditionalGeneration, pictures: Tensor, words: Tensor) -> Row:
    """The mean norms of picture and word vectors, given float32[P] and float32[L], and the expected range of their ratio."""
    width = model.config.text_config.hidden_size
    ratio, low, high = float(pictures.mean() / words.mean()), width**-0.25, width**0.25
    value = f"picture {pictures.mean():.3g}, words {words.mean():.3g}, ratio {ratio:.3g}; expected {low:.2g} to {high:.2g}"
    scales = model.vision_tower.vision_model.post_layernorm.weight.float()
    # The norms of D random numbers vary by 1 / sqrt(2 D) of their mean; those of a trained embedding by several times as much.
    if not float(scales.std()) > 0 or float(words.std() / words.mean()) < 1.5 / (2 * width) ** 0.5:
        return Row("norms of vectors", f"{value}; the weights are random, so any ratio is possible")
    if low <= ratio <= high:
        return Row("norms of vectors", value)
    longer = "picture vectors" if ratio > high else "word vectors"
    advice = f"Was the model converted for a program that scales {longer}? Compare its answers with those of the original."
    return note("norms of vectors", value, advice)


# All checks


def open_files(name: str | Path, revision: str | None, base_model: str | None) -> tuple[Opened | None, list[Row]]:
    """The files of a model; or None, and a row with the reason why they cannot be opened."""
    try:
        return Opened(name, revision, base_model), []
    except PaliGemmaError as error:
        return None, [failed_by("settings", error)]


def weights_without_settings_rows(name: str, revision: str | None) -> list[Row]:
    """All that can be said about a folder whose settings cannot be read: whether its weights are undamaged.

    Returns: nothing for an adapter, whose weights are those of its base model.
    """
    folder = resolve(name, revision)
    if has_adapter(folder) and not has_weights(folder):
        return []
    return [Row("weights", f"{len(find_tensors(folder))} tensors, not damaged")]


def checkpoint_rows(
    name: str | None, revision: str | None, base_model: str | None, is_full: bool, check: Callable[..., list[Row]]
) -> Iterator[Row]:
    """The rows of all checks of a model, each as soon as it is known. A fault that several checks meet is reported once.

    Args:
        name, revision, base_model: as in open_checkpoint in paligemma/opened.py.
        is_full: read all numbers, which takes long for large files.
        check: calls a function, see rows.run_check.
    """
    yield Row("name", "the bundled model" if name is None else name)
    name = str(BUNDLED) if name is None else name
    opened, rows = open_files(name, revision, base_model)
    yield from check(lambda: rows)
    calls: list[tuple] = [(weights_without_settings_rows, name, revision)]
    if opened is not None:
        files = model_rows, weights_rows, names_and_shapes_rows, adapter_rows, position_table_rows, tokenizer_rows, pictures_rows
        calls = [(rows_of, opened) for rows_of in files] + [(numbers_rows, opened, is_full), (vectors_rows, opened)]
    seen = {row.value for row in rows}
    for call in calls:
        for row in check(*call, code=CheckpointError.code):
            if row.state != FAILED or row.value not in seen:
                yield row
            seen.add(row.value)
