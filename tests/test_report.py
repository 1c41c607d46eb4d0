"""recipes/report.py: the page in a real browser, hostile text, what is chosen and what is cut."""

import json
import math
import os
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "recipes"))
import report  # noqa: E402

HOSTILE = '</pre><script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">'
BROKEN = "lone \ud800 surrogate, bell \x07, right-to-left \u202e, face 😀"


# --------------------------------------------------------------------------------------------------
# Runs to report on
# --------------------------------------------------------------------------------------------------
def metrics(step, **more):
    return {"step": step, "loss": 0.1 / step, "lr": 1e-6, "reward/total": step / 2,
            "reward/cosine": math.nan, "reward/<b>mine": 0.5, "completions/mean_length": 90 - step,
            "update/kl": 0.001 * step, "time/step": 3.0, "time/rollout": 2.0, **more}


def answer(tokenizer, text, prompt=0, reward=1.0, advantage=0.0, **more):
    """A row of a rollout file, with per-token lists: every token at p = 1/2, no gap."""
    ids = tokenizer.encode(text.encode(errors="replace").decode(), add_special_tokens=False)
    half = [math.log(0.5)] * len(ids)
    return {"step": 2, "row": prompt, "prompt_index": prompt, "problem": f"Problem {prompt}",
            "answer": "4", "text": text, "token_ids": ids, "length": len(ids),
            "finish_reason": "stop", "outcome": "right" if reward > 0 else "wrong",
            "rewards": {"cosine": reward}, "reward": reward, "advantage": advantage,
            "logprobs": half, "rollout_logprobs": half, "entropy": [0.25] * len(ids),
            "weight": 1 / len(ids), **more}


def write_run(folder, steps, answers=None, tail="", **config):
    """A run folder as the trainers leave it; `tail` is what a crash left of the next line."""
    lines = [json.dumps(step) for step in steps]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + tail)
    (folder / "config.json").write_text(json.dumps(config))
    if answers is not None:
        (folder / "rollouts").mkdir()
        lines = [json.dumps(row) for row in answers]
        (folder / "rollouts/step-000002.jsonl").write_text("\n".join(lines) + "\n" + tail)
    return folder


@pytest.fixture
def grpo_run(tmp_path, demo, tokenizer):
    """Three groups with hostile text, one of them collapsed; a torn last line in both files."""
    rows = [
        answer(tokenizer, "a good answer", 0, 2.0, 1.0, problem=HOSTILE, answer=BROKEN),
        answer(tokenizer, HOSTILE + BROKEN, 0, -1.0, -1.0, outcome=HOSTILE,
               rewards={HOSTILE: 1.0, "late": math.nan}),
        answer(tokenizer, "the same", 1, 1.0), answer(tokenizer, "the same", 1, 1.0),
        answer(tokenizer, "fine", 2, 3.0, 0.7), answer(tokenizer, "not so fine", 2, 2.9, -0.7),
        answer(tokenizer, "no verdict", 2, math.nan)]
    rows[0]["rollout_logprobs"] = [math.log(0.25), *rows[0]["rollout_logprobs"][1:]]
    steps = [metrics(1), metrics(2, **{"update/entropy": math.nan, "eval/pass@1": 0.25})]
    steps[0] |= {"update/entropy": 0.3, "eval/pass@1": None}
    return write_run(tmp_path, steps, rows, tail='{"step": 3, "re',
                     model_name_or_path=str(demo / "base"), rollout_is_cap=1.5)


