"""Fuzzers of the files of a job and of a fine-tune: data sets, rows, lists, settings in YAML, the folder of a run."""

import io
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from random import Random

import torch
from PIL import Image

from paligemma.learning import dataset, run_folder, training
from paligemma.pictures import folders
from paligemma.processing_paligemma import PaliGemmaProcessor
from paligemma.programs import commandline, finetune, journal
from tests.fuzz.harness import Files, Fuzzer, write_files
from tests.fuzz.mutations import HUGE, damaged_bytes, damaged_json, nasty_json, text
from tests.tiny import make_model
from tests.tiny_tokenizer import write_processor

SUFFIXES = (
    "<loc0001><loc0002><loc0500><loc0600> cat",
    "cat",
    "",
    "<seg001>" * 16,
    "<loc9999>",
    "<loc0500>" * 3,
    " ; ",
    "<eos>",
    "\ud800",
)
NAMES = (
    "a.png", "b.png", "sub/../a.png", "../a.png", "/etc/passwd", "missing.png", "", ".", "a\0", "a" * 300, "http://h/a.png",
    "~", "link.png", "\ud800", "/".join(["a"] * 3000),
)  # fmt: skip


def picture() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    return out.getvalue()


def of(name: str, data: bytes) -> Callable[[], Files]:
    return lambda: {name: data}


class Datasets(Fuzzer):
    """A JSONL of examples to learn from, with its pictures."""

    name, codes = "datasets", (3,)

    def __init__(self, folder: Path):
        super().__init__(folder)
        config = write_processor(folder)
        (folder / "config.json").write_text(json.dumps(config))
        self.processor = PaliGemmaProcessor.from_pretrained(folder)
        self.pictures = {"a.png": picture(), "b.png": b"no picture", "c.png": damaged_bytes(Random(1), picture())}
        self.lines = [
            {"image": name, "prefix": "detect cat", "suffix": suffix} for name in ("a.png", "b.png") for suffix in SUFFIXES[:3]
        ]

    def sound(self) -> Files:
        return {"train.jsonl": json.dumps(self.lines[0]).encode() + b"\n"}

    def known(self) -> list[Callable[[], Files]]:
        line = b'{"image": "a.png", "prefix": "p", "suffix": "s"}\n'
        made = [
            b"", b"\n\n\n", b"\xef\xbb\xbf" + line, b"[" * 100_000, b"[" + line + b"]", b'{"images": [], "annotations": []}',
            b"\xff\n" + line, line * 2_000, b"x\n" * 20_000,
            b'{"image": "a.png", "prefix": "p", "suffix": "' + b"s" * (2 << 20) + b'"}\n', b'{"a":' * 3000 + b"\n",
            b'{"image": "a.png", "prefix": "p", "suffix": ' + HUGE.encode() + b"}\n",
            b'{"image": "a.png", "prefix": "p", "suffix": 1}\n', b'{"image": "a.png", "prefix": "\\ud800", "suffix": ""}\n',
            b'{"image": "link.png", "prefix": "p", "suffix": ""}\n', b"\0" * 10**6,
            b'{"image": "a.png", "prefix": "p", "suffix": "' + b"<loc0001>" * 100_000 + b'"}\n',
            line.replace(b"a.png", b"a" * 300),
            b'{"image": "a.png", "prefix": "p", "suffix": "' + "😀".encode() * 200_000 + b'"}\n', line + line[:-5],
        ]  # fmt: skip
        return [of("train.jsonl", data) for data in made]

    def make(self, random: Random) -> Files:
        lines = []
        for _ in range(random.randint(1, 5)):
            record = {"image": random.choice(NAMES), "prefix": text(random, SUFFIXES, 4), "suffix": text(random, SUFFIXES, 6)}
            record = record if random.random() < 0.5 else random.choice(self.lines)
            line = damaged_json(random, record) if random.random() < 0.6 else json.dumps(record).encode("utf-8", "surrogatepass")
            lines.append(line)
        return {"train.jsonl": random.choice((b"\n", b"\r\n", b"\n\n")).join(lines)}

    def check(self, files: Files, folder: Path) -> None:
        write_files(self.pictures, folder)
        (folder / "link.png").symlink_to("/etc/passwd")
        write_files(files, folder)
        splits = [dataset.read_split(folder / "train.jsonl") for _ in range(2)]
        for split in splits:
            dataset.check_pictures(split)
            dataset.check_texts(split, self.processor, max_text_tokens=256)
            split.fingerprint()
            assert all(example.image.resolve().is_relative_to(folder.resolve()) for example in split.examples), (
                "outside of the folder"
            )
        dataset.compare(*splits)
        dataset.require_usable(splits, skip_bad=True)
        examples = dataset.Examples(splits[0], self.processor, "zoom")
        examples.batch([(0, index) for index in range(min(2, len(splits[0].examples)))])


