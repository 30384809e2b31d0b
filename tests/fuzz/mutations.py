"""Damage: valid bytes, JSON and text in, nearly valid ones out. All of it is drawn from a `random.Random`, so a seed repeats it.

Random bytes are refused by the first check of every reader. What gets deeper is a valid file with one or two things wrong in it:
another type, a number that is not finite or has 400 digits, brackets nested without end, a key that stands twice.
Checked in tests/fuzz/test_fuzz.py.
"""

import copy
import json
import re
import struct
from random import Random

HUGE = str(10**400)
NUMBERS = (
    "0", "1", "2", "-1", "-2", "3.0", "0.5", "-0.0", "1e2", "1e308", "1e-400", "1e999", "-1e999", "NaN", "Infinity",
    "-Infinity", "4294967296", "9223372036854775807", "-9223372036854775808", "18446744073709551616", HUGE, f"-{HUGE}",
    f"{HUGE}.5", "9" * 5000,
)  # fmt: skip
TEXTS = (
    "", " ", "a", "\0", "\ud800", "\udfff\ud800", "\u202e", "\ufeff", "\U0001f600", "a" * 300, "x" * 20_000, "(", "[", "*",
    ".*", "1", "-1", "none", "None", "auto", "true", "float32", "int8", "<image>", "<eos>", "<loc0001>", "../x", "/etc/passwd",
    "/dev/zero", "..", ".", "/", "~", "~nosuchuser/x", "a/b", "a\\b", "C:\\x", "=1+1", "\x1b[2J", "\r\n", "%s%n", "{}", "${x}",
    "(([a-z_.0-9]+)+)+!",
)  # fmt: skip
CONTAINERS = (
    "[]", "{}", "[1]", "[null]", "[[1],[2]]", '{"a":1}', '{"":{}}', "[NaN]", '["a"]', "[" * 100 + "]" * 100,
    "[" * 5000 + "]" * 5000, '{"a":' * 300 + "1" + "}" * 300, "[" + "1," * 20_000 + "1]", "[" * 100_000,
)  # fmt: skip
SCALARS = ("null", "true", "false")
MARK = re.compile(r'"@@RAW(\d+)@@"')


def nasty_json(random: Random) -> str:
    """The text of a JSON value that a reader may not expect."""
    kind = random.random()
    if kind < 0.4:
        return random.choice(NUMBERS)
    if kind < 0.7:
        return json.dumps(random.choice(TEXTS))
    return random.choice(SCALARS if kind < 0.8 else CONTAINERS)


def damaged_json(random: Random, value: object, most: int = 3) -> bytes:
    """The text of a JSON value with one to `most` faults in it; sometimes the text itself is damaged."""
    value, raws = copy.deepcopy(value), []
    for _ in range(random.randint(1, most)):
        value = with_fault(random, value, raws)
    text = json.dumps(value, ensure_ascii=random.random() < 0.5)
    data = MARK.sub(lambda mark: raws[int(mark[1])], text).encode("utf-8", "surrogatepass")
    if random.random() < 0.1:
        data = random.choice(
            (b"\xef\xbb\xbf" + data, data.decode("utf-8", "replace").encode("utf-16"), b"\xff" + data, b"", b" ")
        )
    return damaged_bytes(random, data) if random.random() < 0.1 else data


def with_fault(random: Random, value: object, raws: list[str]) -> object:
    """The value with one fault, somewhere inside; text that json would not write is put into `raws` and marked."""

    def raw(text: str) -> str:
        raws.append(text)
        return f"@@RAW{len(raws) - 1}@@"

    holder, key = None, None
    place = value
    while isinstance(place, (dict, list)) and place and (holder is None or random.random() < 0.75):
        holder, key = place, random.choice(list(place)) if isinstance(place, dict) else random.randrange(len(place))
        place = holder[key]
    if holder is None:
        return raw(nasty_json(random))
    kind = random.random()
    if kind < 0.55:
        holder[key] = raw(nasty_json(random))
    elif kind < 0.65:
        del holder[key]
    elif kind < 0.75:
        holder[key] = random.choice(([place], {"": place}, [place, place], str(place)))
    elif kind < 0.85 and isinstance(holder, dict):
        holder[key] = raw(f"{json.dumps(place)}, {json.dumps(key)}: {nasty_json(random)}")  # the key twice
    elif kind < 0.95 and isinstance(holder, dict):
        holder[random.choice(TEXTS)] = place
    else:
        neighbour = random.choice(list(holder.values()) if isinstance(holder, dict) else holder)
        holder[key] = copy.deepcopy(neighbour)
    return value


def damaged_bytes(random: Random, data: bytes, most: int = 4) -> bytes:
    """The bytes with one to `most` faults: other values, numbers of 2, 4 and 8 bytes, cuts, repeats."""
    out = bytearray(data)
    for _ in range(random.randint(1, most)):
        if not out:
            return bytes(out)
        at, kind = random.randrange(len(out)), random.randrange(8)
        if kind == 0:
            out[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            out[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind in (2, 3):
            form = random.choice("<H >H <I >I <Q >Q".split())
            number = random.choice((0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1, len(data)))
            packed = struct.pack(form, number % 256 ** struct.calcsize(form))
            out[at : at + len(packed)] = packed
        elif kind == 4:
            del out[at : at + random.choice((1, 2, 16, 256))]
        elif kind == 5:
            out[at:at] = out[at : at + random.choice((1, 4, 64))] * random.choice((1, 2, 100))
        elif kind == 6:
            del out[at:]
        else:
            out[at:at] = bytes(random.choice((0, 10, 65, 255)) for _ in range(random.choice((1, 4, 32))))
    return bytes(out)


LETTERS = (
    "abc xyz", "0123456789", " \t\n\r\v\f", "\0\x07\x1b\x7f\x85", "äéß", "猫の写真", "مرحبا", "\u200b\u200d\u202e\ufeff",
    "👨‍👩‍👧🏽🇩🇪", "e\u0301a\u0308", "<>{}[]()|;:,.'\"\\/", "▁", "\ud800", "\udc80\udcff",
)  # fmt: skip


def text(random: Random, words: tuple[str, ...] = (), longest: int = 40) -> str:
    """A text of words that mean something to a reader, and of letters that few think of."""
    parts = []
    for _ in range(random.randint(0, longest)):
        if words and random.random() < 0.6:
            parts.append(random.choice(words))
        else:
            letters = random.choice(LETTERS)
            parts.append("".join(random.choice(letters) for _ in range(random.randint(1, 4))))
    return "".join(parts)
