"""Rollouts: everything that touches vLLM. Prompts go in and completions come out as token ids, never as text.

A rollout asks the current policy for G answers to each of P problems. The policy that answers (vLLM) and the policy
that learns (model.py) are two programs with two copies of the weights. Most of this file makes sure that they stay the
same policy, and that the answers arrive even if the sampler dies.

Method
  1. One child process per engine, `python rollout.py --serve`. vLLM and the trainer both want torch's default process
     group, so they cannot share a process; and a process can be killed and replaced, a library in the trainer cannot.
  2. Requests and answers are JSON messages over a socket pair. stdout and stderr of the child go to a log file, whose
     last lines are quoted in every error.
  3. Every sample is a request of its own with its own seed s(seed, step, prompt, sample): a lost sample can be drawn
     again and comes out the same. Groups are handed on in the order they finish, so scoring overlaps with generation.
  4. vLLM returns log q(y_t) of the distribution it sampled from: softmax(logits / temperature), then min_p, then top_p,
     renormalised. These are the log-probs an importance weight needs; those of the raw softmax (vLLM's default) would
     call every token off-policy whose probability the temperature or the truncation has changed.
  5. Weight sync: all ranks write a new folder (publish_weights), each engine reloads it and drops its prefix cache
     (load_weights), then both sides score a fixed probe: they must agree, and the engine's numbers must have moved if
     the weights did (check_probe). Nobody samples before that.
  6. Healing: an engine that is dead, silent or out of memory is killed with all its processes, started again on the
     last complete weights, and only the missing samples are drawn again; at most max_restarts times.
  7. Nothing survives the trainer: a guard process beside each engine kills the engine's process group when the trainer
     or the engine is gone, however it went (kill -9 included), and when the engine has been stopped for a while.

Left out: weights over NCCL (a broadcast that meets a dead peer hangs without an error; a folder on /dev/shm costs
seconds and can be looked at), HTTP servers (nothing listens on a port), Ray, sampling during the update (its samples
would come from older weights), LoRA, images.

Legend: P prompts, G = n samples per prompt, S tokens of a prompt and its completion.
"""

import atexit
import gc
import hashlib
import json
import math
import os
import queue
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

LOG_TAIL_LINES = 30       # lines of the engine's log quoted in an error
FROZEN_SECONDS = 30       # how long an engine may be stopped (SIGSTOP) before its guard kills it
KILL_SECONDS = 60         # how long a process may take to disappear after SIGKILL, or after being asked to leave
PROBE_TOLERANCE = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 5e-2}   # by the engine's dtype; see check_probe


class EngineError(RuntimeError):
    """An engine cannot start, refused a request, or died more often than allowed. Carries the end of its log."""


class StaleWeightsError(RuntimeError):
    """An engine does not hold the weights that the trainer published."""


class _EngineDied(Exception):
    """Inside this file only: the child is gone or silent, and a restart is the answer."""


@dataclass
class Completion:
    """One sampled answer, token ids in and out, never re-tokenised (text -> ids need not give the sampled ids back)."""

    prompt_index: int
    sample_index: int
    token_ids: list[int]     # ends with the stop token when finish_reason is "stop": it was sampled, so it is trained
    logprobs: list[float]    # log q(y_t) of each token: after temperature, min_p, top_p, renormalised
    finish_reason: str       # "stop" | "length"
    version: int             # version of the weights that sampled it


@dataclass(frozen=True)
class EngineLayout:
    """What one rank has to do with the engines: see engine_layout."""

    owns_engine: bool
    index: int               # which engine this rank belongs to, 0 .. count - 1
    count: int               # engines in the whole run
    devices: list[int]       # the engine's GPUs, as local ranks


