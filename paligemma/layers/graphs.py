"""Faster decoding on CUDA: steps are recorded as CUDA graphs, and later compiled; attention with soft caps is one kernel.

A decoding step consists of about fifty small kernels per layer, and Python starts them more slowly than a fast GPU runs them. A
step that was recorded as a CUDA graph is started with one call. A graph has fixed shapes and fixed addresses:

- Shapes are rounded up (`bucket`): rows to a power of two, slots to 256 times a power of two. Each pair (rows, slots) has
  its own `Step`.
- The tokens are copied to the input buffer of the graph, and the logits are copied from its output buffer.
- The lengths of the rows are on the device, and the graph increments them. A graph may have more rows than are decoded. Each
  extra row writes into its next free slot, and its length is set back, so a later token overwrites what was written.

After a `Step` has run many thousand times, it is compiled and recorded again: torch.compile fuses the operations between the
matrix products, and generates its own matrix-vector kernels, as gpt-fast does. `Step.__call__` alone decides when.

`use_graphs` enables all this for a model. tests/layers/test_graphs.py runs it on a CPU, with a fake graph. The parts that need a
GPU have not been tested: `record` and inductor's kernels for CUDA have never run, no speed was measured, and the numbers below
are estimates. benchmarks/gpu.sh measures them on a GPU.
Shapes: B batch rows, L tokens fed in this call, S slots of the KV cache that are read, N query heads, K key/value heads,
E width of one head, V vocabulary size.
"""

import functools
import logging
import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from paligemma.layers import kernels
from paligemma.layers.batch_cache import BatchCache
from paligemma.modeling_gemma import GemmaAttention, KVCache
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration

SLOTS = 256  # a graph reads 256, 512, 1024, ... slots; the number of slots of a cache is a multiple of 256
WARM_UP = 3  # steps that run normally before one is recorded: libraries initialise in them, and short answers need no graph
# Steps of one shape before it is compiled. They take about as long as compiling may take, so even if decoding ends right after
# compiling, the total time is at most doubled.
COMPILE_AFTER = 20_000
COMPILED_SHAPES = 256  # torch refuses to compile more shapes than its recompile_limit, which is raised to this number
# Attention with a soft cap is compiled for prompts of at least this length, the number of image tokens at 448 px. Shorter prompts
# have a small score matrix, so plain attention is used.
MIN_TOKENS_TO_COMPILE_CAP = 1024

RECORDING = threading.Lock()  # torch records all graphs of a process on one stream, so only one thread may record at a time

log = logging.getLogger(__name__)


@functools.cache
def warn_once(text: str) -> None:
    log.warning(text)


def bucket(count: int, unit: int, most: int) -> int:
    """The smallest of unit, 2 unit, 4 unit, ... that is at least `count`, but at most `most`."""
    size = unit
    while size < count:
        size *= 2
    return min(size, most)


def record(work: Callable[[], Tensor], pool: object) -> tuple[Callable[[], None], Tensor]:
    """Records `work` as a CUDA graph without running it. This function has never run.

    Args:
        work: a function that has run before, and that uses only tensors whose addresses do not change.
        pool: torch.cuda.graph_pool_handle(); graphs that never run at the same time share the memory of intermediate results.
    Returns: a function that runs the graph, and the tensor to which the graph writes the result.
    """
    graph = torch.cuda.CUDAGraph()
    # torch.cuda.graph does not restore the current stream if recording fails, so the outer block does. The mode "thread_local"
    # lets other threads allocate memory during the recording.
    with torch.cuda.stream(torch.cuda.current_stream()):
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = work()
    return graph.replay, result


@functools.cache
def compiled_step() -> Callable[[PaliGemmaForConditionalGeneration, KVCache, Tensor], Tensor]:
    """The step of the model, compiled once per shape.

    With fullgraph, torch raises an error, instead of splitting the step, if an operation cannot be compiled (for example because
    it needs a value on the CPU).
    """
    import torch._dynamo  # imported only when needed: it takes a second

    kernels.set_private_compile_cache()
    torch._dynamo.config.recompile_limit = max(COMPILED_SHAPES, torch._dynamo.config.recompile_limit)
    # With this option inductor generates its own matrix-vector kernels instead of calling cuBLAS.
    options = {"coordinate_descent_tuning": True}
    return torch.compile(PaliGemmaForConditionalGeneration.step, fullgraph=True, dynamic=False, options=options)


class Step:
    """A decoding step of fixed shape: first run normally, then recorded, later compiled and recorded again.

    Args:
        model: the model that decodes.
        cache: its first `rows` rows are decoded, and `slots_read` slots of each are read.
        pool: see `record`.
        compile_after: number of steps before the step is compiled.
    """

    def __init__(
        self,
        model: PaliGemmaForConditionalGeneration,
        cache: BatchCache,
        rows: int,
        slots_read: int,
        pool: object,
        compile_after: int,
    ):
        self.model, self.pool, self.compile_after = model, pool, compile_after
        self.cache = cache[:rows].fixed(slots_read)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=cache.lengths.device)
        self.function = PaliGemmaForConditionalGeneration.step
        self.num_steps = 0
        self.can_record = True
        self.replay: Callable[[], None] | None = None
        self.logits: Tensor | None = None

    def work(self) -> Tensor:
        return self.function(self.model, self.cache, self.tokens)

    def compile(self) -> None:
        """Compiles the step, runs it once and uses it from now on; if that fails, the plain step is used as before."""
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
        """Records the step; if that fails, it runs without a graph as before."""
        try:
            with RECORDING:
                self.replay, self.logits = record(self.work, self.pool)
        except RuntimeError as error:
            warn_once(f"decoding is not recorded as a CUDA graph: {str(error).strip().splitlines()[0]}")
            self.can_record = False

    def __call__(self, tokens: Tensor) -> Tensor:
        """Decodes the first B rows of the cache, B <= rows: takes tokens int64[B] on the device, returns float32[B, V]."""
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
        return logits[:used].clone()  # the next step overwrites the output buffer


