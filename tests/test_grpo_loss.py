"""The algorithm of train_grpo.py as mathematics: advantages, denominators, the loss and its gradient, batching."""

import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_config, tiny_model, run_script

from data import MODEL_INPUTS, Problem, collate, micro_batches
from model import flops_per_pack, load_config, load_policy, named_weights, setup_distributed
from rollout import Completion
from train_grpo import (
    COLUMNS, check_step, collect_groups, diagnostics, group_advantages, grpo_loss, has_equal_rewards,
    loss_weights, prompts_at, token_rows)


def settings(**changed):
    """The flags that grpo_loss reads: no KL, no correction, unless changed."""
    return SimpleNamespace(**{"epsilon": 0.2, "epsilon_high": 0.2, "beta": 0.0, "rollout_is_cap": 0.0,
                              "importance_sampling_level": "token", **changed})


def one_answer(**columns):
    """A micro-batch of one document whose every token is trained with weight 1, unless told otherwise."""
    batch = {name: torch.as_tensor(values) for name, values in columns.items()}
    batch.setdefault("mask", torch.ones_like(batch["old_logprobs"]))
    batch["position_ids"] = torch.arange(len(batch["mask"]))
    return batch


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------------------------------ advantages
def test_advantages_against_a_plain_loop():
    rng = random.Random(0)
    rewards = [[rng.choice([0, 0.5, 1, 2.5]) for _ in range(4)] for _ in range(6)]
    everything = [r for group in rewards for r in group]
    mean = sum(everything) / 24
    batch_std = math.sqrt(sum((r - mean) ** 2 for r in everything) / 23)
    for scale in ("group", "batch", "none"):
        ours = group_advantages(torch.tensor(rewards), scale)
        for p, group in enumerate(rewards):
            center = sum(group) / 4
            std = math.sqrt(sum((r - center) ** 2 for r in group) / 3)  # unbiased
            divisor = {"group": std + 1e-4, "batch": batch_std + 1e-4, "none": 1.0}[scale]
            assert ours[p].tolist() == pytest.approx([(r - center) / divisor for r in group], rel=1e-12, abs=1e-12)


def test_equal_rewards_teach_nothing_and_groups_do_not_see_each_other():
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.3, 0.7, 0.2]])  # the mean of three 0.1 is not 0.1 in floating point
    for scale in ("group", "batch", "none"):
        assert group_advantages(rewards, scale)[0].tolist() == [0, 0, 0]
    changed = rewards.clone()
    changed[0] = torch.tensor([5.0, -3, 1])
    assert torch.equal(group_advantages(rewards)[1], group_advantages(changed)[1])
    assert torch.equal(rewards[1], torch.tensor([0.3, 0.7, 0.2]))


def test_an_answer_without_reward_has_no_advantage_and_no_voice():
    ours = group_advantages(torch.tensor([[1.0, 3.0, math.nan], [math.nan] * 3]))
    assert torch.equal(ours[0, :2], group_advantages(torch.tensor([[1.0, 3.0]]))[0])
    assert ours[0, 2] == 0 and ours[1].tolist() == [0, 0, 0]


def test_a_missing_reward_leaves_a_group_of_equal_rewards():
    assert has_equal_rewards(SimpleNamespace(totals=[0.5, math.nan, 0.5]))
    assert not has_equal_rewards(SimpleNamespace(totals=[0.5, math.nan, 1.0]))


# ------------------------------------------------------------------------------------------------ mask and denominator
def test_loss_types_are_masks_and_denominators():
    lengths, counted = [4, 2, 0, 10], [True, True, True, False]
    assert loss_weights("grpo", lengths, counted, 16) == ([0.25, 0.5, 0.0, 0.0], 2.0)
    assert loss_weights("dapo", lengths, counted, 16) == ([1.0, 1.0, 0.0, 0.0], 6.0)
    assert loss_weights("dr_grpo", lengths, counted, 16) == ([1.0, 1.0, 0.0, 0.0], 32.0)
    for loss_type in ("grpo", "dapo", "dr_grpo"):
        assert loss_weights(loss_type, [3, 5], [False, False], 16)[0] == [0, 0]  # and no division by zero
        assert loss_weights(loss_type, [3, 5], [False, False], 16)[1] == 1


