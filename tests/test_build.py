"""recipes/build_data.py: the data sets from small files with the real columns; decontamination."""

import json
import sys

import build_data
import pytest
from conftest import ROOT, run

from data import DataError

LONG, SHORT = 40, 10  # words of a trace; the tests count words and call everything above 30 long


def trace(words, box="1", mark=""):
    return f"<think>{mark} " + "so " * words + f"</think> The answer is \\boxed{{{box}}}."


def openr1_row(number, marks, llama="same", complete=None, lengths=None, **columns):
    """A row of OpenR1-Math-220k. marks: correctness_math_verify; llama "same": null."""
    lengths = lengths or [LONG] * len(marks)
    return {
        "problem": f"OpenR1 problem number {number} about {number * 7} apples",
        "solution": "none",
        "answer": str(number),
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "source": "olympiads",
        "uuid": f"uuid-{number}",
        "is_reasoning_complete": [True] * len(marks) if complete is None else complete,
        "generations": [trace(n, number, f"g{i}") for i, n in enumerate(lengths)],
        "correctness_math_verify": marks,
        "correctness_llama": None if llama == "same" else llama,
        "finish_reasons": None,
        "correctness_count": sum(map(bool, marks)),
        "messages": None,
        **columns,
    }


def light_row(problem, answer_text):
    return {
        "conversations": [
            {"from": "user", "value": problem},
            {"from": "assistant", "value": answer_text},
        ]
    }


@pytest.fixture
def word_counter(monkeypatch):
    """Words are counted instead of tokens, so that a test can say which trace is how long."""
    monkeypatch.setattr(
        build_data, "token_counter", lambda name: lambda texts: [len(t.split()) for t in texts]
    )


def write(path, rows):
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return build_data.load_rows(str(path))


def build(tmp_path, recipe, sources, *flags, output="out.jsonl"):
    """Rows and report of a build from {flag: rows}; Parquet files where the hub has Parquet."""
    suffix = {
        "openr1_math": ".parquet",
        "openr1_hard": ".parquet",
        "light_r1": ".json",
        "open_rs": ".parquet",
    }
    command = [recipe, "--output", str(tmp_path / output), *map(str, flags)]
    for flag, rows in sources.items():
        command += [f"--{flag}", str(write(tmp_path / (flag + suffix.get(flag, ".jsonl")), rows))]
    build_data.build(build_data.make_parser().parse_args(command))
    return read(tmp_path / output), json.loads((tmp_path / f"{output}.report.json").read_text())


def sft_sources():
    half, most, full = [True, False], [True, True, True, False], [True, True]
    openr1 = [
        openr1_row(0, full),  # a: both correct, both long
        openr1_row(
            1, full, lengths=[LONG, SHORT]
        ),  # shortest correct is short: not a; accuracy 1: not b
        openr1_row(
            2, half, lengths=[LONG, SHORT]
        ),  # b: exactly half; the correct one is kept, the longer
        openr1_row(3, most, lengths=[LONG, SHORT, LONG, 2]),  # b: the wrong one is shortest
        openr1_row(4, [False, False]),  # never correct
        openr1_row(5, [False, False], llama=[True, None]),  # b by Llama; a null in its list
        openr1_row(6, [None, True], llama=[None, None]),  # b: an unknown mark is not correct
        openr1_row(7, full, complete=[False, False]),  # correct but broken off: nothing to keep
        openr1_row(
            8, full, complete=[True, False], lengths=[LONG, SHORT]
        ),  # a: the short one breaks off
        openr1_row(9, most),  # passes a and b
        openr1_row(10, full, problem="  OpenR1 problem\nnumber 0 about   0 apples"),  # row 0 again
        openr1_row(11, full, answer=None),
        openr1_row(12, full, generations=[trace(LONG)]),  # one trace, two marks
    ]
    hard = [
        openr1_row(50, [False, True], answer=27.0),  # float answers
        openr1_row(51, [False, False], answer=0.5),  # no correct trace
        openr1_row(0, full, answer=0.0),  # the problem of OpenR1's row 0: the first source wins
        openr1_row(52, full, answer=-3.0),
        openr1_row(53, full, answer=float("nan")),
    ]
    light = [
        light_row(
            "A light problem",
            "<think>is it \\boxed{4}? no</think>\nIt is \\boxed{\\frac{1}{2}}, not 3.",
        ),
        light_row("Boxed while thinking only", "<think>it is \\boxed{9}</think> nine"),
        light_row("No box", "<think>hm</think> nine"),
        light_row("OpenR1 problem number 2 about 14 apples", trace(3, 2)),  # known from OpenR1
        {"conversations": [{"from": "user", "value": "no answer"}]},
    ]
    return {"openr1_math": openr1, "openr1_hard": hard, "light_r1": light}


