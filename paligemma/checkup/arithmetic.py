"""Does this machine compute what it should? Each check computes something twice, in the way that models use and in a plain way.

The plain way runs on the CPU, in float32, with the simplest operators of torch. Two correct ways differ by rounding only, and
`bound` says how much that is for a dtype. A wrong kernel, a token that is read before it has arrived, or float32 products that
are rounded to TF32 differ by more. All weights are random, so no check needs a download.

Checked in tests/checkup/test_arithmetic.py, with a wrong kernel for each check.
Shapes: B batch rows, L tokens fed in this call, S slots of the KV cache that are read, N query heads, K key/value heads,
E width of one head, D model width, V vocabulary size, O outputs and X inputs of one matrix.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from paligemma.checkpoints.weights import empty_model, load_model, save_model
from paligemma.checkup.rows import Row, failed, note
from paligemma.configuration import PaliGemmaConfig
from paligemma.generation import PendingTokens
from paligemma.gpu import capped_attention, self_check
from paligemma.layers import compiling, int_formats, kernel_check, kernels, quantization
from paligemma.modeling_gemma import attention
from paligemma.modeling_paligemma import prefix_lm_mask
from paligemma.roofline import matrix_rate, read_bandwidth

# The checks use real widths of heads (256 in the decoder, 72 in the tower), because kernels depend on them.
HEAD_WIDTH, TOWER_HEAD_WIDTH = 256, 72
IMAGE_TOKEN, VOCABULARY, PATCHES = 300, 320, 16
STEPS = 4  # decoding steps that are compared
COPIES = 20  # how often the order of copies is checked
BYTES_PER_TOKEN = {"bf16": 5.0e9, "int4": 1.5e9}  # the weights of PaliGemma 3B, read per generated token
SPEED_BYTES = 2**30  # the free memory that measuring the speed needs
# Inputs of an int8 or int4 product are rounded to multiples of 1/127 of the largest of 32 or 64 inputs. For normally distributed
# inputs, the largest is about 2.3 standard deviations, and the rounding error is 1 / sqrt(12) of a step: 0.5 percent. The
# bound is 3 times as large.
INPUT_ROUNDING = 0.016
REPORT = "Please report the output of paligemma doctor --json. Until this is fixed: "


def name_of(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, str(dtype))


def bound(dtype: torch.dtype) -> float:
    """The largest relative difference between two correct ways. float32 must not be rounded to TF32, whose eps is 1e-3."""
    return 64 * torch.finfo(dtype).eps if dtype == torch.float32 else self_check.rounding_bound(dtype)


def difference(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; NaN or infinite if a number is not finite."""
    found, expected = found.detach().float().cpu(), expected.detach().float()
    return float((found - expected).norm() / expected.norm())


def compared(name: str, differences: dict[str, tuple[float, float]], instead: str) -> Row:
    """The row for the differences and bounds of several variants, such as dtypes. `instead`: what to do until it is fixed."""
    wrong = any(not gap <= most for gap, most in differences.values())  # NaN is wrong, too
    bounds = {most for _, most in differences.values()}
    limit = f"; at most {bounds.pop():.1g}" if len(bounds) == 1 else ""
    parts = (f"{kind} {gap:.1g}" + ("" if limit else f" (at most {most:.1g})") for kind, (gap, most) in differences.items())
    value = ", ".join(parts) + limit
    return failed(name, f"differs: {value}", REPORT + instead) if wrong else Row(name, value)


