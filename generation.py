"""Generates answers token by token: greedy or sampled, for one request or many.

`generate_greedy` shows the whole algorithm in six lines. The rest of the file adds sampling, batches, stopping and speed:

- `Sampling` and `sample` choose the next token from logits.
- `RunningBatch` keeps the running requests in the first rows of one static KV cache. `admit` prefills free rows, `step` generates
  one token per row, and `remove_finished` frees the rows of finished answers, so that these rows cost no time.
- `generate` admits all rows of a batch at once and yields one tensor per step. `generate_many` admits the next request as soon as
  a row is free (continuous batching: Orca, OSDI 2022), so that all rows are used while there are requests.

A row may be constrained by a grammar (objects/grammar.py): its next token is then one of the tokens that the grammar allows.

On CUDA, the next step starts before the CPU has read the tokens of the current step. Therefore the CPU learns one step late
that a row has ended. The CPU drops the token that was generated after the end, so answers do not change. While a row has a
grammar, no step starts early, because the grammar must read each token before it can compute which tokens may follow. Nothing
else in a step makes the CPU wait for the GPU (tests/gpu/test_waits.py).

The model can be any object with a config and the methods new_cache, prefill and decode.
Checked in tests/test_generation.py.
Shapes: B batch rows, L tokens of a prompt with its pictures, V vocabulary size, A candidates for the next token,
Q bins of a coordinate.
"""

import math
import reprlib
import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from paligemma.devices import to_device
from paligemma.errors import GenerationError, PromptError
from paligemma.layers.batch_cache import BatchCache
from paligemma.layers.fast_logits import argmax, logsumexp

if TYPE_CHECKING:
    from paligemma.objects.grammar import ConstraintState, Grammar

MAX_PREFILL_TOKENS = 4096  # in one prefill pass; larger passes need more memory and are not faster
# top_p first sorts only this many of the likeliest tokens, because the vocabulary has 257216 tokens. More tokens are sorted only
# if the probabilities of the first tokens sum to less than top_p. On CUDA, all tokens are sorted: that takes less time than
# waiting for the sum.
FIRST_CANDIDATES = 256
PICTURE_KEYS = ("pixel_values", "image_features")  # the two forms of pictures; a batch has one of them or neither
MAX_FLOAT = sys.float_info.max  # the largest temperature; a larger int cannot be converted to a float
# The mean of a coordinate is computed over this many bins on each side of the generated bin. On the demo's scenes, any
# value from 24 to 128 gives an average error within 1 % of the error with 64.
NEIGHBOURHOOD = 64


@torch.no_grad()
def generate_greedy(model: nn.Module, inputs: dict, max_new_tokens: int = 40) -> list[int]:
    """The answer to one request. Each token is the most likely one. `generate` also handles batches, sampling and grammars.

    Args:
        inputs: the result of the processor for one row.
        max_new_tokens: the maximum number of tokens of the answer.
    Returns: the token ids of the answer, including <eos> if it was generated.
    """
    cache = model.new_cache(1, inputs["input_ids"].shape[1] + max_new_tokens)
    logits = model.prefill(cache, **inputs)  # [1, V]
    answer = [int(logits.argmax())]
    while answer[-1] not in model.config.eos_token_ids and len(answer) < max_new_tokens:
        logits = model.decode(cache, torch.tensor(answer[-1:]))  # [1, V]
        answer.append(int(logits.argmax()))
    return answer


