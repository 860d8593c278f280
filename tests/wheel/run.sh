#!/usr/bin/env bash
# A wheel built from the tree, installed where no checkout is, must run the demo: the lab travels inside.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
"$root/.venv/bin/python" -m build --wheel --outdir "$work/dist" "$root" >"$work/build.log" 2>&1 || { tail -20 "$work/build.log"; exit 1; }
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q -c "$root/constraints.txt" "$work"/dist/*.whl
cd "$work"
HF_HUB_OFFLINE=1 HOME="$work/home" "$work/venv/bin/qwen-scope" demo | tail -n 12
echo "wheel: $(stat -c %s "$work"/dist/*.whl) bytes, demo ran outside any checkout"
