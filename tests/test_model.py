"""model.py: packed forward, chunked head, sharding, saving. Ranks are real gloo processes under torchrun."""

import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, run, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model as policy_lib
from model import (
    RankFailure,
    checkpoint_defect,
    checkpoint_steps,
    flops_per_pack,
    folder_hash,
    load_policy,
    load_tokenizer,
    matmul_params,
    named_weights,
    newest_checkpoint,
    save_checkpoint,
    save_hf,
    setup_distributed,
)


@pytest.fixture(scope="module")
def ctx():
    context = policy_lib.setup_distributed()
    yield context
    torch.distributed.destroy_process_group()


def random_documents(seed, lengths, vocab_size=336):
    rng = np.random.default_rng(seed)
    return [(rng.integers(2, vocab_size, n), np.append(0, rng.integers(0, 2, n - 1))) for n in lengths]


def packed_loss(model, documents, denominator):
    batch = data.collate(documents)
    mask = batch.pop("mask")
    logprobs, _ = model(**batch)
    return -(logprobs * mask).sum() / denominator


def reference_loss(reference, documents, denominator):
    """transformers' own forward, one document at a time, full logits."""
    total = 0.0
    for ids, mask in documents:
        ids = torch.from_numpy(ids)
        logprobs = reference(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        total = total - (logprobs * torch.from_numpy(mask[1:])).sum()
    return total / denominator


def gradients(model):
    return {n: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()
            for n, p in policy_lib.named_weights(model)}


def assert_close(ours, theirs, tolerance=1e-5):
    for name, gradient in theirs.items():
        scale = gradient.abs().max().clamp(min=1e-12)
        assert ((ours[name] - gradient).abs().max() / scale) < tolerance, name


# ------------------------------------------------------------------------------------------------ against transformers
@pytest.mark.parametrize(("arch", "tie"), [
    ("qwen2", False), ("qwen2", True), ("qwen3", True), ("qwen3", False), ("llama", False)])
def test_packed_loss_and_gradients_are_those_of_transformers(arch, tie, tmp_path, ctx):
    reference = tiny_model(tmp_path, arch, tie)
    model = policy_lib.load_policy(tmp_path, ctx)
    documents = random_documents(0, [5, 40, 1, 17, 64])
    denominator = sum(m.sum() for _, m in documents)
    loss, expected = packed_loss(model, documents, denominator), reference_loss(reference, documents, denominator)
    assert abs(loss.item() / expected.item() - 1) < 1e-5
    loss.backward()
    expected.backward()
    assert_close(gradients(model), {n: p.grad for n, p in reference.named_parameters()})


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_activation_checkpointing_changes_nothing(mode, tmp_path, ctx):
    tiny_model(tmp_path)
    documents = random_documents(1, [30, 20])
    results = []
    for activation_checkpointing in ("none", mode):
        model = policy_lib.load_policy(tmp_path, ctx, activation_checkpointing=activation_checkpointing)
        loss = packed_loss(model, documents, 10)
        loss.backward()
        results.append((loss.item(), gradients(model)))
    assert results[0][0] == results[1][0]
    assert_close(results[1][1], results[0][1], 1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_blocks_change_nothing(tmp_path, ctx):
    tiny_model(tmp_path)
    documents = random_documents(8, [30, 20])
    results = []
    for compile_blocks in (False, True):
        model = policy_lib.load_policy(tmp_path, ctx, activation_checkpointing="full", compile_blocks=compile_blocks)
        loss = packed_loss(model, documents, 10)
        loss.backward()
        results.append((loss.item(), gradients(model)))
    assert abs(results[1][0] / results[0][0] - 1) < 1e-6
    assert_close(results[1][1], results[0][1])


def test_micro_batches_and_order_and_packing_add_up(tmp_path, ctx):
    tiny_model(tmp_path)
    documents = random_documents(2, [11, 29, 7, 33, 20, 2])
    denominator = sum(m.sum() for _, m in documents)
    model = policy_lib.load_policy(tmp_path, ctx)
    found = []
    for split in ([documents], [[d] for d in documents], [documents[3:], [], documents[:3][::-1]]):
        model.zero_grad()
        loss = 0.0
        for micro_batch in split:
            part = packed_loss(model, micro_batch, denominator)
            part.backward()
            loss += part.item()
        found.append((loss, gradients(model)))
    for loss, gradient in found[1:]:
        assert abs(loss / found[0][0] - 1) < 1e-5
        assert_close(gradient, found[0][1])


def test_a_document_does_not_see_its_neighbours(tmp_path, ctx):
    tiny_model(tmp_path)
    model = policy_lib.load_policy(tmp_path, ctx)
    first, second, third = random_documents(3, [25, 31, 12])
    changed = random_documents(4, [25])[0]
    with torch.no_grad():
        one = model(**{k: v for k, v in data.collate([first, second, third]).items() if k != "mask"})[0]
        two = model(**{k: v for k, v in data.collate([changed, second, third]).items() if k != "mask"})[0]
    assert not torch.equal(one[:24], two[:24])
    assert torch.equal(one[25:], two[25:])  # bit for bit


# ------------------------------------------------------------------------------------------------ the chunked head
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_head_equals_the_plain_one_in_fp64(temperature):
    torch.manual_seed(0)
    hidden = torch.randn(37, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(53, 16, dtype=torch.float64, requires_grad=True)
    targets, coefficients = torch.randint(53, (37,)), torch.randn(37, dtype=torch.float64)
    results = []
    for chunk in (None, 1, 8, 64):
        if chunk is None:
            logits = hidden @ weight.T / temperature
            distribution = torch.distributions.Categorical(logits=logits)
            logprobs, entropy = distribution.log_prob(targets), distribution.entropy()
        else:
            logprobs, entropy = policy_lib.token_logprobs(hidden, weight, targets, temperature, chunk)
            assert not entropy.requires_grad
        grads = torch.autograd.grad((logprobs * coefficients).sum(), (hidden, weight))
        results.append((logprobs, entropy, *grads))
    for result in results[1:]:
        for ours, plain in zip(result, results[0], strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_chunked_head_passes_gradcheck():
    torch.manual_seed(1)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, 3, 3, 1])
    assert torch.autograd.gradcheck(lambda h, w: policy_lib.token_logprobs(h, w, targets, 1.3, 2)[0], (hidden, weight))


class LargestTensor(TorchDispatchMode):
    """Counts elements of the largest tensor that any operation creates."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_chunked_head_never_holds_tokens_times_vocabulary():
    tokens, vocabulary, width, chunk = 512, 1000, 8, 32
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    with LargestTensor() as seen:
        targets = torch.randint(vocabulary, (tokens,))
        policy_lib.token_logprobs(hidden, weight, targets, chunk_size=chunk)[0].sum().backward()
    assert seen.largest == chunk * vocabulary


# -------------------------------------------------------------------------------------- load, save
@pytest.mark.parametrize(("arch", "tie"), [
    ("qwen2", True), ("qwen3", True), ("qwen3", False), ("llama", False)])
def test_saved_folder_loads_in_transformers_with_the_same_logits(arch, tie, tmp_path, ctx):
    reference = tiny_model(tmp_path / "in", arch, tie)
    model = load_policy(tmp_path / "in", ctx)
    save_hf(model, tmp_path / "out", ctx, torch.float32)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(2, 50)[None]
    assert torch.equal(loaded(ids).logits, reference(ids).logits)
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob("*.old"))
    save_hf(model, tmp_path / "bf16", ctx, torch.bfloat16)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    rounded = {k: v.to(torch.bfloat16).float() for k, v in reference.state_dict().items()}
    assert all(torch.equal(half.state_dict()[k], v) for k, v in rounded.items())
    ours = named_weights(load_policy(tmp_path / "bf16", ctx))  # fp32 masters of a bf16 file
    assert all(torch.equal(p.full_tensor(), rounded[name]) for name, p in ours)


def test_ids_are_those_of_the_folder_s_tokenizer_file(tmp_path, capsys):
    """AutoTokenizer splits numbers into digits in every qwen2 folder; this file keeps three."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d{1,3}| ?\w+"), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(["102 1024 375"] * 9, trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<e>"], initial_alphabet=alphabet, show_progress=False))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<e>")
    fast.save_pretrained(tmp_path)
    tiny_config("qwen2").save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "again"):
        tokenizer = load_tokenizer(folder)
        assert tokenizer("1024", add_special_tokens=False)["input_ids"] == bpe.encode("1024").ids
        assert tokenizer.eos_token == "<e>" and "using the file" in capsys.readouterr().err
        tokenizer.save_pretrained(tmp_path / "again")
        tiny_config("qwen2").save_pretrained(tmp_path / "again")


