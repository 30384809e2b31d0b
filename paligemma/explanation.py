"""Where an answer comes from: for each word a heat map over the picture, what else was considered, and what the picture changed.

Three questions are asked of an answer that was given (`explain`), and drawn on one sheet (`draw_explanation`):
- Where? Two maps a word. `gradient` is how far its logits hang on the vector of each patch, to first order: the sum of
  |gradient * (vector - mean of all vectors)|. `roll_out` follows attention from the word back to the patches, through decoder
  and tower, heads averaged, half of each layer passed by (the residual).
- What else? The likeliest tokens in its place, and the entropy of the choice.
- From the picture at all? Log-likelihood of the answer with this picture, less that with a flat one of its mean colour.

The model's files are not touched: hooks note what enters each attention module, and `decoder_weights` and `tower_weights` make
its weights of that, with the module's own projections. notes/looking.md measures how far the maps can be trusted.

Sources: attention roll-out (arXiv:2005.00928, equation 1), gradient * (input - reference) (arXiv:1704.02685), of logits, since
a probability near 1 has no gradient left (arXiv:1610.02391, section 3). Checked in tests/test_explanation.py. Shapes: B batch,
I pictures, N heads, E width of one head, L tokens of picture, prompt and answer, S keys, P patches, T tokens of the answer,
W words, D width of the decoder, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from paligemma.errors import PromptError, counted
from paligemma.generation import only_row
from paligemma.modeling_gemma import rotate
from paligemma.objects.drawing import PALETTE, clean, draw_box
from paligemma.objects.lettering import lettering
from paligemma.objects.outputs import NormalizedBox, group_objects, split_ids
from paligemma.pictures.images import load_image
from paligemma.processing_paligemma import SPACE, PaliGemmaProcessor
from paligemma.vocabulary import LOCATION_OR_CODE, LOCATIONS_PER_BOX

ALTERNATIVES = 5  # tokens that are named in the place of each
# Nats: an answer that the picture makes less than twice as likely hardly depends on it. Measured by notes/looking_figures.py.
LEAST_DEPENDENCE = math.log(2)
NO_GRADIENT = (
    "quantised weights have no gradient, so the maps show attention alone. Load the model unquantised for those of the gradient."
)

WIDTH, MARGIN, GAP, PAD = 1240, 28, 18, 12  # pixels
CARDS = 5  # side by side
INK, SOFT, FAINT, SHEET = "#22262b", "#707780", "#e4e6e9", "#f6f7f8"
BLUE, SKY, ORANGE, GREEN = PALETTE[4], PALETTE[1], PALETTE[5], PALETTE[2]
BARS = 3  # alternatives that a card shows
GLOW = ((0.0, (255, 255, 255)), (0.35, (255, 214, 92)), (0.7, (240, 112, 24)), (1.0, (176, 18, 40)))  # of a heat map


# What comes out


@dataclass(frozen=True)
class Token:
    """One token of the answer.

    Args:
        text: how the vocabulary spells it, a space as a space.
        logprob: of the token, given picture, prompt and all before it; blank_logprob: the same with a blank picture.
        entropy: of the whole choice, in nats: 0 = no doubt, ln k = as if among k equals.
        alternatives: the likeliest tokens in its place and their probabilities, itself among them if it is one of these.
    """

    id: int
    text: str
    logprob: float
    blank_logprob: float
    entropy: float
    alternatives: tuple[tuple[str, float], ...]

    @property
    def dependence(self) -> float:
        return self.logprob - self.blank_logprob


@dataclass(frozen=True, eq=False)
class Word:
    """A word of the answer, or an object: its four locations, codes and label are one.

    Args:
        text: without the space before it; of an object the label.
        tokens: their places in the answer.
        roll_out: float32[rows, columns] over the patches; sums to `share`.
        gradient: the same shape, in units of logits; None where the weights have no gradient.
        share: of the roll-out that ends in the picture, the rest in prompt and answer; 0 to 1.
        box: of an object.
        logprob, dependence: sums over its tokens.
    """

    text: str
    tokens: range
    roll_out: Tensor
    gradient: Tensor | None
    share: float
    box: NormalizedBox | None
    logprob: float
    dependence: float


@dataclass(frozen=True, eq=False)
class Explanation:
    """An answer taken apart. `notes` says in a sentence each what could not be done."""

    prompt: str
    text: str
    tokens: list[Token]
    words: list[Word]
    notes: list[str]

    @property
    def logprob(self) -> float:
        return sum(token.logprob for token in self.tokens)

    @property
    def blank_logprob(self) -> float:
        return sum(token.blank_logprob for token in self.tokens)

    @property
    def dependence(self) -> float:
        """How many nats the picture adds to the log-likelihood of the answer."""
        return self.logprob - self.blank_logprob

    @property
    def warning(self) -> str | None:
        """A sentence if the answer hardly depends on the picture."""
        if self.dependence >= LEAST_DEPENDENCE:
            return None
        return f"this answer hardly depends on the picture: it is {times(self.dependence)} as likely as with a blank one."

    def to_json(self) -> dict:
        """The same as data: maps as rows from top to bottom, boxes [x_min, y_min, x_max, y_max] from 0 to 1, tokens by place."""
        tokens = [
            {"id": token.id, "text": token.text, "logprob": token.logprob, "blank_logprob": token.blank_logprob,
             "entropy": token.entropy, "alternatives": [{"text": text, "probability": p} for text, p in token.alternatives]}
            for token in self.tokens
        ]  # fmt: skip
        words = [
            {"text": word.text, "tokens": list(word.tokens), "logprob": word.logprob, "dependence": word.dependence,
             "box_normalized": None if word.box is None else list(word.box.xyxy(1, 1)), "picture_share": word.share,
             "roll_out": word.roll_out.tolist(), "gradient": None if word.gradient is None else word.gradient.tolist()}
            for word in self.words
        ]  # fmt: skip
        return {
            "prompt": self.prompt, "text": self.text, "logprob": self.logprob, "blank_logprob": self.blank_logprob,
            "dependence": self.dependence, "warning": self.warning, "notes": self.notes, "tokens": tokens, "words": words,
        }  # fmt: skip


def times(nats: float) -> str:
    """A log-ratio in words: "3.2 times", "10^12 times"."""
    return f"{math.exp(nats):.2g} times" if abs(nats) < math.log(1e4) else f"10^{nats / math.log(10):.0f} times"


def signed(value: float, digits: int) -> str:
    """The number with its sign, but no minus before a zero."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


