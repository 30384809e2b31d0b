"""The form of the repository: who imports whom, what stands where, what is never written."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
MODELING = ["modeling_siglip", "modeling_gemma", "modeling_paligemma", "modeling_siglip_contrastive"]
PROGRAMS = {"inference", "finetune", "annotate", "cluster"}
TO_BE_READ = [*MODELING, "generation"]  # the files that a learner reads from top to bottom


def tree(name):
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imports_of(name):
    """Everything that a file imports, first words only, wherever in the file."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}.py:{node.lineno}: modules are flat"
            found.add(node.module.split(".")[0])
    return found


def own_imports_of(name):
    return imports_of(name) & set(MODULES)


@pytest.mark.parametrize("name", MODELING)
def test_modeling_files_import_modeling_files_only(name):
    assert own_imports_of(name) <= set(MODELING)
    assert imports_of(name) - set(MODELING) <= {"torch", "dataclasses", "copy"}


def test_tower_and_decoder_know_nothing_of_each_other():
    assert own_imports_of("modeling_siglip") == own_imports_of("modeling_gemma") == set()


@pytest.mark.parametrize("name", ["generation", "training", "evaluation", "outputs", "grammar"])
def test_tools_take_a_model_and_import_none(name):
    assert not own_imports_of(name) & {*MODELING, "weights"}


def test_only_programs_import_weights():
    readers = {"processing_paligemma"}  # from_pretrained reads config.json with the same code as load_model
    assert {name for name in MODULES if "weights" in own_imports_of(name)} <= PROGRAMS | readers


def test_nobody_imports_a_program():
    assert not any(own_imports_of(name) & PROGRAMS for name in MODULES)


def test_imports_have_no_cycle():
    left = {name: own_imports_of(name) for name in MODULES}
    while left:
        leaves = {name for name, needed in left.items() if not needed & set(left)}
        assert leaves, f"a cycle among {sorted(left)}"
        left = {name: needed for name, needed in left.items() if name not in leaves}


def test_running_never_imports_transformers():
    assert not any("transformers" in imports_of(name) for name in MODULES)
    code = "import sys, finetune, generation, processing_paligemma, weights; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_every_package_that_is_imported_is_one_that_can_be_installed():
    # Left: the name in the code, right: in requirements.txt or an extra.
    names = {"PIL": "pillow", "yaml": "pyyaml", "pillow_heif": "pillow-heif", "pyarrow": "ray"}
    lists = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("requirements.txt", "pyproject.toml"))
    files = [path for folder in ("", "demo", "notes") for path in (ROOT / folder).glob("*.py")]
    own = {path.stem for path in files} | set(sys.stdlib_module_names)
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {each.split(".")[0] for each in imported} - own:
                assert re.search(rf"(?<![\w-]){re.escape(names.get(name, name))}\b", lists), f"{path.name} imports {name}"


def test_there_are_no_packages_and_no_file_without_a_topic():
    names = {path.name for folder in (ROOT, ROOT / "tests", ROOT / "demo", ROOT / "benchmarks") for path in folder.glob("*.py")}
    assert not names & {"__init__.py", "utils.py", "helpers.py", "common.py", "misc.py"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_file_begins_by_saying_what_it_is(name):
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
def test_every_class_and_public_function_says_what_it_is(name):
    nodes = [node for node in ast.walk(tree(name)) if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    public = [node for node in nodes if isinstance(node, ast.ClassDef) or len(ast.unparse(node).splitlines()) > 12]
    plain = {"__init__", "__post_init__", "forward"}  # the class above them says it
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
    places = [ROOT, *(ROOT / name for name in ("tests", "demo", "notes", "benchmarks", "examples", ".ci"))]
    kinds = {".py", ".md", ".sh", ".toml", ".txt", ".cpp", ""}
    found = {path for place in places for path in place.glob("*") if path.is_file() and path.suffix in kinds}
    found -= {ROOT / ".git"}  # a file where several checkouts share a repository
    return sorted(found | {path for path in (ROOT / "tests").glob("*/*.md")})


def test_no_load_passes_over_what_is_missing_and_no_test_is_skipped():
    # ruff watches the rest of its kind: blind excepts, forgotten notes, arguments that nobody reads.
    pattern = re.compile(r"load_state_dict\(.*strict=" + r"False|pytest\.mark\." + r"skip|pytest\." + r"skip\(")
    code = [path for path in texts() if path.suffix == ".py"]
    found = [f"{path.name}: {hit.group()}" for path in code if (hit := pattern.search(path.read_text(encoding="utf-8")))]
    assert found == []


def test_no_path_of_a_machine_is_written_down():
    # Put together from parts, for this file is read, too.
    mine = ["/" + "home" + "/", "/" + "Users" + "/", "/" + "root" + "/", "/" + "work" + "/", ".." + "/shared", "fa" + "rm"]
    pattern = re.compile("|".join(rf"(?<![\w.]){re.escape(word)}" for word in mine))
    found = [f"{path.name}: {hit.group()}" for path in texts() if (hit := pattern.search(path.read_text(encoding="utf-8")))]
    assert found == []


def test_ruff_has_nothing_to_say():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def mypy(*arguments):
    """What the type checker says, at the oldest Python of pyproject.toml: (exit status, lines)."""
    command = [sys.executable, "-m", "mypy", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def test_the_type_checker_has_nothing_to_say_about_the_oldest_python(tmp_path):
    assert mypy() == (0, f"Success: no issues found in {len(MODULES) + len(list((ROOT / 'demo').glob('*.py')))} source files\n")
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (promised,) = re.findall(r'^requires-python = ">=(.+)"$', settings, re.MULTILINE)
    assert f'python_version = "{promised}"' in settings
    # What Python 3.11 brought is an error: an argument, a name, a module.
    newer = tmp_path / "newer.py"
    newer.write_text("int.from_bytes(b'1234')\nfrom datetime import UTC\nimport tomllib\nfrom typing import Self\n")
    code, said = mypy(str(newer))
    assert code == 1 and [f":{line}: error" in said for line in (1, 2, 3, 4)] == [True] * 4
