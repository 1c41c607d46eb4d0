"""Every accepted kind of model against transformers' own forward; others refused in one line."""

import copy

import numpy as np
import pytest
import torch
import transformers

import data
import model as model_module
from model import (
    ARCHITECTURES,
    FREE_SETTINGS,
    ROPE_TYPES,
    build_policy,
    check_architecture,
    named_weights,
    setup_distributed,
)

# Documents of up to 150 tokens in a model made for 64: what depends on the length has to show.
SMALL = dict(vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             initializer_range=0.1, bos_token_id=None, eos_token_id=1, pad_token_id=0)
LENGTHS = (40, 7, 150)


@pytest.fixture(scope="module")
def ctx():
    context = setup_distributed()
    torch.set_num_threads(1)  # small matrices
    yield context
    torch.distributed.destroy_process_group()


def tiny_config(model_type, **settings):
    """A small config; no window unless asked for (Mistral has one by default)."""
    cls = transformers.CONFIG_MAPPING[model_type]
    no_window = {"sliding_window": None} if model_type == "mistral" else {}
    head_dim = {"head_dim": 16} if hasattr(cls, "head_dim") else {}
    return cls(**{**SMALL, **head_dim, **no_window, **settings})


def compare(config, ctx):
    """
    Largest difference of log-probs, and of gradients relative to each one's norm.

    Ours: three documents in one pack. transformers' own: one at a time. Both in train mode.
    """
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).train()
    ours = build_policy(copy.deepcopy(config), ctx, head_chunk_size=64)
    values = dict(reference.named_parameters())
    assert {name for name, _ in named_weights(ours)} == set(values)
    with torch.no_grad():
        for name, parameter in named_weights(ours):
            values[name].add_(0.05 * torch.randn_like(values[name]))  # biases and norms, too
            parameter.to_local().copy_(values[name])
    rng = np.random.default_rng(0)
    rows = [{"ids": rng.integers(2, 160, n), "mask": np.ones(n)} for n in LENGTHS]
    batch = data.collate(rows)
    mask = batch.pop("mask") > 0
    found = ours(**batch)[0][mask]
    expected = []
    for row in rows:
        ids = torch.from_numpy(row["ids"])
        logits = reference(ids[None], use_cache=False).logits[0, :-1]
        expected.append(logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0])
    expected = torch.cat(expected)
    found.sum().backward()
    expected.sum().backward()
    norms = {name: value.grad.norm() for name, value in values.items()}
    least = 1e-3 * max(norms.values())  # a key's bias without rope has no gradient but noise
    worst = max((p.grad.full_tensor() - values[name].grad).norm() / norms[name].clamp(min=least)
                for name, p in named_weights(ours))
    return float((found - expected).detach().abs().max()), float(worst)


SETTINGS = {  # of what is free, values that are not the default
    "glm4": [{"attention_bias": False, "partial_rotary_factor": 0.25}],
    "granite": [{"embedding_multiplier": 12.0, "residual_multiplier": 0.3,
                 "attention_multiplier": 0.05, "attention_bias": True, "mlp_bias": True}],
    "llama": [{"attention_bias": True, "mlp_bias": True, "head_dim": 24, "hidden_act": "gelu"},
              {"rope_parameters": {
                  "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
                  "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}],
    "mistral": [{"head_dim": 32, "rms_norm_eps": 0.01}],
    "olmo2": [{"attention_bias": True}],
    "phi3": [{"original_max_position_embeddings": 64, "partial_rotary_factor": 0.5}],
    "qwen2": [{"rope_parameters": {"rope_type": "linear", "rope_theta": 1e5, "factor": 3.0}},
              {"sliding_window": 16, "max_window_layers": 2}],
    "qwen3": [{"head_dim": 8, "attention_bias": True, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 16}}],
    "smollm3": [{"no_rope_layers": [1, 0], "attention_bias": True, "mlp_bias": True}],
}


def accepted_cases():
    for name in ARCHITECTURES:
        for settings in ({}, *SETTINGS[name]):
            for tie in (False, True):
                yield pytest.param(name, {**settings, "tie_word_embeddings": tie},
                                   id=f"{name}-{'tied' if tie else 'untied'}-{','.join(settings)}")


@pytest.mark.parametrize(("model_type", "settings"), list(accepted_cases()))
def test_an_accepted_model_is_computed_as_by_transformers(model_type, settings, ctx):
    logprobs, gradients = compare(tiny_config(model_type, **settings), ctx)
    assert logprobs < 2e-5 and gradients < 1e-4


def test_everything_accepted_is_compared():
    assert set(SETTINGS) == set(ARCHITECTURES)
    cases = [case for cases in SETTINGS.values() for case in cases]
    ropes = [case["rope_parameters"]["rope_type"] for case in cases if "rope_parameters" in case]
    assert {*ropes, "default"} == set(ROPE_TYPES)
    # the rest are sizes and ids (SMALL), or are not read any more
    unread = {"no_rope_layer_interval", "use_sliding_window", "pretraining_tp", "use_cache",
              "tie_word_embeddings"}
    compared = set(SMALL) | {name for case in cases for name in case} | unread
    assert FREE_SETTINGS <= compared


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.5}}
LONGROPE = {"original_max_position_embeddings": 32, "rope_parameters": {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8,
    "original_max_position_embeddings": 32, "factor": 2.0}}
