"""
One self-contained HTML page about a run: its curves, and the rollouts of one step group by group.

    python recipes/report.py runs/NAME [--step N] [--output FILE]

    curves      every metric of metrics.jsonl that PANELS names; a run in progress will do
    overview    the groups of the step: each answer's reward beside the mean it is compared with
    groups      most mixed, best, worst, collapsed: problem, gold, answers, reward parts, advantage
    tokens      coloured by the update, by the update of the logit, or by the sampler-trainer gap

The page, report_template.html, has no script: groups unfold as <details>, the colour switch is CSS.
Text from models and data is escaped.
"""

import argparse
import html
import io
import json
import math
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from string import Template

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure  # without pyplot: no window, no state

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from model import load_tokenizer, read_jsonl  # noqa: E402

MAX_BYTES = 400_000
MAX_POINTS = 200  # per curve; longer runs are averaged over equal stretches
MAX_DOTS = 400  # in the overview, one per answer
MAX_ANSWERS = 8  # per group
TOKENS_PER_ANSWER = (1200, 600, 300, 150, 75, 40)  # tried in turn until the page is small enough
SHARE_LEVELS = (0.02, 0.1, 0.3, 0.6)  # of the largest update in the step: where a shade begins
GAP_LEVELS = (0.01, 0.05, 0.2, 0.7)  # nats: 0.01 is 1% of the probability, 0.7 a factor of 2

PANELS = {  # title: metrics; one ending in * means all with that start that are not named here
    "Reward and its parts": ["reward/total", "reward/*"],
    "Share of answers": ["completions/correct", "completions/truncated", "reward/missing",
                         "eval/pass@1"],
    "Tokens per answer": ["completions/mean_length", "eval/mean_length"],
    "Loss": ["loss", "eval/loss"],
    "Entropy in nats per token": ["update/entropy", "entropy"],
    "KL to the starting model, per token": ["update/kl"],
    "Gap between sampler and trainer": ["rollout/logprob_gap", "sync/logprob_gap"],
    "Rewards within a group": ["reward/std_within_group", "reward/groups_of_equal_rewards"],
    "Seconds per step, by phase": ["time/step", "time/*"],
    "Share of clipped tokens": ["update/clip_low", "update/clip_high"],
    "Gradient norm": ["grad_norm"],
    "Learning rate": ["lr"],
    "Tokens per second": ["tokens_per_second", "rollout/tokens_per_second"],
    "Peak memory in GB": ["peak_memory_gb"],
}

matplotlib.style.use("tableau-colorblind10")
matplotlib.rcParams.update({
    "svg.fonttype": "none",  # text stays text, in the reader's font
    "svg.hashsalt": "report",  # the same run gives the same bytes
    "text.parse_math": False,  # a metric's name may contain $
    "font.size": 8, "axes.grid": True, "grid.alpha": 0.4,
    "axes.spines.top": False, "axes.spines.right": False})


# --------------------------------------------------------------------------------------------------
# Text and numbers
# --------------------------------------------------------------------------------------------------
def escaped(text):
    r"""HTML of any text: markup escaped; control characters and lone surrogates as \uXXXX."""
    return html.escape("".join(
        c if c.isprintable() or c in "\n\t" else f"\\u{ord(c):04x}" for c in str(text)))


def number(x):
    """Three digits for people: 0.0123, 1.42, 12,345; nan where a reward has no verdict."""
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def is_number(x):
    return isinstance(x, (int, float)) and math.isfinite(x)


def as_svg(figure):
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg"):]


# --------------------------------------------------------------------------------------------------
# Curves
# --------------------------------------------------------------------------------------------------
def curve(rows, name):
    """(N, 2) array of step and value, where the metric is a number."""
    points = [(row["step"], row[name]) for row in rows if is_number(row.get(name))]
    return np.array(points).reshape(-1, 2)


