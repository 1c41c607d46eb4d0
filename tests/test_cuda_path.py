"""
What a GPU would run, on a machine without one: torch's varlen attention with real numbers through a
kernel for the CPU, compiled blocks, the collectives of a step counted, and memory on fake tensors.
"""

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import WARM
from torch.distributed.tensor import DTensor
from torch.nn.attention import varlen  # noqa: F401  (defines the op that gets a kernel below)
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model as model_module
from model import (
    build_policy,
    clip_gradients,
    describe_memory,
    named_weights,
    setup_distributed,
    trace_memory,
    trace_training,
)

SMALL = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=512, tie_word_embeddings=False)
WIDTHS_14B = dict(hidden_size=5120, intermediate_size=13_824, num_attention_heads=40,
                  num_key_value_heads=8, vocab_size=152_064, tie_word_embeddings=False)
CHECKPOINTING = ("none", "full", "selective")


# ----------------------------------------------------------------------------- a kernel for the CPU
KERNEL_CALLS = Counter()


def check_inputs(q, k, v, bounds, longest, window):
    """What torch's CUDA kernel demands of its inputs, and what we promise it."""
    assert q.dtype == k.dtype == v.dtype and q.ndim == k.ndim == v.ndim == 3
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and q.shape[1] % k.shape[1] == 0
    assert bounds.dtype == torch.int32 and bounds.is_contiguous()
    assert bounds[0] == 0 and bounds[-1] == len(q) == len(k)
    assert isinstance(longest, int) and bounds.diff().max() <= longest
    assert longest & (longest - 1) == 0  # or every new length would compile the blocks again
    assert list(window) == [-1, 0]  # causal


def widen(x, heads):
    """(n, H_kv, d) -> (H, n, d) in fp32, each key head repeated for its query heads."""
    return x.float().transpose(0, 1).repeat_interleave(heads // x.shape[1], 0)


def narrow(x, like):
    """The gradient's way back: (H, n, d) -> (n, H_kv, d)."""
    return x.unflatten(0, (like.shape[1], -1)).sum(1).transpose(0, 1).to(like.dtype)


def causal_scores(q, k, scale):
    scores = widen(q, q.shape[1]) @ widen(k, q.shape[1]).mT * scale
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)


def documents(bounds, *tensors):
    return zip(*(x.split(bounds.diff().tolist()) for x in tensors), strict=True)


def forward_kernel(q, k, v, bounds, bounds_k, longest, longest_k, is_causal=False, scale=None,
                   window_size=None, *_, **__):
    check_inputs(q, k, v, bounds, longest, window_size)
    assert bounds_k.data_ptr() == bounds.data_ptr() and longest_k == longest
    KERNEL_CALLS["forward"] += 1
    outputs, lse = [], []
    for q_, k_, v_ in documents(bounds, q, k, v):
        scores = causal_scores(q_, k_, scale)
        outputs.append(narrow(scores.softmax(-1) @ widen(v_, q.shape[1]), q_))
        lse.append(scores.logsumexp(-1))
    return torch.cat(outputs), torch.cat(lse, 1), torch.zeros(2, dtype=torch.uint64)


def backward_kernel(grad, q, k, v, out, lse, bounds, bounds_k, longest, longest_k, is_causal,
                    rng_state, scale=None, window_size=None):
    check_inputs(q, k, v, bounds, longest, window_size)
    assert grad.dtype == out.dtype == q.dtype and grad.stride(-1) == out.stride(-1) == 1
    KERNEL_CALLS["backward"] += 1
    found, heads = [], q.shape[1]
    for q_, k_, v_, g_ in documents(bounds, q, k, v, grad):
        p, g = causal_scores(q_, k_, scale).softmax(-1), widen(g_, heads)
        dp = g @ widen(v_, heads).mT
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        found.append((narrow(ds @ widen(k_, heads), q_), narrow(ds.mT @ widen(q_, heads), k_),
                      narrow(p.mT @ g, v_)))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


@pytest.fixture(scope="module")
def ctx():
    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", forward_kernel)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backward_kernel)
    context = setup_distributed()
    torch.set_num_threads(1)  # small matrices
    yield context
    dist.destroy_process_group()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(model_module, "VARLEN_DEVICES", {"cpu"})


def make_policy(ctx, layers=3, **options):
    config = transformers.Qwen2Config(**SMALL, num_hidden_layers=layers)
    model = build_policy(config, ctx, head_chunk_size=50, **options)
    torch.manual_seed(0)
    with torch.no_grad():
        for _, parameter in named_weights(model):
            parameter.to_local().normal_(0, 0.05)
    return model


