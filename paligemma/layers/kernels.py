"""Calls the functions of cpp/ (products, norm, gate, attention) with tensors. CPU only.

The first use compiles them for the best instruction set of the processor and compares them with torch (kernel_check.py). If they
cannot be compiled, crash or are wrong, the next instruction set is tried. If none is right, `library()` is None and the callers
use torch's own operators. PALIGEMMA_KERNELS=off has the same effect; see instruction_sets.py for its other values.

The threads are those of torch: the kernels are linked against the OpenMP library that torch has loaded before, so both share one
pool. Checked in tests/layers: test_kernels.py (loading), test_quantization.py (what the functions compute).
Shapes: as in modeling_gemma.py, and O outputs, X inputs of one matrix.
"""

import ctypes
import logging
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from paligemma.layers import compiling
from paligemma.layers.instruction_sets import allowed

log = logging.getLogger(__name__)


class CTuning(ctypes.Structure):
    """The struct Tuning of cpp/products.h."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("prefetch", "tile_rows", "many_rows"))


class CMatrix(ctypes.Structure):
    """The struct Matrix of cpp/products.h."""

    _fields_ = (("w", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("outputs", ctypes.c_int64))


class CCall(ctypes.Structure):
    """The struct Call of cpp/products.h."""

    _fields_ = (
        ("x", ctypes.c_void_p), ("x_is_bf16", ctypes.c_int), ("activation", ctypes.c_int), ("matrices", CMatrix * 3),
        ("y", ctypes.c_void_p), ("y_is_bf16", ctypes.c_int), ("threads", ctypes.c_int),
        ("is_transposed", ctypes.c_int), ("rows", ctypes.c_int64), ("inputs", ctypes.c_int64),
    )  # fmt: skip


class CHeads(ctypes.Structure):
    """The struct Heads of cpp/prefill_attention.h."""

    _fields_ = (("data", ctypes.c_void_p), ("row", ctypes.c_int64), ("head", ctypes.c_int64), ("token", ctypes.c_int64))


class CAttention(ctypes.Structure):
    """The struct Attention of cpp/prefill_attention.h."""

    _fields_ = (
        *((name, CHeads) for name in ("q", "k", "v", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "new_slots", "mask", "packed", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "heads", "kv_heads", "length", "slots", "width")),
        ("scale", ctypes.c_float), ("cap", ctypes.c_float), ("threads", ctypes.c_int),
    )  # fmt: skip


class CTokenAttention(ctypes.Structure):
    """The struct TokenAttention of cpp/attention.h."""

    _fields_ = (
        ("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p), ("new_slots", ctypes.c_void_p), ("row_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64), ("slots", ctypes.c_int64), ("scale", ctypes.c_float), ("cap", ctypes.c_float),
        ("rows", ctypes.c_int64), ("heads", ctypes.c_int64), ("kv_heads", ctypes.c_int64), ("width", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    )  # fmt: skip


class CDecoderLayer(ctypes.Structure):
    """The struct DecoderLayer of cpp/decoder_layers.h."""

    _fields_ = (
        ("qkv", CMatrix * 3), ("output", CMatrix * 3), ("gate_up", CMatrix * 3), ("down", CMatrix * 3),
        *((name, ctypes.c_void_p) for name in ("attention_input", "attention_output", "mlp_input", "mlp_output")),
        ("is_windowed", ctypes.c_int),
    )  # fmt: skip


class CDecoder(ctypes.Structure):
    """The struct Decoder of cpp/decoder_layers.h."""

    _fields_ = (
        ("layers", ctypes.POINTER(CDecoderLayer)), ("num_layers", ctypes.c_int64), ("width", ctypes.c_int64),
        ("mlp_width", ctypes.c_int64), ("norm", ctypes.c_void_p), ("eps", ctypes.c_float),
        ("attention", CTokenAttention), ("keys", ctypes.c_void_p), ("values", ctypes.c_void_p), ("layer_stride", ctypes.c_int64),
        ("mask", ctypes.c_void_p), ("window_mask", ctypes.c_void_p),
    )  # fmt: skip


ACTIVATIONS = ("none", "gelu", "gated")  # the enum Activation of cpp/products.h


def open_library(file: Path) -> ctypes.CDLL:
    """The functions of a compiled file, with their argument types declared, so that ctypes passes 64-bit pointers."""
    loaded = ctypes.CDLL(str(file))
    pointer, size, flag, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    for function, arguments in (
        *((getattr(loaded, f"{kind}_product"), (ctypes.POINTER(CCall),)) for kind in ("bf16", "int8", "int4")),
        *((getattr(loaded, f"{kind}_decode"), (ctypes.POINTER(CDecoder), pointer, pointer)) for kind in ("bf16", "int8", "int4")),
        (loaded.bf16_gate, (*(pointer,) * 3, size, flag)),
        (loaded.bf16_gate_backward, (*(pointer,) * 5, size, flag)),
        (loaded.bf16_rms_norm, (pointer, pointer, pointer, size, size, real, flag)),
        (loaded.bf16_rms_norm_backward, (*(pointer,) * 4, size, size, real, flag)),
        (loaded.bf16_layer_norm, (pointer, pointer, pointer, pointer, size, size, real, flag)),
        (loaded.bf16_attend_many, (ctypes.POINTER(CAttention),)),
        (loaded.bf16_attend, (ctypes.POINTER(CTokenAttention), *(pointer,) * 5)),
        *((getattr(loaded, f"logits_{name}"), (pointer, size, size, pointer, flag)) for name in ("argmax", "logsumexp")),
        (loaded.int_quantize, (flag, pointer, flag, size, size, size, pointer, pointer, flag)),
    ):
        function.argtypes, function.restype = arguments, None
    loaded.tuning_values.restype = ctypes.POINTER(CTuning)
    for function, arguments, result in (  # for roofline.py
        (loaded.rate_numbers, (size,), flag),
        (loaded.rate_multiply, (size, size, flag), ctypes.c_double),
        (loaded.rate_read, (size, pointer, size, flag), size),
    ):
        function.argtypes, function.restype = arguments, result
    return loaded


def tuning(loaded: ctypes.CDLL) -> CTuning:
    """The values that a compiled file uses now; setting a field changes what it uses."""
    return loaded.tuning_values().contents


class Loaded(NamedTuple):
    """What `load` found.

    library: None if torch's own operators have to be used.
    name: of the instruction set; "" without a library.
    failures: why better instruction sets are not used, by name.
    choices: what a measurement chose differently from the rules (kernel_tuning.py): "prefetch", see Tuning in cpp/products.h;
        "bf16_rows", the largest number of rows for our bfloat16 product; "attention", 1 if ours is used for many tokens, else 0.
    """

    library: ctypes.CDLL | None
    name: str = ""
    failures: dict[str, str] = {}
    choices: dict[str, int] = {}


LOADED: list[Loaded] = []  # what this process uses; empty until the first use
LOADING = threading.Lock()
TUNING = "PALIGEMMA_TUNING"  # "off": choices that were measured are not used
CHECK = "paligemma.layers.kernel_check"  # the program that compares a compiled file with torch


def chosen(choices: dict[str, int]) -> str:
    """Choices for messages: ", measured: prefetch 2048", or nothing if there are none."""
    return ", measured: " + ", ".join(f"{name} {value}" for name, value in choices.items()) if choices else ""


def best_library(folder: Path) -> Loaded:
    """The library for the best instruction set that is allowed, can be compiled, and is right on this machine.

    Raises: compiling.LibraryError if there is none; OSError; AttributeError if a function is missing.
    """
    failures: dict[str, str] = {}
    for instructions in allowed():
        try:
            file = compiling.compile_once(compiling.SOURCE, folder, instructions.flags)
            found = compiling.check_once(file, CHECK, str(torch.get_num_threads()))
        except compiling.LibraryError as error:
            if not error.is_of_instructions:
                raise
            failures[instructions.name] = str(error)
            log.info("the kernels for %s are not used: %s", instructions.name, error)
            continue
        loaded, choices = open_library(file), {} if os.environ.get(TUNING) == "off" else found.get("choices", {})
        if "prefetch" in choices:
            tuning(loaded).prefetch = choices["prefetch"]
        log.info("kernels for %s: %s%s", instructions.name, file, chosen(choices))
        return Loaded(loaded, instructions.name, failures, choices)
    raise compiling.LibraryError("; ".join(f"{name}: {reason}" for name, reason in failures.items()))


def load() -> list[Loaded]:
    """LOADED, after compiling, checking and opening the library at the first call. Raises: UsageError, see `allowed`."""
    with LOADING:
        if not LOADED:
            LOADED.append(find())
    return LOADED


def find() -> Loaded:
    if not allowed() or sys.byteorder != "little":
        return Loaded(None)
    reason: Exception | None = None
    for folder in compiling.cache_folders():
        try:
            return best_library(folder)
        except compiling.LibraryError as error:
            log.warning("%s: %s.", compiling.SLOWER, str(error).rstrip("."))
            return Loaded(None)
        except (OSError, AttributeError) as error:  # a full disk, a folder without execution permission, a missing function
            reason = error
    log.warning("%s: the compiled kernels cannot be saved or loaded (%s).", compiling.SLOWER, reason)
    return Loaded(None)


def use(file: Path) -> None:
    """From now on, this process uses a compiled file, without a check: it is for the program that checks the file."""
    LOADED[:] = [Loaded(open_library(file))]


def library() -> ctypes.CDLL | None:
    """The kernels, ready to call, or None if torch's own operators have to be used."""
    return (LOADED or load())[0].library


