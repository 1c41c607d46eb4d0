"""Tiny models and data that the tests make themselves; how they start the real programs."""

import json
import multiprocessing
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PYTHONPATH"] = str(ROOT)

from make_demo import write_demo  # noqa: E402


def tiny_config(arch="qwen2", tie=False, vocab_size=336, hidden_size=64, layers=2):
    """A two-layer decoder config; arch: qwen2, qwen3 or llama."""
    import transformers

    cls = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config,
           "llama": transformers.LlamaConfig}[arch]
    extra = {"head_dim": 16} if arch == "qwen3" else {}
    return cls(vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=96,
               num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
               max_position_embeddings=2048, tie_word_embeddings=tie, initializer_range=0.1,
               bos_token_id=None, eos_token_id=1, pad_token_id=0, **extra)


def tiny_model(path, arch="qwen2", tie=False, seed=0, **options):
    """Write a random model's weights into folder `path`; returns transformers' model, for eval."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(arch, tie, **options)).eval()
    model.save_pretrained(path)
    return model


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Folder of the miniature recipe: base/ (model, tokenizer), train, rl and test .jsonl."""
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(demo):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(demo / "base")


def run(*command, timeout=300, **environment):
    """Run a program of this checkout to its end; returns subprocess.CompletedProcess with texts."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True,
                          text=True, timeout=timeout, check=False)


def command_line(script, *flags, ranks=2):
    """A script under a real torchrun with gloo ranks; ranks=1: without torchrun."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", ranks, "--rdzv_backend", "c10d",
                "--rdzv_endpoint", "localhost:0"]
    launcher = launcher if ranks > 1 else []
    return [str(part) for part in (sys.executable, *launcher, ROOT / script, *flags)]


def torchrun(script, *flags, ranks=2, timeout=300):
    """Run a script to its end, see command_line."""
    return run(*command_line(script, *flags, ranks=ranks), timeout=timeout)


# Imports are most of a short run. One process does them; each rank of run_script is a fork of it.
WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload([
    "train_sft", "train_grpo", "evaluate", "datasets", "torch.distributed.checkpoint",
    "torch.distributed.fsdp", "transformers.models.qwen2.modeling_qwen2",
    "transformers.hf_argparser", "torch.distributed.elastic.multiprocessing.errors"])


def run_rank(script, flags, environment, outputs):
    """The fork's side of run_script."""
    for descriptor, path in enumerate(outputs, start=1):
        with open(path, "a") as file:
            os.dup2(file.fileno(), descriptor)
    os.chdir(ROOT)
    os.environ.update(environment)
    tree = Path(script).parent
    if tree != ROOT:  # a patched tree has modules of its own
        sys.path.insert(0, str(tree))
        for module in tree.glob("*.py"):
            sys.modules.pop(module.stem, None)
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")


def start_fork(script, flags, outputs, **environment):
    """Start a script as a fork of WARM; returns its process. outputs: files of stdout, stderr."""
    environment = {name: str(value) for name, value in environment.items()}
    arguments = [str(ROOT / script), list(map(str, flags)), environment, outputs]
    process = WARM.Process(target=run_rank, args=arguments)
    process.start()
    return process


def run_script(script, *flags, ranks=1, machines=1, timeout=300):
    """Like torchrun, without torchrun and imports: for tests of what a program computes or says."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        local = ranks // machines
        world = dict(MASTER_ADDR="localhost", MASTER_PORT=free_port(), WORLD_SIZE=ranks,
                     LOCAL_WORLD_SIZE=local)
        environments = [{**world, "RANK": rank, "LOCAL_RANK": rank % local} if ranks > 1 else {}
                        for rank in range(ranks)]
        processes = [start_fork(script, flags, outputs, **each) for each in environments]
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        if late := [process for process in processes if process.exitcode is None]:
            for process in late:
                process.kill()
            raise subprocess.TimeoutExpired(script, timeout)
        status = max((process.exitcode for process in processes), key=abs)
        texts = [path.read_text() for path in outputs]
    return subprocess.CompletedProcess([script, *flags], status, *texts)


def free_port():
    """Below those that the system gives away by itself, so that nobody takes it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("localhost", port))
            return port


def start(script, *flags, ranks=2, **options):
    """Start a script; returns its subprocess.Popen, stderr within stdout unless options differ."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    return subprocess.Popen(command_line(script, *flags, ranks=ranks), cwd=ROOT, text=True,
                            env={**os.environ, "HF_HUB_OFFLINE": "1"}, **options)


def read_rows(path):
    """The objects of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def wait_for(condition, process=None, seconds=180, said=lambda: ""):
    """
    Return once condition() is true; fail when the subprocess.Popen ends before, or after `seconds`.

    said: a function that returns what the process has printed, for the failure's message.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(said() or (process.stdout and process.stdout.read()[-3000:]))
        assert time.monotonic() < deadline, f"still waiting after {seconds} s: {said()}"
        time.sleep(0.01)
