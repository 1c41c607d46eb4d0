"""evaluate.py: metrics against enumeration, intervals against simulation, and the program with real vLLM engines."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
from conftest import ROOT, run, tiny_model, torchrun

import evaluate
from evaluate import (
    GradedSample,
    bootstrap_interval,
    evaluate_completions,
    majority_answer,
    paired_difference,
    pass_at_k,
)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    for n in range(1, 9):
        for c in range(n + 1):
            samples = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(samples, k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased_and_exact_for_many_samples():
    n, p = 8, 0.2
    for k in (1, 2, 5, 8):
        expected = sum(np.prod([p if hit else 1 - p for hit in hits]) * pass_at_k(n, sum(hits), k)
                       for hits in itertools.product((0, 1), repeat=n))
        assert expected == pytest.approx(1 - (1 - p) ** k)
    assert pass_at_k(4096, 1, 64) == pytest.approx(64 / 4096)
    assert pass_at_k(4096, 4095, 2) == 1


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_what_cannot_be(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


def test_majority_answer_against_enumeration():
    spellings = {"1/2": Fraction(1, 2), "0.5": Fraction(1, 2), "2": Fraction(2), "2.0": Fraction(2), "7": Fraction(7)}
    for length in range(6):
        for answers in itertools.product([None, *spellings], repeat=length):
            votes = [spellings[a] for a in answers if a is not None]
            most = max(map(votes.count, votes), default=0)
            winner = next((v for v in votes if votes.count(v) == most), None)
            expected = next((a for a in answers if a is not None and spellings[a] == winner), None)
            assert majority_answer(list(answers)) == expected


def test_majority_answer_by_mathematics_not_by_text():
    assert majority_answer([r"\frac{1}{2}", "3", "3", "0.5", r"\dfrac12"]) == r"\frac{1}{2}"
    assert majority_answer([None, None, "4"]) == "4"
    assert majority_answer([None]) is None and majority_answer([]) is None


def graded(answers, gold="1", lengths=None, finished=True):
    lengths = lengths or [10] * len(answers)
    return [GradedSample(a, "no_answer" if a is None else "right" if a == gold else "wrong", n, finished)
            for a, n in zip(answers, lengths, strict=True)]


def test_vote_among_k_is_unbiased():
    """Mean over all orders of the samples of maj@2 and maj@4 = mean over all ordered draws of 2 and of 4."""
    answers = ["1", "2", None, "1", "3"]
    orders = [evaluate.problem_metrics(graded(order), 99) for order in itertools.permutations(answers)]
    for k in (1, 2, 4, 5):
        draws = [majority_answer(draw) == "1" for draw in itertools.permutations(answers, k)]
        assert np.mean([m[f"maj@{k}"][0] for m in orders]) == pytest.approx(np.mean(draws))
    assert {m["pass@1"] for m in orders} == {(2 / 5, 1)}
    assert [name for name in orders[0] if "@" in name] == [f"{m}@{k}" for k in (1, 2, 4, 5) for m in ("pass", "maj")]
    assert evaluate.problem_metrics(graded(["1", "1", "2", "2"]), 99)["maj@2"] == (1 / 2, 1)     # all samples take part


def test_samples_cut_off_do_not_vote():
    samples = graded(["1", "2", "2"], lengths=[10, 50, 50])
    assert [evaluate.problem_metrics(samples, budget)["maj@3"][0] for budget in (20, 60)] == [1, 0]


def box(answer):
    return "so" if answer is None else f"so \\boxed{{{answer}}}"


def test_published_definitions_on_a_worked_example():
    """Two problems of four samples, as (answer, tokens, finish reason); every number below is counted by hand."""
    first = [("5", 100, "stop"), ("5.0", 300, "stop"), ("4", 200, "stop"), ("5", 400, "length")]
    second = [("8", 150, "stop"), (None, 50, "stop"), ("9", 250, "stop"), ("9", 350, "stop")]
    columns = [[[sample[i] for sample in row] for row in (first, second)] for i in range(3)]
    texts = [[box(answer) for answer in row] for row in columns[0]]
    result = evaluate_completions(["5", ["x", "9"]], texts, columns[1], columns[2], [200, 400])

    at_200 = result[200]     # first: 5 (100), 4 (200); second: 8 (150), none (50)
    assert at_200["pass@1"] == pytest.approx((1 / 4 + 0) / 2)
    assert at_200["pass@2"] == pytest.approx((1 / 2 + 0) / 2)
    assert at_200["pass@4"] == pytest.approx((1 + 0) / 2)
    assert at_200["maj@4"] == pytest.approx((1 + 0) / 2)                # 5 and 4 have a vote each: first seen
    assert at_200["answers"] == pytest.approx((2 + 1) / 2)
    assert at_200["tokens"] == pytest.approx((100 + 200 + 200 + 200 + 150 + 50 + 200 + 200) / 8)
    assert at_200["tokens_answered"] == pytest.approx((100 + 200 + 150) / 3)
    assert at_200["cut_off"] == pytest.approx(4 / 8)
    assert at_200["no_answer"] == pytest.approx(1 / 8)
    assert at_200["timeouts"] == 0

    at_400 = result[400]     # first: 5 (100), 5.0 (300), 4 (200); its fourth hit the limit, box or not
    assert at_400["pass@1"] == pytest.approx((2 / 4 + 2 / 4) / 2)
    assert at_400["maj@4"] == pytest.approx((1 + 1) / 2)
    assert at_400["answers"] == pytest.approx((3 + 3) / 2)
    assert at_400["tokens"] == pytest.approx((100 + 300 + 200 + 400 + 150 + 50 + 250 + 350) / 8)
    assert at_400["tokens_answered"] == pytest.approx((100 + 300 + 200 + 150 + 250 + 350) / 6)
    assert at_400["cut_off"] == pytest.approx(1 / 8)

    nothing = evaluate_completions(["5"], [[box(None)]], [[9]], [["stop"]], [9])[9]
    assert nothing["tokens_answered"] is None and "tokens_answered" not in nothing["interval"]
    assert nothing["pass@1"] == 0 and nothing["no_answer"] == 1


def test_grader_failures_are_counted_and_wrong():
    samples = [GradedSample("1", "right", 5, True), GradedSample("1", "timeout", 5, True), GradedSample("1", "crash", 50, True)]
    assert evaluate.problem_metrics(samples, 9)["timeouts"] == (1, 1)
    assert evaluate.problem_metrics(samples, 50)["timeouts"] == (2, 1)
    assert evaluate.problem_metrics(samples, 50)["pass@1"] == (1 / 3, 1)


def random_completions(rng, problems=6, samples=8):
    lengths = rng.integers(1, 100, (problems, samples))
    answers = rng.choice(["1", "2", "3"], (problems, samples))
    return lengths, answers


def test_budgets_from_truncation_equal_separate_scoring():
    rng, golds = np.random.default_rng(0), ["1"] * 6
    lengths, answers = random_completions(rng)
    texts = [[f"{'a' * n} {box(a)}" for n, a in zip(*row, strict=True)] for row in zip(lengths, answers, strict=True)]
    full = evaluate_completions(golds, texts, lengths.tolist(), [["stop"] * 8] * 6, [20, 60, 100])
    for limit in (20, 60, 100):
        # What a run with this limit would have stored. Cut texts keep a box: a box before the end must not count.
        reasons = np.where(lengths <= limit, "stop", "length").tolist()
        again = evaluate_completions(golds, texts, np.minimum(lengths, limit).tolist(), reasons, [20, 60, 100])
        for budget in (20, 60, 100):
            if budget <= limit:
                assert again[budget] == full[budget]
    assert full[20]["pass@1"] < full[60]["pass@1"] < full[100]["pass@1"]


# ---------------------------------------------------------------------------------------------------------------------
# Intervals
# ---------------------------------------------------------------------------------------------------------------------
def simulated_accuracy(rng, problems, samples, skill=0.0):
    """(P, 1) shares of right samples; problems differ in difficulty, so samples of one problem hang together."""
    chance = np.clip(rng.beta(0.6, 0.6, problems) + skill, 0, 1)
    return (rng.binomial(samples, chance) / samples)[:, None]


@pytest.mark.parametrize("problems", [10, 30, 200])
def test_interval_covers_the_truth_95_times_in_100(problems):
    rng, trials, hits = np.random.default_rng(problems), 500, 0
    for trial in range(trials):
        accuracy = simulated_accuracy(rng, problems, 16)
        low, high = bootstrap_interval(accuracy, np.ones_like(accuracy), resamples=600, seed=trial)
        hits += low[0] <= 0.5 <= high[0]
    assert 0.93 <= hits / trials <= 0.972     # standard error of this estimate: 0.01


def test_interval_does_not_shrink_with_samples_of_the_same_problems():
    rng = np.random.default_rng(1)
    accuracy = simulated_accuracy(rng, 30, 10_000)
    low, high = bootstrap_interval(accuracy, np.ones_like(accuracy))
    assert high - low > 0.2


def test_interval_of_a_ratio_weighs_problems_by_their_answers():
    rng, hits = np.random.default_rng(2), 0
    for trial in range(300):
        answers = rng.integers(0, 9, 60)
        lengths = answers * (100 + 10 * answers) + rng.normal(0, 50, 60)     # long where there are many answers
        low, high = bootstrap_interval(lengths[:, None], answers[:, None].astype(float), resamples=600, seed=trial)
        k = np.arange(9)
        hits += low[0] <= (k * (100 + 10 * k)).sum() / k.sum() <= high[0]
    assert hits / 300 >= 0.91


def test_paired_difference_covers_and_is_tighter_than_two_intervals():
    rng, hits, paired, unpaired = np.random.default_rng(3), 0, [], []
    for _ in range(200):
        chance = rng.uniform(0.0, 0.8, 40)
        rows = [rng.binomial(16, chance + gain) / 16 for gain in (0.0, 0.1)]
        first, second = ([{"pass@1": (a, 1), "tokens": (100 * a, 1), "answers": (3, 1)} for a in row] for row in rows)
        result = paired_difference(first, second)
        assert set(result) == {"pass@1", "tokens"}
        part = result["pass@1"]
        assert part["difference"] == pytest.approx(rows[1].mean() - rows[0].mean())
        assert result["tokens"]["low"] == pytest.approx(100 * part["low"])
        hits += part["low"] <= 0.1 <= part["high"]
        paired.append(part["high"] - part["low"])
        low, high = bootstrap_interval(rows[0][:, None], np.ones((40, 1)), resamples=600)
        unpaired.append(high[0] - low[0])
    assert 0.91 <= hits / 200 <= 0.99
    assert np.mean(paired) < 0.5 * 2**0.5 * np.mean(unpaired)     # sqrt(2): a difference of two independent means


# ---------------------------------------------------------------------------------------------------------------------
# Problems and flags
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("row, golds", [
    ({"answer": 70}, ["70"]), ({"answer": 142.0}, ["142"]), ({"answer": "025"}, ["025"]),
    ({"answer": ["9.6\n"]}, ["9.6"]), ({"answer": ["0.01\n", "0.02\n"]}, ["0.01", "0.02"]),
    ({"answer": ["7", "7"]}, ["7"]), ({"answer": "She pays 2*9.\n#### 18"}, ["18"]),
    ({"answer": r"\text{Evelyn}"}, [r"\text{Evelyn}"]),
    ({"solution": r"as \boxed{1}, so \boxed{\frac14}."}, [r"\frac14"]),
    ({"answer": None}, []), ({"answer": []}, []), ({"answer": float("nan")}, []), ({"other": 1}, []),
])
def test_gold_shapes_of_the_benchmarks(row, golds):
    assert evaluate.accepted_answers(row) == golds


def config(**flags):
    return evaluate.EvalConfig(**{**{f.name: f.default for f in evaluate.EvalConfig.__dataclass_fields__.values()
                                     if f.name != "stop"}, **flags})


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_problems_from_files(tmp_path, capsys):
    rows = [{"question": "1+1", "answer": "so\n#### 2"}, {"question": "2+2", "answer": ""},
            {"question": "1+1", "answer": 2}, {"question": "3+3", "answer": 6}]
    write_rows(tmp_path / "gsm8k_test.jsonl", rows)
    own = write_rows(tmp_path / "own.jsonl", [{"problem": "1+1", "answer": 2}])
    limits = tmp_path / "limits.json"
    limits.write_text('{"3+3": 50, "1+1": 9999}')
    problems = evaluate.load_problems(config(benchmark=f"gsm8k,{own}", benchmark_dir=str(tmp_path), budgets="100,200",
                                             token_limits=str(limits)))
    assert [(p.benchmark, p.problem, p.golds, p.max_tokens) for p in problems] == [
        ("gsm8k", "1+1", ["2"], 200), ("gsm8k", "1+1", ["2"], 200), ("gsm8k", "3+3", ["6"], 50),
        ("own", "1+1", ["2"], 200)]
    assert len({(p.benchmark, p.id) for p in problems}) == 4 and problems[0].id == problems[3].id
    assert "1 of 4 rows dropped" in capsys.readouterr().out

    reordered = evaluate.load_problems(config(
        benchmark=write_rows(tmp_path / "reversed.jsonl", rows[::-1]), budgets="200", limit=1))
    assert [p.id for p in reordered] == [problems[2].id]     # neither order nor --limit changes a problem's name


@pytest.mark.parametrize("flags, message", [
    (dict(benchmark="math500"), "has none of math500.json"),
    (dict(benchmark="{own},{own}"), "called 'own'"),
    (dict(benchmark="{empty}"), "none of the 1 rows"),
    (dict(benchmark="{own}", token_limits="{limits}"), "exact text of none"),
    (dict(benchmark="{own}", token_limits="{bad}"), "limit 0"),
    (dict(benchmark="{own}", budgets="8k"), "--budgets '8k'"),
])
def test_problems_that_cannot_be_used(tmp_path, flags, message):
    files = {"own": [{"problem": "1+1", "answer": 2}], "empty": [{"problem": "1+1", "answer": None}],
             "limits": [{"problem": "4", "token_limit": 9}], "bad": [{"problem": "1+1", "token_limit": 0}]}
    paths = {name: write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items()}
    with pytest.raises(ValueError, match=message):
        evaluate.load_problems(config(benchmark_dir=str(tmp_path), **{k: v.format(**paths) for k, v in flags.items()}))


@pytest.mark.parametrize("flags, message", [
    (dict(prompt_style="open"), "--prompt_style 'open': choose one of training, lighteval, readme, none"),
    (dict(num_samples=0), "--num_samples 0"), (dict(top_p=1.5), "--top_p 1.5"), (dict(min_p=-1.0), "--min_p -1.0"),
    (dict(temperature=0.0), "--num_samples 1"), (dict(compare=True), "--compare needs two models"),
    (dict(model="a/final,b=a,x/a"), "the name 'a' is taken"),
])
def test_flags_that_cannot_be(flags, message):
    with pytest.raises(ValueError, match=message):
        evaluate.check_config(config(**flags))
        evaluate.model_list(config(**flags))


def test_unknown_flags_stop_the_program_in_one_line():
    done = run(sys.executable, ROOT / "evaluate.py", "--num_sample", 3)
    assert done.returncode != 0 and "--num_sample" in done.stderr and "Traceback" not in done.stderr


def test_model_names():
    assert evaluate.model_list(config(model="runs/sft/final, q=Qwen/Qwen3-14B,Qwen/Qwen2-7B,runs/lr=1/final")) == {
        "sft": "runs/sft/final", "q": "Qwen/Qwen3-14B", "Qwen2-7B": "Qwen/Qwen2-7B", "lr=1": "runs/lr=1/final"}


def test_prompts_are_the_published_ones():
    """Braces as the models saw them: doubled in training and in the README, single in lighteval."""
    parts = {style: evaluate.prompt_parts(config(prompt_style=style)) for style in evaluate.PROMPT_STYLES}
    assert parts["training"][0].endswith(r"Return final answer within \boxed{{}}.")
    assert parts["training"][1] == "{problem}" and parts["lighteval"][0] == ""
    assert r"$\boxed{ANSWER}$" in parts["lighteval"][1] and "clearly.  The last line" in parts["lighteval"][1]
    assert parts["lighteval"][1].endswith("answering.\n\n{problem}")
    assert parts["readme"] == ("", r"Solve the problem, and put the answer in \boxed{{}}. {problem}")
    assert parts["none"] == ("", "{problem}")
    assert evaluate.prompt_parts(config(prompt_style="none", system_prompt="Be brief."))[0] == "Be brief."
    assert evaluate.prompt_parts(config(system_prompt="none"))[0] == ""
    assert r"\boxed{{}}" in evaluate.prompt_parts(config(system_prompt="sft"))[0]


def test_fingerprint_notices_one_changed_weight(tmp_path):
    tiny_model(tmp_path)
    before = evaluate.model_fingerprint(tmp_path)
    assert evaluate.model_fingerprint(tmp_path) == before
    (tmp_path / "notes.md").write_text("no part of the model")
    assert evaluate.model_fingerprint(tmp_path) == before
    weights, = tmp_path.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    assert evaluate.model_fingerprint(tmp_path) != before


# ---------------------------------------------------------------------------------------------------------------------
# Stored samples: table, comparison, plot, rescoring
# ---------------------------------------------------------------------------------------------------------------------
def store(folder, samples, benchmark="toy", max_tokens=100):
    """What a finished evaluation leaves; samples: {problem: [(answer, tokens, finish reason)]}, every gold is 1."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"settings": {"max_tokens": max_tokens}}))
    write_rows(folder / f"problems-{benchmark}.jsonl", [
        {"benchmark": benchmark, "id": p, "problem": p, "golds": ["1"], "max_tokens": max_tokens} for p in samples])
    write_rows(folder / "samples-000.jsonl", [
        {"benchmark": benchmark, "id": p, "sample": i, "length": length, "finish_reason": reason, "text": box(answer)}
        for p, group in samples.items() for i, (answer, length, reason) in enumerate(group)])


