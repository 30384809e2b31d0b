"""Do CPU and CUDA, and all variants on CUDA, give the same logits? Run it before the timed benchmarks; it measures no time.

It compares small random models of both families, in float32, bfloat16, int8 and int4, for a picture and a prompt:
    device      logits of the whole row, and eight generated tokens, compared with the CPU
    recorded    logits of a decoding step replayed from a CUDA graph, three rows of unequal length, compared with the plain step
    compiled    the same for a CUDA graph of the compiled step (torch.compile)
It also compares attention alone, with and without a mask:
    open, masked    the kernel that torch chooses, compared with plain matrix products and softmax
    ..., capped     flex_attention with soft-capped scores, compared with the same in plain operations
And it measures the memory of attention over 4096 tokens, which shows whether the full float32 score matrix is ever built. So the
script finds a kernel that is fast and wrong, and also a kernel that was never used. The exit code is 1 if anything is WRONG. With
--device cpu there are no graphs, and nothing is compiled, because that would take minutes.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # --help and wrong flags are answered before the slow imports
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="device to compare with the CPU (default: cuda)")
    options = parser.parse_args()

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.make_checkpoint import write_checkpoint
from benchmarks.sides import make_rows
from paligemma.checkpoints.weights import load_model
from paligemma.files import read_json
from paligemma.generation import generate
from paligemma.layers import graphs
from paligemma.layers.capped_attention import capped_attention, compiled_capped_attention
from paligemma.modeling_gemma import attention
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration

# Largest allowed distance of all logits, relative to their norm. Sums in a different order differ by about 1e-6 in float32 and by
# 4e-3 (rounding to 8 bits) in bfloat16. The quantised models round their activations on some devices and not on others.
BOUNDS = {("fp32", None): 1e-4, ("bf16", None): 2e-2, ("bf16", "int8"): 5e-2, ("bf16", "int4"): 5e-2}
CONTEXT, TOKENS, STEPS = 290, 8, 6
LONG = 4096  # image tokens at 896 px


def distance(ours: torch.Tensor, reference: torch.Tensor) -> float:
    ours, reference = ours.float().cpu(), reference.float().cpu()
    return ((ours - reference).norm() / reference.norm()).item()


@torch.no_grad()
def answers(model: torch.nn.Module, inputs: dict) -> tuple[torch.Tensor, list[int]]:
    """The logits of the prompt, float32[L, V], and the tokens of the greedy answer."""
    tokens = [int(token) for token in generate(model, inputs, max_new_tokens=TOKENS, eos_token_id=None)]
    return model(**inputs)[0].float().cpu(), tokens


@torch.no_grad()
def decode_steps(model: torch.nn.Module, inputs: dict, uses_graphs: bool = True) -> tuple[torch.Tensor, list[graphs.Step]]:
    """Logits float32[steps, B, V] of STEPS steps after the prefill of three rows; and the recorded or compiled steps."""
    # PaliGemmaForConditionalGeneration.new_cache makes an ordinary KV cache, with which no CUDA graph is used.
    model_class = type(model) if uses_graphs else PaliGemmaForConditionalGeneration
    cache = model_class.new_cache(model, 3, inputs["input_ids"].shape[1] + STEPS)
    model.prefill(cache, **inputs)
    logits = [model.decode(cache, torch.tensor([500, 501, 502]) + i).cpu() for i in range(STEPS)]
    return torch.stack(logits), list(cache.steps.steps.values()) if isinstance(cache, graphs.RecordedCache) else []


def compare_precisions(folder: Path, family: str, device: str) -> Iterator[dict]:
    """Compares one family in each precision (dtype or quantisation); yields one result per comparison.

    `is_as_intended` means: for "device", the tokens are the same; for "recorded" and "compiled", the graph was really used.
    """
    config = read_json(folder / "config.json")
    one, three = make_rows(config, 1, CONTEXT, 0), make_rows(config, 3, CONTEXT, 0)
    three["attention_mask"][1, -20:] = three["attention_mask"][2, -5:] = 0
    is_gpu = device.startswith("cuda")
    for (dtype, quantize), bound in BOUNDS.items():
        about = {"family": family, "form": quantize or dtype, "bound": bound}
        expected, tokens = answers(load_model(folder, dtype=dtype, quantize=quantize), one)
        model = load_model(folder, device=device, dtype=dtype, quantize=quantize)
        found, tokens_there = answers(model, one)
        yield about | {"way": "device", "distance": distance(found, expected), "is_as_intended": tokens == tokens_there}
        plain, _ = decode_steps(model, three, uses_graphs=False)
        is_compiled_here = is_gpu and (dtype, quantize) in (("bf16", None), ("bf16", "int4"))  # each takes 15 seconds
        for way, mode in (("recorded", "record"), *([("compiled", "compile")] if is_compiled_here else [])):
            model = graphs.use_graphs(model, mode)
            found, steps = decode_steps(model, three)
            is_recorded = all(step.recording is not None for step in steps) or not is_gpu
            is_compiled = all((step.function is graphs.compiled_step()) for step in steps) or way == "recorded"
            yield about | {"way": way, "distance": distance(found, plain), "is_as_intended": is_recorded and is_compiled}


def make_heads(device: str, dtype: torch.dtype, length: int, key_heads: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k, v of two rows with eight query heads of Gemma's width; and a mask that makes the second row a quarter shorter."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 8, length, 256), (2, key_heads, length, 256), (2, key_heads, length, 256)]
    heads = [torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes]
    mask = torch.ones(2, 1, length, length, dtype=torch.bool, device=device)
    mask[1, :, :, length * 3 // 4 :] = False
    return heads, mask


@torch.no_grad()
def compare_attention(device: str) -> Iterator[dict]:
    is_gpu = device.startswith("cuda")
    capped = compiled_capped_attention() if is_gpu else capped_attention
    for precision, dtype, bound in (("fp32", torch.float32, 1e-4), ("bf16", torch.bfloat16, 2e-2)):
        for key_heads in (1, 4):
            heads, ragged = make_heads(device, dtype, 1100 if is_gpu else 40, key_heads)
            for mask, name in ((None, "open"), (ragged, "masked")):
                about = {"family": f"{key_heads} key heads", "form": precision, "bound": bound, "is_as_intended": True}
                chosen = attention(*heads, mask, 1 / 16, None)
                with sdpa_kernel(SDPBackend.MATH):
                    plain = attention(*heads, mask, 1 / 16, None)
                yield about | {"way": name, "distance": distance(chosen, plain)}
                expected = attention(*heads, mask, 1 / 16, 50.0)
                yield about | {"way": f"{name}, capped", "distance": distance(capped(*heads, mask, 1 / 16, 50.0), expected)}


@torch.no_grad()
def measure_memory(device: str) -> Iterator[dict]:
    """Peak memory of attention over one long row, without its inputs, as a share of one float32 score matrix [L, L]."""
    for name, key_heads, cap in (("open", 1, None), ("masked", 1, None), ("masked, capped", 4, 50.0)):
        heads, mask = make_heads(device, torch.bfloat16, LONG, key_heads)
        heads, mask = [head[:1].clone() for head in heads], mask[1:].clone() if name.startswith("masked") else None
        run = compiled_capped_attention() if cap else attention
        arguments = (*heads, mask, 1 / 16, cap)
        run(*arguments)  # the first call may compile, and the memory for compiling must not count
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run(*arguments)
        share = (torch.cuda.max_memory_allocated(device) - before) / (4 * LONG * LONG)
        yield {"family": "4096 tokens", "form": "bf16", "way": name, "distance": share, "bound": 1.0, "is_as_intended": True}


def main(options: argparse.Namespace) -> None:
    device = options.device
    torch.backends.cuda.matmul.allow_tf32 = False  # the default, set explicitly: float32 must not mean TF32
    rows = []

    def note(row: dict) -> None:
        row["is_fine"] = row["distance"] <= row["bound"] and row["is_as_intended"]
        rows.append(row)
        line = f"{row['family']:14}{row['form']:6}{row['way']:16}{row['distance']:12.2e} of {row['bound']:.0e}"
        print(f"{line}   {'fine' if row['is_fine'] else 'WRONG'}", flush=True)

    for row in compare_attention(device):
        note(row)
    with tempfile.TemporaryDirectory() as folder:
        for family in ("paligemma", "paligemma2"):
            path = Path(folder) / family
            write_checkpoint(path, family=family, size="tiny")
            for row in compare_precisions(path, family, device):
                note(row)
    if device.startswith("cuda"):
        for row in measure_memory(device):
            note(row)
    print(json.dumps({"script": "agree", "device": device, "rows": rows}))
    sys.exit(0 if all(row["is_fine"] for row in rows) else 1)


if __name__ == "__main__":
    main(options)
