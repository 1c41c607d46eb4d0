"""
How fast is the grader, and how often does it need mathematics?

    python benchmarks/grading.py                         answers as they are spread in MATH
    python benchmarks/grading.py --golds answers.json    your own: a JSON list of strings, or of
                                                         rows with `answer`

Prints, for answers alone, for short completions and for completions of 60,000 characters: items per
second of one process, CPU milliseconds (median, 99th percentile, worst), and the share that needed
an identity test of two expressions.  Then the format rewards on megabyte texts made to break
regular expressions, and hostile answers.
Targets: median 0.3 ms, p99 10 ms, format rewards 50 ms, hostile answers below 1 s.
"""

import argparse
import json
import platform
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import rewards  # noqa: E402

# 81 % of MATH's answers are plain numbers; the rest is spread over these.
OTHERS = r"""
    \frac{3}{7}; 2\sqrt{5}; \frac{\sqrt{3}}{2}; 12\pi; x^2+5x+6; (3,-2); [-2,7); 1,-1,i,-i
    90^\circ; 10\%; \begin{pmatrix}1\\-3\end{pmatrix}; y=2x+3; \text{(C)}; 204_5
    (-\infty,2)\cup(3,\infty); 3+2i; \frac{1+\sqrt5}{2}""".strip().replace("\n", ";").split(";")
BOMBS = ["</think>oxed{" * 80000, "oxed{" * 200000, "\\boxed{" * 150000, "\n</think>\n" * 100000,
         "}" * 1000000, "\\boxed " * 140000]


def as_a_model_writes(gold, draw):
    """The same answer in other words, or (one time in four) another answer."""
    forms = [
        gold,
        gold.replace(r"\frac", r"\dfrac"),
        gold.replace(",", ", "),
        f"x={gold}",
        f"{gold}.",
        gold.replace("(", r"\left(").replace(")", r"\right)"),
    ]
    return f"{gold}1" if draw.random() < 0.25 else draw.choice(forms)


def measure(name, calls):
    """Time every call once; caches are as in training, where completions share a gold answer."""
    inner, needed, seconds = rewards.same_expression, set(), []

    def counting(p, g):
        if p[0] != "num" or g[0] != "num":
            needed.add(len(seconds))
        return inner(p, g)

    rewards.same_expression = counting
    for call in calls:
        started = time.process_time()
        call()
        seconds.append(time.process_time() - started)
    rewards.same_expression = inner
    milliseconds = sorted(1e3 * t for t in seconds)
    median, p99 = (milliseconds[int(share * len(milliseconds))] for share in (0.5, 0.99))
    print(f"{name:<34} {len(calls) / sum(seconds):>9.0f} /s   median {median:.3f} ms   "
          f"p99 {p99:.3f} ms   worst {milliseconds[-1]:.1f} ms   "
          f"identity test {len(needed) / len(calls):.1%}")


def read_golds(path):
    rows = json.loads(Path(path).read_text())
    answers = (row["answer"] if isinstance(row, dict) else row for row in rows)
    return [gold for answer in answers if (gold := rewards.gold_answer(answer)) is not None]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golds", help="JSON list of answers, or of rows with `answer`.")
    parser.add_argument("--items", type=int, default=4000, help="Answers per line of the table.")
    arguments = parser.parse_args()
    draw = random.Random(0)
    if arguments.golds:
        golds = read_golds(arguments.golds)
    else:
        golds = [str(draw.randint(-999, 9999)) if draw.random() < 0.81 else
                 draw.choice(OTHERS).strip() for _ in range(arguments.items)]
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, "
          f"{len(golds)} gold answers")
    golds = draw.choices(golds, k=arguments.items)
    pairs = [(as_a_model_writes(gold, draw), gold) for gold in golds]
    measure("answers", [lambda p=p, g=g: rewards.is_equal(p, g) for p, g in pairs])
    sentence = "We compute $x_{1} = \\frac{1}{2}$ and check again. "
    for length in (2000, 60000):
        text = sentence * (length // 50)
        texts = [(f"{text}</think> \\boxed{{{p}}}", g) for p, g in pairs]
        measure(f"completions of {length} characters",
                [lambda t=t, g=g: rewards.grade(t, g) for t, g in texts])
    measure("60000 characters, no box", [lambda g=g: rewards.grade(text, g) for g in golds[:500]])
    for function in (rewards.format_reward, rewards.format_open_rs_reward):
        measure("format reward, 1 MB", [lambda b=b, f=function: f(b) for b in BOMBS])

    import test_grading

    hostile = [(h, g) for h in test_grading.hostile_inputs() for g in ("5", "x^2+1", "n!")]
    measure("hostile answers", [lambda h=h, g=g: rewards.is_equal(h, g) for h, g in hostile])


if __name__ == "__main__":
    main()
