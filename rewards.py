r"""
Rewards for mathematics: strings and numbers in, numbers out.  No torch; importable in any thread or process.

    python rewards.py regrade runs/NAME      score a finished run's stored completions again and list what changed

The method, in the order of the code below:

    1. extraction   the answer is what stands in the last \boxed{...}, found by rfind: linear on megabytes
    2. clean-up     unicode, spacing, text and delimiters become one stream of tokens, the same for both sides
    3. numbers      1200, 1,200.50, .5, 1.2e5 are exact Fractions, never floats
    4. structure    lists, sets, tuples, intervals, matrices, relations, ratios, bases, words: compared part by part
    5. reader       a recursive-descent reader of LaTeX (and of what people type instead) makes the tree
    6. identity     two expressions are equal if they agree at random points: exactly where all is rational, else to 30
                    of 50 digits. f = g at a random point has probability ~ 0 unless f = g everywhere (Schwartz 1980)
    7. rewards      accuracy, format, cosine, length, repetition, soft overlong: the recipes' formulas and oddities
    8. workers      a user's own reward function is not bounded, so it runs in processes that can be killed
    9. regrade      the command above

Three rules. A wrong "equal" is worse than a wrong "different": the first teaches the model to cheat, the second costs
one sample; whatever cannot be read or decided is "different". A model's output is hostile input: nothing is ever
evaluated by Python or sympy, and every step is bounded before it starts. One decision, one place: is_equal serves the
reward, the evaluation and the majority vote.

What counts as equal (tested in tests/test_grading.py):

    the last box counts, even inside an unclosed <think>; no box, an empty or an unclosed one is no answer, and neither
        is text, \fbox or \boxed 5
    units, $, degrees and % may be left out (10 = 10%, but 28% is not 0.28); another unit is another answer
    x = 5 is 5 and y = 2x + 3 is 2x + 3, but neither is z = 5 or 2t + 3
    \{1,2\} = 1,2 in any order; (1,2) and [1,2] are neither that nor each other; matrices may use any bracket
    204_5 is not 204;  1:2 = 2:4 but not 1/2;  an inequality is not an interval;  a comma never marks decimals
    2 + 4 = 6: unsimplified is still right;  a decimal stands for 1/3 from 8 digits on, for pi or sqrt(2) from 6

Left out on purpose: sums, integrals, limits and set-builder notation (equal only as the same tokens), and sympy, which
is slow, unbounded and evaluates strings; it is the oracle of the tests.
"""

import argparse
import ctypes
import dataclasses
import functools
import importlib.util
import json
import math
import os
import queue
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter
from fractions import Fraction
from pathlib import Path

import mpmath

# Bounds, each checked before the work it limits.
MAX_CHARACTERS = 2000  # of an answer; the longest of MATH, Minerva and OlympiadBench has 252
MAX_TOKENS = 600
MAX_DEPTH = 40  # of brackets, fractions, roots and powers in each other
MAX_MEMBERS = 64  # of an unordered list, where each is matched with each
MAX_SIDES = 8  # of a = b = c ...
MAX_BITS = 40_000  # of an exact numerator or denominator: 2004! has 19,000
MAX_EXPONENT_BITS = 200_000  # log2 of a rounded number
MAX_ARGUMENT_BITS = 40  # log2 of a function's argument: sin(10^(10^9)) would need a billion digits of pi


# ---------------------------------------------------------------------------------------------------------------------
# 1. Extraction
# ---------------------------------------------------------------------------------------------------------------------


def extract_answer(text, scope="full"):
    r"""
    Content of the last \boxed{...} of `text` as a string, or None; linear in len(text).

    scope: "full", or "before_think_end", which looks only before the first `</think>`, where a deployment that stops
    there would look. An unclosed or empty last box is None: falling back to an earlier one, or to numbers in the text,
    would pay for lists of guesses and for answers that were cut off.
    """
    end = text.find("</think>") if scope == "before_think_end" else -1
    start = text.rfind("\\boxed", 0, end) if end >= 0 else text.rfind("\\boxed")
    if start < 0:
        return None
    start = BLANKS.match(text, start + len("\\boxed")).end()
    content = braced(text, start, MAX_CHARACTERS, end if end >= 0 else len(text))
    return content.strip() or None if content is not None else None


BLANKS = re.compile(r"\s*")


def braced(text, start, limit, end=None):
    r"""What stands between the brace at `start` and its partner, up to `limit` characters; \{ and \} do not count."""
    depth, i, end = 0, start, min(len(text) if end is None else end, start + limit + 2)
    if text[start:start + 1] != "{":
        return None
    while i < end:
        if text[i] == "\\":
            i += 1  # skips the escaped character too
        elif text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1:i]
        i += 1
    return None


# ---------------------------------------------------------------------------------------------------------------------
# 2. Clean-up: text to tokens (kind, value, spaced)
#    kinds: num 12.5 | let x | cmd frac | sym + | word cm | begin, end pmatrix;  spaced: a blank stood before
# ---------------------------------------------------------------------------------------------------------------------

# Characters people use for commands: "character command" pairs, then characters that only look different.
UNICODE = {pair[0]: f"\\{pair[1:]} " for pair in """
    ×times ·cdot ⋅cdot ∙cdot •cdot ±pm ∓mp ≤le ⩽le ≦le ≥ge ⩾ge ≧ge ≠ne ≈approx ≅approx ∞infty ∪cup ∩cap ∈in ∅emptyset
    Øemptyset ∖setminus ⌊lfloor ⌋rfloor ⌈lceil ⌉rceil ⟨langle ⟩rangle 〈langle 〉rangle ∠angle △triangle …dots ⋯dots →to
    ⇒Rightarrow ∼sim ≡equiv ϵepsilon ϕphi ∆Delta µmu ΩOmega √sqrt ∛sqrt[3] ℝmathbb{R} ℤmathbb{Z} ℕmathbb{N} ℚmathbb{Q}
    ℂmathbb{C} ¢text{cents} ½frac12 ⅓frac13 ⅔frac23 ¼frac14 ¾frac34 ⅕frac15 ⅖frac25 ⅗frac35 ⅘frac45 ⅙frac16 ⅚frac56
    ⅛frac18 ⅜frac38 ⅝frac58 ⅞frac78""".split()}
GREEK = """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi
    omega""".split()
for _name in GREEK:
    _letter = unicodedata.lookup(f"GREEK SMALL LETTER {_name.replace('lambda', 'lamda')}")
    UNICODE |= {_letter: f"\\{_name} ", _letter.upper(): f"\\{_name.capitalize()} "}
UNICODE |= dict(zip("∗÷∕⁄−–—‐‑﹣′’‘∧∨、，；：。％﹪º˚", "*///-----''',,,,;:.%%°°", strict=False)) | {"″": "''"}
UNICODE |= dict.fromkeys("\t\n\r\v\f\u00a0\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200b))), " ")
UNICODE |= dict.fromkeys("\u200b\u200c\u200d\u200e\u200f\u2060\u2061\u2062\u2063\ufeff\u00ad€£¥₹", "")
UNICODE = str.maketrans(UNICODE)
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙ", "0123456789+-()n")

# Commands that mean the same: "name: its spellings".
ALIASES = {spelling: line.split()[0] for line in r"""
    frac dfrac tfrac cfrac nicefrac sfrac; binom dbinom tbinom; ge geq geqslant geqq; le leq leqslant leqq; ne neq; < lt
    > gt; * cdot times ast bullet; / div; | lvert rvert vert mid; { lbrace; } rbrace; [ lbrack; ] rbrack; ( lparen
    ) rparen; : colon; , land wedge lor vee; % percent; ° degree textdegree; dots ldots cdots dotsc dotsb
    emptyset varnothing; approx cong simeq doteq; setminus smallsetminus backslash; to rightarrow; implies Rightarrow
    epsilon varepsilon; theta vartheta; phi varphi; rho varrho; sigma varsigma; arcosh arccosh; arsinh arcsinh
    artanh arctanh; tan tg; cot ctg; csc cosec; arctan arctg""".replace("\n", ";").split(";")
           for spelling in line.split()[1:]} | {"%": "%"}
SYMBOLS = set("<>*/|[]():%°,")  # aliases that are plain symbols; { and } stay commands: they are the set braces \{ \}
SPACING = set(""", ; : ! > # & quad qquad left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr
    middle displaystyle textstyle scriptstyle limits nolimits thinspace medspace thickspace negthinspace enspace space
    allowbreak hfill noindent strut mathstrut rm bf it pounds euro textdollar boxed ensuremath""".split()) | {" "}
DROPPED = set("hspace hspace* vspace phantom hphantom vphantom label tag color".split())  # with their argument
PROSE = set("text textbf textit textrm textsf texttt textnormal textup mbox hbox emph underline".split())
FONTS = set("""mathrm mathbf mathit mathsf mathtt boldsymbol bm operatorname mathcal mathscr mathfrak mathbb""".split())
TRIGONOMETRIC = {"sin", "cos", "tan", "cot", "sec", "csc"}
FUNCTIONS = TRIGONOMETRIC | {f"arc{name}" for name in TRIGONOMETRIC} | {
    "sinh", "cosh", "tanh", "coth", "arsinh", "arcosh", "artanh", "ln", "log", "lg", "exp"}
LETTERS = {*GREEK, *(name.capitalize() for name in GREEK), *"triangle angle hbar ell odot dots star mho nabla".split()}
LETTERS -= {"pi"}
# Commands often typed without their backslash.
TYPED = {name: name for name in FUNCTIONS | {"sqrt", "pi", "infty", "theta", "alpha", "beta", "cup", "cap"}} | {
    "inf": "infty", "infinity": "infty", "oo": "infty", "asin": "arcsin", "acos": "arccos", "atan": "arctan"}
# Units: "name spellings". Only units of this list can contradict each other; other words after a number mean nothing.
UNITS = {spelling: line.split()[0] for line in """
    mm millimeter millimeters; cm centimeter centimeters centimetre centimetres; m meter meters metre metres
    nm nanometer nanometers; km kilometer kilometers kilometre kilometres; in inch inches; ft foot feet; yd yard yards
    mi mile miles; mg milligram milligrams; kg kilogram kilograms; g gram grams; lb lbs pound pounds; oz ounce ounces
    ml mL milliliter milliliters; L l liter liters litre litres; gallon gallons gal; quart quarts; cup cups; ton tons
    s sec secs second seconds; min mins minute minutes; h hr hrs hour hours; day days; week weeks; month months; am; pm
    yr yrs year years; Hz hertz; kHz kilohertz; MHz megahertz; J joule joules; kJ kilojoule kilojoules; N newton newtons
    Pa pascal pascals; W watt watts; kW kilowatt kilowatts; V volt volts; A amp amps ampere amperes; ohm ohms
    K kelvin kelvins; C celsius; F fahrenheit; mol mole moles; deg degree degrees; rad radian radians; % percent
    dollar dollars usd USD; cent cents; euro euros; kcal; eV; acre acres""".replace("\n", ";").split(";")
         if line.split() for spelling in line.split()}
# Words that may follow a number without \text.
TYPED_UNITS = set(UNITS) | set("""mph unit units people students ways dogs points times marbles apples books cars
    integers values pairs solutions th st nd rd sq square cubic per edges vertices numbers old coins games balls cards
    tickets pieces triangles children men women boys girls AU pc ly angstrom angstroms arcsec erg ergs""".split())
NUMBER_WORDS = {word: Fraction(n) for n, word in enumerate("""zero one two three four five six seven eight nine ten
    eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty""".split())}
MULTIPLIERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}  # powers of ten

