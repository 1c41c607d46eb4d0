"""
From raw rows to packs of token ids: loading, templates and loss masks, packing and dealing, the demo's problems.

    1. sources        hub id, JSON, JSONL, Parquet, a saved folder or `demo` -> rows; malformed ones counted by reason
    2. templates      problem -> prompt ids; problem and trace -> ids and the positions that are trained
    3. packing        whole documents, best-fit decreasing; packs dealt so that ranks do equal work at the same time
    4. data set       tokenised once, cached by content; the order is a function of (seed, epoch)
    5. the demo       chained arithmetic with R1-like redundancy, a tokenizer and a model small enough for two cores
    6. benchmarks     no training problem may share 13 words in a row, or its whole text, with a benchmark problem
    7. builds         the papers' data sets from their sources: filter, draw, merge, deduplicate, shortest correct trace

    python data.py --show 3 --dataset FILE --model_name_or_path DIR    rows with the trained tokens coloured
    python data.py build --recipe demo --output DIR                    the demo's model folder and its three files
    python data.py build --recipe fast_math_r1_sft --output FILE       stage 1's 7,900 rows; --help lists the choices

Letters: D documents, T tokens of a pack, P packs of an optimizer step, R ranks.
"""

import bisect
import decimal
import hashlib
import itertools
import json
import math
import random
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import rewards as reward_lib


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the reason and the remedy."""


# ---------------------------------------------------------------------------------------------------------------------
# 1. Sources
# ---------------------------------------------------------------------------------------------------------------------
def reject_duplicate_keys(pairs):
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("duplicate key")
    return row


HALF_A_PAIR = "half a surrogate pair in a text"


def check_surrogates(row):
    r"""Raise UnicodeEncodeError for half a surrogate pair, such as "\ud83d": valid JSON, but no tokenizer takes it."""
    json.dumps(row, ensure_ascii=False).encode("utf-8")


def parse_json_row(line):
    """(row, None), or (None, reason) for a line that is no JSON object."""
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=reject_duplicate_keys)
        check_surrogates(row)
    except UnicodeDecodeError:
        return None, "not UTF-8"
    except UnicodeEncodeError:
        return None, HALF_A_PAIR
    except RecursionError:
        return None, "not JSON (nested too deeply)"
    except ValueError as error:
        return None, "duplicate key" if "duplicate key" in str(error) else "not JSON"
    return (row, None) if isinstance(row, dict) else (None, "not a JSON object")


def iterate_rows(dataset, split="train"):
    """
    Yield (row, None) for every row of a data set, or (None, reason) where the row itself cannot be read.

    dataset: a JSON file (a list of objects), JSONL file, Parquet file, a folder saved by `datasets`, `demo`, `demo:rl`
    or `demo:test`, or a hub id, optionally `owner/name:config`. Rows are read one at a time: the data may exceed
    memory, but for a .json file. Raises DataError when the source as a whole cannot be read.
    """
    path = Path(dataset)
    if dataset.split(":")[0] == "demo":
        for row in demo_rows(dataset.partition(":")[2] or "train"):
            yield row, None
    elif path.suffix == ".jsonl" and path.is_file():
        with open(path, "rb") as file:
            for line in file:
                if line.strip():
                    yield parse_json_row(line)
    elif path.suffix == ".json" and path.is_file():
        try:
            rows = json.loads(path.read_bytes().decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not valid JSON ({str(error)[:100]}); "
                            "one object per line goes into a .jsonl file") from error
        if not isinstance(rows, list):
            raise DataError(f"{path} holds a {type(rows).__name__}, not a list of rows")
        for row in rows:
            try:
                check_surrogates(row)
            except UnicodeEncodeError:
                yield None, HALF_A_PAIR
                continue
            yield (row, None) if isinstance(row, dict) else (None, "not a JSON object")
    elif path.suffix in (".json", ".jsonl", ".parquet") and not path.exists():
        raise DataError(f"data set {dataset} does not exist")
    else:
        for row in library_rows(dataset, split):
            yield row, None


def library_rows(dataset, split):
    """Rows of a Parquet file, a saved folder or a hub id, streamed by the `datasets` library."""
    import datasets

    path = Path(dataset)
    try:
        if path.is_file():
            rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        elif path.is_dir():
            rows = datasets.load_from_disk(str(path))
            rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
        elif dataset.count("/") == 1 and not dataset.startswith((".", "/")):
            name, _, config = dataset.partition(":")
            rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
        else:
            raise DataError(f"data set {dataset!r} is no file, no folder, not `demo` "
                            "and no hub id of the form owner/name")
        yield from rows
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001  (the libraries below raise a dozen unrelated types; the cause is chained)
        raise DataError(f"data set {dataset} cannot be read: {type(error).__name__}: {str(error)[:200]}") from error


def load_rows(dataset, split="train"):
    """All rows of a data set as a list of dicts; raises DataError if any row is unreadable or there is none."""
    rows, unreadable = [], Counter()
    for row, reason in iterate_rows(dataset, split):
        if row is None:
            unreadable[reason] += 1
        else:
            rows.append(row)
    if unreadable:
        raise DataError(f"{dataset}: {sum(unreadable.values())} rows cannot be read ({dict(unreadable)})")
    if not rows:
        raise DataError(f"{dataset} has no rows")
    return rows


def source_hash(dataset, split="train"):
    """Identity of a data set's content: SHA-256 of a local file's or folder's bytes, name and split of a hub id."""
    path = Path(dataset)
    digest = hashlib.sha256(split.encode() if path.exists() else f"{dataset}:{split}".encode())
    for file in sorted(p for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file()):
        with open(file, "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# 2. Templates: rows -> messages -> ids and loss mask
# ---------------------------------------------------------------------------------------------------------------------
# The literal strings of the recipes. The doubled braces are a slip of the originals (a format string that never was
# formatted); the released models were trained with them, so they stay the default.
SFT_SYSTEM_PROMPT = r"Please reason step by step, and put your final answer within \boxed{{}}."
GRPO_SYSTEM_PROMPT = (r"You are a helpful and harmless assistant. You are Qwen developed by Alibaba. "
                      r"You should think step-by-step. Return final answer within \boxed{{}}.")
OPEN_RS_SYSTEM_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer, and put your "
    r"final answer within \boxed{{}} . The reasoning process and answer are enclosed within <think> </think> and "
    "<answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
    "<answer> answer here </answer>.")
SYSTEM_PROMPTS = {
    "sft": SFT_SYSTEM_PROMPT, "grpo": GRPO_SYSTEM_PROMPT, "open_rs": OPEN_RS_SYSTEM_PROMPT, "none": "",
    "open_rs3": OPEN_RS_SYSTEM_PROMPT + " Note that respond by English, NOT use other languages.",
}
# The open-r1 role markers stage 1 of Fast-Math-R1 trained with: ordinary text, no <think> to start from.
OPEN_R1_ROLES = ("{% for message in messages %}"
                 "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
                 "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")


def set_chat_template(tokenizer, chat_template):
    """
    Put the template into the tokenizer, so that it is saved with the model and used by every later stage.

    chat_template: "tokenizer" (keep its own), "open_r1_roles", or the path of a Jinja file. Raises DataError when the
    tokenizer has none of its own.
    """
    if chat_template == "open_r1_roles":
        tokenizer.chat_template = OPEN_R1_ROLES
    elif chat_template != "tokenizer":
        if not Path(chat_template).is_file():
            raise DataError(f"--chat_template {chat_template!r} is neither tokenizer, open_r1_roles nor a file")
        tokenizer.chat_template = Path(chat_template).read_text()
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template of its own; "
                        "choose --chat_template open_r1_roles or a Jinja file")
    render(tokenizer, [{"role": "user", "content": "1+1"}], add_generation_prompt=True)