def short_repr(value: object) -> str:
    """A value as short text for an error message. repr() raises ValueError for integers of more than 4300 digits."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return "a whole number with thousands of digits"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Sampling() takes the likeliest token; temperature, top_k and top_p make the choice random.

    Args:
        temperature: logits are divided by this number. A low temperature makes answers predictable, a high temperature makes
            them varied, and 0 is greedy. None = 1 if top_k or top_p is given, otherwise 0.
        top_p: draw from the smallest set of likeliest tokens whose probabilities sum to at least top_p (arXiv:1904.09751); None =
            from all tokens.
        top_k: draw from the k likeliest tokens; None = from all tokens. top_k is applied before top_p.
        seed: the same seed gives the same answers; None = a new seed each time. Row i of a batch uses seed + i, so that its
            answer does not depend on the other rows.
    Raises: GenerationError with exit code 2 for a value out of range.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self):
        def is_number(value: object, kind: type = Real) -> bool:  # true for numpy's numbers, too
            return isinstance(value, kind) and not isinstance(value, bool)

        checks = {
            "temperature": (lambda t: is_number(t) and 0 <= t <= MAX_FLOAT, "a number from 0 up"),
            "top_p": (lambda p: is_number(p) and 0 < p <= 1, "a number above 0 and up to 1"),
            "top_k": (lambda k: is_number(k, Integral) and k > 0, "a whole number from 1 up"),
            "seed": (lambda s: is_number(s, Integral) and 0 <= s < 2**63, "a whole number from 0 to 2^63 - 1"),
        }
        for name, (is_valid, needed) in checks.items():
            value = getattr(self, name)
            if not (value is None or is_valid(value)):
                raise GenerationError(f"{name} is {short_repr(value)}; {needed} is needed.", code=2)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or (self.temperature is None and self.top_p is None and self.top_k is None)


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Softmax of logits / temperature.

    Args:
        logits: float32[B, V].
    Returns: float64[B, V], or float32[B, V] on Apple's GPUs, which have no float64. In float32, a very small temperature would be
        rounded to 0, a top_p near 1 would be rounded to 1, and rounding errors could change which tokens top_p keeps. If all
        logits of a row are -inf, or if one of them is NaN, all tokens of the row get the same probability.
    """
    smallest, dtype = (1e-30, torch.float32) if logits.device.type == "mps" else (1e-300, torch.float64)
    # The temperature is limited to smallest ... 1 / smallest: a divisor of 0 or infinity would give NaN. At `smallest`, only the
    # likeliest tokens have a probability above 0. The largest logit is subtracted before the division: a quotient that overflows
    # is then -inf, which gives probability 0.
    logits = logits.to(dtype)
    gaps = (logits - logits.amax(-1, keepdim=True)).nan_to_num(nan=0)  # [B, V]
    return (gaps / min(max(float(temperature), smallest), 1 / smallest)).softmax(-1)  # [B, V]


def likeliest(logits: Tensor, count: int) -> Tensor:
    """The ids of the `count` largest logits of each row, int64[B, A], largest first. Of equal logits, the smaller id is first.

    If several tokens have the same logit as the last one of them, it is not defined which of these tokens are included.
    """
    if count == logits.shape[-1]:
        return logits.sort(descending=True, stable=True).indices  # [B, A]
    ids = logits.topk(count).indices.sort().values  # [B, A]
    return ids.gather(1, logits.gather(1, ids).sort(descending=True, stable=True).indices)  # [B, A]


def nucleus(logits: Tensor, probs: Tensor, top_p: float, top_k: int | None) -> tuple[Tensor, Tensor]:
    """The candidates for the next token after top_k and top_p, likeliest first.

    Args:
        logits, probs: [B, V]. Tokens are sorted by logits, because at a high temperature different logits can have equal
            probabilities after rounding.
        top_p, top_k: as in Sampling; top_p 1 = all tokens.
    Returns: probabilities [B, A], which are 0 for tokens that top_p excludes, and token ids int64[B, A].
    """
    vocabulary = logits.shape[-1]
    count = min(top_k or (vocabulary if logits.is_cuda else FIRST_CANDIDATES), vocabulary)
    ids = likeliest(logits, count)  # [B, A]
    best = probs.gather(1, ids)  # [B, A]
    while top_k is None and count < vocabulary:
        # The tokens with the smallest logit do not count here, because others with the same logit may be missing.
        scores = logits.gather(1, ids)  # [B, A]
        total = best.masked_fill(scores == scores[:, -1:], 0).cumsum(-1)[:, -1]  # [B]
        if bool((total >= top_p).all()):
            break
        count = min(4 * count, vocabulary)
        ids = likeliest(logits, count)  # [B, A]
        best = probs.gather(1, ids)  # [B, A]
    if top_k is not None:
        best = best / best.sum(-1, keepdim=True)
    if top_p < 1:  # the first token is always kept, even if a tiny top_p is rounded to 0 in float32
        best[:, 1:] = best[:, 1:].masked_fill(best.cumsum(-1)[:, :-1] >= top_p, 0)
    return best, ids


