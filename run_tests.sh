#!/usr/bin/env bash
# Runs the tests, from any folder: makes .venv if it is missing, installs requirements-dev.txt, passes its arguments to pytest.
# Each core runs whole test files, in one thread. Use `-n 0` to run all in one process, which --pdb needs. `-m quick` takes a minute.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/make_venv.sh" requirements.txt requirements-dev.txt
cd -- "$home"
exec "$python" -m pytest -n auto --dist loadfile "$@"
