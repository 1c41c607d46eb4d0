"""
Start-up: seconds from the command to --help, to the first SFT step, to a ready engine's answers.

    python benchmarks/startup.py [--repeats 3] [--against OTHER_CHECKOUT]

Wall seconds depend on who else uses the machine; CPU seconds (user + system, all threads and
children) hardly do, and are the figure to compare between versions. The SFT step is the demo's
first on one process, model and data included. The engine is rollout.Engine on the demo's base
model: 64 answers of 64 tokens, weights random. --against runs the engine of another checkout in
turn with this one's.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import report

ENGINE = ("s to ready", "s for 64 answers of 64 tokens", "s for the next 64", "tokens/s", "CPU s")


def clocked(command):
    """(wall seconds, CPU seconds) of a command."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, *map(str, command)], cwd=report.ROOT, check=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1"})
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def engine_worker(folder, code):
    sys.path.insert(0, str(code))
    from model import load_tokenizer
    from rollout import Engine

    tokenizer = load_tokenizer(folder / "base")
    lines = (folder / "rl.jsonl").read_text().splitlines()[:8]
    prompts = [tokenizer(json.loads(line)["problem"])["input_ids"] for line in lines]
    seeds = [[s + 8 * p for s in range(8)] for p in range(8)]
    started = time.perf_counter()
    engine = Engine(str(folder / "base"), max_model_len=256, dtype="float32",
                    log_file=str(folder / "engine.log"))
    engine.score(prompts[0])
    times = [time.perf_counter() - started]
    for _ in range(2):
        started = time.perf_counter()
        groups = list(engine.generate(
            prompts, n=8, seeds=seeds, temperature=1.0, top_p=1.0, min_p=0.0, max_tokens=64))
        times.append(time.perf_counter() - started)
    tokens = sum(len(c.token_ids) for _, group in groups for c in group)
    engine.close()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = [*times, tokens / times[-1], used.ru_utime + used.ru_stime]
    print(json.dumps(dict(zip(ENGINE, figures, strict=True))))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench-startup"))
    parser.add_argument("--against", type=Path)
    parser.add_argument("--only_engine", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return engine_worker(args.folder, args.worker)

    shutil.rmtree(args.folder, ignore_errors=True)
    report.ours(report.ROOT / "recipes" / "make_demo.py", "--output", args.folder)
    step = dict(
        model_name_or_path=args.folder / "base", dataset=args.folder / "train.jsonl",
        max_length=1024, output_dir=args.folder / "run", cache_dir=args.folder / "cache",
        system_prompt="none", chat_template="tokenizer", gradient_accumulation_steps=1, max_steps=1)
    flags = [part for name, value in step.items() for part in (f"--{name}", value)]
    commands = {  # name: (command, target)
        "import torch": (["-c", "import torch"], ""),
        "train_sft.py --help": (["train_sft.py", "--help"], "< 3 s"),
        "train_grpo.py --help": (["train_grpo.py", "--help"], "< 3 s"),
        "first SFT step, then leave": (["train_sft.py", *flags], "< 15 s")}
    if args.only_engine:
        commands = {}
    checkouts = {"engine": report.ROOT}
    if args.against:
        checkouts[f"engine of {args.against}"] = args.against.resolve()

    clocks = {name: [] for name in commands}
    engines = {name: [] for name in checkouts}
    for _ in range(args.repeats):
        for name, (command, _) in commands.items():
            for leftover in ("run", "cache"):
                shutil.rmtree(args.folder / leftover, ignore_errors=True)
            clocks[name].append(clocked(command))
        for name, code in checkouts.items():
            engines[name].append(report.ours(__file__, "--worker", code, "--folder", args.folder))
    rows = []
    for name, runs in clocks.items():
        walls, cpus = zip(*runs, strict=True)
        rows.append({"what": f"{name}: s", "median": report.spread(walls),
                     "target (idle)": commands[name][1]})
        rows.append({"what": f"{name}: CPU s", "median": report.spread(cpus), "target (idle)": ""})
    for name, runs in engines.items():
        rows += [{"what": f"{name}: {what}", "median": report.spread([run[what] for run in runs]),
                  "target (idle)": ""} for what in ENGINE]
    tokens_per_s = statistics.median(run["tokens/s"] for run in engines["engine"])
    report.finish("startup", rows, engine_tokens_per_s=tokens_per_s)


if __name__ == "__main__":
    main()
