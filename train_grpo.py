"""
Stage 2: GRPO, shorter answers at the same accuracy (Fast-Math-R1, arXiv 2507.08267).

    torchrun --nproc_per_node 8 train_grpo.py --tensor_parallel_size 4      the published recipe
    torchrun --nproc_per_node 2 train_grpo.py --model_name_or_path DIR --dataset FILE ...

One step, in the order of the code in main:

    1. prompts      the next P problems; their order is a function of (seed, epoch) alone
    2. rollout      vLLM samples G answers y_1..y_G to each of them from the current weights
    3. rewards      r_i = sum_k w_k * part_k(y_i): format, cosine, length ... (rewards.py)
    4. advantages   A_i = (r_i - mean_G r) / (std_G r + 1e-4): better than its siblings, or worse;
                    weights m and N, and micro-batches of equal cost
    5. reference    log-probs of the frozen starting model, only if beta > 0
    6. update       ratio_t = pi(y_t) / pi_old(y_t), pi_old: the first pass over the batch
                    KL_t = exp(ref_t - logp_t) - (ref_t - logp_t) - 1
                    L = sum_t m_t [-w_t min(ratio_t A, clip(ratio_t) A) + beta KL_t] / N
                    w_t = min(pi_old(y_t) / q(y_t), cap), q: what vLLM really sampled from
    7. sync         new weights to the engines, verified before anyone samples from them
    8. log, evaluate, save

It is train_sft.py with a weight on every token: the same forward, the same packed batches, and
the same single denominator N per step over all ranks. --loss_type only chooses m and N:

    grpo      m = 1/|y_i|, N = answers                       each token of a long answer counts less
    dapo      m = 1,       N = all tokens                    every token counts the same
    dr_grpo   m = 1,       N = answers x max_completion_length    independent of their lengths

There is no critic, no reward model and no replay. What the originals did differently is a patch
against these files, hunk by hunk with the reason: recipes/originals/.

Letters: P prompts, G answers per prompt, B = P x G answers, S tokens of a prompt and its answer,
T tokens of a micro-batch. Every per-token tensor of a micro-batch is (T,): position t holds what
belongs to the token it predicts.
"""

import json
import math
import random
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from data import (
    MODEL_INPUTS, check_lengths, collate, load_problems, micro_batches, set_chat_template,
    stop_token_id, system_prompt_text)
from model import (
    RunLog, Stopped, check_common_flags, check_flags, check_unfinished, clip_gradients, flag,
    flops_per_pack, folder_hash, gather_objects, generation_config, last_checkpoint,
    load_checkpoint, load_config, load_policy, load_tokenizer, make_schedule, max_over_ranks,
    model_folder, open_run, peak_flops, peak_memory_gb, print_memory, raise_on_all_ranks,
    run_main, save_checkpoint, save_hf, schedule_horizon, setup_distributed, shutdown_distributed,
    stop_on_signal, sum_over_ranks, text_hash, wait_for_all_ranks, write_atomically)
from rewards import RewardOptions, check_reward_options, gold_answer, rewards_for_group
from rollout import (
    PROBE_TOLERANCE, Engine, clean_sync_folder, completion_text, engine_layout, sampling_seed,
    sync_weights)

COLUMNS = ("mask", "advantages", "rollout_logprobs")  # per-token arrays of a row, see token_rows
MAX_SHARE_WITHOUT_REWARD = 0.25  # of a step's answers: above it a reward function is broken
MAX_SHARE_OFF = 0.2  # of the tokens may differ by 10% in probability between sampler and trainer
MAX_BAD_STEPS = 3  # this many steps in a row beyond that end the run


