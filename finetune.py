"""Prints what to type now: this program is a part of the package paligemma. annotate.py and cluster.py are links to this file."""

import sys
from pathlib import Path

if __name__ == "__main__":
    NAME = Path(sys.argv[0]).stem
    sys.stderr.write(f"error: {NAME}.py is now a part of paligemma. Type: python -m paligemma {NAME} (--help lists its flags)\n")
    sys.exit(2)