@contextmanager
def one_thread() -> Iterator[None]:
    """In the `with` block, torch uses one thread: small models are not faster with more, and much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Attention


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float | None) -> Tensor:
    """Attention written out in float32 on the CPU. Arguments and result as in modeling_gemma.attention."""
    q, k, v = q.float(), *(x.float().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scale  # [B, N, L, S]
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v  # [B, N, L, E]


def attention_cases() -> dict[str, tuple[tuple[int, int, int, int, int], Tensor | None, float | None]]:
    """By name: the numbers (N, K, L, S, E), the mask and the soft cap."""
    is_token = (torch.arange(80) < torch.tensor([[80], [57]])).long()  # [B, L]
    is_answer = (torch.arange(80) >= 60).long().expand(2, 80)  # [B, L]
    length = torch.tensor([300, 211])
    return {
        "attention of the tower": ((4, 4, 80, 80, TOWER_HEAD_WIDTH), None, None),
        "attention without a mask": ((8, 1, 80, 80, HEAD_WIDTH), None, None),
        "attention with a mask": ((8, 1, 80, 80, HEAD_WIDTH), prefix_lm_mask(is_token, is_answer), None),
        "attention with soft caps": ((8, 4, 80, 80, HEAD_WIDTH), prefix_lm_mask(is_token, is_answer), 5.0),
        "attention of one token": ((8, 1, 1, 300, HEAD_WIDTH), (torch.arange(300) < length[:, None])[:, None, None], None),
    }


@one_thread()
def attention_rows(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> list[Row]:
    """Compares the attention that models use, which chooses torch's fastest kernel, with attention written out."""
    rows = []
    for name, ((n, k_heads, length, slots, e), mask, cap) in attention_cases().items():
        found = {}
        for dtype in dtypes:
            shapes = ((2, n, length, e), (2, k_heads, slots, e), (2, k_heads, slots, e))
            q, k, v = (draw(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes))
            mask_on_device = None if mask is None else mask.to(device)
            y = attention(q.to(device), k.to(device), v.to(device), mask_on_device, e**-0.5, cap)  # [B, N, L, E]
            found[name_of(dtype)] = difference(y, plain_attention(q, k, v, mask, e**-0.5, cap)), bound(dtype)
        rows.append(compared(name, found, "take --device cpu."))
    return rows


# Whole models


def tiny_config(family: str) -> PaliGemmaConfig:
    """A model of two layers in tower and decoder, whose heads are as wide as those of the real models."""
    text = {
        "model_type": family, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": HEAD_WIDTH, "vocab_size": VOCABULARY, "max_position_embeddings": 512,
    }  # fmt: skip
    tower = {
        "model_type": "siglip_vision_model", "hidden_size": 2 * TOWER_HEAD_WIDTH, "intermediate_size": 288,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
    }  # fmt: skip
    raw = {"model_type": "paligemma", "image_token_index": IMAGE_TOKEN, "text_config": text, "vision_config": tower}
    return PaliGemmaConfig.from_hf(raw | {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2})


def write_tiny_model(folder: Path, family: str) -> Path:
    """Saves a model with random bfloat16 weights, so that `load_model` can load it in every way."""
    model = empty_model(tiny_config(family))
    for seed, (name, empty) in enumerate(list(model.named_parameters())):
        width = empty.shape[1:].numel() if empty.dim() > 1 else 25
        module, _, leaf = name.rpartition(".")
        weight = (draw(*empty.shape, seed=seed) * width**-0.5).bfloat16()
        setattr(model.get_submodule(module), leaf, nn.Parameter(weight, requires_grad=False))
    save_model(model, folder)
    return folder


def tiny_inputs() -> dict[str, Tensor]:
    """A batch of two rows, a picture and 12 or 7 tokens of a prompt each, padded on the right."""
    words = torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    input_ids = torch.cat((torch.full((2, PATCHES), IMAGE_TOKEN), words), 1)  # [B, L]
    lengths = torch.tensor([PATCHES + 12, PATCHES + 7])
    attention_mask = (torch.arange(PATCHES + 12) < lengths[:, None]).long()  # [B, L]
    pixel_values = draw(2, 3, 56, 56, seed=7).clamp(-1, 1)
    types = torch.zeros_like(input_ids)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": types, "pixel_values": pixel_values}