class Journals(Fuzzer):
    """The file of rows that a job goes on with."""

    name, codes = "journals", (2, 7)
    settings = {"task": "detect", "text": "cat", "min_score": None}

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.lines: list[dict] = [
            {"journal": 1, "settings": self.settings},
            {
                "image": "a.png",
                "prompt": "detect cat",
                "width": 8,
                "height": 8,
                "text": "",
                "objects": [{"label": "cat", "box": [1, 2, 3, 4]}],
            },
            {"image": "b.png", "prompt": "detect cat", "error": {"code": 3, "type": "ImageError", "message": "no", "path": None}},
        ]

    def sound(self) -> Files:
        return {"rows.jsonl": b"".join(json.dumps(line).encode() + b"\n" for line in self.lines)}

    def known(self) -> list[Callable[[], Files]]:
        head = json.dumps(self.lines[0]).encode() + b"\n"
        made = [
            b"", b"\n", b'{"jour', head[:-1], head + b"[" * 100_000 + b"\n", head + b'{"image": "a", "prompt": "b"',
            head + b"\xff\n", head + b"null\n", head + b"1\n", head + b'"journal"\n', head + b'["journal"]\n',
            b'{"journal": 1, "settings": ' + b"[" * 5000 + b"]" * 5000 + b"}\n",
            b'{"journal": ' + HUGE.encode() + b', "settings": {}}\n', b'{"journal": 1e999, "settings": {}}\n',
            b'{"journal": 1, "settings": {"task": 1e999}}\n', b'{"journal": true, "settings": {"task": {"a": NaN}}}\n',
            head + b'{"image": "\\ud800", "prompt": "\\udfff"}\n', head * 5_000,
            b'{"journal": 1, "settings": {"' + b"x" * 10**6 + b'": 1}}\n',
            b'{"journal": 1, "settings": {"task": "' + b"x" * 10**6 + b'"}}\n',
            head + b'{"image": "a", "prompt": "b", "error": 1}\n',
            b'{"journal": 1, "settings": {' + b",".join(b'"%d": 1' % i for i in range(10**4)) + b"}}\n",
        ]  # fmt: skip
        return [of("rows.jsonl", data) for data in made]

    def make(self, random: Random) -> Files:
        lines = [json.dumps(line).encode() for line in self.lines]
        for _ in range(random.randint(1, 2)):
            at = random.randrange(3)
            lines[at] = damaged_json(random, self.lines[at])
        data = b"\n".join(lines) + b"\n"
        return {"rows.jsonl": damaged_bytes(random, data) if random.random() < 0.2 else data}

    def check(self, files: Files, folder: Path) -> None:
        write_files(files, folder)
        path = folder / "rows.jsonl"
        for retry in (False, True):
            with journal.Journal(path, self.settings, is_forced=retry, retry_failed=retry) as rows:
                rows.knows("a.png", "detect cat")
                rows.write({"image": "new.png", "prompt": str(retry), "text": "x"})
        with journal.Journal(path, self.settings) as rows:
            assert rows.knows("new.png", "True") and rows.num_failed == 0, "a row was lost"


