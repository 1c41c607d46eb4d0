"""The recipes' reward formulas, a group's rewards and their oddities, the killable workers, and grading a run again."""

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
from rewards import RewardOptions, WorkerPool, rewards_for_group, score_batch

ROOT = Path(__file__).resolve().parent.parent
CHARS = {"max_length": 30000}
OPEN_RS = {
    "max_length": 3584,
    "correct_at_0": 1.0,
    "correct_at_max": 0.5,
    "wrong_at_0": 0.0,
    "wrong_at_max": -0.5,
    "clip": False,
}


# ---------------------------------------------------------------------------------------------------------------------
# Formulas: the acceptance numbers, then agreement with the recipes' own code in other words
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length, correct, options, value",
    [
        (0, True, CHARS, 1.0),
        (15000, True, CHARS, 0.55),
        (30000, True, CHARS, 0.1),
        (90000, True, CHARS, 0.1),
        (0, False, CHARS, -1.0),
        (15000, False, CHARS, -0.55),
        (30000, False, CHARS, -0.1),
        (90000, False, CHARS, -0.1),
        (0, True, OPEN_RS, 1.0),
        (3584, True, OPEN_RS, 0.5),
        (7168, True, OPEN_RS, 1.0),
        (0, False, OPEN_RS, 0.0),
        (3584, False, OPEN_RS, -0.5),
        (7168, False, OPEN_RS, 0.0),
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


def published_cosine(length, correct, min_wrong, max_wrong, min_correct, max_correct, max_len, clip):
    """open-r1's form, whose parameters are named min and max: for wrong answers they change places."""
    progress = min(1.0, length / max_len) if clip else length / max_len
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
        length, correct, limit, clip = (
            draw.randint(0, 50000),
            draw.random() < 0.5,
            draw.choice([3584, 9600, 30000, 48000]),
            draw.random() < 0.5,
        )
        low_wrong, high_wrong, low, high = (draw.uniform(-1, 1) for _ in range(4))
        assert rewards.cosine_reward(length, correct, limit, high, low, low_wrong, high_wrong, clip) == pytest.approx(
            published_cosine(length, correct, low_wrong, high_wrong, low, high, limit, clip)
        )
        lengths = [draw.randint(1, 9) for _ in range(draw.randint(1, 8))]
        rights = [draw.random() < 0.5 for _ in lengths]
        assert rewards.length_rewards(lengths, rights) == pytest.approx(published_length(lengths, rights))
        text = " ".join(draw.choice(["a", "B", "b", "c"]) for _ in range(draw.randint(0, 20)))
        assert rewards.repetition_penalty(text) == pytest.approx(published_repetition(text, 3, -1.0))


def test_format_rewards_agree_with_the_regular_expressions_on_random_strings():
    draw, pieces = random.Random(1), ["oxed{", "}", "</think>", "\\b", "{", "x", "\n", "\n</think>\n", "ox", "ed{"]
    fast_math, open_rs = re.compile(r"^.*?oxed{(.*?)}.*?</think>.*?$", re.DOTALL), re.compile(r"\n</think>\n")
    for _ in range(20000):
        text = "".join(draw.choice(pieces) for _ in range(draw.randint(0, 14)))
        assert rewards.format_reward(text, strict=False) == float(fast_math.match(text) is not None), text
        assert rewards.format_open_rs_reward(text) == float(len(open_rs.findall(text)) == 1) or text.count(
            "\n</think>\n</think>\n"
        ), text


@pytest.mark.parametrize(
    "text, strict, loose",
    [
        (r"\boxed{5}</think>", 1, 1),
        (r"<think> \boxed{\frac{1}{2}} </think> so", 1, 1),
        (r"</think>\boxed{5}", 0, 0),
        (r"\boxed{5}", 0, 0),
        (r"\boxed{}</think>", 0, 1),
        ("oxed{5}</think>", 0, 1),
        (r"\boxed{5</think>}", 0, 0),
        (r"\boxed{5</think>} </think>", 0, 1),
        ("", 0, 0),
    ],
)
def test_format_reward(text, strict, loose):
    assert (rewards.format_reward(text), rewards.format_reward(text, strict=False)) == (strict, loose)


def test_format_and_extraction_are_linear():
    for text in (
        "</think>oxed{" * 80000,
        "oxed{" * 200000,
        "\\boxed{" * 150000,
        "\\boxed" + " " * 10**6,
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
            lambda t: rewards.format_reward(t, strict=False),
            lambda t: rewards.extract_answer(t, "before_think_end"),
        ):
            seconds = []
            for _ in range(3):
                started = time.process_time()
                function(text)
                seconds.append(time.process_time() - started)
            assert min(seconds) < 0.05, (text[:20], seconds)


def test_repetition_of_words_and_ids():
    assert (
        rewards.repetition_penalty("a b c a b c") == pytest.approx(-0.25) and rewards.repetition_penalty("a b") == 0.0
    )
    assert rewards.repetition_penalty([1, 1, 1, 1, 1], 3, -2.0) == pytest.approx(-2.0 * 2 / 3)
    assert rewards.repetition_penalty("same " * 100) < -0.98


def test_soft_overlong():
    penalties = [rewards.soft_overlong_penalty(n, max_length=100, cache=20) for n in (0, 80, 90, 100, 200)]
    assert penalties == pytest.approx([0, 0, -0.5, -1, -1])


# ---------------------------------------------------------------------------------------------------------------------
# A group
# ---------------------------------------------------------------------------------------------------------------------

RIGHT, WRONG, NONE = r"think \boxed{\frac12}</think>", r"think \boxed{3}</think>", "no box at all"


def group(options, texts=(RIGHT, WRONG, NONE), gold="0.5", lengths=(100, 200, 300), truncated=(False, False, True)):
    return rewards_for_group(list(texts), gold, options, lengths=list(lengths), truncated=list(truncated))


def test_group_default_is_fast_math():
    scored = group(RewardOptions(cosine_max_length=200))
    assert scored.outcomes == ["right", "wrong", "no_answer"] and scored.correct == [True, False, False]
    assert scored.parts["format"] == [1, 1, 0] and scored.parts["length"] == pytest.approx([0.5, 0, -0.5])
    assert scored.parts["cosine"] == pytest.approx([0.55, -0.1, -0.1])
    assert scored.totals == pytest.approx([sum(part[i] for part in scored.parts.values()) for i in range(3)])


def test_group_weights_and_every_reward():
    names = "accuracy,format,format_open_rs,cosine,length,repetition,soft_overlong"
    scored = group(
        RewardOptions(
            reward_funcs=names, reward_weights="1,2,4,8,16,32,64", max_completion_length=300, soft_overlong_cache=100
        )
    )
    assert list(scored.parts) == names.split(",") and scored.parts["soft_overlong"] == pytest.approx([0, 0, -1])
    for i in range(3):
        assert scored.totals[i] == pytest.approx(sum(2**k * part[i] for k, part in enumerate(scored.parts.values())))


def test_group_oddities_can_be_switched_on():
    chars = group(RewardOptions(length_unit="chars", cosine_max_length=30000))
    assert chars.lengths == [len(RIGHT), len(WRONG), len(NONE)]
    assert group(RewardOptions(cosine_truncated=-7.0)).parts["cosine"][2] == -7.0
    loose = group(RewardOptions(format_strict=False), texts=[r"\boxed{}</think>"] * 3)
    assert loose.parts["format"] == [1, 1, 1]
    late = [r"\boxed{1}</think> \boxed{0.5}"] * 3
    assert group(RewardOptions(), late).correct == [True] * 3
    assert group(RewardOptions(answer_scope="before_think_end"), late).correct == [False] * 3
    double = [r"\boxed{0.56}"] * 3
    assert group(RewardOptions(), double, gold=r"0.56=56\%").correct == [True] * 3
    assert group(RewardOptions(swap_verify=True), double, gold=r"0.56=56\%").correct == [False] * 3


def test_unreadable_gold_pays_nobody_unless_asked():
    scored = group(RewardOptions(), gold="")
    assert (
        all(math.isnan(t) for t in scored.totals)
        and scored.correct == [None] * 3
        and scored.outcomes == ["bad_gold"] * 3
    )
    assert group(RewardOptions(reward_funcs="accuracy", bad_gold_reward=1.0), gold="").totals == [1.0] * 3
    assert group(RewardOptions(reward_funcs="accuracy", bad_gold_reward=0.0), gold="").totals == [0.0] * 3


def test_length_over_a_local_batch():
    options = RewardOptions(reward_funcs="length", length_scope="local_batch", length_prompts=2)
    scored = [
        group(options, [RIGHT] * 2, lengths=pair, truncated=[False] * 2) for pair in ((100, 200), (300, 500), (10, 20))
    ]
    alone = scored[0].parts["length"]
    rewards.rescore_length_over_batch(scored, options)
    assert alone == pytest.approx([0.5, -0.5]) and scored[0].totals == pytest.approx([0.5, 0.25])
    assert scored[1].totals == pytest.approx([0.0, -0.5]) and scored[2].totals == pytest.approx([0.5, -0.5])


@pytest.mark.parametrize(
    "change, word",
    [
        ({"reward_funcs": ""}, "empty"),
        ({"reward_funcs": "acuracy"}, "acuracy"),
        ({"reward_weights": "1,2"}, "reward_weights"),
        ({"reward_funcs": "format,format"}, "twice"),
        ({"reward_funcs": "nowhere.py:f"}, "nowhere"),
        ({"length_unit": "words"}, "words"),
        ({"cosine_max_length": 0}, "cosine_max_length"),
        ({"answer_scope": "all"}, "answer_scope"),
    ],
)
def test_impossible_options_are_refused(change, word):
    with pytest.raises(ValueError, match=word):
        rewards.check_reward_options(replace(RewardOptions(), **change))


def test_score_batch_counts_apart():
    outcomes, counts = score_batch([RIGHT, WRONG, NONE, RIGHT], ["1/2"] * 4)
    assert outcomes == ["right", "wrong", "no_answer", "right"] and counts == {"right": 2, "wrong": 1, "no_answer": 1}


# ---------------------------------------------------------------------------------------------------------------------
# Workers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    monkeypatch.setenv("GRANDCHILD_SECONDS", str(987000 + os.getpid()))  # a name of its own for pgrep
    path = tmp_path / "user.py"
    path.write_text(
        textwrap.dedent("""
        import os, subprocess, time
        def reward(completion, answer):
            print("noise on standard output")
            if completion == "sleep": time.sleep(1000)
            if completion == "spin":
                while True: pass
            if completion == "grandchild": subprocess.run(["sleep", os.environ["GRANDCHILD_SECONDS"]])
            if completion == "die": os._exit(3)
            if completion == "raise": raise KeyError("x")
            if completion == "memory": return len(bytearray(10**11))
            if completion == "nan": return float("nan")
            if completion == "big": return len("y" * 10**6) / 1e6
            return 1.0 if completion == answer else 0.0
    """)
    )
    return f"{path}:reward"


def test_stuck_and_dead_workers_are_replaced_and_order_is_kept(user_file):
    texts = ["a", "sleep", "b", "die", "a", "raise", "spin", "memory", "nan", "grandchild", "big", "x" * 10**6, "a"]
    expected = [
        "right",
        "timeout",
        "wrong",
        "crash",
        "right",
        "crash",
        "timeout",
        "crash",
        "crash",
        "timeout",
        "right",
        "wrong",
        "right",
    ]
    outcomes, counts = score_batch(texts, ["a"] * len(texts), function=user_file, timeout=3)
    assert outcomes == expected and counts["timeout"] == 3 and counts["crash"] == 4
    assert not pgrep(f"sleep {os.environ['GRANDCHILD_SECONDS']}")  # the whole group was killed


def test_the_clock_starts_when_the_worker_takes_the_item(tmp_path):
    path = tmp_path / "slow.py"
    path.write_text("import time\ntime.sleep(1)\ndef f(c, a):\n    time.sleep(0.5)\n    return 1\n")
    outcomes, _ = score_batch(["x"] * 9, ["x"] * 9, function=f"{path}:f", timeout=3, workers=1)
    assert outcomes == ["right"] * 9  # 9 x 0.5 s in line, and 1 s of import: far beyond 3 s from the start


def test_broken_user_file_is_a_crash_and_says_why(tmp_path, capsys):
    path = tmp_path / "broken.py"
    path.write_text("import nothing_of_this_name\n")
    outcomes, _ = score_batch(["a", "b"], ["a", "b"], function=f"{path}:f")
    assert outcomes == ["crash", "crash"] and "nothing_of_this_name" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected"):
        WorkerPool("nofile.py:f")


def test_pool_serves_several_threads(user_file):
    results = {}
    with WorkerPool(user_file, workers=2, timeout=5) as pool:

        def ask(name):
            results[name] = pool.map([(str(i), name) for i in range(10)])

        threads = [threading.Thread(target=ask, args=(str(i),)) for i in range(5)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert results == {str(n): [("done", float(i == n)) for i in range(10)] for n in range(5)}


def test_user_reward_in_a_group(user_file):
    options = RewardOptions(reward_funcs=f"accuracy,{user_file}", reward_weights="1,10", reward_timeout=3.0)
    scored = group(options, ["0.5", "sleep", RIGHT])
    assert scored.parts["reward"] == [1.0, 0.0, 0.0] and scored.totals == [10.0, 0.0, 1.0]
    assert scored.outcomes == ["no_answer", "timeout", "right"]


def pgrep(pattern):
    return subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True, check=False).stdout.split()


def test_no_orphans_when_the_parent_is_killed(user_file):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import rewards\n"
        f"pool = rewards.WorkerPool({user_file!r}, workers=3, timeout=60)\n"
        "print(pool.map([('a', 'a')] * 3), flush=True)\n"
        "pool.map([('spin', 'a')] * 3)"
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


# ---------------------------------------------------------------------------------------------------------------------
# Grading a run again
# ---------------------------------------------------------------------------------------------------------------------


def write_run(folder, options, flip=()):
    """A run of two steps with two prompts of three answers; rows in `flip` are stored with the opposite verdict."""
    (folder / "rollouts").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**vars(options), "learning_rate": 1e-6}))
    number = 0
    for step in (1, 2):
        lines = []
        scored_groups = [group(options, lengths=(100 * p, 200 * p, 300 * p)) for p in (1, 2)]
        rewards.rescore_length_over_batch(scored_groups, options)
        for p, scored in enumerate(scored_groups):
            for s, text in enumerate((RIGHT, WRONG, NONE)):
                row = {
                    "step": step,
                    "problem": "?",
                    "answer": "0.5",
                    "text": text,
                    "token_ids": [1],
                    "finish_reason": "stop" if s < 2 else "length",
                    "length": scored.lengths[s],
                    "correct": scored.correct[s],
                    "outcome": scored.outcomes[s],
                    "rewards": {name: part[s] for name, part in scored.parts.items()},
                    "reward": scored.totals[s],
                    "advantage": 0.0,
                    "version": step,
                    "prompt_index": p,
                    "sample_index": s,
                }
                if number in flip:
                    row.update(correct=not row["correct"], outcome="wrong" if row["correct"] else "right")
                lines.append(json.dumps(row))
                number += 1
        (folder / "rollouts" / f"step-{step:06d}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "options",
    [RewardOptions(cosine_max_length=250), RewardOptions(reward_funcs="format,length", length_scope="local_batch")],
)
def test_regrade_of_an_unchanged_run_changes_nothing(tmp_path, options, capsys):
    write_run(tmp_path / "run", options)
    assert rewards.regrade(tmp_path / "run", tmp_path / "again.jsonl") == 0
    stored = [
        json.loads(line)
        for step in (1, 2)
        for line in (tmp_path / "run" / "rollouts" / f"step-{step:06d}.jsonl").open()
    ]
    assert [json.loads(line) for line in (tmp_path / "again.jsonl").open()] == stored
    assert "0 flips" in capsys.readouterr().out


def test_regrade_lists_flips_counts_torn_lines_and_writes_nothing_unasked(tmp_path):
    run = tmp_path / "run"
    write_run(run, RewardOptions(), flip=(0, 7))
    with open(run / "rollouts" / "step-000002.jsonl", "a") as file:
        file.write('{"step": 2, "text": "cut o')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = subprocess.run(
        [sys.executable, str(ROOT / "rewards.py"), "regrade", str(run)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "2 flips: 1 to right, 1 to wrong, 0 to unknown; 1 torn lines skipped" in done.stdout
    assert (
        "12 completions in 4 groups: 4 no_answer, 4 right, 4 wrong" in done.stdout and r"0.5 | \frac12" in done.stdout
    )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_regrade_refuses_what_is_no_run(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "rewards.py"), "regrade", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and "config.json" in done.stderr
