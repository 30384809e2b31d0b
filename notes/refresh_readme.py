"""Runs what README.md and the notes show, and puts the real output in its place: `python -m notes.refresh_readme`.

Three things are refreshed, all others stay as they are:
- in every block marked `console`, the lines behind a command ("$ ...") become what the command printed, stderr included;
- the counts of lines in the table of files;
- what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`, by the function that GENERATED of tables.py names.

runs/found.jsonl, which an example writes, is deleted before, since a folder's rows go on where they ended.
A comment above a console block may hold marks: `slow` (run only with --slow: minutes) and `last N` (keep the last N lines).
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from notes.tables import GENERATED

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
README = ROOT / "README.md"
BLOCK = re.compile(r"(?:<!-- (?P<marks>[a-z0-9 ]+) -->\n)?```console\n(?P<body>.*?)```\n", re.DOTALL)
FILE_ROW = re.compile(r"^\| \[(?P<file>[\w/.]+)\]\((?P=file)\) \| (?P<lines>\d+) \|", re.MULTILINE)
TIMEOUT_S = 1800


def run(command: str) -> str:
    """What a command prints, as seen from the project's folder, whose own path is left out."""
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
    """The page with every console block's output replaced by the real one."""

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
    """The page with the true number of lines beside each file."""

    def replace(row: re.Match) -> str:
        lines = (ROOT / row["file"]).read_text(encoding="utf-8").count("\n")
        return row[0].replace(f"| {row['lines']} |", f"| {lines} |")

    return FILE_ROW.sub(replace, text)


def refresh_generated(text: str) -> str:
    """The page with every marked part made anew."""
    for name, make in GENERATED.items():
        between = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if between.search(text):
            made = make()
            text = between.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="Puts real output into README.md and notes/*.md.")
    parser.add_argument("--slow", action="store_true", help="run the blocks that take minutes, too")
    parser.add_argument("--tables", action="store_true", help="run nothing, only make the tables anew: seconds")
    parser.add_argument("pages", nargs="*", type=Path, help="default: README.md and notes/*.md")
    options = parser.parse_args()
    (ROOT / "runs" / "found.jsonl").unlink(missing_ok=True)
    for page in options.pages or [README, *sorted(HERE.glob("*.md"))]:
        before = page.read_text(encoding="utf-8")
        after = before if options.tables else refresh_blocks(before, options.slow)
        after = refresh_generated(refresh_counts(after))
        page.write_text(after, encoding="utf-8")
        print(f"{page.name}: {'changed' if after != before else 'as it was'}")


if __name__ == "__main__":
    main()