def rescore(output_dir, *flags):
    return run(sys.executable, ROOT / "evaluate.py", "--rescore", "--benchmark", "toy", "--output_dir", output_dir,
               *flags)


def test_table_comparison_and_plot_without_generation(tmp_path):
    rng = np.random.default_rng(0)
    long, short = ({f"p{p}": [("1" if rng.random() < (p + 1) / 15 else "2", int(rng.integers(low, high)), "stop")
                              for _ in range(4)] for p in range(12)} for low, high in ((50, 100), (10, 40)))
    store(tmp_path / "eval" / "long", long)
    store(tmp_path / "eval" / "short", short)
    plot = tmp_path / "figures" / "curve.png"
    done = rescore(tmp_path / "eval", "--model", "long,short", "--num_samples", 4, "--budgets", "100,60,30",
                   "--compare", "--plot", plot)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "eval" / "table.md").read_text()
    assert table.strip() in done.stdout
    blocks = [block.splitlines() for block in table.split("\n\n") if block.startswith("|")]
    assert [len(block) - 2 for block in blocks] == [2, 2 * 3, 3]
    for block in blocks:
        assert len({line.count("|") for line in block}) == 1
    assert blocks[0][0] == "| model | 30 | tokens | 60 | tokens | 100 | tokens |"

    metrics = {m: json.loads((tmp_path / "eval" / m / "metrics-toy.json").read_text()) for m in ("long", "short")}
    accuracy = {m: np.array([[a == "1" for a, *_ in group] for group in samples.values()]).mean()
                for m, samples in (("long", long), ("short", short))}
    for model in metrics:
        assert metrics[model]["problems"] == 12 and metrics[model]["num_samples"] == 4
        at_100 = metrics[model]["budgets"]["100"]
        assert at_100["pass@1"] == pytest.approx(accuracy[model])
        low, high = at_100["interval"]["pass@1"]
        assert low < accuracy[model] < high
        assert f"{100 * accuracy[model]:.1f} ± {50 * (high - low):.1f}" in table
    assert metrics["long"]["budgets"]["30"]["cut_off"] == 1
    comparison = json.loads((tmp_path / "eval" / "comparison.json").read_text())
    at_100, = [c for c in comparison if c["budget"] == 100]
    assert (at_100["first"], at_100["second"]) == ("long", "short")
    assert at_100["pass@1"]["difference"] == pytest.approx(accuracy["short"] - accuracy["long"])
    assert at_100["tokens"]["high"] < 0
    assert plot.read_bytes().startswith(b"\x89PNG") and len(list(plot.parent.iterdir())) == 1

    grades = [json.loads(line) for line in (tmp_path / "eval/short/grades-toy.jsonl").read_text().splitlines()]
    assert len(grades) == 48 and {g["outcome"] for g in grades} == {"right", "wrong"}


