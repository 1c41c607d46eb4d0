"""train_grpo.py end to end: real vLLM, two ranks, kills, refusals."""

import contextlib
import math
import re
import signal
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import read_rows, run_script, start, wait_for

import train_grpo
from rollout import EngineLayout

DIGITS_REWARD = '''
def digits(completion, answer):
    """Ten times the share of digits, at most 1: a random model learns it within a few steps."""
    return min(1.0, 10 * sum(c in "0123456789" for c in completion) / max(1, len(completion)))
'''


def flags(demo, output, **options):
    options = {
        "model_name_or_path": demo / "base", "dataset": demo / "rl.jsonl", "system_prompt": "none",
        "output_dir": output, "max_prompt_length": 128, "max_completion_length": 24,
        "num_prompts_per_step": 4, "num_generations": 4, "max_steps": 4, "learning_rate": "2e-3",
        "beta": 0, "top_p": 1, "min_p": 0, "reward_funcs": f"{demo / 'reward.py'}:digits",
        "activation_checkpointing": "none", "save_steps": 2, "sync_dir": output.parent, **options}
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module", autouse=True)
def reward_file(demo):
    (demo / "reward.py").write_text(DIGITS_REWARD)


def metrics(output):
    return read_rows(output / "metrics.jsonl")


def rollouts(output, step):
    return read_rows(output / f"rollouts/step-{step:06d}.jsonl")


