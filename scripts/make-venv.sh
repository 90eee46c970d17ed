#!/usr/bin/env bash
# Makes a virtual environment with cogtune in it, or brings an existing one up to date.
#
#   scripts/make-venv.sh VENV EXTRAS CONSTRAINTS TORCH TORCHVISION
#
# EXTRAS is a comma list of pyproject.toml's extras. TORCH and TORCHVISION are versions; torchvision is installed only
# with the `dev` extra. On Linux without an NVIDIA driver torch is the CPU build from PyTorch's public index, because the
# wheel on PyPI brings several GB of CUDA libraries. Set PYTHON to choose the interpreter.
set -euo pipefail
venv=$1 extras=$2 constraints=$3 torch=$4 torchvision=$5
cpu_index=https://download.pytorch.org/whl/cpu

say() { printf 'setup: %s\n' "$*"; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            printf '%s' "$candidate"
            return
        fi
    done
    say "no Python >= 3.11 found (tried: ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python})" >&2
    say "install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2
    return 1
}

if [[ ! -x $venv/bin/python ]]; then
    python=$(find_python)
    say "creating $venv with $("$python" --version)"
    if ! "$python" -m venv "$venv"; then
        rm -rf "$venv"
        say "\`$python -m venv\` failed; on Debian and Ubuntu install python3-venv" >&2
        exit 1
    fi
fi
python=$venv/bin/python
pip() { "$python" -m pip --disable-pip-version-check --no-input "$@"; }

has() { [[ $("$python" -c "import importlib.metadata as m; print(m.version('$1').split('+')[0])" 2>/dev/null) == "$2" ]]; }

wanted=("torch==$torch")
[[ ,$extras, == *,dev,* ]] && wanted+=("torchvision==$torchvision")
if has torch "$torch" && { [[ ${#wanted[@]} == 1 ]] || has torchvision "$torchvision"; }; then
    say "torch $torch is there"
elif [[ $(uname -s) == Linux ]] && ! nvidia-smi -L >/dev/null 2>&1; then
    # One quick look first: pip itself would retry for minutes where the index cannot be reached.
    if ! { "$python" -c "import urllib.request as u; u.urlopen('$cpu_index/torch/', timeout=10)" >/dev/null 2>&1 &&
        say "no NVIDIA driver: torch $torch, CPU build, from $cpu_index" &&
        pip install --quiet --no-deps --index-url "$cpu_index" --retries 1 "${wanted[@]}"; }; then
        say "$cpu_index cannot be used from here; torch comes from pip's default index (often the CUDA build, several GB)"
    fi
fi

say "installing cogtune[$extras] under $constraints"
pip install --quiet --editable ".[$extras]" "${wanted[@]}" --constraint "$constraints"
say "ready: $("$python" -c "import importlib.metadata as m; print(', '.join(f'{n} {m.version(n)}' for n in ('torch', 'transformers', 'peft')))")"