@pytest.mark.parametrize("flags, message", [
    (["--num_samples", 3], "2 of 6 samples of toy are missing"),
    (["--num_samples", 2, "--budgets", "200"], "--budgets 200 is above the 100 tokens"),
    (["--model", "other"], "nothing of toy is stored"),
    (["--benchmark", "math500"], "nothing of math500 is stored"),
])
def test_rescoring_says_what_is_missing(tmp_path, flags, message):
    store(tmp_path / "m", {"p": [("1", 9, "stop")] * 2, "q": [("1", 9, "stop")] * 2})
    done = rescore(tmp_path, "--model", "m", "--budgets", "50", *flags)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_waiting_for_other_ranks_has_a_deadline(tmp_path):
    store(tmp_path / "m", {"p": [("1", 9, "stop")] * 2})
    problems = [evaluate.Problem("toy", "p", "p", ["1"], 100)]
    evaluate.wait_for_samples(config(num_samples=2, wait_minutes=0.01), tmp_path / "m", problems)
    with pytest.raises(TimeoutError, match="1 samples are missing"):
        evaluate.wait_for_samples(config(num_samples=3, wait_minutes=0.01), tmp_path / "m", problems)


def test_waiting_ends_when_the_other_rank_has_written(tmp_path):
    store(tmp_path / "m", {"p": [("1", 9, "stop")] * 2})
    row = {"benchmark": "toy", "id": "p", "sample": 2, "length": 9, "finish_reason": "stop", "text": ""}
    late = threading.Timer(1.5, write_rows, [tmp_path / "m" / "samples-001.jsonl", [row]])
    late.start()
    problems = [evaluate.Problem("toy", "p", "p", ["1"], 100)]
    evaluate.wait_for_samples(config(num_samples=3, wait_minutes=0.5), tmp_path / "m", problems)
    assert len(stored(tmp_path / "m")) == 3