class Matrix(NamedTuple):
    """A matrix for `product`: w, its scales (None for bfloat16), its number of outputs, and its bias, bfloat16[O]."""

    weight: Tensor
    scales: Tensor | None
    outputs: int
    bias: Tensor | None = None


def expanded(tensor: Tensor | None, *shape: int) -> Tensor | None:
    """A contiguous tensor with dimensions of size 1 repeated; -1 keeps a dimension. Raises: RuntimeError if it does not fit."""
    return None if tensor is None else tensor.expand(shape).contiguous()


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def fill_matrices(fields: ctypes.Array, matrices: Sequence[tuple]) -> None:
    for field, (weight, scales, outputs, bias) in zip(fields, matrices, strict=False):
        field.w, field.scales, field.bias, field.outputs = weight.data_ptr(), address(scales), address(bias), outputs


def product(
    kind: str, x: Tensor, matrices: Sequence[tuple], dtype: torch.dtype, activation: str = "none", is_transposed: bool = False
) -> Tensor:
    """x @ w.T + bias for one to three matrices with the same input x, in one call.

    Args:
        kind: "bf16": w is bfloat16[O, X], contiguous, X even, and x is bfloat16; sums are float32. "int8", "int4": w
            is in tiles (see int_formats.py), x is bfloat16 or float32, and each group of its numbers is rounded to 8 bits.
        x: [..., X].
        matrices: each a Matrix, or a tuple with its first fields.
        dtype: the dtype of the result, bfloat16 or float32.
        activation: "none"; "gelu" of all outputs; or "gated", which combines two matrices of the same size:
            gelu(x @ first.T) * (x @ second.T).
        is_transposed: whether x is multiplied with w instead of w.T; only for one matrix in bfloat16, which then is [X, O].
    Returns: [..., sum of all O], with the outputs in the order of the matrices; or [..., O] if gated.
    """
    x = x.contiguous()
    given = [matrix._replace(bias=expanded(matrix.bias, -1)) for matrix in (Matrix(*matrix) for matrix in matrices)]
    outputs = given[0].outputs if activation == "gated" else sum(matrix.outputs for matrix in given)
    y = x.new_empty(*x.shape[:-1], outputs, dtype=dtype)
    inputs = x.shape[-1]
    call = CCall(
        x=x.data_ptr(), x_is_bf16=x.dtype is torch.bfloat16, activation=ACTIVATIONS.index(activation), y=y.data_ptr(),
        y_is_bf16=dtype is torch.bfloat16, threads=torch.get_num_threads(), is_transposed=is_transposed,
        rows=x.numel() // inputs, inputs=inputs,
    )  # fmt: skip
    fill_matrices(call.matrices, given)
    getattr(library(), f"{kind}_product")(ctypes.byref(call))
    return y


