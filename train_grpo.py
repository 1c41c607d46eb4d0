"""
Stage 2: GRPO, shorter answers at the same accuracy (Fast-Math-R1, arXiv 2507.08267; GRPO: arXiv 2402.03300).

    torchrun --nproc_per_node 8 train_grpo.py         the published recipe, from stage 1's runs/sft/final
    torchrun --nproc_per_node 2 train_grpo.py --model_name_or_path runs/demo-seed1/sft/final --dataset demo:rl ...

One step, in the order of the code below:

    1. prompts      the next P problems; the order is a function of (seed, epoch), a resumed run needs only a position
    2. rollout      vLLM samples G answers y_1..y_G of each with the current weights
    3. rewards      r_i = sum_k w_k * part_k(y_i): format, cosine, length ... (rewards.py); scored while others generate
    4. advantages   A_i = (r_i - mean_G r) / (std_G r + 1e-4): better than its siblings, or worse
    5. reference    log-probs of the frozen starting model, only if beta > 0
    6. update       ratio_t = pi(y_t) / pi_old(y_t),   KL_t = exp(ref_t - logp_t) - (ref_t - logp_t) - 1
                    L = sum_t m_t [-w_t min(ratio_t A, clip(ratio_t, 1 - epsilon, 1 + epsilon_high) A) + beta KL_t] / N
                    w_t = min(pi_old(y_t) / q(y_t), cap): vLLM's q and the trainer's pi_old are not quite one program
    7. publish      new weights to the engines, verified by a probe before anyone may sample
    8. log, evaluate, save

Compared with train_sft.py: the same forward, the same packs, the same single denominator N per optimizer step over all
ranks; what is new is a weight on every token. Which m and N, is all that --loss_type decides:
    grpo      m = 1/|y_i|, N = answers          every answer counts the same, long ones have fainter tokens
    dapo      m = 1,       N = all tokens       every token counts the same
    dr_grpo   m = 1,       N = answers x max_completion_length      no length enters at all

No critic, no reward model, no replay. What differs from the original, and the flag that restores it: lengths in tokens
(--length_unit chars --cosine_max_length 30000), length reward per prompt (--length_scope local_batch), mismatch weight
(--rollout_is_cap 0), schedule ends where training stops (--lr_horizon 101). recipes/fast_math_r1_14b.sh has the list.

Letters: P prompts, G answers per prompt, B = P x G, T tokens of a micro-batch, R ranks.
"""

import json
import math
import random
import shutil
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers.hf_argparser import HfArg

import data
import model as policy_lib
import rewards as reward_lib
import rollout as rollout_lib


