"""Simulated GPUs: tensors whose numbers are on the CPU and whose device is cuda:0, cuda:1 or mps.

    with pretend("cuda:0") as gpu:
        model.to("cuda:0")
        with gpu.part() as events:
            tokens = list(generate(model, batch))
    assert not gpu.mismatches and not waits(events)

Inside `pretend`, torch says that the devices exist: `.to("cuda:0")` and `torch.zeros(3, device="cuda:0")` return a
PretendedTensor, `is_cuda` is true, and torch.cuda has events, streams and graphs. Every operator runs on the CPU, so that its
result can be compared with the CPU's, and leaves one Event in `gpu.events`. What a real GPU would refuse is refused: operators
between two cards or between a card and the CPU, numpy on a device tensor, float64 on MPS, waiting while a graph is captured.

- A copy that does not block (`non_blocking=True`) is complete only after something has waited for it. With `late_copies=True`
  the target of such a copy to the CPU has NaN (floats) or -1 before this wait, and the numbers after it. Such a copy from the
  CPU may read its source at any time before this wait: a source that has changed in between is a RACE.
- A captured CUDA graph is the list of its operators. Capturing changes no tensor; replaying runs the list on the same memory.

Backward does not run: torch's autograd asks for a real accelerator. The module needs a C++ compiler, for guard.cpp.
Checked in test_pretend.py.
"""

import contextlib
import ctypes
import functools
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import paligemma
from paligemma.layers.compiling import find_compiler

PACKAGE = str(Path(paligemma.__file__).parent)
GUARD = Path(__file__).with_name("guard.cpp")
aten = torch.ops.aten

# Operators without a kernel that torch does not declare as views: they return the same memory, or allocate memory.
NO_KERNEL = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "set_"}
# Operators that return to the CPU only when the device has computed a value or the size of the result.
WAITING = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "repeat_interleave", "is_nonzero",
}  # fmt: skip
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
WAITS = ("sync", "event-wait")  # kinds of events in which the CPU waits for the device


@functools.cache
def load_guard() -> ctypes.CDLL:
    """Compiles and loads guard.cpp, once per process. It stays loaded, which changes nothing for tensors on the CPU."""
    compiler, torch_folder = find_compiler(), Path(torch.__file__).parent
    assert compiler, "tests on simulated GPUs need a C++ compiler (g++ or clang++; $CXX names another)"
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "guard.so"
        command = [*compiler, "-std=c++20", "-O1", "-shared", "-fPIC", str(GUARD), "-o", str(made)]
        command += ["-I", str(torch_folder / "include"), "-L", str(torch_folder / "lib"), "-lc10"]
        subprocess.run(command, check=True, timeout=120)
        return ctypes.CDLL(str(made))


@dataclass(frozen=True)
class Event:
    """One operation that a device was told to do.

    Attributes:
        op: the name of the operator, without overload, such as "add_".
        kind: "kernel"; "view" = nothing runs on the device; "sync" = the CPU waits until the device has done everything (a
            blocking copy, .item(), ...); "h2d", "d2h", "d2d" = a copy that does not block: to, from or between devices;
            "event-record", "event-wait"; "replay" = a CUDA graph is started; "MISMATCH" = devices or dtypes that a GPU refuses;
            "RACE" = the source of a copy changed before the copy was complete.
        device: the device.
        shapes: the shapes of the tensors among the arguments.
        file, function, line: the place in the package paligemma that called the operator; "" and 0 if no such place did.
        note: a detail, such as why a GPU would refuse the operator.
        captured: whether a CUDA graph was being captured, so that nothing ran.
    """

    op: str
    kind: str
    device: torch.device
    shapes: tuple[tuple[int, ...], ...] = ()
    file: str = ""
    function: str = ""
    line: int = 0
    note: str = ""
    captured: bool = False

    @property
    def place(self) -> str:
        """Where it was called, such as "generation.py sample"; the number of the line is left out, because lines move."""
        return f"{self.file} {self.function}"


def waits(events: list[Event]) -> list[str]:
    """What the CPU waits for: "place: operator" of each wait, in order."""
    return [f"{event.place}: {event.op}" for event in events if event.kind in WAITS]


def count(events: list[Event], *kinds: str) -> int:
    return sum(event.kind in kinds for event in events)


def kernels(events: list[Event]) -> Counter[str]:
    """How often each operator started a kernel. An operator can be several kernels on a real GPU; it is at least one."""
    return Counter(event.op for event in events if event.kind == "kernel" and not event.captured)