def sample(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> Tensor:
    """Chooses the next token of each row.

    Args:
        logits: float32[B, V].
        uniforms: float64[B] in [0, 1) on the CPU, one random number per row. The token whose interval of the cumulative
            distribution contains the number is chosen (inverse transform sampling).
    Returns: int64[B].
    """
    if sampling.is_greedy:
        return argmax(logits)  # [B]
    probs = probabilities(logits, 1.0 if sampling.temperature is None else sampling.temperature)  # [B, V]
    ids = None
    top_p = 1.0 if sampling.top_p is None else float(sampling.top_p)
    if top_p < 1 or sampling.top_k is not None:
        probs, ids = nucleus(logits, probs, top_p, sampling.top_k)  # [B, A], [B, A]
    cumulative = probs.cumsum(-1)
    # A random number that is rounded up to 1 would be in no interval: searchsorted would return an index after the last one.
    uniforms = uniforms.to(cumulative.dtype).clamp(max=1 - torch.finfo(cumulative.dtype).eps)
    uniforms = to_device(uniforms, cumulative.device)
    thresholds = uniforms[:, None] * cumulative[:, -1:]  # [B, 1]
    index = torch.searchsorted(cumulative, thresholds, right=True)  # [B, 1]
    return (index if ids is None else ids.gather(1, index))[:, 0]  # [B]


def sample_allowed(logits: Tensor, sampling: Sampling, uniforms: Tensor, allowed: list[Tensor]) -> Tensor:
    """Like sample, but the token of row i is one of allowed[i], int64[A] on the CPU. A may differ from row to row."""
    ids = to_device(nn.utils.rnn.pad_sequence(allowed, batch_first=True, padding_value=-1), logits.device)  # [B, A]
    is_padding = ids < 0
    ids = torch.where(is_padding, ids[:, :1], ids)  # padding is replaced by an allowed id
    candidates = logits.gather(1, ids).masked_fill(is_padding, -torch.inf)  # [B, A]
    index = sample(candidates, sampling, uniforms)[:, None]  # [B, 1]
    return ids.gather(1, index)[:, 0]  # [B]


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """float32[B]: the log-probability of each token, before temperature, top_k, top_p and grammar are applied.

    The result is NaN if a logit of the row is NaN or +inf, or if all logits of the row are -inf.
    """
    total = logsumexp(logits)  # [B]
    return logits.gather(1, tokens[:, None])[:, 0] - total.masked_fill(total.isinf(), torch.nan)  # [B]


def coordinate_moments(logits: Tensor, tokens: Tensor, locations: range) -> tuple[Tensor, Tensor]:
    """The mean of a coordinate over the bins near the generated bin, and its standard deviation over all bins.

    Each location token is one of 1024 bins. With the probabilities of the neighbouring bins, the edge of an object is known more
    precisely than from the generated bin alone. Distant bins belong to other objects, which the model could have generated
    instead. Such bins are excluded from the mean, because otherwise the mean could lie between two objects. On the
    demo's scenes, the average error is 9.7 bins for the mean over all bins, 7.4 for the mean over near bins, and 8.1 for the
    generated bin. Distant bins are included in the deviation, which is therefore large if several objects are likely.

    Args:
        logits: float32[B, V].
        tokens: int64[B], the generated tokens. If a token is not a location, the two results have no meaning.
        locations: the ids of the bins in order. The probabilities are a softmax over these ids only.
    Returns: float32[B] and float32[B], in bins: the mean, and the root of the mean squared distance from this mean.
    """
    scores = logits[:, locations.start : locations.stop]  # [B, Q]
    bins = torch.arange(len(locations), device=scores.device, dtype=scores.dtype)  # [Q]
    chosen = (tokens - locations.start).clamp(0, len(locations) - 1)  # [B]
    is_far = (bins - chosen[:, None]).abs() > NEIGHBOURHOOD  # [B, Q]
    mean = (scores.masked_fill(is_far, -torch.inf).softmax(-1) * bins).sum(-1)  # [B]
    variance = (scores.softmax(-1) * (bins - mean[:, None]) ** 2).sum(-1)  # [B]
    return mean, variance.sqrt()


def split_rows(inputs: dict, config: Any) -> list[dict]:
    """Splits a batch from the processor into one dict per row: input_ids int64[L] without padding, token_type_ids, pictures.

    Raises: PromptError if <image> tokens and pictures do not match, and if a row is empty or fills the model's context.
    """
    given = [key for key in PICTURE_KEYS if inputs.get(key) is not None]
    if len(given) == 2:
        raise PromptError("pixel_values and image_features are two forms of the same pictures. Pass only one of them.")
    picture_key = given[0] if given else None
    input_ids, types, mask = (inputs.get(key) for key in ("input_ids", "token_type_ids", "attention_mask"))
    if types is None and picture_key is not None:
        raise PromptError("token_type_ids are missing, so the end of the prompt is unknown. Pass the processor's token_type_ids.")
    mask = torch.ones_like(input_ids) if mask is None else mask
    rows, used = [], 0
    for i, is_token in enumerate(mask.bool()):
        ids = input_ids[i][is_token]  # [L]
        if len(ids) == 0:
            raise PromptError(f"row {i} has no token. Give it a picture or a prompt.")
        context = config.text_config.max_position_embeddings
        if len(ids) >= context:
            raise PromptError(f"pictures and prompt take {len(ids)} tokens, but the model's context is {context}. Shorten them.")
        row = {"input_ids": ids, "token_type_ids": torch.ones_like(ids) if types is None else types[i][is_token]}
        count, rest = divmod(int((ids == config.image_token_index).sum()), config.num_image_tokens)
        if rest:
            raise PromptError(f"the last picture of row {i} has {rest} <image> tokens; {config.num_image_tokens} are needed.")
        if picture_key is not None and count:
            row[picture_key] = inputs[picture_key][used : used + count]
        used += count
        rows.append(row)
    num_pictures = 0 if picture_key is None else len(inputs[picture_key])
    if used != num_pictures:
        reason = f"the rows have <image> tokens for {used} pictures, but {num_pictures} pictures were given"
        raise PromptError(f"{reason}. Pass the result of the processor.")
    return rows


def only_row(inputs: dict, config: Any) -> dict:
    """The only row of a request, as split_rows returns it. Raises: PromptError as in split_rows, and for more than one row."""
    rows = split_rows(inputs, config)
    if len(rows) != 1:
        raise PromptError(f"the request has {len(rows)} rows, but it must have one. Pass each row as a separate request.")
    return rows[0]


def join_rows(rows: list[dict], pad_token_id: int) -> dict:
    """Joins rows from split_rows into one batch for prefill, padded on the right."""
    lengths = torch.tensor([len(row["input_ids"]) for row in rows], device="cpu")  # [B]
    batch = {
        key: nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=pad_token_id)
        for key in ("input_ids", "token_type_ids")
    }
    batch["attention_mask"] = (torch.arange(int(lengths.max()), device="cpu") < lengths[:, None]).long()  # [B, L]
    for key in PICTURE_KEYS:
        pictures = [row[key] for row in rows if key in row]
        if pictures:
            batch[key] = torch.cat(pictures)
    return batch


