"""Hundreds of bad inputs: refused in one line, or dropped and counted; none crashes or hangs."""

import contextlib
import dataclasses
import gzip
import io
import json
import random
import signal
import struct

import pytest

import data
import rewards
import train_grpo
import train_sft
from model import (
    check_architecture, checkpoint_defect, file_crc32, load_config, model_folder, stored_tensors)

SECONDS = 300  # of one case; 10 MB take ten


@contextlib.contextmanager
def one_line_or_nothing(case):
    """All but a good end or a ValueError of one line, a hang too, fails and names the case."""
    def too_long(number, frame):
        raise AssertionError(f"more than {SECONDS} s: {case!r:.300}")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
        assert said and "\n" not in said.strip() and len(said) < 3000, (case, said[:500])
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error!s:.300} for {case!r:.300}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


LEAVES = [
    None, True, 0, -1, 1e308, float("nan"), float("inf"), "", " ", "x", "\x00", "\ud800", "é",
    "🙂" * 50, "\\boxed{", "\\boxed{1}", "1" * 5000, "<think>", "</think>", "{{ 1/0 }}", "{% raw %}",
    [], {}, 10**400, "\u202eabc", "%s%n", "\u2028"]


def any_value(rng, depth=0):
    if depth > 3 or rng.random() < 0.6:
        return rng.choice(LEAVES)
    if rng.random() < 0.5:
        return [any_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    names = ["role", "content", "from", "value", "problem", "x", ""]
    keys = rng.choices(names, k=rng.randint(0, 3))
    return {key: any_value(rng, depth + 1) for key in keys}


def any_row(rng):
    good = {"problem": "1+1", "generation": "2 \\boxed{2}", "answer": "2"}
    kind = rng.randrange(5)
    if kind == 0:
        return any_value(rng)
    if kind == 1:
        return {**good, rng.choice(list(good)): any_value(rng)}
    if kind == 2:
        return {name: value for name, value in good.items() if rng.random() < 0.5}
    if kind == 3:
        roles = ["user", "assistant", "system", "tool", None, 1, ["user"]]
        turns = [{"role": rng.choice(roles), "content": any_value(rng, 3)}
                 for _ in range(rng.randint(0, 4))]
        return {rng.choice(["messages", "conversations"]): rng.choice([turns, any_value(rng)])}
    return {**good, "messages": any_value(rng)}


def any_line(rng):
    text = json.dumps(any_row(rng)).encode()
    kind = rng.randrange(8)
    if kind == 0:
        return text[:rng.randint(0, len(text))]
    if kind == 1:
        return bytes(rng.randrange(256) for _ in range(rng.randint(1, 80))).replace(b"\n", b"")
    if kind == 2:
        encoding = rng.choice(["utf-16", "utf-32", "utf-8-sig"])
        return text.decode().encode(encoding, "replace").replace(b"\n", b"")
    if kind == 3:
        return b'{"problem": "a", "problem": "b", "generation": "c", "answer": "1"}'
    if kind == 4:
        return rng.choice([b"[", b'{"problem":']) * rng.choice([10, 2000, 100_000])
    return text


@pytest.fixture
def use(tokenizer, tmp_path, monkeypatch):
    """What both trainers do with a data set; every row is kept, or counted under a reason."""
    monkeypatch.setattr(data, "MAX_MALFORMED", 1.0)

    def accounted(found, kept):
        assert found.rows == len(kept) + sum(found.dropped.values()) and kept
        assert all(reason and "\n" not in reason for reason in found.dropped)

    def use(path):
        with one_line_or_nothing(path.read_bytes()[:300]):
            found = data.load_documents(str(path), tokenizer, 512, cache_dir=tmp_path / "cache")
            accounted(found, found.documents)
        with one_line_or_nothing(path.read_bytes()[:300]):
            found = data.load_problems(str(path), tokenizer, rewards.gold_answer)
            accounted(found, found.problems)

    return use


@pytest.mark.parametrize("seed", range(6))
def test_random_json_lines(seed, tmp_path, use):
    rng = random.Random(seed)
    for case in range(20):
        path = tmp_path / f"{case}.jsonl"
        path.write_bytes(b"\n".join(any_line(rng) for _ in range(rng.randint(1, 8))))
        use(path)


def test_random_json_files(tmp_path, use):
    rng = random.Random(1)
    for case in range(60):
        path = tmp_path / f"{case}.json"
        rows = [any_row(rng) for _ in range(rng.randint(0, 4))]
        text = json.dumps(rows if rng.random() < 0.7 else any_value(rng)).encode()
        path.write_bytes(text[:rng.randint(0, len(text))] if rng.random() < 0.3 else text)
        use(path)
    for deep in (b"[" * 200_000, b'{"a":' * 200_000, b"", b"\xff\xfe[]", b"\xef\xbb\xbf[]",
                 b"1" * 10_000):
        path.write_bytes(deep)
        use(path)


def test_random_csv_files(tmp_path, use):
    rng = random.Random(5)
    pieces = ["1+1", ",", '"', "\n", "\r", "\x00", "2", "x" * 200_000, "é", "\ufeff", ";"]
    for case in range(60):
        path = tmp_path / f"{case}.csv"
        text = "problem,generation,answer\n" + "".join(rng.choices(pieces, k=rng.randint(0, 30)))
        content = text.encode(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"]),
                              "replace")
        path.write_bytes(content[:rng.randint(0, len(content))] if case % 4 == 0 else content)
        use(path)


def test_damaged_parquet_and_gzip(tmp_path, use):
    import pyarrow
    import pyarrow.parquet

    rng, good = random.Random(2), tmp_path / "good.parquet"
    rows = [{"problem": f"{i}+1", "generation": f"\\boxed{{{i + 1}}}", "answer": str(i + 1)}
            for i in range(50)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), good)
    packed = gzip.compress("\n".join(map(json.dumps, rows)).encode())
    for ending, content in (("parquet", good.read_bytes()), ("jsonl.gz", packed)):
        for case in range(12):
            damaged = bytearray(content[:rng.randrange(len(content))] if case % 2 else content)
            for _ in range(0 if case % 2 else 20):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            path = tmp_path / f"{case}.{ending}"
            path.write_bytes(damaged)
            use(path)
    columns = ([1, 2], [None, None], [[1], []], [{"a": 1}, None], [b"\xff", b""],
               [1.5, float("nan")], pyarrow.array([1.5, None], pyarrow.float32()))
    for number, column in enumerate(columns):
        path = tmp_path / f"types{number}.parquet"
        table = {"problem": column, "generation": column, "answer": column}
        pyarrow.parquet.write_table(pyarrow.table(table), path)
        use(path)