@dataclass
class GRPOConfig(RewardOptions):  # the reward flags and their defaults are in rewards.py
    # What to train, on what, where to
    model_name_or_path: str = flag("runs/sft/final", "Start and KL reference: folder or hub id.")
    dataset: str = flag("RabotniKuma/Fast-Math-R1-GRPO", "Hub id[:split], file or folder.")
    problem_column: str = flag("problem", "Column of the question.")
    answer_column: str = flag("answer", "Column of the gold answer; of a list, the first.")
    output_dir: str = flag("runs/grpo", "Config, metrics, checkpoints, rollouts, final.")
    resume: bool = flag(False, "Continue from output_dir's newest intact checkpoint.")
    # Prompts and sampling
    system_prompt: str = flag("grpo", "sft, grpo, open_rs, open_rs3, none, or the text itself.")
    chat_template: str = flag("tokenizer", "tokenizer (its own), open_r1_roles, or a Jinja file.")
    num_prompts_per_step: int = flag(16, "P: problems per step.")
    num_generations: int = flag(8, "G: answers per problem.")
    max_prompt_length: int = flag(512, "Longer prompts are dropped at load time and counted.")
    temperature: float = flag(1.0, "Of sampling; the trainer divides its logits by it alike.")
    top_p: float = flag(0.9, "Nucleus sampling; below 1 see --rollout_is_cap.")
    min_p: float = flag(0.05, "Drop tokens below this share of the likeliest one's probability.")
    dynamic_sampling_rounds: int = flag(0, "Rounds of replacing groups of equal rewards.")
    # Objective
    loss_type: str = flag("grpo", "grpo, dapo or dr_grpo: see the head of this file.")
    scale_rewards: str = flag("group", "Divide advantages by the std of group, batch, or none.")
    beta: float = flag(0.04, "Weight of the KL term; 0: no reference model is loaded.")
    epsilon: float = flag(0.2, "Clip of the ratio from below.")
    epsilon_high: float = flag(0.2, "Clip of the ratio from above (DAPO: 0.28).")
    num_iterations: int = flag(1, "Updates per step, all from the same answers.")
    importance_sampling_level: str = flag("token", "token, or sequence (GSPO).")
    rollout_is_cap: float = flag(2.0, "Cap of the importance weight pi_old / q; 0: off.")
    mask_truncated_completions: bool = flag(False, "Leave answers cut for length out of the loss.")
    # Optimizer and schedule
    num_train_epochs: float = flag(1, "Passes over the problems, with --max_steps -1.")
    max_steps: int = flag(50, "Stop after this many steps; -1: after num_train_epochs.")
    lr_horizon: int = flag(-1, "Steps of the schedule; -1: where training stops.")
    learning_rate: float = flag(4e-6, "Peak learning rate.")
    lr_scheduler_type: str = flag("cosine", "cosine[_with_min_lr], linear, constant[_with_warmup].")
    min_lr_rate: float = flag(0.1, "Floor as a share of the peak, for cosine_with_min_lr.")
    warmup_ratio: float = flag(0.0, "Share of the horizon spent on linear warm-up, from 0.")
    weight_decay: float = flag(0.0, "AdamW's decoupled weight decay.")
    adam_beta2: float = flag(0.999, "AdamW: decay of the mean squared gradient.")
    max_grad_norm: float = flag(1.0, "Clip the gradient to this norm; 0 leaves it alone.")
    seed: int = flag(42, "Order of the problems and seeds of the samples.")
    # Machine
    max_tokens_per_microbatch: int = flag(0, "0: as many as the longest prompt + answer.")
    activation_checkpointing: str = flag("full", "none, full, or selective (keep attention).")
    compile: bool = flag(False, "torch.compile each block.")
    shard_size: int = flag(0, "Ranks that share one copy of the weights; 0: all.")
    timeout_minutes: float = flag(120, "Longest wait between ranks; must cover one rollout.")
    # Engines
    tensor_parallel_size: int = flag(1, "Ranks per vLLM engine; 14B on 8 H200: 4.")
    gpu_memory_utilization: float = flag(0.3, "Share of GPU memory for vLLM.")
    max_num_seqs: int = flag(128, "Answers an engine decodes at the same time.")
    enforce_eager: bool = flag(False, "No CUDA graphs: less memory, 2 to 4 times slower decoding.")
    vllm_sleep: bool = flag(False, "Engines free their memory during the update (80 GB cards).")
    request_timeout: float = flag(1800, "Seconds of silence until an engine is replaced.")
    sync_dir: str = flag("/dev/shm", "Where weights are handed to the engines.")
    probe_tolerance: float = flag(0, "Mean log-prob gap of trainer and engine; 0: by dtype.")
    # Saving, evaluating, logging
    save_steps: int = flag(5, "Checkpoint every so many steps; 0: only at the end.")
    save_total_limit: int = flag(2, "Checkpoints to keep; 0: all.")
    eval_dataset: str = flag("", "Problems for evaluation with the same engines; empty: none.")
    eval_steps: int = flag(10, "Evaluate every so many steps, and at the end.")
    eval_num_samples: int = flag(4, "Samples per problem in evaluation, sampled as in training.")
    report_to: str = flag("none", "tensorboard, wandb or trackio beside metrics.jsonl.")
    dry_run: bool = flag(False, "Print the plan and the memory of a step; load no weights.")
    ranks: int = flag(0, "With --dry_run: plan for this many ranks; 0: those running.")


