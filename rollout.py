"""
Rollouts: everything that touches vLLM. Prompts go in and completions come out as token ids.

The policy that answers (vLLM) and the policy that learns (model.py) are two programs with two
copies of the weights. Most of this file keeps the copies equal, and gets every answer even when
the sampler dies.

  1. One child process per engine, `python rollout.py --serve`: vLLM and the trainer both want
     torch's default process group, and a process can be killed and replaced, a library cannot.
     Requests and answers are JSON over a socket pair; stdout and stderr go to a log file.
  2. Every sample is a request with its own seed s(seed, place, sample), so a lost sample can be
     drawn again. Groups are returned as they finish: scoring overlaps with generation.
  3. vLLM returns log q(y_t) of the distribution it sampled from: softmax(logits / temperature),
     then min_p, then top_p, renormalised. An importance weight needs these; those of the raw
     softmax (vLLM's default) differ wherever temperature or truncation changed a probability.
  4. Weight sync: all ranks write a new folder, every engine loads it and drops its prefix cache,
     then both sides score a fixed probe. They must agree, and if the weights changed, the engine's
     numbers must have changed. Nobody samples before that.
  5. A dead or silent engine is killed and started again on the last complete weights, and only
     the missing samples are drawn again; at most max_restarts times.
  6. Nothing survives the trainer: a guard beside each engine kills the engine's process group as
     soon as the trainer or the engine is gone, even after kill -9.

Left out: weights over NCCL (a broadcast to a dead peer hangs without an error, a folder can be
inspected), HTTP servers, Ray, sampling during the update, which would be from older weights.

Letters: P prompts, G = n samples per prompt, S tokens of a prompt and its completion.
"""

import gc
import hashlib
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from model import max_over_ranks, raise_on_all_ranks, save_hf

# Mean log-prob gap allowed between engine and trainer, in nats, by the engine's dtype. float32:
# 5e-6 was measured. bfloat16: a pretrained 135M model has 0.031 on the trainer's probe and 0.041
# to 0.046 on single prompts; random other weights give 0.58 to 1.1.
PROBE_TOLERANCE = {"float32": 1e-3, "float16": 0.2, "bfloat16": 0.2}


class EngineError(RuntimeError):
    """An engine cannot start or died too often (its log's tail follows), or refused a request."""


class StaleWeightsError(RuntimeError):
    """An engine does not hold the weights that the trainer published."""


@dataclass
class Completion:
    """One sampled answer. Its token ids are never decoded and tokenised again."""

    prompt_index: int
    sample_index: int
    token_ids: list[int]  # ends with the stop token if finish_reason is "stop": it was sampled
    logprobs: list[float]  # log q(y_t): after temperature, min_p, top_p, renormalised
    finish_reason: str  # "stop" | "length"
    version: int  # version of the weights that sampled it


def completion_text(tokenizer, completion):
    """
    The text that was sampled, without the stop token at its end.

    Special tokens are not skipped: some tokenizers count </think> among them, and a reward that
    looks for it would never be paid.
    """
    token_ids = completion.token_ids
    if completion.finish_reason == "stop":
        token_ids = token_ids[:-1]
    return tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)


def sampling_seed(seed, place, sample):
    """Seed of one sample in [0, 2^31): the same in every process, so that it can be drawn again."""
    text = f"{seed}/{place}/{sample}"
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()  # hash() differs per process
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


@dataclass(frozen=True)
class EngineLayout:
    """What one rank has to do with the engines."""

    owns_engine: bool
    index: int  # which engine this rank belongs to, 0 .. count - 1
    count: int  # engines in the whole run
    devices: list[int]  # the engine's GPUs, as local ranks


