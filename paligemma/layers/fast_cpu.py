"""Modules of the decoder that compute faster on a CPU in bfloat16 or with quantised weights.

`acceleration.accelerate` puts them into a model. Each class replaces a module of modeling_gemma.py or nn.Linear, keeps the
parameters under the same names, and overrides only the method that computes the output. cpp/ is used if it was compiled and is
faster than torch. For bfloat16 weights, `suits_kernel` and `product` choose the operator; the choice follows measurements with
benchmarks/products.py.

Checked in tests/layers/test_quantization.py. Shapes: as in modeling_gemma.py, and O outputs, X inputs of one matrix.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from paligemma.layers import kernels
from paligemma.layers.instruction_sets import bf16_instructions
from paligemma.layers.int_formats import CHUNK_WEIGHTS, GROUP, KERNEL_DTYPES
from paligemma.layers.quantization import QuantizedLinear
from paligemma.modeling_gemma import GemmaAttention, GemmaEmbedding, GemmaMLP, GemmaRMSNorm, KVCache

# The largest number of rows of x for which our bfloat16 product is faster than torch's. The keys are the processor's bfloat16
# instructions, see instruction_sets.py. What was measured on this machine takes precedence, see kernel_tuning.py.
BF16_ROWS = {"matrices": 4, "pairs": math.inf, "nothing": math.inf}


def bf16_rows() -> float:
    """The largest number of rows for which our bfloat16 product is faster than torch's, or is wanted because AMX was named."""
    loaded = kernels.load()[0]
    return math.inf if loaded.name == "amx" else loaded.choices.get("bf16_rows", BF16_ROWS[bf16_instructions()])


# Products in bfloat16


def upcast_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T computed in float32, with a few MB of the weight converted at a time. Used if there is no compiler."""
    rows = x.flatten(0, -2).float()
    y = x.new_empty(len(rows), len(weight))
    step = max(1, CHUNK_WEIGHTS // weight.shape[1])
    for start in range(0, len(weight), step):
        y[:, start : start + step] = rows @ weight[start : start + step].float().T
    return y.view(*x.shape[:-1], -1)


def is_bf16(x: Tensor, y: Tensor) -> bool:
    """Whether both tensors are bfloat16 on the CPU.

    False while torch.compile traces the caller, and if autocast would compute in another dtype.
    """
    return (
        x.dtype is y.dtype is torch.bfloat16 and x.is_cpu and y.is_cpu and not torch.compiler.is_compiling()
        and not (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is not torch.bfloat16)
    )  # fmt: skip


def needs_gradient(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def is_bf16_without_gradient(x: Tensor, weight: Tensor) -> bool:
    """Whether is_bf16, and neither x nor the weight needs a gradient."""
    return is_bf16(x, weight) and not needs_gradient(x) and not needs_gradient(weight)


def suits_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether our bfloat16 product can compute x @ weight.T, and is faster than torch's. Assumes is_bf16."""
    inputs = weight.shape[1]
    if inputs % 2 or not weight.is_contiguous() or kernels.library() is None:
        return False
    return 0 < x.numel() <= bf16_rows() * inputs


class FrozenProduct(torch.autograd.Function):
    """x @ weight.T + bias in our kernel, with a gradient for x only, which is one product, too.

    That product is torch's where the processor has bfloat16 instructions, because there it takes as long as ours. Elsewhere ours
    is 2.6 times as fast with AVX512, and with AVX2 far more, because torch then multiplies number by number.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return kernels.product("bf16", x, [(weight, None, len(weight), bias)], torch.bfloat16)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        if bf16_instructions() != "nothing" or len(weight) % 2:  # our kernel needs pairs
            return dy @ weight, None, None
        return kernels.product("bf16", dy, [(weight, None, weight.shape[1])], dy.dtype, is_transposed=True), None, None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, by the operator that is fastest for this processor, dtype and number of rows.

    Times in ms for a weight [16384, 2048]:
        rows of x                                          1     4    16    64   266
        two EPYC cores, without their bfloat16 instructions
            F.linear                                     2.1    16    26    71   253
            kernels.product                              1.6   2.7   9.4    23    86
            upcast_product                                24    38    47    64   136
        two EPYC cores, dot products of pairs
            F.linear                                     3.9   5.1   5.3    13    44
            kernels.product                              1.6   3.6   4.2    12    42
    """
    if all(is_bf16(x, each) and not needs_gradient(each) for each in (weight, bias) if each is not None):
        if suits_kernel(x, weight):
            return FrozenProduct.apply(x, weight, bias)
        is_slow = bf16_instructions() == "nothing" and x.numel() >= 8 * weight.shape[1] and weight.is_contiguous()
        if is_slow and not needs_gradient(x):
            y = upcast_product(x, weight)
            return y if bias is None else y + bias
    return F.linear(x, weight, bias)


# Modules


class FastLinear(nn.Linear):
    """nn.Linear whose product is chosen by `product`."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


class FastEmbedding(GemmaEmbedding):
    """GemmaEmbedding with faster logits. If x has few rows, our kernel computes them in float32, without rounding to bfloat16."""

    def logits(self, x: Tensor) -> Tensor:
        w = self.weight
        if is_bf16_without_gradient(x, w) and suits_kernel(x, w):
            return kernels.product("bf16", x, [(w, None, len(w))], torch.float32)
        return product(x, w)


class FrozenRMSNorm(torch.autograd.Function):
    """kernels.bf16_rms_norm with a gradient for x. It keeps x for the backward pass; torch would keep float32 copies of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return kernels.bf16_rms_norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        return kernels.bf16_rms_norm_backward(dy, x, weight, ctx.eps), None, None


