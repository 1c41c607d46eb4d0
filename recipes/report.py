"""
One self-contained HTML page about a run: its curves, and the rollouts of one step group by group.

    python recipes/report.py runs/NAME [--step N] [--output FILE]

The curves are those that PANELS names; a run in progress will do. The page, report_template.html,
has no script: groups unfold as <details>, the colour switch is CSS. All text is escaped.
"""

import argparse
import fnmatch
import html
import io
import json
import math
import sys
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
TOKENS_PER_ANSWER = (1200, 600, 300, 200, 150, 100, 70, 50)  # tried until the page is small enough
MAX_ANSWERS = 8  # per group
MAX_DOTS = 400  # in the overview, one per answer
MAX_POINTS = 150  # per curve; longer runs are averaged over equal stretches

PANELS = {  # title: metrics; a * takes every metric that no panel names in full
    "Reward and its parts": ["reward/total", "reward/*"],
    "Share of answers": ["completions/correct", "completions/truncated", "reward/missing",
                         "eval/pass@1", "eval/truncated"],
    "Tokens per answer": ["completions/mean_length", "eval/mean_length"],
    "Loss": ["loss", "eval/loss"],
    "Entropy, nats per token": ["update/entropy", "entropy"],
    "KL to the starting model, nats per token": ["update/kl"],
    "Standard deviation of a group's rewards": ["reward/std_within_group"],
    "Share of groups with equal rewards": ["reward/groups_of_equal_rewards"],
    "Gap between sampler and trainer, nats per token": ["rollout/logprob_gap", "sync/logprob_gap"],
    "Share of clipped tokens": ["update/clip_low", "update/clip_high"],
    "Gradient norm": ["grad_norm"],
    "Learning rate": ["lr"],
    "Seconds per step, by phase": ["time/step", "time/*"],
    "Tokens per second": ["tokens_per_second", "rollout/tokens_per_second"],
    "Peak memory, GB": ["peak_memory_gb"],
}
UPDATE_COLOURS = ("#07b", "#d50")  # blue: likelier after the step; orange: less likely
GAP_COLOURS = ("#73a", "#085")  # violet: the trainer finds the token likelier; green: the sampler
NAMED = {name for names in PANELS.values() for name in names}

matplotlib.style.use("tableau-colorblind10")
matplotlib.rcParams.update({
    "svg.fonttype": "none",  # text stays text, in the reader's font
    "font.sans-serif": "DejaVu Sans",  # one name: every text in a chart repeats the list
    "font.size": 8, "axes.grid": True, "grid.alpha": 0.4,
    "axes.spines.top": False, "axes.spines.right": False,
    "xtick.bottom": False, "ytick.left": False,  # the grid shows where a tick is
    "figure.constrained_layout.use": True})


def escaped(text):
    r"""HTML of any text: markup escaped; control characters and lone surrogates as \uXXXX."""
    return html.escape("".join(
        c if c.isprintable() or c in "\n\t" else f"\\u{ord(c):04x}" for c in str(text)))


def number(x):
    """Three digits for people: 0.0123, 1.42, 12,345; nan where a reward has no verdict."""
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def as_svg(axes):
    file = io.StringIO()
    axes.figure.savefig(file, format="svg")
    text = file.getvalue()
    return text[text.index("<svg"):]


# --------------------------------------------------------------------------------------------------
# Curves
# --------------------------------------------------------------------------------------------------
def panel_curves(rows, patterns):
    """{metric: (N, 2) array of step and value}, of a panel's metrics that have a number."""
    names = sorted({name for row in rows for name in row})
    curves = {}
    for pattern in patterns:
        for name in fnmatch.filter(names, pattern):
            points = np.array([(row["step"], row.get(name)) for row in rows], dtype=float)
            points = points[np.isfinite(points[:, 1])]  # None is nan by now
            if len(points) and (name == pattern or name not in NAMED):
                curves[name] = points
    return curves


def chart(title, curves):
    """A <figure> of curves over the steps; its legend gives the first and the last value."""
    axes = Figure(figsize=(4, 2.1)).add_subplot()
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend = ""
    for name, points in curves.items():
        parts = np.array_split(points, min(len(points), MAX_POINTS))
        steps, values = np.transpose([part.mean(axis=0) for part in parts])
        [line] = axes.plot(steps, values, marker="." if len(parts) < 10 else "")
        ends = f"{number(points[0, 1])} → {number(points[-1, 1])}"
        legend += f'<div><b style="color:{line.get_color()}">━</b> {escaped(name)}  {ends}</div>'
    return f"<figure><b>{title}</b>{as_svg(axes)}{legend}</figure>"


