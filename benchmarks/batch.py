"""Throughput: captions per second of many pictures, against the number of rows that are decoded at the same time.

A decoding step reads every weight once, whatever the number of rows in the batch. So the time per token falls with more rows,
until arithmetic or memory is the limit. Answers differ in length. In a padded batch (transformers) the short answers wait for the
longest, while generate_many starts the next picture in a row that has ended. The pictures are random noise and the model never
generates eos, so the length of each answer is prescribed: 4 to 24 tokens, drawn at random once, the same for both sides.

On two cores, transformers needs many seconds per picture, so the default is one round; on CUDA use --rounds 5.
"""

import random
from functools import partial

from benchmarks import turns
from paligemma.files import read_json


def main() -> None:
    flags = {
        "--rows": {"help": "numbers of rows to decode at the same time, separated by commas"},
        "--pictures": {"type": int, "help": "number of pictures per measurement"},
    }
    options = turns.parse(__doc__, rounds=1, flags=flags)
    is_gpu = options.device.startswith("cuda")
    sizes = [int(n) for n in (options.rows or ("1,8,32,128" if is_gpu else "4,8,16")).split(",")]
    raw = read_json(options.model / "config.json")
    context = raw["text_config"]["num_image_tokens"] + turns.PROMPT
    draw = random.Random(0)
    results = {}
    with turns.start([name for name in options.sides if name != turns.STATIC], options.model, options.device) as sides:
        for side in sides.values():
            side.ask("begin", context=context, most=1)
        for n in sizes:
            pictures = options.pictures or (2 * n if is_gpu else max(2, n))
            lengths = [draw.randint(2, 4) if options.quick else draw.randint(4, 24) for _ in range(pictures)]
            ask = {"rows": n, "lengths": lengths, "context": context}
            seconds = turns.in_turn(
                {name: partial(side.ask, "batch", **ask) for name, side in sides.items()}, options, is_warm=True
            )
            print(f"\n{n} rows at the same time, {pictures} pictures, answers of {lengths} tokens")
            rows = turns.compare({name: [value / pictures for value in values] for name, values in seconds.items()})
            for row in rows.values():
                row["pictures_per_s"] = float(f"{1e3 / row['ms']['median']:.4g}")
            results[n] = {"pictures": pictures, "lengths": lengths, "ways": rows}
    best = {name: max(result["ways"][name]["pictures_per_s"] for result in results.values()) for name in sides}
    print(f"\nbest, pictures per second: {best}")
    turns.finish(options, {"prompt": context, "rows": results, "best_pictures_per_s": best})


if __name__ == "__main__":
    main()
