"""
B5: how full the packs are, how evenly ranks are loaded; data.py's rules on the recipes' length distributions.

    python benchmarks/packing.py

Stage 1: 7,900 traces, mean 7,580 tokens, E[l^2] / E[l] = 9,700, at most 24,000 (inferred from the
published training curve; the shape, a cut log-normal, is assumed). Stage 2: 128 answers per step, mean 8,000, at most
16,384. Cost of a pack: model.flops_per_pack on the 14B config. These are counts: they hold on any machine.

Every rank waits for the slowest in every micro-batch (the collectives of FSDP), so the time of a step is
sum over micro-batches of max over ranks; imbalance is that, divided by the mean over ranks, minus nothing.
"""

import random
import time

import report

import data
import model
import train_grpo

QWEN2_14B = dict(vocab_size=152_064, hidden_size=5120, intermediate_size=13_824, num_hidden_layers=48,
                 num_attention_heads=40, num_key_value_heads=8, max_position_embeddings=131_072,
                 tie_word_embeddings=False)
RANKS, PACKS_PER_STEP = 8, 64


def log_normal_lengths(rng, count, mean, longest, cv):
    """Lengths from a log-normal cut at `longest` (drawn again), scaled until the cut mean is `mean`."""
    import math

    sigma = math.sqrt(math.log(1 + cv * cv))
    shapes = [math.exp(rng.gauss(0, sigma)) for _ in range(3 * count)]
    low, high = 1.0, 10.0 * mean
    for _ in range(60):  # bisection on the scale: the mean of what survives the cut grows with it
        scale = (low + high) / 2
        kept = [s * scale for s in shapes if s * scale <= longest][:count]
        low, high = (scale, high) if sum(kept) / len(kept) < mean else (low, scale)
    return [max(16, int(n)) for n in kept]


def imbalance(hands, costs):
    """sum over micro-batches of the slowest rank's cost / mean over ranks of their total cost."""
    turns = max(map(len, hands))
    slowest = sum(max(costs[hand[t]] if t < len(hand) and hand[t] >= 0 else 0.0 for hand in hands)
                  for t in range(turns))
    return slowest / (sum(costs[i] for hand in hands for i in hand if i >= 0) / len(hands))


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


def main():
    import transformers

    config, rng, rows = transformers.Qwen2Config(**QWEN2_14B), random.Random(0), []

    # ------------------------------------------------------------------------------------------------ stage 1
    lengths = log_normal_lengths(rng, 7_900, 7_580, 24_000, cv=0.53)
    mean = sum(lengths) / len(lengths)
    started = time.perf_counter()
    packs = data.pack(lengths, 24_000)
    pack_seconds = time.perf_counter() - started
    fill = sum(lengths) / (len(packs) * 24_000)
    greedy_fill = sum(lengths) / (len(first_fit_in_order(lengths, 24_000)) * 24_000)
    batch = 3  # documents of a padded batch of about 24,000 tokens
    shuffled = rng.sample(lengths, len(lengths))
    padded = sum(batch * max(shuffled[i:i + batch]) for i in range(0, len(shuffled), batch)) / sum(lengths)
    costs = [model.flops_per_pack(config, [lengths[i] for i in pack]) for pack in packs]
    dealt, at_random = [], []
    for epoch in range(5):
        for members in data.steps_of_epoch(len(packs), PACKS_PER_STEP, 42, epoch):
            chosen = [costs[i] for i in members]
            dealt.append(imbalance(data.assign_to_ranks(chosen, RANKS), chosen))
            order = rng.sample(range(len(chosen)), len(chosen))
            at_random.append(imbalance([order[r::RANKS] for r in range(RANKS)], chosen))
    rows += [
        {"what": "stage 1: fill, best-fit decreasing", "value": fill, "target": ">= 0.99"},
        {"what": "stage 1: fill, greedy in order", "value": greedy_fill, "target": ""},
        {"what": "stage 1: tokens computed, padded batches of 3 / packed", "value": padded, "target": ""},
        {"what": "stage 1: cost imbalance of 8 ranks, deal()", "value": sum(dealt) / len(dealt), "target": "<= 1.05"},
        {"what": "stage 1: cost imbalance, random dealing", "value": sum(at_random) / len(at_random),
         "target": "(>= 1.15 expected)"},
        {"what": "stage 1: seconds to pack 7,900 documents", "value": pack_seconds, "target": ""},
    ]

    # ------------------------------------------------------------------------------------------------ stage 2
    totals, waits, blocks, to_longest = [], [], [], []
    for _ in range(50):
        answers = log_normal_lengths(rng, 128, 8_000, 16_384, cv=0.55)
        documents = [{"ids": range(250 + n)} for n in answers]  # a prompt of 250 tokens
        costs = [model.flops_per_pack(config, [len(d["ids"])]) for d in documents]
        plan = train_grpo.micro_batches(documents, config, RANKS, 16_384 + 512)
        loads = [sum(costs[i] for members in packs for i in members) for packs in plan]
        totals.append(max(loads) / (sum(loads) / RANKS))
        merged = [sum(costs[i] for i in members) for rank in plan for members in rank]
        turns = len(plan[0])
        waits.append(imbalance([list(range(r * turns, (r + 1) * turns)) for r in range(RANKS)], merged))
        in_order = [sum(costs[r * 16:(r + 1) * 16]) for r in range(RANKS)]
        blocks.append(max(in_order) / (sum(in_order) / RANKS))
        # TRL pads every answer of a rank's generation batch to the longest of them
        padded_tokens = sum(16 * (250 + max(answers[r * 16:(r + 1) * 16])) for r in range(RANKS))
        to_longest.append(padded_tokens / sum(len(d["ids"]) for d in documents))
    average = lambda values: sum(values) / len(values)  # noqa: E731
    rows += [
        {"what": "stage 2: total cost per rank, max / mean", "value": average(totals), "target": "<= 1.01"},
        {"what": "stage 2: same, whole groups per rank", "value": average(blocks), "target": "(1.3 expected)"},
        {"what": "stage 2: imbalance of micro-batches (what ranks wait)", "value": average(waits), "target": "<= 1.05"},
        {"what": "stage 2: token positions, padded to the longest / packed", "value": average(to_longest),
         "target": ">= 1.7"},
    ]
    second_moment = sum(n * n for n in lengths) / sum(lengths)
    report.finish("packing", rows, mean_length=mean, second_moment_over_mean=second_moment, packs=len(packs))


if __name__ == "__main__":
    main()
