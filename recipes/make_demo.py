"""
The demo's starting point: chained arithmetic with R1-like redundancy, a tokenizer, a random model.

    python recipes/make_demo.py --output DIR [--seed N]

DIR/base is the model folder, DIR/train.jsonl the traces of stage 1, DIR/rl.jsonl the problems of
stage 2, DIR/test.jsonl those held out. The seed is that of the weights; the rows never change.
"""

import argparse
import json
import random
from pathlib import Path

SPLITS = {"train": (2400, 1), "rl": (1600, 2), "test": (200, 3)}  # rows, seed
MODULUS = 10


def demo_problem(rng):
    """(problem, one pass of the trace, its last variable, answer): 2 to 5 steps, modulo 10."""
    names = "abcdef"[:rng.randint(3, 6)]
    value = rng.randint(0, 9)
    given, passed = [f"a={value}"], [f"a={value}"]
    for before, name in zip(names, names[1:], strict=False):
        operation, number, left = rng.choice("+-"), rng.randint(1, 4), value
        value = (left + number if operation == "+" else left - number) % MODULUS
        given.append(f"{name}={before}{operation}{number}")
        # Restated, filled in, computed: a tiny model learns copy, look up and add one by one.
        passed.append(f"{name}={before}{operation}{number}={left}{operation}{number}={value}")
    problem = f"Let {', '.join(given)}. Find {names[-1]} mod {MODULUS}."
    return problem, ", ".join(passed), names[-1], value


def demo_generation(rng, steps, target, answer):
    """
    A trace with the redundancy of R1: 0 to 3 re-checks, a box that is not always in the thought.

    Stage 1 learns an accurate but long-winded model from such traces; stage 2 can then find that
    skipping re-checks and boxing early costs nothing.
    """
    checks = rng.choices((0, 1, 2, 3), weights=(1, 4, 4, 1))[0]
    box_inside = rng.random() < 0.7
    thought = [f"Okay, I need to find {target} step by step.", f"{steps}."]
    for _ in range(checks):
        thought += ["Wait, let me double check.", f"{steps}."]
    thought += [f"So \\boxed{{{answer}}}." if box_inside else f"So {target}={answer}."]
    return "<think>\n" + "\n".join(thought) + f"\n</think>\nThe answer is \\boxed{{{answer}}}."


def demo_rows(split):
    """Rows of a split with problem, generation and answer; no two splits share a problem."""
    seen, rows = set(), {}
    for name, (count, seed) in SPLITS.items():  # always all: later splits avoid earlier problems
        rng, rows[name] = random.Random(seed), []
        while len(rows[name]) < count:
            problem, steps, target, answer = demo_problem(rng)
            if problem in seen:
                continue
            seen.add(problem)
            generation = demo_generation(rng, steps, target, answer)
            row = {"problem": problem, "generation": generation, "answer": str(answer)}
            rows[name].append(row)
    return rows[split]


TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}")


def demo_tokenizer():
    """Qwen2's tokenizer (bytes, digits apart) trained on the text of the training rows."""
    import transformers

    text = [row["problem"] + "\n" + row["generation"] for row in demo_rows("train")]
    specials = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = transformers.Qwen2Tokenizer().train_new_from_iterator(
        [one.replace("</think>", "") for one in text], 384,
        new_special_tokens=specials, show_progress=False)
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token = "<|pad|>", "<|end|>", None
    tokenizer.add_tokens(["<think>", "</think>"])  # not special: they survive decoding
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def demo_model(tokenizer, seed):
    """
    A random Qwen2 of 0.8 million parameters.

    initializer_range 0.06 instead of 0.02 is the biggest single lever for a model of this size: it
    learns to copy within a few hundred steps.
    """
    import torch
    import transformers

    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer) + -len(tokenizer) % 16, hidden_size=128, intermediate_size=384,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.06,
        bos_token_id=None, **tokens)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config = transformers.GenerationConfig(**tokens)
    return model


def write_demo(output, seed=0):
    """Write base/ and train, rl, test .jsonl into folder `output`."""
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = demo_tokenizer()
    model = demo_model(tokenizer, seed)
    model.save_pretrained(output / "base")
    tokenizer.save_pretrained(output / "base")
    for split in SPLITS:
        rows = demo_rows(split)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (output / f"{split}.jsonl").write_text(text)
        print(f"{output / split}.jsonl: {len(rows):,} rows")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{output / 'base'}: {parameters:,} parameters, vocabulary {model.config.vocab_size}")


def main():
    parser = argparse.ArgumentParser(
        description="Write the demo's model folder and its three data files.", allow_abbrev=False)
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    args = parser.parse_args()
    write_demo(args.output, args.seed)


if __name__ == "__main__":
    main()
