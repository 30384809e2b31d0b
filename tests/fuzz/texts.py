"""Fuzzers of texts: prompts, what a model may answer, masks as run lengths, and the flags of the programs."""

import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
import torch
from PIL import Image

from paligemma import inference, tasks
from paligemma.errors import PaliGemmaError
from paligemma.objects import drawing, exports, masks, outputs, tables
from paligemma.objects.grammar import Grammar
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.programs import annotate, cluster, commandline, finetune, options, verbs
from tests.fuzz.harness import LONGEST_MESSAGE, Files, Fuzzer
from tests.fuzz.mutations import text
from tests.tiny_tokenizer import write_processor

PLACES = (
    "<loc0001>",
    "<loc1023>",
    "<loc0512>",
    "<loc0000>",
    "<seg000>",
    "<seg127>",
    "<loc1024>",
    "<seg128>",
    "<loc1>",
    "<loc0001",
)
CONTROLS = ("<image>", "<eos>", "<bos>", "<pad>", "<unk>", "<0x41>", "<0xE2>", "▁")
WORDS = (" ; ", ";", "\n", " cat", "red car", "detect ", "caption en", "answer en how many?", "=1+1", "@x", '"', ",", "\t", "é")


def as_bytes(value: str) -> bytes:
    return value.encode("utf-8", "surrogatepass")


def as_text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def make_processor(folder: Path) -> PaliGemmaProcessor:
    (folder / "config.json").write_text(json.dumps(write_processor(folder)))
    return PaliGemmaProcessor.from_pretrained(folder)


class Prompts(Fuzzer):
    """What a user, or a data set, asks."""

    name, codes = "prompts", (2, 3)

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.processor = make_processor(folder)

    def sound(self) -> Files:
        return {"prompt": b"detect cat ; dog"}

    def known(self) -> list[Callable[[], Files]]:
        made = [
            lambda: "\U0001f600" * 10**6, lambda: "<seg001>" * 10**5, lambda: "<image>" * 10**5, lambda: "<" * 10**6,
            lambda: "a" * 10**6, lambda: " " * 10**6, lambda: "\n" * 10**6, lambda: "▁" * 10**5, lambda: "a b " * 10**5,
            lambda: ";" * 10**5, lambda: "e\u0301" * 10**5, lambda: "\0" * 10**5, lambda: "", lambda: "\ud800",
            lambda: "\udc80" * 1000, lambda: "<eos>" * 3, lambda: " <image>\n",
            lambda: " ; ".join(f"name {i}" for i in range(20_000)), lambda: "<loc" * 10**5, lambda: "<0xF0>" * 10**5,
        ]  # fmt: skip
        return [lambda make=make: {"prompt": as_bytes(make())} for make in made]

    def make(self, random: Random) -> Files:
        prompt = text(random, WORDS + PLACES + CONTROLS)
        return {"prompt": as_bytes(prompt * 200 if random.random() < 0.02 else prompt)}

    def check(self, files: Files, folder: Path) -> None:  # noqa: ARG002  (no file is written)
        prompt, processor = as_text(files["prompt"]), self.processor
        for task in tasks.TASKS if len(prompt) < 1000 else ("detect",):
            asked = prompt if task in tasks.REQUIRED_TEXT else ""
            if asked.replace(";", "").strip() or task not in tasks.REQUIRED_TEXT:
                tasks.prompt(task, asked)
        tasks.read_count(prompt)
        tasks.split_objects(prompt)
        batch = processor(None, prompt, prompt, notes=[])
        answer = batch["labels"][0]
        ids = answer[answer != -100].tolist()
        assert ids.pop() == processor.eos_token_id
        control = (processor.image_token_id, processor.bos_token_id, processor.eos_token_id, processor.pad_token_id)
        assert not set(control) & set(ids), "a control token came from a text"
        if processor.control_ids.isdisjoint(ids):  # the tokenizer's own, such as <unk>, leave no text
            assert processor.decode(ids) == prompt.replace("▁", " "), "ids and back is another text"
        labels = [label for label in tasks.split_objects(prompt)[:20] if label]
        if labels:
            Grammar.for_objects(processor, labels)


