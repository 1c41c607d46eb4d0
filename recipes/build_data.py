"""
The papers' data sets from their sources, and decontamination.

    python recipes/build_data.py fast_math_r1_sft --output FILE     stage 1's 7,900 rows
    python recipes/build_data.py fast_math_r1_grpo --output FILE    stage 2's problems
    python recipes/build_data.py open_rs1 --output FILE             also open_rs2
    python recipes/build_data.py check FILE --benchmarks hub        exits with 1 if rows overlap

    1. decontamination    no problem shares 13 words in a row, or its whole text, with a benchmark
    2. rows               problem, gold answer and the correct, complete traces of a source's row
    3. recipes            which rows of which source, and how many
    4. build              filter, draw, merge, deduplicate, keep the shortest correct trace

The sources may be larger than memory: of the rows that pass, problem, answer and shortest trace are
held until the draw, about 3 GB for OpenR1-Math's default set.
"""

import argparse
import hashlib
import itertools
import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import DataError, Dropped, iterate_rows, plain_number, problem_messages  # noqa: E402
from rewards import extract_answer, gold_answer  # noqa: E402

# --------------------------------------------------------------------------------------------------
# 1. Decontamination
# --------------------------------------------------------------------------------------------------
LATEX_LAYOUT = re.compile(
    r"\\(?:left|right|bigl|bigr|big|displaystyle|textstyle|quad|qquad|text|mathrm|mbox)(?![a-zA-Z])"
    r"|\\[,;:! ()\[\]]|[$~]")

# The stock ending of contest problems, "... m/n, where m and n are relatively prime positive
# integers. Find m+n.", is shared by problems that share nothing else: AIME 1983-2023 against the
# benchmarks has 209 runs of 13 words in common, 16 once a run needs three words that are not of
# this kind; none of the others is a copy.
STOCK_WORDS = frozenset(
    "can be written expressed in as the form frac sqrt m n p q a b c d r s k where and are "
    "relatively prime coprime positive integers integer is not divisible by square of any find "
    "what enter your answer an or that".split())
SPECIFIC_WORDS = 3


def plain_text(problem):
    """Lower case, one form per character (NFKC), and none of the LaTeX that only moves ink."""
    text = unicodedata.normalize("NFKC", problem).casefold()
    text = LATEX_LAYOUT.sub(" ", text)
    return text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")


def overlap_keys(problem, n):
    """
    What two copies of a problem share: every run of n words but stock phrases, and the whole text.

    A word is a run of letters or digits, so that $b>9$ and $b > 9$ agree. The whole text, without
    its blanks, keeps its signs: 3+4 is not 3-4, and short problems, which have no run of n words,
    are compared by it alone.
    """
    text = plain_text(problem)
    whole = "".join(text.split()).rstrip(".?!:")
    if whole:
        yield "=" + whole
    words = re.findall(r"[^\W_]+", text)
    for i in range(len(words) - n + 1):
        run = words[i:i + n]
        if sum(word not in STOCK_WORDS for word in run) >= min(n, SPECIFIC_WORDS):
            yield " ".join(run)


def benchmark_index(benchmark_problems, n=13):
    """{key: number of the first benchmark problem that has it}, for overlap()."""
    index = {}
    for number, problem in enumerate(benchmark_problems):
        for key in overlap_keys(problem, n):
            index.setdefault(key, number)
    return index


def overlap(problem, index, n=13):
    """
    (number of the benchmark problem, the words shared), or None.

    n words in a row (13, as in arXiv 2005.14165, appendix C), or the same text up to case, blanks
    and layout; index and n as in benchmark_index.
    """
    return next(((index[key], key) for key in overlap_keys(problem, n) if key in index), None)


def question(row, problem_column="problem"):
    """Text of a row's problem, or of the first user turn of its chat; None without one."""
    try:
        messages, _ = problem_messages(row, problem_column)
    except Dropped:
        return None
    text = next(message["content"] for message in messages if message["role"] == "user")
    return text.strip() or None if isinstance(text, str) else None


def load_rows(dataset):
    """All rows of a data set; raises DataError if one of them cannot be read, or there is none."""
    rows = list(iterate_rows(dataset))
    unreadable = Counter(str(row) for row in rows if isinstance(row, Dropped))
    if unreadable:
        raise DataError(f"{dataset}: {unreadable.total()} rows cannot be read: {dict(unreadable)}")
    if not rows:
        raise DataError(f"{dataset} has no rows")
    return rows