def system_prompt_text(system_prompt):
    """A name of SYSTEM_PROMPTS, or the text itself."""
    return SYSTEM_PROMPTS.get(system_prompt, system_prompt)


def render(tokenizer, messages, add_generation_prompt=False):
    """The template's text; a template that fails is a DataError, not a Jinja traceback."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # noqa: BLE001  (a template is a program and can fail in any way; the cause is chained)
        raise DataError(f"the chat template fails on roles {[m['role'] for m in messages]}: {type(error).__name__}: "
                        f"{' '.join(str(error).split())[:200]}") from error


def encode_prompt(tokenizer, text):
    """Ids of a rendered prompt with exactly one BOS where the tokenizer uses one: from the template or added here."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id, *ids] if adds_bos and ids[:1] != [tokenizer.bos_token_id] else ids


def prompt_messages(problem, system_prompt=""):
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": problem}]


def chat_prompt_ids(tokenizer, problem, system_prompt=""):
    """Token ids of a problem's prompt, generation prompt included; the same in SFT, GRPO and evaluation."""
    text = render(tokenizer, prompt_messages(problem, system_prompt), add_generation_prompt=True)
    return encode_prompt(tokenizer, text)


@dataclass
class Problem:
    """STAND-IN until the merge: one question; answers: accepted gold strings."""

    row: int
    problem: str
    answers: list
    prompt_ids: list


class Problems:
    """STAND-IN until the merge."""

    def __init__(self, problems, text):
        self.problems, self.text = problems, text

    def summary(self):
        return self.text


def load_problems(dataset, tokenizer, read_gold, system_prompt="", max_prompt_length=1024,
                  problem_column="problem", answer_column="answer"):
    """STAND-IN until the merge: what evaluate.py needs of the contract's load_problems."""
    name, _, split = dataset.rpartition(":")
    name, split = (name, split) if name and not Path(dataset).exists() else (dataset, "train")
    rows, problems = load_rows(name, split), []
    for number, row in enumerate(rows):
        text = row.get(problem_column) or row.get("question")
        golds = row.get(answer_column)
        if golds in (None, "", []):
            golds = row.get("solution")
        golds = [read_gold(gold) for gold in (golds if isinstance(golds, list) else [golds])]
        golds = list(dict.fromkeys(gold for gold in golds if gold is not None))
        if isinstance(text, str) and text.strip() and golds:
            ids = chat_prompt_ids(tokenizer, text, system_prompt)
            if len(ids) <= max_prompt_length:
                problems.append(Problem(number, text, golds, ids))
    if not problems:
        raise DataError(f"{dataset}: no usable problem in {len(rows)} rows")
    return Problems(problems, f"{dataset}: {len(problems)} problems, {len(rows) - len(problems)} of {len(rows)} dropped")


def check_lengths(tokenizer, config, longest):
    """
    Raise DataError for a tokenizer or sequences (prompt + answer, in tokens) too large for a model.

    Scaled kinds of rotary embedding reach factor times the length they were first trained on.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise DataError(f"the tokenizer has ids up to {largest}, the model's vocab_size is "
                        f"{config.vocab_size}; use the tokenizer that belongs to the model")
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        rope = getattr(config, "rope_parameters", None) or {}
        first = rope.get("original_max_position_embeddings") or positions
        positions = max(positions, int(first * (rope.get("factor") or 1)))
    if positions and longest > positions:
        raise DataError(f"prompt and answer may reach {longest} tokens, the model has {positions} "
                        "positions (max_position_embeddings); lower the flags for their lengths")


def end_of_turn(tokenizer):
    """
    (ids, trained): what the template writes after an assistant's text, and how many of those ids are trained.

    Trained up to and including the first special token (the end of turn): a model whose end of turn is outside the loss
    never learns to stop. What follows it, such as a newline, is never generated.
    """
    marker = "answer-marker"
    text = render(tokenizer, [*prompt_messages("x"), {"role": "assistant", "content": marker}])
    suffix = text[text.rindex(marker) + len(marker):]
    ids = tokenizer(suffix, add_special_tokens=False)["input_ids"]
    special = [i for i, token in enumerate(ids) if token in tokenizer.all_special_ids]
    if not special:
        raise DataError(f"the chat template ends an assistant's turn with {suffix!r}, which holds no special token: "
                        "the model would never learn to stop. Choose another --chat_template")
    return ids, special[0] + 1


def stop_token_id(tokenizer):
    """The token that ends an assistant's turn: trained in SFT, and where generation must stop."""
    ids, trained = end_of_turn(tokenizer)
    return ids[trained - 1]


def row_messages(row, problem_column="problem", generation_column="generation", system_prompt=""):
    """
    (messages, None) of one row, or (None, reason). Rows hold problem and generation, or messages, or conversations.

    The last message is the assistant's and is the only one of its kind: multi-turn training is left out.
    """
    if "messages" in row or "conversations" in row:
        turns = row.get("messages") or row.get("conversations")
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            return None, "messages is not a list of objects"
        names = {"human": "user", "gpt": "assistant"}
        messages = [{"role": turn.get("role", turn.get("from")), "content": turn.get("content", turn.get("value"))}
                    for turn in turns]
        messages = [{**m, "role": names.get(m["role"], m["role"]) if isinstance(m["role"], str) else None}
                    for m in messages]
        if any(m["role"] not in ("system", "user", "assistant") for m in messages):
            return None, "a role that is not system, user or assistant"
        if system_prompt and messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system_prompt})
    else:
        missing = [column for column in (problem_column, generation_column) if column not in row]
        if missing:
            return None, f"no column {missing[0]!r}"
        messages = [*prompt_messages(row[problem_column], system_prompt),
                    {"role": "assistant", "content": row[generation_column]}]
    for message in messages:
        if not isinstance(message["content"], str):
            return None, f"{message['role']} text is not a string"
        if not message["content"].strip():
            return None, f"empty {message['role']} text"
    roles = [m["role"] for m in messages]
    if not roles or roles[-1] != "assistant":
        return None, "no assistant turn at the end"
    if roles.count("assistant") > 1:
        return None, "more than one assistant turn"
    return messages, None


@dataclass
class Document:
    """One training example. ids (n,) int32; mask (n,) uint8, 1 on tokens predicted and trained; row: its source row."""

    ids: np.ndarray
    mask: np.ndarray
    row: int

    def __len__(self):
        return len(self.ids)