TOKEN = re.compile(r"(?P<space> +|~|\")|(?P<num>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,9}(?![0-9.A-Za-z^]))?)"
                   r"|\\(?P<cmd>[A-Za-z]+\*?|.)|(?P<run>[A-Za-z]+)|(?P<sym>[-+*/^_()\[\]{}|!,;:=<>&'%°?])")
WORD = re.compile(r"[A-Za-z][A-Za-z.'-]*|[.?](?![0-9])")
NUMERAL = re.compile(r"(?<![0-9A-Za-z\\])[0-9]*[A-Z]+[0-9][0-9A-Z]*(?=\}? *_ *\{?[1-3][0-9])")  # A5_{11}
# 1{,}000 1,\!000 1\,000 1~000 1'000, one kind per number ...
MARKED_THOUSANDS = [re.compile(rf"(?<![0-9.])([0-9]{{1,3}})((?:{mark} *[0-9]{{3}})+)(?![0-9])")
                    for mark in (r"\{, *\}", r", *\\!", r"\{, *\\! *\}", r"\\[,;:> ]", "~", "'")]
# ... and 1,000 or 1 000, outside brackets, where a comma parts the members of a tuple.
PLAIN_THOUSANDS = re.compile(r"(?<![0-9.])(?<![0-9],)[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)"
                             r"(?![0-9]|,[0-9]| [0-9]| *(?:/|\\frac))")
# What one regular expression can bring into one form, in this order.
REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"\\?\$|\\(?:left|right) *\.|(?<!\\)\\[()\[\]]", " "),  # delimiters of mathematics, dollars
    (r"\{ *: *\}", ":"),  # 8{:}30
    (r"\\\\ *\[[0-9.]* *[a-z]{2}\]", r"\\\\"),  # \\[2pt] between rows
    (r"\^ *(?:\{ *\\circ *\}|\\circ(?![a-z])|°|\{ *° *\})|(?<=[0-9])\^(?:o\b|\{o\})", "°"),
    (r"\^ *(?:\{ *\\prime *\}|\\prime(?![a-z]))", "'"),
    (r"\^ *\{ *\\prime *\\prime *\}", "''"),
    (r"\^ *\{? *(?:\\(?:text|mathrm) *\{)? *(st|nd|rd|th)\b *\}? *\}?", r" \\text{\1}"),
    (r"\^ *\{ *(-?[0-9]) *\}", r"^\1 "),
    (r"\b([aApP])\. ?[mM]\b\.?", r"\1m"),  # p.m.
    (r"\b(?:np|math|numpy|sympy)\.(?=[a-z])", ""),
    (r"\*\*", "^"),
    (r"([0-9.]) *[xX] *(?=10 *\^)", r"\1*"))]  # 3x10^8


class Unreadable(ValueError):
    """The answer is outside the language of the reader; it can still be equal as the same tokens."""


def clean(text):
    """Characters to plain LaTeX: delimiters and layout gone, thousands marks closed up. Raises Unreadable."""
    if len(text) > MAX_CHARACTERS or "\0" in text:
        raise Unreadable("too long, or a NUL character")
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴-⁹⁺⁻⁽⁾ⁿ]+", lambda m: "^{" + m[0].translate(RAISED) + "}", text)
        text = re.sub("[₀-₎ₙ]+", lambda m: "_{" + m[0].translate(LOWERED) + "}", text)
        text = re.sub(r"√ *([0-9]+(?:\.[0-9]+)?|[A-Za-z])", r"\\sqrt{\1}", text)
        text = text.translate(UNICODE)
        # Full-width digits and mathematical letters; anything else is refused later.
        text = re.sub("[\uff01-\uff5e\U0001d400-\U0001d7ff]", lambda m: unicodedata.normalize("NFKC", m[0]), text)
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    for marked in MARKED_THOUSANDS:
        text = marked.sub(lambda m: m[1] + re.sub("[^0-9]", "", m[2]), text)
    return text.lstrip(" ,;:~").rstrip(" .,;:~\\")


def close_thousands(text):
    """1,000 to 1000, outside brackets."""
    def closed(found):
        before = text[:found.start()]
        inside = sum(before.count(c) for c in ("(", "[", "\\{")) > sum(before.count(c) for c in (")", "]", "\\}"))
        return found[0] if inside else re.sub("[, ]", "", found[0])

    return PLAIN_THOUSANDS.sub(closed, text)


def tokenise(text, prose=False):
    r"""Tokens of cleaned text; prose: inside \text{...}, where letters are words. Raises Unreadable."""
    tokens, i, spaced = [], 0, False

    def argument():
        """The argument of the command just read, as text: a group in braces or one token."""
        nonlocal i
        i = BLANKS.match(text, i).end()
        content = braced(text, i, MAX_CHARACTERS)
        if content is not None:
            i += len(content) + 2
        else:
            content = found[0] if (found := TOKEN.match(text, i)) else ""
            i += len(content)
        return content

    while i < len(text):
        if found := NUMERAL.match(text, i):
            new, i = [("num", found[0])], found.end()
        elif prose and (found := WORD.match(text, i)):
            word, i = found[0].replace(".", "").strip("?'-"), found.end()
            new = [("word", word)] if word else []
        elif not (found := TOKEN.match(text, i)):
            raise Unreadable(f"character {text[i]!r}")
        else:
            kind, value, i = found.lastgroup, found[found.lastgroup], found.end()
            if kind == "space" or value in SPACING and kind == "cmd":
                spaced, new = True, []
            elif kind == "run":
                new = split_run(value, tokens)
            elif kind != "cmd":
                new = [(kind, value)]
            elif value in DROPPED:
                argument()
                new = []
            elif value in PROSE or value in FONTS:
                new, spaced = styled(value, argument(), text[i:]), True
            elif value in ("begin", "end"):
                new = [(value, argument().strip(" *"))]
                if new == [("begin", "array")]:
                    argument()  # its column format
            elif value == "\\":
                new = [("sym", "\\\\")]
            else:
                value = ALIASES.get(value, value)
                new = [("sym" if value in SYMBOLS else "let" if value in LETTERS else "cmd", value)]
        for kind, value in new:
            tokens.append((kind, value, spaced))
            spaced = False
        if len(tokens) > MAX_TOKENS:
            raise Unreadable("too many tokens")
    return tokens


def styled(command, content, after):
    r"""(kind, value) pairs of the content of \text{...} or of a font such as \mathrm{...}."""
    name = content.strip()
    if (command, name) == ("mathbb", "R"):
        return [("cmd", "reals")]
    if command in FONTS and len(name) == 1 and name.isalpha() and (command != "mathrm" or name in "eid"):
        return [("let", f"bb{name}" if command == "mathbb" else name)]
    if command in FONTS and name in FUNCTIONS:
        return [("cmd", name)]
    if re.fullmatch("[0-9A-Z]*[0-9][0-9A-Z]*", name) and re.match(r" *_ *\{?[1-3][0-9]", after):
        return [("num", name)]  # \text{A5}_{11}
    return [token[:2] for token in tokenise(content, prose=command in PROSE | {"mathrm", "operatorname", "mathbf"})]


def is_prose(text):
    r"""Nothing but words, typed without \text: even, two lines, LQSX. Short lower-case runs such as xy are products."""
    runs = re.findall("[A-Za-z]+", text)
    return (re.fullmatch("[A-Za-z][A-Za-z ,'-]*(?: [0-9]+)?", text) is not None and not any(r in TYPED for r in runs)
            and any(len(r) > 3 or r.isupper() and len(r) > 1 for r in runs))


def split_run(run, tokens):
    """A run of letters in mathematics: a function typed without backslash, a unit after a value, or a product."""
    before = tokens[-1] if tokens else None
    if run in TYPED:
        return [("cmd", TYPED[run])]
    if run.lower() in ("and", "or") or run == "to" and before and before[0] == "num" or (
            not before and run.lower() in NUMBER_WORDS):
        return [("word", run.lower())]
    if before and len(run) > 1 and (run in TYPED_UNITS or run.lower() in TYPED_UNITS or run in MULTIPLIERS) and (
            before[0] in ("num", "word") or before[1] in (")", "}", "%", "°", "/")
            or before[0] == "let" and len(run) > 3):
        return [("word", run)]
    for name in ("arcsin", "arccos", "arctan", "sin", "cos", "tan", "ln", "log", "pi"):  # sinx, pir
        if run.startswith(name) and len(run) <= len(name) + 2:
            return [("cmd", name), *(("let", letter) for letter in run[len(name):])]
    return [("let", letter) for letter in run]


# ---------------------------------------------------------------------------------------------------------------------
# 3. Exact numbers
# ---------------------------------------------------------------------------------------------------------------------

NUMBER = re.compile(r"([+-]?) *([0-9]+(?:\.[0-9]*)?|\.[0-9]+)")


def number(digits):
    """A literal, 12 or .5 or 1.60e-19, as ('num', Fraction, places): places after the point, None for an integer."""
    mantissa, _, exponent = digits.lower().partition("e")
    whole, _, decimals = mantissa.partition(".")
    shift = int(exponent or 0)
    if abs(shift) > 400:
        raise Unreadable("exponent of a number beyond 400")
    value = Fraction(int(whole + decimals or 0), 10 ** len(decimals)) * Fraction(10) ** shift
    return ("num", value, len(decimals) - shift if decimals else None)


def integer(n):
    return ("num", Fraction(n), None)


def is_integer(x):
    return isinstance(x, Fraction) and x.denominator == 1


def is_decimal(node):
    return node[0] == "num" and node[2] is not None


def stands_for(decimal, value):
    """
    Does the decimal ('num', Fraction, places) stand for `value`, a Fraction or real mpf not written as a decimal?

    It must be rounded or cut off at its last place and have 8 significant digits for a fraction, 6 for an irrational
    number; with fewer, 0.3333 would be paid for 1/3 and a guess for its neighbours.
    """
    _, given, places = decimal
    if not 0 <= places <= 60 or (given < 0) != (value < 0):
        return False
    shown = int(abs(given) * 10**places)
    least, half = (8, Fraction(1, 2)) if exact(value) else (6, 0.5)
    with MP_LOCK:
        scaled = abs(value) * 10**places
        return len(str(shown)) >= least and shown in (int(scaled), int(scaled + half))


