"""The recipes as scripts: they parse, their plans have the papers' batch shapes, flags are ours."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, run
from transformers.hf_argparser import HfArgumentParser

from data import assistant_turn, encode_document, make_packs, steps_of_epoch
from evaluate import EvalConfig
from train_grpo import GRPOConfig, check_config
from train_sft import SFTConfig

SCRIPTS = sorted((ROOT / "recipes").glob("*.sh")) + [ROOT / "recipes" / "slurm.sbatch"]
R1, NEMOTRON, QWEN3 = (("fast_math.sh", name) for name in ("r1", "nemotron", "qwen3"))
RS1, RS2, RS3 = (("open_rs.sh", name) for name in ("rs1", "rs2", "rs3"))


def recipe(script, *arguments, **environment):
    """Run `bash recipes/NAME ...` and return its standard output; it must succeed."""
    environment = {"OMP_NUM_THREADS": "1", **environment}  # other tests share the cores
    done = run("bash", ROOT / "recipes" / script[0], *script[1:], *arguments, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def command(script, stage, *flags, **environment):
    """The arguments of the program that a stage would launch, as the shell splits them."""
    line = recipe(script, stage, *flags, LAUNCH="echo", **environment).strip().splitlines()[-1]
    return shlex.split(line)[1:]


def parse(config_class, arguments):
    parser = HfArgumentParser(config_class, allow_abbrev=False)
    return parser.parse_args_into_dataclasses(arguments)[0]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(path):
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    if path.name not in ("setup.sh", "stages.sh"):  # those are sourced
        assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text


def test_set_up_on_a_gpu_machine_asks_for_a_compiler_first(tmp_path):
    """Without one the first kernel fails, after an installation of 10 GB."""
    for name in ("recipes/setup.sh", "requirements.txt", "requirements-cpu.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "grep"):
        (tools / tool).symlink_to(shutil.which(tool))
    (tools / "nvidia-smi").write_text("#!/bin/bash\necho 'GPU 0: NVIDIA H200'\n")
    (tools / "nvidia-smi").chmod(0o755)
    done = subprocess.run(
        [shutil.which("bash"), "-c", "source recipes/setup.sh"], cwd=tmp_path, check=False,
        env={"PATH": str(tools), "PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 1 and not (tmp_path / ".venv").exists()
    assert "setup: triton needs a C compiler" in done.stderr, done.stderr


# --------------------------------------------------------------------------------------------------
# Batch shapes
# --------------------------------------------------------------------------------------------------
def stated_lengths(rows=7900, mean=7580):
    """Lengths of stage 1's documents as published: 0.5% above 19,000 tokens, none above 24,000."""
    lengths = np.exp(np.random.default_rng(0).normal(8.859, 0.386, rows))
    lengths = (lengths * mean / lengths.mean()).clip(200, 24000).astype(int)
    assert abs(lengths.mean() - mean) < 50 and 0.002 < (lengths > 19000).mean() < 0.01
    return lengths.tolist()


def test_stage_1_is_64_packs_of_24000_tokens():
    for gpus, nodes in ((8, 1), (4, 1), (8, 2)):
        config = parse(SFTConfig, command(R1, "sft", GPUS=str(gpus), NODES=str(nodes)))
        assert config.gradient_accumulation_steps * gpus * nodes == 64
        assert config.max_length == 24000


def test_39_steps_per_epoch_at_full_size():
    config = parse(SFTConfig, command(R1, "sft", GPUS="8"))
    packs = make_packs([range(n) for n in stated_lengths()], config.max_length)
    steps = steps_of_epoch(len(packs), config.gradient_accumulation_steps * 8, config.seed, 0)
    assert abs(len(steps) - 39) <= 1 and max(map(len, steps)) <= 64


def stated_rows(tokenizer):
    """Rows whose documents have a hundredth of the stated lengths."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "7"}]
    overhead = len(encode_document(tokenizer, messages, assistant_turn(tokenizer))) - 1
    return [{"problem": "a", "generation": "7" * max(1, n // 100 - overhead)}
            for n in stated_lengths()]


def test_the_plan_of_stage_1_on_two_ranks_under_torchrun(demo, tokenizer, tmp_path):
    """The recipe's own command on rows and packs that are a hundred times shorter."""
    train = write_rows(tmp_path / "train.jsonl", stated_rows(tokenizer))
    plan = recipe(
        R1, "sft", "--model_name_or_path", demo / "base", "--max_length", 240,
        "--dataset", train, "--cache_dir", tmp_path,
        "--system_prompt", "none", "--chat_template", "tokenizer", "--dry_run", GPUS="2")
    assert abs(int(re.search(r"(\d+) steps per epoch", plan)[1]) - 39) <= 1, plan
    assert "7,900 of 7,900 rows kept" in plan and "64 packs, up to 15,360 tokens" in plan