class Lists(Fuzzer):
    """The files of --list and --questions."""

    name, codes = "lists", (3,)

    def sound(self) -> Files:
        return {"list": b'{"image": "a.png", "prefix": "caption en"}\n'}

    def known(self) -> list[Callable[[], Files]]:
        question = b'{"image": "a.png", "prefix": "caption en"}\n'
        made = [
            b"", b"\0\n", b"~nosuchuser/x\n", b"a" * 300 + b"\n", b"a/" * 3000 + b"\n", b"a" * 10**7, b"\n" * 10**6, question,
            question * 5_000, b"[" * 10**5, b'{"a":' * 3000 + b"\n", b'{"image": 1, "prefix": "a"}\n',
            b'{"image": "", "prefix": "a"}\n', b"[]\n", b'"image"\n', b"\xff\xfe\n", b'{"image": "\\u0000", "prefix": "a"}\n',
            b'{"image": "\\ud800", "prefix": "\\udfff"}\n', b'{"image": ' + b"9" * 5000 + b"}\n", b"\xef\xbb\xbf" + question,
            b'{"image": "http://127.0.0.1:1/a.png", "prefix": "a"}\n', b"http://127.0.0.1:1/a.png\nhttp://[\n", b"data:,\n",
            b"x" * 10**6 + b"\n" + question,
        ]  # fmt: skip
        return [of("list", data) for data in made]

    def make(self, random: Random) -> Files:
        lines = []
        for _ in range(random.randint(1, 4)):
            name = random.choice((*NAMES, text(random, NAMES, 4)))
            record = {"image": name, "prefix": text(random, (), 4)}
            lines.append(damaged_json(random, record) if random.random() < 0.6 else name.encode("utf-8", "surrogatepass"))
        data = b"\n".join(lines)
        return {"list": damaged_bytes(random, data) if random.random() < 0.2 else data}

    def check(self, files: Files, folder: Path) -> None:
        write_files(files, folder)
        path = str(folder / "list")
        for place in islice(folders.in_list(path), 1000):
            self.look_at(place, folder)
        for image, prefix in folders.questions(path):
            assert isinstance(image, str) and isinstance(prefix, str)
            self.look_at(image, folder)

    def look_at(self, place: str, folder: Path) -> None:
        """Reads a picture as a job does: what is wrong with it becomes a row, and ends nothing."""
        loaded = folders.load(str(folder / place) if "://" not in place else place, side=28)
        folders.shard_of(place, 3)
        assert loaded.size or loaded.picture.message


class Yaml(Fuzzer):
    """The settings of a fine-tune in a YAML file."""

    name, codes = "yaml", (2, 3)

    def sound(self) -> Files:
        return {"a.yaml": b"seed: 2\nscores: [exact, vqa]\n# a comment\nlora_alpha: 16\n"}

    def known(self) -> list[Callable[[], Files]]:
        levels = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
            f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
        )
        made = [
            levels, f"scores: [{levels.splitlines()[0][4:]}, *a0]", "seed: !!int ''", "seed: !!bool maybe", "seed: !!float x",
            "seed: !!timestamp x", "seed: !!python/object/apply:os.system [ls]", "seed: !!binary x", "seed: !!set {a, b}",
            "seed: !!omap [a: 1]", "seed: !!pairs [a: 1]", "seed: !!null x", "seed: 0x" + "f" * 5000, "seed: 0b" + "1" * 20_000,
            "seed: " + "9" * 5000, "seed: " + "1:" * 5000 + "1", "? [a]\n: 1", "{a: 1}: 2", "? {a: 1}\n: 2", "&a [*a]",
            "seed: &a [*a]", "seed: &a {b: *a}", "<<: *a", "<<: {seed: 2}", "<<: [1]", "seed: 2000-13-45", "seed: 2000-01-01",
            "[" * 100_000, "a: " * 10_000, "- " * 10_000, "seed: |\n" + " a\n" * 10_000, "seed: \"\\ud800\"", "seed: \"\\x00\"",
            "%YAML 9.9\n---\nseed: 2", "%TAG ! x\n---\n!a b", "--- a\n--- b", "seed: 1e999", "seed: .nan", "lora_alpha: .inf",
            "train: [a, [b]]", "train: [null]", "train: {a: 1}", "null: 1", "1: 1", "true: 1", "seed: 2\nseed: 3",
            "debug: [true]", "=: 1", "seed: =", "\t", "a\tb", "\ufeffseed: 2", "seed: 2 # \U0001f600", "{" * 3000 + "}" * 3000,
            "x" * 10**6, "config: a.yaml", "train: \"a\\nb\"", "seed: " + "x" * 10**6, "x" * 300 + ": 1",
            "learning_rate_language_model: Xwhere", "seed: !", "seed: ! 2", "seed: !x 2",
        ]  # fmt: skip
        return [of("a.yaml", value.encode("utf-8", "surrogatepass")) for value in made] + [
            of("a.yaml", b"\xff\xfe"),
            of("a.yaml", b"\0"),
            of("a.yaml", b""),
        ]

    def make(self, random: Random) -> Files:
        names = [name for name in finetune.Flags.__dataclass_fields__ if name != "config"]
        tags = (
            "",
            "",
            "",
            "!!int ",
            "!!float ",
            "!!bool ",
            "!!str ",
            "!!null ",
            "!!seq ",
            "!!map ",
            "!!timestamp ",
            "&a ",
            "!x ",
        )
        lines = []
        for _ in range(random.randint(1, 6)):
            value = random.choice(
                (nasty_json(random), text(random, ("*a", "&a ", "1", "[", "]", "- ", "? ", ": ", "#"), 5), "2", "a, b")
            )
            lines.append(f"{random.choice((*names, '<<', '? a', '- b', ''))}: {random.choice(tags)}{value}")
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
        return {"a.yaml": damaged_bytes(random, data) if random.random() < 0.3 else data}

    def check(self, files: Files, folder: Path) -> None:
        write_files(files, folder)
        commandline.read_flags(finetune.Flags, ["--config", str(folder / "a.yaml"), "--train", "a.jsonl", "--output", "r"])


