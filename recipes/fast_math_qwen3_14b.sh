#!/usr/bin/env bash
# Fast-Math-Qwen3-14B: Fast-Math-R1's stage 2 on Qwen3-14B, without stage 1, as run with TRL 0.17.
#
#   bash recipes/fast_math_qwen3_14b.sh [--faithful] [build | grpo | evaluate [flags]]      see recipes/stages.sh
#
# Hardware   one machine with 8 x H200 (141 GB); the original trained on four and sampled on the other four.
# Hours      12 published; about 2 here for 50 steps   (projected: half the answers of Fast-Math-R1's stage 2, up to 1.5 x longer)
#
# Numbers to compare with (published; pass@1 over 64 samples, mean output tokens):
#   AIME24 | AIME25 at a budget of   32000                      16000                     8000
#   Qwen3-14B                 79.3,13669 | 69.5,16481   64.5,11351 | 50.4,12522   28.4,7374 | 19.5,7485
#   Fast-Math-Qwen3-14B       77.6, 9740 | 66.6,12281   72.6, 8793 | 60.1,10195   50.7,6260 | 36.0,6618
#
# What is different from fast_math_r1_14b.sh: no stage 1; 8 problems per step; answers up to 24,000 tokens; TRL's sampling
# (temperature 0.9, no nucleus) and its loss, one mean over all tokens. Where we differ from the original, and why: as in
# the stage 2 of that script; and all tokens of the step share one denominator, where TRL had one per local batch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
MODEL=${MODEL:-Qwen/Qwen3-14B}
RUN=${RUN:-runs/fast_math_qwen3_14b}
GPUS=${GPUS:-8}
# shellcheck source=recipes/stages.sh
source recipes/stages.sh

# What --faithful adds: each line restores one oddity of the original; the same number, the same oddity in all recipes.
grpo_faithful=(
  --length_unit chars --cosine_max_length 48000          # [1]
  --length_scope local_batch --length_prompts 2          # [2]
  --bad_gold_reward 1.0                                  # [3] rows with an unreadable answer stay
  --swap_verify true                                     # [4]
  --answer_scope full                                    # [6] a box after </think> wins
  --format_strict false                                  # [7]
  --rollout_is_cap 0                                     # [21]
  --mask_truncated_completions false                     # [23]
)
# Not restored: top_k 50, which train_grpo.py does not have (the gradient would be that of another policy) [21]; the ZeRO-3
# offload file that the README names and the repository lacks [35].

build() {
  python data.py build --recipe fast_math_r1_grpo --output "$RUN/grpo.jsonl" --benchmark_dir "$BENCHMARKS" "$@"
}

grpo() { # 8 problems x 8 answers per step
  "${LAUNCH[@]}" train_grpo.py \
    --model_name_or_path "$MODEL" --dataset "$RUN/grpo.jsonl" --output_dir "$RUN/grpo" --benchmark_dir "$BENCHMARKS" \
    --system_prompt grpo --chat_template tokenizer \
    --num_prompts_per_step 8 --num_generations 8 --max_prompt_length 512 --max_completion_length 24000 \
    --temperature 0.9 --top_p 1.0 --min_p 0.0 \
    --reward_funcs format,cosine,length --cosine_max_length 15360 \
    --learning_rate 4e-6 --lr_scheduler_type cosine --warmup_ratio 0 --max_steps 50 \
    --beta 0.04 --epsilon 0.2 --epsilon_high 0.2 --num_iterations 1 --loss_type dapo --save_steps 10 \
    --tensor_parallel_size 2 --gpu_memory_utilization 0.3 --compile true \
    "${grpo_faithful[@]}" "$@"
}

evaluate() { # generated once at the largest budget; the smaller ones are read off the same samples
  launch_evaluation --model "base=$MODEL,grpo=$RUN/grpo/final" \
    --benchmark aime24,aime25 --num_samples 64 --budgets 8000,12000,16000,24000,32000 \
    --temperature 1.0 --top_p 0.9 --min_p 0.05 \
    --output_dir "$RUN/eval" --plot "$RUN/eval/budgets.png" "$@"
}

run_stages "build grpo evaluate" "$@"