FLAGS = ("--a_min_tokens", "30")


def test_sft_set_row_by_row(tmp_path, word_counter):
    rows, report = build(tmp_path, "fast_math_r1_sft", sft_sources(), *FLAGS)
    assert {tuple(row) for row in rows} == {("problem", "generation", "answer", "source")}
    found = [
        (
            row["source"],
            row["problem"].split(" about")[0][-2:].strip(),
            row["answer"],
            row["generation"][7:10].strip(),
        )
        for row in rows
    ]
    assert found == [
        ("openr1_long", "0", "0", "g0"),
        ("openr1_moderate", "2", "2", "g0"),
        ("openr1_moderate", "3", "3", "g1"),
        ("openr1_moderate", "5", "5", "g0"),
        ("openr1_moderate", "6", "6", "g1"),
        ("openr1_long", "8", "8", "g0"),
        ("openr1_long", "9", "9", "g0"),
        ("openr1_hard", "50", "27", "g1"),
        ("openr1_hard", "52", "-3", "g0"),
        ("light_r1_stage2", "em", "\\frac{1}{2}", "is"),
        ("light_r1_stage2", "ly", "9", "it"),
    ]
    sources = report["sources"]
    for part in sources.values():
        assert part["rows"] == part["kept"] + sum(part["dropped"].values())
    assert sources["openr1_long"] == {
        "rows": 13,
        "kept": 3,
        "dropped": {
            "accuracy outside (0.5, 1.0]": 4,
            "no correct, complete trace": 1,
            "trace of at most 30 tokens": 2,
            "duplicate of an earlier problem": 1,
            "no gold answer": 1,
            "lists of different lengths": 1,
        },
    }
    assert sources["openr1_moderate"]["dropped"]["drawn for openr1_long"] == 1
    assert sources["openr1_hard"]["dropped"] == {
        "no correct, complete trace": 1,
        "duplicate of an earlier problem": 1,
        "gold answer that the grader cannot read": 1,
    }
    assert sources["light_r1_stage2"]["dropped"] == {
        "no boxed answer in the trace": 1,
        "duplicate of an earlier problem": 1,
        "conversations is not a question and an answer": 1,
    }
    assert report["rows"] == len(rows) and report["tokens"] == sum(
        len(row["generation"].split()) for row in rows
    )


def test_long_means_longer_than(tmp_path, word_counter):
    hard, light = [openr1_row(99, [True])], [light_row("x", trace(2))]
    sources = {"openr1_math": [openr1_row(0, [True])], "openr1_hard": hard, "light_r1": light}
    tokens = len(sources["openr1_math"][0]["generations"][0].split())
    for limit, kept in ((tokens - 1, 1), (tokens, 0)):
        _, report = build(tmp_path, "fast_math_r1_sft", sources, "--a_min_tokens", limit)
        assert report["sources"]["openr1_long"]["kept"] == kept


def sources_of(rows):
    return {
        row["problem"].split(" about")[0].split()[-1]: row["source"].removeprefix("openr1_")
        for row in rows
    }


