"""rollout.py with real vLLM: right log-probs, right weights, no sample lost when a process dies."""

import copy
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, start_fork, tiny_model, wait_for

import rollout
from data import collate
from model import RankFailure, load_policy, setup_distributed
from rollout import (
    Completion, Engine, EngineError, EngineLayout, StaleWeightsError, check_probe, completion_text,
    engine_layout, sampling_seed)

PROMPTS = [[5 + (7 * p + i) % 300 for i in range(3 + p)] for p in range(8)]
PROBE = [5 + (11 * i) % 300 for i in range(60)]
EOS = 1  # tiny_model's end-of-sequence id
FREE = dict(temperature=1.0, top_p=1.0, min_p=0.0)


def seeds(n, step=0):
    return [[sampling_seed(step, p, s) for s in range(n)] for p in range(len(PROMPTS))]


def processed_logprobs(model, prompt, completion, temperature, top_p, min_p, vocab_size=None):
    """Reference: log q(y_t) by transformers; temperature, then min_p, then top_p, renormalised."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1:-1].double() / temperature  # (completion, V)
    if vocab_size:
        logits[:, vocab_size:] = -torch.inf
    probs = logits.softmax(-1)
    probs = torch.where(probs < min_p * probs.amax(-1, keepdim=True), 0, probs)
    probs = probs / probs.sum(-1, keepdim=True)
    ordered, order = probs.sort(-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # the smallest set whose mass reaches top_p
    probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    probs = probs / probs.sum(-1, keepdim=True)
    return probs.log().gather(-1, ids[0, len(prompt):, None])[:, 0]


def living(group):
    """Ids of the processes of a process group that are not zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it ended while we looked
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def assert_gone(group, seconds=20):
    deadline = time.monotonic() + seconds
    while living(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not living(group)


def stop_and_shorten_deadline(engine):
    """SIGSTOP, and a deadline of one second for this process, but not for the next."""
    os.kill(engine.pid, signal.SIGSTOP)
    descriptor = socket.socket(fileno=os.dup(engine.connection.fileno()))
    for direction in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        descriptor.setsockopt(socket.SOL_SOCKET, direction, struct.pack("ll", 1, 0))
    descriptor.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models of one architecture, (folder, model): b has other weights, c moved one."""
    folder = tmp_path_factory.mktemp("models")
    made = {name: (str(folder / name), tiny_model(folder / name, hidden_size=128, seed=seed))
            for name, seed in (("a", 0), ("b", 1), ("c", 0))}
    with torch.no_grad():
        made["c"][1].lm_head.weight[PROBE[1], 0] += 1e-5
    made["c"][1].save_pretrained(made["c"][0])
    return made


@pytest.fixture(scope="module")
def shared_engine(models, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "engine.log"
    engine = Engine(models["a"][0], max_model_len=512, dtype="float32", max_restarts=9,
                    log_file=log, request_timeout=120)
    yield engine
    engine.close()
    assert_gone(engine.pid)


@pytest.fixture
def engine(shared_engine, models):
    """The shared engine, on the weights of model a, as version 0."""
    shared_engine.load_weights(models["a"][0], 0)
    return shared_engine


def trainer_logprobs(model, token_ids):
    return processed_logprobs(model, token_ids[:1], token_ids[1:], **FREE).tolist()


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sampling", [
    FREE,
    dict(temperature=0.7, top_p=1.0, min_p=0.0),
    dict(temperature=1.0, top_p=0.9, min_p=0.0),
    dict(temperature=1.0, top_p=1.0, min_p=0.1),
    dict(temperature=1.3, top_p=0.8, min_p=0.05),
], ids=str)
def test_logprobs_are_those_of_the_sampled_distribution(engine, models, sampling):
    groups = dict(engine.generate(PROMPTS, n=2, seeds=seeds(2), max_tokens=60, **sampling))
    assert sorted(groups) == list(range(len(PROMPTS)))
    differences = []
    for p, group in groups.items():
        for s, c in enumerate(group):
            assert (c.prompt_index, c.sample_index, c.version) == (p, s, 0)
            assert len(c.token_ids) == len(c.logprobs) > 0
            expected = processed_logprobs(models["a"][1], PROMPTS[p], c.token_ids, **sampling)
            differences.append((torch.tensor(c.logprobs) - expected).abs())
    # A candidate within fp32 rounding of a threshold may fall on either side: 1 token in some 900.
    assert (torch.cat(differences) > 1e-4).float().mean() < 0.01


def test_score_is_the_plain_softmax(engine, models):
    expected = torch.tensor(trainer_logprobs(models["a"][1], PROBE))
    assert torch.allclose(torch.tensor(engine.score(PROBE)), expected.float(), atol=1e-4)
    assert engine.score(PROBE) == engine.score(PROBE)


def test_seeds_decide_alone(engine):
    """The same seeds give the same samples whatever else is in the batch."""
    together = dict(engine.generate(PROMPTS, n=4, seeds=seeds(4), max_tokens=60, **FREE))
    alone = dict(engine.generate(PROMPTS[:1], n=4, seeds=seeds(4)[:1], max_tokens=60, **FREE))
    other = dict(engine.generate(PROMPTS, n=4, seeds=seeds(4, step=1), max_tokens=60, **FREE))
    assert [c.token_ids for c in alone[0]] == [c.token_ids for c in together[0]]
    for p in together:
        assert all(together[p][s].token_ids != other[p][s].token_ids for s in range(4))
    assert len({tuple(c.token_ids) for c in together[0]}) == 4


def test_stop_token_is_the_last_id_and_max_tokens_is_per_prompt(engine):
    limits = [10 * (p + 1) for p in range(len(PROMPTS))]
    reasons = set()
    for p, group in engine.generate(PROMPTS, n=24, seeds=seeds(24), max_tokens=limits, **FREE):
        for c in group:
            reasons.add(c.finish_reason)
            assert EOS not in c.token_ids[:-1]
            assert (c.token_ids[-1] == EOS) == (c.finish_reason == "stop")
            assert len(c.token_ids) <= limits[p]
            assert len(c.token_ids) == limits[p] or c.finish_reason == "stop"
    assert reasons == {"stop", "length"}


def test_the_templates_stop_token_ends_an_answer_as_well(engine, monkeypatch):
    monkeypatch.setattr(engine, "stop_token_ids", [7])
    groups = dict(engine.generate(PROMPTS, n=24, seeds=seeds(24), max_tokens=60, **FREE))
    answers = [c for group in groups.values() for c in group]
    assert {c.token_ids[-1] for c in answers if c.finish_reason == "stop"} == {7, EOS}
    assert not any(7 in c.token_ids[:-1] for c in answers)


def test_groups_stream_while_the_others_are_sampled(engine):
    """The short group arrives while the long ones run on; an abandoned iterator costs a restart."""
    limits = [400] * (len(PROMPTS) - 1) + [2]
    ask = dict(n=8, seeds=seeds(8), max_tokens=limits, **FREE)
    stream = engine.generate(PROMPTS, **ask)
    first = time.monotonic()
    assert next(stream)[0] == len(PROMPTS) - 1
    first = time.monotonic() - first
    rest = time.monotonic()
    everything = dict(stream)
    rest = time.monotonic() - rest
    assert len(everything) == len(PROMPTS) - 1 and first < rest

    next(engine.generate(PROMPTS, **ask))
    old_pid, restarts = engine.pid, engine.restarts
    again = dict(engine.generate(PROMPTS, **ask))
    assert engine.pid != old_pid and engine.restarts == restarts  # no death, nothing to count
    assert_gone(old_pid)
    del again[len(PROMPTS) - 1]
    assert same_samples(everything, again)

    only = engine.generate([[5]], n=1, seeds=[[0]], max_tokens=1, **FREE)
    next(only)  # its last group: nothing is left to abandon
    pid = engine.pid
    engine.score(PROBE)
    assert engine.pid == pid


def test_impossible_requests_are_refused_and_the_engine_lives(engine):
    restarts = engine.restarts
    with pytest.raises(ValueError, match="max_model_len 512"):
        list(engine.generate([[5] * 500], n=1, seeds=[[0]], max_tokens=20, **FREE))
    with pytest.raises(EngineError, match="vocabulary of 336"):
        list(engine.generate([[5, 336]], n=1, seeds=[[0]], max_tokens=20, **FREE))
    with pytest.raises(EngineError, match="vocabulary of 336"):
        engine.score([5, 100_000])
    with pytest.raises(EngineError, match="top_p"):
        list(engine.generate([[5]], n=1, seeds=[[0]], max_tokens=20, **(FREE | {"top_p": 1.5})))
    with pytest.raises(EngineError, match="not intact.*safetensors"):
        engine.load_weights("/nowhere", 1)
    engine.score(PROBE)
    assert engine.restarts == restarts


# --------------------------------------------------------------------------------------------------
# Weight sync
# --------------------------------------------------------------------------------------------------
def test_reload_brings_the_new_weights_and_forgets_the_old_prefixes(engine, models):
    """A long shared prompt fills the prefix cache first: keys of the old weights would show."""
    prompts = [PROBE * 6] * 2
    ask = dict(n=2, seeds=[[1, 2], [3, 4]], max_tokens=20, **FREE)
    before = dict(engine.generate(prompts, **ask))
    engine.load_weights(models["b"][0], 7)
    after = dict(engine.generate(prompts, **ask))
    assert engine.version == 7
    for p in before:
        for old, new in zip(before[p], after[p], strict=True):
            assert (old.version, new.version) == (0, 7) and old.token_ids != new.token_ids
            expected = processed_logprobs(models["b"][1], prompts[p], new.token_ids, **FREE)
            assert (torch.tensor(new.logprobs) - expected).abs().max() < 1e-4


def test_probe_catches_stale_and_wrong_weights(engine, models):
    tolerance = rollout.PROBE_TOLERANCE["float32"]
    a, b, c = (trainer_logprobs(models[name][1], PROBE) for name in "abc")
    at_a = engine.score(PROBE)
    assert check_probe(at_a, a, tolerance) < 1e-4

    with pytest.raises(StaleWeightsError, match="same weights.*tolerance"):  # skipped reload
        check_probe(engine.score(PROBE), b, tolerance, at_a)
    engine.load_weights(models["b"][0], 1)
    at_b = engine.score(PROBE)
    assert check_probe(at_b, b, tolerance, at_a) < 1e-4
    engine.load_weights(models["a"][0], 2)  # an old folder under a new number
    with pytest.raises(StaleWeightsError, match="same weights"):
        check_probe(engine.score(PROBE), b, tolerance, at_b)

    # A tiny step: within the tolerance of the old weights, so only the missing change shows.
    assert check_probe(engine.score(PROBE), c, tolerance, at_b) < tolerance
    with pytest.raises(StaleWeightsError, match="single bit"):
        check_probe(engine.score(PROBE), c, tolerance, at_a)
    engine.load_weights(models["c"][0], 3)
    assert check_probe(engine.score(PROBE), c, tolerance, at_a) < tolerance


def test_check_probe_on_numbers():
    assert check_probe([-1.0, -2.0], [-1.5, -2.25], 0.5, [-9.0, -9.0]) == 0.375
    assert check_probe([-1.0], [-1.0], 1e-3) == 0  # unchanged weights: nothing has to move
    with pytest.raises(StaleWeightsError, match="same weights"):  # gaps do not cancel
        check_probe([-1.0, -2.0], [-2.0, -1.0], 0.5)
    with pytest.raises(StaleWeightsError, match="nan"):
        check_probe([float("nan"), -1.0], [-1.0, -1.0], 1e-3)
    with pytest.raises(StaleWeightsError, match="-1.000000 in the engine, -1.500000 in the tr"):
        check_probe([-1.0], [-1.5], 1e-3)
    with pytest.raises(ValueError):
        check_probe([-1.0], [-1.0, -1.0], 1e-3)
    # bf16 on both sides: measured on sound models, and with other weights
    tolerance = rollout.PROBE_TOLERANCE["bfloat16"]
    assert check_probe([-1.0, -1.0], [-1.031, -1.046], tolerance)
    with pytest.raises(StaleWeightsError, match="--probe_tolerance"):
        check_probe([-1.0, -1.0], [-1.58, -2.1], tolerance)


@pytest.fixture
def policy(models):
    ctx = setup_distributed()
    yield ctx, load_policy(models["b"][0], ctx)
    torch.distributed.destroy_process_group()


def test_sync_publishes_loads_proves_and_removes(engine, models, policy, tmp_path, monkeypatch):
    """The trainer's own writer, vLLM's own reader; a stale engine is caught, old folders go."""
    ctx, model = policy
    batch = collate([{"ids": np.array(PROBE)}], columns=())
    probe = {"token_ids": PROBE, "batch": batch, "tolerance": rollout.PROBE_TOLERANCE["float32"]}
    left_by_a_killed_run = rollout.clean_sync_folder(tmp_path / "sync", tmp_path / "run", ctx)
    with left_by_a_killed_run as folder:
        (folder / "version-000007.tmp").mkdir(parents=True)
        monkeypatch.setattr(ctx, "local_rank", 1)  # nobody cleans up
    monkeypatch.undo()
    assert folder.exists()

    def sync(last, version):
        return rollout.sync_weights(model, engine, ctx, folder, version, probe, last)

    def step(size):
        with torch.no_grad():
            for parameter in model.parameters():
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                local.add_(size * torch.randn_like(local))

    with rollout.clean_sync_folder(tmp_path / "sync", tmp_path / "run", ctx) as same:
        assert same == folder and not folder.exists()
        synced = sync(None, 1)
        assert synced["gap"] < 1e-4 and engine.version == 1
        expected = torch.tensor(trainer_logprobs(models["b"][1], PROBE))
        assert torch.allclose(torch.tensor(synced["engine_logprobs"]), expected.float(), atol=1e-4)
        (folder / "version-000002.tmp").mkdir()
        unchanged = sync(synced, 2)  # learning rate 0
        assert unchanged["fingerprint"] == synced["fingerprint"]
        assert unchanged["engine_logprobs"] == synced["engine_logprobs"]
        assert [path.name for path in folder.iterdir()] == ["version-000002"]

        for size, complaint in ((1e-5, "single bit"), (1e-2, "same weights")):
            step(size)
            with monkeypatch.context() as patch:
                patch.setattr(engine, "load_weights", lambda folder, version: None)
                with pytest.raises(RankFailure, match=complaint):
                    sync(unchanged, 3)
            moved = sync(unchanged, 4)
            assert moved["gap"] < 1e-4 and moved["fingerprint"] != unchanged["fingerprint"]
        engine.score(PROBE)
        assert [path.name for path in folder.iterdir()] == ["version-000004"]
        small = SimpleNamespace(free=1000)
        monkeypatch.setattr(rollout.shutil, "disk_usage", lambda path: small)
        with pytest.raises(RankFailure, match=r"--sync_dir: .*version 5 needs 0\.00 GB and 0\.00"):
            sync(moved, 5)
    assert not folder.exists()


@pytest.mark.parametrize("damage, reason", [
    (lambda file: file.write_bytes(file.read_bytes()[:-5000]), "Error"),
    (Path.unlink, "No such file"),
    (lambda file: shutil.rmtree(file.parent), "No such file"),
    (lambda file: (file.parent / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "gone.safetensors"}}'), "gone.safetensors"),
])
def test_damaged_weights_are_refused_before_the_engine_sees_them(models, tmp_path, damage, reason):
    shutil.copytree(models["a"][0], tmp_path / "model")
    rollout.check_files(tmp_path / "model")
    damage(tmp_path / "model" / "model.safetensors")
    with pytest.raises(EngineError, match=f"not intact: .*{reason}.*--sync_dir"):
        rollout.check_files(tmp_path / "model")


# --------------------------------------------------------------------------------------------------
# Death of an engine
# --------------------------------------------------------------------------------------------------
def same_samples(one, other):
    assert sorted(one) == sorted(other)
    for p in one:
        for a, b in zip(one[p], other[p], strict=True):
            assert (a.token_ids, a.finish_reason, a.version) == (
                b.token_ids, b.finish_reason, b.version)
            assert max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)) < 1e-4
    return True


def test_kill_during_generation_loses_no_sample(engine, models):
    """kill -9 after the first group: a new process draws the others, from the same weights."""
    engine.load_weights(models["b"][0], 5)
    ask = dict(n=4, seeds=seeds(4), max_tokens=[300] * (len(PROMPTS) - 1) + [2], **FREE)
    undisturbed = dict(engine.generate(PROMPTS, **ask))
    restarts, old_pid, disturbed = engine.restarts, engine.pid, {}
    for p, group in engine.generate(PROMPTS, **ask):
        if not disturbed:
            os.kill(old_pid, signal.SIGKILL)
        assert p not in disturbed
        disturbed[p] = group
    assert engine.restarts == restarts + 1 and engine.pid != old_pid
    assert same_samples(undisturbed, disturbed)
    assert_gone(old_pid)


def test_restart_limit_and_an_engine_that_does_not_read(engine, models, monkeypatch):
    """Stopped before a request larger than the socket's buffer: an error at the limit."""
    restarts, stopped = engine.restarts, engine.pid
    monkeypatch.setattr(engine, "max_restarts", restarts)
    stop_and_shorten_deadline(engine)
    many = dict(prompts=[PROBE * 8] * 300, n=1, seeds=[[0]] * 300, max_tokens=1, **FREE)
    with pytest.raises(EngineError, match=r"(?s)no answer.*last lines of .*engine\.log.*prefix"):
        list(engine.generate(**many))
    assert_gone(stopped)
    monkeypatch.undo()
    engine.load_weights(models["b"][0], 9)  # of a dead engine
    assert engine.version == 9 and engine.restarts == restarts + 1
    expected = trainer_logprobs(models["b"][1], PROBE)
    assert check_probe(engine.score(PROBE), expected, 1e-3) < 1e-4
    assert len(list(engine.generate(**many))) == 300


def test_silent_start_tied_head_and_padded_vocabulary(demo, tokenizer, tmp_path):
    """A second engine, on a tied model with a tokenizer and 15 ids that decode to nothing."""
    tied = [tiny_model(tmp_path / f"tied-{seed}", tie=True, hidden_size=128, seed=seed,
                       vocab_size=352) for seed in range(3)]
    for file in (demo / "base").glob("token*"):
        shutil.copy(file, tmp_path / "tied-0")
    ids = len(tokenizer)
    engine = Engine(tmp_path / "tied-0", max_model_len=256, dtype="float32",
                    log_file=tmp_path / "log", vocab_size=ids, request_timeout=120)
    try:
        stopped = engine.pid
        stop_and_shorten_deadline(engine)
        previous = engine.score(PROBE)
        assert engine.restarts == 1
        assert_gone(stopped)

        # Ids beyond the tokenizer never occur.
        prompt = tokenizer("3 + 4 = ")["input_ids"]
        sampling = dict(temperature=1.0, top_p=1.0, min_p=0.01)
        ask = dict(n=32, seeds=[list(range(32))], max_tokens=100, **sampling)
        (_, free), = engine.generate([prompt], **ask)
        differences = []
        for c in free:
            assert max(c.token_ids) < ids
            expected = processed_logprobs(
                tied[0], prompt, c.token_ids, vocab_size=ids, **sampling)
            differences.append((torch.tensor(c.logprobs) - expected).abs())
        assert (torch.cat(differences) > 1e-4).float().mean() < 0.01

        # One matrix is embedding and head: both are renewed, and again by the next reload.
        for version in (1, 2):
            engine.load_weights(tmp_path / f"tied-{version}", version)
            scored = engine.score(PROBE)
            expected = trainer_logprobs(tied[version], PROBE)
            assert check_probe(scored, expected, 1e-3, previous) < 1e-4
            previous = scored
        engine.sleep()  # on a CPU it does nothing
    finally:
        engine.close()


@pytest.fixture
def temporary():
    """A folder for the temporary files of engines; its path is short, since sockets are in it."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        assert not list(Path(folder).iterdir())


def test_tensor_parallelism_reloads_exactly_heals_and_leaves_no_process(
        tmp_path, temporary, monkeypatch):
    """Two workers of vLLM's CPU build: the path with several processes per engine."""
    monkeypatch.setenv("TMPDIR", str(temporary))
    tied = [tiny_model(tmp_path / f"tied-{seed}", tie=True, hidden_size=128, seed=seed)
            for seed in range(2)]
    ask = dict(n=3, seeds=seeds(3), max_tokens=24, temperature=1.0, top_p=0.9, min_p=0.05)
    engine = Engine(tmp_path / "tied-0", max_model_len=128, dtype="float32",
                    tensor_parallel_size=2, log_file=tmp_path / "log", request_timeout=120)
    try:
        assert check_probe(engine.score(PROBE), trainer_logprobs(tied[0], PROBE), 1e-3) < 1e-4
        engine.load_weights(tmp_path / "tied-1", 1)
        expected = trainer_logprobs(tied[1], PROBE)
        assert check_probe(engine.score(PROBE), expected, 1e-3) < 1e-4
        samples = dict(engine.generate(PROMPTS, **ask))

        first, group = engine.pid, living(engine.pid)
        workers = [pid for pid in group if "Worker" in Path(f"/proc/{pid}/comm").read_text()]
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        assert same_samples(samples, dict(engine.generate(PROMPTS, **ask)))
        assert engine.restarts == 1
        assert check_probe(engine.score(PROBE), expected, 1e-3) < 1e-4
        assert_gone(first)
        os.kill(engine.pid, signal.SIGKILL)
        assert_gone(engine.pid)  # EngineCore and workers, too
    finally:
        engine.close()


def test_what_cannot_work_says_why_at_once(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model(tmp_path / "head_dim_16")
    mistakes = {"/nowhere/model": "/nowhere/model",
                "head_dim_16": "head_dim=16"}  # it loads; the first forward fails
    engines = {reason: Engine(model, max_model_len=64, log_file=tmp_path / reason[-5:])
               for model, reason in mistakes.items()}
    for reason, engine in engines.items():
        with pytest.raises(EngineError, match=rf"(?s)cannot start.*exit code 1.*last.*{reason}"):
            engine.score(PROBE[:8])
        assert engine.restarts == 0
        engine.close()
        assert_gone(engine.pid)


def test_more_padding_than_vllm_can_forbid_is_refused():
    config = SimpleNamespace(get_vocab_size=lambda: 5000)
    llm = SimpleNamespace(llm_engine=SimpleNamespace(model_config=config))
    assert rollout.padding_bias(llm, 4998) == {4998: -100.0, 4999: -100.0}
    assert rollout.padding_bias(llm, None) is rollout.padding_bias(llm, 5001) is None
    with pytest.raises(ValueError, match="4000 ids beyond the tokenizer's 1000.*1,024"):
        rollout.padding_bias(llm, 1000)


def test_a_score_of_other_tokens_is_asked_for_again(monkeypatch):
    """vllm#44106: now and then the second model runner returns log-probs of other tokens."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **_: None))
    wrong, right = ([None, {token: SimpleNamespace(logprob=-1.5)}] for token in (7, 6))
    answers = [wrong, wrong, right, wrong, wrong, wrong]
    config = SimpleNamespace(get_vocab_size=lambda: 10)
    llm = SimpleNamespace(
        llm_engine=SimpleNamespace(model_config=config),
        generate=lambda *_, **__: [SimpleNamespace(prompt_logprobs=answers.pop(0))])
    assert rollout.score(llm, [5, 6]) == [-1.5]
    with pytest.raises(RuntimeError, match="three times"):
        rollout.score(llm, [5, 6])


# --------------------------------------------------------------------------------------------------
# Death of the trainer
# --------------------------------------------------------------------------------------------------
TRAINER = """
import sys, time
from rollout import Engine
engine = Engine(sys.argv[1], max_model_len=2000, dtype="float32", log_file=sys.argv[2])
print(engine.pid, flush=True)
if sys.argv[3] == "generating":
    for _ in engine.generate([[5, 6]] * 65, n=1, seeds=[[i] for i in range(65)], temperature=1.0,
                             top_p=1.0, min_p=0.0, max_tokens=[1] + [1900] * 64):
        print("sampling", flush=True)
        time.sleep(600)
elif sys.argv[3] == "error":
    raise RuntimeError("the trainer failed")
time.sleep(600)
"""


@pytest.mark.parametrize("state, end", [
    ("starting", signal.SIGKILL), ("generating", signal.SIGKILL), ("hung", signal.SIGKILL),
    ("starting", signal.SIGTERM), ("error", None)])
def test_no_engine_survives_the_trainer(models, tmp_path, temporary, state, end):
    script, said = tmp_path / "trainer.py", tmp_path / "said"
    script.write_text(TRAINER)
    trainer = start_fork(
        script, [models["a"][0], tmp_path / "log", state], [said, tmp_path / "errors"],
        TMPDIR=temporary)
    try:
        wait_for(lambda: said.exists() and said.read_text().endswith("\n"))
        group = int(said.read_text().split()[0])
        assert living(group) or state == "error"
        if state == "generating":
            wait_for(lambda: said.read_text().endswith("sampling\n"))
        if state == "hung":
            wait_for(lambda: len(living(group)) >= 2)  # until the guard is there
            os.kill(group, signal.SIGSTOP)
        if end:
            os.kill(trainer.pid, end)
        trainer.join(60)
        assert trainer.exitcode
        assert_gone(group)
    finally:
        trainer.kill()
        trainer.join()


def test_child_environment_is_free_of_torchrun(monkeypatch):
    unwanted = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID",
                "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "VLLM_PORT"}
    for name in (*unwanted, "OMP_NUM_THREADS", "VLLM_WORKER_MULTIPROC_METHOD"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setenv("RANKING", "kept")
    environment = rollout.child_environment("/nowhere", 2, [2, 3], on_cpu=False)
    assert not unwanted & set(environment)
    expected = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "6,7", "RANKING": "kept",
                "PATH": os.environ["PATH"], "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
                "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_HOST_IP": "127.0.0.1"}
    assert expected.items() <= environment.items()


# --------------------------------------------------------------------------------------------------
# Seeds and layout
# --------------------------------------------------------------------------------------------------
def test_sampling_seed_is_stable_and_distinct():
    places = ((1, 3, 4), (1, "aime-3", 4))
    code = f"from rollout import sampling_seed; print(*(sampling_seed(*p) for p in {places}))"
    other_process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": "5"})
    assert other_process.stdout.split() == [str(sampling_seed(*place)) for place in places]
    many = {sampling_seed(a, b, c) for a in range(4) for b in range(200) for c in range(8)}
    assert len(many) > 6390 and all(0 <= seed < 2**31 for seed in many)
    assert sampling_seed(1, 11, 1) != sampling_seed(11, 1, 1) != sampling_seed(1, 1, 11)


def test_engine_layout():
    two_nodes = [engine_layout(rank, rank % 8, 16, 8, 4) for rank in range(16)]
    owners = [layout for layout in two_nodes if layout.owns_engine]
    assert [layout.index for layout in owners] == [0, 1, 2, 3]
    assert {layout.count for layout in two_nodes} == {4}
    assert [layout.devices for layout in owners] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    assert two_nodes[13] == EngineLayout(False, index=3, count=4, devices=[4, 5, 6, 7])
    assert engine_layout(0, 0, 1, 1, 1) == EngineLayout(True, index=0, count=1, devices=[0])
    with pytest.raises(ValueError, match=r"--tensor_parallel_size 3.*the 8 ranks"):
        engine_layout(0, 0, 8, 8, 3)


def test_the_graded_text_is_what_was_sampled_but_for_the_stop_token(tokenizer):
    """</think> is a special token of some tokenizers; a text without it earns no format reward."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]})
    answer = "7+1=8\n</think>\nSo \\boxed{8}."
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert "</think>" not in tokenizer.decode(ids, skip_special_tokens=True)
    stopped = Completion(0, 0, [*ids, tokenizer.eos_token_id], [], "stop", 0)
    assert completion_text(tokenizer, stopped) == answer
    assert completion_text(tokenizer, Completion(0, 0, ids, [], "length", 0)) == answer
