"""Tiny models and data that the tests make themselves; how they start the real programs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from make_demo import write_demo  # noqa: E402


def tiny_config(arch="qwen2", tie=False, vocab_size=336, hidden_size=64, layers=2):
    """A two-layer decoder config; arch: qwen2, qwen3 or llama."""
    import transformers

    cls = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config,
           "llama": transformers.LlamaConfig}[arch]
    extra = {"head_dim": 16} if arch == "qwen3" else {}
    return cls(vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=96, num_hidden_layers=layers,
               num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=tie,
               initializer_range=0.1, bos_token_id=None, eos_token_id=1, pad_token_id=0, **extra)


def tiny_model(path, arch="qwen2", tie=False, seed=0, **options):
    """Write a random model of arch into folder `path` (weights only) and return the transformers model, fp32, eval."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(arch, tie, **options)).eval()
    model.save_pretrained(path)
    return model


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Folder of the miniature recipe: base/ (model and tokenizer), train.jsonl, rl.jsonl, test.jsonl."""
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(demo):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(demo / "base")


def run(*command, timeout=300, **environment):
    """Run a program of this checkout to its end; returns subprocess.CompletedProcess with text output."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout,
                          check=False)


def command_line(script, *flags, ranks=2):
    """A script under a real torchrun with gloo ranks; ranks=1: without torchrun."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", ranks, "--rdzv_backend", "c10d",
                "--rdzv_endpoint", "localhost:0"]
    return [str(part) for part in (sys.executable, *(launcher if ranks > 1 else []), ROOT / script, *flags)]


def torchrun(script, *flags, ranks=2, timeout=300):
    """Run a script to its end, see command_line."""
    return run(*command_line(script, *flags, ranks=ranks), timeout=timeout)


def start(script, *flags, ranks=2, **options):
    """Start a script and return its subprocess.Popen; stderr goes into stdout unless options say otherwise."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    return subprocess.Popen(command_line(script, *flags, ranks=ranks), cwd=ROOT, text=True,
                            env={**os.environ, "HF_HUB_OFFLINE": "1"}, **options)


def read_rows(path):
    """The objects of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def wait_for(condition, process=None, seconds=180, said=lambda: ""):
    """
    Return once condition() is true; fail when the subprocess.Popen ends before, or when the seconds are over.

    said: a function that returns what the process has printed, for the failure's message.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(said() or (process.stdout and process.stdout.read()[-3000:]))
        assert time.monotonic() < deadline, f"still waiting after {seconds} s: {said()}"
        time.sleep(0.01)
