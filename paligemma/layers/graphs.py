"""What a CUDA GPU is fast at: a decoding step that starts with one call, compiled if there are many, and soft caps in one kernel.

A step of decoding is some fifty small kernels a layer, and Python starts them more slowly than a fast GPU runs them. Recorded
once as a CUDA graph, they start with one call. A graph has fixed shapes and fixed places in memory: so rows are counted in powers
of two and slots in 256 times powers of two (`bucket`), each such pair has a `Step` of its own, tokens are copied in, logits are
read where they always appear, and lengths count on the device. Rows of a graph that are not in use write into the slot that their
next token will overwrite.

A step that has run many thousand times is compiled and recorded again: torch.compile makes a kernel or two of what lies between
the products, and products of one row of its own, as gpt-fast does. `Step.__call__` decides this, and nothing else does.

`use_graphs` gives all this to a model. tests/layers/test_graphs.py runs it on a CPU, with a stand-in for the graph; what only a
GPU can show has not been seen: `record` has never run, inductor's kernels for CUDA have not either, no speed was measured, and
the numbers below are estimates. benchmarks/gpu.sh is there to replace them.
Shapes: B rows, V vocabulary; the rest as in modeling_gemma.py.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from paligemma.layers import kernels
from paligemma.layers.batch_cache import BatchCache
from paligemma.modeling_gemma import GemmaAttention, KVCache
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration

SLOTS = 256  # a graph reads so many slots, or twice, four times ... as many; caches are multiples of it
WARM_UP = 3  # steps before recording, real ones: libraries have to start, and an answer of one word is not worth it
COMPILE_AFTER = 20_000  # steps of one shape, a minute or so: as long as compiling may take, so that it at most doubles the time
COMPILED_SHAPES = 256  # after that many, torch would refuse to compile
CAPPED_TOKENS = 1024  # tokens of 448 px: with fewer, written-out scores are small, and no start waits for a compiler

log = logging.getLogger(__name__)


@functools.cache
def warn_once(text: str) -> None:
    log.warning(text)


def bucket(count: int, unit: int, most: int) -> int:
    """`unit` times the power of two that holds `count`, but no more than `most`."""
    size = unit
    while size < count:
        size *= 2
    return min(size, most)


def record(work: Callable[[], Tensor], pool: object) -> tuple[Callable[[], None], Tensor]:
    """Records `work` as a CUDA graph without running it. This function has never run.

    Args:
        work: has run before, and touches nothing but memory that stays.
        pool: torch.cuda.graph_pool_handle(); graphs that never run at the same time share the memory of what is between.
    Returns: what runs it again, and the result, which then appears in the same place.
    """
    graph = torch.cuda.CUDAGraph()
    # Should recording fail, the outer `with` brings the stream back. Other threads may allocate meanwhile.
    with torch.cuda.stream(torch.cuda.current_stream()):
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = work()
    return graph.replay, result


@functools.cache
def compiled_step() -> Callable[[PaliGemmaForConditionalGeneration, KVCache, Tensor], Tensor]:
    """The model's own step through torch.compile, once for each shape; fullgraph, so that a wait for the device is an error."""
    import torch._dynamo  # not before it is needed: it takes a second

    kernels.keep_torch_private()
    torch._dynamo.config.recompile_limit = max(COMPILED_SHAPES, torch._dynamo.config.recompile_limit)
    # With this tuning the product of one row is a sum of inductor's own instead of cuBLAS's product.
    options = {"coordinate_descent_tuning": True}
    return torch.compile(PaliGemmaForConditionalGeneration.step, fullgraph=True, dynamic=False, options=options)