class Steps:
    """The steps of one cache, by shape."""

    def __init__(self, model: PaliGemmaForConditionalGeneration, cache: BatchCache, compile_after: int):
        self.model, self.cache, self.compile_after = model, cache, compile_after
        self.pool = torch.cuda.graph_pool_handle() if cache.lengths.is_cuda else None
        self.steps: dict[tuple[int, int], Step] = {}

    def find(self, used: int, slots_read: int) -> Step:
        """The step that decodes the first `used` rows, of which the longest has `slots_read` tokens."""
        rows = bucket(used, 1, len(self.cache.lengths))
        if bool((self.cache.host_lengths[used:rows] == self.cache.slots).any()):
            rows = used  # an extra row whose slots are all used has no free slot to write to
        shape = rows, bucket(slots_read, SLOTS, self.cache.slots)
        if shape not in self.steps:
            self.steps[shape] = Step(self.model, self.cache, *shape, self.pool, self.compile_after)
        return self.steps[shape]


class RecordedCache(BatchCache):
    """A BatchCache that owns its recorded steps; slices of the cache share the steps. The steps are freed with the cache."""

    def __init__(self, model: "RecordedPaliGemma", batch: int, slots: int):
        super().__init__(model.config.text_config, batch, slots, device=model.device, dtype=model.dtype)
        self.steps = Steps(model, self[:], model.compile_after)


class RecordedPaliGemma(PaliGemmaForConditionalGeneration):
    """PaliGemma that records its decoding steps.

    Args:
        model: the model whose modules and parameters are used.
        compile_after: number of steps of one shape before the step is compiled; 0 = at once.
    """

    def __init__(self, model: PaliGemmaForConditionalGeneration, compile_after: int = COMPILE_AFTER):
        nn.Module.__init__(self)
        self.config, self.window = model.config, model.window
        self.vision_tower = model.vision_tower
        self.multi_modal_projector = model.multi_modal_projector
        self.language_model = model.language_model
        self.compile_after = compile_after
        self.training = model.training

    def new_cache(self, batch: int, slots: int, kind: type[KVCache] = KVCache) -> KVCache:
        if not issubclass(RecordedCache, kind):  # the caller needs another kind of cache, whose steps cannot be recorded
            return super().new_cache(batch, slots, kind)
        return RecordedCache(self, batch, -(-slots // SLOTS) * SLOTS)

    def step(self, cache: KVCache, tokens: Tensor) -> Tensor:
        starts_later = cache.lengths.storage_offset() > 0  # a slice such as cache[2:4]; graphs begin at row 0
        is_derived = type(self) is not RecordedPaliGemma  # FSDP derives a class that gathers the weights in every step
        if torch.is_grad_enabled() or starts_later or is_derived or not isinstance(cache, RecordedCache):
            return super().step(cache, tokens)
        return cache.steps.find(len(tokens), cache.slots_read)(tokens)


def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float) -> Tensor:
    """modeling_gemma.attention with a soft cap, by torch's flex_attention. Compiled, it is one kernel and stores no scores."""
    from torch.nn.attention.flex_attention import flex_attention  # imported only when needed: it takes two seconds

    def change(score: Tensor, row: Tensor, _head: Tensor, query: Tensor, slot: Tensor) -> Tensor:
        score = torch.tanh(score / cap) * cap
        return score if mask is None else torch.where(mask[row, 0, query, slot], score, -torch.inf)

    return flex_attention(q, k, v, score_mod=change, scale=scale, enable_gqa=True)


@functools.cache
def compiled_capped_attention() -> Callable[..., Tensor]:
    kernels.set_private_compile_cache()
    return torch.compile(capped_attention, fullgraph=True)


class CappedAttention(GemmaAttention):
    """GemmaAttention that uses capped_attention for long prompts. Its parameters are those of the GemmaAttention `plain`."""

    is_working = True  # False for all layers after the first failure

    def __init__(self, plain: GemmaAttention):
        nn.Module.__init__(self)
        self.layer, self.scale, self.cap, self.width = plain.layer, plain.scale, plain.cap, plain.width
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = plain.q_proj, plain.k_proj, plain.v_proj, plain.o_proj
        self.training = plain.training

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if CappedAttention.is_working and q.shape[2] >= MIN_TOKENS_TO_COMPILE_CAP and not torch.is_grad_enabled():
            try:
                return compiled_capped_attention()(q, k, v, mask, self.scale, self.cap)
            except RuntimeError as error:
                warn_once(f"attention with soft caps is not compiled: {str(error).strip().splitlines()[0]}")
                CappedAttention.is_working = False
        return super().attend(q, k, v, mask)


def use_graphs(model: PaliGemmaForConditionalGeneration, compile_after: int = COMPILE_AFTER) -> RecordedPaliGemma:
    """The same model with CUDA graphs and compiled soft caps. Use it instead of `model`: both share modules and parameters.

    Args:
        compile_after: number of steps of one shape before the step is compiled; 0 = at once.
    """
    for layer in model.language_model.model.layers:
        if type(layer.self_attn) is GemmaAttention and layer.self_attn.cap is not None:
            layer.self_attn = CappedAttention(layer.self_attn)
    return RecordedPaliGemma(model, compile_after)
