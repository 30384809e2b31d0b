"""`python -m paligemma`, and `paligemma` once it is installed: runs inference.py, or the program that the first word names.

    python -m paligemma detect street.jpg car person --save out.png
    python -m paligemma finetune --train train.jsonl --output runs/mine

Checked in tests/programs/test_commandline.py.
"""

import importlib
import sys

if sys.version_info < (3, 10):
    sys.exit("error: Python %d.%d is too old. This program needs 3.10 or newer." % sys.version_info[:2])

from paligemma.programs import commandline


def main() -> int:
    commandline.leave_on_signals()  # before the program is imported, which takes a while
    if sys.argv[1:2] and sys.argv[1] in commandline.PROGRAMS:
        return importlib.import_module(f"paligemma.programs.{sys.argv.pop(1)}").main()
    from paligemma import inference

    return inference.main()


if __name__ == "__main__":
    sys.exit(main())
