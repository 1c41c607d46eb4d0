"""
From raw rows to packs of token ids: loading, templates and loss masks, packing and dealing, the demo's problems.

    1. sources        hub id, JSON, JSONL, Parquet, a saved folder or `demo` -> rows; malformed ones counted by reason
    2. templates      problem -> prompt ids; problem and trace -> ids and the positions that are trained
    3. packing        whole documents, best-fit decreasing; packs dealt so that ranks do equal work at the same time
    4. data set       tokenised once, cached by content; the order is a function of (seed, epoch)
    5. the demo       chained arithmetic with R1-like redundancy, a tokenizer and a model small enough for two cores

    python data.py --show 3 --dataset FILE --model_name_or_path DIR    rows with the trained tokens coloured
    python data.py build --recipe demo --output DIR                    the demo's model folder and its three files

Letters: D documents, T tokens of a pack, P packs of an optimizer step, R ranks.
"""

import bisect
import hashlib
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np


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


def parse_json_row(line):
    """(row, None), or (None, reason) for a line that is no JSON object."""
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=reject_duplicate_keys)
    except UnicodeDecodeError:
        return None, "not UTF-8"
    except RecursionError:
        return None, "not JSON (nested too deeply)"
    except ValueError as error:
        return None, "duplicate key" if "duplicate key" in str(error) else "not JSON"
    return (row, None) if isinstance(row, dict) else (None, "not a JSON object")


def iterate_rows(dataset, split="train"):
    """
    Yield (row, None) for every row of a data set, or (None, reason) where the row itself cannot be read.

    dataset: a JSON file (a list of objects), JSONL file, Parquet file, a folder saved by `datasets`, `demo`, `demo:rl`
    or `demo:test`, or a hub id, optionally `owner/name:config`. Rows are read one at a time: the data may be larger than
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
            raise DataError(f"{path} is not valid JSON ({str(error)[:100]}); one object per line goes into a .jsonl file") from error
        if not isinstance(rows, list):
            raise DataError(f"{path} holds a {type(rows).__name__}, not a list of rows")
        for row in rows:
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
            raise DataError(f"data set {dataset!r} is no file, no folder, not `demo` and no hub id of the form owner/name")
        yield from rows
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001  (the libraries below raise a dozen unrelated types; the cause is chained)
        raise DataError(f"data set {dataset} cannot be read: {type(error).__name__}: {str(error)[:200]}") from error


def load_rows(dataset, split="train"):
    """All readable rows of a data set as a list of dicts; raises DataError if any row is unreadable or there is none."""
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
    """What identifies the content of a data set: SHA-256 of a local file's or folder's bytes, name and split of a hub id."""
    path, digest = Path(dataset), hashlib.sha256(f"{dataset}:{split}".encode() if not Path(dataset).exists() else split.encode())
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
GRPO_SYSTEM_PROMPT = (r"You are a helpful and harmless assistant. You are Qwen developed by Alibaba. You should think step-by-step. "
                      r"Return final answer within \boxed{{}}.")
OPEN_RS_SYSTEM_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant first "
    "thinks about the reasoning process in the mind and then provides the user with the answer, and put your final answer "
    r"within \boxed{{}} . The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
    "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>.")
SYSTEM_PROMPTS = {
    "sft": SFT_SYSTEM_PROMPT, "grpo": GRPO_SYSTEM_PROMPT, "open_rs": OPEN_RS_SYSTEM_PROMPT, "none": "",
    "open_rs3": OPEN_RS_SYSTEM_PROMPT + " Note that respond by English, NOT use other languages.",
}
# The open-r1 role markers that stage 1 of Fast-Math-R1 trained with (RECIPES 2): ordinary text, no <think> to start from.
OPEN_R1_ROLES = ("{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
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
        raise DataError("the tokenizer has no chat template of its own; choose --chat_template open_r1_roles or a Jinja file")
    render(tokenizer, [{"role": "user", "content": "1+1"}], add_generation_prompt=True)


def system_prompt_text(system_prompt):
    """A name of SYSTEM_PROMPTS, or the text itself."""
    return SYSTEM_PROMPTS.get(system_prompt, system_prompt)


def render(tokenizer, messages, add_generation_prompt=False):
    """The template's text; a template that fails is a DataError, not a Jinja traceback."""
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError, KeyError) as error:
        raise DataError(f"the chat template fails on roles {[m['role'] for m in messages]}: {str(error)[:200]}") from error