@pytest.mark.parametrize(
    "flags, gone, new",
    [
        (("--correctness", "math_verify"), {"5"}, set()),
        (("--b_ends", "open"), {"2", "3", "5", "6"}, set()),
        (("--completeness", "ignore"), {"8"}, {"7"}),  # row 8's short trace counts now
        (("--trace_length", "any"), set(), {"1"}),
        (("--trace_length", "mean"), {"3"}, set()),
        (("--b_max_accuracy", "1"), set(), {"1"}),
        (("--a_min_accuracy", "0.8"), set(), set()),  # row 9 moves from a to b
    ],
)
def test_open_choices_move_the_rows_they_name(tmp_path, word_counter, flags, gone, new):
    only_openr1 = {**sft_sources(), "openr1_hard": [], "light_r1": []}
    (tmp_path / "default").mkdir()
    (tmp_path / "other").mkdir()
    only_openr1["openr1_hard"] = [openr1_row(99, [True])]
    default = sources_of(build(tmp_path / "default", "fast_math_r1_sft", only_openr1, *FLAGS)[0])
    other = sources_of(
        build(tmp_path / "other", "fast_math_r1_sft", only_openr1, *FLAGS, *flags)[0]
    )
    if flags == ("--trace_length", "mean"):
        # the mean of row 3's three correct traces: still b, now long enough for a
        assert default["3"] == "moderate" and other["3"] == "long"
        return
    assert set(default) - set(other) == gone and set(other) - set(default) == new
    if flags[0] == "--a_min_accuracy":
        assert (default["9"], other["9"]) == ("long", "moderate")


def test_same_bytes_again_and_from_parquet(tmp_path, word_counter):
    rows, report = build(tmp_path, "fast_math_r1_sft", sft_sources(), *FLAGS)
    first = [(tmp_path / name).read_bytes() for name in ("out.jsonl", "out.jsonl.report.json")]
    build(tmp_path, "fast_math_r1_sft", sft_sources(), *FLAGS)
    assert first == [
        (tmp_path / name).read_bytes() for name in ("out.jsonl", "out.jsonl.report.json")
    ]
    assert (
        build(tmp_path, "fast_math_r1_sft", sft_sources(), *FLAGS, output="out.parquet")[0] == rows
    )
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_draw_is_stable_seeded_and_uniform():
    keys = {number: f"problem {number}" for number in range(2000)}
    drawn = {keys[number] for number in build_data.draw(keys, 500, 2025, "a")}
    assert len(drawn) == 500
    turned = {1999 - number: key for number, key in keys.items()}
    assert {turned[number] for number in build_data.draw(turned, 500, 2025, "a")} == drawn, (
        "the order of the source does not matter"
    )
    assert {keys[number] for number in build_data.draw(keys, 500, 1, "a")} != drawn
    assert {keys[number] for number in build_data.draw(keys, 500, 2025, "b")} != drawn
    more = keys | {number: f"problem {number}" for number in range(2000, 2100)}
    kept = {more[number] for number in build_data.draw(more, 500, 2025, "a")} & drawn
    assert len(kept) > 450, "a few more rows replace a few"
    halves = [
        sum(number < 1000 for number in build_data.draw(keys, 500, seed, "a")) for seed in range(20)
    ]
    assert abs(sum(halves) / len(halves) - 250) < 15
    assert (
        len(build_data.draw(keys, 0, 2025, "a"))
        == len(build_data.draw(keys, 9999, 2025, "a"))
        == 2000
    )