# ---------------------------------------------------------------------------------------------------------------------
# 4. Structure: trees compared part by part
#    Trees are tuples (tag, ...): list, set, tuple, matrix, union, ratio, base, text, unit, rel (relation);
#    num, var, const, neg, +, *, /, ^, root, fn, call, !, binom, abs, floor, ceil, pm, mp (+-, -+).
#    p is the prediction, g the gold answer.
# ---------------------------------------------------------------------------------------------------------------------


def is_equal(prediction, gold):
    """
    Is the answer `prediction` mathematically equal to the answer `gold`? (two strings without their boxes) -> bool

    Never raises, never runs what it reads, and is bounded. See the head of this file for what counts.
    """
    if prediction is None or gold is None:
        return False
    prediction, gold = str(prediction), str(gold)
    if max(len(prediction), len(gold)) > MAX_CHARACTERS or "\0" in prediction + gold:
        return False
    if squeezed(prediction) == squeezed(gold):
        return bool(gold.strip())
    try:
        return same_answer(prediction, gold)
    except (ArithmeticError, ValueError, RecursionError, MemoryError):  # a bound or a domain: undecided is different
        return False


def squeezed(text):
    """Without blanks, except between digits: 2 1/2 is not 21/2."""
    return re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text.strip())


def same_answer(prediction, gold):
    (p, p_tokens), (g, g_tokens) = read(prediction), read(gold)
    if p is None or g is None:
        return bool(p_tokens) and p_tokens == g_tokens
    if same(p, g):
        return True
    if "," in prediction + gold and (p[0] in ("list", "set")) != (g[0] in ("list", "set")):
        p, g = (read(answer, thousands=False)[0] for answer in (prediction, gold))
        return p is not None and g is not None and p[0] == g[0] and same(p, g)
    return False


@functools.lru_cache(maxsize=512)
def read(answer, thousands=True):
    """
    (tree, tokens) of an answer string: tree None if it is outside the reader's language, tokens only then, and None if
    it cannot even be cleaned. thousands=False takes 1,234 as a list of two, which it may be beside the list 234, 1.
    """
    try:
        text = clean(answer)
        if found := NUMBER.fullmatch(text):  # 81 % of MATH's answers end here
            tree = number(found[2])
            return negated(tree) if found[1] == "-" else tree, None
        if found := CHOICE.fullmatch(text):
            return ("var", found[1]), None
        tokens = tokenise(close_thousands(text) if thousands else text, prose=is_prose(text))
    except Unreadable:
        return None, None
    try:
        return Reader(tokens).answer(), None
    except (Unreadable, RecursionError):
        return None, ungrouped(tokens)


# A, (A), A), \textbf{(A)}
CHOICE = re.compile(r"[({ ]*(?:\\(?:text[a-z]*|math(?:rm|bf|sf|it)) *)?[({ ]*([A-Z])[)} ]*[).:]?[)} ]*")


def ungrouped(tokens):
    r"""Kinds and values of tokens, without the braces around a single one: \sum^{n} is \sum^n."""
    kept = []
    for kind, value, _ in tokens:
        kept.append((kind, value))
        if value == "}" and kept[-3:-2] == [("sym", "{")]:
            kept[-3:] = [kept[-2]]
    return tuple(kept)


def same(p, g):
    """Equality of two trees."""
    if p == g:
        return True
    p_unit, g_unit = (node[2] if node[0] == "unit" else None for node in (p, g))
    if p_unit and g_unit and p_unit != g_unit and "?" not in (p_unit, g_unit):
        return False
    p, g = without_unit(p, g_unit), without_unit(g, p_unit)
    if p[0] == "rel" and g[0] != "rel":  # x = 5 for 5: every value the prediction states must be right
        values = stated_values(p)
        return bool(values) and all(same(value, g) for value in values)
    if g[0] == "rel" and p[0] != "rel":  # the gold answer may state its value in several forms: 0.56 = 56%
        return any(same(p, value) for value in stated_values(g))
    p_members, g_members = members_of(p), members_of(g)
    if len(p_members) != 1 or len(g_members) != 1:
        return same_members(p_members, g_members)
    p, g = p_members[0], g_members[0]
    if p[0] == g[0] == "rel":
        return same_relation(p, g)
    if "text" in (p[0], g[0]):  # even, typed without \text, reads as e v e n
        return spelled(p) is not None and spelled(p) == spelled(g)
    if p[0] == g[0] == "ratio":
        return same_ratio(p[1], g[1])
    if p[0] == g[0] == "union" and p[1] != "setminus":
        return p[1] == g[1] and same_members(p[2], g[2])
    if p[0] == g[0] and p[0] in ("tuple", "matrix", "union"):
        return p[1] == g[1] and same_each(p[2], g[2], same_each if p[0] == "matrix" else same)
    return not {p[0], g[0]} & NO_NUMBERS and same_expression(p, g)


NO_NUMBERS = {"list", "set", "tuple", "matrix", "union", "ratio", "base", "text", "rel", "unit"}


def without_unit(node, other_unit=None):
    r"""A value without its unit; 1000 m beside 1000\text{ m} ends in a letter that is one."""
    if other_unit and node[0] == "*" and node[2][0] == "var" and other_unit == f"{node[2][1]}^1":
        return node[1]
    return node[1] if node[0] == "unit" else node


def members_of(node):
    r"""Members of a list or set, with \pm written out; any other node is its own only member."""
    node = without_unit(node)
    if node[0] in ("list", "set"):
        return [m for member in node[1] for m in ([member] if without_unit(member)[0] == "set" else members_of(member))]
    return [with_sign(node, 1), with_sign(node, -1)] if contains(node, {"pm", "mp"}) else [node]


def contains(node, tags):
    return isinstance(node, tuple) and bool(node) and (
        isinstance(node[0], str) and node[0] in tags or any(contains(part, tags) for part in node))


def with_sign(node, sign):
    r"""\pm x as sign * x and \mp x as -sign * x, all linked."""
    if not isinstance(node, tuple):
        return node
    if node and node[0] in ("pm", "mp"):
        inside = with_sign(node[1], sign)
        return inside if (sign > 0) == (node[0] == "pm") else negated(inside)
    return tuple(with_sign(part, sign) for part in node)


def same_each(ps, gs, test=same):
    return len(ps) == len(gs) and all(test(p, g) for p, g in zip(ps, gs, strict=True))


def same_members(ps, gs):
    """Equal as multisets. Equality is transitive but for rounded decimals, so the first free partner will do."""
    if len(ps) != len(gs) or len(ps) > MAX_MEMBERS:
        return False
    p_names, g_names = ({x[2][0] for x in map(without_unit, members) if x[0] == "rel" and is_name(x[2][0])}
                        for members in (ps, gs))
    if len(p_names | g_names) > 1 and p_names != g_names:
        return False  # a = 2, b = 3 is not 2, 3, which does not say whose
    free = list(gs)
    for p in ps:
        partner = next((i for i, g in enumerate(free) if same(p, g)), None)
        if partner is None:
            return False
        del free[partner]
    return True


def spelled(node):
    """The letters of words or of a product of letters, in lower case; None for anything else."""
    if node[0] in ("text", "var", "const"):
        return node[1].lower()
    if node[0] == "*" and None not in (parts := (spelled(node[1]), spelled(node[2]))):
        return "".join(parts)
    return None


def is_name(node):
    r"""x, x_1, f(x), AB, \angle A, Area, (x, y): what may stand before = without being part of the value."""
    if node[0] in ("var", "text"):
        return True
    if node[0] in ("call", "tuple"):
        return all(part[0] == "var" for part in node[2])
    factors = [node]
    while factors[0][0] == "*":
        factors[:1] = factors[0][1:]
    return all(x[0] == "var" for x in factors) and (all(x[1][0].isupper() for x in factors) or
                                                    any(x[1] in ("angle", "triangle") for x in factors))


def stated_values(relation):
    """The values that a chain of = states: [5] of x = 5, [2+3, 5] of x = 2+3 = 5, [] of 2x + z = 1."""
    _, ops, sides = relation
    if not set(ops) <= {"=", "~", "in"}:
        return []
    named = is_name(sides[0])
    if "~" in ops[named:]:
        sides = sides[:ops.index("~", named) + 1]  # 4 sqrt 2 ~ 5.66 states 4 sqrt 2
    if named:
        name = variables(sides[0][1] if sides[0][0] == "call" else sides[0])
        return [] if any(name & variables(value) for value in sides[1:]) else list(sides[1:])
    constant = [side for side in sides if not variables(side)]
    return constant if len(constant) == len(sides) - is_name(sides[-1]) else []


def same_ratio(ps, gs):
    """1:2 = 2:4 by cross products; a time such as 5:00, where they mean nothing, only term by term."""
    if same_each(ps, gs) or len(ps) != len(gs) or integer(0) in (*ps, *gs):
        return same_each(ps, gs)
    return all(same_expression(("*", ps[0], g), ("*", p, gs[0])) for p, g in zip(ps, gs, strict=True))


def same_relation(p, g):
    (_, p_ops, p_sides), (_, g_ops, g_sides) = p, g
    if p_ops != g_ops:
        return False
    if same_each(p_sides, g_sides) or set(p_ops) <= {"=", "~", "!="} and same_each(p_sides[::-1], g_sides):
        return True
    if len(p_ops) != 1 or p_ops[0] not in ("=", "~", "!=", "<", "<="):
        return False
    if {side[0] for side in (*p_sides, *g_sides)} & NO_NUMBERS:
        return False
    # Equations agree if lhs - rhs is the same up to a constant factor; inequalities if the factor is positive.
    return same_expression(*(("+", (left, ("neg", right))) for left, right in (p_sides, g_sides)),
                           factor="positive" if "<" in p_ops[0] else "any")


# ---------------------------------------------------------------------------------------------------------------------
# 5. The reader: tokens to a tree
#
#    answer   := item { (, | ; | and | or) item }            ('list', items)
#    item     := relation [unit]                             ('unit', x, name)
#    relation := union { (= | < | \le | \in ...) union }     ('rel', ops, sides)
#    union    := ratio { (\cup | \cap | \setminus) ratio }   ('union', op, members)
#    ratio    := sum { : sum }                               ('ratio', members)
#    sum      := [sign] term { (+ | - | \pm) term }          ('+', terms)  ('neg', x)  ('pm', x)  ('mp', x)
#    term     := power { [* | /] power }                     ('*', a, b)  ('/', a, b)
#    power    := primary { ^ exponent | ! | % | degree }     ('^', a, b)  ('!', a)
#    primary  := number | letter | function power | \frac.. | \sqrt.. | bracket | matrix | words
# ---------------------------------------------------------------------------------------------------------------------

END = ("stop", "", False)
RELATIONS = {"=": "=", "<": "<", ">": ">", "le": "<=", "ge": ">=", "ne": "!=", "approx": "~"} | {
    name: name for name in "in notin sim equiv to implies iff subset subseteq perp parallel propto".split()}
TURNED = {">": "<", ">=": "<=", "<": ">", "<=": ">="}
SEPARATORS = {("sym", ","), ("sym", ";"), ("word", "and"), ("word", "or")}
CLOSERS = {*(("sym", symbol) for symbol in (")", "]", "}", "&", "\\\\")),
           *(("cmd", name) for name in ("}", "rangle", "rfloor", "rceil"))}