class Runs(Fuzzer):
    """What a fine-tune left in its folder, when it goes on."""

    name, codes = "runs", (2, 4)
    settings = {"train": "a", "micro_batch_size": 4, "learning_rate": 0.1, "data": "d", "model": "m"}

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.folder = folder
        model = make_model("gemma")
        training.freeze_except(model, ("projector",))
        self.trainer = training.Trainer(model, training.Plan(steps=4), lambda _: {}, 8)
        self.trainer.save(folder / "checkpoints")
        self.step = next((folder / "checkpoints").iterdir())
        self.state = json.loads((self.step / run_folder.STATE_NAME).read_text())
        self.metrics = [{"step": 0, "loss": 1.5, "grad_norm": 0.1, "learning_rate": 1e-5}, {"step": 0, "exact": 0.5}]

    def sound(self) -> Files:
        return {"state.json": json.dumps(self.state).encode(), "settings.json": json.dumps(self.settings).encode()}

    def known(self) -> list[Callable[[], Files]]:
        numbers = ("1e999", "NaN", HUGE, "-1", "1.5", '"1"', "null", "[]", "9223372036854775808", "true", "1e300")
        states = [b'{"step": %b, "updates": 1, "bad_steps": 0}' % number.encode() for number in numbers]
        states += [b'{"step": 1, "updates": %b, "bad_steps": 0}' % number.encode() for number in numbers]
        states += [b"", b"[]", b"1", b'"step"', b"\xff", b"[" * 10**5, b"{}"]
        made = [of("state.json", data) for data in states]
        made += [of("metrics.jsonl", b'{"step": ' + number.encode() + b', "loss": 1}\n') for number in numbers]
        made += [of("metrics.jsonl", b'{"step": 0, "loss": ' + number.encode() + b"}\n") for number in numbers]
        made += [
            of("metrics.jsonl", data)
            for data in (b"[" * 10**5 + b"\n", b"\xff\n", b"{}\n", b"[]\n", b'{"step": 0, "\\ud800": 1}\n', b'{"a": 1}\n' * 10**5)
        ]
        made += [
            of("settings.json", data)
            for data in (
                b"",
                b"[]",
                b"[" * 10**5,
                b'{"micro_batch_size": 1e999}',
                b'{"micro_batch_size": ' + HUGE.encode() + b"}",
                b'{"micro_batch_size": "' + b"x" * 10**6 + b'"}',
            )
        ]
        return made

    def make(self, random: Random) -> Files:
        name = random.choice(("state.json", "settings.json", "metrics.jsonl", "weights"))
        if name == "metrics.jsonl":
            return {name: b"\n".join(damaged_json(random, random.choice(self.metrics)) for _ in range(3))}
        if name == "weights":
            files = sorted(self.step.glob("*.safetensors"))
            return {files[0].name: damaged_bytes(random, files[0].read_bytes(), most=2)}
        return {name: damaged_json(random, self.state if name == "state.json" else self.settings)}

    def check(self, files: Files, folder: Path) -> None:
        step = folder / "checkpoints" / self.step.name
        step.mkdir(parents=True)
        for path in self.step.iterdir():
            (step / path.name).symlink_to(path)
        for name, data in files.items():
            write_files({name: data}, folder if name in ("settings.json", "metrics.jsonl") else step)
        run_folder.check_settings(folder, self.settings)
        before = [parameter.detach().clone() for parameter in self.trainer.trained.values()]
        try:
            self.trainer.restore(run_folder.checkpoints(folder / "checkpoints")[-1])
            step_now = self.trainer.step
            assert 0 <= self.trainer.updates <= step_now and self.trainer.bad_steps >= 0, "numbers that no run has"
        finally:
            with torch.no_grad():
                for parameter, values in zip(self.trainer.trained.values(), before, strict=True):
                    parameter.copy_(values)
            self.trainer.step = self.trainer.updates = self.trainer.bad_steps = 0
        log = run_folder.Log(folder, 2, with_tensorboard=False)
        log.write({"step": 1, "loss": 0.5, "grad_norm": 1.0, "learning_rate": 1e-5})
        log.draw()


FUZZERS = (Datasets, Journals, Lists, Yaml, Runs)
