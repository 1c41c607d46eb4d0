"""
Token scheduler (optional): guess how long a problem's solution is, give it a limit of its own.

    python recipes/token_scheduler.py train --output_dir runs/token_scheduler
    python recipes/token_scheduler.py predict --dataset aime24.json --output limits.jsonl
    python recipes/token_scheduler.py score --limits limits.jsonl --samples runs/eval/NAME/HASH \\
        --benchmark aime24

The method (Fast-Math-R1's Kaggle solution), with its published numbers:

    1. label    y = mean completion length of the problem / 12,800. The write-up says the shortest
                correct length, the code took the mean; --label_column chooses
    2. train    ModernBERT-base with one output, mean squared error; 3 epochs, 32 problems a step,
                cosine to 0. About 1 hour and 8k steps; test loss .080 -> .055, train .21 -> .045
    3. predict  limit = 10,500 + (13,300 - 10,500) * clamp(y, 0, 1): an easy problem's tokens go to
                a hard one
    4. score    samples that evaluate.py has drawn, at these limits and at their mean for all

Expect little: the authors saw a "moderate correlation" with the true lengths and about one
leaderboard point that "may be placebo". Left out: several GPUs, resuming; a run is an hour.
"""

import argparse
import json
import math
import random
import sys
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from build_data import load_rows, question  # noqa: E402

from data import DataError  # noqa: E402
from evaluate import (  # noqa: E402
    grade_sample, is_missing, markdown, percent, problem_metrics, read_samples, summarise)
from model import read_jsonl  # noqa: E402

SCALE = 12800  # tokens that make a label of 1


def predictions(model, tokenizer, problems, args):
    """y for each problem, a list of floats: predicted length / SCALE."""
    model.eval()
    values = []
    for start in tqdm(range(0, len(problems), 64), desc="predicting"):
        batch = encode(tokenizer, problems[start:start + 64], args.max_length, model.device)
        with torch.no_grad(), mixed_precision(model.device):
            values += model(**batch).logits.squeeze(-1).float().tolist()
    return values


def encode(tokenizer, problems, max_length, device):
    return tokenizer(problems, padding=True, truncation=True, max_length=max_length,
                     return_tensors="pt").to(device)


def mixed_precision(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def correlation(x, y):
    """Pearson's r of two lists; nan where one of them is constant."""
    x, y = torch.tensor(x), torch.tensor(y)
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1]) if len(x) > 1 else math.nan


def train(args):
    rows = load_rows(args.dataset)
    pairs = [(question(row), row.get(args.label_column)) for row in rows]
    pairs = [(text, n / SCALE) for text, n in pairs
             if text and isinstance(n, (int, float)) and n > 0]
    print(f"{args.dataset}: {len(pairs):,} of {len(rows):,} rows have a problem and a "
          f"{args.label_column}")
    random.Random(args.seed).shuffle(pairs)
    held_out, pairs = pairs[:len(pairs) // 10], pairs[len(pairs) // 10:]
    if not held_out:
        raise DataError(f"{args.dataset}: 10 rows or more are needed, a tenth for the test")
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    classifier = transformers.AutoModelForSequenceClassification
    model = classifier.from_pretrained(args.model, num_labels=1, dtype=torch.float32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    steps_per_epoch = math.ceil(len(pairs) / args.batch_size)
    total_steps = args.num_train_epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / total_steps)) / 2)
    for epoch in range(args.num_train_epochs):
        model.train()
        random.Random(f"{args.seed}/{epoch}").shuffle(pairs)
        losses = []
        for start in tqdm(range(0, len(pairs), args.batch_size), desc=f"epoch {epoch + 1}"):
            problems, labels = zip(*pairs[start:start + args.batch_size], strict=True)
            batch = encode(tokenizer, list(problems), args.max_length, device)
            with mixed_precision(device):
                outputs = model(**batch).logits.squeeze(-1)  # (B,)
            loss = (outputs.float() - torch.tensor(labels, device=device)).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss))
        guessed = predictions(model, tokenizer, [text for text, _ in held_out], args)
        true = [label for _, label in held_out]
        error = sum((g - t) ** 2 for g, t in zip(guessed, true, strict=True)) / len(true)
        print(f"epoch {epoch + 1}: train loss {sum(losses) / len(losses):.4f}, "
              f"test loss {error:.4f}, correlation {correlation(guessed, true):.3f}", flush=True)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


