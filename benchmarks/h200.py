"""
One H100 or H200: what the 14B recipe's kernels, memory and steps cost, and that they are correct.

    bash benchmarks/h200.sh          7 minutes; --tiny: the same code with tiny shapes on the CPU

    C1  packed varlen attention in bf16 against SDPA per document, both against fp32; a neighbour
        changes nothing
    C2  a small policy: full, selective checkpointing and compile against eager, loss and gradients
    G1  matmuls of the recipe's shapes
    G2  attention on a real pack: varlen, SDPA per document, one span of 24,000 (the original's)
    G3  full training step at 14B widths with 4, 8, 16 of 48 layers (2, 4, 7 below 120 GB):
        t = a + b L, extrapolated to L = 48
    G3b same, attention across documents
    G3c same, with transformers' own checkpointing, attention and full logits (141 GB only)
    G4  head: chunked against plain logits
    G5  peak memory of G3, torch.cuda.max_memory_allocated, against model.trace_memory
    G6  GRPO update on one rank's share of a step: packed against padded to the longest
    G7  fused AdamW, share of memory bandwidth
    G8  save_hf to /dev/shm and load_weights from it
    P   projection for 8 GPUs: a band with its formula, labelled projected

One GPU shows kernels, compilation, recomputation, memory and casts. It does not show collectives,
power throttling of eight GPUs, stragglers (modelled: packing.py) or vLLM. On a mesh of one, FSDP
gathers nothing but still casts the fp32 masters of the whole model to bf16, of which a rank of
eight casts an eighth: the step is measured slightly too slow.

Convention: FLOPs are model.flops_per_pack: forward + backward, no recomputation, causal pairs of
the same document. Utilisation is of 989.5 TFLOP/s, the data sheet's dense bf16.
"""

import argparse
import gc
import json
import os
import random
import shutil
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import report
import torch
import torch.nn.functional as F
from packing import QWEN2_14B, log_normal_lengths

import data
from model import (
    build_policy,
    exit_process,
    flops_per_pack,
    load_weights,
    named_weights,
    packed_attention,
    peak_memory_gb,
    save_hf,
    setup_distributed,
    shutdown_distributed,
    token_logprobs,
    trace_memory,
)

PEAK, BANDWIDTH = 989.5e12, 4.3e12  # FLOP/s dense bf16 by data sheet; bytes/s reachable of 4.8e12
TINY = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
            tie_word_embeddings=False)


