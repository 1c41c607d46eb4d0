#!/usr/bin/env bash
# The whole suite on a fresh machine: set-up, lint, tests. Arguments go to pytest: bash tests/run.sh -k packing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=recipes/setup.sh
source recipes/setup.sh
ruff check .
exec python -m pytest tests "$@"