def caller() -> tuple[str, str, int]:
    """File, function and line of the innermost caller inside the package paligemma. Functions named to_device are skipped."""
    frame = sys._getframe(2)
    while frame is not None and (not frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_name == "to_device"):
        frame = frame.f_back
    return ("", "", 0) if frame is None else (Path(frame.f_code.co_filename).name, frame.f_code.co_name, frame.f_lineno)


class PretendedTensor(torch.Tensor):
    """A tensor on a simulated device. `numbers` is the tensor on the CPU that holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: Tensor, device: torch.device) -> "PretendedTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls, numbers.size(), strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype,
            layout=numbers.layout, device=device,
        )  # fmt: skip

    def __init__(self, numbers: Tensor, _device: torch.device):
        self.numbers = numbers

    def __repr__(self) -> str:
        return f"PretendedTensor({self.numbers}, device={self.device})"

    def tolist(self) -> object:
        return self.cpu().tolist()

    def numpy(self) -> None:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} of a simulated tensor outside `with pretend(...)`")


def numbers_of(tree: object) -> object:
    """The same arguments, in which each simulated tensor is replaced by its numbers."""
    return tree_map(lambda leaf: leaf.numbers if isinstance(leaf, PretendedTensor) else leaf, tree)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def efficient_attention(q, k, v, mask, _needs_logsumexp, _dropout=0.0, _is_causal=False, *, scale=None):
    """CUDA's "efficient attention", which torch takes for every dtype and mask. Only for calls without gradients."""
    nothing = torch.empty(0)
    return attend(q, k, v, mask, scale=scale), nothing, nothing, nothing


def attention_written_out(q, k, v, attn_mask=None, *, scale=None):
    if attn_mask is not None:  # this operator adds the mask
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
    return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, scale=scale)[0]


