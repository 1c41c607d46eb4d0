"""
Stage 1: supervised fine-tuning on long reasoning traces (Fast-Math-R1, arXiv 2507.08267).

    torchrun --nproc_per_node 8 train_sft.py        the published recipe, on 14B parameters
    torchrun --nproc_per_node 2 train_sft.py --model_name_or_path DIR --dataset FILE ...

One step, in the order of the code in main:

    1. batch      packs of whole documents; attention and positions restart in each document
    2. forward    log p(y_t | y_<t) of each trained token (mask m_t = 1 on the assistant's tokens
       backward   and its end of turn) of  L = - sum_t m_t log p(y_t | y_<t) / N,
                  N = sum of m over ALL packs of ALL ranks of the step
    3. step       clip the gradient's norm, AdamW on fp32 master weights, learning rate
    4. log        metrics.jsonl, one line a person can read, and the loss on held-out rows
    5. save       checkpoints to resume from; `final`, a Hugging Face folder for stage 2 and vLLM

The single denominator N makes the gradient independent of how the batch is packed, split and spread
over ranks; a mean per micro-batch would give the tokens of short documents more weight. Stage 2
(train_grpo.py) is the same loop with a weight on every token: SFT is "advantage 1, no ratio".

What the originals did differently is a patch against these files: recipes/originals/.

Letters: T tokens of a pack, N trained tokens of a step.
"""

import math
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from data import (
    MODEL_INPUTS, assign_to_ranks, check_lengths, collate, load_documents, make_packs,
    set_chat_template, steps_of_epoch, stop_token_id, system_prompt_text)
from model import (
    RunLog, Stopped, check_common_flags, check_flags, check_unfinished, clip_gradients, flag,
    flops_per_pack, folder_hash, generation_config, last_checkpoint, load_checkpoint, load_config,
    load_policy, load_tokenizer, make_schedule, max_over_ranks, model_folder, open_run,
    parameter_count, peak_flops, peak_memory_gb, print_memory, raise_on_all_ranks, run_main,
    save_checkpoint, save_hf, schedule_horizon, setup_distributed, shutdown_distributed,
    stop_on_signal, sum_over_ranks, text_hash, wait_for_all_ranks)


@dataclass
class SFTConfig:
    # What to train, on what, where to
    model_name_or_path: str = flag("deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", "Folder or hub id.")
    dataset: str = flag("RabotniKuma/Fast-Math-R1-SFT", "Hub id[:split], file or folder.")
    output_dir: str = flag("runs/sft", "Config, metrics, checkpoints, final.")
    resume: bool = flag(False, "Continue from output_dir's newest intact checkpoint.")
    # Rows to tokens
    problem_column: str = flag("problem", "Column of the question.")
    generation_column: str = flag("generation", "Column of the reasoning trace with its answer.")
    system_prompt: str = flag("sft", "sft, grpo, open_rs, open_rs3, none, or the text itself.")
    chat_template: str = flag("open_r1_roles", "open_r1_roles, tokenizer (its own), Jinja file.")
    loss_on: str = flag("assistant", "assistant (and its end of turn), or all.")
    max_length: int = flag(24000, "Tokens of a pack; longer documents are dropped and counted.")
    cache_dir: str = flag(".cache", "Where tokenised data is kept, by content hash.")
    # Batch and schedule
    gradient_accumulation_steps: int = flag(8, "Packs per rank and step.")
    num_train_epochs: float = flag(10, "Passes over the data.")
    max_steps: int = flag(-1, "Stop after this many steps; -1: after num_train_epochs.")
    lr_horizon: int = flag(-1, "Steps of the schedule; -1: where training stops.")
    learning_rate: float = flag(1e-5, "Peak learning rate.")
    lr_scheduler_type: str = flag("cosine", "cosine[_with_min_lr], linear, constant[_with_warmup].")
    min_lr_rate: float = flag(0.1, "Floor as a share of the peak, for cosine_with_min_lr.")
    warmup_ratio: float = flag(0.0, "Share of the horizon spent on linear warm-up.")
    weight_decay: float = flag(0.0, "AdamW's decoupled weight decay.")
    adam_beta2: float = flag(0.999, "AdamW: decay of the mean squared gradient.")
    max_grad_norm: float = flag(1.0, "Clip the gradient to this norm; 0 leaves it alone.")
    seed: int = flag(42, "Order of the packs: a function of (seed, epoch).")
    # Machine
    activation_checkpointing: str = flag("full", "none, full, or selective (keep attention).")
    compile: bool = flag(False, "torch.compile each block: faster on a GPU.")
    shard_size: int = flag(0, "Ranks that share one copy of the weights; 0: all.")
    timeout_minutes: float = flag(30, "Longest wait between ranks.")
    # Saving, evaluating, logging
    save_steps: int = flag(50, "Checkpoint every so many steps; 0: only at the end.")
    save_total_limit: int = flag(2, "Checkpoints to keep; 0: all.")
    eval_dataset: str = flag("", "Held-out rows for an evaluation loss; empty: none.")
    eval_steps: int = flag(50, "Evaluate every so many steps, and at the end.")
    report_to: str = flag("none", "tensorboard, wandb or trackio beside metrics.jsonl.")
    dry_run: bool = flag(False, "Print the plan and the memory of a step; load no weights.")
    ranks: int = flag(0, "With --dry_run: plan for this many ranks; 0: those running.")


