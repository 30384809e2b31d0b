"""Prints the numbers of loading.md, on Linux: `python -m notes.loading_figures`. It needs 0.5 GB of disk space temporarily.

It first prints the beginning of the bundled checkpoint's file. Then it writes a random model of 0.23 billion parameters in
bfloat16 and loads it in four ways, each in a new process. For each process the kernel reports the anonymous memory ("own") and
the pages of mapped files ("file").
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from paligemma.files import parse_json

ROOT = Path(__file__).resolve().parent.parent

WAYS = {
    "mapped": {},
    "as float32": {"dtype": "fp32"},
    "as int8": {"quantize": "int8"},
}
NAIVE = "a copy of each"  # of each tensor, see load


def memory() -> dict[str, float]:
    """MB of this process: anonymous memory, pages of mapped files, and the peak of their sum."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("Rss", "VmHWM"))}
    return {"own": found["RssAnon"], "file": found["RssFile"], "peak": found["VmHWM"]}


def write_model(folder: Path) -> None:
    """Writes a random Gemma-like decoder with a small vision tower."""
    import torch

    from paligemma.checkpoints.weights import save_model
    from paligemma.configuration import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig
    from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration

    vision = SiglipVisionConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, patch_size=14
    )
    text = GemmaConfig(
        vocab_size=64_000, hidden_size=1024, intermediate_size=8192, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=1,
    )  # fmt: skip
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig(vision, text, image_token_index=63_999))
    save_model(model.to(torch.bfloat16), folder)


def show_file(file: Path, count: int) -> None:
    """Prints the first tensors of a safetensors file, as its header describes them."""
    from paligemma.checkpoints.headers import read_header

    tensors = sorted(read_header(file).values(), key=lambda tensor: tensor.start)
    print(f"{file.name}: 8 bytes and the header up to byte {tensors[0].start}, then {len(tensors)} tensors")
    for tensor in tensors[:count]:
        print(f"  byte {tensor.start:>7}  {tensor.dtype:5}{str(list(tensor.shape)):18}{tensor.name}")


def load(folder: str, way: str) -> None:
    """Loads the model in one way (NAIVE or a key of WAYS) and prints the memory that loading took, as JSON."""
    import torch

    from paligemma.checkpoints.weights import load_model

    torch.zeros(1)
    before = memory()
    if way == NAIVE:  # as many programs do: a model in float32, a dict of all tensors, load_state_dict
        from safetensors.torch import load_file

        from paligemma.checkpoints.weights import ModelFiles
        from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration

        model = PaliGemmaForConditionalGeneration(ModelFiles(folder).config)
        tensors = load_file(Path(folder) / "model.safetensors")
        model.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()})
    else:
        model = load_model(folder, **WAYS[way])
    after = memory()
    weights = sum(tensor.nbytes for tensor in model.state_dict().values()) / 2**20
    mb = {key: after[key] - before[key] for key in ("own", "file")} | {"peak": after["peak"] - before["own"] - before["file"]}
    print(json.dumps({"weights": weights} | mb))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "WAY"), help="used by the script itself")
    options = parser.parse_args()
    if options.load:
        load(*options.load)
        return
    show_file(ROOT / "paligemma" / "bundled" / "model.safetensors", 5)
    print(f"\n{'memory in MB':16}{'weights':>9}{'own':>9}{'file':>9}{'peak':>9}")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        for way in (*WAYS, NAIVE):
            command = [sys.executable, "-m", "notes.loading_figures", "--load", folder, way]
            output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
            row = parse_json(output)
            numbers = "".join(f"{row[key]:9.0f}" for key in ("weights", "own", "file", "peak"))
            print(f"{way:16}{numbers}")


if __name__ == "__main__":
    main()
