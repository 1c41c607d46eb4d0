"""
B7, B8: loss and gradient are transformers' own, whatever the ranks, packs and micro-batches.

    python benchmarks/exactness.py

A random 4-layer Qwen2 (untied, 512 tokens of vocabulary) and 24 random documents with prompts
masked. Every case computes L = - sum m log p / N of all documents and its full gradient in a
process tree of its own; compared with transformers run on one document after the other with plain
logits. Relative difference of a gradient: norm of the difference / norm, over all parameters; the
worst single parameter is shown, too.
"""

import argparse
import shutil
import time
from pathlib import Path

import report

# name, ranks (0: no torchrun), tokens of a pack (0: one document per micro-batch), dtype,
# checkpointing
CASES = [
    ("1 process, packed", 0, 1024, "float32", "none"),
    ("1 process, a document at a time", 0, 0, "float32", "none"),
    ("1 process, full checkpointing", 0, 1024, "float32", "full"),
    ("1 process, selective checkpointing", 0, 1024, "float32", "selective"),
    ("2 ranks FSDP2, packed", 2, 1024, "float32", "none"),
    ("2 ranks FSDP2, small packs", 2, 300, "float32", "full"),
    ("4 ranks FSDP2, packed", 4, 1024, "float32", "none"),
    ("1 process, packed, fp64", 0, 1024, "float64", "none"),
]


def documents():
    """Rows as data.collate takes them."""
    import numpy as np

    rng = np.random.default_rng(0)
    found = []
    for _ in range(24):
        length = int(rng.integers(20, 280))
        ids, mask = rng.integers(2, 512, length), np.ones(length)
        mask[:int(rng.integers(1, 15))] = 0
        found.append({"ids": ids, "mask": mask})
    return found


def plain_transformers(folder, dtype):
    """(loss, {name: gradient}) of transformers' own forward, one document after the other."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=getattr(torch, dtype))
    model.train()
    rows = documents()
    denominator, total = trained_tokens(rows), 0.0
    for row in rows:
        ids, mask = torch.from_numpy(row["ids"]), torch.from_numpy(row["mask"][1:]).to(model.dtype)
        logp = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1], -1)
        logprobs = logp.gather(1, ids[1:, None])[:, 0]
        loss = -(logprobs * mask).sum() / denominator
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad for name, p in model.named_parameters()}


def trained_tokens(rows):
    return float(sum(row["mask"][1:].sum() for row in rows))


def logprobs_of(model, batch):
    from data import MODEL_INPUTS

    return model(**{name: batch[name] for name in MODEL_INPUTS})[0]


def run_case(folder, case, ctx):
    """Forward, backward and ranks as in train_sft.py; loss and gradients go to a file."""
    import torch

    from data import assign_to_ranks, collate, pack
    from model import load_policy, named_weights, sum_over_ranks
    from train_sft import sft_loss

    _, _, capacity, dtype, checkpointing = CASES[case]
    model = load_policy(folder / "model", ctx, compute_dtype=getattr(torch, dtype),
                        activation_checkpointing=checkpointing, head_chunk_size=100)
    rows = documents()
    denominator, total = trained_tokens(rows), 0.0
    lengths = [len(row["ids"]) for row in rows]
    packs = pack(lengths, capacity) if capacity else [[i] for i in range(len(rows))]
    costs = [sum(lengths[i] for i in members) for members in packs]
    for index in assign_to_ranks(costs, ctx.world_size)[ctx.rank]:
        batch = collate([rows[i] for i in packs[index]] if index >= 0 else [], ctx.device)
        loss = sft_loss(logprobs_of(model, batch), batch["mask"], denominator)
        loss.backward()
        total += float(loss.detach())
    total = sum_over_ranks(ctx, {"loss": total})["loss"]
    gradients = {name: p.grad.full_tensor() for name, p in named_weights(model)}
    if ctx.is_main:
        torch.save((total, gradients), folder / f"case-{case}.pt")


def worker(folder, ranks):
    """All cases of one number of ranks in one process tree."""
    from model import exit_process, setup_distributed, shutdown_distributed

    ctx = setup_distributed()
    for case, (_, wanted, *_) in enumerate(CASES):
        if wanted == ranks:
            run_case(folder, case, ctx)
    shutdown_distributed(ctx)
    exit_process(0)


def neighbour_moves_nothing(folder):
    """Largest change of document B's log-probs when A, in front of it, changes: exactly 0."""
    import torch

    from data import collate
    from model import load_policy, setup_distributed, shutdown_distributed

    ctx = setup_distributed()
    model = load_policy(folder / "model", ctx)
    first, second = documents()[:2]
    found = []
    for ids in (first["ids"], first["ids"][::-1].copy()):
        with torch.no_grad():
            logprobs = logprobs_of(model, collate([{**first, "ids": ids}, second]))
        found.append(logprobs[len(ids):])
    shutdown_distributed(ctx)
    return float((found[0] - found[1]).abs().max())


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench-exactness"))
    parser.add_argument("--worker", type=int, default=-1)
    args = parser.parse_args()
    if args.worker >= 0:
        return worker(args.folder, args.worker)

    import torch
    import transformers

    shutil.rmtree(args.folder, ignore_errors=True)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=False,
        initializer_range=0.1, bos_token_id=None, eos_token_id=1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(args.folder / "model")
    reference = {dtype: plain_transformers(args.folder, dtype) for dtype in ("float32", "float64")}
    rows, started = [], time.perf_counter()
    for ranks in sorted({ranks for _, ranks, *_ in CASES}):
        report.ours(__file__, "--worker", ranks, "--folder", args.folder, ranks=ranks)
    for case, (name, _, _, dtype, _) in enumerate(CASES):
        loss, gradients = torch.load(args.folder / f"case-{case}.pt")
        expected_loss, expected = reference[dtype]
        difference = {n: (gradients[n] - g).double().norm() for n, g in expected.items()}
        whole = sum(g.double().norm() ** 2 for g in expected.values()) ** 0.5
        worst = max(d / expected[n].double().norm() for n, d in difference.items())
        rows.append({"case": name, "loss": loss,
                     "relative loss difference": abs(loss - expected_loss) / expected_loss,
                     "gradient": float(sum(d**2 for d in difference.values()) ** 0.5 / whole),
                     "worst parameter": float(worst),
                     "target": "<= 1e-5" if dtype == "float32" else "<= 1e-10"})
    report.finish("exactness (against transformers, one document at a time)", rows,
                  neighbour_changes_logprobs_by=neighbour_moves_nothing(args.folder),
                  seconds=time.perf_counter() - started,
                  target="fp32 <= 1e-5, fp64 <= 1e-10, neighbour exactly 0")


if __name__ == "__main__":
    main()
