"""
B6: loading and exporting, per rank: no rank ever holds a full copy of the model.

    python benchmarks/memory.py [--ranks 1,2,4] [--hidden_size 1024]

A random Qwen2 (fp32 on disk) is loaded by load_policy on N gloo ranks and exported by save_hf;
growth of the fullest rank's peak, above what the imports hold. "anonymous" is what the process
itself allocates and nobody can take from it: loading should cost 1/N of the model plus at most one
large tensor; exporting adds 1/N in the target type, plus one gathered tensor and its copy.
"resident" counts the pages of mapped safetensors files, too, which the kernel drops when somebody
needs the memory. save_hf's speed per writer is measured in the same run (to --folder; a path in
/dev/shm is the weight sync's case).
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import report


def worker(folder):
    import torch

    from model import (
        exit_process, gather_objects, load_policy, save_hf, setup_distributed, shutdown_distributed)

    ctx = setup_distributed()
    load_policy(folder / "warm-up", ctx)  # imports, thread pools, gloo buffers
    before = report.peak_memory_gb(reset=True)
    with report.PeakAnonymous() as load_anonymous:
        model = load_policy(folder / "model", ctx)
    load = report.peak_memory_gb() - before
    before = report.peak_memory_gb(reset=True)
    started = time.perf_counter()
    with report.PeakAnonymous() as save_anonymous:
        save_hf(model, folder / f"export-{ctx.world_size}", ctx, torch.bfloat16)
    seconds = time.perf_counter() - started
    found = gather_objects(
        ctx, (load, report.peak_memory_gb() - before, load_anonymous.gb, save_anonymous.gb))
    if ctx.is_main:
        files = (folder / f"export-{ctx.world_size}").glob("*.safetensors")
        size = sum(file.stat().st_size for file in files) / 1e9
        names = "load_gb", "save_gb", "load_anonymous_gb", "save_anonymous_gb"
        print(json.dumps({**{name: max(f[i] for f in found) for i, name in enumerate(names)},
                          "save_seconds": seconds,
                          "gb_per_s_and_writer": size / seconds / ctx.world_size}), flush=True)
    shutdown_distributed(ctx)
    exit_process(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/bench-memory"))
    parser.add_argument("--worker", action="store_true")
    args = parser.parse_args()
    if args.worker:
        return worker(args.folder)

    import torch
    import transformers

    shutil.rmtree(args.folder, ignore_errors=True)
    for name, hidden_size, layers in (("warm-up", 64, 2), ("model", args.hidden_size, args.layers)):
        config = transformers.Qwen2Config(
            vocab_size=32_768, hidden_size=hidden_size, intermediate_size=3 * hidden_size,
            num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4,
            tie_word_embeddings=False, bos_token_id=None, eos_token_id=1)
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(args.folder / name)
    size = sum(f.stat().st_size for f in (args.folder / "model").glob("*.safetensors")) / 1e9
    largest = 32_768 * args.hidden_size * 4 / 1e9
    rows = []
    try:
        for ranks in map(int, args.ranks.split(",")):
            found = report.ours(__file__, "--worker", "--folder", args.folder, ranks=ranks)
            rows.append({"ranks": ranks, "load GB anonymous": round(found["load_anonymous_gb"], 3),
                         "resident": round(found["load_gb"], 3),
                         "allowed: 1/N + largest": round(size / ranks + largest, 3),
                         "save GB anonymous": round(found["save_anonymous_gb"], 3),
                         "resident ": round(found["save_gb"], 3),
                         "allowed: 1/(2N) + 2 largest": round(size / 2 / ranks + 2 * largest, 3),
                         "save s": round(found["save_seconds"], 2),
                         "GB/s per writer": round(found["gb_per_s_and_writer"], 2)})
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    report.finish("memory", rows, model_gb=round(size, 3), largest_tensor_gb=round(largest, 3),
                  cores=os.cpu_count(),
                  target="load and save within what is allowed; >= 2 GB/s per writer to /dev/shm")


if __name__ == "__main__":
    main()
