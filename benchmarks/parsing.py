"""How many answers are parsed correctly? Compares outputs.py with supervision on texts with hand-written expected results.

    python -m benchmarks.parsing          (pip install supervision)

Each case is a text and the objects that it contains: label and box (y first, in 1/1023 of the picture's side). A parser is right
if it finds exactly these objects in this order, with each box within 2 pixels in a picture of 1000 x 1000. This tolerance accepts
parsers that divide by 1024 instead; one case has a picture of 4000 pixels, where the difference is visible at the right edge. The
texts in "faults" are malformed. What they should give is a convention: swapped corners are put in order, incomplete boxes are
left out, repeated objects count once, and a box without a label is kept. The last line of the output is JSON.
"""

import argparse
import json
import sys
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from paligemma.objects.outputs import NormalizedBox, parse_text
from paligemma.vocabulary import CODE_TOKENS, LOCATION_TOKENS

ROOT = Path(__file__).resolve().parent.parent
CAT, DOG, ALL = (100, 200, 300, 400), (500, 20, 900, 1000), (0, 0, 1023, 1023)
CODES = "".join(CODE_TOKENS[:16])
SIZE, TOLERANCE = 1000, 2  # pixels
Objects = list[tuple[str, tuple[float, ...]]]  # label and box


def loc(box: tuple[int, ...]) -> str:
    return "".join(LOCATION_TOKENS[value] for value in box)


C, D = loc(CAT), loc(DOG)
# group: list of (text, expected objects) or (text, expected objects, (side of the picture, tolerance) in pixels)
CASES = {
    "labels": [
        (f"{C} cat", [("cat", CAT)]),
        (f"{C} red car", [("red car", CAT)]),
        (f"{C} red-and-white car", [("red-and-white car", CAT)]),
        (f"{C} person's hat", [("person's hat", CAT)]),
        (f"{C} AC/DC poster", [("AC/DC poster", CAT)]),
        (f"{C} naïve café", [("naïve café", CAT)]),
        (f"{C} 猫", [("猫", CAT)]),
        (f"{C} 😀 face", [("😀 face", CAT)]),
        (f"{C} 50% off!", [("50% off!", CAT)]),
        (f"{C} St. Bernard", [("St. Bernard", CAT)]),
        (f"{C} number 7 (red)", [("number 7 (red)", CAT)]),
        (f"{C} black & white", [("black & white", CAT)]),
    ],
    "form": [
        ("", []),
        (f"{C} cat ; {D} dog", [("cat", CAT), ("dog", DOG)]),
        (f"{C} cat ; {D} cat", [("cat", CAT), ("cat", DOG)]),
        (f"{C} cat;{D} dog", [("cat", CAT), ("dog", DOG)]),
        (f"{C} cat  ;  {D}  dog", [("cat", CAT), ("dog", DOG)]),
        (f"{C}cat", [("cat", CAT)]),
        (f"{C}  cat", [("cat", CAT)]),
        (f"{C} cat\n", [("cat", CAT)]),
        (f"{C} cat\nthat is all", [("cat", CAT)]),
        (f"{C} cat\n{D} dog", [("cat", CAT), ("dog", DOG)]),
        (f"{C} cat {D} dog", [("cat", CAT), ("dog", DOG)]),
        (f"{C} cat ;", [("cat", CAT)]),
        (f"{C}{CODES} cat", [("cat", CAT)]),
        (f"{C}{CODES} cat ; {D}{CODES} dog", [("cat", CAT), ("dog", DOG)]),
        (f"{loc(ALL)} sky", [("sky", ALL)], (4000, 1)),
    ],
    "faults": [
        ("there is no cat", []),
        ("<loc0100>", []),
        ("<loc0100><loc0200><loc0300> cat", []),
        (f"{C} cat ; <loc0500><loc0020>", [("cat", CAT)]),
        (f"<loc0100><loc0200> cat ; {D} dog", [("dog", DOG)]),
        (f"{C} cat ; {C} cat ; {C} cat", [("cat", CAT)]),
        (f"{loc((300, 200, 100, 400))} cat", [("cat", CAT)]),
        (f"{loc((100, 400, 300, 200))} cat", [("cat", CAT)]),
        (f"{C}{CODES}", [("", CAT)]),
        (f"{C}", [("", CAT)]),
        (f"{C} ; {D} dog", [("", CAT), ("dog", DOG)]),
        (f"{C}{CODES[:-8]} cat", [("cat", CAT)]),
        (f"{C} cat ; dog", [("cat", CAT)]),
        ("<loc9999><loc0200><loc0300><loc0400> cat", []),
        (f"{CODES} cat", []),
    ],
}


def ours(text: str, side: int) -> Objects:
    found = [found for found in parse_text(text).objects if found.box is not None]
    return [(one.label, one.box.xyxy(side, side)) for one in found]


def theirs(text: str, side: int) -> Objects:
    import supervision

    detections = supervision.Detections.from_vlm(supervision.VLM.PALIGEMMA, text, resolution_wh=(side, side))
    return list(zip(map(str, detections.data["class_name"]), map(tuple, detections.xyxy.tolist()), strict=True))


def is_right(found: Objects, wanted: Objects, side: int, tolerance: float) -> bool:
    if [label for label, _ in found] != [label for label, _ in wanted]:
        return False
    true = [NormalizedBox.from_locations(bins).xyxy(side, side) for _, bins in wanted]
    pairs = [pair for (_, box), right in zip(found, true, strict=True) for pair in zip(box, right, strict=True)]
    return all(abs(a - b) <= tolerance for a, b in pairs)


def short(text: str) -> str:
    """The text for the printed table, with a symbol for each box and each mask."""
    for tokens, sign in ((C, "□cat"), (D, "□dog"), (loc(ALL), "□all"), (CODES, "▦"), (CODES[:-8], "▦⅞")):
        text = text.replace(tokens, sign)
    return text.replace("\n", "\\n")[:56]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sides = {"ours": ours, "supervision": theirs}
    warnings.filterwarnings("ignore", message="OpenCV")
    if find_spec("supervision") is None:
        del sides["supervision"]
        print("note: supervision is not installed, only our parser is tested. pip install supervision adds it.", file=sys.stderr)
    result: dict = {"cases": sum(map(len, CASES.values()))}
    counts = {name: dict.fromkeys(CASES, 0) for name in sides}
    for group, cases in CASES.items():
        print(f"\n{group:58}" + "".join(f"{name:>13}" for name in sides))
        for text, wanted, *frame in cases:
            side, tolerance = frame[0] if frame else (SIZE, TOLERANCE)
            verdicts = [is_right(read(text, side), wanted, side, tolerance) for read in sides.values()]
            for name, verdict in zip(sides, verdicts, strict=True):
                counts[name][group] += verdict
            words = "".join(f"{'right' if verdict else 'wrong':>13}" for verdict in verdicts)
            print(f"  {short(text) or '(nothing)':56}{words}")
    for name in sides:
        result[name] = counts[name] | {"all": sum(counts[name].values())}
        groups = ", ".join(f"{group} {right} of {len(CASES[group])}" for group, right in counts[name].items())
        print(f"\n{name}: {result[name]['all']} of {result['cases']} right ({groups})")
    if "supervision" in sides:
        result["version"] = version("supervision")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