def batched_product(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    return torch.bmm(a, b) if out_dtype is None else torch.bmm(a.to(out_dtype), b.to(out_dtype))


STAND_INS = {  # operators that exist on the device only, computed by other means on the CPU
    "bmm": batched_product,
    "_scaled_dot_product_efficient_attention": efficient_attention,
}


@dataclass(eq=False)
class PendingCopy:
    """A copy that does not block, before anything has waited for it."""

    device: torch.device
    target: Tensor
    snapshot: Tensor  # the numbers of the source when the copy was started
    source: Tensor | None  # on the CPU; None for a copy to the CPU, whose source cannot change: the device works in order
    version: int
    place: str
    number: int  # how many events had been logged, including that of the copy


@dataclass(eq=False)
class PretendedGraph:
    """torch.cuda.CUDAGraph: the operators that were captured, on the memory that they used."""

    work: list[tuple] = field(default_factory=list)
    before: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # memory that captured operators write, and its content
    is_captured: bool = False
    gpu: "PretendedGpu | None" = None
    device: torch.device | None = None  # on whose stream it is captured

    def capture(self, func, args, kwargs, result) -> None:
        self.work.append((func, args, kwargs, [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]))

    def save(self, func, args) -> None:
        """Keeps the content of the memory that an operator is going to write."""
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before += [(tensor, tensor.clone()) for tensor in tree_leaves(value) if isinstance(tensor, Tensor)]

    def end(self) -> None:
        """Undoes what the operators wrote, because capturing runs nothing: memory gets its old content, results get NaN or 0."""
        for tensor, content in reversed(self.before):
            tensor.copy_(content)
        written = {tensor.data_ptr() for tensor, _ in self.before}
        for *_, results in self.work:
            for tensor in results:
                if tensor.data_ptr() not in written:
                    tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        self.before, self.is_captured = [], True

    def replay(self) -> None:
        assert self.is_captured, "replay before capture"
        self.gpu.log("graph.replay", "replay", self.device)
        with _disable_current_modes(), torch.no_grad():
            for func, args, kwargs, results in self.work:
                fresh = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
                for old, new in zip(results, fresh, strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def reset(self) -> None:
        self.work, self.is_captured = [], False

    def pool(self) -> tuple[int, int]:
        return (0, 1)


class PretendedGpu(TorchDispatchMode):
    """Runs every operator on simulated tensors, and keeps the log. Made by `pretend`.

    Attributes:
        devices: the devices that exist.
        events: everything that was asked of them.
        stand_ins: {name of an operator: function}. The function is called with numbers on the CPU instead of the operator.
            Add to it what the CPU does not have.
    """

    def __init__(self, devices: list[torch.device], late_copies: bool):
        super().__init__()
        self.devices, self.late_copies = devices, late_copies
        self.kind = devices[0].type
        self.events: list[Event] = []
        self.pending: list[PendingCopy] = []
        self.pinned: dict[int, Tensor] = {}  # by address; they are kept, so that no other tensor gets the address
        self.graph: PretendedGraph | None = None  # the graph that is being captured
        self.stand_ins = dict(STAND_INS)

    @property
    def mismatches(self) -> list[Event]:
        """What a real device would have refused, and copies that could have read the wrong numbers."""
        return [event for event in self.events if event.kind in ("MISMATCH", "RACE")]

    @contextlib.contextmanager
    def part(self) -> Iterator[list[Event]]:
        """A list that contains, after the block, the events of the block."""
        start, events = len(self.events), []
        yield events
        events += self.events[start:]

    def log(self, op: str, kind: str, device: torch.device, shapes: tuple = (), note: str = "") -> Event:
        event = Event(op, kind, device, shapes, *caller(), note, self.graph is not None)
        self.events.append(event)
        if self.graph is not None and kind in (*WAITS, "h2d", "d2h"):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        if self.graph is not None and kind == "kernel" and device != self.graph.device:
            self.refuse(
                op, device, shapes, f"it would run now instead of being captured: the graph is that of {self.graph.device}"
            )
        return event

    def refuse(self, op: str, device: torch.device, shapes: tuple, reason: str) -> None:
        self.log(op, "MISMATCH", device, shapes, reason)
        raise RuntimeError(f"{op}: {reason}")

    def numbered(self, device: object) -> torch.device | None:
        """The simulated device with its index; None for the CPU, or if no device is given."""
        device = None if device is None else torch.device(device)
        if device is None or device.type != self.kind:
            return None
        index = current_card() if device.index is None else device.index
        if device.type == "mps":
            index = 0
        if torch.device(device.type, index) not in self.devices:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return torch.device(device.type, index)

    # Copies

    def wait(self, device: torch.device, upto: int | None = None) -> None:
        """Completes the pending copies of a device that were started before the event with this number, by default all."""
        started = [copy for copy in self.pending if copy.device == device and (upto is None or copy.number < upto)]
        self.pending = [copy for copy in self.pending if copy not in started]
        with _disable_current_modes(), torch.no_grad():
            for copy in started:
                if copy.source is None:
                    copy.target.copy_(copy.snapshot)
                elif copy.source._version != copy.version or not same(copy.source, copy.snapshot):
                    self.log("copy", "RACE", device, note=f"the source changed during the copy of {copy.place}")

    def is_pinned(self, tensor: Tensor) -> bool:
        return not isinstance(tensor, PretendedTensor) and tensor.untyped_storage().data_ptr() in self.pinned

    def pin(self, tensor: Tensor) -> Tensor:
        # As in torch, the copy has the same strides. So a tensor made by expand, whose elements share memory, is refused.
        pinned = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu").copy_(tensor.detach())
        self.pinned[pinned.untyped_storage().data_ptr()] = pinned
        return pinned

    def note_copy(self, name: str, source: Tensor, target: Tensor, is_async: bool, shapes: tuple) -> None:
        """Logs a copy between the CPU and a device, and starts it if it does not block."""
        to_device = isinstance(target, PretendedTensor)
        device, on_cpu = (target.device, source) if to_device else (source.device, target)
        direction = "h2d" if to_device else "d2h"
        # CUDA copies from and to pageable memory through a buffer of the driver, for which the CPU may have to wait.
        pageable = self.kind == "cuda" and not self.is_pinned(on_cpu)
        if not is_async or pageable or not on_cpu.numel():
            reason = f"{direction} of pageable memory" if is_async else direction
            self.log(name, "sync" if on_cpu.numel() else "view", device, shapes, reason)
            self.wait(device)
            return
        event = self.log(name, direction, device, shapes)
        numbers = (source.numbers if isinstance(source, PretendedTensor) else source).detach()
        version, number = source._version, len(self.events)
        copy = PendingCopy(device, target, numbers.clone(), source if to_device else None, version, event.place, number)
        if self.late_copies:
            self.pending.append(copy)
            if not to_device:
                target.fill_(torch.nan if target.is_floating_point() else -1)

    def to_copy(self, args: tuple, kwargs: dict) -> Tensor:
        """aten._to_copy: a copy on another device, in another dtype, or both."""
        (source,) = args
        kwargs = dict(kwargs)
        wanted, is_async = kwargs.pop("device", None), bool(kwargs.pop("non_blocking", False))
        kwargs.pop("pin_memory", None)
        before = source.device if isinstance(source, PretendedTensor) else None
        after = before if wanted is None else self.numbered(wanted)
        numbers = source.numbers if before else source
        result = aten._to_copy.default(numbers, **kwargs)
        shapes = (tuple(source.shape),)
        for device in {before, after} - {None}:
            self.check_dtypes("_to_copy", device, [result], shapes)
        if before is None and after is None:
            return result
        if after is not None:
            result = PretendedTensor(result, after)
        if before is None or after is None:
            if after is None and is_async and self.kind == "cuda":  # torch allocates pinned memory for the result
                self.pinned[result.untyped_storage().data_ptr()] = result
            self.note_copy("to", source, result, is_async, shapes)
        else:
            self.log("_to_copy", "kernel" if before == after else "d2d", after, shapes)
            if self.graph is not None:
                self.graph.capture(aten._to_copy.default, (numbers,), kwargs, result.numbers)
        return result

    def copy_(self, target: Tensor, source: Tensor, is_async: bool) -> Tensor:
        """aten.copy_ between a device and the CPU."""
        shapes = (tuple(target.shape), tuple(source.shape))
        numbers = numbers_of(target)
        numbers.copy_(numbers_of(source))
        self.note_copy("copy_", source, target, is_async, shapes)
        return target

    # Operators

    def check_dtypes(self, name: str, device: torch.device, tensors: list[Tensor], shapes: tuple) -> None:
        if device.type == "mps" and any(tensor.dtype is torch.float64 for tensor in tensors):
            self.refuse(name, device, shapes, "MPS has no float64")

    def check_devices(self, name: str, device: torch.device, args: tuple, leaves: list[Tensor], shapes: tuple) -> str:
        """Refuses tensors on other devices. Returns a note if an index has to be copied to the device first."""
        note = ""
        if name in INDEXED:
            on_cpu = [index for index in tree_leaves(args[1]) if isinstance(index, Tensor) and index.device.type == "cpu"]
            note = "the index is copied to the device" if on_cpu else ""
            leaves = [leaf for leaf in leaves if all(leaf is not index for index in on_cpu)]
        others = {
            str(leaf.device) for leaf in leaves if leaf.device != device and (leaf.dim() or isinstance(leaf, PretendedTensor))
        }
        if others:
            self.refuse(name, device, shapes, f"tensors are on {device} and on {', '.join(sorted(others))}")
        return note

    def run(self, func, args: tuple, kwargs: dict) -> object:
        """One operator on simulated tensors, or one that makes a tensor on a simulated device."""
        name = func._schema.name.removeprefix("aten::")
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [leaf for leaf in leaves if isinstance(leaf, PretendedTensor)]
        device = self.numbered(kwargs.get("device")) or (ours[0].device if ours else None)
        if name == "_to_copy":
            return self.to_copy(args, kwargs)
        if name == "copy_" and isinstance(args[0], PretendedTensor) != isinstance(args[1], PretendedTensor):
            if not (ours[0] is args[0] and args[1].dim() == 0):  # one number is sent with the command
                return self.copy_(args[0], args[1], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False)))
        pins = kwargs.get("pin_memory")
        kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
        if device is None:
            result = func(*args, **kwargs)
            return self.pin(result) if pins else result
        if name == "_fused_sdp_choice":  # 0 = written out, 2 = efficient
            return 0 if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in ours) or self.kind == "mps" else 2
        shapes = tuple(tuple(leaf.shape) for leaf in leaves)
        note = self.check_devices(name, device, args, leaves, shapes) if name != "copy_" else ""
        is_view = func.is_view or name in NO_KERNEL
        if self.graph is not None and not is_view:
            self.graph.save(func, numbers_of(args))
        work = self.stand_ins.get(name, func)
        result = work(*numbers_of(args), **numbers_of(kwargs))
        self.check_dtypes(name, device, [*ours, *(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))], shapes)
        has_mask = name in INDEXED and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in tree_leaves(args[1])
        )
        is_sync = name in WAITING or has_mask or note
        between = name == "copy_" and len({leaf.device for leaf in ours}) == 2
        kind = "view" if is_view else "sync" if is_sync else "d2d" if between else "kernel"
        self.log(name, kind, device, shapes, note)
        if is_sync:
            self.wait(device)
        if self.graph is not None and not is_view:
            self.graph.capture(work, numbers_of(args), numbers_of(kwargs), result)
        wrapped = tree_map(lambda leaf: PretendedTensor(leaf, device) if isinstance(leaf, Tensor) else leaf, result)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise the first operator would import torch's compiler, which takes seconds

    def as_one_kernel(self, plain, with_gradient, *args: object, **kwargs: object) -> Tensor:
        """Calls a function of torch.nn.functional that is one kernel on the device, but several operators without a device.

        Args:
            plain: the function. It is called with numbers on the CPU.
            with_gradient: what is called instead if a gradient is needed.
        """
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, PretendedTensor)]
        if not ours:
            return plain(*args, **kwargs)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return with_gradient(*args, **kwargs)
        name, device, shapes = plain.__name__, ours[0].device, tuple(tuple(tensor.shape) for tensor in tensors)
        self.check_devices(name, device, args, tensors, shapes)
        self.log(name, "kernel", device, shapes)
        args, kwargs = numbers_of((args, kwargs))
        with _disable_current_modes(), torch.no_grad():
            result = plain(*args, **kwargs)
        if self.graph is not None:
            self.graph.capture(plain, args, kwargs, result)
        return PretendedTensor(result, device)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim" or func.namespace == "profiler":
            return func(*args, **kwargs)
        return self.run(func, args, kwargs)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def current_card() -> int:
    return load_guard().pretended_device(-1)


