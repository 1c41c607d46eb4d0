"""
Break training runs on purpose, at random moments, and count what survives.

    python benchmarks/fault_drill.py --sft_rounds 24 --grpo_rounds 18 --seed 0

    1. reference    one undisturbed run of each trainer: two torchrun ranks, the demo's tiny model,
                    real vLLM for GRPO
    2. round        the same run again; a fault strikes at a random moment (during start-up, or a
                    random while after a random step); the run heals or ends; it is resumed and
                    struck again, until --faults_per_round faults have struck, and is then left to
                    finish. Kinds come from a shuffled deck, so that none is forgotten
    3. verdict      survived: every attempt ended within its deadline, the undisturbed last one with
                    status 0, and no process is left. Equal: SFT losses and final weights bit for
                    bit; GRPO prompts, weights versions and sampled token ids of every step. Work
                    lost: steps trained and not in the checkpoint resumed from

Progress goes to stderr, the table and then one line of JSON to stdout. Faults that fill a disk need
root (they mount a tmpfs of their own) and are left out otherwise. Nothing outside the folder --work
is touched.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]
from make_demo import write_demo  # noqa: E402

from model import (  # noqa: E402
    checkpoint_defect,
    checkpoint_folder,
    checkpoint_steps,
    git_commit,
    read_jsonl,
    versions,
)

ATTEMPT_SECONDS = 400  # a run of a few steps that has not ended by then hangs
REWARD = "def short(completion, answer):\n    return max(0.0, 1 - len(completion) / 40)\n"
# Seconds that ranks wait for one that is frozen. An engine that starts again takes half a minute.
TIMEOUT = {"sft": 30, "grpo": 150}


# --------------------------------------------------------------------------------------------------
# One run: start it, look at its processes, wait for its end
# --------------------------------------------------------------------------------------------------
@dataclass
class Job:
    """One torchrun of a round. output and sync: folders of checkpoints and of published weights."""

    stage: str
    work: Path
    output: Path
    sync: Path
    steps: int
    process: object = None
    log: Path = None
    seen: dict = field(default_factory=dict)  # pid -> psutil.Process of everything it ever started

    def start(self, attempt, resume):
        options = {"system_prompt": "none", "output_dir": self.output,
                   "model_name_or_path": self.work / "demo/base", "max_steps": self.steps,
                   "learning_rate": "1e-3", "activation_checkpointing": "none",
                   "timeout_minutes": TIMEOUT[self.stage] / 60}
        if self.stage == "sft":
            options |= {"dataset": self.work / "rows.jsonl", "chat_template": "tokenizer",
                        "max_length": 512, "gradient_accumulation_steps": 1,
                        "cache_dir": self.work / "cache", "save_steps": 3}
        else:
            options |= {"dataset": self.work / "demo/rl.jsonl", "max_prompt_length": 128,
                        "max_completion_length": 48, "beta": 0, "num_prompts_per_step": 4,
                        "num_generations": 4, "top_p": 1, "min_p": 0, "save_steps": 1,
                        "learning_rate": "1e-5", "sync_dir": self.sync,
                        "reward_funcs": f"{self.work / 'reward.py'}:short",
                        "request_timeout": 60}
        flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        self.log = self.work / f"{self.output.parent.name}-{attempt}.log"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
                   "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0",
                   str(ROOT / f"train_{self.stage}.py"), *flags, *["--resume", "True"] * resume]
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=env,
                                            start_new_session=True)

    def children(self, role):
        """role: rank, engine (the child, not its guard) or worker (of the grading pool)."""
        try:
            ranks = psutil.Process(self.process.pid).children()
            found = ranks if role == "rank" else [c for rank in ranks for c in rank.children()]
            everything = psutil.Process(self.process.pid).children(recursive=True)
            self.seen.update({p.pid: p for p in everything})
            words = {"rank": f"train_{self.stage}.py", "engine": "--serve", "worker": "--worker"}
            word = words[role]
            return [p for p in found if any(word in part for part in p.cmdline())]
        except psutil.NoSuchProcess:
            return []

    def metrics(self):
        path = self.output / "metrics.jsonl"
        return read_jsonl(path) if path.exists() else []

    def last_step(self):
        rows = self.metrics()
        return rows[-1]["step"] if rows else 0

    def wait(self):
        """Exit status, or None after killing a run that hangs."""
        deadline = time.monotonic() + ATTEMPT_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            self.children("rank")
            time.sleep(0.5)
        hung = self.process.poll() is None
        if hung:
            for process in [*self.seen.values(), psutil.Process(self.process.pid)]:
                if process.is_running():
                    process.kill()
        self.process.wait()
        return None if hung else self.process.returncode

    def orphans(self, seconds=60):
        """Processes of the run that are alive `seconds` after torchrun's end; they are killed."""
        deadline = time.monotonic() + seconds
        left = [p for p in self.seen.values() if alive(p)]
        while left and time.monotonic() < deadline:
            time.sleep(0.2)
            left = [p for p in left if alive(p)]
        for process in left:
            process.kill()
        return left


