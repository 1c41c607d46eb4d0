"""The recipes as scripts: they parse, their plans have the papers' batch shapes, their flags are the programs' own."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, run
from transformers.hf_argparser import HfArgumentParser

import data
import evaluate
import train_grpo
import train_sft

RECIPES = sorted((ROOT / "recipes").glob("*.sh")) + [ROOT / "recipes" / "slurm.sbatch"]
R1, NEMOTRON, QWEN3 = ("fast_math_r1_14b.sh",), ("fast_openmath_nemotron_14b.sh",), ("fast_math_qwen3_14b.sh",)
RS1, RS2, RS3 = (("open_rs.sh", name) for name in ("rs1", "rs2", "rs3"))
GRPO_RECIPES = [R1, NEMOTRON, QWEN3, RS1, RS2, RS3]


def recipe(script, *arguments, **environment):
    """Run `bash recipes/NAME ...` and return its standard output; it must succeed."""
    done = run("bash", ROOT / "recipes" / script[0], *script[1:], *arguments, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def command(script, stage, *flags, faithful=False, **environment):
    """The arguments of the program that a stage would launch, as the shell splits them."""
    line = recipe(script, *(["--faithful"] if faithful else []), stage, *flags, LAUNCH="echo", **environment)
    return shlex.split(line.strip().splitlines()[-1])[1:]


def parse(config_class, arguments):
    (config,) = HfArgumentParser(config_class, allow_abbrev=False).parse_args_into_dataclasses(arguments)
    return config


def dry_run(script, stage, *flags, **environment):
    """The plan that a stage prints on a single rank."""
    flags = (*flags, "--benchmark_dir", "", "--dry_run")
    return recipe(script, stage, *flags, GPUS="1", LAUNCH=f"{sys.executable}", **environment)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_scripts_parse(path):
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    if path.name not in ("setup.sh", "stages.sh"):  # those are sourced
        assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text


# ---------------------------------------------------------------------------------------------------------------------
# Batch shapes
# ---------------------------------------------------------------------------------------------------------------------
def stated_lengths(rows=7900, mean=7580, seed=0):
    """Lengths of stage 1's documents as published: mean 7.58k tokens, 0.5 % above 19,000, none above 24,000."""
    import numpy as np

    lengths = np.exp(np.random.default_rng(seed).normal(8.859, 0.386, rows))
    lengths = (lengths * mean / lengths.mean()).clip(200, 24000).astype(int)
    assert abs(lengths.mean() - mean) < 50 and 0.002 < (lengths > 19000).mean() < 0.01
    return lengths.tolist()


def test_stage_1_is_64_packs_of_24000_tokens(demo, tmp_path):
    flags = ("--model_name_or_path", demo / "base", "--dataset", demo / "train.jsonl", "--cache_dir", tmp_path)
    assert "64 packs = 64 x 1 ranks, up to 1,536,000 tokens" in dry_run(R1, "sft", *flags)
    for gpus, nodes in ((8, 1), (4, 1), (8, 2)):
        config = parse(train_sft.SFTConfig, command(R1, "sft", GPUS=str(gpus), NODES=str(nodes)))
        assert config.gradient_accumulation_steps * gpus * nodes == 64 and config.max_length == 24000


def test_stage_1_on_two_ranks_under_torchrun(demo, tmp_path):
    flags = ("--model_name_or_path", demo / "base", "--dataset", demo / "train.jsonl", "--cache_dir", tmp_path)
    assert "64 packs = 32 x 2 ranks, up to 1,536,000 tokens" in recipe(
        R1, "sft", *flags, "--benchmark_dir", demo, "--dry_run", GPUS="2")


def test_39_steps_per_epoch_at_full_size():
    config = parse(train_sft.SFTConfig, command(R1, "sft", GPUS="8"))

    class Document:
        def __init__(self, length):
            self.length = length

        def __len__(self):
            return self.length

    packs = data.make_packs([Document(n) for n in stated_lengths()], config.max_length)
    steps = data.steps_of_epoch(len(packs), config.gradient_accumulation_steps * 8, config.seed, 0)
    assert abs(len(steps) - 39) <= 1 and max(map(len, steps)) <= 64


