"""The tables of README.md, docs/ and notes/decoding.md, computed from the code itself and from benchmarks/results."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from paligemma.files import read_json

if TYPE_CHECKING:
    from paligemma.configuration import PaliGemmaConfig

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OURS, THEIRS = ("ours bf16", "ours int8", "ours int4"), "transformers bf16"  # names in benchmarks/results
SIGLIP = {  # So400m/14, the vision tower of all published sizes
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14,
}  # fmt: skip
DECODERS = {  # the four published sizes; sources: config.json on the hub and, for 10B and 28B, Google's big_vision
    "PaliGemma 3B": {
        "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
        "num_attention_heads": 8, "num_key_value_heads": 1,
    },
    "PaliGemma 2 3B": {
        "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4,
    },
    "PaliGemma 2 10B": {
        "model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42,
        "num_attention_heads": 16, "num_key_value_heads": 8,
    },
    "PaliGemma 2 28B": {
        "model_type": "gemma2", "hidden_size": 4608, "intermediate_size": 36864, "num_hidden_layers": 46,
        "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 144,
    },
}  # fmt: skip
HUB_IDS = {
    "PaliGemma 3B": "`paligemma-3b-{pt,mix}-{224,448}`, `-pt-896`",
    "PaliGemma 2 3B": "`paligemma2-3b-{pt,mix}-{224,448}`, `-pt-896`",
    "PaliGemma 2 10B": "`paligemma2-10b-{pt,mix}-{224,448}`, `-pt-896`",
    "PaliGemma 2 28B": "`paligemma2-28b-{pt,mix}-{224,448}`, `-pt-896`",
}
VOCABULARY, IMAGE_TOKEN = 257_216, 257_152


def model_config(name: str) -> "PaliGemmaConfig":
    """The configuration of a published size, at 224 pixels. Args: name: a key of DECODERS."""
    from paligemma.configuration import PaliGemmaConfig

    raw = {"model_type": "paligemma", "image_token_index": IMAGE_TOKEN, "vision_config": SIGLIP}
    return PaliGemmaConfig.from_hf(raw | {"text_config": DECODERS[name] | {"vocab_size": VOCABULARY}})


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def checkpoint_table() -> str:
    """Sizes of the published models, counted on torch's meta device (shapes without memory)."""
    import torch

    from paligemma.checkpoints.weights import empty_model
    from paligemma.layers import int_formats, quantization

    lines = [
        "| model | hub id, after `google/` | parameters | bf16 | int8 | int4 | cache per token |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in DECODERS:
        config = model_config(name)
        parameters = sum(parameter.numel() for parameter in empty_model(config).parameters())
        sizes = []
        for kind in (None, *int_formats.KINDS):
            model = empty_model(config).to(torch.bfloat16)
            for target in quantization.targets(model) if kind else ():
                model.set_submodule(target, quantization.empty_module(model.get_submodule(target), kind))
            sizes.append(gigabytes(sum(tensor.nbytes for tensor in model.state_dict().values())))
        with torch.device("meta"):
            cache = empty_model(config).to(torch.bfloat16).new_cache(1, 1)
        kilobytes = (cache.keys.nbytes + cache.values.nbytes) / 1e3
        columns = [name, HUB_IDS[name], f"{parameters / 1e9:.2f} billion", *sizes, f"{kilobytes:.0f} kB"]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def result(name: str) -> dict | None:
    """What a script of benchmarks/ stored with --save; None if there is no such file."""
    file = RESULTS / f"{name}.json"
    if not file.exists():
        return None
    document = read_json(file)
    # the names of folders on the machine that was measured are removed
    document["command"] = re.sub(r"(--model|--python|--gguf) \S*/", r"\1 ", document["command"])
    return document


def faster(ways: dict, name: str) -> str:
    """How many times as fast as transformers the variant `name` is; "" if it was not measured."""
    return f"{ways[name]['ratio']['median']:.2f}" if name in ways else ""


def speed_lines(suffix: str) -> list[str]:
    """Rows of the speed table for one machine. Args: suffix: the end of its file names in benchmarks/results, such as "-cuda"."""
    lines = []
    for name, words, key in (
        ("decode", "one more token", "ways"),
        ("prefill", "picture and prompt", "whole"),
        ("start", "process start to first token", "ways"),
    ):
        if document := result(name + suffix):
            cells = [faster(document[key], side) for side in OURS]
            lines.append(f"| {words} | {' | '.join(cells)} | `{document['command']}` |")
    if document := result("batch" + suffix):
        best = document["best_pictures_per_s"]
        cells = [f"{best[side] / best[THEIRS]:.2f}" if side in best else "" for side in OURS]
        lines.append(f"| captions per second, best batch | {' | '.join(cells)} | `{document['command']}` |")
    if document := result("decode" + suffix):
        shares = [document["ways"].get(side, {}).get("GB_per_s", 0) / document["floors"]["read_GB_per_s"] for side in OURS]
        cells = [f"{share:.0%}" if share else "" for share in shares]
        lines.append(f"| share of the memory bandwidth used while decoding | {' | '.join(cells)} | `{document['command']}` |")
    if document := result("memory" + suffix):
        ways = document["ways"]
        cells = [f"{ways.get(f'{side}, from its own file', ways[side])['ratio']:.2f}" if side in ways else "" for side in OURS]
        lines.append(f"| peak memory, as a share of transformers' | {' | '.join(cells)} | `{document['command']}` |")
    return lines


def speed_table() -> str:
    """The speed relative to transformers, from benchmarks/results: one table for each machine that was measured."""
    parts = []
    for suffix in ("", "-cuda"):
        if lines := speed_lines(suffix):
            document = result("decode" + suffix)
            versions = document["versions"]
            parts += [
                f"{document['machine']}, {document['threads']} threads; transformers {versions['transformers']}, "
                f"torch {versions['torch']}; medians:",
                "",
                "| times as fast as transformers in bf16; the last two rows are shares | bf16 | int8 | int4 | command |",
                "|---|---|---|---|---|",
                *lines,
                "",
            ]
    return "\n".join(parts).rstrip()


def steps_table() -> str:
    """Milliseconds per token of each variant, from benchmarks/results/decode.json, the slowest first; "" if nothing is stored."""
    document = result("decode")
    if document is None:
        return ""
    lines = ["| | ms per token | lowest and highest | floor | times as fast |", "|---|---|---|---|---|"]
    for name, row in sorted(document["ways"].items(), key=lambda item: -item[1]["ms"]["median"]):
        ms, ratio = row["ms"], row["ratio"]["median"]
        cells = name, f"{ms['median']:.0f}", f"{ms['low']:.0f} to {ms['high']:.0f}", f"{row['floor']:.0f}", f"{ratio:.2f}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{document['machine']}, {document['threads']} threads; `{document['command']}`."])


