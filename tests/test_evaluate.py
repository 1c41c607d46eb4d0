"""evaluate.py: metrics by enumeration, intervals by simulation, the program with real vLLM."""

import itertools
import json
import signal
import subprocess
import sys
import time
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from conftest import ROOT, read_rows, run_script, tiny_model, torchrun

import evaluate
from evaluate import (
    GradedSample, bootstrap_interval, grade_sample, majority_answer, paired_difference, pass_at_k,
    problem_metrics, summarise)


# --------------------------------------------------------------------------------------------------
# Metrics
# --------------------------------------------------------------------------------------------------
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    for n in range(1, 9):
        for c in range(n + 1):
            samples = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(samples, k))
                share = sum(map(any, subsets)) / len(subsets)
                assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


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
    half, two, seven = Fraction(1, 2), Fraction(2), Fraction(7)
    spellings = {"1/2": half, "0.5": half, "2": two, "2.0": two, "7": seven}
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
    return [GradedSample(a, a == gold, n, finished) for a, n in zip(answers, lengths, strict=True)]


def test_vote_among_k_is_unbiased():
    """maj@k, averaged over all orders of the samples = the average over all ordered draws of k."""
    answers = ["1", "2", None, "1", "3"]
    orders = [problem_metrics(graded(order), 99) for order in itertools.permutations(answers)]
    for k in (1, 2, 4, 5):
        draws = [majority_answer(draw) == "1" for draw in itertools.permutations(answers, k)]
        assert np.mean([m[f"maj@{k}"][0] for m in orders]) == pytest.approx(np.mean(draws))
    assert {m["pass@1"] for m in orders} == {(2 / 5, 1)}
    names = [f"{metric}@{k}" for k in (1, 2, 4, 5) for metric in ("pass", "maj")]
    assert [name for name in orders[0] if "@" in name] == names
    all_take_part = problem_metrics(graded(["1", "1", "2", "2"]), 99)
    assert all_take_part["maj@2"] == (1 / 2, 1)


def test_samples_cut_off_do_not_vote():
    samples = graded(["1", "2", "2"], lengths=[10, 50, 50])
    assert [problem_metrics(samples, budget)["maj@3"][0] for budget in (20, 60)] == [1, 0]


def box(answer):
    return "so" if answer is None else f"so \\boxed{{{answer}}}"


def scores(golds, texts, lengths, finish_reasons, budgets):
    """{budget: totals} of completions, (P, n) each; golds: P lists of accepted answers."""
    names = ("text", "length", "finish_reason")
    rows = [[dict(zip(names, sample, strict=True)) for sample in zip(*columns, strict=True)]
            for columns in zip(texts, lengths, finish_reasons, strict=True)]
    groups = [[grade_sample(row, accepted) for row in samples]
              for accepted, samples in zip(golds, rows, strict=True)]
    return {b: summarise([problem_metrics(group, b) for group in groups]) for b in budgets}


