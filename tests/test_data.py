"""data.py: rows, templates and masks, packing, the tokenised cache, what users bring."""

import gzip
import itertools
import json
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import run_script
from make_demo import demo_rows

import data
from rewards import gold_answer

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% else %}{% set c = m['content'] %}"
    "{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + c + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}")
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")


@pytest.fixture
def make_tokenizer(demo):
    """A byte-level tokenizer with one template family's special tokens; pad may equal EOS."""
    import transformers
    from tokenizers import Tokenizer

    def make(template, specials, bos=None, eos="<eos>", adds_bos=False):
        backend = Tokenizer.from_file(str(demo / "base" / "tokenizer.json"))
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token=eos, pad_token=eos, bos_token=bos,
            additional_special_tokens=specials, clean_up_tokenization_spaces=False)
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
    "llama3": ((LLAMA3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<bos>"),
               "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", ""),
    "open_r1_roles": ((data.OPEN_R1_ROLES, [], None, "<eos>"), "<|assistant|>\n", "<eos>", "\n"),
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def documents_of(rows, tokenizer, tmp_path, max_length=512, **options):
    path = write(tmp_path / "rows.jsonl", rows)
    return data.load_documents(path, tokenizer, max_length, cache_dir=tmp_path / "cache", **options)


def problems_of(rows, tokenizer, tmp_path, **options):
    path = write(tmp_path / "problems.jsonl", rows)
    return data.load_problems(path, tokenizer, gold_answer, **options)


def trained_text(document, tokenizer):
    return tokenizer.decode(document.ids[document.mask == 1])


# -------------------------------------------------------------------------- templates and masks
@pytest.mark.parametrize("name", TEMPLATES)
def test_exactly_the_answer_and_its_end_of_turn_are_trained(name, make_tokenizer):
    arguments, opening, ending, after = TEMPLATES[name]
    tokenizer = make_tokenizer(*arguments)
    generation = "<think>\nBecause.\n</think>\nSo \\boxed{4}."
    messages = [*data.prompt_messages("2+2?", "Be brief."),
                {"role": "assistant", "content": generation}]
    document = data.encode_document(tokenizer, messages, data.assistant_turn(tokenizer))
    trained = [i for i, m in enumerate(document.mask) if m]
    assert trained == list(range(trained[0], trained[-1] + 1))
    expected = generation.removeprefix("<think>\n") if name == "deepseek" else generation
    assert tokenizer.decode(document.ids[trained]) == expected + ending
    before = tokenizer.decode(document.ids[:trained[0]])
    assert before.endswith(opening) and before.count("<bos>") == (1 if "<bos>" in arguments else 0)
    assert tokenizer.decode(document.ids[trained[-1] + 1:]) == after
    assert tokenizer.decode([data.stop_token_id(tokenizer)]) == ending
    # the prompt of training is, id for id, the prompt of generation
    _, prompt_ids = data.encode_prompt(tokenizer, data.prompt_messages("2+2?", "Be brief."))
    assert document.ids[:trained[0]].tolist() == prompt_ids


def test_loss_on_all(make_tokenizer):
    tokenizer = make_tokenizer(*TEMPLATES["open_r1_roles"][0])
    messages = [*data.prompt_messages("1+1?", "s"), {"role": "assistant", "content": "2"}]
    turn = data.assistant_turn(tokenizer)
    everything = data.encode_document(tokenizer, messages, turn, "all")
    assert everything.mask.tolist() == [0] + [1] * (len(everything) - 1)


def test_role_template_renders_the_recipe_text_and_one_bos(make_tokenizer):
    tokenizer = make_tokenizer(data.OPEN_R1_ROLES, [], "<bos>", "<eos>", adds_bos=True)
    messages = [*data.prompt_messages("USR", "SYS"), {"role": "assistant", "content": "GEN"}]
    text = data.render(tokenizer, messages)
    assert text == "<|system|>\nSYS<eos>\n<|user|>\nUSR<eos>\n<|assistant|>\nGEN<eos>\n"
    _, ids = data.encode_prompt(tokenizer, data.prompt_messages("USR", "SYS"))
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    tokenizer.chat_template = "{{ bos_token }}" + data.OPEN_R1_ROLES
    _, ids = data.encode_prompt(tokenizer, data.prompt_messages("USR", "SYS"))
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template, message", [
    ("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}", "never learn to stop"),
    ("{% for m in messages %}{{ m['role'] }}{% endfor %}<eos>", "leaves out the assistant's text"),
    ("{{ raise_exception('no system') }}", "no system"),
])
def test_a_template_that_cannot_be_trained_with_is_refused(
        template, message, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(template, [])
    with pytest.raises(data.DataError, match=message):
        data.stop_token_id(tokenizer)
    with pytest.raises(data.DataError, match=message):
        documents_of([GOOD], tokenizer, tmp_path)
    if "never learn" in message:  # a model that is only asked need not be trained with it
        found = problems_of([{"problem": "1+1", "answer": 2}], tokenizer, tmp_path)
        assert len(found.problems) == 1


# -------------------------------------------------------------------------- rows
GOOD = {"problem": "1+1", "generation": "2"}
USER, ASSISTANT = {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}
BAD_LINES = {
    "no column 'generation'": {"problem": "x"},
    "empty user text": {"problem": "  ", "generation": "2"},
    "user text is not a string": {"problem": 3, "generation": "2"},
    "assistant text is not a string": {"problem": "x", "generation": None},
    "no assistant turn at the end": {"messages": [USER]},
    "more than one assistant turn": {"messages": [USER, ASSISTANT, USER, ASSISTANT]},
    "messages is no list of system, user and assistant turns": {"messages": [{"role": "tool"}]},
    "conversations is no list of system, user and assistant turns": {"conversations": "x"},
    "not a JSON object": [1],
    "reasoning text is not a string": {**GOOD, "thinking": True},
}
BAD_BYTES = [b"{", b"[" * 200_000, b'{"problem": "\xff", "generation": "2"}',
             b'{"problem": "\\ud83d"}']


def test_malformed_rows_are_counted_by_reason(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(GOOD).encode()] * 3
    lines += [json.dumps(row).encode() for row in BAD_LINES.values()]
    lines += BAD_BYTES
    path.write_bytes(b"\n".join(lines) + b"\n\n")
    with pytest.raises(data.DataError, match="of the rows are malformed.*1% allowed.*not JSON in UTF-8"):
        data.load_documents(str(path), tokenizer, 40, cache_dir=tmp_path)
    monkeypatch.setattr(data, "MAX_MALFORMED", 1.0)
    for _ in range(2):  # the second time from the cache
        found = data.load_documents(str(path), tokenizer, 40, cache_dir=tmp_path)
        assert [d.row for d in found.documents] == [0, 1, 2]
        expected = {**dict.fromkeys(BAD_LINES, 1), "not JSON in UTF-8": len(BAD_BYTES)}
        assert found.dropped == expected and found.rows == len(lines)
        assert found.first_row["not JSON in UTF-8"] == 3 + len(BAD_LINES)
        assert f"3 of {len(lines)} rows kept" in found.summary()


def test_overlong_documents_are_dropped_and_are_not_malformed(tokenizer, tmp_path):
    rows = [GOOD, {**GOOD, "generation": "3 " * 100}]
    found = documents_of(rows, tokenizer, tmp_path, max_length=50)
    assert len(found.documents) == 1 and found.dropped == {"longer than 50 tokens": 1}
    assert "1 of 2 rows kept; dropped: 1 longer than 50 tokens (first: row 1)" in found.summary()


def test_a_data_set_without_a_usable_row_names_the_columns_it_has(tokenizer, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pytest.raises(data.DataError, match="no row can be used.*'problem'.*'ask, gen'"):
        documents_of([{"ask": "1+1", "gen": "2"}], tokenizer, tmp_path)
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"ask": ["1+1"] * 3, "gen": ["2"] * 3}), path)
    with pytest.raises(data.DataError, match="3 no text in column 'problem'.*'ask, gen'"):
        data.load_problems(str(path), tokenizer, gold_answer)


