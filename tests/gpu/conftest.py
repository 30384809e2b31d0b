"""Which files are collected: those that need Triton only where requirements-dev.txt installs it, on Linux on x86-64."""

import platform
import sys

collect_ignore = ["test_cross_compile.py", "test_triton_products.py"]
if sys.platform == "linux" and platform.machine() == "x86_64":
    collect_ignore = []
