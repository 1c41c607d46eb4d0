r"""
Rewards for mathematics: strings and numbers in, numbers out.  No torch; importable in any thread.

    1. rewards     accuracy, format, cosine, length, repetition, soft overlong: the formulas of the
                   papers, and a function of your own
    2. the grader  is_equal(prediction, gold): does \frac12 mean 0.5?  It serves the reward, the
                   evaluation and the majority vote
    3. workers     your function is code we do not know, so it runs in a process that can be killed

Two rules for the grader.  A wrong "equal" teaches the model to cheat, a wrong "different" costs one
sample: what cannot be read or decided is "different".  And a model's output is hostile input: it is
never evaluated by Python or sympy, and every step is bounded before it starts.
"""

import ctypes
import functools
import importlib.util
import json
import math
import numbers
import operator
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import unicodedata
from dataclasses import dataclass, field
from fractions import Fraction
from multiprocessing.connection import Connection
from pathlib import Path

import mpmath

# --------------------------------------------------------------------------------------------------
# 1. Rewards
# --------------------------------------------------------------------------------------------------


def format_reward(text):
    r"""
    1.0 if a balanced, non-empty \boxed{...} stands before the first `</think>`, else 0.0.

    Linear in len(text).  The recipe's regular expression, `^.*?oxed{(.*?)}.*?</think>.*?$`, needs
    12 s for a looping completion of 16,000 characters and pays for quoting "\boxed{}".
    """
    return float("</think>" in text and extract_answer(text, "before_think_end") is not None)


def format_open_rs_reward(text):
    r"""1.0 if "\n</think>\n" occurs exactly once (Open-RS: its <answer> tags are not checked)."""
    return float(text.count("\n</think>\n") == 1)


def cosine_reward(length, correct, max_length=9600, correct_at_0=1.0, correct_at_max=0.1,
                  wrong_at_0=-1.0, wrong_at_max=-0.1):
    """
    Cosine schedule from the value at length 0 to the value at max_length (arXiv 2502.03373):

        r = r_max + (r_0 - r_max) (1 + cos(pi p)) / 2,   p = min(1, length / max_length)

    The ends are named by where they hold, not min and max: swapping those is how longer wrong
    answers came to be punished more in one published recipe and less in another.
    """
    at_0, at_max = (correct_at_0, correct_at_max) if correct else (wrong_at_0, wrong_at_max)
    progress = min(1.0, length / max_length)
    return at_max + (at_0 - at_max) * (1 + math.cos(math.pi * progress)) / 2


def length_rewards(lengths, correct):
    """
    Length rewards of the G answers to one problem (Kimi k1.5, arXiv 2501.12599, section 2.3.3):

        lambda = 1/2 - (length - shortest) / (longest - shortest)
        right: lambda;   wrong: min(0, lambda);   all of one length: 0

    lengths: G numbers; correct: G bools -> list of G floats.
    """
    shortest, longest = min(lengths, default=0), max(lengths, default=0)
    if longest == shortest:
        return [0.0] * len(lengths)
    shares = [0.5 - (length - shortest) / (longest - shortest) for length in lengths]
    return [s if right else min(0.0, s) for s, right in zip(shares, correct, strict=True)]


def repetition_penalty(text, ngram_size=3):
    """unique / all - 1 over the n-grams of words: 0 if none is repeated, -> -1 for a loop."""
    words = text.lower().split()
    total = len(words) - ngram_size + 1
    if total < 1:
        return 0.0
    ngrams = {tuple(words[i:i + ngram_size]) for i in range(total)}
    return len(ngrams) / total - 1


def soft_overlong_penalty(length, max_length=16384, cache=4096):
    """0 to max_length - cache, then linearly down to -1 (DAPO, arXiv 2503.14476, eq. 13)."""
    return max(-1.0, min(0.0, (max_length - cache - length) / cache))


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class RewardOptions:
    """Reward flags of train_grpo.py.  The defaults are Fast-Math-R1 stage 2; lengths in tokens."""

    reward_funcs: str = flag(
        "format,cosine,length", "Comma list of accuracy, format, format_open_rs, cosine, length, "
        "repetition, soft_overlong, or path/to/file.py:function, called as function(completion, "
        "answer) -> number, or None for no verdict.")
    reward_weights: str = flag("", "Comma list, one weight per reward; empty: all 1.")
    answer_scope: str = flag(
        "full", "Which box counts. full: the last of the completion; before_think_end: the last "
        "before </think>, for a deployment that stops there.")
    # 9600: the recipe's 30,000 characters, at 3.1 characters a token
    cosine_max_length: int = flag(9600, "Tokens where the cosine ends.")
    cosine_correct_at_0: float = flag(1.0, "Cosine reward of a right answer of length 0.")
    cosine_correct_at_max: float = flag(0.1, "The same at cosine_max_length and beyond.")
    cosine_wrong_at_0: float = flag(-1.0, "Cosine reward of a wrong answer of length 0.")
    cosine_wrong_at_max: float = flag(-0.1, "The same at cosine_max_length and beyond.")
    soft_overlong_cache: int = flag(
        4096, "Tokens before the limit over which soft_overlong falls from 0 to -1.")
    reward_timeout: float = flag(
        10.0, "Seconds that your own reward function has for one completion.")
    max_completion_length: int = flag(16384, "Tokens an answer may have.")


@dataclass
class RewardedGroup:
    """Rewards of the G completions of one prompt; nan is "no verdict": keep it out of the loss."""

    parts: dict  # name of a reward -> G floats, before weights
    totals: list  # G floats: sum of weight * part
    outcomes: list  # G of right | wrong | no_answer | bad_gold | timeout | crash | no_verdict
    correct: list  # G of True | False, or None where the gold answer cannot be read
    lengths: list  # G ints, in tokens


BUILT_IN = ("accuracy", "format", "format_open_rs", "cosine", "length", "repetition",
            "soft_overlong")


@functools.lru_cache
def parse_rewards(funcs, weights):
    """((name, weight), ...) of the two flags."""
    names = [name.strip() for name in funcs.split(",") if name.strip()]
    values = [float(weight) for weight in weights.split(",") if weight.strip()]
    values = values or [1.0] * len(names)
    if not names:
        raise ValueError("--reward_funcs is empty: nothing would be learnt; name at least one")
    if len({part_name(name) for name in names}) < len(names):
        raise ValueError(f"--reward_funcs {funcs!r} names a reward twice; they are logged by name")
    if len(values) != len(names):
        raise ValueError(f"--reward_weights {weights!r} has {len(values)} numbers for {len(names)} "
                         f"rewards, {funcs}: give one weight for each")
    for name in names:
        path, colon, function = name.rpartition(":")
        if name not in BUILT_IN and not (function and path.endswith(".py")):
            raise ValueError(f"--reward_funcs {name!r}: choose among {', '.join(BUILT_IN)}, "
                             "path/to/file.py:function")
        if colon and not Path(path).is_file():
            raise ValueError(f"--reward_funcs {name!r}: there is no file {path}")
    return tuple(zip(names, values, strict=True))