# --------------------------------------------------------------------------------------------------
# The algorithm, as pure functions
# --------------------------------------------------------------------------------------------------
def group_advantages(rewards, scale_rewards="group", eps=1e-4):
    """
    A_i = (r_i - mean of its group) / (std + eps); arXiv 2402.03300, section 4.1.2, unbiased std.

    rewards (P, G) float -> (P, G). scale_rewards: divide by the std of the "group", of the "batch",
    or not at all, "none" (Dr. GRPO, arXiv 2503.20783: the group's std favours problems that are
    almost always or almost never solved). NaN is an answer without a reward: its advantage is 0.
    """
    centered = rewards - rewards.nanmean(1, keepdim=True)  # (P, G)
    # Exactly 0 in a group of equal rewards, although their mean is rounded.
    centered = torch.where(centered.abs() > 1e-9, centered, 0.0)  # nan becomes 0, too
    if scale_rewards == "none":
        return centered
    known = ~rewards.isnan()
    if scale_rewards == "batch":
        std = rewards[known].std().nan_to_num()  # of fewer than two rewards it is nan
    else:
        count = known.sum(1, keepdim=True)  # (P, 1)
        std = (centered.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()  # (P, 1)
    return centered / (std + eps)


def loss_weights(loss_type, lengths, has_loss, max_completion_length):
    """
    ([m_i], N): the mask value of every token of answer i, and the denominator of the step.

    lengths: tokens per answer; has_loss: False for an answer that is left out of the loss. It is
    left out of the denominator, too: otherwise masked answers would shrink the gradient.
    """
    lengths = [n if h else 0 for n, h in zip(lengths, has_loss, strict=True)]
    answers = sum(n > 0 for n in lengths)
    if loss_type == "grpo":
        return [1 / n if n else 0.0 for n in lengths], max(1, answers)
    denominator = sum(lengths) if loss_type == "dapo" else answers * max_completion_length
    return [float(n > 0) for n in lengths], max(1, denominator)


def grpo_loss(logprobs, batch, denominator, cfg):
    """
    The clipped surrogate with a KL term on one micro-batch; arXiv 2402.03300, eq. 3 and 4.

    logprobs (T,) of the policy, with gradient. batch: mask, advantages, rollout_logprobs,
    old_logprobs, position_ids and, if cfg.beta, ref_logprobs, all (T,), left unmodified. Returns
    (loss, sums): a scalar, and floats added up over the tokens inside the mask; those with a "/" in
    their names are metrics once they are divided by "trained_tokens".
    """
    mask, advantages = batch["mask"], batch["advantages"]
    inside = (mask > 0).to(logprobs.dtype)  # (T,) 1 on trained tokens; mask has m_i: 1/|y_i| ...
    log_ratio = (logprobs - batch["old_logprobs"]) * inside  # log pi(y_t) / pi_old(y_t)
    if cfg.importance_sampling_level == "sequence":
        # GSPO (arXiv 2507.18071, eq. 7): one ratio per answer, the geometric mean over its tokens.
        answer = (batch["position_ids"] == 0).cumsum(0) - 1  # (T,) which document of the pack
        zeros = torch.zeros(len(answer), dtype=inside.dtype, device=inside.device)
        length = zeros.index_add(0, answer, inside).clamp(min=1)
        log_ratio = (zeros.index_add(0, answer, log_ratio) / length)[answer]
    ratio = log_ratio.exp()

    # min(ratio A, clip(ratio) A). Without the clip a ratio that is already too large would be
    # pushed further; without the min one on the wrong side would get no gradient back.
    clipped = ratio.clamp(1 - cfg.epsilon, 1 + cfg.epsilon_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    if cfg.rollout_is_cap:
        # vLLM rounds differently, and top_p and min_p cut the tail: the samples come from q, not
        # from pi_old, and unweighted the gradient is that of another policy. One weight per token,
        # because the product over a long answer is mostly noise.
        rollout_weight = (batch["old_logprobs"] - batch["rollout_logprobs"]).exp()
        surrogate = surrogate * rollout_weight.clamp(max=cfg.rollout_is_cap)
    token_loss = -surrogate

    logged = {"trained_tokens": inside, "update/ratio": ratio,
              "update/clip_low": (ratio < 1 - cfg.epsilon) & (advantages < 0),
              "update/clip_high": (ratio > 1 + cfg.epsilon_high) & (advantages > 0)}
    if cfg.beta:
        # k3: never negative, zero only where both policies agree. As a loss its expected gradient
        # is that of KL(ref || pi); k1, the plain log-ratio, would have expected gradient 0. As in
        # TRL it has no importance weight: it is a penalty on the texts that were sampled.
        delta = (batch["ref_logprobs"] - logprobs) * inside
        kl = delta.exp() - delta - 1
        token_loss = token_loss + cfg.beta * kl
        logged["update/kl"] = kl

    loss = (token_loss * mask).sum() / denominator
    sums = {name: float((values.detach() * inside).sum()) for name, values in logged.items()}
    return loss, {**sums, "loss": float(loss.detach())}


def diagnostics(batch, cfg):
    """
    Sums over the trained tokens, as in grpo_loss: entropy, and log q against log pi_old.

    With top_p or min_p only one direction of the gap is an error; sync_weights, whose probe is not
    truncated, checks both.
    """
    inside = batch["mask"] > 0
    gap = (batch["old_logprobs"] - batch["rollout_logprobs"])[inside]
    # Cutting off the tail raises q, which explains any gap below 0.
    gap = gap.clamp(min=0) if cfg.top_p < 1 or cfg.min_p > 0 else gap.abs()
    return {"rollout/logprob_gap": float(gap.sum()),
            "rollout/off_by_10_percent": float((gap > math.log(1.1)).sum()),
            "update/entropy": float(batch["entropy"][inside].sum())}


# --------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------
def main(cfg):
    check_config(cfg)
    ctx = setup_distributed(cfg.timeout_minutes, cfg.shard_size, needs_gpu=not cfg.dry_run)
    ranks = cfg.ranks or ctx.world_size
    per_machine = min(cfg.ranks, 8) or ctx.local_world_size  # a plan's machines have 8 GPUs
    layout = engine_layout(ctx.rank, ctx.local_rank, ranks, per_machine, cfg.tensor_parallel_size)
    output_dir = Path(cfg.output_dir)

    # --------------------------------------------------------------------------- problems and plan
    folder = model_folder(cfg.model_name_or_path, ctx, weights=not cfg.dry_run)
    model_config = load_config(folder)
    tokenizer = load_tokenizer(folder)
    set_chat_template(tokenizer, cfg.chat_template)
    vocab = max(tokenizer.get_vocab().values()) + 1  # higher ids are padding of the embedding
    stop_token = stop_token_id(tokenizer)  # a base model's generation config may have another
    longest = cfg.max_prompt_length + cfg.max_completion_length
    check_lengths(tokenizer, model_config, longest)
    train = read_problems(cfg.dataset, tokenizer, cfg, ctx)
    held_out = read_problems(cfg.eval_dataset, tokenizer, cfg, ctx) if cfg.eval_dataset else None
    problems = train.problems

    steps_per_epoch = len(problems) / cfg.num_prompts_per_step
    epoch_steps = max(1, math.ceil(cfg.num_train_epochs * steps_per_epoch))
    total_steps = cfg.max_steps if cfg.max_steps > 0 else epoch_steps
    cfg.lr_horizon = schedule_horizon(cfg, total_steps)  # resolved, for the plan and config.json
    max_tokens = cfg.max_tokens_per_microbatch or longest
    if ctx.is_main:
        padding = model_config.vocab_size - vocab
        print_plan(cfg, train, steps_per_epoch, total_steps, max_tokens, layout, padding)
    if cfg.dry_run:
        if ctx.is_main:
            awake = 0.0 if cfg.vllm_sleep else cfg.gpu_memory_utilization
            print_memory(cfg, model_config, ranks, max_tokens, awake,
                         reference=cfg.beta > 0, temperature=cfg.temperature)
        return

    # --------------------------------------------------------------------------- engines and model
    run = open_run(ctx, cfg, {
        "model": folder_hash(folder), "chat template": text_hash(tokenizer.chat_template),
        "data": train.content_hash, "prompts per step": cfg.num_prompts_per_step})
    engine = start_engine(cfg, ctx, layout, folder, vocab, stop_token, problems[0].prompt_ids)
    model = load_policy(folder, ctx, activation_checkpointing=cfg.activation_checkpointing,
                        compile_blocks=cfg.compile)
    reference = load_policy(folder, ctx, trainable=False) if cfg.beta else None
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.learning_rate, betas=(0.9, cfg.adam_beta2),
        weight_decay=cfg.weight_decay, fused=True)
    scheduler = make_schedule(cfg, optimizer, cfg.lr_horizon)
    step, cursor, bad_steps = 0, 0, 0
    if run.checkpoint:
        state = load_checkpoint(model, optimizer, scheduler, ctx, run.checkpoint)
        step, cursor = state["step"], state["cursor"]
        check_unfinished(run.checkpoint, step, total_steps)
    log = RunLog(ctx, output_dir, asdict(cfg), total_steps, step, cfg.report_to)
    sample = partial(sample_groups, engine, layout, ctx, tokenizer)  # -> [Group]

    with (clean_sync_folder(cfg.sync_dir, output_dir, ctx) as sync_folder,
          stop_on_signal(ctx) as stop_requested):
        # Before the first step, too: both sides must agree, and a resumed run has other weights.
        probe = make_probe(problems, longest, ctx, cfg)
        synced = sync_weights(model, engine, ctx, sync_folder, step, probe)
        while step < total_steps:
            wait_for_all_ranks(ctx)
            started, times = time.perf_counter(), {}

            # ====================================================== 1.-3. prompts, rollout, rewards
            # collect_groups chooses the prompts, sample_groups has the engine answer them, and
            # score_group pays one group while the engine samples the others.
            first_cursor = cursor
            with timed(times, "rollout"):
                groups, cursor = collect_groups(sample, problems, cursor, cfg)
            if cfg.vllm_sleep:
                with raise_on_all_ranks(ctx, "putting the engines to sleep"):
                    if engine is not None:
                        engine.sleep()

            # ====================================================== 4. advantages
            rewards = torch.tensor([g.scored.totals for g in groups], dtype=torch.float64)  # (P, G)
            advantages = group_advantages(rewards, cfg.scale_rewards).flatten()  # (B,)
            lengths = [len(c.token_ids) for g in groups for c in g.completions]  # B of them
            has_loss = ~rewards.isnan().flatten()  # (B,)
            if cfg.mask_truncated_completions:
                has_loss &= torch.tensor(
                    [c.finish_reason != "length" for g in groups for c in g.completions])
            answer_weights, denominator = loss_weights(
                cfg.loss_type, lengths, has_loss.tolist(), cfg.max_completion_length)  # [m_i], N

            # Micro-batches of equal cost, because in each of them all ranks wait for the slowest.
            rows = token_rows(groups, advantages, answer_weights)
            sizes = [len(row["ids"]) for row in rows]
            costs = [flops_per_pack(model_config, [size]) for size in sizes]
            row_numbers = micro_batches(sizes, costs, ctx.world_size, max_tokens)[ctx.rank]
            # collate shifts by one: position t holds what belongs to the token it predicts.
            batches = [collate([rows[i] for i in numbers], ctx.device, COLUMNS)
                       for numbers in row_numbers]

            # ====================================================== 5. reference
            if reference is not None:
                with timed(times, "reference"), torch.no_grad():
                    for batch in batches:
                        batch["ref_logprobs"], _ = model_logprobs(reference, batch, cfg, vocab)

            # ====================================================== 6. update
            with timed(times, "update"):
                for _ in range(cfg.num_iterations):
                    sums = Counter()  # of one pass over all micro-batches; the last is logged
                    for batch in batches:
                        logprobs, entropy = model_logprobs(model, batch, cfg, vocab)  # (T,), (T,)
                        # In the first pass the policy is the one that sampled: its log-probs are
                        # the old ones, and no forward of their own is needed.
                        batch.setdefault("old_logprobs", logprobs.detach())
                        batch.setdefault("entropy", entropy)
                        loss, batch_sums = grpo_loss(logprobs, batch, denominator, cfg)
                        loss.backward()  # adds up: over micro-batches here, over ranks in FSDP
                        sums.update(batch_sums | diagnostics(batch, cfg))  # a Counter adds
                    sums = sum_over_ranks(ctx, sums)
                    grad_norm = clip_gradients(model, cfg.max_grad_norm)
                    if not math.isfinite(sums["loss"] + grad_norm):
                        raise FloatingPointError(
                            f"step {step + 1}: loss {sums['loss']}, gradient norm {grad_norm}; "
                            f"rows {[g.problem.row for g in groups]}. This update was not made; "
                            f"last checkpoint: {last_checkpoint(output_dir)}")
                    learning_rate = scheduler.get_last_lr()[0]
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            step += 1

            # ====================================================== 7. sync
            with timed(times, "sync"):
                synced = sync_weights(model, engine, ctx, sync_folder, step, probe, synced)

            # ====================================================== 8. log, evaluate, save
            metrics = {"step": step, "epoch": cursor / len(problems), "loss": sums["loss"],
                       "lr": learning_rate, "grad_norm": grad_norm,
                       "sync/logprob_gap": synced["gap"],
                       "dynamic_sampling/replaced": cursor - first_cursor - len(groups)}
            metrics |= rollout_metrics(groups, lengths, rewards)
            trained = max(1, sums["trained_tokens"])
            metrics |= {name: total / trained for name, total in sums.items() if "/" in name}
            times["time/step"] = time.perf_counter() - started
            flops = sum(costs) * cfg.num_iterations / ctx.world_size
            metrics |= cost_metrics(times, lengths, flops, engine, ctx)
            if held_out and (step % cfg.eval_steps == 0 or step == total_steps):
                with timed(times, "eval"):
                    metrics |= evaluate(sample, held_out.problems, cfg)
            metrics |= times
            per_token = per_token_values(ctx, batches, row_numbers, lengths)
            with raise_on_all_ranks(ctx, "writing rollouts and metrics"):
                if ctx.is_main:
                    write_rollouts(output_dir, step, groups, advantages, answer_weights, per_token)
                log.write(metrics, log_line(metrics, times, total_steps, any(answer_weights)))
            bad_steps = check_step(metrics, bad_steps, probe["tolerance"], ctx)
            stopping = stop_requested()
            due = cfg.save_steps and step % cfg.save_steps == 0
            if due or stopping or step == total_steps:
                save_checkpoint(model, optimizer, scheduler, ctx, output_dir, step,
                                {"cursor": cursor}, cfg.save_total_limit)
            if stopping and step < total_steps:
                log.close()
                raise Stopped(f"stopped by a signal after step {step} of {total_steps}; "
                              "continue with --resume")

    save_hf(model, output_dir / "final", ctx, ctx.compute_dtype, tokenizer,
            generation_config(folder, stop_token))
    log.close()
    if engine is not None:
        engine.close()
    if ctx.is_main:
        print(f"done: {total_steps} steps; model in {output_dir / 'final'}", flush=True)
    shutdown_distributed(ctx)


# --------------------------------------------------------------------------------------------------
# Phases 1 to 7: what needs more than a line
# --------------------------------------------------------------------------------------------------
@dataclass
class Group:
    """The G answers to one problem, in sample order."""

    problem: object  # data.Problem
    completions: list  # rollout.Completion
    texts: list
    scored: object  # rewards.RewardedGroup
    scoring_seconds: float


def collect_groups(sample, problems, cursor, cfg):
    """
    P scored groups for one step, and the next unused place in the stream of epochs (prompts_at).

    With dynamic sampling (DAPO, arXiv 2503.14476) a group of equal rewards, whose advantages are
    all 0, is replaced by a new prompt; the last round keeps every group.
    """
    groups = []
    for rounds_left in range(cfg.dynamic_sampling_rounds, -1, -1):
        places = range(cursor, cursor + cfg.num_prompts_per_step - len(groups))
        fresh = sample(cfg, prompts_at(problems, places, cfg.seed), places)
        cursor = places.stop
        groups += [g for g in fresh if rounds_left == 0 or not has_equal_rewards(g.scored)]
        if len(groups) == cfg.num_prompts_per_step:
            break
    return groups, cursor


def prompts_at(problems, places, seed):
    """
    The problems at these places of the endless stream of epochs, each shuffled by (seed, epoch).

    The place alone decides, so that a resume repeats nothing and skips nothing.
    """
    at = [divmod(place, len(problems)) for place in places]  # (epoch, offset)
    return [problems[epoch_order(len(problems), epoch, seed)[offset]] for epoch, offset in at]


@lru_cache(maxsize=2)
def epoch_order(count, epoch, seed):
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def sample_groups(engine, layout, ctx, tokenizer, cfg, problems, places):
    """
    One scored Group per problem, on every rank; engine k takes the problems k, k + count, ...

    A sample's seed is made of (seed, place in the stream of epochs, sample): a problem that comes a
    second time gets other answers, and a restarted engine draws the same ones again.
    """
    scored = {}
    with raise_on_all_ranks(ctx, "sampling answers"):
        if engine is not None:
            numbers = range(layout.index, len(problems), layout.count)
            samples = range(cfg.num_generations)
            stream = engine.generate(
                [problems[i].prompt_ids for i in numbers], n=cfg.num_generations,
                seeds=[[sampling_seed(cfg.seed, places[i], s) for s in samples] for i in numbers],
                temperature=cfg.temperature, top_p=cfg.top_p, min_p=cfg.min_p,
                max_tokens=cfg.max_completion_length)
            for index, completions in stream:  # scored while the engine samples the other groups
                number = numbers[index]
                scored[number] = score_group(problems[number], completions, cfg, tokenizer)
    groups = {i: group for part in gather_objects(ctx, scored) for i, group in part.items()}
    return [groups[i] for i in range(len(problems))]


def score_group(problem, completions, cfg, tokenizer):
    """Decode and score one group; rewards.py sees texts and lengths, never token ids."""
    started = time.perf_counter()
    texts = [completion_text(tokenizer, c) for c in completions]
    lengths = [len(c.token_ids) for c in completions]
    scored = rewards_for_group(texts, problem.answers[0], cfg, lengths)
    return Group(problem, completions, texts, scored, time.perf_counter() - started)


def has_equal_rewards(scored):
    """Whether all rewards of a group are the same, or missing (nan): its advantages are 0."""
    return len({total for total in scored.totals if not math.isnan(total)}) <= 1


def token_rows(groups, advantages, answer_weights):
    """
    One row per answer: ids (S,) of prompt + completion, and an array (S,) for each of COLUMNS.

    Each value is at its own token (data.collate shifts them) and 0 on the prompt: mask m_i,
    advantages A_i, rollout_logprobs log q. The stop token is trained, too: it was sampled.
    """
    rows = []
    answers = [(g.problem.prompt_ids, c) for g in groups for c in g.completions]  # B of them
    for i, (prompt_ids, completion) in enumerate(answers):
        prompt = np.zeros(len(prompt_ids))
        ones = np.ones(len(completion.token_ids))
        rows.append({
            "ids": np.array([*prompt_ids, *completion.token_ids]),
            "mask": np.append(prompt, answer_weights[i] * ones),
            "advantages": np.append(prompt, float(advantages[i]) * ones),
            "rollout_logprobs": np.append(prompt, completion.logprobs),
        })
    return rows


def model_logprobs(model, batch, cfg, vocab_size):
    """(logprobs, entropy), both (T,), of a micro-batch, at the temperature that sampled it."""
    inputs = {name: batch[name] for name in MODEL_INPUTS}
    return model(**inputs, temperature=cfg.temperature, vocab_size=vocab_size)


def make_probe(problems, longest, ctx, cfg):
    """The text that both sides score after every weight sync: the first prompts, concatenated."""
    token_ids = [token for problem in problems[:64] for token in problem.prompt_ids]
    token_ids = token_ids[:min(256, longest)]
    batch = collate([{"ids": np.array(token_ids)}], ctx.device, columns=())
    return {"token_ids": token_ids, "batch": batch,
            "tolerance": cfg.probe_tolerance or PROBE_TOLERANCE[dtype_name(ctx)]}


# --------------------------------------------------------------------------------------------------
# Set-up
# --------------------------------------------------------------------------------------------------
def check_config(cfg):
    """Refuse impossible values before anything starts. Raises ValueError: flag, value, remedy."""
    check_common_flags(cfg)
    check_reward_options(cfg)
    check_flags(
        cfg,
        choices={"loss_type": ("grpo", "dapo", "dr_grpo"),
                 "scale_rewards": ("group", "batch", "none"),
                 "importance_sampling_level": ("token", "sequence")},
        above_0=("num_prompts_per_step", "max_prompt_length", "max_completion_length", "top_p",
                 "num_iterations", "tensor_parallel_size", "temperature", "eval_num_samples",
                 "max_num_seqs", "gpu_memory_utilization", "request_timeout"),
        not_negative=("beta", "epsilon", "epsilon_high", "rollout_is_cap", "probe_tolerance",
                      "dynamic_sampling_rounds", "max_tokens_per_microbatch"),
        shares=("top_p", "min_p", "gpu_memory_utilization"))
    if cfg.num_generations < 2:
        raise ValueError(f"--num_generations {cfg.num_generations}: an advantage compares answers "
                         "to the same problem; use 2 or more")
    longest = cfg.max_prompt_length + cfg.max_completion_length
    if 0 < cfg.max_tokens_per_microbatch < longest:
        raise ValueError(f"--max_tokens_per_microbatch {cfg.max_tokens_per_microbatch} is below "
                         f"the longest prompt + answer, {longest}; raise it, or use 0")


def read_problems(dataset, tokenizer, cfg, ctx):
    """The problems of a data set with readable gold answers and prompts that are not too long."""
    with raise_on_all_ranks(ctx, f"reading {dataset}"):
        return load_problems(
            dataset, tokenizer, gold_answer, system_prompt_text(cfg.system_prompt),
            cfg.max_prompt_length, cfg.problem_column, cfg.answer_column)


def dtype_name(ctx):
    return str(ctx.compute_dtype).removeprefix("torch.")


def start_engine(cfg, ctx, layout, folder, vocab_size, stop_token, prompt_ids):
    """This rank's engine, or None where a neighbour owns it; on a CPU it starts meanwhile."""
    engine = None
    if layout.owns_engine:
        engine = Engine(
            folder, max_model_len=cfg.max_prompt_length + cfg.max_completion_length + 1,
            dtype=dtype_name(ctx), vocab_size=vocab_size, stop_token_id=stop_token,
            tensor_parallel_size=cfg.tensor_parallel_size, devices=layout.devices,
            gpu_memory_utilization=cfg.gpu_memory_utilization, max_num_seqs=cfg.max_num_seqs,
            enforce_eager=cfg.enforce_eager, sleep_mode=cfg.vllm_sleep,
            request_timeout=cfg.request_timeout,
            log_file=Path(cfg.output_dir, f"engine-{layout.index}.log"))
    if ctx.device.type == "cuda":
        # vLLM sizes its KV cache by the memory that is free: it must be up before the trainer.
        with raise_on_all_ranks(ctx, "starting the engines"):
            if engine is not None:
                engine.score(prompt_ids)
    return engine


def print_plan(cfg, train, steps_per_epoch, total_steps, max_tokens, layout, padding):
    """What the run is going to do, before anything expensive starts."""
    answers = cfg.num_prompts_per_step * cfg.num_generations
    print(f"""\
problems   {cfg.dataset}: {train.summary()}
step       {cfg.num_prompts_per_step} prompts x {cfg.num_generations} answers = {answers}, \
{cfg.num_iterations} update(s)
plan       {steps_per_epoch:.1f} steps per epoch, {total_steps} in all, \
schedule ends at step {cfg.lr_horizon}
lengths    prompt <= {cfg.max_prompt_length:,}, answer <= {cfg.max_completion_length:,}; \
micro-batches of {max_tokens:,} tokens
sampling   temperature {cfg.temperature}, top_p {cfg.top_p}, min_p {cfg.min_p}; \
importance weights up to {cfg.rollout_is_cap} (0: not corrected)
padding    {padding} ids beyond the tokenizer's: never sampled
rewards    {cfg.reward_funcs} (weights {cfg.reward_weights or 'all 1'})
engines    {layout.count} x {cfg.tensor_parallel_size} rank(s); weights through {cfg.sync_dir}
output     {cfg.output_dir}""", flush=True)


# --------------------------------------------------------------------------------------------------
# Phase 8: log, evaluate
# --------------------------------------------------------------------------------------------------
@contextmanager
def timed(times, phase):
    """Set times["time/PHASE"] to the seconds of a block; what a GPU has queued counts later."""
    started = time.perf_counter()
    yield
    times[f"time/{phase}"] = time.perf_counter() - started


def rollout_metrics(groups, lengths, rewards):
    """Means over the B answers of a step; rewards (P, G)."""
    scored = [g.scored for g in groups]
    outcomes = Counter(outcome for s in scored for outcome in s.outcomes)
    truncated = [c.finish_reason == "length" for g in groups for c in g.completions]
    parts = {name: np.nanmean([s.parts[name] for s in scored]) for name in scored[0].parts}
    failures = ("no_answer", "timeout", "crash", "no_verdict")
    return {
        **{f"reward/{name}": float(mean) for name, mean in parts.items()},
        "reward/total": float(rewards.nanmean()),
        "reward/std_within_group": float(rewards.std(1).nanmean()),
        "reward/groups_of_equal_rewards": sum(map(has_equal_rewards, scored)) / len(scored),
        "reward/missing": float(rewards.isnan().double().mean()),
        "completions/mean_length": float(np.mean(lengths)),
        "completions/max_length": max(lengths),
        "completions/truncated": float(np.mean(truncated)),
        "completions/correct": sum(s.correct.count(True) for s in scored) / len(lengths),
        **{f"grading/{name}": outcomes[name] for name in failures},
        # Summed over the engines; it overlaps with time/rollout.
        "time/rewards": sum(g.scoring_seconds for g in groups),
    }


def cost_metrics(times, lengths, flops, engine, ctx):
    """Speed, memory, and model FLOPs utilisation of the update; flops: per rank. Collective."""
    tokens, peak = sum(lengths), peak_flops(ctx.device)
    restarts = sum_over_ranks(ctx, {"restarts": engine.restarts if engine else 0})["restarts"]
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / times["time/step"],
        "rollout/tokens_per_second": tokens / times["time/rollout"],
        "rollout/engine_restarts": restarts,
        "mfu": flops / times["time/update"] / peak if peak else None,
        "peak_memory_gb": max_over_ranks(ctx, peak_memory_gb(ctx.device)),
    }