def test_fingerprint_follows_the_weights(tmp_path, ctx):
    tiny_model(tmp_path / "in")
    model = load_policy(tmp_path / "in", ctx)
    prints = [save_hf(model, tmp_path / f"v{i}", ctx, torch.float32) for i in range(2)]
    with torch.no_grad():
        model.model.norm.weight.to_local()[3] += 1e-6
    prints.append(save_hf(model, tmp_path / "v2", ctx, torch.float32))
    assert prints[0] == prints[1] != prints[2]


def test_folder_hash_follows_the_weights(tmp_path, ctx):
    """It samples: of a training step, which changes all weights a little, it cannot miss much."""
    tiny_model(tmp_path / "in")
    model = load_policy(tmp_path / "in", ctx)
    for name in ("first", "again"):
        save_hf(model, tmp_path / name, ctx, torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.to_local().mul_(1 + 1e-6)
    save_hf(model, tmp_path / "trained", ctx, torch.float32)
    first, again, trained = (folder_hash(tmp_path / n) for n in ("first", "again", "trained"))
    assert first == again != trained


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_folder_hash_follows_config_tokenizer_and_template(name, tmp_path, demo):
    shutil.copytree(demo / "base", tmp_path / "model")
    (tmp_path / "model" / "notes.md").write_text("not of the model")
    before = folder_hash(tmp_path / "model")
    assert before == folder_hash(demo / "base")
    with open(tmp_path / "model" / name, "a") as file:
        file.write(" ")
    assert folder_hash(tmp_path / "model") != before


def test_masters_are_saved_after_a_forward_without_backward(tmp_path, ctx):
    """Such a forward leaves bf16 copies in place of the fp32 masters until the next backward."""
    reference = tiny_model(tmp_path / "in")
    model = load_policy(tmp_path / "in", ctx, compute_dtype=torch.bfloat16)
    with torch.no_grad():
        packed_loss(model, random_documents(7, [20]), 5)
    save_hf(model, tmp_path / "out", ctx, torch.float32)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(saved[name], value) for name, value in reference.state_dict().items())