def check_reward_options(options):
    """[(name, weight)] of the rewards asked for.  Raises ValueError: flag, value and remedy."""
    if options.answer_scope not in ("full", "before_think_end"):
        raise ValueError(f"--answer_scope {options.answer_scope!r}: choose full or "
                         "before_think_end")
    for name in ("cosine_max_length", "soft_overlong_cache", "reward_timeout"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name} {getattr(options, name)} must be above 0")
    return list(parse_rewards(options.reward_funcs, options.reward_weights))


def part_name(name):
    """Key of a reward in the logs: its name, or the function's of path/to/file.py:function."""
    return name.rpartition(":")[2]


def rewards_for_group(texts, gold, options, lengths):
    """RewardedGroup of the G completions (texts) of one prompt; lengths: G token counts."""
    outcomes, correct = judge(texts, gold, options.answer_scope)
    rewards, parts = parse_rewards(options.reward_funcs, options.reward_weights), {}
    for name, _ in rewards:
        if name in BUILT_IN:
            values = built_in_part(name, texts, correct, lengths, options)
        else:
            values = user_part(name, texts, gold, outcomes, options.reward_timeout)
        parts[part_name(name)] = values
    return RewardedGroup(parts, weighted_totals(parts, correct, rewards), outcomes, correct,
                         list(lengths))


def judge(texts, gold, scope="full"):
    """(outcomes, correct) of completions; an unreadable gold answer decides nothing."""
    if gold_answer(gold) is None:
        return ["bad_gold"] * len(texts), [None] * len(texts)
    outcomes = [grade(text, gold, scope) for text in texts]
    return outcomes, [outcome == "right" for outcome in outcomes]


def grade(completion, gold, scope="full"):
    """"right", "wrong" or "no_answer" for one completion."""
    answer = extract_answer(completion, scope)
    if answer is None:
        return "no_answer"
    return "right" if is_equal(answer, gold) else "wrong"


def built_in_part(name, texts, correct, lengths, options):
    """G floats of one built-in reward; nan if it needs a readable gold answer and there is none."""
    if name == "format":
        return [format_reward(text) for text in texts]
    if name == "format_open_rs":
        return [format_open_rs_reward(text) for text in texts]
    if name == "repetition":
        return [repetition_penalty(text) for text in texts]
    if name == "soft_overlong":
        limit, cache = options.max_completion_length, options.soft_overlong_cache
        return [soft_overlong_penalty(length, limit, cache) for length in lengths]
    if None in correct:
        return [math.nan] * len(correct)
    if name == "accuracy":
        return [float(right) for right in correct]
    if name == "length":
        return length_rewards(lengths, correct)
    schedule = (options.cosine_max_length, options.cosine_correct_at_0,
                options.cosine_correct_at_max, options.cosine_wrong_at_0,
                options.cosine_wrong_at_max)
    return [cosine_reward(length, right, *schedule)
            for length, right in zip(lengths, correct, strict=True)]


def user_part(name, texts, gold, outcomes, timeout):
    """
    G floats of a user's own reward; nan for a call without a verdict.

    Not 0: among rewards of -1 and 1 that is a good one, and the model would learn to break it.
    """
    worker, values = worker_for(name), []
    for i, text in enumerate(texts):
        outcome, value = worker.ask(text, gold, timeout)
        if outcome != "done":
            outcomes[i] = outcome
        values.append(value)
    return values


def weighted_totals(parts, correct, rewards):
    """Sum over k of w_k * part_k, G floats; nan where correctness is unknown or a part is nan."""
    weights = [weight for _, weight in rewards]
    rows = zip(*parts.values(), strict=True)
    return [math.nan if right is None else sum(w * v for w, v in zip(weights, row, strict=True))
            for right, row in zip(correct, rows, strict=True)]


# --------------------------------------------------------------------------------------------------
# 2. The grader
#
#    box -> text -> tokens -> tree -> verdict.  Trees are tuples (tag, label, *parts):
#
#    num value    var x    const π|e|i    text evenorodd    itself infinity | (digits, base)
#    op + | * | ^ | pm | mp | sin ...    call f, with its arguments    unit cm^2, a value
#    seq list | set | () | [] | [) | (] | <> | matrix | row | : | \cup | \cap, with its members
#    rel ("<", "<=", ...), with its sides    unread (tokens): equal only to the same tokens
#
#    What counts as equal, and where the line is (tests/test_grading.py has hundreds of pairs):
#    - units, $, degrees and % may be left out (10 = 10%, but 28% is not 0.28), not exchanged
#    - x = 5 is 5 and y = 2x + 3 is 2x + 3; z = 5 and 2t + 3 are not
#    - \{1,2\} = 1,2 in any order; (1,2) and [1,2] are neither that nor each other
#    - 204_5 is not 204;  1:2 is neither 1/2 nor 2:4;  an inequality is not an interval
#    - 2 + 4 = 6: unsimplified is still right; a comma never marks decimals
#    - a decimal is that number: 0.33333333 is not 1/3; a repeating decimal cannot be read
#    - a choice may bring its text: "C) 12" is C; but not a second letter, "C) or D)"
#    - sums, integrals, limits and set-builder notation are equal only as the same tokens
# --------------------------------------------------------------------------------------------------

# Bounds, each checked before the work it limits.
MAX_CHARACTERS = 2000  # of an answer; the longest of MATH, Minerva and OlympiadBench has 252
MAX_TOKENS = 600
MAX_MEMBERS = 64  # of an unordered list, where each is compared with each
MAX_BITS = 40_000  # of an exact numerator or denominator: 2004! has 19,000
MAX_EXPONENT_BITS = 200_000  # log2 of a rounded number
MAX_ARGUMENT_BITS = 60  # log2 of a function's argument: 50 digits say little of a larger one's sine


def extract_answer(text, scope="full"):
    r"""
    Content of the last \boxed{...}, or None if it is empty or unclosed; linear in len(text).

    scope: "full", or "before_think_end": only before the first `</think>`.  Neither an earlier box
    nor numbers in the text count: that would pay for guesses and for answers that were cut off.
    """
    end = text.find("</think>") if scope == "before_think_end" else -1
    end = len(text) if end < 0 else end
    boxes = [box.end() for box in BOX.finditer(text, 0, end)]
    content = braced(text, boxes[-1], end) if boxes else None
    return content and content.strip() or None


