#!/usr/bin/env bash
# The whole suite on a fresh machine: set-up, lint, tests. Arguments go to pytest: bash tests/run.sh -k packing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=recipes/setup.sh
source recipes/setup.sh
# The report page is tested in a real browser. Where none can be installed, that test says so.
if ! command -v chromium >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "run.sh: installing chromium for tests/test_report.py"
  { apt-get update && apt-get install -y --no-install-recommends chromium; } >/dev/null ||
    echo "run.sh: no chromium; tests/test_report.py will fail" >&2
fi
ruff check .
exec python -m pytest tests "$@"