def test_drawing_b_from_the_remainder_of_a(tmp_path, word_counter):
    openr1 = [openr1_row(number, [True, True, True, False]) for number in range(40)]  # pass a and b
    sources = {
        "openr1_math": openr1,
        "openr1_hard": [openr1_row(99, [True])],
        "light_r1": [light_row("x", trace(2))],
    }
    flags = (*FLAGS, "--a_rows", 10, "--b_rows", 20)
    rows, report = build(tmp_path, "fast_math_r1_sft", sources, *flags)
    kept = {name: part["kept"] for name, part in report["sources"].items()}
    assert (kept["openr1_long"], kept["openr1_moderate"]) == (10, 20)
    rows, report = build(
        tmp_path, "fast_math_r1_sft", sources, *flags, "--a_b_overlap", "independent"
    )
    kept = {name: part["kept"] for name, part in report["sources"].items()}
    assert kept["openr1_long"] == 10 and kept["openr1_moderate"] < 20, (
        "independent draws overlap and deduplication takes b's copies"
    )


def test_grpo_set(tmp_path, word_counter):
    light = [light_row(f"Problem {i} of many", trace(5, i)) for i in range(20)] + [
        light_row("Problem 3  of many", trace(5, 3))
    ]
    rows, report = build(tmp_path, "fast_math_r1_grpo", {"light_r1": light})
    assert [row["answer"] for row in rows] == [str(i) for i in range(20)]
    assert set(rows[0]) == {"problem", "answer", "source"}
    assert report["sources"]["light_r1_stage2"]["dropped"] == {"duplicate of an earlier problem": 1}


def test_open_rs_sets(tmp_path):
    def row(name, number, answer):
        return {
            "problem": f"{name} problem {number}",
            "solution": f"thus \\boxed{{{number}}}",
            "answer": answer,
        }

    s1 = [
        row("s1", 0, "0"),
        row("s1", 1, None),
        row("s1", 2, 2.0),
        {"problem": None, "solution": "", "answer": "1"},
    ]
    rows, report = build(tmp_path, "open_rs1", {"open_s1": s1})
    assert [(row["answer"], row["solution"]) for row in rows] == [
        ("0", "thus \\boxed{0}"),
        ("1", "thus \\boxed{1}"),
        ("2", "thus \\boxed{2}"),
    ]
    assert report["sources"]["open_s1"]["dropped"] == {"no problem text": 1}
    assert len(build(tmp_path, "open_rs2", {"open_rs": s1[:2]})[0]) == 2


@pytest.mark.parametrize(
    "value, text",
    [
        (27.0, "27"),
        ("27.0", "27"),
        (-3.0, "-3"),
        (0.5, "0.5"),
        (5, "5"),
        ("5", "5"),
        (1e20, "100000000000000000000"),
        (1e-7, "0.0000001"),
        ("3.10", "3.10"),
        ("\\frac{1}{2}", "\\frac{1}{2}"),
        (None, None),
        ("", None),
        (True, None),
        (float("nan"), None),
    ],
)
def test_gold_text(value, text):
    assert build_data.gold_text(value) == text


def test_rows_that_no_recipe_can_use_are_counted(tmp_path):
    (tmp_path / "light.jsonl").write_bytes(
        b'{"conversations": 3}\n{broken\n\xff\n'
        + json.dumps(light_row("a \ud800 b", trace(1))).encode()
        + b"\n"
        + json.dumps(light_row("fine", trace(1))).encode()
        + b"\n"
    )
    arguments = [
        "fast_math_r1_grpo",
        "--output",
        str(tmp_path / "o.jsonl"),
        "--light_r1",
        str(tmp_path / "light.jsonl"),
    ]
    build_data.build(build_data.make_parser().parse_args(arguments))
    report = json.loads((tmp_path / "o.jsonl.report.json").read_text())
    assert report["sources"]["light_r1_stage2"] == {
        "rows": 5,
        "kept": 1,
        "dropped": {
            "conversations is not a question and an answer": 1,
            "not JSON in UTF-8": 3,  # half a surrogate pair is no text either
        },
    }


