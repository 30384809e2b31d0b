"""Shows what an answer depends on: for each word a heat map over the picture, the alternatives, and the effect of the picture.

`explain` answers three questions about an answer; explanation_sheet.py draws the results on one sheet.
- Which patches does a word depend on? Two maps per word answer this. `gradient` is the sum of
  |gradient * (vector - mean of all vectors)|, a first-order estimate of how much the logits of the word depend on the vector of
  each patch. `roll_out` follows the attention from the word back to the patches, through decoder and tower, averaged over heads,
  with half of the weight kept on the residual path of each layer.
- Which other tokens were likely? The most likely tokens at each position, and the entropy of the distribution.
- Does the answer depend on the picture at all? The log-likelihood of the answer with this picture minus its log-likelihood with a
  blank picture of the same mean colour.

The model's code does not use this file: hooks record the inputs of each attention module, and `decoder_weights` and
`tower_weights` recompute the attention weights from these inputs. notes/looking.md measures how reliable the maps are.

Threads: other threads may use the model at the same time, because the hooks record only the calls of their own thread.

Sources: attention rollout (arXiv:2005.00928, equation 1); gradient * (input - reference) (arXiv:1704.02685). The gradient is that
of the logits, because the gradient of a probability near 1 vanishes (arXiv:1610.02391, section 3).
Checked in tests/test_explanation.py.
Shapes: B batch rows, I images in the batch, P patches per image, L tokens of picture, prompt and answer, S keys, N query heads,
E width of one head, D model width, V vocabulary size, T tokens of the answer, U words of the answer.
"""

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paligemma.devices import to_device
from paligemma.errors import PromptError
from paligemma.generation import only_row
from paligemma.modeling_gemma import GemmaAttention
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration
from paligemma.modeling_siglip import SiglipAttention
from paligemma.objects.outputs import NormalizedBox, group_objects, split_ids
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.tokenization import SPACE
from paligemma.vocabulary import LOCATIONS_PER_BOX

NUM_ALTERNATIVES = 5  # alternatives listed per token
# In nats. An answer hardly depends on the picture if the picture makes it less than twice as likely (notes/looking_figures.py).
MIN_DEPENDENCE = math.log(2)
NO_GRADIENT = (
    "quantised weights have no gradient, so the maps show only attention. Load the model unquantised to get gradient maps."
)

# The results


@dataclass(frozen=True)
class Token:
    """One token of the answer.

    Args:
        text: the vocabulary entry of the token, with "▁" (how the vocabulary writes a space) replaced by a space.
        logprob: log-probability of the token, given picture, prompt and all tokens before it.
        blank_logprob: its log-probability with a blank picture, which has the mean colour everywhere.
        entropy: entropy of the distribution over the vocabulary, in nats; 0 = certain, ln k = uniform over k tokens.
        alternatives: the most likely tokens at this position with their probabilities; they may include this token.
    """

    id: int
    text: str
    logprob: float
    blank_logprob: float
    entropy: float
    alternatives: tuple[tuple[str, float], ...]

    @property
    def dependence(self) -> float:
        """How many nats the picture adds to the log-probability of the token."""
        return self.logprob - self.blank_logprob


@dataclass(frozen=True, eq=False)
class Word:
    """A word of the answer. The locations, mask codes and label of an object together are one word.

    Args:
        text: the word without the space before it; for an object, its label.
        tokens: the positions of the tokens of the word in the answer.
        roll_out: float32[rows, columns of patches], the attention map; its sum is `share`.
        gradient: float32[rows, columns of patches], the gradient map, in units of logits; None if the weights have no gradient.
        share: the fraction of the attention that falls on picture tokens, 0 to 1; the rest falls on prompt and answer.
        box: the box of an object; None for other words.
        logprob, dependence: sums over the tokens of the word.
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
    """The explanation of an answer. `notes` holds one sentence for each thing that could not be computed."""

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
        """One sentence if the answer hardly depends on the picture, else None."""
        if self.dependence >= MIN_DEPENDENCE:
            return None
        return f"this answer hardly depends on the picture: it is {as_ratio(self.dependence)} as likely as with a blank picture."

    def to_json(self) -> dict[str, Any]:
        """The explanation as a dict for json.dumps.

        A map is a list of rows from top to bottom. A box is [x_min, y_min, x_max, y_max], from 0 to 1. The tokens of a word are
        positions in the list of tokens.
        """
        tokens = [
            asdict(token) | {"alternatives": [{"text": text, "probability": p} for text, p in token.alternatives]}
            for token in self.tokens
        ]
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


def as_ratio(nats: float) -> str:
    """A difference of log-likelihoods as a ratio: "3.2 times", "10^12 times"."""
    return f"{math.exp(nats):.2g} times" if abs(nats) < math.log(1e4) else f"10^{nats / math.log(10):.0f} times"


# Attention weights


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, cap: float | None) -> Tensor:
    """Attention weights, float32[B, N, L, S]; each row sums to 1. The arguments are those of modeling_gemma.attention."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # [B, N, S, E]
    scores = q.float() @ k.float().transpose(2, 3) * scale  # [B, N, L, S]
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1)


