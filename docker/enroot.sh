#!/bin/sh
# explora for enroot and pyxis, made without Docker; in the project's folder: sh docker/enroot.sh [OUT.sqsh]
set -eu
out=${1:-explora.sqsh}
base=$(sed -n 's/^ARG BASE=//p' docker/Dockerfile)
name=explora-build-$$
scratch=$(mktemp --directory)
trap 'rm -rf "$scratch"; enroot remove --force "$name" 2>/dev/null || true' EXIT

enroot import --output "$scratch/base.sqsh" "docker://$base"
enroot create --name "$name" "$scratch/base.sqsh"
# shellcheck disable=SC2016  # PATH is the container's
enroot start --root --rw --mount "$PWD:/mnt" "$name" sh -euc '
    mkdir -p /opt/explora && cd /mnt
    cp -r docker pyproject.toml README.md constraints.txt explora launch data_shards configs /opt/explora
    sh /opt/explora/docker/install.sh system gpu
    sh /opt/explora/docker/install.sh requirements gpu
    sh /opt/explora/docker/install.sh project
    echo "PATH=/opt/venv/bin:$PATH" >>/etc/environment
    echo "PYTHONUNBUFFERED=1" >>/etc/environment
    /opt/venv/bin/explora check /opt/explora/configs/explora-d-vitl14-fmow.yaml'
enroot export --output "$out" "$name"
