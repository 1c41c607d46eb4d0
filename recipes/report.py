"""
One self-contained HTML page about a run: its curves, and the rollouts of one step group by group.

    python recipes/report.py runs/NAME [--step N] [--output FILE]

    curves      every metric of metrics.jsonl that PANELS names; a run in progress will do
    overview    all groups of the step: each answer's reward beside the mean it is compared with
    groups      most mixed, best, worst, collapsed: problem, gold, answers, reward parts, advantage
    tokens      coloured by the update, by the update of the logit, or by the sampler-trainer gap

The page has no script at all: groups unfold as <details>, the colour switch is CSS. Text from
models and data is escaped, and a Content-Security-Policy forbids whatever might slip through. The
page stays below MAX_BYTES: long answers lose their middle, and the page says how much.
"""

import argparse
import base64
import hashlib
import html
import json
import math
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import load_tokenizer, read_jsonl  # noqa: E402

MAX_BYTES = 400_000
MAX_POINTS = 200  # per curve; longer runs are averaged over equal stretches
MAX_ANSWERS = 8  # per group
MAX_GROUPS_IN_OVERVIEW = 64
TOKENS_PER_ANSWER = (1200, 600, 300, 150, 75, 40)  # tried in turn until the page is small enough

PANELS = [  # title, metrics; a metric ending in * means every other one with that start
    ("Reward and its parts", ["reward/total", "reward/*"]),
    ("Share of answers", ["completions/correct", "completions/truncated", "eval/pass@1"]),
    ("Tokens per answer", ["completions/mean_length", "eval/mean_length"]),
    ("Loss", ["loss", "eval/loss"]),
    ("Entropy in nats per token", ["update/entropy", "entropy"]),
    ("KL to the starting model, per token", ["update/kl"]),
    ("Gap between sampler and trainer", ["rollout/logprob_gap", "sync/logprob_gap"]),
    ("Rewards within a group", ["reward/std_within_group", "reward/groups_of_equal_rewards"]),
    ("Seconds per step, by phase", ["time/step", "time/*"]),
    ("Share of clipped tokens", ["update/clip_low", "update/clip_high"]),
    ("Gradient norm", ["grad_norm"]),
    ("Learning rate", ["lr"]),
    ("Tokens per second", ["tokens_per_second", "rollout/tokens_per_second"]),
    ("Peak memory in GB", ["peak_memory_gb"]),
]
PANELS_AT_FIRST = 9  # those after them are folded
NOT_A_PART = {"reward/std_within_group", "reward/groups_of_equal_rewards",  # not parts of a reward
              "time/rewards", "time/rollout_wait"}  # within the time of the rollout
SHARE_LEVELS = (0.02, 0.1, 0.3, 0.6)  # of the largest update in the step: where a shade begins
GAP_LEVELS = (0.01, 0.05, 0.2, 0.7)  # nats: 0.01 is 1% of the probability, 0.7 a factor of 2


# --------------------------------------------------------------------------------------------------
# Text and numbers
# --------------------------------------------------------------------------------------------------
def escaped(text):
    r"""HTML of any text: markup escaped; control characters and lone surrogates as \uXXXX."""
    kept = "\n\t"
    return html.escape("".join(
        c if c.isprintable() or c in kept else f"\\u{ord(c):04x}" for c in str(text)))


def number(x):
    """About three significant digits for people: 1.42, 12.3k, 4.0e-6."""
    if not is_number(x):
        return "none"
    if 0 < abs(x) < 1e-3:
        mantissa, exponent = f"{x:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if abs(x) >= 1e4:
        return f"{x / 1e6:.3g}M" if abs(x) >= 1e6 else f"{x / 1e3:.3g}k"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def shortened(text, most):
    """At most `most` characters of a text, and how many are missing."""
    return text if len(text) <= most else f"{text[:most]} … {len(text) - most:,} more characters"


def is_number(x):
    return isinstance(x, (int, float)) and math.isfinite(x)


# --------------------------------------------------------------------------------------------------
# Curves
# --------------------------------------------------------------------------------------------------
def panel_metrics(names, rows):
    """The metrics of a panel that this run has, in the panel's order, then sorted."""
    present = sorted({key for row in rows for key, x in row.items() if is_number(x)} - NOT_A_PART)
    found = []
    for name in names:
        matches = [k for k in present if k.startswith(name[:-1])] if name[-1] == "*" else [name]
        found += [k for k in matches if k not in found]
    return [k for k in found if any(is_number(row.get(k)) for row in rows)]