def next_prefill_group(requests: list[tuple[int, dict]]) -> list[tuple[int, dict]]:
    """The first requests that fit into one prefill pass: at most MAX_PREFILL_TOKENS tokens, and all pictures in the same form."""
    longest, forms = 0, set()
    for count, (_, row) in enumerate(requests):
        longest = max(longest, len(row["input_ids"]))
        forms |= row.keys() & set(PICTURE_KEYS)
        if count and ((count + 1) * longest > MAX_PREFILL_TOKENS or len(forms) > 1):
            return requests[:count]
    return requests


@dataclass(frozen=True)
class Step:
    """One token of every row, on the CPU. A row that finished in an earlier step has the pad token and logprob 0.

    Attributes:
        tokens: int64[B].
        logprobs: float32[B], the log-probability of each token.
        is_finished: bool[B].
        moments: for each row, the result of coordinate_moments if the token is a location, otherwise None.
    """

    tokens: Tensor
    logprobs: Tensor
    is_finished: Tensor
    moments: list[tuple[float, float] | None]


@dataclass(frozen=True)
class Answer:
    """The answer to one request.

    Attributes:
        index: index of the request, from 0.
        token_ids: the tokens, including <eos> if it was generated.
        logprobs: the log-probability of each token.
        moments: for each token, the result of coordinate_moments if the token is a location, otherwise None.
        finish_reason: "stop" = an eos was generated, "length" = max_new_tokens or the end of the model's context was reached.
    """

    index: int
    token_ids: list[int]
    logprobs: list[float]
    moments: list[tuple[float, float] | None]
    finish_reason: str