# ------------------------------------------------------------------------------------------------ the loss
def random_case(seed, lengths=(11, 4, 9)):
    """(logprobs, batch) of three answers in a pack, some tokens of each inside the mask."""
    g, tokens = torch.Generator().manual_seed(seed), sum(lengths)
    answer = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    names = ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs")
    batch = {name: -2 * torch.rand(tokens, generator=g) for name in names}
    batch["advantages"] = torch.randn(3, generator=g)[answer]
    inside = (torch.rand(tokens, generator=g) < 0.7).double()
    batch["mask"] = inside * torch.tensor([1.0, 0.25, 0.5])[answer]
    batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths])
    return batch.pop("logprobs"), batch


def loop_loss(case, logprobs, epsilon, epsilon_high, beta, level, cap):
    """The same loss with a Python loop over tokens, from the papers' equations; logprobs: list of floats."""
    total, inside = 0.0, [m > 0 for m in case["mask"].tolist()]
    old, ref, rollout_lp, advantages, mask, positions = (case[n].tolist() for n in (
        "old_logprobs", "ref_logprobs", "rollout_logprobs", "advantages", "mask", "position_ids"))
    ids = list(itertools.accumulate(position == 0 for position in positions))
    for t, lp in enumerate(logprobs):
        if not inside[t]:
            continue
        if level == "sequence":
            members = [u for u in range(len(logprobs)) if ids[u] == ids[t] and inside[u]]
            ratio = math.exp(sum(logprobs[u] - old[u] for u in members) / len(members))
        else:
            ratio = math.exp(lp - old[t])
        surrogate = min(ratio * advantages[t], min(max(ratio, 1 - epsilon), 1 + epsilon_high) * advantages[t])
        if cap:
            surrogate *= min(math.exp(old[t] - rollout_lp[t]), cap)
        kl = math.exp(ref[t] - lp) - (ref[t] - lp) - 1
        total += mask[t] * (-surrogate + beta * kl)
    return total / 7.0


@pytest.mark.parametrize(("level", "cap", "beta", "epsilon_high"), list(itertools.product(
    ("token", "sequence"), (None, 2.0, 0.5), (0.0, 0.3), (0.2, 0.6))))
def test_value_and_gradient_against_a_plain_loop(level, cap, beta, epsilon_high):
    for seed in range(4):
        logprobs, case = random_case(seed)
        before = {name: values.clone() for name, values in case.items()}
        batch = case if beta else {name: v for name, v in case.items() if name != "ref_logprobs"}
        logprobs.requires_grad_()
        loss, sums = grpo_loss(logprobs, batch, 7.0, settings(
            epsilon_high=epsilon_high, beta=beta, importance_sampling_level=level, rollout_is_cap=cap))
        options = (0.2, epsilon_high, beta, level, cap)
        base = logprobs.tolist()
        assert loss.item() == sums["loss"] == pytest.approx(loop_loss(case, base, *options), rel=1e-12)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        for t in range(len(base)):
            up, down = (base[:t] + [base[t] + h] + base[t + 1:] for h in (1e-6, -1e-6))
            numeric = (loop_loss(case, up, *options) - loop_loss(case, down, *options)) / 2e-6
            assert gradient[t].item() == pytest.approx(numeric, rel=1e-5, abs=1e-8)
        assert all(torch.equal(case[name], values) for name, values in before.items())  # inputs unmodified
        assert sums["trained_tokens"] == (case["mask"] > 0).sum()


def test_first_on_policy_step_is_reinforce():
    logprobs, batch = random_case(1)
    batch["old_logprobs"] = logprobs.clone()
    logprobs.requires_grad_()
    loss, sums = grpo_loss(logprobs, batch, 7.0, settings())
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert torch.allclose(gradient, -batch["advantages"] * batch["mask"] / 7.0, rtol=1e-12, atol=0)
    assert sums["update/clip_low"] == sums["update/clip_high"] == 0 and sums["update/ratio"] == sums["trained_tokens"]


@pytest.mark.parametrize(("advantage", "log_ratio", "moves"), [
    (1, 0.5, False), (1, -0.5, True), (-1, 0.5, True), (-1, -0.5, False)])
def test_the_clip_stops_one_side_only(advantage, log_ratio, moves):
    logprobs = torch.tensor([-1.0 + log_ratio], requires_grad=True)
    batch = one_answer(old_logprobs=[-1.0], advantages=[float(advantage)])
    loss, sums = grpo_loss(logprobs, batch, 1.0, settings())
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert (gradient.item() != 0) == moves
    assert sums["update/clip_low"] == float(not moves and advantage < 0)
    assert sums["update/clip_high"] == float(not moves and advantage > 0)