class Answers(Fuzzer):
    """What a model says, as text and as ids; and everything that is made of it: tables, drawings, files of other tools."""

    name, codes = "answers", (3,)

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.processor = make_processor(folder)
        self.picture = Image.new("RGB", (40, 30))
        self.mask = np.zeros((30, 40), dtype=bool)
        self.mask[3:9, 5:20] = True

    def sound(self) -> Files:
        return {"answer": b"<loc0001><loc0002><loc0500><loc0600> cat ; <loc0001><loc0002><loc0300><loc0400> dog"}

    def known(self) -> list[Callable[[], Files]]:
        box = "<loc0001><loc0002><loc0500><loc0600>"
        made = [
            lambda: "<seg001>" * 10**5, lambda: "<loc0001>" * 10**5, lambda: f"{box} cat ; " * 3_000, lambda: ";" * 10**5,
            lambda: "\n" * 10**5, lambda: "<" * 10**6, lambda: "<loc" * 10**5, lambda: f"{box} " + "a" * 10**6,
            lambda: "a" * 10**6, lambda: "\U0001f600" * 10**5, lambda: f"{box} =HYPERLINK(1) ; {box} \u202eabc ; {box} \x1b[2J",
            lambda: f"{box} \ud800", lambda: f"{box}" + "<seg001>" * 16 + " cat", lambda: "a ; " * 10**4,
            lambda: "".join(f"<loc{i % 1024:04d}>" for i in range(8_000)), lambda: "",
        ]  # fmt: skip
        return [lambda make=make: {"answer": as_bytes(make())} for make in made]

    def make(self, random: Random) -> Files:
        box = "".join(random.choice(PLACES[:4]) for _ in range(4))
        mask = "".join(random.choice(PLACES[4:6]) for _ in range(16))
        return {"answer": as_bytes(text(random, WORDS + PLACES + CONTROLS[:3] + (box, box + mask)))}

    def check(self, files: Files, folder: Path) -> None:
        answer = as_text(files["answer"])
        reading = outputs.parse_text(answer)
        rows = [
            {
                "image": "a.jpg",
                "width": 40,
                "height": 30,
                "objects": [outputs.as_json(found, 40, 30) for found in reading.objects],
            }
        ]
        json.dumps(rows)
        for kind, name in (("coco", "a.json"), ("csv", "a.csv"), ("voc", "a.xml"), ("yolo", "a.txt")):
            exports.export(rows, kind, folder / kind / name)
        objects = reading.objects[:50]
        tables.listing(reading.objects, 40, 30)
        tables.table(reading.objects, 40, 30, is_colored=False)
        drawing.draw(self.picture, objects)
        try:
            answer.encode()
        except UnicodeEncodeError:
            return
        again = outputs.parse_text(outputs.to_suffix(objects))
        assert [found.locations and outputs.sort_corners(found.locations) for found in again.objects if found.box] == [
            outputs.sort_corners(found.locations) for found in objects if found.box
        ], "objects are not read back"
        if len(answer) < 2 * 10**5:
            self.check_ids(answer)

    def check_ids(self, answer: str) -> None:
        """The ids of the text, and of a text with ids that no text has, are read without a fault."""
        ids = self.processor.encode(answer)
        draw = Random(answer)
        for number in range(0, min(len(ids), 50), 7):
            ids[number] = draw.choice((0, 1, 2, 3, self.processor.image_token_id, 10**6, ids[0]))
        logprobs = [draw.choice((0.0, -1.5, -1e9, -float("inf"))) for _ in ids]
        moments = [draw.choice((None, (0.0, 0.0), (512.5, 500.0), (1023.0, 0.1))) for _ in ids]
        reading = outputs.parse_ids(torch.tensor(ids, dtype=torch.int64), self.processor, logprobs, moments)
        json.dumps([outputs.as_json(found, 40, 30) for found in reading.objects])
        drawing.draw(self.picture, reading.objects[:50])


class Masks(Fuzzer):
    """COCO's run lengths, as others wrote them."""

    name, codes = "masks", (3,)

    def sound(self) -> Files:
        return {"rle.json": b'{"size": [30, 40], "counts": [0, 1200]}'}

    def known(self) -> list[Callable[[], Files]]:
        sizes = (
            "[30, 40]",
            "[0, 0]",
            "[-1, -1200]",
            "[1e999, 1]",
            "[1.5, 2]",
            "[9223372036854775807, 2]",
            '["30", 40]',
            "30",
            "[30]",
            "null",
            "{}",
        )
        counts = (
            '"0"', '""', "[1200]", "[0, 1200]", "[-1, 1201]", f"[{10**400}]", '"' + "o" * 10**5 + '"', '"\\u00e9"',
            "[1.5, 1198.5]", "[[1200]]", '["1200"]', "null", "1200", "{}", "[" + "0," * 10**5 + "1200]", "[1e999]", "[NaN]",
            "[true]", "[9223372036854775807, 9223372036854775807]",
        )  # fmt: skip
        pairs = (
            [(size, '"0"') for size in sizes]
            + [("[30, 40]", count) for count in counts]
            + [("[100000, 100000]", "[10000000000]")]
        )
        return [
            lambda pair=pair: {"rle.json": b'{"size": %b, "counts": %b}' % tuple(map(str.encode, pair))} for pair in pairs
        ] + [
            lambda: {"rle.json": b"{}"},
            lambda: {"rle.json": b"[]"},
        ]

    def make(self, random: Random) -> Files:
        height, width = random.randint(1, 40), random.randint(1, 40)
        mask = np.array([random.random() < 0.3 for _ in range(height * width)]).reshape(height, width)
        rle = masks.to_rle(mask)
        counts = random.choice((rle["counts"], masks.run_lengths(mask)))
        if random.random() < 0.7 and counts:
            at = random.randrange(len(counts))
            more = (
                random.choice(("o", "0", "~", "\x7f"))
                if isinstance(counts, str)
                else [random.choice((0, -1, 2**63, 1.5, None, "1"))]
            )
            counts = counts[:at] + more + counts[at + random.randint(0, 1) :]
        return {"rle.json": json.dumps({"size": rle["size"], "counts": counts}).encode()}

    def check(self, files: Files, folder: Path) -> None:  # noqa: ARG002  (no file is written)
        mask = masks.from_rle(json.loads(files["rle.json"]))
        assert np.array_equal(masks.from_rle(masks.to_rle(mask)), mask), "run lengths and back is another mask"
        if mask.size < 10_000:
            masks.to_polygons(mask)