def bf16_gate(gate: Tensor, up: Tensor, y: Tensor) -> Tensor:
    """gelu(gate) * up, written to y, which may be gate. All are bfloat16, contiguous, and of one size, a multiple of 16."""
    library().bf16_gate(gate.data_ptr(), up.data_ptr(), y.data_ptr(), gate.numel(), torch.get_num_threads())
    return y


def bf16_gate_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the arguments gate and up of bf16_gate, from dy, the gradient of its result."""
    dy, d_gate, d_up = dy.contiguous(), torch.empty_like(gate), torch.empty_like(up)
    pointers = (tensor.data_ptr() for tensor in (dy, gate, up, d_gate, d_up))
    library().bf16_gate_backward(*pointers, gate.numel(), torch.get_num_threads())
    return d_gate, d_up


def bf16_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """GemmaRMSNorm of x, bfloat16[..., D], with a weight, bfloat16[D]. D is a multiple of 16."""
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    width = weight.numel()
    rows = x.numel() // width
    library().bf16_rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, width, eps, torch.get_num_threads())
    return y


def bf16_rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The gradient of the argument x of bf16_rms_norm, from dy, the gradient of its result."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    pointers, width = (tensor.data_ptr() for tensor in (dy, x, weight, dx)), weight.numel()
    library().bf16_rms_norm_backward(*pointers, x.numel() // width, width, eps, torch.get_num_threads())
    return dx


def bf16_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """nn.LayerNorm of x, bfloat16[..., D], with weight and bias, bfloat16[D]. D is a multiple of 16."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    y = torch.empty_like(x)
    pointers, width = (tensor.data_ptr() for tensor in (x, weight, bias, y)), weight.numel()
    library().bf16_layer_norm(*pointers, x.numel() // width, width, eps, torch.get_num_threads())
    return y


def attention_call(
    slots: Tensor, rotation: tuple[Tensor, Tensor], keys: Tensor, heads: int, slots_read: int, scale: float, cap: float | None
) -> CTokenAttention:
    """The struct for bf16_attend and decode; the arguments are those of bf16_attend, contiguous, and heads = N."""
    rows, kv_heads, _, width = keys.shape
    return CTokenAttention(
        cos=rotation[0].data_ptr(), sin=rotation[1].data_ptr(), new_slots=slots.data_ptr(), row_stride=keys.stride(0),
        head_stride=keys.stride(1), slots=slots_read, scale=scale, cap=cap or 0, rows=rows, heads=heads, kv_heads=kv_heads,
        width=width, threads=torch.get_num_threads(),
    )  # fmt: skip


def bf16_attend(
    qkv: Tensor, slots: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, keys: Tensor, values: Tensor,
    slots_read: int, scale: float, cap: float | None,
) -> Tensor:  # fmt: skip
    """Attention of one new token per row: applies RoPE to q and k, writes k and v to the cache, and attends to the cache.

    Args:
        qkv: bfloat16[B, 1, (N + 2 K) E], queries, keys and values before RoPE; E a multiple of 32.
        slots: int64[B, 1], the slot in which the key and the value of the new token are stored.
        rotation: cosines and sines of modeling_gemma.rotary_embedding, bfloat16[B, 1, 1, E].
        mask: bool[B, 1, 1, S], True = the token attends to the slot; None = to all S slots.
        keys, values: bfloat16[B, K, slots, E], the cache of one layer, which is written to.
        slots_read: S, number of slots that are read.
        scale, cap: as in modeling_gemma.attention.
    Returns: bfloat16[B, 1, N E].
    """
    rows, kv_heads, _, width = keys.shape
    heads = qkv.shape[-1] // width - 2 * kv_heads
    y = qkv.new_empty(rows, 1, heads * width)
    cos, sin = (expanded(part, rows, 1, 1, width) for part in rotation)
    qkv, slots, mask = expanded(qkv, rows, 1, -1), expanded(slots, rows, 1), expanded(mask, rows, 1, 1, slots_read)
    call = attention_call(slots, (cos, sin), keys, heads, slots_read, scale, cap)
    library().bf16_attend(
        ctypes.byref(call), qkv.data_ptr(), keys.data_ptr(), values.data_ptr(), address(mask), y.data_ptr(),
    )  # fmt: skip
    return y


def bf16_attend_many(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float | None,
    rotation: tuple[Tensor, Tensor] | None = None, cache: tuple[Tensor, Tensor, Tensor, int] | None = None,
) -> Tensor:  # fmt: skip
    """Attention of many queries. With a cache, applies RoPE to q and k, and writes k and v to the cache before that.

    Args:
        q: bfloat16[B, N, L, E] with any strides, the last of which is 1.
        k, v: the same for bfloat16[B, K, L, E]; S = L without a cache.
        mask: bool[B, 1, L, S], True = the query attends to the slot; None = every query attends to all S slots.
        scale, cap: as in modeling_gemma.attention.
        rotation: cosines and sines of modeling_gemma.rotary_embedding, bfloat16[B, 1, L, E]; E is a multiple of 32.
        cache: (slots, keys, values, slots_read) of one layer: int64[B, L], where k and v are stored; bfloat16[B, K, slots, E],
            the cache, twice; and S, the number of slots that are read.
    Returns: bfloat16[B, L, N E].
    """
    rows, heads, length, width = q.shape
    slots, keys, values, slots_read = cache or (None, k, v, length)
    cos, sin = (expanded(part, rows, 1, length, width) for part in rotation or (None, None))
    slots, mask = expanded(slots, rows, length), expanded(mask, rows, 1, length, slots_read)
    y = q.new_empty(rows, length, heads * width)
    kv_heads, padded_slots, padded_width = k.shape[1], -(-slots_read // 16) * 16, -(-width // 16) * 16
    packed = q.new_empty(rows * kv_heads * padded_slots * (width + padded_width))
    pointers = {"cos": cos, "sin": sin, "new_slots": slots, "mask": mask, "packed": packed, "y": y}
    call = CAttention(
        *(CHeads(part.data_ptr(), *part.stride()[:3]) for part in (q, k, v, keys, values)),
        **{name: None if tensor is None else tensor.data_ptr() for name, tensor in pointers.items()},
        rows=rows, heads=heads, kv_heads=kv_heads, length=length, slots=slots_read, width=width,
        scale=scale, cap=cap or 0, threads=torch.get_num_threads(),
    )  # fmt: skip
    library().bf16_attend_many(ctypes.byref(call))
    return y


def reduce_logits(name: str, logits: Tensor) -> Tensor:
    """argmax, int64[B], or logsumexp, float32[B], of float32[B, V]. logsumexp is NaN if a number is NaN or +inf."""
    logits = logits.contiguous()
    y = logits.new_empty(len(logits), dtype=torch.int64 if name == "argmax" else torch.float32)
    function = getattr(library(), f"logits_{name}")
    function(logits.data_ptr(), *logits.shape, y.data_ptr(), torch.get_num_threads())
    return y


def int_quantize(kind: str, weight: Tensor, packed: Tensor, scales: Tensor) -> None:
    """Rounds weight (bfloat16 or float32 [O, X], contiguous) into `packed` and `scales`, in tiles (see int_formats.py)."""
    outputs, inputs = weight.shape
    bits = int(kind.removeprefix("int"))
    padded = packed.shape[1] * 32 // bits
    library().int_quantize(
        bits, weight.data_ptr(), weight.dtype == torch.bfloat16, outputs, inputs, padded, packed.data_ptr(), scales.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip


class DecoderLayer(NamedTuple):
    """The weights of one layer for `decode`.

    Attributes:
        qkv, output, gate_up, down: the matrices, all of one kind and without bias.
        norms: of the input and the output of attention, and of the input and the output of the MLP, bfloat16[D]; None = no norm.
        is_windowed: whether the layer uses window_mask.
    """

    qkv: list[Matrix]
    output: list[Matrix]
    gate_up: list[Matrix]
    down: list[Matrix]
    norms: list[Tensor | None]
    is_windowed: bool


def decoder_layers(layers: Sequence[DecoderLayer]) -> ctypes.Array:
    """The layers as `decode` needs them. They hold the addresses of the weights, so the caller must keep the weights."""
    structs = (CDecoderLayer * len(layers))()
    for struct, layer in zip(structs, layers, strict=True):
        for name in ("qkv", "output", "gate_up", "down"):
            fill_matrices(getattr(struct, name), getattr(layer, name))
        struct.attention_input, struct.attention_output, struct.mlp_input, struct.mlp_output = map(address, layer.norms)
        struct.is_windowed = layer.is_windowed
    return structs


def decode(
    kind: str, layers: ctypes.Array, norm: Tensor, eps: float, x: Tensor, slots: Tensor, rotation: tuple[Tensor, Tensor],
    mask: Tensor | None, window_mask: Tensor | None, keys: Tensor, values: Tensor, slots_read: int, scale: float,
    cap: float | None,
) -> Tensor:  # fmt: skip
    """All layers of the decoder and the norm after them, for one new token per row.

    Args:
        kind: of all matrices, as in `product`.
        layers: from decoder_layers.
        norm: of the output of the last layer, bfloat16[D]; eps is that of all norms.
        x: bfloat16[B, 1, D].
        keys, values: bfloat16[layers, B, K, slots, E], the cache, which is written to.
        slots, rotation, mask, window_mask, slots_read, scale, cap: as in bf16_attend.
    Returns: bfloat16[B, 1, D].
    """
    rows, width = keys.shape[1], keys.shape[-1]
    cos, sin = (expanded(part, rows, 1, 1, width) for part in rotation)
    x, slots = expanded(x, rows, 1, -1), expanded(slots, rows, 1)
    mask, window_mask = (expanded(each, rows, 1, 1, slots_read) for each in (mask, window_mask))
    heads = layers[0].qkv[0].outputs // width
    decoder = CDecoder(
        layers=layers, num_layers=len(layers), width=x.shape[-1], mlp_width=layers[0].gate_up[0].outputs, norm=norm.data_ptr(),
        eps=eps,
        attention=attention_call(slots, (cos, sin), keys[0], heads, slots_read, scale, cap), keys=keys.data_ptr(),
        values=values.data_ptr(), layer_stride=keys.stride(0), mask=address(mask), window_mask=address(window_mask),
    )  # fmt: skip
    y = torch.empty_like(x)
    getattr(library(), f"{kind}_decode")(ctypes.byref(decoder), x.data_ptr(), y.data_ptr())
    return y
