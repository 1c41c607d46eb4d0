"""train_sft.py by its command line: it learns, survives kill -9, refuses nonsense in one line."""

import json
import random
import shutil
import signal
import subprocess
import time

import psutil
import pytest
import torch
import transformers
from conftest import read_rows, run_script, start, wait_for

import train_sft


def flags(demo, output, **options):
    options = {
        "model_name_or_path": demo / "base", "dataset": demo / "train.jsonl",
        "system_prompt": "none", "chat_template": "tokenizer", "output_dir": output,
        "max_length": 1024, "gradient_accumulation_steps": 1, "learning_rate": "1e-3",
        "activation_checkpointing": "none", "cache_dir": demo / "cache", **options}
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


def losses(output):
    return {row["step"]: row["loss"] for row in read_rows(output / "metrics.jsonl")}


def weights(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()


@pytest.fixture(scope="module")
def short_data(tmp_path_factory, demo):
    """40 rows: an epoch of 4 steps, so that ten steps cross two epoch boundaries."""
    path = tmp_path_factory.mktemp("short") / "train.jsonl"
    path.write_text("\n".join((demo / "train.jsonl").read_text().splitlines()[:40]) + "\n")
    return path


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, demo, short_data):
    output = tmp_path_factory.mktemp("runs") / "unbroken"
    done = run_script(
        "train_sft.py", *flags(demo, output, dataset=short_data, max_steps=10, lr_horizon=12,
                               warmup_ratio=0.2), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def test_sft_loss_is_a_sum_over_one_count():
    logprobs = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    loss = train_sft.sft_loss(logprobs, torch.tensor([1.0, 0.0, 1.0]), 8.0)
    loss.backward()
    assert loss.item() == 5 / 8 and logprobs.grad.tolist() == [-1 / 8, 0.0, -1 / 8]


def test_killed_and_resumed_equals_unbroken(tmp_path, demo, short_data, unbroken):
    output = tmp_path / "run"
    arguments = flags(demo, output, dataset=short_data, max_steps=10, lr_horizon=12,
                      warmup_ratio=0.2, save_steps=5)
    process = start("train_sft.py", *arguments, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    # kill -9 at whatever moment follows the checkpoint
    while not (output / "checkpoints/step-000005").is_dir():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        victim.kill()
    process.wait()
    assert not (output / "final").exists()
    # what a kill in the middle of a save leaves
    (output / "checkpoints/step-000010.tmp").mkdir(exist_ok=True)
    refused = run_script("train_sft.py", *arguments)
    assert refused.returncode != 0 and "add --resume" in refused.stderr
    resumed = run_script("train_sft.py", *arguments, "--resume", "True", ranks=2)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert losses(output) == losses(unbroken) and sorted(losses(output)) == list(range(1, 11))
    ours, theirs = weights(output), weights(unbroken)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = run_script("train_sft.py", *arguments, "--resume", "True", ranks=2)
    assert again.returncode != 0 and "nothing to do" in again.stderr


def test_a_resume_refuses_other_data_and_weights_and_says_which_flags_changed(
        tmp_path, demo, short_data, unbroken):
    def resume(**options):
        options = {"dataset": short_data, "max_steps": 12, "lr_horizon": 12, "warmup_ratio": 0.2,
                   "resume": "True", **options}
        return run_script("train_sft.py", *flags(demo, unbroken, **options))

    other = tmp_path / "other.jsonl"
    other.write_text(short_data.read_text().replace("double", "triple"))
    changed = resume(dataset=other)
    assert changed.returncode == 1 and "data" in changed.stderr
    assert "Traceback" not in changed.stderr
    model = tmp_path / "model"  # the same folder name says nothing: what counts is what is in it
    shutil.copytree(demo / "base", model)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{# other #}")
    moved = resume(model_name_or_path=model)
    assert moved.returncode == 1 and "model" in moved.stderr and "Traceback" not in moved.stderr
    jinja = tmp_path / "other.jinja"
    jinja.write_text(template.read_text())
    written = resume(chat_template=jinja)
    assert written.returncode == 1 and "chat template: " in written.stderr
    batch = resume(gradient_accumulation_steps=5)
    assert batch.returncode == 1 and "packs per step" in batch.stderr
    fewer_ranks = resume(gradient_accumulation_steps=2, max_grad_norm=2)
    # DCP reshards; two more steps on one rank
    assert fewer_ranks.returncode == 0, fewer_ranks.stderr
    assert "max_grad_norm" in fewer_ranks.stdout + fewer_ranks.stderr
    assert sorted(losses(unbroken))[-1] == 12


def test_sigterm_saves_and_exits(tmp_path, demo):
    output = tmp_path / "run"
    process = start("train_sft.py", *flags(demo, output, max_steps=500), ranks=1,
                    stderr=subprocess.PIPE)
    rows = output / "metrics.jsonl"
    wait_for(lambda: rows.exists() and rows.read_text(), process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    last = max(losses(output))
    assert process.returncode == 143
    assert f"stopped by a signal after step {last} of 500; continue with --resume" in stderr
    assert (output / f"checkpoints/step-{last:06d}/manifest.json").is_file()


def test_gsm8k_like_rows_train_and_the_loss_falls(tmp_path, demo):
    rng, rows = random.Random(0), []
    for _ in range(300):
        a, b = rng.randint(2, 20), rng.randint(2, 20)
        rows.append({"question": f"Ann has {a} apples and buys {b}. How many has she?",
                     "answer": f"{a}+{b}={a + b}.\n#### {a + b}"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:20]))
    done = run_script("train_sft.py", *flags(
        demo, tmp_path / "run", dataset=tmp_path / "rows.jsonl",
        eval_dataset=tmp_path / "held_out.jsonl", eval_steps=10, max_steps=30,
        problem_column="question", generation_column="answer",
        activation_checkpointing="full", chat_template="open_r1_roles"), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = read_rows(tmp_path / "run/metrics.jsonl")
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]
    assert metrics[29]["eval/loss"] < metrics[9]["eval/loss"] and "eval/loss" not in metrics[8]
    assert {"lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "peak_memory_gb",
            "time/step"} <= set(metrics[0])
    assert "300 of 300 rows kept" in done.stdout and "steps per epoch" in done.stdout
    facts = json.loads((tmp_path / "run/config.json").read_text())
    assert facts["world_size"] == 2 and facts["max_length"] == 1024 and "torch" in facts["versions"]
    final = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/final")
    assert final.chat_template.startswith("{% for message in messages %}")


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, demo, short_data):
    # a learning rate that makes fp32 overflow after the first step
    done = run_script("train_sft.py", *flags(
        demo, tmp_path / "run", dataset=short_data, max_steps=10, learning_rate="1e30",
        max_grad_norm=0, save_steps=1))
    assert done.returncode == 1
    assert "; rows [" in done.stderr
    assert "last checkpoint: " in done.stderr and "step-000001" in done.stderr


WRONG = {
    "--loss_on": ("nothing", "--loss_on 'nothing': choose one of assistant, all"),
    "--learning_rate": ("-1", "--learning_rate -1.0 must be above 0"),
    "--report_to": ("carrier-pigeon", "choose one of none, tensorboard, wandb, trackio"),
    "--dataset": ("absent.jsonl", "data set absent.jsonl does not exist"),
    "--model_name_or_path": ("absent/folder/x", "no local folder and no hub id"),
    "--chat_template": ("absent.jinja", "neither tokenizer, open_r1_roles nor a file"),
    "--output_dir": ("/proc/nowhere", "opening --output_dir /proc/nowhere failed"),
    "--max_lenght": ("12", "unrecognized arguments: --max_lenght 12"),
    "--lr_horizon": ("1", "--lr_horizon 1 is below the 2 steps to train"),
    "--shard_size": ("3", "--shard_size 3 does not divide"),
    "--max_length": ("10", "no row can be used"),
}


@pytest.mark.parametrize("flag", WRONG)
def test_wrong_input_is_one_clear_line(flag, tmp_path, demo, short_data):
    value, message = WRONG[flag]
    arguments = flags(demo, tmp_path / "run", dataset=short_data, max_steps=2) + [flag, value]
    done = run_script("train_sft.py", *arguments)
    lines = [line for line in done.stderr.splitlines() if "train_sft.py: " in line]
    assert done.returncode in (1, 2), done.stderr[-2000:]
    assert len(lines) == 1 and message in lines[0], done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "final").exists()


def test_empty_data_and_corrupt_weights(tmp_path, demo):
    (tmp_path / "empty.jsonl").write_text("")
    done = run_script(
        "train_sft.py", *flags(demo, tmp_path / "a", dataset=tmp_path / "empty.jsonl"))
    assert done.returncode != 0
    assert done.stderr.count("no row can be used") == 1, done.stderr[-2000:]
    broken = tmp_path / "model"
    subprocess.run(["cp", "-r", demo / "base", broken], check=True)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:5000])
    done = run_script("train_sft.py", *flags(demo, tmp_path / "b", model_name_or_path=broken,
                                             max_steps=2), ranks=2)
    assert done.returncode != 0 and "is corrupt or was cut short" in done.stderr
    assert "Traceback (most recent call last):\n  File \"/work" not in done.stderr
    assert not (tmp_path / "b" / "final").exists()
