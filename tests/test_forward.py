"""The packed forward and the chunked head on the CPU: exact, independent of packing, small."""

import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_model

import data
from model import (
    LiveBytes,
    flops_per_pack,
    load_policy,
    matmul_params,
    named_weights,
    setup_distributed,
    token_logprobs,
)


@pytest.fixture(scope="module")
def ctx():
    context = setup_distributed()
    torch.set_num_threads(1)  # small matrices
    yield context
    torch.distributed.destroy_process_group()


def random_rows(seed, lengths, vocab_size=336):
    rng = np.random.default_rng(seed)
    return [{"ids": rng.integers(2, vocab_size, n), "mask": np.append(0, rng.integers(0, 2, n - 1))}
            for n in lengths]


def packed_logprobs(model, rows):
    batch = data.collate(rows)
    mask = batch.pop("mask")
    return model(**batch)[0], mask


def packed_loss(model, rows, denominator):
    logprobs, mask = packed_logprobs(model, rows)
    return -(logprobs * mask).sum() / denominator


def loss_and_gradients(model, rows, denominator=10):
    loss = packed_loss(model, rows, denominator)
    loss.backward()
    return loss.item(), {name: p.grad.full_tensor().clone() for name, p in named_weights(model)}


def assert_close(ours, theirs, tolerance=1e-5):
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).abs().max()
        assert error < tolerance * gradient.abs().max().clamp(min=1e-12), name


# ----------------------------------------------------------------------------- packs
@pytest.mark.parametrize(("arch", "tie"), [("qwen2", True), ("llama", False)])
def test_packed_loss_of_a_loaded_model_is_that_of_transformers(arch, tie, tmp_path, ctx):
    """One document at a time with full logits; every accepted model is in test_architectures.py."""
    reference = tiny_model(tmp_path, arch, tie)
    rows = random_rows(0, [5, 40, 1, 17, 64])
    loss, gradients = loss_and_gradients(load_policy(tmp_path, ctx), rows)
    expected = 0.0
    for row in rows:
        ids, mask = torch.from_numpy(row["ids"]), torch.from_numpy(row["mask"])
        logprobs = reference(ids[None]).logits[0, :-1].log_softmax(-1)
        expected = expected - (logprobs.gather(1, ids[1:, None])[:, 0] * mask[1:]).sum() / 10
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_close(gradients, {name: p.grad for name, p in reference.named_parameters()})


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_nothing(mode, tmp_path, ctx):
    tiny_model(tmp_path)
    rows = random_rows(1, [30, 20])
    plain = loss_and_gradients(load_policy(tmp_path, ctx), rows)
    ours = loss_and_gradients(load_policy(tmp_path, ctx, activation_checkpointing=mode), rows)
    assert ours[0] == plain[0]
    assert_close(ours[1], plain[1], 1e-6)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_change_nothing(tmp_path, ctx):
    tiny_model(tmp_path)
    rows = random_rows(8, [30, 20])
    options = {"activation_checkpointing": "full"}
    plain = loss_and_gradients(load_policy(tmp_path, ctx, **options), rows)
    ours = loss_and_gradients(load_policy(tmp_path, ctx, compile_blocks=True, **options), rows)
    assert ours[0] == pytest.approx(plain[0], rel=1e-6)
    assert_close(ours[1], plain[1])


def test_micro_batches_and_order_and_packing_add_up(tmp_path, ctx):
    tiny_model(tmp_path)
    rows = random_rows(2, [11, 29, 7, 33, 20, 2])
    model = load_policy(tmp_path, ctx)
    expected, whole = loss_and_gradients(model, rows)
    for split in ([[row] for row in rows], [rows[3:], [], rows[:3][::-1]]):
        model.zero_grad()
        found = [loss_and_gradients(model, micro_batch) for micro_batch in split]
        assert sum(loss for loss, _ in found) == pytest.approx(expected, rel=1e-5)
        assert_close(found[-1][1], whole)  # they add up in the parameters


