# shellcheck shell=bash
# Sourced by the scripts beside it: moves to the repository root, defines prepare_environment.

repository=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$repository" || exit
venv_python=.venv/bin/python

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

# Prints the first command that is Python 3.11 or newer and can make a virtual environment.
find_python() {
    local candidate found_without_venv=""
    for candidate in python3.13 python3.12 python3.11 python3; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
        found_without_venv=$candidate
    done
    if [[ -n $found_without_venv ]]; then
        fail "$found_without_venv has no venv module; install it (Debian, Ubuntu: apt install python3-venv)"
    fi
    fail "Python 3.11 or newer is needed; none of python3.13, python3.12, python3.11, python3 is that"
}

# Leaves a .venv that runs Python 3.11 or newer and has pip.
ensure_venv() {
    local python
    if [[ ! -e .venv && ! -L .venv ]]; then
        python=$(find_python)
        printf 'Creating .venv with %s\n' "$("$python" -V)"
        "$python" -m venv --without-pip .venv || fail "$python could not create $repository/.venv"
    fi
    "$venv_python" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null ||
        fail "$repository/.venv is broken; delete that folder and run this again"
    "$venv_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$repository/.venv has $("$venv_python" -V), 3.11 or newer is needed; delete that folder"
    # pip comes in a step of its own, so that an interruption between the two is made good next time.
    if ! "$venv_python" -m pip --version >/dev/null 2>&1; then
        "$venv_python" -m ensurepip --default-pip >/dev/null || fail "could not put pip into $repository/.venv"
    fi
}

# Installs memfold with what it needs, unless an earlier run has done so and nothing changed since.
# Arguments: the extra that is needed, "base" (none) or "dev"; "dev" holds all of "base".
prepare_environment() {
    local extra=$1 stamp=.venv/memfold-installed state target=.
    ensure_venv
    # An editable installation points to the folder, and packages belong to one version of Python.
    state="$(cat pyproject.toml constraints.txt | cksum) $("$venv_python" -V) $repository"
    if [[ -f $stamp ]]; then
        case $(<"$stamp") in
            "$extra $state" | "dev $state") return ;;
        esac
    fi
    if [[ -L .venv && -f $stamp && $(<"$stamp") != *" $repository" ]]; then
        fail "$repository/.venv is a link to the environment of another folder; delete it"
    fi
    if [[ $extra != base ]]; then
        target=".[$extra]"
    fi
    rm -f "$stamp"
    printf 'Installing memfold into .venv: some minutes the first time, PyTorch is large\n'
    # Python compiles what is imported by itself; all of every package takes most of a minute.
    "$venv_python" -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e "$target" ||
        fail "the installation did not finish; run this again to continue"
    # Written last and moved into place, so that an interrupted installation is done again.
    printf '%s\n' "$extra $state" >"$stamp.partial"
    mv "$stamp.partial" "$stamp"
}
