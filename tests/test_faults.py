"""What must not lose or falsify a run: frozen and killed processes, lost machines, full disks, bad files."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import psutil
import pytest
import torch
from conftest import ROOT, run, wait_for

import model as policy_lib
import rewards
import rollout
import train_grpo
import train_sft

STEPS = 18


@pytest.fixture(scope="module")
def rows(tmp_path_factory, demo):
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    path.write_text("\n".join((demo / "train.jsonl").read_text().splitlines()[:60]) + "\n")
    return path


@pytest.fixture(scope="module")
def ctx():
    ctx = policy_lib.setup_distributed(2)
    yield ctx
    torch.distributed.destroy_process_group()


def flags(demo, rows, output, **options):
    options = {"model_name_or_path": demo / "base", "dataset": rows, "system_prompt": "none", "output_dir": output,
               "chat_template": "tokenizer", "max_length": 512, "gradient_accumulation_steps": 1,
               "learning_rate": "1e-3", "activation_checkpointing": "none", "cache_dir": demo / "cache",
               "save_dtype": "float32", "max_steps": STEPS, "save_steps": 2, "timeout_minutes": 2,
               "heartbeat_timeout": 6, **options}
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


class Program:
    """A script in the background: two torchrun ranks, one plain process, or two agents of one rank each."""

    def __init__(self, folder, arguments, ranks=2, agents=1, script=ROOT / "train_sft.py", **environment):
        self.log = folder / f"log-{time.monotonic_ns()}.txt"
        env = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
        endpoint = "localhost:0" if agents == 1 else f"localhost:{free_port()}"
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks // agents), "--nnodes", str(agents),
                  "--rdzv_backend", "c10d", "--rdzv_id", "faults", "--rdzv_endpoint", endpoint]
        command = [sys.executable, *(launch if ranks > 1 else []), str(script), *arguments]
        with open(self.log, "w") as log:
            self.processes = [
                subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
                for _ in range(agents)]

    @property
    def text(self):
        return self.log.read_text()

    def ranks(self, agent=0):
        children = psutil.Process(self.processes[agent].pid).children()
        ranks = [child for child in children if any("train_sft.py" in part for part in child.cmdline())]
        return sorted(ranks, key=lambda child: child.environ()["RANK"])

    def reach(self, output, step):
        wait_for(lambda: max(losses(output), default=0) >= step, self.processes[0],
                 said=lambda: self.text[-3000:])

    def end(self, timeout=300):
        return [process.wait(timeout) for process in self.processes]


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def losses(output):
    path = output / "metrics.jsonl"
    return {row["step"]: row["loss"] for row in policy_lib.read_jsonl(path)} if path.exists() else {}


def alive(process):
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def assert_gone(processes, seconds=20):
    deadline = time.monotonic() + seconds
    while left := [p for p in processes if alive(p)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, demo, rows):
    folder = tmp_path_factory.mktemp("unbroken")
    program = Program(folder, flags(demo, rows, folder / "run", gradient_accumulation_steps=2), ranks=1)
    assert program.end() == [0], program.text[-3000:]
    return folder / "run"


@contextmanager
def small_disk(path, size):
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)],
                             capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small disk needs root to mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


# sitecustomize.py of the ranks: the wall clock jumps by hours, forwards and backwards, with every look at it
JUMPING_CLOCK = """
import os, random, time
if "RANK" in os.environ:
    real = time.time
    time.time = lambda: real() + random.choice((-36000, 0, 36000))