class Case:
    """Sizes of this run: the recipe's on a GPU, toys on a CPU; rows: lines of the final table."""

    def __init__(self, tiny):
        self.tiny, self.ctx = tiny, setup_distributed()
        self.device = self.ctx.device
        self.widths = TINY if tiny else QWEN2_14B
        self.tokens = 480 if tiny else 24_000
        # 16 bytes per parameter: 25 GB for embedding and head, 4.4 GB for each layer
        self.small_card = not tiny and torch.cuda.mem_get_info()[1] < 120e9
        self.layers = (1, 2, 3) if tiny else (2, 4, 7) if self.small_card else (4, 8, 16)
        self.full_layers, self.repeats = (4 if tiny else 48), 3
        self.rows, self.facts = [], {}
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        lengths = log_normal_lengths(random.Random(0), 7_900, 7_580, 24_000, cv=0.53)
        packs = [[lengths[i] for i in members] for members in data.pack(lengths, 24_000)]
        squares = sorted(packs, key=lambda pack: sum(n * n for n in pack))
        pack = squares[len(squares) // 2]  # the pack of median cost
        scale = self.tokens / sum(pack)
        self.pack = [max(2, int(n * scale)) for n in pack]
        self.pack[0] += self.tokens - sum(self.pack)

    def config(self, layers):
        import transformers

        sizes = {**self.widths, "num_hidden_layers": layers, "layer_types": None}
        return transformers.Qwen2Config(**sizes)

    def add(self, what, value, target=""):
        self.rows.append({"what": what, "value": value, "target": target})
        print(f"  {what}: {report.cell(value)}  {target}", flush=True)


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------
def synchronize(case):
    if case.device.type == "cuda":
        torch.cuda.synchronize()


def seconds(case, step, repeats=None):
    """Median seconds of step() after one warm-up call."""
    times = []
    for repeat in range((repeats or case.repeats) + 1):
        synchronize(case)
        started = time.perf_counter()
        step()
        synchronize(case)
        if repeat:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def reset_peak(case):
    gc.collect()
    if case.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return 0.0
    return report.peak_memory_gb(reset=True)


def peak_gb(case, before):
    on_gpu = case.device.type == "cuda"
    return peak_memory_gb(case.device) if on_gpu else report.peak_memory_gb() - before


def relative(a, b):
    """Norm of the difference / norm of b."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def line(points):
    """Least squares (intercept, slope, largest relative residual) of [(x, y)]."""
    xs, ys = zip(*points, strict=True)
    mean_x, mean_y = statistics.mean(xs), statistics.mean(ys)
    products = sum((x - mean_x) * (y - mean_y) for x, y in points)
    slope = products / sum((x - mean_x) ** 2 for x in xs)
    intercept = mean_y - slope * mean_x
    worst = max(abs(intercept + slope * x - y) / y for x, y in points)
    return intercept, slope, worst if len(points) > 2 else 0.0


# --------------------------------------------------------------------------------------------------
# Parts
# --------------------------------------------------------------------------------------------------
def make_policy(case, layers, activation_checkpointing="full", compile_blocks=False, **options):
    """The product's policy with random weights."""
    model = build_policy(case.config(layers), case.ctx,
                         activation_checkpointing=activation_checkpointing,
                                    compile_blocks=compile_blocks, **options)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in named_weights(model):
            local = parameter.to_local()
            if parameter.ndim > 1:
                local.normal_(0, 0.02)
            else:
                local.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def make_batch(case, lengths):
    generator = torch.Generator().manual_seed(1)
    vocabulary = case.widths["vocab_size"]
    ids = [torch.randint(vocabulary, (n,), generator=generator).numpy() for n in lengths]
    return data.collate([{"ids": x, "mask": x >= 0} for x in ids], case.device)


def training_step(case, model, batch):
    """Forward and backward of one pack, as train_sft.py does it."""
    inputs = {name: value for name, value in batch.items() if name != "mask"}
    logprobs, _ = model(**inputs)
    loss = -(logprobs * batch["mask"]).sum() / case.tokens
    loss.backward()
    return loss.detach()


def make_qkv(case, tokens, dtype):
    heads, key_heads = case.widths["num_attention_heads"], case.widths["num_key_value_heads"]
    size = case.widths["hidden_size"] // heads
    torch.manual_seed(0)
    return [torch.randn(1, h, tokens, size, device=case.device, dtype=dtype, requires_grad=True)
            for h in (heads, key_heads, key_heads)]


def attend_packed(case, q, k, v, lengths):
    bounds = torch.tensor([0, *lengths], device=case.device).cumsum(0).to(torch.int32)
    return packed_attention(None, q, k, v, None, cu_seqlens=bounds,
                            max_seqlen=1 << (max(lengths) - 1).bit_length())[0]


def attend_sdpa(case, q, k, v, lengths):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    outputs = [F.scaled_dot_product_attention(q[:, :, end - n:end], k[:, :, end - n:end],
                                              v[:, :, end - n:end],
                                              is_causal=True, enable_gqa=True)
               for n, end in zip(lengths, ends, strict=True)]
    return torch.cat(outputs, 2).transpose(1, 2)


# --------------------------------------------------------------------------------------------------
# Correctness
# --------------------------------------------------------------------------------------------------
def c1_attention(case):
    tokens = case.tokens // 6
    lengths = [tokens // 2, tokens // 3, 1, tokens - tokens // 2 - tokens // 3 - 1]
    results = {}
    for name, attend, dtype in (("fp32", attend_sdpa, torch.float32),
                                ("sdpa", attend_sdpa, case.dtype),
                                ("packed", attend_packed, case.dtype)):
        inputs = make_qkv(case, tokens, case.dtype)
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs)
        out = attend(case, q, k, v, lengths)
        out.float().square().sum().backward()
        results[name] = (out.detach(), q.grad, k.grad, v.grad)
    for i, what in enumerate(("output", "d query", "d key", "d value")):
        ours, theirs = (relative(results[arm][i], results["fp32"][i]) for arm in ("packed", "sdpa"))
        case.add(f"C1 {what}: error of packed / error of SDPA, both against fp32",
                 ours / theirs if theirs else ours,
                 "<= 1.5")
        case.add(f"C1 {what}: relative error of packed against fp32", ours, "<= 1e-2")
    q, k, v = (x.detach() for x in make_qkv(case, tokens, case.dtype))
    before = attend_packed(case, q, k, v, lengths)[:, lengths[0]:]
    q[:, :, :lengths[0]], k[:, :, :lengths[0]], v[:, :, :lengths[0]] = 0.5, -1.0, 2.0
    after = attend_packed(case, q, k, v, lengths)[:, lengths[0]:]
    case.add("C1 a changed neighbour changes outputs by", float((before - after).abs().max()), "0")


def c2_policy(case):
    widths = dict(case.widths)
    if not case.tiny:
        case.widths = {**widths, "hidden_size": 1024, "intermediate_size": 2816,
                       "num_attention_heads": 8,
                       "num_key_value_heads": 2, "vocab_size": 8192}
    found = {}
    try:
        lengths = [n // 4 for n in case.pack]
        variants = [("eager", "none", False), ("full", "full", False),
                    ("selective", "selective", False),
                    ("compiled", "none", True), ("selective, compiled", "selective", True)]
        for name, checkpointing, compiled in variants[:3] if case.tiny else variants:
            model = make_policy(case, 3, checkpointing, compiled, head_chunk_size=1000)
            loss = training_step(case, model, make_batch(case, lengths))
            found[name] = loss, [p.grad.full_tensor() for p in model.parameters()]
        reference_loss, reference = found["eager"]
        for name, (loss, gradients) in found.items():
            if name != "eager":
                case.add(f"C2 {name}: loss against eager", abs(float(loss / reference_loss) - 1),
                         "<= 2e-3")
                case.add(f"C2 {name}: worst gradient against eager",
                         max(relative(a, b) for a, b in zip(gradients, reference, strict=True)),
                         "<= 5e-2 (bf16)")
    finally:
        case.widths = widths


# --------------------------------------------------------------------------------------------------
# Speed
# --------------------------------------------------------------------------------------------------
def g1_matmul(case):
    h, m = case.widths["hidden_size"], case.widths["intermediate_size"]
    kv = h // case.widths["num_attention_heads"] * case.widths["num_key_value_heads"]
    for name, rows, columns in (("q, o", h, h), ("k, v", h, kv), ("gate, up", h, m),
                                ("down", m, h)):
        a = torch.randn(case.tokens, rows, device=case.device, dtype=case.dtype)
        b = torch.randn(rows, columns, device=case.device, dtype=case.dtype)
        rate = 2 * case.tokens * rows * columns / seconds(case, partial(torch.matmul, a, b), 20)
        case.add(f"G1 {name} {case.tokens} x {rows} x {columns}, TFLOP/s", rate / 1e12,
                 ">= 650, stretch 720")


def there_and_back(case, attend, qkv, lengths, grad):
    attend(case, *qkv, lengths).backward(grad)


def g2_attention(case):
    size = case.widths["hidden_size"]
    spans = {"packed documents": (attend_packed, case.pack),
             "SDPA per document": (attend_sdpa, case.pack),
             "one span (original)": (attend_packed, [case.tokens])}
    times = {}
    for name, (attend, lengths) in spans.items():
        q, k, v = make_qkv(case, case.tokens, case.dtype)
        with torch.no_grad():
            forward = seconds(case, partial(attend, case, q, k, v, lengths), 10)
        grad = torch.randn_like(attend(case, q, k, v, lengths))
        both = seconds(case, partial(there_and_back, case, attend, (q, k, v), lengths, grad), 5)
        times[name] = forward, both
        flops = 2 * size * sum(n * n for n in lengths)  # 2 matmuls x 2 l^2 / 2 x H d
        targets = (">= 330", ">= 260") if attend is attend_packed else ("", "")
        case.add(f"G2 {name}: forward TFLOP/s", flops / forward / 1e12, targets[0])
        case.add(f"G2 {name}: backward TFLOP/s", 2.5 * flops / (both - forward) / 1e12, targets[1])
    case.add("G2 one span / packed documents, time",
             times["one span (original)"][1] / times["packed documents"][1],
             ">= 2")


def step_point(case, layers, lengths, **options):
    """(L, seconds of forward + backward, of AdamW, peak GB) of the product's step on one pack."""
    before = reset_peak(case)
    model = make_policy(case, layers, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = make_batch(case, lengths)
    training_step(case, model, batch)
    optimizer.step()  # its moments exist from here on, as in training
    both = seconds(case, partial(training_step, case, model, batch))
    return layers, both, seconds(case, optimizer.step), peak_gb(case, before)


def traces(case):
    """{(layers, checkpointing): future of the traced peak in bytes}; the CPU's work meanwhile."""
    def peak(layers, checkpointing):
        return sum(trace_memory(case.config(layers), 1, case.tokens,
                                activation_checkpointing=checkpointing).values())

    pool = ThreadPoolExecutor(1 if case.tiny else 3)
    wanted = [(layers, mode) for layers in case.layers for mode in ("full", "selective")]
    return {key: pool.submit(peak, *key) for key in wanted}


def step_points(case, layers, lengths, step=step_point, **options):
    """One point per depth; a depth that does not fit the memory is named and left out."""
    points = []
    for count in layers:
        try:
            points.append(step(case, count, lengths, **options))
            print("    L {}: forward + backward {:.3f} s, AdamW {:.3f} s, {:.1f} GB".format(
                *points[-1]), flush=True)
        except torch.OutOfMemoryError:
            case.add(f"out of memory at {count} layers {options}", "")
        reset_peak(case)
        torch._dynamo.reset()
    return points


def extrapolate(case, name, points, lengths, micro_batches=8, ranks=8):
    """Tokens/s per GPU at full depth: micro_batches packs a step, AdamW on a rank's weights."""
    intercept, slope, residual = line([(n, both) for n, both, _, _ in points])
    at_full = intercept + slope * case.full_layers
    update_a, update_b, _ = line([(n, update) for n, _, update, _ in points])
    update = (update_a + update_b * case.full_layers) / ranks
    rate = micro_batches * case.tokens / (micro_batches * at_full + update)
    flops = flops_per_pack(case.config(case.full_layers), lengths) / case.tokens
    case.add(f"{name}: tokens/s per GPU at {case.full_layers} layers (extrapolated)", rate)
    case.add(f"{name}: utilisation of 989.5 TFLOP/s", rate * flops / PEAK)
    case.add(f"{name}: fit a + b L, seconds",
             f"{intercept:.4f} + {slope:.5f} L, worst residual {residual:.1%}",
             "residual <= 2%")
    return rate


def g3_step(case):
    """The product's step; the flags of every variant exist in train_sft.py."""
    rates, case.peaks = {}, {}
    variants = [("G3 full checkpointing, eager", dict(activation_checkpointing="full"),
                 case.layers),
                ("G3 selective, eager", dict(activation_checkpointing="selective"), case.layers),
                ("G3 selective, compiled",
                 dict(activation_checkpointing="selective", compile_blocks=True),
                 case.layers[:2])]
    for name, options, layers in variants[:2] if case.tiny else variants:
        if time.perf_counter() - case.started > case.budget - 100:
            case.add(f"{name}: skipped, the time budget is nearly spent", "")
            continue
        points = step_points(case, layers, case.pack, **options)
        rates[name] = extrapolate(case, name, points, case.pack)
        case.peaks[name] = {count: peak for count, _, _, peak in points}
        for count, _, _, peak in points:
            traced = case.traced[count, options["activation_checkpointing"]].result() / 1e9
            note = " (the trace is of the eager step)" if "compile_blocks" in options else ""
            case.add(f"G5 {name[3:]}, L = {count}: peak GB measured; traced{note}",
                     f"{peak:.2f}; {traced:.2f}")
            case.add(f"G5 {name[3:]}, L = {count}: measured / traced", peak / traced, "0.97-1.03")
    case.best = max(rates.values())
    case.facts["tokens_per_s_per_gpu"] = {name: round(rate, 1) for name, rate in rates.items()}
    case.rates = rates
    case.add("G3 best tokens/s per GPU (extrapolated)", case.best, ">= 4,000, stretch 4,900")


def g3b_cross_document(case):
    points = step_points(case, case.layers[:2], [case.tokens], activation_checkpointing="full")
    rate = extrapolate(case, "G3b attention across documents", points, case.pack)
    case.add("G3b document attention / across, full checkpointing, eager",
             case.rates["G3 full checkpointing, eager"] / rate, ">= 1.35")


def transformers_point(case, layers, lengths):
    """As step_point, with transformers' checkpointing, causal SDPA and full logits; same casts."""
    import transformers
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    before = reset_peak(case)
    with torch.device(case.device):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            case.config(layers), attn_implementation="sdpa", dtype=torch.float32)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    mixed = MixedPrecisionPolicy(param_dtype=case.dtype, reduce_dtype=torch.float32)
    for block in [*model.model.layers, model]:
        fully_shard(block, mesh=case.ctx.mesh, mp_policy=mixed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = make_batch(case, lengths)["input_ids"][None]

    def step():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    step()
    optimizer.step()
    return layers, seconds(case, step, 2), seconds(case, optimizer.step, 2), peak_gb(case, before)


def g3c_transformers(case):
    if case.small_card:
        case.add("G3c left out: full logits of 24,000 tokens need 44 GB beside the weights", "")
        return
    points = step_points(case, case.layers[:2], [case.tokens], transformers_point)
    rate = extrapolate(case, "G3c transformers", points, case.pack)
    case.add("G3c ours (best) / transformers, tokens/s", case.best / rate, ">= 1.4")
    peak = case.peaks["G3 full checkpointing, eager"]
    for count, _, _, theirs in points:
        case.add(f"G3c peak, ours / transformers, L = {count}", peak[count] / max(theirs, 1e-9),
                 "<= 0.65")


def g4_head(case):
    h, v = case.widths["hidden_size"], case.widths["vocab_size"]
    torch.manual_seed(0)
    hidden = torch.randn(case.tokens, h, device=case.device, dtype=case.dtype, requires_grad=True)
    weight = (torch.randn(v, h, device=case.device) * 0.02).to(case.dtype).requires_grad_()
    targets = torch.randint(v, (case.tokens,), device=case.device)
    chunk = 64 if case.tiny else 2048

    def plain():
        F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum").backward()

    def chunked():
        (-token_logprobs(hidden, weight, targets, 1.0, chunk)[0].sum()).backward()

    def fused():
        F.linear_cross_entropy(hidden, weight, targets, reduction="sum").backward()

    arms = {"plain": plain, "chunked": chunked,
            **({"torch": fused} if hasattr(F, "linear_cross_entropy") else {})}
    found, gradients = {}, {}
    for name, step in arms.items():
        hidden.grad = weight.grad = None
        before = reset_peak(case)
        base = torch.cuda.memory_allocated() / 1e9 if case.device.type == "cuda" else 0.0
        step()
        peak = peak_gb(case, before) - base
        gradients[name] = weight.grad.clone()
        found[name] = seconds(case, step), peak
        case.add(f"G4 {name}: seconds; peak GB", f"{found[name][0]:.4f}; {peak:.2f}")
    case.add("G4 plain / chunked, peak", found["plain"][1] / max(1e-9, found["chunked"][1]), ">= 5")
    case.add("G4 chunked / plain, time", found["chunked"][0] / found["plain"][0], "<= 1.1")
    error = relative(gradients["chunked"], gradients["plain"])
    case.add("G4 d weight, chunked against plain", error, "<= 1e-2")


def g6_grpo_update(case):
    """One rank's 16 answers of a step: forward, loss, backward; padded: all at one length."""
    scale = case.tokens / 24_000
    answers = log_normal_lengths(random.Random(3), 128, 8_000, 16_384, cv=0.55)
    config = case.config(case.layers[0])
    shares = data.split_evenly([flops_per_pack(config, [n + 250]) for n in answers], 8)
    lengths = [max(2, int((answers[i] + 250) * scale)) for i in shares[0]]
    # TRL: its rank's share in order, padded to that longest
    longest = max(2, int((max(answers[:16]) + 250) * scale))
    model = make_policy(case, case.layers[0], "full")
    packs = [[lengths[i] for i in members] for members in data.pack(lengths, int(16_896 * scale))]

    def update(layout, no_grad_passes):
        for members in layout:
            batch = make_batch(case, members)
            mask = batch.pop("mask")
            with torch.no_grad():
                for _ in range(no_grad_passes):
                    model(**batch)
            logprobs, _ = model(**batch)
            # the loss's shape; its own terms are (T,) as well
            ratio = (logprobs - logprobs.detach()).exp()
            (-(ratio * mask).sum() / 16).backward()

    times = {"packed": seconds(case, lambda: update(packs, 0), 1),
             "padded": seconds(case, lambda: update([[longest]] * 16, 0), 1),
             "padded, with the pass for old log-probs":
                 seconds(case, lambda: update([[longest]] * 16, 1), 1)}
    for name, value in times.items():
        case.add(f"G6 {name}, L = {case.layers[0]}: seconds", value)
    case.add("G6 padded / packed, time", times["padded"] / times["packed"], ">= 1.6")
    case.add("G6 padded / packed, token positions", 16 * longest / sum(lengths), "1.85 expected")


def g7_adamw(case):
    count = 10_000 if case.tiny else 2_000_000_000
    parameters = [torch.nn.Parameter(torch.zeros(count // 8, device=case.device)) for _ in range(8)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    # reads p, g, m, v and writes p, m, v: 7 x 4 bytes
    rate = 28 * count / seconds(case, optimizer.step, 10)
    case.add("G7 fused AdamW, share of 4.3 TB/s", rate / BANDWIDTH, ">= 0.85")


def g8_weight_sync(case):
    folder = Path("/dev/shm/bench-h200")
    model = make_policy(case, case.layers[0], "none")
    size = 2 * sum(p.numel() for p in model.parameters())
    if not case.tiny and shutil.disk_usage("/dev/shm").free < 3 * size:
        folder = Path("/tmp/bench-h200")
        case.add("G8 /dev/shm is too small; measured on /tmp", str(folder))
    try:
        shutil.rmtree(folder, ignore_errors=True)
        export = partial(save_hf, model, folder, case.ctx, torch.bfloat16, durable=False)
        save = seconds(case, export, 2)
        case.add("G8 save_hf, GB/s per writer", size / save / 1e9, ">= 2")
        load = seconds(case, lambda: load_weights(model, folder, case.ctx), 2)
        case.add("G8 load_weights, GB/s", size / load / 1e9)
        share = 29.5 / 8 / (size / save / 1e9)
        case.add("G8 14B over 8 writers, seconds to publish (projected)", share,
                 "<= 10 with the reload")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def projection(case):
    """
    Projected for 8 H200, not measured:
    hours = tokens / (8 x tokens/s per GPU) x (1 + straggler) x (1 + communication)

    straggler 0.026-0.04 (cost-sorted dealing; packing.py), communication 0.01-0.065 (hidden; fully
    exposed). Stage 1: 599M tokens (7.58k x 7,900 traces x 10 epochs). Stage 2, per step: 1.039M
    tokens of update at this rate, a third of it again for the reference's forward, sampling
    87-106 s (TP8, TP4: a roofline estimate, no vLLM measurement behind it), 15 s of sync, rewards
    and logging.
    """
    worst, best = [(1 + s) * (1 + c) for s, c in ((0.04, 0.065), (0.026, 0.01))]
    hours = [599e6 / (8 * case.best) * factor / 3600 for factor in (best, worst)]
    update = [1.039e6 / (8 * case.best) * factor * 4 / 3 for factor in (best, worst)]
    sampling = 87, 106
    steps = [(a + b + 15) * 50 / 3600 for a, b in zip(update, sampling, strict=True)]
    case.add("P stage 1 on 8 H200, hours (projected; original 10)",
             f"{hours[0]:.2f}-{hours[1]:.2f}", "<= 5")
    case.add("P stage 2, 50 steps, hours (projected; original 10-16)",
             f"{steps[0]:.2f}-{steps[1]:.2f}", "<= 2.5")


SECTIONS = [  # name, function, seconds it may need on an H200; the most telling first
    ("C1", c1_attention, 15), ("G1", g1_matmul, 10), ("G2", g2_attention, 15), ("G3", g3_step, 240),
    ("P", projection, 0), ("C2", c2_policy, 60), ("G3b", g3b_cross_document, 30),
    ("G3c", g3c_transformers, 60), ("G4", g4_head, 15), ("G6", g6_grpo_update, 60),
    ("G7", g7_adamw, 10), ("G8", g8_weight_sync, 30)]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=380,
                        help="seconds; a section that may not fit is left out")
    parser.add_argument("--only", default="",
                        help="sections with commas between them, such as G2,G3")
    parser.add_argument("--tiny", action="store_true",
                        help="toy shapes on the CPU: checks the program only")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("h200.py: no GPU here; --tiny runs the same code with toy shapes")
    if args.tiny and torch.cuda.is_available():
        raise SystemExit("h200.py: --tiny is for the CPU; start it with CUDA_VISIBLE_DEVICES=''")
    case = Case(args.tiny)
    case.started, case.budget, case.traced = time.perf_counter(), args.budget, traces(case)
    wanted = [name for name in args.only.split(",") if name] or [name for name, _, _ in SECTIONS]
    failed = {}
    for name, section, needed in SECTIONS:
        elapsed = time.perf_counter() - case.started
        if name not in wanted:
            continue
        if elapsed + needed > args.budget:
            case.add(f"{name} left out: {elapsed:.0f} s of {args.budget:.0f} s are spent, "
                     f"it may need {needed}", "")
            continue
        print(f"{name} at {elapsed:.0f} s", flush=True)
        try:
            section(case)
        except Exception as error:  # noqa: BLE001  (it must not cost the others their only run)
            failed[name] = f"{type(error).__name__}: {str(error)[:500]}"
            case.add(f"{name} FAILED", failed[name])
        gc.collect()
        if case.device.type == "cuda":
            torch.cuda.empty_cache()
    gpu = "none (--tiny: figures mean nothing)" if args.tiny else torch.cuda.get_device_name()
    elapsed = round(time.perf_counter() - case.started, 1)
    report.finish("h200", case.rows, gpu=gpu, seconds=elapsed, failed=failed, **case.facts)
    if os.environ.get("OUT"):
        result = {"gpu": gpu, "rows": case.rows, "failed": failed, **case.facts}
        Path(os.environ["OUT"], "h200.json").write_text(json.dumps(result))
    shutdown_distributed(case.ctx)
    exit_process(1 if failed else 0)


if __name__ == "__main__":
    main()
