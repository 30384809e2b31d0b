"""Quality of quantisation: the effect of int8 and int4 on answers and on logits.

There are two measurements, in each precision (bfloat16, int8, int4). The first scores the demo checkpoint, which is trained, with
demo/evaluate.py: the share of right answers matters most. The second compares the logits of a full-size model with those of its
float32 weights, at the text positions of one prompt: the distance relative to the norm of the logits (rounding noise adds up over
the layers), the divergence KL(float32 | precision) in nats, and how often the best token is the same. Rounding to bfloat16 is
generally accepted, so its distances, for our model and for transformers, are the ones to compare with. Random weights are the
hard case for the distance, because nothing in them is redundant.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import turns
from paligemma.files import parse_json, read_json

if TYPE_CHECKING:
    from torch import Tensor

POSITIONS = 64  # text tokens after the picture


def distance(reference: "Tensor", logits: "Tensor") -> dict:
    """How much logits, float32[L, V], differ from the reference."""
    from torch.nn.functional import kl_div

    centred = reference - reference.mean(-1, keepdim=True)
    gap = logits - logits.mean(-1, keepdim=True) - centred  # a constant added to all logits changes nothing
    divergence = kl_div(logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="none")
    return {
        "relative_distance": float(f"{(gap.norm() / centred.norm()).item():.3g}"),
        "divergence": float(f"{divergence.sum(-1).mean().item():.3g}"),
        "same_best": round((logits.argmax(-1) == reference.argmax(-1)).float().mean().item(), 4),
    }


def full_size(options: object, folder: Path) -> dict:
    """The distances of the logits in each precision, computed one after another, so that only one model is in memory."""
    import torch

    config = read_json(options.model / "config.json")
    context = config["text_config"]["num_image_tokens"] + POSITIONS
    rows, reference = {}, None
    print(f"{'full size, logits':34}{'distance':>10}{'divergence':>12}{'same best':>11}")
    for name in (turns.EXACT, *(name for name in options.sides if name != turns.STATIC)):
        with turns.start([name], options.model, options.device) as sides:
            sides[name].ask("logits", context=context, positions=POSITIONS, out=str(folder / "logits.pt"))
        logits = torch.load(folder / "logits.pt")
        reference = logits if reference is None else reference
        rows[name] = distance(reference, logits)
        print(f"{name:34}{rows[name]['relative_distance']:10.3g}{rows[name]['divergence']:12.3g}{rows[name]['same_best']:11.1%}")
    return rows


def demo(options: object) -> dict:
    """The scores of the demo checkpoint in each precision."""
    rows = {}
    print(f"\n{'demo checkpoint':34}{'answers':>10}{'captions':>12}{'detect':>11}")
    for name in (name for name in options.sides if name in (turns.OURS, turns.INT8, turns.INT4)):
        kind = name.split()[1]
        command = [sys.executable, "-m", "demo.evaluate", "--model", str(options.demo)]
        command += ["--count", str(options.count), "--device", options.device]
        command += ["--dtype", "bf16"] if name == turns.OURS else ["--quantize", kind]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        scores = parse_json(output.splitlines()[-1])
        rows[name] = {key: scores[key] for key in ("answer", "caption", "detect", "questions")}
        print(f"{name:34}{rows[name]['answer']:10.1%}{rows[name]['caption']:12.1%}{rows[name]['detect']:11.3f}")
    return rows


def main() -> None:
    bundled = turns.HERE.parent / "paligemma" / "bundled"
    count = {"type": int, "default": 150, "help": "number of pictures for the demo checkpoint; 0 skips it"}
    options = turns.parse(__doc__, rounds=1, flags={"--demo": {"type": Path, "default": bundled}, "--count": count})
    options.count = min(options.count, 2) if options.quick else options.count
    with tempfile.TemporaryDirectory() as folder:
        results = {"logits": full_size(options, Path(folder))}
    if options.count:
        results["demo"] = demo(options)
    turns.finish(options, results)


if __name__ == "__main__":
    main()
