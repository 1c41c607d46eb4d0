"""
How fast is the grader, and how often does it need mathematics?

    python benchmarks/grading.py                         answers of the kinds in the proportions of MATH
    python benchmarks/grading.py --golds answers.json    one's own: a JSON list of strings, or of rows with `answer`

Prints, for answers alone, for short completions and for completions of 60,000 characters: items per second of one
process, CPU milliseconds (median, 99th percentile, worst), and the share that went past strings and exact numbers to an
identity test. Then the format rewards on megabyte texts made to break regular expressions, and hostile answers.
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
OTHERS = [
    r"\frac{3}{7}",
    r"2\sqrt{5}",
    r"\frac{\sqrt{3}}{2}",
    r"12\pi",
    r"x^2+5x+6",
    r"(3,-2)",
    r"[-2,7)",
    r"1,-1,i,-i",
    r"90^\circ",
    r"10\%",
    r"\begin{pmatrix}1\\-3\end{pmatrix}",
    r"y=2x+3",
    r"\text{(C)}",
    r"204_5",
    r"(-\infty,2)\cup(3,\infty)",
    r"3+2i",
    r"\frac{1+\sqrt5}{2}",
]


def as_a_model_writes(gold, draw):
    """The same answer in another hand, or (one time in four) another answer."""
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
    """Time each call once; caches are as in training, where one gold answer meets a group of completions."""
    inner, needed = rewards.same_expression, set()

    def counting(p, g, factor=None):
        if p[0] != "num" or g[0] != "num":
            needed.add(len(seconds))
        return inner(p, g, factor)

    rewards.same_expression, seconds = counting, []
    for call in calls:
        started = time.process_time()
        call()
        seconds.append(time.process_time() - started)
    rewards.same_expression = inner
    milliseconds = sorted(1e3 * t for t in seconds)
    median, p99 = (milliseconds[int(share * len(milliseconds))] for share in (0.5, 0.99))
    print(
        f"{name:<34} {len(calls) / sum(seconds):>9.0f} /s   median {median:.3f} ms   p99 {p99:.3f} ms   "
        f"worst {milliseconds[-1]:.1f} ms   identity test {len(needed) / len(calls):.1%}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golds", help="JSON list of answers, or of rows with `answer`.")
    parser.add_argument("--items", type=int, default=4000, help="Answers per line of the table.")
    arguments = parser.parse_args()
    draw = random.Random(0)
    if arguments.golds:
        rows = json.loads(Path(arguments.golds).read_text())
        golds = [
            gold
            for row in rows
            if (gold := rewards.gold_answer(row["answer"] if isinstance(row, dict) else row)) is not None
        ]
    else:
        golds = [
            str(draw.randint(-999, 9999)) if draw.random() < 0.81 else draw.choice(OTHERS)
            for _ in range(arguments.items)
        ]
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {len(golds)} gold answers"
    )
    pairs = [(as_a_model_writes(gold, draw), gold) for gold in draw.choices(golds, k=arguments.items)]
    filler = {
        length: "We compute $x_{1} = \\frac{1}{2}$ and check again. " * (length // 50) for length in (2000, 60000)
    }
    measure("answers", [lambda p=p, g=g: rewards.is_equal(p, g) for p, g in pairs])
    for length, text in filler.items():
        measure(
            f"completions of {length} characters",
            [lambda p=p, g=g, t=text: rewards.grade(f"{t}</think> \\boxed{{{p}}}", g) for p, g in pairs],
        )
    measure("60000 characters, no box", [lambda g=g: rewards.grade(filler[60000], g) for _, g in pairs[:500]])
    bombs = ["</think>oxed{" * 80000, "oxed{" * 200000, "\\boxed{" * 150000, "\n</think>\n" * 100000, "}" * 1000000]
    for function in (
        rewards.format_reward,
        lambda text: rewards.format_reward(text, strict=False),
        rewards.format_open_rs_reward,
    ):
        measure("format reward, 1 MB", [lambda b=b, f=function: f(b) for b in bombs])

    import test_grading

    measure(
        "hostile answers",
        [lambda h=h, g=g: rewards.is_equal(h, g) for h in test_grading.hostile_inputs() for g in ("5", "x^2+1", "n!")],
    )


if __name__ == "__main__":
    main()