# Attention, written out


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, cap: float | None) -> Tensor:
    """Who looks at whom by how much: float32[B, N, L, S], rows sum to 1; arguments as modeling_gemma.attention."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # [B, N, S, E]
    scores = (q @ k.transpose(2, 3)).float() * scale  # [B, N, L, S]
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1)


@torch.no_grad()
def decoder_weights(
    attention: nn.Module, x: Tensor, _position_ids: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, _cache: None
) -> Tensor:
    """float32[B, N, L, L] of a GemmaAttention, from the arguments of its forward without a cache."""
    q, k = (project(x).unflatten(-1, (-1, attention.width)).transpose(1, 2) for project in (attention.q_proj, attention.k_proj))
    return attention_weights(rotate(q, *rotation), rotate(k, *rotation), mask, attention.scale, attention.cap)


@torch.no_grad()
def tower_weights(attention: nn.Module, x: Tensor) -> Tensor:
    """float32[I, N, P, P] of a SiglipAttention, from the argument of its forward."""
    q, k = (project(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2) for project in (attention.q_proj, attention.k_proj))
    return attention_weights(q, k, None, q.shape[-1] ** -0.5, None)


@contextmanager
def recording(modules: Iterable[nn.Module]) -> Iterator[list[tuple]]:
    """Inside, every call of a module adds (module, its arguments...) to the list."""
    calls: list[tuple] = []
    hooks = [module.register_forward_pre_hook(lambda module, args: calls.append((module, *args))) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def roll_out(rows: Tensor, weights: Iterable[Tensor]) -> Tensor:
    """Follows attention back through layers: of each row's mass half stays where it is, half goes where the heads look.

    Args:
        rows: float32[W, L], each sums to 1.
        weights: float32[1, N, L, L] of each layer, the last layer first.
    Returns: float32[W, L], at the input of the first of these layers; each row still sums to 1.
    """
    for layer in weights:
        rows = (rows + rows @ layer[0].mean(0)) / 2
    return rows


# The answer in words


def objects(token_ids: list[int], processor: PaliGemmaProcessor) -> Iterator[tuple[str, range, NormalizedBox]]:
    """Label, tokens and box of each object that has all four locations."""
    for item in group_objects(split_ids(token_ids, processor)):
        if len(item.locations) == LOCATIONS_PER_BOX:
            last = max(item.location_tokens[-1] + len(item.codes), *item.label_tokens, 0)
            yield item.label, range(item.location_tokens[0], last + 1), NormalizedBox.from_locations(item.locations)


def split_words(token_ids: list[int], processor: PaliGemmaProcessor) -> list[tuple[str, range, NormalizedBox | None]]:
    """The answer's words and objects in their order: text, the places of the tokens, and the box of an object.

    A word begins with white space; what has neither letter nor digit is no word.
    """
    found: list[tuple[str, range, NormalizedBox | None]] = list(objects(token_ids, processor))
    taken = {place for _, places, _ in found for place in places}
    stream, spans = processor.stream(), []
    texts = [stream.put(number) for number in token_ids]  # a letter of several bytes comes whole, with its last
    for place, number in enumerate(token_ids):
        if place in taken or number in processor.control_ids:
            continue
        if spans and spans[-1].stop == place and not texts[place][:1].isspace():
            spans[-1] = range(spans[-1].start, place + 1)
        else:
            spans.append(range(place, place + 1))
    words = [("".join(texts[span.start : span.stop]).strip(), span, None) for span in spans]
    found += [word for word in words if any(letter.isalnum() for letter in word[0])]
    return sorted(found, key=lambda word: word[1].start)


def spelling(number: int, processor: PaliGemmaProcessor) -> str:
    """How the vocabulary spells a token, a space as a space."""
    return (processor.tokenizer.id_to_token(number) or f"<{number}>").replace(SPACE, " ")


# The model, asked


def answer_logits(model: nn.Module, row: dict, features: Tensor) -> Tensor:
    """Logits of every token in the place of each of the answer's, float32[T, V].

    Args:
        row: input_ids and token_type_ids int64[1, L], the answer's tokens with type 1.
        features: [1, P, D] of the picture.
    """
    x = model.hidden(row["input_ids"], None, None, row["token_type_ids"], features)  # [1, L, D]
    num_tokens = int(row["token_type_ids"].sum())
    return model.language_model.logits(x[0, -num_tokens - 1 : -1])  # [T, V]


@torch.no_grad()
def roll_outs(tower_calls: list[tuple], decoder_calls: list[tuple], rows: Tensor, num_patches: int) -> Tensor:
    """Attention followed from the answer to the patches, float32[W, P]; what ends in prompt and answer is left out.

    Args:
        tower_calls, decoder_calls: what `recording` noted, layer by layer.
        rows: float32[W, L], where each word's mass begins.
    """
    rows = roll_out(rows, (decoder_weights(*call) for call in reversed(decoder_calls)))[:, :num_patches]  # [W, P]
    return roll_out(rows, (tower_weights(*call) for call in reversed(tower_calls)))


def gradient_maps(chosen: Tensor, spans: Sequence[range], features: Tensor) -> list[Tensor]:
    """How far each word hangs on each patch: by how much its logits would change, to first order, if the numbers of the patch's
    vector became those of the mean of all, one after another; changes are summed without their signs.

    Args:
        chosen: float32[T], logits of the answer's tokens, with their graph.
        spans: the places of each word's tokens.
        features: [1, P, D], a leaf of the graph.
    Returns: float32[P] a word.
    """
    vectors = features.detach()[0].float()
    deviation = vectors - vectors.mean(0)  # [P, D]
    maps = []
    for span in spans:
        (gradient,) = torch.autograd.grad(chosen[span.start : span.stop].sum(), features, retain_graph=True)
        maps.append((gradient[0].float() * deviation).abs().sum(-1))  # [P]
    return maps


def blank(pixel_values: Tensor) -> Tensor:
    """A flat picture of the mean colour."""
    return pixel_values.mean((2, 3), keepdim=True).expand_as(pixel_values)


def check(inputs: dict, token_ids: Sequence[int], model: nn.Module) -> dict:
    """The row of the question. Raises: PromptError unless it has one picture, as pixels, and an answer that fits behind it."""
    if inputs.get("pixel_values") is None:
        raise PromptError("an explanation looks at pixels, and none came. Pass the processor's pixel_values.")
    row = only_row(inputs, model.config)
    if len(row["pixel_values"]) != 1:
        raise PromptError(f"an answer about {len(row['pixel_values'])} pictures came. Explain it with one picture.")
    context = model.config.text_config.max_position_embeddings
    if not 0 < len(token_ids) <= context - len(row["input_ids"]):
        room = context - len(row["input_ids"])
        raise PromptError(f"the answer has {len(token_ids)} tokens. From 1 to {room} are needed, where the context ends.")
    return row


def read_tokens(logprobs: Tensor, blank_logprobs: Tensor, token_ids: list[int], processor: PaliGemmaProcessor) -> list[Token]:
    """The tokens with what was considered in their places; float32[T, V] with the picture and with a blank one."""
    entropy = torch.special.entr(logprobs.exp()).sum(-1).tolist()
    best, ids = (values.tolist() for values in logprobs.topk(min(ALTERNATIVES, logprobs.shape[1])))
    tokens = []
    for place, number in enumerate(token_ids):
        others = tuple(
            (spelling(other, processor), math.exp(value)) for other, value in zip(ids[place], best[place], strict=True)
        )
        values = logprobs[place, number].item(), blank_logprobs[place, number].item(), entropy[place]
        tokens.append(Token(number, spelling(number, processor), *values, others))
    return tokens


def make_word(
    text: str, places: range, box: NormalizedBox | None, tokens: list[Token], rolled: Tensor, gradient: Tensor | None
) -> Word:
    """A word from its maps float32[P], which become squares, as the processor squeezed the picture."""
    side = math.isqrt(len(rolled))
    own = tokens[places.start : places.stop]
    return Word(
        text=text,
        tokens=places,
        roll_out=rolled.view(side, side).cpu(),
        gradient=None if gradient is None else gradient.view(side, side).cpu(),
        share=rolled.sum().item(),
        box=box,
        logprob=sum(token.logprob for token in own),
        dependence=sum(token.dependence for token in own),
    )


def word_starts(spans: Sequence[range], num_prompt: int, length: int) -> Tensor:
    """float32[W, L]: each word's mass lies, in equal parts, on the places that foretell its tokens, one before each."""
    starts = torch.zeros(len(spans), length)  # [W, L]
    for start, span in zip(starts, spans, strict=True):
        start[num_prompt - 1 + span.start : num_prompt - 1 + span.stop] = 1 / len(span)
    return starts