def engine_layout(rank, local_rank, world_size, local_world_size, tensor_parallel_size):
    """
    Share engines among ranks: `tensor_parallel_size` neighbours of a machine use one engine, and
    the first of them owns it. Raises ValueError if an engine would span two machines.
    """
    if local_world_size % tensor_parallel_size:
        raise ValueError(
            f"--tensor_parallel_size {tensor_parallel_size} must divide the {local_world_size} "
            "ranks of a machine: an engine does not span machines")
    first = local_rank - local_rank % tensor_parallel_size
    devices = list(range(first, first + tensor_parallel_size))
    count = world_size // tensor_parallel_size
    return EngineLayout(local_rank == first, rank // tensor_parallel_size, count, devices)


# --------------------------------------------------------------------------------------------------
# Weight sync
# --------------------------------------------------------------------------------------------------
@contextmanager
def clean_sync_folder(sync_dir, output_dir, ctx):
    """
    This run's folder for weights on this machine; what a killed run left in it is deleted on entry,
    and the folder on exit (14B weights are 28 GB, twice that while a new version is loaded).
    """
    run = Path(output_dir).resolve().as_posix().strip("/").replace("/", "-")
    folder = Path(sync_dir, f"grpo-{run}-node{ctx.rank // ctx.local_world_size}")

    def remove():
        if ctx.local_rank == 0 and folder.exists():
            shutil.rmtree(folder)

    with raise_on_all_ranks(ctx, f"removing old weights in --sync_dir {sync_dir}"):
        remove()
    try:
        yield folder
    finally:
        remove()


def sync_weights(model, engine, ctx, folder, version, probe, last=None):
    """
    Give every engine the policy's weights and prove that they arrived; collective.

    engine: this rank's Engine or None. folder: from clean_sync_folder. probe: {"token_ids": (S,),
    "batch": data.collate of them, "tolerance": nats}. last: what the previous call returned.
    Returns {"fingerprint", "engine_logprobs" (S-1,), "gap"}. Raises model.RankFailure on all ranks
    if a machine lacks space or an engine is stale.
    """
    torch.cuda.empty_cache()  # an engine that wakes up needs what torch has cached (CPU: no-op)

    # Publish. Every machine writes a copy, since /dev/shm is not shared, and every version into a
    # new folder: vLLM maps files, and has served old weights from a rewritten one (vllm#32718).
    published = folder / f"version-{version:06d}"
    with raise_on_all_ranks(ctx, "publishing weights"):
        folder.mkdir(parents=True, exist_ok=True)
        needed = sum(p.numel() for p in model.parameters()) * ctx.compute_dtype.itemsize
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(f"--sync_dir: weights version {version} needs {needed / 1e9:.2f} GB and "
                          f"{free / 1e9:.2f} GB are free in {folder}; choose a larger disk")
    fingerprint = save_hf(
        model, published, ctx, dtype=ctx.compute_dtype, one_per_node=True, durable=False)

    # Load, then score the probe on both sides.
    with torch.no_grad():
        trainer_logprobs = model(**probe["batch"])[0][:-1].tolist()
    engine_logprobs, gap = None, 0.0
    with raise_on_all_ranks(ctx, f"weight sync {version}"):
        if engine is not None:
            engine.load_weights(published, version)
            engine_logprobs = engine.score(probe["token_ids"])
            changed = last and last["fingerprint"] != fingerprint
            stale_logprobs = last["engine_logprobs"] if changed else None
            gap = check_probe(
                engine_logprobs, trainer_logprobs, probe["tolerance"], stale_logprobs)

    # Remove older versions: until now a restarted engine might have needed the previous one.
    with raise_on_all_ranks(ctx, "removing old weights"):
        for path in folder.glob("version-*") if ctx.local_rank == 0 else ():
            if path != published:
                shutil.rmtree(path)

    return dict(
        fingerprint=fingerprint, engine_logprobs=engine_logprobs, gap=max_over_ranks(ctx, gap))


def check_probe(engine_logprobs, trainer_logprobs, tolerance, stale_logprobs=None):
    """
    Does the engine hold the published weights? Compare log-probs (S-1,) of one fixed text.

    gap = mean_t | log pi_engine(y_t) - log pi_trainer(y_t) | <= tolerance: the mean, because in
    bf16 single tokens are off by 0.1 or more, while wrong weights move every token. stale_logprobs
    are the engine's before the weights changed, and some bit must differ: a step at learning rate
    1e-6 moves log-probs by less than bf16 rounding, so that old weights would pass the first test.
    Returns gap in nats. Raises StaleWeightsError with the numbers.
    """
    count = len(engine_logprobs)
    pairs = zip(engine_logprobs, trainer_logprobs, strict=True)
    gap = sum(abs(engine - trainer) for engine, trainer in pairs) / count
    numbers = (f"mean probe log-prob {sum(engine_logprobs) / count:.6f} in the engine, "
               f"{sum(trainer_logprobs) / count:.6f} in the trainer; mean gap {gap:.3g}")
    if not gap <= tolerance:  # this way round NaN fails, too
        raise StaleWeightsError(
            f"engine and trainer do not hold the same weights: {numbers}, tolerance "
            f"{tolerance:.3g}. If sync/logprob_gap was near it from the start, vLLM rounds this "
            "model differently: raise --probe_tolerance")
    if stale_logprobs == engine_logprobs:
        raise StaleWeightsError(
            f"the weights changed, but not a single bit of the engine's probe did: {numbers}")
    return gap


def check_files(folder):
    """Raise EngineError unless every safetensors file of a model folder is there and complete."""
    from safetensors import SafetensorError, safe_open

    try:
        files = {"model.safetensors"}
        index = folder / "model.safetensors.index.json"
        if index.exists():
            files = set(json.loads(index.read_text())["weight_map"].values())
        for file in files:
            safe_open(folder / file, "pt")  # compares its header with its size
    except (OSError, ValueError, SafetensorError) as error:
        raise EngineError(
            f"weights in {folder} are not intact: {error}. Has anyone cleaned --sync_dir?"
        ) from error


# --------------------------------------------------------------------------------------------------
# The trainer's side: start, ask, restart and end one child process
# --------------------------------------------------------------------------------------------------
def send(connection, message):
    connection.send_bytes(json.dumps(message).encode())  # ids and floats survive JSON exactly


def receive(connection):
    return json.loads(connection.recv_bytes())


class Engine:
    """
    One vLLM engine in a child process, owned by one rank and used by one thread.

    The constructor returns at once and the first request waits, so that the trainer loads its model
    meanwhile. On a shared GPU make a request before the trainer allocates: vLLM sizes its KV cache
    by the memory that is free while it starts.

    max_model_len: longest prompt + completion. devices: GPUs as local ranks (None: the first).
    vocab_size: ids from here on, a padded vocabulary, are never sampled. stop_token_id: ends an
    answer, beside those of the model's generation config. sleep_mode: allow sleep().
    request_timeout: seconds that an engine may be silent.
    Every method raises EngineError when the engine cannot start, refuses or died too often.
    """

    def __init__(self, model_path, *, log_file, max_model_len, dtype="auto", tensor_parallel_size=1,
                 devices=None, gpu_memory_utilization=0.3, max_num_seqs=256, enforce_eager=False,
                 sleep_mode=False, vocab_size=None, stop_token_id=None, request_timeout=1800,
                 max_restarts=3):
        on_cpu = not torch.cuda.is_available()
        llm = dict(
            model=str(model_path), dtype=dtype, max_model_len=max_model_len,
            max_num_seqs=max_num_seqs, tensor_parallel_size=tensor_parallel_size,
            distributed_executor_backend="mp" if tensor_parallel_size > 1 else "uni",
            logprobs_mode="processed_logprobs")  # point 3 above
        if Path(model_path).is_dir() and not list(Path(model_path).glob("token*.*")):
            llm["skip_tokenizer_init"] = True  # ids go in, ids come out
        if on_cpu:
            # No CUDA graphs. A prompt cut in two by the scheduler rewinds its seeded generator,
            # which a CPU generator cannot do (vLLM 0.32 dies of it): prompts are prefilled whole.
            llm |= dict(
                enforce_eager=True, kv_cache_memory_bytes=2**28, enable_chunked_prefill=False,
                max_num_batched_tokens=max(4096, max_model_len))
        else:
            llm |= dict(
                enforce_eager=enforce_eager, gpu_memory_utilization=gpu_memory_utilization,
                enable_sleep_mode=sleep_mode)

        self.settings = dict(llm=llm, vocab_size=vocab_size)
        self.environment = child_environment(model_path, tensor_parallel_size, devices, on_cpu)
        self.max_model_len = max_model_len
        self.stop_token_ids = [] if stop_token_id is None else [stop_token_id]
        self.can_sleep = sleep_mode and not on_cpu
        self.request_timeout = request_timeout
        self.restarts, self.max_restarts = 0, max_restarts
        self.busy = False  # True: it owes answers
        self.version, self.weights_folder = 0, None  # None: still on model_path's own weights
        self.log_file = Path(log_file)
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        self._start()

    # --- requests ---------------------------------------------------------------------------------
    def generate(self, prompts, *, n, seeds, temperature, top_p, min_p, max_tokens):
        """
        Sample n completions of each prompt; yield (prompt_index, group of n) as groups finish.

        prompts: (P, length) token ids. seeds: (P, n). max_tokens: one for all, or one per prompt.
        The engine goes on while the caller works on a group. Samples drawn again after a death have
        the same tokens in fp32 on a CPU; in bf16 a near-tie may fall the other way. An iterator
        that is not exhausted costs a restart. Raises ValueError for prompts too long to answer.
        """
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            if not prompt or limit < 1 or len(prompt) + limit > self.max_model_len:
                raise ValueError(
                    f"prompt {index}: its {len(prompt)} tokens and max_tokens {limit} must be at "
                    f"least 1 and together at most max_model_len {self.max_model_len}")

        sampling = dict(temperature=temperature, top_p=top_p, min_p=min_p,
                        stop_token_ids=self.stop_token_ids)
        missing = {(p, s): None for p in range(len(prompts)) for s in range(n)}  # an ordered set
        groups = [[] for _ in prompts]
        while missing:
            try:
                self._ask(dict(
                    op="generate", sampling=sampling, prompts={p: prompts[p] for p, _ in missing},
                    samples=[(p, s, seeds[p][s], limits[p]) for p, s in missing]))
                while missing:
                    completion = Completion(**self._answer())
                    p = completion.prompt_index
                    del missing[p, completion.sample_index]
                    self.busy = bool(missing)
                    groups[p].append(completion)
                    if len(groups[p]) == n:
                        yield p, sorted(groups[p], key=lambda sample: sample.sample_index)
            except (OSError, EOFError) as error:
                self._restart(error)

    def load_weights(self, folder, version):
        """Load a published folder, drop the prefix cache, and wake the engine if it sleeps."""
        check_files(Path(folder))  # an engine would die of a damaged file, and so would the next
        self._call(op="load", folder=str(folder), version=version)
        self.version, self.weights_folder = version, str(folder)

    def score(self, token_ids):
        """log pi(y_t | y_<t) of token_ids[1:], (S-1,), under the softmax without truncation."""
        if not 2 <= len(token_ids) < self.max_model_len:
            raise ValueError(f"score: {len(token_ids)} tokens, need 2 to {self.max_model_len - 1}")
        return self._call(op="score", token_ids=token_ids)

    def sleep(self):
        """Free the GPU memory of weights and KV cache until load_weights (on a CPU: nothing)."""
        if self.can_sleep:
            self._call(op="sleep")

    def close(self):
        """End the child."""
        self.connection.close()  # the child reads an end of file and leaves
        if self.settings["llm"]["tensor_parallel_size"] > 1:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(10)  # its workers need time to remove their shared memory
        self._kill()

    # --- process ----------------------------------------------------------------------------------
    def _start(self):
        ours, theirs = socket.socketpair()
        # One deadline: seconds that the engine may be silent while it starts, computes an answer
        # or is between two completions. (How long a whole rollout takes, nobody knows beforehand.)
        seconds = struct.pack("ll", max(1, int(self.request_timeout)), 0)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        self.connection = Connection(ours.detach())
        self.ready = False
        send(self.connection, self.settings)
        arguments = ["--serve", str(theirs.fileno()), str(os.getpid())]
        with theirs, open(self.log_file, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), *arguments], env=self.environment,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[theirs.fileno()],
                start_new_session=True)  # a process group of its own
        self.pid = self.process.pid  # also the id of that group

    def _ask(self, request):
        """Send a request once the engine is ready and holds the last weights."""
        if self.busy:  # an iterator of generate() was abandoned, or a wait interrupted
            self._kill()
            self._start()
        if not self.ready:
            self._answer()
            self.ready = True
            if self.weights_folder:
                self.load_weights(self.weights_folder, self.version)
        self.busy = True
        send(self.connection, request)

    def _answer(self):
        """Next answer. Raises EOFError or OSError from a dead engine, EngineError if refused."""
        answer = receive(self.connection)
        if isinstance(answer, dict) and "refused" in answer:
            self.busy = False
            raise EngineError(f"the engine refused the request: {answer['refused']}")
        return answer

    def _call(self, **request):
        """One request, one answer; a dead engine is replaced."""
        while True:
            try:
                self._ask(request)
                answer = self._answer()
                self.busy = False
                return answer
            except (OSError, EOFError) as error:
                self._restart(error)

    def _restart(self, error):
        """Replace a dead or silent engine, unless it can never start or max_restarts is reached."""
        self._kill()
        code = self.process.returncode  # negative: ended by a signal
        silent = isinstance(error, BlockingIOError)  # what a socket's deadline raises
        cause = f"no answer for {self.request_timeout} s" if silent else f"exit code {code}"
        cannot_start = not self.ready and code > 0  # a wrong flag or model: it would fail again
        if cannot_start or self.restarts >= self.max_restarts:
            what = "cannot start" if cannot_start else f"died after {self.restarts} restarts"
            tail = self.log_file.read_text(errors="replace").splitlines()[-30:]
            raise EngineError(f"the engine {what} ({cause}); last lines of {self.log_file}:\n"
                              + "\n".join(tail)) from error
        self.restarts += 1
        print(f"rollout: engine {self.pid} died ({cause}); restart {self.restarts} of "
              f"{self.max_restarts} on weights version {self.version}, log {self.log_file}",
              file=sys.stderr, flush=True)
        torch.cuda.empty_cache()  # vLLM looks for free memory when it starts
        self._start()

    def _kill(self):
        # The guard kills the rest of the process group. With tensor parallelism some MB of message
        # buffers stay in /dev/shm.
        self.process.kill()
        self.process.wait(60)
        self.connection.close()
        self.busy = False