def test_conversations_and_messages_become_the_same_document(tokenizer, tmp_path):
    turns = [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}]
    rows = [GOOD, {"messages": [USER, ASSISTANT]}, {"conversations": turns},
            {"messages": None, "conversations": turns}, {**GOOD, "messages": None}]
    documents = documents_of(rows, tokenizer, tmp_path).documents
    assert len({d.ids.tobytes() + d.mask.tobytes() for d in documents}) == 1 < len(documents)


# -------------------------------------------------------------------------- sources
ROWS = [{"problem": f"p{i}", "generation": f"g{i}", "answer": str(i)} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLE = "problem,generation,answer\n" + "".join(f'"p{i}",g{i},{i}\n' for i in range(5))


@pytest.mark.parametrize("name, content", [
    ("a.json", json.dumps(ROWS).encode()),
    ("a.jsonl", LINES.encode()),
    ("a.csv", TABLE.encode()),
    ("lines-in-a.json", LINES.encode()),
    ("UPPER.JSONL", LINES.encode()),
    ("UPPER.CSV", TABLE.encode()),
    ("mark.json", json.dumps(ROWS, indent=1).encode("utf-8-sig")),
    ("mark.jsonl", LINES.encode("utf-8-sig")),
    ("mark.csv", TABLE.encode("utf-8-sig")),
    ("packed.jsonl.gz", gzip.compress(LINES.encode())),
    ("packed.json.gz", gzip.compress(json.dumps(ROWS).encode())),
    ("packed.CSV.GZ", gzip.compress(TABLE.encode())),
])
def test_text_files_agree(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert list(data.iterate_rows(str(tmp_path / name))) == ROWS


def test_lines_stay_lines_if_the_first_is_a_list(tmp_path):
    (tmp_path / "a.jsonl").write_text("[1]\n" + LINES)
    first, *others = data.iterate_rows(str(tmp_path / "a.jsonl"))
    assert str(first) == "not a JSON object" and others == ROWS


def test_arrow_files_and_folders_agree(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict({"train": table, "validation": table.select([4])})
    table.to_parquet(tmp_path / "a.parquet")
    table.to_parquet(tmp_path / "B.PARQUET")
    table.save_to_disk(tmp_path / "saved")
    splits.save_to_disk(tmp_path / "splits")
    for name, rows in (("train", ROWS), ("validation", ROWS[4:])):  # as the hub lays them out
        path = tmp_path / "snapshot" / "data" / f"{name}-00000-of-00001.parquet"
        datasets.Dataset.from_list(rows).to_parquet(path)
    for i in range(5):
        (tmp_path / "many.parquet").mkdir(exist_ok=True)  # a folder, as Spark writes them
        write(tmp_path / "many.parquet" / f"part-{i}.jsonl", ROWS[i:i + 1])
    for name in ("a.parquet", "B.PARQUET", "saved", "splits", "splits:train", "snapshot",
                 "snapshot:train", "many.parquet"):
        assert list(data.iterate_rows(str(tmp_path / name))) == ROWS, name
    for name in ("splits:validation", "snapshot:validation"):
        assert list(data.iterate_rows(str(tmp_path / name))) == ROWS[4:], name
    hashes = [data.source_hash(f"{tmp_path}/splits{part}")
              for part in ("", ":train", ":validation", ":other:train")]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
    with pytest.raises(data.DataError, match="no split 'test'; choose one of train, validation"):
        list(data.iterate_rows(f"{tmp_path}/splits:test"))


def test_a_saved_dictionary_without_train_names_its_splits(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"dev": table, "final": table}).save_to_disk(tmp_path / "exam")
    with pytest.raises(data.DataError, match="no split 'train'; choose one of dev, final"):
        list(data.iterate_rows(str(tmp_path / "exam")))


@pytest.mark.parametrize("name, content, message", [
    ("x.json", b"[{", "cannot be read"), ("x.parquet", b"PAR1 nonsense PAR1", "cannot be read"),
    ("x.jsonl.gz", b"not packed", "cannot be read"), ("x.csv", b"a,b\n\xff,1\n", "cannot be read"),
    ("x.arrow", b"", r"want .json, .jsonl, .csv \(or .gz\) or .parquet"),
])
def test_unreadable_sources_are_one_clear_error(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(data.DataError, match=message):
        list(data.iterate_rows(str(tmp_path / name)))


@pytest.mark.parametrize("name, message", [
    ("absent.jsonl", "does not exist"), ("no/absent.JSON.gz", "does not exist"),
    ("no such thing", "no file, no folder, no hub id"), ("", "does not exist"),
    ("a/b:c:d:e", "write NAME"), ("{file}:test", "no split"),
])
def test_sources_that_are_not_there(name, message, tmp_path):
    file = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(data.DataError, match=message):
        list(data.iterate_rows(name.format(file=file)))


def test_csv_rows_keep_their_text_and_count_their_fields(tmp_path):
    path = tmp_path / "x.csv"
    trace = "so " * 100_000  # more than the csv module takes without being told
    path.write_text('problem,answer\n"two, lines\nof it",0.50\nshort\nmuch,too,long\n'
                    f"x,007\n{trace},1\n")
    good, short, long, padded, large = data.iterate_rows(str(path))
    assert large == {"problem": trace, "answer": "1"}
    assert good == {"problem": "two, lines\nof it", "answer": "0.50"} and padded["answer"] == "007"
    assert str(short) == str(long) == "wrong number of fields"


@pytest.mark.parametrize("place", ["file", "saved", "snapshot"])
def test_only_the_columns_in_use_are_read(place, tmp_path, tokenizer):
    """A column of pictures that no library here can open does not disturb a text run."""
    import datasets

    rows = [{**row, "picture": {"bytes": b"\x89PNG broken", "path": None}} for row in ROWS]
    table = datasets.Dataset.from_list(rows).cast_column("picture", datasets.Image())
    path = tmp_path / {"file": "a.parquet", "saved": "saved", "snapshot": "snap/a.parquet"}[place]
    table.save_to_disk(path) if place == "saved" else table.to_parquet(path)
    source = str(path.parent if place == "snapshot" else path)
    columns = {"problem", "answer"}
    assert [set(row) for row in data.iterate_rows(source, columns)] == [columns] * 5
    assert len(data.load_documents(source, tokenizer, 99, cache_dir=tmp_path / "c").documents) == 5
    assert len(data.load_problems(source, tokenizer, gold_answer).problems) == 5


def test_float32_answers_are_the_numbers_that_were_meant(tmp_path, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = [0.7, 3.14, 1e-05, 12.0, 1 / 3]
    wide = pa.array(numbers, pa.float64())
    narrow = wide.cast(pa.float32())
    inside = pa.StructArray.from_arrays([narrow], ["ground_truth"])
    listed = pa.array([[n] for n in numbers], pa.list_(pa.float32()))
    expected = ["0.7", "3.14", "0.00001", "12", "0.33333334"]
    text = pa.array([f"p{i}" for i in range(5)])
    for name, column in (("answer", narrow), ("answer", listed), ("reward_model", inside)):
        pq.write_table(pa.table({"problem": text, name: column}), tmp_path / "narrow.parquet")
        found = data.load_problems(str(tmp_path / "narrow.parquet"), tokenizer, gold_answer)
        assert [p.answers for p in found.problems] == [[e] for e in expected], name
    pq.write_table(pa.table({"problem": text, "answer": wide}), tmp_path / "wide.parquet")
    found = data.load_problems(str(tmp_path / "wide.parquet"), tokenizer, gold_answer)
    assert [p.answers[0] for p in found.problems] == [*expected[:4], "0.3333333333333333"]
    # 2^-15 is exact in both widths, and in each its shortest decimal is another one
    exact = pa.table({"problem": text[:1], "answer": pa.array([2.0**-15])})
    pq.write_table(exact, tmp_path / "exact.parquet")
    found = data.load_problems(str(tmp_path / "exact.parquet"), tokenizer, gold_answer)
    assert found.problems[0].answers == ["0.000030517578125"]


# -------------------------------------------------------------------------- what rows bring along
def test_reasoning_in_a_key_of_its_own_is_trained(make_tokenizer, tmp_path):
    answer = {"role": "assistant", "content": "\n\nIt is 9.", "reasoning_content": "3 times 3.\n"}
    rows = [{"messages": [USER, answer]},
            {"conversations": [{"from": "human", "value": "1+1"},
                               {"from": "gpt", "value": "It is 9.", "thinking": "3 times 3."}]},
            {"problem": "1+1", "generation": "It is 9.", "reasoning_content": "3 times 3."}]
    for name in TEMPLATES:
        tokenizer, ending = make_tokenizer(*TEMPLATES[name][0]), TEMPLATES[name][2]
        found = documents_of(rows, tokenizer, tmp_path)
        expected = "<think>\n3 times 3.\n</think>\n\nIt is 9." + ending
        expected = expected.removeprefix("<think>\n") if name == "deepseek" else expected
        assert [trained_text(d, tokenizer) for d in found.documents] == [expected] * 3, name
        assert "3 with reasoning in a key of its own" in found.summary()


def test_reasoning_in_two_places_is_refused(tokenizer, tmp_path, monkeypatch):
    both = {**ASSISTANT, "content": "<think>a</think>2", "thinking": "b"}
    monkeypatch.setattr(data, "MAX_MALFORMED", 1.0)
    found = documents_of([GOOD, {"messages": [USER, both]}], tokenizer, tmp_path)
    assert found.dropped == {"reasoning in a key of its own and in the text": 1}


def test_a_system_column_is_used_and_said(tokenizer, tmp_path, monkeypatch):
    turns = [{"from": "user", "value": "1+1"}, {"from": "assistant", "value": "2"}]
    rows = [{"conversations": turns, "system": "Be kind."}, {**GOOD, "system": "Be kind."},
            {"messages": [{"role": "system", "content": "Be kind."}, USER, ASSISTANT]},
            {"conversations": turns, "system": ""}]
    found = documents_of(rows, tokenizer, tmp_path, system_prompt="flag")
    texts = [tokenizer.decode(d.ids) for d in found.documents]
    assert texts[0] == texts[1] == texts[2] and texts[0].startswith("<|system|>Be kind.<|end|>")
    assert texts[3].startswith("<|system|>flag<|end|>")
    assert "2 with a system column" in found.summary()
    monkeypatch.setattr(data, "MAX_MALFORMED", 1.0)
    found = documents_of([GOOD, {**rows[2], "system": "x"}], tokenizer, tmp_path)
    assert found.dropped == {"a column system beside a system message": 1}


def test_weight_0_turns_are_context(tokenizer, tmp_path, monkeypatch):
    hint = {"role": "assistant", "content": "Hm?", "weight": 0}
    found = documents_of([{"messages": [USER, hint, USER, ASSISTANT | {"weight": 1}]}],
                         tokenizer, tmp_path)
    (document,) = found.documents
    assert "Hm?" in tokenizer.decode(document.ids)
    assert trained_text(document, tokenizer) == "2<|end|>"
    monkeypatch.setattr(data, "MAX_MALFORMED", 1.0)
    for weight in (0, 0.0, 0.5):
        row = {"messages": [USER, ASSISTANT | {"weight": weight}]}
        found = documents_of([GOOD, row], tokenizer, tmp_path)
        assert found.dropped == {"a weight other than 1 on the last assistant turn": 1}


def test_rows_with_two_forms_say_which_is_used(tokenizer, tmp_path):
    other = {"messages": [{"role": "user", "content": "2+3"}, {**ASSISTANT, "content": "5"}]}
    found = documents_of([GOOD, {**GOOD, **other}], tokenizer, tmp_path)
    assert trained_text(found.documents[1], tokenizer) == "5<|end|>"
    assert "1 with messages, problem and generation: messages taken" in found.summary()


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_end_of_turn_is_never_written_twice(name, make_tokenizer, tmp_path):
    arguments, _, ending, _ = TEMPLATES[name]
    tokenizer = make_tokenizer(*arguments)
    rows = [GOOD, {**GOOD, "generation": "2" + ending}, {**GOOD, "generation": f"2{ending}\n"},
            {"problem": "1+1" + ending, "generation": "2" + tokenizer.eos_token}]
    found = documents_of(rows, tokenizer, tmp_path)
    assert {d.ids.tobytes() + d.mask.tobytes() for d in found.documents} == {
        found.documents[0].ids.tobytes() + found.documents[0].mask.tobytes()}
    assert f"ended in {ending!r} already (one removed)" in found.summary()


def test_control_tokens_inside_a_text_are_refused(make_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_MALFORMED", 1.0)
    for name, token in (("chatml", "<|im_start|>"), ("deepseek", "<｜Assistant｜>"),
                        ("llama3", "<|end_header_id|>"), ("open_r1_roles", "<eos>")):
        tokenizer = make_tokenizer(*TEMPLATES[name][0])
        rows = [GOOD, {**GOOD, "generation": f"a{token}b"}, {**GOOD, "problem": f"{token}b"},
                {**GOOD, "generation": f"a{TEMPLATES[name][2] * 2}"}]
        found = documents_of(rows, tokenizer, tmp_path)
        assert len(found.documents) == 1
        assert found.dropped[f"special token {token!r} in a text"] >= 2
        questions = [{"problem": r["problem"], "answer": "2"} for r in rows]
        problems = problems_of(questions, tokenizer, tmp_path)
        assert problems.dropped == {f"special token {token!r} in a text": 1}


def test_tokens_that_only_the_template_writes_need_not_be_special(demo, tmp_path, monkeypatch):
    """DeepSeek's role markers are ordinary added tokens; the think tags belong to the answer."""
    import transformers

    monkeypatch.setattr(data, "MAX_MALFORMED", 1.0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo / "base")
    tokenizer.add_tokens(["[USER]", "[UNUSED]", "  "])
    tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]})
    turn = "[USER]  {{ m['content'] + eos_token }}"
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    rows = [{**GOOD, "generation": "<think>a  b</think> [UNUSED]"}, {**GOOD, "problem": "[USER]?"}]
    found = documents_of(rows, tokenizer, tmp_path)
    assert found.dropped == {"special token '[USER]' in a text": 1}
    assert tokenizer.convert_tokens_to_ids("</think>") in found.documents[0].ids


# -------------------------------------------------------------------------- problems
SHAPES = {
    "problem, answer": ({"problem": "2*3", "answer": 6}, "problem, answer"),
    "messages": ({"messages": [{"role": "user", "content": "2*3"},
                               {"role": "assistant", "content": "a solution"}], "answer": "6"},
                 "messages, answer"),
    "conversations": ({"conversations": [{"from": "human", "value": "2*3"}], "answer": "6"},
                      "conversations, answer"),
    "TRL, text": ({"prompt": "2*3", "ground_truth": "6"},
                  "prompt, ground_truth"),
    "TRL, messages": ({"prompt": [{"role": "user", "content": "2*3"}],
                       "solution": "$\\boxed{6}$"},
                      "prompt, solution"),
    "verl": ({"data_source": "x", "prompt": [{"role": "user", "content": "2*3"}],
              "reward_model": {"ground_truth": "6", "style": "rule"}, "extra_info": {"index": 1}},
             "prompt, reward_model"),
    "GSM8K": ({"question": "2*3", "answer": "Two times three is <<2*3=6>>6.\n#### 6"},
              "question, answer"),
    "solution": ({"problem": "2*3", "answer": "", "solution": "\\boxed{5}? No, \\boxed{6}."},
                 "problem, solution"),
    "list": ({"question": "2*3", "final_answer": ["6", "6.0", "6"]},
             "question, final_answer"),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_problems_are_found_in_the_shapes_people_have(shape, ending, tokenizer, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    row, said = SHAPES[shape]
    path = tmp_path / f"rows{ending}"
    write(path, [row]) if ending == ".jsonl" else pq.write_table(pa.Table.from_pylist([row]), path)
    found = data.load_problems(str(path), tokenizer, gold_answer, "Be brief.")
    (problem,) = found.problems
    assert (problem.row, problem.problem, problem.answers[0]) == (0, "2*3", "6")
    messages = data.prompt_messages("2*3", "Be brief.")
    assert problem.prompt_ids == data.encode_prompt(tokenizer, messages)[1]
    assert len(problem.answers) == (2 if shape == "list" else 1)
    assert found.summary() == f"1 of 1 rows kept; dropped: none; 1 with the columns {said}"


def test_a_prompt_of_several_messages_is_rendered_whole(tokenizer, tmp_path):
    last = {"role": "user", "content": "3+4"}
    chat = [{"role": "system", "content": "Add."}, USER, ASSISTANT, last]
    rows = [{"prompt": chat, "answer": "7"}]
    found = problems_of(rows, tokenizer, tmp_path, system_prompt="flag")
    assert tokenizer.decode(found.problems[0].prompt_ids) == (
        "<|system|>Add.<|end|><|user|>1+1<|end|><|assistant|>2<|end|>"
        "<|user|>3+4<|end|><|assistant|><think>\n")
    assert found.problems[0].problem == "3+4"


def test_golds_nobody_can_hit_are_dropped_and_counted(tokenizer, tmp_path):
    bad = ["\\frac{", None, float("inf"), "", {"a": 1}, True, [], [None]]
    rows = [*demo_rows("rl")[:5], *({"problem": "x", "answer": answer} for answer in bad),
            {"problem": "x"}, {"problem": "x", "answer": 3.0}]
    found = problems_of(rows, tokenizer, tmp_path, max_prompt_length=100)
    assert [p.answers for p in found.problems] == [[r["answer"]] for r in rows[:5]] + [["3"]]
    assert found.dropped == {"answer that the grader cannot read": 5,
                             "no answer in column 'answer'": 4}
    nobody = lambda answer: None  # noqa: E731
    with pytest.raises(data.DataError, match="no row can be used.*15 answer|11 answer"):
        data.load_problems(str(tmp_path / "problems.jsonl"), tokenizer, nobody)


def test_long_prompts_are_dropped_and_rows_without_a_problem_refused(tokenizer, tmp_path):
    rows = [{"problem": "1+1", "answer": 2}, {"problem": "1 " * 200, "answer": 2}]
    found = problems_of(rows, tokenizer, tmp_path, max_prompt_length=100)
    assert len(found.problems) == 1 and found.dropped == {"prompt longer than 100 tokens": 1}
    with pytest.raises(data.DataError, match="33.3% of the rows are malformed"):
        problems_of([*rows, {"problem": " ", "answer": 2}], tokenizer, tmp_path)


def test_models_that_are_too_small_are_refused_in_one_line(tokenizer):
    config = SimpleNamespace(vocab_size=len(tokenizer), max_position_embeddings=100)
    data.check_lengths(tokenizer, config, 100)
    with pytest.raises(data.DataError, match="may reach 101 tokens, the model has 100 positions"):
        data.check_lengths(tokenizer, config, 101)
    config.rope_parameters = {"rope_type": "yarn", "factor": 4.0,
                              "original_max_position_embeddings": 50}
    data.check_lengths(tokenizer, config, 200)
    with pytest.raises(data.DataError, match="200 positions"):
        data.check_lengths(tokenizer, config, 201)
    config.vocab_size -= 1
    with pytest.raises(data.DataError, match=f"ids up to {len(tokenizer) - 1}.*vocab_size is"):
        data.check_lengths(tokenizer, config, 10)


# -------------------------------------------------------------------------- packing
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
    assert packs == data.make_packs([range(n) for n in lengths], 24000)


def test_pack_is_best_fit_on_a_worked_example():
    assert data.pack([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert data.pack([], 10) == []
    with pytest.raises(ValueError, match="does not fit"):
        data.pack([3, 11], 10)


@pytest.mark.parametrize(("count", "ranks"), [(64, 8), (13, 4), (0, 2), (1, 3), (7, 1)])
def test_ranks_get_equal_counts_and_neighbours(count, ranks):
    rng = random.Random(0)
    costs = [rng.random() for _ in range(count)]
    assigned = data.assign_to_ranks(costs, ranks)
    assert len({len(mine) for mine in assigned}) == 1 and len(assigned) == ranks
    assert sorted(i for mine in assigned for i in mine if i >= 0) == list(range(count))
    for turn in zip(*assigned, strict=True):  # at any time neighbours in the order of cost
        ranked = sorted(sorted(costs, reverse=True).index(costs[i]) for i in turn if i >= 0)
        assert ranked == list(range(ranked[0], ranked[0] + len(ranked)))


def test_assigning_and_splitting_even_out_cost():
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
    loads = [sum(sample[i] for i in mine) for mine in data.split_evenly(sample, 8)]
    assert max(loads) / (sum(loads) / 8) <= 1.01


@pytest.mark.parametrize("ranks, limit", [(1, 1000), (2, 300), (8, 300), (4, 10_000)])
def test_micro_batches_hold_every_row_once_within_the_limit(ranks, limit):
    sizes = [random.Random(i).randint(10, 300) for i in range(50)]
    plan = data.micro_batches(sizes, [n * n for n in sizes], ranks, limit)
    assert len(plan) == ranks and len({len(mine) for mine in plan}) == 1
    members = [i for mine in plan for batch in mine for i in batch]
    assert sorted(members) == list(range(50))
    assert all(sum(sizes[i] for i in batch) <= limit for mine in plan for batch in mine)
    alone = data.micro_batches([100], [1.0], 3, 100)  # ranks without a row take part, empty
    assert sorted(alone) == [[[]], [[]], [[0]]]


def test_an_epoch_visits_every_pack_once_and_epochs_differ():
    for packs, per_step in ((2509, 64), (10, 4), (3, 8), (64, 64)):
        steps = data.steps_of_epoch(packs, per_step, 42, 0)
        assert sorted(itertools.chain(*steps)) == list(range(packs))
        sizes = [len(step) for step in steps]
        assert len(steps) == -(-packs // per_step)
        assert max(sizes) - min(sizes) <= 1 and max(sizes) <= per_step
        assert steps == data.steps_of_epoch(packs, per_step, 42, 0)
    next_epoch = data.steps_of_epoch(100, 8, 42, 1)
    assert data.steps_of_epoch(100, 8, 42, 0) != next_epoch != data.steps_of_epoch(100, 8, 43, 1)


def test_collate_shifts_every_column_and_predicts_nothing_across_a_border():
    first = {"ids": np.array([5, 6, 7]), "mask": np.array([0, 1, 1]), "old": np.array([9, .1, .2])}
    second = {"ids": np.array([8, 9]), "mask": np.array([0, 1]), "old": np.array([9, .3])}
    batch = data.collate([first, second], columns=("mask", "old"))
    assert set(batch) == {*data.MODEL_INPUTS, "mask", "old"}
    assert batch["input_ids"].tolist() == [5, 6, 7, 8, 9]
    assert batch["position_ids"].tolist() == [0, 1, 2, 0, 1]
    assert batch["targets"].tolist() == [6, 7, 0, 9, 0]
    assert batch["mask"].tolist() == [1, 1, 0, 1, 0]
    assert batch["old"].numpy().round(3).tolist() == np.float32([.1, .2, 0, .3, 0]).tolist()
    assert batch["cu_seqlens"].tolist() == [0, 3, 5] and batch["max_seqlen"] == 4
    types = {"input_ids": "int64", "position_ids": "int64", "targets": "int64",
             "cu_seqlens": "int32", "mask": "float32", "old": "float32"}
    assert {name: str(batch[name].numpy().dtype) for name in types} == types
    empty = data.collate([], columns=("mask", "old"))
    assert len(empty["input_ids"]) == 1 and empty["mask"].sum() == 0 and empty["max_seqlen"] == 1
    sizes = {n: data.collate([{"ids": np.zeros(n), "mask": np.zeros(n)}])["max_seqlen"]
             for n in (1, 2, 3, 4, 5, 1024, 1025)}
    assert sizes == {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 1024: 1024, 1025: 2048}
    assert all(type(size) is int for size in sizes.values())


# -------------------------------------------------------------------------- cache, demo, command
def test_cache_returns_the_same_documents_and_notices_changes(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "rows.jsonl"
    write(path, demo_rows("test")[:20])

    def load(**options):
        return data.load_documents(
            str(path), tokenizer, 512, cache_dir=tmp_path / "cache", **options)

    first = load()
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_all", None)  # nothing is tokenised again
        second = load()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert first.summary() == second.summary() and second.notes == Counter()
    assert all((a.ids == b.ids).all() and (a.mask == b.mask).all() and a.row == b.row
               for a, b in zip(first.documents, second.documents, strict=True))
    assert {d.ids.dtype for d in first.documents} == {np.dtype("int32")}
    assert load(loss_on="all").documents[0].mask.sum() > first.documents[0].mask.sum()
    shorter = data.load_documents(str(path), tokenizer, 150, cache_dir=tmp_path / "cache")
    assert 0 < len(shorter.documents) < 20
    write(path, [*demo_rows("test")[:20], GOOD])
    assert len(load().documents) == 21 and load().content_hash != first.content_hash


def test_demo_splits_are_disjoint_and_answers_are_right():
    seen = [row["problem"] for split in ("train", "rl", "test") for row in demo_rows(split)]
    assert len(seen) == len(set(seen)) == 2400 + 1600 + 200
    for row in demo_rows("test"):
        values = {}
        given = row["problem"].removeprefix("Let ").split(". Find ")[0]
        for assignment in given.split(", "):
            name, expression = assignment.split("=")
            values[name] = eval(expression, {}, values) % 10  # noqa: S307  (our own arithmetic)
        assert str(values[name]) == row["answer"]
        assert f"\\boxed{{{row['answer']}}}" in row["generation"]
    texts = [row["generation"] for row in demo_rows("train")]
    inside = [text.index("boxed") < text.index("</think>") for text in texts]
    assert 0.5 < sum(inside) / len(inside) < 0.9


def show(demo, *flags):
    return run_script("data.py", "--model_name_or_path", demo / "base", *flags)


def test_show_prints_the_mask_in_colour(demo):
    done = show(demo, "--show", "1", "--dataset", demo / "train.jsonl")
    assert done.returncode == 0, done.stderr
    green = "".join(part.split("\033[0m")[0] for part in done.stdout.split("\033[32m")[1:])
    assert green == demo_rows("train")[0]["generation"].removeprefix("<think>\n") + "<|end|>"
    done = show(demo, "--dataset", "absent.jsonl")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("data.py: data set absent.jsonl does not exist")


def test_show_prints_problems_as_grpo_sees_them(demo, tmp_path):
    row = {"prompt": "1+1", "reward_model": {"ground_truth": 2}}
    path = write(tmp_path / "rows.jsonl", [{"prompt": "x", "answer": "\\frac{"}, row])
    done = show(demo, "--stage", "grpo", "--system_prompt", "none", "--dataset", path)
    assert done.returncode == 0, done.stderr
    plain = done.stdout.replace("\033[90m", "").replace("\033[0m", "")
    assert "dropped: 1 answer that the grader cannot read (first: row 0)" in plain
    assert "gold 2\n<|user|>1+1<|end|><|assistant|><think>\n" in plain
    assert "1 with the columns prompt, reward_model" in plain