# Replacements for functions of torch.cuda and torch.mps


def cuda_functions(gpu: PretendedGpu, capability: tuple[int, int], memory: int, name: str) -> dict[str, object]:
    """The functions and classes of torch.cuda that do not work without a card, by name."""

    def number(device: object) -> int:
        return device if isinstance(device, int) else gpu.numbered("cuda" if device is None else device).index

    def synchronize(device: object = None) -> None:
        gpu.log("synchronize", "sync", gpu.devices[number(device)])
        gpu.wait(gpu.devices[number(device)])

    class CudaEvent:
        """Complete when everything is that was started on the device of the stream before `record`."""

        def __init__(self, *_arguments: object, **_options: object):
            self.device, self.number = gpu.devices[0], 0

        def record(self, stream: "Stream | None" = None) -> None:
            self.device = gpu.devices[current_card()] if stream is None else stream.device
            gpu.log("event.record", "event-record", self.device)
            self.number = len(gpu.events)

        def synchronize(self) -> None:
            gpu.log("event.synchronize", "event-wait", self.device)
            gpu.wait(self.device, self.number)

        def query(self) -> bool:
            return True

        def wait(self, _stream: object = None) -> None:
            pass

        def elapsed_time(self, _end: object) -> float:
            return 1.0

    class Stream:
        def __init__(self, device: object = None, **_options: object):
            self.device = gpu.devices[number(device)]

        def synchronize(self) -> None:
            synchronize(self.device)

        def wait_stream(self, _other: object) -> None:
            pass

        def wait_event(self, _event: object) -> None:
            pass

        def record_event(self, event: CudaEvent | None = None) -> CudaEvent:
            event = event or CudaEvent()
            event.record()
            return event

        def __enter__(self) -> "Stream":
            return self

        def __exit__(self, *_error: object) -> None:
            pass

    class Graph(PretendedGraph):
        def __init__(self, *_arguments: object, **_options: object):
            super().__init__(gpu=gpu)

    @contextlib.contextmanager
    def graph(captured: PretendedGraph, *, stream: "Stream | None" = None, **_options: object) -> Iterator[None]:
        assert gpu.graph is None, "a graph is captured inside a graph"
        synchronize()
        gpu.graph, captured.device = captured, gpu.devices[current_card()] if stream is None else stream.device
        try:
            yield
        finally:
            gpu.graph = None
            with _disable_current_modes(), torch.no_grad():
                captured.end()

    @contextlib.contextmanager
    def on_card(device: object) -> Iterator[None]:
        before = current_card()
        load_guard().pretended_device(number(device))
        try:
            yield
        finally:
            load_guard().pretended_device(before)

    properties = SimpleNamespace(
        name=name, total_memory=memory, major=capability[0], minor=capability[1], multi_processor_count=132, warp_size=32,
        shared_memory_per_block_optin=232448 if capability in ((9, 0), (10, 0)) else 101376, gcnArchName="",
        regs_per_multiprocessor=65536, L2_cache_size=2**25, max_threads_per_multi_processor=2048,
    )  # fmt: skip
    streams = [Stream(index) for index in range(len(gpu.devices))]
    unneeded = ("_lazy_init", "init", "empty_cache", "reset_peak_memory_stats", "manual_seed", "manual_seed_all")
    return {key: lambda *_arguments, **_options: None for key in unneeded} | {
        "is_available": lambda: True, "device_count": lambda: len(gpu.devices),
        "current_device": current_card, "set_device": lambda device: load_guard().pretended_device(number(device)) and None,
        "get_device_name": lambda _device=None: name, "get_device_properties": lambda _device=None: properties,
        "get_device_capability": lambda _device=None: capability,
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
        "is_bf16_supported": lambda including_emulation=True: including_emulation or capability >= (8, 0),
        "mem_get_info": lambda _device=None: (memory, memory), "memory_allocated": lambda _device=None: 0,
        "max_memory_allocated": lambda _device=None: 0, "memory_reserved": lambda _device=None: 0,
        "synchronize": synchronize, "Event": CudaEvent, "Stream": Stream,
        "stream": lambda stream: stream or contextlib.nullcontext(),
        "current_stream": lambda device=None: streams[number(device)],
        "default_stream": lambda device=None: streams[number(device)], "CUDAGraph": Graph,
        "graph": graph, "graph_pool_handle": lambda: (0, 1), "is_current_stream_capturing": lambda: gpu.graph is not None,
        "device": on_card,
    }  # fmt: skip