def encode_prompt(tokenizer, text):
    """Ids of a rendered prompt with exactly one BOS where the tokenizer uses one: from the template or added here."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id, *ids] if adds_bos and ids[:1] != [tokenizer.bos_token_id] else ids


def prompt_messages(problem, system_prompt=""):
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": problem}]


def chat_prompt_ids(tokenizer, problem, system_prompt=""):
    """Token ids of the prompt that asks for a problem's answer, generation prompt included; the same in SFT, GRPO and evaluation."""
    return encode_prompt(tokenizer, render(tokenizer, prompt_messages(problem, system_prompt), add_generation_prompt=True))


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
        messages = [{"role": turn.get("role", turn.get("from")), "content": turn.get("content", turn.get("value"))} for turn in turns]
        messages = [{**m, "role": names.get(m["role"], m["role"]) if isinstance(m["role"], str) else None} for m in messages]
        if any(m["role"] not in ("system", "user", "assistant") for m in messages):
            return None, "a role that is not system, user or assistant"
        if system_prompt and messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system_prompt})
    else:
        missing = [column for column in (problem_column, generation_column) if column not in row]
        if missing:
            return None, f"no column {missing[0]!r}"
        messages = [*prompt_messages(row[problem_column], system_prompt), {"role": "assistant", "content": row[generation_column]}]
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
    """One training example. ids (n,) int32; mask (n,) uint8, 1 on the tokens that are predicted and trained; row: its source row."""

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


