"""From logits to answers: greedy or sampled, one row or many, streamed or whole. Takes a model, imports none.

There is one loop. `Decoder` holds the rows in flight side by side in one static KV cache: `admit` reads pictures and prompts
into free rows, `step` says one token in every row, `retire` frees a row. A row that has ended costs nothing from then on.
`generate` admits all rows at once and yields a tensor a step; `generate_many` admits the next request whenever a row is
free, so that a folder of a million pictures keeps every row busy (continuous batching: Orca, OSDI 2022). A row may be held to a
grammar (grammar.py): it then says the best, or draws, among the tokens that its grammar allows.

On CUDA nothing waits for the token that was just said: the next step is under way before main memory reads it. So a row's end is
found one step late, and what it said behind it is dropped; what remains is the same. A grammar has to know each token at once.

Checked in tests/test_generation.py. Shapes: B rows, L tokens of a prompt with its pictures, V vocabulary,
C candidates for the next token, Q bins of a coordinate.
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

from paligemma.errors import GenerationError, PromptError

if TYPE_CHECKING:
    from paligemma.objects.grammar import Grammar, Walk

PREFILL_TOKENS = 4096  # tokens read in one pass; more would only take memory, since matrix products are at their best long before
NUCLEUS = 256  # the most likely tokens that top_p looks at first; a vocabulary of 257216 is sorted only if they do not suffice
PICTURES = ("pixel_values", "image_features")  # the two forms in which pictures come; a batch has one of them or none
LARGEST = sys.float_info.max  # a whole number above it cannot be compared with logits
NEIGHBOURHOOD = 64  # bins to either side of a coordinate that count for its mean; 24 to 128 give the same within 1 %


def shown(value: object) -> str:
    """A value for an error message, cut where it is long: 10^400 has too many digits, and Python refuses to print 10^5000."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return "a whole number of thousands of digits"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy, as without do_sample.

    Args:
        temperature: logits are divided by it.
        top_k: keep the k most likely tokens; None = all.
        top_p: of those, keep the fewest whose probabilities sum to at least p (arXiv:1904.09751).
        seed: of the random numbers; row i of a batch draws from seed + i, so that neighbours do not matter. None = any.
    Raises: GenerationError with exit code 2.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self):
        def is_number(value: object, kind: type = Real) -> bool:  # also one of numpy's
            return isinstance(value, kind) and not isinstance(value, bool)

        if not isinstance(self.do_sample, bool):
            raise GenerationError(f"do_sample is {self.do_sample!r}; True or False is needed.", code=2)
        if not (is_number(self.temperature) and 0 <= self.temperature <= LARGEST):
            raise GenerationError(f"temperature is {shown(self.temperature)}; a number from 0 up is needed.", code=2)
        if not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise GenerationError(f"top_p is {shown(self.top_p)}; a number above 0 and up to 1 is needed.", code=2)
        if self.top_k is not None and not (is_number(self.top_k, Integral) and self.top_k > 0):
            raise GenerationError(f"top_k is {shown(self.top_k)}; a whole number from 1 up is needed.", code=2)
        if self.seed is not None and not (is_number(self.seed, Integral) and 0 <= self.seed < 2**63):
            raise GenerationError(f"seed is {shown(self.seed)}; a whole number from 0 to 2^63 - 1 is needed.", code=2)

    @property
    def is_greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0


@dataclass(frozen=True)
class Step:
    """One token of every row: tokens int64[B], logprobs float32[B], is_finished bool[B]. A finished row says pad, logprob 0.

    places: one entry a row; for a token that names a coordinate what coordinate_moments says of it, else None.
    """

    tokens: Tensor
    logprobs: Tensor
    is_finished: Tensor
    places: list[tuple[float, float] | None]


@dataclass(frozen=True)
class Answer:
    """What one request was answered: its place in the sequence, its tokens (an eos included), and of each token its
    log-probability and, if it names a coordinate, what coordinate_moments says of it."""

    index: int
    token_ids: list[int]
    logprobs: list[float]
    places: list[tuple[float, float] | None]
    finish_reason: str  # "stop" = said eos, "length" = reached max_new_tokens or the end of the model's context


@dataclass
class Row:
    """A request in flight."""

    index: int
    limit: int
    uniform: torch.Generator
    walk: "Walk | None"
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    places: list[tuple[float, float] | None] = field(default_factory=list)
    num_said: int = 0  # tokens, those that main memory has not read included
    is_retired: bool = False