def benchmark_sources(benchmarks):
    """{name: data set} of names, or of a folder's files, those called train left out."""
    if Path(benchmarks).is_dir():
        endings = (".json", ".jsonl", ".parquet", ".csv")
        files = [file for file in sorted(Path(benchmarks).iterdir()) if file.suffix in endings]
        sources = {file.stem: str(file) for file in files if "train" not in file.stem}
        if not sources:
            raise DataError(f"--benchmarks {benchmarks}: no {', '.join(endings)} file is in it")
        return sources
    from evaluate import BENCHMARKS

    names = list(BENCHMARKS) if benchmarks == "hub" else benchmarks.split(",")
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise DataError(f"--benchmarks {benchmarks}: {unknown[0]!r} is no folder and none of "
                        f"{', '.join(BENCHMARKS)}; hub is all of these")
    return {name: BENCHMARKS[name] for name in names}


def load_benchmarks(benchmarks):
    """(names such as aime24:7, problems) of --benchmarks; raises DataError for one without text."""
    names, problems = [], []
    for name, dataset in benchmark_sources(benchmarks).items():
        for number, row in enumerate(load_rows(dataset)):
            text = question(row)
            if text is None:
                raise DataError(f"--benchmarks: row {number} of {dataset} has no problem text")
            names.append(f"{name}:{number}")
            problems.append(text)
    return names, problems


def check(args):
    """
    Compare a data set with the benchmarks; returns how many of its rows overlap.

    Prints every count. Rows that cannot be read are the trainers' business; those without a problem
    are counted. Raises DataError when no row has one.
    """
    names, problems = load_benchmarks(args.benchmarks)
    index, found, counts = benchmark_index(problems, args.ngram), [], Counter()
    for number, row in enumerate(iterate_rows(args.file)):
        text = None if isinstance(row, Dropped) else question(row, args.problem_column)
        hit = overlap(text, index, args.ngram) if text else None
        counts["rows"] += 1
        counts["without a problem"] += text is None
        if hit:
            found.append(f"  row {number} is {names[hit[0]]}: {text[:90]!r}")
    compared = counts["rows"] - counts["without a problem"]
    if not compared:
        raise DataError(f"{args.file}: none of {counts['rows']} rows has a text in column "
                        f"{args.problem_column!r}; choose with --problem_column")
    verdict = f"OVERLAP: {len(found):,} of" if found else "no overlap:"
    print(f"{verdict} {compared:,} problems of {args.file}, {counts['without a problem']:,} rows "
          f"without one, {len(problems):,} benchmark problems of {args.benchmarks} "
          f"({args.ngram} words in a row, or the same text)")
    print("\n".join(found[:10]), end="\n" if found else "")
    if found:
        print("Scores on these benchmarks would measure memory: build the data with --benchmarks.")
    return len(found)


# --------------------------------------------------------------------------------------------------
# 2. Rows
# --------------------------------------------------------------------------------------------------
@dataclass
class SourceRow:
    """What a row says, whatever its columns. traces: correct, complete; lengths: their tokens."""

    problem: str
    answer: str
    traces: list
    key: str  # two rows with the same key are the same problem
    accuracy: float = 1.0  # share of correct generations
    solution: str = ""
    lengths: list = ()


def gold_text(value):
    """A gold answer as the text that is graded (27.0 is 27), or None where nobody could hit it."""
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+\.0+\s*", value):
        value = value.strip().partition(".")[0]
    return None if value is None or isinstance(value, bool) else gold_answer(plain_number(value))


def problem_key(row, problem, dedup_key):
    """What two copies of a problem share: text with blanks normalised, exact text, or the uuid."""
    text = " ".join(problem.split())
    return {"text": text, "exact": problem, "uuid": str(row.get("uuid") or text)}[dedup_key]


def source_row(row, problem, answer, traces, args, **facts):
    """The SourceRow; raises Dropped for what no recipe can use."""
    if problem is None:
        raise Dropped("no problem text")
    gold = gold_text(answer)
    if gold is None:
        empty = answer is None or answer == ""
        raise Dropped("no gold answer" if empty else "gold answer that the grader cannot read")
    return SourceRow(problem, gold, traces, problem_key(row, problem, args.dedup_key), **facts)