def alive(process):
    try:
        # containers reap no orphans
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --------------------------------------------------------------------------------------------------
# Faults: each gets the job and a random generator; True when it has struck
# --------------------------------------------------------------------------------------------------
def strike(role, *signals):
    def fault(job, rng):
        victims = [psutil.Process(job.process.pid)] if role == "torchrun" else job.children(role)
        if not victims:
            return False
        victim = rng.choice(victims)
        for i, number in enumerate(signals):
            try:
                victim.send_signal(number)
            except psutil.NoSuchProcess:
                return i > 0  # it ended by itself, or by the first of two signals
            time.sleep(0.05)
        return True
    return fault


def suspend_job(job, rng):
    """What a batch system does to a job it suspends: every process stops for a while."""
    launcher = psutil.Process(job.process.pid)
    stopped = [launcher, *launcher.children(recursive=True)]
    if not job.children("rank"):
        return False
    for number, pause in ((signal.SIGSTOP, 10), (signal.SIGCONT, 0)):
        for process in stopped:
            if alive(process):
                process.send_signal(number)
        time.sleep(pause)
    return True


def damage(path, how, rng):
    """Truncate a file, flip one of its bits, or delete it."""
    size = path.stat().st_size
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        os.truncate(path, rng.randrange(size))
    else:
        with open(path, "r+b") as file:
            at = rng.randrange(size)
            file.seek(at)
            byte = file.read(1)[0] ^ (1 << rng.randrange(8))
            file.seek(at)
            file.write(bytes([byte]))


def damage_checkpoint(how):
    """Everything is killed, as by a power cut, and a file of the newest checkpoint is damaged."""
    def fault(job, rng):
        steps = checkpoint_steps(job.output)
        if not steps or not job.children("rank"):
            return False
        for process in [psutil.Process(job.process.pid), *job.seen.values()]:
            if alive(process):
                process.kill()
        newest = checkpoint_folder(job.output, steps[-1])
        files = [path for path in newest.iterdir() if path.stat().st_size]
        damage(rng.choice(sorted(files)), how, rng)
        return True
    return fault


def damage_weights(how):
    """A file of the newest weights version: before, while or after the engines read it."""
    def fault(job, rng):
        files = sorted(job.sync.rglob("*.safetensors"))
        if not files or not job.children("rank"):
            return False
        try:
            damage(files[-1], how, rng)
        except FileNotFoundError:
            return False  # the run has just removed this version
        return True
    return fault


def fill_disk(job, rng):
    """No byte is left for checkpoints and weights until the run has ended, or for half a minute."""
    if not os.path.ismount(job.output.parent) or not job.children("rank"):
        return False
    ballast = job.output.parent / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * (1 << 16))
        except OSError:
            pass
    deadline = time.monotonic() + 30
    while job.process.poll() is None and time.monotonic() < deadline:
        job.children("rank")
        time.sleep(0.2)
    ballast.unlink()
    return True


COMMON = {
    "SIGKILL of a rank": strike("rank", signal.SIGKILL),
    "SIGTERM of a rank": strike("rank", signal.SIGTERM),
    "SIGSTOP of a rank": strike("rank", signal.SIGSTOP),
    "SIGKILL of torchrun": strike("torchrun", signal.SIGKILL),
    "SIGTERM of torchrun": strike("torchrun", signal.SIGTERM),
    "SIGINT of torchrun": strike("torchrun", signal.SIGINT),
    "SIGINT twice": strike("rank", signal.SIGINT, signal.SIGINT),
    "job suspended": suspend_job,
    "power cut, checkpoint truncated": damage_checkpoint("truncate"),
    "power cut, checkpoint bit flipped": damage_checkpoint("flip"),
    "power cut, checkpoint file deleted": damage_checkpoint("delete"),
    "disk full": fill_disk}