class Saying:
    """One token of each of some rows, on its way to main memory.

    Args:
        rows: who said them.
        numbers: float32[B, ...] on the device: token, log-probability and, where asked for, mean and spread of a coordinate.
    """

    def __init__(self, rows: list[Row], numbers: Tensor):
        self.rows = rows
        self.numbers = numbers.to("cpu", non_blocking=True)
        self.arrival = None
        if numbers.is_cuda:
            self.arrival = torch.cuda.Event()
            self.arrival.record()

    def read(self) -> list[tuple[Row, list[float]]]:
        """Each row that has not ended meanwhile, with its numbers, once they are there."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return [pair for pair in zip(self.rows, self.numbers.tolist(), strict=True) if not pair[0].is_retired]


def nucleus(logits: Tensor, probs: Tensor, top_p: float, top_k: int | None) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn, most likely first: probabilities [B, C], 0 for those cut, and ids int64[B, C].

    Args:
        logits, probs: [B, V]; the order is that of the logits, since a high temperature rounds probabilities to equal ones.
        top_p, top_k: as Sampling.
    """
    vocabulary = logits.shape[-1]
    count = min(top_k or NUCLEUS, vocabulary)
    ids = logits.topk(count).indices  # [B, C]
    best = probs.gather(1, ids)  # [B, C]
    while top_k is None and count < vocabulary and bool((best.sum(-1) < top_p).any()):
        count = min(4 * count, vocabulary)
        ids = logits.topk(count).indices  # [B, C]
        best = probs.gather(1, ids)  # [B, C]
    if top_k is not None:
        best = best / best.sum(-1, keepdim=True)
    if top_p < 1:  # the first always stays: a top_p that rounds to 0 must not cut everything
        best[:, 1:] = best[:, 1:].masked_fill(best.cumsum(-1)[:, :-1] >= top_p, 0)
    return best, ids


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """float64[B, V] (float32 on Apple's GPUs, which have no float64): what temperature makes of the logits, float32[B, V].

    In float64, so that no temperature or top_p that Python can write is rounded to 0 or 1, and the tokens that top_p keeps are
    those of exact arithmetic. Where no token has a probability (all are ruled out, or NaN) all have the same.
    """
    smallest, exact = (1e-30, torch.float32) if logits.device.type == "mps" else (1e-300, torch.float64)
    # Any two different logits are so far apart at the smallest temperature that the lower one gets 0. The best one becomes 0
    # before the division, so that no quotient overflows.
    logits = logits.to(exact)
    gaps = (logits - logits.amax(-1, keepdim=True)).nan_to_num(nan=0)  # [B, V]
    return (gaps / min(max(float(temperature), smallest), 1 / smallest)).softmax(-1)  # [B, V]