def mps_functions(gpu: PretendedGpu, memory: int) -> dict[str, object]:
    """The functions of torch.mps that do not work without such a device, by name."""

    def synchronize() -> None:
        gpu.log("synchronize", "sync", gpu.devices[0])
        gpu.wait(gpu.devices[0])

    return {
        "synchronize": synchronize, "recommended_max_memory": lambda: memory,
        "current_allocated_memory": lambda: 0, "empty_cache": lambda: None, "device_count": lambda: 1,
    }  # fmt: skip


@contextlib.contextmanager
def pretend(
    devices: str = "cuda:0",
    *,
    late_copies: bool = False,
    capability: tuple[int, int] = (9, 0),
    memory: int = 80 * 2**30,
    name: str = "Pretended GPU",
) -> Iterator[PretendedGpu]:
    """Inside, these devices exist. Everything that is patched is restored afterwards. Only the current thread sees the devices.

    Args:
        devices: "cuda:0", "cuda:0,cuda:1" or "mps".
        late_copies: copies that do not block arrive as late as possible.
        capability: of the cards.
        memory: bytes of each card, all free.
        name: of the cards.
    """
    found = [torch.device(each if ":" in each else f"{each}:0") for each in devices.split(",")]
    load_guard().pretended_device(0)
    gpu = PretendedGpu(found, late_copies)
    with contextlib.ExitStack() as stack:
        change = lambda *arguments: stack.enter_context(mock.patch.object(*arguments))  # noqa: E731
        if gpu.kind == "mps":
            module, functions = torch.mps, mps_functions(gpu, memory)
            change(torch.backends.mps, "is_available", lambda: True)
            change(torch.backends.mps, "is_built", lambda: True)
            attention = functools.partial(gpu.as_one_kernel, F.scaled_dot_product_attention, attention_written_out)
            change(F, "scaled_dot_product_attention", attention)
        else:
            module, functions = torch.cuda, cuda_functions(gpu, capability, memory, name)
            change(torch.version, "cuda", "13.0")
            change(F, "rms_norm", functools.partial(gpu.as_one_kernel, F.rms_norm, F.rms_norm))
        for key, function in functions.items():
            change(module, key, function)
        change(torch.Tensor, "pin_memory", lambda tensor, _device=None: gpu.pin(tensor))
        change(torch.Tensor, "is_pinned", lambda tensor, _device=None: gpu.is_pinned(tensor))
        # torch.tensor(..., device="cuda:0") copies the numbers to the device in a way that a mode can see.
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        # module.to("cuda:0") makes new parameters. Otherwise it would exchange the memory of those on the CPU.
        overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        stack.callback(load_guard().pretended_device, 0)
        with gpu:
            yield gpu