# ---------------------------------------------------------------------------------------------------------------------
# The program with real engines
# ---------------------------------------------------------------------------------------------------------------------
PROBLEMS, SAMPLES, BUDGETS = 24, 8, (6, 12, 40)
CAPPED = 3     # this problem may use 5 tokens only


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A random model over 24 words, some of them boxes: it answers, is sometimes right, and stops after a few words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("evaluate")
    words = ["<pad>", "<end>", "<unk>", *(f"\\boxed{{{i}}}" for i in range(4)), *(f"w{i}" for i in range(17))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    tokenizer.chat_template = ("{% for m in messages %}{{ m['content'] }} {% endfor %}"
                               "{% if add_generation_prompt %}w0{% endif %}")
    # llama, because AutoTokenizer splits words Qwen's way for every qwen2 model; 128, because vLLM needs heads of 32
    tiny_model(folder / "model", arch="llama", vocab_size=24, hidden_size=128)
    tokenizer.save_pretrained(folder / "model")
    write_rows(folder / "toy.jsonl", [
        {"problem": " ".join(f"w{(p * 7 + i * (p + 1)) % 17}" for i in range(4 + p % 3)), "answer": p % 3}
        for p in range(PROBLEMS)])
    row = json.loads((folder / "toy.jsonl").read_text().splitlines()[CAPPED])
    (folder / "limits.json").write_text(json.dumps({row["problem"]: 5}))
    return folder


def flags(setting, output_dir, **changes):
    values = {"model": setting / "model", "benchmark": setting / "toy.jsonl", "num_samples": SAMPLES,
              "budgets": ",".join(map(str, BUDGETS)), "token_limits": setting / "limits.json", "output_dir": output_dir,
              "prompt_style": "lighteval", "top_p": 1.0, "min_p": 0.0, "max_num_seqs": 4, "kv_cache_gb": 0.05,
              "dtype": "float32", **changes}
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


def stored(folder):
    """{(problem id, sample): (text, length, finish reason)} of all ranks' files; no sample may stand there twice."""
    lines = [line for path in folder.glob("samples-*.jsonl") for line in path.read_text().split("\n") if line]
    found = {(row["id"], row["sample"]): (row["text"], row["length"], row["finish_reason"])
             for row in map(json.loads, lines)}
    assert len(found) == len(lines)
    return found


@pytest.fixture(scope="module")
def reference(setting):
    """An evaluation that nothing disturbed: its output folder and what it printed."""
    done = run(sys.executable, ROOT / "evaluate.py", *flags(setting, setting / "reference"))
    assert done.returncode == 0, done.stderr
    return setting / "reference", done


def test_evaluation_of_a_model(setting, reference):
    output_dir, done = reference
    folder = output_dir / "model"
    samples = stored(folder)
    assert len(samples) == PROBLEMS * SAMPLES
    metrics = json.loads((folder / "metrics-toy.json").read_text())["budgets"]
    problems = [json.loads(line) for line in (folder / "problems-toy.jsonl").read_text().splitlines()]
    golds = {p["id"]: p["golds"][0] for p in problems}
    for budget in BUDGETS:     # once more, from the stored texts, by other means
        right = [reason == "stop" and length <= budget
                 and [word for word in text.split() if "boxed" in word][-1:] == [f"\\boxed{{{golds[p]}}}"]
                 for (p, _), (text, length, reason) in samples.items()]
        assert metrics[str(budget)]["pass@1"] == pytest.approx(np.mean(right))
    assert 0 < metrics["6"]["pass@1"] < metrics["40"]["pass@1"] < 1
    assert 0 < metrics["40"]["cut_off"] < metrics["6"]["cut_off"] < 1
    assert "### toy: 24 problems, 8 samples each" in done.stdout and "192/192" in done.stderr

    capped = problems[CAPPED]
    assert capped["max_tokens"] == 5
    assert max(length for (p, _), (_, length, _) in samples.items() if p == capped["id"]) == 5
    assert max(length for _, length, _ in samples.values()) == 40
    words = capped["prompt"].split()
    assert words[-1] == "w0" and words[-1 - len(capped["problem"].split()):-1] == capped["problem"].split()
    assert len({text for text, *_ in samples.values()}) > 100     # every sample has a seed of its own

    written = json.loads((folder / "config.json").read_text())
    assert written["settings"]["user_turn"] == evaluate.PROMPT_STYLES["lighteval"][1]
    assert written["settings"]["temperature"] == 1.0 and written["settings"]["torch"] and written["git_commit"]


def test_generating_at_a_smaller_budget_gives_the_same_scores(setting, reference, tmp_path):
    done = run(sys.executable, ROOT / "evaluate.py", *flags(setting, tmp_path, budgets="6,12"))
    assert done.returncode == 0, done.stderr
    once, again = (json.loads((folder / "model" / "metrics-toy.json").read_text())["budgets"]
                   for folder in (reference[0], tmp_path))
    assert again == {budget: once[budget] for budget in ("6", "12")}


def test_killed_evaluation_continues_without_repeating_a_sample(setting, reference, tmp_path):
    command = [sys.executable, str(ROOT / "evaluate.py"), *flags(setting, tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part, deadline = tmp_path / "model" / "samples-000.jsonl", time.monotonic() + 240
    while not part.exists() or part.read_bytes().count(b"\n") < 30:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = part.read_bytes().split(b"\n")
    kept = [line for line in lines[:-1] if line][:-1]
    part.write_bytes(b"\n".join([*kept, lines[len(kept)][:20]]))     # the last line torn in the middle
    assert 28 <= len(kept) < PROBLEMS * SAMPLES - 1

    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "1 line(s) torn" in done.stdout
    missing = PROBLEMS * SAMPLES - len(kept)
    assert f"{missing}/{missing}" in done.stderr
    assert part.read_bytes().startswith(b"\n".join(kept))
    rows = [line for line in part.read_text().split("\n") if line]
    rows.remove(lines[len(kept)][:20].decode())
    part.write_text("\n".join(rows))
    assert stored(tmp_path / "model") == stored(reference[0] / "model")     # drawn with the same seeds, each once
    assert (tmp_path / "table.md").read_text() == (reference[0] / "table.md").read_text()


def test_two_ranks_share_the_samples(setting, reference, tmp_path):
    done = torchrun("evaluate.py", *flags(setting, tmp_path))
    assert done.returncode == 0, done.stderr
    parts = sorted((tmp_path / "model").glob("samples-*.jsonl"))
    assert [part.read_text().count("\n") for part in parts] == [PROBLEMS * SAMPLES // 2] * 2
    assert stored(tmp_path / "model") == stored(reference[0] / "model")
    assert done.stdout.count("### toy") == 1
    assert (tmp_path / "table.md").read_text() == (reference[0] / "table.md").read_text()


def test_other_settings_are_refused_and_nothing_is_overwritten(setting, reference):
    before = stored(reference[0] / "model")
    done = run(sys.executable, ROOT / "evaluate.py", *flags(setting, reference[0], temperature=0.5, seed=7))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "seed is 7, was 42; temperature is 0.5, was 1.0" in done.stderr
    assert stored(reference[0] / "model") == before


def test_budgets_beyond_the_model_are_refused_before_an_engine_starts(setting, tmp_path):
    done = run(sys.executable, ROOT / "evaluate.py", *flags(setting, tmp_path, budgets="5000"))
    assert done.returncode == 1 and "--budgets 5000" in done.stderr and "2048 positions" in done.stderr
    assert not list(tmp_path.glob("*/engine*"))


def test_finished_evaluation_starts_no_engine_and_rescoring_needs_no_model(setting, reference):
    log = reference[0] / "model" / "engine-0.log"
    size, table = log.stat().st_size, (reference[0] / "table.md").read_text()
    done = run(sys.executable, ROOT / "evaluate.py", *flags(setting, reference[0]))
    assert done.returncode == 0 and (reference[0] / "table.md").read_text() == table

    hidden = setting / "hidden"
    for name in ("model", "toy.jsonl"):
        os.rename(setting / name, hidden.with_suffix(f".{name}"))
    try:
        done = run(sys.executable, ROOT / "evaluate.py", *flags(setting, reference[0], budgets="9,40"), "--rescore")
    finally:
        for name in ("model", "toy.jsonl"):
            os.rename(hidden.with_suffix(f".{name}"), setting / name)
    assert done.returncode == 0, done.stderr
    assert "| model | 9 | tokens | 40 | tokens |" in done.stdout and log.stat().st_size == size