"""


def test_one_run_survives_one_fault_after_the_other(tmp_path, demo, rows, unbroken, ctx):
    """Frozen rank, damaged checkpoint, killed torchrun, other world size, two interrupts, a lost machine: same loss."""
    output = tmp_path / "run"

    # A rank that stops responding is named, the job ends, the stopped process with it; meanwhile the folder is taken.
    program = Program(tmp_path, flags(demo, rows, output))
    program.reach(output, 5)
    ranks = program.ranks()
    ranks[1].send_signal(signal.SIGSTOP)
    config = train_sft.SFTConfig(output_dir=str(output), resume=True)
    with pytest.raises(policy_lib.RankFailure, match="another run is using this folder; choose another --output_dir"):
        policy_lib.open_run(ctx, config, set(), {})
    assert program.end() != [0]
    said = re.search(
        rf"rank 0: rank 1 \(host \S+, process {ranks[1].pid}\) has not responded for (\d+) s "
        r"\(--heartbeat_timeout 6\), in step \d+. This run ends; start it again with --resume", program.text)
    assert said and int(said[1]) <= 2 * 6, program.text[-3000:]
    assert_gone(ranks)
    assert "Unable to shutdown process" not in program.text  # torchrun need not wait 30 s for what cannot hear it

    # The newest checkpoint is damaged: the one before is taken, loudly. torchrun is killed: the ranks save and leave.
    newest = policy_lib.checkpoint_folder(output, policy_lib.checkpoint_steps(output)[-1])
    victim = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    (output / "checkpoints/step-000099.tmp").mkdir()  # what a kill in the middle of a save leaves
    program = Program(tmp_path, flags(demo, rows, output, resume=True))
    program.reach(output, max(losses(output)) + 1)  # beyond the rows of the run before
    ranks = program.ranks()
    program.processes[0].kill()
    assert_gone(ranks, 60)
    damaged = f"checkpoint step {int(newest.name[5:])} is damaged ({victim.name} does not match its checksum)"
    assert damaged in program.text
    assert re.search(rf"stopped by a signal after step \d+ of {STEPS}; continue with --resume", program.text)
    assert policy_lib.checkpoint_steps(output)[-1] == max(losses(output))
    assert not list((output / "checkpoints").glob("*.tmp"))

    # One rank goes on with the same packs per step; the second interrupt leaves at once, in one line.
    one_rank = flags(demo, rows, output, resume=True, gradient_accumulation_steps=2)
    program = Program(tmp_path, one_rank, ranks=1)
    program.reach(output, max(losses(output)) + 1)
    program.processes[0].send_signal(signal.SIGINT)
    wait_for(lambda: "SIGINT received; saving" in program.text, program.processes[0])
    program.processes[0].send_signal(signal.SIGINT)
    assert program.end() in ([130], [143]), program.text[-2000:]  # 143: it had saved already
    assert "Traceback" not in program.text

    # Two machines with a clock that jumps; one is lost with all its processes: the other ends at once, in one line.
    (tmp_path / "sitecustomize.py").write_text(JUMPING_CLOCK)
    hybrid = flags(demo, rows, output, resume=True, shard_size=1)
    program = Program(tmp_path, hybrid, agents=2, PYTHONPATH=str(tmp_path))
    program.reach(output, max(losses(output)) + 2)
    for process in (*program.ranks(1), program.processes[1]):
        process.kill()
    assert program.end()[0] not in (0, None)
    assert "lost" in program.text and "start it again with --resume" in program.text, program.text[-3000:]

    # The machine that serves torchrun's store loses power: no connection is closed, and the other's reads never return.
    program = Program(tmp_path, hybrid, agents=2)
    program.reach(output, max(losses(output)) + 2)
    port = int(program.ranks(0)[0].environ()["MASTER_PORT"])
    serving = [any(c.status == psutil.CONN_LISTEN and c.laddr.port == port
                   for c in psutil.Process(agent.pid).net_connections()) for agent in program.processes]
    assert sorted(serving) == [False, True]
    lost, other = serving.index(True), serving.index(False)
    dead, alive = program.ranks(lost), program.ranks(other)
    for process in (*dead, program.processes[lost]):
        process.send_signal(signal.SIGSTOP)
    assert program.processes[other].wait(60) != 0  # killed by its rank where it hangs in the same read
    assert_gone(alive)
    assert re.search(r"torchrun's store at \S+ \(that machine, or the network to it\) has not answered for [6-9] s "
                     r"\(--heartbeat_timeout 6\), in step \d+. This run ends; start it again with --resume",
                     program.text)
    for process in (*dead, program.processes[lost]):
        process.kill()

    # And once more, to the end.
    program = Program(tmp_path, one_rank, ranks=1)
    assert program.end() == [0], program.text[-3000:]
    ours, theirs = losses(output), losses(unbroken)
    assert sorted(ours) == list(range(1, STEPS + 1)) and ours == pytest.approx(theirs, rel=1e-5)

    # Killed between the last checkpoint and `final`: the resumed run owes the model and nothing else.
    shutil.rmtree(output / "final")
    program = Program(tmp_path, one_rank, ranks=1)
    assert program.end() == [0] and (output / "final/config.json").is_file() and losses(output) == ours

    # Other packs per step would give the steps' numbers another meaning.
    with pytest.raises(policy_lib.RankFailure, match="gradient_accumulation_steps x ranks: 2 then, 1 now"):
        policy_lib.open_run(ctx, config, set(), {"gradient_accumulation_steps x ranks": 1})


FREEZES_WHILE_LOADING = """
import os, signal
import model as policy_lib, train_sft
load_policy = policy_lib.load_policy
def freeze(*arguments, **options):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    return load_policy(*arguments, **options)
policy_lib.load_policy = freeze
if __name__ == "__main__":
    policy_lib.run_main(train_sft.main, train_sft.SFTConfig)
