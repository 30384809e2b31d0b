"""Faster decoding on CUDA: a decoding step is recorded as a CUDA graph, and later steps replay it.

A decoding step consists of thirty to forty small kernels per layer, and Python starts them more slowly than a fast GPU runs them.
A step that was recorded as a CUDA graph is started with one call. A graph has fixed shapes and fixed addresses:

- Shapes are rounded up (`bucket`): rows to a power of two, slots to 256 times a power of two. Each pair (rows, slots) has
  its own `Step`.
- The tokens are copied to the input buffer of the graph, and the logits are copied from its output buffer.
- The lengths of the rows are on the device, and the graph increments them. A graph may have more rows than are decoded. Each
  extra row writes into its next free slot, and its length is set back, so a later token overwrites what was written.

A `Step` first runs normally, is then recorded, and its first replay is compared with the normal step (self_check.py). A cache
and its graphs outlive the answer: the model keeps one cache that is not in use (`Spare`), and the next answer takes it.

The rest of the design avoids known faults of CUDA graphs:

- Destroying a graph frees cuBLAS's workspace of its stream, and other graphs of that stream then read freed memory
  (pytorch#193402). Therefore each graph has a stream that no other living graph has, and a graph that is not used any more is
  kept until its cache is freed.
- After a failed recording, torch's allocator may be in a wrong state (pytorch#180395). Therefore nothing is recorded afterwards
  in this process, and nothing is recorded while memory is short.
- Libraries initialise themselves per thread, which is forbidden while recording. Therefore a step is recorded by the thread in
  which it has run normally.
- devices.PROFILES says on which devices steps are recorded. On AMD's GPUs they are not, because recording can end the process.

`use_graphs` enables all this. With the mode "compile" a step is also compiled, before it is recorded: torch.compile fuses the
operations between the matrix products, and generates its own matrix-vector kernels, as gpt-fast does.

No GPU has run this. `record` has run on a simulated device only, whose graphs are lists of operators
(tests/gpu/test_recorded_steps.py), inductor's kernels for CUDA have never run, and no speed was measured. The rest is tested on
a CPU in tests/gpu/test_graphs.py. benchmarks/gpu.sh measures on a GPU.
Shapes: B batch rows, S slots of the KV cache that are read, K key/value heads, E width of one head, V vocabulary size.
"""

import functools
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from paligemma import devices, machine
from paligemma.gpu.capped_attention import use_capped_attention
from paligemma.gpu.self_check import FastWay, rounding_bound
from paligemma.layers import compiling
from paligemma.layers.batch_cache import BatchCache
from paligemma.modeling_gemma import KVCache
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration

SLOTS = 256  # a graph reads 256, 512, 1024, ... slots; the number of slots of a cache is a multiple of 256
WARM_UP = 2  # normal steps of a shape before it is recorded; libraries initialise themselves in them
COMPILED_SHAPES = 256  # torch refuses to compile more shapes than its recompile_limit, which is raised to this number
STREAMS = 32  # torch.cuda.Stream() returns one of 32 streams in turn
# Nothing is recorded, and no cache is kept between answers, if less memory is free. A graph takes the memory of its intermediate
# results, up to 32 MB for cuBLAS, and some kB per kernel.
MIN_FREE_BYTES = 2**30

RECORDED = FastWay("recorded steps", rounding_bound(torch.bfloat16, layers=18), "decoding without them")
COMPILED = FastWay("compiled steps", rounding_bound(torch.bfloat16, layers=18), "decoding without them")
RECORDING = threading.Lock()  # only one thread of a process may record at a time
STREAMS_IN_USE: weakref.WeakSet[torch.cuda.Stream] = weakref.WeakSet()
THREAD = threading.local()

plain_step = PaliGemmaForConditionalGeneration.step


def bucket(count: int, unit: int, most: int) -> int:
    """The smallest of unit, 2 unit, 4 unit, ... that is at least `count`, but at most `most`."""
    size = unit
    while size < count:
        size *= 2
    return min(size, most)


# Functions that call torch.cuda. Tests on a CPU replace them.


