"""What must not lose or falsify a run: frozen and killed processes, full disks, damaged files."""

import ast
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil
import pytest
import torch
from conftest import ROOT, free_port, run, run_script, wait_for

from model import (
    RankFailure,
    checkpoint_folder,
    checkpoint_steps,
    load_checkpoint,
    load_config,
    load_policy,
    load_tokenizer,
    open_run,
    read_jsonl,
    save_checkpoint,
    save_hf,
    setup_distributed,
)

STEPS = 18


@pytest.fixture(scope="module")
def rows(tmp_path_factory, demo):
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    path.write_text("\n".join((demo / "train.jsonl").read_text().splitlines()[:60]) + "\n")
    return path


@pytest.fixture(scope="module")
def ctx():
    ctx = setup_distributed(2)
    yield ctx
    torch.distributed.destroy_process_group()


def flags(demo, rows, output, **options):
    options = {
        "model_name_or_path": demo / "base", "dataset": rows, "system_prompt": "none",
        "output_dir": output, "chat_template": "tokenizer", "max_length": 512,
        "gradient_accumulation_steps": 1, "learning_rate": "1e-3",
        "activation_checkpointing": "none", "cache_dir": demo / "cache", "max_steps": STEPS,
        "save_steps": 2, "timeout_minutes": 2, **options}
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


class Program:
    """A script in the background: two torchrun ranks, one process, or two agents of one rank."""

    def __init__(self, folder, arguments, ranks=2, agents=1, script=ROOT / "train_sft.py",
                 **environment):
        self.log = folder / f"log-{time.monotonic_ns()}.txt"
        env = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
        endpoint = "localhost:0" if agents == 1 else f"localhost:{free_port()}"
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks // agents),
                  "--nnodes", str(agents), "--rdzv_backend", "c10d", "--rdzv_id", "faults",
                  "--rdzv_endpoint", endpoint]
        command = [sys.executable, *(launch if ranks > 1 else []), str(script), *arguments]
        with open(self.log, "w") as log:
            self.processes = [
                subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log,
                                 start_new_session=True)
                for _ in range(agents)]

    @property
    def text(self):
        return self.log.read_text()

    def ranks(self, agent=0):
        children = psutil.Process(self.processes[agent].pid).children()
        ranks = [c for c in children if any("train_sft.py" in part for part in c.cmdline())]
        return sorted(ranks, key=lambda child: child.environ()["RANK"])

    def reach(self, output, step):
        wait_for(lambda: max(losses(output), default=0) >= step, self.processes[0],
                 said=lambda: self.text[-3000:])

    def say(self, pattern):
        """Wait for a line, then kill ranks that are stopped: torchrun would do so 30 s later."""
        wait_for(lambda: re.search(pattern, self.text), self.processes[0],
                 said=lambda: self.text[-3000:])
        for child in psutil.Process(self.processes[0].pid).children():
            with suppress(psutil.NoSuchProcess):
                if child.status() == psutil.STATUS_STOPPED:
                    child.kill()
        assert self.end(60) != [0]

    def end(self, timeout=300):
        return [process.wait(timeout) for process in self.processes]


