#!/usr/bin/env bash
# `ray-prefopt submit` with the code of this checkout:  cluster/submit.sh --wait -- train -c run.yaml
# PIP_FLAGS are further arguments for pip.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
# A copy, so that the build leaves nothing in the checkout.
mkdir "$folder/source"
cp -r "$root"/{pyproject.toml,README.md,LICENSE,ray_prefopt} "$folder/source"
python -m pip wheel --quiet --no-deps ${PIP_FLAGS:-} --wheel-dir "$folder" "$folder/source"
python -m ray_prefopt submit --wheel "$folder"/ray_prefopt-*.whl "$@"