BOX = re.compile(r"\\boxed\s*+(?=\{)")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def braced(text, start, end=None):
    r"""What is between the brace at `start` and its partner, or None; \{ and \} do not count."""
    end = min(len(text) if end is None else end, start + MAX_CHARACTERS + 2)
    depth = 0
    for brace in BRACE.finditer(text, start, end):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1:brace.start()]
    return None


def gold_answer(answer):
    """
    A dataset's gold answer as a string that can be graded, or None: drop and count such a row.

    answer: str, number, or a list whose first entry counts.  A solution is read for its last box,
    or for what follows GSM8K's ####.  None: a sentence or what cannot be read.
    """
    if isinstance(answer, (list, tuple)):
        answer = answer[0] if answer else None
    if isinstance(answer, float):
        answer = str(answer).removesuffix(".0") if math.isfinite(answer) else None
    answer = "" if answer is None else str(answer).strip()
    if "\\boxed" in answer:
        answer = extract_answer(answer) or ""
    elif "####" in answer:
        answer = answer.rpartition("####")[2].strip()
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", re.sub(r"\\(begin|end)\{\w+\}", "", answer))
    is_sentence = len(words) > 4 or len(words) > 2 and any(word.lower() in VERBS for word in words)
    if not answer or is_sentence or len(answer) > MAX_CHARACTERS or read(answer)[0] == "unread":
        return None
    return answer


VERBS = set("is are was were has have had will does costs gets makes because where which".split())


def is_equal(prediction, gold):
    """
    Is the answer `prediction` mathematically equal to the answer `gold`? (strings without boxes)

    Never raises, never runs what it reads, is bounded in time and memory.
    """
    if prediction is None or gold is None:
        return False
    prediction, gold = str(prediction).strip(), str(gold).strip()
    if not gold or max(len(prediction), len(gold)) > MAX_CHARACTERS:
        return False
    try:
        with LOCK:
            p, g = read(prediction), read(gold)
            return same(p, g) or same_choice(prediction, g) or same_choice(gold, p)
    except (ArithmeticError, ValueError, RecursionError, MemoryError):
        return False  # a bound or a domain: undecided is different


def same_choice(text, letter):
    r"""Is `text` "C) 12" or \text{C: the mass doubles} for the letter C, without another one?"""
    if letter[0] != "var" or not (found := CHOICE.match(text)):
        return False
    return letter[1] in found.groups() and not OTHER_CHOICE.search(text, found.end())


# C) and C: and \text{(C)}, but not (C), which may begin a product
CHOICE = re.compile(r"""\s*(?:\\(?:text|mbox|math)[a-z]*\ *\{\ *\(([A-J])\)
    (?:[.:]?\ |\}(?:[ ~:]|\\[ ,;]|\\q?quad)+(?=[0-9A-Za-z$(]|\\frac|\\sqrt|\\text))
    | (?:\\text[a-z]*\ *\{\ *)?([A-J])(?:\)|[:.](?=\ )))""", re.VERBOSE)
OTHER_CHOICE = re.compile(r"(?<![A-Za-z])(?:[A-J]|or)(?![A-Za-z])")


@functools.lru_cache(maxsize=512)
def read(answer):
    tokens = answer
    try:
        tokens = tokenise(clean(answer))
        reader = Reader(tokens)
        members = reader.members()
        if reader.next or not members:
            raise ValueError("nothing, or more than an answer")
        return members[0] if len(members) == 1 else ("seq", "list", *members)
    except (ValueError, RecursionError):
        return ("unread", tuple(tokens))


# ----- text to tokens: 12.5 is a number, $x a name, "cm a word, and all others are themselves

# "token spelling spelling ...": characters, commands, and commands without a backslash
SPELLINGS = r"""
    * × · ⋅ ∙ • ∗ \cdot \times \ast \bullet   / ÷ ∕ ⁄ \div   - −   : ： \colon   < \lt   > \gt
    \pm ±   \mp ∓   , ; 、 \land \wedge \lor \vee   \le ≤ ⩽ ≦ \leq \leqslant \leqq <=   \in ∈
    \ge ≥ ⩾ ≧ \geq \geqslant \geqq >=   \ne ≠ \neq   ^ **   \to → \rightarrow   % \%
    \cup ∪   \cap ∩   | ∣ \lvert \rvert \vert \mid   \{ \lbrace   \} \rbrace   [ \lbrack
    ] \rbrack   ( \lparen   ) \rparen   \lfloor ⌊   \rfloor ⌋   \lceil ⌈   \rceil ⌉   \langle ⟨
    \rangle ⟩   \frac \dfrac \tfrac \cfrac   \binom \dbinom \tbinom   \sqrt √ sqrt   \ln \log log
    \arcsin asin   \arccos acos   \arctan atan   ∞ \infty inf infinity   ∅ \emptyset \nothing
    ∠ \angle   △ \triangle   … \dots \ldots \cdots   α \alpha alpha   β \beta beta   γ \gamma
    δ \delta   ε \epsilon   ζ \zeta   η \eta   θ \theta theta   κ \kappa   λ \lambda   μ \mu   ν \nu
    ξ \xi   π \pi pi   ρ \rho   σ \sigma   τ \tau   φ \phi   χ \chi   ψ \psi   ω \omega   Γ \Gamma
    Δ \Delta   Θ \Theta   Λ \Lambda   Ξ \Xi   Π \Pi   Σ \Sigma   Φ \Phi   Ψ \Psi   Ω \Omega
    ħ \hbar   ℓ \ell   ⊙ \odot   ∇ \nabla"""
LAYOUT = r"""\, \; \: \! \> \# \& \quad \qquad \left \right \middle \displaystyle \textstyle \limits
    \thinspace \space \rm \bf \it \boxed ~ " """.split() + ["\\ "]
TRIGONOMETRIC = set("sin cos tan cot sec csc".split())
FUNCTIONS = {*r"\sin \cos \tan \cot \sec \csc \arcsin \arccos \arctan \ln \exp".split()}
SAME = {name[1:]: name for name in FUNCTIONS} | dict.fromkeys(LAYOUT, " ")
for entry in re.split(r" {3}|\s*\n\s*", SPELLINGS.strip()):
    SAME |= dict.fromkeys(entry.split()[1:], entry.split()[0])
FONTS = set(r"\mathit \mathtt \boldsymbol \bm \mathcal \mathbb \mathbf \mathsf".split())
PROSE = set(r"""\text \textbf \textit \textrm \textsf \texttt \textnormal \textup \mbox \hbox \emph
    \underline \mathrm \operatorname""".split())