def explain(model: nn.Module, processor: PaliGemmaProcessor, inputs: dict, token_ids: Sequence[int]) -> Explanation:
    """Takes an answer apart: two passes over picture, prompt and answer, and a way back through the decoder for each word.

    Args:
        model: PaliGemmaForConditionalGeneration.
        processor: of the same checkpoint.
        inputs: what the processor returned for one row with one picture.
        token_ids: the answer, from the model or from anybody else; an eos at its end counts.
    Raises: PromptError for more rows or pictures than one, no pixels, no token, or more than the context holds.
    """
    token_ids = [int(number) for number in token_ids]
    question, decoder = check(inputs, token_ids, model), model.language_model
    pixels, num_prompt = question["pixel_values"], len(question["input_ids"])
    answer = torch.tensor(token_ids)
    row = {
        "input_ids": torch.cat((question["input_ids"].cpu(), answer))[None].to(model.device),  # [1, L]
        "token_type_ids": torch.cat((question["token_type_ids"].cpu(), torch.ones_like(answer)))[None].to(model.device),  # [1, L]
    }
    # Integer weights leave no graph: only the residuals around them would be followed, and the maps would be wrong.
    has_gradient = all(tensor.is_floating_point() for tensor in (*decoder.parameters(), *decoder.buffers()))
    with torch.no_grad(), recording(layer.self_attn for layer in model.vision_tower.vision_model.encoder.layers) as tower_calls:
        features = model.encode_images(pixels)  # [1, P, D]
    features.requires_grad_(has_gradient)
    with torch.set_grad_enabled(has_gradient), recording(layer.self_attn for layer in decoder.model.layers) as decoder_calls:
        logits = answer_logits(model, row, features)  # [T, V]
        chosen = logits.gather(1, row["input_ids"][0, num_prompt:, None])[:, 0]  # [T]
    with torch.no_grad():
        blank_logits = answer_logits(model, row, model.encode_images(blank(pixels)))  # [T, V]
    tokens = read_tokens(logits.detach().log_softmax(-1), blank_logits.log_softmax(-1), token_ids, processor)
    found = split_words(token_ids, processor)
    spans = [places for _, places, _ in found]
    gradients = gradient_maps(chosen, spans, features) if has_gradient else [None] * len(spans)
    starts = word_starts(spans, num_prompt, row["input_ids"].shape[1]).to(model.device)  # [W, L]
    rolled = roll_outs(tower_calls, decoder_calls, starts, features.shape[1])  # [W, P]
    words = [
        make_word(text, places, box, tokens, rows, gradient)
        for (text, places, box), rows, gradient in zip(found, rolled, gradients, strict=True)
    ]
    prompt = processor.decode(question["input_ids"]).strip()
    return Explanation(prompt, processor.decode(token_ids), tokens, words, [] if has_gradient else [NO_GRADIENT])


