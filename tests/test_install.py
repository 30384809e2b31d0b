"""Every way to get the package: a clone, a wheel, an sdist, an editable install. Built and installed without network.

Each environment is a new venv that sees the packages of the one that runs the tests, so that nothing is downloaded.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import paligemma

ROOT = Path(__file__).resolve().parent.parent
SIX = ("modeling_siglip", "modeling_gemma", "modeling_paligemma", "processing_paligemma", "generation", "inference")
CLEAN = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # which conftest.py sets to the checkout
OFFLINE = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check"]


def run(*command, cwd, **variables):
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=CLEAN | variables, capture_output=True, text=True, timeout=300,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("install")


@pytest.fixture(scope="module")
def clone(folder):
    """What git holds, in a folder with a space."""
    clone = folder / "a clone"
    for name in run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines():
        if os.path.lexists(ROOT / name):  # not deleted since the last commit
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clone / name, follow_symlinks=False)
    return clone


def build_wheel(source, out):
    run(sys.executable, "-m", "pip", "wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", out, source, cwd=out.parent)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(folder, clone):
    return build_wheel(clone, folder / "wheel")


@pytest.fixture(scope="module")
def sdist(folder, clone):
    """The sdist, unpacked."""
    script = f"from setuptools import build_meta; build_meta.build_sdist({str(folder / 'sdist')!r})"
    run(sys.executable, "-c", script, cwd=clone)
    (archive,) = (folder / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


class Environment:
    """A venv without pip; its bin folder, its site-packages and the names that an installation added to both."""

    def __init__(self, folder, *arguments):
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.bin, self.empty = folder / "bin", folder / "an empty folder"
        self.python = self.bin / "python"
        self.empty.mkdir()
        self.site = Path(run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
        (self.site / "suite.pth").write_text(sysconfig.get_path("purelib") + "\n")
        before = self.names(folder)
        run(sys.executable, "-m", "pip", "--python", self.python, "install", *OFFLINE, *arguments, cwd=folder)
        self.added = self.names(folder) - before

    def names(self, folder):
        return {path.relative_to(folder).as_posix() for place in (folder, self.bin, self.site) for path in place.iterdir()}

    def type(self, program, *arguments, cwd=None):
        """What a program of this environment prints."""
        return run(self.bin / program, *arguments, cwd=cwd or self.empty)


@pytest.fixture(scope="module")
def installed(folder, wheel):
    return Environment(folder / "installed", wheel)


def test_a_wheel_adds_the_package_and_one_program_and_nothing_else(installed):
    names = {name.rpartition("/")[2] for name in installed.added}
    assert names == {"paligemma", f"paligemma-{paligemma.__version__}.dist-info"}
    assert {name.partition("/")[0] for name in installed.added} == {"bin", "lib"}
    record = next(installed.site.glob("*.dist-info")).joinpath("RECORD").read_text()
    tops = {line.split("/")[0] for line in record.splitlines()}
    assert tops == {"..", "paligemma", f"paligemma-{paligemma.__version__}.dist-info"}  # "..": ../../../bin/paligemma


def test_the_installed_package_is_the_package_of_the_checkout(installed):
    """Links became files; every module, the C++ source, the bundled checkpoint, the picture and the font are there."""
    inside = installed.site / "paligemma"
    tracked = [Path(name) for name in run("git", "ls-files", "-co", "--exclude-standard", "paligemma", cwd=ROOT).splitlines()]
    for path in (path for path in tracked if os.path.lexists(ROOT / path)):
        copy = installed.site / path
        assert copy.is_file() and not copy.is_symlink() and copy.read_bytes() == (ROOT / path).read_bytes(), path
    for name in SIX:
        assert (inside / f"{name}.py").read_bytes() == (ROOT / f"{name}.py").read_bytes()
    sources = ("layers/cpp/kernels.cpp", "layers/cpp/vectors.h")
    for name in ("py.typed", *sources, "bundled/model.safetensors", "bundled/shapes.png", "objects/DejaVuSans.ttf"):
        assert (inside / name).is_file(), name


def test_the_installed_program_answers_from_an_empty_folder(installed):
    assert installed.type("paligemma", "--version") == f"paligemma {paligemma.__version__}\n"
    assert installed.type("paligemma").strip()
    assert "\n  paligemma finetune --train" in installed.type("paligemma", "finetune", "--help")
    picture = installed.site / "paligemma" / "bundled" / "shapes.png"
    assert installed.type("python", "-m", "paligemma", "detect", picture, "circle").startswith("circle\t")
    assert list(installed.empty.iterdir()) == []


def test_modules_of_the_user_with_the_same_names_do_no_harm(installed, tmp_path):
    for name in ("errors", "files", "kernels", "inference", "modeling_gemma", "generation", "tasks"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('this is the {name}.py of the user')\n")
    script = "import paligemma; from paligemma import inference, tasks; from paligemma.layers import kernels; "
    script += "from paligemma.checkpoints.weights import load_model; print(paligemma.__file__)"
    where = Path(installed.type("python", "-c", script, cwd=tmp_path).strip())
    assert where == installed.site / "paligemma" / "__init__.py"
    assert installed.type("python", "-m", "paligemma", "--version", cwd=tmp_path).startswith("paligemma ")


def test_the_wheel_of_the_sdist_is_the_wheel_of_the_clone(folder, wheel, sdist):
    again = build_wheel(sdist, folder / "wheel of the sdist")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        packed = [{info.filename: info.CRC for info in archive.infolist()} for archive in (first, second)]
    for each in packed:
        each.pop(f"paligemma-{paligemma.__version__}.dist-info/RECORD")  # in another order
    assert packed[0] == packed[1]


def test_an_editable_install_runs_the_files_of_the_clone(folder, clone):
    environment = Environment(folder / "editable", "--no-build-isolation", "--editable", clone)
    assert {name for name in environment.added if name.startswith("bin/")} == {"bin/paligemma"}
    script = "import importlib.util, paligemma; print(paligemma.__file__); "
    script += f"print([name for name in {(*SIX, 'demo', 'tests', 'finetune')} if importlib.util.find_spec(name)])"
    place, others = environment.type("python", "-c", script).splitlines()
    assert (Path(place), others) == (clone / "paligemma" / "__init__.py", "[]")
    assert environment.type("paligemma", "--version") == f"paligemma {paligemma.__version__}\n"


def test_a_clone_runs_from_any_folder(clone, tmp_path):
    assert run(sys.executable, clone / "inference.py", "caption", clone / "examples" / "shapes.png", cwd=tmp_path).strip()
    for start in (["inference.py"], ["-m", "paligemma"], ["-m", "paligemma", "annotate"]):
        assert run(sys.executable, *start, "--version", cwd=clone) == f"paligemma {paligemma.__version__}\n"