def engines_of(text):
    """vLLM engine processes with a file open that names `text`; none may outlive the trainer."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any("--serve" in part for part in process.info["cmdline"] or []):
            with contextlib.suppress(psutil.Error):  # it ends while we look
                if any(str(text) in file.path for file in process.open_files()):
                    found.append(process)
    return found


@pytest.fixture(scope="module")
def learned(tmp_path_factory, demo):
    """Two ranks, twelve steps, undisturbed."""
    output = tmp_path_factory.mktemp("grpo") / "learned"
    done = run_script("train_grpo.py", *flags(
        demo, output, max_steps=12, dynamic_sampling_rounds=1, eval_dataset=demo / "test.jsonl",
        eval_steps=12, eval_num_samples=1), ranks=2, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return output


def test_the_reward_rises_and_everything_is_logged(learned):
    rows = metrics(learned)
    assert [row["step"] for row in rows] == list(range(1, 13))
    first, last = (np.mean([row["reward/digits"] for row in rows[i:i + 3]]) for i in (0, 9))
    assert last > first + 0.15
    expected = {"loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "peak_memory_gb",
                "reward/total", "completions/truncated", "update/clip_low", "update/clip_high",
                "sync/logprob_gap", "time/rollout", "time/update", "time/sync"}
    assert expected <= set(rows[0]) and "eval/pass@1" in rows[-1]
    assert rows[-1]["rollout/engine_restarts"] == 0
    # on policy, without cut-off sampling: engine and trainer agree, the ratio is one
    for row in rows:
        assert row["sync/logprob_gap"] < 1e-4 and row["rollout/logprob_gap"] < 1e-4
        assert abs(row["update/ratio"] - 1) < 1e-6


def test_every_completion_is_stored_and_no_prompt_is_repeated_or_skipped(learned, demo, tokenizer):
    seen, rows = [], read_rows(demo / "rl.jsonl")
    for step in range(1, 13):
        completions = rollouts(learned, step)
        assert len(completions) == 16 and {c["version"] for c in completions} == {step - 1}
        for c in completions:
            row = rows[c["row"]]
            assert c["problem"] == row["problem"] and c["answer"] == row["answer"]
            stopped = c["token_ids"][-1] == tokenizer.eos_token_id
            assert (c["finish_reason"] == "stop") == stopped and c["length"] == len(c["token_ids"])
            assert c["text"] == tokenizer.decode(c["token_ids"][:-1] if stopped else c["token_ids"])
            for name in ("rollout_logprobs", "logprobs", "entropy"):
                assert len(c[name]) == c["length"]
            assert c["logprobs"] == pytest.approx(c["rollout_logprobs"], abs=2e-4)
            assert min(c["entropy"]) > 0
            assert c["weight"] == 1 / c["length"]
            digits = sum(character in "0123456789" for character in c["text"])
            share = digits / max(1, len(c["text"]))
            assert c["reward"] == c["rewards"]["digits"] == pytest.approx(min(1.0, 10 * share))
        groups = [[c for c in completions if c["prompt_index"] == p] for p in range(4)]
        for group in groups:
            assert len({c["row"] for c in group}) == 1
            assert [c["sample_index"] for c in group] == [0, 1, 2, 3]
            assert abs(sum(c["advantage"] for c in group)) < 1e-6
        seen += [group[0]["row"] for group in groups]
    assert len(set(seen)) == len(seen)
    replaced = int(sum(row["dynamic_sampling/replaced"] for row in metrics(learned)))
    places = range(len(seen) + replaced)
    assert set(seen) <= set(train_grpo.prompts_at(range(len(rows)), places, seed=42))


def test_final_loads_in_transformers(learned):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(learned / "final")
    tokenizer = transformers.AutoTokenizer.from_pretrained(learned / "final")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_killed_engine_and_a_killed_trainer_change_nothing(tmp_path, demo, learned):
    """kill -9 of an engine in the middle of a rollout, then of all ranks: no process is left."""
    output = tmp_path / "run"
    arguments = flags(demo, output, max_completion_length=400, max_steps=4)
    process = start("train_grpo.py", *arguments)
    log = output / "engine-0.log"
    wait_for(lambda: log.exists() and "init engine" in log.read_text(), process)
    time.sleep(0.7)  # a forward to try the model; then some seconds of sampling
    engines_of(log)[0].kill()
    wait_for(lambda: (output / "rollouts/step-000003.jsonl").exists(), process)
    assert metrics(output)[-1]["rollout/engine_restarts"] == 1
    # The batch is complete, and is what an undisturbed run samples: of shorter answers, which are
    # the beginnings of these. (learned has replaced a group whose short answers earn the same.)
    short = {(c["row"], c["sample_index"]): c["token_ids"] for c in rollouts(learned, 1)}
    long = {(c["row"], c["sample_index"]): c["token_ids"] for c in rollouts(output, 1)}
    common = short.keys() & long.keys()
    assert len(long) == 16 and len(common) >= 8
    assert all(long[key][:24] == short[key] for key in common)

    victims = [*psutil.Process(process.pid).children(recursive=True)]
    for victim in [v for v in victims if "--serve" not in v.cmdline()]:  # engines are on their own
        victim.send_signal(signal.SIGKILL)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while engines_of(output) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not engines_of(output)
    before = {step: rollouts(output, step) for step in (1, 2)}
    done = run_script("train_grpo.py", *arguments, "--resume", "True", ranks=2, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["step"] for row in metrics(output)] == [1, 2, 3, 4]
    problems = [row["problem"] for row in read_rows(demo / "rl.jsonl")]
    order = train_grpo.prompts_at(problems, range(16), seed=42)
    for step in range(1, 5):
        rows = rollouts(output, step)
        assert [rows[4 * p]["problem"] for p in range(4)] == order[4 * step - 4:4 * step]
        assert {r["version"] for r in rows} == {step - 1}
        if step in before:
            assert rows == before[step]


def test_beta_iterations_and_cut_off_sampling_run(tmp_path, demo):
    """Together: reference, two iterations, sequence ratios, masked truncation, top_p and min_p."""
    output = tmp_path / "run"
    two = (demo / "rl.jsonl").read_text().splitlines()[:2]
    (tmp_path / "two.jsonl").write_text("\n".join(two))
    done = run_script("train_grpo.py", *flags(
        demo, output, dataset=tmp_path / "two.jsonl", beta=0.04, num_iterations=2,
        importance_sampling_level="sequence", loss_type="dapo",
        scale_rewards="batch", mask_truncated_completions="True",
        top_p=0.95, min_p=0.01, temperature=1.2,
        reward_funcs="format,cosine,length,repetition,soft_overlong",
        num_prompts_per_step=3, num_generations=3, max_steps=2, max_completion_length=200,
        max_tokens_per_microbatch=328), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "weights up to 2.0" in done.stdout
    rows = metrics(output)
    assert 0 < rows[0]["completions/truncated"] < 1  # some are masked, some are trained on
    assert rows[0]["update/kl"] > 0 and "time/reference" in rows[0]  # of the second iteration
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    stored = rollouts(output, 1)
    # three prompts out of two problems: the repeated one gets other answers
    assert len({row["problem"] for row in stored}) == 2
    assert len({tuple(row["token_ids"]) for row in stored}) == 9
    assert not list(tmp_path.glob("grpo-*"))  # the weights that were handed over are gone


WRONG = {
    "--loss_type": ("ppo", "--loss_type 'ppo': choose one of grpo, dapo, dr_grpo"),
    "--num_generations": ("1", "use 2 or more"),
    "--top_p": ("1.5", "--top_p 1.5 is a share"),
    "--reward_funcs": ("fromat", "--reward_funcs 'fromat'"),
    "--max_tokens_per_microbatch": ("100", "below the longest prompt + answer"),
    "--tensor_parallel_size": ("3", "--tensor_parallel_size 3 must divide"),
    "--answer_column": ("solution", "no answer in column 'solution'"),
    "--max_prompt_length": ("5", "prompt longer than 5 tokens"),
    "--sync_dir": ("/proc/nowhere", "/proc/nowhere"),
}


@pytest.mark.parametrize("flag", WRONG)
def test_wrong_input_is_one_clear_line(flag, tmp_path, demo):
    value, message = WRONG[flag]
    done = run_script("train_grpo.py", *flags(demo, tmp_path / "run"), flag, value)
    lines = [line for line in done.stderr.splitlines() if "train_grpo.py: " in line]
    assert done.returncode in (1, 2), done.stderr[-2000:]
    assert len(lines) == 1 and message in lines[0], done.stderr[-2000:]
    assert "Traceback" not in done.stderr and not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize(("flag", "value"), [
    ("max_grad_norm", -1.0), ("adam_beta2", 1.5), ("temperature", 0.0), ("min_p", -0.1),
    ("gpu_memory_utilization", 1.2), ("eval_num_samples", 0), ("weight_decay", -0.1)])
def test_impossible_numbers_are_refused_by_name(flag, value):
    with pytest.raises(ValueError, match=f"--{flag} {value}"):
        train_grpo.check_config(train_grpo.GRPOConfig(**{flag: value}))


def test_the_engine_gets_the_tokenizers_vocabulary_and_the_templates_stop_token(monkeypatch):
    monkeypatch.setattr(train_grpo, "Engine", lambda folder, **options: options)
    ctx = SimpleNamespace(device=torch.device("cpu"), compute_dtype=torch.float32)
    layout = EngineLayout(owns_engine=True, index=0, count=1, devices=[0])
    options = train_grpo.start_engine(train_grpo.GRPOConfig(), ctx, layout, "base", 350, 7, [1])
    assert options["vocab_size"] == 350 and options["stop_token_id"] == 7


def test_dry_run_prints_the_plan(tmp_path, demo):
    arguments = flags(demo, tmp_path / "run", num_prompts_per_step=16, num_generations=8)
    plan = "--dry_run", "True", "--ranks", "8", "--tensor_parallel_size", "4"
    done = run_script("train_grpo.py", *arguments, *plan)
    assert done.returncode == 0 and "16 prompts x 8 answers = 128" in done.stdout
    assert "engines    2 x 4 rank(s)" in done.stdout, done.stdout
    assert not (tmp_path / "run").exists()
    assert re.search(r"\nmemory +peak \d+\.\d GB per rank", done.stdout), done.stdout
    assert re.search(r"\npadding +\d+ ids beyond the tokenizer's: never sampled", done.stdout)


BROKEN_REWARDS = '''
def broken(completion, answer):
    raise KeyError("no such thing")
'''


def test_a_broken_reward_function_ends_the_run_and_pays_nobody(tmp_path, demo):
    (tmp_path / "mine.py").write_text(BROKEN_REWARDS)
    done = run_script("train_grpo.py", *flags(
        demo, tmp_path / "run", reward_funcs=f"{tmp_path / 'mine.py'}:broken"))
    assert done.returncode != 0, done.stderr[-2000:]
    assert "100% of the answers have no reward" in done.stderr, done.stderr[-2000:]
    (row,) = metrics(tmp_path / "run")
    assert row["grad_norm"] == 0 and row["grading/crash"] == 16