def losses(output):
    path = output / "metrics.jsonl"
    return {row["step"]: row["loss"] for row in read_jsonl(path)} if path.exists() else {}


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
    arguments = flags(demo, rows, folder / "run", gradient_accumulation_steps=2)
    done = run_script("train_sft.py", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
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


# sitecustomize.py of the ranks: the wall clock jumps by hours, both ways, with every look at it
JUMPING_CLOCK = """
import os, random, time
if "RANK" in os.environ:
    real = time.time
    time.time = lambda: real() + random.choice((-36000, 0, 36000))
"""


def test_one_run_survives_one_fault_after_the_other(tmp_path, demo, rows, unbroken, ctx):
    """Frozen rank, damaged checkpoint, dead torchrun, other world size, lost machine: same loss."""
    output = tmp_path / "run"

    # A rank freezes: the others wait for --timeout_minutes, torchrun ends the job, and its table
    # has rank and process. Meanwhile the folder is taken.
    program = Program(tmp_path, flags(demo, rows, output, timeout_minutes=0.2))
    program.reach(output, 5)
    ranks = program.ranks()
    ranks[1].send_signal(signal.SIGSTOP)
    with pytest.raises(RankFailure, match="another run is using this folder; choose another"):
        open_run(ctx, Settings(str(output)), {})
    program.say("Timed out waiting 12000ms|has waited 0:00:12")
    assert_gone(ranks)
    table = rf"rank +: 1 \(local_rank: 1\)\s+exitcode +: -9 \(pid: {ranks[1].pid}\)"
    assert re.search(table, program.text), program.text[-3000:]

    # The newest checkpoint is damaged: the one before is taken, loudly. torchrun is killed: the
    # ranks save and leave.
    newest = checkpoint_folder(output, checkpoint_steps(output)[-1])
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
    damaged = f"step {int(newest.name[5:])} is damaged ({victim.name} does not match its checksum)"
    assert damaged in program.text
    assert re.search(rf"stopped by a signal after step \d+ of {STEPS}; continue with --resume",
                     program.text)
    assert checkpoint_steps(output)[-1] == max(losses(output))
    assert not list((output / "checkpoints").glob("*.tmp"))

    # One rank goes on with the same packs per step; the second interrupt leaves at once.
    one_rank = flags(demo, rows, output, resume=True, gradient_accumulation_steps=2)
    program = Program(tmp_path, one_rank, ranks=1)
    program.reach(output, max(losses(output)) + 1)
    assert re.search(r"changed settings \(.*steps: 1 then, 2 now.*world_size: 2 then, 1 now",
                     program.text), program.text
    program.processes[0].send_signal(signal.SIGINT)
    wait_for(lambda: "SIGINT received; saving" in program.text, program.processes[0])
    program.processes[0].send_signal(signal.SIGINT)
    assert program.end()[0] in (1, 130, 143), program.text[-2000:]  # in a save; between; after it
    assert "Traceback" not in program.text

    # Two machines with a clock that jumps; one is lost with its processes: the other ends at once.
    (tmp_path / "sitecustomize.py").write_text(JUMPING_CLOCK)
    hybrid = flags(demo, rows, output, resume=True, shard_size=1)
    program = Program(tmp_path, hybrid, agents=2, PYTHONPATH=str(tmp_path))
    program.reach(output, max(losses(output)) + 2)
    lost = time.monotonic()
    for process in (*program.ranks(1), program.processes[1]):
        process.kill()
    assert program.end()[0] not in (0, None) and time.monotonic() - lost < 60
    assert re.search("closed by peer|reset by peer|Broken pipe|has lost one", program.text), (
        program.text[-3000:])

    # The machine that serves torchrun's store loses power: no connection is closed, and the other's
    # reads do not return. Its rank ends after --timeout_minutes.
    program = Program(tmp_path, [*hybrid, "--timeout_minutes", "0.2"], agents=2)
    program.reach(output, max(losses(output)) + 2)
    port = int(program.ranks(0)[0].environ()["MASTER_PORT"])
    serving = [any(c.status == psutil.CONN_LISTEN and c.laddr.port == port
                   for c in psutil.Process(agent.pid).net_connections())
               for agent in program.processes]
    assert sorted(serving) == [False, True]
    lost, other = serving.index(True), serving.index(False)
    dead, left = program.ranks(lost), program.ranks(other)
    for process in (*dead, program.processes[lost]):
        process.send_signal(signal.SIGSTOP)
    assert_gone(left, 60)
    for process in (*dead, program.processes[lost]):
        process.kill()
    assert program.processes[other].wait(60) != 0

    # And once more, to the end.
    done = run_script("train_sft.py", *one_rank)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = losses(output), losses(unbroken)
    assert sorted(ours) == list(range(1, STEPS + 1)) and ours == pytest.approx(theirs, rel=1e-5)

    # Killed between the last checkpoint and `final`: the resumed run writes it and trains nothing.
    shutil.rmtree(output / "final")
    done = run_script("train_sft.py", *one_rank)
    assert done.returncode == 0 and (output / "final/config.json").is_file()
    assert losses(output) == ours


@dataclass
class Settings:
    """What open_run needs of a trainer's flags."""

    output_dir: str
    resume: bool = False
    learning_rate: float = 1e-5


def test_a_resume_takes_other_flags_and_refuses_another_identity(tmp_path, demo, ctx, capsys):
    """Another model, tokenizer, data or number of packs per step would make it another run."""
    identity = {"data": "4f1", "packs per step": 2}
    resumed = Settings(str(tmp_path), resume=True, learning_rate=2e-5)

    def refused(cfg, identity):
        with pytest.raises(RankFailure) as refusal:
            open_run(ctx, cfg, identity)
        message = str(refusal.value)
        del refusal
        gc.collect()  # its frames, and with them the lock
        return message

    assert "--resume found no intact checkpoint" in refused(resumed, identity)
    first = open_run(ctx, Settings(str(tmp_path)), identity)
    assert first.checkpoint is None
    del first
    model = load_policy(demo / "base", ctx)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    folder = save_checkpoint(model, optimizer, scheduler, ctx, tmp_path, 1, {"cursor": 4})
    assert "already holds a run; add --resume" in refused(Settings(str(tmp_path)), identity)
    other_packs = refused(resumed, {**identity, "packs per step": 1})
    assert "(packs per step: 2 then, 1 now); restore it, or start a new run" in other_packs
    other_template = refused(resumed, {**identity, "template": "new"})
    assert "(template: None then, 'new' now)" in other_template
    capsys.readouterr()
    (tmp_path / "checkpoints/step-000009.tmp").mkdir()
    run = open_run(ctx, resumed, identity)
    assert run.checkpoint == folder and list(folder.parent.iterdir()) == [folder]
    assert "changed settings (learning_rate: 1e-05 then, 2e-05 now)\n" in capsys.readouterr().err
    assert load_checkpoint(model, optimizer, scheduler, ctx, folder)["cursor"] == 4
    del run
    assert open_run(ctx, resumed, identity).checkpoint == folder
    assert not capsys.readouterr().err  # nothing has changed since


FREEZES = """
import os, signal
import model
def freezing(function, when=lambda arguments: True):
    def wrapper(*arguments, **options):
        if os.environ["RANK"] == "1" and when(arguments):
            os.kill(os.getpid(), signal.SIGSTOP)
        return function(*arguments, **options)
    return wrapper
{patch}
import train_sft
if __name__ == "__main__":
    model.run_main(train_sft.main, train_sft.SFTConfig)
"""


WAITED = (r"script.py: rank 0 has waited 0:00:12 \(--timeout_minutes\) .*Ranks 1 failed .*"
          r"start the run again with --resume\n")


@pytest.mark.parametrize(("patch", "said"), [
    ("freezing(print)()", r"script.py: rank 0 has waited 0:00:12 for another to start: the one "
                          r"whose number ends this line \(.*/1\)\n"),
    ("model.load_policy = freezing(model.load_policy)", WAITED),
    ("model.RunLog.write = freezing(model.RunLog.write, lambda row: row[1]['step'] == 3)", WAITED),
], ids=["before it starts", "while it loads", "in a step"])
def test_a_rank_that_freezes_is_named(patch, said, tmp_path, demo, rows):
    (tmp_path / "script.py").write_text(FREEZES.format(patch=patch))
    arguments = flags(demo, rows, tmp_path / "run", timeout_minutes=0.2)
    program = Program(tmp_path, arguments, script=tmp_path / "script.py", PYTHONPATH=str(ROOT))
    program.say(said)
    # In one line: torchrun's own traceback is the only one.
    assert program.text.count("Traceback") == program.text.count("ChildFailedError") / 2 == 1


TIMEOUTS = """
import os, signal, time, torch
import torch.distributed as dist
from model import RankFailure, exit_process, setup_distributed, wait_for_all_ranks
ctx = setup_distributed(0.1, shard_size=1)
assert ctx.mesh.shape == (2, 1) and ctx.mesh.mesh_dim_names == ("replicate", "shard")
if ctx.rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
started = time.monotonic()
try:
    dist.all_reduce(torch.ones(1), group=ctx.mesh.get_group("replicate"))
except RuntimeError:
    print("collective", time.monotonic() - started)
try:
    wait_for_all_ranks(ctx)
except RankFailure as error:
    print("barrier", time.monotonic() - started, error)
exit_process(1)
"""


def test_groups_of_hybrid_sharding_keep_to_the_timeout(tmp_path):
    (tmp_path / "script.py").write_text(TIMEOUTS)
    program = Program(tmp_path, [], script=tmp_path / "script.py", PYTHONPATH=str(ROOT))
    program.say("barrier .*Ranks 1 failed")
    seconds = {name: float(re.search(rf"{name} (\S+)", program.text)[1])
               for name in ("collective", "barrier")}
    assert 5 < seconds["collective"] < 9 and seconds["barrier"] < 16, program.text


FAILS = """
from dataclasses import dataclass
from model import raise_on_all_ranks, run_main, setup_distributed
@dataclass
class Config:
    first_rank: int = 0
    error: str = ""
def main(cfg):
    ctx = setup_distributed(2)
    if cfg.error == "KeyError" and ctx.rank == cfg.first_rank:
        raise KeyError("a defect")
    with raise_on_all_ranks(ctx, "reading the data"):
        if ctx.rank >= cfg.first_rank:
            raise OSError("no such disk")
if __name__ == "__main__":
    run_main(main, Config)
"""


@pytest.mark.parametrize("first_rank", [0, 1], ids=["both", "one"])
def test_what_all_ranks_have_to_say_is_said_once(first_rank, tmp_path):
    """A failure of one rank ends all of them, in one line."""
    (tmp_path / "script.py").write_text(FAILS)
    program = Program(tmp_path, ["--first_rank", str(first_rank)], script=tmp_path / "script.py",
                      PYTHONPATH=str(ROOT))
    assert program.end() == [1]
    said = f"script.py: reading the data failed on rank {first_rank}: OSError: no such disk\n"
    assert program.text.count("no such disk") == program.text.count(said) == 1, program.text


def test_a_defect_of_one_rank_ends_all_and_is_in_torchruns_table(tmp_path):
    (tmp_path / "script.py").write_text(FAILS)
    arguments = ["--error", "KeyError", "--first_rank", "1"]
    program = Program(tmp_path, arguments, script=tmp_path / "script.py", PYTHONPATH=str(ROOT))
    assert program.end(120) == [1]
    table = program.text[program.text.index("Failures:"):]
    assert re.search(r"rank +: 1 .*KeyError: 'a defect'", table, re.DOTALL), program.text


def test_weights_leave_the_sync_folder_however_a_run_ends(tmp_path, ctx):
    from rollout import clean_sync_folder

    with clean_sync_folder(str(tmp_path), "runs/x", ctx) as folder:
        left = folder / "version-000003"
    left.mkdir(parents=True)  # by a run that was killed
    with pytest.raises(ZeroDivisionError), clean_sync_folder(str(tmp_path), "runs/x", ctx):
        assert not left.exists()
        left.mkdir(parents=True)
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


TWO_MACHINES_SCRIPT = """
import hashlib, sys, torch
from pathlib import Path
from model import exit_process, gather_objects, load_policy, save_hf, setup_distributed
from model import shutdown_distributed
if __name__ == "__main__":
    base, folder = sys.argv[1:]
    ctx = setup_distributed(2, shard_size=1)
    model = load_policy(base, ctx)
    folder = Path(folder, f"node-{ctx.rank // ctx.local_world_size}/version-000003")
    fingerprint = save_hf(model, folder, ctx, torch.float32, one_per_node=True, durable=False)
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())]
    everyone = gather_objects(ctx, (fingerprint, digests))
    assert len(digests) >= 3 and everyone[0] == everyone[1], everyone
    shutdown_distributed(ctx)
    exit_process(0)
"""


def test_each_machine_writes_its_own_version_of_the_weights(tmp_path, demo):
    (tmp_path / "script.py").write_text(TWO_MACHINES_SCRIPT)
    done = run_script(tmp_path / "script.py", demo / "base", tmp_path, ranks=2, machines=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all((tmp_path / f"node-{n}/version-000003/config.json").is_file() for n in (0, 1))


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, demo, rows, unbroken):
    with small_disk(tmp_path / "disk", "16m") as disk:  # one checkpoint has 10 MB
        program = Program(tmp_path, flags(demo, rows, disk / "run", save_total_limit=0))
        assert program.end() != [0]
        assert re.search(r"train_sft.py: saving \S+step-000004 failed .* 0.00 GB are free on the "
                         r"disk of --output_dir. Earlier checkpoints are untouched: \[2\]",
                         program.text), program.text[-3000:]
        assert checkpoint_steps(disk / "run") == [2]
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        arguments = flags(demo, rows, disk / "run", save_total_limit=1, resume=True)
        done = run_script("train_sft.py", *arguments, ranks=2)
        assert done.returncode == 0, done.stderr[-3000:]
        assert losses(disk / "run") == pytest.approx(losses(unbroken), rel=1e-5)


@pytest.mark.parametrize("one_per_node", [False, True], ids=["final", "published weights"])
def test_a_full_disk_for_a_model_folder_is_named(one_per_node, tmp_path, demo, ctx):
    model = load_policy(demo / "base", ctx)
    with small_disk(tmp_path / "disk", "2m") as disk:
        with pytest.raises(RankFailure, match=r"folder \(is its disk full\?\) failed on rank 0"):
            save_hf(model, disk / "folder", ctx, torch.float32, one_per_node=one_per_node)
        assert not (disk / "folder").exists()


ENGINE_SCRIPT = """
import json, sys, psutil, shutil, torch
from pathlib import Path
import data, model, rollout
if __name__ == "__main__":
    base, folder = sys.argv[1:]
    ctx = model.setup_distributed(5)
    policy = model.load_policy(base, ctx)
    engine = rollout.Engine(base, max_model_len=128, dtype="float32",
                            log_file=folder + "/engine.log")
    token_ids, save_hf, last = list(range(10, 60)), rollout.save_hf, None
    probe = {"token_ids": token_ids, "tolerance": 1e-3,
             "batch": data.collate([{"ids": torch.tensor(token_ids).numpy()}], columns=())}

    def truncate(file):
        file.write_bytes(file.read_bytes()[:-5000])

    def flip(file):
        content = bytearray(file.read_bytes())
        content[-2997] ^= 64  # an exponent's highest bit; low bits are below the probe's tolerance
        file.write_bytes(content)

    faults = {"none": lambda file: None, "truncated": truncate, "deleted": Path.unlink,
              "folder deleted": lambda file: shutil.rmtree(file.parent), "flipped": flip,
              "none again": lambda file: None}
    with rollout.clean_sync_folder(folder, folder + "/out", ctx) as sync:
        for version, (name, fault) in enumerate(faults.items()):
            def damaged(policy, published, *arguments, **options):
                fingerprint = save_hf(policy, published, *arguments, **options)
                fault(next(Path(published).glob("*.safetensors")))
                return fingerprint
            rollout.save_hf = damaged
            try:
                last = rollout.sync_weights(policy, engine, ctx, sync, version, probe, last)
                print(json.dumps([name, "accepted"]), flush=True)
            except model.RankFailure as error:
                print(json.dumps([name, str(error)]), flush=True)
            if version == 0:
                child = psutil.Process(engine.pid)
                tree = [child, *child.children(recursive=True)]
                found = [(c.status, c.laddr.ip) for p in tree
                         for c in p.net_connections(kind="inet") if c.laddr]
                print(json.dumps(["sockets", found]), flush=True)
    print(json.dumps(["restarts", engine.restarts]))
    engine.close()
    model.exit_process(0)
"""


def test_damaged_weights_never_reach_a_sample_and_engines_listen_on_loopback_only(tmp_path, demo):
    (tmp_path / "script.py").write_text(ENGINE_SCRIPT)
    done = run_script(tmp_path / "script.py", demo / "base", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    said = dict(map(json.loads, done.stdout.strip().splitlines()))
    assert said["none"] == said["none again"] == "accepted"
    for fault in ("truncated", "deleted", "folder deleted", "flipped"):
        reason = "do not hold the same weights" if fault == "flipped" else "intact"
        assert reason in said[fault] and "\n" not in said[fault], said[fault]
    assert said["restarts"] == 0  # the disk's fault: restarts would cost minutes and cure nothing
    assert all(ip in ("127.0.0.1", "::1") for _, ip in said["sockets"]), said["sockets"]


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
    with pytest.raises(RankFailure, match="pickled .bin weights are not read"):
        load_policy(folder, ctx)
    config = json.loads((folder / "config.json").read_text())
    (folder / "own.py").write_text(
        code + "from transformers import Qwen2Config as Own\n"
        "from transformers import PreTrainedTokenizerFast as OwnTokenizer\n")
    own = {**config, "model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(own))
    with pytest.raises(ValueError, match="not a model config that transfor") as refused:
        load_config(folder)
    assert "\n" not in str(refused.value)
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    own = {**settings, "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    try:
        load_tokenizer(folder)
    except ValueError as error:
        assert "\n" not in str(error)
    assert not trap.exists()


FORBIDDEN_CALLS = (
    "time.time", "datetime.now", "eval", "exec", "torch.load", "pickle.load", "pickle.loads")


def test_deadlines_use_a_steady_clock_and_nothing_trusts_code():
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert name not in FORBIDDEN_CALLS, (path, node.lineno)
            for keyword in getattr(node, "keywords", []):
                if keyword.arg == "trust_remote_code":
                    trusted = ast.unparse(keyword.value)
                    assert trusted in ("False", "trust_remote_code"), (path, node.lineno)


def test_a_rank_without_its_torchrun_leaves():
    """torchrun died before the rank could ask for its death signal: nobody serves the store."""
    env = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "localhost", "RANK": "0",
           "WORLD_SIZE": "2", "MASTER_PORT": str(free_port())}
    done = run(sys.executable, "-c", "import model; model.setup_distributed(60)", timeout=60, **env)
    assert done.returncode == 1 and "Connection refused" in done.stderr, done.stderr


def test_a_stale_lock_file_of_a_dead_run_stops_nobody(tmp_path, ctx):
    (tmp_path / ".lock").write_text("")
    assert open_run(ctx, Settings(str(tmp_path)), {}).checkpoint is None
    assert (tmp_path / "config.json").is_file()
