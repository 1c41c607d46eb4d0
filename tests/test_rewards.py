"""The reward formulas, the rewards of a group, the killable workers, and grading a run again."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

import rewards
from rewards import RewardOptions, Worker, rewards_for_group

ROOT = Path(__file__).resolve().parent.parent
LONG = {"max_length": 30000}
OPEN_RS = {"max_length": 3584, "correct_at_0": 1.0, "correct_at_max": 0.5, "wrong_at_0": 0.0,
           "wrong_at_max": -0.5}


# --------------------------------------------------------------------------------------------------
# Formulas: the acceptance numbers, then agreement with the recipes' own code in other words
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length, correct, options, value",
    [
        (0, True, LONG, 1.0),
        (15000, True, LONG, 0.55),
        (30000, True, LONG, 0.1),
        (90000, True, LONG, 0.1),
        (0, False, LONG, -1.0),
        (15000, False, LONG, -0.55),
        (30000, False, LONG, -0.1),
        (90000, False, LONG, -0.1),
        (0, True, OPEN_RS, 1.0),
        (3584, True, OPEN_RS, 0.5),
        (7168, True, OPEN_RS, 0.5),
        (0, False, OPEN_RS, 0.0),
        (3584, False, OPEN_RS, -0.5),
        (7168, False, OPEN_RS, -0.5),
    ],
)
def test_cosine_acceptance(length, correct, options, value):
    assert rewards.cosine_reward(length, correct, **options) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    "lengths, correct, values",
    [
        ([100, 200, 300], [True] * 3, [0.5, 0.0, -0.5]),
        ([100, 200, 300], [False] * 3, [0.0, 0.0, -0.5]),
        ([100, 200, 300], [True, False, False], [0.5, 0.0, -0.5]),
        ([7, 7, 7], [True, False, True], [0.0] * 3),
        ([], [], []),
    ],
)
def test_length_acceptance(lengths, correct, values):
    assert rewards.length_rewards(lengths, correct) == pytest.approx(values)


def published_cosine(length, correct, min_wrong, max_wrong, min_correct, max_correct, max_len):
    """open-r1's form, with parameters named min and max: for wrong answers they change places."""
    progress = min(1.0, length / max_len)
    low, high = (min_correct, max_correct) if correct else (max_wrong, min_wrong)
    return low + 0.5 * (high - low) * (1.0 + math.cos(progress * math.pi))


def published_repetition(text, size, penalty):
    words = text.lower().split()
    ngrams = list(zip(*[words[i:] for i in range(size)], strict=False))
    return 0.0 if len(words) < size else (1 - len(set(ngrams)) / len(ngrams)) * penalty


def published_length(lengths, correct):
    if max(lengths) == min(lengths):
        return [0.0] * len(lengths)
    shares = [0.5 - (n - min(lengths)) / (max(lengths) - min(lengths)) for n in lengths]
    return [s if c else min(0, s) for s, c in zip(shares, correct, strict=True)]


def test_formulas_agree_with_the_published_ones_on_random_cases():
    draw = random.Random(0)
    for _ in range(3000):
        length, correct = draw.randint(0, 50000), draw.random() < 0.5
        limit = draw.choice([3584, 9600, 30000, 48000])
        low_wrong, high_wrong, low, high = (draw.uniform(-1, 1) for _ in range(4))
        ours = rewards.cosine_reward(length, correct, limit, high, low, low_wrong, high_wrong)
        theirs = published_cosine(length, correct, low_wrong, high_wrong, low, high, limit)
        assert ours == pytest.approx(theirs)
        lengths = [draw.randint(1, 9) for _ in range(draw.randint(1, 8))]
        rights = [draw.random() < 0.5 for _ in lengths]
        theirs = published_length(lengths, rights)
        assert rewards.length_rewards(lengths, rights) == pytest.approx(theirs)
        text = " ".join(draw.choice(["a", "B", "b", "c"]) for _ in range(draw.randint(0, 20)))
        theirs = published_repetition(text, 3, -1.0)
        assert rewards.repetition_penalty(text) == pytest.approx(theirs)


