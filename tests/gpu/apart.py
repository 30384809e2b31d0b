"""Runs a function of the tests in another process, because it changes Triton or torch.cuda.

Triton's wheels for Linux include ptxas, the assembler of CUDA, and need no GPU. requirements-dev.txt installs one.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_apart(module: str, function: str, *arguments: object, timeout_s: float = 600, **environment: str) -> object:
    """The result of `function(*arguments)` of a module, computed by another process. Arguments and result must fit into JSON."""
    code = f"import json, sys\nfrom {module} import {function} as work\n"
    code += "print('RESULT', json.dumps(work(*json.loads(sys.argv[1]))))"
    with tempfile.TemporaryDirectory() as folder:
        environment |= {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": folder, "TORCHINDUCTOR_CACHE_DIR": folder}
        command = [sys.executable, "-c", code, json.dumps(arguments)]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=timeout_s
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[len("RESULT ") :])
