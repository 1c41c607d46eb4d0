"""recipes/demo.sh, shortened: three real stages with real vLLM on two ranks, and their table."""

import json

import torch
from conftest import ROOT, read_rows, run
from transformers import AutoModelForCausalLM


def test_the_miniature_recipe(tmp_path):
    output = tmp_path / "demo"
    done = run("bash", ROOT / "recipes/demo.sh", "--seed", 7, "--output", output,
               "--sft_steps", 500, "--grpo_steps", 2, "--eval_problems", 50, "--eval_samples", 2,
               timeout=1500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "setup: installing" not in done.stdout  # nothing changed since the suite's own set-up
    headings = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    assert [heading.split()[1] for heading in headings] == [
        "demo,", "stage", "stage", "evaluation:", "report:", "demo"]

    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    header = next(line for line in table if line.startswith("| model | 64 |"))
    start = table.index(header) + 2
    rows = {line.split(" | ")[0][2:]: line for line in table[start:start + 3]}
    assert list(rows) == ["base", "SFT", "SFT + GRPO"]
    assert all(line.count("|") == header.count("|") for line in rows.values())
    # At the largest budget. Chance is 10% of the digits. After 500 of the recipe's 1,000 steps
    # accuracy rises steeply, so that another processor's rounding moves it: 32 and 34% here. The
    # README has what the whole recipe reaches.
    accuracy = {name: float(line.split(" | ")[-2].split()[0]) for name, line in rows.items()}
    assert accuracy["base"] < 5 and min(accuracy["SFT"], accuracy["SFT + GRPO"]) > 18
    losses = [step["loss"] for step in read_rows(output / "sft/metrics.jsonl")]
    assert len(losses) == 500 and losses[-1] < 0.2 * losses[0]
    assert json.loads((output / "eval/SFT/metrics-test.json").read_text())
    assert (output / "eval/budgets.png").stat().st_size > 10_000
    assert (output / "grpo/report.html").stat().st_size > 10_000
    steps = read_rows(output / "grpo/metrics.jsonl")
    assert all(step["grad_norm"] > 0 for step in steps)
    sft, grpo = (AutoModelForCausalLM.from_pretrained(output / stage / "final")
                 for stage in ("sft", "grpo"))
    pairs = zip(sft.parameters(), grpo.parameters(), strict=True)
    assert not any(torch.equal(*pair) for pair in pairs)
    lengths = [step["completions/mean_length"] for step in steps]
    assert lengths[-1] < 1.3 * lengths[0]  # two steps are noise


def test_the_demo_removes_only_demos(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    done = run("bash", ROOT / "recipes/demo.sh", "--output", tmp_path)
    assert done.returncode == 2 and "no demo" in done.stderr
    assert (tmp_path / "precious.txt").exists()
    assert run("bash", ROOT / "recipes/demo.sh", "--sede", "3").returncode == 2
