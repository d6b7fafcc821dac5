# Sourced by the other scripts: makes virtual environments and fills them, once for every state of what they are made of.

export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1

fail() {
    echo "${0##*/}: $*" >&2
    exit 1
}

# make_venv FOLDER [OPTION…]: a fresh environment.
make_venv() {
    local folder=$1
    command -v python3 >/dev/null || fail "python3 is missing; install Python 3.11 or later"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$(python3 --version) is too old: 3.11 or later"
    echo "Making $folder" >&2
    rm -rf "$folder"
    if ! python3 -m venv "$@" >&2; then
        rm -rf "$folder"
        fail "python3 can't make virtual environments; on Debian and Ubuntu: apt install python3-venv"
    fi
}

# state FOLDER FILE…: what an environment is made of, in one word; some other word if it isn't there.
state() {
    { "$1/bin/python" --version && cat "${@:2}" || true; } 2>&1 | sha256sum
}

# install EXTRA: this package in .venv. EXTRA is empty, or [test], which holds all that empty does.
install() {
    local extra=$1 venv=.venv options=() sources=(pyproject.toml) file wanted
    for file in setup.py tgi/kernels/build.py tgi/kernels/csrc/*; do
        if [[ -f $file ]]; then sources+=("$file"); fi
    done
    wanted=$(state "$venv" "${sources[@]}")
    for file in "$venv/installed$extra" "$venv/installed[test]"; do
        if [[ -f $file && $(<"$file") == "$wanted" ]]; then return; fi
    done
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        # On a GPU machine the torch that fits its driver is often installed: an environment of its own would hide it.
        if command -v nvidia-smi >/dev/null && python3 -c 'import torch' 2>/dev/null; then
            options=(--system-site-packages)
        fi
        make_venv "$venv" "${options[@]}"
    fi
    if ! command -v nvidia-smi >/dev/null; then
        # An exact release first: the index's newest brings gigabytes of CUDA libraries.
        "$venv/bin/python" -m pip install "torch==2.13.0" >&2
    fi
    "$venv/bin/python" -m pip install -e ".$extra" >&2
    state "$venv" "${sources[@]}" >"$venv/installed$extra"
}