@torch.no_grad()
def decoder_weights(
    attention: GemmaAttention, x: Tensor, _slots: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None,
    _cache: None,
) -> Tensor:
    """The attention weights float32[B, N, L, L] of a GemmaAttention, from the arguments of its forward (without a KV cache)."""
    q, k, _ = attention.project(x, rotation)
    return attention_weights(q, k, mask, attention.scale, attention.cap)


@torch.no_grad()
def tower_weights(attention: SiglipAttention, x: Tensor) -> Tensor:
    """The attention weights float32[I, N, P, P] of a SiglipAttention, from the argument of its forward."""
    q, k = (project(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2) for project in (attention.q_proj, attention.k_proj))
    return attention_weights(q, k, None, q.shape[-1] ** -0.5, None)


@contextmanager
def recording(modules: Iterable[nn.Module]) -> Iterator[list[tuple[Any, ...]]]:
    """In the `with` block, every call of one of the modules by this thread appends (module, its arguments...) to the list."""
    calls: list[tuple[Any, ...]] = []
    thread = threading.get_ident()

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() == thread:  # other threads may use the same model
            calls.append((module, *args))

    hooks = [module.register_forward_pre_hook(record) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def follow_attention(word_weights: Tensor, attention: Iterable[Tensor]) -> Tensor:
    """Attention rollout: in each layer half of the weight stays on its token, half moves with the attention, averaged over heads.

    Args:
        word_weights: float32[U, L], the weight of each token at the output of the last layer; each row sums to 1.
        attention: the attention weights float32[1, N, L, L] of each layer, last layer first.
    Returns: float32[U, L], the weight of each token at the input of the first layer; each row still sums to 1.
    """
    for layer in attention:
        weights = layer[0].mean(0).to(word_weights.device)  # [L, L]; a model may be on several cards
        word_weights = (word_weights + word_weights @ weights) / 2
    return word_weights


# Splitting the answer into words


def find_objects(token_ids: list[int], processor: PaliGemmaProcessor) -> Iterator[tuple[str, range, NormalizedBox]]:
    """The label, token positions and box of each object that has all four locations."""
    for item in group_objects(split_ids(token_ids, processor)):
        if len(item.locations) == LOCATIONS_PER_BOX:
            last = max(item.location_indices[-1] + len(item.codes), *item.label_indices, 0)
            yield item.label, range(item.location_indices[0], last + 1), NormalizedBox.from_locations(item.locations)


def split_words(token_ids: list[int], processor: PaliGemmaProcessor) -> list[tuple[str, range, NormalizedBox | None]]:
    """The words and objects of the answer in order, as (text, token positions, box or None).

    A word begins with white space. Text without any letter or digit is not a word.
    """
    found: list[tuple[str, range, NormalizedBox | None]] = list(find_objects(token_ids, processor))
    in_objects = {position for _, positions, _ in found for position in positions}
    stream = processor.stream()
    spans: list[range] = []
    # If several byte tokens form one character, the text of the last token holds the character.
    texts = [stream.put(token_id) for token_id in token_ids]
    for position, token_id in enumerate(token_ids):
        if position in in_objects or token_id in processor.control_ids:
            continue
        if spans and spans[-1].stop == position and not texts[position][:1].isspace():
            spans[-1] = range(spans[-1].start, position + 1)
        else:
            spans.append(range(position, position + 1))
    words = [("".join(texts[span.start : span.stop]).strip(), span, None) for span in spans]
    found += [word for word in words if any(letter.isalnum() for letter in word[0])]
    return sorted(found, key=lambda word: word[1].start)


def token_text(token_id: int, processor: PaliGemmaProcessor) -> str:
    """The vocabulary entry of a token, with "▁" (how the vocabulary writes a space) replaced by a space."""
    return (processor.tokenizer.id_to_token(token_id) or f"<{token_id}>").replace(SPACE, " ")


# The analysis


def answer_logits(model: PaliGemmaForConditionalGeneration, row: dict[str, Any], features: Tensor) -> Tensor:
    """The logits float32[T, V] at each position that predicts a token of the answer.

    Args:
        row: input_ids and token_type_ids int64[1, L] on the CPU; the tokens of the answer have type 1.
        features: float[1, P, D], the image features.
    """
    x = model.hidden(row["input_ids"], None, None, row["token_type_ids"], features)  # [1, L, D]
    num_tokens = int(row["token_type_ids"].sum())
    return model.language_model.logits(x[0, -num_tokens - 1 : -1])  # [T, V]


@torch.no_grad()
def attention_maps(
    tower_calls: list[tuple[Any, ...]], decoder_calls: list[tuple[Any, ...]], word_weights: Tensor, num_patches: int
) -> Tensor:
    """The attention maps float32[U, P]: attention rollout from each word to the patches, without prompt and answer.

    Args:
        tower_calls, decoder_calls: the calls that `recording` collected, first layer first.
        word_weights: float32[U, L], from initial_weights.
    """
    word_weights = follow_attention(word_weights, (decoder_weights(*call) for call in reversed(decoder_calls)))  # [U, L]
    word_weights = word_weights[:, :num_patches]  # [U, P]
    return follow_attention(word_weights, (tower_weights(*call) for call in reversed(tower_calls)))


def gradient_maps(chosen: Tensor, spans: Sequence[range], features: Tensor) -> Tensor:
    """The gradient map of each word, float32[U, P]: the sum over D of |gradient * (vector - mean vector)| for each patch.

    This is a first-order estimate: each component of the patch's vector is replaced by its mean over all patches, and the
    absolute changes of the word's logits are summed.

    Args:
        chosen: float32[T], the logits of the answer's tokens, with their autograd graph.
        spans: the token positions of each word.
        features: float[1, P, D], a leaf of the graph.
    """
    vectors = features.detach()[0].float()
    deviation = vectors - vectors.mean(0)  # [P, D]
    maps = [deviation.new_empty(0, len(deviation))]  # torch.cat needs a tensor even if there is no word
    for span in spans:
        (gradient,) = torch.autograd.grad(chosen[span.start : span.stop].sum(), features, retain_graph=True)
        maps.append((gradient[0].float() * deviation).abs().sum(-1)[None])  # [1, P]
    return torch.cat(maps)  # [U, P]


def checked_row(inputs: dict[str, Any], token_ids: Sequence[int], model: PaliGemmaForConditionalGeneration) -> dict[str, Any]:
    """Checks the inputs, and returns them as one row (input_ids, pixel_values, ...) without padding.

    Raises: PromptError unless the inputs hold the pixels of one picture and the answer fits into the context after the prompt.
    """
    if inputs.get("pixel_values") is None:
        raise PromptError("an explanation needs pixels, but the inputs have none. Pass the pixel_values of the processor.")
    row = only_row(inputs, model.config)
    if len(row["pixel_values"]) != 1:
        raise PromptError(f"the row has {len(row['pixel_values'])} pictures, but one is needed. Ask about one picture.")
    context = model.config.text_config.max_position_embeddings
    if not 0 < len(token_ids) <= context - len(row["input_ids"]):
        room = context - len(row["input_ids"])
        raise PromptError(f"the answer has {len(token_ids)} tokens; 1 to {room} are allowed (the rest of the context).")
    return row


def read_tokens(logprobs: Tensor, blank_logprobs: Tensor, token_ids: list[int], processor: PaliGemmaProcessor) -> list[Token]:
    """The tokens with their alternatives, from log-probabilities float32[T, V] with the picture and with a blank picture."""
    ids = to_device(torch.tensor(token_ids, device="cpu"), logprobs.device)[:, None]  # [T, 1]
    best, others = logprobs.topk(min(NUM_ALTERNATIVES, logprobs.shape[1]))
    entropy = torch.special.entr(logprobs.exp()).sum(-1, keepdim=True)  # [T, 1]
    # One tensor, because each copy from a GPU makes the CPU wait. float32 is exact for every id below 2^24.
    table = torch.cat((logprobs.gather(1, ids), blank_logprobs.gather(1, ids), entropy, best, others.float()), 1)
    tokens = []
    for token_id, (logprob, blank_logprob, spread, *alternatives) in zip(token_ids, table.tolist(), strict=True):
        values, indices = alternatives[: best.shape[1]], alternatives[best.shape[1] :]
        texts = tuple((token_text(int(i), processor), math.exp(value)) for i, value in zip(indices, values, strict=True))
        tokens.append(Token(token_id, token_text(token_id, processor), logprob, blank_logprob, spread, texts))
    return tokens


def make_word(
    text: str, span: range, box: NormalizedBox | None, tokens: list[Token], attention: Tensor, gradient: Tensor | None
) -> Word:
    """A word with its maps float32[P] on the CPU as square grids, because the processor resizes the picture to a square."""
    side = math.isqrt(len(attention))
    word_tokens = tokens[span.start : span.stop]
    return Word(
        text=text,
        tokens=span,
        roll_out=attention.view(side, side),
        gradient=None if gradient is None else gradient.view(side, side),
        share=attention.sum().item(),
        box=box,
        logprob=sum(token.logprob for token in word_tokens),
        dependence=sum(token.dependence for token in word_tokens),
    )


def initial_weights(spans: Sequence[range], num_prompt: int, length: int) -> Tensor:
    """float32[U, L]: for each word, equal weights on the positions that predict its tokens (the position before each token)."""
    weights = torch.zeros(len(spans), length, device="cpu")  # [U, L]
    for row, span in zip(weights, spans, strict=True):
        row[num_prompt - 1 + span.start : num_prompt - 1 + span.stop] = 1 / len(span)
    return weights


def explain(
    model: PaliGemmaForConditionalGeneration, processor: PaliGemmaProcessor, inputs: dict[str, Any], token_ids: Sequence[int]
) -> Explanation:
    """The explanation of an answer: two forward passes over picture, prompt and answer, and one backward pass per word.

    Args:
        model: PaliGemmaForConditionalGeneration.
        processor: the processor of the same checkpoint.
        inputs: the output of the processor for one row with one picture.
        token_ids: the answer to explain; it need not come from this model. A final eos is also explained.
    Raises: PromptError for several rows or pictures, missing pixels, an empty answer, or an answer that does not fit the context.
    """
    token_ids = [int(token_id) for token_id in token_ids]
    question = checked_row(inputs, token_ids, model)
    decoder = model.language_model
    pixels, num_prompt = model.to_device(question["pixel_values"]), len(question["input_ids"])
    answer = torch.tensor(token_ids, device="cpu")
    row = {
        "input_ids": torch.cat((question["input_ids"].cpu(), answer))[None],  # [1, L]
        "token_type_ids": torch.cat((question["token_type_ids"].cpu(), torch.ones_like(answer)))[None],  # [1, L]
    }
    # Quantised weights have no autograd graph: gradients would be wrong, because they flow only through the residual connections.
    has_gradient = all(tensor.is_floating_point() for tensor in (*decoder.parameters(), *decoder.buffers()))
    tower_modules = [module for module in model.vision_tower.modules() if isinstance(module, SiglipAttention)]
    decoder_modules = [module for module in decoder.modules() if isinstance(module, GemmaAttention)]
    with torch.no_grad(), recording(tower_modules) as tower_calls:
        features = model.encode_images(pixels)  # [1, P, D]
    features.requires_grad_(has_gradient)
    with torch.set_grad_enabled(has_gradient), recording(decoder_modules) as decoder_calls:
        logits = answer_logits(model, row, features)  # [T, V]
        chosen = logits.gather(1, to_device(answer, logits.device)[:, None])[:, 0]  # [T]
    with torch.no_grad():
        flat_picture = pixels.mean((2, 3), keepdim=True).expand_as(pixels)  # of one colour, the mean of the picture
        blank_logits = answer_logits(model, row, model.encode_images(flat_picture))  # [T, V]
    tokens = read_tokens(logits.detach().log_softmax(-1), blank_logits.log_softmax(-1), token_ids, processor)
    found = split_words(token_ids, processor)
    spans = [span for _, span, _ in found]
    gradients = gradient_maps(chosen, spans, features).cpu() if has_gradient else [None] * len(spans)  # [U, P]
    word_weights = to_device(initial_weights(spans, num_prompt, row["input_ids"].shape[1]), features.device)  # [U, L]
    maps = attention_maps(tower_calls, decoder_calls, word_weights, features.shape[1]).cpu()  # [U, P]
    words = [
        make_word(text, span, box, tokens, attention, gradient)
        for (text, span, box), attention, gradient in zip(found, maps, gradients, strict=True)
    ]
    prompt = processor.decode(question["input_ids"]).strip()
    return Explanation(prompt, processor.decode(token_ids), tokens, words, [] if has_gradient else [NO_GRADIENT])
