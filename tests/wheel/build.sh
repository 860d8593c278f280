#!/usr/bin/env bash
# `build.sh FOLDER`: a wheel and an sdist that PyPI would take; `build.sh FOLDER --resolve` also asks whether every
# dependency has a wheel for Python 3.11 to 3.14 (the versions of the extras that the README names, too).
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
out=$(realpath -m "${1:?name a folder}")
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q build twine
"$work/venv/bin/python" -m build --outdir "$out" "$root" >"$work/log" 2>&1 || { tail -20 "$work/log"; exit 1; }
"$work/venv/bin/python" -m twine check --strict "$out"/*
if tar -tzf "$out"/*.tar.gz | grep -E '(^|/)(\.ci|\.venv|out)/'; then echo "the sdist holds what is not the project's"; exit 1; fi
[ "${2:-}" = --resolve ] || exit 0
wheel=$(echo "$out"/*.whl)
for version in 3.11 3.12 3.13 3.14; do
  "$work/venv/bin/python" -m pip install -q --dry-run --ignore-installed --only-binary :all: --python-version "$version" \
    --target "$work/target" "$wheel[datasets,fast,gguf,explorer,posttrain]" || { echo "Python $version: does not resolve"; exit 1; }
  echo "Python $version: every dependency has a wheel"
done
