"""Do CPU and CUDA say the same? Logits and greedy tokens of small random models on both, before anything is timed.

Both families in float32, bfloat16, int8 and int4, a picture and a prompt: the logits of the whole row, and eight tokens
through cache and decoding loop. A kernel that is fast and wrong shows here. Exit code 1 if a gap exceeds its bound.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402  (the project's folder comes first)

from generation import generate  # noqa: E402
from make_checkpoint import write_checkpoint  # noqa: E402
from sides import make_rows  # noqa: E402
from weights import load_model  # noqa: E402

# Relative distance of all logits. float32 sums in another order differ by some 1e-6 and bfloat16 by 4e-3, the rounding of
# its 8 bits; the quantised forms round their activations on some devices and not on others.
BOUNDS = {("fp32", None): 1e-4, ("bf16", None): 2e-2, ("bf16", "int8"): 5e-2, ("bf16", "int4"): 5e-2}
CONTEXT, TOKENS = 290, 8


@torch.no_grad()
def answers(folder: Path, device: str, dtype: str, quantize: str | None) -> tuple[torch.Tensor, list[int]]:
    """Logits float32[L, V] in main memory, and the greedy tokens."""
    model = load_model(folder, device=device, dtype=dtype, quantize=quantize)
    inputs = make_rows(json.loads((folder / "config.json").read_text()), 1, CONTEXT, 0)
    tokens = [int(token) for token in generate(model, inputs, max_new_tokens=TOKENS)]
    return model(**inputs)[0].float().cpu(), tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="to be compared with the CPU")
    device = parser.parse_args().device
    torch.backends.cuda.matmul.allow_tf32 = False  # the default, said aloud: float32 is to mean float32
    rows, is_fine = [], True
    with tempfile.TemporaryDirectory() as folder:
        for family in ("paligemma", "paligemma2"):
            path = Path(folder) / family
            write_checkpoint(path, family=family, size="tiny")
            for (dtype, quantize), bound in BOUNDS.items():
                ours, said = answers(path, "cpu", dtype, quantize)
                theirs, said_there = answers(path, device, dtype, quantize)
                gap = ((theirs - ours).norm() / ours.norm()).item()
                is_equal = gap <= bound and said == said_there
                is_fine &= is_equal
                rows.append({"family": family, "form": quantize or dtype, "distance": gap, "same_tokens": said == said_there})
                print(f"{family:12}{quantize or dtype:6}{gap:12.2e} of {bound:.0e}   {'fine' if is_equal else 'WRONG'}")
    print(json.dumps({"script": "agree", "device": device, "rows": rows}))
    sys.exit(0 if is_fine else 1)


if __name__ == "__main__":
    main()
