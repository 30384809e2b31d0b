"""argmax and logsumexp of logits: on a CPU our kernels, which use all threads also for a single row; elsewhere torch's operators.

Checked in tests/layers/test_fast_logits.py. Shapes: B rows of a batch, V vocabulary.
"""

import torch
from torch import Tensor

from paligemma.layers import kernels

MIN_LOGITS = 2**16  # with fewer, torch takes little time, and the kernels need not be compiled for a small model


def suits_kernel(logits: Tensor) -> bool:
    return (
        logits.is_cpu and logits.dtype is torch.float32 and logits.ndim == 2 and logits.numel() >= MIN_LOGITS
        and not logits.requires_grad and not torch.compiler.is_compiling() and kernels.library() is not None
    )  # fmt: skip


def argmax(logits: Tensor) -> Tensor:
    """The id of the largest logit of each row of [B, V], int64[B]; any id if logits of the row are NaN."""
    return kernels.reduce_logits("argmax", logits) if suits_kernel(logits) else logits.argmax(-1)


def logsumexp(logits: Tensor) -> Tensor:
    """log(sum(e^logits)) of each row of [B, V], [B]. It is not finite if a logit is NaN or +inf, or if all of a row are -inf."""
    return kernels.reduce_logits("logsumexp", logits) if suits_kernel(logits) else logits.logsumexp(-1)