def test_command_line_refuses_in_one_line(tmp_path, demo):
    build_command = [sys.executable, ROOT / "recipes/build_data.py", "fast_math_r1_grpo"]
    light = write(tmp_path / "light.json", [light_row("x", "no box")])
    (tmp_path / "empty").mkdir()
    for flags, words in [
        (["--output", tmp_path / "o.csv"], ".jsonl or .parquet"),
        (["--output", tmp_path / "o.jsonl", "--light_r1", tmp_path / "absent.json"], "absent.json"),
        (["--output", tmp_path / "o.jsonl", "--light_r1", light], "no row is left"),
        (
            [
                "--output",
                tmp_path / "o.jsonl",
                "--light_r1",
                light,
                "--benchmarks",
                tmp_path / "empty",
            ],
            "in it",
        ),
        (
            ["--output", tmp_path / "o.jsonl", "--light_r1", light, "--benchmarks", "amc"],
            "'amc' is",
        ),
    ]:
        done = run(*build_command, *flags)
        assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr, (
            done.stderr
        )
        assert not list(tmp_path.glob("o.*")), "a failed build leaves nothing behind"
    done = run(*build_command, "--output", tmp_path / "o.jsonl", "--dry_run")
    assert (
        done.returncode == 0
        and "stage2-3k.json" in done.stdout
        and not (tmp_path / "o.jsonl").exists()
    )


def test_real_tokenizer_counts(demo, tokenizer):
    count = build_data.token_counter(str(demo / "base"))
    texts = ["a=1, b=2", "", "Let a=3."]
    assert count(texts) == [
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts
    ]
    with pytest.raises(DataError, match="--tokenizer"):
        build_data.token_counter(str(demo / "nowhere"))


# --------------------------------------------------------------------------------------------------
# Decontamination
# --------------------------------------------------------------------------------------------------
WALK = (
    "Every morning Aya goes for a $9$-kilometer-long walk and stops at a coffee shop afterwards. "
    "When she walks at a constant speed of $s$ kilometers per hour, the walk takes her 4 hours."
)
SHORT_SUM = "Compute $3+4$."
ENDING = (
    "can be written as $\\frac{m}{n}$, where $m$ and $n$ are relatively prime positive integers. "
    "Find $m+n$."
)
BENCHMARK = [
    WALK,
    SHORT_SUM,
    "Find $\\dfrac{1}{2} + x$ if  $x = 5$",
    "A frog jumps on lily pads; its chance to drown " + ENDING,
]


@pytest.mark.parametrize(
    "problem, benchmark",
    [
        (WALK, 0),
        (WALK.upper().replace("$", ""), 0),
        (
            "A contest: every morning Aya goes for a 9 - kilometer - long walk and stops at a shop",
            0,
        ),
        ("COMPUTE  $3 + 4$", 1),
        ("Find \\(\\frac{1}{2}+x\\) if \\[x=5\\].", 2),
        ("find $\\tfrac{1}{2}+x$ if $x=5$.", 2),
        ("Compute $3-4$.", None),  # one sign makes another problem
        ("Compute $3+4$ and then $5$.", None),
        ("Every morning Aya goes for a 9 kilometer long walk and stops", None),  # 12 words
        ("Every morning Aya goes for a 9 kilometer long walk and stops at", 0),  # 13 words
        ("Every morning Bob goes for a 9 kilometer long walk and stops at a shop", None),
        ("The radius of the smaller circle " + ENDING, None),  # a stock ending is no copy
        ("The frog's chance to drown " + ENDING, 3),
        ("", None),
        ("...", None),
    ],
)
def test_planted_overlaps_are_found_and_near_misses_left(problem, benchmark):
    hit = build_data.overlap(problem, build_data.benchmark_index(BENCHMARK))
    assert (hit and hit[0]) == benchmark


def test_texts_without_words_are_no_copies_of_each_other():
    index = build_data.benchmark_index(["...", ""])
    assert [build_data.overlap(text, index) for text in ("?!", "  ")] == [None, None]


