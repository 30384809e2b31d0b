"""Runs the commands that README.md, docs/ and notes/ show, and writes their real output: `python -m notes.refresh_readme`.

It refreshes three things and leaves everything else as it is:
- In each block marked `console`, the lines after a command ("$ ...") become what the command printed, stderr included.
- In the table of files, the numbers of lines become the real ones.
- The text between `<!-- begin NAME -->` and `<!-- end NAME -->` becomes what the function GENERATED[NAME] of tables.py returns.

An HTML comment above a console block may contain two marks: `slow` (the commands take minutes, so they run only with --slow) and
`last N` (only the last N lines of the output are kept). runs/found.jsonl, which one example writes, is deleted first, because
`annotate` would otherwise continue it.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from notes.tables import GENERATED

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("notes/*.md"))]
BLOCK = re.compile(r"(?:<!-- (?P<marks>[a-z0-9 ]+) -->\n)?```console\n(?P<body>.*?)```\n", re.DOTALL)
FILE_ROW = re.compile(r"^\| \[(?P<file>[\w/.]+)\]\(\.\./(?P=file)\) \| (?P<lines>\d+) \|", re.MULTILINE)
TIMEOUT_S = 1800


def run(command: str) -> str:
    """Runs a command in the project's folder. Returns its output, without the path of this folder."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "TERM": "dumb"}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    return done.stdout.replace(f"{ROOT}/", "").replace(str(ROOT), ".")


def commands(body: str) -> list[str]:
    """The commands of a console block."""
    return [line.removeprefix("$ ") for line in body.splitlines() if line.startswith("$ ")]


def refresh_blocks(text: str, is_slow: bool, execute: Callable[[str], str] = run) -> str:
    """The page with the real output in every console block."""

    def replace(block: re.Match) -> str:
        marks = (block["marks"] or "").split()
        if "slow" in marks and not is_slow:
            return block[0]
        lines = []
        for command in commands(block["body"]):
            output = execute(command).rstrip().splitlines()
            kept = output[-int(marks[marks.index("last") + 1]) :] if "last" in marks else output
            lines += [f"$ {command}", *kept]
        return block[0].replace(block["body"], "\n".join(lines) + "\n")

    return BLOCK.sub(replace, text)


def refresh_counts(text: str) -> str:
    """The page with the real number of lines of each file."""

    def replace(row: re.Match) -> str:
        lines = (ROOT / row["file"]).read_text(encoding="utf-8").count("\n")
        return row[0].replace(f"| {row['lines']} |", f"| {lines} |")

    return FILE_ROW.sub(replace, text)


def refresh_generated(text: str) -> str:
    """The page with every generated part replaced by a new one."""
    for name, make in GENERATED.items():
        between = re.compile(rf"(<!-- begin {name} -->(\n?)).*?(<!-- end {name} -->)", re.DOTALL)
        if between.search(text):
            made = make()
            text = between.sub(lambda found, made=made: f"{found[1]}{made}{found[2]}{found[3]}", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the real output of commands into README.md, docs/*.md and notes/*.md.")
    parser.add_argument("--slow", action="store_true", help="also run the commands that take minutes")
    parser.add_argument("--tables", action="store_true", help="run no command, only write tables and numbers of lines (seconds)")
    parser.add_argument("pages", nargs="*", type=Path, help="files to refresh (default: README.md, docs/*.md and notes/*.md)")
    options = parser.parse_args()
    (ROOT / "runs" / "found.jsonl").unlink(missing_ok=True)
    for page in options.pages or PAGES:
        before = page.read_text(encoding="utf-8")
        after = before if options.tables else refresh_blocks(before, options.slow)
        after = refresh_generated(refresh_counts(after))
        page.write_text(after, encoding="utf-8")
        print(f"{page.name}: {'changed' if after != before else 'unchanged'}")


if __name__ == "__main__":
    main()