def free_bytes(device: torch.device) -> int:
    """The memory that can still be allocated on a CUDA device.

    On another device, to which a model may have been moved, it is 0: nothing is recorded or kept there.
    """
    return (machine.free_memory(device) or 0) if device.type == "cuda" else 0


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def own_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream that no living graph uses; None if all are used. It is free again when the returned object is freed."""
    for _ in range(STREAMS):
        stream = torch.cuda.Stream(device)
        if stream not in STREAMS_IN_USE:
            STREAMS_IN_USE.add(stream)
            return stream
    return None


def record(work: Callable[[], Tensor], stream: torch.cuda.Stream) -> tuple[Callable[[], None], Tensor]:
    """Records `work` as a CUDA graph without running it. No GPU has run this function.

    Args:
        work: a function that has run before, and that uses only tensors whose addresses do not change.
        stream: see own_stream.
    Returns: a function that runs the graph, and the tensor to which the graph writes the result.
    """
    graph = torch.cuda.CUDAGraph()
    # torch.cuda.graph does not restore the current stream if recording fails, so the block around it does. The mode
    # "thread_local" lets other threads allocate memory during the recording.
    with torch.cuda.device(stream.device), torch.cuda.stream(torch.cuda.current_stream(stream.device)):
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = work()
    return graph.replay, result


@functools.cache
def compiled_step() -> Callable[[PaliGemmaForConditionalGeneration, KVCache, Tensor], Tensor]:
    """The step of the model, compiled once per shape.

    With fullgraph, torch raises an error, instead of splitting the step, if an operation cannot be compiled (for example because
    it needs a value on the CPU).
    """
    import torch._dynamo  # imported only when needed: it takes a second

    compiling.set_private_compile_cache()
    torch._dynamo.config.recompile_limit = max(COMPILED_SHAPES, torch._dynamo.config.recompile_limit)
    # With this option inductor generates its own matrix-vector kernels instead of calling cuBLAS.
    options = {"coordinate_descent_tuning": True}
    return torch.compile(plain_step, fullgraph=True, dynamic=False, options=options)


def this_thread() -> object:
    """An object that belongs to the current thread. Unlike a thread id, it is never given to a later thread."""
    if not hasattr(THREAD, "mark"):
        THREAD.mark = object()
    return THREAD.mark


@dataclass(eq=False)
class Recording:
    """A CUDA graph. The order of the fields matters: the graph must be freed before its stream.

    Attributes:
        replay: runs the graph.
        logits: float32[B, V], the tensor to which the graph writes.
        stream: the stream of the graph.
    """

    replay: Callable[[], None]
    logits: Tensor
    stream: torch.cuda.Stream


class Step:
    """A decoding step of fixed shape: run normally at first, then recorded and checked, then replayed.

    Args:
        model: the model that decodes. Only a weak reference is kept, because the model keeps the cache and with it this step.
        cache: its first `rows` rows are decoded, and `slots_read` slots of each are read.
        compiles: whether the step is compiled before it is recorded.
        unused_recordings: recordings that are not used any more are added to this list.
    """

    def __init__(
        self,
        model: PaliGemmaForConditionalGeneration,
        cache: BatchCache,
        rows: int,
        slots_read: int,
        compiles: bool,
        unused_recordings: list[Recording],
    ):
        self.model = weakref.ref(model)
        self.cache = cache[:rows].fixed(slots_read)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=cache.lengths.device)
        self.bound = rounding_bound(model.dtype, model.config.text_config.num_hidden_layers)
        self.compiles, self.unused_recordings = compiles, unused_recordings
        self.function = plain_step
        self.thread: object = None
        self.num_warm = 0  # normal steps in this thread
        self.recording: Recording | None = None
        self.is_checked = False

    def work(self) -> Tensor:
        return self.function(self.model(), self.cache, self.tokens)

    def replay(self) -> Tensor:
        self.recording.replay()
        return self.recording.logits

    def compiled_work(self) -> Tensor:
        self.function = compiled_step()
        return self.work()

    def newest(self, slots: Tensor) -> tuple[Tensor, ...]:
        """The keys and the values in slot slots[i] of each row i, in every layer: copies [B, K, E]; `slots` is int64[B]."""
        rows = torch.arange(len(slots), device=slots.device)
        return tuple(layer[rows, :, slots] for layer in (*self.cache.keys, *self.cache.values))

    def compare(self, way: FastWay, fast: Callable[[], Tensor]) -> Tensor:
        """Runs the step both ways, and turns `way` off if logits, keys or values differ. Returns the logits of the plain step."""
        lengths, found = self.cache.lengths.clone(), None
        try:
            found = fast().clone(), *self.newest(lengths)
        except Exception as error:  # noqa: BLE001  (compilers and drivers raise exceptions of any class)
            way.fail(error)
        self.cache.lengths.copy_(lengths)
        logits = plain_step(self.model(), self.cache, self.tokens)
        if found is not None:
            pairs = zip(found, (logits, *self.newest(lengths)), strict=True)
            all(way.check(each, expected, bound=self.bound) for each, expected in pairs)  # stops at the first difference
        return logits

    def stop_replaying(self) -> None:
        """Goes back to normal steps, and keeps the recording until the cache is freed."""
        if self.recording is not None:
            self.unused_recordings.append(self.recording)
        self.recording, self.is_checked, self.num_warm, self.function = None, False, 0, plain_step

    def warm_up(self) -> None:
        """Counts a normal step, and records the step after enough of them. If that fails, nothing is recorded from now on."""
        if self.thread is not this_thread():
            self.thread, self.num_warm = this_thread(), 0
        self.num_warm += 1
        if self.num_warm < WARM_UP or not RECORDED.is_on:
            return
        device = self.tokens.device
        with RECORDING:
            try:
                stream = None if free_bytes(device) < MIN_FREE_BYTES else own_stream(device)
                if stream is None:
                    self.num_warm = 0  # it is tried again after more steps
                elif RECORDED.is_on:  # recording may have failed in another thread
                    self.recording = Recording(*record(self.work, stream), stream)
            except Exception as error:  # noqa: BLE001  (compilers and drivers raise exceptions of any class)
                RECORDED.fail(error)

    def run(self) -> Tensor:
        """Runs the step in the fastest way that is ready. Returns float32[B, V], which a later step may overwrite."""
        if (self.recording and not RECORDED.is_on) or (self.function is not plain_step and not COMPILED.is_on):
            self.stop_replaying()
        if self.recording and self.is_checked:
            return self.replay()
        if self.recording:
            # The graph was recorded after the previous step. If it contained a value of that step as a constant, the results
            # would differ here.
            self.is_checked = True
            return self.compare(RECORDED, self.replay)
        if self.compiles and COMPILED.is_on and self.function is plain_step:
            logits = self.compare(COMPILED, self.compiled_work)
        else:
            logits = self.work()
        self.warm_up()
        return logits

    def __call__(self, tokens: Tensor) -> Tensor:
        """Decodes the first B rows of the cache, B <= rows: takes tokens int64[B] on the device, returns float32[B, V]."""
        used = len(tokens)
        self.tokens[:used] = tokens
        logits = self.run()
        if used < len(self.tokens):
            self.cache.lengths[used:].sub_(1)
        return logits[:used].clone()  # the next step overwrites the output buffer


def addresses(model: PaliGemmaForConditionalGeneration) -> list[tuple[int, torch.dtype]]:
    """Where the weights of the decoder are. A graph reads these addresses, so it is wrong after they have changed."""
    decoder = model.language_model
    return [(tensor.data_ptr(), tensor.dtype) for tensor in (*decoder.parameters(), *decoder.buffers())]


class Steps:
    """A cache with the steps that were recorded for it, by shape."""

    def __init__(self, model: "RecordedPaliGemma", rows: int, slots: int):
        self.model, self.compiles = weakref.ref(model), model.compiles
        self.addresses = addresses(model)
        self.cache = BatchCache(model.config.text_config, rows, slots, device=model.device, dtype=model.dtype)
        self.stream = current_stream(model.device)
        self.unused_recordings: list[Recording] = []
        self.steps: dict[tuple[int, int], Step] = {}

    def suits(self, model: "RecordedPaliGemma", rows: int, slots: int) -> bool:
        """Whether an answer of this size can use the cache, on the current stream and with the current weights."""
        fits = rows <= len(self.cache.lengths) and slots <= self.cache.slots
        is_same = self.model() is model and self.addresses == addresses(model)
        return fits and is_same and self.stream == current_stream(model.device)

    @property
    def records(self) -> bool:
        """Whether any step may be recorded or compiled."""
        return RECORDED.is_on or (self.compiles and COMPILED.is_on)

    def find(self, used: int, slots_read: int) -> Step:
        """The step that decodes the first `used` rows, of which the longest has `slots_read` tokens."""
        rows = bucket(used, 1, len(self.cache.lengths))
        if bool((self.cache.host_lengths[used:rows] == self.cache.slots).any()):
            rows = used  # an extra row whose slots are all used has no free slot to write to
        shape = rows, bucket(slots_read, SLOTS, self.cache.slots)
        if shape not in self.steps:
            with not_inference():
                self.steps[shape] = Step(self.model(), self.cache, *shape, self.compiles, self.unused_recordings)
        return self.steps[shape]


def not_inference() -> torch.inference_mode:
    """A `with` block in which inference mode is off.

    Tensors that are made in inference mode can be changed in that mode only, but a cache is used with and without it.
    """
    return torch.inference_mode(False)


class Spare:
    """At most one cache that is not in use, with its graphs. Threads may call the methods at the same time."""

    def __init__(self):
        self.waiting: deque[Steps] = deque(maxlen=1)

    def __reduce__(self) -> tuple:
        return Spare, ()  # a copy of the model has none, because graphs cannot be copied

    def take(self) -> Steps | None:
        with suppress(IndexError):
            return self.waiting.pop()
        return None

    def put(self, steps: Steps) -> None:
        """Keeps the larger of this cache and the one that is there; frees the other one, or both if memory is short."""
        other = self.take()
        if free_bytes(steps.cache.keys.device) >= MIN_FREE_BYTES:
            self.waiting.append(max((steps, other), key=lambda each: 0 if each is None else each.cache.keys.numel()))


class Lease:
    """Marks a cache as used by one answer. When the last slice of the cache is freed, the cache goes back to the model."""

    def __init__(self, steps: Steps, spare: Spare):
        self.steps, self.spare = steps, spare

    def __del__(self) -> None:
        with suppress(RuntimeError):  # after an error of the device
            if not sys.is_finalizing():
                self.spare.put(self.steps)


class RecordedCache(BatchCache):
    """The first `rows` rows of the cache of `steps`, emptied, so that its recorded steps can be used. Slices share the lease."""

    def __init__(self, steps: Steps, spare: Spare, rows: int):  # BatchCache.__init__ would allocate memory
        steps.cache.clear()
        vars(self).update(vars(steps.cache[:rows]))
        self.lease = Lease(steps, spare)

    @property
    def steps(self) -> Steps:
        return self.lease.steps


class RecordedPaliGemma(PaliGemmaForConditionalGeneration):
    """PaliGemma that records its decoding steps.

    Args:
        model: the model whose modules and parameters are used.
        compiles: whether steps are compiled before they are recorded.
    """

    def __init__(self, model: PaliGemmaForConditionalGeneration, compiles: bool = False):
        vars(self).update(vars(model))
        self.compiles, self.spare = compiles, Spare()

    def new_cache(self, batch: int, slots: int, kind: type[KVCache] = KVCache) -> KVCache:
        if not issubclass(RecordedCache, kind):  # the caller needs another kind of cache, whose steps cannot be recorded
            return super().new_cache(batch, slots, kind)
        slots = -(-slots // SLOTS) * SLOTS
        steps = self.spare.take()
        with not_inference():
            if steps is None or not steps.suits(self, batch, slots):
                steps = None  # freed before the new one is allocated
                steps = Steps(self, batch, slots)
            return RecordedCache(steps, self.spare, batch)

    def train(self, mode: bool = True) -> "RecordedPaliGemma":
        if mode:
            self.spare.take()  # training needs the memory
        return super().train(mode)

    def step(self, cache: KVCache, tokens: Tensor) -> Tensor:
        starts_later = cache.lengths.storage_offset() > 0  # a slice such as cache[2:4]; graphs begin at row 0
        is_derived = type(self) is not RecordedPaliGemma  # FSDP derives a class that gathers the weights in every step
        is_changed = torch.is_grad_enabled() or torch.is_autocast_enabled(tokens.device.type)
        if is_changed or starts_later or is_derived or not isinstance(cache, RecordedCache) or not cache.steps.records:
            return super().step(cache, tokens)
        return cache.steps.find(len(tokens), cache.slots_read)(tokens)


def use_graphs(model: PaliGemmaForConditionalGeneration, mode: str | None = None) -> PaliGemmaForConditionalGeneration:
    """The same model with CUDA graphs. Use it instead of `model`: both share modules and parameters.

    Args:
        mode: "auto" = steps are recorded where devices.PROFILES says so; "record" = on every CUDA device; "compile" = they are
            compiled, too, which takes minutes; "off" = the model is returned as it is; None = see devices.graphs_mode.
    Raises: UsageError for another mode.
    """
    mode = devices.graphs_mode(mode)
    if mode == "off" or model.device.type != "cuda":
        return model
    use_capped_attention(model)
    if mode == "auto" and not devices.profile(model.device).records:
        return model
    return RecordedPaliGemma(model, compiles=mode == "compile")
