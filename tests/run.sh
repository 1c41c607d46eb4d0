#!/usr/bin/env bash
# The whole suite on a fresh machine: set-up, lint, tests.
# Arguments go to pytest: bash tests/run.sh -k packing
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
[ $# -eq 0 ] || exec python -m pytest tests "$@"

# Two halves side by side: most of the time goes into starting processes, which takes one core.
half=(tests/test_{demo,evaluate,grpo,report,rollout}.py)
log=$(mktemp)
python -m pytest "${half[@]}" >"$log" 2>&1 &
half_id=$!
trap 'kill "$half_id" 2>/dev/null || true; rm -f "$log"' EXIT
status=0 half_status=0
python -m pytest tests "${half[@]/#/--ignore=}" || status=$?
wait "$half_id" || half_status=$?
cat "$log"
exit $((status ? status : half_status))
