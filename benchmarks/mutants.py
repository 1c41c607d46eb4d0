"""
Break the code on purpose, one line at a time, in a copy of this checkout, and see the tests fail.

    python benchmarks/mutants.py [--only WORD ...]     a table; SURVIVED, and exit status 1,
                                                       where no test notices

A test that survives the mutation of what it claims to test is no test. Each mutant names the
fastest tests that should notice. The last line of stdout is JSON.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOSS, DATA, FORWARD = "tests/test_grpo_loss.py", "tests/test_data.py", "tests/test_forward.py"
MODEL = "tests/test_model.py"
VALUES = f"{LOSS} -k 'plain_loop or equal_rewards_teach'"
ROLLOUTS = "tests/test_grpo.py -k every_completion"  # starts vLLM: a minute

GRPO_MUTANTS = [  # what, the line's text, what it becomes, arguments of pytest
    ("sign of the loss", "token_loss = -surrogate", "token_loss = surrogate", VALUES),
    ("min and max swapped", "torch.minimum(", "torch.maximum(", VALUES),
    ("mask dropped", "(token_loss * mask).sum()", "token_loss.sum()", VALUES),
    ("local denominator", "(token_loss * mask).sum() / denominator",
     "(token_loss * mask).sum() / mask.sum()", VALUES),
    ("biased std", "(count - 1).clamp(min=1)", "count", VALUES),
    ("ratio detached", "ratio = log_ratio.exp()", "ratio = log_ratio.exp().detach()", VALUES),
    ("reversed clip", "ratio.clamp(1 - cfg.epsilon, 1 + cfg.epsilon_high)",
     "ratio.clamp(1 - cfg.epsilon_high, 1 + cfg.epsilon)", VALUES),
    ("mean not subtracted", "rewards - rewards.nanmean(1, keepdim=True)",
     "rewards", VALUES),
    ("k1 for k3", "kl = delta.exp() - delta - 1", "kl = -delta", VALUES),
    ("importance weight without cap", "rollout_weight.clamp(max=cfg.rollout_is_cap)",
     "rollout_weight", f"{LOSS} -k importance_weight"),
    ("importance weight with gradient", 'rollout_weight = (batch["old_logprobs"] -',
     "rollout_weight = (logprobs -", f"{LOSS} -k importance_weight"),
    ("sequence ratio: sum for mean", "zeros.index_add(0, answer, log_ratio) / length",
     "zeros.index_add(0, answer, log_ratio)", VALUES),
    ("stop token outside the mask", "    return rows\n",
     "    for row in rows:\n        row['mask'][-1:] = 0\n    return rows\n",
     f"{LOSS} -k rows_align"),
    ("rollout log-probs off by one", "np.append(prompt, completion.logprobs)",
     "np.append(prompt[1:], [*completion.logprobs, 0])", f"{LOSS} -k rows_align"),
    ("epochs in the same order", 'random.Random(f"{seed}/{epoch}")', 'random.Random(f"{seed}")',
     f"{LOSS} -k neither_repeated"),
    ("replaced prompts forgotten", "cursor = places.stop", "cursor += cfg.num_prompts_per_step",
     f"{LOSS} -k dynamic_sampling"),
    ("equal rewards: missing ones count", " if not math.isnan(total)}", "}",
     f"{LOSS} -k 'equal_rewards or missing_reward'"),
    ("gap or share instead of both", "if gap <= allowed and share", "if gap <= allowed or share",
     f"{LOSS} -k disagreeing"),
    ("template's stop token not passed on", "stop_token_id=stop_token,", "",
     "tests/test_grpo.py -k stop_token"),
    ("a dry run plans for its own ranks", "ranks = cfg.ranks or ctx.world_size",
     "ranks = ctx.world_size", "tests/test_grpo.py -k dry_run"),
    ("lengths in characters", "[len(c.token_ids) for g in groups for c in g.completions]  # B",
     "[n for g in groups for n in g.scored.lengths]  # B",
     "tests/test_originals.py -k step_of_open_rs"),
    ("log-probs of the wrong tokens", "slice(end - 1 - lengths[number], end - 1)",
     "slice(end - lengths[number], end)", ROLLOUTS),
]
DATA_MUTANTS = [
    ("no empty micro-batches", "[bins[i] for i in mine]", "[bins[i] for i in mine if bins[i]]",
     f"{LOSS} -k same_number"),
    ("micro-batches over the limit", "fits = all(", "fits = any(", f"{DATA} -k micro_batches"),
    ("micro-batches of equal counts", "bins = split_evenly(costs, per_rank",
     "bins = split_evenly([1] * len(costs), per_rank", f"{LOSS} -k balance_of"),
    ("targets cross a border", "np.append(row[name][1:], 0)",
     "np.append(row[name][1:], row[name][0])", f"{DATA} -k collate"),
    ("masks not shifted", "column: shifted(column)",
     "column: np.concatenate([row[column] for row in rows])", f"{DATA} -k collate"),
    ("end of turn not trained", "len(answer_ids) + turn.trained] = 1", "len(answer_ids)] = 1",
     f"{DATA} -k end_of_turn_are"),
    ("prompt trained too", "mask[len(prompt_ids):len(prompt_ids)", "mask[1:len(prompt_ids)",
     f"{DATA} -k end_of_turn_are"),
    ("worst fit packing", "at = bisect.bisect_left(room, (lengths[i], -1))",
     "at = len(room) - 1 if room and room[-1][0] >= lengths[i] else len(room)",
     f"{DATA} -k best_fit"),
    ("random assignment to ranks",
     "order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))\n    order += [-1]",
     "order = list(range(len(costs)))\n    order += [-1]", f"{DATA} -k ranks_get"),
    ("float32 golds with all their bits", "leaf if kind == pyarrow.float32() else kind", "kind",
     f"{DATA} -k float32"),
]
MODEL_MUTANTS = [
    ("attention crosses documents", "lengths = cu_seqlens.diff().tolist()",
     "lengths = [int(cu_seqlens[-1])]", f"{FORWARD} -k neighbours"),
    ("temperature forgotten in backward", "grad_logprobs[rows, None] / ctx.temperature",
     "grad_logprobs[rows, None]", f"{FORWARD} -k chunked_head_equals"),
    ("another temperature if tied",
     "token_logprobs(hidden, weight, targets, temperature, self.head_chunk_size)",
     "token_logprobs(hidden, weight, targets, temperature + 0.1, self.head_chunk_size)",
     f"{FORWARD} -k packed_loss"),
    ("padding in the softmax if tied", "self.model.embed_tokens.weight[:vocab_size]",
     "self.model.embed_tokens.weight", f"{FORWARD} -k padding"),
    ("padding in the softmax if untied", "self.weight[:vocab_size]", "self.weight",
     f"{FORWARD} -k padding"),
    ("rotary buffers not restored",
     "rotary_emb = type(model.model.rotary_emb)(config=config).to(ctx.device)",
     "rotary_emb = model.model.rotary_emb", f"{FORWARD} -k packed_loss"),
    ("gathered copies saved", "            module.reshard()\n", "            pass\n",
     f"{MODEL} -k masters"),
    ("gradients averaged over ranks", "unit.set_gradient_divide_factor(1.0)", "pass",
     f"{MODEL} -k two_ranks"),
    ("checksums not compared", "if file_crc32(folder / name) != manifest[name]:", "if False:",
     f"{MODEL} -k damaged_checkpoints"),
    ("exit through the interpreter", "    os._exit(status)\n", "    sys.exit(status)\n",
     f"{MODEL} -k leaving"),
    ("weights hashed by their head", "for i in range(64):", "for i in range(1):",
     f"{MODEL} -k folder_hash_follows_the_weights"),
    ("resume with another identity", 'differences(then["identity"], now["identity"])', "''",
     "tests/test_faults.py -k another_identity"),
]
OTHER_MUTANTS = {
    "rewards.py": [
        ("no verdict pays 0", "return outcome.pop(), math.nan", "return outcome.pop(), 0.0",
         "tests/test_rewards.py -k no_verdict"),
    ],
    "rollout.py": [
        ("stop token not asked for", "stop_token_ids=self.stop_token_ids)", "stop_token_ids=[])",
         "tests/test_rollout.py -k templates_stop_token"),
        ("probe passes NaN", "if not gap <= tolerance:", "if gap > tolerance:",
         "tests/test_rollout.py -k check_probe"),
        ("weights stay in memory", "    finally:\n        remove()\n",
         "    finally:\n        pass\n", "tests/test_faults.py -k weights_leave"),
    ],
}
FILES = {"train_grpo.py": GRPO_MUTANTS, "data.py": DATA_MUTANTS, "model.py": MODEL_MUTANTS,
         **OTHER_MUTANTS}
MUTANTS = [(what, file, *rest) for file, mutants in FILES.items() for what, *rest in mutants]


def broken(what, file, old, new):
    """The file's text with a mutant in it; ends the program when its line is not there once."""
    original = (ROOT / file).read_text()
    if original.count(old) != 1:
        sys.exit(f"mutants.py: {what}: {old!r} occurs {original.count(old)} times in {file}; "
                 "update the list")
    return original.replace(old, new)