@dataclass
class Row:
    """The state of one running request."""

    index: int
    max_tokens: int
    generator: torch.Generator
    constraint: "ConstraintState | None"
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    moments: list[tuple[float, float] | None] = field(default_factory=list)
    num_generated: int = 0  # tokens generated so far, including tokens that are not yet on the CPU
    is_removed: bool = False


class PendingTokens:
    """The tokens of one step, being copied from the device to the CPU.

    Args:
        rows: the rows that the tokens belong to.
        numbers: float32[B, 2] on the device, token and log-probability, or float32[B, 4] with the two moments as well.
    """

    def __init__(self, rows: list[Row], numbers: Tensor):
        self.rows = rows
        # On CUDA, an event tells when the copy is done. On other devices there is no event here, so the copy blocks.
        self.numbers = numbers.to("cpu", non_blocking=numbers.is_cuda)
        self.copy_done = None
        if numbers.is_cuda:
            self.copy_done = torch.cuda.Event()
            self.copy_done.record(torch.cuda.current_stream(numbers.device))

    def wait(self) -> list[tuple[Row, list[float]]]:
        """Waits for the copy. Returns pairs of a row and its numbers, except for rows that were removed in the meantime."""
        if self.copy_done is not None:
            self.copy_done.synchronize()
        return [pair for pair in zip(self.rows, self.numbers.tolist(), strict=True) if not pair[0].is_removed]


