#!/usr/bin/env bash
# `explore --mcp` asked by the protocol's own client, in an environment with the extra `mcp`.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=.venv-mcp
if [ ! -f "$venv/.ready" ]; then
  rm -rf "$venv"
  "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/python" -m pip install -q -c constraints.txt -e '.[mcp]' pytest beartype
  touch "$venv/.ready"
fi
"$venv/bin/python" -m pytest -q tests/explorer/test_mcp.py -p no:cacheprovider