FAULTS = {"sft": COMMON, "grpo": COMMON | {
    "SIGKILL of an engine": strike("engine", signal.SIGKILL),
    "SIGSTOP of an engine": strike("engine", signal.SIGSTOP),
    "SIGKILL of a grading worker": strike("worker", signal.SIGKILL),
    "weights deleted": damage_weights("delete"),
    "weights truncated": damage_weights("truncate"),
    "weights bit flipped": damage_weights("flip")}}


# --------------------------------------------------------------------------------------------------
# Results
# --------------------------------------------------------------------------------------------------
def result_of(job):
    """What must be equal: losses and weights (SFT); prompts, versions and sampled ids (GRPO)."""
    from safetensors.torch import load_file

    if job.stage == "grpo":
        keys = ("row", "version", "sample_index", "token_ids")
        files = [job.output / f"rollouts/step-{s:06d}.jsonl" for s in range(1, job.steps + 1)]
        return [[{key: row[key] for key in keys} for row in read_jsonl(file)] for file in files]
    weights = {}
    for file in sorted((job.output / "final").glob("*.safetensors")):
        weights |= {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}
    return [[row["step"], row["loss"]] for row in job.metrics()], weights


def complete(job):
    return (job.output / "final/config.json").exists() and job.last_step() == job.steps


def wait_for_moment(job, rng, first_step, startup):
    """
    Sleep until a random moment: one time in four during start-up, else a while after a random step.

    A step in the first half of what is left, so that the round's later faults meet a run, too.
    """
    if rng.random() < 0.25:
        time.sleep(rng.uniform(0, startup))
        return
    step = rng.randint(first_step, (first_step + job.steps) // 2)
    deadline = time.monotonic() + ATTEMPT_SECONDS
    while job.last_step() < step and job.process.poll() is None and time.monotonic() < deadline:
        job.children("rank")
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 1.5))


def play_round(stage, number, first, args, rng, reference, startup, work):
    """One round, from card `first` of the deck on; returns a list of dicts, one per fault."""
    disk = work / f"{stage}-{number}"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)],
                             capture_output=True, check=False).returncode == 0
    steps_of = {"sft": args.sft_steps, "grpo": args.grpo_steps}
    job = Job(stage, work, disk / "run", disk, steps_of[stage])
    kinds = [kind for kind in FAULTS[stage] if mounted or kind != "disk full"]
    random.Random(f"{args.seed}/{stage}").shuffle(kinds)
    faults, attempt, note = [], 0, ""
    while not note:
        steps = checkpoint_steps(job.output)
        if attempt and complete(job):
            break
        job.start(attempt, resume=bool(steps))
        attempt += 1
        fault, struck = None, False
        if len(faults) < args.faults_per_round:
            wait_for_moment(job, rng, steps[-1] if steps else 0, startup)
            kind = kinds[(first + len(faults)) % len(kinds)]
            while job.process.poll() is None and not (struck := FAULTS[stage][kind](job, rng)):
                time.sleep(0.2)  # not possible yet: no rank, no checkpoint, no engine
            if job.process.poll() is None or struck:
                fault = {"kind": kind, "at_step": job.last_step(), "lost": 0}
                faults.append(fault)
        code = job.wait()
        if orphans := job.orphans():
            note = f"{len(orphans)} processes outlived the run"
        if code is None:
            note = f"attempt {attempt} hung for {ATTEMPT_SECONDS} s"
        elif fault is None and code != 0:
            note = f"attempt {attempt} ended with status {code} though nothing struck"
        if fault is not None and not complete(job):
            intact = [s for s in checkpoint_steps(job.output)
                      if not checkpoint_defect(checkpoint_folder(job.output, s))]
            fault["lost"] = job.last_step() - (intact[-1] if intact else 0)
            if not intact:  # a person removes what is damaged and starts from the beginning
                shutil.rmtree(job.output, ignore_errors=True)
        if attempt > args.faults_per_round + 3:
            note = f"not done after {attempt} attempts"
    equal = not note and result_of(job) == reference
    if not note and not equal:
        note = "result differs"
        shutil.copytree(job.output, work / f"differs-{stage}-{number}")
    if mounted:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    for fault in faults:
        fault |= {"stage": stage, "survived": not note or equal, "equal": equal, "note": note,
                  "round": number}
    return faults