def child_environment(model_path, tensor_parallel_size, devices, on_cpu):
    """The environment of an engine: the trainer's without what would disturb vLLM."""
    # With torchrun's variables vLLM would join the trainer's process group, with VLLM_PORT all
    # engines would take one port, and with expandable segments (ALLOC_CONF) tensor parallelism
    # dies at graph capture (vllm#42609). Thread settings are the trainer's.
    unwanted = re.compile(
        r"RANK$|WORLD_SIZE$|(LOCAL|GROUP|ROLE|MASTER|TORCHELASTIC|TORCH_NCCL|OMP|GOMP|KMP)_|"
        r"PYTORCH_(CUDA_)?ALLOC_CONF$|VLLM_PORT$")
    environment = {name: value for name, value in os.environ.items() if not unwanted.match(name)}
    environment |= {
        "OMP_NUM_THREADS": "1",  # it shares the cores with the trainer
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning idle threads triple the time on a shared core
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if tensor_parallel_size == 1 else "1",
        # Forked workers would inherit the switched-off garbage collector, for good.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        # FlashInfer's sampler has neither seeds nor processed log-probs, and compiles with nvcc.
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        # Nothing listens beyond loopback, nothing is reported to anyone.
        "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo",
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false"}
    if Path(model_path).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    if on_cpu:
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1",
                        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # for renew_tied_head
    elif devices is not None:  # local ranks count within what the trainer itself may see
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(max(devices) + 1)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[i] for i in devices)
    return environment