def test_published_definitions_on_a_worked_example():
    """
    Two problems of four samples, as (answer, tokens, finish reason).

    Every number below is counted by hand.
    """
    first = [("5", 100, "stop"), ("5.0", 300, "stop"), ("4", 200, "stop"), ("5", 400, "length")]
    second = [("8", 150, "stop"), (None, 50, "stop"), ("9", 250, "stop"), ("9", 350, "stop")]
    columns = [[[sample[i] for sample in row] for row in (first, second)] for i in range(3)]
    texts = [[box(answer) for answer in row] for row in columns[0]]
    result = scores([["5"], ["x", "9"]], texts, columns[1], columns[2], [200, 400])

    at_200 = result[200]  # first: 5 (100), 4 (200); second: 8 (150), none (50)
    assert at_200["pass@1"] == pytest.approx((1 / 4 + 0) / 2)
    assert at_200["pass@2"] == pytest.approx((1 / 2 + 0) / 2)
    assert at_200["pass@4"] == pytest.approx((1 + 0) / 2)
    assert at_200["maj@4"] == pytest.approx((1 + 0) / 2)  # 5 and 4 have a vote each: first seen
    assert at_200["answers"] == pytest.approx((2 + 1) / 2)
    assert at_200["tokens"] == pytest.approx((100 + 200 + 200 + 200 + 150 + 50 + 200 + 200) / 8)
    assert at_200["tokens_answered"] == pytest.approx((100 + 200 + 150) / 3)
    assert at_200["cut_off"] == pytest.approx(4 / 8)
    assert at_200["no_answer"] == pytest.approx(1 / 8)

    # first: 5 (100), 5.0 (300), 4 (200); its fourth hit the limit, box or not
    at_400 = result[400]
    assert at_400["pass@1"] == pytest.approx((2 / 4 + 2 / 4) / 2)
    assert at_400["maj@4"] == pytest.approx((1 + 1) / 2)
    assert at_400["answers"] == pytest.approx((3 + 3) / 2)
    assert at_400["tokens"] == pytest.approx((100 + 300 + 200 + 400 + 150 + 50 + 250 + 350) / 8)
    assert at_400["tokens_answered"] == pytest.approx((100 + 300 + 200 + 150 + 250 + 350) / 6)
    assert at_400["cut_off"] == pytest.approx(1 / 8)

    nothing = scores([["5"]], [[box(None)]], [[9]], [["stop"]], [9])[9]
    assert nothing["tokens_answered"] is None and "tokens_answered" not in nothing["interval"]
    assert nothing["pass@1"] == 0 and nothing["no_answer"] == 1


def test_scope_of_the_answer():
    row = {"text": r"\boxed{1} </think> \boxed{2}", "length": 9, "finish_reason": "stop"}
    assert grade_sample(row, ["2"]) == GradedSample("2", True, 9, True)
    assert grade_sample(row, ["2"], "before_think_end") == GradedSample("1", False, 9, True)


def random_completions(rng, problems=6, samples=8):
    lengths = rng.integers(1, 100, (problems, samples))
    answers = rng.choice(["1", "2", "3"], (problems, samples))
    return lengths, answers


def test_budgets_from_truncation_equal_separate_scoring():
    rng, golds = np.random.default_rng(0), [["1"]] * 6
    lengths, answers = random_completions(rng)
    texts = [[f"{'a' * n} {box(a)}" for n, a in zip(*row, strict=True)]
             for row in zip(lengths, answers, strict=True)]
    full = scores(golds, texts, lengths.tolist(), [["stop"] * 8] * 6, [20, 60, 100])
    for limit in (20, 60, 100):
        # What a run with this limit would have stored. Cut texts keep a box: a box before the end
        # must not count.
        reasons = np.where(lengths <= limit, "stop", "length").tolist()
        again = scores(golds, texts, np.minimum(lengths, limit).tolist(), reasons, [20, 60, 100])
        for budget in (20, 60, 100):
            if budget <= limit:
                assert again[budget] == full[budget]
    assert full[20]["pass@1"] < full[60]["pass@1"] < full[100]["pass@1"]


# --------------------------------------------------------------------------------------------------
# Intervals
# --------------------------------------------------------------------------------------------------
def simulated_accuracy(rng, problems, samples, skill=0.0):
    """(P, 1) shares of right samples; problems differ in difficulty: theirs are correlated."""
    chance = np.clip(rng.beta(0.6, 0.6, problems) + skill, 0, 1)
    return (rng.binomial(samples, chance) / samples)[:, None]


@pytest.mark.parametrize("problems", [10, 30, 200])
def test_interval_covers_the_truth_95_times_in_100(problems):
    rng, trials, hits = np.random.default_rng(problems), 500, 0
    for trial in range(trials):
        accuracy = simulated_accuracy(rng, problems, 16)
        low, high = bootstrap_interval(accuracy, np.ones_like(accuracy), resamples=600, seed=trial)
        hits += low[0] <= 0.5 <= high[0]
    assert 0.93 <= hits / trials <= 0.972  # standard error of this estimate: 0.01


