"""
The first thing to run on a GPU: rollout.Engine on a random Qwen2, tied and untied head.

    python benchmarks/gpu_rollout_check.py        about 3 minutes; on a CPU with toy sizes

Shows what tests on the CPU build cannot: vLLM's second model runner, CUDA graphs, sleep, bf16.
Every line is "ok" or "BAD" with its figures; the exit status is 1 if one is BAD.
"""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import report
import torch
import transformers

from rollout import PROBE_TOLERANCE, Engine, sampling_seed

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
NAME = str(DTYPE).removeprefix("torch.")
TOLERANCE = PROBE_TOLERANCE[NAME]
SIZES = (dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, vocab_size=8192)
         if CUDA else
         dict(hidden_size=128, intermediate_size=192, num_hidden_layers=2, vocab_size=512))
TOKENS = SIZES["vocab_size"] - 100  # ids of the tokenizer: the rest is padding
IDS = torch.randint(5, TOKENS, (200,), generator=torch.Generator().manual_seed(3)).tolist()
PROMPTS = [IDS[:30], IDS[30:75], IDS[75:80]]
SAMPLING = dict(
    n=8, seeds=[[sampling_seed(1, p, s) for s in range(8)] for p in range(len(PROMPTS))],
    temperature=0.7, top_p=0.9, min_p=0.05)
ROOT = Path("/tmp/gpu-rollout-check")
rows = []


def note(what, value, ok=True):
    print(f"{'ok  ' if ok else 'BAD '} {what}: {value}", flush=True)
    rows.append({"what": what, "value": str(value), "ok": bool(ok)})


def make_model(folder, seed, tied):
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        **SIZES, num_attention_heads=SIZES["hidden_size"] // 32, num_key_value_heads=2,
        max_position_embeddings=4096, tie_word_embeddings=tied, initializer_range=0.05,
        eos_token_id=2, bos_token_id=1, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    model.save_pretrained(folder)
    return model.to(DEVICE).eval()


@torch.no_grad()
def logits(model, ids):
    return model(torch.tensor([ids], device=DEVICE)).logits[0, :-1].float().cpu()  # (S-1, V)


def probe_gap(scored, model):
    expected = logits(model, IDS).log_softmax(-1).gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    return (torch.tensor(scored) - expected).abs().mean().item()


def sampling_gap(model, groups):
    """Mean gap of log q to softmax -> temperature -> min_p -> top_p by transformers."""
    gaps = []
    for p, group in groups.items():
        for c in group:
            z = logits(model, PROMPTS[p] + c.token_ids)[len(PROMPTS[p]) - 1:]
            z = z / SAMPLING["temperature"]
            z[:, TOKENS:] = -torch.inf
            probs = z.softmax(-1)
            probs[probs < SAMPLING["min_p"] * probs.amax(-1, keepdim=True)] = 0
            probs = probs / probs.sum(-1, keepdim=True)
            ordered, order = probs.sort(-1, descending=True)
            ordered[ordered.cumsum(-1) - ordered >= SAMPLING["top_p"]] = 0
            probs = torch.zeros_like(probs).scatter(-1, order, ordered)
            logq = (probs / probs.sum(-1, keepdim=True)).log()
            logq = logq.gather(1, torch.tensor(c.token_ids)[:, None])[:, 0]
            gap = (logq - torch.tensor(c.logprobs)).abs()
            gaps += gap[logq > -torch.inf].tolist()  # rounding decides at the thresholds
    return sum(gaps) / len(gaps)


def free_gb():
    return round(torch.cuda.mem_get_info()[0] / 1e9, 1) if CUDA else 0.0


def check(name, tied):
    models = [make_model(ROOT / f"{name}{seed}", seed, tied) for seed in (0, 1)]
    started = time.perf_counter()
    engine = Engine(
        ROOT / f"{name}0", max_model_len=1024, dtype=NAME, max_num_seqs=64, sleep_mode=True,
        vocab_size=TOKENS, log_file=ROOT / f"{name}.log", request_timeout=300)

    def sample():
        return dict(engine.generate(PROMPTS, max_tokens=64, **SAMPLING))

    def compare(model, when):
        gap = probe_gap(engine.score(IDS), model)
        note(f"{name}, {when}: probe gap", gap, gap <= TOLERANCE)
        gap = sampling_gap(model, sample())
        note(f"{name}, {when}: gap of sampled tokens", gap, gap <= 2 * TOLERANCE)

    scored = engine.score(IDS)
    note(f"{name}: seconds to ready", round(time.perf_counter() - started, 1))
    gap = probe_gap(scored, models[1])
    note(f"{name}: probe gap to other weights", gap, gap > 2 * TOLERANCE)
    same = [engine.score(IDS) == scored for _ in range(20)].count(True)
    note(f"{name}: of 20 scores, the same bit for bit", same, same == 20)
    compare(models[0], "started")
    first, second = sample(), sample()
    pairs = [(first[p][s].token_ids, second[p][s].token_ids) for p in first for s in range(8)]
    same = sum(a == b for a, b in pairs)
    note(f"{name}: same seeds, same samples", f"{same} of {len(pairs)}", same >= len(pairs) - 2)
    longest = max(token for a, _ in pairs for token in a)
    note(f"{name}: largest sampled id of {TOKENS} allowed", longest, longest < TOKENS)

    started = time.perf_counter()
    engine.load_weights(ROOT / f"{name}1", 1)
    note(f"{name}: seconds of a reload", round(time.perf_counter() - started, 2))
    compare(models[1], "reloaded under CUDA graphs")
    if CUDA:
        awake = free_gb()
        engine.sleep()
        asleep = free_gb()
        engine.load_weights(ROOT / f"{name}0", 2)
        free = awake, asleep, free_gb()
        note(f"{name}: free GB awake, asleep, awake", free, asleep > awake + 5)
        compare(models[0], "woken")
        engine.sleep()
        os.kill(engine.pid, signal.SIGKILL)
        engine.load_weights(ROOT / f"{name}1", 3)
        compare(models[1], "killed asleep")

    restarts, started = engine.restarts, time.perf_counter()
    stream = engine.generate(PROMPTS, max_tokens=[900, 900, 2], **SAMPLING)
    groups = dict([next(stream)])
    os.kill(engine.pid, signal.SIGKILL)
    groups |= dict(stream)
    seconds = round(time.perf_counter() - started, 1)
    healed = engine.restarts == restarts + 1 and len(groups) == len(PROMPTS)
    note(f"{name}: seconds of a rollout with a kill -9", seconds, healed)
    before = free_gb()
    engine.close()
    time.sleep(3)
    note(f"{name}: free GB before and after close", (before, free_gb()))


def main():
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir()
    for tied in (False, True):
        check("tied" if tied else "untied", tied)
    for log in ROOT.glob("*.log"):
        words = ("V2 Model Runner", "graph", "Available KV", "flash", "ERROR")
        lines = [line for line in log.read_text().splitlines() if any(w in line for w in words)]
        print(f"--- {log}", *lines[:20], sep="\n")
    report.finish("gpu_rollout_check", rows, device=torch.cuda.get_device_name() if CUDA else "cpu")
    sys.exit(any(not row["ok"] for row in rows))


if __name__ == "__main__":
    main()