def first_failure(copy, tests):
    """The first test that fails, '' if none does; ends the program when no test runs."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *shlex.split(tests)], cwd=copy, capture_output=True,
                          text=True, check=False)
    if done.returncode not in (0, 1):
        sys.exit(f"mutants.py: pytest {tests} ran no test:\n{done.stdout[-2000:]}")
    found = re.search(r"^(?:FAILED|ERROR) \S+?::(\w+)", done.stdout, re.MULTILINE)
    return found.group(1) if found else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""],
                        help="mutants whose description holds one of these words")
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if any(word in mutant[0] for word in args.only)]
    texts = [broken(*mutant[:4]) for mutant in chosen]

    survivors = []
    print(f"{'what is broken':<36} {'file':<14} {'s':>4}  caught by")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "copy")
        ignored = shutil.ignore_patterns(
            ".git", ".venv*", ".wheels", "runs", ".cache", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for (what, file, _, _, tests), text in zip(chosen, texts, strict=True):
            started = time.monotonic()
            (copy / file).write_text(text)
            caught_by = first_failure(copy, tests)
            shutil.copy(ROOT / file, copy / file)
            seconds = time.monotonic() - started
            print(f"{what:<36} {file:<14} {seconds:4.0f}  {caught_by or 'SURVIVED'}", flush=True)
            survivors += [] if caught_by else [what]
    print(json.dumps({"mutants": len(chosen), "caught": len(chosen) - len(survivors),
                      "survived": survivors}))
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