def test_format_open_rs_agrees_with_its_regular_expression():
    pieces = ["oxed{", "}", "</think>", "\\b", "{", "x", "\n", "\n</think>\n", "ox", "ed{"]
    draw, open_rs = random.Random(1), re.compile(r"\n</think>\n")
    for _ in range(20000):
        text = "".join(draw.choice(pieces) for _ in range(draw.randint(0, 14)))
        twice = "\n</think>\n</think>\n" in text  # overlapping
        ours = rewards.format_open_rs_reward(text)
        assert ours == float(len(open_rs.findall(text)) == 1) or twice, text


@pytest.mark.parametrize(
    "text, value",
    [
        (r"\boxed{5}</think>", 1),
        (r"<think> \boxed{\frac{1}{2}} </think> so", 1),
        (r"</think>\boxed{5}", 0),
        (r"\boxed{5}", 0),
        (r"\boxed{}</think>", 0),
        ("oxed{5}</think>", 0),
        (r"\boxed{5</think>}", 0),
        (r"\boxed{5</think>} </think>", 0),
        ("", 0),
    ],
)
def test_format_reward(text, value):
    assert rewards.format_reward(text) == value


def test_format_and_extraction_are_linear():
    for text in (
        "</think>oxed{" * 80000,
        "oxed{" * 200000,
        "\\boxed{" * 150000,
        "\\boxed" + " " * 10**6,
        "\\boxed{4} " + "\\boxed " * 120000,
        "}" * 10**6,
        "\n</think>\n" * 10**5,
        "\\boxed{" + "a" * 10**6 + "}",
        "oxed{}" * 160000,
        "\\boxed{5}" + "x" * 10**6,
    ):
        for function in (
            rewards.format_reward,
            rewards.format_open_rs_reward,
            rewards.extract_answer,
            lambda t: rewards.extract_answer(t, "before_think_end"),
        ):
            seconds = []
            for _ in range(3):
                started = time.process_time()
                function(text)
                seconds.append(time.process_time() - started)
            assert min(seconds) < 0.05, (text[:20], seconds)


def test_repetition_of_words():
    assert rewards.repetition_penalty("a b c a b c") == pytest.approx(-0.25)
    assert rewards.repetition_penalty("a b") == 0.0 == rewards.repetition_penalty("a b c d")
    assert rewards.repetition_penalty("1 1 1 1 1") == pytest.approx(-2 / 3)
    assert rewards.repetition_penalty("same " * 100) < -0.98


def test_soft_overlong():
    lengths = (0, 80, 90, 100, 200)
    penalties = [rewards.soft_overlong_penalty(n, max_length=100, cache=20) for n in lengths]
    assert penalties == pytest.approx([0, 0, -0.5, -1, -1])


# --------------------------------------------------------------------------------------------------
# A group
# --------------------------------------------------------------------------------------------------

RIGHT, WRONG, NONE = r"think \boxed{\frac12}</think>", r"think \boxed{3}</think>", "no box at all"


def group(options, texts=(RIGHT, WRONG, NONE), gold="0.5", lengths=(100, 200, 300)):
    return rewards_for_group(list(texts), gold, options, list(lengths))


def test_group_default_is_fast_math():
    scored = group(RewardOptions(cosine_max_length=200))
    assert scored.outcomes == ["right", "wrong", "no_answer"]
    assert scored.correct == [True, False, False] and scored.parts["format"] == [1, 1, 0]
    assert scored.parts["length"] == pytest.approx([0.5, 0, -0.5])
    assert scored.parts["cosine"] == pytest.approx([0.55, -0.1, -0.1])
    sums = [sum(part[i] for part in scored.parts.values()) for i in range(3)]
    assert scored.totals == pytest.approx(sums) and scored.lengths == [100, 200, 300]