def encode_document(tokenizer, messages, ending, loss_on="assistant", row=0):
    """
    Ids and loss mask of one conversation; ending is end_of_turn(tokenizer).

    Prompt and answer are tokenised apart, exactly as they meet at generation time, and the mask comes from their
    lengths: a mask that looks for ids (of pad, say) loses the end of turn wherever pad and EOS are the same token.
    The answer is appended as it stands, not rendered: DeepSeek's template cuts the thought out of assistant turns.
    """
    text = render(tokenizer, messages[:-1], add_generation_prompt=True)
    prompt_ids = encode_prompt(tokenizer, text)
    answer = messages[-1]["content"]
    if text.rstrip().endswith("<think>") and answer.lstrip().startswith("<think>"):
        answer = answer.lstrip()[len("<think>"):].lstrip("\n")  # the generation prompt has opened the thought already
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    ending_ids, trained = ending
    ids = np.array([*prompt_ids, *answer_ids, *ending_ids], dtype=np.int32)
    mask = np.zeros(len(ids), dtype=np.uint8)
    mask[len(prompt_ids):len(prompt_ids) + len(answer_ids) + trained] = 1
    if loss_on != "assistant":
        mask[1:] = 1  # the first token has nothing before it to be predicted from
    if loss_on == "all_but_eos":  # the originals: pad is EOS there, and the collator ignores pad
        mask[ids == tokenizer.eos_token_id] = 0
    return Document(ids, mask, row)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Packing and dealing
# ---------------------------------------------------------------------------------------------------------------------
def pack(lengths, capacity):
    """
    Best-fit decreasing: indices of whole documents per pack, no pack above capacity; deterministic.

    Each document, longest first, goes where it leaves the least room. Raises ValueError for a document above capacity:
    dropping or cutting it is the caller's explicit choice.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if order and lengths[order[0]] > capacity:
        raise ValueError(f"document {order[0]} has {lengths[order[0]]} tokens and does not fit a pack of {capacity}")
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


def assign_to_ranks(costs, ranks):
    """
    Packs of one optimizer step per rank: equal counts, and packs of nearly equal cost at the same time.

    Sort by cost, give each group of `ranks` neighbours to the ranks, the largest to the one with least so far, so that
    totals even out too. All ranks wait for the slowest in every micro-batch, so random dealing costs 11%
    (benchmarks/packing.py); the gradient is the same. A count that is no multiple of ranks is filled up with -1, an
    empty pack.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    order += [-1] * (-len(order) % ranks)
    hands, load = [[] for _ in range(ranks)], [0.0] * ranks
    for start in range(0, len(order), ranks):
        lightest_first = sorted(range(ranks), key=lambda rank: load[rank])
        for rank, index in zip(lightest_first, order[start:start + ranks], strict=True):
            hands[rank].append(index)
            load[rank] += costs[index] if index >= 0 else 0.0
    return hands