def averaged(points):
    """At most MAX_POINTS points: the means over equally long stretches."""
    size = math.ceil(len(points) / MAX_POINTS)
    stretches = [points[i:i + size] for i in range(0, len(points), size)]
    return [tuple(map(statistics.fmean, zip(*stretch, strict=True))) for stretch in stretches]


def ticks(low, high):
    """Two to five round numbers within [low, high]."""
    power = 10 ** math.floor(math.log10((high - low) / 2))
    step = max(m * power for m in (1, 2, 5) if m * power <= (high - low) / 2)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def value_range(values):
    """(low, high) of an axis: from 0 unless all values are far from it; never empty."""
    low, high = min(values), max(values)
    if 0 < low < 0.6 * high:
        low = 0.0
    margin = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return low if low == 0 else low - margin, high + margin


def chart(title, curves, width=372, height=150):
    """A titled SVG of curves {metric: [(step, value)]}; its legend gives every last value."""
    first = min(points[0][0] for points in curves.values())
    last = max(points[-1][0] for points in curves.values())
    smooth = {name: averaged(points) for name, points in curves.items()}
    low, high = value_range([y for points in smooth.values() for _, y in points])
    left, right, top, bottom = 46, width - 6, 6, height - 18

    def across(step):
        share = (step - first) / (last - first) if last > first else 0.5
        return round(left + (right - left) * share, 1)

    def down(value):
        return round(bottom - (bottom - top) * (value - low) / (high - low), 1)

    svg, legend = [], []
    for y in ticks(low, high):
        svg.append(f'<path class="grid" d="M{left},{down(y)}H{right}"/>'
                   f'<text x="{left - 5}" y="{down(y)}" dy="4" class="y">{number(y)}</text>')
    svg.append(f'<text x="{left}" y="{height - 4}">{first:,.0f}</text>'
               f'<text x="{right}" y="{height - 4}" class="y">step {last:,.0f}</text>')
    for i, (name, points) in enumerate(smooth.items()):
        places = [(across(x), down(y)) for x, y in points]
        line = " ".join(f"{x},{y}" for x, y in places)
        svg.append(f'<polyline class="s{i % 8}" points="{line}"/>')
        if len(points) <= 40:
            svg += [f'<circle class="f{i % 8}" cx="{x}" cy="{y}" r="2"/>' for x, y in places]
        legend.append(f'<span class="t{i % 8}">{escaped(name.removeprefix("time/"))} '
                      f'<b>{number(curves[name][-1][1])}</b></span>')
    return (f'<figure><figcaption>{title}<div class="key">{"".join(legend)}</div></figcaption>'
            f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(svg)}</svg></figure>')


def charts(rows):
    """The panels that this run has numbers for, unless all are 0; the first of them unfolded."""
    figures = []
    for title, names in PANELS:
        curves = {name: [(row["step"], row[name]) for row in rows if is_number(row.get(name))]
                  for name in panel_metrics(names, rows)}
        if any(y for points in curves.values() for _, y in points):
            figures.append(chart(title, curves))
    shown, folded = figures[:PANELS_AT_FIRST], figures[PANELS_AT_FIRST:]
    more = f"""<details><summary><span>{len(folded)} more curves</span></summary>
<div class="charts">{"".join(folded)}</div></details>""" if folded else ""
    return f'<div class="charts">{"".join(shown)}</div>{more}'


def stat_line(rows, config):
    """Steps, then first -> last of what a reader looks for first."""
    wanted = [("reward", "reward/total"), ("correct", "completions/correct"),
              ("tokens per answer", "completions/mean_length"), ("loss", "loss"),
              ("entropy", "update/entropy"), ("entropy", "entropy"), ("held-out loss", "eval/loss"),
              ("held-out pass@1", "eval/pass@1"), ("seconds per step", "time/step")]
    total = config.get("max_steps", -1)
    steps = f"{rows[-1]['step']:,}" + (f" of {total:,}" if total > rows[-1]["step"] else "")
    stats = [("steps", steps)]
    for label, name in wanted:
        values = [row[name] for row in rows if is_number(row.get(name))]
        if values and not (name == "loss" and "reward/total" in rows[0]):
            stats.append((label, f"{number(values[0])} <i>→</i> {number(values[-1])}"))
    return "".join(f"<div><b>{value}</b>{label}</div>" for label, value in stats)