def run_step(model, lengths, backward=True):
    """Log-probs and gradients of one pack of random documents."""
    rng = np.random.default_rng(sum(lengths))
    rows = [{"ids": rng.integers(0, 512, n), "mask": np.ones(n)} for n in lengths]
    batch = data.collate(rows)
    mask = batch.pop("mask")
    with torch.set_grad_enabled(backward):
        logprobs, _ = model(**batch)
    if not backward:
        return logprobs, []
    (logprobs * mask).sum().backward()
    gradients = [p.grad.full_tensor().clone() for p in model.parameters()]
    model.zero_grad()
    return logprobs.detach(), gradients


def assert_equal_steps(ours, expected):
    torch.testing.assert_close(ours[0], expected[0], atol=1e-5, rtol=1e-5)
    for a, b in zip(ours[1], expected[1], strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


# ----------------------------------------------------------------------------- attention
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_varlen_attention_is_attention_per_document(checkpointing, ctx, monkeypatch):
    lengths, layers = [40, 1, 87, 5], 3
    expected = run_step(make_policy(ctx, layers), lengths)
    monkeypatch.setattr(model_module, "VARLEN_DEVICES", {"cpu"})
    KERNEL_CALLS.clear()
    ours = run_step(make_policy(ctx, layers, activation_checkpointing=checkpointing), lengths)
    assert_equal_steps(ours, expected)
    # full recomputes the attention, selective keeps its output
    assert KERNEL_CALLS["forward"] == layers * (2 if checkpointing == "full" else 1)
    assert KERNEL_CALLS["backward"] == layers


def test_varlen_attention_is_bf16_in_a_bf16_policy(ctx, as_on_a_gpu):
    model = make_policy(ctx, compute_dtype=torch.bfloat16, activation_checkpointing="selective")
    seen = []
    hook = model.model.layers[1].register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    logprobs, gradients = run_step(model, [20, 12])  # the kernel asserts that q, k and v agree
    hook.remove()
    assert seen[0] == torch.bfloat16 and logprobs.dtype == gradients[0].dtype == torch.float32


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_compiled_blocks_are_whole_graphs_and_compiled_a_few_times(
        checkpointing, ctx, as_on_a_gpu, monkeypatch):
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda module: compile_module(module, backend="aot_eager"))
    options = dict(layers=6, activation_checkpointing=checkpointing)
    eager, compiled = make_policy(ctx, **options), make_policy(ctx, compile_blocks=True, **options)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    packs = [[40, 60, 28], [100, 30], [77, 10, 5, 5], [1], [131], [64, 64], [140], [3, 1, 1],
             [2, 2], [120, 90, 12], [17], [90, 4, 31, 8]]
    for i, lengths in enumerate(packs):
        expected = run_step(eager, lengths, backward=i % 4 != 3)
        assert_equal_steps(run_step(compiled, lengths, backward=i % 4 != 3), expected)
    assert not counters["graph_break"], counters["graph_break"]
    # fewer than layers, so that 48 layers do not reach dynamo's limit of 8 per function either
    assert counters["stats"]["unique_graphs"] <= 5, counters["stats"]


# ----------------------------------------------------------------------------- collectives
def in_a_process_of_its_own(function, *arguments):
    """A fake process group would be this process's default group."""
    with ProcessPoolExecutor(1, WARM) as process:
        return process.submit(function, *arguments).result()


class CollectiveCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # DTensor first; what it calls comes back here
        if "c10d" in op.namespace:
            name = op.name().split("::")[1].split(".")[0]
            self.counts[name.strip("_").removesuffix("_base").replace("_", "")] += 1
        return op(*args, **(kwargs or {}))


def counted(function, *arguments, **named):
    """What the function returns, and its collectives by kind."""
    with CollectiveCounter() as counter:
        result = function(*arguments, **named)
    kinds = ("allgather", "reducescatter", "allreduce", "broadcast", "alltoall")
    return result, {kind: n for kind, n in counter.counts.items() if kind.startswith(kinds)}


def count_collectives(layers, cases):
    """Of a step on rank 0 of 8, for each case: collectives of forward, backward and clipping."""
    dist.init_process_group("fake", rank=0, world_size=8)
    found, batch = [], data.collate([{"ids": np.arange(20), "mask": np.ones(20)}])
    batch.pop("mask")
    for mesh_shape, tie, options in cases:
        names = ("replicate", "shard")[-len(mesh_shape):]
        mesh = dist.init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
        ctx = SimpleNamespace(device=torch.device("cpu"), mesh=mesh, compute_dtype=torch.float32)
        sizes = {**SMALL, "tie_word_embeddings": tie}
        config = transformers.Qwen2Config(**sizes, num_hidden_layers=layers)
        model = build_policy(config, ctx, **options)
        (logprobs, _), forward = counted(model, **batch)
        if options.get("trainable", True):
            _, backward = counted(logprobs.sum().backward)
            _, clip = counted(clip_gradients, model, 1.0)
            found.append((forward, backward, clip))
        else:
            found.append(forward)
    return found