def test_interval_does_not_shrink_with_samples_of_the_same_problems():
    rng = np.random.default_rng(1)
    accuracy = simulated_accuracy(rng, 30, 10_000)
    low, high = bootstrap_interval(accuracy, np.ones_like(accuracy))
    assert high - low > 0.2


def test_interval_of_a_ratio_weighs_problems_by_their_answers():
    rng, hits = np.random.default_rng(2), 0
    for trial in range(300):
        answers = rng.integers(0, 9, 60)
        # long where there are many answers
        lengths = answers * (100 + 10 * answers) + rng.normal(0, 50, 60)
        low, high = bootstrap_interval(
            lengths[:, None], answers[:, None].astype(float), resamples=600, seed=trial)
        k = np.arange(9)
        hits += low[0] <= (k * (100 + 10 * k)).sum() / k.sum() <= high[0]
    assert hits / 300 >= 0.91


def test_paired_difference_covers_and_is_tighter_than_two_intervals():
    rng, hits, paired, unpaired = np.random.default_rng(3), 0, [], []
    for _ in range(200):
        chance = rng.uniform(0.0, 0.8, 40)
        rows = [rng.binomial(16, chance + gain) / 16 for gain in (0.0, 0.1)]
        first, second = (
            [{"pass@1": (a, 1), "tokens": (100 * a, 1), "answers": (3, 1)} for a in row]
            for row in rows)
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
    # sqrt(2): a difference of two independent means
    assert np.mean(paired) < 0.5 * 2**0.5 * np.mean(unpaired)


# --------------------------------------------------------------------------------------------------
# Problems and flags
# --------------------------------------------------------------------------------------------------
def config(**flags):
    return evaluate.EvalConfig(**flags)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_problems_from_files(words, tmp_path, capsys):
    rows = [{"question": "1+1", "answer": "so\n#### 2"}, {"question": "2+2", "answer": ""},
            {"question": "1+1", "answer": 2}, {"question": "3+3", "answer": ["6", "6.0\n"]}]
    write_rows(tmp_path / "gsm8k_test.jsonl", rows)
    own = write_rows(tmp_path / "own.jsonl", [{"problem": "1+1", "answer": 142.0}])
    questions = evaluate.load_questions(
        config(benchmark=f"gsm8k,{own}", benchmark_dir=str(tmp_path)), words)
    names, ids = zip(*questions, strict=True)
    assert names == ("gsm8k", "gsm8k", "gsm8k", "own") and ids[0] == ids[3]
    assert [q.problem for q in questions.values()] == ["1+1", "1+1", "3+3", "1+1"]
    assert [q.answers for q in questions.values()] == [["2"], ["2"], ["6", "6.0"], ["142"]]
    assert "gsm8k:" in (printed := capsys.readouterr().out) and "own:" in printed

    reordered = evaluate.load_questions(config(
        benchmark=write_rows(tmp_path / "reversed.jsonl", rows[::-1]), limit=1), words)
    assert list(reordered) == [("reversed", ids[2])]  # neither order nor --limit changes an id


@pytest.mark.parametrize("flags, message", [
    (dict(benchmark="math500"), "has none of .*math500.json"),
    (dict(benchmark="{own},{own}"), "called 'own'"),
    (dict(benchmark="{empty}"), "empty.jsonl"),
    (dict(benchmark=","), "--benchmark is empty"),
])
def test_problems_that_cannot_be_used(words, tmp_path, flags, message):
    files = {name: [{"problem": "1+1", "answer": answer}]
             for name, answer in (("own", 2), ("empty", None))}
    paths = {name: write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items()}
    flags = {name: value.format(**paths) for name, value in flags.items()}
    with pytest.raises(ValueError, match=message):
        evaluate.load_questions(config(benchmark_dir=str(tmp_path), **flags), words)


def test_benchmarks_by_name():
    sources = evaluate.benchmark_list(config(benchmark="aime24,gsm8k"))
    assert sources == {"aime24": "HuggingFaceH4/aime_2024:train", "gsm8k": "openai/gsm8k:main:test"}


