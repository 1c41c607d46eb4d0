#!/usr/bin/env bash
# G1-G8 on one H200: one command, ends well inside ten minutes; needs only torch, transformers and safetensors.
#   bash benchmarks/h200.sh [--budget 480] [--only G2,G3] [--tiny]     --tiny: the same code on tiny shapes, on the CPU
# The table and the JSON line go to stdout, and to $OUT/h200.json where OUT is set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTORCH_ALLOC_CONF=expandable_segments:True
exec timeout 570 "${PYTHON:-python3}" benchmarks/h200.py "$@" # results are printed as they come
