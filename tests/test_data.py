"""data.py: rows, templates and masks, packing and dealing, the tokenised cache, the demo."""

import itertools
import json
import random
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT, run

import data

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
DEEPSEEK = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
            "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
            "{% else %}{% set c = m['content'] %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}"
            "{% endif %}{{ '<｜Assistant｜>' + c + eos_token }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}"
          "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
          "{% endfor %}{% if add_generation_prompt %}"
          "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")


@pytest.fixture
def make_tokenizer(demo):
    """A byte-level tokenizer with the special tokens of one template family; pad and EOS may be the same token."""
    import transformers
    from tokenizers import Tokenizer

    def make(template, specials, bos=None, eos="<eos>", adds_bos=False):
        backend = Tokenizer.from_file(str(demo / "base" / "tokenizer.json"))
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token=eos, pad_token=eos, bos_token=bos, additional_special_tokens=specials,
            clean_up_tokenization_spaces=False)
        if adds_bos:
            from tokenizers.processors import TemplateProcessing
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
        tokenizer.chat_template = template
        return tokenizer

    return make


TEMPLATES = {
    "chatml": ((CHATML, ["<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
               "<|im_start|>assistant\n", "<|im_end|>", "\n"),
    "deepseek": ((DEEPSEEK, ["<｜User｜>", "<｜Assistant｜>"], "<bos>", "<eos>"),
                 "<｜Assistant｜><think>\n", "<eos>", ""),
    "llama3": ((LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<bos>", "<eos>"),
               "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", ""),
    "open_r1_roles": ((data.OPEN_R1_ROLES, [], None, "<eos>"), "<|assistant|>\n", "<eos>", "\n"),
}


# ------------------------------------------------------------------------------------------------ templates and masks
@pytest.mark.parametrize("name", TEMPLATES)
def test_exactly_the_answer_and_its_end_of_turn_are_trained(name, make_tokenizer):
    arguments, opening, ending, after = TEMPLATES[name]
    tokenizer = make_tokenizer(*arguments)
    generation = "<think>\nBecause <eos>-like text is harmless.\n</think>\nSo \\boxed{4}."
    messages = [*data.prompt_messages("2+2?", "Be brief."), {"role": "assistant", "content": generation}]
    document = data.encode_document(tokenizer, messages, data.end_of_turn(tokenizer))
    trained = [i for i, m in enumerate(document.mask) if m]
    assert trained == list(range(trained[0], trained[-1] + 1))
    expected = generation.removeprefix("<think>\n") if name == "deepseek" else generation
    assert tokenizer.decode(document.ids[trained]) == expected + ending
    before = tokenizer.decode(document.ids[:trained[0]])
    assert before.endswith(opening) and before.count("<bos>") == (1 if arguments[2] else 0)
    assert tokenizer.decode(document.ids[trained[-1] + 1:]) == after
    # the prompt of training is, id for id, the prompt of generation
    assert document.ids[:trained[0]].tolist() == data.chat_prompt_ids(tokenizer, "2+2?", "Be brief.")


def test_faithful_loss_masks(make_tokenizer):
    tokenizer = make_tokenizer(*TEMPLATES["open_r1_roles"][0])
    messages = [*data.prompt_messages("1+1?", "s"), {"role": "assistant", "content": "2"}]
    ending = data.end_of_turn(tokenizer)
    everything = data.encode_document(tokenizer, messages, ending, "all")
    assert everything.mask.tolist() == [0] + [1] * (len(everything) - 1)
    original = data.encode_document(tokenizer, messages, ending, "all_but_eos")
    assert (original.ids[original.mask == 0][1:] == tokenizer.eos_token_id).all()
    assert (original.ids == tokenizer.eos_token_id).sum() == 3  # one per turn, none of them trained


def test_role_template_renders_the_recipe_text_and_one_bos(make_tokenizer):
    tokenizer = make_tokenizer(data.OPEN_R1_ROLES, [], "<bos>", "<eos>", adds_bos=True)
    text = data.render(tokenizer, [*data.prompt_messages("USR", "SYS"), {"role": "assistant", "content": "GEN"}])
    assert text == "<|system|>\nSYS<eos>\n<|user|>\nUSR<eos>\n<|assistant|>\nGEN<eos>\n"
    ids = data.chat_prompt_ids(tokenizer, "USR", "SYS")
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    tokenizer.chat_template = "{{ bos_token }}" + data.OPEN_R1_ROLES
    assert data.chat_prompt_ids(tokenizer, "USR", "SYS").count(tokenizer.bos_token_id) == 1


def test_a_template_without_an_end_of_turn_is_refused(make_tokenizer):
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}", [])
    with pytest.raises(data.DataError, match="never learn to stop"):
        data.end_of_turn(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(data.DataError, match="no system"):
        data.set_chat_template(tokenizer, "tokenizer")


# ------------------------------------------------------------------------------------------------ rows
GOOD = {"problem": "1+1", "generation": "2"}
BAD_LINES = {
    "no column 'generation'": {"problem": "x"}, "empty user text": {"problem": "  ", "generation": "2"},
    "user text is not a string": {"problem": 3, "generation": "2"},
    "assistant text is not a string": {"problem": "x", "generation": None},
    "no assistant turn at the end": {"messages": [{"role": "user", "content": "x"}]},
    "more than one assistant turn": {
        "messages": [{"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant")]},
    "messages is not a list of objects": {"messages": "x"}, "not a JSON object": [1],
    "longer than 40 tokens": {**GOOD, "generation": "long " * 50},
    "a role that is not system, user or assistant": {"messages": [{"role": "tool", "content": "x"}]},
}
BAD_BYTES = {"not JSON": b"{", "not UTF-8": b'{"problem": "\xff", "generation": "2"}',
             "duplicate key": b'{"problem": "a", "problem": "b"}',
             "not JSON (nested too deeply)": b"[" * 200_000}


def test_malformed_rows_are_counted_by_reason(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(GOOD).encode()] * 3 + [json.dumps(row).encode() for row in BAD_LINES.values()]
    lines += BAD_BYTES.values()
    path.write_bytes(b"\n".join(lines) + b"\n\n")
    documents, report = data.tokenize_rows(data.iterate_rows(str(path)), tokenizer, 40)
    assert len(documents) == 3 and [d.row for d in documents] == [0, 1, 2]
    assert report["dropped"] == Counter({**dict.fromkeys(BAD_LINES, 1), **dict.fromkeys(BAD_BYTES, 1)})
    assert report["rows"] == len(lines) and report["examples"]["not JSON"] == [3 + len(BAD_LINES)]
    with pytest.raises(data.DataError, match="more than --max_malformed 1.0%.*not UTF-8"):
        data.load_documents(str(path), tokenizer, 40, cache_dir=tmp_path)
    data.load_documents(str(path), tokenizer, 40, max_malformed=0.9, cache_dir=tmp_path)


def test_overlong_documents_are_dropped_or_cut_by_choice(tokenizer):
    rows = [(GOOD, None), ({**GOOD, "generation": "3 " * 100}, None)]
    documents, report = data.tokenize_rows(rows, tokenizer, 50)
    assert len(documents) == 1 and report["dropped"] == {"longer than 50 tokens": 1}
    documents, report = data.tokenize_rows(rows, tokenizer, 50, overlong="cut")
    assert [len(d) for d in documents][1] == 50 and report["cut"] == 1 and not report["dropped"]


def test_sources_agree(tmp_path):
    import datasets

    rows = [{"problem": f"p{i}", "generation": f"g{i}", "conversations": [{"from": "user", "value": "x"}]}
            for i in range(5)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "folder")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "folders")
    for source in ("a.json", "a.jsonl", "a.parquet", "folder", "folders"):
        assert data.load_rows(str(tmp_path / source)) == rows, source


@pytest.mark.parametrize(("name", "content", "message"), [
    ("x.json", b"{", "not valid JSON"), ("x.json", b"{}", "not a list"),
    ("x.parquet", b"PAR1 nonsense PAR1", "cannot be read"),
    ("x.jsonl", b"", "has no rows"), ("x.jsonl", b"[1]\n", "cannot be read"),
])
def test_unreadable_sources_are_one_clear_error(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(data.DataError, match=message):
        data.load_rows(str(tmp_path / name))
    with pytest.raises(data.DataError, match="does not exist"):
        data.load_rows(str(tmp_path / "absent.jsonl"))


def test_conversations_and_messages_become_the_same_document(tokenizer):
    forms = [
        {"problem": "1+1", "generation": "2"},
        {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]},
        {"conversations": [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}]}]
    documents = [data.tokenize_rows([(row, None)], tokenizer, 100)[0][0] for row in forms]
    assert len({d.ids.tobytes() + d.mask.tobytes() for d in documents}) == 1


# ------------------------------------------------------------------------------------------------ packing and dealing
def recipe_lengths(count=7900, seed=0):
    """Lengths like the recipe's: log-normal, cut at 24,000, mean about 7.6k."""
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(8.75, 0.62, 4 * count)
    return lengths[(lengths < 24000) & (lengths > 200)][:count].astype(int).tolist()


def test_packs_hold_every_document_once_and_are_full():
    lengths = recipe_lengths()
    packs = data.pack(lengths, 24000)
    assert sorted(itertools.chain(*packs)) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in p) for p in packs) <= 24000
    assert sum(lengths) / (24000 * len(packs)) >= 0.99
    assert packs == data.pack(lengths, 24000)


