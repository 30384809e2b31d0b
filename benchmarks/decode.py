"""Decoding: milliseconds for one more token, batch 1, after one picture and a short prompt.

To generate one token, the processor reads every weight of the decoder and the output matrix once, and computes little: two
multiply-adds per four bytes. So the floor is bytes / read bandwidth, and only fewer bytes lower it: int8 halves them, int4 halves
them again. A program is slower than the floor because of everything else that it does: matrix products that read slowly,
allocation, Python code between the layers, a cache that is copied when it grows.

All sides have the same prompt. Each side prefills it once, and then the sides alternately generate the next few tokens. On the
CPU, transformers is also measured with torch's oneDNN products switched off while decoding, which is faster on some processors.
On CUDA, our side replays a recorded graph (graphs.py); "ours bf16 compiled" replays a graph of the compiled step. The column
"share" is the share of the bandwidth that is used, the median of all turns, of the bandwidth measured before and after each.
"""

from functools import partial

from benchmarks import turns
from paligemma.files import read_json

RECORDING = 8  # tokens generated on CUDA before measuring, so that graphs are recorded and steps compiled (takes minutes)


def main() -> None:
    options = turns.parse(__doc__)
    config = read_json(options.model / "config.json")
    is_gpu = options.device.startswith("cuda")
    count = 2 if options.quick else 16 if is_gpu else 8  # so few that no further graph is recorded while measuring
    context = config["text_config"]["num_image_tokens"] + turns.PROMPT
    floors = turns.Floors(options.device)
    with turns.start(options.sides, options.model, options.device) as sides:
        # twice `count`, because transformers with and without mkldnn are two variants that continue the same answer
        most = 1 + RECORDING + 2 * count * (options.rounds + 1)
        turns.require_same({name: side.ask("begin", context=context, most=most) for name, side in sides.items()})
        if is_gpu:
            turns.require_same(turns.together(sides, "decode", count=RECORDING))
        ways = {name: partial(side.ask, "decode", count=count) for name, side in sides.items()}
        if options.device == "cpu" and turns.THEIRS in sides:
            ways["transformers bf16, mkldnn off"] = partial(sides[turns.THEIRS].ask, "decode", count=count, mkldnn=False)
        seconds = turns.in_turn(ways, options, floors=floors)
    # transformers reads as many bytes as our bf16 side
    ours_bf16 = next(side.loaded["decoder_bytes"] for name, side in sides.items() if name.startswith(turns.OURS))
    read = {name: sides[name].loaded.get("decoder_bytes", ours_bf16) if name in sides else ours_bf16 for name in ways}
    per_token = {name: [value / count for value in values] for name, values in seconds.items()}
    least = floors.least(per_token, lambda name, rates: read[name] / rates["read"])
    print(f"one token after {context}, {count} tokens per turn; {floors.document()}")
    rows = turns.compare(per_token, least)
    for name, row in rows.items():
        row["GB_per_s"] = round(read[name] / row["ms"]["median"] / 1e6, 2)
    turns.finish(options, {"prompt": context, "tokens_a_turn": count, "floors": floors.document(), "ways": rows})


if __name__ == "__main__":
    main()
