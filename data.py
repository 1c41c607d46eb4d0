"""
From raw rows to packs of token ids.

    1. sources    hub id, JSON, JSONL, CSV, Parquet or a folder -> rows
    2. rows       whatever the columns are called -> messages, or a problem and its gold answers
    3. tokens     messages -> prompt ids; with an answer -> ids and the positions that are trained
    4. loading    each row is kept, or counted under a reason: documents (SFT), problems (GRPO)
    5. packing    whole documents, best-fit decreasing; ranks get equal work at the same time
    6. --show     rows as a trainer sees them

    python data.py --show 3 --dataset FILE --model_name_or_path DIR    trained tokens in green
    python data.py --stage grpo --dataset FILE --model_name_or_path DIR    prompts and gold answers

A data set is named FILE, FOLDER[:SPLIT], owner/name[:SPLIT] or owner/name:CONFIG:SPLIT.
Letters: D documents, S tokens of a document, T tokens of a pack, R ranks.
"""

import bisect
import csv
import gzip
import hashlib
import itertools
import json
import math
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from numbers import Number
from pathlib import Path

import numpy as np

MAX_MALFORMED = 0.01  # share of a data set's rows; with more, something is wrong with the whole


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the reason and the remedy."""


class Dropped(Exception):
    """A row that is left out, and why; malformed: it counts towards MAX_MALFORMED."""

    def __init__(self, reason, malformed=True):
        super().__init__(reason)
        self.malformed = malformed


# --------------------------------------------------------------------------------------------------
# 1. Sources
# --------------------------------------------------------------------------------------------------
def split_name(dataset):
    """(path or hub id, config or None, split or None) of a data set's name."""
    if Path(dataset).exists():
        return dataset, None, None
    name, *rest = dataset.split(":")
    if len(rest) > 2:
        raise DataError(f"data set {dataset!r}: write NAME, NAME:SPLIT or NAME:CONFIG:SPLIT")
    config, split = [None, None, *rest][-2:]
    return name, config, split


def source_hash(dataset):
    """Identity of a data set: SHA-256 of a local file's or folder's bytes, or of a hub id."""
    name, config, split = split_name(dataset)
    path = Path(name)
    hub_id = "" if path.exists() else name
    digest = hashlib.sha256(f"{hub_id}:{config}:{split or 'train'}".encode())
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in filter(Path.is_file, files):
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def iterate_rows(dataset, columns=None):
    """
    Yield each row of a data set as a dict; a Dropped in the place of one that cannot be read.

    columns: the only ones to read, where the format allows it. Of the formats only a JSON list is
    held in memory whole. Raises DataError when the source cannot be read.
    """
    name, config, split = split_name(dataset)
    path = Path(name)
    ending = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    readers = {"json": json_rows, "jsonl": json_rows, "csv": csv_rows, "parquet": parquet_rows}
    is_hub_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and ending not in readers
    try:
        if path.is_file() and ending in readers and not split:
            yield from readers[ending](path, columns)
        elif path.is_file():
            raise DataError(f"{dataset}: want .json, .jsonl, .csv (or .gz) or .parquet, no split")
        elif name and path.is_dir() or is_hub_id:
            yield from library_rows(name, config, split or "train", columns)
        else:
            raise DataError(f"data set {dataset} does not exist: no file, no folder, no hub id")
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001  (the readers raise a dozen unrelated types)
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:250]
        raise DataError(f"data set {dataset} cannot be read: {cause}") from error


def open_text(path, errors="strict"):
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    return opened(path, "rt", encoding="utf-8-sig", errors=errors, newline="\n")


def json_rows(path, columns):
    """Rows of JSON lines, or of a JSON list where a file called .json begins like one."""
    with open_text(path, "surrogateescape") as file:
        is_list = ".jsonl" not in path.name.lower() and file.read(100).lstrip().startswith("[")
        file.seek(0)
        texts = map(json.dumps, json.load(file)) if is_list else filter(str.strip, file)
        yield from map(parsed, texts)


