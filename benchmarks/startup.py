"""
Start-up: seconds from the command to --help, to the first SFT step, to a ready engine and its first answers.

    python benchmarks/startup.py [--repeats 3]

Wall seconds depend on who else uses the machine; CPU seconds (user + system, all threads and children) hardly do, and
are the figure to compare between versions. The SFT step is the demo's first on one process, model and data included.
The engine is rollout.Engine on the demo's base model: 64 answers of 64 tokens, weights random.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path

import report


def clocked(command):
    """(wall seconds, CPU seconds) of a command."""
    import subprocess

    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *map(str, command)], cwd=report.ROOT, check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (time.perf_counter() - started,
            after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def engine_worker(folder):
    from model import load_tokenizer
    from rollout import Engine
    from train_grpo import data

    tokenizer = load_tokenizer(folder / "base")
    prompts = [data.chat_prompt_ids(tokenizer, json.loads(line)["problem"])
               for line in (folder / "rl.jsonl").read_text().splitlines()[:8]]
    started = time.perf_counter()
    engine = Engine(str(folder / "base"), max_model_len=256, dtype="float32", log_file=str(folder / "engine.log"))
    engine.score(prompts[0])
    ready = time.perf_counter() - started
    times = []
    for _ in range(2):
        started = time.perf_counter()
        groups = list(engine.generate(prompts, n=8, seeds=[[s + 8 * p for s in range(8)] for p in range(8)],
                                      temperature=1.0, top_p=1.0, min_p=0.0, max_tokens=64))
        times.append(time.perf_counter() - started)
    tokens = sum(len(c.token_ids) for _, group in groups for c in group)
    engine.close()
    print(json.dumps({"ready": ready, "first": times[0], "second": times[1], "tokens_per_s": tokens / times[1]}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench-startup"))
    parser.add_argument("--worker", action="store_true")
    args = parser.parse_args()
    if args.worker:
        return engine_worker(args.folder)

    import data

    shutil.rmtree(args.folder, ignore_errors=True)
    data.write_demo(args.folder)
    step = dict(model_name_or_path=args.folder / "base", dataset=args.folder / "train.jsonl", max_length=1024,
                output_dir=args.folder / "run", cache_dir=args.folder / "cache", system_prompt="none",
                chat_template="tokenizer", gradient_accumulation_steps=1, max_steps=1)
    commands = {
        "import torch": (["-c", "import torch"], ""),
        "train_sft.py --help": (["train_sft.py", "--help"], "< 3 s"),
        "train_grpo.py --help": (["train_grpo.py", "--help"], "< 3 s"),
        "first SFT step, then leave": (["train_sft.py", *(x for flag in step for x in (f"--{flag}", step[flag]))],
                                       "< 15 s"),
    }
    measured, engines = {name: [] for name in commands}, []
    for _ in range(args.repeats):
        for name, (command, _) in commands.items():
            for leftover in ("run", "cache"):
                shutil.rmtree(args.folder / leftover, ignore_errors=True)
            measured[name].append(clocked(command))
        engines.append(report.ours(__file__, "--worker", "--folder", args.folder))
    rows = [{"what": name, "wall s": report.spread([w for w, _ in runs]), "CPU s": report.spread([c for _, c in runs]),
             "target (wall, machine idle)": commands[name][1]} for name, runs in measured.items()]
    rows += [{"what": f"engine: {what}", "wall s": report.spread([e[key] for e in engines]), "CPU s": "",
              "target (wall, machine idle)": ""}
             for what, key in (("start to ready", "ready"), ("first 64 answers of 64 tokens", "first"),
                               ("the next 64", "second"))]
    report.finish("startup", rows, engine_tokens_per_s=statistics.median(e["tokens_per_s"] for e in engines))


if __name__ == "__main__":
    main()