def choose(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> Tensor:
    """Picks the next token of each row.

    Args:
        logits: float32[B, V].
        uniforms: float64[B] in [0, 1) on the CPU, the draw of each row; the token is the one whose share of 0 to 1 holds it.
    Returns: int64[B].
    """
    if sampling.is_greedy:
        return logits.argmax(-1)  # [B]
    probs = probabilities(logits, sampling.temperature)  # [B, V]
    ids = None
    if sampling.top_p < 1 or sampling.top_k is not None:
        probs, ids = nucleus(logits, probs, float(sampling.top_p), sampling.top_k)  # [B, C], [B, C]
    ends = probs.cumsum(-1)
    # Rounded to 1, a draw would reach past the last share, to a token that was cut.
    uniforms = uniforms.to(ends.dtype).clamp(max=1 - torch.finfo(ends.dtype).eps)
    marks = uniforms.to(ends.device, non_blocking=ends.is_cuda)[:, None] * ends[:, -1:]  # [B, 1]
    place = torch.searchsorted(ends, marks, right=True)  # [B, 1]
    return (place if ids is None else ids.gather(1, place))[:, 0]  # [B]


def choose_held(logits: Tensor, sampling: Sampling, uniforms: Tensor, allowed: list[Tensor]) -> Tensor:
    """As choose, but row i picks among the ids allowed[i] alone: int64[C] in main memory, with a C of its own."""
    ids = nn.utils.rnn.pad_sequence(allowed, batch_first=True, padding_value=-1).to(logits.device)  # [B, C]
    is_padding = ids < 0
    ids = torch.where(is_padding, ids[:, :1], ids)  # so that whatever is picked is allowed
    candidates = logits.gather(1, ids).masked_fill(is_padding, -torch.inf)  # [B, C]
    places = choose(candidates, sampling, uniforms)[:, None]  # [B, 1]
    return ids.gather(1, places)[:, 0]  # [B]


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """float32[B], of the tokens chosen, before temperature, top-k, top-p and grammar; NaN if the logits are not finite."""
    total = logits.logsumexp(-1)  # [B]
    return logits.gather(1, tokens[:, None])[:, 0] - total.masked_fill(total.isinf(), torch.nan)  # [B]


def coordinate_moments(logits: Tensor, tokens: Tensor, locations: range) -> tuple[Tensor, Tensor]:
    """Where the model would put a coordinate and how sure it is: a mean over bins near the one said, a deviation over all.

    A token names one bin of 1024; the probabilities of its neighbours say where in between the edge lies. Bins far away belong
    to other objects that the model might have named: they would pull the mean between two objects (on the demo's scenes it then
    misses by 9.7 bins, near ones alone by 7.4, the bin itself by 8.1), but they make the deviation large, as it should be.

    Args:
        logits: float32[B, V].
        tokens: int64[B], those said. Where one is no location the two numbers mean nothing.
        locations: the ids of the bins in their order; probabilities are over these alone.
    Returns: float32[B] and float32[B], in bins: the mean, and the root of the mean square distance from it.
    """
    scores = logits[:, locations.start : locations.stop]  # [B, Q]
    bins = torch.arange(len(locations), device=scores.device, dtype=scores.dtype)
    said = (tokens - locations.start).clamp(0, len(locations) - 1)  # [B]
    is_far = (bins - said[:, None]).abs() > NEIGHBOURHOOD  # [B, Q]
    mean = (scores.masked_fill(is_far, -torch.inf).softmax(-1) * bins).sum(-1)  # [B]
    variance = (scores.softmax(-1) * (bins - mean[:, None]) ** 2).sum(-1)  # [B]
    return mean, variance.sqrt()


def split_rows(inputs: dict, config: Any) -> list[dict]:
    """A processor's batch as one dict a row, its padding left out: input_ids int64[L], token_type_ids, the row's pictures.

    Raises: PromptError when the rows' <image> tokens do not call for just the pictures that are there, and for a row that is
        empty or fills the model's context.
    """
    given = [key for key in PICTURES if inputs.get(key) is not None]
    if len(given) == 2:
        raise PromptError("pixel_values and image_features are two forms of the same pictures. Pass one of them.")
    pictures = given[0] if given else None
    input_ids, types, mask = (inputs.get(key) for key in ("input_ids", "token_type_ids", "attention_mask"))
    if types is None and pictures is not None:
        raise PromptError("token_type_ids are missing: without them it is not known where the prompt ends. Pass the processor's.")
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
            raise PromptError(f"row {i} ends a picture after {rest} of {config.num_image_tokens} <image> tokens. Pass them all.")
        if pictures is not None and count:
            row[pictures] = inputs[pictures][used : used + count]
        used += count
        rows.append(row)
    came = 0 if pictures is None else len(inputs[pictures])
    if used != came:
        raise PromptError(f"the rows have <image> tokens for {used} pictures, but {came} came. Pass what the processor returns.")
    return rows


def only_row(inputs: dict, config: Any) -> dict:
    """The row of a request. Raises PromptError as split_rows, and for more rows than one."""
    rows = split_rows(inputs, config)
    if len(rows) != 1:
        raise PromptError(f"a request of {len(rows)} rows came. Pass each row as a request of its own.")
    return rows[0]


def join_rows(rows: list[dict], pad_token_id: int) -> dict:
    """Rows of split_rows as one batch, padded on the right, as prefill takes it."""
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])  # [B]
    batch = {
        key: torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True, padding_value=pad_token_id)
        for key in ("input_ids", "token_type_ids")
    }
    batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()  # [B, L]
    for key in PICTURES:
        pictures = [row[key] for row in rows if key in row]
        if pictures:
            batch[key] = torch.cat(pictures)
    return batch


