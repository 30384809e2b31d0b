"""What a grammar and the moments of coordinates cost: microseconds a step, beside the step that they are part of.

    python -m benchmarks.grammar_cost [--rows 1,8,32] [--device cuda]

Holding a row to a grammar means knowing, each step, which ids may come next. A mask over the vocabulary, as is often made for
that, writes and reads 257216 numbers a row once more. grammar.py names the few ids instead (1024 at most, mostly one or two),
and the choice is among those; moments look at the 1024 locations. What every row pays anyway is the best of all logits and the
sum behind the log-probability of what was said.

Four ways say the same answer, which is valid, so that the grammar has nothing to change; or the script stops:

    free     no grammar                        places         locations=..., so mean and spread of every coordinate
    held     a grammar of 80 labels            held, places   both

First without any model: the loop of generation.py on logits of full size, drawn once; in each step one of them is raised. Then
the demo checkpoint, whole, where a step takes so little that anything else would show. The floor is that of a step of
PaliGemma 3B in bfloat16: reading the weights of its decoder.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from benchmarks import turns

if __name__ == "__main__":  # --help and wrong flags are answered before anything is loaded, run or written
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=turns.HERE.parent / "paligemma" / "bundled")
    parser.add_argument("--picture", default=turns.HERE.parent / "examples" / "shapes.png")
    parser.add_argument("--rows", default="1,8,32", help="rows of logits, side by side")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="only to see that it works")
    parser.add_argument("--save", action="store_true", help="keep the JSON in results/")
    options = parser.parse_args()

import torch

# isort: off
from paligemma.generation import generate_steps
from paligemma.objects.grammar import Ending, Grammar
from paligemma.pictures.images import load_image
from paligemma.configuration import GemmaConfig
from paligemma.modeling_gemma import KVCache
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.checkpoints.weights import load_model
# isort: on

VOCABULARY, IMAGE, EOS = 257216, 257152, 1  # as in every PaliGemma
LOCATIONS, SEGMENTS = range(256000, 257024), range(257024, IMAGE)
DECODER_BYTES = 2 * 2_506_172_416  # of PaliGemma 3B
LABELS, OBJECTS = 80, 15  # COCO's classes; objects of the answer
QUESTION = "detect shape"


def made_up_grammar() -> Grammar:
    """Labels of one to three ids, some the beginning of others; behind them " ; ", which has two ids."""
    endings = []
    for number in range(LABELS):
        words = tuple(5000 + (number if depth == 0 else 10 * number + depth) // 3 for depth in range(1 + number % 3))
        endings += [Ending(number, (*words, EOS), True), Ending(number, (*words, 2161, 235248), False)]
    return Grammar(LOCATIONS, SEGMENTS, EOS, tuple(endings))


def made_up_answer(grammar: Grammar) -> list[int]:
    """A valid answer of so many objects."""
    said = []
    for i in range(OBJECTS):
        said += [LOCATIONS[v] for v in (10 * i, 20 * i, 10 * i + 300, 20 * i + 400)]
        said += grammar.endings[(2 * i + (i < OBJECTS - 1)) % (2 * LABELS)].ids
    return said


class Told:
    """Stands in for a model: says one answer in every row, by logits of full size."""

    def __init__(self, answer: list[int], rows: int, device: torch.device):
        text = SimpleNamespace(max_position_embeddings=8192, vocab_size=VOCABULARY)
        self.config = SimpleNamespace(image_token_index=IMAGE, num_image_tokens=256, pad_token_id=0, text_config=text)
        self.dtype = torch.float32
        self.answer = torch.tensor(answer, device=device)
        self.logits = torch.randn(rows, VOCABULARY, device=device, generator=torch.Generator(device).manual_seed(0))

    def new_cache(self, rows: int, slots: int, kind: type) -> KVCache:
        config = GemmaConfig(VOCABULARY, 8, 8, 1, 1, 1, head_dim=8)
        return kind(config, rows, slots, device=self.logits.device, dtype=torch.float32)

    def prefill(self, cache: KVCache, attention_mask: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
        cache.fill(attention_mask.sum(1))
        self.step = 0
        return self.raised()

    def decode(self, cache: KVCache, _: torch.Tensor) -> torch.Tensor:
        cache.reserve()
        cache.lengths.add_(1)
        self.step += 1
        return self.raised()

    def raised(self) -> torch.Tensor:
        self.logits[:, self.answer[self.step - 1]] = 0.0  # before the first comes the last, of the answer before
        self.logits[:, self.answer[self.step]] = 30.0
        return self.logits


def way(model: object, inputs: dict, count: int, device: torch.device, **options: object) -> Callable[[], dict]:
    """One answer of at most `count` tokens, as turns.in_turn wants it: seconds a step after the first, and the tokens."""

    def answer() -> dict:
        steps = generate_steps(model, inputs, max_new_tokens=count, eos_token_id=EOS, **options)
        tokens = [next(steps).tokens.tolist()]
        start = time.perf_counter()
        tokens += [step.tokens.tolist() for step in steps]
        if device.type == "cuda":
            torch.cuda.synchronize()
        return {"seconds": (time.perf_counter() - start) / (len(tokens) - 1), "tokens": tokens}

    return answer


def compare(model: object, inputs: dict, count: int, locations: range, grammar: Grammar, options: argparse.Namespace) -> dict:
    """Prints and returns microseconds a step of the four ways, and what each adds to the first in the same round."""
    device = torch.device(options.device)
    extras = {"free": {}, "places": {"locations": locations}, "held": {"grammar": grammar}}
    extras["held, places"] = extras["places"] | extras["held"]
    seconds = turns.in_turn({name: way(model, inputs, count, device, **extra) for name, extra in extras.items()}, options)
    rows = {}
    for name, values in seconds.items():
        added = [value - free for value, free in zip(values, seconds["free"], strict=True)]
        rows[name] = {"us": turns.spread([value * 1e6 for value in values]), "added_us": turns.spread([a * 1e6 for a in added])}
        us, more = rows[name]["us"], rows[name]["added_us"]
        print(f"{name:14}{us['median']:10.4g}{us['low']:10.4g} ..{us['high']:8.4g}{more['median']:+12.4g}"
              f"   ({more['low']:+.4g} .. {more['high']:+.4g})")  # fmt: skip
    return rows


def main(options: argparse.Namespace) -> None:
    options.script, options.rounds = "grammar_cost", 1 if options.quick else options.rounds
    device = torch.device(options.device)
    heading = f"{'':14}{'us a step':>10}{'spread':>22}{'added':>12}   (spread)"
    with torch.no_grad():
        grammar, results = made_up_grammar(), {}
        answer = made_up_answer(grammar)
        for rows in (int(part) for part in options.rows.split(",")):
            print(f"\n{rows} rows of {VOCABULARY} logits, {len(answer)} tokens\n{heading}")
            inputs = {"input_ids": torch.full((rows, 1), 9)}
            results[rows] = compare(Told(answer, rows, device), inputs, len(answer), LOCATIONS, grammar, options)
        processor = PaliGemmaProcessor.from_pretrained(options.model)
        model = load_model(options.model, device=device, dtype=torch.float32)
        held = Grammar.for_objects(processor, QUESTION.removeprefix("detect ").split(" ; "))
        inputs = processor(load_image(options.picture), QUESTION)
        inputs["image_features"] = model.encode_images(inputs.pop("pixel_values").to(device))
        print(f"\na checkpoint, whole\n{heading}")
        demo = compare(model, inputs, 128, processor.location_ids, held, options)
    floor = turns.Floors(options.device).reading(DECODER_BYTES) * 1e6
    print(f"\na step of PaliGemma 3B in bfloat16 takes at least {floor:.4g} us")
    turns.finish(options, {"tokens": len(answer), "rows": results, "demo": demo, "floor_3b_us": float(f"{floor:.4g}")})


if __name__ == "__main__":
    main(options)