def test_rows_of_ten_megabytes(tmp_path, use):
    path, large = tmp_path / "large.jsonl", "x" * 10_000_000
    rows = [{"problem": "1+1", "generation": large}, {"problem": large[:1_000_000], "answer": "2"},
            {"problem": "1+1", "answer": "\\frac" * 2_000_000},
            {"problem": "1+1", "generation": "2", "answer": "2"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    use(path)


TEMPLATES = [
    "", "{{", "{% for %}", "{{ 1/0 }}", "{{ messages[99].content }}", "{{ missing.attribute.of }}",
    "no roles", "{{ raise_exception('no\nline') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "\x00", "{{ messages[0]['content'] * 3 }}",
    "{% include 'x' %}", "{% set x = x + 1 %}{{ x }}", "{{ eos_token }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ bos_token + 1 }}",
    "{{ messages | nosuchfilter }}"]


@pytest.mark.parametrize("number", range(len(TEMPLATES)))
def test_templates(number, tmp_path, demo):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(demo / "base")
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATES[number])
    with one_line_or_nothing(TEMPLATES[number]):
        data.set_chat_template(tokenizer, str(path))
        data.load_documents(str(demo / "test.jsonl"), tokenizer, 512, cache_dir=tmp_path)


def test_template_files_that_are_no_text(tmp_path, tokenizer):
    for name, content in (("latin", b"\xe9\xff"), ("binary", struct.pack("<100d", *range(100)))):
        (tmp_path / name).write_bytes(content)
        with one_line_or_nothing(name):
            data.set_chat_template(tokenizer, str(tmp_path / name))
    with one_line_or_nothing("folder"):
        data.set_chat_template(tokenizer, str(tmp_path))


VALUES = [
    "", "0", "-1", "1", "nan", "inf", "-inf", "1e999", "2", "0.5", "True", "maybe", "None",
    "x" * 300, "\x00", "a,b,,", ",", "1,2", "../..", "🙂", "[]"]
STRAY = [["stray"], ["--seed", "1", "--seed"], ["--=3"], ["--learning_rate", "1e-5", "extra"],
         ["-x"]]


@pytest.mark.parametrize("program", [train_sft, train_grpo], ids=["sft", "grpo"])
def test_every_flag_with_every_odd_value(program):
    """HfArgumentParser and check_config accept no value of another type, and no NaN."""
    from transformers.hf_argparser import HfArgumentParser

    config_class = program.SFTConfig if program is train_sft else program.GRPOConfig
    parser, accepted = HfArgumentParser(config_class, allow_abbrev=False), []
    for field in dataclasses.fields(config_class):
        for value in VALUES:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                try:
                    cfg, = parser.parse_args_into_dataclasses([f"--{field.name}={value}"])
                except SystemExit as end:
                    assert end.code == 2 and f"--{field.name}" in said.getvalue()
                    continue
            with one_line_or_nothing((field.name, value)):
                program.check_config(cfg)
                accepted.append((field.name, getattr(cfg, field.name)))
    numbers = [(name, value) for name, value in accepted if isinstance(value, float)]
    assert not [(name, value) for name, value in numbers if value != value], "not a number"
    with contextlib.redirect_stderr(io.StringIO()):
        for arguments in STRAY:
            with contextlib.suppress(SystemExit):
                _, unknown = parser.parse_args_into_dataclasses(
                    arguments, return_remaining_strings=True)
                assert unknown  # run_main refuses them


def test_model_folders_of_random_json(tmp_path):
    rng = random.Random(3)
    for case in range(60):
        folder = tmp_path / str(case)
        folder.mkdir()
        key = rng.choice(["hidden_size", "vocab_size", "layer_types", "rope_scaling"])
        model_type = rng.choice(["qwen2", "llama", "nonsense", 3, None])
        config = {"model_type": model_type, key: any_value(rng)}
        text = json.dumps(rng.choice([config, config, any_value(rng)])).encode()
        cut = len(text) if rng.random() < 0.7 else rng.randint(0, len(text))
        (folder / "config.json").write_bytes(text[:cut])
        noise = bytes(rng.randrange(256) for _ in range(rng.randint(0, 64)))
        (folder / "model.safetensors").write_bytes(noise)
        text = json.dumps(any_value(rng)).encode()
        index = rng.choice([text, b"{", noise, b'{"a": "b.safetensors"}'])
        (folder / "model.safetensors.index.json").write_bytes(index)
        with one_line_or_nothing(text):
            check_architecture(load_config(model_folder(folder)))
        with one_line_or_nothing("index"):
            stored_tensors(folder)
        (folder / "model.safetensors.index.json").unlink()
        with one_line_or_nothing("safetensors"):
            stored_tensors(folder)


def test_every_flipped_bit_and_every_truncation_of_a_checkpoint_is_seen(tmp_path):
    """In the manifest too; and whatever is wrong is said in one line."""
    shard, manifest = tmp_path / "__0_0.distcp", tmp_path / "manifest.json"
    shard.write_bytes(bytes(range(40)))
    manifest.write_text(json.dumps({shard.name: file_crc32(shard)}))
    assert checkpoint_defect(tmp_path) == ""
    for file in (shard, manifest):
        content = file.read_bytes()
        flipped = [bytearray(content) for _ in range(8 * len(content))]
        for bit, damaged in enumerate(flipped):
            damaged[bit // 8] ^= 1 << bit % 8
        for damaged in [*flipped, *(content[:size] for size in range(len(content)))]:
            file.write_bytes(damaged)
            defect = checkpoint_defect(tmp_path)
            assert defect and "\n" not in defect, damaged
        file.unlink()
        assert "No such file" in checkpoint_defect(tmp_path)
        file.write_bytes(content)


PIECES = r"""
    \boxed{ } 1 \frac { ^ x ( ) , \text{ <think> </think> f( | _ / : = \pm \sin \sqrt[ ]
    \overline{ ! 0. \begin{pmatrix} \end{pmatrix} & \\ ° % ' cm and million \lfloor \rfloor e i C)
    ** ½ ² \log \{ \}
    """.split() + ["\x00", " "]


def test_gold_answers_and_completions_of_any_kind():
    rng = random.Random(4)
    for _ in range(3000):
        value, text = any_value(rng), "".join(rng.choices(PIECES, k=rng.choice([3, 6, 40])))
        with one_line_or_nothing((value, text)):
            gold = rewards.gold_answer(value)
            assert isinstance(rewards.is_equal(text, gold or "1"), bool)
            rewards.gold_answer(text)
            rewards.extract_answer(text)
