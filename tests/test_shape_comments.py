"""Every shape comment of the modeling files and of generation.py is true, and every line that has one is run here.

A comment such as `# [B, N, L, E]` or `# [..., E/2], [..., E/2]` at the end of a line claims the shapes of what the line
assigns or returns. Tiny models run in which every letter of a file stands for another number, under a tracer that compares each
claim when its statement is done. In modeling_siglip.py the letters have the numbers of the vision tower.

A letter means the same in every file: LEGEND is the table in docs/reading.md, and the header of each file agrees with it.
"""

import ast
import itertools
import re
import sys
import tokenize
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import pytest
import torch

from paligemma import generation
from paligemma.configuration import PaliGemmaConfig
from paligemma.generation import Sampling, generate_greedy, generate_steps, join_rows, sample, sample_allowed, split_rows
from paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration, prefix_lm_mask, suffix_loss
from tests.tiny import fill

ROOT = Path(__file__).parent.parent
SIGLIP, GEMMA, PALIGEMMA, GENERATION = "modeling_siglip.py", "modeling_gemma.py", "modeling_paligemma.py", "generation.py"
BRACKETS = re.compile(r"#\s*(\[[^][]*\](?:\s*,\s*\[[^][]*\])*)\s*$")


# What each letter stands for in every file: a word or two that must be among those of its header.
LEGEND = {
    "B": "rows|texts", "I": "images", "C": "channels", "H": "pixels", "W": "pixels", "P": "patches", "L": "tokens",
    "S": "slots|keys", "D": "width|model", "F": "MLP", "N": "query heads", "K": "key/value heads", "E": "width of one head",
    "V": "vocabulary", "M": "masks", "O": "outputs", "X": "inputs", "G": "groups", "R": "rank", "A": "candidates", "Q": "bins",
    "T": "tokens of the answer|answer tokens", "U": "words of the answer", "Z": "width of a code",
}  # fmt: skip


# The checker


@dataclass(frozen=True)
class Claim:
    """One comment: where it stands, the lines of its statement, what is assigned (nothing = returned), the shapes claimed."""

    path: Path
    line: int
    first: int
    last: int
    targets: tuple[str, ...]
    shapes: tuple[tuple[str, ...], ...]

    def __str__(self):
        return f"{self.path.name}:{self.line}: " + ", ".join(f"[{', '.join(shape)}]" for shape in self.shapes)


def read_claims(path: Path) -> list[Claim]:
    """All claims of a file. Raises ValueError, with file:line, for a comment that looks like one and cannot be read."""
    source = path.read_text(encoding="utf-8")
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Assign, ast.Return))]
    claims = []
    for token in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__):
        is_trailing = token.type == tokenize.COMMENT and token.line[: token.start[1]].strip()
        if not is_trailing or not re.match(r"#\s*\[[A-Z0-9.]", token.string):
            continue
        line, found = token.start[0], BRACKETS.match(token.string)
        if not found:
            raise ValueError(f"{path.name}:{line}: {token.string!r} is no list of shapes.")
        around = [node for node in statements if node.lineno <= line <= node.end_lineno]
        if not around:
            raise ValueError(f"{path.name}:{line}: a shape is claimed where nothing is assigned or returned.")
        node = max(around, key=lambda node: node.lineno)
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        parts = target.elts if isinstance(target, ast.Tuple) else [target] if target else []
        shapes = tuple(tuple(part.strip() for part in shape.split(",")) for shape in re.findall(r"\[([^][]*)\]", found.group(1)))
        if len(shapes) != max(len(parts), 1):
            raise ValueError(f"{path.name}:{line}: {len(shapes)} shapes are claimed for {max(len(parts), 1)} values.")
        names = tuple(ast.unparse(part) for part in parts)
        claims.append(Claim(path, line, node.lineno, node.end_lineno, names, shapes))
    return claims


def letters_in(claim: Claim) -> set[str]:
    return {letter for shape in claim.shapes for part in shape for letter in re.findall("[A-Z]", part)}


