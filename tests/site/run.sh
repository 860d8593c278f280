#!/usr/bin/env bash
# The documentation as a site, in an environment with the extra `docs`: a warning, a dead link or anchor is an error.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
venv="$root/.venv-site"
if [ ! -f "$venv/.ready" ]; then
  rm -rf "$venv"
  python3 -m venv "$venv"
  "$venv/bin/python" -m pip install -q -c "$root/constraints.txt" -e "$root[docs]"
  touch "$venv/.ready"
fi
cd "$root"
NO_MKDOCS_2_WARNING=1 "$venv/bin/mkdocs" build --strict --quiet --site-dir "$work/site"
for page in index concepts commands api; do test -s "$work/site/$page.html"; done
echo "site: $(find "$work/site" -name '*.html' | wc -l) pages without a warning"