# --------------------------------------------------------------------------------------------------
# A real browser
# --------------------------------------------------------------------------------------------------
class Browser:
    """Headless Chromium, driven by its DevTools protocol: JSON messages that end in a zero byte."""

    def __init__(self, profile):
        program = shutil.which("chromium") or shutil.which("google-chrome")
        assert program, "no chromium: the report page is tested in it; apt-get install chromium"
        to_browser, self.writing = os.pipe()
        self.reading, from_browser = os.pipe()
        command = (f"exec '{program}' --headless=new --no-sandbox --disable-gpu --no-first-run "
                   f"--user-data-dir='{profile}' --remote-debugging-pipe "
                   f"3<&{to_browser} 4>&{from_browser}")
        self.process = subprocess.Popen(["bash", "-c", command], stderr=subprocess.DEVNULL,
                                        pass_fds=(to_browser, from_browser))
        os.close(to_browser)
        os.close(from_browser)
        self.events, self.session, self.buffer, self.count = [], None, b"", 0

    def call(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while (reply := self.read()).get("id") != self.count:
            self.events.append(reply)
        assert "error" not in reply, reply
        return reply["result"]

    def read(self):
        while b"\0" not in self.buffer:
            received = os.read(self.reading, 1 << 20)
            assert received, "chromium ended"
            self.buffer += received
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, path):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())

    def evaluate(self, expression):
        return self.call("Runtime.evaluate", expression=expression)["result"].get("value")

    def click(self, selector):
        place = json.loads(self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            "return JSON.stringify([r.x + r.width / 2, r.y + r.height / 2]) })()"))
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1],
                      button="left", clickCount=1)

    def complaints(self):
        """What the console shows: errors, warnings, and whatever a script of the page printed."""
        wanted = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [event["params"] for event in self.events if event["method"] in wanted]

    def requests(self):
        return [event["params"]["request"]["url"] for event in self.events
                if event["method"] == "Network.requestWillBeSent"]


@pytest.fixture
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.call("Browser.close")
    browser.process.wait(timeout=30)


def background(browser, selector):
    return browser.evaluate(
        f"getComputedStyle(document.querySelector('{selector}')).backgroundColor")


def is_visible(browser, selector):
    return browser.evaluate(f"document.querySelector('{selector}').checkVisibility()")


def test_the_page_in_a_browser(grpo_run, browser):
    done = run(sys.executable, ROOT / "recipes/report.py", grpo_run)
    page = grpo_run / "report.html"
    assert done.returncode == 0 and done.stdout.strip() == str(page), done.stderr
    browser.open(page)

    # groups: the most mixed one is open, the others unfold by a click
    groups = json.loads(browser.evaluate(
        "JSON.stringify([...document.querySelectorAll('.group')].map("
        "d => [d.querySelector('strong').innerText, d.open]))"))
    assert groups == [["most mixed + worst", True], ["best", False], ["collapsed", False]]
    assert not is_visible(browser, ".group ~ .group ~ .group section pre")
    browser.click(".group ~ .group ~ .group summary")
    assert is_visible(browser, ".group ~ .group ~ .group section pre")

    # the switch: three colourings, each with its legend
    token = ".group section pre i"
    seen = set()
    for mode in ("update", "logit", "gap"):
        browser.click(f"#by-{mode}")
        assert is_visible(browser, f"#legend .{mode}")
        assert browser.evaluate("[...document.querySelectorAll('#legend div')]"
                                ".filter(d => d.checkVisibility()).length") == 1
        assert background(browser, f"#legend .{mode} i") != "rgba(0, 0, 0, 0)"
        seen.add(background(browser, token))
    assert len(seen) == 3 and "rgba(0, 0, 0, 0)" not in seen

    # text of the model is text, whatever it is; nothing is fetched and nothing runs
    shown = browser.evaluate("document.body.innerText")
    assert shown.count("<script>window.hacked = 1</script>") >= 4  # problem, outcome, part, text
    assert "bell \\u0007, right-to-left \\u202e, face 😀" in shown
    assert "lone \\ud800 surrogate" in shown
    assert browser.evaluate("[window.hacked, document.scripts.length, document.images.length] + ''"
                            ) == ",0,0"
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]


def test_a_script_that_escaping_missed_cannot_run(grpo_run, browser):
    """The second line of defence: markup put into the finished page by hand is dead."""
    page = grpo_run / "page.html"
    page.write_text(report.report(grpo_run).replace("<h2>Settings</h2>", HOSTILE),
                    encoding="utf-8")
    browser.open(page)
    assert browser.evaluate("document.scripts.length + document.images.length") == 2
    time.sleep(0.5)  # an onerror handler would run after the load event
    assert browser.evaluate("typeof window.hacked") == "undefined"


