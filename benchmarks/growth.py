"""Growth: how the time of prefill and decoding grows with context (266 to 4106 tokens) and with the number of layers.

The time of prefill grows in proportion to the number of tokens and, because of attention, a little with its square. In the vision
tower, where every patch attends to every other, the square is visible at 896 px. The time of decoding hardly grows with context,
because the keys and values of PaliGemma 1 take 18 KB per token, compared with 5 GB of weights. Both times are proportional to the
number of layers, plus a constant for the output matrix.

The effect of context is measured on models of full width with one layer, so that two cores can measure 896 px; the script writes
these models. The effect of the number of layers is measured at 224 px. There is one round after a warm-up round, because only the
shape of the curves matters.
"""

import tempfile
from functools import partial
from pathlib import Path

from benchmarks import turns
from paligemma.files import read_json

CONTEXTS = ((224, 266), (224, 512), (448, 1034), (896, 4106))  # px, tokens


def measure(model: Path, options: object, context: int, count: int) -> dict:
    """Measures prefill and decoding of one model at one context, all sides alternately."""
    names = [name for name in options.sides if name not in (turns.STATIC, turns.INT4)]
    with turns.start(names, model, options.device) as sides:
        ask = {"do": "begin", "context": context, "most": 1 + count * (options.rounds + 1)}
        prefill = turns.in_turn({name: partial(side.ask, **ask) for name, side in sides.items()}, options)
        decode = turns.in_turn({name: partial(side.ask, "decode", count=count) for name, side in sides.items()}, options)
    print("prefill")
    rows = {"prefill": turns.compare(prefill)}
    print("decode")
    return rows | {"decode": turns.compare({name: [value / count for value in values] for name, values in decode.items()})}


def main() -> None:
    options = turns.parse(__doc__, rounds=1)
    from benchmarks.make_checkpoint import write_checkpoint

    size = "tiny" if options.quick else "3b"
    config = read_json(options.model / "config.json")
    layers = config["text_config"]["num_hidden_layers"]
    results = {"context": [], "layers": []}
    with tempfile.TemporaryDirectory() as folder:
        made = {}
        for resolution, context in CONTEXTS[: 2 if options.quick else None]:
            if resolution not in made:
                made[resolution] = Path(folder) / str(resolution)
                write_checkpoint(made[resolution], size=size, resolution=resolution, layers=1)
            print(f"\n{resolution} px, {context} tokens, 1 layer")
            rows = measure(made[resolution], options, context, 4)
            results["context"].append({"image_size": resolution, "tokens": context, "layers": 1} | rows)
        results["layers"].append({"layers": 1} | {key: results["context"][0][key] for key in ("prefill", "decode")})
        for count in sorted({min(6, layers), layers}):
            model = options.model
            if count < layers:
                model = Path(folder) / f"layers-{count}"
                write_checkpoint(model, size=size, layers=count)
            print(f"\n{count} layers, 224 px, 266 tokens")
            results["layers"].append({"layers": count} | measure(model, options, 266, 4))
    turns.finish(options, results)


if __name__ == "__main__":
    main()