"""


def test_a_rank_that_freezes_before_the_first_step_is_named(tmp_path, demo, rows):
    (tmp_path / "script.py").write_text(FREEZES_WHILE_LOADING)
    program = Program(tmp_path, flags(demo, rows, tmp_path / "run"), script=tmp_path / "script.py",
                      PYTHONPATH=str(ROOT))
    assert program.end() != [0]
    assert re.search(r"rank 0: rank 1 \(host \S+, process \d+\) has not responded for \d+ s \(--heartbeat_timeout 6\), "
                     r"while starting. This run ends", program.text), program.text[-3000:]


NEVER_STARTS = """
import os, signal
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGSTOP)
import model as policy_lib, train_sft
if __name__ == "__main__":
    policy_lib.run_main(train_sft.main, train_sft.SFTConfig)
"""


def test_a_rank_that_never_starts_is_named(tmp_path, demo, rows):
    (tmp_path / "script.py").write_text(NEVER_STARTS)
    program = Program(tmp_path, flags(demo, rows, tmp_path / "run", timeout_minutes=0.1), script=tmp_path / "script.py",
                      PYTHONPATH=str(ROOT))
    wait_for(lambda: re.search(r"rank 0 has waited \d+ s \(--timeout_minutes 0.1\) for ranks \[1\] to start",
                               program.text), program.processes[0], said=lambda: program.text[-3000:])
    for child in psutil.Process(program.processes[0].pid).children():
        child.kill()  # torchrun would do so after --shutdown_timeout
    assert program.end() != [0]


FAILS_ALONE = """
import os, signal, time
import model as policy_lib, train_sft
def main(cfg):
    ctx = policy_lib.setup_distributed(2)
    policy_lib.start_heartbeat(ctx, 12)
    if ctx.rank == 1:
        raise KeyError("a defect")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # like a rank in a collective of its GPU
    time.sleep(600)
if __name__ == "__main__":
    policy_lib.run_main(main, train_sft.SFTConfig)
"""


def test_a_rank_that_waits_for_a_failed_one_ends(tmp_path):
    (tmp_path / "script.py").write_text(FAILS_ALONE)
    program = Program(tmp_path, [], script=tmp_path / "script.py", PYTHONPATH=str(ROOT))
    assert program.end() != [0]
    assert "KeyError: 'a defect'" in program.text
    assert re.search(r"rank 0: rank 1 has failed and left this one waiting for \d+ s", program.text), program.text


def test_weights_leave_the_sync_folder_however_a_run_ends(tmp_path, ctx):
    cfg = train_grpo.GRPOConfig(sync_dir=str(tmp_path), output_dir="runs/x")
    left = train_grpo.sync_folder(cfg) / "node-0/version-000003"
    left.mkdir(parents=True)  # by a run that was killed
    with pytest.raises(ZeroDivisionError), train_grpo.weights_handed_over(cfg, ctx):
        assert not left.exists()
        left.mkdir(parents=True)
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_ranks_that_do_not_start_are_named(capsys):
    store = torch.distributed.HashStore()
    with pytest.raises(policy_lib.RankFailure, match=r"rank 1 has waited \d+ s \(--timeout_minutes 0.05\) for ranks "
                                                     r"\[0, 2\] to start"):
        policy_lib.roll_call(store, 1, 3, 3, notice=0.1)
    assert re.search(r"rank 1: ranks \[0, 2\] have not started after \d+ s; waiting", capsys.readouterr().err)
    late = threading.Thread(target=policy_lib.roll_call, args=(store, 2, 3, 30))
    late.start()
    policy_lib.roll_call(store, 0, 3, 30)
    late.join(30)
    assert not late.is_alive()


TWO_MACHINES_SCRIPT = """
import hashlib, sys, torch
from pathlib import Path
import model as policy_lib, rollout
if __name__ == "__main__":
    base, folder = sys.argv[1:]
    ctx = policy_lib.setup_distributed(2, shard_size=1)
    model = policy_lib.load_policy(base, ctx)
    published, fingerprint = rollout.publish_weights(model, folder, 3, torch.float32, ctx)
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(Path(published).iterdir())]
    everyone = policy_lib.gather_objects(ctx, (published, fingerprint, digests))
    assert [Path(p).relative_to(folder).as_posix() for p, _, _ in everyone] == [
        "node-0/version-000003", "node-1/version-000003"], everyone
    assert everyone[0][1:] == everyone[1][1:]
    policy_lib.shutdown_distributed(ctx)
    policy_lib.exit_process(0)
