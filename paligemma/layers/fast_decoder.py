"""The decoder on a CPU: if each row has one new token, all layers in one kernel call. `acceleration.accelerate` uses it.

With one call per product, the threads wait between two products for Python and for small operators of torch.

Checked in tests/layers/test_quantization.py. Shapes: as in modeling_gemma.py.
"""

import operator

import torch
from torch import Tensor, nn

from paligemma.layers import fast_cpu, kernels
from paligemma.layers.fast_cpu import FastAttention, FastLinear, FastMLP, FastRMSNorm
from paligemma.layers.int_formats import GROUP
from paligemma.layers.quantization import QuantizedLinear
from paligemma.modeling_gemma import GemmaDecoderLayer, GemmaModel, KVCache, rotary_embedding

# With more rows, Python takes a small part of a step, and products called one by one use the kernels for many rows. A step of 16
# rows of a 3B model on two EPYC cores takes 340 ms in one call and 400 ms in one call per product (bf16), 147 and 156 ms (int8).
MAX_ROWS = 16


def is_plain_bf16(weight: Tensor) -> bool:
    return weight.dtype is torch.bfloat16 and weight.is_cpu and weight.is_contiguous()


def has_fast_norm(norm: nn.Module) -> bool:
    return type(norm) is FastRMSNorm and is_plain_bf16(norm.weight)


def kernel_matrices(*modules: nn.Module) -> tuple[str, list[kernels.Matrix]] | None:
    """The kind and the weights of modules, as kernels.decode takes them; None if they are of another class or have a bias."""
    kinds, matrices = set(), []
    for module in modules:
        if module.bias is not None:
            return None
        if type(module) is FastLinear and is_plain_bf16(module.weight) and module.in_features % 32 == 0:
            kinds.add("bf16")
            matrices.append(kernels.Matrix(module.weight, None, module.out_features))
        elif type(module) is QuantizedLinear and module.is_tiled and module.in_features % GROUP[module.kind] == 0:
            kinds.add(module.kind)
            matrices.append(kernels.Matrix(module.packed, module.scales, module.out_features))
        else:
            return None
    return (kinds.pop(), matrices) if len(kinds) == 1 else None


def kernel_layer(number: int, layer: nn.Module) -> tuple[str, kernels.DecoderLayer] | None:
    """The kind and the weights of a layer for kernels.decode; None if its modules compute something else.

    `number` counts the layers from 0; a layer that uses the cache of another one, because layers were removed, gives None.
    """
    if type(layer) is not GemmaDecoderLayer or type(layer.self_attn) is not FastAttention or type(layer.mlp) is not FastMLP:
        return None
    attention, mlp = layer.self_attn, layer.mlp
    if attention.layer != number:
        return None
    norms = [layer.input_layernorm, None, layer.post_attention_layernorm, None]
    if layer.is_gemma2:
        names = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
        norms = [getattr(layer, name) for name in names]
    matrices = kernel_matrices(
        attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
    )
    if matrices is None or not all(norm is None or has_fast_norm(norm) for norm in norms):
        return None
    kind, (q, k, v, output, gate, up, down) = matrices
    weights = [None if norm is None else norm.weight for norm in norms]
    return kind, kernels.DecoderLayer([q, k, v], [output], [gate, up], [down], weights, attention.layer % 2 == 0)


def max_rows(kind: str) -> float:
    """The largest number of rows for which one call is faster than one call per product."""
    if kernels.load()[0].name == "amx":
        return MAX_ROWS - 1  # tiles.h multiplies 16 rows and more
    return min(MAX_ROWS, fast_cpu.bf16_rows()) if kind == "bf16" else MAX_ROWS


class KernelLayers:
    """The layers of a decoder for kernels.decode, or the knowledge that the kernel cannot compute them.

    They hold addresses of weights. Collecting these takes a millisecond, so it is done once, and each step only checks with
    `is_current` that no module, weight or address has changed since. If modules have hooks, which a kernel would not call, the
    modules compute the step.
    """

    def __init__(self, decoder: nn.Module):
        modules = list(decoder.modules())
        self.tables = [table for module in modules for table in (module._modules, module._parameters, module._buffers)]
        self.hooks = [table for module in modules[1:] for table in (module._forward_pre_hooks, module._forward_hooks)]
        entries = ((table, *entry) for table in self.tables for entry in table.items())
        self.owners, self.names, self.values = zip(*entries, strict=True)
        self.tensors = [value for value in self.values if isinstance(value, Tensor)]
        self.addresses = [tensor.data_ptr() for tensor in self.tensors]
        layers = [kernel_layer(*numbered) for numbered in enumerate(decoder.layers)]
        self.kind, self.has_hooks = None, any(self.hooks)
        if not self.has_hooks and has_fast_norm(decoder.norm) and None not in layers and len({kind for kind, _ in layers}) == 1:
            self.kind = layers[0][0]
            self.layers = kernels.decoder_layers([layer for _, layer in layers])

    def is_current(self) -> bool:
        if any(self.hooks) is not self.has_hooks or sum(map(len, self.tables)) != len(self.names):
            return False
        if not all(map(operator.is_, map(dict.get, self.owners, self.names), self.values)):
            return False
        return all(map(operator.eq, map(Tensor.data_ptr, self.tensors), self.addresses))


class FastDecoder(GemmaModel):
    """GemmaModel in one kernel call if each row has one new token, so that the threads do not wait for Python between layers."""

    kernel: KernelLayers | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"kernel": None}  # a copy has its weights at other addresses

    def suits_kernel(self, x: Tensor, cache: KVCache | None) -> bool:
        if cache is None or x.shape[1] != 1 or not x.is_cpu or kernels.library() is None or torch.compiler.is_compiling():
            return False
        if not (x.dtype is cache.keys.dtype is torch.bfloat16) or x.shape[-1] % 16 or self.config.head_dim % 32:
            return False
        if torch.is_grad_enabled() and (x.requires_grad or any(parameter.requires_grad for parameter in self.parameters())):
            return False
        if self.kernel is None or not self.kernel.is_current():
            self.kernel = KernelLayers(self)
        return self.kernel.kind is not None and len(x) <= max_rows(self.kernel.kind)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        window_mask: Tensor | None = None,
    ) -> Tensor:
        if not self.suits_kernel(inputs_embeds, cache):
            return super().forward(inputs_embeds, position_ids, mask, cache, window_mask)
        config, attention = self.config, self.layers[0].self_attn
        rotation = rotary_embedding(position_ids, config.head_dim, config.rope_theta, inputs_embeds.dtype)
        return kernels.decode(
            self.kernel.kind, self.kernel.layers, self.norm.weight, self.norm.eps, inputs_embeds, position_ids - 1, rotation,
            mask, mask if window_mask is None else window_mask, cache.keys, cache.values, cache.slots_read, attention.scale,
            attention.cap,
        )  # fmt: skip
