"""The roofline model: how fast this machine reads memory and multiplies, and how many bytes and multiplications a model needs.

Decoding a token reads every weight of the decoder once, so it takes at least bytes / bandwidth seconds. Prefill multiplies every
token with every weight, so it takes at least multiply-adds / matrix rate seconds. Both rates are measured, not looked up in a
data sheet. They are what the hardware can do, not what a library does: multiply-adds of numbers that stay in registers, and
reading without computing (layers/cpp/rates.h). Checked in tests/test_roofline.py.
"""

import itertools
import mmap
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from paligemma.configuration import PaliGemmaConfig
from paligemma.layers import kernels

NUMBERS = (torch.float32, torch.bfloat16, torch.int8)  # the enum Numbers of layers/cpp/rates.h
STEPS = 2**18  # of one measurement of a rate in registers: about 2 ms, and as many as float32 sums count exactly
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def best_seconds(work: Callable[[], object], device: torch.device, times: int = 5) -> float:
    """The seconds of the fastest of several runs, after a warm-up run."""

    def run() -> float:
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        return time.perf_counter() - start

    run()
    return min(run() for _ in range(times))


def best_rate(work: Callable[[], float], times: int = 5) -> float:
    """What `work` does per second, in the fastest of several runs. It returns how much it did."""
    rates = []
    for _ in range(times):
        start = time.perf_counter()
        done = work()
        rates.append(done / (time.perf_counter() - start))
    return max(rates)


def large_buffer() -> Tensor:
    """int32 numbers, all 1, in memory that does not fit into the caches: 256 MB, or four times the largest cache, at most 512 MB.

    The memory has pages of 2 MB if the system grants them, because looking up addresses of small pages takes time.
    """
    sizes = [2**26]
    with suppress(OSError, ValueError):  # no Linux
        sizes += [int(file.read_text().strip().removesuffix("K")) * 1024 for file in CACHES.glob("index*/size")]
    memory = mmap.mmap(-1, min(4 * max(sizes), 2**29))
    with suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.int32).fill_(1)


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that the device reads from its memory. Takes a quarter of a second.

    On a CPU, all threads read with one, four and eight streams each, with and without prefetching; which is fastest depends on
    the processor. Elsewhere, and without the compiled kernels, a matrix is read by a matrix-vector product and by computing
    its maximum. The highest rate is returned.
    """
    compiled = kernels.library() if device.type == "cpu" else None
    if compiled is None:
        matrix, vector = torch.ones(32768, 2048, device=device), torch.ones(2048, device=device)
        return matrix.nbytes / min(best_seconds(work, device) for work in (lambda: matrix @ vector, matrix.amax))
    threads, buffer = torch.get_num_threads(), large_buffer()
    size = buffer.nbytes // (512 * threads) * 512 * threads
    ways = itertools.takewhile(lambda way: compiled.rate_read(way, buffer.data_ptr(), 0, threads) >= 0, itertools.count())
    # the sum of the numbers that were read, all 1, is their count
    return max(best_rate(lambda way=way: 4 * compiled.rate_read(way, buffer.data_ptr(), size, threads), times=4) for way in ways)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds per second that the device can do with factors of a dtype. Takes a tenth of a second.

    On a CPU this is the rate of the fastest instruction, with all its operands in registers, on all threads. If an instruction
    for a larger dtype is faster, its rate is returned: processors without bfloat16 instructions are several times slower in
    bfloat16, so fast_cpu.py computes in float32 on them. Elsewhere, and without the compiled kernels, it is the rate of a matrix
    product of torch, in bfloat16 for int8.
    """
    numbers = NUMBERS.index(dtype) if dtype in NUMBERS else 0
    if device.type == "cpu" and (compiled := kernels.library()) is not None:
        threads = torch.get_num_threads()
        ways = itertools.takewhile(lambda way: compiled.rate_numbers(way) >= 0, itertools.count())
        usable = [way for way in ways if compiled.rate_numbers(way) <= numbers]
        return max(best_rate(lambda way=way: compiled.rate_multiply(way, STEPS, threads)) for way in usable)
    dtype = torch.bfloat16 if dtype is torch.int8 else dtype
    rows, width = (256, 2048) if device.type == "cpu" else (4096, 8192)
    seconds = []
    for kind in {dtype, torch.float32} if device.type == "cpu" else {dtype}:
        left, right = torch.ones(rows, width, dtype=kind, device=device), torch.ones(width, width, dtype=kind, device=device)
        seconds.append(best_seconds(lambda left=left, right=right: left @ right, device))
    return rows * width * width / min(seconds)


def prefill_multiply_adds(config: PaliGemmaConfig, pictures: int, tokens: int) -> int:
    """The number of multiply-adds to encode the pictures, prefill one row of tokens and predict the next token.

    Args:
        pictures, tokens: the number of each.
    """
    vision, text = config.vision_config, config.text_config
    width, patches = vision.hidden_size, config.num_image_tokens
    tower = vision.num_hidden_layers * (4 * width**2 + 2 * width * vision.intermediate_size + 2 * patches * width)
    embedding_and_projector = 3 * vision.patch_size**2 * width + width * text.hidden_size
    projections = (2 * text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim * text.hidden_size  # q, o, k, v
    mlp = 3 * text.hidden_size * text.intermediate_size
    attention = 2 * tokens * text.num_attention_heads * text.head_dim  # the scores, and the weighted sums of the values
    decoder = text.num_hidden_layers * (projections + mlp + attention)
    logits = text.hidden_size * text.vocab_size  # only for the last position
    return pictures * patches * (tower + embedding_and_projector) + tokens * decoder + logits


def prefill_seconds(config: PaliGemmaConfig, pictures: int, tokens: int, tower_rate: float, decoder_rate: float) -> float:
    """The least time of what `prefill_multiply_adds` counts, at the matrix rates of tower and decoder.

    The rates differ if only the decoder is quantised.
    """
    tower = prefill_multiply_adds(config, pictures, 0) - prefill_multiply_adds(config, 0, 0)
    return tower / tower_rate + (prefill_multiply_adds(config, pictures, tokens) - tower) / decoder_rate


def decode_bytes(decoder: nn.Module) -> int:
    """The number of bytes that decoding one token reads: all weights of the decoder, in their stored form (quantised or not)."""
    return sum(tensor.nbytes for tensor in decoder.state_dict().values())