@pytest.mark.parametrize("flags, message", [
    (dict(prompt_style="open"),
     "--prompt_style 'open': choose one of training, lighteval, readme, none"),
    (dict(num_samples=0), "--num_samples 0"), (dict(top_p=1.5), "--top_p 1.5"),
    (dict(min_p=-1.0), "--min_p -1.0"),
    (dict(temperature=0.0), "--num_samples 1"), (dict(budgets="8k"), "--budgets '8k'"),
    (dict(model="a/final,b=a,x/a"), "the name 'a' is taken"), (dict(model=""), "--model is empty"),
])
def test_flags_that_cannot_be(flags, message):
    with pytest.raises(ValueError, match=message):
        evaluate.check_config(config(**flags))
        evaluate.model_list(config(**flags))
        evaluate.budget_list(config(**flags))


@pytest.mark.parametrize("flag, value, named", [
    ("--num_sample", 3, "--num_sample"), ("--model", "a/b/c", "a/b/c")])
def test_mistakes_of_users_stop_the_program_in_one_line(flag, value, named):
    done = run_script("evaluate.py", flag, value)
    assert done.returncode != 0 and named in done.stderr and "Traceback" not in done.stderr


def test_model_names():
    models = "runs/sft/final, q=Qwen/Qwen3-14B,Qwen/Qwen2-7B,runs/lr=1/final"
    assert evaluate.model_list(config(model=models)) == {
        "sft": "runs/sft/final", "q": "Qwen/Qwen3-14B", "Qwen2-7B": "Qwen/Qwen2-7B",
        "lr=1": "runs/lr=1/final"}


def test_prompts_are_the_published_ones():
    """Braces as the models saw them: doubled in training and in the README, single in lighteval."""
    def parts(**flags):
        return evaluate.prompt_parts(config(**flags))

    system, user = parts(prompt_style="training")
    assert system.endswith(r"Return final answer within \boxed{{}}.") and user == "{problem}"
    system, user = parts(prompt_style="lighteval")
    assert system == "" and user.endswith("answering.\n\n{problem}")
    assert r"$\boxed{ANSWER}$" in user and "clearly.  The last line" in user
    solve = r"Solve the problem, and put the answer in \boxed{{}}. {problem}"
    assert parts(prompt_style="readme") == ("", solve)
    assert parts(prompt_style="none") == ("", "{problem}")
    assert parts(prompt_style="none", system_prompt="Be brief.")[0] == "Be brief."
    assert parts(system_prompt="none")[0] == ""
    assert r"\boxed{{}}" in parts(system_prompt="sft")[0]


def test_the_prompt_has_system_prompt_user_turn_and_problem(words, tmp_path):
    own = write_rows(tmp_path / "own.jsonl", [{"problem": "w3 w4", "answer": 2}])
    cfg = config(benchmark=own, prompt_style="readme", system_prompt="w1 w2")
    question, = evaluate.load_questions(cfg, words).values()
    prompt = words.decode(question.prompt_ids).split()
    turn = len(evaluate.PROMPT_STYLES["readme"][1].split()) - 1
    assert prompt == ["w1", "w2", *["<unk>"] * turn, "w3", "w4", "w0"]


# --------------------------------------------------------------------------------------------------
# Stored samples: settings, table, comparison, plot, scoring without a model
# --------------------------------------------------------------------------------------------------
def test_other_settings_are_another_folder(words, tmp_path):
    """Samples of different settings are never mixed; a flag that changes no sample is none."""
    tiny_model(tmp_path)
    same = [dict(), dict(num_samples=3), dict(budgets="7"), dict(limit=1), dict(max_num_seqs=2),
            dict(answer_scope="before_think_end"), dict(benchmark="math500"), dict(output_dir="x")]
    other = [dict(seed=7), dict(temperature=0.5), dict(top_p=0.5), dict(min_p=0.0),
             dict(dtype="float32"), dict(prompt_style="lighteval"), dict(system_prompt="sft")]
    hashes = [evaluate.sample_settings(config(**flags), tmp_path, words)[1]
              for flags in (*same, *other)]
    assert len(set(hashes[:len(same)])) == 1 and len(set(hashes)) == 1 + len(other)
    (tmp_path / "config.json").write_text("{}")
    assert evaluate.sample_settings(config(), tmp_path, words)[1] not in hashes