def test_group_weights_and_every_reward():
    names = "accuracy,format,format_open_rs,cosine,length,repetition,soft_overlong"
    options = RewardOptions(reward_funcs=names, reward_weights="1,2,4,8,16,32,64",
                            max_completion_length=300, soft_overlong_cache=100)
    scored = group(options)
    assert list(scored.parts) == names.split(",")
    assert scored.parts["soft_overlong"] == pytest.approx([0, 0, -1])
    for i in range(3):
        parts = [part[i] for part in scored.parts.values()]
        assert scored.totals[i] == pytest.approx(sum(2**k * part for k, part in enumerate(parts)))


def test_which_box_counts_and_who_may_state_a_value_twice():
    late = [r"\boxed{1}</think> \boxed{0.5}"] * 3
    assert group(RewardOptions(), late).correct == [True] * 3
    assert group(RewardOptions(answer_scope="before_think_end"), late).correct == [False] * 3
    double = [r"\boxed{0.56}"] * 3
    assert group(RewardOptions(), double, gold=r"0.56=56\%").correct == [True] * 3


def test_unreadable_gold_pays_nobody():
    scored = group(RewardOptions(), gold="")
    assert all(math.isnan(total) for total in scored.totals) and scored.correct == [None] * 3
    assert scored.outcomes == ["bad_gold"] * 3
    scored = group(RewardOptions(reward_funcs="format"), gold="")
    assert all(math.isnan(total) for total in scored.totals)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"reward_funcs": ""}, "empty"),
        ({"reward_funcs": "acuracy"}, "acuracy"),
        ({"reward_weights": "1,2"}, "reward_weights"),
        ({"reward_funcs": "format,format"}, "twice"),
        ({"reward_funcs": "nowhere.py:f"}, "nowhere"),
        ({"reward_weights": "1,x,1"}, "x"),
        ({"reward_timeout": -1.0}, "reward_timeout"),
        ({"cosine_max_length": 0}, "cosine_max_length"),
        ({"answer_scope": "all"}, "answer_scope"),
    ],
)
def test_impossible_options_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        rewards.check_reward_options(replace(RewardOptions(), **change))


def test_options_are_parsed_once(monkeypatch):
    options = RewardOptions(reward_funcs="accuracy, format", reward_weights="1,0.5")
    assert rewards.check_reward_options(options) == [("accuracy", 1.0), ("format", 0.5)]
    monkeypatch.setattr(rewards, "part_name", None)  # what parsing would call
    assert rewards.check_reward_options(options) == [("accuracy", 1.0), ("format", 0.5)]


# --------------------------------------------------------------------------------------------------
# Workers
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    monkeypatch.setenv("GRANDCHILD_SECONDS", str(987000 + os.getpid()))  # for pgrep
    path = tmp_path / "user.py"
    path.write_text(
        textwrap.dedent("""
        import os, subprocess, time
        def reward(completion, answer):
            print("noise on standard output")
            if completion == "sleep": time.sleep(1000)
            if completion == "spin":
                while True: pass
            if completion == "grandchild":
                subprocess.run(["sleep", os.environ["GRANDCHILD_SECONDS"]])
            if completion == "die": os._exit(3)
            if completion == "raise": raise KeyError("x")
            if completion == "memory": return len(bytearray(10**11))
            if completion == "big": return len("y" * 10**6) / 1e6
            return 1.0 if completion == answer else 0.0
    """)
    )
    return f"{path}:reward"


def write_function(tmp_path, body):
    path = tmp_path / "function.py"
    path.write_text(f"import numpy\ndef f(completion, answer):\n    {body}\n")
    return f"{path}:f"


def test_stuck_and_dead_workers_are_replaced_and_order_is_kept(user_file):
    expected = {"a": 1.0, "sleep": "timeout", "b": 0.0, "die": "crash", "raise": "crash",
                "spin": "timeout", "memory": "crash", "grandchild": "timeout", "big": 1.0,
                "x" * 10**6: 0.0}
    worker = Worker(user_file)
    for text in [*expected, "a"]:
        outcome, value = worker.ask(text, "a", 3.0)
        assert (value if outcome == "done" else outcome) == expected[text]
        assert outcome == "done" or math.isnan(value)
    assert not pgrep(f"sleep {os.environ['GRANDCHILD_SECONDS']}")  # the whole group was killed
    worker.kill()


