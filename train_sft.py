"""
Stage 1: supervised fine-tuning on long reasoning traces (Fast-Math-R1, arXiv 2507.08267, section "SFT").

    torchrun --nproc_per_node 8 train_sft.py          the published recipe on DeepSeek-R1-Distill-Qwen-14B
    torchrun --nproc_per_node 2 train_sft.py --model_name_or_path runs/demo-seed1/base --dataset demo ...

The method, in the order of the code below:

    1. batch      packs of whole documents; attention and positions restart in each document
    2. forward    log p(y_t | y_<t) of each trained token t (mask m_t = 1 on the assistant's tokens and its end of turn)
                  backward of L = - sum_t m_t log p(y_t | y_<t) / N,  N = sum of m over ALL packs of ALL ranks of a step
    3. step       clip the gradient's norm, AdamW on fp32 master weights, learning rate
    4. log        metrics.jsonl, one line a person can read
    5. save       checkpoints to resume from; `final`, a Hugging Face folder for stage 2, transformers and vLLM

One denominator N per step is what makes the gradient independent of how the batch was packed, split or spread over
ranks; a mean per micro-batch would weigh a short answer's tokens more. Stage 2 (train_grpo.py) has the same phases and
the same loss with a weight on every token: SFT is "advantage = 1, no ratio".

What differs from the original, and the flag that restores it: documents do not see each other (--packing concat_cut);
loss on the answer and its end of turn only (--loss_on all_but_eos); fp32 AdamW instead of 8-bit; full cosine over the
epochs asked for (--lr_horizon 780 --max_steps 350 is the run shipped). recipes/fast_math_r1_14b.sh has the list.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.hf_argparser import HfArg

import data
import model as policy_lib


@dataclass
class SFTConfig:
    # What to train, on what, where to
    model_name_or_path: str = HfArg(default="deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", help="Start: folder or hub id.")
    dataset: str = HfArg(default="RabotniKuma/Fast-Math-R1-SFT", help="Hub id, .json(l), .parquet, saved folder, demo.")
    dataset_split: str = HfArg(default="train", help="Split, for hub ids and saved folders.")
    output_dir: str = HfArg(default="runs/sft", help="Run directory: config, metrics, checkpoints, final.")
    resume: bool = HfArg(default=False, help="Continue from output_dir's newest intact checkpoint; none is an error.")
    # Rows to tokens
    problem_column: str = HfArg(default="problem", help="Column of the question (messages or conversations need none).")
    generation_column: str = HfArg(default="generation", help="Column of the reasoning trace with its answer.")
    system_prompt: str = HfArg(default="sft", help="sft, grpo, open_rs, open_rs3, none, or the text itself.")
    chat_template: str = HfArg(default="open_r1_roles", help="open_r1_roles (recipe), tokenizer (its own), Jinja file.")
    loss_on: str = HfArg(default="assistant", help="assistant (with its end of turn), all, all_but_eos (the original).")
    max_length: int = HfArg(default=24000, help="Tokens of a pack, and of the longest document.")
    overlong: str = HfArg(default="drop", help="Documents above max_length: drop or cut. Both are counted and printed.")
    packing: str = HfArg(default="best_fit", help="best_fit (nothing cut), concat_cut (original; attention crosses).")
    max_malformed: float = HfArg(default=0.01, help="Share of rows that may be dropped before the run is refused.")
    benchmark_dir: str = HfArg(default="", help="Warn of rows that overlap a benchmark: folder of benchmarks, or hub.")
    cache_dir: str = HfArg(default=".cache", help="Where tokenised data is kept, by content hash.")
    # Batch and schedule
    gradient_accumulation_steps: int = HfArg(default=8, help="Packs per rank and step; 8 x 8 ranks x 24k: 1.5M tokens.")
    num_train_epochs: float = HfArg(default=10, help="Passes over the data; the paper's 10.")
    max_steps: int = HfArg(default=-1, help="Stop after this many steps; -1: after num_train_epochs.")
    lr_horizon: int = HfArg(default=-1, help="Steps of the schedule; -1: where training stops. May exceed max_steps.")
    learning_rate: float = HfArg(default=1e-5, help="Peak learning rate.")
    lr_scheduler_type: str = HfArg(default="cosine", help="cosine[_with_min_lr], linear, constant[_with_warmup].")
    min_lr_rate: float = HfArg(default=0.1, help="Floor as a share of the peak, for cosine_with_min_lr.")
    warmup_ratio: float = HfArg(default=0.0, help="Share of the horizon spent on linear warm-up.")
    weight_decay: float = HfArg(default=0.0, help="AdamW's decoupled weight decay.")
    adam_beta2: float = HfArg(default=0.999, help="AdamW: memory of the gradient's square.")
    max_grad_norm: float = HfArg(default=1.0, help="Clip the gradient to this norm; 0 leaves it alone.")
    seed: int = HfArg(default=42, help="Order of the packs: a function of (seed, epoch).")
    # Machine
    activation_checkpointing: str = HfArg(
        default="full", help="none, full, or selective (keep attention outputs: faster, +12 GB).")
    compile: bool = HfArg(default=False, help="torch.compile each block: faster on a GPU, a minute of start-up.")
    shard_size: int = HfArg(default=0, help="Ranks sharing one copy of the weights; 0: all. GPUs per machine: hybrid.")
    head_chunk_size: int = HfArg(default=2048, help="Tokens whose logits exist at a time.")
    timeout_minutes: float = HfArg(default=30, help="Deadline of every wait between ranks.")
    # Saving, evaluating, logging
    save_steps: int = HfArg(default=50, help="Checkpoint every so many steps; 0: only at the end.")
    save_total_limit: int = HfArg(default=2, help="Checkpoints to keep; 0: all.")
    eval_dataset: str = HfArg(default="", help="Held-out rows for an evaluation loss; empty: none.")
    eval_split: str = HfArg(default="train", help="Split of eval_dataset, for hub ids and saved folders.")
    eval_steps: int = HfArg(default=50, help="Evaluate every so many steps, and at the end.")
    report_to: str = HfArg(default="none", help="tensorboard, wandb or trackio beside metrics.jsonl.")
    dry_run: bool = HfArg(default=False, help="Print the plan (tokens, packs, steps, memory) without loading a model.")


def check_config(cfg):
    """Refuse impossible values before anything starts: flag, value, reason, remedy. Raises ValueError."""
    policy_lib.check_common_flags(cfg)
    policy_lib.check_flags(
        cfg, above_0=("max_length", "gradient_accumulation_steps"),
        choices={"loss_on": ("assistant", "all", "all_but_eos"), "overlong": ("drop", "cut"),
                 "packing": ("best_fit", "concat_cut")})


def sft_loss(logprobs, mask, denominator):
    """
    L = - sum_t m_t log p(y_t | y_<t) / N.

    logprobs, mask (T,); denominator: trained tokens of the whole optimizer step, over all ranks. Returns a scalar.
    """
    return -(logprobs * mask).sum() / denominator


def document_spans(packs, index, documents, packing):
    """[(ids, mask)] of one pack for data.collate; index -1: an empty one. concat_cut: a span that attention crosses."""
    spans = [(documents[i].ids[a:b], documents[i].mask[a:b]) for i, a, b in packs[index]] if index >= 0 else []
    if packing == "concat_cut" and spans:
        return [tuple(np.concatenate(parts) for parts in zip(*spans, strict=True))]
    return spans


@torch.no_grad()
def evaluation_loss(model, documents, max_length, ctx):
    """Mean loss per trained token of held-out documents, packed and dealt like training data."""
    packs = data.make_packs(documents, max_length)
    mine = data.assign_to_ranks([sum(b - a for _, a, b in p) for p in packs], ctx.world_size)[ctx.rank]
    total = count = 0.0
    for index in mine:
        batch = data.collate(document_spans(packs, index, documents, "best_fit"), ctx.device)
        mask = batch.pop("mask")
        logprobs, _ = model(**batch)
        total, count = total - float((logprobs * mask).sum()), count + float(mask.sum())
    sums = policy_lib.sum_over_ranks(ctx, {"loss": total, "tokens": count})
    return sums["loss"] / sums["tokens"]


def main(cfg):
    check_config(cfg)
    ctx = policy_lib.setup_distributed(cfg.timeout_minutes, cfg.shard_size)
    output_dir = Path(cfg.output_dir)

    # ---------------------------------------------------------------------------------- data and plan
    folder = policy_lib.model_folder(cfg.model_name_or_path, ctx, weights=not cfg.dry_run)
    model_config = policy_lib.load_config(folder)
    tokenizer = policy_lib.load_tokenizer(folder)
    data.set_chat_template(tokenizer, cfg.chat_template)

    def documents_of(dataset, split):
        load = lambda: data.load_documents(  # noqa: E731
            dataset, tokenizer, cfg.max_length, split, cfg.overlong, cfg.loss_on,
            data.system_prompt_text(cfg.system_prompt), cfg.problem_column, cfg.generation_column, cfg.max_malformed,
            cfg.cache_dir, progress=ctx.is_main)
        with policy_lib.raise_on_all_ranks(ctx, f"reading {dataset}"):
            if ctx.local_rank == 0:
                load()
        return load()  # from the cache that the first rank of this machine has written

    train = documents_of(cfg.dataset, cfg.dataset_split)
    with policy_lib.raise_on_all_ranks(ctx, "comparing the data with the benchmarks"):
        if ctx.is_main:
            data.warn_of_contamination(cfg.dataset, cfg.benchmark_dir, cfg.dataset_split, cfg.problem_column)
    held_out = documents_of(cfg.eval_dataset, cfg.eval_split).documents if cfg.eval_dataset else []
    packs = data.make_packs(train.documents, cfg.max_length, cfg.packing)
    pack_lengths = [[b - a for _, a, b in p] for p in packs]
    pack_costs = [policy_lib.flops_per_pack(model_config, lengths) for lengths in pack_lengths]
    packs_per_step = cfg.gradient_accumulation_steps * ctx.world_size
    steps_per_epoch = -(-len(packs) // packs_per_step)
    epoch_steps = math.ceil(cfg.num_train_epochs * steps_per_epoch)
    total_steps = cfg.max_steps if cfg.max_steps > 0 else epoch_steps
    cfg.lr_horizon = horizon = policy_lib.schedule_horizon(cfg, total_steps)  # resolved: a resume must keep it
    memory = policy_lib.estimated_memory_gb(model_config, ctx, cfg.max_length, cfg.activation_checkpointing,
                                            cfg.head_chunk_size)
    if ctx.is_main:
        filled = sum(map(sum, pack_lengths))
        trained = sum(int(d.mask.sum()) for d in train.documents)
        print(f"""\