# --------------------------------------------------------------------------------------------------
# What is on the page
# --------------------------------------------------------------------------------------------------
def test_a_run_in_progress_shows_its_whole_lines(grpo_run):
    page = report.report(grpo_run)
    assert "Step 2." in page
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "reward/total  0.5 → 1<" in page and "completions/mean_length  89 → 88<" in page
    assert "reward/&lt;b&gt;mine" in page and "reward/cosine  " not in page  # no chart: nan
    assert "1 of 2 right,\nreward 0.5 ± 2.12<" in page  # unbiased, as in the trainer
    assert "2 of 2 right" in page and page.count("All rewards are equal") == 1
    assert "eval/pass@1  0.25 → 0.25<" in page and "update/entropy  0.3 → 0.3<" in page
    # of the token that the sampler found at 1/4
    assert 'title="p 0.5, gap +0.693, entropy 0.25"' in page
    assert page.count('<b class="wrong">') == 2 and '<b class="right">right<' in page
    assert "right × 2" in page  # equal answers are shown once
    assert "late <b>nan</b>" in page and "reward <b>nan</b>" in page


def test_an_sft_run_shows_its_curves_alone(tmp_path):
    write_run(tmp_path, [{"step": i, "loss": 2 / i, "lr": 1e-5, "entropy": 0.5, "time/step": 1.0}
                         for i in range(1, 1001)])
    page = report.report(tmp_path)
    assert "Rollouts" not in page and 'class="group"' not in page and 'id="legend"' not in page
    assert [title for title in report.PANELS if f">{title}<" in page] == [
        "Loss", "Entropy, nats per token", "Learning rate", "Seconds per step, by phase"]
    assert "Steps per point of a curve: 7." in page and "loss  2 → 0.002<" in page
    assert len(page) < 120_000
    with pytest.raises(FileNotFoundError, match="rollouts/step-000003.jsonl"):
        report.report(tmp_path, step=3)


def test_curves_are_averaged_and_parts_are_found():
    rows = [{"step": i, "lr": math.nan if i == 7 else 1.0, "reward/total": 2.0, "reward/mine": i,
             "reward/missing": 0, "reward/late": None} for i in range(10)]
    assert len(report.panel_curves(rows, ["lr", "absent"])["lr"]) == 9
    curves = report.panel_curves(rows, ["reward/total", "reward/*"])
    assert list(curves) == ["reward/total", "reward/mine"]
    assert curves["reward/mine"].tolist() == [[i, i] for i in range(10)]
    long = [{"step": i, "entropy": i % 3} for i in range(8 * report.MAX_POINTS)]
    assert len(report.charts(long)) < len(report.charts(long[:report.MAX_POINTS])) + 1000


def test_a_step_without_any_reward(tmp_path, demo, tokenizer):
    rows = [answer(tokenizer, "one", 0, math.nan, outcome="bad_gold") for _ in range(2)]
    write_run(tmp_path, [metrics(2)], rows, model_name_or_path=str(demo / "base"),
              rollout_is_cap=0)
    assert "bad_gold × 2" in report.report(tmp_path)