def check_config(cfg):
    """Refuse impossible values before anything starts. Raises ValueError: flag, value, remedy."""
    check_common_flags(cfg)
    check_flags(cfg, choices={"loss_on": ("assistant", "all")},
                above_0=("max_length", "gradient_accumulation_steps"))


def sft_loss(logprobs, mask, denominator):
    """
    L = - sum_t m_t log p(y_t | y_<t) / N.

    logprobs, mask (T,); denominator: trained tokens of the whole optimizer step, over all ranks.
    """
    return -(logprobs * mask).sum() / denominator


def main(cfg):
    check_config(cfg)
    ctx = setup_distributed(cfg.timeout_minutes, cfg.shard_size, needs_gpu=not cfg.dry_run)
    output_dir = Path(cfg.output_dir)

    # --------------------------------------------------------------------------- data and plan
    folder = model_folder(cfg.model_name_or_path, ctx, weights=not cfg.dry_run)
    model_config = load_config(folder)
    tokenizer = load_tokenizer(folder)
    set_chat_template(tokenizer, cfg.chat_template)
    train = read_documents(cfg.dataset, tokenizer, cfg, ctx)
    held_out = read_documents(cfg.eval_dataset, tokenizer, cfg, ctx) if cfg.eval_dataset else None
    documents = train.documents
    check_lengths(tokenizer, model_config, max(map(len, documents)))
    packs = make_packs(documents, cfg.max_length)  # [[document number]]
    lengths = [[len(documents[i]) for i in pack] for pack in packs]
    costs = [flops_per_pack(model_config, pack_lengths) for pack_lengths in lengths]

    ranks = cfg.ranks or ctx.world_size
    packs_per_step = cfg.gradient_accumulation_steps * ranks
    steps_per_epoch = math.ceil(len(packs) / packs_per_step)
    epoch_steps = math.ceil(cfg.num_train_epochs * steps_per_epoch)
    total_steps = cfg.max_steps if cfg.max_steps > 0 else epoch_steps
    cfg.lr_horizon = schedule_horizon(cfg, total_steps)
    if ctx.is_main:
        where = f"{parameter_count(model_config):,} parameters on {ranks} x {ctx.device.type}"
        print_plan(cfg, train, lengths, packs_per_step, steps_per_epoch, total_steps, where)
    if cfg.dry_run:
        if ctx.is_main:
            print_memory(cfg, model_config, ranks, cfg.max_length)
        return

    # --------------------------------------------------------------------- model and optimizer
    run = open_run(ctx, cfg, {
        "model": folder_hash(folder), "chat template": text_hash(tokenizer.chat_template),
        "data": train.content_hash, "packs per step": packs_per_step})
    model = load_policy(folder, ctx, activation_checkpointing=cfg.activation_checkpointing,
                        compile_blocks=cfg.compile)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.learning_rate, betas=(0.9, cfg.adam_beta2),
        weight_decay=cfg.weight_decay, fused=True)
    scheduler = make_schedule(cfg, optimizer, cfg.lr_horizon)
    step = 0
    if run.checkpoint:
        step = load_checkpoint(model, optimizer, scheduler, ctx, run.checkpoint)["step"]
        check_unfinished(run.checkpoint, step, total_steps)
    log = RunLog(ctx, output_dir, asdict(cfg), total_steps, step, cfg.report_to)

    with stop_on_signal(ctx) as stop_requested:
        while step < total_steps:
            wait_for_all_ranks(ctx)
            started = time.perf_counter()

            # ====================================================== 1. batch
            # The order is a function of (seed, epoch): a resumed run needs only the step.
            epoch, position = divmod(step, steps_per_epoch)
            members = steps_of_epoch(len(packs), packs_per_step, cfg.seed, epoch)[position]
            # Packs of equal cost at the same time, because all ranks wait for the slowest.
            # i counts within the step's packs; -1 is an empty pack that joins the collectives.
            assignment = assign_to_ranks([costs[i] for i in members], ctx.world_size)[ctx.rank]
            own_packs = [packs[members[i]] if i >= 0 else [] for i in assignment]
            batches = [collate_pack(documents, pack, ctx) for pack in own_packs]
            trained = sum(float(batch["mask"].sum()) for batch in batches)
            denominator = sum_over_ranks(ctx, {"trained": trained})["trained"]  # N
            if denominator == 0:
                raise ValueError(f"step {step + 1} has no trained token; rows "
                                 f"{rows_of(documents, packs, members)}")

            # ====================================================== 2. forward and backward
            sums = Counter()
            for batch in batches:
                inputs = {name: batch[name] for name in MODEL_INPUTS}
                logprobs, entropy = model(**inputs)  # (T,), (T,)
                loss = sft_loss(logprobs, batch["mask"], denominator)
                loss.backward()  # adds up: over micro-batches here, over ranks in FSDP
                sums["loss"] += float(loss.detach())
                sums["entropy"] += float((entropy * batch["mask"]).sum())
            sums = sum_over_ranks(ctx, sums)

            # ====================================================== 3. step
            grad_norm = clip_gradients(model, cfg.max_grad_norm)
            if not math.isfinite(sums["loss"] + grad_norm):
                raise FloatingPointError(
                    f"step {step + 1}: loss {sums['loss']}, gradient norm {grad_norm}; rows "
                    f"{rows_of(documents, packs, members)}. Nothing was updated; "
                    f"last checkpoint: {last_checkpoint(output_dir)}")
            learning_rate = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1

            # ====================================================== 4. log
            seconds = time.perf_counter() - started
            tokens = sum(sum(lengths[i]) for i in members)
            flops = sum(costs[i] for i in members) / seconds / ctx.world_size
            peak = peak_flops(ctx.device)
            memory = max_over_ranks(ctx, peak_memory_gb(ctx.device))
            metrics = {
                "step": step, "epoch": step / steps_per_epoch, "loss": sums["loss"],
                "lr": learning_rate, "grad_norm": grad_norm,
                "entropy": sums["entropy"] / denominator,
                "tokens": tokens, "trained_tokens": int(denominator),
                "tokens_per_second": tokens / seconds, "tflops_per_rank": flops / 1e12,
                "mfu": flops / peak if peak else None,
                "peak_memory_gb": memory, "time/step": seconds,
            }
            line = (f"step {step}/{total_steps}  loss {sums['loss']:.4f}  lr {learning_rate:.2e}  "
                    f"grad {grad_norm:.3f}  {tokens / seconds:,.0f} tokens/s  {memory:.1f} GB")
            if held_out and (step % cfg.eval_steps == 0 or step == total_steps):
                metrics["eval/loss"] = evaluation_loss(model, held_out.documents, cfg, ctx)
                line += f"  eval {metrics['eval/loss']:.4f}"
            log.write(metrics, line)

            # ====================================================== 5. save
            stopping = stop_requested()
            due = cfg.save_steps and step % cfg.save_steps == 0
            if due or stopping or step == total_steps:
                save_checkpoint(model, optimizer, scheduler, ctx, output_dir, step,
                                {}, cfg.save_total_limit)
            if stopping and step < total_steps:
                log.close()
                raise Stopped(f"stopped by a signal after step {step} of {total_steps}; "
                              "continue with --resume")

    save_hf(model, output_dir / "final", ctx, ctx.compute_dtype, tokenizer,
            generation_config(folder, stop_token_id(tokenizer)))
    log.close()
    if ctx.is_main:
        print(f"done: {total_steps} steps; model in {output_dir / 'final'}", flush=True)
    shutdown_distributed(ctx)


