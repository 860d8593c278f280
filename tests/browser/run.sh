#!/usr/bin/env bash
# The web page in a real browser: Debian's Chromium, driven by Python's playwright, headless and without a sandbox.
set -euo pipefail
cd "$(dirname "$0")/../.."
if ! command -v chromium >/dev/null; then
  as_root=""; [ "$(id -u)" = 0 ] || as_root="sudo"
  $as_root apt-get update -q >/dev/null
  DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -q --no-install-recommends chromium fonts-noto-core >/dev/null
fi
.venv/bin/python -m pytest tests/browser "$@"