class RunningBatch:
    """The running requests, which use the first rows of one static KV cache without gaps.

    Args:
        model: PaliGemmaForConditionalGeneration, or any object with the same new_cache, prefill, decode and config.
        max_rows: the maximum number of requests that run at the same time.
        max_new_tokens: the maximum number of tokens of an answer. An answer is shorter if the model's context ends first.
        sampling: how tokens are chosen.
        eos_token_id: the token or tokens that end an answer; "config" = the eos tokens of model.config; None = no token.
        locations: the ids of the location tokens, for Answer.moments; None = no moments are computed.
        suppress_tokens: ids that are never generated; <image> is always one of them. Ids outside the vocabulary are ignored.
    Raises: GenerationError with exit code 2 for arguments of the wrong type or out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        max_rows: int,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),
        eos_token_id: object = "config",
        locations: range | None = None,
        suppress_tokens: Iterable[int] = (),
    ):
        for name, value in (("max_new_tokens", max_new_tokens), ("rows", max_rows)):
            if not (type(value) is int and value > 0):
                raise GenerationError(f"{name} is {value!r}; a whole number from 1 up is needed.", code=2)
        if not isinstance(sampling, Sampling):
            raise GenerationError(f"sampling is {sampling!r}; a Sampling is needed, as in Sampling(top_p=0.9).", code=2)
        if isinstance(eos_token_id, str) and eos_token_id == "config":
            eos_token_id = model.config.eos_token_ids
        eos = [] if eos_token_id is None else eos_token_id if isinstance(eos_token_id, Collection) else [eos_token_id]
        if isinstance(eos, str) or not all(type(token) is int for token in eos):
            message = f"eos_token_id is {eos_token_id!r}; a token id, a list of them, None or 'config' is needed."
            raise GenerationError(message, code=2)
        suppressed = list(suppress_tokens) if isinstance(suppress_tokens, Iterable) else [None]
        if not all(type(token) is int for token in suppressed):
            raise GenerationError(f"suppress_tokens is {suppress_tokens!r}; a list of token ids is needed.", code=2)
        self.model = model
        self.max_rows = max_rows
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.eos = frozenset(eos)
        self.locations = locations
        vocabulary = model.config.text_config.vocab_size
        suppressed = sorted({model.config.image_token_index, *suppressed})  # <image> may be outside the vocabulary
        suppressed = [token for token in suppressed if 0 <= token < vocabulary]
        self.suppressed = torch.tensor(suppressed, dtype=torch.int64, device="cpu")  # moved to the device in choose_next
        self.seed = torch.Generator().seed() % 2**62 if sampling.seed is None else sampling.seed
        self.cache: Any = None
        self.rows: list[Row] = []
        self.tokens = torch.empty(0, dtype=torch.int64, device="cpu")  # the last token of each row, later on the device
        self.pending: deque[PendingTokens] = deque()  # at most two steps

    def is_finished(self, row: Row) -> bool:
        return row.token_ids[-1] in self.eos or len(row.token_ids) >= row.max_tokens

    @torch.no_grad()
    def admit(self, requests: list[tuple[int, dict]]) -> None:
        """Prefills free rows with the requests and generates the first token of each answer.

        Args:
            requests: pairs of an index and a row from split_rows, to which a "grammar" may have been added.
        """
        config = self.model.config
        context = config.text_config.max_position_embeddings
        longest = max(len(row["input_ids"]) for _, row in requests)
        self.ensure_slots(min(longest + self.max_new_tokens, context))
        while requests:
            group = next_prefill_group(requests)
            requests = requests[len(group) :]
            first, count = len(self.rows), len(group)
            for index, row in group:
                max_tokens = min(self.max_new_tokens, context - len(row["input_ids"]))
                grammar = row.get("grammar")
                constraint = None if grammar is None else grammar.start(max_tokens)
                generator = torch.Generator().manual_seed((self.seed + index) % 2**63)
                self.rows.append(Row(index, max_tokens, generator, constraint))
            batch = join_rows([row for _, row in group], config.pad_token_id)
            logits = self.model.prefill(self.cache[first : first + count], **batch)  # [B, V]
            self.append_tokens(self.choose_next(logits, first))

    def ensure_slots(self, slots: int) -> None:
        """Allocates the cache, or a larger cache if a row now has fewer than `slots` slots."""
        if self.cache is None or self.cache.slots < slots:
            cache = self.model.new_cache(self.max_rows, slots, BatchCache)
            if self.cache is not None:
                cache.copy_from(self.cache)
            self.cache = cache

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may start before the CPU has read the tokens of the previous step. This helps only on CUDA."""
        return self.cache.lengths.is_cuda and all(row.constraint is None for row in self.rows)

    @torch.no_grad()
    def step(self) -> None:
        """Appends one token to every row. If `runs_ahead` is true, the device already computes the step after this one."""
        if not self.pending:
            self.pending.append(self.decode())
        if self.runs_ahead and any(row.num_generated < row.max_tokens for row in self.rows):
            self.pending.append(self.decode())
        self.append_tokens(self.pending.popleft())

    def decode(self) -> PendingTokens:
        """Generates the next token of every row, on the device."""
        logits = self.model.decode(self.cache[: len(self.rows)], self.tokens)  # [B, V]
        return self.choose_next(logits, 0)

    def sample(self, logits: Tensor, rows: list[Row]) -> Tensor:
        """The next token of each row, int64[B]; for a row with a grammar, one of the tokens that the grammar allows."""
        uniforms = torch.zeros(len(rows), dtype=torch.float64, device="cpu")  # [B]
        if not self.sampling.is_greedy:
            for i, row in enumerate(rows):
                uniforms[i] = torch.rand((), dtype=torch.float64, generator=row.generator, device="cpu")
        allowed = [row.constraint.allowed_tokens() for row in rows if row.constraint is not None]
        if len(allowed) == len(rows):
            return sample_allowed(logits, self.sampling, uniforms, allowed)
        tokens = sample(logits, self.sampling, uniforms)  # [B]
        if allowed:
            constrained = torch.tensor([i for i, row in enumerate(rows) if row.constraint is not None], device="cpu")
            uniforms, constrained = uniforms[constrained], to_device(constrained, logits.device)
            tokens[constrained] = sample_allowed(logits[constrained], self.sampling, uniforms, allowed)
        return tokens

    def choose_next(self, logits: Tensor, first: int) -> PendingTokens:
        """Chooses the next token of the rows from index `first` on; `logits` contains only these rows, float32[B, V]."""
        self.suppressed = to_device(self.suppressed, logits.device)
        logits.index_fill_(1, self.suppressed, -torch.inf)
        rows = self.rows[first:]
        tokens = self.sample(logits, rows)  # [B]
        self.tokens = torch.cat((self.tokens[:first].to(tokens.device), tokens))
        columns = [tokens.float(), log_probabilities(logits, tokens)]  # float32 is exact for every id below 2^24
        if self.locations is not None:
            columns += coordinate_moments(logits, tokens, self.locations)
        for row in rows:
            row.num_generated += 1
        return PendingTokens(rows, torch.stack(columns, 1))

    def append_tokens(self, pending: PendingTokens) -> None:
        """Appends the tokens to their rows. Raises GenerationError if the logits were not finite."""
        for row, (number, logprob, *moments) in pending.wait():
            token = int(number)
            if math.isnan(logprob):
                raise GenerationError(
                    f"the model's logits are not finite ({self.model.dtype} weights, token {len(row.token_ids) + 1} of a row). "
                    "Check the checkpoint for NaN, or load it in another dtype."
                )
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            row.moments.append(tuple(moments) if self.locations is not None and token in self.locations else None)
            if row.constraint is not None:
                row.constraint.advance(token)

    def remove_finished(self) -> list[Answer]:
        """Removes the finished rows and returns their answers. Rows from the end move into the gaps."""
        answers = []
        for i in reversed(range(len(self.rows))):
            row = self.rows[i]
            if self.is_finished(row):
                reason = "stop" if row.token_ids[-1] in self.eos else "length"
                answers.append(Answer(row.index, row.token_ids, row.logprobs, row.moments, reason))
                last = len(self.rows) - 1
                if i != last:
                    self.cache.move_row(last, i)
                    self.rows[i] = self.rows[last]
                    self.tokens[i] = self.tokens[last]
                self.rows.pop()
                self.tokens = self.tokens[:last]
                row.is_removed = True
        return answers[::-1]


