"""Checks the installation, the GPU and a model: `python -m paligemma doctor --model_path runs/mine/model`.

In about ten seconds it prints a table of what it found, with one line per check. A line that begins with FAILED is followed by
what to do. With --json it prints one JSON object for an issue report. The output holds no names, home folders, addresses or
tokens (checkup/rows.py). The exit code is 0, or that of the first failed line: 6 for the machine, 4 for the model, 5 for the hub.

The checks are in paligemma/checkup. They run although packages are missing, even torch. Checked in tests/programs/test_doctor.py.
"""

import json
import logging
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import paligemma
from paligemma import devices, machine
from paligemma.checkup import system
from paligemma.checkup.rows import (
    FAILED,
    NOTE,
    Row,
    exit_code,
    failed,
    failed_by,
    note,
    publishable,
    run_check,
    table_lines,
    worst_state,
)
from paligemma.errors import AccessError, PaliGemmaError, counted
from paligemma.programs import commandline
from paligemma.programs.commandline import write
from paligemma.programs.options import require

if TYPE_CHECKING:
    import torch

Check = Callable[..., list[Row]]  # rows.run_check; with --debug it also prints the traceback of an exception


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Checks this machine and a model, and says what to do about each fault.

      python -m paligemma doctor                                           the machine, and the bundled model
      python -m paligemma doctor --model_path runs/mine/model              another model: a folder or a hub id
      python -m paligemma doctor --json                                    for an issue report; holds no personal data

    It takes about ten seconds. The exit code is 0 if nothing failed, otherwise that of the first failed line: 6 for the machine,
    4 for the model, 5 if the hub or a file may not be read, and 7 if a cache folder cannot be written.

    Args:
        model_path: a folder in hub layout, or a hub id, which is downloaded; by default the bundled model
        base_model: base model of the adapter in --model_path; by default the model that the adapter names
        revision: branch, tag or commit of a hub id
        device: auto, cpu, cuda, cuda:N or mps
        network: ask the hub, too: can it be reached, and does it accept the token?
        compile: check torch.compile, too, which takes minutes
        full: read all numbers of the model, not only a sample of each tensor
        json: print one JSON object at the end, in place of the table
        verbose: print the log of the libraries, too
        debug: print the traceback of each exception
    """

    model_path: str | None = None
    base_model: str | None = None
    revision: str | None = None
    device: str = "auto"
    network: bool = False
    compile: bool = False
    full: bool = False
    json: bool = False
    verbose: bool = False
    debug: bool = False

    def __post_init__(self):
        require(
            self,
            ("model_path", self.model_path != "", "a folder or a hub id"),
            ("base_model", self.base_model != "", "a folder or a hub id"),
            ("device", devices.NAMES.fullmatch(self.device) and "," not in self.device, "auto, cpu, mps, cuda or cuda:N"),
        )


def groups(flags: Flags) -> Iterator[tuple[str, Iterable[Row]]]:
    """The checks in order: the name of a group and its rows, each of which is computed when it is read."""
    check = partial(run_check, on_error=traceback.print_exc if flags.debug else None)
    basics = [row for rows in (system.platform_rows, system.packages_rows, system.torch_rows) for row in check(rows)]
    yield "machine", basics
    if basics[-1].name != "torch" or basics[-1].state == FAILED:
        yield "machine", [note("other checks", "not made, because they need torch", basics[-1].advice)]
        return
    device, rows = choose_device(flags.device)
    yield "machine", rows
    yield "machine", machine_rows(flags, device, check)
    yield "arithmetic", arithmetic_rows(flags, device, check)
    yield "model", model_rows(flags, check)
    if flags.network:
        yield "hub", hub_rows(flags, check)


def choose_device(name: str) -> tuple["torch.device", list[Row]]:
    """The device of that name. If it cannot be used, a failed row says why, and the CPU is checked."""
    import torch

    try:
        return devices.find_device(name), []
    except PaliGemmaError as error:
        return torch.device("cpu"), [failed_by("device", error)]


def machine_rows(flags: Flags, device: "torch.device", check: Check) -> Iterator[Row]:
    """GPUs and their driver, compilers, cores, memory, folders and the hub's token."""
    yield from check(system.driver_rows)
    yield from check(system.cards_rows)
    yield from check(system.gpu_rows, flags.device, device)
    yield from check(system.compilers_rows, device)
    yield from check(system.cores_rows)
    yield from check(system.memory_rows)
    yield from check(system.folders_rows)
    yield from check(system.token_rows)