CONSTANTS = {"pi": ("const", "pi"), "infty": ("const", "infinity"), "emptyset": ("set", ()),
             "reals": ("tuple", "()", (("neg", ("const", "infinity")), ("const", "infinity")))}
ACCENTS = {"overline", "bar", "vec", "hat", "dot", "ddot", "widehat", "tilde", "overrightarrow"}
PRIMARIES = FUNCTIONS | ACCENTS | set(CONSTANTS) | {"frac", "binom", "sqrt", "lfloor", "lceil"}
MIXED = re.compile(r"frac(?:[0-9]|\{[0-9]+\})(?:[0-9]|\{[0-9]+\})")
UNIT = (r"(/ |per )?(square |sq |cubic )?((?!(?:per|square|sq|cubic|if|when|where|for|not|mod|is) )[A-Za-z-]+) "
        r"(?:\^ (- )?([0-9]) )?")
UNITS_TEXT = re.compile(rf"(?:(?:\* |of )?{UNIT})+|(?:square |cubic )")


class Reader:
    """One pass over the tokens of one answer; every method reads what its name says or raises Unreadable."""

    def __init__(self, tokens):
        self.tokens, self.at = tokens, 0
        self.depth = self.bars = self.trigonometric = 0  # how deep in anything, in |...|, in the argument of a sine
        self.unit = None  # of the item being read

    def peek(self, ahead=0):
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else END

    def sees(self, kind, *values):
        token = self.peek()
        return token[0] == kind and (not values or token[1] in values)

    def values(self, count):
        return [token[1] for token in self.tokens[self.at:self.at + count]]

    def take(self, kind=None, *values):
        token = self.peek()
        if token is END or kind and not self.sees(kind, *values):
            raise Unreadable(f"{token[1]!r} where {values or kind} should stand")
        self.at += 1
        return token[1]

    def took(self, kind, *values):
        if self.sees(kind, *values):
            self.at += 1
            return True
        return False

    def answer(self):
        members = self.members()
        if self.peek() is not END or not members:
            raise Unreadable("nothing, or more than an answer")
        return members[0] if len(members) == 1 else ("list", tuple(members))

    def members(self):
        self.deeper()
        members = []
        while True:
            while self.peek()[:2] in SEPARATORS:
                self.at += 1
            if self.at_closer(self.peek()):
                break
            members.append(self.item())
            if self.peek()[:2] not in SEPARATORS:
                break
        self.depth -= 1
        return members

    def deeper(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("nested too deeply")

    def at_closer(self, token):
        return token is END or token[0] == "end" or token[:2] in CLOSERS or token[:2] == ("sym", "|") and self.bars > 0

    def end_of_item(self):
        """Index of the token after the item that is being read."""
        end = self.at
        while end < len(self.tokens):
            token = self.tokens[end]
            if token[:2] in SEPARATORS or self.at_closer(token) or token[1] in RELATIONS and token[0] != "word":
                break
            end += 1
        return end

    def item(self):
        outer, self.unit = self.unit, None
        node = self.relation()
        unit, self.unit = self.unit, outer
        return ("unit", node, unit) if unit else node

    def relation(self):
        if self.took("sym", "=") or self.took("cmd", "approx"):
            pass  # "= 5", "\approx 8.24"
        sides, ops = [self.union()], []
        while self.peek()[1] in RELATIONS and self.peek()[0] in ("sym", "cmd"):
            op = RELATIONS[self.take()]
            ops.append(op + "=" if op in "<>" and self.took("sym", "=") else op)
            sides.append(self.union())
        if not ops:
            return sides[0]
        if len(sides) > MAX_SIDES:
            raise Unreadable("a long chain of relations")
        if ops[0] in (">", ">="):  # one direction: a > b is b < a
            sides, ops = sides[::-1], [TURNED.get(op, op) for op in reversed(ops)]
        return ("rel", tuple(ops), tuple(sides))

    def union(self):
        members, op = [self.ratio()], None
        while self.sees("cmd", "cup", "cap", "setminus") and op in (None, self.peek()[1]):
            op = self.take()
            members.append(self.ratio())
        return ("union", op, tuple(members)) if op else members[0]

    def ratio(self):
        members = [self.sum()]
        while self.took("sym", ":") or self.peek(1)[0] == "num" and self.took("word", "to"):
            members.append(self.sum())
        return ("ratio", tuple(members)) if len(members) > 1 else members[0]

    def sum(self):
        if self.sees("word") and (words := self.words()):
            return words
        terms = []
        while not terms or self.sees("sym", "+", "-") or self.sees("cmd", "pm", "mp"):
            sign, negative = None, False
            while self.sees("sym", "+", "-") or self.sees("cmd", "pm", "mp"):
                symbol = self.take()
                negative ^= symbol == "-"
                sign = symbol if symbol in ("pm", "mp") else sign
            node = self.term()
            node = (sign, node) if sign else node
            terms.append(negated(node) if negative else node)
        return terms[0] if len(terms) == 1 else ("+", tuple(terms))

    def words(self):
        """An item of nothing but words, as ('text', its letters); a lone letter is a variable."""
        end = self.end_of_item()
        words = [token[1] for token in self.tokens[self.at:end]]
        if any(token[0] not in ("word", "num") for token in self.tokens[self.at:end]):
            return None
        if words[0].lower() in NUMBER_WORDS and (len(words) == 1 or words[1].lower() in MULTIPLIERS):
            return None  # five, five million
        self.at = end
        return ("var", words[0]) if len(words) == len(words[0]) == 1 else ("text", "".join(words).lower())

    def term(self):
        node = self.signed_power()
        while True:
            kind, value, _ = self.peek()
            if kind == "sym" and value in "*/" and not (self.peek(1)[0] == "word" and self.units()):
                self.at += 1
                node = (product if value == "*" else quotient)(node, self.signed_power())
            elif kind == "word" and value.lower() in MULTIPLIERS:
                self.at += 1
                node = product(node, integer(10 ** MULTIPLIERS[value.lower()]))
            elif self.starts_factor() and not (kind == "word" and self.units()):
                if kind == "num" and self.tokens[self.at - 1][1] not in (")", "]"):
                    raise Unreadable("a number after a factor")
                node = product(node, self.power())
            elif not (kind == "word" and value != "to" and self.units()):
                return node

    def units(self):
        """Read the units that end the item, if they do: cm, square cm, kcal m^-2 yr^-1, miles / hour, as name^power."""
        end = self.end_of_item()
        text = "".join(f"{part} " for token in self.tokens[self.at:end] for part in token[1].split())
        if end == self.at or not UNITS_TEXT.fullmatch(text):
            return False
        powers = Counter()
        for below, shape, name, minus, digits in re.findall(UNIT, text):
            power = int(digits) if digits else {"": 1, "cubic ": 3}.get(shape, 2)
            powers[UNITS.get(name) or UNITS.get(name.lower())] += -power if below or minus else power
        known = powers and None not in powers
        self.unit = " ".join(f"{name}^{power}" for name, power in sorted(powers.items())) if known else "?"
        self.at = end
        return True

    def starts_factor(self):
        kind, value, _ = self.peek()
        return (kind in ("num", "let", "begin") or kind == "word" and len(value) == 1
                or kind == "cmd" and value in PRIMARIES
                or kind == "sym" and (value in "([{" or value == "|" and not self.bars))

    def signed_power(self):
        """A sign may stand after an operator: 2 * -3."""
        negative = False
        while self.sees("sym", "-", "+"):
            negative ^= self.take() == "-"
        node = self.power()
        return negated(node) if negative else node

    def power(self):
        self.deeper()
        node = self.primary()
        for _ in range(MAX_SIDES):
            if self.took("sym", "^"):
                node = ("^", node, self.exponent())
            elif self.took("sym", "!"):
                node = ("!", node)
            elif self.took("sym", "%"):
                self.unit = "%^1"
            elif self.took("sym", "°"):
                node = self.degrees(node)
            elif not (node[0] == "num" and self.took("sym", "'")):  # seconds of arc, feet
                break
        else:
            raise Unreadable("a tower of powers")
        self.depth -= 1
        return node

    def degrees(self, node):
        if self.sees("word", "C", "F") or self.sees("let", "C", "F"):
            self.unit = self.take() + "^1"
        elif self.trigonometric:  # in sin 30 degrees it is a factor pi / 180, elsewhere a unit
            return ("*", node, ("/", ("const", "pi"), integer(180)))
        else:
            self.unit = "deg^1"
        return node

    def exponent(self):
        if self.sees("num"):  # x^10 as people type it, not LaTeX's x^1 0
            return number(self.take())
        if self.took("sym", "-"):
            return negated(self.exponent())
        return self.exponent() if self.took("sym", "+") else self.argument()

    def argument(self):
        r"""What a command takes: a group in braces, or ONE token, of a number one digit: \frac12."""
        if self.sees("num"):
            digits, spaced = self.peek()[1:]
            if len(digits) > 1:
                if len(digits) > 2 or not digits.isdigit():
                    raise Unreadable("an argument of several digits without braces")
                parts = [("num", digits[0], spaced), ("num", digits[1], False)]
                self.tokens = [*self.tokens[:self.at], *parts, *self.tokens[self.at + 1:]]
            return number(self.take())
        return self.letter(self.take()) if self.sees("let") else self.primary()

    def group(self):
        r"""{ ... }: a value in most places; also {1,2} for \{1,2\}, {a \over b} and {n \choose k}."""
        self.take("sym", "{")
        bars, self.bars = self.bars, 0
        members = self.members()
        if len(members) == 1 and self.sees("cmd", "over", "choose"):
            over, below = self.take() == "over", self.item()
            members = [quotient(members[0], below) if over else ("binom", members[0], below)]
        self.take("sym", "}")
        self.bars = bars
        return self.grouped(members) if len(members) < 2 else ("set", tuple(members))

    def grouped(self, members):
        """The only member of a group or bracket; its unit belongs to the item around it."""
        if len(members) != 1:
            raise Unreadable("an empty group")
        if members[0][0] == "unit":
            self.unit = members[0][2]
        return without_unit(members[0])

    def primary(self):
        kind, value, _ = self.peek()
        if kind == "num":
            return self.numeral()
        if kind == "begin":
            return self.matrix()
        if kind == "sym" and value == "{":
            return self.group()
        if kind == "sym" and value in "([" or kind == "cmd" and value in ("{", "langle"):
            return self.bracket()
        self.take()
        if kind == "let" or kind == "word" and len(value) == 1:
            return self.letter(value) if value in ("e", "i") and not self.sees("sym", "_") else self.name(value)
        if kind == "word" and value.lower() in NUMBER_WORDS:
            return ("num", NUMBER_WORDS[value.lower()], None)
        if kind == "sym" and value == "|":
            self.bars += 1
            node = ("abs", self.sum())
            self.take("sym", "|")
            self.bars -= 1
            return node
        if kind != "cmd" or value not in PRIMARIES:
            raise Unreadable(f"{value!r} is not the start of a value")
        if value in CONSTANTS:
            return CONSTANTS[value]
        if value in ("frac", "binom"):
            first = self.argument()
            return quotient(first, self.argument()) if value == "frac" else ("binom", first, self.argument())
        if value == "sqrt":
            return self.root()
        if value in ("lfloor", "lceil"):
            node = (value[1:], self.sum())
            self.take("cmd", "r" + value[1:])
            return node
        if value in ACCENTS:
            start = self.at
            self.argument()
            return self.name(value + "".join(token[1] for token in self.tokens[start:self.at]))
        return self.function(value)

    def letter(self, name):
        return ("const", name) if name in ("e", "i") else ("var", name)

    def numeral(self):
        """A number, a mixed number, a repeating decimal or a numeral in a base."""
        digits = self.take("num")
        if self.took("sym", "_"):
            return self.in_base(digits)
        if not digits.isascii() or digits[0].isalpha() or re.search("[A-DF-Z]", digits):
            raise Unreadable("a numeral without its base")
        if "." in digits and (self.took("cmd", "overline") or self.took("cmd", "dot") or self.took("cmd", "bar")):
            grouped = self.took("sym", "{")
            period = self.take("num")
            if not period.isdigit() or grouped and not self.took("sym", "}"):
                raise Unreadable("a period that is not of digits")
            places = len(digits.partition(".")[2])
            return ("num", number(digits)[1] + Fraction(int(period), (10 ** len(period) - 1) * 10**places), None)
        fraction = self.fraction_part() if digits.isdigit() else None
        return ("num", int(digits) + fraction, None) if fraction else number(digits)

    def in_base(self, digits):
        base = number(self.take()) if self.sees("num") else self.argument()
        if base[0] != "num":
            raise Unreadable("a base that is no number")
        return number(digits) if base == integer(10) else ("base", digits.lstrip("0") or "0", base[1])

    def fraction_part(self):
        r"""The fraction of a mixed number, 2\frac14 or 2 1/4, or None."""
        if MIXED.match("".join(self.values(7))):
            self.take()
            top, bottom = self.argument(), self.argument()
        elif self.sees("num") and self.peek()[2] and self.peek(1)[1] == "/" and self.peek(2)[0] == "num":
            top, _, bottom = number(self.take()), self.take(), number(self.take())
        else:
            return None
        if not (is_integer(top[1]) and is_integer(bottom[1]) and 0 < top[1] < bottom[1]):
            raise Unreadable("a number before a fraction that is not below 1")
        return top[1] / bottom[1]

    def name(self, name):
        """A variable with its index and primes; I(0) and f(x) are read here too."""
        while self.sees("sym", "_", "'"):
            if self.take() == "'":
                name += "'"
                continue
            start, depth = self.at, 0
            while depth or self.at == start:
                depth += {"{": 1, "}": -1}.get(self.take(), 0)
            name += "_" + "".join(token[1] for token in self.tokens[start:self.at] if token[1] not in "{}")
        if name in ("f", "g", "h") and self.values(4) == ["^", "-", "1", "("]:
            self.at += 3
            name += "'inverse"
        if self.sees("sym", "(") and len(name.partition("'")[0]) == 1:
            inside, closed = self.peek(1), self.peek(2)[1] == ")"
            if closed and inside[0] == "num" and (name[0] in "fghFGH" or inside[1] == "0"):
                self.at += 3
                return ("var", f"{name}({inside[1]})")  # a number called I(0), not I times 0
            if closed and inside[0] == "let":
                self.at += 3
                return ("call", ("var", name), (("var", inside[1]),))
            if name[0] in "fghFGHP":
                self.take()
                node = ("call", ("var", name), tuple(self.members()))
                self.take("sym", ")")
                return node
        return ("var", name)

    def root(self):
        index = None
        if self.took("sym", "["):
            index = self.sum()
            self.take("sym", "]")
        inside = number(self.take()) if self.sees("num") else self.argument()  # \sqrt12 as people mean it
        return ("root", inside, index)

    def function(self, name):
        power = base = None
        while self.sees("sym", "^", "_"):
            if self.take() == "^":
                power = self.exponent()
            else:
                base = self.argument()
        self.trigonometric += name in TRIGONOMETRIC
        if self.sees("sym", "(", "{", "|"):
            inside = self.primary()
        else:  # sin 2 pi x takes all factors up to the next function, bracket or operator
            inside = self.signed_power()
            while self.starts_factor() and not self.sees("num") and self.peek()[1] not in {"(", "[", "|", *FUNCTIONS}:
                inside = product(inside, self.power())
        self.trigonometric -= name in TRIGONOMETRIC
        if base is not None and name != "log":
            raise Unreadable(f"{name} with an index")
        if name in TRIGONOMETRIC and power == integer(-1):
            return ("fn", "arc" + name, inside)
        if name == "exp":
            node = ("^", ("const", "e"), inside)
        elif name == "lg" or base is not None:
            node = ("/", ("fn", "ln", inside), ("fn", "ln", base or integer(10)))
        else:
            node = ("fn", "ln" if name == "log" else name, inside)
        return ("^", node, power) if power else node

    def bracket(self):
        r"""( ), [ ], \{ \} and half-open intervals; a single member in ( ) or [ ] is only grouped."""
        opening = self.take()
        if opening == "(" and self.sees("num") and self.values(3)[1:] == [")", "_"]:  # (204)_5
            digits = self.take()
            self.at += 2
            return self.in_base(digits)
        outside, self.bars = (self.bars, self.unit), 0
        members = self.members()
        shape = {"langle": "<"}.get(opening, opening) + {"rangle": ">"}.get(closing := self.take(), closing)
        self.bars, self.unit = outside
        if shape not in ("()", "[]", "(]", "[)", "{}", "<>"):
            raise Unreadable(f"brackets {shape}")
        if shape == "{}":
            return ("set", tuple(members))
        return self.grouped(members) if shape in ("()", "[]") and len(members) < 2 else ("tuple", shape, tuple(members))

    def matrix(self):
        environment = self.take("begin")
        if environment not in ("pmatrix", "bmatrix", "matrix", "vmatrix", "Bmatrix", "smallmatrix", "array"):
            raise Unreadable(environment)
        rows, row = [], []
        while not self.took("end", environment):
            row.append(self.item())
            if not self.took("sym", "&"):
                rows.append(tuple(row))
                row = []
                if not self.took("sym", "\\\\") and not self.sees("end"):
                    raise Unreadable("a matrix row that does not end")
        if len({len(row) for row in rows}) != 1:
            raise Unreadable("a ragged matrix")
        return ("matrix", "determinant" if environment == "vmatrix" else "", tuple(rows))


def negated(node):
    return ("num", -node[1], node[2]) if node[0] == "num" else ("neg", node)


def product(a, b):
    """a * b; a number times a matrix multiplies its entries."""
    for scalar, other in ((a, b), (b, a)):
        if other[0] == "matrix" and scalar[0] != "matrix":
            return ("matrix", other[1], tuple(tuple(("*", scalar, entry) for entry in row) for row in other[2]))
    return ("*", a, b)


def quotient(a, b):
    """a / b; of integers the number itself, so that a fraction is one node."""
    if a[0] == b[0] == "num" and b[1] and a[2] is None and b[2] is None:
        return ("num", a[1] / b[1], None)
    if a[0] == "matrix":
        return ("matrix", a[1], tuple(tuple(("/", entry, b) for entry in row) for row in a[2]))
    return ("/", a, b)


# ---------------------------------------------------------------------------------------------------------------------
# 6. Identity of two expressions at random points
# ---------------------------------------------------------------------------------------------------------------------

MP = mpmath.MPContext()  # our own, so that nobody's mpmath.mp.dps changes a verdict
MP.dps = 50
MP_LOCK = threading.Lock()  # mpmath caches its constants without one
TOLERANCE = MP.mpf(10) ** -30
POINTS, ATTEMPTS = 3, 8
WHOLE_POINTS, WHOLE_ATTEMPTS = 16, 40  # floor(n/2) and ceil(n/2) agree at every other whole number


class Refused(ArithmeticError):
    """A bound was met: undecided, so not equal."""


class Undefined(ArithmeticError):
    """Division by zero, the factorial of 1/2 ...: try another point."""


def same_expression(p, g, factor=None):
    """
    p = g at random points of their variables; with factor "any", p = c g for one constant c != 0; "positive": c > 0.

    Zero on both sides at every point decides nothing about c, and a rounded zero nothing at all.
    """
    names = variables(p) | variables(g)
    if factor is None and not names and (verdict := same_decimal(p, g)) is not None:
        return verdict
    # Whole numbers where factorials occur, or floors on both sides; both signs where |x| does.
    rounding = [contains(x, {"floor", "ceil"}) for x in (p, g)]
    kind = ("whole" if contains((p, g), {"!", "binom"}) or all(rounding) else "wide" if any(rounding) else
            "signed" if contains((p, g), {"abs"}) else "plain")
    wanted, attempts = (WHOLE_POINTS, WHOLE_ATTEMPTS) if kind == "whole" else (POINTS, ATTEMPTS)
    agreed, ratio = 0, None
    for k in range(attempts):
        try:
            a, b = evaluate(p, k, kind), evaluate(g, k, kind)
            if factor is not None and (a == 0 or b == 0):
                if a != b:
                    return False
                continue
            if factor is not None:
                a, b, ratio = divide(a, b), ratio, divide(a, b) if ratio is None else ratio
                b = a if b is None else b
                if factor == "positive" and not (MP.im(inexact(a)) == 0 and MP.re(inexact(a)) > 0):
                    return False
        except Undefined:
            continue
        except Refused:
            return False
        if not close(a, b):
            return False
        agreed += 1
        if agreed == (wanted if names else 1):
            return bool(names) or factor is None
    return False


def same_decimal(p, g):
    """Verdict on a decimal and a constant, which it may be a rounding of; None if neither is a decimal."""
    for decimal, other in ((p, g), (g, p)):
        if is_decimal(decimal):
            try:
                value = evaluate(other, 0, "plain")
            except ArithmeticError:
                return False
            if isinstance(value, Fraction):
                return value == decimal[1] or not is_decimal(other) and stands_for(decimal, value)
            return close(value, decimal[1]) or MP.im(value) == 0 and stands_for(decimal, MP.re(value))
    return None


@functools.lru_cache(maxsize=2048)
def variables(node):
    """Names of the variables of a tree."""
    if not isinstance(node, tuple):
        return frozenset()
    return frozenset(node[1:]) if node[:1] == ("var",) else frozenset().union(*map(variables, node))


@functools.lru_cache(maxsize=8192)
def coordinate(name, k, kind):
    """The k-th value of a variable, the same in every process."""
    draw = random.Random(f"{name} {k}")
    if kind == "whole":
        return Fraction(draw.randint(3, 40))
    value = Fraction(draw.randint(5009, 29_990) if kind == "wide" else draw.randint(501, 2999), 997)
    return -value if kind == "signed" and k % 2 else value


def evaluate(node, k, kind):
    """Value at the k-th point: a Fraction while all is rational, else an mpf or mpc. Raises Refused, Undefined."""
    tag, *parts = node
    if tag == "num":
        return node[1]
    if tag == "var":
        return coordinate(node[1], k, kind)
    if tag == "const" and node[1] != "infinity":
        return {"pi": +MP.pi, "e": +MP.e, "i": MP.mpc(0, 1)}[node[1]]
    if tag == "+":
        return functools.reduce(add, (evaluate(term, k, kind) for term in node[1]))
    if tag == "fn":
        return function(node[1], evaluate(node[2], k, kind))
    if tag == "^" and node[1] == ("const", "e"):
        return function("exp", evaluate(node[2], k, kind))
    if tag == "call":  # f(x, y): f times a weighted sum, so that other arguments give another value
        arguments = (multiply(Fraction(j + 1), evaluate(x, k, kind)) for j, x in enumerate(node[2]))
        return multiply(evaluate(node[1], k, kind), functools.reduce(add, arguments))
    if tag not in OPERATIONS:
        raise Refused(f"{tag} has no value")
    return OPERATIONS[tag](*(Fraction(2) if part is None else evaluate(part, k, kind) for part in parts))


def inexact(x):
    return MP.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x


def checked(x):
    """A result, if its size is bounded."""
    if isinstance(x, Fraction):
        if max(x.numerator.bit_length(), x.denominator.bit_length()) > MAX_BITS:
            raise Refused("too many digits")
    elif not MP.isfinite(x):
        raise Undefined("infinite")
    return x


def exact(*values):
    return all(isinstance(x, Fraction) for x in values)


def add(a, b):
    if exact(a, b):
        return checked(a + b)
    if not a or not b:
        return a or b
    with MP_LOCK:
        a, b = inexact(a), inexact(b)
        if abs(MP.mag(a) - MP.mag(b)) > 64:  # the smaller one would be lost, and 10^40 + pi equal to 10^40
            raise Refused("a sum of very different sizes")
        return checked(a + b)


def multiply(a, b):
    if exact(a, b):
        return checked(a * b)
    with MP_LOCK:
        return checked(inexact(a) * inexact(b))


def divide(a, b):
    if not b:
        raise Undefined("division by zero")
    if exact(a, b):
        return checked(a / b)
    with MP_LOCK:
        return checked(inexact(a) / inexact(b))


def power(a, b):
    if not a:
        if exact(a, b) and b > 0:
            return a
        raise Undefined("a power of zero")
    if exact(a, b) and is_integer(b):
        if abs(a) == 1:
            return a if b % 2 else Fraction(1)
        if abs(b) * max(a.numerator.bit_length(), a.denominator.bit_length()) > MAX_BITS:
            raise Refused("too many digits")
        return a ** b.numerator
    if exact(a, b) and a > 0 and b.denominator <= 64 and exact(base := root(a, Fraction(b.denominator))):
        return power(base, Fraction(b.numerator))
    with MP_LOCK:
        a, b = inexact(a), inexact(b)
        if MP.mag(b) > MAX_ARGUMENT_BITS or float(MP.fabs(b)) * (abs(MP.mag(a)) + 1) > MAX_EXPONENT_BITS:
            raise Refused("a large power")
        return checked(MP.power(a, b))


def root(x, index):
    """The real root where there is one (an odd root of a negative number too), exact where it is rational."""
    if not is_integer(index) or not 2 <= index <= 1000:
        return power(x, divide(Fraction(1), index))
    n = int(index)
    if exact(x) and x < 0 and n % 2:
        return -root(-x, index)
    if exact(x) and x >= 0:
        top, bottom = whole_root(x.numerator, n), whole_root(x.denominator, n)
        if top is not None and bottom is not None:
            return Fraction(top, bottom)
    with MP_LOCK:
        x = inexact(x)
        return checked(-MP.root(-x, n) if n % 2 and MP.im(x) == 0 and MP.re(x) < 0 else MP.root(x, n))


def whole_root(x, n):
    """The n-th root of a whole number if it is whole, else None."""
    if n == 2:
        candidate = math.isqrt(x)
    elif x.bit_length() > 4096:
        return None
    else:
        low, high = 0, 1 << (x.bit_length() // n + 1)  # low^n <= x < high^n
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if middle**n <= x else (low, middle)
        candidate = low
    return candidate if candidate**n == x else None


def factorial(x):
    if not is_integer(x) or x < 0:
        raise Undefined("a factorial of what is no whole number")
    if x > 5000:
        raise Refused("a large factorial")
    return checked(Fraction(math.factorial(int(x))))


def binomial(n, k):
    if not (is_integer(n) and is_integer(k) and n >= 0 and k >= 0):
        raise Undefined("a binomial of what is no whole number")
    if n > 5000:
        raise Refused("a large binomial")
    return Fraction(math.comb(int(n), int(k)))


def floor(x):
    if exact(x):
        return Fraction(math.floor(x))
    with MP_LOCK:
        if MP.im(x) != 0 or MP.mag(x) > 100:
            raise Undefined("the floor of a complex or huge number")
        nearest = MP.nint(MP.re(x))  # log2(8) is 3, however it was rounded
        return Fraction(int(nearest if MP.fabs(x - nearest) < TOLERANCE else MP.floor(MP.re(x))))


def function(name, x):
    if exact(x) and (name, int(x) if is_integer(x) else None) in EXACT_VALUES:
        return Fraction(EXACT_VALUES[name, int(x)])
    with MP_LOCK:
        x = inexact(x)
        if name != "ln" and x and MP.mag(x) > (17 if name in ("exp", "sinh", "cosh") else MAX_ARGUMENT_BITS):
            raise Refused("a large argument")
        try:
            return checked(getattr(MP, re.sub("^arc?", "a", name))(x))
        except (ValueError, ZeroDivisionError) as error:
            raise Undefined("a pole") from error


EXACT_VALUES = {("ln", 1): 0, ("exp", 0): 1, ("cos", 0): 1, ("cosh", 0): 1, **{
    (name, 0): 0 for name in ("sin", "tan", "sinh", "tanh", "arcsin", "arctan")}}
OPERATIONS = {"neg": lambda x: -x, "*": multiply, "/": divide, "^": power, "root": root, "!": factorial,
              "binom": binomial, "floor": floor, "ceil": lambda x: -floor(-x),
              "abs": lambda x: abs(x) if exact(x) else checked(MP.fabs(x))}


def close(a, b):
    """Exactly equal, or to 30 digits; a rounded zero is equal to nothing."""
    if exact(a, b):
        return a == b
    with MP_LOCK:
        a, b = inexact(a), inexact(b)
        return bool(a) and bool(b) and bool(MP.fabs(a - b) <= TOLERANCE * max(MP.fabs(a), MP.fabs(b)))


def gold_answer(answer):
    r"""
    A dataset's gold answer as a string that can be graded, or None: drop and count such a row, for a gold answer that
    cannot be read pays every completion the same.

    answer: str, int, float (27.0 is 27), or a list whose first entry counts; a whole solution is read for its last box,
    or for what follows GSM8K's ####.
    """
    if isinstance(answer, (list, tuple)):
        answer = answer[0] if answer else None
    if answer is None or isinstance(answer, float) and not math.isfinite(answer):
        return None
    answer = str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer).strip()
    if "\\boxed" in answer:
        answer = extract_answer(answer) or ""
    elif "####" in answer:
        answer = answer.rpartition("####")[2].strip()
    return answer if answer and len(answer) <= MAX_CHARACTERS and read(answer)[0] is not None else None


# ---------------------------------------------------------------------------------------------------------------------
# 7. Rewards
# ---------------------------------------------------------------------------------------------------------------------


def flag(default, text):
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class RewardOptions:
    """Reward flags of train_grpo.py. Defaults: Fast-Math-R1 stage 2 with what its code does by accident repaired."""

    reward_funcs: str = flag(
        "format,cosine,length", "Comma list of accuracy, format, format_open_rs, cosine, length, repetition, "
        "soft_overlong, or path/to/file.py:function, called as function(completion, answer) in a process that is "
        "killed when it is late.")
    reward_weights: str = flag("", "Comma list, one weight per reward; empty: all 1.")
    answer_scope: str = flag("full", "Which box counts. full: the last of the completion, as in the recipe; "
                             "before_think_end: the last before </think>, as deployed.")
    format_strict: bool = flag(True, "False: the recipe's format2, which is also paid for an empty box.")
    length_unit: str = flag("tokens", "tokens, or chars as in both recipes' code.")
    length_scope: str = flag("group", "Shortest and longest answer of the length reward: of the group, or local_batch "
                             "as in Fast-Math's code.")
    length_prompts: int = flag(2, "Prompts of a local batch, for --length_scope local_batch.")
    cosine_correct_at_0: float = flag(1.0, "Cosine reward of a right answer of length 0.")
    cosine_correct_at_max: float = flag(0.1, "Cosine reward of a right answer of cosine_max_length.")
    cosine_wrong_at_0: float = flag(-1.0, "Cosine reward of a wrong answer of length 0.")
    cosine_wrong_at_max: float = flag(-0.1, "Cosine reward of a wrong answer of cosine_max_length.")
    cosine_max_length: int = flag(9600, "Length where the cosine ends, in length_unit: the recipe's 30000 chars, at "
                                  "3.1 chars a token. With --length_unit chars set 30000.")
    cosine_clip: bool = flag(True, "False: periodic beyond cosine_max_length, as in Open-RS.")
    cosine_truncated: float | None = flag(None, "Cosine reward of every truncated completion (arXiv 2502.03373); "
                                          "unset: by its length.")
    repetition_ngram_size: int = flag(3, "Words of an n-gram.")
    repetition_max_penalty: float = flag(-1.0, "Reward when all n-grams are the same one.")
    soft_overlong_cache: int = flag(4096, "soft_overlong falls from 0 to -1 over so many tokens before the limit.")
    swap_verify: bool = flag(False, "True: is_equal(gold, prediction), the order of both recipes.")
    bad_gold_reward: float | None = flag(None, "When the gold answer cannot be read: above 0 all count as right, the "
                                         "recipes' 1.0; 0: all as wrong; unset: the group has no reward (nan).")
    reward_timeout: float = flag(10.0, "Seconds a user's reward function has for one completion.")
    reward_workers: int = flag(2, "Processes per user's reward function and rank.")
    reward_memory_gb: float = flag(4.0, "Address space of such a process.")
    max_completion_length: int = flag(16384, "Tokens an answer may have.")


@dataclasses.dataclass
class RewardedGroup:
    """Rewards of the G completions of one prompt."""

    parts: dict  # name of the reward -> G floats, before weights
    totals: list  # G floats: sum of weight * part; nan where the gold answer cannot be read
    outcomes: list  # G of right | wrong | no_answer | timeout | crash | bad_gold
    correct: list  # G of True | False | None (bad gold)
    lengths: list  # G lengths in length_unit


BUILT_IN = ("accuracy", "format", "format_open_rs", "cosine", "length", "repetition", "soft_overlong")
NEED_CORRECT = ("accuracy", "cosine", "length")


def check_reward_options(options):
    """[(name, weight)] of the rewards asked for. Raises ValueError with flag, value, reason and remedy."""
    names = [name.strip() for name in options.reward_funcs.split(",") if name.strip()]
    weights = [float(weight) for weight in options.reward_weights.split(",") if weight.strip()] or [1.0] * len(names)
    if not names:
        raise ValueError("--reward_funcs is empty: nothing would be learnt; name at least one reward")
    if len(set(map(part_name, names))) != len(names):
        raise ValueError(f"--reward_funcs {options.reward_funcs!r} names a reward twice; they are logged by name")
    if len(weights) != len(names):
        raise ValueError(f"--reward_weights {options.reward_weights!r} has {len(weights)} numbers for {len(names)} "
                         f"rewards, {options.reward_funcs}: give one weight for each")
    for name in names:
        path, colon, _ = name.rpartition(":")
        if name not in BUILT_IN and not (colon and path.endswith(".py")):
            raise ValueError(f"--reward_funcs {name!r}: choose among {', '.join(BUILT_IN)}, path/to/file.py:function")
        if colon and not Path(path).is_file():
            raise ValueError(f"--reward_funcs {name!r}: there is no file {path}")
    for key, allowed in {"answer_scope": ("full", "before_think_end"), "length_unit": ("tokens", "chars"),
                         "length_scope": ("group", "local_batch")}.items():
        if getattr(options, key) not in allowed:
            raise ValueError(f"--{key} {getattr(options, key)!r}: choose one of {', '.join(allowed)}")
    for key in ("cosine_max_length", "length_prompts", "repetition_ngram_size", "soft_overlong_cache", "reward_timeout",
                "reward_workers", "reward_memory_gb"):
        if not getattr(options, key) > 0:
            raise ValueError(f"--{key} {getattr(options, key)} must be above 0")
    return list(zip(names, weights, strict=True))


def format_reward(text, strict=True):
    r"""
    1.0 if a box stands before `</think>`, else 0.0. Linear whatever the text, where the recipe's regular expression
    `^.*?oxed{(.*?)}.*?</think>.*?$` needs 12 s for a looping completion of 16,000 characters.

    strict: a balanced, non-empty \boxed{...} before the first `</think>`, so that quoting "\boxed{}" earns nothing;
    False: exactly the verdict of that expression, Fast-Math-R1's format2.
    """
    if strict:
        return float("</think>" in text and extract_answer(text, "before_think_end") is not None)
    opened = text.find("oxed{")
    closed = text.find("}", opened + 5) if opened >= 0 else -1
    return float(closed >= 0 and text.find("</think>", closed + 1) >= 0)


def format_open_rs_reward(text):
    r"""1.0 if "\n</think>\n" occurs exactly once (Open-RS; nothing checks the <answer> tags its prompt asks for)."""
    return float(text.count("\n</think>\n") == 1)


def cosine_reward(length, correct, max_length=9600, correct_at_0=1.0, correct_at_max=0.1, wrong_at_0=-1.0,
                  wrong_at_max=-0.1, clip=True):
    """
    Cosine schedule from the value at length 0 to the value at max_length (arXiv 2502.03373, Fast-Math-R1, Open-RS):

        r = r_max + (r_0 - r_max) (1 + cos(pi p)) / 2,   p = min(1, length / max_length)

    length and max_length in one unit. Named by where they hold, not by min and max: swapping those is how longer wrong
    answers came to be punished more in one recipe and less in the other. Without clip the schedule is periodic.
    """
    start, end = (correct_at_0, correct_at_max) if correct else (wrong_at_0, wrong_at_max)
    progress = length / max_length
    if clip:
        progress = min(1.0, progress)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def length_rewards(lengths, correct, length_range=None):
    """
    Kimi k1.5's length reward (arXiv 2501.12599, section 2.3.3) of the answers to one problem -> list of floats.

        lambda = 1/2 - (length - shortest) / (longest - shortest);  right: lambda;  wrong: min(0, lambda);  all equal: 0

    lengths: G numbers; correct: G bools; length_range: (shortest, longest) when they are not those of `lengths`, as in
    Fast-Math-R1's code, where they span two problems and so punish the harder one.
    """
    shortest, longest = length_range or (min(lengths, default=0), max(lengths, default=0))
    if longest == shortest:
        return [0.0] * len(lengths)
    shares = [0.5 - (length - shortest) / (longest - shortest) for length in lengths]
    return [share if right else min(0.0, share) for share, right in zip(shares, correct, strict=True)]


def repetition_penalty(text_or_ids, ngram_size=3, max_penalty=-1.0):
    """(1 - unique / all) * max_penalty over the n-grams of words (of a string) or of token ids; 0 if there are none."""
    units = text_or_ids.lower().split() if isinstance(text_or_ids, str) else list(text_or_ids)
    total = len(units) - ngram_size + 1
    if total < 1:
        return 0.0
    unique = len(set(zip(*(units[i:] for i in range(ngram_size)), strict=False)))
    return (1 - unique / total) * max_penalty


def soft_overlong_penalty(length, max_length=16384, cache=4096):
    """DAPO (arXiv 2503.14476, eq. 13): 0 up to max_length - cache tokens, falling to -1 at max_length, -1 beyond."""
    return max(-1.0, min(0.0, (max_length - cache - length) / cache))


def grade(completion, gold, scope="full", swap_verify=False):
    """"right", "wrong" or "no_answer" for one completion."""
    answer = extract_answer(completion, scope)
    if answer is None:
        return "no_answer"
    return "right" if (is_equal(gold, answer) if swap_verify else is_equal(answer, gold)) else "wrong"


def score_batch(completions, golds, scope="full", function=None, timeout=10.0, workers=2, memory_gb=4.0):
    """
    (outcomes, Counter of outcomes) of completions against gold answers, in order.

    outcomes: right | wrong | no_answer; with a user's `function` ("file.py:name", see WorkerPool) right (its value is
    above 0) | wrong | timeout | crash.
    """
    if len(completions) != len(golds):
        raise ValueError(f"{len(completions)} completions for {len(golds)} gold answers")
    if function is None:
        outcomes = [grade(completion, gold, scope) for completion, gold in zip(completions, golds, strict=True)]
    else:
        with WorkerPool(function, workers, timeout, memory_gb) as pool:
            outcomes = [outcome if outcome != "done" else "right" if value > 0 else "wrong"
                        for outcome, value in pool.map(list(zip(completions, golds, strict=True)))]
    return outcomes, Counter(outcomes)


def rewards_for_group(texts, gold, options, *, lengths, truncated):
    """
    Score the G completions of one prompt -> RewardedGroup.

    texts: G strings; gold: the gold answer; options: RewardOptions (or a dataclass that inherits it); lengths: G token
    counts; truncated: G bools, True if cut off at the limit. With length_scope local_batch call
    rescore_length_over_batch once all groups of the step are there.
    """
    outcomes, correct = judge(texts, gold, options)
    units = [len(text) for text in texts] if options.length_unit == "chars" else list(lengths)
    parts = {}
    for name, _ in check_reward_options(options):
        if name in NEED_CORRECT:
            values = correctness_part(name, correct, units, truncated, options)
        elif name == "format":
            values = [format_reward(text, options.format_strict) for text in texts]
        elif name == "format_open_rs":
            values = [format_open_rs_reward(text) for text in texts]
        elif name == "repetition":
            size, most = options.repetition_ngram_size, options.repetition_max_penalty
            values = [repetition_penalty(text, size, most) for text in texts]
        elif name == "soft_overlong":
            longest, cache = options.max_completion_length, options.soft_overlong_cache
            values = [soft_overlong_penalty(length, longest, cache) for length in lengths]
        else:
            values = user_part(name, texts, gold, outcomes, options)
        parts[part_name(name)] = values
    return RewardedGroup(parts, weighted_totals(parts, correct, options), outcomes, correct, units)


def judge(texts, gold, options):
    """(outcomes, correct) of completions against one gold answer; correct is None where that cannot be read."""
    if gold_answer(gold) is not None:
        outcomes = [grade(text, gold, options.answer_scope, options.swap_verify) for text in texts]
        return outcomes, [outcome == "right" for outcome in outcomes]
    correct = None if options.bad_gold_reward is None else options.bad_gold_reward > 0
    return ["bad_gold"] * len(texts), [correct] * len(texts)


def part_name(name):
    """Key of a reward in RewardedGroup.parts and in the logs: its name, of a user's file.py:function the function's."""
    return name.rpartition(":")[2]


def correctness_part(name, correct, lengths, truncated, options, length_range=None):
    """The rewards that depend on correctness; nan for a group without a readable gold answer."""
    if None in correct:
        return [math.nan] * len(correct)
    if name == "accuracy":
        return [float(c) for c in correct]
    if name == "length":
        return length_rewards(lengths, correct, length_range)
    schedule = (options.cosine_max_length, options.cosine_correct_at_0, options.cosine_correct_at_max,
                options.cosine_wrong_at_0, options.cosine_wrong_at_max, options.cosine_clip)
    return [options.cosine_truncated if cut and options.cosine_truncated is not None else cosine_reward(n, c, *schedule)
            for n, c, cut in zip(lengths, correct, truncated, strict=True)]


def user_part(name, texts, gold, outcomes, options):
    """A user's own reward; a late or broken call earns 0 and shows as outcome timeout or crash."""
    pool = shared_pool(name, options.reward_workers, options.reward_timeout, options.reward_memory_gb)
    values = []
    for i, (outcome, value) in enumerate(pool.map([(text, gold) for text in texts])):
        if outcome != "done":
            outcomes[i] = outcome
        values.append(value if outcome == "done" else 0.0)
    return values


def weighted_totals(parts, correct, options):
    """sum over k of w_k * part_k, G floats; nan where correctness is unknown: the trainer leaves such a group out."""
    weights = [weight for _, weight in check_reward_options(options)]
    return [math.nan if c is None else sum(w * v for w, v in zip(weights, values, strict=True))
            for c, values in zip(correct, zip(*parts.values(), strict=True), strict=True)]


def rescore_length_over_batch(scored, options):
    """
    length_scope local_batch (oddity 2): shortest and longest over length_prompts consecutive groups, in place.

    scored: list of RewardedGroup in the order of the prompts.
    """
    if options.length_scope != "local_batch" or all("length" not in s.parts for s in scored):
        return
    for start in range(0, len(scored), options.length_prompts):
        chunk = scored[start:start + options.length_prompts]
        lengths = [n for s in chunk for n in s.lengths]
        for s in chunk:
            ends = min(lengths), max(lengths)
            s.parts["length"] = correctness_part("length", s.correct, s.lengths, None, options, ends)
            s.totals = weighted_totals(s.parts, s.correct, options)


# ---------------------------------------------------------------------------------------------------------------------
# 8. Workers that can be killed, for functions we did not write
# ---------------------------------------------------------------------------------------------------------------------

START_SECONDS = 120  # to import the user's file
MAX_REPLY = 1 << 20


class WorkerPool:
    """
    A user's reward function, "path/to/file.py:name", in processes of its own:  name(completion, answer) -> number.

    One thread per process owns it: it hands over one item, waits `timeout` seconds from then, and if nothing came kills
    the process group with SIGKILL and starts another. Signals (SIGALRM) work only in a main thread and not inside C
    code, and the timeouts of thread and process pools only stop waiting: the stuck worker stays. The processes are
    started afresh, not forked (a fork of a process with torch's threads may hang), see no GPU, have `memory_gb` of
    address space, and die with the owning thread (PR_SET_PDEATHSIG), so that a killed trainer leaves none behind.
    """

    def __init__(self, function, workers=2, timeout=10.0, memory_gb=4.0):
        path, _, name = function.rpartition(":")
        if not Path(path).is_file() or not name:
            raise ValueError(f"reward function {function!r}: expected path/to/file.py:function, and the file to exist")
        self.function, self.timeout, self.memory_gb = f"{Path(path).resolve()}:{name}", timeout, memory_gb
        self.items, self.closed, self.complaint, self.lock = queue.Queue(), threading.Event(), None, threading.Lock()
        self.threads = [threading.Thread(target=self.serve, daemon=True) for _ in range(workers)]
        for thread in self.threads:
            thread.start()

    def map(self, pairs):
        """[(outcome, value)] of (completion, answer) pairs in order: ("done", number), ("timeout" or "crash", None)."""
        if self.closed.is_set():
            raise RuntimeError("the worker pool is closed")
        results = queue.Queue()
        for i, pair in enumerate(pairs):
            self.items.put((i, pair, results))
        found = [None] * len(pairs)
        limit = time.monotonic() + (len(pairs) / len(self.threads) + 1) * (self.timeout + START_SECONDS)
        for _ in pairs:
            try:
                i, outcome, value = results.get(timeout=max(0.0, limit - time.monotonic()))
            except queue.Empty:
                raise RuntimeError(f"the workers of {self.function} fell silent; was the machine asleep?") from None
            found[i] = (outcome, value)
        return found

    def serve(self):
        """One thread: the life of one worker process after the other."""
        worker = None
        try:
            while not self.closed.is_set():
                try:
                    i, pair, results = self.items.get(timeout=0.2)
                except queue.Empty:
                    continue
                outcome, value = "crash", None
                for last_try in (False, True):  # killed from outside? a fresh worker tries again
                    try:
                        if worker is None or worker.process.poll() is not None:
                            worker = Worker(self.function, self.memory_gb)
                        reply = worker.ask(pair, self.timeout)
                        if "value" in reply:
                            outcome, value = "done", reply["value"]
                        else:
                            self.complain(reply["error"])
                        break
                    except TimeoutError:
                        outcome, worker = "timeout", worker.kill()
                        break
                    except (OSError, ValueError, EOFError) as error:  # it died, or answered what is no JSON
                        worker = worker.kill() if worker else None
                        if last_try:
                            self.complain(repr(error))
                results.put((i, outcome, value))
        finally:
            if worker:
                worker.kill()

    def complain(self, message):
        """The first error is shown; all of them are counted as crashes."""
        with self.lock:
            if self.complaint is None:
                self.complaint = message
                print(f"rewards: {self.function} failed, counted as crash; further errors are not shown: {message}",
                      file=sys.stderr, flush=True)

    def close(self):
        self.closed.set()
        for thread in self.threads:
            thread.join(timeout=self.timeout + 10)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Worker:
    """One process, spoken to in lines of JSON over a socket; whatever it prints stays out of the way."""

    def __init__(self, function, memory_gb):
        self.socket, theirs = socket.socketpair()
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        arguments = [function, str(theirs.fileno()), str(memory_gb), str(os.getpid())]
        try:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--worker", *arguments], pass_fds=[theirs.fileno()], start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment)
        finally:
            theirs.close()
        self.buffer = b""
        try:
            ready = self.receive(START_SECONDS)
        except (OSError, EOFError) as error:
            self.kill()
            raise OSError(f"the worker did not start: {error}") from error
        if "error" in ready:
            self.kill()
            raise OSError(ready["error"])

    def ask(self, pair, timeout):
        end = time.monotonic() + timeout
        self.socket.settimeout(timeout)
        self.socket.sendall(json.dumps(pair).encode() + b"\n")
        return self.receive(max(0.001, end - time.monotonic()))

    def receive(self, timeout):
        end = time.monotonic() + timeout
        while b"\n" not in self.buffer:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self.socket.settimeout(left)
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError(f"the worker died (exit status {self.process.poll()})")
            self.buffer += data
            if len(self.buffer) > MAX_REPLY:
                raise ValueError("a reply of more than 1 MB")
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def kill(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it is gone already
        self.process.wait()
        self.socket.close()


POOLS, POOLS_LOCK = {}, threading.Lock()


def shared_pool(*arguments):
    """One pool per function and limits, kept for the life of the process."""
    with POOLS_LOCK:
        if arguments not in POOLS:
            POOLS[arguments] = WorkerPool(*arguments)
        return POOLS[arguments]


def work(function, descriptor, memory_gb, parent):
    """The main loop of a worker process."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: die with the thread that started us
    if os.getppid() != parent:
        sys.exit(1)  # it died before we asked
    resource.setrlimit(resource.RLIMIT_AS, (int(memory_gb * 2**30),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    line = socket.socket(fileno=descriptor)
    lines = line.makefile("rb")

    def reply(**message):
        line.sendall(json.dumps(message).encode() + b"\n")

    path, _, name = function.rpartition(":")
    try:
        sys.path.insert(0, str(Path(path).parent))
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        call = getattr(module, name)
    except Exception as error:  # noqa: BLE001 - whatever a user's file raises is told to the trainer, which counts and shows it
        reply(error=f"importing {function}: {error!r}")
        return
    reply(ready=True)
    for item in lines:
        try:
            value = float(call(*json.loads(item)))
            if not math.isfinite(value):
                raise ValueError(f"the reward {value} is not finite")
        except Exception as error:  # noqa: BLE001 - as above; the next item gets its chance
            reply(error=repr(error)[:2000])
        else:
            reply(value=value)


# ---------------------------------------------------------------------------------------------------------------------
# 9. Grading a finished run again
# ---------------------------------------------------------------------------------------------------------------------


def read_rollouts(folder):
    """(rows, torn): a run's stored completions in order, and how many lines could not be read (killed in mid-write)."""
    rows, torn = [], 0
    for path in sorted(Path(folder).glob("step-*.jsonl")):
        with open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                    row["text"], row["answer"], row["rewards"], row["length"]  # what is needed below
                except (ValueError, KeyError, TypeError):
                    torn += 1
                else:
                    rows.append(row)
    return rows, torn


def regrade(run, output=None):
    """
    Score a run's completions with today's grader: correctness and the rewards that depend on it; others stay as stored.

    Reads RUN/config.json and RUN/rollouts/step-*.jsonl. Prints a table of the flips and counts. Writes the new rows to
    `output` (JSONL) if given, and nothing else. Returns the number of flips.
    """
    run = Path(run)
    if not (run / "config.json").is_file() or not (run / "rollouts").is_dir():
        raise SystemExit(f"{run} has no config.json and rollouts/: name a run directory of train_grpo.py")
    config = json.loads((run / "config.json").read_text())
    known = {field.name for field in dataclasses.fields(RewardOptions)}
    options = RewardOptions(**{key: value for key, value in config.items() if key in known})
    rows, torn = read_rollouts(run / "rollouts")
    groups = {}
    for row in rows:
        groups.setdefault((row.get("step"), row.get("prompt_index")), []).append(row)
    steps = {}
    for (step, _), members in groups.items():
        steps.setdefault(step, []).append((members, regrade_group(members, options)))
    for scored_groups in steps.values():
        rescore_length_over_batch([scored for _, scored in scored_groups], options)
    flips, regraded = [], []
    for members, scored in (pair for scored_groups in steps.values() for pair in scored_groups):
        for i, row in enumerate(members):
            new = {**row, "correct": scored.correct[i], "outcome": scored.outcomes[i], "reward": scored.totals[i],
                   "rewards": {name: values[i] for name, values in scored.parts.items()}}
            regraded.append(new)
            if row.get("correct") != new["correct"]:
                flips.append((row, new))
    if flips:
        print(f"{'step':>6} {'prompt':>6} {'sample':>6}  {'stored':<10} {'now':<10} {'reward':>16}  gold | answer")
    for old, new in flips:
        place = " ".join(f"{old.get(key, '?'):>6}" for key in ("step", "prompt_index", "sample_index"))
        print(f"{place}  {old.get('outcome', '?')!s:<10} {new['outcome']:<10} {old.get('reward', math.nan):>6.2f} -> "
              f"{new['reward']:>6.2f}  {old['answer']} | {extract_answer(old['text'], options.answer_scope)}")
    outcomes, now = Counter(row["outcome"] for row in regraded), Counter(new["correct"] for _, new in flips)
    print(f"{len(regraded)} completions in {len(groups)} groups: " +
          ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())))
    print(f"{len(flips)} flips: {now[True]} to right, {now[False]} to wrong, {now[None]} to unknown; "
          f"{torn} torn lines skipped")
    if output:
        temporary = Path(f"{output}.{os.getpid()}.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in regraded))
        os.replace(temporary, output)
        print(f"wrote {output}")
    return len(flips)


def regrade_group(rows, options):
    """RewardedGroup of one group's stored rows; a part that does not depend on correctness stays as stored."""
    lengths = [len(row["text"]) if options.length_unit == "chars" else row["length"] for row in rows]
    outcomes, correct = judge([row["text"] for row in rows], rows[0]["answer"], options)
    outcomes = [row["outcome"] if row.get("outcome") in ("timeout", "crash") else now
                for row, now in zip(rows, outcomes, strict=True)]
    truncated = [row.get("finish_reason") == "length" for row in rows]
    parts = {}
    for name, _ in check_reward_options(options):
        key = part_name(name)
        parts[key] = (correctness_part(name, correct, lengths, truncated, options) if name in NEED_CORRECT
                      else [row["rewards"].get(key, math.nan) for row in rows])
    return RewardedGroup(parts, weighted_totals(parts, correct, options), outcomes, correct, lengths)


def main():
    if sys.argv[1:2] == ["--worker"]:
        function, descriptor, memory_gb, parent = sys.argv[2:]
        return work(function, int(descriptor), float(memory_gb), int(parent))
    parser = argparse.ArgumentParser(description="Rewards for mathematics; see the head of this file.")
    commands = parser.add_subparsers(dest="command", required=True)
    again = commands.add_parser("regrade", help="Score a run's completions with today's grader and list the flips.")
    again.add_argument("run", help="Run directory of train_grpo.py.")
    again.add_argument("--output", help="Write the rows with their new rewards to this JSONL file.")
    arguments = parser.parse_args()
    return regrade(arguments.run, arguments.output)


if __name__ == "__main__":
    main()