# --------------------------------------------------------------------------------------------------
# The child's side: python rollout.py --serve FD TRAINER_PID
# --------------------------------------------------------------------------------------------------
def serve(descriptor, trainer_pid):
    """Build the engine, then answer requests until the trainer closes the connection."""
    fork_guard(trainer_pid)
    connection = Connection(descriptor)
    try:
        settings = receive(connection)
        # Garbage collection during imports costs a third of the start-up time, so it is off until
        # the engine is built.
        gc.disable()
        from vllm import LLM
        from vllm.exceptions import VLLMValidationError
        gc.freeze()
        llm = LLM(**settings["llm"])
        gc.enable()
        padding = padding_bias(llm, settings["vocab_size"])
        # A model whose forward fails must not count as started. Of 2 tokens only, the first forward
        # in bf16 dies on a CPU with AMX: oneDNN asks for those registers from some 8 tokens on, and
        # vLLM's attention uses them without asking.
        score(llm, [0] * min(32, settings["llm"]["max_model_len"] - 1))

        send(connection, "ready")
        # A thread sends, so that a trainer busy with scoring does not stop the generation.
        sender = ThreadPoolExecutor(1)
        version, asleep = 0, False
        while True:
            request = receive(connection)
            op, answer = request["op"], "done"
            try:
                if op == "generate":
                    for completion in sample(llm, request, padding):
                        sender.submit(send, connection, completion | {"version": version})
                    continue
                elif op == "score":
                    answer = score(llm, request["token_ids"])
                elif op == "sleep":
                    llm.sleep(level=2)
                    asleep = True
                elif op == "load":
                    load(llm, request["folder"], asleep)
                    version, asleep = request["version"], False
            except (ValueError, VLLMValidationError) as error:  # any other error ends the engine
                answer = {"refused": str(error)}
            sender.submit(send, connection, answer)
    except EOFError:
        pass  # the trainer has closed the connection
    except BaseException:  # noqa: BLE001  (it ends the process)
        traceback.print_exc()
        os._exit(1)  # at once: vLLM's own teardown may hang, and the guard cleans up