def parsed(text):
    """The row in a line of JSON, or a Dropped."""
    try:
        row = json.loads(text)
        json.dumps(row, ensure_ascii=False).encode()  # fails on bytes and escapes that are no text
    except (ValueError, RecursionError):
        return Dropped("not JSON in UTF-8")
    return row if isinstance(row, dict) else Dropped("not a JSON object")


def csv_rows(path, columns):
    """Rows of a CSV file with a header; every value stays text, so that 0.50 is not 0.5."""
    csv.field_size_limit(1 << 30)  # the default, 128 kB, is less than a long trace
    with open_text(path) as file:
        for row in csv.DictReader(file):
            complete = None not in row and None not in row.values()
            yield row if complete else Dropped("wrong number of fields")


def parquet_rows(path, columns):
    import pyarrow.parquet

    wanted = list(columns) if columns else None
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256, columns=wanted):
        yield from table_rows(pyarrow.Table.from_batches([batch]))


def library_rows(name, config, split, columns):
    """Rows of a folder or hub id, read by the `datasets` library; images are not decoded."""
    import datasets

    if any(Path(name, file).is_file() for file in ("dataset_dict.json", "state.json")):
        found = datasets.load_from_disk(name)
    else:
        found = datasets.load_dataset(name, config, streaming=True)
    splits = found if isinstance(found, dict) else {"train": found}
    if split not in splits:
        raise DataError(f"{name} has no split {split!r}; choose one of {', '.join(splits)}")
    for table in splits[split].with_format("arrow").iter(batch_size=256):
        there = table.column_names
        yield from table_rows(table.select([c for c in there if c in (columns or there)]))


def table_rows(table):
    """Rows of an Arrow table as dicts; a float32 as the shortest decimal that rounds to it."""
    # Widened by its bits, 0.1 would be the gold 0.10000000149011612, and every right answer wrong.
    import pyarrow

    def replaced(kind, leaf):
        if pyarrow.types.is_list(kind):
            return pyarrow.list_(replaced(kind.value_type, leaf))
        if pyarrow.types.is_struct(kind):
            return pyarrow.struct([f.with_type(replaced(f.type, leaf)) for f in kind])
        return leaf if kind == pyarrow.float32() else kind

    for i, column in enumerate(table.columns):
        as_text = column.cast(replaced(column.type, pyarrow.string()))
        column = as_text.cast(replaced(column.type, pyarrow.float64()))
        table = table.set_column(i, table.column_names[i], column)
    return table.to_pylist()


# --------------------------------------------------------------------------------------------------
# 2. Rows: whatever the columns are called
# --------------------------------------------------------------------------------------------------
ROLES = {"system": "system", "user": "user", "assistant": "assistant",
         "human": "user", "gpt": "assistant"}  # the last two are ShareGPT's names
CHAT_COLUMNS = ("messages", "conversations")
THOUGHTS = ("reasoning_content", "thinking")  # keys of reasoning beside an assistant's text
PROBLEM_COLUMNS = ("question", "prompt", *CHAT_COLUMNS)  # GSM8K, TRL and verl, chats
ANSWER_COLUMNS = ("reward_model", "final_answer", "ground_truth", "solution")
COLUMNS = {"system", *THOUGHTS, *PROBLEM_COLUMNS, *ANSWER_COLUMNS}  # read beside the flags' own


def prompt_messages(problem, system_prompt=""):
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": problem}]


def chat_turns(row, column):
    """Turns of a column as dicts with role and content; raises Dropped."""
    try:
        return [{**turn, "role": ROLES[turn.get("role") or turn["from"]],
                 "content": turn.get("content", turn.get("value"))} for turn in row[column]]
    except (AttributeError, KeyError, TypeError):
        raise Dropped(f"{column} is no list of system, user and assistant turns") from None


def clean_messages(chat, row, system_prompt, turn, notes):
    """Messages with role and content alone; a system message is put before those without one."""
    own, column = chat[0]["role"] == "system", row.get("system")
    if own and column:
        raise Dropped("a column system beside a system message")
    if column:
        notes["with a system column"] += 1
    if not own and (column or system_prompt):
        chat = [{"role": "system", "content": column or system_prompt}, *chat]
    return [{"role": m["role"], "content": checked_text(m["content"], m["role"], turn, notes)}
            for m in chat]


