"""Says what to type now: this program lies in the package paligemma. annotate.py and cluster.py are links to this file."""

import sys
from pathlib import Path

if __name__ == "__main__":
    NAME = Path(sys.argv[0]).stem
    sys.exit(f"error: {NAME}.py is now a part of paligemma. Type: python -m paligemma {NAME} (the flags are the same)")
