"""What README.md, docs/ and notes/ claim about this repository: commands, links, files, tables, snippets."""

import itertools
import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import paligemma
from notes import architecture_figures, decoding_figures, finetuning_figures, mask_figures, recipe_figures, refresh_readme, tables
from paligemma import inference
from paligemma.programs import annotate, cluster, doctor, finetune

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {"inference": inference, "annotate": annotate, "cluster": cluster, "doctor": doctor, "finetune": finetune}

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in refresh_readme.PAGES}
README, READING, PYTHON = PAGES["README.md"], PAGES["docs/reading.md"], PAGES["docs/python.md"]
CHECKPOINT = ROOT / "paligemma" / "bundled"
LINK = re.compile(r"""(?:\]\(|(?:src|href)=")([^)"\s]+)""")


def headings(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for link in LINK.findall(text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        if anchor:
            assert anchor in headings(target.read_text(encoding="utf-8")), f"{page} links to {link}"


def shown_commands() -> list[tuple[str, str]]:
    """(page, command) for every command line in a block."""
    found = []
    for page, text in PAGES.items():
        for kind, body in re.findall(r"```(console|bash)\n(.*?)```", text, re.DOTALL):
            lines = refresh_readme.commands(body) if kind == "console" else body.strip().splitlines()
            found += [(page, line) for line in lines]
    return found


@pytest.mark.parametrize(("page", "command"), shown_commands())
def test_commands_name_scripts_and_flags_that_exist(page, command):
    words = shlex.split(command)
    scripts = [word for word in words if re.fullmatch(r"[\w/]+\.(py|sh)", word)]
    modules = [following for word, following in itertools.pairwise(words) if word == "-m"]
    assert scripts or modules, f"{page}: {command} starts nothing of ours"
    scripts += [f"{module.replace('.', '/')}.py" for module in modules if module != "paligemma"]
    for script in scripts:
        assert (ROOT / script).is_file()
    flags = {word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")}
    name = next((word for word in words if "paligemma" in modules and word in PROGRAMS), "inference")
    if not scripts or scripts[0] in ("inference.py", "launch_inference.sh"):
        assert flags <= {field.name for field in fields(PROGRAMS[name].Flags)} | {"help"}
    elif scripts[0].endswith(".py"):
        source = (ROOT / scripts[0]).read_text(encoding="utf-8") + (ROOT / "benchmarks" / "turns.py").read_text(encoding="utf-8")
        assert all(f'"--{flag}"' in source for flag in flags)


def files_of_tree(tree: str) -> set[str]:
    """The paths in an indented tree; text after two spaces is a remark, a name that ends in / is a folder."""
    files, folders = set(), {}
    for line in tree.splitlines():
        depth = len(line) - len(line.lstrip())
        name = line.split()[0]
        path = "".join(folder for at, folder in sorted(folders.items()) if at < depth) + name
        if name.endswith("/"):
            folders = {at: folder for at, folder in folders.items() if at < depth} | {depth: name}
        else:
            files.add(path)
    return files


def test_readme_is_short():
    assert README.count("\n") < 200


def test_trees_name_files_that_exist():
    root = re.search(r"```\n(modeling_siglip\.py.*?)```", README, re.DOTALL)[1]
    for line in root.splitlines():
        assert (ROOT / line.split()[0]).exists() or (ROOT / "paligemma" / line.split()[0]).exists(), line


def test_reading_order_names_every_file_and_counts_its_lines():
    tree = re.search(r"```\n(paligemma/.*?)```", READING, re.DOTALL)[1]
    modules = [*(ROOT / "paligemma").rglob("*.py"), *(ROOT / "paligemma" / "layers" / "cpp").iterdir()]
    own = {path.relative_to(ROOT).as_posix() for path in modules if not path.name.startswith("__") and not path.is_symlink()}
    assert files_of_tree(tree) == own
    counted = {row["file"]: int(row["lines"]) for row in refresh_readme.FILE_ROW.finditer(READING)}
    assert len(counted) == 6 and {f"paligemma/{name}" for name in counted} == {
        path.relative_to(ROOT).as_posix() for path in modules if path.is_symlink()
    }
    for name, lines in counted.items():
        true = (ROOT / name).read_text(encoding="utf-8").count("\n")
        assert abs(true - lines) <= 0.15 * true, f"{name} has {true} lines: run notes/refresh_readme.py"


def test_every_command_in_a_console_block_has_its_output():
    for page, text in PAGES.items():
        for block in refresh_readme.BLOCK.finditer(text):
            assert len(block["body"].splitlines()) > len(refresh_readme.commands(block["body"])), f"{page}: {block['body']}"


def test_nothing_is_left_to_be_filled_in():
    for page, text in PAGES.items():
        assert not re.findall(r"TODO|TBD|FIXME|XXX|<!-- [A-Z]", text), page
        for name in tables.GENERATED:
            assert not re.search(rf"<!-- begin {name} -->\s*<!-- end", text), f"{page}: {name} is empty"


def test_table_of_checkpoints_is_what_the_code_counts():
    assert tables.checkpoint_table() in README


def test_table_of_devices_is_what_the_code_has():
    assert tables.device_table() in PAGES["docs/gpu.md"]


def test_each_class_of_processors_has_a_column_of_the_table_of_speeds(tmp_path, monkeypatch):
    ways = {name: {"ratio": {"median": 2.0}, "ms": {"median": 100.0}, "floor": 80.0, "share": 0.8} for name in tables.OURS[:2]}
    document = {"command": "python -m benchmarks.decode --model /data/3b", "threads": 2, "ways": ways}
    document["versions"] = {"torch": "2", "transformers": "5"}
    for name in ("avx2", "avx512_bf16"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "decode.json").write_text(json.dumps(document | {"machine": f"with {name}"}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    title, _, *rows = tables.speed_table().split("\n\n")[0].splitlines()
    assert "| `avx512_bf16`: with avx512_bf16, 2 threads | `avx2`: with avx2, 2 threads |" in title  # the best class first
    assert rows[0] == "| one more token | 2.00 / 2.00 / - | 2.00 / 2.00 / - | `python -m benchmarks.decode --model 3b` |"
    assert rows[1:] == [
        "| its ms, and the floor | 100 (80) / 100 (80) / - | 100 (80) / 100 (80) / - | the same |",
        "| share of the memory bandwidth | 80% / 80% / - | 80% / 80% / - | the same |",
    ]


def test_exit_codes_are_those_of_the_code():
    from paligemma import errors

    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.PaliGemmaError)]
    rows = re.findall(r"^\| ([\d, ]+) \|", PAGES["docs/command_line.md"], re.MULTILINE)
    assert {error.code for error in classes} <= {int(code) for row in rows for code in row.split(",")}


@pytest.mark.parametrize(
    ("script", "draw", "figure"),
    [
        (architecture_figures, "draw_architecture", "architecture.svg"),
        (mask_figures, "draw_mask", "mask.svg"),
        (mask_figures, "draw_influence", "influence.svg"),
        (decoding_figures, "draw_roofline", "roofline.svg"),
        (finetuning_figures, "draw_mistakes", "mistakes.svg"),
        (recipe_figures, "draw_recipe", "recipe.svg"),
    ],
)
def test_figures_are_what_their_scripts_draw(script, draw, figure, tmp_path, monkeypatch):
    committed = (script.HERE / figure).read_text(encoding="utf-8")
    monkeypatch.setattr(script, "HERE", tmp_path)
    getattr(script, draw)()
    assert (tmp_path / figure).read_text(encoding="utf-8") == committed


def table_cells() -> list[tuple[str, str, str]]:
    """The rows of "transformers | here": name, their code, our code; "" where a cell holds words instead."""
    table = PYTHON.split("| | transformers | here |\n|---|---|---|\n")[1].split("\n\n")[0]
    rows = []
    for line in table.splitlines():
        name, *cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        code = [cell[1:-1] if re.fullmatch(r"`[^`]+`", cell) else "" for cell in cells]
        rows.append((name, *code))
    return rows


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[dict, dict]:
    """The variables of both columns of the table after they ran from top to bottom."""
    import transformers

    from paligemma.checkpoints.weights import load_model, save_model
    from paligemma.generation import Sampling, generate, generate_many
    from paligemma.modeling_paligemma import suffix_loss
    from paligemma.processing_paligemma import PaliGemmaProcessor, load_image

    pictures = {"picture": load_image(ROOT / "examples" / "shapes.png"), "other": load_image(ROOT / "examples" / "cat.png")}
    both = {"torch": torch, "folder": str(CHECKPOINT)} | pictures
    names = ("AutoProcessor", "PaliGemmaForConditionalGeneration", "TextStreamer")
    theirs = both | {name: getattr(transformers, name) for name in names}
    ours = both | {
        "Sampling": Sampling, "generate": generate, "generate_many": generate_many, "suffix_loss": suffix_loss,
        "load_model": load_model, "save_model": save_model, "PaliGemmaProcessor": PaliGemmaProcessor,
    }  # fmt: skip
    theirs["out"], ours["out"] = (str(tmp_path_factory.mktemp(name)) for name in ("theirs", "ours"))
    torch.manual_seed(0)
    for _, their_code, our_code in table_cells():
        exec(their_code, theirs)
        exec(our_code, ours)
    return theirs, ours


def test_both_columns_of_the_table_give_the_same(ran):
    theirs, ours = ran
    assert theirs["text"] == ours["text"] == "".join(ours["pieces"])
    for name in ("inputs", "batch", "pair"):
        for key in ("input_ids", "token_type_ids", "pixel_values"):
            assert torch.equal(theirs[name][key], ours[name][key]), f"{name}: {key}"
    # bfloat16 weights: 8 bits, and the two sides add up in another order.
    torch.testing.assert_close(theirs["logits"].float(), ours["logits"], rtol=0, atol=0.25)
    torch.testing.assert_close(theirs["loss"].float(), ours["loss"], rtol=0.02, atol=0.02)


def test_folders_go_both_ways(ran):
    from transformers import PaliGemmaForConditionalGeneration

    from paligemma.checkpoints.weights import load_model

    theirs, ours = ran
    for ours_again, theirs_again in (
        (load_model(theirs["out"]), theirs["model"]),
        (ours["model"], PaliGemmaForConditionalGeneration.from_pretrained(ours["out"])),
    ):
        mine, other = ours_again(**ours["inputs"]), theirs_again(**theirs["inputs"]).logits.float()
        torch.testing.assert_close(mine, other, rtol=0, atol=0.25)


def test_the_processors_of_saved_folders_are_read_by_both(ran):
    from transformers import AutoProcessor

    from paligemma.processing_paligemma import PaliGemmaProcessor

    theirs, ours = ran
    for folder in (theirs["out"], ours["out"]):
        mine = PaliGemmaProcessor.from_pretrained(folder)(ours["picture"], "caption en")
        other = AutoProcessor.from_pretrained(folder)(images=ours["picture"], text="<image>caption en", return_tensors="pt")
        for key in ("input_ids", "token_type_ids", "pixel_values"):
            assert torch.equal(mine[key], ours["inputs"][key]) and torch.equal(other[key], mine[key])


def python_blocks() -> list[tuple[str, int, str]]:
    """(page, number, code) of the Python examples of README.md and docs/; those of the notes are excerpts."""
    found = {page: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for page, text in PAGES.items()}
    blocks = [(page, i, code) for page in found if not page.startswith("notes/") for i, code in enumerate(found[page])]
    return [block for block in blocks if hasattr(paligemma, "load") or "paligemma.load" not in block[2]]


@pytest.mark.parametrize(("page", "number", "code"), python_blocks())
def test_python_examples_print_an_answer(page, number, code, ran, capsys, monkeypatch, tmp_path):
    for name in ("examples", "paligemma"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"{page} {number}", "exec"), {})
    assert capsys.readouterr().out.splitlines()[0] == ran[1]["text"]


def test_refreshing_keeps_marks_and_replaces_output():
    page = "a\n<!-- last 1 -->\n```console\n$ one\nold\n$ two\n```\nb\n<!-- slow -->\n```console\n$ three\nstays\n```\n"
    made = refresh_readme.refresh_blocks(page, False, lambda command: f"first\n{command} done\n")
    assert made == page.replace("$ one\nold\n$ two\n", "$ one\none done\n$ two\ntwo done\n")