def first_group(requests: list[tuple[int, dict]]) -> list[tuple[int, dict]]:
    """As many of the first requests as one pass reads: not too many tokens, and all pictures in one form."""
    longest, forms = 0, set()
    for count, (_, row) in enumerate(requests):
        longest = max(longest, len(row["input_ids"]))
        forms |= row.keys() & set(PICTURES)
        if count and ((count + 1) * longest > PREFILL_TOKENS or len(forms) > 1):
            return requests[:count]
    return requests


class Decoder:
    """The rows in flight, side by side in the first rows of one static cache.

    Args:
        model: PaliGemmaForConditionalGeneration, or anything with its new_cache, prefill, decode and config.
        rows: the most requests in flight.
        max_new_tokens: the longest answer; an answer is shorter where the model's context ends first.
        sampling: how tokens are chosen.
        eos_token_id: the token or tokens that end an answer; "config" = those of the model's config, None = none does.
        locations: the ids that name coordinates, for Answer.places; None = all places are None.
        suppress_tokens: ids that are never generated, as <image> never is; those outside the vocabulary mean nothing.
    Raises: GenerationError with exit code 2 for arguments that make no sense.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: int,
        max_new_tokens: int,
        sampling: Sampling,
        eos_token_id: object,
        locations: range | None = None,
        suppress_tokens: Iterable[int] = (),
    ):
        for name, value in (("max_new_tokens", max_new_tokens), ("rows", rows)):
            if not (type(value) is int and value > 0):
                raise GenerationError(f"{name} is {value!r}; a whole number from 1 up is needed.", code=2)
        if isinstance(eos_token_id, str) and eos_token_id == "config":
            eos_token_id = model.config.eos_token_id
        ids = [] if eos_token_id is None else eos_token_id if isinstance(eos_token_id, Collection) else [eos_token_id]
        if isinstance(ids, str) or not all(type(token) is int for token in ids):
            message = f"eos_token_id is {eos_token_id!r}; a token id, a list of them, None or 'config' is needed."
            raise GenerationError(message, code=2)
        never = list(suppress_tokens) if isinstance(suppress_tokens, Iterable) else [None]
        if not all(type(token) is int for token in never):
            raise GenerationError(f"suppress_tokens is {suppress_tokens!r}; a list of token ids is needed.", code=2)
        self.model = model
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens
        self.max_rows = rows
        self.eos = frozenset(ids)
        self.locations = locations
        vocabulary = model.config.text_config.vocab_size
        never = {model.config.image_token_index, *never}  # <image> may lie outside the vocabulary
        self.suppressed = torch.tensor([token for token in sorted(never) if 0 <= token < vocabulary], dtype=torch.int64)
        self.seed = torch.Generator().seed() % 2**62 if sampling.seed is None else sampling.seed
        self.cache: Any = None  # the model's own kind
        self.rows: list[Row] = []
        self.tokens = torch.empty(0, dtype=torch.int64)
        self.sayings: deque[Saying] = deque()  # not read yet; never more than two

    def is_finished(self, row: Row) -> bool:
        return row.token_ids[-1] in self.eos or len(row.token_ids) >= row.limit

    @torch.no_grad()
    def admit(self, requests: list[tuple[int, dict]]) -> None:
        """Reads requests, pairs of index and row of split_rows (with its "grammar", if it has one), into free rows and says the
        first token of each."""
        config = self.model.config
        context = config.text_config.max_position_embeddings
        longest = max(len(row["input_ids"]) for _, row in requests)
        self.make_room(min(longest + self.max_new_tokens, context))
        while requests:
            group = first_group(requests)
            requests = requests[len(group) :]
            first, count = len(self.rows), len(group)
            for index, row in group:
                limit = min(self.max_new_tokens, context - len(row["input_ids"]))
                grammar = row.get("grammar")
                walk = None if grammar is None else grammar.start(limit)
                self.rows.append(Row(index, limit, torch.Generator().manual_seed((self.seed + index) % 2**63), walk))
            batch = join_rows([row for _, row in group], config.pad_token_id)
            logits = self.model.prefill(self.cache[first : first + count], **batch)  # [B, V]
            self.read(self.say(logits, first))

    def make_room(self, slots: int) -> None:
        """Allocates the cache when the first request comes, and a larger one should a longer request come."""
        if self.cache is None or self.cache.slots < slots:
            cache = self.model.new_cache(self.max_rows, slots)
            if self.cache is not None:
                cache.take(self.cache)
            self.cache = cache

    @property
    def is_ahead(self) -> bool:
        """Whether the next step may begin before the last is read: worth it where the device works by itself."""
        return self.cache.lengths.is_cuda and all(row.walk is None for row in self.rows)

    @torch.no_grad()
    def step(self) -> None:
        """One more token of every row is read; the device says the next meanwhile, where that is worth it."""
        if not self.sayings:
            self.sayings.append(self.decode())
        if self.is_ahead and any(row.num_said < row.limit for row in self.rows):
            self.sayings.append(self.decode())
        self.read(self.sayings.popleft())

    def decode(self) -> Saying:
        """Says one more token in every row."""
        logits = self.model.decode(self.cache[: len(self.rows)], self.tokens)  # [B, V]
        return self.say(logits, 0)

    def choose(self, logits: Tensor, rows: list[Row]) -> Tensor:
        """The next token of each row, int64[B]; where the row has a grammar, one of those that it allows."""
        uniforms = torch.zeros(len(rows), dtype=torch.float64)  # [B]
        if not self.sampling.is_greedy:
            for i, row in enumerate(rows):
                uniforms[i] = torch.rand((), dtype=torch.float64, generator=row.uniform)
        allowed = [row.walk.allowed() for row in rows if row.walk is not None]
        if len(allowed) == len(rows):
            return choose_held(logits, self.sampling, uniforms, allowed)
        tokens = choose(logits, self.sampling, uniforms)  # [B]
        if allowed:
            held = torch.tensor([i for i, row in enumerate(rows) if row.walk is not None])
            tokens[held] = choose_held(logits[held], self.sampling, uniforms[held], allowed)
        return tokens

    def say(self, logits: Tensor, first: int) -> Saying:
        """Chooses the next token of the rows from `first` on."""
        self.suppressed = self.suppressed.to(logits.device)
        logits.index_fill_(1, self.suppressed, -torch.inf)
        rows = self.rows[first:]
        tokens = self.choose(logits, rows)  # [B]
        self.tokens = torch.cat((self.tokens[:first].to(tokens.device), tokens))
        columns = [tokens.float(), log_probabilities(logits, tokens)]  # float32 holds every id below 2^24
        if self.locations is not None:
            columns += coordinate_moments(logits, tokens, self.locations)
        for row in rows:
            row.num_said += 1
        return Saying(rows, torch.stack(columns, 1))

    def read(self, saying: Saying) -> None:
        """Hands the rows what they said. Raises GenerationError when the logits were not numbers."""
        for row, (number, logprob, *place) in saying.read():
            token = int(number)
            if math.isnan(logprob):
                raise GenerationError(
                    f"the model's logits are not finite ({self.model.dtype} weights, token {len(row.token_ids) + 1} of a row). "
                    "float16 overflows in Gemma; use bfloat16 or float32, or check the checkpoint for NaN."
                )
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            row.places.append(tuple(place) if self.locations is not None and token in self.locations else None)
            if row.walk is not None:
                row.walk.say(token)

    def retire(self) -> list[Answer]:
        """Takes the rows that have ended out; the last rows move into the gaps."""
        answers = []
        for i in reversed(range(len(self.rows))):
            row = self.rows[i]
            if self.is_finished(row):
                reason = "stop" if row.token_ids[-1] in self.eos else "length"
                answers.append(Answer(row.index, row.token_ids, row.logprobs, row.places, reason))
                last = len(self.rows) - 1
                if i != last:
                    self.cache.move(last, i)
                    self.rows[i] = self.rows[last]
                    self.tokens[i] = self.tokens[last]
                self.rows.pop()
                self.tokens = self.tokens[:last]
                row.is_retired = True
        return answers[::-1]


def lockstep(decoder: Decoder, requests: list[tuple[int, dict]]) -> Iterator[Step]:
    """Admits all requests at once and yields a Step for every token, rows in the order of the requests."""
    batch = len(requests)
    decoder.admit(requests)
    while decoder.rows:
        tokens = torch.full((batch,), decoder.model.config.pad_token_id)  # [B]
        logprobs = torch.zeros(batch)  # [B]
        is_finished = torch.ones(batch, dtype=torch.bool)  # [B]
        places: list[tuple[float, float] | None] = [None] * batch
        for row in decoder.rows:
            tokens[row.index] = row.token_ids[-1]
            logprobs[row.index] = row.logprobs[-1]
            is_finished[row.index] = decoder.is_finished(row)
            places[row.index] = row.places[-1]
        decoder.retire()
        yield Step(tokens, logprobs, is_finished, places)
        if decoder.rows:
            decoder.step()


def generate_steps(
    model: nn.Module,
    inputs: dict,
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    eos_token_id: int | Collection[int] | str | None = "config",
    suppress_tokens: Iterable[int] = (),
    grammar: "Grammar | None" = None,
    locations: range | None = None,
) -> Iterator[Step]:
    """As generate, but each step carries the tokens' log-probabilities, which rows have ended, and with `locations`, the ids of
    the bins in their order (processor.locations), what coordinate_moments says of every token among them."""
    sampling = Sampling(do_sample, temperature, top_p, top_k, seed)
    rows = split_rows(inputs, model.config)
    decoder = Decoder(model, len(rows), max_new_tokens, sampling, eos_token_id, locations, suppress_tokens)
    return lockstep(decoder, [(i, row | {"grammar": grammar}) for i, row in enumerate(rows)])


def generate(
    model: nn.Module,
    inputs: dict,
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    eos_token_id: int | Collection[int] | str | None = "config",
    suppress_tokens: Iterable[int] = (),
    grammar: "Grammar | None" = None,
) -> Iterator[Tensor]:
    """The answers, one token of every row at a time.

    Args:
        inputs: what the processor returned, padded on either side; `image_features` of model.encode_images may stand in place of
            `pixel_values`.
        max_new_tokens: the longest answer.
        do_sample, temperature, top_p, top_k, seed: see Sampling; without do_sample the most likely token is taken.
        eos_token_id: the token or tokens that end an answer; "config" = those that model.config names, as in transformers;
            None = never stop.
        suppress_tokens: ids that are never generated. <image> never is, and of the rest the model does not know which ids have
            a token: processor.unused_ids(vocab_size) does.
        grammar: what the answer of every row is held to; None = nothing.
    Returns: an iterator of a new int64[B] in main memory a step; ended rows say pad. It ends when every row has.
    Raises: GenerationError (exit code 2) for arguments out of range, PromptError for a batch that does not fit together, both
        at once; while running, GenerationError for logits that are not numbers.
    """
    steps = generate_steps(
        model,
        inputs,
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        eos_token_id=eos_token_id,
        suppress_tokens=suppress_tokens,
        grammar=grammar,
    )
    return (step.tokens for step in steps)


def refill(decoder: Decoder, requests: Iterator[tuple[int, dict]]) -> Iterator[Answer]:
    """Keeps every row busy as long as there are requests."""
    while True:
        yield from decoder.retire()
        arrivals = list(islice(requests, decoder.max_rows - len(decoder.rows)))
        if arrivals:
            decoder.admit(arrivals)
        elif decoder.rows:
            decoder.step()
        else:
            return


def generate_many(
    model: nn.Module,
    requests: Iterable[dict],
    *,
    rows: int,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    eos_token_id: int | Collection[int] | str | None = "config",
    suppress_tokens: Iterable[int] = (),
    grammar: "Grammar | None" = None,
    locations: range | None = None,
) -> Iterator[Answer]:
    """Answers any number of requests, `rows` at a time; a row that ends makes room for the next request.

    Args:
        requests: what the processor returned for one row each; read one by one, no sooner than there is room.
        rows: how many are in flight. Each takes the cache of one row and makes a step slower by less than a step of its own.
        grammar: as generate; a request that has a "grammar" among its keys, None included, is held to that one instead.
        others: as generate_steps. Request i draws from seed + i, so that an answer does not depend on what ran beside it.
    Returns: an iterator of Answer, in the order in which they end.
    Raises: as generate; PromptError for a request when it is read.
    """
    sampling = Sampling(do_sample, temperature, top_p, top_k, seed)
    decoder = Decoder(model, rows, max_new_tokens, sampling, eos_token_id, locations, suppress_tokens)
    arrivals = (only_row(inputs, model.config) | {"grammar": inputs.get("grammar", grammar)} for inputs in requests)
    return refill(decoder, enumerate(arrivals))
