"""Prefill: milliseconds from pixels and prompt to the first token, and how many of them the vision tower takes.

Every token is multiplied with every weight: about 2.5 billion multiply-adds for each of 266 tokens. The weights are read once
for many tokens, so the time depends on arithmetic. The floor is the number of multiply-adds / the rate of one large matrix
product, in the floating-point type that is fastest on this machine (float32 on a processor without bfloat16 instructions). int8
products can be faster than this floor, because processors multiply small integers faster.

The time of "decoder" is the difference between "whole" and "tower", computed in each round.
"""

from functools import partial

from benchmarks import turns
from paligemma.files import read_json


def main() -> None:
    options = turns.parse(__doc__)
    from paligemma.configuration import PaliGemmaConfig
    from paligemma.roofline import prefill_multiply_adds

    raw = read_json(options.model / "config.json")
    config = PaliGemmaConfig.from_hf(raw)
    context = config.num_image_tokens + turns.PROMPT
    floors = turns.Floors(options.device)
    names = [name for name in options.sides if name != turns.STATIC]  # the static cache is compiled for decoding only
    with turns.start(names, options.model, options.device) as sides:
        ways = {name: partial(side.ask, "begin", context=context, most=1) for name, side in sides.items()}
        towers = {name + "/tower": partial(side.ask, "tower") for name, side in sides.items()}
        seconds = turns.in_turn(ways | towers, options)
        floors.measure()
    whole = {name: seconds[name] for name in sides}
    tower = {name: seconds[name + "/tower"] for name in sides}
    decoder = {name: [a - b for a, b in zip(whole[name], tower[name], strict=True)] for name in sides}
    products = prefill_multiply_adds(config, 1, context)
    tower_products = prefill_multiply_adds(config, 1, 0) - prefill_multiply_adds(config, 0, 0)
    results = {"prompt": context, "image_size": config.vision_config.image_size, "floors": floors.document()}
    print(f"one picture of {results['image_size']} px, {context} tokens; {floors.document()}")
    for part, part_seconds, count in (
        ("whole", whole, products), ("tower", tower, tower_products), ("decoder", decoder, products - tower_products),
    ):  # fmt: skip
        print(f"\n{part}, {count / 1e9:.1f} G multiply-adds")
        results[part] = turns.compare(part_seconds, dict.fromkeys(sides, floors.multiplying(count)))
    turns.finish(options, results)


if __name__ == "__main__":
    main()