WRONG = [("mistral", {"sliding_window": 24}, "sliding_window=24"),
         ("phi3", {"sliding_window": 50}, "sliding_window=50"),
         ("phi3", LONGROPE, "rope_type=longrope"),
         ("qwen2", DYNAMIC, "rope_type=dynamic"),
         ("llama", DYNAMIC, "rope_type=dynamic"),
         ("qwen3", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
          "layer_types=.*sliding_attention"),
         ("phi3", {"resid_pdrop": 0.05}, "resid_pdrop=0.05"),
         ("llama", {"attention_dropout": 0.3}, "attention_dropout=0.3"),
         ("granite", {"logits_scaling": 6.0}, "logits_scaling=6.0")]


@pytest.mark.parametrize(("model_type", "settings", "reason"), WRONG)
def test_what_would_be_computed_wrongly_is_refused(model_type, settings, reason, ctx, monkeypatch):
    config = tiny_config(model_type, **settings)
    line = rf"^model type {model_type} with {reason}.* is not supported: .* only$"
    with pytest.raises(ValueError, match=line):
        check_architecture(config)
    monkeypatch.setattr(model_module, "check_architecture", lambda config: None)
    assert compare(config, ctx)[0] > 1e-2  # and the comparison sees it


def test_dropout_that_transformers_does_not_apply_is_refused_too():
    with pytest.raises(ValueError, match="phi3 with embd_pdrop=0.2 is not supported"):
        check_architecture(tiny_config("phi3", embd_pdrop=0.2))


@pytest.mark.parametrize("model_type", [
    "phi", "gemma", "gemma2", "gemma3_text", "cohere", "stablelm", "nemotron", "ministral", "olmo3",
    "deepseek_v3", "mixtral", "qwen2_moe", "gpt2", "nanochat", "falcon"])
def test_other_architectures_are_refused_by_name(model_type):
    config = transformers.CONFIG_MAPPING[model_type]()
    line = f"^model type {model_type} is not supported: .* qwen3, smollm3$"
    with pytest.raises(ValueError, match=line):
        check_architecture(config)


def test_a_setting_that_is_new_in_transformers_is_refused(monkeypatch):
    class Llama(transformers.LlamaConfig):
        def to_dict(self):
            return {**super().to_dict(), "attention_chunk": getattr(self, "attention_chunk", None)}

    check_architecture(Llama())
    config = Llama()
    config.attention_chunk = 128
    with pytest.raises(ValueError, match="attention_chunk=128"):
        check_architecture(config)


def test_real_configs_are_accepted():
    """As published: fields that the class does not know, a window that is switched off."""
    check_architecture(transformers.Qwen2Config(
        hidden_size=5120, num_hidden_layers=48, sliding_window=131_072, use_sliding_window=False,
        use_mrope=False, unsloth_fixed=True, torch_dtype="bfloat16"))
    llama3 = {"rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0,
              "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
    check_architecture(transformers.LlamaConfig(pretraining_tp=2, rope_scaling=llama3))