def test_a_worker_killed_from_outside_is_replaced(tmp_path):
    """Between two calls, and (the timer) in the middle of one."""
    worker = Worker(write_function(tmp_path, "import time; time.sleep(0.5); return 1"))
    for _ in range(2):
        assert worker.ask("", "", 5.0) == ("done", 1.0)
        os.kill(worker.process.pid, signal.SIGKILL)
    assert worker.ask("", "", 5.0) == ("done", 1.0)
    threading.Timer(0.25, os.kill, (worker.process.pid, signal.SIGKILL)).start()
    assert worker.ask("", "", 5.0) == ("done", 1.0)
    worker.kill()


def test_the_clock_starts_with_the_call_not_with_the_import(tmp_path):
    path = tmp_path / "slow.py"
    path.write_text("import time\ntime.sleep(3)\ndef f(c, a):\n    time.sleep(0.5)\n    return 1\n")
    worker = Worker(f"{path}:f")
    assert [worker.ask("x", "x", 2.0) for _ in range(5)] == [("done", 1.0)] * 5
    worker.kill()


def test_a_file_that_cannot_be_imported_says_why(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import nothing_of_this_name\n")
    with pytest.raises(ValueError, match="broken.py:f.*nothing_of_this_name"):
        Worker(f"{path}:f").ask("a", "b", 5.0)


@pytest.mark.parametrize("value", ["True", "1", "numpy.float32(1)", "numpy.int64(1)",
                                   "numpy.bool_(1)", "numpy.ones(())"])
def test_what_counts_as_a_number(tmp_path, value):
    worker = Worker(write_function(tmp_path, f"return {value}"))
    assert worker.ask("", "", 20.0) == ("done", 1.0)
    worker.kill()


@pytest.mark.parametrize("value", ["[0.5]", "(1.0, 2.0)", "{'reward': 1}", "'0.7'"])
def test_a_function_that_returns_no_number_is_refused_at_the_first_call(tmp_path, value):
    function = write_function(tmp_path, f"return {value}")
    with pytest.raises(ValueError, match=re.escape(value)):
        group(RewardOptions(reward_funcs=f"accuracy,{function}", reward_timeout=20.0))


def test_no_verdict_is_no_reward(tmp_path, capfd):
    """Rewards of -1 and 1: a call that fails must not be the best of the group."""
    function = write_function(
        tmp_path, "return 1 / 0 if completion == '7' else {'1': 1, '2': -1, '3': float('inf'), "
        "'4': None, '5': 'late', '6': 1j}[completion]")
    scored = group(RewardOptions(reward_funcs=function, reward_timeout=20.0), list("1234567"),
                   lengths=range(1, 8))
    assert scored.totals[:2] == [1, -1] and all(math.isnan(total) for total in scored.totals[2:])
    assert scored.outcomes[2:] == ["no_verdict"] * 4 + ["crash"]
    assert capfd.readouterr().err.count("gave no reward") == 1  # the first is shown


def test_a_worker_serves_several_threads(user_file):
    results, worker = {}, Worker(user_file)

    def ask(name):
        results[name] = [worker.ask(str(i), name, 5.0) for i in range(10)]

    threads = [threading.Thread(target=ask, args=(str(i),)) for i in range(5)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert results == {str(n): [("done", float(i == n)) for i in range(10)] for n in range(5)}
    worker.kill()


def test_user_reward_in_a_group(user_file):
    options = RewardOptions(reward_funcs=f"accuracy,{user_file}", reward_weights="1,10",
                            reward_timeout=3.0)
    scored = group(options, ["0.5", "sleep", RIGHT])
    assert scored.parts["reward"][::2] == [1.0, 0.0] and math.isnan(scored.parts["reward"][1])
    assert scored.totals[::2] == [10.0, 1.0] and math.isnan(scored.totals[1])
    assert scored.outcomes == ["no_answer", "timeout", "right"]
    assert scored.correct == [False, False, True]  # of the box, whatever the function did


def pgrep(pattern):
    found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=False)
    return found.stdout.split()


def test_no_orphans_when_the_parent_is_killed(user_file):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import rewards\n"
        f"worker = rewards.Worker({user_file!r})\n"
        "print(worker.ask('a', 'a', 60), flush=True)\n"
        "worker.ask('spin', 'a', 60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert "done" in parent.stdout.readline()
    deadline = time.monotonic() + 30
    while not pgrep(re.escape(user_file)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert pgrep(re.escape(f"--worker {user_file}"))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    while pgrep(re.escape(f"--worker {user_file}")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not pgrep(re.escape(f"--worker {user_file}"))


# --------------------------------------------------------------------------------------------------
# Grading a run again
# --------------------------------------------------------------------------------------------------


def write_run(folder, options, flip=()):
    """Two steps, two prompts, three answers; rows in `flip` are stored with the other verdict."""
    (folder / "rollouts").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**vars(options), "learning_rate": 1e-6}))
    number = 0
    for step in (1, 2):
        lines = []
        for p in (1, 2):
            scored = group(options, lengths=(100 * p, 200 * p, 300 * p))
            for s, text in enumerate((RIGHT, WRONG, NONE)):
                row = {
                    "step": step, "problem": "?", "answer": "0.5", "text": text, "token_ids": [1],
                    "finish_reason": "stop" if s < 2 else "length", "length": scored.lengths[s],
                    "correct": scored.correct[s], "outcome": scored.outcomes[s],
                    "rewards": {name: part[s] for name, part in scored.parts.items()},
                    "reward": scored.totals[s], "advantage": 0.0, "version": step,
                    "prompt_index": p, "sample_index": s,
                }
                if number in flip:
                    outcome = "wrong" if row["correct"] else "right"
                    row.update(correct=not row["correct"], outcome=outcome)
                lines.append(json.dumps(row))
                number += 1
        (folder / "rollouts" / f"step-{step:06d}.jsonl").write_text("\n".join(lines) + "\n")