def test_chosen_step_and_errors(tmp_path, grpo_run):
    first = (grpo_run / "rollouts/step-000002.jsonl").read_text().replace('"step": 2', '"step": 1')
    (grpo_run / "rollouts/step-000001.jsonl").write_text(first)
    assert "Rollouts of step 1<" in report.report(grpo_run, step=1)
    assert "Rollouts of step 2<" in report.report(grpo_run)
    with pytest.raises(FileNotFoundError, match="rollouts/step-000007.jsonl"):
        report.report(grpo_run, step=7)
    with pytest.raises(FileNotFoundError, match="rollouts/config.json"):
        report.report(grpo_run / "rollouts")
    (grpo_run / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no step yet"):
        report.report(grpo_run)
    done = run(sys.executable, ROOT / "recipes/report.py", grpo_run)
    assert done.returncode == 1 and done.stderr.startswith("report.py: "), done.stderr
    assert "Traceback" not in done.stderr


def test_what_the_colours_need_and_is_not_there(tmp_path, tokenizer):
    row = answer(tokenizer, "good", 0, 2.0, 1.0)
    write_run(tmp_path, [metrics(2)], [row], model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="gone"):
        report.report(tmp_path)


def test_the_page_stays_small_and_says_what_it_cuts(tmp_path, demo, tokenizer):
    rows = []
    for prompt in range(5):
        for i in range(12):
            row = answer(tokenizer, f"{i} start " + "é" * 5000 + " end", prompt, i, i - 5.5)
            row["rollout_logprobs"] = [math.log(0.5) + (-1) ** k for k in range(row["length"])]
            rows.append(row)
    write_run(tmp_path, [metrics(i) for i in range(1, 3000)], rows,
              model_name_or_path=str(demo / "base"), rollout_is_cap=2.0)
    page = report.report(tmp_path)
    assert len(page.encode()) < report.MAX_BYTES
    assert "8 of 12 different answers" in page
    text = page.split("<pre><i ")[1].split("</pre>")[0]  # the first answer
    cut = text.split("<em>… ")[1].split(" tokens are left out here")[0]
    shown = 1 + text.count("<i ")
    assert shown + int(cut.replace(",", "")) == rows[-1]["length"]
    best, worst = page.index("advantage <b>5.5<"), page.index("advantage <b>-5.5<")
    assert best < worst  # both are shown, in order of advantage


def test_the_overview_of_a_large_step_stays_small():
    answers = [{"reward": i % 3, "outcome": "right"} for i in range(64)]
    groups = [report.Group(answers) for _ in range(512)]
    report.choose_groups(groups)
    svg = report.overview(groups)
    assert len(svg) < 120_000 and ">best<" in svg


def test_the_groups_that_are_chosen():
    def group(rewards, outcomes):
        return report.Group([
            {"reward": r, "outcome": o} for r, o in zip(rewards, outcomes, strict=True)])

    def labels_of(groups):
        return [g.labels for g in groups]

    wrong, mixed = group([-1, -1], ["wrong", "no_answer"]), group([0, 1], ["wrong", "right"])
    collapsed, best = group([1, 1], ["right", "right"]), group([1, 3], ["right", "right"])
    chosen = report.choose_groups([wrong, mixed, collapsed, best])
    assert chosen == [mixed, best, wrong, collapsed]
    assert labels_of(chosen) == [["most mixed"], ["best"], ["worst"], ["collapsed"]]
    # one not shown yet goes before the best, although that has right answers
    wrong, zero = group([-1, -1], ["wrong", "wrong"]), group([0, 0], ["wrong", "wrong"])
    mixed, best = group([0, 1], ["wrong", "right"]), group([1, 1], ["right", "right"])
    chosen = report.choose_groups([wrong, zero, mixed, best])
    assert chosen == [mixed, best, wrong, zero] and zero.labels == ["collapsed"]
    [alone] = report.choose_groups([group([1, 1], ["right", "right"])])
    assert alone.labels == ["most mixed", "best", "worst", "collapsed"]


# --------------------------------------------------------------------------------------------------
# Colours
# --------------------------------------------------------------------------------------------------
def test_what_a_token_is_coloured_by():
    row = {"advantage": -2.0, "weight": 0.1, "logprobs": [0.0, math.log(0.5), math.log(0.8)],
           "rollout_logprobs": [0.0, math.log(0.5), math.log(0.2)]}
    update, logit, gap = report.token_updates(row, cap=3.0)
    assert update == pytest.approx([-0.2, -0.2, -0.6])  # ratio 4, capped at 3
    assert logit == pytest.approx([0.0, -0.1, -0.12])  # times 1 - p
    assert gap == pytest.approx([0.0, 0.0, math.log(4)])
    assert report.token_updates(row, cap=0)[0] == pytest.approx([-0.2] * 3)


def test_a_shade_grows_with_the_strength_and_its_colour_says_the_sign():
    found = [report.shade(x, "#07b", "#d50") for x in (0, 0.01, 0.25, 1, 5, -0.25, -1)]
    assert found == ["#d500", "#07b1", "#07b5", "#07ba", "#07ba", "#d505", "#d50a"]


def test_token_texts_add_up_to_the_text(tokenizer):
    text = "naïve 😀 = <b>\n  two spaces"
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts = report.token_texts(tokenizer, ids)
    assert "".join(texts) == text and len(texts) == len(ids)
    assert "".join(report.token_texts(tokenizer, ids[:-1])) == text[:-1]
    cut = tokenizer.encode("a😀", add_special_tokens=False)[:-1]
    assert report.token_texts(tokenizer, cut)[-1].endswith("\ufffd")  # a broken end is not lost


def test_numbers_for_people():
    shown = [report.number(x) for x in (0, 1.4236, -0.5, 12345, 4e-6, 1234, math.nan)]
    assert shown == ["0", "1.42", "-0.5", "12,345", "4e-06", "1,234", "nan"]
