"""Decoding compared with llama.cpp: milliseconds for one more token of a Gemma of the same dimensions, in BF16, Q8_0 and Q4_0.

llama.cpp cannot run PaliGemma. But the decoder, which takes most of the time, is an ordinary Gemma, and users with only a CPU
will want to compare with llama.cpp. So this script writes a decoder of the checkpoint's dimensions with random weights as GGUF
files (5, 2.7 and 1.4 GB; speed does not depend on the values). Then llama.cpp and our model at the same bit width alternately
generate tokens after a prompt of the same length. In the Q4_0 file the output matrix is Q4_0, too, as in our int4; llama.cpp's
own quantiser would keep it at 6 bits.

    pip install gguf llama-cpp-python                               # compiles for this machine, which takes a while
    python -m benchmarks.llama --model /tmp/paligemma-3b --gguf /tmp/gguf [--python OTHER/bin/python]

Both packages are optional and may be installed for another interpreter, given by --python. That interpreter then runs this file
as a server that executes commands line by line, like sides.py.
"""

import ctypes
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks import turns
from paligemma.files import move_into_place, parse_json, read_json

PAIRS = {"BF16": turns.OURS, "Q8_0": turns.INT8, "Q4_0": turns.INT4}  # llama.cpp's name: our side at the same bit width


def write_gguf(file: str, kind: str, text: dict) -> None:
    """Writes a random Gemma with the dimensions of `text_config`. All layers have equal weights, but each stores its own copy."""
    import gguf
    import numpy as np

    width, inner, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    kv_heads, head = text["num_key_value_heads"], text.get("head_dim", 256)
    writer = gguf.GGUFWriter(file, "gemma")
    writer.add_context_length(8192)
    writer.add_embedding_length(width)
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(text["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    quantisation, draw = gguf.GGMLQuantizationType[kind], np.random.default_rng(0)

    def matrix(outputs: int, inputs: int) -> "np.ndarray":
        piece = draw.standard_normal((min(outputs, 256), inputs), dtype=np.float32) * 0.02
        packed = gguf.quantize(piece, quantisation)
        return np.tile(packed, (-(-outputs // len(packed)), 1))[:outputs]

    shapes = {
        "attn_q": (heads * head, width), "attn_k": (kv_heads * head, width), "attn_v": (kv_heads * head, width),
        "attn_output": (width, heads * head), "ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner),
    }  # fmt: skip
    matrices = {name: matrix(*shape) for name, shape in shapes.items()}
    norm = np.zeros(width, dtype=np.float32) + 1
    writer.add_tensor("token_embd.weight", matrix(text["vocab_size"], width), raw_dtype=quantisation)
    writer.add_tensor("output_norm.weight", norm)
    for layer in range(text["num_hidden_layers"]):
        for name, packed in matrices.items():
            writer.add_tensor(f"blk.{layer}.{name}.weight", packed, raw_dtype=quantisation)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Server:
    """llama.cpp with one model, called through its C interface."""

    def write(self, file: str, kind: str, text: dict) -> dict:
        part = Path(f"{file}.part")
        write_gguf(str(part), kind, text)
        move_into_place(part, Path(file))
        return {}

    def load(self, file: str, slots: int) -> dict:
        import llama_cpp

        self.llama = llama_cpp
        self.silence = llama_cpp.llama_log_callback(lambda *_: None)  # an attribute, because C holds no reference
        llama_cpp.llama_log_set(self.silence, None)
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = slots
        settings.n_threads = settings.n_threads_batch = turns.THREADS
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        return {"version": llama_cpp.__version__}

    def read(self, tokens: list[int]) -> int:
        """Feeds tokens to the model and returns the most likely next token."""
        import numpy as np

        row = (ctypes.c_int32 * len(tokens))(*tokens)
        if self.llama.llama_decode(self.context, self.llama.llama_batch_get_one(row, len(tokens))):
            raise SystemExit("llama.cpp could not read the tokens.")
        return int(np.ctypeslib.as_array(self.llama.llama_get_logits_ith(self.context, -1), (self.vocab_size,)).argmax())

    def begin(self, context: int) -> dict:
        start = time.perf_counter()
        self.token = self.read([1000 + i for i in range(context)])
        return {"seconds": time.perf_counter() - start}

    def decode(self, count: int) -> dict:
        start = time.perf_counter()
        for _ in range(count):
            self.token = self.read([self.token])
        return {"seconds": time.perf_counter() - start}


def serve() -> None:
    server = Server()
    for line in sys.stdin:
        arguments = parse_json(line)
        print(json.dumps(getattr(server, arguments.pop("do"))(**arguments)), flush=True)


class Llama(turns.Side):
    """A process that runs this file as a server, with an interpreter that can import llama_cpp."""

    def __init__(self, python: str, file: Path, slots: int, text: dict):
        command = [python, "-m", "benchmarks.llama", "--serve"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            self.send("write", file=str(file), kind=file.stem, text=text)
            self.receive()
        self.send("load", file=str(file), slots=slots)


def require_llama(python: str) -> None:
    answer = subprocess.run([python, "-c", "import gguf, llama_cpp"], capture_output=True)
    if answer.returncode:
        raise SystemExit(
            f"{python} cannot import gguf and llama_cpp, which this comparison needs. Install them (pip install gguf "
            "llama-cpp-python), or name an interpreter that has them with --python."
        )


def main() -> None:
    flags = {
        "--gguf": {"type": Path, "help": "folder of the GGUF files; missing ones are made (default: MODEL-gguf)"},
        "--python": {"default": sys.executable, "help": "an interpreter that can import gguf and llama_cpp"},
    }
    options = turns.parse(__doc__, flags=flags)
    require_llama(options.python)
    text = read_json(options.model / "config.json")["text_config"]
    count = 2 if options.quick else 8
    context = text["num_image_tokens"] + turns.PROMPT
    most = 1 + count * (options.rounds + 1)
    folder, floors, results = options.gguf or options.model.with_name(f"{options.model.name}-gguf"), turns.Floors("cpu"), {}
    for kind, name in PAIRS.items():
        theirs = f"llama.cpp {kind}"
        llama = Llama(options.python, folder / f"{kind}.gguf", context + most, text)
        with turns.start([name], options.model, "cpu") as sides:
            version = llama.loaded["version"]
            llama.ask("begin", context=context)
            sides[name].ask("begin", context=context, most=most)
            ask = {theirs: partial(llama.ask, "decode", count=count), name: partial(sides[name].ask, "decode", count=count)}
            seconds = turns.in_turn(ask, options, floors=floors)
            size = sides[name].loaded["decoder_bytes"]
        llama.close()
        times = {way: [value / count for value in values] for way, values in seconds.items()}
        least = floors.least(times, lambda _, rates, size=size: size / rates["read"])
        results |= turns.compare(times, least, baseline=theirs)
    turns.finish(options, {"prompt": context, "tokens_a_turn": count, "llama_cpp_python": version,
                           "floors": floors.document(), "ways": results})  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        main()