data       {cfg.dataset}: {train.summary()}
tokens     {filled:,} per epoch ({filled / max(1, len(train.documents)):,.0f} per document), {trained:,} of them trained
packs      {len(packs):,} of {cfg.max_length:,} tokens, {filled / len(packs) / cfg.max_length:.2%} filled \
(padding is never computed)
step       {packs_per_step} packs = {cfg.gradient_accumulation_steps} x {ctx.world_size} ranks, \
up to {packs_per_step * cfg.max_length:,} tokens
plan       {steps_per_epoch} steps per epoch, {total_steps} steps in all, schedule ends at step {horizon}
model      {cfg.model_name_or_path}: {policy_lib.parameter_count(model_config):,} parameters \
on {ctx.world_size} x {ctx.device.type}
memory     about {memory:.1f} GB per rank (estimate)
output     {output_dir}""", flush=True)
    if cfg.dry_run:
        return

    # ---------------------------------------------------------------------------------- model and optimizer
    # Another number of ranks may resume if it takes as many packs per step: a step's number is its place in the data.
    run = policy_lib.open_run(ctx, cfg, {
        "model": policy_lib.folder_hash(folder), "data": train.content_hash, "gradient_accumulation_steps x ranks": packs_per_step})
    torch.manual_seed(cfg.seed)
    model = policy_lib.load_policy(
        folder, ctx, activation_checkpointing=cfg.activation_checkpointing, compile_blocks=cfg.compile,
        head_chunk_size=cfg.head_chunk_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, betas=(0.9, cfg.adam_beta2),
                                  eps=1e-8, weight_decay=cfg.weight_decay, fused=True)
    scheduler = policy_lib.make_schedule(cfg, optimizer, horizon)
    first_step = 0
    if run.checkpoint:
        first_step = policy_lib.load_checkpoint(model, optimizer, scheduler, ctx, run.checkpoint)["step"]
    if run.checkpoint and policy_lib.nothing_left_to_train(output_dir, run.checkpoint, first_step, total_steps):
        raise ValueError(f"nothing to do: {run.checkpoint} has reached step {first_step} of {total_steps}; "
                         "to go on raise --max_steps, and --lr_horizon with it")
    log = policy_lib.RunLog(ctx, output_dir, asdict(cfg), total_steps, first_step, cfg.report_to)
    step = first_step

    with policy_lib.stop_on_signal(ctx) as stop_requested:
        while step < total_steps:
            policy_lib.wait_for_all_ranks(ctx)
            started = time.perf_counter()
            # ========================================================================== 1. batch
            # The order is a function of (seed, epoch): a resumed run needs only the step to go on where it stopped.
            epoch, position = divmod(step, steps_per_epoch)
            members = data.steps_of_epoch(len(packs), packs_per_step, cfg.seed, epoch)[position]
            hands = data.assign_to_ranks([pack_costs[i] for i in members], ctx.world_size)  # packs of equal cost at the same time
            mine = [members[i] if i >= 0 else -1 for i in hands[ctx.rank]]
            batches = [data.collate(document_spans(packs, i, train.documents, cfg.packing), ctx.device) for i in mine]
            mine_trained = sum(float(b["mask"].sum()) for b in batches)
            denominator = policy_lib.sum_over_ranks(ctx, {"tokens": mine_trained})["tokens"]  # N
            if denominator == 0:
                raise ValueError(f"step {step + 1} has no trained token; its rows are {rows_of(packs, members, train)}")

            # ========================================================================== 2. forward and backward
            loss, entropy_sum = 0.0, 0.0
            for batch in batches:
                mask = batch.pop("mask")  # (T,)
                logprobs, entropy = model(**batch)  # (T,), (T,)
                micro_loss = sft_loss(logprobs, mask, denominator)
                micro_loss.backward()  # gradients are summed over micro-batches and over ranks
                loss += float(micro_loss.detach())
                entropy_sum += float((entropy * mask).sum())
            sums = policy_lib.sum_over_ranks(ctx, {"loss": loss, "entropy": entropy_sum})
            loss, entropy_sum = sums["loss"], sums["entropy"]

            # ========================================================================== 3. step
            grad_norm = policy_lib.clip_gradients(model, cfg.max_grad_norm)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise FloatingPointError(
                    f"step {step + 1}: loss {loss}, gradient norm {grad_norm}. "
                    f"Rows of this step: {rows_of(packs, members, train)}. "
                    f"Nothing was updated; last good checkpoint: {policy_lib.last_checkpoint(output_dir)}")
            learning_rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            # ========================================================================== 4. log
            seconds = time.perf_counter() - started
            step_lengths = [n for i in members for n in pack_lengths[i]]
            flops = sum(pack_costs[i] for i in members) / seconds / ctx.world_size
            memory = policy_lib.max_over_ranks(ctx, policy_lib.peak_memory_gb(ctx.device))
            metrics = {
                "step": step, "epoch": step / steps_per_epoch, "loss": loss, "lr": learning_rate,
                "grad_norm": grad_norm, "entropy": entropy_sum / denominator,
                "tokens": sum(step_lengths), "trained_tokens": int(denominator),
                "tokens_per_second": sum(step_lengths) / seconds, "tflops_per_rank": flops / 1e12,
                "mfu": flops / peak if (peak := policy_lib.peak_flops(ctx.device)) else None,
                "peak_memory_gb": memory, "time/step": seconds,
            }
            if held_out and (step % cfg.eval_steps == 0 or step == total_steps):
                metrics["eval/loss"] = evaluation_loss(model, held_out, cfg.max_length, ctx)
            log.write(metrics, f"step {step}/{total_steps}  loss {loss:.4f}  lr {learning_rate:.2e}  "
                      f"grad {grad_norm:.3f}  {metrics['tokens_per_second']:,.0f} tokens/s  {memory:.1f} GB"
                      + (f"  eval {metrics['eval/loss']:.4f}" if "eval/loss" in metrics else ""))

            # ========================================================================== 5. save
            stopping = stop_requested()
            if stopping or step == total_steps or (cfg.save_steps and step % cfg.save_steps == 0):
                policy_lib.save_checkpoint(model, optimizer, scheduler, ctx, output_dir, step,
                                           {}, cfg.save_total_limit)
            if stopping and step < total_steps:
                log.close()
                raise policy_lib.Stopped(f"stopped by a signal after step {step} of {total_steps}; "
                                         "continue with --resume")

    policy_lib.save_hf(model, output_dir / "final", ctx, ctx.compute_dtype, tokenizer,
                       policy_lib.generation_config(folder, data.stop_token_id(tokenizer)))
    log.close()
    if ctx.is_main:
        print(f"done: {total_steps} steps; model in {output_dir / 'final'}", flush=True)
    policy_lib.shutdown_distributed(ctx)


def rows_of(packs, members, train):
    """Source rows of some packs, for error messages."""
    return sorted({train.documents[i].row for index in members for i, _, _ in packs[index]})[:20]


if __name__ == "__main__":
    policy_lib.run_main(main, SFTConfig)
