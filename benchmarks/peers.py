"""Decoding compared with OpenVINO and ONNX Runtime: milliseconds for one more token of the same decoder in 8 and 4 bits.

Neither library can export PaliGemma. But the decoder, which takes most of the time, is an ordinary Gemma, so this script writes
the checkpoint's decoder as a text model in transformers' format, and each library exports and quantises it in its usual way:
    OpenVINO       optimum.exporters.openvino, then nncf.compress_weights with its default settings
    ONNX Runtime   onnxruntime_genai.models.builder
Then the library and our model with as many bits alternately generate tokens after prompts of the same length. The library has no
picture, but both must generate the same tokens, or the script stops.

    python -m benchmarks.peers --model /tmp/paligemma-3b --openvino ONE/bin/python --onnxruntime OTHER/bin/python

Each library needs an environment of its own (benchmarks/README.md), because they need different versions of transformers. Its
interpreter runs this file as a server that executes commands line by line, like sides.py. Exporting takes minutes and 10 GB of
memory; what was exported is kept beside the model.
"""

import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks import turns
from paligemma.files import parse_json, read_json

NEWLINE = 108  # the last token of every prompt, in sides.py, too
COPIED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
PEERS = {  # name: (the class of the server, number of bits, our side with as many)
    "OpenVINO int8": ("OpenVino", 8, turns.INT8),
    "OpenVINO int4": ("OpenVino", 4, turns.INT4),
    "ONNX Runtime int8": ("OnnxRuntime", 8, turns.INT8),
    "ONNX Runtime int4": ("OnnxRuntime", 4, turns.INT4),
}