ACCENTS = set(r"\overline \bar \vec \hat \dot \ddot \widehat \tilde \overrightarrow".split())
# "name spellings", without the s of a plural.  Only these can contradict each other.  The words of
# the last entry need no \text after a number; any other word in \text there means nothing.
UNITS = """
    mm millimeter; cm centimeter centimetre; m meter metre; km kilometer kilometre; nm nanometer; in
    inch inche; ft foot feet; yd yard; mi mile; mg milligram; kg kilogram; g gram; lb pound; oz
    ounce; ml milliliter; l liter litre; gallon gal; quart; cup; ton; s sec second; min minute; h hr
    hour; day; week; month; yr year; am; pm; hz hertz; khz; mhz; j joule; kj; n newton; pa pascal; w
    watt; kw; v volt; a amp ampere; ohm; k kelvin; c celsiu; f fahrenheit; mol mole; rad
    radian; deg degree; % percent percentage pct; dollar usd; cent; euro; kcal; ev; acre; / per;
    - mph unit people student way dog point time marble apple book car integer value pair solution
    th st nd rd sq square cubic edge vertice number old coin game ball card ticket piece triangle
    children men women boy girl"""
UNITS = {spelling + ending: line.split()[0].strip("-")
         for line in UNITS.split(";") for spelling in line.split() for ending in ("", "s")}
SIGNS = {"and": ",", "or": ",", "to": ":"}  # words that part members
DIGITS = set("0123456789.")
TOKEN = re.compile(r" +|(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![0-9.A-Za-z^]))?"
                   r"""|\\[A-Za-z]+|\\.|[A-Za-z]+|[<>]=|\*\*?"""
                   r"""|[-+/^_()\[\]{}|!,;:=<>'%?~"]|[^\0-\x7f]""")
WORD = re.compile(r"[A-Za-z][A-Za-z0-9.'-]*|[.?](?![0-9])")
# 1{,}000 1,\!000 1\,000 1~000 1'000: one mark per number ...
MARKED_THOUSANDS = re.compile(r"(?<![0-9.])[0-9]{1,3}(?=(\{, *(?:\\!)? *\}|, *\\!|\\[,;:> ]|~|'))"
                              r"(?:\1 *[0-9]{3})+(?![0-9])")
# ... and 1,000 or 1 000, but not in brackets, where a comma parts the members of a tuple
PLAIN_THOUSANDS = re.compile(r"(?<![0-9.])(?<![0-9],)[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)"
                             r"(?![0-9]|,[0-9]| [0-9]| *(?:/|\\frac))")


# "pattern -> replacement   why", in this order; ~ is a blank
REWRITES = r"""
    ^\s*\*\*([^*]+)\*\*\s*$ -> \1   markdown's bold
    [\u200b-\u200f\u202a-\u202e\u2060-\u2063\ufeff\u00ad€£¥₹¢] ->     invisible marks, currencies
    [−–—‐‑﹣] -> -   minus signs
    [¼-¾⅓-⅞] -> ~\g<0>   2½, which NFKC then writes 2 1⁄2
    [⁰¹²³⁴-⁹⁺⁻⁽⁾ⁿ]+ -> ^{\g<0>}   raised digits
    [₀-₎ₙ]+ -> _{\g<0>}   and lowered ones
    [′’‘]|\\prime(?![a-z]) -> '   primes ...
    \^ *\{ *('[' ]*)\}|\^ *(?=') -> \1   ... raised
    (?<=[0-9]) *'[' ]* ->     seconds of arc, feet
    \\?\$|\\(?:left|right) *\.|(?<!\\)\\[()\[\]]|\\[bB]igg?[lr]?(?![a-z]) -> ~   delimiters, dollars
    \\begin *\{[pbB]?(?:small)?(?:matrix|array)\}(?: *\{[clr| ]*\})? -> \\matrix\\row~   brackets
    (?:\\\\ *)?\\end *\{[pbB]?(?:small)?(?:matrix|array)\} -> \\endrow\\endmatrix~   in them
    \\\\(?: *\[[0-9.]* *[a-z]{2}\])? -> \\endrow,\\row~   also \\[2pt]
    (?<!\\)& -> ,   between the entries of a row
    \\var(?=[a-z]) -> \\   \varphi
    \^ *(\{ *)?(?:\\circ|°)(?![a-z])(?(1) *\})|\\(?:text)?degree(?![a-z])|[º˚] -> °   degrees
    (?<=[0-9])\^(?:o\b|\{o\}) -> °   45^o
    °(?: |\\ )*([CF])\b -> °\\text{\1}   Celsius
    \\mathbb *\{? *R *\}?|ℝ -> (-\\infty,\\infty)   all numbers
    ((?:^|[,;])(?:(?!\\pi)[^,;0-9π])*)(?:\\(?:approx|simeq|cong)|[≈≅]) -> \1=   \theta \approx 5
    ([^ ,;]) *(?:\\(?:approx|simeq|cong)|[≈≅])[^,;]* -> \1   4\sqrt2 \approx 5.7
    ([0-9.]) *[xX] *(?=10 *\^) -> \1*   3x10^8"""
REWRITES = [(re.compile(pattern), new.replace("~", " ")) for pattern, new in re.findall(
    r"^ {4}(.+?) -> (.*?)   .+$", REWRITES, re.MULTILINE)]


def clean(text):
    """Characters to plain LaTeX: delimiters gone, numbers in one form."""
    text = re.sub(r"\s", " ", text).rstrip(" .\\")
    if re.search(r"\\\\[A-Za-z{}$%]", text) and not re.search(r"(?<!\\)(?:\\\\)*\\[A-Za-z]", text):
        text = text.replace("\\\\", "\\")  # every command was escaped once too often, as in JSON
    text = MARKED_THOUSANDS.sub(lambda m: re.sub("[^0-9]", "", m[0]), text)
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    bracket = re.search(r"(?:[(\[]|\\\{|\\row)[^)\]]*,|$", text).start()
    before = PLAIN_THOUSANDS.sub(lambda m: re.sub("[, ]", "", m[0]), text[:bracket])
    text = unicodedata.normalize("NFKC", before + text[bracket:])
    return text.lstrip(" ,;:~").rstrip(" .,;:~\\")


