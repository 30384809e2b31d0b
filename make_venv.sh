# Sourced by launch_inference.sh and run_tests.sh: makes .venv next to them and installs the requirements files $@ into it.
# $python is then its python. .venv keeps a copy of each installed file, so that a second run needs only a `cmp` of each. An
# interrupted installation leaves .venv/unfinished and starts again, because pip takes a package that is half there for installed.

home=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=$home/.venv/bin/python

is_installed() {
    [ -x "$python" ] && [ ! -e "$home/.venv/unfinished" ] || return 1
    local file
    for file in "$@"; do cmp -s -- "$home/$file" "$home/.venv/$file" || return 1; done
}

make_venv() {
    local base=${PYTHON:-python3} quiet=--quiet wanted=${!#} file  # the last file named includes the others
    [ -t 2 ] && quiet=--progress-bar=on
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
        echo "error: Python 3.10 or newer is needed ($base is not). Install one, or name it: PYTHON=python3.12 bash $0" >&2
        exit 6
    }
    if command -v flock >/dev/null; then  # if two start at once, the second waits here and then finds all installed
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