def test_a_document_does_not_see_its_neighbours(tmp_path, ctx):
    tiny_model(tmp_path)
    model = load_policy(tmp_path, ctx)
    first, second, third = random_rows(3, [25, 31, 12])
    changed = random_rows(4, [25])[0]
    with torch.no_grad():
        one = packed_logprobs(model, [first, second, third])[0]
        two = packed_logprobs(model, [changed, second, third])[0]
    assert not torch.equal(one[:24], two[:24])
    assert torch.equal(one[25:], two[25:])  # bit for bit


# ----------------------------------------------------------------------------- the chunked head
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_head_equals_the_plain_one_in_fp64(temperature):
    torch.manual_seed(0)
    hidden = torch.randn(37, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(53, 16, dtype=torch.float64, requires_grad=True)
    targets, factors = torch.randint(53, (37,)), torch.randn(37, dtype=torch.float64)

    def results(logprobs, entropy):
        gradients = torch.autograd.grad((logprobs * factors).sum(), (hidden, weight))
        return logprobs, entropy, *gradients

    plain = torch.distributions.Categorical(logits=hidden @ weight.T / temperature)
    expected = results(plain.log_prob(targets), plain.entropy())
    for chunk in (1, 8, 64):
        logprobs, entropy = token_logprobs(hidden, weight, targets, temperature, chunk)
        assert not entropy.requires_grad
        torch.testing.assert_close(results(logprobs, entropy), expected, rtol=1e-12, atol=1e-12)


def test_chunked_head_passes_gradcheck():
    torch.manual_seed(1)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, 3, 3, 1])
    assert torch.autograd.gradcheck(
        lambda hidden, weight: token_logprobs(hidden, weight, targets, 1.3, 2)[0], (hidden, weight))


def test_chunked_head_holds_two_chunks_at_most():
    """Logits of a chunk and their softmax; all 512 rows would be 16 chunks."""
    vocabulary, width, chunk = 1024, 8, 32
    hidden = torch.randn(512, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(vocabulary, (512,))
    with LiveBytes(vocabulary) as memory:
        memory.phase = "layer backward"
        logprobs, _ = token_logprobs(hidden, weight, targets, chunk_size=chunk)
        forward = memory.peak["head"]
        logprobs.sum().backward()
    both, weights = 2 * chunk * vocabulary * 4, vocabulary * width * 4
    assert forward <= both + weights  # the weight itself
    assert memory.peak["head"] <= both + 4 * weights  # and its gradients


# ----------------------------------------------------------------------------- cost
def test_flops_convention():
    config = tiny_config("qwen2", hidden_size=64, layers=2)
    matmul = 2 * (64 * 16 * (2 * 4 + 2 * 2) + 3 * 64 * 96) + 64 * 336
    assert matmul_params(config) == matmul
    # causal pairs of the same document: half the square, two matmuls, backward twice the forward
    attention = 3 * 2 * 2 * 64 * (10**2 + 20**2)
    assert flops_per_pack(config, [10, 20]) == 6 * matmul * 30 + attention


def test_max_seqlen_is_the_next_power_of_two():
    """Above the longest document, so that compiled blocks meet a dozen values and not thousands."""
    for lengths, expected in (([1], 1), ([2, 1], 2), ([3, 2], 4), ([64, 5], 64), ([65], 128)):
        assert data.collate(random_rows(0, lengths))["max_seqlen"] == expected
    assert data.collate([])["max_seqlen"] == 1


@pytest.mark.parametrize("tie", [True, False])
def test_padding_of_the_vocabulary_is_outside_the_softmax(tie, tmp_path, ctx):
    plain = tiny_model(tmp_path, "qwen2", tie)
    batch = data.collate(random_rows(5, [20], vocab_size=300), columns=())
    with torch.no_grad():
        ours, _ = load_policy(tmp_path, ctx)(**batch, vocab_size=300)
        logits = plain(input_ids=batch["input_ids"][None]).logits[0, :, :300]
    theirs = logits.log_softmax(-1).gather(1, batch["targets"][:, None])[:, 0]
    assert torch.allclose(ours, theirs, atol=1e-5)
