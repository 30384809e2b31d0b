"""`python -m paligemma` and the installed command `paligemma`: run inference.py, or the program that the first argument names.

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
    commandline.leave_on_signals()  # first, because importing the program is slow
    if sys.argv[1:2] and sys.argv[1] in commandline.PROGRAMS:
        return importlib.import_module(f"paligemma.programs.{sys.argv.pop(1)}").main()
    from paligemma import inference

    return inference.main()


if __name__ == "__main__":
    sys.exit(main())