def test_of_two_samples_the_longer_is_kept_and_torn_lines_are_not(tmp_path):
    row = {"benchmark": "toy", "id": "p", "finish_reason": "length", "text": ""}
    write_rows(tmp_path / "samples-000.jsonl", [{**row, "sample": 0, "length": 9},
                                                {**row, "sample": 1, "length": 50}])
    write_rows(tmp_path / "samples-001.jsonl", [{**row, "sample": 0, "length": 40},
                                                {**row, "sample": 1, "length": 6}])
    with open(tmp_path / "samples-001.jsonl", "a") as file:
        file.write('{"benchmark": "toy", "id": "p", "sam')
    samples = evaluate.read_samples(tmp_path)
    assert {key: row["length"] for key, row in samples.items()} == {
        ("toy", "p", 0): 40, ("toy", "p", 1): 50}
    first = samples["toy", "p", 0]
    assert not evaluate.is_missing(first, 40) and evaluate.is_missing(first, 41)
    assert evaluate.is_missing(None, 1)
    assert not evaluate.is_missing({"finish_reason": "stop", "length": 3}, 9)


def store(folder, samples, benchmark="toy"):
    """
    What a finished evaluation leaves. Every gold answer is 1.

    samples: {problem: [(answer, tokens, finish reason)]}.
    """
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text("{}")
    write_rows(folder / f"problems-{benchmark}.jsonl", [
        {"id": p, "problem": p, "answers": ["1"]} for p in samples])
    write_rows(folder / "samples-000.jsonl", [
        {"benchmark": benchmark, "id": p, "sample": i, "length": length, "finish_reason": reason,
         "text": box(answer)}
        for p, group in samples.items() for i, (answer, length, reason) in enumerate(group)])
    return folder


def test_table_comparison_and_plot_without_a_model(tmp_path):
    rng = np.random.default_rng(0)

    def sample(p, low, high):
        answer = "1" if rng.random() < (p + 1) / 15 else "2"
        return answer, int(rng.integers(low, high)), "stop"

    long, short = ({f"p{p}": [sample(p, *limits) for _ in range(4)] for p in range(12)}
                   for limits in ((50, 100), (10, 40)))
    models = [store(tmp_path / "stored" / name / "hash", samples)
              for name, samples in (("long", long), ("short", short))]
    plot = tmp_path / "figures" / "curve.png"
    done = run_script(
        "evaluate.py", "--benchmark", "toy", "--output_dir", tmp_path / "eval",
        "--model", ",".join(map(str, models)), "--num_samples", 4, "--budgets", "100,60,30",
        "--plot", plot)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "eval" / "table.md").read_text()
    assert table.strip() in done.stdout
    blocks = [block.splitlines() for block in table.split("\n\n") if block.startswith("|")]
    assert [len(block) - 2 for block in blocks] == [2, 2 * 3, 3]
    for block in blocks:
        assert len({line.count("|") for line in block}) == 1
    assert blocks[0][0] == "| model | 30 | tokens | 60 | tokens | 100 | tokens |"

    assert "]* |" in blocks[2][-1] and "-" in blocks[2][-1]  # fewer tokens: zero is outside

    metrics = {m: json.loads((tmp_path / "eval" / m / "metrics-toy.json").read_text())
               for m in ("long", "short")}
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

    grades = read_rows(tmp_path / "eval/short/grades-toy.jsonl")
    assert len(grades) == 48 and {g["correct"] for g in grades} == {True, False}