@torch.no_grad()
def logits_of(model: nn.Module, steps: int = STEPS) -> Tensor:
    """float32[steps + 1, B, V] on the CPU: the logits after the prompts, and after each of a few given tokens."""
    cache = model.new_cache(2, PATCHES + 12 + steps)
    found = [model.prefill(cache, **tiny_inputs())]  # [B, V]
    found += [model.decode(cache, torch.tensor([20 + step, 40 + step])) for step in range(steps)]
    return torch.stack([logits.float().cpu() for logits in found])


@one_thread()
def model_rows(folder: Path, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> list[Row]:
    """Compares the logits of small models of both families on the device with those of float32 on the CPU."""
    dtypes = tuple(dtype for dtype in dtypes if (device.type, dtype) != ("cpu", torch.float32))  # that one is the reference
    rows = []
    for family, name in (("gemma", "PaliGemma 1"), ("gemma2", "PaliGemma 2")):
        tiny = write_tiny_model(folder / family, family)
        expected = logits_of(load_model(tiny, dtype="fp32"))
        found = {
            name_of(dtype): (difference(logits_of(load_model(tiny, device=device, dtype=dtype)), expected), bound(dtype))
            for dtype in dtypes
        }
        rows.append(compared(f"logits of {name}", found, "take another --dtype, or --device cpu."))
    return rows


def recorded_rows(folder: Path, device: torch.device, dtype: torch.dtype, mode: str) -> list[Row]:
    """Compares decoding steps that are recorded as CUDA graphs (with the mode "compile" also compiled) with plain steps."""
    what = {"record": "recorded steps", "compile": "compiled steps"}[mode]
    tiny = write_tiny_model(folder / mode, "gemma2")
    plain = load_model(tiny, device=device, dtype=dtype, graphs="off")
    fast = load_model(tiny, device=device, dtype=dtype, graphs=mode)
    steps = 4 * STEPS  # the first steps run plainly
    found = {name_of(dtype): (difference(logits_of(fast, steps), logits_of(plain, steps)), bound(dtype))}
    return [compared(what, found, "take --graphs off.")]


def flex_rows(device: torch.device, dtype: torch.dtype) -> list[Row]:
    """torch's flex_attention, compiled, which computes soft caps in long prompts on some GPUs."""
    options = capped_attention.kernel_options(device, dtype, HEAD_WIDTH)
    if options is None:
        return [Row("flex_attention", "not used on this device")]
    shapes = ((1, 8, 512, HEAD_WIDTH), (1, 4, 512, HEAD_WIDTH), (1, 4, 512, HEAD_WIDTH))
    q, k, v = (draw(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes))
    there = [x.to(device) for x in (q, k, v)]
    y = capped_attention.compiled_capped_attention()(*there, None, HEAD_WIDTH**-0.5, 5.0, options)  # [B, N, L, E]
    gap = difference(y, plain_attention(q, k, v, None, HEAD_WIDTH**-0.5, 5.0))
    return [compared("flex_attention", {name_of(dtype): (gap, bound(dtype))}, "take another --device.")]


def fast_way_rows() -> list[Row]:
    """A row for each FastWay that was turned off during the checks above (gpu/self_check.py). Failed if a result differed."""
    rows = []
    for way in self_check.all_ways():
        name, reason = str(way["name"]), str(way["reason"])
        if way["state"] == "off" and reason.startswith("differ"):
            rows.append(failed(name, f"they {reason}", REPORT + "you need not do anything, because plain operators are used."))
        elif way["state"] == "off":
            advice = "The results are not affected: plain operators are used, which are slower."
            rows.append(note(name, f"not used: they {reason}", advice))
    return rows


# Integers


def integer_rows(device: torch.device, dtype: torch.dtype) -> list[Row]:
    """Compares products of int8 and int4 weights with products of the same weights as floats, for few and many rows."""
    rows = []
    most = bound(dtype) + (INPUT_ROUNDING if device.type == "cpu" else 0)  # kernels.cpp rounds inputs to 8 bits
    for kind in int_formats.KINDS:
        linear = nn.Linear(512, 384, bias=False)
        linear.weight.data = draw(384, 512, seed=1) * 512**-0.5
        module = quantization.quantize_module(linear, kind, {"weight": linear.weight.data.to(dtype)})
        weight = module.weight_as_floats()  # [O, X]
        module = module.to(device)
        found = {}
        for count in (1, 4, 16, 64):
            x = draw(count, 512, seed=count).to(dtype)
            y = module(x.to(device))  # [B, O]
            found[f"{count} rows" if count > 1 else "1 row"] = difference(y, x.float() @ weight.T), most
        rows.append(compared(f"{kind} products", found, "do not use --quantize."))
    return rows


# Copies between CPU and GPU


def busy(device: torch.device) -> Callable[[], Tensor]:
    """A function that gives the device some milliseconds of work and returns before the work is done."""
    matrix = torch.ones(2048, 2048, device=device)
    return lambda: functools.reduce(torch.matmul, [matrix] * 4)


def copy_rows(device: torch.device) -> list[Row]:
    """Are tokens read only after they have arrived on the CPU? The device has work to do first, so that copies are late."""
    work, late = busy(device), 0
    for number in range(1, COPIES + 1):
        work()
        numbers = torch.full((256, 2), float(number), device=device)
        rows = [SimpleNamespace(is_removed=False)] * len(numbers)
        arrived = PendingTokens(rows, numbers).wait()
        late += any(values != [number, number] for _, values in arrived)
    value = f"{COPIES - late} of {COPIES} copies from the device were complete when they were read"
    return [failed("order of copies", value, REPORT + "take --device cpu.") if late else Row("order of copies", value)]


# The kernels for the CPU


def kernel_rows() -> list[Row]:
    """Compares kernels.cpp with torch. If kernels.cpp is not used, the row is only a note: torch's operators replace it."""
    if kernels.library() is None:
        advice = "Run the command again with --verbose, which says why they cannot be compiled or loaded."
        if os.environ.get("PALIGEMMA_KERNELS") == "off":
            advice = "To use them, remove the variable PALIGEMMA_KERNELS."
        elif not compiling.find_compiler():
            advice = "Install g++."
        return [note("kernels.cpp", "not used; torch's own products are used, which are slower", advice)]
    loaded, errors = kernels.load()[0], kernel_check.errors()
    others = "".join(f"; not {name}: {reason}" for name, reason in loaded.failures.items())
    if wrong := [name for name, error in errors.items() if error > 1]:
        return [failed("kernels.cpp", f"{loaded.name}, wrong: {', '.join(wrong)}{others}", f"{REPORT}set PALIGEMMA_KERNELS=off.")]
    value = f"{loaded.name}, {len(errors)} functions are as exact as they should be{kernels.chosen(loaded.choices)}{others}"
    return [note("kernels.cpp", value, f"{REPORT}the next instruction set is used.") if others else Row("kernels.cpp", value)]


# Speed


def speed_rows(device: torch.device, dtype: torch.dtype, free: int | None) -> list[Row]:
    """Memory bandwidth and arithmetic throughput, the two limits of speed (roofline.py).

    Args:
        free: bytes of free memory on the device; None = unknown.
    """
    if free is not None and free < SPEED_BYTES:
        return [note("speed", "not measured: less than 1 GiB is free", "Close other programs.")]
    bandwidth, kinds = read_bandwidth(device), {name_of(dtype): dtype}
    if device.type == "cpu":
        kinds["int8"] = torch.int8
    rates = ", ".join(f"{matrix_rate(device, kind) / 1e9:,.0f} in {name}" for name, kind in kinds.items())
    limits = ", ".join(f"{bandwidth / count:.1f} in {kind}" for kind, count in BYTES_PER_TOKEN.items())
    return [
        Row(f"memory of {device}", f"{bandwidth / 1e9:.1f} GB/s; at most this many tokens per second for a 3B model: {limits}"),
        Row(f"products on {device}", f"G multiply-adds/s: {rates}"),
    ]