def test_pack_is_best_fit_on_a_worked_example():
    assert data.pack([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert data.pack([], 10) == []
    with pytest.raises(ValueError, match="does not fit"):
        data.pack([3, 11], 10)


@pytest.mark.parametrize(("count", "ranks"), [(64, 8), (13, 4), (0, 2), (1, 3), (7, 1)])
def test_deal_gives_equal_counts_and_neighbours(count, ranks):
    rng = random.Random(0)
    costs = [rng.random() for _ in range(count)]
    hands = data.assign_to_ranks(costs, ranks)
    assert len({len(h) for h in hands}) == 1 and len(hands) == ranks
    assert sorted(i for h in hands for i in h if i >= 0) == list(range(count))
    for turn in zip(*hands, strict=True):  # at any time the ranks hold neighbours in the order of cost
        ranked = sorted(sorted(costs, reverse=True).index(costs[i]) for i in turn if i >= 0)
        assert ranked == list(range(ranked[0], ranked[0] + len(ranked)))


def test_dealing_and_balancing_even_out_cost():
    lengths = recipe_lengths()
    packs = data.pack(lengths, 24000)
    cost = [sum(98.3 * lengths[i] + lengths[i] ** 2 / 500 for i in p) for p in packs]
    slowest = total = 0.0
    for members in data.steps_of_epoch(len(packs), 64, 0, 0)[:20]:
        for turn in zip(*data.assign_to_ranks([cost[i] for i in members], 8), strict=True):
            costs = [cost[members[i]] if i >= 0 else 0 for i in turn]
            slowest, total = slowest + max(costs), total + sum(costs) / 8
    assert slowest / total <= 1.05
    sample = lengths[:128]
    loads = [sum(sample[i] for i in hand) for hand in data.split_evenly(sample, 8)]
    assert max(loads) / (sum(loads) / 8) <= 1.01


def test_an_epoch_visits_every_pack_once_and_epochs_differ():
    for packs, per_step in ((2509, 64), (10, 4), (3, 8), (64, 64)):
        steps = data.steps_of_epoch(packs, per_step, 42, 0)
        assert sorted(itertools.chain(*steps)) == list(range(packs))
        sizes = [len(step) for step in steps]
        assert len(steps) == -(-packs // per_step) and max(sizes) - min(sizes) <= 1 and max(sizes) <= per_step
        assert steps == data.steps_of_epoch(packs, per_step, 42, 0)
    next_epoch = data.steps_of_epoch(100, 8, 42, 1)
    assert data.steps_of_epoch(100, 8, 42, 0) != next_epoch != data.steps_of_epoch(100, 8, 43, 1)


def test_collate_predicts_nothing_across_a_border():
    batch = data.collate([(np.array([5, 6, 7]), np.array([0, 1, 1])), (np.array([8, 9]), np.array([0, 1]))])
    assert batch["input_ids"].tolist() == [5, 6, 7, 8, 9]
    assert batch["position_ids"].tolist() == [0, 1, 2, 0, 1]
    assert batch["targets"].tolist() == [6, 7, 0, 9, 0]
    assert batch["mask"].tolist() == [1, 1, 0, 1, 0]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5]
    assert data.collate([])["mask"].sum() == 0


def test_concat_cut_is_the_originals_packing():
    documents = [data.Document(np.arange(n), np.ones(n), i) for i, n in enumerate((5, 9, 4))]
    packs = data.make_packs(documents, 6, "concat_cut")
    assert packs == [[(0, 0, 5), (1, 0, 1)], [(1, 1, 7)], [(1, 7, 9), (2, 0, 4)]]


# ------------------------------------------------------------------------------------------------ cache, demo, commands
def test_cache_returns_the_same_documents_and_notices_changes(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in data.demo_rows("test")[:20]))

    def load():
        return data.load_documents(str(path), tokenizer, 512, cache_dir=tmp_path / "cache")

    first, second = load(), load()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert all((a.ids == b.ids).all() and (a.mask == b.mask).all() and a.row == b.row
               for a, b in zip(first.documents, second.documents, strict=True))
    path.write_text(path.read_text() + json.dumps(GOOD) + "\n")
    assert len(load().documents) == 21 and load().content_hash != first.content_hash


def test_demo_splits_are_disjoint_and_answers_are_right():
    seen = [row["problem"] for split in data.DEMO_SPLITS for row in data.demo_rows(split)]
    assert len(seen) == len(set(seen))
    for row in data.demo_rows("test"):
        values = {}
        for assignment in row["problem"].removeprefix("Let ").split(". Find ")[0].split(", "):
            name, expression = assignment.split("=")
            values[name] = eval(expression, {}, values) % 10  # noqa: S307  (our own arithmetic)
        assert str(values[name]) == row["answer"] and f"\\boxed{{{row['answer']}}}" in row["generation"]
    inside = [r["generation"].index("boxed") < r["generation"].index("</think>") for r in data.demo_rows("train")]
    assert 0.5 < sum(inside) / len(inside) < 0.9


def test_show_prints_the_mask_in_colour(demo):
    done = run(sys.executable, ROOT / "data.py", "--show", "1", "--dataset", "demo", "--model_name_or_path",
               demo / "base")
    assert done.returncode == 0, done.stderr
    green = "".join(part.split("\033[0m")[0] for part in done.stdout.split("\033[32m")[1:])
    assert green == data.demo_rows("train")[0]["generation"].removeprefix("<think>\n") + "<|end|>"
    done = run(sys.executable, ROOT / "data.py", "--show", "1", "--dataset", "absent.jsonl",
               "--model_name_or_path", demo / "base")
    assert done.returncode == 1 and done.stderr.strip() == "data.py: data set absent.jsonl does not exist"