def predict(args):
    texts = [question(row) for row in load_rows(args.dataset)]
    problems = [text for text in texts if text]
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(args.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    lines = []
    for problem, value in zip(problems, predictions(model, tokenizer, problems, args), strict=True):
        share = min(1.0, max(0.0, value))
        limit = round(args.min_limit + (args.max_limit - args.min_limit) * share)
        row = {"problem": problem, "predicted_length": round(value * SCALE), "token_limit": limit}
        lines.append(json.dumps(row) + "\n")
    temporary = Path(f"{args.output}.tmp")
    temporary.write_text("".join(lines))
    temporary.rename(args.output)
    print(f"{args.output}: limits of {len(lines):,} problems")


def token_limit_table(path):
    """{problem text: limit} of a file that predict has written; raises DataError."""
    table = {row.get("problem"): row.get("token_limit") for row in read_jsonl(path)}
    for problem, limit in table.items():
        if not isinstance(problem, str) or not isinstance(limit, int) or limit < 1:
            raise DataError(f"--limits {path}: problem {problem!r:.80} with limit {limit!r}; every "
                            "entry needs the problem's text and a number of tokens, at least 1")
    return table


def score(args):
    folder, limits, questions = Path(args.samples), token_limit_table(args.limits), []
    samples = read_samples(folder)
    for asked in read_jsonl(folder / f"problems-{args.benchmark}.jsonl"):
        if asked["problem"] not in limits:
            raise DataError(f"--limits {args.limits} has none for the problem "
                            f"{asked['problem']!r:.80}")
        place = args.benchmark, asked["id"]
        rows = [row for key, row in samples.items() if key[:2] == place]
        questions.append((limits[asked["problem"]], rows, asked["answers"]))
    own = [limit for limit, *_ in questions]
    mean = round(sum(own) / len(own))
    lines = []
    for name, budgets in (("own limits", own), ("their mean", [mean] * len(own))):
        missing, metrics = 0, []
        for budget, (_, rows, golds) in zip(budgets, questions, strict=True):
            missing += sum(is_missing(row, budget) for row in rows)
            metrics.append(problem_metrics([grade_sample(row, golds) for row in rows], budget))
        if missing:
            raise DataError(f"{folder}: {missing} samples were cut off below {name}; draw them "
                            "with larger --budgets")
        total = summarise(metrics)
        lines.append([name, f"{mean:,}", percent(total, "pass@1"), f"{total['tokens']:,.0f}",
                      f"{total['cut_off']:.1%}"])
    print(markdown(["limits", "mean limit", "pass@1", "tokens", "cut off"], lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--max_length", type=int, default=256, help="tokens of a problem that are read")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("train", allow_abbrev=False).add_argument
    add("--model", default="answerdotai/ModernBERT-base", help="folder or hub id to start from")
    add("--dataset", default="RabotniKuma/Fast-Math-R1-Token-Scheduler",
        help="rows with problem and a length")
    add("--label_column", default="mean_completion_length", help="the length to predict")
    add("--output_dir", default="runs/token_scheduler")
    add("--num_train_epochs", type=int, default=3)
    add("--batch_size", type=int, default=32)
    add("--learning_rate", type=float, default=1e-5)
    add("--seed", type=int, default=2025, help="of test split, output layer and order")
    add = commands.add_parser("predict", allow_abbrev=False).add_argument
    add("--model", default="runs/token_scheduler", help="folder that train has written")
    add("--dataset", required=True, help="rows with problem or question")
    add("--output", required=True, help="JSONL file of problems and their limits")
    add("--min_limit", type=int, default=10500, help="limit of the shortest problem")
    add("--max_limit", type=int, default=13300, help="limit of the longest problem")
    add = commands.add_parser("score", allow_abbrev=False).add_argument
    add("--limits", required=True, help="file that predict has written")
    add("--samples", required=True, help="folder NAME/HASH of evaluate.py's samples")
    add("--benchmark", required=True, help="name of a benchmark in that folder")
    args = parser.parse_args()
    {"train": train, "predict": predict, "score": score}[args.command](args)


if __name__ == "__main__":
    main()