def tokenise(text, prose=False):
    r"""Tokens of cleaned text; prose: inside \text{...}, where letters are words."""
    tokens, at = [], 0
    while at < len(text):
        word = WORD.match(text, at) if prose else None
        found = word or TOKEN.match(text, at)
        if not found or len(tokens) > MAX_TOKENS:
            raise ValueError(f"character {text[at]!r}, or too many tokens")
        token, at = found[0] if word else SAME.get(found[0], found[0]), found.end()
        before = tokens[-1] if tokens else " "
        if word:
            word = token.replace(".", "").strip("?'-")
            tokens += [SIGNS.get(word.lower(), f'"{word}')] if word else []
        elif token in PROSE or token in FONTS:
            content, at = argument(text, at)
            content = content.strip().rstrip(" .\\")
            name = token in FONTS or content in SAME or content in tuple("eid")
            formula = re.search(r"[+=^_]|[-/][0-9]|\\[A-Za-z]|[0-9][A-Za-z]", content)
            tokens += tokenise(content, prose=not (name or formula))
        elif token in ACCENTS or token == "_" and before[0] == "$":  # part of a name
            content, at = argument(text, at)
            index = re.sub(r"\\text|\\mathrm|[{} ]", "", content)
            if not index or index.isdigit() and token != "_":
                raise ValueError(f"{token} of nothing, or a repeating decimal")
            tokens.append((tokens.pop() if token == "_" else "$") + token + index)
        elif token == "'" and before[0] == "$":
            tokens[-1] += "'"
        elif token.isalpha():
            tokens += letters(token, before)
        elif token.strip():
            tokens.append(token if token.isascii() or token == "°" else "$" + token)
    return tokens


def argument(text, at):
    """(argument, its end) of the command that ends at `at`: a group in braces or one token."""
    at += len(text[at:]) - len(text[at:].lstrip(" "))
    content = braced(text, at) if text[at:at + 1] == "{" else None
    if content is not None:
        return content, at + len(content) + 2
    found = TOKEN.match(text, at)
    return (found[0], found.end()) if found else ("", at)


def letters(run, before):
    """Tokens of a run of letters: a comma, a unit, a word, or a product."""
    if run in ("and", "or"):
        return [","]
    after_value = before[0] in DIGITS | {'"'} or before[-1] in ")}%°/"
    is_unit = len(run) > 1 and run.lower() in UNITS
    starts = before == " " and run[0].isupper() and len(run) > 3  # LQSX, Even
    if starts or is_unit and (after_value or before[0] == "$" and len(run) > 3):
        return [f'"{run}']
    return [f"${letter}" for letter in run]


# ----- tokens to a tree; operators by how tightly they bind, the loosest first

LEVELS = [r"= < > \le \ge \ne \in \notin \sim \equiv \to \implies \subset \subseteq \perp",
          r"\cup \cap", ":", r"+ - \pm \mp", "* /", "^ ! _ % °"]
BINDING = {token: n for n, tokens in enumerate(LEVELS, 1) for token in tokens.split()}
RELATION, UNION, RATIO, SUM, PRODUCT, _, UNIT = range(1, 8)
BRACKETS = {(opening, closing): style for opening, closing, style in map(str.split, r"""
    ( ) (); [ ] []; { } {}; [ ) [); ( ] (]; \{ \} set; | | abs; \langle \rangle <>;
    \lfloor \rfloor floor; \lceil \rceil ceil; \row \endrow row; \matrix \endmatrix matrix
    """.split(";"))}
UPWARD = {">": "<", r"\ge": r"\le"}
OPENING = {opening for opening, _ in BRACKETS}
CLOSING = {closing for _, closing in BRACKETS} - {"|"} | {""}
ENDS = CLOSING | set(LEVELS[0].split()) | {","}
STARTS = FUNCTIONS | OPENING - {r"\{"} | {r"\frac", r"\binom", r"\sqrt"}
CONSTANTS = {name: ("const", name) for name in "eiπ"}
CONSTANTS |= {"∞": ("itself", "∞"), "∅": ("seq", "set")}
CALL = re.compile(r"[fghFGHP]'*\(|[A-Za-z]'*\(\$?[A-Za-z0]\)")  # f(...), I(0)
# words with powers, * and /; but 5 thousand is not 5, and x if x > 0 is not x
UNITS_TEXT = re.compile(r"([/*] )*((?!(?:if|when|where|for|not|mod|is|hundred|thousand|[mb]illion|"
                        r"trillion)\b)[A-Za-z%-]+ (\^ (- )?[0-9] )?([/*] )*)+")


