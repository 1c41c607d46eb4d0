#!/usr/bin/env bash
# Lot 2 of the GPU checks: real vLLM on one GPU, in bf16, within 8 minutes.
#
#   bash benchmarks/gpu_grpo.sh [SFT steps (300)] [GRPO steps (20)]
#
# 1. gpu_rollout_check.py: probe gaps, CUDA graphs, reloads, sleep mode, kill -9
# 2. the demo's SFT, then its GRPO twice: engines awake, and asleep while the trainer updates
# 3. evaluate.py on base, SFT and both GRPO models
# Then a line per GRPO run: seconds per phase, tokens/s, gaps between vLLM and the trainer.
# Where vLLM is not installed, .vllm/ is unpacked: vLLM and wheels, cut down to fit a lent machine.
# The output goes to runs/gpu_grpo, and to $OUT where that is set. On a CPU everything runs but
# sleep mode; the figures say nothing then.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
sft_steps=${1:-300} grpo_steps=${2:-20} run=runs/gpu_grpo
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONUNBUFFERED=1
python=${PYTHON:-python3}

if [ -d .vllm ] && ! "$python" -c 'import vllm' 2>/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --target /tmp/vllm .vllm/wheels/*.whl
  tar -xJf .vllm/vllm-*.tar.xz -C /tmp/vllm
  export PYTHONPATH=/tmp/vllm
fi

step() { # a name and a command: a failure is printed, and the rest still runs
  echo "== $1"
  timeout 150 "${@:2}" || echo "BAD: $1 ended with status $?"
}

grpo() { # a name, and flags of train_grpo.py
  step "GRPO $1" "$python" train_grpo.py --output_dir "$run/$1" \
    --model_name_or_path "$run/sft/final" --dataset "$run/rl.jsonl" --system_prompt none \
    --max_prompt_length 128 --max_completion_length 320 --cosine_max_length 320 \
    --num_prompts_per_step 16 --num_generations 8 --top_p 1 --min_p 0 \
    --max_steps "$grpo_steps" --learning_rate 2e-4 --warmup_ratio 0.1 --adam_beta2 0.99 \
    --max_tokens_per_microbatch 16384 --save_steps 0 "${@:2}"
}

rm -rf "$run"
step "engine" "$python" benchmarks/gpu_rollout_check.py
step "data and a random model" "$python" recipes/make_demo.py --output "$run" --seed 1
step "SFT" "$python" train_sft.py --output_dir "$run/sft" \
  --model_name_or_path "$run/base" --dataset "$run/train.jsonl" --cache_dir "$run/cache" \
  --system_prompt none --chat_template tokenizer --max_length 1024 \
  --gradient_accumulation_steps 2 --max_steps "$sft_steps" --learning_rate 1e-3 \
  --lr_scheduler_type cosine_with_min_lr --min_lr_rate 0.05 --warmup_ratio 0.05 \
  --adam_beta2 0.99 --weight_decay 0.1 --save_steps 0
grpo awake
if nvidia-smi -L >/dev/null 2>&1; then grpo asleep --vllm_sleep true; fi
models="base=$run/base,SFT=$run/sft/final,SFT + GRPO=$run/awake/final"
[ -d "$run/asleep/final" ] && models+=",asleep=$run/asleep/final"
step "evaluation" "$python" evaluate.py --model "$models" --benchmark "$run/test.jsonl" \
  --num_samples 4 --budgets 96,320 --prompt_style none --top_p 1 --min_p 0 --output_dir "$run/eval"

"$python" - "$run"/*/metrics.jsonl <<'PY'
import json
import statistics
import sys

for path in sys.argv[1:]:
    rows = [json.loads(line) for line in open(path)][2:]
    names = [name for name in rows[0] if name.startswith(("time/", "sync/", "rollout/"))]
    middle = {name: round(statistics.median(row[name] or 0 for row in rows), 5)
              for name in [*names, "tokens_per_second"]}
    print(path, json.dumps(middle))
PY
[ -n "${OUT:-}" ] && cp "$run"/awake/metrics.jsonl "$OUT/awake.jsonl"
exit 0