def arithmetic_rows(flags: Flags, device: "torch.device", check: Check) -> Iterator[Row]:
    """The results of the device, compared with plain computations; then its speed."""
    arithmetic, reason = system.try_import("paligemma.checkup.arithmetic")
    if arithmetic is None:
        yield failed("arithmetic", f"cannot be checked: {reason}", system.INSTALL)
        return
    used = devices.profile(device)
    # Ctrl-C raises an exception here, so that the folder is deleted.
    with commandline.interruptible(), tempfile.TemporaryDirectory(prefix="paligemma-") as temporary:
        folder = Path(temporary)
        yield from check(arithmetic.kernel_rows)
        yield from check(arithmetic.attention_rows, device, used.dtypes)
        yield from check(arithmetic.model_rows, folder, device, used.dtypes)
        for dtype in used.dtypes[:1] if used.records else ():
            yield from check(arithmetic.recorded_rows, folder, device, dtype, "record")
        if flags.compile and not used.records:
            yield note("torch.compile", f"not checked, because {device} does not use it")
        for dtype in used.dtypes[:1] if flags.compile and used.records else ():
            yield from check(arithmetic.recorded_rows, folder, device, dtype, "compile")
            yield from check(arithmetic.flex_rows, device, dtype)
        yield from check(arithmetic.integer_rows, device, used.dtypes[0])
        if device.type != "cpu":
            yield from check(arithmetic.copy_rows, device)
        yield from check(arithmetic.fast_way_rows)
        yield from check(arithmetic.speed_rows, device, used.dtypes[0], machine.free_memory(device))


def model_rows(flags: Flags, check: Check) -> Iterator[Row]:
    """The files of the model."""
    model_files, reason = system.try_import("paligemma.checkup.model_files")
    if model_files is None:
        yield failed("model", f"cannot be checked: {reason}", system.INSTALL)
        return
    yield from model_files.checkpoint_rows(flags.model_path, flags.revision, flags.base_model, flags.full, check)


def hub_rows(flags: Flags, check: Check) -> Iterator[Row]:
    """Whether the hub answers."""
    network, reason = system.try_import("paligemma.checkup.network")
    if network is None:
        yield failed("hub", f"cannot be asked: {reason}", system.INSTALL)
        return
    yield from check(network.hub_rows, flags.model_path, code=AccessError.code)


def summary(rows: list[Row], seconds: float) -> str:
    count = Counter(row.state for row in rows)
    notes = f", {counted(count[NOTE], 'note')}" if count[NOTE] else ""
    return f"{count[FAILED]} of {counted(len(rows), 'line')} failed{notes}. {seconds:.1f} s."


def to_json(found: dict[str, list[Row]], seconds: float) -> str:
    rows = [row for group in found.values() for row in group]
    checks = [{"group": group} | row.to_json() for group in found for row in found[group]]
    state = {"paligemma": paligemma.__version__, "state": worst_state(rows), "exit_code": exit_code(rows)}
    return json.dumps(state | {"seconds": round(seconds, 1), "checks": checks})


def program(flags: Flags) -> int:
    """Makes all checks and prints each row as soon as it is known. Returns: the exit code."""
    start = time.perf_counter()
    machine.use_cores()
    commandline.relay_logs(flags.verbose)
    logging.disable(logging.NOTSET if flags.verbose else logging.WARNING)  # rows say what warnings would say
    found: dict[str, list[Row]] = {}
    for group, rows in groups(flags):
        if group not in found and not flags.json:
            write(("\n" if found else "") + group + "\n")
        for row in map(publishable, rows):
            found.setdefault(group, []).append(row)
            if not flags.json:
                write("\n".join(table_lines(row)) + "\n")
    logging.disable(logging.NOTSET)
    rows, seconds = [row for group in found.values() for row in group], time.perf_counter() - start
    write(f"{to_json(found, seconds)}\n" if flags.json else f"\n{summary(rows, seconds)}\n")
    return exit_code(rows)


def main() -> int:
    return commandline.run(Flags, program)
