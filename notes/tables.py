"""The tables of README.md, docs/ and notes/decoding.md, computed from the code itself and from benchmarks/results."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def results(name: str) -> dict[str, dict]:
    """What a script of benchmarks/ stored with --save, for each class of processors that was measured, the best first."""
    from paligemma.layers import instruction_sets

    found = {}
    for folder in (*instruction_sets.NAMES, "cuda"):
        file = RESULTS / folder / f"{name}.json"
        if file.exists():
            found[folder] = read_json(file)
            # the names of folders on the machine that was measured are removed
            flags = "--model|--python|--gguf|--openvino|--onnxruntime"
            found[folder]["command"] = re.sub(rf"({flags}) \S*/", r"\1 ", found[folder]["command"])
    return found


def machine(document: dict) -> str:
    return f"{document['machine']}, {document['threads']} threads"


def three(ways: dict, cell: Callable[[Any], str]) -> str:
    """The cell of each of our forms: "2.29 / 4.41 / 7.20"; "" if all are missing."""
    cells = [cell(ways[side]) if side in ways else "-" for side in OURS]
    return " / ".join(cells) if set(cells) != {"-"} else ""


def ratio(row: dict) -> str:
    return f"{row['ratio']['median']:.2f}"


def milliseconds(row: dict) -> str:
    return f"{row['ms']['median']:.0f} ({row['floor']:.0f})" if "floor" in row else f"{row['ms']['median']:.0f}"


def share(row: dict) -> str:
    return f"{row['share']:.0%}" if "share" in row else "-"


def captions(document: dict) -> str:
    best = document["best_pictures_per_s"]
    return three(best, lambda rate: f"{rate / best[THEIRS]:.2f}")


def memory(document: dict) -> str:
    ways = document["ways"]
    stored = {side: ways.get(f"{side}, from its own file", ways.get(side)) for side in OURS if side in ways}
    return three(stored, lambda row: f"{row['ratio']:.2f}")


# A row of the speed table: the script, the words, and its cell from what the script stored.
SPEED_ROWS: tuple[tuple[str, str, Callable[[dict], str]], ...] = (
    ("decode", "one more token", lambda found: three(found["ways"], ratio)),
    ("decode", "its ms, and the floor", lambda found: three(found["ways"], milliseconds)),
    ("decode", "share of the memory bandwidth", lambda found: three(found["ways"], share)),
    ("prefill", "first picture and prompt of a process", lambda found: three(found.get("cold", {}), ratio)),
    ("prefill", "later pictures and prompts", lambda found: three(found["whole"], ratio)),
    ("prefill", "their ms, and the floor", lambda found: three(found["whole"], milliseconds)),
    ("prefill", "share of the rate of multiply-adds", lambda found: three(found["whole"], share)),
    ("start", "process start to first token", lambda found: three(found["ways"], ratio)),
    ("batch", "captions per second, best batch", captions),
    ("memory", "peak memory, as a share of transformers'", memory),
)


def speed_table() -> str:
    """The speed relative to transformers, from benchmarks/results: a column for each class of processors that was measured."""
    stored = {script: results(script) for script, _, _ in SPEED_ROWS}
    classes = stored["decode"]
    titles = [f"`{name}`: {machine(document)}" for name, document in classes.items()]
    lines = [
        f"| bf16 / int8 / int4, times as fast as transformers in bf16 | {' | '.join(titles)} | command |",
        "|---" * (len(classes) + 2) + "|",
    ]
    named = set()  # scripts whose command is in a row above
    for script, words, cell in SPEED_ROWS:
        cells = [cell(stored[script][name]) if name in stored[script] else "" for name in classes]
        if any(cells):
            command = "the same" if script in named else f"`{next(iter(stored[script].values()))['command']}`"
            named.add(script)
            lines.append(f"| {words} | {' | '.join(cells)} | {command} |")
    versions = [
        f"`{name}`: transformers {document['versions']['transformers']}, torch {document['versions']['torch']}"
        for name, document in classes.items()
    ]
    return "\n".join([*lines, "", f"Medians; {'; '.join(versions)}."])


def token_speed() -> str:
    """A part of a sentence: how many times as fast as transformers a token is in int8 and int4, on the measured processors."""
    parts = []
    for side in OURS[1:]:
        ratios = [document["ways"][side]["ratio"]["median"] for name, document in results("decode").items() if name != "cuda"]
        low, high = f"{min(ratios):.1f}", f"{max(ratios):.1f}"
        parts.append(low if low == high else f"{low} to {high}")
    return " and ".join(parts)


def for_each_class(name: str, table: Callable[[dict], list[str]]) -> str:
    """A table for each class of processors that a script was run on, with the machine and the command below."""
    parts = []
    for document in results(name).values():
        parts.append("\n".join([*table(document), "", f"{about(document)}; `{document['command']}`."]))
    return "\n\n".join(parts)


def about(document: dict) -> str:
    """The machine, and what else the reader of a table must know."""
    words = machine(document)
    if "llama_cpp_python" in document:
        words += f"; llama-cpp-python {document['llama_cpp_python']}"
    if "size" in document:  # of a matrix product
        floors = document["floors"]
        kinds = {name.removesuffix("_Gmadd_per_s"): rate for name, rate in floors.items() if name != "read_GB_per_s"}
        rates = [f"{kind} {rate:.0f} G multiply-adds/s" for kind, rate in kinds.items()]
        measured = "" if "int8_Gmadd_per_s" in floors else "with torch, "
        words += f"; reads {floors['read_GB_per_s']} GB/s; {measured}{', '.join(rates)}"
    return words


def steps_table() -> str:
    """Milliseconds per token of each variant, from benchmarks/results/CLASS/decode.json, the slowest first."""

    def table(document: dict) -> list[str]:
        lines = ["| | ms per token | lowest and highest | floor | times as fast |", "|---|---|---|---|---|"]
        for name, row in sorted(document["ways"].items(), key=lambda item: -item[1]["ms"]["median"]):
            ms = row["ms"]
            cells = name, f"{ms['median']:.0f}", f"{ms['low']:.0f} to {ms['high']:.0f}", f"{row['floor']:.0f}", ratio(row)
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    return for_each_class("decode", table)


def library_table(script: str, library: str) -> str:
    """Milliseconds per token of other libraries and of our model, from benchmarks/results/CLASS/{script}.json."""

    def table(document: dict) -> list[str]:
        lines = [f"| | ms per token | lowest and highest | times as fast as {library} |", "|---|---|---|---|"]
        versions = document.get("peers", {})
        for name, row in document["ways"].items():
            ms, version = row["ms"], f" {versions[name]}" if name in versions else ""
            cells = f"{name}{version}", f"{ms['median']:.0f}", f"{ms['low']:.0f} to {ms['high']:.0f}", ratio(row)
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    return for_each_class(script, table)


def products_table() -> str:
    """Milliseconds of one matrix product by operator and number of rows, from benchmarks/results/CLASS/products.json."""

    def table(document: dict) -> list[str]:
        counts = list(document["rows"])
        titles = " | ".join("1 row" if rows == "1" else f"{rows} rows" for rows in counts)
        lines = [f"| ms, {' x '.join(map(str, document['size']))} | {titles} |", "|---" * (len(counts) + 1) + "|"]
        for name in document["rows"][counts[0]]:
            found = [document["rows"][rows].get(name) for rows in counts]
            cells = [f"{row['ms']['median']:.3g}" if row else "" for row in found]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return lines

    return for_each_class("products", table)


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
    "checkpoints": checkpoint_table, "speed": speed_table, "token speed": token_speed, "steps": steps_table,
    "products": products_table, "llama": partial(library_table, "llama", "llama.cpp"),
    "peers": partial(library_table, "peers", "the library"), "devices": device_table,
}  # fmt: skip
