"""What a training run prints while it trains, and how a signal stops it. Checked in tests/programs/test_finetune.py."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from paligemma.learning.processes import is_first
from paligemma.programs import commandline
from paligemma.programs.commandline import note


def show(text: str) -> None:
    """Prints a line on stderr, in the first process only."""
    if is_first():
        note(text)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A context manager that collects signals. Yields: the list of received signals, which is empty at first.

    After the first signal, the run should finish the current update, save and stop. A second signal raises Interrupted.
    """
    received: list[int] = []

    def receive(signum: int, _frame: object) -> None:
        received.append(signum)
        if len(received) > 1:
            raise commandline.Interrupted(signum)
        if is_first():
            with suppress(OSError, ValueError):  # not print, because the signal may have interrupted a print
                os.write(sys.stderr.fileno(), b"\nthe run stops after this update and saves; a second signal stops it at once.\n")

    with commandline.handlers(receive):
        yield received


@contextmanager
def progress(step: int, steps: int) -> Iterator[Callable[[dict], None]]:
    """A context manager that shows the progress of a run. Yields: a function that shows a line of metrics.jsonl.

    A terminal shows a progress bar of the updates; elsewhere, about 20 updates of the run are printed. Scores are always printed.
    """
    is_terminal = sys.stderr is not None and sys.stderr.isatty() and is_first()
    interval, bar = max(1, steps // 20), None
    if is_terminal:
        from tqdm import tqdm

        bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)

    def show_line(line: dict) -> None:
        if "valid_loss" in line:
            scores = (f"{name} {value:.4g}" for name, value in line.items() if name not in ("step", "scored"))
            show(f"step {line['step']}: {', '.join(scores)} ({line['scored']})")
            return
        text = f"loss {line['loss']:.4f}, gradient {line['grad_norm']:.3g}"
        text += f", {line['skipped']} skipped" if line["skipped"] else ""
        if bar is not None:
            bar.set_postfix_str(text)
            bar.update()
        elif line["step"] % interval == 0 or line["step"] == steps:
            show(f"step {line['step']} of {steps}: {text}")

    try:
        yield show_line
    finally:
        if bar is not None:
            bar.close()
