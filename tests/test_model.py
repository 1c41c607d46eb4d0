"""model.py: load, save, ranks, checkpoints; how a run ends. test_forward.py has the forward."""

import json
import math
import re
import shutil
import sys

import pytest
import torch
import transformers
from conftest import ROOT, run, run_script, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from test_forward import assert_close, packed_loss, random_rows

from model import (
    RankFailure,
    checkpoint_defect,
    checkpoint_steps,
    folder_hash,
    load_policy,
    load_tokenizer,
    named_weights,
    newest_checkpoint,
    save_checkpoint,
    save_hf,
    setup_distributed,
)


@pytest.fixture(scope="module")
def ctx():
    context = setup_distributed()
    yield context
    torch.distributed.destroy_process_group()


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
    layers = model.model.layers
    layers[0].mlp, layers[1].mlp = layers[1].mlp, layers[0].mlp
    prints.append(save_hf(model, tmp_path / "v3", ctx, torch.float32))
    assert prints[0] == prints[1] and len(set(prints)) == 3


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
        packed_loss(model, random_rows(7, [20]), 5)
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
    with pytest.raises(ValueError, match="built for CUDA but can use no GPU here; .*CUDA_VISIBLE"):
        setup_distributed()


# --------------------------------------------------------------------------------------- two ranks
TWO_RANKS = """
import sys, torch
sys.path[:0] = [{root!r}, {tests!r}]
from model import exit_process, load_policy, max_over_ranks, named_weights, save_hf
from model import setup_distributed, sum_over_ranks
from test_forward import loss_and_gradients, packed_loss, random_rows
ctx = setup_distributed(2)
model = load_policy({folder!r}, ctx, activation_checkpointing="full")
largest = max(p.to_local().numel() for _, p in named_weights(model))
rows = random_rows(5, [13, 40, 9, 22, 35, 18, 3])
denominator = sum(row["mask"].sum() for row in rows)
mine = [rows[:5], rows[5:]] if ctx.world_size == 2 else [rows]
empty = packed_loss(model, [] if ctx.rank == 0 else rows[:1], denominator) * 0
empty.backward()
loss, gradients = loss_and_gradients(model, mine[ctx.rank], denominator)
sums = sum_over_ranks(ctx, {{"loss": loss, "ranks": 1}})
assert sums["ranks"] == ctx.world_size and max_over_ranks(ctx, ctx.rank) == ctx.world_size - 1
save_hf(model, {out!r} + str(ctx.world_size), ctx, torch.float32)
if ctx.rank == 0:
    torch.save({{"loss": sums["loss"], "gradients": gradients, "largest": largest}},
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
        done = run_script(script, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"world{n}.pt") for n in (1, 2))
    assert abs(two["loss"] / one["loss"] - 1) < 1e-5
    assert_close(two["gradients"], one["gradients"])
    assert two["largest"] <= math.ceil(one["largest"] / 2) + 64  # every rank holds its rows only
    for n in (1, 2):
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"world{n}")
        saved = saved.state_dict()
        assert all(torch.equal(v, saved[k]) for k, v in reference.state_dict().items())
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
    ("ValueError('--flag 3: no')", 1, "run.py: --flag 3: no"),
    ("OSError('no disk')", 1, "run.py: no disk"),
    ("FloatingPointError('loss nan')", 1, "run.py: loss nan"),
    ("RankFailure('r')", 1, "run.py: r"), ("Stopped('saved')", 143, "run.py: saved"),
    ("KeyboardInterrupt('again')", 130, "run.py: again")])
def test_how_a_run_ends_that_fails(error, status, said, tmp_path):
    """What a user can mend is one line, anything else a traceback; both after the clean-up."""
    (tmp_path / "run.py").write_text(FAILING_RUN.format(error=error))
    done = run_script(tmp_path / "run.py")
    assert done.returncode == status and done.stdout == "cleaned up\n", done.stderr
    assert re.fullmatch(said, done.stderr.strip(), re.DOTALL), done.stderr


def test_damaged_checkpoints_are_seen(tmp_path, ctx, capsys):
    tiny_model(tmp_path / "model")
    model = load_policy(tmp_path / "model", ctx)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1.0)
    packed_loss(model, random_rows(6, [20]), 5).backward()
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
    # Each file is looked at by exactly one rank.
    intact = tmp_path / "checkpoints/step-000003"
    for name in json.loads((intact / "manifest.json").read_text()):
        content = (intact / name).read_bytes()
        (intact / name).write_bytes(content[:-1])
        for ranks in (1, 2, 3):
            assert sum(bool(checkpoint_defect(intact, rank, ranks)) for rank in range(ranks)) == 1
        (intact / name).write_bytes(content)
    shutil.rmtree(tmp_path / "checkpoints/step-000003")
    (tmp_path / "checkpoints/step-000002/trainer.json").unlink()
    (tmp_path / "checkpoints/step-000009.tmp").mkdir()  # a half-written one
    assert newest_checkpoint(tmp_path, ctx) is None
