"""rollout.py with real vLLM engines: right log-probs, right weights, and no sample lost when a process dies."""

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_model, wait_for

import model as policy_code
import rollout
from rollout import Engine, EngineError, StaleWeightsError, check_probe, engine_layout, sampling_seed

PROMPTS = [[5 + (7 * p + i) % 300 for i in range(3 + p)] for p in range(8)]
PROBE = [5 + (11 * i) % 300 for i in range(60)]
EOS = 1                                   # tiny_model's end-of-sequence id
FREE = dict(temperature=1.0, top_p=1.0, min_p=0.0)


def seeds(n, step=0):
    return [[sampling_seed(0, step, p, s) for s in range(n)] for p in range(len(PROMPTS))]


def processed_logprobs(model, prompt, completion, temperature, top_p, min_p):
    """Reference: log q(y_t) from transformers' forward; temperature, then min_p, then top_p, renormalised."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1:-1].double() / temperature           # (completion, V)
    probs = logits.softmax(-1)
    probs = torch.where(probs < min_p * probs.amax(-1, keepdim=True), 0, probs)
    probs = probs / probs.sum(-1, keepdim=True)
    ordered, order = probs.sort(-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered >= top_p] = 0              # keep the smallest set whose mass reaches top_p
    probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    return (probs / probs.sum(-1, keepdim=True)).log().gather(-1, ids[0, len(prompt):, None])[:, 0]


def living(group):
    """Ids of the processes of a process group that are not zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:                   # it ended while we looked
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def assert_gone(group, seconds=20):
    deadline = time.monotonic() + seconds
    while living(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not living(group)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models of one architecture (folder, transformers model): b with other weights, c with one moved."""
    folder = tmp_path_factory.mktemp("models")
    made = {name: (str(folder / name), tiny_model(folder / name, hidden_size=128, seed=seed))
            for name, seed in (("a", 0), ("b", 1), ("c", 0))}
    with torch.no_grad():
        made["c"][1].lm_head.weight[PROBE[1], 0] += 1e-5
    made["c"][1].save_pretrained(made["c"][0])
    return made


@pytest.fixture(scope="module")
def shared_engine(models, tmp_path_factory):
    engine = Engine(models["a"][0], max_model_len=512, dtype="float32", max_restarts=4, kv_cache_gb=0.1,
                    log_file=tmp_path_factory.mktemp("log") / "engine.log", start_timeout=300, stall_timeout=120)
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


# ---------------------------------------------------------------------------------------------------------------------
# Sampling
# ---------------------------------------------------------------------------------------------------------------------
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
        assert [(c.prompt_index, c.sample_index, c.version) for c in group] == [(p, 0, 0), (p, 1, 0)]
        for c in group:
            assert len(c.token_ids) == len(c.logprobs) > 0
            expected = processed_logprobs(models["a"][1], PROMPTS[p], c.token_ids, **sampling)
            differences.append((torch.tensor(c.logprobs) - expected).abs())
    # A candidate within fp32 rounding of the min_p or top_p threshold may fall on either side: 1 token in some 900.
    assert (torch.cat(differences) > 1e-4).float().mean() < 0.01


def test_score_is_the_plain_softmax(engine, models):
    expected = torch.tensor(trainer_logprobs(models["a"][1], PROBE))
    assert torch.allclose(torch.tensor(engine.score(PROBE)), expected.float(), atol=1e-4)
    assert engine.score(PROBE) == engine.score(PROBE)


def test_seeds_decide_alone(engine):
    """The same seeds give the same samples whatever else is in the batch; other seeds give others."""
    together = dict(engine.generate(PROMPTS, n=4, seeds=seeds(4), max_tokens=60, **FREE))
    alone = dict(engine.generate(PROMPTS[:1], n=4, seeds=seeds(4)[:1], max_tokens=60, **FREE))
    other = dict(engine.generate(PROMPTS, n=4, seeds=seeds(4, step=1), max_tokens=60, **FREE))
    assert [c.token_ids for c in alone[0]] == [c.token_ids for c in together[0]]
    assert all(together[p][s].token_ids != other[p][s].token_ids for p in together for s in range(4))
    assert len({tuple(c.token_ids) for c in together[0]}) == 4


def test_stop_token_is_the_last_id_and_max_tokens_is_per_prompt(engine):
    limits = [10 * (p + 1) for p in range(len(PROMPTS))]
    reasons = set()
    for p, group in engine.generate(PROMPTS, n=24, seeds=seeds(24), max_tokens=limits, **FREE):
        for c in group:
            reasons.add(c.finish_reason)
            assert EOS not in c.token_ids[:-1]
            assert (c.token_ids[-1] == EOS) == (c.finish_reason == "stop")
            assert len(c.token_ids) <= limits[p] if c.finish_reason == "stop" else len(c.token_ids) == limits[p]
    assert reasons == {"stop", "length"}


def test_groups_stream_while_the_others_are_sampled(engine):
    """The short group arrives while the long ones run on; leaving the loop cancels them and the next call is clean."""
    counts = []
    limits = [400] * (len(PROMPTS) - 1) + [2]
    stream = engine.generate(PROMPTS, n=8, seeds=seeds(8), max_tokens=limits, on_token_count=counts.append, **FREE)
    first = time.monotonic()
    assert next(stream)[0] == len(PROMPTS) - 1
    first = time.monotonic() - first
    rest = time.monotonic()
    everything = list(stream)
    rest = time.monotonic() - rest
    assert len(everything) == len(PROMPTS) - 1 and first < rest
    total = sum(len(c.token_ids) for _, group in everything for c in group)
    assert counts == sorted(counts) and all(0 < count <= total + 16 for count in counts)

    abandoned = engine.generate(PROMPTS, n=8, seeds=seeds(8), max_tokens=limits, **FREE)
    next(abandoned)
    with pytest.raises(EngineError, match="still open"):
        engine.score(PROBE)
    abandoned.close()
    again = dict(engine.generate(PROMPTS, n=8, seeds=seeds(8), max_tokens=limits, **FREE))
    assert all([c.token_ids for c in again[p]] == [c.token_ids for c in group] for p, group in everything)


def test_quick_requests_are_not_mistaken_for_a_cancel(engine):
    """The next request may be there before the engine has left the loop of the last one."""
    restarts = engine.restarts
    for i in range(500):                                         # without the check one in 150 collided
        (_, group), = engine.generate([[5]], n=1, seeds=[[i]], max_tokens=1, **FREE)
        assert len(group[0].token_ids) == 1
    assert engine.restarts == restarts


def test_impossible_requests_are_refused_and_the_engine_lives(engine):
    restarts = engine.restarts
    with pytest.raises(ValueError, match="max_model_len 512"):
        list(engine.generate([[5] * 500], n=1, seeds=[[0]], max_tokens=20, **FREE))
    with pytest.raises(ValueError, match="seeds"):
        list(engine.generate(PROMPTS, n=2, seeds=seeds(1), max_tokens=20, **FREE))
    with pytest.raises(EngineError, match="vocabulary of 336"):
        list(engine.generate([[5, 336]], n=1, seeds=[[0]], max_tokens=20, **FREE))
    with pytest.raises(EngineError, match="vocabulary of 336"):
        engine.score([5, 100_000])
    with pytest.raises(EngineError, match="top_p"):
        list(engine.generate([[5]], n=1, seeds=[[0]], max_tokens=20, temperature=1.0, top_p=1.5, min_p=0.0))
    with pytest.raises(EngineError, match="safetensors"):
        engine.load_weights("/nowhere", 1)
    engine.score(PROBE)
    assert engine.restarts == restarts


# ---------------------------------------------------------------------------------------------------------------------
# Weight sync
# ---------------------------------------------------------------------------------------------------------------------
def test_reload_brings_the_new_weights_and_forgets_the_old_prefixes(engine, models):
    """A long shared prompt fills the prefix cache first: keys and values of the old weights would show."""
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


def test_reload_of_a_tied_head(tmp_path):
    """One matrix is embedding and head: both must be renewed, and again after the next reload."""
    tied = [tiny_model(tmp_path / f"tied-{seed}", tie=True, hidden_size=128, seed=seed) for seed in range(3)]
    engine = Engine(tmp_path / "tied-0", max_model_len=128, dtype="float32", log_file=tmp_path / "log", kv_cache_gb=0.1)
    try:
        previous = None
        for version in (0, 1, 2):
            if version:
                engine.load_weights(tmp_path / f"tied-{version}", version)
            scored = engine.score(PROBE)
            assert check_probe(scored, trainer_logprobs(tied[version], PROBE), previous, True, 1e-3) < 1e-4
            previous = scored
    finally:
        engine.close()


def test_probe_catches_stale_and_wrong_weights(engine, models):
    tolerance = rollout.PROBE_TOLERANCE["float32"]
    a, b, c = (trainer_logprobs(models[name][1], PROBE) for name in "abc")
    at_a = engine.score(PROBE)
    assert check_probe(at_a, a, None, True, tolerance) < 1e-4

    with pytest.raises(StaleWeightsError, match="same weights.*tolerance"):       # the reload was skipped
        check_probe(engine.score(PROBE), b, at_a, True, tolerance)
    engine.load_weights(models["b"][0], 1)
    at_b = engine.score(PROBE)
    assert check_probe(at_b, b, at_a, True, tolerance) < 1e-4
    engine.load_weights(models["a"][0], 2)                                        # an old folder under a new number
    with pytest.raises(StaleWeightsError, match="same weights"):
        check_probe(engine.score(PROBE), b, at_b, True, tolerance)

    # A tiny step: within the tolerance of the old weights, so only the missing change gives a stale engine away.
    assert check_probe(engine.score(PROBE), c, at_b, True, tolerance) < tolerance
    with pytest.raises(StaleWeightsError, match="single bit"):
        check_probe(engine.score(PROBE), c, at_a, True, tolerance)
    engine.load_weights(models["c"][0], 3)
    assert check_probe(engine.score(PROBE), c, at_a, True, tolerance) < tolerance
    assert check_probe(at_a, a, at_a, False, tolerance) < 1e-4                    # learning rate 0: nothing has to move


def test_check_probe_on_numbers():
    assert check_probe([-1.0, -2.0], [-1.5, -2.25], [-9.0, -9.0], True, 0.5) == 0.375
    with pytest.raises(StaleWeightsError, match="same weights"):                  # gaps do not cancel
        check_probe([-1.0, -2.0], [-2.0, -1.0], None, True, 0.5)
    with pytest.raises(StaleWeightsError, match="nan"):
        check_probe([float("nan"), -1.0], [-1.0, -1.0], None, True, 1e-3)
    with pytest.raises(StaleWeightsError, match="-1.000000 in the engine, -1.500000 in the trainer"):
        check_probe([-1.0], [-1.5], None, True, 1e-3)
    with pytest.raises(ValueError, match="1 log-probs from the engine, 2"):
        check_probe([-1.0], [-1.0, -1.0], None, True, 1e-3)


def test_publish_load_verify_clean_up(engine, models, tmp_path, monkeypatch):
    """The trainer's own writer, vLLM's own reader: same log-probs; equal bits, equal fingerprint; old folders go."""
    ctx = policy_code.setup_distributed()
    try:
        policy = policy_code.load_policy(models["b"][0], ctx)
        first, fingerprint = rollout.publish_weights(policy, tmp_path, 1, torch.float32, ctx)
        engine.load_weights(first, 1)
        at_b = engine.score(PROBE)
        assert check_probe(at_b, trainer_logprobs(models["b"][1], PROBE), None, True, 1e-3) < 1e-4
        second, same = rollout.publish_weights(policy, tmp_path, 2, torch.float32, ctx)
        with torch.no_grad():
            next(policy.parameters()).mul_(1.01)
        third, other = rollout.publish_weights(policy, tmp_path, 3, torch.float32, ctx)
        assert same == fingerprint != other and len({first, second, third}) == 3
        engine.load_weights(third, 3)
        assert engine.score(PROBE) != at_b
        (Path(third).parent / "version-000004.tmp").mkdir()                       # left by a killed run
        assert rollout.remove_old_versions(third) == 3
        assert [p.name for p in Path(third).parent.iterdir()] == ["version-000003"]
        assert engine.score(PROBE) != at_b                                        # a deleted folder is not read again

        monkeypatch.setattr(rollout.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        with pytest.raises(policy_code.RankFailure, match=r"--sync_dir .*version 5 needs 0\.00 GB and 0\.00 GB are"):
            rollout.publish_weights(policy, tmp_path, 5, torch.float32, ctx)
    finally:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Death of an engine
# ---------------------------------------------------------------------------------------------------------------------
def same_samples(one, other):
    return all(a.token_ids == b.token_ids and a.finish_reason == b.finish_reason and a.version == b.version
               and max(abs(x - y) for x, y in zip(a.logprobs, b.logprobs, strict=True)) < 1e-4
               for p in one for a, b in zip(one[p], other[p], strict=True)) and sorted(one) == sorted(other)


def test_kill_during_generation_loses_no_sample(engine, models):
    """kill -9 after the first group: the others come from a new process, on the last weights, with the same tokens."""
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


def test_an_engine_stopped_while_it_starts_is_replaced(models, tmp_path, monkeypatch):
    """Long before start_timeout: its guard sees it. The copy of rollout.py waits 3 s instead of 30."""
    text = Path(rollout.__file__).read_text()
    (tmp_path / "impatient.py").write_text(text.replace("FROZEN_SECONDS = 30 ", "FROZEN_SECONDS = 3 "))
    monkeypatch.syspath_prepend(tmp_path)
    impatient = importlib.import_module("impatient")
    assert impatient.FROZEN_SECONDS == 3
    engine = impatient.Engine(models["a"][0], max_model_len=64, dtype="float32", log_file=tmp_path / "log",
                              kv_cache_gb=0.1)
    try:
        stopped = engine.pid
        wait_for(lambda: len(living(stopped)) >= 2)                   # until the guard is there
        os.kill(stopped, signal.SIGSTOP)
        assert len(engine.score(PROBE[:8])) == 7 and engine.restarts == 1
        assert_gone(stopped)
        assert "the engine has been stopped (SIGSTOP) for 3 s; killing it" in (tmp_path / "log").read_text()
    finally:
        engine.close()


@pytest.mark.parametrize("how", ["kill", "hang"])
def test_death_during_reload(engine, models, how):
    """The stopped child cannot have answered. Killed, or silent past stall_timeout: both end on the new weights."""
    restarts, stopped = engine.restarts, engine.pid
    os.kill(stopped, signal.SIGSTOP)
    killer = threading.Timer(0.5, os.kill, (stopped, signal.SIGKILL))
    patience = engine.stall_timeout
    if how == "kill":
        killer.start()
    else:
        engine.stall_timeout = 1
        restore = threading.Timer(2, setattr, (engine, "stall_timeout", patience))       # the new child gets its time
        restore.start()
    engine.load_weights(models["b"][0], 9)
    assert engine.version == 9 and engine.restarts == restarts + 1
    assert check_probe(engine.score(PROBE), trainer_logprobs(models["b"][1], PROBE), None, True, 1e-3) < 1e-4
    assert_gone(stopped)


def test_killed_while_starting_and_stop_strings(demo, tokenizer, tmp_path):
    """The first process dies before it is ready. The second samples with a stop string, which stays in the answer."""
    engine = Engine(demo / "base", max_model_len=256, dtype="float32", log_file=tmp_path / "log", kv_cache_gb=0.1)
    try:
        os.kill(engine.pid, signal.SIGKILL)
        prompt = tokenizer("3 + 4 = ")["input_ids"]
        ask = dict(n=16, seeds=[list(range(16))], max_tokens=100, **FREE)
        (_, free), = engine.generate([prompt], **ask)
        assert engine.restarts == 1
        stop = tokenizer.decode(free[0].token_ids[5:6])
        (_, stopped), = engine.generate([prompt], stop=[stop], **ask)
        cut = [c for c in stopped if stop in tokenizer.decode(c.token_ids)]
        assert cut
        for c in cut:
            assert c.finish_reason == "stop" and len(c.token_ids) == len(c.logprobs)
            assert stop in tokenizer.decode(c.token_ids) and stop not in tokenizer.decode(c.token_ids[:-1])
            assert c.token_ids == free[c.sample_index].token_ids[:len(c.token_ids)]
        engine.sleep()                                            # on a CPU it does nothing, and says so
    finally:
        engine.close()


def test_an_engine_that_is_late_is_not_started_again(models, tmp_path):
    engine = Engine(models["a"][0], max_model_len=64, dtype="float32", log_file=tmp_path / "log", start_timeout=0.3)
    try:
        with pytest.raises(EngineError, match=r"not ready after 0 s \(--engine_start_timeout\)"):
            engine.score(PROBE[:8])
        assert engine.restarts == 0
        assert_gone(engine.pid)
    finally:
        engine.close()


def test_restart_limit(engine, monkeypatch):
    monkeypatch.setattr(engine, "max_restarts", engine.restarts)
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=r"(?s)SIGKILL.*--max_engine_restarts.*last lines of .*engine\.log.*prefix"):
        engine.score(PROBE)
    monkeypatch.undo()
    assert len(engine.score(PROBE)) == len(PROBE) - 1             # with a higher limit the handle can go on


@pytest.mark.parametrize("mistake, reason", [
    (dict(model_path="/nowhere/model"), "/nowhere/model"),
    (dict(extra={"dtype": "float7"}), "float7"),
    (dict(model_path="head_dim_16"), "head_dim=16"),              # it starts; the first forward fails
])
def test_what_cannot_work_says_why_at_once(models, tmp_path, monkeypatch, mistake, reason):
    monkeypatch.chdir(tmp_path)
    tiny_model(tmp_path / "head_dim_16")
    arguments = dict(model_path=models["a"][0], max_model_len=64, log_file=tmp_path / "log", kv_cache_gb=0.1) | mistake
    engine = Engine(**arguments)
    with pytest.raises(EngineError, match=rf"(?s)could not start.*exited with code 1.*log.*{reason}"):
        engine.score(PROBE)
    assert engine.restarts == 0
    engine.close()
    assert_gone(engine.pid)


# ---------------------------------------------------------------------------------------------------------------------
# Death of the trainer
# ---------------------------------------------------------------------------------------------------------------------
TRAINER = """
import sys, time
from rollout import Engine
engine = Engine(sys.argv[1], max_model_len=2000, dtype="float32", log_file=sys.argv[2], kv_cache_gb=0.1)
print(engine.pid, flush=True)
if sys.argv[3] == "generating":
    for _ in engine.generate([[5, 6]] * 65, n=1, seeds=[[i] for i in range(65)], temperature=1.0, top_p=1.0, min_p=0.0,
                             max_tokens=[1] + [1900] * 64):
        print("sampling", flush=True)
        time.sleep(600)
elif sys.argv[3] == "error":
    raise RuntimeError("the trainer failed")
time.sleep(600)
"""


@pytest.mark.parametrize("state, end", [("starting", signal.SIGKILL), ("generating", signal.SIGKILL),
                                        ("hung", signal.SIGKILL), ("starting", signal.SIGTERM), ("error", None)])
def test_no_engine_survives_the_trainer(models, tmp_path, state, end):
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, models["a"][0], tmp_path / "log", state], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        group = int(trainer.stdout.readline())
        assert living(group) or state == "error"
        if state == "generating":
            assert trainer.stdout.readline() == "sampling\n"
        if state == "hung":
            wait_for(lambda: len(living(group)) >= 2)             # until the guard is there
            os.kill(group, signal.SIGSTOP)
        if end:
            trainer.send_signal(end)
        assert trainer.wait(60) != 0
        assert_gone(group)
    finally:
        trainer.kill()
        trainer.wait()


def test_child_environment_is_free_of_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setenv("RANKING", "kept")
    environment = rollout._child_environment("/nowhere", 2, [2, 3], on_cpu=False)
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & set(environment)
    assert (environment["OMP_NUM_THREADS"], environment["CUDA_VISIBLE_DEVICES"]) == ("1", "6,7")
    assert environment["RANKING"] == "kept" and environment["PATH"] == os.environ["PATH"]


# ---------------------------------------------------------------------------------------------------------------------
# Seeds and layout
# ---------------------------------------------------------------------------------------------------------------------
def test_sampling_seed_is_stable_and_distinct():
    code = "from rollout import sampling_seed; print(sampling_seed(1, 2, 3, 4), sampling_seed(1, 2, 'aime-3', 4))"
    other_process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                                   env={**os.environ, "PYTHONHASHSEED": "5"})
    assert other_process.stdout.split() == [str(sampling_seed(1, 2, 3, 4)), str(sampling_seed(1, 2, "aime-3", 4))]
    many = {sampling_seed(a, b, c, d) for a in range(4) for b in range(10) for c in range(20) for d in range(8)}
    assert len(many) > 6390 and all(0 <= seed < 2**31 for seed in many)
    assert sampling_seed(1, 11, 1, 1) != sampling_seed(11, 1, 1, 1) != sampling_seed(1, 1, 11, 1)


def test_engine_layout():
    two_nodes = [engine_layout(rank, rank % 8, 16, 8, 4) for rank in range(16)]
    assert [x.index for x in two_nodes if x.owns_engine] == [0, 1, 2, 3] and {x.count for x in two_nodes} == {4}
    assert [x.devices for x in two_nodes if x.owns_engine] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2
    assert two_nodes[13] == rollout.EngineLayout(owns_engine=False, index=3, count=4, devices=[4, 5, 6, 7])
    assert engine_layout(0, 0, 1, 1, 1) == rollout.EngineLayout(owns_engine=True, index=0, count=1, devices=[0])
    with pytest.raises(ValueError, match=r"--tensor_parallel_size 3.*\[1, 2, 4, 8\]"):
        engine_layout(0, 0, 8, 8, 3)