def static_batching(batch: RunningBatch, requests: list[tuple[int, dict]]) -> Iterator[Step]:
    """Admits all requests at once and yields one Step per token; the rows of a Step are in the order of the requests."""
    batch.admit(requests)
    rows, pad = list(batch.rows), batch.model.config.pad_token_id
    while batch.rows:
        step = Step(
            torch.tensor([pad if row.is_removed else row.token_ids[-1] for row in rows], device="cpu"),
            torch.tensor([0.0 if row.is_removed else row.logprobs[-1] for row in rows], device="cpu"),
            torch.tensor([row.is_removed or batch.is_finished(row) for row in rows], device="cpu"),
            [None if row.is_removed else row.moments[-1] for row in rows],
        )
        batch.remove_finished()
        yield step
        if batch.rows:
            batch.step()


def continuous_batching(batch: RunningBatch, requests: Iterator[tuple[int, dict]]) -> Iterator[Answer]:
    """Admits a request whenever a row is free, and yields each answer when it is finished."""
    while True:
        yield from batch.remove_finished()
        new_requests = list(islice(requests, batch.max_rows - len(batch.rows)))
        if new_requests:
            batch.admit(new_requests)
        elif batch.rows:
            batch.step()
        else:
            return


def generate_steps(
    model: nn.Module,
    inputs: dict,
    max_new_tokens: int = 40,
    sampling: Sampling = Sampling(),
    grammar: "Grammar | None" = None,
    *,
    eos_token_id: int | Collection[int] | str | None = "config",
    suppress_tokens: Iterable[int] = (),
    locations: range | None = None,
) -> Iterator[Step]:
    """Like generate, but each step has the log-probabilities of its tokens and tells which rows are finished.

    Args:
        locations: the ids of the location tokens in order (processor.location_ids). If given, Step.moments is computed.
    """
    rows = split_rows(inputs, model.config)
    batch = RunningBatch(model, len(rows), max_new_tokens, sampling, eos_token_id, locations, suppress_tokens)
    return static_batching(batch, [(i, row | {"grammar": grammar}) for i, row in enumerate(rows)])