def is_shape(claimed: tuple[str, ...], letters: dict[str, int], shape: object) -> bool:
    """Whether `[..., N*E]` or `[B, L-1]`, with these numbers for the letters, is the shape; dots stand for any beginning."""
    if not isinstance(shape, list):
        return False
    if claimed[0] == "...":
        claimed = claimed[1:]
        shape = shape[len(shape) - len(claimed) :]
    return shape == [eval(part, {"__builtins__": {}}, letters) for part in claimed]


@dataclass
class Checker:
    """Compares claims with what happens while `running`.

    Attributes:
        ran: the claims whose statement was run.
        problems: a line of text for each false claim.
    """

    claims: list[Claim]
    letters: dict[str, dict] = field(default_factory=dict)
    ran: set[Claim] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def running(self, **letters: dict):
        """Traces the files named (without .py); each comes with the number, or the numbers, that each letter may stand for."""
        self.letters = {f"{name}.py": numbers for name, numbers in letters.items()}
        before = sys.gettrace()
        sys.settrace(self.enter)
        try:
            yield
        finally:
            sys.settrace(before)

    def enter(self, frame: FrameType, _event: str, _value: object):
        path = Path(frame.f_code.co_filename)
        if path.name not in self.letters or frame.f_code.co_name.startswith("<"):  # a comprehension is part of its statement
            return None
        claim_at = {line: c for c in self.claims if c.path == path for line in range(c.first, c.last + 1)}
        current = None

        def follow(frame: FrameType, event: str, value: object):
            """Called before each line of the frame: a claim is compared when the frame has left its statement."""
            nonlocal current
            reached = claim_at.get(frame.f_lineno)
            if event == "exception":
                current = None
            elif current is not None and (event == "return" or reached is not current):
                self.compare(current, frame, value)
                current = None
            if event == "line":
                current = reached
            return follow

        return follow

    def compare(self, claim: Claim, frame: FrameType, returned: object) -> None:
        self.ran.add(claim)
        values = [eval(name, frame.f_globals, frame.f_locals) for name in claim.targets] or [returned]
        shapes = [list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__ for value in values]
        numbers = {name: n if isinstance(n, tuple) else (n,) for name, n in self.letters[claim.path.name].items()}
        unknown = letters_in(claim) - set(numbers)
        if unknown:
            self.problems.append(f"{claim} uses {sorted(unknown)}, which stand for nothing here.")
            return
        used = sorted(letters_in(claim))
        for choice in itertools.product(*(numbers[letter] for letter in used)):
            letters = dict(zip(used, choice, strict=True))
            if all(is_shape(claimed, letters, shape) for claimed, shape in zip(claim.shapes, shapes, strict=True)):
                return
        self.problems.append(f"{claim} is false: {shapes} where { ({letter: numbers[letter] for letter in used}) }.")


# The models that run


TOWER = {"C": 3, "H": 70, "W": 70, "P": 25, "D": 143, "N": 11, "E": 13, "F": 71}
DECODER = {"D": 41, "F": 53, "K": 2, "N": 6, "E": 22, "V": 211}
ROWS, PICTURES, LENGTH, WINDOW = 5, 7, 61, 8  # B, I, L of the longest row
IMAGE = 200


def make_model(family: str, window: bool = False) -> PaliGemmaForConditionalGeneration:
    text = {"model_type": family, "hidden_size": 41, "intermediate_size": 53, "num_hidden_layers": 2, "num_attention_heads": 6,
            "num_key_value_heads": 2, "head_dim": 22, "vocab_size": 211}  # fmt: skip
    text |= {"sliding_window": WINDOW if window else None}
    vision = {"hidden_size": 143, "intermediate_size": 71, "num_hidden_layers": 1, "num_attention_heads": 11,
              "image_size": 70, "patch_size": 14}  # fmt: skip
    raw = {"model_type": "paligemma", "image_token_index": IMAGE, "text_config": text, "vision_config": vision}
    model = PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_hf(raw), sliding_window="config" if window else None)
    return fill(model, 0).eval()


