"""Attention with Gemma 2's soft cap as one CUDA kernel, for long prompts: torch's flex_attention, compiled.

torch's other attention kernels have no soft cap, so modeling_gemma.attention computes the scores of a block of queries, stores
them, and reads them again. flex_attention stores no scores. It is used where devices.PROFILES has options for it, for prompts of
at least MIN_TOKENS tokens; everything else is computed as in modeling_gemma.py. The first result of each form (device, dtype, one
row or several, with or without a mask) is compared with attention in float32 for 64 queries (self_check.py). If they differ, or
if the compiler or torch raises an exception, everything is computed as in modeling_gemma.py.

`use_capped_attention` puts this attention into a model. The compiled kernel has never run on a GPU. Checked in
tests/gpu/test_capped_attention.py.
Shapes: as in modeling_gemma.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paligemma import devices
from paligemma.gpu.self_check import FastWay, rounding_bound
from paligemma.layers import compiling
from paligemma.layers.replacing import extended
from paligemma.modeling_gemma import GemmaAttention, attention
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration

# Shorter prompts have a small score matrix, so plain attention is used. This is the number of image tokens at 448 px.
MIN_TOKENS = 1024
CHECKED_QUERIES = 64

CAPPED = FastWay("attention kernels with a soft cap", rounding_bound(torch.bfloat16), "computing the scores without them")


def capped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float, options: dict[str, int] | None = None
) -> Tensor:
    """modeling_gemma.attention with a soft cap. Compiled, it is one kernel; `options` are its block sizes."""
    from torch.nn.attention.flex_attention import flex_attention  # imported only when needed: it takes two seconds

    def change(score: Tensor, row: Tensor, _head: Tensor, query: Tensor, slot: Tensor) -> Tensor:
        score = torch.tanh(score / cap) * cap
        return score if mask is None else torch.where(mask[row, 0, query, slot], score, -torch.inf)

    return flex_attention(q, k, v, score_mod=change, scale=scale, enable_gqa=True, kernel_options=options)


@functools.cache
def compiled_capped_attention() -> Callable[..., Tensor]:
    compiling.set_private_compile_cache()
    return torch.compile(capped_attention, fullgraph=True)


def shared_bytes(options: dict[str, int], width: int, itemsize: int) -> int:
    """The shared memory in bytes that a block of the kernel needs at most.

    It holds BLOCK_M queries, the keys and values that are being loaded, and the scores in float32 with their mask. Keys and
    values are loaded for num_stages - 1 iterations at a time; with one stage, a single buffer holds first the keys and then the
    values.
    Triton reports up to 10 % less: tests/gpu/test_capped_attention.py.
    """
    rows, columns = options["BLOCK_M"], options["BLOCK_N"]
    buffers = max(1, 2 * (options["num_stages"] - 1))
    return itemsize * width * (rows + buffers * columns) + 5 * rows * columns + 128


@functools.cache
def kernel_options(device: torch.device, dtype: torch.dtype, width: int) -> dict[str, int] | None:
    """The block sizes for this device; {} = those that torch chooses; None = the kernel is not used here.

    Where the profile names block sizes, they are halved until a block fits into the shared memory of the card, because
    a kernel that needs more is compiled but cannot start.
    """
    options = devices.profile(device).flex_options
    if not options:
        return options
    properties: Any = torch.cuda.get_device_properties(device)  # torch's declaration lacks the attribute
    options, limit = dict(options), properties.shared_memory_per_block_optin
    while shared_bytes(options, width, dtype.itemsize) > limit:
        name = "num_stages" if options["num_stages"] > 1 else "BLOCK_N"
        options[name] //= 2
        if options["BLOCK_N"] < 16:  # the smallest block of a product on an NVIDIA card
            return None
    return options


def mark_sizes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    """Lets torch compile one kernel for all lengths, instead of one for the first length and another one for all others."""
    import torch._dynamo  # imported only when needed: it takes a second

    for tensor in (q, k, v):
        torch._dynamo.maybe_mark_dynamic(tensor, [0, 2])
    if mask is not None:
        torch._dynamo.maybe_mark_dynamic(mask, [0, 2, 3])


class CappedAttention(GemmaAttention):
    """GemmaAttention whose long prompts are computed by capped_attention. Put into a model by use_capped_attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        # In float16, float16.py keeps the queries in float32 and computes attention in its own way.
        if q.shape[2] < MIN_TOKENS or not CAPPED.is_on or torch.is_grad_enabled() or q.dtype is not k.dtype:
            return super().attend(q, k, v, mask)
        options = kernel_options(q.device, q.dtype, self.width)
        if options is None:
            return super().attend(q, k, v, mask)

        def fast() -> Tensor:
            mark_sizes(q, k, v, mask)
            return compiled_capped_attention()(q, k, v, mask, self.scale, self.cap, options)

        def is_right(found: Tensor) -> bool:
            some = torch.linspace(0, q.shape[2] - 1, CHECKED_QUERIES, device=q.device).long()
            # In float32, because the plain way rounds scores to bfloat16: this may change its result by more than the bound.
            queries, keys, values = q[:, :, some].float(), k.float(), v.float()
            expected = attention(queries, keys, values, None if mask is None else mask[:, :, some], self.scale, self.cap)
            return CAPPED.check(found[:, :, some], expected, key=form, bound=rounding_bound(q.dtype))

        form = (q.device, q.dtype, len(q) == 1, mask is None)  # torch compiles a separate kernel for each form
        found = CAPPED.attempt(fast)
        if found is None or not (CAPPED.is_checked(form) or is_right(found)):
            return super().attend(q, k, v, mask)
        return found


def use_capped_attention(model: PaliGemmaForConditionalGeneration) -> None:
    """Changes the layers that have a soft cap, if the profile of the device has options for the kernel."""
    if devices.profile(model.device).flex_options is None:
        return
    for layer in model.language_model.model.layers:
        if layer.self_attn.cap is not None:
            layer.self_attn = extended(layer.self_attn, CappedAttention)
