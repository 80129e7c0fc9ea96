#!/usr/bin/env bash
# Set up .venv with everything Hansa needs, the `hansa` command among it. Run by `make install` from the repository's root.
#
#   PYTHON=/path/to/python3   which interpreter; by default the first of at least 3.11 that can make environments
#   TORCH_INDEX=https://…     which index torch comes from, to choose its build (CPU, CUDA, ROCm); remembered in .venv
#
# A second run finds a stamp of what was asked for and returns at once. An environment that does not work, was moved,
# or whose installation was broken off, is made anew.
set -euo pipefail

readonly venv=.venv
readonly stamp=$venv/hansa-installed          # holds the key of what is installed
readonly unfinished=$venv/hansa-unfinished    # stands while an installation runs
readonly torch_index_file=$venv/hansa-torch-index
readonly constraints=deploy/constraints.txt
readonly extras='broker,site,train,dev'

main() {
    torch_index=${TORCH_INDEX:-$(cat "$torch_index_file" 2>/dev/null || true)}
    local wanted
    wanted=$(key)
    if [[ ! -e $unfinished && "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]] && works; then
        return
    fi
    if [[ -e $unfinished ]] || { [[ -e $venv ]] && ! works; }; then
        echo "The environment in $venv is unfinished or does not work: making it anew."
        rm -rf "$venv"
    fi
    [[ -e $venv ]] || make_environment
    touch "$unfinished"
    install_packages
    printf '%s\n' "$torch_index" >"$torch_index_file"
    printf '%s\n' "$wanted" >"$stamp"
    rm "$unfinished"
    echo "Installed: $venv/bin/hansa"
}

# What an installation depends on; the folder too, since an environment knows its own path.
key() {
    { cat pyproject.toml "$constraints" "${BASH_SOURCE[0]}"; printf '%s\n' "$torch_index" "$PWD"; } | sha256sum | cut -c1-64
}

works() {
    [[ "$("$venv/bin/python" -c 'import pip, sys; print(sys.prefix)' 2>/dev/null)" == "$PWD/$venv" ]] &&
        [[ "$(head -c 500 "$venv/bin/pip" 2>/dev/null)" == *"$PWD/$venv/bin/python"* ]]
}

make_environment() {
    local found='' candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14}; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        found=$candidate
        "$candidate" -c 'import ensurepip, venv' 2>/dev/null || continue
        echo "Making $venv with $("$candidate" --version)."
        "$candidate" -m venv "$venv"
        return
    done
    if [[ -n $found ]]; then
        local version
        version=$("$found" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        echo "$found (Python $version) cannot make virtual environments. On Debian or Ubuntu:" >&2
        echo "    sudo apt-get install python$version-venv" >&2
    else
        echo "Hansa needs Python 3.11 or later, and found none${PYTHON:+ at $PYTHON}. On Debian 12, Ubuntu 24.04 or later:" >&2
        echo "    sudo apt-get install python3 python3-venv" >&2
        echo "Elsewhere, install it and name it: make install PYTHON=/path/to/python3" >&2
    fi
    exit 1
}

install_packages() {
    echo "Installing the packages (some hundred megabytes, most of it torch; a few minutes the first time)."
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
    if [[ -n $torch_index ]]; then
        # A build is part of torch's version (2.13.0+cu130), which "==2.13.0" leaves open: another build must be asked for.
        if [[ -e $torch_index_file && "$(cat "$torch_index_file")" != "$torch_index" ]]; then
            pip_torch=("${pip[@]}" --force-reinstall)
        else
            pip_torch=("${pip[@]}")
        fi
        "${pip_torch[@]}" --index-url "$torch_index" "$(grep '^torch==' "$constraints")"
    fi
    "${pip[@]}" --constraint "$constraints" --editable ".[$extras]"
}

main