def test_39_steps_per_epoch_in_the_printed_plan(demo, tokenizer, tmp_path):
    """The recipe's own command on 7,900 rows a hundred times shorter, with packs a hundred times shorter."""
    ending = data.end_of_turn(tokenizer)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "7"}]
    overhead = len(data.encode_document(tokenizer, messages, ending)) - 1
    rows = [{"problem": "a", "generation": "7" * max(1, n // 100 - overhead)} for n in stated_lengths()]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = dry_run(
        R1,
        "sft",
        "--model_name_or_path",
        demo / "base",
        "--dataset",
        tmp_path / "train.jsonl",
        "--cache_dir",
        tmp_path,
        "--max_length",
        240,
        "--system_prompt",
        "none",
        "--chat_template",
        "tokenizer",
    )
    assert abs(int(re.search(r"(\d+) steps per epoch", plan)[1]) - 39) <= 1, plan
    assert "7,900 of 7,900 rows kept" in plan and "10 steps" not in plan


@pytest.mark.parametrize(
    "script, prompts, answers, answer_tokens, steps",
    [
        (R1, 16, 8, "16,384", 50),
        (NEMOTRON, 16, 8, "24,000", 50),
        (QWEN3, 8, 8, "24,000", 50),
        (RS1, 12, 6, "4,096", 100),
        (RS2, 12, 6, "3,584", 50),
        (RS3, 12, 6, "3,584", 50),
    ],
)
def test_stage_2_plans(demo, script, prompts, answers, answer_tokens, steps):
    plan = dry_run(
        script,
        "grpo",
        "--model_name_or_path",
        demo / "base",
        "--dataset",
        demo / "rl.jsonl",
        "--tensor_parallel_size",
        1,
    )
    assert f"{prompts} prompts x {answers} answers = {prompts * answers}," in plan
    assert f"answer <= {answer_tokens}," in plan and f", {steps} steps in all" in plan


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", GRPO_RECIPES, ids=lambda script: script[-1])
def test_both_ways_parse_and_differ(script):
    configs = {}
    for faithful in (False, True):
        configs[faithful] = parse(train_grpo.GRPOConfig, command(script, "grpo", faithful=faithful))
        train_grpo.check_config(configs[faithful])
        train_grpo.reward_lib.check_reward_options(configs[faithful])
        evaluation = parse(evaluate.EvalConfig, command(script, "evaluate", faithful=faithful))
        assert configs[faithful].output_dir in evaluation.model
    ours, theirs = configs[False], configs[True]
    assert ours.output_dir != theirs.output_dir
    assert (ours.length_unit, ours.swap_verify, ours.bad_gold_reward) == ("tokens", False, None)
    assert (theirs.length_unit, theirs.swap_verify, theirs.bad_gold_reward, theirs.rollout_is_cap) == (
        "chars",
        True,
        1.0,
        0,
    )
    for name in (
        "num_prompts_per_step",
        "num_generations",
        "learning_rate",
        "beta",
        "max_steps",
        "temperature",
        "reward_funcs",
    ):
        assert getattr(ours, name) == getattr(theirs, name), f"--faithful must not change {name}"


def test_faithful_lengths_are_the_papers():
    assert [
        parse(train_grpo.GRPOConfig, command(s, "grpo", faithful=True)).cosine_max_length for s in GRPO_RECIPES
    ] == [30000, 48000, 48000, 3584, 3584, 3584]
    sft = parse(train_sft.SFTConfig, command(R1, "sft", faithful=True))
    assert (sft.lr_horizon, sft.max_steps, sft.packing, sft.loss_on) == (780, 350, "concat_cut", "all_but_eos")
    train_sft.check_config(sft)


def test_no_flags_is_the_first_recipe():
    """DESIGN 2: train_sft.py and train_grpo.py without flags are Fast-Math-R1's two stages."""
    paths_and_machine = {"model_name_or_path", "dataset", "output_dir", "compile", "tensor_parallel_size",
                         "benchmark_dir"}
    for config_class, stage in ((train_sft.SFTConfig, "sft"), (train_grpo.GRPOConfig, "grpo")):
        default, chosen = parse(config_class, []), parse(config_class, command(R1, stage))
        different = {
            name for name in vars(default) if getattr(default, name) != getattr(chosen, name)
        } - paths_and_machine
        assert not different, different


def test_a_later_flag_wins_and_a_wrong_one_stops():
    assert parse(train_grpo.GRPOConfig, command(R1, "grpo", "--learning_rate", "1e-7")).learning_rate == 1e-7
    with pytest.raises(ValueError):
        parse(train_grpo.GRPOConfig, command(R1, "grpo", "--lerning_rate", "1e-7"))
    done = run("bash", ROOT / "recipes" / R1[0], "--learning_rate", "1e-7")
    assert done.returncode == 2 and "stage" in done.stderr


def test_builds_parse():
    for script, outputs in (
        (R1, ("sft.jsonl", "grpo.jsonl")),
        (NEMOTRON, ("grpo.jsonl",)),
        (RS1, ("train.jsonl",)),
        (RS3, ("train.jsonl",)),
    ):
        plan = recipe(script, "build", "--dry_run")
        assert all(output in plan for output in outputs)
    assert "open-s1" in recipe(RS1, "build", "--dry_run") and "open-rs" in recipe(RS3, "build", "--dry_run")


def test_all_stages_in_order():
    done = run(
        "bash",
        "-c",
        f"""cd {ROOT} && RUN=/tmp/r GPUS=1 LAUNCH=true && source recipes/stages.sh
        a() {{ echo a; }}; b() {{ echo b; false; }}; c() {{ echo c; }}; set -e; run_stages "a b c" """,
    )
    assert done.stdout.split() == ["a", "b"] and done.returncode != 0, "a failed stage ends the recipe"


def test_slurm_script_on_two_machines(tmp_path):
    for name, body in {"scontrol": "echo node1; echo node2", "srun": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = run(
        "bash",
        ROOT / "recipes" / "slurm.sbatch",
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        SLURM_JOB_NODELIST="node[1-2]",
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_ID="7",
        SLURM_SUBMIT_DIR=str(ROOT),
    )
    words = done.stdout.split()
    assert done.returncode == 0, done.stderr
    launcher, flags = words[: words.index("train_sft.py")], words[words.index("train_sft.py") + 1 :]
    assert "node1:29500" in launcher and launcher[launcher.index("--nnodes") + 1] == "2"
    config = parse(train_sft.SFTConfig, flags)
    assert (config.gradient_accumulation_steps * 16, config.shard_size) == (64, 8)


# ---------------------------------------------------------------------------------------------------------------------
# The token scheduler
# ---------------------------------------------------------------------------------------------------------------------
def test_token_scheduler_learns_and_its_limits_are_read(demo, tmp_path):
    rows = [
        {
            "problem": f"Let a={i % 10}. Find {'aaaa' if i % 2 else 'b+b+b+b'} mod 10.",
            "mean_completion_length": 11000.0 if i % 2 else 2000,
        }
        for i in range(120)
    ] + [{"problem": "no length", "mean_completion_length": None}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = ROOT / "recipes" / "token_scheduler.py"
    done = run(
        sys.executable,
        script,
        "train",
        "--model",
        demo / "base",
        "--dataset",
        tmp_path / "train.jsonl",
        "--output_dir",
        tmp_path / "model",
        "--learning_rate",
        "3e-3",
        "--batch_size",
        8,
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr
    assert "120 of 121 rows" in done.stdout and float(done.stdout.rsplit("correlation ")[-1]) > 0.8, done.stdout
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps({"problem": rows[i]["problem"]}) + "\n" for i in (0, 1)))
    done = run(
        sys.executable,
        script,
        "predict",
        "--model",
        tmp_path / "model",
        "--dataset",
        tmp_path / "ask.jsonl",
        "--output",
        tmp_path / "limits.jsonl",
    )
    assert done.returncode == 0, done.stderr
    written = [json.loads(line) for line in (tmp_path / "limits.jsonl").read_text().splitlines()]
    assert [row["problem"] for row in written] == [row["problem"] for row in rows[:2]]
    assert 10500 <= written[0]["token_limit"] < written[1]["token_limit"] <= 13300


def test_token_limits_are_scored_from_stored_samples(tmp_path):
    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    write("problems-toy.jsonl", [{"id": i, "problem": f"problem {i}", "answers": ["1"]} for i in "ab"])
    write("samples-000.jsonl", [
        {"benchmark": "toy", "id": i, "sample": s, "length": n, "finish_reason": "stop", "text": "\\boxed{1}"}
        for i, lengths in (("a", (10, 20)), ("b", (40, 50))) for s, n in enumerate(lengths)])
    limits = write("limits.jsonl", [{"problem": "problem a", "token_limit": 20}, {"problem": "problem b", "token_limit": 40}])
    command = (sys.executable, ROOT / "recipes" / "token_scheduler.py", "score", "--samples", tmp_path, "--benchmark", "toy")
    done = run(*command, "--limits", limits)
    assert done.returncode == 0, done.stderr
    assert "| own limits | 30 | 75.0" in done.stdout and "| 28 | 25.0% |" in done.stdout
    assert "| their mean | 30 | 50.0" in done.stdout and "| 22 | 50.0% |" in done.stdout
    done = run(*command, "--limits", write("bad.jsonl", [{"problem": "problem a", "token_limit": 0}]))
    assert done.returncode == 1 and "limit 0" in done.stderr