class Reader:
    """A Pratt parser: each method reads what its name says, or raises ValueError."""

    def __init__(self, tokens):
        self.tokens, self.at = [*tokens, ""], 0
        self.bars = self.angles = 0  # inside |...|, inside the argument of a sine
        self.unit = None  # of the item that is being read

    @property
    def next(self):
        return self.tokens[self.at]

    def take(self):
        token = self.next
        self.at += token != ""
        return token

    def at_end(self, ends=ENDS):
        return self.next in ends or self.next == "|" and self.bars > 0

    def members(self):
        """Expressions and relations, with commas between them, up to a closing bracket."""
        found = []
        while self.next == "," or not (found or self.at_end(CLOSING)):
            self.at += self.next == ","
            if self.at_end(CLOSING | {","}):
                continue
            self.unit = None
            self.at += self.next == "="  # of "= 5"
            node = self.expression()
            if node[0] == "rel" and {*node[1]} <= UPWARD.keys():  # 2 < x for x > 2
                node = ("rel", tuple(UPWARD[op] for op in node[1][::-1]), *node[:1:-1])
            found.append(("unit", self.unit, node) if self.unit else node)
        return found

    def expression(self, strength=0):
        """An operand and all operators after it that bind more tightly than `strength`."""
        left = self.operand()
        while True:
            token = self.next
            factor = token[:1] in DIGITS | {"$"} or token in STARTS and not self.at_end()
            words = '"' in (token[:1], token in ("/", "*") and self.tokens[self.at + 1][:1])
            binding = UNIT if words else BINDING.get(token, PRODUCT * factor)
            if binding <= strength:
                return left
            left = self.operation(left, binding)

    def operation(self, left, binding):
        token = self.next
        if binding == UNIT:
            return self.units(left)
        if token not in BINDING:  # two factors side by side
            if token[0] in DIGITS and self.tokens[self.at - 1] not in (")", "]"):
                raise ValueError("a number after a factor")
            return product(left, self.expression(PRODUCT))
        self.take()
        if token == "^":
            return ("op", "^", left, self.operand())
        if token == "!":
            return ("op", "factorial", left)
        if token == "_":  # 204_5
            base = self.operand()
            if left[0] != "num" or base[0] != "num" or left[1].denominator != 1:
                raise ValueError("an index of what is no name")
            return left if base == number(10) else ("itself", (left, base))
        if token == "°" and self.angles:  # in sin 30 degrees a factor, elsewhere a unit
            return product(left, quotient(CONSTANTS["π"], number(180)))
        if token in ("°", "%"):
            self.unit = "deg" if token == "°" else "%"
            return left
        right = self.expression(binding)
        if binding == RELATION:
            ops, *sides = left[1:] if left[0] == "rel" else ((), left)
            return ("rel", (*ops, token), *sides, right)
        if binding in (UNION, RATIO):
            return joined("seq", token, left, right)
        if token in ("*", "/"):
            return product(left, right) if token == "*" else quotient(left, right)
        return joined("op", "+", left, signed(token, right))

    def units(self, left):
        """The words up to the end of the item: cm, square cm, kcal m^-2 yr^-1, miles / hour."""
        words = [word.strip('"') for word in self.rest() if word not in ("{", "}")]
        names = [UNITS.get(word.lower()) for word in words]
        text = " ".join(name or word for name, word in zip(names, words, strict=True)) + " "
        unknown = words[0] in ("/", "*") and not names[1]  # x/y is no x
        if unknown or not UNITS_TEXT.fullmatch(text):
            raise ValueError(f"{text} is no unit")
        text = re.sub(r"\b(?:square|sq) (\S+)", r"\1 ^ 2", text)
        text = re.sub(r"\bcubic (\S+)", r"\1 ^ 3", text)
        self.unit = text.strip() if any(names) else self.unit
        return left

    def rest(self):
        start, depth = self.at, 0
        while self.next and (depth or not self.at_end()):
            depth += {"{": 1, "}": -1}.get(self.take(), 0)
        return self.tokens[start:self.at]

    def operand(self):
        token = self.take()
        if token[:1] in DIGITS:
            return self.number(token)
        if token[:1] == "$" or token[:1] == '"' != self.next[:1] and len(token) == 2:
            name = token[1:]
            if CALL.match(name + "".join(self.tokens[self.at:self.at + 3])):
                return ("call", name, self.operand())
            return CONSTANTS.get(name) or ("var", name)
        if token[:1] == '"':
            return ("text", re.sub(r'["${}]', "", token + "".join(self.rest())).lower())
        if token in ("+", "-", r"\pm", r"\mp"):
            return signed(token, self.expression(PRODUCT))
        if token in OPENING:
            return self.bracket(token)
        if token == r"\frac":
            return quotient(self.part(), self.part())
        if token == r"\binom":
            return ("op", "binomial", self.operand(), self.operand())
        if token == r"\sqrt":
            index = self.operand() if self.next == "[" else number(2)
            return ("op", "^", self.operand(), quotient(number(1), index))
        if token in FUNCTIONS:
            return self.function(token[1:].replace("arc", "a"))
        raise ValueError(f"{token!r} is not the start of a value")

    def number(self, token):
        r"""A number; 2\frac14 and 2 1/4 are 2 + 1/4, and 2\frac54 is nothing."""
        whole, mark, after = number(token), self.tokens[self.at - 2], self.next
        if mark in ("^", "_") or not token.isdigit() or not (after == r"\frac" or after.isdigit()):
            return whole
        part = self.operand() if after == r"\frac" else self.expression(SUM)
        if part[0] != "num" and after == r"\frac":
            return product(whole, part)
        if part[0] != "num" or not 0 < part[1] < 1:
            raise ValueError("a number before what is no fraction below 1")
        return number(whole[1] + part[1])

    def part(self):
        r"""An operand of \frac, where \frac12 is one digit for each."""
        if self.next[:1] in DIGITS:
            self.tokens[self.at:self.at + 1] = self.next
            return number(self.take())
        return self.operand()

    def function(self, name):
        marks = {}
        while self.next in ("^", "_"):
            mark = self.take()
            marks[mark] = self.operand()
        self.angles += name in TRIGONOMETRIC
        if self.next in ("(", "{", "|"):
            inside = self.operand()
        else:  # sin 2 pi x takes all names that follow
            inside = self.expression(PRODUCT)
            while self.next[:1] == "$":
                inside = product(inside, self.expression(PRODUCT))
        self.angles -= name in TRIGONOMETRIC
        if marks.get("^") == number(-1) and name in TRIGONOMETRIC:
            return ("op", f"a{name}", inside)
        node = ("op", name, inside)
        if "_" in marks:
            node = quotient(node, ("op", name, marks["_"]))
        return ("op", "^", node, marks["^"]) if "^" in marks else node

    def bracket(self, opening):
        r"""( ), [ ], { }, \{ \}, half-open intervals, |x|, floors, matrices."""
        outside, self.bars = (self.bars, self.unit), int(opening == "|")
        members = self.members()
        style = BRACKETS.get((opening, self.take()))
        self.bars, self.unit = outside
        if not style or not members and style != "set":
            raise ValueError("brackets that do not match, or are empty")
        if len(members) > 1 or style not in ("()", "[]", "{}", "abs", "floor", "ceil"):
            return ("seq", style, *members)
        node = without_unit(members[0])
        if style in ("abs", "floor", "ceil"):
            return ("op", style, node)
        self.unit = members[0][1] if members[0][0] == "unit" else self.unit
        return node


def number(value):
    return ("num", Fraction(value))


def signed(sign, node):
    if sign in ("+", "-"):
        return node if sign == "+" else product(number(-1), node)
    return ("op", sign, node)


def joined(tag, label, left, right):
    """left + right, left * right, left : right with the members of a longer chain side by side."""
    return (*left, right) if left[:2] == (tag, label) else (tag, label, left, right)


def product(a, b):
    """a * b; a number times a matrix multiplies its entries."""
    if b[:2] in (("seq", "matrix"), ("seq", "row")):
        return (*b[:2], *(product(a, part) for part in b[2:]))
    if a[0] == b[0] == "num" and bits(a[1]) + bits(b[1]) < MAX_BITS:
        return number(a[1] * b[1])
    return joined("op", "*", a, b)


def quotient(a, b):
    return product(a, number(1 / b[1]) if b[0] == "num" and b[1] else ("op", "^", b, number(-1)))


def bits(x):
    return max(x.numerator.bit_length(), x.denominator.bit_length())


# ----- trees compared part by part; p is of the prediction, g of the gold answer


def same(p, g):
    if p == g:
        return True
    if p[0] == g[0] == "unit" and p[1] != g[1]:
        return False
    p, g = without_unit(p, g), without_unit(g, p)
    if p[0] == "rel" and g[0] != "rel":  # x = 5 for 5: every value that is stated must be right
        values = stated_values(p)
        return bool(values) and all(same(value, g) for value in values)
    if g[0] == "rel" and p[0] != "rel":  # a gold answer may state its value twice: 0.56 = 56%
        return any(same(p, value) for value in stated_values(g))
    ps, gs = members_of(p), members_of(g)
    if ps != [p] or gs != [g]:
        return same_members(ps, gs)
    if p[0] == g[0] == "rel":
        return same_relation(p, g)
    if "text" in (p[0], g[0]):  # even, typed without \text, reads as e v e n
        return spelled(p) == spelled(g)
    if p[0] == g[0] == "seq":
        any_order = p[1] in (r"\cup", r"\cap")
        return p[1] == g[1] and (same_members if any_order else same_each)(p[2:], g[2:])
    return {p[0], g[0]} <= {"num", "var", "const", "op", "call"} and same_expression(p, g)


