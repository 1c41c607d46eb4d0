"""
B2: a GRPO step on given completions, train_grpo.py against TRL's GRPOTrainer on CPU.

    python benchmarks/grpo_update_vs_trl.py [--ranks 2|0] [--repeats 3]

Both get the same 16 prompts x 8 completions per step (random tokens; lengths from the recipe's
distribution, mean 8,000 cut at 16,384, divided by 32), so everything but generation and weight sync
is timed: rewards (one number per answer), advantages, reference, forward, backward, AdamW, logging;
from the end of a step to the end of the next. The first two steps are warm-up. Same model (the
demo's, 0.8M parameters), fp32, beta 0.04, clip, learning rate.

Ours is train_grpo.main with a stub in place of the engine and of sync_weights. TRL gets a
rollout_func. Its arms: per-device batch 16, 4 and 64 (its padding is per generation batch, so the
size changes speed, not positions); "default" also runs the pass for old log-probs that TRL runs
whenever vLLM samples, to correct for the sampler as we do; "no correction" leaves it out: less work
than ours, the best case for TRL. The baseline is the fastest "default".

Token positions are counted on the way into the decoder, policy and reference together. Counts hold
on a GPU, too; CPU clocks do not.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

import report

PROMPTS, GENERATIONS, LONGEST, SCALE = 16, 8, 512, 32
WARM_UP = 2


# --------------------------------------------------------------------------------------------------
# Model, problems and completions, made once
# --------------------------------------------------------------------------------------------------
def prepare(folder):
    """base/ and rl.jsonl of the demo; completions.json: {problem: G lists of token ids}."""
    import random

    from make_demo import write_demo
    from packing import log_normal_lengths

    write_demo(folder)
    rng = random.Random(0)
    rows = map(json.loads, (folder / "rl.jsonl").read_text().splitlines())
    problems = [row["problem"] for row in rows]
    lengths = log_normal_lengths(rng, len(problems) * GENERATIONS, 8_000, 16_384, cv=0.55)
    answers = {}
    for i, problem in enumerate(problems):
        mine = lengths[i * GENERATIONS:(i + 1) * GENERATIONS]
        answers[problem] = [[rng.randrange(10, 330) for _ in range(min(LONGEST, n // SCALE))]
                            for n in mine]
    (folder / "completions.json").write_text(json.dumps(answers))


def count_positions(model, counter):
    """Add the size of every input_ids that enters the decoder `model`."""
    def count(module, args, kwargs):
        counter.append(kwargs["input_ids"].numel())

    model.register_forward_pre_hook(count, with_kwargs=True)


# --------------------------------------------------------------------------------------------------
# The two arms
# --------------------------------------------------------------------------------------------------
def run_ours(folder, steps, stub=True, **flags):
    """train_grpo.main with its own flags: (ends of its steps, its metrics, positions computed)."""
    import train_grpo
    from data import encode_prompt, prompt_messages
    from model import load_tokenizer
    from rollout import Completion

    ends, rows, positions = [], [], []
    write, load = train_grpo.RunLog.write, train_grpo.load_policy
    answers = json.loads(Path(folder, "completions.json").read_text()) if stub else {}

    class StubEngine:
        restarts, pid, version = 0, 0, 0

        def __init__(self, *args, **kwargs):
            tokenizer = load_tokenizer(f"{folder}/base")
            self.answers = {}
            for problem, completions in answers.items():
                _, prompt_ids = encode_prompt(tokenizer, prompt_messages(problem))
                self.answers[tuple(prompt_ids)] = completions

        def generate(self, prompts, **sampling):
            for i, prompt in enumerate(prompts):
                yield i, [self.completion(i, s, ids)
                          for s, ids in enumerate(self.answers[tuple(prompt)])]

        def completion(self, prompt, sample, ids):
            reason = "length" if len(ids) >= LONGEST else "stop"
            return Completion(prompt, sample, ids, [-5.8] * len(ids), reason, 0)

        def sleep(self):
            pass

        def close(self):
            pass

    def timed_write(self, metrics, line):
        write(self, metrics, line)
        ends.append(report.now())
        rows.append(metrics)

    def counted_load(*args, **kwargs):
        policy = load(*args, **kwargs)
        count_positions(policy.model, positions)
        return policy

    def no_sync(model, engine, ctx, folder, version, probe, last=None):
        return {"gap": 0.0}

    train_grpo.RunLog.write, train_grpo.load_policy = timed_write, counted_load
    if stub:
        train_grpo.Engine, train_grpo.sync_weights = StubEngine, no_sync
        # The given answers are random tokens: their log-probs are not those of the policy.
        train_grpo.check_step = lambda *args: 0
    settings = dict(
        model_name_or_path=f"{folder}/base", dataset=f"{folder}/rl.jsonl", system_prompt="none",
        max_steps=steps, output_dir=report.run_folder(folder), num_prompts_per_step=PROMPTS,
        num_generations=GENERATIONS, max_prompt_length=128, max_completion_length=LONGEST,
        temperature=1.0, top_p=1.0, min_p=0.0, reward_funcs="soft_overlong",
        soft_overlong_cache=LONGEST, learning_rate=1e-4, lr_scheduler_type="constant",
        save_steps=0, seed=1, activation_checkpointing="none", max_tokens_per_microbatch=4096)
    train_grpo.main(train_grpo.GRPOConfig(**{**settings, **flags}))
    return ends, rows, positions


def length_reward(completions, completion_ids, **kwargs):
    """The same as our reward soft_overlong with a cache of the whole length: shorter is better."""
    return [-len(ids) / LONGEST for ids in completion_ids]


def run_trl(folder, steps, batch_size, correction, stub=True, **options):
    """TRL's GRPOTrainer on the same problems; with stub, its rollout_func returns our answers."""
    from types import SimpleNamespace

    import torch
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    ranks = int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(max(1, os.cpu_count() // ranks))  # as ours does
    ends, positions = [], []
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{folder}/base")
    lines = Path(folder, "rl.jsonl").read_text().splitlines()
    problems = [json.loads(line)["problem"] for line in lines]

    def render(text):
        """The prompt as text, so that both sides start from the same ids."""
        message = {"role": "user", "content": text}
        return tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True)

    rows = Dataset.from_list([{"prompt": render(p), "problem": p} for p in problems])
    per_rank = PROMPTS * GENERATIONS // ranks

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(report.now())

    if stub:
        given = json.loads(Path(folder, "completions.json").read_text())
        answers = {render(problem): completions for problem, completions in given.items()}

    def rollout_func(prompts, trainer):
        seen, chosen = {}, []
        for prompt in prompts:
            seen[prompt] = seen.get(prompt, -1) + 1
            chosen.append(answers[prompt][seen[prompt] % GENERATIONS])
        prompt_ids = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
        return {"prompt_ids": prompt_ids, "completion_ids": chosen,
                "logprobs": [[-5.8] * len(ids) for ids in chosen]}

    config = GRPOConfig(
        output_dir=f"{folder}/trl", use_cpu=True, bf16=False, fp16=False,
        gradient_checkpointing=False, per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=per_rank // batch_size, num_generations=GENERATIONS,
        max_completion_length=LONGEST, temperature=1.0, beta=0.04, loss_type="grpo",
        learning_rate=1e-4, lr_scheduler_type="constant", max_grad_norm=1.0, max_steps=steps,
        save_strategy="no", report_to="none", disable_tqdm=True, seed=1, logging_steps=1,
        vllm_importance_sampling_mode="token_truncate", vllm_importance_sampling_clip_max=2.0,
        **options)
    policy = transformers.AutoModelForCausalLM.from_pretrained(
        f"{folder}/base", dtype=torch.float32)
    trainer = GRPOTrainer(policy, reward_funcs=length_reward, args=config, train_dataset=rows,
                          processing_class=tokenizer, callbacks=[Clock()],
                          rollout_func=rollout_func if stub else None)
    if stub and correction:  # what TRL does after vLLM has sampled, without the engine
        trainer.use_vllm, trainer.vllm_generation = True, SimpleNamespace(sync_weights=lambda: None)
        trainer._last_loaded_step = 0
    count_positions(trainer.accelerator.unwrap_model(trainer.model).model, positions)
    if trainer.ref_model is not None:
        count_positions(trainer.accelerator.unwrap_model(trainer.ref_model).model, positions)
    trainer.train()
    return ends, trainer.state.log_history, positions


def worker(args):
    if args.worker == "ours":
        ends, _, positions = run_ours(args.folder, args.steps)
    else:
        ends, _, positions = run_trl(
            args.folder, args.steps, args.batch_size, args.worker == "default")
    if int(os.environ.get("RANK", 0)) == 0:
        steps = list(zip(ends[WARM_UP - 1:], ends[WARM_UP:], strict=False))
        wall, cpu = ([after[i] - before[i] for before, after in steps] for i in (0, 1))
        print(json.dumps({"seconds": statistics.median(wall), "cpu": statistics.median(cpu),
                          "positions": sum(positions) / args.steps,
                          "peak_gb": report.peak_memory_gb()}), flush=True)


# --------------------------------------------------------------------------------------------------
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="0: one process, all cores")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="the first two are not timed")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench-grpo"))
    parser.add_argument("--worker", default="")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 4, 64])
    parser.add_argument("--batch_size", type=int, default=1)
    args = parser.parse_args()
    if args.worker:
        return worker(args)

    import shutil

    shutil.rmtree(args.folder, ignore_errors=True)
    prepare(args.folder)
    arms = [("ours", 0), *[("default", size) for size in args.batch_sizes],
            ("no correction", args.batch_sizes[0])]
    measured = {arm: [] for arm in arms}
    for repeat in range(args.repeats):
        for arm in arms:
            start = report.ours if arm[0] == "ours" else report.trl
            found = start(__file__, "--worker", arm[0], "--batch_size", arm[1],
                          "--folder", args.folder, "--steps", args.steps, ranks=args.ranks)
            measured[arm].append(found)
            print(f"repeat {repeat + 1}  {arm}  {found}", file=sys.stderr, flush=True)

    seconds = {arm: [m["seconds"] for m in runs] for arm, runs in measured.items()}
    ours = ("ours", 0)
    best = min((arm for arm in arms if arm[0] == "default"),
               key=lambda arm: statistics.median(seconds[arm]))

    def versus(arm, key="seconds"):
        pairs = zip(measured[ours], measured[arm], strict=True)
        return [b[key] / a[key] for a, b in pairs]

    positions = {arm: runs[-1]["positions"] for arm, runs in measured.items()}
    rows = [{"arm": "ours" if arm == ours else f"TRL {arm[0]}, batch {arm[1]}",
             "s/step": report.spread(seconds[arm]),
             "CPU s/step": report.spread([m["cpu"] for m in measured[arm]]),
             "positions per rank and step": round(positions[arm]),
             "peak GB per rank": round(statistics.median(m["peak_gb"] for m in measured[arm]), 2),
             "time / ours": report.spread(versus(arm))} for arm in arms]
    # policy and reference only: the old-log-prob pass is a pass more, not padding
    plain = positions[arms[-1]] / positions[ours]
    report.finish(
        f"grpo_update_vs_trl, {args.ranks or 1} process(es)", rows,
        baseline=f"TRL {best[0]}, batch {best[1]}",
        ratio=round(statistics.median(versus(best)), 3), ratio_range=report.spread(versus(best)),
        positions_ratio=round(positions[best] / positions[ours], 3),
        positions_ratio_without_old_logprob_pass=round(plain, 3),
        ratio_no_correction=round(statistics.median(versus(arms[-1])), 3),
        ratio_of_cpu_seconds_rank_0=round(statistics.median(versus(best, "cpu")), 3),
        target="ratio >= 1.5, positions >= 1.7")


if __name__ == "__main__":
    main()
