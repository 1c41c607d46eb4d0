#!/usr/bin/env bash
# The paper in miniature, on two CPU cores: about 7 minutes after installation.
#
#   bash recipes/demo.sh [--seed N] [--output DIR] [--sft_steps N] [--grpo_steps N]
#                        [--eval_problems N] [--eval_samples N]
#
# Stage 1 (SFT) teaches a tiny random model chained arithmetic from long-winded traces: accuracy
# goes from 0 to about 0.9. Stage 2 (GRPO with format, cosine and length rewards, vLLM rollouts)
# makes its answers shorter, accuracy stays. Then base, SFT and SFT + GRPO are evaluated at several
# token budgets. All are the real programs with other flags, on two torchrun ranks; nothing is
# downloaded but packages. DIR then has a table, a plot (eval/budgets.png) and a page on the GRPO
# run to open in a browser.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seed=1 output="" sft_steps=1000 grpo_steps=30 eval_problems=200 eval_samples=4
while [ $# -gt 0 ]; do
  case "$1" in
    --seed | --output | --sft_steps | --grpo_steps | --eval_problems | --eval_samples)
      [ $# -ge 2 ] || { echo "demo.sh: $1 needs a value" >&2; exit 2; }
      printf -v "${1#--}" '%s' "$2"
      shift 2 ;;
    *)
      sed -n '2,13s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
      echo "demo.sh: unknown argument $1" >&2
      exit 2
      ;;
  esac
done
output=${output:-runs/demo-seed$seed}

# shellcheck source=recipes/setup.sh
source recipes/setup.sh
started=$SECONDS
launch=(torchrun --standalone --nproc_per_node 2)
# One thread per rank; nothing to look up online.
export OMP_NUM_THREADS=1 TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1

echo "== demo, seed $seed: data and a random model in $output (an earlier demo there is replaced)"
if [ -e "$output" ] && [ -n "$(ls -A "$output")" ] && [ ! -f "$output/.demo" ]; then
  echo "demo.sh: --output $output holds something that is no demo; choose another folder" >&2
  exit 2
fi
rm -rf "$output"
mkdir -p "$output" && touch "$output/.demo"
python recipes/make_demo.py --output "$output" --seed "$seed"

echo "== stage 1: SFT, $sft_steps steps"
"${launch[@]}" train_sft.py \
  --model_name_or_path "$output/base" --dataset "$output/train.jsonl" \
  --output_dir "$output/sft" --cache_dir "$output/cache" \
  --system_prompt none --chat_template tokenizer --max_length 1024 \
  --gradient_accumulation_steps 1 --max_steps "$sft_steps" --learning_rate 1e-3 \
  --lr_scheduler_type cosine_with_min_lr --min_lr_rate 0.05 --warmup_ratio 0.05 \
  --adam_beta2 0.99 --weight_decay 0.1 --activation_checkpointing none --save_steps 0 --seed "$seed"

echo "== stage 2: GRPO, $grpo_steps steps of 16 problems x 8 answers"
"${launch[@]}" train_grpo.py \
  --model_name_or_path "$output/sft/final" --dataset "$output/rl.jsonl" \
  --output_dir "$output/grpo" --system_prompt none \
  --max_prompt_length 128 --max_completion_length 320 --cosine_max_length 320 \
  --num_prompts_per_step 16 --num_generations 8 --top_p 1 --min_p 0 \
  --max_steps "$grpo_steps" --learning_rate 2e-4 --warmup_ratio 0.1 --adam_beta2 0.99 \
  --activation_checkpointing none --max_tokens_per_microbatch 4096 --save_steps 0 --seed "$seed"

echo "== evaluation: $eval_problems held-out problems x $eval_samples samples"
models="base=$output/base,SFT=$output/sft/final,SFT + GRPO=$output/grpo/final"
"${launch[@]}" evaluate.py \
  --model "$models" --benchmark "$output/test.jsonl" --limit "$eval_problems" \
  --num_samples "$eval_samples" --budgets 64,96,128,192,320 --prompt_style none \
  --top_p 1 --min_p 0 --seed "$seed" --output_dir "$output/eval" --plot "$output/eval/budgets.png"

echo "== report: rewards, lengths and every answer of a step, to open in a browser"
python recipes/report.py "$output/grpo"

seconds=$((SECONDS - started))
echo "== demo done in $((seconds / 60)) min $((seconds % 60)) s after set-up"