# ---------------------------------------------------------------------------------------------------------------------
# Seeds and layout: plain functions for train_grpo.py and evaluate.py
# ---------------------------------------------------------------------------------------------------------------------
def sampling_seed(seed: int, step: int, prompt_id: int | str, sample: int) -> int:
    """Seed of one sample, in [0, 2^31), the same on every machine and in every run (Python's hash() is salted).

    It depends on what is sampled and not on when or where, so a sample can be drawn again by another engine process.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{prompt_id}/{sample}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


def engine_layout(rank: int, local_rank: int, world_size: int, local_world_size: int,
                  tensor_parallel_size: int) -> EngineLayout:
    """Deal a run's engines to its ranks: `tensor_parallel_size` neighbouring ranks of a machine share one engine, and
    the first of them owns it.

    Raises ValueError if an engine would have to span two machines.
    """
    if tensor_parallel_size < 1 or local_world_size % tensor_parallel_size:
        raise ValueError(
            f"--tensor_parallel_size {tensor_parallel_size} must divide the {local_world_size} ranks of a machine "
            f"(an engine does not span machines); choose one of "
            f"{[d for d in range(1, local_world_size + 1) if local_world_size % d == 0]}")
    first = local_rank - local_rank % tensor_parallel_size
    return EngineLayout(owns_engine=local_rank == first, index=rank // tensor_parallel_size,
                        count=world_size // tensor_parallel_size,
                        devices=list(range(first, first + tensor_parallel_size)))


# ---------------------------------------------------------------------------------------------------------------------
# Weight sync: publish, verify, clean up
# ---------------------------------------------------------------------------------------------------------------------
def publish_weights(model, sync_dir: str, version: int, dtype, ctx) -> tuple[str, int]:
    """Write the policy as weights version `version` into a new folder below sync_dir. Collective: every rank calls it.

    Every machine writes a copy of its own, since /dev/shm is not shared; on /dev/shm the transfer runs at memory speed.
    save_hf writes under a temporary name and renames, so the folder is complete or absent. sync_dir belongs to one run.

    Args: model, the sharded policy; dtype, the torch dtype to store; ctx, model.Dist.
    Returns: (folder, fingerprint): this machine's folder; fingerprint is an int over the published bits, equal on every
        rank, and equal for two versions only if their weights are.
    Raises: model.RankFailure on every rank if any machine lacks the space.
    """
    from model import raise_on_all_ranks, save_hf

    folder = Path(sync_dir) / f"node-{ctx.rank // ctx.local_world_size}" / f"version-{version:06d}"
    needed = sum(p.numel() for p in model.parameters()) * dtype.itemsize      # numel of a DTensor: the whole tensor's
    with raise_on_all_ranks(ctx, "publishing weights"):       # a rank that raised alone would leave the others waiting
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < 1.02 * needed:                    # 2% for headers and block rounding
            raise OSError(f"--sync_dir {sync_dir}: weights version {version} needs {needed / 1e9:.2f} GB and "
                          f"{free / 1e9:.2f} GB are free (the last version stays until every engine has taken the new "
                          f"one: two must fit). Point --sync_dir at a larger disk, or enlarge /dev/shm")
    return str(folder), save_hf(model, folder, ctx, dtype=dtype, one_per_node=True, durable=False)


def remove_old_versions(folder: str) -> int:
    """Delete every weights version beside `folder`, half-written ones too; returns how many.

    To be called by one rank per machine, after a barrier that follows load_weights and check_probe on all ranks: until
    then a restarting engine may still need the version before.
    """
    old = [path for path in Path(folder).parent.glob("version-*") if path.name != Path(folder).name]
    for path in old:
        shutil.rmtree(path)
    return len(old)


def check_probe(engine_logprobs: list[float], trainer_logprobs: list[float],
                previous_engine_logprobs: list[float] | None, weights_changed: bool, tolerance: float) -> float:
    """Does the engine hold the published weights? Compare both sides' log-probs (S-1,) of one fixed probe text.

    gap = mean_t | log pi_engine(y_t) - log pi_trainer(y_t) | <= tolerance, and if the published bits changed, then the
    engine's numbers must differ somewhere, bit for bit, from its previous ones. The second half is needed because one
    step at learning rate 1e-6 moves log-probs less than bf16 rounding does: an engine that kept last step's weights
    would pass the first half for ever. The mean and not the maximum, because in bf16 single tokens are off by 0.1 while
    the mean stays near 0.01; wrong weights move every token.

    Tolerances (PROBE_TOLERANCE): 1e-3 for a float32 engine (measured: 5e-6 at most), 5e-2 for bf16 (measured: 0.014).

    Returns: gap, in nats. Raises: StaleWeightsError with both numbers.
    """
    if len(engine_logprobs) != len(trainer_logprobs) or not engine_logprobs:
        raise ValueError(f"probe: {len(engine_logprobs)} log-probs from the engine, {len(trainer_logprobs)} from the "
                         f"trainer; both must score the same tokens, at least two of them")
    differences = [abs(e - t) for e, t in zip(engine_logprobs, trainer_logprobs, strict=True)]
    gap = sum(differences) / len(differences)
    means = (f"mean probe log-prob {sum(engine_logprobs) / len(engine_logprobs):.6f} in the engine, "
             f"{sum(trainer_logprobs) / len(trainer_logprobs):.6f} in the trainer")
    if not gap <= tolerance:                                                     # written so that NaN fails, too
        raise StaleWeightsError(
            f"engine and trainer do not hold the same weights: {means}; mean gap {gap:.3g} (largest "
            f"{max(differences):.3g}), tolerance {tolerance:.3g}. The engine may have loaded another version, or the "
            f"published files are wrong; nothing was sampled from it")
    if weights_changed and previous_engine_logprobs == engine_logprobs:
        raise StaleWeightsError(
            f"the published weights changed, but the engine's probe did not change in a single bit: {means}; mean gap "
            f"{gap:.3g}. The engine still computes with the previous version: reload skipped, or an old folder loaded")
    return gap


# ---------------------------------------------------------------------------------------------------------------------
# Messages: 8 bytes of length, then JSON. Token ids and float log-probs survive JSON exactly; nothing can be executed.
# ---------------------------------------------------------------------------------------------------------------------
def _send(connection: socket.socket, message: dict) -> None:
    data = json.dumps(message).encode()
    connection.sendall(len(data).to_bytes(8, "little") + data)


def _receive(connection: socket.socket, deadline: float = math.inf) -> dict:
    """Next message. Raises EOFError at end of file and TimeoutError when time.monotonic() passes the deadline."""
    def exactly(size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            connection.settimeout(None if deadline == math.inf else max(1e-3, deadline - time.monotonic()))
            chunk = connection.recv(min(size - len(data), 1 << 20))
            if not chunk:
                raise EOFError("connection closed")
            data += chunk
        return bytes(data)
    return json.loads(exactly(int.from_bytes(exactly(8), "little")))


# ---------------------------------------------------------------------------------------------------------------------
# The trainer's side: a handle that starts, asks, watches, restarts and ends one child process
# ---------------------------------------------------------------------------------------------------------------------
class Engine:
    """One vLLM engine in a child process, owned by one rank, used by one thread.

    The constructor returns at once and the first use waits, so that the trainer can load its model meanwhile. On a GPU
    that both share, pass kv_cache_gb or use the engine once before the trainer allocates: otherwise vLLM sizes its KV
    cache by the free memory it sees while it starts, and the trainer's growing model falsifies that.

    Args:
        model_path: Hugging Face folder (or hub id): architecture, tokenizer's end-of-sequence ids, version-0 weights.
        max_model_len: longest prompt + completion, in tokens.
        dtype: the engine's compute type, "auto" | "float32" | "bfloat16".
        tensor_parallel_size, devices: how many GPUs share the engine, and which (local ranks; None: vLLM's choice).
        gpu_memory_utilization, kv_cache_gb: share of each GPU, or GB of KV cache instead (on CPU: kv_cache_gb, 0.25).
        max_num_seqs: sequences that are decoded together.
        enforce_eager: no CUDA graphs (always so on CPU, where there are none).
        log_file: takes the child's stdout and stderr.
        start_timeout, stall_timeout: seconds until ready; seconds without a new token or an answer.
        max_restarts: over the life of this handle.
        sleep_mode: allow sleep() (CUDA only; vLLM then allocates from a pool that can be unmapped).
        extra: further arguments for vllm.LLM; they win over ours.

    Every method raises EngineError when the engine cannot start, refuses the request, or died once too often.
    """

    def __init__(self, model_path: str, *, max_model_len: int, dtype: str = "auto", tensor_parallel_size: int = 1,
                 devices: list[int] | None = None, gpu_memory_utilization: float = 0.3, max_num_seqs: int = 256,
                 enforce_eager: bool = False, kv_cache_gb: float | None = None, seed: int = 0, log_file: str,
                 start_timeout: float = 900, stall_timeout: float = 600, max_restarts: int = 3,
                 sleep_mode: bool = False, extra: dict | None = None):
        import torch
        on_cpu = not torch.cuda.is_available()
        self._llm_arguments = dict(
            model=str(model_path), dtype=dtype, max_model_len=max_model_len, max_num_seqs=max_num_seqs, seed=seed,
            tensor_parallel_size=tensor_parallel_size, enforce_eager=enforce_eager or on_cpu,
            logprobs_mode="processed_logprobs")      # point 4 of the method; vLLM's default is the raw softmax
        # A folder without a tokenizer is fine: ids in, ids out, end-of-sequence ids from (generation_)config.json.
        # A tokenizer adds its own end-of-sequence id and makes stop strings possible.
        if Path(model_path).is_dir() and not list(Path(model_path).glob("token*.*")):
            self._llm_arguments["skip_tokenizer_init"] = True
        if on_cpu:
            kv_cache_gb = 0.25 if kv_cache_gb is None else kv_cache_gb
            # A prompt cut in two by the scheduler rewinds its seeded generator, which a CPU generator cannot do (vLLM
            # 0.32 dies with "CPU Generator does not use offset"): prompts are prefilled whole.
            self._llm_arguments.update(enable_chunked_prefill=False, max_num_batched_tokens=max(4096, max_model_len))
        else:
            self._llm_arguments.update(gpu_memory_utilization=gpu_memory_utilization, enable_sleep_mode=sleep_mode)
        if kv_cache_gb is not None:
            self._llm_arguments["kv_cache_memory_bytes"] = int(kv_cache_gb * 2**30)
        self._llm_arguments.update(extra or {})
        self._environment = _child_environment(model_path, tensor_parallel_size, devices, on_cpu)

        self.version, self._weights_folder = 0, None     # None: still on model_path's own weights
        self.restarts, self._has_answered, self._calls, self._generating = 0, False, 0, False
        self._can_sleep = sleep_mode and not on_cpu
        self.max_model_len, self.max_restarts = max_model_len, max_restarts
        self.start_timeout, self.stall_timeout = start_timeout, stall_timeout
        self.log_file = Path(log_file)
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        self._owner = os.getpid()
        self._start()
        atexit.register(self.close)

    # --- use ---------------------------------------------------------------------------------------------------------
    def generate(self, prompts: list[list[int]], *, n: int, seeds: list[list[int]], temperature: float, top_p: float,
                 min_p: float, max_tokens: int | list[int], stop: list[str] | None = None,
                 on_token_count: Callable[[int], None] | None = None) -> Iterator[tuple[int, list[Completion]]]:
        """Sample n completions of each prompt; yield (prompt_index, group of n in sample order) as groups finish.

        The engine goes on with the other groups while the caller works on this one. Leaving the loop early cancels the
        rest. If the engine dies, the missing samples are drawn again with their own seeds on the same weights: the same
        tokens, as far as the arithmetic does not depend on what else is in the batch (in fp32 on CPU it hardly does; in
        bf16 a near-tie may fall the other way, with log-probs to match).

        Args: prompts, (P, len) token ids; seeds, (P, n); max_tokens, one for all or one per prompt; stop, strings that
            end a completion and stay in it (needs a tokenizer in the model folder); on_token_count, told about once a
            second how many tokens have been sampled so far.
        Raises: ValueError if a prompt and its max_tokens exceed max_model_len, or if shapes do not fit.
        """
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
        if not len(prompts) == len(seeds) == len(limits) or any(len(row) != n for row in seeds):
            raise ValueError(f"{len(prompts)} prompts need as many max_tokens (got {len(limits)}) and seeds (got "
                             f"{len(seeds)} rows of {sorted({len(row) for row in seeds})}, n is {n})")
        for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            if not prompt or limit < 1 or len(prompt) + limit > self.max_model_len:
                raise ValueError(f"prompt {index} has {len(prompt)} tokens and max_tokens {limit}: both must be at "
                                 f"least 1, their sum at most max_model_len {self.max_model_len}; drop the prompt, "
                                 f"lower --max_completion_length, or raise the engine's max_model_len")

        sampling = dict(temperature=temperature, top_p=top_p, min_p=min_p, stop=stop)
        missing = dict.fromkeys((p, s) for p in range(len(prompts)) for s in range(n))       # an ordered set
        groups: dict[int, list[Completion]] = {p: [] for p in range(len(prompts))}           # the unfinished ones
        finished_tokens = 0
        try:
            while missing:
                try:
                    self._wait_until_ready()
                    call = self._ask(dict(
                        op="generate", sampling=sampling, prompts={p: prompts[p] for p, _ in missing},
                        samples=[(p, s, seeds[p][s], limits[p]) for p, s in missing]))
                    self._generating = True
                    before, tokens, last_progress = finished_tokens, 0, time.monotonic()
                    while missing:
                        answer = self._answer(call, last_progress + self.stall_timeout)
                        if answer.get("tokens", tokens) > tokens:     # a sign of life counts only with new tokens
                            tokens, last_progress = answer["tokens"], time.monotonic()
                            if on_token_count:
                                on_token_count(before + tokens)
                        if "completion" in answer:
                            completion, last_progress = Completion(**answer["completion"]), time.monotonic()
                            finished_tokens += len(completion.token_ids)
                            del missing[completion.prompt_index, completion.sample_index]
                            group = groups[completion.prompt_index]
                            group.append(completion)
                            if len(group) == n:
                                del groups[completion.prompt_index]   # the caller's now; nothing is kept here
                                yield completion.prompt_index, sorted(group, key=lambda c: c.sample_index)
                                last_progress = time.monotonic()      # the caller's own time is not a stall
                    self._generating = False
                except _EngineDied as death:
                    self._generating = False
                    self._restart(death)
        finally:
            if self._generating:     # the caller left the loop: stop sampling for nobody
                self._generating = False
                try:
                    self._ask(dict(op="cancel"))
                except _EngineDied:
                    pass             # the next call notices, and restarts

    def load_weights(self, folder: str, version: int) -> None:
        """Reload from a published folder (a new one each time: vLLM maps files, and a rewritten path served old
        weights, vllm#32718), drop the prefix cache (it holds keys and values of the old weights; vLLM does not do it by
        itself) and wake the engine if it sleeps. After a death the engine starts on the previous version and reloads.
        """
        from model import stored_tensors
        try:               # an engine dies of a damaged file, and each of its restarts would die of it again
            stored_tensors(folder)
        except (OSError, ValueError) as error:
            raise EngineError(f"load_weights: {folder} (version {version}) is not intact: {error}; was it published on "
                              f"this machine, and has anyone cleaned --sync_dir?") from error
        self._call(dict(op="load", folder=str(folder), version=version))
        self.version, self._weights_folder = version, str(folder)

    def score(self, token_ids: list[int]) -> list[float]:
        """log pi(y_t | y_<t) of token_ids[1:], (S-1,), under the unmodified softmax (temperature 1, no truncation)."""
        if not 2 <= len(token_ids) < self.max_model_len:
            raise ValueError(f"score: {len(token_ids)} tokens, need 2 to {self.max_model_len - 1} (max_model_len - 1)")
        return self._call(dict(op="score", token_ids=token_ids))["logprobs"]

    def sleep(self) -> None:
        """Give the GPU memory of weights and KV cache back (vLLM's sleep level 2); load_weights wakes the engine.

        On a CPU there is nothing to give back, and nothing happens."""
        if self._can_sleep:
            self._call(dict(op="sleep"))

    def close(self) -> None:
        """End the child. With tensor parallelism it is asked to leave first: vLLM then removes its shared memory."""
        atexit.unregister(self.close)
        if os.getpid() != self._owner:     # a forked child of the trainer must not end the trainer's engine
            return
        self._connection.close()           # the child reads an end of file
        try:
            self._process.wait(10 if self._llm_arguments["tensor_parallel_size"] > 1 else 0)
        except subprocess.TimeoutExpired:
            self._kill()

    @property
    def pid(self) -> int:
        """Process id of the child, which is also its process group and its session."""
        return self._process.pid

    # --- ask, and notice death ---------------------------------------------------------------------------------------
    def _ask(self, request: dict) -> int:
        """Send a request; returns the number that its answers carry. Raises _EngineDied."""
        if self._generating:
            raise EngineError("an iterator of generate() is still open: exhaust or close it before the next request")
        self._calls += 1
        try:
            self._connection.settimeout(self.stall_timeout)
            _send(self._connection, dict(request, call=self._calls))
        except OSError as error:       # broken pipe, or a child that does not read (TimeoutError is an OSError)
            raise _EngineDied(self._cause_of_death(error)) from error
        return self._calls

    def _answer(self, call: int, deadline: float) -> dict:
        """Next answer to this call; those to cancelled calls are dropped. Raises _EngineDied, or EngineError."""
        while True:
            try:
                answer = _receive(self._connection, deadline)
            except (OSError, EOFError) as error:
                raise _EngineDied(self._cause_of_death(error, starting=call == 0)) from error
            if answer["call"] == call:
                if "refused" in answer:
                    raise EngineError(f"the engine refused the request: {answer['refused']}")
                self._has_answered |= call > 0                   # 0 is "ready"
                return answer

    def _call(self, request: dict) -> dict:
        """One request, one answer, restarting as often as allowed."""
        while True:
            try:
                self._wait_until_ready()
                return self._answer(self._ask(request), time.monotonic() + self.stall_timeout)
            except _EngineDied as death:
                self._restart(death)

    def _cause_of_death(self, error: Exception, starting: bool = False) -> str:
        if isinstance(error, TimeoutError):
            if starting:
                return f"not ready after {self.start_timeout:.0f} s (--engine_start_timeout)"
            return f"no new token or answer for {self.stall_timeout:.0f} s (--engine_stall_timeout)"
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            return "it closed its connection but did not exit"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    # --- life of the child -------------------------------------------------------------------------------------------
    def _start(self) -> None:
        self._connection, theirs = socket.socketpair()
        self._ready, self._start_deadline = False, time.monotonic() + self.start_timeout
        with theirs, open(self.log_file, "ab") as log:
            self._log_start = log.tell()
            _send(self._connection, self._llm_arguments)         # fits the socket's buffer: never blocks
            self._process = subprocess.Popen(
                [sys.executable, "-P", os.path.abspath(__file__), "--serve", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment,
                pass_fds=[theirs.fileno()], start_new_session=True)      # its own group: killed as one

    def _wait_until_ready(self) -> None:
        """Wait for the child to come up; after a restart put it back on the last complete weights."""
        if self._ready:
            return
        self._answer(0, self._start_deadline)
        if self._weights_folder:
            call = self._ask(dict(op="load", folder=self._weights_folder, version=self.version))
            answer = self._answer(call, time.monotonic() + self.stall_timeout)
            if answer["version"] != self.version:
                raise StaleWeightsError(f"restarted engine holds version {answer['version']}, not {self.version}")
        self._ready = True

    def _restart(self, death: _EngineDied) -> None:
        self._kill()
        # A bad flag or model fails the same way each time, or is as slow: say so at once. An engine that has worked, or
        # that somebody else killed (a negative code), is worth another try.
        late = not self._ready and isinstance(death.__cause__, TimeoutError)
        if not self._has_answered and (self._process.returncode > 0 or late):
            raise EngineError(f"the engine could not start or answer its first request ({death}){self._log_tail()}")
        if self.restarts >= self.max_restarts:
            raise EngineError(f"the engine died ({death}) and its {self.max_restarts} restarts are used up "
                              f"(--max_engine_restarts){self._log_tail()}") from death
        self.restarts += 1
        print(f"rollout: engine {self.pid} died ({death}); restart {self.restarts} of {self.max_restarts} on weights "
              f"version {self.version}, log {self.log_file}", file=sys.stderr, flush=True)
        self._start()

    def _kill(self) -> None:
        """SIGKILL to the whole group. With tensor parallelism some MB of message buffers stay behind in /dev/shm."""
        if self._process.poll() is None:                  # once the child is gone, its guard ends the rest of its group
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(KILL_SECONDS)
        self._connection.close()

    def _log_tail(self) -> str:
        with open(self.log_file, "rb") as log:
            log.seek(self._log_start)
            lines = log.read()[-100_000:].decode(errors="replace").splitlines()
        return f"\n--- last lines of {self.log_file} ---\n" + "\n".join(lines[-LOG_TAIL_LINES:])


def _child_environment(model_path: str, tensor_parallel_size: int, devices: list[int] | None,
                       on_cpu: bool) -> dict[str, str]:
    """The trainer's environment without torchrun's variables (vLLM would join the trainer's process group)."""
    torchrun = re.compile(r"RANK$|WORLD_SIZE$|(LOCAL|GROUP|ROLE|MASTER|TORCHELASTIC|TORCH_NCCL|OMP|GOMP|KMP)_")
    environment = {key: value for key, value in os.environ.items() if not torchrun.match(key)}
    environment |= {
        "OMP_NUM_THREADS": "1",                     # it shares the cores with the trainer
        "OMP_WAIT_POLICY": "PASSIVE",               # idle threads sleep; spinning ones triple the time of a shared core
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if tensor_parallel_size == 1 else "1",   # 0: engine and child are one
        "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo",   # nothing beyond loopback
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if Path(model_path).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"         # everything is there: no reason to ask the network
    if on_cpu:
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1",
                        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}    # a function for our own workers: _renew_tied_head
    elif devices is not None:                       # local ranks count within what the trainer itself may see
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(max(devices) + 1)]
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[i] for i in devices)
    return environment


# ---------------------------------------------------------------------------------------------------------------------
# The child's side: python rollout.py --serve FD TRAINER_PID
# ---------------------------------------------------------------------------------------------------------------------
def _serve(descriptor: int, trainer_pid: int) -> None:
    """Build the engine, then answer one request after the other until the trainer closes the connection."""
    _fork_guard(descriptor, trainer_pid)
    connection = socket.socket(fileno=descriptor)
    try:
        arguments = _receive(connection)
        # Imports make a million objects and no garbage; looking for some again and again is a third of the start-up.
        gc.disable()
        from vllm import LLM
        from vllm.exceptions import VLLMValidationError
        gc.freeze()
        llm = LLM(**arguments)
        gc.enable()

        # A thread writes, so that a trainer busy with scoring does not stop the generation of the other groups.
        outbox: queue.SimpleQueue = queue.SimpleQueue()
        writer = threading.Thread(target=lambda: [_send(connection, message) for message in iter(outbox.get, None)],
                                  daemon=True)
        writer.start()
        outbox.put(dict(call=0))                                                 # ready
        version, asleep = 0, False
        while True:
            request = _receive(connection)
            op, answer = request["op"], dict(call=request["call"])
            try:
                if op == "generate":
                    _generate(llm, request, version, connection, outbox)
                    continue                     # it has sent its answers one by one
                elif op == "score":
                    answer["logprobs"] = _score(llm, request["token_ids"])
                elif op == "sleep":
                    llm.sleep(level=2)
                    asleep = True
                elif op == "load":
                    _reload(llm, request["folder"], asleep)
                    version, asleep = request["version"], False
                    answer["version"] = version
            except (ValueError, VLLMValidationError) as error:     # the request's fault; all else ends the engine
                answer["refused"] = str(error)
            outbox.put(answer)                   # for a cancel that came after the last sample, too: nobody waits
    except EOFError:
        pass                                     # the trainer is done with us
    except BaseException:  # noqa: BLE001  (it ends the process)
        traceback.print_exc()
        os._exit(1)                              # at once: vLLM's own teardown may hang, and the guard cleans up


def _fork_guard(descriptor: int, trainer_pid: int) -> None:
    """Fork a tiny process that waits until the trainer or the engine is gone and then kills the engine's process group.

    PR_SET_PDEATHSIG would do for one process. With tensor parallelism vLLM has children of its own, which outlive a
    killed engine; and a thread inside the engine dies with it. A process descriptor becomes readable when its process
    ends, in whatever way, and cannot be confused by a reused process id.

    An engine that somebody has stopped (SIGSTOP) is killed, too: the deadlines of the trainer would notice it, but that
    of the start is half an hour. Pauses are counted, not the clock, since a suspended job stops the guard as well.
    """
    engine_pid = os.getpid()
    if os.fork():
        return
    os.close(descriptor)                         # or the trainer would not see the end of file when the engine dies
    try:
        watched, pause, frozen = [os.pidfd_open(engine_pid), os.pidfd_open(trainer_pid)], FROZEN_SECONDS / 6, 0.0
        while frozen < FROZEN_SECONDS and not select.select(watched, [], [], pause)[0]:
            state = Path(f"/proc/{engine_pid}/stat").read_text().rpartition(")")[2].split()[0]
            frozen = frozen + pause if state == "T" else 0.0
        if frozen >= FROZEN_SECONDS:
            print(f"guard: the engine has been stopped (SIGSTOP) for {FROZEN_SECONDS} s; killing it", file=sys.stderr,
                  flush=True)
    finally:                                     # also if one of them was gone before we looked
        os.killpg(0, signal.SIGKILL)


def _generate(llm, request: dict, version: int, connection: socket.socket, outbox: queue.SimpleQueue) -> None:
    """Put all samples into vLLM's queue, step until they are finished, send each as soon as it is."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, call, stop = llm.llm_engine, request["call"], request["sampling"]["stop"]
    for prompt in request["prompts"].values():
        _check_vocabulary(llm, prompt)
    running, finished_tokens, last_report = {}, 0, time.monotonic()      # running: request id -> (prompt, sample)
    try:
        for prompt_index, sample_index, seed, max_tokens in request["samples"]:
            request_id = f"{call}/{prompt_index}/{sample_index}"
            engine.add_request(
                request_id, {"prompt_token_ids": request["prompts"][str(prompt_index)]},     # JSON keys are strings
                SamplingParams(**request["sampling"], seed=seed, max_tokens=max_tokens,
                               logprobs=0, flat_logprobs=True,                  # the sampled token's only, no objects
                               detokenize=bool(stop), include_stop_str_in_output=bool(stop),
                               output_kind=RequestOutputKind.FINAL_ONLY))
            running[request_id] = prompt_index, sample_index
        while running:
            for output in engine.step():
                if not output.finished:
                    continue
                sample, (prompt_index, sample_index) = output.outputs[0], running.pop(output.request_id)
                finished_tokens += len(sample.token_ids)
                outbox.put(dict(call=call, completion=dict(
                    prompt_index=prompt_index, sample_index=sample_index, token_ids=list(sample.token_ids),
                    logprobs=list(sample.logprobs.logprobs), finish_reason=sample.finish_reason, version=version)))
            if time.monotonic() - last_report >= 1:
                states = engine.output_processor.request_states.values()
                tokens = finished_tokens + sum(state.detokenizer.num_output_tokens() for state in states)
                outbox.put(dict(call=call, tokens=tokens))
                last_report = time.monotonic()
            # While a sample is missing the trainer speaks only to cancel; after the last one it may ask the next thing.
            if running and select.select([connection], [], [], 0)[0]:
                assert _receive(connection)["op"] == "cancel"
                break
    finally:                                     # cancelled, or one request was refused: the others must not go on
        engine.abort_request(list(running))


def _check_vocabulary(llm, token_ids: list[int]) -> None:
    """Without a tokenizer vLLM does not look; the embedding would then fail, or read foreign memory on a GPU."""
    size = llm.llm_engine.model_config.get_vocab_size()
    if not all(0 <= token < size for token in token_ids):
        raise ValueError(f"token ids {min(token_ids)} to {max(token_ids)} are outside the vocabulary of {size}")


def _score(llm, token_ids: list[int]) -> list[float]:
    """Prompt log-probs are those of the plain softmax, whatever the sampling settings; position 0 has none."""
    from vllm import SamplingParams
    _check_vocabulary(llm, token_ids)
    output, = llm.generate([{"prompt_token_ids": token_ids}], use_tqdm=False, sampling_params=SamplingParams(
        max_tokens=1, prompt_logprobs=0, detokenize=False))
    return [position[token].logprob
            for token, position in zip(token_ids[1:], output.prompt_logprobs[1:], strict=True)]


def _reload(llm, folder: str | None, asleep: bool) -> None:
    """Weights from `folder` (None: the model folder), then an empty prefix cache."""
    if asleep:
        llm.wake_up(tags=["weights"])            # memory for the weights only: the KV cache comes back after the reload
    llm.collective_rpc("reload_weights", kwargs={"weights_path": folder} if folder else {})
    if llm.llm_engine.vllm_config.device_config.device_type == "cpu":
        llm.collective_rpc(_renew_tied_head)
    if asleep:
        llm.wake_up(tags=["kv_cache"])
    if not llm.reset_prefix_cache():             # returns False, without an exception, if a block is still in use
        raise RuntimeError(f"vLLM did not reset its prefix cache after loading {folder}: old keys and values remain")


def _renew_tied_head(worker) -> None:
    """vLLM's CPU backend multiplies with a packed copy of the head. A reload renews the embedding but, where the head
    is tied to it, not that copy: log-probs were off by 0.3 after a reload, and only the probe noticed (vLLM 0.32)."""
    model = worker.get_model()
    if model.config.tie_word_embeddings:
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


if __name__ == "__main__":                       # vLLM spawns workers that import this file: nothing may run on import
    if len(sys.argv) != 4 or sys.argv[1] != "--serve":
        sys.exit("rollout.py is a library; train_grpo.py and evaluate.py run it as `rollout.py --serve FD TRAINER_PID`")
    _serve(int(sys.argv[2]), int(sys.argv[3]))
