"""The cost of a grammar, and of the mean and standard deviation of coordinates: microseconds per decoding step.

    python -m benchmarks.grammar_cost [--rows 1,8,32] [--device cuda]

To constrain a row to a grammar, the program must know at each step which ids are allowed next. The usual way, a mask over the
vocabulary, writes and reads another 257216 numbers per row. grammar.py instead lists the few allowed ids (at most 1024, mostly
one or two), and the next token is chosen among them. Mean and standard deviation (the moments) need the 1024 logits of the
locations. For comparison: in every variant, each row computes the maximum of all logits, and the sum that the log-probability of
the chosen token needs.

Four variants generate the same answer. It is valid, so the grammar changes nothing. If the answers differ, the script stops.

    free          no grammar                        moments                 mean and standard deviation of each coordinate
    constrained   a grammar of 80 labels            constrained, moments    both

The first measurement has no model: the loop of generation.py runs on random logits of full size, and in each step the logit of
the next token of the answer is raised. The second measurement uses the whole demo checkpoint, whose steps are so short that any
extra cost is visible. For comparison, the script also prints the least time of one decoding step of PaliGemma 3B in bfloat16:
the time to read the weights of its decoder.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from benchmarks import turns

if __name__ == "__main__":  # --help and wrong flags are answered before the slow imports
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=turns.HERE.parent / "paligemma" / "bundled")
    parser.add_argument("--picture", default=turns.HERE.parent / "examples" / "shapes.png")
    parser.add_argument("--rows", default="1,8,32", help="numbers of rows, separated by commas")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="run briefly, only to see that the script works")
    parser.add_argument("--save", action="store_true", help="store the JSON in results/CLASS/")
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
LABELS, OBJECTS = 80, 15  # number of labels (COCO has 80 classes), and of objects in the answer
QUESTION = "detect shape"


def make_grammar() -> Grammar:
    """A grammar with labels of one to three ids; some labels begin with others. After a label comes " ; ", which has two ids."""
    endings = []
    for number in range(LABELS):
        words = tuple(5000 + (number if depth == 0 else 10 * number + depth) // 3 for depth in range(1 + number % 3))
        endings += [Ending(number, (*words, EOS), True), Ending(number, (*words, 2161, 235248), False)]
    return Grammar(LOCATIONS, SEGMENTS, EOS, tuple(endings))


def make_answer(grammar: Grammar) -> list[int]:
    """The ids of a valid answer with OBJECTS objects."""
    ids = []
    for i in range(OBJECTS):
        ids += [LOCATIONS[v] for v in (10 * i, 20 * i, 10 * i + 300, 20 * i + 400)]
        ids += grammar.endings[(2 * i + (i < OBJECTS - 1)) % (2 * LABELS)].ids
    return ids


class FakeModel:
    """Replaces a model: returns logits of full size that make every row generate one given answer."""

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
        cache.set_lengths(attention_mask.sum(1))
        self.step = 0
        return self.next_logits()

    def decode(self, cache: KVCache, _: torch.Tensor) -> torch.Tensor:
        cache.reserve()
        cache.lengths.add_(1)
        self.step += 1
        return self.next_logits()

    def next_logits(self) -> torch.Tensor:
        self.logits[:, self.answer[self.step - 1]] = 0.0  # at step 0 this is the last token of the previous answer
        self.logits[:, self.answer[self.step]] = 30.0
        return self.logits


def variant(model: object, inputs: dict, count: int, device: torch.device, **options: object) -> Callable[[], dict]:
    """Generates one answer of at most `count` tokens; returns what turns.in_turn needs: seconds per step and the tokens."""

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
    """Prints and returns the microseconds per step of each variant, and the difference from `free` in the same round."""
    device = torch.device(options.device)
    extras = {"free": {}, "moments": {"locations": locations}, "constrained": {"grammar": grammar}}
    extras["constrained, moments"] = extras["moments"] | extras["constrained"]
    seconds = turns.in_turn({name: variant(model, inputs, count, device, **extra) for name, extra in extras.items()}, options)
    rows = {}
    for name, values in seconds.items():
        added = [value - free for value, free in zip(values, seconds["free"], strict=True)]
        rows[name] = {"us": turns.spread([value * 1e6 for value in values]), "added_us": turns.spread([a * 1e6 for a in added])}
        us, more = rows[name]["us"], rows[name]["added_us"]
        print(f"{name:22}{us['median']:10.4g}{us['low']:10.4g} ..{us['high']:8.4g}{more['median']:+12.4g}"
              f"   ({more['low']:+.4g} .. {more['high']:+.4g})")  # fmt: skip
    return rows


def main(options: argparse.Namespace) -> None:
    options.script, options.rounds = "grammar_cost", 1 if options.quick else options.rounds
    device = torch.device(options.device)
    heading = f"{'':22}{'us per step':>11}{'spread':>22}{'added':>12}   (spread)"
    with torch.no_grad():
        grammar, results = make_grammar(), {}
        answer = make_answer(grammar)
        for rows in (int(part) for part in options.rows.split(",")):
            print(f"\n{rows} rows of {VOCABULARY} logits, {len(answer)} tokens\n{heading}")
            inputs = {"input_ids": torch.full((rows, 1), 9)}
            results[rows] = compare(FakeModel(answer, rows, device), inputs, len(answer), LOCATIONS, grammar, options)
        processor = PaliGemmaProcessor.from_pretrained(options.model)
        model = load_model(options.model, device=device, dtype=torch.float32)
        grammar = Grammar.for_objects(processor, QUESTION.removeprefix("detect ").split(" ; "))
        inputs = processor(load_image(options.picture), QUESTION)
        inputs["image_features"] = model.encode_images(inputs.pop("pixel_values").to(device))
        print(f"\nthe whole demo checkpoint\n{heading}")
        demo = compare(model, inputs, 128, processor.location_ids, grammar, options)
    floor = turns.Floors(options.device).reading(DECODER_BYTES) * 1e6
    print(f"\na step of PaliGemma 3B in bfloat16 takes at least {floor:.4g} us")
    turns.finish(options, {"tokens": len(answer), "rows": results, "demo": demo, "floor_3b_us": float(f"{floor:.4g}")})


if __name__ == "__main__":
    main(options)