def checked_text(text, role, turn, notes):
    """The text, without an end of turn of its own: the template writes one. Raises Dropped."""
    if not isinstance(text, str):
        raise Dropped(f"{role} text is not a string")
    if ends := [stop for stop in turn.stops if text.rstrip().endswith(stop)]:
        text = text.rstrip().removesuffix(ends[0])
        notes[f"ended in {ends[0]!r} already (one removed)"] += 1
    if not text.strip():
        raise Dropped(f"empty {role} text")
    if inside := [token for token in turn.control if token in text]:
        raise Dropped(f"special token {inside[0]!r} in a text")
    return text


def row_messages(row, turn, problem_column, generation_column, system_prompt, notes):
    """
    Messages of a row, the assistant's answer last; raises Dropped. turn: assistant_turn().

    A row has messages, or conversations, or problem and generation. Only its last assistant turn is
    trained; earlier ones must say so by weight 0.
    """
    columns = [name for name in CHAT_COLUMNS if row.get(name)]
    missing = [name for name in (problem_column, generation_column) if name not in row]
    if columns:
        chat = chat_turns(row, columns[0])
        if not missing:
            both = f"{problem_column} and {generation_column}"
            notes[f"with {columns[0]}, {both}: {columns[0]} taken"] += 1
    elif missing:
        raise Dropped(f"no column {missing[0]!r}")
    else:
        thoughts = {key: row.get(key) for key in THOUGHTS}
        answer = {"role": "assistant", "content": row[generation_column], **thoughts}
        chat = [*prompt_messages(row[problem_column]), answer]
    if chat[-1]["role"] != "assistant":
        raise Dropped("no assistant turn at the end")
    *earlier, answer = [message for message in chat if message["role"] == "assistant"]
    if answer.get("weight") not in (None, 1):
        raise Dropped("a weight other than 1 on the last assistant turn")
    if any(message.get("weight") != 0 for message in earlier):
        raise Dropped("more than one assistant turn")
    messages = clean_messages(chat, row, system_prompt, turn, notes)
    thoughts = [answer[key] for key in THOUGHTS if answer.get(key)]
    if thoughts:
        thought = checked_text(thoughts[0], "reasoning", turn, notes).strip()
        text = messages[-1]["content"].lstrip("\n")
        if "</think>" in text:
            raise Dropped("reasoning in a key of its own and in the text")
        notes["with reasoning in a key of its own (put between think tags)"] += 1
        messages[-1]["content"] = f"<think>\n{thought}\n</think>\n\n{text}"
    return messages


def problem_messages(row, problem_column="problem"):
    """(turns that ask the problem, the column they are in); raises Dropped."""
    for column in (problem_column, *PROBLEM_COLUMNS):
        value = row.get(column)
        if isinstance(value, str) and value.strip():
            return prompt_messages(value), column
        if isinstance(value, list) and value:
            chat = chat_turns(row, column)
            if chat[-1]["role"] == "assistant":
                chat.pop()  # a worked solution
            if not chat or chat[-1]["role"] != "user":
                raise Dropped(f"no user turn at the end of {column}")
            return chat, column
    raise Dropped(f"no text in column {problem_column!r}")


def gold_answers(row, read_gold, answer_column="answer"):
    """(accepted answers, the column they are in: the first filled one); raises Dropped."""
    for column in (answer_column, *ANSWER_COLUMNS):
        value = row.get(column)
        if column == "reward_model" and isinstance(value, dict):  # verl's
            value = value.get("ground_truth")
        if value in (None, "", []):
            continue
        values = value if isinstance(value, list) else [value]  # any one of a list is right
        values = [v for v in values if isinstance(v, (str, Number)) and not isinstance(v, bool)]
        golds = [read_gold(plain_number(v)) for v in values]
        golds = list(dict.fromkeys(gold for gold in golds if gold is not None))
        if not golds:
            raise Dropped("answer that the grader cannot read", malformed=False)
        return golds, column
    raise Dropped(f"no answer in column {answer_column!r}", malformed=False)