# The sheet


def fitted(text: str, size: int, width: float) -> str:
    """As much of the text as is not wider than that many pixels."""
    text = clean(text)
    if lettering().width(text, size) <= width:
        return text
    while text and lettering().width(text + "…", size) > width:
        text = text[:-1]
    return text + "…"


def wrapped(text: str, size: int, width: float, most: int) -> list[str]:
    """The text in at most that many lines of at most that width; the last one is cut."""
    lines: list[str] = []
    for word in text.split():
        if lines and lettering().width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    kept = [*lines[: most - 1], " ".join(lines[most - 1 :])] if lines else []
    return [fitted(line, size, width) for line in kept if line]


def glow(share: Image.Image) -> Image.Image:
    """The colours of a map of shares, 0 to 255."""
    tables = []
    for channel in range(3):
        table = []
        for level in range(256):
            above = next(i for i in range(1, len(GLOW)) if level / 255 <= GLOW[i][0])
            (low, dark), (high, bright) = GLOW[above - 1], GLOW[above]
            table.append(round(dark[channel] + (bright[channel] - dark[channel]) * (level / 255 - low) / (high - low)))
        tables.append(table)
    return Image.merge("RGB", [share.point(table) for table in tables])


def heat_map(picture: Image.Image, values: Tensor) -> Image.Image:
    """The picture, pale and grey, and over it what the patches are worth: the largest value is the darkest red.

    Args:
        values: float32[rows, columns], from 0 up.
    """
    shares = values / values.max().clamp(min=1e-30)
    small = Image.fromarray((shares * 255).round().byte().numpy())
    share = small.resize(picture.size, Image.Resampling.BICUBIC)
    pale = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, "white"), 0.35)
    cover = share.point([min(225, round(1.6 * level)) for level in range(256)])
    return Image.composite(glow(share), pale, cover)


