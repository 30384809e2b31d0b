"""One side of a measurement, `ours` or `transformers`: a process that executes commands from stdin, line by line.

    echo '{"do": "load", "model": "/tmp/paligemma-3b"}
          {"do": "begin", "context": 266, "most": 16}
          {"do": "decode", "count": 15}' | python -m benchmarks.sides transformers

Each line names a method of the class below and its arguments; the reply is one line of JSON with seconds and tokens. Both models
stay in memory, each in its own process, and a parent process (turns.py) lets them work alternately, so that whatever slows down
the machine slows down both. Each side calls its ordinary interface: our generate, and transformers' generate.
"""

import argparse
import itertools
import json
import os
import queue
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

from paligemma import machine
from paligemma.files import parse_json, read_json

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # --help and wrong flags are answered before the slow imports
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("ours", "transformers"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="ours only")
    parser.add_argument("--dtype", help="ours only (default: as stored)")
    parser.add_argument("--compiled", action="store_true", help="ours: on CUDA; transformers: with torch.compile")
    parser.add_argument("--static", action="store_true", help="transformers only")
    options = parser.parse_args()

machine.use_cores()  # both sides get the same number of threads
if __name__ == "__main__" and options.side == "ours":
    machine.check_torch()  # imports torch as our programs do, which transformers does not

import torch  # noqa: E402  (torch reads the number of threads when it is imported)

NEWLINE = 108  # the last token of a prompt; it has the same id in every PaliGemma tokenizer
WORDS = range(500, 2000)  # ids of ordinary tokens, both in a full-size and in a tiny tokenizer


def make_rows(config: dict, rows: int, context: int, seed: int) -> dict:
    """Rows of `context` tokens each, as a processor makes them: one picture of noise, bos, random words, newline.

    Args:
        config: the content of config.json.
    Returns: input_ids, attention_mask, token_type_ids int64[B, L], pixel_values float32[B, 3, H, W].
    """
    vision, draw = config["vision_config"], random.Random(seed)
    side = vision.get("image_size", 224)
    patches = (side // vision["patch_size"]) ** 2
    if context < patches + 2:
        raise ValueError(f"a context of {context} tokens is too short for {patches} image tokens, bos and newline.")
    ids = [
        [config["image_token_index"]] * patches + [config["bos_token_id"]]
        + draw.choices(WORDS, k=context - patches - 2) + [NEWLINE]
        for _ in range(rows)
    ]  # fmt: skip
    input_ids = torch.tensor(ids)
    noise = torch.Generator().manual_seed(seed)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "token_type_ids": torch.zeros_like(input_ids),
        "pixel_values": torch.rand(rows, 3, side, side, generator=noise) * 2 - 1,
    }


class Side:
    """The common part of both sides: the commands and the measurement of time."""

    def __init__(self, device: str, **options: object):
        self.device = torch.device(device)
        self.options = options
        self.tokens: Generator[int] = (token for token in ())

    def load(self, model: str) -> dict:
        """Loads the weights; returns the time that this took."""
        self.folder = Path(model)
        self.config = read_json(self.folder / "config.json")
        start = time.perf_counter()
        self.model = self.load_model()
        self.wait()
        return {"seconds": time.perf_counter() - start}

    def begin(self, context: int, most: int, seed: int = 0) -> dict:
        """Starts an answer of at most `most` tokens after `context` tokens; returns the time to the first token."""
        self.tokens.close()
        inputs = make_rows(self.config, 1, context, seed)
        start = time.perf_counter()
        self.tokens = self.answer(inputs, most)
        return self.take(1, start)

    def decode(self, count: int) -> dict:
        """Generates the next tokens of the answer that `begin` started."""
        return self.take(count, time.perf_counter())

    def take(self, count: int, start: float) -> dict:
        tokens = list(itertools.islice(self.tokens, count))
        self.wait()
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    def tower(self) -> dict:
        """Encodes one picture: vision tower and projector."""
        patches = self.config["vision_config"]["num_image_tokens"]
        pixels = make_rows(self.config, 1, patches + 2, 0)["pixel_values"].to(self.device)
        start = time.perf_counter()
        with torch.no_grad():
            self.encode(pixels)
        self.wait()
        return {"seconds": time.perf_counter() - start}

    def batch(self, rows: int, lengths: list[int], context: int) -> dict:
        """Generates captions of prescribed `lengths`, one per picture, `rows` of them at the same time."""
        inputs = make_rows(self.config, len(lengths), context, 0)
        start = time.perf_counter()
        tokens = self.caption(inputs, rows, lengths)
        self.wait()
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    def logits(self, context: int, positions: int, out: str) -> dict:
        """Saves the logits at the last positions of a row, float32[positions, V], as a tensor."""
        inputs = make_rows(self.config, 1, context, 0)
        with torch.no_grad():
            torch.save(self.forward(inputs)[0, -positions:].float().cpu(), out)
        return {}

    def memory(self) -> dict:
        """The peak and the current memory of this process in bytes, including pages of mapped files."""
        lines = Path("/proc/self/status").read_text().splitlines()
        status = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
        found = {key: int(status[key]) * 1024 for key in ("VmHWM", "VmRSS", "RssAnon", "RssFile")}
        if self.device.type == "cuda":
            found["cuda"] = torch.cuda.max_memory_allocated()
        return found

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Ours(Side):
    """This project. Options: dtype, quantize; compiled: on CUDA, compile the decoding step when it is first used, not later."""

    def load_model(self) -> torch.nn.Module:
        from paligemma.checkpoints.weights import load_model

        return load_model(
            self.folder, device=self.device, dtype=self.options["dtype"], quantize=self.options["quantize"],
            graphs="compile" if self.options["compiled"] else "auto",
        )  # fmt: skip

    def load(self, model: str) -> dict:
        reply = super().load(model)
        parts = {"decoder_bytes": self.model.language_model, "model_bytes": self.model}
        return reply | {key: sum(tensor.nbytes for tensor in part.state_dict().values()) for key, part in parts.items()}

    def save(self, out: str) -> dict:
        """Writes the model, quantised or not, and the files of the processor into one folder."""
        from paligemma.checkpoints.weights import save_model

        save_model(self.model, Path(out))
        for file in self.folder.glob("*.json"):
            if file.name not in ("config.json", "model.safetensors.index.json"):
                shutil.copy(file, out)
        return {}

    def answer(self, inputs: dict, most: int) -> Generator[int]:
        from paligemma.generation import generate

        return (int(tokens) for tokens in generate(self.model, inputs, max_new_tokens=most, eos_token_id=None))

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.encode_images(pixels)

    def forward(self, inputs: dict) -> torch.Tensor:
        return self.model(**inputs)

    def caption(self, inputs: dict, rows: int, lengths: list[int]) -> list[list[int]]:
        """generate_many, except that each row ends at its prescribed length: a random model generates no eos."""
        from paligemma.generation import RunningBatch, continuous_batching, split_rows

        class Measured(RunningBatch):
            def is_finished(self, row: object) -> bool:
                return len(row.token_ids) >= lengths[row.index]

        batch = Measured(self.model, rows, max(lengths), eos_token_id=None)
        answers = continuous_batching(batch, enumerate(split_rows(inputs, self.model.config)))
        return [answer.token_ids for answer in sorted(answers, key=lambda answer: answer.index)]


