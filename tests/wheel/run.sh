#!/usr/bin/env bash
# A wheel built from the tree (and an sdist, both as PyPI takes them), installed with the extras that the README names into an empty environment, must run the
# demo and every command of the README that needs no Hub, in an empty folder: the lab travels inside, nothing else does.
# pyright, in a project that depends on it, sees the public types.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
bash "$root/tests/wheel/build.sh" "$work/dist"
python3 -m venv "$work/venv"
extras=$(grep -oE '\bmake (explorer|posttrain|datasets|fast|gguf|gpu|track|spread)\b' "$root/README.md" | cut -d' ' -f2 | sort -u | paste -sd,)
"$work/venv/bin/python" -m pip install -q -c "$root/constraints.txt" "$(echo "$work"/dist/*.whl)[$extras]"
mkdir "$work/empty" && cd "$work/empty"
export HF_HUB_OFFLINE=1 HOME="$work/home" PATH="$work/venv/bin:$PATH"
qwen-scope demo | tail -n 12
python - "$root/README.md" >"$work/lines" <<'P'
import pathlib, re, sys
for block in re.findall(r"^```sh\n(.*?)^```", pathlib.Path(sys.argv[1]).read_text("utf-8"), re.S | re.M):
    print(*(line for line in block.replace("\\\n", " ").splitlines() if line.startswith("qwen-scope ")), sep="\n")
P
n=0
while IFS= read -r line; do
  bash -c "$line" >"$work/out" 2>&1 </dev/null || { echo "fails: $line"; tail -n 5 "$work/out"; exit 1; }
  n=$((n + 1))
done <"$work/lines"
python -c 'import gradio, trl, qwen_scope.explorer, qwen_scope.posttrain'
[ "$(qwen-scope --version)" = "qwen-scope $(python -c 'import qwen_scope; print(qwen_scope.__version__)')" ]
# A project that depends on the wheel sees our types: Unknown anywhere in it, or another type than it names, is an error.
mkdir "$work/project" && cp "$root/tests/wheel/uses_types.py" "$work/project/"
cat >"$work/project/pyrightconfig.json" <<J
{"include": ["uses_types.py"], "typeCheckingMode": "strict", "pythonVersion": "3.11"}
J
"$root/.venv/bin/pyright" --project "$work/project" --pythonpath "$work/venv/bin/python"
echo "wheel: $(stat -c %s "$work"/dist/*.whl) bytes with [$extras]; the demo and $n commands of the README ran outside any checkout"