def by_text(alternatives: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Alternatives as a reader tells them apart: "cat" and " cat" are two tokens and one word; likeliest first."""
    shares: dict[str, float] = {}
    for text, probability in alternatives:
        shown = text.strip() or repr(text)[1:-1]
        shares[shown] = shares.get(shown, 0.0) + probability
    return sorted(shares.items(), key=lambda pair: -pair[1])


def draw_bars(sheet: Image.Image, x: int, y: int, width: int, bars: Sequence[tuple[str, float]]) -> None:
    """Alternatives and their probabilities, a line each; the longest bar is the probability 1."""
    draw, label, number = ImageDraw.Draw(sheet), int(0.42 * width), 46
    for line, (text, probability) in enumerate(bars):
        top, room = y + 21 * line, width - label - number
        lettering().write(sheet, (x, top), fitted(text, 13, label - 8), 13, INK if line == 0 else SOFT)
        draw.rectangle((x + label, top + 3, x + label + room, top + 13), FAINT)
        draw.rectangle((x + label, top + 3, x + label + max(1, round(room * probability)), top + 13), BLUE)
        lettering().write(sheet, (x + width, top), f"{probability:.0%}", 13, SOFT, "ra")


def boxed(picture: Image.Image, words: Sequence[Word]) -> Image.Image:
    """A copy with the boxes of those words that are objects."""
    out = picture.copy()
    for word in words:
        if word.box is not None:
            draw_box(out, word.box, SKY, 2)
    return out


def draw_card(sheet: Image.Image, x: int, y: int, picture: Image.Image, word: Word, tokens: Sequence[Token]) -> None:
    """One word: its map, how likely it was and how much likelier through the picture, and what else was considered."""
    width = picture.width
    heat = heat_map(picture, word.roll_out if word.gradient is None else word.gradient)
    sheet.paste(boxed(heat, [word]), (x, y))
    below = y + picture.height + 8
    chance = f"{math.exp(word.logprob / len(tokens)):.0%}"  # of a token, in the geometric mean
    lettering().write(sheet, (x, below), fitted(word.text, 19, width - 56), 19, INK)
    lettering().write(sheet, (x + width, below + 4), chance, 14, SOFT, "ra")
    says, color = f"picture {signed(word.dependence, 1)} nats", GREEN if word.dependence >= LEAST_DEPENDENCE else ORANGE
    lettering().write(sheet, (x, below + 27), says, 13, color)
    doubtful = max(tokens, key=lambda token: token.entropy)  # of several tokens, the one of most doubt
    draw_bars(sheet, x, below + 50, width, by_text(doubtful.alternatives)[:BARS])


def draw_head(sheet: Image.Image, picture: Image.Image, explanation: Explanation) -> None:
    """The picture, the question, the answer, and whether it came from the picture."""
    draw, x, y = ImageDraw.Draw(sheet), MARGIN + picture.width + 28, MARGIN
    sheet.paste(boxed(picture, explanation.words), (MARGIN, MARGIN))
    width = sheet.width - x - MARGIN
    lettering().write(sheet, (x, y), fitted(explanation.prompt, 17, width), 17, SOFT)
    y += 32
    answer = LOCATION_OR_CODE.sub("", explanation.text)  # boxes are drawn
    for line in wrapped(answer, 27, width, 3) or ["(no words)"]:
        lettering().write(sheet, (x, y), line, 27, INK)
        y += 36
    y += 12
    says = "It comes from the picture" if explanation.warning is None else "It hardly depends on the picture"
    color = GREEN if explanation.warning is None else ORANGE
    draw.rounded_rectangle((x, y, x + lettering().width(says, 17) + 28, y + 34), 6, color)
    lettering().write(sheet, (x + 14, y + 17), says, 17, "white", "lm")
    y += 48
    count = len(explanation.tokens)
    kind = "depends on (gradient)" if any(word.gradient is not None for word in explanation.words) else "looked at (attention)"
    for line in (
        f"{times(explanation.dependence)} as likely as with a flat picture of the same mean colour:",
        f"{signed(explanation.dependence, 1)} nats, {signed(explanation.dependence / count, 2)} for each of "
        f"{counted(count, 'token')}.",
        f"Maps: what each word {kind}, darkest red most. Bars: what else was considered.",
        *explanation.notes,
    ):
        lettering().write(sheet, (x, y), fitted(line, 15, width), 15, SOFT)
        y += 22


def draw_explanation(picture: Image.Image, explanation: Explanation) -> Image.Image:
    """The whole explanation on one sheet: picture, question and answer above, then a card for each word.

    Args:
        picture: that the answer is about, as load_image gives it, or read by it first.
    """
    picture = load_image(picture)
    card_width = (WIDTH - 2 * MARGIN - 2 * PAD * CARDS - (CARDS - 1) * GAP) // CARDS
    ratio = min(max(picture.height / picture.width, 0.4), 2.0)  # a panorama or a tower of a picture is squeezed
    small = picture.resize((card_width, round(card_width * ratio)), Image.Resampling.LANCZOS)
    head_height = 300
    large = picture.resize((round(head_height / ratio), head_height), Image.Resampling.LANCZOS)
    card_height = small.height + 2 * PAD + 58 + 21 * BARS
    rows = -(-len(explanation.words) // CARDS)
    sheet = Image.new("RGB", (WIDTH, 2 * MARGIN + head_height + rows * (card_height + GAP)), SHEET)
    draw_head(sheet, large, explanation)
    for number, word in enumerate(explanation.words):
        row, column = divmod(number, CARDS)
        x = MARGIN + column * (card_width + 2 * PAD + GAP)
        y = MARGIN + head_height + GAP + row * (card_height + GAP)
        ImageDraw.Draw(sheet).rounded_rectangle((x, y, x + card_width + 2 * PAD, y + card_height), 10, "white", FAINT)
        draw_card(sheet, x + PAD, y + PAD, small, word, explanation.tokens[word.tokens.start : word.tokens.stop])
    return sheet