def make_batch(lengths: list[int]) -> dict:
    """Five rows of 2, 1, 1, 2 and 1 pictures of 25 patches, right-padded to the longest."""
    input_ids = torch.randint(3, IMAGE, (ROWS, max(lengths)), generator=torch.Generator().manual_seed(0))
    for i, pictures in enumerate((2, 1, 1, 2, 1)):
        input_ids[i, : 25 * pictures] = IMAGE
    attention_mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    pixels = torch.rand(PICTURES, 3, 70, 70, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "token_type_ids": (torch.arange(max(lengths)) >= 58).long().expand(ROWS, -1),
        "pixel_values": pixels,
    }


def run_models(checker: Checker) -> None:
    """Forward, loss, prefill, decode, and a chunk of tokens that is neither 1 nor all that the cache holds."""
    batch = make_batch([LENGTH, 31, 40, 55, 29])
    for model in (make_model("gemma"), make_model("gemma2"), make_model("gemma2", window=True)):
        tower = TOWER | {"I": PICTURES}
        with checker.running(modeling_siglip=tower):
            model.vision_tower(batch["pixel_values"])
        whole = {"modeling_gemma": DECODER | {"B": ROWS, "L": LENGTH, "S": LENGTH}}
        whole["modeling_paligemma"] = {"B": ROWS, "L": LENGTH, "I": PICTURES, "P": 25, "D": 41, "V": 211}
        with checker.running(**whole):
            logits = model(**batch)
            for reduction in ("example", "token"):
                suffix_loss(logits, batch["input_ids"], reduction)
            prefix_lm_mask(batch["attention_mask"], batch["token_type_ids"], WINDOW)
            cache = model.new_cache(ROWS, LENGTH + 40)
            model.prefill(cache, **batch)
        for step in (1, 2):
            one = {
                "modeling_gemma": DECODER | {"B": ROWS, "L": 1, "S": LENGTH + step},
                "modeling_paligemma": {"B": ROWS, "D": 41, "V": 211},
            }
            with checker.running(**one):
                model.decode(cache, torch.arange(3, 3 + ROWS))
        run_chunk(checker, model, cache)


def run_chunk(checker: Checker, model: PaliGemmaForConditionalGeneration, cache: object) -> None:
    """13 more tokens in each row at once, so that L and S are two numbers."""
    chunk = 13
    position_ids = cache.lengths[:, None] + torch.arange(1, chunk + 1)
    cache.set_lengths(cache.lengths + chunk)
    mask = torch.arange(1, cache.slots_read + 1) <= position_ids[..., None]
    embeds = model.language_model.model.embed_tokens(torch.full((ROWS, chunk), 9))
    with checker.running(modeling_gemma=DECODER | {"B": ROWS, "L": chunk, "S": cache.slots_read}):
        model.language_model.model(embeds, position_ids, mask[:, None], cache)