@dataclass
class GRPOConfig(reward_lib.RewardOptions):  # the reward flags and their defaults stand in rewards.py
    # What to train, on what, where to
    model_name_or_path: str = HfArg(default="runs/sft/final", help="Start and KL reference: folder or hub id.")
    dataset: str = HfArg(default="RabotniKuma/Fast-Math-R1-GRPO", help="Hub id, file, folder or demo:rl, with answers.")
    dataset_split: str = HfArg(default="train", help="Split, for hub ids and saved folders.")
    problem_column: str = HfArg(default="problem", help="Column of the question.")
    answer_column: str = HfArg(default="answer", help="Column of the gold answer (Open-RS's oddity: solution).")
    train_fraction: float = HfArg(default=1.0, help="Random share of the rows, seed 2025; the original run used 0.5.")
    max_malformed: float = HfArg(default=0.01, help="Share of rows that may be dropped before the run is refused.")
    benchmark_dir: str = HfArg(default="", help="Warn of rows that overlap a benchmark: folder of benchmarks, or hub.")
    output_dir: str = HfArg(default="runs/grpo", help="Run directory: config, metrics, checkpoints, rollouts, final.")
    resume: bool = HfArg(default=False, help="Continue from output_dir's newest intact checkpoint; none is an error.")
    force: bool = HfArg(default=False, help="Resume though flags that change the result differ from the checkpoint's.")
    # Prompts and sampling
    system_prompt: str = HfArg(default="grpo", help="sft, grpo, open_rs, open_rs3, none, or the text itself.")
    chat_template: str = HfArg(default="tokenizer", help="tokenizer (as saved by stage 1), open_r1_roles, Jinja file.")
    num_prompts_per_step: int = HfArg(default=16, help="P: problems per optimizer step.")
    num_generations: int = HfArg(default=8, help="G: answers per problem.")
    max_prompt_length: int = HfArg(default=512, help="Longer prompts are dropped at load time and counted.")
    max_model_length: int = HfArg(default=0, help="Cap on prompt + answer; 0: their sum. The original: 16384.")
    temperature: float = HfArg(default=1.0, help="Sampling temperature; the trainer divides its logits by it too.")
    temperature_in_logprobs: bool = HfArg(default=True, help="False: log-probs at temperature 1 regardless (Open-RS).")
    top_p: float = HfArg(default=0.9, help="Nucleus sampling; below 1 biases the gradient, see rollout_is_cap.")
    min_p: float = HfArg(default=0.05, help="Drop tokens below this share of the likeliest one's probability.")
    dynamic_sampling_rounds: int = HfArg(default=0, help="Times equal-reward groups may be replaced by fresh prompts.")
    # Objective
    loss_type: str = HfArg(default="grpo", help="grpo, dapo or dr_grpo: see the head of this file.")
    scale_rewards: str = HfArg(default="group", help="Divide advantages by the std of the group, the batch, or none.")
    beta: float = HfArg(default=0.04, help="Weight of the KL term; 0: no reference model is loaded.")
    epsilon: float = HfArg(default=0.2, help="Clip of the ratio from below.")
    epsilon_high: float = HfArg(default=0.2, help="Clip of the ratio from above (DAPO: 0.28).")
    num_iterations: int = HfArg(default=1, help="Optimizer steps per batch of rollouts.")
    importance_sampling_level: str = HfArg(default="token", help="token, or sequence (GSPO).")
    rollout_is_cap: float = HfArg(default=2.0, help="Cap of the weight correcting sampler against trainer; 0: off.")
    mask_truncated_completions: bool = HfArg(default=False, help="Leave answers cut for length out of the loss.")
    # Optimizer and schedule
    num_train_epochs: float = HfArg(default=1, help="Passes over the problems.")
    max_steps: int = HfArg(default=50, help="Stop after this many steps; -1: after num_train_epochs.")
    lr_horizon: int = HfArg(default=-1, help="Steps of the schedule; -1: where training stops. May exceed max_steps.")
    learning_rate: float = HfArg(default=4e-6, help="Peak learning rate.")
    lr_scheduler_type: str = HfArg(default="cosine", help="cosine[_with_min_lr], linear, constant[_with_warmup].")
    min_lr_rate: float = HfArg(default=0.1, help="Floor as a share of the peak, for cosine_with_min_lr.")
    warmup_ratio: float = HfArg(default=0.0, help="Share of the horizon spent on linear warm-up.")
    weight_decay: float = HfArg(default=0.0, help="AdamW's decoupled weight decay.")
    adam_beta1: float = HfArg(default=0.9, help="AdamW: memory of the gradient's mean.")
    adam_beta2: float = HfArg(default=0.999, help="AdamW: memory of the gradient's square.")
    max_grad_norm: float = HfArg(default=1.0, help="Clip the gradient to this norm; 0 leaves it alone.")
    seed: int = HfArg(default=42, help="Order of the problems and seeds of the samples.")
    # Machine
    max_tokens_per_microbatch: int = HfArg(default=0, help="Tokens of a micro-batch; 0: longest prompt + answer.")
    activation_checkpointing: str = HfArg(default="full", help="none, full, or selective (keep attention outputs).")
    compile: bool = HfArg(default=False, help="torch.compile each block.")
    shard_size: int = HfArg(default=0, help="Ranks that share one copy of the weights; 0: all.")
    head_chunk_size: int = HfArg(default=2048, help="Tokens whose logits exist at a time.")
    timeout_minutes: float = HfArg(default=120, help="Deadline of every wait between ranks; must cover one rollout.")
    heartbeat_timeout: float = HfArg(default=300, help="Seconds of silence that end the run, naming the frozen rank.")
    # Engines
    tensor_parallel_size: int = HfArg(default=1, help="Ranks per vLLM engine; 14B on 8 H200: 4 (latency decides).")
    gpu_memory_utilization: float = HfArg(default=0.3, help="Share of GPU memory for vLLM.")
    kv_cache_gb: float = HfArg(default=0, help="GB of KV cache instead of a share; 0: by share on GPU, 0.25 on CPU.")
    max_num_seqs: int = HfArg(default=128, help="Answers an engine decodes together.")
    enforce_eager: bool = HfArg(default=False, help="No CUDA graphs: two to four times slower decoding, less memory.")
    vllm_sleep: bool = HfArg(default=False, help="Engines free their GPU memory during the update (for 80 GB cards).")
    sync_dir: str = HfArg(default="/dev/shm", help="Where weights are handed to the engines.")
    probe_tolerance: float = HfArg(default=0, help="Mean log-prob gap allowed after a sync; 0: by the engine's dtype.")
    engine_start_timeout: float = HfArg(default=1800, help="Seconds an engine may take to start.")
    engine_stall_timeout: float = HfArg(default=600, help="Seconds without a new token until an engine is replaced.")
    max_engine_restarts: int = HfArg(default=3, help="Engines replaced per rank before the run gives up.")
    # Saving, evaluating, logging
    save_steps: int = HfArg(default=5, help="Checkpoint every so many steps; 0: only at the end.")
    save_total_limit: int = HfArg(default=2, help="Checkpoints to keep; 0: all.")
    keep_steps: str = HfArg(default="", help="Comma-separated steps whose checkpoints are never removed.")
    save_dtype: str = HfArg(default="bfloat16", help="Type of the weights in final: bfloat16 or float32.")
    eval_dataset: str = HfArg(default="", help="Problems for evaluation with the same engines; empty: none.")
    eval_split: str = HfArg(default="train", help="Split of eval_dataset, for hub ids and saved folders.")
    eval_steps: int = HfArg(default=10, help="Evaluate every so many steps, and at the end.")
    eval_num_samples: int = HfArg(default=4, help="Samples per problem in evaluation, with the training's sampling.")
    logging_steps: int = HfArg(default=1, help="Print a line every so many steps; metrics.jsonl gets all.")
    report_to: str = HfArg(default="none", help="tensorboard, wandb or trackio beside metrics.jsonl.")
    dry_run: bool = HfArg(default=False, help="Print the plan without loading a model or starting an engine.")


# Flags that may change between a checkpoint and its resumption without changing the result.
FREE_TO_CHANGE = {
    "resume", "force", "output_dir", "timeout_minutes", "heartbeat_timeout", "save_steps", "save_total_limit",
    "keep_steps", "report_to", "max_steps", "activation_checkpointing", "compile", "shard_size", "head_chunk_size",
    "dry_run", "tensor_parallel_size", "gpu_memory_utilization", "kv_cache_gb", "max_num_seqs", "enforce_eager",
    "vllm_sleep", "sync_dir", "engine_start_timeout", "engine_stall_timeout", "max_engine_restarts",
    "max_tokens_per_microbatch", "eval_dataset", "eval_split", "eval_steps", "eval_num_samples", "save_dtype",
    "logging_steps", "benchmark_dir",
    "probe_tolerance"}


def longest_sequence(cfg):
    """Tokens that a prompt and its answer may have together."""
    return cfg.max_model_length or cfg.max_prompt_length + cfg.max_completion_length


def check_config(cfg):
    """Refuse impossible values before anything starts: flag, value, reason, remedy. Raises ValueError."""
    policy_lib.check_common_flags(cfg)
    reward_lib.check_reward_options(cfg)
    policy_lib.check_flags(
        cfg,
        choices={"loss_type": ("grpo", "dapo", "dr_grpo"), "scale_rewards": ("group", "batch", "none"),
                 "importance_sampling_level": ("token", "sequence")},
        above_0=("num_prompts_per_step", "max_prompt_length", "max_completion_length", "num_iterations",
                 "tensor_parallel_size", "temperature", "top_p", "train_fraction", "eval_num_samples", "max_num_seqs",
                 "gpu_memory_utilization", "engine_start_timeout", "engine_stall_timeout"),
        not_negative=("beta", "epsilon", "epsilon_high", "rollout_is_cap", "dynamic_sampling_rounds", "kv_cache_gb",
                      "probe_tolerance", "max_engine_restarts", "max_model_length", "max_tokens_per_microbatch"),
        shares=("top_p", "min_p", "train_fraction", "gpu_memory_utilization"))
    if cfg.num_generations < 2:
        raise ValueError(f"--num_generations {cfg.num_generations}: an advantage compares answers to the same problem; "
                         "use 2 or more")
    longest = longest_sequence(cfg)
    if longest <= cfg.max_prompt_length:
        raise ValueError(f"--max_model_length {longest} leaves no room for an answer after "
                         f"--max_prompt_length {cfg.max_prompt_length}")
    if cfg.max_tokens_per_microbatch and cfg.max_tokens_per_microbatch < longest:
        raise ValueError(f"--max_tokens_per_microbatch {cfg.max_tokens_per_microbatch} is below the longest "
                         f"prompt + answer, {longest}; "
                         "an answer is never cut, so raise it, or 0 for exactly that length")