# --------------------------------------------------------------------------------------------------
# Groups
# --------------------------------------------------------------------------------------------------
@dataclass
class Group:
    """The answers to one problem, best advantage first."""
    index: int
    answers: list

    def __post_init__(self):
        rewards = [a["reward"] for a in self.answers if is_number(a["reward"])]
        self.mean = statistics.fmean(rewards) if rewards else math.nan
        self.std = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
        self.collapsed = len(set(rewards)) <= 1  # equal rewards: every advantage is 0
        self.right = sum(a["outcome"] == "right" for a in self.answers)
        self.mixed = min(self.right, len(self.answers) - self.right), self.std


def read_groups(path):
    """The groups of a rollout file, in order of mean reward."""
    by_prompt = {}
    for answer in read_jsonl(path):
        by_prompt.setdefault(answer["prompt_index"], []).append(answer)
    groups = [Group(index, sorted(answers, key=lambda a: -a["advantage"]))
              for index, answers in by_prompt.items()]
    return sorted(groups, key=lambda g: (g.mean if is_number(g.mean) else -math.inf, g.index))


def choose_groups(groups):
    """[(labels, group)]: most mixed, best, worst and one collapsed; a group may have two labels."""
    picks = [("most mixed", max(groups, key=lambda g: g.mixed)), ("best", groups[-1]),
             ("worst", groups[0])]
    taken = [g for _, g in picks]
    # rather one that is not shown yet, and one with right answers says more than one without
    collapsed = sorted((g for g in groups if g.collapsed), key=lambda g: (g in taken, -g.right))
    picks += [("collapsed", g) for g in collapsed[:1]]
    labels = {}
    for label, group in picks:
        labels.setdefault(group.index, ([], group))[0].append(label)
    return list(labels.values())


def overview(groups, chosen, width=1140, height=190):
    """An SVG with a column per group: its answers' rewards as dots, and their mean."""
    names = {group.index: " + ".join(labels) for labels, group in chosen}
    ranked = [g for g in groups if is_number(g.mean)]
    size = math.ceil(len(ranked) / MAX_GROUPS_IN_OVERVIEW)
    shown = [g for i, g in enumerate(ranked) if i % size == 0 or g.index in names]
    if not shown:
        return ""  # no answer of this step has a reward
    rewards = [a["reward"] for g in shown for a in g.answers if is_number(a["reward"])]
    low, high = value_range(rewards)
    left, top, bottom = 42, 24, height - 8
    column = (width - left) / len(shown)

    def at(y):
        return f"{bottom - (bottom - top) * (y - low) / (high - low):.1f}"

    svg = [f'<path class="grid" d="M{left},{at(y)}H{width}"/>'
           f'<text x="{left - 5}" y="{at(y)}" dy="4" class="y">{number(y)}</text>'
           for y in ticks(low, high)]
    for i, group in enumerate(shown):
        middle = left + column * (i + 0.5)
        half = min(column * 0.38, 26)
        spread = [a for a in group.answers if is_number(a["reward"])]
        dots = []
        for j, answer in enumerate(spread):
            x = middle + half * 0.8 * (2 * (j + 0.5) / len(spread) - 1)
            kind = "right" if answer["outcome"] == "right" else "wrong"
            dots.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{at(answer["reward"])}" r="3"/>')
        mean = f'<path class="mean" d="M{middle - half:.1f},{at(group.mean)}h{2 * half:.1f}"/>'
        name = names.get(group.index)
        if name:
            svg.append(f'<a href="#group-{group.index}"><text x="{middle:.1f}" y="13" '
                       f'class="name">{name}</text>{mean}{"".join(dots)}</a>')
        else:
            svg.append(mean + "".join(dots))
    return f'<svg class="overview" viewBox="0 0 {width} {height}" role="img">{"".join(svg)}</svg>'


# --------------------------------------------------------------------------------------------------
# Answers and their tokens
# --------------------------------------------------------------------------------------------------
def token_texts(tokenizer, ids):
    """The text of every token; a character of several tokens belongs to its last one."""
    texts, start = [], 0
    for end in range(1, len(ids) + 1):
        # With one token before it, a word keeps the space that some tokenizers drop at the start.
        before = tokenizer.decode(ids[max(0, start - 1):start])
        text = tokenizer.decode(ids[max(0, start - 1):end])[len(before):]
        unfinished = text.endswith("\ufffd") and end - start < 4 and end < len(ids)
        texts.append("" if unfinished else text)
        start = start if unfinished else end
    return texts