def log_line(metrics, times, total_steps, trained):
    """The progress line of a step; times: seconds of its phases."""
    phases = [f"{name.removeprefix('time/')} {seconds:.1f}"
              for name, seconds in times.items() if name != "time/step"]
    line = (f"step {metrics['step']}/{total_steps}  reward {metrics['reward/total']:.3f}  "
            f"correct {metrics['completions/correct']:.2f}  "
            f"length {metrics['completions/mean_length']:.0f}  "
            f"cut {metrics['completions/truncated']:.0%}  loss {metrics['loss']:+.4f}  "
            f"kl {metrics.get('update/kl', 0):.4f}  grad {metrics['grad_norm']:.2f}  "
            f"| {metrics['time/step']:.1f} s: {', '.join(phases)}")
    if "eval/pass@1" in metrics:
        line += f"  | eval accuracy {metrics['eval/pass@1']:.3f}"
    if not trained:
        line += "  | NO GRADIENT: every answer is masked or has no reward"
    return line


def check_step(metrics, bad_steps, allowed, ctx):
    """
    End the run when its rewards or its sampler cannot be trusted; returns the bad steps in a row.

    Raises ValueError when too many answers have no reward, and when sampler and trainer disagree
    in MAX_BAD_STEPS steps in a row: then the gradient is not that of the policy that sampled.
    """
    missing = metrics["reward/missing"]
    if missing > MAX_SHARE_WITHOUT_REWARD:
        raise ValueError(f"{missing:.0%} of the answers have no reward: a function of "
                         "--reward_funcs fails; grading/* in metrics.jsonl says how")
    gap, share = metrics["rollout/logprob_gap"], metrics["rollout/off_by_10_percent"]
    if gap <= allowed and share <= MAX_SHARE_OFF:
        return 0  # nan fails both tests
    message = (f"sampler and trainer disagree: mean log-prob gap {gap:.3g} (allowed {allowed:.3g}),"
               f" {share:.0%} of the tokens off by 10% (allowed {MAX_SHARE_OFF:.0%}); "
               f"{MAX_BAD_STEPS} steps in a row end the run")
    if bad_steps + 1 == MAX_BAD_STEPS:
        raise ValueError(f"{message}. --probe_tolerance raises the first limit")
    if ctx.is_main:
        print(f"WARNING: {message}", flush=True)
    return bad_steps + 1