def generate(
    model: nn.Module,
    inputs: dict,
    max_new_tokens: int = 40,
    sampling: Sampling = Sampling(),
    grammar: "Grammar | None" = None,
    *,
    eos_token_id: int | Collection[int] | str | None = "config",
    suppress_tokens: Iterable[int] = (),
) -> Iterator[Tensor]:
    """The answers to a batch, one token of every row at a time.

    Args:
        inputs: the result of the processor, padded on the left or on the right. `image_features` from model.encode_images may
            replace `pixel_values`.
        max_new_tokens: the maximum number of tokens of an answer.
        sampling: how tokens are chosen; Sampling() takes the most likely token.
        grammar: constrains the answer of every row; None = no constraint.
        eos_token_id: the token or tokens that end an answer; "config" = the eos tokens of model.config, as in transformers;
            None = answers end only at max_new_tokens.
        suppress_tokens: ids that are never generated; <image> is always one of them. Pass processor.unused_ids(vocab_size) to
            suppress ids without a token, which the model was not trained on.
    Returns: an iterator that yields a new int64[B] on the CPU in each step, with the pad token for finished rows. The iterator
        ends when all rows are finished.
    Raises: before the first step, GenerationError (exit code 2) for arguments out of range and PromptError for inconsistent
        inputs; later, GenerationError if the model computes logits that are NaN or infinite.
    """
    steps = generate_steps(
        model, inputs, max_new_tokens, sampling, grammar, eos_token_id=eos_token_id, suppress_tokens=suppress_tokens
    )
    return (step.tokens for step in steps)


def generate_many(
    model: nn.Module,
    requests: Iterable[dict],
    max_new_tokens: int = 40,
    sampling: Sampling = Sampling(),
    grammar: "Grammar | None" = None,
    *,
    rows: int,
    eos_token_id: int | Collection[int] | str | None = "config",
    suppress_tokens: Iterable[int] = (),
    locations: range | None = None,
) -> Iterator[Answer]:
    """Answers any number of requests, `rows` at a time. When an answer is finished, the next request takes its row.

    Args:
        requests: batches of one row each, as the processor returns them. A request is read only when a row is free.
        sampling: as in generate. Request i uses seed + i, so that its answer does not depend on the other requests.
        grammar: as in generate. If a request has the key "grammar", that grammar is used instead; None = no constraint.
        rows: the maximum number of requests that run at the same time. More rows need more memory for the cache, but decoding
            rows together takes less time than decoding them one after the other.
        locations: as in generate_steps.
    Returns: an iterator of Answer, in the order in which the answers are finished.
    Raises: as in generate, but PromptError for a request is raised when the request is read.
    """
    batch = RunningBatch(model, rows, max_new_tokens, sampling, eos_token_id, locations, suppress_tokens)
    single_rows = (only_row(inputs, model.config) | {"grammar": inputs.get("grammar", grammar)} for inputs in requests)
    return continuous_batching(batch, enumerate(single_rows))
