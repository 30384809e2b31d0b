"""What every test runs under: no network, no time limits, one thread (equal numbers everywhere, and no fight over cores).

TEST_PROCESSOR=avx2 (or another name in processors.py) runs the tests as on such a processor, `-m quick` only the files below.
"""

import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["PALIGEMMA_TUNING"] = "off"  # what a measurement chose on this machine must not decide which operators are tested
os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start
os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])  # so that these find the package from any folder

import torch
from hypothesis import settings

from paligemma.machine import available_cores
from tests import processors

FORCED = os.environ.get("TEST_PROCESSOR")
# Picture to answer in a few seconds: the files that `-m quick` is content with.
QUICK = {
    "test_bounds", "test_safetensors_files", "test_folders", "test_grammar", "test_journal",
    "test_masks", "test_modeling_gemma", "test_modeling_paligemma", "test_modeling_siglip", "test_oracle",
    "test_outputs", "test_scores", "test_tasks",
}  # fmt: skip

torch.set_num_threads(1)
# A shell without job control starts what is in the background with Ctrl-C ignored, and programs that tests start inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
if FORCED:
    processors.force(FORCED)
settings.register_profile("slow machines", deadline=None)
settings.load_profile("slow machines")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files without a quick test need not be imported to find that out."""
    is_left_out = config.option.markexpr == "quick" and collection_path.suffix == ".py" and collection_path.stem not in QUICK
    return True if is_left_out else None


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.path.stem in QUICK:
        item.add_marker("quick")
    if item.path.stem in {name.split("/")[-1] for name in processors.WHOLE_FILES}:
        item.add_marker("processor")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Halves of characters, which some inputs have, are spelled out: a worker could not send them."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    if report.failed and not str(report.longrepr).isascii():
        report.longrepr = str(report.longrepr).encode("utf-8", "backslashreplace").decode()
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Workers of `-n auto`: a core each, and no more than memory is sure to hold (a GB each)."""
    return min(available_cores(), 8)


def pytest_terminal_summary(terminalreporter) -> None:
    missing = [name for name in processors.TORCH if name not in processors.here()]
    tested = f"as {FORCED}" if FORCED else f"on this one and, in part, as {', '.join(processors.here())}"
    lack = f"; it cannot stand in for {', '.join(missing)}" if missing else ""
    terminalreporter.write_line(f"Processors: tested {tested}{lack}.")