def evaluate(sample, problems, cfg):
    """Accuracy and length on held-out problems, with the training's own engines and sampling."""
    # The same seeds at every evaluation: two evaluations differ by the weights alone.
    eval_cfg = replace(cfg, num_generations=cfg.eval_num_samples, seed=cfg.seed + 1)
    groups = sample(eval_cfg, problems, range(len(problems)))
    correct = [right is True for g in groups for right in g.scored.correct]
    lengths = [len(c.token_ids) for g in groups for c in g.completions]
    truncated = [c.finish_reason == "length" for g in groups for c in g.completions]
    return {"eval/pass@1": float(np.mean(correct)), "eval/mean_length": float(np.mean(lengths)),
            "eval/truncated": float(np.mean(truncated))}


def per_token_values(ctx, batches, row_numbers, lengths):
    """
    {row number: {"logprobs", "entropy"}} of all B answers, one value per token. Collective.

    logprobs are the trainer's before the update: beside rollout_logprobs they show where the
    sampler differs. row_numbers: of each micro-batch of this rank.
    """
    found = {}
    for batch, numbers in zip(batches, row_numbers, strict=True):
        ends = batch["cu_seqlens"][1:].tolist()
        for number, end in zip(numbers, ends, strict=False):  # an empty micro-batch has no number
            span = slice(end - 1 - lengths[number], end - 1)  # position t predicts token t + 1
            found[number] = {"logprobs": batch["old_logprobs"][span].tolist(),
                             "entropy": batch["entropy"][span].tolist()}
    return {i: values for part in gather_objects(ctx, found) for i, values in part.items()}