def test_words_and_position_do_not_matter():
    words = [f"word{i}" for i in range(60)]
    benchmark = " ".join(words)
    index = build_data.benchmark_index([benchmark])
    for start in (0, 20, 47):
        shared = " ".join(words[start : start + 13])
        assert build_data.overlap(f"before that {shared} and after", index) == (0, shared)
    broken = " ".join(words[:12]) + " other " + " ".join(words[13:25])
    assert build_data.overlap(broken, index) is None
    index = build_data.benchmark_index([benchmark], n=8)
    assert build_data.overlap(" ".join(words[:12]) + " other", index, n=8) is not None


def test_build_removes_and_lists_overlaps(tmp_path, word_counter):
    benchmarks = tmp_path / "benchmarks"
    benchmarks.mkdir()
    write(benchmarks / "walks.json", [{"problem": "another"}, {"problem": WALK, "answer": 204}])
    write(benchmarks / "sums.jsonl", [{"question": SHORT_SUM}])
    write(benchmarks / "sums_train.jsonl", [{"question": "fine"}])  # no benchmark
    light = [
        light_row("fine", trace(1)),
        light_row(WALK + " Find s.", trace(1)),
        light_row("compute $3 + 4$", trace(1)),
        light_row("ok", trace(1)),
    ]
    rows, report = build(
        tmp_path, "fast_math_r1_grpo", {"light_r1": light}, "--benchmarks", benchmarks
    )
    assert [row["problem"] for row in rows] == ["fine", "ok"]
    assert report["benchmark_problems"] == 3
    assert [(hit["row"], hit["benchmark"]) for hit in report["contaminated"]] == [
        (1, "walks:1"),
        (2, "sums:0"),
    ]
    assert report["sources"]["light_r1_stage2"]["dropped"] == {"overlaps with a benchmark": 2}


def check(capsys, file, *flags):
    """(rows that overlap, what is printed) of `build_data.py check`."""
    args = build_data.make_parser().parse_args(["check", str(file), *map(str, flags)])
    return build_data.check(args), capsys.readouterr().out


def test_check_counts_and_names_the_overlaps(tmp_path, capsys):
    benchmarks = tmp_path / "benchmarks"
    benchmarks.mkdir()
    write(benchmarks / "walks.json", [{"problem": WALK}])
    rows = [
        {"problem": "fine"},
        {"problem": WALK},
        light_row(WALK, "x"),
        {"problem": 3},
        {},
        {"prompt": [{"role": "user", "content": WALK}]},
    ]
    train = write(tmp_path / "train.jsonl", rows)
    count, printed = check(capsys, train, "--benchmarks", benchmarks)
    assert count == 3 and printed.startswith("OVERLAP: 3 of 4 problems of ")
    assert "2 rows without one, 1 benchmark problems" in printed
    assert "row 1 is walks:0" in printed and "row 5 is walks:0" in printed
    count, printed = check(
        capsys, write(tmp_path / "ok.jsonl", rows[:1]), "--benchmarks", benchmarks
    )
    assert count == 0 and printed.startswith("no overlap: 1 problems of ")
    with pytest.raises(DataError, match="none of 2 rows has a text in column 'problem'"):
        check(capsys, write(tmp_path / "x.jsonl", rows[3:5]), "--benchmarks", benchmarks)
    with pytest.raises(DataError, match="is no folder and none of aime24, .*; hub is all of these"):
        check(capsys, train, "--benchmarks", "aime24,nowhere")


def test_check_exits_with_an_error_for_an_overlap(tmp_path):
    folder = tmp_path / "exam"
    folder.mkdir()
    write(folder / "sums.jsonl", [{"question": SHORT_SUM}])
    command = [sys.executable, ROOT / "recipes/build_data.py", "check"]
    for rows, status in ([{"problem": "fine"}], 0), ([{"problem": "compute $3 + 4$."}], 1):
        file = write(tmp_path / "train.jsonl", rows)
        done = run(*command, file, "--benchmarks", folder)
        assert done.returncode == status, done.stderr
        assert ("OVERLAP: 1 of 1 problems" in done.stdout) == bool(status)