def run_generation(checker: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one length, so that L is one number; greedy, with top_k, and a top_p that looks three times for candidates."""
    monkeypatch.setattr(generation, "FIRST_CANDIDATES", 13)
    inputs = make_batch([LENGTH] * ROWS)
    inputs = {key: torch.nn.functional.pad(tensor, (2, 0)) if tensor.dim() == 2 else tensor for key, tensor in inputs.items()}
    model = make_model("gemma")
    letters = {"B": ROWS, "L": LENGTH, "V": 211, "A": (13, 52, 208, 211), "Q": 17}
    with checker.running(generation=letters):
        join_rows(split_rows(inputs, model.config), 0)
        first = {key: value[:1] if value.dim() == 2 else value[:2] for key, value in inputs.items()}
        generate_greedy(model, {key: value[:, 2:] if value.dim() == 2 else value for key, value in first.items()}, 2)
        list(generate_steps(model, inputs, max_new_tokens=2, locations=range(20, 37)))
        list(generate_steps(model, inputs, max_new_tokens=2, sampling=Sampling(top_k=13, seed=0)))
        flat, draws = torch.zeros(ROWS, 211), torch.zeros(ROWS, dtype=torch.float64)
        sample(flat, Sampling(top_p=0.9), draws)
        sample(flat, Sampling(temperature=1), draws)
        sample_allowed(flat, Sampling(), draws, [torch.arange(13)] * ROWS)


# The tests


FILES = [SIGLIP, GEMMA, PALIGEMMA, GENERATION]


@torch.no_grad()
def test_every_shape_comment_is_true_and_was_run(monkeypatch):
    checker = Checker([claim for name in FILES for claim in read_claims(ROOT / "paligemma" / name)])
    run_models(checker)
    run_generation(checker, monkeypatch)
    never = [f"{claim} was never run." for claim in checker.claims if claim not in checker.ran]
    assert len(checker.claims) > 50
    assert checker.problems + never == []


def test_every_letter_stands_for_a_number_of_its_own():
    for letters in (
        TOWER | {"I": PICTURES},
        DECODER | {"B": ROWS, "L": LENGTH, "S": LENGTH + 1},
        DECODER | {"B": ROWS, "I": PICTURES, "P": 25, "L": LENGTH},
    ):
        numbers = [number for letter, number in letters.items() if letter != "W"]  # pictures are square
        assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("name", FILES)
def test_every_letter_is_explained_in_the_header(name):
    header = ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8")))
    legend = header[header.index("Shapes") :]
    letters = {letter for claim in read_claims(ROOT / name) for letter in letters_in(claim)}
    assert {letter for letter in letters if not re.search(rf"\b{letter}\b", legend)} == set()


# One legend


def headers() -> dict[str, str]:
    """The `Shapes:` paragraph of each file that has one, up to the end of its first sentence or to an empty line."""
    files = [path for folder in ("paligemma", "demo", "notes", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    found = {}
    for path in files:
        header = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if start := re.search(r"(?:^|\. )Shapes: ", header, re.MULTILINE):
            text = re.split(r"\.(?:\s|$)|\n\n", header[start.end() :])[0]
            found[str(path.relative_to(ROOT))] = " ".join(text.split())
    return found


def meanings(text: str) -> list[tuple[str, str]]:
    """("H", "pixels"), ... of "C channels, H W pixels"."""
    clauses = [re.match(r"((?:[A-Z] )+)(.+)", clause) for clause in re.split(r", | and ", text)]
    return [(letter, clause[2]) for clause in clauses if clause for letter in clause[1].split()]


def test_meanings_are_read_letter_by_letter():
    assert meanings("B batch rows, H W pixels and R rank (of an adapter)") == [
        ("B", "batch rows"), ("H", "pixels"), ("W", "pixels"), ("R", "rank (of an adapter)")
    ]  # fmt: skip


def test_a_letter_means_the_same_in_every_file():
    wrong = [
        f"{name}: {letter} {meaning}"
        for name, text in headers().items()
        for letter, meaning in meanings(text)
        if not re.search(LEGEND.get(letter, "no such letter"), meaning)
    ]
    assert len(headers()) > 10 and wrong == []


def test_the_legend_is_the_table_that_people_read():
    page = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8").split("## Shape letters")[1].split("\n##")[0]
    cells = [cell.strip() for row in page.splitlines() if row.startswith("| ") for cell in row.strip("|").split("|")]
    pairs = [(letter, meaning) for letters, meaning in zip(cells[::2], cells[1::2], strict=True) if letters not in ("", "letter")
             for letter in letters.split(", ")]  # fmt: skip
    assert sorted(letter for letter, _ in pairs) == sorted(LEGEND)
    assert [(letter, meaning) for letter, meaning in pairs if not re.search(LEGEND[letter], meaning)] == []


def test_shape_comments_use_no_other_letter_and_the_header_explains_it():
    unknown, texts = [], headers()
    for folder in ("paligemma", "demo", "notes", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            name, source = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
            header = texts.get(name, "")
            for other in ("modeling_gemma.py", "modeling_siglip.py"):
                header = header.replace(f"as in {other}", texts[f"paligemma/{other}"])
            known = dict(meanings(header)) if folder == "paligemma" else LEGEND
            for line, text in enumerate(source.splitlines(), start=1):
                shapes = re.search(r"  # (\[[A-Z0-9.][^\]]*\](?:, \[[^\]]*\])*)", text)
                letters = set(re.findall("[A-Z]", shapes[1])) if shapes else set()
                unknown += [f"{name}:{line}: {letter}" for letter in letters if letter not in known]
    assert unknown == []


def check_source(tmp_path, body, letters, call=True):
    """The problems of a function `f(x)`, run on a tensor of [2, 3, 5]."""
    path = tmp_path / "sample.py"
    path.write_text("def f(x):\n" + "".join(f"    {line}\n" for line in body))
    claims = read_claims(path)
    checker = Checker(claims)
    namespace = {"torch": torch}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    with checker.running(sample=letters):
        if call:
            namespace["f"](torch.zeros(2, 3, 5))
    return checker.problems, [claim.line for claim in claims if claim not in checker.ran]


LETTERS = {"B": 2, "L": 3, "D": 5}


def test_checker_accepts_what_is_true(tmp_path):
    body = [
        "y, z = x.flatten(1), x[:, 1:]  # [B, L*D], [B, L-1, D]",
        "y = x.repeat(",
        "    1, 1, 2",
        ")  # [B, L, 2*D]",
        "for i in range(2):",
        "    y = x[i]  # [L, D]",
        "z = x[0, 0]  # [..., D]",
        "z = torch.stack([row for row in y])  # [L, D]",
        "return y[None]  # [1, L, D]",
    ]
    assert check_source(tmp_path, body, LETTERS) == ([], [])


@pytest.mark.parametrize(
    "body, line",
    [
        (["y = x.transpose(1, 2)  # [B, L, D]", "return y"], 2),
        (["return x.sum(0)  # [B, D]"], 2),
        (["y, z = x[0], x[1]  # [L, D], [D, L]"], 2),
        (["y = x", "y = x.flatten()  # [B, L, D]", "y = x"], 3),
        (["for i in range(2):", "    y = x[:, i:]  # [B, L, D]"], 3),
        (["y = 5  # [B]"], 2),
        (["y = x  # [..., L]"], 2),
        (["y = x[0]  # [..., B, L, D]"], 2),
        (["y = x[:,", "      1:]  # [B, L, D]"], 3),
    ],
)
def test_checker_names_file_and_line_of_what_is_false(tmp_path, body, line):
    problems, never = check_source(tmp_path, body, LETTERS)
    assert len(problems) == 1 and problems[0].startswith(f"sample.py:{line}: ") and "is false" in problems[0]
    assert never == []


def test_checker_wants_the_same_number_for_a_letter_throughout_a_line(tmp_path):
    body = ["y, z = x[0, :2, :4], x[0, :2, :4]  # [C, D], [C, D]", "y, z = x[0, :2], x[0, :3]  # [C, D], [C, D]"]
    problems, _ = check_source(tmp_path, body, {"C": (2, 3), "D": (4, 5)})
    assert len(problems) == 1 and problems[0].startswith("sample.py:3: ")


def test_checker_notices_lines_that_never_ran(tmp_path):
    body = ["if x is None:", "    x = x[0]  # [L, D]", "return x  # [B, L, D]"]
    assert check_source(tmp_path, body, LETTERS) == ([], [3])
    assert check_source(tmp_path, body, LETTERS, call=False) == ([], [3, 4])


def test_checker_notices_letters_that_stand_for_nothing(tmp_path):
    (problem,), _ = check_source(tmp_path, ["y = x  # [B, L, Q]"], LETTERS)
    assert problem == "sample.py:2: [B, L, Q] uses ['Q'], which stand for nothing here."


@pytest.mark.parametrize(
    "body, message",
    [
        (["y = x  # [B, L, D] for now"], "sample.py:2: .* is no list of shapes"),
        (["y = x  # [B, L, D], [B, L, D]"], "sample.py:2: 2 shapes are claimed for 1 values"),
        (["y, z = x, x  # [B, L, D]"], "sample.py:2: 1 shapes are claimed for 2 values"),
        (["print(x)  # [B, L, D]"], "sample.py:2: a shape is claimed where nothing is assigned or returned"),
    ],
)
def test_checker_refuses_comments_it_cannot_read(tmp_path, body, message):
    with pytest.raises(ValueError, match=message):
        check_source(tmp_path, body, LETTERS)
