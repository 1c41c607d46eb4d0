"""
Score a finished run's stored completions with today's grader and list what changed.

    python recipes/regrade.py runs/NAME [--output FILE]

Reads RUN/config.json and RUN/rollouts/step-*.jsonl.  Correctness and the rewards that depend on it
are computed again; other rewards, a user's own among them, stay as stored.  Prints a table of the
flips and counts, and writes the new rows to FILE (JSONL) if given, and nothing else.
"""

import argparse
import json
import math
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import read_jsonl, write_atomically  # noqa: E402
from rewards import (  # noqa: E402
    RewardedGroup,
    RewardOptions,
    built_in_part,
    check_reward_options,
    extract_answer,
    judge,
    part_name,
    weighted_totals,
)

NEED_CORRECT = ("accuracy", "cosine", "length")


def regrade(run, output=None):
    """Compare and print; returns the number of flips."""
    run = Path(run)
    if not (run / "config.json").is_file() or not (run / "rollouts").is_dir():
        sys.exit(f"{run} has no config.json and rollouts/: name a run directory of train_grpo.py")
    config = json.loads((run / "config.json").read_text())
    known = {field.name for field in fields(RewardOptions)}
    options = RewardOptions(**{key: value for key, value in config.items() if key in known})
    groups = {}
    for path in sorted((run / "rollouts").glob("step-*.jsonl")):
        for row in read_jsonl(path):
            groups.setdefault((row["step"], row["prompt_index"]), []).append(row)
    regraded, flips = [], []
    for rows in groups.values():
        scored = regrade_group(rows, options)
        for i, row in enumerate(rows):
            parts = {name: values[i] for name, values in scored.parts.items()}
            new = {**row, "correct": scored.correct[i], "outcome": scored.outcomes[i],
                   "reward": scored.totals[i], "rewards": parts}
            regraded.append(new)
            if row["correct"] != new["correct"]:
                flips.append((row, new))
    print_flips(flips, options.answer_scope)
    outcomes = Counter(row["outcome"] for row in regraded)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(f"{len(regraded)} completions in {len(groups)} groups: {counts}")
    now = Counter(new["correct"] for _, new in flips)
    print(f"{len(flips)} flips: {now[True]} to right, {now[False]} to wrong, "
          f"{now[None]} to unknown")
    if output:
        write_atomically(output, "".join(json.dumps(row) + "\n" for row in regraded))
        print(f"wrote {output}")
    return len(flips)


def regrade_group(rows, options):
    """RewardedGroup of one group's stored rows."""
    texts, lengths = [row["text"] for row in rows], [row["length"] for row in rows]
    outcomes, correct = judge(texts, rows[0]["answer"], options.answer_scope)
    outcomes = [row["outcome"] if row["outcome"] in ("timeout", "crash", "no_verdict") else now
                for row, now in zip(rows, outcomes, strict=True)]
    rewards, parts = check_reward_options(options), {}
    for name, _ in rewards:
        stored = [row["rewards"].get(part_name(name), math.nan) for row in rows]
        again = name in NEED_CORRECT
        values = built_in_part(name, texts, correct, lengths, options) if again else stored
        parts[part_name(name)] = values
    totals = weighted_totals(parts, correct, rewards)
    return RewardedGroup(parts, totals, outcomes, correct, lengths)


def print_flips(flips, answer_scope):
    if flips:
        print(f"{'step':>6} {'prompt':>6} {'sample':>6}  {'stored':<10} {'now':<10} "
              f"{'reward':>16}  gold | answer")
    for old, new in flips:
        print(f"{old['step']:>6} {old['prompt_index']:>6} {old['sample_index']:>6}  "
              f"{old['outcome']:<10} {new['outcome']:<10} {old['reward']:>6.2f} -> "
              f"{new['reward']:>6.2f}  {old['answer']} | "
              f"{extract_answer(old['text'], answer_scope)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("run", help="Run directory of train_grpo.py.")
    parser.add_argument("--output", help="Write the rows with their new rewards to this file.")
    arguments = parser.parse_args()
    regrade(arguments.run, arguments.output)
