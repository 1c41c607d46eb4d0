"""
B4: packed attention costs the sum of squared document lengths, not the square of the pack.

    python benchmarks/attention.py [--tokens 8192] [--repeats 5]

model.packed_attention forward and backward on one pack of 8,192 tokens: as one document, as eight
of 1,024, and with the document lengths of a stage 1 pack scaled to it. The FLOPs say 1, 1/8, and
sum l^2 / T^2. The third column is what a mask over the full square costs (SDPA with a
block-diagonal mask, which is what position ids alone lead to without flash attention). Interleaved
repeats; CPU seconds of one thread, which others on the machine do not change.
"""

import argparse
import statistics
import time

import report


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    import torch
    import torch.nn.functional as F

    from model import packed_attention

    tokens, heads, key_heads, size = args.tokens, 8, 2, 64
    torch.set_num_threads(1)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, tokens, size, requires_grad=True)
                         for h in (heads, key_heads, key_heads))
    layouts = {"one document": [tokens], "eight documents": [tokens // 8] * 8,
               "stage 1 pack (12k, 7k, 5k of 24k)": [tokens // 2, tokens * 7 // 24,
                                                     tokens * 5 // 24]}
    for lengths in layouts.values():
        lengths[-1] += tokens - sum(lengths)

    def packed(lengths):
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return packed_attention(None, query, key, value, None, cu_seqlens=bounds)[0]

    def masked(lengths):
        document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        mask = (document[:, None] == document[None]) & causal
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2)

    times = {(name, f.__name__): [] for name in layouts for f in (packed, masked)}
    worst = 0.0
    for _ in range(args.repeats):
        for name, lengths in layouts.items():
            outputs = []
            for f in (packed, masked):
                started = time.process_time()
                out = f(lengths)
                out.square().sum().backward()
                times[name, f.__name__].append(time.process_time() - started)
                outputs.append(out.detach())
                query.grad = key.grad = value.grad = None
            worst = max(worst, float((outputs[0] - outputs[1]).abs().max()))
    median = {key: statistics.median(values) for key, values in times.items()}
    base = median["one document", "packed"]
    rows = [{"layout": name, "packed CPU s": report.spread(times[name, "packed"]),
             "relative": round(median[name, "packed"] / base, 3),
             "sum l^2 / T^2": round(sum(n * n for n in lengths) / tokens**2, 3),
             "masked square CPU s": report.spread(times[name, "masked"]),
             "masked / packed": round(median[name, "masked"] / median[name, "packed"], 2)}
            for name, lengths in layouts.items()]
    report.finish(f"attention, {tokens:,} tokens", rows, max_difference=worst,
                  target="eight documents <= 1/5 of one")


if __name__ == "__main__":
    main()