def has_token_data(answer):
    return all(key in answer for key in ("weight", "logprobs", "rollout_logprobs"))


def update_of(answer, cap):
    """
    [(update, update of the logit, gap)] of every token.

    update is advantage x weight, and that is m_i times w_t as in the loss of train_grpo.py. The
    gradient reaches a token's own logit times 1 - p. Clip and KL term are left out.
    """
    values = []
    for trainer, sampler in zip(answer["logprobs"], answer["rollout_logprobs"], strict=True):
        gap = trainer - sampler
        rollout_weight = min(math.exp(min(gap, 50)), cap) if cap else 1.0
        update = answer["advantage"] * answer["weight"] * rollout_weight
        values.append((update, update * (1 - math.exp(min(trainer, 0))), gap))
    return values


def level(value, bounds):
    """The shade of a value, -4 ... 4: how many of the bounds it reaches, with its sign."""
    return int(math.copysign(sum(abs(value) >= bound for bound in bounds), value))


def coloured_tokens(answer, texts, values, largest, positions):
    """HTML of some tokens of an answer; neighbours of the same shades share an element."""
    parts = []  # [classes, title, text]
    for i, text in zip(positions, texts, strict=True):
        update, logit, gap = values[i]
        shades = {"u": level(update / largest, SHARE_LEVELS),
                  "l": level(logit / largest, SHARE_LEVELS), "g": level(gap, GAP_LEVELS)}
        classes = " ".join(f"{letter}{shade}" for letter, shade in shades.items() if shade)
        title = ""
        if shades["l"] or shades["g"]:
            title = f"p {math.exp(answer['logprobs'][i]):.2g}, gap {gap:+.3f}"
            title += f", entropy {answer['entropy'][i]:.2f}" if "entropy" in answer else ""
        text = escaped(text).replace("\n", "↵\n")
        if parts and not title and parts[-1][:2] == [classes, ""]:
            parts[-1][2] += text
        else:
            parts.append([classes, title, text])
    return "".join(f'<i class="{classes}" title="{title}">{text}</i>' if title
                   else f'<i class="{classes}">{text}</i>' for classes, title, text in parts)


def answer_text(answer, tokenizer, cap, largest, budget):
    """
    An answer as <pre>; beyond `budget` tokens its middle is left out.

    Without tokenizer or per-token lists the whole text has one colour, that of the advantage.
    """
    coloured = tokenizer is not None and has_token_data(answer)
    if coloured:
        whole, unit, shade = answer["token_ids"], "tokens", 0
        values = update_of(answer, cap)
    else:
        whole, unit, budget = answer["text"], "characters", 4 * budget  # some 4 per token
        shade = level(answer["advantage"] / largest, SHARE_LEVELS)
    cut, head = len(whole) - budget, budget * 2 // 3
    spans = [(0, len(whole))] if cut <= 0 else [(0, head), (head + cut, len(whole))]
    pieces = []
    for start, end in spans:
        if coloured:
            texts = token_texts(tokenizer, whole[start:end])
            pieces.append(coloured_tokens(answer, texts, values, largest, range(start, end)))
        else:
            pieces.append(escaped(whole[start:end]))
    joint = f"<em>… {cut:,} {unit} are left out here …</em>"
    return f'<pre class="u{shade}">{joint.join(pieces)}</pre>'


def advantage_bar(advantage, scale):
    """A small bar to the right (reinforced) or to the left (discouraged)."""
    length = 40 * abs(advantage) / scale
    x = 42 if advantage >= 0 else 42 - length
    kind = "up" if advantage >= 0 else "down"
    return (f'<svg class="bar" viewBox="0 0 84 14"><rect class="{kind}" x="{x:.1f}" y="2" '
            f'width="{length:.1f}" height="10"/><path d="M42,0V14"/></svg>')