def write_text_model(model: Path, out: Path) -> None:
    """Writes the decoder of a PaliGemma checkpoint as a GemmaForCausalLM, as transformers would."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                if name.startswith("language_model.model."):
                    tensors[name.removeprefix("language_model.")] = opened.get_tensor(name)
    text = read_json(model / "config.json")["text_config"]
    config = {key: text[key] for key in COPIED} | {
        "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "head_dim": text.get("head_dim", 256),
        "hidden_activation": "gelu_pytorch_tanh", "torch_dtype": "bfloat16", "tie_word_embeddings": True,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, out)
    (out / "config.json").write_text(json.dumps(config))


class Server:
    """A library with one model. `feed` gives it tokens and returns the next one."""

    def begin(self, context: int, most: int) -> dict:  # noqa: ARG002  (`most`: as in sides.py)
        start = time.perf_counter()
        self.token = self.feed([1000 + i for i in range(context - 1)] + [NEWLINE])
        return {"seconds": time.perf_counter() - start, "tokens": [self.token]}

    def decode(self, count: int) -> dict:
        start = time.perf_counter()
        tokens = []
        for _ in range(count):
            self.token = self.feed([self.token])
            tokens.append(self.token)
        return {"seconds": time.perf_counter() - start, "tokens": tokens}


class OpenVino(Server):
    def export(self, model: str, out: str, bits: int) -> dict:
        import nncf
        import openvino
        from optimum.exporters.openvino import main_export

        whole = Path(f"{model}-openvino")
        if not (whole / "openvino_model.xml").exists():
            main_export(model, whole, task="text-generation-with-past", library_name="transformers", convert_tokenizer=False)
        mode = nncf.CompressWeightsMode.INT8_ASYM if bits == 8 else nncf.CompressWeightsMode.INT4_ASYM
        compressed = nncf.compress_weights(openvino.Core().read_model(whole / "openvino_model.xml"), mode=mode)
        openvino.save_model(compressed, Path(out) / "openvino_model.xml")
        return {}

    def load(self, folder: str, slots: int) -> dict:  # noqa: ARG002  (the cache grows)
        import openvino

        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": turns.THREADS}
        model = openvino.Core().compile_model(Path(folder) / "openvino_model.xml", "CPU", settings)
        self.names = {name.any_name for name in model.inputs}
        self.request, self.past = model.create_infer_request(), 0
        return {"version": openvino.__version__.partition("-")[0]}

    def feed(self, tokens: list[int]) -> int:
        import numpy as np

        end = self.past + len(tokens)
        inputs = {
            "input_ids": np.array([tokens]), "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self.past, end)[None], "beam_idx": np.zeros(1, np.int32),
        }  # fmt: skip
        found = self.request.infer({name: value for name, value in inputs.items() if name in self.names})
        self.past = end
        return int(found["logits"][0, -1].argmax())


class OnnxRuntime(Server):
    def export(self, model: str, out: str, bits: int) -> dict:
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        subprocess.run([*builder, "-i", model, "-o", out, "-p", f"int{bits}", "-e", "cpu"], check=True, stdout=sys.stderr)
        return {}

    def load(self, folder: str, slots: int) -> dict:
        import onnxruntime_genai

        model = onnxruntime_genai.Model(folder)
        settings = onnxruntime_genai.GeneratorParams(model)
        settings.set_search_options(max_length=slots, do_sample=False)
        self.generator = onnxruntime_genai.Generator(model, settings)
        return {"version": onnxruntime_genai.__version__}

    def begin(self, context: int, most: int) -> dict:  # noqa: ARG002  (`most`: as in sides.py)
        start = time.perf_counter()
        self.generator.append_tokens([1000 + i for i in range(context - 1)] + [NEWLINE])
        self.generator.generate_next_token()
        return {"seconds": time.perf_counter() - start, "tokens": [int(self.generator.get_next_tokens()[0])]}

    def decode(self, count: int) -> dict:
        start = time.perf_counter()
        tokens = []
        for _ in range(count):
            self.generator.generate_next_token()
            tokens.append(int(self.generator.get_next_tokens()[0]))
        return {"seconds": time.perf_counter() - start, "tokens": tokens}


def serve(name: str) -> None:
    server, replies, sys.stdout = globals()[name](), sys.stdout, sys.stderr
    for line in sys.stdin:
        arguments = parse_json(line)
        print(json.dumps(getattr(server, arguments.pop("do"))(**arguments)), file=replies, flush=True)


class Peer(turns.Side):
    """A process that runs this file as a server, with an interpreter that can import the library."""

    def __init__(self, python: str, name: str, model: Path, slots: int):
        server, bits, _ = PEERS[name]
        command = [python, "-m", "benchmarks.peers", "--serve", server]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        text, folder = model.with_name(f"{model.name}-text"), model.with_name(f"{model.name}-{server}-{bits}")
        if not folder.exists():
            if not text.exists():
                write_text_model(model, text)
            self.send("export", model=str(text), out=str(folder), bits=bits)
            self.receive()
        self.send("load", folder=str(folder), slots=slots)


def main() -> None:
    flags = {
        f"--{server.lower()}": {"help": f"an interpreter that can import what {server} needs; without it, {server} is left out"}
        for server in dict.fromkeys(server for server, _, _ in PEERS.values())
    }
    options = turns.parse(__doc__, flags=flags)
    pythons = {name: getattr(options, server.lower()) for name, (server, _, _) in PEERS.items()}
    if not any(pythons.values()):
        raise SystemExit(f"No peer was named. Give {' or '.join(flags)}.")
    count = 2 if options.quick else 8
    context = read_json(options.model / "config.json")["text_config"]["num_image_tokens"] + turns.PROMPT
    most = 1 + count * (options.rounds + 1)
    floors, results, versions = turns.Floors("cpu"), {}, {}
    for theirs, python in pythons.items():
        if python is None:
            continue
        name = PEERS[theirs][2]
        peer = Peer(python, theirs, options.model, context + most)
        with turns.start([name], options.model, "cpu") as sides:
            versions[theirs] = peer.loaded["version"]
            both = {theirs: peer, name: sides[name]}
            begun = {side: asked.ask("begin", context=context, most=most) for side, asked in both.items()}
            turns.require_same(begun)
            ask = {side: partial(asked.ask, "decode", count=count) for side, asked in both.items()}
            seconds = turns.in_turn(ask, options, floors=floors)
            size = sides[name].loaded["decoder_bytes"]
        peer.close()
        times = {way: [value / count for value in values] for way, values in seconds.items()}
        least = floors.least({name: times[name]}, lambda _, rates, size=size: size / rates["read"])
        rows = turns.compare(times, least, baseline=theirs)
        results |= {theirs: rows[theirs], f"{name}, beside {theirs}": rows[name]}
    turns.finish(options, {"prompt": context, "tokens_a_turn": count, "peers": versions, "floors": floors.document(),
                           "ways": results})  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        main()