class PausingStreamer:
    """A streamer that makes transformers' generate wait after each token until the next one is requested."""

    def __init__(self):
        self.tokens: queue.Queue = queue.Queue()
        self.permits = threading.Semaphore(0)
        self.is_closed = False
        self.has_seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if not self.has_seen_prompt:
            self.has_seen_prompt = True
            return
        self.tokens.put(int(value))
        self.permits.acquire()
        if self.is_closed:
            raise SystemExit  # ends the thread without a message

    def end(self) -> None:
        """generate calls this at the end of an answer. Nothing to do: `run` reports the end."""

    def run(self, generate: Callable, inputs: dict, most: int) -> None:
        try:
            generate(inputs, max_new_tokens=most, streamer=self)
        finally:
            self.tokens.put(None)


class Transformers(Side):
    """transformers in bfloat16 with default settings.

    Options: static: a static cache, with which generate compiles the model on CUDA; compiled: compile the model's forward.
    """

    def load_model(self) -> torch.nn.Module:
        from transformers import PaliGemmaForConditionalGeneration

        model = PaliGemmaForConditionalGeneration.from_pretrained(self.folder, dtype=torch.bfloat16).to(self.device).eval()
        if self.options["compiled"]:
            model.forward = torch.compile(model.forward)  # as transformers' documentation says
        return model

    def generate(self, inputs: dict, **options: object) -> torch.Tensor:
        if self.options["static"]:
            options["cache_implementation"] = "static"
        return self.model.generate(**inputs, do_sample=False, eos_token_id=None, **options)

    def answer(self, inputs: dict, most: int) -> Generator[int]:
        streamer = PausingStreamer()
        inputs = {key: tensor.to(self.device) for key, tensor in inputs.items()}
        thread = threading.Thread(target=streamer.run, args=(self.generate, inputs, most))
        thread.start()
        try:
            while (token := streamer.tokens.get()) is not None:
                yield token
                streamer.permits.release()
        finally:
            streamer.is_closed = True
            streamer.permits.release()
            thread.join()

    def decode(self, count: int, mkldnn: bool = True) -> dict:
        """Like Side.decode. Without mkldnn, torch uses its own kernels, which are faster for one row on some processors."""
        torch.backends.mkldnn.enabled = mkldnn
        reply = super().decode(count)
        torch.backends.mkldnn.enabled = True
        return reply

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixels)

    def forward(self, inputs: dict) -> torch.Tensor:
        return self.model(**inputs).logits

    def caption(self, inputs: dict, rows: int, lengths: list[int]) -> list[list[int]]:
        """Padded batches, one after another. A row stops at its length; the batch continues until its longest row ends."""
        answers: list[list[int]] = []
        for first in range(0, len(lengths), rows):
            limits = torch.tensor(lengths[first : first + rows], device=self.device)
            part = {key: tensor[first : first + rows].to(self.device) for key, tensor in inputs.items()}
            prompt = part["input_ids"].shape[1]
            stop = [lambda ids, _, limits=limits, prompt=prompt: ids.shape[1] - prompt >= limits]
            output = self.generate(part, max_new_tokens=int(limits.max()), stopping_criteria=stop)
            answers += [row[:limit].tolist() for row, limit in zip(output[:, prompt:], limits, strict=True)]
        return answers


def main(options: argparse.Namespace) -> None:
    given = vars(options)
    side = {"ours": Ours, "transformers": Transformers}[given.pop("side")](**given)
    replies, sys.stdout = sys.stdout, sys.stderr  # so that nothing that libraries print appears between the replies
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for line in sys.stdin:
        arguments = parse_json(line)
        reply = getattr(side, arguments.pop("do"))(**arguments)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
    side.tokens.close()


if __name__ == "__main__":
    main(options)
