"""Do CPU and CUDA, and all variants on CUDA, give the same logits? Run it before the timed benchmarks; it measures no time.

It compares small random models of both families, in float32, bfloat16, int8 and int4, for a picture and a prompt:
    device      logits of the whole row, and eight generated tokens, compared with the CPU
    recorded    logits of a decoding step replayed from a CUDA graph, three rows of unequal length, compared with the plain step
    compiled    the same for a CUDA graph of the compiled step (torch.compile)
It also compares attention alone, with and without a mask:
    open, masked    the kernel that torch chooses, compared with plain matrix products and softmax
    ..., capped     flex_attention with soft-capped scores, compared with the same in plain operations
And it measures the memory of attention over 4096 tokens, which shows whether the full float32 score matrix is ever built. So the
script finds a kernel that is fast and wrong, and also a kernel that was never used. The exit code is 1 if anything is WRONG; a
comparison that raises an exception counts as WRONG. With --device cpu there are no graphs, and nothing is compiled, because that
would take minutes.
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
    parser.add_argument("--out", type=Path, help="append each result, as soon as it is known, to this file as a line of JSON")
    options = parser.parse_args()

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.make_checkpoint import write_checkpoint
from benchmarks.sides import make_rows
from paligemma.checkpoints.weights import load_model
from paligemma.files import read_json
from paligemma.generation import generate
from paligemma.gpu import graphs
from paligemma.gpu.capped_attention import capped_attention, compiled_capped_attention, kernel_options
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


def three_rows(folder: Path) -> dict:
    """Three rows of unequal length, padded on the right."""
    rows = make_rows(read_json(folder / "config.json"), 3, CONTEXT, 0)
    rows["attention_mask"][1, -20:] = rows["attention_mask"][2, -5:] = 0
    return rows


def compare_steps(model: torch.nn.Module, mode: str, rows: dict, about: dict) -> dict:
    """Compares recorded or compiled decoding steps with plain ones. `is_as_intended`: the graph was really used."""
    plain, _ = decode_steps(model, rows, uses_graphs=False)
    model = graphs.use_graphs(model, mode)
    found, steps = decode_steps(model, rows)
    is_used = model.device.type != "cuda" or all(step.recording is not None for step in steps)
    if mode == "compile":
        is_used = is_used and all(step.function is graphs.compiled_step() for step in steps)
    return about | {"distance": distance(found, plain), "is_as_intended": is_used}


def compare_precisions(folder: Path, family: str, device: str) -> Iterator[dict]:
    """Compares one family in each precision (dtype or quantisation); yields one result per comparison.

    `is_as_intended` means: for "device", the tokens are the same; for "recorded", see compare_steps.
    """
    one, three = make_rows(read_json(folder / "config.json"), 1, CONTEXT, 0), three_rows(folder)
    for (dtype, quantize), bound in BOUNDS.items():
        about = {"family": family, "form": quantize or dtype, "bound": bound}
        expected, tokens = answers(load_model(folder, dtype=dtype, quantize=quantize), one)
        model = load_model(folder, device=device, dtype=dtype, quantize=quantize)
        found, tokens_there = answers(model, one)
        yield about | {"way": "device", "distance": distance(found, expected), "is_as_intended": tokens == tokens_there}
        yield compare_steps(model, "record", three, about | {"way": "recorded"})


def compare_compiled(folder: Path, family: str, device: str) -> Iterator[dict]:
    """Compares the compiled step of one family in bfloat16, which takes a quarter of a minute or more."""
    about = {"family": family, "form": "bf16", "bound": BOUNDS["bf16", None], "way": "compiled"}
    yield compare_steps(load_model(folder, device=device, dtype="bf16", graphs="off"), "compile", three_rows(folder), about)


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
    options = kernel_options(torch.device(device), torch.bfloat16, 256) if is_gpu else None
    for precision, dtype, bound in (("fp32", torch.float32, 1e-4), ("bf16", torch.bfloat16, 2e-2)):
        for key_heads in (1, 4):
            heads, ragged = make_heads(device, dtype, 1100 if is_gpu else 40, key_heads)
            for mask, name in ((None, "open"), (ragged, "masked")):
                about = {"family": f"{key_heads} key heads", "form": precision, "bound": bound, "is_as_intended": True}
                chosen = attention(*heads, mask, 1 / 16, None)
                with sdpa_kernel(SDPBackend.MATH):
                    plain = attention(*heads, mask, 1 / 16, None)
                yield about | {"way": name, "distance": distance(chosen, plain)}
                if is_gpu and (key_heads == 1 or dtype == torch.float32 or options is None):
                    continue  # each form takes seconds to compile; PaliGemma 2, which has the cap, has four key heads
                expected = attention(*heads, mask, 1 / 16, 50.0)
                found = capped(*heads, mask, 1 / 16, 50.0, options)
                yield about | {"way": f"{name}, capped", "distance": distance(found, expected)}


@torch.no_grad()
def measure_memory(device: str) -> Iterator[dict]:
    """Peak memory of attention over one long row, without its inputs, as a share of one float32 score matrix [L, L]."""
    options = kernel_options(torch.device(device), torch.bfloat16, 256)
    for name, key_heads, cap in (("open", 1, None), ("masked", 1, None), ("masked, capped", 4, 50.0)):
        if cap and options is None:  # not used on this card
            continue
        heads, mask = make_heads(device, torch.bfloat16, LONG, key_heads)
        heads, mask = [head[:1].clone() for head in heads], mask[1:].clone() if name.startswith("masked") else None
        run = compiled_capped_attention() if cap else attention
        arguments = (*heads, mask, 1 / 16, cap, *([options] if cap else []))
        run(*arguments)  # the first call may compile, and the memory for compiling must not count
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run(*arguments)
        share = (torch.cuda.max_memory_allocated(device) - before) / (4 * LONG * LONG)
        yield {"family": "4096 tokens", "form": "bf16", "way": name, "distance": share, "bound": 1.0, "is_as_intended": True}


def attempts(about: str, rows: Iterator[dict]) -> Iterator[dict]:
    """The results, with one that is WRONG in place of an exception. The comparisons after it in `rows` are left out."""
    try:
        yield from rows
    except Exception as error:  # noqa: BLE001  (compilers and drivers raise exceptions of any class)
        text = str(error).strip().splitlines() or [""]
        way = f"{type(error).__name__}: {text[0]}"
        yield {"family": about, "form": "", "way": way, "distance": 1.0, "bound": 0.0, "is_as_intended": False}


def all_rows(device: str, folder: Path) -> Iterator[dict]:
    """All results, the quickest and most important first."""
    paths = {family: folder / family for family in ("paligemma", "paligemma2")}
    for family, path in paths.items():
        write_checkpoint(path, family=family, size="tiny")
        yield from attempts(family, compare_precisions(path, family, device))
    yield from attempts("attention", compare_attention(device))
    if device.startswith("cuda"):
        yield from attempts("memory", measure_memory(device))
        for family, path in paths.items():
            yield from attempts(family, compare_compiled(path, family, device))


def main(options: argparse.Namespace) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 must not mean TF32
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in a model that was loaded
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in all_rows(options.device, Path(folder)):
            row["is_fine"] = row["distance"] <= row["bound"] and row["is_as_intended"]
            rows.append(row)
            line = f"{row['family']:14}{row['form']:6}{row['way']:16}{row['distance']:12.2e} of {row['bound']:.0e}"
            print(f"{line}   {'fine' if row['is_fine'] else 'WRONG'}", flush=True)
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"script": "agree"} | row) + "\n")
    print(json.dumps({"script": "agree", "device": options.device, "rows": rows}))
    sys.exit(0 if all(row["is_fine"] for row in rows) else 1)


if __name__ == "__main__":
    main(options)