@pytest.mark.parametrize("benchmarks", [["one"], ["one", "two"]])
def test_plot_has_its_legend_outside_the_curves(tmp_path, benchmarks):
    samples = {f"p{i}": [("1", 10 * i + 5, "stop"), ("2", 9, "stop")] for i in range(6)}
    names = [f"a long name of a model {i}" for i in range(5)]
    scored = {}
    for benchmark in benchmarks:
        folder = store(tmp_path / benchmark / "hash", samples, benchmark)
        read = evaluate.read_samples(folder)
        scores = evaluate.score_benchmark(
            config(num_samples=2), folder, read, benchmark, [20, 60], folder)
        scored[benchmark] = dict.fromkeys(names, scores)
    figure = evaluate.budget_plot(scored, [20, 60])
    figure.savefig(tmp_path / "plot.png")
    legend = figure.legends[0].get_window_extent()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    assert not any(legend.overlaps(panel.get_tightbbox()) for panel in figure.axes)
    assert figure.bbox.containsx(legend.x0) and figure.bbox.containsx(legend.x1)
    curve = figure.axes[0].lines[0]
    accuracy = dict(zip(*curve.get_data(), strict=True))
    assert (accuracy[20], accuracy[60]) == pytest.approx((2 / 12, 6 / 12))
    assert curve.get_xdata()[curve.get_markevery()].tolist() == [20, 60]


@pytest.mark.parametrize("flags, message", [
    (dict(num_samples=3), "2 samples of toy are missing"),
    (dict(budgets="200"), "1 samples of toy are missing, or cut off below 200 tokens"),
    (dict(benchmark="math500"), "holds no samples of math500"),
])
def test_scoring_says_what_is_missing(tmp_path, flags, message):
    folder = store(tmp_path / "m" / "hash", {
        "p": [("1", 9, "stop")] * 2, "q": [("1", 9, "stop"), (None, 100, "length")]})
    cfg = config(**{"benchmark": "toy", "num_samples": 2, "budgets": "100",
                    "output_dir": str(tmp_path), **flags})
    with pytest.raises(ValueError, match=message):
        evaluate.report(cfg, {"m": folder}, evaluate.budget_list(cfg))


def test_models_are_compared_on_the_same_problems_only(tmp_path):
    folders = {name: store(tmp_path / name / "hash", {name: [("1", 9, "stop")]}) for name in "ab"}
    cfg = config(benchmark="toy", num_samples=1, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="a and b answered different problems of toy"):
        evaluate.report(cfg, folders, [10])


# --------------------------------------------------------------------------------------------------
# The program with engines
# --------------------------------------------------------------------------------------------------
PROBLEMS, SAMPLES, BUDGETS = 24, 8, (6, 12, 40)


@pytest.fixture(scope="module")
def words():
    """Tokenizer of 24 words, some of them boxes."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    boxes = (f"\\boxed{{{i}}}" for i in range(4))
    words = ["<pad>", "<end>", "<unk>", *boxes, *(f"w{i}" for i in range(17))]
    ids = {word: i for i, word in enumerate(words)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{{ m['content'] }} {% if m['role'] == 'assistant' %}<end>{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}w0{% endif %}")
    return tokenizer


@pytest.fixture(scope="module")
def setting(tmp_path_factory, words):
    """A random model over these words: it answers, may be right, and stops after a few words."""
    folder = tmp_path_factory.mktemp("evaluate")
    # llama, because AutoTokenizer splits words Qwen's way for every qwen2 model; 128, because vLLM
    # needs heads of 32
    tiny_model(folder / "model", arch="llama", vocab_size=24, hidden_size=128)
    words.save_pretrained(folder / "model")
    problems = [" ".join(f"w{(p * 7 + i * (p + 1)) % 17}" for i in range(4 + p % 3))
                for p in range(PROBLEMS)]
    write_rows(folder / "toy.jsonl", [
        {"problem": problem, "answer": p % 3} for p, problem in enumerate(problems)])
    return folder


def flags(setting, output_dir, **changes):
    values = {"model": setting / "model", "benchmark": setting / "toy.jsonl",
              "num_samples": SAMPLES, "budgets": ",".join(map(str, BUDGETS)),
              "output_dir": output_dir, "prompt_style": "lighteval", "top_p": 1.0, "min_p": 0.0,
              "max_num_seqs": 4, "dtype": "float32", **changes}
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


def samples_of(output_dir):
    """The one folder of samples that an evaluation has left."""
    folder, = (path.parent for path in output_dir.glob("model/*/settings.json"))
    return folder


def stored(output_dir):
    """{(problem id, sample): (text, length, finish reason)} of all ranks' files, each once."""
    lines = [line for path in samples_of(output_dir).glob("samples-*.jsonl")
             for line in path.read_text().split("\n") if line]
    found = {(row["id"], row["sample"]): (row["text"], row["length"], row["finish_reason"])
             for row in map(json.loads, lines)}
    assert len(found) == len(lines)
    return found