class Step:
    """A step of decoding of fixed shape: run as it is, then recorded, then compiled and recorded again.

    Args:
        model: whose step it is.
        cache: its first `rows` rows are decoded, and `reach` slots of each are read.
        pool: see `record`.
        compile_after: steps.
    """

    def __init__(
        self, model: PaliGemmaForConditionalGeneration, cache: BatchCache, rows: int, reach: int, pool: object, compile_after: int
    ):
        self.model, self.pool, self.compile_after = model, pool, compile_after
        self.cache = cache[:rows].fixed(reach)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=cache.lengths.device)
        self.function = PaliGemmaForConditionalGeneration.step
        self.num_steps = 0
        self.can_record = True
        self.replay: Callable[[], None] | None = None
        self.logits: Tensor | None = None

    def work(self) -> Tensor:
        return self.function(self.model, self.cache, self.tokens)

    def compile(self) -> None:
        """Goes over to the compiled step, which has run once then; where that fails, all stays as it was."""
        plain, lengths = self.function, self.cache.lengths.clone()
        self.function = compiled_step()
        try:
            self.work()
            self.replay = None
        except (RuntimeError, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            warn_once(f"decoding is not compiled: {str(error).strip().splitlines()[0]}")
            self.function = plain
        self.cache.lengths.copy_(lengths)

    def record(self) -> None:
        """Records the step; where that fails, it goes on as it is."""
        try:
            self.replay, self.logits = record(self.work, self.pool)
        except RuntimeError as error:
            warn_once(f"decoding is not recorded as a CUDA graph: {str(error).strip().splitlines()[0]}")
            self.can_record = False

    def __call__(self, tokens: Tensor) -> Tensor:
        """Decodes the first rows: tokens int64[n] on the device, n <= rows. Returns float32[n, V]."""
        used = len(tokens)
        self.tokens[:used] = tokens
        if self.num_steps == self.compile_after:
            self.compile()
        if self.replay is None and self.can_record and self.num_steps >= min(WARM_UP, self.compile_after):
            self.record()
        self.num_steps += 1
        if self.replay is None:
            logits = self.work()
        else:
            self.replay()
            logits = self.logits
        if used < len(self.tokens):
            self.cache.lengths[used:] -= 1
        return logits[:used].clone()  # the next step writes where these are


class Steps:
    """The steps over one cache, by shape."""

    def __init__(self, model: PaliGemmaForConditionalGeneration, cache: BatchCache, compile_after: int):
        self.model, self.cache, self.compile_after = model, cache, compile_after
        self.pool = torch.cuda.graph_pool_handle() if cache.lengths.is_cuda else None
        self.steps: dict[tuple[int, int], Step] = {}

    def find(self, used: int, reach: int) -> Step:
        """The step for the first `used` rows, the longest of which has `reach` tokens."""
        rows = bucket(used, 1, len(self.cache.lengths))
        if bool((self.cache.host_lengths[used:rows] == self.cache.slots).any()):
            rows = used  # a row that is full has no next slot
        shape = rows, bucket(reach, SLOTS, self.cache.slots)
        if shape not in self.steps:
            self.steps[shape] = Step(self.model, self.cache, *shape, self.pool, self.compile_after)
        return self.steps[shape]


class RecordedCache(BatchCache):
    """A KVCache with its steps, which live as long as its memory does; a part of it has the same ones."""

    def __init__(self, model: "RecordedPaliGemma", batch: int, slots: int):
        super().__init__(model.config.text_config, batch, slots, device=model.device, dtype=model.dtype)
        self.steps = Steps(model, self[:], model.compile_after)


class RecordedPaliGemma(PaliGemmaForConditionalGeneration):
    """PaliGemma that records its steps. Made by `use_graphs`, which sets `compile_after`."""

    compile_after: int

    def new_cache(self, batch: int, slots: int, kind: type[KVCache] = KVCache) -> KVCache:
        if not issubclass(RecordedCache, kind):
            return super().new_cache(batch, slots, kind)
        return RecordedCache(self, batch, -(-slots // SLOTS) * SLOTS)

    def step(self, cache: KVCache, tokens: Tensor) -> Tensor:
        is_inside = cache.lengths.storage_offset() > 0  # cache[2:4]: graphs begin at row 0
        is_derived = type(self) is not RecordedPaliGemma  # by FSDP, which gathers weights in every step
        if torch.is_grad_enabled() or is_inside or is_derived or not isinstance(cache, RecordedCache):
            return super().step(cache, tokens)
        return cache.steps.find(len(tokens), cache.slots_read)(tokens)


def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float) -> Tensor:
    """modeling_gemma.attention with a cap, on torch's flex_attention: compiled, it is one kernel that keeps no scores."""
    from torch.nn.attention.flex_attention import flex_attention  # not before it is needed: it takes two seconds

    def change(score: Tensor, row: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:  # noqa: ARG001  (flex's signature)
        score = torch.tanh(score / cap) * cap
        return score if mask is None else torch.where(mask[row, 0, query, slot], score, -torch.inf)

    return flex_attention(q, k, v, score_mod=change, scale=scale, enable_gqa=True)


@functools.cache
def compiled_capped_attention() -> Callable[..., Tensor]:
    kernels.keep_torch_private()
    return torch.compile(capped_attention, fullgraph=True)


class CappedAttention(GemmaAttention):
    """GemmaAttention that reads a long prompt through capped_attention."""

    is_working = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if CappedAttention.is_working and q.shape[2] >= CAPPED_TOKENS and not torch.is_grad_enabled():
            try:
                return compiled_capped_attention()(q, k, v, mask, self.scale, self.cap)
            except RuntimeError as error:
                warn_once(f"soft caps are written out: {str(error).strip().splitlines()[0]}")
                CappedAttention.is_working = False
        return super().attend(q, k, v, mask)


def use_graphs(model: PaliGemmaForConditionalGeneration, compile_after: int = COMPILE_AFTER) -> None:
    """Gives a model on CUDA what the header says; parameters and names stay.

    Args:
        compile_after: steps of one shape, after which it is compiled; 0 = at once.
    """
    model.__class__ = RecordedPaliGemma
    model.compile_after = compile_after
    for module in model.modules():
        if type(module) is GemmaAttention and module.cap is not None:
            module.__class__ = CappedAttention