def llama_table() -> str:
    """ms per token of llama.cpp and of our model at equal bit widths, from results/llama.json; "" if there is no such file."""
    document = result("llama")
    if document is None:
        return ""
    lines = ["| | ms per token | lowest and highest | times as fast as llama.cpp |", "|---|---|---|---|"]
    for name, row in document["ways"].items():
        ms, ratio = row["ms"], row["ratio"]["median"]
        cells = name, f"{ms['median']:.0f}", f"{ms['low']:.0f} to {ms['high']:.0f}", f"{ratio:.2f}"
        lines.append(f"| {' | '.join(cells)} |")
    about = f"{document['machine']}, {document['threads']} threads; llama-cpp-python {document['llama_cpp_python']}"
    return "\n".join([*lines, "", f"{about}; `{document['command']}`."])


def products_table() -> str:
    """Milliseconds of one matrix product by operator and number of rows, from benchmarks/results/products.json."""
    document = result("products")
    if document is None:
        return ""
    counts = list(document["rows"])
    titles = " | ".join("1 row" if rows == "1" else f"{rows} rows" for rows in counts)
    lines = [f"| ms, {' x '.join(map(str, document['size']))} | {titles} |"]
    lines.append("|---" * (len(counts) + 1) + "|")
    for name in document["rows"][counts[0]]:
        cells = [
            f"{document['rows'][rows][name]['ms']['median']:.3g}" if name in document["rows"][rows] else "" for rows in counts
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    floors = document["floors"]
    rates = ", ".join(
        f"{name.partition('_')[0]} {rate:.0f} G multiply-adds/s" for name, rate in floors.items() if name.endswith("_Gmadd_per_s")
    )
    machine = f"{document['machine']}, {document['threads']} threads; reads {floors['read_GB_per_s']} GB/s; with torch, {rates}"
    return "\n".join([*lines, "", f"{machine}; `{document['command']}`."])


def device_table() -> str:
    """What is used on which kind of device: devices.PROFILES in words."""
    from paligemma.devices import PROFILES

    examples = {
        "cpu": "", "mps": "M1 and newer", "rocm": "all", "sm_50": "GTX 10xx, P100, V100", "sm_75": "T4, RTX 20xx",
        "sm_80": "A100, H100, H200, B200", "sm_86": "RTX 30xx, 40xx, 50xx, A10, L4, L40",
    }  # fmt: skip
    lines = [
        "| device | such as | formats, best first | CUDA graphs | soft caps in one kernel | int8 kernel | int4 kernel |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, row in PROFILES.items():
        if key == "cpu":
            continue
        int8 = "torch's" if row.int8pack else "Triton" if row.triton else "no"
        int4 = "torch's" if row.int4pack else "Triton" if row.triton else "no"
        caps = "no" if row.flex_options is None else "yes, small blocks" if row.flex_options else "yes"
        cells = [row.kind, examples[key], ", ".join(row.dtype_names), "yes" if row.records else "no", caps, int8, int4]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


GENERATED: dict[str, Callable[[], str]] = {
    "checkpoints": checkpoint_table, "speed": speed_table, "steps": steps_table, "products": products_table,
    "llama": llama_table, "devices": device_table,
}  # fmt: skip