def table(faults):
    lines = ["| stage | fault | injected | survived | steps lost (mean, max) | equal |",
             "|---|---|---|---|---|---|"]
    groups = defaultdict(list)
    for fault in faults:
        groups[fault["stage"], fault["kind"]].append(fault)
    groups = dict(sorted(groups.items(), key=lambda item: (item[0][0] != "sft", item[0][1])))
    for (stage, kind), members in [*groups.items(), (("all", ""), faults)]:
        lost = [f["lost"] for f in members] or [0]
        survived, equal = (sum(f[key] for f in members) for key in ("survived", "equal"))
        lines.append(f"| {stage} | {kind} | {len(members)} | {survived} "
                     f"| {sum(lost) / len(lost):.1f}, {max(lost)} | {equal} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft_rounds", type=int, default=24)
    parser.add_argument("--grpo_rounds", type=int, default=18)
    parser.add_argument("--faults_per_round", type=int, default=3,
                        help="struck one after the other on the same run")
    parser.add_argument("--sft_steps", type=int, default=40)
    parser.add_argument("--grpo_steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=0,
                        help="start no new round after so many; 0: play all")
    parser.add_argument("--work", default="",
                        help="folder for runs and logs; default: a new one in /tmp, kept")
    args = parser.parse_args()
    work = Path(args.work or tempfile.mkdtemp(prefix="fault_drill_"))
    work.mkdir(parents=True, exist_ok=True)
    write_demo(work / "demo")
    rows = (work / "demo/train.jsonl").read_text().splitlines()[:60]
    (work / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (work / "reward.py").write_text(REWARD)

    started, references, startup = time.monotonic(), {}, {}
    rounds = {"sft": args.sft_rounds, "grpo": args.grpo_rounds}
    for stage in [stage for stage, count in rounds.items() if count]:
        job = Job(stage, work, work / f"{stage}-undisturbed/run", work / f"{stage}-undisturbed",
                  args.sft_steps if stage == "sft" else args.grpo_steps)
        job.output.parent.mkdir()
        begin = time.monotonic()
        job.start(0, resume=False)
        while not job.last_step() and job.process.poll() is None:
            time.sleep(0.1)
        startup[stage] = time.monotonic() - begin
        if job.wait() != 0:
            said = job.log.read_text()[-2000:]
            sys.exit(f"the undisturbed {stage} run failed: {job.log}\n{said}")
        references[stage] = result_of(job)
        seconds = time.monotonic() - begin
        print(f"{stage}: first step after {startup[stage]:.0f} s, done after {seconds:.0f} s",
              file=sys.stderr, flush=True)

    # SFT and GRPO rounds alternate, so that --minutes cuts both
    plan = [(stage, i) for stage, count in rounds.items() for i in range(count)]
    plan.sort(key=lambda item: ((item[1] + 0.5) / rounds[item[0]], item[0]))
    faults, done = [], 0
    for stage, number in plan:
        if args.minutes and time.monotonic() - started > 60 * args.minutes:
            break
        rng = random.Random(f"{args.seed}/{stage}/{number}")
        first = sum(fault["stage"] == stage for fault in faults)
        reference, start = references[stage], startup[stage]
        played = play_round(stage, number, first, args, rng, reference, start, work)
        faults, done = faults + played, done + 1
        elapsed = time.monotonic() - started
        kinds = ", ".join(f["kind"] for f in played)
        verdict = (played[0]["note"] or "equal") if played else "nothing struck"
        print(f"round {done}/{len(plan)} {stage}-{number}: {kinds}: {verdict}; "
              f"{elapsed:.0f} s, about {elapsed / done * (len(plan) - done):.0f} s to go",
              file=sys.stderr, flush=True)
    print(table(faults))
    print(json.dumps({
        "rounds": done, "planned_rounds": len(plan), "faults": len(faults), "seed": args.seed,
        "survived": sum(f["survived"] for f in faults), "equal": sum(f["equal"] for f in faults),
        "steps_lost_mean": sum(f["lost"] for f in faults) / max(1, len(faults)),
        "steps_lost_max": max((f["lost"] for f in faults), default=0),
        "minutes": (time.monotonic() - started) / 60,
        "commit": git_commit(), "versions": versions(), "cpus": os.cpu_count(),
        "notes": sorted({f"{f['stage']}-{f['round']}: {f['note']}" for f in faults if f["note"]})}))


if __name__ == "__main__":
    main()
