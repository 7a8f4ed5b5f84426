#!/bin/sh
# What every image of explora is made of: Docker, Apptainer and enroot run this one script.
#
#   sh install.sh system cpu|gpu         packages of Debian or Ubuntu, and the user that runs
#   sh install.sh requirements cpu|gpu   /opt/venv with what pyproject.toml asks for, in the locked versions
#   sh install.sh project                explora itself, from the folder above this script
#
# Run as root, in this order. The code comes last, so that a change in it does not load gigabytes again.
# Where torch comes from is pip's own business (PIP_EXTRA_INDEX_URL, pip.conf): left alone it takes PyPI's CUDA build.
set -eu
umask 022
cd "$(dirname "$0")/.."

system() {
    set -- ca-certificates python3 python3-venv
    set -- "$@" g++ python3-dev # torch.compile and Triton build their kernels when they run
    if [ "$variant" = gpu ]; then
        set -- "$@" ibverbs-providers libibverbs1 # without them NCCL leaves InfiniBand for plain sockets
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    apt-get install --yes --no-install-recommends "$@"
    rm -rf /var/lib/apt/lists/*
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "install.sh: $(python3 --version) is too old, explora needs 3.11; take a newer base image" >&2
        exit 1
    fi
    useradd --create-home --uid 10001 explora
    install --directory --owner explora --group explora /work
}

requirements() {
    # pip cannot install only what a project needs; but without its folders, explora is an empty wheel.
    empty=$(mktemp --directory)
    cp pyproject.toml README.md "$empty"
    wanted=$empty
    if [ "$variant" = gpu ]; then
        wanted="${empty}[gpu]"
    fi
    python3 -m venv /opt/venv
    /opt/venv/bin/pip install --no-cache-dir "$wanted" -c constraints.txt -c docker/constraints-cuda.txt
    rm -rf "$empty"
}

project() {
    /opt/venv/bin/pip install --no-cache-dir --no-deps --force-reinstall .
    rm -rf build explora.egg-info
}

step=${1:-} variant=${2:-}
case "$step $variant" in
    "system cpu" | "system gpu" | "requirements cpu" | "requirements gpu" | "project ") "$step" ;;
    *)
        echo "install.sh: '$step $variant' is none of: system cpu|gpu, requirements cpu|gpu, project" >&2
        exit 2
        ;;
esac
