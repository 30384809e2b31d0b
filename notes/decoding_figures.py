"""Draws the figures of decoding.md and prints its numbers: `python notes/decoding_figures.py`. A minute on two cores.

roofline.svg  measured here and now: one matrix product of the decoder, 16384 x 2048, for more and more rows at a time
steps.svg     from benchmarks/results/decode.json: milliseconds for one token of a whole model, beside the floor
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import machine  # noqa: E402  (the project's folder comes first)

machine.use_cores()

import torch  # noqa: E402  (after the number of threads is set)
from torch import Tensor, nn  # noqa: E402

import quantization  # noqa: E402
from modeling_paligemma import PaliGemmaConfig  # noqa: E402
from svg import BLUE, FAINT, GREEN, ORANGE, PURPLE, SOFT, Axes, Drawing  # noqa: E402
from weights import empty_model  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "decode.json"
CPU = torch.device("cpu")
OUTPUTS, WIDTH = 16384, 2048  # the widest product of a layer: gate_proj of PaliGemma 3B
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 266)
PROMPT, ANSWER = 266, 20  # tokens
TEXT = {
    "model_type": "gemma", "vocab_size": 257_216, "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
    "num_attention_heads": 8, "num_key_value_heads": 1,
}  # fmt: skip


def count_work(config: PaliGemmaConfig) -> None:
    """Prints what one token and one prompt cost, counted on a model without memory."""
    for kind in (None, *quantization.KINDS):
        model = empty_model(config).to(torch.bfloat16)
        for name in quantization.targets(model) if kind else ():
            model.set_submodule(name, quantization.empty_module(model.get_submodule(name), kind))
        weights = sum(tensor.nbytes for tensor in model.language_model.state_dict().values())
        products = machine.prefill_products(config, 0, 1)
        print(f"one token, {kind or 'bf16'}: {weights / 1e9:.2f} GB read, {products / 1e9:.2f} G multiply-adds, "
              f"{products / weights:.1f} for each byte")  # fmt: skip
    products = machine.prefill_products(config, 1, PROMPT)
    print(f"one picture and prompt, {PROMPT} tokens: {products / 1e9:.0f} G multiply-adds")
    cached = machine.prefill_products(config, 1, PROMPT) + (ANSWER - 1) * machine.prefill_products(config, 0, 1)
    plain = sum(machine.prefill_products(config, 0 if i else 1, PROMPT + i) for i in range(ANSWER))
    blind = sum(machine.prefill_products(config, 1, PROMPT + i) for i in range(ANSWER))
    print(
        f"an answer of {ANSWER} tokens: {cached / 1e9:.0f} G multiply-adds with a cache, {plain / cached:.0f} times as many "
        f"without, {blind / cached:.0f} times with the tower in every step, too"
    )


def ways() -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """The product in each form: its colour, and what computes it from bfloat16[rows, 2048]."""
    torch.manual_seed(0)
    plain = nn.Linear(WIDTH, OUTPUTS, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    fast = nn.Sequential(nn.Linear(WIDTH, OUTPUTS, bias=False, dtype=torch.bfloat16).requires_grad_(False))
    quantization.use_fast_products(fast)
    found = {"torch bf16": (ORANGE, plain), "ours bf16": (BLUE, fast)}
    for kind, color in zip(quantization.KINDS, (GREEN, PURPLE), strict=True):
        found[f"ours {kind}"] = color, quantization.quantize_module(plain, kind, {"weight": plain.weight.data})
    return found


def seconds(work: Callable[[], object]) -> float:
    """The shortest of some runs after one to warm up: as the floor beside it, what is possible and not what is usual."""
    work()
    times = []
    for _ in range(15):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.no_grad()
def draw_roofline() -> None:
    bandwidth = machine.read_bandwidth(CPU)
    rate = max(machine.matrix_rate(CPU, dtype) for dtype in (torch.float32, torch.bfloat16))
    print(f"this machine: {torch.get_num_threads()} threads, reads {machine.size(bandwidth)}/s, "
          f"{rate / 1e9:.0f} G multiply-adds/s in its best floating-point type")  # fmt: skip
    drawing = Drawing(700, 400)
    axes = Axes(drawing, (60, 50, 560, 340), x=(1, ROWS[-1]), y=(0.3, 400), is_log=(True, True))
    axes.frame([*ROWS], [0.3, 1, 3, 10, 30, 100, 300], "rows at a time (1 = decoding, 266 = reading a prompt)", "milliseconds")
    reading, multiplying = OUTPUTS * WIDTH * 2 / bandwidth * 1e3, OUTPUTS * WIDTH / rate * 1e3
    axes.curve([(rows, max(reading, rows * multiplying)) for rows in range(1, ROWS[-1] + 1)], SOFT, "5 4")
    drawing.text(*axes.at(1.1, reading * 0.8), "floor: bf16 read once, then multiplied", size=12, fill=SOFT)
    print(f"{'ms, 16384 x 2048, rows:':24}" + "".join(f"{rows:>8}" for rows in ROWS))
    for name, (color, product) in ways().items():
        inputs = {rows: torch.randn(rows, WIDTH, dtype=torch.bfloat16) for rows in ROWS}
        points = [(rows, seconds(lambda x=x, product=product: product(x)) * 1e3) for rows, x in inputs.items()]
        axes.curve(points, color)
        for point in points:
            drawing.dot(*axes.at(*point), color, 3)
        drawing.text(axes.box[2] + 8, axes.at(*points[-1])[1] + 4, name, fill=color)
        print(f"{name:24}" + "".join(f"{milliseconds:8.2f}" for _, milliseconds in points))
    drawing.save(HERE / "roofline.svg")


def draw_steps() -> None:
    """Bars of benchmarks/results/decode.json, the slowest first."""
    document = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = sorted(document["ways"].items(), key=lambda item: -item[1]["ms"]["median"])
    drawing = Drawing(700, 70 + 34 * len(rows))
    longest = rows[0][1]["ms"]["median"]
    drawing.text(20, 24, f"milliseconds for one token; {document['machine']}, {document['threads']} threads", fill=SOFT)
    for i, (name, row) in enumerate(rows):
        top, scale = 40 + 34 * i, 360 / longest
        drawing.text(230, top + 17, name, anchor="end")
        drawing.rect(240, top, 360, 24, FAINT)
        drawing.rect(240, top, row["ms"]["median"] * scale, 24, BLUE if name.startswith("ours") else ORANGE)
        drawing.text(612, top + 17, f"{row['ms']['median']:.0f}", fill=SOFT)
        floor = 240 + row["floor"] * scale
        drawing.line([(floor, top - 3), (floor, top + 27)], width=2)
    legend = "black line: the weights read once at the bandwidth measured in the same run"
    drawing.text(20, 40 + 34 * len(rows) + 16, legend, fill=SOFT)
    drawing.save(HERE / "steps.svg")


if __name__ == "__main__":
    vision = {"image_size": 224}
    raw = {"model_type": "paligemma", "image_token_index": 257_152, "vision_config": vision, "text_config": TEXT}
    count_work(PaliGemmaConfig.from_hf(raw))
    draw_roofline()
    draw_steps()