def write_rollouts(output_dir, step, groups, advantages, answer_weights, per_token):
    """rollouts/step-NNNNNN.jsonl: one object per completion, what report.py and regrade.py read."""
    lines = []
    answers = [(p, s) for p, group in enumerate(groups) for s in range(len(group.texts))]
    for i, (p, s) in enumerate(answers):
        problem, completion, scored = groups[p].problem, groups[p].completions[s], groups[p].scored
        arrays = {"rollout_logprobs": completion.logprobs, **per_token[i]}
        lines.append(json.dumps({
            "step": step, "row": problem.row, "prompt_index": p, "sample_index": s,
            "problem": problem.problem, "answer": problem.answers[0], "text": groups[p].texts[s],
            "length": len(completion.token_ids), "finish_reason": completion.finish_reason,
            "outcome": scored.outcomes[s], "correct": scored.correct[s],
            "rewards": {name: values[s] for name, values in scored.parts.items()},
            "reward": scored.totals[s], "advantage": float(advantages[i]),
            "weight": answer_weights[i], "version": completion.version,
            "token_ids": completion.token_ids,
            **{name: [round(x, 4) for x in values] for name, values in arrays.items()}}))
    path = output_dir / "rollouts" / f"step-{step:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "\n".join(lines) + "\n")


if __name__ == "__main__":
    run_main(main, GRPOConfig)