def test_k3_is_the_kl_and_its_gradient_that_of_the_reverse_kl():
    """Exact over 7 tokens: E_pi[k3] = KL(pi || ref); as a loss on on-policy samples its gradient is KL(ref || pi)'s."""
    torch.manual_seed(3)
    logits, reference = torch.randn(7, requires_grad=True), torch.randn(7).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    pi = logprobs.exp()
    batch = one_answer(old_logprobs=logprobs.detach(), ref_logprobs=reference, advantages=torch.zeros(7),
                       mask=pi.detach())
    loss, _ = grpo_loss(logprobs, batch, 1.0, settings(beta=1.0))
    assert loss.item() == pytest.approx((pi * (logprobs - reference)).sum().item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (reverse,) = torch.autograd.grad((reference.exp() * (reference - logits.log_softmax(-1))).sum(), logits)
    assert torch.allclose(gradient, reverse, rtol=1e-10, atol=1e-12)


def test_the_importance_weight_is_capped_and_carries_no_gradient():
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    batch = one_answer(old_logprobs=[-1.0, -1.0], rollout_logprobs=[-3.0, -0.5], advantages=[1.0, 1.0])
    loss, _ = grpo_loss(logprobs, batch, 1.0, settings(rollout_is_cap=2.0))  # pi_old / q = e^2, e^-0.5
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient.tolist() == pytest.approx([-2.0, -math.exp(-0.5)])


# ------------------------------------------------------------------------------------------------ batching
def make_groups(seed, prompts=3, answers=4, lengths=None):
    rng, groups = np.random.default_rng(seed), []
    for p in range(prompts):
        completions = []
        for s in range(answers):
            n = int(rng.integers(1, 30)) if lengths is None else lengths[p * answers + s]
            token_ids, logprobs = rng.integers(2, 300, n).tolist(), (-rng.random(n)).tolist()
            completions.append(Completion(p, s, token_ids, logprobs, "stop", 0))
        problem = Problem(p, "", [""], rng.integers(2, 300, int(rng.integers(3, 12))).tolist())
        groups.append(SimpleNamespace(problem=problem, completions=completions))
    return groups


def plan_batches(rows, config, ranks, max_tokens):
    sizes = [len(row["ids"]) for row in rows]
    return micro_batches(sizes, [flops_per_pack(config, [n]) for n in sizes], ranks, max_tokens)


def step_gradient(model, rows, plan, denominator):
    """Gradient of one optimizer step over a plan of micro-batches per rank, played on one process."""
    model.zero_grad()
    loss = 0.0
    for members in itertools.chain(*plan):
        batch = collate([rows[i] for i in members], "cpu", COLUMNS)
        logprobs, _ = model(**{name: batch[name] for name in MODEL_INPUTS})
        batch["old_logprobs"], batch["ref_logprobs"] = logprobs.detach() - 0.1, logprobs.detach() + 0.2
        part, _ = grpo_loss(logprobs, batch, denominator, settings(beta=0.1, rollout_is_cap=2.0))
        part.backward()
        loss += part.item()
    return loss, torch.cat([p.grad.full_tensor().flatten() for _, p in named_weights(model)])


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_the_step_does_not_depend_on_batching_ranks_or_order(loss_type, tmp_path):
    torch.set_default_dtype(torch.float32)
    ctx = setup_distributed()
    try:
        tiny_model(tmp_path)
        config = load_config(tmp_path)
        model = load_policy(tmp_path, ctx)
        groups = make_groups(0)
        lengths = [len(c.token_ids) for g in groups for c in g.completions]
        weights, denominator = loss_weights(loss_type, lengths, [True] * 12, 64)
        rows = token_rows(groups, torch.linspace(-1, 1, 12), weights)
        shuffled = random.Random(0).sample(rows, len(rows))
        found = [step_gradient(model, r, plan_batches(r, config, ranks, limit), denominator)
                 for r, ranks, limit in ((rows, 1, 1000), (rows, 1, 45), (rows, 2, 90), (rows, 5, 45),
                                         (shuffled, 3, 60))]
        found.append(step_gradient(model, rows, [[[i] for i in range(12)]], denominator))
        for loss, gradient in found[1:]:
            assert abs(loss / found[0][0] - 1) < 1e-5
            assert (gradient - found[0][1]).abs().max() / found[0][1].abs().max() < 1e-5
    finally:
        torch.distributed.destroy_process_group()


TWO_RANKS = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
from model import exit_process, load_config, load_policy, setup_distributed, sum_over_ranks
from test_grpo_loss import make_groups, plan_batches, step_gradient
from train_grpo import loss_weights, token_rows
torch.set_default_dtype(torch.float32)
ctx = setup_distributed(2)
model, config = load_policy({folder!r}, ctx), load_config({folder!r})
found = []
uneven = [3, 200, 1, 7, 0, 64, 200, 2, 1, 30, 9, 0]  # two answers of length 0
for lengths in (uneven, [200], [1, 1]):  # the second leaves a rank without any work
    groups = make_groups(0, prompts=1, answers=len(lengths), lengths=lengths)
    weights, denominator = loss_weights("grpo", lengths, [True] * len(lengths), 256)
    rows = token_rows(groups, torch.linspace(-1, 1, len(lengths)), weights)
    plan = plan_batches(rows, config, ctx.world_size, 256)
    loss, gradient = step_gradient(model, rows, [plan[ctx.rank]], denominator)
    found.append((sum_over_ranks(ctx, {{"loss": loss}})["loss"], gradient))
if ctx.rank == 0:
    torch.save(found, {out!r} + str(ctx.world_size))
exit_process(0)
"""


def test_real_ranks_with_uneven_and_empty_shares_give_the_same_gradient(tmp_path):
    torch.set_default_dtype(torch.float32)
    tiny_model(tmp_path / "model")
    torch.set_default_dtype(torch.float64)
    script = tmp_path / "ranks.py"
    script.write_text(TWO_RANKS.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path / "model"),
                                       out=str(tmp_path / "world")))
    for ranks in (1, 2):
        done = run_script(script, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    for (loss, gradient), (loss2, gradient2) in zip(torch.load(tmp_path / "world1"), torch.load(tmp_path / "world2"),
                                                    strict=True):
        assert abs(loss2 / loss - 1) < 1e-5
        assert (gradient2 - gradient).abs().max() / gradient.abs().max() < 1e-5


def test_rows_align_every_number_with_the_token_it_belongs_to():
    (group,) = make_groups(5, prompts=1, answers=2, lengths=[3, 0])
    rows = token_rows([group], torch.tensor([2.0, -1.0]), [0.5, 0.0])
    prompt, completion = group.problem.prompt_ids, group.completions[0]
    batch = collate(rows, "cpu", COLUMNS)
    first = len(prompt) - 1  # the prompt's last token predicts the answer's first
    inside = slice(first, first + 3)
    assert batch["targets"][inside].tolist() == completion.token_ids
    assert batch["mask"].nonzero().flatten().tolist() == list(range(first, first + 3))  # stop token included
    assert batch["rollout_logprobs"][inside].tolist() == pytest.approx(completion.logprobs)
    assert batch["advantages"][inside].tolist() == [2.0] * 3
    assert all(len(batch[name]) == len(batch["input_ids"]) for name in (*COLUMNS, "position_ids", "targets"))


@pytest.mark.parametrize("lengths", [[1] * 8, [200] + [1] * 7, [0] * 8, [256] * 8, [0, 256, 1, 1, 1, 1, 1, 1]])
def test_ranks_always_run_the_same_number_of_micro_batches(lengths):
    rows = token_rows(make_groups(1, prompts=2, lengths=lengths), torch.zeros(8), [1.0] * 8)
    for ranks in (1, 2, 3, 16):
        plan = plan_batches(rows, tiny_config(), ranks, 300)
        assert len(plan) == ranks and len({len(packs) for packs in plan}) == 1
        assert sorted(i for packs in plan for members in packs for i in members) == list(range(8))
        assert max(sum(len(rows[i]["ids"]) for i in members) for packs in plan for members in packs) <= 300


def test_prompts_are_neither_repeated_nor_skipped():
    numbers = list(range(10))
    whole = prompts_at(numbers, range(40), seed=1)
    for epoch in range(4):
        assert sorted(whole[10 * epoch:10 * epoch + 10]) == numbers
    pieces, cursor = [], 0
    for count in (3, 8, 1, 0, 16, 12):
        pieces += prompts_at(numbers, range(cursor, cursor + count), seed=1)
        cursor += count
    assert pieces == whole and whole[:10] != whole[10:20] != prompts_at(numbers, range(10, 20), seed=2)


def scripted_sampler(equal):
    """sample_groups for collect_groups: a group has equal rewards where its problem number is in `equal`."""
    asked = []

    def sample(cfg, problems, places):
        asked.append(list(places))
        return [SimpleNamespace(problem=i, scored=SimpleNamespace(totals=[0.5, 0.5 if i in equal else 1.0]))
                for i in problems]
    return sample, asked


def test_dynamic_sampling_replaces_groups_of_equal_rewards_until_its_rounds_are_used_up():
    cfg = SimpleNamespace(dynamic_sampling_rounds=2, num_prompts_per_step=4, seed=3)
    order = prompts_at(list(range(20)), range(20), seed=3)
    sample, asked = scripted_sampler({order[1], order[2], order[5]})
    groups, cursor = collect_groups(sample, list(range(20)), 0, cfg)
    assert asked == [[0, 1, 2, 3], [4, 5], [6]] and cursor == 7
    assert [g.problem for g in groups] == [order[i] for i in (0, 3, 4, 6)]
    sample, asked = scripted_sampler(set(range(20)))  # nothing but equal rewards: the last round's are kept
    groups, cursor = collect_groups(sample, list(range(20)), 0, cfg)
    assert len(groups) == 4 and cursor == 12
    cfg.dynamic_sampling_rounds = 0
    sample, asked = scripted_sampler({order[1]})
    groups, cursor = collect_groups(sample, list(range(20)), 0, cfg)
    assert len(groups) == 4 and asked == [[0, 1, 2, 3]] and cursor == 4


def test_balance_of_the_update_over_eight_ranks():
    sizes = np.random.default_rng(0).lognormal(8.9, 0.5, 128).clip(300, 16384).astype(int).tolist()
    config = tiny_config(hidden_size=64)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size = 5120, 13824, 48, 152064
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 40, 8, 128
    costs = [flops_per_pack(config, [n]) for n in sizes]
    plan = micro_batches(sizes, costs, 8, 16384)
    loads = np.array([[sum(costs[i] for i in members) for members in packs] for packs in plan])  # (ranks, turns)
    assert loads.sum(1).max() / loads.sum(1).mean() <= 1.01
    assert loads.max(0).sum() / loads.mean(0).sum() <= 1.03  # in every turn all ranks wait for the slowest


# ------------------------------------------------------------------------------------------------ sampler and trainer
def gap_metrics(old, rollout, mask, **flags):
    batch = one_answer(old_logprobs=old, rollout_logprobs=rollout, mask=mask)
    batch["entropy"] = torch.ones(len(mask))
    sums = diagnostics(batch, SimpleNamespace(**{"top_p": 1.0, "min_p": 0.0, **flags}))
    return {name: total / sum(m > 0 for m in mask) for name, total in sums.items()}


def test_the_gap_counts_trained_tokens_and_what_a_cut_off_tail_does_not_explain():
    metrics = gap_metrics([-1.0, -2.0, -3.0, -1.0], [-1.2, -2.0, 5.0, -0.5], [1.0, 0.5, 0.0, 1.0])
    assert metrics["rollout/logprob_gap"] == pytest.approx(0.7 / 3)
    assert metrics["rollout/off_by_10_percent"] == pytest.approx(2 / 3) and metrics["update/entropy"] == 1
    cut = gap_metrics([-1.0, -2.0, -3.0, -1.0], [-1.2, -2.0, 5.0, -0.5], [1.0, 0.5, 0.0, 1.0], top_p=0.9)
    assert cut["rollout/logprob_gap"] == pytest.approx(0.2 / 3)  # q above pi_old is what cutting off does
    assert cut["rollout/off_by_10_percent"] == pytest.approx(1 / 3)


def test_a_disagreeing_sampler_and_missing_rewards_end_the_run(capsys):
    ctx = SimpleNamespace(is_main=True)
    good = {"reward/missing": 0.2, "rollout/logprob_gap": 0.05, "rollout/off_by_10_percent": 0.1}
    assert check_step(good, 2, 0.1, ctx) == 0
    for bad in ({"rollout/logprob_gap": 0.3}, {"rollout/off_by_10_percent": 0.3}, {"rollout/logprob_gap": math.nan}):
        assert check_step(good | bad, 0, 0.1, ctx) == 1 and "disagree" in capsys.readouterr().out
        with pytest.raises(ValueError, match="3 steps in a row"):
            check_step(good | bad, 2, 0.1, ctx)
    with pytest.raises(ValueError, match="30% of the answers have no reward"):
        check_step(good | {"reward/missing": 0.3}, 0, 0.1, ctx)