def answer_section(answer, copies, render, scale):
    """One answer: outcome, advantage, reward with its parts, length, and the text in colour."""
    kind = "right" if answer["outcome"] == "right" else "wrong"
    facts = [("advantage", f"{answer['advantage']:+.2f}"), ("reward", number(answer["reward"]))]
    facts += [(name, number(value)) for name, value in answer["rewards"].items()]
    facts += [("tokens", f"{answer['length']:,}")]
    facts = "".join(f"<span>{escaped(name)} <b>{value}</b></span>" for name, value in facts)
    times = f" × {copies}" if copies > 1 else ""
    cut = "<span>cut at the limit</span>" if answer["finish_reason"] == "length" else ""
    return (f'<section><header><mark class="{kind}">{escaped(answer["outcome"])}{times}</mark>'
            f'{advantage_bar(answer["advantage"], scale)}{facts}{cut}</header>{render(answer)}'
            "</section>")


def group_section(labels, group, is_open, render, scale):
    """A group as <details>: the problem, the gold answer, and its answers by advantage."""
    count = len(group.answers)
    copies = Counter((a["text"], a["advantage"]) for a in group.answers)
    kept = list({(a["text"], a["advantage"]): a for a in group.answers}.values())  # each once
    note = ""
    if len(kept) > MAX_ANSWERS:  # evenly over the ranks, best and worst included
        every = (len(kept) - 1) / (MAX_ANSWERS - 1)
        note = f"<p>{MAX_ANSWERS} of {len(kept)} different answers, evenly over the ranks.</p>"
        kept = [kept[round(i * every)] for i in range(MAX_ANSWERS)]
    if group.collapsed:
        note += "<p>All rewards are equal: every advantage is 0, the group teaches nothing.</p>"
    first = group.answers[0]
    problem = shortened(str(first["problem"]), 2000)
    facts = f"{group.right} of {count} right, reward {number(group.mean)} ± {number(group.std)}"
    heading = " ".join(problem.split())[:110]
    answers = "".join(answer_section(a, copies[a["text"], a["advantage"]], render, scale)
                      for a in kept)
    return f"""
<details id="group-{group.index}"{" open" if is_open else ""}>
<summary><strong>{" + ".join(labels)}</strong><span>{escaped(heading)}</span>
<small>{facts}</small></summary>
<div class="problem"><pre>{escaped(problem)}</pre>
<p>gold answer <b>{escaped(shortened(str(first["answer"]), 300))}</b></p></div>
{note}<div class="answers">{answers}</div>
</details>"""


# --------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------
SERIES = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#b8860b", "#56a0d3", "#777777", "#7a3b00")
UP, DOWN, TRAINER, SAMPLER = "0,114,178", "213,94,0", "120,60,170", "0,140,100"
SHADES = (0.0, 0.13, 0.28, 0.45, 0.65)
MODES = {  # id: letter, positive colour, negative colour, label of the switch, legend
    "update": ("u", UP, DOWN, "update", "advantage × weight: <b>blue</b> tokens become likelier, "
               "<b>orange</b> ones less likely; the darkest is the largest of this step"),
    "logit": ("l", UP, DOWN, "update of the logit", "advantage × weight × (1 − p): a token that "
              "was certain (p = 1) cannot become likelier, so the update acts at the others"),
    "gap": ("g", TRAINER, SAMPLER, "sampler-trainer gap", "log-prob by the trainer minus log-prob "
            "by the sampler: <b>violet</b> if the trainer finds the token likelier, <b>green</b> "
            "if the sampler does; shades begin at "
            + ", ".join(map(str, GAP_LEVELS)) + " nats"),
}


def style():
    rules = [CSS]
    for i, colour in enumerate(SERIES):
        rules.append(f".s{i}{{stroke:{colour}}}.f{i}{{fill:{colour}}}.t{i}{{color:{colour}}}")
    for mode, (letter, up, down, _, _) in MODES.items():
        scope = f"body:has(#by-{mode}:checked)"
        for n in range(1, 5):
            rules.append(f"{scope} .{letter}{n}{{background:rgba({up},{SHADES[n]})}}"
                         f"{scope} .{letter}-{n}{{background:rgba({down},{SHADES[n]})}}")
        rules.append(f"{scope} .legend .{mode}{{display:block}}")
    return "\n".join(rules)


