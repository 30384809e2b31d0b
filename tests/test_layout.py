"""The layout of the repository: which module imports which, what each folder holds, what no file may contain."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SIX = ["modeling_siglip", "modeling_gemma", "modeling_paligemma", "processing_paligemma", "generation", "inference"]
MODULES = {  # "errors", "pictures.images": the names below `paligemma`; the six files at the root under the names of their links
    ".".join(path.relative_to(ROOT / "paligemma").with_suffix("").parts): path
    for path in sorted((ROOT / "paligemma").rglob("*.py"))
    if path.name != "__init__.py"
}
MODELING = SIX[:3]
TO_BE_READ = ["configuration", *MODELING, "layers.batch_cache", "generation"]  # the files that a learner reads from top to bottom
# The lowest floor comes first: a module imports from its own floor and from lower ones.
FLOORS = [
    {*MODELING, "configuration", "errors", "files", "parameter_names", "vocabulary"},
    {"devices", "machine", "roofline", "svg", "tokenization", "pictures", "layers", "gpu"},
    {"objects"},
    {"checkpoints"},
    {"processing_paligemma", "generation"},
    {"opened", "tasks", "explanation", "explanation_sheet", "model", "checkup"},
    {"learning"},
    {"programs"},
    {"inference"},
    {"__main__"},
]


def tree(name):
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imports_of(name):
    """Everything that a file imports, inside functions too: own modules by their names in MODULES, others by their first word."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: imports are written out"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for each in full:
            words = each.split(".")
            if words[0] != "paligemma":
                found.add(words[0])
                continue
            within = [".".join(words[1:end]) for end in range(len(words), 1, -1)]
            found.add(next((module for module in within if module in MODULES), each))
    return found


def own_imports_of(name):
    return imports_of(name) & set(MODULES)


def floor(name):
    return next(number for number, names in enumerate(FLOORS) if name.split(".")[0] in names)


def test_the_package_links_to_the_six_files_at_the_root():
    for name in SIX:
        assert (ROOT / f"{name}.py").is_file() and not (ROOT / f"{name}.py").is_symlink()
        assert os.readlink(MODULES[name]) == f"../{name}.py"
    assert [name for name, path in MODULES.items() if path.is_symlink()] == sorted(SIX)


def test_one_spelling_of_every_import():
    """A second spelling (`import modeling_gemma`) would make second copies of its classes."""
    own = {*SIX, *(name.split(".")[-1] for name in MODULES), "shapes", "tiny"}
    folders = ("paligemma", "tests", "demo", "notes", "benchmarks")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & own - set(sys.stdlib_module_names), f"{path}:{node.lineno}"


def test_no_file_edits_the_import_path():
    word = "sys." + "path"
    assert [path.name for path in texts() if path.suffix == ".py" and word in path.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("name", MODELING)
def test_modeling_files_import_modeling_files_only(name):
    allowed = {*MODELING, "configuration", "vocabulary"}  # these have constants and config classes only, and import no torch
    assert own_imports_of(name) <= allowed
    assert imports_of(name) - allowed <= {"torch", "dataclasses", "copy"}


def test_tower_and_decoder_do_not_import_each_other():
    assert own_imports_of("modeling_siglip") == own_imports_of("modeling_gemma") == {"configuration"}


@pytest.mark.parametrize("name", ["generation", "learning.training", "learning.evaluation", "objects.outputs", "objects.grammar"])
def test_tools_take_a_model_as_an_argument_and_import_none(name):
    assert not own_imports_of(name) & {*MODELING, "checkpoints.weights"}


def test_imports_go_down():
    upward = {(name, used) for name in MODULES for used in own_imports_of(name) if floor(used) > floor(name)}
    assert upward == set()


def test_no_module_of_the_package_imports_from_its_init():
    assert [(name, used) for name in MODULES for used in imports_of(name) if used.startswith("paligemma.")] == []


def test_imports_have_no_cycle():
    left = {name: own_imports_of(name) for name in MODULES}
    while left:
        leaves = {name for name, needed in left.items() if not needed & set(left)}
        assert leaves, f"a cycle among {sorted(left)}"
        left = {name: needed for name, needed in left.items() if name not in leaves}


def test_running_never_imports_transformers():
    assert not any("transformers" in imports_of(name) for name in MODULES)
    code = "import sys; from paligemma.programs import finetune; from paligemma.checkpoints import weights; "
    code += "from paligemma import generation, processing_paligemma; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_imported_package_is_a_dependency():
    # Left: the name in the code, right: in requirements.txt or an extra.
    names = {"PIL": "pillow", "yaml": "pyyaml", "pillow_heif": "pillow-heif", "pyarrow": "ray"}
    lists = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("requirements.txt", "pyproject.toml"))
    files = [path for folder in ("paligemma", "demo", "notes") for path in (ROOT / folder).rglob("*.py")]
    own = {"paligemma", "demo", "notes", "benchmarks"} | set(sys.stdlib_module_names)
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {each.split(".")[0] for each in imported} - own:
                assert re.search(rf"(?<![\w-]){re.escape(names.get(name, name))}\b", lists), f"{path.name} imports {name}"


