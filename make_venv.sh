# Sourced by launch_inference.sh and run_tests.sh: makes .venv next to them, installs the requirements files $@ into it, and sets
# $python to the interpreter in it. .venv keeps a copy of each requirements file, so that the next run only compares them (cmp).
# An interrupted installation leaves .venv/unfinished and starts again, because pip treats a partly installed package as installed.

home=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=$home/.venv/bin/python

is_installed() {
    [ -x "$python" ] && [ ! -e "$home/.venv/unfinished" ] || return 1
    local file
    for file in "$@"; do cmp -s -- "$home/$file" "$home/.venv/$file" || return 1; done
}

make_venv() {
    local base=${PYTHON:-python3} quiet=--quiet wanted=${!#} file  # wanted: the last argument, a file that includes the others
    [ -t 2 ] && quiet=--progress-bar=on
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
        echo "error: Python 3.10 or newer is needed. $base is older or cannot be run. Install a newer one, or name it:" \
            "PYTHON=python3.12 bash $0" >&2
        exit 6
    }
    if command -v flock >/dev/null; then  # if two scripts start at once, the second waits here and then finds all files installed
        exec 9<"$home/make_venv.sh"
        flock 9 || true
        ! is_installed "$@" || return 0
    fi
    if [ -e "$home/.venv/unfinished" ] || ! "$python" -m pip --version >/dev/null 2>&1; then
        "$base" -m venv --clear "$home/.venv" >&2
    fi
    : >"$home/.venv/unfinished"
    echo "Installing $wanted into $home/.venv. This happens once and takes some minutes." >&2
    "$python" -m pip install --disable-pip-version-check "$quiet" -r "$home/$wanted" >&2
    for file in "$@"; do cp -- "$home/$file" "$home/.venv/$file"; done
    rm -- "$home/.venv/unfinished"
}

is_installed "$@" || make_venv "$@"
exec 9<&-  # releases the lock