CSS = """
:root { font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: #1d232b;
  background: #fff; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
body { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 40px 0 4px; }
p { margin: 4px 0 10px; color: #56606b; max-width: 104ch; }
.stats { display: flex; flex-wrap: wrap; gap: 10px 34px; margin: 18px 0 8px; padding: 14px 0;
  border: solid #dfe3e8; border-width: 1px 0; }
.stats div { color: #67717d; font-size: 13px; }
.stats b { display: block; font-size: 20px; font-weight: 600; color: #1d232b; }
.stats i { font-style: normal; color: #9aa3ad; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr));
  gap: 22px 24px; }
figure { margin: 0; break-inside: avoid; display: flex; flex-direction: column;
  justify-content: space-between; }
figcaption { font-weight: 600; font-size: 14px; }
.key { font-weight: 400; font-size: 12px; display: flex; flex-wrap: wrap; gap: 0 12px; }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 11px; fill: #67717d; } svg .y { text-anchor: end; }
.grid { stroke: #e6e9ed; } polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.overview .name { text-anchor: middle; fill: #0b5c92; font-weight: 600; }
.overview .right { fill: #0072b2; } .overview .wrong { fill: #fff; stroke: #d55e00; }
circle.wrong { stroke-width: 1.4; } .mean { stroke: #1d232b; stroke-width: 1.5; }
.legend { position: sticky; top: 0; background: #fff; padding: 10px 0; z-index: 1;
  border-bottom: 1px solid #dfe3e8; font-size: 13px; }
.legend label { margin-right: 16px; } .legend input { margin: 0 5px 0 0; }
.legend div { display: none; color: #56606b; } .legend i { font-style: normal; padding: 1px 9px; }
.charts + details { margin-top: 16px; } summary + .charts { margin-top: 12px; }
details { border-bottom: 1px solid #dfe3e8; padding: 10px 0; }
summary { cursor: pointer; display: flex; gap: 14px; align-items: baseline; }
summary::before { content: "▸"; color: #67717d; } details[open] > summary::before { content: "▾"; }
summary strong { white-space: nowrap; color: #0b5c92; }
summary span { flex: 1; overflow: hidden; white-space: nowrap; text-overflow: ellipsis; }
summary small { white-space: nowrap; color: #67717d; }
.problem { margin: 10px 0; padding-left: 14px; border-left: 3px solid #cfd6dd; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr));
  gap: 16px 24px; align-items: start; }
section { break-inside: avoid; }
section header { display: flex; flex-wrap: wrap; gap: 2px 16px; align-items: center;
  font-size: 13px; color: #67717d; } section header b { color: #1d232b; font-weight: 600; }
mark { font-weight: 600; min-width: 64px; background: none; }
mark.right { color: #0072b2; } mark.wrong { color: #b84d00; }
.bar { width: 84px; } .bar path { stroke: #9aa3ad; }
.bar .up { fill: #0072b2; } .bar .down { fill: #d55e00; }
pre { margin: 4px 0; font: 13px/1.65 ui-monospace, Menlo, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; overflow: hidden; unicode-bidi: isolate; }
section pre { background: #f7f8fa; padding: 8px 10px; border-radius: 4px; }
pre i { font-style: normal; border-radius: 2px; } pre em { color: #b84d00; }
.warning { color: #b84d00; font-weight: 600; }
@media print { .legend { position: static; } body { padding: 0; } }
"""


def legend(can_colour_tokens):
    """The switch between the three colourings, and what the colours of the chosen one mean."""
    switches, meanings = [], []
    for mode, (letter, _, _, label, meaning) in MODES.items():
        state = " checked" if mode == "update" else "" if can_colour_tokens else " disabled"
        switches.append(f'<label><input type="radio" name="colour" id="by-{mode}"{state}>'
                        f'{label}</label>')
        shades = "".join(f'<i class="{letter}{n}">{"−" if n == -4 else "+" if n == 4 else "&nbsp;"}'
                         f'</i>' for n in range(-4, 5))
        meanings.append(f'<div class="{mode}">{shades} {meaning}</div>')
    return (f'<nav class="legend" id="legend">Colour of a token: {"".join(switches)}'
            f'{"".join(meanings)}</nav>')


