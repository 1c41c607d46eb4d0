#!/usr/bin/env bash
# C1-C2 and G1-G8 on one H100 or H200: one command, ends within 7 minutes. Needs torch,
# transformers and safetensors, no vLLM.
#   bash benchmarks/h200.sh [--budget 380] [--only G2,G3]
#   bash benchmarks/h200.sh --tiny               the same code on tiny shapes, on the CPU
# The table and the JSON line go to stdout, and to $OUT/h200.json where OUT is set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTORCH_ALLOC_CONF=expandable_segments:True
exec timeout 420 "${PYTHON:-python3}" benchmarks/h200.py "$@" # results are printed as they come