class FastRMSNorm(GemmaRMSNorm):
    """GemmaRMSNorm in one kernel call instead of ten small operations; the same for its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if w.numel() % 16 == 0 and is_bf16(x, w) and not needs_gradient(w) and kernels.library() is not None:
            return FrozenRMSNorm.apply(x, w, self.eps)
        return super().forward(x)


def joint_product(x: Tensor, modules: tuple[nn.Module, ...], activation: str = "none") -> Tensor | None:
    """Outputs of several modules with the same input, computed in one call of kernels.product; None if that is not possible."""
    first = modules[0]
    if any(type(module) is not type(first) for module in modules):
        return None
    biases = [module.bias for module in modules if module.bias is not None]
    if not all(is_bf16_without_gradient(bias, bias) for bias in biases):
        return None
    if type(first) is FastLinear:
        weights = [module.weight for module in modules]
        if all(is_bf16_without_gradient(x, w) and suits_kernel(x, w) for w in weights):
            matrices = [(module.weight, None, module.out_features, module.bias) for module in modules]
            return kernels.product("bf16", x, matrices, torch.bfloat16, activation)
    if type(first) is QuantizedLinear and x.is_cpu and x.dtype in KERNEL_DTYPES and x.shape[-1] % GROUP[first.kind] == 0:
        if all(module.is_tiled and module.kind == first.kind for module in modules) and kernels.library() is not None:
            matrices = [(module.packed, module.scales, module.out_features, module.bias) for module in modules]
            return kernels.product(first.kind, x, matrices, x.dtype, activation)
    return None


# Attention of many tokens


def suits_kernel_attention(x: Tensor, modules: tuple[nn.Module, ...]) -> bool:
    """Whether our attention of many tokens can be used for the outputs of `modules`, and is faster than torch's.

    False if gradients are needed, and for modules of other classes, such as LoRALinear, which decide that for themselves.
    Times in ms on two EPYC cores with dot products of pairs; torch's function is F.scaled_dot_product_attention:
        tokens x heads x width of a head      256 x 16 x 72   4096 x 16 x 72   266 x 8 x 256   1040 x 8 x 256
            torch                                       2.7              495             4.3               50
            kernels.bf16_attend_many                    1.5              230             1.9               24
    """
    if kernels.library() is None or not is_bf16_without_gradient(x, x):
        return False
    if not kernels.load()[0].choices.get("attention", bf16_instructions() != "matrices"):
        return False
    return all(
        type(module) is QuantizedLinear
        or (type(module) is FastLinear and all(is_bf16_without_gradient(x, tensor) for tensor in module.parameters()))
        for module in modules
    )


def project_heads(x: Tensor, modules: tuple[nn.Module, ...], width: int) -> list[Tensor]:
    """The outputs of q_proj, k_proj and v_proj, in one product if possible, each as heads of this width: [B, N or K, L, E]."""
    joint = joint_product(x, modules)
    parts = [module(x) for module in modules] if joint is None else joint.split([module.out_features for module in modules], -1)
    return [part.unflatten(-1, (-1, width)).transpose(1, 2) for part in parts]


class Gate(torch.autograd.Function):
    """gelu(gate) * up in one kernel call, and its gradients in another. gelu(gate) is computed twice, but not kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return kernels.bf16_gate(gate, up, torch.empty_like(gate))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return kernels.bf16_gate_backward(dy, gate, up)


class FastMLP(GemmaMLP):
    """GemmaMLP with its first two products and gelu(gate) * up in one kernel call.

    If the products are not our kernel's, or gradients are needed, a kernel computes only gelu(gate) * up.
    """

    def forward(self, x: Tensor) -> Tensor:
        gated = joint_product(x, (self.gate_proj, self.up_proj), activation="gated")  # [B, L, F]
        if gated is None:
            gate, up = self.gate_proj(x), self.up_proj(x)  # [B, L, F], [B, L, F]
            if gate.numel() % 16 or kernels.library() is None or not is_bf16(gate, up):
                return self.down_proj(F.gelu(gate, approximate="tanh") * up)
            gated = Gate.apply(gate, up) if torch.is_grad_enabled() else kernels.bf16_gate(gate, up, gate)
        return self.down_proj(gated)


class FastAttention(GemmaAttention):
    """GemmaAttention in three kernel calls: for q, k and v; for RoPE, cache and attention; and for the output."""

    def forward(
        self, x: Tensor, slots: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        if cache is None or x.dtype is not torch.bfloat16 or cache.keys.dtype is not torch.bfloat16 or self.width % 32:
            return super().forward(x, slots, rotation, mask, cache)
        matrices, keys, values = (self.q_proj, self.k_proj, self.v_proj), cache.keys[self.layer], cache.values[self.layer]
        slots_read = cache.slots_read
        if x.shape[1] == 1:
            qkv = joint_product(x, matrices)  # [B, 1, (N + 2 K) E]
            if qkv is None:
                return super().forward(x, slots, rotation, mask, cache)
            x = kernels.bf16_attend(qkv, slots, rotation, mask, keys, values, slots_read, self.scale, self.cap)  # [B, 1, N*E]
        elif suits_kernel_attention(x, matrices):
            q, k, v = project_heads(x, matrices, self.width)  # [B, N, L, E], [B, K, L, E], [B, K, L, E]
            stored = (slots, keys, values, slots_read)
            x = kernels.bf16_attend_many(q, k, v, mask, self.scale, self.cap, rotation, stored)  # [B, L, N*E]
        else:
            return super().forward(x, slots, rotation, mask, cache)
        return self.o_proj(x)
