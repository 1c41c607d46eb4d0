"""
B1: SFT tokens per second and peak memory, train_sft.py against TRL's SFTTrainer on CPU.

    python benchmarks/sft_vs_trl.py [--model demo|small] [--ranks 2|0] [--repeats 3]

Same rows, tokenised once by us and given to TRL as ids and labels; same model, fp32, AdamW,
learning rate, clip; same tokens per optimizer step (1,024 per rank). Both trainers run two epochs;
the second is timed, from the end of the last step of the first to the end of the last step of the
second, everything in between included. Tokens are the documents' own, padding is not counted as
work done. Each arm is a process tree of its own; repeats are interleaved.

Arms of TRL, of which the fastest is the baseline: bfd (its default packing; attention by position
ids, since flash attention needs a GPU), wrapped (documents cut and attended across), padded (no
packing, batches of equal token count). CPU clocks do not predict GPU clocks; the same figure on a
GPU is G3 and G3c of h200.py.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

import report

LENGTH = 1024  # tokens of a pack
FLAGS = dict(learning_rate=1e-3, seed=1)


# --------------------------------------------------------------------------------------------------
# Model and rows, made once
# --------------------------------------------------------------------------------------------------
def prepare(folder, model, rows):
    """
    base/, rows.jsonl and TRL's ids.jsonl of them; returns numbers of tokens, packs and documents.

    model: demo (0.8M parameters), or small (18M and a vocabulary of 32k).
    """
    import torch
    import transformers

    from data import load_documents, make_packs
    from make_demo import write_demo
    from model import load_tokenizer

    write_demo(folder)
    tokenizer = load_tokenizer(folder / "base")
    if model == "small":
        config = transformers.Qwen2Config(
            vocab_size=32_768, hidden_size=256, intermediate_size=1024, num_hidden_layers=8,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=LENGTH,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id)
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    lines = (folder / "train.jsonl").read_text().splitlines()[:rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    documents = load_documents(
        str(folder / "rows.jsonl"), tokenizer, LENGTH, cache_dir=str(folder / "cache")).documents
    with open(folder / "ids.jsonl", "w") as file:
        for document in documents:
            ids = document.ids.tolist()
            labels = [token if trained else -100
                      for token, trained in zip(ids, document.mask, strict=True)]
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
    return sum(map(len, documents)), len(make_packs(documents, LENGTH)), len(documents)


# --------------------------------------------------------------------------------------------------
# The two arms; each prints when its steps ended, and its peak memory
# --------------------------------------------------------------------------------------------------
def run_ours(folder):
    """train_sft.py itself, with its own flags; only the time at which a step is logged is kept."""
    import train_sft

    ends, losses, write = [], [], train_sft.RunLog.write

    def timed_write(self, metrics, line):
        write(self, metrics, line)
        ends.append(report.now())
        losses.append(metrics["loss"])

    train_sft.RunLog.write = timed_write
    cfg = train_sft.SFTConfig(
        model_name_or_path=f"{folder}/base", dataset=f"{folder}/rows.jsonl",
        output_dir=report.run_folder(folder), cache_dir=f"{folder}/cache", system_prompt="none",
        chat_template="tokenizer", max_length=LENGTH, gradient_accumulation_steps=1,
        num_train_epochs=2, activation_checkpointing="none", save_steps=0, **FLAGS)
    train_sft.main(cfg)
    return ends, losses


def run_trl(folder, packing, batch_size):
    import torch
    import transformers
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(max(1, os.cpu_count() // ranks))  # as ours does
    ends, losses = [], []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(report.now())

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "train_loss" in logs:  # the run's mean; ours averages its steps
                losses.append(logs["train_loss"])

    rows = load_dataset(
        "json", data_files=f"{folder}/ids.jsonl", split="train", cache_dir=f"{folder}/hf")
    packed = {} if packing == "padded" else {"packing": True, "packing_strategy": packing}
    config = SFTConfig(
        output_dir=f"{folder}/trl", use_cpu=True, bf16=False, fp16=False,
        gradient_checkpointing=False, max_length=LENGTH, per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=1, num_train_epochs=2, lr_scheduler_type="cosine",
        max_grad_norm=1.0, save_strategy="no", report_to="none", disable_tqdm=True,
        **packed, **FLAGS)
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{folder}/base")
    trainer = SFTTrainer(
        model, config, train_dataset=rows, processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    return ends, losses


def worker(arm, folder, batch_size):
    ends, losses = run_ours(folder) if arm == "ours" else run_trl(folder, arm, batch_size)
    if int(os.environ.get("RANK", 0)) == 0:
        half = len(ends) // 2
        wall, cpu = (ends[-1][i] - ends[half - 1][i] for i in (0, 1))
        print(json.dumps({"seconds": wall, "cpu": cpu, "steps": half,
                          "loss": sum(losses) / len(losses),
                          "peak_gb": report.peak_memory_gb()}), flush=True)


# --------------------------------------------------------------------------------------------------
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("demo", "small"), default="demo")
    parser.add_argument("--ranks", type=int, default=2, help="0: one process, all cores")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench-sft"))
    parser.add_argument("--worker", default="")
    parser.add_argument("--batch_size", type=int, default=1)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.folder, args.batch_size)

    import shutil

    shutil.rmtree(args.folder, ignore_errors=True)
    tokens, packs, documents = prepare(args.folder, args.model, args.rows)
    arms = {"ours": 1, "bfd": 1, "wrapped": 1, "padded": max(1, round(documents / packs))}
    measured = {arm: [] for arm in arms}
    for repeat in range(args.repeats):
        for arm, batch_size in arms.items():
            start = report.ours if arm == "ours" else report.trl
            found = start(__file__, "--worker", arm, "--folder", args.folder,
                          "--batch_size", batch_size, ranks=args.ranks)
            measured[arm].append(found)
            print(f"repeat {repeat + 1}  {arm:8} {tokens / found['seconds']:8,.0f} tokens/s  "
                  f"{found}", file=sys.stderr, flush=True)

    rate = {arm: [tokens / m["seconds"] for m in runs] for arm, runs in measured.items()}
    best = max((arm for arm in arms if arm != "ours"), key=lambda arm: statistics.median(rate[arm]))
    paired = [a / b for a, b in zip(rate["ours"], rate[best], strict=True)]  # neighbours in time
    cpu = [b["cpu"] / a["cpu"] for a, b in zip(measured["ours"], measured[best], strict=True)]
    peak = {arm: statistics.median(m["peak_gb"] for m in runs) for arm, runs in measured.items()}
    rows = [{"arm": arm if arm == "ours" else f"TRL {arm}", "tokens/s": report.spread(rate[arm]),
             "peak GB per rank": round(peak[arm], 2), "steps per epoch": measured[arm][-1]["steps"],
             "tokens per CPU s": report.spread([tokens / m["cpu"] for m in measured[arm]]),
             "mean loss": round(measured[arm][-1]["loss"], 3)} for arm in arms]
    report.finish(
        f"sft_vs_trl {args.model}, {args.ranks or 1} process(es)", rows, tokens_per_epoch=tokens,
        baseline=f"TRL {best}", ratio=round(statistics.median(paired), 3),
        ratio_range=report.spread(paired),
        ratio_of_cpu_seconds_rank_0=round(statistics.median(cpu), 3),
        peak_ratio=round(peak["ours"] / peak[best], 3), target="ratio >= 1.2, peak ratio <= 0.8",
        python_of_trl=str(report.TRL_PYTHON))


if __name__ == "__main__":
    main()