def charts(rows):
    """The <figure>s of the panels that this run has numbers for."""
    panels = {title: panel_curves(rows, patterns) for title, patterns in PANELS.items()}
    return "\n".join(chart(title, curves) for title, curves in panels.items() if curves)


# --------------------------------------------------------------------------------------------------
# Rollouts
# --------------------------------------------------------------------------------------------------
class Group:
    """The answers to one problem, best advantage first; labels: why the page shows it."""

    def __init__(self, answers):
        rewards = [a["reward"] for a in answers if math.isfinite(a["reward"])] or [0.0]
        self.answers, self.labels = answers, []
        self.mean = np.mean(rewards)
        self.std = np.std(rewards, ddof=1) if len(rewards) > 1 else 0.0  # as in train_grpo.py
        self.collapsed = len(set(rewards)) == 1  # equal rewards: every advantage is 0
        self.right = sum(a["outcome"] == "right" for a in answers)
        self.mixed = min(self.right, len(answers) - self.right), self.std


def read_groups(path):
    """The groups of a rollout file, in order of mean reward."""
    answers = sorted(read_jsonl(path), key=lambda a: (a["prompt_index"], -a["advantage"]))
    by_prompt = groupby(answers, key=lambda a: a["prompt_index"])
    return sorted([Group(list(same)) for _, same in by_prompt], key=lambda g: g.mean)


def choose_groups(groups):
    """Label and return the most mixed, best, worst and a collapsed group; some may be the same."""
    most_mixed = max(groups, key=lambda g: g.mixed)
    picks = {"most mixed": most_mixed, "best": groups[-1], "worst": groups[0]}
    if collapsed := [g for g in groups if g.collapsed]:
        # rather one that is not shown yet, and one with right answers says more than one without
        picks["collapsed"] = min(collapsed, key=lambda g: (g in picks.values(), -g.right))
    for label, group in picks.items():
        group.labels.append(label)
    return list(dict.fromkeys(picks.values()))


def overview(groups):
    """An SVG with a column per group: its answers' rewards as dots, and their mean."""
    every = math.ceil(sum(len(g.answers) for g in groups) / MAX_DOTS)
    shown = [g for i, g in enumerate(groups) if i % every == 0 or g.labels]
    axes = Figure(figsize=(9, 2.2)).add_subplot()
    axes.set(xticks=[], xlabel="problems, in order of their mean reward", ylabel="reward")
    axes.margins(x=0.01)
    for column, group in enumerate(shown):
        rewards = np.array([a["reward"] for a in group.answers])  # nan: no dot
        right = np.array([a["outcome"] == "right" for a in group.answers])
        x = column + np.linspace(-0.3, 0.3, len(rewards))
        axes.plot(x[right], rewards[right], "o", ms=3, color="#0072b2")
        axes.plot(x[~right], rewards[~right], "o", ms=3, color="#d55e00", fillstyle="none")
        axes.hlines(group.mean, column - 0.35, column + 0.35, color="black", linewidth=1)
        axes.text(column, 1.02, " + ".join(group.labels), transform=axes.get_xaxis_transform(),
                  rotation=20, color="#0b5c92", weight="bold")  # turned: neighbours do not collide
    return as_svg(axes)


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


def shade(strength, above, below):
    """A colour #RGBA for -1 ... 1; by the square root, or only the largest would be seen."""
    opacity = round(10 * math.sqrt(min(1.0, abs(strength))))
    return f"{above if strength > 0 else below}{opacity:x}"


def token_attributes(answer, cap, largest):
    """Of each token: its colours in the three colourings; unless it is certain, its numbers."""
    attributes = []
    numbers = zip(*token_updates(answer, cap), answer["logprobs"], answer["entropy"], strict=True)
    for update, logit, gap, logprob, entropy in numbers:
        look = f"--u:{shade(update / largest, *UPDATE_COLOURS)}"
        if logprob < -0.01 or abs(gap) > 0.01:
            look += f";--l:{shade(logit / largest, *UPDATE_COLOURS)}"
            look += f";--g:{shade(gap, *GAP_COLOURS)}"
            look += f'" title="p {math.exp(logprob):.2g}, gap {gap:+.3f}, entropy {entropy:.2f}'
        attributes.append(f'style="{look}"')
    return attributes