"""


def test_each_machine_writes_its_own_version_of_the_weights(tmp_path, demo):
    (tmp_path / "script.py").write_text(TWO_MACHINES_SCRIPT)
    program = Program(tmp_path, [str(demo / "base"), str(tmp_path)], agents=2, script=tmp_path / "script.py",
                      PYTHONPATH=str(ROOT))
    assert program.end() == [0, 0], program.text[-3000:]


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, demo, rows, unbroken):
    with small_disk(tmp_path / "disk", "16m") as disk:  # one checkpoint has 10 MB
        program = Program(tmp_path, flags(demo, rows, disk / "run", save_total_limit=0))
        assert program.end() != [0]
        assert re.search(r"train_sft.py: saving \S+step-000004 failed .* 0.00 GB are free on the disk of --output_dir. "
                         r"Earlier checkpoints are untouched: \[2\]", program.text), program.text[-3000:]
        assert policy_lib.checkpoint_steps(disk / "run") == [2]
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        program = Program(tmp_path, flags(demo, rows, disk / "run", save_total_limit=1, resume=True))
        assert program.end() == [0], program.text[-3000:]
        assert losses(disk / "run") == pytest.approx(losses(unbroken), rel=1e-5)


def test_a_full_disk_for_final_and_for_weights_is_named(tmp_path, demo, ctx):
    model = policy_lib.load_policy(demo / "base", ctx)
    with small_disk(tmp_path / "disk", "2m") as disk:
        with pytest.raises(policy_lib.RankFailure, match=r"--output_dir.* full\?.*failed on rank 0"):
            policy_lib.save_hf(model, disk / "final", ctx, torch.float32)
        assert not (disk / "final").exists()
        shutil.rmtree(disk / "final.tmp")
        with pytest.raises(policy_lib.RankFailure, match=r"--sync_dir .* needs 0.00 GB and .* free"):
            rollout.publish_weights(model, str(disk), 1, torch.float32, ctx)
        # the disk has filled up after the check
        with pytest.raises(policy_lib.RankFailure, match=r"--sync_dir.* full\?.*failed on rank 0"):
            policy_lib.save_hf(model, disk / "version-000001", ctx, torch.float32, one_per_node=True)
        assert not list(disk.glob("version-000001"))


ENGINE_SCRIPT = """
import json, sys, psutil, shutil, torch
from pathlib import Path
import model as policy_lib, rollout, train_grpo
if __name__ == "__main__":
    base, folder = sys.argv[1:]
    cfg = train_grpo.GRPOConfig(sync_dir=folder, output_dir=folder + "/out")
    ctx = policy_lib.setup_distributed(5)
    model = policy_lib.load_policy(base, ctx)
    engine = rollout.Engine(base, max_model_len=128, dtype="float32", log_file=folder + "/engine.log")
    publish_weights, probe, sync = rollout.publish_weights, list(range(10, 60)), None

    def truncate(file):
        file.write_bytes(file.read_bytes()[:-5000])

    def flip(file):
        content = bytearray(file.read_bytes())
        content[-2997] ^= 64  # an exponent's highest bit; low bits of a mantissa are below the probe's tolerance
        file.write_bytes(content)

    faults = {"none": lambda file: None, "truncated": truncate, "deleted": Path.unlink,
              "folder deleted": lambda file: shutil.rmtree(file.parent), "flipped": flip,
              "none again": lambda file: None}
    for version, (name, fault) in enumerate(faults.items()):
        def damaged(*arguments):
            published = publish_weights(*arguments)
            fault(next(Path(published[0]).glob("*.safetensors")))
            return published
        rollout.publish_weights = damaged
        try:
            sync = train_grpo.publish(model, engine, ctx, probe, sync, version, cfg)
            print(json.dumps([name, "accepted"]), flush=True)
        except policy_lib.RankFailure as error:
            print(json.dumps([name, str(error)]), flush=True)
        if version == 0:
            tree = [psutil.Process(engine.pid), *psutil.Process(engine.pid).children(recursive=True)]
            found = [(c.status, c.laddr.ip) for p in tree for c in p.net_connections(kind="inet") if c.laddr]
            print(json.dumps(["sockets", found]), flush=True)
    print(json.dumps(["restarts", engine.restarts]))
    engine.close()
    policy_lib.exit_process(0)