class Reached(PaliGemmaError):
    """The model would be loaded now: flags and pictures are fine."""


def reach(*_: object, **__: object) -> None:
    raise Reached("the model is loaded", code=0)


@contextmanager
def as_program(program: str, argv: list[str], stdin: bytes, folder: Path) -> Iterator[None]:
    """Inside, this process looks as if a user had started a program in a folder, and whatever would load a model says so."""
    before = os.getcwd()
    loaders = [(options.ModelFlags, "open"), (finetune, "train")]
    with ExitStack() as stack:
        for module, name in loaders:
            stack.enter_context(mock.patch.object(module, name, reach))
        stack.enter_context(mock.patch.dict(os.environ, {"HOME": str(folder)}))
        stack.enter_context(mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))))
        stack.enter_context(mock.patch.object(sys, "argv", [f"{program}.py", *argv]))
        stack.callback(os.chdir, before)
        stack.callback(logging.captureWarnings, False)
        os.chdir(folder)
        yield


class Flags(Fuzzer):
    """The arguments of each program, run up to the point where the model would be loaded."""

    name, codes = "flags", (0, 2, 3, 4, 5, 6, 7, 8)
    programs = {"inference": inference, "annotate": annotate, "finetune": finetune, "cluster": cluster}
    values = (
        "", "0", "1", "-1", "1e999", "nan", "inf", "-inf", "1e-46", "0.5", "9" * 5000, "1_000", "²", "true", "no", "None",
        "a.png", "b.png", "a.jsonl", "q.jsonl", "sub", "out.png", "out.json", "out.jsonl", "a.png,b.png", "-", "--", "~",
        "~nosuchuser/x", "a" * 300, "a\0b", "\udcff", "/dev/null", "/dev/full", "*.png", "[", "cat ; dog", "<image>", "en",
        "zz-ZZ", "int8", "bf16", "cpu", "cuda:99", "2/4", "0/0", "coco", "a.yaml", "sub/x.png", "http://127.0.0.1:1/x.png",
        "data:,x", "google/paligemma-3b-mix-224", "red", "#fff", "lora", "token", "exact,map", "\U0001f600", "x" * 20_000,
    )  # fmt: skip

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.names = {
            program: [field for field in module.Flags.__dataclass_fields__ if field != "positional"]
            for program, module in self.programs.items()
        }
        out = io.BytesIO()
        Image.new("RGB", (4, 4)).save(out, "PNG")
        line = b'{"image": "a.png", "prefix": "caption en", "suffix": "x"}\n'
        self.files = {
            "a.png": out.getvalue(), "b.png": b"no picture", "sub/x.png": out.getvalue(), "a.jsonl": line, "q.jsonl": line,
            "a.yaml": b"rows: 2\n", "names.txt": b"a.png\n\xff.png\n",
        }  # fmt: skip

    def sound(self) -> Files:
        return {"argv.json": b'["inference", "detect", "a.png", "cat", "--json"]'}

    def known(self) -> list[Callable[[], Files]]:
        argvs = [
            ["inference", "--model_path", "~nosuchuser/x"], ["inference", "caption", "~nosuchuser/x.png"],
            ["inference", "caption", "a" * 300 + ".png"], ["inference", "caption", "a.png", "--save", "a" * 300 + ".png"],
            ["inference", "caption", "a\0.png"], ["inference", "detect", "a.png", "sub"],
            ["inference", "detect", *(["a.png"] * 3000), "cat"],
            ["inference", "--image_file_path", ",".join(f"n{i}.png" for i in range(3000))],
            ["inference", "--image_file_path", "a.png", "--prompt", "\udcff"],
            ["inference", "--image_file_path", "~nosuchuser,a.png"],
            ["inference", "detect", "a.png", "cat", "--save", "~nosuchuser/o.png"],
            ["inference", "detect", "a.png", "cat", "--export", "~nosuchuser/o.json"],
            ["inference", "--explain", "a" * 300 + ".png"],
            ["inference", "segment", "a.png", "cat", "--mask_codec", "~nosuchuser/x"],
            ["annotate", "~x.png", "--output", "o.jsonl"], ["annotate", "~nosuchuser", "--output", "o.jsonl"],
            ["annotate", "*" * 2000, "--output", "o.jsonl"], ["annotate", "a.png", "--output", "~nosuchuser/o.jsonl"],
            ["annotate", "a.png", "--output", "a" * 300], ["annotate", "a.png", "--output", "a\0"],
            ["annotate", "--list", "~nosuchuser/x", "--output", "o.jsonl"],
            ["annotate", "--list", "a" * 300, "--output", "o.jsonl"], ["annotate", "--list", "a\0", "--output", "o.jsonl"],
            ["annotate", "--questions", "a\0", "--output", "o.jsonl"],
            ["annotate", "sub", "--task", "detect", "cat", "--save_dir", "~nosuchuser/d", "--output", "o.jsonl"],
            ["annotate", "sub", "--task", "detect", "cat", "--save_dir", "a\0", "--output", "o.jsonl"],
            ["annotate", "sub", "--task", "detect", "cat", "--save_dir", "a" * 300, "--output", "o.jsonl"],
            ["annotate", "**/" * 40 + "x.png", "--output", "o.jsonl"],
            ["annotate", "sub", "--shard", "²/4", "--output", "o.jsonl"], ["cluster", "~nosuchuser/x", "--output", "o.jsonl"],
            ["cluster", "a.png", "--output", "a\0"], ["finetune", "--train", "~nosuchuser/x", "--output", "r"],
            ["finetune", "--train", "a" * 300, "--output", "r"], ["finetune", "--train", "a\0", "--output", "r"],
            ["finetune", "--train", "a.jsonl", "--output", "~nosuchuser/r"],
            ["finetune", "--config", "~nosuchuser/x", "--train", "a.jsonl", "--output", "r"], ["finetune", "--config", "a\0"],
            ["finetune", "--config", "a" * 300], ["finetune", "--train", "a.jsonl", "--output", "r", "--lora_r", "9" * 5000],
            ["finetune", "--train", "a.jsonl", "--output", "r", "--clip", "nan"], ["inference", "--" + "x" * 10**6],
            ["inference", "x" * 10**6], ["inference", "--top_k", "9" * 5000], ["inference", *(["--json"] * 10**4)],
        ]  # fmt: skip
        return [lambda argv=argv: {"argv.json": json.dumps(argv).encode()} for argv in argvs]

    def make(self, random: Random) -> Files:
        program = random.choice(list(self.programs))
        argv = []
        if program == "inference" and random.random() < 0.6:
            argv = [random.choice((*tasks.TASKS, "detct")), random.choice(("a.png", "b.png", "sub", "a.png,b.png"))]
        elif program == "finetune" and random.random() < 0.8:
            argv = ["--train", "a.jsonl", "--output", "r"]
        elif random.random() < 0.8:
            argv = ["sub", "--output", "o.jsonl", "--task", random.choice(tasks.TASKS)]
        for _ in range(random.randint(0, 5)):
            kind, name = random.random(), random.choice(self.names[program])
            value = random.choice(self.values) if random.random() < 0.9 else text(random, (), 5)
            if kind < 0.5:
                argv.append(f"--{name}={value}")
            elif kind < 0.7:
                argv += [f"--{name}", value]
            elif kind < 0.8:
                argv.append(f"--{random.choice(('no', 'no_', '', '-'))}{name}")
            else:
                argv.append(value)
        return {"argv.json": json.dumps([program, *argv]).encode()}

    def check(self, files: Files, folder: Path) -> None:
        program, *argv = json.loads(files["argv.json"])
        module = self.programs[program]
        for name, data in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        stderr = io.StringIO()
        with as_program(program, argv, self.files["a.png"], folder), redirect_stderr(stderr):
            code = commandline.run(module.Flags, module.program, argv, verbs.HELP if module is inference else {})
        errors = [line for line in stderr.getvalue().splitlines() if line.startswith("error: ")]
        assert code in self.codes, f"exit code {code}: {errors}"
        assert len(errors) <= 1 and (errors or not code), errors
        is_short = all(len(line) < LONGEST_MESSAGE for line in errors) or any("debug" in word for word in argv)  # it asks for all
        assert is_short, f"a message of {len(errors[0])} letters: {errors[0][:200]}"


FUZZERS = (Prompts, Answers, Masks, Flags)