def test_every_folder_has_a_docstring_and_every_file_a_topic():
    folders = ("paligemma", "tests", "demo", "notes", "benchmarks")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("__init__.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert ast.get_docstring(ast.Module(body, [])) and (len(body) == 1 or path.parent.name == "paligemma")
    names = {path.name for path in texts()}
    assert not names & {"utils.py", "helpers.py", "common.py", "misc.py"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_file_begins_with_a_docstring(name):
    header = ast.get_docstring(tree(name))
    assert header and len(header.splitlines()[0]) > 40


@pytest.mark.parametrize("name", MODELING)
def test_modeling_files_name_their_sources_their_tests_and_their_letters(name):
    header = ast.get_docstring(tree(name))
    assert "Sources: " in header and "arXiv:" in header and "\nShapes" in header
    assert f"tests/test_{name}.py" in header


@pytest.mark.parametrize("name", TO_BE_READ)
def test_every_name_is_defined_above_its_first_use(name):
    module, lines = tree(name), {}
    for node in module.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        own = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
        for defined in own + [target.id for target in targets if isinstance(target, ast.Name)]:
            lines[defined] = node.lineno
    early = []
    for node in module.body:
        used = [part for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)]
        early += [f"{name}.py:{part.lineno}: {part.id}" for part in used if lines.get(part.id, 0) > node.end_lineno]
    assert early == []


@pytest.mark.parametrize("name", TO_BE_READ)
def test_every_class_and_public_function_has_a_docstring(name):
    nodes = [node for node in ast.walk(tree(name)) if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    public = [node for node in nodes if isinstance(node, ast.ClassDef) or len(ast.unparse(node).splitlines()) > 12]
    plain = {"__init__", "__post_init__", "forward"}  # described by their class
    assert [node.name for node in public if node.name not in plain and not ast.get_docstring(node)] == []


@pytest.mark.parametrize("name", TO_BE_READ)
def test_functions_fit_on_a_screen(name):
    functions = [node for node in ast.walk(tree(name)) if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.lineno >= 55] == []


@pytest.mark.parametrize("name", TO_BE_READ)
def test_signatures_have_types(name):
    functions = [node for node in ast.walk(tree(name)) if isinstance(node, ast.FunctionDef)]
    bare = [
        f"{function.name}({argument.arg})"
        for function in functions
        for argument in [*function.args.args, *function.args.kwonlyargs]
        if argument.annotation is None and argument.arg not in ("self", "cls")
    ]
    bare += [function.name for function in functions if function.returns is None and not function.name.startswith("__")]
    assert bare == []


def texts():
    """Every text file that people read or run."""
    places = [ROOT / name for name in ("paligemma", "tests", "demo", "notes", "benchmarks", "examples", ".ci")]
    kinds = {".py", ".md", ".sh", ".toml", ".txt", ".cpp", ".h", ""}
    found = [*ROOT.glob("*"), *(path for place in places for path in place.rglob("*"))]
    # .git is a file where several checkouts share a repository.
    return sorted(path for path in found if path.is_file() and path.suffix in kinds and path.name != ".git")


def test_no_load_ignores_missing_tensors_and_no_test_is_skipped():
    # ruff finds the other faults of this kind: blind excepts, forgotten notes, unused arguments.
    pattern = re.compile(r"load_state_dict\(.*strict=" + r"False|pytest\.mark\." + r"skip|pytest\." + r"skip\(")
    code = [path for path in texts() if path.suffix == ".py"]
    found = [f"{path.name}: {hit.group()}" for path in code if (hit := pattern.search(path.read_text(encoding="utf-8")))]
    assert found == []


def test_no_file_contains_a_path_of_one_machine():
    # Put together from parts, because this file is searched, too.
    mine = ["/" + "home" + "/", "/" + "Users" + "/", "/" + "root" + "/", "/" + "work" + "/", ".." + "/shared", "fa" + "rm"]
    pattern = re.compile("|".join(rf"(?<![\w.]){re.escape(word)}" for word in mine))
    found = [f"{path.name}: {hit.group()}" for path in texts() if (hit := pattern.search(path.read_text(encoding="utf-8")))]
    assert found == []


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def mypy(*arguments):
    """The exit status and the output of the type checker, for the oldest Python of pyproject.toml."""
    command = [sys.executable, "-m", "mypy", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def test_the_type_checker_finds_nothing_for_the_oldest_python(tmp_path):
    checked = [path for folder in ("paligemma", "demo") for path in (ROOT / folder).rglob("*.py")]
    assert mypy() == (0, f"Success: no issues found in {len(checked)} source files\n")
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (promised,) = re.findall(r'^requires-python = ">=(.+)"$', settings, re.MULTILINE)
    assert f'python_version = "{promised}"' in settings
    # What Python 3.11 added is an error: an argument, a name, a module.
    newer = tmp_path / "newer.py"
    newer.write_text("int.from_bytes(b'1234')\nfrom datetime import UTC\nimport tomllib\nfrom typing import Self\n")
    code, said = mypy(str(newer))
    assert code == 1 and [f":{line}: error" in said for line in (1, 2, 3, 4)] == [True] * 4
