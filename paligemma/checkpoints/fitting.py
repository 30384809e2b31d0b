"""Before any weight is loaded: how many bytes each module of a model will take, and in which dtype the model fits its devices.

Checked in tests/gpu/test_loading.py and tests/checkpoints/test_weights.py.
"""

import logging
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from paligemma.checkpoints.safetensors_files import DTYPES
from paligemma.configuration import PaliGemmaConfig
from paligemma.devices import dtypes_to_try, profile
from paligemma.gpu import packed_products
from paligemma.layers import quantization
from paligemma.machine import GIB, free_memory

log = logging.getLogger(__name__)

TEXT_TOKENS = 256  # tokens of prompt and answer for which a GPU must have room
# Bytes for what libraries allocate on a GPU: the workspace of cuBLAS (up to 32 MiB), the memory of CUDA graphs, gaps between
# tensors. This is an estimate: it has not been measured.
WORKSPACE = 2**28


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module itself, without those of its submodules."""
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))


def run_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor in the loaded model: `dtype` for parameters; buffers (quantised weights) keep their own dtype."""
    return dtype if isinstance(tensor, nn.Parameter) else tensor.dtype


def module_bytes(
    model: nn.Module, quantised: dict[str, nn.Module], dtype: torch.dtype, on_gpu: bool = False
) -> dict[str, int]:
    """Bytes of each module of the loaded model, without those of its submodules, by name.

    Args:
        quantised: modules that will replace those of the same name.
        on_gpu: whether the model will be on a GPU.
    """
    bytes_of = {}
    for name, module in model.named_modules():
        module = quantised.get(name, module)
        bytes_of[name] = sum(tensor.numel() * run_dtype(tensor, dtype).itemsize for tensor in own_tensors(module).values())
        if on_gpu and isinstance(module, quantization.QuantizedLinear):
            bytes_of[name] += module.more_bytes_on_gpu
    return bytes_of


def room_to_answer(config: PaliGemmaConfig, quantised: Collection[nn.Module], dtype: torch.dtype) -> int:
    """Bytes that a GPU needs besides the weights in order to answer one request: KV cache, intermediate results, workspace."""
    text, tokens = config.text_config, config.num_image_tokens + TEXT_TOKENS
    cache = 2 * tokens * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * dtype.itemsize
    mlp = 3 * tokens * text.intermediate_size * dtype.itemsize  # gate, up and their product
    blocks = packed_products.BLOCK_BYTES if quantised else 0
    logits = 3 * text.vocab_size * 4  # in float32, with two intermediate results of the same size
    return cache + mlp + logits + blocks + WORKSPACE


def choose_dtype(
    wanted: torch.dtype | None,
    stored: torch.dtype,
    devices: Sequence[torch.device],
    need: Callable[[torch.dtype], int],
) -> torch.dtype:
    """The dtype that a model is loaded in, which is logged with the reason.

    Args:
        wanted: what the user asked for; None = the first of dtypes_to_try that fits into the memory. If none fits, the smallest
            is taken, because the model may still be divided among several cards.
        need: the bytes that the model needs in a dtype.
    """
    used, short_names = profile(devices[0]), {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES.values()}
    dtypes = dtypes_to_try(devices[0], stored) if wanted is None else (wanted,)
    free = sum(free_memory(device) or 0 for device in devices)
    chosen = dtypes[0] if len(dtypes) == 1 else next((dtype for dtype in dtypes if need(dtype) <= free), min(dtypes, key=need))
    if wanted is not None:
        why = "as asked for"
    elif chosen == stored:
        why = "as stored"
    elif chosen == dtypes[0]:
        why = f"stored as {short_names[stored]}, which this device does not compute fast"
    else:
        why = f"{short_names[dtypes[0]]} needs {need(dtypes[0]) / GIB:.2f} GiB, and {free / GIB:.2f} GiB are free"
    log.info("the model computes in %s (%s) on %s.", short_names[chosen], why, used.name)
    if devices[0].type != "cpu":
        log.info("%s", used.summary)
    return chosen
