#!/usr/bin/env bash
# Fast-Math (arXiv 2507.08267) on 14B: r1 has both stages, nemotron and qwen3 are stage 2 alone.
#
#   bash recipes/fast_math.sh r1|nemotron|qwen3 [--faithful] [STAGE [flags]]
#
# Hardware   one machine with 8 x H200 (141 GB). 1, 2, 4, 16, 32 or 64 GPUs keep the same batch.
# Memory     traced (--dry_run --ranks 8), GB per GPU: stage 1 66; stage 2 61 (r1) to 70 (nemotron)
#            and 45 for vLLM. On 80 GB cards use --activation_checkpointing full (54 in stage 1), in
#            stage 2 --vllm_sleep true as well (52 to 58).
# Hours      build 1 on 16 cores (estimate). Here is projected, not measured:
#            r1 stage 1    published 10         here 4.0 to 5.3 for 10 epochs
#            r1 stage 2    published 10 to 16   here 1.9 to 2.3 for 50 steps
#            nemotron      published 12         here 2.8 to 3.4 for 50 steps
#            qwen3         published 12         here about 2 for 50 steps, of half as many answers
#
# Numbers to compare with (published; pass@1 over 64 samples, mean output tokens):
# AIME24 | AIME25 within   32000                     16000                    8000
# R1-Distill-Qwen-14B      66.9,11026 | 49.9,12310   61.0, 9708 | 46.2,10567  41.8,6587 | 31.1,6788
# Fast-Math-R1-14B         68.0, 8217 | 49.6, 9663   66.7, 8017 | 48.4, 9083  51.4,5939 | 36.3,6174
# OpenMath-Nemotron-14B    76.2,11493 | 64.5,13414   66.0,10399 | 54.2,11422  36.0,6978 | 27.2,7083
# Fast-OpenMath-Nemotron   70.7, 9603 | 61.4,11424   66.6, 8954 | 55.3,10190  47.6,6282 | 33.8,6589
# Qwen3-14B                79.3,13669 | 69.5,16481   64.5,11351 | 50.4,12522  28.4,7374 | 19.5,7485
# Fast-Math-Qwen3-14B      77.6, 9740 | 66.6,12281   72.6, 8793 | 60.1,10195  50.7,6260 | 36.0,6618
#   After stage 1 alone (within 16384): 65.2,10268 | 49.7,11264, longer and hardly better.
#   On the way: SFT loss .48 to .41 in epoch 1, about .15 by epoch 9. GRPO: answers 25 to 40%
#   shorter within 50 steps, format reward above .95. The original collapsed after step 60.
#
# Stages: recipes/stages.sh. Where we depart from the originals, and why: recipes/README.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
NAME=${1:-}
case "$NAME" in
  r1) # stage 2 starts from stage 1; cosine_tokens: the length where the cosine reward ends
    base=deepseek-ai/DeepSeek-R1-Distill-Qwen-14B stages="build check sft grpo evaluate"
    prompts=16 answer_tokens=16384 cosine_tokens=9600 loss_type=grpo save_steps=5
    sampling=(--temperature 1.0 --top_p 0.9 --min_p 0.05 --tensor_parallel_size 4)
    ;;
  nemotron) # longer answers
    base=nvidia/OpenMath-Nemotron-14B stages="build check grpo evaluate"
    prompts=16 answer_tokens=24000 cosine_tokens=15360 loss_type=grpo save_steps=10
    sampling=(--temperature 1.0 --top_p 0.9 --min_p 0.05 --tensor_parallel_size 4)
    ;;
  qwen3) # run with TRL: its sampling, its loss (one mean over all tokens), half the prompts
    base=Qwen/Qwen3-14B stages="build check grpo evaluate"
    prompts=8 answer_tokens=24000 cosine_tokens=15360 loss_type=dapo save_steps=10
    sampling=(--temperature 0.9 --top_p 1.0 --min_p 0.0 --tensor_parallel_size 2)
    ;;
  *)
    echo "usage: bash $0 r1|nemotron|qwen3 [--faithful] [STAGE [flags]]" >&2
    exit 2
    ;;
esac
shift
MODEL=${MODEL:-$base}
RUN=${RUN:-runs/fast_math_$NAME}
GPUS=${GPUS:-8}
# shellcheck source=recipes/stages.sh
source recipes/stages.sh

