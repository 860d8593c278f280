#!/usr/bin/env bash
# Whether a control vector that export writes steers llama.cpp as the toolkit steers the same GGUF. Not part of CI.
#
#   tests/serve/llama_cpp/run.sh MODEL.gguf SAE [more of compare.py]
#
# llama.cpp comes inside the wheel of xllamacpp, which offers no control vectors in Python: shim.cpp, built against the
# headers of the same release's source, reads the file with llama.cpp's own loader. The environment is made once.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
env=${LLAMA_CPP_ENV:-$root/.venv-llama-cpp}
release=2026.10.11549
if [ ! -f "$env/shim.so" ]; then
    python3 -m venv "$env"
    "$env/bin/pip" install -q "xllamacpp==$release" numpy
    "$env/bin/pip" download -q --no-deps --no-binary :all: -d "$env" "xllamacpp==$release"
    tar -xzf "$env/xllamacpp-$release.tar.gz" -C "$env"
    source=$env/xllamacpp-$release/thirdparty/llama.cpp
    # the wheel is built with the strings of libstdc++ before GCC 5, as manylinux2014 has them
    g++ -std=c++17 -O1 -shared -fPIC -D_GLIBCXX_USE_CXX11_ABI=0 -I"$source/include" -I"$source/common" -I"$source/ggml/include" \
        -I"$source/vendor" "$here/shim.cpp" -o "$env/shim.so"
fi
cd "$root"
PYTHONPATH=src "${PYTHON:-.venv/bin/python}" "$here/compare.py" "$env" "$@"