FAKE_ENGINE = """
import os, time
import evaluate
from rollout import Completion, EngineError

class Engine:
    def __init__(self, *paths, **options): pass
    def close(self): pass
    def generate(self, prompts, *, seeds, **options):
        for i in range(len(prompts)):
            if os.environ["RANK"] == "1" and i == 3:
                time.sleep(2)
                if FAILS: raise EngineError("the engine of rank one gave up")
            yield i, [Completion(i, 0, [3 + seeds[i][0] % 4, 1], [0.0, 0.0], "stop", 0)]

evaluate.Engine = Engine
if __name__ == "__main__":
    evaluate.run_main(evaluate.main, evaluate.EvalConfig)
"""


@pytest.mark.parametrize("fails", [False, True])
def test_ranks_wait_for_the_slowest_and_end_with_one_that_fails(setting, tmp_path, fails):
    script = tmp_path / "fake.py"
    script.write_text(FAKE_ENGINE.replace("FAILS", str(fails)))
    launch = torchrun if fails else partial(run_script, ranks=2)
    done = launch(script, *flags(setting, tmp_path))
    if fails:
        said = "fake.py: sampling model failed on rank 1: the engine of rank one gave up"
        assert done.returncode != 0 and said in done.stderr.splitlines()
        assert "in run_main" not in done.stderr  # a traceback of ours; torchrun has its own
        assert not (tmp_path / "table.md").exists()
        assert len(stored(tmp_path)) == PROBLEMS * SAMPLES // 2 + 3
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("### toy") == 1 and len(stored(tmp_path)) == PROBLEMS * SAMPLES
        for part in samples_of(tmp_path).glob("samples-*.jsonl"):
            # no rank is left alone with the long ones
            assert len({row["id"] for row in read_rows(part)}) == PROBLEMS


@pytest.fixture(scope="module")
def reference(setting):
    """An evaluation that nothing disturbed: its output folder and what it printed."""
    done = run_script("evaluate.py", *flags(setting, setting / "reference"))
    assert done.returncode == 0, done.stderr
    return setting / "reference", done


def metrics_of(output_dir):
    return json.loads((output_dir / "model" / "metrics-toy.json").read_text())["budgets"]


def test_evaluation_of_a_model(setting, reference):
    output_dir, done = reference
    folder, samples, metrics = samples_of(output_dir), stored(output_dir), metrics_of(output_dir)
    assert len(samples) == PROBLEMS * SAMPLES
    problems = read_rows(folder / "problems-toy.jsonl")
    golds = {p["id"]: p["answers"][0] for p in problems}
    right_box = {p: [f"\\boxed{{{gold}}}"] for p, gold in golds.items()}
    for budget in BUDGETS:  # once more, from the stored texts, by other means
        right = [reason == "stop" and length <= budget
                 and [word for word in text.split() if "boxed" in word][-1:] == right_box[p]
                 for (p, _), (text, length, reason) in samples.items()]
        assert metrics[str(budget)]["pass@1"] == pytest.approx(np.mean(right))
    assert 0 < metrics["6"]["pass@1"] < metrics["40"]["pass@1"] < 1
    assert 0 < metrics["40"]["cut_off"] < metrics["6"]["cut_off"] < 1
    assert "### toy: 24 problems, 8 samples each" in done.stdout and "192/192" in done.stderr

    assert max(length for _, length, _ in samples.values()) == 40
    prompt, problem = (problems[3][name].split() for name in ("prompt", "problem"))
    assert prompt[-1] == "w0" and prompt[-1 - len(problem):-1] == problem
    assert len({text for text, *_ in samples.values()}) > 100  # every sample has its own seed

    written = json.loads((folder / "settings.json").read_text())
    assert written["user_turn"] == evaluate.PROMPT_STYLES["lighteval"][1]
    assert written["temperature"] == 1.0 and written["torch"] and written["git_commit"]