def read_documents(dataset, tokenizer, cfg, ctx):
    """Tokenised documents; the first rank of a machine fills the cache that the others read."""
    def load():
        return load_documents(
            dataset, tokenizer, cfg.max_length, cfg.loss_on, system_prompt_text(cfg.system_prompt),
            cfg.problem_column, cfg.generation_column, cfg.cache_dir, progress=ctx.is_main)

    with raise_on_all_ranks(ctx, f"reading {dataset}"):
        if ctx.local_rank == 0:
            load()
    return load()


def print_plan(cfg, train, lengths, packs_per_step, steps_per_epoch, total_steps, where):
    """What the run is going to do; lengths: of the documents of each pack."""
    tokens = sum(map(sum, lengths))
    trained = sum(int(d.mask.sum()) for d in train.documents)
    print(f"""\
data       {cfg.dataset}: {train.summary()}
tokens     {tokens:,} per epoch ({tokens / len(train.documents):,.0f} per document), \
{trained:,} of them trained
packs      {len(lengths):,} of {cfg.max_length:,} tokens, \
{tokens / len(lengths) / cfg.max_length:.2%} filled (padding is never computed)
step       {packs_per_step} packs, up to {packs_per_step * cfg.max_length:,} tokens
plan       {steps_per_epoch} steps per epoch, {total_steps} in all, \
schedule ends at step {cfg.lr_horizon}
output     {cfg.output_dir}
model      {cfg.model_name_or_path}: {where}""", flush=True)


def collate_pack(documents, pack, ctx):
    """The tensors of one pack; pack: document numbers; [] is an empty pack."""
    rows = [{"ids": documents[i].ids, "mask": documents[i].mask} for i in pack]
    return collate(rows, ctx.device)


def rows_of(documents, packs, members):
    """Source rows of some packs, for error messages."""
    return sorted({documents[i].row for index in members for i in packs[index]})[:20]


@torch.no_grad()
def evaluation_loss(model, documents, cfg, ctx):
    """Mean loss per trained token of held-out documents, packed like training data."""
    packs = make_packs(documents, cfg.max_length)
    sizes = [sum(len(documents[i]) for i in pack) for pack in packs]
    sums = Counter()
    for index in assign_to_ranks(sizes, ctx.world_size)[ctx.rank]:
        batch = collate_pack(documents, packs[index] if index >= 0 else [], ctx)
        logprobs, _ = model(**{name: batch[name] for name in MODEL_INPUTS})
        sums["loss"] -= float((logprobs * batch["mask"]).sum())
        sums["tokens"] += float(batch["mask"].sum())
    sums = sum_over_ranks(ctx, sums)
    return sums["loss"] / sums["tokens"]


if __name__ == "__main__":
    run_main(main, SFTConfig)
