"""The page of a run with rewards: curves with their spread, completions as text, other pages."""

import re

import pytest
from test_report import NASTY, Page

from workflows import charts, progress, report, report_parts, report_rewards
from workflows.charts import Band, Curve, Scale
from workflows.grpo_report import TABLE

RECORD = {
    "trainer": "GRPOTrainer",
    "model": {"name": "tiny"},
    "evaluation": {"": 4},
    "settings": {"max_completion_length": 32},
    "defaults": {},
    "prompts": {"rows": 3, "shortest": 4, "median": 5, "longest": 9, "limit": 64,
                "edges": [0, 5, 10], "counts": [2, 1]},
    "total": 8,
}  # fmt: skip


def completion(n: int, **more) -> dict:
    return {
        "prompt": "2 + 2 =" if n % 2 else [{"role": "user", "content": f"{NASTY} {n}"}],
        "completion": f"answer {n} {NASTY}",
        "rewards": {"right": float(n), NASTY: None},
        "reward": float(n),
        "advantage": n - 3.5,
        "finish_reason": "length" if n % 2 else "stop",
    } | more


def step(n: int, **more) -> dict:
    return {
        "step": n, "epoch": n / 8, "loss": 0.01 * n, "learning_rate": 1e-5, "grad_norm": 0.5,
        "tokens_per_s": 100.0, "seconds": 1.0, "memory_gib": 1.0, "reward": n / 8,
        "reward_std": 0.25, "rewards/right/mean": n / 8, "rewards/right/std": 0.1,
        f"rewards/{NASTY}/mean": None, f"rewards/{NASTY}/std": None, "frac_reward_zero_std": 0.0,
        "kl": 0.01, "entropy": 1.0, "ratio": 1.0, "clip_ratio/low_mean": 0.0,
        "clip_ratio/high_mean": 0.1, "clip_ratio/high_max": 0.5, "completions/mean_length": 12.5,
        "completions/min_length": 3, "completions/max_length": 32, "learner_seconds": 0.5,
        "completions/clipped_ratio": 0.25, "rollout_tokens_per_s": 1e3, "mine": 2.0 * n,
        "learner_tokens_per_s": 2e3, "num_tokens": 99 * n, "sampling/sampling_logp_difference/mean":
        1e-6,
    } | more  # fmt: skip


ROWS = [
    *(step(n) for n in range(1, 7)),
    step(7, **{TABLE: [completion(n, letters=n) for n in range(8)]}),
    {"step": 7, "epoch": 0.9, "eval_reward": 0.75, "eval_rewards/right/mean": 0.7,
     "eval_completions/mean_length": 10.0, "eval_runtime": 1.0},
    {"step": 8, "epoch": 1.0, "eval_reward": 0.5, "eval_completions/mean_length": 11.0},
]  # fmt: skip


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(report.page(RECORD, ROWS))


def test_rewards_come_first_with_their_spread_and_the_best_evaluation(page):
    raw = report.page(RECORD, ROWS)
    first = raw[raw.index("<figure>") : raw.index("</figure>")]
    assert "<figcaption>reward</figcaption>" in first and 'class="band c0"' in first
    assert "eval, best 0.75 at step 7" in first
    tiles = page.text[: page.text.index("Curves")]
    assert "reward" in tiles and "best evaluation reward" in tiles and "0.75" in tiles
    for said in (
        "KL from the reference", "entropy", "clipped", "groups without a signal", "cut off",
        "between sampler and learner", "speed", "sampler", "learner", "time of a step", "mine",
        "evaluation: completions' length", "max_completion_length 32", "loss", "learning rate",
        "prompts by length", "reward right",
    ):  # fmt: skip
        assert said in page.text, said
    assert "streamed" not in page.text and "num_tokens" not in page.text


def test_best_and_worst_completions_stand_in_a_table_as_text(page):
    assert page.tags.count("script") == 1 and "img" not in page.tags
    text = page.text[page.text.index("Completions") : page.text.index("Data")]
    shown = [int(n) for n in re.findall(r"answer (\d)", text)]
    assert shown == [7, 6, 5, 2, 1, 0] and "2 more" in text
    assert "step 7, mean reward 0.875" in text
    for said in ("prompt", "completion", "right", "advantage", "ended by", "letters", "3.5",
                 "stop token", "length", f"user: {NASTY} 6", "2 + 2 ="):  # fmt: skip
        assert said in text, said


def test_the_newest_generations_are_shown_and_others_counted():
    many = [step(n, **{TABLE: [completion(n % 8)]}) for n in range(1, 10)]
    text = Page(report_rewards.completions(many)).text
    assert [int(n) for n in re.findall(r"step (\d+)", text)] == [9, 8, 7, 6, 5, 4]
    assert "3 earlier ones stand in metrics.jsonl" in text
    assert report_rewards.completions([step(1)]) == ""


def test_a_run_that_has_not_logged_a_step_has_a_page_too():
    text = Page(report.page(RECORD, [])).text
    assert "No step has been logged yet" in text and "prompts by length" in text


def test_other_runs_keep_their_page():
    plain = {k: v for k, v in RECORD.items() if k != "prompts"}
    rows = [{k: v for k, v in step(n).items() if "reward" not in k} for n in (1, 2)]
    raw = report.page(plain, rows)
    assert raw.index("<figcaption>loss") < raw.index("<figcaption>learning rate")
    assert "reward" not in Page(raw).text
    assert report_parts.across(rows) == Scale(0, 2)


def test_a_band_lies_where_its_numbers_are_and_widens_the_axis():
    band = Band("spread", [(0, -2.0, 2.0), (10, -1.0, 3.0), (5, float("nan"), 1.0)])
    drawn = charts.chart("x", [Curve("mean", [(0, 0.0), (10, 1.0)])], steps=Scale(0, 10),
                         bands=[band])  # fmt: skip
    low, high = map(float, re.search(r'data-ends="0 10 (\S+) (\S+)"', drawn).groups())
    assert low < -2 and high > 3
    points = re.search(r'class="band c0" d="M([^Z]+)Z"', drawn).group(1).split("L")
    heights = [(1000 - float(p.split()[1])) / 1000 * (high - low) + low for p in points]
    assert heights == pytest.approx([-2, -1, 3, 2], abs=0.01)
    assert '<li class="band c0">spread</li>' in drawn


def test_values_that_differ_late_have_labels_that_differ():
    drawn = charts.chart("x", [Curve("r", [(0, 1.0), (1, 1.00002)])], steps=Scale(0, 1))
    labels = re.findall(r'class="y"[^>]*>([^<]+)<', drawn)
    assert len(set(labels)) == len(labels) > 1


def test_lines_in_a_terminal_say_the_reward():
    assert progress._line(step(2)).startswith("reward 0.2500  loss 0.0200")
    said = progress._beside(ROWS[7] | {"eval_reward_std": 0.3, "eval_rewards/right/std": 0.2})
    assert "eval_reward 0.7500" in said and "std" not in said and "runtime" not in said
