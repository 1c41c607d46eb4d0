"""recipes/gsm8k.py and gsm8k_one_gpu.sh: which rows go where; the programs know the flags."""

import json
import sys

import pytest
from conftest import ROOT, run
from transformers.hf_argparser import HfArgumentParser

import evaluate
import train_grpo
import train_sft
from rewards import extract_answer, format_open_rs_reward, gold_answer

sys.path.insert(0, str(ROOT / "recipes"))
import gsm8k  # noqa: E402


@pytest.fixture
def source(tmp_path):
    """A folder with 40 training problems of 0 to 3 operations and two test problems."""
    solution = "".join("So 1+1 = <<1+1=2>>2.\n" for _ in range(3))
    rows = [{"question": f"Problem {i}?", "answer": solution[:21 * (i % 4)] + f"#### 1,{i:03}"}
            for i in range(40)]
    for name, some in (("train", rows), ("test", rows[:2])):
        lines = [json.dumps(row) for row in some]
        (tmp_path / f"gsm8k_{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_a_solution_becomes_a_thought_and_a_box():
    row = gsm8k.sft_row({"question": "How many?", "answer":
                         "He has 48/2 = <<48/2=24>>24.\nThat is 1,024.\n#### 1,024"})
    assert row == {"problem": "How many?", "generation": (
        "<think>\nHe has 48/2 = 24.\nThat is 1,024.\n</think>\n\nThe answer is \\boxed{1024}.")}
    assert format_open_rs_reward(row["generation"]) == 1
    assert extract_answer(row["generation"]) == "1024"


def test_no_problem_is_in_two_files(source):
    files = gsm8k.split_rows(source, sft_rows=10, dev_rows=5)
    assert {name: len(rows) for name, rows in files.items()} == {
        "sft": 10, "grpo": 25, "dev": 5, "test": 2}
    questions = [row.get("question") or row["problem"]
                 for name in ("sft", "grpo", "dev") for row in files[name]]
    assert len(set(questions)) == 40
    assert gold_answer(files["grpo"][0]["answer"])  # the data code reads what follows ####
    assert files == gsm8k.split_rows(source, sft_rows=10, dev_rows=5)
    easy = gsm8k.split_rows(source, sft_rows=10, dev_rows=5, max_operations=2)
    assert len(easy["sft"] + easy["grpo"] + easy["dev"]) == 20


@pytest.mark.parametrize(("name", "config"), [
    ("sft", train_sft.SFTConfig), ("grpo", train_grpo.GRPOConfig),
    ("evaluate", evaluate.EvalConfig)])
def test_the_programs_know_the_flags(name, config, tmp_path):
    echo = tmp_path / "echo.py"
    echo.write_text("import json, sys; print(json.dumps(sys.argv[2:]))")
    done = run("bash", ROOT / "recipes/gsm8k_one_gpu.sh", name, "--seed", 5,
               LAUNCH=f"{sys.executable} {echo}")
    assert done.returncode == 0, done.stderr
    arguments = json.loads(done.stdout.strip().splitlines()[-1])
    parser = HfArgumentParser(config, allow_abbrev=False)
    (cfg,) = parser.parse_args_into_dataclasses(arguments)
    assert "</think>" in cfg.system_prompt and r"\boxed{}" in cfg.system_prompt and cfg.seed == 5
    if name == "sft":
        assert cfg.gradient_accumulation_steps == 8
    if name == "grpo":
        train_grpo.check_config(cfg)
        assert cfg.num_prompts_per_step * cfg.max_steps <= 7473 - 2000 - 200 + 32  # one pass