def fork_guard(trainer_pid):
    """
    Fork a process that waits until the trainer or the engine is gone and then kills the group.

    PR_SET_PDEATHSIG would do for one process, but with tensor parallelism vLLM has children, which
    outlive a killed engine. A process descriptor becomes readable however its process ended.
    """
    engine_pid = os.getpid()
    # A killed vLLM leaves vllm_dist_* among its temporary files, which go with this folder.
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="vllm-")
    if os.fork():
        return
    try:
        watched = [os.pidfd_open(engine_pid), os.pidfd_open(trainer_pid)]
        select.select(watched, [], [])
    finally:  # also if one of them was gone before we looked
        shutil.rmtree(tempfile.tempdir, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)


def sample(llm, request, padding):
    """Queue all samples, then step; yields each as the fields of a Completion when it is done."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    for prompt in request["prompts"].values():
        check_vocabulary(llm, prompt)
    for prompt_index, sample_index, seed, max_tokens in request["samples"]:
        params = SamplingParams(
            **request["sampling"], seed=seed, max_tokens=max_tokens, logit_bias=padding,
            logprobs=0, flat_logprobs=True,  # of the sampled token only, without objects
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY)  # step() returns what is complete
        prompt = {"prompt_token_ids": request["prompts"][str(prompt_index)]}  # JSON: keys are str
        engine.add_request(f"{prompt_index}/{sample_index}", prompt, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            prompt_index, sample_index = map(int, output.request_id.split("/"))
            answer = output.outputs[0]
            yield dict(
                prompt_index=prompt_index, sample_index=sample_index,
                token_ids=list(answer.token_ids), logprobs=list(answer.logprobs.logprobs),
                finish_reason=answer.finish_reason)


def padding_bias(llm, vocab_size):
    """
    {id: bias} that forbids the ids of a padded vocabulary, which decode to nothing. -100 is the
    least that vLLM takes; it is added before temperature, so that log-probs are renormalised.
    """
    size = llm.llm_engine.model_config.get_vocab_size()
    padding = range(vocab_size or size, size)
    if len(padding) > 1024:
        raise ValueError(f"{len(padding)} ids beyond the tokenizer's {vocab_size}; vLLM forbids at "
                         "most 1,024: shrink the model by transformers' resize_token_embeddings")
    return dict.fromkeys(padding, -100.0) or None


def check_vocabulary(llm, token_ids):
    """vLLM does not look: the embedding would fail, or read foreign memory on a GPU."""
    size = llm.llm_engine.model_config.get_vocab_size()
    if not all(0 <= token < size for token in token_ids):
        raise ValueError(
            f"token ids {min(token_ids)} to {max(token_ids)} are outside the vocabulary of {size}")


def score(llm, token_ids):
    """Prompt log-probs, which vLLM takes from the plain softmax; position 0 has none."""
    from vllm import SamplingParams

    check_vocabulary(llm, token_ids)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    for _ in range(3):
        prompt = {"prompt_token_ids": token_ids}
        output, = llm.generate([prompt], sampling_params=params, use_tqdm=False)
        pairs = list(zip(token_ids[1:], output.prompt_logprobs[1:], strict=True))
        # vLLM's second model runner (CUDA) may return those of other tokens (vllm#44106).
        if all(token in position for token, position in pairs):
            return [position[token].logprob for token, position in pairs]
    raise RuntimeError("vLLM returned log-probs of other tokens three times (vllm#44106)")


def load(llm, folder, asleep):
    """Weights from `folder`, then an empty prefix cache, which holds keys of the old weights."""
    if asleep:
        llm.wake_up(tags=["weights"])  # the KV cache comes back after the weights are loaded
    llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
    if llm.llm_engine.vllm_config.device_config.device_type == "cpu":
        llm.collective_rpc(renew_tied_head)
    if asleep:
        llm.wake_up(tags=["kv_cache"])
    if not llm.reset_prefix_cache():  # False, without an exception, if a block is still in use
        raise RuntimeError(f"vLLM did not reset its prefix cache after loading {folder}")


def renew_tied_head(worker):
    """
    Pack the head again: vLLM's CPU backend multiplies with a packed copy of it, and a reload does
    not renew that copy if the head is tied to the embedding (vLLM 0.32; log-probs off by 0.3).
    """
    model = worker.get_model()
    if model.config.tie_word_embeddings:
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


if __name__ == "__main__":  # vLLM's workers import this file: nothing may run on import
    if len(sys.argv) != 4 or sys.argv[1] != "--serve":
        sys.exit("rollout.py is a library; Engine runs it as `rollout.py --serve FD TRAINER_PID`")
    serve(int(sys.argv[2]), int(sys.argv[3]))
