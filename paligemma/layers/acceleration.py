"""Puts the faster modules for a CPU, of fast_cpu.py, fast_decoder.py and fast_tower.py, into a model.

Checked in tests/layers/test_quantization.py and test_fast_tower.py.
"""

import torch
from torch import nn

from paligemma.layers.fast_cpu import FastAttention, FastEmbedding, FastLinear, FastMLP, FastRMSNorm
from paligemma.layers.fast_decoder import FastDecoder
from paligemma.layers.fast_tower import FastLayerNorm, FastSiglipAttention, FastSiglipEmbeddings, FastSiglipMLP
from paligemma.layers.replacing import extended
from paligemma.modeling_gemma import GemmaAttention, GemmaEmbedding, GemmaMLP, GemmaModel, GemmaRMSNorm
from paligemma.modeling_siglip import SiglipAttention, SiglipMLP, SiglipVisionEmbeddings

MIN_PARAMETERS = 2**24  # smaller models fit into the processor's cache, and compiling would only delay their first start
FAST_IN_BF16: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FastLinear, GemmaEmbedding: FastEmbedding, GemmaRMSNorm: FastRMSNorm, nn.LayerNorm: FastLayerNorm,
}  # fmt: skip
# Used for quantised models, too: these modules compute products with the same input in one call.
FAST_IN_ANY_DTYPE: dict[type[nn.Module], type[nn.Module]] = {
    GemmaAttention: FastAttention, GemmaMLP: FastMLP, GemmaModel: FastDecoder,
    SiglipAttention: FastSiglipAttention, SiglipMLP: FastSiglipMLP, SiglipVisionEmbeddings: FastSiglipEmbeddings,
}  # fmt: skip


def accelerate(model: nn.Module, min_parameters: int = MIN_PARAMETERS) -> None:
    """Replaces modules of a CPU model by their faster versions. Parameters are shared, and their names do not change.

    Modules are matched by their exact class: a subclass, such as LoRALinear, computes something else. Norms, matrices and the
    embedding are replaced if their weight is bfloat16. Models with fewer than min_parameters parameters are not changed.
    """
    if sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers())) < min_parameters:
        return
    for name, module in list(model.named_modules()):
        fast = FAST_IN_ANY_DTYPE.get(type(module))
        if fast is None and type(module) in FAST_IN_BF16 and module.weight.dtype == torch.bfloat16:
            fast = FAST_IN_BF16[type(module)]
        if fast is not None:
            model.set_submodule(name, extended(module, fast))