def read_generations(row, args):
    """
    A row of OpenR1-Math-220k or openr1_hard: several R1 generations, each with its own marks.

    accuracy = correct generations / generations. The marks are nullable, as whole lists and one by
    one: an unknown mark counts as not correct, or not complete.
    """
    generations = row.get("generations")
    if not isinstance(generations, list) or not generations:
        raise Dropped("no generations")
    columns = ("correctness_math_verify", "correctness_llama", "is_reasoning_complete")
    by_rule, by_llama, complete = (row.get(name) or [None] * len(generations) for name in columns)
    if not len(by_rule) == len(by_llama) == len(complete) == len(generations):
        raise Dropped("lists of different lengths")
    take_llama = args.correctness == "either"
    correct = [bool(rule) or (take_llama and bool(llama))
               for rule, llama in zip(by_rule, by_llama, strict=True)]
    traces = [trace for trace, right, whole in zip(generations, correct, complete, strict=True)
              if right and (whole or args.completeness == "ignore")
              and isinstance(trace, str) and trace.strip()]
    accuracy = sum(correct) / len(correct)
    return source_row(row, question(row), row.get("answer"), traces, args, accuracy=accuracy)


def read_light_r1(row, args):
    """
    A row of Light-R1-SFTData: a prompt and one R1 answer in `conversations`, no gold.

    The answer is the trace's last box: what it says after </think>, or where it has none there,
    what it said before.
    """
    turns = row.get("conversations")
    turns = turns if isinstance(turns, list) else []
    texts = [turn.get("value") for turn in turns if isinstance(turn, dict)][:2]
    if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise Dropped("conversations is not a question and an answer")
    problem, trace = texts[0].strip(), texts[1]
    answer = extract_answer(trace)
    if answer is None:
        raise Dropped("no boxed answer in the trace")
    return source_row(row, problem or None, answer, [trace], args)


def read_problem(row, args):
    """A row of Open-RS's sets or DeepScaleR; a missing answer is read from the solution's box."""
    solution = row.get("solution") if isinstance(row.get("solution"), str) else ""
    answer = row.get("answer")
    if answer is None or answer == "":
        answer = extract_answer(solution)
    return source_row(row, question(row), answer, [], args, solution=solution)


# --------------------------------------------------------------------------------------------------
# 3. Recipes
# --------------------------------------------------------------------------------------------------
@dataclass
class SourcePart:
    """One line of a recipe: which rows of which source, and how many."""

    name: str  # becomes the column source
    dataset: str
    read: Callable  # (row, args) -> SourceRow; raises Dropped
    needs_trace: bool = True
    accuracy: tuple = (0.0, 1.0)
    ends: str = "[]"  # of the accuracy range, as in mathematics: (] leaves out the lower end
    min_tokens: int = 0  # the trace must be longer
    trace_length: str = "shortest"  # which of the correct traces must be: shortest, any, mean
    sample: int = 0  # rows to draw, 0 for all
    without: str = ""  # an earlier part: what it has drawn is not drawn again


def recipe_parts(args):
    """The parts of a recipe, in the order in which the first copy of a problem wins."""
    if args.recipe == "fast_math_r1_sft":
        return [
            SourcePart(
                "openr1_long", args.openr1_math, read_generations, ends="(]",
                accuracy=(args.a_min_accuracy, 1.0), min_tokens=args.a_min_tokens,
                trace_length=args.trace_length, sample=args.a_rows),
            SourcePart(
                "openr1_moderate", args.openr1_math, read_generations, sample=args.b_rows,
                accuracy=(args.b_min_accuracy, args.b_max_accuracy),
                ends={"closed": "[]", "open": "()"}[args.b_ends],
                without="openr1_long" if args.a_b_overlap == "remainder" else ""),
            SourcePart("openr1_hard", args.openr1_hard, read_generations),
            SourcePart("light_r1_stage2", args.light_r1, read_light_r1)]
    if args.recipe == "fast_math_r1_grpo":
        return [SourcePart("light_r1_stage2", args.light_r1, read_light_r1, needs_trace=False)]
    if args.recipe == "open_rs1":
        return [SourcePart("open_s1", args.open_s1, read_problem, needs_trace=False)]
    return [SourcePart("open_rs", args.open_rs, read_problem, needs_trace=False)]