def panel_curves(rows, wanted):
    """{metric: curve} of the metrics in a panel that this run has."""
    named = {name for names in PANELS.values() for name in names}
    others = sorted({name for row in rows for name in row} - named)
    names = []
    for name in wanted:
        matches = [other for other in others if other.startswith(name[:-1])]
        names += matches if name.endswith("*") else [name]
    curves = {name: curve(rows, name) for name in names}
    return {name: points for name, points in curves.items() if len(points)}


def charts(rows):
    """An SVG of the panels that this run has numbers for."""
    panels = {title: panel_curves(rows, wanted) for title, wanted in PANELS.items()}
    panels = {title: curves for title, curves in panels.items() if curves}
    height = math.ceil(len(panels) / 3)
    figure = Figure(figsize=(12, 2.5 * height), layout="constrained")
    for place, (title, curves) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(height, 3, place)
        axes.set_title(title, loc="left", weight="bold")
        axes.xaxis.get_major_locator().set_params(integer=True)
        for name, points in curves.items():
            parts = np.array_split(points, min(len(points), MAX_POINTS))
            steps, values = np.transpose([part.mean(axis=0) for part in parts])
            label = f"{name}  {number(points[0, 1])} → {number(points[-1, 1])}"
            marker = "." if len(parts) < 10 else ""
            axes.plot(steps, values, marker=marker, label=label)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.12), borderpad=0, frameon=False)
    return as_svg(figure)


# --------------------------------------------------------------------------------------------------
# Groups
# --------------------------------------------------------------------------------------------------
@dataclass
class Group:
    """The answers to one problem, best advantage first."""
    index: int
    answers: list

    def __post_init__(self):
        rewards = [a["reward"] for a in self.answers if is_number(a["reward"])] or [0.0]
        self.mean = statistics.fmean(rewards)
        self.std = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
        self.collapsed = len(set(rewards)) == 1  # equal rewards: every advantage is 0
        self.right = sum(a["outcome"] == "right" for a in self.answers)
        self.mixed = min(self.right, len(self.answers) - self.right), self.std


def read_groups(path):
    """The groups of a rollout file, in order of mean reward."""
    by_prompt = {}
    for answer in read_jsonl(path):
        by_prompt.setdefault(answer["prompt_index"], []).append(answer)
    groups = [Group(index, sorted(answers, key=lambda a: -a["advantage"]))
              for index, answers in by_prompt.items()]
    return sorted(groups, key=lambda g: (g.mean, g.index))


def choose_groups(groups):
    """[(labels, group)]: most mixed, best, worst and one collapsed; a group may have two labels."""
    most_mixed = max(groups, key=lambda g: g.mixed)
    picks = [("most mixed", most_mixed), ("best", groups[-1]), ("worst", groups[0])]
    taken = [g.index for _, g in picks]
    if collapsed := [g for g in groups if g.collapsed]:
        # rather one that is not shown yet, and one with right answers says more than one without
        pick = min(collapsed, key=lambda g: (g.index in taken, -g.right))
        picks.append(("collapsed", pick))
    chosen = {}
    for label, group in picks:
        chosen.setdefault(group.index, ([], group))[0].append(label)
    return list(chosen.values())