def change_weights(change):
    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return damage


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def misshape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))


def lose_a_shard(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    kept = {name: tensor for name, tensor in weights.items() if "layers.1." not in name}
    save_file(kept, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("damage", "message"), [
    (lambda f: (f / "model.safetensors").write_bytes(b"\x00" * 100),
     r"model.safetensors is corrupt .* export it again"),
    (cut_short, r"model.safetensors is corrupt or was cut short .* export it again"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "convert them to safe"),
    (lambda f: (f / "config.json").write_text("{"), "not a model config"),
    (lambda f: (f / "config.json").unlink(), "no config.json"),
    (misshape, r"Size mismatch .*\[64, 96\].*\[64, 32\].* for model.layers.0.mlp"),
    (lambda f: (f / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'),
     "No such file .*model-00002-of-00002.safetensors"),
    (lose_a_shard, r"a file is missing: 12 tensors not found \['model.layers.1"),
    (change_weights(lambda w: w.pop("model.norm.weight")),
     r"1 tensors not found \['model.norm.weight'\]"),
    (change_weights(lambda w: w.update(adapter=torch.ones(2))), r"1 unexpected \['adapter'\]"),
    (lambda f: shutil.copy(f / "model.safetensors", f / "backup.safetensors"),
     "is in .*model.safetensors and in another file beside it; remove"),
])
def test_a_damaged_model_folder_is_one_clear_error(damage, message, tmp_path, ctx):
    tiny_model(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, OSError, RankFailure), match=message) as refused:
        load_policy(tmp_path, ctx)
    assert "\n" not in str(refused.value)


def test_weights_in_another_format_beside_the_model_are_left_alone(tmp_path, ctx):
    """As in Mistral's folders: the same weights once more, under names of their own."""
    reference = tiny_model(tmp_path)
    save_file({"layers.0.attention.wq": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    ours = named_weights(load_policy(tmp_path, ctx))
    assert all(torch.equal(p.full_tensor(), reference.state_dict()[name]) for name, p in ours)


def test_a_cuda_build_without_a_gpu_is_refused(monkeypatch):
    """It would train in fp32 on gloo without a word; the empty string asks for exactly that."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValueError, match="built for CUDA but can use no GPU here; .*CUDA_VISIBLE_DE"):
        setup_distributed()


def test_unsupported_architectures_are_refused():
    config = tiny_config("qwen2")
    policy_lib.check_architecture(config)
    config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="sliding_attention"):
        policy_lib.check_architecture(config)
    config = tiny_config("llama")
    config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="attention_dropout"):
        policy_lib.check_architecture(config)


def test_flops_convention():
    config = tiny_config("qwen2", hidden_size=64, layers=2)
    matmul = 2 * (64 * 16 * (2 * 4 + 2 * 2) + 3 * 64 * 96) + 64 * 336
    assert matmul_params(config) == matmul
    # causal pairs of the same document: half the square, two matmuls, backward twice the forward
    assert flops_per_pack(config, [10, 20]) == 6 * matmul * 30 + 3 * 2 * 2 * 64 * (10**2 + 20**2)


# --------------------------------------------------------------------------------------- two ranks
TWO_RANKS = """
import sys, torch, json
sys.path[:0] = [{root!r}, {tests!r}]
from model import exit_process, load_policy, max_over_ranks, named_weights, save_hf
from model import setup_distributed, sum_over_ranks
from test_model import random_documents, packed_loss, gradients
ctx = setup_distributed(2)
model = load_policy({folder!r}, ctx, activation_checkpointing="full")
largest = max(p.to_local().numel() for _, p in named_weights(model))
documents = random_documents(5, [13, 40, 9, 22, 35, 18, 3])
denominator = sum(m.sum() for _, m in documents)
mine = [documents[:5], documents[5:]] if ctx.world_size == 2 else [documents]
loss = packed_loss(model, mine[ctx.rank], denominator)
loss.backward()
empty = packed_loss(model, [] if ctx.rank == 0 else documents[:1], denominator) * 0
empty.backward()
sums = sum_over_ranks(ctx, {{"loss": loss.item(), "ranks": 1}})
assert sums["ranks"] == ctx.world_size and max_over_ranks(ctx, ctx.rank) == ctx.world_size - 1
grads = gradients(model)
save_hf(model, {out!r} + str(ctx.world_size), ctx, torch.float32)
if ctx.rank == 0:
    torch.save({{"loss": sums["loss"], "grads": grads, "largest": largest,
                 "total": sum(p.numel() for p in model.parameters())}},
               {out!r} + str(ctx.world_size) + ".pt")
exit_process(0)
"""


@pytest.mark.parametrize(("arch", "tie"), [("qwen2", True), ("llama", False)])
def test_two_ranks_equal_one(arch, tie, tmp_path):
    reference = tiny_model(tmp_path / "model", arch, tie)
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS.format(
        root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path / "model"),
        out=str(tmp_path / "world")))
    for ranks in (1, 2):
        done = run(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks,
                   "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", script)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"world{n}.pt") for n in (1, 2))
    assert abs(two["loss"] / one["loss"] - 1) < 1e-5
    assert_close(two["grads"], one["grads"])
    assert two["largest"] <= math.ceil(one["largest"] / 2) + 64  # every rank holds its rows only
    for n in (1, 2):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"world{n}").state_dict()
        assert all(torch.equal(v, loaded[k]) for k, v in reference.state_dict().items())
    assert len(list((tmp_path / "world2").glob("*.safetensors"))) == 2


@pytest.mark.parametrize(("status", "said"), [(0, ["registered", "unflushed"]), (3, ["unflushed"])])
def test_leaving_does_not_wait_for_the_interpreter(status, said):
    program = ("import atexit, threading, time, model\natexit.register(print, 'registered')\n"
               "threading.Thread(target=time.sleep, args=(600,)).start()\n"
               f"print('unflushed', end=' ')\nmodel.exit_process({status})")
    done = run(sys.executable, "-c", program, timeout=120)
    assert done.returncode == status and sorted(done.stdout.split()) == said, done.stderr


FAILING_RUN = """
import os, signal, torch
from dataclasses import dataclass
from model import RankFailure, Stopped, run_main, setup_distributed, stop_on_signal
@dataclass
class Config:
    seed: int = 0
def main(cfg):
    ctx = setup_distributed(2)
    try:
        with stop_on_signal(ctx):
            raise {error}
    finally:
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun, while the run cleans up
        print("cleaned up")
run_main(main, Config)
"""


@pytest.mark.parametrize(("error", "status", "said"), [
    ("KeyError('a defect')", 1, "Traceback .*KeyError: 'a defect'$"),
    ("RuntimeError('of torch')", 1, "Traceback .*RuntimeError: of torch$"),
    ("torch.OutOfMemoryError('44 GB')", 1, "Traceback .*OutOfMemoryError: 44 GB\nLess memory .*"),
    ("ValueError('--flag 3: no')", 1, "-c: --flag 3: no"), ("OSError('no disk')", 1, "-c: no disk"),
    ("FloatingPointError('loss nan')", 1, "-c: loss nan"), ("RankFailure('r')", 1, "-c: r"),
    ("Stopped('saved')", 143, "-c: saved"), ("KeyboardInterrupt('again')", 130, "-c: again")])
def test_how_a_run_ends_that_fails(error, status, said):
    """What a user can mend is one line, anything else a traceback; both after the clean-up."""
    done = run(sys.executable, "-c", FAILING_RUN.format(error=error))
    assert done.returncode == status and done.stdout == "cleaned up\n", done.stderr
    assert re.fullmatch(said, done.stderr.strip(), re.DOTALL), done.stderr


def test_damaged_checkpoints_are_seen(tmp_path, ctx, capsys):
    tiny_model(tmp_path / "model")
    model = load_policy(tmp_path / "model", ctx)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1.0)
    packed_loss(model, random_documents(6, [20]), 5).backward()
    optimizer.step()
    for step in (1, 2, 3, 4):
        folder = save_checkpoint(
            model, optimizer, scheduler, ctx, tmp_path, step, {}, save_total_limit=3)
    assert checkpoint_steps(tmp_path) == [2, 3, 4]
    assert newest_checkpoint(tmp_path, ctx) == folder and not checkpoint_defect(folder)
    shard = next(folder.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1  # one flipped bit
    shard.write_bytes(content)
    assert newest_checkpoint(tmp_path, ctx).name == "step-000003"
    said = capsys.readouterr().err
    assert f"step 4 is damaged ({shard.name} does not match its checksum)" in said
    # Every rank looks at its own share of the files, and no file is left out.
    files = len(json.loads((folder / "manifest.json").read_text()))
    assert sum(bool(checkpoint_defect(folder, rank, files)) for rank in range(files)) == 1
    shutil.rmtree(tmp_path / "checkpoints/step-000003")
    (tmp_path / "checkpoints/step-000002/trainer.json").unlink()
    (tmp_path / "checkpoints/step-000009.tmp").mkdir()  # a half-written one
    assert newest_checkpoint(tmp_path, ctx) is None