def reject(part, example):
    """Why a SourceRow is outside a part, or None. A length is judged once it has been counted."""
    low, high = part.accuracy
    above = example.accuracy > low or (part.ends[0] == "[" and example.accuracy == low)
    below = example.accuracy < high or (part.ends[1] == "]" and example.accuracy == high)
    if not (above and below):
        return f"accuracy outside {part.ends[0]}{low}, {high}{part.ends[1]}"
    if part.needs_trace and not example.traces:
        return "no correct, complete trace"
    if part.min_tokens and example.lengths:
        lengths = example.lengths
        mean = sum(lengths) / len(lengths)
        choices = {"shortest": min(lengths), "any": max(lengths), "mean": mean}
        if choices[part.trace_length] <= part.min_tokens:
            return f"trace of at most {part.min_tokens} tokens"
    return None


# --------------------------------------------------------------------------------------------------
# 4. Build
# --------------------------------------------------------------------------------------------------
def hub_file(dataset):
    """Local path of one file of a hub set, owner/name/file; any other source as it is."""
    if Path(dataset).exists() or dataset.startswith((".", "/")) or dataset.count("/") < 2:
        return dataset
    from huggingface_hub import hf_hub_download

    owner, name, file = dataset.split("/", 2)
    try:
        return hf_hub_download(f"{owner}/{name}", file, repo_type="dataset")
    except (OSError, ValueError) as error:
        raise DataError(f"{dataset} is no local file and cannot be downloaded: "
                        f"{str(error)[:200]}") from error


def token_counter(name):
    """texts -> tokens of each, without special tokens, by the tokenizer of a folder or hub id."""
    from model import load_tokenizer

    try:
        tokenizer = load_tokenizer(name)
    except (OSError, ValueError) as error:
        raise DataError(f"--tokenizer {name} cannot be loaded: {str(error)[:200]}") from error

    def count(texts):
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [len(one) for one in ids]

    return count


def read_examples(dataset, read, args, wanted, count_tokens):
    """
    Yield (row number, SourceRow), or (row number, Dropped), for every row of a source.

    Rows that are wanted have their traces counted and sorted, shortest first; 64 rows at a time,
    because the tokenizer uses all cores on a list of texts.
    """
    from tqdm import tqdm

    def read_or_drop(row):
        try:
            return row if isinstance(row, Dropped) else read(row, args)
        except Dropped as dropped:
            return dropped

    rows = tqdm(iterate_rows(hub_file(dataset)), desc=dataset, unit=" rows", file=sys.stderr)
    numbered = enumerate(map(read_or_drop, rows))
    while batch := list(itertools.islice(numbered, 64)):
        if count_tokens:
            sort_traces([row for _, row in batch if isinstance(row, SourceRow) and wanted(row)],
                        count_tokens)
        yield from batch


def sort_traces(examples, count_tokens):
    """Count the tokens of all traces; in each row the shortest comes first."""
    lengths = iter(count_tokens([trace for example in examples for trace in example.traces]))
    for example in examples:
        pairs = [(next(lengths), trace) for trace in example.traces]
        pairs.sort(key=lambda pair: pair[0])
        example.lengths = [length for length, _ in pairs]
        example.traces = [trace for _, trace in pairs]


def digest(text):
    """16 bytes for a text."""
    return hashlib.sha256(text.encode()).digest()[:16]


def judge_sources(parts, args, count_tokens, names, index):
    """
    ({part: {row number: SourceRow}}, report, contaminated rows) of what passes.

    report[part] = {"rows", "dropped": {reason: count}}; each row is counted once in every part that
    reads its source.
    """
    candidates = {part.name: {} for part in parts}
    report = {part.name: {"rows": 0, "dropped": Counter()} for part in parts}
    contaminated = []
    for dataset in dict.fromkeys(part.dataset for part in parts):
        readers = [part for part in parts if part.dataset == dataset]

        def wanted(example, readers=readers):
            return any(reject(part, example) is None for part in readers)

        for number, example in read_examples(dataset, readers[0].read, args, wanted, count_tokens):
            for part in readers:
                readable = isinstance(example, SourceRow)
                reason = reject(part, example) if readable else str(example)
                hit = overlap(example.problem, index, args.ngram) if reason is None else None
                if hit:
                    reason = "overlaps with a benchmark"
                    contaminated.append({
                        "source": part.name, "row": number, "benchmark": names[hit[0]],
                        "shared": hit[1][:200], "problem": example.problem[:200]})
                report[part.name]["rows"] += 1
                if reason is None:
                    candidates[part.name][number] = example
                else:
                    report[part.name]["dropped"][reason] += 1
            if isinstance(example, SourceRow):
                del example.traces[1:]  # only the shortest is kept: see above on memory
    return candidates, report, contaminated


