"""The roofline model: how fast this machine reads memory and multiplies, and how many bytes and multiplications a model needs.

Decoding a token reads every weight of the decoder once, so it takes at least bytes / bandwidth seconds. Prefill multiplies every
token with every weight, so it takes at least multiply-adds / matrix rate seconds. Both rates are measured, not looked up in a
data sheet. Checked in tests/test_roofline.py.
"""

import time
from collections.abc import Callable

import torch
from torch import nn

from paligemma.configuration import PaliGemmaConfig


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


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that the device reads from its memory. Takes half a second.

    A float32 matrix of 256 MB, larger than any cache, is read in two ways: by a matrix-vector product and by computing its
    maximum. The higher rate is returned. Which way is faster depends on the processor: one processor reached 16 GB/s with the
    product and 40 GB/s with the maximum.
    """
    matrix, vector = torch.ones(32768, 2048, device=device), torch.ones(2048, device=device)
    return matrix.nbytes / min(best_seconds(work, device) for work in (lambda: matrix @ vector, matrix.amax))


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds per second of a matrix product of about the size that prefill needs.

    On a CPU, the rate of float32 is returned if it is higher than that of `dtype`: processors without bfloat16 instructions are
    several times slower in bfloat16, so fast_cpu.py computes in float32 on them.
    """
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


def decode_bytes(decoder: nn.Module) -> int:
    """The number of bytes that decoding one token reads: all weights of the decoder, in their stored form (quantised or not)."""
    return sum(tensor.nbytes for tensor in decoder.state_dict().values())