def plain_number(value):
    """A finite float without an exponent, 0.0000001 for 1e-07; any other value as it is."""
    is_number = isinstance(value, float) and math.isfinite(value)
    return np.format_float_positional(value, trim="-") if is_number else value


# --------------------------------------------------------------------------------------------------
# 3. Tokens: templates, ids and loss masks
# --------------------------------------------------------------------------------------------------
# The recipes' literal strings. The doubled braces are a slip of the originals (a format string that
# was never formatted); the released models were trained with them, so they are the default.
SFT_SYSTEM_PROMPT = r"Please reason step by step, and put your final answer within \boxed{{}}."
GRPO_SYSTEM_PROMPT = (
    r"You are a helpful and harmless assistant. You are Qwen developed by Alibaba. "
    r"You should think step-by-step. Return final answer within \boxed{{}}.")
OPEN_RS_SYSTEM_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    r"user with the answer, and put your final answer within \boxed{{}} . The reasoning process "
    "and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>.")
SYSTEM_PROMPTS = {
    "sft": SFT_SYSTEM_PROMPT,
    "grpo": GRPO_SYSTEM_PROMPT,
    "open_rs": OPEN_RS_SYSTEM_PROMPT,
    "open_rs3": OPEN_RS_SYSTEM_PROMPT + " Note that respond by English, NOT use other languages.",
    "none": "",
}
# The role markers of Fast-Math-R1's stage 1: ordinary text, no <think> to start from.
OPEN_R1_ROLES = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")


def set_chat_template(tokenizer, chat_template):
    """Put the template into the tokenizer, so that every later stage has it; raises DataError."""
    if chat_template == "open_r1_roles":
        tokenizer.chat_template = OPEN_R1_ROLES
    elif chat_template != "tokenizer":
        if not Path(chat_template).is_file():
            raise DataError(f"--chat_template {chat_template!r} is neither tokenizer, "
                            "open_r1_roles nor a file")
        tokenizer.chat_template = Path(chat_template).read_text()
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template of its own; "
                        "choose --chat_template open_r1_roles or a Jinja file")
    encode_prompt(tokenizer, prompt_messages("1+1"))  # raises if the template fails


def system_prompt_text(system_prompt):
    """A name of SYSTEM_PROMPTS, or the text itself."""
    return SYSTEM_PROMPTS.get(system_prompt, system_prompt)


def render(tokenizer, messages, add_generation_prompt=False):
    """The template's text; a template that fails is a DataError, not a Jinja traceback."""
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # noqa: BLE001  (a template is a program: it can fail in any way)
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:250]
        roles = [message["role"] for message in messages]
        raise DataError(f"the chat template fails on roles {roles}: {cause}") from error


