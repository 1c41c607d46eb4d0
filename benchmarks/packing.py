"""
B5: how full the packs are and how evenly ranks are loaded, on the recipes' length distributions.

    python benchmarks/packing.py

Stage 1: 7,900 traces, mean 7,580 tokens, E[l^2] / E[l] = 9,700, at most 24,000 (inferred from the
published training curve; the shape, a cut log-normal, is assumed). Stage 2: 128 answers per step,
mean 8,000, at most 16,384. Cost of a pack: flops_per_pack on the 14B config. These are counts: they
hold on any machine.

Every rank waits for the slowest in every micro-batch (the collectives of FSDP), so the time of a
step is sum over micro-batches of max over ranks; imbalance is that, divided by the mean over ranks.
"""

import random
import time

import report

from data import assign_to_ranks, micro_batches, pack, steps_of_epoch
from model import flops_per_pack

QWEN2_14B = dict(
    vocab_size=152_064, hidden_size=5120, intermediate_size=13_824, num_hidden_layers=48,
    num_attention_heads=40, num_key_value_heads=8, max_position_embeddings=131_072,
    tie_word_embeddings=False)
RANKS, PACKS_PER_STEP = 8, 64


def log_normal_lengths(rng, count, mean, longest, cv):
    """Lengths from a log-normal cut at `longest`, scaled until the cut mean is `mean`."""
    import math

    sigma = math.sqrt(math.log(1 + cv * cv))
    shapes = [math.exp(rng.gauss(0, sigma)) for _ in range(3 * count)]
    low, high = 1.0, 10.0 * mean
    for _ in range(60):  # bisection on the scale: the mean of what survives the cut grows with it
        scale = (low + high) / 2
        kept = [s * scale for s in shapes if s * scale <= longest][:count]
        low, high = (scale, high) if sum(kept) / len(kept) < mean else (low, scale)
    return [max(16, int(n)) for n in kept]


def imbalance(assigned, costs):
    """sum over micro-batches of the slowest rank's cost / mean over ranks of their total cost."""
    turns = max(map(len, assigned))
    def cost(mine, t):
        return costs[mine[t]] if t < len(mine) and mine[t] >= 0 else 0.0

    slowest = sum(max(cost(mine, t) for mine in assigned) for t in range(turns))
    total = sum(costs[i] for mine in assigned for i in mine if i >= 0)
    return slowest / (total / len(assigned))


def first_fit_in_order(lengths, capacity):
    """Greedy packing in shuffled order, the usual alternative to best-fit decreasing."""
    packs, room = [[]], capacity
    for i, n in enumerate(lengths):
        if n > room:
            packs.append([])
            room = capacity
        packs[-1].append(i)
        room -= n
    return packs


def mean(values):
    return sum(values) / len(values)


def stage_1(config, rng):
    """(rows of the table, facts about the lengths): packs of an epoch, on 8 ranks."""
    lengths = log_normal_lengths(rng, 7_900, 7_580, 24_000, cv=0.53)
    started = time.perf_counter()
    packs = pack(lengths, 24_000)
    pack_seconds = time.perf_counter() - started
    fill = sum(lengths) / (len(packs) * 24_000)
    greedy_fill = sum(lengths) / (len(first_fit_in_order(lengths, 24_000)) * 24_000)
    batch = 3  # documents of a padded batch of about 24,000 tokens
    shuffled = rng.sample(lengths, len(lengths))
    batches = [shuffled[i:i + batch] for i in range(0, len(shuffled), batch)]
    padded = sum(batch * max(members) for members in batches) / sum(lengths)
    costs = [flops_per_pack(config, [lengths[i] for i in members]) for members in packs]
    assigned, at_random = [], []
    for epoch in range(5):
        for members in steps_of_epoch(len(packs), PACKS_PER_STEP, 42, epoch):
            chosen = [costs[i] for i in members]
            assigned.append(imbalance(assign_to_ranks(chosen, RANKS), chosen))
            order = rng.sample(range(len(chosen)), len(chosen))
            at_random.append(imbalance([order[r::RANKS] for r in range(RANKS)], chosen))
    rows = [
        ("fill, best-fit decreasing", fill, ">= 0.99"),
        ("fill, greedy in order", greedy_fill, ""),
        ("tokens computed, padded batches of 3 / packed", padded, ""),
        ("cost imbalance of 8 ranks, assign_to_ranks()", mean(assigned), "<= 1.05"),
        ("cost imbalance, random assignment", mean(at_random), "(>= 1.15 expected)"),
        ("seconds to pack 7,900 documents", pack_seconds, ""),
    ]
    second_moment = sum(n * n for n in lengths) / sum(lengths)
    facts = {"mean_length": mean(lengths), "second_moment_over_mean": second_moment}
    return rows, {**facts, "packs": len(packs)}


def stage_2(config, rng):
    """Rows of the table: the answers of a step, in micro-batches."""
    totals, waits, blocks, to_longest = [], [], [], []
    for _ in range(50):
        answers = log_normal_lengths(rng, 128, 8_000, 16_384, cv=0.55)
        sizes = [250 + n for n in answers]  # a prompt of 250 tokens
        costs = [flops_per_pack(config, [size]) for size in sizes]
        plan = micro_batches(sizes, costs, RANKS, 16_384 + 512)
        loads = [sum(costs[i] for members in mine for i in members) for mine in plan]
        totals.append(max(loads) / mean(loads))
        merged = [sum(costs[i] for i in members) for mine in plan for members in mine]
        turns = len(plan[0])
        in_turn = [list(range(r * turns, (r + 1) * turns)) for r in range(RANKS)]
        waits.append(imbalance(in_turn, merged))
        in_order = [sum(costs[r * 16:(r + 1) * 16]) for r in range(RANKS)]
        blocks.append(max(in_order) / mean(in_order))
        # TRL pads every answer of a rank's generation batch to the longest of them
        longest = [max(answers[r * 16:(r + 1) * 16]) for r in range(RANKS)]
        to_longest.append(sum(16 * (250 + n) for n in longest) / sum(sizes))
    return [
        ("total cost per rank, max / mean", mean(totals), "<= 1.01"),
        ("same, whole groups per rank", mean(blocks), "(1.3 expected)"),
        ("imbalance of micro-batches (what ranks wait)", mean(waits), "<= 1.05"),
        ("token positions, padded to the longest / packed", mean(to_longest), ">= 1.7"),
    ]


def main():
    import transformers

    config, rng = transformers.Qwen2Config(**QWEN2_14B), random.Random(0)
    first, facts = stage_1(config, rng)
    second = stage_2(config, rng)
    rows = [{"what": f"stage {stage}: {what}", "value": value, "target": target}
            for stage, part in ((1, first), (2, second)) for what, value, target in part]
    report.finish("packing", rows, **facts)


if __name__ == "__main__":
    main()