def split_evenly(costs, ranks):
    """Indices per rank with nearly equal total cost: the largest goes to the least loaded rank (LPT); deterministic."""
    hands, load = [[] for _ in range(ranks)], [0.0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = load.index(min(load))
        hands[rank].append(i)
        load[rank] += costs[i]
    return hands


def collate(documents, device="cpu"):
    """
    One pack as tensors for model.policy_forward; documents: [(ids (n,), mask (n,))], possibly none.

    Returns a dict of input_ids, position_ids, targets (T,) int64, mask (T,) float32 and cu_seqlens (D + 1,) int32.
    targets[t] and mask[t] belong to the token AFTER t: the model at t predicts it. The last token of a document
    predicts nothing, so nothing is ever predicted across a border. No documents: one masked token, so that a rank
    without work still takes part in every collective and touches every parameter.
    """
    import torch

    documents = documents or [(np.zeros(1, dtype=np.int64), np.zeros(1))]
    ids = np.concatenate([d for d, _ in documents]).astype(np.int64)
    targets = np.concatenate([np.append(d[1:], 0) for d, _ in documents]).astype(np.int64)
    mask = np.concatenate([np.append(m[1:], 0) for _, m in documents]).astype(np.float32)
    lengths = [len(d) for d, _ in documents]
    positions = np.concatenate([np.arange(n) for n in lengths])
    bounds = np.cumsum([0, *lengths]).astype(np.int32)
    batch = {"input_ids": ids, "position_ids": positions, "targets": targets, "mask": mask, "cu_seqlens": bounds}
    return {name: torch.from_numpy(array).to(device) for name, array in batch.items()}


# ---------------------------------------------------------------------------------------------------------------------
# 4. The tokenised data set
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class TokenizedData:
    """Documents of one data set and what became of every row."""

    documents: list
    report: dict  # rows, kept, cut, dropped: {reason: count}, examples: {reason: first row numbers}
    content_hash: str

    def summary(self):
        dropped = ", ".join(f"{count} {reason} (row {', '.join(map(str, self.report['examples'][reason]))})"
                            for reason, count in sorted(self.report["dropped"].items()))
        return (f"{self.report['kept']:,} of {self.report['rows']:,} rows kept; dropped: {dropped or 'none'}; "
                f"cut: {self.report['cut']:,}")


def tokenize_rows(rows, tokenizer, max_length, overlong="drop", loss_on="assistant", system_prompt="",
                  problem_column="problem", generation_column="generation", progress=False):
    """
    Documents and a report of an iterator of (row, reason) pairs, as iterate_rows yields them.

    overlong: "drop" counts a document over max_length as dropped, "cut" keeps its first max_length tokens and counts it
    as cut. loss_on: assistant, all, all_but_eos (the originals).
    """
    from tqdm import tqdm

    ending = end_of_turn(tokenizer)
    documents, dropped, examples, cut, total = [], Counter(), {}, 0, 0
    bar = tqdm(rows, desc="tokenising", unit="row", disable=not progress, file=sys.stderr)
    for number, (row, reason) in enumerate(bar):
        total += 1
        if reason is None:
            messages, reason = row_messages(row, problem_column, generation_column, system_prompt)
        if reason is None:
            document = encode_document(tokenizer, messages, ending, loss_on, number)
            if len(document) > max_length and overlong == "cut":
                document, cut = Document(document.ids[:max_length], document.mask[:max_length], number), cut + 1
            if len(document) > max_length:
                reason = f"longer than {max_length} tokens"
            elif not document.mask.any():
                reason = "no trained token left after the cut"
        if reason is None:
            documents.append(document)
        else:
            dropped[reason] += 1
            examples.setdefault(reason, []).extend([number] * (dropped[reason] <= 3))
    report = {"rows": total, "kept": len(documents), "cut": cut, "dropped": dict(dropped), "examples": examples}
    return documents, report


def load_documents(dataset, tokenizer, max_length, split="train", overlong="drop", loss_on="assistant",
                   system_prompt="", problem_column="problem", generation_column="generation", max_malformed=0.01,
                   cache_dir=".cache", progress=False):
    """
    TokenizedData of a data set, from the cache when data, tokenizer, template, options and this file are unchanged.

    Raises DataError when more than max_malformed of the rows were dropped, or when nothing is left.
    """
    from safetensors.numpy import load_file, save_file

    content_hash = source_hash(dataset, split)
    options = [max_length, overlong, loss_on, system_prompt, problem_column, generation_column]
    key = hashlib.sha256(json.dumps([content_hash, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template,
                                     options, Path(__file__).read_text()]).encode()).hexdigest()[:32]
    cached = Path(cache_dir, f"{key}.safetensors")
    if cached.is_file():
        arrays = load_file(cached)
        report = json.loads(arrays["report"].tobytes())
        cuts = np.cumsum(arrays["lengths"])[:-1]
        pieces = zip(np.split(arrays["ids"], cuts), np.split(arrays["mask"], cuts), arrays["rows"], strict=True)
        documents = [Document(ids, mask, int(row)) for ids, mask, row in pieces] if len(arrays["rows"]) else []
    else:
        documents, report = tokenize_rows(iterate_rows(dataset, split), tokenizer, max_length, overlong, loss_on,
                                          system_prompt, problem_column, generation_column, progress)
        cached.parent.mkdir(parents=True, exist_ok=True)
        arrays = {"ids": np.concatenate([d.ids for d in documents] or [np.zeros(0, np.int32)]),
                  "mask": np.concatenate([d.mask for d in documents] or [np.zeros(0, np.uint8)]),
                  "lengths": np.array([len(d) for d in documents], dtype=np.int64),
                  "rows": np.array([d.row for d in documents], dtype=np.int64),
                  "report": np.frombuffer(json.dumps(report).encode(), dtype=np.uint8)}
        temporary = cached.with_suffix(f".tmp{random.getrandbits(32):08x}")
        save_file(arrays, temporary)
        temporary.rename(cached)
    data = TokenizedData(documents, report, content_hash)
    lost = report["rows"] - report["kept"]
    if not documents:
        raise DataError(f"{dataset}: nothing to train on. {data.summary()}. "
                        "Columns are chosen by --problem_column and --generation_column")
    if lost > max_malformed * report["rows"]:
        raise DataError(f"{dataset}: {lost / report['rows']:.1%} of the rows were dropped, more than "
                        f"--max_malformed {max_malformed:.1%} allows. {data.summary()}. "
                        "Repair the rows, or raise --max_malformed (for long rows: --max_length, --overlong cut)")
    return data


def make_packs(documents, capacity, packing="best_fit"):
    """
    Packs as lists of (document, start, end): whole documents (best_fit), or the originals' concat_cut.

    concat_cut joins all documents end to end and cuts every `capacity` tokens, through documents: such a pack is one
    attention span, as in TRL 0.15, which the recipe ran.
    """
    if packing == "best_fit":
        packs = pack([len(d) for d in documents], capacity)
        return [[(i, 0, len(documents[i])) for i in members] for members in packs]
    packs, room = [[]], capacity
    for i, document in enumerate(documents):
        start = 0
        while start < len(document):
            if room == 0:
                packs.append([])
                room = capacity
            end = min(len(document), start + room)
            packs[-1].append((i, start, end))
            room -= end - start
            start = end
    return packs


def steps_of_epoch(num_packs, packs_per_step, seed, epoch):
    """
    Pack indices of every optimizer step of one epoch: shuffled by (seed, epoch), spread as evenly as possible.

    ceil(num_packs / packs_per_step) steps whose sizes differ by at most one: nothing is dropped at the end of an epoch
    and no step is a tiny remainder with a noisy gradient.
    """
    order = list(range(num_packs))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    steps = -(-num_packs // packs_per_step)
    return [order[num_packs * s // steps:num_packs * (s + 1) // steps] for s in range(steps)]


# ---------------------------------------------------------------------------------------------------------------------
# 5. The demo
# ---------------------------------------------------------------------------------------------------------------------
DEMO_SPLITS = {"train": (2400, 1), "rl": (1600, 2), "test": (200, 3)}  # rows, seed
DEMO_MODULUS = 10


def demo_problem(rng):
    """(problem, one pass of the trace, its last variable, answer): a chain of 2 to 5 steps, modulo 10."""
    names = "abcdef"[:rng.randint(3, 6)]
    value = rng.randint(0, 9)
    given, passed = [f"a={value}"], [f"a={value}"]
    for before, name in zip(names, names[1:], strict=False):
        operation, number, left = rng.choice("+-"), rng.randint(1, 4), value
        value = (left + number if operation == "+" else left - number) % DEMO_MODULUS
        given.append(f"{name}={before}{operation}{number}")
        # restated, filled in, computed: three steps that a tiny model learns one by one (copy, look up, add)
        passed.append(f"{name}={before}{operation}{number}={left}{operation}{number}={value}")
    return f"Let {', '.join(given)}. Find {names[-1]} mod {DEMO_MODULUS}.", ", ".join(passed), names[-1], value


def demo_rows(split):
    """
    Rows of the miniature recipe: problem, generation, answer. Splits train, rl and test share no problem.

    Traces carry the redundancy of R1: 0 to 3 re-checks, mostly one or two, and a box that stands sometimes before
    </think>, sometimes only after it. Stage 1 learns an accurate but long-winded model from them; stage 2 can then find
    that skipping re-checks and boxing early costs nothing.
    """
    if split not in DEMO_SPLITS:
        raise DataError(f"the demo has no split {split!r}; choose one of {', '.join(DEMO_SPLITS)}")
    seen, rows = set(), []
    for name, (count, seed) in DEMO_SPLITS.items():  # always in this order, so that later splits avoid earlier problems
        rng, rows = random.Random(seed), []
        while len(rows) < count:
            problem, steps, target, answer = demo_problem(rng)
            if problem in seen:
                continue
            seen.add(problem)
            checks = rng.choices((0, 1, 2, 3), weights=(1, 4, 4, 1))[0]
            box_inside = rng.random() < 0.7
            thought = [f"Okay, I need to find {target} step by step.", f"{steps}."]
            for _ in range(checks):
                thought += ["Wait, let me double check.", f"{steps}."]
            thought += [f"So \\boxed{{{answer}}}." if box_inside else f"So {target}={answer}."]
            generation = "<think>\n" + "\n".join(thought) + f"\n</think>\nThe answer is \\boxed{{{answer}}}."
            rows.append({"problem": problem, "generation": generation, "answer": str(answer)})
        if name == split:
            return rows
    return rows


DEMO_TEMPLATE = ("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}")


def write_demo(output, seed=0):
    """
    The demo's starting point in `output`: base/ (random weights and a tokenizer) and train, rl, test .jsonl files.

    The tokenizer is Qwen2's (bytes, digits apart) trained on the training text. initializer_range 0.06 instead of 0.02
    is the biggest single lever for a model of this size: it learns to copy within a few hundred steps.
    """
    import torch
    import transformers

    output = Path(output)
    text = [(row["problem"] + "\n" + row["generation"]).replace("</think>", "") for row in demo_rows("train")]
    tokenizer = transformers.Qwen2Tokenizer().train_new_from_iterator(
        text, 384, new_special_tokens=["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"],
        show_progress=False)
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token = "<|pad|>", "<|end|>", None
    tokenizer.add_tokens(["<think>", "</think>"])  # tokens of their own, but not special: they survive decoding
    tokenizer.chat_template = DEMO_TEMPLATE
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer) + -len(tokenizer) % 16, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        initializer_range=0.06, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config = transformers.GenerationConfig(eos_token_id=tokenizer.eos_token_id,
                                                            pad_token_id=tokenizer.pad_token_id)
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output / "base")
    tokenizer.save_pretrained(output / "base")
    for split in DEMO_SPLITS:
        rows = demo_rows(split)
        (output / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{output / split}.jsonl: {len(rows):,} rows")
    print(f"{output / 'base'}: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"vocabulary {config.vocab_size}")


# ---------------------------------------------------------------------------------------------------------------------
# 6. Decontamination: no training problem may be a benchmark's
# ---------------------------------------------------------------------------------------------------------------------
# name: hub id (and config), split. AMC23 means 40 problems here; the 83 of "AMC22+23" are another set.
BENCHMARKS = {
    "aime24": ("HuggingFaceH4/aime_2024", "train"),
    "aime25": ("yentinglin/aime_2025", "train"),
    "math500": ("HuggingFaceH4/MATH-500", "test"),
    "amc23": ("knoveleng/AMC-23", "train"),
    "minerva": ("knoveleng/Minerva-Math", "train"),
    "olympiadbench": ("knoveleng/OlympiadBench", "train"),
    "gsm8k": ("openai/gsm8k:main", "test"),
}
LATEX_LAYOUT = re.compile(
    r"\\(?:left|right|bigl|bigr|big|displaystyle|textstyle|quad|qquad|text|mathrm|mbox)(?![a-zA-Z])"
    r"|\\[,;:! ()\[\]]|[$~]")

# The stock ending of contest problems, "... m/n, where m and n are relatively prime positive integers. Find m+n.", is
# shared by problems that share nothing else: AIME 1983-2023 against the benchmarks above has 209 runs of 13
# words in common, 16 once a run needs three words that are not of this kind; none of the others is a copy.
STOCK_WORDS = frozenset(
    "can be written expressed in as the form frac sqrt m n p q a b c d r s k where and are relatively prime coprime "
    "positive integers integer is not divisible by square of any find what enter your answer an or that".split())
SPECIFIC_WORDS = 3


def plain_text(problem):
    """Lower case, one form per character (NFKC), and none of the LaTeX that only moves ink."""
    text = unicodedata.normalize("NFKC", problem).casefold()
    return LATEX_LAYOUT.sub(" ", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")


def overlap_keys(problem, n):
    """
    What two copies of one problem share: every run of n words but stock phrases, and the whole text without its blanks.

    A word is a run of letters or digits, so that $b>9$ and $b > 9$ agree. The whole text keeps its signs: 3+4 is not
    3-4, and short problems, which have no run of n words, are compared by it alone.
    """
    text = plain_text(problem)
    words = re.findall(r"[^\W_]+", text)
    whole = "".join(text.split()).rstrip(".?!:")
    yield from (["=" + whole] if whole else [])
    for i in range(len(words) - n + 1):
        run = words[i:i + n]
        if sum(word not in STOCK_WORDS for word in run) >= min(n, SPECIFIC_WORDS):
            yield " ".join(run)


def benchmark_index(benchmark_problems, n=13):
    """{key: number of the first benchmark problem that has it}, for overlap()."""
    index = {}
    for number, problem in enumerate(benchmark_problems):
        for key in overlap_keys(problem, n):
            index.setdefault(key, number)
    return index


def overlap(problem, index, n=13):
    """(number of the benchmark problem, the words shared) or None; index and n as in benchmark_index."""
    return next(((index[key], key) for key in overlap_keys(problem, n) if key in index), None)


def contamination(problems, benchmark_problems, n=13):
    """
    For each problem (number of a benchmark problem, what they share), or None where there is no overlap.

    Overlap: n words in a row (13, as in arXiv 2005.14165, appendix C), or the same text up to case, blanks and layout.
    """
    index = benchmark_index(benchmark_problems, n)
    return [overlap(problem, index, n) for problem in problems]


def question(row, problem_column="problem"):
    """Text of a row's problem: its column, or the user's first turn in messages or conversations; None without one."""
    turns = row.get("messages") or row.get("conversations") if problem_column not in row else None
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, dict) and turn.get("role", turn.get("from")) in ("user", "human"):
            return question({"problem": turn.get("content", turn.get("value"))})
    text = row.get(problem_column)
    return text.strip() if isinstance(text, str) and text.strip() else None


def load_benchmarks(benchmark_dir):
    """
    (names, problems) of all benchmark problems; names look like aime24:7.

    benchmark_dir: a folder of .json, .jsonl and .parquet files with a column problem or question (files with "train" in
    their name are no benchmark), or hub for all of BENCHMARKS. Raises DataError when there is nothing to compare with.
    """
    files = [file for file in sorted(Path(benchmark_dir).glob("*"))
             if file.suffix in (".json", ".jsonl", ".parquet") and "train" not in file.stem]
    sources = BENCHMARKS if benchmark_dir == "hub" else {file.stem: (str(file), "test") for file in files}
    if not sources:
        raise DataError(f"--benchmark_dir {benchmark_dir} is no folder with .json, .jsonl or .parquet files, nor hub")
    names, problems = [], []
    for name, (dataset, split) in sources.items():
        for number, row in enumerate(load_rows(dataset, split)):
            text = question(row) or question(row, "question")
            if text is None:
                raise DataError(f"--benchmark_dir: row {number} of {dataset} has no text in column problem or question")
            names.append(f"{name}:{number}")
            problems.append(text)
    return names, problems


def warn_of_contamination(dataset, benchmark_dir, split="train", problem_column="problem", n=13):
    """
    Compare a training set with the benchmarks before training on it; warn loudly. Returns how many rows overlap.

    For train_sft.py and train_grpo.py, on one rank, after the data is loaded. Prints one line to standard output where
    all is well or benchmark_dir is empty (not checked), and a warning with the first rows to standard error otherwise.
    It warns and does not refuse: a run on a contaminated set is sometimes the experiment. Rows that cannot be read are
    the loader's business and are passed over.
    """
    if not benchmark_dir:
        print("benchmarks overlap with the training data not checked: --benchmark_dir is empty", flush=True)
        return 0
    names, problems = load_benchmarks(benchmark_dir)
    index = benchmark_index(problems, n)
    found = []
    for number, (row, _) in enumerate(iterate_rows(dataset, split)):
        text = question(row, problem_column) if row else None
        if text and (hit := overlap(text, index, n)):
            found.append(f"  row {number} is {names[hit[0]]}: {text[:90]!r}")
    if not found:
        print(f"benchmarks {len(problems):,} problems of {benchmark_dir}: none overlaps with {dataset}", flush=True)
        return 0
    more = [f"  ... and {len(found) - 10:,} more"] if len(found) > 10 else []
    warning = [f"WARNING: {len(found):,} rows of {dataset} overlap with benchmark problems of {benchmark_dir} "
               f"({n} words in a row, or the same text).", "Scores on these benchmarks will measure memory. "
               "Rebuild the data with `python data.py build ... --benchmark_dir`."]
    print("\n".join(["!" * 100, *warning, *found[:10], *more, "!" * 100]), file=sys.stderr, flush=True)
    return len(found)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Building the recipes' data sets
# ---------------------------------------------------------------------------------------------------------------------
# Two passes, so that the sources may be larger than memory: the first judges every row and remembers of the rows that
# pass only a digest of the problem and a row number; the second writes the chosen rows.
@dataclass
class Example:
    """What a row says, whatever its columns. traces: complete and correct ones; lengths: their tokens, once counted."""

    problem: str
    answer: str
    traces: list
    key: str  # two rows with the same key are the same problem
    accuracy: float = 1.0  # share of correct generations
    solution: str = ""
    lengths: list = ()


@dataclass
class Part:
    """One line of a recipe: which rows of which source, and how many."""

    name: str  # becomes the column source
    dataset: str
    read: Callable  # (row, args) -> (Example, None) or (None, reason)
    needs_trace: bool = True
    accuracy: tuple = (0.0, 1.0)
    ends: str = "[]"  # of the accuracy range, as in mathematics: (] leaves out the lower end
    min_tokens: int = 0  # the trace must be longer
    trace_length: str = "shortest"  # which of several correct traces that means: shortest (the one kept), any, mean
    sample: int = 0  # rows to draw, 0 for all
    without: str = ""  # an earlier part: what it has drawn is not drawn again
    minus: str = ""  # a data set whose problems are taken out
    level: str = ""  # Open-RS's column


def gold_text(value):
    """
    A gold answer as the text that is graded, or None where the grader could not read it.

    Numbers from float columns lose their ".0" (27.0 -> 27): a model that writes 27 is right.
    """
    if isinstance(value, float):
        value = format(decimal.Decimal(repr(value)), "f") if math.isfinite(value) else None
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+\.0+\s*", value):
        value = value.strip().partition(".")[0]
    return None if value is None or isinstance(value, bool) else reward_lib.gold_answer(value)


def problem_key(row, problem, dedup_key):
    """What two copies of a problem share: their text with blanks normalised, the exact text, or the source's uuid."""
    text = " ".join(problem.split())
    return {"text": text, "exact": problem, "uuid": str(row.get("uuid") or text)}[dedup_key]


def make_example(row, problem, answer, traces, args, **facts):
    """(Example, None), or (None, reason) for what no recipe can use."""
    if problem is None:
        return None, "no problem text"
    try:
        "".join([problem, str(answer), facts.get("solution", ""), *traces]).encode()
    except UnicodeEncodeError:
        return None, HALF_A_PAIR
    gold = gold_text(answer)
    if gold is None:
        return None, "no gold answer" if answer in (None, "") else "gold answer that the grader cannot read"
    return Example(problem, gold, traces, problem_key(row, problem, args.dedup_key), **facts), None


def read_generations(row, args):
    """
    A row of OpenR1-Math-220k or openr1_hard: several R1 generations, each with its own marks.

    accuracy = correct generations / generations. The marks are nullable, as whole lists and one by one: an unknown mark
    counts as not correct, or not complete.
    """
    generations = row.get("generations")
    if not isinstance(generations, list) or not generations:
        return None, "no generations"
    columns = ("correctness_math_verify", "correctness_llama", "is_reasoning_complete")
    by_rule, by_llama, complete = (row.get(column) or [None] * len(generations) for column in columns)
    if not len(by_rule) == len(by_llama) == len(complete) == len(generations):
        return None, "lists of different lengths"
    correct = [bool(rule) or (args.correctness == "either" and bool(llama))
               for rule, llama in zip(by_rule, by_llama, strict=True)]
    usable = [isinstance(trace, str) and trace.strip() and right and (whole or args.completeness == "ignore")
              for trace, right, whole in zip(generations, correct, complete, strict=True)]
    traces = [trace for trace, good in zip(generations, usable, strict=True) if good]
    return make_example(row, question(row), row.get("answer"), traces, args, accuracy=sum(correct) / len(correct))


def read_light_r1(row, args):
    """
    A row of Light-R1-SFTData: a prompt and one R1 answer in `conversations`, no gold.

    The answer is the trace's last box: what it says after </think>, or where it has none there, what it said before.
    """
    turns = row.get("conversations")
    texts = [turn.get("value") for turn in turns if isinstance(turn, dict)][:2] if isinstance(turns, list) else []
    if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        return None, "conversations is not a question and an answer"
    problem, trace = texts[0].strip(), texts[1]
    answer = reward_lib.extract_answer(trace)
    if answer is None:
        return None, "no boxed answer in the trace"
    return make_example(row, problem or None, answer, [trace], args)


def read_problem(row, args):
    """A row with problem and answer (Open-RS's sets, DeepScaleR); an empty answer is read from the solution's box."""
    solution = row.get("solution") if isinstance(row.get("solution"), str) else ""
    answer = row.get("answer")
    answer = reward_lib.extract_answer(solution) if answer is None or answer == "" else answer
    return make_example(row, question(row), answer, [], args, solution=solution)


def reject(part, example):
    """Reason why an example is outside a part, or None. The length is judged once it has been counted."""
    low, high = part.accuracy
    above = example.accuracy > low or (part.ends[0] == "[" and example.accuracy == low)
    below = example.accuracy < high or (part.ends[1] == "]" and example.accuracy == high)
    if not (above and below):
        return f"accuracy outside {part.ends[0]}{low}, {high}{part.ends[1]}"
    if part.needs_trace and not example.traces:
        return "no correct, complete trace"
    if part.min_tokens and example.lengths:
        lengths = example.lengths
        length = {"shortest": min(lengths), "any": max(lengths), "mean": sum(lengths) / len(lengths)}[part.trace_length]
        if length <= part.min_tokens:
            return f"trace of at most {part.min_tokens} tokens"
    return None


def recipe_parts(args):
    """The parts of a recipe, in the order in which the first copy of a problem wins."""
    if args.recipe == "fast_math_r1_sft":
        return [
            Part("openr1_long", args.openr1_math, read_generations, accuracy=(args.a_min_accuracy, 1.0), ends="(]",
                 min_tokens=args.a_min_tokens, trace_length=args.trace_length, sample=args.a_rows),
            Part("openr1_moderate", args.openr1_math, read_generations,
                 accuracy=(args.b_min_accuracy, args.b_max_accuracy),
                 ends={"closed": "[]", "open": "()"}[args.b_ends], sample=args.b_rows,
                 without="openr1_long" if args.a_b_overlap == "remainder" else ""),
            Part("openr1_hard", args.openr1_hard, read_generations),
            Part("light_r1_stage2", args.light_r1, read_light_r1)]
    if args.recipe == "fast_math_r1_grpo":
        return [Part("light_r1_stage2", args.light_r1, read_light_r1, needs_trace=False)]
    if args.recipe == "open_rs1":
        return [Part("open_s1", args.open_s1, read_problem, needs_trace=False)]
    if args.open_rs2_from == "published":
        return [Part("open_rs", args.open_rs, read_problem, needs_trace=False)]
    # open-deepscaler is DeepScaleR without its easy problems, so what it lacks of DeepScaleR are the easy ones.
    return [
        Part("open_s1", args.open_s1, read_problem, needs_trace=False, sample=3000, level="Hard"),
        Part("open_deepscaler", args.open_deepscaler, read_problem, needs_trace=False, sample=3000, level="Hard"),
        Part("deepscaler_easy", args.deepscaler, read_problem, needs_trace=False, sample=1000, level="Easy",
             minus=args.open_deepscaler)]


def hub_file(dataset):
    """Local path of one file of a hub data set, owner/name/file; any other source is returned as it is."""
    if Path(dataset).exists() or dataset.startswith((".", "/")) or dataset.count("/") < 2:
        return dataset
    from huggingface_hub import hf_hub_download

    owner, name, file = dataset.split("/", 2)
    try:
        return hf_hub_download(f"{owner}/{name}", file, repo_type="dataset")
    except (OSError, ValueError) as error:
        raise DataError(f"{dataset} is no local file and not to be had from the hub: {str(error)[:200]}") from error


def token_counter(name):
    """texts -> tokens of each, without special tokens, by the tokenizer of a folder or hub id."""
    from model import load_tokenizer

    try:
        tokenizer = load_tokenizer(name)
    except (OSError, ValueError) as error:
        raise DataError(f"--tokenizer {name} cannot be loaded: {str(error)[:200]}") from error
    return lambda texts: [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def read_examples(dataset, read, args, wanted, count_tokens=None, title=""):
    """
    Yield (row number, Example, None) or (row number, None, reason) for every row of a source.

    Examples for which wanted(number, example) holds have their traces counted and sorted, shortest first; 64 rows at a
    time, because the tokenizer uses all cores on a list of texts.
    """
    from tqdm import tqdm

    def measured(waiting):
        chosen = [example for number, example, _ in waiting if count_tokens and example and wanted(number, example)]
        traces = [trace for example in chosen for trace in example.traces]
        lengths = iter(count_tokens(traces) if traces else [])
        for example in chosen:
            pairs = sorted(((next(lengths), trace) for trace in example.traces), key=lambda pair: pair[0])
            example.lengths, example.traces = [n for n, _ in pairs], [trace for _, trace in pairs]
        return waiting

    waiting = []
    rows = tqdm(iterate_rows(hub_file(dataset)), desc=title, unit=" rows", file=sys.stderr)
    for number, (row, reason) in enumerate(rows):
        waiting.append((number, *(read(row, args) if reason is None else (None, reason))))
        if len(waiting) == 64:
            yield from measured(waiting)
            waiting = []
    yield from measured(waiting)


def digest(text):
    """16 bytes that stand for a text: what pass 1 remembers of a problem."""
    return hashlib.sha256(text.encode()).digest()[:16]


def judge_sources(parts, args, count_tokens, names, index):
    """
    Pass 1. ({part: {row number: digest of the problem}}, report, contaminated rows) of what passes every filter.

    report[part] = {"rows", "dropped": {reason: count}}; each row is counted once in every part that reads its source.
    """
    candidates = {part.name: {} for part in parts}
    report = {part.name: {"rows": 0, "dropped": Counter()} for part in parts}
    contaminated, problems_of = [], {part.minus: set() for part in parts}
    for dataset in dict.fromkeys(part.dataset for part in parts):
        readers = [part for part in parts if part.dataset == dataset]

        def wanted(number, example, readers=readers):
            return any(reject(part, example) is None for part in readers)

        examples = read_examples(dataset, readers[0].read, args, wanted, count_tokens, f"judging {dataset}")
        for number, example, unreadable in examples:
            key = example and digest(example.key)
            if example and dataset in problems_of:
                problems_of[dataset].add(key)
            for part in readers:
                reason, hit = unreadable or reject(part, example), None
                if reason is None and part.minus and key in problems_of[part.minus]:
                    reason = f"also in {part.minus}"
                if reason is None and (hit := overlap(example.problem, index, args.ngram)):
                    reason = "overlaps with a benchmark"
                    contaminated.append({"source": part.name, "row": number, "benchmark": names[hit[0]],
                                         "shared": hit[1][:200], "problem": example.problem[:200]})
                report[part.name]["rows"] += 1
                if reason is None:
                    candidates[part.name][number] = key
                else:
                    report[part.name]["dropped"][reason] += 1
    return candidates, report, contaminated


def draw(candidates, sample, seed, name):
    """
    Row numbers of a random sample: the rows whose hash of (seed, part, problem) is lowest.

    Unlike drawing by position, the choice does not change when the source is sorted differently or gains other rows.
    """
    order = sorted(candidates, key=lambda number: (digest(f"{seed}/{name}/" + candidates[number].hex()), number))
    return set(order[:sample or None])


def choose_rows(parts, candidates, report, seed):
    """{data set: {row number: part}}: draw from each part in turn; of a problem's copies the first wins."""
    chosen, drawn, seen = {part.dataset: {} for part in parts}, {}, set()
    for part in parts:
        rows, dropped = candidates[part.name], report[part.name]["dropped"]
        left = {number: key for number, key in rows.items() if number not in drawn.get(part.without, ())}
        drawn[part.name] = draw(left, part.sample, seed, part.name)
        fresh = []
        for number in sorted(drawn[part.name]):
            if rows[number] not in seen:
                seen.add(rows[number])
                fresh.append(number)
        chosen[part.dataset].update(dict.fromkeys(fresh, part))
        dropped[f"drawn for {part.without}"] = len(rows) - len(left)
        dropped["not drawn"] = len(left) - len(drawn[part.name])
        dropped["duplicate of an earlier problem"] = len(drawn[part.name]) - len(fresh)
        report[part.name]["kept"] = len(fresh)
        report[part.name]["dropped"] = {reason: count for reason, count in sorted(dropped.items()) if count}
    return chosen


def chosen_rows(chosen, parts, args, count_tokens, tokens):
    """Pass 2: yield the output rows, source by source in file order; appends each kept trace's length to `tokens`."""
    columns = {"problem", "answer", "source"} | ({"generation"} if parts[0].needs_trace else set())
    columns |= ({"solution"} if parts[0].read is read_problem else set()) | ({"level"} if parts[0].level else set())
    for dataset, rows in chosen.items():
        read = next(part.read for part in parts if part.dataset == dataset)

        def wanted(number, example, rows=rows):
            return number in rows

        for number, example, _ in read_examples(dataset, read, args, wanted, count_tokens, f"writing {dataset}"):
            if number not in rows:
                continue
            if example is None:
                raise DataError(f"{dataset} has changed between the two passes; build again")
            part = rows[number]
            row = {"problem": example.problem, "generation": example.traces[0] if part.needs_trace else "",
                   "answer": example.answer, "source": part.name, "solution": example.solution, "level": part.level}
            if part.needs_trace:
                tokens.append(example.lengths[0])
            yield {column: text for column, text in row.items() if column in columns}


def write_rows(output, rows):
    """Write rows of strings as .jsonl or .parquet, under a temporary name first; returns how many."""
    output, count = Path(output), 0
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.tmp")
    if output.suffix == ".jsonl":
        with open(temporary, "w") as file:
            for count, row in enumerate(rows, 1):  # noqa: B007  (the last count is the answer)
                file.write(json.dumps(row) + "\n")
    else:
        import pyarrow
        import pyarrow.parquet

        writer, rows = None, iter(rows)
        while block := list(itertools.islice(rows, 500)):  # so many traces at a time are in memory
            schema = pyarrow.schema([(column, pyarrow.string()) for column in block[0]])
            writer = writer or pyarrow.parquet.ParquetWriter(temporary, schema)
            writer.write_table(pyarrow.Table.from_pylist(block, schema))
            count += len(block)
        if writer:
            writer.close()
    if count:
        temporary.rename(output)
    return count


def build(args):
    """
    Build a recipe's data set: args.output, and args.output + ".report.json" with what became of every source row.

    The same sources and flags give the same bytes. Raises DataError when a source cannot be read or nothing is left.
    """
    output = Path(args.output)
    if output.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"--output {output}: the name must end in .jsonl or .parquet")
    for flag, least in (("a_rows", 0), ("b_rows", 0), ("ngram", 1)):
        if getattr(args, flag) < least:
            raise DataError(f"--{flag} {getattr(args, flag)} must be at least {least}")
    parts = recipe_parts(args)
    options = {name: value for name, value in sorted(vars(args).items()) if name not in ("output", "dry_run")}
    if args.dry_run:
        print("\n".join(f"{part.name:18} from {part.dataset}" for part in parts) + f"\nwould write {output}")
        return
    names, benchmark_problems = load_benchmarks(args.benchmark_dir) if args.benchmark_dir else ([], [])
    index = benchmark_index(benchmark_problems, args.ngram)
    count_tokens = token_counter(args.tokenizer) if any(part.needs_trace for part in parts) else None
    candidates, report, contaminated = judge_sources(parts, args, count_tokens, names, index)
    chosen = choose_rows(parts, candidates, report, args.seed)
    if not any(chosen.values()):
        raise DataError(f"--recipe {args.recipe}: no row is left; {json.dumps(report)}")
    tokens = []
    count = write_rows(output, chosen_rows(chosen, parts, args, count_tokens, tokens))
    report = {"rows": count, "tokens": sum(tokens), "options": options, "sources": report,
              "benchmark_problems": len(names), "contaminated": contaminated}
    temporary = output.with_name(f".{output.name}.report.tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.rename(f"{output}.report.json")
    print_report(output, report)


def print_report(output, report):
    for name, part in report["sources"].items():
        print(f"{name}: {part['rows']:,} rows read, {part['kept']:,} kept")
        for reason, dropped in part["dropped"].items():
            print(f"    {dropped:>9,}  {reason}")
    found, compared = report["contaminated"], report["benchmark_problems"]
    print(f"decontamination: {len(found):,} rows removed, {compared:,} benchmark problems compared" if compared else
          "decontamination: SKIPPED, --benchmark_dir is empty")
    for row in found[:10]:
        print(f"    {row['source']} row {row['row']} is {row['benchmark']}: {row['problem'][:80]!r}")
    tokens = report["tokens"]
    mean = f", {tokens:,} trace tokens, {tokens / report['rows']:,.0f} per row" if tokens else ""
    print(f"{output}: {report['rows']:,} rows{mean}; all removed overlaps stand in {output}.report.json")


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------
def show_rows(args):
    """Print rows as a trainer with these flags sees them: trained tokens green, the rest grey."""
    from model import load_tokenizer

    tokenizer = load_tokenizer(args.model_name_or_path)
    set_chat_template(tokenizer, args.chat_template)
    ending = end_of_turn(tokenizer)
    shown = 0
    for number, (row, reason) in enumerate(iterate_rows(args.dataset, args.split)):
        if shown == args.show:
            break
        if reason is None:
            messages, reason = row_messages(row, args.problem_column, args.generation_column,
                                            system_prompt_text(args.system_prompt))
        if reason is not None:
            print(f"--- row {number}: dropped, {reason}\n")
            continue
        document = encode_document(tokenizer, messages, ending, args.loss_on, number)
        shown += 1
        print(f"--- row {number}: {len(document)} tokens, {int(document.mask.sum())} trained (green)")
        pieces = [f"\033[{32 if trained else 90}m{tokenizer.decode([token])}\033[0m"
                  for token, trained in zip(document.ids, document.mask, strict=True)]
        print("".join(pieces) + "\n")


def show_parser():
    import argparse

    parser = argparse.ArgumentParser(
        prog="data.py", allow_abbrev=False,
        description="Print rows as a trainer with these flags sees them, trained tokens in green. "
        "`data.py build --help` tells about building the recipes' data sets.")
    parser.add_argument("--show", type=int, default=3, help="number of rows to print")
    parser.add_argument("--dataset", default="demo", help="hub id, .json, .jsonl, .parquet, saved folder, or demo")
    parser.add_argument("--split", default="train")
    parser.add_argument("--model_name_or_path", required=True, help="folder or hub id whose tokenizer is used")
    parser.add_argument("--chat_template", default="tokenizer", help="tokenizer, open_r1_roles or a Jinja file")
    parser.add_argument("--system_prompt", default="sft", help=f"one of {', '.join(SYSTEM_PROMPTS)}, or the text")
    parser.add_argument("--problem_column", default="problem")
    parser.add_argument("--generation_column", default="generation")
    parser.add_argument("--loss_on", default="assistant", choices=("assistant", "all", "all_but_eos"))
    return parser


def build_parser():
    import argparse

    parser = argparse.ArgumentParser(
        prog="data.py build", allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Build a recipe's data set from its sources: hub ids, or local files with the same columns.")
    recipes = ("fast_math_r1_sft", "fast_math_r1_grpo", "open_rs1", "open_rs2", "demo")
    add = parser.add_argument
    add("--recipe", required=True, choices=recipes, help="which data set")
    add("--output", required=True, help="file to write, .jsonl or .parquet; for demo a folder")
    add("--seed", type=int, default=2025, help="of every random draw")
    add("--dry_run", action="store_true", help="print what would be read and written")

    sources = parser.add_argument_group("sources").add_argument
    sources("--openr1_math", default="open-r1/OpenR1-Math-220k:default", help="parts a, b; :all: 225k rows")
    sources("--openr1_hard", default="hoanganhpham/openr1_hard", help="part c: problems that a 32B model never solved")
    sources("--light_r1", default="qihoo360/Light-R1-SFTData/stage2-3k.json", help="part d, and the whole GRPO set")
    sources("--open_s1", default="knoveleng/open-s1", help="set of Open-RS1")
    sources("--open_rs", default="knoveleng/open-rs", help="set of Open-RS2 and RS3, as published")
    sources("--open_deepscaler", default="knoveleng/open-deepscaler", help="for --open_rs2_from parts")
    sources("--deepscaler", default="agentica-org/DeepScaleR-Preview-Dataset", help="for --open_rs2_from parts")

    # What the papers leave open.
    choice = parser.add_argument_group("what the papers leave open").add_argument
    choice("--correctness", default="either", choices=("either", "math_verify"),
           help="a generation is correct by math-verify or by the Llama judge, or by math-verify alone")
    choice("--completeness", default="require", choices=("require", "ignore"), help="keep only complete traces")
    choice("--a_min_accuracy", type=float, default=0.5, help="part a: accuracy above this")
    choice("--a_min_tokens", type=int, default=12800, help="part a: trace longer than this")
    choice("--a_rows", type=int, default=3000, help="part a: rows drawn, 0 for all")
    choice("--trace_length", default="shortest", choices=("shortest", "any", "mean"),
           help="part a: which of the correct traces must be that long; the shortest is the one kept")
    choice("--b_min_accuracy", type=float, default=0.5, help="part b: lower end of the accuracy range")
    choice("--b_max_accuracy", type=float, default=0.75, help="part b: upper end of the accuracy range")
    choice("--b_ends", default="closed", choices=("closed", "open"), help="part b: are the ends in the range")
    choice("--b_rows", type=int, default=3000, help="part b: rows drawn, 0 for all")
    choice("--a_b_overlap", default="remainder", choices=("remainder", "independent"),
           help="draw b from what a has left over, or from all rows and let deduplication decide")
    choice("--tokenizer", default="deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", help="counts a trace's tokens")
    choice("--dedup_key", default="text", choices=("text", "exact", "uuid"),
           help="two rows are one problem by text up to blanks, by exact text, or by the source's uuid")
    choice("--open_rs2_from", default="published", choices=("published", "parts"), help="as published, or drawn anew")

    check = parser.add_argument_group("decontamination").add_argument
    check("--benchmark_dir", default="", help="folder of benchmarks, or hub; empty: no check")
    check("--ngram", type=int, default=13, help="words in a row that make an overlap")
    return parser


def main():
    try:
        if sys.argv[1:2] == ["build"]:
            args = build_parser().parse_args(sys.argv[2:])
            if args.recipe == "demo":
                write_demo(args.output, args.seed)
            else:
                build(args)
        else:
            show_rows(show_parser().parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    main()
