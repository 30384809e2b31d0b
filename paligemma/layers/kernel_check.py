"""Compares every function of a compiled library with torch, before the library is used on a machine.

    python -m paligemma.layers.kernel_check LIBRARY THREADS

prints one line of JSON: {"reason": null or why the library must not be used, "choices": see kernel_tuning.py}. kernels.py starts
this program once for each compiled library and keeps the line, so an instruction that the processor lacks ends this program only,
and not the user's.
`paligemma doctor` calls `errors` within its own process.

The numbers in the bounds are derived from how often the functions round, see product_bound; none was measured.
Checked in tests/layers/test_kernel_check.py. Shapes: as in modeling_gemma.py, and O outputs, X inputs of one matrix,
G groups of inputs with one scale each.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from paligemma.layers import int_formats, kernel_tuning, kernels
from paligemma.modeling_gemma import rotary_embedding, rotate

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
ROWS = (1, 2, 3, 7, 10, 33, 101)  # of x: each way to multiply few or many rows, with rows left over
SIZES = ((37, 64), (530, 576))  # (O, X): less than a chunk, and several; O is odd or leaves outputs over
GELU_SLOPE = 1.13  # the largest slope of GELU
GELU_ERROR = 2e-6  # of the kernels' GELU, relative: e^x has an error of two units in the last place, three operations follow


def product_bound(
    x: Tensor, weight: Tensor, result: torch.dtype, *, factors: torch.dtype | None = None, group: int = 0
) -> Tensor:
    """The largest error of x @ weight.T, float64[..., O], with sums in float32.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1: a sum of n products in any order is off by at
    most n u / (1 - n u) times the sum of their magnitudes, u being half the distance from 1 to the next larger number.

    Args:
        x, weight: as they are before the product: [..., X], [O, X].
        result: what the sums are rounded to.
        factors: what each factor, and what is made of them on the way, may be rounded to before it is multiplied.
        group: inputs that are rounded to 127 steps of the largest of them, as the kernels for int8 and int4 do.
    """
    x, weight = x.double(), weight.double()
    sizes, k = (x.abs().float() @ weight.abs().float().T).double(), x.shape[-1]  # float32 is exact enough for a bound
    bound = 1.01 * (k + 8) * UNIT[torch.float32] * sizes
    if factors is not None:
        bound = bound + 3 * UNIT[factors] * sizes
    if group:
        missing = -k % group
        groups = F.pad(x, (0, missing)).unflatten(-1, (-1, group)).abs().amax(-1)  # [..., G]
        steps = 0.51 * groups / 127
        bound = bound + steps @ F.pad(weight, (0, missing)).unflatten(-1, (-1, group)).abs().sum(-1).T
    return bound + UNIT[result] * ((x @ weight.T).abs() + bound) + 1e-30


class Comparison(NamedTuple):
    """A result of `function`, the exact result in float64, and how far they may be apart. All have the same shape."""

    function: str
    found: Tensor
    exact: Tensor
    bound: Tensor

    def error(self) -> float:
        """The largest error as a multiple of its bound; infinite if a number is not finite or the shape is wrong."""
        if self.found.shape != self.exact.shape:
            return math.inf
        worst = float(((self.found.double() - self.exact).abs() / self.bound).max())
        return worst if math.isfinite(worst) else math.inf


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def random_matrix(kind: str, outputs: int, inputs: int) -> tuple[kernels.Matrix, Tensor]:
    """A matrix with a bias for kernels.product, and its weights as numbers, float64[O, X]."""
    weight, scales, bias = draw(outputs, inputs) * inputs**-0.5, None, draw(outputs)
    if kind == "bf16":
        return kernels.Matrix(weight, scales, outputs, bias), weight.double()
    tiles, scales = int_formats.quantize(weight, kind)
    return kernels.Matrix(tiles, scales, outputs, bias), weights_in(kind, tiles, scales)[:outputs]


def weights_in(kind: str, tiles: Tensor, scales: Tensor) -> Tensor:
    """The weights that tiles and their scales represent, float64[O, X], with the rows that fill the last block."""
    return int_formats.dequantize(int_formats.from_tiles(tiles, kind), int_formats.scales_from_tiles(scales), torch.float64)


def activated(sums: list[tuple[Tensor, Tensor]], activation: str) -> tuple[Tensor, Tensor]:
    """The exact result and its error, for pairs of exact sums and their errors."""
    if activation == "none":
        return tuple(torch.cat(parts, -1) for parts in zip(*sums, strict=True))
    first, error = sums[0]
    gelu = F.gelu(first, approximate="tanh")
    error = GELU_SLOPE * error + GELU_ERROR * first.abs()
    if activation == "gelu":
        return gelu, error
    second, other = sums[1]
    return gelu * second, error * second.abs() + gelu.abs() * other + error * other


def products(kind: str) -> Iterator[Comparison]:
    """Products with one, two and three matrices, biases and activations, for several numbers of rows."""
    group = int_formats.GROUP.get(kind, 0)
    for outputs, inputs in SIZES:
        x = draw(ROWS[-1], inputs)
        given, sums = [], []
        for _ in range(3):
            matrix, weight = random_matrix(kind, outputs, inputs)
            exact = x.double() @ weight.T + matrix.bias.double()
            error = product_bound(x, weight, torch.float32, group=group)
            given.append(matrix)
            sums.append((exact, error + 2 * UNIT[torch.float32] * exact.abs()))
        for count, activation in ((3, "none"), (1, "gelu"), (2, "gated")):
            exact, error = activated(sums[:count], activation)
            for rows in ROWS:
                dtype = torch.bfloat16 if rows % 2 else torch.float32
                found = kernels.product(kind, x[:rows], given[:count], dtype, activation)
                bound = error + UNIT[dtype] * (exact.abs() + error) + 1e-30
                yield Comparison(f"{kind}_product", found, exact[:rows], bound[:rows])


def transposed_products() -> Iterator[Comparison]:
    """Products with a matrix that is stored as [X, O]."""
    for inputs, outputs in SIZES:
        x, weight = draw(ROWS[-1], inputs + inputs % 2), draw(inputs + inputs % 2, outputs)
        exact, bound = x.double() @ weight.double(), product_bound(x, weight.T, torch.bfloat16)
        for rows in ROWS:
            found = kernels.product("bf16", x[:rows], [(weight, None, outputs)], torch.bfloat16, is_transposed=True)
            yield Comparison("bf16_product", found, exact[:rows], bound[:rows])


def quantised(kind: str) -> Comparison:
    """Weights of normal size, rounded to integers and turned back: how far they are from the weights.

    A weight is moved by at most half a step, and by less than 2^-7 of itself, because the scale is rounded to bfloat16. The int4
    scales may clip the largest weights of a group to 8 of its steps, which can be 0.8 / 8 of the largest weight.
    """
    weight = draw(530, 576)
    back = weights_in(kind, *int_formats.quantize(weight, kind))[:530]
    largest = weight.double().unflatten(1, (1 if kind == "int8" else 18, -1)).abs().amax(2, keepdim=True)
    step = largest / 127 * 0.51 if kind == "int8" else largest * 0.3
    bound = (step + 0 * weight.double().unflatten(1, (step.shape[1], -1))).flatten(1) + 2.0**-7 * weight.double().abs()
    return Comparison("int_quantize", back, weight.double(), bound)


def norms_and_gate() -> Iterator[Comparison]:
    half, single = UNIT[torch.bfloat16], UNIT[torch.float32]
    x, weight, bias, width = draw(9, 192) * 30 + 3, draw(192), draw(192), 192
    numbers, factors = x.double(), weight.double()
    exact = F.rms_norm(numbers, (width,), eps=1e-6) * (1 + factors)
    # A sum of squares, its root, and a few products; then the result is rounded.
    bound = (half + 0.6 * (width + 8) * single) * exact.abs() + 1e-30
    yield Comparison("bf16_rms_norm", kernels.bf16_rms_norm(x, weight, 1e-6), exact, bound)
    exact = F.layer_norm(numbers, (width,), factors, bias.double(), 1e-6)
    found = kernels.bf16_layer_norm(x, weight, bias, 1e-6)
    yield Comparison("bf16_layer_norm", found, exact, layer_norm_bound(x, weight, bias, exact))
    gate, up = draw(4, 16400), draw(4, 16400)
    exact = F.gelu(gate.double(), approximate="tanh") * up.double()
    bound = half * exact.abs() + 2 * GELU_ERROR * (gate.double() * up.double()).abs() + 1e-30
    yield Comparison("bf16_gate", kernels.bf16_gate(gate, up, torch.empty_like(gate)), exact, bound)


def gradients() -> Iterator[Comparison]:
    """The derivatives of the norm and of the gate, for a random gradient of their results."""
    half, single = UNIT[torch.bfloat16], UNIT[torch.float32]
    x, weight, dy, width, eps = draw(9, 192) * 30 + 3, draw(192), draw(9, 192), 192, 1e-6
    numbers, g = x.double(), dy.double() * (1 + weight.double())
    square = 1 / (numbers.square().mean(-1, keepdim=True) + eps)
    exact = square.sqrt() * (g - numbers * square * (g * numbers).mean(-1, keepdim=True))
    # The two sums have `width` terms, and their errors and those of the products after them add up.
    sizes = square.sqrt() * (g.abs() + numbers.abs() * square * (g * numbers).abs().mean(-1, keepdim=True))
    error = 3 * (width + 8) * single * sizes
    found = kernels.bf16_rms_norm_backward(dy, x, weight, eps)
    yield Comparison("bf16_rms_norm_backward", found, exact, error + half * (exact.abs() + error) + 1e-30)
    gate, up, dy = draw(4, 16400), draw(4, 16400), draw(4, 16400)
    leaves = gate.double().requires_grad_(), up.double().requires_grad_()
    with torch.enable_grad():
        exact_gradients = torch.autograd.grad(F.gelu(leaves[0], approximate="tanh") * leaves[1], leaves, dy.double())
    for found, exact, factors in zip(kernels.bf16_gate_backward(dy, gate, up), exact_gradients, (up, gate), strict=True):
        # The slope of GELU is a sum of two terms, which together are at most GELU_SLOPE + 1.
        error = 2 * GELU_ERROR * (1 + GELU_SLOPE) * (dy.double() * factors.double()).abs()
        yield Comparison("bf16_gate_backward", found, exact, error + half * (exact.abs() + error) + 1e-30)


def layer_norm_bound(x: Tensor, weight: Tensor, bias: Tensor, exact: Tensor, eps: float = 1e-6) -> Tensor:
    """The largest error of a layer norm in float32, rounded to bfloat16.

    The mean is off by the rounding of a sum, and with it every distance from the mean; the variance is off by that of another
    sum; then come a few products and the rounding of the result.
    """
    x, weight, width, single = x.double(), weight.double(), x.shape[-1], UNIT[torch.float32]
    deviation = (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
    normal = (x - x.mean(-1, keepdim=True)) / deviation
    of_mean = 1.01 * (width + 2) * single * x.abs().mean(-1, keepdim=True) / deviation
    error = of_mean + 2 * single * normal.abs() + normal.abs() * (1.01 * (width + 8) * single + of_mean**2)
    bound = error * weight.abs() + 4 * single * (normal * weight).abs() + 2 * single * bias.double().abs()
    return bound + UNIT[torch.bfloat16] * (exact.abs() + bound) + 1e-30


def attention_bound(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, cap: float | None, q_error: float = 0
) -> tuple[Tensor, Tensor]:
    """Exact attention in float64, and the largest error of the kernels, both [B, L, N E].

    A score is off by the rounding of q and of a sum of E products; a cap does not increase that. If scores are off by `moved` at
    most, a weight is off by a factor of e^(2 moved). Weights and results are rounded to bfloat16, sums over slots to float32. The
    1e-5 is for the exponential, and the last term of `rounding` for its argument.

    Args:
        q, k, v, mask, scale, cap: as in modeling_gemma.attention.
        q_error: rounding of the queries, relative to their size.
    """
    half, single, shared = UNIT[torch.bfloat16], UNIT[torch.float32], q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(shared, 1), v.double().repeat_interleave(shared, 1)
    scores = scale * (q @ k.mT)  # [B, N, L, S]
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    weights = torch.softmax(scores if mask is None else scores.masked_fill(~mask, -torch.inf), -1)
    exact, absolute = weights @ v, weights @ v.abs()  # [B, N, L, E], [B, N, L, E]
    sizes = scale * (q.abs() @ k.abs().mT).amax(-1, keepdim=True)
    moved = (q_error + 1.01 * (q.shape[3] + 8) * single) * sizes
    rounding = 1.01 * half + 1e-5 + 1.01 * (k.shape[2] + 8) * single + 4 * single * sizes
    bound = (torch.expm1(2 * moved) + rounding) * (1 + half) * absolute + half * exact.abs() + 1e-30
    return exact.transpose(1, 2).flatten(2), bound.transpose(1, 2).flatten(2)


def attention_with_cache(length: int, cap: float | None) -> Iterator[Comparison]:
    """Attention of `length` new tokens in each of three rows, of two key heads: what is written to the cache, and the result."""
    rows, kv_heads, heads, e, s = 3, 2, 6, 64, 43
    slots = torch.tensor([s - 1, s - 6, length - 1])[:, None] + torch.arange(1 - length, 1)  # [B, L]
    mask = torch.arange(s) <= slots[:, None, :, None]  # [B, 1, L, S]
    qkv = draw(rows, length, (heads + 2 * kv_heads) * e)
    keys, values = draw(rows, kv_heads, s, e), draw(rows, kv_heads, s, e)
    rotation = rotary_embedding(slots + 1, e, 10_000, torch.bfloat16)
    q, k, v = qkv.view(rows, length, -1, e).transpose(1, 2).split((heads, kv_heads, kv_heads), dim=1)
    exact_keys, exact_values = keys.double(), values.double()
    for row in range(rows):
        exact_keys[row, :, slots[row]] = rotate(k.double(), *rotation)[row]
        exact_values[row, :, slots[row]] = v[row].double()
    if length == 1:
        name, found = "bf16_attend", kernels.bf16_attend(qkv, slots, rotation, mask, keys, values, s, e**-0.5, cap)
    else:
        cache = (slots, keys, values, s)
        name, found = "bf16_attend_many", kernels.bf16_attend_many(q, k, v, mask, e**-0.5, cap, rotation, cache)
    half = UNIT[torch.bfloat16]
    # Each of the two products that are added is rounded; 8 is more than any number here.
    yield Comparison(name, keys, exact_keys, half * exact_keys.abs() + 8 * UNIT[torch.float32])
    yield Comparison(name, values, exact_values, torch.full_like(exact_values, 1e-30))
    exact, bound = attention_bound(rotate(q.double(), *rotation), keys, values, mask, e**-0.5, cap, q_error=1.01 * half)
    yield Comparison(name, found, exact, bound)


def attention_of_patches() -> Comparison:
    """Attention without a cache, mask or rotation, with a width that is no multiple of 16."""
    q, k, v = draw(3, 2, 3, 70, 72)
    exact, bound = attention_bound(q, k, v, None, 72**-0.5, None)
    return Comparison("bf16_attend_many", kernels.bf16_attend_many(q, k, v, None, 72**-0.5, None), exact, bound)


def decoder(kind: str) -> Comparison:
    """Two layers for one new token in each of two rows, in one call, compared with the functions above, called one by one.

    Each way rounds eleven vectors per layer to bfloat16, one after another: norms, products, attention and sums. As a standard
    deviation, such a rounding is 2^-8 / sqrt(3) of a number, so two ways are sqrt(2 * 22) times that apart, 1.5 percent of the
    size of the numbers. With integer weights, the inputs of four products per layer are also rounded to 8 bits, by 0.6 percent
    of their size, which makes 2.8 percent. The bound is five standard deviations.
    """
    rows, heads, kv_heads, e, d, f, s, eps = 2, 4, 1, 64, 192, 384, 40, 1e-6
    scale, cap = e**-0.5, 30.0
    slots = torch.tensor([[s - 1], [s - 9]])
    mask = (torch.arange(s) <= slots)[:, None, None]  # [B, 1, 1, S]
    rotation = rotary_embedding(slots + 1, e, 10_000, torch.bfloat16)
    sizes = [(heads * e, d), (kv_heads * e, d), (kv_heads * e, d), (d, heads * e), (f, d), (f, d), (d, f)]
    layers = []
    for _ in range(2):
        q, k, v, output, gate, up, down = (random_matrix(kind, *size)[0]._replace(bias=None) for size in sizes)
        norms = [draw(d) * 0.1 for _ in range(4)]
        layers.append(kernels.DecoderLayer([q, k, v], [output], [gate, up], [down], norms, False))
    norm, start = draw(d) * 0.1, draw(rows, 1, d)
    keys, values = draw(2, rows, kv_heads, s, e), draw(2, rows, kv_heads, s, e)
    x, other_keys, other_values = start, keys.clone(), values.clone()
    for number, layer in enumerate(layers):
        first, second, third, fourth = layer.norms
        qkv = kernels.product(kind, kernels.bf16_rms_norm(x, first, eps), layer.qkv, x.dtype)
        y = kernels.bf16_attend(qkv, slots, rotation, mask, other_keys[number], other_values[number], s, scale, cap)
        x = x + kernels.bf16_rms_norm(kernels.product(kind, y, layer.output, x.dtype), second, eps)
        y = kernels.product(kind, kernels.bf16_rms_norm(x, third, eps), layer.gate_up, x.dtype, "gated")
        x = x + kernels.bf16_rms_norm(kernels.product(kind, y, layer.down, x.dtype), fourth, eps)
    expected = kernels.bf16_rms_norm(x, norm, eps).double()
    found = kernels.decode(
        kind, kernels.decoder_layers(layers), norm, eps, start, slots, rotation, mask, mask, keys, values, s, scale, cap
    )  # fmt: skip
    bound = 5 * (0.015 if kind == "bf16" else 0.028) * expected.square().mean(-1, keepdim=True).sqrt().expand_as(expected)
    return Comparison(f"{kind}_decode", found, expected, bound)


def logits() -> Iterator[Comparison]:
    x = torch.randn(3, 20_003) * 5
    exact = x.double().logsumexp(-1)
    yield Comparison("logits_argmax", kernels.reduce_logits("argmax", x), x.argmax(-1).double(), torch.full((3,), 1e-30))
    # The sum of the exponentials is off by a relative error, which its logarithm makes an absolute one; 1e-6 is for e^x.
    bound = 1.01 * (x.shape[1] + 8) * UNIT[torch.float32] + 1e-6 + 2 * UNIT[torch.float32] * exact.abs()
    yield Comparison("logits_logsumexp", kernels.reduce_logits("logsumexp", x), exact, bound)


def comparisons() -> Iterator[Comparison]:
    """Results of every function of kernels.library()."""
    for kind in ("bf16", *int_formats.KINDS):
        yield from products(kind)
    yield from transposed_products()
    yield from map(quantised, int_formats.KINDS)
    yield from norms_and_gate()
    yield from gradients()
    for length, cap in ((1, None), (1, 5.0), (21, None), (21, 5.0)):
        yield from attention_with_cache(length, cap)
    yield attention_of_patches()
    yield from map(decoder, ("bf16", *int_formats.KINDS))
    yield from logits()


@torch.no_grad()
def errors() -> dict[str, float]:
    """The largest error of each function of kernels.library(), as a multiple of its bound: up to 1 is right."""
    found: dict[str, float] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for each in comparisons():
            found[each.function] = max(found.get(each.function, 0.0), each.error())
    return found


def main(file: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    kernels.use(Path(file))
    wrong = [f"{name} ({error:.3g} times the largest error)" for name, error in errors().items() if error > 1]
    reason = f"wrong results: {', '.join(wrong)}" if wrong else None
    sys.stdout.write(json.dumps({"reason": reason, "choices": {} if reason else kernel_tuning.choices()}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