def answer_text(answer, tokenizer, cap, largest, budget):
    """An answer as <pre>, its tokens coloured; beyond `budget` tokens its middle is left out."""
    ids = answer["token_ids"]
    attributes = token_attributes(answer, cap, largest)

    def coloured(span):
        tokens = zip(attributes[span], token_texts(tokenizer, ids[span]), strict=True)
        spans = [f"<i {look}>{escaped(text)}</i>" for look, text in tokens]
        return "".join(spans).replace("\n", "↵\n")

    if len(ids) <= budget:
        return f"<pre>{coloured(slice(None))}</pre>"
    half = budget // 2
    note = f"<em>… {len(ids) - 2 * half:,} tokens are left out here …</em>"
    return f"<pre>{coloured(slice(half))}{note}{coloured(slice(-half, None))}</pre>"


def answer_section(answer, copies, text_of):
    """One answer: outcome, length, advantage, reward with its parts, and the text in colour."""
    kind = "right" if answer["outcome"] == "right" else "wrong"
    times = f" × {copies}" if copies > 1 else ""
    facts = {"tokens": answer["length"], "advantage": answer["advantage"],
             "reward": answer["reward"]}
    facts |= {f"reward/{name}": value for name, value in answer["rewards"].items()}
    facts = [f"<span>{escaped(name)} <b>{number(x)}</b></span>" for name, x in facts.items()]
    cut = "<span>cut at the limit</span>" if answer["finish_reason"] == "length" else ""
    return (f'<section><header><b class="{kind}">{escaped(answer["outcome"])}{times}</b>'
            f"{''.join(facts)}{cut}</header>{text_of(answer)}</section>")


def group_section(group, text_of):
    """A group as <details>: the problem, the gold answer, and its answers by advantage."""
    texts = [answer["text"] for answer in group.answers]
    different = list({answer["text"]: answer for answer in group.answers}.values())
    shown = min(len(different), MAX_ANSWERS)
    sections, note = "", ""
    for i in np.linspace(0, len(different) - 1, shown).round().astype(int):
        sections += answer_section(different[i], texts.count(different[i]["text"]), text_of)
    if len(different) > shown:
        note = f"<p>{shown} of {len(different)} different answers, evenly over the ranks.</p>"
    if group.collapsed:
        note += "<p>All rewards are equal: every advantage is 0; only a KL term has a gradient.</p>"
    problem = group.answers[0]["problem"]
    return f"""
<details class="group"{" open" if "most mixed" in group.labels else ""}>
<summary><strong>{" + ".join(group.labels)}</strong><span>{escaped(problem[:110])}</span>
<small>{group.right} of {len(group.answers)} right,
reward {number(group.mean)} ± {number(group.std)}</small></summary>
<pre>{escaped(problem)}</pre>
<p>gold answer <b>{escaped(group.answers[0]["answer"])}</b></p>
{note}<div class="answers">{sections}</div>
</details>"""


# --------------------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------------------
def rollout_file(run, step):
    """The rollout file of a step, the last one if step is None; None for a run without rollouts."""
    if step is not None:
        return run / f"rollouts/step-{step:06d}.jsonl"
    return max(run.glob("rollouts/step-*.jsonl"), default=None)


def curve_fields(run, config):
    """What the template needs for the first part of the page."""
    rows = read_jsonl(run / "metrics.jsonl")
    if not rows:
        raise ValueError(f"{run}/metrics.jsonl has no step yet; try again later")
    return {"title": escaped(run), "last_step": rows[-1]["step"], "charts": charts(rows),
            "stretch": math.ceil(len(rows) / MAX_POINTS),
            "config": escaped(json.dumps(config, indent=1))}


def report(run, step=None):
    """The HTML page of a run folder; at most MAX_BYTES, unless 50 tokens per answer exceed it."""
    config = json.loads((run / "config.json").read_text())
    fields = curve_fields(run, config)
    path = rollout_file(run, step)
    template = (HERE / "report_template.html").read_text(encoding="utf-8")
    if path is None:
        before, _, after = template.split("<!-- only a run with rollouts has this part -->\n")
        return Template(before + after).substitute(fields)

    groups = read_groups(path)
    answers = [answer for group in groups for answer in group.answers]
    final = run.resolve() / "final"  # not there while the run is in progress
    tokenizer = load_tokenizer(final if final.is_dir() else config["model_name_or_path"])
    largest = max(abs(a["advantage"] * a["weight"]) for a in answers) or 1.0
    chosen = choose_groups(groups)
    fields |= {"step": answers[0]["step"], "overview": overview(groups),
               "counts": f"{len(groups)} problems, {len(answers)} answers"}
    for budget in TOKENS_PER_ANSWER:
        text_of = partial(answer_text, tokenizer=tokenizer, cap=config["rollout_is_cap"],
                          largest=largest, budget=budget)
        fields["groups"] = "".join(group_section(group, text_of) for group in chosen)
        page = Template(template).substitute(fields)
        if len(page.encode()) <= MAX_BYTES:
            break
    return page


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