def regrade(*arguments):
    command = [sys.executable, str(ROOT / "recipes" / "regrade.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("options", [RewardOptions(cosine_max_length=250),
                                     RewardOptions(reward_funcs="format,length")])
def test_regrade_of_an_unchanged_run_changes_nothing(tmp_path, options):
    write_run(tmp_path / "run", options)
    done = regrade(tmp_path / "run", "--output", tmp_path / "again.jsonl")
    assert done.returncode == 0 and "0 flips" in done.stdout, done.stderr
    files = [tmp_path / "run" / "rollouts" / f"step-{step:06d}.jsonl" for step in (1, 2)]
    stored = [json.loads(line) for file in files for line in file.open()]
    assert [json.loads(line) for line in (tmp_path / "again.jsonl").open()] == stored


def test_regrade_lists_flips_drops_torn_lines_and_writes_nothing_unasked(tmp_path):
    run = tmp_path / "run"
    write_run(run, RewardOptions(), flip=(0, 7))
    with open(run / "rollouts" / "step-000002.jsonl", "a") as file:
        file.write('{"step": 2, "text": "cut o')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = regrade(run)
    assert done.returncode == 0, done.stderr
    assert "2 flips: 1 to right, 1 to wrong, 0 to unknown" in done.stdout
    assert "12 completions in 4 groups: 4 no_answer, 4 right, 4 wrong" in done.stdout
    assert r"0.5 | \frac12" in done.stdout
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_regrade_refuses_what_is_no_run(tmp_path):
    done = regrade(tmp_path)
    assert done.returncode != 0 and "config.json" in done.stderr
