r"""
GSM8K for the two stages of recipes/gsm8k_one_gpu.sh.

    python recipes/gsm8k.py --output DIR [--source hub|FOLDER] [--sft_rows 2000] [--seed 42]

    sft.jsonl     problem and generation: a training solution as <think> ... </think> and \boxed{}
    grpo.jsonl    the other training problems, rows as published: data.py reads what follows ####
    dev.jsonl     200 training problems that neither stage trains on, for curves during stage 2
    test.jsonl    the test problems, as published
"""

import argparse
import json
import random
import re
from pathlib import Path


def read_rows(source, split):
    """Rows with question and answer; source: hub, or a folder with gsm8k_train and _test.jsonl."""
    if source == "hub":
        import datasets

        return list(datasets.load_dataset("openai/gsm8k", "main", split=split))
    lines = Path(source, f"gsm8k_{split}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def operations(row):
    """How many arithmetic operations the solution takes: its calculator marks, <<48/2=24>>."""
    return row["answer"].count("<<")


def sft_row(row):
    """A training row for stage 1; the calculator marks are taken out of the solution."""
    solution, _, gold = row["answer"].rpartition("####")
    thought = re.sub(r"<<.*?>>", "", solution).strip()
    gold = gold.strip().replace(",", "")
    generation = f"<think>\n{thought}\n</think>\n\nThe answer is \\boxed{{{gold}}}."
    return {"problem": row["question"], "generation": generation}


def split_rows(source, sft_rows=2000, dev_rows=200, max_operations=0, seed=42):
    """{file name: rows}. max_operations: only problems with 1 to so many operations; 0: all."""
    train, test = ([row for row in read_rows(source, split)
                    if not max_operations or 0 < operations(row) <= max_operations]
                   for split in ("train", "test"))
    random.Random(seed).shuffle(train)
    dev, first, rest = train[:dev_rows], train[dev_rows:][:sft_rows], train[dev_rows + sft_rows:]
    return {"sft": [sft_row(row) for row in first], "grpo": rest, "dev": dev, "test": test}


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the four files")
    parser.add_argument("--source", default="hub", help="hub, or a folder with both files")
    parser.add_argument("--sft_rows", type=int, default=2000, help="training rows for stage 1")
    parser.add_argument("--dev_rows", type=int, default=200, help="training rows to hold out")
    parser.add_argument("--max_operations", type=int, default=0, help="drop harder ones; 0: none")
    parser.add_argument("--seed", type=int, default=42, help="which rows go to which stage")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    files = split_rows(args.source, args.sft_rows, args.dev_rows, args.max_operations, args.seed)
    for name, rows in files.items():
        path = args.output / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{path}: {len(rows):,} rows")


if __name__ == "__main__":
    main()