# ---------------------------------------------------------------------------------------------------------------------
# The algorithm, as pure functions
# ---------------------------------------------------------------------------------------------------------------------
def group_advantages(rewards, scale_rewards="group", eps=1e-4):
    """
    A_i = (r_i - mean of its group) / (std + eps); arXiv 2402.03300, section 4.1.2, with the unbiased (n - 1) std.

    rewards (P, G) float, returns (P, G). scale_rewards: "group" divides by the group's std, "batch" by that of all
    rewards, "none" not at all (Dr. GRPO, arXiv 2503.20783: dividing by the group's std favours problems that are almost
    always or almost never solved). NaN marks an answer without a reward: it gets advantage 0 and stays out of its
    group's mean. eps keeps a group of equal rewards at exactly 0.
    """
    known = ~rewards.isnan()
    values = rewards.nan_to_num()
    count = known.sum(1, keepdim=True).clamp(min=1)  # (P, 1)
    centered = torch.where(known, values - values.sum(1, keepdim=True) / count, 0.0)  # (P, G)
    # A group whose rewards are equal teaches nothing, but rounding in its mean would be blown up by 1 / eps.
    highest = torch.where(known, rewards, -math.inf).amax(1, keepdim=True)  # (P, 1)
    lowest = torch.where(known, rewards, math.inf).amin(1, keepdim=True)  # (P, 1)
    centered = torch.where(highest > lowest, centered, 0.0)
    if scale_rewards == "none":
        return centered
    if scale_rewards == "batch":
        return centered / (rewards[known].std() + eps if known.sum() > 1 else 1.0)
    std = (centered.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()  # (P, 1)
    return centered / (std + eps)


def loss_weights(loss_type, lengths, counted, max_completion_length):
    """
    (weights, denominator): the number m_i that each token of answer i carries in the mask, and N.

    lengths: tokens per answer; counted: False for answers left out of the loss (truncated ones, if masked, and those
    without a reward). An answer left out of the numerator is left out of the denominator too. Returns ([m_i], N).
    """
    counted = [bool(c) and n > 0 for c, n in zip(counted, lengths, strict=True)]
    if loss_type == "grpo":
        return [1.0 / n if c else 0.0 for c, n in zip(counted, lengths, strict=True)], float(max(1, sum(counted)))
    tokens = sum(n for c, n in zip(counted, lengths, strict=True) if c)
    denominator = tokens if loss_type == "dapo" else sum(counted) * max_completion_length
    return [1.0 if c else 0.0 for c in counted], float(max(1, denominator))


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, mask, denominator, epsilon=0.2, epsilon_high=0.2,
              beta=0.0, importance_sampling_level="token", rollout_logprobs=None, rollout_is_cap=None,
              sequence_ids=None):
    """
    The clipped surrogate with a KL term, on one packed micro-batch; arXiv 2402.03300 eq. 3, 4.

    All tensors (T,): logprobs of the policy (with gradient), old_logprobs of the policy that sampled (pass
    logprobs.detach() on the first step after a rollout), ref_logprobs of the reference (None if beta is 0), advantages
    repeated on every token of an answer, mask 0 outside answers and m inside (loss_weights), rollout_logprobs as vLLM
    reported them (None: no correction), sequence_ids (int64) naming each token's answer (for level "sequence").
    Returns (loss, metrics): loss = sum / denominator, a scalar; metrics: sums over masked-in tokens (detached), to be
    divided by metrics["tokens"] once they are added up over micro-batches and ranks. Inputs are not modified.
    """
    inside = (mask > 0).to(logprobs.dtype)  # (T,)
    log_ratio = (logprobs - old_logprobs) * inside  # log pi(y_t) / pi_old(y_t)                                  (T,)
    if importance_sampling_level == "sequence":
        if sequence_ids is None:
            raise ValueError("importance_sampling_level 'sequence' needs sequence_ids: each token's answer")
        # GSPO (arXiv 2507.18071, eq. 7): one ratio per answer, the geometric mean of its tokens' ratios.
        sums = torch.zeros(int(sequence_ids.max()) + 1, dtype=log_ratio.dtype, device=log_ratio.device)
        lengths = sums.index_add(0, sequence_ids, inside).clamp(min=1)
        log_ratio = (sums.index_add(0, sequence_ids, log_ratio) / lengths)[sequence_ids]  # (T,)
    ratio = log_ratio.exp()
    surrogate = torch.minimum(
        ratio * advantages,  # min( r_t A,
        ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages)  # clip(r_t) A ): no gain past the fence; way back open
    if rollout_is_cap and rollout_logprobs is not None:
        # vLLM and the trainer round differently, and top_p / min_p cut the tail: the samples come from q, not pi_old.
        # w_t = min(pi_old / q, cap): unweighted, the gradient is that of another policy. Per token, because the product
        # over a long answer is dominated by noise.
        rollout_weight = (old_logprobs - rollout_logprobs).exp().clamp(max=rollout_is_cap).detach()  # (T,)
        surrogate = surrogate * rollout_weight
    token_loss = -surrogate
    metrics = {
        "tokens": inside.sum(),
        "clip_low": ((ratio < 1 - epsilon) & (advantages < 0)).to(inside.dtype).mul(inside).sum(),
        "clip_high": ((ratio > 1 + epsilon_high) & (advantages > 0)).to(inside.dtype).mul(inside).sum(),
        "ratio": (ratio * inside).sum(),
    }
    if beta:
        # k3 (arXiv 2402.03300, eq. 4): never negative, zero only where the policies agree. As a loss term its expected
        # gradient is that of KL(ref || pi); k1, the plain log-ratio, would have expected gradient exactly 0.
        delta = (ref_logprobs - logprobs) * inside
        kl = delta.exp() - delta - 1  # (T,)
        token_loss = token_loss + beta * kl
        metrics["kl"] = (kl * inside).sum()
    loss = (token_loss * mask).sum() / denominator
    return loss, {name: float(value.detach()) for name, value in metrics.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Steps of the loop that need more than a line
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Problem:
    """One prompt of the training set. row: its number in the source; prompt_ids: with the generation prompt."""

    row: int
    problem: str
    answer: str
    prompt_ids: list


def load_problems(dataset, split, tokenizer, cfg):
    """
    ([Problem], {reason: count}) of a data set: rows without a gradable gold answer or with a long prompt are dropped.

    A gold answer that cannot be read would pay every completion the same, or none: it never enters, unless
    --bad_gold_reward asks for the original's behaviour. Raises data.DataError when nothing is left.
    """
    problems, dropped, total = [], Counter(), 0
    system_prompt = data.system_prompt_text(cfg.system_prompt)
    for number, (row, reason) in enumerate(data.iterate_rows(dataset, split)):
        total += 1
        if reason is None:
            problem, answer = row.get(cfg.problem_column), row.get(cfg.answer_column)
            if not isinstance(problem, str) or not problem.strip():
                reason = f"no text in column {cfg.problem_column!r}"
            elif answer is None or isinstance(answer, (dict, bool)):
                reason = f"no answer in column {cfg.answer_column!r}"
            elif (gold := reward_lib.gold_answer(answer)) is None:
                gold = str(answer) if reward_lib.gold_answer(str(answer)) is None else ""  # a float nan is none
                reason = "answer that the grader cannot read" if cfg.bad_gold_reward is None else None
        if reason is None:
            prompt_ids = data.chat_prompt_ids(tokenizer, problem, system_prompt)
            if len(prompt_ids) > cfg.max_prompt_length:
                reason = f"prompt longer than {cfg.max_prompt_length} tokens"
        if reason is None:
            problems.append(Problem(number, problem, gold, prompt_ids))
        else:
            dropped[reason] += 1
    if not problems:
        raise data.DataError(f"{dataset}: no problem to train on; {total} rows dropped: {dict(dropped)}")
    if sum(dropped.values()) > cfg.max_malformed * total:
        raise data.DataError(f"{dataset}: {sum(dropped.values()) / total:.1%} of the rows were dropped "
                             f"({dict(dropped)}), more than --max_malformed {cfg.max_malformed:.1%} allows; "
                             "repair them or raise it")
    return problems, dict(dropped)


def prompts_at(num_problems, cursor, count, seed):
    """
    Problem numbers at cursor .. cursor + count of the endless sequence of epochs, each shuffled by (seed, epoch).

    Position alone decides, so that nothing is repeated or skipped by a resume, nor by prompts that were replaced.
    """
    chosen = []
    while len(chosen) < count:
        epoch, offset = divmod(cursor + len(chosen), num_problems)
        order = list(range(num_problems))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        chosen += order[offset:offset + count - len(chosen)]
    return chosen


def sample_groups(engine, layout, ctx, problems, chosen, step, cursor, cfg, tokenizer, timer):
    """
    Roll out and score one answer group per chosen problem; every rank returns all groups, in the order of `chosen`.

    Each engine takes every count-th problem. A group is scored the moment it is complete, while the engine goes on with
    the others. Seeds come from (seed, step, prompt, sample), a prompt being known by its place in the sequence that
    starts at cursor: where an epoch ends within a step, a problem may stand in it twice and is sampled anew. Returns a
    list of dicts: problem, completions, texts, scored.
    """
    mine = {}
    limit = longest_sequence(cfg)
    with policy_lib.raise_on_all_ranks(ctx, f"the rollout of step {step + 1}" if step >= 0 else "the evaluation"):
        if engine is not None:
            numbers = list(range(layout.index, len(chosen), layout.count))
            group_problems = [problems[chosen[i]] for i in numbers]
            stream = engine.generate(
                [p.prompt_ids for p in group_problems], n=cfg.num_generations, temperature=cfg.temperature,
                top_p=cfg.top_p, min_p=cfg.min_p,
                max_tokens=[min(cfg.max_completion_length, limit - len(p.prompt_ids)) for p in group_problems],
                seeds=[[rollout_lib.sampling_seed(cfg.seed, step, cursor + i, s) for s in range(cfg.num_generations)]
                       for i in numbers])
            for local_index, completions in stream:
                with timer("rewards"):
                    mine[numbers[local_index]] = score_group(group_problems[local_index], completions, cfg, tokenizer)
    with timer("rollout_wait"):
        groups = {i: group for part in policy_lib.gather_objects(ctx, mine) for i, group in part.items()}
    return [groups[i] for i in range(len(chosen))]


def score_group(problem, completions, cfg, tokenizer):
    """Rewards of one group: rewards.py sees texts and lengths, never token ids."""
    texts = [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
    scored = reward_lib.rewards_for_group(
        texts, problem.answer, cfg, lengths=[len(c.token_ids) for c in completions],
        truncated=[c.finish_reason == "length" for c in completions])
    return {"problem": problem, "completions": completions, "texts": texts, "scored": scored}


def token_rows(groups, advantages, weights):
    """
    One flat dict per answer: ids and the per-token arrays of the loss, each aligned with its token.

    ids (S,) = prompt + completion; mask, rollout_logprobs (S,) are 0 on the prompt; mask carries m_i on the completion,
    end-of-turn token included. collate_rows shifts them to the positions that predict.
    """
    rows = []
    flat = [(g["problem"].prompt_ids, c) for g in groups for c in g["completions"]]
    for i, (prompt_ids, completion) in enumerate(flat):
        before = np.zeros(len(prompt_ids), dtype=np.float32)
        rows.append({
            "ids": np.array([*prompt_ids, *completion.token_ids], dtype=np.int64),
            "mask": np.append(before, np.full(len(completion.token_ids), weights[i], dtype=np.float32)),
            "rollout_logprobs": np.append(before, np.array(completion.logprobs, dtype=np.float32)),
            "advantage": float(advantages[i]),
        })
    return rows


def micro_batches(rows, config, ranks, max_tokens):
    """
    For every rank the list of its micro-batches, each a list of row numbers; the same count on every rank.

    In every micro-batch all ranks wait for the slowest, so all of them, on all ranks, should cost the same (matmul +
    attention): rows go into bins of nearly equal cost, as few as max_tokens allows, and the bins are dealt in order of
    cost. To even out each rank's total alone leaves 5% of waiting, this 2% (benchmarks/packing.py). A rank without rows
    gets empty bins: it must join every collective of FSDP, or all ranks hang.
    """
    sizes = [len(row["ids"]) for row in rows]
    costs = [policy_lib.flops_per_pack(config, [size]) for size in sizes]
    turns, fits = math.ceil(sum(sizes) / (max_tokens * ranks)), False
    while not fits:  # ends: with a bin for every row, none is larger than the longest row
        bins = data.split_evenly(costs, turns * ranks)
        fits = all(sum(sizes[i] for i in members) <= max_tokens for members in bins)
        turns += 1
    hands = data.assign_to_ranks([sum(costs[i] for i in members) for members in bins], ranks)
    return [[bins[i] for i in hand] for hand in hands]


def collate_rows(rows, members, device):
    """A micro-batch: data.collate's tensors plus rollout_logprobs, advantages (T,) float32, sequence_ids (T,) int64."""
    chosen = [rows[i] for i in members]
    batch = data.collate([(row["ids"], row["mask"]) for row in chosen], device)
    if chosen:
        shifted = np.concatenate([np.append(row["rollout_logprobs"][1:], 0) for row in chosen])  # of the token after t
        advantages = np.concatenate([np.full(len(row["ids"]), row["advantage"]) for row in chosen])
        sequence_ids = np.concatenate([np.full(len(row["ids"]), i) for i, row in enumerate(chosen)])
    else:
        shifted, advantages, sequence_ids = np.zeros(1), np.zeros(1), np.zeros(1)
    batch["rollout_logprobs"] = torch.from_numpy(shifted.astype(np.float32)).to(device)
    batch["advantages"] = torch.from_numpy(advantages.astype(np.float32)).to(device)
    batch["sequence_ids"] = torch.from_numpy(sequence_ids.astype(np.int64)).to(device)
    return batch


MODEL_INPUTS = ("input_ids", "position_ids", "cu_seqlens", "max_seqlen", "targets")


def policy_logprobs(model, batch, cfg):
    """(logprobs, entropy), both (T,), of a micro-batch, at the temperature that sampled it."""
    temperature = cfg.temperature if cfg.temperature_in_logprobs else 1.0
    return model(**{name: batch[name] for name in MODEL_INPUTS}, temperature=temperature)


def sync_folder(cfg):
    """This run's folder below --sync_dir; named after output_dir, so that a resumed run finds it."""
    return Path(cfg.sync_dir, "grpo-" + Path(cfg.output_dir).resolve().as_posix().strip("/").replace("/", "-"))


@contextmanager
def weights_handed_over(cfg, ctx):
    """
    A run's versions leave --sync_dir when it ends: on /dev/shm they are memory, 28 GB of it for 14B.

    Those of a run that was killed leave before the next one needs the room.
    """
    def remove():
        if ctx.local_rank == 0:
            shutil.rmtree(sync_folder(cfg), ignore_errors=True)

    with policy_lib.raise_on_all_ranks(ctx, "removing a killed run's weights"):
        remove()
    try:
        yield
    finally:
        remove()


def publish(model, engine, ctx, probe_ids, previous, version, cfg):
    """
    Hand the weights to every engine and prove that they arrived; collective. Nobody may sample before this returns.

    previous: what the last call returned, or None. Returns a dict: fingerprint, engine_probe, seconds, gap.
    Raises rollout.StaleWeightsError (through RankFailure, on all ranks) with both numbers.
    """
    started = time.perf_counter()
    dtype = torch.float32 if ctx.device.type == "cpu" else torch.bfloat16  # what the engine computes in
    folder, fingerprint = rollout_lib.publish_weights(model, str(sync_folder(cfg)), version, dtype, ctx)
    probe = data.collate([(np.array(probe_ids), np.ones(len(probe_ids)))], ctx.device)
    with torch.no_grad():
        trainer_probe = model(**{name: probe[name] for name in MODEL_INPUTS})[0][:-1].tolist()
    engine_probe, gap = None, 0.0
    with policy_lib.raise_on_all_ranks(ctx, f"weight sync {version}"):
        if engine is not None:
            engine.load_weights(folder, version)
            engine_probe = engine.score(probe_ids)
            tolerance = cfg.probe_tolerance or rollout_lib.PROBE_TOLERANCE[str(dtype).removeprefix("torch.")]
            changed = previous is not None and previous["fingerprint"] != fingerprint
            gap = rollout_lib.check_probe(engine_probe, trainer_probe, previous and previous["engine_probe"],
                                          changed, tolerance)
    with policy_lib.raise_on_all_ranks(ctx, "removing old weights"):  # every engine has acknowledged
        if ctx.local_rank == 0:
            rollout_lib.remove_old_versions(folder)
    gap = policy_lib.max_over_ranks(ctx, gap)
    return {"fingerprint": fingerprint, "engine_probe": engine_probe,
            "seconds": time.perf_counter() - started, "gap": gap}


def mismatch(logprobs, rollout_logprobs, mask):
    """[sum |gap|, tokens off by over 10%, tokens] and the largest |gap| of trainer and sampler on one micro-batch."""
    gap = ((logprobs - rollout_logprobs) * (mask > 0)).abs()
    return [float(gap.sum()), float((gap > math.log(1.1)).sum()), float((mask > 0).sum())], float(gap.max())


def write_rollouts(path, step, groups, advantages, version):
    """Every completion of a step, one JSON object per line: what a changed grader needs to score the run again."""
    lines = []
    for p, group in enumerate(groups):
        scored = group["scored"]
        for s, (completion, text) in enumerate(zip(group["completions"], group["texts"], strict=True)):
            lines.append(json.dumps({
                "step": step, "row": group["problem"].row, "prompt_index": p, "sample_index": s,
                "problem": group["problem"].problem, "answer": group["problem"].answer, "text": text,
                "token_ids": completion.token_ids, "length": len(completion.token_ids),
                "finish_reason": completion.finish_reason, "correct": scored.correct[s], "outcome": scored.outcomes[s],
                "rewards": {name: values[s] for name, values in scored.parts.items()}, "reward": scored.totals[s],
                "advantage": float(advantages[p, s]), "version": version}))
    path.parent.mkdir(parents=True, exist_ok=True)
    policy_lib.write_atomically(path, "\n".join(lines) + "\n")


class Timer:
    """Seconds per phase: with timer("update"): ...   A reader of metrics.jsonl sees where a step's time went."""

    def __init__(self):
        self.seconds = Counter()

    @contextmanager
    def __call__(self, phase):
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - started


def main(cfg):
    check_config(cfg)
    ctx = policy_lib.setup_distributed(cfg.timeout_minutes, cfg.shard_size)
    policy_lib.start_heartbeat(ctx, cfg.heartbeat_timeout)
    layout = rollout_lib.engine_layout(ctx.rank, ctx.local_rank, ctx.world_size, ctx.local_world_size,
                                       cfg.tensor_parallel_size)
    output_dir = Path(cfg.output_dir)
    longest = longest_sequence(cfg)
    max_tokens = cfg.max_tokens_per_microbatch or longest

    # ---------------------------------------------------------------------------------- problems and plan
    folder = policy_lib.model_folder(cfg.model_name_or_path, ctx, weights=not cfg.dry_run)
    model_config = policy_lib.load_config(folder)
    tokenizer = policy_lib.load_tokenizer(folder)
    data.set_chat_template(tokenizer, cfg.chat_template)
    with policy_lib.raise_on_all_ranks(ctx, f"reading {cfg.dataset}"):
        problems, dropped = load_problems(cfg.dataset, cfg.dataset_split, tokenizer, cfg)
        if cfg.train_fraction < 1:
            problems = random.Random(2025).sample(problems, max(1, round(cfg.train_fraction * len(problems))))
        readable = replace(cfg, bad_gold_reward=None)  # nobody answers an unreadable one right
        eval_problems = (load_problems(cfg.eval_dataset, cfg.eval_split, tokenizer, readable)[0]
                         if cfg.eval_dataset else [])
    with policy_lib.raise_on_all_ranks(ctx, "comparing the problems with the benchmarks"):
        if ctx.is_main:
            data.warn_of_contamination(cfg.dataset, cfg.benchmark_dir, cfg.dataset_split, cfg.problem_column)
    epoch_steps = max(1, math.ceil(cfg.num_train_epochs * len(problems) / cfg.num_prompts_per_step))
    total_steps = cfg.max_steps if cfg.max_steps > 0 else epoch_steps
    cfg.lr_horizon = horizon = policy_lib.schedule_horizon(cfg, total_steps)
    if ctx.is_main:
        memory = policy_lib.estimated_memory_gb(model_config, ctx, max_tokens, cfg.activation_checkpointing,
                                                cfg.head_chunk_size, cfg.beta > 0)
        print(f"""\
problems   {cfg.dataset}: {len(problems):,} kept; dropped: {', '.join(f'{n} {r}' for r, n in dropped.items()) or 'none'}
step       {cfg.num_prompts_per_step} prompts x {cfg.num_generations} answers \
= {cfg.num_prompts_per_step * cfg.num_generations}, {cfg.num_iterations} optimizer step(s) each
plan       {len(problems) / cfg.num_prompts_per_step:.1f} steps per epoch, {total_steps} steps in all, \
schedule ends at step {horizon}
lengths    prompt <= {cfg.max_prompt_length:,}, answer <= {cfg.max_completion_length:,}, together <= {longest:,}; \
micro-batches of {max_tokens:,} tokens
sampling   temperature {cfg.temperature}, top_p {cfg.top_p}, min_p {cfg.min_p}\
{sampling_bias_note(cfg)}
rewards    {cfg.reward_funcs} (weights {cfg.reward_weights or 'all 1'})
engines    {layout.count} x {cfg.tensor_parallel_size} rank(s); weights through {cfg.sync_dir}
memory     about {memory:.1f} GB per rank for the trainer (estimate), vLLM beside it
output     {output_dir}""", flush=True)
    if cfg.dry_run:
        return

    # ---------------------------------------------------------------------------------- engines, model, optimizer
    run = policy_lib.open_run(ctx, cfg, FREE_TO_CHANGE, {"data": data.source_hash(cfg.dataset, cfg.dataset_split)})
    engine = None
    if layout.owns_engine:  # starts in the background, while the model loads
        engine = rollout_lib.Engine(
            str(folder), max_model_len=longest + 1, dtype="float32" if ctx.device.type == "cpu" else "bfloat16",
            tensor_parallel_size=cfg.tensor_parallel_size,
            devices=layout.devices if ctx.device.type == "cuda" else None,
            gpu_memory_utilization=cfg.gpu_memory_utilization, kv_cache_gb=cfg.kv_cache_gb or None,
            max_num_seqs=cfg.max_num_seqs, enforce_eager=cfg.enforce_eager, seed=cfg.seed,
            log_file=str(output_dir / f"engine-{layout.index}.log"), start_timeout=cfg.engine_start_timeout,
            stall_timeout=cfg.engine_stall_timeout, max_restarts=cfg.max_engine_restarts, sleep_mode=cfg.vllm_sleep)
    if ctx.device.type == "cuda":
        # vLLM sizes its KV cache by the memory that is free: it must have done so before the trainer takes its own.
        with policy_lib.raise_on_all_ranks(ctx, "starting the engines"):
            if engine is not None:
                engine.score(problems[0].prompt_ids)
    torch.manual_seed(cfg.seed)
    model = policy_lib.load_policy(
        folder, ctx, activation_checkpointing=cfg.activation_checkpointing, compile_blocks=cfg.compile,
        head_chunk_size=cfg.head_chunk_size)
    reference = (policy_lib.load_policy(folder, ctx, trainable=False, head_chunk_size=cfg.head_chunk_size)
                 if cfg.beta else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, betas=(cfg.adam_beta1, cfg.adam_beta2),
                                  eps=1e-8, weight_decay=cfg.weight_decay, fused=True)
    scheduler = policy_lib.make_schedule(cfg, optimizer, horizon)
    step, cursor = 0, 0
    if run.checkpoint:
        trainer_state = policy_lib.load_checkpoint(model, optimizer, scheduler, ctx, run.checkpoint)
        step, cursor = trainer_state["step"], trainer_state["cursor"]
    if run.checkpoint and policy_lib.nothing_left_to_train(output_dir, run.checkpoint, step, total_steps):
        raise ValueError(f"nothing to do: {run.checkpoint} has reached step {step} of {total_steps}; "
                         "to go on raise --max_steps, and --lr_horizon with it (a longer schedule needs --force)")
    log = policy_lib.RunLog(ctx, output_dir, asdict(cfg), total_steps, step, cfg.report_to, cfg.logging_steps)
    keep_steps = [int(s) for s in cfg.keep_steps.split(",") if s]
    probe_ids = [token for problem in problems[:64] for token in problem.prompt_ids][:min(256, longest)]

    with weights_handed_over(cfg, ctx), policy_lib.stop_on_signal(ctx) as stop_requested:
        # engines may hold other weights than a resumed run
        sync = publish(model, engine, ctx, probe_ids, None, step, cfg)
        while step < total_steps:
            ctx.doing = f"in step {step + 1}"
            timer, started = Timer(), time.perf_counter()

            # ========================================================================== 1.-3. prompts, rollout, rewards
            groups, replaced, wanted = [], 0, cfg.num_prompts_per_step
            with timer("rollout"):
                for attempt in range(cfg.dynamic_sampling_rounds + 1):
                    chosen = prompts_at(len(problems), cursor, wanted - len(groups), cfg.seed)
                    fresh = sample_groups(engine, layout, ctx, problems, chosen, step, cursor, cfg, tokenizer, timer)
                    cursor += len(chosen)
                    # A group of equal rewards has advantage 0 everywhere: with dynamic sampling (DAPO,
                    # arXiv 2503.14476) fresh prompts take its place, until the rounds are used up.
                    last = attempt == cfg.dynamic_sampling_rounds
                    useful = [g for g in fresh if last or not has_equal_rewards(g["scored"])]
                    replaced += len(fresh) - len(useful)
                    groups += useful
                    if len(groups) == wanted:
                        break
            reward_lib.rescore_length_over_batch([g["scored"] for g in groups], cfg)  # only --length_scope local_batch
            if cfg.vllm_sleep:
                with policy_lib.raise_on_all_ranks(ctx, "putting the engines to sleep"):
                    if engine is not None:
                        engine.sleep()

            # ========================================================================== 4. advantages
            rewards = torch.tensor([g["scored"].totals for g in groups], dtype=torch.float64)  # (P, G)
            advantages = group_advantages(rewards, cfg.scale_rewards)  # (P, G)
            completions = [c for g in groups for c in g["completions"]]  # B of them
            lengths = [len(c.token_ids) for c in completions]
            truncated = [c.finish_reason == "length" for c in completions]
            counted = [not (cfg.mask_truncated_completions and cut) and not math.isnan(r)
                       for cut, r in zip(truncated, rewards.flatten().tolist(), strict=True)]
            weights, denominator = loss_weights(cfg.loss_type, lengths, counted, cfg.max_completion_length)
            rows = token_rows(groups, advantages.flatten(), weights)
            mine = micro_batches(rows, model_config, ctx.world_size, max_tokens)[ctx.rank]
            batches = [collate_rows(rows, members, ctx.device) for members in mine]

            # ========================================================================== 5. reference log-probs
            ref_logprobs = [None] * len(batches)
            if reference is not None:
                with timer("reference"), torch.no_grad():
                    ref_logprobs = [policy_logprobs(reference, batch, cfg)[0] for batch in batches]  # [(T,)]

            # ========================================================================== 6. update
            old_logprobs = [None] * len(batches)
            totals, gap_sums, largest_gap, loss, entropy_sum = Counter(), np.zeros(3), 0.0, 0.0, 0.0
            with timer("update"):
                for _ in range(cfg.num_iterations):
                    iteration_loss = 0.0
                    for i, batch in enumerate(batches):
                        logprobs, entropy = policy_logprobs(model, batch, cfg)  # (T,), (T,)
                        if old_logprobs[i] is None:
                            # First pass after the rollout: the policy that sampled is this one, so ratio = 1 and no
                            # extra forward is needed; kept for the iterations that follow.
                            old_logprobs[i] = logprobs.detach()
                            sums, biggest = mismatch(old_logprobs[i], batch["rollout_logprobs"], batch["mask"])
                            gap_sums, largest_gap = gap_sums + sums, max(largest_gap, biggest)
                            entropy_sum += float((entropy * (batch["mask"] > 0)).sum())
                        micro_loss, sums = grpo_loss(
                            logprobs, old_logprobs[i], ref_logprobs[i], batch["advantages"], batch["mask"], denominator,
                            cfg.epsilon, cfg.epsilon_high, cfg.beta, cfg.importance_sampling_level,
                            batch["rollout_logprobs"], cfg.rollout_is_cap, batch["sequence_ids"])
                        micro_loss.backward()  # summed over micro-batches and over ranks
                        iteration_loss += float(micro_loss.detach())
                        totals.update(sums)
                    (loss,) = policy_lib.sum_over_ranks(ctx, iteration_loss)
                    grad_norm = policy_lib.clip_gradients(model, cfg.max_grad_norm)
                    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                        raise FloatingPointError(
                            f"step {step + 1}: loss {loss}, gradient norm {grad_norm}. Problems of this step: rows "
                            f"{[g['problem'].row for g in groups]}. "
                            f"Last good checkpoint: {policy_lib.last_checkpoint(output_dir)}")
                    learning_rate = scheduler.get_last_lr()[0]
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            version, step = step, step + 1

            # ========================================================================== 7. publish
            with timer("sync"):
                sync = publish(model, engine, ctx, probe_ids, sync, step, cfg)

            # ========================================================================== 8. log, evaluate, save
            metrics = {"step": step, "epoch": cursor / len(problems), "loss": loss, "lr": learning_rate,
                       "grad_norm": grad_norm, **rollout_metrics(groups, lengths, truncated, rewards),
                       "dynamic_sampling/replaced": replaced}
            names = ("clip_low", "clip_high", "ratio", "kl")
            reduced = policy_lib.sum_over_ranks(ctx, totals["tokens"], *(totals[name] for name in names),
                                                *gap_sums, entropy_sum)
            tokens, sampled = max(1.0, reduced[0]), max(1.0, reduced[7])
            metrics |= {f"update/{name}": value / tokens for name, value in zip(names, reduced[1:5], strict=True)}
            metrics |= {"rollout/logprob_gap": reduced[5] / sampled, "rollout/off_by_10_percent": reduced[6] / sampled,
                        "rollout/logprob_gap_max": policy_lib.max_over_ranks(ctx, largest_gap),
                        "update/entropy": reduced[8] / sampled,
                        "sync/seconds": sync["seconds"], "sync/logprob_gap": sync["gap"],
                        "rollout/engine_restarts": policy_lib.sum_over_ranks(ctx, engine.restarts if engine else 0)[0]}
            flops = policy_lib.flops_per_pack(model_config, [len(row["ids"]) for row in rows])
            update_flops = cfg.num_iterations * flops / ctx.world_size
            seconds = time.perf_counter() - started
            peak = policy_lib.peak_flops(ctx.device)
            metrics |= {"tokens": sum(lengths), "tokens_per_second": sum(lengths) / seconds,
                        "rollout/tokens_per_second": sum(lengths) / timer.seconds["rollout"],
                        "mfu": update_flops / timer.seconds["update"] / peak if peak else None,
                        "peak_memory_gb": policy_lib.max_over_ranks(ctx, policy_lib.peak_memory_gb(ctx.device)),
                        "time/step": seconds}
            if eval_problems and (step % cfg.eval_steps == 0 or step == total_steps):
                with timer("eval"):
                    metrics |= evaluate(engine, layout, ctx, eval_problems, cfg, tokenizer)
            metrics |= {f"time/{phase}": value for phase, value in timer.seconds.items()}
            if ctx.is_main:
                write_rollouts(output_dir / "rollouts" / f"step-{step:06d}.jsonl", step, groups, advantages, version)
            log.write(metrics, f"step {step}/{total_steps}  reward {metrics['reward/total']:.3f}  "
                      f"correct {metrics['completions/correct']:.2f}  "
                      f"length {metrics['completions/mean_length']:.0f}  cut {metrics['completions/truncated']:.0%}  "
                      f"loss {loss:+.4f}  kl {metrics['update/kl']:.4f}  grad {grad_norm:.2f}  | {seconds:.1f} s: " +
                      ", ".join(f"{phase} {value:.1f}" for phase, value in timer.seconds.items()
                                if phase not in ("rewards", "rollout_wait")) +  # both are parts of the rollout
                      (f"  | eval accuracy {metrics['eval/pass@1']:.3f}" if "eval/pass@1" in metrics else "") +
                      ("" if any(weights) else "  | NOTHING TRAINED: every answer is masked or has no reward"))
            stopping = stop_requested()
            if stopping or step == total_steps or (cfg.save_steps and step % cfg.save_steps == 0) or step in keep_steps:
                policy_lib.save_checkpoint(model, optimizer, scheduler, ctx, output_dir, step,
                                           {"cursor": cursor, "config": asdict(cfg), **run.identity},
                                           cfg.save_total_limit, keep_steps)
            if stopping and step < total_steps:
                log.close()
                raise policy_lib.Stopped(f"stopped by a signal after step {step} of {total_steps}; "
                                         "continue with --resume")

    policy_lib.save_hf(model, output_dir / "final", ctx, policy_lib.DTYPES[cfg.save_dtype], tokenizer,
                       policy_lib.generation_config(folder, data.stop_token_id(tokenizer)))
    log.close()
    if engine is not None:
        engine.close()
    if ctx.is_main:
        print(f"done: {total_steps} steps; model in {output_dir / 'final'}", flush=True)
    policy_lib.shutdown_distributed(ctx)


def sampling_bias_note(cfg):
    """What truncated sampling does to the gradient, said at start-up."""
    if cfg.top_p == 1 and cfg.min_p == 0:
        return ""
    corrected = (f"corrected by importance weights up to {cfg.rollout_is_cap}" if cfg.rollout_is_cap
                 else "NOT corrected (--rollout_is_cap 0)")
    return f" -- top_p < 1 or min_p > 0: samples come from a cut-off distribution; {corrected}"


def has_equal_rewards(scored):
    """Whether a group teaches nothing: every reward is the same, or missing (nan, which equals nothing, itself too)."""
    return len({total for total in scored.totals if not math.isnan(total)}) <= 1


def rollout_metrics(groups, lengths, truncated, rewards):
    """Means over the B answers of a step."""
    scored = [g["scored"] for g in groups]
    outcomes = Counter(outcome for s in scored for outcome in s.outcomes)
    parts = {f"reward/{name}": float(np.nanmean([s.parts[name] for s in scored])) for name in scored[0].parts}
    return {
        **parts, "reward/total": float(rewards.nanmean()), "reward/std_within_group": float(rewards.std(1).nanmean()),
        "reward/groups_of_equal_rewards": sum(map(has_equal_rewards, scored)) / len(scored),
        "completions/mean_length": float(np.mean(lengths)), "completions/max_length": int(max(lengths)),
        "completions/truncated": float(np.mean(truncated)), "completions/correct": outcomes["right"] / len(lengths),
        **{f"grading/{name}": outcomes[name] for name in ("no_answer", "timeout", "crash")},
    }


def evaluate(engine, layout, ctx, problems, cfg, tokenizer):
    """Accuracy and length on held-out problems with the training's own engines and sampling; keys start with eval/."""
    eval_cfg = replace(cfg, num_generations=cfg.eval_num_samples, seed=cfg.seed + 1)
    # step -1: the same seeds at every evaluation, so that two evaluations differ by the weights alone
    groups = sample_groups(engine, layout, ctx, problems, list(range(len(problems))), -1, 0, eval_cfg, tokenizer,
                           Timer())
    outcomes = [outcome for g in groups for outcome in g["scored"].outcomes]
    completions = [c for g in groups for c in g["completions"]]
    return {"eval/pass@1": outcomes.count("right") / len(outcomes),
            "eval/mean_length": float(np.mean([len(c.token_ids) for c in completions])),
            "eval/truncated": float(np.mean([c.finish_reason == "length" for c in completions]))}


if __name__ == "__main__":
    policy_lib.run_main(main, GRPOConfig)