def without_unit(node, other=()):
    r"""A value without its unit; 1000 m beside 1000\text{ m} ends in a letter that is one."""
    if other[:1] == ("unit",) and node[:2] == ("op", "*") and str(node[-1][1]).lower() == other[1]:
        return node[2] if len(node) == 4 else node[:-1]
    return node[2] if node[0] == "unit" else node


def members_of(node):
    r"""Members of a list or set, each with \pm as two; any other node is its own only member."""
    several = node[0] == "seq" and node[1] in ("list", "set", "{}")
    return [member for part in (node[2:] if several else [node])
            for member in dict.fromkeys((with_sign(part, r"\pm"), with_sign(part, r"\mp")))]


def with_sign(node, positive):
    r"""The tree with all \pm and \mp, which are linked, read as + or -."""
    node = (*node[:2], *(with_sign(part, positive) for part in node[2:]))
    if node[:2] in (("op", r"\pm"), ("op", r"\mp")):
        return node[2] if node[1] == positive else signed("-", node[2])
    return node


def same_each(ps, gs):
    return len(ps) == len(gs) and all(map(same, ps, gs))


def same_members(ps, gs):
    """Equal in any order: each member has as many equals on one side as on the other."""
    if len(ps) != len(gs) or len(ps) > MAX_MEMBERS:
        return False
    p_names, g_names = ({x[2] for x in map(without_unit, members)
                         if x[0] == "rel" and is_name(x[2])} for members in (ps, gs))
    if len(p_names | g_names) > 1 and p_names != g_names:
        return False  # a = 2, b = 3 is not 2, 3, which does not say whose
    return all(sum(same(p, q) for q in ps) == sum(same(p, g) for g in gs) for p in ps)


def spelled(node):
    """The letters of a text or of a product of letters, in lower case; None for anything else."""
    letters = node[2:] if node[:2] == ("op", "*") else (node,)
    if all(letter[0] in ("text", "var", "const") for letter in letters):
        return "".join(letter[1] for letter in letters).lower()
    return None


def is_name(node):
    r"""x, x_1, f(x), AB, \angle A, Area, (x, y), a:b: before =, it is no part of the value."""
    if node[0] in ("var", "text", "call"):
        return True
    if node[0] == "seq":
        return all(map(is_name, node[2:]))
    return node[:2] == ("op", "*") and {part[0] for part in node[2:]} == {"var"} and (
        all(part[1][0].isupper() or part[1][0] in "∠△" for part in node[2:]))


def stated_values(relation):
    """Values that a chain of = states: [5] of x = 5, [2+3, 5] of x = 2+3 = 5, [] of 2x + z = 1."""
    _, ops, *sides = relation
    if not {*ops} <= {"=", r"\in"}:
        return []
    if is_name(sides[0]):
        own = set() if sides[0][0] == "call" else variables(sides[0])
        return [] if any(own & variables(value) for value in sides[1:]) else sides[1:]
    values = sides[:-1] if is_name(sides[-1]) else sides
    return [] if any(map(variables, values)) else values


def same_relation(p, g):
    """The same sides, or left - right is the same up to a factor, which < needs positive."""
    (_, p_ops, *ps), (_, g_ops, *gs) = p, g
    if p_ops != g_ops or len(p_ops) > 1 or same_each(ps, gs):
        return p_ops == g_ops and same_each(ps, gs)
    p, g = (joined("op", "+", left, signed("-", right)) for left, right in (ps, gs))
    try:
        factor = evaluate(quotient(p, g), coordinate)
    except ArithmeticError:
        return False
    positive = MP.im(factor) == 0 and MP.re(factor) > 0
    if p_ops[0] not in (("=", r"\ne", "<", r"\le") if positive else ("=", r"\ne")):
        return False
    return bool(factor and variables(p)) and same_expression(p, product(("num", factor), g))


# ----- two expressions are equal if they agree at random points: exactly where all is rational,
#       else to 30 of 50 digits.  f != g agree by accident with probability ~ 0 (Schwartz 1980)

MP = mpmath.MPContext()  # our own, so that nobody's mpmath.mp.dps changes a verdict
MP.dps = 50
LOCK = threading.Lock()  # mpmath caches its constants without one
TOLERANCE = MP.mpf(10) ** -30
ODD_ROOTS = {MP.mpf(1) / n for n in (3, 5, 7)}
# sqrt(x^2 y^2) is not xy, but sqrt(r^2) is r: other letters are lengths and the like
FLIPPED = ("", "x", "y", "z", "xyz")  # negative at point k, k + 1 ...
NUMBERS = {"π": +MP.pi, "e": +MP.e, "i": MP.mpc(0, 1)}


def same_expression(p, g):
    whole = all(labels(tree) & {("op", "floor"), ("op", "ceil")} for tree in (p, g))
    signed = ("op", "abs") in labels(p) | labels(g)
    needed = 60 if signed else 30 if whole else 5  # f is below 0 at few points, where |f| is not f
    needed = needed if variables(p) | variables(g) else 1
    for k in range(5 * needed):
        point = functools.partial(coordinate, k=k, whole=whole, signed=signed)
        try:
            a, b = evaluate(p, point), evaluate(g, point)
        except (ArithmeticError, ValueError):  # a pole or a bound: try another point
            continue
        if FLIPPED[k % 5] and (MP.im(a) or MP.im(b)):
            continue  # a root or logarithm of a negative variable, which is not meant
        exact = isinstance(a, Fraction) and isinstance(b, Fraction)
        if not (a == b if exact else MP.almosteq(MP.convert(a), MP.convert(b), TOLERANCE, 0)):
            return False
        needed -= 1
        if needed == 0:
            return True
    return False


@functools.lru_cache(maxsize=2048)
def labels(node):
    """(tag, label) of every node of a tree."""
    return {node[:2]}.union(*map(labels, node[2:]))


def variables(node):
    """Names of the variables and unknown functions of a tree."""
    return {label for tag, label in labels(node) if tag in ("var", "call")}


@functools.lru_cache(maxsize=8192)
def coordinate(name, k=0, whole=False, signed=False):
    """The k-th value of a variable, the same in every process."""
    if whole:  # without repetition: floor(n/8) and floor((n+1)/8) differ at every eighth number
        return Fraction(random.Random(name).sample(range(3, 41), 38)[k % 38])
    draw = random.Random(f"{name} {k}")
    value = Fraction(draw.randint(501, 3999), draw.choice((97, 997, 3989)) if signed else 997)
    negative = draw.random() < 0.5 if signed else name in FLIPPED[k % 5]
    return -value if k % 5 and negative else value