def draw(keys, sample, seed, name):
    """
    Row numbers of a random sample of {row number: key}: the lowest hashes of (seed, part, key).

    Unlike drawing by position, the choice does not change when the source is sorted differently or
    gains other rows.
    """
    def order(number):
        return digest(f"{seed}/{name}/" + digest(keys[number]).hex()), number

    return set(sorted(keys, key=order)[:sample or None])


def choose_rows(parts, candidates, report, seed):
    """[(part, SourceRow)]: draw from each part in turn; a problem's first copy wins. File order."""
    chosen, drawn, seen = {part.dataset: {} for part in parts}, {}, set()
    for part in parts:
        rows, dropped = candidates[part.name], report[part.name]["dropped"]
        taken = drawn.get(part.without, ())
        left = {number: row.key for number, row in rows.items() if number not in taken}
        drawn[part.name] = draw(left, part.sample, seed, part.name)
        kept = 0
        for number in sorted(drawn[part.name]):
            if left[number] not in seen:
                seen.add(left[number])
                chosen[part.dataset][number] = part, rows[number]
                kept += 1
        dropped[f"drawn for {part.without}"] = len(rows) - len(left)
        dropped["not drawn"] = len(left) - len(drawn[part.name])
        dropped["duplicate of an earlier problem"] = len(drawn[part.name]) - kept
        report[part.name]["kept"] = kept
        counts = {reason: count for reason, count in sorted(dropped.items()) if count}
        report[part.name]["dropped"] = counts
    return [rows[number] for rows in chosen.values() for number in sorted(rows)]


def output_row(part, row):
    """The columns that the trainers read: a trace for SFT, the solution of Open-RS's sets."""
    columns = {"problem": row.problem}
    if part.needs_trace:
        columns["generation"] = row.traces[0]
    columns |= {"answer": row.answer, "source": part.name}
    if part.read is read_problem:
        columns["solution"] = row.solution
    return columns


def write_rows(output, rows):
    """Write rows as .jsonl or .parquet, under a temporary name first."""
    temporary = output.with_name(f".{output.name}.tmp")
    if output.suffix == ".jsonl":
        with open(temporary, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)
    temporary.rename(output)


def build(args):
    """
    Build a recipe's data set: --output, and --output + ".report.json" with what became of each row.

    The same sources and flags give the same bytes. Raises DataError when a source cannot be read or
    nothing is left.
    """
    output = Path(args.output)
    if output.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"--output {output}: the name must end in .jsonl or .parquet")
    for flag, least in (("a_rows", 0), ("b_rows", 0), ("ngram", 1)):
        if getattr(args, flag) < least:
            raise DataError(f"--{flag} {getattr(args, flag)} must be at least {least}")
    parts = recipe_parts(args)
    if args.dry_run:
        print("\n".join(f"{part.name:18} from {part.dataset}" for part in parts))
        print(f"would write {output}")
        return
    names, benchmark_problems = load_benchmarks(args.benchmarks) if args.benchmarks else ([], [])
    index = benchmark_index(benchmark_problems, args.ngram)
    needs_traces = any(part.needs_trace for part in parts)
    count_tokens = token_counter(args.tokenizer) if needs_traces else None
    candidates, report, contaminated = judge_sources(parts, args, count_tokens, names, index)
    chosen = choose_rows(parts, candidates, report, args.seed)
    if not chosen:
        raise DataError(f"{args.recipe}: no row is left; {json.dumps(report)}")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_rows(output, [output_row(part, row) for part, row in chosen])
    tokens = sum(row.lengths[0] for _, row in chosen) if needs_traces else 0
    options = {name: value for name, value in sorted(vars(args).items())
               if name not in ("output", "dry_run")}
    report = {"rows": len(chosen), "tokens": tokens, "options": options, "sources": report,
              "benchmark_problems": len(names), "contaminated": contaminated}
    Path(f"{output}.report.json").write_text(json.dumps(report, indent=1) + "\n")
    print_report(output, report)