# --faithful runs with recipes/originals/fast_math_r1.patch, and with these flags. The numbers in
# brackets are those of recipes/README.md, here and in the patch.
PATCH=fast_math_r1
sft_faithful=(
  --loss_on all                                          # [12] the patch adds: no loss on EOS
  --num_train_epochs 20 --lr_horizon 780 --max_steps 350 # [14] 20 epochs planned, step 350 used
  --save_total_limit 1                                   # [15]
)
case "$NAME" in
  r1) # [1] characters; [16] the schedule's end; [28] prompt + answer. [17] half of the problems
    grpo_faithful=(--cosine_max_length 30000 --lr_horizon 101 --max_model_length 16384) ;;
  nemotron) # one epoch of all problems has 203 steps
    grpo_faithful=(--cosine_max_length 48000 --lr_horizon 203 --max_model_length 24000
      --train_fraction 1) ;;
  qwen3) # TRL ended its schedule at --max_steps
    grpo_faithful=(--cosine_max_length 48000 --max_model_length 24512 --train_fraction 1) ;;
esac
grpo_faithful+=(--rollout_is_cap 0)                      # [21]

build() { # stage 1's 7,900 traces and stage 2's problems
  if [ "$NAME" = r1 ]; then
    build_data fast_math_r1_sft "$RUN/sft.jsonl" "$@"
  fi
  build_data fast_math_r1_grpo "$RUN/grpo.jsonl" "$@"
}

check() { # stops where a training problem is also in a benchmark
  if [ "$NAME" = r1 ]; then
    check_data "$RUN/sft.jsonl" "$@"
  fi
  check_data "$RUN/grpo.jsonl" "$@"
}

sft() { # 64 packs x 24,000 tokens = 1.5M tokens per step, 39 steps per epoch
  "${LAUNCH[@]}" "$CODE/train_sft.py" \
    --model_name_or_path "$MODEL" --dataset "$RUN/sft.jsonl" --output_dir "$RUN/sft" \
    --system_prompt sft --chat_template open_r1_roles \
    --max_length 24000 --gradient_accumulation_steps $((64 / (GPUS * NODES))) \
    --num_train_epochs 10 --learning_rate 1e-5 --lr_scheduler_type cosine --warmup_ratio 0 \
    --weight_decay 0 --max_grad_norm 1.0 --save_steps 50 \
    --activation_checkpointing selective --compile true \
    "${sft_faithful[@]}" "$@"
}

grpo() { # 16 (qwen3: 8) problems x 8 answers per step
  local start=$MODEL
  if [ "$NAME" = r1 ]; then start=$RUN/sft/final; fi
  "${LAUNCH[@]}" "$CODE/train_grpo.py" \
    --model_name_or_path "$start" --dataset "$RUN/grpo.jsonl" --output_dir "$RUN/grpo" \
    --system_prompt grpo --chat_template tokenizer \
    --num_prompts_per_step "$prompts" --num_generations 8 \
    --max_prompt_length 512 --max_completion_length "$answer_tokens" "${sampling[@]}" \
    --reward_funcs format,cosine,length --cosine_max_length "$cosine_tokens" \
    --learning_rate 4e-6 --lr_scheduler_type cosine --warmup_ratio 0 --max_steps 50 \
    --beta 0.04 --epsilon 0.2 --epsilon_high 0.2 --num_iterations 1 --loss_type "$loss_type" \
    --save_steps "$save_steps" --gpu_memory_utilization 0.3 \
    --activation_checkpointing selective --compile true \
    "${grpo_faithful[@]}" "$@"
}

evaluate() { # sampled once at the largest budget; the smaller ones are read off the same samples
  local models=base=$MODEL
  if [ "$NAME" = r1 ]; then models+=,sft=$RUN/sft/final; fi
  launch_evaluation --model "$models,grpo=$RUN/grpo/final" \
    --benchmark aime24,aime25 --num_samples 64 --budgets 8000,12000,16000,24000,32000 \
    --temperature 1.0 --top_p 0.9 --min_p 0.05 \
    --output_dir "$RUN/eval" --plot "$RUN/eval/budgets.png" "$@"
}

run_stages "$stages" "$@"
