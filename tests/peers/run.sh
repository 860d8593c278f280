#!/usr/bin/env bash
# Files of ours in a peer's own hands, and its files in ours: `run.sh sae_lens | sparsify | dictionary_learning | delphi | quantised | saebench | hooks`.
# The peer lives in an environment of its own, made on the first run; one line per check, exit code 1 if one fails.
set -euo pipefail
peer="${1:?name a peer: sae_lens, sparsify, dictionary_learning, delphi, quantised, saebench or hooks}"
cd "$(dirname "$0")/../.."
venv=".venv-$peer"
if [ "$peer" = hooks ]; then venv=".venv-saebench"; fi # where TransformerLens is already
bin="$venv/bin"
torch="$(grep -h '^torch==' constraints.txt 2>/dev/null || echo torch==2.13.0)"

if [ ! -f "$venv/.ready" ]; then
  rm -rf "$venv"
  "${PYTHON:-python3}" -m venv "$venv"
  pip() { "$bin/python" -m pip --disable-pip-version-check install -q "$@"; }
  pip "$torch" # first, so that nobody asks for another build of it
  case "$peer" in
    sae_lens)
      pip sae_lens==6.54.12 "$torch"
      ;;
    sparsify)
      pip eai-sparsify==1.3.3 "$torch"
      ;;
    dictionary_learning)
      pip --no-deps dictionary-learning==0.1.0
      pip einops numpy safetensors tqdm "$torch"
      ;;
    delphi) # without vLLM, which only its own explainers need
      pip --no-deps eai-delphi==0.1.3
      pip "$torch" transformers datasets orjson safetensors simple_parsing jaxtyping anyio asyncer beartype aiofiles \
        blobfile flask fire faiss-cpu sentence-transformers
      ;;
    quantised) # the packages that quantise models, beside ours, which runs what they write
      pip -c constraints.txt "$torch" -e .
      pip -c constraints.txt auto-round==0.16.1 compressed-tensors==0.20.1 torchao==0.18.0 bitsandbytes==0.50.2 \
        "mlx[cpu]==0.32.4" mlx-lm==0.32.2 accelerate gguf
      ;;
    saebench | hooks) # with sae-probes and its data; our source runs there, too, beside an older numpy
      pip sae-bench==0.6.0 sae-probes==0.4.2 transformer-lens==3.9.0 sae_lens==6.54.12 lazy_loader "$torch"
      ;;
    *) rm -rf "$venv"; echo "unknown peer $peer" >&2; exit 2 ;;
  esac
  # Builds of these for another torch would break transformers' imports.
  "$bin/python" -m pip uninstall -q -y torchvision torchaudio 2>/dev/null || true
  touch "$venv/.ready"
fi

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 SPARSIFY_DISABLE_TRITON=1 TOKENIZERS_PARALLELISM=false
if [ "$peer" = quantised ]; then
  said="$work/said" # what the packages write on the way: shown where a check breaks off
  PYTHONPATH=src:. "$bin/python" -W ignore tests/peers/check_quantised.py "$work" 2>"$said" || { tail -n 5 "$said" >&2; exit 1; }
  exit
fi
if [ "$peer" = hooks ]; then
  # TransformerLens 3.9 generates other tokens with a cache than without under transformers 5.24, hooks or none.
  "$bin/python" -c "import duckdb, nnsight" 2>/dev/null || "$bin/python" -m pip --disable-pip-version-check install -q \
    nnsight==0.8.0 "$torch" $(grep -hE '^(duckdb|transformers)==' constraints.txt)
  OMP_NUM_THREADS=1 PYTHONPATH=src "$bin/python" -W ignore tests/peers/check_hooks.py
  exit
fi
if [ "$peer" = saebench ]; then
  probes="$("$bin/python" -c 'import importlib.util as u; print(u.find_spec("sae_probes").submodule_search_locations[0])')"
  OMP_NUM_THREADS=1 PYTHONPATH=src "$bin/python" -W ignore tests/peers/check_saebench.py "$probes"
  exit
fi
if [ "$peer" = delphi ]; then
  PYTHONPATH=src .venv/bin/python -W ignore tests/peers/ours_delphi.py "$work"
  "$bin/python" -W ignore tests/peers/check_delphi.py "$work"
  exit
fi
PYTHONPATH=src .venv/bin/python tests/peers/ours.py write "$peer" "$work"
"$bin/python" -W ignore "tests/peers/check_$peer.py" "$work"
PYTHONPATH=src .venv/bin/python tests/peers/ours.py check "$peer" "$work"
if [ "$peer" = sae_lens ]; then # what a person who comes from there types, in both
  "$bin/python" -m pip --disable-pip-version-check install -q lazy_loader jaxtyping
  mkdir "$work/calls"
  PYTHONPATH=src "$bin/python" -W ignore tests/peers/check_calls.py "$work/calls"
fi