def print_report(output, report):
    for name, part in report["sources"].items():
        print(f"{name}: {part['rows']:,} rows read, {part['kept']:,} kept")
        for reason, dropped in part["dropped"].items():
            print(f"    {dropped:>9,}  {reason}")
    found, compared = report["contaminated"], report["benchmark_problems"]
    if compared:
        print(f"decontamination: {len(found):,} rows removed, "
              f"{compared:,} benchmark problems compared")
    else:
        print("decontamination: SKIPPED, --benchmarks is empty")
    for row in found[:10]:
        problem = row["problem"][:80]
        print(f"    {row['source']} row {row['row']} is {row['benchmark']}: {problem!r}")
    tokens = report["tokens"]
    mean = f", {tokens:,} trace tokens, {tokens / report['rows']:,.0f} per row" if tokens else ""
    print(f"{output}: {report['rows']:,} rows{mean}; {output}.report.json lists what was removed")


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------
def add_build_flags(parser):
    add = parser.add_argument
    add("--output", required=True, help="file to write, .jsonl or .parquet")
    add("--seed", type=int, default=2025, help="of every random draw")
    add("--dry_run", action="store_true", help="print what would be read and written")
    add("--benchmarks", default="", help="no row may overlap: names, hub for all, or a folder")
    add("--ngram", type=int, default=13, help="words in a row that make an overlap")

    sources = parser.add_argument_group("sources").add_argument
    sources("--openr1_math", default="open-r1/OpenR1-Math-220k:default:train",
            help="parts a, b; :all:train has 225k rows")
    sources("--openr1_hard", default="hoanganhpham/openr1_hard",
            help="part c: problems that a 32B model never solved")
    sources("--light_r1", default="qihoo360/Light-R1-SFTData/stage2-3k.json",
            help="part d, and the whole GRPO set")
    sources("--open_s1", default="knoveleng/open-s1", help="set of Open-RS1")
    sources("--open_rs", default="knoveleng/open-rs", help="set of Open-RS2 and RS3, as published")

    choice = parser.add_argument_group("what the papers leave open").add_argument
    choice("--correctness", default="either", choices=("either", "math_verify"),
           help="correct by math-verify or by the Llama judge, or by math-verify alone")
    choice("--completeness", default="require", choices=("require", "ignore"),
           help="keep only complete traces")
    choice("--a_min_accuracy", type=float, default=0.5, help="part a: accuracy above this")
    choice("--a_min_tokens", type=int, default=12800, help="part a: trace longer than this")
    choice("--a_rows", type=int, default=3000, help="part a: rows drawn, 0 for all")
    choice("--trace_length", default="shortest", choices=("shortest", "any", "mean"),
           help="part a: which correct trace must be that long; the shortest is the one kept")
    choice("--b_min_accuracy", type=float, default=0.5, help="part b: lower end of the range")
    choice("--b_max_accuracy", type=float, default=0.75, help="part b: upper end of the range")
    choice("--b_ends", default="closed", choices=("closed", "open"),
           help="part b: are the ends in the range")
    choice("--b_rows", type=int, default=3000, help="part b: rows drawn, 0 for all")
    choice("--a_b_overlap", default="remainder", choices=("remainder", "independent"),
           help="draw b from what a has left over, or from all rows and deduplicate")
    choice("--tokenizer", default="deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
           help="counts a trace's tokens")
    choice("--dedup_key", default="text", choices=("text", "exact", "uuid"),
           help="two rows are one problem by text up to blanks, exact text, or the uuid")


def make_parser():
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        prog="build_data.py", allow_abbrev=False, formatter_class=formatter,
        description="Build a recipe's data set from hub ids or local files with the same columns, "
        "or check a data set against benchmarks.")
    commands = parser.add_subparsers(dest="recipe", required=True, metavar="RECIPE or check")
    for recipe in ("fast_math_r1_sft", "fast_math_r1_grpo", "open_rs1", "open_rs2"):
        one = commands.add_parser(recipe, allow_abbrev=False, formatter_class=formatter)
        add_build_flags(one)
    one = commands.add_parser("check", allow_abbrev=False, formatter_class=formatter)
    one.add_argument("file", help="data set to check: file, folder or hub id")
    one.add_argument("--benchmarks", required=True, help="names, hub for all, or a folder")
    one.add_argument("--problem_column", default="problem")
    one.add_argument("--ngram", type=int, default=13, help="words in a row that make an overlap")
    return parser


def main():
    args = make_parser().parse_args()
    try:
        if args.recipe != "check":
            build(args)
        elif check(args):
            sys.exit(1)
    except (ValueError, OSError) as error:
        sys.exit(f"build_data.py: {error}")


if __name__ == "__main__":
    main()