"""


def test_damaged_weights_never_reach_a_sample_and_engines_listen_on_loopback_only(tmp_path, demo):
    (tmp_path / "script.py").write_text(ENGINE_SCRIPT)
    done = run(sys.executable, tmp_path / "script.py", demo / "base", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    said = dict(map(json.loads, done.stdout.strip().splitlines()))
    assert said["none"] == said["none again"] == "accepted"
    for fault in ("truncated", "deleted", "folder deleted", "flipped"):
        assert ("do not hold the same weights" if fault == "flipped" else "is not intact") in said[fault], said[fault]
        assert "\n" not in said[fault]
    assert said["restarts"] == 0  # the disk's fault: restarting engines would cost minutes and cure nothing
    assert all(ip in ("127.0.0.1", "::1") for _, ip in said["sockets"]), said["sockets"]


def test_a_killed_grading_worker_costs_one_item(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\n\ndef slow(completion, answer):\n    time.sleep(0.2)\n    return float(completion)\n")
    with rewards.WorkerPool(f"{tmp_path / 'slow.py'}:slow", workers=2, timeout=20) as pool:
        found = []
        thread = threading.Thread(target=lambda: found.extend(pool.map([(str(i), "") for i in range(12)])))
        thread.start()
        victims, deadline = [], time.monotonic() + 60
        while not victims and time.monotonic() < deadline:
            victims = [c for c in psutil.Process().children() if any("slow.py:slow" in part for part in c.cmdline())]
        time.sleep(1.0)
        victims[0].kill()
        thread.join(60)
    assert len(found) == 12 and sum(outcome != "done" for outcome, _ in found) <= 1
    assert all(value == i for i, (outcome, value) in enumerate(found) if outcome == "done")


def test_nothing_in_a_model_folder_is_executed(tmp_path, demo, ctx):
    """Pickled weights and code that asks for trust_remote_code: refused or ignored, never run."""
    trap = tmp_path / "sprung"
    code = f"open({str(trap)!r}, 'w').close()\n"
    folder = tmp_path / "model"
    shutil.copytree(demo / "base", folder)
    (folder / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return exec, (code,)

    torch.save({"lm_head.weight": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(policy_lib.RankFailure, match="pickled .bin weights are not read"):
        policy_lib.load_policy(folder, ctx)
    config = json.loads((folder / "config.json").read_text())
    (folder / "own.py").write_text(
        code + "from transformers import Qwen2Config as Own, PreTrainedTokenizerFast as OwnTokenizer\n")
    own = {**config, "model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(own))
    with pytest.raises(ValueError, match="config.json is not a model config that transformers can read") as refused:
        policy_lib.load_config(folder)
    assert "\n" not in str(refused.value)
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    own = {**settings, "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    try:
        policy_lib.load_tokenizer(folder)
    except ValueError as error:
        assert "\n" not in str(error)
    assert not trap.exists()


FORBIDDEN_CALLS = "time.time", "datetime.now", "eval", "exec", "torch.load", "pickle.load", "pickle.loads"


def test_deadlines_use_a_steady_clock_and_nothing_trusts_code():
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert name not in FORBIDDEN_CALLS, (path, node.lineno)
            for keyword in getattr(node, "keywords", []):
                if keyword.arg == "trust_remote_code":
                    assert ast.unparse(keyword.value) in ("False", "trust_remote_code"), (path, node.lineno)


def test_a_rank_without_its_torchrun_leaves(monkeypatch):
    for name, value in {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(ConnectionError, match="does not answer .*torchrun has ended.*start the run again"):
        policy_lib.check_store()


def test_a_stale_lock_file_of_a_dead_run_stops_nobody(tmp_path, ctx):
    (tmp_path / ".lock").write_text("")
    config = train_sft.SFTConfig(output_dir=str(tmp_path))
    assert policy_lib.open_run(ctx, config, set(), {}).checkpoint is None
    assert (tmp_path / "config.json").is_file()
