"""
B3: the chunked head against plain logits: peak memory and time, forward and backward, at a
vocabulary of 151,936.

    python benchmarks/head.py [--tokens 4096] [--chunk 350] [--repeats 3]

Rows of logits dominate: hidden size 64 keeps the matmul small enough for two cores without changing
what is stored. --chunk is the product's 2,048 of 24,000 tokens, scaled to --tokens. Arms, each in a
process of its own: plain (logits, fp32 log-softmax, gather; what transformers does), chunked
(model.token_logprobs, log-probs and entropy), torch's F.linear_cross_entropy (loss only, no
entropy), and TRL 1.16's fused head (log-probs and entropy) in its environment. Seconds are CPU
seconds of one thread, which others on the machine do not change; those spent in the kernel are a
column of their own: malloc gives a chunk's 100 MB back to the system after each use and faults
every page in again, which a GPU's caching allocator does not. Memory is the growth of the resident
peak over the step; on the GPU see G4 of h200.py.
"""

import argparse
import json
import resource
import statistics
import sys

import report


def worker(arm, tokens, vocabulary, hidden_size, chunk):
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    torch.set_num_threads(1)
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(vocabulary, hidden_size) * 0.05)
    targets = torch.randint(vocabulary, (tokens,))

    def plain(hidden, targets):
        return torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, targets[:, None]).sum()

    def chunked(hidden, targets):
        from model import token_logprobs

        return token_logprobs(hidden, weight, targets, chunk_size=chunk)[0].sum()

    def torch_fused(hidden, targets):
        return -F.linear_cross_entropy(hidden, weight, targets, reduction="sum")

    def trl_fused(hidden, targets):
        from types import SimpleNamespace

        from trl.trainer.utils import add_fused_lm_head

        if not hasattr(trl_fused, "model"):
            import transformers

            config = transformers.Qwen2Config(
                vocab_size=8, hidden_size=hidden_size, intermediate_size=8, num_hidden_layers=1,
                num_attention_heads=1, num_key_value_heads=1)
            trl_fused.model = transformers.AutoModelForCausalLM.from_config(config)
            trl_fused.model.lm_head.weight = weight
            # the head alone: the decoder's output is what we pass in
            trl_fused.model.model = torch.nn.Identity()
            trl_fused.model.model.forward = \
                lambda states, **_: SimpleNamespace(last_hidden_state=states)
            trl_fused.model.get_output_embeddings = lambda: trl_fused.model.lm_head
            add_fused_lm_head(trl_fused.model, outputs=("log_probs", "entropy"))
        out = trl_fused.model(hidden[None], shift_labels=targets[None], fused_lm_head=True)
        return out.log_probs.sum()

    step = {"plain": plain, "chunked": chunked, "torch": torch_fused, "TRL": trl_fused}[arm]
    step(hidden[:8], targets[:8]).backward()  # imports, thread pools
    hidden.grad = weight.grad = None
    before = report.peak_memory_gb(reset=True)
    started = resource.getrusage(resource.RUSAGE_SELF)
    value = step(hidden, targets)
    value.backward()
    used = resource.getrusage(resource.RUSAGE_SELF)
    user, kernel = used.ru_utime - started.ru_utime, used.ru_stime - started.ru_stime
    print(json.dumps({"seconds": user + kernel, "user": user, "kernel": kernel,
                      "peak_gb": report.peak_memory_gb() - before,
                      "value": float(value), "grad": float(weight.grad.norm())}))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=350)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", default="")
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.tokens, args.vocabulary, args.hidden_size, args.chunk)

    arms = ["plain", "chunked", "torch", *(["TRL"] if report.TRL_PYTHON.exists() else [])]
    measured = {arm: [] for arm in arms}
    for _ in range(args.repeats):
        for arm in arms:
            start = report.trl if arm == "TRL" else report.ours
            measured[arm].append(start(
                __file__, "--worker", arm, "--tokens", args.tokens, "--chunk", args.chunk,
                "--vocabulary", args.vocabulary, "--hidden_size", args.hidden_size))
            print(arm, measured[arm][-1], file=sys.stderr, flush=True)
    seconds = {arm: statistics.median(m["seconds"] for m in runs) for arm, runs in measured.items()}
    user = {arm: statistics.median(m["user"] for m in runs) for arm, runs in measured.items()}
    peak = {arm: statistics.median(m["peak_gb"] for m in runs) for arm, runs in measured.items()}
    rows = [{"arm": arm, "peak GB": round(peak[arm], 3),
             "peak / plain": round(peak[arm] / peak["plain"], 3),
             "CPU s": report.spread([m["seconds"] for m in runs]),
             "of it kernel": report.spread([m["kernel"] for m in runs]),
             "time / plain": round(seconds[arm] / seconds["plain"], 3),
             "without kernel": round(user[arm] / user["plain"], 3),
             "value": round(runs[0]["value"], 2), "grad norm": round(runs[0]["grad"], 4)}
            for arm, runs in measured.items()]
    report.finish(f"head, {args.tokens:,} tokens x {args.vocabulary:,}, chunk {args.chunk}", rows,
                  target="peak <= 1/5, time <= 1.1 of plain")


if __name__ == "__main__":
    main()