def overview(groups, chosen):
    """An SVG with a column per group: its answers' rewards as dots, and their mean."""
    names = {group.index: "\n".join(labels) for labels, group in chosen}
    every = math.ceil(sum(len(g.answers) for g in groups) / MAX_DOTS)
    shown = [g for i, g in enumerate(groups) if i % every == 0 or g.index in names]
    figure = Figure(figsize=(12, 2.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xticks([])
    axes.margins(x=0.01)
    for column, group in enumerate(shown):
        rewards = np.array([a["reward"] for a in group.answers])  # nan: no dot
        right = np.array([a["outcome"] == "right" for a in group.answers])
        x = column + np.linspace(-0.3, 0.3, len(rewards))
        axes.plot(x[right], rewards[right], "o", ms=4, color="#0072b2")
        axes.plot(x[~right], rewards[~right], "o", ms=4, color="#d55e00", fillstyle="none")
        axes.hlines(group.mean, column - 0.35, column + 0.35, color="black", linewidth=1)
        axes.text(column, 1.02, names.get(group.index, ""), url=f"#group-{group.index}",
                  transform=axes.get_xaxis_transform(), ha="center", color="#0b5c92", weight="bold")
    return as_svg(figure)


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


def token_updates(answer, cap):
    """
    Three (T,) arrays of an answer's tokens: update, update of the logit, gap.

    update is advantage x weight, and that is m_i times w_t as in the loss of train_grpo.py. The
    gradient reaches a token's own logit times 1 - p. Clip and KL term are left out.
    """
    logprobs = np.array(answer["logprobs"])
    gap = logprobs - answer["rollout_logprobs"]
    rollout_weight = np.minimum(np.exp(gap), cap) if cap else np.ones_like(gap)
    update = answer["advantage"] * answer["weight"] * rollout_weight
    return update, update * (1 - np.exp(logprobs)), gap


def shades(values, bounds):
    """-4 ... 4 for each value: how many of the bounds it reaches, with its sign."""
    return np.sign(values).astype(int) * np.digitize(np.abs(values), bounds)


def token_attributes(answer, cap, largest):
    """Of each token: its class in the three colourings; unless it is certain, also its numbers."""
    update, logit, gap = token_updates(answer, cap)
    by_update = shades(update / largest, SHARE_LEVELS)
    by_logit = shades(logit / largest, SHARE_LEVELS)
    by_gap = shades(gap, GAP_LEVELS)
    attributes = []
    for i, logprob in enumerate(answer["logprobs"]):
        look = f'class="u{by_update[i]} l{by_logit[i]} g{by_gap[i]}"'
        if by_logit[i] or by_gap[i]:
            look += f' title="p {math.exp(logprob):.2g}, gap {gap[i]:+.3f}'
            look += f', entropy {answer["entropy"][i]:.2f}"'
        attributes.append(look)
    return attributes


def answer_text(answer, tokenizer, cap, largest, budget):
    """An answer as <pre>, its tokens coloured; beyond `budget` tokens its middle is left out."""
    ids, attributes = answer["token_ids"], token_attributes(answer, cap, largest)
    cut = max(0, len(ids) - budget)
    head = budget * 2 // 3 if cut else len(ids)

    def coloured(span):
        tokens = zip(attributes[span], token_texts(tokenizer, ids[span]), strict=True)
        for look, same in groupby(tokens, key=lambda token: token[0]):
            text = escaped("".join(text for _, text in same)).replace("\n", "↵\n")
            yield f"<i {look}>{text}</i>"

    joint = f"<em>… {cut:,} tokens are left out here …</em>" if cut else ""
    start, end = coloured(slice(0, head)), coloured(slice(head + cut, None))
    return f"<pre>{''.join(start)}{joint}{''.join(end)}</pre>"


def answer_section(answer, copies, text_of):
    """One answer: outcome, advantage, reward with its parts, length, and the text in colour."""
    kind = "right" if answer["outcome"] == "right" else "wrong"
    times = f" × {copies}" if copies > 1 else ""
    facts = {"advantage": f"{answer['advantage']:+.2f}", "reward": number(answer["reward"])}
    facts |= {name: number(value) for name, value in answer["rewards"].items()}
    facts["tokens"] = f"{answer['length']:,}"
    facts = "".join(f"<span>{escaped(name)} <b>{value}</b></span>" for name, value in facts.items())
    cut = "<span>cut at the limit</span>" if answer["finish_reason"] == "length" else ""
    return (f'<section><header><b class="{kind}">{escaped(answer["outcome"])}{times}</b>'
            f"{facts}{cut}</header>{text_of(answer)}</section>")


def group_section(labels, group, text_of):
    """A group as <details>: the problem, the gold answer, and its answers by advantage."""
    by_text = {}
    for answer in group.answers:
        by_text.setdefault((answer["advantage"], answer["text"]), []).append(answer)
    different = list(by_text.values())
    shown = min(len(different), MAX_ANSWERS)
    sections, note = "", ""
    for i in np.linspace(0, len(different) - 1, shown).round().astype(int):
        copies = different[i]
        sections += answer_section(copies[0], len(copies), text_of)
    if len(different) > MAX_ANSWERS:
        note = f"<p>{MAX_ANSWERS} of {len(different)} different answers, evenly over the ranks.</p>"
    if group.collapsed:
        note += "<p>All rewards are equal: every advantage is 0, the group teaches nothing.</p>"
    problem, gold = group.answers[0]["problem"], group.answers[0]["answer"]
    heading = " ".join(problem.split())[:110]
    return f"""
<details id="group-{group.index}"{" open" if "most mixed" in labels else ""}>
<summary><strong>{" + ".join(labels)}</strong><span>{escaped(heading)}</span>
<small>{group.right} of {len(group.answers)} right,
reward {number(group.mean)} ± {number(group.std)}</small></summary>
<pre>{escaped(problem[:2000])}{" …" if len(problem) > 2000 else ""}</pre>
<p>gold answer <b>{escaped(gold[:300])}</b></p>
{note}<div class="answers">{sections}</div>
</details>"""


# --------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------
def rollout_file(run, step):
    """The rollout file of a step, the last one if step is None; None for a run without rollouts."""
    files = {int(path.stem.split("-")[1]): path for path in run.glob("rollouts/step-*.jsonl")}
    if step is None:
        return files[max(files)] if files else None
    if step not in files:
        there = f"{min(files)} to {max(files)}" if files else "none, as in any SFT run"
        raise ValueError(f"--step {step}: {run}/rollouts has no such step; there are {there}")
    return files[step]


def rollout_sections(path, run, config):
    """Yield the HTML of a step's rollouts, with fewer and fewer tokens per answer."""
    groups = read_groups(path)
    answers = [answer for group in groups for answer in group.answers]
    if "logprobs" not in answers[0]:
        raise ValueError(f"{path} has no log-probs per token; its run is older than this report")
    final = run.resolve() / "final"  # not there while the run is in progress
    tokenizer = load_tokenizer(final if final.is_dir() else config["model_name_or_path"])
    largest = max(abs(a["advantage"] * a["weight"]) for a in answers) or 1.0
    chosen = choose_groups(groups)
    dots = overview(groups, chosen)
    for budget in TOKENS_PER_ANSWER:
        text_of = partial(answer_text, tokenizer=tokenizer, cap=config["rollout_is_cap"],
                          largest=largest, budget=budget)
        yield dict(step=answers[0]["step"], overview=dots,
                   counts=f"{len(groups)} problems, {len(answers)} answers",
                   gap_levels=", ".join(map(str, GAP_LEVELS)),
                   groups="".join(group_section(*labelled, text_of) for labelled in chosen))


def report(run, step=None):
    """The HTML page of a run folder; at most MAX_BYTES, unless 40 tokens per answer exceed it."""
    if not (run / "metrics.jsonl").is_file():
        raise ValueError(f"{run} holds no metrics.jsonl; name the --output_dir of a trainer")
    rows = read_jsonl(run / "metrics.jsonl")
    if not rows:
        raise ValueError(f"{run}/metrics.jsonl has no step yet; try again later")
    path = rollout_file(run, step)
    config = json.loads((run / "config.json").read_text())
    progress = f"Step {rows[-1]['step']:,}."
    if config.get("max_steps", -1) > 0:
        progress = f"Step {rows[-1]['step']:,} of {config['max_steps']:,}."
    if len(rows) > MAX_POINTS:
        progress += f" Each point is a mean over up to {math.ceil(len(rows) / MAX_POINTS)} steps."
    template = (HERE / "report_template.html").read_text(encoding="utf-8")
    page, rollouts = map(Template, template.split("<!-- $rollouts, for a run that has some -->"))
    page = partial(page.substitute, title=escaped(run), progress=progress, curves=charts(rows),
                   config=escaped(json.dumps(config, indent=1)))
    if path is None:
        return page(rollouts="")
    for fields in rollout_sections(path, run, config):
        text = page(rollouts=rollouts.substitute(fields))
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
    try:
        output.write_text(report(args.run, args.step), encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"report.py: {error}")
    print(output)


if __name__ == "__main__":
    main()