@pytest.mark.parametrize("script, prompts, answers, answer_tokens, steps", [
    (R1, 16, 8, 16384, 50),
    (NEMOTRON, 16, 8, 24000, 50),
    (QWEN3, 8, 8, 24000, 50),
    (RS1, 12, 6, 4096, 100),
    (RS2, 12, 6, 3584, 50),
    (RS3, 12, 6, 3584, 50),
])
def test_stage_2_batches(script, prompts, answers, answer_tokens, steps):
    config = parse(GRPOConfig, command(script, "grpo"))
    check_config(config)
    assert (config.num_prompts_per_step, config.num_generations) == (prompts, answers)
    assert (config.max_completion_length, config.max_steps) == (answer_tokens, steps)
    evaluation = parse(EvalConfig, command(script, "evaluate"))
    assert config.output_dir + "/final" in evaluation.model


def test_the_plan_of_stage_2(demo, tmp_path):
    folder = shutil.copytree(demo / "base", tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 8192  # for the recipe's long answers
    (folder / "config.json").write_text(json.dumps(config))
    plan = recipe(RS1, "grpo", "--model_name_or_path", folder, "--dataset", demo / "rl.jsonl",
                  "--dry_run", GPUS="1", LAUNCH=sys.executable)
    assert "12 prompts x 6 answers = 72," in plan and ", 100 in all" in plan
    assert "schedule ends at step 500" in plan and "answer <= 4,096" in plan


# --------------------------------------------------------------------------------------------------
# Flags and stages
# --------------------------------------------------------------------------------------------------
def test_no_flags_is_the_first_recipe():
    """train_sft.py and train_grpo.py without flags are Fast-Math-R1's two stages."""
    of_machine = {"model_name_or_path", "dataset", "output_dir", "compile",
                  "activation_checkpointing", "tensor_parallel_size"}
    for config_class, stage in ((SFTConfig, "sft"), (GRPOConfig, "grpo")):
        default, chosen = parse(config_class, []), parse(config_class, command(R1, stage))
        different = {name for name, value in vars(default).items() if value != vars(chosen)[name]}
        assert different <= of_machine, different


def test_a_later_flag_wins_and_a_wrong_one_stops():
    flags = command(R1, "grpo", "--learning_rate", "1e-7")
    assert parse(GRPOConfig, flags).learning_rate == 1e-7
    with pytest.raises(ValueError):
        parse(GRPOConfig, command(R1, "grpo", "--lerning_rate", "1e-7"))
    done = run("bash", ROOT / "recipes/fast_math.sh", "r1", "--learning_rate", "1e-7")
    assert done.returncode == 2 and "stage" in done.stderr
    done = run("bash", ROOT / "recipes/fast_math.sh", "r2", "grpo")
    assert done.returncode == 2 and "r1|nemotron|qwen3" in done.stderr


def test_builds_parse():
    plan = recipe(R1, "build", "--dry_run")
    assert "fast_math_r1/sft.jsonl" in plan and "fast_math_r1/grpo.jsonl" in plan
    plan = recipe(NEMOTRON, "build", "--dry_run")
    assert "sft.jsonl" not in plan and "fast_math_nemotron/grpo.jsonl" in plan
    assert "open-s1" in recipe(RS1, "build", "--dry_run")
    assert "open-rs" in recipe(RS3, "build", "--dry_run")


def test_data_that_overlaps_a_benchmark_is_not_trained_on(tmp_path):
    known = "How many positive integers below 1000 leave the remainder 1 when divided by 7 and 9?"
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/own.jsonl").write_text(json.dumps({"problem": known, "answer": 16}))
    for problem, status in (("What is 6 * 7?", 0), (known, 1)):
        (tmp_path / "train.jsonl").write_text(json.dumps({"problem": problem, "answer": "42"}))
        done = run("bash", ROOT / "recipes/open_rs.sh", "rs2", "check", RUN=str(tmp_path),
                   BENCHMARKS=str(tmp_path / "benchmarks"))
        assert done.returncode == status, done.stdout + done.stderr
    assert "row 0 is own" in done.stdout


def test_all_stages_in_order():
    done = run("bash", "-c", f"""
        cd {ROOT} && RUN=/tmp/r GPUS=1 LAUNCH=true && source recipes/stages.sh
        a() {{ echo a; }}; b() {{ echo b; false; }}; c() {{ echo c; }}
        set -e; run_stages "a b c" """)
    assert done.stdout.split() == ["a", "b"], "a failed stage ends the recipe"
    assert done.returncode != 0
    stages = re.findall(r'stages="(.*)"|run_stages "([a-z ]+)"', "".join(
        (ROOT / "recipes" / name).read_text() for name in ("fast_math.sh", "open_rs.sh")))
    for names in stages:
        order = "".join(names).split()
        assert order.index("check") < order.index("grpo")  # before any training


def test_slurm_script_on_two_machines(tmp_path):
    for name, body in {"scontrol": "echo node1; echo node2", "srun": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = run(
        "bash", ROOT / "recipes" / "slurm.sbatch", PATH=f"{tmp_path}:{os.environ['PATH']}",
        SLURM_JOB_NODELIST="node[1-2]", SLURM_JOB_NUM_NODES="2", SLURM_JOB_ID="7",
        SLURM_SUBMIT_DIR=str(ROOT))
    assert done.returncode == 0, done.stderr
    launcher, _, flags = done.stdout.partition("./train_sft.py ")
    assert "node1:29500" in launcher and "--nnodes 2 " in launcher
    config = parse(SFTConfig, shlex.split(flags))
    assert (config.gradient_accumulation_steps * 16, config.shard_size) == (64, 8)


# --------------------------------------------------------------------------------------------------
# The token scheduler
# --------------------------------------------------------------------------------------------------
def token_scheduler(*arguments):
    script = ROOT / "recipes/token_scheduler.py"
    return run(sys.executable, script, *arguments, OMP_NUM_THREADS="1")


def test_token_scheduler_learns_and_its_limits_are_read(demo, tmp_path):
    rows = [{"problem": f"Let a={i % 10}. Find {'aaaa' if i % 2 else 'b+b+b+b'} mod 10.",
             "mean_completion_length": 11000.0 if i % 2 else 2000} for i in range(120)]
    rows += [{"problem": "no length", "mean_completion_length": None}]
    done = token_scheduler(
        "train", "--model", demo / "base", "--dataset", write_rows(tmp_path / "train.jsonl", rows),
        "--output_dir", tmp_path / "model", "--learning_rate", "3e-3", "--batch_size", 8)
    assert done.returncode == 0, done.stderr
    assert "120 of 121 rows" in done.stdout
    assert float(done.stdout.rsplit("correlation ")[-1]) > 0.8, done.stdout
    asked = [{"problem": row["problem"]} for row in rows[:2]]
    done = token_scheduler(
        "predict", "--model", tmp_path / "model", "--output", tmp_path / "limits.jsonl",
        "--dataset", write_rows(tmp_path / "ask.jsonl", asked))
    assert done.returncode == 0, done.stderr
    easy, hard = map(json.loads, (tmp_path / "limits.jsonl").read_text().splitlines())
    assert [easy["problem"], hard["problem"]] == [row["problem"] for row in asked]
    assert 10500 <= easy["token_limit"] < hard["token_limit"] <= 13300


def test_token_limits_are_scored_from_stored_samples(tmp_path):
    write_rows(tmp_path / "problems-toy.jsonl", [
        {"id": i, "problem": f"problem {i}", "answers": ["1"]} for i in "ab"])
    write_rows(tmp_path / "samples-000.jsonl", [
        {"benchmark": "toy", "id": i, "sample": s, "length": n, "finish_reason": "stop",
         "text": "\\boxed{1}"}
        for i, lengths in (("a", (10, 20)), ("b", (40, 50))) for s, n in enumerate(lengths)])

    def score(limits):
        rows = [{"problem": f"problem {i}", "token_limit": n} for i, n in limits.items()]
        file = write_rows(tmp_path / "limits.jsonl", rows)
        return token_scheduler(
            "score", "--samples", tmp_path, "--benchmark", "toy", "--limits", file)

    done = score({"a": 20, "b": 40})
    assert done.returncode == 0, done.stderr
    assert "| own limits | 30 | 75.0" in done.stdout and "| 28 | 25.0% |" in done.stdout
    assert "| their mean | 30 | 50.0" in done.stdout and "| 22 | 50.0% |" in done.stdout
    done = score({"a": 0})
    assert done.returncode == 1 and "limit 0" in done.stderr
