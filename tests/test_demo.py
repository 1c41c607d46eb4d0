"""recipes/demo.sh in a shortened form: three real stages with real vLLM on two ranks, and the table they print."""

import json
import re

import torch
from conftest import ROOT, run
from transformers import AutoModelForCausalLM


def test_the_miniature_recipe(tmp_path):
    output = tmp_path / "demo"
    done = run("bash", ROOT / "recipes/demo.sh", "--seed", 7, "--output", output, "--sft_steps", 500, "--grpo_steps", 6,
               "--eval_problems", 50, "--eval_samples", 2, timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "setup: installing" not in done.stdout  # nothing changed since the suite's own set-up
    headings = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    assert [h.split()[1] for h in headings] == [
        "demo,", "stage", "stage", "evaluation:", "report:", "demo"]

    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    header = next(line for line in table if line.startswith("| model | 64 |"))
    rows = {line.split(" | ")[0][2:]: line for line in table[table.index(header) + 2:table.index(header) + 5]}
    assert list(rows) == ["base", "SFT", "SFT + GRPO"]
    assert all(line.count("|") == header.count("|") for line in rows.values())
    metrics = json.loads((output / "eval/SFT/metrics-test.json").read_text())
    assert metrics
    accuracy = {name: float(re.split(r" \| ", line)[-2].split()[0]) for name, line in rows.items()}  # at the largest
    # Chance is 10% of the digits. After 500 of the recipe's 1,000 steps accuracy rises steeply, so that another
    # processor's rounding moves it: 32 and 34% here. What the whole recipe reaches stands in the README.
    assert accuracy["base"] < 5 and min(accuracy["SFT"], accuracy["SFT + GRPO"]) > 18
    assert (output / "eval/budgets.png").stat().st_size > 10_000
    assert (output / "grpo/report.html").stat().st_size > 10_000
    steps = [json.loads(line) for line in (output / "grpo/metrics.jsonl").read_text().splitlines()]
    assert all(step["grad_norm"] > 0 for step in steps)
    sft, grpo = (AutoModelForCausalLM.from_pretrained(output / stage / "final") for stage in ("sft", "grpo"))
    assert not any(torch.equal(*pair) for pair in zip(sft.parameters(), grpo.parameters(), strict=True))
    assert steps[-1]["completions/mean_length"] < 1.3 * steps[0]["completions/mean_length"]  # six steps are noise


def test_the_demo_removes_only_demos(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    done = run("bash", ROOT / "recipes/demo.sh", "--output", tmp_path)
    assert done.returncode == 2 and "no demo" in done.stderr and (tmp_path / "precious.txt").exists()
    assert run("bash", ROOT / "recipes/demo.sh", "--sede", "3").returncode == 2