def test_a_step_gathers_once_per_layer_and_direction():
    layers = 4
    full = {"activation_checkpointing": "full"}
    cases = [((8,), False, {}), ((8,), False, full), ((8,), True, full), ((2, 4), False, full),
             ((8,), False, {"trainable": False})]
    plain, checkpointed, tied, hybrid, reference = in_a_process_of_its_own(
        count_collectives, layers, cases)
    # forward: layers, root, head. backward: layers only, the head and the root are still gathered
    forward, clip = {"allgather": layers + 2}, {"allreduce": 1}
    backward = {"allgather": layers, "reducescatter": layers + 2}
    assert plain == checkpointed == (forward, backward, clip)
    assert tied == ({"allgather": layers + 1},
                    {"allgather": layers, "reducescatter": layers + 1}, clip)
    # replicas add up their shards' gradients
    assert hybrid[:2] == (forward, {**backward, "allreduce": layers + 2})
    assert reference == forward


# ----------------------------------------------------------------------------- memory
def trace_all(cases):
    found = []
    for config, ranks, tokens, options in cases:
        found.append(trace_training(config, ranks, tokens, **options))
        dist.destroy_process_group()
    return found


def config_14b(layers):
    return transformers.Qwen2Config(**WIDTHS_14B, num_hidden_layers=layers)


def test_memory_of_the_14b_recipes():
    """Peaks are linear in the number of layers: two small traces give the one of 48."""
    stages = [(24_000, dict(activation_checkpointing="full")),
              (24_000, dict(activation_checkpointing="selective")),
              (16_384, dict(activation_checkpointing="full", reference=True))]
    cases = [(config_14b(n), 8, tokens, options) for tokens, options in stages for n in (2, 4)]
    peaks = [sum(parts.values()) / 1e9 for parts in in_a_process_of_its_own(trace_all, cases)]
    full, selective, stage_2 = (
        two + (four - two) / 2 * 46 for two, four in zip(peaks[::2], peaks[1::2], strict=True))
    assert (round(full, 2), round(selective, 2)) == (54.05, 65.78)
    # 3.1 GB more if the reference's root and head stay gathered
    assert round(stage_2, 2) == 51.84


def test_parts_of_the_traced_memory(ctx):
    """Beside a real process group, as in the trainers; what is left behind there: nothing."""
    config = transformers.Qwen2Config(**{**SMALL, "hidden_size": 256}, num_hidden_layers=6)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    weights = sum(p.numel() for p in model.parameters())
    before = torch.softmax, torch.UntypedStorage.resize_, dict(model_module.__dict__)
    tokens = 4096
    parts = trace_memory(config, 8, tokens, shard_size=4, reference=True,
                         activation_checkpointing="full", head_chunk_size=512)
    assert before == (torch.softmax, torch.UntypedStorage.resize_, dict(model_module.__dict__))
    assert dist.get_world_size() == 1 and dist.get_backend() != "fake"
    near = dict(rel=0.05)  # blocks of 512 bytes
    assert parts["weights"] == pytest.approx(weights * 4 / 4, **near)
    assert parts["gradients"] == pytest.approx(weights * 4 / 4, **near)
    assert parts["moments"] == pytest.approx(weights * 8 / 4, **near)
    assert parts["reference"] == pytest.approx(weights * 2 / 4, **near)
    saved = 7 * tokens * config.hidden_size * 2  # each block's input, and the last one's output
    assert parts["saved activations"] == pytest.approx(saved, rel=0.5)


def test_the_plan_says_what_fits():
    parts = {"weights": 7e9, "gradients": 0, "moments": 14e9, "saved activations": 33.06e9,
             "head": 1e6}
    line = describe_memory(parts)
    listed = "(weights 7.0, moments 14.0, saved activations 33.1)"
    assert line.startswith(f"peak 54.1 GB per rank {listed}, traced for GPUs")
    assert "GPUs (this machine has none) in bf16" in line
    assert line.endswith("fits 80 GB, fits 141 GB")
    assert describe_memory(parts, 0.35).endswith(
        "35% of the card for vLLM: does not fit 80 GB, fits 141 GB")
