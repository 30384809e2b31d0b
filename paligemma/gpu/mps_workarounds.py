"""Ways around two errors of torch on Apple's GPUs, which give wrong numbers without a message. `work_around` changes a model.

Long sums. On M1 and M2, a product that sums 32767 or more numbers also adds numbers that lie after the matrices in memory, if it
has 16 or more rows and columns (pytorch#195163, #193487). Of all published models, only PaliGemma 2 28B has such a matrix:
down_proj sums 36864 numbers. From torch 2.14 on, F.linear computes these products correctly, but with kernels that are several
times slower (pytorch#198182). So they are split on every version: each part sums fewer numbers.

Masks. For at most 8 queries and a head width of 64, 96 or 128, attention reads the mask of the first row of the batch for every
row, if the mask is the same for all heads (fixed in May 2026, after torch 2.12: pytorch#184180). In the decoding steps of a model
with such heads, rows of different lengths then attend to the wrong slots. So the rows are computed one by one. Published models
are not affected: their decoders have a head width of 256, except that of 28B. That one has a head width of 128, but also a soft
cap, with which attention is computed by single operators. The tower, whose head width is 72, has no mask. But the bundled model
has a head width of 64.

Checked in tests/gpu/test_mps_workarounds.py, on a simulated device with both errors. No Mac has run it.
Shapes: as in modeling_gemma.py, O outputs, X inputs of one matrix.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma.layers.replacing import extended
from paligemma.modeling_gemma import GemmaAttention

LONGEST_SUM = 32766  # the most terms per sum for which such a product is correct
SMALLEST_WRONG_SIDE = 16  # products with fewer rows or columns are correct
WRONG_HEAD_WIDTHS = (64, 96, 128)
MAX_WRONG_QUERIES = 8  # with more queries, each row gets its own mask


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(x[..., X], weight[O, X], bias), computed in parts where a long sum would be wrong on an Apple GPU."""
    outputs, inputs = weight.shape
    is_right = inputs <= LONGEST_SUM or min(x.numel() // inputs, outputs) < SMALLEST_WRONG_SIDE
    if x.device.type != "mps" or is_right:
        return F.linear(x, weight, bias)
    num_parts = -(-inputs // LONGEST_SUM)
    parts = zip(x.chunk(num_parts, -1), weight.chunk(num_parts, 1), strict=True)
    # The parts are added in float32. So, besides the rounding of each part, there is only one more rounding, that of the sum.
    y = torch.stack([F.linear(*part).float() for part in parts]).sum(0)
    return (y if bias is None else y + bias).to(x.dtype)


class LongLinear(nn.Linear):
    """nn.Linear with so many inputs that its product must be split."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RowByRowAttention(GemmaAttention):
    """GemmaAttention that computes one row of the batch at a time if its mask would otherwise be read wrongly."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None or len(q) == 1 or q.shape[2] > MAX_WRONG_QUERIES:
            return super().attend(q, k, v, mask)
        rows = []
        for i in range(len(q)):
            rows.append(super().attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], mask[i : i + 1]))  # [1, N, L, E]
        return torch.cat(rows)  # [B, N, L, E]


def work_around(model: nn.Module) -> None:
    """For a model on an Apple GPU: replaces the modules that torch would compute wrongly.

    Call it after float16.protect, whose modules use `linear` themselves.
    """
    for name, module in list(model.named_modules()):
        is_plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if is_plain and module.in_features > LONGEST_SUM:
            model.set_submodule(name, extended(module, LongLinear))
        if isinstance(module, GemmaAttention) and module.cap is None and module.width in WRONG_HEAD_WIDTHS:
            model.set_submodule(name, extended(module, RowByRowAttention))