def deal(costs, ranks):
    """
    Packs of one optimizer step per rank: equal counts, and packs of nearly equal cost at the same time.

    Sort by cost, give each group of `ranks` neighbours to the ranks, alternating direction so that totals even out too.
    All ranks wait for the slowest in every micro-batch, so random dealing costs 14 to 20% (PERF.md 0.7); the gradient is
    the same. A count that is no multiple of ranks is filled up with -1, an empty pack.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    order += [-1] * (-len(order) % ranks)
    hands = [[] for _ in range(ranks)]
    for turn, start in enumerate(range(0, len(order), ranks)):
        group = order[start:start + ranks]
        for rank, index in enumerate(group if turn % 2 == 0 else group[::-1]):
            hands[rank].append(index)
    return hands


def balance(costs, ranks):
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
        return f"{self.report['kept']:,} of {self.report['rows']:,} rows kept; dropped: {dropped or 'none'}; cut: {self.report['cut']:,}"


def tokenize_rows(rows, tokenizer, max_length, overlong="drop", loss_on="assistant", system_prompt="",
                  problem_column="problem", generation_column="generation", progress=False):
    """
    Documents and a report of an iterator of (row, reason) pairs, as iterate_rows yields them.

    overlong: "drop" counts a document above max_length as dropped, "cut" keeps its first max_length tokens and counts it
    as cut. loss_on: assistant, all, all_but_eos (the originals).
    """
    from tqdm import tqdm

    ending = end_of_turn(tokenizer)
    documents, dropped, examples, cut, total = [], Counter(), {}, 0, 0
    for number, (row, reason) in enumerate(tqdm(rows, desc="tokenising", unit="row", disable=not progress, file=sys.stderr)):
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
    return documents, {"rows": total, "kept": len(documents), "cut": cut, "dropped": dict(dropped), "examples": examples}


def load_documents(dataset, tokenizer, max_length, split="train", overlong="drop", loss_on="assistant", system_prompt="",
                   problem_column="problem", generation_column="generation", max_malformed=0.01, cache_dir=".cache", progress=False):
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
        documents = [Document(ids, mask, int(row)) for ids, mask, row in zip(
            np.split(arrays["ids"], cuts), np.split(arrays["mask"], cuts), arrays["rows"], strict=True)] if len(arrays["rows"]) else []
    else:
        documents, report = tokenize_rows(iterate_rows(dataset, split), tokenizer, max_length, overlong, loss_on, system_prompt,
                                          problem_column, generation_column, progress)
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
        raise DataError(f"{dataset}: nothing to train on. {data.summary()}. Columns are chosen by --problem_column and --generation_column")
    if lost > max_malformed * report["rows"]:
        raise DataError(f"{dataset}: {lost / report['rows']:.1%} of the rows were dropped, more than --max_malformed {max_malformed:.1%} "
                        f"allows. {data.summary()}. Repair the rows, or raise --max_malformed (for long rows: --max_length, --overlong cut)")
    return data


def make_packs(documents, capacity, packing="best_fit"):
    """
    Packs as lists of (document, start, end): whole documents (best_fit), or the originals' concat_cut.

    concat_cut joins all documents end to end and cuts every `capacity` tokens, through documents: such a pack is one
    attention span, as in TRL 0.15 (RECIPES 7, oddity 13).
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
        operation, number = rng.choice("+-"), rng.randint(1, 9)
        value = (value + number if operation == "+" else value - number) % DEMO_MODULUS
        given.append(f"{name}={before}{operation}{number}")
        passed.append(f"{name}={before}{operation}{number}={value}")
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

    The tokenizer is a byte-level BPE trained on the training text, digits apart. initializer_range 0.06 instead of 0.02
    is the biggest single lever for a model of this size: it learns to copy within a few hundred steps (DEMO.md).
    """
    import torch
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    output = Path(output)
    specials = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d|[a-j](?=[=+\-,. ])|[=+\-,.]"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    text = [row["problem"] + "\n" + row["generation"] for row in demo_rows("train")]
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    bpe.train_from_iterator(text, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>",
                                                     additional_special_tokens=specials[2:], clean_up_tokenization_spaces=False)
    tokenizer.add_tokens(["<think>", "</think>"])  # tokens of their own, but not special: they survive decoding
    tokenizer.chat_template = DEMO_TEMPLATE
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer) + -len(tokenizer) % 16, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        initializer_range=0.06, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config = transformers.GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output / "base")
    tokenizer.save_pretrained(output / "base")
    for split in DEMO_SPLITS:
        rows = demo_rows(split)
        (output / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{output / split}.jsonl: {len(rows):,} rows")
    print(f"{output / 'base'}: {sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {config.vocab_size}")


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------
def show_rows(args):
    """Print rows as the trainer sees them: trained tokens green, the rest grey, one bar between tokens."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model_name_or_path)
    set_chat_template(tokenizer, args.chat_template)
    ending = end_of_turn(tokenizer)
    shown = 0
    for number, (row, reason) in enumerate(iterate_rows(args.dataset, args.split)):
        if shown == args.show:
            break
        if reason is None:
            messages, reason = row_messages(row, args.problem_column, args.generation_column, system_prompt_text(args.system_prompt))
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
        prog="data.py", allow_abbrev=False, description="Print rows as the trainer sees them, trained tokens in green. "
        "`data.py build --help` tells about building the recipes' data sets.")
    parser.add_argument("--show", type=int, default=3, help="number of rows to print")
    parser.add_argument("--dataset", default="demo", help="hub id, .json, .jsonl, .parquet, saved folder, or demo")
    parser.add_argument("--split", default="train")
    parser.add_argument("--model_name_or_path", required=True, help="folder or hub id whose tokenizer is used")
    parser.add_argument("--chat_template", default="tokenizer", help="tokenizer, open_r1_roles or a Jinja file")
    parser.add_argument("--system_prompt", default="sft", help=f"one of {', '.join(SYSTEM_PROMPTS)}, or the text itself")
    parser.add_argument("--problem_column", default="problem")
    parser.add_argument("--generation_column", default="generation")
    parser.add_argument("--loss_on", default="assistant", choices=("assistant", "all", "all_but_eos"))
    return parser


def build_parser():
    import argparse

    parser = argparse.ArgumentParser(prog="data.py build", allow_abbrev=False, description="Build a recipe's data set.")
    parser.add_argument("--recipe", required=True, choices=("demo",), help="which data set")
    parser.add_argument("--output", required=True, help="file to write (.jsonl or .parquet); for demo a folder")
    parser.add_argument("--seed", type=int, default=2025)
    return parser


def main():
    try:
        if sys.argv[1:2] == ["build"]:
            args = build_parser().parse_args(sys.argv[2:])
            write_demo(args.output, args.seed)
        else:
            show_rows(show_parser().parse_args())
    except (DataError, OSError) as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    main()