def evaluate(node, point):
    """A Fraction while all is rational, else an mpmath number; ArithmeticError at a bound."""
    tag, label, *parts = node
    if tag in ("num", "const"):
        return NUMBERS.get(label, label)
    if tag == "var":
        return point(label)
    if tag not in ("op", "call"):
        raise OverflowError(f"{tag} has no value")
    values = [evaluate(part, point) for part in parts]
    if tag == "call":  # an unknown function has a random value for each argument
        return point(f"{label} of {[MP.nstr(MP.convert(x), 25) for x in values]}")
    if label in "+*":
        return functools.reduce(functools.partial(apply, label), values)
    return apply(label, *values)


def apply(name, *values):
    exact = all(isinstance(x, Fraction) for x in values)
    if not exact:
        values = [MP.convert(x) for x in values]
    if name == "+" and not exact and all(values):
        first, second = map(MP.mag, values)
        if abs(first - second) > 96:
            raise OverflowError("the smaller would be lost, and 10^40 + pi equal to 10^40")
    value = OPERATIONS[name](*values) if name in OPERATIONS else function(name, *values)
    if bits(value) > MAX_BITS if isinstance(value, Fraction) else not MP.isfinite(value):
        raise OverflowError("too many digits, or infinite")
    return value


def power(a, b):
    if not a:
        return a if MP.re(b) > 0 else 1 / a
    if isinstance(a, Fraction) and b.denominator == 1 and abs(b) * bits(a) <= MAX_BITS:
        return a ** int(b)
    a, b = MP.convert(a), MP.convert(b)
    if abs(b) * (abs(MP.mag(a)) + 1) > MAX_EXPONENT_BITS:
        raise OverflowError("a large power")
    if b in ODD_ROOTS and not MP.im(a) and MP.re(a) < 0:
        return -MP.power(-a, b)  # the real root
    return MP.power(a, b)


def function(name, *values):
    values = [MP.convert(x) for x in values]
    if name in ("floor", "ceil") and MP.almosteq(*values, MP.nint(*values), TOLERANCE):
        return MP.nint(*values)  # log2(8) is 3, however it was rounded
    if name != "ln" and any(x and MP.mag(x) > MAX_ARGUMENT_BITS for x in values):
        raise OverflowError("a large argument")
    return getattr(MP, name)(*values)


OPERATIONS = {"+": operator.add, "*": operator.mul, "^": power, "abs": abs}


# --------------------------------------------------------------------------------------------------
# 3. Workers that can be killed, for reward functions we did not write
# --------------------------------------------------------------------------------------------------

START_SECONDS = 120  # to import the user's file
MEMORY_BYTES = 4 << 30  # address space of a worker
MAX_REPLY_BYTES = 1 << 20
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


@functools.lru_cache
def worker_for(function):
    """One worker per function, kept for the life of this process."""
    return Worker(function)


class Worker:
    """
    A user's reward function, "path/to/file.py:name", in a process of its own, asked one completion
    at a time: name(completion, answer) -> a number, or None for no verdict.

    A late process is killed with all it started: signals do not interrupt C code, and the timeouts
    of pools only stop waiting.  It is no fork (one of a process with torch's threads may hang),
    sees no GPU, and dies with the thread that started it.  JSON both ways: nothing is unpickled.
    """

    def __init__(self, function):
        path, _, name = function.rpartition(":")
        self.function = f"{Path(path).resolve()}:{name}"
        self.process, self.proven, self.complained = None, False, False
        self.lock = threading.Lock()  # one question at a time

    def ask(self, completion, answer, timeout):
        """
        ("done", number), or (timeout | crash | no_verdict, nan).

        Raises ValueError if the file cannot be imported or its first results are no numbers.
        """
        with self.lock:
            reply = self.exchange(json.dumps([completion, answer]).encode(), timeout)
        if "value" in reply:
            self.proven = True
            return "done", reply["value"]
        if "refused" in reply and not self.proven:
            raise ValueError(f"--reward_funcs {self.function} returned {reply['refused']}: it is "
                             "called for one completion and returns one number, or None")
        if not self.complained:
            self.complained = True
            print(f"rewards: {self.function} gave no reward, like perhaps others that are counted "
                  f"but not shown: {reply}", file=sys.stderr, flush=True)
        outcome = {"timeout", "crash"} & reply.keys() or {"no_verdict"}
        return outcome.pop(), math.nan

    def exchange(self, question, timeout):
        for _ in range(2):  # killed from outside?  A fresh process tries again.
            try:
                if self.process is None:
                    self.start()
                self.connection.send_bytes(question)
                if self.connection.poll(timeout):
                    return json.loads(self.connection.recv_bytes(MAX_REPLY_BYTES))
                self.kill()
                return {"timeout": timeout}
            except (OSError, EOFError) as error:
                self.kill()
                reply = {"crash": f"the process died: {error!r}"}
        return reply

    def start(self):
        self.kill()
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--worker", self.function, str(theirs.fileno()),
                   str(os.getpid())]
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], start_new_session=True, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        theirs.close()
        reply = {"crash": f"it was not imported within {START_SECONDS} s"}
        if self.connection.poll(START_SECONDS):
            reply = json.loads(self.connection.recv_bytes(MAX_REPLY_BYTES))
        if "crash" in reply:
            self.kill()
            raise ValueError(f"--reward_funcs {self.function}: {reply['crash']}")

    def kill(self):
        if self.process is None:
            return
        # Nobody has waited for it yet, so even a dead one keeps its number from other processes.
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None
        self.connection.close()


def serve(function, descriptor, parent):
    """The main loop of a worker process."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)  # it died before we asked
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = Connection(descriptor)

    def reply(**message):
        connection.send_bytes(json.dumps(message).encode())

    path, _, name = function.rpartition(":")
    try:
        sys.path.insert(0, str(Path(path).parent))
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        call = getattr(module, name)
    except Exception as error:  # noqa: BLE001 - a user's file may raise anything
        return reply(crash=f"it cannot be imported: {error!r}"[:2000])
    reply(ready=True)
    while True:
        try:
            question = json.loads(connection.recv_bytes())
        except EOFError:
            return None  # the trainer has ended
        try:
            reply(**verdict(call(*question)))
        except Exception as error:  # noqa: BLE001 - as above; the next completion gets its chance
            reply(crash=repr(error)[:2000])


def verdict(value):
    """The reply for what a user's function returned."""
    if isinstance(value, (list, tuple, dict, str)):
        return {"refused": f"{value!r:.200} ({type(value).__name__})"}
    if hasattr(value, "item"):  # a scalar of numpy or torch
        value = value.item()
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return {"value": float(value)}
    return {"no_verdict": f"{value!r:.200}"}


if __name__ == "__main__":
    serve(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