def rollout_section(groups, tokenizer, note, config, budget):
    """Overview, legend and the chosen groups of one step."""
    chosen = choose_groups(groups)
    answers = [a for g in groups for a in g.answers]
    can_colour_tokens = tokenizer is not None and all(map(has_token_data, answers))
    scale = max(abs(a["advantage"]) for a in answers) or 1.0
    largest = scale
    if can_colour_tokens:
        largest = max(abs(a["advantage"] * a["weight"]) for a in answers) or 1.0
    cap = config.get("rollout_is_cap", 0)

    def render(answer):
        return answer_text(answer, tokenizer, cap, largest, budget)

    sections = [group_section(labels, group, i == 0, render, scale)
                for i, (labels, group) in enumerate(chosen)]
    warning = f'<p class="warning">{escaped(note)}</p>' if note else ""
    return f"""
<h2>Rollouts of step {answers[0]["step"]:,}</h2>
<p>{len(groups)} problems, {len(answers)} answers. A dot is an answer at the height of its reward,
filled if right, hollow if not. The line is the mean of its group. What an answer is above or below
that line is its advantage: above, it is reinforced; below, it is discouraged. A pointer over an
uncertain token below shows its probability.</p>
{overview(groups, chosen)}
{warning}{legend(can_colour_tokens)}
{"".join(sections)}"""


def page(title, rows, config, rollouts):
    """The whole page; rollouts: HTML of the chosen step, or nothing."""
    css = style()
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    averaging = ""
    if len(rows) > MAX_POINTS:
        averaging = (f"<p>Each point is the mean of {math.ceil(len(rows) / MAX_POINTS)} steps; "
                     "the number beside a name is its last value.</p>")
    settings = escaped(json.dumps(config, indent=1)[:20_000])
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width">
<title>{escaped(title)}</title>
<style>{css}</style>
</head>
<body>
<h1>{escaped(title)}</h1>
<div class="stats">{stat_line(rows, config)}</div>
{averaging}{charts(rows)}
{rollouts}
<h2>Settings</h2>
<details><summary><span>config.json</span></summary><pre>{settings}</pre></details>
</body>
</html>
"""


def rollout_file(run, step):
    """The rollout file of a step, the last one if step is None; None for a run without rollouts."""
    files = {int(path.stem.split("-")[1]): path for path in run.glob("rollouts/step-*.jsonl")}
    if step is None:
        return files[max(files)] if files else None
    if step not in files:
        there = f"{min(files)} to {max(files)}" if files else "none, as for any SFT run"
        raise SystemExit(f"report.py: --step {step}: {run}/rollouts has no such step; "
                         f"there are {there}")
    return files[step]


def find_tokenizer(run, config):
    """(tokenizer, ""), or (None, why the page has no coloured tokens)."""
    tried = []
    for folder in (run.resolve() / "final", config.get("model_name_or_path", "")):
        try:
            return load_tokenizer(folder), ""
        except (OSError, ValueError) as error:
            tried.append(f"{folder}: {error}")
    return None, "Tokens are not coloured, because no tokenizer was found. " + "; ".join(tried)


def report(run, step=None):
    """The HTML page of a run folder; at most MAX_BYTES, unless 40 tokens per answer exceed it."""
    run = Path(run)
    if not (run / "metrics.jsonl").is_file():
        raise SystemExit(f"report.py: {run} holds no metrics.jsonl, so it is not a run folder; "
                         "give the --output_dir of train_sft.py or train_grpo.py")
    rows = read_jsonl(run / "metrics.jsonl")
    if not rows:
        raise SystemExit(f"report.py: {run}/metrics.jsonl has no step yet; try again later")
    config = json.loads((run / "config.json").read_text())
    path = rollout_file(run, step)
    if path is None:
        return page(str(run), rows, config, "")

    groups = read_groups(path)
    tokenizer, note = None, ("This run was made before per-token log-probs were written: the text "
                             "is coloured by the answer's advantage alone.")
    if all(has_token_data(a) for g in groups for a in g.answers):
        tokenizer, note = find_tokenizer(run, config)
    if note:
        print(f"report.py: {note}", file=sys.stderr)
    for budget in TOKENS_PER_ANSWER:
        rollouts = rollout_section(groups, tokenizer, note, config, budget)
        text = page(str(run), rows, config, rollouts)
        if len(text.encode()) <= MAX_BYTES:
            break
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("run", type=Path, help="output_dir of a run")
    parser.add_argument("--step", type=int, help="step whose rollouts are shown; default: the last")
    parser.add_argument("--output", type=Path, help="default: report.html in the run folder")
    args = parser.parse_args()
    output = args.output or args.run / "report.html"
    output.write_text(report(args.run, args.step), encoding="utf-8")
    print(output)


if __name__ == "__main__":
    main()
