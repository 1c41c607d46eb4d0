"""
Break the code on purpose, one line at a time, in a copy of this checkout, and see the tests fail.

    python benchmarks/mutants.py            a table; exit status 1 and SURVIVED where no test notices

A test that survives the mutation of what it claims to test is no test. The last line of stdout is JSON.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOSS, MODEL, DATA = "tests/test_grpo_loss.py", "tests/test_model.py", "tests/test_data.py"
MUTANTS = [  # what, file, the line's text, what it becomes, test file
    ("sign of the loss", "train_grpo.py", "token_loss = -surrogate", "token_loss = surrogate", LOSS),
    ("min and max swapped", "train_grpo.py", "surrogate = torch.minimum(", "surrogate = torch.maximum(", LOSS),
    ("mask dropped", "train_grpo.py", "(token_loss * mask).sum()", "token_loss.sum()", LOSS),
    ("local denominator", "train_grpo.py", "(token_loss * mask).sum() / denominator",
     "(token_loss * mask).sum() / mask.sum()", LOSS),
    ("biased std", "train_grpo.py", "(count - 1).clamp(min=1)", "count", LOSS),
    ("ratio detached", "train_grpo.py", "ratio = log_ratio.exp()", "ratio = log_ratio.exp().detach()", LOSS),
    ("reversed clip", "train_grpo.py", "ratio.clamp(1 - epsilon, 1 + epsilon_high)",
     "ratio.clamp(1 - epsilon_high, 1 + epsilon)", LOSS),
    ("stop token outside the mask", "train_grpo.py", "    return rows\n",
     "    for row in rows:\n        row['mask'][-1] = 0\n    return rows\n", LOSS),
    ("mean not subtracted", "train_grpo.py", "values - values.sum(1, keepdim=True) / count, 0.0)", "values, 0.0)",
     LOSS),
    ("k1 for k3", "train_grpo.py", "kl = delta.exp() - delta - 1", "kl = -delta", LOSS),
    ("importance weight without cap", "train_grpo.py", ".exp().clamp(max=rollout_is_cap).detach()",
     ".exp().detach()", LOSS),
    ("importance weight with gradient", "train_grpo.py", "rollout_weight = (old_logprobs - rollout_logprobs)",
     "rollout_weight = (logprobs - rollout_logprobs)", LOSS),
    ("sequence ratio: sum for mean", "train_grpo.py", "sums.index_add(0, sequence_ids, log_ratio) / lengths",
     "sums.index_add(0, sequence_ids, log_ratio)", LOSS),
    ("rollout log-probs off by one", "train_grpo.py", 'np.append(row["rollout_logprobs"][1:], 0)',
     'row["rollout_logprobs"]', LOSS),
    ("no empty micro-batches", "train_grpo.py", "[bins[i] for i in hand]", "[bins[i] for i in hand if bins[i]]", LOSS),
    ("micro-batches over the limit", "train_grpo.py", "fits = all(", "fits = any(", LOSS),
    ("epochs in the same order", "train_grpo.py", 'random.Random(f"{seed}/{epoch}").shuffle(order)',
     'random.Random(f"{seed}").shuffle(order)', LOSS),
    ("attention crosses documents", "model.py", "bounds = cu_seqlens.tolist()", "bounds = [0, int(cu_seqlens[-1])]",
     MODEL),
    ("temperature forgotten in backward", "model.py", "grad_logprobs[rows, None] / ctx.temperature",
     "grad_logprobs[rows, None]", MODEL),
    ("another temperature if tied", "model.py",
     "self.model.embed_tokens.weight, targets, temperature, self.head_chunk_size",
     "self.model.embed_tokens.weight, targets, temperature + 0.1, self.head_chunk_size", MODEL),
    ("rotary buffers not restored", "model.py", "model.model.rotary_emb = type(model.model.rotary_emb)(config=config)",
     "model.model.rotary_emb = model.model.rotary_emb", MODEL),
    ("gathered copies saved", "model.py", "            module.reshard()\n", "            pass\n", MODEL),
    ("gradients averaged over ranks", "model.py", "unit.set_gradient_divide_factor(1.0)", "pass", MODEL),
    ("checksums not compared", "model.py", "if file_crc32(folder / name) != crc:", "if False:", MODEL),
    ("out through the interpreter", "model.py", "    os._exit(status)\n", "    sys.exit(status)\n", MODEL),
    ("targets cross a border", "data.py", "np.append(d[1:], 0) for d, _ in documents",
     "np.append(d[1:], d[0]) for d, _ in documents", DATA),
    ("end of turn not trained", "data.py", "len(prompt_ids) + len(answer_ids) + trained] = 1",
     "len(prompt_ids) + len(answer_ids)] = 1", DATA),
    ("prompt trained too", "data.py", "mask[len(prompt_ids):len(prompt_ids)", "mask[1:len(prompt_ids)", DATA),
    ("worst fit packing", "data.py", "at = bisect.bisect_left(room, (lengths[i], -1))",
     "at = len(room) - 1 if room and room[-1][0] >= lengths[i] else len(room)", DATA),
    ("random dealing", "data.py", "order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))\n    order += [-1]",
     "order = list(range(len(costs)))\n    order += [-1]", DATA),
]


def main():
    survivors = []
    print(f"{'what is broken':<36} {'file':<14} caught by")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "copy")
        ignored = shutil.ignore_patterns(".git", ".venv*", ".wheels", "runs", ".cache", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for what, file, old, new, tests in MUTANTS:
            original = (ROOT / file).read_text()
            if original.count(old) != 1:
                sys.exit(f"mutants.py: {what}: {old!r} stands {original.count(old)} times in {file}; update the list")
            (copy / file).write_text(original.replace(old, new))
            pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", tests]
            done = subprocess.run(pytest, cwd=copy, capture_output=True, text=True, check=False)
            (copy / file).write_text(original)
            failed = [line.split("::")[1].split(" ")[0] for line in done.stdout.splitlines() if line[:6] == "FAILED"]
            print(f"{what:<36} {file:<14} {failed[0] if failed else 'SURVIVED'}", flush=True)
            survivors += [] if failed else [what]
    print(json.dumps({"mutants": len(MUTANTS), "caught": len(MUTANTS) - len(survivors), "survived": survivors}))
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