def encode_prompt(tokenizer, messages):
    """(text, ids) up to where the answer begins, with one BOS where the tokenizer uses one."""
    text = render(tokenizer, messages, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("x")["input_ids"][:1] == [bos]
    return text, [bos, *ids] if adds_bos and ids[:1] != [bos] else ids


@dataclass
class AssistantTurn:
    """What a chat template writes around an assistant's text."""

    ending: list  # ids after the text
    trained: int  # how many of them: up to the first special token, the end of turn; 0 if none is
    stops: list  # texts of the end of turn and of EOS
    control: list  # texts of the tokens that only the template may write


def assistant_turn(tokenizer):
    """The AssistantTurn of a tokenizer's template, found by rendering a marker."""
    question, marker = prompt_messages("x"), "answer-marker"
    text = render(tokenizer, [*question, {"role": "assistant", "content": marker}])
    _, found, suffix = text.rpartition(marker)
    if not found:
        raise DataError("the chat template leaves out the assistant's text; "
                        "choose another --chat_template")
    ending = tokenizer(suffix, add_special_tokens=False)["input_ids"]
    special = [i for i, token in enumerate(ending) if token in tokenizer.all_special_ids]
    trained = special[0] + 1 if special else 0
    stops = tokenizer.convert_ids_to_tokens(ending[trained - 1:trained])
    stops += [tokenizer.eos_token] if tokenizer.eos_token else []
    # Only the template may write special tokens and its own markers (DeepSeek's are not special).
    written = text + encode_prompt(tokenizer, question)[0]
    control = [token.content for token in tokenizer.added_tokens_decoder.values()
               if token.special or token.content.strip() and token.content in written]
    control = [token for token in control if token not in ("<think>", "</think>")]
    return AssistantTurn(ending, trained, stops, control)


def stop_token_id(tokenizer):
    """The token that ends an assistant's turn: the last one trained, and where generation stops."""
    turn = assistant_turn(tokenizer)
    if not turn.trained:
        raise DataError("the chat template ends an assistant's turn without a special token: the "
                        "model would never learn to stop; choose another --chat_template")
    return turn.ending[turn.trained - 1]


@dataclass
class Document:
    """One training example: ids (S,) int32; mask (S,) uint8, 1 where trained; row in its source."""

    ids: np.ndarray
    mask: np.ndarray
    row: int

    def __len__(self):
        return len(self.ids)


def encode_document(tokenizer, messages, turn, loss_on="assistant", row=0):
    """
    The Document of one conversation; turn: assistant_turn(tokenizer).

    Prompt and answer are tokenised apart, exactly as they meet at generation time, and the mask
    comes from their lengths: a mask that looks for ids (of pad, say) loses the end of turn wherever
    pad and EOS are the same token. The answer is appended, not rendered: DeepSeek's template cuts
    the thought out of assistant turns.
    """
    prompt, prompt_ids = encode_prompt(tokenizer, messages[:-1])
    answer = messages[-1]["content"]
    if prompt.rstrip().endswith("<think>") and answer.lstrip().startswith("<think>"):
        # the generation prompt has opened the thought already
        answer = answer.lstrip().removeprefix("<think>").lstrip("\n")
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    ids = np.array([*prompt_ids, *answer_ids, *turn.ending], dtype=np.int32)
    mask = np.zeros(len(ids), dtype=np.uint8)
    mask[len(prompt_ids):len(prompt_ids) + len(answer_ids) + turn.trained] = 1
    if loss_on == "all":
        mask[1:] = 1  # the first token has nothing before it to be predicted from
    return Document(ids, mask, row)


def check_lengths(tokenizer, config, longest):
    """Raise DataError for a tokenizer, or for prompt plus answer, that a model is too small for."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise DataError(f"the tokenizer has ids up to {largest}, the model's vocab_size is "
                        f"{config.vocab_size}; use the tokenizer that belongs to the model")
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    rope = getattr(config, "rope_parameters", None) or {}  # scaled: factor times its first length
    first = rope.get("original_max_position_embeddings") or positions
    positions = max(positions, first * (rope.get("factor") or 1))
    if longest > positions:
        raise DataError(f"prompt and answer may reach {longest} tokens, the model has "
                        f"{positions:.0f} positions; lower the flags for their lengths")


# --------------------------------------------------------------------------------------------------
# 4. Loading: every row is kept, or counted under a reason
# --------------------------------------------------------------------------------------------------
@dataclass
class DataSet:
    """A loaded data set: documents (SFT) or problems (GRPO, evaluation), and what was dropped."""

    rows: int = 0
    dropped: Counter = field(default_factory=Counter)  # reason: number of rows
    first_row: dict = field(default_factory=dict)  # reason: the first of them
    notes: Counter = field(default_factory=Counter)  # what was found or repaired: number of rows
    documents: list = ()
    problems: list = ()
    content_hash: str = ""

    def summary(self):
        kept = self.rows - sum(self.dropped.values())
        dropped = [f"{count:,} {reason} (first: row {self.first_row[reason]})"
                   for reason, count in sorted(self.dropped.items())]
        parts = [f"{kept:,} of {self.rows:,} rows kept", f"dropped: {', '.join(dropped) or 'none'}"]
        parts += [f"{count:,} {note}" for note, count in sorted(self.notes.items())]
        return "; ".join(parts)


def read_all(dataset, columns, read, progress=False, limit=None):
    """([read(row, number, notes)], DataSet) of the rows; raises DataError if too few are left."""
    from tqdm import tqdm

    kept, report, malformed = [], DataSet(), 0
    rows = itertools.islice(iterate_rows(dataset, COLUMNS | columns), limit)
    bar = tqdm(rows, desc="reading", unit="row", disable=not progress, file=sys.stderr)
    for number, row in enumerate(bar):
        report.rows += 1
        try:
            if isinstance(row, Dropped):
                raise row
            kept.append(read(row, number, report.notes))
        except Dropped as dropped:
            malformed += dropped.malformed
            report.dropped[str(dropped)] += 1
            report.first_row.setdefault(str(dropped), number)
    if not kept:
        names = next((list(row) for row in iterate_rows(dataset) if isinstance(row, dict)), [])
        raise DataError(f"{dataset}: no row can be used. {report.summary()}. The columns are "
                        f"{', '.join(names)[:300]!r}; --problem_column and others choose them")
    if malformed > MAX_MALFORMED * report.rows:
        raise DataError(f"{dataset}: {malformed / report.rows:.1%} of the rows are malformed, more "
                        f"than the {MAX_MALFORMED:.0%} allowed. {report.summary()}. "
                        "Repair or remove them")
    return kept, report


def load_documents(dataset, tokenizer, max_length, loss_on="assistant", system_prompt="",
                   problem_column="problem", generation_column="generation",
                   cache_dir=".cache", progress=False, limit=None):
    """
    DataSet of documents, from the cache when data, tokenizer, options and this file are unchanged.

    loss_on: assistant, or all. Documents above max_length are dropped and counted.
    """
    stop_token_id(tokenizer)  # raises if the model would never learn to stop
    turn = assistant_turn(tokenizer)

    def read(row, number, notes):
        messages = row_messages(
            row, turn, problem_column, generation_column, system_prompt, notes)
        document = encode_document(tokenizer, messages, turn, loss_on, number)
        if len(document) > max_length:
            raise Dropped(f"longer than {max_length} tokens", malformed=False)
        return document

    options = (max_length, loss_on, system_prompt, problem_column, generation_column, limit)
    content_hash = source_hash(dataset)
    backend, this_file = tokenizer.backend_tokenizer.to_str(), Path(__file__).read_text()
    key = json.dumps([content_hash, backend, tokenizer.chat_template, options, this_file])
    cached = Path(cache_dir, hashlib.sha256(key.encode()).hexdigest()[:32] + ".npz")
    if not cached.is_file():
        columns = {problem_column, generation_column}
        documents, report = read_all(dataset, columns, read, progress, limit)
        report.content_hash = content_hash
        write_cache(cached, documents, report)
    return read_cache(cached)


def write_cache(path, documents, report):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".tmp{random.getrandbits(32):08x}")
    with open(temporary, "wb") as file:
        np.savez(
            file,
            report=json.dumps(vars(report)),
            rows=[document.row for document in documents],
            lengths=[len(document) for document in documents],
            ids=np.concatenate([document.ids for document in documents]),
            mask=np.concatenate([document.mask for document in documents]))
    temporary.rename(path)


def read_cache(path):
    with np.load(path) as arrays:
        cuts = np.cumsum(arrays["lengths"])[:-1]
        ids, masks = np.split(arrays["ids"], cuts), np.split(arrays["mask"], cuts)
        report = DataSet(**json.loads(str(arrays["report"])))
        report.documents = list(map(Document, ids, masks, arrays["rows"].tolist()))
    return report


@dataclass
class Problem:
    """One question: row in its source; gold answers (GRPO pays the first); ids of the prompt."""

    row: int
    problem: str
    answers: list
    prompt_ids: list


def load_problems(dataset, tokenizer, read_gold, system_prompt="", max_prompt_length=math.inf,
                  problem_column="problem", answer_column="answer", user_turn="{problem}",
                  limit=None):
    """
    DataSet of problems, for GRPO and evaluation; its summary says in which columns they were found.

    read_gold (rewards.gold_answer): text or number -> what is graded, None for what nobody can hit:
    such a row is dropped, it would pay every completion the same. user_turn: the last message.
    """
    turn = assistant_turn(tokenizer)

    def read(row, number, notes):
        chat, column = problem_messages(row, problem_column)
        messages = clean_messages(chat, row, system_prompt, turn, notes)
        answers, gold_column = gold_answers(row, read_gold, answer_column)
        problem = messages[-1]["content"]
        messages[-1]["content"] = user_turn.replace("{problem}", problem)
        _, prompt_ids = encode_prompt(tokenizer, messages)
        if len(prompt_ids) > max_prompt_length:
            raise Dropped(f"prompt longer than {max_prompt_length} tokens", malformed=False)
        notes[f"with the columns {column}, {gold_column}"] += 1
        return Problem(number, problem, answers, prompt_ids)

    columns = {problem_column, answer_column}
    problems, report = read_all(dataset, columns, read, limit=limit)
    report.problems, report.content_hash = problems, source_hash(dataset)
    return report


# --------------------------------------------------------------------------------------------------
# 5. Packing, and which rank gets what
# --------------------------------------------------------------------------------------------------
def pack(lengths, capacity):
    """
    Best-fit decreasing: document numbers of each pack; raises ValueError for one above capacity.

    Each document, longest first, goes where it leaves the least room.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > capacity:
        raise ValueError(f"document {order[0]} has {lengths[order[0]]} tokens and does not fit "
                         f"a pack of {capacity}")
    packs, room = [], []  # room: sorted (tokens left, pack)
    for i in order:
        at = bisect.bisect_left(room, (lengths[i], -1))
        if at == len(room):
            packs.append([])
            left, number = capacity, len(packs) - 1
        else:
            left, number = room.pop(at)
        packs[number].append(i)
        bisect.insort(room, (left - lengths[i], number))
    return packs


def make_packs(documents, capacity):
    """Packs of whole documents, each a list of document numbers."""
    return pack([len(document) for document in documents], capacity)


def steps_of_epoch(num_packs, packs_per_step, seed, epoch):
    """
    Pack numbers of every optimizer step of one epoch: shuffled by (seed, epoch), spread evenly.

    ceil(num_packs / packs_per_step) steps whose sizes differ by at most one: nothing is dropped at
    the end of an epoch, and no step is a tiny remainder with a noisy gradient.
    """
    order = list(range(num_packs))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    steps = -(-num_packs // packs_per_step)
    return [order[num_packs * s // steps:num_packs * (s + 1) // steps] for s in range(steps)]


def assign_to_ranks(costs, ranks):
    """
    Packs of one step for each rank: the same number, with similar cost at each position.

    Sort by cost, give each group of `ranks` neighbours to the ranks, the largest to the one with
    least so far, so that totals even out too. All ranks wait for the slowest in every micro-batch:
    a random assignment costs 11% (benchmarks/packing.py), the gradient is the same. A count that is
    no multiple of ranks is filled up with -1, an empty pack.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    order += [-1] * (-len(order) % ranks)
    assigned, load = [[] for _ in range(ranks)], [0.0] * ranks
    for start in range(0, len(order), ranks):
        lightest_first = sorted(range(ranks), key=lambda rank: load[rank])
        for rank, index in zip(lightest_first, order[start:start + ranks], strict=True):
            assigned[rank].append(index)
            load[rank] += costs[index] if index >= 0 else 0.0
    return assigned


def split_evenly(costs, bins):
    """Indices per bin with nearly equal total cost: the largest goes to the lightest bin (LPT)."""
    members, load = [[] for _ in range(bins)], [0.0] * bins
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        lightest = load.index(min(load))
        members[lightest].append(i)
        load[lightest] += costs[i]
    return members


def micro_batches(sizes, costs, ranks, max_tokens):
    """
    For each rank its micro-batches, each a list of row numbers; the same count on every rank.

    In every micro-batch all ranks wait for the slowest, so all of them, on all ranks, should cost
    the same: rows (sizes: tokens; costs: FLOPs) go into bins of nearly equal cost, as few as
    keep to max_tokens, and the bins are assigned in order of cost. To even out each rank's total
    alone leaves 5% of waiting, this 2% (benchmarks/packing.py). A rank without rows gets empty
    bins: it must join every collective of FSDP, or all ranks hang.
    """
    per_rank, fits = math.ceil(sum(sizes) / (max_tokens * ranks)), False
    while not fits:  # ends: with a bin for every row, none is larger than the longest row
        bins = split_evenly(costs, per_rank * ranks)
        fits = all(sum(sizes[i] for i in members) <= max_tokens for members in bins)
        per_rank += 1
    bin_costs = [sum(costs[i] for i in members) for members in bins]
    return [[bins[i] for i in mine] for mine in assign_to_ranks(bin_costs, ranks)]


MODEL_INPUTS = ("input_ids", "position_ids", "cu_seqlens", "max_seqlen", "targets")


def collate(rows, device="cpu", columns=("mask",)):
    """
    One pack as tensors. rows: dicts of "ids" (S,) and one (S,) array per column, possibly none.

    Returns input_ids, position_ids, targets (T,) int64; each column (T,) float32; cu_seqlens
    (D + 1,) int32; max_seqlen, an int: a power of two at or above the longest document, so that few
    shapes are compiled. Without rows: one masked token, so that a rank without work still takes
    part in every collective.
    """
    import torch

    rows = rows or [dict.fromkeys(("ids", *columns), np.zeros(1))]

    def shifted(name):
        """Position t predicts the token after it: it holds what belongs to that token."""
        return np.concatenate([np.append(row[name][1:], 0) for row in rows])

    lengths = [len(row["ids"]) for row in rows]
    arrays = {
        "input_ids": np.concatenate([row["ids"] for row in rows]).astype(np.int64),
        "position_ids": np.concatenate([np.arange(n) for n in lengths]),
        "cu_seqlens": np.cumsum([0, *lengths]).astype(np.int32),
        "targets": shifted("ids").astype(np.int64),
        **{column: shifted(column).astype(np.float32) for column in columns},
    }
    batch = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    batch["max_seqlen"] = 1 << (max(lengths) - 1).bit_length()
    return batch


# --------------------------------------------------------------------------------------------------
# 6. --show
# --------------------------------------------------------------------------------------------------
def show_rows(args):
    """Print rows as a trainer with these flags sees them: trained tokens green, the rest grey."""
    from model import load_tokenizer
    from rewards import gold_answer

    tokenizer = load_tokenizer(args.model_name_or_path)
    set_chat_template(tokenizer, args.chat_template)
    system_prompt = system_prompt_text(args.system_prompt or args.stage)
    if args.stage == "sft":
        found = load_documents(args.dataset, tokenizer, math.inf, args.loss_on, system_prompt,
                               args.problem_column, args.generation_column, limit=args.show)
    else:
        found = load_problems(args.dataset, tokenizer, gold_answer, system_prompt, math.inf,
                              args.problem_column, args.answer_column, limit=args.show)
    for row in found.documents:
        print(f"--- row {row.row}: {len(row)} tokens, {row.mask.sum()} trained (green)")
        for token, trained in zip(row.ids, row.mask, strict=True):
            print(f"\033[{32 if trained else 90}m{tokenizer.decode([token])}\033[0m", end="")
        print("\n")
    for row in found.problems:
        print(f"--- row {row.row}: {len(row.prompt_ids)} tokens, gold {' or '.join(row.answers)}")
        print(f"{tokenizer.decode(row.prompt_ids)}\n")
    print(found.summary())


def main():
    import argparse

    parser = argparse.ArgumentParser("data.py", allow_abbrev=False, description=show_rows.__doc__)
    add = parser.add_argument
    add("--show", type=int, default=3, help="number of rows to print")
    add("--stage", default="sft", choices=("sft", "grpo"), help="whose view")
    add("--dataset", required=True, help="hub id, .json, .jsonl, .csv, .parquet or folder")
    add("--model_name_or_path", required=True, help="folder or hub id whose tokenizer is used")
    add("--chat_template", default="tokenizer", help="tokenizer, open_r1_roles or a Jinja file")
    add("--system_prompt", default="", help=(
        f"one of {', '.join(SYSTEM_PROMPTS)}, or the text; empty: the stage's"))
    add("--problem_column", default="problem")
    add("--generation_column", default="generation")
    add("--answer_column", default="answer")
    add("--loss_on", default="assistant", choices=("assistant", "all"))
    try:
        show_rows(parser.parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    main()