def test_killed_evaluation_continues_without_repeating_a_sample(setting, reference, tmp_path):
    """
    Killed at budget 6, continued at 12: what is missing, or was cut off at 6, is drawn.

    The scores are those of samples that were drawn once, at 40.
    """
    command = [sys.executable, str(ROOT / "evaluate.py")]
    process = subprocess.Popen([*command, *flags(setting, tmp_path, budgets="6")], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    parts = partial(tmp_path.glob, "model/*/samples-000.jsonl")
    while sum(path.read_bytes().count(b"\n") for path in parts()) < 30:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    part = samples_of(tmp_path) / "samples-000.jsonl"
    lines = part.read_bytes().split(b"\n")
    kept = [line for line in lines[:-1] if line][:-1]
    torn = lines[len(kept)][:20]
    part.write_bytes(b"\n".join([*kept, torn]))
    assert 28 <= len(kept) < PROBLEMS * SAMPLES - 1

    done = run_script("evaluate.py", *flags(setting, tmp_path, budgets="6,12"))
    assert done.returncode == 0, done.stderr
    finished = sum(json.loads(line)["finish_reason"] == "stop" for line in kept)
    missing = PROBLEMS * SAMPLES - finished
    assert finished and f"{missing}/{missing}" in done.stderr
    assert part.read_bytes().startswith(b"\n".join(kept))
    # the torn line, an empty one at the end
    assert len(part.read_text().split("\n")) == len(kept) + 1 + missing + 1
    samples, expected = (evaluate.read_samples(samples_of(folder))
                         for folder in (tmp_path, reference[0]))
    assert samples.keys() == expected.keys()
    for key, whole in expected.items():  # drawn with the same seeds
        row, ends = samples[key], whole["finish_reason"] == "stop" and whole["length"] <= 12
        if not ends:
            assert whole["text"].startswith(row["text"])
            whole = whole | {"text": row["text"], "length": 12, "finish_reason": "length"}
        assert row == whole
    full = metrics_of(reference[0])
    assert metrics_of(tmp_path) == {budget: full[budget] for budget in ("6", "12")}


def test_two_ranks_share_the_samples(setting, reference, tmp_path):
    done = run_script("evaluate.py", *flags(setting, tmp_path), ranks=2)
    assert done.returncode == 0, done.stderr
    parts = sorted(samples_of(tmp_path).glob("samples-*.jsonl"))
    assert [part.read_text().count("\n") for part in parts] == [PROBLEMS * SAMPLES // 2] * 2
    assert stored(tmp_path) == stored(reference[0])
    assert done.stdout.count("### toy") == 1
    assert (tmp_path / "table.md").read_text() == (reference[0] / "table.md").read_text()


def test_budgets_beyond_the_model_are_refused_before_an_engine_starts(setting, tmp_path):
    done = run_script("evaluate.py", *flags(setting, tmp_path, budgets="5000"))
    assert done.returncode == 1
    assert "may reach 50" in done.stderr and "2048 positions" in done.stderr
    assert not list(tmp_path.glob("**/engine*"))


def test_finished_evaluation_starts_no_engine_and_scoring_needs_no_model(setting, reference):
    folder, table = samples_of(reference[0]), (reference[0] / "table.md").read_text()
    size = (folder / "engine-0.log").stat().st_size
    done = run_script("evaluate.py", *flags(setting, reference[0]))
    assert done.returncode == 0 and (reference[0] / "table.md").read_text() == table

    again = flags(setting, reference[0], budgets="9,40", model=folder, benchmark="toy")
    done = run_script("evaluate.py", *again)
    assert done.returncode == 0, done.stderr
    assert "| model | 9 | tokens | 40 | tokens |" in done.stdout
    assert (folder / "engine-0.log").stat().st_size == size
