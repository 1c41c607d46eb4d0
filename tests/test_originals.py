"""
recipes/originals/*.patch: what the papers' code did, by the numbers that it must give.

The recipes' own --faithful makes the patched trees. The functions that are called check_* run in a
process of their own, where rewards, data and the trainers are the patched ones. Stage 2 of both
patches takes one real step, with vLLM.
"""

import inspect
import json
import math
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, read_rows, run, run_script
from test_recipes import (
    NEMOTRON, QWEN3, R1, RS1, RS2, RS3, GRPOConfig, command, parse, recipe, stated_rows, write_rows)

from data import encode_prompt, prompt_messages
from evaluate import EvalConfig
from rewards import cosine_reward

PATCHES = {"fast_math_r1": R1, "open_rs": RS3}


def copy_tree(folder):
    """What --faithful copies, and what recipes/setup.sh needs to see that nothing is to do."""
    folder.mkdir()
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    for file in (*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt")):
        shutil.copy(file, folder)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


def rejected_hunks(patch, folder):
    """The hunks of a patch that do not apply to the copy of a tree."""
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    subprocess.run(["git", "apply", "--reject", patch], cwd=folder, env=environment, check=False)
    return "\n".join(file.read_text() for file in folder.glob("*.rej"))


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """{patch: folder of the tree with that patch}, as the recipes make it."""
    folders = {}
    for name, script in PATCHES.items():
        runs = tmp_path_factory.mktemp(name) / "run"
        flags = (*script[1:], "--faithful", "evaluate", "--dry_run")
        done = run("bash", ROOT / "recipes" / script[0], *flags, RUN=str(runs))
        if done.returncode:
            patch = ROOT / "recipes/originals" / f"{name}.patch"
            hunks = rejected_hunks(patch, copy_tree(tmp_path_factory.mktemp("tree") / "tree"))
            pytest.fail(f"{done.stderr}\n{patch} no longer applies. Make it again as the end of "
                        f"recipes/README.md says; these hunks do not fit:\n{hunks}")
        folders[name] = runs.with_name("run_faithful") / "code"
    return folders


def in_patched(folder, *calls):
    """Call functions of this file, (function, *arguments), with the modules of folder."""
    script = folder / "checks.py"
    lines = [inspect.getsource(check) for check, *_ in calls]
    lines += [f"{check.__name__}(*{arguments!r})" for check, *arguments in calls]
    script.write_text("\n\n".join(lines))
    done = run(sys.executable, script, PYTHONPATH=str(folder), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --------------------------------------------------------------------------------------------------
# Rewards
# --------------------------------------------------------------------------------------------------
def check_rewards_of_fast_math():
    import re

    from rewards import RewardOptions, cosine_reward, format_reward, rewards_for_group

    def part(name, texts, gold="7"):
        options = RewardOptions(reward_funcs=name, cosine_max_length=30000)
        # the lengths in tokens do not matter
        group = rewards_for_group(texts, gold, options, lengths=range(len(texts)))
        return [round(value, 6) for value in group.parts[name]]

    def answers(box, *characters):
        return [box.rjust(count) for count in characters]

    right, wrong = r"\boxed{7}", r"\boxed{8}"
    # [1] characters
    assert cosine_reward(0, True, 30000) == 1.0
    assert part("cosine", answers(right, 15000, 30000, 60000)) == [0.55, 0.1, 0.1]
    assert part("cosine", ["", *answers(wrong, 15000, 30000, 60000)]) == [-1, -0.55, -0.1, -0.1]
    assert part("length", answers(right, 100, 200, 300)) == [0.5, 0, -0.5]
    assert part("length", answers(wrong, 100, 200, 300)) == [0, 0, -0.5]
    # [3] an unreadable gold answer
    assert part("accuracy", [right, wrong, ""], gold=r"\frac{") == [1, 1, 1]
    # [4] the order of the two answers
    assert part("accuracy", [r"\boxed{0.56}"], gold=r"0.56=56\%") == [0]
    # [7] format2
    expression = re.compile(r"^.*?oxed{(.*?)}.*?</think>.*?$", re.DOTALL)
    texts = [r"\boxed{}</think>", r"\boxed{\frac12}</think>", r"\boxed{\frac{1}{2}</think>", "",
             r"</think>\boxed{7}", r"\boxed{7}", r"\boxed{</think>}", r"\boxed{</think>}</think>",
             "foxed{\n} \n</think>\n</think>"]
    for text in texts:
        assert format_reward(text) == bool(expression.match(text)), text
    assert sum(map(format_reward, texts)) == 5


def check_rewards_of_open_rs():
    from rewards import RewardOptions, cosine_reward, rewards_for_group

    values = dict(cosine_max_length=3584, cosine_correct_at_0=1.0, cosine_correct_at_max=0.5,
                  cosine_wrong_at_0=0.0, cosine_wrong_at_max=-0.5)

    def part(name, texts, gold="7"):
        options = RewardOptions(reward_funcs=name, **values)
        group = rewards_for_group(texts, gold, options, lengths=range(len(texts)))
        return [round(value, 6) for value in group.parts[name]]

    right, wrong = r"\boxed{7}", r"\boxed{8}"
    # [1] characters, [30] periodic
    assert cosine_reward(0, True, *values.values()) == 1.0
    assert part("cosine", [right.rjust(n) for n in (3584, 7168)]) == [0.5, 1.0]
    assert part("cosine", ["", *(wrong.rjust(n) for n in (3584, 7168))]) == [0, -0.5, 0]
    # [3] an unreadable gold answer, [4] the order of the two answers
    assert part("accuracy", [right, wrong, ""], gold=r"\frac{") == [1, 1, 1]
    assert part("accuracy", [r"\boxed{0.56}"], gold=r"0.56=56\%") == [0]


# --------------------------------------------------------------------------------------------------
# Stage 1
# --------------------------------------------------------------------------------------------------
def check_documents(base, folder):
    from pathlib import Path

    import numpy as np

    import data
    from model import load_tokenizer

    tokenizer = load_tokenizer(base)
    data.set_chat_template(tokenizer, "open_r1_roles")
    messages = [*data.prompt_messages("1+1?", "s"), {"role": "assistant", "content": "2"}]
    document = data.encode_document(tokenizer, messages, data.assistant_turn(tokenizer), "all")
    ends = document.ids == tokenizer.eos_token_id
    assert ends.sum() == 3 and (document.mask == ~ends).all()  # [12] one per turn, none trained

    rows = Path(folder, "rows.jsonl")
    rows.write_text('{"problem": "1+1", "generation": "2"}\n'
                    '{"problem": "1+1", "generation": "' + "3 " * 100 + '"}\n')
    options = dict(loss_on="all", cache_dir=folder)
    whole = data.load_documents(str(rows), tokenizer, 10_000, **options).documents
    pieces = data.load_documents(str(rows), tokenizer, 50, **options).documents
    assert len(whole) == 1  # joined
    assert [len(piece) for piece in pieces[:-1]] == [50] * (len(whole[0]) // 50)
    for name in ("ids", "mask"):
        joined = np.concatenate([getattr(piece, name) for piece in pieces])
        assert (joined == getattr(whole[0], name)).all()  # [13] cut, and nothing dropped
    assert [piece.row for piece in pieces[:2]] == [0, 1]
    packs = data.make_packs(pieces, 50)
    assert sorted(packs) == [[i] for i in range(len(pieces))]
    piece = {"ids": pieces[0].ids, "mask": pieces[0].mask}
    batch = data.collate([piece])
    assert batch["cu_seqlens"].tolist() == [0, 50]  # attention and positions cross documents
    assert batch["position_ids"].tolist() == list(range(50))


def test_stage_1_trains_as_the_original(demo, tokenizer, tmp_path):
    """
    One step of one rank of eight, on rows and packs that are a hundred times shorter.

    Eight ranks would take 39 steps per epoch, this one alone takes eight times as many.
    """
    train = write_rows(tmp_path / "train.jsonl", stated_rows(tokenizer))
    said = recipe(
        R1, "--faithful", "sft", "--model_name_or_path", demo / "base", "--max_length", 240,
        "--dataset", train, "--cache_dir", tmp_path,
        "--system_prompt", "none", "--chat_template", "tokenizer", "--max_steps", 1,
        "--activation_checkpointing", "none", "--compile", "false",
        GPUS="8", LAUNCH=sys.executable, RUN=str(tmp_path / "run"))
    steps = int(said.partition(" steps per epoch")[0].split()[-1])
    assert abs(steps / 8 - 39) <= 1, said
    output = tmp_path / "run_faithful"
    (step,) = read_rows(output / "sft/metrics.jsonl")
    assert step["tokens"] in (8 * 240, 7 * 240)
    assert (output / "sft/final/config.json").exists()
    assert "[13]" in (output / "code/data.py").read_text()


# --------------------------------------------------------------------------------------------------
# Stage 2
# --------------------------------------------------------------------------------------------------
def check_groups_of_fast_math(base, folder):
    import json
    from dataclasses import replace
    from pathlib import Path
    from types import SimpleNamespace

    import train_grpo
    from data import Problem
    from model import load_tokenizer, setup_distributed, shutdown_distributed
    from rewards import rewards_for_group

    # [2] shortest and longest of two problems, then of the third
    cfg = train_grpo.GRPOConfig(reward_funcs="length", num_prompts_per_step=3)
    lengths = [(100, 200), (300, 500), (7, 9)]

    def sample(cfg, problems, places):
        texts = [[r"\boxed{7}".rjust(n) for n in lengths[place]] for place in places]
        return [SimpleNamespace(texts=t, scored=rewards_for_group(t, "7", cfg, [1, 1]))
                for t in texts]

    groups, cursor = train_grpo.collect_groups(sample, [None] * 9, 0, cfg)
    assert [g.scored.totals for g in groups] == [[0.5, 0.25], [0, -0.5], [0, 0]]
    assert [g.scored.parts["length"] for g in groups] == [g.scored.totals for g in groups]

    # [28] prompt and answer together
    class Engine:
        def generate(self, prompts, max_tokens, **options):
            self.limits = max_tokens
            return ()

    ctx, engine = setup_distributed(), Engine()
    problems = [Problem(i, "", ["7"], [1] * n) for i, n in enumerate((1, 512))]
    layout = SimpleNamespace(index=0, count=1)
    cfg = train_grpo.GRPOConfig(max_completion_length=16000)
    try:
        train_grpo.sample_groups(engine, layout, ctx, None, cfg, problems, [0, 1])
    except KeyError:
        pass  # this engine has no answers
    assert engine.limits == [16000, 16384 - 512]

    # [3] a row with an unreadable gold answer stays, in training only
    rows = Path(folder, "rows.jsonl")
    golds = ["7", r"\frac{"] * 32
    rows.write_text("".join(json.dumps({"problem": "x", "answer": gold}) + "\n" for gold in golds))
    tokenizer = load_tokenizer(base)
    cfg = train_grpo.GRPOConfig(model_name_or_path=base, dataset=str(rows), dry_run=True,
                                max_completion_length=256, num_prompts_per_step=16)
    train = train_grpo.read_problems(str(rows), tokenizer, cfg, ctx)
    assert [problem.answers[0] for problem in train.problems] == golds
    held_out = train_grpo.read_problems(str(rows), tokenizer, replace(cfg, dataset="other"), ctx)
    assert len(held_out.problems) == 32

    # [17] half of the 64 problems: two steps of 16 per epoch
    train_grpo.setup_distributed = lambda *values, **options: ctx
    train_grpo.print_memory = lambda *options, **more: None
    train_grpo.main(cfg)
    train_grpo.main(replace(cfg, train_fraction=1))
    shutdown_distributed(ctx)


def check_log_probs_of_open_rs(base, folder):
    from pathlib import Path
    from types import SimpleNamespace

    import train_grpo
    from data import MODEL_INPUTS
    from model import load_tokenizer, setup_distributed

    # [22] the temperature of sampling does not reach the log-probs, and the gap ends no run
    cfg = train_grpo.GRPOConfig(temperature=0.7)
    batch = dict.fromkeys(MODEL_INPUTS)
    seen = train_grpo.model_logprobs(lambda **inputs: inputs, batch, cfg, 10)
    assert seen.get("temperature", 1) == 1
    metrics = {"reward/missing": 0, "rollout/logprob_gap": 0.5, "rollout/off_by_10_percent": 0.5}
    assert train_grpo.check_step(metrics, 0, 0.1, SimpleNamespace(is_main=False)) == 0

    # [5] gold answers from a solution, [3] whatever they are
    rows = Path(folder, "rows.jsonl")
    rows.write_text('{"problem": "x", "answer": "7", "solution": "It is \\\\boxed{8}."}\n'
                    '{"problem": "x", "answer": "7", "solution": "We do not know it yet."}\n')
    cfg = train_grpo.GRPOConfig(dataset=str(rows), answer_column="solution")
    problems = train_grpo.read_problems(str(rows), load_tokenizer(base), cfg, setup_distributed())
    assert [p.answers[0] for p in problems.problems] == ["8", "We do not know it yet."]


# --------------------------------------------------------------------------------------------------
# Flags, and all of it together
# --------------------------------------------------------------------------------------------------
def check_flags_of_grpo(lines, folder):
    import json
    from pathlib import Path

    from train_grpo import GRPOConfig, check_config
    from transformers.hf_argparser import HfArgumentParser

    parser = HfArgumentParser(GRPOConfig, allow_abbrev=False)
    configs = [parser.parse_args_into_dataclasses(line)[0] for line in lines]
    for config in configs:
        check_config(config)
    Path(folder, "configs.json").write_text(json.dumps([vars(config) for config in configs]))


def faithful(script, stage, folder):
    """The arguments of a stage with --faithful, without those that name its run folder."""
    return command((*script, "--faithful"), stage, RUN=str(folder / "run"))


def compare_flags(script, theirs, folder):
    """theirs: the config of --faithful."""
    ours = vars(parse(GRPOConfig, command(script, "grpo")))
    assert theirs["rollout_is_cap"] == 0 != ours["rollout_is_cap"]
    assert theirs["output_dir"] != ours["output_dir"]
    for name in ("num_prompts_per_step", "num_generations", "learning_rate", "beta", "max_steps",
                 "temperature", "reward_funcs", "loss_type"):
        assert ours[name] == theirs[name], f"--faithful must not change {name}"
    evaluation = faithful(script, "evaluate", folder / script[1])
    assert theirs["output_dir"] + "/final" in parse(EvalConfig, evaluation).model


def test_fast_math(patched, demo, tmp_path):
    scripts, base, folder = (R1, NEMOTRON, QWEN3), str(demo / "base"), str(tmp_path)
    lines = [faithful(script, "grpo", tmp_path / script[1]) for script in scripts]
    said = in_patched(
        patched["fast_math_r1"], (check_rewards_of_fast_math,), (check_documents, base, folder),
        (check_flags_of_grpo, lines, folder), (check_groups_of_fast_math, base, folder))
    assert "2.0 steps per epoch" in said and "4.0 steps per epoch" in said
    configs = json.loads((tmp_path / "configs.json").read_text())
    for script, config in zip(scripts, configs, strict=True):
        compare_flags(script, config, tmp_path)
    assert [config["cosine_max_length"] for config in configs] == [30000, 48000, 48000]
    assert [config["lr_horizon"] for config in configs] == [101, 203, -1]
    assert [config["train_fraction"] for config in configs] == [0.5, 1, 1]
    assert [config["max_model_length"] for config in configs] == [16384, 24000, 24512]
    line = " ".join(faithful(R1, "sft", tmp_path / "r1"))
    for flags in ("--loss_on all", "--num_train_epochs 20", "--lr_horizon 780 --max_steps 350"):
        assert flags in line


def test_open_rs(patched, demo, tmp_path):
    scripts, base, folder = (RS1, RS2, RS3), str(demo / "base"), str(tmp_path)
    lines = [faithful(script, "grpo", tmp_path / script[1]) for script in scripts]
    in_patched(
        patched["open_rs"], (check_rewards_of_open_rs,), (check_flags_of_grpo, lines, folder),
        (check_log_probs_of_open_rs, base, folder))
    configs = json.loads((tmp_path / "configs.json").read_text())
    for script, config in zip(scripts, configs, strict=True):
        compare_flags(script, config, tmp_path)
        assert (config["cosine_max_length"], config["answer_column"]) == (3584, "solution")
    evaluation = parse(EvalConfig, faithful(RS3, "evaluate", tmp_path / "rs3"))
    assert (evaluation.prompt_style, evaluation.num_samples) == ("lighteval", 1)


# --------------------------------------------------------------------------------------------------
# One step of the patched trainer
# --------------------------------------------------------------------------------------------------
def one_step(tree, script, demo, folder, **changes):
    """(metrics, answers) of the recipe's first step, where half of the golds are unreadable."""
    rows = read_rows(demo / "rl.jsonl")[:4]
    for row, gold in zip(rows, ["7", "7", *[r"\frac{"] * 2], strict=True):
        row |= {"answer": gold, "solution": r"So \boxed{7}." if gold == "7" else gold}
    flags = dict(
        model_name_or_path=demo / "base", dataset=write_rows(folder / "rows.jsonl", rows),
        output_dir=folder / "run", sync_dir=folder, system_prompt="none", compile="false",
        tensor_parallel_size=1, num_prompts_per_step=2, num_generations=4, max_steps=1,
        max_completion_length=160, top_p=1, min_p=0, **changes)
    flags = [part for name, value in flags.items() for part in (f"--{name}", value)]
    done = run_script(tree / "train_grpo.py", *faithful(script, "grpo", folder), *flags)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (metrics,) = read_rows(folder / "run/metrics.jsonl")
    answers = read_rows(folder / "run/rollouts/step-000001.jsonl")
    assert {c["answer"] for c in answers} == {"7", r"\frac{"}
    return metrics, answers


def prompt_of(answer, tokenizer):
    return encode_prompt(tokenizer, prompt_messages(answer["problem"]))[1]


def check_tokens(metrics, answers, demo, tokenizer):
    """The trainer counts tokens and trains on them, whatever the rewards count."""
    model = transformers.AutoModelForCausalLM.from_pretrained(demo / "base")
    lengths = [len(c["token_ids"]) for c in answers]
    assert len(set(lengths)) > 1 and sum(lengths) != sum(len(c["text"]) for c in answers)
    assert metrics["tokens"] == sum(lengths)
    assert metrics["completions/mean_length"] == np.mean(lengths)
    assert metrics["completions/max_length"] == max(lengths)
    for c in answers:
        prompt, answer = prompt_of(c, tokenizer), c["token_ids"]
        assert c["length"] == len(answer)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1:-1]
        every = logits[:, :len(tokenizer)].log_softmax(-1)
        # [22] at temperature 1, whatever the answers were sampled at
        expected = every[range(len(answer)), answer].tolist()
        assert c["logprobs"] == pytest.approx(expected, abs=2e-4)
        assert c["entropy"] == pytest.approx((-every.exp() * every).sum(-1).tolist(), abs=2e-4)
    return lengths


def test_a_step_of_fast_math(patched, demo, tokenizer, tmp_path):
    metrics, answers = one_step(
        patched["fast_math_r1"], R1, demo, tmp_path, max_model_length=64)
    lengths = check_tokens(metrics, answers, demo, tokenizer)
    for c, length in zip(answers, lengths, strict=True):
        assert c["weight"] == 1 / length  # m_i
        room = 64 - len(prompt_of(c, tokenizer))  # [28]
        assert length == room if c["finish_reason"] == "length" else length <= room
    half = random.Random(2025).sample(range(4), 2)
    assert {c["row"] for c in answers} == set(half) and metrics["epoch"] == 1  # [17]
    # [1] characters, [2] the shortest and the longest answer to two problems, [3] a bad gold pays
    characters = [len(c["text"]) for c in answers]
    shortest, longest = min(characters), max(characters)
    for c, count in zip(answers, characters, strict=True):
        assert c["correct"] == (c["answer"] != "7")
        share = 0.5 - (count - shortest) / (longest - shortest)
        rewards = {"format": 0, "cosine": cosine_reward(count, c["correct"], 30000),
                   "length": share if c["correct"] else min(0, share)}
        assert c["rewards"] == pytest.approx(rewards)
        assert c["reward"] == pytest.approx(sum(rewards.values()))


def test_a_step_of_open_rs(patched, demo, tokenizer, tmp_path):
    metrics, answers = one_step(patched["open_rs"], RS3, demo, tmp_path, cosine_max_length=20)
    lengths = check_tokens(metrics, answers, demo, tokenizer)
    assert all(c["weight"] == 1 for c in answers)  # m_i, and N is the step's tokens:
    advantages = [c["advantage"] for c in answers]
    assert metrics["loss"] == pytest.approx(-np.average(advantages, weights=lengths), abs=1e-5)
    # [1] characters, [3] a bad gold pays, [30] the cosine has no end
    for c in answers:
        assert c["correct"] == (c["answer"] != "7")
        wave = (1 + math.cos(math.pi * len(c["text"]) / 20)) / 4
        cosine = wave + 0.5 if c["correct"] else wave - 0.5
        assert c["rewards"] == pytest.approx({"format_open_rs": 0, "cosine": cosine})
        assert c["reward"] == pytest.approx(2 * cosine)
    assert metrics["rollout/logprob_gap"] > 0.01  # [22]


# --------------------------------------------------------------------------------------------------
# Where the tree has changed
# --------------------------------------------------------------------------------------------------
def test_a_patch_that_does_not_apply_is_refused(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    text = (tree / "rewards.py").read_text()
    (tree / "rewards.py").write_text(text.replace("progress = min(", "share = min("))
    done = run("bash", tree / "recipes/open_rs.sh", "rs3", "--faithful", "grpo",
               LAUNCH="echo", RUN=str(tmp_path / "run"))
    assert done.returncode == 1 and "README" in done.stderr and "rewards.py" in done.stderr
    assert not done.stdout and not (tmp_path / "run_faithful/code").exists()
    hunks = rejected_hunks(ROOT / "recipes/originals/open_rs.patch", tree)
    assert "[30]" in hunks and "[22]" not in hunks


def test_a_faithful_run_keeps_the_code_it_ran(tmp_path):
    """In a checkout, as usual: a second stage, and a resume, take the code of the first."""
    tree = copy_tree(tmp_path / "tree")
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    for text in ((tree / "rewards.py").read_text(), "changed since"):
        (tree / "rewards.py").write_text(text)
        done = run("bash", tree / "recipes/open_rs.sh", "rs3", "--faithful", "grpo", LAUNCH="echo")
        assert done.stdout.startswith("runs/open_rs3_faithful/code/train_grpo.py "), done.stderr
        code = (tree / "runs/open_rs3_faithful/code/rewards.py").read_text()
        assert "[30]" in code and code != text
